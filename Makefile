# make plan   the ranked table of sdxl on eight L40s; never installs torch
# make test   everything: lint, types, all tests (installs torch and diffusers)
# make engines   wheels of other engines for the tests of --emit; part of make test
#
# One virtual environment, two stamps. `plan` asks only for the first stamp (the core dependencies);
# `test` adds the [run,dev] extras on top. That planning needs no torch is not left to an environment
# that happens to lack it: tests/test_layers.py blocks the import.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Unpacked beside what is installed, never imported whole (tests/engines.py): without what they need,
# which is gigabytes. Where one cannot be had (another Python, no network) its tests skip.
ENGINES := xfuser==0.7.0 cache-dit==1.5.3 sglang==0.5.23 vllm-omni==0.30.0

.PHONY: plan test lint bench engines clean

plan: $(VENV)/core.stamp
	$(BIN)/paradiff-plan --topology pcie8.yaml

test: lint engines
	$(BIN)/python -m pytest -n 2 -m 'not still'
	$(BIN)/python -m pytest -m still

engines: $(VENV)/engines.stamp

lint: $(VENV)/all.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/all.stamp
	$(BIN)/python benchmarks/bench_plan.py
	$(BIN)/python benchmarks/bench_report.py
	$(BIN)/python benchmarks/bench_capacity.py
	$(BIN)/python benchmarks/bench_engine.py
	$(BIN)/python benchmarks/bench_published.py
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_executor.py

$(VENV)/core.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "paradiff needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/all.stamp: $(VENV)/core.stamp
	$(PIP) -e '.[run,dev]'
	@touch $@

$(VENV)/engines.stamp: Makefile | $(VENV)/core.stamp
	@rm -rf $(VENV)/engines
	@for wheel in $(ENGINES); do \
	  $(PIP) --no-deps --only-binary :all: --no-compile --retries 1 --target $(VENV)/engines $$wheel \
	    || echo "$$wheel is not to be had here; its tests skip" >&2; done
	@touch $@

clean:
	rm -rf $(VENV)
