"""The benchmark behind `make bench`: what an answer, a start, an import cost, and how that grows.

    bench.py [served] [oneshot] [imports] [growth]        all of them if none is named

Rates vary with the machine, so each is given with its ratio to what ran in turns with it: a C loop
with a fixed answer, and the first edition, where git has it. Processor time and instructions vary
less. What needs a tool that is not here (cc, git, valgrind, sqlite3) is left out, and that is said.
"""

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

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT, SAMPLE = ROOT / "agent_key_request.py", ROOT / "sample.db.sql"
PYTHON = [shutil.which("python3", path="/usr/bin:/bin") or sys.executable, "-IS"]
FIRST_EDITION = "9357f7d"
ROUNDS, SECONDS = 5, 1.0  # of a measurement of the served answers
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SOURCES = (("db", SIZES[2]), ("db", SIZES[3]), ("csv", SIZES[2]), ("keys", SIZES[2]))
NAMES = {"db": "SQLite", "csv": "CSV", "keys": "client.keys"}
SILENT = 7  # of eight workers
folder = Path()  # for the files of a run


def note(text: str) -> None:
    """Tell what is going on, or what is left out."""
    print("bench: " + text, file=sys.stderr, flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print text to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip(), flush=True)


# ---------------------------------------------------------------- sources and programs


def agents(count: int) -> Iterator[tuple[str, str, str, str]]:
    """Agents 001 to count, at 10.x.y.z with the number in x.y.z."""
    for n in range(1, count + 1):
        address = f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"
        yield f"{n:03d}", f"agent-{n}", address, hashlib.sha256(str(n).encode()).hexdigest()


@functools.cache
def source(kind: str, count: int) -> str:
    """The path of a source with as many agents."""
    path = folder / f"{count}.{kind}"
    comma, head = {"csv": (",", "id,name,ip,key\n"), "keys": (" ", "")}.get(kind, ("", ""))
    if comma:
        path.write_text(head + "".join(comma.join(agent) + "\n" for agent in agents(count)))
    else:
        insert = "INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)"
        with contextlib.closing(sqlite3.connect(path)) as store, store:
            store.executescript("PRAGMA synchronous = OFF;" + SAMPLE.read_text())
            store.execute("DELETE FROM agent")
            store.executemany(insert, agents(count))
    path.chmod(0o600)
    return str(path)


@functools.cache
def first_edition() -> list[Path]:
    """The first edition out of git; nothing where git does not have it."""
    path, show = folder / "first.py", f"git -C '{ROOT}' show {FIRST_EDITION}:{SCRIPT.name}"
    status, text = subprocess.getstatusoutput(show)
    if status == 0:
        path.write_text(text + "\n")
        path.chmod(0o755)
        return [path]
    note(f"git does not have the first edition ({FIRST_EDITION}): it is left out")
    return []


@functools.cache
def compiled(name: str) -> str:
    """A C program of this folder."""
    if not shutil.which("cc"):
        raise LookupError("no C compiler (cc)")
    words = ["cc", "-O2", "-pthread", "-o", str(folder / name), f"{ROOT}/tests/bench/{name}.c"]
    subprocess.run(words, check=True)
    return words[4]


# ---------------------------------------------------------------- served


@contextlib.contextmanager
def running(path: Path, *command: str | Path) -> Iterator[int]:
    """A server on the socket PATH, with its defaults, once it is ready: its process id."""
    if len(command) == 2:  # a script and its source; else the C loop
        command = (*PYTHON, command[0], "--db", command[1], "--serve", "--socket")
    log, command = path.with_suffix(".log"), (*command, path)
    with log.open("wb") as stream:  # a file is the cheapest reader
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stream)
    try:
        while "ready" not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(f"bench: {command} ended: {log.read_text()}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def processor_seconds(pid: int) -> float:
    """What a server and its workers have used so far."""
    ticks = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if str(pid) in (name, fields[1]):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Row(NamedTuple):
    """What is measured: a server, what it is asked (client.c, -r), and the row to compare with."""

    name: str
    path: Path
    pid: int
    requests: str
    first: str = ""


def load(row: Row) -> dict[str, float]:
    """Ask with 32 threads for a while: what client.c reports, and processor time for an answer."""
    before = processor_seconds(row.pid)
    command = [compiled("client"), "-d", str(SECONDS), "-r", row.requests, str(row.path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = {name: float(value) for name, value in (pair.split("=") for pair in output.split())}
    used = processor_seconds(row.pid) - before
    return {**figures, "cpu": 1e6 * used / (figures["answers"] or 1)}


@contextlib.contextmanager
def silent(path: Path, count: int) -> Iterator[None]:
    """As many clients that say nothing, at any time: who is closed comes back."""
    done = threading.Event()

    def be_silent() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.recv(1)

    with concurrent.futures.ThreadPoolExecutor(SILENT) as pool:
        for _ in range(count):
            pool.submit(be_silent)
        try:
            yield
        finally:
            done.set()


def served() -> None:
    """Answers a second over the socket, each asked for as a manager does."""
    rows, path = [], folder / "floor.s"
    with contextlib.ExitStack() as stack:
        pid = stack.enter_context(running(path, compiled("floor")))
        rows.append(Row("C loop, a fixed answer", path, pid, "1-1"))
        for kind, count in SOURCES:
            for script in [*first_edition(), SCRIPT]:
                path = folder / f"{script.stem[0]}{kind}{count}.s"
                pid = stack.enter_context(running(path, script, source(kind, count)))
                edition = "first edition" if script != SCRIPT else "this"
                asked = {"hits": f"1-{count}", "misses": "20000000-20100000"}
                if (kind, count) == SOURCES[0]:
                    asked[f"hits, {SILENT} silent"] = asked["hits"]
                for what, requests in asked.items():
                    name = f"{NAMES[kind]} {count:,}, {what.partition(',')[0]}, "
                    first = name + "first edition" if script == SCRIPT else ""
                    name += what.partition(", ")[2] + ", " if "silent" in what else ""
                    rows.append(Row(name + edition, path, pid, requests, first))
        samples: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
        for number in range(ROUNDS):
            note(f"served: round {number + 1} of {ROUNDS}")
            for row in rows:
                with silent(row.path, SILENT if "silent" in row.name else 0):
                    samples[row.name].append(load(row))

    def ratio(name: str, other: str) -> str:
        pairs = zip(samples[name], samples.get(other, []))
        ratios = [one["rate"] / (two["rate"] or 1) for one, two in pairs]
        return f"{statistics.median(ratios):.2f}" if ratios else ""

    lines = []
    for row in rows:
        found = {figure: [each[figure] for each in samples[row.name]]
                 for figure in samples[row.name][0]}  # fmt: skip
        rate, cpu, p99 = (statistics.median(found[name]) for name in ("rate", "cpu", "p99_us"))
        ratios = [ratio(row.name, rows[0].name), ratio(row.name, row.first)]
        figures = [f"{cpu:.0f}", f"{p99 / 1000:.1f}", f"{sum(found['failures']):.0f}"]
        lines.append([row.name, f"{rate:,.0f}", *ratios, *figures])
    title = f"Served: 32 C clients, {os.cpu_count()} processors, {ROUNDS} rounds of {SECONDS:g} s"
    table(title, ["", "answers/s", "of C", "of first", "CPU us", "p99 ms", "failed"], lines)


# ---------------------------------------------------------------- a start, an import, growth


def instructions(*command: str) -> float:
    """Millions of instructions that a command executes, with all that it starts."""
    if not shutil.which("valgrind"):
        raise LookupError("no valgrind")
    callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run([*callgrind, "--trace-children=yes", *command], env={"PATH": os.defpath},
                          capture_output=True, text=True, check=False)  # fmt: skip
    return sum(map(int, re.findall(r"Collected : (\d+)", done.stderr))) / 1e6


def asking(script: Path, db: str, *words: str) -> float:
    """What a request as the manager makes it costs, with the cache of the script there."""
    command = [str(script), "--timeout", "600", "--db", db, *words]
    subprocess.run(command, env={"PATH": os.defpath}, stdout=subprocess.DEVNULL, check=True)
    return instructions(*command)


def oneshot() -> None:
    """Instructions of one start, which are the same on a busy machine."""
    base = instructions(*PYTHON, "-c", "import sqlite3")
    lines = [["python3 -IS -c 'import sqlite3'", f"{base:.1f}", "1.00"]]
    requests = ("id 50000", "id 20000000", "ip 10.0.195.80", "ip 192.0.2.1")
    asked = [(*SOURCES[1], request, SCRIPT) for request in requests]
    asked += [(*SOURCES[1], requests[0], script) for script in first_edition()]
    asked += [(kind, count, requests[0], SCRIPT) for kind, count in SOURCES[2:]]
    for kind, count, request, script in asked:
        cost = asking(script, source(kind, count), *request.split())
        name = f"{NAMES[kind]} {count:,}, {request}" + ", first edition" * (script != SCRIPT)
        lines.append([name, f"{cost:.1f}", f"{cost / base:.2f}"])
    table("One-shot: from the shell to the answer", ["", "M instructions", "ratio"], lines)


def seconds_of(command: Sequence[str], text: str = "") -> float:
    """Processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@functools.cache
def imported(count: int) -> float:
    """Processor time of an import of CSV."""
    words = ["--db", str(folder / f"imported.{count}"), "--import", source("csv", count)]
    return seconds_of([*PYTHON, str(SCRIPT), *words])


def imports() -> None:
    """`--import` beside SQLite's own, into the same table with the same indexes."""
    if not shutil.which("sqlite3"):
        raise LookupError("no sqlite3")
    lines = []
    for count in SIZES[2:]:
        ours = imported(count)
        with contextlib.closing(sqlite3.connect(folder / f"imported.{count}")) as store:
            made = [sql for (sql,) in store.execute("SELECT sql FROM sqlite_master WHERE sql > ''")]
        indexes = ";\n".join([*made[1:], ""])
        text = f".import --csv --skip 1 {source('csv', count)} agent\n{indexes}"
        text = f"PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF;\n{made[0]};\n{text}"
        theirs = seconds_of(["sqlite3", str(folder / f"sqlite3.{count}")], text)
        lines.append([f"CSV {count:,}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f}"])
    table("Import: processor time", ["", "--import s", "sqlite3 .import s", "ratio"], lines)


def answer(count: int) -> float:
    """Processor time for a served answer, in microseconds."""
    path = folder / f"growth{count}.s"
    with running(path, SCRIPT, source("db", count)) as pid:
        return load(Row("", path, pid, f"1-{count}"))["cpu"]


def growth() -> None:
    """The costs over the number of agents, as a plot: each bar to its own scale."""
    costs: dict[str, Callable[[int], float]] = {
        "a request: M instructions": lambda count: asking(SCRIPT, source("db", count), "id", "001"),
        "a served answer: us of processor": answer, "an import: s of processor": imported,
    }  # fmt: skip
    print("\nHow it grows with the number of agents, SQLite")
    for name, cost in costs.items():
        found = [cost(count) for count in SIZES]
        print(f"\n{name}")
        for count, value in zip(SIZES, found):
            bar = "#" * max(1, round(40 * value / max(found)))
            print(f"{count:>9,} |{bar:<40} {value:.1f}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server stays behind
    with tempfile.TemporaryDirectory(prefix="agent-key-bench-") as made:
        folder = Path(made)
        SCRIPT = Path(shutil.copy2(SCRIPT, folder))  # its cache is beside it, and nobody edits it
        for section in (served, oneshot, imports, growth):
            if section.__name__ in (sys.argv[1:] or section.__name__):
                try:
                    section()
                except LookupError as missing:
                    note(f"{section.__name__} is left out: {missing}")
