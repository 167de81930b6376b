# Every target first sets up .venv in this folder. Outside it, only caches are written (pip's, and ~/.cache/maml).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

BENCH = $(if $(DEVICE),--device $(DEVICE))
COMPARED = $(if $(PREVIOUS),--previous $(PREVIOUS))

# In a bundle (scripts/bundle.py), wheels/ has the packages, and pip looks nowhere else. If its constraints are not ours,
# packages were left out: they come from the Python that makes .venv.
CONSTRAINTS := $(firstword $(wildcard wheels/constraints.txt) constraints.txt)
SOURCE := The download of PyTorch is 0.2 GB for CPUs and about 3 GB with CUDA
ifneq ($(CONSTRAINTS),constraints.txt)
SOURCE := They come from wheels, without network
SITE := $(shell cmp -s constraints.txt $(CONSTRAINTS) || echo --system-site-packages)
$(VENV)/installed: export PIP_NO_INDEX := 1
$(VENV)/installed: export PIP_FIND_LINKS := wheels
# That Python may have plugins of pytest, which would change the tests.
test test-slow: export PYTEST_DISABLE_PLUGIN_AUTOLOAD := $(if $(SITE),1)
endif

.DEFAULT_GOAL := help
.PHONY: help setup bundle demo test test-slow check paper paper-tables paper-report paper-figures readme verify checkpoints claims bench docs

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed  ## create or update .venv from constraints.txt

# From pip's output, only the slow steps are shown (large downloads, the installation), and all errors.
$(VENV)/installed: SHELL := bash
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11 ...")'
	@test ! -e bundle.json || $(PYTHON) -c 'import json, sys; wanted = json.load(open("bundle.json"))["python"]; \
		sys.exit("%d.%d" % sys.version_info[:2] != wanted and f"wheels/ is for Python {wanted}; make PYTHON=python{wanted} ...")'
	@test ! -e bundle.json || $(PYTHON) -c 'import importlib.metadata, json, sys; \
		here = {found.name.lower().replace("_", "-") for found in importlib.metadata.distributions()}; \
		lacking = [name for name in json.load(open("bundle.json"))["without"] if name.lower().replace("_", "-") not in here]; \
		sys.exit(lacking and "this Python lacks " + ", ".join(lacking) + ", which the bundle leaves out; make PYTHON=... with one \
that has them, not in a virtual environment, or make the bundle without --without")'
	@echo "setup 1 of 2: $(VENV) with $$($(PYTHON) --version)"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(SITE) $(VENV)
	@echo "setup 2 of 2: PyTorch and the other packages of constraints.txt into $(VENV), once." \
		"$(SOURCE). This takes one to ten minutes"
	@set -o pipefail; $(RUN) -m pip install --disable-pip-version-check --progress-bar off \
			--constraint $(CONSTRAINTS) --editable '.[dev]' | while read -r line; do \
		case "$$line" in \
			*[0-9][0-9].[0-9]\ MB\)|*\ GB\)) echo "  $$line" ;; \
			"Installing collected packages"*) set -- $${line#*: }; echo "  Downloads are complete. Installing $$# packages, about a minute" ;; \
		esac; done
	@touch $@
	@echo "setup: done"

bundle: setup  ## pack code, wheels and unfinished runs for a machine without network; ARGS='--python 3.12 --without torch,torchvision'
	$(RUN) scripts/bundle.py $(ARGS)

demo: setup  ## meta-train the sinusoid experiment with the full budget and compare it with the paper (minutes)
	$(RUN) scripts/demo.py

# In two processes, each with whole files of tests; pytest without -n runs them in one.
test: setup  ## run the tests
	$(RUN) -m pytest -q -p xdist -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## run all tests, with the slow ones
	$(RUN) -m pytest -q -m 'slow or not slow'

check: setup  ## lint and type-check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

paper: setup  ## run the paper's missing runs, then render; PLAN=1 ONLY=table2,figure3 SMOKE=1 WANDB=1 JOBS=2 SEEDS=0,1 BUDGET=8m
	$(RUN) scripts/paper.py $(if $(PLAN),--plan) $(if $(SMOKE),--smoke) $(if $(WANDB),--wandb) \
		$(if $(ONLY),--only '$(ONLY)') $(if $(JOBS),--jobs $(JOBS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(BUDGET),--budget $(BUDGET))

paper-tables: setup  ## render the paper's tables from all runs
	$(RUN) scripts/paper_tables.py

paper-figures: setup  ## render the paper's figures from all runs
	$(RUN) scripts/paper_figures.py

paper-report: paper-figures  ## render one page with every number and its evidence, results/report.html
	$(RUN) scripts/report.py

readme: setup  ## write the results table of README.md from the committed runs (make test fails if it is out of date)
	$(RUN) scripts/readme.py

docs: setup  ## build the documentation, without network, into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "open site/index.html; for the search: $(RUN) -m http.server --directory site"

verify: setup  ## evaluate a committed checkpoint again: CELL=table2_multitask/MAML/K5_gradsteps_1, or all of them
	$(RUN) scripts/verify.py $(if $(CELL),'$(CELL)',--all)

checkpoints: setup  ## export the parameters of every number to results/checkpoints
	$(RUN) scripts/export_checkpoints.py

claims: setup  ## measure two claims of section 5.2: FOMAML's speed-up, the number of parameters
	$(RUN) scripts/claims.py

bench: setup  ## run all benchmarks (an hour or more on one CPU core) into results/benchmarks; DEVICE=cuda PREVIOUS=REVISION
	@echo "bench: 6 benchmarks, together an hour or more on one CPU core. Numbers are printed as they are measured, and" \
		"each table is written again after each of its parts, so it can be stopped at any time." \
		"Only the last one needs data (Omniglot)"
	$(RUN) scripts/bench_meta_gradient.py $(BENCH) $(COMPARED)
	$(RUN) scripts/bench_training.py $(BENCH) $(COMPARED)
	$(RUN) scripts/bench_scaling.py $(BENCH)
	$(RUN) scripts/bench_evaluation.py $(BENCH)
	$(RUN) scripts/bench_meta_rl.py
	$(RUN) scripts/bench_time_to_accuracy.py $(BENCH)
