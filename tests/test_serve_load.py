"""A fleet's load: many threads, many silent clients, many requests, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Stores
from serving import (
    INDEXED,
    MANAGER_THREADS,
    Load,
    Server,
    agent_answered,
    any_answer,
    compiled_client,
    connect,
    flood,
    is_closed,
    key,
    open_files,
    raise_open_files,
    records,
    rss_kb,
    serve_command,
    serving,
    silent,
    started,
    until,
    with_soft_limit,
)

AGENTS = 1000
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
MANY = 200_000
SILENT = 1000
ROUND = 1.0  # seconds of one measurement
ROUNDS = 3
GROWTH_KB = 1024  # what 200,000 requests may add to a worker: less than 6 bytes each


@pytest.fixture
def store(stores: Stores) -> Path:
    """An SQLite store."""
    return stores.sqlite(records(AGENTS), INDEXED)


# --- silent clients --------------------------------------------------------------------------


def test_1000_silent_connections_leave_half_the_rate(store: Path, tmp_path: Path) -> None:
    """The usual rate and the rate beside 1,000 silent clients, measured in turn.

    The server starts with systemd's soft limit of 1,024 files.
    """
    command = serve_command(store, tmp_path / "sock", "--timeout", "120")
    usual, beside = [], []
    with started(with_soft_limit(1024, command), tmp_path / "sock") as server:
        server.wait_ready()
        flood(server.path, AGENTS, seconds=ROUND)  # warms up
        for _ in range(ROUNDS):
            usual.append(flood(server.path, AGENTS, seconds=ROUND))
            with silent(server.path, SILENT // 2), silent(server.path, SILENT // 2, b"i") as some:
                beside.append(flood(server.path, AGENTS, seconds=ROUND))
                assert not any(map(is_closed, some)), "they were to stay, for this measurement"
    assert [result.told for result in usual + beside if result.failures] == []
    rates = [statistics.median(result.rate for result in results) for results in (usual, beside)]
    assert rates[1] >= 0.5 * rates[0], rates


def test_silent_connections_that_come_and_go(store: Path, tmp_path: Path) -> None:
    """Closed by --timeout again and again, while 32 threads ask: none of those fails."""
    with serving(store, tmp_path / "sock", "--timeout", "1") as server:
        with Load(server.path, REQUESTS) as load:
            for _ in range(2):
                with silent(server.path, SILENT) as connections:
                    until(lambda: all(map(is_closed, connections)), "all closed")
            load.wait_answers(500)
        assert not load.faults, load.faults[:5]
        assert not server.matching("(error|warning):|died")


# --- the backlog -----------------------------------------------------------------------------


def test_backlog_holds_a_thousand(store: Path, tmp_path: Path) -> None:
    """MANAGER.md: connect has no time-out, so a full backlog would hang a manager's thread."""
    raise_open_files(SILENT + 500)
    with serving(store, tmp_path / "sock") as server, contextlib.ExitStack() as stack:
        workers = server.workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        connections = []
        for request in REQUESTS:
            connections.append(stack.enter_context(connect(server.path, 5)))
            connections[-1].send(request.encode())
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        for connection, request in zip(connections, REQUESTS, strict=True):
            connection.settimeout(20)
            assert agent_answered(request, connection.recv(65536)) == ""
        assert server.workers == workers


def test_one_frozen_worker_does_not_stop_the_others(store: Path, tmp_path: Path) -> None:
    """What the frozen one had taken waits for it; whoever comes later is answered."""
    with serving(store, tmp_path / "sock", "--workers", "2") as server:
        assert server.reply("id:001")["error"] == 0
        frozen = server.workers[0]
        os.kill(frozen, signal.SIGSTOP)
        try:
            for request in REQUESTS[:100]:
                assert agent_answered(request, server.ask(request, 10)) == ""
        finally:
            os.kill(frozen, signal.SIGCONT)


# --- nothing left behind ---------------------------------------------------------------------


class Footprint:
    """Memory and open files of the parent and its workers."""

    def __init__(self, server: Server) -> None:
        """Look now."""
        self.workers = server.workers
        everybody = [server.pid, *self.workers]
        self.memory = {pid: rss_kb(pid) for pid in everybody}
        self.files = {pid: open_files(pid) for pid in everybody}


def test_200_000_requests_leave_memory_and_files_where_they_were(
    store: Path, tmp_path: Path
) -> None:
    with serving(store, tmp_path / "sock") as server:
        assert flood(server.path, AGENTS, count=20_000).failures == 0
        before = Footprint(server)
        done = flood(server.path, AGENTS, count=MANY)
        assert (done.failures, done.answers) == (0, MANY), done.told
        until(lambda: Footprint(server).files == before.files, "the files to be closed")
        after = Footprint(server)
    assert after.workers == before.workers
    growth = {pid: after.memory[pid] - before.memory[pid] for pid in before.memory}
    assert max(growth.values()) < GROWTH_KB, growth


MISSES = [f"id:{number}" for number in range(20_000_000, 20_005_000)]
ADDRESSES = [f"ip:10.{n >> 14}.{n >> 7 & 127}.{n & 127}" for n in range(0, 2_000_000, 401)]
NOISE = [f"id:{number}x" for number in range(5000)] + ["id:", "ip:", ":", "foo:1", "x" * 200]


@pytest.mark.parametrize(
    ("kind", "requests"),
    [("sqlite", MISSES), ("sqlite", ADDRESSES), ("csv", ADDRESSES), ("sqlite", NOISE)],
    ids=["misses", "addresses", "addresses-csv", "noise"],
)
def test_requests_all_different_leave_no_memory_behind(
    stores: Stores, tmp_path: Path, kind: str, requests: list[str]
) -> None:
    """Anyone on the network can make up ids and addresses: nothing may be kept for each."""
    rows = records(AGENTS)
    source = stores.sqlite(rows, INDEXED) if kind == "sqlite" else stores.csv(rows)
    with serving(source, tmp_path / "sock", "--workers", "1") as server:
        with Load(server.path, requests[:500], any_answer, threads=4) as load:
            load.wait_answers(1000)
        before = Footprint(server)
        with Load(server.path, requests[500:], any_answer, threads=4) as load:
            load.wait_answers(len(requests) - 500, 60)
        assert not load.faults, load.faults[:5]
        until(lambda: Footprint(server).files == before.files, "the files to be closed")
        after = Footprint(server)
    growth = {pid: after.memory[pid] - before.memory[pid] for pid in before.memory}
    assert max(growth.values()) < GROWTH_KB, growth


def leave_at_once(path: Path) -> None:
    """The manager's health check."""
    connect(path).close()


def leave_in_the_middle(path: Path) -> None:
    """A piece of a request, and gone."""
    with connect(path) as connection:
        connection.send(b"i")


def leave_without_the_answer(path: Path) -> None:
    """A request, and gone before the answer."""
    with connect(path) as connection:
        connection.send(b"id:001")


@pytest.mark.parametrize("leave", [leave_at_once, leave_in_the_middle, leave_without_the_answer])
def test_clients_that_leave_are_forgotten(
    store: Path, tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    with serving(store, tmp_path / "sock") as server:
        flood(server.path, AGENTS, count=2000)
        for _ in range(500):
            leave(server.path)
        assert server.reply("id:001")["error"] == 0
        until(lambda: sum(Footprint(server).files.values()) < 100, "the files to be closed")
        before = Footprint(server)
        for _ in range(3000):
            leave(server.path)
        assert server.reply("id:001")["error"] == 0
        until(lambda: Footprint(server).files == before.files, "the files to be closed")
        after = Footprint(server)
    assert after.workers == before.workers
    growth = {pid: after.memory[pid] - before.memory[pid] for pid in before.memory}
    assert max(growth.values()) < GROWTH_KB, growth


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_changes_of_the_source_leave_nothing_behind(
    stores: Stores, tmp_path: Path, kind: str
) -> None:
    """A database replaced a hundred times: not one of the old ones stays open."""

    def put(generation: int) -> None:
        rows = records(AGENTS, generation)
        if kind == "sqlite":
            stores.sqlite(rows, INDEXED, "next.db").replace(source)
        else:
            stores.csv(rows, "next.csv").replace(source)

    def current(generation: int) -> bool:
        return bool(server.reply("id:001")["data"]["key"] == key(1, generation))

    rows = records(AGENTS)
    source = stores.sqlite(rows, INDEXED) if kind == "sqlite" else stores.csv(rows)
    with serving(source, tmp_path / "sock", "--workers", "1") as server:
        put(1)
        until(lambda: current(1), "generation 1")
        before = Footprint(server)
        rounds = 30 if kind == "sqlite" else 3
        for generation in range(2, rounds):
            put(generation)
            until(lambda: current(generation), "the next generation")  # noqa: B023
        until(lambda: len(server.workers) == 1, "one worker")
        until(
            lambda: sum(Footprint(server).files.values()) <= sum(before.files.values()),
            "the files to be closed",
        )
        after = Footprint(server)
    assert after.memory[server.pid] - before.memory[server.pid] < 4 * GROWTH_KB


# --- the tools of these tests ----------------------------------------------------------------


@pytest.fixture
def rude_server(tmp_path: Path) -> Iterator[Path]:
    """A server that closes every third connection without an answer."""
    path = tmp_path / "rude"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(100)
        listener.settimeout(0.1)
        done = threading.Event()

        def serve() -> None:
            number = 0
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection = listener.accept()[0]
                    with connection:
                        connection.settimeout(5)
                        request = connection.recv(100)
                        number += 1
                        if number % 3:
                            answer = b'{"error": 0, "data": {"id": "%s"}}\n' % request[3:]
                            connection.send(answer.replace(b"}}", b', "key": "k"}}'))

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        done.set()
        thread.join()


def test_load_generators_see_failures(rude_server: Path) -> None:
    """A test that finds no failure proves something only if it would find one."""
    begun = time.monotonic()
    with Load(rude_server, REQUESTS, threads=4) as load:
        until(lambda: len(load.faults) >= 20, "failures")
    assert load.answers >= 20
    if compiled_client() is not None:
        done = flood(rude_server, AGENTS, count=300, threads=MANAGER_THREADS)
        assert done.failures >= 90
        assert done.answers + done.failures == 300
    assert time.monotonic() - begun < 30
