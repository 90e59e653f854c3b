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

# What the index agent_network sorts by: the part from the slash; ":" for an IPv6 address in other
# than its shortest lower-case spelling; null for the others, which the index agent_ip finds.
NETWORK = """CASE WHEN instr(ip, '/') THEN trim(substr(ip, instr(ip, '/')))
    WHEN ip LIKE '%:0%' OR ip LIKE '0%:%' OR ip LIKE '%:%.%' OR ip LIKE '::f%'
    OR ip <> lower(ip) THEN ':' END"""
ROWS = "SELECT id, name, ip, agent_key FROM agent"
# A text with or without padding, the same as a BLOB, a number; and all that is padded at the left.
ROWS_BY_ID = ROWS + """ WHERE id BETWEEN :id AND :id || :padding OR id = :number
    OR id BETWEEN CAST(:id AS BLOB) AND CAST(:id || :padding AS BLOB) OR id BETWEEN ' ' AND ' ~'"""
ROWS_BY_IP = ROWS + """ WHERE ip BETWEEN :ip AND :ip || :padding OR ip BETWEEN ' ' AND ' ~'
    OR ip >= x'' UNION ALL """
# Walks the few keys of agent_network, and looks only at networks that begin like the address.
ROWS_BY_NETWORK = """SELECT id, name, ip, agent_key FROM (
    WITH RECURSIVE walk(part) AS (SELECT '' UNION ALL SELECT
        (SELECT {0} FROM agent WHERE {0} > part ORDER BY {0} LIMIT 1) FROM walk WHERE part NOT NULL)
    SELECT part, CASE CAST(substr(part, 2) AS INTEGER) / 8 WHEN 4 THEN :four
        WHEN 3 THEN :three WHEN 2 THEN :two WHEN 1 THEN :one ELSE '' END AS head FROM walk
) JOIN agent ON {0} = part AND ip BETWEEN head AND head || '~' AND ip > '!'""".format(NETWORK)
ROWS_OF_NETWORKS = ROWS + " WHERE {0} NOT NULL AND ip BETWEEN '!' AND '~'".format(NETWORK)

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
        return "{%s}" % ", ".join(["%s: %s" % (to_json(k), to_json(value[k])) for k in value])
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
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value).decode("latin-1")  # what is beyond ASCII breaks every rule
    return "" if value is None else str(value).strip(" ")


def id_of(value, from_text):
    """The agent id in a stored value, as the manager writes it: with at least three digits if it
    is a number, or from a text file, where spreadsheets eat zeros."""
    if isinstance(value, (int, float)) and value % 1 == 0:
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


def spelled(number, width):
    """An address as the index agent_ip has it: IPv6 with all its zero groups in the `::`."""
    if width == 32:
        return ".".join([str(number >> shift & 255) for shift in (24, 16, 8, 0)])
    groups = ["%x" % (number >> shift & 0xFFFF) for shift in range(112, -1, -16)]
    zeros = groups.count("0")
    first = groups.index("0") if zeros else 8
    return ":".join(groups[:first]) + "::" * bool(zeros) + ":".join(groups[first + zeros:])


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


class TextSource:
    """Agents in a text file. numbered_rows: iterator of (line number, row), to be read once."""

    from_text, on_disk, frozen = True, False, False

    def __init__(self, numbered_rows):
        self.numbered_rows = numbered_rows

    def find(self, option, value):
        """The rows that may answer a request."""
        if option == "id":
            return [row for _, row in self.numbered_rows if row[ID].strip(" ").zfill(3) == value]
        address = spelled(*value)
        return [row for _, row in self.numbered_rows
                if "/" in row[IP] or ":" in row[IP] or row[IP].strip(" ") == address]


class ClientKeys(TextSource):
    """The agents in a manager's client.keys, but not its comments and removed agents."""

    def __init__(self, lines):
        super().__init__(self.rows_of(lines))
        self.lines = lines

    def rows_of(self, lines):
        """Iterator of (line number, row)."""
        for number, line in enumerate(lines, 1):
            row = line.rstrip("\r\n").split(" ", 3)
            if row[ID] and line[0] != "#" and (len(row) < 2 or row[NAME][:1] not in ("!", "#")):
                yield number, row if len(row) == 4 else row[:2] + [MISSING] * 3

    def find(self, option, value):
        """The rows that may answer a request; most lines are not even taken apart."""
        if option == "id":
            heads = (value, value.lstrip("0").zfill(2), value.lstrip("0").zfill(1))
            lines = [line for line in self.lines if line.startswith(heads)]
        else:
            address = " %s " % spelled(*value)
            lines = [line for line in self.lines if address in line or "/" in line or ":" in line]
        self.numbered_rows = self.rows_of(lines)
        return super().find(option, value)


def delimited(lines, header, delimiter, columns):
    """The numbered rows of CSV, or of what `mysql --batch` writes, after `header` lines."""
    import csv
    from operator import itemgetter
    tabs, pick, width = delimiter == "\t", itemgetter(*columns), max(columns) + 1
    csv.field_size_limit(sys.maxsize)  # somebody else's long field must not end the reading
    if sys.version_info < (3, 11):  # where csv stops at a NUL; DEL breaks every rule as well
        lines = (line.replace("\0", "\x7f") for line in lines)
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if tabs else 0)
    try:
        for fields in reader:
            if fields and reader.line_num > header:
                row = pick(fields if len(fields) >= width else fields + [MISSING] * width)
                yield reader.line_num, tuple(map(unescaped, row)) if tabs else row
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


class SqlSource:
    """The table or view `agent` of an SQLite connection; from_text: it was loaded from a text file;
    deadline: when a query is given up, in time.monotonic()."""

    on_disk, frozen = False, False

    def __init__(self, connection, deadline, from_text=False):
        self.connection, self.deadline, self.from_text = connection, deadline, from_text
        connection.text_factory = bytes  # text that is not UTF-8 must not stop a query
        connection.set_progress_handler(lambda: time.monotonic() > self.deadline, 100000)
        list(self.query(ROWS + " LIMIT 0"))
        indexed = list(self.query("PRAGMA index_info(agent_network)"))
        self.rows_by_ip = ROWS_BY_IP + (ROWS_BY_NETWORK if indexed else ROWS_OF_NETWORKS)

    def query(self, sql, values=()):
        """Iterator of rows; raises Reply."""
        try:
            yield from self.connection.execute(sql, values)
        except Exception as error:
            reason = str(error).replace("interrupted", "no answer in time (--timeout)")
            raise Reply(2, reason, locked="locked" in reason) from None

    def find(self, option, value):
        """The rows that may answer a request."""
        padding = " " * 128
        if option == "id":
            values = {"id": value, "number": int(value), "padding": padding}
            return list(self.query(ROWS_BY_ID, values))
        address = spelled(*value)
        parts = address.split(".")
        one, two, three = [".".join(parts[:count] + [""]) for count in (1, 2, 3)]
        heads = (one, two, three, address + "/") if len(parts) == 4 else ("", "", "", "")
        values = dict(zip(("one", "two", "three", "four"), heads), ip=address, padding=padding)
        return list(self.query(self.rows_by_ip, values))


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


def open_source(name, seconds):
    """The source that `--db` names, for queries of up to `seconds`; raises Reply."""
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
    source.on_disk, source.frozen = True, frozen
    return source


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
    text = TextIOWrapper(stream, encoding="latin-1", newline="" if is_csv else "\n")
    lines = chain(head, text)
    if is_csv:
        key = "key" if "key" in columns else "agent_key"
        if not {"name", "ip", key} < set(columns):
            raise Reply(2, "%s: its header lacks one of id, name, ip and key (or agent_key)" % name)
        places = [columns.index(field) for field in ("id", "name", "ip", key)]
        return TextSource(delimited(lines, len(head), delimiter, places))
    like_keys = first.count(" ") > 2 or name.endswith(".keys")
    if like_keys and not word.strip(DIGITS) or not first and "".join(head).strip():
        return ClientKeys(lines)
    if name.endswith(".sql") or word.upper() in ("CREATE", "INSERT", "BEGIN", "DROP", "--"):
        return later("open_script")("".join(lines), name, seconds)
    raise Reply(2, "%s is %s" % (name, "no SQLite database, CSV with a header (id, name, ip, key), "
                                 "client.keys or SQL script" if first else "empty"))


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
    except Exception as error:  # its text could hold a key
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        return Reply(9, "%s in line %d of the script" % (type(error).__name__, trace.tb_lineno))


# ------------------------------------------------------------------------------------- the server
# Plain code but for this: it is a text until --serve, --socket, --version or an SQL script need it,
# because every one-shot request would else compile it, and cost a quarter more. `make lint` and the
# tests read it without its two marks.

LATER_ROOM = r'''
from _signal import SIG_BLOCK
SOCKET = "/var/ossec/queue/sockets/agent_key_request"
SCHEMA = """CREATE TABLE agent (
    id VARCHAR(8) NOT NULL, name VARCHAR(128) NOT NULL, ip VARCHAR(64),
    agent_key VARCHAR(128) NOT NULL);
CREATE INDEX agent_id ON agent (id);
CREATE INDEX agent_ip ON agent (ip);
CREATE INDEX agent_network ON agent ({0}, ip) WHERE {0} IS NOT NULL;""".format(NETWORK)
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


class PatientMixIn:
    """For socketserver.UnixStreamServer: many connections in one loop, and none waits for another.

    Who has connected is next, if he has said something; else an epoll waits for him.
    """

    request_queue_size = 65535  # the kernel cuts it to net.core.somaxconn; connect never times out

    def take_over(self, lifeline, source, seconds, notes):
        """Prepare for serve_forever in a worker; lifeline: a pipe that ends with the parent."""
        import resource
        import select
        self.lifeline, self.source, self.seconds, self.notes = lifeline, source, seconds, notes
        self.clients, self.ending, self.retired, self.epoll = {}, None, 0, select.epoll()
        self.next_round, self.most = 0.0, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 40
        self.socket.setblocking(False)
        self.epoll.register(self.socket.fileno(), select.EPOLLIN)
        self.epoll.register(lifeline, select.EPOLLIN)

    def serve_forever(self, poll_interval=0.5):
        """As socketserver's, but it waits only when nobody is in the queue."""
        while True:
            try:
                while True:
                    self.process_request(*self.get_request())
                    self.service_actions()
            except BlockingIOError:
                at_work = self.clients or self.notes.pending or self.ending
                self.epoll.poll(0.02 if at_work else poll_interval, 1)
                self.service_actions()

    def get_request(self):
        """The next client and its number; BlockingIOError if nobody has anything to say."""
        try:
            connection = None if self.retired else self.socket.accept()[0]
        except OSError:  # nobody there
            connection = None
        if connection:
            if len(self.clients) >= self.most:  # who has been silent for longest gives way
                self.drop(next(iter(self.clients.values())))
            number = connection.fileno()
            self.clients[number] = Client(connection, time.monotonic() + self.seconds)
            return self.clients[number], number
        for number, event in self.epoll.poll(0):
            if number in self.clients:
                return self.clients[number], number
            if number == self.lifeline:
                self.ending = time.monotonic() + DRAIN
                self.epoll.unregister(number)
                self.retired = event & 1  # others go on with this socket: leave them the queue
                if self.retired:
                    self.epoll.unregister(self.socket.fileno())
        raise BlockingIOError

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
            self.notes.report(words, reply)
        self.drop(client)

    def drop(self, client):
        """Close a connection."""
        del self.clients[client.connection.fileno()]
        client.connection.close()

    def service_actions(self):
        """What serve_forever does between requests: the locked, the silent, and the end."""
        now = time.monotonic()
        if now < self.next_round:
            return
        self.next_round = now + 0.02
        self.notes.flush()
        for number, _ in self.epoll.poll(0):  # or a flood of new clients would hold up the others
            if number in self.clients:
                self.process_request(self.clients[number], number)
        for client in list(self.clients.values()):
            if client.asked:
                self.respond(client)
            elif now > client.deadline:
                self.drop(client)
        if self.ending and (now > self.ending or not self.clients and not self.epoll.poll(0, 1)):
            self.notes.flush()
            raise SystemExit


class ServedSource:
    """The source as a worker sees it. loaded: a text source that the parent has read, or None for
    a database, which is opened here, and anew when its file is replaced."""

    def __init__(self, name, seconds, loaded):
        self.name, self.seconds, self.loaded = name, seconds, loaded
        self.source, self.identity, self.checked = loaded, None, 0.0
        self.failure = Reply(2, "%s is not read yet" % name)

    def find(self):
        """The source now; raises Reply if there is none any more."""
        now = time.monotonic()
        if self.source is None or self.source.frozen or now > self.checked + LOOK:
            status = check_file(self.name)
            identity = status.st_dev, status.st_ino
            if not self.loaded and (identity != self.identity or self.source.frozen):
                try:
                    source = open_source(self.name, 0)
                except Reply as reply:
                    self.failure = reply
                    raise
                if source.on_disk:
                    if self.source:
                        self.source.connection.close()
                    self.source, self.identity = source, identity
                elif not self.source:
                    raise self.failure  # until the parent has read what is there now
            self.checked = now
        self.source.deadline = now + self.seconds
        return self.source


def load(name, seconds):
    """For the parent: a text source in memory, with indexes, or None for a database."""
    source = open_source(name, seconds)
    if isinstance(source, SqlSource):
        return None if source.on_disk else source
    import _sqlite3
    connection = _sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript("BEGIN;" + SCHEMA)
    rows = ((id_of(row[ID], True),) + tuple(row[1:4]) for _, row in source.numbered_rows)
    connection.executemany("INSERT INTO agent VALUES (?, ?, ?, ?)", rows)
    return SqlSource(connection, time.monotonic() + seconds, from_text=True)


class Log:
    """Lines on stderr; without -v, repeats are summed up once a minute."""

    def __init__(self, verbose):
        self.verbose, self.seen, self.since = verbose, {}, time.monotonic()

    def write(self, *lines):
        """Lines, at once; dropped if nobody reads them: a full pipe must not stop the server."""
        import select
        writable = select.poll()
        writable.register(2, select.POLLOUT)
        text = "".join(["agent_key_request: %s\n" % printable(line) for line in lines])
        while text:
            end = text.rfind("\n", 0, 4096) + 1 or len(text)  # what a pipe takes in one piece
            if writable.poll(0):
                posix.write(2, text[:end].encode("ascii"))
            text = text[end:]

    def take(self, lines, last=False):
        """Lines of the workers, `count level: text`; sums up when it is time, or at last."""
        told = []
        for counted in lines:
            count, _, line = counted.partition(" ")
            if line not in self.seen and len(self.seen) >= SUMMARY_LINES:
                line = "info: other lines, left out here"
            new = line not in self.seen
            told += [line] * (int(count) if self.verbose else new)
            self.seen[line] = self.seen.get(line, 0) + int(count) - new
        self.write(*told)
        if last or time.monotonic() > self.since + SUMMARY:
            for line, repeats in self.seen.items():
                if repeats and not self.verbose:
                    self.write("%s (%d times more in %d s)" % (line, repeats, SUMMARY))
            self.since, self.seen = time.monotonic(), {}


class Supervisor:
    """The parent: starts and replaces workers, watches a text source, writes the log.

    The workers of one generation share a pipe, `lifeline`, that ends when the parent ends; a byte
    in it retires them, when others with a newly read source have taken their place.
    """

    def __init__(self, server, name, options):
        import os
        self.server, self.name, self.log = server, name, Log("-v" in options)
        self.seconds = number_of(options, "--timeout", 5)
        self.count = int(number_of(options, "--workers", os.cpu_count() or 1)) or 1
        self.lines, self.lines_end = os.pipe()
        os.set_blocking(self.lines, False)
        os.set_blocking(self.lines_end, False)
        self.workers, self.generation, self.lifeline, self.torn = {}, 0, None, b""
        self.pending = {}

    def stamp(self):
        """What differs when the source's file does; None without one."""
        try:
            status = posix.stat(self.name)
            return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        except OSError:
            return None

    def renew(self):
        """Read the source, if it can be read, and let a new generation of workers take over."""
        self.read = self.seen = self.stamp()
        self.changed, self.loaded = time.monotonic(), None
        try:
            self.loaded = load(self.name, self.seconds)
            self.log.write("info: source %s" % self.name)
        except (Reply, OSError) as problem:  # OSError: it went away while it was being read
            self.log.take(["1 error: %s" % getattr(problem, "message", problem)])
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
            source = ServedSource(self.name, self.seconds, self.loaded)
            self.server.take_over(self.lifeline[0], source, self.seconds, self)
            self.server.serve_forever()
        except SystemExit:
            posix._exit(0)
        finally:
            posix._exit(1)

    def report(self, words, reply):
        """From a worker: note what the log should say."""
        if reply.number in FOR_THE_OPERATOR or self.log.verbose:
            whose = ":".join(words) + ": " if reply.number != 2 or self.log.verbose else ""
            key = reply.number, whose, reply.message
            self.pending[key] = self.pending.get(key, 0) + 1

    def flush(self):
        """From a worker: send the log what it has to say, as much as it takes without waiting."""
        while self.pending:
            text, sent = b"", []
            for key in self.pending:
                level = "error" if key[0] in FOR_THE_OPERATOR[1:] else "debug" if key[0] else "info"
                line = "%d %s: %s%s" % ((self.pending[key], level) + key[1:])
                line = printable(line[:2000]).encode("ascii") + b"\n"
                if len(text) + len(line) > 4096:  # what a pipe takes in one piece
                    break
                text += line
                sent.append(key)
            try:
                posix.write(self.lines_end, text)
            except OSError:
                return
            for key in sent:
                del self.pending[key]

    def attend(self):
        """One round: the log, dead workers, a text source that has changed and settled."""
        try:
            *lines, self.torn = (self.torn + posix.read(self.lines, 1 << 20)).split(b"\n")
        except BlockingIOError:
            lines = []
        self.log.take([line.decode("ascii") for line in lines])
        for process, status in reaped():
            if self.workers.pop(process, 0) == self.generation and self.server:
                self.log.write("error: worker %d died (status %d); another takes its place" % (
                    process, status))
                self.start_worker()
        stamp, now = self.stamp(), time.monotonic()
        if stamp != self.seen:
            self.seen, self.changed = stamp, now
        elif stamp not in (None, self.read) and now > self.changed + SETTLED:
            self.read = stamp
            if self.loaded or not is_sqlite(self.name):  # which the workers open for themselves
                self.renew()

    def run(self):
        """Serve until SIGTERM or SIGINT."""
        import signal as signals
        waited = {SIGTERM, SIGINT, SIGHUP}
        self.renew()
        self.log.write("info: ready: %d workers on %s, source %s" % (
            self.count, self.server.server_address, self.name))
        notify(b"READY=1")
        while True:
            caught = signals.sigtimedwait(waited, 0.05)
            if caught and caught.si_signo == SIGHUP:
                self.renew()
            elif caught:
                return
            self.attend()

    def stop(self):
        """Answer everybody who has connected, and end the workers within two seconds."""
        self.log.write("info: stopping")
        notify(b"STOPPING=1")
        server, self.server, end = self.server, None, time.monotonic() + DRAIN + 0.3
        self.end_generation(b"" if server.identity else b"r")  # systemd keeps its socket and queue
        while self.workers and time.monotonic() < end:
            self.attend()
            time.sleep(0.01)
        for process in self.workers:
            posix.kill(process, 9)
        self.log.take([], last=True)
        self.log.write("info: stopped")


def reaped():
    """The (process, status) of every child that has ended."""
    try:
        process, status = posix.waitpid(-1, posix.WNOHANG)
        while process:
            yield process, status
            process, status = posix.waitpid(-1, posix.WNOHANG)
    except ChildProcessError:
        pass


def notify(state):
    """Tell systemd, if it is there ($NOTIFY_SOCKET, a path or an abstract name)."""
    import os
    import socket
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            try:
                messenger.sendto(state, address.replace("@", "\0", 1))
            except OSError:
                pass


def claim(path):
    """Lock a socket's path and clear a stale socket away; raises OSError if somebody is there."""
    import fcntl
    import os
    import socket
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
    import grp
    import os
    import socket
    import socketserver
    kind = type("Server", (PatientMixIn, socketserver.UnixStreamServer), {})
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        server = kind(path, None, bind_and_activate=False)
        server.socket.close()
        server.socket = socket.socket(socket.AF_UNIX, fileno=3)
        server.server_address, server.identity = server.socket.getsockname(), None
        return server
    try:
        lock, mask, own = claim(path), os.umask(0o777 & ~int(mode, 8)), os.getegid()
        try:
            os.setegid(grp.getgrnam(group).gr_gid if group else own)
            server = kind(path, None)  # born with its mode and group: no chmod, no race
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
    import os
    import resource
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # silent clients hold a file each
    pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT, SIGHUP))  # until the supervisor asks for them
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
    import socket
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


class Trouble(Exception):
    """What keeps --serve from its work: told on stderr, with exit status 1."""


def run_server(arguments):
    """For people: --serve, with its troubles on stderr; returns the exit status."""
    try:
        options, words = parse_arguments(arguments)
        if words:
            raise Reply(3, ": --serve takes no request")
        serve(options, options.get("--db") or source_beside())
        return 0
    except (Reply, Trouble, OSError) as problem:
        message = getattr(problem, "message", None) or printable(str(problem))
        if getattr(problem, "number", 2) != 2:
            message += " (see --help)"
        posix.write(2, ("agent_key_request: error: %s\n" % message).encode("ascii"))
        return 1


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


def version():
    """The version, and the SHA-256 that tells which file this is."""
    from hashlib import sha256
    with open(__file__, "rb") as script:
        return "agent_key_request.py %s sha256:%s\n" % (VERSION, sha256(script.read()).hexdigest())
'''  # end of LATER_ROOM

# ----------------------------------------------------------------------------------- command line

HELP = """usage: agent_key_request.py [--db SOURCE] [--timeout SECONDS] id AGENT_ID
       agent_key_request.py [--db SOURCE] [--timeout SECONDS] ip ADDRESS
       agent_key_request.py [--db SOURCE] --serve [--socket PATH] [--mode 0600] [--group NAME]
                            [--workers N] [--timeout SECONDS] [-v]
       agent_key_request.py --socket PATH id AGENT_ID | ip ADDRESS     (asks a running server)
       agent_key_request.py --version | --help
SOURCE: SQLite, CSV, client.keys or an SQL script; without --db $AGENT_KEY_DB, else agents.db
beside the script. --timeout: 10 s for one request, 5 s for each that a server gets.
"""
FLAGS = ("--help", "--version", "--serve", "-v")
OPTIONS = ("--db", "--timeout", "--socket", "--mode", "--group", "--workers")


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
    """A function from LATER_ROOM."""
    exec(compile(LATER_ROOM, __file__, "exec"), globals())  # noqa: F821
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


def main(arguments):
    """Run the program; returns the exit status."""
    # The manager starts its programs with these blocked, and could not end a Python otherwise.
    pthread_sigmask(SIG_UNBLOCK, (SIGTERM, SIGINT, SIGHUP))
    signal(SIGINT, SIG_DFL)
    try:
        if "--serve" in arguments:
            return later("run_server")(arguments)
        options, words = parse_arguments(arguments)
        if "--help" in options or "--version" in options:
            posix.write(1, (HELP if "--help" in options else later("version")()).encode("ascii"))
        else:
            answer_once(options, words)
    except Reply as reply:
        posix.write(1, reply.line())
    except OSError:
        pass  # nobody takes the answer
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
