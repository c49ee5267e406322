"""Checkpoint files: written whole or not at all, read without executing anything."""

import contextlib
import errno
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from lowbit.errors import RunError


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Replace the file `path` by what `write` writes, or leave it as it was.

    The bytes go to a temporary file beside `path` and reach the disk before the rename does. A killed process
    leaves the old file and at most that one temporary file, which the next write reuses.

    Raises:
        RunError: the disk is full or the folder cannot be written; the temporary file is gone.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None or not isinstance(error, Exception):
            raise
        kept = "; the last good one is intact" if path.exists() else ""
        hint = " Free some space, then resume." if cause.errno == errno.ENOSPC else ""
        raise RunError(f"cannot write {path}: {cause.strerror or cause}{kept}.{hint}") from error


def save(path: Path, checkpoint: Mapping[str, object]) -> None:
    """Write tensors and plain values to `path`, see `write_atomically`."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load(path: Path) -> dict[str, object]:
    """Read a checkpoint that `save` wrote.

    Raises:
        RunError: the file is absent, damaged, no torch file, or holds more than tensors and plain values.
    """
    expected = "expected a checkpoint that `lowbit train` wrote"
    try:
        # torch does not compare the checksums that it writes: a flipped bit would go unseen.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"there is no checkpoint {path}; {expected}.") from error
    except Exception as error:  # torch and zipfile raise a dozen types on a damaged or foreign file
        raise RunError(f"{path} is truncated, damaged or foreign; {expected}.") from error
    if damaged:
        raise RunError(f"{path} is damaged (the checksum of {damaged} is wrong); {expected}.")
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}; {expected}.")
    return content


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error in the chain of `error`: torch's zip writer hides it in a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
