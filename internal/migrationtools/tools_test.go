// Package migrationtools shows that common migration tools run the files of the
// package migrations as they are. It is a module of its own for the sake of their
// dependencies.
package migrationtools

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"testing"

	"github.com/golang-migrate/migrate/v4"
	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/jackc/pgx/v5/stdlib"
	tern "github.com/jackc/tern/v2/migrate"
	"github.com/pressly/goose/v3"
	"github.com/stretchr/testify/require"

	"github.com/seed3357934d/outbox"
	"github.com/seed3357934d/outbox/internal/pgserver"
	"github.com/seed3357934d/outbox/migrations"
)

func TestTools(t *testing.T) {
	ctx := t.Context()
	server, err := pgserver.Start(ctx, pgserver.Options{Version: os.Getenv("OUTBOX_TEST_POSTGRES"), Logf: t.Logf})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Stop()) })

	for name, up := range map[string]func(t *testing.T, url string){
		"goose": func(t *testing.T, url string) {
			db, err := sql.Open("pgx", url)
			require.NoError(t, err)
			defer db.Close()
			provider, err := goose.NewProvider(goose.DialectPostgres, db, migrations.FS)
			require.NoError(t, err)
			_, err = provider.Up(ctx)
			require.NoError(t, err)
		},
		"tern": func(t *testing.T, url string) {
			conn, err := pgx.Connect(ctx, url)
			require.NoError(t, err)
			defer conn.Close(context.Background())
			m, err := tern.NewMigrator(ctx, conn, "schema_version")
			require.NoError(t, err)
			require.NoError(t, m.LoadMigrations(migrations.FS))
			require.NoError(t, m.Migrate(ctx))
		},
		"golang-migrate": func(t *testing.T, url string) {
			db, err := sql.Open("pgx", url)
			require.NoError(t, err)
			defer db.Close()
			source, err := iofs.New(migrations.FS, ".")
			require.NoError(t, err)
			driver, err := migratepgx.WithInstance(db, &migratepgx.Config{})
			require.NoError(t, err)
			m, err := migrate.NewWithInstance("iofs", source, "pgx", driver)
			require.NoError(t, err)
			require.NoError(t, m.Up())
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := pgx.Connect(ctx, server.URL)
			require.NoError(t, err)
			defer conn.Close(context.Background())
			require.NoError(t, pgserver.Exec(ctx, conn, fmt.Sprintf("CREATE DATABASE %s", pgx.Identifier{name}.Sanitize())))
			cfg, err := pgxpool.ParseConfig(server.URL)
			require.NoError(t, err)
			cfg.ConnConfig.Database = name
			pool, err := pgxpool.NewWithConfig(ctx, cfg)
			require.NoError(t, err)
			defer pool.Close()

			up(t, fmt.Sprintf("postgres://%s@%s:%d/%s?sslmode=disable", cfg.ConnConfig.User, cfg.ConnConfig.Host, cfg.ConnConfig.Port, name))
			require.NoError(t, outbox.Migrate(ctx, pool), "the library goes on where the tool stopped")
			store, err := outbox.NewPGStore(pool, outbox.Config{})
			require.NoError(t, err)
			require.NoError(t, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				res, err := store.AddNotification(ctx, tx, outbox.NewNotification{Type: "reject", BookingID: 7})
				require.Equal(t, outbox.OutcomeCreated, res.Outcome)
				return err
			}))
		})
	}
}
