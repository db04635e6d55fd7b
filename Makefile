# One front door. `make demo` and `make test` do all the set-up they need.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
RUN    := $(VENV)/bin/sparsetrain

.PHONY: help setup assets demo demo-spt test test-slow torture test-gpu check bench bench-gpu docs docs-site docs-serve dist clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trl]'
	@touch $@

setup: $(VENV)/.installed ## create the environment and install the package (once)

assets: setup ## fetch the embedded models and data sets into the cache (once)
	$(RUN) models fetch

demo: assets ## SmolLM2-135M learns to write docstrings, on selected tokens beside dense LoRA; and a report
	rm -rf runs/demo
	$(RUN) finetune --recipe examples/demo.yaml --output runs/demo

demo-spt: assets ## the same comparison with SPT's sparse attention and routed FFN, on Python source
	rm -rf runs/spt
	$(RUN) finetune --recipe examples/spt.yaml --output runs/spt

test: assets ## all tests that run without a GPU; says which ten took longest
	$(PY) -m pytest -n auto --dist worksteal --durations=10 -m "not gpu and not slow"

test-slow: assets ## the slow tests
	$(PY) -m pytest -n auto --dist worksteal -m "slow and not gpu"

torture: setup ## bad inputs, kills, full disks and doubled starts over every command; prints counts
	$(PY) -m tests.torture

test-gpu: setup ## the tests that need a GPU
	$(PY) -m pytest -m gpu

check: setup ## format, lint, types, import rules, and the tests, which also hold the docs to their result files
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports
	$(MAKE) test

RESULTS ?= runs/bench-results
bench: assets ## measure every benchmark on this machine into RESULTS; goes on where it stopped
	$(PY) -m bench run all --output $(RESULTS)

bench-gpu: setup ## on a GPU, in ten minutes: what is right, whole steps, ops, very long rows, tests, plans; QUICK=1 tries it at tiny sizes, on a CPU too
	$(PY) -m bench.gpu.parts $(if $(QUICK),--quick,--output $(RESULTS))

docs: setup ## rewrite the docs' tables, pages and picture from bench/results
	$(PY) -m bench docs

docs-site: setup ## build the site of docs/, the READMEs and the docstrings into build/site
	$(PY) -m mkdocs build --strict

docs-serve: setup ## the same at http://127.0.0.1:8000, again at every change
	$(PY) -m mkdocs serve

dist: setup ## wheel and source distribution into dist/, checked
	$(PY) -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist && $(PY) -m build && $(PY) -m twine check --strict dist/*

clean: ## remove the environment and runs
	rm -rf $(VENV) runs
