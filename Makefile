.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format clean

PYTHON ?= python3
RANKS ?= 2
DEMO ?=
BIN := .venv/bin

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: .venv/dev ## create .venv with everything that tests and lint need

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/run ## train a byte-level GPT on real text, about 3 minutes on 2 cores
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) train.py experiment=first_run $(DEMO)

test: .venv/dev ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: .venv/dev ## ruff, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev ## mypy on optim/
	@mkdir -p .typing && ln -sfn .. .typing/geon
	MYPYPATH=.typing $(BIN)/mypy -p geon.optim

format: .venv/dev ## ruff, fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches, keep .venv and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .typing build dist *.egg-info
