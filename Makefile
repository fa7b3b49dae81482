# Everything a person or CI runs. Each target does its own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REGISTRY ?= localhost
TAG ?=

# Threads that wait must sleep: spinning OpenMP pools of several processes stall each other on few cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup check format test test-long demo demo-down bench bench-refactor bench-full-size images

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Prism needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}" or 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module: install python3-venv, or name another interpreter: make PYTHON=..."; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## make .venv with everything pinned in constraints.txt

check: setup  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup  ## all tests this machine allows (builds a cluster where it can); prints why others are skipped
	$(BIN)/pytest -m "not long"

test-long: setup  ## soaks and sweeps; results go to bench/results
	$(BIN)/pytest -m long

demo: setup  ## from nothing to an elastic model on a cluster, with a load step and a report page
	$(BIN)/python -m hack.demo

demo-down:  ## remove everything that make demo made
	$(PYTHON) -m hack.cluster down --purge

images: setup  ## build the images: REGISTRY=... TAG=... [PUSH=1] [TORCH_INDEX=...]
	$(BIN)/python -m hack.images build --registry $(REGISTRY) $(if $(TAG),--tag $(TAG)) $(if $(PUSH),--push) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

bench: setup  ## every published figure that needs no cluster: quality, level speed, step time
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/level_speed.py
	$(BIN)/python bench/step_time.py

bench-refactor: setup  ## quality against every baseline, alone and as served: [TOKENS=...] [CALIBRATION=... VALIDATION=...]
	$(BIN)/python -m bench.refactor $(if $(TOKENS),--tokens $(TOKENS)) $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(VALIDATION),--validation $(VALIDATION))

bench-full-size: setup  ## refactor a checkpoint of OLMoE-1B-7B's shape, killed half-way: WORK=DIR with 45 GB free
	$(BIN)/python bench/full_size.py $(or $(WORK),$(error name a folder: make bench-full-size WORK=DIR))
