"""Files of every kind: known by their content, half-written, damaged, or no source at all."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from conftest import Caller, Record, Stores, script
from manager import check_line
from sources import (
    HALF_WRITTEN,
    KEYS_LINE,
    PATIENCE,
    ROW,
    SECRET,
    TEXTS,
    look,
    measure,
    refuses,
    serves,
)

NO_SOURCE = {
    "a word": b"hello\n",
    "a word without newline": b"hello",
    "four words": b"this is X.5 source\n",
    "binary": bytes(range(256)) * 40,
    "a program": b"\x7fELF\x02\x01\x01" + bytes(5000),
    "zeros": bytes(8192),
    "XML": b"<ossec_config>\n  <auth>\n  </auth>\n</ossec_config>\n",
    "another CSV": b"name,phone\nbob,123\n",
    "one long line": b"x" * 3_000_000,
    "a comment and a word": b"# keys\nhello\n",
    "SQLite 2": b"** This file contains an SQLite 2.1 database **\n",
    "almost SQLite": b"SQLite format 3\n" + bytes(4096),
}
SEEMS = {  # what people have instead, and a word by which the message names it
    "a quote as the delimiter": (b'sep="\nid"name"ip"key\n', "CSV"),
    "a letter as the delimiter": (b"sep=i\nid,name,ip,key\n", "CSV"),
    "xlsx": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00" + bytes(range(256)) * 9, "zip"),
    "mysql -t": (f"+-----+---+-----+--+\n| 001 | n | any | {SECRET} |\n".encode(), "mysql -t"),
    "a JSON object": (f'{{"id": "001", "key": "{SECRET}"}}\n'.encode(), "JSON"),
    "a JSON list": (f'[\n  {{"id": "001", "key": "{SECRET}"}}\n]\n'.encode(), "JSON"),
    "JSON on one line": (f'[{{"id":1,"key":"{SECRET}"}}]'.encode(), "JSON"),
    "mysql -N": (f"001\tmy_agent\tany\t{SECRET}\n002\tb\tany\t{SECRET}\n".encode(), ""),
    "CSV without a header": (f"001,my_agent,any,{SECRET}\n".encode(), ""),
    "a header of other words": (b"Agent ID,Hostname\n001,web\n", ""),
    "psql": (
        f" id  | agent_key\n-----+------\n 001 | {SECRET}\n(1 row)\n\n".encode(),
        "",
    ),
}
UTF_16 = {  # a text, which a spreadsheet may have written in UTF-16
    "csv": TEXTS["csv"],
    "keys": TEXTS["keys"],
    "tabs": f"ort\tid\tname\tip\tkey\r\nKöln\t{ROW}\r\n".replace(",", "\t"),
    "semicolons": f'id;name;ip;key;"größe"\r\n{ROW};"ß €"\r\n'.replace(",", ";"),
}
WHOLE = {  # texts whose last line has an agent 002, which is found
    "csv": f"id,name,ip,key\n{ROW}\n002,b,10.0.0.2,bb\n",
    "semicolons": f"id;name;ip;key\n{ROW}\n002;b;10.0.0.2;bb\n".replace(",", ";"),
    "quotes": f'id,name,ip,key\n{ROW}\n"002","b","10.0.0.2","bb"\n',
    "tabs": f"id\tname\tip\tkey\n{ROW}\n002\tb\t10.0.0.2\tbb\n".replace(",", "\t"),
    "a column after the key": f"id,name,ip,key,x\n{ROW},\n002,b,10.0.0.2,bb,y\n",
    "sep": f"sep=;\nid;name;ip;key\n{ROW}\n002;b;10.0.0.2;bb\n".replace(",", ";"),
    "CRLF": f"id,name,ip,key\r\n{ROW}\r\n002,b,10.0.0.2,bb\r\n",
    "keys": f"{KEYS_LINE}002 b 10.0.0.2 bb\n",
    "keys and CRLF": f"{KEYS_LINE}002 b 10.0.0.2 bb\r\n",
    "keys and a comment": f"{KEYS_LINE}# a comment\n\n002 b 10.0.0.2 bb\n",
}
NO_AGENT_CUT = {  # a last line without an end that is no agent: nothing was lost of the others
    "a comment": f"{KEYS_LINE}# the end",
    "a removed agent": f"{KEYS_LINE}002 !b any bb",
    "a space": f"{KEYS_LINE} ",
    "an empty row": f"id,name,ip,key\n{ROW}\n,,,",
}
NUMBERED = {
    "client.keys": (f"#a\n\n{KEYS_LINE}002 !gone any k\n00X\n \n{KEYS_LINE}", [3, 5, 7]),
    "agents.csv": (f"\n# a\nid,name,ip,key\n\n{ROW}\n3\n\n{ROW}\n", [5, 6, 8]),
    "bom.csv": (f"\ufeff\nid,name,ip,key\n{ROW}\n3\n\n{ROW}\n", [3, 4, 6]),
    "batch.tsv": (f"id,name,ip,key\n{ROW}\n3\n\n{ROW}\n".replace(",", "\t"), [2, 3, 5]),
    "sep.csv": (f"sep=,\nid,name,ip,key\n\n{ROW}\n3\n,,,\n{ROW}\n", [4, 5, 7]),
}

NOISE = 20.0  # seconds that a very busy machine may add
LARGE = 300 << 20  # bytes of a line that no agent has; the file is sparse
MEMORY = 100 << 10  # kilobytes that a request may take for it


# ---------------------------------------------------------------- kinds are told by content


@pytest.mark.parametrize("content", NO_SOURCE.values(), ids=NO_SOURCE)
def test_what_is_no_source(stores: Stores, content: bytes) -> None:
    for name in ("agents.db", "agents.csv", "agents", "keys", "client.keys.bak"):
        path = stores.text(content, name)
        reason = refuses(path)
        assert "id,name,ip,key" in reason or "longer than 1 MB" in reason
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


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_is_known_by_its_content(stores: Stores, kind: str) -> None:
    for name in ("agents.db", "agents.csv", "agents", "client.keys", "client.keys.bak", "a.txt"):
        for start in ("", "\n\n", " a comment\n", "# a\n#\n", "\r\n", "\ufeff", "\ufeff#\n"):
            assert serves(stores.text(start + TEXTS[kind], name)), (name, start)
        for comment in ("# id, name, ip, key", "#name,key", " name, key", "# Columns: id,name,ip"):
            assert serves(stores.text(f"{comment}\n{TEXTS[kind]}", name)), (name, comment)


def test_sqlite_is_known_by_its_content(stores: Stores) -> None:
    for name in ("agents.csv", "client.keys", "agents", "a.txt"):
        assert serves(stores.sqlite(name=name))


@pytest.mark.parametrize("what", SEEMS)
def test_what_a_file_seems_to_be(stores: Stores, what: str) -> None:
    """The message says what was obvious, and what a first line must be. Stored text stays out."""
    content, word = SEEMS[what]
    for name in ("agents.csv", "export"):
        path = stores.text(content, name)
        for words in (["id", "001"], ["ip", "10.0.0.5"]):
            reason = refuses(path, *words)
            assert word in reason and "id,name,ip,key" in reason, reason


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", UTF_16)
def test_utf_16(stores: Stores, kind: str, encoding: str) -> None:
    content = f"\ufeff{UTF_16[kind]}".encode(encoding)
    for name in ("agents.csv", "agents.txt", "client.keys"):
        assert serves(stores.text(content, name))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_that_is_damaged(stores: Stores, encoding: str) -> None:
    """A byte too few, and half a letter: no internal error, and no other key."""
    sound = f"\ufeff{WHOLE['csv']}".encode(encoding)
    half = f"\ufeffid,name,ip,key\n\ud800{ROW}\n002,\udc00,any,k\n".encode(
        encoding, "surrogatepass"
    )
    for content in (sound[:-1], sound[:-2], sound[:-3], sound + b"x", sound[:2], sound[:3], half):
        path = stores.text(content, "agents.csv")
        for words in (["id", "002"], ["ip", "10.0.0.2"]):
            answer = look(path, *words)
            assert answer["error"] in (2, 4, 6) or answer["data"]["key"] == "bb", content
    assert look(stores.text(sound[:-2], "agents.csv"), "id", "002")["error"] == 6


# ---------------------------------------------------------------- half-written files


@pytest.mark.parametrize("kind", WHOLE)
def test_a_last_line_without_an_end(stores: Stores, kind: str) -> None:
    """`bb` may be the beginning of a longer key. The agents before it are found."""
    path = stores.text(WHOLE[kind], "agents.txt")
    assert look(path, "id", "002")["data"]["key"] == "bb"
    source = script.open_source(str(path), PATIENCE)
    lines = [number for number, _ in source.rows()]
    assert source.unfinished_line is None
    for end in ("\r\n", "\n"):
        if not WHOLE[kind].endswith(end):
            continue
        path = stores.text(WHOLE[kind][: -len(end)], "agents.txt")
        for words in (["id", "002"], ["ip", "10.0.0.2"]):
            content = look(path, *words)
            assert content["error"] == 6, content
            assert content["message"] == f"Stored record is invalid: agent 002: {HALF_WRITTEN}"
        assert serves(path)
        source = script.open_source(str(path), PATIENCE)
        assert [number for number, _ in source.rows()] == lines
        assert source.unfinished_line == lines[-1]


def test_an_only_line_without_an_end(stores: Stores) -> None:
    for text in (KEYS_LINE.strip(), TEXTS["csv"].strip()):
        assert look(stores.text(text, "agents.txt"), "id", "001")["error"] == 6


@pytest.mark.parametrize("kind", NO_AGENT_CUT)
def test_a_last_line_without_an_end_and_without_an_agent(stores: Stores, kind: str) -> None:
    assert serves(stores.text(NO_AGENT_CUT[kind], "agents.txt"))


@pytest.mark.parametrize("kind", ["csv", "keys"])
def test_a_line_that_is_too_long(ask: Caller, stores: Stores, kind: str) -> None:
    """A sparse file: no request reads hundreds of megabytes for one line of it."""
    for start in ("", TEXTS[kind]):
        path = stores.text(start + "x", "agents.txt")
        with path.open("r+b") as stream:
            stream.truncate(LARGE)
        words: list[str | bytes | Path] = ["--db", path, "--timeout", "5", "id", "009"]
        started = time.monotonic()
        done = measure([*ask.command("isolated"), *words], ask.path)
        assert check_line(done.output)["error"] == 2 and done.status == 0, done
        assert done.memory < MEMORY, done
        assert time.monotonic() - started < 5 + NOISE


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


@pytest.mark.parametrize("name", NUMBERED)
def test_the_numbers_of_lines(stores: Stores, name: str) -> None:
    """Comments, blank lines and removed agents count, too; what a line lacks breaks every rule."""
    content, numbers = NUMBERED[name]
    source = script.open_source(str(stores.text(content, name)), PATIENCE)
    rows = list(source.rows())
    assert [number for number, _ in rows] == numbers
    good, short = tuple(Record()), "00X" if "keys" in name else "3"
    assert [tuple(row) for _, row in rows[::2]] == [good, good]
    _record, faults = script.judge(rows[1][1])
    assert rows[1][1][0] == short
    assert [fault.field for fault in faults if fault.field != "id"] == ["name", "ip", "key"]


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
            reply = script.answer(words, lambda: script.open_source(str(path), 5), str(path))
            error = check_line(reply.line())["error"]
            assert error in (0, 2, 4, 5, 6), reply.message
            assert error == 0 or SECRET[:12] not in reply.message
