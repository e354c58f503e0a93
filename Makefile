.DEFAULT_GOAL := help
.PHONY: help test quick lint demo bench clean

# Tests run one per core, each with one thread; a file stays together, as its tests share what they prepare
PYTEST = .venv/bin/python -m pytest -n auto --dist loadfile

help:  ## these lines
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

quick: .venv/made  ## the fast tests, in less than a minute
	$(PYTEST) -q -m "not slow"

test: .venv/made  ## all tests, in some minutes; says how far it is, and which were the slowest
	$(PYTEST) -v --durations=10

lint: .venv/made  ## ruff, as pyproject.toml has it
	.venv/bin/ruff check

demo: .venv/made  ## the whole pipeline in the small world, from cases to tables and plots in runs/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" examples/arithmetic/demo.sh runs/demo

bench: .venv/made  ## against Transformers and TRL, on a quiet machine; see bench/README.md
	.venv/bin/pip install --quiet -r bench/requirements.txt
	.venv/bin/python bench/run.py

clean:  ## remove the virtual environment and all runs
	rm -rf .venv runs

# A fresh virtual environment, made anew whenever a requirements file changes
.venv/made: requirements.txt requirements-dev.txt
	rm -rf .venv
	python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@
