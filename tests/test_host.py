"""On the manager's host: every interpreter, any surroundings, signals, deadline and syslog."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, SAMPLE, SCRIPT, UNTYPED_SCHEMA, Caller, Python, Record, Stores
from manager import Answer, check_answer, run

DATA = Record()._asdict()
STYLES = ["exec", "python", "isolated"]
KINDS = ["sqlite", "indexed", "csv", "keys", "sql"]
OWN_DEADLINE = 10.0  # seconds, the default of --timeout
NOISE = 5.0  # seconds that a busy machine may add
ENDLESS_VIEW = """
    CREATE VIEW agent AS
    WITH RECURSIVE forever(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM forever)
    SELECT id || 'x' AS id, 'n' AS name, id || 'x' AS ip, 'k' AS agent_key FROM forever
"""


# ---------------------------------------------------------------- every interpreter


@pytest.mark.parametrize("style", STYLES)
def test_every_kind_of_source(ask_each: Caller, stores: Stores, style: str) -> None:
    for kind in KINDS:
        path = stores.make(kind, [Record(), Record("002", "net", "10.0.0.0/8")])
        assert ask_each("id", "001", db=path, style=style).data == DATA, kind
        assert ask_each("ip", "192.168.1.100", db=path, style=style).data == DATA, kind
        assert ask_each("ip", "10.9.8.7", db=path, style=style).data["id"] == "002", kind
        assert ask_each("id", "003", db=path, style=style).error == 4, kind
        path.unlink()


def test_every_error(ask_each: Caller, stores: Stores, locked: Callable[[Path], None]) -> None:
    rows = [Record(), Record("002", "bäd"), Record("003"), Record("003"), Record("004", key="\x7f")]
    path = stores.sqlite(rows)
    assert ask_each("id", db=path).error == 1
    assert ask_each("id", "٠٠١", db=path).error == 3
    assert ask_each("id", b"\xff\xfe", db=path).error == 3
    assert ask_each("ip", "010.0.0.1", db=path).error == 3
    assert ask_each("ip", "::1%eth0", db=path).error == 3
    assert ask_each("foo", "é", db=path).error == 3
    assert ask_each("id", "009", db=path).error == 4
    assert ask_each("id", "003", db=path).error == 5
    assert ask_each("id", "002", db=path).error == 6
    assert ask_each("id", "004", db=path).error == 6
    assert ask_each("id", "001", db=b"/no/such/\xff\xe9").error == 2
    locked(path)
    assert ask_each("--timeout", "0.5", "id", "001", db=path).error == 2


def test_what_differs_between_versions(ask_each: Caller, stores: Stores) -> None:
    """NUL in CSV and text that is no UTF-8, where the library's mind has changed over time."""
    row = ",".join(Record()).encode()
    for other in (b"002,a\0b,any,k", b"002,\xff,any,k", b'002,"a', b"002," + b"n" * 200_000):
        path = stores.text(b"id,name,ip,key\n" + row + b"\n" + other + b"\n", "agents.csv")
        assert ask_each("id", "001", db=path).data == DATA, other[:20]
    schema = UNTYPED_SCHEMA + ";INSERT INTO agent VALUES ('002', CAST(x'ff' AS TEXT), 'any', 'k')"
    path = stores.sqlite([Record(1, b"my_agent"), Record("003", "a\0b")], schema)
    assert ask_each("id", "001", db=path).data == DATA
    assert ask_each("id", "002", db=path).error == 6
    assert ask_each("id", "003", db=path).error == 6


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "LANG=C": {"LANG": "C"},
    "LC_ALL=C": {"LC_ALL": "C"},
    "LC_ALL=POSIX": {"LC_ALL": "POSIX", "LANG": "POSIX"},
    "LC_ALL=C.UTF-8": {"LC_ALL": "C.UTF-8"},
    "a locale that is not there": {"LC_ALL": "tr_TR.ISO-8859-9", "LANGUAGE": "tr"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_every_locale(ask_each: Caller, stores: Stores, environment: dict[str, str]) -> None:
    path = stores.csv([Record(), Record("002", "é"), Record("003", "ok", "any", "kéy")])
    place = stores.folder / "é.csv"
    path.rename(place)
    assert ask_each("id", "001", db=place, env=environment).data == DATA
    assert ask_each("id", "002", db=place, env=environment).error == 6
    assert ask_each("id", "003", db=place, env=environment).error == 6
    assert ask_each("id", "é", db=place, env=environment).error == 3
    assert ask_each("id", "001", db="/nö/such", env=environment).error == 2


@pytest.mark.parametrize("style", STYLES)
def test_no_environment_at_all(ask_each: Caller, stores: Stores, style: str) -> None:
    command = [*ask_each.command(style), "--db", str(stores.sqlite()), "id", "001"]
    assert check_answer(run(command, env={})).data == DATA


# ---------------------------------------------------------------- nothing planted is imported


SCRIPTS_OWN = {
    *("argparse", "csv", "hashlib", "ipaddress", "json", "random", "re", "select", "signal"),
    *(
        "socket",
        "socketserver",
        "sqlite3",
        "struct",
        "syslog",
        "tempfile",
        "threading",
        "traceback",
    ),
}


def plant(folder: Path, names: set[str], marker: Path) -> None:
    """Put a module of each name into FOLDER that leaves MARKER behind and fails."""
    folder.mkdir(parents=True, exist_ok=True)
    code = f"open({str(marker)!r}, 'a').write(__name__ + '\\n')\nraise SystemExit('planted')\n"
    for name in names:
        (folder / f"{name}.py").write_text(code)


def every_module() -> set[str]:
    """Name all modules of the library, and those that a start of Python looks for."""
    return {*sys.stdlib_module_names, "sitecustomize", "usercustomize"} - {"__main__"}


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Give a file that must not be there when the test has ended."""
    path = tmp_path / "imported"
    yield path
    assert not path.exists(), path.read_text()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("source", [SAMPLE, "agents.db", "agents.csv"], ids=str)
def test_nothing_beside_the_script_is_imported(
    ask_each: Caller, stores: Stores, marker: Path, style: str, source: str | Path
) -> None:
    stores.sqlite()
    stores.csv()
    folder = stores.folder / "installed"
    plant(folder, every_module(), marker)
    copy = shutil.copy(SCRIPT, folder)
    path = stores.folder / source
    answer = ask_each("id", "001", db=path, style=style, script=copy, cwd=folder)
    assert answer.error == 0
    assert ask_each("ip", "10.1.1.1", db=path, style=style, script=copy, cwd=folder).error == 4
    assert ask_each("foo", db=path, style=style, script=copy, cwd=folder).error == 3
    assert not (folder / "__pycache__").exists()


@pytest.mark.parametrize("cwd", [True, False], ids=["relative", "absolute"])
def test_nothing_of_the_environment_is_imported(
    ask_each: Caller, stores: Stores, marker: Path, cwd: bool
) -> None:
    folder = stores.folder / "planted"
    plant(folder, every_module(), marker)
    (folder / "startup.py").write_text(f"open({str(marker)!r}, 'a')")
    environment = {
        "PYTHONPATH": ".:" if cwd else str(folder),
        "PYTHONSTARTUP": str(folder / "startup.py"),
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONVERBOSE": "1",
        "PYTHONPROFILEIMPORTTIME": "1",
        "PYTHONIOENCODING": "utf-16",
        "PYTHONDEVMODE": "1",
        "PYTHONOPTIMIZE": "2",
        "PYTHONDEBUG": "1",
        "PYTHONPLATLIBDIR": "nowhere",
        "PYTHONEXECUTABLE": "/nowhere",
    }
    path = stores.sqlite()
    assert ask_each("id", "001", db=path, env=environment, cwd=folder).data == DATA
    environment["PYTHONHOME"] = str(folder)
    assert ask_each("id", "001", db=path, env=environment, cwd=folder).data == DATA


def test_python_path_under_a_python_that_is_named(
    ask_each: Caller, stores: Stores, marker: Path
) -> None:
    """What Python itself imports before it comes to the script is not planted."""
    folder = stores.folder / "planted"
    plant(folder, SCRIPTS_OWN - set(startup_modules(ask_each.python)), marker)
    environment = {"PYTHONPATH": str(folder)}
    answer = ask_each("id", "001", db=stores.sqlite(), style="python", env=environment)
    assert answer.data == DATA


def startup_modules(python: Python) -> list[str]:
    """Name what an interpreter imports before a script's first line."""
    code = "import sys; print(*sys.modules)"
    done = subprocess.run([python.path, "-c", code], capture_output=True, text=True, check=True)
    return [name.partition(".")[0] for name in done.stdout.split()]


def test_nothing_of_the_user_is_imported(ask_each: Caller, stores: Stores, marker: Path) -> None:
    home = stores.folder / "home"
    version = ".".join(ask_each.python.version.split(".")[:2])
    site = home / ".local" / "lib" / f"python{version}" / "site-packages"
    plant(site, every_module(), marker)
    (site / "evil.pth").write_text(f"import os; open({str(marker)!r}, 'a')\n")
    environment = {"HOME": str(home), "PYTHONUSERBASE": str(home / ".local")}
    assert ask_each("id", "001", db=stores.sqlite(), env=environment).data == DATA


# ---------------------------------------------------------------- from anywhere


def test_default_source_is_beside_the_script(ask_each: Caller, stores: Stores) -> None:
    """Beside the file itself, not beside a link to it, nor in the working directory."""
    installed = stores.folder / "lib"
    linked = stores.folder / "bin"
    for folder in (installed, linked):
        folder.mkdir()
    shutil.copy(SCRIPT, installed)
    stores.sqlite().rename(installed / "agents.db")
    stores.sqlite([]).rename(linked / "agents.db")
    (linked / "middle").symlink_to("../lib/agent_key_request.py")
    (linked / "key").symlink_to(linked / "middle")
    for style in STYLES:
        for cwd, script in ((linked, "./key"), ("/", linked / "key"), (linked, "middle")):
            if style == "exec" and script == "middle":
                continue
            answer = ask_each("id", "001", style=style, script=script, cwd=cwd)
            assert answer.data == DATA, (style, script)
    (installed / "agents.db").unlink()
    assert ask_each("id", "001", script=linked / "key", cwd=linked).error == 2
    assert sorted(os.listdir(installed)) == ["agent_key_request.py"]


@pytest.mark.parametrize("name", ["with space", "é", "a'b\"c", "$x;&", "-x", "new\nline"])
def test_a_folder_of_any_name(ask: Caller, stores: Stores, name: str) -> None:
    folder = stores.folder / name
    folder.mkdir()
    copy = shutil.copy(SCRIPT, folder)
    stores.sqlite().rename(folder / "agents.db")
    for style in STYLES:
        assert ask("id", "001", style=style, script=copy).data == DATA
    assert ask("id", "001", script="./agent_key_request.py", cwd=folder).data == DATA


def test_found_through_path(ask: Caller, stores: Stores) -> None:
    """`execvp` looks a bare name up in PATH."""
    environment = {"PATH": f"{SCRIPT.parent}:{ask.path}"}
    command = ["env", SCRIPT.name, "--db", str(stores.sqlite()), "id", "001"]
    assert check_answer(run(command, cwd=ask.folder, env=environment)).data == DATA


def test_an_unprivileged_user(open_folder: Path, nobody: int, interpreter: Python) -> None:
    """Read-only folders, a working directory that is closed to it, and sources of every kind."""
    try:
        run([interpreter.path, "-c", ""], user=nobody)
    except PermissionError:
        pytest.skip("this interpreter is closed to other users")
    shutil.copy(SCRIPT, open_folder)
    stores = Stores(open_folder)
    closed = open_folder / "closed"
    closed.mkdir()
    ask = Caller(interpreter, closed)
    closed.chmod(0o700)
    for kind in KINDS:
        path = stores.make(kind)
        open_folder.chmod(0o555)
        before = sorted(os.listdir(open_folder))
        for style in ("python", "isolated"):
            script = open_folder / SCRIPT.name
            answer = ask("id", "001", db=path, style=style, script=script, user=nobody)
            assert answer.data == DATA, kind
        path.chmod(0o600)
        assert ask("id", "001", db=path, style="python", script=script, user=nobody).error == 2
        assert sorted(os.listdir(open_folder)) == before
        path.unlink()


def test_a_wal_database_that_an_unprivileged_user_may_only_read(
    open_folder: Path, nobody: int, ask: Caller
) -> None:
    """Closed by its writer, and with a writer at work."""
    shutil.copy(SCRIPT, open_folder)
    script = open_folder / SCRIPT.name
    path = Stores(open_folder).sqlite()
    writer = sqlite3.connect(str(path), isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("UPDATE agent SET name = 'at-work'")
    how: dict[str, Any] = {"db": path, "script": script, "style": "python", "user": nobody}
    assert ask("id", "001", cwd="/", **how).data["name"] == "at-work"
    writer.close()
    open_folder.chmod(0o555)
    assert ask("id", "001", cwd="/", **how).data["name"] == "at-work"
    assert sorted(os.listdir(open_folder)) == [SCRIPT.name, path.name]


@pytest.mark.parametrize("kind", [*KINDS, "wal"])
def test_a_read_only_file_system(ask: Caller, open_folder: Path, kind: str) -> None:
    shutil.copy(SCRIPT, open_folder)
    path = Stores(open_folder).make("sqlite" if kind == "wal" else kind)
    if kind == "wal":
        writer = sqlite3.connect(str(path))
        writer.execute("PRAGMA journal_mode = WAL")
        writer.close()
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" "$0"'
    unshare = ["unshare", "--mount", "sh", "-c"]
    environment = {"PATH": f"{ask.path}:/usr/sbin:/sbin"}
    if run([*unshare, mount, open_folder], env=environment).status != 0:
        pytest.skip("no right to mount here")
    asking = mount + ' && cd "$0" && exec ./agent_key_request.py --db "$1" id 001'
    answer = check_answer(run([*unshare, asking, open_folder, path], env=environment))
    assert answer.data == DATA


# ---------------------------------------------------------------- signals and the deadline


def make_endless(stores: Stores) -> Path:
    """Make a database where no query ever ends."""
    path = stores.folder / "endless.db"
    database = sqlite3.connect(str(path))
    database.execute(ENDLESS_VIEW)
    database.close()
    return path


def test_blocked_sigterm_ends_it_while_it_waits_for_a_lock(
    ask_each: Caller, stores: Stores, locked: Callable[[Path], None]
) -> None:
    path = stores.sqlite()
    locked(path)
    answer = ask_each.call("--db", path, "--timeout", "60", "id", "001", timeout=1)
    assert answer.timed_out and not answer.held
    assert answer.seconds_to_die < NOISE
    assert b"Traceback" not in answer.output


@pytest.mark.parametrize("style", STYLES)
def test_blocked_sigterm_ends_it_within_an_endless_query(
    ask: Caller, stores: Stores, style: str
) -> None:
    path = make_endless(stores)
    words = ["--db", str(path), "--timeout", "60", "id", "001"]
    answer = ask.call(*words, style=style, timeout=1)
    assert answer.timed_out and not answer.held
    assert answer.seconds_to_die < NOISE
    assert answer.output == b""


def test_blocked_sigterm_at_any_moment(
    ask: Caller, stores: Stores, locked: Callable[[Path], None]
) -> None:
    path = stores.sqlite()
    locked(path)
    for step in range(24):
        answer = ask.call("--db", path, "--timeout", "60", "id", "001", timeout=step * 0.004)
        assert answer.timed_out and not answer.held, step
        assert answer.seconds_to_die < NOISE, step
        assert answer.output == b"", step


def test_the_own_deadline(ask: Caller, stores: Stores, locked: Callable[[Path], None]) -> None:
    """Without --timeout: error 2 after ten seconds, long before the manager's patience ends."""
    path = stores.sqlite()
    locked(path)
    answer = ask("id", "001", db=path)
    assert answer.error == 2
    assert answer.seconds < OWN_DEADLINE + NOISE


def test_the_deadline_in_every_interpreter(ask_each: Caller, stores: Stores) -> None:
    answer = ask_each("--timeout", "0.5", "ip", "10.0.0.5", db=make_endless(stores))
    assert answer.error == 2
    assert answer.seconds < 0.5 + NOISE


@pytest.mark.parametrize("style", ["exec", "python"])
def test_ctrl_c_shows_no_traceback(
    ask_each: Caller, stores: Stores, locked: Callable[[Path], None], style: str
) -> None:
    path = stores.sqlite()
    locked(path)
    process = subprocess.Popen(
        [*ask_each.command(style), "--db", path, "--timeout", "60", "id", "001"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": ask_each.path},
    )
    wait_until_it_holds(process, path)
    process.send_signal(signal.SIGINT)
    output, _nothing = process.communicate(timeout=NOISE)
    assert b"Traceback" not in output and b"KeyboardInterrupt" not in output


def wait_until_it_holds(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until PROCESS has the file at PATH open."""
    limit = time.monotonic() + NOISE
    while time.monotonic() < limit:
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            links = []
        if str(path) in links:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail("the script has not opened its source")


@pytest.mark.parametrize("output", [">/dev/full", ">&-", "2>&- >&-", "<&- >/dev/full"])
@pytest.mark.parametrize("words", ["id 001", "--version", "--help"])
def test_an_output_that_takes_nothing(ask: Caller, stores: Stores, output: str, words: str) -> None:
    """A closed or full output is nobody's fault: no traceback on what is left."""
    command = f'"$0" --db "$1" {words} {output}'
    answer = run(["sh", "-c", command, SCRIPT, stores.sqlite()], env={"PATH": ask.path})
    assert b"Traceback" not in answer.output and b"Exception" not in answer.output
    assert answer.output.count(b"\n") <= 1


def test_nothing_on_stderr(ask_each: Caller, stores: Stores) -> None:
    path = stores.csv([Record(), Record("002", "é")])
    for words in (["id", "001"], ["id", "002"], ["id", "x"], ["ip", "10.0.0.5"], []):
        command = [*ask_each.command(), "--db", str(path), *words]
        environment = {"PATH": ask_each.path}
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        assert done.stdout.count(b"\n") == 1
        assert done.stderr == b""


# ---------------------------------------------------------------- --version and --help


def test_version_shows_the_hash_of_the_file(ask_each: Caller, stores: Stores) -> None:
    digest = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    link = stores.folder / "link"
    link.symlink_to(SCRIPT)
    for style in STYLES:
        for script in (SCRIPT, link):
            answer = ask_each.call("--version", style=style, script=script)
            assert answer.status == 0
            text = answer.output.decode()
            assert re.fullmatch(rf"agent_key_request\.py \d+\.\d+\.\d+ sha256:{digest}\n", text)


def test_version_of_a_changed_copy(ask: Caller, stores: Stores) -> None:
    copy = stores.text(SCRIPT.read_bytes() + b"\n# changed\n", "copy.py")
    copy.chmod(0o755)
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    assert f"sha256:{digest}\n".encode() in ask.call("--version", script=copy).output


def test_help(ask_each: Caller) -> None:
    answer = ask_each.call("--help")
    assert answer.status == 0
    text = answer.output.decode("ascii")
    for word in ("--db", "--timeout", "--version", "--help", " id ", " ip "):
        assert word in text, word
    assert all(len(line) <= 100 for line in text.splitlines())


# ---------------------------------------------------------------- syslog

AUTHPRIV = 10
ERROR_OR_WARNING = (3, 4)
INFO = 6
DEV_LOG = Path("/dev/log")


@pytest.fixture
def syslog() -> Iterator[socket.socket]:
    """Be the host's syslog for one test."""
    if os.geteuid() != 0:
        pytest.skip("only root can stand in for syslog")
    if os.path.lexists(DEV_LOG):
        pytest.skip("this host has a syslog of its own")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(DEV_LOG))
        try:
            DEV_LOG.chmod(0o666)
            listener.settimeout(NOISE)
            yield listener
        finally:
            DEV_LOG.unlink()


def logged(syslog: socket.socket, answer: Answer) -> list[tuple[int, int, str]]:
    """Give facility, severity and text of what the call that gave ANSWER has said.

    Other calls of the script on this host may be at work: what bears their process id is theirs.
    """
    messages: list[tuple[int, int, str]] = []
    syslog.setblocking(False)
    while True:
        try:
            datagram = syslog.recv(65536)
        except BlockingIOError:
            return messages
        match = re.fullmatch(rb"<(\d+)>(.*?)\0?", datagram, re.DOTALL)
        assert match, datagram
        assert all(32 <= byte < 127 for byte in match[2]), datagram
        text = match[2].decode()
        process = re.search(r"\[(\d+)\]: ", text)
        if process is None or int(process[1]) == answer.pid:
            messages.append((int(match[1]) >> 3, int(match[1]) & 7, text))


def test_syslog_says_whose_key_was_handed_out(
    ask_each: Caller, stores: Stores, syslog: socket.socket
) -> None:
    path = stores.sqlite()
    for words in (["id", "001"], ["ip", "192.168.1.100"]):
        answer = ask_each(*words, db=path)
        assert answer.error == 0
        [(facility, severity, text)] = logged(syslog, answer)
        assert (facility, severity) == (AUTHPRIV, INFO)
        assert "agent_key_request" in text and "001" in text
        assert KEY not in text


def test_syslog_says_what_the_operator_must_know(
    ask: Caller, stores: Stores, syslog: socket.socket, locked: Callable[[Path], None]
) -> None:
    rows = [Record("001", "a b"), Record("002"), Record("002"), Record("003", key=KEY * 3)]
    path = stores.sqlite(rows)
    for words, error in (
        (["id", "001"], 6),
        (["id", "002"], 5),
        (["id", "003"], 6),
        (["ip", "192.168.1.100"], 5),
    ):
        assert_logged(syslog, ask(*words, db=path), error)
    assert_logged(syslog, ask("id", "001", db="/no/such/source"), 2)
    locked(path)
    assert_logged(syslog, ask("--timeout", "0.5", "id", "001", db=path), 2)


def assert_logged(syslog: socket.socket, answer: Answer, error: int) -> None:
    """Assert that ANSWER is this ERROR, and that its message went to syslog with no key."""
    assert answer.error == error
    [(facility, severity, text)] = logged(syslog, answer)
    assert facility == AUTHPRIV and severity in ERROR_OR_WARNING
    assert "agent_key_request" in text and answer.message in text
    assert KEY not in text


def test_syslog_hears_nothing_of_what_strangers_can_cause(
    ask: Caller, stores: Stores, syslog: socket.socket
) -> None:
    """Anyone can send requests for unknown agents: they must not fill the disk."""
    path = stores.sqlite()
    for words in ([], ["id"], ["id", "x"], ["ip", "x"], ["foo"], ["id", "009"], ["ip", "10.0.0.5"]):
        answer = ask(*words, db=path)
        assert answer.error in (1, 3, 4)
        assert logged(syslog, answer) == []


def test_syslog_gets_no_control_characters(
    ask: Caller, stores: Stores, syslog: socket.socket
) -> None:
    """Neither from a record nor from a path (`logged` looks at every byte)."""
    path = stores.sqlite([Record(name="a\nb\x1b[2J\xe9", ip="10.0.0.5")])
    assert_logged(syslog, ask("id", "001", db=path), 6)
    assert_logged(syslog, ask("id", "001", db=b"/no/such\n<0>\xff\x1b"), 2)


def test_a_syslog_that_does_not_read_holds_nothing_up(
    ask: Caller, stores: Stores, syslog: socket.socket
) -> None:
    path = stores.sqlite()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.connect(str(DEV_LOG))
        flood.setblocking(False)
        try:
            while True:
                flood.send(b"<86>full")
        except BlockingIOError:
            pass
    answer = ask("--timeout", "1", "id", "001", db=path, timeout=OWN_DEADLINE + NOISE)
    assert answer.data == DATA
    assert answer.seconds < 1 + NOISE


@pytest.mark.parametrize("seed", range(5))
def test_no_key_in_any_message(ask: Caller, stores: Stores, seed: int) -> None:
    """Whatever is broken in a record, the key stays out of the answer."""
    chance = random.Random(seed)
    secret = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=40))
    breaks = [secret + "\n", "\t" + secret, secret + "\x7f", secret * 4, "é" + secret]
    rows = [Record(f"00{number}", key=key) for number, key in enumerate(breaks, start=1)]
    rows.append(Record("006", "", "nonsense", secret))
    for kind in ("sqlite", "csv"):
        path = stores.make(kind, rows)
        for number in range(1, 7):
            answer = ask("id", f"00{number}", db=path)
            assert answer.error == 6
            assert secret[:8] not in answer.message


def test_a_key_with_a_nul_is_invalid_in_every_interpreter(
    ask_each: Caller, stores: Stores
) -> None:
    """Before 3.11 csv stops at a NUL; what stands in for it must not make the key look sound."""
    source = stores.text(b"id,name,ip,key\n001,a,any,k\0k\n002,b,any,k\n", "agents.csv")
    assert ask_each("id", "001", db=source).error == 6
    assert ask_each("id", "002", db=source).error == 0
