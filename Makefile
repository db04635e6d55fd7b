# One front door. `make demo` and `make test` do all the set-up they need.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
RUN    := $(VENV)/bin/sparsetrain

.PHONY: help setup assets demo test test-fast test-gpu check bench bench-gpu docs clean

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

demo: assets ## fine-tune SmolLM2-135M with SPT + LoRA beside dense LoRA, and write a report
	rm -rf runs/demo
	$(RUN) finetune --recipe examples/demo.yaml --output runs/demo

test: assets ## all tests that run without a GPU
	$(PY) -m pytest -n auto -m "not gpu and not slow"

test-slow: assets ## the slow tests
	$(PY) -m pytest -n auto -m "slow and not gpu"

test-gpu: setup ## the tests that need a GPU
	$(PY) -m pytest -m gpu

check: setup ## format, lint, types, import rules, tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports
	$(MAKE) test

bench: assets ## measure the committed cases on this machine and rewrite the tables of the docs
	$(PY) bench/ops/attention.py --json bench/results
	$(PY) bench/ops/selected_attention.py --json bench/results
	$(PY) bench/ops/flood_fill.py --json bench/results
	$(PY) bench/ops/routed_ffn.py --json bench/results
	$(PY) bench/ops/sparse24.py --json bench/results
	for task in pixels listops; do $(PY) bench/methods/flood_fill_attention/accuracy.py --task $$task --json bench/results/flood_fill_accuracy_$$task.json || exit 1; done
	for task in sft classify; do $(PY) bench/methods/token_selection/quality.py --task $$task --json bench/results/token_selection_quality_$$task.json || exit 1; done
	$(PY) bench/methods/token_selection/bias.py --json bench/results
	for task in gpt vit; do $(PY) bench/methods/semi_structured/quality.py --task $$task --json bench/results/semi_structured_quality_$$task.json || exit 1; done
	$(PY) bench/methods/token_selection/step.py --json bench/results
	$(PY) bench/methods/routed_ffn/frontier.py --json bench/results
	$(PY) bench/planner/accuracy.py --json bench/results/planner_accuracy.json
	$(PY) bench/planner/step_time.py --json bench/results
	$(RUN) bench --model smollm2-135m --seq-len 1024 --quick --output runs/bench
	cp runs/bench/bench.json bench/results/steps.json
	$(PY) bench/report.py

bench-gpu: setup ## on a GPU: its tests, and the planner's predictions against the CUDA allocator
	$(PY) -m pytest -m gpu
	$(PY) bench/planner/accuracy_gpu.py --json bench/results/planner_accuracy_gpu.json
	$(PY) bench/report.py

docs: setup ## rewrite the docs' tables from the result files
	$(PY) bench/report.py

clean: ## remove the environment and runs
	rm -rf $(VENV) runs
