package outbox

import (
	"context"
	"encoding/binary"
	"math"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// queryAdd runs a statement that returns an outcome, in_flight and rowColumns of one
// row, or none, which is [pgx.ErrNoRows].
func queryAdd(ctx context.Context, tx pgx.Tx, sql string, args ...any) (AddResult, error) {
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return AddResult{}, err
	}
	defer rows.Close()
	if !rows.Next() {
		if err := rows.Err(); err != nil {
			return AddResult{}, err
		}
		return AddResult{}, pgx.ErrNoRows
	}
	s := addScanners.Get().(*addScanner)
	defer addScanners.Put(s)
	err = s.scan(rows, &s.res.Notification, &s.outcome, &s.res.InFlight)
	res := s.res
	res.Outcome = Outcome(s.outcome)
	s.res = AddResult{} // its payload is the caller's
	if err != nil {
		return AddResult{}, err
	}
	rows.Close() // an error may come after the row
	return res, rows.Err()
}

// addScanners are for results of single adds, which would otherwise cost a dozen
// allocations each.
var addScanners = sync.Pool{New: func() any { return new(addScanner) }}

type addScanner struct {
	rowScanner
	outcome reusedText
	res     AddResult
}

// rowScanner reads rows, without an allocation for each column of each.
type rowScanner struct {
	booking, candidate, recruiter            pgtype.Int8
	typ, status, correlation                 reusedText
	receipt, lastError                       reusedText
	attempts                                 pgtype.Int4
	created, locked, retry, notAfter, sentAt pgtype.Timestamptz
	into                                     []any
}

// scan reads what stands before rowColumns into before, then those into n.
func (s *rowScanner) scan(rows pgx.Rows, n *Notification, before ...any) error {
	s.into = append(append(s.into[:0], before...), &n.ID, &s.typ, &s.booking, &s.candidate, &s.recruiter,
		(*[]byte)(&n.Payload), &s.correlation, &s.status, &s.attempts, &n.Version, &n.SentVersion, &s.receipt, &s.lastError,
		&s.created, &s.locked, &s.retry, &s.notAfter, &s.sentAt)
	if err := scanRow(rows, s.into); err != nil {
		return err
	}
	n.Type, n.Status = string(s.typ), Status(s.status)
	n.BookingID, n.CandidateTgID, n.RecruiterTgID = s.booking.Int64, s.candidate.Int64, s.recruiter.Int64
	n.CorrelationID, n.Receipt, n.LastError = string(s.correlation), string(s.receipt), string(s.lastError)
	n.Attempts = int(s.attempts.Int32)
	n.CreatedAt, n.LockedAt, n.NextRetryAt = utc(s.created), utc(s.locked), utc(s.retry)
	n.NotAfter, n.SentAt = utc(s.notAfter), utc(s.sentAt)
	return nil
}

// reusedText is a column that is often the same from row to row, "" for NULL. It
// keeps the string while it is.
type reusedText string

// ScanBytes implements [pgtype.BytesScanner].
func (t *reusedText) ScanBytes(b []byte) error {
	if string(*t) != string(b) {
		*t = reusedText(b)
	}
	return nil
}

func utc(t pgtype.Timestamptz) time.Time {
	if !t.Valid {
		return time.Time{}
	}
	return t.Time.UTC()
}

// scanRow does what rows.Scan does. pgx looks for a way to read each column into its
// destination anew for every statement that is run, which for a row of twenty takes as
// long as all else about it; here the few types of this package are read at once, in
// the formats that they come in by default, and pgx does all others.
func scanRow(rows pgx.Rows, into []any) error {
	fields, values := rows.FieldDescriptions(), rows.RawValues()
	if len(fields) != len(into) || len(values) != len(into) {
		return rows.Scan(into...)
	}
	for i, dst := range into {
		if !decode(dst, fields[i].DataTypeOID, fields[i].Format, values[i]) {
			return rows.Scan(into...)
		}
	}
	return nil
}

// decode reads the value b of a column, nil for NULL, if it is of a type and in a format
// that goes into dst. See "Message Data Types" and the send functions of the types in
// PostgreSQL's source for the formats.
func decode(dst any, oid uint32, format int16, b []byte) bool {
	isText := oid == pgtype.TextOID || oid == pgtype.VarcharOID || oid == pgtype.JSONOID // the same in both formats
	isBinary := format == pgtype.BinaryFormatCode
	switch dst := dst.(type) {
	case nil:
		return true
	case *reusedText:
		return isText && dst.ScanBytes(b) == nil
	case *[]byte:
		*dst = nil
		if isText && b != nil {
			*dst = append(make([]byte, 0, len(b)), b...)
		}
		return isText
	case *int64:
		var v pgtype.Int8
		ok := b != nil && decode(&v, oid, format, b) // NULL is an error, and pgx's to report
		*dst = v.Int64
		return ok
	case *pgtype.Int8:
		switch {
		case !isBinary:
			return false
		case b == nil:
			*dst = pgtype.Int8{}
		case oid == pgtype.Int8OID && len(b) == 8:
			*dst = pgtype.Int8{Int64: int64(binary.BigEndian.Uint64(b)), Valid: true}
		case oid == pgtype.Int4OID && len(b) == 4:
			*dst = pgtype.Int8{Int64: int64(int32(binary.BigEndian.Uint32(b))), Valid: true}
		default:
			return false
		}
		return true
	case *pgtype.Int4:
		switch {
		case !isBinary || oid != pgtype.Int4OID:
			return false
		case b == nil:
			*dst = pgtype.Int4{}
		case len(b) == 4:
			*dst = pgtype.Int4{Int32: int32(binary.BigEndian.Uint32(b)), Valid: true}
		default:
			return false
		}
		return true
	case *pgtype.Timestamptz:
		switch {
		case !isBinary || oid != pgtype.TimestamptzOID:
			return false
		case b == nil:
			*dst = pgtype.Timestamptz{}
		case len(b) == 8:
			micros := int64(binary.BigEndian.Uint64(b)) // since 2000
			if micros == math.MaxInt64 || micros == math.MinInt64 {
				return false // infinity
			}
			*dst = pgtype.Timestamptz{Time: time.Unix(year2000+micros/1e6, micros%1e6*1e3), Valid: true}
		default:
			return false
		}
		return true
	case *bool:
		if !isBinary || oid != pgtype.BoolOID || len(b) != 1 {
			return false
		}
		*dst = b[0] != 0
		return true
	case *pgtype.UUID:
		switch {
		case !isBinary || oid != pgtype.UUIDOID:
			return false
		case b == nil:
			*dst = pgtype.UUID{}
		case len(b) == 16:
			*dst = pgtype.UUID{Bytes: [16]byte(b), Valid: true}
		default:
			return false
		}
		return true
	}
	return false
}

const year2000 = 946684800 // in seconds since 1970
