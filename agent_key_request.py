#!/bin/sh
''':'
for python in python3 /usr/libexec/platform-python /var/ossec/framework/python/bin/python3; do
    command -v "$python" >/dev/null 2>&1 && exec "$python" -IS "$0" "$@"
done
echo '{"error": 9, "message": "Internal error: no python3 on this host"}'
exit 0

/bin/sh reads the lines above and starts Python with -I and -S: nothing is then imported from this
folder, the working directory, PYTHON* variables or site-packages. Python reads them as text.

This program answers a Wazuh manager that asks for the key of an agent it does not know. The manager
runs `agent_key_request.py id 001` or `... ip 192.168.1.100`, or asks a running `--serve` on a unix
socket. One JSON object goes to standard output, nothing to standard error, and the exit status is 0
whatever happens, because the manager throws the output of any other status away (README.md).
'''
# Start-up is the cost of a one-shot request, so it gets the bare modules: in instructions, `os` is
# 5 M more than `posix`, `signal` 19 M more than `_signal`, `socket` 30 M more than `_socket`.
import posix
import sys

if __name__ == "__main__" and not (sys.flags.isolated and sys.flags.no_site):
    posix.execv(sys.executable, [sys.executable, "-IS"] + sys.argv)  # before anything planted

import time
from _signal import (  # type: ignore
    ITIMER_REAL, SIG_DFL, SIG_UNBLOCK, SIGALRM, SIGHUP, SIGINT, SIGTERM,
    pthread_sigmask, setitimer, signal)
from _socket import AF_INET, AF_INET6, inet_pton

# -------------------------------------------------------------------------------------- constants

VERSION = "1.0.0"
MESSAGES = {  # of an answer, by its error number; what ends with a space or colon takes a detail
    0: "key handed out: ", 1: "Too few arguments", 2: "Cannot read key source: ",
    3: "Bad arguments given", 4: "No agent key found", 5: "Found more than one match for required ",
    6: "Stored record is invalid: ", 9: "Internal error: "}
FOR_THE_OPERATOR = (0, 2, 5, 6, 9)  # the manager shows errors at debug level only

BINARY = (bytes, bytearray, memoryview)  # what a driver gives for a BLOB
ID, NAME, IP, KEY = range(4)  # the order in which every source gives a row
DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PRINTABLE = "".join(map(chr, range(32, 127)))
RULES = (  # field, least and most characters, which ones, and the same in words
    ("id", 3, 8, DIGITS, "must be 3 to 8 digits and not 000, the manager"),
    ("name", 1, 128, DIGITS + LETTERS + "-_.", "must be 1 to 128 of A-Z a-z 0-9 - _ ."),
    ("ip", 1, 64, PRINTABLE, "must be an address, a network (address/prefix) or any"),
    ("key", 1, 128, PRINTABLE, "must be 1 to 128 printable ASCII characters"))
MANAGER = ("id", "000")
MISSING = "\0"  # a field that its line does not have: breaks every rule

# What the index agent_network sorts by: the part from the slash; ":" for padding, IPv6 networks
# and IPv6 in other than its shortest lower-case spelling; null for what the index agent_ip finds.
NETWORK = """CASE WHEN ip LIKE ' %' OR ip LIKE '% ' OR ip LIKE '%:%/%' OR ip LIKE '%:0%'
    OR ip LIKE '0%:%' OR ip LIKE '%:%.%' OR ip LIKE '::f%' OR ip LIKE '%:%' AND ip <> lower(ip)
    THEN ':' WHEN ip LIKE '%/%' THEN substr(ip, instr(ip, '/')) END"""
ROWS = "SELECT id, name, ip, agent_key FROM agent"
# A text with or without padding, the same as a BLOB, a number; and all that is padded at the left.
ROWS_BY_ID = ROWS + """ WHERE id BETWEEN @id AND @id || @padding OR id = @number
    OR id BETWEEN CAST(@id AS BLOB) AND CAST(@id || @padding AS BLOB) OR id BETWEEN ' ' AND ' ~'"""
ROWS_BY_IP = ROWS + " WHERE ip = @address UNION ALL "
BLOBS = ROWS + " WHERE ip >= x'' UNION ALL "
ROWS_WITHOUT_INDEX = ROWS + """ WHERE ip <> @address AND ip BETWEEN '' AND 'g'
    AND (ip LIKE '%/%' OR ip LIKE '%:%' OR ip LIKE '% %')"""

# -------------------------------------------------------------------------------------- the reply


class Reply(Exception):
    """The answer to a request; raised by whoever finds out that it is an error.

    number: the error, 0 for none (MESSAGES); detail: str that ends the message, for people, never
    with a key in it; record: dict of str to hand out; locked: whether to try again in a moment.
    """

    def __init__(self, number, detail="", record=None, locked=False):
        super().__init__(number)
        self.number, self.record, self.locked = number, record, locked
        self.message = printable(MESSAGES[number] + detail)

    def line(self):
        """The bytes that go out, by either method."""
        content = {"data": self.record} if self.record else {"message": self.message}
        return to_json(dict(error=self.number, **content)).encode("ascii") + b"\n"


def printable(text):
    """`text` with a `?` for all that is not printable ASCII."""
    if not text.strip(PRINTABLE):
        return text
    return "".join([letter if " " <= letter <= "~" else "?" for letter in text])


def to_json(value):
    """`value` (dict, list, str, int) as JSON on one line: the only place that writes any."""
    if isinstance(value, str):
        return '"%s"' % printable(value).replace("\\", "\\\\").replace('"', '\\"')
    if isinstance(value, dict):
        return "{%s}" % ", ".join(['"%s": %s' % (name, to_json(value[name])) for name in value])
    if isinstance(value, list):
        return "[%s]" % ", ".join(map(to_json, value))
    return "%d" % value


# -------------------------------------------------------------------------------------- the record


def parse_network(text):
    """An address or network as (number, width, prefix): an integer, 32 or 128, 0 to width.

    A single address has prefix = width; IPv4 mapped into IPv6 is IPv4. ValueError if it is neither.
    """
    address, slash, length = text.partition("/")
    try:
        packed = inet_pton(AF_INET6 if ":" in address else AF_INET, address)
        if "." in length and len(packed) == 4:
            mask = "{:032b}".format(int.from_bytes(inet_pton(AF_INET, length), "big"))
            length = "" if "01" in mask else str(mask.count("1"))
    except OSError:
        raise ValueError("not an address") from None
    number, width = int.from_bytes(packed, "big"), 8 * len(packed)
    prefix = int(length[:4]) if slash and not length.strip(DIGITS) and length else width
    if prefix > width or (slash and length != str(prefix)):
        raise ValueError("not a prefix length")
    if number >> 32 == 0xFFFF and prefix >= 96:
        return number & 0xFFFFFFFF, 32, prefix - 96
    return number, width, prefix


def text_of(value):
    """A stored value (text, bytes, number, null) as str, without the padding of CHAR columns."""
    if isinstance(value, BINARY):
        value = bytes(value).decode("latin-1")  # what is beyond ASCII breaks every rule
    return "" if value is None else str(value).strip(" ")


def id_of(value, from_text):
    """The agent id in a stored value, as the manager writes it: with at least three digits if it
    is a number, or from a text file, where spreadsheets eat zeros."""
    if value is not None and not isinstance(value, (str,) + BINARY) and value % 1 == 0:
        return "%03d" % value
    text = text_of(value)
    return text.zfill(3) if from_text and text and not text.strip(DIGITS) else text


def ip_of(value):
    """The ip to hand out: as stored; `any` for none; with a prefix length for a netmask, which the
    manager would lose; empty if it is not valid."""
    text = text_of(value)
    if text.lower() in ("", "any"):
        return "any"
    try:
        prefix = parse_network(text)[2]
    except ValueError:
        return ""
    address, _, length = text.partition("/")
    return "%s/%d" % (address, prefix) if "." in length else text


def judge(row, from_text):
    """A stored row as (record, faults): the one place that decides what may reach the manager,
    which checks next to nothing. record: dict of str; faults: list of str, empty if all is well."""
    record = {"id": id_of(row[ID], from_text), "name": text_of(row[NAME]),
              "ip": ip_of(row[IP]), "key": text_of(row[KEY])}
    faults = []
    for field, least, most, letters, rule in RULES:
        value = record[field]
        if not least <= len(value) <= most or value.strip(letters) or (field, value) == MANAGER:
            faults.append("%s %s" % (field, rule))
    return record, faults


def agent_of(record):
    """`agent 001`; an id that is none is not shown: it may be a key in the wrong column."""
    named = 0 < len(record["id"]) <= 8 and not record["id"].strip(DIGITS)
    return "agent " + (record["id"] if named else "with an id of %d characters" % len(record["id"]))


# -------------------------------------------------------------------------------------- addresses


def spelled(number, width=32):
    """An address as the index agent_ip has it: IPv6 with all its zero groups in the `::`."""
    if width == 32:
        return ".".join([str(number >> shift & 255) for shift in (24, 16, 8, 0)])
    groups = ["%x" % (number >> shift & 0xFFFF) for shift in range(112, -1, -16)]
    zeros = groups.count("0")
    first = groups.index("0") if zeros else 8
    return ":".join(groups[:first]) + "::" * bool(zeros) + ":".join(groups[first + zeros:])


def rows_by_network(network, ip):
    """SQL for the networks that may hold an address, each part of it one range of an index on the
    expressions `network` and `ip`; without such an index, ROWS_WITHOUT_INDEX."""
    if not network:
        return ROWS_WITHOUT_INDEX
    part = " UNION ALL %s WHERE %s IN (%%s) AND %s BETWEEN @low%%d AND @high%%d" % (
        ROWS, network.replace("%", "%%"), ip)
    sql = part[11:] % ("':'", 0, 0) + " AND ip <> @address"
    for octets in range(4):  # that the network's text has in common with the address
        lengths = range(8 * octets or 1, 33 if octets == 3 else 8 * octets + 8)
        masks = ["'/%d', '/%s'" % (n, spelled((1 << 32) - (1 << 32 - n))) for n in lengths]
        sql += part % (", ".join(masks), octets, octets)
    return sql


def address_values(number, width):
    """The values of the parameters of ROWS_BY_IP and rows_by_network()."""
    values = {"address": spelled(number, width)}
    groups = values["address"].split(".") if width == 32 else []
    for octets in range(4):
        low = "".join([group + "." for group in groups[:octets]])
        values["low%d" % octets], values["high%d" % octets] = low, low + "g"
    return values


def closest(rows, number, width):
    """Those of `rows` that fit the address best: more than one if they are equally good.

    Neither `any` nor a prefix of 0 ever fits: they do not say where the agent is, and a stray
    packet from anywhere would enrol it again.
    """
    best, found = 1, []
    for row in rows:
        try:
            stored, stored_width, prefix = parse_network(text_of(row[IP]))
        except ValueError:
            continue
        if prefix >= best and stored_width == width and not (stored ^ number) >> (width - prefix):
            found = found + [row] if prefix == best else [row]
            best = prefix
    return found


# -------------------------------------------------------------------------------------- sources


class SqlSource:
    """The table or view `agent` of an SQLite connection; from_text: it was loaded from a text file;
    deadline: when a query is given up, in time.monotonic()."""

    live, frozen, unit = False, False, "row"

    def __init__(self, connection, deadline, from_text=False):
        self.connection, self.deadline, self.from_text = connection, deadline, from_text
        connection.text_factory = bytes  # text that is not UTF-8 must not stop a query
        connection.set_progress_handler(lambda: time.monotonic() > self.deadline, 100000)
        list(self.query(ROWS + " LIMIT 0"))
        self.networks = ""  # SQL that no request by id needs

    def query(self, sql, values=()):
        """Iterator of rows; raises Reply."""
        try:
            yield from self.connection.execute(sql, values)
        except Exception as error:
            reason = str(error).replace("interrupted", "no answer in time (--timeout)")
            raise Reply(2, reason, locked="locked" in reason) from None

    def close(self):
        """Let go of the connection."""
        if self.connection:
            self.connection.close()

    def rows(self):
        """Iterator of (row number, row)."""
        return enumerate(self.query(ROWS), 1)

    def find(self, option, value):
        """The rows that may answer a request."""
        if option == "id":
            values = {"id": value, "number": int(value), "padding": " " * 128}
            return list(self.query(ROWS_BY_ID, values))
        if not self.networks:
            indexed = list(self.query("PRAGMA index_info(agent_network)"))
            self.networks = rows_by_network(NETWORK if indexed else "", "ip")
        return list(self.query(ROWS_BY_IP + BLOBS + self.networks, address_values(*value)))


def check_file(path):
    """The status of a file that may serve as a key source; raises Reply if it may not."""
    try:
        status = posix.stat(path)
        if not posix.access(path, posix.R_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise Reply(2, "%s: %s" % (path, error.strerror)) from None
    if status.st_mode & 0o170000 != 0o100000:
        raise Reply(2, "%s: not a regular file" % path)
    if status.st_mode & 0o002:
        raise Reply(2, "%s is writable by everybody: chmod o-w it" % path)
    return status


def is_sqlite(name, mode=b""):
    """Whether the file is an SQLite database, and in that mode (b"\\2": WAL)."""
    with open(name, "rb", 0) as file:
        head = file.read(19)
    return head[:16] == b"SQLite format 3\0" and head[18:].startswith(mode)


def is_url(name):
    """Whether a source is a database on a server, not a file."""
    return "://" in name and name[0] not in "/." or name.startswith(("mysql:", "postgresql:"))


def open_source(name, seconds):
    """The source that `--db` names, for queries of up to `seconds`; raises Reply."""
    if is_url(name):
        return later("Database")(name, seconds)
    check_file(name)
    if not is_sqlite(name):
        return open_text(open(name, "rb"), name, seconds)
    import _sqlite3  # `sqlite3` is 5 M instructions more, for names that nothing here needs
    path = ("./" * (name[0] != "/") + name).encode(sys.getfilesystemencoding(), "surrogateescape")
    uri = "file:%s?mode=ro" % "".join(["%%%02X" % byte for byte in path])
    # A WAL database wants files beside it, though it only reads; not if nobody is at work on it.
    idle = is_sqlite(name, b"\2") and not posix.access(path + b"-wal", posix.F_OK)
    frozen = idle and not posix.access(path.rpartition(b"/")[0] + b"/", posix.W_OK)
    connection = _sqlite3.connect(uri + "&immutable=1" * frozen, uri=True, timeout=seconds,
                                  isolation_level=None)
    source = SqlSource(connection, time.monotonic() + seconds)
    source.live, source.frozen = True, frozen
    return source


class TextSource:
    """Agents in a text file. parse: gives the (line number, row) of the lines, to be read once."""

    from_text, live, frozen, unit = True, False, False, "line"

    def __init__(self, lines, parse):
        self.lines, self.parse = lines, parse

    def rows(self):
        """Iterator of (line number, row)."""
        return self.parse(self.lines)

    def find(self, option, value):
        """The rows that may answer a request."""
        if option == "id":
            return [row for _, row in self.rows() if row[ID].strip(" ").zfill(3) == value]
        address = spelled(*value)
        return [row for _, row in self.rows()
                if "/" in row[IP] or ":" in row[IP] or row[IP].strip(" ") == address]


class ClientKeys(TextSource):
    """The agents in a manager's client.keys."""

    def find(self, option, value):
        """The rows that may answer a request; most lines are not even taken apart."""
        if option == "id":
            heads = (value, value.lstrip("0").zfill(2), value.lstrip("0").zfill(1))
            self.lines = [line for line in self.lines if line.startswith(heads)]
        else:
            address = " %s " % spelled(*value)
            self.lines = [line for line in self.lines
                          if address in line or "/" in line or ":" in line]
        return super().find(option, value)


def client_keys(lines):
    """The numbered rows of a manager's client.keys, without its comments and removed agents."""
    for number, line in enumerate(lines, 1):
        row = line.rstrip("\r\n").split(" ", 3)
        if row[ID] and line[0] != "#" and (len(row) < 2 or row[NAME][:1] not in ("!", "#")):
            yield number, row if len(row) == 4 else row[:2] + [MISSING] * 3


def delimited(lines, header, delimiter, columns):
    """The numbered rows of CSV, or of what `mysql --batch` writes, after `header` lines."""
    import csv
    from operator import itemgetter
    tabs, pick, width = delimiter == "\t", itemgetter(*columns), max(columns) + 1
    csv.field_size_limit(sys.maxsize)  # somebody else's long field must not end the reading
    if sys.version_info < (3, 11):  # where csv stops at a NUL; DEL breaks every rule as well
        lines = (line.replace("\0", "\x7f") for line in lines)
    reader, end = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if tabs else 0), 0
    try:
        for fields in reader:
            start, end = end + 1, reader.line_num
            if fields and start > header:
                row = pick(fields if len(fields) >= width else fields + [MISSING] * width)
                yield start, tuple(map(unescaped, row)) if tabs else row
    except csv.Error as error:
        raise Reply(2, "line %d: %s" % (reader.line_num, error)) from None


def unescaped(field):
    """A tab-separated field without a spreadsheet's quotes or the escapes of `mysql --batch`."""
    if field[:1] == '"' == field[-1:] and len(field) > 1:
        field = field[1:-1].replace('""', '"')
    parts = field.split("\\\\") if field not in ("NULL", "\\N") else []
    for place, part in enumerate(parts):
        parts[place] = part.replace("\\t", "\t").replace("\\n", "\n").replace("\\0", "\0")
    return "\\".join(parts)


def open_text(stream, name, seconds):
    """The source in a text file, told by its first line that is neither blank nor a comment."""
    from io import TextIOWrapper
    from itertools import chain
    head = [stream.readline(9999).decode("latin-1")]
    head[0] = head[0].replace("\xef\xbb\xbf", "", 1)  # a byte order mark
    while head[-1] and head[-1][0] in "# \r\n":
        head.append(stream.readline(9999).decode("latin-1"))
    first = head[-1].strip("\r\n")
    delimiter = max(",;\t", key=first.count)
    columns = [column.strip(' "').lower() for column in first.split(delimiter)]
    word = first.split(" ")[0]
    is_csv = "id" in columns and len(columns) > 1
    lines = chain(head, TextIOWrapper(stream, encoding="latin-1", newline="" if is_csv else "\n"))
    if name == "-":
        lines = later("whole")(lines)
    if is_csv:
        key = "key" if "key" in columns else "agent_key"
        if not {"name", "ip", key} < set(columns):
            raise Reply(2, "%s: its header lacks one of id, name, ip and key (or agent_key)" % name)
        places = [columns.index(field) for field in ("id", "name", "ip", key)]
        return TextSource(lines, lambda lines: delimited(lines, len(head), delimiter, places))
    like_keys = first.count(" ") > 2 or name.endswith(".keys")
    if like_keys and not word.strip(DIGITS) or not first and "".join(head).strip():
        return ClientKeys(lines, client_keys)
    if name.endswith(".sql") or word.upper() in ("CREATE", "INSERT", "BEGIN", "DROP", "--"):
        return open_script("".join(lines), name, seconds)
    raise Reply(2, "%s is %s" % (name, "no SQLite database, CSV with a header (id, name, ip, key), "
                                 "client.keys or SQL script" if first else "empty"))


def open_script(script, name, seconds):
    """The source in an SQL script, loaded into memory."""
    import _sqlite3
    connection = _sqlite3.connect(":memory:", isolation_level=None)
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 100000)
    connection.set_authorizer(lambda action, *_: action == _sqlite3.SQLITE_ATTACH)  # 1 refuses it
    try:
        connection.executescript(script)
    except Exception as error:
        raise Reply(2, "%s: %s" % (name, error)) from None
    return SqlSource(connection, deadline)


# -------------------------------------------------------------------------------------- the answer


def parse_request(words):
    """A request as (option, value): a str for `id`, (number, width) for `ip`; raises Reply."""
    option, value = (list(words) + ["", ""])[:2]
    if not option or option in ("id", "ip") and not value:
        raise Reply(1)
    if option not in ("id", "ip"):
        raise Reply(3)
    if len(words) > 2:
        raise Reply(3, ": more than an option and its value")
    if option == "id":
        if not 3 <= len(value) <= 8 or value.strip(DIGITS):
            raise Reply(3, ": an id has 3 to 8 digits")
        return option, value
    try:
        return option, parse_network("" if "/" in value else value)[:2]
    except ValueError:
        raise Reply(3, ": not an IP address") from None


def look_up(words, find_source):
    """The Reply with the record asked for; raises the Reply for an error."""
    option, value = parse_request(words)
    source = find_source()
    rows = source.find(option, value)
    if option == "id":
        rows = [row for row in rows if id_of(row[ID], source.from_text) == value]
    else:
        rows = closest(rows, *value)
    if len(rows) != 1:
        raise Reply(5, option) if rows else Reply(4)
    record, faults = judge(rows[0], source.from_text)
    if faults:
        raise Reply(6, "%s: %s" % (agent_of(record), faults[0]))
    return Reply(0, agent_of(record), record)


def answer(words, find_source):
    """The Reply to a request, by either method; never raises for what it asks or finds.

    words: list of str (`["id", "001"]`), as anyone may have sent them; find_source: called for the
    source, once the request is sound.
    """
    try:
        return look_up(words, find_source)
    except Reply as reply:
        return reply
    except OSError as error:
        return Reply(2, error.strerror or "input or output error")
    except Exception as error:
        return unforeseen(error)


def unforeseen(error):
    """The Reply for an exception that nobody has foreseen; its own text could hold a key."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return Reply(9, "%s in line %d of the script" % (type(error).__name__, trace.tb_lineno))


# ------------------------------------------------------------------------------------- the server

# All that no one-shot request needs: a text until it is needed, because each of them would else
# compile it, and cost twice as much. `make lint` and the tests read it as the code it is.
LATER_ROOM = sys._getframe().f_lineno, r'''
import fcntl
import grp
import itertools
import json
import os
import re
import resource
import select
import signal as signals
import site
import socket
import socketserver
import _sqlite3
from _signal import SIG_BLOCK, SIGCHLD
from importlib import import_module
from urllib.parse import parse_qsl, unquote

SOCKET = "/var/ossec/queue/sockets/agent_key_request"
TABLE = """CREATE TABLE agent (id VARCHAR(8) NOT NULL, name VARCHAR(128) NOT NULL,
    ip VARCHAR(64), agent_key VARCHAR(128) NOT NULL);"""
ON_NETWORK = " ".join(NETWORK.split())
INDEXES = {
    "agent_id": "CREATE INDEX agent_id ON agent (id);",
    "agent_ip": "CREATE INDEX agent_ip ON agent (ip);",
    "agent_network": "CREATE INDEX agent_network ON agent (%s, ip) WHERE %s IS NOT NULL;" % (
        ON_NETWORK, ON_NETWORK)}
NOBODY = "00000000"       # an id that no agent has
REQUEST_LIMIT = 128       # bytes; the manager's longest is `ip:` and 39
DRAIN = 1.5               # seconds that who has connected is still waited for when the server stops
LOOK = 0.2                # seconds between looks at the source's file
SETTLED = 1.0             # seconds a text file must have stood unchanged
SUMMARY = 60.0            # seconds over which repeats in the log are summed up
SUMMARY_LINES = 100000    # different lines in that time; a flood must not fill the memory


class Client:
    """A connection; deadline: in time.monotonic(); asked: whether its request is complete."""

    def __init__(self, connection, deadline):
        self.connection, self.deadline = connection, deadline
        self.received, self.asked, self.watched = b"", False, False


class PatientServer(socketserver.UnixStreamServer):
    """Many connections in one loop, and none waits for another: who has said something when he is
    accepted is answered at once, and an epoll waits for the others."""

    request_queue_size = 65535  # the kernel cuts it to net.core.somaxconn; connect never times out

    def take_over(self, lifeline, source, seconds, log):
        """Prepare for serve_forever in a worker; lifeline: a pipe that ends with the parent."""
        self.lifeline, self.source, self.seconds, self.log = lifeline, source, seconds, log
        self.clients, self.ending, self.epoll = {}, None, select.epoll()
        self.next_round, self.most = 0.0, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 40
        self.socket.setblocking(False)
        self.epoll.register(self.fileno(), 1)
        self.epoll.register(lifeline, 1)

    def serve_forever(self, poll_interval=0.5):
        """As socketserver's, until the lifeline ends and everybody is answered."""
        while not self.ending or time.monotonic() < self.ending and (
                self.clients or self.epoll.poll(0, 1)):
            at_work = self.clients or self.log.waiting or self.ending
            for number, event in self.epoll.poll(0.02 if at_work else poll_interval, 100):
                if number == self.fileno():
                    self.welcome()
                elif number == self.lifeline:
                    self.ending = time.monotonic() + DRAIN
                    self.epoll.unregister(number)
                    if event & 1:  # others go on with this socket: leave them the queue
                        self.epoll.unregister(self.fileno())
                elif number in self.clients:
                    self.process_request(self.clients[number], number)
            self.service_actions()

    def welcome(self):
        """Take new connections, but not so many that the others wait."""
        for _ in range(100):
            try:
                connection = self.socket.accept()[0]
            except OSError:  # nobody there
                return
            if len(self.clients) >= self.most:  # who has been silent for longest gives way
                self.drop(next(iter(self.clients.values())))
            client = Client(connection, time.monotonic() + self.seconds)
            self.clients[connection.fileno()] = client
            self.process_request(client, connection.fileno())

    def process_request(self, client, number):
        """Read what there is, without waiting; the first piece with a `:` is the request."""
        try:
            piece = client.connection.recv(REQUEST_LIMIT + 1, 0x40)  # MSG_DONTWAIT
        except BlockingIOError:
            piece = None
        except OSError:
            piece = client.received = b""
        client.received += piece or b""
        whole = b":" in client.received or len(client.received) > REQUEST_LIMIT
        client.asked = whole or piece == b""
        if client.asked:
            self.respond(client)
        elif not client.watched:
            self.epoll.register(number, 1)
            client.watched = True

    def respond(self, client):
        """Answer and close; a locked source is asked again until the client's deadline."""
        words = client.received.rstrip(b"\r\n\0").decode("latin-1").split(":", 1)
        if client.received:
            reply = Reply(3, ": more than %d bytes" % REQUEST_LIMIT)
            if len(client.received) <= REQUEST_LIMIT:
                reply = answer(words + [""] * (2 - len(words)), self.source.find)
            if reply.locked and time.monotonic() < client.deadline and not self.ending:
                if client.watched:
                    self.epoll.unregister(client.connection.fileno())
                    client.watched = False
                return
            try:
                client.connection.sendall(reply.line())
            except OSError:
                pass  # it has gone
            self.log.request(words, reply)
        self.drop(client)

    def drop(self, client):
        """Close a connection."""
        del self.clients[client.connection.fileno()]
        client.connection.close()

    def service_actions(self):
        """What is due between requests: the locked, the silent, and the log."""
        now = time.monotonic()
        if now > self.next_round:
            self.next_round = now + 0.02
            for number, client in list(self.clients.items()):
                if client.asked:
                    self.respond(client)
                elif now > client.deadline:
                    self.process_request(client, number)  # a slow database may have held it up
                    if not client.asked:
                        self.drop(client)
            self.log.flush()


class ServedSource:
    """The source as a worker sees it. loaded: a text source that the parent has read; the message
    that says why it could not; or None for a database, which each worker opens for itself."""

    def __init__(self, name, seconds, loaded):
        self.name, self.seconds, self.failure = name, seconds, None
        if isinstance(loaded, str):
            self.failure, loaded = loaded, None
        self.source = loaded

    def find(self):
        """The source now; raises Reply if there is none."""
        if self.failure:
            raise Reply(2, self.failure)
        if self.source and self.source.frozen:
            self.source = self.source.close()
        if self.source is None:
            self.source = open_source(self.name, 0)
        self.source.deadline = time.monotonic() + self.seconds
        return self.source


def load(name, seconds):
    """For the parent: a text source in memory, with indexes, or None for a database."""
    source = open_source(name, seconds)
    if source.live:
        return source.close()
    if isinstance(source, SqlSource):
        return source
    connection = _sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript("BEGIN;" + TABLE + "".join(INDEXES.values()))
    rows = ((id_of(row[ID], True),) + tuple(row[1:4]) for _, row in source.rows())
    connection.executemany("INSERT INTO agent VALUES (?, ?, ?, ?)", rows)
    return SqlSource(connection, time.monotonic() + seconds, from_text=True)


def unreadable(name, problem):
    """The message for an exception that keeps a source from being read."""
    reason = getattr(problem, "strerror", None) or problem
    return getattr(problem, "message", "%s%s: %s" % (MESSAGES[2], shown(name), reason))


class Log:
    """Lines on stderr, of one process; without -v, repeats are summed up once a minute."""

    def __init__(self, verbose):
        self.verbose, self.repeats, self.waiting = verbose, {}, []
        self.since = time.monotonic()

    def request(self, words, reply):
        """Note a request, if it is for the operator to know."""
        if reply.number in FOR_THE_OPERATOR or self.verbose:
            level = "error" if reply.number in FOR_THE_OPERATOR[1:] else "info"
            whose = "" if reply.number == 2 and not self.verbose else ":".join(words) + ": "
            self.count("%s: %s%s" % (level if reply.number != 4 else "debug", whose, reply.message))

    def count(self, line):
        """Write a line at the next flush, unless it is a repeat."""
        repeats = self.repeats.get(line, -1) + 1
        self.repeats[line] = repeats
        if not repeats or self.verbose:
            self.waiting.append(line)

    def flush(self, last=False):
        """Write; what nobody takes is dropped, because a full pipe must not stop the server."""
        seconds = time.monotonic() - self.since
        if last or seconds > SUMMARY or len(self.repeats) > SUMMARY_LINES:
            if not self.verbose:
                self.waiting += ["%s (%d times more in %.0f s)" % (line, repeats, seconds)
                                 for line, repeats in self.repeats.items() if repeats]
            self.since, self.repeats = time.monotonic(), {}
        if not self.waiting:
            return
        writable = select.poll()
        writable.register(2, select.POLLOUT)
        lines, self.waiting = self.waiting, []
        text = "".join(["agent_key_request: %s\n" % printable(line[:2000]) for line in lines])
        while text and writable.poll(0):
            end = text.rfind("\n", 0, 4096) + 1  # what a pipe takes in one piece
            try:
                posix.write(2, text[:end].encode("ascii"))
            except OSError:  # who read the log has gone
                return
            text = text[end:]


class Supervisor:
    """The parent: starts and replaces workers, watches the source.

    The workers of one generation share a pipe, `lifeline`, that ends when the parent ends; a byte
    in it retires them, when others with a newly read source have taken their place.
    """

    def __init__(self, server, name, options):
        self.server, self.name, self.log = server, name, Log("-v" in options)
        self.seconds = number_of(options, "--timeout", 5)
        self.count = int(number_of(options, "--workers", os.cpu_count() or 1)) or 1
        self.workers, self.generation, self.lifeline = {}, 0, None

    def stamp(self):
        """What differs when the source's file does: a str if it may not be read."""
        try:
            status = None if is_url(self.name) else check_file(self.name)
        except Reply as reply:
            return reply.message
        return status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def renew(self):
        """Read the source, and let a new generation of workers take over."""
        self.read = self.seen = self.stamp()
        self.changed = time.monotonic()
        try:
            self.loaded = load(self.name, self.seconds)
            self.log.waiting.append("info: source " + shown(self.name))
        except (Reply, OSError) as problem:  # OSError: it went away while it was being read
            message = unreadable(self.name, problem)
            locked = getattr(problem, "locked", False)
            self.loaded = None if locked else message[len(MESSAGES[2]):]
            self.log.count("error: " + message)
        self.end_generation(b"r")
        self.generation += 1
        self.lifeline = posix.pipe()
        for _ in range(self.count):
            self.start_worker()

    def end_generation(self, word=b""):
        """Have the workers end: with a word, they leave new connections to others."""
        if self.lifeline:
            posix.write(self.lifeline[1], word)
            posix.close(self.lifeline[0])
            posix.close(self.lifeline[1])

    def start_worker(self):
        """Fork one more worker of the present generation."""
        process = posix.fork()
        if process:
            self.workers[process] = self.generation
            return
        try:
            posix.close(self.lifeline[1])
            if self.server.identity:
                posix.close(self.server.lock)  # it is the parent's, and free when the parent ends
            source, log = ServedSource(self.name, self.seconds, self.loaded), Log(self.log.verbose)
            log.repeats["error: %s%s" % (MESSAGES[2], source.failure)] = 0  # told by the parent
            answer(["id", NOBODY], source.find)  # opens it
            self.server.take_over(self.lifeline[0], source, self.seconds, log)
            self.server.serve_forever()
            log.flush(last=True)
            posix._exit(0)
        finally:
            posix._exit(1)

    def collect(self):
        """See which workers have ended; while it serves, others take their places."""
        try:
            process, status = posix.waitpid(-1, posix.WNOHANG)
            while process:
                if self.workers.pop(process, 0) == self.generation and self.server:
                    self.log.waiting.append("error: worker %d died (status %d), another takes its "
                                            "place" % (process, status))
                    time.sleep(0.05)  # or workers that die at once would take all the processors
                    self.start_worker()
                process, status = posix.waitpid(-1, posix.WNOHANG)
        except ChildProcessError:
            pass

    def attend(self):
        """One round: dead workers, and a source that is gone, replaced, or changed and settled."""
        self.collect()
        stamp, now = self.stamp(), time.monotonic()
        if stamp != self.seen:
            self.seen, self.changed = stamp, now
        due = stamp != self.read
        if due and isinstance(stamp, tuple):
            if self.loaded is None and isinstance(self.read, tuple):
                due = stamp[:2] != self.read[:2]  # a database tells its readers of changes
            else:
                due = now > self.changed + SETTLED
        if due:
            self.renew()
        self.log.flush()

    def run(self):
        """Serve until SIGTERM or SIGINT."""
        self.renew()
        self.log.waiting.append("info: ready: %d workers on %s, source %s" % (
            self.count, self.server.server_address, shown(self.name)))
        self.log.flush()
        notify(b"READY=1")
        while True:
            caught = signals.sigtimedwait({SIGTERM, SIGINT, SIGHUP, SIGCHLD}, LOOK)
            if caught and caught.si_signo == SIGHUP:
                self.renew()
            elif caught and caught.si_signo != SIGCHLD:
                return
            self.attend()

    def stop(self):
        """Answer everybody who has connected, and end the workers within two seconds."""
        self.log.waiting.append("info: stopping")
        notify(b"STOPPING=1")
        server, self.server, end = self.server, None, time.monotonic() + DRAIN + 0.3
        self.end_generation(b"" if server.identity else b"r")  # systemd keeps its socket and queue
        while self.workers and time.monotonic() < end:
            self.collect()
            time.sleep(0.01)
        for process in self.workers:
            posix.kill(process, 9)
        self.log.waiting.append("info: stopped")
        self.log.flush(last=True)
def notify(state):
    """Tell systemd, if it is there ($NOTIFY_SOCKET, a path or an abstract name)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            try:
                messenger.sendto(state, address.replace("@", "\0", 1))
            except OSError:
                pass


def claim(path):
    """Lock a socket's path and clear a stale socket away; raises OSError if somebody is there."""
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        raise OSError("a server is already running there") from None
    if os.path.lexists(path):
        if os.lstat(path).st_mode & 0o170000 != 0o140000:
            raise OSError("a file that is no socket is already there; choose another --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) != 111:  # ECONNREFUSED: nobody listens any more
                raise OSError("another program is already listening there")
        os.unlink(path)
    return lock


def listen(path, mode, group):
    """A listening socketserver: on the socket that systemd passes, or a new one with that mode
    and group; raises Reply."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        server = PatientServer(path, None, bind_and_activate=False)
        server.socket.close()
        server.socket = socket.socket(socket.AF_UNIX, fileno=3)
        server.server_address, server.identity = server.socket.getsockname(), None
        return server
    try:
        lock, mask, own = claim(path), os.umask(0o777 & ~int(mode, 8)), os.getegid()
        try:
            os.setegid(grp.getgrnam(group).gr_gid if group else own)
            server = PatientServer(path, None)  # born with its mode and group: no chmod, no race
        finally:
            os.setegid(own)
            os.umask(mask)
        server.lock, server.identity = lock, os.stat(path).st_ino
        return server
    except (OSError, KeyError, ValueError) as error:
        raise Trouble("cannot listen on %s: %s" % (
            path, getattr(error, "strerror", None) or error)) from None


def serve(options, name):
    """Run the server to its end; raises Reply or Trouble if it cannot start."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # silent clients hold a file each
    pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT, SIGHUP, SIGCHLD))  # the supervisor asks for them
    load(name, number_of(options, "--timeout", 5))
    server = listen(options.get("--socket", SOCKET), options.get("--mode", "0600"),
                    options.get("--group"))
    supervisor = Supervisor(server, name, options)
    supervisor.run()
    path = server.server_address
    if server.identity and os.path.exists(path) and os.stat(path).st_ino == server.identity:
        os.unlink(path)
    supervisor.stop()


def ask_server(path, words, seconds):
    """Ask a running server as the manager would: its answer, in bytes; raises Reply."""
    parse_request(words)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(path)
            connection.send(":".join(words).encode("ascii"))
            line = connection.recv(65536)
    except OSError as error:
        raise Reply(2, "no server answers at %s: %s" % (path, error.strerror or error)) from None
    if not line:
        raise Reply(2, "the server at %s closed without an answer" % path)
    return line


# ---------------------------------------------------------------------------- databases on servers

DIALECTS = {  # `indexes`: SQL for the name and the leading column of each index of the table
    "mysql": {
        "drivers": ("pymysql", "MySQLdb", "mysql.connector"),
        "read only": "SET SESSION TRANSACTION READ ONLY",
        "indexes": """SELECT index_name, column_name FROM information_schema.statistics
            WHERE table_schema = database() AND table_name = 'agent' AND seq_in_index = 1""",
        "views": "information_schema.views WHERE table_schema = database() "
                 "AND table_name = 'agent'",
        "network": "network", "ip": "ip",
        "index": "ALTER TABLE agent ADD COLUMN network VARCHAR(64) AS (%s) VIRTUAL, ADD INDEX "
                 "agent_network (network, ip);" % ON_NETWORK},  # MariaDB has none on an expression
    "postgresql": {
        "drivers": ("psycopg", "psycopg2"),
        "read only": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "indexes": """SELECT class.relname, attname FROM pg_index JOIN pg_class class
            ON class.oid = indexrelid LEFT JOIN pg_attribute ON attrelid = indrelid
            AND attnum = indkey[0] WHERE indrelid = 'agent'::regclass""",
        "views": "pg_class WHERE oid = 'agent'::regclass AND relkind = 'v'",
        "network": ON_NETWORK.replace("instr", "strpos"), "ip": 'ip COLLATE "C"',
        "index": 'CREATE INDEX agent_network ON agent ((%s), (ip COLLATE "C"));' % (
            ON_NETWORK.replace("instr", "strpos"))}}
PAUSE = 5.0               # seconds until a database that has not answered in time is asked again
URL = re.compile(  # what is special in a user, a password or a database is percent-encoded
    r"(\w+)://(?:([^:@/?#]*)(?::([^:@/?#]*))?@)?(\[[^]@/?#]*\]|[^:@/?#]*)(?::([0-9]{1,5}))?"
    r"(?:/([^@/?#]*))?(?:\?((?:\w+=[^@#&;]*&?)*))?\Z")


def shown(name):
    """A source for people to see: of a URL, neither a password nor what else the driver gets."""
    match = URL.match(name)
    if not is_url(name) or not match:
        return name.partition(":")[0] + ":" if is_url(name) else name
    scheme, user, _, host, _, database, _ = match.groups("")
    return "%s://%s%s/%s" % (scheme, user and user + "@", host, database)


def secrets_of(name):
    """The passwords in a URL, as they are written there and decoded."""
    match = URL.match(name)
    pairs = [pair.partition("=") for pair in (match.group(7) or "").split("&")] if match else []
    written = [value for field, _, value in pairs if field in ("password", "passwd", "sslpassword")]
    written += [match.group(3)] if match and match.group(3) else []
    return written + [unquote(value) for value in written]


class Database(SqlSource):
    """The table or view `agent` of a MySQL, MariaDB or PostgreSQL server that a URL names.

    It connects when it is first asked, and anew when the connection has broken. When there was no
    answer in time, it does not ask again for a while: others wait in the queue.
    """

    from_text, live = False, True

    def __init__(self, url, seconds):
        self.url, self.secrets, self.mysql = url, secrets_of(url), url.startswith("mysql:")
        self.dialect = DIALECTS.get(url.partition("://")[0])
        self.deadline, self.pause, self.connection = time.monotonic() + seconds, 0.0, None
        if self.secrets and any(word.endswith(url) for word in sys.argv):
            os.environ["AGENT_KEY_URL"] = url  # which `ps` does not show to others
            words = [word.replace(url, "://") for word in sys.argv]
            os.execv(sys.executable, [sys.executable, "-IS"] + words)
        self.driver = self.find_driver()
        signal(SIGALRM, give_up)

    def find_driver(self):
        """The DB-API module, from the system's packages and nowhere else; raises Reply."""
        if not self.dialect or not URL.match(self.url):
            raise Reply(2, shown(self.url) + " is none of mysql://user@host/database and "
                        "postgresql://user@host/database, with special characters percent-encoded")
        sys.path += [path for path in site.getsitepackages() if path not in sys.path]
        for name in self.dialect["drivers"]:
            try:
                driver = import_module(name)
            except ImportError:
                continue
            if name == "psycopg2":  # an alarm would not get through to it
                driver.extensions.set_wait_callback(import_module("psycopg2.extras").wait_select)
            return driver
        raise Reply(2, "no driver is installed for %s: %s would do, from the system's packages; or "
                    "copy the keys with --import" % (
                        shown(self.url), " or ".join(self.dialect["drivers"])))

    def options(self):
        """What the driver's connect() takes: the parts of the URL, and its parameters as given."""
        _, user, password, host, port, name, query = URL.match(self.url).groups("")
        options = {
            "host": unquote(host.strip("[]")), "port": port and int(port), "user": unquote(user),
            "password": unquote(password), "autocommit": self.mysql,
            "database" if self.mysql else "dbname": unquote(name),
            "connect_timeout": int(max(0, self.deadline - time.monotonic())) + 1}
        if self.driver.__name__ == "mysql.connector":
            options["use_pure"] = True  # an alarm would not get through to its C
        elif self.mysql:
            options["read_timeout"] = options["write_timeout"] = options["connect_timeout"]
        options.update(parse_qsl(query.replace("+", "%2B")))
        return {name: value for name, value in options.items() if value}

    def connect(self):
        """Open a connection that only reads, and in which each query is a transaction."""
        self.connection = self.driver.connect(**self.options())
        if not self.mysql:
            self.connection.autocommit = True
        cursor = self.connection.cursor()
        cursor.execute(self.dialect["read only"])
        cursor.execute(self.dialect["indexes"])
        self.indexes = {text_of(word) for row in cursor.fetchall() for word in row}
        network = self.dialect["network"] if "agent_network" in self.indexes else ""
        self.networks = rows_by_network(network, self.dialect["ip"])

    def execute(self, sql, values):
        """A cursor with the rows; a kept connection may have broken, so there is a second try."""
        kept, started = self.connection is not None, time.monotonic()
        try:
            if not kept:
                self.connect()
            kinds = sql == ROWS and getattr(self.driver, "cursors", None)
            cursor = self.connection.cursor(*[kinds.SSCursor] if kinds else [])  # not all at once
            text = sql.replace("@networks", self.networks)
            if values:
                text = re.sub(r"@(\w+)", r"%(\1)s", text.replace("%", "%%"))
            cursor.execute(text, values or None)
            return cursor
        except Exception:
            self.connection = None
            if kept and time.monotonic() < started + 1:
                return self.execute(sql, values)
            raise

    def query(self, sql, values=()):
        """Iterator of rows; raises Reply. An alarm ends what a driver's own time-out does not."""
        started = time.monotonic()
        if started < self.pause:
            raise Reply(2, "the database has not answered in time, and is asked again soon")
        setitimer(ITIMER_REAL, max(0.01, self.deadline - started))
        try:
            cursor = self.execute(sql, values)
            if sql == ROWS:
                setitimer(ITIMER_REAL, 0)
            yield from cursor
        except Exception as error:
            self.connection, now = None, time.monotonic()
            reason = " ".join(str(error).split())
            if now > self.deadline - 0.1:
                reason = "no answer in time (--timeout)"
            if now > started + 1:
                self.pause = now + PAUSE
            for secret in filter(None, self.secrets):
                reason = reason.replace(secret, "...")
            raise Reply(2, "%s: %s" % (shown(self.url), reason)) from None
        finally:
            setitimer(ITIMER_REAL, 0)

    def find(self, option, value):
        """The rows that may answer a request."""
        if option == "ip":
            return list(self.query(ROWS_BY_IP + "@networks", address_values(*value)))
        room = 8 - len(value)
        padded = [" " * left + value + " " * right
                  for left in range(room + 1) for right in range(room + 1 - left)]
        values = {"id%d" % place: text for place, text in enumerate(padded)}
        marks = ", ".join(["@" + name for name in values])
        return list(self.query("%s WHERE id IN (%s)" % (ROWS, marks), values))


# ------------------------------------------------------------------------------- keeping the store


class Findings:
    """What is wrong with a source, told on a stream (1 or 2) as it is found, or kept for JSON."""

    def __init__(self, stream, as_json=False):
        self.stream, self.as_json, self.kept, self.errors, self.count = stream, as_json, [], 0, 0

    def tell(self, level, where, text):
        """A finding. level: `error` for what makes a request fail, or `note`."""
        self.errors += level == "error"
        self.count += 1
        if self.as_json:
            self.kept.append({"level": level, "where": where, "text": text})
        else:
            say(self.stream, "%s: %s%s" % (level, where and where + ": ", text))


def say(stream, text):
    """A line for people."""
    posix.write(stream, printable(text).encode("ascii") + b"\n")


def counted(number, what):
    """`1 agent`, `2 agents`."""
    return "%d %s%s" % (number, what, "s" * (number != 1))


def network_of(ip):
    """A valid ip as a text that is the same for all spellings of the same network."""
    number, width, prefix = parse_network(ip)
    number = number >> (width - prefix) << (width - prefix)
    return spelled(number, width) + ("/%d" % prefix if prefix < width else "")


def notes_on(row, record):
    """What a person should know of a record that breaks no rule: iterator of (level, text)."""
    stored, ip = text_of(row[ID]), record["ip"]
    if isinstance(row[ID], (str, bytes)) and stored and not stored.strip(DIGITS) and (
            len(stored) < 3):
        yield "note", "id %s lacks its zeros, %s" % (stored, stored.zfill(3))
    for field in ("name", "key"):
        if len(record[field]) == 128:
            yield "note", field + " has 128 characters, of which the manager reads 127 back"
    if "/" in ip and parse_network(ip)[0] != parse_network(network_of(ip))[0]:
        yield "note", "ip has host bits set; its network is " + network_of(ip)
    if record["name"] == posix.uname().nodename:
        yield "error", "name is %s, this host's own: its manager refuses that" % record["name"]


def copy(source, store, findings, keep):
    """Copy all the agents of a source into a new SQLite database, tell what is wrong with them,
    and give their number. keep: whether to copy the keys too; a faulty field is copied as empty."""
    terminal, told, count = os.isatty(2), time.monotonic() + 1, 0
    if not isinstance(source, Database):  # whose deadline is for its first row
        source.deadline = time.monotonic() + 3600

    def judged():
        nonlocal told, count
        for number, row in source.rows():
            record, faults = judge(row, source.from_text)
            notes = [] if keep else notes_on(row, record)
            for level, text in itertools.chain((("error", fault) for fault in faults), notes):
                where = "%s %d" % (source.unit, number)
                findings.tell(level, where, "%s: %s" % (agent_of(record), text))
            for fault in faults:
                record[fault.split()[0]] = ""
            count += 1
            if terminal and count % 500 == 0 and time.monotonic() > told:
                posix.write(2, b"%d agents\r" % count)
                told = time.monotonic() + 0.2
            yield number, record["id"], record["name"], record["ip"], record["key"] * keep

    store.execute("BEGIN")
    store.execute(TABLE)
    insert = "INSERT INTO agent (rowid, id, name, ip, agent_key) VALUES (?, ?, ?, ?, ?)"
    store.executemany(insert, judged())
    for statement in INDEXES.values() if keep else ():
        store.execute(statement)
    store.create_function("network_of", 1, network_of)
    plain = "CASE WHEN ip LIKE '%/%' OR ip LIKE '%:%' THEN network_of(ip) ELSE ip END"
    for field, value, free in (("id", "id", ""), ("name", "name", ""), ("ip", plain, "any")):
        tell_twice(store, field, value, free, source.unit, findings)
    store.execute("COMMIT")
    return count


def tell_twice(store, field, value, free, unit, findings):
    """Tell of each agent with an id, name or network that an earlier one has. value: SQL that is
    equal for equal ones; free: what many may have."""
    rows = store.execute(
        "SELECT agent.rowid, id, first FROM agent CROSS JOIN (SELECT {0} AS value, min(rowid) AS "
        "first FROM agent WHERE {1} NOT IN ('', ?) GROUP BY 1 HAVING count(*) > 1) ON value = {0} "
        "WHERE agent.rowid > first ORDER BY 1".format(value, field), [free])
    for number, agent, first in rows:
        findings.tell("error", "%s %d" % (unit, number), "agent %s: %s is already that of %s %d" % (
            agent, field, unit, first))


def whole(lines):
    """The lines of standard input: who writes them may have died within the last."""
    line = "\n"
    for line in filter(None, lines):
        yield line
    if line[-1:] not in ("\r", "\n"):
        raise Reply(2, "standard input ends within a line")


def remove(*names):
    """Remove files, if they are there."""
    for name in names:
        if os.path.lexists(name):
            os.unlink(name)


def claim_import(path):
    """A new file to build the database in, locked until this process ends; raises Trouble. What an
    import that was killed has left there is cleared away, and anything else in that place."""
    try:
        if os.path.lexists(path):
            left = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path, path + "-journal", path + "-wal", path + "-shm")
            os.close(left)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(path) or os.fstat(lock).st_ino != os.stat(path).st_ino:
            raise BlockingIOError  # somebody found it before it was locked
    except (BlockingIOError, FileExistsError):
        raise Trouble("another import builds %s: try again when it has ended" % path) from None
    except OSError as error:
        raise Trouble("cannot write %s: %s" % (path, error.strerror)) from None
    return lock


def put_in_place(lock, beside, path, seconds):
    """Sync the new database and move it over the old one, whose mode and owner it gets. Nothing of
    the old one's journals may be there then: SQLite would play it into the new one."""
    os.fsync(lock)
    old = None
    if os.path.exists(path):
        old = _sqlite3.connect(path, timeout=seconds, isolation_level=None)
        if old.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise Trouble("%s is being read and written: try again" % path)
        old.execute("BEGIN IMMEDIATE")  # no writer is at work; a dead one's journal is rolled back
        status = os.stat(path)
        os.fchown(lock, status.st_uid, status.st_gid)
        os.fchmod(lock, status.st_mode & 0o777)
    remove(path + "-wal", path + "-shm")
    os.rename(beside, path)
    remove(path + "-wal", path + "-shm")  # of somebody who came in between
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    if old:
        old.close()


def import_agents(options, name):
    """Make `--db` hold what `--import` names; raises Reply, Trouble or OSError if it does not."""
    path, origin = os.path.realpath(name), options["--import"]
    beside, findings = path + ".import", Findings(2)
    seconds = number_of(options, "--timeout", 10)
    if origin == "-":
        if not sys.stdin:
            raise Trouble("standard input is closed")
        source = open_text(open(0, "rb", closefd=False), origin, seconds)
    else:
        source = open_source(origin, seconds)
    if is_url(name) or os.path.exists(path) and os.path.getsize(path) and not is_sqlite(path):
        raise Trouble("--import would make an SQLite file of %s, which is none" % shown(name))
    lock = claim_import(beside)
    try:
        store = _sqlite3.connect(beside, isolation_level=None)
        store.execute("PRAGMA journal_mode = OFF")
        store.execute("PRAGMA synchronous = OFF")
        count = copy(source, store, findings, keep=True)
        store.close()
        if findings.errors or origin == "-" and not count:  # who writes it may have died
            raise Trouble("%s: nothing is imported, %s is as it was" % (
                counted(findings.errors, "fault") if count else "no agent there", path))
        put_in_place(lock, beside, path, seconds)
    except Exception as error:
        remove(beside)
        if isinstance(error, (_sqlite3.Error, OSError)):
            reason = getattr(error, "strerror", None) or error
            raise Trouble("cannot import into %s: %s" % (path, reason)) from None
        raise
    if os.isatty(2) or "-v" in options:
        say(2, "%s imported into %s" % (counted(count, "agent"), path))


def missing_indexes(source):
    """The statements that would make the missing indexes of a database; none for a view."""
    cures, views = dict(INDEXES), "sqlite_master WHERE name = 'agent' AND type = 'view'"
    if isinstance(source, Database):
        views = source.dialect["views"]
    if list(source.query("SELECT 1 FROM " + views)):
        return []
    if isinstance(source, Database):
        cures["agent_network"] = source.dialect["index"]
        have = source.indexes | {"agent_" + word for word in source.indexes}
    else:
        have = set()
        for index, sorted_by in zip(INDEXES, ("id", "ip", NETWORK)):
            plan = source.query("EXPLAIN QUERY PLAN SELECT 1 FROM agent WHERE %s = ''" % sorted_by)
            if not any(b"SCAN" in row[3] for row in plan):
                have.add(index)
    return [cure for index, cure in cures.items() if index not in have]


def check_source(name, seconds, findings):
    """Tell what a person wants to know before trusting a source, and give the number of agents."""
    count = 0
    try:
        source = open_source(name, seconds)
        count = copy(source, _sqlite3.connect("", isolation_level=None), findings, keep=False)
        source.deadline = time.monotonic() + seconds
        for option, value in (("id", NOBODY), ("ip", (1, 32))) if source.live else ():
            source.find(option, value)  # a column's type may not go with it
        for cure in missing_indexes(source) if source.live else ():
            findings.tell("note", "", "an index is missing, and requests are slow: " + cure)
    except (Reply, OSError, _sqlite3.Error) as problem:
        findings.tell("error", "", unreadable(name, problem))
    if is_url(name) and secrets_of(name):
        findings.tell("note", "", "a password stands in the URL, where `ps` may show it: put it "
                      "into a file (README.md)")
    elif os.path.isfile(name) and os.stat(name).st_mode & 0o004:
        findings.tell("note", "", "others may read %s, and keys are secrets: chmod o-r it" % name)
    return count


def check_server(path, seconds, findings):
    """Ask a server as the manager would; gives a dict of its answer and how long it took."""
    started, answered = time.monotonic(), "an answer that no manager understands"
    try:
        reply = json.loads(ask_server(path, ["id", NOBODY], seconds).decode("ascii"))
        if type(reply["error"]) is int and reply["error"] and type(reply["message"]) is str:
            answered = "error %d, %s" % (reply["error"], reply["message"])
    except Reply as reply:
        answered = reply.message[len(MESSAGES[2]):]
    except (ValueError, KeyError, TypeError):
        pass
    took = "%.1f ms" % (1000 * (time.monotonic() - started))
    text = "server %s: %s" % (path, answered)
    if not answered.startswith("error 4"):  # what it should say of an id that nobody has
        findings.tell("error", "", text)
        text = "server %s: no sound answer" % path
    if not findings.as_json:
        say(1, "%s, in %s" % (text, took))
    return {"socket": path, "answer": answered, "took": took}


def check(options, name):
    """Report on a source, and on the server with `--socket`; returns the exit status."""
    findings, seconds = Findings(1, "--json" in options), number_of(options, "--timeout", 10)
    report = {"agents": check_source(name, seconds, findings), "findings": findings.kept}
    if "--socket" in options:
        report["server"] = check_server(options["--socket"], seconds, findings)
    if findings.as_json:
        say(1, to_json(report))
    else:
        say(1, "%s, %s" % (counted(report["agents"], "agent"), counted(findings.count, "finding")))
    return 1 if findings.errors else 0


class Trouble(Exception):
    """What keeps a person's command from its work: told on stderr, with exit status 1."""


def run_command(arguments):
    """--serve, --import or --check, with troubles on stderr; returns the exit status."""
    try:
        options, words = parse_arguments(arguments)
        if words:
            raise Reply(3, ": no request goes with --serve, --import or --check")
        name = options.get("--db") or source_beside()
        if "--check" in options:
            return check(options, name)
        (import_agents if "--import" in options else serve)(options, name)
        return 0
    except (Reply, Trouble, OSError) as problem:
        message = getattr(problem, "message", str(problem))
        if getattr(problem, "strerror", None):
            message = "%s: %s" % (problem.filename or shown(name), problem.strerror)
        hint = " (see --help)" if getattr(problem, "number", 2) in (1, 3) else ""
    except Exception as error:
        message, hint = unforeseen(error).message, ""
    say(2, "agent_key_request: error: " + message + hint)
    return 1


def version():
    """The version, and the SHA-256 that tells which file this is."""
    from hashlib import sha256
    with open(__file__, "rb") as script:
        return "agent_key_request.py %s sha256:%s\n" % (VERSION, sha256(script.read()).hexdigest())
'''  # end of LATER_ROOM

# ----------------------------------------------------------------------------------- command line

HELP = """usage: agent_key_request.py [--db SOURCE] [--timeout SECONDS] id AGENT_ID | ip ADDRESS
       agent_key_request.py [--db SOURCE] --serve [--socket PATH] [--mode 0600] [--group NAME]
                            [--workers N] [--timeout SECONDS] [-v]
       agent_key_request.py --socket PATH id AGENT_ID | ip ADDRESS     (asks a running server)
       agent_key_request.py [--db agents.db] --import SOURCE [-v]      (- for standard input)
       agent_key_request.py [--db SOURCE] --check [--socket PATH] [--json]
       agent_key_request.py --version | --help
SOURCE: SQLite, CSV, client.keys, an SQL script, mysql://user@host/database or postgresql://...;
without --db $AGENT_KEY_DB, else agents.db beside the script. --timeout: 10 s for one request,
5 s for each that a server gets.
"""
MODES = ("--serve", "--import", "--check")
FLAGS = ("--help", "--version", "--serve", "--check", "--json", "-v")
OPTIONS = ("--db", "--timeout", "--socket", "--mode", "--group", "--workers", "--import")


def parse_arguments(arguments):
    """The command line as (options, words): a dict of str, and the words that follow."""
    options, words = {}, list(arguments)
    while words and words[0][:1] == "-":
        name, equals, value = words.pop(0).partition("=")
        if name in FLAGS and not equals:
            value = "yes"
        elif name not in OPTIONS:
            raise Reply(3)
        elif not equals:
            value = words.pop(0) if words else ""
        if value == "://":  # Database() has hidden it
            value = posix.environ.get(b"AGENT_KEY_URL", b"").decode("utf-8", "surrogateescape")
        if not value:
            raise Reply(1)
        options[name] = value
    return options, words


def number_of(options, name, default):
    """A numeric option: more than 0, at most 3600."""
    try:
        number = float(options.get(name, default))
    except ValueError:
        number = 0
    if not 0 < number <= 3600:
        raise Reply(3, ": %s %s" % (name, options[name]))
    return number


def source_beside():
    """Without `--db`: $AGENT_KEY_DB, else agents.db beside the script, links resolved."""
    import os
    beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), "agents.db")
    return os.environ.get("AGENT_KEY_DB") or beside


def later(name):
    """What is so named in LATER_ROOM."""
    line, text = LATER_ROOM  # noqa: F821
    if name not in globals():
        exec(compile("\n" * (line - 1) + text, __file__, "exec"), globals())
    return globals()[name]


def give_up(*_):
    """The handler of the alarm that ends a one-shot request."""
    raise Reply(2, "no answer in time (--timeout)")


def answer_once(options, words):
    """The executable method: answers on standard output, then tells syslog."""
    seconds = number_of(options, "--timeout", 10)  # the manager's own patience is 60 s
    if "--socket" in options:
        posix.write(1, later("ask_server")(options["--socket"], words, seconds))
        return
    name = options.get("--db") or source_beside()
    if is_url(name):  # libpq warns of what it dislikes, and the manager would lose the answer
        posix.dup2(posix.open("/dev/null", posix.O_WRONLY), 2)
    signal(SIGALRM, give_up)
    setitimer(ITIMER_REAL, seconds)
    try:
        reply = answer(words, lambda: open_source(name, seconds * 0.9))
    except Reply as late:
        reply = late
    setitimer(ITIMER_REAL, 0)
    posix.write(1, reply.line())
    if reply.number in FOR_THE_OPERATOR:
        import syslog
        signal(SIGALRM, lambda *_: None)
        setitimer(ITIMER_REAL, 1, 0.5)  # or a log that nobody reads would hold us here for ever
        syslog.openlog("agent_key_request", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
        syslog.syslog(syslog.LOG_ERR if reply.number else syslog.LOG_INFO,
                      printable("%s: %s" % (" ".join(words), reply.message)))
        setitimer(ITIMER_REAL, 0)


def main(arguments):
    """Run the program; returns the exit status."""
    # The manager starts its programs with these blocked, and could not end a Python otherwise.
    pthread_sigmask(SIG_UNBLOCK, (SIGTERM, SIGINT, SIGHUP))
    signal(SIGINT, SIG_DFL)
    try:
        if any([word.partition("=")[0] in MODES for word in arguments]):
            return later("run_command")(arguments)
        options, words = parse_arguments(arguments)
        if "--help" in options or "--version" in options:
            text = HELP if "--help" in options else later("version")()
            posix.write(1, text.encode("ascii"))
        else:
            answer_once(options, words)
    except Reply as reply:
        posix.write(1, reply.line())
    except OSError:
        pass  # nobody takes the answer
    except Exception as error:
        posix.write(1, unforeseen(error).line())
    return 0


if __name__ == "__main__":
    posix._exit(main(sys.argv[1:]))  # an orderly end of the interpreter costs 7 M, for nothing
