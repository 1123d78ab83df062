# Everything a newcomer needs: `make demo` and `make test`. Both make .venv and install into it first.
#
#   TORCH    the torch to install, as arguments of pip install. Empty keeps what is there.
#   PYTHON   the interpreter that makes .venv (3.11 or newer)
#   OUT      folder that `make gpu` writes its results to
#   ASSAY_AGENTS  folder that `make agents` installs published agents in, each in an environment of its own
TORCH ?= torch==2.13.0
PYTHON ?= python3
OUT ?= build/gpu
ASSAY_AGENTS ?= $(HOME)/.cache/assay/agents
export ASSAY_AGENTS
BIN := .venv/bin
RUN = timeout --kill-after=15

.DEFAULT_GOAL := help
.PHONY: help demo agents test test-full lint docs bench-cpu gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml assay/pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON: expected 3.11 or newer, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH),$(BIN)/python -m pip install --quiet $(TORCH))
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable './assay[agents]'
	touch $@

demo: .venv/ready ## run the seed workload and print a table
	$(BIN)/moeyard bench --workload seed

test: .venv/ready ## every test this machine can run, 12 minutes on two cores; ended after 20
	$(RUN) 1200 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not full'

# What cannot be installed is left out with a word, and its tests skip.
agents: ## install published command-line agents, which longer tests run
	for name in mini-swe-agent aider-chat; do \
		test -x '$(ASSAY_AGENTS)'/$$name/bin/python || { $(PYTHON) -m venv '$(ASSAY_AGENTS)'/$$name && \
		'$(ASSAY_AGENTS)'/$$name/bin/python -m pip install --quiet $$name; } || \
		{ rm -rf '$(ASSAY_AGENTS)'/$$name; echo "not installed: $$name"; }; done
	test -x '$(ASSAY_AGENTS)'/openhands/bin/openhands || { python3.12 -m venv '$(ASSAY_AGENTS)'/openhands && \
		'$(ASSAY_AGENTS)'/openhands/bin/python -m pip install --quiet openhands; } || \
		{ rm -rf '$(ASSAY_AGENTS)'/openhands; echo 'not installed: openhands, which needs python3.12'; }
	npm install --prefix '$(ASSAY_AGENTS)/npm' --no-audit --no-fund @anthropic-ai/claude-code @openai/codex \
		@google/gemini-cli || echo 'not installed: agents of npm'

test-full: .venv/ready agents ## the longer tests too, with published agents
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready ## ruff and strict mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/ready ## regenerate README's tables and pictures from benchmarks/results
	$(BIN)/python -m moeyard.bench.docs README.md

bench-cpu: .venv/ready ## measure this machine's CPU and write benchmarks/results/<machine>
	$(BIN)/python -m moeyard.bench.suite cpu

# On a GPU machine the interpreter that already has torch is used as it is; every part has its own time limit and a
# part that fails does not keep the others from running. pytest-benchmark warns beside pytest-xdist, and warnings are errors.
gpu: ## GPU tests and benchmarks, unattended; results in OUT
	mkdir -p '$(OUT)'
	PYTHONPATH=src $(RUN) 300 $(PYTHON) -m pytest tests/gpu -p no:cacheprovider -p no:benchmark --junitxml='$(OUT)/tests.xml'; echo $$? > '$(OUT)/tests.status'
	PYTHONPATH=src $(RUN) 480 $(PYTHON) -m moeyard.bench.suite cuda --out '$(OUT)' --tests '$(OUT)/tests.xml'; echo $$? > '$(OUT)/bench.status'
	@grep -L '^0$$' '$(OUT)'/*.status | sed 's/^/failed: /'; ! grep -qv '^0$$' '$(OUT)'/*.status

clean: ## remove .venv and build products
	rm -rf .venv build dist
