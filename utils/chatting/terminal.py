"""The person's side of a chat: lines that are typed, answers as they grow, nothing that could steer the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO

from ..errors import UserError
from ..runtime import make_visible

HALF_A_CHARACTER = "\ufffd"


def read_stdin() -> str:
    """The message that was piped in, without the line ends behind it.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"stdin: cannot be read ({error.strerror}); pass --prompt, or pipe a message in") from None
    if not text.strip():
        raise UserError("stdin is empty: pipe a message in, pass --prompt, or start chat in a terminal")
    return text


def let_lines_be_edited() -> None:
    """Arrow keys and a history of the lines, where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


class Answer:
    """An answer on its way to a stream: each call writes what is new of it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""

    def grow(self, text: str, ended: bool = False) -> None:
        """`text` is the answer so far; half a character, which may stand at its end until it has ended, is left out."""
        if not ended:
            text = text.rstrip(HALF_A_CHARACTER)
        if not text.startswith(self.text):
            return
        new, self.text = text[len(self.text) :], text
        if self.stream.isatty():
            new = make_visible(new if len(new) < len(text) else new.lstrip(" "))  # the space stands before it already
        self.stream.write(new)
        self.stream.flush()
