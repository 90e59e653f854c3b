"""The README is true: its commands run, its units are sound, its options are the script's.

A path of the README is put under a folder of the test (`Host.map`): `/etc/agents.db` becomes
`FOLDER/etc/agents.db`. The name of its database server becomes that of one that the test has
started. Nothing else in a block is changed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import database_servers
import pytest
from conftest import ROOT, SAMPLE, SCRIPT, Caller, Python, interpreters
from database_servers import DRIVERS, READER, WIDE_COLUMNS, MariaDB, Server
from serving import Load, agent_answered, serving, started, until

README = (ROOT / "README.md").read_text()
PROGRAM = "/usr/local/bin/" + SCRIPT.name
DATABASE = "db.example.org"
# Options of mysql, of systemctl, of python3 and of the shell.
OF_OTHERS = {"--batch", "-e", "--defaults-extra-file", "--now", "-c", "-o"}
MAPPED = re.compile(r"(?<![\w./-])/(?=(?:usr/local|var/ossec|etc|run)/)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
LIMIT = 60.0  # seconds for one command
QUERY = "SELECT id, name, ip, agent_key FROM agent"


# --- the README --------------------------------------------------------------------------------


def blocks(language: str, word: str = "") -> list[str]:
    """The fenced blocks of that language that hold the word."""
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)
    return [text for its_language, text in found if its_language == language and word in text]


def block(language: str, word: str) -> str:
    """The only such block."""
    (found,) = blocks(language, word)
    return found


def table(head: str) -> list[list[str]]:
    """The cells of the table whose first line starts with these words, without its head."""
    lines = README[README.index("\n" + head) + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


def sample_rows() -> list[tuple[str, ...]]:
    """The agents of sample.db.sql."""
    database = sqlite3.connect(":memory:")
    database.executescript(SAMPLE.read_text())
    rows = database.execute(QUERY).fetchall()
    database.close()
    return rows


CLIENT_KEYS = (
    "# a comment\n"
    + "".join("{} {} {} {}\n".format(*row) for row in sample_rows())
    + "007 !removed any 0123456789abcdef\n"
)


class Host:
    """A manager's host in a folder, with the script installed and the sample's agents enrolled."""

    def __init__(self, folder: Path, ask: Caller) -> None:
        """Take the FOLDER; its name must be short enough for a socket."""
        self.folder, self.ask = folder, ask
        for name in ("usr/local/bin", "var/ossec/etc", "var/ossec/queue/sockets",
                     "etc/cron.hourly", "run/agent-key-request", "copy"):
            (folder / name).mkdir(parents=True)
        for source in (SCRIPT, SAMPLE):
            shutil.copy2(source, folder / "copy" / source.name)
        self.program = self.path(PROGRAM)
        default = 'SOCKET = "/var/ossec/'  # the only path of a manager that the script writes to
        assert SCRIPT.read_text().count(default) == 1
        text = SCRIPT.read_text().replace(default, self.map(default))
        self.program.write_text(text)
        self.program.chmod(0o755)
        self.path("/var/ossec/etc/client.keys").write_text(CLIENT_KEYS)
        self.environment = {"PATH": f"{folder}/usr/local/bin:{ask.path}"}
        self.store = self.path("/etc/agents.db")

    def path(self, name: str) -> Path:
        """Where a path of the README is."""
        return Path(self.map(name))

    def map(self, text: str) -> str:
        """The text with the README's paths put under the folder."""
        return MAPPED.sub(lambda _: f"{self.folder}/", text)

    def run(self, *words: str | Path, **how: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in the copied folder, with both streams in one."""
        return subprocess.run(
            words, cwd=self.folder / "copy", env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False, input=how.get("input"),
        )

    def sh(self, script: str) -> str:
        """What the shell prints for a block of the README; it must succeed."""
        done = self.run("sh", "-ec", self.map(script), input="")
        assert done.returncode == 0, done
        return done.stdout

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        """Make a file of the README's."""
        path = self.path(name)
        path.write_text(text)
        path.chmod(mode)
        return path

    def make_store(self) -> bytes:
        """Make /etc/agents.db of the sample, not by the script; gives what is in the file."""
        database = sqlite3.connect(self.store)
        database.executescript(SAMPLE.read_text())
        database.close()
        self.store.chmod(0o600)
        return self.store.read_bytes()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="akr-readme-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def host(ask: Caller, folder: Path) -> Host:
    """A host of its own."""
    return Host(folder, ask)


# --- commands and answers ----------------------------------------------------------------------


def test_json_is_what_the_script_prints(ask: Caller) -> None:
    """Byte for byte."""
    (line,) = blocks("json")
    assert ask("id", "001", db=SAMPLE).output.decode() == line


def test_three_commands(host: Host) -> None:
    """From a client.keys to a server that answers, at the path that the README names."""
    make, check, serve = block("sh", "--import /var/ossec").splitlines()
    assert host.sh(make) == ""
    assert host.store.stat().st_mode & 0o777 == 0o600
    report = host.sh(check).splitlines()
    assert report[-1].startswith(f"{len(sample_rows())} agents, ")
    (path,) = re.findall(r"The server listens on `(.*?)`", README)
    command = ["sh", "-c", "exec " + host.map(serve)]
    with started(command, host.path(path), env=host.environment) as server:
        server.wait_ready()
        for row in sample_rows():
            assert tuple(server.reply("id:" + row[0])["data"].values()) == row
        assert server.reply("id:007")["error"] == 4
        server.stop()


def test_without_a_server(host: Host) -> None:
    """The first two of the three commands, and a request."""
    make, check, _serve = block("sh", "--import /var/ossec").splitlines()
    assert host.sh(make + "\n" + check)
    assert host.sh(block("sh", "--db /etc/agents.db id 001")) == blocks("json")[0]


def test_a_store_from_the_sample(host: Host) -> None:
    """In a copy of the repository, with its table and indexes as in the sample."""
    assert host.sh(block("sh", "--import sample.db.sql")) == blocks("json")[0]
    schemas = []
    for path in (host.folder / "copy" / "agents.db", host.store):
        if path == host.store:
            host.make_store()
        database = sqlite3.connect(path)
        rows = database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        schemas.append([(name, re.sub(r"\W+", " ", sql)) for name, sql in rows])
        database.close()
    assert schemas[0] == schemas[1]


def test_check_with_a_socket(host: Host) -> None:
    """The one object of the README, with the members that it names."""
    host.make_store()
    host.store.chmod(0o644)
    command = block("sh", "--check --json")
    (path,) = re.findall(r"--socket (\S+)", command)
    with serving(host.store, host.path(path)) as server:
        report = json.loads(host.sh(command))
        server.stop()
    named = re.findall(r"prints one object: (.*?)Never", README, re.DOTALL)[0]
    members = set(re.findall(r"`(\w+)`", named))
    assert members == set(report) | set(report["findings"][0])
    assert report["agents"] == len(sample_rows())
    assert all(finding["level"] == "note" for finding in report["findings"])
    done = host.run("sh", "-c", host.map(command), input="")
    assert done.returncode == 1, "the server is gone"
    assert '"error"' in done.stdout


@pytest.mark.parametrize(
    "text", ["", "id,name,ip,key\n001,a,any,k\n002,b,any,ke", "001 b!d any k\n"]
)
def test_standard_input_that_is_refused(host: Host, text: str) -> None:
    """Empty, ended within a line, or with a record that breaks a rule."""
    before = host.make_store()
    done = host.run(host.program, "--db", host.store, "--import", "-", input=text)
    assert done.returncode == 1 and done.stdout
    assert host.store.read_bytes() == before


def test_what_is_no_database_is_not_replaced(host: Host) -> None:
    """--db and the file to import mixed up."""
    keys = host.path("/var/ossec/etc/client.keys")
    done = host.run(host.program, "--db", keys, "--import", host.folder / "copy" / SAMPLE.name)
    assert done.returncode == 1 and done.stdout
    assert keys.read_text() == CLIENT_KEYS


ERRORS = {  # a request for each error that can be had, and the source it goes to
    "1": (("id",), "agents.csv"),
    "2": (("id", "001"), "missing"),
    "3": (("what", "001"), "agents.csv"),
    "4": (("id", "009"), "agents.csv"),
    "5": (("id", "001"), "agents.csv"),
    "6": (("id", "002"), "agents.csv"),
}


@pytest.mark.parametrize("row", table("| error |"), ids=lambda row: row[0])
def test_errors(ask: Caller, tmp_path: Path, row: list[str]) -> None:
    """Each has the message of its row."""
    number, message = row[0], row[1].split("`")[1].rstrip("…")
    if number not in ERRORS:
        assert number == "9" and f'9: "{message}"' in SCRIPT.read_text()
        return
    (tmp_path / "agents.csv").write_text("id,name,ip,key\n001,a,,k\n001,b,,k\n002,a b,,k\n")
    words, source = ERRORS[number]
    answer = ask(*words, db=tmp_path / source)
    assert answer.error == int(number)
    assert answer.message.startswith(message)


def test_every_error_is_there() -> None:
    """Those above, and the one for what nobody has foreseen."""
    assert [row[0] for row in table("| error |")] == [*ERRORS, "9"]


def test_help_and_readme_name_the_same_options(ask: Caller) -> None:
    """What is in one and not in the other."""
    in_help = set(OPTION.findall(ask.call("--help").output.decode()))
    assert "-v" in in_help and "--import" in in_help
    assert set(OPTION.findall(README)) - OF_OTHERS == in_help


def test_exec_path_of_the_managers_own_python(host: Host) -> None:
    """The README's line works where its interpreter exists."""
    (line,) = [line for line in README.splitlines() if "framework/python" in line]
    (command,) = re.findall(r"<exec_path>(.*)</exec_path>", line)
    python = host.path("/var/ossec/framework/python/bin/python3")
    python.parent.mkdir(parents=True)
    python.symlink_to(host.ask.python.path)
    host.make_store()
    done = host.run(*host.map(command).split(" "), "id", "001")
    assert done.stdout == blocks("json")[0]


def test_links_lead_somewhere() -> None:
    """Every link within the page."""
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
             for head in re.findall(r"(?m)^#+ (.*)", README)}
    links = set(re.findall(r"\]\(#([\w-]+)\)", README))
    assert links and links <= heads


# --- systemd -----------------------------------------------------------------------------------


def unit(name: str) -> str:
    """The block that the README calls by this name of a file, the first after the name."""
    rest = README[README.index(f"`/etc/systemd/system/{name}`") :]
    return re.findall(r"(?ms)^```ini\n(.*?)^```$", rest)[0]


def write_units(folder: Path, *names: str) -> list[Path]:
    """Units of the README as files, with the script where it is here."""
    paths = []
    for name in names:
        paths.append(folder / name)
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(unit(name).replace(PROGRAM, str(SCRIPT)))
    return paths


def analyze(folder: Path, *words: str | Path) -> str:
    """What systemd-analyze says about units in FOLDER; it must find nothing wrong."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    done = subprocess.run(
        [program, *words], env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True, text=True, check=False,
    )
    if re.search("unrecognized option|Unknown (command|operation)", done.stderr):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
    return done.stdout + done.stderr


SERVER_UNITS = ("agent-key-request.socket", "agent-key-request.service")
DROP_IN = "agent-key-request.service.d/network.conf"
TIMER_UNITS = ("agent-keys-import.service", "agent-keys-import.timer")


@pytest.mark.parametrize("names", [SERVER_UNITS, (*SERVER_UNITS, DROP_IN), TIMER_UNITS])
def test_units_are_sound(tmp_path: Path, names: tuple[str, ...]) -> None:
    """systemd understands each line of them."""
    paths = [path for path in write_units(tmp_path, *names) if path.suffix != ".conf"]
    said = analyze(tmp_path, "verify", "--man=no", *paths)
    assert "agent-key" not in said, said


@pytest.mark.parametrize("names", [SERVER_UNITS, (*SERVER_UNITS, DROP_IN)])
def test_server_is_hardened(tmp_path: Path, names: tuple[str, ...]) -> None:
    """An exposure of at most 3.0 of 10, also with access to a database on the network."""
    path = write_units(tmp_path, *names)[1]
    command = re.search(r"ExecStart=(\S+)", unit(path.name))
    assert command and command[1] == PROGRAM
    report = analyze(tmp_path, "security", "--offline=true", "--threshold=30", path)
    closed = set(re.findall(r"✓\s+(\w+)", report))
    assert "MemoryDenyWriteExecute" in closed, report
    assert ("PrivateNetwork" in closed) == (DROP_IN not in names), report


# --- database servers --------------------------------------------------------------------------


def lone_python(folder: Path, driver: str) -> Python:
    """An interpreter that has this driver and no other; skips the test where there is none."""
    for python in interpreters():
        if database_servers.has_driver(python.path, driver):
            path = database_servers.lone_python(python.path, folder / "python", [driver])
            return Python(str(path), python.version)
    pytest.skip(f"no interpreter here has {driver} in its site-packages")


def any_driver(scheme: str) -> str:
    """The first driver that an interpreter here has."""
    for driver in DRIVERS[scheme]:
        if any(database_servers.has_driver(python.path, driver) for python in interpreters()):
            return driver
    pytest.skip("no interpreter here has one of " + ", ".join(DRIVERS[scheme]))


class Live:
    """A host and a database server with the sample's agents, without indexes and without a reader.

    The README's own statements and files make the rest.
    """

    def __init__(self, server: Server, host: Host) -> None:
        """Take the server and the host."""
        self.server, self.host, self.place = server, host, f"127.0.0.1:{server.port}"
        server.make_healthy()
        server.drop()
        mysql = isinstance(server, MariaDB)
        server.sql(f"DROP {'USER' if mysql else 'ROLE'} IF EXISTS {READER}")
        server.sql(f"CREATE TABLE agent ({WIDE_COLUMNS})")
        server.insert(sample_rows())
        if mysql:
            link = host.path("/usr/local/bin/mysql")
            link.symlink_to(server.programs["mariadb"])

    @property
    def statements(self) -> list[str]:
        """The README's statements for the administrator: the user, then the right."""
        word = "ON wazuh.agent" if isinstance(self.server, MariaDB) else "ON agent"
        return block("sql", word).splitlines()

    def write_secrets(self) -> None:
        """The README's file with the password."""
        if isinstance(self.server, MariaDB):
            text = block("ini", "[client]")
            here = f"127.0.0.1\nport = {self.server.port}"
            assert "`/etc/agent-keys.cnf`" in README
            self.host.write("/etc/agent-keys.cnf", text.replace(DATABASE, here))
        else:
            text = block("", "choose-a-password")
            assert "`/etc/agent-keys.pgpass`" in README
            self.host.write("/etc/agent-keys.pgpass", self.here(text))

    def let_in(self) -> None:
        """Make the user, the right, and the file."""
        for statement in self.statements:
            self.server.sql(statement)
        self.write_secrets()

    def here(self, text: str) -> str:
        """A text of the README with the database and the files that are here."""
        return self.host.map(re.sub(rf"{DATABASE}(:\d+)?", self.place, text))

    @property
    def url(self) -> str:
        """The README's URL."""
        (url,) = re.findall(rf"^--db ({self.server.scheme}://.*)$", README, re.MULTILINE)
        return self.here(url)

    def ask(self, *words: str, url: str = "") -> dict[str, object]:
        """The answer of the database; it tells no password."""
        done = self.host.run(self.host.program, "--db", url or self.url, *words)
        assert done.returncode == 0 and "choose" not in done.stdout, done
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    def check(self) -> str:
        """The report of --check; it finds no error and tells no password."""
        done = self.host.run(self.host.program, "--db", self.url, "--check")
        assert done.returncode == 0 and "choose" not in done.stdout, done
        return done.stdout


def live(request: pytest.FixtureRequest, scheme: str, driver: str) -> Live:
    """A Live with an interpreter that has this driver; none is needed for ""."""
    server: Server = request.getfixturevalue("mariadb" if scheme == "mysql" else "postgresql")
    folder: Path = request.getfixturevalue("folder")
    python = lone_python(folder, driver) if driver else interpreters()[0]
    return Live(server, Host(folder / "host", Caller(python, folder)))


BOTH = [(scheme, driver) for scheme, names in DRIVERS.items() for driver in names]


@pytest.mark.parametrize(("scheme", "driver"), BOTH, ids=[driver for _, driver in BOTH])
def test_grant_and_indexes(request: pytest.FixtureRequest, scheme: str, driver: str) -> None:
    """User, right, file, URL and indexes of the README: the database then answers."""
    it = live(request, scheme, driver)
    user, right = it.statements
    it.write_secrets()
    assert it.ask("id", "001")["error"] == 2, "nobody has made the user yet"
    it.server.sql(user)
    assert it.ask("id", "001")["error"] == 2, "the user has no right yet"
    it.server.sql(right)
    wanted = json.loads(blocks("json")[0])
    assert it.ask("id", "001") == wanted
    report = it.check()
    statements = re.findall(r"requests are slow: (.*;)$", report, re.MULTILINE)
    assert len(statements) == 3, report
    for statement in statements:
        it.server.sql(statement)
    assert "index" not in it.check()
    assert it.ask("id", "001") == it.ask("ip", "192.168.1.100") == wanted
    assert it.ask("ip", "10.20.30.7")["data"] == it.ask("id", "003")["data"]


def test_service_file(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All that a connection needs, in libpq's own file."""
    it = live(request, "postgresql", any_driver("postgresql"))
    it.let_in()
    (url,) = re.findall(r"`--db (postgresql://\S*\?service=\S+)`", README)
    service = tmp_path / "pg_service.conf"
    service.write_text(
        f"[{url.rpartition('=')[2]}]\nhost=127.0.0.1\nport={it.server.port}\ndbname=wazuh\n"
        f"user={READER}\nsslmode=prefer\npassfile={it.host.path('/etc/agent-keys.pgpass')}\n")
    it.host.environment["PGSERVICEFILE"] = str(service)
    assert it.ask("id", "001", url=url) == json.loads(blocks("json")[0])


def test_drivers_are_those_of_the_script(folder: Path) -> None:
    """In the order in which they are tried: a host that has none is told of them."""
    path = database_servers.lone_python(interpreters()[0].path, folder / "python", [])
    host = Host(folder / "host", Caller(Python(str(path), ""), folder))
    names = "|".join(re.escape(name) for _, name in BOTH)
    told = []
    for scheme in DRIVERS:
        done = host.run(host.program, "--db", f"{scheme}://{READER}@{DATABASE}/wazuh", "id", "001")
        assert '"error": 2' in done.stdout and "--import" in done.stdout
        told += [(scheme, name) for name in re.findall(rf"\b({names})\b", done.stdout)]
    scheme, in_readme = "", []
    for row in table("| database |"):
        scheme = row[0].strip("`").partition(":")[0] or scheme
        in_readme.append((scheme, row[1]))
    assert told == in_readme == BOTH


# --- refreshing from MySQL ---------------------------------------------------------------------


@pytest.fixture
def cron(request: pytest.FixtureRequest) -> Live:
    """A host with the script for cron, and a MariaDB that lets it in."""
    it = live(request, "mysql", "")
    it.let_in()
    (path, mode) = re.findall(r"`(/etc/cron\.hourly/[\w-]+)`, mode (\d+)", README)[0]
    assert "." not in os.path.basename(path), "run-parts passes over such a name"
    it.host.write(path, it.here(block("sh", "--import -")), int(mode, 8))
    return it


def refresh(it: Live) -> subprocess.CompletedProcess[str]:
    """What cron does."""
    (script,) = it.host.path("/etc/cron.hourly").iterdir()
    return it.host.run(script, input="")


def test_refresh_by_cron(cron: Live) -> None:
    """The store holds what the table does, and cron has nothing to mail."""
    assert "SELECT id,name,ip,agent_key FROM agent" in block("sh", "--import -")
    key = 'back\\slash "quoted" \\n'
    cron.server.insert([("008", "new", None, key)])
    done = refresh(cron)
    assert (done.returncode, done.stdout) == (0, "")
    assert cron.host.store.stat().st_mode & 0o777 == 0o600
    ask = cron.host.ask
    assert ask("id", "008", db=cron.host.store).data == {
        "id": "008", "name": "new", "ip": "any", "key": key}
    assert ask("id", "001", db=cron.host.store).output.decode() == blocks("json")[0]


def test_refresh_while_a_server_runs(cron: Live) -> None:
    """It takes the new store over without one failed answer."""
    cron.host.make_store()
    with serving(cron.host.store, cron.host.path("/run/agent-key-request/socket")) as server:
        with Load(server.path, ["id:001", "id:003"], agent_answered, threads=4) as load:
            load.wait_answers(50)
            cron.server.sql("UPDATE agent SET agent_key = 'new' WHERE id = '001'")
            done = refresh(cron)
            assert (done.returncode, done.stdout) == (0, "")
            until(lambda: server.reply("id:001")["data"]["key"] == "new", "the new store")
            load.wait_answers(50)
        assert not load.faults, load.faults[:5]
        server.stop()


CUTS = {  # what is left of the output of a `mysql` that is killed
    "all of it": "cat",
    "none": "head -c 0",
    "its header": "head -n 1",
    "whole lines": "head -n 3",
    "a part of a key": "head -n 3 | head -c -9",
    "a part of a name": "head -n 2 | cut -c -8",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_mysql_killed(cron: Live, cut: str) -> None:
    """Wherever that cuts the table off, the old store stays, and cron mails what there is."""
    before = cron.host.make_store()
    cron.host.path("/usr/local/bin/mysql").unlink()
    client = f'#!/bin/sh\n{cron.server.programs["mariadb"]} "$@" | {cut}\nkill -9 $$\n'
    cron.host.write("/usr/local/bin/mysql", client, 0o755)
    done = refresh(cron)
    assert done.returncode == 1 and "agent_key_request: " in done.stdout
    assert cron.host.store.read_bytes() == before


def test_refresh_while_the_database_is_away(cron: Live) -> None:
    """So does it then, and with a table that is empty, not there, or not for this user."""
    before = cron.host.make_store()
    for statement in ("DELETE FROM agent", f"DROP USER {READER}", ""):
        if statement:
            cron.server.sql(statement)
        else:
            cron.server.kill()
        done = refresh(cron)
        assert done.returncode == 1 and "agent_key_request: " in done.stdout, statement
        assert cron.host.store.read_bytes() == before


def test_refresh_by_timer(request: pytest.FixtureRequest) -> None:
    """The command of the unit, with the README's file, against a database."""
    it = live(request, "mysql", any_driver("mysql"))
    it.let_in()
    (command,) = re.findall(r"(?ms)^ExecStart=(.*?[^\\])$", unit(TIMER_UNITS[0]))
    words = shlex.split(it.here(command).replace("\\\n", " "))
    assert words[0] == str(it.host.program)
    assert "?" in words[-1] and "%" not in command, "systemd would read a % as its own"
    done = it.host.run(*words)
    assert (done.returncode, done.stdout) == (0, "")
    before = it.host.store.read_bytes()
    it.server.kill()
    done = it.host.run(*words)
    assert done.returncode == 1 and "choose" not in done.stdout
    assert it.host.store.read_bytes() == before
    answer = it.host.ask("ip", "192.168.1.100", db=it.host.store)
    assert answer.output.decode() == blocks("json")[0]


def test_timer_names_its_service() -> None:
    """By the same name; and it elapses."""
    service, timer = TIMER_UNITS
    assert os.path.splitext(service)[0] == os.path.splitext(timer)[0]
    assert f"systemctl enable --now {timer}" in README
    (calendar,) = re.findall(r"(?m)^OnCalendar=(.*)$", unit(timer))
    assert "Next elapse" in analyze(ROOT, "calendar", calendar)
