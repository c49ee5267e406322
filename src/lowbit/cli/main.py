"""The command line: ``lowbit COMMAND``; `lowbit.cli.parser.COMMANDS` has the commands."""

import os
import re
import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from lowbit.cli.parser import COMMANDS, make_parser
from lowbit.errors import RunError, Stopped, UsageError
from lowbit.inputs import userfile

_LONGEST = 2000  # characters of a message


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
    except (UsageError, ArgumentError) as error:
        return _fail(error, str(error), 2)
    except RunError as error:
        return _fail(error, str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lowbit":
            raise
        return _fail(error, f"{error}: the command line needs `pip install 'lowbit[train]'`.", 1)
    except Stopped as stop:
        print(f"lowbit: {stop}", file=sys.stderr)
        return 128 + stop.number
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
    try:
        args = make_parser().parse_args([_underscored(arg) for arg in argv])
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    COMMANDS[args.subcommand].run(**args[args.subcommand])
    return 0


def _underscored(arg: str) -> str:
    """``--batch-size`` means ``--batch_size``."""
    name, equals, value = arg.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else arg


def _fail(error: Exception, message: str, code: int) -> int:
    if os.environ.get("LOWBIT_TRACEBACK") == "1":
        raise error
    print(f"lowbit: error: {_tidy(message)}", file=sys.stderr)
    return code


def _tidy(message: str) -> str:
    """One line, in the words of the command line where jsonargparse speaks of parser keys and types."""
    message = " ".join(message.split())
    message = re.sub(r'^Parser key "(\w+)":', r"--\1:", message)
    message = re.sub(r"Does not validate against any of the Union subtypes.*Given value: .+", _tidy_union, message)
    message = re.sub(r"Expected an? <class '(\w+)'>", r"expected \1", message)
    message = message.replace("Expected a typing.Literal", "expected one of ").replace("Got value: ", "got ")
    required = re.fullmatch(r"the following arguments are required: (.+)", message)
    if required:
        names = [name.rpartition(".")[2] for name in required[1].split(", ")]
        message = f"missing: {', '.join(name if name == 'run' else f'--{name}' for name in names)}"
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."


def _tidy_union(match: re.Match[str]) -> str:
    """What a setting of several types allows, and what it got."""
    errors, _, given = match[0].rpartition("Given value: ")
    kinds = re.findall(r"- Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", errors)
    allowed = dict.fromkeys(name or f"one of {choices}" for name, choices in kinds if name != "NoneType")
    return f"expected {' or '.join(allowed)}, got {given}"
