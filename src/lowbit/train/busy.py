"""Whether other processes leave so few cores free that several threads of torch would wait for one another."""

import os
import time
from pathlib import Path

_SPARE = 0.5  # cores that others may take of those that torch counts on


class Others:
    """Measures what other processes compute from now on; it says nothing where the system does not tell."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy(), _own()

    def cores(self) -> float | None:
        """How many cores other processes kept busy on average since then; None where nothing is known."""
        seconds, busy = time.monotonic() - self._began, _busy()
        if busy is None or self._busy is None or seconds < 0.1:  # the system counts in hundredths of a second
            return None
        return max(0.0, (busy - self._busy - (_own() - self._own)) / seconds)

    def advice(self, threads: int) -> str | None:
        """A line that says how many threads to take where fewer than `threads` cores are free; None where they are.

        All threads wait for the slowest at the end of each operation, so one that shares its core slows all down.
        """
        cores, others = os.cpu_count() or 1, self.cores()
        if others is None or threads == 1 or others + threads <= cores + _SPARE:
            return None
        free = max(1, min(threads - 1, int(cores - others)))
        return (
            f"lowbit: other processes take {others:.1f} of {cores} cores, and torch has {threads} threads that wait "
            f"for one another: --threads {free} is likely to be faster while that lasts"
        )


def _busy() -> float | None:
    """Seconds that all cores together have computed since the system began; None where it does not say."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    user, nice, system, _, _, interrupts, soft, *_ = map(
        int, file.read_text(encoding="ascii").split("\n")[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds that this process and those it waited for have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
