"""The repository itself: what is in it, how much there is to read, make run and make install."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT

ALLOWED = {"agent_key_request.py", "README.md", "tests", "Makefile", "sample.db.sql"}
INSTALLED = "usr/local/bin/agent_key_request.py"

# What a reviewer has to read. Part one is all that runs as root for a request.
LINES = 1610
PART_ONE_LINES = 600
COLUMNS = 100
FUNCTION_LINES = 40
FORBIDDEN = {"exec", "eval", "compile", "__import__"}  # code that no editor and no linter sees


def tree() -> ast.Module:
    """The script as Python reads it."""
    return ast.parse(SCRIPT.read_text())


def calls(node: ast.AST) -> set[str]:
    """The names of the functions that are called, or only named, somewhere in NODE."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


# ---------------------------------------------------------------- how much there is to read


def part_one_lines(module: ast.Module) -> int:
    """Count the lines above the first import of part two, which follows the call of `begin`."""
    for node, following in zip(module.body, module.body[1:], strict=False):
        if isinstance(node, ast.If) and "begin" in calls(node):
            assert isinstance(following, (ast.Import, ast.ImportFrom)), ast.unparse(following)
            return following.lineno - 1
    raise AssertionError("nothing begins at the end of part one")


def test_the_file_stays_small() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= LINES
    assert part_one_lines(tree()) <= PART_ONE_LINES


def test_no_line_is_too_long() -> None:
    lines = enumerate(SCRIPT.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > COLUMNS] == []


def test_no_function_is_too_long() -> None:
    functions = [node for node in ast.walk(tree()) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 40
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_every_line_is_plain_python() -> None:
    """Only the header runs code that it is given: the file itself, through Python's own cache."""
    module = tree()
    header = ast.get_docstring(module, clean=False)
    assert header and len(re.findall(r"\b(?:exec|eval|compile)\(", header)) == 1
    assert calls(module) & FORBIDDEN == set()


# ---------------------------------------------------------------- what is in the repository


def output_of(*command: str, cwd: Path = ROOT, umask: int = -1) -> str:
    """What a command prints; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENT_KEY")}
    done = subprocess.run(
        command, cwd=cwd, env=kept, umask=umask, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def files_of_the_repository() -> list[str]:
    """The names that git knows, or would take."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout, or no git")
    trust = ("-c", f"safe.directory={ROOT}")  # the checkout may be another user's
    listed = output_of("git", *trust, "ls-files", "-co", "--exclude-standard").splitlines()
    return sorted(name for name in set(listed) if (ROOT / name).exists())


def test_only_the_agreed_names_at_the_top() -> None:
    top = {name.split("/")[0] for name in files_of_the_repository()}
    assert {name for name in top if not name.startswith(".")} == ALLOWED


def test_nothing_names_a_machine() -> None:
    """No home directory or interpreter of one machine, and no host that packages come from."""
    names = re.compile(
        r"/(?:root|home|work)/\w|(?:debian|ubuntu|pypi|pythonhosted|npmjs)\.(?:org|com|net|io)"
    )
    found = {}
    for name in files_of_the_repository():
        match = names.search((ROOT / name).read_text(errors="replace"))
        if match:
            found[name] = match[0]
    assert found == {}


# ---------------------------------------------------------------- make


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what a user gets, in an empty folder."""
    if not shutil.which("make"):
        pytest.skip("make is not here")
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("Makefile", "sample.db.sql"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copy2(SCRIPT, folder / SCRIPT.name)
    return folder


def test_make_run_answers_from_the_sample(copy: Path) -> None:
    lines = [line for line in output_of("make", "-s", "run", cwd=copy).splitlines() if "{" in line]
    assert len(lines) == 2
    assert all(json.loads(line)["data"]["id"] == "001" for line in lines)


def test_make_install_and_uninstall(copy: Path, tmp_path: Path) -> None:
    destination = f"DESTDIR={tmp_path}/dest"
    installed = tmp_path / "dest" / INSTALLED
    for _upgrade in range(2):
        output_of("make", "-s", "install", destination, cwd=copy, umask=0o077)
        assert stat.S_IMODE(installed.stat().st_mode) == 0o755
        assert installed.stat().st_uid == os.geteuid()
        assert installed.read_bytes() == SCRIPT.read_bytes()
        caches = list((installed.parent / "__pycache__").iterdir())
        assert [stat.S_IMODE(cache.stat().st_mode) for cache in caches] == [0o644]
    output_of("make", "-s", "uninstall", destination, cwd=copy)
    assert list(installed.parent.iterdir()) == []


def test_make_install_does_not_need_to_start_it(copy: Path, tmp_path: Path) -> None:
    """For another machine, whose Python is not here."""
    (copy / SCRIPT.name).write_text("#!/bin/sh\nexit 1\n")
    output_of("make", "-s", "install", f"DESTDIR={tmp_path}/dest", cwd=copy)
    assert (tmp_path / "dest" / INSTALLED).exists()
