# Each target works alone in a fresh clone: it makes .venv and installs what it needs, once.

PYTHON ?= python3
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROJECT := pyproject.toml constraints.txt $(shell find native -type f)

SANITIZE := cmake ninja nanobind

.PHONY: help install serve test lint bench sanitize

help:
	@echo "make install   create .venv with tokenloom and its base dependencies"
	@echo "make serve     serve the embedded model on 127.0.0.1:$(PORT) (PORT=..., ARGS=...)"
	@echo "make test      run the tests (ARGS='tests/engine -k prefix')"
	@echo "make lint      ruff, mypy --strict, import-linter"
	@echo "make sanitize  the native kernels' tests under AddressSanitizer and UBSan (needs a C++ compiler)"
	@echo "make bench     measure the offline engine (ARGS='--quick --json')"

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@exec $(BIN)/tokenloom serve --port $(PORT) $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-cache

sanitize: $(VENV)/.installed-test
	$(PIP) $(SANITIZE)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/sanitize.py $(ARGS)

bench: $(VENV)/.installed
	@$(BIN)/python bench/offline.py $(or $(ARGS),--quick)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PROJECT) | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(PROJECT) | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: $(PROJECT) | $(BIN)/python
	$(PIP) -e '.[lint]'
	@touch $@ $(VENV)/.installed
