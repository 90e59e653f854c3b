"""A manager's client.keys, which is read as the manager reads it."""

from __future__ import annotations

import pytest
from conftest import KEY, Record, Stores, script
from sources import KEYS_LINE, PATIENCE, ROW, SECRET, TEXTS, look, serves

KEYS = {
    "CRLF": KEYS_LINE.replace("\n", "\r\n"),
    "comments": f"# a comment\n#001 my_agent any other\n{KEYS_LINE}# the end\n",
    "lines that start with a space": f" 001 my_agent any other\n{KEYS_LINE} 001 x any other\n",
    "blank lines": f"\n\n{KEYS_LINE}\n",
    "removed with !": f"001 !my_agent 192.168.1.100 old\n{KEYS_LINE}002 !other any old\n",
    "removed with #": f"001 #my_agent 192.168.1.100 old\n{KEYS_LINE}001 #*#*#*#*# any old\n",
    "removed after": f"{KEYS_LINE}001 !my_agent 192.168.1.100 old\n",
    "removed, and short": f"001 !my_agent\n{KEYS_LINE}001 #\n001 !\n",
    "one digit": KEYS_LINE[2:],
    "short lines": f"002\n002 other\n002 other any\n{KEYS_LINE}003\n",
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
    for content in (
        "# only a comment\n",
        "001 !gone any k\n",
        "\n",
        " 001 a any k\n",
        "#",
        "001 !a any k",
    ):
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


def test_what_client_keys_leaves_out_is_counted(stores: Stores) -> None:
    """An import says so: the output of `psql -t` has a space before each line."""
    text = f"001 !gone any k\n002 #gone any k\n 003 a any k\n 004 b any k\n 5 c any k\n{KEYS_LINE}"
    source = script.open_source(str(stores.text(text, "client.keys")), PATIENCE)
    assert len(list(source.rows())) == 1
    counts = {what: number for what, number in source.skipped.items() if number}
    assert sorted(counts.values()) == [2, 3], counts
    removed, spaces = sorted(counts, key=lambda what: counts[what])
    assert "removed" in removed and "space" in spaces
