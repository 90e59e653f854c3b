"""What a server does when its source changes, moves, breaks or comes back while it serves.

Every agent's key tells the generation of the store that it is from (`serving.key`), so that an
old, a new, a half and a mixed-up answer can be told from each other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SCRIPT, Stores
from manager import read_json
from serving import (
    INDEXED,
    Load,
    Server,
    agent_answered,
    any_answer,
    check_log,
    key,
    records,
    serve_command,
    serving,
    until,
)

AGENTS = 300
REQUESTS = [f"id:{number:03d}" for number in range(1, AGENTS + 1)]
ADOPTED = 5.0  # seconds in which a change must have been taken over; the promise is one or two
LOAD_SECONDS = 4.0
STEP = 0.2  # seconds between two writes of a file that is rewritten slowly
STANDS = 1.0  # seconds that a text file must have stood unchanged


def generation_of(answer: bytes, generations: int = 1000) -> int:
    """The generation that an answer for an agent is from; -1 where it holds no whole key."""
    data = (read_json(answer) or {}).get("data") or {"id": "0", "key": ""}
    number = int(data["id"])
    for generation in range(generations):
        if data["key"] == key(number, generation):
            return generation
    return -1


def wait_generation(server: Server, generation: int, limit: float = ADOPTED) -> None:
    """Wait until the server answers from this generation; every answer until then has a key."""

    def current() -> bool:
        answer = server.ask("id:001")
        assert agent_answered("id:001", answer) == ""
        return generation_of(answer) == generation

    until(current, f"generation {generation}", limit)


def wait_error(server: Server, error: int, limit: float = ADOPTED) -> None:
    """Wait until the server answers with this error number."""
    until(lambda: server.reply("id:001")["error"] == error, f"error {error}", limit)


# --- commits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["delete", "wal", "truncate"])
def test_commit_shows_in_the_next_answer(stores: Stores, tmp_path: Path, journal: str) -> None:
    source = stores.sqlite(records(5), INDEXED)
    with (
        contextlib.closing(sqlite3.connect(source, isolation_level=None)) as writer,
        serving(source, tmp_path / "sock") as server,
    ):
        writer.execute(f"PRAGMA journal_mode = {journal}")
        writer.execute("PRAGMA synchronous = OFF")
        for generation in range(1, 100):
            new = key(1, generation)
            writer.execute("UPDATE agent SET agent_key = ? WHERE id = '001'", (new,))
            assert server.reply("id:001")["data"]["key"] == new
            assert server.reply("ip:10.0.0.1")["data"]["key"] == new


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_new_and_deleted_agents_show_in_the_next_answer(
    stores: Stores, tmp_path: Path, journal: str
) -> None:
    source = stores.sqlite(records(5), INDEXED)
    with (
        contextlib.closing(sqlite3.connect(source, isolation_level=None)) as writer,
        serving(source, tmp_path / "sock") as server,
    ):
        writer.execute(f"PRAGMA journal_mode = {journal}")
        for number in range(100, 130):
            row = (str(number), "new", f"10.9.9.{number}", key(number))
            assert server.reply(f"id:{number}")["error"] == 4
            writer.execute("INSERT INTO agent VALUES (?, ?, ?, ?)", row)
            assert server.reply(f"id:{number}")["error"] == 0
            assert server.reply(f"ip:10.9.9.{number}")["error"] == 0
            writer.execute("DELETE FROM agent WHERE id = ?", (str(number),))
            assert server.reply(f"id:{number}")["error"] == 4


def test_what_is_not_committed_does_not_show(stores: Stores, tmp_path: Path) -> None:
    source = stores.sqlite(records(5), INDEXED)
    with (
        contextlib.closing(sqlite3.connect(source, isolation_level=None)) as writer,
        serving(source, tmp_path / "sock") as server,
    ):
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE agent SET agent_key = 'secret'")
        assert server.reply("id:001")["data"]["key"] == key(1)
        writer.execute("ROLLBACK")
        assert server.reply("id:001")["data"]["key"] == key(1)


def test_writer_under_load(stores: Stores, tmp_path: Path) -> None:
    """A writer that commits all the time: not one answer fails, every key is whole."""
    source = stores.sqlite(records(AGENTS), INDEXED)
    with (
        contextlib.closing(sqlite3.connect(source, isolation_level=None, timeout=30)) as writer,
        serving(source, tmp_path / "sock") as server,
    ):
        writer.execute("PRAGMA synchronous = OFF")
        with Load(server.path, REQUESTS, threads=8) as load:
            for generation in range(1, 30):
                rows = [(record.key, record.id) for record in records(AGENTS, generation)]
                writer.execute("BEGIN")
                writer.executemany("UPDATE agent SET agent_key = ? WHERE id = ?", rows)
                writer.execute("COMMIT")
                load.wait_answers(20)
        assert not load.faults, load.faults[:5]
        assert generation_of(server.ask("id:001")) == 29


# --- a database replaced by mv ---------------------------------------------------------------


def replace(stores: Stores, path: Path, generation: int, count: int = AGENTS) -> None:
    """Put the next generation of an SQLite store in its place, as `mv` does."""
    stores.sqlite(records(count, generation), INDEXED, "next.db").replace(path)


def test_replaced_database_is_picked_up_within_a_second(stores: Stores, tmp_path: Path) -> None:
    source = stores.sqlite(records(AGENTS), INDEXED)
    with serving(source, tmp_path / "sock") as server:
        for generation in (1, 2, 3):
            replace(stores, source, generation)
            wait_generation(server, generation, 1.0 + 2.0)
            settled = [generation_of(server.ask(request)) for request in REQUESTS[:50]]
        until(
            lambda: {generation_of(server.ask(request)) for request in REQUESTS[:20]} == {3},
            "every worker at generation 3",
            3,
        )
        assert set(settled) <= {2, 3}
        assert server.matching("source|replaced|changed|reopen")
        check_log(server, [key(1, generation) for generation in range(4)])


def test_link_that_leads_elsewhere_is_picked_up(stores: Stores, tmp_path: Path) -> None:
    """`--db` names a symbolic link, and a deployment turns it to the next release."""
    first = stores.sqlite(records(5), INDEXED, "first.db")
    second = stores.sqlite(records(5, 1), INDEXED, "second.db")
    link = stores.folder / "current.db"
    link.symlink_to(first)
    with serving(link, tmp_path / "sock") as server:
        wait_generation(server, 0)
        (stores.folder / "turned").symlink_to(second)
        (stores.folder / "turned").replace(link)
        wait_generation(server, 1)


class Timeline:
    """When each generation was put in place, to tell whether an answer was too old."""

    def __init__(self) -> None:
        """Generation 0 is there from the start."""
        self.replaced_at: list[float] = []
        self.answers: list[tuple[float, str, bytes]] = []
        self._lock = threading.Lock()

    def judge(self, request: str, answer: bytes) -> str:
        """Keep the answer for later, and give its fault, if it has one at once."""
        with self._lock:
            self.answers.append((time.monotonic(), request, answer))
        return agent_answered(request, answer)

    def stale(self, grace: float) -> list[str]:
        """Answers from a generation that had been replaced for longer than GRACE seconds."""
        newest, faults = len(self.replaced_at), []
        for when, request, answer in self.answers:
            generation = generation_of(answer, newest + 1)
            if generation < 0:
                faults.append(f"{request}: no whole key: {answer!r}")
            elif generation < newest and when > self.replaced_at[generation] + grace:
                faults.append(f"{request}: generation {generation} of {newest} is too old")
        return faults


def test_replaced_again_and_again_under_full_load(stores: Stores, tmp_path: Path) -> None:
    """Not one answer fails, and none comes from a database long gone."""
    source = stores.sqlite(records(AGENTS), INDEXED)
    timeline = Timeline()
    with serving(source, tmp_path / "sock") as server:
        with Load(server.path, REQUESTS, timeline.judge) as load:
            ends = time.monotonic() + LOAD_SECONDS
            for generation in itertools.count(1):
                replace(stores, source, generation)
                timeline.replaced_at.append(time.monotonic())
                load.wait_answers(10)
                if time.monotonic() > ends:
                    break
        assert not load.faults, load.faults[:5]
        assert load.answers > 1000
        wait_generation(server, len(timeline.replaced_at))
        assert not server.matching("(error|warning):|died")
        server.stop()
    faults = timeline.stale(1.0 + 2.0)
    assert not faults, (len(faults), faults[:5])


def test_replaced_by_another_kind(stores: Stores, tmp_path: Path) -> None:
    """Told apart by content: the same path may hold a CSV next, which is read when it stands."""
    source = stores.sqlite(records(5), INDEXED, "agents")
    with serving(source, tmp_path / "sock") as server:
        wait_generation(server, 0)
        for generation, make in ((1, stores.csv), (2, stores.sqlite), (3, stores.keys)):
            make(records(5, generation), name="next").replace(source)
            until(
                lambda: generation_of(server.ask("id:001")) == generation,  # noqa: B023
                f"generation {generation}",
                ADOPTED,
            )
        assert not server.matching("internal|traceback|died")


# --- text sources ----------------------------------------------------------------------------


def make_text(stores: Stores, kind: str, generation: int, name: str = "") -> Path:
    """A text source of AGENTS agents in this generation."""
    rows = records(AGENTS, generation)
    if kind == "csv":
        return stores.csv(rows, name or "agents.csv")
    return stores.keys(rows, name or "client.keys")


def settle(path: Path) -> None:
    """Make a file look as if it had stood for an hour, before the server starts."""
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


@pytest.mark.parametrize("kind", ["csv", "keys"])
def test_replaced_text_file_is_adopted(stores: Stores, tmp_path: Path, kind: str) -> None:
    """The old content answers until the new one has stood for a second."""
    source = make_text(stores, kind, 0)
    settle(source)
    with serving(source, tmp_path / "sock") as server:
        wait_generation(server, 0)
        for generation in (1, 2):
            made = make_text(stores, kind, generation, "next")
            replaced = time.monotonic()
            made.replace(source)
            wait_generation(server, generation)
            assert time.monotonic() - replaced > 0.5 * STANDS
        until(
            lambda: {generation_of(server.ask(request)) for request in REQUESTS[:20]} == {2},
            "every worker at generation 2",
            3,
        )
        server.stop()
        assert server.matching("source|changed|loaded|reload")
        check_log(server, [key(1, generation) for generation in range(3)])


@pytest.mark.parametrize("kind", ["csv", "keys"])
def test_file_rewritten_slowly_in_place_never_yields_half_a_key(
    stores: Stores, tmp_path: Path, kind: str
) -> None:
    """While it is written, truncated and growing, the old content goes on answering."""
    source = make_text(stores, kind, 0)
    settle(source)
    content = make_text(stores, kind, 1, "next").read_bytes()
    pieces = 10
    cuts = [len(content) * k // pieces + 3 for k in range(1, pieces)]  # in the middle of a line
    with serving(source, tmp_path / "sock") as server:
        timeline = Timeline()
        with Load(server.path, REQUESTS, timeline.judge, threads=4) as load:
            gaps = rewrite_slowly(source, content, cuts)
            written = time.monotonic()
            wait_generation(server, 1)
        assert not load.faults, load.faults[:5]
        generations = [(when, generation_of(a, 2)) for when, _, a in timeline.answers]
        assert {generation for _, generation in generations} == {0, 1}
        if max(gaps) < 0.8 * STANDS:  # else this machine was so slow that the half file stood
            assert all(generation == 0 for when, generation in generations if when < written)


def pause() -> None:
    """Let some time pass between two writes, as a slow writer does."""
    time.sleep(STEP)


def rewrite_slowly(path: Path, content: bytes, cuts: list[int]) -> list[float]:
    """Write CONTENT over a file in pieces that end at CUTS; the seconds between the pieces."""
    gaps, last = [], time.monotonic()
    with path.open("wb", buffering=0) as stream:
        for start, end in itertools.pairwise([0, *cuts, len(content)]):
            stream.write(content[start:end])
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            pause()
    return gaps


def test_appended_agent_is_adopted(stores: Stores, tmp_path: Path) -> None:
    """As the manager itself does with client.keys."""
    source = make_text(stores, "keys", 0)
    settle(source)
    with serving(source, tmp_path / "sock") as server:
        assert server.reply("id:700")["error"] == 4
        with source.open("a") as stream:
            stream.write(f"700 appended 10.7.0.0 {key(700)}\n")
        until(lambda: server.reply("id:700")["error"] == 0, "the appended agent", ADOPTED)
        stream_text = source.read_text().replace("\n700 appended", "\n700 !appended")
        source.write_text(stream_text)
        until(lambda: server.reply("id:700")["error"] == 4, "the removal", ADOPTED)


@pytest.mark.parametrize("kind", ["csv", "keys"])
def test_text_file_replaced_under_full_load(stores: Stores, tmp_path: Path, kind: str) -> None:
    """Taking a new content over costs nobody an answer."""
    source = make_text(stores, kind, 0)
    settle(source)
    timeline = Timeline()
    with serving(source, tmp_path / "sock") as server:
        with Load(server.path, REQUESTS, timeline.judge) as load:
            for generation in (1, 2, 3):
                make_text(stores, kind, generation, "next").replace(source)
                timeline.replaced_at.append(time.monotonic())
                wait_generation(server, generation, 15)
        assert not load.faults, load.faults[:5]
        assert not server.matching("(error|warning):|died")
        assert server.stop() < 4
    assert not timeline.stale(15)


def test_large_text_file_is_adopted_without_a_pause(stores: Stores, tmp_path: Path) -> None:
    """100,000 agents take a while to read; meanwhile the old ones answer."""
    count = 100_000
    source = stores.csv(records(count))
    settle(source)
    with serving(source, tmp_path / "sock") as server:
        with Load(server.path, REQUESTS, threads=4) as load:
            load.wait_answers(200)
            stores.csv(records(count, 1), "next.csv").replace(source)
            wait_generation(server, 1, 30)
        assert not load.faults, load.faults[:5]
        assert load.slowest < 2
        assert agent_answered("id:100000", server.ask("id:100000")) == ""


def test_text_file_that_changes_on_and_on(stores: Stores, tmp_path: Path) -> None:
    """It never stands for a second: the old content answers, no answer fails."""
    source = make_text(stores, "keys", 0)
    settle(source)
    with serving(source, tmp_path / "sock") as server:
        with Load(server.path, REQUESTS, threads=4) as load:
            for number in range(15):
                with source.open("a") as stream:
                    stream.write(f"{800 + number} late 10.8.0.{number} {key(number)[:20]}")
                pause()
        assert not load.faults, load.faults[:5]


# --- a source that goes away -----------------------------------------------------------------


def unlink(path: Path) -> None:
    """Deleted."""
    path.rename(path.with_name("away"))


def open_to_all(path: Path) -> None:
    """Writable by everybody: not to be trusted any more."""
    path.chmod(0o666)


def garbage(path: Path) -> None:
    """Replaced by something that is no key source."""
    path.rename(path.with_name("away"))
    path.with_name("noise").write_bytes(bytes(range(256)) * 64)
    path.with_name("noise").replace(path)


def a_folder(path: Path) -> None:
    """Replaced by a folder."""
    path.rename(path.with_name("away"))
    path.mkdir()


def restore(path: Path) -> None:
    """The source as it was, in its place again."""
    away = path.with_name("away")
    if away.exists():
        if path.is_dir():
            path.rmdir()
        away.replace(path)
    path.chmod(0o600)


@pytest.mark.parametrize("kind", ["sqlite", "csv", "keys"])
@pytest.mark.parametrize("break_it", [unlink, open_to_all, garbage, a_folder])
def test_source_that_goes_away_is_error_2_and_recovers(
    stores: Stores, tmp_path: Path, kind: str, break_it: Callable[[Path], None]
) -> None:
    """Keys that were withdrawn are not handed out from memory. Logged once; recovers by itself."""
    if kind == "sqlite":
        source = stores.sqlite(records(AGENTS), INDEXED)
    else:
        source = make_text(stores, kind, 0)
    source.chmod(0o600)
    settle(source)
    with serving(source, tmp_path / "sock") as server:
        assert server.reply("id:001")["error"] == 0
        break_it(source)
        wait_error(server, 2)
        until(
            lambda: {server.reply(request)["error"] for request in REQUESTS[:20]} == {2},
            "error 2 from every worker",
            3,
        )
        with Load(server.path, REQUESTS, any_answer, threads=8) as load:
            load.wait_answers(500)
        assert not load.faults, load.faults[:5]
        restore(source)
        wait_error(server, 0)
        until(
            lambda: {server.reply(request)["error"] for request in REQUESTS[:20]} == {0},
            "an answer from every worker",
            3,
        )
        server.stop()
        check_log(server, [key(1)])
    assert_logged_once(server)


def assert_logged_once(server: Server) -> None:
    """One line tells that the source is gone; others may sum up how often it was asked for."""
    about = server.matching(r" (warning|error): .*(cannot read|source)")
    summed_up = [line for line in about if re.search(r"\d+ (more|times)|repeated", line)]
    assert len(about) - len(summed_up) == 1, about[:10]
    assert len(summed_up) <= 4, about[:10]


def test_source_no_longer_readable(stores: Stores, open_folder: Path, nobody: int) -> None:
    """An unprivileged server, and a source whose mode is taken away."""
    python = shutil.which("python3", path=os.defpath)
    if python is None:
        pytest.skip("no Python that another user may run")
    source = Path(shutil.copy(stores.sqlite(records(5), INDEXED), open_folder))
    script = Path(shutil.copy(SCRIPT, open_folder))
    for path in (open_folder, source):
        os.chown(path, nobody, nobody)
    command = serve_command(source, open_folder / "sock", python=python)
    command[1] = str(script)
    server = Server(command, open_folder / "sock", user=nobody, group=nobody, extra_groups=[])
    try:
        server.wait_ready()
        assert server.reply("id:001")["error"] == 0
        source.chmod(0)
        wait_error(server, 2)
        source.chmod(0o600)
        wait_error(server, 0)
        server.stop()
    finally:
        server.kill()


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_source_deleted_and_put_back_under_load(stores: Stores, tmp_path: Path, kind: str) -> None:
    """Nobody hangs, nobody is closed without an answer, no worker dies."""
    rows = records(AGENTS)
    source = stores.sqlite(rows, INDEXED) if kind == "sqlite" else stores.csv(rows)
    settle(source)
    with serving(source, tmp_path / "sock") as server:
        with Load(server.path, REQUESTS, any_answer) as load:
            for _ in range(2):
                unlink(source)
                wait_error(server, 2)
                restore(source)
                wait_error(server, 0)
        assert not load.faults, load.faults[:5]
        assert load.slowest < 8
        assert not server.matching("died|internal|traceback")


def test_table_dropped_and_made_again(stores: Stores, tmp_path: Path) -> None:
    """The file stays, the schema changes."""
    source = stores.sqlite(records(5), INDEXED)
    with (
        contextlib.closing(sqlite3.connect(source, isolation_level=None)) as writer,
        serving(source, tmp_path / "sock") as server,
    ):
        wait_generation(server, 0)
        writer.execute("ALTER TABLE agent RENAME TO hidden")
        wait_error(server, 2)
        writer.execute("ALTER TABLE hidden RENAME TO agent")
        wait_error(server, 0)
