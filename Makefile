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
LOWEST := .venv-lowest
SITE := .venv-site

.DEFAULT_GOAL := help
.PHONY: help demo agents test test-lowest test-full lint docs site bench-cpu wheel gpu clean

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

test: .venv/ready ## what has to pass, on two cores; ended after 15 minutes
	$(RUN) 900 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not full'

# What depends on other packages, and what tells which versions are there. The rest is the same code under any version.
ON_LOWEST := $(addprefix tests/test_,lowest.py library.py layout.py rows.py router.py experts.py cli.py checkpoints.py \
	bench_results.py cuda.py cuda_runtime.py host_path.py triton.py examples.py) \
	$(addprefix assay/tests/test_,task.py public_api.py equivalence.py outputs.py stats.py quickstart.py)

$(LOWEST)/ready: pyproject.toml assay/pyproject.toml .ci/lowest.py Makefile
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/lowest.txt --editable '.[gpu,bench]' --editable './assay[judge]'
	touch $@

test-lowest: $(LOWEST)/ready ## what depends on other packages, at the lowest versions promised; 3 minutes
	MOEYARD_LOWEST=1 $(RUN) 900 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -m 'not full' $(ON_LOWEST)

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

docs: .venv/ready ## regenerate tables, numbers and pictures of README and docs from benchmarks/results
	$(BIN)/python -m moeyard.bench.docs .
	$(BIN)/python docs/assay_report.py .
	$(BIN)/python tasks/seeds/run.py table

# An environment of its own: the API is read from the sources, so nothing of moeyard is installed, not even torch.
$(SITE)/ready: pyproject.toml Makefile
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

site: $(SITE)/ready ## build docs into build/site, with the API and strict links
	$(SITE)/bin/mkdocs build --quiet

bench-cpu: .venv/ready ## measure this machine's CPU and write benchmarks/results/<machine>
	$(BIN)/python -m moeyard.bench.suite cpu

# On a GPU machine the interpreter that already has torch is used as it is; every part has its own time limit and a
# part that fails does not keep the others from running. pytest-benchmark warns beside pytest-xdist, and warnings are errors.
gpu: ## GPU tests and benchmarks, unattended; results in OUT
	mkdir -p '$(OUT)'
	PYTHONPATH=src $(RUN) 300 $(PYTHON) -m pytest tests/gpu -p no:cacheprovider -p no:benchmark --junitxml='$(OUT)/tests.xml'; echo $$? > '$(OUT)/tests.status'
	PYTHONPATH=src $(RUN) 480 $(PYTHON) -m moeyard.bench.suite cuda --out '$(OUT)' --tests '$(OUT)/tests.xml'; echo $$? > '$(OUT)/bench.status'
	@grep -L '^0$$' '$(OUT)'/*.status | sed 's/^/failed: /'; ! grep -qv '^0$$' '$(OUT)'/*.status

# With ARCHS, such as "90a 80", the wheel has the cubins of the models of bench/workloads: they need no NVRTC.
CUBINS := src/moeyard/cuda/cubins
wheel: .venv/ready ## build a wheel in dist; ARCHS="90a" adds cubins of named models
	rm -rf $(CUBINS)
	$(if $(ARCHS),$(BIN)/python -m moeyard.bench.cubins $(CUBINS) $(ARCHS))
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . ; status=$$?; rm -rf $(CUBINS); exit $$status

clean: ## remove virtual environments and build products
	rm -rf .venv $(LOWEST) $(SITE) build dist
