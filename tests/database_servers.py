"""Throw-away MariaDB, MySQL and PostgreSQL servers for the tests.

MariaDB and PostgreSQL are the distribution's packages. Oracle's MySQL is what `.ci/mysql` fetches.
Each server lives in a folder of its own, below a watchdog, which is a process that runs `watch`.
When the tests end, however they end (SIGKILL, too), the watchdog's standard input ends. The
watchdog then ends every process of the server and removes the folder.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import glob
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

READER = "agent_reader"  # may SELECT from the table, as the README's GRANT has it
OWNER = "agent_owner"  # may do anything: the session itself must only read
PASSWORD = "c0rrecth0rse"  # must never show up anywhere
LIMIT = 60.0  # seconds for a start, on a busy machine
COLUMNS = "id VARCHAR(8), name VARCHAR(255), ip VARCHAR(64), agent_key VARCHAR(255)"
INDEXES = "CREATE INDEX agent_id ON agent (id); CREATE INDEX agent_ip ON agent (ip);"
prctl = ctypes.CDLL(None).prctl
PARENT_DEATH_SIGNAL, CHILD_SUBREAPER = 1, 36  # its options


# ------------------------------------------------------------------------------------ the watchdog


def descendants(pid: int) -> list[int]:
    """The processes below one; PostgreSQL's leave its session and its process group."""
    children: dict[int, list[int]] = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(path).read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.split("/")[2]))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def signal_below(pid: int, *numbers: int) -> None:
    """Send signals to every process below one."""
    for process in descendants(pid):
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def die_with_parent() -> None:
    """For preexec_fn: end this process when the thread that has started it ends."""
    prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def watch(folder: str, commands: list[list[str]], user: dict[str, Any]) -> None:
    """Run the COMMANDS one after the other, the last for as long as the tests want it.

    What comes on standard input until its end is `keep` if the folder is to stay.
    """
    prctl(CHILD_SUBREAPER, 1, 0, 0, 0)  # so that nobody below gets lost
    if not os.fork():
        die_with_parent()
        signal.signal(signal.SIGQUIT, lambda *_: None)  # it would take the server with it
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        for command in commands:
            if subprocess.run(command, preexec_fn=die_with_parent, check=False, **user).returncode:
                break
        Path("ended").touch()  # the log has why
        os._exit(0)
    kept = sys.stdin.read() == "keep"
    if not kept:  # PostgreSQL removes its shared memory if it may
        signal_below(os.getpid(), signal.SIGQUIT, signal.SIGCONT)
    limit = time.monotonic() + (0 if kept else 3)
    while descendants(os.getpid()):
        if time.monotonic() > limit:
            signal_below(os.getpid(), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


def watchdog(
    folder: str, commands: list[list[str]], user: dict[str, Any]
) -> subprocess.Popen[bytes]:
    """Start `watch`; it ends what it watches when this process ends, or closes its stdin."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import database_servers; "
        "database_servers.watch(*eval(sys.argv[2]))"
    )
    with open(folder + "/log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, os.path.dirname(__file__), repr((folder, commands, user))],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


# ------------------------------------------------------------------------------------- the servers


FETCHED_MYSQL = Path(__file__).resolve().parent.parent / ".mysql"


def find_program(name: str) -> str:
    """Where a program is, also where Debian has PostgreSQL's; "" if it is not there."""
    if name == "mysqld":  # the distribution's program of this name is MariaDB
        path = FETCHED_MYSQL / "usr/sbin/mysqld"
        return str(path) if path.exists() else ""
    folders = [os.defpath, "/usr/sbin:/sbin:/usr/local/sbin", os.environ.get("PATH", "")]
    folders += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    return shutil.which(name, path=":".join(folders)) or ""


def memory_folder() -> str | None:
    """Where files are in memory, if there is room: on a busy disk a start takes half a minute."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > 2**30 and os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None


def free_port() -> int:
    """A loopback TCP port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_private(path: str | Path, text: str) -> str:
    """Write a file that only its owner may read; gives its path."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    return str(path)


class Server:
    """What all kinds have in common: a folder, a process, and a table of agents."""

    kind = scheme = user = secrets_parameter = secrets_form = ""
    programs: tuple[str, ...] = ()

    def __init__(self) -> None:
        """Begin to make it; `ready` waits for it."""
        self.paths = {name: find_program(name) for name in self.programs}
        self.is_set_up = self.is_well = False
        self.watchdog: subprocess.Popen[bytes] | None = None
        self.kept: subprocess.Popen[bytes] | None = None  # a client: its start is what takes time
        # Not pytest's folder: that is private, and its name too long for a unix socket.
        self.folder = tempfile.mkdtemp(prefix="akr-", dir=memory_folder())
        atexit.register(self.end)
        self.data, self.port = self.folder + "/data", free_port()
        self.secrets = write_private(self.folder + "/secrets", self.secrets_form % PASSWORD)
        self.identity: dict[str, Any] = {}
        if os.geteuid() == 0:  # neither runs as root
            users = {entry.pw_name: entry for entry in pwd.getpwall()}
            entry = users.get(self.user) or users["nobody"]
            self.identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        os.chmod(self.folder, 0o755)
        self.has_tls = bool(find_program("openssl")) and self.make_certificates()
        self.start(*self.install())

    def make_certificates(self) -> bool:
        """ca.pem; wrong.pem, another CA of the same name; server.pem, for 127.0.0.1 only."""
        openssl, folder = find_program("openssl"), self.folder
        for name, more in (
            ("ca", []),
            ("wrong", []),
            (
                "server",
                [
                    "-CA",
                    folder + "/ca.pem",
                    "-CAkey",
                    folder + "/ca.key",
                    "-addext",
                    "subjectAltName=IP:127.0.0.1",
                ],
            ),
        ):
            subject = "/CN=127.0.0.1" if more else "/CN=Test CA"
            subprocess.run(
                [
                    openssl,
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    subject,
                    "-keyout",
                    f"{folder}/{name}.key",
                    "-out",
                    f"{folder}/{name}.pem",
                    *more,
                ],
                check=True,
                capture_output=True,
            )
        if self.identity:
            os.chown(folder + "/server.key", self.identity["user"], self.identity["group"])
        return True

    def install(self) -> list[list[str]]:
        """The commands that make the data folder."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """The command of the server."""
        raise NotImplementedError

    def setting_up(self) -> str:
        """The statements that make the database `wazuh` and the users."""
        raise NotImplementedError

    def client(self, database: str = "wazuh") -> list[str]:
        """The command of the client, as the administrator; it takes statements on stdin."""
        raise NotImplementedError

    # -- life

    def start(self, *before: list[str]) -> None:
        """Start the server, after some other commands."""
        Path(self.folder, "ended").unlink(missing_ok=True)
        self.watchdog = watchdog(self.folder, [*before, self.command()], self.identity)

    def answers(self) -> bool:
        """Whether the server takes statements; the first ones make what it needs."""
        statements = "SELECT 1;" if self.is_set_up else self.setting_up()
        done = subprocess.run(
            self.client(""), input=statements.encode(), capture_output=True, check=False
        )
        self.is_set_up |= not done.returncode
        return not done.returncode

    def ready(self) -> Server:
        """Bring it back from whatever a test did to it, and wait until it answers."""
        if self.is_well:
            return self
        if self.watchdog is None:
            self.start()
        self.thaw()
        limit = time.monotonic() + LIMIT
        while not self.answers():
            if time.monotonic() > limit or os.path.exists(self.folder + "/ended"):
                raise RuntimeError(Path(self.folder, "log").read_text(errors="replace")[-3000:])
            time.sleep(0.05)
        self.is_well = True
        return self

    def freeze(self) -> None:
        """SIGSTOP: connections open and stay open, and get no answer."""
        assert self.watchdog is not None
        self.is_well = False
        signal_below(self.watchdog.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: everything that was sent meanwhile is answered."""
        assert self.watchdog is not None
        signal_below(self.watchdog.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as when the machine goes away, and keep the data."""
        self.end(b"keep")

    def end(self, word: bytes = b"") -> None:
        """End it, and remove all of it."""
        self.is_well = False
        if self.kept is not None:
            self.kept.kill()
            self.kept.communicate()
            self.kept = None
        if self.watchdog is not None:
            self.watchdog.communicate(word)
            self.watchdog = None
        if not word:
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- the table

    def sql(self, statements: str) -> str:
        """Run statements as the administrator; gives what the client printed."""
        if self.kept is None:
            with open(self.folder + "/client", "wb") as errors:
                self.kept = subprocess.Popen(
                    self.client(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
                )
        assert self.kept.stdin is not None and self.kept.stdout is not None
        end, printed = b"that is all\n", b""
        self.kept.stdin.write(
            f"{statements.rstrip().rstrip(';')};\n".encode() + b"SELECT '%s';\n" % end.strip()
        )
        self.kept.stdin.flush()
        while not printed.endswith(end):
            assert select.select([self.kept.stdout], [], [], LIMIT)[0], "no answer in time"
            piece = os.read(self.kept.stdout.fileno(), 1 << 16)
            assert piece, Path(self.folder, "client").read_text()  # it ends at the first error
            printed += piece
        return printed[: -len(end)].decode()

    def load(
        self, rows: Sequence[Sequence[Any]], columns: str = COLUMNS, indexes: str = INDEXES
    ) -> None:
        """Put a table `agent` with these rows of id, name, ip and key in the place of any other."""
        tuples = [", ".join(map(self.literal, row)) for row in rows]
        values = ", ".join(f"({each})" for each in tuples)
        insert = f"INSERT INTO agent (id, name, ip, agent_key) VALUES {values};" if rows else ""
        self.sql(
            f"{self.dropping()} CREATE TABLE agent ({columns}); {insert} {indexes}{self.granting()}"
        )

    def view(self, select: str, functions: str = "") -> None:
        """Put a view in the place of the table, which is called `host` from now on."""
        self.sql(
            f"ALTER TABLE agent RENAME TO host; {functions} CREATE VIEW agent AS {select};"
            f"{self.granting()}"
        )

    def literal(self, value: object) -> str:
        """A value as an SQL literal."""
        if value is None or isinstance(value, int):
            return "NULL" if value is None else str(value)
        text = self.escape(str(value)).replace("'", "''")
        return f"'{text}'"

    def escape(self, text: str) -> str:
        """A text with what only this kind of server escapes."""
        return text

    def dropping(self) -> str:
        """The statements that drop the table or view `agent`, and all that tests make beside it."""
        raise NotImplementedError

    def granting(self) -> str:
        """The statement that lets the reader SELECT from the table, and nothing more."""
        return f"GRANT SELECT ON agent TO {READER};"

    @contextlib.contextmanager
    def locked_table(self, statements: str = "") -> Iterator[None]:
        """Hold a lock on the table: the server is well, and a query waits for ever."""
        client = subprocess.Popen(self.client(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdin is not None and client.stdout is not None
        try:
            client.stdin.write(statements.encode() + b"SELECT 'locked';\n")
            client.stdin.flush()
            assert b"locked" in client.stdout.readline()
            yield
        finally:
            client.kill()
            client.communicate()

    # -- the URLs

    def url(
        self,
        user: str = READER,
        host: str = "127.0.0.1",
        port: int = 0,
        database: str = "wazuh",
        **parameters: str,
    ) -> str:
        """A URL, with the reader's password file unless other PARAMETERS say otherwise."""
        parameters.setdefault(self.secrets_parameter, self.secrets)
        tail = "&".join(f"{name}={value}" for name, value in parameters.items() if value)
        return f"{self.scheme}://{user}@{host}:{port or self.port}/{database}?{tail}"

    def url_with_secrets(self, path: str | Path) -> str:
        """A URL with another password file."""
        return self.url().replace(self.secrets, str(path))

    def socket_url(self) -> str:
        """The same over the unix socket."""
        raise NotImplementedError


class MariaDB(Server):
    """A mariadbd."""

    kind, scheme, user, secrets_parameter = "mariadb", "mysql", "mysql", "read_default_file"
    secrets_form = "[client]\npassword = %s\n"
    programs: tuple[str, ...] = ("mariadbd", "mariadb-install-db", "mariadb")

    def install(self) -> list[list[str]]:
        """The commands that make the data folder."""
        return [
            [
                self.paths["mariadb-install-db"],
                "--no-defaults",
                "--datadir=" + self.data,
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--skip-name-resolve",
                "--skip-log-bin",
            ]
        ]

    def command(self) -> list[str]:
        """The command of the server."""
        return [self.paths["mariadbd"], "--no-defaults", *self.settings()]

    def settings(self) -> list[str]:
        """The options that MariaDB and MySQL have in common."""
        tls = [
            f"--ssl-{name}={self.folder}/{file}"
            for name, file in (("ca", "ca.pem"), ("cert", "server.pem"), ("key", "server.key"))
        ]
        return [
            "--datadir=" + self.data,
            f"--socket={self.folder}/sock",
            f"--pid-file={self.folder}/pid",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=16M",
            *(tls if self.has_tls else ()),
        ]

    def setting_up(self) -> str:
        """The statements that make the database and the users."""
        return "CREATE DATABASE wazuh CHARACTER SET utf8mb4;" + "".join(
            f"CREATE USER {user} IDENTIFIED BY '{PASSWORD}'; GRANT {rights} ON *.* TO {user};"
            for user, rights in ((OWNER, "ALL"), (READER, "USAGE"))
        )

    def client(self, database: str = "wazuh") -> list[str]:
        """The command of the client."""
        return [
            self.paths["mariadb"],
            "--no-defaults",
            "--user=root",
            "--batch",
            "--unbuffered",
            "--skip-column-names",
            f"--socket={self.folder}/sock",
            *filter(None, [database]),
        ]

    def escape(self, text: str) -> str:
        """A text with what only MySQL escapes."""
        return text.replace("\\", "\\\\")

    def dropping(self) -> str:
        """The statements that drop what there is."""
        return (
            "DROP VIEW IF EXISTS agent; DROP TABLE IF EXISTS agent, host, witness;"
            "DROP FUNCTION IF EXISTS odd;"
        )

    @contextlib.contextmanager
    def locked_table(self, statements: str = "LOCK TABLES agent WRITE;\n") -> Iterator[None]:
        """Hold a lock on the table."""
        with super().locked_table(statements):
            yield

    def socket_url(self) -> str:
        """A URL over the unix socket."""
        return self.url(host="localhost", unix_socket=self.folder + "/sock")


class MySQL(MariaDB):
    """Oracle's mysqld, with the libraries that came with it; MariaDB's client administers it."""

    kind = "mysql"
    programs = ("mysqld", "mariadb")

    def __init__(self) -> None:
        """Begin to make it as the user who runs the tests: only he may read the checkout."""
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        super().__init__()

    def mysqld(self) -> list[str]:
        """The command of the server, up to where it finds its own files."""
        usr = FETCHED_MYSQL / "usr"
        (loader,) = usr.glob("lib/*/ld-linux*")
        libraries = f"{loader.parent}:{loader.parent}/private"
        return [
            *(str(loader), "--library-path", libraries, self.paths["mysqld"]),
            *("--no-defaults", f"--user={self.user}", f"--basedir={usr}"),
            *(f"--lc-messages-dir={usr}/share/mysql", f"--plugin-dir={usr}/lib/mysql/plugin"),
            f"--character-sets-dir={usr}/share/mysql/charsets",
        ]

    def install(self) -> list[list[str]]:
        """The commands that make the data folder."""
        small = ["--initialize-insecure", "--innodb-redo-log-capacity=8M"]
        return [[*self.mysqld(), *small, "--datadir=" + self.data]]

    def command(self) -> list[str]:
        """The command of the server; EXPLAIN prints a table, as MariaDB's does."""
        own = ["--mysqlx=OFF", "--skip-log-bin", "--secure-file-priv=NULL"]
        return [*self.mysqld(), *own, "--explain-format=TRADITIONAL", *self.settings()]


class PostgreSQL(Server):
    """A postgres with its processes."""

    kind, scheme, user, secrets_parameter = "postgresql", "postgresql", "postgres", "passfile"
    secrets_form = "*:*:*:*:%s\n"
    programs = ("postgres", "initdb", "psql")

    def install(self) -> list[list[str]]:
        """The commands that make the data folder."""
        return [
            [
                self.paths["initdb"],
                "--pgdata=" + self.data,
                "--username=root",
                "--no-sync",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
            ]
        ]

    def command(self) -> list[str]:
        """The command of the server."""
        settings = ["shared_buffers=16MB", "fsync=off"]
        if self.has_tls:
            settings += [
                "ssl=on",
                f"ssl_cert_file={self.folder}/server.pem",
                f"ssl_key_file={self.folder}/server.key",
            ]
        return [
            self.paths["postgres"],
            "-D",
            self.data,
            "-k",
            self.folder,
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            *(word for setting in settings for word in ("-c", setting)),
        ]

    def setting_up(self) -> str:
        """The statements that make the database and the users."""
        return "CREATE DATABASE wazuh;" + "".join(
            f"CREATE ROLE {user} LOGIN {rights} PASSWORD '{PASSWORD}';"
            for user, rights in ((OWNER, "SUPERUSER"), (READER, ""))
        )

    def client(self, database: str = "wazuh") -> list[str]:
        """The command of the client."""
        return [
            self.paths["psql"],
            "--no-psqlrc",
            "--quiet",
            "--no-align",
            "--tuples-only",
            "--set=ON_ERROR_STOP=1",
            "--username=root",
            "--file=-",
            "--host=" + self.folder,
            f"--port={self.port}",
            "--dbname=" + (database or "postgres"),
        ]

    def dropping(self) -> str:
        """The statements that drop what there is."""
        return (
            f"DROP SCHEMA public CASCADE; CREATE SCHEMA public;"
            f"GRANT USAGE ON SCHEMA public TO {READER};"
        )

    @contextlib.contextmanager
    def locked_table(self, statements: str = "BEGIN; LOCK TABLE agent;\n") -> Iterator[None]:
        """Hold a lock on the table."""
        with super().locked_table(statements):
            yield

    def socket_url(self) -> str:
        """A URL over the unix socket."""
        return self.url(host="", port=self.port).replace(f"@:{self.port}", "@") + (
            f"&host={self.folder}&port={self.port}"
        )


KINDS: dict[str, type[Server]] = {"mariadb": MariaDB, "mysql": MySQL, "postgresql": PostgreSQL}


@functools.cache
def missing(kind: str) -> str:
    """What is missing for a kind of server; "" if nothing is."""
    names = [name for name in KINDS[kind].programs if not find_program(name)]
    return ", ".join("mysqld (run .ci/mysql)" if name == "mysqld" else name for name in names)


@functools.cache
def begun() -> dict[str, Server]:
    """The servers, which start at the same time."""
    return {kind: make() for kind, make in KINDS.items() if not missing(kind)}


def running(kind: str) -> Server:
    """The one server of a kind, ready; nothing may be `missing` for it."""
    return begun()[kind].ready()


# ------------------------------------------------------------------------------------- the drivers

DRIVERS = {
    "mysql": ("pymysql", "MySQLdb", "mysql.connector"),
    "postgresql": ("psycopg", "psycopg2"),
}


@functools.cache
def driver_folders(python: str) -> tuple[str, ...]:
    """The folders of the site-packages that an interpreter has, without a user's."""
    code = "import site; print(*site.getsitepackages(), sep='\\n')"
    run = subprocess.run([python, "-IS", "-c", code], capture_output=True, text=True, check=True)
    return tuple(run.stdout.split())


@functools.cache
def has_driver(python: str, name: str) -> bool:
    """Whether an interpreter's own site-packages hold a driver that can be imported."""
    code = "import sys; sys.path += sys.argv[2:]; __import__(sys.argv[1])"
    return not subprocess.run(
        [python, "-IS", "-c", code, name, *driver_folders(python)], capture_output=True, check=False
    ).returncode


def lone_python(python: str, folder: Path, driver: str) -> Path:
    """An installation of Python in FOLDER whose site-packages have this driver and no other.

    The interpreter is a copy, and its library links to the original's: a host with one package.
    """
    code = "import os, sys; print(os.path.dirname(os.__file__)); print(sys.executable)"
    library, program = subprocess.run(
        [python, "-IS", "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (folder / "bin").mkdir(parents=True)
    copy = Path(shutil.copy(os.path.realpath(program), folder / "bin" / "python3"))
    inside = folder / "lib" / os.path.basename(library)
    inside.mkdir(parents=True)
    for name in os.listdir(library):
        if name not in ("site-packages", "dist-packages"):
            (inside / name).symlink_to(os.path.join(library, name))
    packages = Path(driver_folders(str(copy))[0])
    assert folder in packages.parents, packages
    packages.mkdir(parents=True)
    hidden = {name.split(".")[0] for names in DRIVERS.values() for name in names if name != driver}
    for place in driver_folders(python):
        for entry in Path(place).iterdir() if os.path.isdir(place) else ():
            wanted = entry.name not in hidden and entry.suffix not in (".pth", ".pyc")
            if wanted and not (packages / entry.name).is_symlink():
                (packages / entry.name).symlink_to(entry)
    return copy
