"""Standard input, output and error of the process, so that nothing that becomes of them ends a run.

A reader may leave (`| head -1`), a terminal may be closed, the disk behind a redirection may be full, a stream may be
closed from the start, and an encoding may lack the characters of a text.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CLEAR = b"\r\x1b[K"  # takes the cursor to the line's begin, and empties the line

_lost: OSError | None = None  # what ended standard output
_status = b""  # the line that stands below all others, for the time being
_visible = False  # whether it does
_within_line = False  # whether what was written last has no end of line yet


def open_console() -> None:
    """Makes the three streams of this process safe to use; before anything else is opened.

    From here on `sys.stdin`, `sys.stdout` and `sys.stderr` are there, writing to them raises nothing, and what their
    encoding lacks is written as an escape such as \\u4e2d. What cannot be written is dropped; `lost_output` tells.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get its number, and what libraries print
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _open_writer(sys.stdout, 1), _open_writer(sys.stderr, 2)


def lost_output() -> OSError | None:
    """Why standard output can no longer be written to; None as long as it can."""
    return _lost


def reader_left() -> bool:
    """Whether what read standard output has ended, as `head` does once it has seen enough."""
    return isinstance(_lost, BrokenPipeError)


def _open_writer(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    errors = "backslashreplace" if stream.errors in ("strict", "surrogateescape") else stream.errors
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):  # a console of Windows
        stream.reconfigure(errors=errors)
        return stream
    stream.flush()
    return io.TextIOWrapper(
        cast(io.BufferedWriter, _Writer(number)),
        stream.encoding,
        errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def terminal_width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns


def paints_status() -> bool:
    """Whether a status line can stand below what is written: both streams are ours, and of a terminal that can."""
    streams = (sys.stdout, sys.stderr)
    ours = all(isinstance(getattr(stream, "buffer", None), _Writer) and stream.isatty() for stream in streams)
    return ours and os.environ.get("TERM", "dumb") != "dumb"


def show_status(text: str) -> None:
    """Puts a text in the place of the status line; an empty one takes the line away."""
    global _status, _visible
    if not (text or _status) or not paints_status():
        return
    _status = text[: terminal_width() - 1].encode(sys.stderr.encoding, "replace")
    if not _within_line:  # else it is shown once the line has ended
        _visible = bool(_status)
        cast(_Writer, sys.stderr.buffer).put(CLEAR + _status)


class _Writer(io.BufferedIOBase):
    """Writes to standard output or error, all at once, until that fails, and from then on to nowhere.

    Python's own BufferedWriter raises where a handler of a signal prints while it writes.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        return self.number

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, content: ReadableBuffer) -> int:
        global _visible, _within_line
        text = bytes(content)
        before, _within_line = CLEAR if _visible else b"", not text.endswith(b"\n")
        _visible = bool(_status) and not _within_line
        self.put(before + text + (_status if _visible else b""))
        return len(text)

    def put(self, content: ReadableBuffer) -> int:
        """Writes past the status line."""
        left = memoryview(content).cast("B")
        size = len(left)
        while left:
            try:
                left = left[os.write(self.number, left) :]
            except BlockingIOError:  # somebody else set the pipe so, and it is full
                select.select([], [self.number], [])
            except OSError as error:
                _lose(self.number, error)
                break
        return size


def _lose(number: int, error: OSError) -> None:
    """Lets everything that is written from here on go nowhere, what libraries print past Python too."""
    global _lost
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    if number != 1:
        return
    _lost = error
    if not isinstance(error, BrokenPipeError):  # which is how a reader says that it has seen enough
        print(f"warning: nothing more can be printed: stdout: {error.strerror}", file=sys.stderr, flush=True)
