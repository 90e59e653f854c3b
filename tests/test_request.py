"""A request as a process: argv in; out come one JSON line, exit status 0, and nothing else.

What a record, an address or a line of a source may be is tested without processes, elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KEY, SAMPLE, SCRIPT, Caller, Record, Stores, script
from manager import MESSAGE_SIZE, check_line
from running import NOISE, SOON, on_a_terminal, start

DATA = Record()._asdict()
FOUND = (
    '{"error": 0, "data": {"id": "001", "name": "my_agent", "ip": "192.168.1.100",'
    f' "key": "{KEY}"}}}}\n'
)
TOO_FEW = '{"error": 1, "message": "Too few arguments"}\n'
BAD = '{"error": 3, "message": "Bad arguments given"}\n'
NOT_FOUND = '{"error": 4, "message": "No agent key found"}\n'
TWO_IDS = '{"error": 5, "message": "Found more than one match for required id"}\n'
TWO_IPS = '{"error": 5, "message": "Found more than one match for required ip"}\n'
ENDLESS_VIEW = """
    CREATE VIEW agent AS
    WITH RECURSIVE forever(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM forever)
    SELECT id || 'x' AS id, 'n' AS name, id || 'x' AS ip, 'k' AS agent_key FROM forever;
"""

MISTAKES = [  # a command line, and what the message must name
    (["--chek"], ["no option --chek: did you mean --check?"]),
    (["--tiemout", "5", "id", "001"], ["--tiemout", "--timeout"]),
    (["--database=x", "id", "001"], ["--database"]),
    (["--hepl"], ["--hepl", "--help"]),
    (["-x", "id", "001"], ["-x"]),
    (["--db"], ["--db"]),
    (["--db=", "id", "001"], ["--db"]),
    (["--db", "--check"], ["--db"]),
    (["--import", "--db", "x"], ["--import"]),
    (["--timeout", "id"], ["--timeout"]),
    (["--timeout", "0", "id", "001"], ["--timeout"]),
    (["--timeout=-1", "id", "001"], ["--timeout"]),
    (["--timeout", "nan", "id", "001"], ["--timeout"]),
    (["--timeout", "1e999", "id", "001"], ["--timeout"]),
    (["--timeout", "soon", "--check"], ["--timeout"]),
    (["--serve", "--workers", "0"], ["--workers"]),
    (["--serve", "--workers", "many"], ["--workers"]),
    (["--workers", "4", "id", "001"], ["--workers"]),
    (["--json", "id", "001"], ["--json"]),
    (["--check", "--mode", "0660"], ["--mode", "--check"]),
    (["--manager", "/x", "--serve"], ["--manager", "--serve"]),
    (["--import", "x", "--socket", "y"], ["--socket", "--import"]),
    (["--serve", "--check"], ["--serve", "--check"]),
    (["--enroll", "--import", "x"], ["--enroll", "--import"]),
    (["--check=x"], ["--check"]),
    (["--check", "id", "001"], ["request", "--check"]),
    (["--import", "x", "y"], ["unexpected y"]),
    (["--check", "agents.csv"], ["unexpected agents.csv; use --db agents.csv"]),
    (["--db", "a", "--db", "b", "id", "001"], ["--db"]),
    (["--db=a", "--timeout=5", "--db=a", "ip", "10.0.0.5"], ["--db"]),
    (["--timeout", "5", "--timeout=6", "id", "001"], ["--timeout"]),
    (["--db", "a", "--check", "--db", "b"], ["--db"]),
    (["--check", "--check"], ["--check"]),
    (["--import", "a", "--import", "b"], ["--import"]),
    (["--serve", "--sokcet", "s"], ["--sokcet", "--socket"]),
    (["--che"], ["--che", "--check"]),  # nothing is guessed
    (["--worker", "2", "--serve"], ["--worker", "--workers"]),
    (["--skip-invalid", "id", "001"], ["--skip-invalid"]),
    (["--check", "--skip-invalid"], ["--skip-invalid", "--check"]),
    (["--serve", "--mode", "0999"], ["--mode"]),
    (["-check"], ["-check", "--check"]),
]


HINTS = {  # a word that a person may try, and what a terminal shows besides the answer
    "serve": "did you mean --serve?",
    "check": "did you mean --check?",
    "import": "did you mean --import",
    "enroll": "did you mean --enroll?",
    "help": "--help",
    "version": "--version",
    "001": "id 001",
    "10.0.0.5": "ip 10.0.0.5",
    "list": "--help",
    "foo": "",
}
SECONDS = {  # what --timeout takes: more than 0 s and at most an hour
    **dict.fromkeys(["1", "0.5", "3600", "0.9", "5.", ".5"], True),
    **dict.fromkeys(["0", "-1", "3600.1", "inf", "nan", "1e2", "abc", "", "5 s", " 5"], False),
    **dict.fromkeys(["+5", "1_0", "１0", "٣", ".", "1.2.3", "0000000001", "1" * 400], False),
}
URLS = {  # a URL that is none of ours, and what the message must name
    "sqlite:///var/lib/agents.db": "path",
    "sqlite://agents.db": "path",
    "http://host/agents.csv": "http",
    "https://user:TheSecretKey@host/agents.csv": "https",
    "mysql://user:TheSecretKey@host/wazuh": "password",
    "postgresql://user@host/wazuh?password=TheSecretKey": "password",
}

# ---------------------------------------------------------------- to the letter


def test_the_texts_to_the_letter(ask_each: Caller, stores: Stores) -> None:
    """The vendor's own, which its integration tests look for."""
    twins = [Record("003", "a", "10.0.0.3"), Record("003", "b", "10.0.0.3")]
    path = stores.sqlite([Record(), *twins])
    for words, text in (
        ([], TOO_FEW),
        (["id"], TOO_FEW),
        (["ip", ""], TOO_FEW),
        (["error1", "id", "003"], BAD),
        (["ID", "001"], BAD),
        (["id", "009"], NOT_FOUND),
        (["ip", "10.9.9.9"], NOT_FOUND),
        (["id", "003"], TWO_IDS),
        (["ip", "10.0.0.3"], TWO_IPS),
        (["id", "001"], FOUND),
        (["ip", "192.168.1.100"], FOUND),
    ):
        done = start(ask_each, "--db", path, *words)
        assert (done.stdout.decode(), done.stderr, done.returncode) == (text, b"", 0), words


def test_every_kind_of_source(ask_each: Caller, stores: Stores) -> None:
    rows = [Record(), Record("002", "net", "10.0.0.0/8")]
    for kind in "sqlite", "untyped", "indexed", "csv", "keys", "sql":
        path = stores.make(kind, rows)
        assert ask_each("id", "001", db=path).output.decode() == FOUND, kind
        assert ask_each("ip", "10.9.8.7", db=path).data["id"] == "002", kind
        path.unlink()


@pytest.mark.parametrize("style", ["python", "isolated"])
def test_every_way_to_call_it(ask_each: Caller, stores: Stores, style: str) -> None:
    path = stores.sqlite()
    assert ask_each("id", "001", db=path, style=style).output.decode() == FOUND
    assert ask_each(style=style).output.decode() == TOO_FEW


def test_words_of_any_bytes(ask_each: Caller, stores: Stores) -> None:
    """One line of ASCII comes back, whatever they are and however long."""
    path = stores.sqlite([Record(), Record(id="٠٠١", ip="any")])
    for value in ("٠٠١", b"\xff\xfe", b"\x01\x1b[2J\n", b"0" * 100_000, "001\n"):
        for words in (["id", value], ["ip", value], [value, "001"]):
            assert ask_each(*words, db=path).error == 3, words


# ---------------------------------------------------------------- options of a request


def test_options_go_before_the_words(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite()
    for options in (
        ["--db", path],
        [f"--db={path}"],
        ["--timeout", "5", "--db", path],
        ["--timeout=0.9", f"--db={path}"],
    ):
        assert ask(*options, "id", "001").output.decode() == FOUND, options


@pytest.mark.parametrize(
    "words", [["id", "001", "--db", "D"], ["ip", "10.0.0.5", "--timeout=5"], ["id", "001", "-V"]]
)
def test_options_after_the_words(ask: Caller, stores: Stores, words: list[str]) -> None:
    """The manager appends the words: who writes exec_path may think it is the other way round."""
    answer = ask(*words, db=stores.sqlite())
    assert answer.error == 3
    assert answer.message.startswith("Bad arguments given: options go before " + words[0])


def test_the_source_without_db(ask: Caller, stores: Stores) -> None:
    """$AGENT_KEY_DB, else the one place that the documentation names."""
    path = stores.sqlite()
    environment = {"AGENT_KEY_DB": str(path)}
    assert ask("id", "001", env=environment).data == DATA
    assert ask("id", "001", env=environment, db=stores.csv([])).error == 4
    assert ask("id", "001", env={"AGENT_KEY_DB": "/no/such"}).message.endswith(
        "/no/such: No such file or directory"
    )
    default = Path("/var/lib/agent-key-request/agents.db")
    assert str(default) == script.STORE
    if not default.exists():
        for environment in {}, {"AGENT_KEY_DB": ""}:
            answer = ask("id", "001", env=environment)
            assert answer.error == 2 and str(default) in answer.message
            advice = "no store yet: make one with --import SOURCE, or name one with --db"
            assert answer.message.endswith(advice)
    path.unlink()
    answer = ask("id", "001", db=path)  # that is named: the name is wrong
    assert answer.message.endswith(f"{path}: No such file or directory")


@pytest.mark.parametrize("name", ["a%41?mode=rw#x", "é a'b\"c", "-x", "file:x", b"new\nline\xff"])
def test_a_source_of_any_name(ask: Caller, stores: Stores, name: str | bytes) -> None:
    """Also relative to the working directory, which is the manager's home."""
    path = stores.sqlite(name=name)
    before = path.read_bytes()
    option = b"--db=" + os.fsencode(name)
    assert ask(option, "id", "001", cwd=stores.folder).data == DATA
    assert ask(b"--db", os.fsencode(path), "ip", "192.168.1.100").data == DATA
    assert list(stores.folder.iterdir()) == [path] and path.read_bytes() == before


# ---------------------------------------------------------------- sources that cannot be read


def test_the_deadline(ask_each: Caller, stores: Stores, locked: Callable[[Path], None]) -> None:
    """The answer of error 2 names the file, and says that it was the time."""
    path = stores.sqlite()
    locked(path)
    view = stores.folder / "view.db"
    database = sqlite3.connect(str(view))
    database.executescript(ENDLESS_VIEW)
    database.close()
    endless = stores.text(ENDLESS_VIEW + "CREATE TABLE t AS SELECT * FROM agent;", "a.sql")
    for source in path, view, endless:
        answer = ask_each("--timeout", "0.6", "ip", "10.0.0.5", db=source)
        assert answer.error == 2
        assert str(source) in answer.message and "no answer in time" in answer.message
        assert answer.seconds < 0.6 + SOON


def hang() -> None:
    time.sleep(NOISE)  # which a signal ends


def disk_error() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("fault", "seconds", "number", "said"),
    [
        (hang, 0.2, 2, r"Cannot read key source: a\.csv: no answer in time \(--timeout\)"),
        (disk_error, NOISE, 2, r"Cannot read key source: a\.csv: Input/output error"),
        ({}.popitem, NOISE, 9, "Internal error: KeyError in line [0-9]+ of the script"),
    ],
)
def test_a_source_that_hangs_or_fails_like_none(
    fault: Callable[[], object],
    seconds: float,
    number: int,
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A query's own time ends before the alarm, which cannot say what held it up."""

    def open_source(name: str, shorter: float) -> None:
        assert name == "a.csv" and 0 < shorter < seconds
        fault()

    logged: list[tuple[bool, str]] = []
    monkeypatch.setattr(script, "open_source", open_source)
    monkeypatch.setattr(script, "tell_syslog", lambda *what: logged.append(what))
    before = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    script.answer_once(["id", "001"], "a.csv", seconds)
    assert time.monotonic() - started < SOON
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    signal.signal(signal.SIGALRM, before)
    reply = check_line(capfd.readouterr().out.encode())
    assert reply["error"] == number and re.fullmatch(said, reply["message"])
    assert logged == [(True, "id 001: " + reply["message"])]


def test_what_is_no_source(ask: Caller, stores: Stores) -> None:
    """Each is named, none is waited for, and nothing of it is shown."""
    sound = stores.sqlite()
    open_to_all = stores.folder / "open"
    open_to_all.mkdir()
    shared = Path(shutil.copy(sound, open_to_all))
    open_to_all.chmod(0o777)
    pipe = stores.folder / "pipe"
    os.mkfifo(pipe)
    secret = "TheSecretKey"
    for source, said in (
        (stores.folder / "missing.db", "No such file or directory"),
        (stores.folder, "not a regular file"),
        (pipe, "not a regular file"),
        (shared, f"chmod o-w {open_to_all}"),
        (stores.text("", "empty"), "empty"),
        (stores.text(f"CREATE TABLE agent (\n{secret}\n);\n\nbroken {secret};", "a.sql"), "line 5"),
        (stores.text(f"CREATE TABLE agent (\n{secret}\n)", "b.sql"), "line 1"),
        (stores.text(f'id,name,ip,key\n002,"a,any,{secret}\n001,b,any,k\n', "a.csv"), "line 2"),
        (stores.text(sound.read_bytes()[:4096], "cut.db"), "malformed"),
    ):
        answer = ask("id", "001", db=source)
        assert answer.error == 2
        assert str(source) in answer.message and said in answer.message, answer
        assert secret not in answer.message


def test_a_message_has_an_end(ask: Caller, stores: Stores) -> None:
    """The manager reads once, and only so much."""
    statement = "INSERT INTO nowhere VALUES ('" + "TheSecretKey" * 100_000 + "');"
    for source in stores.text(statement, "a.sql"), "/no/such/" + "d/" * 2000:
        answer = ask("id", "001", db=source)
        assert answer.error == 2
        assert len(answer.message) <= MESSAGE_SIZE and "TheSecretKey" not in answer.message


# ---------------------------------------------------------------- a person's command line


def test_no_arguments(ask_each: Caller) -> None:
    """The vendor's answer; and a person at a terminal is told where there is help."""
    done = start(ask_each)
    assert (done.stdout.decode(), done.stderr, done.returncode) == (TOO_FEW, b"", 0)
    done_there = on_a_terminal(ask_each)
    assert (done_there.output.decode(), done_there.status) == (TOO_FEW, 0)
    assert "--help" in done_there.shown and done_there.shown.count("\n") == 1


@pytest.mark.parametrize("word", HINTS)
def test_a_word_that_is_no_request(ask: Caller, word: str) -> None:
    """The manager gets the vendor's answer. A person at a terminal is helped, too."""
    done = start(ask, word)
    assert (done.stdout.decode(), done.stderr, done.returncode) == (BAD, b"", 0)
    done_there = on_a_terminal(ask, word)
    assert (done_there.output.decode(), done_there.status) == (BAD, 0)
    assert HINTS[word] in done_there.shown and done_there.shown.count("\n") <= 1, done_there
    assert HINTS[word] == "" or done_there.shown.startswith("agent_key_request: ")


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=lambda value: " ".join(value))
def test_a_mistake_among_the_options(ask: Caller, words: list[str], named: list[str]) -> None:
    """Told in one line, without the usage, with what is wrong with what. Nothing is done."""
    done = start(ask, *words, env={"AGENT_KEY_DB": "/no/such/agents.db"})
    said = done.stderr.decode("ascii")
    assert (done.returncode, done.stdout) == (2, b""), done
    assert re.fullmatch(r"agent_key_request: error: .+\n", said), said
    assert "usage" not in said
    assert all(name in said for name in named), said
    assert not list(ask.folder.iterdir())


@pytest.mark.parametrize("text", SECONDS)
def test_a_number_of_seconds(ask: Caller, stores: Stores, text: str) -> None:
    done = start(ask, "--db", stores.keys(), "--timeout", text, "id", "001")
    if SECONDS[text]:
        assert (done.stdout.decode(), done.returncode) == (FOUND, 0)
    else:
        assert (done.stdout, done.returncode) == (b"", 2) and b"--timeout" in done.stderr


@pytest.mark.parametrize("url", URLS)
def test_a_url_of_no_database_of_ours(ask: Caller, url: str) -> None:
    """Each has its own message, and a password is never repeated."""
    answer = ask("id", "001", db=url)
    assert answer.error == 2 and URLS[url] in answer.message
    assert "TheSecretKey" not in answer.message
    others = [other for other in URLS if URLS[other] != URLS[url]]
    assert answer.message not in {ask("id", "001", db=other).message for other in others}


def test_a_mistake_as_a_process(ask_each: Caller, stores: Stores) -> None:
    """Status 2, of which the manager warns; and nothing is done."""
    store = stores.folder / "a.db"
    for words in (
        ["--db", store, "--import", SAMPLE, "--chek"],
        ["-x", "id", "001"],
        ["--timeout", "0", "id", "001"],
        ["--db=", "id", "001"],
    ):
        done = start(ask_each, *words)
        assert (done.returncode, done.stdout) == (2, b"")
        assert re.fullmatch(rb"agent_key_request: error: .+\n", done.stderr)
    assert list(stores.folder.iterdir()) == []


def test_version_shows_the_hash_of_the_file(ask_each: Caller, stores: Stores) -> None:
    copy = stores.text(SCRIPT.read_bytes() + b"\n# changed\n", "copy.py")
    link = stores.folder / "link"
    link.symlink_to(copy)
    for path, style in (
        (SCRIPT, "exec"),
        (SCRIPT, "python"),
        (copy, "isolated"),
        (link, "exec"),
    ):
        copy.chmod(0o755)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        done = ask_each.call("--version", style=style, script=path)
        expected = f"agent_key_request.py {script.VERSION} sha256:{digest}\n"
        assert (done.output.decode(), done.status) == (expected, 0)


def test_help(ask_each: Caller) -> None:
    """Groups with one line for each option, what the exit status means, and four examples."""
    done = start(ask_each, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode("ascii").splitlines()
    assert all(len(line) <= 100 for line in lines)
    for option in (
        *("--db", "--timeout", "--socket", "--serve", "--mode", "--group", "--workers", "--import"),
        *("--check", "--json", "--manager", "--enroll", "--skip-invalid", "--version", "--help"),
    ):
        of_it = [line for line in lines if re.match(rf"  +(-., )?{option}\b", line)]
        assert len(of_it) == 1, (option, of_it)
    text = "\n".join(lines)
    for word in (
        *(script.STORE, "$AGENT_KEY_DB", "mysql://", "postgresql://", ".sql", "client.keys"),
        *(" id ", " ip ", f"({script.REQUEST_SECONDS:g};"),
    ):
        assert word in text, word
    assert re.search("exit status", text, re.IGNORECASE)
    examples = re.split("examples?:", text, flags=re.IGNORECASE)[1]
    assert examples.count(SCRIPT.name) == 4


@pytest.mark.parametrize("asked", ["-h", "--help", "-V", "--version"])
def test_help_and_version_are_all_that_happens(ask: Caller, stores: Stores, asked: str) -> None:
    """Anywhere among the options."""
    store = stores.folder / "new.db"
    for words in (
        [asked],
        ["--db", store, "--import", SAMPLE, asked],
        [asked, "--db", store, "--import", SAMPLE],
        ["--serve", "--socket", stores.folder / "socket", asked],
        ["--timeout", "5", asked, "id", "001"],
    ):
        done = start(ask, *words)
        assert (done.returncode, done.stderr) == (0, b""), words
        assert (b"sha256:" in done.stdout) == (asked in ("-V", "--version")), words
        assert (b"--enroll" in done.stdout) == (asked in ("-h", "--help")), words
    assert list(stores.folder.iterdir()) == []
