# `make` lists the targets. The README describes them.

PREFIX = /usr/local
DESTDIR =
PYTHON = python3
VENV = .venv

SCRIPT = agent_key_request.py
BIN = $(DESTDIR)$(PREFIX)/bin
# In the order in which they are stopped: nothing starts a service again.
UNITS = agent-key-request.socket agent-key-request.service \
        agent-key-import.timer agent-key-import.service
UNIT_DIRECTORY = $(DESTDIR)/etc/systemd/system
# What pytest selects. `make test SELECT=` runs the slow tests, too.
SELECT = -m "not slow"
# Prints the Python that has the tools named, and installs them in $(VENV) if no Python has them.
PYTHON_WITH = PYTHON="$(PYTHON)" VENV="$(VENV)" .ci/python-with

.PHONY: help run test tests lint bench install uninstall install-units uninstall-units clean

help: ## list the targets (`make` alone does the same)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

run: ## ask sample.db.sql for an agent, by id and by address
	./$(SCRIPT) --db sample.db.sql id 001
	./$(SCRIPT) --db sample.db.sql ip 192.168.1.100

# AGENT_KEY_PYTHONS names the interpreters that run the script. Without it, one is enough.
test: ## run the tests (SELECT= for the slow ones, too)
	@python=$$($(PYTHON_WITH) pytest) || exit 1; \
	: "$${AGENT_KEY_PYTHONS:=$$(PATH=/usr/bin:/bin command -v python3 || command -v $(PYTHON))}"; \
	export AGENT_KEY_PYTHONS; exec "$$python" -m pytest -q -rfE $(SELECT) tests

# The directory has the same name, so `make tests` would find nothing to do.
tests: test

lint: ## check style, format and types (ruff, mypy)
	@python=$$($(PYTHON_WITH) ruff mypy pytest) || exit 1; status=0; \
	"$$python" -m ruff check $(SCRIPT) tests || status=1; \
	"$$python" -m ruff format --check $(SCRIPT) tests || status=1; \
	MYPYPATH=tests "$$python" -m mypy --strict $(SCRIPT) tests/*.py tests/bench/*.py || status=1; \
	exit $$status

bench: ## measure the speed, as far as the tools for it are installed
	$(PYTHON) tests/bench/bench.py

# The program is started once, so that Python's cache exists before a service makes /usr read-only.
install: ## install the program in /usr/local/bin (PREFIX, DESTDIR)
	install -d $(BIN)
	if [ "$$(id -u)" -eq 0 ]; then owner="-o root -g root"; fi; \
	install $$owner -m 0755 $(SCRIPT) $(BIN)/$(SCRIPT)
	@$(BIN)/$(SCRIPT) --version >/dev/null 2>&1 || :

uninstall: ## remove the program; the store of agents stays
	rm -f $(BIN)/$(SCRIPT) $(BIN)/__pycache__/$(SCRIPT:.py=).cpython-*.pyc
	@rmdir $(BIN)/__pycache__ 2>/dev/null || :

# The blocks of the README are the units. A line that names the file stands before each of them.
# A unit that was changed on this host stays as it is.
install-units: ## install the systemd units of the README (DESTDIR)
	@install -d $(UNIT_DIRECTORY)
	@set -e; for unit in $(UNITS); do \
	    file=$(UNIT_DIRECTORY)/$$unit; \
	    text=$$(awk -v name="\`/etc/systemd/system/$$unit\`" ' \
	        is_inside && /^```/ { exit } \
	        is_inside { print } \
	        /^```ini/ && index(line_before, name) { is_inside = 1 } \
	        NF { line_before = $$0 }' README.md); \
	    if [ -z "$$text" ]; then \
	        echo "make install-units: README.md has no block for $$unit" >&2; exit 1; \
	    elif [ ! -e "$$file" ]; then \
	        echo "$$text" >"$$file"; chmod 0644 "$$file"; echo "installed $$file"; \
	    elif [ "$$text" = "$$(cat "$$file")" ]; then \
	        echo "$$file is up to date"; \
	    else \
	        echo "$$file was changed and stays as it is; to replace it, remove it first"; \
	    fi; \
	done
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

uninstall-units: ## stop the systemd units and remove them (DESTDIR)
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then \
	    for unit in $(UNITS); do systemctl disable --now $$unit 2>/dev/null || :; done; \
	fi
	cd $(UNIT_DIRECTORY) 2>/dev/null && rm -f $(UNITS) || :
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

clean: ## remove what tests and tools have left in this checkout
	rm -rf $(VENV) .pythons .mysql .pytest_cache .mypy_cache .ruff_cache
	rm -rf __pycache__ tests/__pycache__ tests/bench/__pycache__
