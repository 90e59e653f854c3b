"""What a server does when its source is replaced, overwritten, broken or gone while it serves.

Each agent's key tells the generation of the store that it is from (`serving.key`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Caller, Stores, script
from manager import check_line
from serving import Load, Server, alive, key, records, refused, serving, until

AGENTS = 100
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]


def versions(stores: Stores, count: int) -> list[bytes]:
    """Give the bytes of COUNT generations of a store, of one size and in one shape."""
    content = stores.sqlite(records(1), name="first.db").read_bytes()
    old = key(1).encode()
    assert content.count(old) == 1
    return [content.replace(old, key(1, generation).encode()) for generation in range(count)]


def move_in(path: Path, content: bytes) -> None:
    """Put another file in the place of PATH, as `mv` does."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.chmod(0o600)
    beside.rename(path)


def test_replaced_twenty_times_within_a_second_again_and_again(
    stores: Stores, tmp_path: Path
) -> None:
    """The next answer is the newest's, from whichever worker; inodes come back, times are equal."""
    generations = versions(stores, 20)
    path = stores.folder / "agents.db"
    move_in(path, generations[0])
    with serving(path, tmp_path / "s", "--workers", "3") as server:
        for _ in range(10):
            for number, content in enumerate(generations):
                move_in(path, content)
                if number % 3:
                    assert server.key() == key(1, number)
            assert {server.key() for _ in range(9)} == {key(1, 19)}
        assert not server.matching("error:")


def test_replaced_under_load(stores: Stores, tmp_path: Path) -> None:
    """Not one of 32 clients has an error."""
    path = stores.sqlite(records(AGENTS))
    other = stores.sqlite(records(AGENTS, 1), name="other.db").read_bytes()
    with serving(path, tmp_path / "s") as server, Load(server.path, REQUESTS) as load:
        for content in [other, path.read_bytes()] * 10:
            move_in(path, content)
            load.wait(20)


def test_replaced_by_import(stores: Stores, tmp_path: Path, ask: Caller) -> None:
    path = stores.folder / "agents.db"

    def bring_in(generation: int) -> None:
        source = stores.csv(records(AGENTS, generation))
        assert ask.call("--db", path, "--import", source).status == 0

    bring_in(0)
    with serving(path, tmp_path / "s") as server:
        for generation in 1, 2, 3:
            assert server.key("id:100") == key(100, generation - 1)
            bring_in(generation)
            assert {server.key("id:100") for _ in range(16)} == {key(100, generation)}


def test_overwritten_by_cp(stores: Stores, tmp_path: Path) -> None:
    """At most one error for each worker, and then the new agents for good."""
    path = stores.sqlite(records(AGENTS))
    others = [stores.sqlite(records(AGENTS, n), name=f"{n}.db") for n in (1, 2, 3)]
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        for generation, other in enumerate(others, 1):
            assert {server.error(request) for request in REQUESTS} == {0}
            shutil.copyfile(other, path)
            assert [server.error("id:001") for _ in range(12)].count(2) <= 2
            for number, request in enumerate(REQUESTS, 1):
                assert server.key(request) == key(number, generation)


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_commit_shows_in_the_next_answer(stores: Stores, tmp_path: Path, journal: str) -> None:
    path = stores.sqlite(records(AGENTS))
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer,
        serving(path, tmp_path / "s", "--workers", "3") as server,
    ):
        writer.execute(f"PRAGMA journal_mode = {journal}")
        writer.execute("PRAGMA synchronous = OFF")
        for generation in range(1, 30):
            new = key(1, generation)
            writer.execute("UPDATE agent SET agent_key = ? WHERE id = '001'", (new,))
            assert server.key() == new
        writer.execute("BEGIN")
        writer.execute("UPDATE agent SET agent_key = 'not committed'")
        assert journal == "delete" or server.key() == new


def test_opened_anew_after_an_error(stores: Stores) -> None:
    """Even where the file looks the same: it may change twice within a tick of its clock."""
    path = str(stores.sqlite(records(1)))
    with script.Server("", path, {}) as server:
        for error in 0, 2, 0:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.send(b"id:001")
                script.Conversation(theirs, "", server)
                assert check_line(ours.recv(65536))["error"] == error
            if not error and server.source:
                server.source.connection.close()


def garbage(path: Path) -> None:
    """Something else has its name."""
    path.rename(path.with_name("away"))
    path.write_bytes(bytes(range(256)) * 64)


def no_table(path: Path) -> None:
    """Another database has its name."""
    path.rename(path.with_name("away"))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (id)")


def folder(path: Path) -> None:
    """A folder has its name."""
    path.rename(path.with_name("away"))
    path.mkdir()


BREAK: dict[str, Callable[[Path], object]] = {
    "No such file": lambda path: path.rename(path.with_name("away")),
    "everybody": lambda path: path.chmod(0o666),
    "no SQLite database": garbage,
    "lacks a table": no_table,
    "not a regular file": folder,
}


def mend(path: Path) -> None:
    """The store as it was, in its place again."""
    with contextlib.suppress(FileNotFoundError):
        away = path.with_name("away").stat() and path.with_name("away")
        if path.is_dir():
            path.rmdir()
        away.rename(path)
    path.chmod(0o600)


@pytest.mark.parametrize(("reason", "break_it"), BREAK.items(), ids=BREAK)
def test_gone_and_back(
    stores: Stores, tmp_path: Path, reason: str, break_it: Callable[[Path], object]
) -> None:
    """Error 2, with the reason in the log, until it is back: in the next answer."""
    path = stores.sqlite(records(AGENTS))
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        for _ in range(2):
            assert {server.key() for _ in range(4)} == {key(1)}
            break_it(path)
            assert {server.error("id:001") for _ in range(4)} == {2}
            mend(path)
            assert {server.key() for _ in range(4)} == {key(1)}
        assert f"{path}: " in server.wait_line(reason)


@pytest.mark.parametrize(("reason", "break_it"), BREAK.items(), ids=BREAK)
def test_no_start_with_such_a_source(
    stores: Stores, tmp_path: Path, reason: str, break_it: Callable[[Path], object]
) -> None:
    path = stores.sqlite(records(1))
    break_it(path)
    status, line = refused(path, tmp_path / "s")
    assert (status, f"{path}: " in line, reason in line) == (1, True, True), line
    assert not (tmp_path / "s").exists()


def hang_up(server: Server) -> None:
    """Have the source read again, and wait until the old workers have gone."""
    old = server.workers
    server.send(signal.SIGHUP)
    until(lambda: not any(map(alive, old)), "the end of the old workers")


@pytest.mark.parametrize("kind", ["csv", "keys", "sql"])
def test_text_is_read_again_at_a_hang_up_only(stores: Stores, tmp_path: Path, kind: str) -> None:
    """So a file that is half written is never served."""
    path = stores.make(kind, records(AGENTS))
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        stores.make(kind, records(AGENTS, 1))
        move_in(path, path.read_bytes())
        assert {server.key() for _ in range(6)} == {key(1)}
        assert server.key("ip:10.0.0.100") == key(100)
        hang_up(server)
        assert {server.key() for _ in range(6)} == {key(1, 1)}
        for fault in "No such file", "everybody", "not a regular file":
            BREAK[fault](path)
            server.send(signal.SIGHUP)
            assert server.wait_line(fault).startswith("agent_key_request: error: ")
            mend(path)
        path.write_text("id;name\n")
        server.send(signal.SIGHUP)
        server.wait_line("line 1" if kind == "sql" else "its header needs")
        old = server.workers
        os.kill(old[0], signal.SIGKILL)
        until(lambda: len(set(server.workers) - {old[0]}) == 2, "another worker")
        assert {server.key() for _ in range(6)} == {key(1, 1)}
        stores.make(kind, records(AGENTS, 2))
        hang_up(server)
        assert {server.key() for _ in range(6)} == {key(1, 2)}


def test_another_kind_of_source_in_its_place(stores: Stores, tmp_path: Path) -> None:
    """What a file is its content tells: a database is found at once, a text at a hang-up."""
    path = stores.sqlite(records(3), name="agents")
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        assert server.key() == key(1)
        move_in(path, stores.csv(records(3, 1)).read_bytes())
        hang_up(server)
        assert {server.key() for _ in range(6)} == {key(1, 1)}
        move_in(path, stores.sqlite(records(3, 2), name="next").read_bytes())
        hang_up(server)
        assert {server.key() for _ in range(6)} == {key(1, 2)}
