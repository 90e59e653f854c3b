"""Names and paths of sources: a name is a name, and only a trusted path is read.

The rule is in the issue "Which paths to trust" and in DESIGN.md: trusted owners are root, the
effective user and, when a file is only read, the owner of that file.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Caller, Stores, script
from sources import KINDS, in_octal, refuses, serves

NAMES: list[str | bytes] = [
    *("a b.db", "a?mode=rwc.db", "a#b.db", "a%41b.db", "a%.db", "é.db", "a'b\".db", "a\nb.db"),
    *("file:x.db", "a&b;c.db", "-x.db", ":memory:", b"\xff.db", "a\\b.db", "mysql.db", "x" * 200),
    *("sql", "a.sql.db", "%2F", "x.SQL", " ", "~"),
]
URLS = {  # a name: is it a URL, and is it a script?
    **dict.fromkeys(["mysql://h/d", "postgresql://h/d", "X://y", "mysql:x"], (1, 0)),
    **dict.fromkeys(["postgresql:x", "mysql://h/d.sql", "mysql:a.sql"], (1, 0)),
    **dict.fromkeys(["a.sql", "./a.sql", "/x/a.sql", "/a://b.sql", "./mysql:a.sql"], (0, 1)),
    **dict.fromkeys(["a.db", "/a.db", "sql", "a.sqlx", "/a://b", "./a://b", ".mysql:x"], (0, 0)),
    **dict.fromkeys(["mysql", "postgresql", "mysqlx:", "http:/x", "a.SQL"], (0, 0)),
}
NO_FILES = {  # a name that leads to no file, and the reason that is told
    "missing.db": "No such file or directory",
    "no/such/folder/missing.db": "No such file or directory",
    "missing.sql": "No such file or directory",
    "client.keys": "No such file or directory",
    ":memory:": "No such file or directory",
    "file:missing.db?mode=rwc": "No such file or directory",
    "file/missing.db": "Not a directory",
    "loop": "Too many levels of symbolic links",
    "dangling": "No such file or directory",
    "x" * 300: "File name too long",
    ".": "not a regular file",
    "folder": "not a regular file",
    "folder/": "not a regular file",
    "fifo.db": "not a regular file",
    "fifo.csv": "not a regular file",
    "fifo.sql": "not a regular file",
}
BESIDE = ["-wal", "-shm", "-journal"]
STRANGER = 54321  # the id of a user that is neither root nor nobody


# ---------------------------------------------------------------- names of files


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_a_name(
    stores: Stores, name: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of a name is read as a URI or an escape, and a missing file is not made."""
    monkeypatch.chdir(stores.folder)
    path = stores.sqlite(name=name)
    for spelling in (path, path.name, f"./{path.name}", f"../{stores.folder.name}/{path.name}"):
        assert serves(spelling)
    path.unlink()
    for spelling in (path, path.name):
        assert "No such file or directory" in refuses(spelling)
    assert not list(stores.folder.iterdir())


@pytest.mark.parametrize("name", URLS)
def test_a_path_is_no_url(name: str) -> None:
    assert (script.is_url(name), script.is_script(name)) == URLS[name]


def test_a_url_leads_to_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "Database", lambda name, seconds: (name, seconds))
    assert script.open_source("mysql://u@h/d", 7.0) == ("mysql://u@h/d", 7.0)


@pytest.mark.parametrize("name", NO_FILES)
def test_a_path_that_leads_to_no_file(
    stores: Stores, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made, and a fifo holds nobody up."""
    monkeypatch.chdir(stores.folder)
    stores.text("", "file")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere.db")
    for kind in ("fifo.db", "fifo.csv", "fifo.sql"):
        os.mkfifo(kind, 0o600)
    before = sorted(os.listdir())
    for spelling in (name, f"{os.getcwd()}/{name}"):
        assert refuses(spelling) == NO_FILES[name]
        assert refuses(spelling, "ip", "10.0.0.5") == NO_FILES[name]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty", "/dev/full", "/"])
def test_a_device(device: str) -> None:
    assert refuses(device)


@pytest.mark.parametrize("name", ["a.db", "a.sql"])
def test_a_file_whose_disk_fails(stores: Stores, name: str) -> None:
    """The file opens, but reading from it fails."""
    broken = Path("/proc/self/mem")
    if not broken.exists():
        pytest.skip("no file here fails so")
    path = stores.folder / name
    path.symlink_to(broken)
    assert refuses(path) == "Input/output error"


def test_a_path_of_more_bytes_than_sqlite_takes(stores: Stores) -> None:
    """SQLite takes 512 bytes. A longer path is error 2 with a reason, and a text is read."""
    folder = stores.folder.joinpath(*["d" * 100] * 6)
    folder.mkdir(parents=True)
    deep = Stores(folder)
    assert serves(deep.csv())
    assert serves(deep.keys())
    path = shutil.copy(stores.sqlite(), folder)
    for words in (["id", "001"], ["ip", "192.168.1.100"]):
        answer = script.answer(words, lambda: script.open_source(path, 5.0), path)
        assert answer.number == 2 and answer.message.endswith("unable to open database file")


def test_a_tilde_that_the_shell_did_not_expand(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `--db=~/agents.db`; a folder that is named `~` is a folder all the same."""
    monkeypatch.chdir(stores.folder)
    for name in ("~/agents.csv", "~/agents.db", "~/a.sql"):
        reason = refuses(name)
        assert "shell" in reason and "expand" in reason and "~" in reason, reason
    Path("~").mkdir()
    stores.csv().rename("~/agents.csv")
    assert serves("~/agents.csv")


def test_links_are_followed(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stores.folder)
    Path("sub").mkdir()
    for kind in KINDS:
        path = stores.make(kind)
        ending = ".sql" if kind == "sql" else ""
        Path(f"absolute{ending}").symlink_to(path)
        Path(f"sub/relative{ending}").symlink_to(f"../{path.name}")
        Path(f"second{ending}").symlink_to(f"sub/relative{ending}")
        for name in ("absolute", "sub/relative", "second", f"{stores.folder}/second"):
            assert serves(name + ending)
            assert script.trusted_path(name + ending) == os.path.realpath(path)
        for link in ("absolute", "sub/relative", "second"):
            Path(link + ending).unlink()


def test_as_many_links_as_the_kernel_follows(stores: Stores) -> None:
    path = stores.csv()
    link = path
    for number in range(39):
        before, link = link, stores.folder / f"link{number}"
        link.symlink_to(before)
    assert serves(link)


@pytest.mark.parametrize(
    "spelling", ["{0}/../{1}/agents.csv", "{0}//agents.csv", "{0}/./sub/../agents.csv", "{0}/up"]
)
def test_a_path_with_dots(stores: Stores, spelling: str) -> None:
    (stores.folder / "sub").mkdir()
    (stores.folder / "up").symlink_to("sub/../sub/.././agents.csv")
    path = stores.csv()
    name = spelling.format(stores.folder, stores.folder.name)
    assert serves(name)
    assert script.trusted_path(name) == os.path.realpath(path)


# ---------------------------------------------------------------- who may write to the file


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_everybody_may_write(stores: Stores, kind: str) -> None:
    path = stores.make(kind)
    link = stores.folder / f"link{path.suffix}"
    link.symlink_to(path)
    for mode in (0o602, 0o666, 0o622, 0o777, 0o646, 0o606):
        path.chmod(mode)
        for name in (path, link):
            assert f"chmod o-w {path}" in refuses(name), in_octal(path)
    for mode in (0o400, 0o600, 0o640, 0o660, 0o664, 0o755, 0o775, 0o604, 0o605):
        path.chmod(mode)
        for name in (path, link):
            assert serves(name), in_octal(path)


@pytest.mark.parametrize("beside", BESIDE)
def test_a_file_beside_the_database_that_everybody_may_write(stores: Stores, beside: str) -> None:
    """SQLite reads these files, too."""
    path = stores.sqlite()
    other = stores.text("", path.name + beside)
    link = stores.folder / "link.db"
    link.symlink_to(path)
    for mode in (0o666, 0o602, 0o646):
        other.chmod(mode)
        for name in (path, link):
            assert str(other) in refuses(name), in_octal(other)
    for mode in (0o600, 0o640, 0o664):
        other.chmod(mode)
        assert serves(path), in_octal(other)


@pytest.mark.parametrize("beside", BESIDE)
def test_a_strangers_file_beside_the_database(stores: Stores, nobody: int, beside: str) -> None:
    path = stores.sqlite()
    other = stores.text("", path.name + beside)
    link = stores.folder / "link.db"
    link.symlink_to(path)
    os.chown(other, nobody, -1)
    assert str(other) in refuses(path)
    assert str(other) in refuses(link)
    os.chown(path, nobody, -1)  # both files are his own
    assert serves(path)
    os.chown(other, 0, -1)  # root may have made the second file
    assert serves(path)
    os.chown(other, STRANGER, -1)
    assert str(other) in refuses(path)


def test_the_owner_of_a_source_may_be_anybody(stores: Stores, nobody: int) -> None:
    """The folder belongs to root, so root has put the file there or has accepted it."""
    for kind in KINDS:
        path = stores.make(kind)
        os.chown(path, nobody, -1)
        assert serves(path)


# ---------------------------------------------------------------- who may replace the file


class Tree:
    """A source in two folders, `outer/inner/`, and a link to it in `links/`."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Make the folders with mode 0755, and a source of the KIND."""
        self.outer, self.links = folder / "outer", folder / "links"
        self.inner = self.outer / "inner"
        for path in (self.outer, self.inner, self.links):
            path.mkdir(mode=0o755)
        self.source = Stores(self.inner).make(kind)
        self.link = self.links / f"link{self.source.suffix}"
        self.link.symlink_to(self.source)
        self.kind = kind


@pytest.fixture(params=KINDS)
def tree(request: pytest.FixtureRequest, stores: Stores) -> Tree:
    """A source of each kind, which is accepted as it is, directly and through the link."""
    tree = Tree(stores.folder, request.param)
    assert serves(tree.source) and serves(tree.link)
    return tree


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o773, 0o757], ids=oct)
@pytest.mark.parametrize("place", ["inner", "outer", "links"])
def test_a_folder_that_everybody_may_write(tree: Tree, place: str, mode: int) -> None:
    """At any height above the file or above a link to it. The message says what to do."""
    folder: Path = getattr(tree, place)
    folder.chmod(mode)
    assert f"chmod o-w {folder}" in refuses(tree.link), in_octal(folder)
    if place == "links":
        assert serves(tree.source)
    else:
        assert f"chmod o-w {folder}" in refuses(tree.source), in_octal(folder)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o770, 0o775, 0o1775, 0o1755], ids=oct)
def test_a_folder_that_not_everybody_may_write(tree: Tree, mode: int) -> None:
    for folder in (tree.inner, tree.outer, tree.links):
        folder.chmod(mode)
        assert serves(tree.source), in_octal(folder)
        assert serves(tree.link), in_octal(folder)


@pytest.mark.parametrize("mode", [0o1777, 0o1772, 0o1773], ids=oct)
def test_a_sticky_folder(tree: Tree, mode: int) -> None:
    """Nobody can replace what root has there, but strangers could put a -wal file beside SQLite."""
    tree.links.chmod(mode)
    tree.outer.chmod(mode)
    assert serves(tree.link), in_octal(tree.links)
    assert serves(tree.source), in_octal(tree.outer)
    tree.inner.chmod(mode)
    if tree.kind == "sqlite":
        assert str(tree.inner) in refuses(tree.source), in_octal(tree.inner)
        assert str(tree.inner) in refuses(tree.link)
    else:
        assert serves(tree.source), in_octal(tree.inner)
        assert serves(tree.link)


def test_a_strangers_file_in_a_sticky_folder(tree: Tree, nobody: int) -> None:
    """He may have put it there before root wanted to."""
    tree.inner.chmod(0o1777)
    os.chown(tree.source, nobody, -1)
    assert str(tree.source) in refuses(tree.source)
    assert str(tree.source) in refuses(tree.link)


def test_a_strangers_link_in_a_sticky_folder(tree: Tree, nobody: int) -> None:
    tree.links.chmod(0o1777)
    os.chown(tree.link, nobody, -1, follow_symlinks=False)
    assert str(tree.links) in refuses(tree.link)
    assert serves(tree.source)


@pytest.mark.parametrize("place", ["inner", "outer", "links"])
def test_a_folder_of_another_user(tree: Tree, nobody: int, place: str) -> None:
    """He could put a different source, or a different link, there."""
    folder: Path = getattr(tree, place)
    os.chown(folder, nobody, -1)
    assert f"chown root {folder}" in refuses(tree.link)
    if place == "links":
        assert serves(tree.source)
    else:
        assert f"chown root {folder}" in refuses(tree.source)


def test_a_users_own_file_in_his_own_folder(tree: Tree, nobody: int) -> None:
    """Whoever names the file trusts that user; a manager's global.db is such a file."""
    for path in (tree.outer, tree.inner, tree.source):
        os.chown(path, nobody, -1)
    assert serves(tree.source)
    assert serves(tree.link)  # root's link in root's folder
    os.chown(tree.links, nobody, -1)
    assert serves(tree.link)
    os.chown(tree.inner, STRANGER, -1)
    assert str(tree.inner) in refuses(tree.source)


def test_what_an_unprivileged_user_trusts(
    tree: Tree, nobody: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, himself and the owner of the file: no others."""
    monkeypatch.setattr(script.posix, "geteuid", lambda: nobody)
    assert serves(tree.source) and serves(tree.link)
    for path in (tree.outer, tree.inner):
        os.chown(path, nobody, -1)
    assert serves(tree.source)
    os.chown(tree.inner, STRANGER, -1)
    assert str(tree.inner) in refuses(tree.source)
    os.chown(tree.source, STRANGER, -1)
    assert serves(tree.source)


def test_a_kubernetes_secret(stores: Stores) -> None:
    """The volume has mode 1777. Root owns its links, `agents.csv -> ..data/agents.csv` is one."""
    volume = stores.folder / "secret"
    data = volume / "..2026_11_28_10_00_00.123456789"
    data.mkdir(parents=True, mode=0o755)
    (volume / "..data").symlink_to(data.name)
    for kind in KINDS:
        source = Stores(data).make(kind)
        source.chmod(0o644)
        (volume / source.name).symlink_to(f"..data/{source.name}")
    volume.chmod(0o1777)
    for link in volume.iterdir():
        assert not link.suffix or link.name.startswith("..") or serves(link)


def test_a_folder_is_told_by_its_full_name(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """`./` would not help whoever reads the log."""
    monkeypatch.chdir(stores.folder)
    for kind in KINDS:
        path = stores.make(kind)
        stores.folder.chmod(0o777)
        try:
            assert f"chmod o-w {stores.folder}" in refuses(path.name)
            assert f"chmod o-w {stores.folder}" in refuses(f"./{path.name}")
        finally:
            stores.folder.chmod(0o700)


# ---------------------------------------------------------------- folders of stores and sockets


@pytest.fixture
def private(stores: Stores) -> Path:
    """A folder in a folder, each with mode 0755."""
    folder = stores.folder / "outer" / "store"
    folder.parent.mkdir(mode=0o755)
    folder.mkdir(mode=0o755)
    return folder


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o770, 0o775, 0o2775], ids=oct)
def test_a_private_directory(private: Path, mode: int) -> None:
    """Root's own group may write there. (The fixture's folders have it.)"""
    private.chmod(mode)
    link = private.parent.parent / "link"
    link.symlink_to(private)
    for name in (private, link):
        assert script.check_private_directory(str(name)) == os.path.realpath(private)


def give_to_a_group(path: Path) -> None:
    """Let a group write there that is neither root's nor the user's own."""
    os.chown(path, -1, STRANGER)
    path.chmod(0o775)


NOT_PRIVATE: dict[str, tuple[Callable[[Path], object], str]] = {  # and what the message advises
    "writable by everybody": (lambda path: path.chmod(0o777), "chmod o-w {}"),
    "sticky": (lambda path: path.chmod(0o1777), "{}: use another directory"),
    "another user's": (lambda path: os.chown(path, STRANGER, -1), "chown root {}"),
    "another group's": (give_to_a_group, "chmod g-w {}"),
    "under another user's": (
        lambda path: os.chown(path.parent, STRANGER, -1),
        "chown root {0.parent}",
    ),
    "under one for everybody": (lambda path: path.parent.chmod(0o777), "chmod o-w {0.parent}"),
}


@pytest.mark.parametrize("case", NOT_PRIVATE)
@pytest.mark.usefixtures("nobody")
def test_a_directory_that_is_not_private(private: Path, case: str) -> None:
    damage, advice = NOT_PRIVATE[case]
    damage(private)
    with pytest.raises(script.SourceError) as caught:
        script.check_private_directory(str(private))
    assert advice.format(private) in caught.value.message


def test_the_directory_of_an_unprivileged_user(
    private: Path, nobody: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.posix, "geteuid", lambda: nobody)
    script.check_private_directory(str(private))
    os.chown(private, nobody, -1)
    script.check_private_directory(str(private))
    os.chown(private, STRANGER, -1)
    with pytest.raises(script.SourceError):
        script.check_private_directory(str(private))


# ---------------------------------------------------------------- a process of another user


def test_a_log_beside_what_a_link_leads_to(
    ask: Caller, open_folder: Path, open_script: Path, nobody: int
) -> None:
    """It counts, though nothing may be written there, nor where the link is."""
    if not shutil.which("python3", path=os.defpath):
        pytest.skip("there is no python3 that every user may run")
    for name in ("data", "links"):
        (open_folder / name).mkdir(mode=0o755)
    path = Stores(open_folder / "data").sqlite()
    link = open_folder / "links" / "agents.db"
    link.symlink_to(path)
    writer = sqlite3.connect(str(path), isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("UPDATE agent SET name = 'in-the-log'")
    how: dict[str, Any] = {"script": open_script, "user": nobody, "cwd": "/"}
    try:
        answer = ask("id", "001", db=link, env={"PATH": os.defpath}, **how)
        assert answer.data.get("name") == "in-the-log"
    finally:
        writer.close()


def test_a_store_that_is_renamed_before_sqlite_opens_it(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error 2 with a reason; it was an internal error."""
    path = stores.sqlite()
    real = script.trusted_path

    def rename_it(name: str, **how: bool) -> str:
        found: str = real(name, **how)
        os.rename(path, f"{path}.away")
        return found

    monkeypatch.setattr(script, "trusted_path", rename_it)
    assert refuses(path) in (os.strerror(errno.ENOENT), "unable to open database file")
