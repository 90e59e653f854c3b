"""How a server lives and ends: it loses nobody, whatever happens to its processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import resource
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SCRIPT, Caller, Python, Stores, script
from serving import (
    LIMIT,
    Load,
    Server,
    alive,
    connections,
    faults_of,
    frozen,
    key,
    options,
    patched,
    records,
    refused,
    serve_command,
    serving,
    started,
    until,
)  # fmt: skip

AGENTS = 300
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
UNIT = {"INVOCATION_ID": "0" * 32}  # set by systemd for what it starts


@pytest.fixture
def store(stores: Stores) -> Path:
    """An SQLite store."""
    return stores.sqlite(records(AGENTS))


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of two workers."""
    with serving(store, tmp_path / "s", "--workers", "2") as running:
        yield running


def test_a_life_under_every_interpreter(
    interpreter: Python, stores: Stores, tmp_path: Path
) -> None:
    """Start, answer, read again, answer, lose a worker, end."""
    source = stores.csv(records(3))
    with serving(source, tmp_path / "s", "--workers", "2", python=interpreter) as server:
        assert (server.key(), server.key("ip:10.0.0.1")) == (key(1), key(1))
        assert [server.error(request) for request in ("id:004", "id:1", "id:")] == [4, 3, 1]
        old = server.workers
        stores.csv(records(3, 1))
        server.send(signal.SIGHUP)
        until(lambda: not any(map(alive, old)), "the end of the old workers")
        assert server.key() == key(1, 1)
        os.kill(server.workers[0], signal.SIGKILL)
        server.wait_line("worker ")
        server.send(signal.SIGTERM)
        server.end()
        assert server.lines[-1] == "agent_key_request: info: stopping"
        assert not server.path.exists()


def test_what_it_takes_when_nothing_is_said(store: Path) -> None:
    """As `--help` and the README tell: five seconds for a request, one for a silent client."""
    assert script.Supervisor(options(store)).seconds == 5
    assert script.Supervisor(options(store, timeout=3.0)).seconds == 3
    assert script.FIRST_PATIENCE == 1


def test_ps_shows_the_script_and_its_options(store: Path, tmp_path: Path, ask: Caller) -> None:
    """Started by its name, as in a unit: not the loader that a request gets."""
    words = ["--db", str(store), "--serve", "--socket", str(tmp_path / "s")]
    with started([str(SCRIPT), *words], tmp_path / "s", env={"PATH": ask.path}) as server:
        line = f"agent_key_request: info: ready: 8 workers on {tmp_path / 's'}, source {store}"
        assert server.wait_line("ready") == line
        assert len(server.workers) == 8
        for process in server.process.pid, server.workers[0]:
            shown = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
            assert [Path(shown[0]).name, *shown[1:]] == ["python3", "-IS", str(SCRIPT), *words, ""]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_read_again_ten_times_under_load(stores: Stores, tmp_path: Path, kind: str) -> None:
    """Not one of 32 clients loses an answer, and then not one who has connected before the end."""
    source = stores.make(kind, records(AGENTS))
    with serving(source, tmp_path / "s") as server:
        with Load(server.path, REQUESTS, may_stop=True) as load:
            for _ in range(10):
                server.send(signal.SIGHUP)
                load.wait(60)
            server.send(signal.SIGTERM)
            server.end()
        assert not server.matching("error:")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_who_waits_in_the_queue_at_the_end_is_answered(
    server: Server, number: signal.Signals, kill: Callable[[int, int], None]
) -> None:
    """200 of them; a signal to the whole group, as a terminal sends it, changes nothing."""
    with contextlib.ExitStack() as stack:
        with frozen(server.workers):
            waiting = stack.enter_context(connections(server.path, REQUESTS[:200]))
            kill(server.process.pid, number)
            kill(server.process.pid, number)
            server.wait_line("stopping")
            until(lambda: not server.path.exists(), "the path to go")
        assert not faults_of(waiting, REQUESTS)
        server.end()


@pytest.mark.parametrize("env", [{}, UNIT], ids=["by hand", "by a unit"])
def test_a_stop_answers_the_queue_and_takes_no_time(
    store: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """A server of a unit without a socket has made its own: systemd keeps no queue for it."""
    command = serve_command(store, tmp_path / "s", "--workers", "2")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(started(command, tmp_path / "s", env=env))
        server.wait_line("ready")
        with frozen(server.workers):
            waiting = stack.enter_context(connections(server.path, REQUESTS[:100]))
            server.send(signal.SIGTERM)
            server.wait_line("stopping")
        started_at = time.monotonic()
        assert not faults_of(waiting, REQUESTS)
        server.end()
        assert time.monotonic() - started_at < script.DRAIN_SECONDS / 3


def test_who_asks_just_after_the_signal_and_who_never_asks(server: Server) -> None:
    """The manager connects and sends in two calls."""
    with connections(server.path, 40 * [""]) as silent:
        server.send(signal.SIGTERM)
        for connection, request in zip(silent[:30], REQUESTS, strict=False):
            connection.send(request.encode())
        assert not faults_of(silent[:30], REQUESTS)
        server.end()


def test_a_worker_that_does_not_end_is_killed(store: Path, tmp_path: Path) -> None:
    """Whoever waits for it has waited long enough (here for 0.2 s)."""
    command = serve_command(store, tmp_path / "s", "--workers", "2")
    with started(patched("script.DRAIN_SECONDS = 0.2", command), tmp_path / "s") as server:
        server.wait_line("ready")
        workers = server.workers
        with frozen(workers[:1]):
            server.send(signal.SIGTERM)
            assert server.process.wait(LIMIT) == 0
            line = f"error: worker {workers[0]} has not ended for 0.2 s; it is killed"
            assert server.lines[-1].endswith(line)
            until(lambda: not any(map(alive, workers)), "the end of the workers")


def test_the_socket_of_somebody_else_stays(server: Server) -> None:
    """The path was taken over meanwhile."""
    server.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.path))
    server.send(signal.SIGTERM)
    server.end()
    assert server.path.exists()


@pytest.mark.parametrize("how", ["hang-up", "Ctrl-C"])
def test_on_a_terminal(store: Path, tmp_path: Path, how: str) -> None:
    """A hang-up ends it there (elsewhere it reads again), as if one had pressed Ctrl-C."""
    ours, theirs = pty.openpty()
    command, path = serve_command(store, tmp_path / "s", "--workers", "2"), tmp_path / "s"

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with (
        open(ours, "r+b", buffering=0) as terminal,
        started(command, path, stdout=theirs, stderr=theirs, preexec_fn=take_terminal) as server,
    ):
        assert b"ready" in terminal.read(1000)
        assert os.get_blocking(theirs)  # the shell's, too
        os.close(theirs)
        assert {server.error(request) for request in REQUESTS[:50]} == {0}
        if how == "hang-up":
            terminal.close()
        else:
            terminal.write(b"\3")
        server.end()


# ---------------------------------------------------------------- processes that die


def test_a_worker_that_is_killed_is_replaced(server: Server) -> None:
    """Only what it was about to answer may be lost."""
    victims = server.workers
    with frozen(victims[1:]), connections(server.path, REQUESTS[:50]) as waiting:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        assert len(faults_of(waiting, REQUESTS)) <= len(victims)
    for victim in victims:
        assert "signal 9" in server.wait_line(f"error: worker {victim} ended")
    until(lambda: len(server.workers) == 2, "two workers")


def test_a_worker_that_cannot_go_on_says_why(server: Server) -> None:
    """It may open no file more, so it can accept nobody: another does."""
    worker = server.workers[0]
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, 3))
    ended = server.wait_line(f"worker {worker} ended")
    told = server.matching(f"worker {worker}: ")[0]
    assert told.startswith("agent_key_request: error: ") and "Too many open files" in told
    assert "ended, status 1; another replaces it" in ended
    assert server.error("id:001") == 0


def test_the_end_of_the_parent_ends_the_workers(server: Server, store: Path) -> None:
    """However busy they are; and a new server can start there."""
    workers = server.workers

    def ended() -> bool:
        with contextlib.suppress(OSError):
            server.ask("id:001")
        return not any(map(alive, workers))

    server.process.kill()
    until(ended, "the end of the workers")
    with serving(store, server.path) as another:
        assert another.error("id:001") == 0


def test_a_start_right_after_the_parent_was_killed(server: Server, store: Path) -> None:
    """Its workers end within a second or so, and the new server waits for them."""
    server.process.kill()  # and nobody collects it
    with serving(store, server.path) as another:
        assert another.error("id:001") == 0


def test_a_start_while_old_workers_do_not_end(server: Server, store: Path) -> None:
    """They still have the socket: the new server says so, and does not wait for ever."""
    with frozen(server.workers):
        server.process.kill()
        started_at = time.monotonic()
        status, line = refused(store, server.path)
        assert time.monotonic() - started_at < 15
    wanted = f"the workers of a server that was killed, process {server.process.pid}, have not "
    assert (status, wanted in line, "try again" in line) == (1, True, True), line


def test_workers_are_replaced_where_nobody_waits_for_children(store: Path, tmp_path: Path) -> None:
    """A parent that ignores SIGCHLD hands that down, and then the kernel tells of no end."""
    command = serve_command(store, tmp_path / "s", "--workers", "2")

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    with started(command, tmp_path / "s", preexec_fn=ignore) as server:
        server.wait_line("ready")
        os.kill(server.workers[0], signal.SIGKILL)
        server.wait_line("signal 9; another replaces it")
        until(lambda: len(server.workers) == 2, "two workers")
        server.send(signal.SIGTERM)
        server.end()


def test_no_room_for_another_process(open_script: Path, nobody: int) -> None:
    """It is told; who is there goes on, with the old store; and then there are two again."""
    folder = open_script.parent
    os.chown(folder, nobody, -1)
    store, path = Stores(folder).keys(records(3)), folder / "s"
    command = [str(open_script), *serve_command(store, path, "--workers", "2")[3:]]
    with started(command, path, user=nobody) as server:
        server.wait_line("ready")
        most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        limit = ["prlimit", "--pid", str(server.process.pid)]  # for itself: root may lack the right
        subprocess.run([*limit, "--nproc=1:"], user=nobody, check=True)
        os.kill(server.workers[0], signal.SIGKILL)
        server.wait_line("error: no worker can be started")
        assert server.key() == key(1)
        Stores(folder).keys(records(3, 1))
        server.send(signal.SIGHUP)
        server.wait_line("not all new workers can be started; the old workers go on")
        assert server.key() == key(1)
        limit.append(f"--nproc={most if most >= 0 else 'unlimited'}:")
        subprocess.run(limit, user=nobody, check=True)
        until(lambda: len(server.workers) == 2, "two workers")
        assert {server.key() for _ in range(6)} == {key(1)}
        server.send(signal.SIGHUP)
        server.wait_line("read again")
        until(lambda: server.key() == key(1, 1), "the new store")


def few_forks(path: Path, command: list[str]) -> list[str]:
    """Give the COMMAND of a server that may make as many processes as PATH has bytes."""
    patch = f"""
import os, pathlib
original = os.fork
def fork():
    path = pathlib.Path({str(path)!r})
    left = path.read_bytes()
    if not left:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    path.write_bytes(left[1:])
    return original()
script.os.fork = fork
"""
    return patched(patch, command)


@pytest.mark.parametrize("room", [0, 1], ids=["no new worker", "one of two"])
def test_no_room_for_all_new_workers(stores: Stores, tmp_path: Path, room: int) -> None:
    """The old ones go on, all of them and with what they have; the next hang-up works."""
    source, forks = stores.csv(records(3)), tmp_path / "forks"
    forks.write_bytes(b"xx")
    command = few_forks(forks, serve_command(source, tmp_path / "s", "--workers", "2"))
    with started(command, tmp_path / "s") as server:
        server.wait_line("ready: 2 workers")
        old = set(server.workers)
        stores.csv(records(3, 1))
        forks.write_bytes(room * b"x")
        server.send(signal.SIGHUP)
        line = server.wait_line("not all new workers")
        assert f"error: source {source} not read again: " in line
        until(lambda: set(server.workers) == old, "the end of the new ones")
        assert {server.key() for _ in range(6)} == {key(1)}
        assert not server.matching("read again: 3")
        forks.write_bytes(b"xx")
        server.send(signal.SIGHUP)
        server.wait_line("read again: 3 agents")
        until(lambda: not old & set(server.workers), "the end of the old ones")
        assert {server.key() for _ in range(6)} == {key(1, 1)}
        server.send(signal.SIGTERM)
        server.end()


def test_ready_when_a_worker_runs(store: Path, tmp_path: Path) -> None:
    """Not before, and the number is that of those who run."""
    forks = tmp_path / "forks"
    forks.touch()
    command = few_forks(forks, serve_command(store, tmp_path / "s", "--workers", "2"))
    with started(command, tmp_path / "s") as server:
        server.wait_line("no worker can be started")
        assert not server.matching("ready")
        forks.write_bytes(b"x")
        assert "ready: 1 worker on " in server.wait_line("ready")
        assert server.error("id:001") == 0


def test_forty_descriptors_are_enough(store: Path, tmp_path: Path) -> None:
    limit = ["/bin/sh", "-c", 'ulimit -n 40; exec "$@"', "sh"]
    with started([*limit, *serve_command(store, tmp_path / "s")], tmp_path / "s") as server:
        server.wait_line("ready")
        with Load(server.path, REQUESTS, threads=8) as load:
            load.wait(100)
            server.send(signal.SIGHUP)
            load.wait(100)
        assert not server.matching("error:")
