# make         set up ./.venv with what the node and the demo need (no torch in it)
# make demo    send a study to a node over DICOM and show the SEG that comes back; STUDY=folder takes your own
# make test    set up what the tests need, and run all of them; CI=1 makes a missing server a failure
# make clean   remove the environment and what the demo left

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?=
OUTPUT ?= demo-output
PYTEST_ARGS ?=

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := models service training deploy tests

.PHONY: setup demo test lint clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.demo-installed

demo: $(VENV)/.demo-installed
	$(BIN)/python -m deploy.demo --output "$(OUTPUT)" $(if $(STUDY),--study "$(STUDY)")

test: $(VENV)/.test-installed lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy -p models -p service -p training -p deploy.demo
	$(BIN)/lint-imports

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the node into $(VENV): about a minute, once."
	$(INSTALL) --editable ".[demo]"
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the node, the training wing and the tests into $(VENV): a few minutes, once."
	$(INSTALL) --editable ".[test]"
	@touch $@ $(VENV)/.demo-installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "segnode needs Python 3.11 or later; say which with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Python cannot make an environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

clean:
	rm -rf $(VENV) "$(OUTPUT)"
