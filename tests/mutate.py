"""Breaks the script in one place at a time, and looks whether a test fails: do the tests bite?

    mutate.py [--part one|import|check|server|all] [--lines A-B] [--sample N] [--jobs N] [-v] [FILE]

Broken are comparisons (turned round, and by one at the bound), numbers, texts, True, False, None,
`not`, what is returned or yielded, and the arguments of calls. Left out is what is only for people:
docstrings, the values of the tables in TEXTS, and what looks like a SENTENCE, unless the script
compares it with something; and `from None`. The shell lines at the top stay as they are.
The FILEs test each mutant, usually those that concern its part, until the first failure. One that
does not compile does not count; one that hangs is killed. Exit status 1: fewer than 95 % died.
"""

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "agent_key_request.py"
PYTHON = shutil.which("python3", path=os.defpath) or sys.executable  # one that all users can start
PARTS = {  # the test files, those first that take least
    "one": ["test_rules.py", "test_sources.py", "test_request.py", "test_host.py"],
    "import": ["test_import.py", "test_check.py", "test_manager.py"],
    "check": ["test_check.py", "test_manager.py"],
    "server": ["test_server_protocol.py", "test_server_store.py", "test_server_life.py"],
}
TITLES = {"the server": "server", "keeping the store": "import", "the manager": "check"}
OF_CHECK = {"notes_on", "check_source"}  # they stand among those of an import
TEXTS = {"MESSAGES", "RULES", "VALUES", "HELP", "REFUSALS"}
SENTENCE = re.compile(r"[a-z] [a-z%]|%[sd]: ")
OPERATOR = re.compile(rb"not\s+in\b|is\s+not\b|in\b|is\b|[<>=!]=|[<>]")
TURNED = {"<": (">=", "<="), "<=": (">", "<"), ">": ("<=", ">="), ">=": ("<", ">"),
          "==": ("!=",), "!=": ("==",), "in": ("not in",), "not in": ("in",), "is": ("is not",),
          "is not": ("is",)}  # fmt: skip


class Mutant(NamedTuple):
    line: int
    start: int
    end: int
    new: str


class Source:
    """The script, and the mutants that can be made of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.lines = content, content.splitlines(keepends=True)
        self.starts = [0, *accumulate(map(len, self.lines))]

    def nodes_of(self, part: str) -> Iterator[ast.stmt]:
        """The statements of a part, told by the titles in the script; `begin` ends part one."""
        here, below = "one", 0
        for node in ast.parse(self.content).body:
            for title in re.findall(rb"(?m)^# -+ (.+)$", b"".join(self.lines[below : node.lineno])):
                here = here if here == "one" else TITLES.get(title.decode(), "")
            below = node.end_lineno or 0
            if part == ("check" if getattr(node, "name", "") in OF_CHECK else here):
                yield node
            here = "" if isinstance(node, ast.If) and "begin(" in ast.unparse(node) else here

    def put(self, node: ast.expr, new: str) -> Mutant:
        """NEW in the place of a node, of the bytes from start to end."""
        end = self.starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return Mutant(node.lineno, self.starts[node.lineno - 1] + node.col_offset, end, new)

    def mutants(self, node: ast.AST, spoken: bool = True) -> Iterator[Mutant]:
        """All mutants of a node. spoken: whether a sentence in it is for people."""
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Compare):
            spoken = False
            for left in [node.left, *node.comparators[:-1]]:
                match = OPERATOR.search(self.content, self.put(left, "").end)
                for new in TURNED[" ".join(match[0].decode().split())]:
                    yield Mutant(left.end_lineno or 0, *match.span(), new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield self.put(node, "   ")._replace(end=self.put(node, "").start + len("not"))
        elif isinstance(node, (ast.Return, ast.Yield, ast.Lambda)):
            yield from self.nothing(getattr(node, "value", None) or getattr(node, "body", None))
        elif isinstance(node, ast.Call):
            spoken = spoken and getattr(node.func, "attr", "") != "startswith"
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield from self.nothing(argument)
        elif isinstance(node, ast.Constant) and not (spoken and SENTENCE.search(str(node.value))):
            yield self.put(node, other_than(node.value))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            children = []  # a docstring
        elif isinstance(node, ast.Raise):
            children = children[:1]  # not `from None`
        elif isinstance(node, ast.Assign):
            names = {getattr(target, "id", "") for target in node.targets}
            spoken = "SQLITE_SAYS" not in names  # those are sentences, but not ours
            children = getattr(node.value, "keys", []) if names & TEXTS else children
        for child in children:
            yield from self.mutants(child, spoken)

    def nothing(self, value: ast.expr | None) -> Iterator[Mutant]:
        """None in the place of a value, unless it is broken as a constant anyway."""
        new = {ast.GeneratorExp: "(None)", ast.Starred: "*()"}.get(type(value), "None")
        if value is not None and not isinstance(value, ast.Constant):
            yield self.put(value, new)

    def apply(self, each: Mutant) -> bytes:
        """The script with a mutant in it."""
        return self.content[: each.start] + each.new.encode() + self.content[each.end :]


def other_than(value: object) -> str:
    """Another constant of the same kind, as source; of a letter that is a set of one, another."""
    if isinstance(value, (str, bytes)):
        more = "X" if isinstance(value, str) else b"X"
        return repr(more if len(value) == 1 else more + value + more)
    return repr(not value if isinstance(value, bool) else (value or 0) + 1)


def test(folder: Path, content: bytes, files: list[Path], patience: float) -> tuple[Any, str]:
    """Test a script: pytest's exit status, 0 if it survives, and which test failed first."""
    try:
        compile(content, SCRIPT.name, "exec")
    except SyntaxError:
        return None, "does not compile"
    script = folder / "s" / SCRIPT.name
    script.parent.mkdir(parents=True)
    script.write_bytes(content)
    script.chmod(0o755)
    environment = {**os.environ, "TMPDIR": str(folder), "AGENT_KEY_SCRIPT": str(script)}
    environment["AGENT_KEY_PYTHONS"] = os.environ.get("AGENT_KEY_PYTHONS", PYTHON).split()[0]
    command = [sys.executable, "-m", "pytest", "-xq", "-m", "not slow", "--failed-first"]
    command += ["-o", f"cache_dir={folder.parent}/cache"]  # what killed its neighbour comes first
    command += [f"--basetemp={folder}/p", *map(str, files)]
    with (folder / "said").open("w") as said, contextlib.suppress(subprocess.TimeoutExpired):
        how = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        process = subprocess.Popen(command, cwd=folder, env=environment, **how)
        process.wait(patience)
    match = re.search(r"(?m)^(?:FAILED|ERROR) (.+)", (folder / "said").read_text(errors="replace"))
    sweep(folder)
    status = process.wait()
    return status, match[1] if match else f"status {status}" if status else "SURVIVED"


def sweep(folder: Path) -> None:
    """End what has the folder in its command: tests and what they started; then remove it."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if f"{folder}/".encode() in place.read_bytes():
                os.kill(int(place.parent.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Break the parts one after the other: 0 if enough mutants die."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--lines", metavar="A-B", default="1-99999", help="of the script")
    parser.add_argument("--sample", type=int, metavar="N", help="of each part, always the same")
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="at the same time")
    parser.add_argument("-v", action="store_true", help="show the killed ones, too, and by what")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of tests")
    given = parser.parse_args()
    first, last = map(int, given.lines.split("-"))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))  # a mutant may eat memory
    source, killed, total, pool = Source(SCRIPT.read_bytes()), 0, 0, ThreadPoolExecutor(given.jobs)
    with tempfile.TemporaryDirectory(prefix="mutate-") as name, pool:
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, lambda *_: (sweep(Path(name)), os._exit(1)))
        Path(name).chmod(0o755)  # other users start copies of the script
        for part in PARTS if given.part == "all" else [given.part]:
            files = [each.resolve() for each in given.files or map(TESTS.joinpath, PARTS[part])]
            found = [each for node in source.nodes_of(part) for each in source.mutants(node)]
            chosen = [each for each in found if first <= each.line <= last]
            count = min(given.sample or len(chosen), len(chosen))
            chosen = sorted(random.Random(12).sample(chosen, count))
            print(f"{part}: {len(chosen)} of {len(found)} mutants", flush=True)
            started = time.monotonic()
            status, how = test(Path(name, "sound"), source.content, files, 3600)
            if status:
                sys.exit(f"the tests fail without a mutant: {how}")
            run = partial(test, files=files, patience=60 + 3 * (time.monotonic() - started))
            folders = (Path(name, str(number)) for number in range(len(chosen)))
            tried = pool.map(run, folders, map(source.apply, chosen))
            for each, (status, how) in zip(chosen, tried):
                total, killed = total + (status is not None), killed + bool(status)
                if status == 0 or given.v:
                    old = " ".join(source.content[each.start : each.end].decode().split())
                    line = source.lines[each.line - 1].decode().strip()
                    print(f"line {each.line}: {old} -> {each.new} | {line} |", how, flush=True)
    share = 100 * killed / max(total, 1)
    print(f"{total} mutants: {killed} killed, {total - killed} survived, {share:.1f} %")
    return int(share < 95)


if __name__ == "__main__":
    sys.exit(main())
