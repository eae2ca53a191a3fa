# `make` lists the targets. Each sets up what it needs: a virtual environment in $(VENV) with the package, editable, and its
# development tools. It is made once, and again only when pyproject.toml changes.
VENV ?= .venv
PIP_ARGS ?=
PYTHON ?= python3.13 python3.12 python3.11 python3.10 python3
WORKERS ?= logical
BENCH_DATA ?= build/cells

BIN := $(VENV)/bin
READY := $(VENV)/ready
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-slurm notebooks lint format bench clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   the Python to build the environment with (default: the newest of 3.10 to 3.13)"
	@echo "  PIP_ARGS=...        handed to pip, for example the index of CPU builds of torch"
	@echo "  DEMO_ARGS=...       handed to 'dinov2 demo', for example --seed 1"
	@echo "  TEST_ARGS=...       handed to pytest, for example '-k koleo'"

install: $(READY) ## The environment alone

demo: $(READY) ## Train a small DINOv2 on drawn blood cells and score it: minutes on a laptop, results in ./demo
	$(BIN)/dinov2 demo $(DEMO_ARGS)

test: $(READY) ## The fast tests, a few minutes on two cores
	$(PYTEST) -n $(WORKERS) --maxprocesses 4 --dist loadfile -m "not slow and not gpu and not slurm" $(TEST_ARGS)

test-all: $(READY) ## Every test, the slow ones too; those that need a GPU or SLURM skip where there is none
	$(PYTEST) $(TEST_ARGS)

test-slurm: $(READY) ## The tests that submit real jobs to a SLURM on this machine
	$(PYTEST) -m slurm $(TEST_ARGS)

notebooks: $(READY) ## Run every notebook from top to bottom; the files stay as they are
	@for notebook in notebooks/*.ipynb; do echo "== $$notebook"; $(BIN)/jupyter execute "$$notebook" || exit 1; done

lint: $(READY) ## Check style, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Time the data path and the step, on drawn cells or BENCH_DATA=folder
	@test -d $(BENCH_DATA) || $(BIN)/dinov2 synth --out $(BENCH_DATA) --per-class 20
	$(BIN)/python benchmarks/multicrop.py --rounds 0 $(BENCH_DATA)
	$(BIN)/python benchmarks/train_step.py --cases demo

clean: ## Remove the environment and all caches; ./demo and ./runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first of $(PYTHON) that is 3.10 or newer and can make environments.
$(READY): pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		found=; bare=; \
		for name in $(PYTHON); do \
			"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue; \
			if "$$name" -c 'import ensurepip, venv' 2>/dev/null; then found=$$name; break; fi; \
			bare=$$name; \
		done; \
		if [ -n "$$found" ]; then \
			echo "Making an environment in $(VENV) with $$("$$found" --version); PyTorch is large, so this takes minutes"; \
			"$$found" -m venv --clear $(VENV); \
		elif [ -n "$$bare" ]; then \
			echo "$$bare cannot make environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; \
		else \
			echo "No Python 3.10 or newer among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
		fi; \
	fi
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	@touch $@
