"""What `--import` makes of its source: which agents, which faults, what it tells about them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KEY, PLAIN_SCHEMA, Caller, Record, Stores, script
from importing import (
    GOOD,
    KINDS,
    OLD,
    SECRET,
    SHARED_NETWORKS,
    TWICE,
    UNREADABLE,
    Child,
    Said,
    answer,
    beside,
    faults,
    forked,
    imported,
    refused,
    rows,
    tabs,
    waits_for_input,
)
from serving import records, until
from terminal import Terminal


def lines(*texts: str, end: str = "\n") -> str:
    """A text of these lines, the last of which has no end."""
    return end.join(texts)


REQUESTS = [
    *(["id", record.id] for record in GOOD),
    ["id", "006"],
    *(["ip", ip] for ip in ("192.168.1.100", "10.20.30.99", "10.20.31.99", "2001:DB8:0::10")),
    *(["ip", ip] for ip in ("2001:db8:1:2::3", "8.8.8.8")),
]


NO_END = {
    "csv": (2, lines("id,name,ip,key", "001,a,any,k")),
    "csv, within an address": (3, lines("id,name,ip,key", "001,a,any,k", "002,b,10.0.0.1")),
    "csv, a key that ends with a letter": (2, lines("id,name,ip,key", "001,a,any,X")),
    "csv, a header only": (1, "id,name,ip,key"),
    "csv, comments before the header": (
        5,
        lines("\ufeff# a", "", "# b", "id;name;ip;key", "001;a;any;k"),
    ),
    "csv, a header only, after comments": (3, lines("# a", "", "id,name,ip,key")),
    "csv, \\r\\n": (4, lines("id,name,ip,key", "", "", "001,a,any,k", end="\r\n")),
    "tabs": (3, lines("id\tname\tip\tkey", "001\ta\tany\tk", "002\tb\tany\tk")),
    "client.keys": (2, lines("001 a any k", "002 b any k")),
    "client.keys, one line": (1, "001 a any k"),
    "client.keys, blank lines": (5, lines("# a", "", "001 a any k", "", "002 b any k")),
    "client.keys, a removed agent": (2, lines("001 a any k", "002 !b any k")),
    "client.keys, a comment": (2, lines("001 a any k", "# b")),
    "spaces": (3, lines("id,name,ip,key", "001,a,any,k", " ")),
}


# Name of the file (none for a database), its content, and what is told besides.
NO_AGENTS = {
    "a fresh client.keys": ("client.keys", "", ""),
    "comments": ("client.keys", "# nobody yet\n", ""),
    "a removed agent": (
        "client.keys",
        "001 !gone any k\n",
        "; 1 removed agent of client.keys skipped",
    ),
    "a header": ("agents.csv", "id,name,ip,key\n", ""),
    "empty rows of a spreadsheet": ("agents.csv", "id,name,ip,key\n,,,\n,,,\n", ""),
    "psql -t": (
        "agents.txt",
        " 001 | a | any | k\n 002 | b | any | k\n",
        "; 2 lines that begin with a space skipped",
    ),
    "a script": ("agents.sql", PLAIN_SCHEMA + ";", ""),
    "a table": ("", "", ""),
}
CANONICAL = [  # #: the number of the agent
    ("", "any"),
    ("ANY", "any"),
    ("0.0.0.0/0", "any"),
    (" 10.#.0.5 ", "10.#.0.5"),
    ("10.#.0.5/32", "10.#.0.5"),
    ("10.#.0.5/24", "10.#.0.0/24"),
    ("10.#.0.5/255.255.0.0", "10.#.0.0/16"),
    ("::ffff:10.#.0.5", "10.#.0.5"),
    ("::FFFF:10.#.0.5/120", "10.#.0.0/24"),
    ("2001:DB8:#:0::0001", "2001:db8:#::1"),
    ("2001:db8:#::1/128", "2001:db8:#::1"),
    ("2001:db8:#:2::3/48", "2001:db8:#::/48"),
    ("2001:db8:0:#::1", "2001:db8:0:#::1"),
    ("2001:db8:0:#::1", "2001:db8:0:#::1"),
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Give the place of the store: alone in its folder, and not there yet."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder / "agents.db"


@pytest.fixture
def old_store(stores: Stores, store: Path) -> Path:
    """Make a store with one old agent, which an import shall replace."""
    imported(store, stores.csv(OLD, "old.csv"))
    return store


# ---------------------------------------------------------------- what is imported


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_holds_what_the_source_holds(stores: Stores, store: Path, kind: str) -> None:
    """First into nothing, then over another; and the answers are the source's."""
    source = KINDS[kind](stores)
    imported(store, source)
    assert rows(store) == GOOD
    imported(store, stores.csv(OLD, "other.csv"))
    assert rows(store) == OLD
    imported(store, source)
    assert rows(store) == GOOD
    for words in REQUESTS:
        assert answer(store, list(words)) == answer(source, list(words)), words


@pytest.mark.parametrize("kind", ["csv", "tabs", "client.keys"])
def test_standard_input(stores: Stores, store: Path, kind: str) -> None:
    imported(store, "-", stdin=KINDS[kind](stores).read_bytes())
    assert rows(store) == GOOD


def test_under_each_interpreter(ask_each: Caller, stores: Stores, store: Path) -> None:
    """A real process, as cron starts it; over a store that is there, too."""
    for agents in (OLD, GOOD):
        words = [*ask_each.command(), "--db", str(store), "--import", str(stores.csv(agents))]
        done = subprocess.run(words, env={"PATH": ask_each.path}, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert rows(store) == agents
    assert beside(store) == {"agents.db.old"}


def test_what_the_store_is(stores: Stores, store: Path) -> None:
    """A table with three plain indexes, marked as an import's work."""
    imported(store, stores.csv(GOOD))
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        query = "SELECT type, name, tbl_name FROM sqlite_master ORDER BY name"
        assert database.execute(query).fetchall() == [
            ("table", "agent", "agent"),
            *(("index", f"agent_{field}", "agent") for field in ("id", "ip", "name")),
        ]
        assert database.execute("PRAGMA application_id").fetchone() == (0x414B5251,)  # for ever
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_addresses_are_written_in_one_spelling(stores: Stores, store: Path) -> None:
    """So that requests find them; and what is not the same is not taken for it."""
    agents = [
        [Record(str(n), f"a{n}", ip.replace("#", str(n)), "k") for ip in ips]
        for n, ips in enumerate(CANONICAL, 100)
    ]
    imported(store, stores.csv([given for given, _ in agents]))
    assert rows(store) == [right for _, right in agents]


def test_ids_and_padding_and_types_are_mended(stores: Stores, store: Path) -> None:
    agents = [
        ("1", "a", None, "k"),
        (" 02 ", " b ", "any", " k "),
        (3, "c", "any", b"blob"),
        (b"004", "d", b"10.0.0.1", "k"),
        (5.0, "e", "any", "7"),
        (1000, "f", "any", "k"),
    ]
    imported(store, stores.untyped(agents))
    assert rows(store) == [
        ("001", "a", "any", "k"),
        ("002", "b", "any", "k"),
        ("003", "c", "any", "blob"),
        ("004", "d", "10.0.0.1", "k"),
        ("005", "e", "any", "7"),
        ("1000", "f", "any", "k"),
    ]


def test_what_many_agents_may_have(stores: Stores, store: Path) -> None:
    """`any`, the same key, an address within a network, networks within networks."""
    ips = [
        "any",
        "",
        "ANY",
        "10.0.0.0/8",
        "10.0.0.0/16",
        "10.0.0.0/24",
        "10.0.0.0",
        "10.0.0.1",
        "2001:db8:0:1::1",
        "2001:db8:0:2::1",
        "64::/64",
        "64::",
    ]
    imported(store, stores.csv([(f"{n:03d}", f"a{n}", ip, "k") for n, ip in enumerate(ips, 1)]))
    assert len(rows(store)) == len(ips)


@pytest.mark.parametrize("case", NO_AGENTS)
def test_a_source_without_agents(stores: Stores, old_store: Path, case: str) -> None:
    """An empty store would answer no request any more, so nobody gets one without a word."""
    name, text, told = NO_AGENTS[case]
    source = stores.text(text, name) if name else stores.sqlite([])
    said = refused(old_store, source)
    assert said.lines == [
        f"agent_key_request: error: {source}: it has no agents{told}, nothing imported, "
        f"{old_store} is as it was"
    ]
    if name.endswith((".keys", ".csv")) and text:
        said = refused(old_store, "-", stdin=text.encode())
        assert f"error: standard input: it has no agents{told}" in said.err


def test_removed_agents_stay_behind(stores: Stores, store: Path) -> None:
    """MANAGER.md: they keep their line, and an id may come again."""
    text = f"# a comment\n 001 a any k\n001 !removed any k\n001 my_agent any {KEY}\n002 #b any k\n"
    imported(store, stores.text(text, "client.keys"))
    assert rows(store) == [("001", "my_agent", "any", KEY)]


NAMES = ["a b", "50%", "what?x=1", "ü", "#1", "a:b", "new\nline", "'", b"\xff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_files(stores: Stores, store: Path, name: str | bytes) -> None:
    """Neither a source's nor a store's is taken for anything but a name."""
    text = os.fsdecode(name)
    strange = store.with_name(text)
    for source in (stores.csv(GOOD, text), stores.sqlite(GOOD, name=text + ".db")):
        imported(strange, source)
        assert rows(strange) == GOOD
        assert answer(strange, ["id", "001"])["error"] == 0


def test_the_source_may_be_the_store(stores: Stores, store: Path) -> None:
    imported(store, stores.csv(GOOD))
    imported(store, store)
    assert rows(store) == GOOD


def test_the_environment_names_the_store(stores: Stores, store: Path) -> None:
    def before() -> None:
        script.posix.environ[b"AGENT_KEY_DB"] = os.fsencode(store)

    assert forked("--import", stores.csv(GOOD), before=before) == Said(0, "", "")
    assert rows(store) == GOOD


# ---------------------------------------------------------------- all or nothing


def test_every_fault_is_told(stores: Stores, old_store: Path) -> None:
    """Line, agent and what is wrong, in one run: a person repairs the file once."""
    agents = [
        ("001", "one", "10.0.0.1", KEY),
        ("0020", "two", "10.0.0.2", KEY),
        ("003", "three three", "10.0.0.3", ""),
        ("004", "four", "10.0.0.256", KEY),
        (SECRET, "five", "any", KEY),
    ]
    rules = [
        (3, "0020", "id"),
        (4, "003", "name"),
        (4, "003", "key"),
        (5, "004", "ip"),
        (6, "with an id of 54 characters", "id"),
    ]
    source = stores.csv(agents)
    said = refused(old_store, source)
    assert faults(said) == [
        f"error: line {line}: agent {agent}: {script.RULES[field]}" for line, agent, field in rules
    ]
    assert said.lines[len(rules) :] == [
        f"agent_key_request: error: {source}: 5 faults (--skip-invalid would import the other "
        f"agents), nothing imported, {old_store} is as it was"
    ]
    said = refused(old_store, stores.untyped(agents))
    assert faults(said) == [
        f"error: row {line - 1}: agent {agent}: {script.RULES[field]}"
        for line, agent, field in rules
    ]
    assert "1 fault (--skip-invalid" in refused(old_store, stores.csv(agents[:2])).err


@pytest.mark.parametrize("count", [99, 100, 101, 350])
def test_the_first_hundred_faults(stores: Stores, old_store: Path, count: int) -> None:
    agents = [(f"{number:03d}", f"bad {number}", "any", "k") for number in range(1, count + 1)]
    said = refused(old_store, stores.csv(agents))
    assert [line.split(":")[1] for line in faults(said)] == [
        f" line {number + 1}" for number in range(1, min(count, 100) + 1)
    ]
    rest = said.lines[min(count, 100) :]
    assert [line for line in rest if "more" in line] == (
        [f"... and {count - 100} more error{'s' * (count > 101)}"] if count > 100 else []
    )
    assert f"{count} fault{'s' * (count > 1)} (" in rest[-1]


def test_faults_of_all_kinds_count_towards_the_hundred(stores: Stores, old_store: Path) -> None:
    agents = [(f"{n:03d}", f"bad {n}" if n < 61 else "same", "any", "k") for n in range(1, 121)]
    said = refused(old_store, stores.csv(agents))
    assert len(faults(said)) == 100 and said.lines[-2] == "... and 19 more errors"
    assert "119 faults" in said.lines[-1]


@pytest.mark.parametrize("field", TWICE)
def test_what_only_one_agent_may_have(stores: Stores, old_store: Path, field: str) -> None:
    """The later one is told, and whose it is already."""
    for one, other in TWICE[field]:
        agents = [Record("800", "a", "10.0.0.1", "k"), *GOOD, Record("801", "b", "10.0.0.2", "k")]
        agents[0] = agents[0]._replace(**{field: one})
        agents[-1] = agents[-1]._replace(**{field: other})
        said = refused(old_store, stores.csv(agents))
        agent = "007" if field == "id" else "801"
        assert faults(said) == [f"error: line 9: agent {agent}: {field} is already that of line 2"]
    said = refused(old_store, stores.sqlite(agents))
    assert faults(said) == [f"error: row 8: agent {agent}: {field} is already that of row 1"]


def test_one_field_of_many_agents(stores: Stores, old_store: Path) -> None:
    """All but the first are told, each with all that it shares."""
    said = refused(old_store, stores.csv([("007", "a", "10.0.0.1", "k")] * 3))
    assert faults(said) == [
        f"error: line {line}: agent 007: {field} is already that of line 2"
        for line in (3, 4)
        for field in ("id", "name", "ip")
    ]


def test_a_clash_with_an_agent_that_clashes(stores: Stores, old_store: Path) -> None:
    """It is told as well: whoever repairs the first fault may keep either of the two."""
    agents = [("001", "a", "any", "k"), ("001", "b", "any", "k"), ("002", "b", "any", "k")]
    assert faults(refused(old_store, stores.csv(agents))) == [
        "error: line 3: agent 001: id is already that of line 2",
        "error: line 4: agent 002: name is already that of line 3",
    ]


@pytest.mark.parametrize(("one", "other", "network"), SHARED_NETWORKS)
def test_agents_may_share_a_network(
    stores: Stores, store: Path, one: str, other: str, network: str
) -> None:
    """The manual of OSSEC has several DHCP agents in one network: this is only a note."""
    agents = [Record("001", "a", one), *GOOD[1:], Record("801", "b", other, "k" * 64)]
    said = imported(store, stores.csv(agents), "-v")
    assert said.lines[0] == (
        f"note: line 2: agent 001: 2 agents have the network {network}: an ip request in it finds "
        "more than one agent"
    )
    assert {row[2] for row in rows(store) if row[0] in ("001", "801")} == {network}


def test_lines_are_counted_as_an_editor_counts(stores: Stores, old_store: Path) -> None:
    text = f"# a comment\n001 a any {KEY}\n\n002 !gone any k\n003 b any\n004 c any k\n"
    said = refused(old_store, stores.text(text, "client.keys"))
    assert {line[:14] for line in faults(said)} == {"error: line 5:"}
    text = "\ufeff\r\n# a comment\r\nid,name,ip,key\r\n\r\n001,a,any,k\r\n002,b b,any,k\r\n"
    said = refused(old_store, stores.text(text, "agents.csv"))
    assert [line[:14] for line in faults(said)] == ["error: line 6:"]


@pytest.mark.parametrize("case", NO_END)
def test_the_last_line_has_no_end(stores: Stores, old_store: Path, case: str) -> None:
    """Who wrote it may have died: half a key is a key, too, but not this agent's."""
    number, text = NO_END[case]
    told = (
        f"line {number} has no end; the file may be half-written; if it is whole, end it with a "
        "newline, nothing imported"
    )
    source = stores.text(text, "client.keys" if "keys" in case else "agents.csv")
    assert told in refused(old_store, source).lines[-1]
    assert told in refused(old_store, source, "--skip-invalid").lines[-1]
    assert told in refused(old_store, "-", stdin=text.encode()).lines[-1]
    if case not in ("spaces", "csv, within an address") and "header only" not in case:
        imported(old_store, stores.text(text + "\n", source.name))


def test_a_script_that_is_cut(stores: Stores, old_store: Path) -> None:
    """Within a statement, even where what is left would be a whole one."""
    row = "('{}', '{}', '{}', '{}')"
    agents = ",\n".join(row.format(*record) for record in OLD + OLD)
    text = f"{PLAIN_SCHEMA};\nINSERT INTO agent (id, name, ip, agent_key) VALUES {agents};\n"
    for size in (len(text) - 20, text.index("'),") + 3, text.index("'),") + 2):
        said = refused(old_store, stores.text(text[:size], "cut.sql"))
        assert "cut.sql: line 2: " in said.err, said


def test_a_dump_that_is_cut_before_its_commit(stores: Stores, old_store: Path) -> None:
    """Each statement has its end, but the tables may not be complete."""
    dump = stores.sql(GOOD).read_text()
    assert dump.startswith("BEGIN TRANSACTION;") and dump.endswith("COMMIT;")
    said = refused(old_store, stores.text(dump[: -len("COMMIT;")], "cut.sql"))
    assert "a transaction without COMMIT" in said.err and len(said.lines) == 1, said


def test_standard_input_is_called_that(stores: Stores, old_store: Path) -> None:
    """Whatever is wrong with it."""
    for text in (
        "",
        "Dear all,\n",
        "id,name,ip\n",
        "id,name,ip,key\n",
        "001 a any k",
        "001 a b\n",
        "001 a any k\n002 a any k\n",
        'id,name,ip,key\n001,"a\n',
    ):
        said = refused(old_store, "-", stdin=text.encode())
        assert "standard input: " in said.lines[-1] and " -: " not in said.lines[-1], said


def test_standard_input_that_is_closed(old_store: Path) -> None:
    """As some start their jobs."""
    refused(old_store, "-", before=lambda: os.close(0))


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_source_that_cannot_be_read(stores: Stores, old_store: Path, what: str) -> None:
    """One line that names it."""
    source = UNREADABLE[what](stores)
    said = refused(old_store, source)
    assert len(said.lines) == 1 and said.err.count(str(source)) == 1
    assert said.err.startswith(f"agent_key_request: error: {source}: ")
    assert said.err.endswith(f", nothing imported, {old_store} is as it was\n")


def test_its_source_is_asked_for_as_long_as_timeout_says(old_store: Path) -> None:
    """10 s, as in a request, unless it says so."""

    def before() -> None:
        def told(name: str, seconds: float) -> None:
            raise script.SourceError(name, f"{seconds:g} s")

        script.open_source = told

    for options, seconds in ((), "10 s"), (("--timeout", "7"), "7 s"):
        assert seconds in refused(old_store, "a.db", *options, before=before).err


def test_all_agents_of_a_source_may_take_longer(stores: Stores, store: Path) -> None:
    """--timeout is for a query; to read a whole file takes as long as it takes."""
    source = stores.indexed(records(5000))
    imported(store, source, "--timeout", "0.001")
    assert len(rows(store)) == 5000
    assert forked("--db", source, "--timeout", "0.001", "--check").status == 0


def test_a_request_may_not_take_longer(stores: Stores) -> None:
    """A check looks for an agent, as a request would."""
    source = stores.sqlite(records(20_000))  # without an index
    said = forked("--db", source, "--timeout", "0.0001", "--check")
    assert said.status == 1 and f"{source}: no answer in time (--timeout)" in said.out


@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_a_pipe_by_its_name(stores: Stores, old_store: Path, name: str) -> None:
    """`--import <(mysql ...)` and `mysql ... | ... --import /dev/stdin` are read as `-` is."""
    for text, status in ((tabs(GOOD), 0), (tabs(GOOD)[:-1], 1), (tabs([]), 1)):
        reader, writer = os.pipe()
        with os.fdopen(writer, "w") as stream:
            stream.write(text)
        said = forked("--db", old_store, "--import", name, stdin=reader)
        os.close(reader)
        assert said.status == status and bool(said.err) == bool(status), said
        assert not status or f"error: {name}: " in said.lines[-1], said
        assert rows(old_store) == GOOD


def test_a_named_pipe(stores: Stores, store: Path, open_folder: Path) -> None:
    """It is read if nobody else can have made it."""
    for folder, is_private in ((stores.folder, True), (open_folder, False)):
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        if not is_private:
            folder.chmod(0o1777)
            assert "everybody may write to the directory" in refused(store, pipe).err
            continue
        writer = threading.Thread(target=pipe.write_text, args=(tabs(GOOD),))
        writer.start()
        imported(store, pipe)
        writer.join()
        assert rows(store) == GOOD


def test_ended_while_it_waits_for_a_pipe(stores: Stores, store: Path) -> None:
    """Nobody opens the other end, and the person gives up."""
    pipe = stores.folder / "pipe"
    os.mkfifo(pipe)
    child = Child("--db", store, "--import", pipe)
    try:
        until(lambda: waits_for_input(child.pid), "it to wait for the pipe")
        os.kill(child.pid, signal.SIGINT)
        said = child.wait()
    finally:
        child.close()
    assert said.err == f"agent_key_request: error: {pipe}: interrupted, nothing imported\n"
    assert not store.exists()


def test_no_driver(old_store: Path) -> None:
    """A request may advise to import the keys. An import may not."""

    def before() -> None:
        script.try_driver = lambda _name: (None, "")

    url = "mysql://reader@localhost/wazuh"
    said = forked("--db", url, "--check", before=before)
    assert "install one of " in said.out and "copy the keys with --import" in said.out
    said = refused(old_store, url, before=before)
    assert f"error: {url}: install one of " in said.err and "--import" not in said.err


def test_two_columns_for_the_key(stores: Stores, old_store: Path) -> None:
    """Which of them a manager has is not ours to decide, not even with --skip-invalid."""
    schema = "CREATE TABLE agent (id, name, ip, agent_key, internal_key)"
    source = stores.sqlite(GOOD, schema)
    header = stores.text("id,name,ip,key,agent_key\n001,a,any,k,k\n", "agents.csv")
    for path in source, header:
        for options in (), ("--skip-invalid",):
            said = refused(old_store, path, *options)
            assert "two columns for the key" in said.err and str(path) in said.err, said


def test_the_table_of_a_manager(stores: Stores, store: Path) -> None:
    """A manager that lost its client.keys still has global.db: row 0 is the manager itself."""
    source = stores.folder / "global.db"
    with contextlib.closing(sqlite3.connect(str(source))) as database:
        database.execute(
            "CREATE TABLE agent (id INTEGER PRIMARY KEY, name, ip, register_ip, internal_key)"
        )
        database.execute("INSERT INTO agent VALUES (0, 'manager', '127.0.0.1', '127.0.0.1', NULL)")
        database.execute("INSERT INTO agent VALUES (7, 'a', '10.0.0.9', 'any', ?)", [KEY])
        database.commit()
    said = imported(store, source, "-v")
    assert rows(store) == [("007", "a", "any", KEY)]
    assert said.lines == [
        f"1 agent imported into {store}; 1 row of the manager itself (id 0) skipped"
    ]


# ---------------------------------------------------------------- --skip-invalid


def test_skip_invalid(stores: Stores, old_store: Path) -> None:
    """The valid agents are imported, the others are listed, and a total follows."""
    agents = [
        Record("001", "a", "10.0.0.1"),
        Record("002", "b b", "10.0.0.256"),
        Record("003", "c", "10.0.0.3"),
    ]
    source = stores.csv(agents)
    assert "--skip-invalid" in refused(old_store, source).lines[-1]
    said = imported(old_store, source, "--skip-invalid")
    assert rows(old_store) == [agents[0], agents[2]]
    assert said.lines == [
        f"error: line 3: agent 002: {script.RULES['name']}",
        f"error: line 3: agent 002: {script.RULES['ip']}",
        "1 invalid record skipped",
    ]
    assert imported(old_store, stores.csv(GOOD), "--skip-invalid") == Said(0, "", "")


@pytest.mark.parametrize("kind", ["csv", "sqlite"])
def test_skip_invalid_keeps_the_first_of_two(stores: Stores, store: Path, kind: str) -> None:
    """Whatever they share; who is left out is in nobody's way, nor is an invalid record."""
    agents = [
        Record("001", "bad name", "10.0.0.1", "k"),
        Record("001", "a", "10.0.0.1", "k"),
        Record("001", "b", "10.0.0.2", "k"),
        Record("002", "b", "10.0.0.3", "k"),
        Record("003", "c", "10.0.0.1/32", "k"),
        Record("004", "b", "10.0.0.1", "k"),
        Record("005", "c", "10.0.0.5", "k"),
    ]
    source = stores.csv(agents) if kind == "csv" else stores.sqlite(agents)
    unit, first = ("line", 2) if kind == "csv" else ("row", 1)
    said = imported(store, source, "--skip-invalid")
    assert rows(store) == [agents[1], agents[3], agents[6]]
    shared = [(2, "001", "id", 1), (4, "003", "ip", 1), (5, "004", "name", 3), (5, "004", "ip", 1)]
    assert faults(said)[1:] == [
        f"error: {unit} {first + place}: agent {agent}: {field} is already that of "
        f"{unit} {first + other}"
        for place, agent, field, other in shared
    ]
    assert said.lines[-1] == "4 invalid records skipped"


def test_skip_invalid_with_nobody_valid(stores: Stores, old_store: Path) -> None:
    said = refused(old_store, stores.csv([("001", "a b", "any", "k")]), "--skip-invalid")
    assert "it has no valid agents, nothing imported" in said.lines[-1]


def test_skip_invalid_tells_how_many(stores: Stores, store: Path) -> None:
    """The list has an end, the total counts records, on a terminal, too."""
    agents = [(f"{n:03d}", "bad name", "10.0.0.256", "k") for n in range(1, 1235)]
    said = imported(store, stores.csv([*agents, ("9999", "a", "any", KEY)]), "--skip-invalid", "-v")
    assert len(faults(said)) == 100 and said.lines[100:] == [
        "... and 2,368 more errors",
        "1,234 invalid records skipped",
        f"1 agent imported into {store}",
    ]


# ---------------------------------------------------------------- what it tells


@pytest.mark.parametrize("count", [1, 2, 1234])
def test_verbose(stores: Stores, store: Path, count: int) -> None:
    said = imported(store, stores.csv(records(count)), "-v")
    assert said.err == f"{count:,} agent{'s' * (count != 1)} imported into {store}\n"


def test_the_summary_tells_what_changed(stores: Stores, store: Path) -> None:
    """Another name, address or key of an id is one change. New and gone agents are told apart."""
    agents = records(2000)
    imported(store, stores.csv(agents))
    changed = [
        agents[0]._replace(name="other"),
        agents[1]._replace(ip="any"),
        agents[2]._replace(key="f" * 64),
        *agents[3:900],
        *(record._replace(id=f"9{record.id}") for record in agents[900:905]),
    ]
    source = stores.keys(changed)
    with source.open("a") as stream:
        stream.write("7777 !gone any k\n7778 !gone any k\n")
    said = imported(store, source, "-v")
    assert said.lines == [
        f"905 agents imported into {store}: 5 new, 3 changed, 1,100 gone; 2 removed agents of "
        "client.keys skipped"
    ]


def test_silence(stores: Stores, store: Path) -> None:
    """Cron mails whatever is printed: nothing is, not even of notes."""
    agents = [*records(3000), Record("8001", "n" * 128, "10.1.0.0/24", "1.5E+10")]
    source = stores.csv([*agents, Record("8002", "b", "10.1.0.0/24", "short")])
    assert imported(store, source) == Said(0, "", "")


def test_notes(stores: Stores, store: Path) -> None:
    """Somebody who looks is told what a check would tell, too."""
    agents = [
        ("001", "n" * 128, "any", KEY),
        ("002", "b", "any", SECRET[:50].ljust(128, "k")),
        ("003", "c", "any", "6.75E+63"),
        ("004", "d", "any", KEY.upper()),
        ("005", "e", "any", "2,5E+10"),
        ("006", "f", "any", "2E+F1"),
        ("007", "g", "any", "9a-E+2"),
    ]
    said = imported(store, stores.csv(agents), "-v")
    reads = "has 128 characters; the manager reads 127 back"
    number = "key looks like a number that a spreadsheet changed"
    assert said.lines == [
        f"note: line 2: agent 001: name {reads}",
        f"note: line 3: agent 002: key {reads}",
        f"note: line 4: agent 003: {number}",
        f"note: line 6: agent 005: {number}",
        "note: 5 keys are not 64 hex digits; that is allowed",
        f"7 agents imported into {store}",
    ]
    assert "note: 1 key is not 64 hex digits" in imported(store, stores.csv(agents[2:4]), "-v").err


def test_errors_and_notes_do_not_push_each_other_out(stores: Stores, store: Path) -> None:
    """A hundred of each are told."""
    agents = [(f"{n:03d}", f"a{n}", "any", "k" * 128) for n in range(1, 300)]
    source = stores.csv([*agents, ("999", "bad name", "any", KEY)])
    said = forked("--db", store, "--import", source, "-v")
    assert len(faults(said)) == 1
    assert len([line for line in said.lines if line.startswith("note: ")]) == 100
    assert "... and 200 more notes" in said.lines


def test_in_a_journal(stores: Stores, old_store: Path) -> None:
    """systemd shows lines by their priority: a refresh that fails is an error there."""

    def before() -> None:
        status = os.fstat(2)
        os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"

    bad = stores.csv([("001", "a b", "any", "k")])
    said = refused_in_journal(old_store, bad, before)
    assert said.lines[0].startswith("<3>error: line 2: agent 001: ")
    assert said.lines[1].startswith(f"<3>{bad}: 1 fault ")
    good = stores.csv([("001", "a", "any", "k")], "good.csv")
    said = forked("--db", old_store, "--import", good, "-v", before=before)
    assert said.lines == [
        "<5>note: 1 key is not 64 hex digits; that is allowed",
        f"<6>1 agent imported into {old_store}: 1 new, 0 changed, 1 gone",
    ]


def refused_in_journal(store: Path, source: Path, before: Callable[[], None]) -> Said:
    """Import SOURCE, which must fail."""
    said = forked("--db", store, "--import", source, before=before)
    assert said.status == 1 and rows(store) == OLD
    return said


def test_on_a_terminal(stores: Stores, store: Path) -> None:
    """One line stays, and it covers what was there before; the first one is about one agent."""
    for agents in records(1), records(1000):
        with Terminal() as terminal:
            child = Child("--db", store, "--import", stores.csv(agents), stderr=terminal.end)
            text = terminal.shown()
            assert child.wait().status == 0
        *shown, last, nothing = re.split(r"\r\n|\r", text)
        assert last.startswith(f"{len(agents):,} agent") and nothing == ""
        assert all(len(line) < len(last) for line in shown)
        assert shown[0] == "1 agent"
