"""What settings build: models, data and bits that fit one another, or an error and no folder."""

from pathlib import Path
from typing import Any

import pytest
from runs import config

from lowbit.engines.int8 import missing
from lowbit.errors import UsageError
from lowbit.train import trainer
from lowbit.train.assembly import fastest_amp
from lowbit.train.folder import read_settings


def test_context_of_images_is_refused(tmp_path: Path) -> None:
    """A context for images is a UsageError, not ignored."""
    with pytest.raises(UsageError, match="context"):
        trainer.train(config(tmp_path / "run", context=16))


def test_model_that_does_not_fit_leaves_no_folder(tmp_path: Path) -> None:
    """A text model on images is refused before the run folder exists."""
    with pytest.raises(UsageError, match="lstm"):
        trainer.train(config(tmp_path / "run", model="lstm"))

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "cpt", "cycles": 99}, "total_steps=15, cycles=99"),
        ({"recipe": "cpt", "cycles": 2, "low": 9}, "low=9, high=8"),
        ({"recipe": "cpt", "cycles": 2, "profile": "cosin"}, "'cosin'.*Did you mean 'cosine'"),
        ({"recipe": "cpt", "bits": [3, 8]}, "'cpt' has no setting 'bits': it has low, high"),
        ({"recipe": "sbm8", "cycles": 2}, "'sbm8' has no setting 'cycles': its bits are constant"),
        ({"recipe": "sbm8", "eval_bits": 8}, "eval_bits goes with"),
        (
            {"recipe": "cpt", "cycles": 2, "range_test_steps": 8},
            "range_test_steps=8 goes with low='range-test', and low is 3",
        ),
        ({"recipe": "sbm8", "range_test_threshold": 0.1}, "'sbm8' has no setting 'range_test_threshold'"),
        (
            {"recipe": "cpt", "cycles": 2, "low": "range-test", "high": 3, "range_test_steps": 3},
            "steps_per_bit=3.*4 steps",
        ),
        ({"recipe": "cpt", "cycles": 2, "blocks": "x"}, "blocks goes with"),
        ({"recipe": "cpt", "cycles": 2, "plateau_every": 5}, "plateau_every goes with"),
        ({"recipe": "pfq", "plateau_every": 0}, "plateau_every must be a whole number"),
        ({"recipe": "dfq", "blocks": "x"}, r"matches the name of no module of 'mlp'; those of mlp match"),
        ({"recipe": "dfq", "blocks": "x("}, "not a regular expression"),
    ],
)
def test_precision_settings_that_do_not_fit_leave_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A setting that the recipe does not have, or an impossible one, is refused before the run folder exists."""
    with pytest.raises(UsageError, match=message):
        trainer.train(config(tmp_path / "run", **changes))

    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(bool(missing("bf16")), reason=f"no bf16 units: {missing('bf16')}")
@pytest.mark.parametrize(
    ("recipe", "engine", "expected"),
    [
        ("int8", "auto", "bf16"),
        ("sbm8", "auto", "bf16"),
        ("bf16", "auto", "bf16"),
        ("int8", "reference", "none"),
        ("fp32", "auto", "none"),
        ("cpt", "auto", "none"),
        ("amp-bf16", "reference", "bf16"),
        ("amp-fp16", "auto", "fp16"),
    ],
)
def test_autocast_is_on_where_every_product_runs_on_narrow_units(recipe: str, engine: str, expected: str) -> None:
    """What simulates a product in float32 trains without autocast, what runs all of them on narrow units with it."""
    assert fastest_amp(config(Path("run"), recipe=recipe, engine=engine)) == expected


def test_a_run_keeps_what_auto_became(tmp_path: Path) -> None:
    """config.yaml has the setting that the run has, not ``auto``, so that a resumed run has it too."""
    settings = config(tmp_path / "run", recipe="int8", max_steps=1)
    trainer.train(settings)

    assert settings.amp == "auto"
    assert read_settings(tmp_path / "run").config.amp == fastest_amp(settings)
