"""What the tests of sources share: they ask a source in the process, and check each answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conftest import KEY, Record, script
from manager import check_line

SECRET = "TheSecretKeyThatNoMessageMayShow"
DATA = Record()._asdict()
ROW = f"001,my_agent,192.168.1.100,{KEY}"  # agent 001 in a CSV file
KEYS_LINE = f"001 my_agent 192.168.1.100 {KEY}\n"  # agent 001 in client.keys
TEXTS = {"csv": f"id,name,ip,key\n{ROW}\n", "keys": KEYS_LINE}
READ = "Cannot read key source: "
LATE = "no answer in time (--timeout)"
LACKS = "it lacks a table or view agent(id, name, ip, agent_key)"
HALF_WRITTEN = "its line has no end; the file may be half-written"
KINDS = ["sqlite", "csv", "keys", "sql"]
PATIENCE = 60.0  # seconds that no test here needs, however busy the machine is


def look(path: str | bytes | Path, *words: str, seconds: float = PATIENCE) -> dict[str, Any]:
    """Ask the source at PATH, check what holds for every answer, and give its JSON object."""
    name = os.fsdecode(path)
    answer = script.answer(words, lambda: script.open_source(name, seconds), name)
    assert SECRET.encode() not in answer.line()
    content = check_line(answer.line())
    if content["error"] == 2:
        start = f"{READ}{script.printable(name)}: "
        assert content["message"].startswith(start), content
        assert len(content["message"]) > len(start), content
    return content


def serves(path: str | bytes | Path) -> bool:
    """Assert that agent 001 is found at PATH, by id and by ip, and nothing else is."""
    assert look(path, "id", "001").get("data") == DATA, look(path, "id", "001")
    assert look(path, "ip", "192.168.1.100").get("data") == DATA
    assert look(path, "id", "999")["error"] == 4
    assert look(path, "ip", "192.168.1.1")["error"] == 4
    return True


def refuses(path: str | bytes | Path, *words: str, seconds: float = PATIENCE) -> str:
    """Assert error 2 for WORDS (`id 001`), and give what its message says after the file's name."""
    content = look(path, *(words or ("id", "001")), seconds=seconds)
    assert content["error"] == 2, content
    reason: str = content["message"][len(f"{READ}{script.printable(os.fsdecode(path))}: ") :]
    return reason


def in_octal(path: Path) -> str:
    """Give the mode of PATH as `chmod` takes it, for the message of a failure."""
    return f"{path} has mode {path.stat().st_mode & 0o7777:o}"


class Measured(NamedTuple):
    """What a process wrote, how it ended, and how much memory it had at most, in kilobytes."""

    output: bytes
    status: int
    memory: int


# The memory of a process counts from the fork on: it must not be forked by this large process.
MEASURE = """\
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_pid, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss, file=sys.stderr)
"""


def measure(command: Sequence[str | bytes | Path], path: str) -> Measured:
    """Run COMMAND with this PATH in its environment, and measure its memory."""
    measuring = [sys.executable, "-IS", "-c", MEASURE, *command]
    done = subprocess.run(measuring, capture_output=True, env={"PATH": path}, check=True)
    status, memory = done.stderr.split()
    return Measured(done.stdout, int(status), int(memory))
