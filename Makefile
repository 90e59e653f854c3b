# make run: try it. make test, lint, bench, install: see README.md.
PREFIX = /usr/local
DESTDIR =
PYTHON = python3
VENV = .venv
SCRIPT = agent_key_request.py

.PHONY: run test lint bench install clean

run:
	./$(SCRIPT) --db sample.db.sql id 001
	./$(SCRIPT) --db sample.db.sql ip 192.168.1.100

test:
	@if $(PYTHON) -c 'import pytest' 2>/dev/null; then $(PYTHON) -m pytest -q tests; else \
	  test -x $(VENV)/bin/pytest || \
	    { $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q pytest; } && \
	  $(VENV)/bin/python -m pytest -q tests; fi

# One room is a text to Python (the script says why); lint reads it as the code it is.
lint: $(VENV)/bin/mypy
	mkdir -p .lint
	sed -e "s/^\(LATER_ROOM = \).*, r'''$$/\1(1, '')/" -e "/^'''  # end of LATER_ROOM$$/d" $(SCRIPT) > .lint/$(SCRIPT)
	$(VENV)/bin/ruff check $(SCRIPT) .lint/$(SCRIPT) tests
	$(VENV)/bin/mypy .lint/$(SCRIPT)

$(VENV)/bin/mypy:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q pytest ruff mypy

bench:
	$(PYTHON) tests/bench/bench.py

install:
	install -d $(DESTDIR)$(PREFIX)/bin
	if [ "$$(id -u)" -eq 0 ]; then owner="-o root -g root"; fi; \
	install $$owner -m 0755 $(SCRIPT) $(DESTDIR)$(PREFIX)/bin/$(SCRIPT)

clean:
	rm -rf $(VENV) .lint .pytest_cache .mypy_cache .ruff_cache tests/__pycache__
