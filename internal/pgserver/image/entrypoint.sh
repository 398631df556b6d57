#!/bin/bash
# Entrypoint of the images that build.sh makes. It keeps what tests use of the
# official image's contract: POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB,
# POSTGRES_HOST_AUTH_METHOD, PGDATA, and "postgres -c name=value" as arguments.
set -euo pipefail
[ "${1:-}" = postgres ] || exec "$@"

if [ "$(id -u)" = 0 ]; then # the server refuses to run as root
  mkdir -p "$PGDATA" /run/postgresql
  chown postgres:postgres "$PGDATA" /run/postgresql
  chmod 700 "$PGDATA"
  exec setpriv --reuid=postgres --regid=postgres --clear-groups -- "$0" "$@"
fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  user=${POSTGRES_USER:-postgres}
  database=${POSTGRES_DB:-$user}
  auth=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
  if [ "$auth" != trust ] && [ -z "${POSTGRES_PASSWORD:-}" ]; then
    echo 'POSTGRES_PASSWORD is not set' >&2
    exit 1
  fi
  initdb -D "$PGDATA" --no-sync -E UTF8 --locale=C.UTF-8 -U "$user" --auth-local=trust --auth-host="$auth" \
    --pwfile=<(echo "${POSTGRES_PASSWORD:-unused}") >/dev/null
  printf 'host all all all %s\nhost replication all all %s\n' "$auth" "$auth" >>"$PGDATA/pg_hba.conf"
  echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"

  # A first start, on the Unix socket alone, makes the database: clients that
  # wait for the second "ready to accept connections" in the log see it complete.
  pg_ctl -D "$PGDATA" -w -s -o "$(printf '%q ' "${@:2}" -c listen_addresses=)" start
  [ "$database" = postgres ] || createdb -U "$user" "$database"
  pg_ctl -D "$PGDATA" -w -s -m fast stop
fi
exec "$@"
