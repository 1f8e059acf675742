# The two commands of this project, for a machine with Python 3.11, make and no GPU:
#   make serve    talk to a trained YOCO-U model through vLLM's OpenAI server
#   make test     prove that it is right
# and make bench, which prints the README's tables.

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed

# vLLM compiles small functions on first use, for which torch needs a C++ compiler; without one they run as they are.
ifeq ($(shell command -v g++),)
export TORCHDYNAMO_DISABLE := 1
endif

.PHONY: serve test bench
serve: $(INSTALLED)
	$(BIN)/python examples/inference/serve.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(ARGS)

# ./packaging/cpu gives vLLM's CPU build the name that vLLM and lm-eval look for. The three packages that are removed
# come as CUDA builds beside a CPU torch, which breaks `import vllm`; no text model needs them.
$(INSTALLED): pyproject.toml setup.py packaging/cpu/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install ./packaging/cpu --editable '.[cpu,test]'
	$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@
