# STACK=onedl (default) or STACK=openmmlab: both install the same import names, so each gets its own
# environment. So does TORCH=oldest, the oldest torch that setup.py allows.
STACK ?= onedl
TORCH ?= pinned
PYTHON ?= python3
PYTEST_ARGS ?=
TESTS :=
CONSTRAINTS := constraints.txt

ifeq ($(TORCH),oldest)
VENV ?= .venv-oldest
CONSTRAINTS = $(VENV)/constraints.txt
# tests that depend on torch itself, not on the families
TESTS := -m 'not slow' $(wildcard $(addprefix tests/test_,deploy.py export.py fastvit.py fused_training.py hook.py ordinary.py *weights.py))
endif

ifeq ($(STACK),onedl)
VENV ?= .venv
else ifeq ($(STACK),openmmlab)
VENV ?= .venv-openmmlab
else
$(error STACK is onedl or openmmlab, not "$(STACK)")
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# without ensurepip, Python creates environments without pip
CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest soak lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'

demo: $(VENV)/.installed ## install everything and run tools/demo.py
	@$(PY) tools/demo.py

# Many small operations: one process per core beats threads.
test: $(VENV)/.installed $(if $(filter onedl-pinned,$(STACK)-$(TORCH)),lint) ## check the style, run the tests (STACK=onedl or openmmlab; PYTEST_ARGS)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 $(TESTS) $(PYTEST_ARGS)

test-oldest: ## run the tests of model, weights and export with the oldest torch that setup.py allows
	@$(MAKE) --no-print-directory test TORCH=oldest

soak: $(VENV)/.installed ## kill training runs again and again, and compare what they end with (SOAK_ARGS; an hour)
	@$(PY) tests/soak.py $(SOAK_ARGS)

lint: $(VENV)/.installed ## check the style
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

format: $(VENV)/.installed ## format the files
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-openmmlab .venv-oldest build dist *.egg-info fastvit_mm/.mim .pytest_cache .ruff_cache
	find fastvit_mm configs tests tools -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	$(if $(shell $(PYTHON) -c '$(CHECK)' >/dev/null 2>&1 || echo no),$(error Python 3.10 or newer with pip and venv is needed, $(PYTHON) is not: try make PYTHON=python3.12))
	@$(PYTHON) -m venv $(VENV)

# Both OpenCV packages get installed and write the same files. The last one wins, and it must be the
# headless one: the other one needs libGL, which servers often lack.
$(VENV)/.installed: setup.py pyproject.toml $(CONSTRAINTS) | $(PY)
	@echo 'Installing into $(VENV) (a few minutes the first time) ...'
	@$(PIP) install -qq -c $(CONSTRAINTS) -e '.[$(STACK),test]'
	@grep -qs '^headless = True' $(VENV)/lib/python*/site-packages/cv2/version.py \
	  || $(PIP) install -qq -c $(CONSTRAINTS) --no-deps --force-reinstall opencv-python-headless
	@touch $@

$(VENV)/constraints.txt: constraints.txt setup.py | $(PY)
	@{ sed -E '/^torch(vision)?==/d' constraints.txt; \
	  sed -nE "/install_requires/s/.*'(torch)>=([0-9.]+).*'(torchvision)>=([0-9.]+).*/\1==\2\n\3==\4/p" setup.py; } > $@
