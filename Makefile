# Everything here needs Python 3.11 or newer and make; the first call installs into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# Versions of NVIDIA's AutoML packages that run the skill folder. Each is installed into a separate folder, without its
# dependencies: the environment has these already, except for pandas.
NVIDIA := 7.0.0 7.0.1 7.1.0 7.2.0

.PHONY: help quickstart check test test-all test-slow test-faults test-nvidia test-browser bench docs lint clean
help:
	@echo 'make quickstart    install OpenMAE and run its demo'
	@echo 'make check         lint, types and fast tests: about a minute once installed'
	@echo 'make test          also tests that start processes or train a model: minutes'
	@echo 'make test-all      all tests; CI runs this'
	@echo 'make test-slow     the quickstart on three seeds, the commands of README and docs'
	@echo 'make test-faults   kill processes, fill disks, stop object stores'
	@echo "make test-nvidia   run the skill folder with NVIDIA's AutoML packages"
	@echo 'make test-browser  open a report in headless Chromium'
	@echo 'make bench         measure speed on this machine, into results/bench'
	@echo 'make docs          write docs/configuration.md'
	@echo 'make lint          style, types and import rules only'
	@echo 'make clean         remove .venv and caches'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "OpenMAE needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/user.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing OpenMAE into .venv (a few minutes the first time) ...'
	$(PIP) -e '.[all]'
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing OpenMAE and its development tools into .venv (a few minutes the first time) ...'
	$(PIP) -e '.[dev]'
	@touch $@ .venv/user.stamp

quickstart: .venv/user.stamp
	$(BIN)/mae quickstart

lint: .venv/dev.stamp
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

PYTEST := $(BIN)/python -m pytest --durations=25
PARALLEL := -n auto --dist loadgroup
DESELECTED := not slow and not browser and not faults and not nvidia

check: lint
	$(PYTEST) $(PARALLEL) -m '$(DESELECTED) and not integration'

test: lint
	$(PYTEST) $(PARALLEL)

test-all: test test-slow test-faults test-nvidia test-browser

test-slow: .venv/dev.stamp
	$(PYTEST) --timeout=3600 -m slow

test-faults: .venv/dev.stamp
	$(PYTEST) --timeout=3600 -m faults tests/faults

.venv/nvidia.stamp: Makefile constraints.txt | .venv/dev.stamp
	rm -rf .venv/nvidia
	$(PIP) --no-deps --target .venv/nvidia/shared pandas
	for version in $(NVIDIA); do \
		$(PIP) --no-deps --target .venv/nvidia/$$version nvidia-tao-automl==$$version nvidia-tao-sdk==$$version || exit 1; \
	done
	@touch $@

test-nvidia: .venv/nvidia.stamp
	$(PYTEST) --timeout=3600 -m nvidia tests/nvidia -n auto

test-browser: .venv/dev.stamp
	$(PYTEST) -m browser

bench: .venv/dev.stamp
	$(BIN)/python -m bench all

docs: .venv/dev.stamp
	$(BIN)/mae spec keys --markdown > docs/configuration.md

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
