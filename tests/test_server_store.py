"""What a server does when its source is replaced, overwritten, broken or gone while it serves.

Each agent's key tells the generation of the store that it is from (`serving.key`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Caller, Stores, script
from manager import check_line
from serving import (
    Load,
    Server,
    alive,
    converse,
    key,
    patched,
    records,
    refused,
    serve_command,
    serving,
    started,
    until,
    worker,
)  # fmt: skip

AGENTS = 100
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
HEADER = "id,name,ip,key\n"  # of CSV


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


def test_overwritten_by_a_store_that_looks_the_same(stores: Stores, tmp_path: Path) -> None:
    """Inode, size and SQLite's counter of changes are equal: SQLite believes what it remembers."""
    generations = versions(stores, 5)
    path = stores.folder / "agents.db"
    move_in(path, generations[0])
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        for number, content in enumerate(generations):
            path.write_bytes(content)
            assert {server.key() for _ in range(8)} == {key(1, number)}


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


def test_a_store_in_wal_mode_where_the_server_may_not_write(open_script: Path, nobody: int) -> None:
    """SQLite takes it as one that nobody changes, until somebody does."""
    folder = open_script.parent
    path = Stores(folder).sqlite(records(3))
    (folder / "run").mkdir()
    os.chown(folder / "run", nobody, -1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
    command = [str(open_script), *serve_command(path, folder / "run" / "s")[3:]]
    with started(command, folder / "run" / "s", user=nobody) as server:
        server.wait_line("ready")
        assert {server.key() for _ in range(16)} == {key(1)}
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            for generation in 1, 2:
                update = "UPDATE agent SET agent_key = ? WHERE id = '001'"
                writer.execute(update, (key(1, generation),))
                assert {server.key() for _ in range(16)} == {key(1, generation)}


def test_opened_anew_after_an_error(stores: Stores) -> None:
    """Even where the file looks the same: it may change twice within a tick of its clock."""
    served = worker(stores.sqlite(records(1)))
    for error in 0, 2, 0:
        assert check_line(converse(served, b"id:001"))["error"] == error
        if not error:
            served.source.connection.close()


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
    "the first line of a CSV file must be": garbage,
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
        server.wait_line("line 1" if kind == "sql" else "it lacks a column")
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
        move_in(path, HEADER.encode())
        server.send(signal.SIGHUP)
        server.wait_line("no valid agent")
        assert server.error("id:001") == 2  # not 4: the agents are not gone
        move_in(path, stores.csv(records(3, 1)).read_bytes())
        hang_up(server)
        assert {server.key() for _ in range(6)} == {key(1, 1)}
        move_in(path, stores.sqlite(records(3, 2), name="next").read_bytes())
        hang_up(server)
        assert {server.key() for _ in range(6)} == {key(1, 2)}


# ---------------------------------------------------------------- what a hang-up does not accept

GOOD = "001,a,any,k1\n002,b,any,k2\n"
NOT_ACCEPTED = {  # and what the log says
    "header only": (HEADER, "no valid agent, 0 faults"),
    "junk only": (HEADER + "junk\nmore junk\n", "no valid agent, 2 faults"),
    "cut key": (HEADER + "001,a,any,k1\n002,b,any,k", "line 3 has no end"),
    "cut name": (HEADER + "001,a,any,k1\n002,b", "line 3 has no end"),
    "cut header": ("id,name,ip,ke", "it lacks a column"),
    "empty": ("", "it is empty"),
}


@pytest.mark.parametrize(("content", "reason"), NOT_ACCEPTED.values(), ids=NOT_ACCEPTED)
def test_a_hang_up_does_not_replace_agents_by_none(
    stores: Stores, tmp_path: Path, content: str, reason: str
) -> None:
    """The agents stay, in new workers, too; and the next sound file is read."""
    path = stores.text(HEADER + GOOD, "agents.csv")
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        assert server.wait_line("ready").endswith(f"source {path}: 2 agents, 0 faults")
        path.write_text(content)
        server.send(signal.SIGHUP)
        line = server.wait_line("error: ")
        assert reason in line and line.endswith("; the server keeps the agents that it has")
        os.kill(server.workers[0], signal.SIGKILL)
        server.wait_line("another replaces it")
        assert {server.key("id:002") for _ in range(6)} == {"k2"}
        path.write_text(HEADER + GOOD + "003,c d,any,k3\n")
        hang_up(server)
        line = server.wait_line("read again")
        assert line.endswith(f"info: source {path} read again: 2 agents, 1 fault")


def test_a_source_without_agents_may_be_replaced_by_another(stores: Stores, tmp_path: Path) -> None:
    """A new fleet has no agents yet: the server starts, and a hang-up changes nothing."""
    path = stores.text(HEADER, "agents.csv")
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        assert server.wait_line("ready").endswith(": 0 agents, 0 faults")
        hang_up(server)
        server.wait_line("read again: 0 agents, 0 faults")
        assert server.error("id:001") == 4
        path.write_text(HEADER + "001,a,any,k1\n")
        hang_up(server)
        server.wait_line("read again: 1 agent, 0 faults")
        assert server.key() == "k1"


CUT = HEADER + "001,a,any,k1\n002,b,any,k"


def test_no_start_with_a_text_whose_last_line_has_no_end(stores: Stores, tmp_path: Path) -> None:
    """It may be half-written, and then most of its agents are missing."""
    path = stores.text(CUT, "agents.csv")
    status, line = refused(path, tmp_path / "s")
    assert (status, line) == (
        1,
        f"agent_key_request: error: Cannot read key source: {path}: "
        "line 3 has no end; the file may be half-written",
    )


def no_agents(stores: Stores) -> Path:
    """An SQLite store without agents."""
    return stores.sqlite([], name="none.db")


def only_the_manager(stores: Stores) -> Path:
    """The global.db of a manager without agents: its one row is the manager itself."""
    path = stores.folder / "global.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE agent (id INTEGER, name, register_ip, internal_key)")
        database.execute("INSERT INTO agent VALUES (0, 'manager', '127.0.0.1', 'k')")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("make", [no_agents, only_the_manager], ids=lambda make: make.__name__)
def test_an_empty_database_does_not_replace_agents(
    stores: Stores, tmp_path: Path, make: Callable[[Stores], Path]
) -> None:
    """Neither those of a text, which stay, nor those of a database, for a text that has none."""
    path = stores.csv(records(3), name="agents")
    empty = make(stores).read_bytes()
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        move_in(path, empty)
        server.send(signal.SIGHUP)
        line = server.wait_line("error: ")
        assert line.endswith("it has no agent; the server keeps the agents that it has")
        assert {server.key() for _ in range(6)} == {key(1)}
    with serving(path, tmp_path / "t", "--workers", "2") as server:
        move_in(path, HEADER.encode())  # there were no agents before
        hang_up(server)
        assert server.error("id:001") == 4


FAILURES = {
    "MemoryError()": "it needs too much memory",
    "sqlite3.OperationalError('unable to open database file')": "unable to open database file",
    "RuntimeError('precious')": "Internal error: RuntimeError",
    "OSError(5, 'Input/output error', 'x')": "x: Input/output error",
}


@pytest.mark.parametrize(("failure", "reason"), FAILURES.items(), ids=FAILURES)
def test_whatever_fails_at_a_hang_up_the_server_goes_on(
    stores: Stores, tmp_path: Path, failure: str, reason: str
) -> None:
    """For example, the store is renamed between two steps of its opening."""
    path = stores.csv(records(3))
    patch = f"""
import os, sqlite3
original = script.open_source
def open_source(*arguments):
    if os.path.exists({str(tmp_path / "fail")!r}):
        raise {failure}
    return original(*arguments)
script.open_source = open_source
"""
    command = patched(patch, serve_command(path, tmp_path / "s", "--workers", "2"))
    with started(command, tmp_path / "s") as server:
        server.wait_line("ready")
        (tmp_path / "fail").touch()
        for _ in range(3):
            server.send(signal.SIGHUP)
            assert reason in server.wait_line("error: ")
        assert server.key() == key(1)
        (tmp_path / "fail").unlink()
        stores.csv(records(3, 1))
        hang_up(server)
        assert server.key() == key(1, 1)
        assert not server.matching("precious")


def test_a_file_that_does_not_fit_into_memory(stores: Stores, tmp_path: Path) -> None:
    """The supervisor may use little more memory than it has."""
    path = stores.csv(records(3))
    with serving(path, tmp_path / "s", "--workers", "2") as server:
        size = 4096 * int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0])
        limit = size + (16 << 20)
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, limit))
        path.write_text(HEADER + "".join(f"{n},a{n},any,k\n" for n in range(1001, 150_000)))
        server.send(signal.SIGHUP)
        until(lambda: len(server.lines) > 1, "a line")
        assert "error: " in server.lines[1] and "memory" in server.lines[1], server.lines
        assert server.key() == key(1)


# ---------------------------------------------------------------- what a failed request leaves


def descriptors(process: int) -> int:
    """Count the open files of a process."""
    return len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.parametrize("reason", ["lacks a table", "first line of a CSV", "locked"])
def test_failed_requests_leave_nothing_open(
    stores: Stores, tmp_path: Path, locked: Callable[[Path], None], reason: str
) -> None:
    """A database takes a limited number of connections, and a process one of files."""
    path = stores.sqlite(records(3))
    with serving(path, tmp_path / "s", "--workers", "1", "--timeout", "0.1") as server:
        (process,) = server.workers
        assert server.error("id:001") == 0
        before = descriptors(process)
        if reason == "locked":
            locked(path)
        else:
            next(make for why, make in BREAK.items() if reason in why)(path)
        for _ in range(10):
            assert server.error("id:001") == 2
        assert server.workers == [process]
        # The worker sends its answer before it closes what failed.
        until(lambda: descriptors(process) <= before, "the end of what failed")


@pytest.mark.parametrize("kind", ["sqlite", "csv", "keys", "sql"])
def test_hang_ups_leave_nothing_open(stores: Stores, tmp_path: Path, kind: str) -> None:
    """The supervisor has its source open while it reads, and no longer."""
    path = stores.make(kind, records(3))
    with serving(path, tmp_path / "s", "--workers", "1") as server:
        before = descriptors(server.process.pid)
        for _ in range(5):
            hang_up(server)
        until(lambda: descriptors(server.process.pid) <= before, "the end of what was read")


# ---------------------------------------------------------------- the server and a single request

TYPES = ("INTEGER", "INT", "REAL", "FLOAT", "NUMERIC", "BLOB", "TEXT", "VARCHAR(8)", "ANY", "")
IDS = ("001", "1", 1, 1.0, "1.0", b"1", b"001", "010", 10, "0010", 1234567, "12345678", " 001 ")


def one_shot(source: Path, value: str) -> bytes:
    """What a request by argv prints."""
    words = ["id", value]
    line: bytes = script.answer(words, lambda: script.open_source(str(source), 60), "").line()
    return line


@pytest.mark.parametrize("type_name", TYPES)
def test_both_methods_find_the_same_in_columns_of_any_type(
    stores: Stores, tmp_path: Path, type_name: str
) -> None:
    """What a request by argv finds, the server finds; in memory or not, in a table or a view."""
    table = f"CREATE TABLE stored (id {type_name}, name TEXT, ip TEXT, agent_key TEXT);"
    view = "CREATE VIEW agent AS SELECT id, name, ip, agent_key FROM stored"
    insert = "INSERT INTO stored VALUES (?, 'a', 'any', ?)"
    asked = ["001", "010", "0010", "1234567", "12345678", "100"]
    path = stores.folder / "typed.db"
    for number, stored in enumerate(IDS):
        path.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.executescript(table + view)
            database.execute(insert, (stored, f"key-{number}"))
            dump = "\n".join(database.iterdump()) + "\n"
        as_script = stores.text(dump, "typed.sql")
        memory = script.Memory(script.open_source(str(as_script), 60))
        for value in asked:
            request = f"id:{value}".encode()
            assert converse(worker(path), request) == one_shot(path, value), (stored, value)
            in_memory = converse(worker(as_script, memory), request)
            assert in_memory == one_shot(as_script, value), (stored, value)
