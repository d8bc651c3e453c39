# Set-up and checks. `make demo` and `make test` work on a fresh Linux machine with Python 3.11 or newer.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo up test setup model fast lint full clean

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
UV_VERSION := 0.13.9
INSTALLED := .venv/.installed
GENERATED := .venv/.generated

# Tests that start whole clusters of processes: one at a time, or two clusters starve each other on two cores.
CLUSTERS := tests/mesh tests/examples tests/telemetry/test_tracing.py tests/client/test_router_dies.py

# Without cached bytecode each process would compile torch and transformers again, 20 s of CPU time.
unexport PYTHONDONTWRITEBYTECODE
# Several torch processes share the machine's cores: one thread each, or they spin and wait for one another.
export OMP_NUM_THREADS ?= 1

help: ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: setup model ## start a local cluster, stream an answer, show the instances, stop
	@$(BIN)/starmesh demo

up: setup model ## keep a local cluster in the foreground until Ctrl-C
	@$(BIN)/starmesh up

test: setup ## all checks, the fast ones first
	@$(MAKE) --no-print-directory fast
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory full

setup: $(GENERATED) ## make .venv with everything in it

model: setup ## get the default model, if it is not on this machine yet
	@$(BIN)/starmesh model fetch --quiet

fast: setup ## the tests without torch, Redis or sockets
	$(BIN)/python -m pytest -q -m fast -n 2 --dist loadfile

lint: setup ## style, types, layers, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

full: setup model ## the tests on real parts: the model, a Redis server, processes
	$(BIN)/python -m pytest -q -m "not fast" -n 2 --dist loadfile $(CLUSTERS:%=--ignore=%)
	$(BIN)/python -m pytest -q -m "not fast" $(CLUSTERS)

clean: ## remove what set-up and checks have made; cached models stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -f starmesh/v1/*_pb2*.py starmesh/v1/*_pb2*.pyi
	find starmesh services tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(GENERATED): $(INSTALLED) build_protos.py $(wildcard protos/starmesh/v1/*.proto)
	@$(BIN)/python build_protos.py 2>.venv/protoc.log || { cat .venv/protoc.log; exit 1; }
	@touch $@

# uv resolves in seconds but does not read pip's configuration. Where that names a directory with a CPU build of the
# locked torch, it is used; otherwise uv looks what the machine has and takes the build for it.
$(INSTALLED): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "starmesh needs Python 3.11 or newer: install it, or name it: make PYTHON=..."; exit 1; fi
	@$(PYTHON) -m venv .venv || { \
		echo "python's venv module is missing: install it (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "installing into .venv, about half a minute"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION)
	@torch=$$(sed -n 's/^torch==//p' requirements.lock); \
	for links in $${PIP_FIND_LINKS:-} $$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true); do \
		if compgen -G "$$links/torch-$$torch+cpu-*.whl" >/dev/null; then export UV_FIND_LINKS=$$links; fi; \
	done; \
	if [ -z "$${UV_FIND_LINKS:-}" ]; then export UV_TORCH_BACKEND=$${STARMESH_TORCH_BACKEND:-auto}; fi; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@
