# Two commands matter: `make demo` and `make test`. Each does all of its own set-up, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-short test lint setup clean
demo: $(READY)  ## train ResNet-20 on Fashion-MNIST in fp32, bf16 and sbm8, time them in turn, print one table
	$(BIN)/python benchmarks/demo.py

demo-short: $(READY)  ## the same on fewer images, 1 to 2 minutes also on busy cores
	$(BIN)/python benchmarks/demo.py --short

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff and mypy, as pre-commit runs them
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

setup: $(READY)

# torch comes first and pinned, so that no other package's range picks a larger build of it.
# A new package folder needs a new editable install: the old one does not know it.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/lowbit/kernels/native/*) $(wildcard src/lowbit/*/__init__.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build
