"""Settings that change when a run goes on: they are recorded, and count from their step."""

import csv
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import STEPS, flip_a_bit, last, same_end, signal_at

from lowbit.errors import RunError, Stopped, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.train import checkpoint, trainer
from lowbit.train.config import lr_factor


def test_a_changed_rate_counts_from_its_step_and_is_recorded(halfway: Path) -> None:
    """From step 7 on the rate follows the schedule to the new peak; config.yaml has both values and the step."""
    trainer.resume(halfway, {"lr": 0.02, "weight_decay": 0.5})

    settings = yaml.safe_load((halfway / "config.yaml").read_text())
    group = last(halfway)["optimizer_states"][0]["param_groups"][0]
    with open(halfway / "csv" / "metrics.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["train_lr"]]
    assert settings["lr"] == 0.02
    assert settings["changes"] == [
        {"from_step": 7, "lr": {"from": 0.05, "to": 0.02}, "weight_decay": {"from": 1e-4, "to": 0.5}}
    ]
    # The row of step 10 is written after that step, when its rate was the one of 9 steps done.
    assert (row["step"], float(row["train_lr"])) == ("10", pytest.approx(0.02 * lr_factor("one-cycle", 9, 15)))
    assert (group["weight_decay"], group["initial_lr"]) == (0.5, 0.02)


def test_a_change_that_changes_nothing_changes_no_bit(halfway: Path, complete: Path) -> None:
    """The same rate again, and other checkpoints, end with the same weights."""
    trainer.resume(halfway, {"lr": 0.05, "checkpoint_every": 2, "keep": 1})

    assert same_end(halfway, complete)
    assert len(checkpoint.kept(halfway / "last.ckpt")) == 1


def test_a_changed_run_resumes_with_its_changes(halfway: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped after the change and resumed, also from the checkpoint before it, a run keeps to the new rate."""
    copied = Path(shutil.copytree(halfway, tmp_path / "copied"))
    trainer.resume(halfway, {"lr": 0.02})
    with monkeypatch.context() as patch:
        signal_at(8, signal.SIGTERM, patch)
        with pytest.raises(Stopped):
            trainer.resume(copied, {"lr": 0.02})
    trainer.resume(copied)
    assert same_end(copied, halfway)

    (copied / "result.json").unlink()
    flip_a_bit(copied / "last.ckpt")
    trainer.resume(copied)
    assert same_end(copied, halfway)


def test_a_change_moves_back_with_the_run(halfway: Path) -> None:
    """Where the run goes on from an older checkpoint than the change, the change counts from there."""
    with pytest.raises(RunError, match="stop"):
        stop_before_training(halfway, {"lr": 0.02})
    flip_a_bit(halfway / "last.ckpt")
    trainer.resume(halfway)

    assert [change["from_step"] for change in yaml.safe_load((halfway / "config.yaml").read_text())["changes"]] == [6]


def stop_before_training(out: Path, changes: dict[str, object]) -> None:
    """Resume and stop once the settings are written."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise RunError("stop")

        patch.setattr(trainer, "_run", stop)
        trainer.resume(out, changes)


def test_a_complete_run_goes_on_with_more_epochs(copied: Path) -> None:
    """Two more epochs follow the three, and ledger, log and result have all five."""
    result = trainer.resume(copied, {"epochs": 5})

    assert result.steps == 5 * STEPS
    assert len(Ledger.load(copied / "ledger.jsonl").steps) == 5 * STEPS
    assert trainer.resume(copied) == result


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": -1.0}, UsageError, "lr must be"),
        ({"epochs": 0}, UsageError, "epochs must be"),
        ({"batch_size": 3}, UsageError, r"'batch_size'.*checkpoint_every"),
        ({"epochs": 1}, RunError, "is at step 7; expected a step from 1 to 5"),
    ],
)
def test_an_impossible_change_leaves_the_run_as_it_was(
    changes: dict[str, object], error: type[Exception], message: str, halfway: Path
) -> None:
    """A change that cannot be is refused by name, and the settings stay."""
    before = (halfway / "config.yaml").read_bytes()

    with pytest.raises(error, match=message):
        trainer.resume(halfway, changes)

    assert (halfway / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("text", ["changes: 3", "changes: [3]", "changes: [{from_step: 1, lr: 3}]"])
def test_damaged_changes_are_named(text: str, stopped: Path) -> None:
    """A history of changes that cannot be read is an error with the file's name."""
    with open(stopped / "config.yaml", "a") as file:
        file.write(text + "\n")

    with pytest.raises(RunError, match=r"config\.yaml is damaged: its changes"):
        trainer.resume(stopped)
