"""Sources in files, in the process: sound, strange, broken, harmful, and under whose hands."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores, script
from manager import check_line, run

SECRET = "TheSecretKeyThatNoMessageMayShow"
DATA = Record()._asdict()
ROW = f"001,my_agent,192.168.1.100,{KEY}"
READ = "Cannot read key source: "
LATE = "no answer in time (--timeout)"
LACKS = "it lacks a table or view agent(id, name, ip, agent_key)"
KINDS = ["sqlite", "csv", "keys", "sql"]
PATIENCE = 60.0  # seconds that nothing here needs, on however busy a machine


def look(path: str | bytes | Path, *words: str, seconds: float = PATIENCE) -> dict[str, Any]:
    """Ask the source at PATH, check what holds for every answer, and give its JSON object."""
    name = os.fsdecode(path)
    reply = script.answer(words, lambda: script.open_source(name, seconds), name)
    assert SECRET.encode() not in reply.line()
    content = check_line(reply.line())
    if content["error"] == 2:
        start = f"{READ}{script.printable(name)}: "
        assert content["message"].startswith(start), content
        assert len(content["message"]) > len(start), content
    return content


def serves(path: str | bytes | Path) -> bool:
    """Assert that agent 001 is found at PATH, by id and by ip, and nothing else is."""
    assert look(path, "id", "001").get("data") == DATA, look(path, "id", "001")
    assert look(path, "ip", "192.168.1.100").get("data") == DATA
    assert look(path, "id", "999")["error"] == 4
    assert look(path, "ip", "192.168.1.1")["error"] == 4
    return True


def refuses(path: str | bytes | Path, *words: str, seconds: float = PATIENCE) -> str:
    """Assert error 2 for WORDS (`id 001`), and give what its message says after the file's name."""
    content = look(path, *(words or ("id", "001")), seconds=seconds)
    assert content["error"] == 2, content
    reason: str = content["message"][len(f"{READ}{script.printable(os.fsdecode(path))}: ") :]
    return reason


# ---------------------------------------------------------------- names of files

NAMES: list[str | bytes] = [
    *("a b.db", "a?mode=rwc.db", "a#b.db", "a%41b.db", "a%.db", "é.db", "a'b\".db", "a\nb.db"),
    *("file:x.db", "a&b;c.db", "-x.db", ":memory:", b"\xff.db", "a\\b.db", "mysql.db", "x" * 200),
    *("sql", "a.sql.db", "%2F", "x.SQL", " "),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_a_name(
    stores: Stores, name: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of it is read as a URI or an escape, and what is missing is not made."""
    monkeypatch.chdir(stores.folder)
    path = stores.sqlite(name=name)
    for spelling in (path, path.name, f"./{path.name}", f"../{stores.folder.name}/{path.name}"):
        assert serves(spelling)
    path.unlink()
    for spelling in (path, path.name):
        assert refuses(spelling) == "No such file or directory"
    assert not list(stores.folder.iterdir())


URLS = {  # whether a name is one, and of a script
    **dict.fromkeys(["mysql://h/d", "postgresql://h/d", "X://y", "mysql:x"], (1, 0)),
    **dict.fromkeys(["postgresql:x", "mysql://h/d.sql", "mysql:a.sql"], (1, 0)),
    **dict.fromkeys(["a.sql", "./a.sql", "/x/a.sql", "/a://b.sql", "./mysql:a.sql"], (0, 1)),
    **dict.fromkeys(["a.db", "/a.db", "sql", "a.sqlx", "/a://b", "./a://b", ".mysql:x"], (0, 0)),
    **dict.fromkeys(["mysql", "postgresql", "mysqlx:", "http:/x", "a.SQL"], (0, 0)),
}


@pytest.mark.parametrize("name", URLS)
def test_a_path_is_no_url(name: str) -> None:
    assert (script.is_url(name), script.is_script(name)) == URLS[name]


def test_a_url_leads_to_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "Database", lambda name, seconds: (name, seconds))
    assert script.open_source("mysql://u@h/d", 7.0) == ("mysql://u@h/d", 7.0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.db", "No such file or directory"),
        ("no/such/folder/missing.db", "No such file or directory"),
        ("missing.sql", "No such file or directory"),
        ("client.keys", "No such file or directory"),
        (":memory:", "No such file or directory"),
        ("file:missing.db?mode=rwc", "No such file or directory"),
        ("file/missing.db", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "No such file or directory"),
        ("x" * 300, "File name too long"),
        (".", "not a regular file"),
        ("folder", "not a regular file"),
        ("folder/", "not a regular file"),
        ("fifo.db", "not a regular file"),
        ("fifo.csv", "not a regular file"),
        ("fifo.sql", "not a regular file"),
    ],
)
def test_a_path_that_leads_to_no_file(
    stores: Stores, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made, and a fifo holds nobody up."""
    monkeypatch.chdir(stores.folder)
    stores.text("", "file")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere.db")
    for kind in ("fifo.db", "fifo.csv", "fifo.sql"):
        os.mkfifo(kind, 0o600)
    before = sorted(os.listdir())
    for spelling in (name, stores.folder / name if name != "folder/" else f"{os.getcwd()}/folder/"):
        assert refuses(spelling) == reason
        assert refuses(spelling, "ip", "10.0.0.5") == reason
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty", "/dev/full", "/"])
def test_a_device(device: str) -> None:
    assert refuses(device)


@pytest.mark.parametrize("name", ["a.db", "a.sql"])
def test_a_file_whose_disk_fails(stores: Stores, name: str) -> None:
    """It opens, and reading it does not work."""
    broken = Path("/proc/self/mem")
    if not broken.exists():
        pytest.skip("no file here that fails so")
    path = stores.folder / name
    path.symlink_to(broken)
    assert refuses(path) == "Input/output error"


def test_links_are_followed(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stores.folder)
    Path("sub").mkdir()
    for kind in KINDS:
        path = stores.make(kind)
        ending = ".sql" if kind == "sql" else ""
        Path(f"absolute{ending}").symlink_to(path)
        Path(f"sub/relative{ending}").symlink_to(f"../{path.name}")
        Path(f"second{ending}").symlink_to(f"sub/relative{ending}")
        for name in ("absolute", "sub/relative", "second", f"{stores.folder}/second"):
            assert serves(name + ending)
            assert os.path.realpath(script.check_file(name + ending)) == str(path)
        for link in ("absolute", "sub/relative", "second"):
            Path(link + ending).unlink()


def test_as_many_links_as_the_kernel_follows(stores: Stores) -> None:
    path = stores.csv()
    link = path
    for number in range(39):
        before, link = link, stores.folder / f"link{number}"
        link.symlink_to(before)
    assert serves(link)


# ---------------------------------------------------------------- under whose hands

BY_ALL = "is writable by everybody, or somebody else's"


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_everybody_may_write(stores: Stores, kind: str) -> None:
    path = stores.make(kind)
    link = stores.folder / f"link{path.suffix}"
    link.symlink_to(path)
    for mode in (0o602, 0o666, 0o622, 0o777, 0o646, 0o606):
        path.chmod(mode)
        assert refuses(path) == f"{path} {BY_ALL}"
        assert refuses(link) == f"{path} {BY_ALL}"
    for mode in (0o400, 0o600, 0o640, 0o660, 0o664, 0o755, 0o775, 0o604, 0o605):
        path.chmod(mode)
        assert serves(path)
        assert serves(link)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_everybody_may_write(
    stores: Stores, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He could put another file there, or in the place of a link: sticky or not."""
    safe = stores.folder / "safe"
    safe.mkdir()
    path = stores.make(kind)
    inner = path.rename(safe / path.name)
    outer = stores.folder / f"link{path.suffix}"  # into the safe folder
    outer.symlink_to(inner)
    third = safe / f"third{path.suffix}"  # and from there, through the open one
    third.symlink_to(outer)
    monkeypatch.chdir(stores.folder)
    try:
        for mode in (0o777, 0o1777, 0o702, 0o1772, 0o773):
            stores.folder.chmod(mode)
            told = f"its folder {stores.folder}/ is writable by everybody: move it to another"
            assert serves(inner)
            assert refuses(outer) == told
            assert refuses(third) == told
            assert refuses(outer.name) == told.replace(f"{stores.folder}/", "./")
            assert refuses(f"missing{path.suffix}")
        stores.folder.chmod(0o700)
        for mode in (0o777, 0o1777):
            safe.chmod(mode)
            told = f"its folder {safe}/ is writable by everybody: move it to another"
            assert refuses(outer) == told
            assert refuses(inner)
        for mode in (0o700, 0o750, 0o755, 0o770, 0o775, 0o1775):
            safe.chmod(mode)
            stores.folder.chmod(mode)
            assert serves(outer)
            assert serves(third)
    finally:
        stores.folder.chmod(0o700)
        safe.chmod(0o700)


BESIDE = ["-wal", "-shm", "-journal"]


@pytest.mark.parametrize("beside", BESIDE)
def test_a_file_beside_the_database_that_everybody_may_write(stores: Stores, beside: str) -> None:
    path = stores.sqlite()
    other = stores.text("", path.name + beside)
    link = stores.folder / "link.db"
    link.symlink_to(path)
    for mode in (0o666, 0o602, 0o646):
        other.chmod(mode)
        assert refuses(path) == f"{other} {BY_ALL}"
        assert refuses(link) == f"{other} {BY_ALL}"
    for mode in (0o600, 0o640, 0o664):
        other.chmod(mode)
        assert serves(path)


@pytest.mark.parametrize("beside", BESIDE)
def test_a_strangers_file_beside_the_database(stores: Stores, nobody: int, beside: str) -> None:
    path = stores.sqlite()
    other = stores.text("", path.name + beside)
    link = stores.folder / "link.db"
    link.symlink_to(path)
    os.chown(other, nobody, -1)
    assert refuses(path) == f"{other} {BY_ALL}"
    assert refuses(link) == f"{other} {BY_ALL}"
    os.chown(path, nobody, -1)  # his own
    assert serves(path)
    os.chown(other, 0, -1)  # root's
    assert serves(path)
    os.chown(other, nobody + 1, -1)
    assert refuses(path) == f"{other} {BY_ALL}"


def test_the_owner_of_a_source_may_be_anybody(stores: Stores, nobody: int) -> None:
    for kind in KINDS:
        path = stores.make(kind)
        os.chown(path, nobody, -1)
        assert serves(path)


def test_a_log_beside_what_a_link_leads_to(
    ask: Caller, open_folder: Path, open_script: Path, nobody: int
) -> None:
    """It counts, though nothing may be written there, nor where the link is."""
    if not shutil.which("python3", path=os.defpath):
        pytest.skip("there is no python3 that every user may run")
    for name in ("data", "links"):
        (open_folder / name).mkdir(mode=0o755)
    path = Stores(open_folder / "data").sqlite()
    link = open_folder / "links" / "agents.db"
    link.symlink_to(path)
    writer = sqlite3.connect(str(path), isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("UPDATE agent SET name = 'in-the-log'")
    how: dict[str, Any] = {"script": open_script, "user": nobody, "cwd": "/"}
    try:
        answer = ask("id", "001", db=link, env={"PATH": os.defpath}, **how)
        assert answer.data.get("name") == "in-the-log"
    finally:
        writer.close()


# ---------------------------------------------------------------- kinds are told by content

NO_SOURCE = {
    "a word": b"hello\n",
    "a word without newline": b"hello",
    "four words": b"this is X.5 source\n",
    "binary": bytes(range(256)) * 40,
    "a program": b"\x7fELF\x02\x01\x01" + bytes(5000),
    "zeros": bytes(8192),
    "JSON": b'{"id": "001", "name": "my_agent", "ip": "any", "key": "k"}\n',
    "XML": b"<ossec_config>\n  <auth>\n  </auth>\n</ossec_config>\n",
    "another CSV": b"name,phone\nbob,123\n",
    "UTF-16": f"id,name,ip,key\n{ROW}\n".encode("utf-16"),
    "one long line": b"x" * 3_000_000,
    "a comment and a word": b"# keys\nhello\n",
    "SQLite 2": b"** This file contains an SQLite 2.1 database **\n",
    "almost SQLite": b"SQLite format 3\n" + bytes(4096),
}
NONE = "no SQLite database, CSV with a header (id, name, ip, key), client.keys or script named .sql"


@pytest.mark.parametrize("content", NO_SOURCE.values(), ids=NO_SOURCE)
def test_what_is_no_source(stores: Stores, content: bytes) -> None:
    for name in ("agents.db", "agents.csv", "agents", "keys", "client.keys.bak"):
        path = stores.text(content, name)
        assert refuses(path) == NONE
        assert path.read_bytes() == content
        path.unlink()
    assert not list(stores.folder.iterdir())


@pytest.mark.parametrize("content", ["", "\n\n", "  \n \r\n", "\ufeff", "\ufeff\n"], ids=ascii)
def test_an_empty_file(stores: Stores, content: str) -> None:
    assert refuses(stores.text(content, "agents.csv")) == "it is empty"
    assert look(stores.text(content, "client.keys"), "id", "001")["error"] == 4  # a fresh manager's


@pytest.mark.parametrize("content", ["magic only", "magic and garbage"])
def test_a_database_that_is_none(stores: Stores, content: str) -> None:
    tail = b"" if content == "magic only" else b"\xa5" * 8176
    assert refuses(stores.text(b"SQLite format 3\0" + tail, "agents.db")) in (
        "file is not a database",
        "database disk image is malformed",
    )


HEADER = "its header needs id, name, ip and key (or agent_key) once"


@pytest.mark.parametrize("missing", ["name", "ip", "key"])
def test_csv_without_a_column(stores: Stores, missing: str) -> None:
    columns = ["id", "name", "ip", "key"]
    columns[columns.index(missing)] = "other"
    for name in ("agents.csv", "client.keys"):
        assert refuses(stores.text(",".join(columns) + f"\n{ROW}\n", name)) == HEADER
        assert refuses(stores.text("id\n001\n", name)) == HEADER


@pytest.mark.parametrize("header", ["id,name,ip,key,key", "id,name,ip,key,id", "id,ID,name,ip,key"])
def test_csv_with_a_column_twice(stores: Stores, header: str) -> None:
    """Which of them is meant?"""
    assert refuses(stores.text(f"{header}\n{ROW},{ROW}\n", "agents.csv")) == HEADER


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_row_with_more_fields_than_the_header(stores: Stores, delimiter: str) -> None:
    """A key with a delimiter in it would be cut; the others are found."""
    rows = [["id", "name", "ip", "key"], ["002", "a", "any", "ab", "cd"], ROW.split(",")]
    path = stores.text("".join(delimiter.join(row) + "\n" for row in rows), "agents.csv")
    assert look(path, "id", "002")["error"] == 6
    assert serves(path)


TEXTS = {"csv": f"id,name,ip,key\n{ROW}\n", "keys": f"001 my_agent 192.168.1.100 {KEY}\n"}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_is_known_by_its_content(stores: Stores, kind: str) -> None:
    for name in ("agents.db", "agents.csv", "agents", "client.keys", "client.keys.bak", "a.txt"):
        for start in ("", "\n\n", " a comment\n", "# a\n#\n", "\r\n", "\ufeff", "\ufeff#\n"):
            assert serves(stores.text(start + TEXTS[kind], name)), (name, start)


def test_sqlite_is_known_by_its_content(stores: Stores) -> None:
    for name in ("agents.csv", "client.keys", "agents", "a.txt"):
        assert serves(stores.sqlite(name=name))


# ---------------------------------------------------------------- SQLite

SCHEMAS = {
    "the sample's": SAMPLE.read_text() + "; DELETE FROM agent;",
    "no types": UNTYPED_SCHEMA,
    "other columns, other order": "CREATE TABLE agent (zone, agent_key, ip, x, name, id, key, k)",
    "capitals": "CREATE TABLE AGENT (ID text, Name text, IP text, Agent_Key text)",
    "CHAR": "CREATE TABLE agent (id char(8), name char(128), ip char(19), agent_key char(128))",
    "numbers": "CREATE TABLE agent (id INTEGER PRIMARY KEY, name, ip, agent_key)",
    "numbers in two digits": "CREATE TABLE agent (id REAL, name, ip, agent_key)",
    "decimal": "CREATE TABLE agent (id DECIMAL(8, 2), name, ip, agent_key)",
    "without rowid": "CREATE TABLE agent (id text PRIMARY KEY, name, ip, agent_key) WITHOUT ROWID",
    "unique": "CREATE TABLE agent (id text UNIQUE, name UNIQUE, ip UNIQUE, agent_key)",
    "no case": "CREATE TABLE agent (id COLLATE NOCASE, name, ip COLLATE NOCASE, agent_key)",
    "right trim": "CREATE TABLE agent (id text COLLATE RTRIM, name, ip COLLATE RTRIM, agent_key)",
    "partial index": PLAIN_SCHEMA + "; CREATE INDEX agent_ip ON agent (ip) WHERE ip LIKE '%/%'",
    "big pages": "PRAGMA page_size = 65536;" + PLAIN_SCHEMA,
    "UTF-16": "PRAGMA encoding = 'UTF-16';" + PLAIN_SCHEMA,
    "auto vacuum": "PRAGMA auto_vacuum = FULL;" + PLAIN_SCHEMA,
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_sqlite(stores: Stores, schema: str) -> None:
    rows = [Record(), Record("002", "other", "10.0.0.0/8"), Record("1234", "last", "10.0.0.0/24")]
    path = stores.sqlite(rows, schema)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert serves(path)
    assert look(path, "id", "1234")["data"]["name"] == "last"
    assert look(path, "id", "0002")["error"] == 4
    assert look(path, "ip", "10.1.1.1")["data"]["id"] == "002"
    assert look(path, "ip", "10.0.0.1")["data"]["id"] == "1234"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(stores.folder.iterdir()) == [path]


ID_COLUMNS = ["", "TEXT", "VARCHAR(8)", "INTEGER", "INT", "REAL", "DECIMAL(8, 0)", "BLOB", "ANY"]


@pytest.mark.parametrize("stored", ["7", "07", "007", 7, 7.0], ids=repr)
def test_ids_that_lost_their_zeros(stores: Stores, stored: Any) -> None:
    """In a column of any type, and in what a view makes of one."""
    for column in ID_COLUMNS:
        schema = f"CREATE TABLE agent (id {column}, name, ip, agent_key)"
        rows = [Record(stored), Record("70"), Record("1007"), Record("8", "eight")]
        path = stores.sqlite(rows, schema)
        if stored != 7.0 or isinstance(stored, int) or column not in ("TEXT", "VARCHAR(8)"):
            assert look(path, "id", "007").get("data", {}).get("id") == "007", column
        assert look(path, "id", "0007")["error"] == 4, column
        path.unlink()


@pytest.mark.parametrize("expression", ["n", "n + 0", "n * 1.0", "n || ''", "printf('%03d', n)"])
def test_ids_of_a_view(stores: Stores, expression: str) -> None:
    select = f"SELECT {expression} AS id, 'a' AS name, 'any' AS ip, 'k' AS agent_key FROM t"
    path = view(stores, select)
    database = sqlite3.connect(str(path))
    with database:
        database.execute("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO t VALUES (7), (70), (1007)")
    database.close()
    assert look(path, "id", "007").get("data", {}).get("id") == "007"
    assert look(path, "id", "1007").get("data", {}).get("id") == "1007"
    assert look(path, "id", "001")["error"] == 4


def test_two_rows_of_one_id_are_two_though_they_are_spelt_otherwise(stores: Stores) -> None:
    for pair in (("1", "001"), (1, "01"), (1, 1.0), ("001", "001")):
        assert look(stores.untyped(map(Record, pair)), "id", "001")["error"] == 5
        (stores.folder / "agents.db").unlink()


def test_blobs_and_bytes_that_are_no_utf8(stores: Stores) -> None:
    """SQLite stores any bytes as text: reading them must be no internal error."""
    secret, key = SECRET.encode().hex(), KEY.encode().hex()
    schema = UNTYPED_SCHEMA + (
        f"; INSERT INTO agent VALUES ('002', CAST(x'ff61' AS TEXT), 'any', '{SECRET}')"
        f"; INSERT INTO agent VALUES ('003', 'x', 'any', CAST(x'{secret}ff' AS TEXT))"
        f"; INSERT INTO agent VALUES ('004', x'6f6b', x'616e79', x'{key}')"
        f"; INSERT INTO agent VALUES ('005', 'x', CAST(x'fe' AS TEXT), x'{secret}')"
    )
    path = stores.sqlite(schema=schema)
    assert serves(path)
    assert [look(path, "id", f"00{number}")["error"] for number in (2, 3, 4, 5)] == [6, 6, 0, 6]
    assert look(path, "id", "004")["data"] == {"id": "004", "name": "ok", "ip": "any", "key": KEY}


def test_huge_values(stores: Stores) -> None:
    path = stores.sqlite([Record(key=SECRET * 200_000), Record("002", SECRET * 200_000, "any")])
    assert look(path, "id", "001")["error"] == 6
    assert look(path, "id", "002")["error"] == 6
    assert look(path, "ip", "192.168.1.100")["error"] == 6


def test_a_view_of_another_schema(stores: Stores) -> None:
    path = stores.folder / "hosts.db"
    database = sqlite3.connect(str(path))
    database.executescript(f"""
        CREATE TABLE host (number INTEGER PRIMARY KEY, label TEXT, secret TEXT);
        CREATE TABLE address (host INTEGER, address TEXT);
        CREATE VIEW agent AS SELECT number AS id, label AS name, address AS ip, secret AS agent_key
            FROM host LEFT JOIN address ON host = number;
        INSERT INTO host VALUES (1, 'my_agent', '{KEY}'), (2, 'roaming', 'other');
        INSERT INTO address VALUES (1, '192.168.1.100');
    """)
    database.close()
    assert serves(path)
    assert look(path, "id", "002")["data"]["ip"] == "any"


@pytest.mark.parametrize("missing", ["id", "name", "ip", "agent_key"])
def test_sqlite_without_a_column(stores: Stores, missing: str) -> None:
    """SQLite takes a quoted name of no column for a text: that must not come out as a key."""
    columns = [column for column in ("id", "name", "ip", "agent_key") if column != missing]
    path = stores.text("", "agents.db")
    database = sqlite3.connect(str(path))
    with database:
        database.execute(f"CREATE TABLE agent ({', '.join(columns)}, key)")
        database.execute("INSERT INTO agent VALUES ('001', '192.168.1.100', '10.0.0.5', 'k')")
    database.close()
    assert refuses(path) == LACKS
    assert refuses(path, "ip", "192.168.1.100") == LACKS


@pytest.mark.parametrize("value", ["001' OR '1'='1", "001; DROP TABLE agent", "%", "_01", "0*1"])
def test_sqlite_takes_no_sql_from_a_request(stores: Stores, value: str) -> None:
    path = stores.sqlite()
    assert look(path, "id", value)["error"] == look(path, "ip", value)["error"] == 3
    assert serves(path)


ONE = f"SELECT '001' AS id, 'n' AS name, '192.168.1.100' AS ip, '{SECRET}' AS agent_key"
FOREVER = "WITH RECURSIVE f(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM f)"
VIEWS = {  # of which none can answer, and each holds a key where a message may repeat its text
    "a missing table": f"SELECT * FROM {SECRET}",
    "a missing column": f"SELECT {SECRET} AS id, 1 AS name, 1 AS ip, 1 AS agent_key FROM one",
    "a missing column of a table": f"SELECT one.{SECRET} AS id, name, ip, agent_key FROM one",
    "a missing database": f"SELECT id, name, ip, {SECRET}.one.agent_key FROM one",
    "a missing function": f"SELECT {SECRET}(id) AS id, name, ip, agent_key FROM one",
    "a missing collation": f"{ONE} ORDER BY 1 COLLATE {SECRET}",
    "a missing index": f"SELECT * FROM one INDEXED BY {SECRET}",
    "a table that is no function": f"SELECT * FROM {SECRET}(1)",
    "a table with arguments": f"SELECT one.* FROM one, one('{SECRET}') AS two",
    "too few values": f"WITH {SECRET}(a, b) AS (SELECT 1) SELECT one.* FROM one, {SECRET}",
    "itself": "SELECT * FROM agent",
    "a circle": f"SELECT * FROM {SECRET}_1",
    "no common column": f"SELECT one.* FROM one JOIN (SELECT 1 AS {SECRET}) USING ({SECRET})",
    "a column twice": f"SELECT id AS id, name, ip, agent_key, {SECRET} FROM one, (SELECT 1 AS"
    f" {SECRET}), (SELECT 2 AS {SECRET})",
    "a CTE of itself": f"WITH {SECRET} AS (SELECT * FROM {SECRET}) SELECT one.* FROM one, {SECRET}",
    "no window": f"SELECT sum(1) OVER {SECRET} AS id, name, ip, agent_key FROM one",
    "wrong arguments": f"SELECT abs('{SECRET}', 1) AS id, name, ip, agent_key FROM one",
    "no JSON": f"SELECT json('{SECRET}') AS id, name, ip, agent_key FROM one",
    "no JSON path": f"SELECT json_extract('1', '{SECRET}') AS id, name, ip, agent_key FROM one",
    "an aggregate": f"SELECT id, name, ip, agent_key FROM one WHERE sum({SECRET}) = 1",
    "an overflow": f"SELECT abs(-9223372036854775808) AS id, name, ip, '{SECRET}' AS agent_key",
    "two columns": f"SELECT (SELECT 1, '{SECRET}') AS id, name, ip, agent_key FROM one",
    "a long pattern": f"SELECT 'a' LIKE '{SECRET * 2000}' AS id, name, ip, agent_key FROM one",
    "an escape": f"SELECT 'a' LIKE 'b' ESCAPE '{SECRET}' AS id, name, ip, agent_key FROM one",
    "too big": "SELECT zeroblob(2000000000) AS id, name, ip, agent_key FROM one",
    "MATCH": f"SELECT id MATCH '{SECRET}' AS id, name, ip, agent_key FROM one",
    "load_extension": f"SELECT load_extension('{SECRET}') AS id, name, ip, agent_key FROM one",
}


def view(stores: Stores, select: str) -> Path:
    """Make a database whose `agent` is a view, which SQLite looks into only when it is asked."""
    path = stores.text("", "agents.db")
    database = sqlite3.connect(str(path))
    database.execute(f"CREATE VIEW one AS {ONE}")
    database.execute(f"CREATE VIEW {SECRET}_1 AS SELECT * FROM {SECRET}_2")
    database.execute(f"CREATE VIEW {SECRET}_2 AS SELECT * FROM {SECRET}_1")
    database.execute(f"CREATE VIEW agent AS {select}")
    database.commit()
    database.close()
    return path


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_that_fails(stores: Stores, case: str) -> None:
    path = view(stores, VIEWS[case])
    for words in (["id", "002"], ["ip", "192.168.1.100"]):
        refuses(path, *words)


MALFORMED = {
    "syntax": f"CREATE TABLE {SECRET} (",
    "a word": SECRET,
    "a type": f"CREATE TABLE {SECRET} (a, a)",
    "an index of nothing": f"CREATE INDEX {SECRET} ON nowhere (x)",
    "a quote": f"CREATE TABLE '{SECRET}",
    "a view": f"CREATE VIEW {SECRET} AS SELECT * FROM {SECRET}.x",
    "a module": f"CREATE VIRTUAL TABLE agent2 USING {SECRET}(x)",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_schema_whose_names_hold_a_key(stores: Stores, case: str) -> None:
    path = stores.sqlite()
    database = sqlite3.connect(str(path), isolation_level=None)
    database.executescript("CREATE TABLE other (x); PRAGMA writable_schema = ON")
    database.execute(
        "UPDATE sqlite_master SET sql = ?, name = ? WHERE name = 'other'", [MALFORMED[case], SECRET]
    )
    database.close()
    for words in (["id", "001"], ["ip", "192.168.1.100"]):
        content = look(path, *words) if case == "a module" else {"message": refuses(path, *words)}
        assert "error" in content or content["message"] == "malformed database schema"


SAYS = {  # what SQLite says of a failure, and what is told of it
    **{
        text: text
        for text in (
            *("database disk image is malformed", "disk I/O error", "file is not a database"),
            *("unable to open database file", "database or disk is full"),
        )
    },
    f"malformed database schema ({SECRET}) - near {SECRET}": "malformed database schema",
    f"no such table: {SECRET}": LACKS,
    f"no such column: {SECRET}": LACKS,
    "interrupted": LATE,
    "database is locked": f"locked by others, {LATE}",
    f"no such function: {SECRET}": "SQLite cannot read it",
}


def test_what_sqlite_says() -> None:
    for text, told in SAYS.items():
        assert script.reason_of(sqlite3.OperationalError(text)) == told


@pytest.mark.parametrize("column", [
    "id ANY", "id", "id BLOB", "raw, id GENERATED ALWAYS AS (raw) STORED", "id INTEGER", "id TEXT",
])  # fmt: skip
def test_an_id_that_is_a_number(stores: Stores, column: str) -> None:
    """Whether the column makes a text of it or not."""
    given = column.split()[0].strip(",")
    strict = " STRICT" if "ANY" in column and sqlite3.sqlite_version_info >= (3, 37) else ""
    schema = f"CREATE TABLE agent ({column}, name TEXT, ip TEXT, agent_key TEXT){strict}"
    path = stores.folder / "agents.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(schema)
        database.execute(f"INSERT INTO agent ({given}, name, ip, agent_key) VALUES (?, ?, ?, ?)",
                         (1, *Record()[1:]))  # fmt: skip
    assert serves(path)
    asked: list[str] = []
    source = script.open_source(str(path), 60)
    source.connection.set_trace_callback(asked.append)
    for _ in range(2):
        assert source.find("id", ["001", "01", "1"]) == source.find("ip", ["192.168.1.100"])
    pragma, *texts = sorted(asked, key=lambda sql: "PRAGMA" not in sql)
    assert "PRAGMA" in pragma and len(texts) == 4  # what the column is, is asked once
    with_number = column not in ("id INTEGER", "id TEXT")  # it would cost as much again
    assert {sql.rpartition(" IN ")[2].count(",") for sql in texts} == {0, 2 + with_number}


def test_values_that_are_too_much_for_sqlite(stores: Stores) -> None:
    """A number that no column holds is no internal error."""
    path = stores.untyped([Record(2**63 - 1), Record(float("inf"), name=SECRET)])
    assert look(path, "id", "001")["error"] == 4
    assert look(path, "ip", "192.168.1.100")["error"] == 5


def test_an_endless_query_ends_and_says_so(stores: Stores) -> None:
    sql = f"{FOREVER} SELECT x || 'x' AS id, 'n' AS name, x || 'x' AS ip, 'k' AS agent_key FROM f"
    path = view(stores, sql)
    for words in (["id", "001"], ["ip", "10.0.0.5"]):
        assert refuses(path, *words, seconds=0.1) == LATE


def test_a_query_has_the_seconds_that_it_is_given(stores: Stores) -> None:
    """One that takes a while (some millions of steps) is not given up before."""
    sql = f"{FOREVER} SELECT x AS id, 'n' AS name, 'any' AS ip, 'k' AS agent_key FROM f"
    path = view(stores, f"{sql} LIMIT 300000")
    assert look(path, "id", "001")["error"] == 0


@pytest.mark.parametrize("words", [("id", "001"), ("ip", "192.168.1.100")])
def test_under_an_exclusive_lock(
    stores: Stores, locked: Callable[[Path], None], words: tuple[str, str]
) -> None:
    path = stores.sqlite()
    locked(path)
    assert "locked" in refuses(path, *words, seconds=0.1)


def test_a_lock_that_is_given_up_in_time_is_waited_for(stores: Stores) -> None:
    path = stores.sqlite()
    holder = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.3, holder.execute, ["ROLLBACK"])
    release.start()
    assert look(path, "id", "001").get("data") == DATA
    release.join()
    holder.close()


@pytest.fixture
def writer(stores: Stores) -> Iterator[Callable[[str], tuple[Path, sqlite3.Connection]]]:
    """Open a database with agent 001 for writing, in one journal mode, until the test ends."""
    connections: list[sqlite3.Connection] = []

    def open_writer(journal: str) -> tuple[Path, sqlite3.Connection]:
        path = stores.sqlite()
        connection = sqlite3.connect(str(path), isolation_level=None)
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connections.append(connection)
        return path, connection

    yield open_writer
    for connection in connections:
        connection.close()


Writer = Callable[[str], tuple[Path, sqlite3.Connection]]


@pytest.mark.parametrize("journal", ["WAL", "DELETE", "PERSIST", "TRUNCATE"])
def test_a_writer_at_work(writer: Writer, journal: str) -> None:
    path, connection = writer(journal)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE agent SET name = 'uncommitted'")
    assert serves(path)
    connection.execute("COMMIT")
    assert look(path, "id", "001")["data"]["name"] == "uncommitted"


def test_a_log_that_is_not_checkpointed(writer: Writer) -> None:
    path, connection = writer("WAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("UPDATE agent SET name = 'in-the-log'")
    assert Path(f"{path}-wal").stat().st_size
    assert look(path, "id", "001")["data"]["name"] == "in-the-log"
    link = path.parent / "link.db"
    link.symlink_to(path)
    assert look(link, "id", "001")["data"]["name"] == "in-the-log"


@pytest.mark.parametrize("state", ["closed", "at work", "no WAL", "may be written"])
def test_a_database_is_frozen_where_sqlite_could_make_no_files(
    stores: Stores, writer: Writer, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there: changes to such a one do not show."""
    path, connection = writer("DELETE" if state == "no WAL" else "WAL")
    connection.execute("UPDATE agent SET id = id")
    if state != "at work":
        connection.close()
    real, folder = script.posix.access, f"{stores.folder}/"

    def access(name: str, mode: int) -> bool:
        return real(name, mode) and (mode != os.W_OK or name != folder)

    if state != "may be written":
        monkeypatch.setattr(script.posix, "access", access)
    before = sorted(os.listdir(folder))
    source = script.open_source(str(path), PATIENCE)
    assert source.frozen == (state == "closed")
    rows = source.rows()
    assert tuple(next(rows)[1]) == tuple(Record())
    assert sorted(os.listdir(folder)) == before or state == "may be written"


def test_a_log_whose_writer_was_killed(stores: Stores) -> None:
    """What was committed to the log counts, though nobody has the database open."""
    path = stores.sqlite()
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA journal_mode = WAL'); c.execute(\"UPDATE agent SET name = 'late'\");"
        "os.kill(os.getpid(), 9)"
    )
    assert run([sys.executable, "-c", code, path]).status == -9
    assert Path(f"{path}-wal").stat().st_size
    assert look(path, "id", "001")["data"]["name"] == "late"


def test_a_wal_database_that_was_closed(writer: Writer) -> None:
    path, connection = writer("WAL")
    connection.close()
    assert not Path(f"{path}-wal").exists()
    assert serves(path)


# ---------------------------------------------------------------- CSV

CSVS = {
    "agent_key": f"id,name,ip,agent_key\n{ROW}\n",
    "key before agent_key": f"agent_key,id,name,ip,key\nother,{ROW}\n",
    "capitals": f"Id,NAME,IP,Agent_Key\n{ROW}\n",
    "no last newline": f"id,name,ip,key\n{ROW}",
    "CRLF": f"id,name,ip,key\r\n{ROW}\r\n",
    "BOM and CRLF": f"\ufeffid,name,ip,key\r\n{ROW}\r\n",
    "BOM and quotes": f'\ufeff"id","name","ip","key"\n{ROW}\n',
    "semicolons": f"id;name;ip;key\n{ROW}\n".replace(",", ";"),
    "tabs": f"id\tname\tip\tkey\n{ROW}\n".replace(",", "\t"),
    "other order": f"key,ip,name,id\n{KEY},192.168.1.100,my_agent,001\n",
    "other columns": f"X,id,b,name,c,ip,d,key,e\n1,001,2,my_agent,3,192.168.1.100,4,{KEY},5\n",
    "other columns, not ASCII": f"ort,id,name,ip,key,größe\nKöln,{ROW},ß\n",
    "quotes": f'"id","name","ip","key"\n"001","my_agent","192.168.1.100","{KEY}"\n',
    "quotes and semicolons": f'"id";"name";"ip";"key"\n"001";"my_agent";"192.168.1.100";"{KEY}"\n',
    "quotes and tabs": f'"id"\t"name"\t"ip"\t"key"\n"001"\t"my_agent"\t"192.168.1.100"\t"{KEY}"\n',
    "some quotes": f'id,"name",ip,key\n"001",my_agent,"192.168.1.100",{KEY}\n',
    "padded header": f"id, name , ip, key\n{ROW}\n",
    "padding": f"id,name,ip,key\n001,  my_agent,192.168.1.100,{KEY}   \n",
    "one digit": f"id,name,ip,key\n1,my_agent,192.168.1.100,{KEY}\n",
    "two digits": f"id,name,ip,key\n01,my_agent,192.168.1.100,{KEY}\n",
    "blank lines": f"id,name,ip,key\n\n{ROW}\n\n\n",
    "empty rows": f"id,name,ip,key\n,,,\n{ROW}\n,,,\n",
    "more fields than the header": f"id,name,ip,key\n{ROW},,,\n",
    "semicolons in a comma header's column": f'id,name,ip,key,"a;b;c;d;e"\n{ROW},1\n',
}


@pytest.mark.parametrize("content", CSVS.values(), ids=CSVS)
def test_csv(stores: Stores, content: str) -> None:
    assert serves(stores.text(content, "agents.csv"))


DELIMITERS = {
    "many semicolons in a column of the header": f'id,name,ip,key,"a;b;c;d;e;f;g"\n{ROW},1\n',
    "commas in a column of the header": f'"a, b",id,name,ip,key,agent_key\n1,{ROW},2\n',
    "a key that is another's": f'id,name,ip,"a, b",key,x\n001,my_agent,192.168.1.100,1,{KEY},2\n',
    "quotes in a column of the header": f'"a ""b"", c",id,name,ip,key,x\n1,{ROW},2\n',
}


@pytest.mark.parametrize("content", DELIMITERS.values(), ids=DELIMITERS)
def test_csv_with_delimiters_in_its_header(stores: Stores, content: str) -> None:
    """They must not shift the columns: the right key, or error 2, and never another one."""
    path = stores.text(content, "agents.csv")
    for words in (["id", "001"], ["ip", "192.168.1.100"], ["id", KEY], ["id", "002"]):
        reply = look(path, *words)
        assert reply["error"] in (2, 3, 4) or reply["data"] == DATA
        assert reply["error"] != 4 or words == ["id", "002"]


def test_csv_with_delimiters_and_quotes_in_a_key(stores: Stores) -> None:
    key = 'a,b;c"d"  e'
    assert look(stores.csv([Record(key=key)]), "id", "001")["data"]["key"] == key
    path = stores.text("id;name;ip;key\n001;my_agent;any;a,b,c\n", "agents.csv")
    assert look(path, "id", "001")["data"]["key"] == "a,b,c"
    path = stores.text("id,name,ip,key\n001,my_agent,any,a;b;c\n", "agents.csv")
    assert look(path, "id", "001")["data"]["key"] == "a;b;c"


def test_csv_with_a_header_only(stores: Stores) -> None:
    for header in ("id,name,ip,key", "id,name,ip,key\n", "\ufeffid;name;ip;key\r\n"):
        path = stores.text(header, "agents.csv")
        assert look(path, "id", "001")["error"] == look(path, "ip", "10.0.0.5")["error"] == 4


@pytest.mark.parametrize(
    ("stored", "asked", "error"),
    [
        *(("1", "001", 0), ("01", "001", 0), ("12", "012", 0), ("12345678", "12345678", 0)),
        *(("0001", "001", 4), ("0001", "0001", 6), ("1", "0001", 4), ("1234", "1234", 0)),
        *(("1.0", "001", 4), ("+1", "001", 4), ("١", "001", 4), ("²", "002", 4), (" 1", "001", 4)),
        ("0", "000", 6),
    ],
)
def test_csv_ids(stores: Stores, stored: str, asked: str, error: int) -> None:
    content = look(stores.csv([Record(id=stored)]), "id", asked)
    assert content["error"] == error
    assert error or content["data"]["id"] == asked


@pytest.mark.parametrize("row", ["001", "001,", "001,n", "001,n,any", "001,,,", "1,a,,", "001,n,,"])
def test_csv_row_that_is_too_short(stores: Stores, row: str) -> None:
    path = stores.text(f"id,name,ip,key\n{row}\n{ROW[:2]}2{ROW[3:]}\n", "agents.csv")
    assert look(path, "id", "001")["error"] == 6
    assert look(path, "id", "002")["error"] == 0


HARMLESS = {  # rows that are no agents, or broken ones, which is a matter of their own
    "not UTF-8": b"002,caf\xe9,any,k\n",
    "half a character": b"002,caf\xc3,any,k\n",
    "UTF-8": "002,café,any,k\n".encode(),
    "short": b"002\n",
    "empty": b"\n",
    "blank": b"   \n",
    "long": b"002,a,any,k,x,x,x,x,x\n",
    "huge field": b"002," + b"n" * 300_000 + b",any,k\n",
    "huge quoted field": b'002,"' + b"n" * 300_000 + b'",any,k\n',
    "carriage return": b"002,a\rb,any,k\n",
    "quote within": b'002,a"b,any,k\n',
    "line separator": "002,a\u2028b,any,k\n".encode(),
    "next line": "002,a\u0085b,any,k\n".encode(),
    "form feed": b"002,a\x0cb,any,k\n",
    "file separator": b"002,a\x1cb,any,k\n",
    "backslash": b"002,a\\,any,k\n",
}


@pytest.mark.parametrize("row", HARMLESS.values(), ids=HARMLESS)
def test_csv_with_another_broken_row(stores: Stores, row: bytes) -> None:
    good = ROW.encode() + b"\n"
    for content in (row + good, good + row, row + good + row):
        assert serves(stores.text(b"id,name,ip,key\n" + content, "agents.csv"))


STARTS = {  # before the header, and the number of the line that comes after it
    "": 2,
    "\ufeff": 2,
    "\n\n": 4,
    "# a comment\n": 3,
    "\r\n# a\r\n\r\n": 5,
    "\ufeff\n# a comment, with\n \n": 5,
}
SWALLOWS = {  # each is told where it starts, and nothing of it is shown
    "a quote that never closes": f'9,"{SECRET},any,k',
    "in a column that nobody reads": f'9,n,any,k,"{SECRET}',
    "in the first column": '"9,n,any,k',
    "at the end": '9,n,any,k,"',
    "a row that spans lines": f'9,n,any,k,"{SECRET}\nb"',
    "a row that spans lines in the name": f'9,"{SECRET}\r\nb",any,k',
    "a row that spans many": '9,n,any,k,"' + "\n" * 100 + '"',
    "a row of a blank line": '9,n,any,k,"\n\n"',
    "a carriage return in quotes": f'9,n,any,k,"{SECRET}\rb"',
    "text after the quotes": f'9,"a"{SECRET},any,k',
    "a NUL": f"9,{SECRET}\0,any,k",
    "a NUL that nobody reads": f"9,n,any,k,{SECRET}\0",
    "NULs": "\0\0\0",
}


@pytest.mark.parametrize("row", SWALLOWS.values(), ids=SWALLOWS)
def test_csv_row_that_swallows_others(stores: Stores, row: str) -> None:
    for start, first in STARTS.items():
        for before in ("", "\n", f"{ROW}\n", f"{ROW}\r\n\n{ROW}\n"):
            for end in ("", "\n", f"\n{ROW}\n", f'\n"x",{ROW}\n"y"\n' * 50):
                path = stores.text(f"{start}id,name,ip,key,x\n{before}{row}{end}", "agents.csv")
                line = first + before.count("\n")
                for words in (["id", "001"], ["ip", "192.168.1.100"], ["id", "002"]):
                    reason = refuses(path, *words)
                    assert reason.startswith(f"line {line}: "), (start, before, end, reason)
                    assert "quote" in reason and "spans lines" in reason and "NUL" in reason


def test_csv_quotes_in_sound_rows(stores: Stores) -> None:
    path = stores.text(f'id,name,ip,key,note\n{ROW},"a ""b"", c"\n2,n,any,k,""\n', "agents.csv")
    assert serves(path)
    assert look(path, "id", "002")["error"] == 0


# ---------------------------------------------------------------- tabs, as mysql --batch writes


def test_tabs_as_mysql_batch_writes_them(stores: Stores) -> None:
    rows = {
        '001\tmy_agent\tNULL\ta\\\\b"c': 'a\\b"c',
        "002\ta\\tb\tany\tk": None,
        "003\ta\\nb\tany\tk": None,
        "004\ta\\0b\tany\tk": None,
        "5\tfive\t10.0.0.5\tk": "k",
        '006\tsix\tany\t"quoted"': "quoted",
        "007\tseven\tany\tNULL": None,
        "008\teight\t\\N\tk": "k",
        "009\tnine\tany\t\\N": None,
        '010\tten\tany\t"a ""b"" c"': 'a "b" c',
        '011\televen\tany\t"': '"',
        '012\ttwelve\tany\t"open': '"open',
        '013\tthirteen\tany\tclose"': 'close"',
        "014\tfourteen\tany\tNULLs": "NULLs",
        "015\tfifteen\tany\t\\\\n\\\\\\\\t": "\\n\\\\t",
        "016\tsixteen\tany\ta\\xb": "a\\xb",
        "017\tseventeen\tany\t\\\\N": "\\N",
        '018\teighteen\tany\t""': None,
        "019\tnineteen\tany": None,
        '"020"\t"twenty"\t"10.0.0.20"\tk': "k",
        "021\ttwenty-one\tany\t\\\\": "\\",
        **{f"0{n}\tn\tany\ta\\{letter}b": None for n, letter in zip((22, 23, 24), "tn0")},
    }
    path = stores.text("id\tname\tip\tagent_key\n" + "\n".join(rows) + "\n", "batch.tsv")
    for number, (row, key) in enumerate(rows.items(), 1):
        content = look(path, "id", f"{number:03}")
        assert content["error"] == (0 if key else 6), row
        assert not key or content["data"]["key"] == key, row
    assert look(path, "id", "001")["data"]["ip"] == look(path, "id", "008")["data"]["ip"] == "any"
    assert look(path, "ip", "10.0.0.5")["data"]["id"] == "005"
    assert look(path, "ip", "10.0.0.20")["data"]["id"] == "020"


def test_tabs_with_a_nul(stores: Stores) -> None:
    path = stores.text(f"id\tname\tip\tkey\n2\tn\tany\tk\n9\t{SECRET}\0\tany\tk\n", "batch.tsv")
    assert refuses(path, "id", "009").startswith("line 3: ")


def test_quotes_mean_nothing_to_mysql_batch(stores: Stores) -> None:
    """An open quote swallows nothing there."""
    path = stores.text(f'id\tname\tip\tkey\n2\t"n\tany\tk\n{ROW}\n'.replace(",", "\t"), "batch.tsv")
    assert serves(path)


# ---------------------------------------------------------------- client.keys

KEYS_LINE = f"001 my_agent 192.168.1.100 {KEY}\n"
KEYS = {
    "no last newline": KEYS_LINE.rstrip("\n"),
    "CRLF": KEYS_LINE.replace("\n", "\r\n"),
    "comments": f"# a comment\n#001 my_agent any other\n{KEYS_LINE}# the end\n",
    "lines that start with a space": f" 001 my_agent any other\n{KEYS_LINE} 001 x any other\n",
    "blank lines": f"\n\n{KEYS_LINE}\n",
    "removed with !": f"001 !my_agent 192.168.1.100 old\n{KEYS_LINE}002 !other any old\n",
    "removed with #": f"001 #my_agent 192.168.1.100 old\n{KEYS_LINE}001 #*#*#*#*# any old\n",
    "removed after": f"{KEYS_LINE}001 !my_agent 192.168.1.100 old\n",
    "removed, and short": f"001 !my_agent\n{KEYS_LINE}001 #\n001 !\n",
    "one digit": KEYS_LINE[2:],
    "short lines": f"002\n002 other\n002 other any\n{KEYS_LINE}003",
    "bytes": f"002 caf\xe9 any k\n{KEYS_LINE}",
    "other rules broken": f"000 a any k\nabc b any k\n002 b nonsense k\n{KEYS_LINE}",
    "a NUL": f"002 a\0b any k\n{KEYS_LINE}\0\n",
    "many": "".join(f"{n} host-{n} any {n}{KEY}\n" for n in range(100, 900)) + KEYS_LINE,
}
FIRST = {  # lines that are broken, or that must not be told from CSV by a comma
    "a broken id": f"abc n any {SECRET}\n",
    "a broken id and an address": f"x1 n 10.0.0.9 {SECRET}\n",
    "a broken id and IPv6": f"abc n 2001:db8::1 {SECRET}\n",
    "a broken ip": f"002 n nonsense {SECRET}\n",
    "a key of a letter": "abc n any X\n",
    "a BOM that is not at the start": f"002 n any {SECRET}\ufeff\n",
    "a broken id of a removed one": f"abc !n any {SECRET}\n",
    "a broken key": f"002 n any {SECRET},é;\t\n",
}


@pytest.mark.parametrize("content", KEYS.values(), ids=KEYS)
def test_client_keys(stores: Stores, content: str) -> None:
    assert serves(stores.text(content.encode("latin-1"), "client.keys"))


@pytest.mark.parametrize("line", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("name", ["client.keys", "agents.db"])
def test_client_keys_whose_first_line_is_broken(stores: Stores, line: str, name: str) -> None:
    """It is a broken record, and no reason not to take the others."""
    path = stores.text(line + KEYS_LINE, name)
    assert serves(path)
    assert look(path, "id", "002")["error"] in (4, 6)


@pytest.mark.parametrize("key", ["two words", "a  b   c", "#k", "!k", "k,e;", '"k"', "XkX", "a\\n"])
def test_client_keys_key_to_the_end_of_the_line(stores: Stores, key: str) -> None:
    assert look(stores.keys([Record(key=key)]), "id", "001")["data"]["key"] == key


def test_client_keys_removed_agents_are_gone(stores: Stores) -> None:
    path = stores.text(
        "001 !gone 10.0.0.5 k\n002 #gone 10.0.0.6 k\n003 here 10.0.0.7 k\n004 !net 10.0.0.0/8 k\n",
        "client.keys",
    )
    assert [look(path, "id", f"00{n}")["error"] for n in (1, 2, 3, 4)] == [4, 4, 0, 4]
    assert [look(path, "ip", f"10.0.0.{n}")["error"] for n in (5, 6, 7, 8)] == [4, 4, 0, 4]


def test_client_keys_without_agents(stores: Stores) -> None:
    for content in ("# only a comment\n", "001 !gone any k\n", "\n", " 001 a any k\n", "#"):
        assert look(stores.text(content, "client.keys"), "id", "001")["error"] == 4
        if content.strip():
            assert look(stores.text(content, "agents.db"), "id", "001")["error"] == 4


@pytest.mark.parametrize("line", ["001", "001 my_agent", "001 my_agent any", "001 my_agent any "])
def test_client_keys_line_that_is_too_short(stores: Stores, line: str) -> None:
    path = stores.text(f"002 other any k\n{line}\n", "client.keys")
    assert look(path, "id", "001")["error"] == 6


def test_client_keys_lines_that_break_a_rule(stores: Stores) -> None:
    rows = [Record(ip="x", key=SECRET), Record("002", "é", key=SECRET), Record("3", "c", key="é")]
    path = stores.keys([*rows, Record("0004", key=SECRET), Record(key=SECRET, id="5", name=".")])
    assert [look(path, "id", f"00{n}")["error"] for n in (1, 2, 3, 5)] == [6, 6, 6, 6]
    assert look(path, "id", "0004")["error"] == 6
    assert look(stores.keys([Record(), Record("1", "other", "any")]), "id", "001")["error"] == 5


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"], ids=ascii)
def test_client_keys_ends_a_line_at_a_newline_only(stores: Stores, end: str) -> None:
    """Else an agent could be made up in the middle of another one's line."""
    path = stores.text(f"002 other any k{end}001 evil 10.0.0.5 k\n" * 2, "client.keys")
    assert look(path, "id", "001")["error"] == look(path, "ip", "10.0.0.5")["error"] == 4


@pytest.mark.parametrize("length", [5_000, 9_998, 9_999, 200_000])
def test_a_long_first_line_is_one_line(stores: Stores, length: int) -> None:
    """Its end must not be taken for an agent."""
    comment = "#".ljust(length, "x") + f"001 evil any {SECRET}\n"
    for content in (TEXTS["keys"], TEXTS["csv"]):
        assert serves(stores.text(comment + content, "agents"))
        assert serves(stores.text("#" + comment + content, "agents"))
    wide = f"id,name,ip,key,{'x' * length}\n{ROW}\n"
    assert serves(stores.text(wide, "agents.csv"))
    first = f"002 n any {'k' * length}001 evil any k\n"
    assert serves(stores.text(first + KEYS_LINE, "client.keys"))


# ---------------------------------------------------------------- SQL scripts

AGENT = UNTYPED_SCHEMA + ";\n"  # one line
INSERT = f"INSERT INTO agent VALUES ('001', 'my_agent', '192.168.1.100', '{KEY}')"
SCRIPTS = {
    "plain": f"{AGENT}{INSERT};\n",
    "no last semicolon": f"{AGENT}{INSERT}",
    "no last semicolon, but a newline": f"{AGENT}{INSERT}\n\n",
    "no last semicolon, but a comment": f"{AGENT}{INSERT} -- the end",
    "one line": f"{UNTYPED_SCHEMA}; {INSERT};",
    "CRLF": f"{AGENT}{INSERT};\n".replace("\n", "\r\n"),
    "BOM": f"\ufeff{AGENT}{INSERT};\n",
    "a transaction": f"BEGIN TRANSACTION;\n{AGENT}{INSERT};\nCOMMIT;\n",
    "a transaction that is left open": f"BEGIN;\n{AGENT}{INSERT};\n",
    "a dump": f"PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\n{AGENT}{INSERT};\nCOMMIT;\n",
    "empty statements": f";;\n;{AGENT};;{INSERT};;;\n;",
    "a comment at the end": f"{AGENT}{INSERT};\n-- the end\n",
    "a comment at the end, no newline": f"{AGENT}{INSERT};\n-- the end",
    "a comment at the end, in C": f"{AGENT}{INSERT};\n/* the end; */",
    "comments": f"-- a; b\n/* c; 'd */ {AGENT}-- it's ; \n{INSERT} /* ; */ -- ;\n;\n",
    "semicolons in strings": f"{AGENT}INSERT INTO agent VALUES ('002', ';''; --', ';\n;', ';');\n"
    f"{INSERT};\n",
    "semicolons in names": f'CREATE TABLE "a;b" ([c;d], `e;f`);\n{AGENT}{INSERT};',
    "a trigger": f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN\n"
    "  UPDATE agent SET name = 'my_agent' WHERE id = new.id;\n  SELECT ';';\nEND;\n"
    f"{INSERT.replace('my_agent', 'other')};\n",
    "a view": f"{UNTYPED_SCHEMA.replace('agent', 'h', 1)};\n{INSERT.replace('agent', 'h', 1)};\n"
    "CREATE VIEW agent AS SELECT * FROM h;",
    "many statements a line": f"{UNTYPED_SCHEMA};" + f"{INSERT}; DELETE FROM agent;" * 50 + INSERT,
    "a SELECT": f"{AGENT}SELECT * FROM agent;\n{INSERT};\nSELECT 1;\n",
}


@pytest.mark.parametrize("content", SCRIPTS.values(), ids=SCRIPTS)
def test_sql_script(stores: Stores, content: str) -> None:
    path = stores.text(content, "agents.sql")
    assert look(path, "id", "001").get("data") == DATA, look(path, "id", "001")
    assert look(path, "ip", "192.168.1.100").get("data") == DATA
    assert look(path, "id", "999")["error"] == 4
    assert path.read_bytes() == content.encode()
    assert list(stores.folder.iterdir()) == [path]


def test_the_sample_is_sound() -> None:
    """And shows `any`, a network and IPv6."""
    database = sqlite3.connect(":memory:")
    database.executescript(SAMPLE.read_text())
    rows = database.execute("SELECT id, name, ip, agent_key FROM agent").fetchall()
    database.close()
    assert len(rows) == 6
    for row in rows:
        assert look(SAMPLE, "id", row[0])["data"] == Record(*row)._asdict()
    stored = [row[2] for row in rows]
    assert "any" in stored
    assert any("/" in ip and "." in ip for ip in stored)
    assert any("/" in ip and ":" in ip for ip in stored)
    assert look(SAMPLE, "ip", "10.20.30.40")["data"]["id"] == "003"
    assert look(SAMPLE, "ip", "10.20.31.40")["data"]["id"] == "004"


BROKEN = f"INSERT INTO {SECRET} VALUES ('{SECRET}')"
SECRET_ROW = f"INSERT INTO agent VALUES ('002', 'n', 'any', '{SECRET}')"
FAILING = {  # and the line at which the failing statement starts
    "a missing table": (f"{AGENT}{SECRET_ROW};\n{BROKEN};\n", 3),
    "the first line": (f"{BROKEN};\n{AGENT}", 1),
    "no SQL": (f"this is {SECRET}", 1),
    "a word after blank lines": (f"\n\n{AGENT}\n\n\n{SECRET};\n", 7),
    "on the line of another": (f"{AGENT}{SECRET_ROW}; {BROKEN};\n", 2),
    "which ends on the line": (f"{AGENT}INSERT INTO agent\nVALUES (1, 2,\n3, 4); {BROKEN};\n", 4),
    "over lines": (f"{AGENT}\nINSERT INTO agent\n\nVALUES ('{SECRET}');\n{SECRET_ROW};\n", 3),
    "after CRLF": (f"{AGENT}\n{SECRET_ROW};\n{BROKEN};\n".replace("\n", "\r\n"), 4),
    "after a comment": (f"{AGENT}-- {SECRET}; '\n/* {SECRET}\n ; */\n\n{BROKEN};\n", 6),
    "after a comment on its line": (f"{AGENT}/* {SECRET};\n */ {BROKEN};\n", 3),
    "in a transaction": (f"BEGIN;\n{AGENT}{SECRET_ROW};\n{BROKEN};\nCOMMIT;\n", 4),
    "a COMMIT too many": (f"{AGENT}{SECRET_ROW};\nCOMMIT;\n", 3),
    "a BEGIN too many": (f"BEGIN;\n{AGENT}{SECRET_ROW};\nBEGIN;\nCOMMIT;\n", 4),
    "after a trigger": (
        f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN\n SELECT 1;\nEND;\n{BROKEN};",
        5,
    ),
    "a trigger": (
        f"{AGENT}\nCREATE TRIGGER t AFTER INSERT ON {SECRET} BEGIN\n SELECT 1;\nEND;\n{INSERT};",
        3,
    ),
    "after semicolons in strings": (f"{AGENT}{SECRET_ROW[:-1]} || ';\n;');\n{BROKEN};", 4),
    "without its semicolon": (f"{AGENT}{SECRET_ROW};\n\n{BROKEN}\n\n", 4),
    "a quote that never closes": (f"{AGENT}\n{SECRET_ROW[:-2]};\n{INSERT};\n", 3),
    "a comment that never closes": (f"{AGENT}{SECRET_ROW} /* {SECRET};\n{INSERT};\n", 2),
    "a trigger that never ends": (
        f"{AGENT}\nCREATE TRIGGER t AFTER INSERT ON agent BEGIN\nSELECT '{SECRET}';\n{INSERT};\n",
        3,
    ),
    "a missing semicolon": (f"{AGENT}{SECRET_ROW}\n{SECRET_ROW};\n", 2),
    "a constraint": (f"{AGENT}CREATE UNIQUE INDEX i ON agent (id);\n{f'{SECRET_ROW};' * 2}", 3),
    "a RAISE": (
        f"{AGENT}CREATE TRIGGER t BEFORE INSERT ON agent\n"
        f"BEGIN SELECT RAISE(ABORT, '{SECRET}'); END;\n{SECRET_ROW};\n",
        4,
    ),
    "a NUL": (f"{AGENT}{SECRET_ROW};\n{SECRET_ROW}\0;\n", 3),
    "a column too many": (f"{AGENT}\n\nINSERT INTO agent VALUES ('{SECRET}', 2, 3, 4, 5);", 4),
    "an unknown function": (f"{AGENT}SELECT {SECRET}('{SECRET}');", 2),
    "ATTACH": (f"{AGENT}ATTACH '{SECRET}' AS other;", 2),
    "VACUUM INTO": (f"{AGENT}VACUUM INTO '{SECRET}';", 2),
    "a command of the shell": (f"{AGENT}\n.print {SECRET}\n", 3),
}


@pytest.mark.parametrize("case", FAILING)
def test_sql_script_that_fails(stores: Stores, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stores.folder)
    content, line = FAILING[case]
    path = stores.text(content, "agents.sql")
    for words in (["id", "001"], ["ip", "10.0.0.5"]):
        reason = refuses(path, *words)
        assert reason.startswith(f"line {line}: "), reason
        assert reason.endswith(("SQLite cannot run this", "a statement without an end")), reason
    assert os.listdir() == ["agents.sql"]


def test_sql_script_without_agents(stores: Stores) -> None:
    for content in ("", "\n", "SELECT 1;", "CREATE TABLE agent (id, name, ip);", "-- nothing\n"):
        assert refuses(stores.text(content, "agents.sql")) == LACKS


def test_sql_script_of_one_huge_statement(stores: Stores) -> None:
    """One answer had a million bytes."""
    path = stores.text(f"{AGENT}INSERT INTO nowhere VALUES ('{SECRET * 30_000}');", "agents.sql")
    assert refuses(path) == "line 2: SQLite cannot run this"


def test_sql_script_with_many_semicolons_in_a_string(stores: Stores) -> None:
    """Each is no more work than the last, or a quote that is not closed holds everything up."""
    many = f"{SECRET_ROW[:-2]};\n" + f"{INSERT.replace(KEY, 'k')};\n" * 40_000
    path = stores.text(AGENT + many, "agents.sql")

    def give_up(*_: Any) -> None:
        raise AssertionError("it takes far too long")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    try:
        assert refuses(path).startswith("line 2: ")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_sql_script_that_never_ends(stores: Stores) -> None:
    """Named by its file, and by its line where it is a statement of the script."""
    endless = f"CREATE VIEW agent AS {FOREVER} SELECT x AS id, 1 AS name, x || 'x' AS ip, 2 AS"
    path = stores.text(f"{endless} agent_key FROM f;", "agents.sql")
    assert refuses(path, "ip", "10.0.0.5", seconds=0.1) == LATE
    path = stores.text(f"{AGENT}\n{FOREVER} SELECT max(x) FROM f;", "agents.sql")
    assert refuses(path, seconds=0.1) == f"line 3: {LATE}"


# ---------------------------------------------------------------- the rows of a source


@pytest.mark.parametrize("kind", ["sqlite", "untyped", "csv", "keys", "sql"])
def test_the_rows_of_a_source(stores: Stores, kind: str) -> None:
    """With their numbers, by which --import and --check name them."""
    rows = [Record(), Record("002", "other", "10.0.0.0/8"), Record("3", "c", "nonsense")]
    path = stores.make(kind, rows)
    source = script.open_source(str(path), PATIENCE)
    numbers = {"csv": (2, 3, 4)}.get(kind, (1, 2, 3))
    assert [(n, tuple(row)) for n, row in source.rows()] == list(zip(numbers, rows, strict=True))
    assert source.unit == ("line" if kind in ("csv", "keys") else "row")


NUMBERED = {
    "client.keys": (f"#a\n\n{KEYS_LINE}002 !gone any k\n00X\n \n{KEYS_LINE}", [3, 5, 7]),
    "agents.csv": (f"\n# a\nid,name,ip,key\n\n{ROW}\n3\n\n{ROW}\n", [5, 6, 8]),
    "bom.csv": (f"\ufeff\nid,name,ip,key\n{ROW}\n3\n\n{ROW}\n", [3, 4, 6]),
    "batch.tsv": (f"id,name,ip,key\n{ROW}\n3\n\n{ROW}\n".replace(",", "\t"), [2, 3, 5]),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_the_numbers_of_lines(stores: Stores, name: str) -> None:
    """Comments, blank lines and removed agents count, too; what a line lacks breaks every rule."""
    content, numbers = NUMBERED[name]
    source = script.open_source(str(stores.text(content, name)), PATIENCE)
    rows = list(source.rows())
    assert [number for number, _ in rows] == numbers
    good, short = tuple(Record()), ("00X" if "keys" in name else "3", *[script.MISSING] * 3)
    assert [tuple(row) for _, row in rows] == [good, short, good]


def test_the_lines_of_a_text_may_be_passed_through_something(stores: Stores) -> None:
    """An import sees whether the last one is whole."""
    for kind in ("csv", "keys"):
        seen: list[str] = []

        def whole(lines: Any, header: list[str], seen: list[str] = seen) -> Any:
            seen += header
            for line in lines:
                seen.append(line)
                yield line

        path = stores.make(kind, [Record(), Record("002")])
        with path.open("rb") as stream:
            rows = list(script.open_text(stream, str(path), whole).rows())
        assert len(rows) == 2
        assert [line.rstrip("\r\n") for line in seen] == path.read_text().splitlines()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["indexed", "csv", "keys"])
def test_a_source_that_is_damaged(stores: Stores, kind: str) -> None:
    """Bytes overwritten or cut off: any answer but an internal error, and never a key shown."""
    rows = [Record(f"{row:03}", f"a-{row}", f"10.0.{row}.0/24", SECRET) for row in range(1, 60)]
    path = stores.make(kind, rows)
    sound = path.read_bytes()
    chance = random.Random(7)
    for round_ in range(100):
        content = bytearray(sound)
        if round_ % 3 == 0:
            del content[chance.randrange(20, len(content)) :]
        for _ in range(chance.choice([1, 20, 400])):
            place = chance.randrange(16 if round_ % 2 else min(100, len(content) - 1), len(content))
            content[place] = chance.choice([chance.randrange(256), *b'\0\r\n\t",; #!'])
        path.write_bytes(content)
        for words in (["id", "007"], ["ip", "10.0.9.1"]):
            reply = script.answer(words, lambda: script.open_source(str(path), 5))
            error = check_line(reply.line())["error"]
            assert error in (0, 2, 4, 5, 6), reply.message
            assert error == 0 or SECRET[:12] not in reply.message
