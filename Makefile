# make test            everything, on PostgreSQL 15, 17 and 18
# make test PG=17      on one of them
# make test-installed  on the PostgreSQL that is installed here, without Docker
# make lint            the linters of .golangci.yml, and formatting
# make fuzz            the payload fuzzer, FUZZTIME times (default 100000x)
# make bench           measures the library beside its peers; QUICK=1: roughly, in 2 minutes
# make bench-held      a transaction held open for HOLD (default 15m), beside delivery
# make chaos           the ledger rig: breaks everything by SEED, for ROUNDS or MINUTES (default 3);
#                      FAILOVER=sync, async or both: kills the primary, promotes a standby
# make images          what the tests need of Docker, without running them
# make clean           removes all containers and images of the tests, running ones too
#
# Tests wait as much as they compute: PARALLEL (default 6) run at a time in a package. The
# packages of HEAVY, where some need what they wait for soon, run one by one, then the others
# two at a time. What says nothing about PostgreSQL (ONCE) runs on the first of the versions
# only, and random sequences of calls are fewer on the others.
#
# The tests need Docker, or an installed PostgreSQL and PgBouncer. As root on a
# system with apt-get, missing packages are installed where there is no Docker.
# Without make and without Docker: go test -tags installed ./..., which leaves out
# the tests that take a container.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := test

PG ?= 15 17 18
# Not for some time: at the end of it Go 1.26 may fail by itself, https://go.dev/issue/75804.
FUZZTIME ?= 100000x
TIMEOUT ?= 10m
PARALLEL ?= 6
HOLD ?= 15m
GO ?= go
GOTEST = $(GO) test -race -count=1 -timeout=$(TIMEOUT) -parallel=$(PARALLEL)
HEAVY = . ./outboxtest ./relay
ONCE = ^Test(Protocol|Mutations|Torture_(finds|fails|says|takes|passes_a_sender)|Run$$|RunOnce$$|Shutdown$$|Check_|Survived|Worker_|Journal_|Server_(Crash|Restart|Pause|Stop_|StartPgBouncer)|Start_)
LINT = $(GO) tool -modfile=$(CURDIR)/tools.mod golangci-lint run

# Nested modules have dependencies that users of the library should not carry.
MODULES = $(patsubst ./%/go.mod,%,$(shell find . -mindepth 2 -name go.mod -not -path '*/testdata/*'))

.PHONY: test
test:
	@where=$$($(GO) run ./internal/pgserver/prepare $(PG)); \
	if [ "$$where" != docker ]; then exec $(MAKE) --no-print-directory test-installed; fi; \
	others=$$($(GO) list ./... | grep -vxF "$$($(GO) list $(HEAVY))"); \
	failed=; skip=; checks=; \
	for v in $(PG); do \
	  echo "== PostgreSQL $$v"; \
	  ok=1; \
	  for p in '-p=1 $(HEAVY)' "-p=2 $$others"; do \
	    OUTBOX_TEST_POSTGRES=$$v OUTBOX_TEST_CHECKS=$$checks $(GOTEST) $$skip $$p || ok=; \
	  done; \
	  [ "$$ok" ] || failed="$$failed $$v"; \
	  skip='-skip=$(ONCE)'; checks=25; \
	done; \
	$(MAKE) --no-print-directory test-modules || failed="$$failed modules"; \
	[ -z "$$failed" ] || { echo "FAILED on:$$failed"; exit 1; }

.PHONY: test-installed
test-installed: installed
	@echo "== the installed PostgreSQL, without Docker"
	@export OUTBOX_PG_BINARIES=1 OUTBOX_TEST_POSTGRES=; \
	$(GOTEST) -p=1 -tags installed ./...; \
	$(MAKE) --no-print-directory test-modules

# Builds, vets and tests each nested module, on the default version.
.PHONY: test-modules
test-modules:
	@for m in $(MODULES); do \
	  echo "== module $$m"; \
	  (cd $$m && $(GO) build -o /dev/null ./... && $(GO) vet ./... && $(GOTEST) -p=1 ./...); \
	done

.PHONY: installed
installed:
	@where=$$(OUTBOX_PG_BINARIES=1 $(GO) run ./internal/pgserver/prepare 2>/dev/null); \
	if [ "$$where" = installed ]; then exit; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing postgresql and pgbouncer"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get -qq install -y postgresql pgbouncer >/dev/null || { apt-get -qq update; apt-get -qq install -y postgresql pgbouncer >/dev/null; }; \
	else \
	  OUTBOX_PG_BINARIES=1 $(GO) run ./internal/pgserver/prepare >/dev/null; exit 1; \
	fi

.PHONY: images
images:
	@$(GO) run ./internal/pgserver/prepare $(PG)

.PHONY: lint
lint:
	@$(LINT) ./...
	@for m in $(MODULES); do (cd $$m && $(LINT) --config=$(CURDIR)/.golangci.yml ./...); done

.PHONY: fuzz
fuzz:
	$(GO) test -run='^$$' -fuzz=FuzzPayload -fuzztime=$(FUZZTIME) .

# The program is built first: what ends it has to reach it, or its server stays.
.PHONY: bench bench-held
bench:
	@cd bench && $(GO) build -o ../bin/bench . && exec ../bin/bench $(if $(QUICK),-quick) $(ARGS)
bench-held:
	@cd bench && $(GO) build -o ../bin/bench . && exec ../bin/bench -run '^held$$' -hold $(HOLD) $(ARGS)

.PHONY: chaos
chaos:
	@cd chaos && $(GO) build -o ../bin/chaos . && exec ../bin/chaos $(if $(SEED),-seed $(SEED)) $(if $(ROUND),-round $(ROUND)) \
	  $(if $(ROUNDS),-rounds $(ROUNDS)) $(if $(MINUTES),-minutes $(MINUTES)) $(if $(FAILOVER),-failover $(FAILOVER)) $(ARGS)

.PHONY: clean
clean:
	-@docker ps -aq --filter label=outbox.test=1 | xargs -r docker rm -fv
	-@docker image ls -q --filter label=outbox.stamp | sort -u | xargs -r docker image rm -f
