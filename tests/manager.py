"""A stand-in for the Wazuh manager: asks for a key as `wazuh-authd` does, by both methods.

What it does, and what it makes of an answer, is in MANAGER.md ("Executable method",
"Socket method", "What an answer does to the manager", "Which ip it takes").
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECV_SIZE = 65536  # authd calls recv once, with this size
REPLY_SIZE = 4096  # bytes: no answer of ours is longer, so that it never waits for its reader
MESSAGE_SIZE = 500
BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MANAGER_UMASK = 0o022
MANAGER_TIMEOUT = 60.0  # seconds, the default of <timeout>
PATIENCE = 30.0  # seconds this stand-in waits after SIGTERM; authd itself waits for ever
FIELDS = ("id", "name", "ip", "key")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back from one request, and what the manager makes of it."""

    output: bytes
    status: int | None = None  # exit status, negative for a signal; None by socket
    timed_out: bool = False
    held: bool = False  # SIGTERM did not end it
    seconds: float = 0.0
    seconds_to_die: float = 0.0  # from SIGTERM to the end
    pid: int = 0

    @property
    def reply(self) -> dict[str, Any]:
        """The JSON object that authd reads; empty where it reads none."""
        return read_json(self.output) or {}

    @property
    def verdict(self) -> str:
        """What the answer does to the manager, in one word or two."""
        if self.timed_out:
            return "timed out"
        if self.status:
            return "thrown away"
        return judge(read_json(self.output))

    @property
    def error(self) -> Any:
        """The error number; None where there is none."""
        return self.reply.get("error")

    @property
    def message(self) -> str:
        """The text of an error answer; empty where there is none."""
        return str(self.reply.get("message", ""))

    @property
    def data(self) -> dict[str, str]:
        """The agent's record; empty in an error answer."""
        record: dict[str, str] = self.reply.get("data", {})
        return record


# ---------------------------------------------------------------- what the manager makes of it


def read_json(output: bytes) -> dict[str, Any] | None:
    """Read OUTPUT as cJSON does: up to a NUL, and text after the object does not matter."""
    text = output.split(b"\0")[0].decode("utf-8", "surrogateescape").lstrip()
    try:
        value, _end = json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def judge(reply: dict[str, Any] | None) -> str:
    """Say what REPLY does: lost, refused, rejected, crashed, or what judge_record says."""
    if reply is None or "error" not in reply:
        return "lost"
    error = reply["error"]
    if isinstance(error, (int, float)) and int(error) != 0:
        return "refused"
    data = reply.get("data")
    if not isinstance(data, dict) or any(field not in data for field in FIELDS):
        return "rejected"
    if any(not isinstance(data[field], str) for field in FIELDS):
        return "crashed"
    return judge_record(*(data[field] for field in FIELDS))


def judge_record(agent_id: str, name: str, ip: str, key: str) -> str:
    """Say what becomes of a record of strings: added as it is, changed, rejected, or poison."""
    if "\n" in agent_id + name + key or " " in name or name[:1] in ("!", "#", ".", ""):
        return "poisoned"  # a line too many, one it cannot read, or its own folders emptied
    if not re.fullmatch("[0-9]+", agent_id) or agent_id != f"{int(agent_id):03d}" or not key:
        return "poisoned"  # an id that client.keys and the manager's database write differently
    if stored_ip(ip) is None:
        return "rejected"
    return "added" if comes_back(ip) else "changed"


GROUP = re.compile("[0-9a-fA-F]{1,4}")
BYTES = {str(number) for number in range(256)}


def is_quad(text: str) -> bool:
    """Whether TEXT is an IPv4 address: four numbers up to 255, without zeros in front."""
    numbers = text.split(".")
    return len(numbers) == 4 and BYTES.issuperset(numbers)


def ipv6_groups(address: str) -> list[str] | None:
    """Give the eight groups of an IPv6 ADDRESS in hexadecimal alone; None where it is none."""
    front, gap, back = address.partition("::")
    groups = [side.split(":") if side else [] for side in (front, back)]
    count = sum(map(len, groups))
    if not all(GROUP.fullmatch(group) for side in groups for group in side):
        return None
    if count != 8 if not gap else count > 7:
        return None
    return [*groups[0], *["0"] * (8 - count), *groups[1]]


def prefix_of_mask(mask: str) -> str:
    """Give the prefix length of a dotted netmask; "" for a mask with holes, which is lost."""
    bits = "".join(f"{int(number):08b}" for number in mask.split("."))
    return "" if "01" in bits else str(bits.count("1"))


def with_length(address: str, length: str, width: int) -> str:
    """Join an address and a prefix length; without the length of a single address."""
    return f"{address}/{length}" if length and int(length) != width else address


def stored_ip(ip: str) -> str | None:
    """Give what the manager makes of an agent's IP and writes down; None: `Not valid IP`.

    That is what its own check (OS_IsValidIP) does.
    """
    if ip == "any":
        return ip
    address, slash, length = ip.removeprefix("!").partition("/")
    quad = address[7:] if address[:7].lower() == "::ffff:" else address
    if is_quad(quad):
        if slash and is_quad(length):
            return with_length(quad, prefix_of_mask(length), 32)
        if slash and not re.fullmatch("[12]?[0-9]|3[0-2]", length):
            return None
        return with_length(quad, length, 32)
    groups = ipv6_groups(address)
    if groups is None:
        return None
    if slash:
        if address == "::" or not re.fullmatch("[0-9]?[0-9]|1[01][0-9]|12[0-8]", length):
            return None
        length = str(int(length)).removeprefix("0")  # /0 is lost
    return with_length(":".join(group.upper().zfill(4) for group in groups), length, 128)


def comes_back(ip: str) -> bool:
    """Whether the manager stores just what IP says: the same address, or network without host bits.

    IPv6 is written in another spelling, which is no change.
    """
    stored = stored_ip(ip)
    if stored is None or ip == "any":
        return stored is not None
    try:
        return ipaddress.ip_network(stored) == ipaddress.ip_network(ip)
    except ValueError:  # host bits
        return False


# ---------------------------------------------------------------- the executable method


def run(
    command: Sequence[str | bytes | Path],
    *,
    cwd: str | Path = "/",
    env: Mapping[str, str] | None = None,
    timeout: float = MANAGER_TIMEOUT,
    user: int | None = None,
) -> Answer:
    """Run COMMAND by the executable method; USER, where given, in place of the manager's root."""
    started = time.monotonic()
    identity: dict[str, Any] = {}
    if user is not None:
        identity = {"user": user, "group": user, "extra_groups": []}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=dict(env or {}),
        start_new_session=True,
        restore_signals=False,
        preexec_fn=_become_child_of_authd,  # noqa: PLW1509 - only C calls, no lock to wait for
        **identity,
    )
    try:
        output, _nothing = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return _terminate(process, started)
    seconds = time.monotonic() - started
    return Answer(output, process.returncode, seconds=seconds, pid=process.pid)


def _become_child_of_authd() -> None:
    """Set in the child what authd leaves there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.umask(MANAGER_UMASK)


def _terminate(process: subprocess.Popen[bytes], started: float) -> Answer:
    """Send SIGTERM after the time-out, and wait, as authd does."""
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    held = False
    try:
        output, _nothing = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        held = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _nothing = process.communicate()
    ended = time.monotonic()
    return Answer(
        output, process.returncode, True, held, ended - started, ended - sent, process.pid
    )


# ---------------------------------------------------------------- the socket method


def ask_socket(path: str | Path, request: str | bytes, timeout: float = MANAGER_TIMEOUT) -> Answer:
    """Send REQUEST (`id:001`) by the socket method: one send, one recv, close."""
    started = time.monotonic()
    piece = request.encode() if isinstance(request, str) else request
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))  # authd sets no time-out here
        connection.settimeout(timeout)
        connection.send(piece)
        try:
            output = connection.recv(RECV_SIZE)
        except TimeoutError:
            return Answer(b"", timed_out=True, seconds=time.monotonic() - started)
    return Answer(output, seconds=time.monotonic() - started)


# ---------------------------------------------------------------- what holds for every answer


def check_line(line: bytes) -> dict[str, Any]:
    """Assert what holds for every answer, by any method or in the process; give the JSON object."""
    assert line.endswith(b"\n") and line.count(b"\n") == 1, line
    assert len(line) <= REPLY_SIZE, len(line)
    assert all(32 <= byte < 127 for byte in line[:-1]), line
    reply: dict[str, Any] = json.loads(line)
    assert line.decode() == json.dumps(reply) + "\n", line
    assert type(reply["error"]) is int, line
    verdict = judge(read_json(line))
    if reply["error"] == 0:
        assert list(reply) == ["error", "data"], line
        assert list(reply["data"]) == list(FIELDS), line
        assert verdict == "added", (verdict, line)
    else:
        assert list(reply) == ["error", "message"], line
        assert len(reply["message"]) <= MESSAGE_SIZE, line
        assert verdict == "refused", (verdict, line)
    return reply


def check_answer(answer: Answer) -> Answer:
    """Assert what holds for every answer of a one-shot call, and give it back."""
    assert not answer.timed_out, answer
    assert answer.status in (0, None), answer
    check_line(answer.output)
    return answer
