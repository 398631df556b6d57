package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/seed3357934d/outbox/internal/pgserver"
)

// settings are those of a server of our own. No checkpoint comes by itself: they are
// made between the sections.
var settings = map[string]string{
	"fsync":              "on",
	"synchronous_commit": "on",
	"full_page_writes":   "on",
	"shared_buffers":     "1GB",
	"max_wal_size":       "8GB",
	"checkpoint_timeout": "4h",
	"max_connections":    "400",
}

// start makes a database, on a server of our own unless a URL is given. Stop removes
// what start made.
func (b *bench) start(ctx context.Context, serverURL string) (stop func() error, err error) {
	var server *pgserver.Server
	if serverURL == "" {
		server, err = pgserver.Start(ctx, pgserver.Options{
			Version: os.Getenv("OUTBOX_TEST_POSTGRES"), Settings: settings, OnDisk: true,
			Logf: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) },
		})
		if err != nil {
			return nil, err
		}
		serverURL = server.URL
		b.meter = newMeter(server.Container)
	} else {
		b.meter = newMeter("")
	}
	stopServer := func() error {
		if server == nil {
			return nil
		}
		return server.Stop()
	}
	stopDatabase, err := b.createDatabase(ctx, serverURL)
	if err != nil {
		return nil, errors.Join(err, stopServer())
	}
	return func() error { return errors.Join(stopDatabase(), stopServer()) }, nil
}

func (b *bench) createDatabase(ctx context.Context, serverURL string) (stop func() error, err error) {
	onServer := func(ctx context.Context, sql string) error {
		pool, err := pgxpool.New(ctx, serverURL)
		if err != nil {
			return err
		}
		defer pool.Close()
		return pgserver.Exec(ctx, pool, sql)
	}
	name := fmt.Sprintf("outbox_bench_%d_%d", os.Getpid(), time.Now().UnixMilli())
	if err := onServer(ctx, "CREATE DATABASE "+name); err != nil {
		return nil, err
	}
	drop := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		return onServer(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
	}
	u, err := url.Parse(serverURL)
	if err != nil {
		return nil, errors.Join(err, drop())
	}
	u.Path = "/" + name
	b.url = u.String()
	if b.db, err = b.setupPool(ctx); err != nil {
		return nil, errors.Join(err, drop())
	}
	return func() error {
		b.db.Close()
		return drop()
	}, nil
}

// pool has the defaults of pgx but for the number of connections.
func (b *bench) pool(ctx context.Context, conns int) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(b.url)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = int32(conns)
	return pgxpool.NewWithConfig(ctx, cfg)
}

// setupPool does not wait for the disk, and has memory to build indexes.
func (b *bench) setupPool(ctx context.Context) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(b.url)
	if err != nil {
		return nil, err
	}
	cfg.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
	cfg.ConnConfig.RuntimeParams["maintenance_work_mem"] = "512MB"
	return pgxpool.NewWithConfig(ctx, cfg)
}

// exec runs statements outside of what is measured.
func (b *bench) exec(ctx context.Context, sqls ...string) error {
	for _, sql := range sqls {
		if _, err := b.db.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%.80s: %w", sql, err)
		}
	}
	return nil
}

// one returns the single value of a query.
func one[T any](ctx context.Context, pool *pgxpool.Pool, sql string, args ...any) (v T, err error) {
	if err = pool.QueryRow(ctx, sql, args...).Scan(&v); err != nil {
		err = fmt.Errorf("%.80s: %w", sql, err)
	}
	return v, err
}

// drop removes schemas when their section has ended.
func (b *bench) drop(ctx context.Context, places ...*place) error {
	var err error
	for _, p := range places {
		if p == nil {
			continue
		}
		p.pool.Close()
		err = errors.Join(err, b.exec(ctx, "DROP SCHEMA IF EXISTS "+p.schema+" CASCADE"))
	}
	return err
}
