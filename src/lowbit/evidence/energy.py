"""The energy that work takes, if the machine reports it: measured, not modelled."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Energy:
    """Joules that the machine reports for some work; complete when `measured_energy` ends.

    Attributes:
        joules: of processors, memory and accelerators, all that the machine reports; None if it reports none.
        reason: where that comes from, or why there is none.
    """

    joules: float | None = None
    reason: str = "not available here"


@contextmanager
def measured_energy() -> Iterator[Energy]:
    """Measure energy with RAPL (processors, memory) and NVML (NVIDIA cards) through the optional package `zeus`.

    The counters are those of the machine, so they include what other processes use. If the package or the counters are
    missing or cannot be read, the result says so, and nothing fails.
    """
    energy = Energy()
    try:
        from zeus.monitor import ZeusMonitor  # type: ignore[import-not-found,unused-ignore]  # optional

        monitor = ZeusMonitor()
        if not (monitor.gpu_indices or monitor.cpu_indices):
            raise RuntimeError("neither RAPL nor NVML reports anything on this machine")
        monitor.begin_window("lowbit")
    except Exception as error:  # each kind of missing counter raises another exception
        hint = ": pip install 'lowbit[energy]'" if isinstance(error, ImportError) else f" ({_first_line(error)})"
        energy.reason = f"not available here{hint}"
        yield energy
        return
    try:
        yield energy
    finally:
        window = monitor.end_window("lowbit")
        parts = {
            "GPU": window.gpu_energy,
            "CPU": window.cpu_energy,
            "DRAM": window.dram_energy,
        }
        read = {name: sum(each.values()) for name, each in parts.items() if each}
        energy.joules = float(sum(read.values()))
        energy.reason = f"{' + '.join(read)}, whole machine, through zeus"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
