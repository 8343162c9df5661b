# make run          the exporter on this machine
# make check        lint, types and the quick unit tests: what to run for a change; make unit: all unit tests
# make test         everything that CI runs, the lab on this kernel and one stock kernel included
# make lab          cause all fourteen failures on this kernel, until each page comes and goes; report in .lab/
# make lab-vm       the same in a virtual machine: KERNEL=5.10, 6.1 or 6.12; make lab-vm-all is one after the other
# make demo         cause one failure and watch it: FAULT=listen_queue; make lab-list names them
# make test-vm      what else only a stock kernel can show, on 6.12
# make fuzz         ten thousand bad inputs for every parser
# make bench        cost of a scrape beside its peers: BENCH='idle', 'full', 'monster'   make bench-rules  the rule pack for a thousand nodes
# make growth       cost against pods, sockets and connections; draws docs/growth.svg    make soak  an hour, a scrape a second
# make rule-tests   after an alert is added, renamed or removed     make rules-next   the rule pack in a current promtool
# make docs         write docs/metrics.md and the chart's README    make format       lay the code out as CI wants it
# make dashboards   grafana/*.json, from grafana/*.py and the rules   make pictures     draw them for the README
# make chart        pack the Helm chart, into dist/                 make image        the container image, with docker
# make lock         pin the dependencies anew

PYTHON ?= python3
KERNEL ?= 6.1
STOCK := oom_kill memory_high delays code_eviction run_queue
BIN := .venv/bin

.PHONY: run test test-vm test-systemd fuzz check lint unit bench growth soak bench-rules rule-tests rules-next lab lab-vm \
    lab-vm-all lab-list demo docs dashboards pictures chart image lock format clean
.DELETE_ON_ERROR:

run: .venv/run
	$(BIN)/shoal-exporter $(ARGS)

# Both labs mostly wait, so they run side by side: the own kernel's failures to their end, and in a machine with a stock
# kernel those that want its controllers, all at once, until they page. That wants two processors and the ordinary clock.
test: .venv/dev lint
	tests/packages.sh
	mkdir -p .lab
	SHOAL_VM_TIMEOUT=3600 SHOAL_VM_OPTIONS= tests/lab/vm.sh $(KERNEL) --tries 2 --patience 900 --resolve-within 0 $(STOCK) >.lab/stock.out 2>&1 & stock=$$!; \
	    $(BIN)/python -m tests.lab run --tries 2; own=$$?; wait $$stock; stock=$$?; \
	    cat .lab/stock.out; test $$own = 0 && test $$stock = 0 || \
	    { grep -h -A 99 "^What is not" .lab/*.md; echo "lab: exit $$own on this kernel, $$stock on $(KERNEL)"; exit 1; }
	$(BIN)/pytest --cov --cov-report=term --durations=25 || \
	    { test $$? = 1 && $(BIN)/pytest --last-failed --last-failed-no-failures=none; }

check: .venv/dev lint
	$(BIN)/pytest tests/unit -m "not slow"

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: .venv/dev
	$(BIN)/pytest tests/unit

# In a virtual machine: what loads modules and writes sysctls of the initial namespace.
test-vm: .venv/dev
	tests/packages.sh
	SHOAL_VM_TIMEOUT=1800 tests/vm_disk.sh -i 3 6.12 .lab/vm -- $(BIN)/pytest -q -p no:cacheprovider --timeout=600 tests/vm

# Half an hour. pytest tests/unit/fuzz alone is what CI does: a hundred for each.
fuzz: .venv/dev
	$(BIN)/pytest -q tests/unit/fuzz --hypothesis-profile=fuzz --timeout=1800

# The unit of packaging/ under a systemd that is booted in a container.
test-systemd: .venv/dev
	tests/packages.sh
	SHOAL_SYSTEMD=1 $(BIN)/pytest -q tests/e2e/test_systemd.py

bench: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.bench.scrape $(BENCH)

# Half an hour; docs/benchmarks.md has what it showed.
growth: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.bench.growth

# SOAK='--minutes 6' is for a first look.
soak: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.bench.soak $(SOAK)

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

# A thousand nodes with thirty pods each; takes half an hour and 8 GiB of memory.
bench-rules: .venv/dev
	tests/packages.sh
	$(BIN)/python -m tests.bench.rules

# The recorded hour names every alert of the pack; the series in it stay as they are.
rule-tests: .venv/dev
	$(BIN)/python -m tests.rules.build_hour

rules-next:
	tests/rules/next.sh

dashboards: .venv/dev
	$(BIN)/python -m grafana.build

# Out of a real Prometheus that tests/grafana fills with what the fault lab recorded.
pictures: dashboards
	$(BIN)/python -m tests.grafana.pictures

docs: .venv/run
	$(BIN)/python docs/build.py
	$(BIN)/python helm/readme.py

# Helm's engine out of helm-python-sdk, so that no helm is needed; `helm package helm/shoal` does the same.
chart: .venv/dev
	mkdir -p dist
	$(BIN)/python -c 'import helm_python; print(helm_python.package("helm/shoal", destination="dist"))'

image:
	docker build --tag shoal-exporter/shoal:$$(sed -n 's/^appVersion: //p' helm/shoal/Chart.yaml) .

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
