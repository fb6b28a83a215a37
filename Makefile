# On a fresh machine with Python >= 3.11 and make, two commands are enough:
#
#   make demo    the main job on a small model, with pictures and timings
#   make test    lint, type check and the tests
#
# Both make the environment in $(VENV) once, and again when pyproject.toml or constraints.txt change.

# The Python that makes the environment: the first one found that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; \
	done)
VENV ?= .venv
# Test processes side by side. Tests compile, so more of them than cores does not help.
WORKERS ?= 2
# More arguments for pytest, for example PYTEST_ARGS="-m 'not slow' -k armt".
PYTEST_ARGS ?=
# How long `make fuzz` draws models, in seconds.
DIAGPASS_FUZZ_SECONDS ?= 60

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH = $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: demo docs linkcheck test timing lint format fuzz models install clean help

demo: $(STAMP)  ## run the main job on an ARMT over a Llama: picture, waves, agreement, timings
	$(BIN)/python -m examples.demo

test: lint  ## lint, type check, run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not alone" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS)

timing: $(STAMP)  ## the tests that hold a time limit, with nothing beside them
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## let ruff format the code and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(STAMP)  ## draw random models for DIAGPASS_FUZZ_SECONDS (60) seconds and print how many
	DIAGPASS_FUZZ_SECONDS=$(DIAGPASS_FUZZ_SECONDS) $(BIN)/python -m tests.fuzz

docs: $(STAMP)  ## build the documentation site in docs/_build/html, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

linkcheck: $(STAMP)  ## check the links of the documentation (needs a network)
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

models: $(STAMP)  ## run the models from elsewhere and write docs/models.md (some minutes)
	$(BIN)/python -m tests.zoo.table

install: $(STAMP)  ## make the environment only

# torch comes first and pinned, so that nothing later can pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "diagpass needs Python 3.11 or newer and found none; name it: make PYTHON=/path/to/python3"; \
		exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "diagpass needs Python 3.11 or newer; $(PYTHON) is not; name another: make PYTHON=/path/to/python3"; \
		exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) build dist docs/_build docs/_generated .pytest_cache .ruff_cache .hypothesis demo-grid.png
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
