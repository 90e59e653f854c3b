"""What a server logs, how often, and that nobody who reads the log slowly stops a server."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import stat
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Stores, script
from serving import patched, records, serve_command, serving, started

AGENTS = 300
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]


@pytest.fixture
def store(stores: Stores) -> Path:
    """An SQLite store."""
    return stores.sqlite(records(AGENTS))


@pytest.fixture
def troubled(stores: Stores) -> Path:
    """A store with an agent for errors 5 and 6."""
    rows = [record._replace(id="900") for record in records(2)]
    return stores.sqlite([*records(AGENTS), *rows, rows[0]._replace(id="901", name="bad name")])


def test_the_journal_gets_priorities(troubled: Path, tmp_path: Path) -> None:
    """Then the name is not there twice; `journalctl -p err` shows what somebody must mend."""
    command, path = serve_command(troubled, tmp_path / "s", "--workers", "1"), tmp_path / "journal"
    with path.open("wb") as journal:
        status = os.fstat(journal.fileno())
        env = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        with started(command, tmp_path / "s", env=env, stderr=journal) as server:
            server.log = path
            server.wait_line("ready")
            errors = [server.error(f"id:{n}") for n in ("001", "900", "901", "999", "1")]
            assert errors == [0, 5, 6, 4, 3]
            troubled.rename(tmp_path / "away")
            assert server.error("id:001") == 2
            server.wait_line("Cannot")
            os.kill(server.workers[0], signal.SIGKILL)
            server.wait_line("another replaces it")
            told = [line.split()[0] for line in server.lines]
    assert told == ["<6>ready:", "<6>id:001:", "<3>id:900:", "<3>id:901:", "<3>Cannot", "<3>worker"]


def test_the_same_line_once_a_minute_over_all_workers(troubled: Path, tmp_path: Path) -> None:
    """A flood fills no disk, but every agent whose key went out is told, and never its key."""
    with serving(troubled, tmp_path / "s", "--workers", "4") as server:
        for request, error in [("id:900", 5), ("id:901", 6), ("id:20000000", 4)] * 20:
            assert server.error(request) == error
        for request in REQUESTS[:100]:
            assert server.error(request) == 0
        told = [
            "error: id:900: Found more than one match for required id",
            "error: id:901: Stored record is invalid: agent 901: " + script.RULES["name"],
            *(f"info: {each}: key handed out: agent {each[3:]}" for each in REQUESTS[:100]),
        ]
        server.wait_line("", 1 + len(told))
        assert sorted(server.lines[1:]) == sorted("agent_key_request: " + line for line in told)


def test_the_same_line_after_a_minute(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the second; another line is told at once."""
    log = script.Log(False)
    for now, text in (100, "a"), (101.5, "b"), (159.9, "a"), (160, "a"), (219, "a"), (220, "a"):
        clock = types.SimpleNamespace(monotonic=lambda now=now: now)
        monkeypatch.setattr(script, "time", clock)
        log.info(text)
    assert [line[-1] for line in capfd.readouterr().err.splitlines()] == ["a", "b", "a", "a"]


def test_a_line_that_was_not_written_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe was full. The line counts as logged only when it has been."""
    log = script.Log(False)
    told: list[bytes] = []

    def write(line: bytes) -> int:
        raise BlockingIOError

    monkeypatch.setattr(log, "write", write)
    log.error("precious")
    monkeypatch.setattr(log, "write", told.append)
    log.error("precious")
    log.error("precious")
    assert told == [b"agent_key_request: error: precious\n"]


def test_verbose_tells_all(troubled: Path, tmp_path: Path) -> None:
    """`-v`: each request, again and again; what is not printable is not printed."""
    with serving(troubled, tmp_path / "s", "-v") as server:
        for request in ["id:001", "id:999", "id:1", "id:\n\t", "id:900"] * 3:
            server.ask(request)
        server.wait_line("", 16)
        assert len(server.matching(" id:??: Bad arguments given")) == 3


def fill(descriptor: int) -> None:
    """Write to a pipe, socket or terminal until it takes no more; its flags stay as they are."""
    for size in 4096, 1:
        with contextlib.suppress(BlockingIOError):
            while True:
                write_at_once(descriptor, b"x" * size)


def write_at_once(descriptor: int, content: bytes) -> None:
    """Write, or raise BlockingIOError: through an opening of our own, or a flag of send()."""
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        with socket.socket(socket.AF_UNIX, fileno=os.dup(descriptor)) as connection:
            connection.send(content, socket.MSG_DONTWAIT)
        return
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        os.write(own, content)
    finally:
        os.close(own)


@contextlib.contextmanager
def both_ends(kind: str) -> Iterator[tuple[int, int]]:
    """Give a reading and a writing end of a pipe, a socket or a terminal."""
    if kind == "socket":
        reader, writer = (each.detach() for each in socket.socketpair())
    else:
        reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal", "foreign pipe"])
def test_a_log_that_nobody_reads_stops_nothing(store: Path, tmp_path: Path, kind: str) -> None:
    """It is full, as when the reader hangs. Other programs have it as it was: it blocks."""
    command = serve_command(store, tmp_path / "s")
    if kind == "foreign pipe":  # root's, in a container: it cannot be opened once more
        patch = "script.stderr_without_waiting = lambda: script.write_if_there_is_room"
        command = patched(patch, command)
    with (
        both_ends(kind.split()[-1]) as (reader, writer),
        started(command, tmp_path / "s", stderr=writer) as server,
    ):
        assert b"ready" in os.read(reader, 1000)
        assert os.get_blocking(writer)
        fill(writer)
        for request in REQUESTS[:50]:
            assert server.error(request) == 0
        server.send(signal.SIGHUP)
        server.send(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert os.get_blocking(writer)


def test_a_log_in_a_file_is_appended_to(store: Path, tmp_path: Path) -> None:
    """Nothing that others write there is lost."""
    path = tmp_path / "shared.log"
    path.write_text("before\n")
    with path.open("ab") as stream:
        command = serve_command(store, tmp_path / "s")
        with started(command, tmp_path / "s", stderr=stream) as server:
            server.log = path
            server.wait_line("ready")
            os.write(stream.fileno(), b"between\n")
            assert server.error("id:001") == 0
            server.wait_line("id:001")
            assert (server.lines[0], server.lines[2]) == ("before", "between")
