"""Training runs: what they learn, what they leave behind, and what stops them."""

import csv
import dataclasses
import errno
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STEPS, config, last, same
from torch import nn

from lowbit import amp
from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.train import checkpoint, models, trainer
from lowbit.train.measured import read as read_measured
from lowbit.train.rows import Rows


def test_eight_bits_learn_digits(tmp_path: Path) -> None:
    """Three epochs of sbm8 classify most digits, and not all of them."""
    result = trainer.train(config(tmp_path / "run", subset=None, recipe="sbm8"))

    assert result.test_accuracy is not None
    assert 0.8 < result.test_accuracy < 1


def test_recipe_changes_the_weights(complete: Path, tmp_path: Path) -> None:
    """The same run in fp32 ends with other weights: the recipe is not ignored."""
    trainer.train(config(tmp_path / "run", recipe="fp32"))

    assert not same(last(complete)["state_dict"], last(tmp_path / "run")["state_dict"])


def test_same_settings_give_the_same_weights(complete: Path, tmp_path: Path) -> None:
    """Two runs of the same settings end bit for bit alike, wherever their checkpoints are."""
    trainer.train(config(tmp_path / "run", checkpoint_every=None))

    for key in ("state_dict", "optimizer_states"):
        assert same(last(complete)[key], last(tmp_path / "run")[key])


def test_result_file_holds_the_result(tmp_path: Path) -> None:
    """``result.json`` has the figures that `train` returns."""
    result = trainer.train(config(tmp_path / "run"))

    stored = json.loads((tmp_path / "run" / "result.json").read_text())

    assert stored == {key: value for key, value in dataclasses.asdict(result).items() if key != "out"}
    assert stored["steps"] == 3 * STEPS


def test_every_epoch_is_tested_once(complete: Path) -> None:
    """The log has one row with a test accuracy for each epoch, at the epoch's last step."""
    with open(complete / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["test_accuracy"]]

    assert [(float(row["epoch"]), int(row["step"])) for row in rows] == [(1, STEPS), (2, 10), (3, 15)]


def test_short_run_has_no_seconds_per_step(tmp_path: Path) -> None:
    """A run whose every step is warm-up says nothing about time."""
    result = trainer.train(config(tmp_path / "run", max_steps=5))

    assert result.seconds_per_step is None


def test_text_is_scored_in_bits_per_byte(tmp_path: Path) -> None:
    """A text's result is its loss in bits, near the 8 bits that a fresh model needs."""
    (tmp_path / "text").write_text("what is a low bit? " * 200)
    data = f"text:{tmp_path / 'text'}"

    result = trainer.train(
        config(tmp_path / "run", model="gpt", data=data, context=16, batch_size=8, subset=16, epochs=1)
    )

    assert result.test_accuracy is None
    assert result.test_bits_per_byte == pytest.approx(result.test_loss / math.log(2))
    assert 3 < result.test_bits_per_byte < 9


def test_infinite_loss_stops_with_step_and_place(tmp_path: Path) -> None:
    """A rate that blows the weights up is a RunError with the step and a parameter's name."""
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d+: .*(hidden|head)"):
        trainer.train(config(tmp_path / "run", recipe="fp32", lr=1e30, schedule="constant"))


def test_what_ran_stands_as_text_and_as_json(complete: Path) -> None:
    """Both reports of a run have the same layers in either form."""
    conversion, proof = (json.loads((complete / f"{name}.json").read_text()) for name in ("conversion", "proof"))

    layers = [row["name"] for row in conversion["rows"] if row["recipe"]]
    assert [row["layer"] for row in proof["layers"]] == layers
    assert all(f"\n{layer} " in (complete / "conversion.txt").read_text() for layer in layers)
    assert all(f"\n{layer} " in (complete / "proof.txt").read_text() for layer in layers)


def test_warning_of_a_model_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer silences does not include a warning from the model."""
    build = models.build

    def noisy(*args: Any) -> nn.Module:
        model = build(*args)
        model.register_forward_hook(lambda *_: warnings.warn("look at this", stacklevel=1))
        return model

    monkeypatch.setattr(models, "build", noisy)

    with pytest.warns(UserWarning, match="look at this"):
        trainer.train(config(tmp_path / "run", max_steps=1))


def test_threads_of_the_process_are_restored(tmp_path: Path) -> None:
    """A run with its own number of threads leaves the process's number as it was."""
    before = torch.get_num_threads()

    trainer.train(config(tmp_path / "run", threads=before + 1, max_steps=1))

    assert torch.get_num_threads() == before


def test_log_on_a_full_disk_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written stops the run in one line with the resume command."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Rows, "save", full)

    with pytest.raises(RunError, match=r"No space left.*lowbit resume"):
        trainer.train(config(tmp_path / "run"))


def test_a_run_leaves_its_ledger(complete: Path) -> None:
    """Every step and evaluation of a run is in its ledger, with samples and scores."""
    ledger = Ledger.load(complete / "ledger.jsonl")

    assert [step.samples for step in ledger.steps] == [64] * (3 * STEPS)
    assert [evaluation.step for evaluation in ledger.evaluations] == [STEPS, 2 * STEPS, 3 * STEPS]
    best = ledger.best()
    assert best is not None
    assert best.name == "test_accuracy"
    assert ledger.never_ran() == []
    assert ledger.notes == []


def test_a_run_leaves_its_seconds_and_joules(complete: Path) -> None:
    """What was measured is beside the ledger, one line for each start, and says where energy is not available."""
    (line,) = [json.loads(text) for text in (complete / "measured.jsonl").read_text().splitlines()]

    assert (line["from_step"], line["to_step"]) == (0, 3 * STEPS)
    assert line["seconds_per_step"] > 0
    assert line["joules"] is None or line["joules"] > 0
    assert set(read_measured(complete)) == {"seconds per step", "energy"}


def test_a_run_without_a_ledger_begins_one(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lost its ledger goes on with one that says where it begins, to the same end."""
    out, save = tmp_path / "run", checkpoint.save

    def stop(path: Path, content: Any, **how: Any) -> None:
        save(path, content, **how)
        if content["global_step"] == 6:
            raise RunError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        with pytest.raises(RunError, match="stop"):
            trainer.train(config(out, checkpoint_every=3))
    (out / "ledger.jsonl").unlink()
    trainer.resume(out)

    ledger = Ledger.load(out / "ledger.jsonl")
    assert (ledger.first_step, len(ledger.steps)) == (6, 3 * STEPS - 6)
    assert "earlier steps are not in it" in ledger.notes[0]
    assert same(last(out), last(complete))


def test_a_trained_model_comes_back(complete: Path) -> None:
    """The model of a run's checkpoint has its weights and formats."""
    model, loaded = trainer.trained(complete)

    saved = last(complete)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in model.state_dict().items())
    assert loaded.task.classes == 10
    with pytest.raises(UsageError, match="checkpoint"):
        trainer.trained(complete.parent)


@pytest.mark.parametrize("recipe", ["sbm8", "int8"])
def test_both_reports_name_the_same_engines(recipe: str, tmp_path: Path) -> None:
    """Conversion and proof of a small ResNet agree on the engine of each product of each layer, norms included."""
    out = tmp_path / "run"
    trainer.train(
        config(out, model="resnet20", recipe=recipe, subset=64, batch_size=32, max_steps=1, epochs=1, evaluate="never")
    )

    conversion, proof = (json.loads((out / f"{name}.json").read_text()) for name in ("conversion", "proof"))
    promised = {
        (row["name"], product): engine for row in conversion["rows"] for product, engine in row["engines"].items()
    }
    ran = {(row["layer"], row["product"]): ", ".join(row["engines"]) for row in proof["rows"]}
    assert ran == {key: promised[key] for key in ran}
    assert promised.keys() - ran.keys() <= {("stem.0", "grad_input")}  # nothing needs it
    assert any(layer == "stem.1" for layer, _ in ran) == (recipe == "sbm8")


def test_a_scale_that_fell_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scaled loss ends a run, the message has the step and the command that goes on."""

    def fell(*_: object) -> None:
        raise amp.ScaleError("the loss scale fell")

    monkeypatch.setattr(amp.GradScaler, "update", fell)

    with pytest.raises(
        RunError, match=r"scale fell\. The last checkpoint is of step 0: `lowbit resume .*run --lr RATE`"
    ):
        trainer.train(config(tmp_path / "run", recipe="amp-fp16"))
