# Everything here needs Python 3.11 or newer and make; the first call installs into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# Versions of NVIDIA's AutoML packages that drive the skill folder. Each goes into a folder of its own, without what it
# depends on: the environment has that already, except for pandas.
NVIDIA := 7.0.0 7.0.1 7.1.0 7.2.0

.PHONY: help quickstart test test-slow test-faults test-nvidia test-browser bench lint clean
help:
	@echo 'make quickstart    install, and see in minutes that pretraining helps'
	@echo 'make test          install, check style, types and layers, run the tests'
	@echo 'make test-slow     three seeds of the quickstart, and every command of README'
	@echo 'make test-faults   kill processes, fill disks, stop stores'
	@echo 'make test-nvidia   drive the skill folder with the AutoML packages of NVIDIA'
	@echo 'make test-browser  open a report in headless Chromium'
	@echo 'make bench         measure speed on this machine, into results/bench'
	@echo 'make lint          style, types and layers alone'
	@echo 'make clean         remove .venv and what tools left behind'

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

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

test-faults: .venv/dev.stamp
	$(BIN)/python -m pytest -m faults tests/faults

.venv/nvidia.stamp: Makefile constraints.txt | .venv/dev.stamp
	rm -rf .venv/nvidia
	$(PIP) --no-deps --target .venv/nvidia/shared pandas
	for version in $(NVIDIA); do \
		$(PIP) --no-deps --target .venv/nvidia/$$version nvidia-tao-automl==$$version nvidia-tao-sdk==$$version || exit 1; \
	done
	@touch $@

test-nvidia: .venv/nvidia.stamp
	$(BIN)/python -m pytest -m nvidia tests/nvidia -n auto

test-browser: .venv/dev.stamp
	$(BIN)/python -m pytest -m browser

bench: .venv/dev.stamp
	$(BIN)/python -m bench all

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
