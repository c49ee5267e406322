"""Small runs, and what the tests of runs do to them and ask of them."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from helpers import script
from lowbit.train import TrainConfig, checkpoint
from lowbit.train.callbacks import TrainingRows

STEPS = 5  # in an epoch of `config`
same = script("kills").same


def config(out: Path, **changes: Any) -> TrainConfig:
    """A run of 15 steps that takes a fraction of a second."""
    settings: dict[str, Any] = {"model": "mlp", "data": "digits", "subset": STEPS * 64, "batch_size": 64}
    settings |= {"epochs": 3, "lr": 0.05, "threads": 1, "out": out}
    return TrainConfig(**(settings | changes))


def last(out: Path) -> dict[str, Any]:
    """The last checkpoint of the run in `out`."""
    return checkpoint.load(out / "last.ckpt")


def signal_at(step: int, number: int, patch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Send this process a signal within a step."""

    def send(_: object, trainer_: Any, *__: object) -> None:
        if trainer_.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    patch.setattr(TrainingRows, "on_train_batch_end", send)


def same_end(out: Path, whole: Path) -> bool:
    """Whether two runs ended with the same weights, optimizer and ledger."""
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    ledgers = [(path / "ledger.jsonl").read_bytes() for path in (out, whole)]
    return ledgers[0] == ledgers[1] and all(same(last(out)[key], last(whole)[key]) for key in kept)


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing reach the disk any more."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
