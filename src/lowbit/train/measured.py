"""What a run took in seconds and joules, and on which machine: one line for each start of it, beside the ledger.

The ledger has no clock. Lines of older runs lack the machine.

A start that is killed leaves no line; one that is stopped or fails does.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit import machine
from lowbit.errors import RunError
from lowbit.evidence.energy import Energy, measured_energy
from lowbit.inputs import files
from lowbit.inputs.checks import check_type
from lowbit.tables import json_line

MEASURED = "measured.jsonl"

# What a line has, and what it is.
_START: dict[str, Any] = {
    "from_step": int,
    "to_step": int,
    "seconds_per_step": float | None,
    "joules": float | None,
    "reason": str,
}


@contextmanager
def measured(out: Path, *, steps: Callable[[], int], seconds_per_step: Callable[[], float | None]) -> Iterator[None]:
    """Measure what happens in this context and append it to the run folder `out`.

    Args:
        out: run folder.
        steps: gives the number of steps done, before and after.
        seconds_per_step: gives the median seconds of a step; None where too few ran.
    """
    began = steps()

    def write(energy: Energy) -> None:
        line: dict[str, Any] = {
            "from_step": began,
            "to_step": steps(),
            "seconds_per_step": seconds_per_step(),
            "machine": str(machine.here()),
        }
        path = out / MEASURED
        before = bytes(_content(path)) if path.exists() else b""
        whole = before + b"\n" if before and not before.endswith(b"\n") else before  # a damaged line stays alone
        files.write_bytes(path, whole + json_line(line | asdict(energy)).encode() + b"\n")

    energy = Energy()
    try:
        with measured_energy() as energy:
            yield
    except BaseException:
        with suppress(OSError, RunError):  # what stopped the run is the news, not that its time could not be written
            write(energy)
        raise
    try:
        write(energy)
    except OSError as error:
        raise RunError(f"cannot write {out / MEASURED}: {error.strerror or error}") from error


def _content(path: Path) -> bytearray:
    return files.read(path, limit=1 << 24, hint="Move it away.")


def read(out: Path) -> dict[str, str]:
    """What was measured in a run folder, as text by name; empty where nothing was.

    Raises:
        RunError: a line is damaged.
    """
    path = out / MEASURED
    if not path.exists():
        return {}
    try:
        lines = _content(path).decode().splitlines()
        starts: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for start in starts:
            for name, hint in _START.items():
                check_type(name, start[name], hint)
        joules = [start["joules"] for start in starts]
        seconds = [start["seconds_per_step"] for start in starts if start["seconds_per_step"] is not None]
        steps = sum(start["to_step"] - start["from_step"] for start in starts)
        reason = starts[-1]["reason"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}): delete it to see the rest of the cost") from error
    return {
        "seconds per step": f"{seconds[-1]:.4g} (median, last start)" if seconds else "too few steps to say",
        "energy": reason if None in joules else f"{sum(joules):.4g} J over {steps:,} steps ({reason})",
    }
