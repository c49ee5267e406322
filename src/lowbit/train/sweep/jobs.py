"""Runs in processes of their own, a few at a time, which a signal to this process ends with their state saved.

Processes are forked from a server that has imported the trainer once, so a run starts at once and shares nothing with
the others. A run whose parent is gone stops as after SIGTERM.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from lowbit.errors import RunError, Stopped, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.metrics import METRICS
from lowbit.inputs.userfile import fault
from lowbit.train.config import TrainConfig
from lowbit.train.folder import CONFIG, is_complete
from lowbit.train.lock import refuse_held
from lowbit.train.stop import Leave, signals

# What runs import, which the server does once for all; without the last two a run takes half a second more.
_IMPORTED = ["lowbit.train.trainer", "sklearn.datasets", "torch.utils.tensorboard"]
_WAIT = 60.0  # seconds for a run of a killed sweep to save and leave its folder
_LONGEST = 500  # characters of an unexpected error
_KILL = 10.0  # seconds that a process has to end after it was told to stop at once

OUTPUT = "output.log"
"""File in a run folder that has what the process of its last start wrote, if it wrote something."""

Point = tuple[float, float]
"""What one evaluation found: the cost of the run so far, and the score."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    Args:
        folder: of the run.
        state: ``"done"``: it is complete; ``"stopped"``: it can go on; ``"failed"``: `text` says why.
        text: one line, or "".
        seconds: since it was started.
    """

    folder: Path
    state: Literal["done", "stopped", "failed"]
    text: str
    seconds: float


class Work(Protocol):
    """What decides which runs there are."""

    def next(self) -> TrainConfig | None:
        """The next run to start; None if there is none now."""

    def evaluated(self, folder: Path, points: list[Point]) -> bool:
        """Hear of the evaluations of a run that is going on; whether to end it."""

    def ended(self, run: Ended) -> None:
        """Hear that a run ended."""


def do(work: Work, *, jobs: int, cost: str | None = None) -> None:
    """Do all runs, `jobs` at a time.

    Args:
        work: says which.
        jobs: processes at once.
        cost: name of the metric in the points that `work` hears of; None: it hears of none.

    Raises:
        Stopped: a signal came, and every run has been saved. A second signal ends the runs at once.
    """
    running: dict[Path, _Run] = {}
    with signals() as stop:
        stop.patient = True
        try:
            while True:
                while stop.signal is None and len(running) < jobs and (config := work.next()) is not None:
                    run = _Run(_with_threads(config, jobs), cost)
                    running[run.folder] = run
                if not running:
                    break
                if stop.signal is not None:
                    for run in running.values():
                        run.stop()
                for run in _ready(running.values()):
                    _hear(work, run, running)
        except Leave:  # a second signal
            pass
        finally:
            _end(list(running.values()))
        if stop.signal is not None:
            raise Stopped(f"{stop.signal.name}: stopped; the same command goes on", stop.signal)


def _with_threads(config: TrainConfig, jobs: int) -> TrainConfig:
    """The settings with a fair share of the cores, where they leave the number of threads open."""
    if config.threads is not None or jobs == 1:
        return config
    return dataclasses.replace(config, threads=max(1, torch.get_num_threads() // jobs))


def _hear(work: Work, run: "_Run", running: dict[Path, "_Run"]) -> None:
    """Pass on what a run says."""
    said = run.said()
    if isinstance(said, Ended):
        del running[run.folder]
        work.ended(said)
    elif work.evaluated(run.folder, said):
        run.stop()


def _ready(runs: Iterable["_Run"]) -> list["_Run"]:
    """The runs that have something to say, after a moment."""
    by_connection: dict[Any, _Run] = {run.connection: run for run in runs}
    return [by_connection[each] for each in connection.wait(list(by_connection), timeout=0.5)]


def _end(runs: list["_Run"]) -> None:
    """End what still runs, after a second signal or an error of this process."""
    for run in runs:
        run.process.terminate()
    until = time.monotonic() + _KILL
    for run in runs:
        run.process.join(max(0.0, until - time.monotonic()))
        run.process.kill()
        run.process.join()


class _Run:
    """One run in its process."""

    def __init__(self, config: TrainConfig, cost: str | None) -> None:
        assert config.out is not None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self.folder, self.log = config.out, config.out.with_name(f"{config.out.name}.log")
        self.connection, theirs = context.Pipe(duplex=False)
        self._began, self._stopping = time.monotonic(), False
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.process: BaseProcess = context.Process(
            target=_work, args=(config, os.getcwd(), str(self.log), cost, theirs)
        )
        # The server is started with the first run, and would answer Ctrl-C while it imports. The tracker of
        # resources, which it starts first, unblocks the signal.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    def stop(self) -> None:
        """Tell it to save and leave, once."""
        if not self._stopping:
            self._stopping = True
            self.process.terminate()

    def said(self) -> Ended | list[Point]:
        """What it says: its evaluations so far, or its end."""
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            ended_by = self.process.exitcode
            if self._stopping and ended_by == -signal.SIGTERM:  # it had hardly begun
                said = ("stopped", "")
            else:
                said = ("failed", f"its process ended with code {ended_by}")
        if isinstance(said, list):
            return said
        self.process.join()
        state, text = said
        where = self._keep_output()
        if state == "failed" and where is not None:
            text = f"{text}; {where} has its output"
        return Ended(folder=self.folder, state=state, text=text, seconds=time.monotonic() - self._began)

    def _keep_output(self) -> Path | None:
        """Move what the process wrote into the run folder, if there is one; None if it wrote nothing."""
        if not self.log.exists() or not self.log.stat().st_size:
            self.log.unlink(missing_ok=True)
            return None
        return self.log.replace(self.folder / OUTPUT) if (self.folder / CONFIG).exists() else self.log


def _work(config: TrainConfig, at: str, log: str, cost: str | None, told: connection.Connection) -> None:
    """Do one run in this process, and tell how it ended."""
    os.chdir(at)  # the server may be somewhere else
    os.setpgrp()  # Ctrl-C is for the parent, which passes it on
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    os.dup2(number, 1)
    os.dup2(number, 2)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        _train(config, cost, told)
        said = ("done", "")
    except Stopped:
        assert config.out is not None
        said = ("done" if is_complete(config.out) else "stopped", "")
    except (UsageError, RunError) as error:
        said = ("failed", " ".join(str(error).split()))
    except Exception as error:
        traceback.print_exc()
        said = ("failed", fault(error) or " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST])
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # the parent is gone
        told.send(said)


def _follow_parent() -> None:
    """Stop this process as SIGTERM does once its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: TrainConfig, cost: str | None, told: connection.Connection) -> None:
    """Begin the run, or go on with it."""
    from lowbit.train import trainer

    assert config.out is not None

    def evaluated(ledger: Ledger) -> None:
        assert cost is not None
        told.send(points_of(ledger, cost))

    hear: Callable[[Ledger], None] = (lambda _: None) if cost is None else evaluated
    _wait_until_free(config.out)
    if (config.out / CONFIG).exists():
        trainer.resume(config.out, evaluated=hear)
    else:
        trainer.train(config, evaluated=hear)


def _wait_until_free(folder: Path) -> None:
    """Wait for the process of an earlier sweep that was killed, and that is saving its last step."""
    until = time.monotonic() + _WAIT
    while True:
        try:
            refuse_held(folder)
            break
        except RunError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def points_of(ledger: Ledger, cost: str) -> list[Point]:
    """The evaluations of a ledger that have a score, with the cost of the steps before each."""
    (metric,) = [metric for metric in METRICS if metric.name == cost]
    scored = [(each.step, each.score) for each in ledger.evaluations if each.score is not None]
    return [(metric(ledger.until(step).totals()).total, score) for step, score in scored]
