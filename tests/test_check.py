"""`--check` tells what a person wants to know before trusting a source, and never a key."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores, half, script
from importing import SECRET, SHARED_NETWORKS, TWICE, UNREADABLE, Child, become, forked
from serving import records, serving
from terminal import Terminal

GOOD = [
    Record("001", "my_agent", "192.168.1.100", KEY),
    Record("002", "laptop", "any", SECRET),
    Record("003", "office", "10.20.30.0/24", "a key with spaces"),
    Record("004", "web-v6", "2001:db8::10", "k" * 127),
]
ODD_KEYS = "keys are not 64 hex digits; that is allowed"
HEALTHY = [f"note: 3 {ODD_KEYS}", "4 agents, 0 errors, 1 note"]
QUICK = "PRAGMA synchronous = OFF; "  # for a busy disk
INDEXES = "; CREATE INDEX agent_id ON agent (id); CREATE INDEX agent_ip ON agent (ip)"


class Checked(NamedTuple):
    """What one check told, as text and as JSON."""

    status: int
    lines: list[str]
    data: dict[str, Any]

    def of(self, level: str) -> list[str]:
        """The texts of the findings of a level."""
        return [one["text"] for one in self.data["findings"] if one["level"] == level]

    @property
    def errors(self) -> list[str]:
        """What would make a request fail."""
        return self.of("error")

    @property
    def notes(self) -> list[str]:
        """What a person may want to know, without the number of keys that are not hex digits."""
        return [note for note in self.of("note") if "not 64 hex digits" not in note]


Check = Callable[..., Checked]


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str]) -> Check:
    """Check a source in the process, in both forms, which must say the same and change nothing."""

    def run(source: str | Path, *options: str | Path) -> Checked:
        before = contents(source)
        told, statuses = [], []
        for form in [], ["--json"]:
            words = ["--db", str(source), *map(str, options), *form, "--check"]
            statuses.append(script.main(words))
            out, err = capfd.readouterr()
            assert err == ""
            assert out.isascii() and out.endswith("\n") and out.replace("\n", "").isprintable(), out
            assert not any(word in out for word in (KEY, SECRET[:12], "a key with", "Internal"))
            told.append(out)
        assert contents(source) == before
        data = json.loads(told[1])
        checked = Checked(statuses[0], told[0].splitlines(), data)
        assert statuses[0] == statuses[1] == bool(data["errors"])
        assert list(data) == ["agents", "errors", "notes", "findings"]
        assert told[1] == json.dumps(data) + "\n"
        same = [
            one["text"] if one["level"] == "info" else f"{one['level']}: {one['text']}"
            for one in data["findings"]
        ]
        assert without_times(checked.lines) == without_times(same)
        if data["errors"] + data["notes"] <= 100:
            counts = data["errors"], data["notes"]
            assert (len(checked.of("error")), len(checked.of("note"))) == counts
        amounts = [
            f"{count:,} {what}{'s' * (count != 1)}"
            for count, what in (
                (data["agents"], "agent"),
                (data["errors"], "error"),
                (data["notes"], "note"),
            )
        ]
        assert checked.lines[-1] == ", ".join(amounts), checked
        return checked

    return run


def without_times(lines: list[str]) -> list[str]:
    """The lines without what differs from run to run."""
    return [re.sub(r"[0-9.]+ ms$", "", line) for line in lines]


def contents(source: str | Path) -> list[Any]:
    """What a check must leave as it is: the files in the source's folder."""
    folder = Path(source).parent
    return (
        [(path, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()]
        if (folder.name == "stores")
        else []
    )


def private(path: Path) -> Path:
    """Take a source from the others, which would be a note."""
    path.chmod(0o600)
    return path


def sound(stores: Stores, agents: Sequence[Sequence[Any]] = GOOD, schema: str = "") -> Path:
    """Make a database of which nothing is to be told but its agents."""
    return private(stores.sqlite(agents, QUICK + (schema or UNTYPED_SCHEMA) + INDEXES))


def mend(field: str, right: str) -> str:
    """What is told of a value that no request finds."""
    return (
        f"no request finds its {field} as it is stored: {right} is right, and --import would "
        "mend it"
    )


def ask(source: Path, *words: str) -> Any:
    """Answer a request from a source."""
    return script.answer(list(words), lambda: script.open_source(str(source), 60), str(source))


# ---------------------------------------------------------------- nothing to find

SOURCES: dict[str, Callable[[Stores], Path]] = {
    "sqlite": sound,
    "of the sample's schema": lambda stores: stores.indexed(GOOD),
    "csv": lambda stores: stores.csv(GOOD),
    "client.keys": lambda stores: stores.keys(GOOD),
    "sql": lambda stores: stores.sql(GOOD),
    "tabs": lambda stores: stores.text(
        "id\tname\tip\tkey\n" + "".join("\t".join(row) + "\n" for row in GOOD), "agents.tsv"
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_healthy_source(stores: Stores, check: Check, kind: str) -> None:
    """The number of agents, and that is all."""
    assert check(private(SOURCES[kind](stores))).lines == HEALTHY


def test_the_sample_is_healthy(stores: Stores, check: Check) -> None:
    """As the script that it is, and loaded into a database."""
    text = SAMPLE.read_text()
    for path in stores.text(text, "sample.db.sql"), stores.sqlite([], text):
        assert check(private(path)).notes == check(path).errors == []


def test_an_imported_store_is_healthy(stores: Stores, check: Check) -> None:
    store = stores.folder / "store.db"
    assert forked("--db", store, "--import", stores.csv(GOOD)).status == 0
    assert check(store).lines == HEALTHY


def test_under_each_interpreter(ask_each: Caller, stores: Stores) -> None:
    """A real process, in both forms; without --db it is $AGENT_KEY_DB, as for a request."""
    agents = [*GOOD, ("005", "a b", "any", KEY), (b"006", "c", "10.0.0.5/24", "k" * 128)]
    source = sound(stores, agents, PLAIN_SCHEMA)
    told = [
        ("error", f"row 5: agent 005: {script.RULES['name']}"),
        ("error", "row 6: agent 006: " + mend("id", "006")),
        ("error", "row 6: agent 006: " + mend("ip", "10.0.0.0/24")),
        ("note", "row 6: agent 006: key has 128 characters; the manager reads 127 back"),
        ("note", f"4 {ODD_KEYS}"),
        ("info", "6 agents, 3 errors, 2 notes"),
    ]
    env = {"PATH": ask_each.path, "AGENT_KEY_DB": str(source)}
    for form in [], ["--json"]:
        words = [*ask_each.command(), *form, "--check"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "")
        if form:
            assert json.loads(done.stdout) == {
                "agents": 6,
                "errors": 3,
                "notes": 2,
                "findings": [{"level": level, "text": text} for level, text in told],
            }
        else:
            assert done.stdout.splitlines() == [
                text if level == "info" else f"{level}: {text}" for level, text in told
            ]


# ---------------------------------------------------------------- the records

BROKEN = [
    *(("id", (number, "a", "any", "k")) for number in ("12a", "000", "", "0005", "0020")),
    ("id", ("123456789", "a", "any", "k")),
    ("id", (SECRET, "a", "any", "k")),
    ("name", ("005", "a b", "any", "k")),
    ("name", ("005", "", "any", "k")),
    ("name", ("005", "a\033[2J", "any", "k")),
    ("name", ("005", SECRET + "/", "any", "k")),
    ("ip", ("005", "a", "10.0.0.256", "k")),
    ("ip", ("005", "a", SECRET, "k")),
    ("ip", ("005", "a", "::/64", "k")),
    ("key", ("005", "a", "any", "")),
    ("key", ("005", "a", "any", SECRET * 3)),
    ("key", ("005", "a", "any", "k\xdf")),
]


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_records_that_break_a_rule(stores: Stores, check: Check, kind: str) -> None:
    """Each with its row or line, its id where that is one, and the rule, and no more of it: what
    stands in a wrong place may be a key."""
    agents = [*GOOD, *(record for _, record in BROKEN)]
    checked = check(sound(stores, agents) if kind == "sqlite" else private(stores.csv(agents)))
    unit, start = ("row", 5) if kind == "sqlite" else ("line", 6)
    told = []
    for number, (field, record) in enumerate(BROKEN, start):
        digits = re.fullmatch("[0-9]{1,8}", record[0])
        agent = record[0] if digits else f"with an id of {len(record[0])} characters"
        told.append(f"{unit} {number}: agent {agent}: {script.RULES[field]}")
    assert [text for text in checked.errors if " is already that of " not in text] == told


@pytest.mark.parametrize("count", [100, 101, 102, 500])
def test_the_first_hundred_findings(stores: Stores, check: Check, count: int) -> None:
    """A hundred errors and a hundred notes; then how many more, and at last the numbers of all."""
    agents = [(f"{n:03d}", f"bad {n}", "any", KEY) for n in range(1, count + 1)]
    agents += [(f"1{n:03d}", f"a{n}", "any", "k" * 128) for n in range(1, count)]
    checked = check(private(stores.csv(agents)))
    assert (len(checked.of("error")), len(checked.of("note"))) == (100, 100)
    more = "s" * (count != 101)
    assert [line for line in checked.lines if "more" in line] == [
        *([f"... and {count - 100} more error{more}"] if count > 100 else []),
        *([f"... and {count - 100} more note{more}"] if count > 100 else []),
    ]
    assert (checked.data["errors"], checked.data["notes"]) == (count, count)


# Field, text (the number of the agent in place of #, 10 to 99), what makes the value of it, and the
# right spelling: none where it is right.
SPELLED: list[tuple[str, str, Callable[[str], Any], str]] = [
    *(("id", text, str, "0#") for text in (" 0#", "0# ", " #", "# ")),
    *(("id", text, str.encode, "0#") for text in ("0#", "#")),
    ("id", " 10#", str, "10#"),
    ("id", "123456#", str.encode, "123456#"),
    ("ip", " 10.9.#.9", str, "10.9.#.9"),
    ("ip", "10.9.#.9 ", str, "10.9.#.9"),
    ("ip", "10.9.#.9", str.encode, "10.9.#.9"),
    ("ip", "10.9.#.9/255.255.255.255", str, "10.9.#.9"),
    ("ip", "::ffff:10.9.#.9", str, ""),  # as MariaDB's INET6 spells it
    ("ip", "10.9.#.9/24", str, "10.9.#.0/24"),
    ("ip", "10.9.#.0/255.255.255.0", str, "10.9.#.0/24"),
    ("ip", "::ffff:10.9.#.0/120", str, "10.9.#.0/24"),
    ("ip", "FE80:#::1", str, "fe80:#::1"),
    ("ip", "fe80:#:0::0001", str, "fe80:#::1"),
    ("ip", "fe80:#::1/64", str, "fe80:#::/64"),
    *(("id", text, str, "") for text in ("#", "0#", "10#")),
    *(("id", text, value, "") for text in ("#", "10#", "123456#") for value in (int, float)),
    *(("ip", text, str, "") for text in ("10.9.#.9", "10.9.#.9/32", "10.9.#.0/24", "any", "")),
    ("ip", "fe80:#::1/128", str, ""),
    *(("ip", text, str, "") for text in ("ANY", " any ", "0.0.0.0/0")),  # nobody looks for these
    ("ip", "any", str.encode, ""),
    ("ip", "", lambda _: None, ""),
]


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_what_no_request_finds(stores: Stores, check: Check, kind: str) -> None:
    """An error with the right spelling; what --import makes of it is found, and healthy."""
    agents, told, spelled = [], [], []
    for number, (field, text, value, right) in enumerate(SPELLED, 10):
        if kind == "csv" and value is not str:
            continue
        record = Record(f"0{number}", f"a{number}", "any", KEY)
        agents.append(record._replace(**{field: value(text.replace("#", str(number)))}))
        spelled.append((field, right.replace("#", str(number)), f"a{number}"))
        if right:
            unit, place = ("row", len(agents)) if kind == "sqlite" else ("line", len(agents) + 1)
            right = spelled[-1][1]
            agent = right if field == "id" else record.id
            told.append(f"{unit} {place}: agent {agent}: {mend(field, right)}")
    source = sound(stores, agents) if kind == "sqlite" else private(stores.csv(agents))
    assert check(source).errors == told
    store = stores.folder / "store.db"
    assert forked("--db", store, "--import", source).status == 0
    for field, right, name in spelled:
        if right:
            asked = right.replace("0/24", "9").replace("::/64", "::2")
            assert ask(source, field, asked).number == 4, right
            assert ask(store, field, asked).record["name"] == name
    assert check(store).lines == [f"{len(agents)} agents, 0 errors, 0 notes"]


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [(field, one, other) for field, pairs in TWICE.items() for one, other in pairs],
)
def test_what_only_one_agent_may_have(
    stores: Stores, check: Check, field: str, one: str, other: str
) -> None:
    """The later one is told, and whose it is; for a name it is the manager who refuses."""
    agents = [
        Record("008", "a", "10.0.0.1", "k")._replace(**{field: one}),
        *GOOD,
        Record("009", "b", "10.0.0.2", "k")._replace(**{field: other}),
    ]
    agent = "007" if field == "id" else "009"
    for source, unit, first in (
        (sound(stores, agents), "row", 1),
        (private(stores.csv(agents)), "line", 2),
    ):
        errors = [error for error in check(source).errors if "as it is stored" not in error]
        assert errors == [
            f"{unit} {first + 5}: agent {agent}: {field} is already that of {unit} {first}"
        ]


@pytest.mark.parametrize(("one", "other", "network"), SHARED_NETWORKS)
def test_agents_may_share_a_network(
    stores: Stores, check: Check, one: str, other: str, network: str
) -> None:
    """What a request in it finds is told, once for all agents that share it."""
    agents = [*GOOD, ("007", "a", one, "k"), ("008", "b", other, "k"), ("009", "c", network, "k")]
    source = sound(stores, agents)
    assert check(source).notes == [
        f"row 5: agent 007: 3 agents have the network {network}: an ip request in it finds more "
        "than one agent"
    ]
    store = stores.folder / "store.db"
    assert forked("--db", store, "--import", source).status == 0
    address = network.replace("0/24", "77").replace("::/48", "::77")
    assert ask(store, "ip", address).number == 5 and ask(store, "id", "008").number == 0


def test_what_many_agents_may_have(stores: Stores, check: Check) -> None:
    """`any`, a key, an address within a network, networks within networks."""
    ips = [
        "any",
        "",
        "any",
        "10.0.0.0/8",
        "10.0.0.0/16",
        "10.0.0.0",
        "2001:db8:0:1::1",
        "2001:db8:0:2::1",
    ]
    agents = [(f"{n:03d}", f"a{n}", ip, KEY) for n, ip in enumerate(ips, 1)]
    assert check(sound(stores, agents)).lines == ["8 agents, 0 errors, 0 notes"]


def test_what_the_manager_does_to_a_sound_record(stores: Stores, check: Check) -> None:
    """MANAGER.md: it reads 127 characters back, and keeps its own host's name for itself."""
    host = os.uname().nodename
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", host):
        pytest.skip("this host's name could not be an agent's")
    agents = [
        ("005", "n" * 128, "any", "k"),
        ("006", "b", "any", "K" * 128),
        ("007", "n" * 127, "any", "K" * 127),
        ("008", host, "any", "k"),
        ("009", host + "-2", "any", "k"),
    ]
    checked = check(sound(stores, agents))
    reads = "has 128 characters; the manager reads 127 back"
    assert checked.notes == [f"row 1: agent 005: name {reads}", f"row 2: agent 006: key {reads}"]
    assert checked.errors == ["row 4: agent 008: name is this host's own: its manager refuses that"]


# ---------------------------------------------------------------- what it says is true

IDS: list[Any] = [
    "001",
    "1",
    "01",
    1,
    1.0,
    b"001",
    " 001",
    "001 ",
    "0001",
    "002",
    "2",
    2,
    "003",
    3,
    "1000",
    1000,
    "01000",
    "12345678",
    12345678,
    "123456789",
    "x",
    "",
    None,
    "1.0",
    "000",
    0,
    1.5,
    "+4",
    "4 ",
]
IPS: list[Any] = [
    "any",
    "",
    None,
    "10.0.0.1",
    "10.0.0.1/32",
    "10.0.0.1 ",
    "::ffff:10.0.0.1",
    "::ffff:a00:1",
    "10.0.0.0/24",
    "10.0.0.9/24",
    "10.0.0.0/255.255.255.0",
    " 10.0.0.0/24",
    "10.0.0.0/16",
    "10.0.0.0/1",
    "128.0.0.0/1",
    "fe80::1",
    "FE80::1",
    "fe80:0::1",
    "fe80::1/128",
    "2001:db8::/32",
    "2001:db8::5/32",
    "2001:DB8::/32",
    b"10.0.0.3",
    "010.0.0.1",
    "10.0.0.256",
    7,
    "::/64",
    "host",
]
ASKED = {32: "10.0.0.200", 24: "10.0.0.200", 16: "10.0.77.1", 1: "10.77.0.1"}
TABLES = {
    "untyped": UNTYPED_SCHEMA,
    "indexed": UNTYPED_SCHEMA + INDEXES,
    "text": PLAIN_SCHEMA,
    "numbers": PLAIN_SCHEMA.replace("id VARCHAR(8)", "id INTEGER"),
    "any case": UNTYPED_SCHEMA.replace("id,", "id COLLATE NOCASE,").replace(
        "ip,", "ip COLLATE NOCASE,"
    ),
    "csv": "",
}


def is_found(source: Path, row: Sequence[Any]) -> bool:
    """Whether requests find this agent, by its id, and by its address if it has one."""
    record, broken = script.judge(row)
    reply = ask(source, "id", record["id"])
    if broken or reply.record != record:
        return False
    if record["ip"] == "any":
        return True
    address, _, length = record["ip"].partition("/")
    if length and ":" in address:
        address = "2001:db8:7::1"
    elif length:
        address = "200.0.0.1" if address.startswith("128.") else ASKED[int(length)]
    reply = ask(source, "ip", address)
    is_shared = bool(length) and reply.number == script.FOUND_SEVERAL
    return is_shared or bool(reply.record == record)


@pytest.mark.parametrize("table", TABLES)
def test_an_agent_is_found_unless_there_is_an_error(stores: Stores, table: str) -> None:
    """In random tables: who is not found is named, and who is called an error is not found."""
    luck = random.Random(table)
    counts = [0, 0]
    for _ in range(60):
        agents = [random_agent(luck, number) for number in range(luck.randrange(1, 6))]
        if table == "csv":
            agents = [row for row in agents if bytes not in map(type, row)]
            source = stores.csv([[as_text(value) for value in row] for row in agents])
        else:
            source = stores.sqlite(agents, QUICK + TABLES[table])
        report = script.Report(1, True)
        with contextlib.closing(script.create_store("")) as store:
            script.check_source(script.Options(db=str(source)), store, report)
        errors = [one.text for one in report.findings if one.level == "error"]
        numbered = list(script.open_source(str(source), 60).rows())
        assert report.agents == len(numbered)
        places = [list(map(int, re.findall(r"(?:row|line) (\d+)", text))) for text in errors]
        named = {number for numbers in places for number in numbers}
        own = {numbers[0] for numbers in places if len(numbers) == 1}
        found = {number for number, row in numbered if is_found(source, row)}
        lost = {number for number, _ in numbered} - found
        assert lost <= named, (agents, errors)
        # A column that ignores the case of letters finds what another one would not find.
        assert table == "any case" or not own & found, (agents, errors)
        for numbers in places:  # if two share something, one is in the other's way, or will be
            assert table == "any case" or lost & set(numbers), (agents, errors)
        counts[0] += len(found)
        counts[1] += len(lost)
        source.unlink()
    assert min(counts) > 20, counts


def random_agent(luck: random.Random, number: int) -> tuple[Any, ...]:
    """An agent each of whose fields may be wrong, or another's."""
    return (
        luck.choice([*IDS, *[f"10{number}"] * 30]),
        luck.choice(["a b", *[f"a{number}"] * 9]),
        luck.choice([*IPS, *[f"192.168.0.{number}"] * 30]),
        "k",
    )


def as_text(value: Any) -> str:
    """A value as a text file would have it."""
    return value.decode() if isinstance(value, bytes) else "" if value is None else str(value)


# ---------------------------------------------------------------- the source


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.csv", "id,name,ip,key\n001,a,any,k", 2),
        ("client.keys", "001 a any k", 1),
        ("client.keys", "001 a any k\n# a comment", 2),
        ("client.keys", "001 a any k\n001 !a any k", 2),
    ],
)
def test_a_last_line_without_an_end(
    stores: Stores, check: Check, name: str, text: str, line: int
) -> None:
    """The file may be half-written: a key may have been cut, or agents may be missing."""
    checked = check(stores.text(text, name))
    assert len(checked.errors) == 1, checked
    assert re.match(
        f"line {line}[: ].*has no end; the file may be half-written$", checked.errors[0]
    )


@pytest.mark.parametrize("kind", ["sqlite", "csv"])
def test_a_source_that_others_may_read_or_write(stores: Stores, check: Check, kind: str) -> None:
    """Who reads it has the keys: a note. Who writes it enrols agents: no request is answered."""
    source = sound(stores) if kind == "sqlite" else stores.csv(GOOD)
    for mode in 0o644, 0o604:
        source.chmod(mode)
        checked = check(source)
        assert (checked.status, checked.notes) == (
            0,
            [f"others may read {source}, and keys are secrets: chmod o-r {source}"],
        )
    for mode in 0o601, 0o640, 0o660:
        source.chmod(mode)
        assert check(source).lines == HEALTHY
    source.chmod(0o602)
    assert ask(source, "id", "001").number == 2
    checked = check(source)
    assert len(checked.errors) == 1 and "everybody may write to it" in checked.errors[0]
    assert str(source) in checked.errors[0]


ENOUGH = {
    "unique": "CREATE TABLE agent (id TEXT PRIMARY KEY, name, ip TEXT UNIQUE, agent_key)",
    "rowid": "CREATE TABLE agent (id INTEGER PRIMARY KEY, name, ip, agent_key); "
    "CREATE INDEX a ON agent (ip, id)",
    "without rowid": "CREATE TABLE agent (id TEXT PRIMARY KEY, name, ip, agent_key) WITHOUT ROWID; "
    "CREATE INDEX a ON agent (ip)",
}
TOO_LITTLE = {
    "none": (PLAIN_SCHEMA, ["id", "ip"]),
    "id": (PLAIN_SCHEMA + "; CREATE INDEX a ON agent (id)", ["ip"]),
    "ip": (PLAIN_SCHEMA + "; CREATE INDEX a ON agent (ip)", ["id"]),
    "name": (PLAIN_SCHEMA + "; CREATE INDEX a ON agent (name, id, ip)", ["id", "ip"]),
    "some of them": (
        PLAIN_SCHEMA + "; CREATE INDEX a ON agent (id) WHERE ip = 'any';"
        "CREATE INDEX b ON agent (ip)",
        ["id"],
    ),
}


@pytest.mark.parametrize("schema", TOO_LITTLE)
def test_missing_indexes(stores: Stores, check: Check, schema: str) -> None:
    """The statement is told that is the cure, and it is no error."""
    sql, fields = TOO_LITTLE[schema]
    source = private(stores.sqlite(GOOD, QUICK + sql))
    checked = check(source)
    assert checked.status == 0
    assert checked.notes == [
        f"requests are slow without CREATE INDEX agent_{field} ON agent ({field});"
        for field in fields
    ]
    with contextlib.closing(sqlite3.connect(str(source))) as database:
        database.executescript(" ".join(re.findall("CREATE[^;]+;", "".join(checked.notes))))
        database.execute("ANALYZE")
    assert check(source).lines == HEALTHY


@pytest.mark.parametrize("schema", ENOUGH)
def test_indexes_of_any_kind(stores: Stores, check: Check, schema: str) -> None:
    source = private(stores.sqlite(GOOD, QUICK + ENOUGH[schema]))
    assert check(source).lines == HEALTHY


def test_a_table_that_sqlite_knows_to_be_small(stores: Stores, check: Check) -> None:
    """Its statistics must not make it look as if an index were missing."""
    for agents in [], GOOD[:1], GOOD:
        source = sound(stores, agents)
        with contextlib.closing(sqlite3.connect(str(source))) as database:
            database.execute("ANALYZE")
        assert check(source).notes == []
        source.unlink()


def test_a_view(stores: Stores, check: Check) -> None:
    """It has no indexes of its own: a statement that cannot be executed is no cure."""
    source = stores.sqlite(GOOD, QUICK + UNTYPED_SCHEMA)
    with contextlib.closing(sqlite3.connect(str(source))) as database:
        database.executescript(
            "ALTER TABLE agent RENAME TO host; CREATE VIEW agent AS"
            " SELECT id, name, ip, agent_key FROM host"
        )
    assert check(private(source)).lines == HEALTHY


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("agents.csv", "id,name,ip,key\n", ""),
        ("agents.csv", "id;name;ip;key\n;;;\n", ""),
        ("client.keys", "", ""),
        ("client.keys", "# nobody yet\n", ""),
        ("agents.txt", " 001 | a | any | k\n", "; 1 line that begins with a space skipped"),
        ("agents.sql", PLAIN_SCHEMA + ";", ""),
    ],
)
def test_a_source_without_agents(
    stores: Stores, check: Check, name: str, text: str, told: str
) -> None:
    """Every request would get error 4, which no log shows."""
    source = private(stores.text(text, name))
    assert check(source).errors == [f"{source}: it has no agents{told}"]


def test_a_table_without_agents(stores: Stores, check: Check) -> None:
    source = sound(stores, [])
    assert check(source).errors == [f"{source}: it has no agents"]


def test_keys_that_a_spreadsheet_has_changed(stores: Stores, check: Check) -> None:
    """Keys of any kind are allowed, but this one is nobody's."""
    agents = [("001", "a", "any", "6.75E+63"), ("002", "b", "any", "6E+"), ("003", "c", "any", KEY)]
    checked = check(private(stores.csv(agents)))
    assert checked.notes == [
        "line 2: agent 001: key looks like a number that a spreadsheet changed"
    ]
    assert checked.of("note")[1:] == [f"2 {ODD_KEYS}"] and checked.status == 0


def test_an_import_reports_the_same(stores: Stores, check: Check) -> None:
    """Whoever has checked a source is not surprised by its import."""
    agents = [
        *GOOD,
        ("005", "bad name", "10.0.0.1", "k"),
        ("006", "n" * 128, "10.9.0.0/16", "1E+5"),
        ("006", "laptop", "10.9.0.0/16", KEY),
        ("007", "b", "10.0.0.1", "k"),
        ("008", "c", "any", ""),
    ]
    for source in private(stores.csv(agents)), sound(stores, agents):
        checked = check(source)
        store = stores.folder / "store.db"
        said = forked("--db", store, "--import", source, "-v")
        assert checked.lines[:-1] == said.lines[:-1] and len(checked.lines) > 6
        assert not store.exists()


def test_an_index_that_does_not_match_its_table(stores: Stores, check: Check) -> None:
    """As after `rsync --inplace`: SQLite would find an agent by the id of another."""
    agents = [(f"{n:03d}", f"a{n}", "any", KEY) for n in range(1, 50)]
    source = sound(stores, agents, PLAIN_SCHEMA)
    content = bytearray(source.read_bytes())
    with contextlib.closing(sqlite3.connect(str(source))) as database:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'agent_id'"
        (page,) = database.execute(query).fetchone()
    start = (page - 1) * 4096
    index = bytes(content[start : start + 4096])
    swapped = index.replace(b"017", b"###").replace(b"018", b"017").replace(b"###", b"018")
    assert swapped != index
    content[start : start + 4096] = swapped
    source.write_bytes(content)
    checked = check(source)
    assert len(checked.errors) == 1, checked
    assert f"{source}: the database is damaged (" in checked.errors[0]
    assert "key of another agent" in checked.errors[0]


def test_whose_file_it_is(stores: Stores, check: Check, nobody: int) -> None:
    """Whoever names another user's file trusts that user."""
    source = sound(stores)
    os.chown(source, nobody, nobody)
    assert check(source).notes == [f"{source} belongs to user nobody, who can change its agents"]
    os.chown(source, 12345, 0)
    assert "belongs to user 12345, " in check(source).notes[0]


def test_two_columns_for_the_key(stores: Stores, check: Check) -> None:
    """A request takes the one of sample.db.sql; a person should know that there is another."""
    schema = UNTYPED_SCHEMA.replace("agent_key", "agent_key, internal_key, address")
    checked = check(sound(stores, GOOD, schema))
    assert len(checked.errors) == 1 and "two columns for the key" in checked.errors[0]
    assert checked.data["agents"] == 4


def test_columns_with_other_names(stores: Stores, check: Check) -> None:
    """The index that is missing has the name of the column."""
    source = private(stores.sqlite(GOOD))
    with contextlib.closing(sqlite3.connect(str(source))) as database:
        database.executescript(
            "CREATE TABLE other AS SELECT id, name, ip AS address, agent_key AS internal_key FROM "
            "agent; DROP TABLE agent; ALTER TABLE other RENAME TO agent"
        )
    checked = check(source)
    assert checked.errors == [] and checked.notes == [
        f"requests are slow without CREATE INDEX agent_{column} ON agent ({column});"
        for column in ("id", "address")
    ]


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_source_that_cannot_be_read(stores: Stores, check: Check, what: str) -> None:
    """Every request would fail, so that is the error, and it names the source."""
    source = UNREADABLE[what](stores)
    checked = check(source)
    assert checked.status == 1 and len(checked.errors) == 1
    assert str(source) in checked.errors[0]


def test_half_of_the_indexes(stores: Stores, check: Check) -> None:
    """The agents can be read, but requests cannot be answered."""
    source = half(sound(stores, records(2000)))
    checked = check(source)
    assert len(checked.errors) == 1 and str(source) in checked.errors[0]


def test_a_locked_database(stores: Stores, locked: Callable[[Path], None]) -> None:
    """It does not wait for ever. (In a fork: to close the file here would end the lock.)"""
    source = sound(stores)
    locked(source)
    said = forked("--db", source, "--timeout", "0.2", "--check")
    assert (said.status, said.err) == (1, "") and "locked" in said.out


def test_a_source_that_one_may_not_read(open_folder: Path, nobody: int) -> None:
    source = sound(Stores(open_folder))
    said = forked("--db", source, "--check", before=become(nobody))
    assert (said.status, said.err) == (1, "")
    assert f"{source}: Permission denied" in said.out


# ---------------------------------------------------------------- where it is told


def test_a_report_that_cannot_be_written(stores: Stores) -> None:
    """Who reads the exit status must not take it for a healthy source; no file is to blame."""
    bad = stores.csv([("001", "a b", "any", "k")] * 200, "bad.csv")
    for source in sound(stores), bad:
        for form in [], ["--json"]:
            full = os.open("/dev/full", os.O_WRONLY)
            reader, closed = os.pipe()
            os.close(reader)
            for descriptor, reason in (full, "No space left"), (closed, "Broken pipe"):
                said = forked("--db", source, *form, "--check", stdout=descriptor)
                os.close(descriptor)
                assert said.status == 1 and len(said.lines) == 1, said
                assert f"standard output: {reason}" in said.err, said
                assert source.name not in said.err


def test_progress_on_a_terminal(stores: Stores) -> None:
    """On standard error alone: the report may be somewhere else."""
    source = sound(stores, records(3000))
    with Terminal() as terminal:
        child = Child("--db", source, "--check", "--json", stderr=terminal.end)
        text = terminal.shown()
        said = child.wait()
    assert re.fullmatch(r"1 agent\r([\d,]+ agents\r)*", text), text
    assert json.loads(said.out)["agents"] == 3000


def test_one_in_many(stores: Stores, check: Check) -> None:
    """Among 10,000 agents, one of them bad, nothing else is told."""
    agents = records(10_000)
    agents[7776] = Record("7777", "bad name", "any", "k")
    checked = check(sound(stores, agents))
    assert checked.lines == [
        f"error: row 7777: agent 7777: {script.RULES['name']}",
        "note: 1 key is not 64 hex digits; that is allowed",
        "10,000 agents, 1 error, 1 note",
    ]


# ---------------------------------------------------------------- the server

SOUND = rb'{"error": 4, "message": "No agent key found"}'
IMPOSTORS = {
    "closes without a word": b"",
    "no JSON": b"hello\n",
    "no object": b"[]\n",
    "a text": b'"error"\n',
    "half an object": SOUND[:25],
    "text before it": b"warning\n" + SOUND,
    "a number that kills the manager": b'{"error": 0, "data": {"id": 1, "name": "a",'
    b' "ip": "any", "key": "' + SECRET.encode() + b'"}}\n',
    "an agent": b'{"error": 0, "data": {"id": "001", "name": "a", "ip": "any", "key": "'
    + SECRET.encode()
    + b'"}}\n',
    "an error that is a text": SOUND.replace(b"4", b'"4"'),
    "an error that is none": SOUND.replace(b"4", b"null"),
    "no error": b'{"message": "No agent key found"}',
    "an unreadable source": b'{"error": 2, "message": "Cannot read key source: gone"}\n',
    "something deep": b"[" * 60_000,
    "control characters": b'{"error": 2, "message": "\\u001b[2J\\n\xff"}',
}


@contextlib.contextmanager
def impostor(path: Path, reply: bytes | None) -> Iterator[None]:
    """A server that gives the same REPLY to everything, and for None stays silent."""
    listener, held = socket.socket(socket.AF_UNIX), []
    listener.bind(str(path))
    listener.listen(9)

    def work() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if reply is not None:
                with contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(reply)
                connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for one in [listener, *held]:
            one.close()
        path.unlink()


def test_a_server_that_answers(stores: Stores, check: Check, open_folder: Path) -> None:
    """A healthy one reads as healthy; and how long it took."""
    source, path = sound(stores), open_folder / "s"
    with serving(source, path):
        checked = check(source, "--socket", path)
    assert checked.lines[:1] + checked.lines[2:] == HEALTHY
    answers = r"server answers \(tried with 00000000, which nobody has\), in \d+\.\d ms"
    assert re.fullmatch(answers, checked.lines[1]), checked.lines


@pytest.mark.parametrize("what", IMPOSTORS)
def test_a_server_with_a_wrong_answer(
    stores: Stores, check: Check, open_folder: Path, what: str
) -> None:
    """What the manager would make of it is an error; a key in it is not told."""
    path = open_folder / "s"
    with impostor(path, IMPOSTORS[what]):
        checked = check(sound(stores), "--socket", path)
    assert len(checked.errors) == 1 and checked.errors[0].startswith("server "), checked
    if what in ("half an object", "no JSON", "something deep"):
        assert "text before" not in checked.errors[0], checked


def test_a_server_that_is_silent(stores: Stores, check: Check, open_folder: Path) -> None:
    path = open_folder / "s"
    with impostor(path, None):
        checked = check(sound(stores), "--timeout", "0.2", "--socket", path)
    assert len(checked.errors) == 1 and "timed out" in checked.errors[0]


def test_no_server(stores: Stores, check: Check, open_folder: Path) -> None:
    """Nothing is there, what a dead one left, a file; and it does not matter for the source."""
    source, path = sound(stores), open_folder / "s"
    for reason in "No such file", "refused", "refused":
        checked = check(source, "--socket", path)
        assert len(checked.errors) == 1 and reason in checked.errors[0], checked
        assert str(path) in checked.errors[0] and checked.data["agents"] == 4
        if not path.exists():
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(path))
        else:
            path.unlink()
            path.write_text("")


# ---------------------------------------------------------------- a program of the manager


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("#!/usr/bin/env python9", "its interpreter python9 does not exist"),
        ("#!/usr/bin/env -S python9 -I", "its interpreter python9 does not exist"),
        ("#!/usr/bin/env -S LANG=C -i python9 -I", "its interpreter python9 does not exist"),
        ("#!/usr/bin/env python9 -I", "its interpreter python9 -I does not exist"),
        ("#!/usr/bin/env -S", ""),
    ],
)
def test_an_interpreter_that_env_does_not_find(tmp_path: Path, line: str, told: str) -> None:
    """An option of `env` is no interpreter. Without -S, `env` takes all the words for one name."""
    program = tmp_path / "program"
    program.write_text(f"{line}\n")
    program.chmod(0o755)
    assert script.explain_status("/", str(program), 127, b"").endswith(told)
    assert "interpreter -S" not in script.explain_status("/", str(program), 127, b"")
    if told:
        assert subprocess.run([program], capture_output=True, check=False).returncode == 127


def test_a_program_ends_with_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the waiting, no process stays behind in a session of its own."""

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(script, "read_until", fails)
    started: list[subprocess.Popen[bytes]] = []
    start = script.start_as_manager

    def noted(*words: Any) -> Any:
        started.append(start(*words))
        return started[0]

    monkeypatch.setattr(script, "start_as_manager", noted)
    with pytest.raises(MemoryError):
        script.run_as_manager(str(tmp_path), ["/bin/sleep", "60"], 60.0)
    assert started[0].returncode == -signal.SIGKILL
