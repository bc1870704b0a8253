# Every target does its own set-up in .venv; nothing but Python 3.11 (or newer), pip and make is needed beforehand.
#
#   make demo       install, fetch a model and a data set, compare two methods, write demo-run/report.html
#   make test       the tests that take seconds        make test-all   the slow ones too
#   make lint       format, lint, types, import layers make docs       the documentation, into site/
#   make bench      the benchmarks                     make clean      remove everything that make made
#
# Variables: PYTHON       the interpreter that makes .venv            (PYTHON=python3.12)
#            PIP_ARGS     added to every pip install                  (PIP_ARGS="--extra-index-url ...")
#            PYTEST_ARGS  added to pytest                             (PYTEST_ARGS="-k lora")

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
# Byte code is written when a module is first imported (so it must be allowed to be): half a minute less to install.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
FETCH := $(BIN)/airtune fetch minilm reuters-r8

.PHONY: demo test test-all lint docs bench constraints clean
.NOTPARALLEL:

demo: .venv/demo.stamp
	$(FETCH)
	rm -rf demo-run
	$(BIN)/airtune compare experiments/quickstart/quickstart.toml --methods legend,fedit --seeds 0 --stop.rounds 6 --out demo-run
	@echo "The report: demo-run/report.html (open it in a browser)"

test: .venv/test.stamp
	$(FETCH) rotten-tomatoes
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-all: .venv/all.stamp
	$(FETCH) rotten-tomatoes
	$(BIN)/python -m pytest -n 2 -m "slow or not slow" $(PYTEST_ARGS)

# No question to the network whether there is a newer pyright.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

docs: .venv/dev.stamp
	$(BIN)/mkdocs build --quiet --strict --site-dir site

bench: .venv/bench.stamp
	$(FETCH) rotten-tomatoes
	for script in $(filter-out benchmarks/target_table.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# ------------------------------------------------------------------------------------------------ set-up
# A stamp is older than pyproject.toml or constraints.txt only when there is something to install.

.venv/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("airtune needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

# torch alone and first, so that nothing else decides which build of it is taken.
.venv/torch.stamp: .venv/venv.stamp constraints.txt
	$(PIP) torch
	@touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) -e '.[plots]'
	@touch $@

.venv/test.stamp: .venv/demo.stamp
	$(PIP) -e '.[plots,flower,test]'
	@touch $@

# With the extras that src imports, so that pyright sees them.
.venv/dev.stamp: .venv/test.stamp
	$(PIP) -e '.[plots,flower,ray,privacy,test,gguf,dev]'
	@touch $@

# What some slow tests compare with, or run on.
.venv/all.stamp: .venv/test.stamp
	$(PIP) -e '.[plots,flower,ray,privacy,sionna,test]'
	@touch $@

.venv/bench.stamp: .venv/test.stamp
	$(PIP) -e '.[plots,test,sionna]'
	@touch $@

# All extras in one environment, as resolved today. Look at the difference before you commit it.
constraints:
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet $(PIP_ARGS) torch==2.13.0
	.venv-constraints/bin/python -m pip install --quiet $(PIP_ARGS) '.[plots,flower,ray,sionna,gguf,privacy,test,dev]'
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  .venv-constraints/bin/python -m pip freeze --exclude airtune | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf .venv .venv-constraints site demo-run build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
