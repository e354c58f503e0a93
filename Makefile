.PHONY: test demo bench clean

# A fresh virtual environment, made anew whenever a requirements file changes
.venv/made: requirements.txt requirements-dev.txt
	rm -rf .venv
	python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

test: .venv/made
	.venv/bin/python -m pytest -q tests

demo: .venv/made
	PATH="$(CURDIR)/.venv/bin:$$PATH" examples/arithmetic/demo.sh runs/demo

bench: .venv/made
	.venv/bin/pip install --quiet -r bench/requirements.txt
	.venv/bin/python bench/run.py

clean:
	rm -rf .venv runs
