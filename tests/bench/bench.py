"""The benchmark behind `make bench`: tables with ratios, which repeat on a noisy machine.

    bench.py [--python PATH] [--section NAME ...] [--rounds N] [--seconds S]

Sections: `served` (answers per second over the socket, beside a C loop and a ThreadingMixIn
server), `oneshot` (instructions of one start of the program) and `mariadb` (both of them against
a MariaDB beside SQLite). A section that needs a tool which is not here says so and is left out;
the exit status stays 0.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SCRIPT = REPOSITORY / "agent_key_request.py"
SAMPLE = REPOSITORY / "sample.db.sql"
READY_SECONDS = 60.0  # a text source of 100,000 agents is read before the server is ready
NETWORKS = 10_000

Agent = tuple[str, str, str, str]
Samples = dict[str, list[dict[str, float]]]


class Bench(NamedTuple):
    """What a section needs: where to work, which Python, how long to measure."""

    folder: Path
    python: str
    rounds: int
    seconds: float


# --- stores ----------------------------------------------------------------------------------


def agents(count: int, networks: int = 0, host: int = 0) -> Iterator[Agent]:
    """Agents 001 ... count; the last `networks` of them are /24 networks, `host` their host bits.

    Agent number n has the address 10.x.y.z with n in x.y.z; the networks are 172.x.y.0/24.
    """
    for number in range(1, count + 1):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        if number > count - networks:
            k = count - number
            address = f"172.{16 + (k >> 8)}.{k & 255}.{host}/24"
        key = hashlib.sha256(str(number).encode()).hexdigest()
        yield f"{number:03d}", f"agent-{number}", address, key


def make_database(path: Path, records: Iterator[Agent]) -> Path:
    """An SQLite store with the table and the indexes of sample.db.sql and these agents."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(SAMPLE.read_text())
        database.execute("DELETE FROM agent")
        indexes = database.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
        ).fetchall()
        for name, _ in indexes:
            database.execute(f'DROP INDEX "{name}"')
        database.executemany(
            "INSERT INTO agent (id, name, ip, agent_key) VALUES (?, ?, ?, ?)", records
        )
        for _, statement in indexes:
            database.execute(statement)
        database.commit()
    path.chmod(0o600)
    return path


def make_csv(path: Path, records: Iterator[Agent]) -> Path:
    """A CSV store with these agents."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "name", "ip", "key"))
        writer.writerows(records)
    path.chmod(0o600)
    return path


def make_client_keys(path: Path, records: Iterator[Agent]) -> Path:
    """A manager's client.keys with these agents."""
    with path.open("w") as file:
        file.writelines(" ".join(record) + "\n" for record in records)
    path.chmod(0o600)
    return path


# --- tables ----------------------------------------------------------------------------------


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Text to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for the reader: what is going on, or what is left out and why."""
    print("bench: " + text, file=sys.stderr, flush=True)


# --- served ----------------------------------------------------------------------------------


def compile_programs(folder: Path) -> dict[str, Path] | None:
    """The C client and the C floor, or None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    programs = {}
    for name in ("client", "floor"):
        programs[name] = folder / name
        command = [compiler, "-O2", "-pthread", "-o", str(programs[name])]
        subprocess.run([*command, str(HERE / (name + ".c"))], check=True)
    return programs


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[None]:
    """A server that has said `ready` on its stderr; ended at the end of the block.

    The log is a file, as cheap a reader as there is: one that reads a pipe would take a share
    of the processors that are measured.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stream)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "ready" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: not ready: {command}\n{log.read_text()}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


class Served(NamedTuple):
    """One row of the table: a server, what it is asked, and whether that is stored."""

    name: str
    socket: Path
    asked: str  # hits or misses
    requests: tuple[str, ...]  # options of client.c


def hits_and_misses(name: str, socket: Path, count: int) -> list[Served]:
    """The two rows of one server over `count` agents."""
    return [
        Served(name, socket, "hits", ("-r", f"1-{count}")),
        Served(name, socket, "misses", ("-r", f"20000000-{20_000_000 + count}")),
    ]


def measure_served(bench: Bench, client: Path, rows: Sequence[Served]) -> Samples:
    """Every row for a short while, round after round: what disturbs one disturbs all."""
    samples: Samples = {}
    for number in range(bench.rounds + 1):
        note(f"served: round {number} of {bench.rounds}" if number else "warming up")
        seconds = bench.seconds if number else min(bench.seconds, 0.5)
        for row in rows:
            command = [str(client), "-d", str(seconds), *row.requests, str(row.socket)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            figures = {k: float(v) for k, v in (pair.split("=") for pair in output.split())}
            if number:
                samples.setdefault(row.name + " " + row.asked, []).append(figures)
    return samples


def median_ratio(samples: Samples, name: str, reference: str) -> float:
    """The median of the ratios of the rounds: each against its neighbour in time."""
    pairs = zip(samples[name], samples[reference])
    return statistics.median(one["rate"] / (other["rate"] or 1.0) for one, other in pairs)


def served_line(row: Served, floor: Served, samples: Samples) -> list[str]:
    """One row in figures: medians over the rounds, failures added up."""
    name = row.name + " " + row.asked
    rounds = samples[name]
    rate, p50, p99 = (statistics.median(r[k] for r in rounds) for k in ("rate", "p50_us", "p99_us"))
    of_floor = median_ratio(samples, name, floor.name + " " + floor.asked)
    times_threading = median_ratio(
        samples, name, "threading " + (row.asked if row != floor else "hits")
    )
    milliseconds = [f"{p50 / 1000:.2f}", f"{p99 / 1000:.2f}"]
    failures = sum(r["failures"] for r in rounds)
    figures = [f"{rate:,.0f}", f"{of_floor:.2f}", f"{times_threading:.1f}", *milliseconds]
    return [name, *figures, f"{failures:.0f}"]


def print_served(title: str, rows: Sequence[Served], samples: Samples) -> None:
    """The table of rates; the first row is the floor, `threading` of the same kind the baseline."""
    head = ["", "answers/s", "of floor", "x threading", "p50 ms", "p99 ms", "failures"]
    lines = []
    for row in rows:
        lines.append(served_line(row, rows[0], samples))
    print_table(title, head, lines)


def serve_command(bench: Bench, source: str, socket: Path) -> list[str]:
    """The real server with its defaults."""
    options = ["--db", source, "--serve", "--socket", str(socket)]
    return [bench.python, "-IS", str(SCRIPT), *options]


def served(bench: Bench) -> None:
    """Answers a second over the socket: 32 threads, each request as a manager sends it."""
    programs = compile_programs(bench.folder)
    if programs is None:
        note("served: no C compiler here (cc, gcc or $CC): this section is left out")
        return
    note("served: making stores of 100,000 and 1,000,000 agents")
    small = make_database(bench.folder / "100k.db", agents(100_000))
    large = make_database(bench.folder / "1M.db", agents(1_000_000))
    text = make_csv(bench.folder / "100k.csv", agents(100_000))
    sockets = {k: bench.folder / k for k in ("floor.s", "thread.s", "100k.s", "1M.s", "csv.s")}
    threading_server = [bench.python, "-IS", str(HERE / "threading_server.py")]
    commands = [
        [str(programs["floor"]), str(sockets["floor.s"])],
        [*threading_server, str(small), str(sockets["thread.s"])],
        serve_command(bench, str(small), sockets["100k.s"]),
        serve_command(bench, str(large), sockets["1M.s"]),
        serve_command(bench, str(text), sockets["csv.s"]),
    ]
    rows = [Served("C floor, one answer for all", sockets["floor.s"], "hits", ("-r", "1-1"))]
    rows += hits_and_misses("threading", sockets["thread.s"], 100_000)
    rows += hits_and_misses("--serve, SQLite 100,000", sockets["100k.s"], 100_000)
    rows += hits_and_misses("--serve, SQLite 1,000,000", sockets["1M.s"], 1_000_000)
    rows += hits_and_misses("--serve, CSV 100,000", sockets["csv.s"], 100_000)
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            stack.enter_context(running(command, bench.folder / f"log.{number}"))
        samples = measure_served(bench, programs["client"], rows)
    title = f"Served: 32 threads, {os.cpu_count()} CPUs, {bench.rounds} rounds of {bench.seconds:g} s, medians"  # noqa: E501
    print_served(title, rows, samples)
    print("\nto reach: 0.35 of the floor and 8 x threading, ten times the agents at the same rate")


# --- oneshot ---------------------------------------------------------------------------------


def instructions(command: Sequence[str]) -> int:
    """Instructions executed by a command, as callgrind counts them."""
    callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run(
        [*callgrind, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath},
    )
    counted = re.search(r"Collected : (\d+)", done.stderr)
    if counted is None:
        raise SystemExit("bench: callgrind counted nothing:\n" + done.stderr)
    return int(counted.group(1))


class Counted(NamedTuple):
    """One row: a command, and at most how many times which row before it (issue 2, 'Speed')."""

    name: str
    command: Sequence[str]
    limit: float = 0.0  # 0: a row that others are measured by
    reference: str = "import sqlite3"


def oneshot_rows(bench: Bench) -> list[Counted]:
    """The figures of the section 'Speed': look-ups in SQLite, then whole text files."""
    folder = bench.folder
    million, hundred_thousand, networks = 1_000_000, 100_000, NETWORKS
    small = make_database(folder / "1k.db", agents(1000))
    large = make_database(folder / "1M-networks.db", agents(million, networks))
    hosts = make_database(folder / "1M-hosts.db", agents(million, networks, host=5))
    text = make_csv(folder / "oneshot.csv", agents(hundred_thousand))
    keys = make_client_keys(folder / "client.keys", agents(hundred_thousand))

    def ask(source: Path, *request: str) -> list[str]:
        return [bench.python, "-IS", str(SCRIPT), "--db", str(source), *request]

    def python(program: str, *arguments: str) -> list[str]:
        return [bench.python, "-IS", "-c", program, *arguments]

    read_csv = "import csv, sys\nfor row in csv.reader(open(sys.argv[1], newline='')): pass"
    read_keys = "import sys\nfor line in open(sys.argv[1]): line.split()"
    return [
        Counted("python3 -IS -c pass", python("pass")),
        Counted("import sqlite3", python("import sqlite3")),
        Counted("id, 1,000 rows", ask(small, "id", "500"), 1.6),
        Counted("id, 1,000 rows, not stored", ask(small, "id", "20000000"), 1.6),
        Counted("id, 1,000,000 rows", ask(large, "id", "500000"), 1.6),
        Counted("id, 1,000,000 rows, not stored", ask(large, "id", "20000000"), 1.6),
        Counted("ip, exact, 1,000,000 rows", ask(large, "ip", "10.7.161.32"), 1.7),
        Counted("ip, by network, 10,000 networks", ask(large, "ip", "172.30.7.9"), 2.2),
        Counted("ip, not stored, 10,000 networks", ask(large, "ip", "192.0.2.1"), 2.2),
        Counted("ip, by network, host bits set", ask(hosts, "ip", "172.30.7.9"), 4.0),
        Counted("csv.reader, 100,000 rows", python(read_csv, str(text))),
        Counted("id, CSV", ask(text, "id", "50000"), 1.5, "csv.reader, 100,000 rows"),
        Counted("ip, CSV", ask(text, "ip", "10.0.200.1"), 1.5, "csv.reader, 100,000 rows"),
        Counted("str.split, 100,000 lines", python(read_keys, str(keys))),
        Counted("id, client.keys", ask(keys, "id", "50000"), 1.5, "str.split, 100,000 lines"),
        Counted("ip, client.keys", ask(keys, "ip", "10.0.200.1"), 1.5, "str.split, 100,000 lines"),
    ]


def print_counted(title: str, rows: Sequence[Counted]) -> None:
    """Counts the rows and prints them, each with its ratio to its reference."""
    counts: dict[str, int] = {}
    lines = []
    for row in rows:
        counts[row.name] = instructions(row.command)
        line = [row.name, f"{counts[row.name] / 1e6:.1f}", "", "", ""]
        if row.limit:
            ratio = counts[row.name] / counts[row.reference]
            verdict = "ok" if ratio <= row.limit else "OVER"
            line[2:] = [f"{ratio:.2f}", f"{row.limit:.1f}", verdict]
        lines.append(line)
    print_table(title, ["", "M instr.", "ratio", "at most", ""], lines)


def oneshot(bench: Bench) -> None:
    """Instructions of one start of the program: a count, so it does not depend on the machine."""
    if shutil.which("valgrind") is None:
        note("oneshot: no valgrind here: this section is left out")
        return
    note("oneshot: making stores of up to 1,000,000 agents")
    rows = oneshot_rows(bench)
    note("oneshot: counting instructions")
    version = subprocess.check_output([bench.python, "--version"], text=True)
    print_counted(f"One-shot: instructions, {version.strip()}, callgrind", rows)


# --- mariadb ---------------------------------------------------------------------------------

SOURCES = ("SQLite", "MariaDB")


def line_of_both(name: str, figures: Sequence[float], form: str = ",.0f") -> list[str]:
    """A row of the table: the figures of SQLite and MariaDB, and the second by the first."""
    sqlite, mariadb = figures
    return [name, format(sqlite, form), format(mariadb, form), f"{mariadb / (sqlite or 1):.2f}"]


def oneshot_of_both(bench: Bench, sources: Sequence[str]) -> list[list[str]]:
    """Instructions of the asking process; what the database's server does is not in them."""
    if shutil.which("valgrind") is None:
        note("mariadb: no valgrind here: the one-shot requests are left out")
        return []
    script = [bench.python, "-IS", str(SCRIPT), "--timeout", "60"]  # valgrind is slow
    asked = {"id": "id 50000", "ip, exact": "ip 10.0.200.1", "ip, by network": "ip 172.30.7.9"}
    lines = []
    for name, request in asked.items():
        commands = [[*script, "--db", source, *request.split()] for source in sources]
        answers = [subprocess.check_output(command, text=True) for command in commands]
        if answers[0] != answers[1] or not answers[0].startswith('{"error": 0'):
            raise SystemExit(f"bench: no key, or not the same: {request}\n" + "".join(answers))
        counts = [instructions(command) / 1e6 for command in commands]
        lines.append(line_of_both(f"one-shot {name}, M instr.", counts, ",.1f"))
    return lines


def served_of_both(bench: Bench, sources: Sequence[str], count: int) -> list[list[str]]:
    """Answers a second for stored agents, and how many requests did not get their key."""
    programs = compile_programs(bench.folder)
    if programs is None:
        note("mariadb: no C compiler here (cc, gcc or $CC): the served requests are left out")
        return []
    rows = [hits_and_misses(name, bench.folder / (name + ".s"), count)[0] for name in SOURCES]
    with contextlib.ExitStack() as stack:
        for row, source in zip(rows, sources):
            command = serve_command(bench, source, row.socket)
            stack.enter_context(running(command, bench.folder / (row.name + ".log")))
        samples = measure_served(bench, programs["client"], rows)
    rounds = samples.values()
    rate = [statistics.median(r["rate"] for r in one) for one in rounds]
    ratio = median_ratio(samples, "MariaDB hits", "SQLite hits")
    p99 = [statistics.median(r["p99_us"] for r in one) / 1000 for one in rounds]
    signs = {"answers": 1, "failures": 1, "found": -1, "wrong": 1}  # a wrong one is found as well
    vain = [sum(signs[k] * r[k] for r in one for k in signs) for one in rounds]
    return [
        line_of_both("--serve, hits, answers/s", rate)[:-1] + [f"{ratio:.2f}"],
        line_of_both("--serve, hits, p99 ms", p99, ".2f"),
        ["--serve, hits, without a key", *(f"{number:.0f}" for number in vain), ""],
    ]


def mariadb(bench: Bench) -> None:
    """The same agents in SQLite and in a MariaDB on its unix socket, as sample.db.sql has them."""
    sys.path.insert(0, str(HERE.parent))
    import database_servers as servers  # the ones that the tests start

    driver = next((n for n in servers.DRIVERS["mysql"] if servers.has_driver(bench.python, n)), "")
    if not driver:
        wanted = ", ".join(servers.DRIVERS["mysql"])
        note(f"mariadb: {bench.python} has no driver ({wanted}): this section is left out")
        return
    server, reason = servers.start_mariadb()
    if server is None:
        note(f"mariadb: {reason}: this section is left out")
        return
    count = 100_000
    with contextlib.ExitStack() as stack:
        stack.callback(server.remove)
        note(f"mariadb: loading {count:,} agents")
        server.sql(SAMPLE.read_text() + "DELETE FROM agent;")
        server.insert(list(agents(count, NETWORKS)))
        server.grant()
        server.analyze()
        store = make_database(bench.folder / "beside.db", agents(count, NETWORKS))
        sources = (str(store), server.url())
        lines = oneshot_of_both(bench, sources) + served_of_both(bench, sources, count)
    if lines:
        title = f"MariaDB through {driver} beside SQLite: {count:,} agents, {NETWORKS:,} networks"
        print_table(title, ["", *SOURCES, "ratio"], lines)


# --- command line ----------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "served": served, "oneshot": oneshot, "mariadb": mariadb,
}


def debian_python() -> str:
    """The distribution's Python, as on a manager's host; else the one that runs this."""
    return shutil.which("python3", path="/usr/bin:/bin") or sys.executable


def main() -> int:
    """Runs the sections asked for, all of them by default."""
    parser = argparse.ArgumentParser(description="Benchmark of agent_key_request.py.")
    parser.add_argument("--python", default=debian_python(), help="the Python to measure with")
    parser.add_argument("--section", action="append", choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds for each server")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds for each round")
    options = parser.parse_args()
    started = time.monotonic()
    for name in options.section or list(SECTIONS):
        with tempfile.TemporaryDirectory(prefix="agent-key-bench-") as folder:
            bench = Bench(Path(folder), options.python, options.rounds, options.seconds)
            SECTIONS[name](bench)
    note(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
