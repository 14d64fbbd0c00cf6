# Needs Python >= 3.10, make and git; everything else is put into .venv by the first target that needs it.
#   make demo [ARGS=--json]      a swarm on this machine: text, a killed peer, a few training steps
#   make test [ARGS=tests/wire]  all tests but those that need a network laboratory or a Redis
#   make test-oldest             what touches transformers, with the oldest release that is supported
#   make test-redis              trackers that share their leases (redis-server or valkey-server)
#   make test-wan                those: delay, NAT and multicast (root, gcc and ../shared/netlab)
#   make faults                  the fault matrix; writes docs/faults.md
#   make families                every family of transformers against the local model; writes docs/families.md
#   make lint | cover | docs | bench | clean

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= fast,test
JOBS ?= 3
SCENARIOS ?= overhead recovery memory
ARGS ?=

NETLAB = ../shared/netlab

OLDEST = .oldest
# All that hands something to transformers or takes something from it.
OLDEST_TESTS ?= tests/model tests/swarm/test_exactness.py

BIN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST_READY = $(OLDEST)/.ready
OLDEST_PYTHON = PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python

.PHONY: demo test test-oldest test-redis test-wan faults families lint cover docs bench clean

demo: $(READY)
	@$(BIN)/remote-modules demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal $(ARGS)

# The first line prints the release that is tested, and fails if it is not that of the constraints.
test-oldest: $(OLDEST_READY)
	@$(OLDEST_PYTHON) -c 'import transformers; print(f"transformers=={transformers.__version__}")' | grep -Fxf - constraints-oldest.txt
	$(OLDEST_PYTHON) -m pytest --numprocesses=$(JOBS) --dist=worksteal $(OLDEST_TESTS) $(ARGS)

test-redis: $(READY)
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || { echo "redis-server is missing; on Debian: apt install redis-server" >&2; exit 1; }
	$(BIN)/python -m pytest tests/replicas $(ARGS)

# On its own: the laboratory's hosts are namespaces of this one machine, and two at a time would share its clock.
test-wan: $(READY)
	@if [ -d $(NETLAB) ]; then $(BIN)/python -m pytest tests/wan $(ARGS); \
	else echo "the WAN tests did not run: they need $(NETLAB), which is not here"; fi

# The tests write down what they measured, and the table is made of that.
faults: $(READY)
	@rm -f $(VENV)/faults.jsonl
	REMOTE_MODULES_FAULTS=$(CURDIR)/$(VENV)/faults.jsonl $(BIN)/python -m pytest tests/faults --deselect tests/faults/test_table.py $(ARGS)
	$(BIN)/python tests/faults/recorder.py $(VENV)/faults.jsonl docs/faults.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# wire and plan are covered by their own tests, every branch of them (setup.cfg).
cover: $(READY)
	@rm -f $(VENV)/.coverage*
	COVERAGE_FILE=$(CURDIR)/$(VENV)/.coverage $(BIN)/coverage run -m pytest -q --numprocesses=$(JOBS) --dist=worksteal tests/wire tests/plan
	COVERAGE_FILE=$(VENV)/.coverage $(BIN)/coverage combine --quiet
	COVERAGE_FILE=$(VENV)/.coverage $(BIN)/coverage report

# Links resolve, code blocks run or parse, the protocol's tables say what the code does.
docs: $(READY)
	$(BIN)/python -m pytest tests/test_documents.py tests/wire/test_protocol_document.py $(ARGS)

families: $(READY)
	$(BIN)/python benchmarks/families.py --jobs $(JOBS) $(ARGS)

# Those that need no accelerator, or those that are named: make bench SCENARIOS=device ARGS="--device cuda"
bench: $(READY)
	@status=0; for name in $(SCENARIOS); do echo "== $$name" >&2; $(BIN)/remote-modules bench $$name $(ARGS) || status=1; done; exit $$status

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is printed goes to stderr: `make demo ARGS=--json` has nothing but JSON on stdout.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed; try make PYTHON=python3.12")' >&2
	@echo "setting up $(VENV), once" >&2
	@$(PYTHON) -m venv $(VENV) >&2 || { echo "$(PYTHON) makes no virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]' >&2
	@touch $(READY)

# A folder before .venv on the path: torch and all else is not installed twice.
$(OLDEST_READY): constraints-oldest.txt $(READY)
	@echo "setting up $(OLDEST), once" >&2
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) --requirement constraints-oldest.txt >&2
	@touch $(OLDEST_READY)
