# Every target works on a bare clone with Python 3.10 or newer, a C++17 compiler and make. CMake, Ninja and everything
# else come from the package index, at the versions in constraints.txt, into .venv.
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

BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE $(wildcard cmake/*)
SOURCES := $(shell find cpp/include cpp/src cpp/bindings cpp/openfhe -name '*.[ch]pp') \
           $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.csv' -o -name '*.toml' -o -name '*.cu*' -o -name py.typed)

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpp test-paths test-sanitize bench lint wheel develop clean

help:
	@echo 'make demo            fine-tune MiniLM plain and encrypted, with the server in its own process'
	@echo 'make test            install into .venv, run the C++ and the Python tests'
	@echo 'make test-paths      run the tests on the code paths of other processors: PATHS="sse jitter isa-portable"'
	@echo 'make test-sanitize   run the C++ tests under the address and undefined-behaviour sanitizers'
	@echo 'make bench           measure, print tables, write JSON and plots into out/'
	@echo 'make lint            formatters, linters and the type checker'
	@echo 'make wheel           build the wheel into dist/'
	@echo 'make develop         build the extension module into python/privtuner'
	@echo 'make clean           remove everything the targets made'

demo: $(VENV)/installed
	mkdir -p out/demo
	$(BIN)/privtuner demo --out out/demo

test: test-cpp
	$(BIN)/python -m pytest

test-cpp: $(VENV)/installed
	$(call configure,build/test,-DPRIVTUNER_BUILD_PYTHON=OFF -DPRIVTUNER_BUILD_TESTS=ON -DPRIVTUNER_WERROR=$(WERROR))
	$(BIN)/cmake --build build/test
	$(BIN)/ctest --test-dir build/test --output-on-failure --no-tests=error

test-paths: test-cpp
	$(BIN)/python tests/paths.py $(PATHS) --ctest build/test --tests "$(TESTS)"

test-sanitize: $(VENV)/tools
	$(call configure,build/sanitize,-DPRIVTUNER_BUILD_PYTHON=OFF -DPRIVTUNER_BUILD_TESTS=ON -DPRIVTUNER_SANITIZE=ON)
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error

bench: $(VENV)/installed
	mkdir -p out
	$(BIN)/python benchmarks/linear.py --json out/linear.json --plot out/linear.png
	$(BIN)/python benchmarks/training.py --json out/training.json --plot out/training.png
	$(BIN)/python benchmarks/ckks.py --json out/ckks.json --plot out/ckks.png
	$(BIN)/python benchmarks/engines.py --json out/engines.json --plot out/engines.png
	$(BIN)/python benchmarks/activation.py --json out/activation.json
	$(BIN)/python benchmarks/wireless.py --json out/wireless.json

lint: $(VENV)/installed
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

wheel: $(VENV)/tools
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

develop: $(VENV)/installed
	$(call configure,build/develop,-DPRIVTUNER_IN_TREE=ON -DPRIVTUNER_BUILD_TESTS=ON)
	$(BIN)/cmake --build build/develop

clean:
	rm -rf build dist out $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f python/privtuner/_core*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

configure = $(BIN)/cmake -S . -B $(1) -G Ninja -DPython_EXECUTABLE=$(BIN)/python \
	-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) $(2)

# The stamps keep an unchanged tree from being installed again.
$(VENV)/tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'privtuner needs Python 3.10 or newer: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'No virtual environment could be made: install the venv module of $(PYTHON)' \
	         '(Debian, Ubuntu: apt-get install python3-venv python3-dev g++)'; exit 1; }
	$(PIP) install --quiet -c constraints.txt scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/installed: $(VENV)/tools $(BUILD_FILES) $(SOURCES)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation '.[test,bench,lint]'
	@touch $@
