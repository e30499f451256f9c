# `make` lists the verbs. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON3 ?= python3
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
MINUTES ?= 30
FUZZ_MINUTES ?= 10
ROUNDS ?= 1
EXAMPLE ?= plain_loop
JOBS ?= 4

.DEFAULT_GOAL := help
.PHONY: help run-local run-local-failover run-example test lint bench bench-peers study soak clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

run-local: $(INSTALLED) ## one server and four workers on this machine, two of them killed (4 minutes)
	@$(PYTHON) examples/run_local.py

run-local-failover: $(INSTALLED) ## the server's whole site is killed, its standby takes over by itself (4 minutes; needs etcd)
	@$(PYTHON) examples/run_failover.py

run-example: $(INSTALLED) ## a server and two workers train EXAMPLE=plain_loop, huggingface_trainer, lightning_module, accelerate_loop or lora
	@$(PYTHON) examples/run_example.py $(EXAMPLE)

test: $(INSTALLED) ## all tests, JOBS=4 files at a time (many of them wait for processes); ARGS="-k staleness" picks some
	@$(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED) ## style, format and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check --quiet . || { echo "not formatted; do: .venv/bin/ruff format ."; exit 1; }
	@$(PYTHON) -m mypy

bench: $(INSTALLED) ## how fast the parts are on this machine
	@$(PYTHON) -m pytest -s --override-ini "python_files=bench_*.py" --timeout 600 tests/benchmarks

bench-peers: $(INSTALLED) ## the same training by us and by torchft, hivemind, Flower and DDP: what has no result yet, then the table (needs root)
	@$(PYTHON) tests/benchmarks/peers/run.py

study: $(INSTALLED) ## what tests/benchmarks/learning/ has not shown yet (hours; goes on where it was), then the table
	@$(PYTHON) -m hetero_async study

soak: $(INSTALLED) ## look for rare faults: MINUTES=30 of simulated worlds, FUZZ_MINUTES=10 of each decoder, then all tests with more cases
	@$(PYTHON) -m hetero_async sim --minutes $(MINUTES)
	@$(PYTHON) tests/fuzz/soak.py --minutes $(FUZZ_MINUTES)
	@for round in $$(seq $(ROUNDS)); do \
		echo "round $$round of $(ROUNDS)"; \
		$(PYTHON) -m pytest --exitfirst --hypothesis-profile soak --timeout 1800 $(ARGS) || exit 1; \
	done

clean: ## remove the environment, caches and local runs
	rm -rf .venv build runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, $(PYTHON3) is: $$($(PYTHON3) --version 2>/dev/null || echo missing); try make PYTHON3=python3.12"; \
		exit 1; }
	@echo "installing into .venv (once, a few minutes) ..."
	@$(PYTHON3) -m venv .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@
