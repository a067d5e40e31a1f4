# `make test` sets up an environment in .venv and runs lint, types and tests.
# `make demo` sets up the same and runs the main job on a real model; MODEL=folder-or-Hub-id takes another one.
PYTHON ?= python3
MODEL ?=
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup test lint demo
setup: $(VENV)/ready
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "pip>=25.1"
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e . --group dev
	touch $@

lint: setup
	$(BIN)/ruff check src kernels tests benchmarks
	$(BIN)/ruff format --check src kernels tests benchmarks
	$(BIN)/mypy src kernels benchmarks

test: lint
	$(BIN)/python -m pytest

demo: setup
	$(BIN)/slimformer demo $(MODEL) --output demo-output --force
