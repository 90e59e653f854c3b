"""Real MariaDB and PostgreSQL servers for the tests, from the packages of the distribution.

Each lives in a temporary folder of its own, listens on a unix socket in it and on a free
loopback port, and runs as an unprivileged user. It can be killed, frozen and started again.
Nothing here depends on where the programs are: they are looked up.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

READER = "agent_reader"  # may SELECT from the table, as the README's GRANT has it
OWNER = "agent_owner"  # may do anything: the session itself must be read-only
PASSWORD = "cOrrect/h0rse@9"  # has letters that a URL must escape; must never show up anywhere
ADMINISTRATOR = "administrators-own"
START_LIMIT = 60.0  # seconds; a killed server recovers before it answers

# Wider than in the documentation: IPv6 and dotted netmasks do not fit into 19 characters.
WIDE_COLUMNS = (
    "id VARCHAR(8), name VARCHAR(255), ip VARCHAR(64), agent_key VARCHAR(255)"
)
PLAIN_INDEXES = ("CREATE INDEX agent_id ON agent (id)", "CREATE INDEX agent_ip ON agent (ip)")
DRIVERS = {
    "mysql": ("pymysql", "MySQLdb", "mysql.connector"),
    "postgresql": ("psycopg", "psycopg2"),
}

Row = Sequence[Any]


# -------------------------------------------------------------------------------- the programs


def find_program(name: str, *patterns: str) -> str | None:
    """Look a program up in PATH, in the folders for administrators, by the glob patterns."""
    for where in (None, "/usr/local/sbin:/usr/sbin:/sbin"):
        found = shutil.which(name, path=where)
        if found:
            return found
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern), reverse=True)]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def find_postgresql(name: str) -> str | None:
    """Look up a program of the PostgreSQL server; Debian keeps those out of PATH."""
    patterns = ["/usr/lib/postgresql/*/bin/" + name]
    if shutil.which("pg_config"):
        run = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True)
        patterns.insert(0, os.path.join(run.stdout.strip(), name))
    return find_program(name, *patterns)


def start_mariadb() -> tuple[MariaDB | None, str]:
    """Give a running MariaDB and "", or None and why there is none."""
    names = ("mariadbd", "mariadb-install-db", "mariadb")
    programs = {name: find_program(name) for name in names}
    return (None, missing(programs)) if missing(programs) else (MariaDB(programs), "")


def start_postgresql() -> tuple[PostgreSQL | None, str]:
    """Give a running PostgreSQL and "", or None and why there is none."""
    programs = {name: find_postgresql(name) for name in ("postgres", "initdb", "psql")}
    return (None, missing(programs)) if missing(programs) else (PostgreSQL(programs), "")


def missing(programs: Mapping[str, str | None]) -> str:
    """Say which programs are not there; "" if all are."""
    names = [name for name, path in programs.items() if path is None]
    return "not installed: " + ", ".join(names) if names else ""


# ---------------------------------------------------------------------------------- the servers


class Server:
    """What both kinds have in common: a folder, a process, and a table of agents."""

    scheme = ""
    user = ""  # who the server runs as, where the tests run as root

    def __init__(self, programs: Mapping[str, str | None]) -> None:
        """Make the data folder, start the server, and make the database `wazuh` in it."""
        self.programs = {name: str(path) for name, path in programs.items()}
        self.account = unprivileged(self.user)
        # Not pytest's own folder: it is private to root, and its name too long for a socket.
        self.folder = tempfile.mkdtemp(prefix="akr-")
        os.chmod(self.folder, 0o755)
        self.give(self.folder)
        self.data = os.path.join(self.folder, "data")
        self.log = os.path.join(self.folder, "log")
        self.secrets = os.path.join(self.folder, "secrets")  # the reader's password file
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.install()
            self.start()
            self.set_up()
        except subprocess.CalledProcessError as error:
            self.remove()
            raise RuntimeError(f"{error}: {error.stdout!r} {error.stderr!r}") from None
        except BaseException:
            self.remove()
            raise
        self.write_secrets(self.secrets)

    def give(self, path: str) -> None:
        """Make the server's user the owner of PATH."""
        if self.account:
            os.chown(path, self.account["user"], self.account["group"])

    def install(self) -> None:
        """Make the data folder."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """Give the command line of the server."""
        raise NotImplementedError

    def set_up(self) -> None:
        """Make the database and the users."""
        raise NotImplementedError

    def sql(self, statements: str, database: str = "wazuh") -> str:
        """Run statements as the administrator; gives what the client printed."""
        raise NotImplementedError

    # -- life

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **self.account,
            )
        limit = time.monotonic() + START_LIMIT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(Path(self.log).read_text(errors="replace")[-3000:])
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether the server takes a statement."""
        try:
            self.sql("SELECT 1", database="")
        except subprocess.CalledProcessError:
            return False
        return True

    def running(self) -> bool:
        """Whether the server's process is there."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> list[int]:
        """Send a signal to every process of the server; gives their ids."""
        assert self.process is not None
        family = [self.process.pid, *descendants(self.process.pid)]
        for pid in family:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return family

    def kill(self) -> None:
        """End it as when the machine goes away: kill -9 of every process."""
        assert self.process is not None
        family = self.signal(signal.SIGKILL)
        self.process.wait()
        while any(os.path.exists(f"/proc/{pid}") for pid in family):
            time.sleep(0.01)

    def freeze(self) -> None:
        """SIGSTOP: connections open and stay open, and get no answer."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: everything that was sent meanwhile is answered."""
        self.signal(signal.SIGCONT)

    def make_healthy(self) -> None:
        """Bring it back from whatever a test did to it."""
        if self.running():
            self.thaw()
        else:
            self.start()

    def remove(self) -> None:
        """End the server and take its folder away."""
        if self.running():
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the table

    def load(
        self,
        rows: Sequence[Row],
        columns: str = WIDE_COLUMNS,
        indexes: Sequence[str] = PLAIN_INDEXES,
    ) -> None:
        """Put a table `agent` with these rows of id, name, ip and key in the place of any other."""
        self.drop()
        self.sql(f"CREATE TABLE agent ({columns})")
        self.insert(rows)
        for statement in indexes:
            self.sql(statement)
        self.grant()
        self.analyze()

    def drop(self) -> None:
        """Remove the table or view `agent`, if there is one, and the table `host` behind a view."""
        kind = self.sql("SELECT table_type FROM information_schema.tables"
                        " WHERE table_name = 'agent'").strip()
        if kind:
            self.sql("DROP %s agent" % ("VIEW" if kind.endswith("VIEW") else "TABLE"))
        self.sql("DROP TABLE IF EXISTS host")

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows to the table."""
        for start in range(0, len(rows), 5000):
            values = ",\n".join(
                f"({', '.join(map(self.literal, row))})" for row in rows[start : start + 5000]
            )
            self.sql(f"INSERT INTO agent (id, name, ip, agent_key) VALUES {values}")

    def literal(self, value: object) -> str:
        """Write a value as an SQL literal."""
        if value is None:
            return "NULL"
        if isinstance(value, bytes):
            return self.binary(value)
        return str(value) if isinstance(value, int) else self.text(str(value))

    def text(self, value: str) -> str:
        """Write a text as an SQL literal."""
        raise NotImplementedError

    def binary(self, value: bytes) -> str:
        """Write bytes as an SQL literal."""
        raise NotImplementedError

    def grant(self) -> None:
        """Let the reader SELECT from the table, and nothing more."""
        raise NotImplementedError

    def analyze(self) -> None:
        """Let the planner know the table."""
        raise NotImplementedError

    # -- what the clients did

    def rows_read(self) -> int:
        """Count the rows and index entries that were read so far."""
        raise NotImplementedError

    def connections(self) -> set[int]:
        """Give the ids of the connections that the reader has now."""
        raise NotImplementedError

    def cut_connections(self) -> None:
        """End the reader's connections, as a fail-over or an idle time-out does."""
        raise NotImplementedError

    def locking(self) -> tuple[list[str], str]:
        """Give a client's command line, and statements that lock the table and tell `locked`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def locked_table(self) -> Iterator[None]:
        """Hold a lock on the table: the server is well, and a query waits for ever."""
        command, statements = self.locking()
        client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        assert client.stdin is not None and client.stdout is not None
        try:
            client.stdin.write(statements)
            client.stdin.flush()
            while "locked" not in (line := client.stdout.readline()):
                assert line, "the client has ended"
            yield
        finally:
            client.kill()
            client.communicate()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the administrator's client."""
        return {**os.environ, "PGPASSWORD": ADMINISTRATOR, "PGCLIENTENCODING": "UTF8"}

    # -- the URLs

    def write_secrets(self, path: str, password: str = PASSWORD) -> None:
        """Write a password file as the clients of this server know it, mode 0600."""
        raise NotImplementedError

    def url(
        self,
        user: str = READER,
        password: str = "",
        host: str = "",
        port: int = 0,
        database: str = "wazuh",
        parameters: Mapping[str, str] | None = None,
    ) -> str:
        """Give a URL: over the unix socket, or over TCP where HOST is given.

        Where no password is in it, the reader's password file is; more query PARAMETERS may follow.
        """
        query = {} if host else self.socket_parameters()
        if not password:
            query[self.secrets_parameter] = self.secrets
        query.update(parameters or {})
        account = user + (":" + quote(password, safe="") if password else "")
        place = f"{host}:{port or self.port}" if host else self.socket_host
        tail = "&".join(f"{name}={value}" for name, value in query.items() if value)
        return f"{self.scheme}://{account}@{place}/{database}" + ("?" + tail if tail else "")

    secrets_parameter = ""
    socket_host = ""

    def socket_parameters(self) -> dict[str, str]:
        """Give the query parameters that lead to the unix socket."""
        raise NotImplementedError


class MariaDB(Server):
    """A mariadbd."""

    scheme = "mysql"
    user = "mysql"
    secrets_parameter = "read_default_file"
    socket_host = "localhost"

    @property
    def socket(self) -> str:
        """The unix socket."""
        return os.path.join(self.folder, "sock")

    def install(self) -> None:
        """Make the data folder."""
        subprocess.run(
            [
                self.programs["mariadb-install-db"],
                "--no-defaults",
                "--datadir=" + self.data,
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--skip-name-resolve",
            ],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self.account,
        )

    def command(self) -> list[str]:
        """Give the command line of the server."""
        return [
            self.programs["mariadbd"],
            "--no-defaults",
            "--datadir=" + self.data,
            "--socket=" + self.socket,
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            "--pid-file=" + os.path.join(self.folder, "pid"),
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M",
        ]

    def set_up(self) -> None:
        """Make the database and the users."""
        self.sql("CREATE DATABASE wazuh CHARACTER SET utf8mb4", database="")
        for user, rights in ((OWNER, "ALL"), (READER, "USAGE")):
            self.sql(f"CREATE USER '{user}'@'%' IDENTIFIED BY '{PASSWORD}';"
                     f"GRANT {rights} ON *.* TO '{user}'@'%'", database="")

    def client(self, *options: str, database: str = "wazuh") -> list[str]:
        """Give the command line of the mariadb client, as the administrator."""
        command = [self.programs["mariadb"], "--no-defaults", "--user=root"]
        return [*command, "--socket=" + self.socket, *options, *filter(None, [database])]

    def sql(self, statements: str, database: str = "wazuh") -> str:
        """Run statements as the administrator; gives what the client printed."""
        return subprocess.run(
            self.client("--batch", "--skip-column-names", database=database),
            check=True,
            input=statements,
            capture_output=True,
            text=True,
            timeout=START_LIMIT,
        ).stdout

    def locking(self) -> tuple[list[str], str]:
        """Give a client's command line, and statements that lock the table and tell `locked`."""
        options = ("--batch", "--unbuffered", "--skip-column-names")
        return self.client(*options), "LOCK TABLES agent WRITE;\nSELECT 'locked';\n"

    def text(self, value: str) -> str:
        """Write a text as an SQL literal."""
        escaped = value.replace("\\", "\\\\").replace("'", "''")
        return f"'{escaped}'"

    def binary(self, value: bytes) -> str:
        """Write bytes as an SQL literal."""
        return f"X'{value.hex()}'"

    def grant(self) -> None:
        """Let the reader SELECT from the table, and nothing more."""
        self.sql(f"GRANT SELECT ON wazuh.agent TO '{READER}'@'%'")

    def analyze(self) -> None:
        """Let the planner know the table."""
        self.sql("ANALYZE TABLE agent")

    def rows_read(self) -> int:
        """Count the rows and index entries that were read so far, of all tables."""
        table = self.sql("SHOW GLOBAL STATUS LIKE 'Handler_read%'")
        return sum(map(int, re.findall(r"\t(\d+)", table)))

    def connections(self) -> set[int]:
        """Give the ids of the connections that the reader has now."""
        ids = self.sql(f"SELECT id FROM information_schema.processlist WHERE user = '{READER}'")
        return set(map(int, ids.split()))

    def cut_connections(self) -> None:
        """End the reader's connections."""
        self.sql(f"KILL USER {READER}")

    def write_secrets(self, path: str, password: str = PASSWORD) -> None:
        """Write an option file."""
        write_private(path, f"[client]\npassword = {password}\n")

    def socket_parameters(self) -> dict[str, str]:
        """Give the query parameters that lead to the unix socket."""
        return {"unix_socket": self.socket}


class PostgreSQL(Server):
    """A postgres with its processes."""

    scheme = "postgresql"
    user = "postgres"
    secrets_parameter = "passfile"

    def install(self) -> None:
        """Make the data folder."""
        password_file = os.path.join(self.folder, "administrator")
        write_private(password_file, ADMINISTRATOR + "\n")
        self.give(password_file)
        subprocess.run(
            [
                self.programs["initdb"],
                "--pgdata=" + self.data,
                "--username=root",
                "--auth=scram-sha-256",
                "--pwfile=" + password_file,
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C",
            ],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self.account,
        )

    def command(self) -> list[str]:
        """Give the command line of the server."""
        settings = ("log_min_messages=fatal", "shared_buffers=64MB")
        return [
            self.programs["postgres"],
            *("-D", self.data, "-k", self.folder, "-h", "127.0.0.1", "-p", str(self.port)),
            *(word for setting in settings for word in ("-c", setting)),
        ]

    def set_up(self) -> None:
        """Make the database, with a linguistic collation as installations have it, and the users.

        Text then does not sort like bytes: '10.1' and '101' are compared as a dictionary would.
        """
        self.sql("CREATE DATABASE wazuh TEMPLATE template0"
                 " LOCALE_PROVIDER icu ICU_LOCALE 'en-US'", database="")
        for user, rights in ((OWNER, "SUPERUSER"), (READER, "NOSUPERUSER")):
            self.sql(f"CREATE ROLE {user} LOGIN {rights} PASSWORD '{PASSWORD}'")

    def sql(self, statements: str, database: str = "wazuh") -> str:
        """Run statements as the administrator; gives what the client printed."""
        return subprocess.run(
            self.client(database=database),
            check=True,
            input=statements,
            capture_output=True,
            text=True,
            timeout=START_LIMIT,
            env=self.environment,
        ).stdout

    def client(self, database: str = "wazuh") -> list[str]:
        """Give the command line of psql, as the administrator."""
        return [
            self.programs["psql"],
            *("--no-psqlrc", "--quiet", "--no-align", "--tuples-only"),
            *("--set=ON_ERROR_STOP=1", "--username=root", "--file=-"),
            *("--host=" + self.folder, f"--port={self.port}"),
            "--dbname=" + (database or "postgres"),
        ]

    def locking(self) -> tuple[list[str], str]:
        """Give a client's command line, and statements that lock the table and tell `locked`."""
        return self.client(), "BEGIN;\nLOCK TABLE agent;\nSELECT 'locked';\n"

    def text(self, value: str) -> str:
        """Write a text as an SQL literal."""
        escaped = value.replace("'", "''")
        return f"'{escaped}'"

    def binary(self, value: bytes) -> str:
        """Write bytes as an SQL literal."""
        return rf"'\x{value.hex()}'"

    def grant(self) -> None:
        """Let the reader SELECT from the table, and nothing more."""
        self.sql(f"GRANT SELECT ON agent TO {READER}")

    def analyze(self) -> None:
        """Let the planner know the table."""
        self.sql("VACUUM ANALYZE agent")

    def rows_read(self) -> int:
        """Count the rows and index entries of the table that were read so far."""
        return int(self.sql(
            "SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) + coalesce("
            "(SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'agent'), 0)"
            " FROM pg_stat_user_tables WHERE relname = 'agent'"))

    def connections(self) -> set[int]:
        """Give the ids of the connections that the reader has now."""
        ids = self.sql(f"SELECT pid FROM pg_stat_activity WHERE usename = '{READER}'")
        return set(map(int, ids.split()))

    def cut_connections(self) -> None:
        """End the reader's connections."""
        self.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                 f" WHERE usename = '{READER}'")

    def write_secrets(self, path: str, password: str = PASSWORD) -> None:
        """Write a .pgpass."""
        write_private(path, f"*:*:*:*:{password}\n")

    def socket_parameters(self) -> dict[str, str]:
        """Give the query parameters that lead to the unix socket."""
        return {"host": self.folder, "port": str(self.port)}


# ------------------------------------------------------------------------------- the drivers


@functools.cache
def driver_folders(python: str) -> tuple[str, ...]:
    """Give the folders of the site-packages that an interpreter has, without a user's."""
    code = "import site; print(*site.getsitepackages(), sep='\\n')"
    run = subprocess.run([python, "-IS", "-c", code], capture_output=True, text=True, check=True)
    return tuple(run.stdout.split())


def has_driver(python: str, name: str) -> bool:
    """Whether an interpreter's own site-packages hold a driver that can be imported."""
    code = "import sys; sys.path += sys.argv[2:]; __import__(sys.argv[1])"
    command = [python, "-IS", "-c", code, name, *driver_folders(python)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def lone_python(python: str, folder: Path, drivers: Sequence[str]) -> Path:
    """Make an installation of Python in FOLDER whose site-packages have these drivers and no other.

    The interpreter is a copy, and its library links to the original's. So the script finds what a
    host with this one package would show it, and is itself as it is. Needs no rights.
    """
    code = "import os, sys; print(os.path.dirname(os.__file__), sys.executable)"
    library = subprocess.run(
        [python, "-IS", "-c", code],
        capture_output=True, text=True, check=True,
    ).stdout.split()
    (folder / "bin").mkdir(parents=True)
    copy = folder / "bin" / "python3"
    shutil.copy(os.path.realpath(library[1]), copy)
    inside = folder / "lib" / os.path.basename(library[0])
    inside.mkdir(parents=True)
    for name in os.listdir(library[0]):
        if name not in ("site-packages", "dist-packages", "__pycache__"):
            (inside / name).symlink_to(os.path.join(library[0], name))
    packages = Path(driver_folders(str(copy))[0])
    assert folder in packages.parents, packages
    packages.mkdir(parents=True)
    for entry in shared_packages(python, drivers):
        if not (packages / entry.name).is_symlink():
            (packages / entry.name).symlink_to(entry)
    return copy


def shared_packages(python: str, drivers: Sequence[str]) -> Iterator[Path]:
    """Give all that is in the site-packages of an interpreter, but of drivers only these."""
    known = {name.split(".")[0] for names in DRIVERS.values() for name in names}
    hidden = known - {name.split(".")[0] for name in drivers}
    for folder in driver_folders(python):
        for entry in Path(folder).iterdir() if os.path.isdir(folder) else ():
            if entry.name not in hidden and entry.suffix not in (".pth", ".pyc"):
                yield entry


# ------------------------------------------------------------------------------------- helpers


def unprivileged(name: str) -> dict[str, Any]:
    """Give the arguments for subprocess by which root becomes the user NAME, or else nobody."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get(name) or known["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def free_port() -> int:
    """Give a loopback TCP port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Give the processes below one; PostgreSQL's leave its process group."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue  # it has ended
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def write_private(path: str, text: str) -> None:
    """Write a file that only its owner may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
