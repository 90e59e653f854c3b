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
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import authd
import pytest
from conftest import PLAIN_SCHEMA, SCRIPT, Caller, Record, Stores, script
from manager import FIELDS, stored_ip

SOUND = '{"error": 4, "message": "No agent key found"}'
SECRET = "k3y-of-"  # each key begins so, and no output may have it
ALPHA, BETA, GAMMA = (
    Record("001", "alpha", "10.0.0.1", SECRET + "alpha"),
    Record("002", "beta", "2001:db8::2", SECRET + "beta"),
    Record("003", "gamma", "any", SECRET + "gamma"),
)
AGENTS = [ALPHA, BETA, GAMMA]
INDEXES = ";".join(f"CREATE INDEX agent_{field} ON agent ({field})" for field in ("id", "ip"))


class Home:
    """A manager's folder."""

    def __init__(self, path: Path) -> None:
        """Make it at PATH: a manager of 4.14.7 that has no agents and asks nobody."""
        self.path = path
        for folder in "etc", "bin", "queue":
            (path / folder).mkdir(parents=True)
        self.version('{"version": "4.14.7", "stage": "rc1"}')
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
                if not isinstance(line, str):
                    line = " ".join([*line[:2], stored_ip(line[2]) or "", line[3]])
                file.write(line + "\n")

    def program(self, name: str, body: str, mode: int = 0o755) -> Path:
        """Write a shell script that an exec_path may name."""
        path = self.path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(mode)
        return path


@pytest.fixture
def home(open_folder: Path) -> Home:
    """Make a manager's folder whose path is short enough for sockets."""
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


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the script's commands in the process."""

    def run(*arguments: str | Path) -> Said:
        options, words = script.split_command_line([str(word) for word in arguments])
        status = script.main(options, words, options["--db"])
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
                requests.append(peer.recv(65536))
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


EXEC = "<exec_path>bin/ask</exec_path>"
WODLE = 'wodle name="agent-key-polling"'
PATHS: dict[str, tuple[str, dict[tuple[str, ...], str]]] = {
    "nothing": ("", {}),
    "text alone": ("a & b > c", {}),
    "one": ("<r><a>1</a></r>", {("a",): "1"}),
    "nested": ("<r><a><b>1</b><c>2</c></a></r>", {("a", "b"): "1", ("a", "c"): "2"}),
    "several roots": ("<r><a>1</a></r>\n<r><b>2</b></r>", {("a",): "1", ("b",): "2"}),
    "of two the later": ("<r><a>1</a><a>2</a></r>", {("a",): "2"}),
    "of two roots the later": ("<r><a>1</a></r><r><a>2</a></r>", {("a",): "2"}),
    "a comment": ("<r><!-- <a>1</a> --><b>2</b></r>", {("b",): "2"}),
    "a comment of many lines": ("<r><!--\n<a>\n1</a>\n- -> -->\n<b>2</b></r>", {("b",): "2"}),
    "two comments": ("<r><!-- x --><a>1</a><!-- y --></r>", {("a",): "1"}),
    "a comment within text": ("<r><a>1<!-- x -->2</a></r>", {("a",): "12"}),
    "a comment around the root": ("<!-- <r><a>1</a></r> --><r><b>2</b></r>", {("b",): "2"}),
    "attribute, over two lines": (
        '<r><wodle\n  name="x" ><a>1</a></wodle></r>',
        {('wodle name="x"', "a"): "1"},
    ),
    "text in two": ("<r><a><b>x</a><a>y</b></a></r>", {("a", "b"): "xy"}),
    "attribute": ('<r><wodle name="x"><a>1</a></wodle></r>', {('wodle name="x"', "a"): "1"}),
    "raw ampersand": ("<r><a>x && y; echo &amp;</a></r>", {("a",): "x && y; echo &amp;"}),
    "raw less-than": ("<r><c>1 < 2</c><a>1</a></r>", {("a",): "1", ("c",): "1 < 2"}),
    "raw greater-than": ("<r><c>a 2>&1 > b</c><a>1</a></r>", {("a",): "1", ("c",): "a 2>&1 > b"}),
    "empty": ("<r><a></a></r>", {("a",): ""}),
    "closed in itself": ("<r><b/><c /><a>1</a></r>", {("a",): "1"}),
    "closed in itself, with an attribute": ('<r><b x="/y"/><a>1</a></r>', {("a",): "1"}),
    "beyond ASCII": ("<r><a>\xe9</a></r>", {("a",): "\xe9"}),
}


@pytest.mark.parametrize("case", PATHS)
def test_settings_are_read(case: str) -> None:
    """Several roots, comments and raw letters, as the manager takes them."""
    text, expected = PATHS[case]
    for (*outer, name), value in expected.items():
        block = text
        for tag in ["r", *outer]:
            block = script.inside(block, tag)
        settings = dict(script.SETTING.findall(block))
        assert settings[name] == value
        assert {(*outer, other) for other in settings} <= expected.keys()


def test_any_text_is_read_without_an_exception() -> None:
    """A configuration that somebody is still writing must not end the check."""
    whole = key_request(EXEC) + wodle("<enabled>yes</enabled>") + "<!-- x -->"
    dice = random.Random(11)
    for _ in range(3000):
        text = list(whole)
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(text))
            text[place : place + dice.randrange(9)] = dice.choice(["", "<", ">", "/", "<!--", '"'])
        for tag in "auth", "key_request", script.WODLE:
            block = script.inside("".join(text), tag)
            assert isinstance(block, str) and dict(script.SETTING.findall(block)) is not None


# ---------------------------------------------------------------- what a manager would do

V4, V43, V5, NONE = ('{"version": "%s"}' % v for v in ("4.14.7", "4.3.11", "5.0.0", "unknown"))
SOCK = "<socket>queue/sock</socket>"
OFF = "<enabled>no</enabled>"
AUTH_OFF = "<disabled>yes</disabled>"


class Case(NamedTuple):
    """A manager, and what is said of it: the words in each error, in order; all but HOME."""

    text: str
    errors: tuple[tuple[str, ...], ...] = ()
    version: str | None = V4
    ran: int = 1  # how often exec_path was run
    asked: int = 0  # how often the socket was asked
    notes: int = 0


ASKS_NOBODY = ("ossec.conf", "<key_request>", "asks nobody")
NO_WODLE = ("ossec.conf", "no <wodle", "asks nobody")
NOT_ENABLED = ("ossec.conf", "abled", "<auth>")
ONE = "<ossec_config>%s</ossec_config>"
CONFIGURATIONS = {
    "key_request": Case(key_request(EXEC)),
    "key_request, enabled": Case(key_request("<enabled>yes</enabled>" + EXEC)),
    "auth, not disabled": Case(key_request(EXEC, "<disabled>no</disabled>")),
    "no key_request": Case(ONE % "<auth></auth>", (ASKS_NOBODY,), ran=0),
    "no auth": Case(ONE % "", (ASKS_NOBODY,), ran=0),
    "an empty file": Case("", (ASKS_NOBODY,), ran=0),
    "an empty key_request": Case(key_request(""), (("asks nobody",),), ran=0),
    "key_request outside auth": Case(
        ONE % f"<key_request>{EXEC}</key_request>", (ASKS_NOBODY,), ran=0
    ),
    "in a comment": Case(f"<!-- {key_request(EXEC)} -->", (ASKS_NOBODY,), ran=0),
    "in the second root": Case(ONE % "<global></global>" + "\n" + key_request(EXEC)),
    "disabled in the second root": Case(
        key_request(EXEC) + ONE % f"<auth>{AUTH_OFF}</auth>", (NOT_ENABLED,), ran=0
    ),
    "not enabled": Case(key_request(OFF + EXEC), (NOT_ENABLED,), ran=0),
    "auth disabled": Case(key_request(EXEC, AUTH_OFF), (NOT_ENABLED,), ran=0),
    "both forms": Case(key_request(EXEC) + wodle(EXEC), (("<key_request>", "<wodle"),)),
    "neither way": Case(key_request("<enabled>yes</enabled>"), (("exec_path", "socket"),), ran=0),
    "other options": Case(key_request(EXEC + "<threads>4</threads><queue_size>9</queue_size>")),
    # authd reads the old form, too, where no <key_request> has come before it
    "wodle, 4.14": Case(wodle(EXEC)),
    "wodle, 4.14, auth disabled": Case(
        wodle(EXEC).replace("<auth>", "<auth>" + AUTH_OFF), (NOT_ENABLED,), ran=0
    ),
    "wodle, 4.3": Case(wodle(EXEC), version=V43),
    "wodle, single quotes": Case(wodle(EXEC).replace('"', "'"), version=V43),
    "wodle, not enabled": Case(wodle(OFF + EXEC), (NOT_ENABLED,), V43, 0),
    "another wodle": Case(wodle(EXEC).replace("agent-key-polling", "x"), (NO_WODLE,), V43, 0),
    "key_request, 4.3": Case(key_request(EXEC), (NO_WODLE,), V43, 0),
    "wodle and server, 4.4": Case(
        wodle(SOCK + "<exec_path>bin/ask --serve</exec_path>"),
        version='{"version": "4.4.0"}',
        asked=1,
    ),
    "key_request, 4.4": Case(key_request(EXEC), version='{"version": "v4.4.0"}'),
    "no version": Case(key_request(EXEC), version=None, notes=1),
    "no version, wodle": Case(wodle(EXEC), version=None, notes=1),
    "no version, neither": Case(ONE % "", (ASKS_NOBODY,), None, 0, notes=1),
    "version: no number": Case(wodle(EXEC), version=NONE, notes=1),
    "version: a number": Case(key_request(EXEC), version='{"version": 4}', notes=1),
    "version: a list": Case(key_request(EXEC), version="[]", notes=1),
    "version: no JSON": Case(key_request(EXEC), version="4.14.7", notes=1),
    "5.0": Case(ONE % "", (("5.0", "--enroll"),), V5, 0),
    "5.1, key_request": Case(
        key_request(EXEC), (("5.1", "asks nobody", "--enroll"),), '{"version": "5.1.2"}', 0
    ),
    "timeout as ours": Case(key_request(EXEC + "<timeout>10</timeout>"), (("10 s",),)),
    "timeout of a manager that names none": Case(
        key_request("<exec_path>bin/ask --timeout 60</exec_path>"), (("timeout, 60 s", "60 s"),)
    ),
    "timeout of a manager that names none, longer": Case(
        key_request("<exec_path>bin/ask --timeout 59.9</exec_path>")
    ),
    "timeout longer": Case(key_request(EXEC + "<timeout>11</timeout>")),
    "timeout shorter than --timeout": Case(
        key_request("<exec_path>bin/ask --timeout 20</exec_path><timeout>15</timeout>"),
        (("timeout", "15 s", "20 s"),),
    ),
    "timeout longer than --timeout": Case(
        key_request("<exec_path>bin/ask --db x --timeout=5</exec_path><timeout>6</timeout>")
    ),
    "timeout: no number": Case(
        key_request(EXEC + "<timeout>1m</timeout>"), (("timeout", "1m"),), ran=0
    ),
    **{
        f"timeout: {text}": Case(
            key_request(EXEC + f"<timeout>{text}</timeout>"), (("timeout", text),), ran=0
        )
        for text in ("inf", "nan", "-5", "0", "99999999999999999999")
    },
    "beyond ASCII": Case(
        key_request("<exec_path>bin/schl\u00fcssel</exec_path>"),
        (("bin/schl", "No such file"),),
        ran=0,
    ),
    "an endless tag": Case(ONE % ("<" + "a" * 200_000), (ASKS_NOBODY,), ran=0),
    "tags without end": Case(ONE % ("<a b" * 50_000), (ASKS_NOBODY,), ran=0),
    "unclosed quote": Case(
        key_request('<exec_path>"bin/ask</exec_path>'), (("error: exec_path: No", "quot"),), ran=0
    ),
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
    "an empty socket": Case(key_request("<socket></socket>" + EXEC)),
    "an empty socket, 4.3": Case(wodle("<socket></socket>" + EXEC), version=V43),
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
    "socket, 4.3": Case(wodle(SOCK), version=V43, ran=0, asked=1),
    "socket and exec_path, 4.3": Case(wodle(SOCK + EXEC), (("exec_path", "--serve"),), V43, 0, 1),
    "socket and server, 4.3": Case(
        wodle(SOCK + "<exec_path>bin/ask --serve --socket queue/sock</exec_path>"),
        version=V43,
        ran=0,
        asked=1,
    ),
    # managers of 3.8 to 4.3 have no VERSION.json
    "socket and server, no version": Case(
        wodle(SOCK + "<exec_path>bin/ask --serve --socket queue/sock</exec_path>"),
        version=None,
        ran=0,
        asked=1,
        notes=1,
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Each fault is an error that names what is wrong; what the manager does, is done."""
    text, errors, version, ran, asked, notes = CONFIGURATIONS[case]
    home.version(version)
    home.configure(text)
    home.program("bin/ask", f"echo x >>bin/ran\necho '{SOUND}'")
    home.program("bin/plain", "", 0o644)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(home.path / "queue/stale"))
    with answering(home.path / "queue/sock", SOUND.encode() + b"\n") as requests:
        said = command("--check", "--manager", home.path, "--db", store)
    assert len(said.errors) == len(errors), said
    for line, words in zip(said.errors, errors):
        assert all(word in line for word in words), line
    assert said.status == (1 if errors else 0) and not said.err
    runs = home.path / "bin/ran"
    assert (len(runs.read_text().splitlines()) if runs.exists() else 0) == ran
    assert requests == [b"id:00000000"] * asked
    for how, count in ("exec_path", ran), ("socket", asked):
        assert sum(line.startswith(how + " gave a sound answer") for line in said.out) == count
    assert said.out[-1] == "3 agents, %d error%s, %d note%s" % (
        len(errors),
        "s" * (len(errors) != 1),
        notes,
        "s" * (notes != 1),
    )


def test_a_manager_of_5_has_another_file(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Its name is wazuh-manager.conf."""
    home.version(V5)
    (home.path / "etc/ossec.conf").unlink()
    home.configure("<wazuh_config></wazuh_config>", "wazuh-manager.conf")
    said = command("--check", "--manager", home.path, "--db", store)
    assert len(said.errors) == 1 and "--enroll" in said.errors[0] and not said.err


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
        said = command("--check", "--manager", "--db", store)
        assert len(said.errors) == 1 and word in said.errors[0], homes
    monkeypatch.setattr(script, "HOMES", ("/nowhere/a", "/nowhere/b"))
    said = command("--enroll", "--manager", "--db", store)
    assert "/nowhere/a" in said.err[0], "the first, where neither exists"


# ---------------------------------------------------------------- what comes of asking

DATA = '{"id": "001", "name": "a", "ip": "any", "key": "%sx"}' % SECRET
VERDICTS: dict[str, tuple[bytes, bool, str]] = {
    "sound": (SOUND.encode() + b"\n", True, "sound answer"),
    "blanks before": (b" \n\t" + SOUND.encode(), True, "sound answer"),
    "text after": (SOUND.encode() + b"\nwarning: {}\n", True, "sound answer"),
    "text before": (b"warning: x\n" + SOUND.encode(), False, "text before the JSON"),
    "no JSON": (b"Traceback (most recent call last)\n", False, "no JSON"),
    "half of it": (SOUND.encode()[:-9], False, "JSON"),
    "nothing": (b"", False, "no answer"),
    "blanks alone": (b"\n", False, "no"),
    "a list": (b"[4]", False, "JSON"),
    "a number": (b"4", False, "JSON"),
    "no error": (b'{"message": "x"}', False, "JSON"),
    "another error": (b'{"error": 2, "message": "Cannot read"}', False, "error 2, Cannot read"),
    "bad words": (b'{"error": 3, "message": "Bad arguments given"}', False, "error 3"),
    "an agent": (b'{"error": 0, "data": %s}' % DATA.encode(), False, "error 0"),
    "a message that is none": (b'{"error": 2, "message": [1]}', False, "error 2"),
    "beyond ASCII": (b'{"error": 4, "message": "\xc3\xa9\xff"}', True, "sound answer"),
    "a number that is a text": (b'{"error": "4", "message": "x"}', False, "no number"),
    "true": (b'{"error": true, "message": "x"}', False, "no number"),
    "a key in a list": (b'{"error": ["%s"]}' % SECRET.encode(), False, "no number"),
    "an agent that nobody has": (b'{"error": 0}', False, "hands out a key"),
    "zero bytes": (b"\0" * 9, False, "no JSON"),
}


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[bool, str]:
    """Whether it goes well, and what is said of it."""
    try:
        return True, function(*arguments)
    except script.Trouble as problem:
        return False, script.message_of(problem)


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case: str) -> None:
    """What the manager makes of an answer, in words, and never what is in it."""
    output, well, words = VERDICTS[case]
    is_well, text = outcome(script.verdict_of, output)
    assert (is_well, words in text) == (well, True), text
    assert SECRET not in text and script.printable(text) == text


PROGRAMS = {
    "text before": (f"echo oops >&2; echo '{SOUND}'", "text before the JSON"),
    "text after": (f"echo '{SOUND}'; echo oops >&2", "sound answer"),
    "a status": (f"echo '{SOUND}'; exit 3", "status 3"),
    "a mistake": ("echo agent_key_request: error: Oops 1; echo More; exit 2", "away. agent_key"),
    "a signal": ("kill -KILL $$", "signal 9"),
    "nothing": ("exit 0", "no answer"),
    "a flood": ("exec 2>&1; yes & sleep 0.2; kill -KILL $!; wait; exit 3", "status 3"),
    "much": (f"echo '{SOUND}'; head -c 1000000 /dev/zero", "sound answer"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs(case: str, home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Both outputs are one, and the status counts."""
    body, words = PROGRAMS[case]
    home.program("bin/ask", body)
    home.configure(key_request(EXEC))
    said = command("--check", "--manager", home.path, "--db", store)
    lines = [line for line in said.out if "exec_path" in line]
    assert len(lines) == 1 and words in lines[0] and re.search(r"in [0-9.]+ ms$", lines[0]), said
    assert case != "a mistake" or "error: Oops 1, in" in lines[0]  # its first line
    well = words == "sound answer"
    assert (said.status, lines[0].startswith("error: ")) == (not well, not well)


def test_silence_is_waited_for_as_long_as_the_manager_waits(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """Then it is said, and what was started is ended, its children, too."""
    fifo = home.path / "bin/fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    program = home.program("bin/ask", f"exec 3>{fifo}\necho >&3\nsleep 100 &\nwait")
    well, text = outcome(script.run, str(home.path), [str(program)], 0.5)
    assert not well and "silent" in text
    assert os.read(reader, 9) == b"\n"
    assert select.select([reader], [], [], 60)[0], "a child goes on"  # nobody writes any more
    os.close(reader)
    home.configure(key_request(SOCK + "<timeout>0.2</timeout>"))
    home.version(V4)
    with answering(home.path / "queue/sock", b"") as requests:
        said = command("--check", "--manager", home.path, "--db", store)
    (line,) = [line for line in said.errors if "queue/sock" in line]
    assert "timed out" in line and requests


def test_a_broken_pipe_is_ignored_as_by_the_manager(
    home: Home, store: Path, command: Callable[..., Said]
) -> None:
    """A shell takes over what it finds; a Python ignores it in any case."""
    home.program("bin/ask", f"grep SigIgn /proc/$$/status >seen; echo '{SOUND}'")
    home.configure(key_request(EXEC))
    assert command("--check", "--manager", home.path, "--db", store).status == 0
    ignored = int((home.path / "seen").read_text().split()[1], 16)
    assert ignored >> 12 & 1


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
    words = rf"""  "{sys.executable}" -IS  bin/a#X\ p --db "b c" 'd e' $HOME *.x "" \"&&\\ """
    home.configure(key_request(f"<exec_path>{words.strip()}</exec_path>"))
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
    assert "exec_path" in sound and "gave a sound answer" in sound
    assert counts == f"{store}: 3 enrolled, 0 not, 0 with another name, address or key"
    assert summary == "3 agents, 0 errors, 0 notes"


def test_json(ask: Caller, home: Home, store: Path) -> None:
    """The same findings, for programs: one object, whatever was found."""
    home.configure(key_request("<exec_path>bin/none</exec_path>"))
    home.version(None)
    answer = ask.call("--db", store, "--check", "--manager", home.path, "--json")
    found = json.loads(answer.output)
    assert (answer.status, found["agents"], found["errors"], found["notes"]) == (1, 3, 1, 1)
    levels = [finding["level"] for finding in found["findings"]]
    assert sorted(levels) == ["error", "info", "info", "note"]
    assert any("3 not" in finding["text"] for finding in found["findings"])


def replace_by_folder(path: Path) -> None:
    """Make PATH something that cannot be read."""
    path.unlink()
    path.mkdir()


UNREADABLE: dict[str, Callable[[Home], Any]] = {
    "etc/ossec.conf": lambda home: (home.path / "etc/ossec.conf").unlink(),
    "etc/ossec.conf: Is a dir": lambda home: replace_by_folder(home.path / "etc/ossec.conf"),
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


def test_what_nobody_has_foreseen(
    home: Home, store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is an error without the exception's text, and the check goes on."""

    def fail(*_: object) -> None:
        raise LookupError(SECRET)

    home.configure(key_request(EXEC))
    home.program("bin/ask", f"echo '{SOUND}'")
    monkeypatch.setattr(script, "verdict_of", fail)
    assert script.main({"--check": "", "--manager": str(home.path)}, [], str(store)) == 1
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
    said = command("--check", "--manager", home.path, "--db", store)
    expected = "%s: %d enrolled, %d not, %d with another name, address or key" % (store, *counts)
    assert said.out[-2] == expected


def test_counting_many_may_take_its_time(
    home: Home, stores: Stores, command: Callable[..., Said]
) -> None:
    """A million agents take longer than a request may."""
    rows = ((f"{number:05d}", f"n{number}", "any", "x") for number in range(10_000, 30_000))
    said = command(
        "--check", "--manager", home.path, "--timeout", "0.001", "--db", stores.sqlite(rows)
    )
    assert "20000 not" in said.out[-2]


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


def test_frames(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Each message is what MANAGER.md says, and nothing more: never `force`."""
    with authd.running(home.path) as manager:
        command("--enroll", "--manager", home.path, "--db", store)
    assert manager.messages[:2] == [
        {"function": "get", "arguments": {"id": "001"}},
        {"function": "add", "arguments": ALPHA._asdict()},
    ]
    assert {frozenset(m["arguments"]) for m in manager.messages} == {
        frozenset(["id"]),
        frozenset(FIELDS),
    }


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
    "another error": (Record("004", "x", "any", SECRET), {"fails": ["add"]}, "9001"),
    "no get": (Record("004", "x", "any", SECRET), {"fails": ["get"]}, "9001"),
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
    assert said.err[100:] == ["... and 5 more", f"{source}: 106 agents, 1 enrolled now, 105 errors"]
    assert said.status == 1
    assert manager.sent("get") == manager.sent("add") == ["200"]


def test_a_worker_node(home: Home, store: Path, command: Callable[..., Said]) -> None:
    """Its master must be asked."""
    with authd.running(home.path, worker=True) as manager:
        said = command("--enroll", "--manager", home.path, "--db", store)
    assert said.status == 1 and len(said.err) == 1 and not said.out
    assert "worker" in said.err[0] and "master" in said.err[0]
    assert len(manager.messages) == 1


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


def test_silence(
    home: Home, store: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is not waited for forever."""
    waits: list[float] = []

    class Hasty(socket.socket):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            super().settimeout(30)

        def settimeout(self, seconds: float | None) -> None:
            waits.append(seconds or 0)
            super().settimeout(0.2)

    with authd.running(home.path, manner="silent", sound=2) as manager:
        monkeypatch.setattr(script.socket, "socket", Hasty)
        said = command("--enroll", "--manager", home.path, "--db", store)
        monkeypatch.undo()
    assert said.status == 1 and len(said.err) == 1
    assert "timed out" in said.err[0] and str(manager.path) in said.err[0]
    assert all(0 < seconds <= 60 for seconds in waits) and waits


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
    """Silent where nobody looks on; on a terminal it shows how far it has come. No client.keys."""
    (home.path / "etc/client.keys").unlink()
    words = ["--db", str(store), "--enroll", "--manager", str(home.path)]
    with authd.running(home.path) as manager:
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
    assert b"1 agents\r" in seen
    assert seen.endswith(f"{store}: 3 agents, 0 enrolled now, 0 errors\r\n".encode())
    assert SECRET.encode() not in seen
    assert not (home.path / "etc/client.keys").exists()


@pytest.mark.slow
def test_ten_thousand(ask: Caller, home: Home, stores: Stores) -> None:
    """In seconds; it took the vendor's way minutes."""
    rows = [(f"{n:03d}", f"n{n}", f"10.1.{n // 250}.{n % 250}", SECRET) for n in range(1, 10_001)]
    source = stores.csv(rows)
    with authd.running(home.path) as manager:
        answer = ask.call("--db", source, "--enroll", "-v", "--manager", home.path, timeout=120)
    assert answer.output.decode() == f"{source}: 10000 agents, 10000 enrolled now, 0 errors\n"
    assert answer.status == 0 and len(manager.agents) == 10_000
