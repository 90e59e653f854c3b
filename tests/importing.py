"""The program in a fork of the tests, and imports that must go well or must be refused.

A fork runs the whole program without the start of an interpreter, so a test can run hundreds.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
import os
import select
import signal
import sqlite3
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conftest import KEY, Record, Stores, half, script
from serving import records

LIMIT = 120.0  # seconds for one import, on a very busy machine
SECRET = "S3cr3t" * 9  # a key that no message may show; no id or address looks like it
GOOD = [
    Record("001", "my_agent", "192.168.1.100", KEY),
    Record("002", "laptop", "any", "k" * 127),
    Record("003", "office", "10.20.30.0/24", "a key with spaces"),
    Record("004", "gateway", "10.20.0.0/16", 'quote " and back\\slash'),
    Record("005", "web-v6", "2001:db8::10", "semi;colon,comma"),
    Record("12345678", "A.b_c-9", "2001:db8:1::/48", "~"),
]
OLD = [Record("900", "the-old-store", "172.16.0.1", "0ld-key")]

# What only one agent may have: how it may stand in the records of two agents.
TWICE = {
    "id": [("007", "7"), ("007", "007"), ("07", "7")],
    "name": [("same", "same"), ("any", "any")],
    "ip": [
        ("10.9.9.9", "10.9.9.9"),
        ("10.9.9.9", "10.9.9.9/32"),
        ("10.9.9.9", "::ffff:10.9.9.9"),
        ("fe80::1", "FE80:0::1/128"),
    ],
}
# What agents may share: how it may stand in two records, and its one spelling.
SHARED_NETWORKS = [
    ("10.9.9.5/24", "10.9.9.6/255.255.255.0", "10.9.9.0/24"),
    ("2001:db8:9::/48", "2001:DB8:9:1::5/48", "2001:db8:9::/48"),
]
KINDS: dict[str, Callable[[Stores], Path]] = {
    "csv": lambda stores: stores.csv(GOOD),
    "tabs": lambda stores: stores.text(tabs(GOOD), "agents.tsv"),
    "client.keys": lambda stores: stores.keys(GOOD),
    "sqlite": lambda stores: stores.sqlite(GOOD, name="source.db"),
    "sql": lambda stores: stores.sql(GOOD),
}
UNREADABLE: dict[str, Callable[[Stores], Path]] = {
    "missing": lambda stores: stores.folder / "nowhere.csv",
    "a folder": lambda stores: stores.folder,
    "a device": lambda stores: Path("/dev/null"),
    "empty": lambda stores: stores.text("", "empty.csv"),
    "a letter": lambda stores: stores.text("Dear all,\n", "letter.txt"),
    "binary": lambda stores: stores.text(bytes(range(256)) * 50, "agents.bin"),
    "no keys": lambda stores: stores.text("id,name,ip\n001,a,any\n", "agents.csv"),
    "a broken quote": lambda stores: stores.text('id,name,ip,key\n1,"a,any,k\n', "agents.csv"),
    "another table": lambda stores: stores.text("CREATE TABLE other (id);\n", "other.sql"),
    "a broken script": lambda stores: stores.text(f"INSERT {SECRET};", "broken.sql"),
    "another database": lambda stores: another(stores.sqlite([], name="other.db")),
    "half a database": lambda stores: half(stores.sqlite(records(2000), name="source.db")),
}


# ---------------------------------------------------------------- the program in a fork


class Said(NamedTuple):
    """How a command ended, and what it told."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it told on standard error."""
        return self.err.splitlines()


def nothing(*_: object) -> None:
    """Do nothing."""


class Child:
    """The script's whole program in a fork of this process."""

    def __init__(
        self,
        *arguments: str | Path,
        before: Callable[[], object] = nothing,
        stdin: int | bytes = b"",
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        """Start it with ARGUMENTS. BEFORE is called in the fork. The others are descriptors."""
        self.files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - see close()
        if isinstance(stdin, bytes):
            self.files[0].write(stdin)
            self.files[0].seek(0)
        descriptors = [file.fileno() for file in self.files]
        for place, given in enumerate((stdin, stdout, stderr)):
            if isinstance(given, int):
                descriptors[place] = given
        self.end, mine = os.pipe()  # at its end when the fork is
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                for place, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, place)
                gc.freeze()  # the parent's databases: to close one would close a file of ours
                os.closerange(3, mine)  # or it would hold the other end of its own pipes
                os.closerange(mine + 1, 1024)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the tests have set
                setattr(os, "fsync", nothing)  # noqa: B010 - for mypy; a busy disk takes long
                try:
                    before()
                    script.prepare_process()
                    os._exit(script.main([os.fspath(word) for word in arguments]))
                except BaseException:
                    os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os.close(mine)
        self.ended = False

    def wait(self) -> Said:
        """Wait for its end; it tells no key, and has met nothing that is unforeseen."""
        if not select.select([self.end], [], [], LIMIT)[0]:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.ended = True
        texts = []
        for file in self.files[1:]:
            file.seek(0)
            texts.append(file.read().decode("ascii"))
        self.close()
        for word in "Traceback", "Internal error", KEY, SECRET:
            assert word not in "".join(texts)
        return Said(os.waitstatus_to_exitcode(status), *texts)

    def close(self) -> None:
        """Leave nothing of it."""
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.ended = True
        if self.files:
            os.close(self.end)
        while self.files:
            self.files.pop().close()


def forked(*arguments: str | Path, **how: Any) -> Said:
    """Run the program in a fork to its end."""
    child = Child(*arguments, **how)
    try:
        return child.wait()
    finally:
        child.close()


# ---------------------------------------------------------------- stores and what is in them


def rows(store: Path) -> list[tuple[Any, ...]]:
    """The agents in the store, by id; the database must be sound."""
    with contextlib.closing(sqlite3.connect(str(store))) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return database.execute("SELECT id, name, ip, agent_key FROM agent ORDER BY id").fetchall()


def beside(store: Path) -> set[str]:
    """The names of the files beside the store."""
    return set(os.listdir(store.parent)) - {store.name}


def seen(path: Path) -> Any:
    """All that must not change: of a file, or of a folder and what is in it."""
    status = path.lstat()
    told = [path, status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_nlink]
    if stat.S_ISDIR(status.st_mode):
        return [*told, *map(seen, sorted(path.iterdir()))]
    if stat.S_ISLNK(status.st_mode):
        return [*told, os.readlink(path)]
    if stat.S_ISREG(status.st_mode):
        return [*told, status.st_mtime_ns, path.read_bytes()]
    return told


def imported(store: Path, source: str | Path, *options: str, **how: Any) -> Said:
    """Import SOURCE, which must go well, tell nothing, and leave only the store and its `.old`."""
    said = forked("--db", store, "--import", source, *options, **how)
    assert (said.status, said.out) == (0, ""), said
    assert said.err == "" or options, said
    assert beside(store) <= {f"{store.name}.old"}
    return said


def refused(store: Path, source: str | Path, *options: str, **how: Any) -> Said:
    """Import SOURCE, which must fail, say so, and leave the store and its folder as they are."""
    before = seen(store.parent)
    said = forked("--db", store, "--import", source, *options, **how)
    assert said.status == 1 and said.out == "", said
    assert said.lines and said.lines[-1].startswith("agent_key_request: error: "), said
    assert seen(store.parent) == before
    return said


def answer(source: Path, words: list[str]) -> dict[str, Any]:
    """Answer a request from SOURCE."""
    reply = script.answer(words, lambda: script.open_source(str(source), LIMIT), str(source))
    return dict(json.loads(reply.line()))


def tabs(agents: Iterable[Sequence[str]]) -> str:
    """What `mysql --batch` writes."""
    lines = ["\t".join(row).replace("\\", "\\\\") + "\n" for row in agents]
    return "id\tname\tip\tagent_key\n" + "".join(lines)


def faults(said: Said) -> list[str]:
    """The lines that tell one fault each."""
    return [line for line in said.lines if line.startswith("error: ")]


def another(path: Path) -> Path:
    """Take the table `agent` from a database."""
    with contextlib.closing(sqlite3.connect(str(path))) as database:
        database.execute("ALTER TABLE agent RENAME TO host")
    return path


def become(user: int) -> Callable[[], None]:
    """Become another user in the fork, who may be unable to read the interpreter's library."""
    codecs.lookup("latin-1")

    def before() -> None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

    return before


def waits_for_input(pid: int) -> bool:
    """Whether a process sleeps in a read of a pipe."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    opened = (
        {
            os.path.basename(os.readlink(link))
            for link in Path(f"/proc/{pid}/fd").iterdir()
            if link.exists()
        }
        if state == "S"
        else set()
    )
    return state == "S" and "null" in opened  # it has begun: its first step opens /dev/null


class Quick(sqlite3.Connection):
    """Tells of its progress more often, so that few agents will do."""

    def set_progress_handler(self, handler: Any, count: int) -> None:
        """Take the handler, and call it after few steps."""
        super().set_progress_handler(handler, min(count, 500))


def often() -> None:
    """Have the fork's SQLite tell of its progress often."""
    connect = sqlite3.connect
    script.sqlite3.connect = lambda *words, **how: connect(*words, **{"factory": Quick, **how})
