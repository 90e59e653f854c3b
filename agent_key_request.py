#!/bin/sh
# fmt: off
''':'
# This shell script runs the rest of the file. The text `loader` is a small Python program. It
# compiles the two parts of this file one by one, each when it is needed, and keeps them compiled in
# __pycache__ beside the script. If a part must be compiled, the loader runs the text `make_cache`.
# The arguments of the loader are `make_cache`, the path of the script, and the command line.
loader='
import marshal, posix, sys
from binascii import crc32
make_cache, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
status = posix.stat(script)
directory = script[:script.rfind("/") + 1] or "./"
cache_directory = directory + "__pycache__"
# No program can set the ctime of a file, so an edited script never runs from an old cache.
stamp = repr((sys.version, status.st_ctime_ns, status.st_size)).encode()
def is_trusted(place):
    # True if only root and the owner of the script can have put the place there or can change it.
    here = posix.lstat(place)
    may_write = here.st_mode & 0o022  # the bits of the group and of everybody
    is_sticky = here.st_mode & 0o1000
    if place == directory and may_write == 0o020 and not is_sticky:
        may_write = 0  # The group can replace the script itself, so a cache gives it no more power.
    return here.st_uid in (0, status.st_uid) and not may_write
def load(part):
    cache = cache_directory + "/agent_key_request.%s-%d.pyc" % (sys.implementation.cache_tag, part)
    try:
        if is_trusted(directory) and is_trusted(cache_directory) and is_trusted(cache):
            data = open(cache, "rb", 0).read()
            # The file is a checksum of the rest, the stamp, and the compiled part. The checksum is
            # there because a damaged part could crash Python.
            if data.startswith(crc32(data[4:]).to_bytes(4, "big") + stamp):
                return marshal.loads(data[4 + len(stamp):])
    except OSError:
        pass  # There is no cache yet.
    exec(make_cache, globals())
    return compile_and_keep(part, cache)
names = {"__name__": "__main__", "__file__": script}
exec(load(1), names)  # Part one ends the program if it can answer.
exec(load(2), names)
'
make_cache='
def compile_and_keep(part, cache):
    with open(script, "rb") as file:
        text = file.read()
    # Each part begins with a line of equals signs.
    middle = text.index(b"\n# ===", text.index(b"\n# ===") + 1)
    if part == 1:
        text = text[:middle]
    else:
        text = text[:middle].count(b"\n") * b"\n" + text[middle:]  # keeps the line numbers
    code = compile(text, script, "exec")
    mask = posix.umask(0o022)
    try:
        write_cache(cache, stamp + marshal.dumps(code))
    except OSError:
        pass  # This user cannot write there, so the next start compiles the script again.
    posix.umask(mask)
    return code

def write_cache(cache, data):
    if not is_trusted(directory):
        return
    if "__pycache__" not in posix.listdir(directory):
        posix.mkdir(cache_directory)
    if is_trusted(cache_directory):
        new = "%s.%d" % (cache, posix.getpid())
        try:
            with open(new, "xb") as file:
                file.write(crc32(data).to_bytes(4, "big") + data)
            posix.rename(new, cache)
        except OSError:
            posix.unlink(new)  # The disk is full.
'
for python in python3 /usr/libexec/platform-python /var/ossec/framework/python/bin/python3; do
    command -v "$python" >/dev/null 2>&1 || continue
    case " $* " in
    # A server starts once, so it needs no cache. It also runs for years, and if it were started
    # with -c, `ps` would show the whole text of the loader.
    *" --serve "*) exec "$python" -IS "$0" "$@" ;;
    *) exec "$python" -IS -c "$loader" "$make_cache" "$0" "$@" ;;
    esac
done
logger -t agent_key_request -p authpriv.err "no python3 on this host" >/dev/null 2>&1 &
case " $* " in
# A person or systemd started a command, and reads stderr. All else is a request of the manager.
*" --serve "* | *" --import"* | *" --check "* | *" --enroll "*)
    echo "agent_key_request: error: no python3 on this host: install it" >&2
    exit 1 ;;
esac
echo '{"error": 9, "message": "Internal error: no python3 on this host: install it"}'
exit 0

This program answers a Wazuh manager that asks for the key of an agent which it does not know. The
manager runs `agent_key_request.py id 001` or `agent_key_request.py ip 192.168.1.100`, or it asks a
running server (`--serve`) over a unix socket. The answer is one JSON object on standard output.

Who should read this: everybody who is about to trust it. It runs as root on the manager. It stands
between packets that anyone may send and the file that lists the trusted agents, and the manager
itself checks almost nothing. So the program must never give out a record that breaks the rules in
`judge`, must never run or read a file that a stranger may have written (`trusted_path`), and must
answer every request in time. For a request, nothing goes to standard error, and the exit status is
0 whatever happens, because the manager throws away the output of any other status. Only a mistake
among the options, which a person has to correct, ends with status 2 and a message on standard
error.

How to read it: from top to bottom. The lines above are a shell script, and Python reads them as a
part of this text. They look for a Python and start it with -I and -S, so that it imports nothing
from the directory of this file, from the working directory, from PYTHON* variables or from
site-packages. They keep the compiled program in `__pycache__` beside this file, because compiling
is most of the cost of a start, and they compile the two parts of the program one by one. Part one
tells the story of a request. Part two has everything else: databases, the server, the store, and
what a person asks for.
'''
# fmt: on
# ================================================================== part one: a single request
# Part one answers a request whose source is a file. The manager starts it for every request, and a
# start costs far more than a look-up. So part one imports only modules that are cheap. A request
# takes 35 million instructions, of which Python itself takes 21. `os` would add 5, `sqlite3` 5,
# `signal` 19, `socket` 31, `json` 28, `argparse` 33, `ipaddress` 17 and `typing` 38.

import posix
import sys

if __name__ == "__main__" and not (sys.flags.isolated and sys.flags.no_site):
    # Somebody ran `python3 agent_key_request.py`. Start again, before anything is imported that a
    # stranger may have put into this directory.
    posix.execv(sys.executable, [sys.executable, "-IS", *sys.argv])

import time
from _signal import (  # type: ignore[import-not-found]
    ITIMER_REAL,
    SIG_DFL,
    SIG_UNBLOCK,
    SIGALRM,
    SIGHUP,
    SIGINT,
    SIGTERM,
    pthread_sigmask,
    setitimer,
    signal,
)
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

TYPE_CHECKING = False  # mypy takes this for true. No interpreter runs the branch below.
if TYPE_CHECKING:
    from _sqlite3 import Connection as SqliteConnection
    from typing import (
        IO,
        Any,
        BinaryIO,
        Callable,
        Dict,
        Iterable,
        Iterator,
        List,
        NoReturn,
        Optional,
        Pattern,
        Sequence,
        Set,
        Tuple,
        Type,
        TypeVar,
        Union,
    )

    T = TypeVar("T")

    Row = Sequence[Any]  # one agent as a source stores it: id, name, ip, key
    Record = Dict[str, str]  # one agent as the manager gets it
    AgentSource = Union["SqliteSource", "TextSource", "Database"]  # what --db and --import name
    Source = Union[AgentSource, "Memory"]

# ------------------------------------------------------------------------------------- constants
# The names, numbers and texts that users meet.

VERSION = "3.0.0"
NAME = "agent_key_request"  # stands before each message for people
STORE = "/var/lib/agent-key-request/agents.db"  # the source if nothing else is named
REQUEST_SECONDS = 10.0  # the time limit of one request. The manager itself waits 60 s.
LONGEST_TIMEOUT = 3600.0  # the most that --timeout takes, in seconds

NO_ERROR = 0
TOO_FEW_ARGUMENTS = 1
SOURCE_UNREADABLE = 2
BAD_ARGUMENTS = 3
NOT_FOUND = 4
FOUND_SEVERAL = 5
INVALID_RECORD = 6
INTERNAL_ERROR = 9

# The texts of the answers. A detail follows a text that ends with a space, and it may follow "Bad
# arguments given". The vendor's own tests expect the texts of 1, 3, 4 and 5 (tests/MANAGER.md).
MESSAGES = {
    NO_ERROR: "key handed out: ",
    TOO_FEW_ARGUMENTS: "Too few arguments",
    SOURCE_UNREADABLE: "Cannot read key source: ",
    BAD_ARGUMENTS: "Bad arguments given",
    NOT_FOUND: "No agent key found",
    FOUND_SEVERAL: "Found more than one match for required ",
    INVALID_RECORD: "Stored record is invalid: ",
    INTERNAL_ERROR: "Internal error: ",
}
# These answers also go to a log: keys that were given out, and errors that an operator can correct.
# The manager shows them at debug level only. The other errors are what any stranger can cause.
FOR_THE_OPERATOR = (NO_ERROR, SOURCE_UNREADABLE, FOUND_SEVERAL, INVALID_RECORD, INTERNAL_ERROR)
# A message that is too long loses its middle.
MESSAGE_LIMIT = 500  # characters
MESSAGE_BEGINNING = 200  # characters that are kept before the gap

DIGITS = "0123456789"
NAME_LETTERS = DIGITS + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_."
FIELDS = ("id", "name", "ip", "key")  # every source gives its rows in this order
RULES = {  # what each field of a record must be, in words; judge() checks it
    "id": "id must be 3 to 8 digits, not 000, with no more zeros in front than three digits need",
    "name": "name must be 1 to 128 of A-Z a-z 0-9 - _ . and not start with a dot",
    "ip": "ip must be any, an address or a network (address/prefix) that the manager takes",
    "key": "key must be 1 to 128 printable ASCII characters",
}
# The names that a column may have in a table or in a header, in upper or lower case. The names of
# sample.db.sql come first.
COLUMN_NAMES = {
    "id": ("id",),
    "name": ("name",),
    "ip": ("ip", "address", "register_ip", "registerIP"),
    "key": ("agent_key", "key", "internal_key"),
}
TABLE_COLUMNS = {"id": "id", "name": "name", "ip": "ip", "key": "agent_key"}  # of sample.db.sql
UNFINISHED_LINE = "its line has no end; the file may be half-written"

# --------------------------------------------------------------------------- errors and answers
# Every request ends with an Answer. A step that finds out that the request fails raises a
# RequestError, and answer() makes an Answer of it.


class RequestError(Exception):
    """The reason why a request gets no record.

    number: an error number, a key of MESSAGES. detail: ends the message. It is for people and
    never contains stored text.
    """

    def __init__(self, number: int, detail: str = "") -> None:
        """Keep what the answer will say."""
        super().__init__(number)
        self.number = number
        self.detail = detail

    @property
    def message(self) -> str:
        """The text of the answer, in printable ASCII, at most MESSAGE_LIMIT characters."""
        text = printable(MESSAGES[self.number] + self.detail)
        if len(text) <= MESSAGE_LIMIT:
            return text
        beginning = text[:MESSAGE_BEGINNING] + " ... "
        end_length = MESSAGE_LIMIT - len(beginning)
        return beginning + text[-end_length:]


class SourceError(RequestError):
    """The key source cannot be read (error 2).

    source: its name, as people know it. reason: why, and what to do about it.
    """

    def __init__(self, source: str, reason: str) -> None:
        """Keep the name and the reason, for messages that need only one of them."""
        super().__init__(SOURCE_UNREADABLE, f"{source}: {reason}")
        self.source = source
        self.reason = reason


class Answer:
    """The answer to one request, on the command line or over a socket.

    number: an error number, NO_ERROR for a record that was found. message: for people and logs.
    record: what the manager gets, None if there is an error.
    """

    def __init__(self, number: int, message: str, record: "Optional[Record]" = None) -> None:
        """Keep what goes out. The message is printable ASCII."""
        self.number = number
        self.message = message
        self.record = record

    @classmethod
    def of_error(cls, error: RequestError) -> "Answer":
        """Return the answer that tells about an error.

        The exception itself is not kept, because its traceback would keep a connection open.
        """
        return cls(error.number, error.message)

    def line(self) -> bytes:
        """Return what goes out: one JSON object and a newline."""
        content: Dict[str, Any] = {"error": self.number}
        if self.record:
            content["data"] = self.record
        else:
            content["message"] = self.message
        return to_json(content).encode("ascii") + b"\n"


def is_printable(text: str) -> bool:
    """Return True if `text` contains only printable ASCII."""
    # Python 3.6 has no isascii(). In UTF-8, every character beyond ASCII takes more than one byte.
    # A surrogate cannot be encoded, but it is not printable either.
    return text.isprintable() and len(text.encode("utf-8")) == len(text)


def printable(text: str) -> str:
    """Return `text` with a `?` in place of each character that is not printable ASCII."""
    if is_printable(text):
        return text
    return "".join([letter if " " <= letter <= "~" else "?" for letter in text])


def to_json(value: "Any") -> str:
    """Return a dict, a list, a text, a bool or an integer as JSON on a line of printable ASCII.

    All JSON of this program, except that of the shell script at the top, is written here. The
    module `json` would double the cost of a request.
    """
    if isinstance(value, str):
        escaped = printable(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, dict):
        # All names stand in this file, and none needs an escape. A server saves 1 % of its time.
        members = [f'"{name}": {to_json(content)}' for name, content in value.items()]
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([to_json(item) for item in value]) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value))


# ------------------------------------------------------------------------------------- addresses
# An address or a network has many spellings. Here each one gets a single spelling.


class Network:
    """An address or a network.

    number: the address as an integer. width: its length in bits, 32 or 128. prefix: the length of
    the network's part in bits, 0 to width. For a single address, prefix is equal to width.
    """

    def __init__(self, number: int, width: int, prefix: int) -> None:
        """Keep the three numbers."""
        self.number = number
        self.width = width
        self.prefix = prefix

    def text_with(self, prefix: int) -> str:
        """Return the one spelling of the network around this address that has the given prefix.

        The bits of the host are cleared: 10.1.2.3 with prefix 8 is `10.0.0.0/8`.
        """
        host_bits = self.width - prefix
        number = self.number >> host_bits << host_bits
        family = AF_INET if self.width == 32 else AF_INET6
        address = inet_ntop(family, number.to_bytes(self.width // 8, "big"))
        if prefix == self.width:
            return address
        return f"{address}/{prefix}"


def parse_network(text: str) -> Network:
    """Return the address or network in `text`.

    `10.1.2.3` is (0x0A010203, 32, 32), and `10.1.2.3/255.0.0.0` is (0x0A010203, 32, 8). An IPv4
    address that is mapped into IPv6 (`::ffff:10.1.2.3`) is the IPv4 address. ValueError says that
    the text is neither an address nor a network.
    """
    address, slash, length = text.partition("/")
    family = AF_INET6 if ":" in address else AF_INET
    try:
        packed = inet_pton(family, address)
    except OSError:
        raise ValueError("not an address") from None
    width = 8 * len(packed)
    number = int.from_bytes(packed, "big")
    prefix = parse_prefix(length, width) if slash else width
    is_mapped_ipv4 = width == 128 and number >> 32 == 0xFFFF
    if is_mapped_ipv4 and prefix >= 96:
        return Network(number & 0xFFFFFFFF, 32, prefix - 96)
    return Network(number, width, prefix)


def parse_prefix(text: str, width: int) -> int:
    """Return the number of bits that a prefix length or an IPv4 netmask stands for.

    `24` and `255.255.255.0` are 24. `024`, which is not how a number is written, and `255.0.255.0`,
    which has a gap, raise ValueError.
    """
    if width == 32 and "." in text:
        try:
            mask = int.from_bytes(inet_pton(AF_INET, text), "big")
        except OSError:
            raise ValueError("not a netmask") from None
        bits = f"{mask:032b}"
        if "01" in bits:
            raise ValueError("the netmask has a gap")
        return bits.count("1")
    if not consists_of(text, DIGITS, 1, 3) or text != str(int(text)):
        raise ValueError("not a prefix length")
    if int(text) > width:
        raise ValueError("the prefix is longer than the address")
    return int(text)


def canonical_ip(text: str) -> str:
    """Return the one spelling of a stored ip: an address, a network, or `any`.

    An empty ip, or a null, stands for `any`, because many tables have no ip for such an agent.
    ValueError says that it is none of these, or that the manager's own check refuses it
    (OS_IsValidIP, see tests/MANAGER.md).
    """
    try:
        inet_pton(AF_INET, text)
        return text  # Most agents have an IPv4 address, and inet_pton takes only one spelling.
    except OSError:
        pass
    if text.lower() in ("", "any"):
        return "any"
    network = parse_network(text)
    if network.width == 32 and network.prefix == 0:
        return "any"
    spelling = network.text_with(network.prefix)
    # The manager's pattern for IPv6 knows neither an end in dots, such as ::1.2.3.4, nor `::/N`.
    if network.width == 128 and ("." in spelling or spelling.startswith("::/")):
        raise ValueError("the manager refuses it")
    return spelling


# --------------------------------------------------------------------------------------- records
# A record is what the manager gets: four texts. judge() is the one place that decides whether a
# stored row may become a record.


def consists_of(text: str, letters: str, least: int, most: int) -> bool:
    """Return True if `text` has `least` to `most` characters, all of them among `letters`."""
    # strip() stops at the first other character from each end. If there is none, nothing is left.
    return least <= len(text) <= most and not text.strip(letters)


def text_of(value: "Any") -> str:
    """Return a stored value (text, bytes, number, address, null) as text, without outer spaces.

    SQL pads the values of a column of the type CHAR with spaces.
    """
    if isinstance(value, str):
        return value.strip(" ")
    if isinstance(value, (bytes, bytearray, memoryview)):
        # Latin-1 decodes every byte. No rule of judge() accepts a character beyond ASCII.
        return bytes(value).decode("latin-1").strip(" ")
    if value is None:
        return ""
    return str(value)


def id_of(value: "Any") -> str:
    """Return a stored id as the manager writes it, with at least three digits.

    Columns for numbers and spreadsheets lose the zeros in front (1), and some add a fraction (1.0).
    """
    text = text_of(value)
    if "." in text:
        whole, _, fraction = text.partition(".")
        if fraction and not fraction.strip("0"):
            text = whole
    if len(text) < 3 and consists_of(text, DIGITS, 1, 2):
        return text.zfill(3)
    return text


def ip_of(value: "Any") -> str:
    """Return a stored ip in its one spelling, or "" if the manager does not take this ip."""
    try:
        return canonical_ip(text_of(value))
    except ValueError:
        return ""


class Fault:
    """A rule that a stored record breaks. field: one of FIELDS. text: the rule, for people."""

    def __init__(self, field: str, text: str) -> None:
        """Keep the field and the text."""
        self.field = field
        self.text = text


class Unreadable:
    """A mark that replaces the key in a row that comes from a bad line of a text file.

    reason: what is wrong with the line, such as too many fields, for people.
    """

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        self.reason = reason


def is_agent_id(text: str) -> bool:
    """Return True if `text` is an id that the manager itself would write (`%03d`), but not 000."""
    has_needless_zero = len(text) > 3 and text[0] == "0"
    return consists_of(text, DIGITS, 3, 8) and text != "000" and not has_needless_zero


def is_agent_name(text: str) -> bool:
    """Return True if `text` is a name that does no harm in client.keys and in the manager."""
    return consists_of(text, NAME_LETTERS, 1, 128) and text[0] != "."


def is_agent_key(text: str) -> bool:
    """Return True if `text` is a key that fits into client.keys, where it ends the line."""
    return 1 <= len(text) <= 128 and is_printable(text)


def judge(row: "Row") -> "Tuple[Record, List[Fault]]":
    """Return the record in a stored row, and the rules that it breaks.

    This is the one place that decides what may reach the manager, which checks almost nothing. A
    record with a fault must not leave the program.
    """
    stored_id, stored_name, stored_ip, stored_key = row
    agent_id = id_of(stored_id)
    name = text_of(stored_name)
    if isinstance(stored_key, Unreadable):
        # The line as a whole is wrong, so faults of its other fields would tell nothing.
        record = {"id": agent_id, "name": name, "ip": "", "key": ""}
        return record, [Fault("key", stored_key.reason)]
    # A column for numbers changes a key that is stored in it. So if the key is a number, the record
    # gets an empty key, which is a fault below.
    key = ""
    if isinstance(stored_key, (str, bytes, bytearray, memoryview)):
        key = text_of(stored_key)
    ip = ip_of(stored_ip)
    faults = []
    if not is_agent_id(agent_id):
        faults.append(Fault("id", RULES["id"]))
    if not is_agent_name(name):
        faults.append(Fault("name", RULES["name"]))
    if not ip:
        faults.append(Fault("ip", RULES["ip"]))
    if not is_agent_key(key):
        faults.append(Fault("key", RULES["key"]))
    return {"id": agent_id, "name": name, "ip": ip, "key": key}, faults


def agent_of(record: "Record") -> str:
    """Return the name of an agent in messages, such as `agent 001`.

    An id that is not made of digits is not shown. It may be a key in the wrong column.
    """
    agent_id = record["id"]
    if consists_of(agent_id, DIGITS, 1, 8):
        return f"agent {agent_id}"
    return f"agent with an id of {len(agent_id)} characters"


# -------------------------------------------------------------------------------------- requests
# A request asks for one id or one address. Sources may spell both in several ways. A request lists
# these spellings, so that every source can look them up by an index.


class Request:
    """What to look for.

    field: `id` or `ip`. value: the one spelling of the id or address. exact: the texts that mean
    just this value. networks: for an ip, the networks around it, the smallest first.
    """

    def __init__(self, field: str, value: str, exact: "List[str]", networks: "List[str]") -> None:
        """Keep the spellings."""
        self.field = field
        self.value = value
        self.exact = exact
        self.networks = networks

    @property
    def texts(self) -> "List[str]":
        """All texts to look for in the field."""
        return self.exact + self.networks


def parse_request(words: "Sequence[str]") -> Request:
    """Return the request that the words make. Anyone may have sent them.

    `["id", "001"]` looks for the texts 001, 01 and 1. `["ip", "10.0.0.9"]` looks for 10.0.0.9 and,
    if no agent has it, for the smallest network around it. Raises RequestError.
    """
    option = words[0] if words else ""
    value = words[1] if len(words) > 1 else ""
    if not option:
        raise RequestError(TOO_FEW_ARGUMENTS)
    if option not in ("id", "ip"):
        raise RequestError(BAD_ARGUMENTS)
    if not value:
        raise RequestError(TOO_FEW_ARGUMENTS)
    if len(words) > 2:
        if words[2].startswith("-"):
            raise RequestError(BAD_ARGUMENTS, f": options go before {option}")
        raise RequestError(BAD_ARGUMENTS, ": more than an option and its value")
    if option == "id":
        return request_for_id(value)
    return request_for_ip(value)


def request_for_id(value: str) -> Request:
    """Return the request for an id of 3 to 8 digits. Raises RequestError."""
    if not consists_of(value, DIGITS, 3, 8):
        raise RequestError(BAD_ARGUMENTS, ": an id has 3 to 8 digits")
    exact = [value]
    # A column for numbers loses the zeros, so it stores 001 as 1. A column of two characters stores
    # 001 as 01. An id of more than three digits has no zero in front (is_agent_id).
    if len(value) == 3 and value[0] == "0":
        exact.append(value[1:])
        if value[1] == "0":
            exact.append(value[2:])
    return Request("id", value, exact, [])


def request_for_ip(value: str) -> Request:
    """Return the request for an IPv4 or IPv6 address. Raises RequestError."""
    not_an_address = RequestError(BAD_ARGUMENTS, ": not an IP address")
    if "/" in value:
        raise not_an_address  # A network is an address only in a store.
    try:
        address = parse_network(value)
    except ValueError:
        raise not_an_address from None
    width = address.width
    text = address.text_with(width)
    exact = [text, f"{text}/{width}"]
    if width == 32:
        exact.append(f"::ffff:{text}")  # Columns of the type INET6 spell an IPv4 address like this.
    # Neither `any` nor a prefix of 0 is among the networks: they fit every address, so a packet
    # from anywhere would make the manager enrol that agent.
    networks = [address.text_with(prefix) for prefix in range(width - 1, 0, -1)]
    return Request("ip", text, exact, networks)


def best_rows(rows: "List[Row]", request: Request) -> "List[Row]":
    """Return the rows that fit the request. For an ip, these are the rows of the smallest network.

    More than one row means that the source is ambiguous. The source has already compared the rows
    with the request. They are compared once more, because a database may treat two texts as equal
    that differ for the manager, and because the index of a damaged database finds wrong rows.
    """
    if request.field == "id":
        return [row for row in rows if id_of(row[0]) == request.value]
    spelled = []
    for row in rows:
        stored_ip = row[2]
        spelling = ip_of(stored_ip)
        if not spelling:
            # The manager refuses this ip. Keep the row, so that the answer can tell the fault.
            spelling = text_of(stored_ip)
        spelled.append((spelling, row))
    for ip in [request.value, *request.networks]:
        closest = [row for spelling, row in spelled if spelling == ip]
        if closest:
            return closest
    return []


# ----------------------------------------------------------------------------- files: who may write
# The program reads only files that no stranger can have put where they are. The model is OpenSSH's
# StrictModes: every directory from `/` to the file counts, and a message names the one that failed.
# A group may write to a file that is only read, because whoever made the group trusts its members.

FILE_TYPE = 0o170000  # The bits of st_mode. The module `stat` would cost 2 M instructions.
REGULAR_FILE = 0o100000
DIRECTORY = 0o040000
LINK = 0o120000
STICKY = 0o1000
GROUP_MAY_WRITE = 0o020
OTHERS_MAY_WRITE = 0o002
OTHERS_MAY_READ = 0o004
MOST_LINKS = 40  # on the way to a file, as in the kernel
TOO_MANY_LINKS = 40  # the error number ELOOP


class Place:
    """A directory, a link or a file. path: its absolute path, in which no directory is a link."""

    def __init__(self, path: str) -> None:
        """Look at what is there, without following a link. Raises OSError."""
        status = posix.lstat(path)
        self.path = path
        self.directory = parent_of(path)
        self.mode = status.st_mode
        self.type = status.st_mode & FILE_TYPE
        self.owner = status.st_uid
        self.group = status.st_gid


def places_on_the_way(name: str) -> "List[Place]":
    """Return the directories and links on the way from `/` to `name`, and then what is there.

    So the last place is the one that `name` leads to, even if it is on the way already. Raises
    OSError.
    """
    parts = name.split("/")
    if not name.startswith("/"):
        parts = posix.getcwd().split("/") + parts
    here = Place("/")
    places = [here]
    links = 0
    while parts:
        part = parts.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            here = Place(here.directory)
            continue
        there = Place(f"{here.path.rstrip('/')}/{part}")
        places.append(there)
        if there.type != LINK:
            here = there
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(TOO_MANY_LINKS, "Too many levels of symbolic links", name)
        target = posix.readlink(there.path)
        parts = target.split("/") + parts
        if target.startswith("/"):
            here = Place("/")
    return [*places, here]


def parent_of(path: str) -> str:
    """Return the directory that an absolute path is in."""
    return path.rpartition("/")[0] or "/"


def user_name(number: int) -> str:
    """Return the name of a user, or the number of one who has no name."""
    import pwd  # Only messages need it.

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    """Return the name of a group, or the number of one that has no name."""
    import grp  # Only messages need it.

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def check_way(name: str, owners: "Set[int]", directory_owners: "Set[int]") -> Place:
    """Return the place that `name` leads to, if no stranger can have put it there.

    owners: the user ids of those who may own a file or link in a directory where everybody may
    write, such as /tmp. directory_owners: the user ids of those who may own a directory. Raises
    SourceError, which names the directory and says what to do, or OSError.
    """
    shared = set()  # sticky directories that everybody may write to
    places = places_on_the_way(name)
    for place in places:
        if place.type == DIRECTORY:
            if place.owner not in directory_owners:
                reason = (
                    f"the directory {place.path} belongs to user {user_name(place.owner)}, who can "
                    f"replace what is in it: use a directory of root, or chown root {place.path}"
                )
                raise SourceError(name, reason)
            others_may_write = place.mode & OTHERS_MAY_WRITE
            is_sticky = place.mode & STICKY
            if others_may_write and not is_sticky:
                reason = f"everybody may write to the directory {place.path}"
                raise SourceError(name, f"{reason}: chmod o-w {place.path}")
            if others_may_write:
                shared.add(place.path)
        elif place.directory in shared and place.owner not in owners:
            reason = (
                f"everybody may write to the directory {place.directory}, and {place.path} belongs "
                f"to user {user_name(place.owner)}: move the file to a directory of root"
            )
            raise SourceError(name, reason)
    return places[-1]


def trusted_path(name: str) -> str:
    """Return the path of a key source, without links, if no stranger can have put it there.

    The directories may belong to root, to the effective user, and to the owner of the file: whoever
    names a file of another user as a source trusts that user. Raises SourceError or OSError.
    """
    if not name:
        raise SourceError("--db", "the name is empty")
    status = stat_source(name)
    if status.st_mode & FILE_TYPE != REGULAR_FILE:
        raise SourceError(name, "not a regular file")
    owners = {0, posix.geteuid()}
    place = check_way(name, owners, owners | {status.st_uid})
    if place.mode & OTHERS_MAY_WRITE:
        raise SourceError(name, f"everybody may write to it: chmod o-w {place.path}")
    return place.path


def stat_source(name: str) -> "posix.stat_result":
    """Return the status of the file that `name` leads to. Raises SourceError."""
    try:
        return posix.stat(name)
    except FileNotFoundError:
        if name == STORE:
            reason = "no store yet: make one with --import SOURCE, or name one with --db"
        elif name.startswith("~"):
            reason = (
                "No such file or directory; the shell did not expand the ~: write the whole path"
            )
        else:
            reason = "No such file or directory"
    except OSError as error:
        reason = error.strerror or "cannot be read"
    except ValueError:
        reason = "the name contains a NUL"
    raise SourceError(name, reason)


def check_private_directory(directory: str) -> str:
    """Return the path, without links, of a directory in which no stranger may write.

    A store and a socket are made in such a directory. It belongs to root or to the effective user.
    Of all groups, only root's and that of this process may write to it. Raises SourceError, which
    names the directory and says what to do, or OSError.
    """
    owners = {0, posix.geteuid()}
    place = check_way(directory, owners, owners)
    if place.type != DIRECTORY:
        raise SourceError(directory, "not a directory")
    if place.mode & OTHERS_MAY_WRITE:
        reason = f"everybody may write to the directory {place.path}: use another directory"
        raise SourceError(directory, reason)
    if place.mode & GROUP_MAY_WRITE and place.group not in (0, posix.getegid()):
        reason = (
            f"the group {group_name(place.group)} may write to the directory {place.path}: "
            f"chmod g-w {place.path}, or use another directory"
        )
        raise SourceError(directory, reason)
    return place.path


def check_sqlite_neighbours(name: str, path: str) -> None:
    """Check that no stranger can have written the files that SQLite reads beside a database.

    SQLite believes these files, so whoever can make one of them can change the agents. name:
    the database as the user named it, for messages. path: the same without links. Raises
    SourceError or OSError.
    """
    directory = parent_of(path)
    if posix.stat(directory).st_mode & OTHERS_MAY_WRITE:
        reason = (
            f"everybody may put a -wal file beside it into the directory {directory}: move the "
            "database to another directory"
        )
        raise SourceError(name, reason)
    owners = (0, posix.geteuid(), posix.stat(path).st_uid)
    for suffix in ("-wal", "-shm", "-journal"):
        neighbour = path + suffix
        try:
            status = posix.stat(neighbour)
        except FileNotFoundError:
            continue
        if status.st_mode & OTHERS_MAY_WRITE or status.st_uid not in owners:
            reason = f"a stranger can have written {neighbour}: move it away"
            raise SourceError(name, reason)


# ------------------------------------------------------------------------ files: SQLite databases
# An SQLite database is opened for reading only. Its table or view `agent` holds the agents.

SQLITE_HEADER = b"SQLite format 3\0"
READ_VERSION = 19  # the byte of the header that tells how to read the database
WAL_MODE = 2  # its value if changes are in a -wal file
# SQLite calls is_late() each time its virtual machine has done this many steps, but not in a step.
STEPS_BETWEEN_LOOKS = 1000
SQLITE_LIMIT_LENGTH = 0  # SQLite's number for the limit on the size of a text or a row
LONGEST_TEXT = 100000  # bytes, for a request. One step on a longer text could take seconds.
LONGEST_TEXT_OF_ALL = 1000000000  # bytes, for reading all agents. It is the default of SQLite.
# These messages of SQLite quote nothing that is stored. No other message of SQLite is shown.
SQLITE_SAYS = (
    "database disk image is malformed",
    "disk I/O error",
    "file is not a database",
    "unable to open database file",
    "database or disk is full",
    "malformed database schema",
    "string or blob too big",
)
LONGEST_SHOWN_COLUMN = 30  # characters; keys are longer
NO_TABLE = "it lacks a table or view agent(id, name, ip, agent_key)"


def shown_column(name: str) -> str:
    """Return the name of a column, or `...` if the name may be stored text, even a key.

    SQLite names a column of a view after its expression, such as `'key of an agent'`.
    """
    return name if consists_of(name, NAME_LETTERS + " ", 1, LONGEST_SHOWN_COLUMN) else "..."


class Columns:
    """Which columns of a table, or words of a header, hold the fields of an agent.

    names: for each of FIELDS the name of its column. doubles: for each field with more than one
    such column, a text for people.
    """

    def __init__(self, found: "Sequence[str]", source: str) -> None:
        """Choose among the names that were found. SourceError names a column that is missing."""
        self.names: Dict[str, str] = {}
        self.doubles: Dict[str, str] = {}
        for field in FIELDS:
            known = [name.lower() for name in COLUMN_NAMES[field]]
            # The order is that of COLUMN_NAMES, so the first name is the preferred one.
            fitting = [name for wanted in known for name in found if name.lower() == wanted]
            if not fitting:
                there = ", ".join([shown_column(name) for name in found[:20]])
                choice = " or ".join(COLUMN_NAMES[field])
                raise SourceError(source, f"it lacks a column {choice}; it has {there}")
            self.names[field] = fitting[0]
            if len(fitting) > 1:
                self.doubles[field] = f"it has two columns for the {field}: {' and '.join(fitting)}"
        register_ip = [name for name in found if name.lower() == "register_ip"]
        # The column `ip` of the manager's own table is not the ip of the record (is_of_manager).
        if self.is_of_manager and register_ip:
            self.names["ip"] = register_ip[0]
            self.doubles.pop("ip", None)

    @property
    def is_of_manager(self) -> bool:
        """Return True for a table like the manager's global.db.

        There `ip` is the address that was last seen, `register_ip` is the one of client.keys, and
        the row with id 0 is the manager itself.
        """
        return self.names["key"].lower() == "internal_key"


def rows_query(columns: "Dict[str, str]", quote: str = '"') -> str:
    """Return the query for all agents. quote: what the database puts around a column's name.

    The names are among COLUMN_NAMES, so there is no quote in them.
    """
    names = [f"{quote}{columns[field]}{quote}" for field in FIELDS]
    return f"SELECT {', '.join(names)} FROM agent"


class SqliteSource:
    """The table or view `agent` in an SQLite database.

    deadline: when queries are given up, by time.monotonic(). is_frozen: this connection never sees
    a change of the file. skipped: for each kind of row that rows() left out, a text for people, the
    number of these rows.
    """

    unit = "row"

    def __init__(
        self, connection: "SqliteConnection", name: str, seconds: float, is_frozen: bool = False
    ) -> None:
        """Take a connection. seconds: the time for all queries, until `deadline` is set anew."""
        self.connection = connection
        self.name = name
        self.is_frozen = is_frozen
        self.skipped: Dict[str, int] = {}
        self.deadline = time.monotonic() + seconds
        self._columns: Optional[Columns] = None
        self._by_rowid = False  # whether find() can use the numbers of the rows
        self._keeps_types = False  # whether find() must not let SQLite convert the values
        self._queries: Dict[Tuple[str, int], str] = {}
        # Latin-1 decodes every byte. No rule of judge() accepts a character beyond ASCII.
        connection.text_factory = lambda text: str(text, "latin-1")
        connection.set_progress_handler(self.is_late, STEPS_BETWEEN_LOOKS)
        self._limit_texts(LONGEST_TEXT)

    def is_late(self) -> bool:
        """Return True if the query must be given up."""
        return time.monotonic() > self.deadline

    def _limit_texts(self, length: int) -> None:
        """Make SQLite refuse texts of more bytes. Python before 3.11 cannot set this limit."""
        if hasattr(self.connection, "setlimit"):
            self.connection.setlimit(SQLITE_LIMIT_LENGTH, length)

    def query(self, sql: str, values: "Sequence[Any]" = ()) -> "Iterator[Tuple[Any, ...]]":
        """Yield the rows of a query. Raises SourceError."""
        try:
            yield from self.connection.execute(sql, values)
        except RequestError:
            raise  # It is the alarm of answer_in_time().
        except Exception as error:
            raise SourceError(self.name, reason_of(error)) from None

    @property
    def columns(self) -> Columns:
        """Return the columns of the table, which are looked up once. Raises SourceError."""
        if self._columns is None:
            columns = Columns(self._column_names(), self.name)
            # If a table has both `key` and `internal_key`, nobody can tell which one is meant. But
            # if it has `agent_key`, which is our own name, then `agent_key` is meant.
            if "key" in columns.doubles and columns.names["key"].lower() != "agent_key":
                raise SourceError(self.name, columns.doubles["key"])
            self._read_definition()
            self._columns = columns
        return self._columns

    def _column_names(self) -> "List[str]":
        """Return the names of all columns of the table. Raises SourceError."""
        try:
            cursor = self.connection.execute("SELECT * FROM agent LIMIT 0")
        except RequestError:
            raise  # It is the alarm of answer_in_time().
        except Exception as error:
            raise SourceError(self.name, reason_of(error)) from None
        return [column[0] for column in cursor.description]

    def _read_definition(self) -> None:
        """Find out how rows can be found. Raises SourceError."""
        views = []
        agent_type = ""
        agent_sql = ""
        query = (
            "SELECT type, lower(name), upper(sql) FROM sqlite_master "
            "WHERE name = 'agent' COLLATE NOCASE OR type = 'view'"
        )
        for kind, name, sql in self.query(query):
            if kind == "view":
                views.append(sql)
            if name == "agent" and kind in ("table", "view"):
                agent_type = kind
                agent_sql = sql
        # The rows of a view have no numbers, and neither have those of some tables.
        has_no_rowid = "WITHOUT" in agent_sql or "VIRTUAL" in agent_sql
        self._by_rowid = agent_type == "table" and not has_no_rowid
        set_operators = ("UNION", "INTERSECT", "EXCEPT")
        has_parts = any(word in sql for sql in views for word in set_operators)
        self._keeps_types = agent_type == "view" and has_parts

    def find(self, request: Request) -> "List[Row]":
        """Return the rows whose id or ip is one of the texts of the request. Raises SourceError."""
        values: List[Any] = list(self.spellings(request))
        if request.field == "id":
            values.append(int(request.value))  # for columns that hold numbers
        query = self._find_query(request.field, len(values))
        rows: List[Row] = list(self.query(query, values))
        if self.columns.is_of_manager:
            return [row for row in rows if not self._is_the_manager(row)]
        return rows

    def _find_query(self, field: str, count: int) -> str:
        """Return the query for the rows in which a field is one of `count` values.

        Raises SourceError. A server asks thousands of times per second, so the text is kept.
        """
        query = self._queries.get((field, count))
        if query is None:
            names = self.columns.names
            marks = ", ".join(["?"] * count)
            condition = f'"{names[field]}" IN ({marks})'
            if self._keeps_types:
                # The column may be text in one part of a UNION and a number in another. SQLite
                # converts the values to the type of the first part, and they then equal nothing in
                # the other part. The + prevents this, but also the use of an index.
                condition = f"+{condition}"
            query = f"{rows_query(names)} WHERE {condition}"
            if self._by_rowid:
                # The index of a damaged database may not match its table. Then a plain query
                # returns the id of one agent, from the index, with the key of another, from the
                # table. So the index only finds the numbers of rows, and all columns are read from
                # the table. best_rows() leaves out the wrong rows.
                wanted = ", ".join([f'agent."{names[each]}"' for each in FIELDS])
                query = (
                    f"SELECT {wanted} FROM agent AS found CROSS JOIN agent "
                    f"ON agent._rowid_ = found._rowid_ WHERE found.{condition}"
                )
            self._queries[field, count] = query
        return query

    def spellings(self, request: Request) -> "List[str]":
        """Return the texts under which find() finds an agent."""
        return request.texts

    def rows(self) -> "Iterator[Tuple[int, Row]]":
        """Yield the number and the row of each agent. Raises SourceError."""
        # At a text over the limit, SQLite ends the query, and all later agents would be missing.
        self._limit_texts(LONGEST_TEXT_OF_ALL)
        query = rows_query(self.columns.names)
        for number, row in enumerate(self.query(query), 1):
            if self._is_the_manager(row):
                self.skipped["row of the manager itself (id 0)"] = 1
            else:
                yield number, row

    def _is_the_manager(self, row: "Row") -> bool:
        """Return True for the row of the manager itself in its global.db."""
        return self.columns.is_of_manager and id_of(row[0]) == "000"

    def close(self) -> None:
        """Close the database."""
        self.connection.close()


def reason_of(error: BaseException) -> str:
    """Return what to tell of an exception of SQLite, without what it quotes from a database."""
    text = str(error)
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if text == "interrupted":
        return "no answer in time (--timeout)"
    if text == "database is locked":
        return "locked by others, no answer in time (--timeout)"
    if text == "no such table: agent":
        return NO_TABLE
    if text.startswith(("no such table", "no such column")):
        return "a view in it uses a table or a column that does not exist"
    text = text.partition(" (")[0]  # as in "malformed database schema (NAME)"
    if text in SQLITE_SAYS:
        return text
    return "SQLite cannot read it"


def open_sqlite(name: str, path: str, header: bytes, seconds: float) -> SqliteSource:
    """Return the source in an SQLite file, of which `header` is the beginning.

    Raises SourceError or OSError.
    """
    import _sqlite3  # `sqlite3` costs 5 M instructions more, for names that are not needed here.

    check_sqlite_neighbours(name, path)
    # A database in WAL mode makes SQLite write files beside it, even for reading. Where this user
    # cannot write, SQLite refuses the database, unless we say that nobody changes the file
    # (immutable). That is true while there is no -wal file.
    in_wal_mode = len(header) > READ_VERSION and header[READ_VERSION] == WAL_MODE
    has_wal_file = posix.access(path + "-wal", posix.F_OK)
    directory_is_writable = posix.access(parent_of(path), posix.W_OK)
    is_frozen = in_wal_mode and not has_wal_file and not directory_is_writable
    encoded = path.encode(sys.getfilesystemencoding(), "surrogateescape")
    uri = "file:" + "".join([f"%{byte:02X}" for byte in encoded]) + "?mode=ro"
    if is_frozen:
        uri += "&immutable=1"
    try:
        connection = _sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)
    except RequestError:
        raise  # It is the alarm of answer_in_time().
    except Exception as error:
        raise SourceError(name, reason_of(error)) from None
    return SqliteSource(connection, name, seconds, is_frozen)


# -------------------------------------------------------------------- files: CSV and client.keys
# A text file has one agent a line. For a request, the whole file is read.

BLOCK = 1 << 16  # characters that are read at once
LONGEST_LINE = 1 << 20  # characters; a longer line is not that of a list of agents
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = "\xef\xbb\xbf"  # a byte order mark, read as Latin-1
MISSING = "\0"  # stands for a field that a line lacks; judge() refuses it in every field
UNPRINTABLE = "\x01"  # replaces a NUL or a stray carriage return; judge() refuses it, too
DELIMITERS = (",", ";", "\t", "|", ":", " ")  # those that a line `sep=` may name
CSV_HINT = "the first line of a CSV file must be id,name,ip,key"
TOO_MANY_FIELDS = "its line has more fields than the header"
PSQL_FOOTER = "it is a footer of psql: use `psql --csv`, or \\copy agent TO FILE CSV HEADER"
SKIPPED_SPACE = "lines that begin with a space"
SKIPPED_REMOVED = "removed agents of client.keys"


class TextLines:
    """The lines of a text file, without their ends.

    number: of the line that next_line() returned last. is_unfinished: becomes True when the last
    line of the file is taken, if this line has no newline.
    """

    def __init__(self, stream: "BinaryIO", name: str) -> None:
        """Take an open file. Excel writes UTF-16 with a mark. All else is read as Latin-1."""
        from io import TextIOWrapper
        from itertools import chain

        start = stream.peek(2)[:2]  # type: ignore[attr-defined]
        encoding = "utf-16" if start in UTF16_MARKS else "latin-1"
        # Only "\n" ends a line, as for the manager.
        self.stream = TextIOWrapper(stream, encoding=encoding, errors="replace", newline="\n")
        self.name = name
        self.number = 0
        self.is_unfinished = False
        self.rest = chain.from_iterable(self._blocks())  # the lines that nobody has taken yet

    def _blocks(self) -> "Iterator[List[str]]":
        """Yield the lines, many at once. Raises SourceError."""
        started = ""  # the beginning of a line whose end has not been read yet
        block = self.stream.read(BLOCK)
        while block:
            text = started + block
            if "\r" in text:
                text = text.replace("\r\n", "\n")  # the lines of Windows
            lines = text.split("\n")
            started = lines.pop()
            if len(started) > LONGEST_LINE:
                reason = "a line is longer than 1 MB: this is not a list of agents"
                raise SourceError(self.name, reason)
            if "\r" in text or "\0" in text:
                lines = [without_returns(line) for line in lines]
            yield lines
            block = self.stream.read(BLOCK)
        if started:
            self.is_unfinished = True  # All other lines have been taken when this is reached.
            yield [without_returns(started)]

    def next_line(self) -> "Optional[str]":
        """Return one line, None at the end of the file. Raises SourceError."""
        self.number += 1
        return next(self.rest, None)


def without_returns(line: str) -> str:
    """Return a line without the carriage return of Windows at its end.

    A return or a NUL within the line becomes a character that judge() refuses. The module csv would
    end the row at a return, and before Python 3.11 it would raise an error at a NUL.
    """
    if line.endswith("\r"):
        line = line[:-1]
    return line.replace("\r", UNPRINTABLE).replace("\0", UNPRINTABLE)


def spellings_in_text(request: Request) -> "List[str]":
    """Return the texts to look for where a spreadsheet may have written 1.0 for the id 1."""
    if request.field == "ip":
        return request.texts
    return request.texts + [f"{text}.0" for text in request.texts]


class TextSource:
    """Agents in a text file, which is read once.

    parsed: an iterator with one row for each line. first: the number of the first of these lines.
    finish: takes a parsed row and returns the row of an agent, or None if the line has no agent.
    skipped: for each kind of line that was left out, a text for people, the number of these lines.
    unfinished_line: after rows(), the number of a last line that has no newline, or None.
    """

    unit = "line"

    def __init__(
        self,
        lines: TextLines,
        parsed: "Iterator[List[Any]]",
        first: int,
        finish: "Callable[[List[Any], Dict[str, int]], Optional[Row]]",
    ) -> None:
        """Take the lines and the two functions that make rows of them."""
        self.lines = lines
        self.name = lines.name
        self.parsed = parsed
        self.first = first
        self.finish = finish
        self.deadline = 0.0  # Every source has one. The time for a text is limited by an alarm.
        self.skipped: Dict[str, int] = {}
        self.unfinished_line: Optional[int] = None

    def spellings(self, request: Request) -> "List[str]":
        """Return the texts under which find() finds an agent."""
        return spellings_in_text(request)

    def find(self, request: Request) -> "List[Row]":
        """Return the rows whose id or ip is one of the spellings. Raises SourceError."""
        place = FIELDS.index(request.field)
        wanted = set(self.spellings(request))
        candidates = [row for row in self.parsed if row[place] in wanted]
        agents = [self.finish(row, self.skipped) for row in candidates]
        return [row for row in agents if row is not None]

    def rows(self) -> "Iterator[Tuple[int, Row]]":
        """Yield the number of the line and the row of each agent. Raises SourceError."""
        number = self.first - 1
        for row in self.parsed:
            number += 1
            agent = self.finish(row, self.skipped)
            if agent is not None:
                yield number, agent
        if self.lines.is_unfinished:
            self.unfinished_line = number

    def close(self) -> None:
        """Close the file."""
        self.lines.stream.close()


def parse_client_keys(lines: TextLines, first: str) -> "Iterator[List[Any]]":
    """Yield the four parts of each line of a manager's client.keys, from the line `first` on."""
    from itertools import chain

    for line in chain([first], lines.rest):
        row: List[Any] = line.split(" ", 3)
        if len(row) < 4:
            row += [MISSING] * (4 - len(row))
        if lines.is_unfinished:  # so this is the last line
            row[3] = Unreadable(UNFINISHED_LINE)
        yield row


def finish_client_keys(row: "List[Any]", skipped: "Dict[str, int]") -> "Optional[Row]":
    """Return the row of an agent, None for a line that the manager skips (see tests/MANAGER.md)."""
    agent_id = row[0]
    name = row[1]
    if not agent_id:
        is_empty_line = name == MISSING  # A line that begins with a space has a second part.
        if not is_empty_line:
            skipped[SKIPPED_SPACE] = skipped.get(SKIPPED_SPACE, 0) + 1
        return None
    if agent_id[0] == "#":
        return None
    if name[:1] in ("!", "#"):
        skipped[SKIPPED_REMOVED] = skipped.get(SKIPPED_REMOVED, 0) + 1
        return None
    return row


class CsvFormat:
    """How the agents stand in a CSV file. places: the position of each of FIELDS in a line."""

    def __init__(self, delimiter: str, places: "List[int]", width: int) -> None:
        """Keep the delimiter, the positions, and the number of columns."""
        self.delimiter = delimiter
        self.places = places
        self.width = width


def parse_csv(lines: TextLines, layout: CsvFormat) -> "Iterator[List[Any]]":
    """Yield the id, name, ip and key of each line after the header. Raises SourceError.

    Two programs write tabs between the fields. `mysql --batch` writes escapes with backslashes, and
    Excel puts fields into quotes. The module csv cannot read both, so it leaves the fields between
    tabs as they are, and unescaped() removes the escapes and the quotes.
    """
    import csv
    from operator import itemgetter

    has_tabs = layout.delimiter == "\t"
    csv.field_size_limit(2 * LONGEST_LINE)
    reader = csv.reader(
        lines.rest,
        delimiter=layout.delimiter,
        strict=True,
        quoting=csv.QUOTE_NONE if has_tabs else csv.QUOTE_MINIMAL,
    )
    pick = itemgetter(*layout.places)
    for fields in one_row_per_line(reader, lines):
        has_all_fields = len(fields) == layout.width
        row = list(pick(fields)) if has_all_fields else odd_row(fields, layout)
        if has_tabs:
            row = [unescaped(field) for field in row]
        if lines.is_unfinished:  # so this is the last line
            row[3] = Unreadable(UNFINISHED_LINE)
        yield row


def one_row_per_line(reader: "Any", lines: TextLines) -> "Iterator[List[str]]":
    """Yield the rows of a csv.reader after the header. Raises SourceError.

    This function must stay short. If there is no memory left, Python 3.11 hangs in a `try` that is
    many instructions after the beginning of its function, because Python then has to allocate an
    integer for the position of the instruction.
    """
    import csv

    header_lines = lines.number
    count = 0  # rows before this one, without the header
    try:
        for fields in reader:
            # A quote that is never closed makes one row of many lines, and their agents would be
            # missing. line_num is the number of lines that the reader has taken for all rows.
            spans_lines = reader.line_num != count + 1
            if spans_lines:
                raise csv.Error
            count += 1
            yield fields
    except csv.Error:
        reason = f"line {header_lines + count + 1}: a broken quote, or a row that spans lines"
        raise SourceError(lines.name, reason) from None


def odd_row(fields: "List[str]", layout: CsvFormat) -> "List[Any]":
    """Return the id, name, ip and key of a line with more or fewer fields than the header."""
    if not any(fields):
        return ["", "", "", ""]
    missing = [MISSING] * (layout.width - len(fields))  # none if the line is too long
    row: List[Any] = [(fields + missing)[place] for place in layout.places]
    is_footer = len(fields) == 1 and fields[0][:1] == "(" and fields[0].endswith(("row)", "rows)"))
    if is_footer:
        row[3] = Unreadable(PSQL_FOOTER)
    elif any(fields[layout.width :]):
        # Perhaps the key contains a delimiter. Then the field of the key holds only a part of it.
        # Empty fields at the end do no harm.
        row[3] = Unreadable(TOO_MANY_FIELDS)
    return row


def finish_csv(row: "List[Any]", _skipped: "Dict[str, int]") -> "Optional[Row]":
    """Return the row, None if all its fields are empty, as at the end of a spreadsheet."""
    return row if any(row) else None


def unescaped(field: "Any") -> "Any":
    """Return a field between tabs without Excel's quotes and without the escapes of `mysql`."""
    if isinstance(field, Unreadable):
        return field
    if len(field) > 1 and field[0] == field[-1] == '"':
        field = field[1:-1].replace('""', '"')
    if field in ("NULL", "\\N"):
        return ""
    # Two backslashes stand for one. What stands between them is looked at on its own, so that
    # `\\t` is a backslash and a `t`, not a tab.
    parts = field.split("\\\\")
    plain = [part.replace("\\t", "\t").replace("\\n", "\n").replace("\\0", "\0") for part in parts]
    return "\\".join(plain)


def open_text(stream: "BinaryIO", name: str) -> TextSource:
    """Return the source in a text file. The first line with content tells the format of the file.

    Empty lines, comments and lines that begin with a space may stand before it. Raises SourceError.
    """
    lines = TextLines(stream, name)
    skipped: Dict[str, int] = {}
    delimiters = ",;\t"
    line = lines.next_line()
    if line and line.startswith(UTF8_MARK):
        line = line[len(UTF8_MARK) :]
    names_delimiter = line is not None and line[:4].lower() == "sep=" and line[4:] in DELIMITERS
    if line and names_delimiter:
        delimiters = line[4]  # Excel takes the delimiter from such a line, too.
        line = lines.next_line()
    has_comments = False
    layout = None
    while line is not None and line[:1] in ("", " ", "#"):
        layout = read_header_after_space(line, delimiters, name)
        if layout:
            break
        if line.strip():
            has_comments = True
        if line[:1] == " ":
            skipped[SKIPPED_SPACE] = skipped.get(SKIPPED_SPACE, 0) + 1
        line = lines.next_line()
    has_only_comments = line is None and has_comments
    line = line or ""  # From here on, an empty text means the end of the file.
    layout = layout or read_csv_header(line, delimiters, name)
    if layout:
        return TextSource(lines, parse_csv(lines, layout), lines.number + 1, finish_csv)
    # In a client.keys, a person may have commented out all agents.
    if has_only_comments or name.endswith(".keys") or looks_like_client_keys(line):
        parsed = parse_client_keys(lines, line)
        source = TextSource(lines, parsed, lines.number, finish_client_keys)
        source.skipped.update(skipped)
        return source
    if not line:
        raise SourceError(name, "it is empty")
    raise SourceError(name, what_it_seems_to_be(line))


def read_csv_header(line: str, delimiters: str, name: str) -> "Optional[CsvFormat]":
    """Return the format of a CSV file by its first line, None if that is no header.

    Raises SourceError for a header that lacks a column or has two for one field.
    """
    import csv

    # A line with an `id` or with two other known names is a header. If such a line lacks a column,
    # the header has a fault, and the file has no other format.
    known = {column.lower() for names in COLUMN_NAMES.values() for column in names}
    for delimiter in delimiters:
        try:
            words = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        words = [word.strip(" ") for word in words]
        recognized = [word.lower() for word in words if word.lower() in known]
        is_header = "id" in recognized or len(recognized) >= 2
        if not is_header:
            continue
        try:
            columns = Columns(words, name)
        except SourceError:
            # This may be the line of an agent that has the name `id`. Then the message of the error
            # must not be shown, because it repeats the other words of the line.
            if has_agent_in(words):
                continue
            raise
        if columns.doubles:
            raise SourceError(name, f"in its header, {'; '.join(columns.doubles.values())}")
        places = [words.index(columns.names[field]) for field in FIELDS]
        return CsvFormat(delimiter, places, len(words))
    return None


def read_header_after_space(line: str, delimiters: str, name: str) -> "Optional[CsvFormat]":
    """Return the format of a CSV file if the line is a header that begins with a space.

    Return None if it is not, also if it lacks a column: in a client.keys, such a line is a comment,
    and a comment may name columns, too.
    """
    if not line.startswith(" "):
        return None
    try:
        return read_csv_header(line, delimiters, name)
    except SourceError:
        return None


def has_agent_in(words: "Sequence[str]") -> bool:
    """Return True if one of the words is an id or an address. A header has no such word."""
    return any(is_agent_id(word) or (word and ip_of(word)) for word in words)


def looks_like_client_keys(line: str) -> bool:
    """Return True if a line has the form `id name ip key` of a manager's client.keys.

    It is enough that the id or the ip is sound. The fault of the other one is told later.
    """
    words = line.split(" ", 3)
    if len(words) < 4 or not words[3]:
        return False
    ip = words[2]
    is_address = ("." in ip or ":" in ip) and not ip.strip(DIGITS + "abcdefABCDEF.:/")
    return not words[0].strip(DIGITS) or ip == "any" or is_address


def what_it_seems_to_be(line: str) -> str:
    """Return what kind of file begins with this line, as far as that is obvious, and a hint.

    The text quotes nothing of the line, because the line may contain a key.
    """
    if line.startswith("PK\3\4"):
        what = "it seems to be a spreadsheet (xlsx) or another zip file: save it as CSV"
    elif line.startswith("+--"):
        what = "it seems to be the output of `mysql -t`: use `mysql --batch`"
    elif line[0] in "{[":
        what = "it seems to be JSON"
    elif line.startswith(("--", "/*")):
        what = "it seems to be an SQL script: give it a name that ends in .sql"
    elif "\t" in line or "," in line or ";" in line:
        what = "its first line is not a header with the columns of an agent"
    elif "|" in line:
        what = "it seems to be the output of psql: use `psql --csv`"
    else:
        what = "it is not an SQLite database, a CSV file, a client.keys or a script named .sql"
    return f"{what}; {CSV_HINT}"


# ------------------------------------------------------------------------------------- the answer
# From here on the kind of the source does not matter.


def is_url(name: str) -> bool:
    """Return True if a source is a database on a server. Part two opens it."""
    if name[:1] in ("/", "."):
        return False
    return "://" in name or name.startswith(("mysql:", "mariadb:", "postgresql:", "postgres:"))


def is_script(name: str) -> bool:
    """Return True if a source is an SQL script. Part two loads it into memory."""
    return name.endswith(".sql") and not is_url(name)


def open_source(name: str, seconds: float) -> "AgentSource":
    """Return the source that --db or --import names. seconds: how long each query may take.

    Every source has find(request), which returns rows as they are stored, and rows(), which yields
    (number, row) for each agent. A row has the order of FIELDS. Raises SourceError or OSError.
    """
    if is_url(name):
        return Database(name, seconds)
    path = trusted_path(name)
    if is_script(name):
        return open_script(path, name, seconds)
    stream = open(path, "rb")  # noqa: SIM115 - the source closes it
    header = stream.peek(READ_VERSION + 1)[: READ_VERSION + 1]
    if header.startswith(SQLITE_HEADER):
        stream.close()
        return open_sqlite(name, path, header, seconds)
    try:
        return open_text(stream, name)
    except RequestError:
        stream.close()  # A server would keep one more file open for every failed request.
        raise


def look_up(words: "Sequence[str]", find_source: "Callable[[], Source]") -> Answer:
    """Return the answer with the record that the words ask for. Raises RequestError or OSError."""
    request = parse_request(words)
    rows = best_rows(find_source().find(request), request)
    if not rows:
        raise RequestError(NOT_FOUND)
    if len(rows) > 1:
        raise RequestError(FOUND_SEVERAL, request.field)
    record, faults = judge(rows[0])
    if faults:
        raise RequestError(INVALID_RECORD, f"{agent_of(record)}: {faults[0].text}")
    return Answer(NO_ERROR, MESSAGES[NO_ERROR] + agent_of(record), record)


def answer(words: "Sequence[str]", find_source: "Callable[[], Source]", source: str) -> Answer:
    """Return the answer to a request, on the command line or over a socket.

    words: the request, as anyone may have sent it. find_source: returns the source; it is called
    only if the request makes sense. source: the name of the source. This function raises no
    exception, unless the alarm of answer_in_time() rings while an error is being handled.
    """
    try:
        return look_up(words, find_source)
    except RequestError as error:
        return Answer.of_error(error)
    except ImportError as error:
        return Answer.of_error(RequestError(SOURCE_UNREADABLE, without_module(error)))
    except MemoryError:
        return Answer.of_error(SourceError(source, "it needs too much memory"))
    except OSError as error:
        name = error.filename or source
        return Answer.of_error(SourceError(str(name), error.strerror or "cannot be read"))
    except Exception as error:
        return Answer.of_error(unforeseen(error))


def without_module(error: ImportError) -> str:
    """Return what to do about a Python that lacks a module, such as Debian's python3-minimal."""
    return (
        f"{sys.executable} has no module {error.name}: install the whole of python3 "
        "(Debian: the package python3)"
    )


def unforeseen(error: BaseException) -> RequestError:
    """Return the error for an exception that nobody has foreseen.

    It tells the line of this file, but not the text of the exception, which could contain a key.
    """
    line = 0
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == unforeseen.__code__.co_filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    what = getattr(error, "strerror", None) or type(error).__name__
    return RequestError(INTERNAL_ERROR, f"{what} in line {line} of the script")


# ----------------------------------------------------------------------------- a request by argv
# The executable method: the manager runs the program and reads one line from its standard output.


def say(descriptor: int, text: str) -> None:
    """Write a line for people to descriptor 1 or 2.

    Raises OSError if standard output does not take it. What stderr does not take is lost.
    """
    line = printable(text).encode("ascii") + b"\n"
    try:
        posix.write(descriptor, line)
    except OSError as error:
        if descriptor == 1:
            raise OSError(error.errno, error.strerror, "standard output") from None


def tell_syslog(is_error: bool, text: str) -> None:
    """Write a line to syslog, where an administrator looks for what the manager does not show.

    The answer has been printed by then, so whatever goes wrong here is not worth an error.
    """
    try:
        import syslog

        # A syslog that nobody reads could hold us for ever, in each of several system calls. The
        # alarm rings after one second and then twice a second, and each ring ends one such call.
        signal(SIGALRM, do_nothing)
        setitimer(ITIMER_REAL, 1, 0.5)
        syslog.openlog(NAME, syslog.LOG_PID, syslog.LOG_AUTHPRIV)
        syslog.syslog(syslog.LOG_ERR if is_error else syslog.LOG_INFO, printable(text))
    except Exception:
        return


def do_nothing(*_: object) -> None:
    """Handle a signal that only has to interrupt a system call."""


def answer_in_time(words: "Sequence[str]", source: str, seconds: float) -> Answer:
    """Return the answer to a request by argv within `seconds`.

    An alarm raises SourceError in whatever Python code runs then. It cannot interrupt a single long
    step of SQLite or of a database driver; these have time limits of their own.
    """

    def give_up(*_: object) -> "NoReturn":
        raise SourceError(source, "no answer in time (--timeout)")

    try:
        signal(SIGALRM, give_up)
        setitimer(ITIMER_REAL, seconds)
        # The alarm cannot tell why SQLite waits. So SQLite gives up a little before the alarm, and
        # tells the reason, such as a lock.
        query_seconds = seconds * 0.9
        result = answer(words, lambda: open_source(source, query_seconds), source)
        signal(SIGALRM, do_nothing)  # From here on the alarm interrupts nothing.
        setitimer(ITIMER_REAL, 0)
        return result
    except RequestError as late:
        return Answer.of_error(late)
    except OSError as error:  # The alarm cannot be set.
        return Answer.of_error(SourceError(source, error.strerror or "no alarm can be set"))


def answer_once(words: "Sequence[str]", source: str, seconds: float) -> None:
    """Print the answer to a request, and tell syslog about it if an operator should know."""
    result = answer_in_time(words, source, seconds)
    try:  # noqa: SIM105 - contextlib would cost 6 M instructions
        posix.write(1, result.line())
    except OSError:
        pass  # The manager has closed its end of the pipe, so nobody is left to tell.
    if result.number in FOR_THE_OPERATOR:
        tell_syslog(result.number != NO_ERROR, f"{' '.join(words)}: {result.message}")


def seconds_in(text: str) -> float:
    """Return the number of seconds in `text`: more than 0, at most LONGEST_TIMEOUT; else 0.0."""
    if not consists_of(text.replace(".", "", 1), DIGITS, 1, 8):
        return 0.0
    seconds = float(text)
    return seconds if seconds <= LONGEST_TIMEOUT else 0.0


def default_source() -> str:
    """Return the source that is used without --db: $AGENT_KEY_DB, or else the store."""
    named = posix.environ.get(b"AGENT_KEY_DB", b"")
    return named.decode(sys.getfilesystemencoding(), "surrogateescape") or STORE


class SimpleRequest:
    """A request by argv. words: `id` or `ip` and a value. seconds: its time limit."""

    def __init__(self, words: "List[str]", source: str, seconds: float) -> None:
        """Keep what was asked."""
        self.words = words
        self.source = source
        self.seconds = seconds


def read_simple_request(arguments: "Sequence[str]") -> "Optional[SimpleRequest]":
    """Return the request if the command line is `[--db SOURCE] [--timeout SECONDS] id|ip VALUE`.

    Return None for every other command line, also for one with a mistake. Part two reads it with
    argparse, which costs as much as a whole request.
    """
    options: Dict[str, str] = {}
    rest = list(arguments)
    while len(rest) > 2 and rest[0] in ("--db", "--timeout"):
        name = rest.pop(0)
        value = rest.pop(0)
        if name in options or not value or value.startswith("-"):
            return None
        options[name] = value
    is_request = len(rest) == 2 and rest[0] in ("id", "ip")
    source = options.get("--db") or default_source()
    seconds = REQUEST_SECONDS
    if "--timeout" in options:
        seconds = seconds_in(options["--timeout"])
    if not is_request or not seconds:
        return None
    if is_url(source) or is_script(source):
        return None
    return SimpleRequest(rest, source, seconds)


def prepare_process() -> None:
    """Put right what the manager, or whoever starts the program, may have left open or blocked."""
    # If descriptor 0, 1 or 2 is closed, a file that is opened later would get its number, and our
    # output. So fill them up.
    while posix.open("/dev/null", posix.O_RDWR) < 3:
        pass
    # The manager starts its programs with some of these signals blocked. Then it could not end us,
    # and the alarm would not ring.
    pthread_sigmask(SIG_UNBLOCK, (SIGTERM, SIGINT, SIGHUP, SIGALRM))
    signal(SIGINT, SIG_DFL)


if __name__ == "__main__":
    prepare_process()
    simple_request = read_simple_request(sys.argv[1:])
    if simple_request:
        answer_once(simple_request.words, simple_request.source, simple_request.seconds)
        posix._exit(0)  # An orderly end of the interpreter would cost 7 M instructions.

# ============================================================== part two: everything else
# What is not a single request to a file: databases, SQL scripts, the server, the store, and what a
# person asks for. A request to a file does not come here, so part two imports what it likes.

import argparse
import contextlib
import errno
import fcntl
import grp
import os
import re
import select
import signal as signals
import site
import socket
import stat
import struct
import zlib
from _signal import SIG_BLOCK
from _socket import socket as BareSocket  # noqa: N812 - it is a class
from functools import partial
from hashlib import sha256
from importlib import import_module
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

missing_module: "Optional[ImportError]" = None
try:
    import json
    import mmap
    import shlex
    import sqlite3
    import subprocess
    from difflib import get_close_matches
    from urllib.parse import quote
except ImportError as error:
    # Debian's python3-minimal lacks these modules. `--help` and `--version` work without them. For
    # everything else, run_command() tells what to install.
    missing_module = error

# --------------------------------------------------------------------------------------- common
# What several sections of part two need.

NOBODY = "00000000"  # an id that no agent has


class CommandError(Exception):
    """The reason why a command such as --import cannot do its work.

    The text goes to stderr, and the exit status is 1.
    """


class UsageError(CommandError):
    """A mistake in a command line, such as the one in exec_path. The exit status is 2."""


class Options(NamedTuple):
    """What the command line asks for.

    db: the source, with the defaults applied. given_db: what --db itself said. timeout: in seconds.
    import_source: what --import names. manager: None without --manager, "" for the usual home.
    """

    db: str = STORE
    given_db: "Optional[str]" = None
    timeout: "Optional[float]" = None
    socket: "Optional[str]" = None
    mode: "Optional[int]" = None
    group: "Optional[str]" = None
    workers: "Optional[int]" = None
    verbose: bool = False
    as_json: bool = False
    import_source: str = ""
    skip_invalid: bool = False
    manager: "Optional[str]" = None


class LinePrefixes(NamedTuple):
    """What stands before a line on stderr, for each level."""

    info: str
    note: str
    error: str


def journal_reads_stderr() -> bool:
    """Return True if systemd gave us a stream of the journal as stderr.

    $JOURNAL_STREAM names the stream by its device and inode (systemd.exec(5)).
    """
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def stderr_prefixes() -> LinePrefixes:
    """Return the prefixes for stderr. If the journal reads stderr, they are its priorities."""
    if journal_reads_stderr():
        return LinePrefixes("<6>", "<5>", "<3>")
    return LinePrefixes(f"{NAME}: info: ", f"{NAME}: note: ", f"{NAME}: error: ")


def plural(number: int, what: str) -> str:
    """Return a number and what is counted, such as `1 agent` or `4,597 agents`."""
    ending = "" if number == 1 else "s"
    return f"{number:,} {what}{ending}"


def message_of(problem: BaseException) -> str:
    """Return the text that tells a person about an exception that the program expects."""
    if isinstance(problem, RequestError):
        return problem.message
    if isinstance(problem, OSError) and problem.strerror:
        if problem.filename:
            return f"{os.fsdecode(problem.filename)}: {problem.strerror}"
        return problem.strerror
    if is_sqlite_error(problem):
        return reason_of(problem)
    return str(problem)


def is_sqlite_error(problem: BaseException) -> bool:
    """Return True for an exception of SQLite. Without the module there is none."""
    return not missing_module and isinstance(problem, sqlite3.Error)


# ---------------------------------------------------------------------------------------- databases
# A URL names a database of MySQL, MariaDB or PostgreSQL with a table or view `agent`. This section
# takes the URL apart, imports a driver, and asks the database in transactions that can only read. A
# request waits until its deadline and no longer. A connection that fails is closed at once.

WRONG_URL = (
    "a URL is mysql://user@host/database or postgresql://user@host/database, with special "
    "characters percent-encoded and without a password, because `ps` would show it; put the "
    "password into a file and add ?read_default_file=FILE (MySQL) or ?passfile=FILE (PostgreSQL)"
)
# A URL with a password must not match, whatever characters the password contains. Such a URL has a
# colon before the password and an @ after it. So an @ can only stand after the user, and the user
# cannot contain a colon.
HOST_NAME = r"[^][:@/?#,]*"
IPV6_HOST = r"\[[^]@/?#,]*\]"  # an address in brackets
HOST = rf"(?:{IPV6_HOST}|{HOST_NAME})(?::[0-9]{{1,5}})?"  # A port may follow.
URL = re.compile(
    r"(?P<scheme>mysql|mariadb|postgres|postgresql)(?:\+(?P<driver>[a-z0-9]+))?://"
    r"(?:(?P<user>[^:@/?#]*)@)?"
    rf"(?P<hosts>{HOST}(?:,{HOST})*)"
    r"(?:/(?P<database>[^@/?#]*))?"
    r"(?:\?(?P<query>[^@#]*))?\Z"
)
# A refused URL that matches this seems to contain a password, as in user:password@host,
# user%3Apassword@host or ?password=... The pattern only chooses the message.
PASSWORD = re.compile("//[^/?#]*(:|%3a)[^/?#]*@|passw", re.IGNORECASE)
SCHEMES = {
    "mysql": "mysql",
    "mariadb": "mysql",
    "postgresql": "postgresql",
    "postgres": "postgresql",
}
# The best driver comes first. PyMySQL comes last, because its versions before 1.2.0 go on without
# TLS if the server has none. Without its C part, psycopg takes five times the CPU time of psycopg2.
DRIVERS = {
    "mysql": ("MySQLdb", "mysql.connector", "pymysql"),
    "postgresql": ("psycopg2", "psycopg"),
}
DATABASE_OPTION = {"mysql": "database", "postgresql": "dbname"}  # an option of connect()
INTEGER_OPTIONS = ("port", "connect_timeout", "read_timeout", "write_timeout")


class DatabaseUrl(NamedTuple):
    """The URL of a database, taken apart."""

    scheme: str  # "mysql" or "postgresql"
    shown: str  # what people may see of the URL: no port and no query
    drivers: "Tuple[str, ...]"  # the drivers that may be used, the best first
    options: "Dict[str, Any]"  # what connect() of the driver gets


def parse_url(url: str) -> DatabaseUrl:
    """Return the parts of a URL. Raises RequestError if it is wrong or may contain a password."""
    match = URL.match(url)
    if not match:
        raise wrong_url(url)
    parts = match.groupdict("")
    scheme = SCHEMES[parts["scheme"]]
    hosts, ports = split_hosts(parts["hosts"])
    all_hosts = unquote(",".join(hosts))
    # The drivers take an IPv6 address without the brackets that stand around it in a URL.
    all_hosts = all_hosts.replace("[", "").replace("]", "")
    all_ports = ",".join(ports) if any(ports) else ""
    options: Dict[str, Any] = {
        "user": unquote(parts["user"]),
        "host": all_hosts,
        "port": all_ports,
        DATABASE_OPTION[scheme]: unquote(parts["database"]),
    }
    # parse_qsl() would turn a + into a space, as in a web form. The path of a file may contain a +.
    query = parts["query"].replace("+", "%2B")
    options.update(parse_qsl(query))
    # A password may follow a colon that is percent-encoded.
    has_hidden_colon = "%3a" in (parts["user"] + parts["hosts"]).lower()
    has_refused_option = any(is_refused_option(name) for name in options)
    if has_hidden_colon or has_refused_option:
        raise wrong_url(url)
    user_part = f"{parts['user']}@" if parts["user"] else ""
    shown = f"{parts['scheme']}://{user_part}{','.join(hosts)}/{parts['database']}"
    if scheme == "mysql" and len(hosts) > 1:
        raise SourceError(shown, "only PostgreSQL takes several hosts: name one")
    drivers = choose_drivers(shown, scheme, parts["driver"])
    return DatabaseUrl(scheme, shown, drivers, given_options(scheme, options))


def given_options(scheme: str, options: "Dict[str, str]") -> "Dict[str, Any]":
    """Return the options that have a value. The drivers of MySQL want an int for some of them."""
    given: Dict[str, Any] = {name: value for name, value in options.items() if value}
    if scheme == "mysql":
        for name in INTEGER_OPTIONS:
            if consists_of(given.get(name, ""), DIGITS, 1, 9):
                given[name] = int(given[name])
    return given


def wrong_url(url: str) -> RequestError:
    """Return the error for a URL that is refused.

    The message repeats no more than the scheme, because a password may follow.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "sqlite":
        reason = "sqlite:// is not a server: name the file itself by its path"
    elif scheme in ("http", "https"):
        reason = f"{scheme}:// is not read: download the file, and name it by its path"
    elif PASSWORD.search(url):
        reason = f"the URL seems to contain a password; {WRONG_URL}"
    else:
        reason = WRONG_URL
    return RequestError(SOURCE_UNREADABLE, reason)


def split_hosts(text: str) -> "Tuple[List[str], List[str]]":
    """Return the hosts and the ports of a text like `h1:5432,[::1]`.

    A host without a port gets an empty text, which libpq takes for the default port.
    """
    hosts = []
    ports = []
    for place in text.split(","):
        host, colon, port = place.rpartition(":")
        if colon and consists_of(port, DIGITS, 1, 5):
            hosts.append(host)
            ports.append(port)
        else:  # There is no colon, or it belongs to an IPv6 address.
            hosts.append(place)
            ports.append("")
    return hosts, ports


def is_refused_option(name: str) -> bool:
    """Return True for an option with a password, or one that lets the server read our files."""
    return "passw" in name.lower() or "local_infile" in name.lower()


def choose_drivers(shown: str, scheme: str, wanted: str) -> "Tuple[str, ...]":
    """Return the drivers for a scheme. `wanted` is what follows the + in mysql+pymysql://."""
    if not wanted:
        return DRIVERS[scheme]
    # In a URL, mysql.connector is mysqlconnector, and MySQLdb is mysqldb.
    by_name_in_url = {name.lower().replace(".", ""): name for name in DRIVERS[scheme]}
    if wanted not in by_name_in_url:
        choice = ", ".join(by_name_in_url)
        raise SourceError(shown, f"there is no driver {wanted}: use one of {choice}")
    return (by_name_in_url[wanted],)


# ---- the files that a URL names

# The options that name a file, in the spellings of all drivers.
FILE_OPTIONS = (
    "read_default_file",
    "option_files",
    "passfile",
    "ssl_ca",
    "ssl_cert",
    "ssl_key",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslcrl",
)
PASSWORD_FILES = ("read_default_file", "option_files", "passfile")
# Words of the drivers' own messages. They are no secrets, even if an option file contains them.
COMMON_WORDS = {"client", "host", "port", "user", "password", "database", "socket", "ssl-ca"}


def password_files(options: "Dict[str, Any]") -> "List[str]":
    """Return the paths of the files that may contain a password."""
    return [options[name] for name in PASSWORD_FILES if name in options]


def check_files(shown: str, options: "Dict[str, Any]") -> None:
    """Raise SourceError if a file cannot be read. Most drivers ignore a missing file."""
    for name in FILE_OPTIONS:
        path = options.get(name, "")
        if "/" not in path:  # `sslrootcert=system` names no file.
            continue
        reason = reason_unreadable(path)
        if reason:
            raise SourceError(shown, f"{path} ({name} in the URL): {reason}")
    for option_file in password_files(options):
        path = option_file_settings(option_file).get("ssl-ca", "")
        if not path:
            continue
        reason = reason_unreadable(path)
        if reason:  # The path is content of the option file, so the message does not show it.
            raise SourceError(shown, f"the file that ssl-ca in {option_file} names: {reason}")


def reason_unreadable(path: str) -> str:
    """Return why a file cannot be read, or an empty text if it can be read."""
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror or ""
    if not os.access(path, os.R_OK):
        return os.strerror(errno.EACCES)
    return ""


def mode_of(path: str) -> int:
    """Return the st_mode of a file, or 0 if there is no such file."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def read_file(path: str) -> bytes:
    """Return the first 64 KB of a regular file, or b"" if it cannot be read."""
    try:
        if not os.path.isfile(path):
            return b""
        with open(path, "rb") as file:
            return file.read(65536)
    except OSError:
        return b""


def option_file_settings(path: str) -> "Dict[str, str]":
    """Return the settings of an option file.

    MySQL makes no difference between - and _ in a name. Here each name is spelled with -. The value
    of a name that stands alone on its line is an empty text.
    """
    settings = {}
    for line in read_file(path).decode("latin-1").splitlines():
        left, _, right = line.partition("=")
        name = left.strip().replace("_", "-")
        settings[name] = right.strip().strip("'\"")
    return settings


def secrets_of(text: str) -> "Iterator[str]":
    """Yield each piece of an option file that a driver might quote: lines, values and words."""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        bare_value = value.strip()
        if "pass" in name:  # A password is a secret even if it is short.
            yield bare_value
            yield bare_value.strip("'\"")
        words = re.split(r"[\s=:'\"]+", line)
        for piece in [line.strip(), bare_value, *words]:
            if len(piece) > 3:  # A message may contain a shorter piece, such as 1, by chance.
                yield piece


def without_file_content(text: str, options: "Dict[str, Any]") -> str:
    """Return `text` with ... in place of every piece of a password file."""
    secrets: Set[str] = set()
    for path in password_files(options):
        content = read_file(path)
        # A driver may quote the file in either encoding.
        secrets.update(secrets_of(content.decode("latin-1")))
        secrets.update(secrets_of(content.decode("utf-8", "replace")))
    secrets.discard("")
    secrets -= COMMON_WORDS
    secrets -= {str(value) for value in options.values()}  # The URL is no secret.
    # The longest piece comes first, because it may contain others.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "...")
        escaped_secret = repr(secret)[1:-1]  # Some drivers quote a text as repr() shows it.
        text = text.replace(escaped_secret, "...")
    return text


# ---- drivers

TOO_LATE = "no answer in time (--timeout)"
# The options that a URL cannot change. With autocommit, a driver begins no transaction of its own.
# If local_infile is on, a server of MySQL may ask its client for any file (LOAD DATA LOCAL). An
# alarm does not interrupt the C extension of mysql.connector, and use_pure avoids the extension.
DRIVER_OPTIONS: "Dict[str, Dict[str, Any]]" = {
    "MySQLdb": {"autocommit": True, "local_infile": 0},
    "mysql.connector": {"autocommit": True, "allow_local_infile": False, "use_pure": True},
    "pymysql": {"autocommit": True, "local_infile": False},
    "psycopg": {},
    "psycopg2": {},
}
MARIADB_LIBRARY_VERSIONS = ("3", "10", "11")  # MySQL's own library has 5, 8 and 9.


class Driver:
    """A module with the DB-API, and what this module does in its own way."""

    def __init__(self, name: str) -> None:
        """Import the module. Raises ImportError, or any exception if the module is broken."""
        self.name = name
        self.module: Any = import_module(name)
        self.Error = self.module.Error
        self.kind_of_code = "SQLSTATE" if name in DRIVERS["postgresql"] else "error"
        if name == "psycopg2":
            # An alarm does not interrupt its C code. wait_select() waits in Python instead.
            extras = import_module("psycopg2.extras")
            self.module.extensions.set_wait_callback(extras.wait_select)

    def connect(self, url_options: "Dict[str, Any]", limit: "TimeLimit") -> "Any":
        """Return a new connection of the module."""
        seconds = limit.whole_seconds()
        # The C library looks up the name of a host, and no alarm interrupts the look-up. Its time
        # limit comes from the environment.
        os.environ.setdefault("RES_OPTIONS", f"timeout:{seconds} attempts:1")
        options: Dict[str, Any] = {"connect_timeout": seconds}
        if self.name == "MySQLdb":  # An alarm does not interrupt its C code.
            options.update(read_timeout=seconds, write_timeout=seconds)
            if self.needs_ssl_mode(url_options):
                options["ssl_mode"] = "VERIFY_IDENTITY"
        options.update(url_options)  # The URL can change the options above,
        options.update(DRIVER_OPTIONS[self.name])  # but not these.
        connection = self.module.connect(**options)
        if self.name in DRIVERS["postgresql"]:
            connection.autocommit = True  # connect() of psycopg2 has no such option.
        if self.name == "psycopg":
            # A pooler may send the next query to a server that does not know what was prepared.
            connection.prepare_threshold = None
        return connection

    def needs_ssl_mode(self, options: "Dict[str, Any]") -> bool:
        """Return True if the C library is MySQL's and an option file asks to verify the server.

        MariaDB's library obeys ssl-verify-server-cert in an option file. MySQL's library ignores
        this setting, and would go on without TLS.
        """
        major_version = self.module.get_client_info().split(".")[0]
        if major_version in MARIADB_LIBRARY_VERSIONS:
            return False
        for path in password_files(options):
            # An empty value means that the name stands alone, which switches the check on.
            value = option_file_settings(path).get("ssl-verify-server-cert", "0")
            if value.lower() not in ("0", "off", "false"):
                return True
        return False

    def streaming_cursor(self, connection: "Any") -> "Any":
        """Return a cursor of MySQL that does not hold all rows in memory."""
        if self.name == "mysql.connector":
            return connection.cursor(buffered=False)
        return connection.cursor(import_module(self.name + ".cursors").SSCursor)

    def code_of(self, error: BaseException) -> str:
        """Return the error number of MySQL or the SQLSTATE of PostgreSQL, "" if there is none."""
        if error.args and isinstance(error.args[0], int):  # MySQLdb, pymysql, mysql.connector
            return str(error.args[0])
        # psycopg2 and psycopg
        return getattr(error, "pgcode", None) or getattr(error, "sqlstate", None) or ""

    def statement_error(self, shown: str, error: Exception) -> "StatementError":
        """Return the StatementError for a statement that failed.

        The message of the driver may quote stored text, so the error number or the SQLSTATE takes
        its place.
        """
        code = self.code_of(error)
        if self.is_from_server(code):
            return StatementError(f"the server refused {shown} ({self.kind_of_code} {code})", code)
        what = f"error {code}" if code else type(error).__name__
        return StatementError(f"{shown} failed ({what})", code)

    def is_from_server(self, code: str) -> bool:
        """Return True if an error code is from the server, and not from the client library.

        PostgreSQL's client has no codes of its own. MySQL's client has the numbers 2000 to 2999,
        such as 2013 for a broken connection. MySQL's server has all other numbers from 1000 on.
        """
        if self.name in DRIVERS["postgresql"]:
            return code != ""
        number = int(code) if consists_of(code, DIGITS, 1, 9) else 0
        return number >= 1000 and not 2000 <= number <= 2999

    def words_of(self, error: Exception, url_options: "Dict[str, Any]") -> str:
        """Return what the driver says about a failure to connect, without content of a file."""
        about_connecting = (
            self.Error,
            OSError,
            TypeError,  # connect() does not know an option.
            AttributeError,  # connect() of mysql.connector does not know an option.
            RuntimeError,  # The driver needs a package that is missing.
            ImportError,
        )
        if not isinstance(error, about_connecting):
            # The driver cannot parse an option file, and the text of the exception quotes the file.
            files = ", ".join(password_files(url_options)) or "the URL"
            return f"{self.name} fails with {type(error).__name__}: look at {files}"
        texts = [part for part in error.args if isinstance(part, str)]
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror
        elif texts:
            text = " ".join(texts[0].split())  # It may have several lines.
        else:
            text = type(error).__name__
        text = without_file_content(text, url_options)
        passfile = url_options.get("passfile", "")
        others_may_use_it = mode_of(passfile) & (stat.S_IRWXG | stat.S_IRWXO)
        if others_may_use_it:
            text += f"; libpq ignores {passfile}, because others may use it: chmod 600 {passfile}"
        return text


def load_driver(url: DatabaseUrl) -> Driver:
    """Import the best driver of the system's packages. Raises SourceError if there is none.

    The alarm of a request is blocked during the import, because the code of a driver might catch
    the exception that the alarm raises. If time is up then, Connection.check_time() notices.
    """
    sys.path += [path for path in site.getsitepackages() if path not in sys.path]
    problems = []
    pthread_sigmask(SIG_BLOCK, [SIGALRM])
    try:
        for name in url.drivers:
            driver, problem = try_driver(name)
            if driver:
                return driver
            problems.append(problem)
    finally:
        pthread_sigmask(SIG_UNBLOCK, [SIGALRM])
    reason = f"install one of {', '.join(url.drivers)} from the system's packages"
    found = ", ".join([problem for problem in problems if problem])
    if found:
        reason = f"{reason}; {found}"
    error = SourceError(url.shown, reason)
    # The message of the error ends with this advice. A failed import shows only error.reason,
    # because the advice to import does not help there.
    error.detail += "; or copy the keys with --import, on a host that has one"
    raise error


def try_driver(name: str) -> "Tuple[Optional[Driver], str]":
    """Return a driver and an empty text, or None and the reason why there is no driver.

    The reason is empty if the driver is not installed.
    """
    try:
        return Driver(name), ""
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            return None, ""
        return None, f"{name} lacks the module {error.name}"
    except Exception as error:  # The driver may be too old or too new for this Python.
        return None, f"{name} cannot be imported ({type(error).__name__})"


# ---- connections

PIECE = 1000  # rows of a whole table that are held in memory at a time
AGENTS_QUERY = "the query for the agents"  # what a message calls this statement


class TooLateError(Exception):
    """No answer came in time. An alarm raises this exception while the code of a driver runs.

    It is not TimeoutError, because that is an OSError. Drivers catch an OSError and try the next
    address of a host.
    """


class CannotConnectError(Exception):
    """No connection could be made. The text is for people, and has no content of a file."""


class StatementError(Exception):
    """The server refused a statement, or the driver failed to get the result.

    The text is for people, and names the statement. code: the error number or the SQLSTATE, or "".
    """

    def __init__(self, text: str, code: str) -> None:
        """Keep the code beside the text."""
        super().__init__(text)
        self.code = code


class TimeLimit:
    """The time that a query has. An alarm ends a `with` block by TooLateError at the deadline."""

    def __init__(self, deadline: float) -> None:
        """`deadline` is a value of time.monotonic()."""
        self.started = time.monotonic()
        self.deadline = deadline

    def seconds_left(self) -> float:
        """Return the time that is left, at least a millisecond, because 0 would mean no limit."""
        return max(0.001, self.deadline - time.monotonic())

    def whole_seconds(self) -> int:
        """Return the whole time, for drivers that take an int. It is rounded down, but not to 0."""
        return max(1, int(self.deadline - self.started))

    def is_over(self) -> bool:
        """Return True if the deadline has passed."""
        return time.monotonic() >= self.deadline

    def explains_failure(self) -> bool:
        """Return True if a failure that happens now means that time is up.

        Some drivers get whole_seconds() as their time limit, so they may fail before the deadline.
        Drivers and servers may also fail slightly before their time limit.
        """
        seconds = min(self.deadline - self.started, self.whole_seconds())
        tolerance = min(0.1, 0.1 * seconds)
        return time.monotonic() >= self.started + seconds - tolerance

    def give_up(self, *_: object) -> None:
        """Handle the alarm. Raises TooLateError."""
        raise TooLateError

    def __enter__(self) -> None:
        """Set the alarm."""
        self.handler_before = signal(SIGALRM, self.give_up)
        setitimer(ITIMER_REAL, self.seconds_left())

    def __exit__(self, *_: object) -> None:
        """Stop the alarm."""
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, self.handler_before)


class Connection:
    """A connection to a database, and transactions on it that can only read.

    A transaction is read-only, but the session is not. A pooler gives the session to other clients,
    and they may want to write. A method that asks the server raises StatementError or TooLateError.
    """

    QUOTE = '"'  # This character stands before and after the name of a column.
    # A query for the first column of each index of the table. It gives * for a view, which has no
    # indexes of its own.
    INDEXED = ""
    # A condition on the column {0}. It is true for a value that no request finds, because spaces
    # stand before or after the value.
    IS_PADDED = ""

    def __init__(self, driver: Driver, options: "Dict[str, Any]", limit: TimeLimit) -> None:
        """Connect with the options of the URL. Raises CannotConnectError and TooLateError."""
        self.driver = driver
        self.limit = limit
        self.check_time()
        try:
            self.connection = driver.connect(options, limit)
        except TooLateError:
            raise
        except Exception as error:
            raise CannotConnectError(driver.words_of(error, options)) from None

    def check_time(self) -> None:
        """Raise TooLateError if time is up.

        The alarm is not enough. No alarm is set while a server imports a driver, and the code of a
        driver may catch the exception of an alarm.
        """
        if self.limit.is_over():
            raise TooLateError

    @contextlib.contextmanager
    def statement(self, shown: str) -> "Iterator[None]":
        """Raise StatementError if the driver raises its error within the `with` block.

        shown: what a message calls the statement.
        """
        try:
            yield
        except self.driver.Error as error:
            raise self.driver.statement_error(shown, error) from None

    def execute(self, sql: str, values: "Optional[Sequence[Any]]" = None) -> "Any":
        """Run a statement and return its cursor. Raises the error of the driver."""
        self.check_time()
        cursor = self.connection.cursor()
        cursor.execute(sql, values)
        return cursor

    def begin(self) -> None:
        """Begin a transaction that only reads."""
        raise NotImplementedError

    def roll_back(self) -> None:
        """End the transaction."""
        with self.statement("ROLLBACK"):
            self.execute("ROLLBACK")

    def select(self, shown: str, sql: str, values: "Optional[Sequence[Any]]" = None) -> "List[Any]":
        """Return the rows of a query, in a transaction of its own. statement() explains `shown`."""
        self.begin()
        with self.statement(shown):
            rows = list(self.execute(sql, values))
        self.roll_back()
        return rows

    def column_names(self) -> "List[str]":
        """Return the names of the columns that the table has."""
        self.begin()
        with self.statement("the query for the columns"):
            cursor = self.execute("SELECT * FROM agent WHERE 1 = 0")
            names = [column[0] for column in cursor.description]
            list(cursor)  # Until the result is read, mysql.connector refuses the next statement.
        self.roll_back()
        return names

    def limit_queries(self, seconds: float) -> None:
        """Set time limits for the queries of the session, unless begin() sets a time limit."""

    def open_rows(self, sql: str) -> None:
        """Run a query for agents. next_piece() returns its rows."""
        raise NotImplementedError

    def next_piece(self) -> "List[Any]":
        """Return the next rows of open_rows(), at most PIECE. The list is empty at the end."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection, even if it is broken."""
        with contextlib.suppress(Exception):
            self.connection.close()


class MysqlConnection(Connection):
    """A connection to MySQL or MariaDB."""

    QUOTE = "`"
    INDEXED = (
        "SELECT column_name FROM information_schema.statistics "
        "WHERE table_name = 'agent' AND table_schema = database() AND seq_in_index = 1 "
        "UNION SELECT '*' FROM information_schema.views "
        "WHERE table_name = 'agent' AND table_schema = database()"
    )
    # The collation of the column decides whether spaces at the end make a difference.
    IS_PADDED = "{0} <> TRIM({0})"
    takes_read_only = True  # False after the server has refused READ ONLY
    cursor: "Any" = None  # The cursor of open_rows().

    def limit_queries(self, seconds: float) -> None:
        """Let the server end a query after `seconds`, even if this process ends before the query.

        The limits stay in the session. So they are not set where rows are read in pieces:
        max_statement_time would end a long import.
        """
        lock_seconds = max(1, int(seconds))
        milliseconds = int(seconds * 1000) + 1  # 0 would mean no limit.
        # Only MySQL runs the text in /*!50708 */, and only MariaDB runs the text in /*M!100101 */.
        self.set_limits(
            f"lock_wait_timeout = {lock_seconds} "
            f"/*!50708 , max_execution_time = {milliseconds} */ "
            f"/*M!100101 , max_statement_time = {seconds:.3f} */"
        )

    def set_limits(self, limits: str) -> None:
        """Set limits of the session. If the server refuses them, go on without them."""
        with contextlib.suppress(self.driver.Error):
            self.execute(f"SET SESSION {limits}")

    def begin(self) -> None:
        """Begin a transaction that only reads, if the server has such transactions.

        TiDB and old versions of MariaDB refuse it. Then each query runs without a transaction. No
        harm is done, because the program sends no query but SELECT.
        """
        if not self.takes_read_only:
            return
        try:
            self.execute("START TRANSACTION READ ONLY")
        except self.driver.Error:  # If the connection is broken, the next statement fails as well.
            self.takes_read_only = False

    def open_rows(self, sql: str) -> None:
        """Run a query with a cursor that leaves the rows in the server."""
        self.set_limits(f"lock_wait_timeout = {self.limit.whole_seconds()}")
        self.begin()
        with self.statement(AGENTS_QUERY):
            self.cursor = self.driver.streaming_cursor(self.connection)
            self.cursor.execute(sql)

    def next_piece(self) -> "List[Any]":
        """Return the next rows, at most PIECE."""
        with self.statement(AGENTS_QUERY):
            return list(self.cursor.fetchmany(PIECE))

    def close(self) -> None:
        """Close the connection, even if it is broken."""
        result: Any = getattr(self.cursor, "_result", None)
        if hasattr(result, "unbuffered_active"):
            # When Python deletes a result of PyMySQL that has unread rows, PyMySQL tries to read
            # them. The connection is closed by then, so a traceback would go to stderr.
            result.unbuffered_active = False
        super().close()


class PostgresqlConnection(Connection):
    """A connection to PostgreSQL."""

    # An index with a condition (indpred) does not count, because it covers a part of the table.
    INDEXED = (
        "SELECT CAST(attname AS TEXT) FROM pg_index "
        "JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] "
        "WHERE indrelid = 'agent'::regclass AND indisvalid AND indpred IS NULL "
        "UNION SELECT '*' FROM pg_class WHERE oid = 'agent'::regclass AND relkind = 'v'"
    )
    IS_PADDED = "CAST({0} AS TEXT) <> TRIM(CAST({0} AS TEXT))"

    def begin(self) -> None:
        """Begin a transaction that only reads. The server ends its queries at the deadline.

        The time limit ends with the transaction (SET LOCAL).
        """
        milliseconds = int(self.limit.seconds_left() * 1000)
        with self.statement("BEGIN READ ONLY and SET LOCAL statement_timeout"):
            self.execute(f"BEGIN READ ONLY; SET LOCAL statement_timeout = {milliseconds}")

    def open_rows(self, sql: str) -> None:
        """Declare a cursor for a query."""
        self.begin()
        with self.statement(AGENTS_QUERY):
            self.execute(f"DECLARE agent_rows NO SCROLL CURSOR FOR {sql}")

    def next_piece(self) -> "List[Any]":
        """Return the next rows, at most PIECE."""
        with self.statement(AGENTS_QUERY):
            return list(self.execute(f"FETCH FORWARD {PIECE} FROM agent_rows"))


CONNECTION_CLASSES: "Dict[str, Type[Connection]]" = {
    "mysql": MysqlConnection,
    "postgresql": PostgresqlConnection,
}

# ---- the source

# The text names two reasons, because the error of the server does not tell which of them is true.
# MariaDB says "denied" for a table that is missing. PostgreSQL says "does not exist" for a table in
# a schema that the user may not see.
NOT_READABLE = (
    "the database lacks a table or view agent(id, name, ip, agent_key), or this user may not "
    "read it"
)
NO_DATABASE = "the URL names no database: mysql://user@host/DATABASE"
WRITES = "the view agent writes when it is read, but a request may only read"
# The reasons for the error numbers of MySQL and MariaDB (four digits) and for the SQLSTATEs of
# PostgreSQL (five characters).
REASONS = {
    "1046": NO_DATABASE,
    "1142": NOT_READABLE,  # no privilege for the table
    "1143": NOT_READABLE,  # no privilege for a column
    "1146": NOT_READABLE,  # no such table
    "1356": NOT_READABLE,  # a view over a table that is missing or may not be read
    "42501": NOT_READABLE,  # no privilege
    "42P01": NOT_READABLE,  # no such table
    "1792": WRITES,
    "25006": WRITES,
    "1205": TOO_LATE,  # lock_wait_timeout
    "1969": TOO_LATE,  # max_statement_time of MariaDB
    "3024": TOO_LATE,  # max_execution_time of MySQL
    "55P03": TOO_LATE,  # lock_timeout
    "57014": TOO_LATE,  # statement_timeout
}
OTHER_REASON = "the log of the database may tell why"
NO_COLUMN = ("1054", "42703")  # no such column


class MissingColumnError(SourceError):
    """The table lacks a column that a query named."""


class Database:
    """The table or view `agent` of a MySQL, MariaDB or PostgreSQL server.

    It connects at the first request, and keeps the connection for the next ones. A method that
    asks the server raises SourceError.
    """

    unit = "row"

    def __init__(self, url: str, seconds: float) -> None:
        """Check the URL and import a driver. Raises RequestError.

        seconds: the time limit of a request, and of each piece of a whole table.
        """
        self.deadline = time.monotonic() + seconds  # A server sets it again before each request.
        self.seconds = seconds
        parsed = parse_url(url)
        self.name = parsed.shown
        self.scheme = parsed.scheme
        self.url_options = parsed.options
        self.skipped: Dict[str, int] = {}
        # The column of each field. These names are tried first, because it costs time to ask.
        self.names = TABLE_COLUMNS
        self.connection: Optional[Connection] = None
        self.connection_class = CONNECTION_CLASSES[self.scheme]
        check_files(self.name, self.url_options)
        self.driver = load_driver(parsed)

    def find(self, request: Request) -> "List[Row]":
        """Return the rows in which the field of a request has one of its spellings."""
        try:
            return self._find(request)
        except MissingColumnError:
            self._learn_columns(self.deadline)
            return self._find(request)

    def spellings(self, request: Request) -> "List[str]":
        """Return the texts under which find() finds an agent."""
        return request.texts

    @property
    def columns(self) -> Columns:
        """Return the columns of the table."""
        return self._learn_columns(time.monotonic() + self.seconds)

    def rows(self) -> "Iterator[Tuple[int, Row]]":
        """Return an iterator over all rows, each with its number. The first number is 1."""
        self._learn_columns(time.monotonic() + self.seconds)
        return enumerate(self._read(self._rows_query()), 1)

    def indexed(self) -> "Set[str]":
        """Return the first column of each index, or {"*"} for a view, which has no index."""
        shown = "the query for the indexes"
        sql = self.connection_class.INDEXED
        deadline = time.monotonic() + self.seconds
        rows = self._ask(lambda connection: connection.select(shown, sql), deadline)
        return {text_of(row[0]) for row in rows}

    def padded_ids(self) -> "Iterator[str]":
        """Yield a finding for each agent that no request finds, because of spaces in id or ip."""
        for field in ("id", "ip"):
            column = self._column(field)
            condition = self.connection_class.IS_PADDED.format(column)
            for row in self._read(f"{self._rows_query()} WHERE {condition}"):
                record, _ = judge(row)
                yield (
                    f"{agent_of(record)}: no request finds its {field}, because it is stored with "
                    f"spaces around it: UPDATE agent SET {column} = TRIM({column});"
                )

    def exposed_files(self) -> "Iterator[str]":
        """Yield a finding for each password file that others may read."""
        for path in password_files(self.url_options):
            if mode_of(path) & stat.S_IROTH:
                yield f"others may read {path}, which is a file for a password: chmod 600 {path}"

    def close(self) -> None:
        """Close the connection. The next request makes a new one."""
        if self.connection:
            self.connection.close()
        self.connection = None

    def _column(self, field: str) -> str:
        """Return the column of a field as SQL."""
        if self.names == TABLE_COLUMNS:  # No database needs quotes around these names.
            return self.names[field]
        quote = self.connection_class.QUOTE
        return f"{quote}{self.names[field]}{quote}"

    def _rows_query(self) -> str:
        """Return the query for all agents."""
        return rows_query(self.names, self.connection_class.QUOTE)

    def _find(self, request: Request) -> "List[Row]":
        """Return the rows for a request. Raises MissingColumnError if self.names is wrong."""
        values = self.spellings(request)
        marks = ", ".join(["%s"] * len(values))
        sql = f"{self._rows_query()} WHERE {self._column(request.field)} IN ({marks})"
        return self._ask(
            lambda connection: connection.select(AGENTS_QUERY, sql, values), self.deadline
        )

    def _learn_columns(self, deadline: float) -> Columns:
        """Return the columns of the table, and keep their names for the next queries."""
        found = self._ask(lambda connection: connection.column_names(), deadline)
        columns = Columns(found, self.name)
        self.names = columns.names
        return columns

    # -- waiting for the database

    def _connect(self, limit: TimeLimit) -> Connection:
        """Return a new connection."""
        return self.connection_class(self.driver, self.url_options, limit)

    def _ask(self, question: "Callable[[Connection], List[Any]]", deadline: float) -> "List[Any]":
        """Return the list that `question` gets from a connection.

        If `question` fails, close the connection. Raises SourceError.
        """
        limit = TimeLimit(deadline)
        try:
            return self._wait(lambda: self._ask_kept_or_new(question, limit), limit)
        except SourceError:
            self.close()
            raise

    def _ask_kept_or_new(
        self, question: "Callable[[Connection], List[Any]]", limit: TimeLimit
    ) -> "List[Any]":
        """Return the answer over the connection that was kept. If that fails, make a new one."""
        if self.connection:
            self.connection.limit = limit
            try:
                return question(self.connection)
            except StatementError:
                if limit.explains_failure():  # There is no time for a new connection.
                    raise
                self.close()
        self.connection = self._connect(limit)
        self.connection.limit_queries(self.seconds)
        return question(self.connection)

    def _read(self, sql: str) -> "Iterator[Any]":
        """Yield the rows of a query for agents, read in pieces.

        The query gets a new connection, whose session has no time limits for requests. The first
        piece has to come within `seconds` from now, and each other piece within `seconds` from the
        moment at which it is asked for. Raises SourceError.
        """
        limit = TimeLimit(time.monotonic() + self.seconds)
        connection = self._wait(lambda: self._connect(limit), limit)
        try:
            self._wait(lambda: connection.open_rows(sql), limit)
            piece = self._wait(connection.next_piece, limit)
            while piece:
                yield from piece
                connection.limit = TimeLimit(time.monotonic() + self.seconds)
                piece = self._wait(connection.next_piece, connection.limit)
        finally:
            connection.close()

    def _wait(self, work: "Callable[[], T]", limit: TimeLimit) -> "T":
        """Return what `work` returns, within a time limit. Raises SourceError if it fails."""
        try:
            with limit:
                return work()
        except Exception as error:
            problem = self._problem(error, limit)
        # If `problem` were raised within the `except` block, it would refer to `error`. The
        # traceback of `error` refers to the connection, and would keep the connection open.
        raise problem

    def _problem(self, error: Exception, limit: TimeLimit) -> SourceError:
        """Return the SourceError for a failure."""
        if isinstance(error, TooLateError) or limit.explains_failure():
            return SourceError(self.name, TOO_LATE)
        if isinstance(error, CannotConnectError):
            return SourceError(self.name, str(error))
        if not isinstance(error, StatementError):
            # The message of a driver may quote stored text, so only the class is shown.
            problem = f"{self.driver.name} fails with {type(error).__name__}"
            return SourceError(self.name, f"{problem}: {OTHER_REASON}")
        if error.code in NO_COLUMN:
            return MissingColumnError(self.name, f"{error}: {NOT_READABLE}")
        reason = REASONS.get(error.code, OTHER_REASON)
        if reason == TOO_LATE:
            return SourceError(self.name, TOO_LATE)
        return SourceError(self.name, f"{error}: {reason}")


# ------------------------------------------------------------------------------------ SQL scripts
# SQLite runs an SQL script on a database in memory. Its agents are then copied into a Memory, where
# a request finds them. The server and a single request both do this.

HALF_WRITTEN = "the file may be half-written"
HEAP_LIMIT = 512 << 20  # bytes that SQLite may use for a script. One script used 23 GB.
SPACE_AND_COMMENTS = re.compile(r"(?:\s|--[^\n]*|/\*.*?(?:\*/|\Z))*", re.DOTALL)
# A semicolon, and what may contain semicolons that end no statement: quotes and comments. A quote
# or a comment that is not closed reaches to the end of the script (\Z). If it did not match, the
# search would start again at every quote, and take quadratic time.
SQL_TOKEN = re.compile(
    r"'[^']*(?:'|\Z)"
    r'|"[^"]*(?:"|\Z)'
    r"|`[^`]*(?:`|\Z)"
    r"|\[[^]]*(?:\]|\Z)"
    r"|--[^\n]*"
    r"|/\*.*?(?:\*/|\Z)"
    r"|;",
    re.DOTALL,
)
# The beginning of a dump. MySQL's first line is `-- MySQL dump...`. MariaDB writes a line
# `/*M!999999...` before `-- MariaDB dump...`, and PostgreSQL writes a line `--` before
# `-- PostgreSQL database dump`.
DUMP = re.compile(r"(?:(?:--|/\*)[^\n]*\n)?-- (MySQL|MariaDB|PostgreSQL)")
EXPORT_OF_MYSQL = "mysql --batch -e 'SELECT id, name, ip, agent_key FROM agent' >FILE"
DUMP_ADVICE = {
    "MySQL": EXPORT_OF_MYSQL,
    "MariaDB": EXPORT_OF_MYSQL,
    "PostgreSQL": "psql -c '\\copy agent TO FILE CSV HEADER'",
}


class Memory:
    """All agents of a text file or script, by id and by ip.

    agents: how many are sound. faults: how many break a rule. unfinished_line: see TextSource.
    """

    unit = "row"

    def __init__(self, source: "Union[TextSource, SqliteSource]") -> None:
        """Read the source to its end. Raises SourceError."""
        self.name = source.name
        self.deadline = 0.0  # Every source has one. A look-up in memory needs no time limit.
        self.skipped: Dict[str, int] = {}
        self.agents = 0
        self.faults = 0
        self._by_id: Dict[str, List[Row]] = {}
        self._by_ip: Dict[str, List[Row]] = {}
        try:
            self._read(source)
        except MemoryError:
            # Free what was read. It takes memory to tell about the error, too.
            self._by_id.clear()
            self._by_ip.clear()
            raise
        self.unfinished_line: Optional[int] = None
        if isinstance(source, TextSource):
            self.unfinished_line = source.unfinished_line

    def _read(self, source: "Union[TextSource, SqliteSource]") -> None:
        """Keep and count all rows. Raises SourceError or MemoryError."""
        for _, row in source.rows():
            _, faults = judge(row)
            if faults:
                self.faults += 1
            else:
                self.agents += 1
            self._add(tuple(row))

    def _add(self, row: "Row") -> None:
        """Keep a row under its id and its ip.

        An id or an ip that is stored as bytes is left out, because SQLite would not find it.
        """
        stored_id, _, stored_ip, _ = row
        if isinstance(stored_id, (int, float)):
            stored_id = id_of(stored_id)
        if isinstance(stored_id, str):
            self._by_id.setdefault(stored_id, []).append(row)
        if isinstance(stored_ip, str):
            self._by_ip.setdefault(stored_ip, []).append(row)

    def spellings(self, request: Request) -> "List[str]":
        """Return the texts under which find() finds an agent."""
        return spellings_in_text(request)

    def find(self, request: Request) -> "List[Row]":
        """Return the rows whose id or ip is one of the spellings."""
        table = self._by_id if request.field == "id" else self._by_ip
        return [row for text in self.spellings(request) for row in table.get(text, ())]

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class ScriptSource(SqliteSource):
    """The table or view `agent` that an SQL script makes in memory."""

    def find(self, request: Request) -> "List[Row]":
        """Return the rows that Memory finds, so that a server gives the same answer."""
        return Memory(self).find(request)

    def spellings(self, request: Request) -> "List[str]":
        """Return the texts under which find() finds an agent."""
        return spellings_in_text(request)


def statements_of(script: str) -> "Iterator[Tuple[int, int]]":
    """Yield the start and the end of each statement that ends with a semicolon.

    CREATE TRIGGER is one statement. It contains semicolons, and ends with `END;`.
    """
    start = 0
    after_semicolon = 0  # the position after the previous semicolon, which may be in a trigger
    in_trigger = begins_trigger(script, start)
    for token in SQL_TOKEN.finditer(script):
        if token.group() != ";":
            continue
        ends_trigger = in_trigger and is_only_end(script, after_semicolon, token.start())
        after_semicolon = token.end()
        if in_trigger and not ends_trigger:
            continue
        yield start, after_semicolon
        start = after_semicolon
        in_trigger = begins_trigger(script, start)


def is_only_end(script: str, position: int, semicolon: int) -> bool:
    """Return True if there is only the word END, and maybe comments, before a semicolon."""
    word_start = skip_space(script, position)
    word_end = word_start + len("END")
    is_end = script[word_start:word_end].upper() == "END"
    return is_end and skip_space(script, word_end) == semicolon


def skip_space(script: str, position: int) -> int:
    """Return the position after the white space and the comments at a position."""
    match = SPACE_AND_COMMENTS.match(script, position)
    return match.end() if match else position


def begins_trigger(script: str, position: int) -> bool:
    """Return True if CREATE TRIGGER or CREATE TEMP TRIGGER begins at a position."""
    words = []
    for _ in range(3):
        position = skip_space(script, position)
        end = position
        while end < len(script) and script[end].isalpha():
            end += 1
        words.append(script[position:end].upper())
        position = end
    if words[1] in ("TEMP", "TEMPORARY"):
        del words[1]
    return words[:2] == ["CREATE", "TRIGGER"]


def open_script(path: str, name: str, seconds: float) -> ScriptSource:
    """Return the source that an SQL script makes in memory. Raises SourceError or OSError.

    A statement without its semicolon is not run: the file may be half-written, and an UPDATE may
    have lost its WHERE.
    """
    # Latin-1 decodes every byte. No rule of judge() accepts a character beyond ASCII.
    with open(path, encoding="latin-1", newline="") as file:
        script = file.read()
    if script.startswith(UTF8_MARK):
        script = script[len(UTF8_MARK) :]
    connection = sqlite3.connect(":memory:", isolation_level=None)
    source = ScriptSource(connection, name, seconds)  # It sets the time limit of the connection.
    connection.execute(f"PRAGMA hard_heap_limit = {HEAP_LIMIT}").fetchall()
    connection.set_authorizer(refuse_other_files)
    rest = 0  # the position of what is not run yet
    for start, end in statements_of(script):
        try:
            connection.execute(script[start:end])
        except Exception as error:
            raise script_error(source, script, start, error) from None
        rest = end
    rest = skip_space(script, rest)
    if rest < len(script):
        line = line_of(script, rest)
        raise SourceError(name, f"line {line}: a statement without an end; {HALF_WRITTEN}")
    if connection.in_transaction:
        raise SourceError(name, f"a transaction without COMMIT; {HALF_WRITTEN}")
    return source


def refuse_other_files(action: int, *_: object) -> int:
    """Tell SQLite that a script may not open another database file."""
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def line_of(script: str, position: int) -> int:
    """Return the number of the line that a position is in."""
    return script.count("\n", 0, position) + 1


def script_error(source: ScriptSource, script: str, start: int, error: Exception) -> SourceError:
    """Return the error for a statement that SQLite cannot run, with what to do instead."""
    first_word = skip_space(script, start)
    where = f"line {line_of(script, first_word)}"
    if source.is_late() or isinstance(error, MemoryError):
        return SourceError(source.name, f"{where}: {reason_of(error)}")
    dump = DUMP.match(script)
    if not dump:
        return SourceError(source.name, f"{where}: SQLite cannot run this")
    server = dump.group(1)
    advice = f"export the table by {DUMP_ADVICE[server]}"
    return SourceError(source.name, f"{where}: SQLite cannot run this dump of {server}; {advice}")


# ---------------------------------------------------------------------------------------- the log
# The lines that a running server writes to standard error.

REPEAT_SECONDS = 60  # The same line is logged once within this time.
LOG_ENTRY = struct.Struct("II")  # the CRC-32 of a line, and the time.monotonic() of its logging
NO_LOG_ENTRY = (0, 0)
LOG_ENTRIES = 4096  # The table of logged lines has a fixed size, so no flood can fill the memory.


class Log:
    """The log of a server, on standard error.

    The same line is logged about once a minute, so a flood of equal requests fills no disk. All
    processes of the server share the table of logged lines. If each of 8 workers had a table of its
    own, the server would log the line 8 times a minute. The shared table costs 2 % of the requests
    that a server can answer in a second.
    """

    def __init__(self, verbose: bool) -> None:
        """Open the log. verbose: every line is logged, however often it comes."""
        self.verbose = verbose
        self.prefixes = stderr_prefixes()
        self.write = stderr_without_waiting()
        # The workers are forked from this process. They share this memory with it.
        self.table = mmap.mmap(-1, LOG_ENTRIES * LOG_ENTRY.size)

    def info(self, text: str) -> None:
        """Log a line that needs no action."""
        self._log(self.prefixes.info, text)

    def error(self, text: str) -> None:
        """Log a line about something that somebody has to repair."""
        self._log(self.prefixes.error, text)

    def _log(self, prefix: str, text: str) -> None:
        """Log a line. Without -v, omit it if it was logged within the last REPEAT_SECONDS."""
        line = f"{prefix}{printable(text)}\n".encode("ascii")
        checksum = zlib.crc32(line)
        now = int(time.monotonic())
        # Several lines may share a place in the table. Each of them overwrites the entry of the
        # other, and two workers may do so at once. So a line may be logged once too often. That is
        # better than a lock, for which workers would wait.
        place = (checksum % LOG_ENTRIES) * LOG_ENTRY.size
        known_checksum, known_time = LOG_ENTRY.unpack_from(self.table, place)
        is_repeated = known_checksum == checksum and now - known_time < REPEAT_SECONDS
        if is_repeated and not self.verbose:
            return
        LOG_ENTRY.pack_into(self.table, place, checksum, now)
        try:
            self.write(line)
        except OSError:  # The reader has gone, or it does not keep up.
            # The line was not logged. If it comes again, it must be tried again.
            LOG_ENTRY.pack_into(self.table, place, *NO_LOG_ENTRY)


def stderr_without_waiting() -> "Callable[[bytes], int]":
    """Return a function that writes a line to standard error. It raises OSError if it would wait.

    A worker that waits for the reader of a full pipe answers nobody. O_NONBLOCK must not be set on
    standard error itself, because the shell and other programs that share it would get the flag.
    """
    kind = os.fstat(2).st_mode
    if stat.S_ISSOCK(kind):  # the journal of systemd
        journal = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(2))
        return lambda line: journal.send(line, socket.MSG_DONTWAIT)
    if stat.S_ISREG(kind):
        return lambda line: os.write(2, line)  # A file has no reader to wait for.
    try:
        # A pipe or a terminal that is opened once more has flags of its own.
        own = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        # The pipe belongs to another user, as in a container, or there is no /proc. This is the
        # only case in which a line may have to wait, but it hardly ever does.
        return write_if_there_is_room
    return lambda line: os.write(own, line)


def write_if_there_is_room(line: bytes) -> int:
    """Write a line to standard error. Raises OSError if the pipe is full.

    The write waits only if another process fills the pipe just after select() has found room.
    """
    _, writable, _ = select.select([], [2], [], 0)
    if not writable:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return os.write(2, line)


# ------------------------------------------------------------------------------------- the worker
# A worker is a process that answers requests on a listening socket, one after the other.

REQUEST_BYTES = 128  # of the longest request. The manager's longest has 42: `ip:` and an address.
# Seconds that a worker waits for a whole request from a client. FIRST_PATIENCE holds until a client
# is silent for so long. Then NEXT_PATIENCE holds, until a client sends a whole request. If a worker
# always waited for a second, 12 silent clients at a time would halve the number of requests that 8
# workers answer. A thousand silent clients would keep everybody else waiting for two minutes.
FIRST_PATIENCE = 1.0
NEXT_PATIENCE = 0.05
ACCEPT_SECONDS = 1  # After this time without a client, a worker checks that its supervisor runs.
RETIRE = signals.SIGUSR1  # tells a worker to end; see the tables in the section `the supervisor`
# The supervisor blocks these signals, and waits for all of them but RETIRE. RETIRE is blocked so
# that it does not kill a new worker which has not set its handler yet.
SIGNALS = (signals.SIGTERM, signals.SIGINT, signals.SIGHUP, signals.SIGCHLD, RETIRE)
NOT_READ_YET = "not read yet; the server reads it at SIGHUP (systemctl reload)"


class Worker:
    """A process that answers requests.

    It ends when its listening socket is closed or shut down, or when the supervisor has ended.
    """

    def __init__(
        self,
        listening: socket.socket,
        source_name: str,
        seconds: float,
        memory: "Optional[Memory]",
        log: Log,
    ) -> None:
        """Take what the supervisor has prepared. seconds: how long one request may take."""
        self.listening = listening
        self.source_name = source_name
        self.seconds = seconds
        # The agents of a text file or a script. None: the source is an SQLite file or a database.
        self.memory = memory
        self.log = log
        # The SQLite file or the database, while it is open.
        self.source: Optional[Source] = None
        # The device, inode and ctime that the file of the source had at the last request.
        self.stamp: Optional[Tuple[int, int, int]] = None
        # Seconds to wait for the next client if it sends no whole request.
        self.patience = FIRST_PATIENCE

    def run(self, supervisor: int) -> None:
        """Answer requests until the socket is closed or shut down, or the supervisor has ended.

        supervisor: its process id. Raises OSError if no connection can be accepted.
        """
        self.prepare_signals()
        while os.getppid() == supervisor:
            try:
                connection = self.accept()
            except BlockingIOError:
                continue  # Nobody has connected for ACCEPT_SECONDS.
            except OSError as error:
                # The handler of RETIRE has closed the socket.
                is_closed = error.errno == errno.EBADF
                # The supervisor has shut the socket down, and no client is left in the queue.
                is_shut_down = error.errno == errno.EINVAL
                if is_closed or is_shut_down:
                    break
                raise
            try:
                Conversation(connection, self).handle()
            finally:
                connection.close()
        self.close_source()

    def prepare_signals(self) -> None:
        """Close the socket at RETIRE. Ignore the signals that only the supervisor handles."""
        # The supervisor has blocked all of them, and a worker inherits that. So a signal that came
        # before a handler was set is handled when the signals are unblocked.
        for number in (signals.SIGTERM, signals.SIGINT, signals.SIGHUP):
            signals.signal(number, signals.SIG_IGN)  # A terminal sends them to all processes.
        signals.signal(RETIRE, lambda *_: self.listening.close())
        signals.pthread_sigmask(signals.SIG_UNBLOCK, SIGNALS)

    def accept(self) -> BareSocket:
        """Return the next connection. Raises BlockingIOError if none comes for ACCEPT_SECONDS.

        Supervisor.run() has set this time by SO_RCVTIMEO, so the kernel ends the wait.
        """
        # socket.accept() would return a `socket.socket`, which is written in Python. Its base class
        # is written in C, and has all methods that a Conversation needs. With the base class, a
        # worker answers 5 to 6 % more requests per second.
        descriptor, _ = self.listening._accept()  # type: ignore[attr-defined]
        return BareSocket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)

    def find_source(self) -> "Source":
        """Return the source as it is now. Raises SourceError or OSError."""
        if self.memory is not None:
            return self.memory
        if not is_url(self.source_name):
            stamp = stamp_of_file(self.source_name)
            has_changed = stamp != self.stamp
            if has_changed:
                self.close_source()
                self.stamp = stamp
        if isinstance(self.source, SqliteSource) and self.source.is_frozen:
            # A frozen source never sees a -wal file that another process makes later. So it is
            # opened anew for each request.
            self.close_source()
        if self.source is None:
            self.source = self.open_for_requests()
        self.source.deadline = time.monotonic() + self.seconds
        return self.source

    def open_for_requests(self) -> "Source":
        """Return the SQLite file or the database, newly opened. Raises SourceError or OSError.

        A text file or a script is refused. A worker finds one here if the supervisor could not read
        it at the start, or if it has replaced an SQLite file. The file may be half-written now. The
        supervisor reads it at the next SIGHUP, by which somebody says that it is whole.
        """
        if is_script(self.source_name):
            raise SourceError(self.source_name, NOT_READ_YET)
        source = open_source(self.source_name, self.seconds)
        if isinstance(source, TextSource):
            source.close()
            raise SourceError(self.source_name, NOT_READ_YET)
        return source

    def close_source(self) -> None:
        """Close the source. The next request opens it again.

        It is not enough to forget the source. A database accepts a limited number of connections,
        and a forgotten connection stays open until Python collects it.
        """
        source = self.source
        self.source = None
        if source is not None:
            with contextlib.suppress(Exception):  # A driver may fail once more here.
                source.close()


def stamp_of_file(name: str) -> "Tuple[int, int, int]":
    """Return the device, inode and ctime of a file. They tell a new file from an old one.

    Every change sets the ctime of a file, and so does a rename. No program can choose its value.
    So a new file differs even if it gets the same inode, unless it comes within the same tick of
    the kernel's clock, which is a few milliseconds long. Raises OSError.
    """
    status = os.stat(name)
    return (status.st_dev, status.st_ino, status.st_ctime_ns)


class Conversation:
    """One connection of a client: a request and its answer.

    The manager makes a new connection for every request, and sends `id:001` without a newline. So
    nothing marks the end of a request. But the manager sends a request by one call. When a colon
    has come, the rest has come, too, and the answer can go out. The manager calls recv once, so the
    answer goes out in one piece.
    """

    def __init__(self, connection: BareSocket, worker: Worker) -> None:
        """Take the connection that `worker` has accepted."""
        self.connection = connection
        self.worker = worker

    def handle(self) -> None:
        """Receive the request, send the answer, and log it."""
        request = self.receive()
        if not request:
            return  # The client only looked whether we listen, or it sent nothing in time.
        text = request.rstrip(b"\r\n\0").decode("latin-1")
        words = text.split(":", 1)
        if len(request) > REQUEST_BYTES:
            too_long = RequestError(BAD_ARGUMENTS, f": more than {REQUEST_BYTES} bytes")
            reply = Answer.of_error(too_long)
        else:
            reply = answer(words, self.worker.find_source, self.worker.source_name)
        try:  # noqa: SIM105 - suppress() would take 0.3 us of each answer
            # This never waits, because the buffer of a socket is far larger than an answer.
            self.connection.sendall(reply.line())
        except OSError:
            pass  # The client has gone.
        if reply.number in (SOURCE_UNREADABLE, INTERNAL_ERROR):
            self.worker.close_source()  # Its connection may be broken.
        self.log_answer(words, reply)

    def receive(self) -> bytes:
        """Receive until there is a colon, or too much for a request. Return all that has come.

        Also stop if the client closes the connection, or if it does not send a colon in time.
        """
        received = b""
        # Mostly the whole request is there at the first recv(), and no deadline is needed. If not,
        # one deadline holds for the rest, however many pieces come.
        deadline = None
        while b":" not in received and len(received) <= REQUEST_BYTES:
            try:
                piece = self.connection.recv(REQUEST_BYTES + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if deadline is None:
                    deadline = time.monotonic() + self.worker.patience
                if self.wait_until(deadline):
                    continue
                self.worker.patience = NEXT_PATIENCE
                return received
            except OSError:
                return received
            if not piece:
                return received
            received += piece
        self.worker.patience = FIRST_PATIENCE  # This client was not silent.
        return received

    def wait_until(self, deadline: float) -> bool:
        """Return True if the client sends something, or closes the connection, in time.

        deadline: in seconds of time.monotonic().
        """
        seconds = max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return bool(readable)

    def log_answer(self, words: "List[str]", reply: Answer) -> None:
        """Log the answer if an operator needs to know it, or if every request is logged."""
        log = self.worker.log
        if reply.number not in FOR_THE_OPERATOR and not log.verbose:
            return
        text = f"{':'.join(words)}: {reply.message}"
        if reply.number == SOURCE_UNREADABLE and not log.verbose:
            # All requests fail for the same reason. Without the request, all lines are equal, and
            # only one line is logged per minute.
            text = reply.message
        if reply.number in (NO_ERROR, NOT_FOUND):
            log.info(text)
        else:
            log.error(text)


# ---------------------------------------------------------------------------- the listening socket
# A server listens on a socket that it makes, or on one that systemd has made and passes to it.

SOCKET = "/run/agent-key-request/socket"
SOCKET_MODE = 0o600
SOCKET_PATH_BYTES = 107  # The kernel takes no longer path.
# The length of the queue of clients. The kernel reduces it to net.core.somaxconn, so the queue is
# as long as the host allows. If it is full, the manager's connect() waits without a time limit.
BACKLOG = 65535
# How long a start waits for the workers of a server that was killed. Idle workers end within
# ACCEPT_SECONDS.
LOCK_SECONDS = 3.0
LOCK_RETRY_SECONDS = 0.05
LOCK_DIGITS = 20  # of a process id in a lock file, at most
PASSED_DESCRIPTOR = 3  # the first socket that systemd passes (sd_listen_fds(3))
LISTENING_SOCKET = "a listening unix stream socket"  # the only kind that a server can use


class Endpoint(NamedTuple):
    """A listening socket and its place.

    path: as people write it. inode: that of the socket at `path`, None if systemd has made it.
    """

    listening: socket.socket
    path: str
    inode: "Optional[int]"


def passed_endpoint() -> "Optional[Endpoint]":
    """Return the endpoint that systemd passes, or None if it passes nothing.

    sd_listen_fds(3): LISTEN_PID is the process that the sockets are meant for, and LISTEN_FDS is
    their number. Raises CommandError if a server cannot use them.
    """
    count = os.environ.get("LISTEN_FDS", "0")
    is_for_us = os.environ.get("LISTEN_PID") == str(os.getpid())
    if not is_for_us or count == "0":
        return None
    if count != "1":
        raise CommandError(
            f"systemd passed {count} sockets; leave one ListenStream= line in the socket unit"
        )
    kind = kind_of_descriptor(PASSED_DESCRIPTOR)
    if kind != LISTENING_SOCKET:
        raise CommandError(
            f"systemd passed {kind}, but the server needs {LISTENING_SOCKET}: "
            "write ListenStream=/PATH and Accept=no into the socket unit"
        )
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=PASSED_DESCRIPTOR)
    return Endpoint(listening, printable_address(listening), None)


def kind_of_descriptor(descriptor: int) -> str:
    """Return in words what a descriptor is; LISTENING_SOCKET if a server can use it."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return "a closed descriptor"
    if not is_socket:
        return "something that is not a socket"
    # Python 3.6 needs a family and a kind to make the object. It does not compare them with those
    # of the descriptor, so any will do. The block closes only the copy of the descriptor.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(descriptor)) as passed:
        family = passed.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
        kind = passed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        is_listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if family in (socket.AF_INET, socket.AF_INET6):
        return "a network socket"
    if family != socket.AF_UNIX:
        return "a socket that is not a unix socket"
    if kind != socket.SOCK_STREAM:
        return "a unix socket for datagrams or packets"
    if not is_listening:
        return "one connection (Accept=yes)"
    return LISTENING_SOCKET


def printable_address(listening: socket.socket) -> str:
    """Return the path of a socket. An abstract name gets an @ in front, as systemd writes it."""
    address = listening.getsockname()
    if isinstance(address, bytes):
        name = address[1:].decode("latin-1")
        return f"@{printable(name)}"
    return str(address)


def refuse_options_of_own_socket(options: Options, passed: Endpoint) -> None:
    """Raise UsageError if an option says how to make a socket, because systemd has made it."""
    settings = {
        "--socket": (options.socket, "ListenStream="),
        "--mode": (options.mode, "SocketMode="),
        "--group": (options.group, "SocketGroup="),
    }
    for name, (value, setting) in settings.items():
        if value is not None:
            raise UsageError(
                f"{name} does not go with the socket that systemd passes, {passed.path}; omit it, "
                f"and use {setting} in the socket unit"
            )


def make_endpoint(path: str, mode: int, group: "Optional[str]") -> Endpoint:
    """Return an endpoint at `path`. Its socket gets the mode, and the group if one is named.

    Raises CommandError or OSError if that is not possible, or if somebody else uses the path.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise CommandError(f"{path}: too long for a socket ({SOCKET_PATH_BYTES} bytes)")
    check_socket_directory(path)
    group_number = number_of_group(group)
    lock_path(path)
    remove_stale_socket(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with new_files_belong_to(group_number), new_sockets_have(mode):
        listening.bind(path)
    status = os.stat(path)
    if group is not None and status.st_gid != group_number:
        # A directory with the setgid bit gives its own group to all new files.
        os.unlink(path)
        directory = os.path.dirname(path) or "."
        raise CommandError(
            f"--group {group}: the directory {directory} gives its own group to the socket: "
            f"chmod g-s {directory}, or use another directory"
        )
    # Nobody can connect before this call.
    listening.listen(BACKLOG)
    return Endpoint(listening, path, status.st_ino)


def check_socket_directory(path: str) -> None:
    """Check the directory of a socket. Make the directory if `path` is the default, SOCKET.

    Raises CommandError if the directory is missing, or if somebody else could replace the socket or
    its lock file. Raises OSError.
    """
    directory = os.path.dirname(path) or "."
    if path == SOCKET and not os.path.isdir(directory):
        os.mkdir(directory, 0o755)  # After each boot, /run is empty.
    if not os.path.isdir(directory):
        raise CommandError(f"the folder {directory} is missing; make it first")
    try:
        check_private_directory(directory)
    except SourceError as error:  # A socket is no key source, so only the reason fits.
        raise CommandError(error.reason) from None


def number_of_group(name: "Optional[str]") -> int:
    """Return the number of the named group, or of our own group if `name` is None.

    Raises CommandError if there is no such group, or if this user may not use it.
    """
    own = os.getegid()
    if name is None:
        return own
    try:
        number = grp.getgrnam(name).gr_gid
    except KeyError:
        raise CommandError(f"--group {name}: there is no such group") from None
    try:
        with new_files_belong_to(number):
            pass  # The kernel allows the group. No file has to be made to find that out.
    except PermissionError:
        raise CommandError(
            f"--group {name}: this user may not use the group; start the server as root, or with "
            f"Group={name} in its unit"
        ) from None
    return number


@contextlib.contextmanager
def new_files_belong_to(group: int) -> "Iterator[None]":
    """Set the group of the files that are made in the block. Raises PermissionError."""
    own = os.getegid()
    os.setegid(group)
    try:
        yield
    finally:
        os.setegid(own)


@contextlib.contextmanager
def new_sockets_have(mode: int) -> "Iterator[None]":
    """Set the mode of the sockets that are made in the block.

    The kernel makes a socket with the mode 0777, less the bits of the umask.
    """
    own = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(own)


def lock_path(path: str) -> None:
    """Keep other servers away from the socket at `path`, by two locks on the file `path`.lock.

    - lockf(): only the supervisor has this lock, because a fork does not pass it on. If another
      process has it, a server is running.
    - flock(): the workers inherit this lock, so it lasts until the last process of the server has
      ended. If only this lock is taken, the supervisor was killed, and its workers are about to
      end. We wait for them.

    The descriptor is never closed, because that would release the locks. Raises CommandError if
    another server has a lock, or if the file is not a lock file of ours. Raises OSError.
    """
    name = f"{path}.lock"
    descriptor = open_lock_file(name)
    is_only_supervisor = try_lock(fcntl.lockf, descriptor)
    # The process id of the server that is running, or that was here before.
    holder = read_lock_file(descriptor, name)
    if not is_only_supervisor:
        raise CommandError(f"{path}: a server is already running there, process {holder}")
    deadline = time.monotonic() + LOCK_SECONDS
    while not try_lock(fcntl.flock, descriptor):
        if time.monotonic() > deadline:
            raise CommandError(
                f"{path}: the workers of a server that was killed, process {holder}, have not "
                "ended yet; try again in a few seconds"
            )
        time.sleep(LOCK_RETRY_SECONDS)
    content = str(os.getpid()).encode("ascii")
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def open_lock_file(name: str) -> int:
    """Return a descriptor of the lock file. Make the file if it is missing.

    Raises CommandError if the name is a link. Raises OSError.
    """
    # With O_NONBLOCK, opening never waits, whatever kind of file somebody has put there.
    # read_lock_file() then refuses everything that is not a regular file.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(name, flags, 0o600)
    except OSError as error:
        is_link = error.errno == errno.ELOOP
        if is_link:
            raise CommandError(f"{name}: a link, not our lock file; move it away") from None
        raise


def read_lock_file(descriptor: int, name: str) -> str:
    """Return the process id in a lock file, `unknown` if it is empty.

    Raises CommandError if the file contains anything else, because then it is not ours.
    """
    not_ours = CommandError(f"{name}: not a lock file of this program; move it away")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise not_ours
    # A person may have added a newline. If there is one more byte, it is read, too, and refused.
    longest = LOCK_DIGITS + len("\n")
    content = os.pread(descriptor, longest + 1, 0)
    holder = content.decode("latin-1").rstrip("\n")
    if not consists_of(holder, DIGITS, 0, LOCK_DIGITS):
        raise not_ours
    return holder if holder else "unknown"


def try_lock(function: "Callable[[int, int], object]", descriptor: int) -> bool:
    """Lock a file by fcntl.lockf or fcntl.flock. Return False if another process has the lock."""
    try:
        function(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # fcntl(2) allows both errors.
        return False
    return True


def remove_stale_socket(path: str) -> None:
    """Remove the socket at `path` if its server has ended. Do nothing if nothing is there.

    Raises CommandError if a program still listens there, or if something else than a socket is
    there. Raises OSError.
    """
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise CommandError(f"{path}: not a socket; move it away, or choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # The queue of the other program may be full.
        try:
            probe.connect(path)
            detail = process_behind(probe)
        except ConnectionRefusedError:  # Nobody listens any more.
            os.unlink(path)
            return
        except BlockingIOError:
            detail = "its queue is full"
        except OSError as error:
            detail = error.strerror or str(error)
    raise CommandError(
        f"{path}: another program listens there ({detail}); stop it, or choose another --socket"
    )


def process_behind(connection: socket.socket) -> str:
    """Return the name and id of the process that listens at the other end of a connection."""
    credentials = struct.Struct("iII")  # struct ucred: process, user, group
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    process, _user, _group = credentials.unpack(packed)
    try:
        with open(f"/proc/{process}/comm", encoding="latin-1") as file:
            name = file.read().rstrip("\n")
    except OSError:
        # The process has ended and has left the socket to others, or it is hidden from us.
        name = "unknown"
    return f"{name}, process {process}"


def remove_own_socket(endpoint: Endpoint) -> None:
    """Remove the socket at the path of the endpoint, if it is still the one that we have made."""
    with contextlib.suppress(OSError):
        if os.lstat(endpoint.path).st_ino == endpoint.inode:
            os.unlink(endpoint.path)


# --------------------------------------------------------------------------------- the supervisor
# The supervisor reads the source, starts the workers, and replaces those that end. It is the parent
# of the workers, and it answers no request itself.
#
# The supervisor gets these signals:
#
#   Signal            Sent by                    What happens
#   SIGTERM, SIGINT   systemd, a user, Ctrl-C    The server stops.
#   SIGHUP            a terminal that closes,    If stderr was a terminal at the start, the server
#                     systemctl reload           stops. Otherwise the source is read again, and all
#                                                workers are replaced. The old ones get RETIRE.
#   SIGCHLD           the kernel                 A worker has ended, and another one is started.
#
# A worker waits in accept(). Python calls accept() again after a signal handler (PEP 475), so the
# wait ends only through the socket:
#
#   What the supervisor does           accept() of the worker then         The queue of the socket
#   It sends RETIRE (SIGUSR1)          fails with EBADF, because the       is left to the new
#   at a reload.                       handler has closed the socket.      workers.
#   It sends RETIRE at a stop, if      fails with EBADF, too.              waits for the next start.
#   systemd keeps the socket.
#   It shuts the socket down at        returns each client in the queue,   is answered. Nobody else
#   any other stop.                    and then fails with EINVAL.         can connect.
#   It sends SIGKILL, DRAIN_SECONDS    does not return.                    is lost, unless systemd
#   after a stop.                                                          keeps the socket.
#   Nothing, because it was killed.    returns a client, or fails with     is lost, unless systemd
#                                      EAGAIN (SO_RCVTIMEO). The worker    keeps the socket.
#                                      then finds its parent gone.

SERVER_SECONDS = 5.0  # for one request
# There are more workers than most hosts have processors, because some workers only wait for a
# silent client or for a slow database.
WORKERS = 8
DRAIN_SECONDS = 15.0  # At a stop, the clients in the queue are answered within this time.
RETRY_SECONDS = 1.0  # After this time, workers that could not be started are tried again.
RESPAWN_SECONDS = 0.05  # Workers that crash at start must not use all the CPU time.


def serve(options: Options) -> int:
    """Run a server until it is stopped, and return the exit status.

    Raises CommandError or OSError if the server cannot start.
    """
    # The signals stay pending until the supervisor waits for them.
    signals.pthread_sigmask(signals.SIG_BLOCK, SIGNALS)
    # If the program that starts us ignores SIGCHLD, we inherit that, and miss the end of workers.
    signals.signal(signals.SIGCHLD, signals.SIG_DFL)
    passed = passed_endpoint()
    if passed:
        refuse_options_of_own_socket(options, passed)
    supervisor = Supervisor(options)
    try:
        supervisor.loaded = supervisor.load()
    except Exception as error:
        if not passed:
            raise CommandError(failure_text(error)) from None
        # systemd keeps the socket. If we ended, its clients would wait for ever. If we go on, they
        # get error 2.
        supervisor.log.error(failure_text(error))
    if passed:
        supervisor.run(passed)
    else:
        mode = SOCKET_MODE if options.mode is None else options.mode
        supervisor.run(make_endpoint(options.socket or SOCKET, mode, options.group))
    return 0


class Loaded(NamedTuple):
    """What the supervisor keeps of a source that it has read.

    memory: the agents of a text file or a script. None: the source is an SQLite file or a database,
    which the workers ask. has_agents: True if the source has an agent. It is always True for a
    database.
    """

    memory: "Optional[Memory]"
    has_agents: bool


class Supervisor:
    """The parent of the workers."""

    def __init__(self, options: Options) -> None:
        """Take the settings. Nothing is read or started yet."""
        self.source_name = options.db
        # Seconds that one request may take.
        self.seconds = options.timeout or SERVER_SECONDS
        # The number of workers to keep.
        self.count = options.workers or WORKERS
        self.log = Log(options.verbose)
        # Where the workers listen. run() sets it.
        self.endpoint: Endpoint
        # What new workers serve. It stays like this if the source cannot be read at the start.
        self.loaded = Loaded(None, has_agents=False)
        # The process ids of the workers that are needed: another replaces each one that ends.
        self.workers: Set[int] = set()
        # The process ids of the workers that have got RETIRE.
        self.retired: Set[int] = set()
        # This is asked now, because a terminal that has closed is no terminal any more.
        self.has_terminal = os.isatty(2)
        self.is_ready = False
        self.is_stopping = False

    def run(self, endpoint: Endpoint) -> None:
        """Keep workers at the endpoint until a signal stops the server."""
        self.endpoint = endpoint
        # systemd passes a socket that does not wait if the unit says NonBlocking=yes.
        endpoint.listening.setblocking(True)
        # The kernel ends the wait in accept(). Python's settimeout() would cost one more system
        # call for each connection.
        limit = timeval(ACCEPT_SECONDS)
        endpoint.listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        handlers: Dict[int, Callable[[], None]] = {
            signals.SIGTERM: self.handle_term,
            signals.SIGINT: self.handle_term,
            signals.SIGHUP: self.handle_hup,
            signals.SIGCHLD: self.reap_workers,
        }
        while not self.is_stopping:
            self.spawn_workers()
            if self.workers and not self.is_ready:
                self.announce()
            received = signals.sigtimedwait(list(handlers), RETRY_SECONDS)
            if received is not None:
                handlers[received.si_signo]()
        self.stop()

    def announce(self) -> None:
        """Tell the log and systemd that the server answers."""
        self.is_ready = True
        place = f"{plural(len(self.workers), 'worker')} on {self.endpoint.path}"
        self.log.info(f"ready: {place}, source {self.source_name}{self.amount()}")
        notify_systemd(b"READY=1")

    def handle_term(self) -> None:
        """SIGTERM or SIGINT: stop the server."""
        self.is_stopping = True

    def handle_hup(self) -> None:
        """SIGHUP: read the source again, or stop if the server was started at a terminal.

        A terminal that closes sends SIGHUP. The signal does not tell who has sent it.
        """
        if self.has_terminal:
            self.is_stopping = True
        else:
            self.reload()

    def load(self) -> Loaded:
        """Open the source, and return what the supervisor keeps of it. Raises any exception."""
        try:
            with contextlib.closing(open_source(self.source_name, self.seconds)) as source:
                if isinstance(source, (TextSource, ScriptSource)):
                    return self.load_into_memory(source)
                # This look-up finds no agent. It fails if every request would fail.
                source.find(parse_request(["id", NOBODY]))
                if isinstance(source, Database):
                    # There is no need to look for an agent. The old workers and the new ones ask
                    # the same database, so a reload cannot take its agents away.
                    return Loaded(None, has_agents=True)
                first_agent = next(source.rows(), None)
                return Loaded(None, has_agents=first_agent is not None)
        except MemoryError:
            raise SourceError(self.source_name, "it needs too much memory") from None

    def load_into_memory(self, source: "Union[TextSource, ScriptSource]") -> Loaded:
        """Return all agents of a text file or a script.

        Workers never read such a file, because it may be half-written at any time. It should be
        whole at the start and at SIGHUP. Raises SourceError if its last line shows that it is not.
        """
        memory = Memory(source)
        if memory.unfinished_line:
            reason = f"line {memory.unfinished_line} has no end; the file may be half-written"
            raise SourceError(self.source_name, reason)
        return Loaded(memory, has_agents=memory.agents > 0)

    def check_replacement(self, loaded: Loaded) -> None:
        """Raise SourceError if a source without agents would replace one with agents."""
        if loaded.has_agents or not self.loaded.has_agents:
            return
        reason = "it has no agent"
        if loaded.memory is not None:
            reason = (
                f"no valid agent, {plural(loaded.memory.faults, 'fault')}; --check lists the faults"
            )
        raise SourceError(self.source_name, reason)

    def amount(self) -> str:
        """Return for the log how many agents and faults are in memory."""
        memory = self.loaded.memory
        if memory is None:
            return ""
        return f": {plural(memory.agents, 'agent')}, {plural(memory.faults, 'fault')}"

    def reload(self) -> None:
        """Read the source again and replace all workers. If either fails, the old workers go on."""
        try:
            loaded = self.load()
            self.check_replacement(loaded)
        except Exception as error:  # Whatever it is, the server goes on.
            text = failure_text(error)
            if self.loaded.memory is not None:
                text = f"{text}; the server keeps the agents that it has"
            self.log.error(text)
            return
        if self.replace_workers(loaded):
            self.log.info(f"source {self.source_name} read again{self.amount()}")
        else:
            self.log.error(
                f"source {self.source_name} not read again: not all new workers can be started; "
                "the old workers go on; reload again later"
            )

    def replace_workers(self, loaded: Loaded) -> bool:
        """Let new workers serve what was loaded. Return False if the old ones have to go on.

        The old workers retire when all new ones have been started, so somebody always answers.
        """
        old_loaded = self.loaded
        old_workers = self.workers
        self.loaded = loaded
        self.workers = set()
        self.spawn_workers()
        if len(self.workers) == self.count:
            self.retire(old_workers)
            return True
        self.retire(self.workers)
        self.workers = old_workers
        self.loaded = old_loaded
        return False

    def retire(self, workers: "Set[int]") -> None:
        """Tell workers to end, and do not replace them."""
        self.retired |= workers
        for process in workers:
            os.kill(process, RETIRE)

    def spawn_workers(self) -> None:
        """Start the workers that are missing. Log it if the system refuses another process."""
        try:
            while len(self.workers) < self.count:
                self.spawn_worker()
        except OSError as error:
            self.log.error(f"no worker can be started: {error.strerror}")

    def spawn_worker(self) -> None:
        """Start a worker. Only the supervisor returns from here. Raises OSError."""
        supervisor = os.getpid()
        process = os.fork()
        if process:
            self.workers.add(process)
            return
        listening = self.endpoint.listening
        memory = self.loaded.memory
        status = 1
        try:
            Worker(listening, self.source_name, self.seconds, memory, self.log).run(supervisor)
            status = 0
        except BaseException as error:
            self.log.error(f"worker {os.getpid()}: {failure_text(error)}")
        finally:
            os._exit(status)

    def reap_workers(self) -> None:
        """SIGCHLD: collect the workers that have ended. Log each worker that was still needed."""
        while self.workers or self.retired:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return  # All others are running.
            was_needed = process in self.workers and not self.is_stopping
            self.workers.discard(process)
            self.retired.discard(process)
            if not was_needed:
                continue
            if os.WIFSIGNALED(status):
                how = f"signal {os.WTERMSIG(status)}"
            else:
                how = f"status {os.WEXITSTATUS(status)}"
            self.log.error(f"worker {process} ended, {how}; another replaces it")
            time.sleep(RESPAWN_SECONDS)

    def stop(self) -> None:
        """End the workers, after they have answered the clients that have connected.

        If systemd keeps the socket, the clients in its queue wait for the next start instead.
        """
        notify_systemd(b"STOPPING=1")
        # systemd sets INVOCATION_ID. The tool systemd-socket-activate passes a socket, too, but it
        # does not set INVOCATION_ID. It does not keep the socket, because its process becomes ours.
        is_passed = self.endpoint.inode is None
        systemd_keeps_socket = is_passed and "INVOCATION_ID" in os.environ
        if systemd_keeps_socket:
            self.retire(self.workers)
        else:
            remove_own_socket(self.endpoint)
            self.endpoint.listening.shutdown(socket.SHUT_RD)
        self.log.info("stopping")
        deadline = time.monotonic() + DRAIN_SECONDS
        while (self.workers or self.retired) and time.monotonic() < deadline:
            signals.sigtimedwait([signals.SIGCHLD], 0.1)
            self.reap_workers()
        for process in self.workers | self.retired:
            self.log.error(f"worker {process} has not ended for {DRAIN_SECONDS:g} s; it is killed")
            os.kill(process, signals.SIGKILL)


def timeval(seconds: float) -> bytes:
    """Return a `struct timeval` for setsockopt(). It is never 0, because 0 would mean no limit."""
    microseconds = max(1, int(seconds * 1000000))
    whole_seconds, rest = divmod(microseconds, 1000000)
    return struct.pack("ll", whole_seconds, rest)


def notify_systemd(state: bytes) -> None:
    """Tell systemd the state of the server, as sd_notify(3) does. Without systemd, do nothing.

    $NOTIFY_SOCKET is a path, or an abstract name that has an @ in place of the NUL in front.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    messenger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with messenger, contextlib.suppress(OSError):
        messenger.sendto(state, address)


def failure_text(error: BaseException) -> str:
    """Return what the log says of any exception. It never contains stored text."""
    if isinstance(error, (RequestError, OSError, sqlite3.Error)):
        return message_of(error)
    if isinstance(error, ImportError):
        return without_module(error)
    return unforeseen(error).message


# ------------------------------------------------------------------------ asking a running server

ANSWER_BYTES = 65536  # The manager receives an answer by one call, and takes so many bytes at most.


def ask_server(path: str, words: "List[str]", seconds: float) -> bytes:
    """Return the line with which a running server answers, or one that tells an error.

    The request goes out as the manager sends it, and the answer is read as the manager reads it:
    with one call of recv. seconds: the time for everything.
    """
    try:
        # A bad request is refused here, so it gets the same answer as without a server.
        parse_request(words)
        request = ":".join(words).encode("ascii")  # parse_request() takes nothing but ASCII.
        received = exchange(path, request, seconds)
        return checked_line(path, received)
    except RequestError as error:
        return Answer.of_error(error).line()


def exchange(path: str, request: bytes, seconds: float) -> bytes:
    """Send the request to the socket `path`, and return what comes back. Raises RequestError."""
    deadline = time.monotonic() + seconds
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            # Like the manager's connect(), this one waits while the queue of the server is full.
            # settimeout() would make the socket non-blocking, and connect() would fail at once.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(seconds))
            connection.connect(path)
            connection.sendall(request)
            remaining = deadline - time.monotonic()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(remaining))
            return connection.recv(ANSWER_BYTES)
    except BlockingIOError:
        reason = "timed out"
    except OSError as error:
        reason = error.strerror or str(error)
    raise RequestError(SOURCE_UNREADABLE, f"no server answers at {path}: {reason}")


def checked_line(path: str, received: bytes) -> bytes:
    """Return what was received as one line, if it is one JSON object of printable ASCII.

    Raises RequestError for anything else. A program that is not ours may listen at `path`. What it
    sends goes to the manager or to a terminal, which would obey control characters.
    """
    if not received:
        raise RequestError(SOURCE_UNREADABLE, f"{path} closed without an answer")
    text = received.decode("latin-1")
    if text.endswith("\n"):
        text = text[:-1]
    try:
        is_object = is_printable(text) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise RequestError(
            SOURCE_UNREADABLE,
            f"{path} did not send one JSON object; is another program listening there?",
        )
    return text.encode("ascii") + b"\n"


# ------------------------------------------------------------------------------------- findings
# What --check, --import and --enroll tell about a source, and how they read all its agents.

SHOWN_FINDINGS = 100  # so many errors, and so many notes, are told one by one
PROGRESS_SECONDS = 0.2  # between two numbers that a terminal shows
READING_SECONDS = 86400.0  # for all agents of a file; --timeout is for one request

APPLICATION_ID = 0x414B5251  # marks a store that an import made; this number never changes
TABLE = """CREATE TABLE agent (id VARCHAR(8) NOT NULL, name VARCHAR(128) NOT NULL,
    ip VARCHAR(64) NOT NULL, agent_key VARCHAR(128) NOT NULL)"""
SQLITE_STEPS = 100000  # between two calls of a progress handler
CACHE_KIB = 30000  # of memory that SQLite may use while it builds a store

# Conditions in SQL for the values that several agents may have. The manager refuses a second agent
# with the same id, name or single address. It accepts several agents with `any` or with the same
# network. An empty text stands for a value that breaks a rule, so it is never compared.
MAY_BE_SHARED = {
    "id": "id = ''",
    "name": "name = ''",
    "ip": "(ip IN ('', 'any') OR instr(ip, '/') > 0)",
}

# What a person may want to know of a field that breaks no rule: a condition in SQL, and a text.
REMARKS = (
    ("length(name) = 128", "name has 128 characters; the manager reads 127 back"),
    ("length(agent_key) = 128", "key has 128 characters; the manager reads 127 back"),
    (
        # A key such as 6.75E+63. The first pattern wants a digit at the beginning and `E+` with a
        # digit later. The second one finds any character that such a number does not have.
        "agent_key GLOB '[0-9]*E+[0-9]*' AND agent_key NOT GLOB '*[^0-9.,E+]*'",
        "key looks like a number that a spreadsheet changed",
    ),
)
# Some sources count in the plural what they skip. These texts are for a count of 1.
SINGULARS = {
    SKIPPED_SPACE: "line that begins with a space",
    SKIPPED_REMOVED: "removed agent of client.keys",
}
IS_NOT_HEX = "length(agent_key) <> 64 OR trim(agent_key, '0123456789ABCDEFabcdef') <> ''"


class Finding(NamedTuple):
    """One line of a report."""

    level: str  # "error", "note" or "info"
    text: str


class Report:
    """What a command finds, told line by line on a descriptor or kept for JSON.

    An error makes a request or an enrolment fail. A note does not.
    """

    def __init__(self, stream: int, as_json: bool = False, tells_notes: bool = True) -> None:
        """Tell on descriptor 1 or 2, with or without notes, or keep everything for JSON."""
        self.stream = stream
        self.as_json = as_json
        self.tells_notes = tells_notes
        self.agents = 0  # records that were read, valid or not
        self.skipped_agents = 0  # those among them that --skip-invalid leaves out
        self.errors = 0
        self.notes = 0
        self.findings: List[Finding] = []  # those that were told
        self.prefixes = {"error": "error: ", "note": "note: ", "info": ""}
        if stream == 2 and journal_reads_stderr():
            priorities = stderr_prefixes()
            self.prefixes = {
                "error": f"{priorities.error}error: ",
                "note": f"{priorities.note}note: ",
                "info": priorities.info,
            }

    def error(self, text: str) -> None:
        """Tell an error, unless SHOWN_FINDINGS were told before."""
        self.errors += 1
        if self.errors <= SHOWN_FINDINGS:
            self.tell("error", text)

    def note(self, text: str) -> None:
        """Tell a note, unless SHOWN_FINDINGS were told before or nobody wants notes."""
        self.notes += 1
        if self.tells_notes and self.notes <= SHOWN_FINDINGS:
            self.tell("note", text)

    def info(self, text: str) -> None:
        """Tell a result that is neither an error nor a note."""
        self.tell("info", text)

    def finish(self) -> None:
        """Tell how many errors and notes were not told one by one."""
        more_errors = self.errors - SHOWN_FINDINGS
        more_notes = self.notes - SHOWN_FINDINGS
        if more_errors > 0:
            self.info(f"... and {plural(more_errors, 'more error')}")
        if more_notes > 0 and self.tells_notes:
            self.info(f"... and {plural(more_notes, 'more note')}")

    def as_dict(self) -> "Dict[str, Any]":
        """Return the report for programs."""
        return {
            "agents": self.agents,
            "errors": self.errors,
            "notes": self.notes,
            "findings": [{"level": level, "text": text} for level, text in self.findings],
        }

    def tell(self, level: str, text: str) -> None:
        """Keep a finding, and print it if the report is for people. There is no limit here.

        OSError: standard output does not take it.
        """
        self.findings.append(Finding(level, text))
        if not self.as_json:
            say(self.stream, self.prefixes[level] + text)


class Progress:
    """Shows on a terminal how many agents were read, while a person waits."""

    def __init__(self, report: Report) -> None:
        """Show the number of agents of a report."""
        self.report = report
        self.has_terminal = os.isatty(2)
        self.next_time = 0.0  # when the number is shown again, by time.monotonic()

    def show(self) -> int:
        """Show the number, unless it was shown within PROGRESS_SECONDS.

        Returns 0. SQLite calls this method while it works, and 0 tells it to go on.
        """
        if not self.has_terminal or time.monotonic() < self.next_time:
            return 0
        self.next_time = time.monotonic() + PROGRESS_SECONDS
        # The \r goes back to the left, so whatever is written next overwrites the number.
        text = f"{plural(self.report.agents, 'agent')}\r"
        with contextlib.suppress(OSError):  # The terminal may have gone away.
            os.write(2, text.encode("ascii"))
        return 0


def records(
    source: "AgentSource",
    report: Report,
    keeps_invalid: bool = False,
    inspect: "Optional[Callable[[Row, Record], Iterable[str]]]" = None,
) -> "Iterator[Tuple[int, Record]]":
    """Yield each valid agent: the number of its line or row, and its record. Report the others.

    keeps_invalid: also yield each agent that breaks a rule, with an empty text in each field at
    fault. inspect: yields further errors of a valid agent. Raises SourceError.
    """
    progress = Progress(report)
    source.deadline = time.monotonic() + READING_SECONDS
    last_faulty_line = 0
    for number, row in source.rows():
        report.agents += 1
        if progress.has_terminal:  # This saves a call for each agent.
            progress.show()
        record, faults = judge(row)
        if faults:
            last_faulty_line = number
            place = place_of(source.unit, number, record["id"])
            for fault in faults:
                report.error(f"{place}: {fault.text}")
                record[fault.field] = ""
            if not keeps_invalid:
                report.skipped_agents += 1
                continue
        elif inspect:
            for text in inspect(row, record):
                report.error(f"{place_of(source.unit, number, record['id'])}: {text}")
        yield number, record
    # If an agent stands in an unfinished last line, rows() makes it invalid, and the loop reports
    # it. If the line is a comment or a removed agent, rows() leaves it out.
    unfinished_line = unfinished_line_of(source)
    was_reported = unfinished_line == last_faulty_line
    if unfinished_line is not None and not was_reported:
        report.error(f"line {unfinished_line} has no end; {HALF_WRITTEN}")


def place_of(unit: str, number: int, agent_id: str) -> str:
    """Return where an agent stands and who it is, such as `line 2: agent 001`."""
    return f"{unit} {number}: {agent_of({'id': agent_id})}"


def unfinished_line_of(source: "AgentSource") -> "Optional[int]":
    """Return the number of a last line without a newline, after a text file was read."""
    if isinstance(source, TextSource):
        return source.unfinished_line
    return None


def double_key_columns(source: "AgentSource") -> str:
    """Return an error if two columns of a table may hold the key, "" if not.

    Two columns for the ip are no error, because an `address` beside `ip` may be a street. In the
    header of a text file any double is an error, which is raised when the file is opened.
    """
    if isinstance(source, TextSource):
        return ""
    return source.columns.doubles.get("key", "")


def what_was_left_out(source: "AgentSource") -> str:
    """Return what a source has besides agents, such as `; 12 removed agents skipped`, or ""."""
    if not source.skipped:
        return ""
    parts = []
    for what, count in source.skipped.items():
        counted = SINGULARS.get(what, what) if count == 1 else what
        parts.append(f"{count:,} {counted}")
    return f"; {', '.join(parts)} skipped"


def create_store(path: str) -> "sqlite3.Connection":
    """Make the table of a store in the empty file `path`. With "", the database is temporary."""
    store = sqlite3.connect(f"file:{quote(os.fsencode(path))}", uri=True)
    # If the process dies, the file is worth nothing. So SQLite keeps no journal and never waits
    # for the disk.
    # A negative cache_size is in KiB, a positive one in pages.
    store.executescript(
        f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{CACHE_KIB}; "
        f"PRAGMA application_id = {APPLICATION_ID}; {TABLE};"
    )
    return store


def copy_agents(
    store: "sqlite3.Connection",
    source: "AgentSource",
    report: Report,
    skips_invalid: bool = False,
    inspect: "Optional[Callable[[Row, Record], Iterable[str]]]" = None,
) -> None:
    """Copy the agents of a source into an empty store, index them and report what is wrong.

    The rowid of an agent is the number of its line or row. An agent that breaks a rule is copied
    without the fields at fault, because the others may still clash with another agent. With
    `skips_invalid` neither an agent that breaks a rule nor one that clashes with an earlier one
    is in the store afterwards.
    """
    # SQLite calls this handler while it builds the indexes, which takes long. The handler shows the
    # number of agents again, because an error may have overwritten it on the terminal.
    store.set_progress_handler(Progress(report).show, SQLITE_STEPS)
    numbered_records = records(source, report, keeps_invalid=not skips_invalid, inspect=inspect)
    rows = ((number, *record.values()) for number, record in numbered_records)
    insert = "INSERT INTO agent (rowid, id, name, ip, agent_key) VALUES (?, ?, ?, ?, ?)"
    store.executemany(insert, rows)
    for field in MAY_BE_SHARED:
        store.execute(f"CREATE INDEX agent_{field} ON agent ({field})")
    find_sharers(store)
    report_clashes(store, source.unit, report, skips_invalid)
    if report.tells_notes:
        report_remarks(store, source.unit, report)
    store.commit()


def find_sharers(store: "sqlite3.Connection") -> None:
    """Fill the table `sharer` with each agent whose id, name or single address another one has.

    The first table of each CROSS JOIN, here and below, has few rows. CROSS JOIN makes SQLite go
    through them and look up each of them in the second table. JOIN may choose the other order.
    """
    store.execute("CREATE TEMPORARY TABLE sharer (number INTEGER PRIMARY KEY)")
    for field, may_be_shared in MAY_BE_SHARED.items():
        values_of_several = (
            f"SELECT {field} AS value FROM agent WHERE NOT {may_be_shared} "
            f"GROUP BY {field} HAVING count(*) > 1"
        )
        store.execute(
            "INSERT OR IGNORE INTO sharer SELECT agent.rowid "
            f"FROM ({values_of_several}) CROSS JOIN agent ON agent.{field} = value"
        )


def report_clashes(store: "sqlite3.Connection", unit: str, report: Report, deletes: bool) -> None:
    """Report each agent in the table `sharer` whose id, name or address an earlier agent has.

    deletes: delete each of them at once, so that the agents after it are compared only with agents
    that stay.
    """
    query = "SELECT number, id FROM sharer CROSS JOIN agent ON agent.rowid = number ORDER BY number"
    for number, agent_id in store.execute(query):
        place = place_of(unit, number, agent_id)
        clashes = False
        for field in MAY_BE_SHARED:
            earlier = first_with_the_same(store, field, number)
            if earlier is not None:
                clashes = True
                report.error(f"{place}: {field} is already that of {unit} {earlier}")
        if clashes and deletes:
            report.skipped_agents += 1
            # This does not disturb the query above, which never comes back to this row.
            store.execute("DELETE FROM agent WHERE rowid = ?", (number,))


def first_with_the_same(store: "sqlite3.Connection", field: str, number: int) -> "Optional[int]":
    """Return the number of the first agent with the same id, name or ip as the agent `number`.

    Returns None if the agent `number` is the first one itself, or if agents may share the value.
    """
    # If agents may share the value, this is NULL, which is equal to nothing. So SQLite need not go
    # through all the agents with an empty text, which may be very many.
    unshared_value = f"SELECT {field} FROM agent WHERE rowid = ? AND NOT {MAY_BE_SHARED[field]}"
    found = store.execute(
        f"SELECT rowid FROM agent INDEXED BY agent_{field} WHERE {field} = ({unshared_value}) "
        "AND rowid < ? ORDER BY rowid LIMIT 1",
        (number, number),
    ).fetchone()
    if found is None:
        return None
    return int(found[0])


def report_remarks(store: "sqlite3.Connection", unit: str, report: Report) -> None:
    """Report what a person may want to know about the agents in a store.

    There may be agents among them that have a fault in another field, or that clash.
    """
    for condition, text in REMARKS:
        query = f"SELECT rowid, id FROM agent WHERE {condition} ORDER BY rowid"
        for number, agent_id in store.execute(query):
            report.note(f"{place_of(unit, number, agent_id)}: {text}")
    # With min(), SQLite takes the id from the row that has the smallest number.
    shared_networks = (
        "SELECT min(rowid), id, ip, count(*) FROM agent WHERE instr(ip, '/') > 0 "
        "GROUP BY ip HAVING count(*) > 1 ORDER BY min(rowid)"
    )
    for number, agent_id, network, count in store.execute(shared_networks):
        report.note(
            f"{place_of(unit, number, agent_id)}: {count:,} agents have the network {network}: "
            "an ip request in it finds more than one agent"
        )
    not_hex = f"SELECT count(*) FROM agent WHERE agent_key <> '' AND ({IS_NOT_HEX})"
    (count,) = store.execute(not_hex).fetchone()
    if count == 1:
        report.note("1 key is not 64 hex digits; that is allowed")
    elif count > 1:
        report.note(f"{count:,} keys are not 64 hex digits; that is allowed")


# --------------------------------------------------------------------------------------- import
# --import replaces the store by a new one, or leaves it as it is. The new store is built in a file
# beside it and renamed when it is complete, so there is a store at every moment.

NOT_CLAIMED = -1  # in place of a descriptor
INTERRUPTS = (SIGINT, SIGTERM)  # what a person, cron and systemd send to end an import
SQLITE_MARK = slice(68, 72)  # where an SQLite file has its application_id
DAMAGED = "no SQLite database, or a damaged one"
STANDARD_INPUT = "standard input"

# This query is about the agents whose id is in both stores. It counts them in the previous store
# and in the new one, and it counts those of the new one that have changed. The new store has no id
# twice. The previous store may have one, if somebody has edited it. Then the join gives an agent of
# the new store twice, and DISTINCT counts it once.
CHANGES = """
SELECT
    count(*) AS stayed_before,
    count(DISTINCT new.rowid) AS stayed,
    count(DISTINCT CASE
        WHEN new.name IS NOT was.name OR new.ip IS NOT was.ip OR new.agent_key IS NOT was.agent_key
        THEN new.rowid END) AS changed
FROM previous.agent AS was CROSS JOIN main.agent AS new ON new.id = was.id"""


class Changes(NamedTuple):
    """What an import changes: numbers of agents."""

    new: int
    changed: int
    gone: int


@contextlib.contextmanager
def interruptible() -> "Iterator[None]":
    """Let SIGINT and SIGTERM end the block with KeyboardInterrupt. Block both signals after it.

    SQLite and some drivers catch our KeyboardInterrupt. Then they raise an error of their own, or
    go on. So after a signal the block ends with KeyboardInterrupt, whatever they do.
    """
    received: List[int] = []

    def interrupt(number: int, _frame: object) -> "NoReturn":
        received.append(number)
        raise KeyboardInterrupt

    for number in INTERRUPTS:
        signal(number, interrupt)
    try:
        pthread_sigmask(SIG_UNBLOCK, INTERRUPTS)
        yield
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        pthread_sigmask(SIG_BLOCK, INTERRUPTS)
    if received:
        raise KeyboardInterrupt


def check_replaceable(path: str) -> None:
    """Raise CommandError unless an import may replace what stands at `path`.

    It may replace an empty file and a store that an import made. OSError: this user may not read
    the file.
    """
    check_no_transaction(path)
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise CommandError(f"{path} is no regular file: name another --db")
    if os.path.getsize(path) == 0:
        return
    open(path, "rb").close()  # This error says why a file cannot be opened. SQLite's does not.
    try:
        with contextlib.closing(sqlite3.connect(unchanging_uri(path), uri=True)) as store:
            mark = store.execute("PRAGMA application_id").fetchone()
            tables = store.execute("SELECT DISTINCT tbl_name FROM sqlite_master").fetchall()
            if mark != (APPLICATION_ID,) or tables != [("agent",)]:
                raise not_replaceable(path, "a database that no import made")
            columns = [column[1] for column in store.execute("PRAGMA table_info(agent)")]
            if not set(columns).issuperset(TABLE_COLUMNS.values()):
                raise not_replaceable(path, "a store whose columns somebody has renamed")
            store.execute("SELECT count(*) FROM agent").fetchone()  # so that damage shows here
    except sqlite3.Error:
        raise not_replaceable(path, DAMAGED) from None


def check_no_transaction(path: str) -> None:
    """Raise CommandError if a file beside `path` holds a part of a transaction.

    SQLite would take this file for a part of the new store.
    """
    for suffix in ("-journal", "-wal"):
        if os.path.lexists(path + suffix):
            # VACUUM ends the transaction and removes the file, because it writes to the database.
            # A command that only reads may leave the file there.
            tidy = f"sqlite3 {shlex.quote(path)} VACUUM"
            raise CommandError(
                f"{path}{suffix} exists, so another program is writing to {path}, or was killed: "
                f"wait until it has ended, or clear up after it ({tidy}), or name another --db"
            )


def not_replaceable(path: str, what: str) -> CommandError:
    """Return the error for a file that an import does not replace; `what` says what it is."""
    move = f"mv {shlex.quote(path)} {shlex.quote(path + '.saved')}"
    return CommandError(
        f"{path} is {what}, and --import does not replace it: move it away ({move}), "
        "or name another --db"
    )


def unchanging_uri(path: str) -> str:
    """Return the URI of a store that nobody writes to. SQLite then makes no file beside it."""
    return f"file:{quote(os.fsencode(path))}?immutable=1"


def open_leftover(path: str) -> "Optional[int]":
    """Open what a killed import left at `path`, and return the descriptor, or None for nothing.

    CommandError: something else has this name. OSError: this user may not open it.
    """
    in_the_way = CommandError(
        f"{path} is in the way, and no import made it: move it away, or name another --db"
    )
    # A link must not lead to a file of somebody's choice. A named pipe must not keep us waiting
    # until somebody opens its other end.
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, directory or socket
            raise in_the_way from None
        raise
    if not is_leftover(descriptor):
        raise in_the_way
    return descriptor


def is_leftover(descriptor: int) -> bool:
    """Return True for an empty file, and for one that begins as a store which an import makes.

    SQLite writes the beginning, with our mark, before any agent.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    header = os.pread(descriptor, SQLITE_MARK.stop, 0)
    ends_before_mark = len(header) < SQLITE_MARK.stop
    if ends_before_mark:
        # The file may have only a part of SQLITE_HEADER, or nothing.
        return SQLITE_HEADER.startswith(header[: len(SQLITE_HEADER)])
    mark = int.from_bytes(header[SQLITE_MARK], "big")
    return header.startswith(SQLITE_HEADER) and mark == APPLICATION_ID


def is_name_of(path: str, descriptor: int) -> bool:
    """Return True if a path leads to an open file, and the path itself is no link."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def naming(path: str) -> "Iterator[None]":
    """Put a path into each OSError of the block that names no file.

    An error of os.fsync(), for example, names none, because os.fsync() takes a descriptor.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


class NewStore:
    """The file `STORE.import`, in which an import builds the new store."""

    def __init__(self, path: str) -> None:
        """Take the path. The file is claimed later."""
        self.path = path
        self.descriptor = NOT_CLAIMED

    def claim(self) -> None:
        """Make the file new and empty, and lock it until this process ends.

        Each step is for a certain rival. CommandError: another import is at work, or the file is
        not the work of an import.
        """
        try:
            # 1. Open what a killed import left. Rival: somebody who has put a link there, or who
            #    keeps another file under this name.
            leftover = open_leftover(self.path)
            if leftover is not None:
                # 2. Lock it. Rival: an import at work, which holds the lock. We keep the
                #    descriptor open, so our lock keeps others from the same leftover.
                fcntl.flock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # 3. Remove it, but only if the name still leads to it. Rival: an import that was
                #    at work in step 1 and has ended before step 2. It has made our "leftover" the
                #    store. The name is free now, or a third import has made a new file there.
                if is_name_of(self.path, leftover):
                    os.unlink(self.path)
            # 4. Make a file that nobody else has open. Rival: another import that is between
            #    its own steps 4 and 5, or an import at work. O_EXCL refuses both.
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            # 5. Lock it. Rival: another import that took our new file for a leftover.
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileExistsError):
            raise CommandError(
                f"another import builds {self.path}: try again when it has ended"
            ) from None

    def check_claim(self) -> None:
        """Raise CommandError if the name leads to another file than the one we claimed."""
        if not is_name_of(self.path, self.descriptor):
            raise CommandError(f"somebody has removed or replaced {self.path}")

    def complete(self, previous: str) -> None:
        """Give the file the mode and the owner of the previous store, and wait for the disk.

        OSError: this user may not give the file away, or the disk is full.
        """
        with naming(self.path):
            if os.path.exists(previous):
                status = os.stat(previous)
                os.fchown(self.descriptor, status.st_uid, status.st_gid)
                # A request refuses a store that everybody may write to.
                os.fchmod(self.descriptor, status.st_mode & 0o777 & ~stat.S_IWOTH)
            os.fsync(self.descriptor)

    def remove(self) -> None:
        """Remove the file, if it is still ours."""
        if self.descriptor != NOT_CLAIMED and is_name_of(self.path, self.descriptor):
            os.unlink(self.path)


def open_import_source(options: Options) -> "AgentSource":
    """Open what --import names: whatever --db takes, standard input or another pipe.

    Raises SourceError or OSError.
    """
    name = options.import_source
    seconds = options.timeout or REQUEST_SECONDS
    if name == "-":
        return open_text(open(0, "rb", closefd=False), STANDARD_INPUT)
    if is_url(name) or not is_pipe(name):
        return open_source(name, seconds)
    # A named pipe is in a directory. The pipe that a shell makes for <(...) is in none: its real
    # path is a text such as `pipe:[123]`, which does not exist.
    path = os.path.realpath(name)
    is_in_directory = os.path.exists(path)
    if is_in_directory:
        check_private_directory(os.path.dirname(path))
    return open_text(open(name, "rb"), name)


def is_pipe(name: str) -> bool:
    """Return True for a named pipe, the shell's <(...), and /dev/stdin behind a `|`."""
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except OSError:
        return False


def count_agents(store: "sqlite3.Connection", database: str) -> int:
    """Return the number of agents in one of the databases of a connection."""
    (count,) = store.execute(f"SELECT count(*) FROM {database}.agent").fetchone()
    return int(count)


def schema_of(store: "sqlite3.Connection", database: str) -> "List[Any]":
    """Return the names and definitions of the table and of the indexes in one of the databases."""
    return store.execute(f"SELECT name, sql FROM {database}.sqlite_master ORDER BY name").fetchall()


def compare(store: "sqlite3.Connection", path: str) -> "Optional[Changes]":
    """Return how a new store differs from the previous one at `path`, or None if it does not.

    CommandError: the previous store is damaged.
    """
    try:
        store.execute("ATTACH ? AS previous", (unchanging_uri(path),))
        agents = count_agents(store, "main")
        previous_agents = count_agents(store, "previous")
        stayed_before, stayed, changed = store.execute(CHANGES).fetchone()
        has_same_schema = schema_of(store, "main") == schema_of(store, "previous")
    except sqlite3.OperationalError:
        raise  # This kind of DatabaseError is about the disk, which may be full.
    except sqlite3.DatabaseError:
        # Any other kind is about the previous store. check_replaceable() has not read all of it.
        raise not_replaceable(path, DAMAGED) from None
    changes = Changes(agents - stayed, changed, previous_agents - stayed_before)
    # If the previous store has an agent twice, only its number of agents differs.
    has_same_number = agents == previous_agents
    is_the_same = has_same_number and has_same_schema and not any(changes)
    if is_the_same:
        return None
    return changes


class Import:
    """One run of --import. Its paths have no links, because rename() would replace a link."""

    def __init__(self, options: Options) -> None:
        """Name the files. Nothing is opened yet."""
        self.options = options
        self.source_name = options.import_source
        if options.import_source == "-":
            self.source_name = STANDARD_INPUT
        self.path = os.path.realpath(options.db)
        self.old_path = f"{self.path}.old"  # the previous store, for whoever wants it back
        self.kept_path = f"{self.old_path}.import"  # the previous store, before it becomes `.old`
        self.is_kept = False  # whether the previous store has the name `kept_path`
        self.new = NewStore(f"{self.path}.import")
        self.is_talkative = options.verbose or os.isatty(2)
        self.report = Report(2, tells_notes=self.is_talkative)
        self.agents = 0  # in the new store
        self.left_out = ""  # what else the source has, for people
        self.has_previous = False  # whether there is a store, and not only an empty file
        self.changes: Optional[Changes] = None  # None if nothing changed, or nothing was compared
        self.is_replaced = False

    def run(self) -> None:
        """Do everything up to the rename that replaces the store, or leave no file of ours."""
        try:
            self.check_places()
            # Opening a named pipe waits until somebody writes to it, perhaps for ever. So the
            # source is opened before anything is claimed.
            with interruptible(), naming(self.source_name):
                source = open_import_source(self.options)
            # An interrupt must not come between two steps of the next two methods.
            self.new.claim()
            self.recover_previous()
            with interruptible(), naming(self.source_name), contextlib.closing(source):
                self.build(source)
            if self.is_needed():
                self.replace()
        finally:
            if not self.is_replaced:
                self.clean_up()

    def check_places(self) -> None:
        """Find out before any work what would stop the import at its end.

        CommandError, SourceError or OSError: something else stands where the import writes.
        """
        directory = os.path.dirname(self.path)
        if self.options.db == STORE and not os.path.isdir(directory):
            os.mkdir(directory, 0o700)
        check_private_directory(directory)
        check_replaceable(self.path)
        check_replaceable(self.old_path)
        if os.path.realpath(self.source_name) in (self.new.path, self.kept_path):
            raise CommandError(
                f"{self.source_name}: this is where the import writes: rename it first"
            )

    def recover_previous(self) -> None:
        """Clear up after an import that was killed while a store had its second name.

        If the import has replaced this store, it becomes `.old`. Otherwise this is still the store,
        and only the second name is removed.
        """
        descriptor = open_leftover(self.kept_path)
        if descriptor is None:
            return
        is_still_the_store = is_name_of(self.path, descriptor)
        os.close(descriptor)
        if is_still_the_store:
            os.unlink(self.kept_path)
        else:
            self.make_old()

    def build(self, source: "AgentSource") -> None:
        """Copy the agents into the new store, and compare it with the previous one.

        CommandError: the store must stay as it is.
        """
        problem = double_key_columns(source)
        if problem:
            raise CommandError(f"{self.source_name}: {problem}")
        with contextlib.closing(create_store(self.new.path)) as store:
            self.new.check_claim()  # before the first key is written
            copy_agents(store, source, self.report, self.options.skip_invalid)
            self.report.finish()
            self.agents = count_agents(store, "main")
            self.left_out = what_was_left_out(source)
            self.check_agents(source)
            if os.path.exists(self.path) and os.path.getsize(self.path) > 0:
                self.has_previous = True
                self.changes = compare(store, self.path)

    def check_agents(self, source: "AgentSource") -> None:
        """Raise CommandError if the agents that were copied must not replace the store."""
        problem = ""
        if isinstance(source, TextSource) and source.unfinished_line is not None:
            problem = (
                f"line {source.unfinished_line} has no end; {HALF_WRITTEN}; "
                "if it is whole, end it with a newline"
            )
        elif self.report.errors and not self.options.skip_invalid:
            problem = (
                f"{plural(self.report.errors, 'fault')} "
                "(--skip-invalid would import the other agents)"
            )
        elif self.report.agents == 0:
            problem = f"it has no agents{self.left_out}"
        elif self.agents == 0:
            problem = "it has no valid agents"
        if problem:
            raise CommandError(f"{self.source_name}: {problem}")

    def is_needed(self) -> bool:
        """Return True unless the store already holds just the same agents.

        No request reads a store that everybody may write to, so an import makes it anew.
        """
        if not self.has_previous or self.changes is not None:
            return True
        return bool(os.stat(self.path).st_mode & stat.S_IWOTH)

    def replace(self) -> None:
        """Put the new store in the place of the previous one.

        rename() puts it there in one step, so there is a store at every moment. The same step
        takes the name of the previous store away. So keep_previous() gives the previous store a
        second name before the step, and finish() changes the second name to `.old` after it. The
        second name is not `.old` at once, because that would replace the older `.old`, which may
        be the source of this import. It must not be lost if the step fails.
        """
        # Look again, because time has passed.
        check_replaceable(self.path)
        check_replaceable(self.old_path)
        self.new.complete(self.path)
        if self.has_previous:
            self.keep_previous()
        self.new.check_claim()
        try:
            os.rename(self.new.path, self.path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise self.mounted() from None
            raise
        self.is_replaced = True

    def keep_previous(self) -> None:
        """Give the previous store a second name."""
        try:
            os.link(self.path, self.kept_path)
            self.is_kept = True
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise self.mounted() from None
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            # The previous store will be lost. So this is told even if the report tells no notes.
            self.report.tell(
                "note", f"{self.old_path} is not made: the file system has no hard links"
            )

    def make_old(self) -> None:
        """Change the second name of the previous store to `.old`. The store has been replaced."""
        # Another import may find the second name at this moment. Its recover_previous() then does
        # the same work, and the second name may vanish between two of our steps.
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(self.kept_path)
            if status.st_mode & stat.S_IWOTH:
                # No command reads a file that everybody may write to, and `.old` must stay
                # importable.
                os.chmod(self.kept_path, stat.S_IMODE(status.st_mode) & ~stat.S_IWOTH)
            if self.is_old_already(status):
                os.unlink(self.kept_path)
            else:
                os.rename(self.kept_path, self.old_path)

    def is_old_already(self, status: os.stat_result) -> bool:
        """Return True if `.old` is already a name of the file with this status.

        This is so if somebody has used `ln` to make `.old` the store again. rename() does nothing
        if both paths are names of one file.
        """
        if not os.path.lexists(self.old_path):
            return False
        return os.path.samestat(status, os.lstat(self.old_path))

    def mounted(self) -> CommandError:
        """Return the error for a store that is a mount of its own, as in a container."""
        return CommandError(
            f"{self.path} is mounted as a single file, which cannot be replaced: mount its "
            "directory instead"
        )

    def finish(self) -> None:
        """Make the previous store `.old`, and wait until the disk has the new names.

        CommandError: this failed, but the new store is in its place.
        """
        directory = os.path.dirname(self.path)
        try:
            if self.is_kept:
                self.make_old()
            with naming(directory):
                os.fsync(os.open(directory, os.O_RDONLY))
        except OSError as error:
            raise CommandError(f"{self.path} was replaced, but then: {message_of(error)}") from None

    def clean_up(self) -> None:
        """Remove the files that we made, because the store stays as it is."""
        # The end of interruptible() blocks these signals. If a signal comes just before that, its
        # KeyboardInterrupt leaves them unblocked.
        pthread_sigmask(SIG_BLOCK, INTERRUPTS)
        with contextlib.suppress(OSError):
            self.new.remove()
        if self.is_kept:
            with contextlib.suppress(OSError):
                os.unlink(self.kept_path)

    def failure(self, reason: str) -> CommandError:
        """Return the error of an import that has changed nothing."""
        text = f"{reason}, nothing imported"
        if os.path.exists(self.path):
            text = f"{text}, {self.path} is as it was"
        return CommandError(text)

    def tell_result(self) -> None:
        """Tell how many agents were left out, and on a terminal or with -v what was imported."""
        skipped = self.report.skipped_agents
        if skipped:
            self.report.info(f"{plural(skipped, 'invalid record')} skipped")
        if not self.is_talkative:
            return
        agents = plural(self.agents, "agent")
        if not self.is_replaced:
            text = f"nothing changed: {self.path} has the same {agents}"
        else:
            text = f"{agents} imported into {self.path}"
            if self.changes is not None:
                new, changed, gone = self.changes
                text = f"{text}: {new:,} new, {changed:,} changed, {gone:,} gone"
        self.report.info(text + self.left_out)


def import_agents(options: Options) -> int:
    """Replace the store that --db names with the agents of SOURCE. Return the exit status.

    CommandError: nothing was imported, or the message says that the store was replaced.
    """
    if is_url(options.db) or is_script(options.db):
        raise CommandError("--import makes an SQLite file, and what --db names is none")
    job = Import(options)
    pthread_sigmask(SIG_BLOCK, INTERRUPTS)  # until the end; only interruptible() lets them in
    try:
        job.run()
    except KeyboardInterrupt:
        raise job.failure(f"{job.source_name}: interrupted") from None
    except MemoryError:
        raise job.failure(f"{job.source_name}: there is not enough memory for it") from None
    except PermissionError as error:
        user = user_name(os.geteuid())
        raise job.failure(f"{message_of(error)} (for user {user})") from None
    except sqlite3.Error as error:
        raise job.failure(f"{job.new.path}: {reason_of(error)}") from None
    except SourceError as error:
        raise job.failure(f"{error.source}: {error.reason}") from None
    except (RequestError, CommandError, OSError) as error:
        raise job.failure(message_of(error)) from None
    if job.is_replaced:
        job.finish()
    job.tell_result()
    return 0


# ----------------------------------------------------------------------- asking as the manager does
# --check asks for an agent that nobody has, in each way that the manager asks, and says what the
# manager would make of the answer.

OUTPUT_LIMIT = 65_536  # bytes of an answer that are kept: authd calls recv once, with this size
PATIENCE = 60.0  # seconds that a check waits at most, even if the manager would wait longer
NOT_FOUND_BY_ENV = 127  # the exit status of `env` for a program that does not exist
EXIT_SECONDS = 0.1  # that a program has at least to end after its output has ended
SHOWN_DIGITS = 20  # of an error number, which may be very long
SHEBANG_LIMIT = 256  # bytes that the kernel reads of a script's first line


class AskingError(Exception):
    """The reason why the manager gets no answer that it can use, in words for people."""


def attempt(report: Report, what: str, ask: "Callable[[], bytes]") -> None:
    """Report what comes of one way of asking, and how long it took.

    what: the name of the way, such as `exec_path`. ask: returns the answer or raises AskingError.
    """
    started = time.monotonic()
    try:
        check_answer(ask())
        problem = ""
    except AskingError as error:
        problem = str(error)
    milliseconds = 1000 * (time.monotonic() - started)
    if problem:
        report.error(f"{what} {problem}, in {milliseconds:.1f} ms")
    else:
        report.info(
            f"{what} answers (tried with {NOBODY}, which nobody has), in {milliseconds:.1f} ms"
        )


def check_answer(output: bytes) -> None:
    """Raise AskingError unless `output` is the right answer to a request for NOBODY.

    The manager reads the first JSON object and ignores what follows it.
    """
    text = output.decode("latin-1").lstrip()
    if not text:
        raise AskingError("gave no answer")
    try:
        answer, _end = json.JSONDecoder().raw_decode(text)
        number = answer["error"]
        message = answer.get("message", "no message")
    except (ValueError, TypeError, KeyError, RecursionError):
        if "{" in text and not text.startswith("{"):
            raise AskingError("gave text before the JSON: the manager loses the answer") from None
        raise AskingError("gave text that is no JSON answer") from None
    if type(number) is not int:
        raise AskingError("gave an error that is no number: the manager may take it for 0")
    if number == NO_ERROR:
        raise AskingError(f"gave error 0: it hands out a key for {NOBODY}, which nobody has")
    if number != NOT_FOUND:
        shown_number = str(number)[:SHOWN_DIGITS]
        shown_message = printable(str(message)[:MESSAGE_LIMIT])
        raise AskingError(f"gave error {shown_number}, {shown_message}")


def run_as_manager(home: str, words: "List[str]", seconds: float) -> bytes:
    """Run the words of an exec_path as the manager runs them, and return the output.

    Raises AskingError if the program cannot be started, does not end in time, or ends with a status
    other than 0: the manager then throws the output away.
    """
    process = start_as_manager(home, words)
    assert process.stdout
    deadline = time.monotonic() + seconds
    has_ended = False
    try:
        output = read_until(process.stdout, deadline)
        seconds_left = max(deadline - time.monotonic(), EXIT_SECONDS)
        status = process.wait(timeout=seconds_left)
        has_ended = True
    except (TimeoutError, subprocess.TimeoutExpired):
        raise AskingError(f"was silent, or did not end, within {seconds:g} s") from None
    finally:
        if not has_ended:
            os.killpg(process.pid, signals.SIGKILL)
            process.wait()
        process.stdout.close()
    if status:
        raise AskingError(explain_status(home, words[0], status, output))
    return output


def start_as_manager(home: str, words: "List[str]") -> "subprocess.Popen[bytes]":
    """Start a program as the manager starts it. Raises AskingError if that is not possible."""
    try:
        return start_process(home, words)
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            # The file has no `#!` line. execvp, which the manager calls, starts a shell for it.
            return start_process(home, ["/bin/sh", *words])
        reason = error.strerror
        if error.errno == errno.ENOENT:
            # The kernel reports a script as missing if its interpreter does not exist.
            shebang = read_shebang(home, words[0])
            reason = explain_shebang(shebang, words[0], is_missing=True) or reason
        raise AskingError(f"cannot be run: {printable(words[0])}: {reason}") from None


def start_process(home: str, words: "List[str]") -> "subprocess.Popen[bytes]":
    """Start a program, as far as possible in the way of the manager. Raises OSError.

    One pipe takes standard output and standard error, and the program has its own session.
    """
    # The environment of authd cannot be known, so the program gets that of the person who checks.
    # Their $PATH may differ, and so may the interpreter that `#!/usr/bin/env` finds. Only
    # $AGENT_KEY_DB is taken out, because a person may have it and authd usually lacks it.
    environment = {name: text for name, text in os.environ.items() if name != "AGENT_KEY_DB"}
    return subprocess.Popen(
        words,
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        restore_signals=False,  # SIGPIPE stays ignored, as in a child of authd.
        preexec_fn=become_child_of_manager,
    )


def become_child_of_manager() -> None:
    """Set what a child of authd inherits. This runs between fork and exec."""
    pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT, SIGHUP))
    os.umask(0o022)


def read_until(pipe: "IO[bytes]", deadline: float) -> bytes:
    """Return what comes from `pipe` until its end, at most OUTPUT_LIMIT bytes of it.

    The rest is read and dropped, so that a flood fills no memory. Raises TimeoutError.
    """
    output = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        piece = os.read(pipe.fileno(), OUTPUT_LIMIT)
        if not piece:
            return output
        output = (output + piece)[:OUTPUT_LIMIT]


def explain_status(home: str, program: str, status: int, output: bytes) -> str:
    """Return why a program failed. `status` is negative for a signal.

    The output is shown only if it is a message of this program, because it may contain a key.
    """
    ending = f"signal {-status}" if status < 0 else f"status {status}"
    text = f"ended with {ending}: the manager throws the output away"
    first_line = output.decode("latin-1").partition("\n")[0]
    if first_line.startswith(NAME):
        return f"{text}. {printable(first_line)}"
    shebang = read_shebang(home, program)
    is_missing = shebang.is_of_env and status == NOT_FOUND_BY_ENV
    reason = explain_shebang(shebang, program, is_missing)
    if reason:
        return f"{text}. {printable(program)}: {reason}"
    return text


class Shebang(NamedTuple):
    """The first line of a script, such as `#!/usr/bin/env python3`."""

    interpreter: str  # "" if the file is no script
    is_of_env: bool  # `env` looks for the interpreter
    ends_with_cr: bool  # the file was saved with the line ends of Windows


def read_shebang(home: str, program: str) -> Shebang:
    """Return the first line of a program in its parts. A relative path begins at `home`."""
    try:
        with open(os.path.join(home, program), "rb") as file:
            line = os.fsdecode(file.readline(SHEBANG_LIMIT))
    except OSError:
        line = ""
    words = line[2:].split(maxsplit=1)
    if not line.startswith("#!") or not words:
        return Shebang("", False, False)
    interpreter = words[0]
    is_of_env = os.path.basename(interpreter) == "env" and len(words) > 1
    if is_of_env:
        interpreter = interpreter_for_env(words[1].strip())
    return Shebang(printable(interpreter), is_of_env, line.endswith("\r\n"))


def interpreter_for_env(argument: str) -> str:
    """Return which program `env` looks for if a `#!` line gives it this argument, "" if none.

    The kernel passes all that follows `env` as one argument. `env` splits it at spaces only after
    the option -S, as in `-S python3 -I` or `-S LANG=C python3`.
    """
    if not argument.startswith("-"):
        return argument
    for word in argument.split():
        is_option_or_setting = word.startswith("-") or "=" in word
        if not is_option_or_setting:
            return word
    return ""


def explain_shebang(shebang: Shebang, program: str, is_missing: bool) -> str:
    """Return what is wrong with the interpreter of a script, "" if nothing is known.

    is_missing: the kernel or `env` did not find the interpreter.
    """
    if shebang.ends_with_cr:
        return (
            f"its lines end with CR LF, so its interpreter {shebang.interpreter} cannot start: "
            f"remove each CR (sed -i 's/\\r$//' {printable(program)})"
        )
    if is_missing and shebang.interpreter:
        return f"its interpreter {shebang.interpreter} does not exist"
    return ""


def ask_as_manager(path: str, seconds: float) -> bytes:
    """Send the request for NOBODY to a socket, and return what the manager would read there.

    The manager sends the request without a newline and calls recv once. Raises AskingError.
    """
    try:
        return exchange(path, f"id:{NOBODY}".encode("ascii"), seconds)
    except RequestError as error:
        raise AskingError(f"fails: {error.detail}") from None


# ---------------------------------------------------------------------------------------- check
# --check tells what a person wants to know of a source, a server and a manager.

A_VIEW = "*"  # stands in the set of indexed columns if `agent` is a view, which has no index
# This query gives the columns that SQLite can search quickly. They are the first column of each
# index that is not partial, and the primary key, because an INTEGER PRIMARY KEY is in no list of
# indexes. For a view the query gives A_VIEW.
SQLITE_INDEXED = (
    "SELECT info.name FROM pragma_index_list('agent') AS list, "
    "pragma_index_info(list.name) AS info WHERE seqno = 0 AND NOT partial "
    "UNION SELECT name FROM pragma_table_info('agent') WHERE pk = 1 "
    f"UNION SELECT '{A_VIEW}' FROM sqlite_master WHERE lower(name) = 'agent' AND type = 'view'"
)


def check(options: Options) -> int:
    """Report on the source, the server of --socket and the manager. Return the exit status."""
    report = Report(1, options.as_json)
    checked_agents: Optional[sqlite3.Connection] = None  # None until the source has been read
    with contextlib.closing(create_store("")) as store:
        with reporting(report):
            check_source(options, store, report)
            checked_agents = store
        if options.socket is not None:
            with reporting(report):
                check_server(options.socket, options.timeout or REQUEST_SECONDS, report)
        if options.manager is not None:
            with reporting(report):
                check_manager(home_of(options.manager), options, report, checked_agents)
    report.finish()
    report.info(
        f"{plural(report.agents, 'agent')}, {plural(report.errors, 'error')}, "
        f"{plural(report.notes, 'note')}"
    )
    if report.as_json:
        say(1, to_json(report.as_dict()))
    return 1 if report.errors else 0


@contextlib.contextmanager
def reporting(report: Report) -> "Iterator[None]":
    """Report what the block raises as an error, so that the rest of the check follows."""
    try:
        yield
    except (RequestError, CommandError, OSError, sqlite3.Error) as problem:
        report.error(message_of(problem))
    except Exception as error:
        report.error(unforeseen(error).message)


def check_server(path: str, seconds: float, report: Report) -> None:
    """Report whether a running server answers a request as it should."""
    attempt(report, "server", lambda: ask_server(path, ["id", NOBODY], seconds))


def check_source(options: Options, store: "sqlite3.Connection", report: Report) -> None:
    """Report what is wrong with a source, and leave its valid agents in an empty store.

    Raises SourceError or OSError if the source cannot be read.
    """
    seconds = options.timeout or REQUEST_SECONDS
    with contextlib.closing(open_source(options.db, seconds)) as source:
        problem = double_key_columns(source)
        if problem:
            report.error(f"{source.name}: {problem}")
        copy_agents(store, source, report, inspect=partial(unfound_spellings, source))
        check_host_name(store, source.unit, report)
        store.execute("DELETE FROM agent WHERE '' IN (id, name, ip, agent_key)")
        store.commit()
        if report.agents == 0:
            report.error(f"{source.name}: it has no agents{what_was_left_out(source)}")
        if isinstance(source, Database):
            check_database(source, seconds, report)
        elif isinstance(source, SqliteSource) and not isinstance(source, ScriptSource):
            check_sqlite_file(source, seconds, report)
    if not is_url(options.db):
        check_file(options.db, report)


def unfound_spellings(source: "AgentSource", row: "Row", record: "Record") -> "Iterator[str]":
    """Yield an error for the id and for the ip of an agent, if no request finds it as stored.

    row: the agent as it is stored. record: the same agent in the right spelling.
    """
    for field, stored in (("id", row[0]), ("ip", row[2])):
        right = record[field]
        if isinstance(source, Database):
            # text_of() removes the spaces around a text. padded_ids() reports those that matter.
            stored = text_of(stored)
            if source.scheme == "mysql":
                stored = stored.lower()  # its usual collations ignore the case of letters
        if stored == right:
            continue
        if right == "any":
            continue  # No request looks for `any`.
        if not isinstance(stored, (str, bytes)):
            continue  # A number has no other spelling.
        # A network is looked for by its own address.
        request = parse_request([field, right.partition("/")[0]])
        if stored not in source.spellings(request):
            yield (
                f"no request finds its {field} as it is stored: {right} is right, and --import "
                "would mend it"
            )


def check_host_name(store: "sqlite3.Connection", unit: str, report: Report) -> None:
    """Report an agent with the name of this host: the manager here keeps this name for itself."""
    query = "SELECT rowid, id FROM agent WHERE name = ?"
    for number, agent_id in store.execute(query, (os.uname().nodename,)):
        place = place_of(unit, number, agent_id)
        report.error(f"{place}: name is this host's own: its manager refuses that")


def check_database(source: Database, seconds: float, report: Report) -> None:
    """Report agents that no request can find, exposed passwords and missing indexes.

    SourceError: the database cannot be asked.
    """
    for text in source.padded_ids():
        report.error(f"{source.name}: {text}")
    for text in source.exposed_files():
        report.note(text)
    try_requests(source, seconds)
    report_missing_indexes(source, source.indexed(), report)


def check_sqlite_file(source: SqliteSource, seconds: float, report: Report) -> None:
    """Report missing indexes and damage in an SQLite file. SourceError: requests fail."""
    try_requests(source, seconds)
    indexed = {column for (column,) in source.query(SQLITE_INDEXED)}
    report_missing_indexes(source, indexed, report)
    source.deadline = time.monotonic() + READING_SECONDS
    # The answer is "ok" or what is wrong, with names of tables and indexes, but not with content.
    for (text,) in source.query("PRAGMA integrity_check(1)"):
        if text != "ok":
            report.error(
                f"{source.name}: the database is damaged ({' '.join(text.split())}), so an answer "
                "may hold the key of another agent: make the database anew"
            )


def try_requests(source: "Union[SqliteSource, Database]", seconds: float) -> None:
    """Look for an id and an ip that no agent has. SourceError: a column has an unfit type."""
    for words in (["id", NOBODY], ["ip", "0.0.0.1"]):
        source.deadline = time.monotonic() + seconds
        source.find(parse_request(words))


def report_missing_indexes(
    source: "Union[SqliteSource, Database]", indexed: "Set[str]", report: Report
) -> None:
    """Report the indexes that a table lacks. indexed: the columns that an index begins with."""
    if A_VIEW in indexed:
        return
    for field in ("id", "ip"):
        column = source.columns.names[field]
        if column not in indexed:
            report.note(
                f"requests are slow without CREATE INDEX agent_{column} ON agent ({column});"
            )


def check_file(name: str, report: Report) -> None:
    """Note who else can read or change a file. OSError: it is not there any more."""
    status = os.stat(name)
    if status.st_mode & stat.S_IROTH:
        report.note(f"others may read {name}, and keys are secrets: chmod o-r {name}")
    if status.st_uid not in (0, os.geteuid()):
        report.note(f"{name} belongs to user {user_name(status.st_uid)}, who can change its agents")


# ---------------------------------------------------------------------- the manager's configuration
# --check --manager reads a manager's files as the manager reads them, asks for an agent as the
# manager asks, and counts the agents that are enrolled. Where the manager is odd, the rules here
# are odd, too; tests/MANAGER.md lists them.

HOMES = ("/var/ossec", "/var/wazuh-manager")  # before 5.0, and from 5.0 on
OLD_VERSION_FILE = "/etc/ossec-init.conf"  # managers before 4.2 write their version here
WODLE = '<wodle name="agent-key-polling">'
FIRST_WITH_KEY_REQUEST = (4, 4)  # older managers ask by the wodle only
FIRST_WITHOUT_REQUESTS = (5, 0)  # from 5.0 on, managers ask nobody for keys
UNKNOWN = (0, 0)  # a version that no file tells
PATH_LIMIT = 4096  # bytes of exec_path or socket, with the NUL at the end
MOST_THREADS = 32
LEAST_USEFUL_QUEUE = 2  # The manager takes a queue_size of 1, but this queue is always full.
LEAST_LONG = -(2**63)  # the range of atol(), which the manager uses for numbers
GREATEST_LONG = 2**63 - 1
AGENTS_NAMED = 100  # --check names so many agents that differ from client.keys

# The tags that may stand in <ossec_config>. The manager refuses its whole configuration if an
# element with a tag in NEVER_EMPTY has no child.
NEVER_EMPTY = {
    "global",
    "ruleset",
    "alerts",
    "email_alerts",
    "database_output",
    "syslog_output",
    "integration",
    "agentless",
    "localfile",
    "remote",
    "client",
    "command",
    "active-response",
    "reports",
    "labels",
    "cluster",
    "socket",
    "rule_test",
    "agent-upgrade",
    "task-manager",
    "wdb",
    "github",
    "office365",
    "ms-graph",
    "anti_tampering",
}
MAY_BE_EMPTY = {
    "syscheck",
    "rootcheck",
    "client_buffer",
    "wodle",
    "sca",
    "vulnerability-detector",
    "vulnerability-detection",
    "indexer",
    "gcp-pubsub",
    "gcp-bucket",
    "fluent-forward",
    "auth",
    "logging",
}


class NotEnrollingError(Exception):
    """The reason why a manager enrols nobody, in words for people."""


class ConfigurationError(Exception):
    """A fault for which the manager refuses its whole configuration. The text names the line."""


# ------------------------------------------------------------------ reading ossec.conf as XML

XML_TEXT_LIMIT = 20_480  # characters. The manager takes only texts and names that are shorter.
XML_DEPTH_LIMIT = 1024  # The manager lets at most so many elements be open at the same time.
XML_SPACES = " \t\n\v\f\r"  # isspace() of C


class Element:
    """An element of ossec.conf.

    text: what stands between its last child and its end tag. The manager forgets the text before
    a child. line: the number of the line where the element begins.
    """

    def __init__(self, name: str, line: int) -> None:
        """Make an element without content."""
        self.name = name
        self.line = line
        self.text = ""
        self.attributes: Dict[str, str] = {}
        self.children: List[Element] = []

    @property
    def tag(self) -> str:
        """The tag for people, such as `<auth>`."""
        return f"<{shortened(self.name)}>"

    @property
    def end_tag(self) -> str:
        """The end tag for people, such as `</auth>`."""
        return f"</{shortened(self.name)}>"

    def __str__(self) -> str:
        """Return the element for people, such as `<threads>64</threads>`."""
        return f"{self.tag}{shortened(self.text)}{self.end_tag}"


def shortened(text: str) -> str:
    """Return the beginning of a text in printable ASCII."""
    text = printable(text)
    return text if len(text) <= 40 else f"{text[:40]}..."


class XmlReader:
    """Reads ossec.conf as the manager's own XML reader does, in one pass.

    The manager trims nothing and knows no entities. Every `<` begins a tag, unless a backslash
    stands before it. A comment begins with `<!` and ends with `-->` or `!>`.
    """

    TAG_NAME = re.compile(r"[^>\s]*", re.ASCII)
    ATTRIBUTE_NAME = re.compile(r"[^>/=\s]*", re.ASCII)
    SPACES = re.compile(r"\s*", re.ASCII)
    PLAIN_TEXT = re.compile(r"[^<\\]+")
    COMMENT_END = re.compile("-->|!>")

    def __init__(self, text: str) -> None:
        """Take the whole text of a file."""
        self.text = text
        self.place = 0  # the index of the next character to read
        self.line_place = 0  # the place for which current_line() counted the lines last
        self.line = 1  # the number of the line at line_place
        self.top = Element("", 1)  # a parent for the outermost elements
        self.open_elements = [self.top]  # from the outside to the inside

    def read(self) -> "List[Element]":
        """Return the outermost elements. Raises ConfigurationError."""
        while self.place < len(self.text):
            self.read_text_and_tag()
        innermost = self.open_elements[-1]
        if innermost is not self.top:
            raise self.error(f"{innermost.tag} is not closed", innermost.line)
        return self.top.children

    def read_text_and_tag(self) -> None:
        """Read the text up to the next tag, and then the tag. The last text has no tag after it."""
        text = self.read_text()
        is_in_element = self.open_elements[-1] is not self.top
        if is_in_element:  # The manager skips text outside of elements, whatever its length.
            self.check_length(text)
        if self.text.startswith("</", self.place):
            self.read_end_tag(text)
        elif self.place < len(self.text):
            self.read_tag()

    def read_text(self) -> str:
        """Return the text up to the next tag or the end of the file, without comments."""
        pieces = []
        # is_escaped is true after an odd number of backslashes. Then the next `<` belongs to the
        # text. But `<!` begins a comment, even after a backslash.
        is_escaped = False
        while self.place < len(self.text):
            plain = self.PLAIN_TEXT.match(self.text, self.place)
            if plain:
                pieces.append(plain.group())
                self.place = plain.end()
                is_escaped = False
            elif self.text[self.place] == "\\":
                pieces.append("\\")
                self.place += 1
                is_escaped = not is_escaped
            elif self.text.startswith("<!", self.place):
                self.skip_comment()
            elif is_escaped:
                pieces.append("<")
                self.place += 1
                is_escaped = False
            else:
                break
        return "".join(pieces)

    def skip_comment(self) -> None:
        """Go to the end of a comment. A DOCTYPE is a comment, too."""
        end = self.COMMENT_END.search(self.text, self.place + 2)
        if not end:
            raise self.error("a comment, or a <!DOCTYPE>, has no end")
        self.place = end.end()

    def read_tag(self) -> None:
        """Read a tag that begins an element, and add the element to its parent."""
        line = self.current_line()
        self.place += 1  # the `<`
        name = self.take(self.TAG_NAME)
        self.check_length(name)
        if name.startswith("?"):
            raise self.error("the manager takes no <?xml ...?>: remove it")
        has_end_tag = True
        if name.endswith("/"):  # This is a tag such as `<a/>`. TAG_NAME takes the `/`, too.
            has_end_tag = False
            name = name[:-1]
        element = Element(name, line)
        if self.place == len(self.text):
            raise self.error(f"{element.tag} is not closed", line)
        last_letter = self.next_letter()
        if last_letter != ">":
            last_letter = self.read_attributes(element)
        if last_letter == "/":  # This is a tag such as `<a x="1"/>` or `<a />`.
            has_end_tag = False
        self.open_elements[-1].children.append(element)
        if has_end_tag:
            self.open_elements.append(element)
            depth = len(self.open_elements) - 1  # `top` does not count.
            if depth > XML_DEPTH_LIMIT:
                raise self.error("the tags are nested too deeply")

    def read_end_tag(self, text: str) -> None:
        """Read a tag that ends an element. `text` is what stands before the tag.

        The manager wants the name to the letter, without a space before the `>`.
        """
        element = self.open_elements[-1]
        if element is self.top:
            raise self.error("a tag is closed that is not open")
        end = self.text.find(">", self.place)
        if end < 0 or self.text[self.place : end] != f"</{element.name}":
            raise self.error(
                f"{element.tag} of line {element.line} is not closed by {element.end_tag}"
            )
        self.place = end + 1
        element.text = text.partition("\0")[0]  # A C string ends at a NUL.
        self.open_elements.pop()

    def read_attributes(self, element: Element) -> str:
        """Read the attributes of a tag. Return the character after them, which is `>` or `/`.

        After a `/`, the manager does not skip the `>`. It takes the `>` for the beginning of the
        text that follows. So this method does not read that `>`, either.
        """
        while True:
            self.take(self.SPACES)
            name = self.take(self.ATTRIBUTE_NAME)
            self.check_length(name)
            separator = self.next_letter()
            is_end = not name and separator in (">", "/")
            if is_end:
                return separator
            if separator != "=":
                raise self.error(f"the attribute {printable(name)} has no value")
            if name in element.attributes:
                raise self.error(f"the attribute {printable(name)} stands twice")
            element.attributes[name] = self.read_value(name)
            separator = self.next_letter()
            if separator in (">", "/"):
                return separator
            if separator not in XML_SPACES:
                raise self.error(f"the attribute {printable(name)} is not followed by a space")

    def read_value(self, name: str) -> str:
        """Return the value of an attribute, which must be in quotes and contain no `>`."""
        not_in_quotes = f"the value of the attribute {printable(name)} is not in quotes"
        self.take(self.SPACES)
        quote = self.next_letter()
        if quote not in ('"', "'"):
            raise self.error(not_in_quotes)
        end = self.text.find(quote, self.place)
        if end < 0:
            raise self.error(not_in_quotes)
        value = self.text[self.place : end]
        if ">" in value:  # For the manager, no `>` ever stands in quotes.
            raise self.error(not_in_quotes)
        self.place = end + 1
        self.check_length(value)
        return value

    def take(self, pattern: "Pattern[str]") -> str:
        """Return the text at this place that matches, and go to its end.

        Each pattern can match an empty text, so there is always a match.
        """
        found = pattern.match(self.text, self.place)
        assert found
        self.place = found.end()
        return found.group()

    def next_letter(self) -> str:
        """Return the next character. Raises ConfigurationError at the end of the file."""
        if self.place == len(self.text):
            raise self.error("the file ends within a tag")
        self.place += 1
        return self.text[self.place - 1]

    def check_length(self, text: str) -> None:
        """Raise ConfigurationError if a text is too long for the manager."""
        if len(text) >= XML_TEXT_LIMIT:
            raise self.error(f"a text has {XML_TEXT_LIMIT} characters or more")

    def current_line(self) -> int:
        """Return the number of the line that is being read.

        Only the lines since the last call are counted, so that a long file is counted once.
        """
        self.line += self.text.count("\n", self.line_place, self.place)
        self.line_place = self.place
        return self.line

    def error(self, reason: str, line: "Optional[int]" = None) -> ConfigurationError:
        """Return the error to raise. line: where it is, None for the line that is being read.

        1226 is the number of these errors in the manager's log.
        """
        number = self.current_line() if line is None else line
        return ConfigurationError(f"line {number}: {reason} (error 1226)")


# ------------------------------------------------------ rules for the values in <auth> and <force>


def is_anything(_element: Element) -> bool:
    """Return True. This is the rule for tags of which the manager takes every value."""
    return True


def is_yes_or_no(element: Element) -> bool:
    """Return True for exactly `yes` or `no`."""
    return element.text in ("yes", "no")


def is_yes_or_no_in_any_case(element: Element) -> bool:
    """Return True for `yes` or `no` in small or capital letters, as <ipv6> takes them."""
    return element.text.lower() in ("yes", "no")


def is_port(element: Element) -> bool:
    """Return True for a number that the manager takes for a port.

    The manager keeps only the low 16 bits of the number, and refuses 0. So it takes 65537 for 1.
    """
    port = leading_number(element.text) & 0xFFFF
    return port != 0


def is_not_negative(element: Element) -> bool:
    """Return True for a number from 0 on."""
    return leading_number(element.text) >= 0


def is_interval(element: Element) -> bool:
    """Return True for a time as <force> takes it, such as `3600` or `1h`.

    After the number comes the end of the text or one of d, h, m and s. Anything may follow the
    letter.
    """
    return bool(re.match(r"\s*\+?[0-9]+([dhms]|\Z)", element.text, re.ASCII))


def is_disconnected_time(element: Element) -> bool:
    """Return True for a value such as <disconnected_time enabled="yes">1h</disconnected_time>.

    The first attribute must be `enabled`. With enabled="no", the text may be anything.
    """
    first_attribute = next(iter(element.attributes), "")
    if first_attribute != "enabled":
        return False
    if element.attributes["enabled"] == "yes":
        return is_interval(element)
    return element.attributes["enabled"] == "no"


def has_children(element: Element) -> bool:
    """Return True if the element contains others."""
    return bool(element.children)


def leading_number(text: str) -> int:
    """Return the number with which `text` begins, as atol() of C does: 60 of `60s`, 0 of `x`."""
    found = re.match(r"\s*([+-]?)0*([0-9]*)", text, re.ASCII)
    assert found
    sign = found.group(1)
    # These digits do not begin with a zero, so 20 of them are always out of range. The others are
    # cut off, because int() refuses a text of several thousand digits.
    digits = found.group(2)[:20]
    number = int(digits) if digits else 0
    if sign == "-":
        number = -number
    return max(LEAST_LONG, min(number, GREATEST_LONG))


# For each tag that the manager takes, a function that says whether it takes the value.
FORCE_RULES: "Dict[str, Callable[[Element], bool]]" = {
    "enabled": is_yes_or_no,
    "key_mismatch": is_yes_or_no,
    "disconnected_time": is_disconnected_time,
    "after_registration_time": is_interval,
}
AUTH_RULES: "Dict[str, Callable[[Element], bool]]" = {
    "disabled": is_yes_or_no,
    "port": is_port,
    "ipv6": is_yes_or_no_in_any_case,
    "use_source_ip": is_yes_or_no,
    "force_insert": is_yes_or_no,
    "force_time": is_not_negative,
    "force": has_children,
    "purge": is_yes_or_no,
    "use_password": is_yes_or_no,
    "limit_maxagents": is_anything,
    "ciphers": is_anything,
    "ssl_agent_ca": is_anything,
    "ssl_verify_host": is_yes_or_no,
    "ssl_manager_cert": is_anything,
    "ssl_manager_key": is_anything,
    "ssl_auto_negotiate": is_yes_or_no,
    "remote_enrollment": is_yes_or_no,
    "agents": is_anything,
    "key_request": is_anything,
}


# ------------------------------------------------------------------ the settings that count


class BadSetting(NamedTuple):
    """A setting with a bad value. The manager stops reading the <key_request> there."""

    element: Element
    reason: str  # why the value is bad
    lost: "List[str]"  # the names of the settings that the manager therefore does not set

    def __str__(self) -> str:
        """Return what is bad, and what the manager does about it, for people."""
        text = f"{self.element} {self.reason}, so the manager reads no further"
        if self.lost:
            return f"{text} and does not set {', '.join(self.lost)}"
        return text


class KeyRequest:
    """The settings of <key_request> or of the wodle, as the manager has them after reading."""

    # The least and the greatest value. The manager wants a timeout below UINT_MAX.
    RANGES = {"timeout": (1, 2**32 - 2), "threads": (1, MOST_THREADS), "queue_size": (1, 220_000)}
    DEFAULTS = {"timeout": 60, "threads": 1, "queue_size": 1024}

    def __init__(self) -> None:
        """Set the defaults of the manager."""
        self.paths = {"exec_path": "", "socket": ""}
        self.numbers = dict(self.DEFAULTS)
        self.is_enabled = True
        self.set_by: Dict[str, Element] = {}  # for each setting, the element that has set it
        self.unknown: List[Element] = []  # settings that no manager has

    def read(self, block: Element) -> "Optional[BadSetting]":
        """Take the settings of a block in their order, up to a bad one. Return the bad one or None.

        The manager first sets everything but the paths back to the defaults. So a path that the
        block does not set stays as an earlier block has set it.
        """
        self.numbers = dict(self.DEFAULTS)
        self.is_enabled = True
        for place, element in enumerate(block.children):
            reason = self.set_from(element)
            if reason:
                not_read = block.children[place + 1 :]
                return BadSetting(element, reason, self.lost_settings(element, not_read))
        return None

    def lost_settings(self, bad: Element, not_read: "List[Element]") -> "List[str]":
        """Return the names of the settings that the manager does not set.

        bad: the element with a bad value. A bad path is lost, too, but a bad number is kept.
        not_read: the elements after `bad` in its block.
        """
        lost = {element.name for element in not_read}
        if bad.name in self.paths:
            lost.add(bad.name)
        all_settings = ("enabled", *self.paths, *self.numbers)
        return [name for name in all_settings if name in lost]

    def set_from(self, element: Element) -> str:
        """Take one setting. Return why the manager refuses its value, or "" for a good value.

        The manager keeps a bad number, but not a bad path. After a bad `enabled` it is enabled.
        """
        name = element.name
        self.set_by[name] = element
        if name == "enabled":
            self.is_enabled = element.text != "no"
            return "" if is_yes_or_no(element) else "is neither yes nor no"
        if name in self.paths:
            reason = fault_of_path(element.text)
            self.paths[name] = "" if reason else element.text
            return reason
        if name in self.numbers:
            number = leading_number(element.text)
            least, most = self.RANGES[name]
            self.numbers[name] = number
            return "" if least <= number <= most else f"is not from {least} to {most}"
        # The wodle also has `force_insert`, which does not matter here.
        if name != "force_insert":
            self.unknown.append(element)
        return ""


def fault_of_path(text: str) -> str:
    """Return why the manager refuses a path, or "" for a good path."""
    if not text or text.startswith(" "):
        return "is empty or begins with a space"
    if len(os.fsencode(text)) >= PATH_LIMIT:
        return "is too long"
    return ""


class Configuration:
    """What a manager's ossec.conf says about key requests, read in the manager's order.

    path: of the file. version: of the manager, or UNKNOWN. notes: for people.
    """

    def __init__(self, path: str, version: "Tuple[int, int]") -> None:
        """Set what holds for an empty file."""
        self.path = path
        self.version = version
        # A manager of unknown version is treated like one of 4.4 to 4.14.
        self.is_before_key_request = version != UNKNOWN and version < FIRST_WITH_KEY_REQUEST
        self.has_auth = False
        self.disabled_by: Optional[Element] = None  # <disabled>yes</disabled>
        self.request = KeyRequest()
        self.block: Optional[Element] = None  # the <key_request> that counts
        self.wodle: Optional[Element] = None  # the last wodle for key requests so far
        self.bad_setting: Optional[BadSetting] = None  # the one in `block`
        self.notes: List[str] = []

    def where(self, element: Element) -> str:
        """Return the place of an element for people."""
        return f"{self.path}, line {element.line}"

    def error_at(self, element: Element, reason: str) -> ConfigurationError:
        """Return the error to raise for an element. The manager refuses the whole file for it."""
        return ConfigurationError(f"line {element.line}: {reason}")

    def read(self, text: str) -> None:
        """Read the text of an ossec.conf. Raises ConfigurationError."""
        for root in XmlReader(text).read():
            if root.name != "ossec_config":
                raise self.error_at(root, f"{root.tag} stands outside <ossec_config>")
            for section in root.children:
                self.read_section(section)

    def read_section(self, section: Element) -> None:
        """Read an element of <ossec_config>. Raises ConfigurationError."""
        if section.name not in NEVER_EMPTY | MAY_BE_EMPTY:
            raise self.error_at(section, f"{section.tag} is no tag of <ossec_config>")
        if section.name in NEVER_EMPTY and not section.children:
            raise self.error_at(section, f"{section.tag} is empty")
        if section.name == "auth":
            self.has_auth = True
            for element in section.children:
                self.read_in_auth(element)
        elif section.name == "wodle":
            self.read_wodle(section)

    def read_in_auth(self, element: Element) -> None:
        """Read an element of <auth>. Raises ConfigurationError."""
        self.check_value(element, AUTH_RULES, "<auth>")
        if element.name == "disabled":
            self.disabled_by = element if element.text == "yes" else None
        elif element.name == "force":
            for child in element.children:
                self.check_value(child, FORCE_RULES, "<force>")
        elif element.name == "key_request":
            self.read_key_request(element)

    def check_value(
        self, element: Element, rules: "Dict[str, Callable[[Element], bool]]", parent: str
    ) -> None:
        """Raise ConfigurationError if there is no rule for the tag, or the rule forbids the value.

        parent: the tag of the element that it is in, for people.
        """
        if element.name not in rules:
            raise self.error_at(element, f"{element.tag} is no tag of {parent}")
        is_allowed = rules[element.name]
        if not is_allowed(element):
            raise self.error_at(element, f"{element} is no value that {parent} takes")

    def read_key_request(self, block: Element) -> None:
        """Read a <key_request>. Only the first one that is not empty counts.

        Raises ConfigurationError for a manager that does not have <key_request>.
        """
        if self.is_before_key_request:
            raise self.error_at(block, "<key_request> is no tag of <auth> before 4.4")
        if not block.children:
            return
        if self.block:
            self.note_ignored(block, self.block)
            return
        self.block = block
        self.bad_setting = self.request.read(block)

    def read_wodle(self, wodle: Element) -> None:
        """Read a <wodle>. The manager looks only at its first attribute to find out its name.

        Raises ConfigurationError.
        """
        if not wodle.attributes:
            raise self.error_at(wodle, "<wodle> has no name")
        first_attribute = next(iter(wodle.attributes.items()))
        if first_attribute == ("name", "agent-key-polling"):
            self.read_wodle_for_keys(wodle)

    def read_wodle_for_keys(self, wodle: Element) -> None:
        """Read <wodle name="agent-key-polling">, which holds the settings before 4.4.

        Later managers read it, too, unless a <key_request> came before it. Raises
        ConfigurationError for a bad setting.
        """
        if self.block:
            self.note_ignored(wodle, self.block)
            return
        if self.wodle:
            self.notes.append(f"{self.where(self.wodle)}: a later {WODLE} replaces this one")
        self.wodle = wodle
        if self.is_before_key_request:
            self.request = KeyRequest()  # These managers do not keep the paths of an earlier wodle.
        bad = self.request.read(wodle)
        if bad:
            raise self.error_at(bad.element, f"{bad.element} in {WODLE} {bad.reason}")

    def note_ignored(self, block: Element, first: Element) -> None:
        """Note that a block is not read, because the block `first` came first."""
        self.notes.append(
            f"{self.where(block)}: this {block.tag} is not read, because the <key_request> of line "
            f"{first.line} came first"
        )


# ------------------------------------------------------------------ the files of the manager


def home_of(named: "Optional[str]") -> str:
    """Return the manager's home: what --manager names, or the usual one that exists."""
    if named:
        return named
    for home in HOMES:
        if os.path.isdir(home):
            return home
    return HOMES[0]


def open_managers_file(path: str) -> "BinaryIO":
    """Open a file of the manager for reading. Raises CommandError or OSError.

    Any user may own the file and its directory. For example, `wazuh`, the manager's own user, may
    own /var/ossec/etc. authd runs as root and trusts these owners, too.
    """
    file_owner = os.stat(path).st_uid
    directory_owner = os.stat(os.path.dirname(path)).st_uid
    owners = {0, os.geteuid(), file_owner, directory_owner}
    try:
        place = check_way(path, owners=owners, directory_owners=owners)
    except SourceError as error:
        raise CommandError(f"{error.source}: {error.reason}") from None
    if place.type != REGULAR_FILE:
        raise CommandError(f"{path}: not a regular file")
    return open(place.path, "rb")


def read_managers_file(path: str) -> str:
    """Return the text of a file of the manager. Raises CommandError or OSError."""
    with open_managers_file(path) as file:
        return os.fsdecode(file.read())


def read_client_keys(home: str) -> "Dict[str, Record]":
    """Return the records in the manager's client.keys by id. Raises CommandError or OSError."""
    path = f"{home}/etc/client.keys"
    enrolled = {}
    try:
        with open_managers_file(path) as file:
            for _number, row in open_text(file, path).rows():
                record, _faults = judge(row)
                enrolled[record["id"]] = record
    except SourceError as error:
        raise CommandError(f"{error.source}: {error.reason}") from None
    return enrolled


def version_of(home: str) -> "Tuple[int, int]":
    """Return the manager's version as (major, minor), or UNKNOWN.

    VERSION.json exists from 4.12 on, bin/wazuh-control from 4.2 on, and /etc/ossec-init.conf up to
    4.1.
    """
    in_json = r'"version": *"v?([0-9]+)\.([0-9]+)'
    in_shell = r'^VERSION="?v?([0-9]+)\.([0-9]+)'
    places = (
        (f"{home}/VERSION.json", in_json),
        (f"{home}/bin/wazuh-control", in_shell),
        (OLD_VERSION_FILE, in_shell),
    )
    for path, pattern in places:
        try:
            text = read_managers_file(path)
        except (CommandError, OSError):
            continue
        if names_another_home(text, home):
            continue
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            return int(found.group(1)), int(found.group(2))
    return UNKNOWN


def names_another_home(text: str, home: str) -> bool:
    """Return True if a file belongs to a manager with another home.

    /etc/ossec-init.conf names the home. The other files stand in it.
    """
    found = re.search('^DIRECTORY="(/[^"]+)"', text, re.MULTILINE)
    if not found:
        return False
    return os.path.realpath(found.group(1)) != os.path.realpath(home)


def read_configuration(home: str, report: Report) -> Configuration:
    """Return what the manager's ossec.conf says about key requests.

    Raises NotEnrollingError if the manager asks nobody or refuses the file, and CommandError or
    OSError if the file cannot be read.
    """
    version = version_of(home)
    if version == UNKNOWN and os.path.exists(f"{home}/etc/wazuh-manager.conf"):
        raise NotEnrollingError("a manager of 5.0 or later asks nobody for keys: use --enroll")
    if version >= FIRST_WITHOUT_REQUESTS:
        name = f"{version[0]}.{version[1]}"
        raise NotEnrollingError(f"a manager of {name} asks nobody for keys: use --enroll")
    configuration = Configuration(f"{home}/etc/ossec.conf", version)
    text = read_managers_file(configuration.path)
    # This note waits until ossec.conf has been read. If that fails, the home is probably wrong, and
    # a note about the version would only distract from this.
    if version == UNKNOWN:
        report.note(
            f"the manager's version is unknown: neither {home}/VERSION.json nor "
            f"{home}/bin/wazuh-control nor {OLD_VERSION_FILE} tells it"
        )
    try:
        configuration.read(text)
    except ConfigurationError as error:
        reason = f"{configuration.path}, {error}: wazuh-authd does not start"
        raise NotEnrollingError(reason) from None
    return configuration


def check_that_it_asks(configuration: Configuration) -> None:
    """Raise NotEnrollingError if the manager has neither an exec_path nor a socket to ask."""
    if any(configuration.request.paths.values()):
        return
    if configuration.bad_setting:
        where = configuration.where(configuration.bad_setting.element)
        reason = f"{where}: {configuration.bad_setting}"
    elif configuration.block:
        where = configuration.where(configuration.block)
        reason = f"{where}: <key_request> sets no exec_path and no socket"
    elif configuration.is_before_key_request:
        reason = (
            f"{configuration.path} has no {WODLE} with an exec_path or a socket, which managers "
            "before 4.4 need"
        )
    else:
        reason = (
            f"{configuration.path} has no <key_request> in <auth> with an exec_path or a socket"
        )
    raise NotEnrollingError(f"{reason}: the manager asks nobody")


def check_that_it_enrols(configuration: Configuration) -> None:
    """Raise NotEnrollingError if a setting keeps the manager from enrolling anybody."""
    request = configuration.request
    if not configuration.has_auth:
        raise NotEnrollingError(f"{configuration.path} has no <auth>: wazuh-authd is disabled")
    if configuration.disabled_by:
        effect = "in <auth> disables wazuh-authd"
        raise not_enrolling(configuration, configuration.disabled_by, effect)
    if not request.is_enabled:
        effect = "disables the key requests"
        raise not_enrolling(configuration, request.set_by["enabled"], effect)
    if not 1 <= request.numbers["threads"] <= MOST_THREADS:
        effect = f"is not from 1 to {MOST_THREADS}: nobody is enrolled"
        raise not_enrolling(configuration, request.set_by["threads"], effect)
    if request.numbers["queue_size"] < LEAST_USEFUL_QUEUE:
        effect = f"is below {LEAST_USEFUL_QUEUE}, so the queue is always full: nobody is enrolled"
        raise not_enrolling(configuration, request.set_by["queue_size"], effect)


def not_enrolling(configuration: Configuration, element: Element, effect: str) -> NotEnrollingError:
    """Return the error to raise for an element. effect: what it does, for people."""
    return NotEnrollingError(f"{configuration.where(element)}: {element} {effect}")


def tell_settings(configuration: Configuration, report: Report) -> None:
    """Report settings that a person should correct, but with which the manager enrols agents."""
    request = configuration.request
    for element in request.unknown:
        report.note(f"{configuration.where(element)}: {element}: the manager has no such setting")
    bad = configuration.bad_setting
    if bad:
        text = f"{configuration.where(bad.element)}: {bad}"
        loses_path = "exec_path" in bad.lost or "socket" in bad.lost
        if loses_path:  # The manager does not ask in one of the ways that the person wants.
            report.error(text)
        else:
            report.note(text)
    for name, path in request.paths.items():
        value = path
        if name == "exec_path":
            # The manager splits exec_path at spaces, so spaces around it do not matter. But a
            # newline or a tab becomes a part of a word.
            value = path.strip(" ")
        has_white_space_around = value != value.strip()
        if has_white_space_around:
            report.note(
                f"{configuration.where(request.set_by[name])}: the white space around <{name}> "
                "counts as a part of it"
            )


# ------------------------------------------------------------- commands, as the manager reads them


def split_command(text: str) -> "List[str]":
    r"""Return the words of an exec_path as the manager splits it.

    Spaces separate words, `"` quotes, and `\` takes the next character as it is, also in quotes. A
    quote that is not closed takes the rest of the text.
    """
    words: List[str] = []
    word = ""
    is_in_word = False  # `""` is a word, too, so an empty `word` does not tell.
    is_quoted = False
    letters = iter(text)
    for letter in letters:
        if letter == " " and not is_quoted:
            if is_in_word:
                words.append(word)
            word = ""
            is_in_word = False
            continue
        is_in_word = True
        if letter == '"':
            is_quoted = not is_quoted
        elif letter == "\\":
            word += next(letters, "")
        else:
            word += letter
    if is_in_word:
        words.append(word)
    return words


def option_in(words: "List[str]", name: str) -> str:
    """Return the value of an option in a command, "" if the command does not have it.

    If the command has the option twice, this is the later value. This program refuses such a
    command, and ask_exec_path() reports that.
    """
    value = ""
    for place, word in enumerate(words):
        if word == name and place + 1 < len(words):
            value = words[place + 1]
        elif word.startswith(f"{name}="):
            value = word[len(name) + 1 :]
    return value


def is_of_this_program(words: "List[str]") -> bool:
    """Return True if a command runs this program, as far as the name of the program tells.

    The program need not be the first word, because a Python may stand before it.
    """
    return any(os.path.basename(word).startswith(NAME) for word in words)


# ------------------------------------------------------------------ asking in each way


def ask_in_each_way(home: str, configuration: Configuration, report: Report) -> None:
    """Ask in each way that the manager asks, and report what comes of it."""
    request = configuration.request
    timeout = request.numbers["timeout"]
    seconds = PATIENCE
    if 1 <= timeout < PATIENCE:  # A timeout below 1 is a bad setting, and was reported as one.
        seconds = float(timeout)
    if request.paths["socket"]:
        path = os.path.join(home, request.paths["socket"])
        attempt(report, "socket", partial(ask_as_manager, path, seconds))
    words = split_command(request.paths["exec_path"])
    if words:
        ask_exec_path(home, configuration, seconds, report)


def ask_exec_path(home: str, configuration: Configuration, seconds: float, report: Report) -> None:
    """Run exec_path as the manager runs it, and report what comes of it.

    Managers before 4.4 do not ask the exec_path of a wodle that also has a socket. They start it
    as the server of this socket.
    """
    request = configuration.request
    words = split_command(request.paths["exec_path"])
    # The manager appends the request and splits the whole text. If exec_path has a quote that is
    # not closed, the request becomes a part of the last word of exec_path.
    command = split_command(f"{request.paths['exec_path']} id {NOBODY}")
    keeps_request = command == [*words, "id", NOBODY]
    if not keeps_request:
        report.error("exec_path has a quote that is not closed: no request reaches the program")
        return
    tell_timeouts(request.numbers["timeout"], words, report)
    is_wodle_with_socket = not configuration.block and request.paths["socket"] != ""
    if is_wodle_with_socket and configuration.is_before_key_request:
        if "--serve" not in words:
            report.error(
                "exec_path lacks --serve: this manager starts it as the server of its socket"
            )
        return
    if is_wodle_with_socket and configuration.version == UNKNOWN:
        report.info(
            "exec_path is not tried: managers before 4.4 start it as the server of the socket, "
            "and later ones ask it if the socket does not answer"
        )
        return
    attempt(report, "exec_path", partial(run_as_manager, home, command, seconds))


def tell_timeouts(timeout: int, words: "List[str]", report: Report) -> None:
    """Report a note if the manager may stop waiting before exec_path ends a request by itself.

    timeout: how long the manager waits, in seconds. words: those of exec_path.
    """
    named = option_in(words, "--timeout")
    if named:
        own_timeout = seconds_in(named)
    elif not is_of_this_program(words):
        return  # Nobody knows when the program ends a request.
    elif "--serve" in words:
        own_timeout = SERVER_SECONDS
    else:
        own_timeout = REQUEST_SECONDS
    if 1 <= timeout <= own_timeout:
        report.note(
            f"the manager's timeout, {timeout} s, is not longer than that of exec_path, "
            f"{own_timeout:g} s"
        )


# ----------------------------------------------------------------- the source that the manager uses

CREDENTIALS = struct.Struct("3i")  # what SO_PEERCRED gives: a process, its user and its group
# A line of /proc/net/unix: Num RefCount Protocol Flags Type St Inode Path
UNIX_SOCKET = re.compile(r"\S+: \S+ \S+ \S+ \S+ \S+ +([0-9]+) (.+)")


class UnknownSourceError(Exception):
    """The reason why nobody can tell which source the manager uses."""


def source_of_manager(home: str, request: KeyRequest) -> str:
    """Return the source from which the manager gets keys. Raises UnknownSourceError.

    The manager asks the server on its socket. If nobody listens there, the manager runs exec_path.
    """
    if request.paths["socket"]:
        try:
            return source_of_server(os.path.join(home, request.paths["socket"]))
        except OSError:
            if not request.paths["exec_path"]:
                raise UnknownSourceError("nobody listens on its socket") from None
    return source_of_command(home, split_command(request.paths["exec_path"]))


def source_of_command(home: str, words: "List[str]") -> str:
    """Return the source from which an exec_path gets keys. Raises UnknownSourceError."""
    if not is_of_this_program(words):
        raise UnknownSourceError(f"exec_path is not {NAME}.py")
    path = option_in(words, "--socket")
    asks_server = path != "" and "--serve" not in words
    if not asks_server:
        return source_from(home, option_in(words, "--db") or STORE)
    try:
        return source_of_server(os.path.join(home, path))
    except OSError:
        raise UnknownSourceError(f"nobody listens on {path}") from None


def source_from(directory: str, source: str) -> str:
    """Return the absolute name of a source. A relative path begins at `directory`."""
    if is_url(source):
        return source
    return os.path.join(directory, source)


def source_of_server(path: str) -> str:
    """Return the source of the server that listens on a socket.

    Raises OSError if nobody listens. Raises UnknownSourceError if another program listens.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        listener = process_behind(connection)
    peer, _user, _group = CREDENTIALS.unpack(credentials)
    # If systemd has passed the socket to the server, the peer is systemd. So look also at the other
    # processes that have the socket.
    for process in [peer, *processes_with_socket(path)]:
        words = [os.fsdecode(word) for word in read_proc(process, "cmdline")]
        if "--serve" in words and is_of_this_program(words):
            return source_of_process(process, words)
    raise UnknownSourceError(f"{listener}, listens on the socket")


def source_of_process(process: int, words: "List[str]") -> str:
    """Return the source of a running server. words: those of its command."""
    source = option_in(words, "--db") or variable_of_process(process, "AGENT_KEY_DB") or STORE
    try:
        directory = os.readlink(f"/proc/{process}/cwd")
    except OSError:  # The server has ended, or belongs to another user.
        directory = ""
    return source_from(directory, source)


def variable_of_process(process: int, name: str) -> str:
    """Return an environment variable of a process, "" if it is not set or not readable."""
    beginning = f"{name}="
    for variable in read_proc(process, "environ"):
        text = os.fsdecode(variable)
        if text.startswith(beginning):
            return text[len(beginning) :]
    return ""


def processes_with_socket(path: str) -> "Iterator[int]":
    """Yield the numbers of the processes that hold the socket at `path` open."""
    links = set()  # the texts of the links in /proc/PROCESS/fd that lead to the socket
    with open("/proc/net/unix", encoding="latin-1") as table:
        for line in table:
            match = UNIX_SOCKET.match(line)
            if match and os.path.realpath(match.group(2)) == os.path.realpath(path):
                links.add(f"socket:[{match.group(1)}]")
    processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    for process in sorted(processes):
        if has_open(process, links):
            yield process


def has_open(process: int, links: "Set[str]") -> bool:
    """Return True if one of the links in /proc/PROCESS/fd has one of these texts."""
    directory = f"/proc/{process}/fd"
    try:
        return any(os.readlink(f"{directory}/{name}") in links for name in os.listdir(directory))
    except OSError:  # The process has ended, or belongs to another user.
        return False


def read_proc(process: int, name: str) -> "List[bytes]":
    """Return the texts in a file such as /proc/PROCESS/cmdline, [] if it cannot be read.

    A NUL stands after each text.
    """
    try:
        with open(f"/proc/{process}/{name}", "rb") as file:
            return file.read().rstrip(b"\0").split(b"\0")
    except OSError:
        return []


# --------------------------------------------------------------------------- who is enrolled


def differences(record: "Record", other: "Record") -> str:
    """Return the names of the fields in which two records differ, such as `name and key`."""
    return " and ".join(field for field in FIELDS if record[field] != other[field])


def tell_who_is_enrolled(name: str, records: "Iterable[Record]", home: str, report: Report) -> None:
    """Report how many agents of a source are enrolled, and name the others.

    name: of the source. records: its agents.
    """
    enrolled = read_client_keys(home)
    same = 0
    different = []
    missing = []
    for record in records:
        present = enrolled.get(record["id"])
        if present is None:
            missing.append(f"{agent_of(record)}: not enrolled")
        elif present == record:
            same += 1
        else:
            fields = differences(record, present)
            different.append(f"{agent_of(record)}: enrolled with another {fields}")
    lines = different + missing
    for line in lines[:AGENTS_NAMED]:
        report.info(line)
    more = len(lines) - AGENTS_NAMED
    if more > 0:
        report.info(f"... and {plural(more, 'more agent')}")
    report.info(
        f"{name}: {same:,} enrolled, {len(missing):,} not, "
        f"{len(different):,} with another name, address or key"
    )


def records_of_store(store: "sqlite3.Connection") -> "Iterator[Record]":
    """Yield the records in a store that check_source() has filled."""
    for row in store.execute("SELECT id, name, ip, agent_key FROM agent ORDER BY rowid"):
        yield dict(zip(FIELDS, row))


def records_of_source(name: str, seconds: float) -> "Iterator[Record]":
    """Yield the valid records of a source. Raises SourceError or OSError."""
    with contextlib.closing(open_source(name, seconds)) as source:
        source.deadline = time.monotonic() + READING_SECONDS
        for _number, row in source.rows():
            record, faults = judge(row)
            if not faults:
                yield record


def is_same_source(name: str, other: str) -> bool:
    """Return True if two names lead to the same source."""
    if is_url(name) or is_url(other):
        return name == other
    return os.path.realpath(name) == os.path.realpath(other)


def check_manager(
    home: str, options: Options, report: Report, store: "Optional[sqlite3.Connection]"
) -> None:
    """Report why a manager does not enrol, and whom it has enrolled.

    store: the agents of --db, None if that source could not be read. Raises CommandError,
    SourceError, OSError or sqlite3.Error.
    """
    try:
        source = check_requests(home, report)
    except NotEnrollingError as error:
        report.error(str(error))
        source = options.db  # The agents are counted all the same.
    except UnknownSourceError as error:
        report.info(f"which source the manager uses is not known: {error}")
        source = options.db
    if not is_same_source(source, options.db):
        report.note(
            f"the manager uses another source than this check: {source} instead of {options.db}"
        )
        seconds = options.timeout or REQUEST_SECONDS
        tell_who_is_enrolled(source, records_of_source(source, seconds), home, report)
    elif store:
        tell_who_is_enrolled(options.db, records_of_store(store), home, report)


def check_requests(home: str, report: Report) -> str:
    """Ask as the manager asks, report what comes of it, and return the manager's source.

    Raises NotEnrollingError, UnknownSourceError, CommandError or OSError.
    """
    configuration = read_configuration(home, report)
    for text in configuration.notes:
        report.note(text)
    check_that_it_asks(configuration)
    check_that_it_enrols(configuration)
    tell_settings(configuration, report)
    ask_in_each_way(home, configuration, report)
    return source_of_manager(home, configuration.request)


# ------------------------------------------------------------------------------------- enrolling
# --enroll tells authd, through its own socket, each agent of a source that the manager lacks. It
# never changes an agent that the manager has.

ENROL_SECONDS = 30.0  # for one message to authd and its answer
REPLY_LIMIT = 65_536  # bytes of an answer
FRAME_LENGTH = struct.Struct("<I")  # the length that stands before each message and answer
HIGHEST_ERROR = 9_999  # authd's error numbers have four digits
REFUSALS = {
    9006: "the manager does not take its address",
    9007: "another agent has its address",
    9008: "another agent, or the manager, has its name",
    9012: "another agent has its id",
    9013: "the manager has no room for more",
    9017: "the manager does not take its name",
}
DUPLICATES = (9007, 9008, 9012)
NO_SUCH_AGENT = 9011
# --enroll ends at these errors, because authd would answer so for every other agent, too.
ENDING_ERRORS = {
    9015: "this manager is a worker of a cluster: run --enroll on its master",
    9016: "the master of this manager's cluster cannot be reached",
}
# This forbids authd to replace an older agent, whatever <force> of ossec.conf says. `enabled` alone
# decides. The other values have no effect here, but authd refuses a message that lacks one of them.
NO_FORCE = {
    "enabled": False,
    "key_mismatch": True,
    "disconnected_time": {"enabled": False, "value": "1h"},
    "after_registration_time": "1h",
}


class RefusalError(Exception):
    """An error with which authd answers a message about one agent. The text is for people."""

    def __init__(self, number: int) -> None:
        """Find the text for an error number."""
        super().__init__(REFUSALS.get(number, f"the manager says error {number}"))
        self.number = number


def ask_authd(home: str, function: str, arguments: "Dict[str, Any]") -> "Dict[str, Any]":
    """Send one message to authd, and return the data of its answer.

    Raises RefusalError for an error that concerns one agent. Raises CommandError for an error that
    concerns all agents, and if no answer comes in time or the answer is not like those of authd.
    """
    path = f"{home}/queue/sockets/auth"
    message = to_json({"function": function, "arguments": arguments}).encode("ascii")
    try:
        reply = parse_reply(exchange_frames(path, message))
    except OSError as error:
        raise CommandError(f"no manager at {path}: {error.strerror or error}") from None
    except ValueError:
        raise CommandError(f"{path} closed, or gave no answer that we understand") from None
    if reply.number in ENDING_ERRORS:
        raise CommandError(ENDING_ERRORS[reply.number])
    if reply.number != NO_ERROR:
        raise RefusalError(reply.number)
    return reply.data


class AuthdReply(NamedTuple):
    """An answer of authd."""

    number: int  # NO_ERROR or the number of an error
    data: "Dict[str, Any]"


def parse_reply(content: bytes) -> AuthdReply:
    """Return the answer in a frame of authd. Raises ValueError if there is none."""
    try:
        # Latin-1 decodes every byte. A stored name may have bytes beyond ASCII.
        reply = json.loads(content.decode("latin-1"))
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None
    if not isinstance(reply, dict):
        raise ValueError("the answer is no object")
    number: Any = reply.get("error")
    is_integer = type(number) is int  # isinstance() takes True for an integer.
    if not is_integer or not 0 <= number <= HIGHEST_ERROR:
        raise ValueError("the answer has no error number")
    data = reply.get("data", {})
    if not isinstance(data, dict):
        raise ValueError("the data in the answer is no object")
    return AuthdReply(number, data)


def exchange_frames(path: str, message: bytes) -> bytes:
    """Send a message to the socket at `path`, and return the answer.

    The length of the content, in four bytes, stands before a message and before an answer. Raises
    OSError if no answer comes in time, and ValueError if the answer is too long or not complete.
    """
    deadline = time.monotonic() + ENROL_SECONDS
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ENROL_SECONDS)
        connection.connect(path)
        connection.sendall(FRAME_LENGTH.pack(len(message)) + message)
        (length,) = FRAME_LENGTH.unpack(receive(connection, FRAME_LENGTH.size, deadline))
        if length > REPLY_LIMIT:
            raise ValueError("the answer is too long")
        return receive(connection, length, deadline)


def receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Return the next `size` bytes of a connection.

    Raises OSError if they do not come in time, and ValueError if the other side closes before.
    """
    content = b""
    while len(content) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise OSError(errno.ETIMEDOUT, "timed out")
        connection.settimeout(left)
        piece = connection.recv(size - len(content))
        if not piece:
            raise ValueError("the other side closed the connection")
        content += piece
    return content


class Enrolment:
    """One run of --enroll.

    home: of the manager. enrolled: the agents in its client.keys, by id. added: how many agents
    this run has enrolled.
    """

    def __init__(self, home: str, enrolled: "Dict[str, Record]") -> None:
        """Begin a run, which has added no agent yet."""
        self.home = home
        self.enrolled = enrolled
        self.added = 0

    def enroll(self, record: "Record") -> str:
        """Enrol an agent unless the manager has one with its id. Return what is wrong, or "".

        Raises CommandError.
        """
        # Look into client.keys first, because authd does not tell the length of a network.
        present = self.enrolled.get(record["id"])
        try:
            if present is None:
                present = self.find(record)
            if present is None:
                present = self.add(record)
        except RefusalError as refusal:
            return f"not enrolled: {refusal}"
        fields = differences(record, present)
        if fields:
            return f"enrolled with another {fields}, and left so"
        return ""

    def find(self, record: "Record") -> "Optional[Record]":
        """Return the agent that authd has under the id of a record, None if there is none.

        authd answers 10.1.0.0 for the network 10.1.0.0/24. So this method assumes that authd has
        the network of the record if the addresses are equal. The lengths may still differ. The
        next run finds such a difference in client.keys, which authd has written by then. Raises
        RefusalError or CommandError.
        """
        try:
            data = ask_authd(self.home, "get", {"id": record["id"]})
        except RefusalError as refusal:
            if refusal.number == NO_SUCH_AGENT:
                return None
            raise
        present, _faults = judge([data.get(field) for field in FIELDS])
        address, slash, _length = record["ip"].partition("/")
        if slash and present["ip"] == address:
            present["ip"] = record["ip"]
        return present

    def add(self, record: "Record") -> "Record":
        """Add an agent. Return the agent that the manager then has under this id.

        Usually this is the given agent. But another run of --enroll may have added an agent with
        this id a moment ago. Raises RefusalError or CommandError.
        """
        try:
            ask_authd(self.home, "add", {**record, "force": NO_FORCE})
        except RefusalError as refusal:
            if refusal.number not in DUPLICATES:
                raise
            present = self.find(record)
            if present is None:
                raise
            return present
        self.added += 1
        return record


def enroll(options: Options) -> int:
    """Add the agents that a manager lacks, and change none that it has. Return the exit status.

    Raises CommandError, RequestError or OSError.
    """
    home = home_of(options.manager)
    report = Report(2)
    seconds = options.timeout or REQUEST_SECONDS
    with contextlib.closing(open_source(options.db, seconds)) as source:
        enrolled = {}
        # A manager without agents has no client.keys yet. But a link that leads nowhere is an
        # error, and exists() would hide it.
        if os.path.lexists(f"{home}/etc/client.keys"):
            enrolled = read_client_keys(home)
        enrolment = Enrolment(home, enrolled)
        try:
            for number, record in records(source, report):
                problem = enrolment.enroll(record)
                if problem:
                    report.error(f"{place_of(source.unit, number, record['id'])}: {problem}")
        except CommandError as error:
            progress = f"{enrolment.added:,} enrolled before; the next run goes on"
            raise CommandError(f"{error} ({progress})") from None
    report.finish()
    if report.errors or options.verbose or os.isatty(2):
        agents = plural(report.agents, "agent")
        errors = plural(report.errors, "error")
        say(2, f"{options.db}: {agents}, {enrolment.added:,} enrolled now, {errors}")
    return 1 if report.errors else 0


# ----------------------------------------------------------------------------------- command line
# argparse reads the options. What it cannot know is checked here: which options go together.

COMMANDS = ("--serve", "--import", "--check", "--enroll")
A_REQUEST = "a request"
MOST_WORKERS = 1000  # for --workers
USAGE = """\
agent_key_request.py [--db SOURCE] [--timeout SECONDS] id AGENT_ID | ip ADDRESS
       agent_key_request.py --socket PATH id AGENT_ID | ip ADDRESS
       agent_key_request.py --serve | --import SOURCE | --check | --enroll [OPTION ...]
       agent_key_request.py --help | --version"""
DESCRIPTION = """\
Answers a Wazuh manager that asks for the key of an agent which it does not know. The answer is one
JSON object. Options stand before the request."""
EPILOG = f"""\
sources:
  FILE                      SQLite with a table or view agent(id, name, ip, agent_key), CSV with a
                            header id,name,ip,key, or a client.keys: the content decides
  FILE.sql                  an SQL script that makes such a table; it is loaded into memory
  mysql://USER@HOST/DATABASE, postgresql://USER@HOST/DATABASE
                            a table or view agent in MySQL, MariaDB or PostgreSQL

files:
  {STORE}
                            the store: the source if neither --db nor $AGENT_KEY_DB names one
  /run/agent-key-request/socket
                            where the server listens without --socket
  /var/ossec, /var/wazuh-manager
                            where --manager looks for the manager

exit status:
  0  a request was answered, also with an error; or a command did its work
  1  a command failed, or found an error
  2  the command line is wrong

examples:
  agent_key_request.py id 001
  agent_key_request.py --import /root/client.keys
  agent_key_request.py --check --manager
  agent_key_request.py --db /etc/agents.csv --serve --socket /run/agents/socket
"""


class OnceAction(argparse.Action):
    """Stores the value of an option and notes that the option was given. Twice is a mistake."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: "Any",
        option_string: "Optional[str]" = None,
    ) -> None:
        """Store the value. Raises UsageError."""
        name = self.option_strings[0]
        if name in namespace.given:
            raise UsageError(f"{name} is given twice")
        namespace.given.append(name)
        value = True if self.nargs == 0 else values
        setattr(namespace, self.dest, value)


class CommandLineParser(argparse.ArgumentParser):
    """Reads the command line. Its errors are one line, without the usage.

    value_names: for each option, what its value is called in --help, "" if it has none.
    commands_of: for each option, the commands that it goes with.
    """

    def __init__(self, **how: "Any") -> None:
        """Take what argparse takes."""
        super().__init__(**how)
        self.value_names: Dict[str, str] = {}
        self.commands_of: Dict[str, Sequence[str]] = {}

    def error(self, message: str) -> "NoReturn":
        """Raise UsageError with what argparse found out, in our words."""
        match = re.match(r"argument ([^ :]+): (.*)", message, re.DOTALL)
        if not match:
            raise UsageError(message)
        name = match.group(1)
        problem = match.group(2)
        if problem.startswith("expected"):
            problem = f"needs a value: {self.value_names[name]}"
        elif problem.startswith("ignored explicit argument"):
            problem = "takes no value"
        raise UsageError(f"{name} {problem}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes --help with one line for each option, 100 characters wide on any terminal."""

    def __init__(self, prog: str) -> None:
        """Set the widths."""
        super().__init__(prog, max_help_position=28, width=100)


class OptionGroup:
    """Options that go with the same commands. --help shows them together."""

    def __init__(self, parser: CommandLineParser, title: str, *commands: str) -> None:
        """Begin a group. commands: those of COMMANDS and A_REQUEST that its options go with."""
        self.parser = parser
        self.group = parser.add_argument_group(title)
        self.commands = commands

    def add(self, name: str, text: str, value: str = "", **how: "Any") -> None:
        """Add an option. value: what its value is called in --help, "" if it has none."""
        self.parser.value_names[name] = value
        self.parser.commands_of[name] = self.commands
        if value:
            how["metavar"] = value
        else:
            how["nargs"] = 0
        self.group.add_argument(name, action=OnceAction, help=text, **how)


def build_parser() -> CommandLineParser:
    """Return the parser, which also writes --help."""
    parser = CommandLineParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.color = False  # type: ignore[attr-defined]  # from Python 3.14 on, --help has colours
    parser.set_defaults(given=[])
    add_commands(parser)
    add_options(parser)
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def add_commands(parser: CommandLineParser) -> None:
    """Add the options that say what to do. They go with no other command."""
    commands = OptionGroup(parser, "commands")
    commands.add("--serve", "answer on a unix socket until SIGTERM or Ctrl-C")
    text = "replace the store that --db names with the agents in SOURCE (- is standard input)"
    commands.add("--import", text, "SOURCE", dest="import_source")
    text = "report on the source, on a server (--socket) and on the manager (--manager)"
    commands.add("--check", text)
    commands.add("--enroll", "add the agents in the source that the manager lacks")
    commands.add("--help", "print this text")
    commands.add("--version", "print the version and the checksum of this file")
    hidden = argparse.SUPPRESS
    commands.group.add_argument("-h", action="store_true", dest="help", help=hidden)
    commands.group.add_argument("-V", action="store_true", dest="version", help=hidden)


def add_options(parser: CommandLineParser) -> None:
    """Add the options that say how a request or a command does its work."""
    title = "for every command and every request"
    options = OptionGroup(parser, title, A_REQUEST, *COMMANDS)
    options.add("--db", "the key source, or the store for --import", "SOURCE")
    text = "time limit of a request (10; 5 for each request to --serve)"
    options.add("--timeout", text, "SECONDS", type=timeout_option)
    title = "for a request, --serve and --check"
    options = OptionGroup(parser, title, A_REQUEST, "--serve", "--check")
    options.add("--socket", "ask, run or check the server at this path", "PATH")
    options = OptionGroup(parser, "for --serve", "--serve")
    options.add("--mode", "mode of the socket (0600)", "MODE", type=mode_option)
    options.add("--group", "group of the socket", "NAME")
    options.add("--workers", "number of processes (8)", "NUMBER", type=workers_option)
    options = OptionGroup(parser, "for --import", "--import")
    options.add("--skip-invalid", "import the valid records, and list the others")
    options = OptionGroup(parser, "for --check and --enroll", "--check", "--enroll")
    options.add("--manager", "the directory of the manager", "HOME", nargs="?", const="")
    options = OptionGroup(parser, "for --check", "--check")
    options.add("--json", "print one JSON object")
    title = "for --serve, --import and --enroll"
    options = OptionGroup(parser, title, "--serve", "--import", "--enroll")
    options.add("-v", "tell more: every request, or a summary", dest="verbose")


def timeout_option(text: str) -> float:
    """Return the value of --timeout in seconds. Raises ArgumentTypeError."""
    seconds = seconds_in(text)
    if not seconds:
        raise argparse.ArgumentTypeError(
            f"needs a number, more than 0 and at most {LONGEST_TIMEOUT:g}"
        )
    return seconds


def workers_option(text: str) -> int:
    """Return the value of --workers. Raises ArgumentTypeError."""
    if not consists_of(text, DIGITS, 1, 4) or not 1 <= int(text) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"needs a number from 1 to {MOST_WORKERS}")
    return int(text)


def mode_option(text: str) -> int:
    """Return the value of --mode. Raises ArgumentTypeError."""
    if not re.match(r"0?[0-7]{3}\Z", text):
        raise argparse.ArgumentTypeError(
            "needs three digits from 0 to 7, and maybe a 0 before, as in 0660"
        )
    return int(text, 8)


class CommandLine(NamedTuple):
    """What the user asks for. command: one of COMMANDS, or A_REQUEST with its words."""

    command: str
    words: "List[str]"
    options: Options
    wants_help: bool = False
    wants_version: bool = False


def read_command_line(arguments: "Sequence[str]") -> CommandLine:
    """Return what the command line asks for. Raises UsageError."""
    parser = build_parser()
    values, unknown = parser.parse_known_args(list(arguments))
    if values.help or values.version:
        return CommandLine(
            command=A_REQUEST,
            words=[],
            options=Options(),
            wants_help=bool(values.help),
            wants_version=bool(values.version),
        )
    if unknown:
        raise UsageError(no_such_option(unknown[0], list(parser.value_names)))
    given: List[str] = values.given
    command = next((name for name in given if name in COMMANDS), A_REQUEST)
    for name in given:
        if name != command and command not in parser.commands_of[name]:
            raise UsageError(f"{name} does not go with {command}")
        value_name = parser.value_names[name]
        needs_value = value_name != "" and name != "--manager"
        if needs_value and getattr(values, dest_of(name)) == "":
            raise UsageError(f"{name} needs a value: {value_name}")
    if values.words and command != A_REQUEST:
        raise UsageError(unexpected_word(command, values.words[0]))
    options = Options(
        db=values.db or default_source(),
        given_db=values.db,
        timeout=values.timeout,
        socket=values.socket,
        mode=values.mode,
        group=values.group,
        workers=values.workers,
        verbose=bool(values.verbose),
        as_json=bool(values.json),
        import_source=values.import_source or "",
        skip_invalid=bool(values.skip_invalid),
        manager=values.manager,
    )
    return CommandLine(command, values.words, options)


def dest_of(name: str) -> str:
    """Return the attribute that argparse keeps an option in."""
    names = {"--import": "import_source", "-v": "verbose"}
    return names.get(name, name.lstrip("-").replace("-", "_"))


def no_such_option(argument: str, known: "List[str]") -> str:
    """Return the message for an option that does not exist, with the closest one that does."""
    name = argument.partition("=")[0]
    message = f"there is no option {name}"
    if missing_module:
        return message  # get_close_matches() was not imported.
    near = get_close_matches(name, known, 1)
    if near:
        return f"{message}: did you mean {near[0]}?"
    return message


def unexpected_word(command: str, word: str) -> str:
    """Return the message for a word that follows a command.

    The word is probably the source, as in `--check agents.csv`, which lacks --db.
    """
    if word in ("id", "ip"):
        return f"no request goes with {command}"
    return f"unexpected {word}; use --db {word}"


def hint_for(words: "List[str]") -> str:
    """Return what a person at a terminal may have meant by a request that makes no sense."""
    word = words[0] if words else ""
    if f"--{word}" in (*COMMANDS, "--help", "--version"):
        return f"did you mean --{word}?"
    if consists_of(word, DIGITS, 1, 8):
        return f"did you mean id {word}?"
    if "." in word or ":" in word:
        return f"did you mean ip {word}?"
    return "--help tells what it takes"


# ------------------------------------------------------------------------------------------- main


def request_by_argv(words: "List[str]", options: Options) -> None:
    """Answer a request that part one does not answer.

    This is a request to a database, an SQL script or a server, or one that makes no sense.
    """
    seconds = options.timeout or REQUEST_SECONDS
    if options.socket:
        os.write(1, ask_server(options.socket, words, seconds))
        return
    if is_url(options.db):
        # libpq prints warnings to stderr. The manager reads it together with stdout and would lose
        # the answer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answer_once(words, options.db, seconds)
    makes_sense = len(words) > 1 and words[0] in ("id", "ip")
    if not makes_sense and os.isatty(2):
        say(2, f"{NAME}: {hint_for(words)}")


def version_line() -> str:
    """Return the version and the checksum of this file. Raises OSError."""
    with open(__file__, "rb") as script:
        checksum = sha256(script.read()).hexdigest()
    return f"{NAME}.py {VERSION} sha256:{checksum}"


def run_command(line: CommandLine) -> int:
    """Do what the command line asks for, and return the exit status. Raises what went wrong."""
    if line.wants_help:
        os.write(1, build_parser().format_help().encode("ascii"))
        return 0
    if line.wants_version:
        say(1, version_line())
        return 0
    if missing_module:
        reason = without_module(missing_module)
        if line.command != A_REQUEST:
            raise CommandError(reason)
        answer_to_manager = Answer.of_error(RequestError(SOURCE_UNREADABLE, reason))
        os.write(1, answer_to_manager.line())
        return 0
    if line.command == A_REQUEST:
        request_by_argv(line.words, line.options)
        return 0
    commands = {"--serve": serve, "--import": import_agents, "--check": check, "--enroll": enroll}
    return commands[line.command](line.options)


def main(arguments: "Sequence[str]") -> int:
    """Do everything but a simple request, and return the exit status."""
    try:
        return run_command(read_command_line(arguments))
    except UsageError as mistake:
        message = f"{mistake} (see --help)"
        if not os.isatty(2):
            # The manager may have started this program, and it does not show what stderr gets.
            tell_syslog(is_error=True, text=message)
        status = 2
    except (RequestError, CommandError, OSError) as problem:
        message = message_of(problem)
        status = 1
    except Exception as error:
        message = message_of(error) if is_sqlite_error(error) else unforeseen(error).message
        status = 1
    say(2, f"{stderr_prefixes().error}{message}")
    return status


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
