"""Random input of every kind, in the process: an answer each time, and never stored text in it.

Each kind has 100,000 cases, in shares that are the same wherever they run. AGENT_KEY_FUZZ=20 is
twenty times as long: the same cases, and then others.
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

TIMES = int(os.environ.get("AGENT_KEY_FUZZ", "1"))
CASES, SHARES = 100_000, 8
pytestmark = [pytest.mark.apart, pytest.mark.parametrize("share", range(SHARES))]
UNIT = "Kq7Zx"
SECRET = UNIT * 8  # in every source; each piece of it that is long enough to matter has PIECE
PIECE = b"q7Z"
LATIN = ["\0", "\n", "\r", "\t", "\x7f", "\x80", "\x85", "\xff", "\u00e9"]
ODD = [*LATIN, "\u2028", "\udc80", "\ufeff"]
Chance = random.Random


def cases(share: int, count: int = CASES) -> Iterator[Chance]:
    """Give a source of chance for each case in a SHARE of COUNT cases."""
    for part in range(TIMES):
        chance = Chance(share + SHARES * part)
        for _ in range(count // SHARES):
            yield chance


@pytest.fixture
def known_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What REQUESTS look for is worked out once, where not they are what is tried."""
    parsed = {tuple(words): script.parse_request(words) for words in [*REQUESTS, LAST_ID]}
    monkeypatch.setattr(script, "parse_request", lambda words: parsed[tuple(words)])


@functools.lru_cache(1 << 16)  # most are the same
def number_in(line: bytes) -> int:
    """Assert what holds for every answer, and give its error number."""
    number = int(check_line(line)["error"])
    assert number in (0, 1, 2, 3, 4, 5, 6), line
    assert number == 0 or PIECE not in line, line
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

    def find(self, field: str, texts: Sequence[str]) -> list[Sequence[str]]:
        place = ("id", "name", "ip", "key").index(field)
        return [row for row in ROWS if row[place] in texts]


def test_words(share: int) -> None:
    seen = set()
    for chance in cases(share):
        option, value = chance.choice(OPTIONS), chance.choice(VALUES)
        if chance.random() < 0.6:
            value = mutate(chance, value, SMALL)
        more = [chance.choice(VALUES)] * chance.choice((0, 0, 0, 0, 0, 0, 1, 2))
        words = [option, value, *more][: chance.choice((3, 3, 3, 3, 3, 2, 1, 0))]
        number = check(script.answer(words, Table), words)
        seen.add(number)
        sound = len(value) in range(3, 9) and all(letter in "0123456789" for letter in value)
        if len(words) == 2 and option == "id" and value:
            assert (number == 3) == (not sound), words
        if len(words) > 2 and option in ("id", "ip") and value:
            assert number == 3, words
    assert seen == {0, 1, 3, 4, 5, 6}


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
    stream = io.BytesIO(content.encode("utf-8", "surrogateescape"))
    return script.answer(words, lambda: script.open_text(stream, name, None))


@pytest.mark.usefixtures("known_requests")
def test_csv(share: int) -> None:
    """The rows are damaged, not the header: the last one is found, or the answer is error 2."""
    seen = set()
    for chance in cases(share):
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
    assert seen == {0, 2, 4, 5, 6}


@pytest.mark.usefixtures("known_requests")
def test_any_text(share: int) -> None:
    """Damaged anywhere: also what it takes for a header, and in no order at all."""
    for chance in cases(share, 20_000):
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
def test_client_keys(share: int) -> None:
    """Whatever the lines are: the last one is found."""
    seen = set()
    for chance in cases(share):
        content = mutate(chance, chance.choice(KEYS), TEXT) + "\n777 last any k\n"
        words = LAST_ID if chance.random() < 0.5 else chance.choice(REQUESTS)
        number = check(read(content, "client.keys", words), content)
        assert number in (0, 5) or words[1] != "777", content
        seen.add(number)
    assert seen >= {0, 4, 5, 6}


# ---------------------------------------------------------------- values in SQLite

STORED: list[Any] = [
    *("001", "7", "007", 7, 1, 1.0, 7.5, "0002", 2, b"001", "0", -1, 2**62, 1e300, float("inf")),
    *("one", "", " ", "..", "a b", SECRET, SECRET.encode(), SECRET + "\n", b"\xff", None, "\0"),
    *("any", "10.0.0.5", "10.0.0.0/8", "10.0.0.5/24", b"10.0.0.5", "::/0", "2001:DB8::/32"),
]


@pytest.mark.usefixtures("known_requests")
def test_values_in_sqlite(share: int) -> None:
    """Of any type, in columns of any type; texts that are no UTF-8, too."""
    columns = "id{0}, name{1}, ip{2}, agent_key{3}"
    schemas = [columns.format("", "", "", ""), columns.format(" INT", " TEXT", " BLOB", " REAL")]
    connection = sqlite3.connect(":memory:", isolation_level=None)
    marks = ["?"] * 4
    seen = set()
    for place, chance in enumerate(cases(share)):
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
        seen.add(check(script.answer(chance.choice(REQUESTS), lambda s=source: s), (marks, rows)))
        connection.text_factory = str
        connection.set_progress_handler(None, 0)
    assert seen == {0, 4, 5, 6}


CASTS = ["?", "?", "?", "CAST(? AS TEXT)", "CAST(? AS BLOB)", "CAST(? AS INTEGER)"]


def value(chance: Chance) -> Any:
    """Give a stored value, now and then a damaged one."""
    stored = chance.choice(STORED)
    if isinstance(stored, str) and chance.random() < 0.3:
        stored = mutate(chance, stored, TEXT).encode("utf-8", "replace").decode()
    return stored


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
def test_sql_scripts(share: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of them is shown, whatever SQLite says of them; and they write no file."""
    monkeypatch.chdir(tmp_path)
    text = ""
    monkeypatch.setattr(script, "open", lambda *_, **__: io.StringIO(text), raising=False)
    monkeypatch.setattr(script, "check_file", lambda name: name)
    seen = set()
    for chance in cases(share):
        text = chance.choice(SCRIPTS)
        text = mutate(chance, text, SQL) if chance.random() < 0.99 else text
        words = chance.choice(REQUESTS)
        seen.add(check(script.answer(words, lambda: script.open_source("a.sql", 20)), text))
    assert seen >= {0, 2, 4, 6}
    assert not os.listdir()


# ---------------------------------------------------------------- bytes at the socket


class Client:
    """A connection from which some PIECES come; it may break at the end."""

    def __init__(self, pieces: list[bytes], breaks: bool) -> None:
        self.pieces, self.breaks = pieces, breaks
        self.sent: list[bytes] = []

    def recv(self, size: int, _flags: int = 0) -> bytes:
        if not self.pieces:
            if self.breaks:
                raise ConnectionResetError
            return b""
        piece, rest = self.pieces[0][:size], self.pieces[0][size:]
        self.pieces[:1] = [rest] if rest else []
        return piece

    def sendall(self, line: bytes) -> None:
        if self.breaks and len(line) % 2:
            raise BrokenPipeError
        self.sent.append(line)


def test_bytes_at_the_socket(share: int) -> None:
    """One answer to each who said anything, in one piece, and no key in the log."""
    logged: list[str] = []
    log = SimpleNamespace(verbose=False, write=lambda _error, text: logged.append(text))
    server = SimpleNamespace(log=log, find_source=Table, name="memory", patience=1.0)
    seen = set()
    for chance in cases(share):
        words = f"{chance.choice(OPTIONS[:12])}:{chance.choice(VALUES[:-1])}"
        if chance.random() < 0.6:
            words = mutate(chance, words, SMALL)
        said = words.encode("utf-8", "surrogateescape")
        cut = int(chance.random() * 8)
        client = Client([piece for piece in (said[:cut], said[cut:]) if piece], cut == 7)
        log.verbose = cut == 6
        script.Conversation(client, "", server)
        assert len(client.sent) == bool(said) or client.breaks, said
        seen |= {number_in(line) for line in client.sent}
        assert not any(UNIT[1:] in line for line in logged), said
        logged.clear()
    assert seen == {0, 1, 3, 4, 5, 6}


# ---------------------------------------------------------------- URLs of databases

URLS = [
    *("mysql://user@host/wazuh", "postgresql://user@host:5432/db?sslmode=require&passfile=/x"),
    *(f"mysql://user:{SECRET}@host/wazuh", f"postgresql://u@[::1]/d?password={SECRET}", "mysql:"),
    *(f"mysql://u@h/?%70asswd={SECRET}", f"mysql://u%40x:{SECRET}@h:99999/d", "postgresql://"),
    *("mysql://h/d?a=b+c&d=%zz", f"mysql://user%3A{SECRET}@host/wazuh"),
]
URL = [*":/@?#&=%[].+", "//", "%3A", "%40", "@", ":", "passwd=", "99999999", *ODD, "٣"]


def test_urls_of_databases(share: int) -> None:
    """No password, or what may have been meant to be one, is shown, or handed to a driver."""
    read = 0
    for chance in cases(share):
        url = chance.choice(URLS)
        url = mutate(chance, url, URL) if chance.random() < 0.9 else url
        try:
            scheme, shown, options = script.parse_url(url)
        except script.Reply as reply:
            assert number_in(reply.line()) == 2, url
            continue
        read += 1
        assert url.startswith(f"{scheme}://") and scheme in ("mysql", "postgresql"), url
        assert not any("passw" in name for name in options) and all(options.values()), url
        who = re.split("[/?#[]", url.partition("://")[2])[0]  # user:password@host
        for text in who, unquote(who.rpartition("@")[0]):
            assert UNIT not in text.partition(":")[2], url
        assert "?" not in shown, url
        assert isinstance(options.get("port", 1), int), url
    assert read > 1000


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


def test_configurations_of_managers(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told of, and nothing that they hold is run here."""
    files: dict[str, str] = {}

    def open_file(path: str, mode: str = "r", **_: Any) -> io.StringIO | io.BytesIO:
        text = files[path.rpartition(".")[2]]
        return io.BytesIO(text.encode()) if mode == "rb" else io.StringIO(text)

    tried: list[str] = []
    monkeypatch.setattr(script, "open", open_file, raising=False)
    monkeypatch.setattr(script, "attempt", lambda _report, what, *_: tried.append(what[:6]))
    told = set()
    for chance in cases(share):
        text = chance.choice(CONFIGURATIONS)
        files["conf"] = mutate(chance, text, XML) if chance.random() < 0.95 else text
        files["json"] = json.dumps({"version": chance.choice(VERSIONS)})
        if chance.random() < 0.05:
            files["json"] = chance.choice(["", "{}", "[]", '"4.14"', '{"version": 4}'])
        report = script.Report(1, as_json=True)
        try:
            script.ask_as_manager("/no/such/home", report)
        except script.Trouble as trouble:
            report.tell("error", str(trouble))
        except Exception as error:
            raise AssertionError(files) from error
        told |= {finding["text"][:20] for finding in report.findings}
        json.loads(script.to_json(report.findings))
    assert set(tried) == {"exec_p", "socket"}
    assert len(told) > 5
