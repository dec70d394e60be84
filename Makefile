# Every target works on a bare clone with Python 3.10 or newer, a C++17 compiler and make. CMake, Ninja and everything
# else come from the package index, at the versions in constraints.txt, into .venv. The package is installed there once,
# editable: a changed line of Python is in force at once, and `make develop` rebuilds what changed in C++.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# Warnings are errors in continuous integration only: a newer compiler must not stop a user's build.
WERROR ?= $(if $(CI),ON,OFF)

export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
unexport PYTHONPATH
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
PIP := $(BIN)/python -m pip --disable-pip-version-check

BUILD := build/develop
# Settings of scikit-build-core, in its variables: not every pip passes options on.
EDITABLE := SKBUILD_BUILD_DIR=$(BUILD) SKBUILD_CMAKE_DEFINE="PRIVTUNER_BUILD_TESTS=ON;PRIVTUNER_WERROR=$(WERROR)"

.DEFAULT_GOAL := help
.PHONY: help demo demo-sealed test test-arithmetic test-cpp test-parties test-paths test-sanitize bench lint wheel develop clean

help:
	@echo 'make demo            fine-tune MiniLM plain and encrypted, with the server in its own process'
	@echo 'make demo-sealed     fine-tune a small encoder that neither side shows the other: a quarter of an hour'
	@echo 'make test            build, and run the C++ and the Python tests'
	@echo 'make test-paths      run the tests on the code paths of other processors: PATHS="sse jitter isa-portable"'
	@echo 'make test-sanitize   run the C++ tests under the address and undefined-behaviour sanitizers'
	@echo 'make bench           measure, print tables, write JSON and plots into out/'
	@echo 'make lint            formatters, linters and the type checker'
	@echo 'make wheel           build the wheel into dist/'
	@echo 'make develop         install into .venv, editable, and rebuild what changed: what the targets above begin with'
	@echo 'make clean           remove everything the targets made'

demo: develop
	mkdir -p out/demo
	$(BIN)/privtuner demo --out out/demo

demo-sealed: develop
	mkdir -p out/demo-sealed
	$(BIN)/privtuner demo-sealed --out out/demo-sealed

# The Python tests in two halves, which `make --jobs=2` runs side by side: with one thread each, for two that wait for
# each other on the same cores take longer than one; tests of threads set their own. The C++ tests come last, as they
# fill what cores are left.
ARITHMETIC := ckks core cuda linear openfhe wireless
PARTIES := $(filter-out $(ARITHMETIC) support __pycache__,$(patsubst tests/%/,%,$(wildcard tests/*/)))

test: test-arithmetic test-parties test-cpp

test-arithmetic test-parties: export OMP_NUM_THREADS := 1
test-arithmetic test-parties: export PRIVTUNER_NUM_THREADS := 1

test-arithmetic: develop
	$(BIN)/python -m pytest $(ARITHMETIC:%=tests/%)

test-parties: develop
	$(BIN)/python -m pytest $(PARTIES:%=tests/%)

test-cpp: develop
	$(BIN)/cmake --build $(BUILD) --target cpp_tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error --parallel $(JOBS)

test-paths: test-cpp
	$(BIN)/python tests/support/paths.py $(PATHS) --ctest $(BUILD) --tests "$(TESTS)"

test-sanitize: $(VENV)/tools
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DPRIVTUNER_BUILD_PYTHON=OFF -DPRIVTUNER_BUILD_TESTS=ON -DPRIVTUNER_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize --target cpp_tests
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error --parallel $(JOBS)

bench: develop
	mkdir -p out
	$(BIN)/python benchmarks/linear.py --json out/linear.json --plot out/linear.png
	$(BIN)/python benchmarks/training.py --json out/training.json --plot out/training.png
	$(BIN)/python benchmarks/ckks.py --json out/ckks.json --plot out/ckks.png
	$(BIN)/python benchmarks/schemes.py --json out/schemes.json --plot out/schemes.png
	$(BIN)/python benchmarks/wireless.py --json out/wireless.json
	$(BIN)/python benchmarks/sealed.py --json out/sealed.json
	$(BIN)/python benchmarks/service.py --minutes 2 --json out/service.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find cpp -name '*.[ch]pp')

wheel: $(VENV)/tools
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

develop: $(VENV)/installed
	@$(BIN)/cmake --build $(BUILD)
	@$(BIN)/cmake --install $(BUILD) --component python \
	  --prefix $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

clean:
	rm -rf build dist out $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps keep what is installed from being installed again.
$(VENV)/tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'privtuner needs Python 3.10 or newer: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'No virtual environment could be made: install the venv module of $(PYTHON)' \
	         '(Debian, Ubuntu: apt-get install python3-venv python3-dev g++)'; exit 1; }
	$(PIP) install --quiet -c constraints.txt scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/installed: $(VENV)/tools pyproject.toml
	$(EDITABLE) $(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[test,bench,lint]'
	@touch $@
