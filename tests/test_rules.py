"""The rules, in the process: words, what they look for, addresses, records and replies."""

from __future__ import annotations

import gc
import inspect
import ipaddress
import itertools
import json
import random
import re
import sqlite3
import weakref
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import INSERT, KEY, UNTYPED_SCHEMA, Record, script
from manager import check_line, comes_back, stored_ip

SECRET = "TheSecretKeyThatNoMessageMayShow"
BAD = "Bad arguments given: "


class InText:
    """A source of rows of text: it finds what is equal, and nothing else."""

    def __init__(self, rows: Iterable[Sequence[Any]]) -> None:
        """Take the ROWS."""
        self.rows = list(rows)

    def find(self, request: Any) -> list[Sequence[Any]]:
        """Give the rows in which the field is one of the texts that a sound store may hold."""
        place = Record._fields.index(request.field)
        return [row for row in self.rows if row[place] in request.texts]


def in_sqlite(rows: Iterable[Sequence[Any]]) -> Any:
    """A source of ROWS, as databases are."""
    connection = sqlite3.connect(":memory:")
    connection.execute(UNTYPED_SCHEMA)
    connection.executemany(INSERT, rows)
    return script.SqliteSource(connection, "memory", 60)


def ask(words: Sequence[str], rows: Iterable[Sequence[Any]] = (Record(),)) -> dict[str, Any]:
    """Ask for WORDS among ROWS of text, check what holds for every answer, give its JSON object."""
    answer = script.answer(words, lambda: InText(rows), "memory")
    assert SECRET.encode() not in answer.line()
    return check_line(answer.line())


def must_not_be_asked() -> Any:
    """Stand in for the source where the words alone settle the answer."""
    raise AssertionError("the source was opened")


# ---------------------------------------------------------------- the words

TEXTS = {  # of the vendor, to the letter
    1: b'{"error": 1, "message": "Too few arguments"}\n',
    3: b'{"error": 3, "message": "Bad arguments given"}\n',
    4: b'{"error": 4, "message": "No agent key found"}\n',
}
WORDS = [
    *((1, words) for words in ([], ["id"], ["ip"], ["id", ""], ["ip", ""], [""], ["", "001"])),
    (1, ["id", "", "001"]),
    (1, ["", "", ""]),
    (3, ["error1", "id", "003"]),  # the vendor's own test
    *((3, [word]) for word in ("foo", "i", "d", "p", "idip", "i d", "id:001", "key", "001", "-")),
    *((3, [word, "001"]) for word in ("ID", "Ip", "id ", " id", "id\n", "name", "--id", "ıd", "é")),
    (3, ["foo", ""]),
    (3, ["foo", "id", "001", "002"]),
    *((4, words) for words in (["id", "002"], ["ip", "192.168.1.1"], ["ip", "::1"])),
]


@pytest.mark.parametrize(("number", "words"), WORDS, ids=repr)
def test_the_vendors_texts(number: int, words: list[str]) -> None:
    source = must_not_be_asked if number != 4 else lambda: InText([Record()])
    assert script.answer(words, source, "memory").line() == TEXTS[number]
    assert script.answer(tuple(words), source, "memory").line() == TEXTS[number]


MORE = BAD + "more than an option and its value"
BEFORE = BAD + "options go before {}"
LONGER = [
    (["id", "001", "extra"], MORE),
    (["id", "001", ""], MORE),
    (["id", "001", "extra", "--db"], MORE),
    (["ip", "192.168.1.100", "id", "001"], MORE),
    (["id", "nonsense", "x"], MORE),
    (["id", "001", "--db", "x"], BEFORE.format("id")),
    (["ip", "192.168.1.100", "--version"], BEFORE.format("ip")),
    (["id", "001", "-"], BEFORE.format("id")),
]


@pytest.mark.parametrize(("words", "message"), LONGER, ids=repr)
def test_words_after_the_value(words: list[str], message: str) -> None:
    assert script.answer(words, must_not_be_asked, "memory").message == message


BAD_IDS = [
    *("1", "01", "123456789", "0000000001", "abc", "00a", "0x1", "1e2", "1_0", "0.1", "-01", "+01"),
    *("001 ", " 001", "001\n", "\n001", "001\r", "001\t", "0 1", "'001'", "001'--", "001;", "%31"),
    *("٠٠١", "00٣", "00²", "００１", "00१", "00①", "001\u00a0", "001\u2003", "00\udc80", "001\0"),
    *("*", "%", "_01", "00_", "any", "NULL", "-1000", "--help", "7" * 100_000),
]


def test_an_id_is_3_to_8_ascii_digits() -> None:
    for value in BAD_IDS:
        reply = script.answer(["id", value], must_not_be_asked, "memory")
        assert reply.message == BAD + "an id has 3 to 8 digits", ascii(value[:40])


BAD_ADDRESSES = [
    *("any", "ANY", "localhost", "my_agent", "10.0.0.0/8", "10.0.0.5/32", "10.0.0", "10.0.0.1.2"),
    *("10.0.0.256", "10.0.0.5 ", " 10.0.0.5", "10.0.0.5\n", "10.0.0.5\r\n", "10.0.0.-5", "10..0.5"),
    *("010.0.0.5", "10.0.0.05", "10.0.0.00", "0x0a.0.0.5", "167772165", "10.5", "10.0.0.5:1514"),
    *("10.0.0.٥", "１０.0.0.5", "10.0.0.²", "10。0。0。5", "10.0.0.1e1", "10.0.0.1_0", "10.0.0.%"),
    *(":", ":::", "1::2::3", "12345::", "g::", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "[::1]"),
    *("1:2:3:4:5:6:7::8", ":1:2:3:4:5:6:7", "1:2:3:4:5:6:7:", "::ffff:10.0.0", "::10.0.0.256"),
    *("::1%eth0", "fe80::1%1", "::1\n", "::٣", "::1/128", "10.0.0.5::", "::10.0.0.5:1", "::-1"),
    *("::ffff:010.0.0.5", "::0x1", "::00001", "'10.0.0.5'", "--help", "/", "/24", "10.0.0.5/"),
    *("10.0.0.5\0", "\udc80", "::\udcff", "10.0.0.5\u00a0", "1" * 100_000, ":" * 100_000),
]


def test_an_ip_is_a_single_address() -> None:
    for value in BAD_ADDRESSES:
        reply = script.answer(["ip", value], must_not_be_asked, "memory")
        assert reply.message == BAD + "not an IP address", ascii(value[:40])


# ---------------------------------------------------------------- what they look for

ID_TEXTS = {
    "001": ["001", "01", "1"],
    "010": ["010", "10"],
    "100": ["100"],
    "101": ["101"],
    "000": ["000", "00", "0"],
    "0010": ["0010"],
    "1234": ["1234"],
    "00000001": ["00000001"],
    "12345678": ["12345678"],
}


@pytest.mark.parametrize("asked", ID_TEXTS)
def test_the_texts_of_an_id(asked: str) -> None:
    request = script.parse_request(["id", asked])
    assert (request.field, request.value, request.texts) == ("id", asked, ID_TEXTS[asked])


def test_the_texts_of_an_ip() -> None:
    """The address in both spellings, then every network around it but /0, from the smallest on."""
    chance = random.Random(1)
    for _ in range(200):
        address = random_address(chance)
        if isinstance(address, ipaddress.IPv6Address) and int(address) >> 48 == 0:
            continue  # inet_ntop shows some of these with dots; the manager refuses them all
        bits, text = address.max_prefixlen, str(address)
        around = [
            str(ipaddress.ip_network((address, size), strict=False))
            for size in range(bits - 1, 0, -1)
        ]
        asked = chance.choice([text, address.exploded, text.upper()])
        request = script.parse_request(["ip", asked])
        assert (request.field, request.value) == ("ip", text)
        mapped_too = [f"::ffff:{text}"] if bits == 32 else []  # as columns of INET6 spell it
        assert request.texts == [text, f"{text}/{bits}", *mapped_too, *around]
        if bits == 32:
            mapped = script.parse_request(["ip", f"::ffff:{text}"])
            assert (mapped.value, mapped.texts) == (text, request.texts)


def random_address(chance: random.Random) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Give an address, mostly with zeros or ones at its end, so that networks meet."""
    bits = chance.choice([32, 32, 128])
    keep = chance.randrange(bits + 1)
    rest = chance.choice([0, (1 << bits - keep) - 1, chance.getrandbits(bits - keep or 1)])
    number = (chance.getrandbits(bits) >> bits - keep << bits - keep | rest) & (1 << bits) - 1
    return ipaddress.IPv4Address(number) if bits == 32 else ipaddress.IPv6Address(number)


# ---------------------------------------------------------------- addresses as stored

CANONICAL = {
    **dict.fromkeys(["any", "ANY", "Any", "aNy", ""], "any"),
    **dict.fromkeys(["0.0.0.0/0", "10.0.0.5/0", "0.0.0.0/0.0.0.0", "::ffff:0.0.0.0/96"], "any"),
    "192.168.1.100": "192.168.1.100",
    "0.0.0.0": "0.0.0.0",
    "255.255.255.255": "255.255.255.255",
    "10.9.9.9/32": "10.9.9.9",
    "10.9.9.9/255.255.255.255": "10.9.9.9",
    "10.9.9.9/31": "10.9.9.8/31",
    "10.9.9.9/255.255.255.254": "10.9.9.8/31",
    "10.0.0.0/8": "10.0.0.0/8",
    "10.0.0.5/24": "10.0.0.0/24",
    "10.0.0.5/255.255.255.0": "10.0.0.0/24",
    "10.0.31.255/255.255.240.0": "10.0.16.0/20",
    "200.1.2.3/1": "128.0.0.0/1",
    "200.1.2.3/128.0.0.0": "128.0.0.0/1",
    "2001:db8::1": "2001:db8::1",
    "2001:DB8:0:0::1": "2001:db8::1",
    "2001:0DB8:0000:0000:0000:0000:0000:0001/128": "2001:db8::1",
    "2001:db8::5/64": "2001:db8::/64",
    "2001:DB8::F/127": "2001:db8::e/127",
    "ffff::/1": "8000::/1",
    "1:2:3:4:5:6:7::": "1:2:3:4:5:6:7:0",
    "1::3:4:5:6:7:8": "1:0:3:4:5:6:7:8",
    "64:ff9b::10.1.1.1": "64:ff9b::a01:101",
    "1:2:3:4:5:6:1.2.3.4": "1:2:3:4:5:6:102:304",
    "::": "::",
    "::/128": "::",
    "::1": "::1",
    "::0.0.0.1": "::1",
    "::ffff:10.1.1.1": "10.1.1.1",
    "::FFFF:A01:101": "10.1.1.1",
    "0:0:0:0:0:ffff:10.1.1.1/128": "10.1.1.1",
    "::ffff:10.1.1.0/120": "10.1.1.0/24",
    "::ffff:10.1.1.1/112": "10.1.0.0/16",
    "::ffff:200.0.0.0/97": "128.0.0.0/1",
    "::ffff:10.1.1.1/95": "::fffe:0:0/95",
    "::ffff:0:10.1.1.1": "::ffff:0:a01:101",
    "::fffe:10.1.1.1": "::fffe:a01:101",
    "1::ffff:10.1.1.1": "1::ffff:a01:101",
}
NO_ADDRESSES = [
    *("host.example", "my_agent", "10.0.0", "10.0.0.256", "10.0.0.5.6", "010.0.0.5", "10.0.0.05"),
    *("10.0.0.5/33", "10.0.0.5/", "/24", "/", "10.0.0.5/-1", "10.0.0.5/+8", "10.0.0.5/ 8", "/8"),
    *("10.0.0.5 /8", "10.0.0.5/8/8", "10.0.0.5/1e1", "10.0.0.5/٢٤", "10.0.0.5/²", "10.0.0.5/2_4"),
    *("10.0.0.5/08", "10.0.0.5/00", "10.0.0.5/032", "10.0.0.5/99999", "10.0.0.5/" + "9" * 9999),
    *("10.0.0.5/0000000024", "10.0.0.5/2400000", "2001:db8::/00064", "2001:db8::/12800000"),
    *("10.0.0.5/255.0.255.0", "10.0.0.5/0.255.255.255", "10.0.0.5/0.0.0.255", "10.0.0.5/255.255"),
    *("10.0.0.5/0.0.0.1", "10.0.0.5/127.255.255.255", "10.0.0.5/255.255.255.253", "10.0.0.5/."),
    *("10.0.0.5/255.255.255.256", "10.0.0.5/::", "10.0.0.5/x", "10.0.0.5/\n8", "10.0.0.5/8\n"),
    *("10.0.0.5\n", "\n10.0.0.5", "10.0.0.5\t", "10.0.0.5\x00", "10.0.0.5\u00a0", "10.0.0.٥"),
    *("10.0.0.5,10.0.0.6", "10.0.0.5-10.0.0.9", "10.0.0.*", "!10.0.0.5", "10.0.0.5:1514", "%"),
    *("2001:db8::/129", "2001:db8::/255.0.0.0", "2001:db8::/ffff::", "2001:db8::1%eth0", ":::"),
    *("1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7", "1::2::3", "[::1]", "::ffff:10.0.0.256", "ａny", "::/"),
    *("anyone", "none", "null", "any\n", "an y", "０.0.0.0", " ", "any/0", "any/8", "\udc80", "\0"),
    *("::ffff:10.1.1.0/255.255.255.0", "::1/::1", "10", "167772165", "0x0a000005", "*", "default"),
]
REFUSED = [  # by the manager's own check, though they are addresses
    *("::/0", "::/1", "::/64", "::/127", "2001:db8::1/0", "::1/64", "::ffff:10.1.1.1/80"),
    *("::10.1.1.1", "::a01:101", "::1.0", "::0.1.0.0", "::1:0", "::10.1.1.0/120", "::/96"),
]


@pytest.mark.parametrize("ip", CANONICAL)
def test_an_address_in_its_one_spelling(ip: str) -> None:
    assert script.canonical_ip(ip) == CANONICAL[ip]
    assert script.canonical_ip(CANONICAL[ip]) == CANONICAL[ip]
    assert comes_back(CANONICAL[ip])


@pytest.mark.parametrize("ip", [*NO_ADDRESSES, *REFUSED], ids=lambda ip: ascii(ip[:40]))
def test_what_is_no_address(ip: str) -> None:
    with pytest.raises(ValueError):
        script.canonical_ip(ip)


PARSED = {
    "1.2.3.4": (0x01020304, 32, 32),
    "1.2.3.4/0": (0x01020304, 32, 0),
    "1.2.3.4/255.0.0.0": (0x01020304, 32, 8),
    "::1": (1, 128, 128),
    "::1/0": (1, 128, 0),
    "::ffff:1.2.3.4": (0x01020304, 32, 32),
    "::ffff:1.2.3.4/96": (0x01020304, 32, 0),
    "::ffff:1.2.3.4/95": (0xFFFF01020304, 128, 95),
    "::fffe:1.2.3.4": (0xFFFE01020304, 128, 128),
    "::1:ffff:102:304": (0x1FFFF01020304, 128, 128),
}


@pytest.mark.parametrize("text", PARSED)
def test_an_address_as_numbers(text: str) -> None:
    """With its host bits, which is how --check knows that there are any."""
    network = script.parse_network(text)
    assert (network.number, network.width, network.prefix) == PARSED[text]


def test_a_prefix_that_is_longer_than_its_address() -> None:
    for text in ("1.2.3.4/33", "::1/129", "::ffff:1.2.3.4/129"):
        with pytest.raises(ValueError, match="prefix"):
            script.parse_network(text)


def oracle(text: str) -> str | None:
    """What `ipaddress` makes of a stored ip: its one spelling, or None for a fault."""
    if text.lower() in ("", "any"):
        return "any"
    length = text.partition("/")[2]
    try:
        network: Any = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    size, first = network.prefixlen, network.network_address
    if "%" in text or "/" in text and length not in (str(size), str(network.netmask)):
        return None  # it takes zones, zeros in front, and host masks
    if network.version == 6 and ":" in length:
        return None
    if network.version == 6 and first.ipv4_mapped and size >= 96:
        network = ipaddress.ip_network((int(first.ipv4_mapped), size - 96))
        size, first = network.prefixlen, network.network_address
    if network.version == 4:
        return "any" if not size else str(first) if size == 32 else str(network)
    if size < 128 and not int(first) or 16 < int(first).bit_length() <= 32:
        return None  # `::/N`, and what is written with dots
    return str(first) if size == 128 else str(network)


def given_out(ip: str) -> str | None:
    """What the script makes of a stored ip; None for a fault."""
    try:
        return str(script.canonical_ip(ip))
    except ValueError:
        return None


def test_addresses_like_ipaddress() -> None:
    """And all that is given out comes back unchanged from the manager's check."""
    chance = random.Random(2)
    for _ in range(6000):
        address = random_address(chance)
        text = chance.choice([str(address), address.exploded, str(address).upper()])
        if address.version == 4 and chance.random() < 0.3:
            text = "::ffff:" + text
        size = chance.randrange(-1, (129 if ":" in text else 33) + 1)
        if size >= 0:
            text += f"/{size}"
        if address.version == 4 and 0 <= size <= 32 and chance.random() < 0.3:
            mask = ipaddress.ip_network((0, size))
            text = f"{address}/{chance.choice([mask.netmask, mask.hostmask])}"
        assert given_out(text) == oracle(text), text
        assert oracle(text) is None or comes_back(str(oracle(text))), text


def test_damaged_addresses_like_ipaddress() -> None:
    chance = random.Random(3)
    seeds = [*CANONICAL, *REFUSED, "10.20.30.40/24", "2001:db8:1:2:3:4:5:6/64"]
    for _ in range(12_000):
        text = list(chance.choice(seeds))
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(text) + 1)
            text[place : place + chance.randrange(2)] = chance.choice("0123456789afF.:/:/ %-x\t٣")
        ip = "".join(text)
        assert given_out(ip) == oracle(ip), ip
        assert oracle(ip) is None or comes_back(str(oracle(ip))), ip


def test_nothing_is_refused_that_the_manager_would_keep() -> None:
    """But for what it keeps only in another spelling than inet_ntop's."""
    chance = random.Random(4)
    for _ in range(3000):
        address = random_address(chance)
        size = chance.randrange(address.max_prefixlen + 1)
        network = ipaddress.ip_network((address, size), strict=False)
        ip = str(network) if chance.random() < 0.5 else str(address)
        if address.version == 6 and "/" not in ip and 16 < int(address).bit_length() <= 32:
            continue
        if address.version == 6 and 16 < int(network.network_address).bit_length() <= 48:
            continue
        if stored_ip(ip) is not None and comes_back(ip):
            assert given_out(ip) is not None, ip


# ---------------------------------------------------------------- the longest prefix


# Addresses as stored, and for each request the row it finds, counted from 1, or minus the error.
LOOKS: dict[str, tuple[Sequence[str | None], dict[str, int]]] = {
    "an address": (
        ["10.0.0.4", "10.0.0.5", "10.0.0.50"],
        {"10.0.0.5": 2, "10.0.0.50": 3, "10.0.0.6": -4, "1.0.0.5": -4, "::ffff:10.0.0.5": 2},
    ),
    "/32 is an address": (["10.0.0.0/24", "10.0.0.5/32"], {"10.0.0.5": 2, "10.0.0.4": 1}),
    "both spellings": (["10.0.0.5", "10.0.0.5/32"], {"10.0.0.5": -5}),
    "an address before a network": (["10.0.0.4/31", "10.0.0.5"], {"10.0.0.5": 2, "10.0.0.4": 1}),
    "twice": (["10.0.0.5", "10.0.0.5", "10.0.0.0/24"], {"10.0.0.5": -5, "10.0.0.6": 3}),
    "the ends": (["0.0.0.0", "255.255.255.255"], {"0.0.0.0": 1, "255.255.255.255": 2}),
    "longest": (
        ["10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/16"],
        {"10.0.0.5": 2, "10.0.1.5": 3, "10.1.0.5": 1, "11.0.0.5": -4, "9.255.255.255": -4},
    ),
    "9 and 10 are no texts": (["10.0.0.0/9", "10.0.0.0/10"], {"10.0.0.5": 2, "10.64.0.1": 1}),
    "equal networks": (
        ["10.0.0.0/16", "10.0.0.0/16", "10.0.0.0/24"],
        {"10.0.1.7": -5, "10.0.0.7": 3},
    ),
    "/1": (["128.0.0.0/1", "0.0.0.0/1"], {"200.1.1.1": 1, "100.1.1.1": 2}),
    "never any": (["any", "ANY", "", "0.0.0.0/0", "10.0.0.5/0"], {"10.0.0.5": -4, "0.0.0.0": -4}),
    "never ::/0": (["::/0"], {"2001:db8::1": -4, "::": -4, "10.0.0.5": -4}),
    "IPv6": (
        ["2001:db8::/32", "2001:db8:1::/48", "2001:db8:1::/64", "2000::/3", "2001:db8::7"],
        {"2001:DB8:1::1": 3, "2001:db8:1:1::1": 2, "2001:db8::0:7": 5, "3000::": 4, "4000::": -4},
    ),
    "IPv6 /128": (["2001:db8::1/128", "2001:db8::/127"], {"2001:db8::1": 1, "2001:db8::": 2}),
    "IPv6, both spellings": (["2001:db8::1/128", "2001:db8::1"], {"2001:db8::1": -5}),
    "two families": (["a00::/8", "10.0.0.0/8"], {"a00::1": 1, "10.1.1.1": 2, "::10.1.1.1": -4}),
    "other spellings are not found, but that of INET6": (
        ["10.0.0.9/24", "10.0.0.0/255.255.255.0", " 10.0.0.7", "2001:DB8::1", "::ffff:10.0.0.5"],
        {"10.0.0.7": -4, "10.0.0.9": -4, "10.0.0.5": 5, "2001:db8::1": -4},
    ),
    "a fault that is found": (["::/64", "::10.1.1.1"], {"::1": -6, "::10.1.1.1": -6}),
}


@pytest.mark.parametrize("source", [InText, in_sqlite])
@pytest.mark.parametrize("case", LOOKS)
def test_the_longest_prefix(source: Callable[[Sequence[Record]], Any], case: str) -> None:
    stored, looks = LOOKS[case]
    rows = [Record(f"{row:03}", f"agent-{row}", ip) for row, ip in enumerate(stored, 1)]
    for address, expected in looks.items():
        answer = script.answer(["ip", address], lambda: source(rows), "memory")
        assert found(answer) == expected, address


def found(reply: Any) -> int:
    """The id that came back, or minus the error number."""
    content = check_line(reply.line())
    return int(content["data"]["id"]) if content["error"] == 0 else -int(content["error"])


@pytest.mark.parametrize("source", [InText, in_sqlite])
def test_the_longest_prefix_like_ipaddress(source: Callable[[Sequence[Record]], Any]) -> None:
    """Random tables and requests; the reference is the rule itself, spelt out over all rows."""
    chance = random.Random(5)
    for _ in range(12):
        stored = [random_row(chance) for _ in range(150)]
        rows = [Record(f"{row:03}", "agent", ip) for row, ip in enumerate(stored, 1)]
        table, networks = source(rows), [as_looked_for(ip) for ip in stored]
        for _ in range(40):
            asked = crowded(chance)
            reply = script.answer(["ip", asked], lambda table=table: table, "memory")
            assert found(reply) == reference(networks, asked), (asked, stored)


def crowded(chance: random.Random) -> str:
    """Give an address out of few, so that rows meet; now and then a mapped one."""
    if chance.random() < 0.25:
        low = chance.choice([0, 1, 7, 1 << 16, 1 << 64, 5 << 64, chance.getrandbits(20)])
        address = ipaddress.IPv6Address((0x20010DB8 << 96) + low)
        return chance.choice([str(address), address.exploded, str(address).upper()])
    text = "10.{}.{}.{}".format(*(chance.choice([0, 1, 2, 128, 255]) for _ in range(3)))
    return chance.choice(["", "", "", "", "", "", "::ffff:"]) + text


def random_row(chance: random.Random) -> str:
    """Give a stored value, most often in its one spelling, as --import writes it."""
    address = crowded(chance)
    bits = ipaddress.ip_address(address).max_prefixlen
    size = chance.choice([bits, bits, chance.randrange(bits + 1)])
    text = address if size == bits and chance.random() < 0.7 else f"{address}/{size}"
    return (chance.random() < 0.9 and oracle(text)) or text


def as_looked_for(stored: str) -> Any:
    """Give the network of a stored ip; None where it is in no spelling that is looked for."""
    one = oracle(stored)
    if one is None or one == "any":
        return None
    network: Any = ipaddress.ip_network(one)
    return network if stored in (one, str(network), f"::ffff:{one}") else None


def reference(networks: Sequence[Any], asked: str) -> int:
    """Give the row that the rule picks, or minus the error number."""
    address = ipaddress.ip_address(oracle(asked) or "")
    best: dict[int, list[int]] = {}
    for row, network in enumerate(networks, start=1):
        if network is not None and address in network:
            best.setdefault(network.prefixlen, []).append(row)
    if not best:
        return -4
    winners = best[max(best)]
    return winners[0] if len(winners) == 1 else -5


def test_the_best_row_is_taken_though_it_is_broken() -> None:
    rows = [Record("001", "good", "10.0.0.0/8"), Record("002", "not good", "10.0.0.0/24")]
    assert ask(["ip", "10.0.0.5"], rows)["error"] == 6
    assert ask(["ip", "10.1.0.5"], rows)["data"]["id"] == "001"


def test_a_database_that_takes_more_for_equal() -> None:
    """Collations and number columns do; what comes back is looked at again."""
    rows = [Record(id="01"), Record(id="0001"), Record(id=" 1"), Record(id=1), Record(id=1.5)]
    request = script.parse_request(["id", "001"])
    assert script.best_rows(rows, request) == [rows[0], rows[2], rows[3]]
    rows = [Record(ip=ip) for ip in ("10.0.0.5 ", "10.0.0.50", "X", b"10.0.0.5/32", None)]
    request = script.parse_request(["ip", "10.0.0.5"])
    assert script.best_rows(rows, request) == [rows[0], rows[3]]


# ---------------------------------------------------------------- records

RULES = {
    "id": "id must be 3 to 8 digits, not 000, with no more zeros in front than three digits need",
    "name": "name must be 1 to 128 of A-Z a-z 0-9 - _ . and not start with a dot",
    "ip": "ip must be any, an address or a network (address/prefix) that the manager takes",
    "key": "key must be 1 to 128 printable ASCII characters",
}
GOOD: dict[str, list[tuple[Any, str]]] = {
    "id": [
        *((text, text) for text in ("001", "010", "099", "100", "999", "1000", "12345678")),
        *((value, "007") for value in (7, "7", "07", "007", b"007", b"7", " 7 ", 7.0, Decimal(7))),
        *((value, "007") for value in (Decimal("7.00"), bytearray(b"07"), memoryview(b"7"))),
        *((text, "007") for text in ("7.0", "07.0", "007.00", "7.0 ", b"7.0")),  # a spreadsheet's
        (12345678, "12345678"),
        (1e7, "10000000"),
        (1234.0, "1234"),
    ],
    "name": [
        *((text, text) for text in ("a", "7", "A-Z_a.z-09", "_", "-", "-.", "a.", "n" * 127)),
        *((text, text) for text in ("n" * 128, "any", "NULL", "None", "z", "Z", "0", "9")),
        *((value, "42") for value in (42, b"42", " 42  ", "   42", memoryview(b"42"))),
        ("n" * 128 + " ", "n" * 128),
        (-1, "-1"),
        (1.5, "1.5"),
    ],
    "ip": [
        *((text, CANONICAL[text]) for text in CANONICAL),
        *((value, "any") for value in (None, b"", "  ", " any ", b"ANY", memoryview(b"any"))),
        *((value, "10.0.0.5") for value in ("10.0.0.5   ", " 10.0.0.5", b"10.0.0.5", " 10.0.0.5 ")),
    ],
    "key": [
        *((text, text) for text in ("k", "0" * 64, "k" * 127, "k" * 128, "a b", "a  b", "!", "~")),
        ("".join(map(chr, range(33, 127))), "".join(map(chr, range(33, 127)))),
        *((value, "123456") for value in ("123456", b"123456", "  123456 ", bytearray(b"123456"))),
        ("k" * 128 + "    ", "k" * 128),
        *((f" {chr(n)}k{chr(n)} ", f"{chr(n)}k{chr(n)}") for n in range(33, 127)),
        *((b" %ck%c " % (n, n), f"{chr(n)}k{chr(n)}") for n in range(33, 127)),
    ],
}
FOREIGN = ["é", "ａ", "٣", "²", "ß", "ı", "\u212a", "\u017f", "\xa0", "\u2003", "\u200b", "\ufeff"]
CONTROLS = ["\0", "\n", "\r", "\t", "\x0b", "\x0c", "\x1b", "\x1c", "\x1f", "\x7f", "\x80", "\x85"]
BROKEN: dict[str, list[Any]] = {
    "id": [
        *("", "0", "00", "000", "0000", "0020", "0001", "01000", "00000001", "123456789", None),
        *(
            "a",
            "00a",
            "-01",
            "+01",
            "1.5",
            "7.0.0",
            "0001.0",
            ".0",
            "1e2",
            "1_0",
            "0x1",
            "0 1",
            "1,0",
            b"\xff",
            b"",
        ),
        *(0, -1, 7.5, 1e22, float("inf"), float("nan"), 123456789, 0.0, -0.0, Decimal("7.5")),
        *("٠٠١", "00٣", "00²", "００１", *(f"001{letter}" for letter in CONTROLS + FOREIGN)),
        *(f"{letter}001" for letter in CONTROLS + FOREIGN if letter not in "²"),
        *("9" * 5000, SECRET, "\udc80"),
    ],
    "name": [
        *("", " ", "n" * 129, "my agent", "!my_agent", "#my_agent", ".", "..", ".a", ".a.", None),
        *(f"a{letter}b" for letter in "!\"#$%&'()*+,/:;<=>?@[\\]^`{|}~ "),
        *(f"a{letter}b" for letter in CONTROLS + FOREIGN),
        *(f"ab{letter}" for letter in CONTROLS + FOREIGN),
        *(f"{letter}ab" for letter in CONTROLS + FOREIGN),
        *("n" * 64 + "é" * 32, "n" * 128 + "\n", "a\n002 evil any key", b"\xff", b"a\n", 1e22, b""),
        *("n" * 5_000_000, SECRET + "!", "\udc80"),
    ],
    "ip": [
        *(text for text in NO_ADDRESSES if text.strip(" ")),
        *REFUSED,
        *(b"\xff", b"10.0.0.5\n", 42, 4.5, 0, "10.0.0.5" * 100_000, SECRET),
    ],
    "key": [
        *(1.5, 123e20, float("inf"), 123456, 0, 2**62, Decimal("12e3"), True),  # no text any more
        *("", " ", "k" * 129, "k" * 128 + "\n", "key\n002 evil any key", None, b"", b"\xff"),
        *(f"{SECRET}{letter}b" for letter in CONTROLS + FOREIGN),
        *(f"{SECRET}{letter}" for letter in CONTROLS + FOREIGN),
        *(f"{letter}{SECRET}" for letter in CONTROLS + FOREIGN),
        *("ké", "kéy" * 42, "٣" * 64, SECRET.encode() + b"\n", b"k" * 129, SECRET * 5),
        *(SECRET * 100_000, "\udc80"),
    ],
}


def told(faults: Iterable[Any]) -> list[tuple[str, str]]:
    """Give the field and the text of each fault."""
    return [(fault.field, fault.text) for fault in faults]


@pytest.mark.parametrize("field", GOOD)
def test_a_field_that_keeps_its_rule(field: str) -> None:
    for stored, expected in GOOD[field]:
        record, faults = script.judge(Record()._replace(**{field: stored}))
        assert (record, faults) == (Record()._replace(**{field: expected})._asdict(), []), stored
        request = script.parse_request(["id", record["id"]])
        row = Record()._replace(**{field: stored})
        assert script.best_rows([row], request) == [row], stored
        source = SimpleNamespace(find=lambda _request, row=row: [row])
        line = script.answer(["id", record["id"]], lambda source=source: source, "memory").line()
        assert check_line(line) == {"error": 0, "data": record}, stored


@pytest.mark.parametrize("field", BROKEN)
def test_a_field_that_breaks_its_rule(field: str) -> None:
    for stored in BROKEN[field]:
        row = Record(key=SECRET)._replace(**{field: stored})
        record, faults = script.judge(row)
        assert told(faults) == [(field, RULES[field])], ascii(stored)[:60]
        line = ask(["id", "001"] if field != "id" else ["ip", "192.168.1.100"], [row])
        assert line["error"] == 6, ascii(stored)[:60]
        assert line["message"].startswith("Stored record is invalid: agent "), line
        assert line["message"].endswith(f": {RULES[field]}"), line
        assert field == "id" or ": agent 001: " in line["message"], line
        assert SECRET not in line["message"] and SECRET not in script.agent_of(record)


def test_all_broken_fields_are_told_and_the_first_is_named() -> None:
    for count in range(1, 5):
        for fields in itertools.combinations(RULES, count):
            row = Record()._replace(**dict.fromkeys(fields, "\0"))
            assert told(script.judge(row)[1]) == [(field, RULES[field]) for field in fields]
    row = Record(name="..", key="")
    assert ask(["id", "001"], [row])["message"].endswith(f": {RULES['name']}")


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("0", "agent 000"),
        ("0020", "agent 0020"),
        ("00000001", "agent 00000001"),
        ("123456789", "agent with an id of 9 characters"),
        ("", "agent with an id of 0 characters"),
        ("a", "agent with an id of 1 characters"),
        ("0a0", "agent with an id of 3 characters"),
        (SECRET, f"agent with an id of {len(SECRET)} characters"),
    ],
)
def test_an_id_is_shown_only_if_it_can_be_no_key(stored: str, shown: str) -> None:
    record, _ = script.judge(Record(id=stored))
    assert script.agent_of(record) == shown


def test_a_key_that_could_not_be_read() -> None:
    """What stands in its place says why, and that is the fault."""
    reason = "its line has no end; the file may be half-written"
    row = Record(key=script.Unreadable(reason))
    assert told(script.judge(row)[1]) == [("key", reason)]
    message = "Stored record is invalid: agent 001: " + reason
    assert ask(["id", "001"], [row]) == {"error": 6, "message": message}


def test_two_rows_are_two_though_they_are_the_same() -> None:
    text = "Found more than one match for required "
    assert ask(["id", "001"], [Record()] * 2) == {"error": 5, "message": text + "id"}
    assert ask(["ip", "192.168.1.100"], [Record()] * 3) == {"error": 5, "message": text + "ip"}
    assert ask(["id", "001"], [Record(), Record("1"), Record("002")])["error"] == 5
    assert ask(["id", "001"], [Record(), Record("0001"), Record("002")])["error"] == 0


# ---------------------------------------------------------------- replies


def test_what_is_found_to_the_byte() -> None:
    expected = (
        '{"error": 0, "data": {"id": "001", "name": "my_agent", "ip": "192.168.1.100",'
        f' "key": "{KEY}"}}}}\n'
    )
    for words in (["id", "001"], ["ip", "192.168.1.100"]):
        reply = script.answer(words, lambda: InText([Record()]), "memory")
        assert reply.line() == expected.encode()
        assert reply.record == Record()._asdict()
        assert (reply.number, reply.message) == (0, "key handed out: agent 001")


PLAIN = "".join(map(chr, range(32, 127)))


def test_json_like_the_librarys() -> None:
    chance = random.Random(6)

    def value(depth: int) -> Any:
        kind = chance.randrange(4 if depth else 2)
        if kind == 0:
            return chance.choice([0, 1, -5, 10**20, chance.randrange(10**6)])
        if kind == 1:
            return "".join(chance.choices(PLAIN + '""\\\\', k=chance.randrange(20)))
        if kind == 2:
            return [value(depth - 1) for _ in range(chance.randrange(4))]
        return {f"name{place}": value(depth - 1) for place in range(chance.randrange(4))}

    for _ in range(3000):
        content = value(3)
        assert script.to_json(content) == json.dumps(content)


def test_json_of_what_is_not_printable_is_a_question_mark() -> None:
    for number in (*range(0x300), 0x2028, 0xD800, 0xDC80, 0xFEFF, 0xFFFF, 0x1F600):
        shown = chr(number) if 32 <= number < 127 else "?"
        assert script.printable(chr(number)) == shown
        assert script.printable(f" {chr(number)}~{chr(number)}") == f" {shown}~{shown}"
        assert json.loads(script.to_json(f"a{chr(number)}b")) == f"a{shown}b"
    assert script.printable("") == ""


def test_a_message_has_at_most_500_characters() -> None:
    start = "Cannot read key source: "
    for length in (499, 500, 501, 5_000_000):
        for letter in ("x", '"', "é"):
            error = script.RequestError(2, letter * (length - len(start)))
            reply = script.Answer.of_error(error)
            shown = "?" if letter == "é" else letter
            whole = start + shown * (length - len(start))
            cut = whole[:200] + " ... " + whole[-295:]  # the reason stands at the end
            assert reply.message == error.message == (whole if length <= 500 else cut)
            assert len(reply.message) == min(length, 500)
            assert check_line(reply.line())["message"] == reply.message


def test_the_longest_answer_fits() -> None:
    """A key of quotes and a message of backslashes double in JSON: still far below 4,096 bytes."""
    longest = Record("12345678", "n" * 128, "2001:db8:1111:2222:3333:4444:5555:6666", '"' * 128)
    line = script.answer(["id", "12345678"], lambda: InText([longest]), "memory").line()
    assert check_line(line)["data"] == longest._asdict()
    check_line(script.Answer.of_error(script.RequestError(2, "\\" * 1000)).line())


@pytest.mark.parametrize("key", ['a"b', "a\\b", "\\", '"', "a/b", "<&>'", "{}", "\\u0041", "\\n"])
def test_a_key_that_json_escapes(key: str) -> None:
    assert ask(["id", "001"], [Record(key=key)])["data"]["key"] == key


def raising(error: BaseException) -> Callable[[], Any]:
    def find_source() -> Any:
        raise error

    return find_source


READ = "Cannot read key source: "
# The program's own exceptions. (An older program lacks them, and its other tests still run.)
RequestError = getattr(script, "RequestError", KeyError)
SourceError = getattr(script, "SourceError", KeyError)
WHOLE = "install the whole of python3 (Debian: the package python3)"
FAILURES: list[tuple[BaseException, int, str]] = [
    (FileNotFoundError(2, "No such file or directory", "/a.db"), 2, "/a.db: No such file or dir"),
    (PermissionError(13, "Permission denied", "/a.db"), 2, "/a.db: Permission denied"),
    (OSError(5, "Input/output error"), 2, "a.db: Input/output error"),
    (ModuleNotFoundError("No module", name="_csv"), 2, f" has no module _csv: {WHOLE}"),
    (ModuleNotFoundError("No module", name="_sqlite3"), 2, f" has no module _sqlite3: {WHOLE}"),
    (MemoryError(), 2, "a.db: "),
    (RequestError(2, "/a.db: said there"), 2, "/a.db: said there"),
    (RequestError(4), 4, ""),
    (SourceError("/a.db", "said there"), 2, "/a.db: said there"),
]


@pytest.mark.parametrize(("error", "number", "detail"), FAILURES, ids=repr)
def test_a_source_that_fails(error: BaseException, number: int, detail: str) -> None:
    line = check_line(script.answer(["id", "001"], raising(error), "a.db").line())
    assert line["error"] == number
    assert line["message"].startswith(READ) == (number == 2)
    assert detail in line["message"]


@pytest.mark.parametrize(
    "error", [KeyError(SECRET), ValueError(SECRET), TypeError(SECRET), RecursionError(SECRET)]
)
def test_what_nobody_has_foreseen(error: BaseException) -> None:
    """Its type and the line of the script that led to it, never its text."""
    reply = check_line(script.answer(["id", "001"], raising(error), "memory").line())
    lines, first = inspect.getsourcelines(script.look_up)
    number = next(n for n, line in enumerate(lines, first) if "find_source()" in line)
    expected = f"Internal error: {type(error).__name__} in line {number} of the script"
    assert reply == {"error": 9, "message": expected}


@pytest.mark.parametrize("error", [KeyError(SECRET), RequestError(4), MemoryError(), OSError(5)])
def test_an_answer_keeps_nothing_alive(error: BaseException) -> None:
    """A connection that failed must be closed at once, not when Python looks for cycles."""

    class Failing:
        """A source whose look-up fails."""

        def find(self, _request: Any) -> list[Any]:
            """Fail."""
            raise type(error)(*error.args)

    sources = [Failing()]
    source = weakref.ref(sources[0])
    gc.disable()
    try:
        answer = script.answer(["id", "001"], lambda: sources[0], "memory")
        sources.clear()
        assert answer.number and source() is None
    finally:
        gc.enable()


def test_a_source_error_has_parts() -> None:
    """Nobody has to take its message apart."""
    error = script.SourceError("/a.db", "it is empty")
    assert isinstance(error, script.RequestError)
    assert (error.number, error.source, error.reason) == (2, "/a.db", "it is empty")
    assert error.detail == "/a.db: it is empty"
    assert error.message == READ + "/a.db: it is empty"


def test_what_ends_a_process_is_not_held_up() -> None:
    for error in (KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)):
            script.answer(["id", "001"], raising(error), "memory")


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"3\.[0-9]+\.[0-9]+", script.VERSION)
