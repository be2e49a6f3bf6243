# Everything a newcomer needs: `make demo` and `make test`. Both create .venv and install what they use.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all bench fpga-pnr lint format examples lock clean

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(STAMP)  ## create .venv with the locked versions

$(STAMP): pyproject.toml locks/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "NetLathe needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || sh scripts/install-system-packages.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r locks/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: $(STAMP)   ## compile the MiniLM sentence encoder for ONNX and TVM and compare both with the original
	$(BIN)/python examples/minilm.py --output out/minilm

test: $(STAMP)   ## run the test suite (minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(STAMP)   ## run the tests with the long sweeps: all models, all node tests, all mutants
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The others want a model, a GPU or the peers: see the first lines of each.
bench: $(STAMP)  ## run the benchmarks that need nothing else; each prints its table and its bar
	@set -e; for name in parity verification memory mutants axes tvm; do \
	  echo "== $$name"; $(BIN)/python benchmarks/bench_$$name.py; done

examples: $(STAMP)   ## run every example, and test the example plug-in as installed
	@set -e; for file in examples/*.py; do echo "== $$file"; $(BIN)/python $$file; done
	@echo "== examples/plugin"; sh scripts/test-plugin.sh $(BIN)/python

fpga-pnr: $(STAMP)  ## synthesize, place and route the FPGA core: resources and clock (ten minutes)
	sh scripts/fpga-pnr.sh $(abspath $(BIN))/python out/fpga

lint: $(STAMP)   ## ruff, mypy --strict and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:            ## resolve the lock file anew, in a throw-away environment
	sh scripts/lock.sh

clean:           ## remove what the other targets made
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
