# Two commands: `make run` trains the embedded job with tree rollouts, `make test` runs the checks. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ALGO ?= treerpo

.PHONY: run test check unit clean

run: $(STAMP)
	$(BIN)/rlzoo run --algo $(ALGO) $(ARGS)

test: check unit

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlzoo algorithms benchmarks

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# Editable, and again whenever an algorithm file or the metadata changes: a new entry point is invisible until then.
$(STAMP): pyproject.toml constraints.txt $(wildcard algorithms/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	rm -rf *.egg-info  # a leftover of the build that would hide later entry points from programs started here
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
