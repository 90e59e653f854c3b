"""What goes over the socket: requests in every shape, clients of every kind, and their answers.

MANAGER.md, "Socket method": the manager sends `id:001` without a newline or a half-close, and calls
recv once. So the answer comes at once and in one piece.
"""

from __future__ import annotations

import fcntl
import json
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Caller, Record, Stores, script
from manager import check_line
from serving import (
    LIMIT,
    Load,
    Server,
    connect,
    connections,
    key,
    records,
    serving,
    until,
    worker,
)  # fmt: skip

AGENTS = 200
STORED = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
SPECIAL = [
    Record("900", "twice", "10.9.0.1", key(900)),
    Record("900", "twice-more", "10.9.0.2", key(901)),
    Record("901", "bad name", "10.9.0.3", key(902)),
    Record("902", "network", "172.16.5.0/24", key(903)),
    Record("903", "six", "2001:db8::4", key(904)),
    Record("904", "n" * 128, "10.9.0.4", '"' * 128),
]
REQUESTS = {  # and the error number
    b"id:001": 0, b"id:0200": 4, b"id:20000000": 4, b"id:900": 5, b"id:901": 6, b"id:904": 0,
    b"ip:10.0.0.1": 0, b"ip:172.16.5.77": 0, b"ip:2001:0db8:0000:0000:0000:0000:0000:0004": 0,
    b"ip:::ffff:10.0.0.1": 0, b"ip:192.0.2.1": 4, b"ip:any": 3, b"ip:10.0.0.0/8": 3,
    b"id:": 1, b"ip:": 1, b":": 1, b":001": 1, b"id:12": 3, b"id:123456789": 3, b"id:001:002": 3,
    b"id: 001": 3, b"id:001 ": 3, b"ID:001": 3, b"error1:id 003": 3, b"id\0:001": 3,
    b"--version:1": 3, b"--db:/etc/passwd": 3, b"-v:": 3, b"id:\xff\xfe": 3, b"id:\n001": 3,
    b"id:" + 125 * b"0": 3, b"id:001X": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with agents for every kind of answer."""
    return Stores(tmp_path_factory.mktemp("protocol")).sqlite([*records(AGENTS), *SPECIAL])


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    """One server for all who leave it as it is, which is seen at the end."""
    with serving(store, store.with_name("s")) as running:
        workers = running.workers
        yield running
        assert running.workers == workers
        told = "\n".join(running.lines)
        assert "Internal" not in told
        assert not [record for record in [*records(AGENTS), *SPECIAL] if record.key[:16] in told]


@pytest.fixture
def alone(store: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of one worker, whom no other helps."""
    with serving(store, tmp_path / "s", "--workers", "1") as running:
        yield running


def one_shot(store: Path, request: bytes) -> bytes:
    """What the executable method prints for the words of a request."""
    words = request.decode("latin-1").split(":", 1)
    line: bytes = script.answer(words, lambda: script.open_source(str(store), 60), "").line()
    return line


def talk(server: Server, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send the pieces, each once the one before was read; the bytes of one recv."""
    with connect(server.path) as connection:
        for piece in pieces:
            connection.send(piece)
            if piece is not pieces[-1]:
                until(lambda: not unread(connection), "the server to read a piece")
                if select.select([connection], [], [], 0)[0]:  # we were late with the next
                    return b""
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        try:
            return connection.recv(65536)
        except ConnectionResetError:  # it closed, and had not read all
            return b""


def unread(connection: socket.socket) -> bool:
    """Whether the other end has not yet read what was sent."""
    return fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4) != struct.pack("i", 0)


# ---------------------------------------------------------------- requests and answers


@pytest.mark.parametrize(("request_bytes", "error"), REQUESTS.items())
def test_answer_is_that_of_the_one_shot(
    server: Server, store: Path, request_bytes: bytes, error: int
) -> None:
    answer = server.ask(request_bytes)
    assert answer == one_shot(store, request_bytes)
    assert check_line(answer)["error"] == error


@pytest.mark.parametrize("words", [["id", "001"], ["ip", "172.16.5.77"], ["id", "901"], ["id"]])
def test_answer_of_the_program_and_of_one_that_asks_a_server(
    server: Server, store: Path, ask: Caller, words: list[str]
) -> None:
    """`--socket` in a request asks a running server, and judges its words as a one-shot."""
    expected = one_shot(store, ":".join(words).encode())
    assert ask(*words, db=store).output == expected
    assert ask("--socket", server.path, *words).output == expected


def read_and_close(listener: socket.socket) -> None:
    """Take a request, and leave who asked without an answer."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)


def test_asking_where_nobody_answers(tmp_path: Path) -> None:
    """`--socket` in a request: there is an answer in any case."""
    with socket.socket(socket.AF_UNIX) as rude:
        rude.bind(str(tmp_path / "rude"))
        for name, problem in ("none", "No such file"), ("rude", "refused"), ("rude", "closed wi"):
            if problem == "closed wi":
                rude.listen()
                threading.Thread(target=read_and_close, args=(rude,)).start()
            reply = json.loads(script.ask_server(str(tmp_path / name), ["id", "001"], LIMIT))
            assert (reply["error"], problem in reply["message"]) == (2, True)
        late = script.ask_server(str(tmp_path / "rude"), ["id", "001"], 0.1)  # it takes nobody
        assert b'"error": 2' in late and b"timed out" in late


def test_asking_a_server_whose_queue_is_full(tmp_path: Path) -> None:
    """The manager's connect waits for a place in it: so does a request, as long as it may."""
    path = tmp_path / "busy"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with connect(path):  # it fills the queue
            started = time.monotonic()
            late = script.ask_server(str(path), ["id", "001"], 0.3)
            assert 0.2 < time.monotonic() - started < LIMIT
            assert b'"error": 2' in late and b"timed out" in late
            answers: list[bytes] = []
            asking = threading.Thread(
                target=lambda: answers.append(script.ask_server(str(path), ["id", "001"], LIMIT))
            )
            asking.start()
            time.sleep(0.2)
            assert asking.is_alive()
            busy.accept()[0].close()
            connection, _ = busy.accept()
            with connection:
                assert connection.recv(99) == b"id:001"
                connection.send(b'{"error": 4}\n')
            asking.join()
            assert answers == [b'{"error": 4}\n']


def test_the_time_for_asking_is_for_all_of_it(tmp_path: Path) -> None:
    """What the connection took is missing for the answer."""
    path = tmp_path / "busy"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with connect(path):
            accepting = threading.Timer(0.5, lambda: busy.accept()[0].close())
            accepting.start()
            started = time.monotonic()
            late = script.ask_server(str(path), ["id", "001"], 1)
            assert 0.9 < time.monotonic() - started < 1.4
            assert b"timed out" in late
            accepting.join()


FOREIGN = {  # what another program may send, and what is printed of it: nothing, or one object
    "a terminal's commands": (b'\x1b[2J{"error": 4}\n', None),
    "half an object": (b'{"error": 4, "mess', None),
    "two objects": (b'{"error": 4}\n{"error": 4}\n', None),
    "two on a line": (b'{"error": 4} {"error": 4}\n', None),
    "two lines": (b'{"error": 4,\n"message": ""}\n', None),
    "a list": (b'[{"error": 4}]\n', None),
    "a number": (b"4\n", None),
    "no ASCII": ('{"message": "ä"}\n'.encode(), None),
    "a NUL": (b'{"error": 4}\0', None),
    "deep": (20_000 * b'{"":', None),
    "no newline": (b'{"error": 4, "message": "m"}', b'{"error": 4, "message": "m"}\n'),
    "one": (b'{"error": 4, "message": "m"}\n', b'{"error": 4, "message": "m"}\n'),
}


@pytest.mark.parametrize(("sent", "printed"), FOREIGN.values(), ids=FOREIGN)
def test_asking_another_program(
    tmp_path: Path, ask: Caller, sent: bytes, printed: bytes | None
) -> None:
    """Whatever listens there: one JSON object of printable ASCII, or error 2."""

    def serve_once() -> None:
        connection, _ = other.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(sent)

    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        thread = threading.Thread(target=serve_once)
        thread.start()
        output = ask.call("--socket", tmp_path / "other", "id", "001").output
        thread.join()
    if printed is None:
        assert check_line(output)["error"] == 2
        assert "one JSON object" in check_line(output)["message"]
    else:
        assert output == printed


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\0"])
@pytest.mark.parametrize("half_close", [False, True])
def test_line_ends_are_tolerated(server: Server, store: Path, end: bytes, half_close: bool) -> None:
    """People try it with `nc -U`, which sends lines, and may half-close."""
    for request in b"id:007", b"id:":
        assert talk(server, request + end, half_close=half_close) == one_shot(store, request)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"i", b"d", b":001"), 0),
        ((b"id", b":001"), 0),
        ((b"x" * 127, b":"), 3),
        ((b"x" * 128, b":"), 3),
        ((b"x" * 100, b"x" * 100), 3),
        ((b"\n", b"id:001"), 3),
    ],
)
def test_pieces_without_a_colon_wait_for_more(
    server: Server, pieces: tuple[bytes, ...], error: int
) -> None:
    answer = check_line(until(lambda: talk(server, *pieces), "an answer", 15))
    assert answer["error"] == error
    assert ("more than 128 bytes" in answer.get("message", "")) is (sum(map(len, pieces)) > 128)


@pytest.mark.parametrize("size", [127, 128, 129, 300, 100_000])
@pytest.mark.parametrize("start", [b"id:", b""])
def test_at_most_128_bytes(server: Server, start: bytes, size: int) -> None:
    answer = check_line(talk(server, start + b"9" * (size - len(start)), half_close=True))
    assert answer["error"] == 3
    assert ("more than 128 bytes" in answer["message"]) is (size > 128)


def test_connect_and_close_is_no_error(server: Server) -> None:
    """The manager's health check; and one who does not wait for his answer."""
    before = server.lines
    for said in [b"", b"id:20000000"] * 50:
        with connect(server.path) as connection:
            connection.send(said)
    assert talk(server, b"", half_close=True) == b""
    assert server.error("id:20000000") == 4
    assert server.lines == before


def noise(count: int) -> Iterator[bytes]:
    """Bytes of any kind, of a request's own letters, and requests with a fault."""
    source = random.Random(20240611)
    for _ in range(count):
        yield source.randbytes(source.randrange(1, 200))
        letters = b"idp:0123456789./ \r\n\0\xff\xc3\x28-"
        yield bytes(source.choices(letters, k=source.randrange(1, 40)))
        request = bytearray(source.choice((b"id:001", b"ip:10.0.0.1", b"ip:2001:db8::4")))
        place = source.randrange(len(request))
        request[place : place + source.randrange(2)] = source.randbytes(1)
        yield bytes(request)


def test_any_bytes_get_one_json_answer_or_a_clean_close(server: Server) -> None:
    for request in noise(300):
        answer = talk(server, request, half_close=b":" not in request)
        assert answer or b":" not in request, request
        assert not answer or check_line(answer)["error"] in (0, 1, 3, 4), (request, answer)


class Counting(socket.socket):
    """A socket that counts what is sent."""

    sent = 0

    def sendall(self, *arguments: object) -> None:
        """Count."""
        self.sent += 1
        super().sendall(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("request_bytes", [b"id:001", b"id:904", b"id:901", b"x" * 129])
def test_at_once_and_in_one_piece(store: Path, request_bytes: bytes) -> None:
    """The manager calls recv once: what comes in a second piece is lost."""
    ours, theirs = socket.socketpair()
    patient = worker(store)
    patient.patience = LIMIT
    with ours, Counting(fileno=theirs.detach()) as counting:
        ours.send(request_bytes)
        started = time.monotonic()
        script.Conversation(counting, patient).handle()
        assert time.monotonic() - started < LIMIT / 2  # it waits for nothing that does not come
        assert counting.sent == 1
        check_line(ours.recv(65536))


# ---------------------------------------------------------------- clients that hold a worker


def closed_after(connection: socket.socket, since: float) -> float:
    """Wait until the server has closed: the seconds SINCE, and no answer before."""
    assert connection.recv(65536) == b""
    return time.monotonic() - since


def test_silent_clients_are_closed_after_a_second_the_next_ones_sooner(alone: Server) -> None:
    """A second each would be 15; and after one who talks it is a second again."""
    started = time.monotonic()
    with connections(alone.path, 15 * [""]) as silent:
        assert closed_after(silent[0], started) >= 1
        assert max(closed_after(each, started) for each in silent) < 12
    assert alone.error("id:001") == 0
    with connections(alone.path, ["", "i", "id:002"]) as (silent_one, piece, behind):
        started = time.monotonic()
        assert closed_after(silent_one, started) > 0.9
        assert check_line(piece.recv(65536))["error"] == 3
        assert check_line(behind.recv(65536))["error"] == 0
        assert behind.recv(65536) == b""


def test_seven_silent_clients_at_a_time(server: Server) -> None:
    """For as long as it lasts; the eighth worker answers everybody."""
    done = threading.Event()

    def be_silent() -> None:
        while not done.is_set():
            with connect(server.path) as connection:
                assert connection.recv(65536) == b""

    threads = [threading.Thread(target=be_silent) for _ in range(7)]
    for thread in threads:
        thread.start()
    try:
        with Load(server.path, STORED, threads=8) as load:
            load.wait(500)
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
def test_a_thousand_silent_clients_at_once(server: Server) -> None:
    with connections(server.path, 1000 * [""]), connections(server.path, STORED) as behind:
        started = time.monotonic()
        for connection in behind:
            assert check_line(connection.recv(65536))["error"] == 0
        assert time.monotonic() - started < 15


def test_a_client_that_sends_and_never_reads(alone: Server) -> None:
    """Its answer is small enough for the socket, so nobody waits for it to be read."""
    with connections(alone.path, ["id:904", "x" * 5000] * 20):
        assert alone.error("id:001") == 0


def test_a_locked_store_is_error_2_in_time(
    store: Path, tmp_path: Path, locked: Callable[[Path], None]
) -> None:
    """A worker answers within its --timeout, and goes on."""
    with serving(store, tmp_path / "t", "--timeout", "0.5", "--workers", "2") as server:
        assert server.error("id:001") == 0
        locked(store)
        started = time.monotonic()
        with connections(server.path, STORED[:4]) as waiting:
            assert {check_line(each.recv(65536))["error"] for each in waiting} == {2}
        assert 0.4 < time.monotonic() - started < 5
        server.wait_line("locked")


def test_each_answer_has_the_whole_timeout(stores: Stores, tmp_path: Path) -> None:
    """A look-up that reads the whole table, when the store has been open for longer than that."""
    source = stores.sqlite(records(40_000))
    with serving(source, tmp_path / "s", "--workers", "1", "--timeout", "0.9") as server:
        assert server.error("id:40000") == 0
        with connections(server.path, [""]) as (silent,):
            assert silent.recv(1) == b""  # a second later
        assert server.error("id:40000") == 0
