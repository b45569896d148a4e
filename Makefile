# Two targets do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
JOBS ?= 2

# The stamp is newer than pyproject.toml when the environment is up to date, so a second call starts at once.
$(VENV)/.installed: pyproject.toml
	@echo "Setting up $(VENV) (the first time this downloads about 4 GB of packages) ..."
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found; 3.11 to 3.13 is needed: call make PYTHON=python3.12")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip
	@$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

.PHONY: help install demo test lint format gpu-check docs-assets clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv and install the project into it

demo: $(VENV)/.installed ## run the main job: DICOMs to a submission and a report, all under demo/
	@$(PY) cli.py demo

test: $(VENV)/.installed ## run the tests in parallel
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadgroup

lint: $(VENV)/.installed ## ruff and pyright
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright

gpu-check: $(VENV)/.installed ## the gpu tests and the benchmarks on this machine's GPU; figures to benchmarks/results
	@$(PY) benchmarks/gpu_check.py

format: $(VENV)/.installed ## let ruff put the code in order
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

docs-assets: demo ## draw the README's pictures from the demo's output (needs Debian's chromium and chromium-driver)
	@$(PY) docs/assets.py demo

clean: ## remove what demo made and the caches (the environment stays)
	@rm -rf demo .pytest_cache .ruff_cache build *.egg-info
