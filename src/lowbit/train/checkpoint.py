"""Checkpoint files: written whole or not at all, the last few kept, read without executing anything.

The newest is ``last.ckpt``; the ones before it are ``last-1.ckpt``, ``last-2.ckpt`` and so on.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import RunError
from lowbit.inputs import files

_SEAL = "seal"


class DamagedError(RunError):
    """A file that holds no checkpoint: an older one may serve."""


def save(path: Path, checkpoint: Mapping[str, object], *, keep: int = 1) -> None:
    """Write tensors and plain values to `path`, see `lowbit.inputs.files.write_atomically`.

    Args:
        path: the newest checkpoint's file.
        checkpoint: what to save.
        keep: how many checkpoints to keep, this one included.
    """
    sealed = {**checkpoint, _SEAL: _seal(checkpoint)}
    files.write_atomically(path, lambda file: torch.save(sealed, file), before=lambda: _move_on(path, keep))


def kept(path: Path) -> list[Path]:
    """The checkpoints beside `path`, the newest first; links, folders and damaged files included."""
    numbered = re.compile(re.escape(path.stem) + r"-([1-9]\d*)" + re.escape(path.suffix))
    older = [(int(match[1]), other) for other in path.parent.iterdir() if (match := numbered.fullmatch(other.name))]
    return ([path] if os.path.lexists(path) else []) + [other for _, other in sorted(older)]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it does not take the place of a good one; its new name."""
    aside = path.with_name(path.name + ".damaged")
    os.replace(path, aside)
    return aside


def load(path: Path) -> dict[str, object]:
    """Read a checkpoint that `save` wrote.

    Raises:
        DamagedError: the file is absent, damaged, no torch file, a link, holds more than tensors and plain values, or
            was changed since: another key, type, shape or number; only the elements of tensors are free.
    """
    expected = "expected a checkpoint that `lowbit train` wrote"
    try:
        with files.open_file(path, follow=False) as file:
            # torch does not compare the checksums that it writes: a flipped bit would go unseen.
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            file.seek(0)
            content = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DamagedError(f"there is no checkpoint {path}; {expected}.") from error
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror or error}); {expected}.") from error
    except Exception as error:  # torch and zipfile raise a dozen types on a damaged or foreign file
        raise DamagedError(f"{path} is truncated, damaged or foreign; {expected}.") from error
    if damaged:
        raise DamagedError(f"{path} is damaged (the checksum of {damaged} is wrong); {expected}.")
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds a {type(content).__name__}; {expected}.")
    if content.pop(_SEAL, None) != _seal(content):
        raise DamagedError(f"{path} is foreign, or was changed after it was written; {expected}.")
    return content


def not_finite(content: object, name: str = "") -> Iterator[str]:
    """The names of tensors in a tree of dicts and lists that hold an inf or nan, with dots between the keys."""
    if isinstance(content, Tensor):
        if not bool(content.isfinite().all()):
            yield name
    elif isinstance(content, Mapping | list | tuple):
        entries = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in entries:
            yield from not_finite(value, f"{name}.{key}" if name else str(key))


def _seal(content: object) -> str:
    """A hash of all keys, types and plain values of a tree, and of its tensors' types and shapes, in hexadecimal.

    Lightning and the optimizers of torch believe what a checkpoint says, to a traceback or to other numbers.
    """
    seal = hashlib.sha256()
    for line in _lines(content):
        seal.update(f"{line!r}\n".encode(errors="backslashreplace"))
    return seal.hexdigest()


def _lines(content: object) -> Iterator[tuple[object, ...]]:
    if isinstance(content, Tensor):
        yield "Tensor", str(content.dtype), tuple(content.shape)
    elif isinstance(content, Mapping | list | tuple):
        kind = "dict" if isinstance(content, Mapping) else type(content).__name__
        yield kind, len(content)
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield "key", key
            yield from _lines(value)
    else:
        yield type(content).__name__, content


def _move_on(path: Path, keep: int) -> None:
    """Make room at `path`: each checkpoint takes the name of the one before it, and the oldest go."""
    names = [path, *(path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, keep))]
    for newer, older in reversed(list(pairwise(names))):
        if newer.is_file() and not newer.is_symlink():
            os.replace(newer, older)
    for other in kept(path):
        if other not in names and other.is_file():
            other.unlink()
