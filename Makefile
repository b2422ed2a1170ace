# STACK=onedl (default) or STACK=openmmlab: both install the same import names, so that each gets an
# environment of its own.
STACK ?= onedl
PYTHON ?= python3
PYTEST_ARGS ?=

ifeq ($(STACK),onedl)
VENV ?= .venv
else ifeq ($(STACK),openmmlab)
VENV ?= .venv-openmmlab
else
$(error STACK is onedl or openmmlab, not "$(STACK)")
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# a Python without ensurepip makes environments that have no pip
CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'

demo: $(VENV)/.installed ## install everything and run tools/demo.py
	@$(PY) tools/demo.py

# Many small operations: a process per core beats threads.
test: $(VENV)/.installed $(if $(filter onedl,$(STACK)),lint) ## check the style, run the tests (STACK=onedl or openmmlab; PYTEST_ARGS)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/.installed ## check the style
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

format: $(VENV)/.installed ## put the files into the style
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

clean: ## remove the environments and all that was built
	rm -rf .venv .venv-openmmlab build dist *.egg-info fastvit_mm/.mim .pytest_cache .ruff_cache
	find fastvit_mm configs tests tools -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	$(if $(shell $(PYTHON) -c '$(CHECK)' >/dev/null 2>&1 || echo no),$(error Python 3.10 or newer with pip and venv is needed, $(PYTHON) is not: try make PYTHON=python3.12))
	@$(PYTHON) -m venv $(VENV)

# Both OpenCV packages get installed and write the same files. The last one wins, and this has to be
# the headless one: the other one needs libGL, which servers often lack.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt | $(PY)
	@echo 'Installing into $(VENV) (some minutes the first time) ...'
	@$(PIP) install -qq -c constraints.txt -e '.[$(STACK),test]'
	@grep -qs '^headless = True' $(VENV)/lib/python*/site-packages/cv2/version.py \
	  || $(PIP) install -qq -c constraints.txt --no-deps --force-reinstall opencv-python-headless
	@touch $@
