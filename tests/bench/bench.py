"""The benchmark of `make bench`: what a request, an answer and an import cost.

    bench.py [oneshot] [served] [databases] [imports] [growth]

Without words, all of these are measured:
- oneshot: a request as the manager makes it without a server, in milliseconds and instructions
- served: answers of `--serve` per second, over the socket, asked for as a manager does
- databases: the same for a table in MySQL, MariaDB and PostgreSQL, on this host
- imports: `--import` beside SQLite's own `.import`
- growth: how the costs grow with the number of agents

Milliseconds and rates vary with the machine and with what else it does. Each rate is therefore
given with its ratio to two others, which are measured in turns with it: to a C program that always
sends the same answer, and to the second edition of the script, if git has it. Instructions and
processor time vary less. What needs a tool that is not here is left out, and that is said.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path.append(str(TESTS))
import database_servers  # noqa: E402 - it is in the folder of the tests

SCRIPT = ROOT / "agent_key_request.py"
SAMPLE = ROOT / "sample.db.sql"
PATH = "/usr/bin:/bin"
PYTHON = [shutil.which("python3", path=PATH) or sys.executable, "-IS"]
SECOND_EDITION = "9dc66db"

STARTS = 21  # of which the median is taken
ROUNDS = 5  # of a measurement of served answers
SECONDS = 1.0  # of each round
SIZES = (1_000, 10_000, 100_000, 1_000_000)
DATABASE_AGENTS = 10_000
SILENT = 7  # of eight workers
NOBODY = "20000000"  # the id of no agent
NAMES = {"db": "SQLite", "csv": "CSV", "keys": "client.keys"}


class Source(NamedTuple):
    """A source for the measurements: its kind (a key of NAMES) and its number of agents."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{NAMES[self.kind]} {self.size:,}"


SOURCES = [
    Source("db", 100_000),
    Source("db", 1_000_000),
    Source("csv", 100_000),
    Source("keys", 100_000),
]


class Place:
    """The directory of a run, with a copy of the script: nobody edits that, and it has a cache."""

    folder = Path()
    script = Path()


def note(text: str) -> None:
    """Tell what is going on, or what is left out."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: text to the left, figures to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        first = row[0].ljust(widths[0])
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([first, *cells]).rstrip(), flush=True)


# ---------------------------------------------------------------- sources and programs


def agents(count: int) -> Iterator[tuple[str, str, str, str]]:
    """Give the agents 001 to COUNT, at 10.x.y.z with the number in x.y.z."""
    for number in range(1, count + 1):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        key = hashlib.sha256(str(number).encode()).hexdigest()
        yield f"{number:03d}", f"agent-{number}", address, key


@functools.cache
def path_of(source: Source) -> str:
    """Make a source, and return its path."""
    path = Place.folder / f"{source.size}.{source.kind}"
    if source.kind == "db":
        make_database(path, source.size)
    else:
        separator, head = {"csv": (",", "id,name,ip,key\n"), "keys": (" ", "")}[source.kind]
        lines = [separator.join(agent) + "\n" for agent in agents(source.size)]
        path.write_text(head + "".join(lines))
    path.chmod(0o600)
    return str(path)


def make_database(path: Path, count: int) -> None:
    """Make a database with the schema and the indexes of sample.db.sql."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.executescript("PRAGMA synchronous = OFF;" + SAMPLE.read_text())
        database.execute("DELETE FROM agent")
        insert = "INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)"
        database.executemany(insert, agents(count))


@functools.cache
def second_edition() -> Path | None:
    """Return the second edition of the script, which git has."""
    command = ["git", "-C", str(ROOT), "show", f"{SECOND_EDITION}:{SCRIPT.name}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        text = subprocess.run(command, capture_output=True, check=True).stdout
        path = Place.folder / "second" / SCRIPT.name
        path.parent.mkdir()
        path.write_bytes(text)
        path.chmod(0o755)
        return path
    note(f"git does not have the second edition ({SECOND_EDITION}): it is left out")
    return None


def editions() -> dict[str, Path]:
    """Return the scripts that are compared, by the names of their editions."""
    second = second_edition()
    return {**({"second edition": second} if second else {}), "this": Place.script}


@functools.cache
def compiled(name: str) -> str:
    """Compile a C program of this folder, and return its path."""
    if not shutil.which("cc"):
        raise LookupError("no C compiler (cc)")
    program = str(Place.folder / name)
    source = f"{TESTS}/bench/{name}.c"
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, source], check=True)
    return program


# ---------------------------------------------------------------- a request without a server


class Start(NamedTuple):
    """What the start of a program costs."""

    milliseconds: float
    instructions: float | None  # millions; None without valgrind

    def cells(self, base: Start) -> list[str]:
        """Return the cells of a table, with the ratio to the instructions of another start."""
        cells = [f"{self.milliseconds:.1f}", f"{1000 / self.milliseconds:,.0f}"]
        if self.instructions is None or base.instructions is None:
            return [*cells, "", ""]
        ratio = self.instructions / base.instructions
        return [*cells, f"{self.instructions:.1f}", f"{ratio:.2f}"]


START_HEAD = ["", "ms", "per second", "M instructions", "ratio"]


def milliseconds(command: Sequence[str]) -> float:
    """Return the median time that a command takes."""
    times = []
    for _ in range(STARTS):
        started = time.perf_counter()
        subprocess.run(command, env={"PATH": PATH}, stdout=subprocess.DEVNULL, check=True)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def instructions(command: Sequence[str]) -> float | None:
    """Return the millions of instructions of a command and all that it starts."""
    if not shutil.which("valgrind"):
        return None
    valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--trace-children=yes"]
    command = [*valgrind, "--cachegrind-out-file=/dev/null", *command]
    done = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True)
    counts = re.findall(r"I +refs: +([\d,]+)", done.stderr)
    return sum(int(count.replace(",", "")) for count in counts) / 1e6


def cost_of(command: Sequence[str]) -> Start:
    """Return what the start of a command costs."""
    return Start(milliseconds(command), instructions(command))


def request(script: Path, db: str, words: str) -> list[str]:
    """Return the command of a request, such as `id 001`, as the manager runs it."""
    return [str(script), "--timeout", "600", "--db", db, *words.split()]  # valgrind is slow


def oneshot() -> None:
    """Measure one request as the manager makes it without a server."""
    base = cost_of([*PYTHON, "-c", "import sqlite3"])
    lines = [["python3 -IS -c 'import sqlite3'", *base.cells(base)]]
    many = SOURCES[1]
    for words in ("id 50000", f"id {NOBODY}", "ip 10.0.195.80", "ip 192.0.2.1"):
        for edition, script in editions().items():
            cost = cost_of(request(script, path_of(many), words))
            lines.append([f"{many.name}, {words}, {edition}", *cost.cells(base)])
    for source in SOURCES[2:]:
        cost = cost_of(request(Place.script, path_of(source), "id 50000"))
        lines.append([f"{source.name}, id 50000, this", *cost.cells(base)])
    title = f"One request, from the shell to the answer: the median of {STARTS}, one at a time"
    table(title, START_HEAD, lines)


# ---------------------------------------------------------------- served answers


class Row(NamedTuple):
    """A measurement: a server, its requests (client.c, -r), and the row to compare it with."""

    name: str
    path: Path
    pid: int
    requests: str
    second: str = ""
    silent: int = 0  # clients that say nothing


@contextlib.contextmanager
def running(path: Path, command: Sequence[str | Path]) -> Iterator[int]:
    """Run a server whose last word is its socket; give its process id once it is ready."""
    log = path.with_suffix(".log")
    with log.open("wb") as stream:  # a file is the cheapest reader
        process = subprocess.Popen([*command, path], stdin=subprocess.DEVNULL, stderr=stream)
    try:
        deadline = time.monotonic() + 60
        while not re.search(r"\bready\b", log.read_text()):  # "already" is something else
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: {command} did not start: {log.read_text()}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def serve(script: Path, db: str) -> list[str | Path]:
    """Return the command of a server, but for its socket."""
    return [*PYTHON, script, "--db", db, "--serve", "--socket"]


def processor_seconds(pid: int) -> float:
    """Return the processor time that a server and its workers have used so far."""
    ticks = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if str(pid) in (name, fields[1]):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def load(row: Row) -> dict[str, float]:
    """Ask with 32 threads for a while; return the figures of client.c, and `cpu` per answer."""
    before = processor_seconds(row.pid)
    command = [compiled("client"), "-d", str(SECONDS), "-r", row.requests, str(row.path)]
    with silent(row.path, row.silent):
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = {name: float(value) for name, value in (pair.split("=") for pair in output.split())}
    used = processor_seconds(row.pid) - before
    return {**figures, "cpu": 1e6 * used / max(figures["answers"], 1)}


@contextlib.contextmanager
def silent(path: Path, count: int) -> Iterator[None]:
    """Keep COUNT clients that say nothing; one that is disconnected comes back."""
    done = threading.Event()

    def be_silent() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.recv(1)

    with concurrent.futures.ThreadPoolExecutor(max(count, 1)) as pool:
        for _ in range(count):
            pool.submit(be_silent)
        try:
            yield
        finally:
            done.set()


def rows_of(source: Source, edition: str, path: Path, pid: int) -> Iterator[Row]:
    """Give the measurements of a server over a source."""
    asked = {"found": f"1-{source.size}", "not found": f"{NOBODY}-20100000"}
    for what, requests in asked.items():
        name = f"{source.name}, {what}"
        second = f"{name}, second edition" if edition == "this" else ""
        yield Row(f"{name}, {edition}", path, pid, requests, second)
    if source == SOURCES[0]:
        name = f"{source.name}, found, {SILENT} silent"
        second = f"{name}, second edition" if edition == "this" else ""
        yield Row(f"{name}, {edition}", path, pid, asked["found"], second, SILENT)


def measured(rows: Sequence[Row]) -> dict[str, list[dict[str, float]]]:
    """Measure all rows in turns, a few times; return the figures of each row by its name."""
    samples: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    for number in range(ROUNDS):
        note(f"round {number + 1} of {ROUNDS}")
        for row in rows:
            samples[row.name].append(load(row))
    return samples


def show(title: str, rows: Sequence[Row]) -> None:
    """Measure servers, and print a table. The first row is the C program."""
    samples = measured(rows)

    def ratio(name: str, other: str) -> str:
        pairs = zip(samples[name], samples.get(other, []), strict=False)
        ratios = [one["rate"] / max(two["rate"], 1) for one, two in pairs]
        return f"{statistics.median(ratios):.2f}" if ratios else ""

    def median(name: str, figure: str) -> float:
        return statistics.median(each[figure] for each in samples[name])

    lines = []
    for row in rows:
        failed = sum(each["failures"] for each in samples[row.name])
        lines.append(
            [
                row.name,
                f"{median(row.name, 'rate'):,.0f}",
                f"{median(row.name, 'p50_us') / 1000:.1f}",
                f"{median(row.name, 'p99_us') / 1000:.1f}",
                ratio(row.name, rows[0].name),
                ratio(row.name, row.second),
                f"{median(row.name, 'cpu'):.0f}",
                f"{failed:.0f}",
            ]
        )
    head = ["", "answers/s", "ms", "99 % ms", "of C", "of second", "CPU us", "failed"]
    clients = f"32 clients in C, {os.cpu_count()} processors, {ROUNDS} rounds of {SECONDS:g} s"
    table(f"{title}: {clients}", head, lines)


def c_program(stack: contextlib.ExitStack) -> Row:
    """Start the C program that always sends the same answer."""
    path = Place.folder / "floor.s"
    path.unlink(missing_ok=True)
    pid = stack.enter_context(running(path, [compiled("floor")]))
    return Row("C, always the same answer", path, pid, "1-1")


def served() -> None:
    """Measure the answers per second over the socket."""
    with contextlib.ExitStack() as stack:
        rows = [c_program(stack)]
        for source in SOURCES:
            for edition, script in editions().items():
                path = Place.folder / f"{edition[0]}{source.kind}{source.size}.s"
                command = serve(script, path_of(source))
                pid = stack.enter_context(running(path, command))
                rows += rows_of(source, edition, path, pid)
        show("Served", rows)


# ---------------------------------------------------------------- databases


def databases() -> None:
    """Measure requests and served answers from a table in each database server that is here."""
    found = {}
    for kind in database_servers.KINDS:
        lacking = database_servers.missing(kind)
        if lacking:
            note(f"{kind} is left out: no {lacking}")
        else:
            server = database_servers.running(kind)
            server.load(list(agents(DATABASE_AGENTS)))
            found[type(server).__name__] = server.url()
    if not found:
        raise LookupError("no database server")
    base = cost_of([*PYTHON, "-c", "import sqlite3"])
    lines = []
    for name, url in found.items():
        for words in ("id 5000", f"id {NOBODY}", "ip 10.0.19.136"):
            cost = Start(milliseconds(request(Place.script, url, words)), None)
            lines.append([f"{name}, {words}", *cost.cells(base)[:2]])
    table(f"One request to a database of {DATABASE_AGENTS:,}", START_HEAD[:3], lines)
    with contextlib.ExitStack() as stack:
        rows = [c_program(stack)]
        for name, url in found.items():
            path = Place.folder / f"{name}.s"
            pid = stack.enter_context(running(path, serve(Place.script, url)))
            rows.append(Row(f"{name}, found", path, pid, f"1-{DATABASE_AGENTS}"))
            rows.append(Row(f"{name}, not found", path, pid, f"{NOBODY}-20100000"))
        show("Served from a database", rows)


# ---------------------------------------------------------------- imports and growth


def seconds_of(command: Sequence[str], text: str = "") -> float:
    """Return the processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@functools.cache
def imported(count: int) -> float:
    """Import a CSV file, and return the processor time."""
    words = ["--db", str(Place.folder / f"imported.{count}"), "--import"]
    return seconds_of([*PYTHON, str(Place.script), *words, path_of(Source("csv", count))])


def imported_by_sqlite(count: int) -> float:
    """Import the same file by SQLite's own program into the same table, as fast as it can."""
    with contextlib.closing(sqlite3.connect(Place.folder / f"imported.{count}")) as store:
        query = "SELECT sql FROM sqlite_master WHERE sql > ''"
        create_table, *create_indexes = [sql for (sql,) in store.execute(query)]
    statements = [
        "PRAGMA synchronous = OFF;",
        "PRAGMA journal_mode = OFF;",
        f"{create_table};",
        f".import --csv --skip 1 {path_of(Source('csv', count))} agent",
        *(f"{create_index};" for create_index in create_indexes),
    ]
    return seconds_of(["sqlite3", str(Place.folder / f"sqlite3.{count}")], "\n".join(statements))


def imports() -> None:
    """Measure `--import` beside SQLite's own `.import`."""
    if not shutil.which("sqlite3"):
        raise LookupError("no sqlite3")
    lines = []
    for count in SIZES[2:]:
        ours = imported(count)
        theirs = imported_by_sqlite(count)
        lines.append([f"CSV {count:,}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f}"])
    head = ["", "--import s", "sqlite3 .import s", "ratio"]
    table("Import: seconds of processor time", head, lines)


def milliseconds_of_a_request(count: int) -> float:
    """Return the median time of a request to an SQLite store of COUNT agents."""
    return milliseconds(request(Place.script, path_of(Source("db", count)), "id 001"))


def processor_time_of_an_answer(count: int) -> float:
    """Return the microseconds of processor time of a served answer."""
    path = Place.folder / f"growth{count}.s"
    with running(path, serve(Place.script, path_of(Source("db", count)))) as pid:
        return load(Row("", path, pid, f"1-{count}"))["cpu"]


def growth() -> None:
    """Plot the costs over the number of agents. Each bar has its own scale."""
    costs: dict[str, Callable[[int], float]] = {
        "a request: milliseconds": milliseconds_of_a_request,
        "a served answer: us of processor time": processor_time_of_an_answer,
        "an import: s of processor time": imported,
    }
    print("\nHow it grows with the number of agents, SQLite")
    for name, cost in costs.items():
        found = [cost(count) for count in SIZES]
        print(f"\n{name}")
        for count, value in zip(SIZES, found, strict=True):
            bar = "#" * max(1, round(40 * value / max(found)))
            print(f"{count:>9,} |{bar:<40} {value:.1f}", flush=True)


SECTIONS: dict[str, Callable[[], None]] = {
    section.__name__: section for section in (oneshot, served, databases, imports, growth)
}


def main() -> None:
    """Measure the sections that are named, or all."""
    names = sys.argv[1:] or list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            sys.exit(f"bench: unknown section {name}; there are {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server stays behind
    with tempfile.TemporaryDirectory(prefix="agent-key-bench-") as made:
        Place.folder = Path(made)
        Place.script = Path(shutil.copy2(SCRIPT, Place.folder))
        for name in names:
            try:
                SECTIONS[name]()
            except LookupError as missing:
                note(f"{name} is left out: {missing}")


if __name__ == "__main__":
    main()
