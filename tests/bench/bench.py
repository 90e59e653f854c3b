"""The benchmark behind `make bench`: what an answer, a start and an import cost, and how that grows.

    bench.py [--python PATH] [--rounds N] [--seconds S] [--section served|oneshot|import|growth ...]

Rates vary with the machine, so each is given with its ratio to what ran in turns with it: a C loop
with a fixed answer, and the first edition, where git has it. Processor time and instructions vary
less. What needs a tool that is not here (cc, git, valgrind, sqlite3) is left out, and that is said.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import re
import resource
import shutil
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPT, SAMPLE = ROOT / "agent_key_request.py", ROOT / "sample.db.sql"
FIRST_EDITION = "9357f7d"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
HITS, MISSES = ("-r", "1-{}"), ("-r", "20000000-20100000")  # of client.c
SILENT = 7  # of eight workers

parser = argparse.ArgumentParser(description="Benchmark of agent_key_request.py.")
parser.add_argument("--python", default=shutil.which("python3", path="/usr/bin:/bin"))
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement of a round")
parser.add_argument("--section", action="append", help="served, oneshot, import or growth: all")
options = parser.parse_args()
PYTHON = [options.python or sys.executable, "-IS"]
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


# ---------------------------------------------------------------- sources


def agents(count: int) -> Iterator[tuple[str, str, str, str]]:
    """Agents 001 to count, at 10.x.y.z with the number in x.y.z."""
    for n in range(1, count + 1):
        address = f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"
        yield f"{n:03d}", f"agent-{n}", address, hashlib.sha256(str(n).encode()).hexdigest()


def source(kind: str, count: int) -> str:
    """The path of a source (db, csv or keys) with as many agents, made when first asked for."""
    path = folder / f"{count}.{kind}"
    if path.exists():
        return str(path)
    if kind == "keys":
        path.write_text("".join(" ".join(agent) + "\n" for agent in agents(count)))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("id", "name", "ip", "key"), *agents(count)])
    else:
        with contextlib.closing(sqlite3.connect(path)) as store:
            store.executescript("PRAGMA synchronous = OFF;" + SAMPLE.read_text())
            store.execute("DELETE FROM agent")
            store.executemany("INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)",
                              agents(count))  # fmt: skip
            store.commit()
    path.chmod(0o600)
    return str(path)


def first_edition() -> Path | None:
    """The first edition out of git, or None."""
    command = ["git", "-C", str(ROOT), "show", FIRST_EDITION + ":" + SCRIPT.name]
    path = folder / "first.py"
    with contextlib.suppress(OSError):
        path.write_bytes(subprocess.run(command, capture_output=True, check=False).stdout)
    if path.exists() and path.stat().st_size:
        return path
    note(f"git does not have the first edition ({FIRST_EDITION}): it is left out")
    return None


# ---------------------------------------------------------------- served


def compiled(name: str) -> str:
    """A C program of this folder."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if not compiler:
        raise LookupError("no C compiler (cc, gcc or $CC)")
    words = [compiler, "-O2", "-pthread", "-o", str(folder / name), str(HERE / (name + ".c"))]
    subprocess.run(words, check=True)
    return str(folder / name)


@contextlib.contextmanager
def running(command: Sequence[str], path: Path) -> Iterator[int]:
    """A server on the socket PATH that has said `ready`: its process id."""
    log = path.with_suffix(".log")
    with log.open("wb") as stream:  # a file is the cheapest reader
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stream)
    while "ready" not in log.read_text():
        if process.poll() is not None:
            raise SystemExit(f"bench: {command} ended: {log.read_text()}")
        time.sleep(0.02)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def serving(script: Path, path: Path, db: str) -> contextlib.AbstractContextManager[int]:
    """A server with its defaults."""
    words = [str(script), "--db", db, "--serve", "--socket", str(path)]
    return running([*PYTHON, *words], path)


def processor_seconds(pid: int) -> float:
    """What a server and its workers have used so far."""
    ticks = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(name) == pid or int(fields[1]) == pid:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def load(client: str, path: Path, pid: int, requests: Sequence[str]) -> dict[str, float]:
    """Ask with 32 threads for a while: what client.c reports, and processor time for an answer."""
    before = processor_seconds(pid)
    command = [client, "-d", str(options.seconds), *requests, str(path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = {name: float(value) for name, value in (pair.split("=") for pair in output.split())}
    figures["cpu"] = 1e6 * (processor_seconds(pid) - before) / (figures["answers"] or 1)
    return figures


@contextlib.contextmanager
def silent(path: Path, count: int) -> Iterator[None]:
    """As many clients that say nothing, at any time: who is closed comes back."""
    done = threading.Event()

    def be_silent() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.recv(1)

    threads = [threading.Thread(target=be_silent) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield
    done.set()
    for thread in threads:
        thread.join()


def behind_silent(path: Path, count: int) -> float:
    """Seconds until who asks behind as many silent clients at once is answered."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
    with contextlib.ExitStack() as stack:
        for number in range(count + 1):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(path))
            if number == count:
                started = time.monotonic()
                connection.send(b"id:001")
                assert connection.recv(65536).startswith(b'{"error": 0')
        return time.monotonic() - started


def served() -> None:
    """Answers a second over the socket, each asked for as a manager does."""
    client, floor, first = compiled("client"), compiled("floor"), first_edition()
    rows: list[tuple[str, str, Path, int, Sequence[str]]] = []  # name, compared with, socket, ...
    with contextlib.ExitStack() as stack:
        path = folder / "floor.s"
        pid = stack.enter_context(running([floor, str(path)], path))
        rows.append(("C loop, a fixed answer", "", path, pid, ("-f", str(folder / "one"))))
        (folder / "one").write_text("id:001\n")
        for title, kind, count in (("SQLite 100,000", "db", SIZES[2]), ("SQLite 1 M", "db", SIZES[3]),
                                   ("CSV 100,000", "csv", SIZES[2]),
                                   ("client.keys 100,000", "keys", SIZES[2])):  # fmt: skip
            note(f"served: {title}")
            for script, edition in [(first, "first edition"), (SCRIPT, "this edition")]:
                if script:
                    path = folder / f"{script.stem[0]}{kind}{count}.s"
                    pid = stack.enter_context(serving(script, path, source(kind, count)))
                    for asked, requests in ("hits", HITS), ("misses", MISSES):
                        name = f"{title}, {asked}, "
                        given = [word.format(count) for word in requests]
                        rows.append((name + edition, name + "first edition", path, pid, given))
                        if (kind, count, asked) == ("db", SIZES[2], "hits"):
                            name += f"{SILENT} silent, "
                            rows.append((name + edition, rows[-1][1], path, pid, given))
        samples: dict[str, list[dict[str, float]]] = {row[0]: [] for row in rows}
        for number in range(options.rounds):
            note(f"served: round {number + 1} of {options.rounds}")
            for name, _, path, pid, requests in rows:
                with silent(path, SILENT if "silent" in name else 0):
                    samples[name].append(load(client, path, pid, requests))
        waited = behind_silent(next(row[2] for row in rows if "this" in row[0]), 1000)

    def ratio(name: str, other: str) -> str:
        if other not in samples:
            return ""
        pairs = zip(samples[name], samples[other])
        return f"{statistics.median(a['rate'] / (b['rate'] or 1) for a, b in pairs):.2f}"

    lines = []
    for name, other, *_ in rows:
        rate, cpu, p99 = (statistics.median(sample[figure] for sample in samples[name])
                          for figure in ("rate", "cpu", "p99_us"))  # fmt: skip
        failures = sum(sample["failures"] for sample in samples[name])
        ratios = [ratio(name, rows[0][0]), ratio(name, other) if "this" in name else ""]
        lines.append([name, f"{rate:,.0f}", *ratios, f"{cpu:.0f}", f"{p99 / 1000:.1f}",
                      f"{failures:.0f}"])  # fmt: skip
    table(f"Served: 32 threads of client.c, {os.cpu_count()} processors, {options.rounds} rounds of "
          f"{options.seconds:g} s, medians",
          ["", "answers/s", "of the C loop", "of the first", "us of processor", "p99 ms", "failed"],
          lines)  # fmt: skip
    print(f"\n1,000 silent clients at once: who asks behind them waited {waited:.1f} s (to reach: 15)")


# ---------------------------------------------------------------- one start


def instructions(*command: str) -> float:
    """Millions of instructions that a command executes, with all that it starts."""
    callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
                 "--trace-children=yes"]  # fmt: skip
    done = subprocess.run([*callgrind, *command], capture_output=True, text=True, check=False,
                          env={"PATH": f"{folder}:{os.defpath}"})  # fmt: skip
    return sum(map(int, re.findall(r"Collected : (\d+)", done.stderr))) / 1e6


def asking(script: Path, db: str, *words: str) -> list[str]:
    """A request as the manager makes it, with time for valgrind."""
    return [str(script), "--timeout", "600", "--db", db, *words]


def copied(script: Path, name: str) -> Path:
    """A copy of a script that has been started once: its cache is there, if it keeps one."""
    path = folder / name / SCRIPT.name
    if not path.exists():
        path.parent.mkdir()
        shutil.copy(script, path)
        path.chmod(0o755)
        if not (folder / "python3").exists():
            (folder / "python3").symlink_to(PYTHON[0])
        subprocess.run([path, "id"], env={"PATH": f"{folder}:{os.defpath}"}, capture_output=True)
    return path


def oneshot() -> None:
    """Instructions of one start, which are the same on a busy machine."""
    if not shutil.which("valgrind"):
        raise LookupError("no valgrind")
    script, old = copied(SCRIPT, "this"), first_edition()
    db, text, keys = source("db", SIZES[3]), source("csv", SIZES[2]), source("keys", SIZES[2])
    base = instructions(*PYTHON, "-c", "import sqlite3")
    commands = {
        "id, SQLite 1 M": asking(script, db, "id", "500000"),
        "id, SQLite 1 M, not stored": asking(script, db, "id", "20000000"),
        "ip, SQLite 1 M": asking(script, db, "ip", "10.7.161.32"),
        "ip, SQLite 1 M, not stored": asking(script, db, "ip", "192.0.2.1"),
        "id, CSV 100,000": asking(script, text, "id", "50000"),
        "id, client.keys 100,000": asking(script, keys, "id", "50000"),
    }
    if old:
        commands["id, SQLite 1 M, first edition"] = asking(copied(old, "old"), db, "id", "500000")
    lines = [["python3 -IS -c 'import sqlite3'", f"{base:.1f}", "1.00"]]
    for name, command in commands.items():
        count = instructions(*command)
        lines.append([name, f"{count:.1f}", f"{count / base:.2f}"])
    table("One-shot: from the shell to the answer", ["", "M instructions", "ratio"], lines)


# ---------------------------------------------------------------- import


def seconds_of(command: Sequence[str], text: str = "") -> float:
    """Processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(count: int) -> float:
    """Processor time of an import of CSV."""
    store = folder / f"imported.{count}"
    words = [str(SCRIPT), "--db", str(store), "--import", source("csv", count)]
    return seconds_of([*PYTHON, *words])


def compare_imports() -> None:
    """`--import` beside SQLite's own, into the same table with the same indexes."""
    if not shutil.which("sqlite3"):
        raise LookupError("no sqlite3")
    lines = []
    for count in SIZES[2:]:
        ours = imported(count)
        with contextlib.closing(sqlite3.connect(folder / f"imported.{count}")) as store:
            made = [sql for (sql,) in store.execute("SELECT sql FROM sqlite_master WHERE sql > ''")]
        text = ";\n".join([made[0], f".import --csv --skip 1 {source('csv', count)} agent\n"])
        theirs = seconds_of(["sqlite3", str(folder / f"sqlite3.{count}")],
                            "PRAGMA synchronous = OFF;\n" + text + ";\n".join([*made[1:], ""]))  # fmt: skip
        lines.append([f"CSV {count:,}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f}"])
    table("Import: processor time", ["", "--import s", "sqlite3 .import s", "ratio"], lines)


# ---------------------------------------------------------------- growth


def growth() -> None:
    """How the costs grow with the number of agents, as a plot: each bar to its own scale."""
    client = compiled("client")
    script = copied(SCRIPT, "this")
    costs: dict[str, Callable[[int], float]] = {"seconds of --import": imported}
    if shutil.which("valgrind"):
        costs["M instructions of id 001, SQLite"] = lambda count: instructions(
            *asking(script, source("db", count), "id", "001"))  # fmt: skip

    def answer(count: int) -> float:
        path = folder / f"growth{count}.s"
        with serving(SCRIPT, path, source("db", count)) as pid:
            return load(client, path, pid, [word.format(count) for word in HITS])["cpu"]

    costs["us of processor for a served answer, SQLite"] = answer
    print("\nHow it grows from 1,000 to 1,000,000 agents")
    for name, cost in reversed(costs.items()):
        found = [cost(count) for count in SIZES]
        print(f"\n{name}")
        for count, value in zip(SIZES, found):
            bar = "#" * max(1, round(50 * value / max(found)))
            print(f"{count:>9,} |{bar:<50} {value:.1f}", flush=True)


SECTIONS = {"served": served, "oneshot": oneshot, "import": compare_imports, "growth": growth}

if __name__ == "__main__":
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="agent-key-bench-") as name:
        folder = Path(name)
        for section in options.section or SECTIONS:
            try:
                SECTIONS[section]()
            except LookupError as missing:
                note(f"{section} is left out: {missing}")
    note(f"done in {time.monotonic() - began:.0f} s")
