"""The repository itself: what is in it, what README and --help promise, make run and install."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import SCRIPT, interpreters

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text()
ALLOWED = {"agent_key_request.py", "README.md", "tests", "Makefile", "sample.db.sql"}
UNDER_VENDOR = "/usr/local/bin/agent_key_request.py"


def output_of(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; it must succeed."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


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
    assert lines[0] == blocks("json")[0].strip()


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 client")
def test_the_readme_makes_a_store(copy: Path) -> None:
    (example,) = [block for block in blocks("sh") if "sqlite3" in block]
    assert output_of("sh", "-ec", example, cwd=copy) == blocks("json")[0]


def test_make_install(copy: Path, tmp_path: Path) -> None:
    output_of("make", "-s", "install", f"DESTDIR={tmp_path}/dest", cwd=copy)
    installed = tmp_path / "dest" / UNDER_VENDOR[1:]
    assert stat.S_IMODE(installed.stat().st_mode) == 0o755
    assert installed.read_bytes() == SCRIPT.read_bytes()


def test_readme_and_help_name_the_same_options() -> None:
    text = output_of(interpreters()[0].path, str(SCRIPT), "--help")
    mentioned = set(re.findall(r"(?<![\w-])--[a-z]+", README)) - {"--batch"}
    assert set(re.findall(r"(?<![\w-])--[a-z]+", text)) - {"--help"} == mentioned - {"--help"}
    assert "--help" in README


def test_exec_path_of_the_managers_own_python(tmp_path: Path) -> None:
    """The README's line works when its paths are those of an interpreter and script that exist."""
    lines = [line for line in README.splitlines() if "framework/python" in line]
    (command,) = re.findall(r"<exec_path>(.*)</exec_path>", lines[0])
    words = command.replace("/var/ossec/framework/python/bin/python3", interpreters()[0].path)
    words = words.replace(UNDER_VENDOR, str(SCRIPT)).replace("/etc/agents.db", "sample.db.sql")
    assert '"id": "001"' in output_of(*words.split(" "), "id", "001")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_units_are_sound(tmp_path: Path) -> None:
    socket, service = blocks("ini")
    command = re.search(r"ExecStart=(\S+)", service)
    assert command and command[1] == UNDER_VENDOR
    (tmp_path / "agent-key-request.socket").write_text(socket)
    unit = tmp_path / "agent-key-request.service"
    unit.write_text(service.replace(UNDER_VENDOR, str(SCRIPT)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "agent-key-request" not in done.stderr, done.stderr
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Unknown" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr


def test_nothing_names_a_machine() -> None:
    """No home directory and no interpreter of one machine."""
    for path in [ROOT / name for name in ALLOWED - {"tests"}] + list((ROOT / "tests").glob("*.py")):
        assert not re.search(r"/(root|home|work)/\w", path.read_text()), path
