"""The header's loader: a cache of the compiled script, for speed, and never from a stranger."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SCRIPT, Caller
from manager import Answer, check_answer
from running import Words

SAYS = b"No agent key found"
CACHED = b"Agent from a cache"  # as long, so that a changed cache is a sound one
EDITED = b"Nothing found here"


class Installed:
    """A copy of the script in a folder of its own, with a source in another one."""

    def __init__(self, folder: Path, source: Path, ask: Caller) -> None:
        """Take a FOLDER and a SOURCE, neither of which is there yet."""
        self.folder, self.ask, self.source = folder, ask, source
        folder.mkdir(mode=0o755)
        self.script = Path(shutil.copy(SCRIPT, folder))
        self.script.chmod(0o755)
        source.write_text("001 my_agent any k\n")
        self.caches = folder / "__pycache__"

    @property
    def cache(self) -> Path:
        """The one file in `__pycache__` that a request needs: part one."""
        [path] = [path for path in self.caches.iterdir() if SAYS in path.read_bytes()]
        return path

    def call(self, **how: object) -> Answer:
        """Ask for an agent that is not there: what says so tells which program has run."""
        how = {"script": self.script, "db": self.source, **how}
        return self.ask("id", "003", **how)  # type: ignore[arg-type]

    def says(self, **how: object) -> bytes:
        """Give the message of the answer."""
        return self.call(**how).message.encode()

    def tamper(self) -> bytes:
        """Change a text in the cache, which stays sound, and give what it holds then."""
        return tamper(self.cache)


def tamper(cache: Path) -> bytes:
    """Change a text in a cache as who made it could, and give what it holds then."""
    old = cache.read_bytes()
    new = old.replace(SAYS, CACHED)
    cache.write_bytes(sealed(new) if old == sealed(old) else new)
    return cache.read_bytes()


def sealed(content: bytes) -> bytes:
    """Give the content of a cache the checksum with which a cache begins."""
    return zlib.crc32(content[4:]).to_bytes(4, "big") + content[4:]


@pytest.fixture
def installed(ask_each: Caller, tmp_path: Path) -> Installed:
    """An installed script that has not been called yet."""
    return Installed(tmp_path / "installed", tmp_path / "client.keys", ask_each)


# ---------------------------------------------------------------- made, used, made anew


def test_made_at_the_first_call_and_used_at_the_second(installed: Installed) -> None:
    installed.folder.chmod(0o775)  # as /usr/local/bin of some: its group may change the script, too
    assert installed.says() == SAYS
    made = installed.cache.stat()
    assert installed.says() == SAYS
    assert installed.cache.stat().st_ino == made.st_ino  # not written again
    cache = installed.cache
    tampered = installed.tamper()
    assert installed.says() == CACHED
    assert cache.read_bytes() == tampered
    for style in "python", "isolated":  # which compile each time
        assert installed.says(style=style) == SAYS


def edit_in_place(script: Path, content: bytes) -> None:
    script.write_bytes(content)


def replace(script: Path, content: bytes) -> None:
    other = script.with_name("other")
    other.write_bytes(content)
    other.chmod(0o755)
    other.replace(script)


@pytest.mark.parametrize("edit", [edit_in_place, replace])
def test_an_edited_script_is_never_run_from_an_old_cache(
    installed: Installed, edit: Callable[[Path, bytes], None]
) -> None:
    """Not even if size and time of the last edit are the same."""
    before = installed.script.stat()
    old = installed.script.read_bytes()
    assert installed.says() == SAYS
    for content, said in ((old.replace(SAYS, EDITED), EDITED), (old, SAYS)):
        edit(installed.script, content)
        os.utime(installed.script, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = installed.script.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert installed.says() == said
        assert installed.says() == said  # from the cache that was made anew
    installed.tamper()
    assert installed.says() == CACHED


def test_another_user_uses_it_too(ask: Caller, open_folder: Path, nobody: int) -> None:
    """And where it cannot write one it does without: no message, nothing left behind."""
    if not shutil.which("python3", path=os.defpath):
        pytest.skip("there is no python3 that every user may run")
    installed = Installed(open_folder / "installed", open_folder / "client.keys", ask)
    how = {"cwd": "/", "env": {"PATH": os.defpath}}
    assert installed.says(user=nobody, **how) == SAYS
    assert not installed.caches.exists()
    assert installed.says(**how) == SAYS
    installed.tamper()
    assert installed.says(user=nobody, **how) == CACHED


def test_a_read_only_folder(installed: Installed) -> None:
    if os.geteuid() == 0:
        pytest.skip("no mode stops root: test_another_user_uses_it_too does without, too")
    installed.folder.chmod(0o555)
    assert installed.says() == installed.says() == SAYS
    assert not installed.caches.exists()
    installed.folder.chmod(0o755)


def test_eight_starts_at_once(installed: Installed) -> None:
    command: Words = [*installed.ask.command(script=installed.script), "--db", installed.source]
    processes = [
        subprocess.Popen(
            [*command, "id", "003"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": installed.ask.path},
        )
        for _ in range(8)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert set(outputs) == {b'{"error": 4, "message": "%s"}\n' % SAYS}
    installed.tamper()  # there is one, whole, and nothing beside it
    assert installed.says() == CACHED


# ---------------------------------------------------------------- strangers


STRANGER = 54321  # the id of a user, and of a group, that has nothing to do with the script


def planted(installed: Installed) -> dict[str, Path]:
    """Let there be a cache that a stranger could have made, and give the places that matter."""
    installed.says()
    cache = installed.cache
    installed.tamper()
    return {"folder": installed.folder, "__pycache__": installed.caches, "cache": cache}


@pytest.mark.parametrize("place", ["folder", "__pycache__", "cache"])
def test_where_others_may_write_it_is_neither_read_nor_written(
    installed: Installed, place: str
) -> None:
    """By everybody, or, with the sticky bit, by everybody who finds nothing there."""
    places = planted(installed)
    tampered = places["cache"].read_bytes()
    path = places[place]
    mode = path.stat().st_mode
    for more in (0o002,) if place == "cache" else (0o002, 0o1002, 0o1022):
        path.chmod(mode | more)
        assert installed.says() == SAYS, oct(mode | more)
        if place != "cache":  # which may be replaced: nobody else can put one there
            assert places["cache"].read_bytes() == tampered, oct(mode | more)
    if place != "cache":
        places["cache"].unlink()
        if place == "folder":
            installed.caches.rmdir()
        before = set(installed.folder.rglob("*"))
        assert installed.says() == SAYS
        assert set(installed.folder.rglob("*")) == before


PLANTED: dict[str, tuple[str, int | None, int | None, int]] = {  # place, owner, group, mode
    "a sticky folder of a group": ("folder", None, STRANGER, 0o1775),
    "a folder of another user": ("folder", STRANGER, None, 0o755),
    "another user's __pycache__": ("__pycache__", STRANGER, None, 0o755),
    "a __pycache__ of a group": ("__pycache__", None, STRANGER, 0o775),
    "a sticky __pycache__ of a group": ("__pycache__", None, STRANGER, 0o1775),
    "another user's cache": ("cache", STRANGER, None, 0o644),
    "a cache of a group": ("cache", None, STRANGER, 0o664),
}


@pytest.mark.parametrize("case", PLANTED)
@pytest.mark.usefixtures("nobody")
def test_a_planted_cache(installed: Installed, case: str) -> None:
    """Root must not run what somebody else could put there."""
    place, owner, group, mode = PLANTED[case]
    path = planted(installed)[place]
    assert installed.says() == CACHED
    os.chown(path, -1 if owner is None else owner, -1 if group is None else group)
    path.chmod(mode)
    assert installed.says() == SAYS
    assert installed.says() == SAYS


@pytest.mark.usefixtures("nobody")
def test_a_link_to_a_planted_cache(installed: Installed, tmp_path: Path) -> None:
    """As `__pycache__`, or as the file in it."""
    places = planted(installed)
    theirs = tmp_path / "theirs"
    shutil.copytree(installed.caches, theirs)
    for path in (theirs, *theirs.iterdir()):
        os.chown(path, STRANGER, -1)
    places["cache"].unlink()
    places["cache"].symlink_to(theirs / places["cache"].name)
    assert installed.says() == SAYS
    shutil.rmtree(installed.caches)
    installed.caches.symlink_to(theirs)
    assert installed.says() == SAYS


@pytest.mark.usefixtures("nobody")
def test_a_cache_of_the_scripts_owner(installed: Installed) -> None:
    """He could as well change the script. His group may change it, too, in a folder of its own."""
    places = planted(installed)
    for path in (*places.values(), installed.script):
        os.chown(path, STRANGER, -1)
    assert installed.says() == SAYS  # the owner of the script has changed, and so has its stamp
    installed.tamper()
    assert installed.says() == CACHED
    os.chown(installed.folder, 0, STRANGER)
    installed.folder.chmod(0o775)
    assert installed.says() == CACHED


@pytest.mark.usefixtures("nobody")
def test_random_owners_and_modes(ask: Caller, tmp_path: Path) -> None:
    """The cache is run if, and only if, nobody but root and the script's owner can change it."""
    installed = Installed(tmp_path / "installed", tmp_path / "client.keys", ask)
    places = planted(installed)
    tampered = places["cache"].read_bytes()
    chance = random.Random(8)
    seen = set()
    for _ in range(30):
        installed.caches.chmod(0o755)
        places["cache"].unlink(missing_ok=True)
        places["cache"].write_bytes(tampered)
        trusted = True
        for place, path in places.items():
            owner = chance.choice([0, 0, 0, 0, 0, STRANGER])
            mode = chance.choice([0o755, 0o755, 0o755, 0o700, 0o775, 0o1775, 0o777, 0o1755])
            os.chown(path, owner, -1)
            path.chmod(mode)
            trusted &= owner == 0 and not mode & 0o002
            trusted &= not mode & 0o020 or (place == "folder" and not mode & 0o1000)
        assert installed.says() == (CACHED if trusted else SAYS)
        seen.add(trusted)
    assert seen == {True, False}


def test_a_name_without_a_folder(installed: Installed) -> None:
    """As in `sh agent_key_request.py`: the folder is the working directory."""
    command = ["sh", SCRIPT.name, "--db", str(installed.source), "id", "003"]
    how = {"cwd": installed.folder, "env": {"PATH": installed.ask.path}, "check": True}

    def says() -> bytes:
        return subprocess.run(command, capture_output=True, **how).stdout  # type: ignore

    assert SAYS in says()
    installed.tamper()
    assert CACHED in says()
    installed.folder.chmod(0o1777)
    assert SAYS in says()


def test_a_link_in_a_folder_of_others(installed: Installed, tmp_path: Path) -> None:
    """The cache is beside the name that was called."""
    folder = tmp_path / "links"
    folder.mkdir(mode=0o755)
    link = folder / SCRIPT.name
    link.symlink_to(installed.script)
    assert installed.says(script=link) == SAYS
    [cache] = (folder / "__pycache__").iterdir()
    tamper(cache)
    assert installed.says(script=link) == CACHED
    folder.chmod(0o1777)
    assert installed.says(script=link) == SAYS
    assert not installed.caches.exists()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077], ids=oct)
def test_what_is_written_is_never_writable_by_others(installed: Installed, umask: int) -> None:
    installed.script.chmod(0o777)  # whose mode Python gives to the cache
    command: Words = [*installed.ask.command(script=installed.script), "--db", installed.source]
    environment = {"PATH": installed.ask.path}
    subprocess.run([*command, "id", "001"], umask=umask, env=environment, check=True)
    for path in installed.caches, installed.cache:
        assert path.stat().st_mode & 0o022 == 0, path


# ---------------------------------------------------------------- damage

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "a checksum alone": lambda old: old[:4],
    "a checksum of nothing": lambda old: sealed(bytes(4)),
    "the first bytes": lambda old: old[:100],
    "cut": lambda old: old[: len(old) // 2],
    "a byte too few": lambda old: old[:-1],
    "a byte too many": lambda old: old + b"x",
    "zeros": lambda old: bytes(len(old)),
    "another text": lambda old: old.replace(SAYS, CACHED),
    "the script itself": lambda old: SCRIPT.read_bytes(),
}


def test_a_damaged_cache(installed: Installed) -> None:
    """It is made anew. It must not break every start from then on."""
    installed.says()
    cache = installed.cache
    sound = cache.read_bytes()
    for name, damage in DAMAGES.items():
        cache.write_bytes(damage(sound))
        assert installed.says() == SAYS, name
        assert cache.read_bytes() == sound, name


def test_a_cache_with_a_flipped_bit(installed: Installed) -> None:
    installed.says()
    cache = installed.cache
    sound = cache.read_bytes()
    chance = random.Random(9)
    for _ in range(20):
        content = bytearray(sound)
        place = chance.choice([chance.randrange(200), chance.randrange(len(sound))])
        content[place] ^= 1 << chance.randrange(8)
        cache.write_bytes(content)
        assert installed.says() == SAYS, place
        assert cache.read_bytes() == sound, place


def test_something_else_where_the_cache_should_be(installed: Installed) -> None:
    installed.says()
    cache = installed.cache
    cache.unlink()
    cache.mkdir()
    assert installed.says() == SAYS
    shutil.rmtree(installed.caches)
    for make in (Path.touch, lambda path: path.symlink_to("nowhere")):
        make(installed.caches)
        assert installed.says() == SAYS
        installed.caches.unlink()


def test_a_disk_that_is_full_for_a_while(installed: Installed) -> None:
    """Some versions of Python leave a cut cache behind then: it must not stay for good."""
    command: Words = [*installed.ask.command(script=installed.script), "--db", installed.source]
    limited: Words = ["sh", "-c", 'ulimit -f 16 && exec "$0" "$@"', *command, "id", "003"]
    environment = {"PATH": installed.ask.path}
    done = subprocess.run(limited, capture_output=True, env=environment, check=False)
    assert check_answer(Answer(done.stdout, done.returncode)).message.encode() == SAYS
    assert done.stderr == b""
    for _ in range(2):  # the first may still find what is left, and throw it away
        assert installed.says() == SAYS
    installed.tamper()
    assert installed.says() == CACHED
