#!/bin/sh
''':'
loader='
import posix, sys
from _frozen_importlib_external import SourceFileLoader, cache_from_source
sys.argv = sys.argv[1:]
path = sys.argv[0]
loader = SourceFileLoader("__main__", path)
cache, status = cache_from_source(path), posix.stat(path)
# Python looks at the second of the last edit, which may be set; nobody can set this moment.
loader.path_stats = lambda _: {"mtime": status.st_ctime_ns & 0xFFFFFFFF, "size": status.st_size}
mask, code = posix.umask(0o022), None
places = path[:path.rfind("/") + 1] or ".", cache.rpartition("/")[0], cache
there = [place for place in places if posix.access(place, posix.F_OK)]
useful = cache in there or len(there) == 1 or posix.access(there[1] + "/", posix.W_OK)
if useful and not any(posix.stat(place).st_mode & 2 for place in there):
    try:  # else a stranger could have put it there
        code = loader.get_code("__main__")
    except Exception:
        loader.set_data(cache, b"")  # it is damaged: the next start makes it anew
code = code or loader.source_to_code(loader.get_data(path), path)
posix.umask(mask)
exec(code, {"__name__": "__main__", "__file__": path})
'
for python in python3 /usr/libexec/platform-python /var/ossec/framework/python/bin/python3; do
    command -v "$python" >/dev/null 2>&1 || continue
    case " $* " in  # a server starts once, and `ps` shows its command for years
    *" --serve "*) exec "$python" -IS "$0" "$@" ;;
    *) exec "$python" -IS -c "$loader" "$0" "$@" ;;
    esac
done
logger -t agent_key_request -p authpriv.err "no python3 on this host" >/dev/null 2>&1 &
case " $* " in
*" --serve "* | *" --import"* | *" --check "* | *" --enroll "*)
    echo "agent_key_request: error: no python3 on this host: install it" >&2
    exit 1 ;;
esac
echo '{"error": 9, "message": "Internal error: no python3 on this host: install it"}'
exit 0

/bin/sh reads the lines above, Python reads them as this text. With -I and -S nothing is imported
from this folder, the working directory, PYTHON* or site-packages. The loader has the compiled
program kept in __pycache__ beside this file: compiling is most of the cost of a start.

This program answers a Wazuh manager that asks for the key of an agent it does not know. The manager
runs `agent_key_request.py id 001` or `... ip 192.168.1.100`, or asks a running `--serve` on a unix
socket. One JSON object goes to standard output, nothing to standard error, and the exit status is 0
whatever happens, because the manager throws the output of any other status away (README.md).
'''
# ============================================================================ part one: a request
# It ends a request by argv whose source is a file. Starting is what costs, so it has bare modules:
# `os` is 5 M instructions more than `posix`, `signal` 19 M, `socket` 30 M, `sqlite3` 5 M.
import posix
import sys

if __name__ == "__main__" and not (sys.flags.isolated and sys.flags.no_site):
    posix.execv(sys.executable, [sys.executable, "-IS"] + sys.argv)  # before anything planted

import time
from _signal import (  # type: ignore
    ITIMER_REAL, SIG_DFL, SIG_UNBLOCK, SIGALRM, SIGHUP, SIGINT, SIGTERM,
    pthread_sigmask, setitimer, signal)
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

# -------------------------------------------------------------------------------------- constants

VERSION = "2.0.0"
STORE = "/var/lib/agent-key-request/agents.db"  # without --db and $AGENT_KEY_DB
NAME = "agent_key_request"  # before each line for people
SECONDS = 10.0  # for one request; the manager's own patience is 60 s
MESSAGES = {  # of an answer, by its error number; what ends with a space or colon takes a detail
    0: "key handed out: ", 1: "Too few arguments", 2: "Cannot read key source: ",
    3: "Bad arguments given", 4: "No agent key found", 5: "Found more than one match for required ",
    6: "Stored record is invalid: ", 9: "Internal error: "}
FOR_THE_OPERATOR = (0, 2, 5, 6, 9)  # the manager shows errors at debug level only

DIGITS = "0123456789"
NAME_LETTERS = DIGITS + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_."
FIELDS = ("id", "name", "ip", "key")  # the order in which every source gives a row
RULES = {  # what a field must be, in words; judge() has them in code
    "id": "id must be 3 to 8 digits, not 000, with no more zeros in front than three digits need",
    "name": "name must be 1 to 128 of A-Z a-z 0-9 - _ . and not start with a dot",
    "ip": "ip must be any, an address or a network (address/prefix) that the manager takes",
    "key": "key must be 1 to 128 printable ASCII characters"}
MISSING, BLANK = "\0", ("", "", "", "")  # a field that is not there breaks every rule; no agent

SQLITE_SAYS = ("database disk image is malformed", "disk I/O error",
               "file is not a database", "unable to open database file", "database or disk is full",
               "malformed database schema")
ROWS = "SELECT id, name, ip, agent_key FROM agent"

# -------------------------------------------------------------------------------------- the reply

class Reply(Exception):
    """The answer to a request; raised by whoever finds out that it is an error.
    number: the error, 0 for none (MESSAGES); detail: str that ends the message, for people, never
    with stored text in it; record: dict of str to hand out."""

    def __init__(self, number, detail="", record=None):
        super().__init__(number)
        self.number, self.record = number, record
        text = printable(MESSAGES[number] + detail)  # of one that is too long, both its ends
        self.message = text if len(text) <= 500 else text[:200] + " ... " + text[-295:]

    def line(self):
        """The bytes that go out, by either method."""
        content = {"data": self.record} if self.record else {"message": self.message}
        return to_json(dict(error=self.number, **content)).encode("ascii") + b"\n"

def is_printable(text):
    """Whether `text` is printable ASCII: of what is beyond it, a letter has several bytes."""
    return text.isprintable() and len(text.encode()) == len(text)

def printable(text):
    """`text` with a `?` for all that is not printable ASCII."""
    if is_printable(text):
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
    """An address or network as (number, width, prefix): an integer, 32 or 128, 0 to width, which
    is that of a single address. IPv4 mapped into IPv6 is IPv4. ValueError if it is neither."""
    address, slash, length = text.partition("/")
    try:
        packed = inet_pton(AF_INET6 if ":" in address else AF_INET, address)
        if len(packed) == 4 and "." in length:  # the manager would lose a netmask
            mask = "{:032b}".format(int.from_bytes(inet_pton(AF_INET, length), "big"))
            length = "" if "01" in mask else "%d" % mask.count("1")
    except OSError:
        raise ValueError("not an address") from None
    number, width = int.from_bytes(packed, "big"), 8 * len(packed)
    prefix = int(length) if is_text(length, DIGITS, 1, 3) else width
    if prefix > width or slash and length != "%d" % prefix:
        raise ValueError("not a prefix length")
    if number >> 32 == 0xFFFF and prefix >= 96:
        return number & 0xFFFFFFFF, 32, prefix - 96
    return number, width, prefix

def spell(number, width, prefix):
    """The one spelling of an address or network: inet_ntop's, without host bits."""
    number = number >> width - prefix << width - prefix
    text = inet_ntop(AF_INET if width == 32 else AF_INET6, number.to_bytes(width // 8, "big"))
    return text if prefix == width else "%s/%d" % (text, prefix)

def canonical(ip):
    """A stored ip (str) in its one spelling: address, network or `any`, for which none stands, too.
    ValueError if it is none of them, or one that the manager's own check (OS_IsValidIP) refuses."""
    try:
        inet_pton(AF_INET, ip)  # most are such an address, and so spelled
        return ip
    except OSError:
        pass
    if ip.lower() in ("", "any"):
        return "any"
    number, width, prefix = parse_network(ip)
    if width == 32 and not prefix:
        return "any"
    text = spell(number, width, prefix)
    if width == 128 and ("." in text or text.startswith("::/")):
        raise ValueError("the manager refuses it")
    return text

def text_of(value):
    """A stored value (text, bytes, number, null) as str, without the padding of CHAR columns."""
    if isinstance(value, str):
        return value.strip(" ")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("latin-1").strip(" ")  # what is beyond ASCII breaks every rule
    return "" if value is None else str(value)

def id_of(value):
    """The agent id in a stored value, as the manager writes it: number columns and spreadsheets
    eat its zeros, and REAL and DECIMAL columns add a fraction."""
    text = text_of(value)
    if not isinstance(value, str):
        whole, _, fraction = text.partition(".")
        text = text if fraction.strip("0") else whole
    return text.zfill(3) if text and not text.strip(DIGITS) else text

def is_text(value, letters, least, most):
    """Whether `value` is `least` to `most` of these letters."""
    return least <= len(value) <= most and not value.strip(letters)

def judge(row):
    """A stored row as (record, faults): the one place that decides what may reach the manager,
    which checks next to nothing. record: dict of str; faults: those of the RULES that it breaks."""
    agent, name, ip, key = row
    agent, name, ip = id_of(agent), text_of(name), text_of(ip)
    key = "" if isinstance(key, float) else text_of(key)  # a column for numbers has changed it
    try:
        ip = canonical(ip)
    except ValueError:
        ip = ""
    sound = (
        is_text(agent, DIGITS, 3, 8) and agent != "000" and (len(agent) == 3 or agent[0] != "0"),
        is_text(name, NAME_LETTERS, 1, 128) and name[0] != ".",
        ip,
        1 <= len(key) <= 128 and is_printable(key))
    faults = [] if all(sound) else [RULES[field] for field, ok in zip(FIELDS, sound) if not ok]
    return {"id": agent, "name": name, "ip": ip, "key": key}, faults

def agent_of(record):
    """`agent 001`; an id that is none is not shown: it may be a key in the wrong column."""
    agent = record["id"]
    return "agent " + (agent if is_text(agent, DIGITS, 1, 8) else
                       "with an id of %d characters" % len(agent))

# ------------------------------------------------------------------------ what a request looks for

def parse_request(words):
    """A request as (field, texts): the column to look in, and the texts that may stand there; the
    first is what is asked for. Of the spellings that a sound store can hold there are few.
    words: list of str, as anyone may have sent them. Raises Reply."""
    option, value = (list(words) + ["", ""])[:2]
    if not option or option in ("id", "ip") and not value:
        raise Reply(1)
    if option not in ("id", "ip"):
        raise Reply(3)
    if len(words) > 2:
        raise Reply(3, ": options go before %s" % option if words[2].startswith("-")
                    else ": more than an option and its value")
    if option == "id":
        if not is_text(value, DIGITS, 3, 8):
            raise Reply(3, ": an id has 3 to 8 digits")
        return option, [value[zeros:] for zeros in range(3 if len(value) == 3 else 1)
                        if not value[:zeros].strip("0")]
    try:
        number, width, prefix = parse_network("" if "/" in value else value)
    except ValueError:
        raise Reply(3, ": not an IP address") from None
    # Never `any` or /0: they do not say where the agent is, and a stray packet from anywhere would
    # enrol it again.
    networks = [spell(number, width, length) for length in range(prefix - 1, 0, -1)]
    address = spell(number, width, prefix)
    return option, [address, "%s/%d" % (address, prefix)] + networks

def best(rows, field, texts):
    """Those of `rows` that are asked for: more than one if they are equally good. Databases take
    more for equal than we do."""
    if field == "id":
        return [row for row in rows if id_of(row[0]) == texts[0]]
    ranks = {text: max(place, 1) for place, text in enumerate(texts)}  # the first two are equal
    ranked = [(ranks[text_of(row[2])], row) for row in rows if text_of(row[2]) in ranks]
    closest = min([rank for rank, _ in ranked], default=0)
    return [row for rank, row in ranked if rank == closest]

# -------------------------------------------------------------------------------- sources in files

def check_file(name):
    """The path, links followed, of a file that may serve as a key source, because only its owner,
    his group and root can have put an agent into it, or something in its place; raises Reply."""
    path, problem = name if "/" in name else "./" + name, ""
    try:
        if posix.stat(path).st_mode & 0o170000 != 0o100000:
            raise Reply(2, "%s: not a regular file" % name)
        for _ in range(40):  # links: as many as the kernel follows
            folder = path.rpartition("/")[0] + "/"
            if posix.stat(folder).st_mode & 0o002:
                problem = "its folder %s is writable by everybody: move it to another" % folder
            try:
                link = posix.readlink(path)
            except OSError:
                break
            path = link if link.startswith("/") else folder + link
        status = posix.stat(path)
        beside = [path + end for end in ("-wal", "-shm", "-journal")]  # SQLite reads them, too
        for file in [path] + [file for file in beside if posix.access(file, posix.F_OK)]:
            other = posix.stat(file)
            if other.st_mode & 0o002 or other.st_uid not in (0, status.st_uid):
                problem = "%s is writable by everybody, or somebody else's" % file
    except OSError as error:
        problem = error.strerror
    if problem:
        raise Reply(2, "%s: %s" % (name, problem))
    return path

def is_url(name):
    """Whether a source is a database on a server: part two."""
    return name[0] not in "/." and ("://" in name or name.startswith(("mysql:", "postgresql:")))

def is_script(name):
    """Whether a source is to be loaded into memory: part two."""
    return name.endswith(".sql") and not is_url(name)

def open_source(name, seconds, whole=None):
    """The source that `--db` names, for queries of up to `seconds`; raises Reply. whole: what the
    lines of a text are passed through, for an import.
    A source has `find(field, texts)`: list of rows, and `rows()`: iterator of (number, row); a row
    has the FIELDS, as they are stored."""
    if is_url(name):
        return Database(name, seconds)
    path = check_file(name)
    if is_script(name):
        return open_script(name, seconds, whole)
    with open(name, "rb", 0) as file:
        head = file.read(20)
    if not head.startswith(b"SQLite format 3\0"):
        return open_text(open(name, "rb"), name, whole)
    import _sqlite3  # `sqlite3` is 5 M instructions more, for names that nothing here needs
    # A WAL database wants files beside it, though it only reads; not if nobody is at work on it.
    frozen = head[19:] == b"\2" and not posix.access(path + "-wal", posix.F_OK) and (
        not posix.access(path.rpartition("/")[0] + "/", posix.W_OK))
    uri = "file:%s?mode=ro" % "".join(["%%%02X" % byte for byte in path.encode(
        sys.getfilesystemencoding(), "surrogateescape")])
    connection = _sqlite3.connect(uri + "&immutable=1" * frozen, uri=True, timeout=seconds,
                                  isolation_level=None)
    return SqliteSource(connection, name, seconds, frozen)

class SqliteSource:
    """The table or view `agent` of an SQLite connection. deadline: when a query is given up, in
    time.monotonic(); frozen: changes to the file do not show."""
    unit, scheme = "row", "sqlite"

    def __init__(self, connection, name, seconds, frozen=False):
        self.connection, self.name, self.frozen, self.typed = connection, name, frozen, None
        self.deadline = time.monotonic() + seconds
        connection.text_factory = lambda text: str(text, "latin-1")  # beyond ASCII breaks all rules
        connection.set_progress_handler(lambda: time.monotonic() > self.deadline, 100000)

    def query(self, sql, values=()):
        """Iterator of rows; raises Reply."""
        try:
            yield from self.connection.execute(sql, values)
        except Reply:
            raise
        except Exception as error:
            raise Reply(2, "%s: %s" % (self.name, reason_of(error))) from None

    def find(self, field, texts):
        """The rows in which the field is one of the texts, or the number that an id is, unless the
        column has a type that decides which of them it holds."""
        if field == "id" and self.typed is None:
            types = {column[1].lower(): column[2].upper()
                     for column in self.query("PRAGMA table_info(agent)")}
            self.typed = types.get("id", "") not in ("", "ANY") and "BLOB" not in types["id"]
        values = texts if field == "ip" or self.typed else texts + [int(texts[0])]
        return list(self.query(query_for(field, "?", len(values)), values))

    def rows(self):
        """Iterator of (row number, row)."""
        return enumerate(self.query(ROWS), 1)

def query_for(field, mark, count):
    """The query of every database; mark: what its driver wants in the place of a parameter."""
    return "%s WHERE %s IN (%s)" % (ROWS, field, ", ".join([mark] * count))

def reason_of(error):
    """What SQLite says of a failure, if it is one of those that quote nothing stored."""
    text = str(error)
    if text in ("interrupted", "database is locked"):
        return "%sno answer in time (--timeout)" % ("locked by others, " * (text[0] == "d"))
    if text.startswith(("no such table", "no such column")):
        return "it lacks a table or view agent(id, name, ip, agent_key)"
    text = text.partition(" (")[0]
    return text if text in SQLITE_SAYS else "SQLite cannot read it"

class TextSource:
    """Agents in a text file, which is read once. parsed: iterator of one row for each line, from
    the number `first` on; agent_in: gives a row as it is to be, or None for no agent."""
    unit = "line"

    def __init__(self, parsed, first, agent_in):
        self.parsed, self.first, self.agent_in = parsed, first, agent_in

    def find(self, field, texts):
        """The rows in which the field is one of the texts."""
        place, wanted = FIELDS.index(field), set(texts)
        found = [row for row in self.parsed if row[place] in wanted]
        return list(filter(None, map(self.agent_in, found)))

    def rows(self):
        """Iterator of (line number, row)."""
        for number, row in enumerate(self.parsed, self.first):
            agent = self.agent_in(row)
            if agent:
                yield number, agent

def client_keys(lines):
    """The rows of a manager's client.keys."""
    for line in lines:
        row = line.split(" ", 3)
        yield row if len(row) == 4 else line.rstrip("\r\n").split(" ") + [MISSING] * 3

def agent_in_keys(row):
    """A row of client.keys, None for a comment or a removed agent."""
    if row[0][:1] in ("", "#") or row[1][:1] in ("!", "#"):
        return None
    return row[:3] + [row[3].rstrip("\r\n")]

def delimited(lines, name, header, delimiter, places, width):
    """The rows of CSV, or of what `mysql --batch` writes, after `header` lines; raises Reply.
    places: of the FIELDS among the columns; width: how many columns there are."""
    import csv
    from operator import itemgetter
    tabs, pick = delimiter == "\t", itemgetter(*places)
    csv.field_size_limit(sys.maxsize)  # somebody else's long field must not end the reading
    reader = csv.reader(lines, delimiter=delimiter, strict=True,
                        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    number = 0
    try:
        for fields in reader:
            # A quote swallowed the agents after it; or a NUL, which csv takes from 3.11 on only.
            if reader.line_num != number + 1 or "\0" in "".join(fields):
                raise csv.Error
            number += 1
            row = pick(fields if len(fields) >= width else fields + [MISSING] * width)
            if len(fields) > width and any(fields[width:]):
                row = row[:3] + (MISSING,)  # a key may have been cut at a delimiter in it
            yield BLANK if not fields else [unescaped(field) for field in row] if tabs else row
    except csv.Error:
        raise Reply(2, "%s: line %d: a broken quote, a row that spans lines, or a NUL" % (
            name, header + number + 1)) from None

def unescaped(field):
    """A tab-separated field without a spreadsheet's quotes or the escapes of `mysql --batch`."""
    if field[:1] == '"' == field[-1:] and len(field) > 1:
        field = field[1:-1].replace('""', '"')
    parts = field.split("\\\\") if field not in ("NULL", "\\N") else []
    for place, part in enumerate(parts):
        parts[place] = part.replace("\\t", "\t").replace("\\n", "\n").replace("\\0", "\0")
    return "\\".join(parts)

def open_text(stream, name, whole):
    """The source in a text file, told by its first line that is neither blank nor a comment."""
    import csv
    from io import TextIOWrapper
    from itertools import chain
    line = stream.readline().decode("latin-1")
    head = [line[3:] if line.startswith("\xef\xbb\xbf") else line]  # without a BOM
    while head[-1] and head[-1][0] in "# \r\n":
        head.append(stream.readline().decode("latin-1"))
    first, is_csv = head[-1].strip("\r\n"), False
    for delimiter in ",;\t":
        try:
            columns = next(csv.reader([first.lower()], delimiter=delimiter))
        except csv.Error:
            continue
        columns = [column.strip(" ") for column in columns]
        is_csv = "id" in columns
        if is_csv:
            break
    lines = TextIOWrapper(stream, encoding="latin-1", newline="" if is_csv else "\n")
    whole = whole or (lambda lines, _: lines)
    if is_csv:
        wanted = ["id", "name", "ip", "key" if "key" in columns else "agent_key"]
        if [columns.count(column) for column in wanted] != [1, 1, 1, 1]:
            raise Reply(2, "%s: its header needs id, name, ip and key (or agent_key) once" % name)
        places = [columns.index(column) for column in wanted]
        rows = delimited(whole(lines, head), name, len(head), delimiter, places, len(columns))
        return TextSource(rows, len(head) + 1, lambda row: None if row is BLANK else row)
    words = first.split(" ", 3) + [""] * 3
    is_agent = words[3] and (not words[0].strip(DIGITS) or words[2] == "any" or (
        "." in words[2] or ":" in words[2]) and not words[2].strip(DIGITS + "abcdefABCDEF.:/"))
    if is_agent or name.endswith(".keys") or not first and "".join(head).strip():
        return TextSource(client_keys(whole(chain(head, lines), [])), 1, agent_in_keys)
    raise Reply(2, "%s: %s" % (name, "no SQLite database, CSV with a header (id, name, ip, key), "
                               "client.keys or script named .sql" if first else "it is empty"))

# -------------------------------------------------------------------------------------- the answer

def look_up(words, find_source):
    """The Reply with the record asked for; raises the Reply for an error."""
    field, texts = parse_request(words)
    rows = best(find_source().find(field, texts), field, texts)
    if len(rows) != 1:
        raise Reply(5, field) if rows else Reply(4)
    record, faults = judge(rows[0])
    if faults:
        raise Reply(6, "%s: %s" % (agent_of(record), faults[0]))
    return Reply(0, agent_of(record), record)

def answer(words, find_source, name="the source"):
    """The Reply to a request, by either method; never raises for what it asks or finds.
    words: list of str, as anyone may have sent them; find_source: gives the source; name: of it."""
    try:
        return look_up(words, find_source)
    except Reply as reply:
        return reply
    except ImportError as error:
        return Reply(2, without_module(error))
    except OSError as error:
        return Reply(2, "%s: %s" % (error.filename or name, error.strerror))
    except Exception as error:
        return unforeseen(error)

def without_module(error):
    """What to do about a Python that is not whole, such as that of Debian's python3-minimal."""
    return "%s has no module %s: install the whole of python3 (Debian: the package python3)" % (
        sys.executable, error.name)

def unforeseen(error):
    """The Reply for an exception that nobody has foreseen; its own text could hold a key."""
    trace, line = error.__traceback__, 0
    while trace:
        if trace.tb_frame.f_code.co_filename == unforeseen.__code__.co_filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    what = getattr(error, "strerror", None) or type(error).__name__
    return Reply(9, "%s in line %d of the script" % (what, line))

# ----------------------------------------------------------------------------------- command line

VALUES = {  # what the options with a value take; part two knows which option goes with what
    "--db": "SOURCE", "--timeout": "SECONDS", "--socket": "PATH", "--mode": "MODE",
    "--group": "NAME", "--workers": "NUMBER", "--import": "SOURCE", "--manager": "HOME"}

def split_command_line(arguments):
    """The command line as (options, words): a dict of str, and the list of str that follows."""
    options, words = {}, list(arguments)
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).partition("=")
        if name in VALUES and not equals and words and (words[0] == "-" or words[0][:1] != "-"):
            value = words.pop(0)
        options[name] = value
    return options, words

def number_of(options, name, default):
    """A numeric option: a float, more than 0 and at most 3600, or 0 for what is none."""
    text = str(options.get(name, default))
    number = float(text) if is_text(text.replace(".", "", 1), DIGITS, 1, 8) else 0.0
    return number if number <= 3600 else 0.0

def say(stream, text):
    """A line for people, on 1, or on 2, where it may be lost; raises OSError for 1."""
    try:
        posix.write(stream, printable(text).encode("ascii") + b"\n")
    except OSError as error:
        if stream == 1:
            raise OSError(error.errno, error.strerror, "standard output") from None

def tell_syslog(is_error, text):
    """A line to syslog, where an administrator looks for what the manager does not tell him."""
    import syslog
    signal(SIGALRM, lambda *_: None)
    setitimer(ITIMER_REAL, 1, 0.5)  # or a log that nobody reads would hold us here for ever
    syslog.openlog(NAME, syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_ERR if is_error else syslog.LOG_INFO, printable(text))

def answer_once(words, name, seconds):
    """The executable method: answers on standard output, then tells syslog."""
    def give_up(*_):
        raise Reply(2, "%s: no answer in time (--timeout)" % name)
    signal(SIGALRM, give_up)
    setitimer(ITIMER_REAL, seconds)
    try:
        reply = answer(words, lambda: open_source(name, seconds * 0.9), name)
        setitimer(ITIMER_REAL, 0)
    except Reply as late:
        reply = late
    try:
        posix.write(1, reply.line())
        if reply.number == 1 and posix.isatty(2):
            say(2, "%s: --help tells what it takes" % NAME)
    except OSError:
        pass  # nobody takes the answer
    if reply.number in FOR_THE_OPERATOR:
        tell_syslog(reply.number, "%s: %s" % (" ".join(words), reply.message))

def begin(arguments):
    """Answer, and leave, if it is a request to a file in plain words; else returns what part two
    needs: (options, words, name of the source)."""
    while posix.open("/dev/null", posix.O_RDWR) < 3:
        pass  # a descriptor that is closed would become a store, and get our messages
    # The manager starts its programs with these blocked, and could not end a Python otherwise.
    pthread_sigmask(SIG_UNBLOCK, (SIGTERM, SIGINT, SIGHUP))
    signal(SIGINT, SIG_DFL)
    options, words = split_command_line(arguments)
    named = posix.environ.get(b"AGENT_KEY_DB", b"").decode("ascii", "surrogateescape")
    name, seconds = options.get("--db") or named or STORE, number_of(options, "--timeout", SECONDS)
    if set(options) <= {"--db", "--timeout"} and all(options.values()) and seconds and (
            not is_url(name) and not is_script(name)):
        answer_once(words, name, seconds)
        posix._exit(0)  # an orderly end of the interpreter costs 7 M, for nothing
    try:
        import _sqlite3  # noqa: F401
    except ImportError as error:  # then part two would lack more modules
        reply = Reply(2, without_module(error))
        posix.write(*(1, reply.line()) if words else (2, reply.message.encode("ascii") + b"\n"))
        posix._exit(0 if words else 1)
    return options, words, name

if __name__ == "__main__":
    given = begin(sys.argv[1:])

# ========================================================================= part two: all the rest
import socketserver
import contextlib
import errno
import fcntl
import grp
import json
import mmap
import os
import re
import select
import shlex
import signal as signals
import site
import socket
import sqlite3
import stat
import struct
import subprocess
import zlib
from _signal import SIG_BLOCK, SIG_IGN
from _socket import socket as BareSocket
from difflib import get_close_matches
from hashlib import sha256
from importlib import import_module
from urllib.parse import parse_qsl, quote, unquote

NOBODY = "00000000"         # an id that no agent has

class Trouble(Exception):
    """What keeps a person's command from its work: told on stderr, with exit status 1."""

# ---------------------------------------------------------------------------- databases and scripts

DRIVERS = {"mysql": ("MySQLdb", "mysql.connector", "pymysql"),
           "postgresql": ("psycopg", "psycopg2")}
READ_ONLY = {"mysql": "SET SESSION TRANSACTION READ ONLY",
             "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"}
INDEXED = {  # SQL for the first column of each index; * for a view, which has none
    "sqlite": "SELECT info.name FROM pragma_index_list('agent') AS list, pragma_index_info("
              "list.name) AS info WHERE seqno = 0 AND NOT partial UNION SELECT name FROM "
              "pragma_table_info('agent') WHERE pk = 1 UNION SELECT '*' FROM sqlite_master "
              "WHERE name = 'agent' AND type = 'view'",
    "mysql": "SELECT column_name FROM information_schema.statistics WHERE table_name = 'agent' "
             "AND table_schema = database() AND seq_in_index = 1 UNION SELECT '*' FROM "
             "information_schema.views WHERE table_name = 'agent' AND table_schema = database()",
    "postgresql": "SELECT CAST(attname AS TEXT) FROM pg_index JOIN pg_attribute ON attrelid = "
                  "indrelid AND attnum = indkey[0] WHERE indrelid = 'agent'::regclass UNION SELECT "
                  "'*' FROM pg_class WHERE oid = 'agent'::regclass AND relkind = 'v'"}
URL = re.compile(r"(mysql|postgresql)://(?:([^:@/?#]*)@)?(\[[^]@/?#]*\]|[^:@/?#]*)"
                 r"(?::([0-9]{1,5}))?(?:/([^@/?#]*))?(?:\?([^@#]*))?\Z")  # no place for a password

def parse_url(url):
    """A database's URL as (scheme, what people may see of it, dict for connect()); raises Reply."""
    match = URL.match(url)
    scheme, user, host, port, name, query = match.groups("") if match else [""] * 6
    options = {"user": unquote(user), "host": unquote(host.strip("[]")), "port": port and int(port),
               "database" if scheme == "mysql" else "dbname": unquote(name)}
    options.update(parse_qsl(query.replace("+", "%2B")))
    if not match or "%3a" in (user + host).lower() or any(
            "passw" in name.lower() or "local_infile" in name.lower() for name in options):
        raise Reply(2, "a URL is mysql://user@host/database or postgresql://user@host/database, "
                    "special characters percent-encoded, without a password, which `ps` would show:"
                    " it goes into a file, ?read_default_file=FILE (MySQL) or ?passfile=FILE")
    shown = "%s://%s%s/%s" % (scheme, user and user + "@", host, name)
    return scheme, shown, {name: value for name, value in options.items() if value}

class Database:
    """The table or view `agent` of a MySQL, MariaDB or PostgreSQL server. It connects when it is
    first asked, and anew when the connection has broken. An alarm ends what takes longer than
    `seconds`; drivers that it does not get through to have time-outs of their own."""
    unit = "row"

    def __init__(self, url, seconds):
        self.scheme, self.name, self.options = parse_url(url)
        self.seconds, self.connection, self.driver = seconds, None, self.find_driver()
        limit = int(seconds) or 1
        self.options.setdefault("connect_timeout", limit)
        os.environ.setdefault("RES_OPTIONS", "timeout:%d attempts:1" % limit)  # of getaddrinfo
        if self.driver.__name__ == "mysql.connector":
            self.options.update(autocommit=True, use_pure=True, allow_local_infile=False)
        elif self.scheme == "mysql":
            self.options.update(autocommit=True, local_infile=0, read_timeout=limit,
                                write_timeout=limit)
        signal(SIGALRM, self.give_up)

    def find_driver(self):
        """The DB-API module, from the system's packages and nowhere else; raises Reply."""
        sys.path += [path for path in site.getsitepackages() if path not in sys.path]
        for name in DRIVERS[self.scheme]:
            try:
                driver = import_module(name)
            except ImportError:
                continue
            if name == "psycopg2":  # an alarm would not get through to its C
                driver.extensions.set_wait_callback(import_module("psycopg2.extras").wait_select)
            return driver
        raise Reply(2, "%s: install one of %s from the system's packages, or copy the keys with "
                    "--import" % (self.name, ", ".join(DRIVERS[self.scheme])))

    def give_up(self, *_):
        """The handler of the alarm."""
        raise Reply(2, "%s: no answer in time (--timeout)" % self.name)

    def execute(self, sql, values):
        """List of rows, in a session that only reads."""
        if self.connection is None:
            self.connection = self.driver.connect(**self.options)
            if self.scheme == "postgresql":
                self.connection.autocommit = True
            self.connection.cursor().execute(READ_ONLY[self.scheme])
        cursor = self.connection.cursor()
        cursor.execute(sql, values)
        return list(cursor)

    def query(self, sql, values=None):
        """List of rows; raises Reply, without what a driver quotes: that could be stored text."""
        end, kept = time.monotonic() + self.seconds, self.connection
        setitimer(ITIMER_REAL, self.seconds)
        try:
            try:
                return self.execute(sql, values)
            except self.driver.Error:
                if not kept or time.monotonic() > end - 0.1:
                    raise
                self.connection = None
            return self.execute(sql, values)  # the connection that was kept had broken
        except Exception as error:
            connected, self.connection = self.connection, None
            if isinstance(error, Reply) or time.monotonic() > end - 0.1:
                self.give_up()
            text = " ".join(max(map(str, error.args), key=len, default="").split())
            text = re.sub("(['\"]).*?\\1", "...", text)  # or a line of the file with the password
            if connected:  # the database's words could be stored text
                text = ("it lacks a table or view agent(id, name, ip, agent_key), or this user the "
                        "right to read it (%s)" % type(error).__name__)
            raise Reply(2, "%s: %s" % (self.name, text)) from None
        finally:
            setitimer(ITIMER_REAL, 0)

    def find(self, field, texts):
        """The rows in which the field is one of the texts."""
        return self.query(query_for(field, "%s", len(texts)), tuple(texts))

    def rows(self):
        """Iterator of (row number, row)."""
        return enumerate(self.query(ROWS), 1)

SQL_COMMENT = r"--[^\n]*|/\*.*?\*/"
SQL_TOKEN = re.compile("'[^']*'|\"[^\"]*\"|`[^`]*`|\\[[^]]*\\]|;|" + SQL_COMMENT, re.DOTALL)

def open_script(name, seconds, whole):
    """The source in an SQL script, loaded into memory statement by statement; raises Reply. whole:
    for an import, whether its last statement must have an end."""
    with open(name, encoding="latin-1", newline="") as file:
        script = file.read() + ("" if whole else "\n;")
    source = SqliteSource(sqlite3.connect(":memory:", isolation_level=None), name, seconds)
    source.connection.set_authorizer(lambda action, *_: action == sqlite3.SQLITE_ATTACH)  # refuse
    start, problem = 3 * script.startswith("\xef\xbb\xbf"), "a statement without an end"  # a BOM
    for token in SQL_TOKEN.finditer(script):
        try:
            statement = script[start:token.end()] if token.group() == ";" else ""
            if statement and sqlite3.complete_statement(statement):  # not so within a trigger
                source.connection.execute(statement)
                start = token.end()
        except (ValueError, sqlite3.Error, sqlite3.Warning) as error:
            problem = reason_of(error) if str(error) == "interrupted" else "SQLite cannot run this"
            break
    start = re.compile(r"(\s|%s)*" % SQL_COMMENT, re.DOTALL).match(script, start).end()
    if start < len(script) or whole and source.connection.in_transaction:
        raise Reply(2, "%s: line %d: %s" % (name, script.count("\n", 0, start) + 1, problem))
    return source

# ------------------------------------------------------------------------------------- the server

SOCKET = "/run/agent-key-request/socket"
WORKERS = 8                 # more than processors: a silent client or a slow database holds one
SERVER_SECONDS = 5.0        # for each request
REQUEST_LENGTH = 128        # bytes; the manager's longest is `ip:` and 39
PATIENCE, LITTLE = 1.0, 0.05  # seconds for a silent client; for the next one after him
DRAIN = 15.0                # seconds for those who wait when the server stops
REPEAT, LINES = 60, 4096    # seconds in which the same line is logged once, and how many are known
RETIRE, LOOK = signals.SIGUSR1, signals.SIGUSR2  # what the parent tells its workers
SIGNALS = (SIGTERM, SIGINT, SIGHUP, signals.SIGCHLD, RETIRE, LOOK)

class Log:
    """Lines on stderr, of all processes of a server: what was written stands in a table that they
    share, of one size, so that a flood fills neither the log nor the memory."""

    def __init__(self, verbose):
        self.verbose, self.table, status = verbose, mmap.mmap(-1, 8 * LINES), os.fstat(2)
        in_journal = os.environ.get("JOURNAL_STREAM") == "%d:%d" % (status.st_dev, status.st_ino)
        self.prefixes = ("<6>", "<3>") if in_journal else (NAME + ": info: ", NAME + ": error: ")
        os.set_blocking(2, os.isatty(2))  # who does not read the log must not stop the server

    def write(self, is_error, text):
        """A line, unless the same was written within the last minute."""
        line = (self.prefixes[bool(is_error)] + printable(text)).encode("ascii") + b"\n"
        stamp, now = zlib.crc32(line), int(time.monotonic())
        place = stamp % LINES * 8
        last, when = struct.unpack_from("II", self.table, place)
        if last != stamp or now - when >= REPEAT or self.verbose:
            struct.pack_into("II", self.table, place, stamp, now)
            try:
                os.write(2, line)
            except OSError:
                pass

class Memory:
    """The agents of a text source or script, by id and by ip."""

    def __init__(self, source):
        self.tables = {"id": {}, "ip": {}}
        for _, row in source.rows():
            for field, table in self.tables.items():
                table.setdefault(str(row[FIELDS.index(field)]), []).append(tuple(row))

    def find(self, field, texts):
        """The rows in which the field is one of the texts."""
        return [row for text in texts for row in self.tables[field].get(text, ())]

class Conversation(socketserver.BaseRequestHandler):
    """One connection: a request, an answer, the end."""

    def handle(self):
        """Answer; whatever a client does, it does not keep a worker."""
        received, log = self.receive(), self.server.log
        if not received:
            return
        words = received.rstrip(b"\r\n\0").decode("latin-1").split(":", 1)
        reply = Reply(3, ": more than %d bytes" % REQUEST_LENGTH)
        if len(received) <= REQUEST_LENGTH:
            reply = answer(words, self.server.find_source)
        try:
            self.request.sendall(reply.line())  # far less than a socket holds: it does not wait
        except OSError:
            pass  # it has gone
        if reply.number == 2:
            self.server.source = None  # opened anew for the next one
        if reply.number in FOR_THE_OPERATOR or log.verbose:
            whose = "" if reply.number == 2 and not log.verbose else ":".join(words) + ": "
            log.write(reply.number not in (0, 4), whose + reply.message)

    def receive(self):
        """What the client says until there is a `:`, in bytes. The manager sends at once."""
        received, end = b"", 0.0
        while b":" not in received and len(received) <= REQUEST_LENGTH:
            try:
                piece = self.request.recv(REQUEST_LENGTH + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                end = end or time.monotonic() + self.server.patience
                if select.select([self.request], [], [], max(0, end - time.monotonic()))[0]:
                    continue
                self.server.patience = LITTLE
                return received
            except OSError:
                return received
            if not piece:
                return received
            received += piece
        self.server.patience = PATIENCE
        return received

class Server(socketserver.UnixStreamServer):
    """The listening socket, the parent that starts, replaces and ends workers, and what they do."""

    request_queue_size = 65535  # the kernel cuts it to net.core.somaxconn; connect never times out
    path = memory = source = stamp = None  # path: of a socket of our own
    patience, ending = PATIENCE, False

    def __init__(self, path, name, options):
        super().__init__(path, Conversation, bind_and_activate=False)
        self.name, self.log, self.workers = name, Log("-v" in options), {}
        self.seconds = number_of(options, "--timeout", SERVER_SECONDS)
        self.count = int(number_of(options, "--workers", WORKERS)) or 1

    def listen(self, mode, group):
        """Listen on a socket born with its mode and group: no chmod, no race. Its path is locked
        until the last of our processes ends. Raises Trouble or OSError."""
        path, folder = self.server_address, os.path.dirname(self.server_address) or "."
        if path == SOCKET and not os.path.isdir(folder):
            os.mkdir(folder, 0o755)
        if not os.path.isdir(folder):
            raise Trouble("the folder %s is missing" % folder)
        if len(os.fsencode(path)) > 107:
            raise Trouble("%s: too long for a socket (107 bytes)" % path)
        own = os.getegid()
        try:
            os.setegid(grp.getgrnam(group).gr_gid if group else own)
        except (KeyError, PermissionError):
            raise Trouble("--group %s: there is no such group, or it is none of this user's"
                          % group) from None
        lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Trouble("%s: a server is already running there, process %s" % (
                path, os.read(lock, 20).decode("latin-1"))) from None
        os.ftruncate(lock, 0)
        os.write(lock, b"%d" % os.getpid())
        if os.path.lexists(path):
            self.socket.setblocking(False)
            if not stat.S_ISSOCK(os.lstat(path).st_mode) or (
                    self.socket.connect_ex(path) != errno.ECONNREFUSED):
                raise Trouble("%s: another program listens there, or it is no socket" % path)
            os.unlink(path)
        mask = os.umask(0o777 & ~int(mode, 8))
        self.server_bind()
        self.server_activate()
        os.setegid(own)
        os.umask(mask)
        self.path, self.inode = path, os.stat(path).st_ino

    def load(self):
        """For the parent: see that the source can be read, and read a text or script to its end,
        once: a worker could meet it half-written. Raises Reply or OSError; what there was stays."""
        source = open_source(self.name, self.seconds)
        if isinstance(source, TextSource) or is_script(self.name):
            self.memory = Memory(source)
        else:
            source.find(*parse_request(["id", NOBODY]))
            self.memory = None

    def find_source(self):
        """For a worker: the source as it is now; raises Reply or OSError."""
        if self.memory:
            return self.memory
        if not is_url(self.name):
            status = os.stat(self.name)  # nobody can set st_ctime, so that no other file has these
            stamp = status.st_dev, status.st_ino, status.st_ctime_ns
            if stamp != self.stamp or self.source and self.source.frozen:
                self.source, self.stamp = None, stamp
        if self.source is None:
            source = None if is_script(self.name) else open_source(self.name, self.seconds)
            if source is None or isinstance(source, TextSource):
                raise Reply(2, "%s: not read yet: a server reads it at SIGHUP" % self.name)
            self.source = source
        self.source.deadline = time.monotonic() + self.seconds
        return self.source

    def work(self, parent):
        """Answer one by one, until the socket is closed or shut down or the parent ends."""
        while os.getppid() == parent:
            try:
                connection, address = self.get_request()
            except BlockingIOError:  # nobody came for a second (SO_RCVTIMEO)
                continue
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                raise
            self.finish_request(connection, address)
            connection.close()

    def get_request(self):
        """As socketserver's, but for the bare module's socket: a tenth of the cost of an answer."""
        descriptor, address = self.socket._accept()
        return BareSocket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor), address

    def start_worker(self):
        """Fork a worker. workers: whether each, by its process id, is to be replaced if it ends."""
        parent = os.getpid()
        process = os.fork()
        if process:
            self.workers[process] = True
            return
        try:
            for number in (SIGTERM, SIGINT, SIGHUP):
                signal(number, SIG_IGN)  # which a terminal sends to all; the parent decides
            signal(RETIRE, lambda *_: self.socket.close())  # a retried accept fails then
            signal(LOOK, lambda *_: None)  # a retried accept sees that the socket was shut down
            pthread_sigmask(SIG_UNBLOCK, SIGNALS)
            self.work(parent)
        except BaseException as error:
            self.log.write(True, "worker %d: %s" % (os.getpid(), unforeseen(error).message))
        finally:
            os._exit(1)

    def keep_workers(self):
        """Start as many as are missing; the system may have no room for one."""
        try:
            while sum(self.workers.values()) < self.count:
                self.start_worker()
        except OSError as error:
            self.log.write(True, "no worker can be started: %s" % error.strerror)

    def collect(self):
        """See which workers have ended, and tell of those that should not have."""
        for _ in list(self.workers):
            process, status = os.waitpid(-1, os.WNOHANG)
            if self.workers.pop(process, False) and not self.ending:
                how = "signal %d" % (status & 127) if status & 127 else "status %d" % (status >> 8)
                self.log.write(True, "worker %d ended, %s; another replaces it" % (process, how))
                time.sleep(0.05)  # or workers that end at once would take all the processors

    def reload(self):
        """Read the source again, and replace all workers; if it cannot be read, go on as before."""
        try:
            self.load()
        except (Reply, OSError) as problem:
            self.log.write(True, message_of(problem))
            return
        old, self.workers = self.workers, dict.fromkeys(self.workers, False)
        self.keep_workers()
        for process in old:
            os.kill(process, RETIRE)
        self.log.write(False, "source %s read again" % self.name)

    def run(self):
        """Serve until SIGTERM or SIGINT, or, on a terminal, until it hangs up."""
        ends, number = (SIGTERM, SIGINT, SIGHUP if os.isatty(2) else SIGTERM), None
        self.keep_workers()
        self.log.write(False, "ready: %d workers on %s, source %s" % (
            self.count, self.server_address, self.name))
        notify(b"READY=1")
        while number not in ends:
            happened = signals.sigtimedwait(SIGNALS, 1)
            number = happened.si_signo if happened else None
            self.collect()
            if number == SIGHUP and number not in ends:
                self.reload()
            self.keep_workers()
        self.stop()

    def stop(self):
        """End the workers, once they have answered all who have connected."""
        self.ending, end = True, time.monotonic() + DRAIN
        notify(b"STOPPING=1")
        kept = not self.path and "INVOCATION_ID" in os.environ  # by systemd, with all in its queue
        if self.path and os.path.exists(self.path) and os.stat(self.path).st_ino == self.inode:
            os.unlink(self.path)
        if not kept:
            self.socket.shutdown(socket.SHUT_RD)  # nobody more connects
        self.log.write(False, "stopping")
        for process in self.workers:
            os.kill(process, RETIRE if kept else LOOK)
        while self.workers and time.monotonic() < end:
            signals.sigtimedwait({signals.SIGCHLD}, 0.1)
            self.collect()
        for process in self.workers:
            os.kill(process, signals.SIGKILL)

def notify(state):
    """Tell systemd, if it is there ($NOTIFY_SOCKET: a path, or @ and an abstract name)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
        try:
            messenger.sendto(state, re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]))
        except (KeyError, OSError):
            pass

def serve(options, name):
    """Run the server to its end; raises Reply, Trouble or OSError if it cannot start."""
    pthread_sigmask(SIG_BLOCK, SIGNALS)  # the parent waits for them
    server = Server(options.get("--socket", SOCKET), name, options)
    passed = (os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")) == (str(os.getpid()), "1")
    try:
        server.load()
    except (Reply, OSError) as problem:
        if not passed:
            raise
        server.log.write(True, message_of(problem))  # and who waits in the queue is told, too
    if passed:
        server.socket.close()
        server.socket = socket.socket(socket.AF_UNIX, fileno=3)
        server.server_address = server.socket.getsockname()
    else:
        server.listen(options.get("--mode", "0600"), options.get("--group"))
    server.socket.setblocking(True)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 1, 0))
    server.run()

def ask_server(path, words, seconds):
    """Ask a running server as the manager would: the line that answers, in bytes, in any case."""
    try:
        parse_request(words)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(path)
            connection.sendall(":".join(words).encode("ascii"))
            return connection.recv(65536) or Reply(2, "%s closed without an answer" % path).line()
    except Reply as reply:
        return reply.line()
    except OSError as error:
        return Reply(2, "no server answers at %s: %s" % (path, error.strerror or error)).line()

# ------------------------------------------------------------------------------- keeping the store

APPLICATION_ID = 0x414B5251  # in the header of a store that an import made
TABLE = """CREATE TABLE agent (id VARCHAR(8) NOT NULL, name VARCHAR(128) NOT NULL,
    ip VARCHAR(64) NOT NULL, agent_key VARCHAR(128) NOT NULL)"""
BUILD = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -30000; " \
        "PRAGMA application_id = %d; %s" % (APPLICATION_ID, TABLE)
INDEX = "CREATE INDEX agent_%s ON agent (%s)"
TWICE = """SELECT agent.rowid, id, first FROM (SELECT {0} AS value, min(rowid) AS first FROM agent
    WHERE {0} NOT IN ('', '{1}') GROUP BY {0} HAVING count(*) > 1) CROSS JOIN agent ON
    agent.{0} = value WHERE agent.rowid > first"""
FINDINGS = 100              # that are told one by one

class Report:
    """What is found in a source, line by line or kept for JSON, and on a terminal how far it has
    come. store: SQLite connection with the agents that were copied, None before."""

    def __init__(self, stream, as_json=False):
        self.stream, self.as_json, self.findings, self.due = stream, as_json, [], 0.0
        self.agents, self.count, self.store = 0, {"error": 0, "note": 0, "info": 0}, None
        self.terminal = os.isatty(2)

    def tell(self, level, text):
        """A finding. level: `error` for what makes a request fail, `note`, or `info` for none."""
        self.count[level] += 1
        if level == "info" or self.count["error"] + self.count["note"] <= FINDINGS:
            self.findings.append({"level": level, "text": text})
            if not self.as_json:
                say(self.stream, text if level == "info" else "%s: %s" % (level, text))

    def end(self):
        """Say how many findings were not told."""
        more = self.count["error"] + self.count["note"] - FINDINGS
        if more > 0:
            self.tell("info", "... and %d more" % more)

    def progress(self):
        """Show how far it has come, at most five times a second; 0 for SQLite: go on."""
        if self.terminal and time.monotonic() > self.due:
            os.write(2, b"%d agents\r" % self.agents)
            self.due = time.monotonic() + 0.2
        return 0

    def records(self, source, notes_on=None):
        """Iterator of (line or row number, record) of a source, telling what is wrong: a field
        that breaks a rule is empty then. notes_on: gives what else to tell of a sound record."""
        source.deadline = time.monotonic() + 86400  # for all of them
        for number, row in source.rows():
            self.agents += 1
            self.progress()
            record, faults = judge(row)
            if faults or notes_on:
                where = "%s %d: %s: " % (source.unit, number, agent_of(record))
                for level, text in [("error", fault) for fault in faults] or notes_on(row, record):
                    self.tell(level, where + text)
            for fault in faults:
                record[fault.split()[0]] = ""
            yield number, record

    def copy(self, source, path="", notes_on=None):
        """Copy the agents of a source into a new SQLite database, and tell of those who have the
        id, the name or the address of an earlier one. path: of an empty file; "": a temporary."""
        store = sqlite3.connect(path)
        store.set_progress_handler(self.progress, 100000)
        store.executescript(BUILD)
        store.executemany(
            "INSERT INTO agent (rowid, id, name, ip, agent_key) VALUES (?, ?, ?, ?, ?)",
            ((number, *record.values()) for number, record in self.records(source, notes_on)))
        for field in ("id", "name", "ip"):
            store.execute(INDEX % (field, field))
            for number, agent, first in store.execute(TWICE.format(field, "any" * (field == "ip"))):
                self.tell("error", "%s %d: %s: %s is already that of %s %d" % (
                    source.unit, number, agent_of({"id": agent}), field, source.unit, first))
        store.commit()
        self.store = store

def counted(number, what):
    """`1 agent`, `2 agents`."""
    return "%d %s%s" % (number, what, "s" * (number != 1))

def whole(lines, before):
    """The lines of a file that is imported: who writes it may have died, or be within the last.
    before: the list of the lines that were read already."""
    number, line = len(before), (before or [""])[-1]
    for line in filter(None, lines):
        number += 1
        yield line
    if line and line[-1] not in "\r\n":
        raise Trouble("line %d has no end; if it is whole, end it with a newline" % number)

def refuse_to_replace(path):
    """Raise Trouble unless nothing stands at the path, an empty file, or a store that an import
    made; OSError for what may not be read."""
    what = ""
    busy = [path + suffix for suffix in ("-journal", "-wal") if os.path.lexists(path + suffix)]
    if busy:
        what = "a database that somebody is writing (%s)" % busy[0]
    elif os.path.exists(path) and not os.path.isfile(path):
        what = "no regular file"
    elif os.path.exists(path) and os.path.getsize(path):
        open(path, "rb").close()  # or the system says better why not
        try:
            uri = "file:%s?immutable=1" % quote(os.fsencode(path))
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as store:
                made = store.execute("PRAGMA application_id").fetchall()
                made += store.execute("SELECT DISTINCT tbl_name FROM sqlite_master").fetchall()
                if made == [(APPLICATION_ID,), ("agent",)]:
                    store.execute("SELECT count(*) FROM agent").fetchall()
                else:
                    what = "a database of somebody's own"
        except sqlite3.Error:
            what = "no SQLite database, or a damaged one"
    if what:
        raise Trouble("%s is %s, which --import does not replace: name another --db" % (path, what))

def claim(path):
    """A new file to build a store in, locked until this process ends; raises Trouble or OSError.
    What a killed import has left there, or somebody else, is cleared away."""
    try:
        there = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(there, path):  # else another import has just ended
                os.unlink(path)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except (BlockingIOError, FileExistsError):
        raise Trouble("another import builds %s: try again when it has ended" % path) from None

def build(store, origin, seconds, report):
    """Copy all the agents of a source into a new file; raises Reply, Trouble or sqlite3.Error."""
    if origin == "-":
        source = open_text(open(0, "rb", closefd=False), "standard input", whole)
    else:
        source = open_source(origin, seconds, whole)
    report.copy(source, store)
    report.end()
    if report.count["error"]:
        raise Trouble(counted(report.count["error"], "fault"))
    if origin == "-" and not report.agents:  # who writes it may have died
        raise Trouble("no agent there")

def import_agents(options, name):
    """Make `--db` hold what `--import` names, or leave it as it is and raise Trouble or OSError."""
    if is_url(name) or is_script(name):
        raise Trouble("--import makes an SQLite file, and what --db names is none")
    path, origin, report = os.path.realpath(name), options["--import"], Report(2)
    beside, folder, ends = path + ".import", os.path.dirname(path), (SIGINT, SIGTERM)
    if name == STORE and not os.path.isdir(folder):
        os.mkdir(folder, 0o700)
    refuse_to_replace(path)
    if os.path.realpath(origin) == beside or os.stat(folder).st_mode & 0o002:
        raise Trouble("%s is built here, and its folder must not be writable by everybody: name "
                      "another --db, or SOURCE" % beside)
    pthread_sigmask(SIG_BLOCK, ends)
    lock = claim(beside)
    try:
        for number in ends:
            signal(number, signals.default_int_handler)
        pthread_sigmask(SIG_UNBLOCK, ends)
        build(beside, origin, number_of(options, "--timeout", SECONDS), report)
        os.fsync(lock)
        if os.path.exists(path):
            os.fchown(lock, os.stat(path).st_uid, os.stat(path).st_gid)
            os.fchmod(lock, os.stat(path).st_mode & 0o775)  # o+w would be refused by requests
        refuse_to_replace(path)  # time has passed
        pthread_sigmask(SIG_BLOCK, ends)
        os.rename(beside, path)
    except (Reply, Trouble, OSError, sqlite3.Error, KeyboardInterrupt) as problem:
        pthread_sigmask(SIG_BLOCK, ends)
        with contextlib.suppress(OSError):
            os.unlink(beside)
        reason = "interrupted" if str(problem) in ("", "interrupted") else message_of(problem)
        if not isinstance(problem, Reply):  # which names its source
            reason = "%s: %s" % (origin if origin != "-" else "standard input", reason)
        raise Trouble("%s, nothing imported, %s is as it was" % (
            reason.replace(MESSAGES[2], ""), path)) from None
    os.fsync(os.open(folder, os.O_RDONLY))
    if report.terminal or "-v" in options:
        say(2, "%s imported into %s" % (counted(report.agents, "agent"), path))

def notes_on(row, record):
    """What a person should know of an agent that breaks no rule: iterator of (level, text)."""
    for field, stored in (("id", row[0]), ("ip", row[2])):
        right = record[field]
        if right in ("any", stored) or not isinstance(stored, (str, bytes)):
            continue
        if stored not in parse_request([field, right.partition("/")[0]])[1]:
            yield ("error", "no request finds its %s as it is stored: %s is right, and --import "
                   "would mend it" % (field, right))
    for field in ("name", "key"):
        if len(record[field]) == 128:
            yield "note", field + " has 128 characters; the manager reads 127 back"
    if record["name"] == os.uname().nodename:
        yield "error", "name is this host's own: its manager refuses that"

def check_source(name, seconds, report):
    """Tell what a person wants to know before trusting a source."""
    source = open_source(name, seconds, whole)
    of_server = isinstance(source, Database)
    report.copy(source, notes_on=lambda row, record: notes_on(
        list(map(text_of, row)) if of_server else row, record))  # servers take padding for nothing
    if not isinstance(source, TextSource) and not is_script(name):
        for request in (["id", NOBODY], ["ip", "0.0.0.1"]):
            source.find(*parse_request(request))  # a column's type may not go with it
        indexed = {text_of(row[0]) for row in source.query(INDEXED[source.scheme])}
        for field in sorted({"id", "ip"} - indexed) if "*" not in indexed else ():
            report.tell("note", "requests are slow without %s;" % (INDEX % (field, field)))
    if not of_server and os.stat(name).st_mode & 0o004:
        report.tell("note", "others may read %s, and keys are secrets: chmod o-r it" % name)

# ------------------------------------------------------------------------------------ the manager

HOMES = ("/var/ossec", "/var/wazuh-manager")
REFUSALS = {9006: "the manager does not take its address", 9007: "another agent has its address",
            9008: "another agent, or the manager, has its name", 9012: "another agent has its id",
            9013: "the manager has no room for more"}
WODLE = 'wodle name="agent-key-polling"'
SETTING = re.compile(r"<(\w+)\s*>\s*(.*?)\s*</\1\s*>", re.DOTALL)

def home_of(options):
    """The manager's folder: what --manager names, or where it usually is."""
    return options.get("--manager") or next(filter(os.path.isdir, HOMES), HOMES[0])

def inside(text, tag):
    """What is in the elements of an ossec.conf (no XML) that begin with a tag, all as one str."""
    text = re.sub("<!--.*?-->", "", text, flags=re.DOTALL)
    begin = tag.replace(" ", "\\s+").replace('"', "[\"']")
    return "".join(re.findall(r"<%s\s*>(.*?)</%s\s*>" % (begin, tag.split()[0]), text, re.DOTALL))

def key_request(home, report):
    """How a manager asks for keys: (dict of settings, whether exec_path is the server of socket).
    Raises Trouble if it asks nobody, OSError if its configuration cannot be read."""
    version, path = (0, 0), home + "/etc/wazuh-manager.conf"
    if not os.path.exists(path):
        path = home + "/etc/ossec.conf"
    with open(path, "rb") as file:
        text = os.fsdecode(file.read())
    try:
        with open(home + "/VERSION.json", encoding="latin-1") as file:
            match = re.search('"version": *"v?([0-9]+)[.]([0-9]+)', file.read())
        version = int(match[1]), int(match[2])
    except (OSError, TypeError):
        report.tell("note", "%s/VERSION.json does not tell the manager's version" % home)
    if version >= (5, 0):
        raise Trouble("a manager of %d.%d asks nobody for keys: use --enroll" % version)
    auth, old = inside(text, "auth"), inside(text, WODLE)
    new = inside(auth, "key_request")
    if new and old:
        report.tell("error", "%s has <key_request>, for managers from 4.4 on, and <%s>, for older "
                    "ones" % (path, WODLE))
    is_old = not new or (0, 0) < version < (4, 4)
    asked = dict(SETTING.findall(old if is_old else new))
    if not asked.get("exec_path") and not asked.get("socket"):
        raise Trouble("%s has no <key_request> in <auth> (before 4.4: no <%s>) with an exec_path or"
                      " a socket: the manager asks nobody" % (path, WODLE))
    settings = dict(SETTING.findall(auth), **asked)
    if settings.get("enabled", "yes") != "yes" or settings.get("disabled", "no") != "no":
        raise Trouble("%s: key requests, or <auth>, are disabled" % path)
    return asked, is_old and version < (4, 4) and bool(asked.get("socket"))

def ask_as_manager(home, report):
    """Do what a manager does to ask for a key, and tell what comes of it; raises as above."""
    asked, starts_it = key_request(home, report)
    lexer = shlex.shlex(asked.get("exec_path", ""), posix=True)  # as the manager splits it
    lexer.whitespace, lexer.quotes, lexer.commenters = " ", '"', ""
    lexer.whitespace_split = True
    try:
        words, seconds = list(lexer), number_of(asked, "timeout", 60)
    except ValueError as error:
        raise Trouble("exec_path: %s" % error) from None
    if not seconds:
        raise Trouble("timeout: %s is no number of seconds up to 3600" % asked["timeout"])
    own = number_of(split_command_line(words[1:])[0], "--timeout", SECONDS)
    if seconds <= own:
        report.tell("error", "the manager's timeout, %g s, must be longer than ours, %g s" % (
            seconds, own))
    if starts_it and words and "--serve" not in words:
        report.tell("error", "exec_path lacks --serve: this manager starts it as the server of its "
                    "socket")
    if words and not starts_it:
        attempt(report, "exec_path", run, home, words, seconds)
    if asked.get("socket"):
        path = os.path.join(home, asked["socket"])
        attempt(report, "socket", ask_server, path, ["id", NOBODY], seconds)

def run(home, words, seconds):
    """What comes from exec_path, in bytes, if it is run as a manager runs it; raises Trouble."""
    def give_up(*_):
        raise Trouble("was silent, or did not end: the manager waits no longer")
    os.umask(0o022)
    try:
        process = subprocess.Popen(
            words + ["id", NOBODY], cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, restore_signals=False,
            preexec_fn=lambda: pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT, SIGHUP)))
    except OSError as error:
        raise Trouble("cannot be run: %s: %s" % (words[0], error.strerror)) from None
    signal(SIGALRM, give_up)
    setitimer(ITIMER_REAL, seconds)
    try:
        with process.stdout as pipe:
            output = pipe.read(65536)
            while pipe.read(65536):
                pass  # or a flood would fill the memory
        status = process.wait()
    except Trouble:
        os.killpg(process.pid, signals.SIGKILL)
        raise
    finally:
        setitimer(ITIMER_REAL, 0)
    if status:
        how = "signal %d" % -status if status < 0 else "status %d" % status
        said = output.decode("latin-1").partition("\n")[0] * output.startswith(NAME.encode())
        raise Trouble("ended with %s: the manager throws the output away. %s" % (how, said))
    return output

def verdict_of(output):
    """What to say of a sound answer (bytes) for NOBODY; raises Trouble for any other."""
    text = output.decode("latin-1").lstrip()
    try:
        reply, _ = json.JSONDecoder().raw_decode(text)
        number, message = reply["error"], str(reply.get("message", "it hands out a key"))
    except (ValueError, TypeError, KeyError, RecursionError):
        if "{" in text and text[0] != "{":
            raise Trouble("gave text before the JSON: the manager loses the answer") from None
        raise Trouble("gave text that is no JSON answer" if text else "gave no answer") from None
    if type(number) is not int:
        raise Trouble("gave an error that is no number: the manager takes it for 0")
    if number != 4:
        raise Trouble("gave error %d, %s" % (number, message[:500]))
    return "gave a sound answer (there is no agent %s)" % NOBODY

def attempt(report, what, ask, *arguments):
    """Tell what comes of a way of asking, which gives bytes or raises Trouble, and in what time."""
    started, level = time.monotonic(), "error"
    try:
        text, level = verdict_of(ask(*arguments)), "info"
    except Trouble as trouble:
        text = str(trouble)
    report.tell(level, "%s %s, in %.1f ms" % (what, text, 1000 * (time.monotonic() - started)))

def check_manager(home, name, report):
    """Tell why a manager does not enrol, and whom it has; raises Reply or OSError."""
    try:
        ask_as_manager(home, report)
    except Trouble as trouble:
        report.tell("error", str(trouble))
    if not report.store:
        return  # the source could not be read
    keys = open_source(home + "/etc/client.keys", SECONDS)
    kept = (tuple(judge(row)[0].values()) for _, row in keys.rows())
    enrolled = {agent[0]: agent for agent in kept}
    there = [enrolled[agent[0]] == agent if agent[0] in enrolled else None
             for agent in report.store.execute(ROWS)]
    report.tell("info", "%s: %d enrolled, %d not, %d with another name, address or key" % (
        name, there.count(True), there.count(None), there.count(False)))

def check(options, name):
    """Report on a source, the server with --socket, the manager with --manager: the exit status."""
    report, seconds = Report(1, "--json" in options), number_of(options, "--timeout", SECONDS)
    home = home_of(options)
    steps = [lambda: check_source(name, seconds, report)]
    if "--socket" in options:
        steps.append(lambda: attempt(
            report, "server", ask_server, options["--socket"], ["id", NOBODY], seconds))
    if "--manager" in options:
        steps.append(lambda: check_manager(home, name, report))
    for step in steps:
        try:
            step()
        except (Reply, Trouble, OSError, sqlite3.Error) as problem:
            report.tell("error", message_of(problem))
        except Exception as error:
            report.tell("error", unforeseen(error).message)
    report.end()
    report.tell("info", "%s, %s, %s" % (counted(report.agents, "agent"), counted(
        report.count["error"], "error"), counted(report.count["note"], "note")))
    if report.as_json:
        say(1, to_json({"agents": report.agents, "errors": report.count["error"],
                        "notes": report.count["note"], "findings": report.findings}))
    return 1 if report.count["error"] else 0

def tell_manager(home, function, arguments):
    """A message to authd's own socket, and its answer: (error, dict); raises Trouble."""
    path = home + "/queue/sockets/auth"
    message = to_json({"function": function, "arguments": arguments}).encode("ascii")
    try:
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as stream:
            connection.settimeout(30)
            connection.connect(path)
            connection.sendall(struct.pack("<I", len(message)) + message)
            length, = struct.unpack("<I", stream.read(4))
            reply = json.loads(stream.read(min(length, 65536)).decode("latin-1"))
        number, data = reply["error"], dict(reply.get("data", {}))
        if type(number) is not int:
            raise ValueError
    except OSError as error:
        raise Trouble("no manager at %s: %s" % (path, error.strerror or error)) from None
    except (ValueError, KeyError, TypeError, RecursionError, struct.error):
        raise Trouble("%s closed, or gave no answer that we understand" % path) from None
    if number == 9015:
        raise Trouble("this manager is a worker of a cluster: run --enroll on its master")
    return number, data

def enroll(options, name):
    """Add the agents that a manager lacks, and change none that it has: the exit status."""
    home, report, added = home_of(options), Report(2), 0
    source = open_source(name, number_of(options, "--timeout", SECONDS))
    try:
        for number, record in report.records(source):
            if not all(record.values()):
                continue
            where = "%s %d: %s: " % (source.unit, number, agent_of(record))
            error, there = tell_manager(home, "get", {"id": record["id"]})
            if error == 9011:  # it is not there
                (error, _), there = tell_manager(home, "add", record), record
                added += not error
            if error:
                report.tell("error", "%snot enrolled: %s" % (
                    where, REFUSALS.get(error, "the manager says error %d" % error)))
                continue
            there, _ = judge([there.get(field) for field in FIELDS])
            other = [field for field in FIELDS if record[field] != there[field]]
            if other:
                report.tell("error", "%senrolled with another %s, and left so" % (
                    where, " and ".join(other)))
    except Trouble as trouble:
        raise Trouble("%s (%d enrolled before; the next run goes on)" % (trouble, added)) from None
    report.end()
    if report.terminal or report.count["error"] or "-v" in options:
        say(2, "%s: %s, %d enrolled now, %s" % (name, counted(
            report.agents, "agent"), added, counted(report.count["error"], "error")))
    return 1 if report.count["error"] else 0

# ------------------------------------------------------------------------------------------- main

COMMANDS = {"--serve": serve, "--import": import_agents, "--check": check, "--enroll": enroll}
GOES_WITH = {
    "a request": "--db --timeout --socket",
    "--serve": "--serve --db --timeout --socket --mode --group --workers -v",
    "--import": "--import --db --timeout -v",
    "--check": "--check --db --timeout --socket --manager --json",
    "--enroll": "--enroll --db --timeout --manager -v"}
HELP = """usage: agent_key_request.py [--db SOURCE] [--timeout SECONDS] id AGENT_ID | ip ADDRESS
       agent_key_request.py --socket PATH id AGENT_ID | ip ADDRESS     (asks a running server)
       agent_key_request.py [--db SOURCE] --serve [--socket PATH] [--mode 0600] [--group NAME]
                            [--workers 8] [--timeout SECONDS] [-v]
       agent_key_request.py [--db STORE] --import SOURCE [-v]          (- for standard input)
       agent_key_request.py [--db SOURCE] --check [--socket PATH] [--manager [HOME]] [--json]
       agent_key_request.py [--db SOURCE] --enroll [--manager [HOME]] [-v]
       agent_key_request.py --version | --help
SOURCE: SQLite, CSV, client.keys, an SQL script (.sql), mysql://user@host/database or
postgresql://user@host/database; without --db $AGENT_KEY_DB, else
%s. --timeout: 10 s; of --serve: 5 s for each request;
its --socket: %s. HOME: the manager's folder,
%s.
""" % (STORE, SOCKET, " or ".join(HOMES))

class Mistake(Trouble):
    """A command line that a person has to correct, maybe the one in exec_path."""

def task_of(options, words):
    """What is asked for, `a request` or one of COMMANDS; raises Mistake."""
    task = ([name for name in options if name in COMMANDS] + ["a request"])[0]
    known = " ".join(GOES_WITH.values()).split() + ["--help", "--version"]
    for name, value in options.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise Mistake(", but ".join(["there is no option %s" % name] + near))
        if name not in GOES_WITH[task].split():
            raise Mistake("%s does not go with %s" % (name, task))
        if name in VALUES and not value and name != "--manager":
            raise Mistake("%s needs a value: %s" % (name, VALUES[name]))
        if value and name not in VALUES:
            raise Mistake("%s takes no value" % name)
        if name in ("--timeout", "--workers") and not number_of(options, name, 0):
            raise Mistake("%s needs a number, more than 0 and at most 3600" % name)
        if name == "--mode" and not re.match("0?[0-7]{3}\\Z", value):
            raise Mistake("--mode needs three digits from 0 to 7, and maybe a 0 before, as in 0660")
    if words and task != "a request":
        raise Mistake("no request goes with %s" % task)
    return task

def message_of(problem):
    """What to tell a person of an exception that was foreseen."""
    if isinstance(problem, OSError) and problem.strerror:
        return ": ".join([problem.filename] * bool(problem.filename) + [problem.strerror])
    if isinstance(problem, sqlite3.Error):
        return reason_of(problem)
    return getattr(problem, "message", str(problem))

def request(options, words, name):
    """A request to a database, a script or a running server."""
    seconds = number_of(options, "--timeout", SECONDS)
    if "--socket" in options:
        os.write(1, ask_server(options["--socket"], words, seconds))
        return
    if is_url(name):  # libpq warns of what it dislikes, and the manager would lose the answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answer_once(words, name, seconds)

def main(options, words, name):
    """All but a request to a file: returns the exit status."""
    status = 1
    try:
        if {"-h", "--help"} & set(options):
            os.write(1, HELP.encode("ascii"))
        elif {"-V", "--version"} & set(options):
            with open(__file__, "rb") as script:
                say(1, "%s.py %s sha256:%s" % (NAME, VERSION, sha256(script.read()).hexdigest()))
        else:
            command = COMMANDS.get(task_of(options, words))
            return (command(options, name) if command else request(options, words, name)) or 0
        return 0
    except Mistake as mistake:
        status, message = 2, "%s (see --help)" % mistake
        if not os.isatty(2):
            tell_syslog(True, message)
    except (Reply, Trouble, OSError, sqlite3.Error) as problem:
        message = message_of(problem)
    except Exception as error:
        message = unforeseen(error).message
    say(2, "%s: error: %s" % (NAME, message))
    return status

if __name__ == "__main__":
    os._exit(main(*given))
