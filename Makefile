# The commands of this project, for a machine with Python 3.11, make and no GPU:
#   make serve      talk to a trained YOCO-U model through vLLM's OpenAI server
#   make check      lint, format, types, links, and the tests that start no engine
#   make test       prove that it is right: every test that a promise of the README rests on
#   make test-all   the remaining tests as well
#   make bench      measure the README's tables
#   make gpu        ask a GPU everything in eight minutes, with a PYTHON that has vLLM; make gpu-all asks more
# For its developers: make format, make constraints, make supported. VLLM=0.33 runs any of them with that vLLM.

PYTHON ?= python3.11
CONSTRAINTS ?= packaging/cpu/constraints.txt
# What vLLM's CPU build requires, and where it is for a pip that does not find it: PyTorch's own index.
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Other versions than that of the CPU build run over its environment, in one of their own.
OF_CPU_BUILD := 0.32
VLLM := $(OF_CPU_BUILD)
ENVIRONMENT := .venv$(addprefix -,$(filter-out $(OF_CPU_BUILD),$(VLLM)))
BIN := $(ENVIRONMENT)/bin
SERVING := $(ENVIRONMENT)/serving
TESTING := $(ENVIRONMENT)/testing
PYTEST := $(BIN)/python -m pytest
# In the order of tests/harness/tiers.py, not by the number of tests in a group.
TWO_WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder

# vLLM compiles small functions on first use, for which torch needs a C++ compiler; without one they run as they are.
ifeq ($(shell command -v g++),)
export TORCHDYNAMO_DISABLE := 1
endif

.PHONY: serve check lint unit supported test test-all bench gpu gpu-all format constraints
serve: $(SERVING)
	$(BIN)/python examples/inference/serve.py $(ARGS)

# The types take one core and less time than the tests, whose two workers share what is left.
check: $(TESTING)
	$(MAKE) --jobs 2 lint unit

lint: $(TESTING)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

unit: $(TESTING)
	$(PYTEST) -m "not engine and not slow" $(TWO_WORKERS) $(ARGS)

# In CI, of every supported vLLM but the first: the tests that start no engine, and an exactness test of each runner.
supported: $(TESTING)
	$(PYTEST) -m "runner or newer or not (engine or slow)" $(TWO_WORKERS) $(ARGS)

# A process interprets Triton or runs engines, never both. The second part runs also when the first has failed.
test: $(TESTING)
	status=0; \
	$(PYTEST) -m "not slow" $(TWO_WORKERS) $(ARGS) || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" $(TWO_WORKERS) tests/kernels || status=1; \
	exit $$status

test-all: $(TESTING)
	status=0; \
	$(PYTEST) $(TWO_WORKERS) $(ARGS) || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) $(TWO_WORKERS) tests/kernels || status=1; \
	exit $$status

bench: $(TESTING)
	$(BIN)/python -m benchmarks $(ARGS)

# In an environment of the user's, in which nothing is installed: make gpu PYTHON=python3 ARGS="--results results"
gpu gpu-all:
	PYTHONPATH="$(CURDIR)/tests:$(CURDIR):$$PYTHONPATH" $(PYTHON) -m gpu $(if $(filter gpu-all,$@),--all) $(ARGS)

format: $(TESTING)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

constraints: $(TESTING)
	.venv/bin/pip freeze --exclude-editable --exclude vllm > packaging/cpu/constraints.txt

# ./packaging/cpu gives vLLM's CPU build the name that vLLM and lm-eval look for. The three packages that are removed
# come as CUDA builds next to a CPU torch, which breaks `import vllm`; no text model needs them.
define install
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --no-deps '$(TORCH)' 2>/dev/null \
		|| .venv/bin/pip install --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'
	.venv/bin/pip install --constraint $(CONSTRAINTS) ./packaging/cpu --editable '.[$(EXTRAS)]'
	.venv/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch $(INSTALLED)
endef

DECLARED := pyproject.toml setup.py packaging/cpu/pyproject.toml $(CONSTRAINTS)

.venv/serving: EXTRAS := cpu
.venv/serving: INSTALLED := .venv/serving
.venv/serving: $(DECLARED)
	$(install)

.venv/testing: EXTRAS := cpu,dev
.venv/testing: INSTALLED := .venv/serving .venv/testing
.venv/testing: $(DECLARED)
	$(install)

.venv-%/serving .venv-%/testing: .venv/testing packaging/cpu/overlay.py
	.venv/bin/python packaging/cpu/overlay.py $* .venv-$*
	touch .venv-$*/serving .venv-$*/testing
