"""`--import` replaces the store, all of it or nothing, and nothing but its own work."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import PLAIN_SCHEMA, SAMPLE, Caller, Record, Stores, mode_of, script
from importing import (
    GOOD,
    OLD,
    Child,
    Said,
    answer,
    become,
    beside,
    forked,
    imported,
    often,
    refused,
    rows,
    seen,
    tabs,
    waits_for_input,
)
from serving import Load, records, serving, until
from terminal import Terminal

MANY = 500
MILLION = 1_000_000
MOVE = "move it away (mv "  # and `name another --db`


def add(store: Path, sql: str) -> None:
    """Run an SQL script in a store that an import made."""
    forked("--db", store, "--import", "-", stdin=tabs(OLD).encode())
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        database.executescript(sql)


def damage(store: Path, size: int, cut: bool = True) -> None:
    """Leave the first bytes of a store of many agents, or break those that follow."""
    forked("--db", store, "--import", "-", stdin=tabs(records(2000)).encode())
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


def emptied(path: Path) -> Path:
    """Make a file empty, or make an empty file."""
    path.write_text("")
    path.chmod(0o600)
    return path


IN_THE_WAY: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a device": ("regular file|device", device),
    "a folder": ("regular file|folder", lambda store: store.mkdir()),
    "a named pipe": ("regular file|pipe", named_pipe),
    "a socket": ("regular file|socket", listener),
    "somebody's database": ("no import made", foreign),
    "the sample": ("no import made", lambda store: foreign(store, SAMPLE.read_text())),
    "a database of something else": ("no import made", something_else),
    "its own with a table": ("no import made", lambda store: add(store, "CREATE TABLE a(b)")),
    "its own with a view": (
        "no import made",
        lambda store: add(store, "CREATE VIEW a AS SELECT id FROM agent"),
    ),
    "its own with another column": (
        "columns somebody has renamed",
        lambda store: add(
            store,
            "ALTER TABLE agent RENAME TO was; CREATE TABLE agent AS SELECT id, "
            "name, ip, agent_key AS key FROM was; DROP TABLE was",
        ),
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


# What a killed import may have left: its beginning, or all of it.
LEFT: dict[str, Callable[[Path], object]] = {
    "nothing": lambda place: place.touch(),
    "the beginning of a header": lambda place: place.write_bytes(b"SQLite form"),
    "the first page": lambda place: damage(place, 4096),
    "a whole store": lambda place: add(place, ""),
    "a store with another table": lambda place: add(place, "CREATE TABLE a (b)"),
}
# What others may keep under such a name.
FOREIGN: dict[str, Callable[[Path], object]] = {
    "a text": lambda place: place.write_text("precious"),
    "one letter": lambda place: place.write_text("p"),
    "a client.keys": lambda place: place.write_text("001 a any k\n"),
    "a database": lambda place: foreign(place),
    "a damaged database": lambda place: place.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000),
    "zeros": lambda place: place.write_bytes(bytes(5000)),
    "a folder": lambda place: place.mkdir(),
    "a named pipe": lambda place: os.mkfifo(place),
    "a socket": lambda place: listener(place),
    "a link": lambda place: place.symlink_to("nowhere"),
}
STRANGE: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda place, victim: place.symlink_to(victim),
    "a link to an empty file": lambda place, victim: place.symlink_to(emptied(victim)),
    "a link to nothing": lambda place, victim: place.symlink_to(victim.with_name("nowhere")),
    "a hard link": lambda place, victim: place.hardlink_to(victim),
    "a hard link to an empty file": lambda place, victim: place.hardlink_to(emptied(victim)),
    "writable": lambda place, victim: emptied(place).chmod(0o666),
    "somebody's": lambda place, victim: os.chown(emptied(place), 65534, 65534),
    "a folder": lambda place, victim: place.mkdir(),
    "a named pipe": lambda place, victim: os.mkfifo(place),
}


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
        assert mode_of(place.parent) == "0700"


def test_any_other_folder_is_not_made(stores: Stores, tmp_path: Path) -> None:
    said = forked("--db", tmp_path / "nowhere" / "a.db", "--import", stores.csv(GOOD))
    assert said.status == 1 and len(said.lines) == 1
    assert f"{tmp_path}/nowhere" in said.err and "No such file" in said.err
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- what is not replaced


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_not_replaced(stores: Stores, store: Path, what: str) -> None:
    """Told before SOURCE is read: a person waits for nothing, and knows what to do."""
    words, put = IN_THE_WAY[what]
    put(store)
    for source in (stores.csv(GOOD), stores.folder / "nowhere.csv"):
        said = refused(store, source)
        assert len(said.lines) == 1 and str(store) in said.err, said
        assert re.search(words, said.err) and "name another --db" in said.err, said
        if store.is_file():
            assert f"move it away (mv {store} {store}.saved)" in said.err, said


@pytest.mark.parametrize("what", ["a folder", "somebody's database", "half of its own", "a letter"])
def test_what_has_the_name_of_the_previous_store(
    stores: Stores, old_store: Path, what: str
) -> None:
    """It stays, and so does the store. An import would have to replace it at its end."""
    words, put = IN_THE_WAY[what]
    previous = Path(f"{old_store}.old")
    put(previous)
    Path(f"{previous}.old").unlink(missing_ok=True)
    for source in (stores.csv(GOOD), stores.folder / "nowhere.csv"):
        said = refused(old_store, source)
        assert str(previous) in said.err and re.search(words, said.err), said


def test_a_device_by_its_name(stores: Stores, tmp_path: Path) -> None:
    """Not /dev/null: a broken script would take it from the whole machine."""
    with Terminal() as terminal:
        said = forked("--db", terminal.name, "--import", stores.csv(GOOD))
        assert said.status == 1 and terminal.name in said.err and "regular file" in said.err, said
        (tmp_path / "link").symlink_to(terminal.name)
        assert "regular file" in refused(tmp_path / "link", stores.csv(GOOD)).err
        assert Path(terminal.name).is_char_device()


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


KILLED_WRITER = """import os, sqlite3, sys
store = sqlite3.connect(sys.argv[1])
store.executescript(sys.argv[2])
os._exit(0)"""
KILLED_WRITERS = {
    "that has begun": ("-journal", "BEGIN; UPDATE agent SET name = 'x'"),
    "that has changed the file": (
        "-journal",
        "PRAGMA cache_size = 1; BEGIN; CREATE TABLE more AS SELECT zeroblob(100000)",
    ),
    "in WAL mode": ("-wal", "PRAGMA journal_mode = wal; UPDATE agent SET name = 'x'"),
}


@pytest.mark.parametrize("what", KILLED_WRITERS)
def test_a_writer_that_was_killed(stores: Stores, old_store: Path, what: str) -> None:
    """Nobody can wait for its end. The command in the message clears up after it."""
    if shutil.which("sqlite3") is None:
        pytest.skip("sqlite3 is not installed")
    suffix, sql = KILLED_WRITERS[what]
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(old_store), sql], check=True)
    assert Path(f"{old_store}{suffix}").exists()
    said = forked("--db", old_store, "--import", stores.csv(GOOD))
    found = re.search(r"or was killed: .* clear up after it \((.*)\), or name", said.err)
    assert found, said
    subprocess.run(found[1], shell=True, check=True, stdout=subprocess.DEVNULL)
    imported(old_store, stores.csv(GOOD))


@pytest.mark.parametrize("suffix", ["-journal", ".old"])
def test_a_rival_comes_while_it_is_built(stores: Stores, old_store: Path, suffix: str) -> None:
    """What may be replaced is looked at again before it is: a writer, or a foreign `.old`."""
    other = Path(f"{old_store}{suffix}")

    def before() -> None:
        copy = script.copy_agents

        def slowly(*arguments: Any) -> None:
            copy(*arguments)
            other.write_text("somebody's")

        script.copy_agents = slowly

    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and "nothing imported" in said.err and str(other) in said.err
    assert beside(old_store) == {other.name} and other.read_text() == "somebody's"
    assert rows(old_store) == OLD


def test_damage_where_counting_does_not_look(stores: Stores, old_store: Path) -> None:
    """It is found when the stores are compared, and is the store's, not the source's."""
    imported(old_store, "-", stdin=tabs(records(2000)).encode())
    Path(f"{old_store}.old").unlink()
    with contextlib.closing(sqlite3.connect(str(old_store))) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'agent'"
        ).fetchone()
        assert database.execute("PRAGMA page_size").fetchone() == (4096,)
    with old_store.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    said = refused(old_store, stores.csv(GOOD))
    assert f"{old_store} is no SQLite database, or a damaged one" in said.err and MOVE in said.err


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
    assert mode_of(store) == "0640"
    assert beside(store) == set()


@pytest.mark.parametrize("name", ["mysql://root:pw@localhost/agents", "agents.sql", "./agents.sql"])
def test_a_store_is_an_sqlite_file(stores: Stores, tmp_path: Path, name: str) -> None:
    def before() -> None:
        os.chdir(tmp_path)

    said = forked("--db", name, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and "SQLite" in said.err and "--db" in said.err
    assert "pw" not in said.err
    assert not (tmp_path / "agents.sql").exists()


# ---------------------------------------------------------------- whose it is


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_store_is_private(stores: Stores, store: Path, umask: int) -> None:
    """Keys are secrets, whatever the umask."""
    imported(store, stores.csv(GOOD), before=lambda: os.umask(umask))
    assert mode_of(store) == "0600"


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
    status = Path(f"{old_store}.old").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, *owner)


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
    assert beside(old_store) == {"new.db", "agents.db.old"} and len(os.listdir(folder)) == 2


@pytest.mark.parametrize("what", LEFT)
def test_what_a_killed_import_left_is_cleared_away(
    stores: Stores, old_store: Path, what: str
) -> None:
    place = Path(f"{old_store}.import")
    LEFT[what](place)
    place.chmod(0o600)
    Path(f"{place}.old").unlink(missing_ok=True)
    imported(old_store, stores.csv(GOOD))
    assert rows(old_store) == GOOD and rows(Path(f"{old_store}.old")) == OLD


@pytest.mark.parametrize("suffix", [".import", ".old.import"])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_somebody_else_keeps_there_stays(
    stores: Stores, old_store: Path, what: str, suffix: str
) -> None:
    place = Path(f"{old_store}{suffix}")
    FOREIGN[what](place)
    for source in (stores.csv(GOOD), stores.folder / "nowhere.csv"):
        said = refused(old_store, source)
        assert len(said.lines) == 1, said
    assert "nowhere.csv" in said.err  # it is opened before anything else is touched
    assert f"{place} is in the way" in refused(old_store, stores.csv(GOOD)).err


def test_the_only_copy_of_the_source(stores: Stores, store: Path) -> None:
    """Standard input may be the very file that an import would build in."""
    place = Path(f"{store}.import")
    place.write_text(tabs(GOOD))
    with place.open() as stream:
        said = refused(store, "-", stdin=stream.fileno())
    assert f"{place} is in the way" in said.err and place.read_text() == tabs(GOOD)


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
        assert rows(old_store) == GOOD and beside(old_store) == {"agents.db.old"}
        status = old_store.stat()
        assert (status.st_uid, status.st_nlink) == (os.geteuid(), 1)
        assert mode_of(old_store) == "0600"
    else:
        assert (said.status, len(said.lines)) == (1, 1) and str(place) in said.err
        assert rows(old_store) == OLD


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
    assert f"{store}.import: Permission denied (for user nobody), nothing imported" in said.err
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
    said = refused(store, source)
    assert "everybody may write to the directory" in said.err and "as it was" not in said.err
    assert not store.exists()


def test_the_directory_of_a_store_is_private(stores: Stores, store: Path, nobody: int) -> None:
    """Whoever may write to it could put a link in the place of what is built, and get all keys."""
    source = stores.csv(GOOD)
    for user, group, mode in ((nobody, 0, 0o755), (0, nobody, 0o770), (0, 0, 0o777)):
        os.chown(store.parent, user, group)
        store.parent.chmod(mode)
        said = refused(store, source)
        assert str(store.parent) in said.err and "ch" in said.err, said
    os.chown(store.parent, 0, nobody)
    store.parent.chmod(0o750)
    imported(store, source)


def planted(place: Path, victim: Path) -> None:
    """Put a link in the place of what an import builds."""
    place.unlink()
    place.symlink_to(victim)


def test_a_rival_replaces_what_is_built(stores: Stores, old_store: Path) -> None:
    """What he puts there does not become the store."""
    place, victim = Path(f"{old_store}.import"), old_store.parent.parent / "victim"
    victim.write_text("precious")

    def before() -> None:
        compare = script.compare

        def compared(*arguments: Any) -> Any:
            planted(place, victim)
            return compare(*arguments)

        script.compare = compared

    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and f"somebody has removed or replaced {place}" in said.err, said
    assert victim.read_text() == "precious" and rows(old_store) == OLD and place.is_symlink()


def test_a_rival_replaces_what_sqlite_opens(stores: Stores, old_store: Path) -> None:
    """SQLite opens the file by its name. No key gets into a file of his choice."""
    place, victim = Path(f"{old_store}.import"), old_store.parent.parent / "victim"
    victim.touch()

    def before() -> None:
        create_store = script.create_store

        def created(path: str) -> Any:
            planted(place, victim)
            return create_store(path)

        script.create_store = created

    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and f"somebody has removed or replaced {place}" in said.err, said
    assert victim.stat().st_size > 0 and GOOD[0].key.encode() not in victim.read_bytes()
    assert rows(old_store) == OLD


# ---------------------------------------------------------------- at any moment

# The functions whose lines are counted.
STEPS = {
    *("import_agents", "run", "check_places", "claim", "open_leftover", "is_leftover"),
    *("recover_previous", "build", "create_store", "copy_agents", "check_agents", "compare"),
    *("is_needed", "replace", "complete", "keep_previous", "check_claim", "finish", "clean_up"),
    *("interruptible", "check_replaceable", "records", "remove", "tell_result"),
    *("check_no_transaction", "make_old", "is_old_already"),
}


def at_line(number: int, what: signal.Signals) -> Callable[[], None]:
    """Send a signal to the fork at the line of that NUMBER among those that an import runs.

    At line 0 nothing is sent, and the number of lines is told.
    """

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

        def traced(options: Any) -> int:
            sys.settrace(trace)
            status: int = original(options)
            sys.settrace(None)
            if not number:
                os.write(1, b"%d" % count)
            return status

        script.import_agents = traced

    return before


class Generations:
    """A store and its previous one, which change places with each import that succeeds."""

    def __init__(self, stores: Stores, store: Path) -> None:
        """Make both, and count the lines of an import. It is the same number in both directions."""
        self.store = store
        self.previous = Path(f"{store}.old")
        self.agents = [OLD[:1], GOOD[:1]]
        self.sources = [stores.csv(some, f"{turn}.csv") for turn, some in enumerate(self.agents)]
        for source in self.sources:
            imported(store, source)
        store.chmod(0o640)
        self.now = 1  # which of the agents are in the store
        said = self.signalled(0, signal.SIGKILL)
        assert said.status == 0 and int(said.out) > 100, said
        self.now = 0
        self.lines = range(1, int(said.out) + 1)

    def signalled(self, number: int, what: signal.Signals) -> Said:
        """Run an import of the other agents that gets a signal at a line."""
        source = self.sources[1 - self.now]
        return forked("--db", self.store, "--import", source, before=at_line(number, what))


def test_killed_at_any_moment(stores: Stores, store: Path) -> None:
    """The store is the old one or the new one. The next import clears up, and nothing is lost."""
    both = Generations(stores, store)
    replaced = []
    for number in both.lines:
        said = both.signalled(number, signal.SIGKILL)
        assert said == Said(-signal.SIGKILL, "", ""), number
        assert beside(store) <= {f"{store.name}{end}" for end in (".import", ".old.import", ".old")}
        there = rows(store)
        assert there in both.agents, number
        replaced.append(there != both.agents[both.now])
        imported(store, both.sources[1 - both.now])
        assert rows(both.previous) == both.agents[both.now], number
        both.now = 1 - both.now
        assert rows(store) == both.agents[both.now], number
        assert mode_of(store) == mode_of(both.previous) == "0640"
    assert set(replaced) == {False, True}


def test_ended_at_any_moment(stores: Stores, store: Path) -> None:
    """It leaves nothing, and what it says is true."""
    both = Generations(stores, store)
    replaced = []
    for number in both.lines:
        what = (signal.SIGINT, signal.SIGTERM)[number % 2]
        said = both.signalled(number, what)
        assert beside(store) == {both.previous.name}, (number, said)
        replaced.append(rows(store) != both.agents[both.now])
        if replaced[-1]:
            assert said == Said(0, "", ""), (number, said)
            both.now = 1 - both.now
        else:
            assert said.status in (1, -what), (number, said)
            assert said.status == -what or "interrupted, nothing imported" in said.err, said
        assert rows(store) == both.agents[both.now], (number, said)
        assert rows(both.previous) == both.agents[1 - both.now], (number, said)
    assert set(replaced) == {False, True}


def test_ended_while_it_waits_for_standard_input(
    old_store: Path, start: Callable[..., Child]
) -> None:
    """`mysql | …` asks for a password, and the person gives up."""
    for what, sent in ((signal.SIGINT, ""), (signal.SIGTERM, tabs(records(2000)))):
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb", 0) as stream:
            child = start("--db", old_store, "--import", "-", stdin=reader)
            os.close(reader)
            stream.write(sent.encode())
            until(partial(waits_for_input, child.pid), "it to wait for its input")
            os.kill(child.pid, what)
            said = child.wait()
        assert said.status == 1 and "interrupted, nothing imported" in said.err, said
        assert rows(old_store) == OLD and beside(old_store) == set()


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_ended_within_foreign_code(
    stores: Stores, old_store: Path, error: type[Exception] | None
) -> None:
    """A driver may catch our exception, and go on or raise its own: it ends all the same."""

    def before() -> None:
        copy = script.copy_agents

        def copied(*arguments: Any) -> None:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
            except KeyboardInterrupt:
                if error:
                    raise error from None
            copy(*arguments)

        script.copy_agents = copied

    said = refused(old_store, stores.csv(GOOD), before=before)
    assert "interrupted, nothing imported" in said.err


def test_what_it_builds_is_taken_away(old_store: Path, start: Callable[..., Child]) -> None:
    """Somebody clears the folder: it ends as in any other case."""
    reader, writer = os.pipe()
    place = Path(f"{old_store}.import")
    with os.fdopen(writer, "wb", 0) as stream:
        child = start("--db", old_store, "--import", "-", stdin=reader)
        os.close(reader)
        stream.write(tabs(records(2000)).encode())  # more than is read at once
        until(place.exists, "the store that it builds")
        until(lambda: waits_for_input(child.pid), "it to wait for its input")
        place.unlink()
    said = child.wait()
    assert (said.status, len(said.lines)) == (1, 1) and "nothing imported" in said.err, said
    assert rows(old_store) == OLD and beside(old_store) == set()


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_ended_while_indexes_are_built(
    stores: Stores, old_store: Path, what: signal.Signals
) -> None:
    """There SQLite is at work, and gives up by itself."""

    def before() -> None:
        often()
        calls, show = 0, script.Progress.show

        def interrupted(progress: Any) -> Any:
            nonlocal calls
            calls += progress.report.agents == MANY
            if calls == 3:
                os.kill(os.getpid(), what)
            return show(progress)

        script.Progress.show = interrupted

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
    if agents == GOOD:
        assert rows(old_store) == GOOD and said.status in (0, 1)
        assert beside(old_store) == {"agents.db.old"}
    else:
        assert rows(old_store) == OLD and said.status == 1
        assert beside(old_store) == set()


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

        setattr(os, "fsync", noted)  # noqa: B010 - mypy
        setattr(os, "rename", moved)  # noqa: B010 - mypy

    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.out.splitlines() == [
        f"fsync {old_store}.import",
        f"rename {old_store}.import",
        f"rename {old_store}.old.import",
        f"fsync {old_store.parent}",
    ]


def failing(function: str, number: int, after: int = 0) -> Callable[[], None]:
    """Have a function of `os` fail with an error NUMBER, but AFTER so many calls."""

    def before() -> None:
        original, calls = getattr(os, function), 0

        def fails(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                names = [name for name in arguments[:1] if isinstance(name, str)]
                raise OSError(number, os.strerror(number), *names)
            return original(*arguments)

        setattr(os, function, fails)

    return before


@pytest.mark.parametrize(("function", "after"), [("fsync", 1), ("rename", 1)])
def test_a_failure_after_the_store_was_replaced(
    stores: Stores, old_store: Path, function: str, after: int
) -> None:
    """Nobody is told that nothing was imported."""
    before = failing(function, errno.EIO, after)
    said = forked("--db", old_store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 1 and len(said.lines) == 1, said
    assert f"{old_store} was replaced, but " in said.err and "Input/output error" in said.err, said
    assert "nothing imported" not in said.err and rows(old_store) == GOOD
    imported(old_store, stores.csv(OLD))
    assert rows(Path(f"{old_store}.old")) == GOOD


@pytest.mark.parametrize("function", ["fsync", "rename", "link", "fchmod"])
def test_a_failure_before_the_store_is_replaced(
    stores: Stores, old_store: Path, function: str
) -> None:
    said = refused(old_store, stores.csv(GOOD), before=failing(function, errno.EIO))
    assert len(said.lines) == 1 and "Input/output error, nothing imported" in said.err, said


@pytest.mark.parametrize(("function", "number"), [("rename", errno.EBUSY), ("link", errno.EXDEV)])
def test_a_store_that_is_mounted(
    stores: Stores, old_store: Path, function: str, number: int
) -> None:
    """As in a container: a file that is a mount of its own can neither be renamed nor linked."""
    said = refused(old_store, stores.csv(GOOD), before=failing(function, number))
    assert f"{old_store} is mounted as a single file" in said.err
    assert "mount its directory instead" in said.err and len(said.lines) == 1


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_real_mount(stores: Stores, old_store: Path, tmp_path: Path, is_empty: bool) -> None:
    elsewhere = tmp_path / "elsewhere.db"
    shutil.copy2(old_store, elsewhere)
    if is_empty:
        elsewhere.write_bytes(b"")
    mount = ["mount", "--bind", str(elsewhere), str(old_store)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file")
    try:
        assert "mount its directory instead" in refused(old_store, stores.csv(GOOD)).err
    finally:
        subprocess.run(["umount", str(old_store)], check=True)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(stores: Stores, old_store: Path, number: int) -> None:
    """The import goes on, and always tells that there is no previous store, even in cron."""
    agents = [Record(f"{n:03d}", f"a{n:0127d}", "any", "k") for n in range(1, 150)]
    words: list[str | Path]
    note = f"note: {old_store}.old is not made: the file system has no hard links"
    for source, options in (agents, ["-v"]), (GOOD, ["-v"]), (agents, []):
        words = ["--db", old_store, "--import", stores.csv(source), *options]
        said = forked(*words, before=failing("link", number))
        assert said.status == 0 and note in said.lines, said
        assert rows(old_store) == source and beside(old_store) == set()


@pytest.mark.parametrize("step", ["open_text", "copy_agents", "compare"])
def test_not_enough_memory(stores: Stores, old_store: Path, step: str) -> None:
    def before() -> None:
        def fails(*_: object) -> None:
            raise MemoryError

        setattr(script, step, fails)

    said = refused(old_store, stores.csv(GOOD), before=before)
    assert len(said.lines) == 1 and "memory" in said.err and "nothing imported" in said.err


def test_a_fault_of_the_program_leaves_nothing(stores: Stores, old_store: Path) -> None:
    def before() -> None:
        def fails(*_: object) -> None:
            raise ValueError

        script.compare = fails

    child = Child("--db", old_store, "--import", stores.csv(GOOD), before=before)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.close()
    assert rows(old_store) == OLD and beside(old_store) == set()


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_just_before_they_are_blocked(stores: Stores, old_store: Path, times: int) -> None:
    """A second signal does not end the import while it clears up."""

    def before() -> None:
        mask, remove = script.pthread_sigmask, script.NewStore.remove
        blocked = 0

        def late(how: int, numbers: Any) -> None:
            nonlocal blocked
            blocked += how == signal.SIG_BLOCK
            if blocked == 3:  # the end of the block that builds the store
                blocked += 1
                raise KeyboardInterrupt
            mask(how, numbers)

        def interrupted(new: Any) -> None:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
            remove(new)

        script.pthread_sigmask = late
        script.NewStore.remove = interrupted

    said = refused(old_store, stores.csv(GOOD), before=before)
    assert "interrupted, nothing imported" in said.err


# ---------------------------------------------------------------- the previous store


def test_nothing_changed(stores: Stores, store: Path) -> None:
    """The store is not touched, so a server has nothing to reopen; nor is the previous one."""
    imported(store, stores.csv(OLD, "old.csv"))
    imported(store, stores.csv(GOOD))
    before = seen(store.parent)
    shuffled = stores.keys([*GOOD[2:], *GOOD[:2]])
    for source in (stores.csv(GOOD), shuffled, store):
        assert imported(store, source) == Said(0, "", "")
        said = imported(store, source, "-v")
        assert said.lines[-1] == f"nothing changed: {store} has the same 6 agents"
    assert seen(store.parent) == before


CHANGED: dict[str, Callable[[list[Record]], list[Record]]] = {
    "another name": lambda agents: [agents[0]._replace(name="x"), *agents[1:]],
    "another address": lambda agents: [agents[0]._replace(ip="any"), *agents[1:]],
    "another key": lambda agents: [agents[0]._replace(key=agents[1].key), *agents[1:]],
    "another id": lambda agents: [agents[0]._replace(id="999"), *agents[1:]],
    "one more": lambda agents: [*agents, agents[0]._replace(id="999", name="x", ip="any")],
    "one less": lambda agents: agents[1:],
}


@pytest.mark.parametrize("change", CHANGED)
def test_the_previous_store_is_kept(stores: Stores, store: Path, change: str) -> None:
    """It is the very same file, and it can be imported again."""
    previous = Path(f"{store}.old")
    imported(store, stores.csv(GOOD))
    inode = store.stat().st_ino
    changed = sorted(CHANGED[change](GOOD))
    imported(store, stores.csv(changed))
    assert rows(store) == changed and rows(previous) == GOOD
    assert previous.stat().st_ino == inode
    for now, then in ((GOOD, changed), (changed, GOOD)):
        imported(store, previous)
        assert rows(store) == now and rows(previous) == then


@pytest.mark.parametrize(
    "sql",
    [
        "DROP INDEX agent_ip",
        "INSERT INTO agent SELECT * FROM agent; DELETE FROM agent WHERE rowid = 2",
        "UPDATE agent SET id = (SELECT min(id) FROM agent)",
    ],
)
def test_a_store_that_somebody_has_changed(stores: Stores, store: Path, sql: str) -> None:
    """What an import made it is again: the same number of agents is not enough."""
    imported(store, stores.csv(GOOD))
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        database.executescript(sql)
    imported(store, stores.csv(GOOD))
    assert rows(store) == GOOD
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'index'"
        assert database.execute(query).fetchone() == (3,)


@pytest.mark.parametrize("is_writable", [False, True])
def test_a_store_that_was_restored_with_a_hard_link(
    stores: Stores, store: Path, is_writable: bool
) -> None:
    """Store and `.old` are one file then. rename() does nothing with two names of one file."""
    previous = Path(f"{store}.old")
    imported(store, stores.csv(OLD, "old.csv"))
    imported(store, stores.csv(GOOD))
    store.unlink()
    os.link(previous, store)
    if is_writable:
        store.chmod(0o666)
    for agents, before in (GOOD, OLD), (OLD, GOOD), (GOOD, OLD):
        imported(store, stores.csv(agents))
        assert rows(store) == agents and rows(previous) == before
        assert not previous.stat().st_mode & stat.S_IWOTH


def test_a_leftover_that_is_the_previous_store_already(stores: Stores, old_store: Path) -> None:
    """As an import leaves it that is killed after such a restoration."""
    previous, kept = Path(f"{old_store}.old"), Path(f"{old_store}.old.import")
    imported(old_store, stores.csv(GOOD))
    os.link(previous, kept)
    imported(old_store, stores.csv(GOOD))
    assert rows(previous) == OLD and not kept.exists()


def test_a_failed_import_leaves_the_mode_of_the_store(stores: Stores, old_store: Path) -> None:
    """It says that the store is as it was."""
    old_store.chmod(0o666)
    for function in "link", "rename":
        said = refused(old_store, stores.csv(GOOD), before=failing(function, errno.EIO))
        assert f"{old_store} is as it was" in said.err
    assert mode_of(old_store) == "0666"


def test_a_mode_is_put_right_though_nothing_changed(stores: Stores, store: Path) -> None:
    """Every request would refuse a store that everybody may write to."""
    source = stores.csv(GOOD)
    imported(store, source)
    store.chmod(0o666)
    imported(store, source)
    assert mode_of(store) == "0664" and mode_of(f"{store}.old") == "0664"
    assert answer(store, ["id", "001"])["error"] == 0
    imported(store, f"{store}.old")


# ---------------------------------------------------------------- two at once, and requests


def test_while_another_one_is_at_work(
    stores: Stores, old_store: Path, start: Callable[..., Child]
) -> None:
    """The second says so, the first goes on, requests get the old store, nobody reads the new."""
    reader, writer = os.pipe()
    place = Path(f"{old_store}.import")
    agents = records(2000)  # more than is read at once
    with os.fdopen(writer, "wb", 0) as stream:
        first = start("--db", old_store, "--import", "-", stdin=reader, before=lambda: os.umask(0))
        os.close(reader)
        stream.write(tabs(agents[:-1]).encode())
        until(lambda: place.exists() and place.stat().st_size, "the store that it builds")
        until(lambda: waits_for_input(first.pid), "it to wait for more")
        before = seen(place)
        said = forked("--db", old_store, "--import", stores.csv(GOOD))
        assert said.status == 1 and "another import" in said.err and str(place) in said.err
        assert seen(place) == before
        assert mode_of(place) == "0600"
        assert beside(old_store) == {place.name}
        assert answer(old_store, ["id", "900"])["error"] == 0
        assert answer(old_store, ["id", "001"])["error"] == 4
        stream.write(tabs(agents[-1:]).partition("\n")[2].encode())
    assert first.wait() == Said(0, "", "")
    assert rows(old_store) == sorted(agents) and beside(old_store) == {"agents.db.old"}


def test_another_one_that_starts_just_then(stores: Stores, old_store: Path) -> None:
    """The first ends between our `open` and our lock, and a third begins: what is its own stays."""
    place = Path(f"{old_store}.import")

    def before() -> None:
        flock = script.fcntl.flock
        held: list[int] = []

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


def test_another_one_that_starts_right_after_the_rename(stores: Stores, old_store: Path) -> None:
    """It takes the second name of the previous store for a leftover, and does what we would do."""
    kept, previous = f"{old_store}.old.import", f"{old_store}.old"

    def before() -> None:
        rename = os.rename

        def renamed(old: str, new: str) -> None:
            rename(old, new)
            if new == str(old_store):
                rename(kept, previous)

        setattr(os, "rename", renamed)  # noqa: B010 - mypy

    imported(old_store, stores.csv(GOOD), before=before)
    assert rows(old_store) == GOOD and rows(Path(previous)) == OLD


def test_many_at_once_do_not_mix(stores: Stores, store: Path, start: Callable[..., Child]) -> None:
    """The store is one's whose status was 0; who is refused says why, and takes nothing away."""
    agents = [records(500, turn) for turn in range(3)]
    sources = [stores.csv(some, f"{turn}.csv") for turn, some in enumerate(agents)]
    for _ in range(5):
        children = [start("--db", store, "--import", source) for source in sources]
        said = [child.wait() for child in children]
        assert 0 in [one.status for one in said]
        assert all((one.status, bool(one.err)) in ((0, False), (1, True)) for one in said), said
        assert rows(store) in [agents[turn] for turn, one in enumerate(said) if one.status == 0]
        assert beside(store) <= {"agents.db.old"}


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
            words = [*ask.command(), "--db", str(store), "--import", str(sources[turn])]
            subprocess.run(words, env={"PATH": ask.path}, check=True)
            until(partial(lambda key: server.key("id:001") == key, keys[turn]), "the new keys")
        load.wait(50)


def test_progress_on_a_terminal(stores: Stores, store: Path) -> None:
    """While agents are read, and on and on while the indexes are built."""

    def before() -> None:
        often()
        show = script.Progress.show

        def hurried(progress: Any) -> Any:
            progress.next_time = 0.0  # five times a second is too seldom to be seen here
            return show(progress)

        script.Progress.show = hurried

    words = ("--db", store, "--import", stores.csv(records(MANY)))
    with Terminal() as terminal:
        child = Child(*words, stderr=terminal.end, before=before)
        text = terminal.shown()
        assert child.wait().status == 0
    shown = [int(number) for number in re.findall(r"(\d+) agents?\r", text)]
    assert shown == sorted(shown) and set(shown) == set(range(1, MANY + 1))
    assert shown.count(MANY) > 4  # one is for the last agent, at most one for its insertion


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN])
def test_a_terminal_that_has_gone_away(stores: Stores, store: Path, number: int) -> None:
    """The import goes on: only the progress is lost."""

    def before() -> None:
        setattr(os, "isatty", lambda _: True)  # noqa: B010 - mypy
        failing("write", number)()

    said = forked("--db", store, "--import", stores.csv(GOOD), before=before)
    assert said.status == 0, said
    assert rows(store) == GOOD


# ---------------------------------------------------------------- many


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
    """At most 3 times what sqlite3's own .import takes with the same indexes, in 100 MB."""
    sqlite = shutil.which("sqlite3")
    if sqlite is None:
        pytest.skip("sqlite3 is not installed")
    source = stores.text("", "million.csv")
    with source.open("w") as stream:
        stream.write("id,name,ip,key\n")
        for n in range(1, MILLION + 1):
            ip = f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"
            stream.write(f"{n:03d},agent-{n},{ip},{n * 7919:064x}\n")
    indexes = [f"CREATE INDEX agent_{field} ON agent ({field})" for field in ("id", "name", "ip")]
    schema = [script.TABLE, *indexes]
    commands = stores.text(";\n".join(schema) + f";\n.import --csv --skip 1 {source} agent\n", "c")
    ratios = []
    for turn in range(2):
        store.unlink(missing_ok=True)  # there is nothing to compare with, for both of them
        with commands.open() as stream:
            theirs = cost([sqlite, tmp_path / f"{turn}.db"], stdin=stream)
        own = cost([*ask.command(), "--db", store, "--import", source], env={"PATH": ask.path})
        print(f"own {own}, sqlite3 {theirs}")
        ratios.append(own.seconds / theirs.seconds)
        assert own.megabytes <= 100
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
