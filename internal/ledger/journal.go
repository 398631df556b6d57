package ledger

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// Journal is an append-only file of records, one a line. Each process writes one of its
// own. It is safe for concurrent use.
type Journal struct {
	file *os.File

	mu      sync.Mutex
	written int64 // records

	syncing sync.Mutex
	synced  int64 // records
}

// Create creates the file of a journal, which must not exist.
func Create(path string) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	return &Journal{file: f}, nil
}

// Append returns when the records are on disk. Calls that wait at the same time share
// one fsync.
func (j *Journal) Append(records ...Record) error {
	at, err := j.write(records)
	if err != nil {
		return err
	}
	j.syncing.Lock()
	defer j.syncing.Unlock()
	if j.synced >= at {
		return nil
	}
	j.mu.Lock()
	reached := j.written
	j.mu.Unlock()
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	j.synced = reached
	return nil
}

// Note writes records without waiting for the disk. They outlive the process, and not
// the machine.
func (j *Journal) Note(records ...Record) error {
	_, err := j.write(records)
	return err
}

// write writes records in one piece, and returns how many there are then.
func (j *Journal) write(records []Record) (written int64, err error) {
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	for _, r := range records {
		if err := enc.Encode(r); err != nil {
			return 0, fmt.Errorf("ledger: %w", err)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := j.file.Write(text.Bytes()); err != nil {
		return 0, fmt.Errorf("ledger: %w", err)
	}
	j.written += int64(len(records))
	return j.written, nil
}

// Close closes the file.
func (j *Journal) Close() error { return j.file.Close() }

// Read returns the records of a journal. A last line without an end was torn by
// the death of its writer, and is left out; any other line must be whole.
func Read(path string) ([]Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	defer f.Close()
	var records []Record
	lines := bufio.NewReader(f)
	for n := 1; ; n++ {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return records, nil
		}
		if err != nil {
			return nil, fmt.Errorf("ledger: %w", err)
		}
		var r Record
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("ledger: %s, line %d: %w", path, n, err)
		}
		records = append(records, r)
	}
}
