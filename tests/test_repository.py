"""The repository itself: what is in it, make run and make install."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import SCRIPT

ROOT = SCRIPT.parent
ALLOWED = {"agent_key_request.py", "README.md", "tests", "Makefile", "sample.db.sql"}
UNDER_VENDOR = "/usr/local/bin/agent_key_request.py"


def output_of(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; it must succeed."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what a user gets, in an empty folder."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ALLOWED - {"tests"}:
        shutil.copy2(ROOT / name, folder / name)
    return folder


def test_only_the_agreed_names_at_the_top() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in output_of("git", "ls-files").splitlines()}
    assert {name for name in names if not name.startswith(".")} == ALLOWED


def test_make_run_answers_from_the_sample(copy: Path) -> None:
    lines = [line for line in output_of("make", "-s", "run", cwd=copy).splitlines() if "{" in line]
    assert len(lines) == 2
    assert all(json.loads(line)["data"]["id"] == "001" for line in lines)


def test_make_install(copy: Path, tmp_path: Path) -> None:
    output_of("make", "-s", "install", f"DESTDIR={tmp_path}/dest", cwd=copy)
    installed = tmp_path / "dest" / UNDER_VENDOR[1:]
    assert stat.S_IMODE(installed.stat().st_mode) == 0o755
    assert installed.read_bytes() == SCRIPT.read_bytes()


def test_nothing_names_a_machine() -> None:
    """No home directory and no interpreter of one machine."""
    for path in [ROOT / name for name in ALLOWED - {"tests"}] + list((ROOT / "tests").glob("*.py")):
        assert not re.search(r"/(root|home|work)/\w", path.read_text()), path
