# Everything here needs only Python 3.11 or newer and make.
#
#   make quickstart   train a tiny diffusion policy by RL and show the result (SEED=1 picks the seed)
#   make test         lint, then every test (WORKERS=2 processes)
#   make lint         style, format and types only
#   make clean        remove build products and caches; runs/ and .venv/ stay

SEED ?= 0
RUN ?= runs/quickstart-$(SEED)
WORKERS ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)

BIN := .venv/bin
READY := .venv/ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint clean

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(READY)
	$(BIN)/denoise-rl train --config configs/quickstart.yaml run.seed=$(SEED) run.output_dir=$(RUN)

# One thread per process: several processes share few cores, and a spinning thread pool makes all of them slow.
# A file stays with one worker, which makes its fixtures once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch first and at the pinned version: otherwise another package's range would bring the newest one with it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv: a few minutes the first time."
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@touch $(READY)
