# Targets for development. Each target creates its virtual environment if needed and keeps it until the pins change.
#
#   make demo TORCH_PIP_ARGS="--index-url URL"   uses another index for torch; a default Linux install is the CUDA build
#   make test TORCH='torch==2.7.*' VENV=.venv-2.7   uses another torch than the pinned one, in a separate environment

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
# Pins with the chosen torch instead of the pinned one.
HELD  := $(VENV)/constraints.txt
PINS  := pyproject.toml $(HELD)

# Benchmarks that are commands. The proofs of harmlessness come first, then norms and early_warning, whose results others use. Pages come last.
FIRST    := matrix fault_campaign proving_ground norms early_warning
COMMANDS := $(patsubst benchmarks/%.py,%,$(shell grep -l __main__ benchmarks/*.py))
COMMANDS := $(FIRST) $(filter-out $(FIRST) readme guarded_ranks spectral_floor,$(COMMANDS)) readme

.DEFAULT_GOAL := help
.PHONY: help demo docs unit test lint format audit mutants prove clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 16

demo: $(VENV)/.plots.stamp ## train on real text, unguarded and guarded, and draw both: under 5 minutes on 2 cores
	$(BIN)/koopmon demo $(DEMO_ARGS)

docs: $(VENV)/.dev.stamp ## build the site from docs/ and the code into site/; a warning is an error; needs no network
	$(BIN)/python -m manual.site

unit: $(VENV)/.dev.stamp ## run the fast tests, without processes: under 3 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m "not process and not distributed and not slow and not science"

# A failed test runs once more, alone: a test with real processes may fail because of the tests beside it. Its first failure stays in the output.
AGAIN := --last-failed --last-failed-no-failures none

test: lint ## run every check: lint, types and tests; with REQUIRE_ALL=1 a missing tool is a failure
	$(BIN)/pytest -n $(WORKERS) -m "not distributed" || $(BIN)/pytest $(AGAIN) -m "not distributed"
	$(BIN)/pytest -m distributed || $(BIN)/pytest $(AGAIN) -m distributed

lint: $(VENV)/.dev.stamp ## run ruff, mypy and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.dev.stamp ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(VENV)/.dev.stamp ## list known vulnerabilities of the pinned dependencies; needs a network
	$(BIN)/python .ci/audit.py

mutants: $(VENV)/.dev.stamp ## change the decision core in thousands of small ways; at least 90% must fail a test: about an hour
	$(BIN)/python -m benchmarks.mutants --jobs $(WORKERS)
	$(BIN)/python -m benchmarks.readme

prove: $(VENV)/.dev.stamp ## run the long campaigns: fuzzing and every benchmark, each with a table and a JSON file
	$(BIN)/python -m benchmarks.fuzz --target codec --executions 10000000 --seconds 7200
	$(BIN)/python -m benchmarks.fuzz --target sockets --seconds 1800
	@set -e; for target in http config calibrator recording composition; do $(BIN)/python -m benchmarks.fuzz --target $$target --seconds 600; done
	@set -e; for name in $(COMMANDS); do echo "== $$name"; $(BIN)/python -m "benchmarks.$$name"; done

clean: ## remove the environment and build outputs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A Python without ensurepip uses its own pip for the new environment.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) \
	|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } \
	|| { rm -rf $(VENV); echo "koopmon: $(PYTHON) makes no virtual environment: install its venv module" >&2; exit 1; }

$(HELD): constraints.txt | $(BIN)/python
	@{ grep -v '^torch==' constraints.txt; echo "$(TORCH)"; } > $@

# Install torch first and alone, so that nothing else selects its build; then the other packages with the same pin.
$(VENV)/.torch.stamp: constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH_PIP_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.plots.stamp: $(VENV)/.torch.stamp $(PINS)
	$(PIP) install -c $(HELD) $(PIP_ARGS) -e ".[monitor,plots]"
	@touch $@

$(VENV)/.dev.stamp: $(VENV)/.torch.stamp $(PINS)
	$(PIP) install -c $(HELD) $(PIP_ARGS) -e ".[dev]"
	@touch $@
