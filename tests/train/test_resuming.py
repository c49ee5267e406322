"""A stopped run continues bit for bit, from its last good checkpoint, and not with what does not fit."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import STEPS, config, fill_disk, flip_a_bit, last, same, same_end

from lowbit.cli import main as cli
from lowbit.errors import RunError, UsageError
from lowbit.train import checkpoint, trainer
from lowbit.train.data import named
from lowbit.train.data.source import Sets

KILLED_IN_STEP = """
from lowbit.train.module import Module
training_step = Module.training_step
def step(self, batch):
    if self.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, batch)
Module.training_step = step
"""

KILLED_IN_WRITE = """
save = torch.save
def write(content, file):
    if content["global_step"] == 9:
        file.write(b"half of a")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file)
torch.save = write
"""


@pytest.mark.parametrize("moment", [KILLED_IN_STEP, KILLED_IN_WRITE], ids=["in a step", "in a write"])
def test_killed_run_resumes_bit_for_bit(moment: str, complete: Path, tmp_path: Path) -> None:
    """A process killed within an epoch, or while it writes, resumes from its last checkpoint to the same end."""
    out = tmp_path / "run"
    settings = config(out, checkpoint_every=3).to_dict()
    script = f"""
import os, signal, torch
from pathlib import Path
from lowbit.schedules import Cyclic
from lowbit.train import TrainConfig, trainer
{moment}
trainer.train(TrainConfig.from_dict({settings!r}, out=Path({str(out)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    before = last(out)["global_step"]
    trainer.resume(out)

    assert killed.returncode == -signal.SIGKILL
    assert before == 6  # of 3, 5, 6, 9, ...: checkpoints are every 3 steps and at the end of an epoch
    assert same(last(out), last(complete))
    assert (out / "ledger.jsonl").read_bytes() == (complete / "ledger.jsonl").read_bytes()
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", "int8"), ("adamw", "dynamic8")])
def test_killed_run_with_a_low_bit_optimizer_resumes_bit_for_bit(optimizer: str, states: str, tmp_path: Path) -> None:
    """States of 8 bits and bfloat16 weights continue from the codes and the noise of the checkpoint."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    changes: dict[str, Any] = {"optimizer": optimizer, "optimizer_states": states, "weights": "bf16", "lr": 0.005}
    trainer.train(config(whole, checkpoint_every=3, **changes))
    settings = config(out, checkpoint_every=3, **changes).to_dict()
    script = f"""
import os, signal
from pathlib import Path
from lowbit.train import TrainConfig, trainer
{KILLED_IN_STEP}
trainer.train(TrainConfig.from_dict({settings!r}, out=Path({str(out)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    trainer.resume(out)

    assert killed.returncode == -signal.SIGKILL
    assert same_end(out, whole)
    state = last(out)["optimizer_states"][0]["state"][2]
    name = "momentum_buffer" if optimizer == "sgd" else "exp_avg_sq"
    assert state[name]["codes"].dtype == torch.uint8
    weight = last(out)["state_dict"]["model.hidden.1.0.weight"]
    assert torch.equal(weight.bfloat16().float(), weight)


def test_a_run_that_is_older_than_a_setting_resumes(complete: Path, tmp_path: Path) -> None:
    """A folder without the settings of optimizer states and weights, as earlier versions wrote, is read."""
    out = tmp_path / "run"
    shutil.copytree(complete, out)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("optimizer_states", "weights"):
        del settings[name]
    (out / "config.yaml").write_text(yaml.safe_dump(settings))

    assert trainer.resume(out).steps == 15


def test_run_without_a_checkpoint_starts_again(complete: Path, stopped: Path) -> None:
    """A run killed before its first checkpoint resumes from step 0 to the same end."""
    for path in checkpoint.kept(stopped / "last.ckpt"):
        path.unlink()

    trainer.resume(stopped)

    assert same(last(stopped), last(complete))


def test_complete_run_gives_its_result_without_training(complete: Path) -> None:
    """Resuming a complete run returns the stored result and touches nothing."""
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*")}

    result = trainer.resume(complete)

    assert result.steps == 3 * STEPS
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("*")} == before


def test_moved_run_resumes(stopped: Path, tmp_path: Path) -> None:
    """A run folder may be moved: its place is no setting of the run."""
    moved = stopped.rename(tmp_path / "elsewhere")

    assert trainer.resume(moved).out == moved


def test_full_disk_stops_a_run_that_then_resumes(complete: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run stopped by a full disk resumes to the same end once there is space."""
    out = tmp_path / "run"
    save = checkpoint.save

    def fill(path: Path, content: Any, **how: Any) -> None:
        if content["global_step"] == 9:
            fill_disk(patch)
        save(path, content, **how)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fill)
        with pytest.raises(RunError, match="No space left"):
            trainer.train(config(out, checkpoint_every=3))
    trainer.resume(out)

    assert same(last(out), last(complete))


def test_checkpoint_of_another_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    """A checkpoint with another seed is refused with both values."""
    trainer.train(config(tmp_path / "other", seed=1, checkpoint_every=3))
    shutil.copy(tmp_path / "other" / "last.ckpt", stopped / "last.ckpt")

    with pytest.raises(RunError, match=r"another run: it has seed=1, and .*config\.yaml has 0"):
        trainer.resume(stopped)


def test_checkpoint_of_another_model_is_refused(stopped: Path) -> None:
    """A checkpoint whose tensors are not the model's is refused with a tensor's name."""
    content = last(stopped)
    content["state_dict"]["model.head.weight"] = torch.zeros(3, 3)
    checkpoint.save(stopped / "last.ckpt", content)

    with pytest.raises(RunError, match=r"does not fit the model mlp.*model\.head\.weight"):
        trainer.resume(stopped)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """A folder without settings is a UsageError that says how to begin."""
    with pytest.raises(UsageError, match=r"not a run folder.*lowbit train"):
        trainer.resume(tmp_path)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A damage that puts something else in the checkpoint's place."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "fifo": replaced(os.mkfifo),
    "folder": replaced(os.mkdir),
    "link": replaced(lambda path: path.symlink_to("last-1.ckpt")),
    "dangling link": replaced(lambda path: path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    damage: str, finished: bool, complete: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stderr names the damaged file, which is set aside; the run goes on from step 12 to the same end."""
    if not finished:
        (copied / "result.json").unlink()
    DAMAGES[damage](copied / "last.ckpt")

    result = trainer.resume(copied)

    said = capsys.readouterr().err
    assert "last.ckpt" in said.splitlines()[0]
    assert "It is now last.ckpt.damaged" in said
    assert f"going on from {copied / 'last-1.ckpt'}, of step 12" in said
    assert result.steps == 3 * STEPS
    assert same_end(copied, complete)


def test_no_good_checkpoint_is_an_error_that_keeps_them(stopped: Path) -> None:
    """Where all are damaged each is named, none is removed, and the run does not begin again by itself."""
    for path in checkpoint.kept(stopped / "last.ckpt"):
        flip_a_bit(path)

    with pytest.raises(RunError, match=r"last\.ckpt.*last-1\.ckpt.*start again from step 0, remove"):
        trainer.resume(stopped)

    assert len(checkpoint.kept(stopped / "last.ckpt")) == 2


def test_a_finished_run_without_checkpoints_gives_its_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints that were removed to save space are not trained again, and stderr says that they are gone."""
    for path in checkpoint.kept(copied / "last.ckpt"):
        path.unlink()

    assert trainer.resume(copied).steps == 3 * STEPS
    assert "its checkpoints are gone" in capsys.readouterr().err


def with_one_label_changed() -> Any:
    """The digits with another label of the first image."""
    task, train, test = named._digits()
    train.labels[0] = 9 - train.labels[0]
    return Sets(task, train, test)


def test_changed_data_are_noticed(halfway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed label is an error that says what changed; with the flag the run goes on and records it."""
    monkeypatch.setitem(named.NAMED, "digits", with_one_label_changed)

    with pytest.raises(
        RunError, match=r"digits changed since step 7: train labels \(was \w+, is \w+\)\. .*--data-changed"
    ):
        trainer.resume(halfway)
    trainer.resume(halfway, data_changed=True)

    changes = yaml.safe_load((halfway / "config.yaml").read_text())["changes"]
    assert changes == [{"from_step": 7, "data": ["train labels"]}]


def test_a_run_with_a_damaged_ledger_goes_on_when_told(
    halfway: Path, complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged line stops resume and cost by its number; with the flag both work, and the weights are the same."""
    lines = (halfway / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"step","step":2' in line)
    lines[at] = lines[at].replace(b"64", b"65")
    (halfway / "ledger.jsonl").write_bytes(b"".join(lines))

    assert cli.main(["resume", str(halfway)]) == 1
    assert f"line {at + 1} of" in capsys.readouterr().err
    assert cli.main(["resume", str(halfway), "--drop-damaged"]) == 0
    assert cli.main(["cost", str(halfway)]) == 1
    assert cli.main(["cost", str(halfway), "--drop-damaged"]) == 0
    assert "damaged lines dropped: 1 of" in capsys.readouterr().out
    assert same(last(halfway)["state_dict"], last(complete)["state_dict"])
