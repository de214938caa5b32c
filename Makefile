# Everything a stranger needs is git, make and Python 3.12 or newer: each command makes its own
# environment in .venv first, and reuses it as long as pyproject.toml stays the same.
#
#   make demo PYTHON=python3.13     another interpreter
#   make demo ARGS="--help"         arguments for the recipe; the same for bench and test

PYTHON ?=
ARGS ?=
# a file stays on one worker, which runs what its tests share once
SPREAD = -n 2 --dist loadfile
QUICK = not slow and not gpu and not h200

# kernels are compiled for an H200 by compilers that PyPI has for Linux only
ifeq ($(shell uname -s -m),Linux x86_64)
COMPILE = JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 $(1)/bin/python -m pytest -n 2 tests/kernels
INSTALL = scripts/environment.sh $(1) test -e '.[recipes,benchmarks]' --group dev --group h200 $(2)
else
COMPILE = @echo 'Skipped: compilation for the H200, which needs Linux on x86-64' \#
INSTALL = true
endif
OLDEST = jax==0.11.2 jaxlib==0.11.2

export PYTHON
export GOAL := $(firstword $(MAKECMDGOALS) demo)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo bench test test-all lint format clean environment environment-h200 environment-oldest

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## train a block-sparse Transformer on real text beside a dense one, on this machine
	@scripts/environment.sh .venv demo -e '.[recipes]'
	@.venv/bin/python -m models.transformer $(ARGS)

bench: ## time the products against dense ones, in every regime
	@scripts/environment.sh .venv bench -e '.[recipes,benchmarks]'
	@.venv/bin/python -m benchmarks.matmul $(ARGS)

test: lint environment-h200 ## format, lint, types, import contracts, the quick tests, H200 code
	.venv/bin/python -m pytest $(SPREAD) -m "$(QUICK)" $(ARGS)
	$(call COMPILE,.venv-h200) -m "h200 and not slow"

test-all: lint environment-h200 environment-oldest ## every test, and the quick ones with the oldest JAX
	.venv/bin/python -m pytest $(SPREAD) -m "not h200" $(ARGS)
	$(call COMPILE,.venv-h200) -m h200
	.venv-oldest/bin/python -m pytest $(SPREAD) -m "$(QUICK)" $(ARGS)
	$(call COMPILE,.venv-h200-oldest) -m h200

lint: environment ## format, lint, types and import contracts only
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/pyright
	.venv/bin/lint-imports

format: environment ## rewrite the files as the linter wants them
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## remove the environments and every cache (not out/, which holds your results)
	rm -rf .venv .venv-h200 .venv-oldest .venv-h200-oldest .venv*.unfinished build dist
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@scripts/environment.sh .venv demo -e '.[recipes]'
	@scripts/environment.sh .venv test -e '.[recipes,benchmarks]' --group dev

environment-h200:
	@$(call INSTALL,.venv-h200)

environment-oldest:
	@scripts/environment.sh .venv-oldest test -e '.[recipes,benchmarks]' --group dev $(OLDEST)
	@$(call INSTALL,.venv-h200-oldest,$(OLDEST))
