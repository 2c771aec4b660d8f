# Sets itself up in .venv from nothing but Python 3.10+ and a C++ compiler. `make help` lists targets.
#
#   PYTHON   interpreter that .venv is made from          (python3)
#   ARGS     passed on: make test ARGS="-k noise -x"
#   JOBS     test files that run side by side; 0: in one process           (2)
#   TORCH    what is installed where torch is missing      (torch==2.13.0)

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= 2
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
# torch is held at what is installed: nothing that is installed later may bring another one.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PINNED := $(PIP) --constraint $(VENV)/torch.txt
COMMA := ,
SETTINGS := pyproject.toml setup.py

.PHONY: help train test bench docs lint format build clean distclean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

train: $(VENV)/train.stamp build  ## train the Bayesian CNN on digits; ARGS="--epochs 3"
	@$(PY) -m fastbconv train $(ARGS)

test: $(VENV)/test.stamp build  ## all tests; ARGS="-k noise -x"
	@# Threads that wait give their core to the other process. Whole files: a fixture is compiled once.
	OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/bench.stamp build  ## timings against the deterministic layer
	@$(PY) -m fastbconv bench $(ARGS)

docs: $(VENV)/docs.stamp  ## the API reference and the pages as HTML, in build/docs
	@$(PY) docs/build.py build/docs
	echo "build/docs/index.html"

lint: $(VENV)/lint.stamp  ## formatters and linter, changing nothing
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/lint.stamp  ## run the formatters
	@$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(VENV)/bin/clang-format -i

build: $(VENV)/base.stamp  ## compile what changed in the native library and describe it
	@$(PY) -m fastbconv env

clean:  ## remove build output and caches, keep .venv
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis fastbconv/*.so
	find fastbconv tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv too
	@rm -rf $(VENV)

$(VENV)/torch.txt:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	    f"Python 3.10 or later is needed, and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=...")'
	rm -rf $(VENV)
	usable='import torch; sys = __import__("sys"); v = torch.__version__.split(".")[:2]; \
	    sys.exit(tuple(map(int, v)) < (2, 11))'
	if $(PYTHON) -c "$$usable" 2>/dev/null; then
	    echo "setting up $(VENV) with the torch that is installed"
	    $(PYTHON) -m venv --system-site-packages $(VENV)
	else
	    echo "setting up $(VENV) with $(TORCH)"
	    $(PYTHON) -m venv $(VENV)
	    $(PIP) '$(TORCH)'
	fi
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

# An editable install without compiling: the library is built at first use, by ninja, which
# recompiles only what changed. Each stamp holds one set of extras.
define INSTALL
@$(PINNED) 'setuptools>=77' ninja pybind11
FASTBCONV_AOT=0 $(PINNED) --no-build-isolation --editable '.$(1)'
touch $@
endef

$(VENV)/base.stamp: $(VENV)/torch.txt $(SETTINGS)
	$(call INSTALL,)

$(VENV)/train.stamp: $(VENV)/base.stamp
	$(call INSTALL,[train])

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(call INSTALL,[train$(COMMA)test])

$(VENV)/bench.stamp: $(VENV)/base.stamp
	$(call INSTALL,[bench])

$(VENV)/docs.stamp: $(VENV)/base.stamp
	$(call INSTALL,[docs])

$(VENV)/lint.stamp: $(VENV)/base.stamp
	$(call INSTALL,[lint])
