// Package relay delivers what package outbox has stored.
package relay
