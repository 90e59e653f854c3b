"""What an `ip` request matches: the same table over every kind of source."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Caller, Record, Stores

KINDS = ["indexed", "sqlite", "csv", "keys"]
NOT_FOUND = 4
TWO = 5
Store = Callable[[Sequence[str | None]], Path]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, stores: Stores) -> Store:
    """Make a source where agent 001 has the first of some addresses, 002 the second …"""

    def make_store(addresses: Sequence[str | None]) -> Path:
        if request.param == "keys" and any(not ip or " " in ip for ip in addresses):
            pytest.skip("client.keys cannot hold such an address")
        rows = [Record(f"{row:03}", f"agent-{row}", ip) for row, ip in enumerate(addresses, 1)]
        return stores.make(request.param, rows)

    return make_store


class Case(NamedTuple):
    """Addresses as stored, and for each request the row that it finds, counted from 1.

    Where the answer is no row: the request maps to minus the error number.
    """

    stored: Sequence[str | None]
    requests: dict[str, int]


EXACT = {
    "the address": Case(
        ["10.0.0.5"], {"10.0.0.5": 1, "10.0.0.6": -4, "1.0.0.5": -4, "10.0.0.55": -4}
    ),
    "among others": Case(["10.0.0.4", "10.0.0.5", "10.0.0.50"], {"10.0.0.5": 2, "10.0.0.50": 3}),
    "the lowest and the highest": Case(
        ["0.0.0.0", "255.255.255.255"], {"0.0.0.0": 1, "255.255.255.255": 2, "0.0.0.1": -4}
    ),
    "/32 is single": Case(["10.0.0.5/32"], {"10.0.0.5": 1, "10.0.0.4": -4}),
    "/255.255.255.255 is single": Case(
        ["10.0.0.5/255.255.255.255"], {"10.0.0.5": 1, "10.0.0.4": -4}
    ),
    "single beats network": Case(["10.0.0.0/24", "10.0.0.5", "10.0.0.4/31"], {"10.0.0.5": 2}),
    "/32 beats network": Case(["10.0.0.0/24", "10.0.0.5/32", "10.0.0.4/31"], {"10.0.0.5": 2}),
    "single and /32 are equal": Case(["10.0.0.5", "10.0.0.5/32"], {"10.0.0.5": -5}),
    "twice": Case(["10.0.0.5", "10.0.0.5", "10.0.0.0/24"], {"10.0.0.5": -5, "10.0.0.6": 3}),
    "single, /32 and /255.255.255.255": Case(
        ["10.0.0.5/255.255.255.255", "10.0.0.5/32"], {"10.0.0.5": -5}
    ),
    "single and padded single": Case(["10.0.0.5", "10.0.0.5  "], {"10.0.0.5": -5}),
    "padded": Case(
        [" 10.0.0.5", "10.0.0.6   ", " 10.1.0.0/16 "], {"10.0.0.5": 1, "10.0.0.6": 2, "10.1.2.3": 3}
    ),
    "padded /32": Case(["10.0.0.5/32   "], {"10.0.0.5": 1}),
}

NETWORKS = {
    "one": Case(
        ["10.0.0.0/24"],
        {"10.0.0.0": 1, "10.0.0.5": 1, "10.0.0.255": 1, "10.0.1.0": -4, "9.255.255.255": -4},
    ),
    "longest prefix": Case(
        ["10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/16"],
        {"10.0.0.5": 2, "10.0.1.5": 3, "10.1.0.5": 1, "11.0.0.5": -4},
    ),
    "longest prefix, other order": Case(
        ["10.0.0.0/24", "10.0.0.0/16", "10.0.0.0/8"], {"10.0.0.5": 1, "10.0.1.5": 2, "10.1.0.5": 3}
    ),
    "9 against 10: no text order": Case(
        ["10.0.0.0/9", "10.0.0.0/10"], {"10.0.0.5": 2, "10.64.0.1": 1}
    ),
    "a longer one beside it": Case(["10.0.0.0/8", "10.0.1.0/24"], {"10.0.0.5": 1}),
    "/31": Case(["10.0.0.4/31"], {"10.0.0.4": 1, "10.0.0.5": 1, "10.0.0.6": -4, "10.0.0.3": -4}),
    "/30": Case(["10.0.0.4/30"], {"10.0.0.4": 1, "10.0.0.7": 1, "10.0.0.8": -4, "10.0.0.3": -4}),
    "/1": Case(["128.0.0.0/1"], {"128.0.0.0": 1, "255.1.1.1": 1, "127.255.255.255": -4}),
    "/1, both": Case(["128.0.0.0/1", "0.0.0.0/1"], {"200.1.1.1": 1, "100.1.1.1": 2}),
    "/7 and /15": Case(
        ["10.0.0.0/7", "10.2.0.0/15"], {"11.9.9.9": 1, "10.3.9.9": 2, "12.0.0.1": -4}
    ),
    "/20": Case(["10.0.16.0/20"], {"10.0.31.255": 1, "10.0.32.0": -4, "10.0.15.255": -4}),
    "host bits": Case(
        ["10.0.0.5/24"], {"10.0.0.77": 1, "10.0.0.5": 1, "10.0.0.0": 1, "10.0.1.5": -4}
    ),
    "host bits in a short prefix": Case(
        ["10.9.8.7/8", "172.31.255.255/12"], {"10.200.1.1": 1, "172.16.0.1": 2, "172.32.0.1": -4}
    ),
    "host bits, /31": Case(["10.0.0.5/31"], {"10.0.0.4": 1, "10.0.0.5": 1, "10.0.0.6": -4}),
    "host bits, /1": Case(["200.1.2.3/1"], {"129.0.0.1": 1, "127.0.0.1": -4}),
    "host bits within": Case(["10.0.0.0/8", "10.0.0.5/24", "10.0.0.0/16"], {"10.0.0.7": 2}),
    "host bits around": Case(
        ["10.0.0.0/24", "10.1.2.3/8", "10.0.0.9/16"], {"10.0.0.7": 1, "10.0.7.7": 3}
    ),
    "single beats host bits": Case(["10.0.0.5/24", "10.0.0.5"], {"10.0.0.5": 2, "10.0.0.6": 1}),
    "dotted netmask": Case(["10.0.0.0/255.255.255.0"], {"10.0.0.7": 1, "10.0.1.7": -4}),
    "dotted netmask and host bits": Case(
        ["10.0.0.9/255.255.255.0"], {"10.0.0.7": 1, "10.0.1.7": -4}
    ),
    "dotted netmask is longer": Case(
        ["10.0.0.0/16", "10.0.0.0/255.255.255.0"], {"10.0.0.7": 2, "10.0.1.7": 1}
    ),
    "dotted netmask is shorter": Case(
        ["10.0.0.0/24", "10.0.0.0/255.255.0.0"], {"10.0.0.7": 1, "10.0.1.7": 2}
    ),
    "dotted netmask off the octets": Case(
        ["10.0.16.0/255.255.240.0"], {"10.0.31.1": 1, "10.0.32.1": -4}
    ),
}

TIES = {
    "same network": Case(["10.0.0.0/24", "10.0.0.0/24"], {"10.0.0.7": -5, "10.0.1.7": -4}),
    "host bits and none": Case(["10.0.0.5/24", "10.0.0.0/24"], {"10.0.0.7": -5}),
    "other host bits": Case(["10.0.0.5/24", "10.0.0.9/24"], {"10.0.0.7": -5}),
    "dotted and prefix": Case(["10.0.0.0/24", "10.0.0.0/255.255.255.0"], {"10.0.0.7": -5}),
    "dotted and host bits": Case(["10.0.0.5/24", "10.0.0.0/255.255.255.0"], {"10.0.0.7": -5}),
    "three": Case(["10.0.0.0/24"] * 3, {"10.0.0.7": -5}),
    "settled by a longer one": Case(
        ["10.0.0.0/16", "10.0.0.0/16", "10.0.0.0/24"], {"10.0.0.7": 3, "10.0.1.7": -5}
    ),
    "settled by a longer one with host bits": Case(
        ["10.0.0.0/16", "10.0.0.0/16", "10.0.0.9/24"], {"10.0.0.7": 3, "10.0.1.7": -5}
    ),
    "settled by a single one": Case(["10.0.0.0/24", "10.0.0.0/24", "10.0.0.7"], {"10.0.0.7": 3}),
    "IPv6, same address": Case(["2001:db8::1", "2001:DB8:0::1"], {"2001:db8::1": -5}),
    "IPv6, /128": Case(["2001:db8::1", "2001:db8::1/128"], {"2001:db8::1": -5}),
    "IPv6, same network": Case(["2001:db8::/32", "2001:DB8::/32"], {"2001:db8::1": -5}),
    "IPv6, host bits": Case(["2001:db8::1/64", "2001:db8::/64"], {"2001:db8::7": -5}),
    "mapped": Case(["10.0.0.5", "::ffff:10.0.0.5"], {"10.0.0.5": -5, "::ffff:10.0.0.5": -5}),
    "mapped, two spellings": Case(["::ffff:a00:5", "::FFFF:10.0.0.5"], {"10.0.0.5": -5}),
}

NEVER = {
    "any": Case(["any"], {"10.0.0.5": -4, "::1": -4, "0.0.0.0": -4, "::": -4}),
    "any in other letters": Case(["ANY", "Any", " any "], {"10.0.0.5": -4}),
    "empty and null": Case(["", None, "   "], {"10.0.0.5": -4, "::1": -4, "0.0.0.0": -4}),
    "/0": Case(["0.0.0.0/0"], {"10.0.0.5": -4, "0.0.0.0": -4, "::ffff:10.0.0.5": -4}),
    "/0 with host bits": Case(["10.0.0.5/0"], {"10.0.0.5": -4, "10.0.0.6": -4}),
    "/0.0.0.0": Case(["0.0.0.0/0.0.0.0", "10.0.0.5/0.0.0.0"], {"10.0.0.5": -4, "0.0.0.0": -4}),
    "/00": Case(["0.0.0.0/00"], {"10.0.0.5": -4}),
    "::/0": Case(["::/0", "2001:db8::1/0"], {"2001:db8::1": -4, "::": -4, "10.0.0.5": -4}),
    # ::ffff:a.b.c.d is a.b.c.d, so this network is 0.0.0.0/0 in other words
    "/0, mapped": Case(["::ffff:0.0.0.0/96"], {"10.0.0.5": -4, "::ffff:10.0.0.5": -4}),
    "beside a real one": Case(
        ["any", "0.0.0.0/0", "10.0.0.0/8", None], {"10.0.0.5": 3, "11.0.0.5": -4}
    ),
    "many of them are no tie": Case(["any", "any", "10.0.0.5", "0.0.0.0/0"], {"10.0.0.5": 3}),
}

SPELLINGS = [
    "2001:db8::1",
    "2001:DB8::1",
    "2001:0db8::0001",
    "2001:db8:0:0:0:0:0:1",
    "2001:0db8:0000:0000:0000:0000:0000:0001",
    "2001:0DB8:0000:0000:0000:0000:0000:0001",
    "2001:db8:0::1",
    "2001:db8::0:1",
    "2001:db8:0:0::0:1",
    "2001:db8:0:0:0:0::1",
    "2001:db8::0.0.0.1",
    "2001:db8:0:0:0:0:0.0.0.1",
]
ONE_ZERO = {
    "1:2:3:4:5:6:7:0": ["1:2:3:4:5:6:7::", "1:2:3:4:5:6:7:0000", "1:2:3:4:5:6:0.7.0.0"],
    "1:0:3:4:5:6:7:8": ["1::3:4:5:6:7:8", "1:0000:3:4:5:6:7:8", "1::3:4:5:6:0.7.0.8"],
    "0:2:3:4:5:6:7:8": ["::2:3:4:5:6:7:8", "0000:2:3:4:5:6:7:8"],
    "1:0:0:4:0:0:7:8": ["1::4:0:0:7:8", "1:0:0:4::7:8", "1:0::4:0:0:7:8"],
    "64:ff9b::c000:221": ["64:ff9b::192.0.2.33", "64:FF9B::C000:0221"],
    "::": ["0:0:0:0:0:0:0:0", "0::", "::0", "0::0", "::0.0.0.0", "0000::"],
    "::1": ["0:0:0:0:0:0:0:1", "0::1", "::0001", "::0.0.0.1"],
    "1::": ["1:0:0:0:0:0:0:0", "0001::", "1::0", "1:0::0"],
    "::102:304": ["::1.2.3.4", "0::0102:0304"],
}
MAPPED = [
    "::ffff:10.0.0.5",
    "::FFFF:10.0.0.5",
    "::ffff:a00:5",
    "::FFFF:A00:5",
    "::ffff:0a00:0005",
    "0:0:0:0:0:ffff:10.0.0.5",
    "0000:0000:0000:0000:0000:ffff:0a00:0005",
    "0::ffff:10.0.0.5",
]

IPV6 = {
    "a network": Case(
        ["2001:db8::/32"], {"2001:db8::1": 1, "2001:DB8:FFFF::": 1, "2001:db9::1": -4}
    ),
    "longest prefix": Case(
        ["2001:db8::/32", "2001:db8:1::/48", "2001:db8:1::/64", "2000::/3"],
        {"2001:db8:1::1": 3, "2001:db8:1:1::1": 2, "2001:db8:2::1": 1, "3000::": 4, "4000::": -4},
    ),
    "a network in another spelling": Case(
        ["2001:0DB8:0000::/32", "2001:db8:0:1:0:0:0:0/64"],
        {"2001:db8:ffff::1": 1, "2001:db8:0:1::7": 2},
    ),
    "host bits": Case(
        ["2001:db8::5/64"], {"2001:db8::77": 1, "2001:db8::5": 1, "2001:db8:0:1::5": -4}
    ),
    "host bits in capitals": Case(["2001:DB8::F/64"], {"2001:db8::e": 1}),
    "off the groups": Case(["2001:db8:8000::/33"], {"2001:db8:8000::1": 1, "2001:db8:7fff::1": -4}),
    "/127": Case(["2001:db8::4/127"], {"2001:db8::4": 1, "2001:db8::5": 1, "2001:db8::6": -4}),
    "/1": Case(["8000::/1"], {"ffff::1": 1, "8000::": 1, "7fff::1": -4}),
    "/128 is single": Case(["2001:db8::1/128"], {"2001:DB8:0::1": 1, "2001:db8::2": -4}),
    "/128 in another spelling": Case(["2001:DB8:0::1/128"], {"2001:db8::1": 1}),
    "single beats network": Case(
        ["2001:db8::/126", "2001:db8::1"], {"2001:db8::1": 2, "2001:db8::2": 1}
    ),
    "no IPv4 among IPv6": Case(["a00::/8", "10.0.0.0/8"], {"a00::1": 1, "10.1.1.1": 2}),
    "compatible is not mapped": Case(["10.0.0.5"], {"::10.0.0.5": -4, "::a00:5": -4}),
    "::fffe: is not mapped": Case(["10.0.0.5"], {"::fffe:10.0.0.5": -4, "::ffff:0:10.0.0.5": -4}),
}
MAPPED_NETWORKS = {
    "asked mapped": Case(["10.0.0.0/24"], {"::ffff:10.0.0.5": 1, "::ffff:a00:105": -4}),
    "asked mapped, host bits": Case(["10.0.0.9/24"], {"::ffff:10.0.0.5": 1}),
    "stored mapped": Case(
        ["::ffff:10.0.0.0/120"], {"::ffff:10.0.0.5": 1, "10.0.0.5": 1, "10.0.1.5": -4}
    ),
    "stored mapped /128": Case(["::ffff:10.0.0.5/128"], {"10.0.0.5": 1, "10.0.0.6": -4}),
    "stored mapped in hexadecimal": Case(["::FFFF:A00:0/104"], {"10.200.0.5": 1, "11.0.0.5": -4}),
    "mapped and plain": Case(
        ["10.0.0.0/16", "::ffff:10.0.0.0/120"], {"10.0.0.5": 2, "10.0.1.5": 1}
    ),
    "plain and mapped": Case(
        ["10.0.0.0/24", "::ffff:10.0.0.0/112"], {"10.0.0.5": 1, "10.0.1.5": 2}
    ),
}

BROKEN = {
    "networks": Case(
        ["10.0.0.0/33", "10.0.0.0/", "10.0.0.0/8/8", "10.0.0.0/x", "10.0.0.0/-1", "10.0.0.0/16"],
        {"10.0.0.5": 6, "10.1.0.5": -4},
    ),
    "masks": Case(
        ["10.0.0.0/255.0.255.0", "10.0.0.0/0.0.0.255", "10.0.0.0/255.255.255", "10.0.0.0/16"],
        {"10.0.0.5": 4, "10.1.0.5": -4},
    ),
    "leading zeros": Case(
        ["010.0.0.5", "10.0.0.05", "010.0.0.0/24"], {"10.0.0.5": -4, "8.0.0.5": -4}
    ),
    "IPv6": Case(
        ["2001:db8::%1/64", ":::/8", "2001:db8::/129", "2001:db8::/ffff::", "2001:db8::/32"],
        {"2001:db8::1": 5, "2001:db9::1": -4},
    ),
    "words": Case(
        ["host.example", "10.0.0.5x", "10", "/", ":", "é/24", "10.0.0.0/24"], {"10.0.0.5": 7}
    ),
    "digits of other scripts": Case(["10.0.0.٥", "10.0.0.0/٢٤", "１０.0.0.0/24"], {"10.0.0.5": -4}),
}

TABLES = {
    "exact": EXACT,
    "networks": NETWORKS,
    "ties": TIES,
    "never": NEVER,
    "ipv6": IPV6,
    "mapped": MAPPED_NETWORKS,
    "broken": BROKEN,
}
CASES = [
    pytest.param(case, id=f"{table}: {name}")
    for table, cases in TABLES.items()
    for name, case in cases.items()
]


@pytest.mark.parametrize("case", CASES)
def test_the_table(ask: Caller, store: Store, case: Case) -> None:
    path = store(case.stored)
    for address, expected in case.requests.items():
        assert found(ask, path, address) == expected, address


def found(ask: Caller, path: Path, address: str) -> int:
    """Ask for ADDRESS: the row that comes back, or minus the error number."""
    answer = ask("ip", address, db=path)
    return int(answer.data["id"]) if answer.error == 0 else -int(answer.error)


@pytest.mark.parametrize("stored", SPELLINGS)
def test_ipv6_in_any_spelling(ask: Caller, store: Store, stored: str) -> None:
    path = store(["2001:db8::2", stored, "2001:db8::/64"])
    for asked in ("2001:db8::1", SPELLINGS[5], SPELLINGS[7]):
        answer = ask("ip", asked, db=path)
        assert answer.data.get("ip") == stored, asked


@pytest.mark.parametrize("asked", SPELLINGS)
def test_ipv6_asked_in_any_spelling(ask: Caller, store: Store, asked: str) -> None:
    path = store(["2001:db8::2", "2001:DB8:0:0::1", "2001:db8::1:0/112"])
    assert found(ask, path, asked) == 2


@pytest.mark.parametrize("address", ONE_ZERO)
def test_ipv6_with_short_runs_of_zeros(ask: Caller, store: Store, address: str) -> None:
    for stored in [address, *ONE_ZERO[address]]:
        path = store(["2001:db8::2", stored])
        for asked in (address, ONE_ZERO[address][0]):
            assert found(ask, path, asked) == 2, (stored, asked)
        Path(path).unlink()


@pytest.mark.parametrize("mapped", MAPPED)
def test_a_mapped_address_is_the_ipv4_address(ask: Caller, store: Store, mapped: str) -> None:
    path = store(["10.0.0.4", mapped, "10.0.0.0/24"])
    assert found(ask, path, "10.0.0.5") == 2
    assert found(ask, path, "::ffff:10.0.0.5") == 2
    Path(path).unlink()
    path = store(["10.0.0.4", "10.0.0.5", "10.0.0.0/24"])
    assert found(ask, path, mapped) == 2


def test_every_prefix_length(ask: Caller, store: Store) -> None:
    """All thirty-one networks around one address: each is found by what the next does not hold."""
    base = int(ipaddress.IPv4Address("10.170.85.102"))
    networks = [str(ipaddress.ip_network((base, size), strict=False)) for size in range(1, 32)]
    path = store([*networks, str(ipaddress.IPv4Address(base))])
    for size in range(1, 32):
        beside_the_next = ipaddress.IPv4Address(base ^ 1 << (31 - size))
        assert found(ask, path, str(beside_the_next)) == size, size
    assert found(ask, path, "10.170.85.102") == 32
    assert found(ask, path, "138.170.85.102") == -NOT_FOUND


def test_every_prefix_length_of_ipv6(ask: Caller, store: Store) -> None:
    base = int(ipaddress.IPv6Address("2001:db8:5aa5:c3:f00f:1234:5678:9abc"))
    networks = [str(ipaddress.ip_network((base, size), strict=False)) for size in range(1, 128)]
    path = store(networks)
    for size in (1, 3, 4, 16, 17, 31, 47, 63, 64, 65, 96, 97, 112, 126, 127):
        beside_the_next = ipaddress.IPv6Address(base ^ 1 << (127 - size))
        assert found(ask, path, str(beside_the_next)) == size, size


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_like_a_plain_search_through_random_rows(ask: Caller, store: Store, seed: int) -> None:
    """The reference is the rule itself, spelt out with `ipaddress` over all rows."""
    chance = random.Random(seed)
    rows = [random_row(chance) for _ in range(250)]
    path = store(rows)
    for _ in range(25):
        address = random_address(chance)
        assert found(ask, path, address) == reference(rows, address), (seed, address)


def random_address(chance: random.Random) -> str:
    """Give an address out of few, so that rows meet; now and then a mapped one."""
    if chance.random() < 0.25:
        low = chance.choice([0, 1, 7, 1 << 16, 1 << 64, 5 << 64, chance.getrandbits(20)])
        address = ipaddress.IPv6Address((0x20010DB8 << 96) + low)
        return chance.choice([str(address), address.exploded, str(address).upper()])
    text = "10.{}.{}.{}".format(*(chance.choice([0, 1, 2, 128, 255]) for _ in range(3)))
    return chance.choice(["", "", "", "", "", "", "::ffff:"]) + text


def random_row(chance: random.Random) -> str:
    """Give a stored value: single or network, host bits or none, prefix or netmask."""
    address = random_address(chance)
    if chance.random() < 0.4:
        return address
    bits = ipaddress.ip_address(address).max_prefixlen
    size = chance.randrange(97 if address.startswith("::ffff:") else 0, bits + 1)
    text = f"{address}/{size}"
    if chance.random() < 0.6:
        network = ipaddress.ip_network(text, strict=False)
        return network.with_netmask if bits == 32 and chance.random() < 0.3 else str(network)
    return text


def reference(rows: Sequence[str], asked: str) -> int:
    """Give the row that the rule picks for ASKED, or minus the error number."""
    address = plain(ipaddress.ip_network(asked))
    best: dict[int, list[int]] = {}
    for row, text in enumerate(rows, start=1):
        network = plain(ipaddress.ip_network(text, strict=False))
        same = network.version == address.version
        if same and network.prefixlen and address.network_address in network:
            best.setdefault(network.prefixlen, []).append(row)
    if not best:
        return -NOT_FOUND
    winners = best[max(best)]
    return winners[0] if len(winners) == 1 else -TWO


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def plain(network: Network) -> Network:
    """Give the IPv4 network that a mapped one stands for; any other as it is."""
    address = network.network_address
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return ipaddress.IPv4Network((int(address.ipv4_mapped), network.prefixlen - 96))
    return network


@pytest.mark.parametrize(
    ("stored", "answered"),
    [
        ("10.0.0.5/32", "10.0.0.5/32"),
        ("10.0.0.77/24", "10.0.0.77/24"),
        ("10.0.0.5/255.255.255.255", "10.0.0.5/32"),
        ("10.0.0.77/255.255.255.0", "10.0.0.77/24"),
        ("::FFFF:10.0.0.5", "::FFFF:10.0.0.5"),
    ],
)
def test_the_address_is_answered_as_stored(
    ask: Caller, store: Store, stored: str, answered: str
) -> None:
    assert ask("ip", "10.0.0.5", db=store([stored])).data["ip"] == answered


def test_the_best_match_is_taken_though_its_record_is_broken(ask: Caller, stores: Stores) -> None:
    """An invalid best match must not let a worse one through in its place."""
    rows = [Record("001", "good", "10.0.0.0/8"), Record("002", "not good", "10.0.0.0/24")]
    for path in (stores.indexed(rows), stores.csv(rows)):
        assert ask("ip", "10.0.0.5", db=path).error == 6
        assert found(ask, path, "10.1.0.5") == 1
