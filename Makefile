# Everything happens inside .venv; nothing is installed outside of it.
#   make PYTHON=python3.12 install     another interpreter (3.11 or newer)
#   make reproduce_small FLICKR8K=dir  the real data set instead of the toy one
#   make test PYTEST_ARGS="-k retrieval"
#   make test TEST_WORKERS=            in one process
#   make lock LOCK_ARGS=--upgrade      newest versions instead of those already locked

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.8
PYTEST_ARGS ?=
# Two processes: a test of training holds up to 2 GB, so more of them suit larger machines alone. A file's tests stay
# together, with what they share.
TEST_WORKERS ?= --numprocesses=2 --dist=loadfile
LOCK_ARGS ?=
SEEDS ?= 0,1,2
FLICKR8K ?=

# The first interpreter that starts and is new enough; asked only when .venv has to be made.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Without a GPU the law's objectives on GPU utilisation and memory are left out, and every output says so.
PROFILE := $(shell nvidia-smi -L >/dev/null 2>&1 || echo --profile cpu)

# On a GPU the loader's law is its utilisation while the loader feeds the real training step of a recipe.
LOADER_ARGS = $(if $(PROFILE),,--config $(TRAIN_CONFIG))

ifeq ($(strip $(FLICKR8K)),)
PACK := toy
PREPARE_FROM :=
TRAIN_CONFIG := configs/train/toy.yaml
SLO_ARGS := --profile cpu --slo configs/slo-toy.yaml
else
PACK := flickr8k
PREPARE_FROM := --from "$(FLICKR8K)"
TRAIN_CONFIG := configs/train/locked.yaml
SLO_ARGS = $(PROFILE)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install reproduce_small test lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z_]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make .venv from requirements.lock, with Chimera editable in it

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# `sync` makes .venv equal to the lock (pip and uv itself stay); Chimera then goes in without its dependencies.
# The first time this fetches about 3 GB, most of it CUDA libraries; after that uv links files from its cache.
$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	@touch $@

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -m "not slow" $(TEST_WORKERS) $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (lint and format) and mypy, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# conda-lock.yml is not made here: it holds a finished solve, and a new one needs a conda channel.
lock: | $(BIN)/uv ## bring requirements.lock up to pyproject.toml, keeping the versions that still fit
	$(BIN)/uv pip compile pyproject.toml --python $(BIN)/python --extra dev --extra peers --universal --generate-hashes \
		--no-emit-index-url --no-header --quiet $(LOCK_ARGS) -o requirements.lock

# The report is written whatever the verdicts are, and it is written whole or not at all;
# then the target fails with the exit code of `slo check` (3: breached, 4: not measurable).
reproduce_small: $(STAMP) ## the whole road in small, ending in benchmarks.md; FLICKR8K=path for the real data set
	$(BIN)/chimera data prepare $(PACK) $(PREPARE_FROM)
	$(BIN)/chimera train sanity --seed 0 --data $(PACK)
	$(BIN)/chimera train full --config $(TRAIN_CONFIG) --seeds $(SEEDS) --data $(PACK)
	$(BIN)/chimera eval --run latest
ifeq ($(PACK),flickr8k)
	@echo "The one look at the test split, for the ladder:"
	$(BIN)/chimera eval --run latest --split test
endif
	$(BIN)/chimera bench loader --data $(PACK) $(LOADER_ARGS)
	$(BIN)/chimera bench encoders --data $(PACK)
	@verdict=0; report=0; echo "$(BIN)/chimera slo check --run latest $(SLO_ARGS)"; \
	$(BIN)/chimera slo check --run latest $(SLO_ARGS) || verdict=$$?; \
	{ $(BIN)/chimera report $(SLO_ARGS) > benchmarks.md.tmp && mv benchmarks.md.tmp benchmarks.md; } || report=1; \
	if test $$report -eq 0; then echo "benchmarks.md is written"; \
	else rm -f benchmarks.md.tmp; echo "chimera report failed; benchmarks.md is as it was" >&2; fi; \
	if test $$verdict -ne 0; then echo "chimera slo check ended with exit code $$verdict" \
		"(3: an objective is breached, 4: one is not measurable)" >&2; exit $$verdict; fi; \
	exit $$report

clean: ## remove caches; .venv, data and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find chimera_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +
