# Two commands for a newcomer: `make demo` and `make test`. Everything else is `bushpc --help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# make demo DATA=<BrEaST folder> runs the demo on the real dataset instead of the synthetic one.
DATA ?=

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	@BIN="$(BIN)" DATA="$(DATA)" bash tools/demo.sh

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
