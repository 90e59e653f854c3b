"""The README is true: its commands run as written, its units are sound, its figures are right.

`Host` is a manager's host below a directory of the test. It changes the paths in a command and
leaves `sudo` out. Nothing else in a command is changed. Programs that would change this machine,
such as systemctl, are replaced by stand-ins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import database_servers
import pytest
from authd import Authd
from conftest import ROOT, SAMPLE, SCRIPT, SUPPORTED, Record, interpreters, script
from serving import Server, started

README = (ROOT / "README.md").read_text()
FLAT = " ".join(re.sub(r"(?ms)^ *```.*?^ *```$", "", README).split())  # without blocks, unwrapped
PROGRAM = "/usr/local/bin/agent_key_request.py"
STORE = "/var/lib/agent-key-request/agents.db"
SOCKET = "/run/agent-key-request/socket"
# The beginnings of the paths that a test puts below its own directory.
PATHS = re.compile(r"(?<![\w./-])/(?=usr/local/bin/|var/|run/|root/|etc/agent|etc/systemd/)")
LIMIT = 60.0  # seconds for one command
LINE_LIMIT = 100  # characters


# ---------------------------------------------------------------------- the blocks of the README


class Block(NamedTuple):
    """A block of code. above: the last line before it. section: the heading that it is under."""

    language: str
    text: str
    above: str
    section: str
    line: int


def read_blocks() -> Iterator[Block]:
    """Yield the blocks of the README. The indent of a block in a list is removed."""
    section = above = ""
    lines = README.splitlines(keepends=True)
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence = re.match(r"( *)```(\w+)$", line)
        if fence:
            end = lines.index(f"{fence[1]}```\n", number)
            text = "".join(inside.removeprefix(fence[1]) for inside in lines[number:end])
            yield Block(fence[2], text, above, section, number)
            number = end + 1
        elif line.startswith("## "):
            section = line[3:].strip()
        if line.strip():
            above = line.strip()


BLOCKS = tuple(read_blocks())
COMMANDS = tuple(block for block in BLOCKS if block.language == "sh")
UNIT_PATH = re.compile(r"`/etc/systemd/system/([\w-]+\.\w+)`")
UNITS = {
    match[1]: block.text
    for block in BLOCKS
    if block.language == "ini" and (match := UNIT_PATH.match(block.above))
}
DROP_INS = tuple(
    block
    for block in BLOCKS
    if block.text.startswith("[Service]") and not UNIT_PATH.match(block.above)
)
CONFIGURATIONS = tuple(block for block in BLOCKS if block.language == "xml")


def output_of(block: Block) -> str | None:
    """Return what the README shows as the output of a command; None if it shows nothing."""
    following = BLOCKS[BLOCKS.index(block) + 1 :]
    if following and following[0].language == "text" and following[0].section == block.section:
        between = README.splitlines()[block.line : following[0].line]
        is_next = sum(1 for line in between if line.strip()) == block.text.count("\n") + 2
        return following[0].text if is_next else None
    return None


def find_block(language: str, part: str) -> Block:
    """Return the only block of a language that contains `part`."""
    (found,) = [block for block in BLOCKS if block.language == language and part in block.text]
    return found


# ---------------------------------------------------------------------------------- a host

SYSTEMCTL = '#!/bin/sh\necho "$@" >>"{calls}"\n'
QUIET = "#!/bin/sh\nexit 0\n"
# Both clients export the same two agents.
MYSQL = """#!/bin/sh
printf 'id\\tname\\tip\\tagent_key\\n{tabs}'
"""
PSQL = """#!/bin/sh
file=$(expr "$2" : '.* TO \\([^ ]*\\) CSV HEADER$')
printf 'id,name,ip,agent_key\\n{commas}' >"$file"
"""


class Host:
    """A manager's host below a directory, with a copy of the repository in `copy`.

    calls: a file with what was said to systemctl.
    """

    def __init__(self, directory: Path) -> None:
        """Make the host in a directory. Its name must be short enough for a socket."""
        self.directory = directory
        self.copy = directory / "copy"
        for name in (
            "copy",
            "bin",
            "etc",
            "root",
            "run",
            "usr/local/bin",
            "var/lib",
            "var/ossec/bin",
            "var/ossec/etc",
            "var/ossec/logs",
            "var/ossec/queue/db",
            "var/ossec/queue/sockets",
        ):
            (directory / name).mkdir(parents=True)
        self.home = directory / "var/ossec"
        self.calls = directory / "calls"
        rows = list(script.open_source(str(SAMPLE), LIMIT).rows())
        self.agents = [Record(*row) for _, row in rows]
        self._copy_repository()
        self._make_stand_ins()
        self._make_manager()
        self.environment = {
            "PATH": f"{directory}/bin:{os.defpath}",
            "DESTDIR": str(directory),
            "AGENT_KEY_PYTHONS": interpreters()[0].path,
        }

    def _copy_repository(self) -> None:
        """Copy the repository, with other paths in the script."""
        (self.copy / SCRIPT.name).write_text(self.map(SCRIPT.read_text()))
        (self.copy / SCRIPT.name).chmod(0o755)
        for path in (SAMPLE, ROOT / "Makefile", ROOT / "README.md"):
            shutil.copy2(path, self.copy)
        keys = "".join("{} {} {} {}\n".format(*agent) for agent in self.agents)
        (self.copy / "client.keys").write_text(keys)

    def _make_stand_ins(self) -> None:
        """Make the programs that would change this machine, or ask others."""
        two = self.agents[:2]
        tabs = "".join("\\t".join(agent) + "\\n" for agent in two)
        commas = "".join(",".join(agent) + "\\n" for agent in two)
        stand_ins = {
            "bin/systemctl": SYSTEMCTL.format(calls=self.calls),
            "bin/journalctl": QUIET,
            "bin/mysql": MYSQL.format(tabs=tabs),
            "bin/psql": PSQL.format(commas=commas),
            "var/ossec/bin/manage_agents": QUIET,
        }
        for name, text in stand_ins.items():
            (self.directory / name).write_text(text)
            (self.directory / name).chmod(0o755)
        (self.directory / "bin/python3").symlink_to(interpreters()[0].path)

    def _make_manager(self) -> None:
        """Make the files of a manager that has lost its client.keys, and has enrolled an agent."""
        log = find_block("sh", "/var/ossec/logs/ossec.log")
        line = output_of(log)
        assert line
        (self.home / "logs/ossec.log").write_text(line)
        database = sqlite3.connect(self.home / "queue/db/global.db")
        with database:
            database.execute(
                "CREATE TABLE agent (id INTEGER PRIMARY KEY, name TEXT NOT NULL, ip TEXT,"
                " register_ip TEXT, internal_key TEXT, os_name TEXT)"
            )
            database.execute("INSERT INTO agent (id, name) VALUES (0, 'manager')")
            for agent in self.agents[:2]:
                database.execute(
                    "INSERT INTO agent (id, name, ip, register_ip, internal_key)"
                    " VALUES (?, ?, '10.9.9.9', ?, ?)",
                    agent,
                )
        database.close()
        if os.geteuid() == 0:  # as on a real manager, where this user is called wazuh
            owner = pwd.getpwnam("nobody")
            for name in ("etc", "queue/db", "queue/db/global.db", "queue/sockets"):
                os.chown(self.home / name, owner.pw_uid, owner.pw_gid)
                (self.home / name).chmod(0o770)

    def map(self, text: str) -> str:
        """Return a text with paths below the directory, and without sudo."""
        return PATHS.sub(f"{self.directory}/", text).replace("sudo ", "")

    def path(self, name: str) -> Path:
        """Return where a path of the README is."""
        return Path(self.map(name))

    def run(self, commands: str) -> subprocess.CompletedProcess[str]:
        """Run commands of the README in the copy of the repository, both outputs in one."""
        text = self.map(commands).replace("make ", f"make -s DESTDIR={self.directory} ")
        if "make " in text and "run" in text:
            text = text.replace("-s ", "")  # make shows the commands of this target
        done = subprocess.run(
            ["sh", "-ec", text],
            cwd=self.copy,
            env=self.environment,
            text=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        done.stdout = self.shown(done.stdout)
        return done

    def shown(self, text: str) -> str:
        """Return an output with the paths of the README, and without the times."""
        text = text.replace(str(self.directory), "")
        return re.sub(r"in [0-9.]+ ms", "in 0.0 ms", text)

    def sh(self, commands: str) -> str:
        """Return what commands print. They must succeed."""
        done = self.run(commands)
        assert done.returncode == 0, done
        return done.stdout

    def configure(self, settings: str, version: str = "4.14.9") -> None:
        """Be a manager of a version with these settings in its ossec.conf."""
        (self.home / "VERSION.json").write_text(json.dumps({"version": version}))
        (self.home / "etc/client.keys").touch()
        is_wodle = "<wodle" in settings
        inside = settings if is_wodle else f"<auth>\n{settings}</auth>\n"
        more = "<auth></auth>\n" if is_wodle else ""
        text = f"<ossec_config>\n{more}{self.map(inside)}</ossec_config>\n"
        (self.home / "etc/ossec.conf").write_text(text)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        """Run the server as the README does."""
        command = find_block("sh", "--serve").text
        self.path(SOCKET).parent.mkdir(exist_ok=True)
        words = ["sh", "-ec", f"exec {self.map(command)}"]
        with started(words, self.path(SOCKET), env=self.environment) as server:
            server.wait_line("ready")
            yield server


@contextlib.contextmanager
def new_host() -> Iterator[Host]:
    """Give a host. Nothing is installed on it."""
    if not shutil.which("make"):
        pytest.skip("make is not here")
    directory = Path(tempfile.mkdtemp(prefix="akr-", dir="/tmp"))
    try:
        yield Host(directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with the program and a store of six agents."""
    with new_host() as made:
        made.sh("make install")
        made.sh("install -m 0600 client.keys /root/")
        made.sh(f"{PROGRAM} --import /root/client.keys")
        yield made


# ----------------------------------------------------------------------- the commands, in order

# The commands of this section are the last ones that run, because they remove the program.
LAST_SECTION = "Upgrading and removing"
ASKS_DATABASES = "--db 'mysql://"  # test_database runs this block
RUNS_TESTS = "make test\n"  # this test would run itself


class Outcome(NamedTuple):
    """What came of a block of commands."""

    status: int
    output: str


class Walk:
    """Somebody who follows the README from its begin to its end, on one host."""

    def __init__(self, host: Host) -> None:
        """Start with nothing."""
        self.host = host
        self.outcomes: dict[Block, Outcome] = {}
        self.context = contextlib.ExitStack()

    def run(self) -> None:
        """Run all blocks of commands."""
        for block in sorted(COMMANDS, key=lambda block: block.section == LAST_SECTION):
            if ASKS_DATABASES in block.text or block.text == RUNS_TESTS:
                continue
            self.prepare(block)
            self.outcomes[block] = self.outcome(block)
        self.context.close()

    def prepare(self, block: Block) -> None:
        """Do what the text around a block asks for, and what only a real host would do."""
        host = self.host
        store = host.path(STORE)
        if "global.db" in block.text or "--import /root/client.keys" in block.text:
            shutil.rmtree(store.parent, ignore_errors=True)  # the reader chooses one source
        elif BLOCKS[BLOCKS.index(block) - 1].language == "csv":
            shutil.rmtree(store.parent, ignore_errors=True)
            host.path("/root/agents.csv").write_text(find_block("csv", "id,name").text)
        elif "--check --manager" in block.text:
            (before,) = [each for each in CONFIGURATIONS if each.line < block.line][-1:]
            host.configure(before.text)
        elif "--enroll" in block.text:
            authd = Authd(host.home)
            self.context.callback(authd.close)
        elif "make uninstall\n" in block.text:
            host.sh("make install-units")

    def outcome(self, block: Block) -> Outcome:
        """Run a block. The server goes on running, because the reader uses another terminal."""
        if block.text.rstrip().endswith("--serve"):
            server = self.context.enter_context(self.host.serving())
            return Outcome(0, self.host.shown(server.lines[0] + "\n"))
        done = self.host.run(block.text)
        return Outcome(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def walk() -> Iterator[Walk]:
    """The README, followed once."""
    with new_host() as made:
        walker = Walk(made)
        try:
            walker.run()
        finally:
            walker.context.close()
        yield walker


@pytest.mark.parametrize(
    "block", COMMANDS, ids=lambda block: f"line {block.line}, {block.text.split()[-1][-20:]}"
)
def test_commands_work_as_written(walk: Walk, block: Block) -> None:
    """Each block succeeds and prints what the README shows, but for times."""
    if ASKS_DATABASES in block.text:
        pytest.skip("test_database runs this block")
    if block.text == RUNS_TESTS:
        assert "pytest" in (ROOT / "Makefile").read_text()
        return
    outcome = walk.outcomes[block]
    assert outcome.status == 0, outcome.output
    expected = output_of(block)
    if expected is not None:
        assert outcome.output == walk.host.shown(expected)


def test_units_are_named_to_systemctl(walk: Walk) -> None:
    """Every unit of a systemctl command is on this page, or it is the manager."""
    words = set(walk.host.calls.read_text().split())
    units = {word for word in words if word.startswith(("agent-key", "wazuh"))}
    assert units == {*UNITS, "wazuh-manager"} - {"agent-key-import.service"} | (
        {"agent-key-import.service"} & units
    )


def test_pytest_is_started_as_written() -> None:
    (words,) = re.findall(r"`python3 (-m pytest [^`]*)`", FLAT)
    command = [sys.executable, "-c", "import sys; print(sys.argv)"]
    command = [sys.executable, *words.replace('"', "").split(), "--version"]
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_install(host: Host) -> None:
    """The version is printed with the checksum of the file, also after an install without make."""
    (without,) = re.findall(r"`sudo (install [^`]*)`", FLAT)
    for install in "make install", without:
        host.path(PROGRAM).unlink(missing_ok=True)
        host.sh(install)
        said = host.sh(f"{PROGRAM} --version").split()
        digest = hashlib.sha256(host.path(PROGRAM).read_bytes()).hexdigest()
        assert said == [SCRIPT.name, script.VERSION, "sha256:" + digest]


def test_store_is_private(host: Host) -> None:
    """The modes are those that the README promises."""
    promised = re.findall(r"store with mode (\d+) in a directory with mode (\d+)", FLAT)
    store = host.path(STORE)
    modes = [format(path.stat().st_mode & 0o7777, "04o") for path in (store, store.parent)]
    assert promised == [tuple(modes)]


VERSIONS = {"key_request": "4.14.9", "wodle": "4.3.11"}


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=lambda block: f"line {block.line}")
def test_configurations(host: Host, block: Block) -> None:
    """`--check --manager` finds nothing wrong with them."""
    kind = "wodle" if "<wodle" in block.text else "key_request"
    with host.serving() if "<socket>" in block.text else contextlib.nullcontext():
        host.configure(block.text, VERSIONS[kind])
        report = host.sh(f"{PROGRAM} --check --manager")
    asks_server = "<socket>" in block.text
    asks_program = "--serve" not in block.text
    assert ("socket answers" in report) is asks_server, report
    assert ("exec_path answers" in report) is asks_program, report


def test_options_stand_before_the_request(host: Host) -> None:
    """The example of an exec_path with an option works with a request appended."""
    (command,) = re.findall(r"as in `<exec_path>([^`]*agents\.csv)</exec_path>`", FLAT)
    lines = ["id,name,ip,key", *map(",".join, host.agents), ""]
    host.path("/etc/agents.csv").write_text("\n".join(lines))
    assert json.loads(host.sh(f"{command} id 002"))["data"]["id"] == "002"


def test_manager_that_asks_nobody(host: Host) -> None:
    """The check says so, and what to use."""
    host.configure("", "5.0.0")
    done = host.run(f"{PROGRAM} --check --manager")
    assert done.returncode == 1
    assert "use --enroll" in done.stdout


def test_check_by_cron_is_silent(host: Host) -> None:
    """The line for cron prints nothing if all is well, and the report if there is an error."""
    (line,) = re.findall(r"`(report=[^`]*)`", FLAT)
    assert host.sh(line) == ""
    assert "1 error" in host.sh(line.replace("--check", "--db /etc/agents.missing --check"))


def test_view(host: Host, tmp_path: Path) -> None:
    """A view gives a table with other names to a request."""
    path = tmp_path / "inventory.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE inventory (agent_id, hostname, address, secret)")
    database.execute("INSERT INTO inventory VALUES (?, ?, ?, ?)", host.agents[0])
    database.executescript(find_block("sql", "CREATE VIEW").text)
    database.close()
    answer = json.loads(host.sh(f"{PROGRAM} --db {path} id 001"))
    assert answer["data"] == host.agents[0]._asdict()


def test_keys_of_manage_agents(host: Host) -> None:
    """Its Base64 text becomes a line of client.keys, which an import reads."""
    assert "`base64 -d`" in FLAT
    line = " ".join(host.agents[0])
    told = host.sh(
        f"printf '%s' '{line}' | base64 -w0 | base64 -d >/root/one.keys; echo >>/root/one.keys;"
        f"{PROGRAM} --db /root/one.keys id 001"
    )
    assert json.loads(told)["data"]["key"] == host.agents[0].key


HOOK = """
import os, runpy, sys
def watch(event, arguments):
    if event.startswith("socket.") or event == "open" and (
            arguments[0] != "/dev/null" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        os.write(2, f"{event} {arguments}".encode())
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("source", ["sample.db.sql", "client.keys", "agents.db"])
def test_a_request_writes_nothing_and_connects_nowhere(host: Host, source: str) -> None:
    """Python tells what it opens. SQLite opens its file itself, and the file stays as it was."""
    place = host.path(STORE).parent if source == "agents.db" else host.copy
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(place)}
    python = [sys.executable, "-BISc", HOOK, str(host.copy / SCRIPT.name)]
    done = subprocess.run(
        [*python, "--db", str(place / source), "id", "001"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (json.loads(done.stdout)["data"]["id"], done.stderr) == ("001", "")
    after = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(place)}
    assert before == after


# ------------------------------------------------------------------------- the texts and figures


@functools.cache
def help_text() -> str:
    """Return what --help prints."""
    text: str = script.build_parser().format_help()
    return text


OPTION = re.compile(r"(?<![\w-])(?:--[a-z]+(?:-[a-z]+)*|-v)\b")
OPTIONS_OF_OTHERS = {"--batch", "--now", "--inplace"}  # mysql, systemctl, rsync


def test_options() -> None:
    """The reference and --help name the same options. The rest of the page has no others."""
    reference = README[README.index("### Commands and options") : README.index("### Sources")]
    known = set(OPTION.findall(help_text()))
    assert set(OPTION.findall(reference)) == known
    assert set(OPTION.findall(README)) - OPTIONS_OF_OTHERS == known


def test_options_go_with_the_same_commands() -> None:
    """The table of options says the same as the program."""
    table = re.findall(r"(?m)^\| (?:`([^`]*)`)? *\| ([^|]*) \|[^|]*\|[^|]*\|$", README)
    goes_with: dict[str, set[str]] = {}
    name = ""
    for option, commands in table:
        name = option.split()[0] if option else name
        names = set(re.findall(r"`([^`]*)`", commands))
        if commands.strip() == "requests":
            names = {script.A_REQUEST}
        if commands.strip() == "everything":
            names = {script.A_REQUEST, *script.COMMANDS}
        if name.startswith("-"):
            goes_with.setdefault(name, set()).update(names)
    commands_of = script.build_parser().commands_of
    assert goes_with == {name: set(commands) for name, commands in commands_of.items() if commands}


FIGURES = {  # what the README must say, by the script's own constants
    "store": f"and without this variable `{script.STORE}`",
    "socket": f"| `{script.SOCKET}` |",
    "time limits": f"| {script.REQUEST_SECONDS:g}; {script.SERVER_SECONDS:g} with `--serve` |",
    "manager's timeout": f"the program's own `--timeout` ({script.REQUEST_SECONDS:g} s)",
    "patience": "A client that sends nothing for one second is disconnected.",
    "findings": f"at most {script.SHOWN_FINDINGS} of each",
    "homes": "directory than `{}` or `{}`".format(*script.HOMES),
    "log": "Errors {}, {}, {} and {} are logged".format(*script.FOR_THE_OPERATOR[1:]),
    "version": f"### From 2.0 to {script.VERSION.rpartition('.')[0]}",
    "Python": f"Python 3.{SUPPORTED[0]} to 3.{SUPPORTED[-1]}",
    **script.RULES,
}


@pytest.mark.parametrize("text", FIGURES.values(), ids=FIGURES)
def test_figures(text: str) -> None:
    assert text in FLAT


def test_patience_is_one_second() -> None:
    """The README says it in words."""
    assert script.FIRST_PATIENCE == 1.0


def test_columns() -> None:
    """The names of the columns stand in the table, in the order in which they count."""
    fields = {"id": "id", "name": "name", "address": "ip", "key": "key"}
    for word, field in fields.items():
        names = ", ".join(f"`{name}`" for name in script.COLUMN_NAMES[field])
        assert f"| {word} | {names} |" in FLAT


def test_drivers_are_tried_in_that_order() -> None:
    (table,) = re.findall(r"\| Database \| Driver .*?\n\n", README, re.DOTALL)
    drivers = tuple(re.findall(r"(?m)^\| [^|]*\| ([\w.]+) \|", table)[1:])
    assert drivers == tuple(name for names in script.DRIVERS.values() for name in names)


def test_answers() -> None:
    """Every error stands in the table, with the begin of its message."""
    table = re.findall(r"(?m)^\| (\d) \| `([^`]*?)(?: …)?`", README)
    told = {int(number): message for number, message in table}
    expected = {number: text.strip() for number, text in script.MESSAGES.items() if number}
    assert {**told, 5: told[5].removesuffix(" id")} == expected


def test_exit_statuses() -> None:
    """The table says the same as --help."""
    for status, meaning in re.findall(r"(?m)^  ([012])  (.*)$", help_text()):
        assert f"| {status} | {meaning} |" in README


def test_messages_are_those_of_the_program() -> None:
    """What the section about troubleshooting calls a message is one."""
    (table,) = re.findall(r"\| What you see \| .*?\n\n", README, re.DOTALL)
    messages = re.findall(r"(?m)^\| `([^`]*)` \|", table)
    assert len(messages) >= 4
    text = " ".join(SCRIPT.read_text().replace('"\n', "").split())
    for message in messages:
        for part in message.split(" … "):
            assert part.strip(" …") in text, part


def test_promises_name_tests_that_exist() -> None:
    promises = README[README.index("**What is promised,**") : README.index("## Troubleshooting")]
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promises)
    assert len(names) == promises.count("\n- ")
    for file, function in names:
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), function


# ------------------------------------------------------------------------------------- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units of the README as files, with the script that is here."""
    for name, text in UNITS.items():
        (tmp_path / name).write_text(text.replace(PROGRAM, str(SCRIPT)))
    return tmp_path


def analyze(directory: Path, *words: str) -> str:
    """Return what systemd-analyze says about units in a directory. Its status must be 0."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    done = subprocess.run(
        [program, *words],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search("unrecognized option|Unknown (command|operation)", done.stderr):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
    return done.stdout + done.stderr


def verify(directory: Path) -> None:
    """See that systemd understands each line of all units."""
    said = analyze(directory, "verify", "--man=no", *(str(directory / name) for name in UNITS))
    assert "agent-key" not in said, said


def test_units_are_sound(units: Path) -> None:
    """There are four, and each says what it is and where to read more."""
    assert len(UNITS) == 4
    verify(units)
    for text in UNITS.values():
        assert "\nDescription=" in text
        assert "\nDocumentation=https://" in text


def unit_of(drop_in: Block) -> str:
    """Return the unit that a drop-in is for: the one that the text above it names last."""
    before = "\n".join(README.splitlines()[: drop_in.line])
    name: str = re.findall(r"systemctl edit ([\w.-]+)`", before)[-1]
    return name


def add_drop_in(units: Path, drop_in: Block) -> None:
    """Write a drop-in where `systemctl edit` writes it."""
    directory = units / f"{unit_of(drop_in)}.d"
    directory.mkdir()
    text = drop_in.text.replace(PROGRAM, str(SCRIPT))
    (directory / "override.conf").write_text(text)


@pytest.mark.parametrize("drop_in", DROP_INS, ids=lambda block: f"line {block.line}")
def test_drop_ins_are_sound(units: Path, drop_in: Block) -> None:
    add_drop_in(units, drop_in)
    verify(units)


# What systemd-analyze gives at most, in tenths.
EXPOSURES = {"agent-key-request.service": 15, "agent-key-import.service": 20}


@pytest.mark.parametrize("name", EXPOSURES)
def test_services_are_hardened(units: Path, name: str) -> None:
    """systemd-analyze gives them a low exposure, and only the import has the network."""
    threshold = f"--threshold={EXPOSURES[name]}"
    report = analyze(units, "security", "--offline=true", threshold, str(units / name))
    protected = set(re.findall(r"✓\s+(\w+)", report))
    assert "MemoryDenyWriteExecute" in protected, report
    assert ("PrivateNetwork" in protected) is (name == "agent-key-request.service"), report


def test_server_with_a_database_has_the_network(units: Path) -> None:
    (drop_in,) = [block for block in DROP_INS if "PrivateNetwork=no" in block.text]
    add_drop_in(units, drop_in)
    path = units / "agent-key-request.service"
    report = analyze(units, "security", "--offline=true", "--threshold=25", str(path))
    assert "PrivateNetwork" not in re.findall(r"✓\s+(\w+)", report), report


def test_units_are_enabled_and_reloaded_by_their_names() -> None:
    enabled = set()
    for names in re.findall(r"systemctl enable --now ([^`\n]*)", README):
        enabled |= set(names.split())
    assert enabled == {name for name, text in UNITS.items() if "[Install]" in text}
    assert re.findall(r"systemctl reload ([^`]*)`", README) == ["agent-key-request.service"]


def test_units_start_what_the_script_takes() -> None:
    """Each command has the full path and options that go together."""
    texts = [*UNITS.values(), *(block.text for block in DROP_INS)]
    commands = re.findall("(?m)^ExecStart=(.+)$", "\n".join(texts))
    assert len(commands) == 4
    for command in commands:
        program, *words = command.split()
        assert program == PROGRAM
        line = script.read_command_line(words)
        assert line.command in words


def test_reload_sends_the_signal(tmp_path: Path) -> None:
    """ExecReload= needs no /bin/kill, which small systems lack."""
    (command,) = re.findall("(?m)^ExecReload=(.*)$", UNITS["agent-key-request.service"])
    shell, option, text = re.fullmatch(r"(/bin/sh) (-c) '(.*)'", command).groups()  # type: ignore[union-attr]
    trap = "trap 'echo got it; exit' HUP; echo ready; while :; do sleep 0.1; done"
    process = subprocess.Popen(["sh", "-c", trap], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    environment = {"MAINPID": str(process.pid), "PATH": str(tmp_path)}
    subprocess.run([shell, option, text], env=environment, check=True)
    assert process.communicate(timeout=LIMIT)[0] == "got it\n"


def test_socket_and_store_have_one_path() -> None:
    """The units, the script and the log have the same names."""
    assert f"ListenStream={script.SOCKET}\n" in UNITS["agent-key-request.socket"]
    server = UNITS["agent-key-request.service"]
    state = UNITS["agent-key-import.service"]
    assert f"RuntimeDirectory={Path(script.SOCKET).parent.name}\n" in server
    assert f"StateDirectory={Path(script.STORE).parent.name}\n" in state
    for text in server, state:
        assert f"SyslogIdentifier={script.NAME}\n" in text
    assert set(re.findall(r"journalctl -t (\w+)", README)) == {script.NAME}


# ------------------------------------------------------------------------------------- databases


DATABASES = {"mariadb": "mysql", "postgresql": "postgresql"}  # kinds of servers, and schemes


class ReadmeDatabase:
    """A database that is set up as the README says, with a user that other tests do not have."""

    def __init__(self, kind: str, host: Host) -> None:
        """Start the server, and write the password files of the host. Skip what is not here."""
        if database_servers.missing(kind):
            pytest.skip("not here: " + database_servers.missing(kind))
        self.scheme = DATABASES[kind]
        self.is_mysql = self.scheme == "mysql"
        python = interpreters()[0].path
        if not any(database_servers.has_driver(python, name) for name in self.drivers()):
            pytest.skip(f"{python} has no driver for {self.scheme}")
        self.server = database_servers.running(kind)
        if not self.server.has_tls:
            pytest.skip("no openssl here")
        self.host = host
        self.server.load(host.agents)
        statements = find_block("sql", "CREATE USER" if self.is_mysql else "CREATE ROLE").text
        if not self.is_mysql:  # every role may do this, unless a test has made the schema anew
            statements += "GRANT USAGE ON SCHEMA public TO agent_reader;"
        self.server.sql(self.here(statements))
        passfile = find_block("text", "*:*:wazuh").text
        write_private(host.path("/etc/agent-keys.pgpass"), self.here(passfile))
        shutil.copy(f"{self.server.folder}/ca.pem", host.path("/etc/agent-keys.pem"))

    def drivers(self) -> tuple[str, ...]:
        """Return the drivers for the database."""
        names: tuple[str, ...] = script.DRIVERS[self.scheme]
        return names

    def here(self, text: str) -> str:
        """Return a text of the README with this server and this user."""
        server = self.server
        text = text.replace("db.example.org", f"127.0.0.1:{server.port}")
        text = text.replace("/run/mysqld/mysqld.sock", f"{server.folder}/sock")
        text = text.replace("host=/run/postgresql", f"host={server.folder}&port={server.port}")
        return text.replace("agent_reader", "readme_reader")

    def ask(self, block: Block, option_file: Block, more: str = "") -> None:
        """Run the command of a block that is for this database. `more` is added to the URL."""
        host = self.host
        write_private(host.path("/etc/agent-keys.cnf"), host.map(option_file.text))
        (command,) = [line for line in block.text.splitlines() if f"{self.scheme}://" in line]
        told = json.loads(host.sh(self.here(command.replace("' id", f"{more}' id"))))
        assert told.get("data") == host.agents[0]._asdict(), told

    def close(self) -> None:
        """Remove the user."""
        dropping = "DROP OWNED BY agent_reader; DROP ROLE agent_reader;"
        if self.is_mysql:
            dropping = "DROP USER 'agent_reader'@'%';"
        self.server.sql(self.here(dropping))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATABASES)
def test_database(host: Host, kind: str) -> None:
    """The way from creating the user to an answer: by the socket, by the network, and by TLS."""
    plain, with_tls = [block for block in BLOCKS if block.text.startswith("[client]")]
    by_socket, by_network = [block for block in COMMANDS if ASKS_DATABASES in block.text]
    (tls,) = re.findall(r"`(&sslmode[^`]*)`", FLAT)
    database = ReadmeDatabase(kind, host)
    try:
        database.ask(by_socket, plain)
        database.ask(by_network, plain)
        database.ask(by_network, with_tls, "" if database.is_mysql else tls)
    finally:
        database.close()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.write_text(text)
    path.chmod(0o600)


# ------------------------------------------------------------------------------------- the page


def test_links_lead_somewhere() -> None:
    """Every link within the page leads to a heading, and the contents are complete."""
    heads = re.findall(r"(?m)^(##+) (.*)", README)
    anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for _, head in heads]
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= set(anchors)
    contents = re.findall(r"\]\(#([\w-]+)\)", README[README.index("**Contents:**") :])
    main = [anchor for (level, _), anchor in zip(heads, anchors, strict=True) if level == "##"]
    assert contents[: len(main) - 1] == main[1:]


def test_files_that_are_named_exist() -> None:
    names = set(re.findall(r"`((?:tests/|\.github/)?\w+\.(?:py|md|db\.sql))`", FLAT))
    assert {"sample.db.sql", "tests/MANAGER.md"} <= names
    for name in names:
        assert (ROOT / name).exists(), name


def test_lines_are_short() -> None:
    """Only an output, a URL or a command that cannot be split may be longer."""
    in_block = False
    for number, line in enumerate(README.splitlines(), 1):
        if line.strip().startswith("```"):
            in_block = not in_block
        longest_word = max(map(len, line.split()), default=0)
        is_unsplittable = in_block and longest_word > 60
        assert len(line) <= LINE_LIMIT or is_unsplittable or is_output(number), number


def is_output(number: int) -> bool:
    """Return True if a line of the README is in an output that is shown."""
    return any(
        block.language == "text" and block.line < number <= block.line + block.text.count("\n")
        for block in BLOCKS
    )


def test_every_block_is_in_a_test() -> None:
    """Nothing on the page is untried, but for the diagram."""
    tried = {*COMMANDS, *CONFIGURATIONS, *DROP_INS, find_block("csv", "id,name")}
    tried |= {block for block in BLOCKS if block.text in UNITS.values()}
    tried |= {block for block in BLOCKS if block.language == "sql"}
    tried |= {block for block in BLOCKS if block.text.startswith("[client]")}
    tried |= {block for block in BLOCKS if block.text.startswith("*:*:wazuh")}
    shown = [output_of(block) for block in COMMANDS]
    tried |= {block for block in BLOCKS if block.language == "text" and block.text in shown}
    untried = [block for block in BLOCKS if block not in tried]
    assert [block.language for block in untried] == ["mermaid"]
