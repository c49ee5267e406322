"""`python -m lowbit`; torchrun starts it in several processes."""

import os
import sys

from lowbit.cli.main import main
from lowbit.launch import launched


def run() -> None:
    """Run the command line, and end the process with its exit code."""
    code = main()
    if launched() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may outlive their group, and the interpreter's end then aborts now and then


if __name__ == "__main__":
    run()
