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
import subprocess
import sys
import termios
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, Caller, Python, Stores, script
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
)  # fmt: skip

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


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket that outlives the servers, as systemd's does."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "passed"))
        opened.listen(4096)
        yield opened


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
    """As `--help` tells; less than one worker is one."""
    for options, seconds, count in ({}, 5, 8), ({"--timeout": "3", "--workers": "0.5"}, 3, 1):
        with script.Server("", str(store), options) as server:
            assert (server.seconds, server.count) == (seconds, count)
    assert "[--workers 8]" in script.HELP and "of --serve: 5 s for each request" in script.HELP
    promise = f"Who says nothing is closed after {script.PATIENCE:g} s."
    assert promise in (ROOT / "README.md").read_text()


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


# ---------------------------------------------------------------- the socket and its place


@pytest.mark.parametrize(
    ("umask", "mode", "options"),
    [(0o000, 0o600, ()), (0o077, 0o660, ("--mode", "0660", "--group")), (0o027, 0o666, ())],
)
def test_mode_and_group(
    store: Path, tmp_path: Path, umask: int, mode: int, options: tuple[str, ...]
) -> None:
    """Whatever the umask. The socket is born with both, so the process has its own back."""
    own = grp.getgrgid(os.getegid())
    other = grp.getgrall() if os.geteuid() == 0 else [own]
    group = other[-1] if options else own
    options = (*options, group.gr_name) if options else ("--mode", f"{mode:o}")
    with serving(store, tmp_path / "s", *options, umask=umask) as server:
        status = server.path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, group.gr_gid)
        assert server.error("id:001") == 0
        assert stat.S_IMODE((tmp_path / "s.lock").stat().st_mode) == 0o600
        state = Path(f"/proc/{server.process.pid}/status").read_text()
        assert f"Umask:\t{umask:04o}\n" in state
        assert f"Gid:\t{own.gr_gid}\t{own.gr_gid}\t" in state


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (("--mode", "68"), 2, "--mode needs three digits from 0 to 7"),
        (("--mode", "888"), 2, "--mode needs"),
        (("--mode", "0o660"), 2, "--mode needs"),
        (("--mode", "00660"), 2, "--mode needs"),
        (("--mode", "4660"), 2, "--mode needs"),
        (("--mode",), 2, "--mode needs a value"),
        (("--group", "no-such-group"), 1, "--group no-such-group: there is no such group"),
        (("--group",), 2, "--group needs a value"),
        (("--workers", "many"), 2, "--workers needs a number"),
        (("--workers", "0"), 2, "--workers needs a number"),
        (("--socket", "{}/at/all/s"), 1, "the folder {}/at/all is missing"),
        (("--socket", "{}/" + 108 * "s"), 1, "too long"),
    ],
)
def test_what_it_does_not_start_with(
    store: Path, tmp_path: Path, options: tuple[str, ...], status: int, reason: str
) -> None:
    """One line, in our words; and no socket is left."""
    given = [option.format(tmp_path) for option in options]
    found, line = refused(store, tmp_path / "s", *given)
    assert (found, reason.format(tmp_path) in line) == (status, True), line
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.lock").exists()


def test_where_it_listens_when_nothing_is_said(store: Path, tmp_path: Path) -> None:
    """That one folder it makes; seen from outside, so that no real server is in the way."""
    hidden = ["unshare", "-m", "/bin/sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no mount namespace here")
    command = [*hidden, *serve_command(store, None)]
    for umask, mode in (0, 0o755), (0o077, 0o700):
        with started(command, tmp_path / "s", umask=umask) as server:
            assert "on /run/agent-key-request/socket, " in server.wait_line("ready")
            server.path = Path(f"/proc/{server.process.pid}/root") / script.SOCKET[1:]
            assert server.error("id:001") == 0
            assert stat.S_IMODE(server.path.parent.stat().st_mode) == mode
            assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


def test_a_path_without_a_folder(store: Path, tmp_path: Path) -> None:
    command = serve_command(store, None, "--socket", "s")
    with started(command, tmp_path / "s", cwd=tmp_path) as server:
        server.wait_line("ready")
        assert server.error("id:001") == 0


def test_the_longest_path(store: Path, open_folder: Path) -> None:
    """The kernel takes 107 bytes."""
    path = open_folder / ("s" * (106 - len(str(open_folder))))
    with serving(store, path) as server:
        assert server.error("id:001") == 0
    status, line = refused(store, path.with_name(path.name + "s"))
    assert (status, "too long for a socket (107 bytes)" in line) == (1, True), line


def make_socket(path: Path) -> None:
    """What a dead server leaves."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def make_link(path: Path) -> None:
    """A link to somebody's dead socket."""
    make_socket(path.with_name("precious"))
    path.symlink_to("precious")


NO_SOCKETS_OF_OURS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("precious"),
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link": make_link,
}


@pytest.mark.parametrize("make", NO_SOCKETS_OF_OURS.values(), ids=NO_SOCKETS_OF_OURS)
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


def test_a_live_server_is_not_robbed(store: Path, tmp_path: Path) -> None:
    """And it is told who it is, whoever has been there before."""
    (tmp_path / "s.lock").write_text("99999999999999")
    with serving(store, tmp_path / "s") as server:
        assert_not_robbed(server, store)


def assert_not_robbed(server: Server, store: Path) -> None:
    """A second one does not start there, and the first goes on."""
    before = server.path.stat().st_ino
    with Load(server.path, REQUESTS, threads=4) as load:
        status, line = refused(store, server.path)
        load.wait(20)
    wanted = f"{server.path}: a server is already running there, process {server.process.pid}"
    assert (status, line) == (1, f"agent_key_request: error: {wanted}")
    assert server.path.stat().st_ino == before


def test_another_program_is_not_robbed(store: Path, listener: socket.socket) -> None:
    path = Path(listener.getsockname())
    status, line = refused(store, path)
    assert (status, "another program listens there" in line) == (1, True), line
    connect(path).close()
    listener.listen(0)  # its queue is full now, so that a connect would wait
    status, line = refused(store, path)
    assert (status, "another program listens there" in line) == (1, True), line


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


def faults_of(asking: list[socket.socket]) -> list[str]:
    """What is wrong with the answers to the REQUESTS that these clients have sent."""
    return [fault for fault in map(fault_of, REQUESTS, map(answer_of, asking)) if fault]


@contextlib.contextmanager
def frozen(processes: list[int]) -> Iterator[None]:
    """Stop processes for as long as the block lasts."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    yield
    for process in filter(alive, processes):
        os.kill(process, signal.SIGCONT)


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
        assert not faults_of(waiting)
        server.end()


def test_who_asks_just_after_the_signal_and_who_never_asks(server: Server) -> None:
    """The manager connects and sends in two calls."""
    with connections(server.path, 40 * [""]) as silent:
        server.send(signal.SIGTERM)
        for connection, request in zip(silent[:30], REQUESTS):
            connection.send(request.encode())
        assert not faults_of(silent[:30])
        server.end()


IMPATIENT = """
import importlib.machinery, sys
script = importlib.machinery.SourceFileLoader("script", sys.argv[1]).load_module()
script.DRAIN = 0.2
script.os._exit(script.main(*script.begin(sys.argv[2:])))
"""


def test_a_worker_that_does_not_end_is_killed(store: Path, tmp_path: Path) -> None:
    """Whoever waits for it has waited long enough (here for 0.2 s)."""
    python, _, file, *words = serve_command(store, tmp_path / "s", "--workers", "2")
    command = [python, "-ISBWignore", "-c", IMPATIENT, file, *words]
    with started(command, tmp_path / "s") as server:
        server.wait_line("ready")
        workers = server.workers
        with frozen(workers[:1]):
            server.send(signal.SIGTERM)
            assert server.process.wait(LIMIT) == 0
            until(lambda: not any(map(alive, workers)), "the end of the workers")


def test_the_socket_of_somebody_else_stays(server: Server) -> None:
    """The path was taken over meanwhile."""
    server.path.unlink()
    make_socket(server.path)
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
        assert len(faults_of(waiting)) <= len(victims)
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


def test_no_room_for_another_process(open_script: Path, nobody: int) -> None:
    """It is told; who is there goes on, but not with an old store; and then there are two again."""
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
        until(lambda: not server.workers, "the end of the old ones")
        limit.append(f"--nproc={most if most >= 0 else 'unlimited'}:")
        subprocess.run(limit, user=nobody, check=True)
        assert server.key() == key(1, 1)
        until(lambda: len(server.workers) == 2, "two workers")


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
UNIT = {"INVOCATION_ID": "0" * 32}  # set by systemd for what it starts


@contextlib.contextmanager
def activated(
    listener: socket.socket, command: list[str], pid: str = "", env: dict[str, str] = UNIT
) -> Iterator[Server]:
    """Give a server that gets its socket as descriptor 3."""
    number = listener.fileno()
    launch = [sys.executable, "-IS", "-c", LAUNCHER, str(number), pid, *command]
    with started(launch, Path(listener.getsockname()), env=env, pass_fds=[number]) as server:
        yield server


def test_a_passed_socket_without_a_source(stores: Stores, listener: socket.socket) -> None:
    """It starts all the same, or systemd's queue would hang: error 2 until the source is there."""
    source, early = stores.folder / "agents.db", connect(Path(listener.getsockname()))
    early.send(b"id:001")
    listener.setblocking(False)  # as NonBlocking=yes in its unit would
    with early, activated(listener, serve_command(source, None)) as server:
        assert b'"error": 2' in early.recv(65536)
        assert "No such file" in server.wait_line("error: ")
        stores.sqlite(records(3))
        assert server.key() == key(1)
        assert_asleep(server)
        server.send(signal.SIGTERM)
        server.end()
        assert server.path.exists()


def test_a_passed_socket_and_a_text_that_is_being_written(
    stores: Stores, listener: socket.socket
) -> None:
    """No worker reads it for itself: it could be the half of it."""
    for source, kind in ("agents.csv", stores.csv), ("agents.sql", stores.sql):
        with activated(listener, serve_command(stores.folder / source, None)) as server:
            server.wait_line("error: ")
            stores.text("id,name,ip,key\n001,a,any,0123", source)
            assert server.error("id:001") == 2 and server.wait_line("SIGHUP")
            kind(records(3))
            server.send(signal.SIGHUP)
            until(lambda: server.error("id:001") == 0, "an agent")
            server.send(signal.SIGTERM)
            server.end()


def test_a_socket_for_somebody_else_is_not_taken(
    store: Path, tmp_path: Path, listener: socket.socket
) -> None:
    """LISTEN_PID names another process: the variables were inherited."""
    with activated(listener, serve_command(store, tmp_path / "s"), pid="1") as server:
        assert f"on {tmp_path / 's'}" in server.wait_line("ready")


def test_three_restarts_of_a_unit_lose_nobody(store: Path, listener: socket.socket) -> None:
    """The queue stays for the next start: systemd holds the socket."""
    with contextlib.ExitStack() as servers, Load(Path(listener.getsockname()), REQUESTS) as load:
        for restarts in range(4):
            server = servers.enter_context(activated(listener, serve_command(store, None)))
            server.wait_line("ready")
            load.wait(100)
            if restarts < 3:
                server.send(signal.SIGTERM)
                server.end()
        load.stop()


def test_the_last_holder_of_a_passed_socket_leaves_nobody(
    store: Path, listener: socket.socket
) -> None:
    """Without systemd there is no next start that would answer the queue."""
    command = serve_command(store, None, "--workers", "2")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(activated(listener, command, env={}))
        server.wait_line("ready")
        with frozen(server.workers):
            waiting = stack.enter_context(connections(server.path, REQUESTS[:100]))
            server.send(signal.SIGTERM)
            server.wait_line("stopping")
        assert not faults_of(waiting)
        server.end()


def test_three_restarts_under_systemd_socket_activate(store: Path, tmp_path: Path) -> None:
    """It starts the server at the first connection, and hands its only socket over."""
    activate, path = shutil.which("systemd-socket-activate"), tmp_path / "s"
    if not activate:
        pytest.skip("no systemd-socket-activate here")
    with Load(path, REQUESTS, may_stop=True) as load:
        for _ in range(3):
            with started([activate, "-l", str(path), *serve_command(store, None)], path) as server:
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


# ---------------------------------------------------------------- the log


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
            server.wait_line("worker ")
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
        log.write(False, text)
    assert [line[-1] for line in capfd.readouterr().err.splitlines()] == ["a", "b", "a", "a"]


def test_verbose_tells_all(troubled: Path, tmp_path: Path) -> None:
    """`-v`: each request, again and again; what is not printable is not printed."""
    with serving(troubled, tmp_path / "s", "-v") as server:
        for request in ["id:001", "id:999", "id:1", "id:\n\t", "id:900"] * 3:
            server.ask(request)
        server.wait_line("", 16)
        assert len(server.matching(" id:??: Bad arguments given")) == 3


def test_a_log_that_nobody_reads_stops_nothing(store: Path, tmp_path: Path) -> None:
    """A full pipe: as when who reads it hangs."""
    reader, writer = os.pipe()
    with (
        open(reader, "rb", buffering=0) as pipe,
        started(serve_command(store, tmp_path / "s"), tmp_path / "s", stderr=writer) as server,
    ):
        assert b"ready" in pipe.read(1000)
        # Opened once more: the server's own end stays as it has it.
        with open(f"/proc/self/fd/{writer}", "wb", buffering=0) as other:
            os.set_blocking(other.fileno(), False)
            while other.write(b"x" * 4096) or other.write(b"x"):
                pass
        os.close(writer)
        for request in REQUESTS[:50]:
            assert server.error(request) == 0
        server.send(signal.SIGHUP)
        server.send(signal.SIGTERM)
        server.end()
