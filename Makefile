# make run    the exporter on this machine          make check  lint, types and unit tests (what to run for a change)
# make test   everything that CI runs               make bench  cost of a scrape, idle and on a full node
# make lab    cause all fourteen failures on this kernel, until each page comes and goes; report in .lab/
# make lab-vm KERNEL=6.1   the same in a virtual machine (5.10, 6.1 or 6.12); make lab-vm-all: in one after the other
# make demo FAULT=listen_queue   cause one failure and watch it; make lab-list names them
# make docs   write docs/metrics.md from the code   make test-vm  what only a stock kernel can show
# make lock   pin the dependencies anew             make format lay the code out as CI wants it

PYTHON ?= python3
KERNEL ?= 6.1
BIN := .venv/bin

.PHONY: run test test-vm check lint unit bench lab lab-vm lab-vm-all lab-list demo docs lock format clean
.DELETE_ON_ERROR:

run: .venv/run
	$(BIN)/shoal-exporter $(ARGS)

test: .venv/dev lint
	tests/packages.sh
	$(BIN)/pytest --cov --cov-report=term

check: .venv/dev lint unit

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: .venv/dev
	$(BIN)/pytest tests/unit

# In a virtual machine: what loads modules and writes sysctls of the initial namespace.
test-vm: .venv/dev
	tests/packages.sh
	tests/vm.sh $(KERNEL) -- $(BIN)/pytest -q -p no:cacheprovider --timeout=300 tests/vm

bench: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.bench.idle
	$(BIN)/python -m tests.bench.full

# LAB is for more: make lab LAB='--resolve-within 420 listen_queue'
lab: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.lab run $(LAB)

lab-vm: .venv/dev
	tests/packages.sh
	tests/lab/vm.sh $(KERNEL) $(LAB)

lab-vm-all: .venv/dev
	tests/packages.sh
	status=0; for kernel in 5.10 6.1 6.12; do tests/lab/vm.sh $$kernel $(LAB) || status=1; done; exit $$status

lab-list: .venv/dev
	$(BIN)/python -m tests.lab list

demo: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.lab demo $(or $(FAULT),listen_queue)

docs: .venv/run
	$(BIN)/python docs/build.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Hashes for every platform and no addresses. Extras are kept: pip takes coverage[toml] for another requirement than
# coverage, and refuses it unpinned. uv is needed here only, so it is not pinned with the rest.
lock:
	$(PYTHON) -m venv .venv/lock && .venv/lock/bin/pip install --quiet uv
	.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-header --no-annotate --no-strip-extras --upgrade pyproject.toml --group build -o requirements/run.txt
	.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-header --no-annotate --no-strip-extras --upgrade pyproject.toml --group build --group test --group lint \
	    --group chart --group dashboards --group lab \
	    -c requirements/run.txt -o requirements/dev.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist

.venv/bin/pip:
	tests/venv.sh $(PYTHON)

# --no-build-isolation: what builds the package comes from the lock too, with its hash.
.venv/run: .venv/bin/pip requirements/run.txt pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/run.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

.venv/dev: .venv/run requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	touch $@
