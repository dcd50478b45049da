# make run | test | check | bench | docs | clean, each from a bare machine: Python 3.11 or newer, pip
# and a C++ compiler (installed by scripts/bootstrap where it may).

PYTHON ?=
PROMPT ?= What does os.path.join do?
BIN := .venv/bin
export PYTHON

.DEFAULT_GOAL := run
.PHONY: run test check bench docs clean engine
.NOTPARALLEL:

run: .venv/.run engine
	$(BIN)/loadmaster run demo "$(PROMPT)"

test: .venv/.dev engine
	$(BIN)/pytest -n 2

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.docs_reference --check
	$(BIN)/python -m scripts.guides --check
	$(BIN)/python -m scripts.docs_quantization --check
	$(BIN)/python -m scripts.docs_structure --check

bench: .venv/.dev engine
	@for name in plan_accuracy decode damaged_files worker_faults; do \
		echo "benchmarks.$$name" && $(BIN)/python -m benchmarks.$$name || exit 1; \
	done

docs: .venv/.dev
	$(BIN)/python -m scripts.docs_reference
	$(BIN)/python -m scripts.guides
	$(BIN)/python -m scripts.docs_quantization
	$(BIN)/python -m scripts.docs_structure

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage dist

# Compiles the engine unless one is there that works and has this package's native sources.
engine: | .venv/.run
	$(BIN)/loadmaster engine test --quiet 2>/dev/null || $(BIN)/loadmaster engine build

.venv/.run: requirements/run.txt pyproject.toml
	scripts/bootstrap run
	touch $@

.venv/.dev: requirements/dev.txt pyproject.toml
	scripts/bootstrap dev
	touch $@ .venv/.run
