# Every target sets up its own virtual environment when it is missing. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
RUN     = $(BIN)/python -m

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types layers cover bench bench-quick bench-peers gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# torch goes in first and alone: with its version settled, nothing else pulls another build of it.
$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Penstock needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "cannot create a venv: install python3-venv, or set PYTHON"; exit 1; }
	@echo "installing torch (a large package, once) ..."
	@$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@touch $@

$(VENV)/.worker: $(VENV)/.base pyproject.toml
	@echo "installing penstock[worker] ..."
	@$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[worker]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	@echo "installing penstock[dev] ..."
	@$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.worker

demo: $(VENV)/.worker  ## show the main job: jobs stream, a worker is killed, nothing is lost
	@$(BIN)/penstock demo

# Two processes; files stay together, because their tests share servers and workers.
TEST_PROCESSES ?= 2

test: $(VENV)/.dev  ## run the whole test suite
	@$(RUN) pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

check: $(VENV)/.dev lint types layers  ## format, lint, types, import layers: what CI runs beside the tests

lint: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(VENV)/.dev
	@$(BIN)/mypy

layers: $(VENV)/.dev
	@$(BIN)/lint-imports

cover: $(VENV)/.dev  ## the tests, with line coverage of the three packages
	@$(RUN) pytest --cov --cov-report=term --cov-report=html

bench: $(VENV)/.dev  ## run every benchmark in full
	@$(RUN) benchmarks

bench-quick: $(VENV)/.dev  ## the same in smoke-test size
	@$(RUN) benchmarks --quick

# Each peer in an environment of its own: their requirements contradict one another. llama.cpp is built from source, for minutes.
PEERS = celery:hiredis,celery[redis] dramatiq:hiredis,dramatiq[redis] rq:hiredis,rq arq:hiredis,arq \
        taskiq:hiredis,taskiq,taskiq-redis streaq:hiredis,streaq \
        llamacpp:llama-cpp-python,gguf,safetensors openvino:torch,openvino-genai,optimum-intel[openvino]

bench-peers:  ## install the queues and engines we are compared with, each in an environment of its own
	@set -e; for peer in $(PEERS); do name=$${peer%%:*}; \
	  test -x .bench-venvs/$$name/bin/python || { echo "installing $$name ..."; $(PYTHON) -m venv .bench-venvs/$$name; \
	  .bench-venvs/$$name/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $$(echo $${peer#*:} | tr , ' '); }; done

gpu: $(VENV)/.dev  ## on a GPU machine: its tests and benchmarks, with a report in bench-results/gpu.json
	@$(RUN) benchmarks.gpu

clean:  ## remove the virtual environment, caches and build outputs
	rm -rf $(VENV) .bench-venvs build dist bench-results htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
