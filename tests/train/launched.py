"""The command line in several processes."""

import contextlib
import io

from lowbit.cli import main as cli


def command(*words: str) -> tuple[int, str]:
    """The exit code of a command, and all that it wrote."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = cli.main(list(words))
    return code, written.getvalue()
