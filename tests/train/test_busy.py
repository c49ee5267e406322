"""The warning of cores that other processes take."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import config

from helpers import threads
from lowbit.train import busy, trainer
from lowbit.train.progress import Progress


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Four cores, and clocks that the test sets: seconds that passed, of all cores, and of this process."""
    clocks = [0.0, 0.0, 0.0]
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(busy.time, "monotonic", lambda: clocks[0])
    monkeypatch.setattr(busy, "_busy", lambda: clocks[1])
    monkeypatch.setattr(busy, "_own", lambda: clocks[2])
    return clocks


@pytest.mark.parametrize(
    ("others", "threads", "advice"),
    [(0, 4, None), (0.4, 4, None), (1, 4, 3), (2.6, 4, 1), (9, 4, 1), (9, 1, None), (2, 2, None), (2.6, 2, 1)],
)
def test_busy_cores_are_told_with_the_threads_to_take(
    others: float, threads: int, advice: int | None, measured: list[float]
) -> None:
    """The warning comes where others and torch want more cores than there are, and what this process took is not it."""
    found = busy.Others()
    measured[:] = [2.0, 2 * (others + 1), 2.0]

    said = found.advice(threads)

    assert (said is None) if advice is None else f"--threads {advice} " in str(said)


def test_an_unknown_system_says_nothing(measured: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell, or too little time passed, nothing is known."""
    assert busy.Others().cores() is None
    monkeypatch.setattr(busy, "_busy", lambda: None)
    found = busy.Others()
    measured[0] = 5.0

    assert found.cores() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system has no /proc/stat")
def test_another_process_is_seen_and_this_one_is_not() -> None:
    """A process that computes counts for about a core more; the same work in this process does not."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            found = busy.Others()
            time.sleep(1)
            seen = found.cores()
        finally:
            other.kill()
    before = sum(os.times()[:2])
    found = busy.Others()
    while sum(os.times()[:2]) - before < 0.3:
        pass

    assert seen is not None
    assert 0.1 < seen <= (os.cpu_count() or 1) + 0.2
    assert busy._own() >= before + 0.3


class Told(Progress):
    """Keeps the lines that stay."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.lines.append(text)


@pytest.mark.parametrize("given", [None, 2])
def test_only_a_number_that_torch_chose_is_questioned(
    given: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on torch's own number of threads tells the advice before it begins; with `threads` it does not."""
    monkeypatch.setattr(busy.Others, "advice", lambda _, threads: f"too many: {threads}")
    told = Told()

    with threads(2):
        trainer.train(config(tmp_path / "run", threads=given, max_steps=1), progress=told)

    assert ("too many: 2" in told.lines) == (given is None)
