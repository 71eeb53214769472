# Two commands for a newcomer: `make demo` and `make test`. Everything else is `bushpc --help`.
PYTHON ?= python3
VENV := .venv
# Tests run in so many processes, each a file at a time; those of Slurm by themselves, as they watch the clock.
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
# Which build of torch: constraints-cuda126.txt for older drivers and GPUs. docs/how-to/install.md says which is yours.
CONSTRAINTS ?= constraints.txt
# make demo DATA=<BrEaST folder> runs the demo on the real dataset instead of the synthetic one.
# Its text goes to the script through the environment as it is: make and the shell expand nothing in it.
override DATA := $(value DATA)
export DATA

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	@bash tools/demo.sh

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest tests/slurm
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist=loadfile --ignore=tests/slurm

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) constraints-common.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch, deepspeed and the rest into $(VENV): about 6 GB, some minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
