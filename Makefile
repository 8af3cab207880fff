# make demo   sets up .venv and trains a deep equilibrium network on real digits
# make test   sets up .venv and runs every check
# make test-fast   sets up .venv and runs the tests that are not marked slow
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-fast lint

$(INSTALLED): requirements.txt setup.cfg pyproject.toml
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@touch $@

install: $(INSTALLED)

demo: install
	@$(BIN)/python -m experiments.image_classification

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/mypy

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: lint
	@$(PYTEST)

test-fast: install
	@$(PYTEST) -m "not slow"
