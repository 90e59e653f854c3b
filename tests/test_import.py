"""`--import` makes the store, all of it or nothing, and replaces nothing but its own work.

Most of it runs in a fork of the tests: the whole program, without an interpreter's start.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, Caller, Record, Stores, half, script
from serving import Load, records, serving, until

LIMIT = 120.0  # seconds for one import, on a very busy machine
SECRET = "S3cr3t" * 9  # a key that no message may show; no id or address looks like it
GOOD = [
    Record("001", "my_agent", "192.168.1.100", KEY),
    Record("002", "laptop", "any", "k" * 127),
    Record("003", "office", "10.20.30.0/24", "a key with spaces"),
    Record("004", "gateway", "10.20.0.0/16", 'quote " and back\\slash'),
    Record("005", "web-v6", "2001:db8::10", "semi;colon,comma"),
    Record("12345678", "A.b_c-9", "2001:db8:1::/48", "~"),
]
OLD = [Record("900", "the-old-store", "172.16.0.1", "0ld-key")]
REQUESTS = [
    *(["id", record.id] for record in GOOD),
    ["id", "006"],
    *(["ip", ip] for ip in ("192.168.1.100", "10.20.30.99", "10.20.31.99", "2001:DB8:0::10")),
    *(["ip", ip] for ip in ("2001:db8:1:2::3", "8.8.8.8")),
]


# ---------------------------------------------------------------- the program in a fork


class Said(NamedTuple):
    """How a command ended, and what it told."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it told on standard error."""
        return self.err.splitlines()


def nothing(*_: object) -> None:
    """Do nothing."""


class Child:
    """The script's whole program in a fork of this process."""

    def __init__(
        self,
        *arguments: str | Path,
        before: Callable[[], object] = nothing,
        stdin: int | bytes = b"",
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        """Start it with ARGUMENTS; BEFORE is called in the fork; the others are descriptors."""
        self.files = [tempfile.TemporaryFile() for _ in range(3)]
        if isinstance(stdin, bytes):
            self.files[0].write(stdin)
            self.files[0].seek(0)
        descriptors = [file.fileno() for file in self.files]
        for place, given in enumerate((stdin, stdout, stderr)):
            if isinstance(given, int):
                descriptors[place] = given
        self.end, mine = os.pipe()  # at its end when the fork is
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                for place, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, place)
                gc.freeze()  # the parent's databases: to close one would close a file of ours
                os.closerange(3, mine)  # or it would hold the other end of its own pipes
                os.closerange(mine + 1, 1024)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the tests have set
                os.fsync = nothing  # a busy disk takes long
                try:
                    before()
                    os._exit(script.main(*script.begin([os.fspath(word) for word in arguments])))
                except BaseException:
                    os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os.close(mine)
        self.ended = False

    def wait(self) -> Said:
        """Wait for its end; it tells no key, and has met nothing that is unforeseen."""
        if not select.select([self.end], [], [], LIMIT)[0]:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.ended = True
        texts = []
        for file in self.files[1:]:
            file.seek(0)
            texts.append(file.read().decode("ascii"))
        self.close()
        for word in "Traceback", "Internal error", KEY, SECRET:
            assert word not in "".join(texts)
        return Said(os.waitstatus_to_exitcode(status), *texts)

    def close(self) -> None:
        """Leave nothing of it."""
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.ended = True
        if self.files:
            os.close(self.end)
        while self.files:
            self.files.pop().close()


def forked(*arguments: str | Path, **how: Any) -> Said:
    """Run the program in a fork to its end."""
    child = Child(*arguments, **how)
    try:
        return child.wait()
    finally:
        child.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """Start imports that are gone when the test ends."""
    children: list[Child] = []

    def begin(*arguments: str | Path, **how: Any) -> Child:
        children.append(Child(*arguments, **how))
        return children[-1]

    yield begin
    for child in children:
        child.close()


# ---------------------------------------------------------------- stores and what is in them


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Give the place of the store: alone in its folder, and not there yet."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder / "agents.db"


@pytest.fixture
def old_store(stores: Stores, store: Path) -> Path:
    """Make a store with one old agent, which an import shall replace."""
    imported(store, stores.csv(OLD, "old.csv"))
    return store


def rows(store: Path) -> list[tuple[Any, ...]]:
    """The agents in the store, by id; the database must be sound."""
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return database.execute("SELECT id, name, ip, agent_key FROM agent ORDER BY id").fetchall()


def beside(store: Path) -> set[str]:
    """The names of the files beside the store."""
    return set(os.listdir(store.parent)) - {store.name}


def seen(path: Path) -> Any:
    """All that must not change: of a file, or of a folder and what is in it."""
    status = path.lstat()
    told = [path, status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_nlink]
    if stat.S_ISDIR(status.st_mode):
        return [*told, *map(seen, sorted(path.iterdir()))]
    if stat.S_ISLNK(status.st_mode):
        return [*told, os.readlink(path)]
    if stat.S_ISREG(status.st_mode):
        return [*told, status.st_mtime_ns, path.read_bytes()]
    return told


def imported(store: Path, source: str | Path, *options: str, **how: Any) -> Said:
    """Import SOURCE, which must go well, tell nothing, and leave nothing but the store."""
    said = forked("--db", store, "--import", source, *options, **how)
    assert said.status == 0 and said.out == "" and (said.err == "" or "-v" in options), said
    assert beside(store) == set()
    return said


def refused(store: Path, source: str | Path, *options: str, **how: Any) -> Said:
    """Import SOURCE, which must fail, say so, and leave the store and its folder as they are."""
    before = seen(store.parent)
    said = forked("--db", store, "--import", source, *options, **how)
    assert said.status == 1 and said.out == "", said
    assert said.lines and said.lines[-1].startswith("agent_key_request: error: "), said
    assert seen(store.parent) == before
    return said


def answer(source: Path, words: list[str]) -> dict[str, Any]:
    """Answer a request from SOURCE."""
    reply = script.answer(words, lambda: script.open_source(str(source), LIMIT))
    return dict(json.loads(reply.line()))


def tabs(agents: Iterable[Sequence[str]]) -> str:
    """What `mysql --batch` writes."""
    lines = ["\t".join(row).replace("\\", "\\\\") + "\n" for row in agents]
    return "id\tname\tip\tagent_key\n" + "".join(lines)


KINDS: dict[str, Callable[[Stores], Path]] = {
    "csv": lambda stores: stores.csv(GOOD),
    "tabs": lambda stores: stores.text(tabs(GOOD), "agents.tsv"),
    "client.keys": lambda stores: stores.keys(GOOD),
    "sqlite": lambda stores: stores.sqlite(GOOD, name="source.db"),
    "sql": lambda stores: stores.sql(GOOD),
}


# ---------------------------------------------------------------- what is imported


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_holds_what_the_source_holds(stores: Stores, store: Path, kind: str) -> None:
    """First into nothing, then over another; and the answers are the source's."""
    source = KINDS[kind](stores)
    imported(store, source)
    assert rows(store) == GOOD
    imported(store, stores.csv(OLD, "other.csv"))
    assert rows(store) == OLD
    imported(store, source)
    assert rows(store) == GOOD
    for words in REQUESTS:
        assert answer(store, list(words)) == answer(source, list(words)), words


@pytest.mark.parametrize("kind", ["csv", "tabs", "client.keys"])
def test_standard_input(stores: Stores, store: Path, kind: str) -> None:
    imported(store, "-", stdin=KINDS[kind](stores).read_bytes())
    assert rows(store) == GOOD


def test_under_each_interpreter(ask_each: Caller, stores: Stores, store: Path) -> None:
    """A real process, as cron starts it; over a store that is there, too."""
    for agents in (OLD, GOOD):
        words = [*ask_each.command(), "--db", store, "--import", stores.csv(agents)]
        done = subprocess.run(words, env={"PATH": ask_each.path}, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert rows(store) == agents
    assert beside(store) == set()


def test_what_the_store_is(stores: Stores, store: Path) -> None:
    """A table with three plain indexes, marked as an import's work."""
    imported(store, stores.csv(GOOD))
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        query = "SELECT type, name, tbl_name FROM sqlite_master ORDER BY name"
        assert database.execute(query).fetchall() == [
            ("table", "agent", "agent"),
            *(("index", f"agent_{field}", "agent") for field in ("id", "ip", "name")),
        ]
        assert database.execute("PRAGMA application_id").fetchone() == (0x414B5251,)  # for ever
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


CANONICAL = [  # #: the number of the agent
    ("", "any"),
    ("ANY", "any"),
    ("0.0.0.0/0", "any"),
    (" 10.#.0.5 ", "10.#.0.5"),
    ("10.#.0.5/32", "10.#.0.5"),
    ("10.#.0.5/24", "10.#.0.0/24"),
    ("10.#.0.5/255.255.0.0", "10.#.0.0/16"),
    ("::ffff:10.#.0.5", "10.#.0.5"),
    ("::FFFF:10.#.0.5/120", "10.#.0.0/24"),
    ("2001:DB8:#:0::0001", "2001:db8:#::1"),
    ("2001:db8:#::1/128", "2001:db8:#::1"),
    ("2001:db8:#:2::3/48", "2001:db8:#::/48"),
    ("2001:db8:0:#::1", "2001:db8:0:#::1"),
    ("2001:db8:0:#::1", "2001:db8:0:#::1"),
]


def test_addresses_are_written_in_one_spelling(stores: Stores, store: Path) -> None:
    """So that requests find them; and what is not the same is not taken for it."""
    agents = [
        [Record(str(n), f"a{n}", ip.replace("#", str(n)), "k") for ip in ips]
        for n, ips in enumerate(CANONICAL, 100)
    ]
    imported(store, stores.csv([given for given, _ in agents]))
    assert rows(store) == [right for _, right in agents]


def test_ids_and_padding_and_types_are_mended(stores: Stores, store: Path) -> None:
    agents = [
        ("1", "a", None, "k"),
        (" 02 ", " b ", "any", " k "),
        (3, "c", "any", b"blob"),
        (b"004", "d", b"10.0.0.1", "k"),
        (5.0, "e", "any", 7),
        (1000, "f", "any", "k"),
    ]
    imported(store, stores.untyped(agents))
    assert rows(store) == [
        ("001", "a", "any", "k"),
        ("002", "b", "any", "k"),
        ("003", "c", "any", "blob"),
        ("004", "d", "10.0.0.1", "k"),
        ("005", "e", "any", "7"),
        ("1000", "f", "any", "k"),
    ]


def test_what_many_agents_may_have(stores: Stores, store: Path) -> None:
    """`any`, the same key, an address within a network, networks within networks."""
    ips = [
        "any",
        "",
        "ANY",
        "10.0.0.0/8",
        "10.0.0.0/16",
        "10.0.0.0/24",
        "10.0.0.0",
        "10.0.0.1",
        "2001:db8:0:1::1",
        "2001:db8:0:2::1",
        "64::/64",
        "64::",
    ]
    imported(store, stores.csv([(f"{n:03d}", f"a{n}", ip, "k") for n, ip in enumerate(ips, 1)]))
    assert len(rows(store)) == len(ips)


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "001 !gone any k\n"], ids=repr)
def test_client_keys_without_agents(stores: Stores, old_store: Path, text: str) -> None:
    """A fresh manager's: it holds no agents, so then does the store."""
    imported(old_store, stores.text(text, "client.keys"))
    assert rows(old_store) == []


def test_removed_agents_stay_behind(stores: Stores, store: Path) -> None:
    """MANAGER.md: they keep their line, and an id may come again."""
    text = f"# a comment\n 001 a any k\n001 !removed any k\n001 my_agent any {KEY}\n002 #b any k\n"
    imported(store, stores.text(text, "client.keys"))
    assert rows(store) == [("001", "my_agent", "any", KEY)]


NAMES = ["a b", "50%", "what?x=1", "ü", "#1", "a:b", "new\nline", "'", b"\xff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_files(stores: Stores, store: Path, name: str | bytes) -> None:
    """Neither a source's nor a store's is taken for anything but a name."""
    text = os.fsdecode(name)
    strange = store.with_name(text)
    for source in (stores.csv(GOOD, text), stores.sqlite(GOOD, name=text + ".db")):
        imported(strange, source)
        assert rows(strange) == GOOD
        assert answer(strange, ["id", "001"])["error"] == 0


def test_the_source_may_be_the_store(stores: Stores, store: Path) -> None:
    imported(store, stores.csv(GOOD))
    imported(store, store)
    assert rows(store) == GOOD


def test_the_environment_names_the_store(stores: Stores, store: Path) -> None:
    def before() -> None:
        script.posix.environ[b"AGENT_KEY_DB"] = os.fsencode(store)

    assert forked("--import", stores.csv(GOOD), before=before) == Said(0, "", "")
    assert rows(store) == GOOD


def test_the_store_without_a_name(stores: Stores, tmp_path: Path) -> None:
    """Its one folder is made, for root alone, but not the folder above it."""
    place = tmp_path / "lib" / "agent-key-request" / "agents.db"

    def before() -> None:
        script.posix.environ.pop(b"AGENT_KEY_DB", None)
        script.STORE = str(place)
        os.umask(0)

    assert script.STORE == "/var/lib/agent-key-request/agents.db"
    said = forked("--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and str(place.parent) in said.err and not place.parent.exists()
    place.parent.parent.mkdir()
    for _ in range(2):
        assert forked("--import", stores.csv(GOOD), before=before) == Said(0, "", "")
        assert rows(place) == GOOD and beside(place) == set()
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_any_other_folder_is_not_made(stores: Stores, tmp_path: Path) -> None:
    said = forked("--db", tmp_path / "nowhere" / "a.db", "--import", stores.csv(GOOD))
    assert said.status == 1 and len(said.lines) == 1
    assert f"{tmp_path}/nowhere" in said.err and "No such file" in said.err
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- what is not replaced


def add(store: Path, sql: str) -> None:
    """Run an SQL script in a store that an import made."""
    forked("--db", store, "--import", "-", stdin=tabs(OLD).encode())
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        database.executescript(sql)


def damage(store: Path, size: int, cut: bool = True) -> None:
    """Leave the first bytes of a store of many agents, or break those that follow."""
    imported(store, "-", stdin=tabs(records(2000)).encode())
    if not cut:
        with store.open("r+b") as file:
            file.seek(size)
            file.write(b"\xff" * (store.stat().st_size - size))
    else:
        os.truncate(store, size)


def named_pipe(store: Path) -> None:
    os.mkfifo(store)


def listener(store: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(store))


def device(store: Path) -> None:
    try:
        os.mknod(store, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root can make a device")


def foreign(store: Path, schema: str = PLAIN_SCHEMA) -> None:
    Stores(store.parent).sqlite(OLD, schema, store.name)


def something_else(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        database.execute("CREATE TABLE books (title)")


IN_THE_WAY: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a device": ("regular file|device", device),
    "a folder": ("regular file|folder", lambda store: store.mkdir()),
    "a named pipe": ("regular file|pipe", named_pipe),
    "a socket": ("regular file|socket", listener),
    "somebody's database": ("of somebody's own", foreign),
    "the sample": ("of somebody's own", lambda store: foreign(store, SAMPLE.read_text())),
    "a database of something else": ("of somebody's own", something_else),
    "its own with a table": ("of somebody's own", lambda store: add(store, "CREATE TABLE a(b)")),
    "its own with a view": (
        "of somebody's own",
        lambda store: add(store, "CREATE VIEW a AS SELECT id FROM agent"),
    ),
    "its own without a table": (
        "database",
        lambda store: add(store, "DROP TABLE agent; CREATE TABLE a(b)"),
    ),
    "half of its own": ("damaged", lambda store: damage(store, 40960)),
    "the first page of its own": ("damaged", lambda store: damage(store, 4096)),
    "the head of its own": ("damaged", lambda store: damage(store, 100)),
    "its own with broken pages": ("damaged", lambda store: damage(store, 4096, cut=False)),
    "garbage": ("damaged", lambda store: store.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)),
    "a client.keys": ("no SQLite database", lambda store: store.write_text("001 a any k\n")),
    "a letter": ("no SQLite database", lambda store: store.write_text("Dear all,\n")),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_not_replaced(stores: Stores, store: Path, what: str) -> None:
    """Told before FILE is read: a person waits for nothing."""
    words, put = IN_THE_WAY[what]
    put(store)
    for source in (stores.csv(GOOD), stores.folder / "nowhere.csv"):
        said = refused(store, source)
        assert len(said.lines) == 1 and str(store) in said.err, said
        assert re.search(words, said.err) and "name another --db" in said.err, said


def test_a_device_by_its_name(stores: Stores, tmp_path: Path) -> None:
    """Not /dev/null: a broken script would take it from the whole machine."""
    master, slave = pty.openpty()
    try:
        name = Path(os.ttyname(slave))
        said = forked("--db", name, "--import", stores.csv(GOOD))
        assert said.status == 1 and str(name) in said.err and "regular file" in said.err, said
        (tmp_path / "link").symlink_to(name)
        assert "regular file" in refused(tmp_path / "link", stores.csv(GOOD)).err
        assert name.is_char_device()
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("suffix", ["-journal", "-wal"])
def test_somebody_is_writing(stores: Stores, old_store: Path, suffix: str) -> None:
    """SQLite would take what stands there for a part of the new store."""
    other = Path(f"{old_store}{suffix}")
    for _ in range(2):  # with the database, and without it
        other.write_text("a transaction of the old one")
        said = refused(old_store, stores.csv(GOOD))
        assert str(other) in said.err and "name another --db" in said.err
        old_store.unlink(missing_ok=True)
    other.unlink()
    imported(old_store, stores.csv(GOOD))


def test_a_writer_who_comes_while_it_is_built(stores: Stores, old_store: Path) -> None:
    """What may be replaced is looked at again before it is."""

    def before() -> None:
        copy = script.Report.copy

        def slowly(*arguments: Any) -> None:
            copy(*arguments)
            Path(f"{old_store}-journal").write_text("a transaction")

        script.Report.copy = slowly

    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and "nothing imported" in said.err and "-journal" in said.err
    assert beside(old_store) == {old_store.name + "-journal"}
    assert rows(old_store) == OLD


def test_a_store_that_has_been_in_wal_mode(stores: Stores, old_store: Path) -> None:
    """Its last writer has closed it: nobody is writing."""
    add(old_store, "PRAGMA journal_mode = WAL; UPDATE agent SET name = 'changed'")
    assert beside(old_store) == set()
    imported(old_store, stores.csv(GOOD))
    assert rows(old_store) == GOOD


def test_an_empty_file_is_replaced(stores: Stores, store: Path) -> None:
    store.touch(0o640)
    store.chmod(0o640)
    imported(store, stores.csv(GOOD))
    assert rows(store) == GOOD
    assert stat.S_IMODE(store.stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["mysql://root:pw@localhost/agents", "agents.sql", "./agents.sql"])
def test_a_store_is_an_sqlite_file(stores: Stores, tmp_path: Path, name: str) -> None:
    def before() -> None:
        os.chdir(tmp_path)

    said = forked("--db", name, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and "SQLite" in said.err and "--db" in said.err
    assert "pw" not in said.err
    assert not (tmp_path / "agents.sql").exists()


# ---------------------------------------------------------------- all or nothing


def faults(said: Said) -> list[str]:
    """The lines that tell one fault each."""
    return [line for line in said.lines if line.startswith("error: ")]


def test_every_fault_is_told(stores: Stores, old_store: Path) -> None:
    """Line, agent and what is wrong, in one run: a person repairs the file once."""
    agents = [
        ("001", "one", "10.0.0.1", KEY),
        ("0020", "two", "10.0.0.2", KEY),
        ("003", "three three", "10.0.0.3", ""),
        ("004", "four", "10.0.0.256", KEY),
        (SECRET, "five", "any", KEY),
    ]
    rules = [
        (3, "0020", "id"),
        (4, "003", "name"),
        (4, "003", "key"),
        (5, "004", "ip"),
        (6, "with an id of 54 characters", "id"),
    ]
    source = stores.csv(agents)
    said = refused(old_store, source)
    assert faults(said) == [
        f"error: line {line}: agent {agent}: {script.RULES[field]}" for line, agent, field in rules
    ]
    assert said.lines[len(rules) :] == [
        f"agent_key_request: error: {source}: 5 faults, nothing imported, {old_store} is as it was"
    ]
    said = refused(old_store, stores.untyped(agents))
    assert faults(said) == [
        f"error: row {line - 1}: agent {agent}: {script.RULES[field]}"
        for line, agent, field in rules
    ]
    assert "1 fault, nothing imported" in refused(old_store, stores.csv(agents[:2])).err


@pytest.mark.parametrize("count", [99, 100, 101, 350])
def test_the_first_hundred_faults(stores: Stores, old_store: Path, count: int) -> None:
    agents = [(f"{number:03d}", f"bad {number}", "any", "k") for number in range(1, count + 1)]
    said = refused(old_store, stores.csv(agents))
    assert [line.split(":")[1] for line in faults(said)] == [
        f" line {number + 1}" for number in range(1, min(count, 100) + 1)
    ]
    rest = said.lines[min(count, 100) :]
    assert [line for line in rest if "more" in line] == (
        [f"... and {count - 100} more"] if count > 100 else []
    )
    assert f"{count} faults, nothing imported" in rest[-1]


def test_faults_of_all_kinds_count_towards_the_hundred(stores: Stores, old_store: Path) -> None:
    agents = [(f"{n:03d}", f"bad {n}" if n < 61 else "same", "any", "k") for n in range(1, 121)]
    said = refused(old_store, stores.csv(agents))
    assert len(faults(said)) == 100 and said.lines[-2] == "... and 19 more"
    assert "119 faults" in said.lines[-1]


TWICE = {
    "id": [("007", "7"), ("007", "007"), ("07", "7")],
    "name": [("same", "same"), ("any", "any")],
    "ip": [
        ("10.9.9.9", "10.9.9.9"),
        ("10.9.9.9", "10.9.9.9/32"),
        ("10.9.9.9", "::ffff:10.9.9.9"),
        ("10.9.9.5/24", "10.9.9.6/255.255.255.0"),
        ("fe80::1", "FE80:0::1/128"),
        ("2001:db8:9::/48", "2001:DB8:9:1::5/48"),
    ],
}


@pytest.mark.parametrize("field", TWICE)
def test_what_only_one_agent_may_have(stores: Stores, old_store: Path, field: str) -> None:
    """The later one is told, and whose it is already."""
    for one, other in TWICE[field]:
        agents = [Record("800", "a", "10.0.0.1", "k"), *GOOD, Record("801", "b", "10.0.0.2", "k")]
        agents[0] = agents[0]._replace(**{field: one})
        agents[-1] = agents[-1]._replace(**{field: other})
        said = refused(old_store, stores.csv(agents))
        agent = "007" if field == "id" else "801"
        assert faults(said) == [f"error: line 9: agent {agent}: {field} is already that of line 2"]
    said = refused(old_store, stores.sqlite(agents))
    assert faults(said) == [f"error: row 8: agent {agent}: {field} is already that of row 1"]


def test_one_field_of_many_agents(stores: Stores, old_store: Path) -> None:
    """All but the first are told, each with all that it shares."""
    said = refused(old_store, stores.csv([("007", "a", "10.0.0.1", "k")] * 3))
    assert sorted(faults(said)) == [
        f"error: line {line}: agent 007: {field} is already that of line 2"
        for line in (3, 4)
        for field in ("id", "ip", "name")
    ]


def test_lines_are_counted_as_an_editor_counts(stores: Stores, old_store: Path) -> None:
    text = f"# a comment\n001 a any {KEY}\n\n002 !gone any k\n003 b any\n004 c any k\n"
    said = refused(old_store, stores.text(text, "client.keys"))
    assert {line[:14] for line in faults(said)} == {"error: line 5:"}
    text = "\ufeff\r\n# a comment\r\nid,name,ip,key\r\n\r\n001,a,any,k\r\n002,b b,any,k\r\n"
    said = refused(old_store, stores.text(text, "agents.csv"))
    assert [line[:14] for line in faults(said)] == ["error: line 6:"]


def lines(*texts: str, end: str = "\n") -> str:
    """A text of these lines, the last of which has no end."""
    return end.join(texts)


NO_END = {
    "csv": (2, lines("id,name,ip,key", "001,a,any,k")),
    "csv, within an address": (3, lines("id,name,ip,key", "001,a,any,k", "002,b,10.0.0.1")),
    "csv, a key that ends with a letter": (2, lines("id,name,ip,key", "001,a,any,X")),
    "csv, a header only": (1, "id,name,ip,key"),
    "csv, comments before the header": (
        5,
        lines("\ufeff# a", "", "# b", "id;name;ip;key", "001;a;any;k"),
    ),
    "csv, a header only, after comments": (3, lines("# a", "", "id,name,ip,key")),
    "csv, \\r\\n": (4, lines("id,name,ip,key", "", "", "001,a,any,k", end="\r\n")),
    "tabs": (3, lines("id\tname\tip\tkey", "001\ta\tany\tk", "002\tb\tany\tk")),
    "client.keys": (2, lines("001 a any k", "002 b any k")),
    "client.keys, one line": (1, "001 a any k"),
    "client.keys, blank lines": (5, lines("# a", "", "001 a any k", "", "002 b any k")),
    "client.keys, a removed agent": (2, lines("001 a any k", "002 !b any k")),
    "client.keys, a comment": (2, lines("001 a any k", "# b")),
    "spaces": (3, lines("id,name,ip,key", "001,a,any,k", " ")),
}


@pytest.mark.parametrize("case", NO_END)
def test_the_last_line_has_no_end(stores: Stores, old_store: Path, case: str) -> None:
    """Who wrote it may have died: half a key is a key, too, but not this agent's."""
    number, text = NO_END[case]
    told = f"line {number} has no end; if it is whole, end it with a newline, nothing imported"
    source = stores.text(text, "client.keys" if "keys" in case else "agents.csv")
    assert told in refused(old_store, source).lines[-1]
    assert told in refused(old_store, "-", stdin=text.encode()).lines[-1]
    if case not in ("spaces", "csv, within an address"):
        imported(old_store, stores.text(text + "\n", source.name))


def test_a_script_that_is_cut(stores: Stores, old_store: Path) -> None:
    """Within a statement, even where what is left would be a whole one."""
    row = "('{}', '{}', '{}', '{}')"
    agents = ",\n".join(row.format(*record) for record in OLD + OLD)
    text = f"{PLAIN_SCHEMA};\nINSERT INTO agent (id, name, ip, agent_key) VALUES {agents};\n"
    for size in (len(text) - 20, text.index("'),") + 3, text.index("'),") + 2):
        said = refused(old_store, stores.text(text[:size], "cut.sql"))
        assert "cut.sql: line 2: " in said.err, said


def test_standard_input_is_called_that(stores: Stores, old_store: Path) -> None:
    """Whatever is wrong with it."""
    for text in (
        "",
        "Dear all,\n",
        "id,name,ip\n",
        "id,name,ip,key\n",
        "001 a any k",
        "001 a b\n",
        "001 a any k\n002 a any k\n",
        'id,name,ip,key\n001,"a\n',
    ):
        said = refused(old_store, "-", stdin=text.encode())
        assert "standard input" in said.lines[-1] and " -: " not in said.lines[-1], said


def test_standard_input_without_an_agent(stores: Stores, old_store: Path) -> None:
    """A header is all that a client leaves that dies after it; a file may be so."""
    assert "no agent" in refused(old_store, "-", stdin=tabs([]).encode()).err
    imported(old_store, stores.text(tabs([]), "agents.tsv"))
    assert rows(old_store) == []


def test_standard_input_that_is_closed(old_store: Path) -> None:
    """As some start their jobs."""
    refused(old_store, "-", before=lambda: os.close(0))


UNREADABLE: dict[str, Callable[[Stores], Path]] = {
    "missing": lambda stores: stores.folder / "nowhere.csv",
    "a folder": lambda stores: stores.folder,
    "a device": lambda stores: Path("/dev/null"),
    "empty": lambda stores: stores.text("", "empty.csv"),
    "no source": lambda stores: stores.text("Dear all,\n", "letter.txt"),
    "binary": lambda stores: stores.text(bytes(range(256)) * 50, "agents.bin"),
    "no keys": lambda stores: stores.text("id,name,ip\n001,a,any\n", "agents.csv"),
    "a broken quote": lambda stores: stores.text('id,name,ip,key\n1,"a,any,k\n', "agents.csv"),
    "no agents": lambda stores: stores.text("CREATE TABLE other (id);\n", "other.sql"),
    "half a database": lambda stores: half(stores.sqlite(records(2000), name="source.db")),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_source_that_cannot_be_read(stores: Stores, old_store: Path, what: str) -> None:
    """One line that names it."""
    source = UNREADABLE[what](stores)
    said = refused(old_store, source)
    assert len(said.lines) == 1 and said.err.count(str(source)) == 1
    assert said.err.startswith(f"agent_key_request: error: {source}: ")
    assert said.err.endswith(f", nothing imported, {old_store} is as it was\n")


# ---------------------------------------------------------------- whose it is


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_store_is_private(stores: Stores, store: Path, umask: int) -> None:
    """Keys are secrets, whatever the umask."""
    imported(store, stores.csv(GOOD), before=lambda: os.umask(umask))
    assert stat.S_IMODE(store.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o400])
def test_mode_and_owner_are_kept(stores: Stores, old_store: Path, mode: int) -> None:
    """Whoever could read it, and nobody else; root's job may refresh somebody's store."""
    old_store.chmod(mode)
    owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(old_store, *owner)
    imported(old_store, stores.csv(GOOD), before=lambda: os.umask(0o027))
    status = old_store.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, *owner)
    assert rows(old_store) == GOOD


def test_links_stay_links(stores: Stores, old_store: Path, tmp_path: Path) -> None:
    """The store is replaced, or made, where they lead to."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "agents.db").symlink_to("../store/agents.db")
    (folder / "new.db").symlink_to("../store/new.db")
    for name in ("agents.db", "new.db"):
        forked("--db", folder / name, "--import", stores.csv(GOOD))
        assert (folder / name).is_symlink()
        assert rows(old_store.with_name(name)) == GOOD
    assert beside(old_store) == {"new.db"} and len(os.listdir(folder)) == 2


LEFT = {
    "nothing": b"",
    "garbage": b"SQLite format 3\0" + b"\xff" * 5000,
}


@pytest.mark.parametrize("what", LEFT)
def test_what_a_killed_import_left_is_used_again(
    stores: Stores, old_store: Path, what: str
) -> None:
    place = Path(f"{old_store}.import")
    place.write_bytes(LEFT[what])
    place.chmod(0o600)
    imported(old_store, stores.csv(GOOD))
    assert rows(old_store) == GOOD


STRANGE: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda place, victim: place.symlink_to(victim),
    "a link to an empty file": lambda place, victim: (
        place.symlink_to(victim),
        victim.write_text(""),
    ),
    "a link to nothing": lambda place, victim: (place.symlink_to(victim), victim.unlink()),
    "a hard link": lambda place, victim: place.hardlink_to(victim),
    "a hard link to an empty file": lambda place, victim: (
        place.hardlink_to(victim),
        victim.write_text(""),
    ),
    "writable": lambda place, victim: (place.touch(), place.chmod(0o666)),
    "somebody's": lambda place, victim: (place.touch(0o600), os.chown(place, 65534, 65534)),
    "a folder": lambda place, victim: place.mkdir(),
    "a named pipe": lambda place, victim: os.mkfifo(place),
}


@pytest.mark.parametrize("what", STRANGE)
def test_somebody_elses_file_does_not_become_the_store(
    stores: Stores, old_store: Path, tmp_path: Path, what: str
) -> None:
    """He could read it, or write to it, later; he may be told to be in the way."""
    if what == "somebody's" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    place, victim = Path(f"{old_store}.import"), tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    STRANGE[what](place, victim)
    before = victim.exists() and victim.read_text()
    said = forked("--db", old_store, "--import", stores.csv(GOOD))
    assert (victim.exists() and victim.read_text()) == before and not old_store.is_symlink()
    if said.status == 0:
        assert rows(old_store) == GOOD and beside(old_store) == set()
        status = old_store.stat()
        assert (status.st_uid, status.st_nlink) == (os.geteuid(), 1)
        assert stat.S_IMODE(status.st_mode) == 0o600
    else:
        assert (said.status, len(said.lines)) == (1, 1) and str(place) in said.err
        assert rows(old_store) == OLD


def become(user: int) -> Callable[[], None]:
    """Become another user in the fork, who may be unable to read the interpreter's library."""
    codecs.lookup("latin-1")

    def before() -> None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

    return before


def test_what_one_may_not(open_folder: Path, nobody: int) -> None:
    """An ordinary user is told which file it is, and nothing changes."""
    store, sources = open_folder / "agents.db", Stores(open_folder)
    forked("--db", store, "--import", sources.csv(OLD))
    source = sources.csv(GOOD, "good.csv")
    how = {"before": become(nobody)}
    said = refused(store, source, **how)
    assert str(store) in said.err and "Permission denied" in said.err, said
    store.chmod(0o644)
    said = refused(store, source, **how)
    assert f"{store}.import: Permission denied" in said.err
    os.chown(open_folder, nobody, nobody)
    source.chmod(0o600)
    assert f"{source}: Permission denied" in refused(store, source, **how).err
    source.chmod(0o644)
    said = refused(store, source, **how)  # the store is root's: it cannot be given to him again
    assert "not permitted" in said.err and str(store) in said.err, said
    assert "standard output" not in said.err, said


def test_what_it_builds_in_is_not_its_source(stores: Stores, store: Path) -> None:
    """Nor is the folder one in which everybody could put something in its place."""
    source = stores.csv(GOOD)
    mine = shutil.copy2(source, f"{store}.import")
    assert ".import" in refused(store, mine).err
    os.unlink(mine)
    store.parent.chmod(0o1777)
    assert "writable by everybody" in refused(store, source).err
    assert not store.exists()


def test_its_source_is_asked_for_as_long_as_timeout_says(old_store: Path) -> None:
    """10 s, as in a request, unless it says so."""

    def before() -> None:
        def told(_name: str, seconds: float, _whole: object) -> None:
            raise script.Reply(2, f"{seconds:g} s")

        script.open_source = told

    for options, seconds in ((), "10 s"), (("--timeout", "7"), "7 s"):
        assert seconds in refused(old_store, "a.db", *options, before=before).err


def test_a_pipe_by_its_name(stores: Stores, store: Path) -> None:
    """`--import <(...)`; `-` would be standard input."""
    reader, writer = os.pipe()
    os.close(writer)
    assert (
        "/dev/stdin: not a regular file, nothing imported"
        in refused(store, "/dev/stdin", stdin=reader).err
    )
    os.close(reader)


# ---------------------------------------------------------------- at any moment

STEPS = ("import_agents", "claim", "build", "copy", "records", "refuse_to_replace", "whole")


def at_line(number: int, what: signal.Signals) -> Callable[[], None]:
    """Send a signal to the fork at the line of that NUMBER among those that an import runs."""

    def before() -> None:
        original, count = script.import_agents, 0
        name = original.__code__.co_filename
        texts = Path(name).read_text().splitlines()

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename != name or frame.f_code.co_name not in STEPS:
                return None
            if event == "line" and texts[frame.f_lineno - 1].strip() != "try:":  # runs nothing
                count += 1
                if count == number:
                    sys.settrace(None)
                    os.kill(os.getpid(), what)
            return trace

        def traced(*arguments: Any) -> None:
            sys.settrace(trace)
            original(*arguments)
            sys.settrace(None)
            if not number:
                os.write(1, b"%d" % count)

        script.COMMANDS["--import"] = traced

    return before


def all_lines(store: Path, source: Path) -> range:
    """The numbers of the lines that an import runs."""
    said = forked("--db", store, "--import", source, before=at_line(0, signal.SIGKILL))
    assert said.status == 0 and int(said.out) > 40, said
    return range(1, int(said.out) + 1)


def test_killed_at_any_moment(stores: Stores, store: Path) -> None:
    """The store is the old one or, at the very end, the new one; the next import clears up."""
    sources = [stores.csv(OLD, "old.csv"), stores.csv(GOOD[:2])]
    imported(store, sources[0])
    store.chmod(0o640)
    ends = []
    for number in all_lines(store, sources[0])[::3]:
        said = forked("--db", store, "--import", sources[1], before=at_line(number, signal.SIGKILL))
        assert said == Said(-signal.SIGKILL, "", ""), number
        assert beside(store) <= {store.name + ".import"}
        ends.append(rows(store))
        assert ends[-1] in (OLD, GOOD[:2]), number
        imported(store, sources[0])
        assert stat.S_IMODE(store.stat().st_mode) == 0o640
    assert OLD in ends


def test_ended_at_any_moment(stores: Stores, store: Path) -> None:
    """It leaves nothing, and what it says is true."""
    sources = [stores.csv(OLD, "old.csv"), stores.csv(GOOD[:2])]
    imported(store, sources[0])
    ends = []
    for number in all_lines(store, sources[0])[::2]:
        what = (signal.SIGINT, signal.SIGTERM)[number // 2 % 2]
        said = forked("--db", store, "--import", sources[1], before=at_line(number, what))
        assert beside(store) == set(), (number, said)
        there = rows(store)
        ends.append(there)
        if there == OLD:
            assert said.status in (1, -what), (number, said)
            assert said.status == -what or "interrupted, nothing imported" in said.err, (
                number,
                said,
            )
        else:
            assert there == GOOD[:2], (number, said)
            assert said.status == 0 or "imported" in said.err, (number, said)
            assert "nothing" not in said.err, (number, said)
            imported(store, sources[0])
    assert OLD in ends


def test_ended_while_it_waits_for_standard_input(
    old_store: Path, start: Callable[..., Child]
) -> None:
    """`mysql | …` asks for a password, and the person gives up."""
    for what, sent in ((signal.SIGINT, b""), (signal.SIGTERM, b"id,name,ip,key\n001,a,any,k\n")):
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb", 0) as stream:
            stream.write(sent)
            child = start("--db", old_store, "--import", "-", stdin=reader)
            os.close(reader)
            until(lambda: waits_for_input(child.pid), "it to wait for its input")
            os.kill(child.pid, what)
            said = child.wait()
        assert said.status == 1 and "interrupted, nothing imported" in said.err, said
        assert rows(old_store) == OLD and beside(old_store) == set()


def test_what_it_builds_is_taken_away(old_store: Path, start: Callable[..., Child]) -> None:
    """Somebody clears the folder: it ends as in any other case."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb", 0):
        child = start("--db", old_store, "--import", "-", stdin=reader)
        os.close(reader)
        until(lambda: waits_for_input(child.pid), "it to wait for its input")
        (old_store.parent / (old_store.name + ".import")).unlink()
    said = child.wait()
    assert (said.status, len(said.lines)) == (1, 1) and "nothing imported" in said.err, said
    assert rows(old_store) == OLD and beside(old_store) == set()


def waits_for_input(pid: int) -> bool:
    """Whether a process sleeps in a read of a pipe."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    opened = (
        {
            os.path.basename(os.readlink(link))
            for link in Path(f"/proc/{pid}/fd").iterdir()
            if link.exists()
        }
        if state == "S"
        else set()
    )
    return state == "S" and "null" in opened  # it has begun: its first step opens /dev/null


MANY = 500


class Quick(sqlite3.Connection):
    """Tells of its progress more often, so that few agents will do."""

    def set_progress_handler(self, handler: Any, count: int) -> None:
        super().set_progress_handler(handler, min(count, 500))


def often() -> None:
    """Have the fork's SQLite tell of its progress often."""
    connect = sqlite3.connect
    script.sqlite3.connect = lambda *words, **how: connect(*words, **{"factory": Quick, **how})


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_ended_while_indexes_are_built(
    stores: Stores, old_store: Path, what: signal.Signals
) -> None:
    """There SQLite is at work, and gives up by itself."""

    def before() -> None:
        often()
        calls, progress = 0, script.Report.progress

        def interrupted(report: Any) -> Any:
            nonlocal calls
            calls += report.agents == MANY
            if calls == 3:
                os.kill(os.getpid(), what)
            return progress(report)

        script.Report.progress = interrupted

    said = forked("--db", old_store, "--import", stores.csv(records(MANY)), before=before)
    assert said.status == 1 and "interrupted, nothing imported" in said.err, said
    assert rows(old_store) == OLD and beside(old_store) == set()


@pytest.mark.parametrize(
    "agents", [[("001", "bad name", "any", "k")] * 300, GOOD], ids=["faults", "sound"]
)
def test_nobody_reads_what_it_says(stores: Stores, old_store: Path, agents: Any) -> None:
    """A closed pipe ends what has faults; it does not undo what is done."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        said = forked("--db", old_store, "--import", stores.csv(agents), "-v", stderr=writer)
    finally:
        os.close(writer)
    assert beside(old_store) == set()
    if agents == GOOD:
        assert rows(old_store) == GOOD and said.status in (0, 1)
    else:
        assert rows(old_store) == OLD and said.status == 1


def test_a_file_may_not_grow(stores: Stores, old_store: Path) -> None:
    """As a full disk, for those who are not root."""

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    said = refused(old_store, stores.csv(records(2000)), before=before)
    assert len(said.lines) == 1 and "nothing imported" in said.err
    imported(old_store, stores.csv(GOOD), before=before)
    assert rows(old_store) == GOOD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Make a file system of a quarter of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    folder.chmod(0o755)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(stores: Stores, small_disk: Path) -> None:
    """It is told, nothing is lost, and what has been written goes away again."""
    store = small_disk / "agents.db"
    imported(store, stores.csv(OLD, "old.csv"))
    said = refused(store, stores.csv(records(3000)))
    assert len(said.lines) == 1 and "full" in said.err and "nothing imported" in said.err
    imported(store, stores.csv(GOOD))
    assert rows(store) == GOOD


def test_on_the_disk_before_it_is_moved(stores: Stores, old_store: Path) -> None:
    """A power cut right after the move must not leave an empty store."""

    def before() -> None:
        fsync, rename = os.fsync, os.rename

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            os.write(1, b"fsync %s\n" % os.readlink(b"/proc/self/fd/%d" % descriptor))

        def moved(old: str, new: str) -> None:
            rename(old, new)
            os.write(1, f"rename {old}\n".encode())

        os.fsync, os.rename = noted, moved

    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.out.splitlines() == [
        f"fsync {old_store}.import",
        f"rename {old_store}.import",
        f"fsync {old_store.parent}",
    ]


# ---------------------------------------------------------------- two at once, and requests


def test_while_another_one_is_at_work(
    stores: Stores, old_store: Path, start: Callable[..., Child]
) -> None:
    """The second says so, the first goes on, requests get the old store, nobody reads the new."""
    reader, writer = os.pipe()
    place = Path(f"{old_store}.import")
    with os.fdopen(writer, "wb", 0) as stream:
        first = start("--db", old_store, "--import", "-", stdin=reader, before=lambda: os.umask(0))
        os.close(reader)
        stream.write(tabs(GOOD[:1]).encode())
        until(lambda: place.exists() and place.stat().st_size, "the store that it builds")
        until(lambda: waits_for_input(first.pid), "it to wait for more")
        before = seen(place)
        said = forked("--db", old_store, "--import", stores.csv(GOOD))
        assert said.status == 1 and "another import" in said.err and str(place) in said.err
        assert seen(place) == before
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert beside(old_store) == {place.name}
        assert answer(old_store, ["id", "900"])["error"] == 0
        assert answer(old_store, ["id", "001"])["error"] == 4
        stream.write(tabs(GOOD[1:]).partition("\n")[2].encode())
    assert first.wait() == Said(0, "", "")
    assert rows(old_store) == GOOD and beside(old_store) == set()


def test_another_one_that_starts_just_then(stores: Stores, old_store: Path) -> None:
    """The first ends between our `open` and our lock, and a third begins: what is its own stays."""
    place = Path(f"{old_store}.import")

    def before() -> None:
        flock, held = script.fcntl.flock, []

        def late(descriptor: int, how: int) -> None:
            if not held:
                place.rename(old_store)
                held.append(os.open(place, os.O_RDWR | os.O_CREAT, 0o600))
                os.write(held[0], b"the third one's")
                flock(held[0], how)
            flock(descriptor, how)

        script.fcntl.flock = late

    shutil.copy(old_store, place)
    place.chmod(0o600)
    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and place.read_text() == "the third one's", said
    assert "another import" in said.err and rows(old_store) == OLD


def test_many_at_once_do_not_mix(stores: Stores, store: Path, start: Callable[..., Child]) -> None:
    """The store is one's whose status was 0; who is refused says why, and takes nothing away."""
    agents = [records(500, turn) for turn in range(3)]
    sources = [stores.csv(some, f"{turn}.csv") for turn, some in enumerate(agents)]
    for _ in range(5):
        children = [start("--db", store, "--import", source) for source in sources]
        said = [child.wait() for child in children]
        assert 0 in [one.status for one in said]
        assert all((one.status, bool(one.err)) in ((0, False), (1, True)) for one in said), said
        assert rows(store) in [some for some, one in zip(agents, said) if one.status == 0]
        assert beside(store) == set()


def test_a_running_server_takes_it_over(
    ask: Caller, stores: Stores, store: Path, open_folder: Path
) -> None:
    """Without a signal, without one failed answer."""
    sources = [stores.csv(records(500, turn), f"{turn}.csv") for turn in range(4)]
    keys = [records(500, turn)[0].key for turn in range(4)]
    imported(store, sources[0])
    requests = [f"id:{number:03d}" for number in range(1, 500, 7)]
    with serving(store, open_folder / "s") as server, Load(server.path, requests, 4) as load:
        for turn in range(1, 4):
            load.wait(50)
            words = [*ask.command(), "--db", store, "--import", sources[turn]]
            subprocess.run(words, env={"PATH": ask.path}, check=True)
            until(lambda: server.key("id:001") == keys[turn], "the new keys")
        load.wait(50)


# ---------------------------------------------------------------- what it tells


@pytest.mark.parametrize("count", [0, 1, 6])
def test_verbose(stores: Stores, store: Path, count: int) -> None:
    said = imported(store, stores.csv(GOOD[:count]), "-v")
    assert said.err == f"{count} agent{'s' * (count != 1)} imported into {store}\n"


def test_the_fastest_way_to_silence(stores: Stores, store: Path) -> None:
    """Cron mails whatever is printed: nothing is, not even of many."""
    assert imported(store, stores.csv(records(3000))) == Said(0, "", "")


def on_terminal(start: Callable[..., Child], *arguments: str | Path, **how: Any) -> str:
    """Run an import on a terminal, which must go well: what is to be seen there."""
    master, slave = pty.openpty()
    try:
        child = start(*arguments, stderr=slave, **how)
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the last writer has gone
            while piece := os.read(master, 65536):
                text += piece
        said = child.wait()
        assert (said.status, said.out) == (0, ""), text
        return text.decode("ascii")
    finally:
        os.close(master)


def test_on_a_terminal(stores: Stores, store: Path, start: Callable[..., Child]) -> None:
    """One line stays, and it covers what was there before."""
    text = on_terminal(start, "--db", store, "--import", stores.csv(GOOD))
    *shown, last, nothing = re.split(r"\r\n|\r", text)
    assert last == f"6 agents imported into {store}" and nothing == ""
    assert all(len(line) < len(last) for line in shown)


def test_progress_on_a_terminal(stores: Stores, store: Path, start: Callable[..., Child]) -> None:
    """While agents are read, and on and on while the indexes are built."""

    def before() -> None:
        often()
        progress = script.Report.progress

        def hurried(report: Any) -> Any:
            report.due = 0.0  # five times a second is too seldom to be seen here
            return progress(report)

        script.Report.progress = hurried

    source = stores.csv(records(MANY))
    text = on_terminal(start, "--db", store, "--import", source, before=before)
    shown = [int(number) for number in re.findall(r"(\d+) agents\r", text)]
    assert shown == sorted(shown) and set(shown) == set(range(1, MANY + 1))
    assert shown.count(MANY) > 4  # one is for the last agent, at most one for its insertion


# ---------------------------------------------------------------- many

MILLION = 1_000_000


class Cost(NamedTuple):
    """What a process took."""

    seconds: float  # of processor time
    megabytes: float


MEASURE = """import json, resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, status]))"""


def cost(words: Sequence[str | Path], status: int = 0, **how: Any) -> Cost:
    """Run a command to its STATUS, and measure it: from a small process, whose size counts, too."""
    words = [sys.executable, "-IS", "-c", MEASURE, *words]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, **how)
    *used, ended = json.loads(done.stdout)
    assert ended == status
    return Cost(*used)


@pytest.mark.slow
def test_a_million_agents(ask: Caller, stores: Stores, store: Path, tmp_path: Path) -> None:
    """At most 3 times what sqlite3's own .import takes with the same indexes, in 150 MB."""
    sqlite = shutil.which("sqlite3")
    if sqlite is None:
        pytest.skip("sqlite3 is not installed")
    source = stores.text("", "million.csv")
    with source.open("w") as stream:
        stream.write("id,name,ip,key\n")
        for n in range(1, MILLION + 1):
            ip = f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"
            stream.write(f"{n:03d},agent-{n},{ip},{n * 7919:064x}\n")
    schema = [script.TABLE, *(script.INDEX % (field, field) for field in ("id", "name", "ip"))]
    commands = stores.text(";\n".join(schema) + f";\n.import --csv --skip 1 {source} agent\n", "c")
    ratios = []
    for turn in range(2):
        with commands.open() as stream:
            theirs = cost([sqlite, tmp_path / f"{turn}.db"], stdin=stream)
        own = cost([*ask.command(), "--db", store, "--import", source], env={"PATH": ask.path})
        print(f"own {own}, sqlite3 {theirs}")
        ratios.append(own.seconds / theirs.seconds)
        assert own.megabytes <= 150
    assert min(ratios) <= 3, ratios
    assert answer(store, ["ip", "10.15.66.63"])["data"]["id"] == "999999"


@pytest.mark.slow
def test_a_million_faults(ask: Caller, stores: Stores, old_store: Path) -> None:
    """They cost no more memory than agents, however many they are."""
    source = stores.text("id,name,ip,key\n" + "001,a b,any,k\n" * 300_000, "bad.csv")
    words = [*ask.command(), "--db", str(old_store), "--import", str(source)]
    how = {"env": {"PATH": ask.path}, "stderr": subprocess.DEVNULL}
    assert cost(words, 1, **how).megabytes <= 150
    assert rows(old_store) == OLD and beside(old_store) == set()


def test_a_store_that_everybody_may_write_is_none_afterwards(stores: Stores, store: Path) -> None:
    """Or every request would refuse what was just imported."""
    source = stores.csv(GOOD)
    assert forked("--db", store, "--import", source).status == 0
    store.chmod(0o666)
    assert forked("--db", store, "--import", source).status == 0
    assert stat.S_IMODE(store.stat().st_mode) == 0o664
