"""On the manager's host: what Python there is, signals, descriptors, syslog, and strangers."""

from __future__ import annotations

import functools
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, SAMPLE, SCRIPT, Caller, Python, Record, Stores, interpreters, script
from manager import MANAGER_TIMEOUT, Answer, check_answer, run
from running import NOISE, SOON, Words, start
from terminal import Terminal

DATA = Record()._asdict()
STYLES = ["exec", "python", "isolated"]
COMMANDS = [
    ["--check"],
    ["--serve", "--socket", "s"],
    ["--enroll"],
    ["--import", str(SAMPLE)],
    [f"--import={SAMPLE}"],
]
OTHER_PYTHONS = ["/usr/libexec/platform-python", "/var/ossec/framework/python/bin/python3"]


def stand_in(ask: Caller, name: str, text: str) -> None:
    """Put a shell script into the folder that PATH leads to."""
    path = ask.bin / name
    path.unlink(missing_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def unhurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """A request to a locked database without --timeout, which waits while other tests run."""
    folder = tmp_path_factory.mktemp("unhurried")
    path = Stores(folder).sqlite()
    holder = sqlite3.connect(str(path), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    command = [interpreters()[0].path, "-IS", str(SCRIPT), "--db", str(path), "id", "001"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        yield process
        process.kill()
    holder.close()


@pytest.fixture(scope="module", autouse=True)
def _start_it_first(unhurried: object) -> None:
    """So that the last test of this file need not wait for ten seconds."""


# ---------------------------------------------------------------- the header


def test_the_header_runs_the_script_itself_where_it_serves(ask: Caller) -> None:
    """A server's command stands in `ps` for years; else it is a loader, and the words are kept."""
    stand_in(ask, "python3", "printf '%s\\0' \"$@\"")
    for words in ["--serve"], ["--db", "a b", "--serve", "--socket", "s"]:
        done = start(ask, *words)
        assert done.stdout.decode().split("\0")[:-1] == ["-IS", str(SCRIPT), *words]
    for words in [], ["id", "001"], ["id", "", "a  b", "new\nline", "*", "$HOME", "--server"]:
        done = start(ask, *words)
        isolated, option, _loader, _make_cache, *rest = done.stdout.decode().split("\0")[:-1]
        assert [isolated, option, *rest] == ["-IS", "-c", str(SCRIPT), *words]


def test_every_shell_that_may_be_sh(ask: Caller, stores: Stores) -> None:
    path = stores.keys()
    for shell in (["sh"], ["dash"], ["bash", "--posix"], ["busybox", "sh"], ["ksh"], ["mksh"]):
        if shutil.which(shell[0], path=os.defpath):
            done = start(ask, "--db", path, "id", "001", command=[*shell, SCRIPT])
            assert b'"001"' in done.stdout and not done.stderr, shell


def test_no_environment_at_all(ask: Caller, stores: Stores) -> None:
    path = stores.sqlite()
    for style in STYLES:
        command = [*ask.command(style), "--db", str(path), "id", "001"]
        assert check_answer(run(command, env={})).data == DATA


# ---------------------------------------------------------------- no Python, or half of one


HIDDEN = """
mount --bind "$0/libexec" /usr/libexec && mount --bind "$0/var" /var && exec "$@"
"""  # a /usr/libexec and a /var of the command's own


@pytest.mark.parametrize("place", OTHER_PYTHONS)
def test_a_python_in_another_place(ask: Caller, open_folder: Path, place: str) -> None:
    """RHEL's own, and the manager's: with no python3 in PATH, they run the script."""
    if not namespace() or not Path("/usr/libexec").is_dir() or not SCRIPT.is_absolute():
        pytest.skip("no right to mount here")
    if str(open_folder).startswith("/var") or str(SCRIPT).startswith("/var"):
        pytest.skip("the test hides /var")
    (open_folder / "libexec").mkdir()
    (open_folder / "var").mkdir()
    _root, top, rest = place.removeprefix("/usr").split("/", 2)
    python = open_folder / top / rest
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec {ask.python.path} "$@"\n')
    python.chmod(0o755)
    source = Stores(open_folder).keys()
    (ask.bin / "python3").unlink()
    for name in ("mount", "sh"):
        (ask.bin / name).symlink_to(str(shutil.which(name, path=os.defpath)))
    words: Words = [str(shutil.which("unshare", path=os.defpath)), *(namespace() or ())[1:]]
    words += [HIDDEN, open_folder, SCRIPT, "--db", source, "id", "001"]
    assert check_answer(run(words, env={"PATH": str(ask.bin)})).data == DATA


@pytest.fixture
def no_python(ask: Caller) -> Caller:
    """A host without any Python, but with a logger that waits until somebody reads `said`."""
    if any(map(os.path.exists, OTHER_PYTHONS)):
        pytest.skip("this host has a Python in one of the other places")
    (ask.bin / "python3").unlink()
    ask.path = str(ask.bin)
    return ask


def test_no_python_at_all(no_python: Caller, stores: Stores) -> None:
    path = stores.sqlite()
    for words in [], ["id", "001"], ["--db", str(path), "ip", "10.0.0.5"]:
        answer = no_python(*words)
        assert answer.error in (2, 9) and "python3" in answer.message
    for words in COMMANDS:
        done = start(no_python, *words)
        assert (done.returncode, done.stdout) == (1, b""), words
        assert re.fullmatch(rb"agent_key_request: error: .*python3.*\n", done.stderr)


def test_no_python_is_told_to_syslog(no_python: Caller) -> None:
    """And a logger that hangs does not hold the answer, nor the pipe that it goes into."""
    said = no_python.folder / "said"
    os.mkfifo(said)
    stand_in(no_python, "logger", f"echo \"$@\" > '{said}'\necho not for the manager")
    assert no_python("id", "001").error
    with open(os.open(said, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert select.select([reader], [], [], NOISE)[0]
        os.set_blocking(reader.fileno(), True)
        text = reader.read().decode()
    assert "agent_key_request" in text and "authpriv.err" in text and "no python3" in text


WITHOUT = """\
block="import sys
for name in '{modules}'.split(): sys.modules[name] = None
"
if [ "$2" = -c ]; then
    code=$3; shift 3
else
    code="sys.argv = sys.argv[1:]; exec(compile(open(sys.argv[0]).read(), sys.argv[0], 'exec'))"
    shift
fi
exec {python} -IS -c "$block$code" "$@"
"""
# What the script could want of the modules that Debian's python3-minimal (3.11 and 3.13) lacks.
MINIMAL = "_sqlite3 sqlite3 json _json mmap shlex difflib socketserver syslog"


def without(ask: Caller, modules: str) -> None:
    """Let the caller's python3 be one that lacks these MODULES."""
    stand_in(ask, "python3", WITHOUT.format(python=ask.python.path, modules=modules))


@pytest.mark.parametrize("modules", ["_sqlite3", MINIMAL])
def test_a_python_without_sqlite3(ask_each: Caller, stores: Stores, modules: str) -> None:
    """As that of Debian's python3-minimal: it answers from text, and says what it lacks."""
    without(ask_each, modules)
    assert ask_each("id", "001", db=stores.keys()).data == DATA
    assert ask_each("--timeout", "5", "id", "001", db=stores.csv()).data == DATA
    for source in stores.sqlite(), SAMPLE, "mysql://user@host/database":
        done = start(ask_each, "--db", source, "id", "001")
        answer = check_answer(Answer(done.stdout, done.returncode))
        assert answer.error == 2 and not done.stderr
        for word in ask_each.python.path, "install", "python3":
            assert word in answer.message
    for words in COMMANDS:
        done = start(ask_each, *words)
        assert (done.returncode, done.stdout) == (1, b""), words
        assert b"install" in done.stderr and b"python3" in done.stderr
        assert done.stderr.count(b"\n") == 1
    assert list(ask_each.folder.iterdir()) == []


def test_help_and_version_with_half_a_python(ask_each: Caller) -> None:
    """A person who installs the program there needs them most."""
    whole = {asked: start(ask_each, asked).stdout for asked in ("--help", "-h", "--version", "-V")}
    without(ask_each, MINIMAL)
    for asked, shown in whole.items():
        done = start(ask_each, asked)
        assert (done.stdout, done.stderr, done.returncode) == (shown, b"", 0), asked
        assert len(shown) > 20


# ---------------------------------------------------------------- locales


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C"},
        {"LANG": "POSIX", "PYTHONIOENCODING": "utf-16"},
        {"LC_ALL": "tr_TR.ISO-8859-9", "LANGUAGE": "tr"},
    ],
    ids=str,
)
def test_every_locale(ask_each: Caller, stores: Stores, environment: dict[str, str]) -> None:
    for path in stores.sqlite(name="é.db"), stores.csv(name="é\u2028.csv"):
        assert ask_each("id", "001", db=path, env=environment).data == DATA
    assert ask_each("id", "é", db="/nö/such", env=environment).error == 3
    answer = ask_each("id", "001", env={**environment, "AGENT_KEY_DB": "/nö/such"})
    assert answer.error == 2 and "/n?" in answer.message


# ---------------------------------------------------------------- nothing planted is imported


def plant(folder: Path, marker: Path, spared: Iterable[str] = ()) -> None:
    """Put modules of every name that Python knows into FOLDER: they leave MARKER behind."""
    folder.mkdir(parents=True, exist_ok=True)
    one = folder / "pymysql.py"
    one.write_text(f"open({str(marker)!r}, 'a').write(__name__ + ' ')\n")
    names = {*sys.stdlib_module_names, "sitecustomize", "usercustomize", "psycopg"}
    for name in names.difference(spared, {"__main__"}):
        os.link(one, folder / f"{name}.py")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Give a file that must not be there when the test has ended."""
    path = tmp_path / "imported"
    yield path
    assert not path.exists(), path.read_text()


def test_nothing_beside_the_script_is_imported(
    ask_each: Caller, stores: Stores, marker: Path
) -> None:
    """Nor from the working directory: which is the same here."""
    sources = [stores.sqlite(), stores.csv(), stores.sql()]
    folder = stores.folder / "installed"
    plant(folder, marker)
    how: dict[str, Any] = {"script": shutil.copy(SCRIPT, folder), "cwd": folder}
    for style in "exec", "python":
        for source in sources:
            assert ask_each("id", "001", db=source, style=style, **how).data == DATA
    assert ask_each("id", "001", db="mysql://nobody@127.0.0.1:1/x", **how).error == 2
    assert b"Traceback" not in ask_each.call("--check", "--db", sources[1], **how).output


def test_nothing_of_the_environment_is_imported(
    ask_each: Caller, stores: Stores, marker: Path
) -> None:
    folder = stores.folder / "planted"
    plant(folder, marker)
    version = ".".join(ask_each.python.version.split(".")[:2])
    site = folder / ".local" / "lib" / f"python{version}" / "site-packages"
    plant(site, marker)
    (site / "evil.pth").write_text(f"import os; open({str(marker)!r}, 'a')\n")
    environment = {
        "HOME": str(folder),
        "PYTHONUSERBASE": str(folder / ".local"),
        "PYTHONSTARTUP": str(folder / "os.py"),
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONVERBOSE": "1",
        "PYTHONPROFILEIMPORTTIME": "1",
        "PYTHONDEVMODE": "1",
        "PYTHONOPTIMIZE": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPYCACHEPREFIX": str(folder),
        "PYTHONHOME": str(folder),
        "PYTHONPLATLIBDIR": "nowhere",
        "PYTHONEXECUTABLE": "/nowhere",
    }
    path, script_text = stores.sqlite(), stores.sql()
    for planted in ".:", str(folder):
        environment["PYTHONPATH"] = planted
        for source in path, script_text:
            answer = ask_each("id", "001", db=source, env=environment, cwd=folder)
            assert answer.data == DATA


def test_the_path_of_a_python_that_is_named(ask_each: Caller, stores: Stores, marker: Path) -> None:
    """`python3 agent_key_request.py`: what Python imports before our first line is its own."""
    code = "import sys; print(*sys.modules)"
    done = subprocess.run([ask_each.python.path, "-c", code], capture_output=True, check=True)
    own = {*done.stdout.decode().split(), "sitecustomize", "usercustomize"}
    plant(stores.folder / "planted", marker, own)
    environment = {"PYTHONPATH": str(stores.folder / "planted")}
    answer = ask_each("id", "001", db=stores.sqlite(), style="python", env=environment)
    assert answer.data == DATA


# ---------------------------------------------------------------- from anywhere, as anybody


def test_through_links(ask: Caller, stores: Stores) -> None:
    folder = stores.folder / "bin"
    folder.mkdir()
    (folder / "middle").symlink_to(SCRIPT)
    (folder / "key").symlink_to("middle")
    path = stores.sqlite()
    for style, cwd, name in (
        ("exec", folder, "./key"),
        ("exec", "/", folder / "key"),
        ("python", folder, "key"),
    ):
        assert ask("id", "001", db=path, style=style, script=name, cwd=cwd).data == DATA


@pytest.mark.parametrize("name", ["-x", "é a'b\"c", "$x;&*\nnew line"])
def test_a_folder_of_any_name(ask: Caller, stores: Stores, name: str) -> None:
    folder = stores.folder / name
    folder.mkdir()
    copy = shutil.copy(SCRIPT, folder)
    relative = f"./{name}/{SCRIPT.name}"
    path = stores.sqlite()
    for how in {"script": copy, "style": "python"}, {"script": relative, "cwd": stores.folder}:
        assert ask("id", "001", db=path, **how).data == DATA


def test_found_through_path(ask: Caller, stores: Stores) -> None:
    """`execvp` looks a bare name up in PATH."""
    environment = {"PATH": f"{SCRIPT.parent}:{ask.path}"}
    command = ["env", SCRIPT.name, "--db", str(stores.sqlite()), "id", "001"]
    assert check_answer(run(command, cwd=ask.folder, env=environment)).data == DATA


def skip_if_closed(python: Python, user: int) -> None:
    """Skip where an interpreter lies in a folder that is closed to this user."""
    try:
        run([python.path, "-c", ""], user=user)
    except PermissionError:
        pytest.skip("this interpreter is closed to other users")


def test_an_unprivileged_user(
    interpreter: Python, open_folder: Path, tmp_path: Path, nobody: int
) -> None:
    """Sources of every kind, and one that is closed to it."""
    skip_if_closed(interpreter, nobody)
    how: dict[str, Any] = {"script": shutil.copy(SCRIPT, open_folder), "style": "isolated"}
    how.update(user=nobody, cwd="/")
    ask = Caller(interpreter, tmp_path)
    stores = Stores(open_folder)
    for kind in "sqlite", "csv", "keys", "sql":
        path = stores.make(kind)
        before = sorted(os.listdir(open_folder))
        assert ask("id", "001", db=path, **how).data == DATA, kind
        path.chmod(0o600)
        answer = ask("id", "001", db=path, **how)
        assert answer.error == 2 and f"{path}: Permission denied" in answer.message
        assert sorted(os.listdir(open_folder)) == before
        path.unlink()


def test_a_wal_database_that_an_unprivileged_user_may_only_read(
    ask: Caller, open_folder: Path, nobody: int
) -> None:
    """With a writer at work, and closed by it."""
    skip_if_closed(ask.python, nobody)
    how: dict[str, Any] = {"script": shutil.copy(SCRIPT, open_folder), "style": "python"}
    how.update(user=nobody, cwd="/", db=Stores(open_folder).sqlite())
    writer = sqlite3.connect(str(how["db"]), isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("UPDATE agent SET name = 'at-work'")
    assert ask("id", "001", **how).data["name"] == "at-work"
    writer.close()
    assert ask("id", "001", **how).data["name"] == "at-work"
    assert sorted(os.listdir(open_folder)) == [SCRIPT.name, how["db"].name]


@functools.cache
def namespace() -> tuple[str, ...] | None:
    """The words that give a command mounts of its own; None where nobody may have any."""
    root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ("unshare", *root, "--mount", "sh", "-c")
    if not shutil.which("unshare", path=os.defpath):
        return None
    test = 'mount --bind "$0" "$0"'
    return words if run([*words, test, SCRIPT], env={"PATH": os.defpath}).status == 0 else None


@pytest.mark.parametrize("kind", ["sqlite", "wal", "csv", "sql"])
def test_a_read_only_file_system(ask: Caller, open_folder: Path, kind: str) -> None:
    if not namespace():
        pytest.skip("no right to mount here")
    shutil.copy(SCRIPT, open_folder)
    path = Stores(open_folder).make("sqlite" if kind == "wal" else kind)
    if kind == "wal":
        writer = sqlite3.connect(str(path))
        writer.execute("PRAGMA journal_mode = WAL")
        writer.close()
    asking = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" "$0" && cd "$0" && exec "$@"'
    words: Words = ["./" + SCRIPT.name, "--db", path, "id", "001"]
    answer = run([*(namespace() or ()), asking, open_folder, *words], env={"PATH": ask.path})
    assert check_answer(answer).data == DATA
    assert not (open_folder / "__pycache__").exists()


# ---------------------------------------------------------------- signals


def endless(stores: Stores) -> Path:
    """Make an SQL script that never ends."""
    return stores.text(
        "WITH RECURSIVE f(n) AS (SELECT 1 UNION ALL SELECT n FROM f) SELECT max(n) FROM f;", "a.sql"
    )


def test_sigterm_that_arrives_blocked_ends_it(
    ask_each: Caller, stores: Stores, locked: Callable[[Path], None]
) -> None:
    """The manager sends it after its own time-out, and waits: while a lock or a query lasts."""
    path = stores.sqlite()
    locked(path)
    for source, style in ((path, "exec"), (endless(stores), "exec"), (path, "python")):
        words: Words = ["--db", source, "--timeout", "60", "id", "001"]
        answer = ask_each.call(*words, style=style, timeout=0.3)
        assert answer.timed_out and not answer.held and answer.output == b"", source


def test_sigterm_at_any_moment(ask: Caller, stores: Stores, locked: Callable[[Path], None]) -> None:
    path = stores.sqlite()
    locked(path)
    for step in range(12):
        answer = ask.call("--db", path, "--timeout", "60", "id", "001", timeout=step * 0.004)
        assert answer.timed_out and not answer.held and answer.output == b"", step


def waiting(ask: Caller, path: Path, shell: str = 'exec "$0" "$@"') -> subprocess.Popen[bytes]:
    """Start a request to a locked database, and wait until it has the file open."""
    process = subprocess.Popen(
        ["sh", "-c", shell, *ask.command(), "--db", path, "--timeout", "60", "id", "001"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": ask.path},
        umask=0o027,
    )
    end = time.monotonic() + NOISE
    while time.monotonic() < end:
        if str(path) in opened_by(process).values():
            return process
        time.sleep(0.005)
    process.kill()
    pytest.fail("the script has not opened its source")


def opened_by(process: subprocess.Popen[bytes]) -> dict[int, str]:
    """What a process has open; nothing while that changes."""
    folder = f"/proc/{process.pid}/fd/"
    try:
        return {int(number): os.readlink(folder + number) for number in os.listdir(folder)}
    except OSError:
        return {}


def test_ctrl_c_shows_no_traceback(
    ask_each: Caller, stores: Stores, locked: Callable[[Path], None]
) -> None:
    path = stores.sqlite()
    locked(path)
    process = waiting(ask_each, path)
    process.send_signal(signal.SIGINT)
    output, _nothing = process.communicate(timeout=NOISE)
    assert (output, process.returncode) == (b"", -signal.SIGINT)


def test_the_umask_is_given_back_and_closed_descriptors_lead_nowhere(
    ask_each: Caller, stores: Stores, locked: Callable[[Path], None]
) -> None:
    path = stores.sqlite()
    locked(path)
    process = waiting(ask_each, path, 'exec "$0" "$@" <&- >&- 2>&-')
    try:
        opened = opened_by(process)
        assert [opened[number] for number in range(3)] == ["/dev/null"] * 3
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Umask:\t0027$", status, re.MULTILINE)
    finally:
        process.kill()
        process.communicate()


def blocking(*numbers: signal.Signals) -> list[str]:
    """Give the words that start a command with signals blocked that the manager does not block."""
    code = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {numbers});"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-IS", "-c", code.replace("{numbers}", repr([*map(int, numbers)]))]


def test_an_alarm_that_arrives_blocked(ask_each: Caller, stores: Stores) -> None:
    """The deadline holds while a long text is read, in which only the alarm looks at the clock."""
    path = stores.text("id,name,ip,key\n" + "7,n,any,k\n" * 3_000_000, "agents.csv")
    words = [*ask_each.command("isolated"), "--db", str(path), "--timeout", "0.3", "id", "001"]
    for before in [], blocking(signal.SIGALRM):
        answer = check_answer(run([*before, *words], env={"PATH": ask_each.path}))
        assert answer.error == 2 and "no answer in time" in answer.message
        assert answer.seconds < SOON


BROKEN = """\
code=$3; shift 3
exec {python} -IS -c "import _signal
{change}
$code" "$@"
"""
REFUSE = """
def refuse(*_): raise OSError(11, 'Resource temporarily unavailable')
_signal.setitimer = refuse"""
REFUSE_LATER = """
set_it = _signal.setitimer
def refuse(*what):
    if counted: raise OSError(11, 'Resource temporarily unavailable')
    if what[1:] == (0,): counted.append(1)
    return set_it(*what)
counted = []
_signal.setitimer = refuse"""


@pytest.mark.parametrize("change", [REFUSE, REFUSE_LATER])
def test_an_alarm_that_cannot_be_set(ask_each: Caller, stores: Stores, change: str) -> None:
    """Before the request or after it: there is an answer, and the status is 0."""
    stand_in(ask_each, "python3", BROKEN.format(python=ask_each.python.path, change=change))
    for words in (["id", "001"], ["id", "x"], ["id", "009"], []):
        done = start(ask_each, "--db", stores.keys(), *words)
        answer = check_answer(Answer(done.stdout, done.returncode))
        assert answer.error in (0, 1, 2, 3, 4) and not done.stderr
        if change == REFUSE_LATER and words == ["id", "001"]:
            assert answer.data == DATA


# ---------------------------------------------------------------- outputs that take nothing


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(ask: Caller, stores: Stores, closed: str) -> None:
    """A message for a closed 2 once went into the store that was opened in its place."""
    path = stores.sqlite()
    before = path.read_bytes()
    faulty = stores.text("id,name,ip,key\n001,n e w,any,k\n", "faulty.csv")
    store = stores.folder / "store.db"
    commands: list[Words] = [
        ["--db", path, "id", "001"],
        ["--db", store, "--import", path, "-v"],
        ["--db", store, "--import", faulty, "-v"],
    ]
    for words in commands:
        done = start(ask, *words, command=["sh", "-c", f'exec "$0" "$@" {closed}', SCRIPT])
        assert b"Traceback" not in done.stdout + done.stderr
        if words[-1] == "001" and closed == "2>&-":
            assert b'"name": "my_agent"' in done.stdout and done.returncode == 0
    assert path.read_bytes() == before
    assert ask("id", "001", db=store).data == DATA
    assert sorted(stores.folder.iterdir()) == sorted([path, faulty, store])


@pytest.mark.parametrize("words", [["id", "001"], ["--version"], ["--help"], ["--check"]], ids=str)
def test_a_full_output(ask: Caller, stores: Stores, words: list[str]) -> None:
    """It is nobody's fault: no traceback; and a request has no other end than 0."""
    command = ["sh", "-c", 'exec "$0" "$@" > /dev/full', SCRIPT, "--db", str(stores.sqlite())]
    done = start(ask, *words, command=command)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    if words[0] == "id":
        assert (done.returncode, done.stderr) == (0, b"")
    else:
        told = b"standard output: " * (words[0] != "--help") + b"No space left on device\n"
        assert (done.returncode, done.stderr) == (1, b"agent_key_request: error: " + told)


def test_a_reader_who_has_gone(ask: Caller, stores: Stores) -> None:
    """The manager ignores SIGPIPE, and that is inherited."""
    reader, writer = os.pipe()
    os.close(reader)
    how = {"stdout": writer, "stderr": subprocess.PIPE, "capture_output": False}
    for restore in False, True:
        done = start(
            ask,
            "--db",
            stores.sqlite(name=f"{restore}.db"),
            "id",
            "001",
            restore_signals=restore,
            **how,
        )
        assert (done.returncode, done.stderr) == (0, b"")
    os.close(writer)


# ---------------------------------------------------------------- syslog

AUTHPRIV, ERR, INFO = 10, 3, 6
NAMED = 'mount --bind /dev/null "$0/null" && mount --rbind "$0" /dev && exec "$@"'


class Syslog:
    """The host's syslog, for a command that has a /dev of its own."""

    def __init__(self, ask: Caller, folder: Path) -> None:
        """Listen in FOLDER, which becomes the command's /dev."""
        self.ask, self.folder = ask, folder
        (folder / "null").touch()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.listener.bind(str(folder / "log"))
        self.listener.setblocking(False)

    def command(self, *words: str | bytes | Path) -> list[str | bytes | Path]:
        """Give the command line that runs the script there."""
        return [*(namespace() or ()), NAMED, self.folder, *self.ask.command(), *words]

    def __call__(self, *words: str | bytes | Path) -> tuple[Answer, list[tuple[int, int, str]]]:
        """Ask, and give the answer and what was logged."""
        answer = check_answer(run(self.command(*words), env={"PATH": self.ask.path}))
        return answer, self.heard()

    def heard(self) -> list[tuple[int, int, str]]:
        """Give facility, severity and text of all that was logged since."""
        messages: list[tuple[int, int, str]] = []
        while True:
            try:
                datagram = self.listener.recv(65536)
            except BlockingIOError:
                return messages
            match = re.fullmatch(rb"<(\d+)>([ -~]*)\0?", datagram)
            assert match and KEY.encode() not in datagram, datagram
            messages.append((int(match[1]) >> 3, int(match[1]) & 7, match[2].decode()))


@pytest.fixture
def syslog(ask_each: Caller, open_folder: Path) -> Iterator[Syslog]:
    """A syslog, where one may have a /dev of one's own."""
    if not namespace():
        pytest.skip("no right to mount here")
    log = Syslog(ask_each, open_folder)
    yield log
    log.listener.close()


def test_syslog_hears_what_the_manager_does_not_say(
    syslog: Syslog, stores: Stores, locked: Callable[[Path], None]
) -> None:
    """And nothing of what any stranger can cause, or it would fill the disk."""
    rows = [Record(), Record("002", "a b"), Record("003"), Record("003"), Record("004", "a\n\x1b")]
    path = stores.sqlite(rows)
    busy = stores.sqlite(name="busy.db")
    locked(busy)
    cases: list[tuple[int | None, Words]] = [
        (INFO, ["--db", path, "id", "001"]),
        (ERR, ["--db", path, "id", "002"]),
        (ERR, ["--db", path, "id", "003"]),
        (ERR, ["--db", path, "ip", "192.168.1.100"]),
        (ERR, ["--db", path, "id", "004"]),
        (ERR, ["--db", b"/no/such\n<0>\xff\x1b", "id", "001"]),
        (ERR, ["--db", busy, "--timeout", "0.2", "id", "001"]),
        (None, ["--db", path, "id", "009"]),
        (None, ["--db", path, "ip", "10.0.0.5"]),
        (None, ["--db", path, "id", "x"]),
        (None, ["--db", path, "id"]),
        (None, ["--db", path, "foo"]),
        (None, []),
    ]
    for severity, words in cases:
        answer, heard = syslog(*words)
        if severity is None:
            assert answer.error in (1, 3, 4) and heard == []
            continue
        [(facility, level, text)] = heard
        assert (facility, level) == (AUTHPRIV, severity), text
        assert (
            re.search(r"agent_key_request\[\d+\]: ", text)
            and " ".join(map(str, words[-2:])) in text
        )
        assert answer.message in text and (answer.error == 0) == (severity == INFO)


def test_a_syslog_that_does_not_read_holds_nothing_up(syslog: Syslog, stores: Stores) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.connect(str(syslog.folder / "log"))
        flood.setblocking(False)
        try:
            while True:
                flood.send(b"<86>full")
        except BlockingIOError:
            pass
    words: Words = ["--db", stores.sqlite(), "id", "001"]
    answer = check_answer(run(syslog.command(*words), env={"PATH": syslog.ask.path}, timeout=NOISE))
    assert answer.data == DATA


def test_a_mistake_in_exec_path_goes_to_syslog(syslog: Syslog) -> None:
    """Nobody reads the stderr of a program that the manager starts; a person at a terminal does."""
    done = start(syslog.ask, command=syslog.command("--tiemout=5", "id", "001"))
    assert done.returncode == 2
    [(facility, level, text)] = syslog.heard()
    assert (facility, level) == (AUTHPRIV, ERR)
    assert "--tiemout" in text and "--timeout" in text
    with Terminal() as terminal:
        how = {"stderr": terminal.end, "stdout": subprocess.PIPE, "capture_output": False}
        done = start(syslog.ask, command=syslog.command("--tiemout=5", "id", "001"), **how)
        assert done.returncode == 2 and "--timeout" in terminal.shown()
    assert syslog.heard() == []


def test_a_python_without_syslog(ask_each: Caller, stores: Stores) -> None:
    """The answer is out by then, and the manager throws it away if the status is not 0."""
    without(ask_each, "syslog")
    source = stores.text("001 my_agent 192.168.1.100 " + KEY + "\n002 a..! any k\n", "client.keys")
    assert ask_each("id", "001", db=source).data == DATA
    assert ask_each("id", "002", db=source).error == 6
    assert ask_each("id", "001", db="/no/such").error == 2


# ---------------------------------------------------------------- the own deadline


def test_the_own_deadline(unhurried: subprocess.Popen[bytes]) -> None:
    """Without --timeout: error 2 long before the manager's patience ends, which would kill it."""
    assert 0 < script.REQUEST_SECONDS <= MANAGER_TIMEOUT / 4
    output, _nothing = unhurried.communicate(timeout=script.REQUEST_SECONDS + NOISE)
    assert check_answer(Answer(output, unhurried.returncode)).error == 2
