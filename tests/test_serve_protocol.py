"""What goes over the socket: requests in every shape, and what comes back for them.

MANAGER.md, "Socket method": authd sends `id:001` without a newline and without a half-close, and
calls recv once. So the answer must come at once and in one piece.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import select
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SCRIPT, Python, Record, Stores, interpreters
from manager import read_json
from serving import (
    INDEXED,
    LIMIT,
    LOG_LINE,
    Load,
    Server,
    agent_answered,
    any_answer,
    check_log,
    connect,
    environment,
    flood,
    is_closed,
    key,
    levels,
    one_shot,
    records,
    serving,
    silent,
    until,
)

AGENTS = 500
SEED = 20240611
SHORT_TIMEOUT = 1.0  # seconds, for --timeout
QUIET = 0.3  # seconds in which nothing must come
REQUEST_LIMIT = 128  # bytes

SPECIAL = [
    Record("900", "twice", "10.9.0.1", key(900)),
    Record("900", "twice-more", "10.9.0.2", key(900)),
    Record("901", "bad name", "10.9.0.3", key(901)),
    Record("902", "long-key", "10.9.0.4", key(902) * 3),
    Record("903", "network", "172.16.5.0/24", key(903)),
    Record("904", "six", "2001:db8::4", key(904)),
    Record("905", "anywhere", "any", key(905)),
]
REQUESTS = [
    "id:001",
    "id:0001",
    "id:500",
    "id:20000000",
    "id:900",
    "id:901",
    "id:902",
    "id:905",
    "ip:10.0.0.1",
    "ip:172.16.5.77",
    "ip:2001:db8::4",
    "ip:2001:0db8:0000:0000:0000:0000:0000:0004",
    "ip:::ffff:10.0.0.1",
    "ip:192.0.2.1",
    "ip:any",
    "ip:10.0.0.0/8",
    "id:",
    "ip:",
    ":",
    ":001",
    "id:12",
    "id:123456789",
    "id:00a",
    "id:001:002",
    "id: 001",
    "id:001 ",
    "ID:001",
    "error1:id 003",
]


def words_of(request: str) -> list[str]:
    """The words that the executable method would get for a request."""
    option, _, value = request.partition(":")
    return [option, value] if value else [option]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with agents of every kind of answer."""
    folder = tmp_path_factory.mktemp("protocol")
    return Stores(folder).sqlite([*records(AGENTS), *SPECIAL], INDEXED)


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    """One server for all tests that do not need their own."""
    with serving(store, store.with_name("sock")) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(store: Path) -> Iterator[Server]:
    """A server that gives a client one second."""
    with serving(store, store.with_name("hasty"), "--timeout", str(SHORT_TIMEOUT)) as running:
        yield running


def talk(server: Server, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send the pieces one by one, each when the one before was read; the bytes of one recv."""
    with connect(server.path) as connection:
        for piece in pieces[:-1]:
            connection.send(piece)
            assert not select.select([connection], [], [], QUIET)[0], f"answered at {piece!r}"
        for piece in pieces[-1:]:
            connection.send(piece)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(65536)


def error_of(answer: bytes) -> int:
    """The error number of a whole answer."""
    assert answer.endswith(b"}\n"), answer
    return int(json.loads(answer)["error"])


# --- the answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("request_text", REQUESTS)
def test_answer_is_that_of_the_one_shot(server: Server, store: Path, request_text: str) -> None:
    assert server.ask(request_text) == one_shot(store, *words_of(request_text))


def test_every_kind_of_answer_was_among_them(server: Server) -> None:
    """The list above would prove little if it held errors of one kind only."""
    assert {error_of(server.ask(request)) for request in REQUESTS} == {0, 1, 3, 4, 5, 6}


def test_served_under_every_interpreter(interpreter: Python, store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "sock", python=interpreter.path) as server:
        for request in ("id:001", "ip:10.0.0.2", "ip:172.16.5.1", "id:999", "id:901", "id:"):
            assert server.ask(request) == one_shot(store, *words_of(request))
        assert flood(server.path, AGENTS, count=500).failures == 0
        server.stop()
        check_log(server, [key(1), key(2)])


def test_started_by_its_name(store: Path, tmp_path: Path) -> None:
    """As in a systemd unit: the file itself is the program."""
    command = [str(SCRIPT), "--db", str(store), "--serve", "--socket", str(tmp_path / "sock")]
    server = Server(command, tmp_path / "sock")
    try:
        assert server.wait_ready().reply("id:001")["error"] == 0
        server.stop()
    finally:
        server.kill()


@pytest.mark.parametrize("make", [Stores.csv, Stores.keys])
def test_text_sources_are_served(stores: Stores, tmp_path: Path, make: Callable[..., Path]) -> None:
    source = make(stores, records(50))
    with serving(source, tmp_path / "sock") as server:
        for request in ("id:001", "id:050", "id:051", "ip:10.0.0.7", "ip:192.0.2.1"):
            assert server.ask(request) == one_shot(source, *words_of(request))


def test_sql_script_is_served(tmp_path: Path) -> None:
    sample = SCRIPT.with_name("sample.db.sql")
    with serving(sample, tmp_path / "sock") as server:
        for request in ("id:001", "ip:192.168.1.100", "id:999"):
            assert server.ask(request) == one_shot(sample, *words_of(request))


def test_connection_is_closed_after_the_answer(server: Server) -> None:
    with connect(server.path) as connection:
        connection.send(b"id:001")
        assert agent_answered("id:001", connection.recv(65536)) == ""
        assert connection.recv(65536) == b""


def test_32_threads_each_get_their_own_answer(server: Server) -> None:
    requests = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
    with Load(server.path, requests) as load:
        load.wait_answers(5000, 60)
    assert not load.faults, load.faults[:5]


@pytest.mark.parametrize("request_text", ["--version:1", "--db:/etc/passwd", "--help:", "-v:1"])
def test_an_option_is_no_request(server: Server, request_text: str) -> None:
    """On a command line these would be options; from the network they are bad arguments."""
    assert error_of(server.ask(request_text)) == 3


# --- the request -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\0"])
@pytest.mark.parametrize("half_close", [False, True], ids=["open", "half-closed"])
def test_line_ends_are_tolerated(server: Server, store: Path, end: bytes, half_close: bool) -> None:
    """People test with `nc -U`, which sends lines and may half-close."""
    expected = one_shot(store, "id", "007")
    assert talk(server, b"id:007" + end, half_close=half_close) == expected
    expected = one_shot(store, "ip", "10.0.0.7")
    assert talk(server, b"ip:10.0.0.7" + end, half_close=half_close) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_a_line_end_is_no_value(server: Server, store: Path, end: bytes) -> None:
    assert talk(server, b"id:" + end) == one_shot(store, "id")


@pytest.mark.parametrize("pieces", [(b"i", b"d:001"), (b"id", b":001"), (b"i", b"d", b":001")])
def test_pieces_before_the_colon_are_put_together(server: Server, pieces: tuple[bytes]) -> None:
    assert agent_answered("id:001", talk(server, *pieces)) == ""


@pytest.mark.parametrize("piece", [b"id:0", b"id:", b"ip:10."])
def test_the_first_read_with_a_colon_is_the_request(
    server: Server, store: Path, piece: bytes
) -> None:
    """The server must not wait for more: the manager's one piece has no end mark."""
    assert talk(server, piece) == one_shot(store, *words_of(piece.decode()))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"id:" + b"1" * (REQUEST_LIMIT - 2),
        b"id:" + b"1" * 5000,
        b"x" * (REQUEST_LIMIT + 1),
        b"x" * 5000,
        b"id:001" + b"\n" * 5000,
        b"\0" * 5000,
        b"id:001" + b" " * 70000,
    ],
    ids=lambda value: f"{value[:7]!r}-{len(value)}",
)
def test_over_128_bytes_is_error_3(server: Server, request_bytes: bytes) -> None:
    assert error_of(talk(server, request_bytes)) == 3


def test_over_128_bytes_in_pieces_is_error_3(server: Server) -> None:
    assert error_of(talk(server, b"x" * 100, b"x" * 100)) == 3


def test_a_megabyte_does_not_hold_the_server_up(server: Server) -> None:
    """The client gets an answer, or it finds the door closed while it still sends."""
    with connect(server.path) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x" * 1_000_000)
        with contextlib.suppress(ConnectionResetError):
            answer = connection.recv(65536)
            assert not answer or error_of(answer) == 3
    assert server.reply("id:001")["error"] == 0


# --- clients that ask nothing ----------------------------------------------------------------


def test_health_check_is_closed(server: Server) -> None:
    """MANAGER.md, "Socket method": connect and close at once, with no input."""
    for _ in range(100):
        connect(server.path).close()
    with connect(server.path) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536) == b""
    assert server.reply("id:001")["error"] == 0


def test_half_close_after_a_piece(server: Server) -> None:
    """No request, but no reason to fall over either: one answer or a clean close."""
    answer = talk(server, b"id", half_close=True)
    assert not answer or error_of(answer) in (1, 3)


@pytest.mark.parametrize("checks", [0, 100])
def test_health_checks_leave_the_log_as_it_is(store: Path, tmp_path: Path, checks: int) -> None:
    """The same lines with health checks as without: nothing above debug."""
    with serving(store, tmp_path / "sock", "--workers", "1") as server:
        for _ in range(checks):
            connect(server.path).close()
            with connect(server.path) as connection:
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""
        assert server.reply("id:001")["error"] == 0
        server.stop()
        check_log(server, [key(1)])
        about_clients = [
            line
            for line in server.lines
            if not re.search("ready|start|stop|listen|source|worker|handed|001", line)
        ]
    assert not about_clients
    assert levels(server)["warning"] == levels(server)["error"] == 0


def test_client_that_does_not_wait_for_its_answer(server: Server) -> None:
    before = levels(server)
    for _ in range(200):
        with connect(server.path) as connection:
            connection.send(b"id:20000000")
    assert server.reply("id:001")["error"] == 0
    after = levels(server)
    assert (after["warning"], after["error"]) == (before["warning"], before["error"])


@pytest.mark.parametrize("said", [b"", b"i"], ids=["nothing", "a piece"])
def test_silent_client_is_closed_after_the_timeout(hasty: Server, said: bytes) -> None:
    begun = time.monotonic()
    with connect(hasty.path) as connection:
        if said:
            connection.send(said)
        answer = connection.recv(65536)
        took = time.monotonic() - begun
    assert not answer or (said and error_of(answer) in (1, 3))
    assert 0.8 * SHORT_TIMEOUT < took < SHORT_TIMEOUT + 4


def test_silent_clients_are_all_closed(hasty: Server) -> None:
    with silent(hasty.path, 300) as connections:
        until(lambda: all(map(is_closed, connections)), "300 silent clients closed")
    assert hasty.reply("id:001")["error"] == 0


def test_silent_client_does_not_make_another_wait(server: Server) -> None:
    with silent(server.path, 50), silent(server.path, 50, b"i"):
        begun = time.monotonic()
        for number in range(1, 51):
            assert agent_answered(f"id:{number:03d}", server.ask(f"id:{number:03d}")) == ""
        assert time.monotonic() - begun < 4  # the silent ones stay for five seconds


# --- any bytes -------------------------------------------------------------------------------


def random_requests(count: int) -> Iterator[bytes]:
    """Byte strings: noise, noise of the request's own letters, and requests with a fault."""
    source = random.Random(SEED)
    letters = b"idp:0123456789./ \r\n\0\xff\xc3\x28-"
    for _ in range(count):
        kind = source.randrange(3)
        if kind == 0:
            yield source.randbytes(source.randrange(1, 200))
        elif kind == 1:
            yield bytes(source.choices(letters, k=source.randrange(1, 40)))
        else:
            request = bytearray(source.choice((b"id:001", b"ip:10.0.0.1", b"ip:2001:db8::4")))
            for _ in range(source.randrange(1, 3)):
                place = source.randrange(len(request))
                request[place : place + source.randrange(2)] = source.randbytes(1)
            yield bytes(request)


def fault_of_random(request: bytes, answer: bytes) -> str:
    """What is wrong with the answer to a random byte string; empty for nothing."""
    if not answer:
        due = b":" in request or len(request) > REQUEST_LIMIT
        return f"{request!r}: no answer" if due else ""
    if any_answer("", answer) or any(not 32 <= byte < 127 for byte in answer[:-1]):
        return f"{request!r}: {answer!r}"
    reply = read_json(answer) or {}
    sound = re.fullmatch(rb"id:0*[0-9]{1,8}(\r?\n|\0)?|ip:[0-9a-fA-F.:]{2,}(\r?\n|\0)?", request)
    allowed = (0, 3, 4, 5, 6) if sound else (1, 3)
    return "" if reply["error"] in allowed else f"{request!r}: {answer!r}"


def test_10_000_random_byte_strings(store: Path, tmp_path: Path) -> None:
    """One JSON answer or a clean close for each; -v shows each without spoiling the log."""
    faults = []
    with serving(store, tmp_path / "sock", "-v") as server:
        workers = server.workers
        for number, request in enumerate(random_requests(10_000)):
            half_close = b":" not in request or number % 2 == 0
            answer = talk(server, request, half_close=half_close)
            fault = fault_of_random(request, answer)
            faults += [fault] if fault else []
        assert not faults, faults[:5]
        assert server.workers == workers
        assert server.reply("id:001")["error"] == 0
        server.stop()
    check_log(server, [key(number) for number in range(1, AGENTS + 1)])
    assert not server.matching("internal|traceback|died")


# --- a locked source -------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """An exclusive lock on a database, as a writer holds one while it commits."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        yield


def ask_all(server: Server, requests: list[str]) -> list[tuple[float, bytes]]:
    """Every request at once, each in a thread: how long it took, and the answer."""
    results: list[tuple[float, bytes]] = []

    def ask(request: str) -> None:
        begun = time.monotonic()
        answer = server.ask(request, 60)
        results.append((time.monotonic() - begun, answer))

    threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(requests)
    return results


def test_locked_source_is_error_2_in_time_for_everybody(stores: Stores, tmp_path: Path) -> None:
    """Fifty clients at once: if one waited behind the other, the last would wait a minute."""
    source = stores.sqlite(records(50), INDEXED)
    requests = [f"id:{number:03d}" for number in range(1, 51)]
    with serving(source, tmp_path / "sock", "--timeout", "2") as server:
        with locked(source):
            results = ask_all(server, requests)
        assert {error_of(answer) for _, answer in results} == {2}
        assert max(took for took, _ in results) < 2 + 3
        until(lambda: server.reply("id:001")["error"] == 0, "an answer after the lock")
        server.stop()
        assert server.matching(r"(error|warning): .*locked|no answer in time")
        check_log(server, [key(1)])


def test_short_lock_is_waited_for(stores: Stores, tmp_path: Path) -> None:
    """A writer at work is fine: the answer comes when it has committed."""
    source = stores.sqlite(records(50), INDEXED)
    requests = [f"id:{number:03d}" for number in range(1, 9)]
    results = []
    with serving(source, tmp_path / "sock") as server:
        with locked(source):
            asking = threading.Thread(target=lambda: results.extend(ask_all(server, requests)))
            asking.start()
            asking.join(0.7)
        asking.join()
    assert {error_of(answer) for _, answer in results} == {0}


ENDLESS = """CREATE VIEW agent AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
    SELECT i AS id, 'a' AS name, 'any' AS ip, 'k' AS agent_key FROM n WHERE i < 0"""


def test_who_asks_while_a_query_takes_long_is_answered(tmp_path: Path) -> None:
    """He was accepted long ago, but has not been silent: the server has not looked."""
    source = tmp_path / "endless.db"
    with contextlib.closing(sqlite3.connect(source)) as database:
        database.execute(ENDLESS)
    options = ("--workers", "1", "--timeout", "1")
    with (
        serving(source, tmp_path / "sock", *options) as server,
        connect(server.path) as patient,
        connect(server.path) as health_check,
    ):
        health_check.shutdown(socket.SHUT_WR)
        until(lambda: is_closed(health_check), "the one before it to be accepted, too")
        with connect(server.path) as first:
            first.send(b"id:001")
            time.sleep(0.3)  # the query takes a second
            patient.send(b"id:002")
            assert error_of(first.recv(65536)) == 2
        assert error_of(patient.recv(65536)) == 2


def test_silent_and_health_checks_while_the_source_is_locked(
    stores: Stores, tmp_path: Path
) -> None:
    """A client that needs no look-up does not wait for the lock."""
    source = stores.sqlite(records(5), INDEXED)
    with serving(source, tmp_path / "sock", "--timeout", "4", "--workers", "1") as server:
        assert server.reply("id:001")["error"] == 0
        with locked(source), silent(server.path, 4, b"id:001"):
            begun = time.monotonic()
            assert error_of(server.ask("id:12")) == 3
            with connect(server.path) as connection:
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""
            assert time.monotonic() - begun < 2


# --- the other end of the socket, from the command line --------------------------------------


def ask_by_command(path: Path, *words: str) -> bytes:
    """What `agent_key_request.py --socket PATH id 001` prints."""
    command = [interpreters()[0].path, str(SCRIPT), "--socket", str(path), *words]
    done = subprocess.run(
        command, capture_output=True, env=environment(), timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.mark.parametrize("words", [("id", "001"), ("ip", "10.0.0.1"), ("id", "999"), ("id", "900")])
def test_command_asks_a_running_server(server: Server, store: Path, words: tuple[str, str]) -> None:
    assert ask_by_command(server.path, *words) == one_shot(store, *words)


@pytest.mark.parametrize("words", [(), ("id",), ("id", ""), ("error1", "id", "003"), ("id", "x")])
def test_command_judges_its_words_as_a_one_shot(
    server: Server, store: Path, words: tuple[str, ...]
) -> None:
    assert ask_by_command(server.path, *words) == one_shot(store, *words)


def test_command_with_no_server_there(tmp_path: Path) -> None:
    assert error_of(ask_by_command(tmp_path / "nobody", "id", "001")) == 2
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    assert error_of(ask_by_command(tmp_path / "stale", "id", "001")) == 2


def test_command_with_a_server_that_closes(tmp_path: Path) -> None:
    """Closed without an answer: still one JSON line."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "rude"))
        listener.listen()
        closing = threading.Thread(target=lambda: listener.accept()[0].close())
        closing.start()
        assert error_of(ask_by_command(tmp_path / "rude", "id", "001")) == 2
        closing.join()


# --- the log ---------------------------------------------------------------------------------


def test_log_tells_whose_key_went_out_and_never_the_key(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "sock") as server:
        server.ask("id:007")
        server.ask("ip:10.0.0.8")
        server.ask("id:20000000")
        server.stop()
    assert server.matching(r" info: .*\b007\b")
    assert server.matching(r" info: .*\b008\b")
    assert not server.matching("20000000")
    check_log(server, [key(7), key(8)])


def test_every_agent_whose_key_went_out_is_in_the_log(store: Path, tmp_path: Path) -> None:
    """As after the loss of a manager, when a whole fleet comes back: not one is left out."""
    with serving(store, tmp_path / "sock") as server:
        for number in range(1, AGENTS + 1):
            assert server.reply(f"id:{number:03d}")["error"] == 0
        server.stop()
    told = {
        number for line in server.matching(" info: ") for number in re.findall(r"\b\d{3}\b", line)
    }
    assert {f"{number:03d}" for number in range(1, AGENTS + 1)} <= told


def test_verbose_log_has_every_request_and_never_a_key(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "sock", "-v") as server:
        for request in REQUESTS:
            server.ask(request)
        server.stop()
    for wanted in ("20000000", r"192\.0\.2\.1", r"\b001\b", r"172\.16\.5\.77", "00a"):
        assert server.matching(wanted), wanted
    check_log(server, [record.key for record in SPECIAL] + [key(n) for n in range(1, AGENTS)])


@pytest.mark.parametrize(("request_text", "error"), [("id:900", 5), ("id:901", 6), ("id:902", 6)])
def test_errors_for_the_operator_are_logged(
    store: Path, tmp_path: Path, request_text: str, error: int
) -> None:
    with serving(store, tmp_path / "sock") as server:
        reply = server.reply(request_text)
        assert reply["error"] == error
        server.stop()
    assert server.matching(" (error|warning): .*" + re.escape(request_text[3:]))
    check_log(server, [record.key for record in SPECIAL])


def test_repeated_failure_is_summed_up(store: Path, tmp_path: Path) -> None:
    """Two thousand times the same failure: a few lines, one of which tells how often."""
    with serving(store, tmp_path / "sock", "--workers", "1") as server:
        with Load(server.path, ["id:900"], any_answer, threads=8) as load:
            load.wait_answers(2000)
        server.stop()
    about = server.matching("900|repeat|times|more")
    assert 1 <= len(about) <= 20, about[:30]
    counts = [int(n) for line in about for n in re.findall(r"\d+", line) if int(n) != 900]
    assert max(counts, default=0) > 500, about


def test_flood_of_unknown_agents_cannot_fill_the_disk(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "sock") as server:
        requests = [f"id:{number}" for number in range(20_000_000, 20_003_000)]
        with Load(server.path, requests, any_answer, threads=8) as load:
            load.wait_answers(3000)
        requests = [f"ip:192.0.{number >> 8}.{number & 255}" for number in range(2000)]
        with Load(server.path, requests, any_answer, threads=8) as load:
            load.wait_answers(2000)
        server.stop()
    assert len(server.lines) < 50
    assert all(LOG_LINE.fullmatch(line) for line in server.lines)
