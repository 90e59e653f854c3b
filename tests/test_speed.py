"""What a request costs, in instructions, and how much there is to read in the one file.

Instructions repeat on a noisy machine, seconds do not. The limits are ratios to a bare start of
Python that does the unavoidable part, and hold for Debian's python3.11.
"""

from __future__ import annotations

import ast
import concurrent.futures
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import KEY, SAMPLE, SCRIPT, Stores

LINES = 700  # for everything the project will ever hold in the one file
COLUMNS = 100
FUNCTION_LINES = 40

MANY = 1_000_000
FEW = 1_000
NETWORKS = 10_000
ANYWHERE = 100_000  # rows among the many with `any`, as most fleets have them
TEXT_AGENTS = 100_000
SAME = 1.03  # the depth of the index may show, nothing else

COUNT = re.compile(r"Collected : (\d+)")
READ_CSV = "import csv, sys\nfor row in csv.reader(open(sys.argv[1], newline='')): pass"
READ_KEYS = "import sys\nfor line in open(sys.argv[1]): line.split()"


# ---------------------------------------------------------------- the file


@pytest.mark.xfail(strict=True, reason="twice its cap with everything in it")
def test_the_file_stays_small() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= LINES


def test_no_line_is_too_long() -> None:
    lines = enumerate(SCRIPT.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > COLUMNS] == []


def test_no_function_is_too_long() -> None:
    """In the room too that is a text to Python until it is needed."""
    text = SCRIPT.read_text()
    marks = re.compile(r"^LATER_ROOM = .*, r'''\n|^'''  # end of LATER_ROOM\n", re.MULTILINE)
    plain = marks.sub("", text)
    assert len(plain.splitlines()) == len(text.splitlines()) - 2
    functions = [
        node
        for node in ast.walk(ast.parse(plain))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert functions
    long = {
        function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions
    }
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES} == {}


# ---------------------------------------------------------------- the stores


@pytest.fixture(scope="module")
def python() -> str:
    """Give Debian's python3.11, the one interpreter that the limits are written for."""
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not here")
    path = shutil.which("python3", path=os.defpath)
    if not path:
        pytest.skip("the distribution has no python3")
    command = [path, "-IS", "-c", "import sys; print(*sys.version_info[:2])"]
    if subprocess.run(command, capture_output=True, text=True, check=True).stdout != "3 11\n":
        pytest.skip("the distribution's python3 is not 3.11")
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a folder for the large files, and remove them: pytest would keep three sets."""
    path = tmp_path_factory.mktemp("speed")
    yield path
    shutil.rmtree(path)


def single(row: int) -> str:
    """Give the address of a ROW that has one of its own."""
    return f"{100 + (row >> 16)}.{row >> 8 & 255}.{row & 255}.1"


def network(row: int, host: int = 0) -> str:
    """Give the network of a ROW, all of them under 10.0.0.0/8."""
    return f"10.{row >> 8}.{row & 255}.{host}/24"


def agents(count: int, networks: int, anywhere: int) -> Iterator[tuple[str, str, str, str]]:
    """Give COUNT agents: the NETWORKS first, those that may be ANYWHERE next, then single ones."""
    for row in range(count):
        ip = "any" if row < networks + anywhere else single(row)
        if row < networks:
            ip = network(row)
        yield f"{row + 1:03}", f"agent-{row + 1}", ip, KEY


def make_database(path: Path, count: int, networks: int, anywhere: int) -> Path:
    """Make a database with the schema and the indexes of sample.db.sql."""
    database = sqlite3.connect(str(path))
    database.executescript(SAMPLE.read_text() + "; DELETE FROM agent;")
    insert = "INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)"
    with database:
        database.executemany(insert, agents(count, networks, anywhere))
    database.close()
    return path


@pytest.fixture(scope="session")
def many(folder: Path) -> Path:
    """Make a million rows, ten thousand of them networks."""
    return make_database(folder / "many.db", MANY, NETWORKS, ANYWHERE)


@pytest.fixture(scope="session")
def many_with_host_bits(folder: Path, many: Path) -> Path:
    """Make the same million rows, with host bits set in every network."""
    path = folder / "host-bits.db"
    shutil.copy(many, path)
    database = sqlite3.connect(str(path))
    with database:
        database.executemany(
            "UPDATE agent SET ip = ? WHERE ip = ?",
            ((network(row, 1 + row % 254), network(row)) for row in range(NETWORKS)),
        )
    database.close()
    return path


@pytest.fixture(scope="session")
def few(folder: Path) -> Path:
    """Make a thousand rows, ten of them networks."""
    return make_database(folder / "few.db", FEW, 10, 100)


# ---------------------------------------------------------------- the counts


def instructions(command: list[str]) -> tuple[int, str]:
    """Count what COMMAND executes; give its output too."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run([*valgrind, *command], capture_output=True, text=True, check=True)
    match = COUNT.search(done.stderr)
    assert match, done.stderr
    return int(match[1]), done.stdout


Counts = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def counts(python: str, folder: Path, many: Path, many_with_host_bits: Path, few: Path) -> Counts:
    """Count everything at once, on all processors."""
    texts = Stores(folder)
    csv = str(texts.csv(agents(TEXT_AGENTS, 100, 0)))
    keys = str(texts.keys(agents(TEXT_AGENTS, 100, 0)))
    bare = [python, "-IS", "-c"]

    def ask(source: Path | str, *words: str) -> list[str]:
        return [python, "-IS", str(SCRIPT), "--db", str(source), *words]

    commands = {
        "sqlite": [*bare, "import sqlite3"],
        "id": ask(many, "id", "500000"),
        "id, not found": ask(many, "id", "99999999"),
        "id, few": ask(few, "id", "500"),
        "id, not found, few": ask(few, "id", "99999999"),
        "ip": ask(many, "ip", single(500_000)),
        "ip, few": ask(few, "ip", single(500)),
        "network": ask(many, "ip", "10.20.30.40"),
        "host bits": ask(many_with_host_bits, "ip", "10.20.30.40"),
        "ip, not found": ask(many, "ip", "9.9.9.9"),
        "read csv": [*bare, READ_CSV, csv],
        "csv, id": ask(csv, "id", "99999"),
        "csv, id, not found": ask(csv, "id", "99999999"),
        "csv, ip": ask(csv, "ip", single(99_998)),
        "read keys": [*bare, READ_KEYS, keys],
        "keys, id": ask(keys, "id", "99999"),
        "keys, id, not found": ask(keys, "id", "99999999"),
        "keys, ip": ask(keys, "ip", single(99_998)),
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(commands, pool.map(instructions, commands.values()), strict=True))


LIMITS = [
    ("id", "sqlite", 1.6, '"id": "500000"'),
    ("id, not found", "sqlite", 1.6, '"error": 4'),
    ("id, few", "sqlite", 1.6, '"id": "500"'),
    ("id, not found, few", "sqlite", 1.6, '"error": 4'),
    ("id", "id, few", SAME, '"error": 0'),
    ("id, not found", "id, not found, few", SAME, '"error": 4'),
    ("ip", "sqlite", 1.7, '"id": "500001"'),
    ("ip", "ip, few", SAME, '"error": 0'),
    ("network", "sqlite", 2.2, '"ip": "10.20.30.0/24"'),
    ("host bits", "sqlite", 4.0, '"id": "5151"'),
    ("ip, not found", "sqlite", 4.0, '"error": 4'),
    ("csv, id", "read csv", 1.5, '"id": "99999"'),
    ("csv, id, not found", "read csv", 1.5, '"error": 4'),
    ("csv, ip", "read csv", 1.5, '"id": "99999"'),
    ("keys, id", "read keys", 1.5, '"id": "99999"'),
    ("keys, id, not found", "read keys", 1.5, '"error": 4'),
    ("keys, ip", "read keys", 1.5, '"id": "99999"'),
]


@pytest.mark.parametrize(
    ("request_name", "base", "limit", "expected"),
    LIMITS,
    ids=[f"{name} / {base}" for name, base, _limit, _expected in LIMITS],
)
def test_instructions(
    counts: Counts, request_name: str, base: str, limit: float, expected: str
) -> None:
    count, output = counts[request_name]
    assert expected in output
    ratio = count / counts[base][0]
    assert ratio <= limit, f"{count / 1e6:.1f} M is {ratio:.2f} x {base}"
