# What people and CI run. `make help` lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup run test check format proto proto-check bench lock release-baseline

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}'

setup: .venv/ready ## Make .venv with the locked dependencies, unless it is there

.venv/ready: requirements-dev.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: apt-get install python3.11 python3.11-venv, or set PYTHON." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv is needed: apt-get install python3.11-venv." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: setup ## Start everything in the foreground; Ctrl-C stops it
	@exec $(BIN)/controlplane up

test: setup ## Run all tests, on SQLite and PostgreSQL, through the real Envoy
	$(BIN)/pytest

check: setup proto-check ## Lint, format, types, and the contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy controlplane proto tests
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/python proto/generate.py --image build/contract.binpb
	$(BIN)/buf lint build/contract.binpb --path controlplane --config proto/buf.yaml
	$(BIN)/buf breaking build/contract.binpb --against proto/released.binpb --path controlplane --config proto/buf.yaml

format: setup ## Format Python and proto files
	$(BIN)/ruff check --fix --quiet || true
	$(BIN)/ruff format
	$(BIN)/buf format --write proto

proto: setup ## Generate from the .proto files everything that is committed
	$(BIN)/python proto/generate.py

proto-check: setup ## Fail if what is generated is stale
	$(BIN)/python proto/generate.py --check

bench: setup ## Measure beside the obvious alternatives (needs wrk)
	@command -v wrk >/dev/null || { echo "wrk is needed: apt-get install wrk." >&2; exit 1; }
	$(BIN)/python -m tests.bench

lock: setup ## Lock the newest dependencies that fit pyproject.toml
	for lock in "requirements.lock" "requirements-dev.lock --group dev"; do \
	  $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --upgrade \
	    --python-version 3.11 pyproject.toml --output-file $$lock >/dev/null; \
	done

release-baseline: setup ## Make today's contract the one that must not be broken; part of a release
	$(BIN)/python proto/generate.py --image proto/released.binpb
