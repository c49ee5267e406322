"""Runs whose precision changes: they resume to the same end, and their logs show the bits."""

import csv
import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from runs import config, last, same
from torch import nn

from lowbit.errors import RunError, UsageError
from lowbit.schedules import Cyclic
from lowbit.train import checkpoint, models, trainer

# A stage ends after 5 epochs of any loss, so these 7 epochs have two.
SHORT_EPOCHS = {"subset": 128, "epochs": 7, "threshold": 9.0}
TESTED = {"recipe": "cpt", "cycles": 2, "low": "range-test", "high": 3, "epochs": 4}
GATED = {"recipe": "fractrain", "blocks": r"0\.hidden\.\d", "targets": [1.9, 3.0], "decay": 0.3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 12},
        {"optimizer": "adamw", "amp": "bf16"},
        {"recipe": "cpt", "cycles": 4},
        TESTED,
        {**TESTED, "range_test_steps": 6, "range_test_threshold": 0.02},
        {"recipe": "pfq", **SHORT_EPOCHS},
        {**GATED, **SHORT_EPOCHS},
        {"recipe": "amp-fp16"},
        {"recipe": "heal", "starts": ["0.5"]},
        {"recipe": "sparse", "update_every": 3},
        {"recipe": "sqrt3", "measure_every": 3, "ratio": 12.0},
        {"recipe": "budget", "measure_every": 3, "bits": [3, 5, 8]},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_every_checkpoint_resumes_to_the_same_end(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint of any step, a model with dropout ends with the same checkpoint, log and result."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: nn.Sequential(build(*args), nn.Dropout(0.2)))
    save = checkpoint.save
    kept: list[Path] = []

    def keep(path: Path, content: Any, **how: Any) -> None:
        save(path, content, **how)
        kept.append(tmp_path / f"{content['global_step']}.ckpt")
        shutil.copy(path, kept[-1])

    whole, part = tmp_path / "whole", tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", keep)
        result = trainer.train(config(whole, checkpoint_every=1, **changes))

    assert len(kept) == result.steps
    for path in kept:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(whole, part)
        (part / "result.json").unlink()
        shutil.copy(path, part / "last.ckpt")
        again = trainer.resume(part)
        assert same(last(part), last(whole)), path.name
        assert (part / "csv" / "metrics.csv").read_text() == (whole / "csv" / "metrics.csv").read_text()
        assert (part / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes(), path.name
        # Each start measures these; one without a step left measures nothing, and a later one may find more states.
        measured: dict[str, Any] = {"seconds_per_step": result.seconds_per_step, "memory": result.memory}
        assert dataclasses.replace(again, **measured, out=whole) == result


def test_logs_show_bits_and_cost(tmp_path: Path) -> None:
    """Cpt's rows have the bits of each layer at that step and the bit operations so far."""
    result = trainer.train(config(tmp_path / "run", recipe="cpt", cycles=3))
    with open(tmp_path / "run" / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]

    assert [(row["step"], row["forward_bits"], row["bits/hidden.1.0"]) for row in rows] == [("10", "8.0", "8.0")]
    schedule = Cyclic(low=3, high=8, cycles=3, total_steps=15)
    first, others = 64 * 256, 2 * 256 * 256  # the first layer has no grad_input, the last one is left
    costs = [(first + others) * (b * b + 8 * b) + others * 8 * b for b in map(schedule, range(15))]
    macs = 2 * first + 3 * others
    assert float(rows[0]["bit_operations_per_mac"]) == pytest.approx(sum(costs[:10]) / (10 * macs))
    assert (result.bit_operations, result.macs) == (64 * sum(costs), 64 * 15 * macs)


def test_logs_show_what_the_gates_chose(tmp_path: Path) -> None:
    """Fractrain's rows have a histogram over choices for each block, the cost and its target."""
    trainer.train(config(tmp_path / "run", **{**GATED, "blocks": None, "threshold": 0.1}))
    with open(tmp_path / "run" / "csv" / "metrics.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["train_loss"])

    for block in ("hidden.0", "hidden.1", "hidden.2"):
        shares = [float(value) for name, value in row.items() if name.startswith(f"gates/{block}/")]
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(1)
    assert 1.7 < float(row["cost_percent"]) < 4.7
    assert float(row["target_percent"]) == 1.9


def test_an_epoch_of_the_plateau_rule_may_be_shorter(tmp_path: Path) -> None:
    """With plateau_every=1 a stage lasts five steps."""
    trainer.train(config(tmp_path / "run", recipe="pfq", plateau_every=1, threshold=9.0, decay=1.0))
    with open(tmp_path / "run" / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]

    assert [(row["step"], row["stage"], row["forward_bits"]) for row in rows] == [("10", "1.0", "4.0")]


def test_range_test_in_the_run_leaves_its_table(tmp_path: Path) -> None:
    """A run with low="range-test" writes the test's table, and its result names the choice."""
    result = trainer.train(config(tmp_path / "run", recipe="cpt", cycles=2, low="range-test", high=3, epochs=4))

    text = (tmp_path / "run" / "range-test.txt").read_text()
    assert result.low in (2, 3)
    assert text.startswith(f"precision range test: {result.low} bits")


def test_the_range_test_in_the_run_has_its_settings(tmp_path: Path) -> None:
    """Steps and threshold of the run reach the table: 6 steps at 2 bits, and no fall of the loss is 1000 %."""
    changes = {"range_test_steps": 6, "range_test_threshold": 10.0}
    result = trainer.train(
        config(tmp_path / "run", recipe="cpt", cycles=2, low="range-test", high=3, epochs=4, **changes)
    )

    text = (tmp_path / "run" / "range-test.txt").read_text()
    assert result.low == 3
    assert "no lower width gained more than 10 and more than 3 standard errors" in text


def test_changed_schedule_on_resume_is_refused(tmp_path: Path) -> None:
    """Editing the schedule in config.yaml of a stopped run is an error, not another run from its middle."""
    out = tmp_path / "run"
    trainer.train(config(out, recipe="cpt", cycles=3, checkpoint_every=4))
    (out / "result.json").unlink()
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("cycles: 3", "cycles: 5"))

    with pytest.raises(RunError, match="it has cycles=3"):
        trainer.resume(out)


def test_bits_planned_over_the_run_refuse_other_epochs(tmp_path: Path) -> None:
    """A cyclic schedule of 3 epochs does not become one of 4 in its middle; the complete run stays complete."""
    out = tmp_path / "run"
    result = trainer.train(config(out, recipe="cpt", cycles=3))

    with pytest.raises(RunError, match=r"does not fit these settings: .*other forward"):
        trainer.resume(out, {"epochs": 4})

    assert trainer.resume(out) == result


SCALED = """
base = "amp-fp16"
[autocast]
dtype = "fp16"
scaling = {{ start = {start}, interval = 2, minimum = {minimum} }}
"""


def test_the_scale_of_a_loss_is_kept_in_checkpoints(tmp_path: Path) -> None:
    """Updates are left out until the scale fits, and a run resumed in between ends with the same scale and weights."""
    recipe, whole, part = tmp_path / "mine.toml", tmp_path / "whole", tmp_path / "part"
    recipe.write_text(SCALED.format(start=2.0**30, minimum=1))
    result = trainer.train(config(whole, recipe=str(recipe), checkpoint_every=1, keep=20))
    shutil.copytree(whole, part)
    for path in [part / "result.json", *checkpoint.kept(part / "last.ckpt")]:
        path.unlink()
    shutil.copy(whole / "last-9.ckpt", part / "last.ckpt")
    scales = [checkpoint.load(path)["MixedPrecision"]["scale"] for path in checkpoint.kept(whole / "last.ckpt")]

    trainer.resume(part)

    assert scales[-1] == 2.0**29
    assert any(newer > older for newer, older in pairwise(scales))
    assert same(last(part), last(whole))
    assert result.memory is not None
    assert result.memory.states == result.memory.gradients  # measured in a step that was not left out


def test_a_scale_below_its_minimum_ends_a_run(tmp_path: Path) -> None:
    """The run stops with the reason, and its checkpoint is from before."""
    (tmp_path / "mine.toml").write_text(SCALED.format(start=2.0**40, minimum=2.0**38))

    with pytest.raises(RunError, match=r"loss scale fell to 137438953472.0.*gradients of \d of 8 parameters"):
        trainer.train(config(tmp_path / "run", recipe=str(tmp_path / "mine.toml"), checkpoint_every=1))
    assert last(tmp_path / "run")["global_step"] == 2


@pytest.mark.parametrize(("recipe", "amp"), [("int8", "fp16"), ("amp-bf16", "none"), ("amp-fp16", "bf16")])
def test_an_autocast_that_the_recipe_does_not_ask_for_is_refused(recipe: str, amp: str, tmp_path: Path) -> None:
    """`amp` and recipe must agree where the recipe asks, and fp16 needs a recipe that scales the loss."""
    with pytest.raises(UsageError, match=f"amp='{amp}', and recipe '{recipe}' asks for"):
        trainer.train(config(tmp_path / "run", recipe=recipe, amp=amp))
