"""What all tests share: the script, the interpreters, stores of every kind, and a caller."""

from __future__ import annotations

import csv
import functools
import glob
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import database_servers
import pytest
from database_servers import MariaDB, PostgreSQL
from manager import Answer, check_answer, run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "agent_key_request.py"
SAMPLE = ROOT / "sample.db.sql"
SUPPORTED = range(6, 14)  # the minor versions of CPython 3 that the script promises
KEY = "ac575526e8bbcbcf1d2b7a6e5c4d3f2a1b0c9d8e7f60514233241506a7b8c9d0"

PLAIN_SCHEMA = (
    "CREATE TABLE agent (id varchar(8), name varchar(128), ip varchar(19), agent_key varchar(128))"
)
UNTYPED_SCHEMA = "CREATE TABLE agent (id, name, ip, agent_key)"  # keeps numbers as numbers


class Record(NamedTuple):
    """One agent; a field may be of any type that a source can hold."""

    id: Any = "001"
    name: Any = "my_agent"
    ip: Any = "192.168.1.100"
    key: Any = KEY


class Python(NamedTuple):
    """One interpreter that the script must run under."""

    path: str
    version: str


@functools.cache
def interpreters() -> tuple[Python, ...]:
    """Find every supported CPython here, or those that AGENT_KEY_PYTHONS names.

    The first one is the default: the distribution's own, where there is one.
    """
    named = os.environ.get("AGENT_KEY_PYTHONS", "").split()
    found: dict[str, Python] = {}
    for candidate in named or _candidates():
        python = _probe(candidate)
        if python is not None:
            found.setdefault(os.path.realpath(python.path), python)
        elif named:
            raise pytest.UsageError(f"AGENT_KEY_PYTHONS: {candidate} is not a supported CPython")
    return tuple(found.values())


def _candidates() -> Iterator[str]:
    """Give the paths where an interpreter may be: the system's, pyenv's, then PATH."""
    system = shutil.which("python3", path=os.defpath)
    if system:
        yield system
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], stdout=subprocess.PIPE, text=True, check=True)
        yield from sorted(glob.glob(root.stdout.strip() + "/versions/*/bin/python3"))
    for minor in SUPPORTED:
        path = shutil.which(f"python3.{minor}")
        if path:
            yield path


def _probe(path: str) -> Python | None:
    """Ask the interpreter at PATH for its own path and version; None where it will not do."""
    code = "import sys; print(sys.executable, sys.version.split()[0], *sys.version_info[:2])"
    command = [path, "-IS", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.fullmatch(r"(.+) (\S+) 3 (\d+)\n", done.stdout)
    if done.returncode or not match or int(match[3]) not in SUPPORTED:
        return None
    return Python(match[1], match[2])


class Caller:
    """Calls the script as the manager does, with one interpreter."""

    def __init__(self, python: Python, folder: Path) -> None:
        """Make the folder that PATH leads to, with PYTHON as its only `python3`."""
        self.python = python
        self.folder = folder / "elsewhere"
        self.folder.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "python3").symlink_to(python.path)
        self.path = f"{self.bin}:{os.defpath}"

    def command(self, style: str = "exec", script: str | Path = SCRIPT) -> list[str]:
        """Give the words before the request, in one of the styles that an exec_path may have."""
        return {
            "exec": [str(script)],
            "python": [self.python.path, str(script)],
            "isolated": [self.python.path, "-IS", str(script)],
        }[style]

    def call(
        self,
        *words: str | bytes | Path,
        style: str = "exec",
        script: str | Path = SCRIPT,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
        **how: Any,
    ) -> Answer:
        """Call with WORDS; ENV comes on top of PATH. See `manager.run` for the rest."""
        command = [*self.command(style, script), *words]
        environment = {"PATH": self.path, **(env or {})}
        return run(command, cwd=cwd or self.folder, env=environment, **how)

    def __call__(
        self, *words: str | bytes | Path, db: str | bytes | Path | None = None, **how: Any
    ) -> Answer:
        """Ask for WORDS from the source DB, and check what holds for every answer."""
        options = ["--db", db] if db is not None else []
        return check_answer(self.call(*options, *words, **how))


class Stores:
    """Makes key sources of every kind in one folder."""

    def __init__(self, folder: Path) -> None:
        """Take the FOLDER for the files."""
        self.folder = folder

    def sqlite(
        self,
        rows: Iterable[Sequence[Any]] = (Record(),),
        schema: str = PLAIN_SCHEMA,
        name: str | bytes = "agents.db",
    ) -> Path:
        """Make a database of ROWS; SCHEMA is any script that makes the table `agent`."""
        path = self.folder / os.fsdecode(name)
        database = sqlite3.connect(str(path))
        with database:
            database.executescript(schema)
            insert = "INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)"
            database.executemany(insert, rows)
        database.close()
        return path

    def indexed(self, rows: Iterable[Sequence[Any]] = (Record(),)) -> Path:
        """Make a database with the schema and the indexes of sample.db.sql."""
        return self.sqlite(rows, SAMPLE.read_text() + ";DELETE FROM agent;")

    def csv(self, rows: Iterable[Sequence[Any]] = (Record(),), name: str = "agents.csv") -> Path:
        """Make a comma-separated file of ROWS with the usual header."""
        path = self.folder / name
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "name", "ip", "key"])
            writer.writerows(rows)
        return path

    def keys(self, rows: Iterable[Sequence[Any]] = (Record(),), name: str = "client.keys") -> Path:
        """Make a manager's client.keys of ROWS."""
        return self.text("".join("{} {} {} {}\n".format(*row) for row in rows), name)

    def sql(self, rows: Iterable[Sequence[Any]] = (Record(),), name: str = "agents.sql") -> Path:
        """Make an SQL script that makes a table of ROWS."""
        database = sqlite3.connect(":memory:")
        database.executescript(PLAIN_SCHEMA)
        database.executemany("INSERT INTO agent VALUES (?, ?, ?, ?)", rows)
        script = "\n".join(database.iterdump())
        database.close()
        return self.text(script, name)

    def make(self, kind: str, rows: Iterable[Sequence[Any]] = (Record(),)) -> Path:
        """Make a source of ROWS, of the KIND that is the name of one of the methods above."""
        makers: dict[str, Callable[[Iterable[Sequence[Any]]], Path]] = {
            "sqlite": self.sqlite,
            "indexed": self.indexed,
            "csv": self.csv,
            "keys": self.keys,
            "sql": self.sql,
        }
        return makers[kind](rows)

    def text(self, content: str | bytes, name: str) -> Path:
        """Make a file with exactly this CONTENT."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    """Makes sources in a folder of their own."""
    folder = tmp_path / "stores"
    folder.mkdir()
    return Stores(folder)


@pytest.fixture
def ask(tmp_path: Path) -> Caller:
    """Call the script with the default interpreter."""
    return Caller(interpreters()[0], tmp_path)


@pytest.fixture(params=interpreters(), ids=lambda python: python.version)
def interpreter(request: pytest.FixtureRequest) -> Python:
    """Each interpreter in turn."""
    python: Python = request.param
    return python


@pytest.fixture
def ask_each(interpreter: Python, tmp_path: Path) -> Caller:
    """Call the script with each interpreter in turn."""
    return Caller(interpreter, tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder that an unprivileged user can get into (pytest's own is private)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def nobody() -> int:
    """Give the user id of an unprivileged user that root can become."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    return pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def locked() -> Iterator[Callable[[Path], None]]:
    """Hold an exclusive lock on a database until the test ends."""
    holders: list[sqlite3.Connection] = []

    def lock(path: Path) -> None:
        holder = sqlite3.connect(str(path), isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        holders.append(holder)

    yield lock
    for holder in holders:
        holder.close()


DatabaseServer = TypeVar("DatabaseServer", bound=database_servers.Server)


def _running(server: DatabaseServer | None, reason: str) -> Iterator[DatabaseServer]:
    """Give a database server and take it away again, or skip the test and say why."""
    if server is None:
        pytest.skip(reason)
    yield server
    server.remove()


@pytest.fixture(scope="module")
def mariadb() -> Iterator[MariaDB]:
    """A MariaDB server for all tests of a file."""
    yield from _running(*database_servers.start_mariadb())


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server for all tests of a file."""
    yield from _running(*database_servers.start_postgresql())
