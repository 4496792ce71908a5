# Two commands: `make chat` and `make test`. Each sets up all it needs in .venv, from constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
BUILD_TOOLS := cmake nanobind ninja scikit-build-core
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: chat test lint slow check soak clean

chat: $(VENV)/.run
	@$(BIN)/moei chat moei-demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "not slow and not soak and not gpu" --ignore tests/cli/test_terminal.py
	@# A person at a terminal is alone: these wait for what the screen shows, and nothing else may run beside.
	$(BIN)/pytest -m "not slow and not soak and not gpu" tests/cli/test_terminal.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(VENV)/.dev
	@# The other cases of quick tests, and what no clock is part of.
	$(BIN)/pytest -n 2 --dist worksteal -m "slow and (sampled or untimed) and not gpu" --timeout=1200
	$(BIN)/pytest -m "slow and not (sampled or untimed) and not gpu" --timeout=1200

# All that CI runs.
check: test lint slow

# By hand: hours, fuzzing, peers.
soak: $(VENV)/.dev
	$(BIN)/pytest -m "soak and not gpu" --timeout=0

$(VENV)/bin/python:
	@echo "Setting up .venv (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)

# The build tools come first and from constraints.txt: pip's own build environment would take the newest.
$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt $(shell find native -type f)
	@$(PIP) $(BUILD_TOOLS)
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
