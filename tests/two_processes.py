"""The tests in two processes: each takes a file at a time, and the parent tells what comes of it.

AGENT_KEY_PROCESSES=1 is pytest as usual, and so are -x, --pdb and their like. The tests of a file
that is marked `apart` have nothing in common, and are taken one at a time.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import os
import signal
import sys
import traceback
import warnings
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

import pytest
from database_servers import PARENT_DEATH_SIGNAL, prctl

PROCESSES = int(os.environ.get("AGENT_KEY_PROCESSES") or min(2, len(os.sched_getaffinity(0))))
AS_USUAL = ("collectonly", "maxfail", "usepdb", "trace", "stepwise", "setupshow")
FIRST = ("test_databases.py", "test_speed.py", "test_import.py", "test_server_life.py")  # the long
WITH = {"test_readme.py": "test_databases.py"}  # it needs the same database servers
Unit = list[pytest.Item]


def units_of(items: Unit) -> list[Unit]:
    """What is taken at a time: files, the long ones first, then the tests that stand apart."""
    units: dict[str, Unit] = {}
    for item in items:
        apart, file = item.get_closest_marker("apart"), item.path.name
        units.setdefault(item.nodeid if apart else WITH.get(file, file), []).append(item)
    order = [*FIRST, *(name for name in units if "::" not in name), *units]
    return [units[name] for name in dict.fromkeys(order) if name in units]


class Child:
    """A process that runs tests. running: the name of its test; done: how many it has run."""

    def __init__(
        self, session: pytest.Session, units: list[Unit], numbers: int, others: list[Child]
    ) -> None:
        """Fork it; the numbers of its units come from the pipe NUMBERS."""
        self.session, self.config, self.hook = session, session.config, session.config.hook
        self.running, self.done, self.reports, self.warnings = "no test", 0, [], []
        self.pipe, pipe = Pipe(duplex=False)
        self.pid = os.fork()
        if not self.pid:
            for child in self, *others:
                child.pipe.close()
            self.run(units, numbers, pipe)
        pipe.close()

    # -- in the child

    def run(self, units: list[Unit], numbers: int, pipe: Connection) -> NoReturn:
        """Run units until there are no more; whatever happens, nothing of them stays behind."""
        atexit._clear()  # that is the parent's
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which sends SIGTERM then
        prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        plugins = self.config.pluginmanager
        plugins.getplugin("terminalreporter")._tw._file = open(os.devnull, "w")  # the parent tells
        plugins.register(self)
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()  # its files are the other's, too
        capture.start_global_capturing()
        capture.suspend_global_capture()
        items = (
            item
            for number in iter(lambda: os.read(numbers, 2), b"")
            for item in units[int.from_bytes(number, sys.byteorder)]
        )
        trouble = ""
        try:
            item = next(items, None)
            while item:
                self.tell(pipe, item.nodeid)
                following = next(items, None)
                self.hook.pytest_runtest_protocol(item=item, nextitem=following)
                item = following
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            trouble = traceback.format_exc()
        with contextlib.suppress(BaseException):
            self.session._setupstate.teardown_exact(None)
            atexit._run_exitfuncs()
            self.tell(pipe, trouble and self.running, trouble)
        os._exit(bool(trouble))

    def tell(self, pipe: Connection, upcoming: str, trouble: str = "") -> None:
        """Send what has come of a test, and which is the next."""
        pipe.send((upcoming, self.reports, self.warnings, trouble))
        self.running, self.reports, self.warnings = upcoming, [], []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a report."""
        self.reports.append(
            self.hook.pytest_report_to_serializable(config=self.config, report=report)
        )

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: Any, nodeid: str, location: Any
    ) -> None:
        """Keep a warning."""
        what = (
            str(warning_message.message),
            warning_message.category,
            warning_message.filename,
            warning_message.lineno,
        )
        self.warnings.append((what, when, nodeid, location))

    # -- in the parent

    def listen(self) -> bool:
        """Pass on what it has told; whether it goes on."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        trouble = ""
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                self.running, reports, recorded, trouble = self.pipe.recv()
                self.pass_on(reports, recorded)
        if ended:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            if status or self.running:
                text = f"Its process has ended with status {status}.\n{trouble}"
                path = self.running.partition("::")[0]
                self.hook.pytest_runtest_logreport(
                    report=pytest.TestReport(
                        self.running, (path, None, self.running), {}, "failed", text, "call"
                    )
                )
        return not ended

    def pass_on(self, reports: list[Any], recorded: list[Any]) -> None:
        """Do what pytest does once a test has run."""
        for what, when, nodeid, location in recorded:
            self.hook.pytest_warning_recorded.call_historic(
                kwargs={
                    "warning_message": warnings.WarningMessage(*what),
                    "when": when,
                    "nodeid": nodeid,
                    "location": location,
                }
            )
        if not reports:
            return
        told = [
            self.hook.pytest_report_from_serializable(config=self.config, data=data)
            for data in reports
        ]
        name, location = told[0].nodeid, told[0].location
        self.hook.pytest_runtest_logstart(nodeid=name, location=location)
        for report in told:
            self.hook.pytest_runtest_logreport(report=report)
        self.hook.pytest_runtest_logfinish(nodeid=name, location=location)
        self.done += 1


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all tests in some processes, unless one is enough."""
    config, units = session.config, units_of(session.items)
    usual = session.testsfailed or any(config.getoption(name, None) for name in AS_USUAL)
    count = min(PROCESSES, len(units))
    if count < 2 or usual or hasattr(config, "workerinput"):  # of xdist
        return None
    config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # the same for all
    terminal: Any = config.pluginmanager.getplugin("terminalreporter")
    terminal.showfspath = False  # the files take turns
    terminal.flush()
    numbers, feed = os.pipe()
    os.write(feed, array.array("H", range(len(units))))
    os.close(feed)
    children: list[Child] = []
    try:
        for _ in range(count):
            children.append(Child(session, units, numbers, children))
        going = list(children)
        while going:
            wait([child.pipe for child in going], 1)  # what a test left may hold the other end
            going = [child for child in going if child.listen()]
    except BaseException:
        for child in children:
            child.pipe.close()  # it ends at its next word: what a signal raises may get lost,
        for child in going:  # because Python ignores what is raised in a function at a fork
            os.kill(child.pid, signal.SIGTERM)
        for child in going:
            os.waitpid(child.pid, 0)
        raise
    finally:
        os.close(numbers)
    left = len(session.items) - sum(child.done for child in children)
    if left:
        session.shouldfail = f"{left} tests have not run to their end: see above"
        raise session.Failed(session.shouldfail)
    return True
