# Everything here works on a fresh machine with python3 (3.10 or newer) and make: the first target that is run
# makes .venv and installs the pinned requirements.

PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
INSTALLED := .venv/.installed

.PHONY: help demo test slow bench lint clean

help:
	@echo "make demo   train a small bundled model on bundled preference pairs (CPU, offline, about a minute)"
	@echo "make test   lint and tests"
	@echo "make slow   the tests that take minutes each"
	@echo "make bench  speed and memory beside stock TRL (about half an hour; QUICK=1: two minutes)"
	@echo "make lint   ruff and mypy alone"
	@echo "make clean  remove .venv, runs/ and caches"

$(INSTALLED): requirements.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('Python 3.10 or newer is needed; this is %d.%d. Name another: make PYTHON=python3.12' % sys.version_info[:2])"
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing the requirements into .venv (once; some minutes)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -r requirements.txt
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/python examples/demo/run.py

test: lint
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

slow: $(INSTALLED)
	@$(BIN)/python -m pytest -m slow

bench: $(INSTALLED)
	@$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
