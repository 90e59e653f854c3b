"""How a server starts, what it refuses, how it lives and how it ends: it robs and loses nobody."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pty
import resource
import shutil
import signal
import socket
import stat
import sys
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
    connect,
    connections,
    fault_of,
    ids_of,
    key,
    records,
    refused,
    serve_command,
    serving,
    started,
    until,
)

AGENTS = 300
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]


@pytest.fixture
def store(stores: Stores) -> Path:
    """An SQLite store."""
    return stores.sqlite(records(AGENTS))


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of two workers."""
    with serving(store, tmp_path / "s", "--workers", "2") as running:
        yield running


# ---------------------------------------------------------------- a life


def test_a_life_under_every_interpreter(
    interpreter: Python, stores: Stores, tmp_path: Path
) -> None:
    """Start, answer, read again, answer, end."""
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
        assert not server.path.exists()


def test_ps_shows_the_script_and_its_options(store: Path, tmp_path: Path, ask: Caller) -> None:
    """Started by its name, as in a unit: not the loader that a request gets."""
    words = ["--db", str(store), "--serve", "--socket", str(tmp_path / "s")]
    with started([str(SCRIPT), *words], tmp_path / "s", env={"PATH": ask.path}) as server:
        server.wait_line("ready")
        for process in server.process.pid, server.workers[0]:
            shown = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
            assert [Path(shown[0]).name, *shown[1:]] == ["python3", "-IS", str(SCRIPT), *words, ""]


@pytest.mark.parametrize(("options", "count"), [((), 8), (("--workers", "3"), 3)])
def test_workers_and_the_first_line(
    store: Path, tmp_path: Path, options: tuple[str, ...], count: int
) -> None:
    with serving(store, tmp_path / "s", *options) as server:
        assert len(server.workers) == count
        line = f"info: ready: {count} workers on {tmp_path / 's'}, source {store}"
        assert server.lines == [f"agent_key_request: {line}"]


# ---------------------------------------------------------------- the socket and its place


def test_mode_and_group(store: Path, tmp_path: Path) -> None:
    """Whatever the umask. The socket is born with both, so the process has its own back."""
    other = [group for group in grp.getgrall() if group.gr_gid in os.getgroups()]
    group = (grp.getgrall() if os.geteuid() == 0 else [*other, grp.getgrgid(os.getegid())])[-1]
    for umask, options, mode in (
        (0o000, (), 0o600),
        (0o077, ("--mode", "0660", "--group", group.gr_name), 0o660),
        (0o027, ("--mode", "666"), 0o666),
    ):
        with serving(store, tmp_path / "s", *options, umask=umask) as server:
            status = server.path.stat()
            assert stat.S_IMODE(status.st_mode) == mode
            assert status.st_gid == (group.gr_gid if "--group" in options else os.getegid())
            assert server.error("id:001") == 0
            state = Path(f"/proc/{server.process.pid}/status").read_text()
            assert f"Umask:\t{umask:04o}\n" in state
            assert f"Gid:\t{os.getegid()}\t{os.getegid()}\t" in state


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (("--mode", "68"), 2, "--mode needs three or four digits from 0 to 7, such as 0660"),
        (("--mode", "888"), 2, "--mode needs three or four digits from 0 to 7"),
        (("--mode", "0o660"), 2, "--mode needs three or four digits from 0 to 7"),
        (("--mode", "00660"), 2, "--mode needs three or four digits from 0 to 7"),
        (("--mode", "rw"), 2, "--mode needs three or four digits from 0 to 7"),
        (("--mode",), 2, "--mode needs a value"),
        (("--group", "no-such-group"), 1, "--group no-such-group: there is no such group"),
        (("--group",), 2, "--group needs a value"),
        (("--workers", "many"), 2, "--workers needs a number"),
        (("--workers", "0"), 2, "--workers needs a number"),
        (("--socket", "/nowhere/at/all/s"), 1, "the folder /nowhere/at/all is missing"),
        (("--socket", "{}/" + 108 * "s"), 1, "too long"),
    ],
)
def test_what_it_does_not_start_with(
    store: Path, tmp_path: Path, options: tuple[str, ...], status: int, reason: str
) -> None:
    """One line, in our words; and no socket is left."""
    given = [option.format(tmp_path) for option in options]
    found, line = refused(store, tmp_path / "s", *given)
    assert (found, reason in line) == (status, True), line
    assert not (tmp_path / "s").exists()


def make_socket(path: Path) -> None:
    """What a dead server leaves."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def make_links(path: Path) -> None:
    """A link to somebody's dead socket."""
    make_socket(path.with_name("precious"))
    path.symlink_to("precious")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("precious"),
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        make_links,
    ],
    ids=["file", "folder", "fifo", "link to nothing", "link"],
)
def test_a_path_that_is_no_socket_is_never_removed(
    store: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "s"
    make(path)
    before = path.lstat()
    status, line = refused(store, path)
    assert (status, str(path) in line) == (1, True), line
    assert path.lstat() == before
    assert not (tmp_path / "nowhere").exists()
    assert not path.is_file() or path.read_text() == "precious"


def test_a_live_server_is_not_robbed(server: Server, store: Path) -> None:
    before = server.path.stat().st_ino
    with Load(server.path, REQUESTS, threads=4) as load:
        status, line = refused(store, server.path)
        load.wait(20)
    wanted = f"{server.path}: a server is already running there, process {server.process.pid}"
    assert (status, line) == (1, f"agent_key_request: error: {wanted}")
    assert server.path.stat().st_ino == before


def test_another_program_is_not_robbed(store: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        status, line = refused(store, tmp_path / "s")
        assert (status, "another program listens there" in line) == (1, True), line
        connect(tmp_path / "s").close()


def test_of_six_that_start_at_once_one_serves(store: Path, tmp_path: Path) -> None:
    """There is the socket of a dead one, which each would replace."""
    path = tmp_path / "s"
    make_socket(path)
    with contextlib.ExitStack() as stack:
        command = serve_command(store, path, "--workers", "1")
        servers = [stack.enter_context(started(command, path)) for _ in range(6)]
        until(lambda: sum(each.process.poll() is not None for each in servers) == 5, "five to end")
        (winner,) = [each for each in servers if each.process.poll() is None]
        winner.wait_line("ready")
        assert winner.error("id:001") == 0
        assert all("already running" in each.lines[0] for each in servers if each is not winner)


def test_a_dead_socket_is_replaced_and_nobody_waits_busily(store: Path, tmp_path: Path) -> None:
    make_socket(tmp_path / "s")
    with serving(store, tmp_path / "s", "--workers", "2") as server:
        assert server.error("id:001") == 0
        assert_asleep(server)


def assert_asleep(server: Server) -> None:
    """Nobody asks: all its processes sleep, whenever one looks."""
    states = []
    for _ in range(20):
        states += [ids_of(process)[0] for process in (server.process.pid, *server.workers)]
        time.sleep(0.005)
    assert states.count("S") > 0.8 * len(states), states


# ---------------------------------------------------------------- signals


def answer_of(connection: socket.socket) -> bytes:
    """What comes back; nothing if it is closed without an answer."""
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def assert_all_answered(connections: list[socket.socket]) -> None:
    """Each has the answer to its own request."""
    faults = [fault for fault in map(fault_of, REQUESTS, map(answer_of, connections)) if fault]
    assert not faults, (len(faults), faults[:5])


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


@contextlib.contextmanager
def frozen(processes: list[int]) -> Iterator[None]:
    """Stop processes for as long as the block lasts."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    yield
    for process in filter(alive, processes):
        os.kill(process, signal.SIGCONT)


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
        assert_all_answered(waiting)
        server.end()


def test_who_asks_just_after_the_signal_is_answered(server: Server) -> None:
    """The manager connects and sends in two calls."""
    with connections(server.path, 30 * [""]) as silent:
        server.send(signal.SIGTERM)
        for connection, request in zip(silent, REQUESTS):
            connection.send(request.encode())
        assert_all_answered(silent)
        server.end()


def test_silent_clients_do_not_hold_up_the_end(server: Server) -> None:
    with connections(server.path, 12 * [""]):
        server.send(signal.SIGTERM)
        server.end()


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
    with (
        open(ours, "r+b", buffering=0) as terminal,
        started(
            serve_command(store, tmp_path / "s", "--workers", "2"),
            tmp_path / "s",
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),  # it is its terminal
        ) as server,
    ):
        os.close(theirs)
        assert b"ready" in terminal.read(1000)
        assert server.error("id:001") == 0
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
        faults = [fault for fault in map(fault_of, REQUESTS, map(answer_of, waiting)) if fault]
        assert len(faults) <= len(victims), faults
    for victim in victims:
        assert "signal 9" in server.wait_line(f"error: worker {victim} ended")
    until(lambda: len(server.workers) == 2, "two workers")
    assert server.error("id:001") == 0


def test_a_worker_that_cannot_go_on_says_why(server: Server) -> None:
    """It may open no file more, so it can accept nobody: another does."""
    worker = server.workers[0]
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, 3))
    server.wait_line(f"worker {worker} ended")
    assert "Too many open files" in "".join(server.matching(f"worker {worker}"))
    assert server.error("id:001") == 0


def test_the_end_of_the_parent_ends_the_workers(server: Server, store: Path) -> None:
    """And a new server can start there."""
    workers = server.workers
    with connections(server.path, ["", ""]):
        server.process.kill()
        until(lambda: not any(map(alive, workers)), "the end of the workers")
    with serving(store, server.path) as another:
        assert another.error("id:001") == 0


def test_forty_descriptors_are_enough(store: Path, tmp_path: Path) -> None:
    limit = ["/bin/sh", "-c", 'ulimit -n 40; exec "$@"', "sh"]
    with started([*limit, *serve_command(store, tmp_path / "s")], tmp_path / "s") as server:
        server.wait_line("ready")
        with Load(server.path, REQUESTS, threads=8) as load:
            load.wait(100)
            server.send(signal.SIGHUP)
            load.wait(100)
        assert not server.matching("error:")


# ---------------------------------------------------------------- systemd

LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=sys.argv[2] or str(os.getpid()))
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket that outlives the servers, as systemd's does."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "passed"))
        opened.listen(4096)
        yield opened


@contextlib.contextmanager
def activated(
    listener: socket.socket, command: list[str], pid: str = "", under_systemd: bool = True
) -> Iterator[Server]:
    """Give a server that gets its socket as descriptor 3."""
    number = listener.fileno()
    launch = [sys.executable, "-IS", "-c", LAUNCHER, str(number), pid, *command]
    env = {"INVOCATION_ID": "0" * 32} if under_systemd else {}
    path = Path(listener.getsockname())
    with started(launch, path, env=env, pass_fds=[number]) as server:
        yield server


def test_a_passed_socket_without_a_source(stores: Stores, listener: socket.socket) -> None:
    """It starts all the same, or systemd's queue would hang: error 2 until the source is there."""
    source, early = stores.folder / "agents.db", connect(Path(listener.getsockname()))
    early.send(b"id:001")
    listener.setblocking(False)  # as NonBlocking=yes in its unit would
    with early, activated(listener, serve_command(source, None)) as server:
        assert b'"error": 2' in early.recv(65536)
        assert server.error("id:001") == 2
        assert "No such file" in server.wait_line("error: ")
        stores.sqlite(records(3))
        assert server.key() == key(1)
        assert_asleep(server)
        server.send(signal.SIGTERM)
        server.end()
        assert server.path.exists()


def test_a_socket_for_somebody_else_is_not_taken(
    store: Path, tmp_path: Path, listener: socket.socket
) -> None:
    """LISTEN_PID names another process: the variables were inherited."""
    with activated(listener, serve_command(store, tmp_path / "s"), pid="1") as server:
        assert f"on {tmp_path / 's'}" in server.wait_line("ready")


def test_three_restarts_of_a_unit_lose_nobody(store: Path, listener: socket.socket) -> None:
    """The queue stays for the next start: systemd holds the socket."""
    with contextlib.ExitStack() as stack:
        load = Load(Path(listener.getsockname()), REQUESTS)
        for number in range(4):
            server = stack.enter_context(activated(listener, serve_command(store, None)))
            if not number:
                stack.enter_context(load)
            server.wait_line("ready")
            load.wait(100)
            if number < 3:
                server.send(signal.SIGTERM)
                server.end()
        load.stopping = True
        for thread in load.threads:
            thread.join()


def test_the_last_holder_of_a_passed_socket_leaves_nobody(
    store: Path, listener: socket.socket
) -> None:
    """Without systemd ($INVOCATION_ID) there is no next start that would answer the queue."""
    command = serve_command(store, None, "--workers", "2")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(activated(listener, command, under_systemd=False))
        server.wait_line("ready")
        with frozen(server.workers):
            waiting = stack.enter_context(connections(server.path, REQUESTS[:100]))
            server.send(signal.SIGTERM)
            server.wait_line("stopping")
        assert_all_answered(waiting)
        server.end()


def test_three_restarts_under_systemd_socket_activate(store: Path, tmp_path: Path) -> None:
    """It starts the server at the first connection, and hands its only socket over."""
    activate, path = shutil.which("systemd-socket-activate"), tmp_path / "s"
    if not activate:
        pytest.skip("no systemd-socket-activate here")
    path_of_python = f"--setenv=PATH={os.defpath}"
    command = [activate, path_of_python, "-l", str(path), *serve_command(store, None)]
    with Load(path, REQUESTS, may_stop=True) as load:
        for _ in range(3):
            with started(command, path) as server:
                server.wait_line("ready")
                load.wait(100)
                server.send(signal.SIGTERM)
                server.end()


@pytest.mark.parametrize("name", ["notify", "no@tify", "@agent-key-test-{pid}@"])
def test_systemd_is_notified(store: Path, tmp_path: Path, name: str) -> None:
    """$NOTIFY_SOCKET is a path, or abstract with @ in front, and only there."""
    address = name.format(pid=os.getpid()) if name[0] == "@" else str(tmp_path / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + address[1:] if address[0] == "@" else address)
        systemd.settimeout(LIMIT)
        command = serve_command(store, tmp_path / "s")
        with started(command, tmp_path / "s", env={"NOTIFY_SOCKET": address}) as server:
            assert systemd.recv(99) == b"READY=1"
            assert server.error("id:001") == 0
            server.send(signal.SIGTERM)
            assert systemd.recv(99) == b"STOPPING=1"
            server.end()


# ---------------------------------------------------------------- the log


@pytest.fixture
def troubled(stores: Stores) -> Path:
    """A store with an agent for errors 5 and 6."""
    rows = [record._replace(id="900") for record in records(2)]
    return stores.sqlite([*records(AGENTS), *rows, rows[0]._replace(id="901", name="bad name")])


def test_the_journal_gets_priorities(troubled: Path, tmp_path: Path) -> None:
    """Then the name is not there twice; `journalctl -p err` shows what somebody must mend."""
    with (tmp_path / "journal").open("wb") as journal:
        status = os.fstat(journal.fileno())
        env = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        with started(
            serve_command(troubled, tmp_path / "s", "--workers", "1"),
            tmp_path / "s",
            env=env,
            stderr=journal,
        ) as server:
            server.log = tmp_path / "journal"
            server.wait_line("ready")
            errors = [server.error(f"id:{n}") for n in ("001", "900", "901", "999", "1")]
            assert errors == [0, 5, 6, 4, 3]
            troubled.rename(tmp_path / "away")
            assert server.error("id:001") == 2
            server.wait_line("Cannot")
            os.kill(server.workers[0], signal.SIGKILL)
            server.wait_line("worker ")
            told = [(line[:3], line[3:].partition(" ")[0]) for line in server.lines]
    assert told == [
        ("<6>", "ready:"),
        ("<6>", "id:001:"),
        ("<3>", "id:900:"),
        ("<3>", "id:901:"),
        ("<3>", "Cannot"),
        ("<3>", "worker"),
    ]


def test_the_same_line_once_a_minute_over_all_workers(troubled: Path, tmp_path: Path) -> None:
    """A flood fills no disk, but every agent whose key went out is told, and never its key."""
    with serving(troubled, tmp_path / "s", "--workers", "4") as server:
        for _ in range(50):
            assert [server.error(request) for request in ("id:900", "id:901", "id:20000000")] == [
                5, 6, 4,
            ]  # fmt: skip
        for request in REQUESTS[:100]:
            assert server.error(request) == 0
        told = [
            "error: id:900: Found more than one match for required id",
            "error: id:901: Stored record is invalid: agent 901: " + script.RULES["name"],
            *(f"info: {each}: key handed out: agent {each[3:]}" for each in REQUESTS[:100]),
        ]
        server.wait_line("", 1 + len(told))
        assert sorted(server.lines[1:]) == sorted("agent_key_request: " + line for line in told)


def test_verbose_tells_all(troubled: Path, tmp_path: Path) -> None:
    """`-v`: each request, again and again; what is not printable is not printed."""
    with serving(troubled, tmp_path / "s", "-v") as server:
        for request in ["id:001", "id:999", "id:1", "id:\n\t", "id:900"] * 3:
            server.ask(request)
        server.wait_line("", 16)
        assert len(server.matching(" id:??: Bad arguments given")) == 3
        assert not [part for part in (key(1)[:16], key(2)[:16]) if server.matching(part)]


@pytest.mark.parametrize("is_open", [True, False], ids=["full", "closed"])
def test_a_log_that_nobody_reads_stops_nothing(store: Path, tmp_path: Path, is_open: bool) -> None:
    reader, writer = os.pipe()
    with (
        open(reader, "rb", buffering=0) as pipe,
        started(serve_command(store, tmp_path / "s"), tmp_path / "s", stderr=writer) as server,
    ):
        assert b"ready" in pipe.read(1000)
        if is_open:
            # Opened once more: the server's own end stays as it has it.
            with open(f"/proc/self/fd/{writer}", "wb", buffering=0) as other:
                os.set_blocking(other.fileno(), False)
                while other.write(b"x" * 4096):
                    pass
                while other.write(b"x"):
                    pass
        os.close(writer)
        if not is_open:
            pipe.close()
        for request in REQUESTS[:50]:
            assert server.error(request) == 0
        server.send(signal.SIGHUP)
        server.send(signal.SIGTERM)
        server.end()
