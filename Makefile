# Which interpreter makes the virtual environment: make PYTHON=python3.12 test
PYTHON ?= python3
# Arguments for the example programs: make demo ARGS="--help"
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: .venv demo test mutants lint bench docs pictures

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

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

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
