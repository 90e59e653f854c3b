"""The answer itself: what the words may be, the texts to the letter, and the record rules."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from conftest import KEY, PLAIN_SCHEMA, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores
from manager import Answer

SECRET = "TheSecretKeyThatNoMessageMayShow"
TOO_FEW = '{"error": 1, "message": "Too few arguments"}\n'
BAD = '{"error": 3, "message": "Bad arguments given"}\n'
NOT_FOUND = '{"error": 4, "message": "No agent key found"}\n'
TWO_IDS = '{"error": 5, "message": "Found more than one match for required id"}\n'
TWO_IPS = '{"error": 5, "message": "Found more than one match for required ip"}\n'


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize(
    "words",
    [[], ["id"], ["ip"], ["id", ""], ["ip", ""], [""], ["", "001"]],
    ids=repr,
)
def test_too_few_arguments(ask: Caller, stores: Stores, words: list[str]) -> None:
    assert ask(*words, db=stores.sqlite()).output.decode() == TOO_FEW


def test_too_few_arguments_without_any_option(ask: Caller) -> None:
    assert ask().output.decode() == TOO_FEW


@pytest.mark.parametrize(
    "words",
    [
        ["error1", "id", "003"],  # the vendor's own test
        ["foo"],
        ["foo", "001"],
        ["ID", "001"],
        ["Ip", "192.168.1.100"],
        ["id:001"],
        ["id ", "001"],
        ["key", "001"],
        ["name", "my_agent"],
        ["--foo"],
        ["--foo", "id", "001"],
        ["-x", "id", "001"],
        ["--id", "001"],
        ["001", "id"],
        ["i", "001"],
        ["ıd", "001"],
        ["id\n", "001"],
    ],
    ids=repr,
)
def test_any_other_option_is_bad(ask: Caller, stores: Stores, words: list[str]) -> None:
    assert ask(*words, db=stores.sqlite()).output.decode() == BAD


@pytest.mark.parametrize(
    "words",
    [
        ["id", "001", "extra"],
        ["id", "001", ""],
        ["id", "001", "id", "001"],
        ["id", "001", "--db", "x"],
        ["id", "001", "--version"],
        ["ip", "192.168.1.100", "extra"],
    ],
    ids=repr,
)
def test_more_than_option_and_value_is_bad(ask: Caller, stores: Stores, words: list[str]) -> None:
    assert_bad_with_reason(ask(*words, db=stores.sqlite()))


BAD_IDS = [
    *("1", "01", "123456789", "0000000001", "abc", "00a", "0x1", "1e2", "1_0", "0.1", "-01", "+01"),
    *("001 ", " 001", "001\n", "\n001", "001\r", "001\t", "0 1", "'001'", "001'--", "001;", "%31"),
    *("٠٠١", "00٣", "00²", "００１", "00१", "00①", "001\u00a0", "001\u2003", "00\u0661"),
    *("*", "%", "_01", "00_", "any", "NULL", "-1000", "--help"),
]


@pytest.mark.parametrize("value", BAD_IDS, ids=ascii)
def test_an_id_is_3_to_8_ascii_digits(ask: Caller, stores: Stores, value: str) -> None:
    rows = [Record(), Record(id=value.strip()), Record(id=1)]
    assert_bad_with_reason(ask("id", value, db=stores.sqlite(rows, UNTYPED_SCHEMA)))


BAD_ADDRESSES = [
    *("any", "ANY", "localhost", "my_agent", "10.0.0.0/8", "10.0.0", "10.0.0.1.2", "10.0.0.256"),
    *("10.0.0.5 ", " 10.0.0.5", "10.0.0.5\n", "10.0.0.5\r\n", "10.0.0.-5", "10.0.0.+5", "10..0.5"),
    *("010.0.0.5", "10.0.0.05", "10.0.0.00", "0x0a.0.0.5", "167772165", "10.5", "10.0.0.5:1514"),
    *("10.0.0.٥", "１０.0.0.5", "10.0.0.²", "10。0。0。5", "10.0.0.1e1", "10.0.0.1_0", "10.0.0.%"),
    *(":", ":::", "1::2::3", "12345::", "g::", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "[::1]"),
    *("1:2:3:4:5:6:7::8", ":1:2:3:4:5:6:7", "1:2:3:4:5:6:7:", "::ffff:10.0.0", "::10.0.0.256"),
    *("::1%eth0", "fe80::1%1", "::1\n", "::٣", "::1/128", "10.0.0.5::", "::10.0.0.5:1", "::-1"),
    *("::ffff:010.0.0.5", "::0x1", "::00001", "'10.0.0.5'", "--help"),
]


@pytest.mark.parametrize("value", BAD_ADDRESSES, ids=ascii)
def test_an_ip_is_an_address(ask: Caller, stores: Stores, value: str) -> None:
    rows = [Record(ip=value), Record(id="002", ip="10.0.0.5"), Record(id="003", ip="10.0.0.0/8")]
    assert_bad_with_reason(ask("ip", value, db=stores.sqlite(rows)))


@pytest.mark.parametrize(
    "words",
    [
        ["--db"],
        ["--db", ""],
        ["--db="],
        ["--timeout"],
        ["--timeout", "abc", "id", "001"],
        ["--timeout", "-1", "id", "001"],
        ["--timeout", "nan", "id", "001"],
        ["--timeout", "", "id", "001"],
    ],
    ids=repr,
)
def test_an_option_without_a_usable_value(ask: Caller, words: list[str]) -> None:
    assert ask(*words).error in (1, 3)


@pytest.mark.parametrize("timeout", ["inf", "1e999", "99999999999999999999"])
def test_an_endless_timeout_is_no_failure(ask: Caller, stores: Stores, timeout: str) -> None:
    answer = ask("--timeout", timeout, "id", "001", db=stores.sqlite())
    assert answer.error in (0, 3)


def test_bytes_of_any_kind_as_words_get_an_answer(ask: Caller, stores: Stores) -> None:
    """Whatever the words hold, one line comes back: the reason must not repeat them raw."""
    path = stores.sqlite()
    chance = random.Random(2)
    for length in (1, 3, 8, 19, 40, 100_000):
        value = bytes(chance.randrange(1, 256) for _ in range(length))
        for words in ([b"id", value], [b"ip", value], [value, b"001"]):
            assert ask(*words, db=path).error == 3, words


def assert_bad_with_reason(answer: Answer) -> None:
    """Assert error 3 with a reason after the vendor's text."""
    assert answer.error == 3
    assert answer.message.startswith("Bad arguments given: ")
    assert len(answer.message) > len("Bad arguments given: ")


# ---------------------------------------------------------------- bytes to the letter


def test_found_to_the_byte(ask: Caller, stores: Stores) -> None:
    expected = (
        '{"error": 0, "data": {"id": "001", "name": "my_agent", "ip": "192.168.1.100",'
        f' "key": "{KEY}"}}}}\n'
    )
    path = stores.sqlite()
    assert ask("id", "001", db=path).output.decode() == expected
    assert ask("ip", "192.168.1.100", db=path).output.decode() == expected


@pytest.mark.parametrize("words", [["id", "003"], ["ip", "192.168.1.1"]], ids=repr)
def test_not_found_to_the_byte(ask: Caller, stores: Stores, words: list[str]) -> None:
    assert ask(*words, db=stores.sqlite()).output.decode() == NOT_FOUND


def test_not_found_in_an_empty_table(ask: Caller, stores: Stores) -> None:
    assert ask("id", "001", db=stores.sqlite([])).output.decode() == NOT_FOUND


def test_two_matches_to_the_byte(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite([Record(), Record(name="other")])
    assert ask("id", "001", db=path).output.decode() == TWO_IDS
    assert ask("ip", "192.168.1.100", db=path).output.decode() == TWO_IPS


def test_two_rows_that_are_the_same_are_two(ask: Caller, stores: Stores) -> None:
    assert ask("id", "001", db=stores.sqlite([Record(), Record()])).error == 5


@pytest.mark.parametrize(
    "key",
    ['a"b', "a\\b", "\\", '"', "a/b", "<&>'", "{}", "\\u0041", "\\n", "a b  c", "~!@#$%^&*()"],
)
def test_json_escapes_to_the_byte(ask: Caller, stores: Stores, key: str) -> None:
    expected = {"error": 0, "data": Record(key=key)._asdict()}
    answer = ask("id", "001", db=stores.sqlite([Record(key=key)]))
    assert answer.output.decode() == json.dumps(expected) + "\n"


def test_options_come_before_the_words(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite()
    assert ask("--db", path, "--timeout", "5", "id", "001").error == 0
    assert ask(f"--db={path}", "--timeout=5", "id", "001").error == 0
    assert ask("--timeout", "0.9", "--db", path, "id", "001").error == 0


# ---------------------------------------------------------------- ids as they are stored


@pytest.mark.parametrize(
    ("stored", "asked", "error"),
    [
        ("001", "001", 0),
        ("12345678", "12345678", 0),
        ("0001", "0001", 0),
        ("0001", "001", 4),
        ("001", "0001", 4),
        ("1", "001", 4),  # text in a database stands as it is
        ("001     ", "001", 0),  # a CHAR(8) column
        (" 001", "001", 0),
        (b"001", "001", 0),
        (b"001     ", "001", 0),
        (1, "001", 0),
        (1, "0001", 4),
        (12, "012", 0),
        (123, "123", 0),
        (1234, "1234", 0),
        (12345678, "12345678", 0),
        (123456789, "12345678", 4),
        (1.5, "001", 4),
        (-1, "001", 4),
        (None, "001", 4),
        ("", "001", 4),
        (b"\xff", "001", 4),
        ("001\n", "001", 4),
        ("٠٠١", "001", 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("index", [False, True], ids=["bare", "index"])
def test_an_id_request_matches(
    ask: Caller, stores: Stores, stored: Any, asked: str, error: int, index: bool
) -> None:
    schema = UNTYPED_SCHEMA + (";CREATE INDEX agent_id ON agent (id)" if index else "")
    rows = [Record(id=stored), Record(id="777", ip="any")]
    answer = ask("id", asked, db=stores.sqlite(rows, schema))
    assert answer.error == error
    assert answer.data.get("id", asked) == asked


@pytest.mark.parametrize("column", ["INTEGER", "REAL", "NUMERIC", "BLOB", "char(8)", ""])
@pytest.mark.parametrize("primary", ["", " PRIMARY KEY"])
def test_an_id_column_of_numbers(ask: Caller, stores: Stores, column: str, primary: str) -> None:
    schema = UNTYPED_SCHEMA.replace("id,", f"id {column}{primary},")
    numbers = column not in ("char(8)",)
    rows = [Record(id=1 if numbers else "001"), Record(id=20 if numbers else "020", ip="any")]
    path = stores.sqlite(rows, schema)
    for request in (["id", "001"], ["ip", "192.168.1.100"]):
        assert ask(*request, db=path).data.get("id") == "001", request
    assert ask("id", "020", db=path).data.get("id") == "020"


@pytest.mark.parametrize(
    "twins",
    [("001", 1), ("001", b"001"), ("001", "001 "), (1, b"001"), (" 001", "001"), (1, 1)],
    ids=repr,
)
def test_one_id_written_in_two_ways_is_two_matches(
    ask: Caller, stores: Stores, twins: tuple[Any, Any]
) -> None:
    rows = [Record(id=stored, ip="any") for stored in twins]
    answer = ask("id", "001", db=stores.sqlite(rows, UNTYPED_SCHEMA))
    assert answer.output.decode() == TWO_IDS


@pytest.mark.parametrize(
    "stored",
    ["000", 0, "00²", "٠٠١", "abc", "1", "01", "123456789", 123456789, -1, "", None, b"\xff", "0 1"]
    + ["001\n", "001\x00", "+01", 1.5, 1e300, float("inf"), "001\u00a0", 2**63 - 1],
    ids=ascii,
)
def test_a_stored_id_that_breaks_the_rule(ask: Caller, stores: Stores, stored: Any) -> None:
    rows = [Record(id=stored, key=SECRET), Record(id="002", ip="10.0.0.2")]
    path = stores.sqlite(rows, UNTYPED_SCHEMA)
    assert_invalid(ask("ip", "192.168.1.100", db=path), "id")
    assert ask("ip", "10.0.0.2", db=path).error == 0


@pytest.mark.parametrize("stored", ["000", 0])
def test_the_manager_itself_is_never_answered(ask: Caller, stores: Stores, stored: Any) -> None:
    path = stores.sqlite([Record(id=stored)], UNTYPED_SCHEMA)
    assert ask("id", "000", db=path).error in (3, 4, 6)


# ---------------------------------------------------------------- names

GOOD_NAMES = ["a", "7", "A-Z_a.z-09", "_", ".", "-", "n" * 127, "n" * 128]
BAD_NAMES = [
    *("", " ", "n" * 129, "my agent", "my\tagent", "agent\n", "\nagent", "agent\r", "\tagent"),
    *("!my_agent", "#my_agent", "a/b", "a\\b", "a,b", "a:b", "a@b", 'a"b', "a'b", "a~", "a\x7f"),
    *("é", "ａgent", "agent٣", "agent²", "agentß", "ıd", "\u212aelvin", "\u017f", "agent\u00a0"),
    *("\u2003agent", "agent\u200b", "\x00", "agent\x00", "agent\x0b", "\x1cagent", "agent\x85"),
    *("n" * 64 + "é" * 32, "n" * 128 + "\n", "a\n002 evil any key"),
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_good_name(ask: Caller, stores: Stores, name: str) -> None:
    assert ask("id", "001", db=stores.sqlite([Record(name=name)])).data["name"] == name


@pytest.mark.parametrize("name", [*BAD_NAMES, None, b"\xff", b"agent\n", b""], ids=ascii)
def test_a_name_that_breaks_the_rule(ask: Caller, stores: Stores, name: Any) -> None:
    path = stores.sqlite([Record(name=name, key=SECRET)], UNTYPED_SCHEMA)
    assert_invalid(ask("id", "001", db=path), "name", "001")
    assert_invalid(ask("ip", "192.168.1.100", db=path), "name", "001")


# ---------------------------------------------------------------- addresses as stored

GOOD_IPS = [
    ("192.168.1.100", "192.168.1.100"),
    ("192.168.1.100/32", "192.168.1.100/32"),
    ("10.0.0.0/8", "10.0.0.0/8"),
    ("10.0.0.5/24", "10.0.0.5/24"),
    ("0.0.0.0/0", "0.0.0.0/0"),
    ("2001:db8::1", "2001:db8::1"),
    ("2001:DB8:0:0::1", "2001:DB8:0:0::1"),
    ("2001:db8::/32", "2001:db8::/32"),
    ("2001:db8::5/64", "2001:db8::5/64"),
    ("2001:db8::1/128", "2001:db8::1/128"),
    ("::", "::"),
    ("::/0", "::/0"),
    ("::ffff:10.0.0.5", "::ffff:10.0.0.5"),
    ("1:2:3:4:5:6:7::", "1:2:3:4:5:6:7::"),
    ("any", "any"),
    ("ANY", "any"),
    ("Any", "any"),
    ("", "any"),
    (None, "any"),
    ("    ", "any"),
    (" any ", "any"),
    (b"any", "any"),
    (b"", "any"),
    ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
    ("10.0.0.5/255.255.255.0", "10.0.0.5/24"),
    ("10.0.0.5/255.255.255.255", "10.0.0.5/32"),
    ("10.0.0.0/255.255.240.0", "10.0.0.0/20"),
    ("0.0.0.0/0.0.0.0", "0.0.0.0/0"),
    ("10.0.0.5      ", "10.0.0.5"),
    ("  10.0.0.0/8", "10.0.0.0/8"),
    (b"10.0.0.5", "10.0.0.5"),
]
BAD_IPS = [
    *("host.example", "my_agent", "10.0.0", "10.0.0.256", "10.0.0.5.6", "010.0.0.5", "10.0.0.05"),
    *("10.0.0.5/33", "10.0.0.5/", "/24", "/", "10.0.0.5/-1", "10.0.0.5/+8", "10.0.0.5/ 8"),
    *("10.0.0.5 /8", "10.0.0.5/8/8", "10.0.0.5/1e1", "10.0.0.5/٢٤", "10.0.0.5/²", "10.0.0.5/2_4"),
    *("10.0.0.5/255.0.255.0", "10.0.0.5/0.255.255.255", "10.0.0.5/0.0.0.255", "10.0.0.5/255.255"),
    *("10.0.0.5/255.255.255.256", "10.0.0.5/::", "10.0.0.5/x", "10.0.0.5/\n8", "10.0.0.5/8\n"),
    *("10.0.0.5\n", "\n10.0.0.5", "10.0.0.5\t", "10.0.0.5\x00", "10.0.0.5\u00a0", "10.0.0.٥"),
    *("10.0.0.5,10.0.0.6", "10.0.0.5-10.0.0.9", "10.0.0.*", "!10.0.0.5", "10.0.0.5:1514", "%"),
    *("2001:db8::/129", "2001:db8::/255.0.0.0", "2001:db8::/ffff::", "2001:db8::1%eth0", ":::"),
    *("1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7", "1::2::3", "[::1]", "::ffff:10.0.0.256", "ａny"),
    *("anyone", "none", "null", "any\n", "an y", "０.0.0.0"),
]


@pytest.mark.parametrize(("stored", "answered"), GOOD_IPS, ids=ascii)
def test_a_good_ip(ask: Caller, stores: Stores, stored: Any, answered: str) -> None:
    path = stores.sqlite([Record(ip=stored)], UNTYPED_SCHEMA)
    assert ask("id", "001", db=path).data["ip"] == answered


@pytest.mark.parametrize("stored", [*BAD_IPS, b"\xff", b"10.0.0.5\n", 42, 4.5], ids=ascii)
def test_an_ip_that_breaks_the_rule(ask: Caller, stores: Stores, stored: Any) -> None:
    path = stores.sqlite([Record(ip=stored, key=SECRET)], UNTYPED_SCHEMA)
    assert_invalid(ask("id", "001", db=path), "ip", "001")
    assert ask("ip", "10.0.0.5", db=path).error in (4, 6)


# ---------------------------------------------------------------- keys

GOOD_KEYS = ["k", "0" * 64, "k" * 127, "k" * 128, "a b", "a  b", "".join(map(chr, range(33, 127)))]
BAD_KEYS = [
    *("", " ", "k" * 129, "key\n", "\nkey", "key\r", "a\tb", "\tkey", "key\x7f", "key\x00", "\x00"),
    *(
        "ké",
        "kéy" * 42,
        "key\u00a0",
        "\u2003key",
        "key\x85",
        "key\x1f",
        "key\x80",
        "٣" * 64,
        "ｋey",
    ),
    *("key\u200b", "k" * 128 + "\n", "key\n002 evil any key"),
]


@pytest.mark.parametrize("key", GOOD_KEYS)
def test_a_good_key(ask: Caller, stores: Stores, key: str) -> None:
    assert ask("id", "001", db=stores.sqlite([Record(key=key)])).data["key"] == key


@pytest.mark.parametrize("key", [*BAD_KEYS, None, b"\xff", b"key\n", b"k" * 129], ids=ascii)
def test_a_key_that_breaks_the_rule(ask: Caller, stores: Stores, key: Any) -> None:
    path = stores.sqlite([Record(key=key)], UNTYPED_SCHEMA)
    answer = ask("id", "001", db=path)
    assert_invalid(answer, "key", "001")
    text = key.decode("latin-1") if isinstance(key, bytes) else key or ""
    for piece in (text.strip(), ascii(text)[1:-1], text[:64]):
        assert len(piece) < 4 or piece not in answer.message


# ---------------------------------------------------------------- padding, BLOBs, numbers


def test_padding_is_dropped(ask: Caller, stores: Stores) -> None:
    padded = Record(*(f" {field}{' ' * 150}" for field in Record()))
    path = stores.sqlite([padded])
    assert ask("id", "001", db=path).data == Record()._asdict()
    assert ask("ip", "192.168.1.100", db=path).data == Record()._asdict()


def test_padding_does_not_count_for_the_length(ask: Caller, stores: Stores) -> None:
    long = Record(name="n" * 128, key="k" * 128)
    path = stores.sqlite([Record(*(f"{field}    " for field in long))])
    assert ask("id", "001", db=path).data == long._asdict()


@pytest.mark.parametrize("schema", [UNTYPED_SCHEMA, PLAIN_SCHEMA], ids=["untyped", "varchar"])
def test_blobs_count_as_text(ask: Caller, stores: Stores, schema: str) -> None:
    path = stores.sqlite([Record(*(field.encode() for field in Record()))], schema)
    assert ask("id", "001", db=path).data == Record()._asdict()
    assert ask("ip", "192.168.1.100", db=path).data == Record()._asdict()


@pytest.mark.parametrize("field", ["name", "key"])
@pytest.mark.parametrize("number", [42, 1.5, 2**62, -1, float("inf")], ids=repr)
def test_a_number_never_reaches_the_manager(
    ask: Caller, stores: Stores, field: str, number: float
) -> None:
    """Answered as a string or refused: as a number it would crash authd (`check_answer`)."""
    path = stores.sqlite([Record()._replace(**{field: number})], UNTYPED_SCHEMA)
    assert ask("id", "001", db=path).error in (0, 6)


def test_numbers_in_a_text_column_are_text(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite([Record(name=42, key=123456)])
    assert ask("id", "001", db=path).data == Record(name="42", key="123456")._asdict()


def test_text_that_is_no_utf8_is_an_invalid_record(ask: Caller, stores: Stores) -> None:
    """SQLite stores any bytes as text: reading them must not be an internal error."""
    schema = PLAIN_SCHEMA + ";INSERT INTO agent VALUES ('002', CAST(x'ff61' AS TEXT), 'any', 'k')"
    path = stores.sqlite([Record()], schema)
    assert_invalid(ask("id", "002", db=path), "name", "002")
    assert ask("id", "001", db=path).error == 0


def test_a_huge_value_is_an_invalid_record(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite([Record(key="k" * 5_000_000), Record(id="002", name="n" * 5_000_000)])
    answer = ask("id", "001", db=path)
    assert_invalid(answer, "key", "001")
    assert len(answer.output) < 1000
    assert_invalid(ask("id", "002", db=path), "name", "002")


@pytest.mark.parametrize(
    "broken",
    [
        Record(id="002", name="a b"),
        Record(id="002", ip="10.0.0.5/99"),
        Record(id="002", ip="nonsense"),
        Record(id="002", key=""),
        Record(id="002", key=None),
        Record(id="٠٠٢", ip="10.0.0.5"),
        Record(id=None, name=None, ip=b"\xff", key=b"\xff"),
    ],
    ids=ascii,
)
def test_other_broken_records_do_not_matter(ask: Caller, stores: Stores, broken: Record) -> None:
    rows = [broken, Record(ip="10.1.1.1"), Record(id="003", ip="10.9.0.0/16"), broken]
    path = stores.sqlite(rows, UNTYPED_SCHEMA)
    assert ask("id", "001", db=path).data["id"] == "001"
    assert ask("ip", "10.1.1.1", db=path).data["id"] == "001"
    assert ask("ip", "10.9.1.1", db=path).data["id"] == "003"
    assert ask("ip", "10.2.2.2", db=path).error == 4
    assert ask("id", "004", db=path).error == 4


def assert_invalid(answer: Answer, field: str, agent_id: str | None = None) -> None:
    """Assert error 6 that names FIELD and AGENT_ID, says more than that, and shows no key."""
    assert answer.error == 6, answer
    assert answer.message.startswith("Stored record is invalid: ")
    assert SECRET not in answer.message
    reason = answer.message.partition(": ")[2]
    words = reason.replace(":", " ").replace(",", " ").split()
    assert field in words, reason
    assert agent_id is None or agent_id in words, reason
    assert len(words) > 3, reason


# ---------------------------------------------------------------- the sample


def test_the_sample_answers_at_once(ask: Caller) -> None:
    by_id = ask("id", "001", db=SAMPLE)
    assert by_id.data["name"] == "my_agent"
    assert by_id.data["ip"] == "192.168.1.100"
    assert by_id.data["key"].startswith("ac57") and by_id.data["key"].endswith("0c71")
    assert ask("ip", "192.168.1.100", db=SAMPLE).output == by_id.output
