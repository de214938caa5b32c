# Everything a stranger needs is git, make and Python 3.12 or newer: each command makes its own
# environment in .venv first, and reuses it as long as pyproject.toml stays the same.
#
#   make demo PYTHON=python3.13     another interpreter
#   make demo ARGS="--help"         arguments for the recipe; the same for bench and test

PYTHON ?=
ARGS ?=
QUICK = not slow and not gpu

export PYTHON
export GOAL := $(firstword $(MAKECMDGOALS) demo)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo bench test test-all lint format clean environment environment-oldest

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## train a block-sparse Transformer on real text beside a dense one, on this machine
	@scripts/environment.sh .venv demo -e '.[recipes]'
	@.venv/bin/python -m models.transformer $(ARGS)

bench: ## time the products against dense ones, in every regime
	@scripts/environment.sh .venv bench -e '.[recipes,benchmarks]'
	@.venv/bin/python -m benchmarks.matmul $(ARGS)

test: lint ## format, lint, types, import contracts and the quick tests
	.venv/bin/python -m pytest -n 2 -m "$(QUICK)" $(ARGS)

test-all: lint environment-oldest ## every test, then the quick ones with the oldest JAX supported
	.venv/bin/python -m pytest -n 2 $(ARGS)
	.venv-oldest/bin/python -m pytest -n 2 -m "$(QUICK)" $(ARGS)

lint: environment ## format, lint, types and import contracts only
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/pyright
	.venv/bin/lint-imports

format: environment ## rewrite the files as the linter wants them
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## remove the environments and every cache (not out/, which holds your results)
	rm -rf .venv .venv.unfinished .venv-oldest .venv-oldest.unfinished build dist
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@scripts/environment.sh .venv demo -e '.[recipes]'
	@scripts/environment.sh .venv test -e '.[recipes,benchmarks]' --group dev

environment-oldest:
	@scripts/environment.sh .venv-oldest test -e '.[recipes,benchmarks]' --group dev \
	    jax==0.11.2 jaxlib==0.11.2
