# Daily commands. Everything is installed into .venv; a stamp file per set of extras makes later runs quick.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.13 python3,$(shell command -v $(v) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, file by file.
TEST_WORKERS ?= 2
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile
# Changes of the contract are compared with this commit; none (a first push, a shallow clone): not compared.
BASE ?= $(shell git rev-parse -q --verify origin/main 2>/dev/null || git describe --tags --abbrev=0 2>/dev/null)

.PHONY: help demo serve test ops-test lint format typecheck bench gpu-check stubs deploy clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.serving ## Serve the bundled models: transcribe a recording live, generate a clip (no PyTorch)
	@$(BIN)/realtide demo

serve: $(VENV)/.serving ## Serve the bundled models
	@$(BIN)/realtide serve

test: lint ## Lint, then run every test
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile $(ARGS)

ops-test: $(VENV)/.ops ## Charts, rules, dashboards and drain, with real Prometheus, balancers and containers (installs them)
	$(BIN)/python tools/ops_tools.py
	$(BIN)/python -m pytest -q -m ops --durations 10 $(or $(ARGS),tests/ops)

lint: $(VENV)/.dev ## Style, types, the proto contract, and stubs that are up to date
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@if [ -n "$(BASE)" ] && git cat-file -e "$(BASE):proto/realtide/v1/common.proto" 2>/dev/null; then \
	  echo "$(BIN)/buf breaking --against $(BASE)"; \
	  $(BIN)/buf breaking --against ".git#ref=$(BASE)"; \
	fi
	$(BIN)/python tools/generate_stubs.py --check
	$(BIN)/python tools/generate_deploy.py --check

format: $(VENV)/.dev ## Put code and proto into the house style
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .
	$(BIN)/buf format --write

bench: $(VENV)/.dev ## Benchmarks that need no prepared data; docs/benchmarks.md has the others
	$(BIN)/realtide bench speech --compare --out benchmarks/results/speech.json
	$(BIN)/realtide bench video --long 240 --out benchmarks/results/video.json
	$(BIN)/python benchmarks/encoder_cost.py --adaptive models/ancat-commands-en
	$(BIN)/python benchmarks/memory.py --bundle models/ancat-commands-en

gpu-check: ## Replay golden cases and time the models on a GPU; with the PYTHON given, installs nothing
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	PYTHONPATH=. "$(PYTHON)" -m realtide.gpu --out benchmarks/results/gpu.json $(ARGS)

stubs: $(VENV)/.dev ## Generate the Python stubs from proto/
	$(BIN)/python tools/generate_stubs.py

deploy: $(VENV)/.dev ## Generate dashboards and the chart's schema and copies below deploy/
	$(BIN)/python tools/generate_deploy.py

clean: ## Remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is older" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.serving: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[cpu]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[cpu,export,train,dev]'
	@touch $@ $(VENV)/.serving

$(VENV)/.ops: pyproject.toml | $(VENV)/.dev
	$(PIP) -e '.[ops]'
	@touch $@
