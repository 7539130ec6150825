# Every target builds the environment that it needs: `make demo` works in a fresh checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPERATOR_TESTS := $(wildcard $(patsubst %,tests/ops/test_%.py,clipping optim norm_ops interpolate kernel_operators))
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*.cu)

# A thread that waits by spinning for long takes the core from the thread that it waits for, where the machine is shared;
# one that sleeps at once wakes up 60 microseconds late for every operator.
export GOMP_SPINCOUNT ?= 20000

.PHONY: help demo docs test test-slow test-oldest oldest-headers check bench bench-kernels report kernel-check wheel-test cuda-compile gpu sanitize clean
.DELETE_ON_ERROR:

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# The environment, then the package in it, so that an edit of csrc/ rebuilds only the extension.
$(VENV)/environment: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools wheel ninja
	touch $@

$(VENV)/package: $(VENV)/environment setup.py $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,data,tables,bench,dev]'
	touch $@

DEMO := --data mnist5k --method wgan-gp --model mnist-dcgan --width 32 --learning-rate 5e-4 --steps 1200 \
	--sample-every 200 --checkpoint-every 200 --track 100 --out runs/demo

demo: $(VENV)/package  ## Train on 5,000 MNIST digits for a few minutes, draw and rate samples
	$(BIN)/wgan-fast train $(if $(wildcard runs/demo/config.json),--resume runs/demo,$(DEMO))
	$(BIN)/wgan-fast sample runs/demo --grid 12x12 --scores
	$(BIN)/wgan-fast evaluate runs/demo

# The frameworks of two examples: the demo does without.
$(VENV)/integrations: $(VENV)/package
	$(BIN)/pip install --quiet -c constraints.txt accelerate lightning
	touch $@

# Files run on all cores; benchmarks, which look at the clock, and examples, which use all of them, one after another.
TOGETHER := tests/ops tests/four_pass tests/engine tests/face tests/tables tests/training

test: $(VENV)/integrations  ## The tests that take seconds each
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist loadfile $(TOGETHER)
	$(BIN)/python -m pytest -m 'not slow' $(addprefix --ignore=,$(TOGETHER))

# Material says at every start that MkDocs 2 will be another program: hence mkdocs<2.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/docs  ## This documentation as a site, in build/site
	$(BIN)/mkdocs build --quiet --strict

$(VENV)/docs: $(VENV)/package
	$(BIN)/pip install --quiet -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	touch $@

test-slow: $(VENV)/package  ## The exhaustive tests
	$(BIN)/python -m pytest -m slow

# The oldest versions that pyproject.toml allows. Torch 2.11 brings 5 GB of CUDA libraries, without which it does not import.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/ops tests/four_pass tests/engine tests/face \
	$(patsubst %,tests/training/test_%.py,checkpoint training resume speed_options)

$(OLDEST)/environment: constraints.txt constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	grep -Ev '^(numpy|setuptools|torch|triton)=' constraints.txt | cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet -c $(OLDEST)/constraints.txt torch triton setuptools wheel ninja
	touch $@

$(OLDEST)/package: $(OLDEST)/environment setup.py $(SOURCES) $(shell find wgan_fast kernels -name '*.py')
	TORCH_CUDA_ARCH_LIST=9.0 WGAN_FAST_REQUIRE_EXT=1 $(OLDEST)/bin/pip install --quiet -c $(OLDEST)/constraints.txt \
		--no-build-isolation '.[train,data,bench,dev]'
	touch $@

test-oldest: $(OLDEST)/package  ## Operators, engine and training on the oldest supported torch and Triton
	PYTHONSAFEPATH=1 $(OLDEST)/bin/python -m pytest -m 'not slow' $(OLDEST_TESTS)

# The headers alone: to import that torch takes its CUDA libraries.
OLDEST_TORCH := build/oldest/torch/include
OLDEST_ABI := $(shell sed -n 's/.*"WGAN_FAST_TORCH_ABI", "\(.*\)".*/\1/p' setup.py)

$(OLDEST_TORCH)/torch/headeronly/version.h: constraints-oldest.txt $(VENV)/environment
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/oldest -c constraints-oldest.txt torch
	touch $@

oldest-headers: $(OLDEST_TORCH)/torch/headeronly/version.h  ## csrc/ against the headers of the oldest supported torch
	for source in csrc/*.cpp; do \
		$(CXX) -std=c++20 -fsyntax-only -DWGAN_FAST_TORCH_ABI=$(OLDEST_ABI) -DWGAN_FAST_FLAGS='""' \
			-I$(OLDEST_TORCH) -I$(OLDEST_TORCH)/torch/csrc/api/include \
			$$($(BIN)/python -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))') $$source || exit 1; \
	done

check: $(VENV)/package  ## Lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

# JAX is a competitor, not a dependency.
$(VENV)/jax: $(VENV)/package
	$(BIN)/pip install --quiet -c constraints.txt jax
	touch $@

BENCH := $(BIN)/wgan-fast bench --device cpu --out benchmarks/results
LARGE := naive naive-compiled jax no-penalty drop-in ours ours-compiled limit naive-bf16 ours-bf16 limit-bf16

bench: $(VENV)/jax  ## The critic step against the alternatives, on this CPU; goes on where it was stopped
	$(BENCH) --models toy-mlp tabular-mlp phase-space amp dcgan-28 --seconds 8
	$(BENCH) --models resnet-32 language dcgan-64 --variants $(LARGE) --seconds 5
	$(BENCH) --models toy-mlp --batch-sizes 16 512 --variants naive jax ours limit --seconds 4
	$(BENCH) --models amp --batch-sizes 4096 --variants naive jax ours limit --seconds 4
	$(BENCH) --models amp --batch-sizes 128 4096 --penalties r1 --variants naive jax ours limit --seconds 4
	$(BENCH) --models stargan-64x64 stargan-64x128 stylegan2-64x64 --variants naive jax ours limit --seconds 4
	$(BENCH) --models toy-mlp dcgan-28 --penalties r1-r2 none --variants naive no-penalty drop-in ours limit --seconds 4
	$(BENCH) --models dcgan-28 --batch-sizes 16 512 --variants naive ours limit --seconds 4
	$(BENCH) --scaling --seconds 2
	$(BIN)/python benchmarks/forms.py --out benchmarks/results/forms
	$(MAKE) report

bench-kernels: $(VENV)/package  ## Each kernel against the alternatives, and the step against the committed results
	$(BIN)/python -m pytest benchmarks

report: $(VENV)/package  ## The tables of README.md and docs/ from the committed results
	$(BIN)/python -m wgan_fast.bench.report README.md benchmarks/results
	$(BIN)/python -m wgan_fast.bench.scaling docs/scaling.md benchmarks/results/scaling
	$(BIN)/python benchmarks/gpu/report.py docs/gpu.md benchmarks/results/gpu
	$(BIN)/python benchmarks/gpu/cost.py docs/gpu_cost.md benchmarks/results/gpu
	$(BIN)/python benchmarks/forms.py --out benchmarks/results/forms --report docs/forms.md
	$(BIN)/python benchmarks/tables.py --out benchmarks/results/tables --report docs/tables.md

kernel-check: $(VENV)/package  ## The Triton kernels for every architecture against their baselines; needs no GPU
	$(BIN)/python tests/kernel_resources.py

# Into the environment of PYTHON, which has the torch of that machine: no network, and only its GPU's architecture.
gpu: OUT ?= runs/gpu
gpu:  ## On a machine with a GPU: is it right, the critic step, whole iterations, bandwidths; PARTS and OUT choose
	mkdir -p $(OUT)
	TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c 'import torch; torch.cuda.is_available() and print("%d.%d" % torch.cuda.get_device_capability())') \
		WGAN_FAST_REQUIRE_EXT=1 $(PYTHON) -m pip install --no-build-isolation --no-deps -e . > $(OUT)/build.log || (cat $(OUT)/build.log; false)
	$(PYTHON) benchmarks/gpu $(PARTS) --out $(OUT) $(addprefix --commit=,$(COMMIT))

wheel-test: $(VENV)/package  ## Wheels with and without the extension, each used outside the checkout
	$(BIN)/python tests/check_wheel.py

cuda-compile: $(VENV)/package  ## The CUDA sources for every default architecture; needs nvcc, no GPU
	$(BIN)/python setup.py --quiet cuda_compile

# A build apart, so that nothing else loads it. The check for leaks would report Python's own; a report must pass
# pytest's capture, because the process ends with it.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED := build/sanitize

sanitize: $(VENV)/package  ## The compiled operators' tests on a CPU under AddressSanitizer and UBSan
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" WGAN_FAST_REQUIRE_EXT=1 \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$(SANITIZED)/lib \
		$(BIN)/python -P -m pytest --capture=sys -m 'not slow' -k 'not compile' $(OPERATOR_TESTS)

clean:  ## Remove everything that the targets made, except runs/
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info wgan_fast/_C.*.so wgan_fast/_build.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
