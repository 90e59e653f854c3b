"""A live MySQL, MariaDB or PostgreSQL as the key source: real servers, and each of the drivers."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import serving
from conftest import KEY, SAMPLE, SCRIPT, Caller, Python, Stores, interpreters, script
from database_servers import (
    COLUMNS,
    DRIVERS,
    INDEXES,
    OWNER,
    PASSWORD,
    descendants,
    die_with_parent,
    free_port,
    has_driver,
    lone_python,
    missing,
    running,
    write_private,
)
from manager import Answer, ask_socket, check_answer
from serving import LIMIT

QUICK = 20.0  # seconds within which an answer comes whose deadline is one
DRIVER_NAMES = [name for names in DRIVERS.values() for name in names]
WRONG = "wr0ng-passw0rd"


# ------------------------------------------------------------------------------- hosts and servers


class Host:
    """A host with one driver, its database server, and servers of ours."""

    def __init__(self, driver: str, folder: Path) -> None:
        """Make it, or skip the test."""
        self.driver, self.folder = driver, folder
        self.started: list[Served] = []
        self.scheme = next(scheme for scheme, names in DRIVERS.items() if driver in names)
        if missing(self.scheme):
            pytest.skip(f"not installed: {missing(self.scheme)}")
        found = [python for python in interpreters() if has_driver(python.path, driver)]
        if not found:
            pytest.skip(f"no interpreter here has {driver} in its site-packages")
        self.server = running(self.scheme)
        folder.mkdir()
        copy = lone_python(found[0].path, folder / "python", driver)
        self.ask_file = Caller(Python(str(copy), found[0].version), folder)

    def ask(self, *words: str, url: str = "", **how: Any) -> Answer:
        """Ask the database by the executable method; no answer tells a password."""
        return tells_nothing(self.ask_file(*words, db=url or self.server.url(), **how))

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the script as a person does; neither stream tells a password."""
        return run_command(self.ask_file, *words)

    def start(self, *options: str) -> Served:
        """A server of ours, which ends with the tests; it need not be ready yet."""
        path = self.folder / f"socket-{len(self.started)}"
        command = serving.serve_command(
            self.server.url(), path, *options, python=self.ask_file.python
        )
        self.started.append(Served(command, path, preexec_fn=die_with_parent))
        return self.started[-1]

    @functools.cached_property
    def served(self) -> Served:
        """One for all tests, with one worker, who must never need to be replaced."""
        return self.start("--workers", "1", "--timeout", "30").ready()


class Served(serving.Server):
    """A running `--serve` of ours."""

    def ready(self) -> Served:
        """Wait until it is; these are the workers that it must end with."""
        self.wait_line("ready")
        self.first_workers = self.workers
        return self

    def answer(self, *words: str) -> Answer:
        """Ask it as the manager does; no answer tells a password."""
        return tells_nothing(check_answer(ask_socket(self.path, ":".join(words), LIMIT)))

    def is_as_it_was(self) -> bool:
        """End it, and tell whether all went well until then."""
        workers = self.workers
        self.send(signal.SIGTERM)
        try:
            self.end()
            tells_nothing("".join(self.lines))
        finally:
            self.kill()
        return workers == self.first_workers


@pytest.fixture(scope="module")
def make_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Host]]:
    """Makes the host with a driver; each is made once."""
    folder, hosts = tmp_path_factory.mktemp("hosts"), []

    @functools.cache
    def make(driver: str) -> Host:
        hosts.append(Host(driver, folder / driver))
        return hosts[-1]

    yield make
    for host in hosts:
        host.server.ready()
    assert all(at_once(served.is_as_it_was for host in hosts for served in host.started))


@pytest.fixture(params=DRIVER_NAMES)
def host(request: pytest.FixtureRequest, make_host: Callable[[str], Host]) -> Iterator[Host]:
    """The host with each driver in turn."""
    made = make_host(request.param)
    made.server.ready()
    yield made


@pytest.fixture(params=DRIVERS)
def hosts(request: pytest.FixtureRequest, make_host: Callable[[str], Host]) -> list[Host]:
    """For each kind of server the hosts with a driver for it: what takes time, all do at once."""
    found = []
    for driver in DRIVERS[request.param]:
        with contextlib.suppress(pytest.skip.Exception):
            found.append(make_host(driver))
    if not found:
        pytest.skip(f"no {request.param} server, or no driver for it")
    found[0].server.ready()
    return found


@pytest.fixture
def a_host(hosts: list[Host]) -> Host:
    """For each kind of server one host, where the driver is no matter."""
    return hosts[0]


def at_once(tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """What the tasks give, which run side by side."""
    with ThreadPoolExecutor(16) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def tells_nothing(told: Any) -> Any:
    """Assert that no password of this file is in an answer or text, and give it back."""
    text = told.output.decode() if isinstance(told, Answer) else told
    for secret in (PASSWORD, WRONG):
        assert secret not in text and secret[:6] not in text, text
    return told


def run_command(ask: Caller, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script as a person does; neither stream tells a password."""
    done = subprocess.run(
        [*ask.command(), *words],
        env={"PATH": ask.path},
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT,
        cwd=ask.folder,
        check=False,
    )
    tells_nothing(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
    return done


# -------------------------------------------------------------------------------- the same answers

ROWS = (
    ("001", "my_agent", "192.168.1.100", KEY),
    ("002", "anywhere", "any", "k"),
    ("003", "null-ip", None, "k"),
    ("004", "empty-ip", "", "k"),
    ("005", "office", "10.20.30.0/24", "a key with spaces"),
    ("006", "gateway", "10.20.0.0/16", "k"),
    ("007", "inside", "10.20.30.64/26", "k"),
    ("008", "web-v6", "2001:db8::10", "k"),
    ("009", "lab-v6", "2001:db8:1::/48", "k"),
    ("010", "capitals-v6", "2001:DB8:3::A", "k"),
    ("011", "host-bits", "10.90.1.77/20", "k"),
    ("012", "everything", "0.0.0.0/0", "k"),
    ("014", "same-id", "10.50.0.1", "k"),
    ("014", "same-id-too", "10.50.0.2", "k"),
    ("015", "same-ip", "10.60.0.1", "k"),
    ("016", "same-ip-too", "10.60.0.1/32", "k"),
    ("017", "bad name", "10.70.0.1", "k"),
    ("018", "empty-key", "10.70.0.2", ""),
    ("019", "null-key", "10.70.0.3", None),
    (" 020 ", "padded", " 10.70.0.4 ", "k"),
    ("7", "no-zeros", "10.70.0.5", "k"),
    ("21", "no-zeros-either", "10.70.0.6", "k"),
    ("00a", "letters", "10.70.0.7", "k"),
    ("12345678", "long-id", "10.70.0.8", "k"),
    ("024", "like-a-format", "10.70.0.9", "%s %(a)s %% back\\slash 'q' \"d\" ? $1 {} :x"),
    ("025", "n" * 128, "10.70.0.10", "k" * 128),
    ("026", "long-key", "10.70.0.11", "k" * 129),
    ("027", "umlaut", "10.70.0.12", "schl\u00fcssel"),
    ("028", "newline\nin-it", "10.70.0.13", "k"),
)
REQUESTS = [("id", "%03d" % number) for number in range(1, 30)]
REQUESTS += [("id", id) for id in ("12345678", "99999999", "0007", "021", "00a")]
REQUESTS += [("ip", "10.70.0.%d" % number) for number in range(14)]
REQUESTS += [
    ("ip", ip)
    for ip in (
        "192.168.1.100",
        "192.168.1.1",
        "10.20.30.65",
        "10.20.30.1",
        "10.20.1.1",
        "10.21.0.1",
        "10.50.0.1",
        "10.60.0.1",
        "10.90.1.77",
        "8.8.8.8",
        "::ffff:10.20.30.65",
        "2001:db8::10",
        "2001:DB8:0:0::0010",
        "2001:db8:1:2::3",
        "2001:db8:2::1",
        "2001:db8:3::a",
        "::1",
    )
]


def assert_same_answers(host: Host, store: Path, requests: Sequence[tuple[str, str]]) -> None:
    """Those of our server over the database are those from an SQLite file, byte for byte."""
    source = script.open_source(str(store), LIMIT)
    for request in requests:
        expected = script.answer(list(request), lambda: source).line()
        assert host.served.answer(*request).output == expected, request


def test_same_answers_as_from_sqlite(host: Host, stores: Stores) -> None:
    """Every rule; and by the executable method, over the unix socket, too."""
    host.server.load(ROWS)
    assert_same_answers(host, stores.sqlite(ROWS), REQUESTS)
    urls = host.server.url(), host.server.socket_url()
    for request, url in zip((("id", "001"), ("ip", "10.20.30.65")), urls):
        assert host.ask(*request, url=url).output == host.served.answer(*request).output


TYPES = {
    "mysql": {
        "INT": "id INT UNSIGNED, name TEXT, ip TEXT, agent_key BLOB",
        "DECIMAL": COLUMNS.replace("id VARCHAR(8)", "id DECIMAL(10, 2)"),
        "CHAR": COLUMNS.replace("VARCHAR", "CHAR"),
        "BINARY": COLUMNS.replace("VARCHAR", "VARBINARY"),
        "latin1": COLUMNS.replace(")", ") CHARACTER SET latin1"),
    },
    "postgresql": {
        "INT": "id INTEGER, name TEXT, ip TEXT, agent_key BYTEA",
        "DECIMAL": COLUMNS.replace("id VARCHAR(8)", "id NUMERIC(10, 2)"),
        "CHAR": COLUMNS.replace("VARCHAR", "CHAR"),
        "BINARY": "id BYTEA, name BYTEA, ip BYTEA, agent_key BYTEA",
        "inet": COLUMNS.replace("ip VARCHAR(64)", "ip INET"),
        "cidr": COLUMNS.replace("ip VARCHAR(64)", "ip CIDR"),
    },
}


def test_column_types(host: Host, stores: Stores) -> None:
    """Numbers, padded and binary columns, and PostgreSQL's addresses, as they are."""
    for kind, columns in TYPES[host.scheme].items():
        rows: list[tuple[Any, ...]] = [
            ("001", "my_agent", "192.168.1.100", KEY),
            ("020", "network", "10.20.0.0/16", "k"),
            ("300", "v6", "2001:db8::10", "k"),
            ("12345678", "v6-network", "2001:db8:1::/48", "k"),
        ]
        store = stores.sqlite(rows, name=kind)
        if kind in ("INT", "DECIMAL"):
            rows = [(int(row[0]), *row[1:]) for row in rows]
        host.server.load(rows, columns, indexes="")
        assert_same_answers(
            host,
            store,
            [
                *(("id", id) for id in ("001", "020", "300", "12345678", "100", "002")),
                *(
                    ("ip", ip)
                    for ip in (
                        "192.168.1.100",
                        "10.20.3.4",
                        "10.21.0.1",
                        "2001:db8::10",
                        "2001:db8:1::2",
                        "2001:db8:2::2",
                    )
                ),
            ],
        )


def test_view_over_another_schema(a_host: Host, stores: Stores) -> None:
    """Another schema is served through a view, as with SQLite."""
    a_host.server.load(ROWS)
    a_host.server.view("SELECT id, name, ip, agent_key FROM host")
    assert_same_answers(a_host, stores.sqlite(ROWS), REQUESTS)


FIND = """
import sys
from importlib.machinery import SourceFileLoader
script = SourceFileLoader("script", sys.argv[1]).load_module()
source = script.Database(sys.argv[2], 60)
for text in eval(sys.argv[3]):
    for field in ("id", "ip"):
        assert source.find(field, [text, text]) == [], (field, text)
assert len(source.find("name", ["x' OR '1'='1", "a%s", "b\\\\'"])) == 3
assert script._signal.getitimer(script.ITIMER_REAL) == (0, 0)
print("found", end="")
"""
INJECTIONS = (
    "001' OR '1'='1",
    "001'--",
    "' UNION SELECT 1,2,3,4 -- ",
    "';DROP TABLE agent; --",
    "00%",
    "___",
    "001\\",
    "\\' OR 1=1 -- ",
    '001" OR "1"="1',
    "%s",
    "%(x)s",
    "%%",
    "?",
    "$1",
    ":id",
    "{0}",
    "001/*",
    "001`",
)


def test_values_are_not_statements(host: Host) -> None:
    """Even if a request had let them through: they are compared, and nothing else."""
    host.server.load(
        [
            ("001", "x' OR '1'='1", "any", "k"),
            ("002", "a%s", "any", "k"),
            ("003", "b\\'", "any", "k"),
        ]
    )
    code = FIND.replace("script._signal.getitimer", "__import__('signal').getitimer")
    done = subprocess.run(
        [host.ask_file.python.path, "-IBSc", code, SCRIPT, host.server.url(), repr(INJECTIONS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr[-500:]) == ("found", "")
    assert host.server.sql("SELECT count(*) FROM agent").strip() == "3"


WRITING = {  # views that write when they are read
    "mysql": "CREATE TABLE witness (n INT);\nDELIMITER //\nCREATE FUNCTION odd(k TEXT) RETURNS "
    "TEXT BEGIN INSERT INTO witness VALUES (1); RETURN k; END//\nDELIMITER ;\n",
    "postgresql": "CREATE TABLE witness (n INT); CREATE FUNCTION odd(k TEXT) RETURNS TEXT LANGUAGE "
    "plpgsql AS $$ BEGIN INSERT INTO witness VALUES (1); RETURN k; END $$;",
}


def test_session_only_reads(host: Host) -> None:
    """Even for a user who may do anything."""
    server = host.server
    server.load(ROWS[:1])
    server.view("SELECT id, name, ip, odd(agent_key) AS agent_key FROM host", WRITING[host.scheme])
    assert KEY in server.sql("SELECT agent_key FROM agent")
    assert server.sql("SELECT count(*) FROM witness").strip() == "1", "the view must write"
    url = server.url(user=OWNER)
    assert [host.ask(*request, url=url).error for request in REQUESTS[:1]] == [2]
    assert server.sql("SELECT count(*) FROM witness").strip() == "1"


# ------------------------------------------------------------------------------------- the indexes


def test_sample_loads_unchanged_and_is_looked_up(hosts: list[Host], stores: Stores) -> None:
    """The same agents as in SQLite; 33 texts cost as many looks into an index."""
    server = hosts[0].server
    server.sql(server.dropping() + SAMPLE.read_text() + server.granting())
    rows = sqlite3.connect(":memory:")
    rows.executescript(SAMPLE.read_text())
    requests = [("id", "%03d" % number) for number in range(1, 8)] + [
        ("ip", ip)
        for ip in (
            "192.168.1.100",
            "10.20.30.4",
            "10.20.3.4",
            "2001:db8::10",
            "2001:db8:1::7",
            "8.8.8.8",
        )
    ]
    store = stores.sqlite(rows.execute(script.ROWS))
    for host in hosts:
        assert_same_answers(host, store, requests)
    numbers = {
        "mysql": "SELECT seq AS n FROM seq_1007_to_30000",
        "postgresql": "SELECT generate_series(1007, 30000) AS n",
    }[server.scheme]
    analyze = {"mysql": "ANALYZE TABLE agent", "postgresql": "ANALYZE agent"}[server.scheme]
    server.sql(
        "INSERT INTO agent (id, name, ip, agent_key) SELECT n, concat('a', n), "
        f"concat('10.0.0.', n), 'k' FROM ({numbers}) AS numbers; {analyze};"
    )
    for request in (["id", "007"], ["ip", "10.20.30.4"]):
        field, texts = script.parse_request(request)
        assert len(texts) == (33 if field == "ip" else 3)
        query = script.query_for(field, "%s", len(texts)) % tuple(map(server.literal, texts))
        plan = server.sql("EXPLAIN " + query)
        if server.scheme == "postgresql":
            assert "Index" in plan and "Seq Scan" not in plan, plan
        else:  # id, select_type, table, type, possible_keys, key, key_len, ref, rows, Extra
            columns = plan.strip().split("\t")
            assert columns[3] == "range" and int(columns[8]) <= len(texts), plan


STATEMENT = re.compile(r"CREATE INDEX [^;]*;")


def test_check_names_the_missing_indexes(host: Host) -> None:
    """Its statements make them; others that have the fields, or another table, are no help."""
    server = host.server
    server.load(ROWS[:3], indexes="CREATE INDEX agent_name ON agent (name, id, ip);")
    server.sql(
        f"DROP SCHEMA IF EXISTS other{' CASCADE' * (server.scheme == 'postgresql')};"
        f"CREATE SCHEMA other; CREATE TABLE other.agent ({COLUMNS});"
        + INDEXES.replace("ON agent", "ON other.agent")
        + server.granting().replace("ON agent", "ON other.agent")
    )
    done = host.run("--db", server.url(), "--check")
    assert STATEMENT.findall(done.stdout) == [
        "CREATE INDEX agent_id ON agent (id);",
        "CREATE INDEX agent_ip ON agent (ip);",
    ]
    assert done.stdout.splitlines()[-1] == "3 agents, 0 errors, 2 notes"
    server.sql("".join(STATEMENT.findall(done.stdout)))
    done = host.run("--db", server.url(), "--check")
    assert (done.returncode, done.stdout) == (0, "3 agents, 0 errors, 0 notes\n")


def test_check_of_a_view_asks_for_no_index(a_host: Host) -> None:
    """A view takes none."""
    a_host.server.load(ROWS[:3], indexes="")
    a_host.server.view("SELECT id, name, ip, agent_key FROM host")
    done = a_host.run("--db", a_host.server.url(), "--check")
    assert (done.returncode, done.stdout) == (0, "3 agents, 0 errors, 0 notes\n")


def test_check_of_broken_rows(a_host: Host) -> None:
    """The findings are those of any other source."""
    a_host.server.load([*ROWS[:3], ("004", "bad name", "any", KEY), ("001", "twin", "any", KEY)])
    done = a_host.run("--db", a_host.server.url(), "--check")
    assert done.returncode == 1 and KEY not in done.stdout
    assert re.search(r"^error: row 4: agent 004: name", done.stdout, re.MULTILINE)
    assert re.search(r"^error: row 5: agent 001: id is already", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "5 agents, 2 errors, 0 notes"


# ------------------------------------------------------------------------------- URLs and passwords

SOUND = {
    "mysql://u@h/d": ("mysql://u@h/d", {"user": "u", "host": "h", "database": "d"}),
    "postgresql://u@h/d": ("postgresql://u@h/d", {"user": "u", "host": "h", "dbname": "d"}),
    "mysql://h": ("mysql://h/", {"host": "h"}),
    "mysql://": ("mysql:///", {}),
    "postgresql:///d": ("postgresql:///d", {"dbname": "d"}),
    "postgresql:///?service=agents": ("postgresql:///", {"service": "agents"}),
    "mysql://h:3307/d": ("mysql://h/d", {"host": "h", "port": 3307, "database": "d"}),
    "mysql://u@[2001:db8::1]:3307/d": (
        "mysql://u@[2001:db8::1]/d",
        {"user": "u", "host": "2001:db8::1", "port": 3307, "database": "d"},
    ),
    "mysql://u%40x%2F@h/d%3F": (
        "mysql://u%40x%2F@h/d%3F",
        {"user": "u@x/", "host": "h", "database": "d?"},
    ),
    "postgresql://%2Frun%2Fpg/d": (
        "postgresql://%2Frun%2Fpg/d",
        {"host": "/run/pg", "dbname": "d"},
    ),
    "mysql://u@h/d?unix_socket=/run/s+1&read_default_file=/etc/a%20b": (
        "mysql://u@h/d",
        {
            "user": "u",
            "host": "h",
            "database": "d",
            "unix_socket": "/run/s+1",
            "read_default_file": "/etc/a b",
        },
    ),
    "postgresql://u@h/d?passfile=/etc/p&sslmode=require&host=/run": (
        "postgresql://u@h/d",
        {"user": "u", "host": "/run", "dbname": "d", "passfile": "/etc/p", "sslmode": "require"},
    ),
}


@pytest.mark.parametrize("url", SOUND)
def test_sound_url(url: str) -> None:
    """What goes to the driver, and what people see: nothing of the query."""
    shown, options = SOUND[url]
    assert script.parse_url(url) == (url.partition(":")[0], shown, options)


HOSTILE = [
    "mysql://u:piece@h/d",
    "postgresql://u:piece@h/d",
    "mysql://:piece@h/d",
    "mysql://u:@piece/d?piece",
    "mysql://u:piece@piece@h/d",
    "mysql://u:pie%40piece@h/d",
    "mysql://u:piece#piece/piece?piece@h/d",
    "postgresql://u:piece?piece@h/d",
    "mysql://u:12@piece/d@h",
    "mysql://u:12/piece@h/d",
    "mysql://u:12?piece=x@h/d",
    "mysql://u:12345@piece@h/d",
    "mysql://u@h:piece/d",
    "mysql://u@h:123456/piece",
    "mysql://u@h/d/piece",
    "mysql://u@h/d#piece",
    "mysql://u@h/d?x=1#piece",
    "mysql://u@h/d?x=piece@h/d",
    "mysql:/u:piece@h/d",
    "mysql:u:piece@h/d",
    "mysql:piece",
    "postgresql:u:piece@h/d",
    "postgresql:/piece",
    "mysqll://u:piece@h/d",
    "MYSQL://u:piece@h/d",
    "postgres://u:piece@h/d",
    "https://u:piece@h/d",
    "jdbc:mysql://u:piece@h/d",
    "mysql+pymysql://u:piece@h/d",
    "://piece",
    "mysql://[u:piece@h/d",
    "mysql://u@h/d?password=piece",
    "mysql://u@h/d?passwd=piece",
    "postgresql://u@h/d?password=piece",
    "mysql://u@h/d?x=1&password=piece",
    "mysql://u@h/d?%70assword=piece",
    "mysql://u@h/d?PASSWORD=piece",
    "mysql://u@h/d?password1=piece",
    "postgresql://u@h/d?sslpassword=piece",
    "mysql://u@h/d?local_infile=1",
    "mysql://u@h/d?allow_local_infile=1",
    "mysql://u@h/d?allow_local_infile_in_path=/",
    "mysql://u%3Apiece@h/d",
    "postgresql://u%3apiece@h/d",
    "mysql://u%3Apiece",
    "postgresql://u%3apiece/d",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_url_that_may_hold_a_password(url: str) -> None:
    """Nobody knows where it would end: nothing is shown, and the way to do it is."""
    assert script.is_url(url)
    with pytest.raises(script.Reply) as caught:
        script.Database(url, 1)
    assert caught.value.number == 2
    for word in ("mysql://user@host/", "without a password", "read_default_file=", "passfile="):
        assert word in caught.value.message
    assert "piece" not in caught.value.message


def test_a_file_is_no_url() -> None:
    """A path that looks like one is meant as one where it starts as paths do."""
    for name in ("/mysql://u@h/d", "./mysql:x", "../a://b", "mysql", "agents.db", "/a.sql"):
        assert not script.is_url(name), name


REFUSED = ("mysql://u:piece@h/d", "postgresql://u@h/d?password=piece")
COMMANDS = (
    ["--check"],
    ["--check", "--json"],
    ["--serve", "--socket", "s"],
    ["--enroll"],
    ["--import", str(SAMPLE)],
)


@pytest.mark.parametrize("url", REFUSED)
def test_refused_url_by_any_command(ask: Caller, url: str) -> None:
    """Error 2 with status 0 for a request, a status for a command, and never a word of it."""
    words = [["--db", url, *command] for command in COMMANDS] + [["--db", "a.db", "--import", url]]
    answer, *done = at_once(
        [
            lambda: ask("id", "001", db=url),
            *(functools.partial(run_command, ask, *line) for line in words),
        ]
    )
    assert answer.error == 2 and "without a password" in answer.message
    assert b"piece" not in answer.output
    for line, command in zip(words, done):
        assert command.returncode in (1, 2), line
        assert command.stdout + command.stderr, line
        assert "piece" not in command.stdout + command.stderr, line
    assert os.listdir(ask.folder) == []


BROKEN = {  # nobody knows then what is a password; drivers quote the line
    "mysql": (
        "password = %s\n",
        "[client\npassword = %s\n",
        "[client]\npassword\n = %s\n",
        "[connector_python]\npassword %s\n",
    ),
    "postgresql": ("%s\n", "*:*:*:*\n:%s\n"),
}


def test_password_file(host: Host, tmp_path: Path) -> None:
    """The right one works (all other tests); a wrong, missing or broken one does not."""
    server = host.server
    server.load(ROWS[:1])
    wrong = write_private(tmp_path / "wrong", server.secrets_form % WRONG)
    files = [
        wrong,
        str(tmp_path / "missing"),
        *(
            write_private(tmp_path / str(number), form % PASSWORD)
            for number, form in enumerate(BROKEN[server.scheme])
        ),
    ]
    urls = [server.url(**{server.secrets_parameter: file}) for file in files]
    answers = at_once(functools.partial(host.ask, "id", "001", url=url) for url in urls)
    assert {answer.error for answer in answers} == {2}
    message = answers[0].message
    assert f"{server.scheme}://agent_reader@127.0.0.1/wazuh: " in message
    assert re.search("denied|authentication failed", message), message


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_warning_of_a_library_is_not_in_the_answer(
    make_host: Callable[[str], Host], tmp_path: Path, driver: str
) -> None:
    """The manager reads stderr, too, where libpq tells of a password file that others may read."""
    host = make_host(driver)
    path = Path(write_private(tmp_path / "open", host.server.secrets_form % PASSWORD))
    path.chmod(0o644)
    url = host.server.ready().url(passfile=str(path))
    assert host.ask("id", "001", url=url).error == 2  # nothing but JSON, or it would not be one
    assert str(path) in host.run("--db", url, "--check").stderr, "libpq does not warn"


# ----------------------------------------------------------------------------------------- messages

SECRETS = (
    "topsecret",
    "to'psecret",
    'to"psecret',
    "to`psecret",
    "top\ntopsecret",
    "'topsecret",
    "a'b\"topsecret'\"",
)
FAILING = {  # functions that fail with the stored value in the database's own message
    "mysql": (
        "CREATE FUNCTION odd(k TEXT) RETURNS TEXT RETURN extractvalue(1, concat('~', k));",
        "\nDELIMITER //\nCREATE FUNCTION odd(k TEXT) RETURNS TEXT BEGIN SIGNAL SQLSTATE "
        "'45000' SET MESSAGE_TEXT = k; RETURN k; END//\nDELIMITER ;\n",
    ),
    "postgresql": (
        "CREATE FUNCTION odd(k TEXT) RETURNS TEXT LANGUAGE sql AS 'SELECT k::int::text';",
        "CREATE FUNCTION odd(k TEXT) RETURNS TEXT LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '%', k; END $$;",
    ),
}


def test_no_message_holds_stored_text(host: Host) -> None:
    """Whatever a database quotes."""
    for function in FAILING[host.scheme]:
        rows = [("%03d" % number, "a", "any", key) for number, key in enumerate(SECRETS, 1)]
        host.server.load(rows)
        host.server.view("SELECT id, name, ip, odd(agent_key) AS agent_key FROM host", function)
        for id, _, _, key in rows:
            answer = host.served.answer("id", id)
            assert answer.error == 2
            assert "secret" not in answer.message, (key, answer.message)
    host.server.load([])


def test_what_is_not_there_is_named(host: Host) -> None:
    """No such table, no SELECT on it, no such database."""
    server, needed = host.server, "agent(id, name, ip, agent_key)"
    server.load(ROWS[:1])
    server.sql("ALTER TABLE agent RENAME TO host")
    assert needed in host.served.answer("id", "001").message
    server.sql(f"CREATE TABLE agent ({COLUMNS}, more INT)")
    if server.scheme == "mysql":  # its rights outlive the table
        server.sql("REVOKE SELECT ON agent FROM agent_reader")
    message = host.served.answer("id", "001").message  # or he may not enter the database at all
    assert needed in message or "denied" in message
    answer = host.ask("id", "001", url=server.url(database="nowhere"))
    assert answer.error == 2 and re.search("denied|exist", answer.message), answer.message


# ------------------------------------------------------------------------- a database that is away


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes every connection and says nothing, as of a proxy without its database."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield listener.getsockname()[1]


def assert_away(answers: Iterable[Answer], reason: str = "") -> None:
    """Error 2, in time."""
    for answer in answers:
        assert answer.error == 2 and reason in answer.message, answer
        assert answer.seconds < QUICK


def test_nobody_listens_or_somebody_is_silent(hosts: list[Host], silent_port: int) -> None:
    """Neither hangs."""
    url = hosts[0].server.url
    for port, reason in (free_port(), ""), (silent_port, "no answer in time"):
        assert_away(
            at_once(
                functools.partial(host.ask, "--timeout", "1", "id", "001", url=url(port=port))
                for host in hosts
            ),
            reason,
        )


def test_sigterm_ends_it_at_once(hosts: list[Host], silent_port: int) -> None:
    """The manager's thread waits until then."""
    url = hosts[0].server.url(port=silent_port)
    words = ("--timeout", "60", "--db", url, "id", "001")
    for answer in at_once(
        functools.partial(host.ask_file.call, *words, timeout=1.0) for host in hosts
    ):
        assert answer.timed_out and not answer.held and answer.output == b""


def test_frozen_server(hosts: list[Host]) -> None:
    """It holds its sockets open and does nothing: error 2 by both methods, until it goes on."""
    server = hosts[0].server
    server.load(ROWS[:1])
    served = [host.start("--workers", "2", "--timeout", "1") for host in hosts]
    for each in served:
        each.ready()
        serving.until(lambda: [each.answer("id", "001").error for _ in range(4)] == [0] * 4, "keys")
    server.freeze()
    try:
        by_argv = [
            functools.partial(host.ask, "--timeout", "1", "id", "001", url=url)
            for host in hosts
            for url in (server.url(), server.socket_url())
        ]
        by_socket = [functools.partial(each.answer, "ip", "192.168.1.100") for each in served * 2]
        assert_away(at_once(by_argv) + at_once(by_socket), "no answer in time")
    finally:
        server.thaw()
    for each in served:
        serving.until(lambda: [each.answer("id", "001").error for _ in range(4)] == [0] * 4, "keys")


def test_frozen_server_for_commands(hosts: list[Host], tmp_path: Path) -> None:
    """A cron job must not hang, either."""
    server = hosts[0].server
    server.freeze()
    try:
        done = at_once(
            [
                functools.partial(host.run, "--timeout", "1", *words)
                for host in hosts
                for words in (
                    ["--db", server.url(), "--check"],
                    ["--db", tmp_path / host.driver, "--import", server.url()],
                )
            ]
        )
    finally:
        server.thaw()
    assert {command.returncode for command in done} == {1}
    assert all("no answer in time" in command.stdout + command.stderr for command in done)
    assert os.listdir(tmp_path) == []


def test_locked_table(hosts: list[Host]) -> None:
    """The server is well, and the query waits."""
    server = hosts[0].server
    server.load(ROWS[:1])
    with server.locked_table():
        assert_away(
            at_once([functools.partial(host.ask, "--timeout", "1", "id", "001") for host in hosts]),
            "no answer in time",
        )
    assert [host.ask("id", "001").error for host in hosts] == [0] * len(hosts)


def test_restarted_server(hosts: list[Host]) -> None:
    """kill -9, and up again: error 2 meanwhile, and the first answer after it is right."""
    server = hosts[0].server
    server.load(ROWS[:1])
    assert [host.served.answer("id", "001").error for host in hosts] == [0] * len(hosts)
    server.kill()
    assert_away(host.served.answer("id", "001") for host in hosts)
    server.ready()
    assert [host.served.answer("id", "001").error for host in hosts] == [0] * len(hosts)
    server.kill()
    server.ready()  # nobody asked meanwhile: the connections that are kept are broken
    assert [host.served.answer("id", "001").error for host in hosts] == [0] * len(hosts)


def test_kept_connection(host: Host) -> None:
    """A worker keeps its one, which has no old snapshot and holds no lock."""
    server = host.server
    server.load(ROWS[:2])
    ids = {
        "mysql": "SELECT id FROM information_schema.processlist WHERE user = 'agent_reader'",
        "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = 'agent_reader'",
    }
    host.served.answer("id", "001")
    before = server.sql(ids[server.scheme]).split()
    for turn in range(6):  # from the fifth on psycopg has the statement prepared
        server.sql(f"UPDATE agent SET agent_key = 'turn-{turn}'")
        assert host.served.answer("id", "001").data["key"] == f"turn-{turn}"
    assert server.sql(ids[server.scheme]).split() == before
    server.sql("ALTER TABLE agent ADD COLUMN more INT")
    assert host.served.answer("id", "001").error == 0


# ------------------------------------------------------------------------ the query, in the process


class Driver:
    """A stand-in for a driver, whose connections do what a list of functions says, in turn."""

    class Error(Exception):
        """What drivers raise, whatever has happened."""

    __name__, VERSION = "pymysql", (2, 0)

    def __init__(self, *deeds: Callable[[], Any]) -> None:
        self.deeds, self.connections, self.options = list(deeds), 0, {}  # type: ignore[var-annotated]

    def connect(self, **options: Any) -> Driver:
        self.connections, self.options = self.connections + 1, options
        return self

    def cursor(self) -> Driver:
        return self

    def execute(self, sql: str, values: Sequence[str] = ()) -> None:
        self.row = [self.deeds.pop(0)()] if sql.startswith("SELECT") else []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.row)


def well() -> tuple[str, ...]:
    return ROWS[0]


def broken() -> None:
    raise Driver.Error("server has gone away")


def hang() -> None:
    select.select([], [], [], 3)


def hang_and_hide() -> None:
    try:
        hang()
    except Exception as error:
        raise Driver.Error("lost the connection") from error


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes a Database over the stand-in that does these deeds."""
    handler = signal.getsignal(signal.SIGALRM)

    def make(*deeds: Callable[[], Any]) -> Any:
        driver = Driver(*deeds)
        monkeypatch.setattr(script, "import_module", lambda _: driver)
        return script.Database("mysql://u@h/d", 0.2)

    yield make
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize(
    "deeds, outcomes, connections",
    [
        ([well, well, well], ["", "", ""], 1),  # a connection is kept
        ([well, broken, well, well], ["", "", ""], 2),  # one that broke is made again, at once
        ([broken, well], ["mysql://u@h/d: ", ""], 2),  # but a new one is not
        ([well, broken, broken, well], ["", "mysql://u@h/d: ", ""], 3),
        ([hang, well], ["no answer in time", ""], 2),
        ([well, hang, well], ["", "no answer in time", ""], 2),
        ([well, hang_and_hide, well], ["", "no answer in time", ""], 2),  # nor when time is up
        (
            [well, broken, hang, well],
            ["", "no answer in time", ""],
            3,
        ),  # none is kept in the middle
    ],
    ids=range(8),
)
def test_query(
    database: Callable[..., Any],
    deeds: list[Callable[[], Any]],
    outcomes: list[str],
    connections: int,
) -> None:
    """Each deed of the database, what comes of each query, and how often it has connected then."""
    source = database(*deeds)
    for outcome in outcomes:
        try:
            assert source.find("id", ["001"]) == [ROWS[0]] and not outcome
        except script.Reply as reply:
            assert outcome and outcome in reply.message and reply.number == 2
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "an alarm was left"
    assert source.driver.connections == connections and not source.driver.deeds


# ------------------------------------------------------------------------------- import and drivers


def test_import_from_a_database(host: Host, tmp_path: Path) -> None:
    """A local copy; one that fails leaves it as it is."""
    store, server = tmp_path / "agents.db", host.server
    server.load([row for row in ROWS if row[0] in ("001", "002", "003", "005", "009", "12345678")])
    done = host.run("--db", store, "--import", server.url())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.ask_file("ip", "2001:db8:1::7", db=store).data["name"] == "lab-v6"
    before = store.read_bytes()
    assert len(list(script.open_source(str(store), LIMIT).rows())) == 6
    server.load([*ROWS[:1], ("004", "bad name", "any", KEY)])
    away = server.url(port=free_port())
    for url, reason in ((server.url(), "row 2: agent 004: name"), (away, "")):
        done = host.run("--db", store, "--import", url)
        assert done.returncode == 1 and reason in done.stderr and KEY not in done.stderr
        assert "nothing imported" in done.stderr
    assert os.listdir(tmp_path) == ["agents.db"] and store.read_bytes() == before


def plant(folder: Path, marker: Path) -> None:
    """Put modules there that leave a mark when they are imported."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in {name.split(".")[0] for name in DRIVER_NAMES}:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")


@pytest.mark.parametrize("scheme", DRIVERS)
def test_no_driver(tmp_path: Path, scheme: str) -> None:
    """Error 2 names those that would do; none is taken from where a stranger could put one."""
    default, marker, home = interpreters()[0], tmp_path / "marker", tmp_path / "home"
    ask = Caller(
        Python(str(lone_python(default.path, tmp_path / "none", "")), default.version), tmp_path
    )
    copy = tmp_path / "script" / SCRIPT.name
    version = ".".join(default.version.split(".")[:2])
    for folder in (
        ask.folder,
        copy.parent,
        tmp_path / "path",
        home / f".local/lib/python{version}/site-packages",
    ):
        plant(folder, marker)
    shutil.copy(SCRIPT, copy)
    environment = {"PYTHONPATH": str(tmp_path / "path"), "HOME": str(home)}
    answer = ask("id", "001", db=f"{scheme}://u@localhost/d", script=copy, env=environment)
    assert answer.error == 2
    for name in (*DRIVERS[scheme], "--import"):
        assert name in answer.message
    done = run_command(ask, "--db", f"{scheme}://u@localhost/d", "--check")
    assert done.returncode == 1 and DRIVERS[scheme][0] in done.stdout
    assert not marker.exists()


# ------------------------------------------------------------- a server that is another's, and TLS


class Rogue:
    """A server without TLS that asks for the password in clear text, or for a client's file."""

    def __init__(self, scheme: str, wanted: str) -> None:
        """Listen; clients: how many have come; got: all that they have said."""
        self.scheme, self.wanted, self.clients, self.got = scheme, wanted, 0, b""
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=20)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """One client after the other, until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.clients += 1
            with connection, contextlib.suppress(OSError, IndexError):
                connection.settimeout(5)
                getattr(self, self.scheme)(connection)

    def hear(self, connection: socket.socket) -> bytes:
        """What the client says next."""
        said = connection.recv(9999)
        self.got += said
        return said

    def mysql(self, connection: socket.socket) -> None:
        """Protocol 4.1 up to the password, or to the first query."""

        def say(number: int, payload: bytes) -> None:
            connection.sendall(struct.pack("<I", len(payload) | number << 24) + payload)

        capabilities = 0x0008828B  # of the common ones; 0x800 would be TLS
        say(
            0,
            b"\n10.11.0-MariaDB\0"
            + struct.pack(
                "<I8sxHBHHB10x12sx",
                7,
                b"a" * 8,
                capabilities & 0xFFFF,
                45,
                2,
                capabilities >> 16,
                21,
                b"b" * 12,
            )
            + b"mysql_native_password\0",
        )
        number = self.hear(connection)[3] + 1
        if self.wanted == "password":
            say(number, b"\xfemysql_clear_password\0")
            self.hear(connection)
            return
        say(number, b"\0\0\0\2\0\0\0")
        while said := self.hear(connection):
            say(said[3] + 1, b"\xfb" + self.wanted.encode() if b"T" in said else b"\0\0\0\2\0\0\0")

    def postgresql(self, connection: socket.socket) -> None:
        """Version 3 up to the password."""
        while self.hear(connection)[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):
            connection.sendall(b"N")  # no TLS, no GSSAPI
        connection.sendall(b"R" + struct.pack(">II", 8, 3))
        self.hear(connection)


@contextlib.contextmanager
def rogue(scheme: str, wanted: str = "password") -> Iterator[Rogue]:
    """A Rogue that ends with the block."""
    made = Rogue(scheme, wanted)
    yield made
    made.listener.shutdown(socket.SHUT_RDWR)
    made.listener.close()


# As in README.md. `1` it must be: the library of MySQLdb takes `true`, `on` or nothing for no.
OPTION_FILE = """[client]
password = {password}
ssl-ca = {ca}
ssl-verify-server-cert = 1

[connector_python]
ssl_verify_cert = 1
ssl_verify_identity = 1
"""


def with_tls(host: Host, folder: Path, ca: str, place: str, port: int = 0) -> str:
    """The URL with what the README says for TLS."""
    server, path = host.server, f"{host.server.folder}/{ca}.pem"
    if host.scheme == "postgresql":
        return server.url(host=place, port=port, sslmode="verify-full", sslrootcert=path)
    file = write_private(folder / ca, OPTION_FILE.format(password=PASSWORD, ca=path))
    return server.url(host=place, port=port, read_default_file=file)


def test_tls(host: Host, tmp_path: Path) -> None:
    """The server proves who it is; one that cannot gets no password."""
    if not host.server.has_tls:
        pytest.skip("openssl is not installed")
    host.server.load(ROWS[:1])
    with rogue(host.scheme) as other:
        # libpq knows that 127.1 is 127.0.0.1; for MySQLdb localhost is the unix socket.
        other_name = "localhost" if host.scheme == "postgresql" else "127.1"
        urls = [
            with_tls(host, tmp_path, *place)
            for place in (
                ("ca", "127.0.0.1"),
                ("wrong", "127.0.0.1"),
                ("ca", other_name),
                ("ca", "127.0.0.1", other.port),
            )
        ]
        answers = at_once([functools.partial(host.ask, "id", "001", url=url) for url in urls])
        assert [answer.error for answer in answers] == [0, 2, 2, 2], answers
        # PyMySQL goes on without TLS before 1.2.0, which the README says.
        assert other.clients and (host.driver == "pymysql" or PASSWORD.encode() not in other.got)


def test_driver_that_goes_on_without_tls_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """To install another one is then enough."""
    tried: list[str] = []

    def import_module(name: str) -> None:
        tried.append(name)
        raise ImportError

    monkeypatch.setattr(script, "import_module", import_module)
    with pytest.raises(script.Reply):
        script.Database("mysql://u@h/d", 1)
    assert sorted(tried) == sorted(DRIVERS["mysql"]) and tried[-1] == "pymysql"


def test_rogue_server_would_get_it_without_tls() -> None:
    """Or the test above would prove nothing. (A stand-in for a client that trusts it.)"""
    with (
        rogue("postgresql") as other,
        socket.create_connection(("127.0.0.1", other.port)) as client,
    ):
        client.sendall(struct.pack(">II", 8, 80877103))
        assert client.recv(1) == b"N"
        client.sendall(b"\0\0\0\x08\0\3\0\0")
        assert client.recv(9) == b"R\0\0\0\x08\0\0\0\3"
        client.sendall(PASSWORD.encode())
        serving.until(lambda: PASSWORD.encode() in other.got, "the password")


@pytest.mark.parametrize("driver", DRIVERS["mysql"])
def test_server_gets_no_file(make_host: Callable[[str], Host], tmp_path: Path, driver: str) -> None:
    """MySQL's protocol lets a server ask for any file of the client."""
    host = make_host(driver)
    secret = tmp_path / "file"
    secret.write_text("content of a file")
    with rogue("mysql", str(secret)) as other:
        answer = host.ask("--timeout", "2", "id", "001", url=host.server.url(port=other.port))
        assert answer.error == 2
        assert b"SET" in other.got, "it was asked for nothing, and could not ask itself"
        assert b"content" not in other.got
        assert not other.got[4] & 0x80, "it says that it would give one"  # CLIENT_LOCAL_FILES


# ------------------------------------------------------------------------------------- the servers


STAND_IN = """
import os, signal, sys
signal.signal(signal.SIGQUIT, lambda *_: (open(sys.argv[1], "w"), os._exit(0)))
os.spawnlp(os.P_WAIT, "setsid", "setsid", "-f", "sh", "-c", "trap '' QUIT; exec sleep 99")
signal.pause()
"""
TESTS = """
import sys, time
sys.path.insert(0, sys.argv[1])
import database_servers
dog = database_servers.watchdog(sys.argv[2], [[sys.executable, "-c", *sys.argv[3:]]], {})
for _ in range(500):
    if len(database_servers.descendants(dog.pid)) > 2:
        break
    time.sleep(0.01)
database_servers.signal_below(dog.pid, database_servers.signal.SIGSTOP)
print(dog.pid, flush=True)
time.sleep(99)
"""


def test_no_database_server_is_left_behind(tmp_path: Path) -> None:
    """However the tests end, and whatever the server does: it may clean up, and is ended then."""

    def end_by(number: int) -> None:
        folder, cleaned_up = tmp_path / str(number), tmp_path / f"{number}.cleaned-up"
        folder.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", TESTS, os.path.dirname(__file__), folder, STAND_IN, cleaned_up],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as tests:
            assert tests.stdout
            dog = int(tests.stdout.readline())
            family = [dog, *descendants(dog)]
            tests.send_signal(number)
        serving.until(lambda: not any(map(serving.alive, family)), "the end of all")
        assert len(family) >= 4 and not folder.exists() and cleaned_up.exists()

    at_once(
        functools.partial(end_by, number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    )
