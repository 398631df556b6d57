package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/seed3357934d/outbox"
)

// What the service notifies candidates of.
const (
	typeConfirmed = "booking_confirmed"
	typeRejected  = "booking_rejected"
)

var errTaken = errors.New("the slot is taken")

// service is the part of a booking service that changes bookings and lets
// candidates know. Its methods run in the caller's transaction: the booking and
// its notification are committed together or not at all. A request that comes
// again may call them again.
type service struct {
	outbox   outbox.Store
	bookings string // the table, quoted and qualified
}

// createBookings creates the table. A booking is free, booked or rejected.
func (s *service) createBookings(ctx context.Context, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `CREATE TABLE `+s.bookings+` (
		id              bigint PRIMARY KEY,
		slot            text   NOT NULL,
		recruiter_tg_id bigint NOT NULL,
		candidate_tg_id bigint,
		status          text   NOT NULL DEFAULT 'free'
	)`)
	return err
}

// content is the payload of a notification: what its text is made of.
type content struct {
	Slot   string `json:"slot"`
	Reason string `json:"reason,omitempty"`
}

// reject rejects a booking and tells its candidate. A reason given later goes out
// too, as long as the message has not.
func (s *service) reject(ctx context.Context, tx pgx.Tx, bookingID int64, reason string) (outbox.AddResult, error) {
	var slot string
	var candidate, recruiter int64
	err := tx.QueryRow(ctx, `UPDATE `+s.bookings+` SET status = 'rejected'
		WHERE id = $1 AND status IN ('booked', 'rejected')
		RETURNING slot, candidate_tg_id, recruiter_tg_id`, bookingID).Scan(&slot, &candidate, &recruiter)
	if err != nil {
		return outbox.AddResult{}, fmt.Errorf("reject booking %d: %w", bookingID, err)
	}
	return s.outbox.AddNotification(ctx, tx, outbox.NewNotification{
		Type:          typeRejected,
		BookingID:     bookingID,
		CandidateTgID: candidate,
		RecruiterTgID: recruiter,
		Payload:       content{Slot: slot, Reason: reason},
	})
}

// book gives a free slot to a candidate and confirms it. errTaken, if it is
// another's by now, has the caller roll back, and the confirmation with it.
func (s *service) book(ctx context.Context, tx pgx.Tx, bookingID, candidate int64) (outbox.AddResult, error) {
	var slot string
	var recruiter int64
	err := tx.QueryRow(ctx, `SELECT slot, recruiter_tg_id FROM `+s.bookings+` WHERE id = $1`,
		bookingID).Scan(&slot, &recruiter)
	if err != nil {
		return outbox.AddResult{}, fmt.Errorf("book %d: %w", bookingID, err)
	}
	res, err := s.outbox.AddNotification(ctx, tx, outbox.NewNotification{
		Type:          typeConfirmed,
		BookingID:     bookingID,
		CandidateTgID: candidate,
		RecruiterTgID: recruiter,
		Payload:       content{Slot: slot},
	})
	if err != nil {
		return outbox.AddResult{}, err
	}
	tag, err := tx.Exec(ctx, `UPDATE `+s.bookings+` SET status = 'booked', candidate_tg_id = $2
		WHERE id = $1 AND (status = 'free' OR status = 'booked' AND candidate_tg_id = $2)`, bookingID, candidate)
	if err != nil {
		return outbox.AddResult{}, fmt.Errorf("book %d: %w", bookingID, err)
	}
	if tag.RowsAffected() == 0 {
		return outbox.AddResult{}, errTaken
	}
	return res, nil
}

// textOf is what the candidate reads. It is made when the message is sent, not when
// it is added.
func textOf(n outbox.Notification) (string, error) {
	var c content
	if err := json.Unmarshal(n.Payload, &c); err != nil {
		return "", fmt.Errorf("text of %s: %w", n.Key(), err)
	}
	switch {
	case n.Type == typeConfirmed:
		return c.Slot + " is yours.", nil
	case n.Type == typeRejected && c.Reason == "":
		return c.Slot + " is off.", nil
	case n.Type == typeRejected:
		return c.Slot + " is off: " + c.Reason + ".", nil
	}
	return "", fmt.Errorf("text of %s: there is none for its type", n.Key())
}
