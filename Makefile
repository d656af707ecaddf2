# make demo     set up once, then decode a clip with the embedded pair     (ARGS="ratio=0.5" to change the run)
# make test     set up once, then run the tests in two processes           (ARGS="-k registry" to choose, ARGS="-n 8" for more)
# make quick    the same without the slow ones, for work in progress: under two minutes
# make test-all the same, and then all crossings of which `make test` runs a sample
# make ablation the main ablations on 24 scenes: a report, a table, verdicts (ARGS="--pair embedded_llava_onevision" for the
#               other family); broken off, it goes on where it was
# make plugins  install every package under plugins/ into .venv, editable
# make lmms     set up .venv-lmms with lmms-eval, then run there the tests of plugins/specvlm-lmms-eval
# make campaign attacks that must find nothing: kills, leaks, bad input, … (ARGS="kills --count 20" to choose)
# make docs     build the docs site into site/                              (ARGS="-d FOLDER" for another)
# make check    lint, types and tests, as before a commit
#
# PYTHON=python3.12 chooses the interpreter. TORCH="--index-url URL" chooses another build of torch, such as the
# CPU one, which is ten times smaller than the CUDA build.

SHELL := /bin/bash
PYTHON ?=
TORCH ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PINS := pyproject.toml constraints.txt
LMMS := .venv-lmms
LMMS_EVAL := plugins/specvlm-lmms-eval
LMMS_PIP := $(LMMS)/bin/python -m pip install -qq --disable-pip-version-check -c $(LMMS_EVAL)/constraints.txt

.PHONY: demo test quick exhaustive test-all campaign ablation plugins lmms docs check lint types clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m specvlm pruner=two_stage ratio=0.9 $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not exhaustive" $(ARGS)

quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not exhaustive" $(ARGS)

exhaustive: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m exhaustive $(ARGS)

test-all:
	$(MAKE) test
	$(MAKE) exhaustive

campaign: $(VENV)/.installed-test
	PYTHONPATH=.:tests $(BIN)/python -m campaign $(ARGS)

ablation: $(VENV)/.installed-report
	$(BIN)/python -m experiments.ablations.small $(ARGS)

# They need nothing but specvlm; the one for lmms-eval needs an environment of its own. The build backend is installed once, instead of once a package.
plugins: $(VENV)/.installed
	@$(PIP) -c constraints.txt 'hatchling>=1.27' 'editables>=0.5'
	@$(PIP) --no-deps --no-build-isolation $(addprefix -e ./,$(filter-out $(LMMS_EVAL),$(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))))
	@echo "installed: $(filter-out specvlm-lmms-eval,$(patsubst plugins/%/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))"

lmms: $(LMMS)/.installed
	$(LMMS)/bin/python -m pytest $(LMMS_EVAL) $(ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

check: lint types test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# Each step leaves a stamp, so that a second call starts the job at once, without asking pip.
$(VENV)/.created:
	@for python in "$(PYTHON)" python3 python3.11 python3.12 python3.13; do \
	  if [ -n "$$python" ] && $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "setting up $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV) && touch $@ && exit 0; exit 1; fi; \
	  if [ -n "$(PYTHON)" ]; then echo "PYTHON=$(PYTHON) is not Python 3.11 or newer" >&2; exit 1; fi; \
	done; echo "no Python 3.11 or newer found; name one with PYTHON=…" >&2; exit 1

# Alone and first: beside other packages an unpinned torch is replaced by the newest, with gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	@echo "installing torch (a minute or more)"
	@$(PIP) -c constraints.txt $(TORCH) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed: $(PINS) $(VENV)/.torch
	@echo "installing specvlm and what it needs"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-report: $(PINS) $(VENV)/.installed
	@echo "installing what the report needs"
	@$(PIP) -c constraints.txt -e '.[report]'
	@touch $@

$(VENV)/.installed-docs: $(PINS) $(VENV)/.installed
	@echo "installing what the docs site needs"
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.installed-test: $(PINS) $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(PINS) $(VENV)/.installed-test
	@echo "installing ruff and mypy"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# lmms-eval pins older versions than constraints.txt. It runs without torchvision; one that does not fit this build of
# torch would keep transformers from importing the models.
$(LMMS)/.installed: $(PINS) $(LMMS_EVAL)/pyproject.toml $(LMMS_EVAL)/constraints.txt | $(VENV)/.created
	@echo "setting up $(LMMS) with lmms-eval (some minutes)"
	@$(BIN)/python -m venv $(LMMS)
	@$(LMMS_PIP) $(TORCH) "$$(grep '^torch==' constraints.txt)"
	@$(LMMS_PIP) -e . -e $(LMMS_EVAL) pytest
	@$(LMMS)/bin/python -c 'import torchvision' 2>/dev/null || $(LMMS)/bin/python -m pip uninstall -qq -y torchvision
	@touch $@

clean:
	rm -rf $(VENV) $(LMMS)
