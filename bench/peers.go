package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	watermillsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	watermillmessage "github.com/ThreeDotsLabs/watermill/message"
	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

// riverJob is a notification as a job of River. Its key is what is unique about it.
type riverJob struct {
	Type          string  `json:"type" river:"unique"`
	BookingID     int64   `json:"booking_id" river:"unique"`
	CandidateTgID int64   `json:"candidate_tg_id" river:"unique"`
	RecruiterTgID int64   `json:"recruiter_tg_id"`
	CorrelationID string  `json:"correlation_id"`
	Payload       message `json:"payload"`
}

func (riverJob) Kind() string { return kind }

func riverJobOf(key, revision int64) riverJob {
	return riverJob{kind, booking(key), candidate(key), recruiter(key), correlation(key), messageOf(revision)}
}

var unique = &river.InsertOpts{UniqueOpts: river.UniqueOpts{ByArgs: true}}

type riverClient = river.Client[pgx.Tx]

// newRiver makes River's tables in the place, and a client of them.
func newRiver(ctx context.Context, p *place, cfg river.Config) (*riverClient, error) {
	driver := riverpgxv5.New(p.pool)
	quiet := slog.New(slog.DiscardHandler)
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Schema: p.schema, Logger: quiet})
	if err != nil {
		return nil, err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return nil, err
	}
	cfg.Schema, cfg.Logger = p.schema, quiet
	return river.NewClient(driver, &cfg)
}

var (
	riverPlain  = riverAdder("River, not unique", nil)
	riverUnique = riverAdder("River, unique", unique)
)

func riverAdder(name string, opts *river.InsertOpts) adder {
	return adder{name, func(ctx context.Context, b *bench, schema, status string, conns int) (*place, func(pick) op, error) {
		p, client, err := b.riverPlace(ctx, schema, status, conns)
		return p, func(pick pick) op {
			return func(ctx context.Context, tx pgx.Tx, i int64) error {
				_, err := client.InsertTx(ctx, tx, riverJobOf(pick(i)), opts)
				return err
			}
		}, err
	}}
}

// riverPlace is a place with River's tables and the first jobs.
func (b *bench) riverPlace(ctx context.Context, schema, status string, conns int) (*place, *riverClient, error) {
	p, err := b.newPlace(ctx, schema, conns)
	if err != nil {
		return p, nil, err
	}
	client, err := newRiver(ctx, p, river.Config{})
	if err != nil {
		return p, nil, err
	}
	const chunk = 5000
	for first := 1; first <= b.preload; first += chunk {
		var jobs []river.InsertManyParams
		for key := first; key < first+chunk && key <= b.preload; key++ {
			jobs = append(jobs, river.InsertManyParams{Args: riverJobOf(int64(key), 0), InsertOpts: unique})
		}
		if _, err := client.InsertManyFast(ctx, jobs); err != nil {
			return p, nil, err
		}
	}
	if status == "sent" {
		err := b.exec(ctx, "UPDATE "+schema+".river_job SET state = 'completed', attempt = 1, finalized_at = now()",
			"VACUUM FULL "+schema+".river_job")
		if err != nil {
			return p, nil, err
		}
	}
	return p, client, p.settle(ctx)
}

// watermillSchema puts a topic's tables into the place's schema.
func watermillSchema(p *place, batch int) watermillsql.DefaultPostgreSQLSchema {
	return watermillsql.DefaultPostgreSQLSchema{
		GenerateMessagesTableName: func(topic string) string { return fmt.Sprintf(`%s."watermill_%s"`, p.schema, topic) },
		SubscribeBatchSize:        batch,
	}
}

func watermillOffsets(p *place) watermillsql.DefaultPostgreSQLOffsetsAdapter {
	return watermillsql.DefaultPostgreSQLOffsetsAdapter{
		GenerateMessagesOffsetsTableName: func(topic string) string { return fmt.Sprintf(`%s."watermill_offsets_%s"`, p.schema, topic) },
	}
}

// newWatermill makes the topic's tables, and a subscriber of it.
func newWatermill(p *place, batch int) (*watermillsql.Subscriber, error) {
	sub, err := watermillsql.NewSubscriber(watermillsql.BeginnerFromPgx(p.pool), watermillsql.SubscriberConfig{
		SchemaAdapter:  watermillSchema(p, batch),
		OffsetsAdapter: watermillOffsets(p),
		PollInterval:   time.Millisecond,
	}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	return sub, sub.SubscribeInitialize(kind)
}

// watermillFillSQL writes the first n messages.
func watermillFillSQL(p *place, n int) string {
	return fmt.Sprintf(`INSERT INTO %s (uuid, payload, metadata, transaction_id)
		SELECT gen_random_uuid(), %s, '{}', pg_current_xact_id() FROM generate_series(1, %d)`,
		watermillSchema(p, 0).MessagesTable(kind), payloadLiteral(), n)
}

var watermillPublish = adder{"watermill-sql", func(ctx context.Context, b *bench, schema, _ string, conns int) (*place, func(pick) op, error) {
	p, err := b.newPlace(ctx, schema, conns)
	if err != nil {
		return p, nil, err
	}
	if _, err := newWatermill(p, 0); err != nil {
		return p, nil, err
	}
	if err := b.exec(ctx, watermillFillSQL(p, b.preload)); err != nil {
		return p, nil, err
	}
	schemaAdapter := watermillSchema(p, 0)
	return p, func(pick pick) op {
		return func(ctx context.Context, tx pgx.Tx, i int64) error {
			pub, err := watermillsql.NewPublisher(watermillsql.TxFromPgx(tx), watermillsql.PublisherConfig{SchemaAdapter: schemaAdapter}, watermill.NopLogger{})
			if err != nil {
				return err
			}
			key, revision := pick(i)
			payload, err := json.Marshal(riverJobOf(key, revision)) // it has no key, so the message says whom it is for
			if err != nil {
				return err
			}
			msg := watermillmessage.NewMessage(watermill.NewUUID(), payload)
			msg.SetContext(ctx)
			return pub.Publish(kind, msg)
		}
	}, p.settle(ctx)
}}
