"""Breaks the script in one place at a time, and looks whether a test fails: do the tests bite?

    mutate.py [--part one|import|check|server|all] [--lines A-B] [--sample N] [--jobs N] [-v] [FILE...]

Broken are comparisons (turned round, and by one at the bound), numbers, texts, True, False, None,
`not`, what is returned or yielded, and the arguments of calls. Left out is what is only for people:
docstrings, the values of the tables in TEXTS, and what looks like a SENTENCE, unless the script
compares it with something; and `from None`. The shell lines at the top stay as they are.
Each mutant is tested by the FILEs, usually those that concern its part, until the first failure.
One that does not compile, or is the same program, does not count; one that hangs is killed. The
exit status is 1 if fewer than 95 % die. Needs Linux, and pytest in the Python that runs this.
"""

import argparse
import ast
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
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "agent_key_request.py"
ENOUGH, SEED = 95.0, 12
PARTS = {  # the test files, those first that take least
    "one": ["test_rules.py", "test_sources.py", "test_request.py", "test_host.py"],
    "import": ["test_import.py", "test_check.py"],
    "check": ["test_check.py", "test_manager.py"],
    "server": ["test_server_protocol.py", "test_server_store.py", "test_server_life.py"],
}
SECTIONS = {"the server": "server", "keeping the store": "import", "the manager": "check"}
OF_CHECK = {"notes_on", "missing_indexes", "check_source"}  # they stand among those of an import
TEXTS = {"MESSAGES", "RULES", "VALUES", "HELP", "REFUSALS"}
COMPARED = {"SQLITE_SAYS"}  # sentences, but not ours
SENTENCE = re.compile(r"[a-z,'] [a-z%]|%[sd]: ")
OPERATOR = re.compile(rb"\bnot\s+in\b|\bis\s+not\b|\bin\b|\bis\b|[<>=!]=|[<>]")
TURNED = {
    "<": (">=", "<="), "<=": (">", "<"), ">": ("<=", ">="), ">=": ("<", ">"), "==": ("!=",),
    "!=": ("==",), "in": ("not in",), "not in": ("in",), "is": ("is not",), "is not": ("is",),
}  # fmt: skip


class Mutant(NamedTuple):
    """A change: the bytes from START to END become NEW."""

    line: int
    start: int
    end: int
    new: str


class Source:
    """The script, and the mutants that can be made of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.tree, self.starts = content, ast.parse(content), [0]
        self.lines = content.splitlines(keepends=True)
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def nodes_of(self, part: str) -> Iterator[ast.stmt]:
        """The statements of a part; part one ends with the call of `begin`."""
        title, below, begun = "", 0, False
        for node in self.tree.body:
            for line in self.lines[below : node.lineno]:
                match = re.match(rb"# [-=]{3,} (.+)\n", line)
                title = match[1].decode() if match else title
            below = node.end_lineno or 0
            of_check = getattr(node, "name", "") in OF_CHECK
            if part == ("one" if not begun else "check" if of_check else SECTIONS.get(title)):
                yield node
            begun = begun or isinstance(node, ast.If) and "begin(" in ast.unparse(node)

    def put(self, new: str, node: ast.expr) -> Mutant:
        """NEW in the place of a node."""
        end = self.starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return Mutant(node.lineno, self.starts[node.lineno - 1] + node.col_offset, end, new)

    def mutants(self, node: ast.AST, spoken: bool = True) -> Iterator[Mutant]:
        """All mutants of a node. spoken: whether a sentence in it is for people."""
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Compare):
            spoken, sides = False, [node.left, *node.comparators]
            for left, right in zip(sides, sides[1:]):
                after, before = self.put("", left).end, self.put("", right).start
                match = OPERATOR.search(self.content, after, before)
                assert match, ast.unparse(node)
                for new in TURNED[" ".join(match[0].decode().split())]:
                    yield Mutant(left.end_lineno or 0, match.start(), match.end(), new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield self.put("", node)._replace(end=self.put("", node).start + len("not"), new="   ")
        elif isinstance(node, (ast.Return, ast.Yield)):
            yield from self.nothing(node.value)
        elif isinstance(node, ast.Lambda):
            yield from self.nothing(node.body)
        elif isinstance(node, ast.Call):
            spoken = spoken and getattr(node.func, "attr", "") != "startswith"
            for argument in node.args + [keyword.value for keyword in node.keywords]:
                yield from self.nothing(argument)
        elif isinstance(node, ast.Constant) and node.value is not ...:
            if not (spoken and isinstance(node.value, str) and SENTENCE.search(node.value)):
                yield self.put(other_than(node.value), node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        elif isinstance(node, ast.Raise):
            children = [node.exc] if node.exc else []
        elif isinstance(node, ast.Assign):
            names = {getattr(target, "id", "") for target in node.targets}
            spoken = not names & COMPARED
            children = getattr(node.value, "keys", []) if names & TEXTS else children
        for child in children:
            yield from self.mutants(child, spoken)

    def nothing(self, value: ast.expr | None) -> Iterator[Mutant]:
        """None in the place of a value, unless it is broken as a constant anyway."""
        if isinstance(value, ast.GeneratorExp):  # its place includes the parentheses of the call
            yield self.put("(None)", value)
        elif value is not None and not isinstance(value, ast.Constant):
            yield self.put("*()" if isinstance(value, ast.Starred) else "None", value)

    def apply(self, mutant: Mutant) -> bytes:
        """The script with the mutant in it; nothing if it does not compile or is the same."""
        content = self.content[: mutant.start] + mutant.new.encode() + self.content[mutant.end :]
        try:
            compile(content, SCRIPT.name, "exec", dont_inherit=True)
            return b"" if ast.dump(ast.parse(content)) == ast.dump(self.tree) else content
        except (SyntaxError, ValueError):
            return b""


def other_than(value: object) -> str:
    """Another constant of the same kind, as source."""
    if isinstance(value, (str, bytes)):
        return repr("XX" + value + "XX" if isinstance(value, str) else b"XX" + value + b"XX")
    return repr(not value if isinstance(value, bool) else value + 1 if value is not None else 1)


def status_of(folder: Path, content: bytes, files: list[Path], patience: float) -> int:
    """Test a script: pytest's exit status, 0 if it survives."""
    (folder / "s").mkdir(parents=True)
    script = folder / "s" / SCRIPT.name
    script.write_bytes(content)
    script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name[:9] != "AGENT_KEY"}
    python = shutil.which("python3", path=os.defpath) or sys.executable
    python = os.environ.get("AGENT_KEY_PYTHONS", python).split()[0]
    kept.update(AGENT_KEY_SCRIPT=str(script), AGENT_KEY_PYTHONS=python, TMPDIR=str(folder))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    with (folder.parent / f"{folder.name}.txt").open("wb") as output:
        process = subprocess.Popen([*command, f"--basetemp={folder}/p", *files], cwd=folder, env=kept,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # fmt: skip
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends what it has started
        time.sleep(10)
    for place in Path("/proc").glob("[0-9]*/cmdline"):  # what is left has our folder in its command
        try:
            if f"{folder}/".encode() in place.read_bytes():
                os.kill(int(place.parent.name), signal.SIGKILL)
        except OSError:
            pass  # it has ended
    shutil.rmtree(folder, ignore_errors=True)
    return process.wait()


def main() -> int:
    """Break the parts one after the other: 0 if enough mutants die."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--lines", metavar="A-B", default="1-99999", help="of the script")
    parser.add_argument("--sample", type=int, metavar="N", help="of each part, always the same ones")
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="at the same time")
    parser.add_argument("-v", action="store_true", help="show the killed ones, too, and by what")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of tests")
    given = parser.parse_args()
    first, last = map(int, given.lines.split("-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))  # a mutant may eat memory
    source, killed, total = Source(SCRIPT.read_bytes()), 0, 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as name, ThreadPoolExecutor(given.jobs) as pool:
        Path(name).chmod(0o755)  # other users start copies of the script
        for part in PARTS if given.part == "all" else [given.part]:
            files = [file.resolve() for file in given.files] or [TESTS / file for file in PARTS[part]]
            found = {each for node in source.nodes_of(part) for each in source.mutants(node)}
            able = [each for each in sorted(found) if first <= each.line <= last and source.apply(each)]
            if given.sample and given.sample < len(able):
                able = sorted(random.Random(SEED).sample(able, given.sample))
            print(f"{part}: {len(able)} mutants", flush=True)
            started = time.monotonic()
            if status_of(Path(name, "sound"), source.content, files, 3600):
                print(Path(name, "sound.txt").read_text(errors="replace"), "They fail as it is.")
                return 2
            patience = 60 + 3 * (time.monotonic() - started)
            run = lambda n, each: status_of(Path(name, f"{part}{n}"), source.apply(each), files, patience)
            for n, (each, status) in enumerate(zip(able, pool.map(run, range(len(able)), able))):
                total, killed = total + 1, killed + bool(status)
                log = Path(name, f"{part}{n}.txt")
                ends = re.findall(r"^(?:FAILED|ERROR) (.+)", log.read_text(errors="replace"), re.M)
                log.unlink()
                if given.v or not status:
                    old = " ".join(source.content[each.start : each.end].decode().split())
                    print(ends[0] if ends else f"status {status}" if status else "SURVIVED", end=": ")
                    print(f"line {each.line}: {old} -> {each.new}", flush=True)
                    print("    " + source.lines[each.line - 1].decode().strip(), flush=True)
    share = 100 * killed / (total or 1)
    print(f"{total} mutants: {killed} killed, {total - killed} survived, {share:.1f} %")
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
