# `make` lists the verbs. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON3 ?= python3
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
MINUTES ?= 30
FUZZ_MINUTES ?= 10
ROUNDS ?= 1
EXAMPLE ?= plain_loop
JOBS ?= 4
DEVICE ?= cpu
BENCH := $(PYTHON) -m pytest -s --override-ini "python_files=bench_*.py" --timeout 600
BENCHES := merging codecs lasting wire slow_link crowd kept stall under_fire
# Where it is set, each of the many processes of a test or demo compiles the whole package for itself.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run-local run-local-failover run-example test lint bench bench-more bench-peers bench-under-fire study soak clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

run-local: $(INSTALLED) ## one server and four workers on this machine, two of them killed (4 minutes); DEVICE=cuda: one site on that
	@$(PYTHON) examples/run_local.py --device $(DEVICE)

run-local-failover: $(INSTALLED) ## the server's whole site is killed, its standby takes over by itself (4 minutes; needs etcd)
	@$(PYTHON) examples/run_failover.py --device $(DEVICE)

run-example: $(INSTALLED) ## a server and two workers train EXAMPLE=plain_loop, huggingface_trainer, lightning_module, accelerate_loop or lora
	@$(PYTHON) examples/run_example.py $(EXAMPLE)

test: $(INSTALLED) ## all tests, JOBS=4 files at a time (many of them wait for processes); ARGS="-k staleness" picks some
	@$(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED) ## style, format and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check --quiet . || { echo "not formatted; do: .venv/bin/ruff format ."; exit 1; }
	@$(PYTHON) -m mypy

bench: $(INSTALLED) ## how fast everything is, against yardsticks of the same run (10 minutes, 24 GB); build/bench.json
	@$(BENCH) $(BENCHES:%=tests/benchmarks/bench_%.py)

bench-more: $(INSTALLED) ## what else costs something: being watched, attacked, replicated, simulated (10 minutes)
	@$(BENCH) $(filter-out $(BENCHES:%=tests/benchmarks/bench_%.py),$(wildcard tests/benchmarks/bench_*.py))

bench-under-fire: $(INSTALLED) ## a worker killed each 20 s for 10 minutes, and 10 minutes of peace to compare with
	@SECONDS=600 EVERY=20 $(BENCH) tests/benchmarks/bench_under_fire.py

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
