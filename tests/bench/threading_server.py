"""The obvious server, for comparison: socketserver.ThreadingMixIn, one thread a connection.

    threading_server.py DATABASE SOCKET

Every request gets a new thread, and SQLite wants a connection for each thread. The answers are
those of agent_key_request.py for `id` requests, without its rules for records.
"""

import contextlib
import json
import socketserver
import sqlite3
import sys

FIND = {
    "id": "SELECT id, name, ip, agent_key FROM agent WHERE id = ? LIMIT 2",
    "ip": "SELECT id, name, ip, agent_key FROM agent WHERE ip = ? LIMIT 2",
}


def answer(database: str, request: str) -> dict[str, object]:
    """The reply to one request, `id:001` or `ip:10.0.0.1`."""
    option, _, value = request.partition(":")
    if option not in FIND or not value:
        return {"error": 3, "message": "Bad arguments given"}
    address = f"file:{database}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        rows = connection.execute(FIND[option], (value,)).fetchall()
    if not rows:
        return {"error": 4, "message": "No agent key found"}
    if len(rows) > 1:
        text = f"Found more than one match for required {option}"
        return {"error": 5, "message": text}
    return {"error": 0, "data": dict(zip(("id", "name", "ip", "key"), rows[0]))}


class Handler(socketserver.BaseRequestHandler):
    """One connection: one read, one answer."""

    def handle(self) -> None:
        request = self.request.recv(65536).decode("ascii", "replace")
        if request:
            reply = json.dumps(answer(sys.argv[1], request))
            self.request.sendall((reply + "\n").encode("ascii"))


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread a connection; the backlog is as large as the real server's."""

    daemon_threads = True
    request_queue_size = 4096


if __name__ == "__main__":
    with Server(sys.argv[2], Handler) as server:
        print("threading_server: ready", file=sys.stderr, flush=True)
        server.serve_forever()
