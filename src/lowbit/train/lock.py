"""The lock of a run folder: one process writes to it at a time.

The kernel holds the lock (``flock``), so it ends with the process, however that ends. Linux passes it on to the
server of NFS and SMB, and to Lustre mounted with ``flock``: there it also keeps processes of other machines out. A file
system that has no locks is reported on stderr; one whose locks are those of each machine cannot be told from here.
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from lowbit.errors import RunError

LOCK = ".lock"
"""File in the run folder that is locked; it says who holds the lock, and is gone once the folder is free."""

_HELD = {errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN}
_NONE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a run folder within this context.

    Raises:
        RunError: another process holds the folder, which the message names; or the lock cannot be made.
    """
    path = folder / LOCK
    while True:
        number = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            if not _try(number, fcntl.LOCK_EX):
                raise _in_use(folder, number)
            # Who held it before may have removed the file between our opening and our locking.
            if _is_at(number, path):
                break
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(_own()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(number)


def refuse_held(folder: Path) -> None:
    """Raise where another process holds the folder, without writing anything.

    Raises:
        RunError: as `locked`.
    """
    try:
        number = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not _try(number, fcntl.LOCK_SH, quiet=True):
            raise _in_use(folder, number)
    finally:
        os.close(number)


def _open(path: Path, flags: int) -> int:
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(f"cannot lock the run folder: {path}: {error.strerror or error}.") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise RunError(f"cannot lock the run folder: {path} is not an ordinary file. Remove it.")
    return number


def _try(number: int, kind: int, *, quiet: bool = False) -> bool:
    """Whether the lock was free, and is now ours; True with a word on stderr where the file system has no locks."""
    try:
        fcntl.flock(number, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NONE:
            raise RunError(f"cannot lock the run folder: {error.strerror or error}.") from error
        if not quiet:
            print(
                f"lowbit: the file system of the run folder has no locks ({error.strerror}): make sure that no other "
                "process uses the folder",
                file=sys.stderr,
            )
    return True


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _own() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": shlex.join(sys.argv)[:300],
    }


def _in_use(folder: Path, number: int) -> RunError:
    """An error that names who holds the lock; who has just taken it may need a moment to write that."""
    who = "another process"
    for _ in range(10):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(os.pread(number, 4096, 0))
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
            break
        time.sleep(0.05)
    who = "".join(c if c.isprintable() else "?" for c in who)
    return RunError(f"{folder} is in use by {who}. Wait until that ends, or stop it, then resume.")
