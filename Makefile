# Each target installs what it misses: packages of Debian or Ubuntu (as root), Python's into .venv. The second time that
# takes no time. Works from a fresh clone.

# Debian's own build, optimised with profiles, and the one that python3-dev belongs to.
PYTHON ?= /usr/bin/python3
BENCH ?=
PYTEST ?=

BIN := .venv/bin
PACKAGES := xenmodel blockdev netdev sysdev xenfs bench
# Under CI a test that cannot run here is a failure, not a skip.
STRICT := $(if $(CI),-p no_skips)

.PHONY: help demo test check lint bench bench-net bench-xenstore bench-devxen clean system
.DELETE_ON_ERROR:

help:
	@echo 'make demo       two guests, a disk and a network: mkfs, ping, HTTP, fsck, each step shown (root)'
	@echo 'make check      ruff, mypy and the tests that need no privilege'
	@echo 'make test       ruff, mypy and all tests, also those that mount (root)'
	@echo 'make bench      compare with other FUSE servers; BENCH=--quick for a minute of it (root)'
	@echo 'make bench-net  compare with other virtual networks; BENCH=--quick for a minute of it (root)'
	@echo 'make bench-xenstore  compare with Xen'"'"'s own store daemons; BENCH=--quick for a minute of it (root)'
	@echo 'make bench-devxen  compare what /dev/xen gives programs with what Unix does; BENCH=--quick for less of it (root)'
	@echo 'make clean      remove .venv, caches and build leftovers'
	@echo 'Variables:      PYTHON=$(PYTHON)  PYTEST="more arguments"  BENCH="more arguments"'

demo: .venv/installed
	@$(BIN)/python -m xenfs demo

check: lint
	@echo '==> pytest, the tests that need no privilege'
	@PYTHONPATH=.ci $(BIN)/python -m pytest $(STRICT) -q -m 'not host' $(PYTEST)

# The tests of the host mostly wait; the others, which compute, run beside them, and what they say follows.
test: lint
	@echo '==> pytest, all tests'
	@PYTHONPATH=.ci $(BIN)/python -m pytest $(STRICT) -q -m 'not host' $(PYTEST) > .pytest-others 2>&1 & others=$$!; \
	PYTHONPATH=.ci $(BIN)/python -m pytest $(STRICT) -q -m host $(PYTEST); host=$$?; \
	wait $$others; status=$$?; cat .pytest-others; rm -f .pytest-others; exit $$((host || status))

lint: .venv/installed
	@echo '==> ruff check'
	@$(BIN)/ruff check
	@echo '==> mypy --strict'
	@$(BIN)/mypy --no-error-summary $(addprefix -p ,$(PACKAGES))

bench: .venv/installed-bench
	@$(BIN)/python -m bench.block $(BENCH)

bench-net: .venv/installed-bench
	@$(BIN)/python -m bench.net $(BENCH)

bench-xenstore: .venv/installed-bench
	@$(BIN)/python -m bench.xenstore $(BENCH)

bench-devxen: .venv/installed-bench
	@$(BIN)/python -m bench.devxen $(BENCH)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- what has to be there ---------------------------------------------------------------------------------------------

system:
	@scripts/install-debian

# The stamps are as old as the dependencies they stand for.
.venv/installed: pyproject.toml | system
	@echo '==> .venv: Python packages for running and testing (pip install -e ".[test]")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit("xenfs needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/installed-bench: .venv/installed
	@scripts/install-debian bench
	@echo '==> .venv: Python packages for the benchmark'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	@touch $@
