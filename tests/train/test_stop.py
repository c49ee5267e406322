"""Signals end a run once what it did is saved."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STEPS, config, last, same_end, signal_at

from lowbit.cli import main as cli
from lowbit.errors import Stopped
from lowbit.train import trainer
from lowbit.train.module import Module


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGHUP is heard, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_the_run_after_its_step(
    name: str, code: int, complete: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is finished and saved, the exit code is the signal's, and resume goes on from there to the same end."""
    out = tmp_path / "run"
    handler = signal.getsignal(getattr(signal, name))
    flags = ["--model", "mlp", "--data", "digits", "--subset", "320", "--batch-size", "64", "--lr", "0.05"]
    with monkeypatch.context() as patch:
        signal_at(7, getattr(signal, name), patch)
        found = cli.main(["train", *flags, "--epochs", "3", "--threads", "1", "--out", str(out)])
    said = capsys.readouterr().err
    step = last(out)["global_step"]
    trainer.resume(out)

    assert (found, step) == (code, 7)
    assert f"{name}: stopped; `lowbit resume {out}` starts from step 7" in said
    assert signal.getsignal(getattr(signal, name)) is handler
    assert same_end(out, complete)


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal of the kind does not wait: the run goes on from the checkpoint before."""
    signal_at(7, signal.SIGTERM, monkeypatch, times=2)

    with pytest.raises(Stopped, match="starts from step 6"):
        trainer.train(config(tmp_path / "run", checkpoint_every=3))

    assert last(tmp_path / "run")["global_step"] == 6


def test_a_signal_in_an_evaluation_waits_for_it(complete: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The epoch's evaluation and checkpoint are made, and the next epoch is not begun."""
    out, sent = tmp_path / "run", []

    def send(*_: object) -> None:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    with monkeypatch.context() as patch:
        patch.setattr(Module, "on_validation_epoch_start", send_before(send, Module))
        with pytest.raises(Stopped, match=f"starts from step {STEPS}"):
            trainer.train(config(out))
    assert last(out)["global_step"] == STEPS
    trainer.resume(out)

    assert same_end(out, complete)


def send_before(send: Callable[..., None], module: Any) -> Callable[..., None]:
    """The method with a signal before it."""
    method = module.on_validation_epoch_start

    def both(self: object) -> None:
        send()
        method(self)

    return both


@pytest.mark.parametrize("moment", ["assemble", "write_sources", "_prove", "make_trainer"])
def test_a_signal_before_the_first_step_ends_at_once(moment: str, tmp_path: Path, monkeypatch: Any) -> None:
    """During set-up there is nothing to finish; the run begins at step 0 when it is given again or resumed."""
    out, original = tmp_path / "run", getattr(trainer, moment)

    def send(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, moment, send)
        with pytest.raises(Stopped, match="give the command again" if moment == "assemble" else "from step 0"):
            trainer.train(config(out, max_steps=1))

    assert (trainer.train(config(out, max_steps=1)) if moment == "assemble" else trainer.resume(out)).steps == 1


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    """The checkpoint is whole, and the run ends with it."""
    write = torch.save

    def send(content: Any, file: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        write(content, file)

    monkeypatch.setattr(torch, "save", send)

    with pytest.raises(Stopped, match="starts from step 3"):
        trainer.train(config(tmp_path / "run", checkpoint_every=3))

    assert last(tmp_path / "run")["global_step"] == 3


def test_a_signal_at_the_last_step_leaves_a_complete_run(tmp_path: Path, monkeypatch: Any) -> None:
    """The run is complete and says so, with the signal's exit code all the same."""
    signal_at(3 * STEPS, signal.SIGTERM, monkeypatch)

    with pytest.raises(Stopped, match="the run is complete"):
        trainer.train(config(tmp_path / "run"))

    assert trainer.resume(tmp_path / "run").steps == 3 * STEPS


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under nohup the end of the session does not end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(7, signal.SIGHUP, monkeypatch)
        result = trainer.train(config(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGHUP, before)

    assert result.steps == 3 * STEPS


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves a KeyboardInterrupt with the resume command, and Ctrl-C works again afterwards."""
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Module, "on_train_batch_start", interrupted)

    with pytest.raises(KeyboardInterrupt, match="lowbit resume"):
        trainer.train(config(tmp_path / "run"))

    assert signal.getsignal(signal.SIGINT) is handler
