"""`--import` makes the store, all of it or nothing, and a running server takes it over."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import KEY, UNTYPED_SCHEMA, Caller, Record, Stores
from serving import Load, Server, records, serving, until

LIMIT = 120.0  # seconds for one import, on the slowest machine
ROWS = "SELECT id, name, ip, agent_key FROM agent ORDER BY id"
GOOD = (
    Record("001", "my_agent", "192.168.1.100", KEY),
    Record("002", "laptop", "any", "k" * 127),
    Record("003", "office", "10.20.30.0/24", "a key with spaces"),
    Record("004", "gateway", "10.20.0.1/16", 'quote " and back\\slash'),
    Record("005", "web-v6", "2001:db8::10", "semi;colon,comma"),
    Record("12345678", "A.b_c-9", "2001:db8:1::/48", "~"),
)
OLD = (Record("900", "the-old-store", "172.16.0.1", "0ld-key"),)
HEADER = "id,name,ip,key\n"


class Run(NamedTuple):
    """How a call of the script ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it told on stderr, by line."""
        return self.err.splitlines()


def command(ask: Caller, store: Path, file: str | Path, *options: str) -> list[str]:
    """The words of an import."""
    return [*ask.command("exec"), "--db", str(store), *options, "--import", str(file)]


def importing(ask: Caller, store: Path, file: str | Path, *options: str, **how: Any) -> Run:
    """Import FILE into the STORE as cron does, without a terminal."""
    text = how.pop("input", None)
    content = text.encode() if isinstance(text, str) else text
    done = subprocess.run(
        command(ask, store, file, *options),
        input=b"" if content is None else content,
        capture_output=True,
        timeout=LIMIT,
        env={"PATH": ask.path},
        cwd=how.pop("cwd", ask.folder),
        check=False,
        **how,
    )
    run = Run(done.returncode, done.stdout.decode("ascii"), done.stderr.decode("ascii"))
    assert "Traceback" not in run.err
    assert KEY not in run.err
    assert run.out == ""
    return run


def refused(ask: Caller, store: Path, file: str | Path, *options: str, **how: Any) -> Run:
    """Import FILE, which must fail and leave the store and its folder as they are."""
    before = snapshot(store)
    run = importing(ask, store, file, *options, **how)
    assert run.status == 1, run
    assert run.lines, "the exit status tells nobody why"
    assert snapshot(store) == before
    return run


def accepted(ask: Caller, store: Path, file: str | Path, *options: str, **how: Any) -> Run:
    """Import FILE, which must go well and leave nothing but the store."""
    run = importing(ask, store, file, *options, **how)
    assert run.status == 0, run
    assert litter(store) == set()
    return run


def litter(store: Path) -> set[str]:
    """The files beside the store that have to do with it."""
    return {name for name in os.listdir(store.parent) if name != store.name}


def snapshot(store: Path) -> tuple[Any, ...]:
    """What must not change: the bytes of the store, and all that `stat` tells of it."""
    if not store.exists():
        return ()
    seen = store.stat()
    return store.read_bytes(), seen.st_mode, seen.st_uid, seen.st_gid, seen.st_ino, seen.st_mtime_ns


def rows(store: Path) -> list[tuple[Any, ...]]:
    """The agents in the store, by id; the database must be sound."""
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return database.execute(ROWS).fetchall()


def expected(records: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The agents as `rows` gives them."""
    return sorted(tuple(record) for record in records)


def by_tab(rows: Sequence[Sequence[str]]) -> str:
    """What `mysql --batch` writes of rows that are already escaped."""
    return "id\tname\tip\tagent_key\n" + "".join("\t".join(row) + "\n" for row in rows)


def sql_script(rows: Sequence[Sequence[str]]) -> str:
    """An SQL script with these agents."""
    quoted = (", ".join("'{}'".format(field.replace("'", "''")) for field in row) for row in rows)
    return "CREATE TABLE agent (id TEXT, name TEXT, ip TEXT, agent_key TEXT);\n" + "".join(
        f"INSERT INTO agent VALUES ({row});\n" for row in quoted
    )


Make = Callable[[Stores], Path]
KINDS: dict[str, Make] = {
    "client.keys": lambda stores: stores.keys(GOOD),
    "csv": lambda stores: stores.csv(GOOD),
    "sqlite": lambda stores: stores.sqlite(GOOD, name="source.db"),
    "sql": lambda stores: stores.text(sql_script(GOOD), "source.sql"),
    "tab": lambda stores: stores.text(
        by_tab([[field.replace("\\", "\\\\") for field in row] for row in GOOD]), "source.tsv"
    ),
}
REQUESTS = (
    *(("id", record.id) for record in GOOD),
    ("id", "006"),
    ("ip", "192.168.1.100"),
    ("ip", "10.20.30.99"),
    ("ip", "10.20.31.99"),
    ("ip", "2001:0DB8:0:0::10"),
    ("ip", "2001:db8:1:2::3"),
    ("ip", "8.8.8.8"),
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the store shall be: alone in its folder, and not there yet."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder / "agents.db"


@pytest.fixture
def old_store(ask: Caller, stores: Stores, store: Path) -> Path:
    """A store with one old agent, which an import shall replace."""
    accepted(ask, store, stores.csv(OLD, "old.csv"))
    return store


# --- what is imported --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_store_holds_exactly_what_the_source_holds(
    ask_each: Caller, stores: Stores, store: Path, kind: str
) -> None:
    """From each kind of source, under each interpreter, first into nothing, then over it."""
    source = KINDS[kind](stores)
    accepted(ask_each, store, source)
    assert rows(store) == expected(GOOD)
    accepted(ask_each, store, stores.csv(OLD, "other.csv"))
    assert rows(store) == expected(OLD)
    accepted(ask_each, store, source)
    assert rows(store) == expected(GOOD)


@pytest.mark.parametrize("kind", KINDS)
def test_store_answers_like_its_source(
    ask: Caller, stores: Stores, store: Path, kind: str
) -> None:
    """Byte for byte."""
    source = KINDS[kind](stores)
    accepted(ask, store, source)
    for request in REQUESTS:
        assert ask(*request, db=store).output == ask(*request, db=source).output, request


@pytest.mark.parametrize("kind", ["client.keys", "csv", "tab", "sql"])
def test_standard_input(ask: Caller, stores: Stores, store: Path, kind: str) -> None:
    """`-` takes every kind of text."""
    accepted(ask, store, "-", input=KINDS[kind](stores).read_bytes())
    assert rows(store) == expected(GOOD)


def test_store_has_the_indexes_of_the_sample(ask: Caller, stores: Stores, store: Path) -> None:
    """The same as a database from sample.db.sql, in columns that a request asks for."""
    accepted(ask, store, stores.csv(GOOD))

    def indexes(path: Path) -> set[str]:
        with contextlib.closing(sqlite3.connect(path)) as database:
            query = "SELECT name FROM sqlite_master WHERE type = 'index'"
            return {name for (name,) in database.execute(query)}

    assert indexes(store) >= indexes(stores.indexed())
    with contextlib.closing(sqlite3.connect(store)) as database:
        columns = [column[1] for column in database.execute("PRAGMA table_info(agent)")]
    assert columns[:4] == ["id", "name", "ip", "agent_key"]


def test_comments_and_removed_agents_stay_behind(
    ask: Caller, stores: Stores, store: Path
) -> None:
    """MANAGER.md, "client.keys": removed agents keep their line, and an id may come again."""
    text = (
        "# a comment\n"
        " 001 indented any key\n"
        "001 !removed any old\n"
        "001 #removed any older\n"
        "001 my_agent 192.168.1.100 the key\n"
        "002 !gone 10.0.0.1 old\n"
    )
    accepted(ask, store, stores.text(text, "client.keys"))
    assert rows(store) == [("001", "my_agent", "192.168.1.100", "the key")]


def test_a_fresh_managers_empty_client_keys(ask: Caller, stores: Stores, old_store: Path) -> None:
    """It holds no agents, so then does the store."""
    accepted(ask, old_store, stores.text("", "client.keys"))
    assert rows(old_store) == []
    assert ask("id", "900", db=old_store).error == 4


def test_eaten_zeros_numbers_and_padding(ask: Caller, stores: Stores, store: Path) -> None:
    """The store has the id that the manager knows, or a request for it would find nothing."""
    accepted(ask, store, stores.csv([("1", "a", "", "k"), ("02", "b", " ANY ", " k ")]))
    assert [ask("id", number, db=store).error for number in ("001", "002")] == [0, 0]
    assert ask("id", "002", db=store).data["key"] == "k"
    numbers = [(3, "c", None, b"blob"), (1000, "d   ", "10.0.0.0/255.255.255.0", "k")]
    accepted(ask, store, stores.sqlite(numbers, UNTYPED_SCHEMA, "numbers.db"))
    assert ask("id", "003", db=store).data == {"id": "003", "name": "c", "ip": "any", "key": "blob"}
    assert ask("id", "1000", db=store).data["ip"] == "10.0.0.0/24"
    assert ask("ip", "10.0.0.77", db=store).data["name"] == "d"


def test_mysql_batch_escapes(ask: Caller, store: Path) -> None:
    """`mysql --batch` writes a backslash as two, and NULL for null."""
    text = by_tab([["001", "a", "NULL", "back\\\\slash"], ["002", "b", "any", "\\\\t\\\\n\\\\0"]])
    accepted(ask, store, "-", input=text)
    assert ask("id", "001", db=store).data["ip"] == "any"
    assert ask("id", "001", db=store).data["key"] == "back\\slash"
    assert ask("id", "002", db=store).data["key"] == "\\t\\n\\0"


@pytest.mark.parametrize("escape", ["\\t", "\\n", "\\0"])
def test_mysql_batch_escapes_of_what_no_key_may_hold(
    ask: Caller, old_store: Path, escape: str
) -> None:
    """They are control characters, and a newline would be an agent that nobody enrolled."""
    text = by_tab([["001", "a", "any", "fine"], ["002", "b", "any", f"x{escape}y"]])
    run = refused(ask, old_store, "-", input=text)
    assert_findings(run, ["line 3"])


def test_names_of_files_are_not_taken_for_urls_or_options(
    ask: Caller, stores: Stores, store: Path
) -> None:
    """Any name that a file can have."""
    for name in ("a b.csv", "50%.csv", "what?.csv", "ü.csv", "#1.csv"):
        accepted(ask, store, stores.csv(GOOD, name))
        assert rows(store) == expected(GOOD)
        strange = store.parent / "sub" / name
        strange.parent.mkdir(exist_ok=True)
        run = importing(ask, strange, stores.csv(GOOD))
        assert run.status == 0, run
        assert rows_of_any_name(strange) == expected(GOOD)
        shutil.rmtree(strange.parent)


def rows_of_any_name(path: Path) -> list[tuple[Any, ...]]:
    """As `rows`, for a path that is no URI."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute(ROWS).fetchall()


def test_environment_names_the_store(ask: Caller, stores: Stores, store: Path) -> None:
    """Without --db it is $AGENT_KEY_DB, as for a request."""
    source = stores.csv(GOOD)
    done = subprocess.run(
        [*ask.command(), "--import", source],
        env={"PATH": ask.path, "AGENT_KEY_DB": str(store)},
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert rows(store) == expected(GOOD)


# --- all or nothing ----------------------------------------------------------------------------


def assert_findings(run: Run, places: Sequence[str]) -> None:
    """Each place has a line on stderr that begins with it, as often as listed, and in order."""
    found = [re.match(r"(?:agent_key_request: )?(?:\w+: )?((?:line|row) \d+):", line)
             for line in run.lines]
    assert [match[1] for match in found if match] == list(places), run.err


RULES = {
    "no id": ("", "a", "any", "k"),
    "the manager's own id": ("000", "a", "any", "k"),
    "an id of nine digits": ("123456789", "a", "any", "k"),
    "an id with letters": ("12a", "a", "any", "k"),
    "no name": ("001", "", "any", "k"),
    "a name with a space": ("001", "my agent", "any", "k"),
    "a name like a removed agent's": ("001", "!a", "any", "k"),
    "a name of 129 bytes": ("001", "a" * 129, "any", "k"),
    "a name beyond ASCII": ("001", "ä", "any", "k"),
    "an address that is none": ("001", "a", "10.0.0.256", "k"),
    "a prefix that is none": ("001", "a", "10.0.0.0/33", "k"),
    "a host name": ("001", "a", "host.example", "k"),
    "no key": ("001", "a", "any", ""),
    "a key of 129 bytes": ("001", "a", "any", "k" * 129),
    "a key beyond ASCII": ("001", "a", "any", "kß"),
}


@pytest.mark.parametrize("rule", RULES)
def test_record_that_breaks_a_rule(
    ask: Caller, stores: Stores, old_store: Path, rule: str
) -> None:
    """It is named by its line, and nothing is imported."""
    run = refused(ask, old_store, stores.csv([*GOOD[1:], RULES[rule], OLD[0]]))
    assert_findings(run, [f"line {len(GOOD) + 1}"])
    run = refused(ask, old_store, stores.sqlite([*GOOD[1:], RULES[rule]], name="source.db"))
    assert_findings(run, [f"row {len(GOOD)}"])
    assert rows(old_store) == expected(OLD)


OWNED_TWICE = {
    "the same id": (("007", "a", "any", "k"), ("007", "b", "any", "k")),
    "the same id without its zeros": (("007", "a", "any", "k"), ("7", "b", "any", "k")),
    "the same name": (("007", "same", "any", "k"), ("008", "same", "any", "k")),
}
SAME_ADDRESS = [
    ("10.9.9.9", "10.9.9.9"),
    ("10.9.9.9", " 10.9.9.9 "),
    ("10.9.9.9", "10.9.9.9/32"),
    ("10.9.9.9", "10.9.9.9/255.255.255.255"),
    ("10.9.9.9", "::ffff:10.9.9.9"),
    ("10.9.9.9", "::FFFF:a09:909"),
    ("10.9.9.0/24", "10.9.9.0/24"),
    ("10.9.9.5/24", "10.9.9.0/24"),
    ("10.9.9.5/24", "10.9.9.6/24"),
    ("10.9.9.0/24", "10.9.9.7/255.255.255.0"),
    ("::ffff:10.9.9.0/120", "10.9.9.0/24"),
    ("fe80::1", "FE80::1"),
    ("fe80::1", "fe80:0:0:0:0:0:0:1"),
    ("fe80::1", "fe80::0001/128"),
    ("2001:db8:9::/48", "2001:DB8:9:1::5/48"),
]
OWNED_TWICE.update(
    (f"{one} and {other}", (("007", "a", one, "k"), ("008", "b", other, "k")))
    for one, other in SAME_ADDRESS
)


@pytest.mark.parametrize("what", OWNED_TWICE)
@pytest.mark.parametrize("apart", ["next to each other", "far apart"])
def test_what_only_one_agent_may_have(
    ask: Caller, stores: Stores, old_store: Path, what: str, apart: str
) -> None:
    """The second owner is named by its line, and nothing is imported."""
    one, other = OWNED_TWICE[what]
    between = GOOD if apart == "far apart" else ()
    run = refused(ask, old_store, stores.csv([one, *between, other]))
    assert_findings(run, [f"line {len(between) + 3}"])
    run = refused(ask, old_store, stores.text(
        by_tab([one, *[[field.replace("\\", "\\\\") for field in row] for row in between], other]),
        "source.tsv"))
    assert_findings(run, [f"line {len(between) + 3}"])
    assert rows(old_store) == expected(OLD)


def test_what_many_agents_may_have(ask: Caller, stores: Stores, store: Path) -> None:
    """`any`, the same key, an address inside another's network, networks inside networks."""
    agents = [
        ("001", "a", "any", "k"),
        ("002", "b", "", "k"),
        ("003", "c", "ANY", "k"),
        ("004", "d", "10.0.0.0/8", "k"),
        ("005", "e", "10.0.0.0/16", "k"),
        ("006", "f", "10.0.0.0", "k"),
        ("007", "g", "10.0.0.0/24", "k"),
        ("008", "h", "::/64", "k"),
        ("009", "i", "::", "k"),
    ]
    accepted(ask, store, stores.csv(agents))
    assert len(rows(store)) == len(agents)


def test_every_fault_is_listed(ask: Caller, stores: Stores, old_store: Path) -> None:
    """One run tells them all: a person repairs the file once."""
    agents = [
        ("001", "one", "10.0.0.1", KEY),  # line 2
        ("002", "two two", "10.0.0.2", KEY),
        ("003", "three", "10.0.0.3", KEY),
        ("001", "four", "10.0.0.4", KEY),  # line 5
        ("005", "three", "10.0.0.5", KEY),
        ("006", "six", "10.0.0.300", KEY),
        ("007", "seven", "10.0.0.1", KEY),  # line 8
        ("008", "eight", "10.0.0.8", ""),
    ]
    run = refused(ask, old_store, stores.csv(agents))
    listed = re.findall(r"^(?:agent_key_request: )?(?:\w+: )?line (\d+):", run.err, re.MULTILINE)
    assert sorted(set(listed), key=int) == ["3", "5", "6", "7", "8", "9"]
    assert "agent 002" in run.err and "agent 008" in run.err


def test_one_record_with_two_faults(ask: Caller, stores: Stores, old_store: Path) -> None:
    """Both are told."""
    run = refused(ask, old_store, stores.csv([("001", "my agent", "10.0.0.256", "k")]))
    told = "\n".join(line for line in run.lines if "line 2" in line)
    assert "name" in told and "ip" in told


def test_line_numbers_are_those_of_the_file(ask: Caller, stores: Stores, old_store: Path) -> None:
    """Blank lines, comments and quoted line breaks count, as an editor counts them."""
    text = f"# a comment\n001 a any {KEY}\n\n002 !gone any k\n003 bad name any\n"
    run = refused(ask, old_store, stores.text(text, "client.keys"))
    assert_findings(run, ["line 5"])
    text = 'note,id,name,ip,key\r\n"two\r\nlines",001,a,any,k\r\n,002,b b,any,k\r\n'
    run = refused(ask, old_store, stores.text(text, "notes.csv"))
    assert_findings(run, ["line 4"])


def test_key_in_the_wrong_column_is_not_told(ask: Caller, stores: Stores, store: Path) -> None:
    """A shifted file has keys where names and ids should be; the finding must not quote them."""
    header, secret = "key,id,name,ip\n", "S3cr3t" * 9
    text = header + f"001,a,any,{secret}\n{secret},{secret},{secret},{secret}\n"
    run = refused(ask, store, stores.text(text, "shifted.csv"))
    assert secret not in run.err


@pytest.mark.parametrize("cut", [1, 8, 20, 40, 70])
def test_standard_input_that_ends_within_a_line(ask: Caller, old_store: Path, cut: int) -> None:
    """The program that wrote it has died: half a key is a key, too, but not this agent's."""
    text = by_tab([["001", "a", "10.0.0.1", KEY], ["002", "b", "10.0.0.2", KEY]])
    refused(ask, old_store, "-", input=text[:-cut])
    keys = f"001 a 10.0.0.1 {KEY}\n002 b 10.0.0.2 {KEY}\n"
    refused(ask, old_store, "-", input=keys[:-cut])


def test_standard_input_that_says_nothing(ask: Caller, old_store: Path) -> None:
    """`mysql` that cannot connect writes nothing: that is not a table without agents."""
    refused(ask, old_store, "-", input="")


def test_standard_input_closed(ask: Caller, old_store: Path) -> None:
    """As some cron daemons start their jobs."""
    before = snapshot(old_store)
    words = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command(ask, old_store, "-")]
    done = subprocess.run(
        words, env={"PATH": ask.path}, capture_output=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 1
    assert done.stderr and b"Traceback" not in done.stderr
    assert snapshot(old_store) == before


UNREADABLE: dict[str, Callable[[Stores], Path]] = {
    "missing": lambda stores: stores.folder / "nowhere.csv",
    "a folder": lambda stores: stores.folder,
    "empty": lambda stores: stores.text("", "empty.csv"),
    "not a key source": lambda stores: stores.text("Dear all,\nplease find attached\n", "a.txt"),
    "binary": lambda stores: stores.text(bytes(range(256)) * 50, "a.bin"),
    "a CSV without keys": lambda stores: stores.text("id,name,ip\n001,a,any\n", "a.csv"),
    "a script without agents": lambda stores: stores.text(
        "CREATE TABLE other (id TEXT);\n", "other.sql"
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_file(ask: Caller, stores: Stores, old_store: Path, what: str) -> None:
    """One line that says why."""
    run = refused(ask, old_store, UNREADABLE[what](stores))
    assert len(run.lines) == 1, run.err


def test_truncated_database(ask: Caller, stores: Stores, old_store: Path) -> None:
    """As an interrupted copy leaves it."""
    source = stores.sqlite(records(5000), name="source.db")
    os.truncate(source, source.stat().st_size // 2)
    refused(ask, old_store, source)


def test_file_that_one_may_not_read(
    ask: Caller, stores: Stores, open_folder: Path, nobody: int
) -> None:
    """The store is the user's own, the source is root's."""
    store = open_folder / "agents.db"
    assert importing(ask, store, stores.csv(OLD, "old.csv")).status == 0
    os.chown(store, nobody, -1)
    os.chown(open_folder, nobody, -1)
    secret = open_folder / "secret.csv"
    shutil.copy(stores.csv(GOOD), secret)
    secret.chmod(0o600)
    script = open_folder / "script.py"
    shutil.copy(ask.command()[0], script)
    run = subprocess.run(
        ["/bin/sh", script, "--db", store, "--import", secret],
        user=nobody, group=nobody, extra_groups=[], env={"PATH": os.defpath},
        cwd="/", capture_output=True, text=True, timeout=LIMIT, check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert "ermission" in run.stderr
    assert rows(store) == expected(OLD)


def test_store_that_is_no_database(ask: Caller, stores: Stores, tmp_path: Path) -> None:
    """A mistyped --db must not cost a manager its client.keys."""
    folder = tmp_path / "etc"
    folder.mkdir()
    keys = folder / "client.keys"
    keys.write_text("001 a any k\n")
    run = refused(ask, keys, stores.csv(GOOD))
    assert run.lines[-1].endswith(f"SQLite file of {keys}, which is none")  # before it reads FILE


def test_store_in_a_folder_that_is_not_there(ask: Caller, stores: Stores, tmp_path: Path) -> None:
    """It is not made: the path is mistyped."""
    run = importing(ask, tmp_path / "nowhere" / "agents.db", stores.csv(GOOD))
    assert run.status == 1 and len(run.lines) == 1
    assert not (tmp_path / "nowhere").exists()


# --- at any moment -----------------------------------------------------------------------------

MANY = 60_000
MOMENTS = [step / 12 for step in range(13)]


@pytest.fixture
def many(stores: Stores) -> Path:
    """A file that takes a while to import."""
    return stores.csv(records(MANY), "many.csv")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment(
    ask: Caller, old_store: Path, stores: Stores, many: Path, number: signal.Signals
) -> None:
    """The store is the old one or, at the very end, the new one; and the next run clears up."""
    old = old_store.read_bytes()
    trial = old_store.parent.parent / "trial" / "agents.db"
    trial.parent.mkdir()
    started = time.monotonic()
    accepted(ask, trial, many)
    whole = time.monotonic() - started
    for moment in MOMENTS:
        process = subprocess.Popen(
            command(ask, old_store, many), env={"PATH": ask.path}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(whole * moment)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.communicate(timeout=LIMIT)
        assert process.returncode in (0, 1, -number), (moment, process.returncode)
        if old_store.read_bytes() != old:
            assert len(rows(old_store)) == MANY, moment
        assert ask("id", "001", db=old_store).error in (0, 4)
        accepted(ask, old_store, stores.csv(OLD, "old.csv"))
        assert rows(old_store) == expected(OLD)


def test_old_store_answers_all_the_while(ask: Caller, old_store: Path, many: Path) -> None:
    """Nothing of the import is seen before it is complete, and no lock is in the way."""
    process = subprocess.Popen(command(ask, old_store, many), env={"PATH": ask.path})
    seen = []
    while process.poll() is None:
        seen.append((ask("id", "900", db=old_store).error, ask("id", "001", db=old_store).error))
    assert process.returncode == 0
    assert all(0 in pair and set(pair) <= {0, 4} for pair in seen), seen
    assert seen.count((0, 4)) >= 1
    assert ask("id", "001", db=old_store).error == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(ask: Caller, stores: Stores, many: Path, small_disk: Path) -> None:
    """It is told, nothing is lost, and what has been written goes away again."""
    store = small_disk / "agents.db"
    accepted(ask, store, stores.csv(OLD, "old.csv"))
    run = refused(ask, store, many)
    assert len(run.lines) == 1 and "full" in run.err
    accepted(ask, store, stores.csv(GOOD))
    assert rows(store) == expected(GOOD)


def test_limit_of_a_files_size(ask: Caller, stores: Stores, old_store: Path, many: Path) -> None:
    """The same for those who are not root, where writing fails in another way."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    refused(ask, old_store, many, preexec_fn=limit)
    accepted(ask, old_store, stores.csv(GOOD))
    assert rows(old_store) == expected(GOOD)


def test_folder_that_one_may_not_write(
    ask: Caller, stores: Stores, open_folder: Path, nobody: int
) -> None:
    """The old store stays, and the reason is told."""
    store, source, script = (open_folder / name for name in ("agents.db", "new.csv", "script.py"))
    assert importing(ask, store, stores.csv(OLD, "old.csv")).status == 0
    shutil.copy(ask.command()[0], script)
    shutil.copy(stores.csv(GOOD), source)
    source.chmod(0o644)
    before = snapshot(store)
    run = subprocess.run(
        ["/bin/sh", script, "--db", store, "--import", source],
        user=nobody, group=nobody, extra_groups=[], env={"PATH": os.defpath},
        cwd="/", capture_output=True, text=True, timeout=LIMIT, check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert len(run.stderr.splitlines()) == 1
    assert snapshot(store) == before


def test_writer_that_dies_within_the_pipe(ask: Caller, old_store: Path) -> None:
    """It is killed while it writes: `mysql | agent_key_request.py --import -`."""
    before = snapshot(old_store)
    process = subprocess.Popen(
        command(ask, old_store, "-"), env={"PATH": ask.path}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    text = by_tab(list(records(20_000)))
    half = text.rindex("\n", 0, len(text) // 2) + 30
    out, err = process.communicate(text[:half].encode(), timeout=LIMIT)
    assert (process.returncode, out) == (1, b"")
    assert err
    assert snapshot(old_store) == before


def test_two_at_once_do_not_mix(ask: Caller, stores: Stores, store: Path) -> None:
    """The store is of the one or of the other, whatever order they come in."""
    sources = [stores.csv(records(20_000, turn), f"{turn}.csv") for turn in (0, 1)]
    contents = [expected(tuple(records(20_000, turn))) for turn in (0, 1)]
    for _ in range(4):
        processes = [
            subprocess.Popen(
                command(ask, store, source), env={"PATH": ask.path},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for source in sources
        ]
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=LIMIT)
            assert out == "" and "Traceback" not in err
            assert (process.returncode, bool(err)) in ((0, False), (1, True)), err
            ended.append(process.returncode)
        assert 0 in ended
        content = rows(store)
        assert content in [contents[turn] for turn in (0, 1) if ended[turn] == 0]
        assert litter(store) == set()


def test_dead_imports_leavings_are_in_nobodys_way(
    ask: Caller, stores: Stores, old_store: Path
) -> None:
    """What `kill -9` left is cleared, whatever is in it; a link there is not followed."""
    beside = Path(f"{old_store}.import")
    for content in (b"", b"SQLite format 3\0" + b"\xff" * 5000):
        beside.write_bytes(content)
        Path(f"{beside}-journal").write_bytes(content)
        accepted(ask, old_store, stores.csv(GOOD))
        assert rows(old_store) == expected(GOOD)
    victim = old_store.parent.parent / "victim"
    victim.write_text("precious")
    beside.symlink_to(victim)
    run = importing(ask, old_store, stores.csv(OLD, "old.csv"))
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(victim.stat().st_mode) != 0o600 or run.status == 1
    assert rows(old_store) in (expected(OLD), expected(GOOD))
    assert not old_store.is_symlink()


# --- the file and its neighbours ---------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_new_store_is_private(ask: Caller, stores: Stores, store: Path, umask: int) -> None:
    """Keys are secrets: mode 0600 whatever the umask."""
    accepted(ask, store, stores.csv(GOOD), umask=umask)
    assert stat.S_IMODE(store.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o440])
def test_mode_of_the_old_store_is_kept(
    ask: Caller, stores: Stores, old_store: Path, mode: int
) -> None:
    """Whoever could read it, and nobody else."""
    old_store.chmod(mode)
    accepted(ask, old_store, stores.csv(GOOD), umask=0o027)
    assert stat.S_IMODE(old_store.stat().st_mode) == mode


def test_owner_of_the_old_store_is_kept(
    ask: Caller, stores: Stores, old_store: Path, nobody: int
) -> None:
    """A root's cron job refreshes a store that belongs to another user."""
    os.chown(old_store, nobody, nobody)
    old_store.chmod(0o640)
    accepted(ask, old_store, stores.csv(GOOD))
    seen = old_store.stat()
    assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (nobody, nobody, 0o640)


def test_nothing_readable_by_others_while_it_is_built(
    ask: Caller, store: Path, many: Path
) -> None:
    """Neither the new database nor a journal of it, at any moment."""
    process = subprocess.Popen(
        command(ask, store, many), env={"PATH": ask.path}, umask=0, stdin=subprocess.DEVNULL
    )
    seen: dict[str, int] = {}
    while process.poll() is None:
        for entry in os.scandir(store.parent):
            with contextlib.suppress(FileNotFoundError):
                mode = entry.stat().st_mode
                seen[entry.name] = seen.get(entry.name, 0) | stat.S_IMODE(mode) & 0o177
    assert process.returncode == 0
    assert seen, "nothing was there to be seen before it was complete"
    assert not any(seen.values()), seen


def test_link_to_the_store_stays_a_link(
    ask: Caller, stores: Stores, old_store: Path, tmp_path: Path
) -> None:
    """The database is replaced where it is."""
    link = tmp_path / "linked" / "agents.db"
    link.parent.mkdir()
    link.symlink_to("../store/agents.db")
    run = importing(ask, link, stores.csv(GOOD))
    assert run.status == 0, run
    assert link.is_symlink()
    assert rows(old_store) == expected(GOOD)
    assert litter(old_store) == set() and litter(link) == set()


def test_dangling_link(ask: Caller, stores: Stores, store: Path, tmp_path: Path) -> None:
    """The store is made where the link leads to."""
    link = tmp_path / "agents.db"
    link.symlink_to(store)
    assert importing(ask, link, stores.csv(GOOD)).status == 0
    assert link.is_symlink() and rows(store) == expected(GOOD)


def write_wal(path: Path, close: bool) -> sqlite3.Connection:
    """Put a store into WAL mode, with agents that are in the WAL only."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA wal_autocheckpoint = 0")
    database.execute("BEGIN")
    database.executemany("INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)",
                         [(f"{number}", f"wal-{number}", "any", "k" * 100)
                          for number in range(1000, 3000)])
    database.execute("COMMIT")
    if close:
        database.close()
    return database


def crash_copy(path: Path) -> None:
    """Leave the store with its WAL as a writer does that was killed: nobody has it open."""
    names = [Path(f"{path}{tail}") for tail in ("", "-wal")]
    database = write_wal(path, close=False)
    contents = [name.read_bytes() for name in names]
    database.close()
    for name, content in zip(names, contents, strict=True):
        name.write_bytes(content)


def test_old_store_with_a_dead_writers_wal(ask: Caller, stores: Stores, old_store: Path) -> None:
    """SQLite would play the old WAL into the new database: it must not survive the move."""
    crash_copy(old_store)
    assert Path(f"{old_store}-wal").stat().st_size > 10_000
    refused(ask, old_store, stores.csv([("x", "x", "x", "x")], "bad.csv"))
    assert len(rows(old_store)) == 2001
    accepted_rows_after_import(ask, stores, old_store)


def accepted_rows_after_import(ask: Caller, stores: Stores, store: Path) -> None:
    """The import goes well and its agents are the only ones, for every later reader."""
    run = importing(ask, store, stores.csv(GOOD))
    assert run.status == 0, run
    assert rows(store) == expected(GOOD)
    assert ask("id", "1000", db=store).error == 4
    with contextlib.closing(sqlite3.connect(store)) as database:  # a writer recovers, too
        database.execute("UPDATE agent SET name = name")
        database.commit()
    assert rows(store) == expected(GOOD)


def test_old_store_with_a_live_wal_writer(ask: Caller, stores: Stores, old_store: Path) -> None:
    """The writer has it open and writes on after the move: not into the new database."""
    writer = write_wal(old_store, close=False)
    run = importing(ask, old_store, stores.csv(GOOD))
    if run.status == 1:  # to refuse is safe as well
        assert run.lines and len(rows(old_store)) == 2001
        writer.close()
        accepted_rows_after_import(ask, stores, old_store)
        return
    with contextlib.suppress(sqlite3.Error):
        writer.execute("INSERT INTO agent (id, name) VALUES ('4000', 'late')")
    with contextlib.suppress(sqlite3.Error):
        writer.close()
    assert rows(old_store) == expected(GOOD)
    assert ask("id", "001", db=old_store).error == 0


def test_old_store_with_a_hot_journal(ask: Caller, stores: Stores, old_store: Path) -> None:
    """A writer was killed within a transaction: its journal would be rolled into the new one."""
    filled = [Record(str(number), f"old-{number}", "any", "k" * 100)
              for number in range(1000, 6000)]
    accepted(ask, old_store, stores.csv(filled, "filled.csv"))
    journal = Path(f"{old_store}-journal")
    writer = sqlite3.connect(old_store, isolation_level=None)
    writer.execute("PRAGMA cache_size = 5")
    writer.execute("BEGIN")
    writer.execute("UPDATE agent SET agent_key = 'changed'")
    contents = [path.read_bytes() for path in (old_store, journal)]
    writer.execute("ROLLBACK")
    writer.close()
    for path, content in zip((old_store, journal), contents, strict=True):
        path.write_bytes(content)
    assert contents[1][:8] == b"\xd9\xd5\x05\xf9 \xa1c\xd7"  # it is a journal that SQLite would play  # noqa: E501
    run = importing(ask, old_store, stores.csv(GOOD))
    assert run.status == 0, run
    assert rows(old_store) == expected(GOOD)
    assert not journal.exists()


def test_synced_before_it_is_moved(ask: Caller, stores: Stores, old_store: Path) -> None:
    """A power cut right after the move must not leave an empty store."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    trace = old_store.parent.parent / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2"
    words = [strace, "-f", "-y", "-o", str(trace), "-e", "trace=" + calls,
             *command(ask, old_store, stores.csv(GOOD))]
    done = subprocess.run(words, env={"PATH": ask.path}, capture_output=True, check=False)
    if not trace.exists() or "ptrace" in done.stderr.decode():
        pytest.skip("strace may not trace here")
    lines = trace.read_text().splitlines()
    moved = [number for number, line in enumerate(lines)
             if "rename" in line and f'{old_store.name}"' in line and line.endswith("= 0")]
    assert len(moved) == 1, lines
    synced = [number for number, line in enumerate(lines)
              if re.search(r"f(data)?sync\(\d+<[^>]*agents\.db\.[^>]*>", line)]
    assert synced and synced[0] < moved[0], lines
    folder = [number for number, line in enumerate(lines)
              if re.search(rf"fsync\(\d+<{re.escape(str(old_store.parent))}>", line)]
    assert folder and folder[-1] > moved[0], lines


# --- what it tells -----------------------------------------------------------------------------


def test_silent_in_cron(ask: Caller, stores: Stores, store: Path, many: Path) -> None:
    """Cron mails whatever is printed."""
    for source in (stores.csv(GOOD), many):
        assert importing(ask, store, source) == Run(0, "", "")


def test_verbose(ask: Caller, stores: Stores, store: Path) -> None:
    """The last line says how many."""
    run = accepted(ask, store, stores.csv(GOOD), "-v")
    assert re.fullmatch(rf"(?:agent_key_request: )?(?:info: )?{len(GOOD)} agents imported into "
                        + re.escape(str(store)), run.lines[-1]), run.err


class Terminal:
    """What a program writes to a terminal, as it comes."""

    def __init__(self, words: Sequence[str], path: str, **how: Any) -> None:
        """Start the program with its stderr on a terminal."""
        self.seen = b""
        master, slave = pty.openpty()
        self.process = subprocess.Popen(words, env={"PATH": path}, stderr=slave, **how)
        os.close(slave)
        self._reader = threading.Thread(target=self._read, args=(master,))
        self._reader.start()

    def _read(self, master: int) -> None:
        with contextlib.suppress(OSError):  # EIO: the last writer has gone
            while piece := os.read(master, 4096):
                self.seen += piece
        os.close(master)

    def wait(self) -> str:
        """Wait for the end, and give the text."""
        self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return self.seen.decode("ascii")


def test_terminal(ask: Caller, stores: Stores, store: Path) -> None:
    """A short import tells a person how many agents, and no more."""
    terminal = Terminal(command(ask, store, stores.csv(GOOD)), ask.path)
    assert f"{len(GOOD)} agents imported into {store}" in terminal.wait()
    assert terminal.process.returncode == 0
    assert terminal.seen.count(b"\n") == 1


def test_progress_on_a_terminal(ask: Caller, store: Path) -> None:
    """When it takes longer than a second, there is something to see before the end."""
    terminal = Terminal(command(ask, store, "-"), ask.path, stdin=subprocess.PIPE)
    assert terminal.process.stdin is not None
    terminal.process.stdin.write(HEADER.encode())
    agents = iter(records(5_000_000))
    sent = 0
    deadline = time.monotonic() + 30
    while not terminal.seen and time.monotonic() < deadline:
        for _ in range(500):
            line = ",".join(next(agents)) + "\n"
            terminal.process.stdin.write(line.encode())
            sent += 1
        time.sleep(0.02)  # the pace of a slow sender
    assert re.search(rb"\d", terminal.seen), "no progress to be seen"
    terminal.process.stdin.close()
    text = terminal.wait()
    assert terminal.process.returncode == 0
    assert re.split(r"[\r\n]+", text.strip())[-1].endswith(f"{sent} agents imported into {store}")


def test_one_agent_is_not_agents(ask: Caller, stores: Stores, store: Path) -> None:
    """The number is right for none and one, too."""
    assert "1 agent" in accepted(ask, store, stores.csv(OLD), "-v").err
    run = accepted(ask, store, stores.text("", "client.keys"), "-v")
    assert "0 agents" in run.err


# --- a running server --------------------------------------------------------------------------


def test_running_server_takes_it_over_without_one_failed_answer(
    ask: Caller, stores: Stores, store: Path, open_folder: Path
) -> None:
    """Under load, five times; and the new keys are handed out without any signal."""
    count = 3000
    sources = [stores.csv(records(count, turn), f"{turn}.csv") for turn in range(6)]
    keys = [{record.id: record.key for record in records(count, turn)} for turn in range(6)]
    accepted(ask, store, sources[0])
    requests = [f"id:{number:03d}" for number in range(1, count, 7)]
    with serving(store, open_folder / "s") as server, Load(server.path, requests) as load:
        for turn in range(1, 6):
            before = load.answers
            accepted(ask, store, sources[turn])
            wait_for(server, load, keys[turn]["002"], before + 200)
        load.stop()
        assert load.faults == []


def wait_for(server: Server, load: Load, key: str, answers: int) -> None:
    """Wait until agent 002 has this key, and there were that many answers."""
    until(lambda: server.reply("id:002")["data"]["key"] == key, "the new keys")
    until(lambda: load.answers > answers, "requests meanwhile")


# --- speed -------------------------------------------------------------------------------------

MILLION = 1_000_000


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    kilobytes: int


def measured(words: Sequence[str | Path], path: str, **how: Any) -> Cost:
    """Run a command that must go well; memory is that of its biggest process by the kernel."""
    started = time.monotonic()
    process = subprocess.Popen(words, env={"PATH": path}, **how)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    return Cost(time.monotonic() - started, peak)


def peak_of(pid: int) -> int:
    """VmHWM in kB. (ru_maxrss would count this test's own memory, from before the exec.)"""
    with contextlib.suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        if match:
            return int(match[1])
    return 0


def test_a_million_agents(ask: Caller, stores: Stores, store: Path, tmp_path: Path) -> None:
    """At most 4 times what sqlite3's own .import takes, side by side, in at most 150 MB."""
    sqlite = shutil.which("sqlite3")
    if sqlite is None:
        pytest.skip("sqlite3 is not installed")
    source = stores.csv(records(MILLION), "million.csv")
    accepted(ask, store, stores.csv(OLD, "old.csv"))
    schema = subprocess.run([sqlite, store, ".schema"], capture_output=True, text=True, check=True)
    own, theirs = [], []
    for turn in range(2):
        other = tmp_path / f"theirs{turn}.db"
        script = f"{schema.stdout}\n.import --csv --skip 1 {source} agent\n"
        prepared = tmp_path / "script"
        prepared.write_text(script)
        with prepared.open() as stream:
            theirs.append(measured([sqlite, other], ask.path, stdin=stream))
        assert count_of(other) == MILLION
        own.append(measured(command(ask, store, source), ask.path, stdin=subprocess.DEVNULL))
        assert count_of(store) == MILLION
        other.unlink()
    ratio = min(cost.seconds for cost in own) / min(cost.seconds for cost in theirs)
    print(f"own {own}, sqlite3 {theirs}: {ratio:.2f} times")
    assert ratio <= 4, (own, theirs)
    assert max(cost.kilobytes for cost in own) <= 150 * 1024, own
    assert ask("id", "999999", db=store).error == 0
    assert ask("ip", "10.15.66.63", db=store).data["id"] == "999999"


def count_of(path: Path) -> int:
    """How many agents a database has."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        count: int = database.execute("SELECT count(*) FROM agent").fetchone()[0]
        return count


def test_a_million_faults_are_not_all_kept(ask: Caller, stores: Stores, old_store: Path) -> None:
    """A file that is wrong in every line costs no more memory than a good one."""
    source = stores.text(HEADER + "001,a b,any,k\n" * 300_000, "bad.csv")
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            command(ask, old_store, source), env={"PATH": ask.path}, stderr=nowhere
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.01)
    assert process.returncode == 1
    assert peak <= 150 * 1024
    assert rows(old_store) == expected(OLD)


def test_two_at_once_leave_each_others_files(ask: Caller, stores: Stores, store: Path) -> None:
    """The one that is refused must not clear away what the other is building."""
    accepted(ask, store, stores.csv(OLD, "old.csv"))
    slow = subprocess.Popen(
        command(ask, store, "-"), env={"PATH": ask.path}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert slow.stdin is not None
    slow.stdin.write(HEADER.encode() + b"001,a,any,k\n")
    slow.stdin.flush()
    beside = Path(f"{store}.import")
    until(beside.exists, "the file that it builds")
    run = importing(ask, store, stores.csv(GOOD))
    assert run.status == 1 and "another import" in run.err
    assert beside.exists()
    out, err = slow.communicate(b"002,b,any,k\n", timeout=LIMIT)
    assert (slow.returncode, out, err) == (0, b"", b"")
    assert len(rows(store)) == 2
    assert litter(store) == set()


def test_standard_input_without_an_agent(ask: Caller, old_store: Path) -> None:
    """A header alone is what a client leaves that dies after it."""
    run = refused(ask, old_store, "-", input=by_tab([]))
    assert "no agent" in run.err


def test_folder_that_is_not_there_is_named_as_given(ask: Caller, stores: Stores) -> None:
    """Not as an error number of the interpreter's."""
    run = importing(ask, stores.folder / "nowhere" / "a.db", stores.csv(GOOD))
    assert run.status == 1
    assert "nowhere/a.db" in run.err and "Errno" not in run.err


@pytest.mark.parametrize("what", ["mode", "owner", "hard link"])
def test_somebody_elses_file_does_not_become_the_store(
    ask: Caller, stores: Stores, store: Path, nobody: int, what: str
) -> None:
    """It could be read, or written to, by whoever put it there."""
    beside, link = Path(f"{store}.import"), store.parent.parent / "link"
    beside.write_text("left here")
    if what == "mode":
        beside.chmod(0o666)
    elif what == "owner":
        os.chown(beside, nobody, nobody)
    else:
        link.hardlink_to(beside)
    accepted(ask, store, stores.csv(GOOD))
    seen = store.stat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_nlink) == (0o600, os.geteuid(), 1)
    assert not link.exists() or link.read_text() == "left here"


def test_no_time_passes_between_an_old_wal_and_the_move(
    ask: Caller, stores: Stores, old_store: Path
) -> None:
    """A writer that came in between would leave a WAL that is played into the new store."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    crash_copy(old_store)
    trace = old_store.parent.parent / "trace"
    words = [strace, "-y", "-o", str(trace), "-e", "trace=fsync,rename,unlink",
             *command(ask, old_store, stores.csv(GOOD))]
    done = subprocess.run(words, env={"PATH": ask.path}, capture_output=True, check=False)
    if not trace.exists() or "ptrace" in done.stderr.decode():
        pytest.skip("strace may not trace here")
    calls = [line for line in trace.read_text().splitlines() if "agents.db" in line]
    moved = next(place for place, line in enumerate(calls) if line.startswith("rename"))
    before = [line.partition("(")[0] for line in calls[:moved]]
    assert "fsync" in before and before[-1] == "unlink", calls
    assert not any("fsync" in line and ".import" in line
                   for line in calls[before.index("unlink"):]), calls
    assert rows(old_store) == expected(GOOD)
