# Every command makes what it needs: `make test` on a fresh clone is enough. Python >= 3.10 comes
# first on PATH, or is named: `make test PYTHON=python3.13`.

PYTHON ?= python3
VENV ?= .venv
FLOE_BUILD ?= auto
TORCH ?=
JOBS ?= 2
ARGS ?=

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
PIP := $(PY) -m pip install --quiet --quiet --no-input

# every package but torch and what a CUDA build of it brings comes as the file whose hash is in
# requirements/, whatever TORCH says; torch's own build is the machine's affair, its version is not
HASHED := $(PIP) --no-deps --require-hashes --requirement

# a stamp is a finished step; two name what was chosen, so that another torch, another FLOE_BUILD
# or a compiler that was installed since is noticed
STAMPS := $(VENV)/stamps
TORCH_IN := $(STAMPS)/torch-$(or $(TORCH),pinned)
BUILT := $(STAMPS)/built-$(FLOE_BUILD)-$(if $(shell command -v $${CXX:-c++}),cpp,nocpp)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test dev bench sanitize fuzz nightly faults
.PHONY: lint format hooks docs wheel smoke lock licenses clean

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

sanitize: $(STAMPS)/packages  ## the C++ steps and the extension under three sanitizers
	$(PY) python_tests/cpu/sanitized.py
	$(PY) python_tests/cpu/sanitized_extension.py

fuzz: $(BUILT)  ## 10,000 drawn cases of every operator against float64; CASES=100 for fewer
	OMP_NUM_THREADS=1 FLOE_FUZZ_CASES=$(or $(CASES),10000) $(PY) -m $(PYTEST) --timeout=0 \
	    python_tests/fuzz $(ARGS)

nightly: CASES ?= 1000000
nightly: fuzz  ## a million cases

faults: $(BUILT)  ## 100 kills, full disks and other mishaps; KILLS=10 for fewer
	OMP_NUM_THREADS=1 FLOE_FAULTS=$(or $(KILLS),100) $(PY) -m pytest --timeout=0 -rs \
	    python_tests/faults python_tests/numbers $(ARGS)

lint: $(STAMPS)/packages  ## what must be clean before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(STAMPS)/packages  ## put every file in its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

hooks: $(STAMPS)/hooks  ## lint what is staged, from now on before every commit
	$(BIN)/pre-commit install

docs: $(STAMPS)/docs  ## pages of README and of every public docstring, in build/docs
	$(PY) docs/build.py build/docs

wheel: $(STAMPS)/audit  ## one wheel for every CPython >= 3.10 and torch >= 2.10, in dist
	rm -rf build/lib* dist  # setuptools packs whatever an earlier build left there
	$(PY) -m pip wheel --quiet --quiet --no-deps --no-build-isolation --wheel-dir dist \
	    --config-settings=--build-option=--py-limited-api=cp310 .
	$(if $(filter none,$(FLOE_BUILD)),,$(BIN)/abi3audit --strict dist/*.whl)
	@ls dist/*.whl

# PYTHON may be another than the wheel was made with; only torch is put beside it
smoke: $(CONSTRAINTS)  ## try the wheel in dist, under PYTHON, in an environment of its own
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --no-input --constraint $(CONSTRAINTS) torch
	build/smoke/bin/python -m pip install --quiet --no-input --no-deps --no-index dist/*.whl
	cd build/smoke && bin/python ../../python_tests/project/smoke.py native

lock: $(STAMPS)/lock  ## requirements/*.txt anew, after an edit of constraints.txt or pyproject.toml
	$(PY) requirements/lock.py

licenses: $(addprefix $(STAMPS)/,audit bench demo docs hooks lock)  ## LICENSES.md anew
	$(PY) requirements/licenses.py

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

$(VENV)/constraints-$(TORCH).txt: constraints.txt
	@mkdir -p $(@D)
	@sed '/^torch==/d; /^cuda-/d; /^nvidia-/d' $< > $@
	@$(if $(filter newest,$(TORCH)),,echo 'torch==$(TORCH)' >> $@)

$(STAMPS)/hashed: $(STAMPS)/venv requirements/packages.txt
	@echo "installing every package but torch"
	@$(HASHED) requirements/packages.txt
	@touch $@

# torch finds what it needs installed; it decides whether Triton is there already
$(TORCH_IN): $(STAMPS)/hashed $(CONSTRAINTS)
	@echo "installing torch"
	@rm -f $(STAMPS)/torch-*
	@$(PIP) --constraint $(CONSTRAINTS) torch
	@touch $@

$(STAMPS)/packages: $(TORCH_IN) pyproject.toml requirements/triton.txt
	@FLOE_BUILD=none $(PIP) --no-deps --no-build-isolation --editable .
	@$(PY) -c 'import triton' 2> /dev/null || $(HASHED) requirements/triton.txt || \
	    echo "Triton does not install on this platform: its kernels are not tested here"
	@touch $@

# the oldest Triton that kernels run under; the tests compile for GPUs with it, too, and skip that
# where it is missing
$(STAMPS)/triton-3.6: $(STAMPS)/packages requirements/triton-3.6.txt
	@echo "installing Triton 3.6 beside the newer one, for the tests that compile kernels"
	@rm -rf $(VENV)/triton-3.6
	@$(HASHED) requirements/triton-3.6.txt --target $(VENV)/triton-3.6 || { \
	    rm -rf $(VENV)/triton-3.6; \
	    echo "Triton 3.6 does not install here: kernels are compiled with the newer one alone"; }
	@touch $@

EXTRA := $(addprefix $(STAMPS)/,audit bench demo docs hooks)
$(EXTRA): $(STAMPS)/%: $(STAMPS)/packages requirements/%.txt
	@echo "installing the packages of requirements/$*.txt"
	@$(HASHED) requirements/$*.txt
	@touch $@

$(STAMPS)/lock: $(STAMPS)/venv requirements/lock.txt
	@$(HASHED) requirements/lock.txt
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
