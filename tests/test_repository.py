"""The repository itself: what is in it, how the script is written, and the targets of make."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mutate
import pytest
from conftest import ROOT, SCRIPT, mode_of
from manager import read_json

ALLOWED = {"agent_key_request.py", "README.md", "tests", "Makefile", "sample.db.sql"}
PROGRAM = "usr/local/bin/agent_key_request.py"
UNITS = "etc/systemd/system"

COLUMNS = 100
FUNCTION_LINES = 40
FORBIDDEN = {"exec", "eval", "compile", "__import__"}  # they run code that no editor shows
OLDEST_PYTHON = (3, 6)


# ---------------------------------------------------------------- how the script is written


def tree() -> ast.Module:
    """Return the script as the oldest Python reads it."""
    return ast.parse(SCRIPT.read_text(), feature_version=OLDEST_PYTHON)


def names_in(node: ast.AST) -> set[str]:
    """Return all names that are used in NODE."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def functions_in(node: ast.AST, place: str = "") -> Iterator[tuple[str, int]]:
    """Give the full name and the number of lines of each function and method in NODE."""
    for child in ast.iter_child_nodes(node):
        inside = place
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = f"{place}.{child.name}".lstrip(".")
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert child.end_lineno is not None
            yield f"{inside} (line {child.lineno})", child.end_lineno - child.lineno + 1
        yield from functions_in(child, inside)


def test_no_line_is_too_long() -> None:
    lines = enumerate(SCRIPT.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > COLUMNS] == []


def test_no_function_is_too_long() -> None:
    lengths = dict(functions_in(tree()))
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_functions_of_the_same_name_are_all_counted() -> None:
    module = ast.parse("class A:\n  def f(): ...\nclass B:\n  def f():\n    def g(): ...\n")
    assert dict(functions_in(module)) == {"A.f (line 2)": 1, "B.f (line 4)": 2, "B.f.g (line 5)": 1}


def test_nothing_is_too_complex() -> None:
    """`make lint` measures it; no function is exempt."""
    assert "max-complexity = 10" in (ROOT / ".ruff.toml").read_text()
    assert not re.search(r"noqa: *[A-Z0-9, ]*C901", SCRIPT.read_text())


def test_mutants_are_made_of_every_part() -> None:
    """`mutate.py` knows the rooms with which the parts of the script begin."""
    source = mutate.Source(SCRIPT.read_bytes())
    assert source.missing_rooms() == []
    assert [part for part in mutate.FILES if not any(source.mutants_of(part))] == []


def test_mutants_are_tested_by_files_that_exist() -> None:
    patterns = [pattern for patterns in mutate.FILES.values() for pattern in patterns]
    assert [name for name in patterns if not list(mutate.TESTS.glob(f"test_{name}.py"))] == []


def test_every_line_is_plain_python() -> None:
    """Only the launcher runs code that it is given: this file, through Python's own cache."""
    module = tree()
    launcher = ast.get_docstring(module, clean=False)
    assert launcher
    calls = re.findall(r"\b(?:exec|eval|compile|__import__)\((\w+)", launcher)
    assert sorted(calls) == ["load", "load", "make_cache", "text"]
    assert names_in(module) & FORBIDDEN == set()


# ---------------------------------------------------------------- what is in the repository


def run(
    *command: str, cwd: Path, umask: int = -1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with this ENVIRONMENT on top of the usual one.

    `make test` may have started us. What it passes on to a `make` below it is left out.
    """
    ours = ("AGENT_KEY", "MAKE", "MFLAGS", "SELECT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **environment},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(*command: str, cwd: Path = ROOT, umask: int = -1) -> str:
    """Return what a command prints; it must succeed."""
    done = run(*command, cwd=cwd, umask=umask)
    assert done.returncode == 0, done
    return done.stdout


def files_of_the_repository() -> list[str]:
    """Return the names that git knows, or would take."""
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
    homes = r"/(?:home|work)/\w|/root/\."
    hosts = r"(?:debian|ubuntu|pypi|pythonhosted|npmjs)\.(?:org|com|net|io)"
    names = re.compile(f"{homes}|{hosts}")
    found = {}
    for name in files_of_the_repository():
        match = names.search((ROOT / name).read_text(errors="replace"))
        if match:
            found[name] = match[0]
    assert found == {}


# ---------------------------------------------------------------- make


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what a user gets."""
    if not shutil.which("make"):
        pytest.skip("make is not here")
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("Makefile", "README.md", "sample.db.sql"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/python-with", folder / ".ci")
    shutil.copy2(SCRIPT, folder / SCRIPT.name)
    return folder


def targets() -> set[str]:
    """Return the targets of the Makefile."""
    (phony,) = re.findall(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())
    return set(phony.split())


@pytest.mark.parametrize("words", [["make"], ["make", "help"]], ids=" ".join)
def test_make_lists_its_targets(copy: Path, words: list[str]) -> None:
    lines = output_of(*words, cwd=copy).splitlines()
    assert {line.split()[1] for line in lines} == targets() - {"tests"}
    assert all(line.startswith("make ") and len(line) <= COLUMNS for line in lines)


def test_make_run_answers_from_the_sample(copy: Path) -> None:
    lines = [line for line in output_of("make", "-s", "run", cwd=copy).splitlines() if "{" in line]
    answers = [read_json(line.encode()) or {} for line in lines]
    assert [answer["data"]["id"] for answer in answers] == ["001", "001"]


def test_make_install_and_uninstall(copy: Path, tmp_path: Path) -> None:
    destination = f"DESTDIR={tmp_path}/dest"
    installed = tmp_path / "dest" / PROGRAM
    for _upgrade in range(2):
        output_of("make", "-s", "install", destination, cwd=copy, umask=0o077)
        assert mode_of(installed) == "0755"
        assert installed.stat().st_uid == os.geteuid()
        assert installed.read_bytes() == SCRIPT.read_bytes()
        caches = list((installed.parent / "__pycache__").iterdir())
        assert {mode_of(cache) for cache in caches} == {"0644"}
    output_of("make", "-s", "uninstall", destination, cwd=copy)
    assert list(installed.parent.iterdir()) == []


def test_make_install_does_not_need_to_start_it(copy: Path, tmp_path: Path) -> None:
    """For another machine, whose Python is not here."""
    (copy / SCRIPT.name).write_text("#!/bin/sh\nexit 1\n")
    output_of("make", "-s", "install", f"DESTDIR={tmp_path}/dest", cwd=copy)
    assert (tmp_path / "dest" / PROGRAM).exists()


# ---------------------------------------------------------------- make install-units


def units_of_the_readme() -> dict[str, str]:
    """Return the blocks of the README before which the path of a unit stands, by its name."""
    pattern = r"`/etc/systemd/system/([\w-]+\.\w+)`[^\n]*\n+```ini\n(.*?)^```$"
    return dict(re.findall(f"(?ms){pattern}", (ROOT / "README.md").read_text()))


def test_make_install_units_and_uninstall_them(copy: Path, tmp_path: Path) -> None:
    """The units are the README's; one that was changed on the host is not lost."""
    destination = f"DESTDIR={tmp_path}/dest"
    folder = tmp_path / "dest" / UNITS
    output_of("make", "-s", "install-units", destination, cwd=copy, umask=0o077)
    installed = {path.name: path.read_text() for path in folder.iterdir()}
    assert len(installed) == 4
    assert installed == units_of_the_readme()
    assert {mode_of(path) for path in folder.iterdir()} == {"0644"}

    changed = folder / "agent-key-import.service"
    changed.write_text("# ours\n")
    said = output_of("make", "-s", "install-units", destination, cwd=copy)
    assert f"{changed} was changed and stays as it is" in said
    assert changed.read_text() == "# ours\n"

    (folder / "other.service").touch()
    output_of("make", "-s", "uninstall-units", destination, cwd=copy)
    assert [path.name for path in folder.iterdir()] == ["other.service"]


def test_a_unit_that_the_readme_lacks(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("`/etc/systemd/system/agent-key-request.socket`\n\ntext\n")
    done = run("make", "-s", "install-units", f"DESTDIR={tmp_path}/dest", cwd=copy)
    assert done.returncode != 0
    assert "README.md has no block for agent-key-request.socket" in done.stderr


# ---------------------------------------------------------------- make test without pytest

# An interpreter that can do nothing but what its WORDS say: `recent`, `venv`, `pytest`.
INTERPRETER = """#!/bin/sh
case "$*" in
*version_info*) {recent} ;;
"-m venv --clear "*) {venv} && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip "*) echo "no network"; {pip} ;;
"-m pytest "*) {pytest} && echo "pytest $*" ;;
--version) echo Python 3.9.2 ;;
*) false ;;
esac
"""


MakeTest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make_test(copy: Path) -> Iterator[MakeTest]:
    """Run `make test` where the only Python is one that can do what the WORDS say."""

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        folder = copy / "bin"
        folder.mkdir()
        for tool in ("make", "sh", "dirname", "mktemp", "sed", "rm", "cat", "cp", "mkdir"):
            (folder / tool).symlink_to(shutil.which(tool) or "")
        able = {
            word: "true" if word in words else "false"
            for word in ("recent", "venv", "pip", "pytest")
        }
        (folder / "python3").write_text(INTERPRETER.format(**able))
        (folder / "python3").chmod(0o755)
        return run("make", "-s", "test", cwd=copy, PATH=str(folder))

    yield make
    assert not (copy / ".venv").exists()


def test_make_test_with_pytest(make_test: MakeTest) -> None:
    done = make_test("recent", "pytest")
    assert done.returncode == 0
    assert "-m not slow tests" in done.stdout


def test_make_test_with_an_old_python(
    make_test: MakeTest,
) -> None:
    """It has pytest, which does not help, and it makes no virtual environment."""
    done = make_test("pytest", "venv", "pip")
    assert done.returncode != 0
    assert "Python 3.11 or later" in done.stderr
    assert "Python 3.9.2" in done.stderr


@pytest.mark.parametrize("able", [["recent"], ["recent", "venv"], ["recent", "venv", "pip"]])
def test_make_test_without_pytest(make_test: MakeTest, able: list[str]) -> None:
    """The reason is shown, and no half of a virtual environment is left."""
    done = make_test(*able)
    assert done.returncode != 0
    assert "pytest" in done.stderr
    assert "venv" not in able or "no network" in done.stderr


def test_make_tests_is_make_test(copy: Path) -> None:
    """The directory of that name must not make the target look done."""
    (copy / "tests").mkdir()
    assert "-m pytest" in output_of("make", "-n", "tests", cwd=copy)
