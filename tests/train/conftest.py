"""Runs that several files of tests begin with."""

import shutil
import signal
from pathlib import Path

import pytest
from runs import config, signal_at

from lowbit.errors import Stopped
from lowbit.train import trainer


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run that saved a checkpoint in the middle of each epoch."""
    out = tmp_path_factory.mktemp("run") / "complete"
    trainer.train(config(out, checkpoint_every=3))
    return out


@pytest.fixture
def stopped(complete: Path, tmp_path: Path) -> Path:
    """A copy of the complete run that lacks its result, so that resume opens the checkpoint."""
    out = tmp_path / "stopped"
    shutil.copytree(complete, out)
    (out / "result.json").unlink()
    return out


@pytest.fixture
def copied(complete: Path, tmp_path: Path) -> Path:
    """A copy of the complete run."""
    return Path(shutil.copytree(complete, tmp_path / "copied"))


@pytest.fixture
def halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that a signal ended after step 7; its checkpoints are of steps 7 and 6."""
    with monkeypatch.context() as patch:
        signal_at(7, signal.SIGTERM, patch)
        with pytest.raises(Stopped):
            trainer.train(config(tmp_path / "run", checkpoint_every=3))
    return tmp_path / "run"
