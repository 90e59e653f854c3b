"""A real `--serve` process and what puts it under load: shared by the test_serve_*.py files.

The server's log goes to a file, which is read as often as wanted and cannot fill up like a pipe.
Nothing here sleeps for luck: `until` polls for what must come, with a limit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pytest
from conftest import PLAIN_SCHEMA, SCRIPT, Record, interpreters
from manager import ask_socket, read_json

MANAGER_THREADS = 32  # the most that <threads> allows
LIMIT = 20.0  # seconds, for what should take a fraction of one on a quiet machine
LOG_LINE = re.compile(r"agent_key_request: (debug|info|warning|error): [ -~]+")
HEAD = b'{"error": '
CLIENT_SOURCE = Path(__file__).resolve().parent / "bench" / "client.c"
INHERITED = ("AGENT_KEY_DB", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
INDEXED = PLAIN_SCHEMA + (
    "; CREATE INDEX agent_id ON agent (id); CREATE INDEX agent_ip ON agent (ip);"
)
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, limit: float = LIMIT) -> T:
    """Poll until CONDITION gives something true, and give that; fail after LIMIT seconds."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {limit} s in vain for {what}", pytrace=True)
        time.sleep(0.01)


# --- agents whose key tells which version of the store an answer comes from ------------------


def key(number: int, generation: int = 0) -> str:
    """The key of agent NUMBER in that GENERATION of the store; half of it is not a key."""
    return hashlib.sha256(f"{number} {generation}".encode()).hexdigest()


def records(count: int, generation: int = 0) -> Iterator[Record]:
    """Agents 001 ... COUNT, at 10.x.y.z with the number in x.y.z."""
    for number in range(1, count + 1):
        ip = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        yield Record(f"{number:03d}", f"agent-{number}", ip, key(number, generation))


# --- processes -------------------------------------------------------------------------------


def parent_of(pid: int) -> int | None:
    """The parent of a process; None for one that has ended (a zombie has ended, too)."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    return parent_of(pid) is not None


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    everybody = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return sorted(child for child in everybody if parent_of(child) == pid)


def rss_kb(pid: int) -> int:
    """The resident memory of a process, in kB."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match, status
    return int(match[1])


def open_files(pid: int) -> int:
    """How many files, sockets and pipes a process holds open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def raise_open_files(wanted: int) -> None:
    """Let this test process open WANTED files, or skip the test where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this needs {wanted} open files, the hard limit is {hard}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- the server ------------------------------------------------------------------------------


def serve_command(
    db: str | Path | None, path: str | Path | None, *options: str, python: str | None = None
) -> list[str]:
    """The command line of a server; PATH is its socket."""
    words = [python or interpreters()[0].path, str(SCRIPT)]
    words += ["--db", str(db)] if db is not None else []
    words += ["--serve"]
    words += ["--socket", str(path)] if path is not None else []
    return [*words, *options]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a server: this one's, without what would configure it, and EXTRA."""
    kept = {name: value for name, value in os.environ.items() if name not in INHERITED}
    return {**kept, **(extra or {})}


def with_soft_limit(limit: int, command: Sequence[str]) -> list[str]:
    """The COMMAND with a soft limit of open files, such as systemd's 1024."""
    return ["/bin/sh", "-c", f'ulimit -S -n {limit}; exec "$@"', "sh", *command]


class Server:
    """A running `--serve` process, its log and its workers."""

    def __init__(
        self,
        command: Sequence[str],
        path: Path,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        **how: Any,
    ) -> None:
        """Start it; PATH is its socket, HOW goes to Popen. It need not be ready yet."""
        self.path = path
        self.log_path = log or path.with_name(path.name + ".log")
        with self.log_path.open("ab") as stream:
            self.log_start = stream.tell()  # a server before this one may have used the file
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment(env),
                **how,
            )
        self.seen: set[int] = set()

    @property
    def pid(self) -> int:
        """The process id of the parent."""
        return self.process.pid

    @property
    def lines(self) -> list[str]:
        """The log so far: whole lines."""
        content = self.log_path.read_bytes()[self.log_start :]
        text = content.decode("utf-8", "backslashreplace")
        return text.split("\n")[:-1]

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers that run now."""
        found = children_of(self.pid)
        self.seen.update(found)
        return found

    def wait_line(self, pattern: str, count: int = 1, limit: float = LIMIT) -> str:
        """Wait until COUNT lines of the log match PATTERN, and give the last of them."""

        def last() -> str:
            found = self.matching(pattern)
            return found[-1] if len(found) >= count else ""

        deadline = time.monotonic() + limit
        while not last():
            ended = self.process.poll()
            if time.monotonic() > deadline or (ended is not None and not last()):
                log = "\n".join(self.lines[-50:])
                pytest.fail(f"no line with {pattern!r} (exit status {ended}) in the log:\n{log}")
            time.sleep(0.01)
        return last()

    def matching(self, pattern: str) -> list[str]:
        """The lines of the log that match PATTERN, in any case."""
        return [line for line in self.lines if re.search(pattern, line, re.IGNORECASE)]

    def wait_ready(self) -> Server:
        """Wait for the line that says so."""
        self.wait_line("ready")
        self.workers  # noqa: B018  (remembers them, so that none outlives the test unseen)
        return self

    def ask(self, request: str | bytes, timeout: float = LIMIT) -> bytes:
        """Ask as the manager does: the bytes of its one recv."""
        answer = ask_socket(self.path, request, timeout)
        assert not answer.timed_out, f"no answer to {request!r} in {timeout} s"
        return answer.output

    def reply(self, request: str) -> dict[str, Any]:
        """Ask as the manager does: the JSON object of the answer."""
        output = self.ask(request)
        reply = read_json(output)
        assert reply is not None, (request, output)
        return reply

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the parent only, as systemd may and an operator does."""
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = LIMIT) -> float:
        """End it as an operator would: the seconds it took. It must exit with status 0."""
        self.workers  # noqa: B018
        started = time.monotonic()
        self.send(number)
        status = self.process.wait(limit)
        took = time.monotonic() - started
        assert status == 0, (status, self.lines[-20:])
        return took

    def kill(self) -> None:
        """End it and every worker of it, whatever state they are in."""
        everybody = {self.pid, *self.seen, *self.workers}
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for pid in everybody - {self.pid}:
            if alive(pid) and is_script(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_script(pid: int) -> bool:
    """Whether a process runs the script: a number may have gone to somebody else meanwhile."""
    try:
        return SCRIPT.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def serving(
    db: str | Path, path: Path, *options: str, python: str | None = None, **how: Any
) -> Iterator[Server]:
    """A server that is ready, over the source DB at the socket PATH; gone after the block."""
    server = Server(serve_command(db, path, *options, python=python), path, **how)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


@contextlib.contextmanager
def started(command: Sequence[str], path: Path, **how: Any) -> Iterator[Server]:
    """A server of any COMMAND; it need not get ready. Gone after the block."""
    server = Server(command, path, **how)
    try:
        yield server
    finally:
        server.kill()


class Refusal(NamedTuple):
    """How a server that could not start went down."""

    status: int
    lines: list[str]
    output: bytes


def refused(command: Sequence[str], limit: float = LIMIT, **how: Any) -> Refusal:
    """Run a server that cannot start, to its end."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=limit,
        env=environment(),
        check=False,
        **how,
    )
    return Refusal(done.returncode, done.stderr.decode().splitlines(), done.stdout)


def one_shot(db: str | Path, *words: str) -> bytes:
    """What the executable method answers, byte for byte."""
    command = [interpreters()[0].path, str(SCRIPT), "--db", str(db), *words]
    return subprocess.run(command, capture_output=True, check=True, env=environment()).stdout


# --- clients ---------------------------------------------------------------------------------


def connect(path: str | Path, timeout: float = LIMIT) -> socket.socket:
    """A connection that has said nothing yet."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def silent(path: str | Path, count: int, said: bytes = b"") -> Iterator[list[socket.socket]]:
    """COUNT clients that connect, say no more than SAID, and stay."""
    raise_open_files(count + 500)
    with contextlib.ExitStack() as stack:
        held = []
        for _ in range(count):
            connection = stack.enter_context(connect(path))
            if said:
                connection.send(said)
            held.append(connection)
        yield held


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed an otherwise silent connection; does not wait for it."""
    poller = select.poll()  # select() would not take file numbers over 1,023
    poller.register(connection, select.POLLIN)
    if not poller.poll(0):
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


Judge = Callable[[str, bytes], str]


def agent_answered(request: str, answer: bytes) -> str:
    """The fault of an answer to a request for a stored agent; empty for none."""
    wanted = HEAD + b'0, "data": {"id": "' + request.partition(":")[2].encode() + b'"'
    whole = answer.startswith(wanted) and answer.endswith(b'"}}\n')
    return "" if whole else f"{request}: {answer[:200]!r}"


def any_answer(request: str, answer: bytes) -> str:
    """The fault of an answer that may be an error, but must be one; empty for none."""
    whole = answer.startswith(HEAD) and answer.endswith(b"}\n")
    return "" if whole else f"{request}: {answer[:200]!r}"


class Load:
    """Threads that ask as the manager's do, one request after the other, until told to stop.

    JUDGE gives the fault of an answer, or nothing; every fault is kept. REFUSED holds the
    requests that found nobody listening, which is no fault where a server stops.
    """

    def __init__(
        self,
        path: str | Path,
        requests: Iterable[str],
        judge: Judge = agent_answered,
        threads: int = MANAGER_THREADS,
        may_be_refused: bool = False,
    ) -> None:
        """Make it; it starts as a context manager."""
        self.path = path
        self.requests = list(requests)
        self.judge = judge
        self.may_be_refused = may_be_refused
        self.faults: list[str] = []
        self.answers = 0
        self.refused = 0
        self.slowest = 0.0
        self._told_to_stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(first, threads)) for first in range(threads)
        ]

    def __enter__(self) -> Self:
        """Start the threads."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads."""
        self.stop()

    def stop(self) -> None:
        """Let every thread end its request, and wait for that."""
        self._told_to_stop.set()
        for thread in self._threads:
            thread.join()

    def wait_answers(self, more: int, limit: float = LIMIT) -> None:
        """Wait until that many MORE answers have come."""
        wanted, deadline = self.answers + more, time.monotonic() + limit
        while self.answers < wanted:
            if time.monotonic() > deadline:
                found = f"{len(self.faults)} faults: {self.faults[:5]}"
                pytest.fail(f"waited {limit} s in vain for {more} more answers; {found}")
            time.sleep(0.002)

    def _work(self, first: int, step: int) -> None:
        """One thread: each starts at a request of its own."""
        number = first
        while not self._told_to_stop.is_set():
            self._ask(self.requests[number % len(self.requests)])
            number += step

    def _ask(self, request: str) -> None:
        """One request, and the verdict on it."""
        try:
            connection = connect(self.path, 60)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            self._count_refused(f"{request}: {error!r}")
            return
        except OSError as error:
            self._count_answer(f"{request}: {error!r}", 0.0)
            return
        begun = time.monotonic()
        with connection:
            try:
                connection.send(request.encode())
                fault = self.judge(request, connection.recv(65536))
            except OSError as error:
                fault = f"{request}: {error!r}"
        self._count_answer(fault, time.monotonic() - begun)

    def _count_answer(self, fault: str, took: float) -> None:
        with self._lock:
            self.slowest = max(self.slowest, took)
            if fault:
                self.faults.append(fault)
            else:
                self.answers += 1

    def _count_refused(self, fault: str) -> None:
        with self._lock:
            self.refused += 1
            if not self.may_be_refused:
                self.faults.append(fault)
        time.sleep(0.005)  # nobody listens: the manager would try again later, too


# --- many requests, as fast as this machine can ----------------------------------------------


@functools.cache
def compiled_client() -> Path | None:
    """The C client of the benchmark, or None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder = tempfile.mkdtemp(prefix="agent-key-client-")
    atexit.register(shutil.rmtree, folder, True)
    program = Path(folder) / "client"
    command = [compiler, "-O2", "-pthread", "-o", str(program), str(CLIENT_SOURCE)]
    subprocess.run(command, check=True)
    return program


class Flood(NamedTuple):
    """What came of many requests: how many answers, failures, answers a second."""

    answers: int
    failures: int
    rate: float
    told: str = ""


def flood(
    path: str | Path,
    agents: int,
    *,
    count: int = 0,
    seconds: float = 0.0,
    threads: int = MANAGER_THREADS,
) -> Flood:
    """Ask for agents 001 ... AGENTS with 32 threads, COUNT times or for some SECONDS."""
    client = compiled_client()
    if client is None:
        return python_flood(path, agents, count, seconds, threads)
    limits = ["-n", str(count)] if count else ["-d", str(seconds)]
    command = [str(client), "-t", str(threads), *limits, "-r", f"1-{agents}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    figures = dict(pair.split("=") for pair in done.stdout.split())
    told = done.stdout + done.stderr
    rate = float(figures["rate"])
    return Flood(int(figures["answers"]), int(figures["failures"]), rate, told)


def python_flood(path: str | Path, agents: int, count: int, seconds: float, threads: int) -> Flood:
    """The same without a compiler, several times slower."""
    requests = [f"id:{number:03d}" for number in range(1, agents + 1)]
    begun = time.monotonic()
    with Load(path, requests, threads=threads) as load:
        if count:
            until(lambda: load.answers + len(load.faults) >= count, f"{count} answers", 300)
        else:
            time.sleep(seconds)
    took = time.monotonic() - begun
    return Flood(load.answers, len(load.faults), load.answers / took, "\n".join(load.faults[:5]))


# --- what the log must look like -------------------------------------------------------------


def check_log(server: Server, keys: Iterable[str]) -> None:
    """Every line has the form of the log, and none holds a key or a good part of one."""
    lines = server.lines
    odd = [line for line in lines if not LOG_LINE.fullmatch(line)]
    assert not odd, odd[:5]
    text = "\n".join(lines)
    leaked = [part for k in keys for part in (k[:16], k[-16:]) if part.strip() and part in text]
    assert not leaked, leaked[:5]


def levels(server: Server) -> Counter[str]:
    """How many lines of each level the log has."""
    matches = (LOG_LINE.fullmatch(line) for line in server.lines)
    return Counter(match[1] for match in matches if match)
