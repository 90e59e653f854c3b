"""Random input of every kind, in the process: an answer each time, and never stored text in it.

AGENT_KEY_FUZZ is the number of cases of each kind. The cases are the same wherever they run, and a
longer run has the cases of a shorter one, and then others.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import script
from manager import check_line

USUAL = 10_000  # cases, in which everything happens that can happen
CASES = int(os.environ.get("AGENT_KEY_FUZZ") or USUAL)
pytestmark = [pytest.mark.limit(120 + CASES // 50)]  # a long run takes long on purpose
UNIT = "Kq7Zx"
SECRET = UNIT * 8  # in every source; each piece of it that is long enough to matter has PIECE
PIECE = b"q7Z"
LATIN = ["\0", "\n", "\r", "\t", "\x7f", "\x80", "\x85", "\xff", "\u00e9"]
ODD = [*LATIN, "\u2028", "\udc80", "\ufeff"]
Chance = random.Random


def cases(count: int = CASES) -> Iterator[Chance]:
    """Give a source of chance for each of COUNT cases."""
    chance = Chance(0)
    for _ in range(count):
        yield chance


def happened(seen: set[int], *expected: int) -> bool:
    """Whether all that was EXPECTED has been seen, if there were cases enough for it."""
    return CASES < USUAL or seen.issuperset(expected)


@pytest.fixture
def known_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What REQUESTS look for is worked out once, where not they are what is tried."""
    parsed = {tuple(words): script.parse_request(words) for words in [*REQUESTS, LAST_ID]}
    monkeypatch.setattr(script, "parse_request", lambda words: parsed[tuple(words)])


@functools.lru_cache(1 << 16)  # most are the same
def number_in(line: bytes) -> int:
    """Assert what holds for every answer, and give its error number."""
    answer = check_line(line)
    number = int(answer["error"])
    assert number in (0, 1, 2, 3, 4, 5, 6), line
    if number:
        message, columns = (re.split("; it has (?!two)", answer["message"], maxsplit=1) + [""])[:2]
        assert PIECE not in message.encode(), line
        # The words of a header and the names of columns are told, if no key can be among them.
        assert re.fullmatch("[A-Za-z0-9_. -]*(, [A-Za-z0-9_. -]*)*", columns), line
        assert len(max(columns.split(", "), key=len)) <= 30, line
    return number


def check(reply: Any, case: Any) -> int:
    """Assert what holds for every answer to a CASE, and give its error number."""
    try:
        return number_in(reply.line())
    except AssertionError as error:
        raise AssertionError(case) from error


def mutate(chance: Chance, text: str, tokens: Sequence[str]) -> str:
    """Cut, double, overwrite and insert a few pieces of TEXT."""
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        place = int(chance.random() * (len(text) + 1))
        kind = int(chance.random() * 4)
        end = place + (0 if kind == 0 else int(chance.random() * 6) if kind < 3 else 40)
        piece = text[place : place + 9] * 2 if kind == 2 else chance.choice(tokens)
        text = text[:place] + piece + text[end:]
    return text


REQUESTS = [*[["id", "001"], ["id", "007"], ["id", "0002"]] * 4, *[["ip", "10.0.0.5"]] * 7]
REQUESTS.append(["ip", "2001:db8::5"])  # the dearest
LAST_ID = ["id", "777"]


# ---------------------------------------------------------------- words

OPTIONS = [*["id", "ip"] * 3, "", "ID", "ip ", "id:", "--db", "key", "i\0d", "\udc80"]
VALUES = [
    *("001", "007", "0002", "12345678", "000", "123456789", "00a", "٠٠١", "", "any", "--db"),
    *("10.0.0.5", "255.255.255.255", "2001:db8::5", "::ffff:10.0.0.5", "::", "::10.0.0.5", "::1"),
    *("0:0:0:0:0:ffff:a00:5", "10.0.0.5/32", "1:2:3:4:5:6:7::", "9" * 300, SECRET),
]
SMALL = [*"0123456789abf.:/%-", "00", "::", "ffff", *ODD]
ROWS = [
    ("001", "one", "10.0.0.0/8", SECRET),
    ("7", "seven", "10.0.0.4/31", "k"),
    ("008", "broken " + SECRET, "10.0.0.6", "k"),
    ("9", "nine", "2001:db8::/32", "k"),
    ("009", "nine", "2001:db8::/32", "k"),
    ("0020", "n", "::/64", "k"),
]


class Table:
    """A source of ROWS."""

    def find(self, request: Any) -> list[Sequence[str]]:
        """Give the rows in which the field is one of the texts that are asked for."""
        place = ("id", "name", "ip", "key").index(request.field)
        return [row for row in ROWS if row[place] in request.texts]


def test_words() -> None:
    seen = set()
    for chance in cases():
        option, value = chance.choice(OPTIONS), chance.choice(VALUES)
        if chance.random() < 0.6:
            value = mutate(chance, value, SMALL)
        more = [chance.choice(VALUES)] * chance.choice((0, 0, 0, 0, 0, 0, 1, 2))
        words = [option, value, *more][: chance.choice((3, 3, 3, 3, 3, 2, 1, 0))]
        number = check(script.answer(words, Table, "memory"), words)
        seen.add(number)
        sound = len(value) in range(3, 9) and all(letter in "0123456789" for letter in value)
        if len(words) == 2 and option == "id" and value:
            assert (number == 3) == (not sound), words
        if len(words) > 2 and option in ("id", "ip") and value:
            assert number == 3, words
    assert happened(seen, 0, 1, 3, 4, 5, 6)


# ---------------------------------------------------------------- texts

CSVS = [
    f"id,name,ip,key,note\n001,one,10.0.0.0/8,{SECRET},x\n7,seven,10.0.0.4/31,{SECRET},\n",
    f'id;name;ip;key;note\r\n"001";"one";"any";"{SECRET}";"a ""b"""\r\n7;"a;b";;{SECRET};\r\n',
    f'\ufeffnote,agent_key,ip,name,id\n"x, y",{SECRET},10.0.0.5,one,001\n,{SECRET},any,n,2\n',
    f"id\tname\tip\tkey\tnote\n001\tone\tNULL\t{SECRET}\tx\n7\ta\\tb\t\\N\ta\\\\b{SECRET}\t\\0\n",
    f"\n# {SECRET}\nID, Name,IP ,Key,x\n\n1,one,10.0.0.5/32,{SECRET},1,2,3\n2,{SECRET}\n,,,,\n",
]
LAST = {",": "{},last,any,k,\n", ";": "{};last;any;k;\n", "\t": "{}\tlast\tany\tk\t\n"}
TEXT = [*",;\t\n\r\" '\\#!:/.", '"', '"', '""', '",', ',"', "\r\n", "001", "7", "any", SECRET]
TEXT += LATIN
LARGE = "n" * 140_000


def read(content: str, name: str, words: list[str]) -> Any:
    """Ask a text file with this CONTENT."""
    return read_bytes(content.encode("utf-8", "surrogateescape"), name, words)


def read_bytes(content: bytes, name: str, words: list[str]) -> Any:
    """Ask a text file with these bytes: by argv and as a server does, which is the same."""

    def find_source() -> Any:
        return script.open_text(io.BufferedReader(io.BytesIO(content)), name)

    def as_server() -> Any:
        return script.Memory(find_source())

    answer = script.answer(words, find_source, name)
    served = script.answer(words, as_server, name)
    assert answer.line() == served.line(), (answer.line(), served.line(), content)
    return answer


@pytest.mark.usefixtures("known_requests")
def test_csv() -> None:
    """The rows are damaged, not the header: the last one is found, or the answer is error 2."""
    seen = set()
    for chance in cases():
        content = chance.choice(CSVS)
        start = content.index("\n", content.lower().index("key")) + 1
        body = mutate(chance, content[start:], TEXT)
        if chance.random() < 0.001:
            body += LARGE
        dialect = max(LAST, key=content[:start].count)
        last = LAST[dialect].format("777") if "agent_key" not in content else ",k,any,last,777\n"
        whole = content[:start] + body + "\n" + last
        words = LAST_ID if chance.random() < 0.5 else chance.choice(REQUESTS)
        number = check(read(whole, "a.csv", words), whole)
        assert number in (0, 2, 5) or words[1] != "777", whole
        seen.add(number)
    assert happened(seen, 0, 2, 4, 5, 6)


@pytest.mark.usefixtures("known_requests")
def test_any_text() -> None:
    """Damaged anywhere: also what it takes for a header, and in no order at all."""
    for chance in cases(CASES // 2):
        if chance.random() < 0.3:
            pieces = [*TEXT, "id", "name", "ip", "key", "id,name,ip,key", "id\tname\tip\tkey", "# "]
            content = "".join(chance.choices(pieces, k=chance.randrange(1, 30)))
        else:
            content = mutate(chance, chance.choice([*CSVS, *KEYS]), TEXT)
        name = chance.choice(("a.csv", "client.keys", SECRET[:2]))
        check(read(content, name, chance.choice(REQUESTS)), content)


KEYS = [
    f"001 one 10.0.0.0/8 {SECRET}\n007 seven any {SECRET} {SECRET}\n008 !gone any {SECRET}\n",
    f"# {SECRET}\n 001 x any {SECRET}\n\n0002 two 10.0.0.5 {SECRET}\n7 seven ::/9 {SECRET}",
    f"001 one any {SECRET}\r\n001 two\r\n002 two 10.0.0.5\r\n9 #*#*#*# any {SECRET}\r\n",
]


@pytest.mark.usefixtures("known_requests")
def test_client_keys() -> None:
    """Whatever the lines are: the last one is found."""
    seen = set()
    for chance in cases():
        content = mutate(chance, chance.choice(KEYS), TEXT) + "\n777 last any k\n"
        words = LAST_ID if chance.random() < 0.5 else chance.choice(REQUESTS)
        number = check(read(content, "client.keys", words), content)
        assert number in (0, 5) or words[1] != "777", content
        seen.add(number)
    assert happened(seen, 0, 4, 5, 6)


# ---------------------------------------------------------------- values in SQLite

STORED: list[Any] = [
    *("001", "7", "007", 7, 1, 1.0, 7.5, "0002", 2, b"001", "0", -1, 2**62, 1e300, float("inf")),
    *("one", "", " ", "..", "a b", SECRET, SECRET.encode(), SECRET + "\n", b"\xff", None, "\0"),
    *("any", "10.0.0.5", "10.0.0.0/8", "10.0.0.5/24", b"10.0.0.5", "::/0", "2001:DB8::/32"),
]


@pytest.mark.usefixtures("known_requests")
def test_values_in_sqlite() -> None:
    """Of any type, in columns of any type; texts that are no UTF-8, too."""
    columns = "id{0}, name{1}, ip{2}, agent_key{3}"
    schemas = [columns.format("", "", "", ""), columns.format(" INT", " TEXT", " BLOB", " REAL")]
    connection = sqlite3.connect(":memory:", isolation_level=None)
    marks = ["?"] * 4
    seen = set()
    for place, chance in enumerate(cases()):
        if place % 500 == 0:
            connection.execute("DROP TABLE IF EXISTS agent")
            connection.execute(f"CREATE TABLE agent ({chance.choice(schemas)})")
            marks = ["?"] * 4 if place % 1000 == 0 else chance.choices(CASTS, k=4)
        connection.execute("DELETE FROM agent")
        rows = [[value(chance) for _ in range(4)] for _ in range(chance.choice((1, 1, 2)))]
        if chance.random() < 0.5:
            rows[0][0] = chance.choice(("001", "007", 7, 1, "0002"))
        connection.executemany(f"INSERT INTO agent VALUES ({', '.join(marks)})", rows)
        source = script.SqliteSource(connection, "memory", 60)
        seen.add(
            check(
                script.answer(chance.choice(REQUESTS), lambda s=source: s, "memory"), (marks, rows)
            )
        )
        connection.text_factory = str
        connection.set_progress_handler(None, 0)
    assert happened(seen, 0, 4, 5, 6)


CASTS = ["?", "?", "?", "CAST(? AS TEXT)", "CAST(? AS BLOB)", "CAST(? AS INTEGER)"]


def value(chance: Chance) -> Any:
    """Give a stored value, now and then a damaged one."""
    stored = chance.choice(STORED)
    if isinstance(stored, str) and chance.random() < 0.3:
        stored = mutate(chance, stored, TEXT).encode("utf-8", "replace").decode()
    return stored


# ---------------------------------------------------------------- columns of every type

TYPES = ["", "TEXT", "VARCHAR(8)", "INTEGER", "INT", "REAL", "FLOAT", "NUMERIC", "DECIMAL(8, 2)"]
TYPES += ["BLOB", "CHAR(8) COLLATE NOCASE", "TEXT COLLATE RTRIM", "BOOLEAN", "DATETIME"]
IDS: list[Any] = ["001", "1", "01", "007", "7", "70", "0007", " 7", "7 ", "7.0", "1.0", "7.5", "x"]
IDS += [1, 7, 70, 7.0, 1.0, 7.5, b"007", b"7", None, "", 1234, "1234", "12e2", 1e3, "7\n"]
IPS: list[Any] = ["10.0.0.5", "10.0.0.5/32", "10.0.0.0/8", "any", "", None, b"10.0.0.5"]
IPS += ["10.0.0.5 ", "10.0", 10, "::ffff:10.0.0.5", "10.0.0.4/30", "10.0.0.0/255.0.0.0"]
KEY_VALUES: list[Any] = ["k1", "000123", "12e3", 123, 1.5, b"k2", None, "1e400", "k 3", "0x10"]
WHERE = ["", "", " WITHOUT ROWID", "view", "index"]


def table_of_any_type(chance: Chance) -> sqlite3.Connection:
    """Make a table, or a view of one, whose columns have any types, with a few agents."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    where = chance.choice(WHERE)
    types = chance.choices(TYPES, k=4)
    columns = "id {}, name {}, ip {}, agent_key {}".format(*types)
    if where == " WITHOUT ROWID":
        connection.execute(f"CREATE TABLE agent ({columns}, n INTEGER PRIMARY KEY) WITHOUT ROWID")
    else:
        table = "host" if where == "view" else "agent"
        connection.execute(f"CREATE TABLE {table} (n INTEGER, {columns})")
        if where == "view":
            connection.execute(f"CREATE VIEW agent AS SELECT id, name, ip, agent_key FROM {table}")
        if where == "index":
            connection.execute("CREATE INDEX agent_id ON agent (id)")
            connection.execute("CREATE INDEX agent_ip ON agent (ip)")
    insert = f"INSERT INTO {'host' if where == 'view' else 'agent'} (n, id, name, ip, agent_key)"
    for number in range(chance.randrange(1, 5)):
        row = [number, chance.choice(IDS), f"a{number}", chance.choice(IPS)]
        connection.execute(f"{insert} VALUES (?, ?, ?, ?, ?)", [*row, chance.choice(KEY_VALUES)])
    return connection


def test_columns_of_every_type() -> None:
    """A request by argv and one of many to a server alike; and no other agent's key."""
    asked = [["id", "001"], ["id", "007"], ["id", "1234"], ["ip", "10.0.0.5"]]
    seen = set()
    for chance in cases(CASES // 5):
        connection = table_of_any_type(chance)
        words = chance.choice(asked)
        case = ([*connection.iterdump()], words)
        source = script.SqliteSource(connection, "memory", 60)
        kept = script.SqliteSource(connection, "memory", 60)
        one = script.answer(words, lambda source=source: source, "memory")
        for others in chance.choices(asked, k=2):
            script.answer(others, lambda kept=kept: kept, "memory")
        served = script.answer(words, lambda kept=kept: kept, "memory")
        assert one.line() == served.line(), case
        rows = [row for _, row in source.rows()]
        every = SimpleNamespace(find=lambda _request, rows=rows: rows)
        scanned = script.answer(words, lambda every=every: every, "memory")
        # A text in an odd form may not be found. What is found stands in one row of the table.
        assert one.number == 4 or scanned.number != 4, (one.line(), case)
        if one.record:
            assert (one.record, []) in map(script_judge, rows), case
            assert is_text(one.record["key"], rows), case
        seen.add(check(one, case))
    assert happened(seen, 0, 4, 5, 6)


def script_judge(row: Any) -> tuple[dict[str, str], list[str]]:
    """Give the record in a row, and the fields that break a rule."""
    record, faults = script.judge(row)
    return record, [fault.field for fault in faults]


def test_scripts_with_columns_of_every_type(
    tmp_path: Path,
) -> None:
    """A script answers a request by argv as it answers a server's."""
    path = tmp_path / "agents.sql"
    for chance in cases(CASES // 50):
        path.write_text("\n".join(table_of_any_type(chance).iterdump()))
        words = chance.choice([["id", "001"], ["id", "007"], ["id", "1234"], ["ip", "10.0.0.5"]])
        one = script.answer(words, lambda: script.open_source(str(path), 9), str(path))
        served = script.answer(
            words, lambda: script.Memory(script.open_source(str(path), 9)), str(path)
        )
        assert one.line() == served.line(), path.read_text()
        assert one.number != 2 or "Inf" in path.read_text()  # which only Python writes


def is_text(key: str, rows: list[Any]) -> bool:
    """Whether a key that was handed out is stored as a text or as bytes."""
    return key in [row[3] for row in rows] or key.encode() in [row[3] for row in rows]


# ---------------------------------------------------------------- files that were cut

AGENTS = {f"{number:03}": f"{UNIT}{number}" * 6 for number in (1, 2, 3, 10)}
ADDRESSES = {agent: f"10.0.0.{int(agent)}" for agent in AGENTS}


def each(line: str) -> str:
    """Give a line for each agent."""
    lines = [line.format(id=id, ip=ADDRESSES[id], key=key) for id, key in AGENTS.items()]
    return "".join(lines)


CREATE = "CREATE TABLE agent (id, name, ip, agent_key);\n"
INSERT_OLD = "INSERT INTO agent VALUES ('{id}', 'a', '{ip}', 'old');\n"
UPDATE = "UPDATE agent SET agent_key = '{key}' WHERE id = '{id}';\n"
INSERT = "INSERT INTO agent VALUES('{id}','a','{ip}','{key}');\n"
WHOLE = {
    "a.csv": "id,name,ip,key\n" + each("{id},a{id},{ip},{key}\n"),
    "b.csv": "key;id;name;ip\r\n" + each('"{key}";"{id}";"a";"{ip}"\r\n'),
    "c.tsv": "id\tname\tip\tkey\n" + each("{id}\ta\t{ip}\t{key}\n"),
    "client.keys": each("{id} a{id} {ip} {key}\n"),
    "a.sql": f"{CREATE}{each(INSERT_OLD)}BEGIN;\n{each(UPDATE)}COMMIT;\n",
    "dump.sql": f"BEGIN TRANSACTION;\n{CREATE}{each(INSERT)}COMMIT;\n",
}


CUT = [(name, "latin-1") for name in WHOLE]
CUT += [(name, "utf-16") for name in WHOLE if not name.endswith(".sql")]


@pytest.mark.parametrize(("name", "encoding"), CUT)
def test_files_that_were_cut(
    name: str, encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cut anywhere: an agent has its own whole key, or none at all."""
    is_sql = name.endswith(".sql")
    sound = WHOLE[name].encode(encoding)
    path = tmp_path / name
    found = set()
    for chance in cases(CASES // 20 if is_sql else CASES // 10):
        length = chance.randrange(len(sound) + 1)
        agent = chance.choice([*AGENTS])
        words = chance.choice([["id", agent], ["ip", ADDRESSES[agent]]])
        if is_sql:
            path.write_bytes(sound[:length])
            answer = script.answer(words, lambda: script.open_source(str(path), 9), str(path))
        else:
            answer = read_bytes(sound[:length], name, words)
        if answer.record:
            keys = (AGENTS[agent], "old") if name == "a.sql" else (AGENTS[agent],)
            assert answer.record["key"] in keys and answer.record["id"] == agent, sound[:length]
        found.add(check(answer, sound[:length]))
    assert happened(found, *((0, 2) if is_sql else (0, 4, 6)))


# ---------------------------------------------------------------- names of columns

KNOWN = {
    "id": ["id"],
    "name": ["name"],
    "ip": ["ip", "address", "register_ip", "registerIP"],
    "key": ["agent_key", "key", "internal_key"],
}
FIELD_OF = {name.lower(): field for field, names in KNOWN.items() for name in names}
OTHERS = ["zone", "os", "keys", "agent", "identifier", "last_ip", "x", "note", "ip address"]
VALUES_OF = {"id": "001", "name": "one", "ip": "10.0.0.5", "key": "k1"}


def columns(chance: Chance) -> list[str]:
    """Give names of columns, mostly one for each field, in any case and order."""
    names = [chance.choice(KNOWN[field]) for field in KNOWN if chance.random() < 0.95]
    names += chance.choices(OTHERS, k=chance.randrange(3))
    if chance.random() < 0.3:
        names.append(chance.choice(chance.choice([*KNOWN.values()])))
    chance.shuffle(names)
    return [chance.choice([name, name.lower(), name.upper()]) for name in names]


def cells(names: list[str]) -> list[str]:
    """Give a row in which each column but the first of its field has what nobody may get."""
    row: list[str] = []
    given = set()
    for name in names:
        field = FIELD_OF.get(name.lower())
        row.append(f"{SECRET}{len(row)}" if field is None or field in given else VALUES_OF[field])
        given.add(field)
    return row


def test_headers_of_csv() -> None:
    """One column for each field, or error 2: a request never gets what is in another column."""
    seen = set()
    for chance in cases(CASES // 5):
        names = columns(chance)
        delimiter = chance.choice(",;\t")
        text = "".join(delimiter.join(row) + "\n" for row in (names, cells(names)))
        answer = read(text, "a.csv", chance.choice([["id", "001"], ["ip", "10.0.0.5"]]))
        number = check(answer, text)
        fields = [FIELD_OF[name.lower()] for name in names if name.lower() in FIELD_OF]
        is_of_manager = "internal_key" in text.lower() and "register_ip" in text.lower()
        if sorted(fields) == sorted(KNOWN):
            assert answer.record == VALUES_OF, text
        elif not is_of_manager:
            assert number == 2, text
        seen.add(number)
    assert happened(seen, 0, 2)


def test_names_of_columns_in_sqlite() -> None:
    """Those of sample.db.sql come first. No request gets what is in a column of another name."""
    seen = set()
    for chance in cases(CASES // 10):
        names = [*dict.fromkeys(name.lower() for name in columns(chance))]
        row = []
        for name, cell in zip(names, cells(names), strict=True):
            field = FIELD_OF.get(name)
            first = field is not None and KNOWN[field][0]
            row.append(VALUES_OF[field] if field and name == first else cell)
        for place, name in enumerate(names):
            field = FIELD_OF.get(name)
            if field and name != KNOWN[field][0] and KNOWN[field][0] in names:
                row[place] = f"{SECRET}{place}"
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.execute("CREATE TABLE agent ({})".format(", ".join(f'"{n}"' for n in names)))
        connection.execute(f"INSERT INTO agent VALUES ({', '.join('?' * len(row))})", row)
        source = script.SqliteSource(connection, "memory", 60)
        words = chance.choice([["id", "001"], ["ip", "10.0.0.5"]])
        answer = script.answer(words, lambda source=source: source, "memory")
        fields = [FIELD_OF[name] for name in names if name in FIELD_OF]
        if sorted(fields) == sorted(KNOWN) or {"id", "name", "ip", "agent_key"} <= {*names}:
            assert answer.record == VALUES_OF, names
        elif not {*KNOWN} <= {*fields}:
            assert answer.number == 2, names
        seen.add(check(answer, names))
    assert happened(seen, 0, 2)


# ---------------------------------------------------------------- SQL scripts

SCRIPTS = [
    f"""BEGIN TRANSACTION;
CREATE TABLE agent (id VARCHAR(8) PRIMARY KEY, name UNIQUE, ip, agent_key); -- {SECRET};
INSERT INTO agent VALUES ('001', 'one', 'any', '{SECRET}'), (7, 'it''s;', "x", '{SECRET}');
INSERT INTO agent (id, agent_key) VALUES ('0002', '{SECRET}');
COMMIT;
""",
    f"""CREATE TABLE "{SECRET}" (id, name, ip, agent_key);
CREATE TRIGGER {SECRET}2 AFTER INSERT ON "{SECRET}" BEGIN
    UPDATE {SECRET} SET name = '{SECRET};' WHERE id = 7; SELECT RAISE(ABORT, '{SECRET}') WHERE 0;
END;
INSERT INTO {SECRET} VALUES ('007', '{SECRET}', '10.0.0.5', X'6b');
CREATE VIEW agent AS SELECT id, name, ip, agent_key FROM {SECRET};
""",
    f"""/* {SECRET}; */ CREATE TABLE h (n INTEGER CHECK (n > 0), l NOT NULL, s);
INSERT INTO h VALUES (1, 'one', '{SECRET}'); WITH c(x) AS (SELECT '{SECRET}') SELECT * FROM c;
CREATE VIEW {SECRET}2 AS SELECT n, l AS {SECRET}3 FROM h;
CREATE VIEW agent AS WITH {SECRET}(a, {SECRET}3) AS (SELECT n, l FROM h)
    SELECT a AS id, {SECRET}3 AS name, '10.0.0.5' AS ip, '{SECRET}' AS agent_key
    FROM {SECRET} JOIN {SECRET}2 USING ({SECRET}3);
""",
]
SQL = [
    *(";", "'", '"', "(", ")", ",", "\n", "--", "/*", "*/", "`", "[", "]", "?", ":x", "\0", "\xff"),
    *(" SELECT ", " FROM ", " agent ", " BEGIN ", " END;", "COMMIT;", SECRET, f"'{SECRET}'"),
    *("x", "1", f"{SECRET}(", " USING ", " JOIN ", " AS ", " WITH ", "ATTACH 'x' AS y;", "NULL"),
    "PRAGMA x;",
    *(f" COLLATE {SECRET} ", " GROUP BY ", " UNION ", " OVER ", "abs(", "*", "=", ".", "VACUUM;"),
]


@pytest.mark.usefixtures("known_requests")
def test_sql_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of them is shown, whatever SQLite says of them; and they write no file."""
    monkeypatch.chdir(tmp_path)
    text = ""
    monkeypatch.setattr(script, "open", lambda *_, **__: io.StringIO(text), raising=False)
    monkeypatch.setattr(script, "trusted_path", lambda name: name)
    seen = set()
    for chance in cases():
        text = chance.choice(SCRIPTS)
        text = mutate(chance, text, SQL) if chance.random() < 0.99 else text
        words = chance.choice(REQUESTS)
        seen.add(
            check(script.answer(words, lambda: script.open_source("a.sql", 20), "a.sql"), text)
        )
    assert happened(seen, 0, 2, 4, 6)
    assert not os.listdir()


# ---------------------------------------------------------------- bytes at the socket


class Client:
    """A connection from which some PIECES come; it may break at the end."""

    def __init__(self, pieces: list[bytes], breaks: bool) -> None:
        """Take what comes, and whether the connection breaks."""
        self.pieces, self.breaks = pieces, breaks
        self.sent: list[bytes] = []

    def recv(self, size: int, _flags: int = 0) -> bytes:
        """Give a piece, or an end of either kind."""
        if not self.pieces:
            if self.breaks:
                raise ConnectionResetError
            return b""
        piece, rest = self.pieces[0][:size], self.pieces[0][size:]
        self.pieces[:1] = [rest] if rest else []
        return piece

    def sendall(self, line: bytes) -> None:
        """Take an answer."""
        if self.breaks and len(line) % 2:
            raise BrokenPipeError
        self.sent.append(line)


def test_bytes_at_the_socket() -> None:
    """One answer to each who said anything, in one piece, and no key in the log."""
    logged: list[str] = []
    log = SimpleNamespace(verbose=False, info=logged.append, error=logged.append)
    worker = SimpleNamespace(log=log, find_source=Table, source_name="memory", patience=1.0)
    worker.close_source = lambda: None
    seen = set()
    for chance in cases():
        words = f"{chance.choice(OPTIONS[:12])}:{chance.choice(VALUES[:-1])}"
        if chance.random() < 0.6:
            words = mutate(chance, words, SMALL)
        said = words.encode("utf-8", "surrogateescape")
        cut = int(chance.random() * 8)
        client = Client([piece for piece in (said[:cut], said[cut:]) if piece], cut == 7)
        log.verbose = cut == 6
        script.Conversation(client, worker).handle()
        assert len(client.sent) == bool(said) or client.breaks, said
        seen |= {number_in(line) for line in client.sent}
        assert not any(UNIT[1:] in line for line in logged), said
        logged.clear()
    assert happened(seen, 0, 1, 3, 4, 5, 6)


SENT = [
    b'{"error": 0, "data": {"id": "001", "name": "a", "ip": "any", "key": "k"}}\n',
    b'{"error": 4, "message": "No agent key found"}\n',
    *(b"{}", b"[]", b"{}{}", b'{"error": 4}\n{"error": 4}\n', b'"text"\n', b"5", b"null\n", b"\n"),
    *(b'{"message": "\x1b[2J"}\n', b'{"a": "\xc3\xa9"}\n', b'{"error": 0, "da', b"{" * 9000),
]
BYTES = [
    "{",
    "}",
    '"',
    "\\",
    "\n",
    "\r",
    "\0",
    "\x1b",
    "\x7f",
    "\xe9",
    " ",
    ",",
    ":",
    "[",
    "1",
    "\t",
]


def test_bytes_from_a_server_that_is_not_ours() -> None:
    """One JSON object of printable ASCII is repeated on one line. All else is error 2."""
    seen = set()
    for chance in cases():
        text = chance.choice(SENT).decode("latin-1")
        received = mutate(chance, text, BYTES) if chance.random() < 0.9 else text
        try:
            line = script.checked_line("/run/socket", received.encode("latin-1"))
        except script.RequestError as error:
            seen.add(number_in(script.Answer.of_error(error).line()))
            continue
        seen.add(0)
        assert line.endswith(b"\n") and all(32 <= byte < 127 for byte in line[:-1]), received
        assert isinstance(json.loads(line), dict), received
    assert happened(seen, 0, 2)


# ---------------------------------------------------------------- URLs of databases

URLS = [
    *("mysql://user@host/wazuh", "postgresql://user@host:5432/db?sslmode=require&passfile=/x"),
    *(f"mysql://user:{SECRET}@host/wazuh", f"postgresql://u@[::1]/d?password={SECRET}", "mysql:"),
    *(f"mysql://u@h/?%70asswd={SECRET}", f"mysql://u%40x:{SECRET}@h:99999/d", "postgresql://"),
    *("mysql://h/d?a=b+c&d=%zz", f"mysql://user%3A{SECRET}@host/wazuh"),
]
URL = [*":/@?#&=%[].+", "//", "%3A", "%40", "@", ":", "passwd=", "99999999", *ODD, "٣"]


def test_urls_of_databases() -> None:
    """No password, or what may have been meant to be one, is shown, or handed to a driver."""
    read = 0
    for chance in cases():
        url = chance.choice(URLS)
        url = mutate(chance, url, URL) if chance.random() < 0.9 else url
        try:
            parsed = script.parse_url(url)
        except script.RequestError as error:
            assert number_in(script.Answer.of_error(error).line()) == 2, url
            continue
        read += 1
        assert parsed.scheme in ("mysql", "postgresql"), url
        assert not any("passw" in name for name in parsed.options), url
        assert all(parsed.options.values()), url
        who = re.split("[/?#[]", url.partition("://")[2])[0]  # user:password@host
        for text in who, unquote(who.rpartition("@")[0]):
            assert UNIT not in text.partition(":")[2], url
        assert "?" not in parsed.shown, url
    assert read > CASES // 100


# ---------------------------------------------------------------- a manager's ossec.conf

CONFIGURATIONS = [
    """<!-- x --><ossec_config>
  <auth><disabled>no</disabled><port>1515</port>
    <key_request><enabled>yes</enabled><exec_path>/x/agent_key_request.py --db "/a b"</exec_path>
      <timeout>60</timeout><socket>queue/sockets/x</socket><threads>1</threads></key_request>
  </auth>
</ossec_config>
<ossec_config><localfile a="b"/></ossec_config>
""",
    """<ossec_config><wodle name="agent-key-polling"><enabled>yes</enabled>
  <exec_path>/x/agent_key_request.py --serve --timeout 5</exec_path><timeout>60</timeout>
  <socket>/x</socket></wodle><wodle name='other'><x/></wodle></ossec_config>
""",
]
XML = [
    *("<", ">", "/", "<!--", "-->", '"', "'", " ", "</auth>", "<auth>", "</ossec_config>", "\0"),
    *("\n", "<key_request>", "</key_request>", "<exec_path>", "x", "no", "<timeout>nan</timeout>"),
    *("&amp;", "\xff", "\\", "<>", "< >", "</>", "<a b=c>", "=", "<socket>", "1e999"),
]
VERSIONS = ["v4.14.7", "v4.3.0", "5.0", "", "4", "x.y", "9" * 400]


def test_configurations_of_managers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told of, and nothing that they hold is run here."""
    files: dict[str, str] = {}

    def read(path: str) -> str:
        ending = path.rpartition(".")[2]
        if ending not in files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return files[ending]

    tried: list[str] = []
    monkeypatch.setattr(script, "read_managers_file", read)
    monkeypatch.setattr(script, "attempt", lambda _report, what, *_: tried.append(what))
    monkeypatch.setattr(script, "source_of_manager", lambda *_: "a.db")
    monkeypatch.setattr(script, "is_same_source", lambda *_: True)
    options = SimpleNamespace(db="a.db", timeout=None, socket=None)
    told = set()
    for chance in cases():
        text = chance.choice(CONFIGURATIONS)
        files["conf"] = mutate(chance, text, XML) if chance.random() < 0.95 else text
        files["json"] = json.dumps({"version": chance.choice(VERSIONS)})
        if chance.random() < 0.05:
            files["json"] = chance.choice(["", "{}", "[]", '"4.14"', '{"version": 4}'])
        report = script.Report(1, as_json=True)
        try:
            script.check_manager("/no/such/home", options, report, None)
        except script.CommandError as problem:
            report.error(str(problem))
        except Exception as error:
            raise AssertionError(files) from error
        findings = [finding.text for finding in report.findings]
        told |= {text[-20:] for text in findings}
        json.loads(script.to_json(findings))
    assert CASES < USUAL or set(tried) == {"exec_path", "socket"}
    assert CASES < USUAL or len(told) > 4
