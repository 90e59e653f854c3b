"""Runs the script as a person does: standard output and error apart, or on a terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from conftest import Caller
from terminal import Terminal

NOISE = 30.0  # seconds that a very busy machine may add to what takes some
SOON = 5.0  # seconds that a deadline may be late by, on such a machine

Done = subprocess.CompletedProcess[bytes]
Words = list[str | bytes | Path]


class Shown(NamedTuple):
    """How a program ended that had a terminal for input and errors, and what came out of it."""

    status: int
    output: bytes
    shown: str


def start(ask: Caller, *words: str | bytes | Path, **how: Any) -> Done:
    """Run the script with WORDS, or the `command` that HOW names; `env` comes on top of PATH."""
    how = {"capture_output": True, "stdin": subprocess.DEVNULL, "cwd": ask.folder, **how}
    command = how.pop("command", None) or ask.command()
    environment = {"PATH": ask.path, **how.pop("env", {})}
    return subprocess.run([*command, *words], env=environment, check=False, **how)


def on_a_terminal(ask: Caller, *words: str | bytes | Path, **how: Any) -> Shown:
    """Run the script with a terminal for standard input and error."""
    with Terminal() as terminal:
        streams = {"stdin": terminal.end, "stdout": subprocess.PIPE, "stderr": terminal.end}
        done = start(ask, *words, capture_output=False, **streams, **how)
        return Shown(done.returncode, done.stdout, terminal.shown().replace("\r\n", "\n"))
