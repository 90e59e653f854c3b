"""A live MySQL, MariaDB or PostgreSQL as the key source, through every driver, on real servers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import database_servers
import pytest
from conftest import KEY, SAMPLE, SCRIPT, UNTYPED_SCHEMA, Caller, Python, Stores, interpreters
from database_servers import DRIVERS, OWNER, PASSWORD, READER, MariaDB, PostgreSQL, Server
from manager import Answer, read_json
from serving import HEAD, Load, connect, serve_command, serving, started, until

BOTH = [(scheme, driver) for scheme, names in DRIVERS.items() for driver in names]
DEADLINE = 20.0  # seconds; the script's own is 10, and this machine may be busy
LIMIT = 120.0  # seconds for an import or a check


# --- servers and drivers -----------------------------------------------------------------------


class Host:
    """Interpreters that each see one driver, like a host with that one package."""

    def __init__(self, folder: Path) -> None:
        """Take the FOLDER for them."""
        self.folder = folder
        self.made: dict[str, Python] = {}

    def python(self, driver: str) -> Python:
        """Give the interpreter that has only this DRIVER; none for ""."""
        if driver not in self.made:
            self.made[driver] = self.make(driver)
        return self.made[driver]

    def make(self, driver: str) -> Python:
        """Make it of the first interpreter here that has the driver, or skip the test."""
        for python in interpreters():
            if not driver or database_servers.has_driver(python.path, driver):
                folder = self.folder / (driver or "none")
                copy = database_servers.lone_python(python.path, folder, [driver] * bool(driver))
                return Python(str(copy), python.version)
        pytest.skip(f"no interpreter here has {driver} in its site-packages")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The interpreters of this file."""
    return Host(tmp_path_factory.mktemp("host"))


class Setup(NamedTuple):
    """A server, and the script on a host that has one driver for it."""

    server: Server
    ask: Caller
    driver: str

    @property
    def python(self) -> str:
        """The interpreter."""
        return self.ask.python.path

    def __call__(self, *words: str, url: str = "", **how: Any) -> Answer:
        """Ask the database; the answer is whole, and tells no password."""
        answer = self.ask(*words, db=url or self.server.url(), **how)
        assert_no_password(answer.output)
        return answer


def assert_no_password(output: bytes | str) -> None:
    """No password of this file is in OUTPUT, nor its beginning or its form in a URL."""
    text = output.decode() if isinstance(output, bytes) else output
    for secret in (PASSWORD, quote(PASSWORD, safe=""), WRONG):
        assert secret not in text and secret[:6] not in text, text


WRONG = "wr0ng-passw0rd"


def set_up(request: pytest.FixtureRequest, scheme: str, driver: str) -> Setup:
    """Make the Setup of a test."""
    server: Server = request.getfixturevalue("mariadb" if scheme == "mysql" else "postgresql")
    server.make_healthy()
    folder: Path = request.getfixturevalue("tmp_path") / "host"
    folder.mkdir()
    host: Host = request.getfixturevalue("host")
    return Setup(server, Caller(host.python(driver), folder), driver)


@pytest.fixture(params=BOTH, ids=[driver for _, driver in BOTH])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    """Each driver in turn, with its server; the server is well again after the test."""
    made = set_up(request, *request.param)
    yield made
    made.server.make_healthy()


@pytest.fixture(params=["mysql", "postgresql"])
def either(request: pytest.FixtureRequest) -> Iterator[Setup]:
    """Each kind of server with the first driver for it that is here, where the driver is no matter."""  # noqa: E501
    pythons = interpreters()
    names = [name for name in DRIVERS[request.param]
             if any(database_servers.has_driver(python.path, name) for python in pythons)]
    if not names:
        pytest.skip("no interpreter here has one of " + ", ".join(DRIVERS[request.param]))
    made = set_up(request, request.param, names[0])
    yield made
    made.server.make_healthy()


# --- the same answers --------------------------------------------------------------------------

ROWS = (
    ("001", "my_agent", "192.168.1.100", KEY),
    ("002", "laptop", "any", "k"),
    ("003", "null-ip", None, "k"),
    ("004", "empty-ip", "", "k"),
    ("005", "office", "10.20.30.0/24", "a key with spaces"),
    ("006", "gateway", "10.20.0.1/16", "host bits"),
    ("007", "dotted", "10.30.0.0/255.255.0.0", "k"),
    ("008", "web-v6", "2001:db8::10", "k"),
    ("009", "lab-v6", "2001:db8:1::/48", "k"),
    ("010", "long-v6", "2001:0DB8:0:0:0:0:0:20", "k"),
    ("011", "mapped", "::ffff:10.40.0.1", "k"),
    ("012", "everything", "0.0.0.0/0", "k"),
    ("013", "all-of-v6", "::/0", "k"),
    ("014", "same-id", "10.50.0.1", "k"),
    ("014", "same-id-too", "10.50.0.2", "k"),
    ("015", "same-ip", "10.60.0.1", "k"),
    ("016", "same-ip-too", "10.60.0.1/32", "k"),
    ("017", "bad name", "10.70.0.1", "k"),
    ("018", "empty-key", "10.70.0.2", ""),
    ("019", "bad-ip", "10.70.0.300", "k"),
    ("020", "null-key", "10.70.0.4", None),
    ("021", "quote'd", "10.70.0.5", "k"),
    (" 022 ", "padded ", " 10.80.0.2 ", " k "),
    ("7", "without-zeros", "10.80.0.1", "k"),
    ("000", "the-manager", "10.80.0.3", "k"),
    ("12345678", "long-id", "10.80.0.4", "k"),
    ("00a", "letters", "10.80.0.5", "k"),
    ("024", "odd-bits", "10.90.1.77/20", "back\\slash 'quote' \"double\" %s %d ? :x"),
    ("025", "same-network", "10.91.0.0/24", "k"),
    ("026", "same-network-too", "10.91.0.9/24", "k"),
    ("027", "n" * 128, "10.92.0.1", "k" * 128),
    ("028", "long-key", "10.92.0.2", "k" * 129),
    ("029", "n" * 129, "10.92.0.3", "k"),
    ("030", "umlaut", "10.92.0.4", "schl\u00fcssel"),
    ("031", "newline\nin-it", "10.92.0.5", "k"),
    ("032", "host-bits-v6", "2001:db8:2::77/48", "k"),
    ("033", "upper-v6", "2001:DB8:3::A", "k"),
    ("034", "wide-inside", "10.20.30.64/26", "k"),
    ("035", "short-mask", "172.16.0.0/12", "k"),
    ("036", "odd-spelling-v6", "2001:db8:4:0::0/64", "k"),
    ("037", "embedded-v4", "::ffff:10.41.0.0/112", "k"),
    ("038", "loopback", "::1", "k"),
    ("999", "last", "255.255.255.255", "k"),
)
IDS = sorted({row[0].strip() for row in ROWS} | {"039", "0001", "100", "99999999", "008 "})
IPS = (
    "192.168.1.100", "192.168.1.10", "192.168.1.1", "10.20.30.1", "10.20.30.65", "10.20.31.1",
    "10.20.0.1", "10.21.0.1", "10.30.0.0", "10.30.255.255", "10.31.0.0", "10.40.0.1",
    "::ffff:10.40.0.1", "10.41.3.4", "10.50.0.1", "10.60.0.1", "10.70.0.1", "10.70.0.2",
    "10.70.0.4", "10.70.0.5", "10.80.0.1", "10.80.0.2", "10.80.0.3", "10.90.0.1", "10.90.15.255",
    "10.90.16.0", "10.91.0.1", "10.92.0.3", "10.92.0.4", "172.31.255.255", "172.32.0.0",
    "8.8.8.8", "255.255.255.255", "0.0.0.0", "2001:db8::10", "2001:0db8:0:0::0010",
    "2001:DB8::10", "2001:db8::20", "2001:db8:1::1", "2001:db8:1:ffff::", "2001:db8:2::1",
    "2001:db8:3::a", "2001:db8:4::1", "2001:db8:4:1::1", "::1", "::2", "fe80::1",
    "0:0:0:0:0:0:0:1", "0:0:0:0:0:ffff:10.20.30.1",
)
REQUESTS = [("id", value) for value in IDS] + [("ip", value) for value in IPS]
INJECTIONS = (
    "001' OR '1'='1", "001'--", "' UNION SELECT 1,2,3,4 -- ", "001;DROP TABLE agent", "00%", "___",
    "001\\", "\\'", '001"', "001/*", "%s", "%(x)s", "?", "$1", ":id", "{0}", "001\x00",
)


def assert_same_answers(setup: Setup, store: Path, requests: Sequence[tuple[str, str]]) -> None:
    """Byte for byte; every difference is shown."""
    differences = {}
    for request in requests:
        here, there = setup(*request).output, setup.ask(*request, db=store).output
        if here != there:
            differences[request] = (here, there)
    assert not differences, "\n".join(f"{key}: {value}" for key, value in differences.items())


def test_same_answers_as_from_sqlite(setup: Setup, stores: Stores) -> None:
    """Every rule, `ip` networks included."""
    setup.server.load(ROWS)
    schema = re.sub(r"\) NOT NULL", ")", SAMPLE.read_text()) + ";DELETE FROM agent;"
    assert_same_answers(setup, stores.sqlite(ROWS, schema), REQUESTS)


def test_same_answers_over_tcp(setup: Setup) -> None:
    """Host and port of the URL are those that are asked."""
    setup.server.load(ROWS[:1])
    url = setup.server.url(host="127.0.0.1")
    assert setup("id", "001", url=url).output == setup("id", "001").output
    assert setup("ip", "192.168.1.100", url=url).data["key"] == KEY


def test_same_answers_without_indexes(either: Setup, stores: Stores) -> None:
    """A table that somebody else made."""
    either.server.load(ROWS, indexes=())
    assert_same_answers(either, stores.sqlite(ROWS), REQUESTS)


TYPES = {
    "mysql": {
        "numbers": "id INT UNSIGNED, name TEXT, ip TEXT, agent_key BLOB",
        "padded": "id CHAR(8), name CHAR(128), ip CHAR(64), agent_key CHAR(128)",
        "binary": "id VARBINARY(8), name VARBINARY(128), ip VARBINARY(64), agent_key VARBINARY(128)",  # noqa: E501
        "latin": "id VARCHAR(8) CHARACTER SET latin1, name VARCHAR(128) CHARACTER SET latin1,"
        " ip VARCHAR(64) CHARACTER SET latin1, agent_key VARCHAR(128) CHARACTER SET latin1",
    },
    "postgresql": {
        "numbers": "id INTEGER, name TEXT, ip TEXT, agent_key BYTEA",
        "padded": "id CHAR(8), name CHAR(128), ip CHAR(64), agent_key CHAR(128)",
    },
}


@pytest.mark.parametrize("types", ["numbers", "padded", "binary", "latin"])
def test_other_column_types(setup: Setup, stores: Stores, types: str) -> None:
    """Numbers, CHAR columns and binary ones, as from SQLite with the same values."""
    columns = TYPES[setup.server.scheme].get(types)
    if columns is None:
        pytest.skip("not one of this server's types")
    identify: Callable[[str], Any] = int if types == "numbers" else str
    rows = [(identify(row[0]), row[1], row[2], row[3].encode() if types == "numbers" else row[3])
            for row in ROWS if row[0].isdigit() and row[3] is not None and row[3].isascii()
            and len(row[3]) <= 128 and len(row[1]) <= 128 and len(row[0]) > 2]
    setup.server.load(rows, columns, indexes=())
    assert_same_answers(setup, stores.sqlite(rows, UNTYPED_SCHEMA), REQUESTS)


@pytest.mark.parametrize("kind", ["NUMERIC", "DECIMAL(8, 2)"])
def test_id_that_is_a_decimal(setup: Setup, kind: str) -> None:
    """Some schemas have numbers as such: 1, or 1.00, is agent 001."""
    columns = database_servers.WIDE_COLUMNS.replace("id VARCHAR(8)", "id " + kind)
    setup.server.load([(1, *ROWS[0][1:])], columns)
    expected = {"id": "001", "name": "my_agent", "ip": "192.168.1.100", "key": KEY}
    assert setup("id", "001").data == setup("ip", "192.168.1.100").data == expected
    assert setup("id", "002").error == 4
    assert command(setup, "--db", setup.server.url(), "--check").returncode == 0


def test_view_over_another_schema(either: Setup, stores: Stores) -> None:
    """As with SQLite: another schema is served through a view."""
    server = either.server
    server.load(ROWS[:10])
    server.sql("ALTER TABLE agent RENAME TO host;"
               "CREATE VIEW agent AS SELECT id, name, ip, agent_key FROM host")
    server.grant()
    assert_same_answers(either, stores.sqlite(ROWS[:10]), REQUESTS)


@pytest.mark.parametrize("option", ["id", "ip"])
def test_values_are_not_statements(setup: Setup, stores: Stores, option: str) -> None:
    """Whatever is asked for, the answer is that from SQLite, and the table is as it was."""
    setup.server.load(ROWS[:3])
    store = stores.indexed(ROWS[:3])
    requests = [(option, value.replace("\x00", "")) for value in INJECTIONS]
    assert_same_answers(setup, store, requests)
    count = setup.server.sql("SELECT count(*) FROM agent").strip()
    assert count == "3"


def test_stored_values_are_not_formats(setup: Setup) -> None:
    """Drivers use percent signs for parameters."""
    setup.server.load([("001", "a", "10.0.0.1", "100%s %(a)s %% \\' ? $1 {}")])
    assert setup("id", "001").data["key"] == "100%s %(a)s %% \\' ? $1 {}"
    assert setup("ip", "10.0.0.1").data["key"] == "100%s %(a)s %% \\' ? $1 {}"


# --- the session only reads --------------------------------------------------------------------

WRITING = {
    "mysql": """
        DROP TABLE IF EXISTS witness; CREATE TABLE witness (n INT);
        DROP FUNCTION IF EXISTS touch;
        DELIMITER //
        CREATE FUNCTION touch(k VARCHAR(255)) RETURNS VARCHAR(255) MODIFIES SQL DATA
        BEGIN INSERT INTO witness VALUES (1); RETURN k; END//
        DELIMITER ;
        ALTER TABLE agent RENAME TO host;
        CREATE VIEW agent AS SELECT id, name, ip, touch(agent_key) AS agent_key FROM host;
        """,
    "postgresql": """
        DROP TABLE IF EXISTS witness; CREATE TABLE witness (n INT);
        CREATE OR REPLACE FUNCTION touch(k VARCHAR) RETURNS VARCHAR LANGUAGE plpgsql VOLATILE AS
        $$ BEGIN INSERT INTO witness VALUES (1); RETURN k; END $$;
        ALTER TABLE agent RENAME TO host;
        CREATE VIEW agent AS SELECT id, name, ip, touch(agent_key) AS agent_key FROM host;
        """,
}


def test_session_is_read_only(setup: Setup) -> None:
    """Even for a user who may do anything, and a view whose rows write."""
    server = setup.server
    server.load(ROWS[:1])
    server.sql(WRITING[server.scheme])
    server.sql("SELECT agent_key FROM agent")
    assert server.sql("SELECT count(*) FROM witness").strip() == "1", "the view must write"
    url = server.url(user=OWNER, password=PASSWORD)
    assert setup("id", "001", url=url).error == 2
    assert setup("ip", "192.168.1.100", url=url).error == 2
    assert server.sql("SELECT count(*) FROM witness").strip() == "1"


# --- what a look-up reads ----------------------------------------------------------------------

MANY = 100_000
NETWORKS = 1000


def many_rows() -> Iterator[tuple[str, str, str, str]]:
    """100,000 agents all over the address space, 1,000 of them networks, half with host bits."""
    for number in range(1, MANY + 1):
        mixed = number * 2654435761 % 2**32  # each number once
        address = ".".join(str(mixed >> shift & 255) for shift in (24, 16, 8, 0))
        if number % (MANY // NETWORKS) == 0:
            host = number // (MANY // NETWORKS) % 2
            address = f"10.{number >> 13}.{number >> 5 & 255}.{host}/24"
        yield f"{number:03d}", f"agent-{number}", address, f"key-{number}"


def indexed_columns(setup: Setup) -> None:
    """Load the table with the indexes that the project itself proposes for this server."""
    server, rows = setup.server, list(many_rows())
    if isinstance(server, MariaDB):
        server.drop()
        server.sql(SAMPLE.read_text())
        server.sql("DELETE FROM agent")
        server.insert(rows)
        server.grant()
    else:
        server.load(rows)
        report = command(setup, "--db", server.url(), "--check").stdout
        for statement in re.findall(r"CREATE INDEX[^;]*;", report):
            server.sql(statement)
    server.analyze()


def test_look_up_does_not_read_the_table(setup: Setup) -> None:
    """The server's own counters tell: neither `id` nor `ip`, found or not."""
    server = setup.server
    indexed_columns(setup)
    before = server.rows_read()
    server.sql("SELECT count(*) FROM agent WHERE name LIKE '%x'")
    assert rows_read(server) - before >= MANY, "the counter does not count"
    rows = list(many_rows())
    network = rows[MANY // NETWORKS * 7 - 1][2]
    inside = network.rpartition(".")[0] + ".200"
    asked = {
        ("id", "77777"): 0, ("id", "999999"): 4, ("ip", rows[5][2]): 0, ("ip", inside): 0,
        ("ip", "9.9.9.9"): 4, ("ip", "10.255.255.1"): 4, ("ip", "2001:db8::1"): 4,
    }
    for request, error in asked.items():
        before = rows_read(server)
        answer = setup(*request)
        read = rows_read(server) - before
        assert answer.error == error, (request, answer)
        assert read <= NETWORKS * 2 + 500, (request, read)


def rows_read(server: Server) -> int:
    """The counter, when all has been counted: a session may report when it ends."""
    until(lambda: not server.connections(), "the end of the connections")
    return server.rows_read()


# --- passwords ---------------------------------------------------------------------------------


def command(
    setup: Setup, *words: str | Path, env: dict[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run the script as a person does; neither stream may tell a password."""
    done = subprocess.run(
        [*setup.ask.command(), *words], env={"PATH": setup.ask.path, **(env or {})},
        capture_output=True, text=True, timeout=LIMIT, cwd=setup.ask.folder, check=False,
        **{"stdin": subprocess.DEVNULL, **how},
    )
    assert_no_password(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
    return done


def test_password_in_the_url(setup: Setup) -> None:
    """It works, with the letters that a URL must escape."""
    setup.server.load(ROWS[:1])
    for url in (setup.server.url(password=PASSWORD),
                setup.server.url(password=PASSWORD, host="127.0.0.1")):
        assert setup("id", "001", url=url).data["key"] == KEY
        answer = setup("id", "001", env={"AGENT_KEY_DB": url}, url=url)
        assert answer.error == 0


@pytest.mark.parametrize("place", ["", "127.0.0.1"])
def test_wrong_password(setup: Setup, place: str) -> None:
    """Error 2, which names what a person needs, and not the password."""
    setup.server.load(ROWS[:1])
    answer = setup("id", "001", url=setup.server.url(password=WRONG, host=place))
    assert answer.error == 2
    assert answer.message.startswith("Cannot read key source: ")
    assert READER in answer.message


def test_wrong_password_file(setup: Setup, tmp_path: Path) -> None:
    """Missing, empty, or with another password."""
    server = setup.server
    server.load(ROWS[:1])
    other = tmp_path / "secrets"
    server.write_secrets(str(other), WRONG)
    empty = tmp_path / "empty"
    empty.write_text("")
    empty.chmod(0o600)
    for path in (other, empty, tmp_path / "nowhere"):
        answer = setup("id", "001", url=server.url(parameters={server.secrets_parameter: str(path)}))  # noqa: E501
        assert answer.error == 2, path


def test_check_warns_of_a_password_in_the_url(setup: Setup) -> None:
    """And does not when it is in a file."""
    setup.server.load(ROWS[:1])
    with_it = command(setup, "--db", setup.server.url(password=PASSWORD), "--check")
    without = command(setup, "--db", setup.server.url(), "--check")
    assert "password" in with_it.stdout.lower()
    assert "password" not in without.stdout.lower()
    data = command(setup, "--db", setup.server.url(password=PASSWORD), "--check", "--json")
    assert "password" in data.stdout.lower()


def command_lines(pid: int) -> str:
    """What `ps` shows of a process and all below it."""
    told = []
    for process in (pid, *database_servers.descendants(pid)):
        with contextlib.suppress(OSError):
            told.append(Path(f"/proc/{process}/cmdline").read_text().replace("\0", " "))
            told.append(Path(f"/proc/{process}/comm").read_text())
    return "\n".join(told)


@pytest.mark.parametrize("scheme", ["mysqll", "MYSQL", "postgres", "oracle", "http"])
def test_password_behind_another_scheme(ask: Caller, scheme: str) -> None:
    """A mistyped URL is a source that cannot be read; its password is not told either."""
    url = f"{scheme}://x:{quote(PASSWORD, safe='')}@127.0.0.1:1/wazuh"
    answer = ask("id", "001", db=url)
    assert answer.error == 2
    assert_no_password(answer.output)


@pytest.mark.parametrize("url", [
    "mysql://u:piece#piece/piece?piece@127.0.0.1/wazuh", "postgresql://u:pa?piece@h/d",
    "mysql:/u:piece@h/d", "mysql:u:piece@h", "postgresql:u:piece@h/d", "mysql://u:piece@piece@h/d",
    "mysql://u:12?piece=x@127.0.0.1/d", "mysql://u:12/piece?x@h/d", "mysql://u@h/d?%70assword=piece",
])
def test_password_that_is_not_percent_encoded(ask: Caller, tmp_path: Path, url: str) -> None:
    """Nobody knows then where the password ends: nothing of it is told."""
    answer = ask("id", "001", db=url)
    assert answer.error == 2
    assert b"piece" not in answer.output.lower()
    setup = Setup(None, ask, "")  # type: ignore[arg-type]
    store = tmp_path / "agents.db"
    for words in (["--db", url, "--check"], ["--db", url, "--check", "--json"],
                  ["--db", store, "--import", url], ["--db", url, "--import", SAMPLE]):
        done = command(setup, *words)
        assert done.returncode == 1
        assert "piece" not in (done.stdout + done.stderr).lower(), words
    assert os.listdir(ask.folder) == [] and not store.exists()


QUERY_FIELDS = {"mysql": ("password", "passwd"), "postgresql": ("password",)}


def url_with_password_in_the_query(server: Server, field: str, password: str = PASSWORD) -> str:
    """A URL as some take it from a connection string."""
    parameters = {server.secrets_parameter: "", field: quote(password, safe="")}
    return server.url(parameters=parameters)


def test_password_in_the_query(setup: Setup) -> None:
    """It works, --check warns of it, and a wrong one is not told."""
    server = setup.server
    server.load(ROWS[:1])
    for field in QUERY_FIELDS[server.scheme]:
        url = url_with_password_in_the_query(server, field)
        assert setup("id", "001", url=url).data["key"] == KEY
        checked = command(setup, "--db", url, "--check")
        assert checked.returncode == 0
        assert "a password stands in the URL" in checked.stdout
        url = url_with_password_in_the_query(server, field, WRONG)
        answer = setup("id", "001", url=url)
        assert answer.error == 2 and READER in answer.message
        checked = command(setup, "--db", url, "--check")
        assert checked.returncode == 1 and READER in checked.stdout


@pytest.mark.parametrize("words", [["--db", "://"], ["--db=://"], ["--socket", "://"]])
def test_hidden_url_that_is_nowhere(ask: Caller, words: list[str]) -> None:
    """The command line has this in the place of a URL with a password; a person may type it."""
    assert ask(*words, "id", "001").error == 1
    setup = Setup(None, ask, "")  # type: ignore[arg-type]
    assert command(setup, *words, "--check").returncode == 1


@pytest.mark.parametrize("by", ["option", "environment", "query"])
def test_password_is_not_in_a_process_title(either: Setup, open_folder: Path, by: str) -> None:
    """Whoever runs `ps` while the server runs does not see it, however it was given."""
    either.server.load(ROWS[:1])
    url = either.server.url(password=PASSWORD)
    if by == "query":
        field = QUERY_FIELDS[either.server.scheme][-1]
        url = url_with_password_in_the_query(either.server, field)
    path = open_folder / "s"
    words = serve_command(None if by == "environment" else url, path, python=either.python)
    env = {"AGENT_KEY_DB": url} if by == "environment" else {}
    with started(words, path, env=env) as server:
        server.wait_ready()
        assert server.reply("id:001")["error"] == 0
        told = command_lines(server.pid)
        assert SCRIPT.name in told
        assert_no_password(told)
        assert_no_password("\n".join(server.lines))


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_warning_of_a_library_is_not_in_the_answer(
    request: pytest.FixtureRequest, tmp_path: Path, driver: str
) -> None:
    """The manager reads stderr too: libpq tells there of a password file that others may read."""
    setup = set_up(request, "postgresql", driver)
    setup.server.load(ROWS[:1])
    path = tmp_path / "secrets"
    setup.server.write_secrets(str(path))
    path.chmod(0o644)
    unread = setup.server.url(parameters={"passfile": str(path)})
    assert setup("id", "001", url=unread).error == 2  # libpq does not read it, either
    checked = command(setup, "--db", unread, "--check")
    assert str(path) in checked.stderr, "libpq does not warn"


def test_parameters_go_to_the_driver(either: Setup, tmp_path: Path) -> None:
    """`sslmode` and a service file for PostgreSQL; an option file with more than a password."""
    server = either.server
    server.load(ROWS[:1])
    if isinstance(server, PostgreSQL):
        for mode, error in (("disable", 0), ("prefer", 0), ("require", 2)):
            url = server.url(host="127.0.0.1", parameters={"sslmode": mode})
            assert either("id", "001", url=url).error == error, mode
        service = tmp_path / "service"
        service.write_text(f"[agents]\nhost={server.folder}\nport={server.port}\nuser={READER}\n"
                           f"dbname=wazuh\npassfile={server.secrets}\n")
        env = {"PGSERVICEFILE": str(service)}
        assert either("id", "001", url="postgresql:///?service=agents", env=env).error == 0
    else:
        options = tmp_path / "options.cnf"
        database_servers.write_private(
            str(options), f"[client]\nuser={READER}\npassword={PASSWORD}\n")
        url = f"mysql://localhost/wazuh?unix_socket={server.socket_parameters()['unix_socket']}"
        url += f"&read_default_file={options}"
        assert either("id", "001", url=url).error == 0


# --- a database that is away -------------------------------------------------------------------


def assert_away(answer: Answer) -> None:
    """Error 2 within the deadline."""
    assert answer.error == 2, answer
    assert answer.message.startswith("Cannot read key source: ")
    assert answer.seconds < DEADLINE


def test_nobody_listens(setup: Setup) -> None:
    """Neither on the port nor on the socket, and a host that is none."""
    server = setup.server
    assert_away(setup("id", "001", url=server.url(host="127.0.0.1",
                                                  port=database_servers.free_port())))
    assert_away(setup("id", "001", url=server.url(host="nowhere.invalid")))
    path = "/nowhere/at/all"
    missing = {"host": path} if isinstance(server, PostgreSQL) else {"unix_socket": path}
    assert_away(setup("ip", "10.0.0.1", url=server.url(parameters=missing)))


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes every connection and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield listener.getsockname()[1]


def test_somebody_listens_and_is_silent(setup: Setup, silent_port: int) -> None:
    """As behind a proxy whose database is away."""
    url = setup.server.url(host="127.0.0.1", port=silent_port)
    assert_away(setup("id", "001", url=url))
    hurried = setup("--timeout", "2", "ip", "10.0.0.1", url=url)
    assert_away(hurried)
    assert hurried.seconds < 8


@pytest.mark.parametrize("place", ["", "127.0.0.1"])
def test_frozen_server(setup: Setup, place: str) -> None:
    """It holds its sockets open and does nothing."""
    setup.server.load(ROWS[:1])
    setup.server.freeze()
    assert_away(setup("id", "001", url=setup.server.url(host=place)))
    setup.server.thaw()
    assert setup("id", "001").error == 0


def test_locked_table(setup: Setup) -> None:
    """The server is well, and the query waits."""
    setup.server.load(ROWS[:1])
    with setup.server.locked_table():
        assert_away(setup("id", "001"))
        assert_away(setup("ip", "192.168.1.100"))
    assert setup("id", "001").error == 0


def test_sigterm_ends_it_at_once(setup: Setup, silent_port: int) -> None:
    """MANAGER.md, "Executable method": it holds the manager's thread until then."""
    url = setup.server.url(host="127.0.0.1", port=silent_port)
    answer = setup.ask.call("--timeout", "60", "--db", url, "id", "001", timeout=2.0)
    assert answer.timed_out and not answer.held
    assert answer.seconds_to_die < 5


@pytest.mark.parametrize("what", ["table", "right", "database", "user"])
def test_what_is_not_there(setup: Setup, what: str) -> None:
    """No such table, no SELECT on it, no such database, no such user."""
    server = setup.server
    server.load(ROWS[:1])
    if what == "table":
        server.drop()
    elif what == "right":
        server.drop()
        server.sql(f"CREATE TABLE agent ({database_servers.WIDE_COLUMNS})")
        if isinstance(server, MariaDB):  # its rights outlive the table
            server.sql(f"REVOKE SELECT ON agent FROM '{READER}'@'%'")
    url = {"database": server.url(database="nowhere"), "user": server.url(user="nobody")}
    assert_away(setup("id", "001", url=url.get(what, "")))


# --- drivers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", DRIVERS)
def test_no_driver(request: pytest.FixtureRequest, host: Host, tmp_path: Path, scheme: str) -> None:
    """Error 2 names those that would do, and the way without any."""
    ask = Caller(host.python(""), tmp_path)
    url = f"{scheme}://{READER}:{quote(PASSWORD, safe='')}@localhost/wazuh"
    answer = ask("id", "001", db=url)
    assert answer.error == 2
    for name in (*DRIVERS[scheme], "--import"):
        assert name in answer.message
    assert_no_password(answer.output)
    for words in (["--check"], ["--import", url]):
        db = [] if words[0] == "--import" else ["--db", url]
        done = command(Setup(None, ask, ""), *db, *words)  # type: ignore[arg-type]
        assert done.returncode == 1
        assert DRIVERS[scheme][0] in done.stdout + done.stderr


def plant(folder: Path, names: Sequence[str], marker: Path) -> None:
    """Put modules there that leave a mark when they are imported."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name!r} + ' ')\n")


PLANTED = ("pymysql", "MySQLdb", "mysql", "psycopg", "psycopg2")


@pytest.mark.parametrize("scheme", DRIVERS)
def test_drivers_come_from_the_system_only(host: Host, tmp_path: Path, scheme: str) -> None:
    """Not from the script's folder, the working directory, PYTHONPATH or a user's packages."""
    marker = tmp_path / "marker"
    ask = Caller(host.python(""), tmp_path)
    home = tmp_path / "home"
    version = ".".join(ask.python.version.split(".")[:2])
    script = tmp_path / "script" / SCRIPT.name
    for folder in (ask.folder, script.parent, tmp_path / "path",
                   home / ".local" / "lib" / f"python{version}" / "site-packages"):
        plant(folder, PLANTED, marker)
    shutil.copy(SCRIPT, script)
    env = {"PYTHONPATH": str(tmp_path / "path"), "HOME": str(home)}
    answer = ask("id", "001", db=f"{scheme}://x@localhost/y", script=script, env=env)
    assert answer.error == 2
    assert not marker.exists(), marker.read_text()


def test_system_packages_are_for_such_urls_only(
    host: Host, tmp_path: Path, stores: Stores
) -> None:
    """For any other source nobody looks there; for a URL they come after the standard library."""
    marker = tmp_path / "marker"
    python = database_servers.lone_python(interpreters()[0].path, tmp_path / "own", [])
    packages = Path(database_servers.driver_folders(str(python))[0])
    standard = ("json", "csv", "socket", "ipaddress", "threading", "sqlite3", "logging", "select")
    plant(packages, (*standard, "sitecustomize", "usercustomize", *PLANTED), marker)
    (packages / "planted.pth").write_text("import sitecustomize\n")
    ask = Caller(Python(str(python), interpreters()[0].version), tmp_path)
    sources = (stores.indexed(), stores.csv(), stores.keys(), SAMPLE)
    for source in sources:
        assert ask("id", "001", db=source).error == 0
        assert not marker.exists(), (source, marker.read_text())
    for scheme in DRIVERS:
        ask("id", "001", db=f"{scheme}://x@localhost/y")
    loaded = set(marker.read_text().split())
    assert loaded and not loaded & set(standard), loaded


# --- the server --------------------------------------------------------------------------------


def answered_or_away(request: str, answer: bytes) -> str:
    """The fault of an answer that must be the agent's record or error 2; empty for none."""
    wanted = HEAD + b'0, "data": {"id": "' + request.partition(":")[2].encode() + b'"'
    away = HEAD + b'2, "message": "Cannot read key source: '
    whole = answer.startswith((wanted, away)) and answer.endswith(b"}\n")
    return "" if whole else f"{request}: {answer[:200]!r}"


def agents(count: int) -> list[tuple[str, str, str, str]]:
    """Rows of as many agents."""
    return [(f"{number:03d}", f"a{number}", f"10.0.{number >> 8}.{number & 255}", "k")
            for number in range(1, count + 1)]


def test_served_answers_are_the_same(setup: Setup, open_folder: Path, stores: Stores) -> None:
    """Byte for byte those of the executable method from SQLite."""
    setup.server.load(ROWS)
    store = stores.sqlite(ROWS)
    with serving(setup.server.url(), open_folder / "s", python=setup.python) as server:
        for option, value in REQUESTS:
            if value.strip() == value:
                expected = setup.ask(option, value, db=store).output
                assert server.ask(f"{option}:{value}") == expected, (option, value)


def test_worker_keeps_its_connection(setup: Setup, open_folder: Path) -> None:
    """One for each worker, from the first request on."""
    setup.server.load(agents(50))
    with serving(setup.server.url(), open_folder / "s", python=setup.python) as server:
        for number in range(1, 51):
            assert server.reply(f"id:{number:03d}")["error"] == 0
        first = setup.server.connections()
        assert 1 <= len(first) <= len(server.workers)
        for number in range(1, 51):
            assert server.reply(f"id:{number:03d}")["error"] == 0
        assert first <= setup.server.connections()
        assert len(setup.server.connections()) <= len(server.workers)


def test_changed_row_is_seen(setup: Setup, open_folder: Path) -> None:
    """A kept connection must not keep an old snapshot."""
    setup.server.load(agents(2))
    with serving(setup.server.url(), open_folder / "s", python=setup.python) as server:
        for turn in range(10):
            setup.server.sql(f"UPDATE agent SET agent_key = 'turn-{turn}' WHERE id = '001'")
            for _ in range(2 * len(server.workers)):
                assert server.reply("id:001")["data"]["key"] == f"turn-{turn}"


def test_no_lock_is_left_between_requests(setup: Setup, open_folder: Path) -> None:
    """An open transaction would hold up the owner's ALTER TABLE for as long as the server runs."""
    setup.server.load(agents(2))
    with serving(setup.server.url(), open_folder / "s", python=setup.python) as server:
        for _ in range(4 * len(server.workers)):
            assert server.reply("id:001")["error"] == 0
        setup.server.sql("ALTER TABLE agent ADD COLUMN more INT")
        assert server.reply("id:001")["error"] == 0


def test_broken_connection_is_noticed(setup: Setup, open_folder: Path) -> None:
    """The server ended it (idle for too long, a fail-over) and takes new ones: nobody is told."""
    setup.server.load(agents(20))
    with serving(setup.server.url(), open_folder / "s", python=setup.python) as server:
        for _ in range(3):
            for number in range(1, 21):
                assert server.reply(f"id:{number:03d}")["error"] == 0
            setup.server.cut_connections()
            until(lambda: not setup.server.connections(), "the end of the connections")
        assert server.reply("ip:10.0.0.1")["error"] == 0


def test_database_killed_under_load(setup: Setup, open_folder: Path) -> None:
    """kill -9, and up again: error 2 meanwhile, then as before, with the same processes."""
    setup.server.load(agents(200))
    requests = [f"id:{number:03d}" for number in range(1, 201)]
    with (
        serving(setup.server.url(), open_folder / "s", python=setup.python) as server,
        Load(server.path, requests, judge=answered_or_away) as load,
    ):
        processes = [server.pid, *server.workers]
        for _ in range(2):
            load.wait_answers(200)
            setup.server.kill()
            until(lambda: server.reply("id:001")["error"] == 2, "error 2")
            load.wait_answers(200)
            setup.server.start()
            until(lambda: server.reply("id:001")["error"] == 0, "the agent's key", 60)
        load.stop()
        assert load.faults == []
        assert load.refused == 0
        assert load.slowest < DEADLINE
        for number in range(1, 101):
            assert server.reply(f"id:{number:03d}")["error"] == 0
        assert [server.pid, *server.workers] == processes
        assert_no_password("\n".join(server.lines))


def test_database_frozen_under_load(setup: Setup, open_folder: Path) -> None:
    """32 requests at once while nobody answers a worker: each is error 2 within the deadline."""
    setup.server.load(agents(200))
    requests = [f"id:{number:03d}" for number in range(1, 201)]
    with (
        serving(setup.server.url(), open_folder / "s", python=setup.python) as server,
        Load(server.path, requests, judge=answered_or_away) as load,
    ):
        load.wait_answers(200)
        setup.server.freeze()
        until(lambda: (read_json(server.ask("id:001")) or {}).get("error") == 2, "error 2")
        load.wait_answers(64, 60)
        setup.server.thaw()
        until(lambda: server.reply("id:001")["error"] == 0, "the agent's key", 60)
        load.stop()
        assert load.faults == []
        assert load.slowest < DEADLINE


def test_server_starts_while_the_database_is_away(setup: Setup, open_folder: Path) -> None:
    """After a power cut all machines start at once: it must not have to be started again."""
    setup.server.load(agents(2))
    setup.server.kill()
    with serving(setup.server.url(), open_folder / "s", python=setup.python) as server:
        assert server.reply("id:001")["error"] == 2
        setup.server.start()
        until(lambda: server.reply("id:001")["error"] == 0, "the agent's key")


def test_silent_database_does_not_keep_it_from_ending(
    setup: Setup, open_folder: Path, silent_port: int
) -> None:
    """SIGTERM ends the server in time even if its workers wait for a database."""
    url = setup.server.url(host="127.0.0.1", port=silent_port)
    with (
        serving(url, open_folder / "s", python=setup.python) as server,
        connect(server.path) as connection,
    ):
        connection.send(b"id:001")
        time.sleep(0.5)  # the worker is in the driver by then, or it is not: both must end
        assert server.stop() < DEADLINE


# --- the store from a database -----------------------------------------------------------------


def test_import(setup: Setup, stores: Stores, tmp_path: Path) -> None:
    """A local copy answers as the database does, and when it is away."""
    rows = [row for row in ROWS if row[0] in ("001", "002", "003", "005", "006", "007", "008",
                                              "009", "010", "011", "024", "035", "12345678")]
    setup.server.load(rows)
    folder = tmp_path / "local"
    folder.mkdir()
    store = folder / "agents.db"
    done = command(setup, "--db", store, "--import", setup.server.url())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(folder) == ["agents.db"]
    requests = [request for request in REQUESTS if request[0] == "ip" or request[1].isdigit()]
    assert_same_answers(setup, store, requests)
    setup.server.kill()
    before = store.read_bytes()
    done = command(setup, "--db", store, "--import", setup.server.url())
    assert done.returncode == 1 and done.stderr
    assert store.read_bytes() == before
    assert setup.ask("id", "001", db=store).data["key"] == KEY


def test_import_from_a_database_that_does_not_answer(
    setup: Setup, tmp_path: Path, silent_port: int
) -> None:
    """A cron job must not hang, neither on a silent port nor on a locked table."""
    setup.server.load(agents(3))
    store = tmp_path / "agents.db"
    silent = setup.server.url(host="127.0.0.1", port=silent_port)
    began = time.monotonic()
    done = command(setup, "--db", store, "--timeout", "2", "--import", silent)
    assert done.returncode == 1 and done.stderr
    with setup.server.locked_table():
        url = setup.server.url()
        done = command(setup, "--db", store, "--timeout", "2", "--import", url)
    assert done.returncode == 1 and "no answer in time" in done.stderr
    assert time.monotonic() - began < 2 * DEADLINE
    assert not store.exists()


def test_import_of_broken_rows(setup: Setup, stores: Stores) -> None:
    """They are told by their row, and nothing is imported."""
    setup.server.load([*agents(3), ("004", "bad name", "any", KEY)])
    store = stores.indexed()
    before = store.read_bytes()
    done = command(setup, "--db", store, "--import", setup.server.url())
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"row 4: agent 004: name", done.stderr)
    assert KEY not in done.stderr
    assert store.read_bytes() == before


def test_import_of_many_rows(setup: Setup, tmp_path: Path) -> None:
    """100,000 of them."""
    setup.server.load([(row[0], row[1], row[2].partition("/")[0], row[3]) for row in many_rows()],
                      indexes=())
    store = tmp_path / "agents.db"
    done = command(setup, "--db", store, "--import", setup.server.url(), "-v")
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(store)) as database:
        assert database.execute("SELECT count(*) FROM agent").fetchone() == (MANY,)


def test_database_server_is_no_target(setup: Setup, stores: Stores) -> None:
    """--db of an import is an SQLite file; the session would only read anyway."""
    setup.server.load(agents(1))
    done = command(setup, "--db", setup.server.url(user=OWNER, password=PASSWORD),
                   "--import", stores.csv())
    assert done.returncode == 1 and done.stderr
    assert setup.server.sql("SELECT count(*) FROM agent").strip() == "1"
    assert not any("://" in name or name.startswith(("mysql", "postgresql"))
                   for name in os.listdir(setup.ask.folder))


def test_check(setup: Setup) -> None:
    """The findings are those of any other source."""
    setup.server.load([*agents(3), ("004", "bad name", "any", KEY), ("001", "twin", "any", KEY)])
    done = command(setup, "--db", setup.server.url(), "--check")
    assert done.returncode == 1
    assert re.search(r"row 4\b.*004.*name", done.stdout)
    assert re.search(r"row 5\b.*001", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("5 agents, ")
    assert KEY not in done.stdout
    setup.server.kill()
    done = command(setup, "--db", setup.server.url(), "--check")
    assert done.returncode == 1
    assert "Cannot read key source" in done.stdout


@pytest.mark.parametrize("driver", DRIVERS["postgresql"])
def test_check_of_an_inet_column(request: pytest.FixtureRequest, driver: str) -> None:
    """PostgreSQL finds no text in it: a request by ip is error 2, and --check says so before."""
    setup = set_up(request, "postgresql", driver)
    columns = database_servers.WIDE_COLUMNS.replace("ip VARCHAR(64)", "ip INET")
    setup.server.load(ROWS[:1], columns)
    answer = setup("ip", "192.168.1.100")
    assert answer.error == 2 and "inet" in answer.message
    done = command(setup, "--db", setup.server.url(), "--check")
    assert done.returncode == 1
    assert re.search(r"^error: Cannot read key source: .*inet", done.stdout, re.MULTILINE)


STATEMENT = re.compile(r"(?:CREATE INDEX|ALTER TABLE)\b.*;")


def test_indexes_of_another_table_do_not_count(either: Setup, stores: Stores) -> None:
    """One of the same name in another schema has them all, and the one that is asked has none."""
    server = either.server
    server.load(ROWS[:10], indexes=())
    before = STATEMENT.findall(command(either, "--db", server.url(), "--check").stdout)
    assert len(before) == 3
    server.sql(f"CREATE SCHEMA other; CREATE TABLE other.agent ({database_servers.WIDE_COLUMNS});")
    try:
        if isinstance(server, PostgreSQL):
            server.sql(f"GRANT USAGE ON SCHEMA other TO {READER}")
        server.sql(f"GRANT SELECT ON other.agent TO {READER}")
        for statement in before:
            server.sql(re.sub(r"\b(ON|TABLE) agent\b", r"\1 other.agent", statement))
        done = command(either, "--db", server.url(), "--check")
        assert STATEMENT.findall(done.stdout) == before
        requests = [("id", "001"), ("id", "100"), *(("ip", ip) for ip in IPS[:12])]
        assert_same_answers(either, stores.sqlite(ROWS[:10]), requests)
    finally:
        server.sql("DROP TABLE other.agent; DROP SCHEMA other")


def test_check_of_a_view(either: Setup) -> None:
    """A view takes no index."""
    server = either.server
    server.load(ROWS[:3])
    server.sql("ALTER TABLE agent RENAME TO host;"
               "CREATE VIEW agent AS SELECT id, name, ip, agent_key FROM host")
    server.grant()
    done = command(either, "--db", server.url(), "--check")
    assert done.returncode == 0
    assert "ON agent" not in done.stdout and not STATEMENT.search(done.stdout), done.stdout


@pytest.mark.parametrize("place", ["", "127.0.0.1"])
def test_check_and_import_of_a_frozen_server(setup: Setup, tmp_path: Path, place: str) -> None:
    """They end, too, and say why."""
    setup.server.load(ROWS[:1])
    url, store = setup.server.url(host=place), tmp_path / "agents.db"
    setup.server.freeze()
    try:
        for words in (["--db", url, "--check"], ["--db", store, "--import", url]):
            began = time.monotonic()
            done = command(setup, "--timeout", "2", *words)
            assert done.returncode == 1, words
            assert "Cannot read key source" in done.stdout + done.stderr
            assert time.monotonic() - began < DEADLINE
    finally:
        setup.server.thaw()
    assert not store.exists()


# --- MariaDB's own client ----------------------------------------------------------------------


@pytest.fixture
def sample(mariadb: MariaDB) -> MariaDB:
    """A MariaDB into which sample.db.sql was loaded as it is, with the client."""
    mariadb.make_healthy()
    mariadb.drop()
    with SAMPLE.open("rb") as stream:
        subprocess.run(mariadb.client(), stdin=stream, check=True, capture_output=True)
    mariadb.grant()
    return mariadb


def test_sample_loads_unchanged(sample: MariaDB, request: pytest.FixtureRequest) -> None:
    """The same agents as in SQLite, the same answers."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(SAMPLE.read_text())
        query = "SELECT id, name, ip, agent_key FROM agent ORDER BY id"
        expected = ["\t".join(row) for row in database.execute(query)]
    assert sample.sql(query).splitlines() == expected
    setup = set_up(request, "mysql", "pymysql")
    requests = [("id", line.split("\t")[0]) for line in expected]
    requests += [("ip", line.split("\t")[2].partition("/")[0]) for line in expected
                 if "any" not in line.split("\t")[2]]
    requests += [("ip", "10.20.30.77"), ("ip", "10.20.99.1"), ("ip", "2001:db8:1:2::3")]
    assert_same_answers(setup, SAMPLE, requests)


def test_sample_has_its_indexes_in_mariadb(sample: MariaDB) -> None:
    """As --check and the look-ups expect them."""
    indexes = sample.sql("SELECT DISTINCT index_name FROM information_schema.statistics"
                         " WHERE table_name = 'agent'").split()
    assert {"agent_id", "agent_ip"} <= set(indexes)


def test_mysql_batch_into_the_store(mariadb: MariaDB, ask: Caller, tmp_path: Path) -> None:
    """The pipe of the issue, with the real client and what it escapes."""
    mariadb.make_healthy()
    key = "back\\slash \\n \\t 'quote' \"double\" ~"
    mariadb.load([("001", "a", None, key), ("002", "b", "10.0.0.1", '"quoted"')])
    store = tmp_path / "agents.db"
    client = mariadb.client("--batch", "-e", "SELECT id,name,ip,agent_key FROM agent")
    batch = subprocess.run(client, capture_output=True, check=True).stdout
    assert b"NULL" in batch and b"\\\\" in batch
    done = subprocess.run([*ask.command(), "--db", store, "--import", "-"], input=batch,
                          env={"PATH": ask.path}, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert ask("id", "001", db=store).data == {"id": "001", "name": "a", "ip": "any", "key": key}
    assert ask("id", "002", db=store).data["name"] == "b"
    mariadb.load([("001", "a", None, "tab\tnewline\nin it")])
    before = store.read_bytes()
    batch = subprocess.run(client, capture_output=True, check=True).stdout
    done = subprocess.run([*ask.command(), "--db", store, "--import", "-"], input=batch,
                          env={"PATH": ask.path}, capture_output=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    assert b"line 2" in done.stderr
    assert store.read_bytes() == before


def test_mysqldump_is_an_sql_script(mariadb: MariaDB, ask: Caller, tmp_path: Path) -> None:
    """A dump without MySQL's own options, as the README may propose, loads into memory."""
    dump = shutil.which("mariadb-dump") or shutil.which("mysqldump")
    if dump is None:
        pytest.skip("mariadb-dump is not installed")
    mariadb.make_healthy()
    mariadb.load(agents(3))
    options = ["--compatible=ansi", "--skip-opt", "--compact", "--no-create-info",
               "--skip-quote-names", "--complete-insert"]
    insert = subprocess.run([dump, "--no-defaults", "--user=root",
                             "--socket=" + mariadb.socket, *options, "wazuh", "agent"],
                            capture_output=True, text=True, check=True).stdout
    inserts = "".join(line + "\n" for line in insert.splitlines() if line.startswith("INSERT"))
    assert inserts.count("INSERT") == 3
    source = tmp_path / "dump.sql"
    source.write_text("CREATE TABLE agent (id, name, ip, agent_key);\n" + inserts)
    assert ask("id", "002", db=source).data["name"] == "a2"
