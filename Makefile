# Two commands: `make demo` and `make test`. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

# The edit loop: what covers most in least time.
QUICK := test_simplex test_masking test_drop_rate test_sampling test_reference test_plots test_limits

.PHONY: demo test test-quick test-slow lint docs figures clean

# Learning rates are those that the study (benchmarks/study) found for these digits on a validation split.
demo: $(VENV)/ready  ## the study's arms, networks cut in training, sparse ones: 3 seeds, about 3 minutes; runs/demo*
	$(BIN)/python -m impact_optim --data digits --seeds 3 --batch 100 --drop-rate 0.3 --threads 1 --out runs/demo \
		--arms baseline dropconnect impacts impacts+regularization saliency \
		--lr 0.1 --set baseline.lr=0.05
	$(BIN)/python -m impact_optim --data digits --seeds 3 --batch 100 --model cnn --epochs 20 --threads 1 \
		--out runs/demo-pruned --arms baseline saliency --prune 8:0.3,14:0.5
	$(BIN)/python -m impact_optim --data digits --seeds 3 --batch 100 --lr 0.1 --threads 1 --out runs/demo-sparse \
		--arms baseline gradual-magnitude saliency --set saliency.lr=0.2 --final-sparsity 0.9

test: lint  ## linter, type checker and tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(PYTEST_ARGS)

test-quick: $(VENV)/ready  ## a part of them for the edit loop, under a minute; CONTRIBUTING.md says what else to run when
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n auto $(QUICK:%=tests/%.py) $(PYTEST_ARGS)

test-slow: lint  ## the same with the long sweeps
	$(BIN)/python -m pytest -q --slow -n auto --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready  ## the site, into build/site; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

figures: $(VENV)/ready  ## the pictures of the tutorials and of "How it works"
	$(BIN)/python docs/figures.py

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build
