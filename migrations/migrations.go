// Package migrations holds the schema of the outbox as numbered SQL files, for
// services that run all their migrations with one tool. Others call
// outbox.Migrate, which runs the same files.
//
// The files run as they are under goose, tern and golang-migrate, from a copy or
// from [FS]. Each runs in one transaction, puts the table into the first schema
// of the search_path, changes nothing when run again, and says at its top what
// it locks. None has a way down: dropping the table drops the memory of what was
// sent.
package migrations

import "embed"

// FS holds the files, NNNN_name.up.sql, at its root.
//
//go:embed *.sql
var FS embed.FS
