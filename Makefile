# Two commands matter: `make demo` and `make test`. Each does all of its own set-up, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What both environments are made of. A new package folder needs a new editable install: the old one does not know it.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/lowbit/kernels/native/*) $(wildcard src/lowbit/*/__init__.py src/lowbit/*/*/__init__.py)
# The environment of the newest torch and of other libraries' models; 6 GB.
ZOO := .venv-zoo
# The environment of the native module under sanitizers.
ASAN := .venv-asan
# What `make test-wheel` tries, where it is on the machine.
PYTHONS ?= 3.11 3.12 3.13

# Several processes with a thread each; tests of threads set their number themselves.
SEVERAL := OMP_NUM_THREADS=1

.PHONY: demo demo-short test test-wheel test-zoo test-newest test-asan test-aarch64 test-avxvnni docs lint setup clean
demo: $(READY)  ## train ResNet-18 on Fashion-MNIST in fp32 and int8, time them beside bf16 and sbm8, print one table, write a page
	$(BIN)/python benchmarks/demo.py

demo-short: $(READY)  ## the same on fewer images, 1 to 2 minutes also on busy cores
	$(BIN)/python benchmarks/demo.py --short

test: $(READY)  ## the whole test suite, one process a core, 4 at most
	$(SEVERAL) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-wheel: $(READY)  ## the sdist and its wheels in fresh environments, on each of PYTHONS that is here; 6 GB for a moment
	$(BIN)/python tests/wheel/check.py --pythons "$(PYTHONS)"

test-zoo: $(ZOO)/.ready  ## models and trainers of other libraries on the newest torch; TABLE=FILE writes what came of each model
	HF_HUB_OFFLINE=1 $(ZOO)/bin/python -m pytest tests/zoo tests/integrations $(if $(TABLE),--zoo-table $(TABLE))

test-newest: $(ZOO)/.ready  ## the whole test suite on the newest torch
	$(SEVERAL) $(ZOO)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The sanitizers' libraries come first in the process, and the one that throws exceptions with them.
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(ASAN)/bin/python
test-asan: $(ASAN)/.ready  ## native tests and random layers under address and undefined-behaviour sanitizers
	$(SANITIZED) -m pytest tests/kernels/test_doorway.py tests/kernels/test_views.py tests/kernels/test_native.py tests/attention/test_attention_native.py -k 'not lack_of_memory'
	$(SANITIZED) tests/fuzz_layers.py --cases 1000

test-aarch64:  ## products of codes for AArch64, cross-compiled, under qemu (Debian: g++-aarch64-linux-gnu, qemu-user)
	tests/native/check.sh aarch64

test-avxvnni:  ## products of codes for AVX-VNNI, by the same instructions of AVX-512
	tests/native/check.sh avxvnni

# Offline, with warnings as errors. The pages and their code are checked by `make test` too.
docs: $(VENV)/.docs  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

lint: $(READY)  ## ruff, mypy and clang-format, as pre-commit runs them
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror src/lowbit/kernels/native/*

setup: $(READY)

# torch comes first and pinned, so that no other package's range picks a larger build of it.
$(READY): constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(ZOO)/.ready: constraints-zoo.txt $(SOURCES)
	test -x $(ZOO)/bin/python || $(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --constraint constraints-zoo.txt torch torchvision
	$(ZOO)/bin/python -m pip install --quiet --constraint constraints-zoo.txt --editable '.[dev,zoo]'
	touch $@

# The same packages, and a native module of its own; an install without a module succeeds, but there is nothing to test.
$(ASAN)/.ready: $(READY)
	@for library in libasan.so libubsan.so libstdc++.so.6; do test -f "$$($(CXX) -print-file-name=$$library)" || { \
		echo "test-asan: $(CXX) lacks $$library. Install g++ with its sanitizers (Debian, Ubuntu: apt-get install g++;" \
			"Fedora: dnf install gcc-c++ libasan libubsan), or name another one: make test-asan CXX=g++" >&2; exit 1; }; done
	$(BIN)/python -m venv $(ASAN)
	$(BIN)/python -c "import sys; print(*(p for p in sys.path if 'site-packages' in p), sep='\n')" \
		> "$$($(ASAN)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
	$(ASAN)/bin/python -m pip install --quiet --no-deps --editable . \
		--config-settings=cmake.define.LOWBIT_SANITIZE=ON --config-settings=build-dir=build/asan
	$(SANITIZED) -c "import lowbit.kernels._cpu" || { echo "test-asan: the native module was not built with $(CXX)" >&2; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) $(ZOO) $(ASAN) build site
