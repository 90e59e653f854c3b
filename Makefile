# make run: try it. make test, lint, bench, install, uninstall, clean: see README.md.
PREFIX = /usr/local
DESTDIR =
PYTHON = python3
VENV = .venv
SCRIPT = agent_key_request.py
BIN = $(DESTDIR)$(PREFIX)/bin
SELECT = -m "not slow"
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check --retries 0 --timeout 20

.PHONY: run test lint bench install uninstall clean

run:
	./$(SCRIPT) --db sample.db.sql id 001
	./$(SCRIPT) --db sample.db.sql ip 192.168.1.100

# With the pytest of the system's Python, or one of our own; over one interpreter if none is named.
# `make test SELECT=` has the slow ones, too.
test:
	@python=$(PYTHON); $$python -c 'import pytest' 2>/dev/null || { \
	  python=$(VENV)/bin/python; $$python -c 'import pytest' 2>/dev/null || \
	  { $(PYTHON) -m venv $(VENV) && $(PIP) pytest; } >/dev/null 2>&1 || { \
	    echo "make test: pytest is missing: install it (Debian: apt-get install python3-pytest)" >&2; exit 1; }; }; \
	: "$${AGENT_KEY_PYTHONS:=$$(PATH=/usr/bin:/bin command -v python3 || command -v $(PYTHON))}"; \
	export AGENT_KEY_PYTHONS; exec $$python -m pytest -q -rfEs $(SELECT) tests

lint:
	@$(VENV)/bin/python -m ruff --version >/dev/null 2>&1 && $(VENV)/bin/python -m mypy --version >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv $(VENV) && $(PIP) pytest ruff mypy; } >/dev/null 2>&1 || { \
	    echo "make lint: ruff and mypy are missing, and could not be installed in $(VENV)" >&2; exit 1; }
	$(VENV)/bin/python -m ruff check $(SCRIPT) tests
	$(VENV)/bin/python -m mypy $(SCRIPT)

bench:
	$(PYTHON) tests/bench/bench.py

# It is started once, so that its __pycache__ is there before a read-only /usr is sealed.
install:
	install -d $(BIN)
	if [ "$$(id -u)" -eq 0 ]; then owner="-o root -g root"; fi; \
	install $$owner -m 0755 $(SCRIPT) $(BIN)/$(SCRIPT)
	@$(BIN)/$(SCRIPT) --version >/dev/null 2>&1 || :

uninstall:
	rm -f $(BIN)/$(SCRIPT) $(BIN)/__pycache__/$(SCRIPT:.py=).cpython-*.pyc
	@rmdir $(BIN)/__pycache__ 2>/dev/null || :

clean:
	rm -rf $(VENV) .pythons .pytest_cache .mypy_cache .ruff_cache __pycache__ tests/__pycache__ tests/.ruff_cache
