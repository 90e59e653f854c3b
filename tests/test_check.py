"""`--check` tells what a person wants to know before trusting a source, and never a key."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores, script
from serving import records, serving
from test_import import SECRET, Child, become, forked

GOOD = [
    Record("001", "my_agent", "192.168.1.100", KEY),
    Record("002", "laptop", "any", SECRET),
    Record("003", "office", "10.20.30.0/24", "a key with spaces"),
    Record("004", "web-v6", "2001:db8::10", "k" * 127),
]
HEALTHY = "4 agents, 0 errors, 0 notes"
QUICK = "PRAGMA synchronous = OFF; "  # for a busy disk
INDEXES = "; CREATE INDEX agent_id ON agent (id); CREATE INDEX agent_ip ON agent (ip)"


class Checked(NamedTuple):
    """What one check told, as text and as JSON."""

    status: int
    lines: list[str]
    data: dict[str, Any]

    def of(self, level: str) -> list[str]:
        """The texts of the findings of a level."""
        return [one["text"] for one in self.data["findings"] if one["level"] == level]

    @property
    def errors(self) -> list[str]:
        """What would make a request fail."""
        return self.of("error")

    @property
    def notes(self) -> list[str]:
        """What a person may want to know."""
        return self.of("note")


Check = Callable[..., Checked]


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str]) -> Check:
    """Check a source in the process, in both forms, which must say the same and change nothing."""

    def run(source: str | Path, *options: str | Path) -> Checked:
        before = contents(source)
        told, statuses = [], []
        for form in [], ["--json"]:
            words = ["--db", str(source), *map(str, options), *form, "--check"]
            found, rest = script.split_command_line(words)
            statuses.append(script.main(found, rest, str(source)))
            out, err = capfd.readouterr()
            assert err == ""
            assert out.isascii() and out.endswith("\n") and out.replace("\n", "").isprintable(), out
            assert not any(word in out for word in (KEY, SECRET[:12], "a key with", "Internal"))
            told.append(out)
        assert contents(source) == before
        data = json.loads(told[1])
        checked = Checked(statuses[0], told[0].splitlines(), data)
        assert statuses[0] == statuses[1] == bool(data["errors"])
        assert list(data) == ["agents", "errors", "notes", "findings"]
        assert told[1] == json.dumps(data) + "\n"
        same = [one["text"] if one["level"] == "info" else f"{one['level']}: {one['text']}"
                for one in data["findings"]]
        assert without_times(checked.lines) == without_times(same)
        if data["errors"] + data["notes"] <= 100:
            counts = data["errors"], data["notes"]
            assert (len(checked.errors), len(checked.notes)) == counts
        amounts = [f"{count} {what}{'s' * (count != 1)}" for count, what in (
            (data["agents"], "agent"), (data["errors"], "error"), (data["notes"], "note"))]
        assert checked.lines[-1] == ", ".join(amounts), checked
        return checked

    return run


def without_times(lines: list[str]) -> list[str]:
    """The lines without what differs from run to run."""
    return [re.sub(r"[0-9.]+ ms$", "", line) for line in lines]


def contents(source: str | Path) -> list[Any]:
    """What a check must leave as it is: the files in the source's folder."""
    folder = Path(source).parent
    return [(path, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()] if (
        folder.name == "stores") else []


def private(path: Path) -> Path:
    """Take a source from the others, which would be a note."""
    path.chmod(0o600)
    return path


def sound(stores: Stores, agents: Sequence[Sequence[Any]] = GOOD, schema: str = "") -> Path:
    """Make a database of which nothing is to be told but its agents."""
    return private(stores.sqlite(agents, QUICK + (schema or UNTYPED_SCHEMA) + INDEXES))


def csv(stores: Stores, agents: Sequence[Sequence[Any]] = GOOD) -> Path:
    """The same as a text."""
    return private(stores.csv(agents))


def ask(source: Path, *words: str) -> Any:
    """Answer a request from a source."""
    return script.answer(list(words), lambda: script.open_source(str(source), 60))


# ---------------------------------------------------------------- nothing to find

SOURCES: dict[str, Callable[[Stores], Path]] = {
    "sqlite": sound,
    "of the sample's schema": lambda stores: stores.indexed(GOOD),
    "csv": stores_csv if (stores_csv := csv) else csv,
    "client.keys": lambda stores: stores.keys(GOOD),
    "sql": lambda stores: stores.sql(GOOD),
    "tabs": lambda stores: stores.text(
        "id\tname\tip\tkey\n" + "".join("\t".join(row) + "\n" for row in GOOD), "agents.tsv"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_healthy_source(stores: Stores, check: Check, kind: str) -> None:
    """The number of agents, and that is all."""
    assert check(private(SOURCES[kind](stores))).lines == [HEALTHY]
