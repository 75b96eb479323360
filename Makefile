# Everything runs in .venv, which is made on first use and brought up to date whenever one of INPUTS
# changes. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/nearfold/kernels/cpp/*)

# CORE, DEV and DOCS are stamps: removed before an installation, written after it. A .venv made here (OURS)
# without CORE was left by an installation cut short, which pip may take for a whole one, so it is
# made anew. A .venv made by somebody else is only ever added to.
OURS := $(VENV)/.nearfold-made
CORE := $(VENV)/.nearfold-core
DEV := $(VENV)/.nearfold-dev
DOCS := $(VENV)/.nearfold-docs

.PHONY: help demo test slow thorough lint format bench docs docs-serve explorer clean
.NOTPARALLEL: # two installations into one .venv would collide
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(CORE) ## the main job on the embedded data: nearfold study spectrum
	$(BIN)/nearfold study spectrum

# A test that hangs fails after ten minutes and says where; one that no signal reaches ends its process after fifteen.
LIMITS := --timeout 600 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(LIMITS)

test: $(DEV) ## the quick tests and the doctests, in two processes of one thread each
	$(PYTEST) -m "not slow"

slow: $(DEV) ## the tests marked slow: kills, torchrun, Ray, Triton's interpreter, sanitizers
	$(PYTEST) -m "slow and not thorough"

thorough: $(DEV) ## what `make slow` leaves out: the other cells of slow tests of many cells; before a release
	$(PYTEST) -m thorough

lint: $(DEV) ## formatting, lint rules and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV) ## rewrite the sources into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS) ## the documentation's site in site/; a broken link or a missing docstring is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m docsite build

docs-serve: $(DOCS) ## the same on http://localhost:8000, anew whenever a page changes
	OMP_NUM_THREADS=1 $(BIN)/python -m docsite serve

bench: $(CORE) ## time and memory against the usual formulations and libraries; a few idle minutes
	$(BIN)/python -m benchmarks

ORT := 1.30.0
explorer: $(CORE) ## the page of `nearfold explore` with ONNX Runtime Web of npm beside it, in build/explorer
	mkdir -p build/onnxruntime-web
	cd build/onnxruntime-web && npm pack --silent onnxruntime-web@$(ORT) && tar xzf onnxruntime-web-$(ORT).tgz
	$(BIN)/nearfold explore --runtime build/onnxruntime-web --out build/explorer

clean: ## remove caches and build products; keep .venv and runs
	rm -rf build dist site *.egg-info src/nearfold/kernels/_engine*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./.git -o -path ./runs \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +

$(CORE): EXTRAS :=
$(DEV): EXTRAS := [dev]
$(DOCS): EXTRAS := [docs]
$(CORE) $(DEV) $(DOCS): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "nearfold needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one, as in: make PYTHON=python3.12 test" >&2; exit 1; }
	@if [ -e $(OURS) ] && [ ! -e $(CORE) ]; then \
		echo "$(VENV) was left by an unfinished installation; starting over."; rm -rf $(VENV); fi
	@[ -x $(BIN)/python ] || { mkdir -p $(VENV) && touch $(OURS) && $(PYTHON) -m venv $(VENV); }
	@rm -f $(CORE) $@
	$(PIP_INSTALL) -e ".$(EXTRAS)"
	@find $(VENV)/lib/ -path '*/nearfold/kernels/_engine.*' | grep -q . || { \
		echo "The compiled engine was not built; nearfold runs on PyTorch alone. To see what failed:"; \
		echo "    $(PIP_INSTALL) -v -e ."; }
	@touch $(CORE) $@
