"""CSV, as spreadsheets write it, and tabs, as `mysql --batch` writes them."""

from __future__ import annotations

import pytest
from conftest import KEY, Record, Stores, script
from sources import DATA, PATIENCE, ROW, SECRET, look, refuses, serves

CSVS = {
    "agent_key": f"id,name,ip,agent_key\n{ROW}\n",
    "capitals": f"Id,NAME,IP,Agent_Key\n{ROW}\n",
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
    "rows of semicolons at the end": f"id;name;ip;key\n{ROW}\n;;;\n;;;\n".replace(",", ";"),
    "empty rows of tabs": f"id\tname\tip\tkey\n{ROW}\n\t\t\t\n".replace(",", "\t"),
    "empty rows of quotes": f'id,name,ip,key\n{ROW}\n"","","",""\n',
    "address": f"id,name,address,key\n{ROW}\n",
    "register_ip": f"ID,Name,Register_IP,Key\n{ROW}\n",
    "registerIP": f"id,name,registerIP,key\n{ROW}\n",
    "internal_key": f"id,name,ip,internal_key\n{ROW}\n",
    "INTERNAL_KEY and others": f"zone,id,name,ip,INTERNAL_KEY,keys\nx,{ROW},y\n",
    "an id of a spreadsheet": f"id,name,ip,key\n1.0,{ROW[4:]}\n",
    "sep=;": f"sep=;\nid;name;ip;key\n{ROW}\n".replace(",", ";"),
    "sep=, and CRLF": f"sep=,\r\nid,name,ip,key\r\n{ROW}\r\n",
    "sep= and a tab": f"sep=,\nid,name,ip,key\n{ROW}\n".replace(",", "\t"),
    "SEP=; and BOM": f"\ufeffSEP=;\nid;name;ip;key\n{ROW}\n".replace(",", ";"),
    "sep=| which settles what no header could": f"sep=|\nid|name|ip|key\n{ROW}\n".replace(",", "|"),
}
DELIMITERS = {
    "many semicolons in a column of the header": f'id,name,ip,key,"a;b;c;d;e;f;g"\n{ROW},1\n',
    "commas in a column of the header": f'"a, b",id,name,ip,key,note\n1,{ROW},2\n',
    "a key that is another's": f'id,name,ip,"a, b",key,x\n001,my_agent,192.168.1.100,1,{KEY},2\n',
    "quotes in a column of the header": f'"a ""b"", c",id,name,ip,key,x\n1,{ROW},2\n',
}

MISSING = {  # a header, the field that it lacks, and a name that would do
    "name,ip,key,other": "id",
    "id,ip,key,other": "name",
    "id,name,key,other": "ip",
    "id,name,ip,other": "key",
    "id,name,Street,Agent_Key": "ip",
    "id;name;ip;password": "key",
    "id": "name",
}
TWO_NAMES = {  # a header with two names for one field, and these names
    "id,name,ip,key,key": ["key"],
    "id,name,ip,key,id": ["id"],
    "id,ID,name,ip,key": ["id"],
    "id,name,ip,key,agent_key": ["key", "agent_key"],
    "id,name,ip,internal_key,Key": ["internal_key", "key"],
    "id,name,address,register_ip,key": ["address", "register_ip"],
    "id,name,registerIP,register_ip,key": ["register"],
}
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
    "carriage return in quotes": b'002,"a\rb",any,k\n',
    "carriage return at the end of a field": b"002,a\r,any,k\r\r\n",
    "quote within": b'002,a"b,any,k\n',
    "line separator": "002,a\u2028b,any,k\n".encode(),
    "next line": "002,a\u0085b,any,k\n".encode(),
    "form feed": b"002,a\x0cb,any,k\n",
    "file separator": b"002,a\x1cb,any,k\n",
    "NUL": b"002,a\0,any,k\n",
    "NUL that nobody reads": b"002,a,any,k,\0\n",
    "NULs": b"\0\0\0\n",
    "backslash": b"002,a\\,any,k\n",
}
STARTS = {  # before the header, and the number of the line that comes after it
    "": 2,
    "\ufeff": 2,
    "\n\n": 4,
    "# a comment\n": 3,
    "\r\n# a\r\n\r\n": 5,
    "\ufeff\n# a comment, with\n \n": 5,
    "sep=,\n": 3,
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
    "text after the quotes": f'9,"a"{SECRET},any,k',
}
BATCH = {  # a row that `mysql --batch` wrote, and its key; None for a fault
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
    **{f"0{n}\tn\tany\ta\\{letter}b": None for n, letter in zip((22, 23, 24), "tn0", strict=True)},
}


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize("header", MISSING)
def test_csv_without_a_column(stores: Stores, header: str) -> None:
    """The message names what is missing, and the columns that were found."""
    for name in ("agents.csv", "client.keys"):
        reason = refuses(stores.text(f"{header}\n{SECRET},{SECRET}\n", name)).lower()
        for column in (MISSING[header], *header.lower().replace(";", ",").split(",")):
            assert column in reason, reason


@pytest.mark.parametrize("header", TWO_NAMES)
def test_csv_with_two_names_for_one_field(stores: Stores, header: str) -> None:
    """Which of them is meant? A wrong key would be worse than none."""
    reason = refuses(stores.text(f"{header}\n{ROW},{ROW}\n", "agents.csv")).lower()
    for name in TWO_NAMES[header]:
        assert name in reason, reason


def test_csv_of_a_managers_global_db(stores: Stores) -> None:
    """`ip` is the address last seen there, and never the agent's."""
    text = f"id,name,ip,register_ip,internal_key\n001,my_agent,10.9.9.9,192.168.1.100,{KEY}\n"
    path = stores.text(text, "global.csv")
    content = look(path, "id", "001")
    assert content["error"] == 2 or content["data"] == DATA
    assert look(path, "ip", "10.9.9.9")["error"] in (2, 4)


@pytest.mark.parametrize(
    "row", [f"001,id,any,{SECRET}", f"001;key;any;{SECRET}", f"id,ip,any,{SECRET}"]
)
def test_a_row_with_the_word_of_a_header(stores: Stores, row: str) -> None:
    """An agent may be named `id`. What stands beside that word is stored text, and not shown."""
    path = stores.text(f"{row}\n{row}\n", "agents.csv")
    look(path, "id", "001")
    look(path, "ip", "10.0.0.5")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_an_empty_row_is_no_agent(stores: Stores, delimiter: str) -> None:
    """Spreadsheets write such rows below the table. A row with anything in it is a record."""
    lines = ["id,name,ip,key", ",,,", ROW, ",,,", ",,,,,", '"","","",""', ",,any,", ",,,"]
    path = stores.text("".join(f"{line}\n" for line in lines).replace(",", delimiter), "a.csv")
    source = script.open_source(str(path), PATIENCE)
    assert [number for number, _ in source.rows()] == [3, 7]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("content", CSVS.values(), ids=CSVS)
def test_csv(stores: Stores, content: str) -> None:
    assert serves(stores.text(content, "agents.csv"))


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
    for header in ("id,name,ip,key\r\n", "id,name,ip,key\n", "\ufeffid;name;ip;key\r\n"):
        path = stores.text(header, "agents.csv")
        assert look(path, "id", "001")["error"] == look(path, "ip", "10.0.0.5")["error"] == 4


@pytest.mark.parametrize(
    ("stored", "asked", "error"),
    [
        *(("1", "001", 0), ("01", "001", 0), ("12", "012", 0), ("12345678", "12345678", 0)),
        *(("0001", "001", 4), ("0001", "0001", 6), ("1", "0001", 4), ("1234", "1234", 0)),
        *(
            ("1.0", "001", 0),
            ("12.0", "012", 0),
            ("1.0", "0001", 4),
            ("1.5", "001", 4),
            ("+1", "001", 4),
            ("١", "001", 4),
            ("²", "002", 4),
            (" 1", "001", 4),
        ),
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


@pytest.mark.parametrize("row", HARMLESS.values(), ids=HARMLESS)
def test_csv_with_another_broken_row(stores: Stores, row: bytes) -> None:
    good = ROW.encode() + b"\n"
    for content in (row + good, good + row, row + good + row):
        assert serves(stores.text(b"id,name,ip,key\n" + content, "agents.csv"))


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
                    assert "quote" in reason and "spans lines" in reason


def test_a_footer_of_psql(stores: Stores) -> None:
    """It is a fault that says what to do, unlike any other line that is too short."""
    for footer, is_one in (
        ("(1 row)", True),
        ("(20 rows)", True),
        ("2 rows)", False),
        ("(2", False),
    ):
        path = stores.text(f"id,name,ip,key\n{ROW}\n{footer}\n", "agents.csv")
        assert serves(path)
        *_, (_, row) = script.open_source(str(path), PATIENCE).rows()
        told = [fault.text for fault in script.judge(row)[1]]
        assert any("psql" in text for text in told) == is_one, told


def test_csv_quotes_in_sound_rows(stores: Stores) -> None:
    path = stores.text(f'id,name,ip,key,note\n{ROW},"a ""b"", c"\n2,n,any,k,""\n', "agents.csv")
    assert serves(path)
    assert look(path, "id", "002")["error"] == 0


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_row_with_more_fields_than_the_header(stores: Stores, delimiter: str) -> None:
    """A key with a delimiter in it would be cut; the others are found."""
    rows = [["id", "name", "ip", "key"], ["002", "a", "any", "ab", "cd"], ROW.split(",")]
    path = stores.text("".join(delimiter.join(row) + "\n" for row in rows), "agents.csv")
    assert look(path, "id", "002")["error"] == 6
    assert serves(path)


# ---------------------------------------------------------------- tabs, as mysql --batch writes


def test_tabs_as_mysql_batch_writes_them(stores: Stores) -> None:
    path = stores.text("id\tname\tip\tagent_key\n" + "\n".join(BATCH) + "\n", "batch.tsv")
    for number, (row, key) in enumerate(BATCH.items(), 1):
        content = look(path, "id", f"{number:03}")
        assert content["error"] == (0 if key else 6), row
        assert not key or content["data"]["key"] == key, row
    assert look(path, "id", "001")["data"]["ip"] == look(path, "id", "008")["data"]["ip"] == "any"
    assert look(path, "ip", "10.0.0.5")["data"]["id"] == "005"
    assert look(path, "ip", "10.0.0.20")["data"]["id"] == "020"


def test_a_nul_is_a_fault_of_its_record(stores: Stores) -> None:
    """In every version of Python; the module csv does not take it before 3.11."""
    for delimiter in "\t", ",":
        text = f"id,name,ip,key\n2,n,any,k\n9,{SECRET}\0,any,k\n8,n,any,k\0\n"
        path = stores.text(text.replace(",", delimiter), "agents.csv")
        assert [look(path, "id", f"00{n}")["error"] for n in (2, 8, 9)] == [0, 6, 6]


def test_quotes_mean_nothing_to_mysql_batch(stores: Stores) -> None:
    """An open quote swallows nothing there."""
    path = stores.text(f'id\tname\tip\tkey\n2\t"n\tany\tk\n{ROW}\n'.replace(",", "\t"), "batch.tsv")
    assert serves(path)
