# Everything starts here; each target makes its own virtual environment from nothing and keeps it until the pins change.
#
#   make demo TORCH_PIP_ARGS="--index-url URL"   takes torch from another index: a default Linux install is the CUDA build
#   make test TORCH='torch==2.7.*' VENV=.venv-2.7   takes another torch than the pinned one, in an environment of its own

PYTHON         ?= python3
VENV           ?= .venv
TORCH_PIP_ARGS ?=
PIP_ARGS       ?=
DEMO_ARGS      ?=
WORKERS        ?= 2

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
ifeq ($(strip $(TORCH)),) # empty counts as not given: a CI matrix has an empty entry for the pinned torch
TORCH := $(shell sed -n 's/^\(torch==[^ #]*\).*/\1/p' constraints.txt)
endif
# The pins with the chosen torch in the place of the pinned one.
HELD  := $(VENV)/constraints.txt
PINS  := pyproject.toml $(HELD)

# What is a command. Harmlessness first; then what others are held against, norms and early_warning; pages come last.
FIRST    := matrix fault_campaign proving_ground norms early_warning
COMMANDS := $(patsubst benchmarks/%.py,%,$(shell grep -l __main__ benchmarks/*.py))
COMMANDS := $(FIRST) $(filter-out $(FIRST) readme guarded_ranks,$(COMMANDS)) readme

.DEFAULT_GOAL := help
.PHONY: help demo docs unit test lint format audit mutants prove clean
.DELETE_ON_ERROR:

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 16

demo: $(VENV)/.plots.stamp ## train on real text, unguarded and guarded, and draw both: under 5 minutes on 2 cores
	$(BIN)/koopmon demo $(DEMO_ARGS)

docs: $(VENV)/.dev.stamp ## build the site from docs/ and the code into site/; no warning passes, no network is needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

unit: $(VENV)/.dev.stamp ## the fast tests, which start no process: under 3 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m "not process and not distributed and not slow and not science"

test: lint ## every check: lint, types and tests; REQUIRE_ALL=1 forbids skipping what a machine lacks
	$(BIN)/pytest -n $(WORKERS) -m "not distributed"
	$(BIN)/pytest -m distributed

lint: $(VENV)/.dev.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev.stamp ## let ruff arrange the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(VENV)/.dev.stamp ## known vulnerabilities of the pinned dependencies; needs a network, and says so without one
	$(BIN)/python .ci/audit.py

mutants: $(VENV)/.dev.stamp ## change the decision core in thousands of small ways; at least 90% must fail a test: about an hour
	$(BIN)/python -m benchmarks.mutants --jobs $(WORKERS)
	$(BIN)/python -m benchmarks.readme

prove: $(VENV)/.dev.stamp ## the longer campaigns: every benchmark, each printing its table and keeping its JSON
	$(BIN)/python -m benchmarks.fuzz --target codec --executions 10000000 --seconds 7200
	$(BIN)/python -m benchmarks.fuzz --target sockets --seconds 1800
	@set -e; for target in http config calibrator recording composition; do $(BIN)/python -m benchmarks.fuzz --target $$target --seconds 600; done
	@set -e; for name in $(COMMANDS); do echo "== $$name"; $(BIN)/python -m "benchmarks.$$name"; done

clean: ## forget the environment and what was built
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A Python without ensurepip can still borrow its own pip for the new environment.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) \
	|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } \
	|| { rm -rf $(VENV); echo "koopmon: $(PYTHON) makes no virtual environment: install its venv module" >&2; exit 1; }

$(HELD): constraints.txt | $(BIN)/python
	@{ grep -v '^torch==' constraints.txt; echo "$(TORCH)"; } > $@

# torch first and alone, so that nothing else chooses its build; then the rest, held to the same pin.
$(VENV)/.torch.stamp: constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH_PIP_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.plots.stamp: $(VENV)/.torch.stamp $(PINS)
	$(PIP) install -c $(HELD) $(PIP_ARGS) -e ".[plots]"
	@touch $@

$(VENV)/.dev.stamp: $(VENV)/.torch.stamp $(PINS)
	$(PIP) install -c $(HELD) $(PIP_ARGS) -e ".[dev]"
	@touch $@
