"""The command line: ``lowbit COMMAND``; `lowbit.cli.parser.COMMANDS` has the commands."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lowbit.cli.extras import how_to_install
from lowbit.cli.parser import COMMANDS, overview, parser_of
from lowbit.errors import ElsewhereError, RunError, Stopped, UsageError, unknown
from lowbit.inputs import userfile
from lowbit.launch import is_first, launched

_LONGEST = 2000  # characters of a message
_SHARED = ("train", "resume")  # the commands that several processes share


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Returns:
        0 if it did what was asked, 1 if a correct request failed (`RunError`), 2 if the request was wrong
        (`UsageError`), 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 if who reads the output went away.
        Failures are one line on stderr; ``LOWBIT_TRACEBACK=1`` shows where.
    """
    try:
        code = _command((sys.argv[1:] if argv is None else argv) or ["--help"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `lowbit cost ... | head`: Python would write what is left once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UsageError as error:
        return _fail(error, str(error), 2)
    except RunError as error:
        return _fail(error, str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lowbit":
            raise
        return _fail(error, f"{error}: this command needs {how_to_install(error.name or '')}.", 1)
    except Stopped as stop:
        return _fail(stop, str(stop), 128 + stop.number)
    except KeyboardInterrupt as stop:
        print(f"\nlowbit: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        if (fault := userfile.fault(error)) is None:
            raise
        return _fail(error, fault, 1)
    finally:
        if argv is None:  # it is the whole process, and Ctrl-C while that ends would only print tracebacks
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _command(argv: Sequence[str]) -> int:
    name, *rest = argv
    if name in ("-h", "--help", "--help-all"):
        print(overview())
        return 0
    if name == "--version":
        print(f"lowbit {version('lowbit')}")
        return 0
    if name == "--print-completion":
        from lowbit.cli import completion

        print(completion.script(rest))
        return 0
    if name.startswith("-"):
        raise unknown("flag", name, ("--help", "--version", "--print-completion"))
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    if launched() > 1 and name not in _SHARED:
        raise UsageError(f"lowbit {name} is one process: of torchrun's, each would do all of it. Start it alone.")
    try:
        settings = parser_of(name).read(rest)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    COMMANDS[name].run(**settings)
    return 0


def _fail(error: Exception | Stopped, message: str, code: int) -> int:
    if os.environ.get("LOWBIT_TRACEBACK") == "1" and isinstance(error, Exception):
        raise error
    if isinstance(error, ElsewhereError | Stopped) and not is_first():
        return code
    kind = "" if isinstance(error, Stopped) else "error: "
    print(f"lowbit: {kind}{_tidy(message)}", file=sys.stderr)
    return code


def _tidy(message: str) -> str:
    """One line of a bearable length."""
    message = " ".join(message.split())
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
