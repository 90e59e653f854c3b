"""How a server starts, what it refuses, and how it ends: without robbing or losing anybody."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, Stores
from manager import ask_socket
from serving import (
    INDEXED,
    LIMIT,
    LOG_LINE,
    MANAGER_THREADS,
    Load,
    Server,
    agent_answered,
    alive,
    any_answer,
    check_log,
    children_of,
    connect,
    environment,
    is_closed,
    key,
    open_files,
    raise_open_files,
    records,
    refused,
    serve_command,
    serving,
    silent,
    started,
    until,
    with_soft_limit,
)

AGENTS = 300
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
END_LIMIT = 4.0  # seconds; the promise is two, on a machine that does nothing else
BACKLOG = 1000
SUN_PATH = 107  # the longest path of a socket, in bytes


@pytest.fixture
def store(stores: Stores) -> Path:
    """An SQLite store."""
    return stores.sqlite(records(AGENTS), INDEXED)


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with the defaults but for two workers."""
    with serving(store, tmp_path / "sock", "--workers", "2") as running:
        yield running


def mode_of(path: Path) -> int:
    """The permission bits of a file, links not followed."""
    return stat.S_IMODE(path.lstat().st_mode)


def assert_one_line(lines: list[str], pattern: str = "") -> None:
    """One clear line on stderr, no traceback."""
    assert len(lines) == 1, lines
    assert LOG_LINE.fullmatch(lines[0]), lines
    assert re.search(pattern, lines[0], re.IGNORECASE), lines


def assert_all_answered(connections: list[socket.socket], requests: list[str]) -> None:
    """Every connection has its own answer: nobody was reset or closed without one."""
    faults = []
    for connection, request in zip(connections, requests, strict=True):
        try:
            fault = agent_answered(request, connection.recv(65536))
        except OSError as error:
            fault = f"{request}: {error!r}"
        faults += [fault] if fault else []
    assert not faults, (len(faults), faults[:5])


# --- the socket and its place ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode"), [((), 0o600), (("--mode", "0660"), 0o660), (("--mode", "0666"), 0o666)]
)
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_mode(store: Path, tmp_path: Path, options: tuple[str, ...], mode: int, umask: int) -> None:
    path = tmp_path / "sock"
    with serving(store, path, *options, umask=umask) as server:
        assert stat.S_ISSOCK(path.lstat().st_mode)
        assert mode_of(path) == mode
        assert server.reply("id:001")["error"] == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_never_changed_into_shape_afterwards(store: Path, tmp_path: Path) -> None:
    """Bound under a umask: between bind and chmod anybody could connect."""
    path, trace = tmp_path / "sock", tmp_path / "trace"
    strace = ["strace", "-f", "-e", "trace=chmod,fchmod,fchmodat,umask", "-o", str(trace)]
    with started([*strace, *serve_command(store, path, "--mode", "0660")], path) as server:
        server.wait_ready()
    assert "chmod" not in trace.read_text()


def other_group() -> str:
    """The name of a group that this process may give a file to and is not in by default."""
    everybody = [entry for entry in grp.getgrall() if entry.gr_gid != os.getegid()]
    mine = [entry for entry in everybody if entry.gr_gid in os.getgroups()]
    allowed = everybody if os.geteuid() == 0 else mine
    if not allowed:
        pytest.skip("no other group to give the socket to")
    return allowed[0].gr_name


def test_group(store: Path, tmp_path: Path) -> None:
    path, group = tmp_path / "sock", other_group()
    with serving(store, path, "--mode", "0660", "--group", group) as server:
        assert path.stat().st_gid == grp.getgrnam(group).gr_gid
        assert mode_of(path) == 0o660
        assert server.reply("id:001")["error"] == 0


def test_unknown_group_is_refused(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    refusal = refused(serve_command(store, path, "--group", "no-such-group"))
    assert refusal.status == 1
    assert_one_line(refusal.lines, "no-such-group")
    assert not path.exists()


def test_stale_socket_is_replaced(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(store, path) as server:
        assert server.reply("id:001")["error"] == 0


def test_start_after_kill_9(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with serving(store, path) as server:
        assert server.reply("id:001")["error"] == 0
        workers = server.workers
        server.process.kill()
        until(lambda: not any(map(alive, workers)), "the end of the workers")
    assert path.exists()
    with serving(store, path) as server:
        assert server.reply("id:001")["error"] == 0


def test_live_server_is_not_robbed(server: Server, store: Path) -> None:
    inode = server.path.stat().st_ino
    refusal = refused(serve_command(store, server.path))
    assert refusal.status == 1
    assert_one_line(refusal.lines, "already")
    assert server.path.stat().st_ino == inode
    assert server.reply("id:001")["error"] == 0


def test_live_server_is_not_robbed_under_load(server: Server, store: Path) -> None:
    with Load(server.path, REQUESTS) as load:
        for _ in range(3):
            assert refused(serve_command(store, server.path)).status == 1
        load.wait_answers(100)
    assert not load.faults, load.faults[:5]


def test_another_program_is_not_robbed(store: Path, tmp_path: Path) -> None:
    """It holds no lock of ours, but it listens."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(100)
        inode = path.stat().st_ino
        refusal = refused(serve_command(store, path))
        assert refusal.status == 1
        assert_one_line(refusal.lines)
        assert path.stat().st_ino == inode


@pytest.mark.parametrize("attempt", range(3))
def test_of_many_that_start_at_once_one_serves(store: Path, tmp_path: Path, attempt: int) -> None:
    """A race for a stale socket: without a lock two could replace each other's."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with contextlib.ExitStack() as stack:
        command = serve_command(store, path, "--workers", "1")
        servers = [
            stack.enter_context(started(command, path, log=tmp_path / f"log.{number}"))
            for number in range(6)
        ]
        until(lambda: sum(s.process.poll() is not None for s in servers) == 5, "five refusals")
        winner = next(s for s in servers if s.process.poll() is None)
        winner.wait_ready()
        assert winner.reply("id:001")["error"] == 0
        for loser in servers:
            if loser is not winner:
                assert loser.process.wait() == 1
                assert_one_line(loser.lines, "already")


def make_link(path: Path) -> None:
    """A symbolic link that leads nowhere."""
    path.symlink_to("nowhere")


def make_link_to_file(path: Path) -> None:
    """A symbolic link to a file of somebody's."""
    path.with_name("precious").write_text("precious")
    path.symlink_to("precious")


def make_folder(path: Path) -> None:
    """An empty folder."""
    path.mkdir()


def make_file(path: Path) -> None:
    """A file of somebody's."""
    path.write_text("precious")


def make_fifo(path: Path) -> None:
    """A named pipe, which would hang who opens it."""
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_file, make_folder, make_fifo, make_link, make_link_to_file])
def test_path_that_is_no_socket_is_never_removed(
    store: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "sock"
    make(path)
    before = path.lstat()
    refusal = refused(serve_command(store, path))
    assert refusal.status == 1
    assert_one_line(refusal.lines)
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino,
        before.st_mode,
        before.st_size,
    )
    assert not (tmp_path / "nowhere").exists()
    if path.is_file():
        assert path.read_text() == "precious"


def folder_of_length(start: Path, length: int) -> Path:
    """A folder below START, whose path has exactly LENGTH bytes."""
    missing = length - len(os.fsencode(start))
    while missing > 200:
        start, missing = start / ("d" * 99), missing - 100
    folder = start / ("d" * (missing - 1))
    folder.mkdir(parents=True)
    return folder


def test_path_too_long(store: Path, tmp_path: Path) -> None:
    folder = folder_of_length(tmp_path, max(SUN_PATH, len(os.fsencode(tmp_path)) + 10))
    refusal = refused(serve_command(store, folder / "sock"))
    assert refusal.status == 1
    assert_one_line(refusal.lines, "long")
    assert not (folder / "sock").exists()


def test_longest_path(store: Path, tmp_path: Path) -> None:
    if len(os.fsencode(tmp_path)) > SUN_PATH - 8:
        pytest.skip("the folder for temporary files has too long a name")
    folder = folder_of_length(tmp_path, SUN_PATH - 5)
    with serving(store, folder / "sock") as server:
        assert server.reply("id:001")["error"] == 0


def test_missing_folder(store: Path, tmp_path: Path) -> None:
    refusal = refused(serve_command(store, tmp_path / "missing" / "sock"))
    assert refusal.status == 1
    assert_one_line(refusal.lines, "no such file")
    assert not (tmp_path / "missing").exists()


def test_no_permission(stores: Stores, open_folder: Path, nobody: int) -> None:
    """An unprivileged user, and a folder that only root may write to."""
    script = Path(shutil.copy(SCRIPT, open_folder))
    source = Path(shutil.copy(stores.sqlite(records(3)), open_folder))
    source.chmod(0o644)
    python = shutil.which("python3", path=os.defpath)
    if python is None:
        pytest.skip("no Python that another user may run")
    path = open_folder / "sock"
    command = [python, str(script), "--db", str(source), "--serve", "--socket", str(path)]
    refusal = refused(command, user=nobody, group=nobody, extra_groups=[], cwd="/")
    assert refusal.status == 1
    assert_one_line(refusal.lines, "permission denied")
    assert not path.exists()


def test_socket_option_is_needed_for_no_default_in_sight(store: Path) -> None:
    """Without --socket the manager's own folder is meant; where there is none: one line."""
    if Path("/var/ossec/queue/sockets").exists():
        pytest.skip("a manager lives here")
    refusal = refused(serve_command(store, None))
    assert refusal.status == 1
    assert_one_line(refusal.lines, "/var/ossec")


# --- sources that cannot be opened at start --------------------------------------------------


def missing(folder: Path) -> Path:
    """A path with nothing there."""
    return folder / "missing.db"


def garbage(folder: Path) -> Path:
    """A file of no known kind."""
    path = folder / "garbage.db"
    path.write_bytes(bytes(range(256)) * 20)
    return path


def no_table(folder: Path) -> Path:
    """A database without the table."""
    path = folder / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (id)")
    return path


def anybody_writes(folder: Path) -> Path:
    """A store that everybody may write to."""
    path = Stores(folder).csv(records(3))
    path.chmod(0o666)
    return path


def a_folder(folder: Path) -> Path:
    """A folder in place of a file."""
    return folder


@pytest.mark.parametrize("make", [missing, garbage, no_table, anybody_writes, a_folder])
def test_source_that_cannot_be_opened_at_start(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    source, path = make(tmp_path), tmp_path / "sock"
    refusal = refused(serve_command(source, path))
    assert refusal.status == 1
    assert_one_line(refusal.lines, "cannot read key source")
    assert not path.exists()
    assert not (tmp_path / "missing.db").exists()


# --- workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_number_of_workers(store: Path, tmp_path: Path, count: int) -> None:
    with serving(store, tmp_path / "sock", "--workers", str(count)) as server:
        assert len(server.workers) == count
        assert server.reply("id:001")["error"] == 0


def test_as_many_workers_as_processors(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "sock") as server:
        possible = {os.cpu_count(), len(os.sched_getaffinity(0))}
        assert len(server.workers) in possible


def test_killed_worker_is_replaced_and_logged(server: Server) -> None:
    """Only the requests it had taken may be lost: at most one for each thread."""
    with Load(server.path, REQUESTS) as load:
        load.wait_answers(500)
        victim = server.workers[0]
        os.kill(victim, signal.SIGKILL)
        server.wait_line(rf"worker {victim} died")
        until(lambda: len(server.workers) == 2, "the new worker")
        load.wait_answers(2000)
    assert victim not in server.workers
    assert len(load.faults) <= MANAGER_THREADS, load.faults[:5]
    assert server.stop() < END_LIMIT


def test_workers_killed_again_and_again(server: Server) -> None:
    inode = server.path.stat().st_ino
    for _ in range(6):
        victim = server.workers[-1]
        os.kill(victim, signal.SIGKILL)
        server.wait_line(rf"worker {victim} died")
        until(lambda: len(server.workers) == 2, "two workers", 30)
    assert all(server.reply(request)["error"] == 0 for request in REQUESTS[:20])
    assert server.path.stat().st_ino == inode


def test_all_workers_killed_at_once(server: Server) -> None:
    """Clients wait in the backlog until there are new ones."""
    for victim in server.workers:
        os.kill(victim, signal.SIGKILL)
    assert agent_answered("id:001", server.ask("id:001")) == ""
    until(lambda: len(server.workers) == 2, "two workers")


def test_killed_parent_leaves_no_worker(server: Server) -> None:
    workers = server.workers
    assert len(workers) == 2
    with Load(server.path, REQUESTS, may_be_refused=True) as load:
        load.wait_answers(500)
        server.process.kill()
        until(lambda: not any(map(alive, workers)), "the end of the workers")


def test_killed_parent_leaves_no_idle_worker(server: Server) -> None:
    workers = server.workers
    with silent(server.path, 20):
        server.process.kill()
        until(lambda: not any(map(alive, workers)), "the end of the workers")


# --- the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_by_signal(server: Server, number: signal.Signals) -> None:
    workers = server.workers
    assert server.reply("id:001")["error"] == 0
    assert server.stop(number) < END_LIMIT
    assert not server.path.exists()
    assert not any(map(alive, workers))
    assert server.matching("stop")
    assert not server.matching("traceback|died")
    check_log(server, [key(1)])


def test_end_by_signal_to_the_whole_group(store: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the workers, too."""
    with serving(store, tmp_path / "sock", start_new_session=True) as server:
        with Load(server.path, REQUESTS, may_be_refused=True) as load:
            load.wait_answers(500)
            os.killpg(server.pid, signal.SIGINT)
            assert server.process.wait(LIMIT) == 0
        assert not load.faults, load.faults[:5]
        assert not server.path.exists()
        assert not server.matching("traceback|died")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_filled_backlog_is_answered_at_the_end(server: Server, number: signal.Signals) -> None:
    """Nobody accepts while the workers are frozen: all of these wait in the backlog."""
    raise_open_files(BACKLOG + 500)
    workers = server.workers
    requests = [REQUESTS[k % AGENTS] for k in range(BACKLOG)]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        connections = [stack.enter_context(connect(server.path)) for _ in requests]
        for connection, request in zip(connections, requests, strict=True):
            connection.send(request.encode())
        begun = time.monotonic()
        server.send(number)
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        assert_all_answered(connections, requests)
        assert server.process.wait(LIMIT) == 0
        assert time.monotonic() - begun < END_LIMIT
    assert not any(map(alive, workers))
    assert not server.path.exists()


def test_who_connected_before_the_end_and_asks_just_after_it(server: Server) -> None:
    """The manager connects and sends in two calls; the signal may fall between them."""
    requests = REQUESTS[:50]
    with silent(server.path, 50) as connections:
        server.send(signal.SIGTERM)
        for connection, request in zip(connections, requests, strict=True):
            connection.send(request.encode())
        assert_all_answered(connections, requests)
        assert server.process.wait(LIMIT) == 0


@pytest.mark.parametrize("attempt", range(3))
def test_end_under_full_load_loses_nobody(server: Server, attempt: int) -> None:
    """Whoever could connect has an answer; the others find nobody there, as MANAGER.md says."""
    with Load(server.path, REQUESTS, may_be_refused=True) as load:
        load.wait_answers(1000 + 300 * attempt)
        assert server.stop() < END_LIMIT
        until(lambda: load.refused, "a client that finds nobody")
    assert not load.faults, load.faults[:5]


def test_end_with_1000_silent_connections(server: Server) -> None:
    workers = server.workers
    with silent(server.path, 1000) as connections:
        assert server.reply("id:001")["error"] == 0
        assert server.stop() < END_LIMIT
        assert all(map(is_closed, connections))
    assert not any(map(alive, workers))
    assert not server.path.exists()


def test_end_with_a_locked_source(store: Path, tmp_path: Path) -> None:
    """Waiting for a lock must not make the end wait."""
    with serving(store, tmp_path / "sock") as server:
        assert server.reply("id:001")["error"] == 0
        with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            with silent(server.path, 10, b"id:001") as connections:
                assert server.stop() < END_LIMIT
                answers = [connection.recv(65536) for connection in connections]
    assert not [fault for fault in map(any_answer, REQUESTS, answers) if fault]


def test_log_that_nobody_reads_any_more(store: Path, tmp_path: Path) -> None:
    """As when journald has been started again: its end of the pipe has gone."""
    reader, writer = os.pipe()
    path = tmp_path / "sock"
    process = subprocess.Popen(serve_command(store, path, "--workers", "1"), stderr=writer)
    try:
        os.close(writer)
        with open(reader) as log:
            until(lambda: "ready" in log.readline(), "readiness")
        (worker,) = children_of(process.pid)
        for request in REQUESTS[:20]:
            assert agent_answered(request, ask_socket(path, request).output) == ""
            time.sleep(0.02)  # a worker writes its log that often
        assert children_of(process.pid) == [worker]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()


def test_second_signal_does_no_harm(server: Server) -> None:
    with silent(server.path, 5):
        server.send(signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            server.send(signal.SIGTERM)
            server.send(signal.SIGINT)
        assert server.process.wait(LIMIT) == 0
    assert not server.matching("traceback")


def test_socket_of_somebody_else_stays(server: Server) -> None:
    """The path has been taken over meanwhile: it is not ours to remove."""
    server.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.path))
        inode = server.path.stat().st_ino
        server.stop()
        assert server.path.stat().st_ino == inode


def test_start_again_at_once(store: Path, tmp_path: Path) -> None:
    for _ in range(3):
        with serving(store, tmp_path / "sock") as server:
            assert server.reply("id:001")["error"] == 0
            server.stop()


# --- SIGHUP ----------------------------------------------------------------------------------


def test_sighup_reopens_the_source(server: Server, store: Path, stores: Stores) -> None:
    stores.sqlite(records(AGENTS, 1), INDEXED, "new.db").replace(store)
    lines = len(server.lines)
    server.send(signal.SIGHUP)
    until(lambda: len(server.lines) > lines, "a line about the source")
    until(lambda: server.reply("id:001")["data"]["key"] == key(1, 1), "the new key", 3)


def test_sighup_reopens_a_text_source_at_once(stores: Stores, tmp_path: Path) -> None:
    source = stores.csv(records(5))
    with serving(source, tmp_path / "sock") as server:
        stores.csv(records(5, 1))
        server.send(signal.SIGHUP)
        until(lambda: server.reply("id:001")["data"]["key"] == key(1, 1), "the new key", 3)


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_sighup_again_and_again_under_load(stores: Stores, tmp_path: Path, kind: str) -> None:
    rows = records(AGENTS)
    source = stores.sqlite(rows, INDEXED) if kind == "sqlite" else stores.csv(rows)
    with serving(source, tmp_path / "sock", "--workers", "2") as server:
        with Load(server.path, REQUESTS) as load:
            for _ in range(10):
                server.send(signal.SIGHUP)
                load.wait_answers(300)
        assert not load.faults, load.faults[:5]
        until(lambda: len(server.workers) == 2, "two workers")
        assert not server.matching("died|traceback")
        assert server.stop() < END_LIMIT


# --- systemd ---------------------------------------------------------------------------------

LAUNCHER = """
import os, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
os.dup2(listener.fileno(), 3)
pid = sys.argv[2] if sys.argv[2] != "self" else str(os.getpid())
os.environ.update(LISTEN_FDS="1", LISTEN_PID=pid)
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def activated(
    listener: socket.socket, command: list[str], log: Path, pid: str = "self"
) -> Iterator[Server]:
    """A server that gets its listening socket as file 3, the way systemd gives it."""
    number = listener.fileno()
    launch = [sys.executable, "-IS", "-c", LAUNCHER, str(number), pid, *command]
    path = Path(listener.getsockname())
    with started(launch, path, log=log, pass_fds=[number]) as server:
        yield server


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket that outlives the servers, as systemd's does."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "systemd.sock"))
        opened.listen(4096)
        yield opened


def test_socket_activation(store: Path, tmp_path: Path, listener: socket.socket) -> None:
    """No --socket needed; the socket is systemd's, and stays when the server ends."""
    with activated(listener, serve_command(store, None), tmp_path / "log") as server:
        with connect(server.path) as early:  # the very connection that systemd starts it for
            early.send(b"id:001")
            assert agent_answered("id:001", early.recv(65536)) == ""
        server.wait_ready()
        assert server.reply("id:002")["error"] == 0
        assert server.stop() < END_LIMIT
        assert server.path.exists()
    check_log(server, [key(1), key(2)])


def test_sockets_for_somebody_else_are_not_ours(
    store: Path, tmp_path: Path, listener: socket.socket
) -> None:
    """LISTEN_PID names another process: the variables were only inherited."""
    command = serve_command(store, tmp_path / "own")
    with activated(listener, command, tmp_path / "log", pid="1") as server:
        server.wait_ready()
        server.path = tmp_path / "own"
        assert server.reply("id:001")["error"] == 0


def test_restart_under_activation_loses_no_request(
    store: Path, tmp_path: Path, listener: socket.socket
) -> None:
    """What waits in systemd's backlog is answered by the next one."""
    path = Path(listener.getsockname())
    with Load(path, REQUESTS) as load:
        for number in range(4):
            with activated(listener, serve_command(store, None), tmp_path / f"{number}") as server:
                server.wait_ready()
                load.wait_answers(500)
                assert server.stop() < END_LIMIT
        with activated(listener, serve_command(store, None), tmp_path / "last") as server:
            server.wait_ready()
            load.wait_answers(500)
            load.stop()
    assert not load.faults, load.faults[:5]


@contextlib.contextmanager
def notify_socket(address: str) -> Iterator[Callable[[], list[str]]]:
    """systemd's end of NOTIFY_SOCKET; calling it gives the next message as lines."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        receiver.settimeout(LIMIT)
        yield lambda: receiver.recv(4096).decode().splitlines()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_notify_socket(store: Path, tmp_path: Path, abstract: bool) -> None:
    address = f"@agent-key-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    path, env = tmp_path / "sock", {"NOTIFY_SOCKET": address}
    with (
        notify_socket(address) as message,
        started(serve_command(store, path), path, env=env) as server,
    ):
        assert "READY=1" in message()
        assert server.reply("id:001")["error"] == 0
        server.send(signal.SIGTERM)
        until(lambda: "STOPPING=1" in message(), "STOPPING=1")
        assert server.process.wait(LIMIT) == 0


def test_notify_socket_with_nobody_there(store: Path, tmp_path: Path) -> None:
    env = {"NOTIFY_SOCKET": str(tmp_path / "nobody")}
    with started(serve_command(store, tmp_path / "sock"), tmp_path / "sock", env=env) as server:
        server.wait_ready()
        assert server.reply("id:001")["error"] == 0
        assert server.stop() < END_LIMIT


# --- the units in the README -----------------------------------------------------------------


def units() -> dict[str, str]:
    """The README's .service and .socket, by their ending."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    found = {}
    for block in re.findall(r"(?ms)^```\w*\n(.*?)^```", readme.read_text()):
        if "[Service]" in block and "--serve" in block:
            found["service"] = block
        elif "[Socket]" in block:
            found["socket"] = block
    return found


@pytest.fixture
def unit_files(tmp_path: Path) -> dict[str, Path]:
    """The README's units as files, with the script where it is here."""
    files = {}
    for ending, text in units().items():
        here = re.sub(r"(?m)^(ExecStart=)\S*agent_key_request\.py", rf"\1{SCRIPT}", text)
        files[ending] = tmp_path / f"agent-key-request.{ending}"
        files[ending].write_text(here)
    return files


def test_readme_has_both_units(unit_files: dict[str, Path]) -> None:
    assert set(unit_files) == {"service", "socket"}


def analyze(*words: str) -> str:
    """What systemd-analyze says; it must find nothing wrong."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_units_are_valid(unit_files: dict[str, Path]) -> None:
    said = analyze("verify", *map(str, unit_files.values()))
    assert "agent-key-request" not in said, said


def test_service_is_hardened(unit_files: dict[str, Path]) -> None:
    """An exposure of at most 3.0 of 10 ("OK" begins at 5)."""
    analyze("security", "--offline=true", "--threshold=30", str(unit_files["service"]))


# --- files and processes that a server must not leave open -----------------------------------


def test_workers_hold_nothing_of_the_one_who_started_them(store: Path, tmp_path: Path) -> None:
    """A handful of files, and no more after a worker was replaced a few times."""
    with serving(store, tmp_path / "sock", "--workers", "2") as server:
        server.reply("id:001")
        before = open_files(server.pid)
        for _ in range(3):
            victim = server.workers[0]
            os.kill(victim, signal.SIGKILL)
            server.wait_line(rf"worker {victim} died")
            until(lambda: len(server.workers) == 2, "two workers", 30)
        until(lambda: open_files(server.pid) <= before, "the files of the parent")
        assert all(open_files(worker) < 20 for worker in server.workers)


def test_low_limit_of_open_files(store: Path, tmp_path: Path) -> None:
    """More silent clients than a worker may open files: the others wait, but nobody is lost."""
    command = ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]
    command += serve_command(store, tmp_path / "sock", "--workers", "2", "--timeout", "1")
    with started(command, tmp_path / "sock") as server:
        server.wait_ready()
        workers = server.workers
        with silent(server.path, 300):
            assert agent_answered("id:001", server.ask("id:001")) == ""
            assert server.workers == workers
        assert not server.matching("died|traceback")


def test_parent_does_nothing_while_nobody_asks(server: Server) -> None:
    """No busy loop: an idle second costs next to no processor time."""

    def ticks() -> int:
        used = 0
        for pid in [server.pid, *server.workers]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += int(fields[11]) + int(fields[12])
        return used

    assert server.reply("id:001")["error"] == 0
    before = ticks()
    with connect(server.path) as connection:
        select.select([connection], [], [], 2.0)
    assert (ticks() - before) / os.sysconf("SC_CLK_TCK") < 0.3


def test_children_of_a_stopped_server(server: Server) -> None:
    """No process of it is left, not even one that it started in passing."""
    server.stop()
    assert children_of(server.pid) == []


def test_ready_only_when_it_answers(store: Path, tmp_path: Path) -> None:
    """Whoever reads the line may connect at once."""
    for _ in range(3):
        with serving(store, tmp_path / "sock") as server:
            assert server.reply("id:001")["error"] == 0
            assert threading.active_count() < 5


def test_systemds_soft_limit_is_raised(store: Path, tmp_path: Path) -> None:
    """systemd's soft limit is 1,024 files: not enough for 1,000 silent clients of one worker."""
    command = serve_command(store, tmp_path / "sock", "--workers", "1", "--timeout", "60")
    with started(with_soft_limit(1024, command), tmp_path / "sock") as server:
        server.wait_ready()
        with silent(server.path, 1200):
            assert agent_answered("id:001", server.ask("id:001")) == ""
