"""Where a server listens: the socket that it makes, and the one that systemd passes to it.

It robs no other program, deletes nothing foreign, and listens nowhere that others can write to.
"""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Stores, script
from serving import (
    LIMIT,
    Load,
    Server,
    assert_asleep,
    connect,
    connections,
    faults_of,
    frozen,
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
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket that outlives the servers, as systemd's does."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "passed"))
        opened.listen(4096)
        yield opened


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


def test_a_group_that_the_user_does_not_belong_to(open_script: Path, nobody: int) -> None:
    """The message says who may use it; and nothing is left."""
    folder = open_script.parent
    os.chown(folder, nobody, -1)
    store, path = Stores(folder).sqlite(records(3)), folder / "s"
    store.chmod(0o644)
    root = grp.getgrgid(0).gr_name
    command = [str(open_script), *serve_command(store, path, "--group", root)[3:]]
    with started(command, path, user=nobody, group=nobody, extra_groups=[]) as server:
        assert server.process.wait(20) == 1
        (line,) = server.lines
    assert f"--group {root}: this user may not use the group" in line
    assert not path.exists() and not (folder / "s.lock").exists()


def test_a_folder_that_gives_its_own_group(store: Path, open_folder: Path) -> None:
    """Its setgid bit makes `--group` void; the keys would be for another group."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another group")
    other, wanted = grp.getgrall()[-2:]
    folder = open_folder / "a"
    folder.mkdir()
    os.chown(folder, -1, other.gr_gid)
    folder.chmod(0o2755)
    status, line = refused(store, folder / "s", "--mode", "0660", "--group", wanted.gr_name)
    remedy = f"--group {wanted.gr_name}: the directory {folder} gives its own group to the socket: "
    assert (status, f"{remedy}chmod g-s {folder}" in line) == (1, True), line
    assert not (folder / "s").exists()
    with serving(store, folder / "s", "--group", other.gr_name) as server:
        assert server.path.stat().st_gid == other.gr_gid


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
    """It is named, so that one knows whom to stop."""
    path = Path(listener.getsockname())
    status, line = refused(store, path)
    name = Path("/proc/self/comm").read_text().rstrip()
    wanted = f"{path}: another program listens there ({name}, process {os.getpid()})"
    assert (status, wanted in line) == (1, True), line
    connect(path).close()
    listener.listen(0)  # its queue is full now, so that a connect would wait
    status, line = refused(store, path)
    wanted = f"{path}: another program listens there (its queue is full)"
    assert (status, wanted in line) == (1, True), line


# ---------------------------------------------------------------- its folder and its lock file


def open_to_all(folder: Path) -> str:
    """Everybody may write there."""
    folder.chmod(0o777)
    return f"chmod o-w {folder}"


def sticky(folder: Path) -> str:
    """Everybody may write there, as in /tmp, and so take the name of the lock file."""
    folder.chmod(0o1777)
    return "use another directory"


def of_a_group(folder: Path) -> str:
    """A group that is not ours may write there: the manager's queue/sockets."""
    os.chown(folder, -1, 65534)
    folder.chmod(0o770)
    return f"chmod g-w {folder}"


def of_somebody(folder: Path) -> str:
    """Another user can replace all that is there."""
    os.chown(folder, 65534, -1)
    return f"chown root {folder}"


def below_somebody(folder: Path) -> str:
    """Another user can replace the whole folder."""
    os.chown(folder.parent, 65534, -1)
    return f"chown root {folder.parent}"


@pytest.mark.parametrize(
    "spoil",
    [open_to_all, sticky, of_a_group, of_somebody, below_somebody],
    ids=lambda f: f.__name__,
)
def test_a_folder_where_others_may_write_is_refused(
    store: Path, open_folder: Path, spoil: Callable[[Path], str]
) -> None:
    """They could put their own socket there. The message says what to do."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder = open_folder / "a" / "b"
    folder.mkdir(parents=True)
    remedy = spoil(folder)
    status, line = refused(store, folder / "s")
    assert (status, remedy in line, "key source" in line) == (1, True, False), line
    assert list(folder.iterdir()) == list(folder.glob("*.log"))


def lock_link(path: Path) -> None:
    """A link to a file that looks like a lock file."""
    path.with_name("precious").write_text("1")
    path.symlink_to("precious")


FOREIGN_LOCKS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("precious"),
    "digits and more": lambda path: path.write_text("12345\nprecious"),
    "long": lambda path: path.write_text("1" * 21),
    "link": lock_link,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("make", FOREIGN_LOCKS.values(), ids=FOREIGN_LOCKS)
def test_a_foreign_lock_file_stays(
    store: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    """Somebody else has made it: it is neither emptied nor followed."""
    lock = tmp_path / "s.lock"
    make(lock)
    before = lock.lstat()
    status, line = refused(store, tmp_path / "s")
    assert (status, f"{lock}: " in line) == (1, True), line
    assert (lock.lstat().st_mtime_ns, lock.lstat().st_size) == (before.st_mtime_ns, before.st_size)
    assert not (tmp_path / "s").exists() and not (tmp_path / "nowhere").exists()
    if (tmp_path / "precious").exists():
        assert (tmp_path / "precious").read_text() == "1"


def test_a_server_that_started_a_moment_ago_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is read after the lock was refused, so it is that of the new server."""
    lock = tmp_path / "s.lock"

    def lose(*_: object) -> bool:
        lock.write_text("4321")
        return False

    monkeypatch.setattr(script, "try_lock", lose)
    with pytest.raises(script.CommandError, match="already running there, process 4321"):
        script.lock_path(str(tmp_path / "s"))


@pytest.mark.parametrize("content", ["", "7", "99999999999999", "123\n"])
def test_a_lock_file_of_ours_is_used_again(store: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "s.lock").write_text(content)
    with serving(store, tmp_path / "s") as server:
        assert (tmp_path / "s.lock").read_text() == str(server.process.pid)


def test_a_dead_socket_is_replaced_and_nobody_waits_busily(store: Path, tmp_path: Path) -> None:
    make_socket(tmp_path / "s")
    with serving(store, tmp_path / "s", "--workers", "2") as server:
        assert server.error("id:001") == 0
        assert_asleep(server)


# ---------------------------------------------------------------- systemd

LAUNCHER = """
import os, sys
number, pid, count, *command = sys.argv[1:]
if number:
    os.dup2(int(number), 3)
os.environ.update(LISTEN_FDS=count, LISTEN_PID=pid or str(os.getpid()))
os.execv(command[0], command)
"""
UNIT = {"INVOCATION_ID": "0" * 32}  # set by systemd for what it starts


@contextlib.contextmanager
def activated(
    listener: socket.socket, command: list[str], pid: str = "", env: dict[str, str] = UNIT
) -> Iterator[Server]:
    """Give a server that gets its socket as descriptor 3."""
    with passed_to(
        command, Path(listener.getsockname()), listener.fileno(), pid, env=env
    ) as server:
        yield server


@contextlib.contextmanager
def passed_to(
    command: list[str],
    path: Path,
    number: int | None,
    pid: str = "",
    count: str = "1",
    env: dict[str, str] = UNIT,
) -> Iterator[Server]:
    """Give a server that gets the descriptor NUMBER as descriptor 3, and COUNT as LISTEN_FDS."""
    shown = "" if number is None else str(number)
    launch = [sys.executable, "-IS", "-c", LAUNCHER, shown, pid, count, *command]
    descriptors = [] if number is None else [number]
    with started(launch, path, env=env, pass_fds=descriptors) as server:
        yield server


@contextlib.contextmanager
def tcp() -> Iterator[int]:
    """A listening TCP socket: the keys would go over the network."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        yield opened.fileno()


@contextlib.contextmanager
def one_connection() -> Iterator[int]:
    """What systemd passes with Accept=yes: no server can accept from it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs.fileno()


@contextlib.contextmanager
def datagrams() -> Iterator[int]:
    """What systemd passes for ListenDatagram=."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        yield opened.fileno()


@contextlib.contextmanager
def fifo() -> Iterator[int]:
    """What systemd passes for ListenFIFO=."""
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


NOT_FOR_A_SERVER = {
    "a network socket": tcp,
    "one connection (Accept=yes)": one_connection,
    "a unix socket for datagrams or packets": datagrams,
    "something that is not a socket": fifo,
}


@pytest.mark.parametrize(("name", "make"), NOT_FOR_A_SERVER.items(), ids=NOT_FOR_A_SERVER)
def test_what_is_passed_and_is_no_listening_unix_socket(
    store: Path,
    tmp_path: Path,
    name: str,
    make: Callable[[], contextlib.AbstractContextManager[int]],
) -> None:
    """No worker could use it, and each would crash; the message says what it is."""
    with make() as number, passed_to(serve_command(store, None), tmp_path / "s", number) as server:
        assert server.process.wait(LIMIT) == 1
        (line,) = server.lines
        assert f"systemd passed {name}, " in line and "ListenStream=" in line


def test_two_passed_sockets(store: Path, tmp_path: Path, listener: socket.socket) -> None:
    """It listened elsewhere, and whoever connected to the two of them got no answer."""
    command = serve_command(store, None)
    with passed_to(command, tmp_path / "s", listener.fileno(), count="2") as server:
        assert server.process.wait(LIMIT) == 1
        (line,) = server.lines
        assert "systemd passed 2 sockets" in line and "ListenStream=" in line


def test_a_passed_socket_and_another(store: Path, tmp_path: Path, listener: socket.socket) -> None:
    """`--socket` says something else than the unit: one of the two is a mistake."""
    with activated(listener, serve_command(store, tmp_path / "s")) as server:
        assert server.process.wait(LIMIT) in (1, 2)
        (line,) = server.lines
        assert "--socket" in line and listener.getsockname() in line
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("option", "value", "setting"),
    [
        ("--mode", "0600", "SocketMode="),
        ("--mode", "000", "SocketMode="),
        ("--group", "root", "SocketGroup="),
    ],
)
def test_a_passed_socket_has_its_mode_and_group(
    store: Path, listener: socket.socket, option: str, value: str, setting: str
) -> None:
    """Who gives these wants something, and would not get it."""
    with activated(listener, serve_command(store, None, option, value)) as server:
        assert server.process.wait(LIMIT) == 2
        (line,) = server.lines
    assert f"error: {option} does not go with" in line
    assert listener.getsockname() in line and setting in line


def test_a_passed_socket_with_an_abstract_name(store: Path, tmp_path: Path) -> None:
    """It is logged as systemd writes it."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"\0agent-key-test-{os.getpid()}")
        opened.listen()
        with passed_to(serve_command(store, None), tmp_path / "s", opened.fileno()) as server:
            assert f" on @agent-key-test-{os.getpid()}, source" in server.wait_line("ready")
            server.send(signal.SIGTERM)
            server.end()


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
        assert not faults_of(waiting, REQUESTS)
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
