"""The line that every figure needs beside it."""

from lowbit.machine import here


def describe() -> str:
    """Versions of lowbit, torch and Python, processor and its instruction sets, and threads of torch."""
    return str(here())
