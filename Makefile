# Everything starts here: `make demo` shows it, `make test` proves it, `make setup` alone only creates .venv.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
LOCKS := requirements-bootstrap.lock requirements.lock pyproject.toml deploy/kafka/jgo.toml deploy/kafka/jgo.lock.toml
PROTOS := protos/v1/actions.proto protos/v1/erasure.proto protos/v1/owners.proto protos/v1/ranking.proto protos/v1/sequence.proto
SERVICES := protos/v1/erasure.proto protos/v1/ranking.proto protos/v1/sequence.proto

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types lock protos protos-check clean
.DELETE_ON_ERROR:

help:
	@echo "make setup   create .venv with everything freshrank needs (the command is .venv/bin/freshrank)"
	@echo "make demo    train, start the local stack, show fresh rankings; DOMAIN=<file> DATA=<folder> for a log of your own"
	@echo "make test    every test, with real Kafka and Triton; ARGS='-k name' for some"
	@echo "make lint | types | protos | protos-check | lock | clean"

setup: $(STAMP)

$(STAMP): $(LOCKS)
	@test -n "$(PYTHON)" || { echo "setup: no python3.11 found. Install Python 3.11, or name one with make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" deploy/setup_check.py
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bootstrap.lock
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m deploy.kafka_jars
	@touch $@

demo: setup
	@$(BIN)/freshrank demo $(if $(DOMAIN),--domain "$(DOMAIN)") $(if $(DATA),--data "$(DATA)")

test: setup
	@$(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tests.parts)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

# setuptools is locked too: it builds the editable install without fetching anything unlocked.
lock: setup
	@echo "setuptools==$$(sed -n 's/^requires = \["setuptools==\(.*\)"\]$$/\1/p' pyproject.toml)" | \
	  $(BIN)/uv pip compile --quiet pyproject.toml - --extra dev --override requirements-overrides.txt --upgrade \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_35 --generate-hashes --no-header --no-annotate -o requirements.lock

protos: setup
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. $(PROTOS)
	@$(BIN)/python -m grpc_tools.protoc -I . --grpc_python_out=. $(SERVICES)

protos-check: setup
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	  $(BIN)/python -m grpc_tools.protoc -I . --python_out="$$fresh" --pyi_out="$$fresh" $(PROTOS) && \
	  $(BIN)/python -m grpc_tools.protoc -I . --grpc_python_out="$$fresh" $(SERVICES) && \
	  for file in "$$fresh"/protos/v1/*; do diff -u "protos/v1/$$(basename "$$file")" "$$file" || stale=1; done && \
	  if [ -n "$$stale" ]; then echo "protos-check: generated code is not current: run make protos" >&2; exit 1; fi

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
