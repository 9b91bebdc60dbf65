# `make demo` and `make test` are the README's two commands. Both make .venv on a fresh machine,
# install the package with what it needs, build the native extension, and run; a second call
# reuses all of it.

PYTHON ?= python3
NEULIG_FAST_BUILD ?= auto
export NEULIG_FAST_BUILD

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed-$(NEULIG_FAST_BUILD)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
# A GPU machine often has no network but a Python with torch: use that one.
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo $(PYTHON) || echo $(PY))

# Where pytest-xdist is installed, tests of a GPU machine share its many cores.
GPU_WORKERS ?= $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo -n 12 -p no:benchmark)

# Its arrow and pandas are large, and its merge methods need neither.
MERGEKIT := mergekit==0.1.5

HOSTS ?= peft mergekit fusion_bench sd_mecha

.PHONY: demo test check fmt build aot test-gpu test-sanitize test-hosts bench tables clean

# Waiting OpenMP threads sleep: where another program keeps a core busy, spinning ones stall it all.
demo: export OMP_WAIT_POLICY = passive
demo: $(INSTALLED)
	$(VENV)/bin/neulig-fast demo

test: $(INSTALLED)
	$(PY) -m pytest -n auto --dist worksteal

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/**')

fmt: $(INSTALLED)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/**')

build: $(INSTALLED)
	$(PY) setup.py build_ext --inplace

aot: $(INSTALLED)
	$(PY) tools/aot.py

test-gpu:
	$(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) -m pytest $(GPU_WORKERS) -k "cuda or kernels or triton" tests/test_house.py tests/test_kernels.py \
	    tests/test_blend.py tests/test_blend_storage.py tests/test_blend_weight_grad.py \
	    tests/test_blend_lists.py tests/test_blend_lists_weight_grad.py tests/test_blend_telemetry.py \
	    tests/test_offset_gram.py tests/test_expert_linear.py tests/test_expert_layer_norm.py \
	    tests/test_mixture_linear.py tests/test_mixture_layer_norm.py tests/test_neulig_kernels.py \
	    tests/test_cross_moments.py tests/test_magnitude_select.py tests/test_magnitude_histogram.py \
	    tests/test_gram.py tests/test_magnitude_sums.py tests/test_merge_task_vectors.py tests/test_encoders_replay.py \
	    tests/test_merge_cuda.py

test-sanitize: $(INSTALLED)
	PYTHON=$(PY) tools/sanitize.sh

# Other projects' own tests under nf.patch; needs the network.
test-hosts: $(INSTALLED)
	set -e; for host in $(HOSTS); do PYTHON=$(PY) tools/test_hosts.sh $$host; done

bench: $(INSTALLED)
	$(PY) -m neulig_fast.benchmarks

# Tables and figures of README and docs, from the committed rows.
tables: $(INSTALLED)
	$(PY) -m neulig_fast.benchmarks.tables

$(VENV)/torch-ready: constraints.txt tools/make_venv.py
	$(PYTHON) tools/make_venv.py $(VENV)
	touch $@

# One stamp per kind of build, so that another NEULIG_FAST_BUILD installs afresh.
$(INSTALLED): $(VENV)/torch-ready $(SOURCES)
	rm -f neulig_fast/_C*.so neulig_fast/_build_info.json $(VENV)/installed-*
	$(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	$(PY) -m pip install --quiet --no-deps $(MERGEKIT)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info neulig_fast/_C*.so neulig_fast/_build_info.json runs
