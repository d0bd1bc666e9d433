# Everything a contributor needs; each target sets up its own environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help test demo lint format types unit

help:            ## list the targets
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab,dev]"
	@touch $(STAMP)

test: lint types unit  ## lint, format check, strict types, all tests, doctests, README examples

lint: $(STAMP)   ## style and format, checked only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite the files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## strict static types of the package
	$(BIN)/mypy

unit: $(STAMP)   ## all tests, doctests and documented examples
	$(BIN)/pytest --numprocesses logical --dist worksteal

demo: $(STAMP)   ## five gradients on the embedded digits: table and pictures
	OMP_NUM_THREADS=1 $(BIN)/multitangent compare --preset demo  # tiny tensors: one thread is faster
