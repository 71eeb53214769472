# Commands for a newcomer: `make demo`, `make test`, and `make quick` while editing. All else is `bushpc --help`.
PYTHON ?= python3
VENV := .venv
# Tests run in so many processes, each a file at a time, in the order of tests/conftest.py: the longest files first. Those
# of Slurm mostly wait, so there are more processes than the two cores of a small machine.
TEST_PROCESSES ?= 3
BIN := $(VENV)/bin
# Which build of torch: constraints-cuda126.txt for older drivers and GPUs. docs/how-to/install.md says which is yours.
CONSTRAINTS ?= constraints.txt
# make demo DATA=<BrEaST folder> runs the demo on the real dataset instead of the synthetic one.
# Its text goes to the script through the environment as it is: make and the shell expand nothing in it.
override DATA := $(value DATA)
export DATA

.PHONY: demo test quick lint docs clean

demo: $(VENV)/.installed
	@bash tools/demo.sh

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder

# Lint, types, and the tests that start no process and train nothing. CONTRIBUTING.md says how they are chosen.
quick: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist=worksteal --quick -rfE --ignore=tests/slurm --ignore=tests/gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.docs

# The documentation as a site, in build/docs/site. Dead links and other warnings are errors.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m tools.docs

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) constraints-common.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch, deepspeed and the rest into $(VENV): about 6 GB, some minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
