"""Classes from a user's own Python file, written ``FILE.py:CLASS``, and what to say if such a class fails.

The file is executed. It stands alone: it can import what is installed, but not the files beside it.
"""

import contextlib
import inspect
import itertools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lowbit.errors import RunError, UsageError, shown, unknown
from lowbit.inputs import files

_LIMIT = 1 << 20  # bytes of a file
_PREFIX = "_lowbit_file_"  # of the modules that the files become
_numbers = itertools.count()


def split(text: str) -> tuple[Path, str] | None:
    """The file and the class of ``FILE.py:CLASS``; None if a text is another kind of name."""
    path, colon, name = text.rpartition(":")
    return (Path(path), name) if colon and path.endswith(".py") else None


def load_class(text: str) -> type:
    """The class that ``FILE.py:CLASS`` names.

    Args:
        text: path of a Python file, a colon, and the name of a class that the file defines or imports.

    Raises:
        UsageError: a text of another form, no such file, a file that fails when it is executed, or no such class.
        RunError: the file cannot be read, or is longer than 1 MiB.
    """
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name:
        raise UsageError(f"{shown(text)}: write FILE.py:CLASS, e.g. mine.py:Mine")
    file = Path(path)
    if file.suffix != ".py" or not _is_file(file):
        raise UsageError(
            f"{shown(text)}: there is no Python file {shown(path)}; write FILE.py:CLASS, e.g. mine.py:Mine"
        )
    return class_of(read(file), file, name)


def read(file: Path) -> bytes:
    """The content of a user's file.

    Raises:
        RunError: it cannot be read, or is longer than 1 MiB.
    """
    return bytes(files.read(file, limit=_LIMIT, hint="Give a shorter file."))


def class_of(source: bytes, file: Path, name: str) -> type:
    """The class of that name in a Python source, which is executed.

    Args:
        source: what to execute.
        file: where it is, for messages and tracebacks.
        name: of the class.

    Raises:
        UsageError: the source fails when it is executed, or lacks the class.
    """
    # A new module under a name that nothing else imports: dataclasses look up their module by name.
    module = ModuleType(f"{_PREFIX}{next(_numbers)}_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        with blamed(f"{file} fails when it is executed:", module.__file__):
            exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
        return _class_in(module, name)
    except UsageError:
        del sys.modules[module.__name__]
        raise


def _class_in(module: ModuleType, name: str) -> type:
    found = {key: value for key, value in vars(module).items() if inspect.isclass(value)}
    if name in found:
        return found[name]
    own = [key for key, value in found.items() if value.__module__ == module.__name__]
    if not own:
        raise UsageError(f"{module.__file__} defines no class, so it lacks {shown(name)}: write that class")
    raise unknown(f"class of {module.__file__}", name, own)


@contextlib.contextmanager
def blamed(what: str, file: str | None, kind: type[UsageError] | type[RunError] = UsageError) -> Iterator[None]:
    """Turn whatever a user's code raises, or its exit, into an error of one line; lowbit's own errors pass.

    Args:
        what: the beginning of the message, e.g. ``"the constructor of mine.py:Mine raises"``.
        file: the code's file; the message has the last of its lines that the error passed.
        kind: the error that it becomes.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{what} {_described(error, file)}") from error


def file_of(made: object) -> str | None:
    """The Python file that defines the class of an object; None if there is none."""
    module: Any = sys.modules.get(type(made).__module__)
    return getattr(module, "__file__", None)


def fault(error: BaseException) -> str | None:
    """What to say of an error that a user's file, or code that it called, raised; None for any other error."""
    files_here = {module.__file__ for name, module in sys.modules.items() if name.startswith(_PREFIX)}
    passed = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files_here]
    return f"{passed[-1]} raises {_described(error, passed[-1])}" if passed else None


def _described(error: BaseException, file: str | None) -> str:
    """An error in one line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = (str(error.msg) if isinstance(error, SyntaxError) else str(error)).strip().split("\n")[0]
    where = f" (line {place})" if place is not None else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name of thousands of letters, or with a NUL byte
        return False
