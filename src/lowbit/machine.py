"""Timing on this machine: paired rounds, and what a figure depends on besides the code."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from lowbit.errors import UsageError
from lowbit.kernels import native_instruction_sets

WARM_UP = 2
"""Rounds of `paired` that are not counted."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as this process uses it.

    Args:
        processor: its name.
        instruction_sets: those that the native kernels use, with blanks between, or a text that says they are missing.
        threads: of torch.
        torch: version of torch.
        lowbit: version of this package.
    """

    processor: str
    instruction_sets: str
    threads: int
    torch: str
    lowbit: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        versions = f"lowbit {self.lowbit}, torch {self.torch}, Python {platform.python_version()}"
        return f"{versions}, {self.processor} ({self.instruction_sets}), {threads}"


def here() -> Machine:
    """This machine, with the number of threads that torch has now."""
    sets = native_instruction_sets()
    return Machine(
        processor=_processor(),
        instruction_sets="no native kernels" if sets is None else " ".join(sets) or "no vectors",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        lowbit=version("lowbit"),
    )


@cache
def _processor() -> str:
    file = Path("/proc/cpuinfo")
    info = file.read_text(encoding="utf-8") if file.exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def paired(
    steps: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = WARM_UP, ready: bool = False
) -> dict[str, list[float]]:
    """Seconds of each step in each round, so that a slow moment of the machine affects all steps.

    Args:
        steps: what to time, by name. Each runs once in a round.
        rounds: rounds that count, at least 1; round i begins with step i, so that none is always first.
        warm_up: rounds before them, which do not count.
        ready: whether to run each step once more right before it is timed, so that a short step does not pay for memory
            that the previous one gave back to the system.

    Raises:
        UsageError: fewer than 1 round.
    """
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}.")
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warm_up, rounds):
        turn = i % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            if ready:
                steps[name]()
            began = time.perf_counter()
            steps[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of one step's time over another's in the same round, seconds of `paired`."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
