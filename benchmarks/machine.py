"""The line that every figure needs beside it: machine and versions."""

import platform
from pathlib import Path

import torch

from lowbit import __version__


def describe() -> str:
    """Versions of lowbit, torch and Python, processor, and threads of torch."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    versions = f"lowbit {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {processor}, {torch.get_num_threads()} threads"
