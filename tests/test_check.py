"""`--check` tells what a person wants to know before trusting the store, and never a key."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores
from serving import records, serving

LIMIT = 60.0  # seconds for one check
SECRET = "S3cr3t" * 9  # a key; 54 characters, so that no id or address looks like it
GOOD = (
    Record("001", "my_agent", "192.168.1.100", KEY),
    Record("002", "laptop", "any", SECRET),
    Record("003", "office", "10.20.30.0/24", "a key with spaces"),
    Record("004", "web-v6", "2001:db8::10", "k" * 127),
)


class Report:
    """What one check told, as text and as JSON."""

    def __init__(self, status: int, text: str, data: dict[str, Any]) -> None:
        """Take the exit STATUS, the TEXT, and the DATA of the JSON object."""
        self.status = status
        self.text = text
        self.data = data
        self.findings: list[dict[str, str]] = data["findings"]

    def about(self, *words: str) -> list[dict[str, str]]:
        """The findings in which each of the words stands, in any case."""
        return [
            finding for finding in self.findings
            if all(word.lower() in f"{finding['where']} {finding['text']}".lower()
                   for word in words)
        ]

    def errors(self) -> list[dict[str, str]]:
        """The findings that would make a request fail."""
        return [finding for finding in self.findings if finding["level"] == "error"]


def run(ask: Caller, *words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a check in one form; it may print ASCII without control characters, and no key."""
    env = {"PATH": ask.path, **how.pop("env", {})}
    done = subprocess.run(
        [*ask.command(), *words], env=env, capture_output=True, text=True, timeout=LIMIT,
        stdin=subprocess.DEVNULL, cwd=ask.folder, check=False, **how,
    )
    assert all(letter == "\n" or " " <= letter <= "~" for letter in done.stdout), done.stdout
    told = done.stdout + done.stderr
    assert KEY not in told and SECRET not in told and "a key with" not in told
    assert "Traceback" not in told
    return done


def check(ask: Caller, source: str | Path, *options: str | Path, **how: Any) -> Report:
    """Check SOURCE in both forms, which must say the same, and change nothing."""
    before = Path(source).read_bytes() if os.path.isfile(source) else b""
    text = run(ask, "--db", source, *options, "--check", **how)
    data = run(ask, "--db", source, *options, "--check", "--json", **how)
    assert text.stderr == data.stderr == ""
    assert text.returncode == data.returncode
    assert not before or Path(source).read_bytes() == before
    report = Report(text.returncode, text.stdout, json.loads(data.stdout))
    assert_same(report)
    return report


def assert_same(report: Report) -> None:
    """The text has each finding of the JSON object, and its last line the same numbers."""
    lines = report.text.splitlines()
    assert report.text.endswith("\n")
    assert isinstance(report.data["agents"], int)
    for finding in report.findings:
        assert set(finding) == {"level", "where", "text"}
        assert finding["level"] in ("error", "note")
        assert finding["where"] == "" or re.fullmatch(r"(line|row) \d+", finding["where"])
        assert any(finding["where"] in line and finding["text"].split("\n")[0] in line
                   for line in lines), (finding, report.text)
    agents, findings = report.data["agents"], len(report.findings)
    assert re.fullmatch(rf"{agents} agents?, {findings} findings?", lines[-1]), report.text
    assert report.status == (1 if report.errors() else 0)


@pytest.fixture
def sound(stores: Stores) -> Path:
    """A store in which there is nothing to find."""
    path = stores.indexed(GOOD)
    path.chmod(0o600)
    return path


def private(path: Path) -> Path:
    """Take the source from the others, which would be a finding."""
    path.chmod(0o600)
    return path


# --- nothing to find ---------------------------------------------------------------------------


def test_sound_store(ask_each: Caller, sound: Path) -> None:
    """Under each interpreter: the number of agents, and that is all."""
    report = check(ask_each, sound)
    assert report.status == 0
    assert report.text == "4 agents, 0 findings\n"
    assert report.data == {"agents": 4, "findings": []}


SOURCES: dict[str, Callable[[Stores], Path]] = {
    "csv": lambda stores: stores.csv(GOOD),
    "client.keys": lambda stores: stores.keys(GOOD),
    "tab": lambda stores: stores.text(
        "id\tname\tip\tkey\n" + "".join("\t".join(row) + "\n" for row in GOOD), "agents.tsv"
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sound_text(ask_each: Caller, stores: Stores, kind: str) -> None:
    """Every kind of source can be checked."""
    report = check(ask_each, private(SOURCES[kind](stores)))
    assert (report.status, report.data["agents"], report.findings) == (0, 4, [])


def test_imported_store_is_sound(ask: Caller, stores: Stores, tmp_path: Path) -> None:
    """What --import makes, --check finds nothing in."""
    store = tmp_path / "agents.db"
    run(ask, "--db", store, "--import", stores.csv(GOOD))
    assert check(ask, store).text == "4 agents, 0 findings\n"


def test_sample(ask: Caller, tmp_path: Path) -> None:
    """It answers as it is: no finding that makes a request fail."""
    sample = private(Path(shutil.copy(SAMPLE, tmp_path / "sample.db.sql")))
    report = check(ask, sample)
    assert report.status == 0
    assert report.data["agents"] == SAMPLE.read_text().count("\n    ('")


def test_default_source(ask: Caller, sound: Path) -> None:
    """Without --db it is $AGENT_KEY_DB, as for a request."""
    done = run(ask, "--check", env={"AGENT_KEY_DB": str(sound)})
    assert (done.returncode, done.stdout) == (0, "4 agents, 0 findings\n")


# --- the records -------------------------------------------------------------------------------

RULES = {
    "id": [("12a", "a", "any", "k"), ("000", "a", "any", "k"), ("123456789", "a", "any", "k"),
           ("", "a", "any", "k")],
    "name": [("005", "a b", "any", "k"), ("005", "", "any", "k"), ("005", "!a", "any", "k"),
             ("005", "a" * 129, "any", "k"), ("005", "ä", "any", "k"),
             ("005", "a\033[2J\n", "any", "k")],
    "ip": [("005", "a", "10.0.0.256", "k"), ("005", "a", "10.0.0.0/33", "k"),
           ("005", "a", "some.host", "k")],
    "key": [("005", "a", "any", ""), ("005", "a", "any", SECRET * 3), ("005", "a", "any", "k\tk"),
            ("005", "a", "any", "kß")],
}
BROKEN = [(field, record) for field, broken in RULES.items() for record in broken]


@pytest.mark.parametrize(("field", "record"), BROKEN)
def test_record_that_breaks_a_rule(
    ask: Caller, stores: Stores, field: str, record: Sequence[str]
) -> None:
    """It is told with its row or line, its id where that is one, and the field."""
    agents = [*GOOD, record]
    for source, place in (
        (stores.indexed(agents), "row 5"),
        (stores.csv(agents), "line 6"),
    ):
        report = check(ask, private(source))
        assert report.status == 1
        assert [finding["where"] for finding in report.errors()] == [place]
        assert field in report.errors()[0]["text"]
        if record[0] == "005":
            assert "agent 005" in report.errors()[0]["text"]


def test_every_record_that_breaks_a_rule(ask: Caller, stores: Stores) -> None:
    """Not only the first."""
    agents = [(f"{number:03d}", "a b", "any", KEY) for number in range(1, 301)]
    report = check(ask, private(stores.csv(agents)))
    assert [finding["where"] for finding in report.errors()] == [
        f"line {number}" for number in range(2, 302)
    ]


def test_line_too_short(ask: Caller, stores: Stores) -> None:
    """A text file may lack fields."""
    report = check(ask, private(stores.text("id,name,ip,key\n001,a\n002,b,any,k\n", "x.csv")))
    assert {finding["where"] for finding in report.errors()} == {"line 2"}
    report = check(ask, private(stores.text("001 a any k\n002 b\n", "client.keys")))
    assert {finding["where"] for finding in report.errors()} == {"line 2"}


def test_key_in_the_wrong_column(ask: Caller, stores: Stores) -> None:
    """Wherever it stands, it is not told; nor is a part of it."""
    shifted = [(SECRET, SECRET, SECRET, SECRET), ("006", SECRET + " ", "x" + SECRET, "001")]
    report = check(ask, private(stores.sqlite(shifted, UNTYPED_SCHEMA)))
    assert report.status == 1
    assert SECRET[:8] not in report.text


@pytest.mark.parametrize(("one", "other"), [
    (("007", "a", "any", SECRET), ("007", "b", "any", KEY)),
    (("7", "a", "any", SECRET), ("007", "b", "any", KEY)),
])
def test_id_that_occurs_twice(
    ask: Caller, stores: Stores, one: Sequence[str], other: Sequence[str]
) -> None:
    """A request for it is answered with error 5."""
    source = private(stores.csv([*GOOD, one, other]))
    assert ask("id", "007", db=source).error == 5
    report = check(ask, source)
    assert report.status == 1
    assert [finding for finding in report.about("007", "id") if finding["level"] == "error"]
    assert report.about("line 7")


def test_name_that_occurs_twice(ask: Caller, stores: Stores) -> None:
    """The manager keeps one agent of a name."""
    report = check(ask, private(stores.csv([*GOOD, ("007", "my_agent", "any", "k")])))
    assert report.about("line 6", "name")


SAME_ADDRESS = [
    ("10.9.9.9", "10.9.9.9"),
    ("10.9.9.9", "10.9.9.9/32"),
    ("10.9.9.9", "::ffff:10.9.9.9"),
    ("10.9.9.5/24", "10.9.9.0/24"),
    ("10.9.9.0/255.255.255.0", "10.9.9.0/24"),
    ("fe80::1", "FE80:0::0001"),
    ("2001:db8:9::/48", "2001:DB8:9:1::5/48"),
]


@pytest.mark.parametrize(("one", "other"), SAME_ADDRESS)
@pytest.mark.parametrize("kind", ["csv", "indexed"])
def test_address_that_occurs_twice(
    ask: Caller, stores: Stores, one: str, other: str, kind: str
) -> None:
    """A request for it is answered with error 5."""
    agents = [*GOOD, ("007", "a", one, SECRET), ("008", "b", other, KEY)]
    source = private(getattr(stores, kind)(agents))
    asked = {"10": "10.9.9.9", "fe": "fe80::1", "20": "2001:db8:9::77"}[one[:2]]
    assert ask("ip", asked, db=source).error == 5
    report = check(ask, source)
    assert report.status == 1
    assert [finding for finding in report.about("agent 008") if finding["level"] == "error"]


def test_any_may_occur_as_often_as_it_likes(ask: Caller, stores: Stores) -> None:
    """And so may a network inside another, and a key."""
    agents = [("001", "a", "any", "k"), ("002", "b", "", "k"), ("003", "c", "10.0.0.0/8", "k"),
              ("004", "d", "10.0.0.0/16", "k"), ("005", "e", "10.0.0.0", "k")]
    assert check(ask, private(stores.indexed(agents))).text == "5 agents, 0 findings\n"


def test_ids_missing_their_zeros(ask: Caller, stores: Stores) -> None:
    """In a text file they are read as meant; in a database a request finds no such text."""
    agents = [*GOOD, ("7", "a", "any", "k"), ("08", "b", "any", "k")]
    source = private(stores.csv(agents))
    report = check(ask, source)
    assert report.status == 0
    assert report.about("line 6", "zero") and report.about("line 7", "zero")
    source = private(stores.indexed(agents))
    assert ask("id", "007", db=source).error == 4
    report = check(ask, source)
    assert report.status == 1
    assert report.about("row 5", "zero") and report.about("row 6", "zero")


def test_numbers_as_ids_are_fine(ask: Caller, stores: Stores) -> None:
    """They have no zeros to miss, and a request finds them."""
    source = private(stores.sqlite([(1, "a", "any", "k"), (1000, "b", "any", "k")],
                                   UNTYPED_SCHEMA))
    assert ask("id", "001", db=source).error == 0
    assert check(ask, source).status == 0


@pytest.mark.parametrize("ip", ["10.1.0.5/16", "10.1.0.5/255.255.0.0", "2001:db8::1/32"])
def test_network_with_host_bits(ask: Caller, stores: Stores, ip: str) -> None:
    """It is answered as it is stored, so this is no error."""
    report = check(ask, private(stores.indexed([*GOOD, ("007", "a", ip, "k")])))
    assert report.status == 0
    assert report.about("row 5", "host bits")


def test_128_bytes(ask: Caller, stores: Stores) -> None:
    """MANAGER.md: the manager reads a name or key of 128 bytes back with 127."""
    agents = [*GOOD, ("007", "n" * 128, "any", "k"), ("008", "b", "any", "K" * 128)]
    report = check(ask, private(stores.indexed(agents)))
    assert report.status == 0
    assert report.about("row 5", "name", "127") and report.about("row 6", "key", "127")
    assert "KKKK" not in report.text
    assert len(report.findings) == 2


def test_agent_with_the_managers_own_name(ask: Caller, stores: Stores) -> None:
    """The manager refuses it; a name that only begins so is another's."""
    host = platform.node()
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,120}", host):
        pytest.skip("this host's name could not be an agent's")
    agents = [*GOOD, ("007", host, "any", "k"), ("008", host + "-2", "any", "k")]
    report = check(ask, private(stores.indexed(agents)))
    assert report.about("row 5", "manager", host)
    assert not report.about("row 6")


# --- the source --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("mode", [0o644, 0o604])
def test_source_that_others_may_read(ask: Caller, stores: Stores, kind: str, mode: int) -> None:
    """Keys are secrets. Requests are answered all the same."""
    source = SOURCES[kind](stores)
    source.chmod(mode)
    report = check(ask, source)
    assert report.about("read")
    assert report.status == 0


def test_database_that_others_may_read(ask: Caller, sound: Path) -> None:
    """The same for a database."""
    sound.chmod(0o644)
    assert check(ask, sound).about("read")


@pytest.mark.parametrize("mode", [0o602, 0o666])
@pytest.mark.parametrize("kind", ["csv", "indexed"])
def test_source_that_others_may_write(ask: Caller, stores: Stores, kind: str, mode: int) -> None:
    """Anybody could enrol agents: every request is refused."""
    source = getattr(stores, kind)(GOOD)
    source.chmod(mode)
    assert ask("id", "001", db=source).error == 2
    report = check(ask, source)
    assert report.status == 1
    assert report.about("writ")


MISSING_INDEXES = {
    "all": PLAIN_SCHEMA,
    "agent_network": PLAIN_SCHEMA + "; CREATE INDEX agent_id ON agent (id);"
    " CREATE INDEX agent_ip ON agent (ip);",
    "agent_id": SAMPLE.read_text() + "; DELETE FROM agent; DROP INDEX agent_id;",
    "agent_ip": SAMPLE.read_text() + "; DELETE FROM agent; DROP INDEX agent_ip;",
}


@pytest.mark.parametrize("gone", MISSING_INDEXES)
def test_database_without_indexes(ask: Caller, stores: Stores, gone: str) -> None:
    """The lines that it prints are the cure, as they stand."""
    source = private(stores.sqlite(GOOD, MISSING_INDEXES[gone]))
    report = check(ask, source)
    assert report.status == 0
    assert report.about("index")
    told = "\n".join(cures(finding["text"]) for finding in report.findings)
    for statements in (cures(report.text), told):
        names = set(re.findall(r"CREATE INDEX (\w+)", statements))
        assert names == ({"agent_id", "agent_ip", "agent_network"} if gone == "all" else {gone})
    with contextlib.closing(sqlite3.connect(source)) as database:
        database.executescript(cures(report.text))
    assert check(ask, source).text == "4 agents, 0 findings\n"
    assert ask("ip", "10.20.30.77", db=source).data["id"] == "003"


def cures(text: str) -> str:
    """The CREATE INDEX statements in a text; one may go over several lines."""
    return "\n".join(re.findall(r"CREATE INDEX[^;]*;", text))


def test_view_has_no_indexes_of_its_own(ask: Caller, stores: Stores) -> None:
    """A statement that cannot be executed is no cure."""
    schema = ("CREATE TABLE host (number, label, address, secret);"
              "CREATE VIEW agent AS SELECT number AS id, label AS name, address AS ip,"
              " secret AS agent_key FROM host;"
              "CREATE TRIGGER fill INSTEAD OF INSERT ON agent BEGIN"
              " INSERT INTO host VALUES (NEW.id, NEW.name, NEW.ip, NEW.agent_key); END")
    report = check(ask, private(stores.sqlite(GOOD, schema)))
    assert (report.status, report.data["agents"]) == (0, 4)
    assert "ON agent" not in cures(report.text)


UNREADABLE: dict[str, Callable[[Stores], Path]] = {
    "missing": lambda stores: stores.folder / "nowhere.db",
    "a folder": lambda stores: stores.folder,
    "not a key source": lambda stores: stores.text("Dear all,\n", "letter.txt"),
    "a CSV without keys": lambda stores: stores.text("id,name,ip\n001,a,any\n", "a.csv"),
    "another table": lambda stores: stores.text("CREATE TABLE other (id);", "other.sql"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_source_that_cannot_be_read(ask: Caller, stores: Stores, what: str) -> None:
    """Every request would fail, so that is the finding."""
    report = check(ask, UNREADABLE[what](stores))
    assert report.status == 1
    assert len(report.errors()) == 1


def test_damaged_database(ask: Caller, stores: Stores) -> None:
    """As an interrupted copy leaves it."""
    source = private(stores.indexed(
        Record(f"{number}", f"a{number}", "any", "k" * 60) for number in range(1000, 6000)))
    os.truncate(source, source.stat().st_size // 2)
    assert check(ask, source).status == 1


def test_locked_database(
    ask: Caller, sound: Path, locked: Callable[[Path], None]
) -> None:
    """It does not wait for ever."""
    locked(sound)  # not `check`: to read the file here would end this process's lock
    done = run(ask, "--db", sound, "--timeout", "1", "--check")
    assert done.returncode == 1
    assert "locked" in done.stdout


def test_source_that_one_may_not_read(
    ask: Caller, open_folder: Path, sound: Path, nobody: int
) -> None:
    """The manager's root may, this user may not."""
    source, script = open_folder / "agents.db", open_folder / "script.py"
    shutil.copy(sound, source)
    shutil.copy(ask.command()[0], script)
    source.chmod(0o600)
    done = subprocess.run(
        ["/bin/sh", script, "--db", source, "--check"], user=nobody, group=nobody,
        extra_groups=[], env={"PATH": os.defpath}, cwd="/", capture_output=True, text=True,
        timeout=LIMIT, check=False,
    )
    assert done.returncode == 1
    assert "ermission" in done.stdout


def test_many_agents(ask: Caller, stores: Stores) -> None:
    """100,000 of them, one of them bad, and no interest in the others."""
    agents = [tuple(record) for record in records(100_000)]
    agents[77_776] = ("77777", "bad name", "any", "k")
    report = check(ask, private(stores.indexed(agents)))
    assert report.data["agents"] == 100_000
    assert [finding["where"] for finding in report.findings] == ["row 77777"]


# --- the server --------------------------------------------------------------------------------


def test_server_that_answers(ask: Caller, sound: Path, open_folder: Path) -> None:
    """That it does, what the manager would see, and how long it took."""
    path = open_folder / "s"
    with serving(sound, path):
        report = check(ask, sound, "--socket", path)
    assert (report.status, report.findings) == (0, [])
    assert isinstance(report.data["server"], dict)
    lines = report.text.splitlines()
    told = next(line for line in lines if "server" in line.lower() or str(path) in line)
    assert re.search(r"\d(\.\d+)? ?m?s\b", told), told
    assert len(lines) >= 2


def test_no_server(ask: Caller, sound: Path, open_folder: Path) -> None:
    """Nothing is there, or only what a dead one left: the manager would wait six seconds."""
    path = open_folder / "s"
    assert check(ask, sound, "--socket", path).errors()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert check(ask, sound, "--socket", path).errors()
    path.unlink()
    path.write_text("")
    assert check(ask, sound, "--socket", path).errors()


@contextlib.contextmanager
def impostor(path: Path, answer: bytes | None) -> Iterator[None]:
    """A server that gives the same ANSWER to everything, and for None stays silent."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(100)
    held = []

    def work() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None:
                with contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer)
                connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in held:
            connection.close()


IMPOSTORS = {
    "closes without a word": b"",
    "no JSON": b"hello\n",
    "no object": b"[]\n",
    "half an object": b'{"error": 4, "mess',
    "a number that kills the manager": b'{"error": 0, "data": {"id": 1, "name": "a",'
    b' "ip": "any", "key": "' + SECRET.encode() + b'"}}\n',
    "no key": b'{"error": 0, "data": {"id": "001", "name": "a", "ip": "any"}}\n',
    "an error that is a text": b'{"error": "4", "message": "No agent key found"}\n',
    "an unreadable source": b'{"error": 2, "message": "Cannot read key source: gone"}\n',
}


@pytest.mark.parametrize("what", IMPOSTORS)
def test_server_with_a_wrong_answer(
    ask: Caller, sound: Path, open_folder: Path, what: str
) -> None:
    """What the manager would make of it is an error; a key in it is not told."""
    path = open_folder / "s"
    with impostor(path, IMPOSTORS[what]):
        report = check(ask, sound, "--socket", path)
    assert report.errors(), report.text


def test_server_that_is_silent(ask: Caller, sound: Path, open_folder: Path) -> None:
    """It takes the connection and never answers: the check ends all the same."""
    path = open_folder / "s"
    started = time.monotonic()
    with impostor(path, None):
        report = check(ask, sound, "--socket", path, "--timeout", "2")
    assert report.errors()
    assert time.monotonic() - started < LIMIT / 2  # two runs of it
