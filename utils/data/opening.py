"""Files as bytes: unpacked where they end in .gz, refused where they are not what their names say."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

BOM = b"\xef\xbb\xbf"
PACKED_RATIO = 100  # text packs to a tenth or so of its size; only copies of one row pack to a hundredth
FREE_BYTES = 64 << 20  # that any packed file may hold
UNPACKED_BLOCK = 1 << 20
# How files begin that are not what their names say.
STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the data; run git lfs pull in its folder",
    b"\x1f\x8b": "packed with gzip; end its name in .jsonl.gz or .json.gz, or unpack it",
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it",
    b"\xfd7zXZ": "packed with xz; unpack it",
    b"BZh": "packed with bzip2; unpack it",
    b"ARROW1": "an Arrow file; save the data set as .parquet",
    b"<!doctype html": "a web page and not the data; download the file itself",
    b"<html": "a web page and not the data; download the file itself",
}
OWN_STARTS = {".gz": b"\x1f\x8b", ".parquet": b"PAR1"}


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file. Raises UserError where it holds far more than text can be packed to."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.GzipFile(path)
        self._most = max(FREE_BYTES, PACKED_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        if self._file.tell() > self._most:
            raise UserError(
                f"{self._path} unpacks to more than {PACKED_RATIO} times its size, which no real data does. "
                "If you trust it, unpack it with gunzip and give the unpacked file."
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked when it ends in .gz. Raises UserError when the packed data is cut off or damaged."""
    packed = path.name.lower().endswith(".gz")
    with io.BufferedReader(_Unpacked(path), UNPACKED_BLOCK) if packed else open(path, "rb") as handle:
        try:
            yield handle
        except EOFError:
            raise UserError(f"{path} is truncated: its gzip data ends early. Copy or download it again.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is not valid gzip data ({error}). Copy or download it again.") from None


def check_start(path: Path) -> None:
    """Raises UserError where the first bytes of a file say that it is of another kind than its name."""
    with open(path, "rb") as file:
        start = file.read(32).lower()
    for known, what in STARTS.items():
        if start.startswith(known.lower()) and OWN_STARTS.get(path.suffix.lower()) != known:
            raise UserError(f"{path} is {what}.")


def check_unpacked(path: Path) -> None:
    """Raises UserError where a packed file holds far more than text can be packed to: it would fill memory and disk."""
    if path.suffix.lower() == ".gz":
        with open_binary(path) as file:
            while file.read(UNPACKED_BLOCK):
                pass


def read_text(path: Path) -> str:
    """The whole file as text, without a byte order mark. Raises UserError when it is not UTF-8."""
    with open_binary(path) as handle:
        content = handle.read()
    refuse_utf16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None


def refuse_utf16(path: Path, start: bytes) -> None:
    """Raises UserError where a file begins as UTF-16 text does."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text. Save it as UTF-8.")
