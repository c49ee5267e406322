"""Files: written whole or not at all, never through a link, and read no further than a stated size."""

import contextlib
import errno
import os
import re
import secrets
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lowbit.errors import RunError, UsageError

_PART = re.compile(r"\.[0-9a-f]{16}\.lowbit\.part")
_PIECE = 1 << 20  # bytes read or decompressed at once

MAX_BYTES = 1 << 31
"""Bytes that one file may have, compressed and decompressed; ``LOWBIT_MAX_BYTES`` sets another limit."""


def write_atomically(
    path: Path, write: Callable[[BinaryIO], None], *, before: Callable[[], None] = lambda: None
) -> None:
    """Replace the file `path` by what `write` writes, or leave it as it was.

    The bytes go to a new file beside `path`, under a name that cannot be guessed, and reach the disk before the rename
    does. A link at `path` is replaced, not followed. A killed process leaves the old file and at most that new one,
    which `remove_parts` removes.

    Args:
        path: the file.
        write: writes the content to the open file that it is given.
        before: called between the writing and the rename.

    Raises:
        RunError: the disk is full or the folder cannot be written; the new file is gone.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.lowbit.part")
    try:
        with open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb"
        ) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        cause = os_error(error)
        if cause is None or not isinstance(error, Exception):
            raise
        kept = "; the one that was there is intact" if path.is_file() else ""
        full = cause.errno in {errno.ENOSPC, errno.EDQUOT}
        hint = " Free some space, then resume." if full else ""
        raise RunError(f"cannot write {path}: {cause.strerror or cause}{kept}.{hint}") from error


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in UTF-8, see `write_atomically`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` by `content`, see `write_atomically`."""
    write_atomically(path, lambda file: _write_all(file, content))


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def is_part(path: Path) -> bool:
    """Whether `path` is named like a file that `write_atomically` has not finished."""
    return _PART.fullmatch(path.name) is not None


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in `folder`."""
    for path in folder.iterdir():
        if is_part(path):
            with contextlib.suppress(OSError):
                path.unlink()


def open_file(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open an ordinary file to read; a FIFO, a device or a folder is refused at once, where `open` would wait.

    Args:
        path: the file.
        follow: whether a link may lead to it.

    Raises:
        OSError: there is no such file, it is not an ordinary file, or it cannot be read.
    """
    link = 0 if follow else os.O_NOFOLLOW
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | link)
    except ValueError as error:  # a NUL byte in the name
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise OSError(errno.EINVAL, f"it is {_kind(mode)}, not a file")
    return open(number, "rb")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read(path: Path, *, limit: int, hint: str) -> bytearray:
    """The content of an ordinary file, decompressed if its name ends in ``.gz``.

    Args:
        path: the file.
        limit: bytes, compressed and decompressed; a longer file is refused before its content is in memory.
        hint: the end of the error's text: what to do if the file is longer.

    Raises:
        RunError: the file cannot be read, is corrupt, or is longer than `limit`.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise RunError(f"{path} is too long: {size:,} bytes, where {limit:,} are allowed. {hint}")
            return _read_gzip(path, file, limit, hint) if path.suffix == ".gz" else bytearray(file.read(limit + 1))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_whole(path: Path) -> bytearray:
    """The same for a file that may be large: data, or what a long run writes. The limit is `MAX_BYTES`."""
    hint = "Use a shorter file, or set LOWBIT_MAX_BYTES to a higher limit."
    return read(path, limit=limit_of("LOWBIT_MAX_BYTES", MAX_BYTES), hint=hint)


def limit_of(name: str, default: int) -> int:
    """A limit that an environment variable may set."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, got {given!r}.")
    return int(given)


def _read_gzip(path: Path, file: BinaryIO, limit: int, hint: str) -> bytearray:
    """All members of a gzip file; it stops at more than `limit` bytes."""
    content, rest = bytearray(), file.read(_PIECE)
    try:
        while rest:
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                if not rest:
                    raise RunError(f"{path} is a corrupt gzip file (it ends too early). Get the file again.")
                content += member.decompress(rest, _PIECE)
                if len(content) > limit:
                    raise RunError(f"{path} is too long: more than {limit:,} bytes once decompressed. {hint}")
                rest = member.unconsumed_tail or member.unused_data or file.read(_PIECE)
            rest = rest.lstrip(b"\0") or file.read(_PIECE).lstrip(b"\0")  # members may be padded with zeros
    except zlib.error as error:
        raise RunError(f"{path} is a corrupt gzip file ({error}). Get the file again.") from error
    return content


def os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error in the chain of `error`: torch's zip writer hides it in a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
