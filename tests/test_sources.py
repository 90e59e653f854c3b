"""The sources: SQLite, CSV, client.keys and SQL scripts, sound, strange and broken."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores
from manager import Answer, run

DATA = Record()._asdict()
ROW = f"001,my_agent,192.168.1.100,{KEY}"
REASON = "Cannot read key source: "
SLOW = 8.0  # seconds: under the script's own deadline of 10, far over --timeout 1
ENDLESS_VIEW = """
    CREATE VIEW agent AS
    WITH RECURSIVE forever(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM forever)
    SELECT id || 'x' AS id, 'n' AS name, id || 'x' AS ip, 'k' AS agent_key FROM forever
"""


def assert_unreadable(answer: Answer) -> None:
    """Assert error 2 with a reason."""
    assert answer.error == 2, answer
    assert answer.message.startswith(REASON)
    assert len(answer.message) > len(REASON)


def assert_serves(ask: Caller, path: str | Path) -> None:
    """Assert that agent 001 is found in the source at PATH, by id and by ip."""
    assert ask("id", "001", db=path).data == DATA
    assert ask("ip", "192.168.1.100", db=path).data == DATA
    assert ask("id", "999", db=path).error == 4
    assert ask("ip", "192.168.1.1", db=path).error == 4


# ---------------------------------------------------------------- which source


def test_the_source_of_the_environment(ask: Caller, stores: Stores) -> None:
    path = str(stores.csv())
    assert ask("id", "001", env={"AGENT_KEY_DB": path}).data == DATA
    assert ask("id", "001", db=stores.sqlite([]), env={"AGENT_KEY_DB": path}).error == 4


def test_a_relative_path(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite()
    assert ask("id", "001", db=path.name, cwd=path.parent).data == DATA
    assert ask("id", "001", db=f"../{path.parent.name}/{path.name}", cwd=path.parent).data == DATA


@pytest.mark.parametrize(
    "name",
    ["a b.db", "a?mode=rwc.db", "a#b.db", "a%41b.db", "a%.db", "é.db", "a'b\".db", "a\nb.db"]
    + ["file:x.db", "a&b;c.db", "-x.db", ":memory:", b"\xff.db", "a\\b.db", "mysql.db", "x" * 200],
    ids=ascii,
)
def test_any_file_name(ask: Caller, stores: Stores, name: str | bytes) -> None:
    """A name is a name: no part of it is read as a URI or an escape, and none is shown raw."""
    path = stores.sqlite(name=name)
    assert ask("id", "001", db=os.fsencode(path)).data == DATA
    assert ask("id", "001", db=os.fsencode(path.name), cwd=path.parent).data == DATA
    path.unlink()
    assert_unreadable(ask("id", "001", db=os.fsencode(path)))
    assert_unreadable(ask("id", "001", db=os.fsencode(path.name), cwd=path.parent))
    assert not list(stores.folder.iterdir())


@pytest.mark.parametrize("kind", ["sqlite", "csv", "keys", "sql"])
def test_a_link_to_a_source(ask: Caller, stores: Stores, kind: str) -> None:
    link = stores.folder / "link"
    link.symlink_to(stores.make(kind))
    assert_serves(ask, link)


# ---------------------------------------------------------------- what is no source


@pytest.mark.parametrize(
    "name",
    ["missing.db", "no/such/folder/missing.db", "missing.csv", "client.keys", "missing.sql"]
    + [":memory:", "file:missing.db?mode=rwc", "file::memory:", "missing.db?mode=rwc", " ", "."],
)
def test_a_mistyped_path_creates_nothing(ask: Caller, stores: Stores, name: str) -> None:
    folder = stores.folder
    assert_unreadable(ask("id", "001", db=name, cwd=folder))
    assert_unreadable(ask("ip", "10.0.0.5", db=folder / name))
    assert_unreadable(ask("id", "001", env={"AGENT_KEY_DB": str(folder / name)}))
    assert not list(folder.iterdir())


def test_a_dangling_link(ask: Caller, stores: Stores) -> None:
    link = stores.folder / "link.db"
    link.symlink_to("nowhere.db")
    assert_unreadable(ask("id", "001", db=link))
    assert list(stores.folder.iterdir()) == [link]


NO_SOURCE = {
    "empty": b"",
    "a word": b"hello\n",
    "a word without newline": b"hello",
    "blank lines": b"\n\n\n",
    "binary": bytes(range(256)) * 40,
    "a program": b"\x7fELF\x02\x01\x01" + bytes(5000),
    "zeros": bytes(8192),
    "magic only": b"SQLite format 3\0",
    "magic and garbage": b"SQLite format 3\0" + b"\xa5" * 8176,
    "JSON": b'{"id": "001", "name": "my_agent", "ip": "any", "key": "k"}\n',
    "XML": b"<ossec_config>\n  <auth>\n  </auth>\n</ossec_config>\n",
    "another CSV": b"name,phone\nbob,123\n",
    "CSV without key": b"id,name,ip\n001,my_agent,any\n",
    "CSV without id": b"name,ip,key\nmy_agent,any,k\n",
    "CSV without name": b"id,ip,key\n001,any,k\n",
    "CSV without ip": b"id,name,key\n001,my_agent,k\n",
    "UTF-16": f"id,name,ip,key\n{ROW}\n".encode("utf-16"),
    "one long line": b"x" * 3_000_000,
}


@pytest.mark.parametrize("content", NO_SOURCE.values(), ids=NO_SOURCE)
@pytest.mark.parametrize("name", ["agents.db", "agents.csv", "agents"])
def test_no_source_at_all(ask: Caller, stores: Stores, content: bytes, name: str) -> None:
    path = stores.text(content, name)
    assert_unreadable(ask("id", "001", db=path))
    assert_unreadable(ask("ip", "10.0.0.5", db=path))
    assert path.read_bytes() == content
    assert list(stores.folder.iterdir()) == [path]


def test_an_empty_client_keys_is_a_fresh_managers(ask: Caller, stores: Stores) -> None:
    assert ask("id", "001", db=stores.text("", "client.keys")).error == 4


def test_a_folder(ask: Caller, stores: Stores) -> None:
    assert_unreadable(ask("id", "001", db=stores.folder))
    assert_unreadable(ask("id", "001", db="/"))


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty", "/dev/full"])
def test_a_device(ask: Caller, device: str) -> None:
    assert_unreadable(ask("--timeout", "2", "id", "001", db=device))


@pytest.mark.parametrize("name", ["fifo.db", "fifo.csv", "client.keys", "fifo.sql"])
def test_a_fifo_holds_nothing_up(ask: Caller, stores: Stores, name: str) -> None:
    path = stores.folder / name
    os.mkfifo(path)
    path.chmod(0o600)
    answer = ask("--timeout", "1", "id", "001", db=path)
    assert_unreadable(answer)
    assert answer.seconds < SLOW


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o622, 0o777, 0o646])
@pytest.mark.parametrize("kind", ["sqlite", "csv", "keys", "sql"])
def test_a_source_that_everybody_may_write(
    ask: Caller, stores: Stores, mode: int, kind: str
) -> None:
    path = stores.make(kind)
    path.chmod(mode)
    assert_unreadable(ask("id", "001", db=path))
    link = stores.folder / "link"
    link.symlink_to(path)
    assert_unreadable(ask("id", "001", db=link))


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o660, 0o664, 0o755])
@pytest.mark.parametrize("kind", ["sqlite", "csv", "keys", "sql"])
def test_a_source_that_not_everybody_may_write(
    ask: Caller, stores: Stores, mode: int, kind: str
) -> None:
    path = stores.make(kind)
    path.chmod(mode)
    assert ask("id", "001", db=path).error == 0


# ---------------------------------------------------------------- SQLite


def test_sqlite(ask: Caller, stores: Stores) -> None:
    assert_serves(ask, stores.sqlite())


def test_sqlite_with_the_indexes_of_the_sample(ask: Caller, stores: Stores) -> None:
    assert_serves(ask, stores.indexed())


SCHEMAS = {
    "other columns, other order": "CREATE TABLE agent (zone, agent_key, ip, x, name, id, key, k)",
    "capitals": "CREATE TABLE AGENT (ID text, Name text, IP text, Agent_Key text)",
    "CHAR": "CREATE TABLE agent (id char(8), name char(128), ip char(19), agent_key char(128))",
    "without rowid": "CREATE TABLE agent (id text PRIMARY KEY, name, ip, agent_key) WITHOUT ROWID",
    "unique": "CREATE TABLE agent (id text UNIQUE, name UNIQUE, ip UNIQUE, agent_key)",
    "no case": UNTYPED_SCHEMA + ";CREATE INDEX i ON agent (id COLLATE NOCASE)",
    "no case columns": "CREATE TABLE agent (id text COLLATE NOCASE, name, ip COLLATE NOCASE,"
    " agent_key)",
    "right trim": "CREATE TABLE agent (id text COLLATE RTRIM, name, ip COLLATE RTRIM, agent_key)",
    "other indexes": PLAIN_SCHEMA + ";CREATE INDEX agent_id ON agent (name, id)"
    ";CREATE INDEX agent_ip ON agent (ip DESC);CREATE INDEX agent_network ON agent (id)",
    "partial index": PLAIN_SCHEMA + ";CREATE INDEX agent_network ON agent (ip) WHERE ip LIKE '%/%'",
    "big pages": "PRAGMA page_size = 65536;" + PLAIN_SCHEMA,
    "UTF-16": "PRAGMA encoding = 'UTF-16';" + PLAIN_SCHEMA,
    "auto vacuum": "PRAGMA auto_vacuum = FULL;" + PLAIN_SCHEMA,
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_sqlite_with_another_schema(ask: Caller, stores: Stores, schema: str) -> None:
    rows = [Record(), Record("002", "other", "10.0.0.0/8"), Record("003", "last", "10.0.0.5/24")]
    path = stores.sqlite(rows, schema)
    assert_serves(ask, path)
    assert ask("ip", "10.1.1.1", db=path).data["id"] == "002"
    assert ask("ip", "10.0.0.1", db=path).data["id"] == "003"


def test_sqlite_view_of_another_schema(ask: Caller, stores: Stores) -> None:
    path = stores.folder / "hosts.db"
    database = sqlite3.connect(str(path))
    database.executescript("""
        CREATE TABLE host (number INTEGER PRIMARY KEY, label TEXT, secret TEXT);
        CREATE TABLE address (host INTEGER, address TEXT);
        CREATE VIEW agent AS
            SELECT number AS id, label AS name, address AS ip, secret AS agent_key
            FROM host LEFT JOIN address ON host = number;
        INSERT INTO host VALUES (2, 'roaming', 'other');
        INSERT INTO address VALUES (1, '192.168.1.100');
    """)
    with database:
        database.execute("INSERT INTO host VALUES (1, 'my_agent', ?)", [KEY])
    database.close()
    assert_serves(ask, path)
    assert ask("id", "002", db=path).data["ip"] == "any"


@pytest.mark.parametrize("missing", ["id", "name", "ip", "agent_key"])
def test_sqlite_without_a_column(ask: Caller, stores: Stores, missing: str) -> None:
    """SQLite takes a quoted name of no column for a text: that must not come out as a key."""
    columns = [column for column in ("id", "name", "ip", "agent_key") if column != missing]
    path = stores.folder / "agents.db"
    database = sqlite3.connect(str(path))
    with database:
        database.execute(f"CREATE TABLE agent ({', '.join(columns)}, key)")
        database.execute("INSERT INTO agent VALUES ('001', '192.168.1.100', '192.168.1.100', 'k')")
    database.close()
    assert_unreadable(ask("id", "001", db=path))
    assert_unreadable(ask("ip", "192.168.1.100", db=path))


def test_sqlite_without_the_table(ask: Caller, stores: Stores) -> None:
    path = stores.folder / "agents.db"
    database = sqlite3.connect(str(path))
    database.execute("CREATE TABLE agents (id, name, ip, agent_key)")
    database.close()
    assert_unreadable(ask("id", "001", db=path))
    assert_unreadable(ask("ip", "10.0.0.5", db=path))


def test_sqlite_view_of_a_missing_table(ask: Caller, stores: Stores) -> None:
    schema = UNTYPED_SCHEMA + ";CREATE VIEW v AS SELECT * FROM agent"
    path = stores.sqlite(schema=schema)
    database = sqlite3.connect(str(path))
    database.executescript(
        "DROP VIEW v; DROP TABLE agent; CREATE VIEW agent AS SELECT * FROM nowhere"
    )
    database.close()
    assert_unreadable(ask("id", "001", db=path))


def test_sqlite_is_not_written(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite()
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert_serves(ask, path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(stores.folder.iterdir()) == [path]


@pytest.mark.parametrize("value", ["001' OR '1'='1", "001; DROP TABLE agent", "%", "_01", "0*1"])
def test_sqlite_takes_no_sql_from_a_request(ask: Caller, stores: Stores, value: str) -> None:
    path = stores.sqlite()
    assert ask("id", value, db=path).error == 3
    assert ask("ip", value, db=path).error == 3
    assert_serves(ask, path)


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


@pytest.mark.parametrize("journal", ["WAL", "DELETE", "PERSIST", "TRUNCATE"])
def test_sqlite_with_a_writer_at_work(
    ask: Caller, writer: Callable[[str], tuple[Path, sqlite3.Connection]], journal: str
) -> None:
    path, connection = writer(journal)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE agent SET name = 'uncommitted'")
    assert_serves(ask, path)
    connection.execute("COMMIT")
    assert ask("id", "001", db=path).data["name"] == "uncommitted"


def test_sqlite_wal_that_is_not_checkpointed(
    ask: Caller, writer: Callable[[str], tuple[Path, sqlite3.Connection]]
) -> None:
    path, connection = writer("WAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("UPDATE agent SET name = 'in-the-log'")
    assert Path(f"{path}-wal").stat().st_size
    assert ask("id", "001", db=path).data["name"] == "in-the-log"


def test_sqlite_wal_after_its_writer_was_killed(ask: Caller, stores: Stores) -> None:
    """What was committed to the log counts, though nobody has the database open."""
    path = stores.sqlite()
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA journal_mode = WAL'); c.execute(\"UPDATE agent SET name = 'late'\");"
        "os.kill(os.getpid(), 9)"
    )
    assert run([ask.python.path, "-c", code, path]).status == -9
    assert Path(f"{path}-wal").stat().st_size
    assert ask("id", "001", db=path).data["name"] == "late"


def test_sqlite_wal_that_was_closed(
    ask: Caller, writer: Callable[[str], tuple[Path, sqlite3.Connection]]
) -> None:
    path, connection = writer("WAL")
    connection.close()
    assert not Path(f"{path}-wal").exists()
    assert_serves(ask, path)


@pytest.mark.parametrize("request_words", [["id", "001"], ["ip", "192.168.1.100"]], ids=repr)
def test_sqlite_under_an_exclusive_lock(
    ask: Caller,
    stores: Stores,
    locked: Callable[[Path], None],
    request_words: list[str],
) -> None:
    path = stores.sqlite()
    locked(path)
    answer = ask("--timeout", "1", *request_words, db=path)
    assert_unreadable(answer)
    assert answer.seconds < SLOW


def test_sqlite_lock_that_is_given_up_in_time(ask: Caller, stores: Stores) -> None:
    """A short lock is waited for."""
    path = stores.sqlite()
    holder = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(1.0, holder.execute, ["ROLLBACK"])
    release.start()
    answer = ask("id", "001", db=path)
    release.join()
    holder.close()
    assert answer.data == DATA


def test_sqlite_that_never_ends(ask: Caller, stores: Stores) -> None:
    path = stores.folder / "agents.db"
    database = sqlite3.connect(str(path))
    database.execute(ENDLESS_VIEW)
    database.close()
    for words in (["id", "001"], ["ip", "10.0.0.5"]):
        answer = ask("--timeout", "1", *words, db=path)
        assert_unreadable(answer)
        assert answer.seconds < SLOW


@pytest.mark.parametrize("seed", range(30))
def test_sqlite_that_is_damaged(ask: Caller, stores: Stores, seed: int) -> None:
    """Bytes flipped or cut off: any answer but an internal error."""
    chance = random.Random(seed)
    rows = [Record(f"{row:03}", f"agent-{row}", f"10.0.{row}.0/24") for row in range(1, 60)]
    path = stores.indexed(rows)
    content = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del content[chance.randrange(100, len(content)) :]
    for _ in range(chance.choice([1, 20, 400])):
        content[chance.randrange(16 if seed % 2 else 100, len(content))] = chance.randrange(256)
    path.write_bytes(content)
    for words in (["id", "007"], ["ip", "10.0.9.1"]):
        answer = ask("--timeout", "5", *words, db=path)
        assert answer.error in (0, 2, 4, 5, 6), answer


# ---------------------------------------------------------------- CSV

CSVS = {
    "plain": f"id,name,ip,key\n{ROW}\n",
    "agent_key": f"id,name,ip,agent_key\n{ROW}\n",
    "capitals": f"ID,Name,Ip,KEY\n{ROW}\n",
    "capitals, agent_key": f"Id,NAME,IP,Agent_Key\n{ROW}\n",
    "no last newline": f"id,name,ip,key\n{ROW}",
    "CRLF": f"id,name,ip,key\r\n{ROW}\r\n",
    "CRLF, no last one": f"id,name,ip,key\r\n{ROW}",
    "BOM": f"\ufeffid,name,ip,key\n{ROW}\n",
    "BOM and CRLF": f"\ufeffid,name,ip,key\r\n{ROW}\r\n",
    "BOM and quotes": f'\ufeff"id","name","ip","key"\n{ROW}\n',
    "semicolons": f"id;name;ip;key\n{ROW}\n".replace(",", ";"),
    "tabs": f"id\tname\tip\tkey\n{ROW}\n".replace(",", "\t"),
    "other order": f"key,ip,name,id\n{KEY},192.168.1.100,my_agent,001\n",
    "other columns": f"a,id,b,name,c,ip,d,key,e\n1,001,2,my_agent,3,192.168.1.100,4,{KEY},5\n",
    "other columns, not ASCII": f"ort,id,name,ip,key,größe\nKöln,{ROW},ß\n",
    "other columns over lines": f'note,id,name,ip,key\n"a\nb, ""c""\r\nd",{ROW}\n',
    "quotes": f'"id","name","ip","key"\n"001","my_agent","192.168.1.100","{KEY}"\n',
    "quotes and semicolons": f'"id";"name";"ip";"key"\n"001";"my_agent";"192.168.1.100";"{KEY}"\n',
    "quotes and tabs": f'"id"\t"name"\t"ip"\t"key"\n"001"\t"my_agent"\t"192.168.1.100"\t"{KEY}"\n',
    "some quotes": f'id,"name",ip,key\n"001",my_agent,"192.168.1.100",{KEY}\n',
    "padding": f"id, name, ip, key\n001 ,  my_agent, 192.168.1.100 ,{KEY}   \n",
    "one digit": f"id,name,ip,key\n1,my_agent,192.168.1.100,{KEY}\n",
    "two digits": f"id,name,ip,key\n01,my_agent,192.168.1.100,{KEY}\n",
    "blank lines": f"id,name,ip,key\n\n{ROW}\n\n\n",
    "empty rows": f"id,name,ip,key\n,,,\n{ROW}\n,,,\n",
    "more fields than the header": f"id,name,ip,key\n{ROW},x,y,z\n",
    "semicolons in a comma header's column": f'id,name,ip,key,"a;b;c;d;e"\n{ROW},1\n',
    "key and agent": f"agent,id,name,ip,key\nzzz,{ROW}\n",
}


@pytest.mark.parametrize("content", CSVS.values(), ids=CSVS)
def test_csv(ask: Caller, stores: Stores, content: str) -> None:
    assert_serves(ask, stores.text(content, "agents.csv"))


@pytest.mark.parametrize("name", ["agents.db", "agents", "client.keys", "agents.txt", "a.sql"])
def test_csv_is_known_by_its_content(ask: Caller, stores: Stores, name: str) -> None:
    assert_serves(ask, stores.text(CSVS["plain"], name))


def test_csv_with_delimiters_and_quotes_in_a_key(ask: Caller, stores: Stores) -> None:
    key = 'a,b;c"d"  e'
    assert ask("id", "001", db=stores.csv([Record(key=key)])).data["key"] == key


def test_csv_with_a_delimiter_in_a_key_of_another_dialect(ask: Caller, stores: Stores) -> None:
    path = stores.text("id;name;ip;key\n001;my_agent;any;a,b,c\n", "agents.csv")
    assert ask("id", "001", db=path).data["key"] == "a,b,c"
    path = stores.text("id,name,ip,key\n001,my_agent,any,a;b;c\n", "agents.csv")
    assert ask("id", "001", db=path).data["key"] == "a;b;c"


def test_csv_with_a_header_only(ask: Caller, stores: Stores) -> None:
    for header in ("id,name,ip,key", "id,name,ip,key\n", "\ufeffid;name;ip;key\r\n"):
        path = stores.text(header, "agents.csv")
        assert ask("id", "001", db=path).error == 4, header
        assert ask("ip", "10.0.0.5", db=path).error == 4, header


@pytest.mark.parametrize(
    ("stored", "asked", "error"),
    [
        ("1", "001", 0),
        ("01", "001", 0),
        ("12", "012", 0),
        (" 1 ", "001", 0),
        ("0001", "001", 4),
        ("0001", "0001", 0),
        ("1", "0001", 4),
        ("1234", "1234", 0),
        ("12345678", "12345678", 0),
        ("1.0", "001", 4),
        ("+1", "001", 4),
        ("١", "001", 4),
        ("²", "002", 4),
    ],
)
def test_csv_ids(ask: Caller, stores: Stores, stored: str, asked: str, error: int) -> None:
    answer = ask("id", asked, db=stores.csv([Record(id=stored)]))
    assert answer.error == error
    assert answer.data.get("id", asked) == asked


@pytest.mark.parametrize("stored", ["0", "00", "000", "", "-1", "1.0", "٣", "²", "123456789", "a"])
def test_csv_id_that_breaks_the_rule(ask: Caller, stores: Stores, stored: str) -> None:
    answer = ask("ip", "192.168.1.100", db=stores.csv([Record(id=stored)]))
    assert answer.error == 6
    assert KEY not in answer.message


def test_csv_with_one_id_in_two_spellings(ask: Caller, stores: Stores) -> None:
    path = stores.csv([Record("1", ip="any"), Record("001", ip="any"), Record("002", ip="any")])
    assert ask("id", "001", db=path).error == 5
    assert ask("id", "002", db=path).error == 0


def test_csv_with_an_empty_ip(ask: Caller, stores: Stores) -> None:
    assert ask("id", "001", db=stores.csv([Record(ip="")])).data["ip"] == "any"


@pytest.mark.parametrize(
    "row", ["001", "001,", "001,my_agent", "001,my_agent,any", "001,,,", "1,a,,"]
)
def test_csv_row_that_is_too_short(ask: Caller, stores: Stores, row: str) -> None:
    path = stores.text(f"id,name,ip,key\n{row}\n", "agents.csv")
    assert ask("id", "001", db=path).error == 6


@pytest.mark.parametrize(
    "field",
    [
        "my agent",
        "é",
        "a\x00b",
        "a\nb",
        "a\tb",
        "a\rb",
        "!gone",
        "#gone",
        "n" * 129,
        "\ufeffa",
        "٣",
    ],
    ids=ascii,
)
def test_csv_record_that_breaks_a_rule(ask: Caller, stores: Stores, field: str) -> None:
    answer = ask("id", "001", db=stores.csv([Record(name=field)]))
    assert answer.error == 6
    assert "name" in answer.message and "001" in answer.message
    assert KEY not in answer.message


BROKEN_ROWS = {
    "NUL byte": b"002,a\0b,any,k\n",
    "NUL byte in quotes": b'002,"a\0b",any,k\n',
    "NUL bytes alone": b"\0\0\0\n",
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
    "text after the quotes": b'002,"a"b,any,k\n',
    "line separator": "002,a\u2028b,any,k\n".encode(),
    "next line": "002,a\u0085b,any,k\n".encode(),
    "form feed": b"002,a\x0cb,any,k\n",
    "file separator": b"002,a\x1cb,any,k\n",
    "backslash": b"002,a\\,any,k\n",
}


@pytest.mark.parametrize("row", BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_csv_with_another_broken_row(ask: Caller, stores: Stores, row: bytes) -> None:
    good = ROW.encode() + b"\n"
    for content in (row + good, good + row, row + good + row):
        assert_serves(ask, stores.text(b"id,name,ip,key\n" + content, "agents.csv"))


@pytest.mark.parametrize("tail", ['002,"a', '002,a,any,"', '"', '002,"a\n003,b,any,k\n'])
def test_csv_with_quotes_that_never_close(ask: Caller, stores: Stores, tail: str) -> None:
    path = stores.text(f"id,name,ip,key\n{ROW}\n{tail}", "agents.csv")
    assert_serves(ask, path)


@pytest.mark.parametrize("rest", [1, 30_000])
def test_csv_with_quotes_that_never_close_before_the_record(
    ask: Caller, stores: Stores, rest: int
) -> None:
    """What comes after belongs to the open field, however long: that is no internal error."""
    rows = "".join(f"{row:05},n,any,k\n" for row in range(10_000, 10_000 + rest))
    path = stores.text(f'id,name,ip,key\n002,"a,any,k\n{ROW}\n{rows}', "agents.csv")
    assert ask("id", "001", db=path).error in (0, 2, 4)
    assert ask("id", "002", db=path).error in (2, 6)


# ---------------------------------------------------------------- tabs, as mysql --batch writes


def test_tabs_as_mysql_batch_writes_them(ask: Caller, stores: Stores) -> None:
    rows = (
        "id\tname\tip\tagent_key\n"
        '001\tmy_agent\tNULL\ta\\\\b"c\n'
        "002\ta\\tb\tany\tk\n"
        "003\ta\\nb\tany\tk\n"
        "004\ta\\0b\tany\tk\n"
        "5\tfive\t10.0.0.5\tk\n"
        '006\tsix\tany\t"quoted"\n'
        "007\tseven\tany\tNULL\n"
    )
    path = stores.text(rows, "batch.tsv")
    assert ask("id", "001", db=path).data == Record(ip="any", key='a\\b"c')._asdict()
    assert [ask("id", f"00{n}", db=path).error for n in (2, 3, 4, 5, 6, 7)] == [6, 6, 6, 0, 0, 6]
    assert ask("ip", "10.0.0.5", db=path).data["id"] == "005"
    assert ask("id", "006", db=path).data["key"] == "quoted"


# ---------------------------------------------------------------- client.keys

KEYS_LINE = f"001 my_agent 192.168.1.100 {KEY}\n"
KEYS = {
    "plain": KEYS_LINE,
    "no last newline": KEYS_LINE.rstrip("\n"),
    "comments": f"# a comment\n#001 my_agent any other\n{KEYS_LINE}# the end\n",
    "lines that start with a space": f" 001 my_agent any other\n{KEYS_LINE} 001 x any other\n",
    "blank lines": f"\n\n{KEYS_LINE}\n",
    "removed with !": f"001 !my_agent 192.168.1.100 old\n{KEYS_LINE}002 !other any old\n",
    "removed with #": f"001 #my_agent 192.168.1.100 old\n{KEYS_LINE}001 #*#*#*#*# any old\n",
    "removed after": f"{KEYS_LINE}001 !my_agent 192.168.1.100 old\n",
    "one digit": KEYS_LINE[2:],
    "short lines": f"002\n002 other\n002 other any\n{KEYS_LINE}003",
    "bytes": f"002 caf\xe9 any k\n{KEYS_LINE}",
    "other rules broken": f"000 a any k\nabc b any k\n002 b nonsense k\n{KEYS_LINE}",
    "many": "".join(f"{n} host-{n} any {n}{KEY}\n" for n in range(100, 900)) + KEYS_LINE,
}


@pytest.mark.parametrize("content", KEYS.values(), ids=KEYS)
def test_client_keys(ask: Caller, stores: Stores, content: str) -> None:
    assert_serves(ask, stores.text(content.encode("latin-1"), "client.keys"))


@pytest.mark.parametrize("name", ["agents.db", "agents.csv", "keys", "client.keys.bak", "a.sql"])
def test_client_keys_is_known_by_its_content(ask: Caller, stores: Stores, name: str) -> None:
    assert_serves(ask, stores.text(KEYS["plain"], name))


@pytest.mark.parametrize("first", ["comments", "removed with !", "removed with #"])
def test_client_keys_is_known_though_it_starts_otherwise(
    ask: Caller, stores: Stores, first: str
) -> None:
    assert_serves(ask, stores.text(KEYS[first], "agents.db"))


@pytest.mark.parametrize("key", ["two words", "a  b   c", "#k", "!k", "k,e;y", '"k"', "k'"])
def test_client_keys_key_to_the_end_of_the_line(ask: Caller, stores: Stores, key: str) -> None:
    assert ask("id", "001", db=stores.keys([Record(key=key)])).data["key"] == key


def test_client_keys_removed_agents_are_gone(ask: Caller, stores: Stores) -> None:
    path = stores.text(
        "001 !gone 10.0.0.5 k\n002 #gone 10.0.0.6 k\n003 here 10.0.0.7 k\n004 !net 10.0.0.0/8 k\n",
        "client.keys",
    )
    assert [ask("id", f"00{n}", db=path).error for n in (1, 2, 3, 4)] == [4, 4, 0, 4]
    assert [ask("ip", f"10.0.0.{n}", db=path).error for n in (5, 6, 7, 8)] == [4, 4, 0, 4]


@pytest.mark.parametrize(
    "content", ["# only a comment\n", "001 !gone any k\n", "\n", " 001 a any k\n"]
)
def test_client_keys_without_agents(ask: Caller, stores: Stores, content: str) -> None:
    assert ask("id", "001", db=stores.text(content, "client.keys")).error == 4


@pytest.mark.parametrize("line", ["001", "001 my_agent", "001 my_agent any", "001 my_agent any "])
def test_client_keys_line_that_is_too_short(ask: Caller, stores: Stores, line: str) -> None:
    path = stores.text(f"002 other any k\n{line}\n", "client.keys")
    assert ask("id", "001", db=path).error == 6


def test_client_keys_line_that_breaks_a_rule(ask: Caller, stores: Stores) -> None:
    path = stores.keys(
        [Record(ip="nonsense"), Record("002", "é"), Record("003", "three", "any", "é")]
    )
    for number in (1, 2, 3):
        answer = ask("id", f"00{number}", db=path)
        assert answer.error == 6
        assert KEY not in answer.message


def test_client_keys_with_one_id_twice(ask: Caller, stores: Stores) -> None:
    path = stores.keys([Record(ip="any"), Record("1", "other", "any")])
    assert ask("id", "001", db=path).error == 5


def test_client_keys_with_a_nul_byte_in_another_line(ask: Caller, stores: Stores) -> None:
    assert_serves(ask, stores.text(f"002 a\0b any k\n{KEYS_LINE}\0\n", "client.keys"))


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"], ids=ascii)
def test_client_keys_ends_a_line_at_a_newline_only(ask: Caller, stores: Stores, end: str) -> None:
    """Else an agent could be made up in the middle of another one's line."""
    path = stores.text(f"002 other any k{end}001 evil 10.0.0.5 k\n", "client.keys")
    assert ask("id", "001", db=path).error == 4
    assert ask("ip", "10.0.0.5", db=path).error == 4


# ---------------------------------------------------------------- SQL scripts


def test_sql_script_with_no_set_up(ask: Caller) -> None:
    """Every record of the sample is sound, and it shows `any`, a network and IPv6."""
    database = sqlite3.connect(":memory:")
    database.executescript(SAMPLE.read_text())
    rows = database.execute("SELECT id, name, ip, agent_key FROM agent").fetchall()
    database.close()
    for agent_id, name, ip, key in rows:
        expected = {"id": agent_id, "name": name, "ip": ip, "key": key}
        assert ask("id", agent_id, db=SAMPLE).data == expected
    stored = [row[2] for row in rows]
    assert "any" in stored
    assert any("/" in ip and "." in ip for ip in stored)
    assert any(":" in ip for ip in stored)
    assert not list(SAMPLE.parent.glob("sample.db.sql-*")) and not list(SAMPLE.parent.glob("*.db"))


def test_sql_script_is_not_written(ask: Caller, stores: Stores) -> None:
    path = stores.text(SAMPLE.read_bytes(), "agents.sql")
    assert ask("ip", "192.168.1.100", db=path).data["id"] == "001"
    assert path.read_bytes() == SAMPLE.read_bytes()
    assert list(stores.folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "script",
    [
        "",
        "SELECT 1;",
        "CREATE TABLE agent (id, name, ip);",
        "CREATE TABLE agents (id, name, ip, agent_key);",
        UNTYPED_SCHEMA + "; INSERT INTO nowhere VALUES (1);",
        UNTYPED_SCHEMA + "; INSERT INTO agent VALUES ('001', 'open",
        "CREATE TABLE agent (id, name,",
        "this is no SQL",
        "\0\0\0",
        b"\xff\xfe",
        "id: 001",
    ],
)
def test_sql_script_that_is_none(ask: Caller, stores: Stores, script: str | bytes) -> None:
    path = stores.text(script, "agents.sql")
    assert_unreadable(ask("id", "001", db=path))


def test_sql_script_that_never_ends(ask: Caller, stores: Stores) -> None:
    path = stores.text(ENDLESS_VIEW + ";", "agents.sql")
    answer = ask("--timeout", "1", "id", "001", db=path)
    assert_unreadable(answer)
    assert answer.seconds < SLOW


# ---------------------------------------------------------------- by content, not by name


@pytest.mark.parametrize("name", ["agents.csv", "client.keys", "agents.sql", "agents", "a.txt"])
def test_sqlite_is_known_by_its_content(ask: Caller, stores: Stores, name: str) -> None:
    assert_serves(ask, stores.sqlite(name=name))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["csv", "keys"])
def test_text_that_is_damaged(ask: Caller, stores: Stores, kind: str, seed: int) -> None:
    """Bytes overwritten or cut off: any answer but an internal error."""
    chance = random.Random(seed)
    rows = [Record(f"{row:03}", f"agent-{row}", f"10.0.{row}.0/24") for row in range(1, 40)]
    path = {"csv": stores.csv, "keys": stores.keys}[kind](rows)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 20, 400])):
        position = chance.randrange(20, len(content))
        content[position] = chance.choice([chance.randrange(256), *b'\0\r\n\t",; #!'])
    if seed % 3 == 0:
        del content[chance.randrange(20, len(content)) :]
    path.write_bytes(content)
    for words in (["id", "007"], ["ip", "10.0.9.1"]):
        answer = ask(*words, db=path)
        assert answer.error in (0, 2, 4, 5, 6), answer
