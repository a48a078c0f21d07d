# The two commands: `make demo` and `make test`. Both set up their own environment in .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DATA   ?= $(if $(ARCHOPT_DATA),$(ARCHOPT_DATA),$(wildcard ../shared/data))

export ARCHOPT_DATA := $(DATA)

# What the CPU kernel is compiled from; it is built with the package, where there is a compiler.
KERNEL := setup.py $(wildcard src/archopt/kernels/native/*)

.PHONY: demo test test-triton test-long test-aarch64 lint types format clean env

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(KERNEL)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "archopt needs Python 3.11 or newer; $$($(PYTHON) --version) found. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/archopt demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto -m 'not slow'

# The GPU kernels, run by Triton's interpreter on the CPU. Where there is a GPU `make test` runs them on it.
test-triton: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/kernels/gpu

test-long: $(STAMP)
	$(BIN)/python -m pytest -n auto -m slow

# The CPU kernels, compiled for aarch64 and run by an emulator; the script says what that needs.
test-aarch64: $(STAMP)
	PYTHON=$(BIN)/python tests/kernels/aarch64.sh

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/archopt/kernels/_native* .pytest_cache .mypy_cache .ruff_cache .hypothesis
