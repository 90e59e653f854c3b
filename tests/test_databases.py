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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import serving
from conftest import KEY, ROOT, SAMPLE, SCRIPT, Caller, Python, Stores, interpreters, script
from database_servers import (
    COLUMNS,
    DRIVERS,
    INDEXES,
    KINDS,
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
MATRIX = [(kind, name) for kind, server in KINDS.items() for name in DRIVERS[server.scheme]]
WRONG = "wr0ng-passw0rd"


# ------------------------------------------------------------------------------- hosts and servers


class Host:
    """A host with one driver, one kind of database server, and servers of ours."""

    def __init__(self, kind: str, driver: str, folder: Path) -> None:
        """Make it, or skip the test."""
        self.kind, self.driver, self.folder = kind, driver, folder
        self.started: list[Served] = []
        self.scheme = KINDS[kind].scheme
        if missing(kind):
            pytest.skip(f"not here: {missing(kind)}")
        found = [python for python in interpreters() if has_driver(python.path, driver)]
        if not found:
            pytest.skip(f"no interpreter here has {driver} in its site-packages")
        self.server = running(kind)
        folder.mkdir()
        copy = lone_python(found[0].path, folder / "python", driver)
        self.ask_file = Caller(Python(str(copy), found[0].version), folder)

    def ask(self, *words: str, url: str = "", **how: Any) -> Answer:
        """Ask the database by the executable method; no answer tells a password."""
        return no_secret_in(self.ask_file(*words, db=url or self.server.url(), **how))

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the script as a person does; neither stream tells a password."""
        return run_command(self.ask_file, *words)

    def evaluate(self, code: str, *arguments: Any, url: str = "", seconds: float = 60) -> str:
        """What CODE prints, which has `script`, `source` (a Database) and `arguments`."""
        before = (
            "import signal, sys, time\n"
            "from importlib.machinery import SourceFileLoader\n"
            "script = SourceFileLoader('script', sys.argv[1]).load_module()\n"
            "source = script.Database(sys.argv[2], float(sys.argv[3]))\n"
            "arguments = eval(sys.argv[4])\n"
        )
        after = "\nassert signal.getitimer(signal.ITIMER_REAL) == (0, 0), 'an alarm was left'\n"
        words = [str(SCRIPT), url or self.server.url(), str(seconds), repr(arguments)]
        done = subprocess.run(
            [self.ask_file.python.path, "-IBSc", before + code + after, *words],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return tells_nothing(done.stdout)

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
        return no_secret_in(check_answer(ask_socket(self.path, ":".join(words), LIMIT)))

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


MakeHost = Callable[[str, str], Host]


@pytest.fixture(scope="module")
def make_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeHost]:
    """Makes the host for a kind of server and a driver; each is made once."""
    folder, hosts = tmp_path_factory.mktemp("hosts"), []

    @functools.cache
    def make(kind: str, driver: str) -> Host:
        hosts.append(Host(kind, driver, folder / f"{kind}-{driver}"))
        return hosts[-1]

    yield make
    for host in hosts:
        host.server.ready()
    assert all(at_once(served.is_as_it_was for host in hosts for served in host.started))


@pytest.fixture(params=MATRIX, ids="-".join)
def host(request: pytest.FixtureRequest, make_host: MakeHost) -> Iterator[Host]:
    """The host for each kind of server with each driver in turn."""
    made = make_host(*request.param)
    made.server.ready()
    yield made


@pytest.fixture(params=KINDS)
def hosts(request: pytest.FixtureRequest, make_host: MakeHost) -> list[Host]:
    """For each kind of server the hosts with a driver for it: what takes time, all do at once."""
    kind, found, reason = request.param, [], ""
    for driver in DRIVERS[KINDS[kind].scheme]:
        try:
            found.append(make_host(kind, driver))
        except pytest.skip.Exception as skipped:
            reason = str(skipped)
    if not found:
        pytest.skip(reason)
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


def tells_nothing(text: str) -> str:
    """Assert that no password of this file is in a text, and give it back."""
    for secret in (PASSWORD, WRONG):
        assert secret not in text and secret[:6] not in text, text
    return text


def no_secret_in(answer: Answer) -> Answer:
    """Assert that no password of this file is in an answer, and give it back."""
    tells_nothing(answer.output.decode())
    return answer


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
HEX = [(*row[:3], KEY) for row in ROWS[:3]]  # rows of which --check has nothing to say
REQUESTS = [("id", f"{number:03d}") for number in range(1, 30)]
REQUESTS += [("id", id) for id in ("12345678", "99999999", "0007", "021", "00a")]
REQUESTS += [("ip", f"10.70.0.{number}") for number in range(14)]
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
        "::1",
    )
]


def assert_same_answers(host: Host, store: Path, requests: Sequence[tuple[str, str]]) -> None:
    """Those of our server over the database are those from an SQLite file, byte for byte."""
    source = script.open_source(str(store), LIMIT)
    for request in requests:
        expected = script.answer(list(request), lambda: source, "a file").line()
        assert host.served.answer(*request).output == expected, request


def test_same_answers_as_from_sqlite(host: Host, stores: Stores) -> None:
    """Every rule; and by the executable method, over the unix socket, too."""
    host.server.load(ROWS)
    assert_same_answers(host, stores.sqlite(ROWS), REQUESTS)
    urls = host.server.url(), host.server.socket_url()
    for request, url in zip((("id", "001"), ("ip", "10.20.30.65")), urls, strict=True):
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


MAPPED = {  # columns that give ::ffff:10.0.0.1 for an address of IPv4
    "mariadb": "INET6",
    "mysql": "VARCHAR(64)",
    "postgresql": "INET",
}


def test_mapped_address(host: Host) -> None:
    """MariaDB's INET6 stores IPv4 like this. The objects of psycopg have a third text."""
    columns = COLUMNS.replace("ip VARCHAR(64)", f"ip {MAPPED[host.kind]}")
    host.server.load(
        [("001", "a", "::ffff:10.0.0.1", KEY), ("002", "b", "2001:db8::1", KEY)], columns
    )
    for ip in ("10.0.0.1", "::ffff:10.0.0.1", "::ffff:a00:1"):
        assert host.served.answer("ip", ip).data["ip"] == "10.0.0.1"
    assert host.served.answer("ip", "2001:db8::1").data["id"] == "002"
    assert host.served.answer("ip", "10.0.0.2").error == 4


OTHER_NAMES = {  # in any case; a database may take them literally
    "mysql": "ID VARCHAR(8), Name VARCHAR(255), `registerIP` VARCHAR(64), `KEY` VARCHAR(255)",
    "postgresql": 'id VARCHAR(8), "Name" VARCHAR(255), "registerIP" VARCHAR(64), '
    '"Internal_Key" VARCHAR(255)',
}


def test_other_names_of_columns(host: Host) -> None:
    """They are found as in SQLite; a name that is missing is told."""
    server = host.server
    server.load(ROWS[:2], indexes="")
    copy = {"mysql": "SELECT id, name, ip, agent_key FROM host", "postgresql": "TABLE host"}
    server.sql(
        f"ALTER TABLE agent RENAME TO host; CREATE TABLE agent ({OTHER_NAMES[server.scheme]});"
        f"INSERT INTO agent {copy[server.scheme]}; {server.granting()}"
    )
    for turn in range(2):
        assert host.served.answer("id", "001").data["key"] == KEY, turn
    assert host.served.answer("ip", "192.168.1.100").data["id"] == "001"
    assert host.evaluate("print([row[0] for _, row in source.rows()])") == "['001', '002']\n"
    server.load(ROWS[:2])
    assert host.served.answer("id", "001").data["key"] == KEY, "the usual names again"
    server.sql("ALTER TABLE agent DROP COLUMN ip")
    answer = host.served.answer("id", "001")
    assert answer.error == 2 and "it lacks a column ip or address" in answer.message


def test_view_over_another_schema(a_host: Host, stores: Stores) -> None:
    """Another schema is served through a view, as with SQLite."""
    a_host.server.load(ROWS)
    a_host.server.view("SELECT id, name, ip, agent_key FROM host")
    assert_same_answers(a_host, stores.sqlite(ROWS), REQUESTS)


FIND = """
for text in arguments[0]:
    for field in ("id", "ip"):
        assert source.find(script.Request(field, text, [text], [text])) == [], (field, text)
print(len(source.find(script.Request("name", "", arguments[1], []))))
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
    names = ["x' OR '1'='1", "a%s", "b\\'"]
    host.server.load([(f"{number:03d}", name, "any", "k") for number, name in enumerate(names, 1)])
    assert host.evaluate(FIND, INJECTIONS, names) == "3\n"
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
    requests = [("id", f"{number:03d}") for number in range(1, 8)] + [
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
    store = stores.sqlite(rows.execute("SELECT id, name, ip, agent_key FROM agent"))
    for host in hosts:
        assert_same_answers(host, store, requests)
    insert_numbers(server, 1007, 30000)
    for words in (["id", "007"], ["ip", "10.20.30.4"]):
        request = script.parse_request(words)
        assert len(request.texts) == (34 if request.field == "ip" else 3)
        values = ", ".join(map(server.literal, request.texts))
        query = script.rows_query(script.TABLE_COLUMNS) + f" WHERE {request.field} IN ({values})"
        plan = server.sql("EXPLAIN " + query)
        if server.scheme == "postgresql":
            assert "Index" in plan and "Seq Scan" not in plan, plan
        else:  # id, select_type, table, MySQL's partitions, type, ..., ref, rows, ...
            columns = plan.strip().split("\t")
            kind = columns.index("range")
            assert columns[2] == "agent" and int(columns[kind + 5]) <= len(request.texts), plan


def insert_numbers(server: Any, first: int, last: int) -> None:
    """Add agents with the ids FIRST to LAST, and see to it that the database knows how many."""
    counting = f"SELECT {first} AS n UNION ALL SELECT n + 1 FROM numbers WHERE n < {last}"
    depth = {"mysql": "cte_max_recursion_depth", "mariadb": "max_recursive_iterations"}
    if server.kind in depth:
        server.sql(f"SET SESSION {depth[server.kind]} = {last}")
    analyze = {"mysql": "ANALYZE TABLE agent", "postgresql": "ANALYZE agent"}[server.scheme]
    server.sql(
        "INSERT INTO agent (id, name, ip, agent_key) "
        f"WITH RECURSIVE numbers AS ({counting}) "
        f"SELECT n, concat('a', n), concat('10.0.0.', n), repeat('k', 64) FROM numbers; {analyze};"
    )


STATEMENT = re.compile(r"CREATE INDEX [^;]*;")


def test_check_names_the_missing_indexes(host: Host) -> None:
    """Its statements make them; others that have the fields, or another table, are no help."""
    server = host.server
    server.load(HEX, indexes="CREATE INDEX agent_name ON agent (name, id, ip);")
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
    a_host.server.load(HEX, indexes="")
    a_host.server.view("SELECT id, name, ip, agent_key FROM host")
    done = a_host.run("--db", a_host.server.url(), "--check")
    assert (done.returncode, done.stdout) == (0, "3 agents, 0 errors, 0 notes\n")


def test_check_of_broken_rows(a_host: Host) -> None:
    """The findings are those of any other source."""
    a_host.server.load([*HEX, ("004", "bad name", "any", KEY), ("001", "twin", "any", KEY)])
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
    "postgresql://u@h1:5432,h2:5433/d": (
        "postgresql://u@h1,h2/d",
        {"user": "u", "host": "h1,h2", "port": "5432,5433", "dbname": "d"},
    ),
    "postgresql://u@h1,[2001:db8::1]:5433,[::1]/d": (
        "postgresql://u@h1,[2001:db8::1],[::1]/d",
        {"user": "u", "host": "h1,2001:db8::1,::1", "port": ",5433,", "dbname": "d"},
    ),
    "postgresql://u@10,11:5433/d": (  # a host may consist of digits
        "postgresql://u@10,11/d",
        {"user": "u", "host": "10,11", "port": ",5433", "dbname": "d"},
    ),
    "postgresql://u@h1,h2/d": (
        "postgresql://u@h1,h2/d",
        {"user": "u", "host": "h1,h2", "dbname": "d"},
    ),
    "mysql://u@h/d?connect_timeout=3&ssl_mode=REQUIRED": (
        "mysql://u@h/d",
        {"user": "u", "host": "h", "database": "d", "connect_timeout": 3, "ssl_mode": "REQUIRED"},
    ),
    "mysql://u@h/d?connect_timeout=%C2%B2": (  # a digit that int() does not take
        "mysql://u@h/d",
        {"user": "u", "host": "h", "database": "d", "connect_timeout": "\u00b2"},
    ),
    "postgresql://u@h/d?passfile=/etc/p&sslmode=require&host=/run": (
        "postgresql://u@h/d",
        {"user": "u", "host": "/run", "dbname": "d", "passfile": "/etc/p", "sslmode": "require"},
    ),
}


@pytest.mark.parametrize("url", SOUND)
def test_sound_url(url: str) -> None:
    """What goes to the driver, and what people see: nothing of the query."""
    parsed = script.parse_url(url)
    assert (parsed.shown, parsed.options) == SOUND[url]


SCHEMES = {  # the kind of the database, and the drivers that may be used
    "mysql": ("mysql", script.DRIVERS["mysql"]),
    "mariadb": ("mysql", script.DRIVERS["mysql"]),
    "postgresql": ("postgresql", script.DRIVERS["postgresql"]),
    "postgres": ("postgresql", script.DRIVERS["postgresql"]),
    "mysql+mysqldb": ("mysql", ("MySQLdb",)),
    "mysql+pymysql": ("mysql", ("pymysql",)),
    "mariadb+mysqlconnector": ("mysql", ("mysql.connector",)),
    "postgresql+psycopg": ("postgresql", ("psycopg",)),
    "postgres+psycopg2": ("postgresql", ("psycopg2",)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_as_others_spell_it(scheme: str) -> None:
    """A driver that is named is the only one that is tried."""
    parsed = script.parse_url(f"{scheme}://u@h/d")
    assert (parsed.scheme, parsed.drivers) == SCHEMES[scheme]
    assert parsed.shown == f"{scheme.partition('+')[0]}://u@h/d"


@pytest.mark.parametrize(
    "url, part",
    [
        (
            "mysql+mysqlclient://u@h/d",
            "there is no driver mysqlclient: use one of mysqldb, mysqlconnector, pymysql",
        ),
        ("postgresql+pymysql://u@h/d", "there is no driver pymysql: use one of psycopg2"),
        ("mysql://u@h1,h2/d", "only PostgreSQL takes several hosts"),
    ],
)
def test_url_that_makes_no_sense(url: str, part: str) -> None:
    """It is named, and what would do."""
    with pytest.raises(script.SourceError) as caught:
        script.Database(url, 1)
    assert part in caught.value.message and "://u@h" in caught.value.message


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
    "jdbc:mysql://u:piece@h/d",
    "mysql+pymysql://u:piece@h/d",
    "://piece",
    "mysql://[u:piece@h/d",
    "postgresql://u:1,piece@h/d",
    "postgresql://h1,u:piece@h/d",
    "postgresql://h1:1,h2:piece/d",
    "postgresql://u@h1,h2:piece/d",
    "postgresql://u@h1:1:piece,h2/d",
    "mysql+pymysql://u@h:piece/d",
    "mysql+piece@h://u@h/d",
    "mysql+u:piece://u@h/d",
    "postgres:u:piece@h/d",
    "mariadb:/piece",
    "mariadb://u@h/d?password=piece",
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
    with pytest.raises(script.RequestError) as caught:
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
    for line, command in zip(words, done, strict=True):
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
    urls = [server.url_with_secrets(file) for file in files]
    answers = at_once(functools.partial(host.ask, "id", "001", url=url) for url in urls)
    assert {answer.error for answer in answers} == {2}
    message = answers[0].message
    assert f"{server.scheme}://agent_reader@127.0.0.1/wazuh: " in message
    assert re.search("denied|authentication failed", message), message


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_warning_of_a_library_is_not_in_the_answer(
    make_host: MakeHost, tmp_path: Path, driver: str
) -> None:
    """The manager reads stderr, too, where libpq tells of a password file that others may read."""
    host = make_host("postgresql", driver)
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
        rows = [(f"{number:03d}", "a", "any", key) for number, key in enumerate(SECRETS, 1)]
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


def test_what_the_driver_says_before_it_is_connected(host: Host) -> None:
    """All of it: who, where and why; quotes do not cut it."""
    port = free_port()
    answer = host.ask("id", "001", url=host.server.url(port=port))
    assert answer.error == 2 and "127.0.0.1" in answer.message
    assert re.search("refused|Can't connect to", answer.message), answer.message
    answer = host.ask("id", "001", url=host.server.url(no_such_option="1"))
    assert answer.error == 2
    # The C of MySQLdb tells only that there is an option that it does not know.
    assert "no_such_option" in answer.message or host.driver == "MySQLdb", answer.message


CONTENT = "c0rrect content"  # some of which may be a word of any message
BROKEN_FILES = {
    "no group": f"password = {PASSWORD}\n",
    "no group, words": f"password = {PASSWORD} {CONTENT}\n",
    "an open group": f"[client\npassword = {PASSWORD}\n",
    "no equals sign": f"[client]\npassword {PASSWORD}\n[connector_python]\npassword {PASSWORD}\n",
    "a key twice": f"[client]\npassword = {PASSWORD}\npassword = {PASSWORD}\n",
    "a password as an option": f"[client]\n{PASSWORD} = 1\n[connector_python]\n{PASSWORD} = 1\n",
    "a password as a port": f"[client]\nport = {PASSWORD}\n",
    "a password as a host": f"[client]\nhost = {PASSWORD}\nuser = {PASSWORD}\n",
    "a password as a path": f"[client]\nsocket = /{PASSWORD}\nssl-cert = /{PASSWORD}\n",
    "an interpolation": f"[client]\npassword = %({PASSWORD})s\n",
    "not UTF-8": f"[client]\npassword = {PASSWORD}\xff\n",
    "a service": f"*:*:*:{PASSWORD}\n",
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=list(BROKEN_FILES))
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_no_message_holds_content_of_an_option_file(
    make_host: MakeHost, tmp_path: Path, kind: str, content: str
) -> None:
    """Whatever a driver raises, and wherever it has the words from; `ask` asserts it."""
    path = tmp_path / "file"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    for driver in DRIVERS[KINDS[kind].scheme]:
        host = make_host(kind, driver)
        answer = host.ask("id", "001", url=host.server.ready().url_with_secrets(path))
        assert answer.error == 2
        assert CONTENT not in answer.message


@pytest.mark.parametrize(
    "name", ["read_default_file", "passfile", "ssl_ca", "sslrootcert"], ids=str
)
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """Before anybody is asked: most drivers ignore an option file that is missing."""
    scheme = "postgresql" if name in ("passfile", "sslrootcert") else "mysql"
    with pytest.raises(script.SourceError) as caught:
        script.Database(f"{scheme}://u@h/d?{name}={tmp_path}/missing", 1)
    assert f"{tmp_path}/missing" in caught.value.message
    assert "No such file or directory" in caught.value.message


@pytest.mark.parametrize("option", ["ssl-ca", "ssl_ca"])
def test_missing_certificate_of_an_option_file_is_told(tmp_path: Path, option: str) -> None:
    """Its path is content of the option file, and so not shown."""
    file = write_private(tmp_path / "file", f"[client]\n{option} = /nowhere/ca.pem\n")
    with pytest.raises(script.SourceError) as caught:
        script.Database(f"mysql://u@h/d?read_default_file={file}", 1)
    assert f"the file that ssl-ca in {file} names: No such file" in caught.value.message
    assert "nowhere" not in caught.value.message


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_passfile_that_libpq_refuses(make_host: MakeHost, tmp_path: Path, driver: str) -> None:
    """It says so on stderr, which nobody sees."""
    host = make_host("postgresql", driver)
    path = Path(write_private(tmp_path / "open", host.server.secrets_form % PASSWORD))
    path.chmod(0o640)
    answer = host.ask("id", "001", url=host.server.ready().url_with_secrets(path))
    assert answer.error == 2 and f"chmod 600 {path}" in answer.message


def test_check_notes_a_password_file_that_others_may_read(a_host: Host, tmp_path: Path) -> None:
    """It works with MySQL. libpq refuses it."""
    a_host.server.load(HEX)
    path = Path(write_private(tmp_path / "open", a_host.server.secrets_form % PASSWORD))
    path.chmod(0o604)
    done = a_host.run("--db", a_host.server.url_with_secrets(path), "--check")
    assert f"chmod 600 {path}\n" in done.stdout


@pytest.mark.parametrize("driver", DRIVERS["mysql"])
@pytest.mark.parametrize("kind", ["mariadb", "mysql"])
def test_no_database_is_named(make_host: MakeHost, kind: str, driver: str) -> None:
    """It is not the table's fault."""
    host = make_host(kind, driver)
    answer = host.ask("id", "001", url=host.server.ready().url(database=""))
    assert answer.error == 2 and "names no database" in answer.message


SLOW = {"mysql": "sleep(30)", "postgresql": "pg_sleep(30)::text"}


@pytest.mark.slow
def test_slow_query_is_told_as_such(hosts: list[Host]) -> None:
    """Seconds are rounded down in some drivers, so that they give up before we do."""
    server = hosts[0].server
    server.load(ROWS[:1])
    slow = f"SELECT id, name, ip, concat(agent_key, {SLOW[server.scheme]}) AS agent_key FROM host"
    server.view(slow)
    asked = [functools.partial(host.ask, "--timeout", "2.1", "id", "001") for host in hosts]
    for answer in at_once(asked):
        assert answer.error == 2 and answer.message.endswith("no answer in time (--timeout)")
        assert answer.seconds < 2.1 + 3


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_sigterm_ends_it_at_once(hosts: list[Host], silent_port: int) -> None:
    """The manager's thread waits until then."""
    url = hosts[0].server.url(port=silent_port)
    words = ("--timeout", "60", "--db", url, "id", "001")
    for answer in at_once(
        functools.partial(host.ask_file.call, *words, timeout=1.0) for host in hosts
    ):
        assert answer.timed_out and not answer.held and answer.output == b""


def wait_for_keys(served: Served) -> None:
    """Wait until every worker is likely to have handed out a key."""
    serving.until(lambda: [served.answer("id", "001").error for _ in range(4)] == [0] * 4, "keys")


@pytest.mark.slow
def test_frozen_server(hosts: list[Host]) -> None:
    """It holds its sockets open and does nothing: error 2 by both methods, until it goes on."""
    server = hosts[0].server
    server.load(ROWS[:1])
    served = [host.start("--workers", "2", "--timeout", "1") for host in hosts]
    for each in served:
        each.ready()
        wait_for_keys(each)
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
        wait_for_keys(each)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


CONNECTIONS = {
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE user = 'agent_reader'",
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE usename = 'agent_reader'",
}


def connections_to(server: Any) -> int:
    """How many connections the reader has."""
    return int(server.sql(CONNECTIONS[server.scheme]))


def no_connection_is_left(host: Host) -> None:
    """Wait until nothing but our server of all tests is connected."""
    kept = sum(len(served.workers) for served in host.started)
    serving.until(lambda: connections_to(host.server) <= kept, "connections that are closed")


@pytest.mark.slow
def test_failed_requests_leave_no_connections(host: Host) -> None:
    """A worker has one at most, or nobody else could log in."""
    host.server.load(ROWS[:1])
    before = connections_to(host.server)
    served = host.start("--workers", "4", "--timeout", "20").ready()
    host.server.sql("ALTER TABLE agent RENAME TO host")
    for _ in range(8):
        asked = [functools.partial(served.answer, "id", "001") for _ in range(16)]
        assert {answer.error for answer in at_once(asked)} == {2}
    assert connections_to(host.server) <= before + 4


@pytest.mark.slow
def test_query_that_is_given_up_ends_in_the_database(host: Host) -> None:
    """While the table is still locked."""
    host.server.load(ROWS[:1])
    with host.server.locked_table():
        kept = sum(len(served.workers) for served in host.started)
        assert host.ask("--timeout", "1", "id", "001").error == 2
        serving.until(lambda: connections_to(host.server) <= kept, "the end of the query", 5)


PIECES = """
import resource
def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
source.find(script.parse_request(["id", "001"]))
before = memory()
numbers = 0
for number, row in source.rows():
    numbers += 1
    assert number == numbers and len(row) == 4, row
    if not number % 20000:
        time.sleep(0.4)  # a slow reader is no silent database
print(numbers, memory() - before)
"""


@pytest.mark.slow
def test_whole_table_is_read_in_pieces(host: Host) -> None:
    """It may be larger than the memory, and take longer than --timeout."""
    host.server.load(ROWS[:1])
    insert_numbers(host.server, 2, 100000)
    count, megabytes = map(int, host.evaluate(PIECES, seconds=1.5).split())
    assert count == 100000
    assert megabytes < 15, "it takes 50 to hold all rows"


def test_reading_that_breaks_off(host: Host) -> None:
    """Nothing is said on stderr by what a driver cleans up, and no connection is left."""
    host.server.load(ROWS[:1])
    insert_numbers(host.server, 2, 20000)
    code = "rows = source.rows()\nprint(next(rows)[0])\ndel rows\n"
    assert host.evaluate(code) == "1\n"
    no_connection_is_left(host)


@pytest.mark.slow
def test_silence_within_a_table(host: Host) -> None:
    """Each piece has to come in time."""
    host.server.load(ROWS[:1])
    insert_numbers(host.server, 2, 20000)
    slow = {"mysql": "sleep(2.5)", "postgresql": "pg_sleep(2.5)::text"}[host.scheme]
    host.server.view(
        "SELECT id, name, ip, CASE WHEN id = '9000' THEN "
        f"concat({slow}, agent_key) ELSE agent_key END AS agent_key FROM host"
    )
    code = """
began = time.monotonic()
try:
    print(len(list(source.rows())))
except script.SourceError as error:
    print(error.message, time.monotonic() - began < 2)
"""
    assert host.evaluate(code, seconds=1).endswith("no answer in time (--timeout) True\n")


LEFT_IN_SESSION = {  # what a query leaves behind, and what there should be
    "mysql": ("SELECT @@transaction_read_only", "0"),
    "mariadb": ("SELECT concat(@@tx_read_only + 0, @@in_transaction)", "00"),
    "postgresql": (
        "SELECT current_setting('default_transaction_read_only') || "
        "current_setting('statement_timeout')",
        "off0",
    ),
}


def test_nothing_stays_in_a_session(host: Host) -> None:
    """A pooler gives it to the next client, who wants to write."""
    host.server.load(ROWS[:1])
    sql, expected = LEFT_IN_SESSION[host.kind]
    code = """
source.find(script.parse_request(["id", "001"]))
cursor = source.connection.connection.cursor()
cursor.execute(arguments[0])
print(*list(cursor)[0])
"""
    assert host.evaluate(code, sql).strip() == expected
    if host.scheme == "postgresql":
        states = "SELECT DISTINCT state FROM pg_stat_activity WHERE usename = 'agent_reader'"
        assert host.served.answer("id", "001").error == 0
        assert host.server.sql(states).strip() == "idle"


def test_nothing_is_prepared(make_host: MakeHost) -> None:
    """A pooler may send the next query to a server that does not know what was prepared."""
    host = make_host("postgresql", "psycopg")
    host.server.ready().load(ROWS[:1])
    code = """
for _ in range(8):  # psycopg would prepare the sixth
    source.find(script.parse_request(["id", "001"]))
cursor = source.connection.connection.cursor()
cursor.execute("SELECT count(*) FROM pg_prepared_statements")
print(cursor.fetchone()[0])
"""
    assert host.evaluate(code) == "0\n"


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_next_host_is_asked(make_host: MakeHost, driver: str) -> None:
    """As libpq does it: the one that is away comes first."""
    host = make_host("postgresql", driver)
    port = host.server.ready().port
    host.server.load(ROWS[:1])
    places = f"127.0.0.1:{free_port()},127.0.0.1:{port}"
    url = host.server.url().replace(f"127.0.0.1:{port}", places)
    assert host.ask("id", "001", url=url).error == 0


PADDED = (
    ("001 ", "behind", "10.0.0.1", KEY),
    (" 002", "in-front", "10.0.0.2", KEY),
    ("003", "ip-behind", "10.0.0.3 ", KEY),
    ("004", "ip-in-front", " 10.0.0.4", KEY),
    ("005", "well", "10.0.0.5", KEY),
)
PAD_COLUMNS = {  # columns in which spaces at the end do not count, and in which they do
    "mariadb": (COLUMNS, COLUMNS.replace(")", ") COLLATE utf8mb4_nopad_bin")),
    "mysql": (COLUMNS.replace(")", ") COLLATE utf8mb4_bin"), COLUMNS),  # the default: NO PAD
    "postgresql": (COLUMNS.replace("VARCHAR", "CHAR"), COLUMNS),
}


def test_check_finds_padded_ids(a_host: Host) -> None:
    """If the database says that they count, then no request finds them; --check says so, too."""
    for columns, found in zip(
        PAD_COLUMNS[a_host.kind], ({"002", "004"}, {"001", "002", "003", "004"}), strict=True
    ):
        a_host.server.load(PADDED, columns)
        done = a_host.run("--db", a_host.server.url(), "--check")
        told = re.findall(
            r"^error: .*: agent (\d+): no request finds its (id|ip)", done.stdout, re.M
        )
        assert {agent for agent, _ in told} == found, done.stdout
        for number in range(1, 6):
            field, value = ("id", f"00{number}") if number < 3 else ("ip", f"10.0.0.{number}")
            expected = 4 if f"00{number}" in found else 0
            assert a_host.ask(field, value).error == expected, (columns, number)
        mending = re.findall(r"UPDATE agent SET [^;]*;", done.stdout)
        a_host.server.sql("".join(mending))
        done = a_host.run("--db", a_host.server.url(), "--check")
        assert (done.returncode, done.stdout) == (0, "5 agents, 0 errors, 0 notes\n")


def test_check_of_columns_that_hold_no_text(a_host: Host) -> None:
    """Numbers and addresses have no padding."""
    kind = {"mysql": "INT", "postgresql": "INTEGER"}[a_host.scheme]
    ip = {"mariadb": "INET6", "mysql": "VARCHAR(64)", "postgresql": "INET"}[a_host.kind]
    columns = COLUMNS.replace("id VARCHAR(8)", f"id {kind}").replace("ip VARCHAR(64)", f"ip {ip}")
    a_host.server.load([(1, "a", "2001:db8::1", KEY)], columns)
    done = a_host.run("--db", a_host.server.url(), "--check")
    assert (done.returncode, done.stdout) == (0, "1 agent, 0 errors, 0 notes\n")


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

        sqlstate = ""  # a driver of PostgreSQL sets it

    def __init__(self, *deeds: Callable[[], Any]) -> None:
        """Take what comes of each SELECT."""
        self.deeds = list(deeds)
        self.connections = self.closed = 0
        self.options: dict[str, Any] = {}
        self.statements: list[str] = []
        self.refused = ""  # statements that begin like this
        self.library = "3.3.4"

    def get_client_info(self) -> str:
        """The version of the C library."""
        return self.library

    def connect(self, **options: Any) -> Driver:
        """A connection."""
        self.connections, self.options = self.connections + 1, options
        return self

    def close(self) -> None:
        """Close it."""
        self.closed += 1

    def cursor(self) -> Driver:
        """A cursor."""
        return self

    def execute(self, sql: str, values: Sequence[str] | None = None) -> None:
        """Do the next deed, if it is a query."""
        self.statements.append(sql)
        if self.refused and sql.startswith(self.refused):
            error = Driver.Error("This version of it does not yet support that")
            error.sqlstate = "0A000"
            raise error
        self.row = [self.deeds.pop(0)()] if sql.startswith("SELECT") else []

    def __iter__(self) -> Iterator[Any]:
        """The rows of the last query."""
        return iter(self.row)


def well() -> tuple[str, ...]:
    return ROWS[0]


def broken() -> None:
    raise Driver.Error("server has gone away")


def failing(number: int | str) -> Callable[[], None]:
    """A deed that raises an error of MySQL (a number) or PostgreSQL (a SQLSTATE)."""

    def fail() -> None:
        if isinstance(number, int):
            raise Driver.Error(number, "stored text")
        error = Driver.Error("stored text")
        error.sqlstate = number
        raise error

    return fail


def hang() -> None:
    select.select([], [], [], 3)


def hang_and_hide() -> None:
    try:
        hang()
    except Exception as error:
        raise Driver.Error("lost the connection") from error


MakeDatabase = Callable[..., Any]


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDatabase]:
    """Makes a Database over the stand-in that does these deeds."""
    handler = signal.getsignal(signal.SIGALRM)

    def make(*deeds: Callable[[], Any], url: str = "mysql+pymysql://u@h/d") -> Any:
        driver = Driver(*deeds)
        monkeypatch.setattr(script, "import_module", lambda _: driver)
        source = script.Database(url, 0.25)
        source.stand_in = driver
        return source

    yield make
    assert signal.getsignal(signal.SIGALRM) == handler, "the handler of the alarm is another"


AN_ID = script.parse_request(["id", "001"])


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
    database: MakeDatabase, deeds: list[Callable[[], Any]], outcomes: list[str], connections: int
) -> None:
    """Each deed of the database, what comes of each query, and how often it has connected then.

    What failed is closed, however it failed.
    """
    source = database(*deeds)
    for outcome in outcomes:
        source.deadline = time.monotonic() + 0.25
        try:
            assert source.find(AN_ID) == [ROWS[0]] and not outcome
        except script.SourceError as error:
            assert outcome and outcome in error.message
            assert error.__context__ is None, "it keeps the exception of the driver alive"
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "an alarm was left"
    driver = source.stand_in
    assert driver.connections == connections and not driver.deeds
    source.close()
    assert driver.closed == connections


NEEDED = "agent(id, name, ip, agent_key)"


@pytest.mark.parametrize(
    "number, reason",
    [
        (1046, "the URL names no database"),
        (1142, NEEDED),  # SELECT command denied
        (1146, NEEDED),  # no such table
        ("42P01", NEEDED),
        ("42501", NEEDED),  # permission denied
        (1205, "no answer in time (--timeout)"),  # a lock
        (1969, "no answer in time (--timeout)"),  # MariaDB's max_statement_time
        (3024, "no answer in time (--timeout)"),  # MySQL's max_execution_time
        ("57014", "no answer in time (--timeout)"),  # PostgreSQL's statement_timeout
        (1792, "the view agent writes"),
        ("25006", "the view agent writes"),
        (1305, "the log of the database may tell why"),
        ("22P02", "the log of the database may tell why"),
    ],
)
def test_what_an_error_number_means(database: MakeDatabase, number: int | str, reason: str) -> None:
    """The message names the statement and the number, and quotes no text of the database.

    The table is blamed for its own faults alone.
    """
    if isinstance(number, str):
        source = database(failing(number), url="postgresql+psycopg://u@h/d")
        refused = f"the server refused the query for the agents (SQLSTATE {number}): "
    else:
        source = database(failing(number))
        refused = f"the server refused the query for the agents (error {number}): "
    with pytest.raises(script.SourceError) as caught:
        source.find(AN_ID)
    message = caught.value.message
    assert reason in message and "stored" not in message
    assert (NEEDED in message) == (reason == NEEDED)
    assert refused in message or "in time" in message


@pytest.mark.parametrize(
    "refused, shown",
    [
        ("BEGIN", "BEGIN READ ONLY and SET LOCAL statement_timeout"),
        ("SELECT * FROM agent", "the query for the columns"),
        ('SELECT "id"', "the query for the agents"),
        ("SELECT CAST", "the query for the indexes"),
        ("ROLLBACK", "ROLLBACK"),
        ("DECLARE", "the query for the agents"),
        ("FETCH", "the query for the agents"),
    ],
)
def test_refused_statement_is_named(database: MakeDatabase, refused: str, shown: str) -> None:
    """Each statement has a name in the messages."""
    source = database(well, well, url="postgresql+psycopg://u@h/d")
    source.stand_in.refused = refused
    with pytest.raises(script.SourceError) as caught:
        if refused in ("DECLARE", "FETCH"):
            list(source._read(source._rows_query()))
        elif refused == "SELECT CAST":
            source.indexed()
        elif refused == "SELECT * FROM agent":
            assert source.columns
        else:
            source.find(AN_ID)
    expected = f"postgresql://u@h/d: the server refused {shown} (SQLSTATE 0A000): "
    assert caught.value.message.endswith(expected + "the log of the database may tell why")


@pytest.mark.parametrize("number, what", [(2013, "error 2013"), (0, "error 0"), ("", "Error")])
def test_broken_connection_is_no_refusal(
    database: MakeDatabase, number: int | str, what: str
) -> None:
    """The client library made the number, or there is none."""
    with pytest.raises(script.SourceError) as caught:
        database(failing(number)).find(AN_ID)
    assert f"mysql://u@h/d: the query for the agents failed ({what}): " in caught.value.message


def test_read_only_that_is_refused(database: MakeDatabase) -> None:
    """TiDB, MatrixOne and old versions of MariaDB: we send nothing but SELECT anyway."""
    source = database(well, well)
    source.stand_in.refused = "START TRANSACTION"
    assert source.find(AN_ID) == source.find(AN_ID) == [ROWS[0]]
    assert source.stand_in.connections == 1
    asked = [sql.partition(" FROM ")[0] for sql in source.stand_in.statements]
    assert asked.count("START TRANSACTION READ ONLY") == 1, "it is refused once a connection"
    assert {sql.split()[0] for sql in asked} == {"SET", "START", "SELECT", "ROLLBACK"}


def test_limits_that_are_refused(database: MakeDatabase) -> None:
    """They are a help, and no more."""
    source = database(well)
    source.stand_in.refused = "SET"
    assert source.find(AN_ID) == [ROWS[0]]


@pytest.mark.parametrize(
    "library, value, mode",
    [
        ("3.3.4", "1", None),  # MariaDB's own
        ("10.8.8", "1", None),
        ("8.0.36", "1", "VERIFY_IDENTITY"),
        ("9.4.0", "1", "VERIFY_IDENTITY"),
        ("8.0.36", "0", None),
    ],
)
def test_client_library_of_mysql(
    database: MakeDatabase, tmp_path: Path, library: str, value: str, mode: str | None
) -> None:
    """Oracle's does not know ssl-verify-server-cert, and would go on without TLS."""
    file = write_private(tmp_path / "file", f"[client]\nssl-verify-server-cert = {value}\n")
    source = database(well, url=f"mysql+mysqldb://u@h/d?read_default_file={file}")
    source.stand_in.library = library
    assert source.find(AN_ID) == [ROWS[0]]
    assert source.stand_in.options.get("ssl_mode") == mode


def slow_import(name: str) -> None:
    """A driver that takes its time, and takes any exception for a reason not to work."""
    try:
        time.sleep(0.4)
    except BaseException:
        raise ImportError(name) from None


def test_slow_import_of_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not interrupted, and the query gets the time that is left: none."""
    driver = Driver()

    def import_module(name: str) -> Driver:
        slow_import(name)
        return driver

    monkeypatch.setattr(script, "import_module", import_module)
    handler = signal.getsignal(signal.SIGALRM)
    try:
        answer = script.answer_in_time(["id", "001"], "mysql+pymysql://u@h/d", 0.3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert answer.number == 2 and answer.message.endswith("no answer in time (--timeout)")
    assert driver.connections == 0
    source = script.Database("mysql+pymysql://u@h/d", 0.3)  # where no alarm is set, as in a server
    with pytest.raises(script.SourceError, match="2"):
        source.find(AN_ID)
    assert driver.connections == 0


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


INI_BLOCKS = re.findall(r"```ini\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
(OPTION_FILE,) = [block for block in INI_BLOCKS if "ssl-ca" in block]


def with_tls(host: Host, folder: Path, ca: str, place: str, port: int = 0) -> str:
    """The URL with what the README says for TLS."""
    server, path = host.server, f"{host.server.folder}/{ca}.pem"
    if host.scheme == "postgresql":
        return server.url(host=place, port=port, sslmode="verify-full", sslrootcert=path)
    text = OPTION_FILE.replace("choose-a-password", PASSWORD)
    file = write_private(folder / ca, text.replace("/etc/agent-keys.pem", path))
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
    with pytest.raises(script.RequestError):
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
def test_server_gets_no_file(make_host: MakeHost, tmp_path: Path, driver: str) -> None:
    """MySQL's protocol lets a server ask for any file of the client."""
    host = make_host("mariadb", driver)
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


@pytest.mark.slow
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
