"""A running `--serve`, and who asks it: shared by the files test_server_*.py.

A server's log goes to a file, which is read as often as wanted and never full, unlike a pipe. Each
server has a session of its own, so that nothing of it is left after a test.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import socket
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from conftest import SCRIPT, Python, Record, interpreters, script
from manager import ask_socket, read_json

MANAGER_THREADS = 32  # the most that <threads> allows
LIMIT = 60.0  # seconds, for what takes a fraction of one on a quiet machine
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, limit: float = LIMIT) -> T:
    """Poll until CONDITION gives something true, and give that; fail after LIMIT seconds."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {limit} s in vain for {what}")
        time.sleep(0.005)
    return value


# ---------------------------------------------------------------- agents whose key tells the store


def key(number: int, generation: int = 0) -> str:
    """Give the key of agent NUMBER in that GENERATION of the store: all have the same length."""
    return hashlib.sha256(f"{number} {generation}".encode()).hexdigest()


def records(count: int, generation: int = 0) -> list[Record]:
    """Give agents 001 to COUNT, at 10.0.x.y with the number in x.y."""
    return [
        Record(f"{n:03d}", f"agent-{n}", f"10.0.{n >> 8}.{n & 255}", key(n, generation))
        for n in range(1, count + 1)
    ]


# ---------------------------------------------------------------- the server


def serve_command(
    db: str | Path, path: Path | None, *options: str, python: Python | None = None
) -> list[str]:
    """Give the command of a server on the socket PATH."""
    command = [(python or interpreters()[0]).path, "-IS", str(SCRIPT), "--db", str(db), "--serve"]
    return [*command, *(["--socket", str(path)] if path else []), *options]


def ids_of(pid: int) -> tuple[str, int]:
    """Give state and parent of a process; `gone` and 0 where there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "gone", 0
    return state, int(parent)


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that waits to be collected does not."""
    return ids_of(pid)[0] not in ("gone", "Z", "X")


class Server:
    """A `--serve` process, its log and its workers."""

    def __init__(
        self, command: Sequence[str], path: Path, env: dict[str, str] | None = None, **how: Any
    ) -> None:
        """Start COMMAND, which need not get ready; PATH is its socket, HOW goes to Popen."""
        self.path = path
        number = len(list(path.parent.glob("*.log")))
        self.log = path.parent / f"{path.name}.{number}.log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={"PATH": os.defpath, **(env or {})},
                start_new_session=True,
                **{"stdout": stream, "stderr": stream, **how},
            )

    @property
    def lines(self) -> list[str]:
        """The log so far, whole lines; all of it is printable ASCII."""
        content = self.log.read_bytes().decode("ascii")
        assert content.replace("\n", "").isprintable(), content
        return content.split("\n")[:-1]

    def matching(self, part: str) -> list[str]:
        """The lines of the log with this PART."""
        return [line for line in self.lines if part in line]

    def wait_line(self, part: str, count: int = 1) -> str:
        """Wait until COUNT lines of the log have this PART, and give the last of them."""

        def last() -> str:
            ended = self.process.poll() is not None
            found = self.matching(part)
            if ended and len(found) < count:
                pytest.fail(f"ended without {part!r}: {self.lines}")
            return found[-1] if len(found) >= count else ""

        return until(last, f"{part!r} in the log")

    @property
    def workers(self) -> list[int]:
        """The process ids of its workers."""
        numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        parent = self.process.pid
        return [n for n in numbers if ids_of(n)[1] == parent and alive(n)]

    def ask(self, request: str | bytes) -> bytes:
        """Ask as the manager does: the bytes of its one recv."""
        answer = ask_socket(self.path, request, LIMIT)
        assert not answer.timed_out, (request, self.lines)
        return answer.output

    def error(self, request: str) -> int:
        """Ask, and give the error number."""
        return int((read_json(self.ask(request)) or {})["error"])

    def key(self, request: str = "id:001") -> str:
        """Ask, and give the key."""
        reply = read_json(self.ask(request)) or {}
        assert reply.get("error") == 0, (reply, self.lines)
        return str(reply["data"]["key"])

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the parent alone."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Wait for the end: in order, and no process left."""
        assert self.process.wait(LIMIT) == 0, self.lines
        assert self.workers == []
        assert not self.matching("Internal error")

    def kill(self) -> None:
        """End all its processes, whatever state they are in."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(command: Sequence[str], path: Path, **how: Any) -> Iterator[Server]:
    """Give a server that may not be ready yet; it is gone after the block."""
    server = Server(command, path, **how)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def serving(
    db: str | Path, path: Path, *options: str, python: Python | None = None, **how: Any
) -> Iterator[Server]:
    """Give a server that is ready, over the source DB on the socket PATH."""
    with started(serve_command(db, path, *options, python=python), path, **how) as server:
        server.wait_line("ready")
        yield server


def refused(db: Path, path: Path, *options: str) -> tuple[int, str]:
    """Start a server that cannot start: its status, and the one line that it says."""
    given = None if "--socket" in options else path
    with started(serve_command(db, given, *options), path) as server:
        status = server.process.wait(20)
        (line,) = server.lines
        return status, line


def assert_asleep(server: Server) -> None:
    """Nobody asks: all its processes sleep, whenever one looks."""
    states = []
    for _ in range(20):
        states += [ids_of(process)[0] for process in (server.process.pid, *server.workers)]
        time.sleep(0.005)
    assert states.count("S") > 0.8 * len(states), states


@contextlib.contextmanager
def frozen(processes: list[int]) -> Iterator[None]:
    """Stop processes for as long as the block lasts."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    yield
    for process in filter(alive, processes):
        os.kill(process, signal.SIGCONT)


# ---------------------------------------------------------------- the server's parts


def options(db: str | Path, **given: Any) -> Any:
    """Give what the command line hands to `--serve`, with its defaults where nothing is GIVEN."""
    defaults = {"db": str(db), "workers": 8, "verbose": False}
    defaults.update(as_json=False, skip_invalid=False)
    return script.Options(*[{**defaults, **given}.get(name) for name in script.Options._fields])


def worker(db: str | Path, memory: Any = None) -> Any:
    """Give a worker over the source DB that has no socket: for single conversations."""
    log = types.SimpleNamespace(verbose=False, info=lambda _: None, error=lambda _: None)
    return script.Worker(None, str(db), LIMIT, memory, log)


def converse(worker: Any, request: bytes) -> bytes:
    """Send a REQUEST to a worker of this process, and give the bytes of one recv."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(request)
        script.Conversation(theirs, worker).handle()
        return ours.recv(65536)


def patched(patch: str, command: Sequence[str]) -> list[str]:
    """Give the COMMAND of a server whose module `script` the code PATCH has changed before."""
    python, _, file, *words = command
    code = f"""
import importlib.machinery, sys
script = importlib.machinery.SourceFileLoader("script", sys.argv[1]).load_module()
{patch}
script.prepare_process()
script.os._exit(script.main(sys.argv[2:]))
"""
    return [python, "-ISBWignore", "-c", code, file, *words]


# ---------------------------------------------------------------- clients


def connect(path: Path) -> socket.socket:
    """Give a connection that has said nothing yet."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(LIMIT)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def connections(path: Path, requests: Iterable[str]) -> Iterator[list[socket.socket]]:
    """Give clients that have sent these REQUESTS, and wait; `` for who is silent."""
    requests = list(requests)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < len(requests) + 200 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(requests) + 200, hard))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connect(path)) for _ in requests]
        for connection, request in zip(opened, requests, strict=True):
            connection.send(request.encode())
        yield opened


def fault_of(request: str, answer: bytes) -> str:
    """Tell what is wrong with the answer to `id:NUMBER` of a stored agent; `` for nothing."""
    data = (read_json(answer) or {}).get("data") or {}
    return "" if data.get("id") == request[3:] and data.get("key") else f"{request}: {answer!r}"


def answer_of(connection: socket.socket) -> bytes:
    """What comes back; nothing if it is closed without an answer."""
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def faults_of(asking: list[socket.socket], requests: Sequence[str]) -> list[str]:
    """What is wrong with the answers to the REQUESTS that these clients have sent."""
    answers = map(answer_of, asking)
    return [fault for fault in map(fault_of, requests, answers) if fault]


class Load:
    """Threads that ask as the manager's do, one request after the other, while the block runs.

    Who could connect and has no sound answer is a fault. Who could not is one, too, unless
    MAY_STOP: where a server stops, the manager tries again later.
    """

    def __init__(
        self,
        path: Path,
        requests: list[str],
        threads: int = MANAGER_THREADS,
        may_stop: bool = False,
    ) -> None:
        """Take the REQUESTS, all for stored agents."""
        self.path, self.requests, self.may_stop = path, requests, may_stop
        self.faults: list[str] = []
        self.answers = 0
        self.stopping = False
        self.threads = [threading.Thread(target=self._work, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Self:
        """Start the threads."""
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        """Stop them; there must be no fault."""
        self.stop()
        assert problem[0] or not self.faults, (len(self.faults), self.faults[:5])

    def stop(self) -> None:
        """Let each thread end its request."""
        self.stopping = True
        for thread in self.threads:
            thread.join()

    def wait(self, more: int) -> None:
        """Wait until that many MORE answers have come."""
        wanted = self.answers + more
        until(lambda: self.answers >= wanted or self.faults, f"{more} answers")

    def _work(self, number: int) -> None:
        while not self.stopping:
            number += len(self.threads)
            request = self.requests[number % len(self.requests)]
            try:
                connection = connect(self.path)
            except OSError as error:
                if not (self.may_stop and isinstance(error, (FileNotFoundError, ConnectionError))):
                    self.faults.append(f"{request}: {error!r}")
                time.sleep(0.01)
                continue
            try:
                with connection:
                    connection.send(request.encode())
                    fault = fault_of(request, connection.recv(65536))
            except OSError as error:
                fault = f"{request}: {error!r}"
            if fault:
                self.faults.append(fault)
            self.answers += 1
