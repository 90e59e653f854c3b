"""A pseudo-terminal: what a person sees and types, without a person.

Programs get `end` as a stream. The test reads what they show on it, and types:

    with Terminal() as terminal:
        subprocess.run(command, stderr=terminal.end)
        assert terminal.shown() == "1 agent imported\\r\\n"
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import termios
import time
from typing import Self

SECONDS = 60.0  # how long a reader waits for what takes a fraction of a second on a quiet machine


class Terminal:
    """A pseudo-terminal of a test. `end` is the side that programs use."""

    def __init__(self) -> None:
        """Open both sides."""
        self._ours, self.end = pty.openpty()
        self._ours_is_open = True
        self._end_is_open = True

    def __enter__(self) -> Self:
        """Return the terminal itself."""
        return self

    def __exit__(self, *_problem: object) -> None:
        """Close what is still open."""
        self.close_end()
        self.hang_up()

    @property
    def name(self) -> str:
        """The path of the terminal's device."""
        return os.ttyname(self.end)

    def take_control(self) -> None:
        """Make this the controlling terminal of a new session: a `preexec_fn` of Popen.

        A hang-up or a typed Ctrl-C then sends the signal that a person's terminal would send.
        """
        fcntl.ioctl(self.end, termios.TIOCSCTTY, 0)

    def shown(self) -> str:
        """Return all that is shown until no program uses the terminal any more.

        The programs must have been started before, because this process gives up its own `end`.
        A program that waits for its reader (after 4,096 bytes) must still run.
        """
        self.close_end()
        text = b""
        deadline = time.monotonic() + SECONDS
        while True:
            piece = self._read(deadline, text)
            if not piece:
                return text.decode("ascii")
            text += piece

    def shown_until(self, part: str) -> str:
        """Return what is shown up to now, as soon as it contains PART."""
        text = b""
        deadline = time.monotonic() + SECONDS
        while part.encode() not in text:
            piece = self._read(deadline, text)
            assert piece, f"no program uses the terminal any more, and it shows {text!r}"
            text += piece
        return text.decode("ascii")

    def press(self, keys: str) -> None:
        """Type KEYS; `\\x03` is Ctrl-C."""
        os.write(self._ours, keys.encode())

    def hang_up(self) -> None:
        """Close the person's side."""
        if self._ours_is_open:
            self._ours_is_open = False
            os.close(self._ours)

    def close_end(self) -> None:
        """Close this process's copy of the programs' side."""
        if self._end_is_open:
            self._end_is_open = False
            os.close(self.end)

    def _read(self, deadline: float, text: bytes) -> bytes:
        """Return the next piece; nothing if all programs have closed the terminal."""
        wait = max(0.0, deadline - time.monotonic())
        is_readable = select.select([self._ours], [], [], wait)[0]
        assert is_readable, f"waited {SECONDS:g} s in vain; the terminal shows {text!r}"
        with contextlib.suppress(OSError):  # EIO: the last program has closed it
            return os.read(self._ours, 65536)
        return b""
