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
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    9016: "Cannot communicate with master",
    9017: "Invalid agent name",
}
DRIP_SECONDS = 20.0  # an answer that comes byte by byte ends after this time, whatever happens


class Authd:
    """One manager's enrolment, at HOME/queue/sockets/auth.

    agents: those it has, by id, each a dict of the four FIELDS, addresses as it writes them;
    removed: those that <force> removed; messages: all that it was sent.
    host: its own name; room: how many agents it takes; force: whether <force> of its ossec.conf
    lets an agent replace older ones; fails: the error number of each function that fails; worker:
    whether it is a worker node of a cluster; late: whether it writes client.keys at its end only,
    and not when it adds an agent.
    manner: how it answers, once it has given `sound` answers: `well`; in `pieces`; in a `drip`,
    which never ends; `closed`: it closes without having done anything; `done`: it does what it was
    told, and closes; `cut`: it closes within the answer; `silent`; or the bytes to answer.
    stays: it does not close after them.
    """

    def __init__(self, home: Path, agents: Iterable[Sequence[str]] = (), **settings: Any) -> None:
        """Take the AGENTS that it has, and the SETTINGS named above."""
        self.path = home / "queue/sockets/auth"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.keys = home / "etc/client.keys"
        self.agents: dict[str, dict[str, str]] = {}
        self.by_name: dict[str, str] = {}  # ids
        self.by_address: dict[str, str] = {}  # ids; networks by their first address
        self.removed: list[dict[str, str]] = []
        self.messages: list[dict[str, Any]] = []
        self.host = "manager"
        self.room = 100_000
        self.force = True
        self.fails: Mapping[str, int] = {}
        self.worker = False
        self.late = False
        self.manner: str | bytes = "well"
        self.sound = 0
        self.stays = False
        for row in agents:
            assert not self.add(dict(zip(FIELDS, row, strict=True)))
        self.write_keys()
        vars(self).update(settings)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(128)
        self.peer: socket.socket | None = None
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def close(self) -> None:
        """End it in order; nobody listens then, and all is written."""
        for connection in self.listener, self.peer:
            with contextlib.suppress(OSError):  # it has gone
                if connection:
                    connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        self.path.unlink(missing_ok=True)
        self.write_keys()

    def sent(self, function: str) -> list[str]:
        """Give the ids of the agents for which FUNCTION was called."""
        return [m["arguments"]["id"] for m in self.messages if m["function"] == function]

    # ------------------------------------------------------------ what it does

    def write_keys(self) -> None:
        """Write client.keys: a removed agent stays with a `!` in front of its name."""
        rows = [{**agent, "name": "!" + agent["name"]} for agent in self.removed]
        rows += self.agents.values()
        self.keys.parent.mkdir(parents=True, exist_ok=True)
        self.keys.write_text("".join(" ".join(row.values()) + "\n" for row in rows))

    def get(self, agent: dict[str, Any]) -> int:
        """Give the error number for whether it has AGENT."""
        return 0 if agent["id"] in self.agents else 9011

    def add(self, agent: dict[str, Any]) -> int:
        """Enrol AGENT; give the error number, 0 for none."""
        ip = stored_ip(agent["ip"])
        if ip is None:
            return 9006
        if agent["name"] == self.host:
            return 9008
        if len(self.agents) >= self.room:
            return 9013
        force = agent["force"]["enabled"] if "force" in agent else self.force
        new = {**{field: agent[field] for field in FIELDS}, "ip": ip}
        for number, older in self.rivals(new, agent["ip"]):
            if not force:
                return number
            self.removed.append(self.agents.pop(older))
        self.agents[new["id"]] = new
        self.by_name[new["name"]] = new["id"]
        if ip != "any":
            self.by_address[ip.partition("/")[0]] = new["id"]
        if not self.late and self.keys.exists():
            with self.keys.open("a") as file:
                file.write(" ".join(new.values()) + "\n")
        return 0

    def rivals(self, new: dict[str, str], sent_ip: str) -> list[tuple[int, str]]:
        """Give the ids of the older agents that NEW is a duplicate of, each with the error number.

        A network is never a duplicate. A single address is one of another's address, even if that
        is the first of a network.
        """
        candidates = [(9012, new["id"]), (9008, self.by_name.get(new["name"], ""))]
        if "/" not in sent_ip:
            candidates.insert(1, (9007, self.by_address.get(new["ip"], "")))
        found: list[tuple[int, str]] = []
        for number, older in candidates:
            if older in self.agents and older not in [other for _number, other in found]:
                found.append((number, older))
        return found

    def do(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give the answer to MESSAGE."""
        self.messages.append(message)
        function, agent = message["function"], message["arguments"]
        if self.worker:
            number = 9015
        elif function in self.fails:
            number = self.fails[function]
        else:
            number = {"get": self.get, "add": self.add}[function](agent)
        if number:
            return {"error": number, "message": ERRORS[number]}
        data = dict(self.agents[agent["id"]])
        if function == "get":
            data["ip"] = data["ip"].partition("/")[0]
        return {"error": 0, "data": data}

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
        if isinstance(manner, bytes):
            peer.sendall(manner)
            while self.stays and peer.recv(1):
                pass  # until the other side closes
        elif manner == "silent":
            peer.recv(1)  # until the other side gives up
        elif manner == "drip":
            drip(peer)
        elif manner != "closed":
            content = json.dumps(self.do(message), separators=(",", ":")).encode()
            send_frame(peer, struct.pack("<I", len(content)) + content, manner)


def send_frame(peer: socket.socket, frame: bytes, manner: str) -> None:
    """Send an answer whole, in pieces, cut, or not at all."""
    if manner == "pieces":
        for byte in frame:
            peer.sendall(bytes([byte]))
    elif manner == "cut":
        peer.sendall(frame[:-5])
    elif manner == "well":
        peer.sendall(frame)


def drip(peer: socket.socket) -> None:
    """Begin an answer and send a blank now and then, until the other side gives up."""
    peer.sendall(struct.pack("<I", 60_000) + b"{")
    end = time.monotonic() + DRIP_SECONDS
    while time.monotonic() < end:
        peer.sendall(b" ")
        time.sleep(0.02)


@contextlib.contextmanager
def running(home: Path, agents: Iterable[Sequence[str]] = (), **settings: Any) -> Iterator[Authd]:
    """Run one for as long as the block lasts; see Authd."""
    authd = Authd(home, agents, **settings)
    try:
        yield authd
    finally:
        authd.close()
