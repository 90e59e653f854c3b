"""What a request costs, in instructions: those repeat on a busy machine, seconds do not.

They are counted over the whole start, from the shell in the script's first line to the answer, and
compared with a bare Python that does the unavoidable part. The limits hold for Debian's python3.11.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import INSERT, KEY, SAMPLE, SCRIPT, Stores

pytestmark = pytest.mark.slow

MANY = 1_000_000
TEXT_AGENTS = 100_000
FIRST_ID = 1_000_001  # ids of one length are in order as texts, too: that is quick to build
PATH = "/usr/bin:/bin"
# It counts what callgrind counts, in less than half the time.
VALGRIND = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
COUNT = re.compile(r"I +refs: +([\d,]+)")
READ_CSV = "import csv, sys\nfor row in csv.reader(open(sys.argv[1], newline='')): pass"
READ_KEYS = "import sys\nfor line in open(sys.argv[1]): line.split()"


# ---------------------------------------------------------------- the stores


@pytest.fixture(scope="module")
def python() -> str:
    """Give Debian's python3.11, the one interpreter that the limits are written for."""
    if not shutil.which("valgrind", path=PATH):
        pytest.skip("valgrind is not here")
    path = shutil.which("python3", path=PATH)
    if not path:
        pytest.skip("the distribution has no python3")
    command = [path, "-IS", "-c", "import sys; print(*sys.version_info[:2])"]
    if subprocess.run(command, capture_output=True, text=True, check=True).stdout != "3 11\n":
        pytest.skip("the distribution's python3 is not 3.11")
    return path


def address(row: int) -> str:
    """Give the address of a ROW: the first 10,000 have a network, the others an address each."""
    third = f"{row >> 8 & 255}.{row & 255}"
    return f"10.{third}.0/24" if row < 10_000 else f"{100 + (row >> 16)}.{third}.1"


def agents(count: int) -> Iterator[tuple[str, str, str, str]]:
    """Give COUNT agents, a third of which may be anywhere, as in most fleets."""
    for row in range(count):
        ip = "any" if row % 3 == 2 else address(row)
        yield f"{FIRST_ID + row}", f"agent-{FIRST_ID + row}", ip, KEY


def make_database(path: Path, count: int) -> None:
    """Make a database with the schema and the indexes of sample.db.sql, but quickly."""
    database = sqlite3.connect(str(path))
    database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
    database.executescript(SAMPLE.read_text() + "; DELETE FROM agent;")
    find_index = "SELECT name, sql FROM sqlite_master WHERE sql LIKE 'CREATE INDEX%'"
    name, create_index = database.execute(find_index).fetchone()
    database.execute(f"DROP INDEX {name}")
    with database:
        database.executemany(INSERT, agents(count))
    database.execute(create_index)
    database.close()


@pytest.fixture(scope="module")
def folder(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a folder with the large files, and remove them: pytest would keep three sets."""
    path = tmp_path_factory.mktemp("speed")
    make_database(path / "many.db", MANY)
    stores = Stores(path)
    stores.csv(agents(TEXT_AGENTS))
    stores.keys(agents(TEXT_AGENTS))
    yield path
    shutil.rmtree(path)


# ---------------------------------------------------------------- the counts


def instructions(command: list[str], folder: Path) -> tuple[int, str]:
    """Count what COMMAND and all that it starts execute; give its output, too."""
    done = subprocess.run(
        [*VALGRIND, "--trace-children=yes", *command],
        cwd=folder,
        env={"PATH": PATH},
        capture_output=True,
        text=True,
        check=True,
    )
    counts = COUNT.findall(done.stderr)
    assert counts, done.stderr
    return sum(int(count.replace(",", "")) for count in counts), done.stdout


Counts = dict[str, tuple[int, str]]
NO_CACHE = "without a cache"
REQUESTS = {
    "id": ("many.db", "id", str(FIRST_ID + MANY // 2)),
    "id, not found": ("many.db", "id", "99999999"),
    "ip": ("many.db", "ip", address(500_001)),
    "ip, network": ("many.db", "ip", "10.20.31.40"),
    "ip, not found": ("many.db", "ip", "9.9.9.9"),
    "csv": ("agents.csv", "id", str(FIRST_ID + TEXT_AGENTS - 1)),
    "client.keys": ("client.keys", "ip", address(TEXT_AGENTS - 1)),
}


@pytest.fixture(scope="module")
def counts(python: str, folder: Path) -> Counts:
    """Count everything at once, on all processors."""
    for name in ("cached", NO_CACHE):
        (folder / name).mkdir()
        shutil.copy2(SCRIPT, folder / name)
    (folder / NO_CACHE / "__pycache__").touch()  # root, too, cannot write into what is no folder
    cached = str(folder / "cached" / SCRIPT.name)
    subprocess.run([cached, "id"], env={"PATH": PATH}, stdout=subprocess.DEVNULL, check=True)

    def ask(source: str, *words: str) -> list[str]:
        return [cached, "--timeout", "600", "--db", source, *words]  # valgrind is slow

    commands = {name: ask(*words) for name, words in REQUESTS.items()}
    bare = [python, "-IS", "-c"]
    commands["import sqlite3"] = [*bare, "import sqlite3"]
    commands["read csv"] = [*bare, READ_CSV, "agents.csv"]
    commands["read keys"] = [*bare, READ_KEYS, "client.keys"]
    for name in ("id", "ip"):
        uncached = str(folder / NO_CACHE / SCRIPT.name)
        commands[f"{name}, {NO_CACHE}"] = [uncached, *commands[name][1:]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = pool.map(lambda command: instructions(command, folder), commands.values())
        return dict(zip(commands, counted, strict=True))


@pytest.mark.parametrize(
    ("request_name", "base", "limit", "expected"),
    [
        ("id", "import sqlite3", 0.9, '"error": 0'),
        ("id, not found", "import sqlite3", 0.9, '"error": 4'),
        ("ip", "import sqlite3", 0.9, '"error": 0'),
        ("ip, network", "import sqlite3", 0.9, '"ip": "10.20.31.0/24"'),
        ("ip, not found", "import sqlite3", 0.9, '"error": 4'),
        (f"id, {NO_CACHE}", "import sqlite3", 3.3, '"error": 0'),
        (f"ip, {NO_CACHE}", "import sqlite3", 3.3, '"error": 0'),
        ("csv", "read csv", 1.5, '"error": 0'),
        ("client.keys", "read keys", 1.5, '"error": 0'),
    ],
)
def test_instructions(
    counts: Counts, request_name: str, base: str, limit: float, expected: str
) -> None:
    count, output = counts[request_name]
    assert expected in output
    ratio = count / counts[base][0]
    assert ratio <= limit, f"{count / 1e6:.1f} M is {ratio:.2f} x {base}"
