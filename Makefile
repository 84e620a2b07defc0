# Every recipe runs through scripts/bootstrap.py, the one place that knows the environment.

PYTHON ?= python3
BOOTSTRAP = $(PYTHON) scripts/bootstrap.py
RUN = $(BOOTSTRAP) run
MODEL = .cache/models/SmolLM2-135M-Instruct

# The day, so that a soak which is started again the same day goes on with the same cases.
SEED ?= $(shell date +%Y%m%d)

# ARGS go to the command: make test ARGS="-k format -x"
ARGS ?=

# Two processes take two thirds of the time of one; tests that wait for processes to end were seen to fail in them.
WORKERS ?= 1
PARALLEL = $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

MAKEFLAGS += --no-print-directory
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help setup model demo lint format test soak versions bench wheel clean distclean

help:
	echo "make demo       install everything into .venv and show what thaw does, on a real model"
	echo "make test       lint, then all tests that this machine can run; WORKERS=2 in two processes"
	echo "make soak       the randomised tests with full numbers; SEED=$(SEED) repeats today's"
	echo "make versions   the loader against vLLM 0.24 to 0.31 as well"
	echo "make lint       ruff, mypy and the direction of imports"
	echo "make format     let ruff rewrite what it can"
	echo "make bench      the benchmarks"
	echo "make wheel      dist/*.whl"
	echo "make clean      remove what was built; make distclean: .venv and .cache as well"

setup:
	$(BOOTSTRAP)

model: setup
	$(BOOTSTRAP) model

demo:
	$(BOOTSTRAP) --need-engine
	$(BOOTSTRAP) model
	$(RUN) thaw demo --model $(MODEL) $(ARGS)

lint: setup
	$(RUN) ruff check --quiet
	$(RUN) ruff format --check --quiet || { echo "ruff format: run make format"; exit 1; }
	$(RUN) mypy
	$(RUN) lint-imports --no-logo --cache-dir .cache/import-linter

format: setup
	$(RUN) ruff check --quiet --fix || true
	$(RUN) ruff format

test: lint
	$(BOOTSTRAP) model
	$(RUN) pytest $(PARALLEL) $(ARGS)

soak: setup
	$(BOOTSTRAP) model
	echo "seed $(SEED); make soak SEED=$(SEED) repeats it"
	THAW_SOAK=1 THAW_SEED=$(SEED) $(RUN) pytest tests -m soak --timeout 0 $(ARGS)

versions: setup
	$(RUN) python scripts/other_versions.py $(ARGS)

bench: setup
	$(RUN) thaw bench $(ARGS)

wheel: setup
	$(RUN) python -m build --wheel --no-isolation --outdir dist

clean:
	rm -rf dist build .cache/hypothesis .cache/import-linter .cache/mypy .cache/pytest .cache/ruff
	find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .cache
