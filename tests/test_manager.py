"""`--check --manager`: why a manager does not enrol; `--enroll`: enrolling without being asked.

The facts are in MANAGER.md; `authd.py` is the manager's own socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import pwd
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import authd
import pytest
from conftest import PLAIN_SCHEMA, SCRIPT, Caller, Record, Stores, script
from manager import FIELDS, stored_ip

SOUND = '{"error": 4, "message": "No agent key found"}'
ANSWERS = "answers (tried with 00000000, which nobody has), in "
SECRET = "5ec2e7"  # each key begins so, and no output may have it


def key(number: int) -> str:
    """A key of 64 hexadecimal digits, as the manager makes them."""
    return f"{SECRET}{number:058x}"


ALPHA, BETA, GAMMA = (
    Record("001", "alpha", "10.0.0.1", key(1)),
    Record("002", "beta", "2001:db8::2", key(2)),
    Record("003", "gamma", "any", key(3)),
)
AGENTS = [ALPHA, BETA, GAMMA]
INDEXES = ";".join(f"CREATE INDEX agent_{field} ON agent ({field})" for field in ("id", "ip"))


class Home:
    """A manager's folder."""

    def __init__(self, path: Path) -> None:
        """Make it at PATH: a manager of 4.14.9 that has no agents and asks nobody."""
        self.path = path
        for folder in "etc", "bin", "queue":
            (path / folder).mkdir(parents=True)
        self.version('{"version": "4.14.9", "stage": "rc1"}')
        self.configure("<ossec_config><auth></auth></ossec_config>")
        self.keys([])

    def version(self, text: str | None) -> None:
        """Write TEXT to VERSION.json; None: there is none, as before 4.12."""
        (self.path / "VERSION.json").unlink(missing_ok=True)
        if text is not None:
            (self.path / "VERSION.json").write_text(text)

    def configure(self, text: str, name: str = "ossec.conf") -> None:
        """Write the configuration."""
        (self.path / "etc" / name).write_text(text)

    def keys(self, lines: Iterable[str | Sequence[str]]) -> None:
        """Write client.keys, of lines or records; addresses of records as the manager does."""
        with (self.path / "etc/client.keys").open("w") as file:
            for line in lines:
                if isinstance(line, str):
                    file.write(line + "\n")
                else:
                    agent_id, name, ip, key = line
                    file.write(f"{agent_id} {name} {stored_ip(ip)} {key}\n")

    def program(self, name: str, body: str, mode: int = 0o755, start: str = "#!/bin/sh\n") -> Path:
        """Write a shell script that an exec_path may name."""
        path = self.path / name
        path.write_bytes(f"{start}{body}\n".encode())
        path.chmod(mode)
        return path


@pytest.fixture
def home(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Make a manager's folder whose path is short enough for sockets."""
    monkeypatch.setattr(script, "OLD_VERSION_FILE", str(open_folder / "ossec-init.conf"))
    monkeypatch.delenv("AGENT_KEY_DB", raising=False)
    return Home(open_folder / "ossec")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one store, of three agents, that no check has anything to say of."""
    stores = Stores(tmp_path_factory.mktemp("stores"))
    path = stores.sqlite(AGENTS, PLAIN_SCHEMA + ";" + INDEXES)
    path.chmod(0o600)  # or a check would tell that others may read it
    return path


class Said(NamedTuple):
    """What a command gives."""

    status: int
    out: list[str]
    err: list[str]

    @property
    def errors(self) -> list[str]:
        """The errors on standard output."""
        return [line for line in self.out if line.startswith("error: ")]

    @property
    def notes(self) -> list[str]:
        """The notes on standard output."""
        return [line for line in self.out if line.startswith("note: ")]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the script's commands in the process."""

    def run(*arguments: str | Path) -> Said:
        status = script.main([str(word) for word in arguments])
        out, err = capfd.readouterr()
        assert SECRET not in out + err
        assert "Internal error" not in out + err
        return Said(status, out.splitlines(), err.splitlines())

    return run


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[list[bytes]]:
    """Listen at PATH, give each request the ANSWER, and close; with b"" be silent."""
    requests: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                peer, _nobody = listener.accept()
            except OSError:
                return
            with peer:
                request = peer.recv(65536)
                if not request:
                    continue  # connected and closed, to see who listens
                requests.append(request)
                peer.sendall(answer)
                if not answer:
                    peer.recv(1)  # until the other side gives up

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


# ---------------------------------------------------------------- reading the configuration


def key_request(inner: str, auth: str = "") -> str:
    """A configuration for 4.4 to 4.14."""
    return f"<ossec_config><auth>{auth}<key_request>{inner}</key_request></auth></ossec_config>"


def wodle(inner: str) -> str:
    """A configuration for 3.8 to 4.3."""
    return (
        f'<ossec_config><auth></auth><wodle name="agent-key-polling">{inner}</wodle></ossec_config>'
    )


def in_auth(inner: str) -> str:
    """A configuration that would enrol, were it not for what else <auth> has."""
    return key_request(EXEC, inner)


def flat(elements: Iterable[Any], *outer: str) -> list[tuple[Any, ...]]:
    """Give each element as (its names from the root on, its attributes if any, its text)."""
    rows: list[tuple[Any, ...]] = []
    for element in elements:
        names = (*outer, element.name)
        attributes = (element.attributes,) if element.attributes else ()
        rows += [(*names, *attributes, element.text), *flat(element.children, *names)]
    return rows


EXEC = "<exec_path>bin/ask</exec_path>"
X = {"x": "1"}
READ: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "nothing": ("", []),
    "text alone": ("a & b > c", []),
    "one": ("<r><a>1</a></r>", [("r", ""), ("r", "a", "1")]),
    "nested": (
        "<r><a><b>1</b><c>2</c></a></r>",
        [("r", ""), ("r", "a", ""), ("r", "a", "b", "1"), ("r", "a", "c", "2")],
    ),
    "several roots": ("<r>1</r>\nx <s>2</s>", [("r", "1"), ("s", "2")]),
    "spaces are not trimmed": ("<r> \n1\t</r>", [("r", " \n1\t")]),
    "text after the last child": (
        "<r>1<a/>2<a/>3</r>",
        [("r", "3"), ("r", "a", ""), ("r", "a", "")],
    ),
    "a comment": ("<r><!-- <a>1</a> -->2</r>", [("r", "2")]),
    "a comment of many lines": ("<r><!--\n<a>\n1</a>\n- -> -->2</r>", [("r", "2")]),
    "two comments": ("<r><!-- x -->1<!-- y --></r>", [("r", "1")]),
    "a comment within text": ("<r>1<!-- x -->2</r>", [("r", "12")]),
    "a comment of the old kind": ("<r>1<! x !>2</r>", [("r", "12")]),
    "a short comment": ("<r>1<!-->2</r>", [("r", "12")]),
    "a comment around the root": ("<!-- <r>1</r> --><s>2</s>", [("s", "2")]),
    "a document type that a comment ends": ("<!DOCTYPE x>\n<!-- y -->\n<r>1</r>", [("r", "1")]),
    "an attribute": ('<r x="1">2</r>', [("r", X, "2")]),
    "in single quotes": ("<r x='1'>2</r>", [("r", X, "2")]),
    "over two lines": ('<r\n  x="1"\t>2</r>', [("r", X, "2")]),
    "a space before the quote": ('<r x= "1">2</r>', [("r", X, "2")]),
    "two attributes": ('<r x="1" y="<!--">2</r>', [("r", {"x": "1", "y": "<!--"}, "2")]),
    "closed in itself": ("<r><a/><b />1</r>", [("r", ">1"), ("r", "a", ""), ("r", "b", "")]),
    "closed after an attribute": ('<r><a x="1"/>2</r>', [("r", ">2"), ("r", "a", X, "")]),
    "no entities": ("<r>x && y; &amp;</r>", [("r", "x && y; &amp;")]),
    "raw greater-than": ("<r>a 2>&1 > b</r>", [("r", "a 2>&1 > b")]),
    "a backslash before a tag": ("<r>\\<a>1</r>", [("r", "\\<a>1")]),
    "two backslashes before a tag": ("<r>\\\\<a/></r>", [("r", ""), ("r", "a", "")]),
    "a backslash in text": ("<r>a\\ b</r>", [("r", "a\\ b")]),
    "beyond ASCII": ("<r>\xe9</r>", [("r", "\xe9")]),
    "a NUL ends a text": ("<r>1\0002</r>", [("r", "1")]),
    "an odd name": ("<a<b>1</a<b>", [("a<b", "1")]),
}


@pytest.mark.parametrize("case", READ)
def test_elements_are_read(case: str) -> None:
    """As the manager takes them: several roots, comments and raw letters."""
    text, expected = READ[case]
    assert flat(script.XmlReader(text).read()) == expected


NOT_READ = {
    "an end alone": ("</r>", 1, "closed that is not open"),
    "not closed": ("\n<r>\n<a>\n", 3, "<a> is not closed"),
    "closed by another": ("<r><a>\n</b></r>", 2, "<a> of line 1 is not closed"),
    "closed with a space": ("<r></r >", 1, "<r> of line 1 is not closed"),
    "crossed": ("<a><b></a></b>", 1, "<b> of line 1 is not closed"),
    "the end of a tag is missing": ("<r></r", 1, "<r> of line 1 is not closed"),
    "the end of a tag is another": ("<r></rx", 1, "<r> of line 1 is not closed"),
    "too long before a child": (f"<r>{'x' * 20_480}<a/></r>", 1, "20480 characters"),
    "ends in a tag": ("<r><a", 1, "<a> is not closed"),
    "ends in attributes": ("<r x", 1, "within a tag"),
    "an XML line": ('\n<?xml version="1.0"?>\n<r></r>', 2, "<?xml"),
    "an XML line, short": ("<?xml?><r></r>", 1, "<?xml"),
    "a document type": ("\n<!DOCTYPE x>\n<r></r>", 2, "<!DOCTYPE>"),
    "a comment without an end": ("<r><!-- - - > </r>", 1, "no end"),
    "no quotes": ("<r x=1>2</r>", 1, "attribute x is not in quotes"),
    "no value": ("<r x>2</r>", 1, "attribute x has no value"),
    "no value, then a space": ('<r x ="1">2</r>', 1, "attribute x has no value"),
    "no value, closed": ("<r x/>", 1, "attribute x has no value"),
    "the quote is not closed": ('<r x="1>2</r>', 1, "attribute x is not in quotes"),
    "greater-than in quotes": ('<r x="1>">2</r>', 1, "attribute x is not in quotes"),
    "twice": ('<r x="1" x="2"></r>', 1, "attribute x stands twice"),
    "no space between": ('<r x="1"y="2"></r>', 1, "attribute x is not followed"),
    "raw less-than": ("<r><c>1 < 2</c></r>", 1, "has no value"),
    "too long": (f"<r>{'x' * 20_480}</r>", 1, "20480 characters"),
    "a name too long": (f"<{'x' * 20_480}>", 1, "20480 characters"),
    "too deep": ("<a>" * 1025, 1, "too deep"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_faults_for_which_the_manager_does_not_start(case: str) -> None:
    """Error 1226 in its log; ours names the line, too."""
    text, line, words = NOT_READ[case]
    with pytest.raises(script.ConfigurationError) as caught:
        script.XmlReader(text).read()
    assert re.fullmatch(f"line {line}: .*{re.escape(words)}.* \\(error 1226\\)", str(caught.value))


def test_as_deep_and_long_as_the_manager_goes() -> None:
    """What is not too much, is read."""
    text = "<a>" * 1024 + "x" * 20_479 + "</a>" * 1024
    (root,) = script.XmlReader(text).read()
    assert len(root.children) == 1
    script.XmlReader("x" * 100_000).read()


def test_any_text_is_read_or_refused() -> None:
    """A configuration that somebody is still writing must not end the check."""
    whole = key_request(EXEC) + wodle("<enabled>yes</enabled>") + "<!-- x -->"
    dice = random.Random(11)
    read = 0
    for _ in range(3000):
        text = list(whole)
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(text))
            text[place : place + dice.randrange(9)] = dice.choice(["", "<", ">", "/", "<!--", '"'])
        with contextlib.suppress(script.ConfigurationError):
            script.Configuration("x", (4, 14)).read("".join(text))
            read += 1
    assert 50 < read < 2950, "both must occur"


LONG = {
    "comments": "<!--" * 20_000,
    "comments that end": "<!-- -->" * 10_000 + "<!--" * 10_000,
    "auth": "<auth>" * 20_000,
    "auth, in itself": "<ossec_config>" + "<auth></auth>" * 10_000 + "<auth>",
    "key requests": key_request("<exec_path>" * 900),
    "an endless tag": "<ossec_config><" + "a" * 200_000,
    "tags without end": "<ossec_config>" + "<a b" * 50_000,
    "attributes": "<a " + "x='1' " * 50_000,
    "spaces": "<a " + " " * 200_000,
    "backslashes": "\\" * 200_000 + "<a>",
    "lines": "<a>\n" * 1000 + "</b>",
    "settings": key_request("<threads>4</threads>" * 10_000),
    "digits": key_request(f"<timeout>{'9' * 20_000}</timeout>"),
    "zeros": key_request(f"<timeout>{'0' * 20_000}</timeout>"),
}


@pytest.mark.parametrize("case", LONG)
def test_time_grows_with_the_length_only(
    case: str, home: Home, command: Callable[..., Said]
) -> None:
    """Patterns that try each pair of places took 14 s for 80 KB."""
    home.configure(LONG[case])
    started = time.monotonic()
    said = command("--check", "--manager", home.path, "--db", home.path / "etc/client.keys")
    assert time.monotonic() - started < 3
    assert len([line for line in said.errors if "ossec.conf" in line]) == 1, said


# ---------------------------------------------------------------- what a manager would do

# The tags of <ossec_config>, as MANAGER.md lists them.
NEVER_EMPTY = [
    *("global", "ruleset", "alerts", "email_alerts", "database_output", "syslog_output"),
    *("integration", "agentless", "localfile", "remote", "client", "command", "active-response"),
    *("reports", "labels", "cluster", "socket", "rule_test", "agent-upgrade", "task-manager"),
    *("wdb", "github", "office365", "ms-graph", "anti_tampering"),
]
MAY_BE_EMPTY = [
    *("syscheck", "rootcheck", "client_buffer", "sca", "vulnerability-detector", "indexer"),
    *("vulnerability-detection", "gcp-pubsub", "gcp-bucket", "fluent-forward", "auth", "logging"),
    'wodle name="x"',
]
V4, V43, V5, NONE = (f'{{"version": "{v}"}}' for v in ("4.14.9", "4.3.11", "5.0.0", "unknown"))
SOCK = "<socket>queue/sock</socket>"
OFF = "<enabled>no</enabled>"
AUTH_OFF = "<disabled>yes</disabled>"


class Case(NamedTuple):
    """A manager, and what is said of it: the words in each error and note, in order; but HOME."""

    text: str
    errors: tuple[tuple[str, ...], ...] = ()
    notes: tuple[tuple[str, ...], ...] = ()
    version: str | None = V4
    ran: int = 1  # how often exec_path was run
    asked: int = 0  # how often the socket was asked


def fails(text: str, *words: str, **other: Any) -> Case:
    """A configuration with one error, for which nothing is tried."""
    return Case(text, (words,), **{"ran": 0, **other})


def does_not_start(text: str, *words: str) -> Case:
    """A configuration with which authd does not start."""
    return fails(text, *words, "wazuh-authd does not start")


ASKS_NOBODY = ("ossec.conf", "<key_request>", "asks nobody")
NO_WODLE = ("ossec.conf", "no <wodle", "which managers before 4.4 need: ", "asks nobody")
VERSION_UNKNOWN = ("version", "unknown")
ONE = "<ossec_config>%s</ossec_config>"
BAD_ENABLED = ("Yes", "YES", " yes", "yes ", " yes ", "\nyes\n", "true", "1", "", "no ", "No")
BAD_TIMEOUTS = ("0", "-5", "x", "", "inf", "nan", "-", "99999999999999999999", "9" * 5000)
BAD_THREADS = ("0", "33", "64", "two", "", "-1", "99999999999999999999")
BAD_QUEUES = ("0", "two", "", "-1")
GOOD_TIMEOUTS = ("7200", "60s", "11", " 30", "\n45", "+20", "0012x", "4294967294")
SETTINGS = {
    "one": Case(key_request(EXEC)),
    "enabled": Case(key_request("<enabled>yes</enabled>" + EXEC)),
    "with attributes": Case(
        key_request(EXEC).replace("<key_request>", "<key_request enabled=\"yes\" x='1'>")
    ),
    "an attribute of a setting": Case(key_request(EXEC.replace("path>bin", 'path a="b">bin'))),
    "other options": Case(key_request(EXEC + "<threads>4</threads><queue_size>9</queue_size>")),
    "at the limits": Case(
        key_request(EXEC + "<threads>32</threads><queue_size>220000</queue_size>")
    ),
    "numbers with more behind": Case(
        key_request("<threads>4x</threads><queue_size> 9 </queue_size>" + EXEC)
    ),
    "force_insert": Case(key_request("<force_insert>x</force_insert>" + EXEC)),
    "an unknown setting": Case(
        key_request("<exec-path>x</exec-path>" + EXEC), (), (("exec-path", "no such setting"),)
    ),
    "the later of two": Case(key_request("<exec_path>bin/none</exec_path>" + EXEC)),
    "a comment in it": Case(key_request("<!-- <enabled>no</enabled> -->" + EXEC)),
    "in the second root": Case(ONE % "<auth></auth>" + "\n" + key_request(EXEC)),
    "text around": Case("text " + key_request(EXEC) + " text"),
    "spaces around a command": Case(key_request("<exec_path>bin/ask  -v  </exec_path>")),
    "no key_request": fails(ONE % "<auth></auth>", *ASKS_NOBODY),
    "no auth, no key_request": fails(ONE % "", *ASKS_NOBODY),
    "an empty file": fails("", *ASKS_NOBODY),
    "an empty key_request": fails(key_request(""), "asks nobody"),
    "in a comment": fails(f"<!-- {key_request(EXEC)} -->", *ASKS_NOBODY),
    "neither way": fails(key_request("<enabled>yes</enabled>"), "exec_path", "socket"),
    # disabled: which of the two, and where
    "not enabled": fails(key_request("\n" + OFF + EXEC), "line 2: <enabled>no</enabled>"),
    "auth disabled": fails(
        key_request(EXEC, "\n\n" + AUTH_OFF), "line 3: <disabled>yes</disabled> in <auth>"
    ),
    "disabled in the second root": fails(
        key_request(EXEC) + "\n" + ONE % f"<auth>{AUTH_OFF}</auth>", "line 2: <disabled>"
    ),
    "disabled, then not": Case(key_request(EXEC, AUTH_OFF + "<disabled>no</disabled>")),
    "enabled, then not": fails(key_request("<enabled>yes</enabled>" + EXEC + OFF), "<enabled>no"),
    "a wodle, but no auth": fails(
        wodle(EXEC).replace("<auth></auth>", ""), "no <auth>", "authd is disabled"
    ),
    # a bad value, and what comes after it
    **{
        f"enabled, bad, first: {text!r}": fails(
            key_request(f"<enabled>{text}</enabled>\n" + EXEC),
            "line 1: <enabled>",
            "neither yes nor no",
            "reads no further",
            "does not set exec_path",
            "asks nobody",
        )
        for text in BAD_ENABLED
    },
    **{
        f"enabled, bad, last: {text!r}": Case(
            key_request(EXEC + f"\n<enabled>{text}</enabled>"),
            (),
            (("line 2: <enabled>", "neither yes nor no", "reads no further"),),
        )
        for text in BAD_ENABLED
    },
    **{
        f"timeout, bad, first: {text[:30]!r}": fails(
            key_request(f"<timeout>{text}</timeout>" + EXEC), "<timeout>", "does not set exec_path"
        )
        for text in BAD_TIMEOUTS
    },
    **{
        f"timeout, bad, last: {text[:30]!r}": Case(
            key_request(EXEC + f"<timeout>{text}</timeout>"), (), (("<timeout>", "no further"),)
        )
        for text in BAD_TIMEOUTS
    },
    **{
        f"threads, bad, first: {text!r}": fails(
            key_request(f"<threads>{text}</threads>" + EXEC), "<threads>", "does not set exec_path"
        )
        for text in BAD_THREADS
    },
    **{
        f"threads, bad, last: {text!r}": fails(
            key_request(EXEC + f"\n<threads>{text}</threads>"), "line 2: <threads>", "nobody is"
        )
        for text in BAD_THREADS
    },
    **{
        f"queue_size, bad, last: {text!r}": fails(
            key_request(EXEC + f"<queue_size>{text}</queue_size>"), "<queue_size>", "nobody is"
        )
        for text in BAD_QUEUES
    },
    "a queue of one": fails(key_request("<queue_size>1</queue_size>" + EXEC), "queue", "nobody"),
    "a queue too long, last": Case(
        key_request(EXEC + "<queue_size>220001</queue_size>"), (), (("220001", "no further"),)
    ),
    **{
        f"timeout, good: {text!r}": Case(key_request(EXEC + f"<timeout>{text}</timeout>"))
        for text in GOOD_TIMEOUTS
    },
    "an empty exec_path, first": fails(
        key_request("<exec_path></exec_path>" + EXEC), "exec_path", "is empty", "asks nobody"
    ),
    "an empty exec_path, last": fails(
        key_request(EXEC + "<exec_path></exec_path>"), "exec_path", "is empty", "asks nobody"
    ),
    "a space before exec_path": fails(
        key_request("<exec_path> bin/ask</exec_path>"), "begins with a space", "asks nobody"
    ),
    "a socket, then a space before exec_path": Case(
        key_request(SOCK + "<exec_path> bin/ask</exec_path>"),
        (("begins with a space", "does not set exec_path"),),
        ran=0,
        asked=1,
    ),
    "an empty socket, first": fails(
        key_request("<socket></socket>" + EXEC), "does not set exec_path, socket", "asks nobody"
    ),
    "an empty socket, last": Case(
        key_request(EXEC + "<socket></socket>"), (("<socket></socket>", "does not set socket"),)
    ),
    "a space before socket": Case(
        key_request(EXEC + "<socket> queue/sock</socket>"), (("begins with a space", "socket"),)
    ),
    "exec_path too long": fails(
        key_request(f"<exec_path>bin/ask {'x' * 4088}</exec_path>"), "too long", "asks nobody"
    ),
    "exec_path as long as may be": Case(
        key_request(f"<exec_path>bin/ask {'x' * 4087}</exec_path>")
    ),
    "a newline before exec_path": Case(
        key_request("<exec_path>\nbin/ask</exec_path>"),
        (("exec_path cannot be run", "?bin/ask", "No such file"),),
        (("white space around <exec_path>",),),
        ran=0,
    ),
    "a tab before exec_path": Case(
        key_request("<exec_path>\tbin/ask</exec_path>"),
        (("exec_path cannot be run", "?bin/ask", "No such file"),),
        (("white space around <exec_path>",),),
        ran=0,
    ),
    "a newline after exec_path": Case(
        key_request("<exec_path>bin/ask\n</exec_path>"),
        (("exec_path cannot be run", "bin/ask?", "No such file"),),
        (("white space around <exec_path>",),),
        ran=0,
    ),
    **{
        f"white space around socket: {text!r}": Case(
            key_request(f"<socket>{text}</socket>"),
            (("socket ", "No such file"),),
            (("white space around <socket>",),),
            ran=0,
        )
        for text in ("queue/sock ", "queue/sock\n", "\nqueue/sock", "\tqueue/sock")
    },
    # several blocks
    "two, the first is wrong": Case(
        key_request("<exec_path>bin/none</exec_path>") + "\n" + key_request(EXEC),
        (("bin/none", "No such file"),),
        (("line 2", "key_request", "not read", "line 1"),),
        ran=0,
    ),
    "two, the second is wrong": Case(
        key_request(EXEC) + "\n" + key_request("<enabled>x</enabled>"),
        (),
        (("line 2", "key_request", "not read", "line 1"),),
    ),
    "two in one auth": fails(
        key_request(EXEC, f"\n<key_request>{SOCK}{OFF}</key_request>\n"),
        "line 2: <enabled>no</enabled>",
        notes=(("line 3", "key_request", "not read", "line 2"),),
    ),
    "two, the first has no path": fails(
        key_request(EXEC, "<key_request><enabled>yes</enabled></key_request>\n"),
        "line 1: <key_request> sets no exec_path and no socket",
        notes=(("line 2", "key_request", "not read", "line 1"),),
    ),
    "an empty one first": Case(key_request(EXEC, "<key_request></key_request>")),
    "an empty one with a comment first": Case(
        key_request(EXEC, "<key_request><!-- --></key_request>")
    ),
    # a wodle
    "wodle": Case(wodle(EXEC)),
    "wodle, auth disabled": fails(
        wodle(EXEC).replace("<auth>", "<auth>" + AUTH_OFF), "<disabled>yes</disabled>"
    ),
    "another wodle": fails(wodle(EXEC).replace("agent-key-polling", "x"), *ASKS_NOBODY),
    "wodle, another attribute first": fails(
        wodle(EXEC).replace("name=", "x='' name="), *ASKS_NOBODY
    ),
    "wodle and server: the fall-back": Case(
        wodle(SOCK + "<exec_path>bin/ask --serve</exec_path>"),
        version='{"version": "4.4.0"}',
        asked=1,
    ),
    "two wodles": Case(
        wodle("<exec_path>bin/none</exec_path>") + "\n" + wodle(EXEC), (), (("line 1", "later"),)
    ),
    "two wodles, the later keeps the path": Case(
        wodle(EXEC) + "\n" + wodle("<timeout>30</timeout>"), (), (("line 1", "later"),)
    ),
    "wodle, then key_request": Case(wodle("<exec_path>bin/none</exec_path>") + key_request(EXEC)),
    "wodle, then key_request without a path": Case(
        wodle(EXEC) + key_request("<timeout>30</timeout>")
    ),
    "key_request, then a wodle": Case(
        key_request(EXEC) + "\n" + wodle("<enabled>x</enabled>"),
        (),
        (("line 2", "wodle", "not read", "line 1"),),
    ),
    # authd does not start
    "wodle, bad": does_not_start(wodle(EXEC + "<enabled>x</enabled>"), "<enabled>x"),
    "wodle, bad, before key_request": does_not_start(
        wodle("<timeout>0</timeout>") + key_request(EXEC), "line 1: <timeout>0"
    ),
    "wodle without a name": does_not_start(
        key_request(EXEC) + ONE % "<wodle></wodle>", "<wodle> has no name"
    ),
    **{
        f"in auth: {text}": does_not_start(in_auth(f"\n{text}"), "line 2: <", words)
        for text, words in (
            ("<disabled>No</disabled>", "<disabled>No</disabled> is no value"),
            ("<disabled> no</disabled>", "<disabled> no</disabled> is no value"),
            ("<disabled></disabled>", "is no value"),
            ("<port>abc</port>", "<port>abc</port> is no value"),
            ("<port>0</port>", "is no value"),
            ("<port>65536</port>", "is no value"),
            (f"<port>{10**18}</port>", "is no value"),
            (f"<port>-{10**19}</port>", "is no value"),
            ("<use_password>true</use_password>", "is no value"),
            ("<use_source_ip>1</use_source_ip>", "is no value"),
            ("<purge>YES</purge>", "is no value"),
            ("<ssl_verify_host/>", "is no value"),
            ("<ssl_auto_negotiate>maybe</ssl_auto_negotiate>", "is no value"),
            ("<remote_enrollment>y</remote_enrollment>", "is no value"),
            ("<force_insert>x</force_insert>", "is no value"),
            ("<force_time>-1</force_time>", "is no value"),
            ("<ipv6>maybe</ipv6>", "is no value"),
            ("<unknown>x</unknown>", "<unknown> is no tag of <auth>"),
            ("<exec_path>x</exec_path>", "<exec_path> is no tag of <auth>"),
            ("<Disabled>no</Disabled>", "<Disabled> is no tag of <auth>"),
            ("<key-request></key-request>", "<key-request> is no tag of <auth>"),
            ("<force></force>", "is no value"),
            ("<force><x>1</x></force>", "<x> is no tag of <force>"),
            ("<force><enabled>Yes</enabled></force>", "is no value that <force>"),
            ("<force><key_mismatch/></force>", "is no value that <force>"),
            ("<force><disconnected_time>1h</disconnected_time></force>", "is no value"),
            (
                '<force><disconnected_time enabled="yes">x</disconnected_time></force>',
                "is no value",
            ),
            (
                '<force><disconnected_time x="" enabled="no">1h</disconnected_time></force>',
                "is no value",
            ),
            (
                "<force><after_registration_time>1y</after_registration_time></force>",
                "is no value",
            ),
        )
    },
    **{
        f"in ossec_config: {text}": does_not_start(
            key_request(EXEC) + f"\n<ossec_config>{text}</ossec_config>", "line 2: <", words
        )
        for text, words in (
            ("<unknown>x</unknown>", "<unknown> is no tag of <ossec_config>"),
            (f"<key_request>{EXEC}</key_request>", "<key_request> is no tag of"),
            ("<Auth></Auth>", "<Auth> is no tag of"),
            *((f"<{tag}></{tag}>", f"<{tag}> is empty") for tag in NEVER_EMPTY),
            ("<remote>x</remote>", "<remote> is empty"),
        )
    },
    "outside": does_not_start(
        key_request(EXEC) + "\n<auth></auth>", "line 2: <auth> stands outside"
    ),
    "an XML line": does_not_start('<?xml version="1.0"?>\n' + key_request(EXEC), "1226", "<?xml"),
    "a document type": does_not_start("<!DOCTYPE ossec_config>\n" + key_request(EXEC), "1226"),
    "no quotes": does_not_start(
        key_request(EXEC).replace("<key_request>", "<key_request enabled=yes>"), "1226", "enabled"
    ),
    "no value of an attribute": does_not_start(
        key_request(EXEC).replace("<auth>", "<auth enabled>"), "1226", "enabled"
    ),
    "not closed": does_not_start(key_request(EXEC)[:-15], "1226", "is not closed"),
    "a raw less-than": does_not_start(key_request("<exec_path>bin/ask <in</exec_path>"), "1226"),
    "a raw less-than that makes an empty element": Case(
        key_request("<exec_path>bin/ask < /dev/null</exec_path>"),
        (("exec_path cannot be run: dev/null", "No such file"),),
        ran=0,
    ),
    "all that auth may have": Case(
        in_auth(
            "<port>1515</port><ipv6>NO</ipv6><use_source_ip>no</use_source_ip>"
            "<force_insert>yes</force_insert><force_time>0x</force_time><purge>yes</purge>"
            "<limit_maxagents>x</limit_maxagents><ciphers></ciphers><ssl_agent_ca/>"
            "<ssl_manager_cert>x</ssl_manager_cert><ssl_manager_key>x</ssl_manager_key>"
            "<agents><x/></agents><force><enabled>yes</enabled><key_mismatch>no</key_mismatch>"
            '<disconnected_time enabled="yes">1h</disconnected_time>'
            '<disconnected_time enabled="no">x</disconnected_time>'
            "<after_registration_time> 30</after_registration_time></force>"
        )
    ),
    "all that ossec_config may have": Case(
        key_request(EXEC)
        + ONE % "".join(f"<{tag}><x/></{tag}>" for tag in NEVER_EMPTY)
        + ONE % "".join(f"<{tag}/>" for tag in MAY_BE_EMPTY)
    ),
}


def old(case: Case) -> Case:
    """The same on a manager of 4.3."""
    return case._replace(version=V43)


SERVER = "<exec_path>bin/ask --serve --socket queue/sock</exec_path>"
VERSIONS = {
    "4.3": old(Case(wodle(EXEC))),
    "4.3, single quotes": old(Case(wodle(EXEC).replace('"', "'"))),
    "4.3, not enabled": old(fails(wodle(OFF + EXEC), "<enabled>no</enabled>")),
    "4.3, another wodle": old(fails(wodle(EXEC).replace("agent-key-polling", "x"), *NO_WODLE)),
    "4.3, key_request": old(
        fails(key_request(EXEC), "<key_request> is no tag of <auth> before 4.4")
    ),
    "4.3, an empty socket": old(fails(wodle("<socket></socket>" + EXEC), "<socket></socket>")),
    "4.3, socket": old(Case(wodle(SOCK), ran=0, asked=1)),
    "4.3, socket and exec_path": old(Case(wodle(SOCK + EXEC), (("--serve",),), ran=0, asked=1)),
    "4.3, socket and server": old(Case(wodle(SOCK + SERVER), ran=0, asked=1)),
    "4.3, two wodles": old(
        Case(wodle(SOCK + SERVER) + "\n" + wodle(EXEC), (), (("line 1", "later"),))
    ),
    "4.4": Case(key_request(EXEC), version='{"version": "v4.4.0"}'),
    "unknown": Case(key_request(EXEC), (), (VERSION_UNKNOWN,), None),
    "unknown, wodle": Case(wodle(EXEC), (), (VERSION_UNKNOWN,), None),
    "unknown, neither": fails(ONE % "", *ASKS_NOBODY, notes=(VERSION_UNKNOWN,), version=None),
    # before 4.4 exec_path is the server of the socket, later it is the fall-back
    "unknown, socket and server": Case(wodle(SOCK + SERVER), (), (VERSION_UNKNOWN,), None, 0, 1),
    "unknown, key_request and socket": Case(
        key_request(SOCK + EXEC), (), (VERSION_UNKNOWN,), None, 1, 1
    ),
    **{
        f"unknown: {text}": Case(wodle(EXEC), (), (VERSION_UNKNOWN,), text)
        for text in (NONE, '{"version": 4}', "[]", "4.14.7", "", "\xe9")
    },
    "5.0": fails(ONE % "", "5.0", "asks nobody", "--enroll", version=V5),
    "5.1, key_request": fails(
        key_request(EXEC), "5.1", "asks nobody", "--enroll", version='{"version": "5.1.2"}'
    ),
}
WAYS = {
    "timeout as ours": Case(
        key_request("<exec_path>bin/ask --timeout 10</exec_path><timeout>10</timeout>"),
        (),
        (("timeout, 10 s", "10 s"),),
    ),
    "timeout of a manager that names none": Case(
        key_request("<exec_path>bin/ask --timeout 60</exec_path>"), (), (("timeout, 60 s", "60 s"),)
    ),
    "timeout of a manager that names none, longer": Case(
        key_request("<exec_path>bin/ask --timeout 59.9</exec_path>")
    ),
    "timeout shorter than --timeout": Case(
        key_request("<exec_path>bin/ask --timeout 20</exec_path><timeout>15</timeout>"),
        (),
        (("timeout", "15 s", "20 s"),),
    ),
    "timeout longer than --timeout": Case(
        key_request("<exec_path>bin/ask --db x --timeout=5</exec_path><timeout>6</timeout>")
    ),
    "timeout of a program that is not ours": Case(key_request(EXEC + "<timeout>10</timeout>")),
    "beyond ASCII": Case(
        key_request("<exec_path>bin/schl\u00fcssel</exec_path>"),
        (("bin/schl", "No such file"),),
        ran=0,
    ),
    "timeout of a server": Case(
        wodle(f"{SOCK}<exec_path>bin/{script.NAME} --serve</exec_path><timeout>5</timeout>"),
        (),
        (("timeout, 5 s", "exec_path, 5 s"),),
        V43,
        ran=0,
        asked=1,
    ),
    "timeout longer than that of a server": Case(
        wodle(f"{SOCK}<exec_path>bin/{script.NAME} --serve</exec_path><timeout>6</timeout>"),
        version=V43,
        ran=0,
        asked=1,
    ),
    "unclosed quote": fails(key_request('<exec_path>"bin/ask</exec_path>'), "exec_path", "quote"),
    "no program": Case(
        key_request("<exec_path>bin/none</exec_path>"),
        (("exec_path", "bin/none", "No such file"),),
        ran=0,
    ),
    "not executable": Case(
        key_request("<exec_path>bin/plain --db x</exec_path>"),
        (("exec_path", "bin/plain", "Permission denied"),),
        ran=0,
    ),
    "a folder": Case(
        key_request("<exec_path>./bin</exec_path>"),
        (("exec_path", "./bin", "Permission denied"),),
        ran=0,
    ),
    "socket": Case(key_request(SOCK), ran=0, asked=1),
    "socket and exec_path": Case(key_request(SOCK + EXEC), asked=1),
    "socket, nobody listens": Case(
        key_request("<socket>queue/stale</socket>"),
        (("queue/stale", "Connection refused"),),
        ran=0,
    ),
    "socket, nothing there": Case(
        key_request("<socket>/nowhere/sock</socket>"),
        (("/nowhere/sock", "No such file"),),
        ran=0,
    ),
}
CONFIGURATIONS = {**SETTINGS, **VERSIONS, **WAYS}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Each fault is an error that names what is wrong; what the manager does, is done."""
    text, errors, notes, version, ran, asked = CONFIGURATIONS[case]
    home.version(version)
    home.configure(text)
    home.program("bin/ask", f"echo x >>bin/ran\necho '{SOUND}'")
    home.program("bin/plain", "", 0o644)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(home.path / "queue/stale"))
    with answering(home.path / "queue/sock", SOUND.encode() + b"\n") as requests:
        said = command("--check", "--manager", home.path, "--db", store)
    for lines, expected in (said.errors, errors), (said.notes, notes):
        assert len(lines) == len(expected), said
        for line, words in zip(lines, expected, strict=True):
            assert all(word in line for word in words), line
    assert said.status == (1 if errors else 0) and not said.err
    runs = home.path / "bin/ran"
    assert (len(runs.read_text().splitlines()) if runs.exists() else 0) == ran
    assert requests == [b"id:00000000"] * asked
    for how, count in ("exec_path", ran), ("socket", asked):
        assert sum(line.startswith(f"{how} {ANSWERS}") for line in said.out) == count
    counts = f"{counted(len(errors), 'error')}, {counted(len(notes), 'note')}"
    assert said.out[-1] == f"3 agents, {counts}"


def counted(number: int, what: str) -> str:
    """Give `1 error` or `2 errors`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


INIT = 'DIRECTORY="{}"\nNAME="Wazuh"\nVERSION="v3.13.6"\nREVISION="31327"\nTYPE="server"\n'
CONTROL = '#!/bin/sh\n# wazuh-control\nDIR=x\nVERSION="v{}"\nREVISION="40800"\n'
FILES: dict[str, tuple[str | None, str | None, str | None, tuple[int, int]]] = {
    "VERSION.json": (V4, None, None, (4, 14)),
    "VERSION.json first": (V4, CONTROL.format("4.8.0"), INIT, (4, 14)),
    "wazuh-control": (None, CONTROL.format("4.8.0"), None, (4, 8)),
    "wazuh-control, 4.2": (None, CONTROL.format("4.2.7"), INIT, (4, 2)),
    "wazuh-control without a line": (None, "#!/bin/sh\n", INIT, (3, 13)),
    "a bad VERSION.json": (NONE, CONTROL.format("4.11.2"), None, (4, 11)),
    "ossec-init.conf": (None, None, INIT, (3, 13)),
    "ossec-init.conf of another": (None, None, INIT.replace("{}", "/opt/other"), (0, 0)),
    "ossec-init.conf without a directory": (None, None, 'VERSION="v3.9.0"\n', (3, 9)),
    "none": (None, None, None, (0, 0)),
}


@pytest.mark.parametrize("case", FILES)
def test_versions(case: str, home: Home) -> None:
    """From 4.12 on, from 4.2 on, and before they stand in three different files."""
    version, control, init, expected = FILES[case]
    home.version(version)
    if control:
        home.program("bin/wazuh-control", control, 0o750, "")
    if init:
        init = init.replace("{}", str(home.path))
        (home.path.parent / "ossec-init.conf").write_text(init)
    assert script.version_of(str(home.path)) == expected


@pytest.mark.parametrize("control", ["4.4.0", "4.11.2"])
def test_an_old_wodle_that_was_kept(
    control: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """From 4.4 on its exec_path is the fall-back; these managers have no VERSION.json."""
    home.version(None)
    home.program("bin/wazuh-control", CONTROL.format(control), start="")
    home.configure(wodle(SOCK + EXEC))
    home.program("bin/ask", f"echo '{SOUND}'")
    with answering(home.path / "queue/sock", SOUND.encode()):
        said = command("--check", "--manager", home.path, "--db", store)
    assert said.status == 0 and not said.notes, said
    assert sum(ANSWERS in line for line in said.out) == 2


@pytest.mark.parametrize("version", [V5, None], ids=["VERSION.json", "nothing else"])
def test_a_manager_of_5_has_another_file(
    version: str | None, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Its name is wazuh-manager.conf, and only managers from 5.0 on have it."""
    home.version(version)
    (home.path / "etc/ossec.conf").unlink()
    home.configure("<wazuh_config></wazuh_config>", "wazuh-manager.conf")
    said = command("--check", "--manager", home.path, "--db", store)
    assert len(said.errors) == 1 and not said.err and not said.notes
    assert "5.0" in said.errors[0] and "--enroll" in said.errors[0]


def test_the_folder_that_exists(
    home: Home, store: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without HOME it is /var/ossec, or /var/wazuh-manager, where only that exists."""
    assert script.HOMES == ("/var/ossec", "/var/wazuh-manager")
    other = Home(home.path.parent / "other")
    other.version(V5)
    for homes, word in (
        ((home, other), "ossec.conf has no <key_request>"),
        ((other, home), "5.0"),
        ((Path("/nowhere"), other), "5.0"),
    ):
        paths = tuple(str(getattr(one, "path", one)) for one in homes)
        monkeypatch.setattr(script, "HOMES", paths)
        said = command("--db", store, "--check", "--manager")
        assert len(said.errors) == 1 and word in said.errors[0], homes
    monkeypatch.setattr(script, "HOMES", ("/nowhere/a", "/nowhere/b"))
    said = command("--db", store, "--enroll", "--manager")
    assert "/nowhere/a" in said.err[0], "the first, where neither exists"


# ---------------------------------------------------------------- what comes of asking

DATA = f'{{"id": "001", "name": "a", "ip": "any", "key": "{SECRET}x"}}'
VERDICTS: dict[str, tuple[bytes, bool, str]] = {
    "sound": (SOUND.encode() + b"\n", True, ""),
    "blanks before": (b" \n\t" + SOUND.encode(), True, ""),
    "text after": (SOUND.encode() + b"\nwarning: {}\n", True, ""),
    "text before": (b"warning: x\n" + SOUND.encode(), False, "text before the JSON"),
    "no JSON": (b"Traceback (most recent call last)\n", False, "no JSON"),
    "half of it": (SOUND.encode()[:-9], False, "JSON"),
    "nothing": (b"", False, "no answer"),
    "blanks alone": (b"\n", False, "no"),
    "a list": (b"[4]", False, "JSON"),
    "a number": (b"4", False, "JSON"),
    "no error": (b'{"message": "x"}', False, "JSON"),
    "no message": (b'{"error": 2}', False, "gave error 2, no message"),
    "another error": (b'{"error": 2, "message": "Cannot read"}', False, "error 2, Cannot read"),
    "bad words": (b'{"error": 3, "message": "Bad arguments given"}', False, "error 3"),
    "an agent": (b'{"error": 0, "data": %s}' % DATA.encode(), False, "error 0"),
    "a message that is none": (b'{"error": 2, "message": [1]}', False, "error 2"),
    "beyond ASCII": (b'{"error": 4, "message": "\xc3\xa9\xff"}', True, ""),
    "a number that is no integer": (b'{"error": 4.0, "message": "x"}', False, "no number"),
    "null": (b'{"error": null, "message": "x"}', False, "no number"),
    "an error of 4,000 digits": (b'{"error": %s}' % (b"9" * 4000), False, "gave error 9999"),
    "an error of 5,000 digits": (b'{"error": %s}' % (b"9" * 5000), False, "gave "),
    "a message of 4,000 letters": (
        b'{"error": 2, "message": "%s"}' % (b"x" * 4000),
        False,
        "error 2",
    ),
    "a number that is a text": (b'{"error": "4", "message": "x"}', False, "no number"),
    "true": (b'{"error": true, "message": "x"}', False, "no number"),
    "a key in a list": (b'{"error": ["%s"]}' % SECRET.encode(), False, "no number"),
    "an agent that nobody has": (b'{"error": 0}', False, "hands out a key"),
    "zero bytes": (b"\0" * 9, False, "no JSON"),
}


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[bool, str]:
    """Whether it goes well, and what is said of it."""
    try:
        function(*arguments)
    except script.AskingError as problem:
        return False, str(problem)
    return True, ""


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case: str) -> None:
    """What the manager makes of an answer, in words, and never what is in it."""
    output, well, words = VERDICTS[case]
    is_well, text = outcome(script.check_answer, output)
    assert (is_well, words in text) == (well, True), text
    assert SECRET not in text and script.printable(text) == text and len(text) < 600


PROGRAMS = {
    "text before": (f"echo oops >&2; echo '{SOUND}'", "text before the JSON"),
    "text after": (f"echo '{SOUND}'; echo oops >&2", ANSWERS),
    "a status": (f"echo '{SOUND}'; exit 3", "status 3"),
    "a mistake": ("echo agent_key_request: error: Oops 1; echo More; exit 2", "away. agent_key"),
    "a signal": ("kill -KILL $$", "signal 9"),
    "nothing": ("exit 0", "no answer"),
    "a flood": ("exec 2>&1; yes & sleep 0.2; kill -KILL $!; wait; exit 3", "status 3"),
    "much": (f"echo '{SOUND}'; head -c 1000000 /dev/zero", ANSWERS),
    "an empty file": ("", "no answer"),
    "a command that is missing": ("no_such_command", "throws the output away, in "),
    "a key": (f"echo {SECRET}; exit 3", "status 3: the manager throws the output away, in"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Both outputs are one, and the status counts."""
    body, words = PROGRAMS[case]
    home.program("bin/ask", body)
    home.configure(key_request(EXEC))
    said = command("--check", "--manager", home.path, "--db", store)
    lines = [line for line in said.out if "exec_path" in line and "known" not in line]
    assert len(lines) == 1 and words in lines[0] and re.search(r"in [0-9.]+ ms$", lines[0]), said
    assert case != "a mistake" or "error: Oops 1, in" in lines[0]  # its first line
    well = words == ANSWERS
    assert (said.status, lines[0].startswith("error: ")) == (not well, not well)


def test_silence_is_waited_for_as_long_as_the_manager_waits(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Then it is said, and what was started is ended, its children, too."""
    fifo = home.path / "bin/fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    program = home.program("bin/ask", f"exec 3>{fifo}\necho >&3\nsleep 100 &\nwait")
    well, text = outcome(script.run_as_manager, str(home.path), [str(program)], 0.5)
    assert not well and "silent" in text and "0.5 s" in text
    assert os.read(reader, 9) == b"\n"
    assert select.select([reader], [], [], 60)[0], "a child goes on"  # nobody writes any more
    os.close(reader)
    home.configure(key_request(SOCK + "<timeout>1</timeout>"))
    with answering(home.path / "queue/sock", b"") as requests:
        said = command("--check", "--manager", home.path, "--db", store)
    (line,) = said.errors
    assert "queue/sock" in line and "timed out" in line and requests


def test_what_goes_on_after_the_time_is_ended(home: Home) -> None:
    """A program that prints, and does not end, is as late as a silent one."""
    program = home.program("bin/ask", f"echo '{SOUND}'\nexec >/dev/null 2>&1\nsleep 100")
    started = time.monotonic()
    well, text = outcome(script.run_as_manager, str(home.path), [str(program)], 0.3)
    assert not well and "did not end" in text and time.monotonic() - started < 10


def test_nobody_waits_as_long_as_a_manager_may(
    home: Home, store: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager takes a timeout of two hours."""
    monkeypatch.setattr(script, "PATIENCE", 0.5)
    home.program("bin/ask", "sleep 100")
    home.configure(key_request(EXEC + "<timeout>7200</timeout>"))
    said = command("--check", "--manager", home.path, "--db", store)
    assert len(said.errors) == 1 and "within 0.5 s" in said.errors[0]


def test_a_broken_pipe_is_ignored_as_by_the_manager(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """A shell takes over what it finds; a Python ignores it in any case."""
    home.program("bin/ask", f"grep SigIgn /proc/$$/status >seen; echo '{SOUND}'")
    home.configure(key_request(EXEC))
    assert command("--check", "--manager", home.path, "--db", store).status == 0
    ignored = int((home.path / "seen").read_text().split()[1], 16)
    assert ignored >> 12 & 1


CANNOT_START = {
    "CRLF": ("#!/bin/sh\r\n", ("CR LF", "interpreter /bin/sh cannot start", "sed -i")),
    "CRLF, an option": ("#!/usr/bin/python3 -I\r\n", ("CR LF", "/usr/bin/python3")),
    "CRLF, env": ("#!/usr/bin/env python3\r\n", ("CR LF", "interpreter python3 cannot start")),
    "no interpreter": ("#!/opt/python9/bin/python\n", ("interpreter /opt/python9/bin/python",)),
    "no interpreter, env": ("#!/usr/bin/env python9\n", ("interpreter python9 does not exist",)),
    "a return alone": ("#!/no/such/sh\r\n\r\n", ("CR LF", "/no/such/sh")),
    "a blank": ("#! /no/such/perl -w\n", ("interpreter /no/such/perl does not exist",)),
}


@pytest.mark.parametrize("case", CANNOT_START)
def test_a_script_that_cannot_be_started(
    case: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """The kernel says `No such file`, although the script is there; ours names the interpreter."""
    start, words = CANNOT_START[case]
    home.program("bin/ask", f"echo '{SOUND}'", start=start)
    home.configure(key_request(EXEC))
    said = command("--check", "--manager", home.path, "--db", store)
    (line,) = said.errors
    assert line.startswith("error: exec_path ") and "bin/ask: its" in line
    assert all(word in line for word in words), line


def test_a_script_without_a_first_line(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """The manager's execvp starts a shell for it."""
    home.program("bin/ask", f"test $# = 3 && echo '{SOUND}'", start="")
    home.configure(key_request("<exec_path>bin/ask x</exec_path>"))
    assert command("--check", "--manager", home.path, "--db", store).status == 0


COMMANDS: dict[str, list[str]] = {
    "": [],
    "  a   b ": ["a", "b"],
    'a "b c" d': ["a", "b c", "d"],
    'a "" b': ["a", "", "b"],
    'x"y z"w': ["xy zw"],
    r"a\ b c": ["a b", "c"],
    r"\"a\\": ['"a\\'],
    r'"a\b\""': ['ab"'],
    "a 'b c' $HOME;*": ["a", "'b", "c'", "$HOME;*"],
    "\ta\nb c": ["\ta\nb", "c"],
    'a "b c': ["a", "b c"],
    "a \\": ["a", ""],
}


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_is_split_as_the_manager_splits_it(text: str) -> None:
    """At spaces only; `"` and a backslash quote."""
    assert script.split_command(text) == COMMANDS[text]


PROBE = """
import json, os, sys
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
masks = {name: int(status[name], 16) for name in ("SigBlk", "SigIgn")}
json.dump({
    "words": sys.argv[1:],
    "folder": os.getcwd(),
    "blocked": [number for number in (1, 2, 15) if masks["SigBlk"] >> number - 1 & 1],
    "pipe ignored": masks["SigIgn"] >> 12 & 1,
    "input": os.readlink("/proc/self/fd/0"),
    "one pipe": os.readlink("/proc/self/fd/1") == os.readlink("/proc/self/fd/2"),
    "is a pipe": os.readlink("/proc/self/fd/1").startswith("pipe:"),
    "others open": sorted(os.listdir("/proc/self/fd"))[3:-1],
    "own session": os.getsid(0) == os.getpid(),
    "umask": os.umask(0),
}, open("seen.json", "w"))
print('{"error": 4, "message": "No agent key found"}')
"""


def test_exec_path_is_run_as_the_manager_runs_it(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """MANAGER.md, "Executable method": no shell, and all that differs from a shell's child."""
    (home.path / "bin/a#X p").write_text(PROBE)
    words = rf'''"{sys.executable}" -IS  bin/a#X\ p --db "b c" 'd e' $HOME *.x "" \"&&\\ '''
    home.configure(key_request(f"<exec_path>{words}</exec_path>"))
    mask, own_input = os.umask(0o077), os.dup(0)
    try:
        with store.open() as other:
            os.dup2(other.fileno(), 0)
        said = command("--check", "--manager", home.path, "--db", store)
    finally:
        os.umask(mask)
        os.dup2(own_input, 0)
        os.close(own_input)
    assert said.status == 0, said
    seen = json.loads((home.path / "seen.json").read_text())
    expected = ["--db", "b c", "'d", "e'", "$HOME", "*.x", "", '"&&\\', "id", "00000000"]
    assert seen.pop("words") == expected
    assert seen == {
        "folder": str(home.path),
        "blocked": [1, 2, 15],
        "pipe ignored": 1,
        "input": "/dev/null",
        "one pipe": True,
        "is a pipe": True,
        "others open": [],
        "own session": True,
        "umask": 0o022,
    }


def test_a_real_home_reads_as_healthy(ask: Caller, home: Home, store: Path) -> None:
    """The script itself as exec_path: status 0, and nothing to complain of."""
    home.keys(AGENTS)
    home.configure(key_request(f"<exec_path>{SCRIPT} --db {store}</exec_path>"))
    answer = ask.call("--db", store, "--check", "--manager", home.path)
    *before, sound, counts, summary = answer.output.decode().splitlines()
    assert not before and answer.status == 0, answer
    assert sound.startswith(f"exec_path {ANSWERS}")
    assert counts == f"{store}: 3 enrolled, 0 not, 0 with another name, address or key"
    assert summary == "3 agents, 0 errors, 0 notes"


def test_json(ask: Caller, home: Home, store: Path) -> None:
    """The same findings, for programs: one object, whatever was found."""
    home.configure(key_request("<exec_path>bin/none</exec_path>"))
    home.version(None)
    answer = ask.call("--db", store, "--check", "--manager", home.path, "--json")
    found = json.loads(answer.output)
    assert (answer.status, found["agents"], found["errors"], found["notes"]) == (1, 3, 1, 1)
    texts: dict[str, list[str]] = {level: [] for level in ("error", "note", "info")}
    for finding in found["findings"]:
        texts[finding["level"]].append(finding["text"])
    assert len(texts["error"]) == len(texts["note"]) == 1
    assert "agent 001: not enrolled" in texts["info"]
    assert any("3 not" in text for text in texts["info"])


def replace_by_folder(path: Path) -> None:
    """Make PATH something that cannot be read."""
    path.unlink()
    path.mkdir()


UNREADABLE: dict[str, Callable[[Home], Any]] = {
    "etc/ossec.conf": lambda home: (home.path / "etc/ossec.conf").unlink(),
    "etc/ossec.conf: not a reg": lambda home: replace_by_folder(home.path / "etc/ossec.conf"),
    "etc/client.keys": lambda home: (home.path / "etc/client.keys").unlink(),
    "etc/client.keys: not a reg": lambda home: replace_by_folder(home.path / "etc/client.keys"),
    "etc/ossec.conf: ": lambda home: home.path.rename(home.path.parent / "moved"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_named(
    what: str, as_json: bool, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """One line of it, with the file's name; and --json gives an object in any case."""
    home.configure(key_request(EXEC))
    home.program("bin/ask", f"echo '{SOUND}'")
    UNREADABLE[what](home)
    options = ["--json"] if as_json else []
    said = command("--check", "--manager", home.path, "--db", store, *options)
    assert said.status == 1
    if as_json:
        found = json.loads("\n".join(said.out))
        lines = [finding["text"] for finding in found["findings"] if finding["level"] != "info"]
    else:
        lines = [line for line in said.out + said.err if str(home.path) in line]
    assert len(lines) == 1 and f"{home.path}/{what}" in lines[0], said


class Stranger:
    """Calls the script as somebody who is neither root nor the manager."""

    def __init__(self, ask: Caller, script_for_all: Path, home: Home) -> None:
        """Take what it is called with."""
        self.ask, self.script, self.home = ask, script_for_all, home
        self.user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self.store = self.script.parent / "agents.keys"
        self.store.write_text("".join("{} {} {} {}\n".format(*row) for row in AGENTS))

    def __call__(self, task: str) -> tuple[int | None, list[str]]:
        """Give status and output of `--check` or `--enroll`."""
        words = ["--db", str(self.store), task, "--manager", str(self.home.path)]
        answer = self.ask.call(*words, script=self.script, user=self.user)
        return answer.status, answer.output.decode().splitlines()


@pytest.fixture
def stranger(ask: Caller, open_script: Path, home: Home) -> Stranger:
    """Call as one who has no rights; what is in his way, has the mode 0."""
    return Stranger(ask, open_script, home)


def test_who_may_not_read_it_is_told_so(home: Home, stranger: Stranger) -> None:
    """A manager's folders are root's and its group's; what is there is not another file."""
    (home.path / "etc").chmod(0)
    status, output = stranger("--check")
    (home.path / "etc").chmod(0o700)
    lines = [line for line in output if str(home.path) in line]
    assert status == 1 and len(lines) == 1, output
    assert f"{home.path}/etc/ossec.conf: Permission denied" in lines[0]


def test_files_of_the_managers_own_user(
    home: Home, store: Path, command: Callable[..., Said], nobody: int
) -> None:
    """`wazuh` owns /var/ossec/etc, and root trusts it as authd does; both commands work."""
    home.configure(ours(home, f"--db {store}"))
    with authd.running(home.path, [ALPHA]) as manager:
        os.chown(home.path / "etc", nobody, nobody)
        (home.path / "etc").chmod(0o770)
        os.chown(home.path / "etc/client.keys", nobody, nobody)
        said = command("--check", "--manager", home.path, "--db", store)
        assert said.status == 0 and "1 enrolled, 2 not" in said.out[-2], said
        assert command("--enroll", "--manager", home.path, "--db", store) == (0, [], [])
        assert manager.sent("add") == ["002", "003"]


@pytest.mark.parametrize("folder", ["etc", "."])
def test_files_that_a_stranger_can_replace(
    folder: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """A check would run what the configuration names, as root."""
    home.configure(ours(home, f"--db {store}"))
    home.program("bin/agent_key_request.py", "touch ran")
    (home.path / folder).chmod(0o777)
    with authd.running(home.path) as manager:
        said = command("--check", "--manager", home.path, "--db", store)
        assert not (home.path / "ran").exists()
        (error,) = said.errors
        assert "everybody may write to the directory" in error and "chmod o-w" in error
        said = command("--enroll", "--manager", home.path, "--db", store)
        assert said.status == 1 and "chmod o-w" in said.err[0] and not manager.messages


def test_what_nobody_has_foreseen(
    home: Home, store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is an error without the exception's text, and the check goes on."""

    def fail(*_: object) -> None:
        raise LookupError(SECRET)

    home.configure(key_request(EXEC))
    home.program("bin/ask", f"echo '{SOUND}'")
    monkeypatch.setattr(script, "check_answer", fail)
    assert script.main(["--db", str(store), "--check", "--manager", str(home.path)]) == 1
    out = capfd.readouterr().out.splitlines()
    assert re.fullmatch("error: Internal error: LookupError in line [0-9]+ of the script", out[0])
    assert out[1:] == ["3 agents, 1 error, 0 notes"]


def test_a_source_that_cannot_be_checked(home: Home, command: Callable[..., Said]) -> None:
    """Is told of, once."""
    said = command("--check", "--manager", home.path, "--db", home.path / "none.db")
    assert sum("none.db" in line for line in said.out + said.err) == 1, said
    assert said.out[-1].startswith("0 agents") and said.status == 1


# ---------------------------------------------------------------- who is enrolled

KEPT = "{0.id} {0.name} {0.ip} {0.key}"
COUNTS: dict[str, tuple[list[str | Record], tuple[int, int, int]]] = {
    "all": (list(AGENTS), (3, 0, 0)),
    "none": ([], (0, 3, 0)),
    "some": ([BETA], (1, 2, 0)),
    "more": ([*AGENTS, Record("004", "delta", "any", "x")], (3, 0, 0)),
    "another name": ([ALPHA._replace(name="Alpha"), BETA], (1, 1, 1)),
    "another address": ([ALPHA, BETA._replace(ip="2001:db8::3")], (1, 1, 1)),
    "another key": ([GAMMA._replace(key="x")], (0, 2, 1)),
    "any for an address": ([ALPHA._replace(ip="any")], (0, 2, 1)),
    "short spelling": ([KEPT.format(BETA)], (1, 2, 0)),
    "small letters": (["002 beta 2001:0db8:0:0:0:0:0:2 " + BETA.key], (1, 2, 0)),
    "a length that says nothing": (["001 alpha 10.0.0.1/32 " + ALPHA.key], (1, 2, 0)),
    "removed": (["001 !alpha 10.0.0.1 " + ALPHA.key, "002 #beta any x"], (0, 3, 0)),
    "removed, and there again": (["001 !alpha 10.0.0.9 x", ALPHA], (1, 2, 0)),
    "comments": (["# 001 alpha 10.0.0.1 x", " 002 beta any x", ALPHA], (1, 2, 0)),
    "a broken line": (["001 alpha", BETA], (1, 1, 1)),
    "an address that is none": (["001 alpha somewhere " + ALPHA.key], (0, 2, 1)),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """How many agents of the store the manager has; IPv6 in any spelling."""
    lines, counts = COUNTS[case]
    home.keys(lines)
    home.configure(ours(home, f"--db {store}"))
    said = command("--check", "--manager", home.path, "--db", store)
    enrolled, missing, different = counts
    assert said.out[-2] == (
        f"{store}: {enrolled} enrolled, {missing} not, "
        f"{different} with another name, address or key"
    )
    texts = [line for line in said.out if re.match("agent [0-9]+: ", line)]
    assert sum(": not enrolled" in text for text in texts) == missing
    assert sum(": enrolled with another " in text for text in texts) == different
    assert said.status == 0, "an agent is enrolled when it reports in"


NAMED = {
    "name": (ALPHA._replace(name="x"), "agent 001: enrolled with another name"),
    "address": (ALPHA._replace(ip="10.0.0.0/24"), "agent 001: enrolled with another ip"),
    "key": (ALPHA._replace(key=key(9)), "agent 001: enrolled with another key"),
    "two": (ALPHA._replace(name="x", key=key(9)), "agent 001: enrolled with another name and key"),
    "none": (Record("004", "x", "any", key(9)), "agent 001: not enrolled"),
}


@pytest.mark.parametrize("case", NAMED)
def test_agents_are_named(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Those that the manager has not, or has otherwise."""
    agent, text = NAMED[case]
    home.keys([agent, BETA, GAMMA])
    said = command("--check", "--manager", home.path, "--db", store)
    assert [line for line in said.out if line.startswith("agent 0")] == [text]


def test_a_hundred_agents_are_named(
    home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """First those that are enrolled otherwise, then how many more there are."""
    rows = [(f"{n:03d}", f"n{n}", "any", key(n)) for n in range(1, 1202)]
    home.keys(["1201 other any " + key(1201)])
    said = command("--check", "--manager", home.path, "--db", stores.sqlite(rows))
    named = [line for line in said.out if line.startswith("agent ")]
    assert len(named) == 100
    assert named[:2] == ["agent 1201: enrolled with another name", "agent 001: not enrolled"]
    assert "... and 1,101 more agents" in said.out
    assert "0 enrolled, 1,200 not, 1 with another" in said.out[-2]


def test_counting_many_may_take_its_time(
    home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """A million agents take longer than a request may."""
    rows = ((f"{number:05d}", f"n{number}", "any", key(number)) for number in range(10_000, 40_000))
    source = stores.sqlite(rows, PLAIN_SCHEMA + ";" + INDEXES)
    said = command("--check", "--manager", home.path, "--timeout", "0.05", "--db", source)
    assert "30,000 not" in said.out[-2]


# ---------------------------------------------------------------- which source the manager uses

OTHER = "the manager uses another source than this check: "


@pytest.fixture
def other(stores: Stores) -> Path:
    """Make a source of one agent that the store does not have."""
    return stores.csv([Record("077", "other", "any", key(77))])


def ours(home: Home, options: str = "") -> str:
    """Configure a program with our name that answers."""
    home.program("bin/agent_key_request.py", f"echo '{SOUND}'")
    return key_request(f"<exec_path>bin/agent_key_request.py {options}</exec_path>")


OF_EXEC_PATH: dict[str, Callable[[Path], str]] = {
    "db": lambda source: f"--db {source}",
    "db, joined": lambda source: f"--db={source}",
    "the later of two": lambda source: f"--db x --db {source}",
    "quoted": lambda source: f'"--db" "{source}"',
    "with other options": lambda source: f"--timeout 5 --db {source}",
    "relative to the home": lambda source: f"--db {os.path.relpath(source, source.parents[2])}",
}


@pytest.mark.parametrize("case", OF_EXEC_PATH)
def test_the_agents_of_the_managers_source_are_counted(
    case: str, home: Home, store: Path, other: Path, command: Callable[..., Said]
) -> None:
    """It is the --db in exec_path, not that of the check."""
    options = OF_EXEC_PATH[case](other)
    if case.startswith("relative"):
        options = f"--db {os.path.relpath(other, home.path)}"
    home.configure(ours(home, options))
    said = command("--check", "--manager", home.path, "--db", store)
    (note,) = said.notes
    assert note.startswith("note: " + OTHER) and str(store) in note
    assert "agent 077: not enrolled" in said.out and "agent 001: not enrolled" not in said.out
    name, _colon, counts = said.out[-2].partition(": ")
    assert os.path.samefile(name, other) and counts.startswith("0 enrolled, 1 not")


def test_the_same_source_by_another_name(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """A link, or a relative path, leads to the same."""
    link = home.path / "etc/link.db"
    link.symlink_to(store)
    for name in link, "etc/link.db", os.path.relpath(store, home.path):
        home.configure(ours(home, f"--db {name}"))
        said = command("--check", "--manager", home.path, "--db", store)
        assert not said.notes and "agent 001: not enrolled" in said.out, name


def test_the_environment_of_a_person_is_not_that_of_the_manager(
    home: Home, store: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """authd has no $AGENT_KEY_DB: without --db it asks for the agents of the usual store."""
    usual = home.path / "usual.keys"
    usual.write_text(f"077 other any {key(77)}\n")
    monkeypatch.setenv("AGENT_KEY_DB", str(store))
    monkeypatch.setattr(script, "STORE", str(usual))
    home.configure(ours(home))
    home.program("bin/agent_key_request.py", f"test -z \"$AGENT_KEY_DB\" || exit 3; echo '{SOUND}'")
    said = command("--check", "--manager", home.path)
    assert said.status == 0 and len(said.notes) == 1 and OTHER in said.notes[0], said
    assert "agent 077: not enrolled" in said.out


def test_a_source_of_the_manager_that_cannot_be_read(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Is an error, although the check's own is sound."""
    home.configure(ours(home, "--db /nowhere/agents.db"))
    said = command("--check", "--manager", home.path, "--db", store)
    (error,) = said.errors
    assert "/nowhere/agents.db" in error and "No such file" in error and said.status == 1


def test_the_time_of_a_program_with_our_name(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """It gives up after 10 s, if nothing else is said."""
    for seconds, notes in ((1, 1), (9, 1), (10, 1), (11, 0)):
        text = ours(home, f"--db {store}")
        home.configure(text.replace("</exec_path>", f"</exec_path><timeout>{seconds}</timeout>"))
        said = command("--check", "--manager", home.path, "--db", store)
        assert (len(said.notes), said.status) == (notes, 0), seconds
        assert all(f"timeout, {seconds} s" in note and "10 s" in note for note in said.notes)


def test_a_program_of_another_name(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Nobody knows what it reads, and so it is said."""
    home.program("bin/ask", f"echo '{SOUND}'")
    home.configure(key_request("<exec_path>bin/ask --db /nowhere</exec_path>"))
    said = command("--check", "--manager", home.path, "--db", store)
    assert said.status == 0 and not said.notes
    assert "which source the manager uses is not known: exec_path is not agent_key" in said.out[1]
    assert "agent 001: not enrolled" in said.out


@contextlib.contextmanager
def serving(*options: str | Path, **environment: str) -> Iterator[int]:
    """Run a server of ours; give its process id, when it listens."""
    command = [SCRIPT, "--serve", "--workers", "1", *options]
    path = Path(options[options.index("--socket") + 1])
    process = subprocess.Popen(command, env={"PATH": os.defpath, **environment})
    try:
        end = time.monotonic() + 30
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


HOW: dict[str, Callable[[Path], tuple[list[str], dict[str, str]]]] = {
    "db": lambda source: (["--db", str(source)], {}),
    "db, joined": lambda source: ([f"--db={source}"], {}),
    "environment": lambda source: ([], {"AGENT_KEY_DB": str(source)}),
}


@pytest.mark.parametrize("how", HOW)
def test_the_source_of_the_server(
    how: str, home: Home, store: Path, other: Path, command: Callable[..., Said]
) -> None:
    """The manager asks it first, whatever exec_path names."""
    options, environment = HOW[how](other)
    home.path.chmod(0o755)
    path = home.path / "run"
    path.mkdir(mode=0o755)
    home.configure(ours(home, f"--db {store}").replace("<exec", "<socket>run/s</socket><exec"))
    with serving(*options, "--socket", path / "s", **environment):
        said = command("--check", "--manager", home.path, "--db", store)
    assert not said.errors and len(said.notes) == 1 and OTHER in said.notes[0], said
    assert sum(ANSWERS in line for line in said.out) == 2
    assert "agent 077: not enrolled" in said.out and "agent 001: not enrolled" not in said.out
    # Nobody listens any more: now it is that of exec_path.
    said = command("--check", "--manager", home.path, "--db", store)
    assert len(said.errors) == 1 and "agent 001: not enrolled" in said.out


def test_the_source_of_a_server_that_names_none() -> None:
    """It is the usual store. Of a process that has ended, nothing can be read."""
    with subprocess.Popen(["sleep", "100"], env={"PATH": os.defpath}) as process:
        assert script.source_of_process(process.pid, ["x", "--serve"]) == script.STORE
        process.kill()
    assert script.read_proc(process.pid, "cmdline") == []
    assert script.source_of_process(process.pid, ["x", "--serve", "--db", "a"]) == "a"


def test_an_exec_path_that_asks_a_server(
    home: Home, store: Path, other: Path, command: Callable[..., Said]
) -> None:
    """The agents are those of the server; if nobody listens, they are not known."""
    home.path.chmod(0o755)
    (home.path / "run").mkdir(mode=0o755)
    home.configure(ours(home, "--socket run/s"))
    with serving("--db", other, "--socket", home.path / "run/s"):
        said = command("--check", "--manager", home.path, "--db", store)
    assert len(said.notes) == 1 and "agent 077: not enrolled" in said.out
    said = command("--check", "--manager", home.path, "--db", store)
    assert any("not known: nobody listens on run/s" in line for line in said.out)


def test_another_server(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Its process is named."""
    home.configure(key_request(SOCK))
    with answering(home.path / "queue/sock", SOUND.encode()):
        said = command("--check", "--manager", home.path, "--db", store)
    assert said.status == 0 and not said.notes
    start = "which source the manager uses is not known: "
    (line,) = [line for line in said.out if line.startswith(start)]
    assert f"process {os.getpid()}, listens on the socket" in line


def test_a_socket_of_systemd(home: Home, other: Path) -> None:
    """Somebody else listens, and our server has the socket as descriptor 3."""
    path = home.path / "s"
    command = [str(SCRIPT), "--serve", "--workers", "1", "--db", str(other)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert listener.fileno() != 3

        def pass_socket() -> None:
            os.dup2(listener.fileno(), 3)
            os.environ["LISTEN_PID"] = str(os.getpid())

        start = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        process = subprocess.Popen(
            ["/bin/sh", "-c", start, "sh", *command],
            env={"PATH": os.defpath},
            preexec_fn=pass_socket,  # noqa: PLW1509
            close_fds=False,
        )
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(b"id:077")
                assert b'"error": 0' in client.recv(65536)
            assert script.source_of_server(str(path)) == str(other)
        finally:
            process.terminate()
            process.wait()


# ---------------------------------------------------------------- --enroll


@pytest.mark.parametrize("kind", ["sqlite", "untyped", "indexed", "csv", "keys", "sql"])
def test_enrolling_twice_is_as_once(
    kind: str, home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """What is missing is added, from any source; who is there stays; cron hears nothing."""
    source = stores.make(kind, AGENTS)
    with authd.running(home.path, [BETA]) as manager:
        assert command("--enroll", "--manager", home.path, "--db", source) == (0, [], [])
        assert manager.sent("add") == ["001", "003"]
        assert manager.agents == {
            "001": {"id": "001", "name": "alpha", "ip": "10.0.0.1", "key": ALPHA.key},
            "002": {**BETA._asdict(), "ip": "2001:0DB8:0000:0000:0000:0000:0000:0002"},
            "003": {"id": "003", "name": "gamma", "ip": "any", "key": GAMMA.key},
        }
        assert command("--enroll", "--manager", home.path, "--db", source) == (0, [], [])
        assert manager.sent("add") == ["001", "003"]


NO_FORCE = {
    "enabled": False,
    "key_mismatch": True,
    "disconnected_time": {"enabled": False, "value": "1h"},
    "after_registration_time": "1h",
}


def test_frames(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Each message is what MANAGER.md says: force is always off."""
    with authd.running(home.path) as manager:
        command("--enroll", "--manager", home.path, "--db", store)
    assert manager.messages[:2] == [
        {"function": "get", "arguments": {"id": "001"}},
        {"function": "add", "arguments": {**ALPHA._asdict(), "force": NO_FORCE}},
    ]
    assert {frozenset(m["arguments"]) for m in manager.messages} == {
        frozenset(["id"]),
        frozenset([*FIELDS, "force"]),
    }


def test_who_is_in_client_keys_is_not_asked_for(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """It has the truth, and authd has not."""
    with authd.running(home.path, [ALPHA, BETA]) as manager:
        assert command("--enroll", "--manager", home.path, "--db", store).status == 0
        assert manager.sent("get") == manager.sent("add") == ["003"]


NETWORKS = ["10.5.0.0/24", "10.6.0.0/16", "2001:db8::/33", "2001:db8:1::/48", "10.7.0.0/31"]


@pytest.mark.parametrize("late", [False, True], ids=["written", "not written yet"])
def test_networks(late: bool, home: Home, stores: Stores, command: Callable[..., Said]) -> None:
    """`get` answers them without their length: every second run failed, for ever."""
    rows = [(f"{n:03d}", f"n{n}", ip, key(n)) for n, ip in enumerate(NETWORKS * 2, 1)]
    source = stores.csv(rows)
    with authd.running(home.path, late=late) as manager:
        for _ in range(2):
            assert command("--enroll", "--manager", home.path, "--db", source) == (0, [], [])
        assert len(manager.sent("add")) == 10
        assert bool(manager.sent("get")) == late or len(manager.sent("get")) == 10
    assert len(home.path.joinpath("etc/client.keys").read_text().splitlines()) == 10
    said = command("--check", "--manager", home.path, "--db", source)
    assert "10 enrolled, 0 not, 0 with another" in said.out[-2]


SIMILAR = {
    "an address for a network": ("10.5.0.0", "10.5.0.0/24"),
    "a network for an address": ("10.5.0.0/24", "10.5.0.0"),
    "a longer network": ("10.5.0.0/25", "10.5.0.0/24"),
    "IPv6": ("2001:db8::", "2001:db8::/64"),
    "any": ("any", "10.5.0.0/24"),
}


@pytest.mark.parametrize("case", SIMILAR)
def test_networks_and_addresses_that_look_the_same(
    case: str, home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """Are told, by both commands."""
    wanted, enrolled = SIMILAR[case]
    source = stores.csv([ALPHA._replace(ip=wanted)])
    with authd.running(home.path, [ALPHA._replace(ip=enrolled)]) as manager:
        said = command("--enroll", "--manager", home.path, "--db", source)
        assert not manager.sent("add")
    text = "agent 001: enrolled with another ip"
    assert said.err[0] == f"error: line 2: {text}, and left so" and said.status == 1
    assert text in command("--check", "--manager", home.path, "--db", source).out


RIVALS = {
    "name": Record("009", "alpha", "any", key(9)),
    "address": Record("009", "x", "10.0.0.1", key(9)),
    "both": Record("009", "alpha", "10.0.0.1", key(9)),
}


@pytest.mark.parametrize("case", RIVALS)
def test_nobody_is_replaced(
    case: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Whatever <force> says: the older agent went without a word, and came back with each run."""
    with authd.running(home.path, [RIVALS[case]], force=True) as manager:
        for _ in range(2):
            said = command("--enroll", "--manager", home.path, "--db", store)
            assert said.status == 1 and len(said.err) == 2
            assert "agent 001: not enrolled: another agent" in said.err[0]
            assert manager.agents["009"] == RIVALS[case]._asdict() and not manager.removed
            assert sorted(manager.agents) == ["002", "003", "009"]


@pytest.mark.parametrize("number", [9007, 9008, 9012])
def test_a_duplicate_that_is_the_same_agent(
    number: int, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Another run has added it between our question and our message."""
    with authd.running(home.path) as manager:
        add = manager.add

        def add_before(agent: dict[str, Any]) -> int:
            add(agent)
            return number

        manager.add = add_before  # type: ignore[method-assign]
        said = command("--enroll", "-v", "--manager", home.path, "--db", store)
    assert said == (0, [], [f"{store}: 3 agents, 0 enrolled now, 0 errors"])


def test_two_runs_at_once(ask: Caller, home: Home, stores: Stores) -> None:
    """Together they do what one does: 3,000 agents once, and no error."""
    rows = [(f"{n:03d}", f"n{n}", f"10.1.{n // 250}.{n % 250}", key(n)) for n in range(1, 3001)]
    source = stores.csv(rows)
    words = [*ask.command(), "--db", str(source), "--enroll", "-v", "--manager", str(home.path)]
    with authd.running(home.path, late=True) as manager:
        runs = [
            subprocess.Popen(words, stderr=subprocess.PIPE, env={"PATH": ask.path})
            for _ in range(2)
        ]
        output = [run.communicate()[1].decode() for run in runs]
        assert [run.returncode for run in runs] == [0, 0], output
        assert len(manager.agents) == 3000 and not manager.removed
    numbers = [int(re.sub(".*agents, ([0-9,]+) enr.*", r"\1", o).replace(",", "")) for o in output]
    assert sum(numbers) == 3000, output


@pytest.mark.parametrize("end", ["closed", "cut", "done"])
def test_agents_that_authd_had_not_written(
    end: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """It answers some moments before it writes: the next run enrols what was lost."""
    with authd.running(home.path, manner=end, sound=3, late=True) as manager:
        assert command("--enroll", "--manager", home.path, "--db", store).status == 1
        assert manager.agents
        manager.agents.clear()  # it was killed
    with authd.running(home.path) as manager:
        assert command("--enroll", "--manager", home.path, "--db", store) == (0, [], [])
        assert sorted(manager.agents) == ["001", "002", "003"]


def test_how_much_was_done_is_told_when_asked(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """With -v."""
    with authd.running(home.path, [BETA]):
        said = command("--enroll", "-v", "--manager", home.path, "--db", store)
        again = command("--enroll", "-v", "--manager", home.path, "--db", store)
    assert said == (0, [], [f"{store}: 3 agents, 2 enrolled now, 0 errors"])
    assert again == (0, [], [f"{store}: 3 agents, 0 enrolled now, 0 errors"])


SPELLINGS = ["10.0.0.5/24", "2001:DB8::5", "2001:db8:0:0::/33", "::ffff:10.9.9.9", "0.0.0.0/0", ""]


def test_addresses_are_sent_as_the_manager_keeps_them(
    home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """Whatever their spelling: the next run finds no difference."""
    rows = [(f"{n:03d}", f"n{n}", ip, SECRET) for n, ip in enumerate(SPELLINGS, 1)]
    source = stores.csv(rows)
    with authd.running(home.path) as manager:
        for _ in range(2):
            assert command("--enroll", "--manager", home.path, "--db", source) == (0, [], [])
    assert [agent["ip"] for agent in manager.agents.values()] == [
        "10.0.0.0/24",
        "2001:0DB8:0000:0000:0000:0000:0000:0005",
        "2001:0DB8:0000:0000:0000:0000:0000:0000/33",
        "10.9.9.9",
        "any",
        "any",
    ]


OTHERWISE: dict[str, tuple[Record, str]] = {
    "name": (ALPHA._replace(name="ALPHA"), "another name,"),
    "address": (ALPHA._replace(ip="10.0.0.2"), "another ip,"),
    "any": (ALPHA._replace(ip="any"), "another ip,"),
    "key": (ALPHA._replace(key=SECRET + "other"), "another key,"),
    "two": (ALPHA._replace(name="x", key=SECRET), "another name and key,"),
    "all": (Record("001", "x", "any", SECRET), "another name and ip and key,"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_who_is_there_otherwise_is_left_alone(
    case: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """What differs is told, by the name of the field; the others are enrolled."""
    agent, words = OTHERWISE[case]
    with authd.running(home.path, [agent]) as manager:
        said = command("--enroll", "--manager", home.path, "--db", store)
        assert manager.agents["001"] == agent._asdict()
    assert said.status == 1 and not said.out
    assert said.err == [
        f"error: row 1: agent 001: enrolled with {words} and left so",
        f"{store}: 3 agents, 2 enrolled now, 1 error",
    ]
    assert manager.sent("add") == ["002", "003"]


REFUSED: dict[str, tuple[Record, dict[str, Any], str]] = {
    "address of another": (Record("004", "x", "10.0.0.1", SECRET), {}, "has its address"),
    "name of another": (Record("004", "alpha", "any", SECRET), {}, "has its name"),
    "name of the host": (Record("004", "manager", "any", SECRET), {}, "has its name"),
    "no room": (Record("004", "x", "any", SECRET), {"room": 1}, "no room"),
    "a bad name": (Record("004", "x", "any", SECRET), {"fails": {"add": 9017}}, "take its name"),
    "a bad address": (Record("004", "x", "any", SECRET), {"fails": {"add": 9006}}, "its address"),
    "another error": (Record("004", "x", "any", SECRET), {"fails": {"add": 9001}}, "9001"),
    "no get": (Record("004", "x", "any", SECRET), {"fails": {"get": 9001}}, "9001"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_manager_refuses_is_told(
    case: str, home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """Why, of which agent, in which row."""
    agent, settings, words = REFUSED[case]
    source = stores.csv([agent])
    with authd.running(home.path, [ALPHA], **settings) as manager:
        said = command("--enroll", "--manager", home.path, "--db", source)
        assert list(manager.agents) == ["001"]
    line, summary = said.err
    assert line.startswith("error: line 2: agent 004: not enrolled: ") and words in line
    assert summary == f"{source}: 1 agent, 0 enrolled now, 1 error"
    assert said.status == 1


@pytest.mark.parametrize("number, words", [(9006, "its address"), (9012, "has its id")])
def test_errors_that_come_between(
    number: int, words: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """A manager that is stricter than ours, or somebody else who enrols at the same time."""
    with authd.running(home.path) as manager:
        manager.add = lambda agent: number  # type: ignore[method-assign]
        said = command("--enroll", "--manager", home.path, "--db", store)
    for n, line in enumerate(said.err[:3], 1):
        assert line.startswith(f"error: row {n}: agent 00{n}: not enrolled") and words in line
    assert said.status == 1 and len(said.err) == 4


def test_broken_records_are_listed_and_not_sent(
    home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """A hundred of them, then how many more; the sound ones are enrolled."""
    broken = [Record(f"{n:03d}", "two words", "any", SECRET) for n in range(1, 106)]
    source = stores.csv([*broken, Record("200", "sound", "any", SECRET)])
    with authd.running(home.path) as manager:
        said = command("--enroll", "--manager", home.path, "--db", source)
    assert said.err[0] == f"error: line 2: agent 001: {script.RULES['name']}"
    assert said.err[100:] == [
        "... and 5 more errors",
        f"{source}: 106 agents, 1 enrolled now, 105 errors",
    ]
    assert said.status == 1
    assert manager.sent("get") == manager.sent("add") == ["200"]


ENDING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a worker": ({"worker": True}, ("worker", "master")),
    "no master": ({"fails": {"get": 9016}}, ("master", "cannot be reached")),
    "no master any more": ({"fails": {"add": 9016}}, ("master", "cannot be reached")),
}


@pytest.mark.parametrize("case", ENDING)
def test_a_cluster(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """What holds for every agent is told once."""
    settings, words = ENDING[case]
    with authd.running(home.path, **settings) as manager:
        said = command("--enroll", "--manager", home.path, "--db", store)
    assert said.status == 1 and len(said.err) == 1 and not said.out
    assert all(word in said.err[0] for word in words)
    assert len(manager.messages) <= 2


ENDS: dict[str, tuple[str | bytes, int]] = {
    "closed": ("closed", 1),
    "closed within the answer": ("cut", 2),
    "closed when it was done": ("done", 2),
    "no frame": (b"no", 1),
    "no JSON": (b"\4\0\0\0oops", 1),
    "no object": (b"\2\0\0\0[]", 1),
    "no error": (b"\2\0\0\0{}", 1),
    "endless": (b"\xff\xff\xff\xff{}", 1),
    "an error that is a list": (b'\x0d\0\0\0{"error":[1]}', 1),
    "an error that is a text": (b'\x0d\0\0\0{"error":"9"}', 1),
    "a long number": (struct.pack("<I", 4011) + b'{"error":' + b"9" * 4000 + b" }", 1),
    "a longer number": (struct.pack("<I", 5011) + b'{"error":' + b"9" * 5000 + b" }", 1),
    "a number of five digits": (b'\x0f\0\0\0{"error":12345}', 1),
    "a number below 0": (b'\x0d\0\0\0{"error": -1}', 1),
    "true": (b'\x0e\0\0\0{"error": true}', 1),
    "too deep": (b"\x60\xea\0\0" + b"[" * 60_000, 1),
    "data of another kind": (b'\x14\0\0\0{"error":0,"data":7}', 1),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_end_in_between(
    case: str, home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """What was done stays, one line tells what happened, and the next run goes on."""
    manner, enrolled = ENDS[case]
    with authd.running(home.path, manner=manner, sound=3) as manager:
        said = command("--enroll", "--manager", home.path, "--db", store)
        assert said.status == 1 and len(said.err) == 1 and not said.out
        assert len(said.err[0]) < 400
        assert str(manager.path) in said.err[0] and "(1 enrolled before" in said.err[0]
        assert len(manager.agents) == enrolled
        manager.manner = "well"
        assert command("--enroll", "--manager", home.path, "--db", store) == (0, [], [])
        assert list(manager.agents) == ["001", "002", "003"]
        assert sorted(manager.sent("add")) == ["001", "002", "003"]


def test_a_manager_that_does_not_close(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """What it says after the answer is not waited for."""
    manner = b"\x0e\0\0\0" + b'{"error":9001}'
    with authd.running(home.path, manner=manner, stays=True):
        said = command("--enroll", "--manager", home.path, "--db", store)
        assert "the manager says error 9001" in said.err[0] and len(said.err) == 4


def test_an_answer_in_pieces(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Is read to its end."""
    with authd.running(home.path, manner="pieces") as manager:
        assert command("--enroll", "--manager", home.path, "--db", store) == (0, [], [])
        assert len(manager.agents) == 3


@pytest.mark.parametrize("manner", ["silent", "drip"])
def test_who_does_not_answer_in_time(
    manner: str,
    home: Home,
    store: Path,
    command: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time is for the whole answer: one that came byte by byte never ended."""
    assert 0 < script.ENROL_SECONDS <= 60
    monkeypatch.setattr(script, "ENROL_SECONDS", 0.5)
    started = time.monotonic()
    with authd.running(home.path, manner=manner, sound=2) as manager:
        said = command("--enroll", "--manager", home.path, "--db", store)
    assert time.monotonic() - started < 10
    assert said.status == 1 and len(said.err) == 1
    assert "timed out" in said.err[0] and str(manager.path) in said.err[0]


def test_nobody_listens(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """One line, whether its socket is there or not, or the manager itself."""
    path = home.path / "queue/sockets/auth"
    for words in "No such file", "Connection refused":
        if words == "Connection refused":
            path.parent.mkdir()
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        said = command("--enroll", "--manager", home.path, "--db", store)
        assert said.status == 1 and not said.out and len(said.err) == 1
        assert f"{path}: {words}" in said.err[0]


def test_no_permission(home: Home, stranger: Stranger) -> None:
    """The socket is root's and its group's."""
    with authd.running(home.path) as manager:
        manager.path.chmod(0)
        status, output = stranger("--enroll")
        assert not manager.messages
    assert status == 1 and len(output) == 1
    assert f"{manager.path}: Permission denied" in output[0]


def test_a_source_that_cannot_be_read(home: Home, command: Callable[..., Said]) -> None:
    """Is named, and the manager is not asked."""
    with authd.running(home.path) as manager:
        said = command("--enroll", "--manager", home.path, "--db", home.path / "none.db")
    assert said.status == 1 and len(said.err) == 1 and "none.db" in said.err[0]
    assert not manager.messages


def test_in_cron_and_by_hand(ask: Caller, home: Home, store: Path) -> None:
    """Silent where nobody looks on; on a terminal it shows how far it has come.

    A manager that has no agents yet may have no client.keys.
    """
    words = ["--db", str(store), "--enroll", "--manager", str(home.path)]
    with authd.running(home.path) as manager:
        (home.path / "etc/client.keys").unlink()
        answer = ask.call(*words)
        assert (answer.status, answer.output, len(manager.agents)) == (0, b"", 3)
        terminal, end = pty.openpty()
        process = subprocess.Popen([*ask.command(), *words], stderr=end, env={"PATH": ask.path})
        os.close(end)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: nobody writes any more
            while piece := os.read(terminal, 4096):
                seen += piece
        os.close(terminal)
        assert process.wait() == 0
    assert b"1 agent\r" in seen
    assert seen.endswith(f"{store}: 3 agents, 0 enrolled now, 0 errors\r\n".encode())
    assert SECRET.encode() not in seen


@pytest.mark.slow
def test_ten_thousand(ask: Caller, home: Home, stores: Stores) -> None:
    """In seconds; it took the vendor's way minutes."""
    rows = [(f"{n:03d}", f"n{n}", f"10.1.{n // 250}.{n % 250}", SECRET) for n in range(1, 10_001)]
    source = stores.csv(rows)
    with authd.running(home.path) as manager:
        answer = ask.call("--db", source, "--enroll", "-v", "--manager", home.path, timeout=120)
    assert answer.output.decode() == f"{source}: 10,000 agents, 10,000 enrolled now, 0 errors\n"
    assert answer.status == 0 and len(manager.agents) == 10_000
