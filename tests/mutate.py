"""Break the script in one place at a time, and see whether a test fails.

    mutate.py [--part PART] [--lines A-B] [--sample N] [--jobs N] [-v] [FILE ...]

A mutant is the script with one change:
- a comparison is turned round, or moved by one at its bound; `not` is left out; a condition is
  negated; a term of `and` and `or` is left out
- a number, a text, True, False or None is another one
- a function returns or yields None, or a keyword argument is None
- a statement is left out: a call, `raise`, `return` without a value, `break`, `continue`, and an
  assignment to something that has a value before

Texts that are only for people stay as they are: docstrings, the tables in TEXTS, and what looks
like a SENTENCE, unless the script compares it with something. So do annotations and the shell lines
at the top.

The FILEs, usually those of the mutant's part, test each mutant until the first failure. A mutant
that does not compile does not count. One that hangs is killed. A total is printed at the end, and
also when the run is stopped. Exit status 1: fewer than 95 % of the mutants of a part died.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, NoReturn

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "agent_key_request.py"
PYTHON = shutil.which("python3", path=os.defpath) or sys.executable  # one that all users can start
ENOUGH = 95.0  # percent of the mutants of a part
TEST_SECONDS = "30"  # for one test; a mutant that hangs fails it then
FUZZ_CASES = "2000"  # of each kind

# The part that begins with a room. All rooms above the marker of part two are part `one`.
PART_TWO = "part two"
PARTS = {
    "common": "commands",
    "databases": "databases",
    "SQL scripts": "scripts",
    "the log": "server",
    "findings": "import",
    "asking as the manager does": "manager",
    "check": "check",
    "the manager's configuration": "manager",
    "command line": "commands",
}
# The test files of each part, those that take least first.
FILES = {
    "one": ["rules", "request", "csv", "client_keys", "sqlite", "kinds", "paths", "cache", "host"],
    "databases": ["databases"],
    "scripts": ["scripts", "kinds", "fuzz", "check", "server_store"],
    "server": ["server_*"],
    "import": ["import_*", "check"],
    "check": ["check", "manager"],
    "manager": ["manager", "check"],
    "commands": ["request", "check", "host", "import_*"],
}
TEXTS = {"MESSAGES", "RULES", "USAGE", "DESCRIPTION", "EPILOG"}
COMPARED = {"SQLITE_SAYS"}  # sentences of others, with which the script compares what it is told
SENTENCE = re.compile(r"[a-z,] [a-z{]|[}a-z]: |^: ")
ROOM = re.compile(r"^# [-=]{4,} (.+)$")
OPERATOR = re.compile(rb"not\s+in\b|is\s+not\b|in\b|is\b|[<>=!]=|[<>]")
TURNED = {
    "<": (">=", "<="),
    "<=": (">", "<"),
    ">": ("<=", ">="),
    ">=": ("<", ">"),
    "==": ("!=",),
    "!=": ("==",),
    "in": ("not in",),
    "not in": ("in",),
    "is": ("is not",),
    "is not": ("is",),
}


class Mutant(NamedTuple):
    """A change: NEW in the place of the bytes from `start` to `end`, which begin in `line`."""

    line: int
    start: int
    end: int
    new: str


class Outcome(NamedTuple):
    """What became of a mutant. `killed` is None if it does not compile; `by` names the test."""

    killed: bool | None
    by: str


# ---------------------------------------------------------------- the mutants


class Source:
    """The script, and the mutants that can be made of it."""

    def __init__(self, content: bytes) -> None:
        """Take the content of the script."""
        self.content = content
        self.lines = content.splitlines(keepends=True)
        self.starts = [0, *accumulate(map(len, self.lines))]

    def statements(self) -> Iterator[tuple[str, ast.stmt]]:
        """Give each statement of the module, after the name of its part."""
        here = "one"
        done = 0
        is_part_two = False
        for node in ast.parse(self.content).body:
            for room in self._rooms(done, node.lineno):
                is_part_two = is_part_two or room.startswith(PART_TWO)
                if is_part_two:
                    here = PARTS.get(room, "commands" if here == "one" else here)
            done = node.end_lineno or 0
            yield here, node

    def missing_rooms(self) -> list[str]:
        """Return the rooms that begin a part, but are not in the script."""
        rooms = set(self._rooms(0, len(self.lines)))
        return [room for room in PARTS if room not in rooms]

    def _rooms(self, first: int, last: int) -> Iterator[str]:
        """Give the names of the rooms that begin in these lines."""
        for line in self.lines[first:last]:
            match = ROOM.match(line.decode().rstrip("\n"))
            if match:
                yield match[1].strip()

    def mutants_of(self, part: str) -> Iterator[Mutant]:
        """Give all mutants of a part, each one once."""
        seen = set()
        for here, node in self.statements():
            for mutant in self._mutants(node, is_for_people=True) if here == part else ():
                if mutant not in seen:
                    seen.add(mutant)
                    yield mutant

    def apply(self, mutant: Mutant) -> bytes:
        """Return the script with a mutant in it."""
        return self.content[: mutant.start] + mutant.new.encode() + self.content[mutant.end :]

    def _put(self, node: ast.expr | ast.stmt, new: str) -> Mutant:
        """Return the mutant that has NEW in the place of a node."""
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return Mutant(node.lineno, start, end, new)

    def _mutants(self, node: ast.AST, is_for_people: bool) -> Iterator[Mutant]:
        """Give the mutants of a node. A sentence in it stays as it is if it is for people."""
        if is_skipped(node):
            return
        is_for_people = is_for_people and not compares(node)
        if isinstance(node, ast.Constant):
            yield from self._constant(node, is_for_people)
        elif isinstance(node, ast.JoinedStr):
            yield from self._formatted(node, is_for_people)
        else:
            yield from self._own(node)
            for child in children_of(node):
                yield from self._mutants(child, is_for_people)

    def _own(self, node: ast.AST) -> Iterator[Mutant]:
        """Give the mutants of a node that is no text and no number, without those of its parts."""
        if isinstance(node, ast.Compare):
            yield from self._comparisons(node)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                yield from self._nothing(keyword.value)
        elif isinstance(node, (ast.Return, ast.Yield)):
            yield from self._nothing(node.value)
        elif isinstance(node, (ast.If, ast.While, ast.IfExp, ast.BoolOp, ast.UnaryOp)):
            yield from self._conditions(node)
        elif isinstance(node, ast.FunctionDef):
            yield from self._left_out(node)

    def _comparisons(self, node: ast.Compare) -> Iterator[Mutant]:
        """Give the mutants with another operator in a comparison."""
        for left in [node.left, *node.comparators[:-1]]:
            match = OPERATOR.search(self.content, self._put(left, "").end)
            assert match
            for new in TURNED[" ".join(match[0].decode().split())]:
                yield Mutant(left.end_lineno or 0, match.start(), match.end(), new)

    def _conditions(self, node: ast.If | ast.While | ast.IfExp | ast.expr) -> Iterator[Mutant]:
        """Give the mutants of a condition: negated, without `not`, or without one of its terms."""
        if isinstance(node, ast.BoolOp):
            neutral = "True" if isinstance(node.op, ast.And) else "False"
            for value in node.values:
                yield self._put(value, neutral)
        elif isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.Not):
                start = self._put(node, "").start
                yield self._put(node, "   ")._replace(end=start + len("not"))
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and isinstance(
            node.test, (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.BoolOp)
        ):
            test = self._put(node.test, "")
            old = self.content[test.start : test.end].decode()
            yield test._replace(new=f"(not ({old}))")

    def _constant(self, node: ast.Constant, is_for_people: bool) -> Iterator[Mutant]:
        """Give the mutant with another constant."""
        value = node.value
        is_sentence = isinstance(value, str) and SENTENCE.search(value)
        if value is not ... and not (is_sentence and is_for_people):
            yield self._put(node, other_than(value))

    def _formatted(self, node: ast.JoinedStr, is_for_people: bool) -> Iterator[Mutant]:
        """Give the mutant of an f-string. Before Python 3.12, its parts have no true places."""
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
        if not (is_for_people and SENTENCE.search(text)):
            yield self._put(node, '"X"')

    def _nothing(self, value: ast.expr | None) -> Iterator[Mutant]:
        """Give the mutant with None for a value, unless it is broken as a constant anyway."""
        if value is not None and not isinstance(value, (ast.Constant, ast.JoinedStr)):
            yield self._put(value, "None")

    def _left_out(self, function: ast.FunctionDef) -> Iterator[Mutant]:
        """Give the mutants of a function that leave out a statement."""
        inside = list(own_nodes(function))
        assigned = Counter(name for node in inside for name in assigned_names(node))
        assigned.update(argument.arg for argument in function.args.args)
        for node in inside:
            is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            is_end = isinstance(node, ast.Return) and node.value is None
            is_jump = isinstance(node, (ast.Raise, ast.Break, ast.Continue, ast.Delete))
            is_change = isinstance(node, (ast.Assign, ast.AugAssign)) and all(
                assigned[name] > 1 for name in assigned_names(node)
            )
            if isinstance(node, ast.stmt) and (is_call or is_end or is_jump or is_change):
                yield self._put(node, "pass")


def is_skipped(node: ast.AST) -> bool:
    """Tell whether a node is only for people or for type checkers."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return True
    return isinstance(node, ast.Assign) and "TYPE_CHECKING" in names_of(node.targets)


def compares(node: ast.AST) -> bool:
    """Tell whether the script compares the texts in a node with something."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", "") in ("startswith", "endswith")
    if isinstance(node, ast.Assign):
        return bool(names_of(node.targets) & COMPARED)
    return isinstance(node, ast.Compare)


def children_of(node: ast.AST) -> list[ast.AST]:
    """Return the children of a node that may be broken."""
    if isinstance(node, ast.Raise):
        return [node.exc] if node.exc else []  # not `from None`
    if isinstance(node, ast.Assign) and names_of(node.targets) & TEXTS:
        return [key for key in getattr(node.value, "keys", []) if key]
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value else []
    if isinstance(node, ast.FunctionDef):
        defaults = [value for value in node.args.kw_defaults if value]
        return [*node.args.defaults, *defaults, *node.body]
    return list(ast.iter_child_nodes(node))


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Give the nodes inside a function, but not those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            yield from own_nodes(child)


def names_of(targets: Sequence[ast.expr]) -> set[str]:
    """Return the names among the targets of an assignment."""
    return {target.id for target in targets if isinstance(target, ast.Name)}


def assigned_names(node: ast.AST) -> set[str]:
    """Return the names to which a statement assigns something."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    stored = [each for target in targets for each in ast.walk(target)]
    return {
        each.id for each in stored if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def other_than(value: object) -> str:
    """Return the source of another constant of the same kind; of one letter, another letter."""
    if isinstance(value, str):
        return repr("X" if len(value) == 1 else f"X{value}X")
    if isinstance(value, bytes):
        return repr(b"X" if len(value) == 1 else b"X" + value + b"X")
    if isinstance(value, bool):
        return repr(not value)
    if isinstance(value, (int, float)):
        return repr(value + 1)
    return "1"


# ---------------------------------------------------------------- the tests


def paths_of(part: str) -> list[Path]:
    """Return the test files of a part."""
    found = [sorted(TESTS.glob(f"test_{name}.py")) for name in FILES[part]]
    return [path for paths in found for path in paths]


class Laboratory:
    """Tests mutants, each in a directory of its own below FOLDER."""

    def __init__(self, folder: Path) -> None:
        """Take the directory."""
        self.folder = folder
        self.is_stopped = False

    def test(self, name: str, content: bytes, files: Sequence[Path], patience: float) -> Outcome:
        """Test a script; the first test that fails kills it."""
        if self.is_stopped:
            return Outcome(None, "not tested")
        try:
            compile(content, SCRIPT.name, "exec")
        except SyntaxError:
            return Outcome(None, "does not compile")
        folder = self.folder / name
        script = folder / "s" / SCRIPT.name
        script.parent.mkdir(parents=True)
        script.write_bytes(content)
        script.chmod(0o755)
        said = folder / "said"
        with said.open("w") as stream:
            process = subprocess.Popen(
                self.command(folder, files),
                cwd=folder,
                env=self.environment(folder, script),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        match = re.search(r"(?m)^(?:FAILED|ERROR) (.+)", said.read_text(errors="replace"))
        sweep(folder)
        status = process.wait()
        if self.is_stopped:
            return Outcome(None, "not tested")
        if status == 0:
            return Outcome(False, "SURVIVED")
        return Outcome(True, match[1] if match else f"status {status}")

    def command(self, folder: Path, files: Sequence[Path]) -> list[str]:
        """Return the command that tests; what killed the mutant before comes first."""
        command = [sys.executable, "-m", "pytest", "-xq", "-m", "not slow", "--failed-first"]
        command += ["-o", f"cache_dir={self.folder}/cache", f"--basetemp={folder}/p"]
        return [*command, *map(str, files)]

    def environment(self, folder: Path, script: Path) -> dict[str, str]:
        """Return the environment in which a script is tested."""
        python = os.environ.get("AGENT_KEY_PYTHONS", PYTHON).split()[0]
        return {
            **os.environ,
            "TMPDIR": str(folder),
            "AGENT_KEY_SCRIPT": str(script),
            "AGENT_KEY_PYTHONS": python,
            "AGENT_KEY_TEST_SECONDS": TEST_SECONDS,
            "AGENT_KEY_FUZZ": FUZZ_CASES,
        }


def sweep(folder: Path) -> None:
    """End what has the folder in its command: tests, and what they started. Then remove it."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if f"{folder}/".encode() in place.read_bytes():
                os.kill(int(place.parent.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


class Tally:
    """How many mutants of each part died and survived."""

    def __init__(self) -> None:
        """Begin with none."""
        self.killed: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()

    def add(self, part: str, outcome: Outcome) -> None:
        """Count a mutant, unless it does not compile or was not tested."""
        if outcome.killed is not None:
            (self.killed if outcome.killed else self.survived)[part] += 1

    def share(self, part: str) -> float:
        """Return the percentage of mutants of a part that died."""
        total = self.killed[part] + self.survived[part]
        return 100 * self.killed[part] / total if total else 100.0

    def show(self) -> bool:
        """Print the total of each part; return whether enough died in each of them."""
        parts = sorted({*self.killed, *self.survived})
        for part in parts:
            killed = self.killed[part]
            survived = self.survived[part]
            figures = f"{killed + survived} mutants, {killed} killed, {survived} survived"
            print(f"{part}: {figures}, {self.share(part):.1f} %", flush=True)
        return all(self.share(part) >= ENOUGH for part in parts)


class Run:
    """One run of this program."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        """Take the options, and a directory for the mutants."""
        self.given = given
        self.source = Source(SCRIPT.read_bytes())
        self.laboratory = Laboratory(folder)
        self.tally = Tally()

    def chosen(self, part: str) -> list[Mutant]:
        """Return the mutants of a part that the options ask for."""
        first, last = map(int, self.given.lines.split("-"))
        found = [each for each in self.source.mutants_of(part) if first <= each.line <= last]
        count = min(self.given.sample or len(found), len(found))
        print(f"{part}: {count} of {len(found)} mutants", flush=True)
        return sorted(random.Random(12).sample(found, count))

    def part(self, part: str, pool: ThreadPoolExecutor) -> None:
        """Test the mutants of a part, after the script without one."""
        files = [each.resolve() for each in self.given.files] or paths_of(part)
        chosen = self.chosen(part)
        if not chosen:
            return
        started = time.monotonic()
        sound = self.laboratory.test("sound", self.source.content, files, 3600)
        if sound.killed is not False:
            sys.exit(f"the tests fail without a mutant: {sound.by}")
        patience = 60 + 3 * (time.monotonic() - started)

        def test(number: int) -> Outcome:
            content = self.source.apply(chosen[number])
            return self.laboratory.test(str(number), content, files, patience)

        for mutant, outcome in zip(chosen, pool.map(test, range(len(chosen))), strict=True):
            self.tally.add(part, outcome)
            self.tell(mutant, outcome)

    def tell(self, mutant: Mutant, outcome: Outcome) -> None:
        """Print a mutant that survived, or each one with -v."""
        if outcome.killed is False or self.given.v:
            old = " ".join(self.source.content[mutant.start : mutant.end].decode().split())
            line = self.source.lines[mutant.line - 1].decode().strip()
            print(f"line {mutant.line}: {old} -> {mutant.new} | {line} |", outcome.by, flush=True)


def stop(_number: int, _frame: object) -> NoReturn:
    """End at a signal, as at Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Break the parts one after the other: 0 if enough mutants die."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=[*FILES, "all"], default="all")
    parser.add_argument("--lines", metavar="A-B", default="1-99999", help="of the script")
    parser.add_argument("--sample", type=int, metavar="N", help="of each part, always the same")
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="at the same time")
    parser.add_argument("-v", action="store_true", help="show the killed ones, too, and by what")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of tests")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))  # a mutant may eat memory
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        Path(name).chmod(0o755)  # other users start copies of the script
        run = Run(given, Path(name))
        pool = ThreadPoolExecutor(given.jobs)
        try:
            for part in FILES if given.part == "all" else [given.part]:
                run.part(part, pool)
        except KeyboardInterrupt:
            print("stopped; so far:")
        finally:
            run.laboratory.is_stopped = True
            sweep(Path(name))
            pool.shutdown(cancel_futures=True)
        is_enough = run.tally.show()
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
