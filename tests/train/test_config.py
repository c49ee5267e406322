"""Settings of a run, and the schedule of the learning rate."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import config

from lowbit.errors import UsageError
from lowbit.train import TrainConfig
from lowbit.train.config import lr_factor


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", -1),
        ("epochs", 0),
        ("epochs", True),
        ("batch_size", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("weight_decay", math.inf),
        ("optimizer", "sdg"),
        ("schedule", "one_cycle"),
        ("amp", "fp8"),
        ("seed", -1),
        ("seed", 2**63),
        ("subset", 0),
        ("checkpoint_every", 0),
        ("threads", 0),
        ("context", -5),
        ("max_steps", 0),
        ("model", ""),
    ],
)
def test_impossible_setting_is_refused_by_name(setting: str, value: object) -> None:
    """A value out of range is a UsageError that names the setting and the value."""
    with pytest.raises(UsageError) as caught:
        config(Path("run"), **{setting: value})

    assert setting in str(caught.value)
    assert repr(value) in str(caught.value)


def test_near_miss_of_a_choice_is_suggested() -> None:
    """A misspelt choice names the nearest one."""
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        config(Path("run"), schedule="cosin")


def test_resolved_leaves_nothing_open_that_changes_the_weights() -> None:
    """Resolving fills in rate, decay, threads, autocast and folder, each optimizer with its own."""
    sgd = TrainConfig(model="mlp", data="digits").resolved(threads=2, amp="none")
    adamw = TrainConfig(model="mlp", data="text:/a/b.txt", optimizer="adamw", seed=7).resolved(threads=2, amp="none")

    assert (sgd.lr, sgd.weight_decay, sgd.threads, sgd.out) == (0.1, 1e-4, 2, Path("runs/mlp-digits-sbm8-0"))
    assert (adamw.lr, adamw.weight_decay) == (1e-3, 0.01)
    assert TrainConfig(model="mlp", data="digits").amp == "auto"
    assert (sgd.amp, adamw.amp) == ("none", "none")
    assert adamw.out == Path("runs/mlp-text--a-b.txt-sbm8-7")


def test_resolved_keeps_what_was_given() -> None:
    """A setting that was given survives resolving, zero included."""
    given = config(Path("run"), lr=0.0, weight_decay=0.0, threads=3, amp="bf16")

    assert given.resolved(threads=8, amp="none") == given


def test_settings_survive_yaml(tmp_path: Path) -> None:
    """Settings written as YAML and read back are equal."""
    before = config(tmp_path, amp="bf16", checkpoint_every=7)

    after = TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(before.to_dict())), out=tmp_path)

    assert after == before


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step", "constant"])
def test_rate_stays_between_zero_and_its_peak(schedule: Any) -> None:
    """Each schedule reaches 1 somewhere and never leaves [0, 1]."""
    factors = [lr_factor(schedule, step, 40) for step in range(41)]

    assert max(factors) == 1
    assert min(factors) >= 0


def test_one_cycle_peaks_at_a_quarter_and_ends_at_zero() -> None:
    """One-cycle begins at lr/25, is at its peak after a quarter of the run, and reaches zero at its end."""
    assert lr_factor("one-cycle", 0, 40) == 1 / 25
    assert lr_factor("one-cycle", 10, 40) == 1
    assert lr_factor("one-cycle", 40, 40) == 0


def test_step_divides_by_ten_twice() -> None:
    """The step schedule falls at a half and at three quarters of the run."""
    assert [lr_factor("step", step, 4) for step in range(4)] == [1, 1, 0.1, 0.01]
