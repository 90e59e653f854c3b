"""SQLite sources: every schema, a view that fails, an index that lies, writers and their logs."""

from __future__ import annotations

import _sqlite3
import contextlib
import itertools
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Record, Stores, script
from manager import run
from sources import DATA, LACKS, LATE, PATIENCE, SECRET, look, refuses, serves

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

NAMED = {  # the columns of a table, all of which are known names in any case
    "as .import --csv makes it": "id TEXT, name TEXT, ip TEXT, key TEXT",
    "capitals": "ID, NAME, IP, KEY",
    "address": "id, name, Address, agent_key",
    "register_ip": "id, name, register_ip, key",
    "registerIP": "id, name, registerIP, key",
    "internal_key": "id, name, ip, internal_key",
    "among others": "zone, key, os, address, port, name, id, keys, addresses",
    "an address next to ip": "id, name, address, ip, agent_key",  # perhaps a street
    "other names next to those of sample.db.sql": "key, agent_key, registerIP, ip, name, id",
}
GLOBAL_DB = """
    CREATE TABLE agent (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, ip TEXT, register_ip TEXT NOT NULL,
        internal_key TEXT, os_name TEXT, os_version TEXT, version TEXT, node_name TEXT,
        date_add INTEGER NOT NULL, last_keepalive INTEGER, `group` TEXT DEFAULT 'default',
        connection_status TEXT NOT NULL DEFAULT 'never_connected'
    );
    CREATE INDEX agent_name ON agent (name);
    CREATE INDEX agent_ip ON agent (ip);
    INSERT INTO agent (id, name, ip, register_ip, internal_key, date_add) VALUES
        (0, 'manager', '127.0.0.1', '127.0.0.1', NULL, 1),
        (1, 'my_agent', '10.9.9.9', '192.168.1.100', '%s', 2),
        (2, 'roaming', '10.8.8.8', 'any', 'k2', 3);
"""  # of a manager of 4.x: `ip` is the address last seen
ID_COLUMNS = ["", "TEXT", "VARCHAR(8)", "INTEGER", "INT", "REAL", "DECIMAL(8, 0)", "BLOB", "ANY"]

SWAPPED = {  # a table and its twin: their indexes have the same form, and are swapped
    "an index of ids": "CREATE TABLE {0} (id, name, ip, agent_key); CREATE INDEX {0}_i ON {0} (id)",
    "an index of ids as numbers": "CREATE TABLE {0} (id INTEGER, name, ip, agent_key);"
    "CREATE INDEX {0}_i ON {0} (id)",
    "an index of addresses": "CREATE TABLE {0} (id, name, ip, agent_key);"
    "CREATE INDEX {0}_i ON {0} (ip)",
    "a primary key": "CREATE TABLE {0} (id VARCHAR(8) PRIMARY KEY, name, ip, agent_key)",
    "a unique address": "CREATE TABLE {0} (id, name, ip UNIQUE, agent_key)",
    "an index of both": "CREATE TABLE {0} (id, name, ip, agent_key);"
    "CREATE INDEX {0}_i ON {0} (id, ip)",
}
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
MALFORMED = {
    "syntax": f"CREATE TABLE {SECRET} (",
    "a word": SECRET,
    "a type": f"CREATE TABLE {SECRET} (a, a)",
    "an index of nothing": f"CREATE INDEX {SECRET} ON nowhere (x)",
    "a quote": f"CREATE TABLE '{SECRET}",
    "a view": f"CREATE VIEW {SECRET} AS SELECT * FROM {SECRET}.x",
    "a module": f"CREATE VIRTUAL TABLE agent2 USING {SECRET}(x)",
}
OF_A_VIEW = "a view in it uses a table or a column that does not exist"
SAYS = {  # what SQLite says of a failure, and what is told of it
    **{
        text: text
        for text in (
            *("database disk image is malformed", "disk I/O error", "file is not a database"),
            *("unable to open database file", "database or disk is full"),
        )
    },
    f"malformed database schema ({SECRET}) - near {SECRET}": "malformed database schema",
    "no such table: agent": LACKS,
    f"no such table: {SECRET}": OF_A_VIEW,
    f"no such column: {SECRET}": OF_A_VIEW,
    "interrupted": LATE,
    "database is locked": f"locked by others, {LATE}",
    f"no such function: {SECRET}": "SQLite cannot read it",
}
LONG_STEPS = {  # what SQLite does in one step, in which it calls no progress handler
    "bytes": "instr(zeroblob(20000000), CAST(zeroblob(50000) || x'01' AS BLOB))",
    "a text": "instr(hex(zeroblob(10000000)), hex(zeroblob(25000)) || 'x')",
}


# ---------------------------------------------------------------- schemas and columns


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
    """They are a fault of the record, or too long for SQLite's own limit: never an answer."""
    path = stores.sqlite([Record(key=SECRET * 200_000), Record("002", SECRET * 200_000, "any")])
    assert look(path, "id", "001")["error"] in (2, 6)
    assert look(path, "id", "002")["error"] in (2, 6)
    assert look(path, "ip", "192.168.1.100")["error"] in (2, 6)


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
def test_a_table_without_a_column(stores: Stores, missing: str) -> None:
    """SQLite takes a quoted name of no column for a text: that must not come out as a key."""
    columns = [column for column in ("id", "name", "ip", "agent_key") if column != missing]
    path = stores.text("", "agents.db")
    database = sqlite3.connect(str(path))
    with database:
        database.execute(f"CREATE TABLE agent ({', '.join(columns)}, other)")
        database.execute("INSERT INTO agent VALUES ('001', '192.168.1.100', '10.0.0.5', 'k')")
    database.close()
    for words in (("id", "001"), ("ip", "192.168.1.100")):
        reason = refuses(path, *words)
        for name in (missing, *columns, "other"):
            assert name in reason, reason


def test_a_view_whose_columns_have_no_names(stores: Stores) -> None:
    """SQLite then names a column after its expression, which may be a key."""
    path = view(stores, f"SELECT '001' AS id, 'n' AS name, 'any' AS ip, '{SECRET}'")
    reason = refuses(path)
    assert "agent_key" in reason and "id, name, ip" in reason
    path.unlink()
    refuses(view(stores, f"SELECT '001' AS id, 'any' AS ip, 1 AS \"{SECRET}\""))


def test_a_table_that_is_not_there(stores: Stores) -> None:
    path = stores.sqlite(schema=PLAIN_SCHEMA + "; CREATE TABLE host AS SELECT * FROM agent")
    with contextlib.closing(sqlite3.connect(str(path))) as database, database:
        database.execute("DROP TABLE agent")
    assert refuses(path) == refuses(path, "ip", "192.168.1.100") == LACKS


@pytest.mark.parametrize("columns", NAMED.values(), ids=NAMED)
def test_a_table_with_other_names(stores: Stores, columns: str) -> None:
    """The names of sample.db.sql come first; a value in another column is never taken."""
    path = named(stores, columns)
    assert serves(path)
    assert look(path, "ip", "10.66.66.66")["error"] == 4


def named(stores: Stores, columns: str) -> Path:
    """Make a table with these columns; what stands beside the agent's own is another address."""
    values = {"id": "001", "name": "my_agent", "agent_key": KEY, "ip": "192.168.1.100"}
    known = {"address": "ip", "register_ip": "ip", "registerip": "ip"}
    known.update({"key": "agent_key", "internal_key": "agent_key"})
    names = [column.split()[0].lower() for column in columns.split(", ")]
    row = []
    for name in names:
        field = name if known.get(name) in names else known.get(name, name)
        row.append(values.get(field, "10.66.66.66"))
    path = stores.folder / "agents.db"
    with contextlib.closing(sqlite3.connect(str(path))) as database, database:
        database.execute(f"CREATE TABLE agent ({columns})")
        database.execute(f"INSERT INTO agent VALUES ({', '.join('?' * len(row))})", row)
    return path


def test_the_columns_are_looked_up_once(stores: Stores) -> None:
    path = stores.indexed()
    asked: list[str] = []
    source = script.open_source(str(path), PATIENCE)
    source.connection.set_trace_callback(asked.append)
    assert len(source.find(script.parse_request(["id", "001"]))) == 1
    asked.clear()
    assert len(source.find(script.parse_request(["id", "001"]))) == 1
    assert len(asked) == 1, asked


def test_two_names_for_the_key(stores: Stores) -> None:
    """The names of sample.db.sql settle it for a request; import and check report both cases."""
    path = named(stores, "id, name, ip, key, internal_key")
    for words in (["id", "001"], ["ip", "192.168.1.100"]):
        reason = refuses(path, *words)
        assert "key" in reason and "internal_key" in reason, reason
    path.unlink()
    path = named(stores, "id, name, ip, agent_key, key")
    assert serves(path)
    source = script.open_source(str(path), PATIENCE)
    assert list(source.columns.doubles) == ["key"]
    assert not script.open_source(str(stores.sqlite(name="other.db")), 5.0).columns.doubles


def test_a_managers_global_db(stores: Stores) -> None:
    """Its register_ip is the address of client.keys, its id 0 is the manager itself."""
    path = stores.text("", "global.db")
    with contextlib.closing(sqlite3.connect(str(path))) as database:
        database.executescript(GLOBAL_DB % KEY)
    assert serves(path)
    assert look(path, "id", "002")["data"]["ip"] == "any"
    for address in ("10.9.9.9", "10.8.8.8", "127.0.0.1"):
        assert look(path, "ip", address)["error"] == 4, address
    assert look(path, "id", "000")["error"] in (4, 6)
    source = script.open_source(str(path), PATIENCE)
    assert [row[0] for _, row in source.rows()] == [1, 2]
    assert sum(source.skipped.values()) == 1


@pytest.mark.parametrize("value", ["001' OR '1'='1", "001; DROP TABLE agent", "%", "_01", "0*1"])
def test_sqlite_takes_no_sql_from_a_request(stores: Stores, value: str) -> None:
    path = stores.sqlite()
    assert look(path, "id", value)["error"] == look(path, "ip", value)["error"] == 3
    assert serves(path)


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


def test_what_sqlite_says() -> None:
    for text, told in SAYS.items():
        assert script.reason_of(sqlite3.OperationalError(text)) == told


@pytest.mark.parametrize("column", [
    "id ANY", "id", "id BLOB", "raw, id GENERATED ALWAYS AS (raw) STORED", "id INTEGER", "id TEXT",
    "id REAL", "id FLOAT", "id NUMERIC", "id DECIMAL(8, 2)",
])  # fmt: skip
def test_an_id_that_is_a_number(stores: Stores, column: str) -> None:
    """It is found whether the column makes a text of it or not."""
    given = column.split()[0].strip(",")
    strict = " STRICT" if "ANY" in column and sqlite3.sqlite_version_info >= (3, 37) else ""
    schema = f"CREATE TABLE agent ({column}, name TEXT, ip TEXT, agent_key TEXT){strict}"
    path = stores.folder / "agents.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(schema)
        database.execute(f"INSERT INTO agent ({given}, name, ip, agent_key) VALUES (?, ?, ?, ?)",
                         (1, *Record()[1:]))  # fmt: skip
    assert serves(path)


JOINED = (
    "SELECT 8, 'c', 'any', 'k8'",
    "SELECT '009', 'd', 'any', 'k9'",
    "SELECT id, name, ip, agent_key FROM t",
)


@pytest.mark.parametrize("parts", list(itertools.permutations(JOINED)))
@pytest.mark.parametrize("id_type", ["INTEGER", "TEXT", "REAL", ""])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_view_that_joins_columns_of_two_types(
    stores: Stores, parts: Sequence[str], id_type: str, is_nested: bool
) -> None:
    """SQLite tells the type of the first part only: in the others an id may be of another."""
    path = stores.folder / "agents.db"
    view = "CREATE VIEW {} (id, name, ip, agent_key) AS "
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(f"CREATE TABLE t (id {id_type}, name, ip, agent_key)")
        database.execute("INSERT INTO t VALUES (1, ?, ?, ?)", Record()[1:])
        joined = view.format("joined" if is_nested else "agent") + " UNION ALL ".join(parts)
        database.execute(joined)
        if is_nested:
            database.execute(view.format("agent") + "SELECT * FROM joined")
    assert serves(path)
    assert look(path, "id", "008")["data"]["key"] == "k8"
    assert look(path, "id", "009")["data"]["key"] == "k9"
    assert look(path, "ip", "192.168.1.100")["data"]["key"] == KEY


@pytest.mark.parametrize("column", ["NUMERIC", "INTEGER", "DECIMAL(20, 0)", "REAL"])
@pytest.mark.parametrize("key", ["000123", "12e3", "123"])
def test_a_key_in_a_column_of_numbers(stores: Stores, column: str, key: str) -> None:
    """The column has changed it: `000123` would come out as `123`."""
    schema = f"CREATE TABLE agent (id, name, ip, agent_key {column})"
    path = stores.sqlite([Record(key=key), Record("002", "b", "any", key="k")], schema)
    content = look(path, "id", "001")
    assert content["error"] == 6 and content["message"].endswith("printable ASCII characters")
    assert look(path, "id", "002")["error"] == 0


# ---------------------------------------------------------------- indexes that lie


@pytest.mark.parametrize("case", SWAPPED)
def test_an_index_that_does_not_match_its_table(stores: Stores, case: str) -> None:
    """SQLite finds a row by the index, and another agent's key stands in that row."""
    path = stores.folder / "agents.db"
    one, two = Record(), Record("002", "other", "10.0.0.2", SECRET)
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as database:
        for table, rows in (("agent", (one, two)), ("twin", (two, one))):
            database.executescript(SWAPPED[case].format(table))
            database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
        pages = dict(database.execute("SELECT tbl_name, rootpage FROM sqlite_master"
                                      " WHERE type = 'index'"))  # fmt: skip
        database.execute("PRAGMA writable_schema = ON")
        for table, other in (("agent", "twin"), ("twin", "agent")):
            database.execute("UPDATE sqlite_master SET rootpage = ? WHERE type = 'index' AND "
                             "tbl_name = ?", [pages[other], table])  # fmt: skip
    for words in (["id", "001"], ["ip", "192.168.1.100"]):
        content = look(path, *words)  # which asserts that SECRET is not in it
        assert content["error"] in (2, 4) or content["data"] == DATA, words
    for words in (["id", "002"], ["ip", "10.0.0.2"]):
        answer = script.answer(words, lambda: script.open_source(str(path), PATIENCE), str(path))
        assert answer.number in (2, 4) or answer.record["id"] == "002"
        assert KEY.encode() not in answer.line(), words


def test_values_that_are_too_much_for_sqlite(stores: Stores) -> None:
    """A number that no column holds is no internal error."""
    path = stores.untyped([Record(2**63 - 1), Record(float("inf"), name=SECRET)])
    assert look(path, "id", "001")["error"] == 4
    assert look(path, "ip", "192.168.1.100")["error"] == 5


# ---------------------------------------------------------------- deadlines and locks


def test_an_endless_query_ends_and_says_so(stores: Stores) -> None:
    sql = f"{FOREVER} SELECT x || 'x' AS id, 'n' AS name, x || 'x' AS ip, 'k' AS agent_key FROM f"
    path = view(stores, sql)
    for words in (["id", "001"], ["ip", "10.0.0.5"]):
        assert refuses(path, *words, seconds=0.1) == LATE


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python cannot set SQLite's limits")
@pytest.mark.parametrize("step", LONG_STEPS.values(), ids=LONG_STEPS)
def test_one_long_step_of_sqlite(stores: Stores, step: str) -> None:
    """No time is looked at within a step, so SQLite's limits keep each one short."""
    path = view(stores, f"SELECT {step} AS id, 'n' AS name, 'any' AS ip, 'k' AS agent_key")
    started = time.monotonic()
    for words in (["id", "001"], ["ip", "10.0.0.5"]):
        assert look(path, *words, seconds=0.2)["error"] in (2, 4)
    assert time.monotonic() - started < 3


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


# ---------------------------------------------------------------- writers, journals and logs


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
    real, folder = script.posix.access, str(stores.folder)

    def access(name: str, mode: int) -> bool:
        return real(name, mode) and (mode != os.W_OK or name.rstrip("/") != folder)

    if state != "may be written":
        monkeypatch.setattr(script.posix, "access", access)
    before = sorted(os.listdir(folder))
    source = script.open_source(str(path), PATIENCE)
    assert source.is_frozen == (state == "closed")
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


def crashed(path: Path) -> bytes:
    """Let a writer of the store die in the middle of a change, and give its hot journal."""
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN');"
        "c.execute(\"UPDATE agent SET name = 'changed', agent_key = 'changed'\");"
        "os.kill(os.getpid(), 9)"
    )
    assert run([sys.executable, "-c", code, path]).status == -9
    return Path(f"{path}-journal").read_bytes()


def test_a_request_writes_nothing_though_a_journal_is_hot(stores: Stores) -> None:
    """To roll the change back would be to write to the store: somebody else's business."""
    path = stores.sqlite([Record(f"{number:03}", ip="any") for number in range(1, 3000)])
    sound = path.read_bytes()
    journal = crashed(path)
    half_changed = path.read_bytes()
    assert journal and half_changed != sound
    for words in (["id", "001"], ["ip", "10.0.0.5"], ["id", "2999"]):
        assert look(path, *words)["error"] == 2
    assert path.read_bytes() == half_changed
    assert Path(f"{path}-journal").read_bytes() == journal
    database = sqlite3.connect(str(path))
    assert database.execute("SELECT count(*) FROM agent WHERE name = 'changed'").fetchone() == (0,)
    database.close()
    assert path.read_bytes() == sound
    assert look(path, "id", "001")["error"] == 0


@pytest.mark.parametrize("said", ["unable to open database file", "out of memory"])
def test_a_database_that_cannot_be_opened(
    stores: Stores, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is error 2 with a reason; it was an internal error."""

    def connect(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError(said)

    path = stores.sqlite()
    monkeypatch.setattr(_sqlite3, "connect", connect)
    assert refuses(path)
