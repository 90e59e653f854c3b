"""The README is true: its commands run in its order, its units are sound, its figures the script's.

The paths of a host that stand in a block, and in the copy of the script that is installed, are put
below a folder of the test (`Host.map`), and `sudo` is left out. Nothing else in a block is changed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import database_servers
import pytest
from authd import Authd
from conftest import ROOT, SAMPLE, SCRIPT, SUPPORTED, Record, interpreters, script
from serving import Server, started

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README)
FLAT = " ".join(re.sub(r"(?ms)^```.*?^```$", "", README).split())  # without blocks, unwrapped
PROGRAM = "/usr/local/bin/agent_key_request.py"
PATHS = re.compile(r"(?<![\w./-])/(?=usr/local/bin/|var/|run/|etc/agent)")
LIMIT = 60.0  # seconds for one command

# Each block, by its language and what no other of them has; together they are all (the last test).
RUN, PRINTED = ("sh", "make run"), ("text", '{"error": 0')
INSTALL, FIRST_STEPS = ("sh", "make install"), ("sh", "--enroll")
NEW, OLD = ("xml", "<key_request>"), ("xml", "<wodle")
MANAGER, DIAGRAM = ("sh", "--check --manager"), ("mermaid", "")
SERVE, ENABLE = ("sh", "--serve"), ("sh", "systemctl")
SQL, OPTION_FILE, GROWTH = ("sql", ""), ("ini", "[client]"), ("text", "1,000,000 agents")
UNITS = dict(re.findall(r"(?ms)`/etc/systemd/system/([^`]+)`[^\n]*\n```ini\n(.*?)^```$", README))


def block(key: tuple[str, str]) -> str:
    """The only block of that language that has those words."""
    (found,) = [text for language, text in BLOCKS if language == key[0] and key[1] in text]
    return found


# ------------------------------------------------------------------------- a host, as it is led to


class Host:
    """A manager's host below a folder, with a copy of the repository in `copy`."""

    def __init__(self, folder: Path) -> None:
        """Take the FOLDER; its name must be short enough for a socket."""
        self.folder, self.copy = folder, folder / "copy"
        for name in ("copy", "bin", "etc", "usr/local/bin", "var/lib", "run",
                     "var/ossec/etc", "var/ossec/queue/sockets"):  # fmt: skip
            (folder / name).mkdir(parents=True)
        (folder / "bin" / "python3").symlink_to(interpreters()[0].path)
        (self.copy / SCRIPT.name).write_text(self.map(SCRIPT.read_text()))
        (self.copy / SCRIPT.name).chmod(0o755)
        for name in (SAMPLE, ROOT / "Makefile"):
            shutil.copy2(name, self.copy)
        self.environment = {"PATH": f"{folder}/bin:{os.defpath}", "DESTDIR": str(folder)}
        self.program, self.home = self.path(PROGRAM), self.path("/var/ossec")
        self.socket = self.path(script.SOCKET)
        rows = list(script.open_source(str(SAMPLE), LIMIT).rows())
        self.agents = [Record(*row) for _, row in rows]
        self.keys = "".join("{} {} {} {}\n".format(*agent) for agent in self.agents)

    def map(self, text: str) -> str:
        """The text with a host's paths put below the folder, and without sudo."""
        return PATHS.sub(f"{self.folder}/", text).replace("sudo ", "")

    def path(self, name: str) -> Path:
        """Where a path of the README is."""
        return Path(self.map(name))

    def call(self, commands: str) -> subprocess.CompletedProcess[str]:
        """Run what the README has, in the copy of the repository, both streams in one."""
        text = self.map(commands).replace("make install", f"make -s install DESTDIR={self.folder}")
        return subprocess.run(
            ["sh", "-ec", text], cwd=self.copy, env=self.environment, text=True, timeout=LIMIT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=False)  # fmt: skip

    def sh(self, commands: str) -> str:
        """What they print; they must succeed."""
        done = self.call(commands)
        assert done.returncode == 0, done
        return done.stdout

    def configure(self, version: str, settings: str) -> None:
        """Be a manager of that version with these settings in its ossec.conf."""
        (self.home / "VERSION.json").write_text(json.dumps({"version": version}))
        (self.home / "etc/client.keys").write_text(self.keys)
        (self.home / "etc/ossec.conf").write_text(
            f"<ossec_config>\n{self.map(settings)}</ossec_config>\n")  # fmt: skip

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        """Run the README's server."""
        command = ["sh", "-ec", "exec " + self.map(block(SERVE))]
        self.socket.parent.mkdir(exist_ok=True)
        with started(command, self.socket, env=self.environment) as server:
            server.wait_line("ready")
            yield server


@pytest.fixture(scope="module")
def bare() -> Iterator[Host]:
    """A host with nothing installed."""
    if not shutil.which("make"):
        pytest.skip("make is not here")
    folder = Path(tempfile.mkdtemp(prefix="akr-", dir="/tmp"))
    yield Host(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def host(bare: Host) -> Host:
    """The host after the first steps: the program is installed, and the store made."""
    (bare.copy / "client.keys").write_text(bare.keys)
    bare.sh(block(INSTALL))
    authd = Authd(bare.home)
    try:
        said = bare.sh(block(FIRST_STEPS)).splitlines()
        assert said == [f"{len(bare.agents)} agents, 0 errors, 0 notes"]
        assert sorted(authd.agents) == [agent.id for agent in bare.agents]
    finally:
        authd.close()
    return bare


# ------------------------------------------------------------------------------- the commands


def test_run_and_test(bare: Host) -> None:
    """What the README shows is the beginning of what the first prints; the second has its rule."""
    run, test = block(RUN).splitlines()
    assert bare.sh(run).startswith(block(PRINTED))
    assert "pytest" in bare.sh(test + " -n")
    (words,) = re.findall(r"`python3 (-m pytest [^`]*)`", FLAT)
    command = [sys.executable, *shlex.split(words), "--version"]
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_install(bare: Host) -> None:
    """With `make`, and without."""
    (without,) = re.findall(r"`sudo (install [^`]*)`", FLAT)
    command, version = block(INSTALL).splitlines()
    for install in command, without:
        bare.program.unlink(missing_ok=True)
        said = bare.sh(install + "\n" + version).split()
        digest = hashlib.sha256(bare.program.read_bytes()).hexdigest()
        assert said == [SCRIPT.name, script.VERSION, "sha256:" + digest]


def test_first_steps(host: Host) -> None:
    """A store that root alone reads, and the same answer again; twice is as once."""
    store = host.path(script.STORE)
    assert [path.stat().st_mode & 0o777 for path in (store, store.parent)] == [0o600, 0o700]
    assert host.sh(PROGRAM + " id 001") == block(PRINTED).splitlines(keepends=True)[1]
    host.sh("\n".join(block(FIRST_STEPS).splitlines()[:2]))


@pytest.mark.parametrize("version", ["4.4.0", "4.3.11"])
@pytest.mark.parametrize("served", [False, True], ids=["alone", "with the server"])
def test_manager(host: Host, version: str, served: bool) -> None:
    """`--check --manager` finds the README's configuration sound, with the socket added, too."""
    is_new = tuple(map(int, version.split(".")[:2])) >= (4, 4)
    settings = block(NEW if is_new else OLD)
    with host.serving() if served else contextlib.nullcontext():
        if served:
            (line,) = re.findall(r"`(<socket>[^`]*</socket>)`", FLAT)
            settings = settings.replace("<exec_path>", line + "\n<exec_path>")
            if not is_new:
                (line,) = re.findall(r"`(<exec_path>[^`]*</exec_path>)`", FLAT)
                settings = re.sub("<exec_path>.*</exec_path>", line, settings)
        host.configure(version, f"<auth>\n{settings}</auth>\n" if is_new else settings)
        report = host.sh(block(MANAGER))
    assert report.count("gave a sound answer") == (2 if served and is_new else 1), report
    assert f"{len(host.agents)} enrolled, 0 not, 0 with another" in report


def test_manager_that_asks_nobody(host: Host) -> None:
    """It says so, and what to use."""
    host.configure("5.0.0", "")
    done = host.call(block(MANAGER))
    assert done.returncode == 1
    assert "use --enroll" in done.stdout


def test_options_go_before_the_request(host: Host) -> None:
    """The example of an exec_path with an option works with the words appended."""
    (command,) = re.findall(r"options go before it: `([^`]*)`", FLAT)
    lines = ["id,name,ip,key", *map(",".join, host.agents), ""]
    host.path("/etc/agents.csv").write_text("\n".join(lines))
    assert json.loads(host.sh(command + " id 002"))["data"]["id"] == "002"


def test_server(host: Host) -> None:
    """It listens where it is said to, and is asked as is said."""
    (ask,) = [line for line in block(ENABLE).splitlines() if "systemctl" not in line]
    with host.serving() as server:
        assert host.sh(ask) == host.sh(PROGRAM + " id 001")
        assert not [agent for agent in host.agents if agent.key in "".join(server.lines)]
        server.process.terminate()
        server.end()
    assert json.loads(host.sh(ask))["error"] == 2


def test_json_report(host: Host) -> None:
    """The members that are named."""
    (named,) = re.findall(r"prints one object: (.*?)\. Both", FLAT)
    report = json.loads(host.sh(PROGRAM + " --check --json"))
    members = set(re.findall(r"`(\w+)`", named))
    assert members == set(report) | set(report["findings"][-1])


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
    """Python tells of what it opens; SQLite opens its file itself, and that stays as it was."""
    place = host.path(script.STORE).parent if source == "agents.db" else host.copy
    before = {entry.name: entry.stat() for entry in os.scandir(place)}
    python = [sys.executable, "-BISc", HOOK, str(host.copy / SCRIPT.name)]
    done = subprocess.run([*python, "--db", str(place / source), "id", "001"], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert (done.stdout, done.stderr) == (block(PRINTED).splitlines(keepends=True)[1], "")
    after = {entry.name: entry.stat() for entry in os.scandir(place)}
    assert {name: status.st_mtime_ns for name, status in before.items()} == {
        name: status.st_mtime_ns for name, status in after.items()}  # fmt: skip


# ------------------------------------------------------------------------------- texts and figures


def test_options() -> None:
    """README and --help name the same, and nothing of others' than this."""
    option, of_others = re.compile(r"(?<![\w-])(?:--[a-z]+|-v)\b"), {"--batch", "--now"}
    assert set(option.findall(README)) - of_others == set(option.findall(script.HELP))


FIGURES = {  # what the README must say, of the script's own constants
    "source": f"else `$AGENT_KEY_DB`, else `{script.STORE}`",
    "socket": f"It listens at `{script.SOCKET}`",
    "timeout": f"the program's own `--timeout` ({script.SECONDS:g} s)",
    "server timeout": f"`--timeout {script.SERVER_SECONDS:g}`",
    "workers": f"`--workers {script.WORKERS}`",
    "findings": f"list {script.FINDINGS} at most",
    "homes": "other than `{}` or `{}`".format(*script.HOMES),
    "log": "Errors {}, {}, {}, {}, and whose key".format(*script.FOR_THE_OPERATOR[1:]),
    "version": f"this one ({script.VERSION.rpartition('.')[0]})",
    "Python": f"CPython 3.{SUPPORTED[0]} to 3.{SUPPORTED[-1]}",
    **script.RULES,
}


@pytest.mark.parametrize("text", FIGURES.values(), ids=FIGURES)
def test_figures(text: str) -> None:
    assert text in FLAT


def test_help_has_the_same_figures() -> None:
    seconds = f"--timeout: {script.SECONDS:g} s; of --serve: {script.SERVER_SECONDS:g} s"
    workers = f"--workers {script.WORKERS}"
    for text in script.STORE, script.SOCKET, *script.HOMES, seconds, workers:
        assert text in script.HELP


def test_drivers_are_tried_in_that_order() -> None:
    for scheme, names in script.DRIVERS.items():
        (text,) = re.findall(rf"- `{scheme}://[^`]*` by (.*?)(?= - | What)", FLAT)
        assert tuple(re.sub(r" \([^)]*\)", "", text).split(", ")) == names


def test_answers() -> None:
    """Every error, with the beginning of its message."""
    told = {int(number): message for number, message in
            re.findall(r"(?m)^\| (\d) \| `([^`]*?)(?: …)?`", README)}  # fmt: skip
    expected = {number: text.strip() for number, text in script.MESSAGES.items() if number}
    assert {**told, 5: told[5].removesuffix(" id")} == expected


# ------------------------------------------------------------------------------- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units of the README as files, with the script where it is here."""
    for name, text in UNITS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace(PROGRAM, str(SCRIPT)))
    return tmp_path


def analyze(folder: Path, *words: str) -> str:
    """What systemd-analyze says about units in FOLDER; it must find nothing wrong."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    done = subprocess.run(
        [program, *words], env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True, text=True, check=False)  # fmt: skip
    if re.search("unrecognized option|Unknown (command|operation)", done.stderr):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
    return done.stdout + done.stderr


def test_units_are_sound(units: Path) -> None:
    """systemd understands each line of them, with and without the drop-ins."""
    names = [name for name in UNITS if "/" not in name]
    for drop_ins in True, False:
        said = analyze(units, "verify", "--man=no", *(str(units / name) for name in names))
        assert "agent-key" not in said, said
        if drop_ins:
            for folder in glob.glob(f"{units}/*.d"):
                shutil.rmtree(folder)


def edited(folder: Path, *words: str) -> set[str]:
    """Write the drop-ins that the README gives in words and that have these; the names of all."""
    units = set()
    edit = r"systemctl edit ([\w.-]+)` and give it `(\[Service\])`, `([^`]*)` and `([^`]*)`"
    for name, section, *lines in re.findall(edit, FLAT):
        units.add(name)
        if any(word in line for word in words for line in lines):
            (folder / (name + ".d")).mkdir()
            (folder / (name + ".d") / "override.conf").write_text("\n".join([section, *lines, ""]))
    return units


@pytest.mark.parametrize(
    ("unit", "edit", "closed", "exposure"),
    [("agent-key-request", [], True, 15), ("agent-key-request", ["PrivateNetwork"], False, 25),
     ("agent-key-import", [], False, 25), ("agent-key-import", ["--enroll"], False, 25)],
)  # fmt: skip
def test_services_are_hardened(
    units: Path, unit: str, edit: list[str], closed: bool, exposure: int
) -> None:
    """In tenths of what systemd-analyze gives, from 0 to 100; the network costs some."""
    unit += ".service"
    assert edited(units, *edit) == {"agent-key-request.service", "agent-key-import.service"}
    assert (units / (unit + ".d")).exists() is bool(edit)
    analyze(units, "verify", "--man=no", str(units / unit))
    report = analyze(units, "security", "--offline=true", f"--threshold={exposure}",
                     str(units / unit))  # fmt: skip
    found = set(re.findall(r"✓\s+(\w+)", report))
    assert "MemoryDenyWriteExecute" in found, report
    assert ("PrivateNetwork" in found) is closed, report


def test_units_are_enabled() -> None:
    """Those that are enabled are there, and say by what they are started."""
    enabled = set()
    for names in re.findall(r"systemctl enable --now ([^`\n]*)", README):
        enabled |= set(names.split())
    assert enabled == {name for name, text in UNITS.items() if "[Install]" in text}
    assert re.findall(r"systemctl kill -s HUP ([^`]*)`", README) == ["agent-key-request.service"]


def test_units_start_what_the_script_takes() -> None:
    """Their options go with each other, and each service has the full path."""
    commands = re.findall("(?m)ExecStart=([^`\n]*)", README)
    assert len(commands) == 3
    for command in commands:
        program, *words = shlex.split(command)
        assert program == PROGRAM
        assert script.task_of(*script.split_command_line(words)) == words[0]


def test_socket_has_one_path() -> None:
    assert f"ListenStream={script.SOCKET}\n" in UNITS["agent-key-request.socket"]
    state = re.findall("StateDirectory=(.*)", UNITS["agent-key-import.service"])
    assert [f"/var/lib/{name}" for name in state] == [os.path.dirname(script.STORE)]


# ------------------------------------------------------------------------------- databases


@pytest.mark.slow
@pytest.mark.parametrize("scheme", script.DRIVERS)
def test_database(host: Host, scheme: str) -> None:
    """From making the user to an answer, and a store by the timer's command."""
    if database_servers.missing(scheme):
        pytest.skip("not here: " + database_servers.missing(scheme))
    python = interpreters()[0].path
    if not any(database_servers.has_driver(python, name) for name in script.DRIVERS[scheme]):
        pytest.skip(f"{python} has no driver for {scheme}")
    server, is_mysql = database_servers.running(scheme), scheme == "mysql"
    if not server.has_tls:
        pytest.skip("no openssl here")

    def here(text: str) -> str:
        """The text with this server, and a user that other tests do not have."""
        return re.sub("db.example.org(:5432)?", f"127.0.0.1:{server.port}", text).replace(
            "agent_reader", "readme_reader")  # fmt: skip

    (statements,) = [block(SQL)] if is_mysql else re.findall("`(CREATE ROLE[^`]*)`", FLAT)
    if not is_mysql:  # every role may, where no test has made the schema anew
        statements += "GRANT USAGE ON SCHEMA public TO agent_reader;"
    server.load(host.agents)
    server.sql(here(statements))
    try:
        (line,) = re.findall(r"`/etc/agent-keys\.pgpass` has one line, `([^`]*)`", FLAT)
        for path, text in ("cnf", block(OPTION_FILE)), ("pgpass", line + "\n"):
            host.path("/etc/agent-keys." + path).write_text(host.map(here(text)))
            host.path("/etc/agent-keys." + path).chmod(0o600)
        shutil.copy(server.folder + "/ca.pem", host.path("/etc/agent-keys.pem"))
        (url,) = re.findall(rf"`({scheme}://[^`]*)` by", FLAT)
        (tls,) = re.findall(r"`(&sslmode[^`]*)`", FLAT)
        said = host.sh(f"{PROGRAM} --db '{here(url)}{'' if is_mysql else tls}' id 001")
        assert said == block(PRINTED).splitlines(keepends=True)[1]
        if is_mysql:
            (command,) = re.findall("ExecStart=(.*mysql.*)", UNITS["agent-key-import.service"])
            assert host.sh(here(command)) == ""
    finally:
        server.sql(here("DROP USER 'agent_reader'@'%';" if is_mysql else
                        "DROP OWNED BY agent_reader; DROP ROLE agent_reader;"))  # fmt: skip


# ------------------------------------------------------------------------------- the page


def test_links_lead_somewhere() -> None:
    """Every link within the page, and every file that is named; the contents are in order."""
    heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
             for head in re.findall(r"(?m)^##+ (.*)", README)]  # fmt: skip
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= set(heads)
    contents = re.findall(r"\]\(#([\w-]+)\)", FLAT[FLAT.index("**Contents:**") :])
    assert contents[: len(heads) - 2] == [head for head in heads[1:] if head != "what-changed"]
    files = re.findall(r"`((?:tests/)?\w+\.(?:py|md|sql))`", FLAT)
    assert len(files) > 8
    for name in set(files) - {SCRIPT.name}:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_every_block_is_in_a_test() -> None:
    """None stands there untried, but for the diagram and the plot, and no figure is missing."""
    keys = [RUN, PRINTED, INSTALL, FIRST_STEPS, NEW, OLD, MANAGER, DIAGRAM, SERVE, ENABLE, SQL,
            OPTION_FILE, GROWTH]  # fmt: skip
    assert len(set(map(block, keys)) | set(UNITS.values())) == len(BLOCKS)
    assert "<<" not in README
    assert len(README.splitlines()) <= 320
