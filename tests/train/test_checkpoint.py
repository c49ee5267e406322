"""Checkpoint files: whole or not at all, kept, finite, and read without executing anything."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STEPS, config, fill_disk, flip_a_bit, last, same_end
from torch import nn

from lowbit.errors import RunError
from lowbit.train import checkpoint, models, trainer
from lowbit.train.callbacks import TrainingRows


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that finds the disk full is a RunError; the old file is intact, the temporary one gone."""
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"step": 1})
    fill_disk(monkeypatch)

    with pytest.raises(RunError, match=r"No space left.*the one that was there is intact.*Free some space"):
        checkpoint.save(path, {"step": 2, "weight": torch.zeros(100_000)})

    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def cut(path: Path) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "one flipped bit": flip_a_bit,
    "cut in half": cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "a bare list": lambda path: torch.save([1, 2], path),
    "another program's dict": lambda path: torch.save({"state_dict": {}}, path),
    "a whole module": lambda path: torch.save(nn.Linear(1, 1), path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_checkpoint_is_named(damage: str, stopped: Path) -> None:
    """Where no other checkpoint is left, a damaged one is a RunError with its path and what was expected."""
    (stopped / "last-1.ckpt").unlink()
    DAMAGES[damage](stopped / "last.ckpt")

    with pytest.raises(RunError, match=r"last\.ckpt.*expected a checkpoint that `lowbit train` wrote"):
        trainer.resume(stopped)


CHANGES: dict[str, Any] = {
    "a step that is a text": lambda content: content["loops"]["fit_loop"]["epoch_progress"].update(current="x"),
    "a rate that is another": lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr=1.5),
    "momentum of another shape": lambda content: content["optimizer_states"][0]["state"][0].update(
        momentum_buffer=torch.zeros(3)
    ),
    "a setting that is a tensor": lambda content: content["lowbit"]["config"].update(lr=torch.zeros(3)),
    "no entry of the schedule": lambda content: content["lr_schedulers"][0].pop("lr_lambdas"),
    "a key of its own": lambda content: content.update(mine=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_that_was_changed_is_refused(change: str, stopped: Path) -> None:
    """What torch and Lightning would believe, up to a traceback or to other weights, is no checkpoint of lowbit."""
    (stopped / "last-1.ckpt").unlink()
    content = torch.load(stopped / "last.ckpt", weights_only=True)
    CHANGES[change](content)
    torch.save(content, stopped / "last.ckpt")

    with pytest.raises(RunError, match=r"was changed after it was written; expected a checkpoint"):
        trainer.resume(stopped)


def test_weights_of_a_checkpoint_may_be_changed(stopped: Path) -> None:
    """Elements of tensors are the user's: a run goes on from averaged weights."""
    content = torch.load(stopped / "last.ckpt", weights_only=True)
    content["state_dict"]["model.head.bias"] += 1
    torch.save(content, stopped / "last.ckpt")

    trainer.resume(stopped)

    biases = [found["state_dict"]["model.head.bias"].cpu() for found in (last(stopped), content)]
    assert torch.equal(*biases)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_does_not_run(write: Any, stopped: Path, tmp_path: Path) -> None:
    """A pickle with code, in torch's container or bare, is damaged, and its code does not run."""
    write({"lowbit": Payload(tmp_path / "ran")}, stopped / "last.ckpt")

    trainer.resume(stopped)

    assert not (tmp_path / "ran").exists()


def test_checkpoints_by_time_change_no_bit(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zero minutes every step is saved, without minutes the ends of epochs are, and the weights are the same."""
    save = checkpoint.save
    steps: list[int] = []

    def note(path: Path, content: Any, **how: Any) -> None:
        steps.append(content["global_step"])
        save(path, content, **how)

    monkeypatch.setattr(checkpoint, "save", note)
    trainer.train(config(tmp_path / "often", checkpoint_minutes=0.0))
    trainer.train(config(tmp_path / "never", checkpoint_minutes=None))

    assert steps == [*range(1, 3 * STEPS + 1), STEPS, 2 * STEPS, 3 * STEPS]
    assert same_end(tmp_path / "often", complete)
    assert same_end(tmp_path / "never", complete)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    """As many as asked for stay, the newest first, none else."""
    trainer.train(config(tmp_path / "run", checkpoint_every=3, keep=keep))

    kept = checkpoint.kept(tmp_path / "run" / "last.ckpt")
    assert [checkpoint.load(path)["global_step"] for path in kept] == [15, 12, 10, 9][:keep]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that ruins a weight stops the run at its save; the error names weight, step and way on, which works."""
    out = tmp_path / "run"

    def ruin(_: object, trainer_: Any, module: Any, *__: object) -> None:
        if trainer_.global_step == 9:
            module.model.head.weight.data[0, 0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRows, "on_train_batch_end", ruin)
        with pytest.raises(RunError, match=r"after step 9 is not finite.*head\.weight.*of step 6.*resume .* --lr"):
            trainer.train(config(out, checkpoint_every=3))

    steps = [checkpoint.load(path)["global_step"] for path in checkpoint.kept(out / "last.ckpt")]
    assert steps == [6, 5]
    assert trainer.resume(out, {"lr": 0.01}).steps == 3 * STEPS


def test_an_optimizer_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The momentum counts too."""

    def ruin(_: object, trainer_: Any, *__: object) -> None:
        if trainer_.global_step == 3:
            next(iter(trainer_.optimizers[0].state.values()))["momentum_buffer"].flatten()[0] = float("inf")

    monkeypatch.setattr(TrainingRows, "on_train_batch_end", ruin)

    with pytest.raises(RunError, match=r"after step 3 is not finite.*momentum_buffer"):
        trainer.train(config(tmp_path / "run", checkpoint_every=3))


def test_a_mask_of_infinities_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is infinite from the beginning, as of an attention mask, is no divergence."""
    build = models.build

    def masked(*args: Any) -> nn.Module:
        model = build(*args)
        model.register_buffer("mask", torch.full((2,), -torch.inf))
        return model

    monkeypatch.setattr(models, "build", masked)

    assert trainer.train(config(tmp_path / "run")).steps == 3 * STEPS


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A run that diverges in its first steps can be resumed with another rate, from step 0."""
    out = tmp_path / "run"

    with pytest.raises(RunError, match=r"the loss is .*of step 0: `lowbit resume .* --lr RATE`"):
        trainer.train(config(out, recipe="fp32", lr=1e30, schedule="constant"))

    assert trainer.resume(out, {"lr": 0.05}).steps == 3 * STEPS


def test_a_checkpoint_moves_no_link_and_no_folder_on(tmp_path: Path) -> None:
    """Only ordinary files become the checkpoint before the last."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "mine")

    checkpoint.save(tmp_path / "last.ckpt", {"step": 1}, keep=2)

    assert (tmp_path / "mine").read_text() == "mine"
    assert checkpoint.kept(tmp_path / "last.ckpt") == [tmp_path / "last.ckpt"]
