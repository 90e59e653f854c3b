"""A stand-in for `wazuh-authd` at its own socket: enrols without being asked.

What it says is in MANAGER.md ("Enrolling without being asked"); what it makes of an address,
in `manager.py`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from manager import FIELDS, stored_ip

ERRORS = {
    9001: "Internal error",
    9006: "No such IP",
    9007: "Duplicate IP",
    9008: "Duplicate name",
    9011: "Agent ID not found",
    9012: "Duplicate ID",
    9013: "Maximum number of agents reached",
    9015: "Cannot execute this request on a worker node",
}


class Authd:
    """One manager's enrolment, at HOME/queue/sockets/auth.

    agents: those it has, by id, each a dict of the four FIELDS, addresses as it writes them;
    messages: all that it was sent; host: its own name; room: how many agents it takes;
    worker: whether it is a worker node of a cluster; fails: functions that give error 9001.
    manner: how it answers, once it has given `sound` answers: `well`; in `pieces`; `closed`: it
    closes without having done anything; `done`: it does what it was told, and closes; `cut`: it
    closes within the answer; `silent`; or the bytes to answer. stays: it does not close after them.
    """

    def __init__(self, home: Path, agents: Iterable[Sequence[str]] = (), **settings: Any) -> None:
        """Take the AGENTS that it has, and the SETTINGS named above."""
        self.path = home / "queue/sockets/auth"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.agents: dict[str, dict[str, str]] = {}
        self.names: set[str] = set()
        self.addresses: set[str] = set()
        self.messages: list[dict[str, Any]] = []
        self.host, self.room, self.worker, self.fails = "manager", 100_000, False, ()
        self.manner: str | bytes = "well"
        self.sound, self.stays = 0, False
        for row in agents:
            assert not self.add(dict(zip(FIELDS, row)))
        vars(self).update(settings)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(128)
        self.peer: socket.socket | None = None
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def close(self) -> None:
        """End it; nobody listens then."""
        for connection in self.listener, self.peer:
            with contextlib.suppress(OSError):  # it has gone
                if connection:
                    connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        self.path.unlink(missing_ok=True)

    def sent(self, function: str) -> list[str]:
        """Give the ids of the agents for which FUNCTION was called."""
        return [m["arguments"]["id"] for m in self.messages if m["function"] == function]

    # ------------------------------------------------------------ what it does

    def get(self, agent: dict[str, str]) -> int:
        """Give the error number for whether it has AGENT."""
        return 0 if agent["id"] in self.agents else 9011

    def add(self, agent: dict[str, str]) -> int:
        """Enrol AGENT; give the error number, 0 for none."""
        ip = stored_ip(agent["ip"])
        if agent["id"] in self.agents:
            return 9012
        if ip is None:
            return 9006
        if ip in self.addresses:
            return 9007
        if agent["name"] == self.host or agent["name"] in self.names:
            return 9008
        if len(self.agents) >= self.room:
            return 9013
        self.agents[agent["id"]] = {**agent, "ip": ip}
        self.names.add(agent["name"])
        self.addresses |= {ip} - {"any"}
        return 0

    def do(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give the answer to MESSAGE."""
        self.messages.append(message)
        agent = message["arguments"]
        if self.worker:
            number = 9015
        elif message["function"] in self.fails:
            number = 9001
        else:
            number = {"get": self.get, "add": self.add}[message["function"]](agent)
        if number:
            return {"error": number, "message": ERRORS[number]}
        return {"error": 0, "data": self.agents[agent["id"]]}

    # ------------------------------------------------------------ how it says it

    def serve(self) -> None:
        """Answer one connection after the other, until the end."""
        while True:
            try:
                self.peer, _nobody = self.listener.accept()
            except OSError:
                return
            with self.peer, contextlib.suppress(OSError):
                self.converse(self.peer)

    def converse(self, peer: socket.socket) -> None:
        """Take one message, and answer it in the manner that is set."""
        with peer.makefile("rb") as stream:
            length = stream.read(4)
            if not length:
                return  # connected and closed
            message = json.loads(stream.read(struct.unpack("<I", length)[0]))
        manner = self.manner if self.sound <= 0 else "well"
        self.sound -= 1
        if manner == "silent":
            peer.recv(1)  # until the other side gives up
        if isinstance(manner, bytes):
            peer.sendall(manner)
            while self.stays and peer.recv(1):
                pass  # until the other side closes
        if manner in ("silent", "closed") or isinstance(manner, bytes):
            return
        content = json.dumps(self.do(message), separators=(",", ":")).encode()
        frame = struct.pack("<I", len(content)) + content
        if manner == "pieces":
            for byte in frame:
                peer.sendall(bytes([byte]))
        elif manner == "cut":
            peer.sendall(frame[:-5])
        elif manner == "well":
            peer.sendall(frame)


@contextlib.contextmanager
def running(home: Path, agents: Iterable[Sequence[str]] = (), **settings: Any) -> Iterator[Authd]:
    """Run one for as long as the block lasts; see Authd."""
    authd = Authd(home, agents, **settings)
    try:
        yield authd
    finally:
        authd.close()
