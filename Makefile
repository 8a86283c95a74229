# Two commands: `make demo` and `make test`. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(VENV)/ready  ## the study's arms on real data, 3 seeds, in under 3 minutes; pictures in runs/demo
	$(BIN)/python -m impact_optim --data digits --seeds 3 --out runs/demo

test: lint  ## linter, type checker and tests
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: lint  ## the same with the long sweeps
	$(BIN)/python -m pytest -q --slow $(PYTEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
