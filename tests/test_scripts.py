"""SQL scripts: each statement is run as it stands, or the script is refused as a whole."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from conftest import KEY, SAMPLE, UNTYPED_SCHEMA, Caller, Record, Stores
from manager import check_line
from sources import DATA, LACKS, LATE, SECRET, look, measure, refuses

END = "a statement without an end; the file may be half-written"
FOREVER = "WITH RECURSIVE f(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM f)"
AGENT = UNTYPED_SCHEMA + ";\n"  # one line
INSERT = f"INSERT INTO agent VALUES ('001', 'my_agent', '192.168.1.100', '{KEY}')"
SCRIPTS = {
    "plain": f"{AGENT}{INSERT};\n",
    "one line": f"{UNTYPED_SCHEMA}; {INSERT};",
    "CRLF": f"{AGENT}{INSERT};\n".replace("\n", "\r\n"),
    "BOM": f"\ufeff{AGENT}{INSERT};\n",
    "a transaction": f"BEGIN TRANSACTION;\n{AGENT}{INSERT};\nCOMMIT;\n",
    "a dump": f"PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\n{AGENT}{INSERT};\nCOMMIT;\n",
    "empty statements": f";;\n;{AGENT};;{INSERT};;;\n;",
    "a comment at the end": f"{AGENT}{INSERT};\n-- the end\n",
    "a comment at the end, no newline": f"{AGENT}{INSERT};\n-- the end",
    "a comment at the end, in C": f"{AGENT}{INSERT};\n/* the end; */",
    "comments": f"-- a; b\n/* c; 'd */ {AGENT}-- it's ; \n{INSERT} /* ; */ -- ;\n;\n",
    "semicolons in strings": f"{AGENT}INSERT INTO agent VALUES ('002', ';''; --', ';\n;', ';');\n"
    f"{INSERT};\n",
    "semicolons in names": f'CREATE TABLE "a;b" ([c;d], `e;f`);\n{AGENT}{INSERT};',
    **{
        f"a trigger with {end!r}": f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN\n"
        f"  UPDATE agent SET name = 'my_agent' WHERE id = new.id; SELECT 'END';\n{end}\n"
        f"{INSERT.replace('my_agent', 'other')};\n"
        for end in ("END -- the end;\n;", "END/* the end; */;", "/* ; */ end -- ;\n /**/ ;")
    },
    "a trigger": f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN\n"
    "  UPDATE agent SET name = 'my_agent' WHERE id = new.id;\n  SELECT ';';\nEND;\n"
    f"{INSERT.replace('my_agent', 'other')};\n",
    **{
        f"a {word.lower()} trigger": f"{AGENT}create {word} trigger t AFTER INSERT ON agent BEGIN\n"
        f"  UPDATE agent SET name = 'my_agent' WHERE id = new.id;\nEND;\n"
        f"{INSERT.replace('my_agent', 'other')};\n"
        for word in ("TEMP", "TEMPORARY")
    },
    "a view": f"{UNTYPED_SCHEMA.replace('agent', 'h', 1)};\n{INSERT.replace('agent', 'h', 1)};\n"
    "CREATE VIEW agent AS SELECT * FROM h;",
    "many statements a line": f"{UNTYPED_SCHEMA};"
    + f"{INSERT}; DELETE FROM agent;" * 50
    + f"{INSERT};",
    "a SELECT": f"{AGENT}SELECT * FROM agent;\n{INSERT};\nSELECT 1;\n",
}
BROKEN = f"INSERT INTO {SECRET} VALUES ('{SECRET}')"
SECRET_ROW = f"INSERT INTO agent VALUES ('002', 'n', 'any', '{SECRET}')"
FAILING = {  # and the line at which the failing statement starts
    "a missing table": (f"{AGENT}{SECRET_ROW};\n{BROKEN};\n", 3),
    "the first line": (f"{BROKEN};\n{AGENT}", 1),
    "no SQL": (f"this is {SECRET}", 1),
    "a word after blank lines": (f"\n\n{AGENT}\n\n\n{SECRET};\n", 7),
    "on the line of another": (f"{AGENT}{SECRET_ROW}; {BROKEN};\n", 2),
    "which ends on the line": (f"{AGENT}INSERT INTO agent\nVALUES (1, 2,\n3, 4); {BROKEN};\n", 4),
    "over lines": (f"{AGENT}\nINSERT INTO agent\n\nVALUES ('{SECRET}');\n{SECRET_ROW};\n", 3),
    "after CRLF": (f"{AGENT}\n{SECRET_ROW};\n{BROKEN};\n".replace("\n", "\r\n"), 4),
    "after a comment": (f"{AGENT}-- {SECRET}; '\n/* {SECRET}\n ; */\n\n{BROKEN};\n", 6),
    "after a comment on its line": (f"{AGENT}/* {SECRET};\n */ {BROKEN};\n", 3),
    "in a transaction": (f"BEGIN;\n{AGENT}{SECRET_ROW};\n{BROKEN};\nCOMMIT;\n", 4),
    "a COMMIT too many": (f"{AGENT}{SECRET_ROW};\nCOMMIT;\n", 3),
    "a BEGIN too many": (f"BEGIN;\n{AGENT}{SECRET_ROW};\nBEGIN;\nCOMMIT;\n", 4),
    "after a trigger": (
        f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN\n SELECT 1;\nEND;\n{BROKEN};",
        5,
    ),
    "a trigger": (
        f"{AGENT}\nCREATE TRIGGER t AFTER INSERT ON {SECRET} BEGIN\n SELECT 1;\nEND;\n{INSERT};",
        3,
    ),
    "after semicolons in strings": (f"{AGENT}{SECRET_ROW[:-1]} || ';\n;');\n{BROKEN};", 4),
    "without its semicolon": (f"{AGENT}{SECRET_ROW};\n\n{BROKEN}\n\n", 4),
    "a quote that never closes": (f"{AGENT}\n{SECRET_ROW[:-2]};\n{INSERT};\n", 3),
    "a comment that never closes": (f"{AGENT}{SECRET_ROW} /* {SECRET};\n{INSERT};\n", 2),
    "a trigger that never ends": (
        f"{AGENT}\nCREATE TRIGGER t AFTER INSERT ON agent BEGIN\nSELECT '{SECRET}';\n{INSERT};\n",
        3,
    ),
    "a missing semicolon": (f"{AGENT}{SECRET_ROW}\n{SECRET_ROW};\n", 2),
    "a constraint": (f"{AGENT}CREATE UNIQUE INDEX i ON agent (id);\n{f'{SECRET_ROW};' * 2}", 3),
    "a RAISE": (
        f"{AGENT}CREATE TRIGGER t BEFORE INSERT ON agent\n"
        f"BEGIN SELECT RAISE(ABORT, '{SECRET}'); END;\n{SECRET_ROW};\n",
        4,
    ),
    "a NUL": (f"{AGENT}{SECRET_ROW};\n{SECRET_ROW}\0;\n", 3),
    "a column too many": (f"{AGENT}\n\nINSERT INTO agent VALUES ('{SECRET}', 2, 3, 4, 5);", 4),
    "an unknown function": (f"{AGENT}SELECT {SECRET}('{SECRET}');", 2),
    "ATTACH": (f"{AGENT}ATTACH '{SECRET}' AS other;", 2),
    "VACUUM INTO": (f"{AGENT}VACUUM INTO '{SECRET}';", 2),
    "a command of the shell": (f"{AGENT}\n.print {SECRET}\n", 3),
    "no last semicolon": (f"{AGENT}{INSERT}", 2),
    "no last semicolon, but a newline": (f"{AGENT}{INSERT}\n\n", 2),
    "no last semicolon, but a comment": (f"{AGENT}{INSERT} -- the end;\n", 2),
    "an UPDATE that lost its WHERE": (f"{AGENT}{INSERT};\nUPDATE agent SET agent_key = 'NEW'", 3),
    "one that lost half of its WHERE": (f"{AGENT}{INSERT};\n\nDELETE FROM agent WHERE id > '0", 4),
    "a trigger that is cut": (
        f"{AGENT}{INSERT};\nCREATE TRIGGER t AFTER INSERT ON agent BEGIN\nSELECT 1;",
        3,
    ),
}
OPEN = {  # a transaction that nobody ended: the file was cut before its COMMIT
    "a dump": f"PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\n{AGENT}{INSERT};\n",
    "a transaction": f"{AGENT}BEGIN;\n{INSERT};\n",
    "a transaction at the end": f"{AGENT}{INSERT};\nBEGIN;",
    "a savepoint": f"{AGENT}SAVEPOINT s;\n{INSERT};\n",
    "the second one": f"BEGIN;\n{AGENT}{INSERT};\nCOMMIT;\nBEGIN;\nDELETE FROM agent;\n",
}
DUMPS = {  # of another database, and what the message advises
    "mysqldump": ("-- MySQL dump 10.13  Distrib 8.0.36, for Linux (x86_64)\n--\n", "mysql --batch"),
    "mariadb-dump": (
        "/*M!999999\\- enable the sandbox mode */ \n-- MariaDB dump 10.19\n--\n",
        "mysql --batch",
    ),
    "pg_dump": ("--\n-- PostgreSQL database dump\n--\n\nSET statement_timeout = 0;\n", "\\copy"),
}
MYSQL = """/*!40101 SET NAMES utf8 */;
DROP TABLE IF EXISTS `agent`;
CREATE TABLE `agent` (
  `id` varchar(8) NOT NULL,
  `name` varchar(128) NOT NULL,
  `ip` varchar(64) DEFAULT NULL,
  `agent_key` varchar(128) NOT NULL,
  PRIMARY KEY (`id`),
  KEY `agent_ip` (`ip`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;
LOCK TABLES `agent` WRITE;
INSERT INTO `agent` VALUES ('001','it\\'s','any','%s');
UNLOCK TABLES;
"""
PG = """CREATE TABLE public.agent (
    id character varying(8) NOT NULL
);
COPY public.agent (id, name, ip, agent_key) FROM stdin;
001\tmy_agent\tany\t%s
\\.
"""
SIZE = 120_000  # characters
LONG = {  # what must take time in proportion to its length
    "brackets": AGENT + "[" * SIZE,
    "quotes": AGENT + f"{INSERT}; '" + "''" * (SIZE // 2),
    "double quotes and brackets": AGENT + '"[' * (SIZE // 2),
    "back-quotes": AGENT + "`" * (SIZE + 1),
    "comments that do not end": AGENT + "/* " * (SIZE // 3),
    "slashes and stars": AGENT + "/* *" * (SIZE // 4),
    "comments": AGENT + "-- x\n/* y */" * (SIZE // 12),
    "comments after a statement": f"{AGENT}{INSERT}" + " /*x*/ --\n" * (SIZE // 10),
    "semicolons": AGENT + ";" * SIZE,
    "semicolons in a trigger": f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN SELECT 1"
    + ";" * SIZE,
    "a trigger of many statements": f"{AGENT}CREATE TRIGGER t AFTER INSERT ON agent BEGIN "
    + "SELECT 1;" * (SIZE // 9)
    + "END;",
    "semicolons in a string": AGENT
    + f"{SECRET_ROW[:-2]};\n"
    + f"{INSERT.replace(KEY, 'k')};\n" * 40_000,
    "white space": AGENT + " \n" * (SIZE // 2),
    "white space after a statement": f"{AGENT}{INSERT}" + " \n" * (SIZE // 2) + "x",
}
MEMORY = 1 << 20  # kilobytes that a script may take, whatever it does


@pytest.mark.parametrize("content", SCRIPTS.values(), ids=SCRIPTS)
def test_sql_script(stores: Stores, content: str) -> None:
    path = stores.text(content, "agents.sql")
    assert look(path, "id", "001").get("data") == DATA, look(path, "id", "001")
    assert look(path, "ip", "192.168.1.100").get("data") == DATA
    assert look(path, "id", "999")["error"] == 4
    assert path.read_bytes() == content.encode()
    assert list(stores.folder.iterdir()) == [path]


def test_the_sample_is_sound() -> None:
    """And shows `any`, a network and IPv6."""
    database = sqlite3.connect(":memory:")
    database.executescript(SAMPLE.read_text())
    rows = database.execute("SELECT id, name, ip, agent_key FROM agent").fetchall()
    database.close()
    assert len(rows) == 6
    for row in rows:
        assert look(SAMPLE, "id", row[0])["data"] == Record(*row)._asdict()
    stored = [row[2] for row in rows]
    assert "any" in stored
    assert any("/" in ip and "." in ip for ip in stored)
    assert any("/" in ip and ":" in ip for ip in stored)
    assert look(SAMPLE, "ip", "10.20.30.40")["data"]["id"] == "003"
    assert look(SAMPLE, "ip", "10.20.31.40")["data"]["id"] == "004"


@pytest.mark.parametrize("case", FAILING)
def test_sql_script_that_fails(stores: Stores, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stores.folder)
    content, line = FAILING[case]
    path = stores.text(content, "agents.sql")
    for words in (["id", "001"], ["ip", "10.0.0.5"]):
        reason = refuses(path, *words)
        assert reason.startswith(f"line {line}: "), reason
        assert reason.endswith(("SQLite cannot run this", END)), reason
    assert os.listdir() == ["agents.sql"]


@pytest.mark.parametrize("id_type", ["INTEGER", "REAL", "NUMERIC", "TEXT", ""])
@pytest.mark.parametrize("number", ["1", "1.0", "'1'", "'01'", "'001'"])
def test_sql_script_with_ids_of_any_type(stores: Stores, id_type: str, number: str) -> None:
    """What a column for numbers makes of the id is found, too."""
    table = AGENT.replace("(id,", f"(id {id_type},")
    path = stores.text(f"{table}{INSERT};\n".replace("'001'", number), "agents.sql")
    assert look(path, "id", "001").get("data") == DATA


def test_sql_script_without_agents(stores: Stores) -> None:
    for content in ("", "\n", "SELECT 1;", "CREATE TABLE host (id, name, ip);", "-- nothing\n"):
        assert refuses(stores.text(content, "agents.sql")) == LACKS
    reason = refuses(stores.text("CREATE TABLE agent (id, name, ip);", "agents.sql"))
    assert "agent_key" in reason and "id, name, ip" in reason


def test_sql_script_of_one_huge_statement(stores: Stores) -> None:
    """One answer had a million bytes."""
    path = stores.text(f"{AGENT}INSERT INTO nowhere VALUES ('{SECRET * 30_000}');", "agents.sql")
    assert refuses(path) == "line 2: SQLite cannot run this"


def test_sql_script_that_never_ends(stores: Stores) -> None:
    """Named by its file, and by its line where it is a statement of the script."""
    endless = f"CREATE VIEW agent AS {FOREVER} SELECT x AS id, 1 AS name, x || 'x' AS ip, 2 AS"
    path = stores.text(f"{endless} agent_key FROM f;", "agents.sql")
    assert refuses(path, "ip", "10.0.0.5", seconds=0.1) == LATE
    path = stores.text(f"{AGENT}\n{FOREVER} SELECT max(x) FROM f;", "agents.sql")
    assert refuses(path, seconds=0.1) == f"line 3: {LATE}"


@pytest.mark.parametrize("content", OPEN.values(), ids=OPEN)
def test_sql_script_that_was_cut_before_its_commit(stores: Stores, content: str) -> None:
    """What a transaction has not committed does not count: the rest of it may be missing."""
    path = stores.text(content, "agents.sql")
    assert refuses(path)
    assert refuses(path, "ip", "192.168.1.100")


@pytest.mark.parametrize("dump", DUMPS)
def test_a_dump_of_another_database(stores: Stores, dump: str) -> None:
    """SQLite cannot run it. The message says how to get a file that can be read."""
    head, advice = DUMPS[dump]
    body = (PG if dump == "pg_dump" else MYSQL) % SECRET
    reason = refuses(stores.text(head + body, "agents.sql"))
    assert advice in reason and reason.startswith("line "), reason


@pytest.mark.parametrize("content", LONG.values(), ids=LONG)
def test_a_long_script_takes_linear_time(stores: Stores, content: str) -> None:
    """Processor time: a busy machine does not count."""
    path = stores.text(content, "agents.sql")
    started = time.process_time()
    look(path, "id", "001")
    assert time.process_time() - started < 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python cannot set SQLite's limits")
def test_one_long_step_in_a_script(stores: Stores) -> None:
    step = "SELECT instr(zeroblob(20000000), CAST(zeroblob(50000) || x'01' AS BLOB));"
    started = time.monotonic()
    refuses(stores.text(f"{AGENT}{step}{INSERT};", "agents.sql"), seconds=0.3)
    assert time.monotonic() - started < 3


def test_a_script_that_takes_all_the_memory(ask: Caller, stores: Stores) -> None:
    """Its own limit ends it. (The shell's limit is for a program that has none.)"""
    path = stores.text(
        f"{AGENT}CREATE TABLE t AS {FOREVER} SELECT randomblob(50000) FROM f;", "agents.sql"
    )
    words: list[str | bytes | Path] = ["--db", path, "--timeout", "6", "id", "001"]
    shell = ["sh", "-c", f'ulimit -v {4 * MEMORY}; exec "$@"', "sh"]
    done = measure([*shell, *ask.command(), *words], ask.path)
    assert check_line(done.output)["error"] == 2 and done.status == 0, done
    assert done.memory < MEMORY, done
