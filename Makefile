# Everything happens in .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check gpu smollm2 slow mutants product bench docs clean

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## train OPSD, fixed, learned and aligned exposure side by side; ends in runs/demo/report.html
	$(BIN)/atesd compare recipes/pico.toml --arms full,half,learned,aligned --seeds 2 --out runs/demo

test: $(STAMP)  ## unit, invariant and smoke tests
	$(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile -m 'not slow and not gpu'

check: $(STAMP)  ## format, lint, types, import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py tests/test_public.py

gpu: $(STAMP)  ## ten minutes on a machine with one CUDA GPU: parity, memory, waiting, resume (docs/gpu.md)
	$(BIN)/pytest -m gpu -rs tests/gpu tests/unit/losses/test_divergence.py

smollm2: $(STAMP)  ## a minute or two: SmolLM2-135M-Instruct into the user's cache, without a compiler
	$(BIN)/atesd fetch smollm2

slow: smollm2  ## minutes: the real model; then the mutation score
	$(BIN)/pytest -m slow tests/slow
	$(MAKE) mutants

mutants: $(STAMP)  ## most of an hour: the mutation score of the core, into tests/mutation/results.json
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,mutants]'
	$(BIN)/python tests/mutation/run.py

product: $(STAMP)  ## an hour: every sensible combination of all controls, two steps each
	$(BIN)/pytest -m slow tests/invariants/test_composition.py

BENCH := .venv-bench

bench: ## some 15 minutes: speed and memory beside TRL, into bench/results; an environment of its own
	test -d $(BENCH) || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet -c constraints.txt -e '.[dev,bench,smollm2]'
	$(BENCH)/bin/atesd fetch smollm2
	$(BENCH)/bin/python -m bench.run $(BENCH_ARGS)

docs: $(STAMP)  ## rewrite docs/config.md from the models
	$(BIN)/python docs/make_config.py

clean:
	rm -rf $(VENV) $(BENCH) build mutants runs src/*.egg-info
