"""What all tests share: the script, the interpreters, stores of every kind, and a caller."""

from __future__ import annotations

import csv
import faulthandler
import functools
import glob
import importlib.machinery
import importlib.util
import os
import pwd
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import pytest
from manager import Answer, check_answer, run

ROOT = Path(__file__).resolve().parent.parent
# A broken copy may be named, to see the tests fail; it keeps the script's name, in another folder.
SCRIPT = Path(os.environ.get("AGENT_KEY_SCRIPT") or ROOT / "agent_key_request.py").resolve()
SAMPLE = ROOT / "sample.db.sql"
SUPPORTED = range(6, 16)  # the minor versions of CPython 3 that the script promises
KEY = "ac575526e8bbcddf6654e5aa0a39fa60a0020e5d34ed1370916368bdaf5f0c71"  # the documentation's

PLAIN_SCHEMA = (
    "CREATE TABLE agent (id VARCHAR(8), name VARCHAR(128), ip VARCHAR(64), agent_key VARCHAR(128))"
)
UNTYPED_SCHEMA = "CREATE TABLE agent (id, name, ip, agent_key)"  # keeps numbers as numbers
INSERT = "INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)"


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks, and end in order at SIGTERM: nothing that a test has started stays behind."""
    if sys.version_info < (3, 11):  # noqa: UP036 - pytest runs with older ones, too
        raise pytest.UsageError("the tests need Python 3.11 or later (the script does not)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes seconds: many rows, a load, a whole build")
    config.addinivalue_line("markers", "limit(seconds): the test may take longer than others")
    global _stderr  # pytest's own: while a test runs, descriptor 2 is a file
    _stderr = os.dup(2)


# ---------------------------------------------------------------- an end for every test

# Seconds for each of set-up, test and tear-down. `limit` and `slow` tests have more.
TEST_SECONDS = float(os.environ.get("AGENT_KEY_TEST_SECONDS", "120"))
SLOW_TEST_SECONDS = 10 * TEST_SECONDS
AGAIN_SECONDS = 30.0  # after that long, a test that has swallowed its end gets another
GRACE_SECONDS = 60.0  # after that long, the whole process ends
_stderr = 2


def _seconds_of(item: pytest.Item) -> float:
    """Return how long each phase of a test may take."""
    mark = item.get_closest_marker("limit")
    if mark:
        return float(mark.args[0])
    if item.get_closest_marker("slow"):
        return SLOW_TEST_SECONDS
    return TEST_SECONDS


def _end(_number: int, _frame: FrameType | None) -> None:
    """Handle the alarm. It is one function, so that a test can see that the handler is the same."""
    pytest.fail("this did not end in time; the traceback tells where it was")


def _with_an_end(item: pytest.Item) -> Generator[None]:
    """Fail a phase of a test that does not end; the traceback tells where it was.

    The alarm reaches whatever Python code runs. A test that waits inside C code, or that uses the
    alarm itself, is ended with the whole process.
    """
    seconds = _seconds_of(item)
    before = signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=_stderr)
    try:
        yield
    finally:
        _stop_the_clock()
        signal.signal(signal.SIGALRM, before)


def _stop_the_clock() -> None:
    """Let the test take as long as it wants."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Set an end for the fixtures."""
    yield from _with_an_end(item)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Set an end for the test."""
    yield from _with_an_end(item)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Set an end for the clean-up."""
    yield from _with_an_end(item)


def pytest_enter_pdb() -> None:
    """Let a person look around."""
    _stop_the_clock()


# ---------------------------------------------------------------- what is reported


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell why tests were skipped: one line for each reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        reasons[str(reason).removeprefix("Skipped: ")] += 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")


def octal(mode: int) -> str:
    """Return the permissions in a file's MODE as people write them: `0640`."""
    return f"{stat.S_IMODE(mode):04o}"


def mode_of(path: str | Path) -> str:
    """Return the permissions of a file in octal, so that a failed comparison can be read."""
    return octal(os.stat(path).st_mode)


# ---------------------------------------------------------------- the script as a module


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles each time: the cache beside the script is the script's own business."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_script(path: str | Path = SCRIPT) -> ModuleType:
    """Import a script as a module of its own: as such it does nothing and has everything."""
    loader = _Loader("agent_key_request", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


script: Any = load_script()  # `from conftest import script`; tests replace parts of it


# ---------------------------------------------------------------- the interpreters


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
    """Find one of each supported CPython here, or those that AGENT_KEY_PYTHONS names.

    The first one is the default: the distribution's own, where there is one.
    """
    named = os.environ.get("AGENT_KEY_PYTHONS", "").split()
    found: dict[str, Python] = {}
    for candidate in named or _candidates():
        python = _probe(candidate)
        if python is not None:
            found.setdefault(candidate if named else python.version.rpartition(".")[0], python)
        elif named:
            raise pytest.UsageError(f"AGENT_KEY_PYTHONS: {candidate} is not a supported CPython")
    return tuple(found.values())


def _candidates() -> Iterator[str]:
    """Give the paths where an interpreter may be: the system's, pyenv's, then others."""
    for path in shutil.which("python3", path=os.defpath), shutil.which("python3"):
        if path:
            yield path
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], stdout=subprocess.PIPE, text=True, check=True)
        yield from sorted(glob.glob(root.stdout.strip() + "/versions/*/bin/python3"))
    for minor in SUPPORTED:
        path = shutil.which(f"python3.{minor}")
        if path:
            yield path
    yield from sorted(glob.glob(f"{ROOT}/.pythons/usr/bin/python3.??"))  # .ci/newer-pythons


def _probe(path: str) -> Python | None:
    """Ask the interpreter at PATH for its own path and version; None where it will not do."""
    code = "import sys; print(sys.executable, sys.version.split()[0], *sys.version_info[:2])"
    command = [path, "-IS", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.fullmatch(r"(.+) (\S+) 3 (\d+)\n", done.stdout)
    if done.returncode or not match or int(match[3]) not in SUPPORTED:
        return None
    return Python(match[1], match[2])


@pytest.fixture(params=interpreters(), ids=lambda python: python.version)
def interpreter(request: pytest.FixtureRequest) -> Python:
    """Each interpreter in turn."""
    python: Python = request.param
    return python


# ---------------------------------------------------------------- a caller


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


@pytest.fixture
def ask(tmp_path: Path) -> Caller:
    """Call the script with the default interpreter."""
    return Caller(interpreters()[0], tmp_path)


@pytest.fixture
def ask_each(interpreter: Python, tmp_path: Path) -> Caller:
    """Call the script with each interpreter in turn."""
    return Caller(interpreter, tmp_path)


# ---------------------------------------------------------------- sources


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
            database.executemany(INSERT, rows)
        database.close()
        return path

    def untyped(self, rows: Iterable[Sequence[Any]] = (Record(),)) -> Path:
        """Make a database that keeps every value of ROWS as the type that it is."""
        return self.sqlite(rows, UNTYPED_SCHEMA)

    def indexed(self, rows: Iterable[Sequence[Any]] = (Record(),)) -> Path:
        """Make a database with the schema and the indexes of sample.db.sql."""
        return self.sqlite(rows, SAMPLE.read_text() + "; DELETE FROM agent;")

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
        database.executemany(INSERT, rows)
        content = "\n".join(database.iterdump())
        database.close()
        return self.text(content, name)

    def make(self, kind: str, rows: Iterable[Sequence[Any]] = (Record(),)) -> Path:
        """Make a source of ROWS, of the KIND that is the name of one of the methods above."""
        makers: dict[str, Callable[[Iterable[Sequence[Any]]], Path]] = {
            "sqlite": self.sqlite,
            "untyped": self.untyped,
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


def half(path: Path) -> Path:
    """Cut a file in the middle."""
    os.truncate(path, path.stat().st_size // 2)
    return path


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


# ---------------------------------------------------------------- other users


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder that an unprivileged user can get into (pytest's own is private)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def open_script(open_folder: Path) -> Path:
    """Give a copy of the script that every user can start, wherever the checkout is."""
    return Path(shutil.copy2(SCRIPT, open_folder / SCRIPT.name))


@pytest.fixture
def nobody() -> int:
    """Give the user id of an unprivileged user that root can become."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    return pwd.getpwnam("nobody").pw_uid
