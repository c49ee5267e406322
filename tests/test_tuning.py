"""The settings of schedules and gates as settings of a run, which nobody types."""

import dataclasses
import subprocess
import sys
from typing import Any, Literal

import pytest

from lowbit.checks import fits
from lowbit.recipe import Gating
from lowbit.schedules import KINDS, kind_settings
from lowbit.train.config import TrainConfig, settled
from lowbit.train.tuning import tunable, with_tunable

NEW = """
import dataclasses
from lowbit import schedules
from lowbit.schedules.checks import check_step

@dataclasses.dataclass(frozen=True, kw_only=True)
class Stairs(schedules.PureSchedule):
    '''Bits that climb by one at each tread.

    Args:
        tread: steps at each width,
            1 or more.
        total_steps: length of the run.
        landing: the last width.
    '''

    tread: int
    total_steps: int
    landing: int = 8

    @property
    def max_bits(self):
        return self.at(self.total_steps - 1)

    def at(self, step):
        check_step(step, self.total_steps)
        return min(2 + step // self.tread, self.landing)

schedules.KINDS["stairs"] = (Stairs,)
"""


def run(code: str) -> list[str]:
    """The lines that a process prints which first adds a kind of schedule."""
    done = subprocess.run([sys.executable, "-c", NEW + code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_new_schedule_reaches_the_command_line() -> None:
    """The fields of a class in the table become flags with their docstring's text; those of the run do not."""
    words = " ".join(run("from lowbit.cli import main; main(['train', '--help'])"))

    assert "--tread TREAD of stairs schedules: steps at each width, 1 or more." in " ".join(words.split())
    assert "--landing LANDING" in words
    assert "--total_steps" not in words


def test_the_flag_of_a_new_schedule_reaches_its_bits() -> None:
    """A flag is checked by its type, goes into the recipe, and the controller trains at its bits."""
    lines = run(
        """
from lowbit import PrecisionController, Recipe, convert_
from lowbit.cli import _parser, main
from lowbit.recipe import Scheduling
from lowbit.train.config import TrainConfig
from torch import nn
given = ["train", "--model", "mlp", "--data", "digits", "--tread", "3"]
config = TrainConfig(**{k: v for k, v in _parser().parse_args(given).train.items() if k != "config"})
stairs = schedules.Template(kind="stairs", settings=(("tread", 1),))
recipe = Recipe.from_name("w8a8g8").replace(schedule=Scheduling(forward=stairs), last="convert")
model = nn.Sequential(nn.Linear(4, 4))
convert_(model, recipe.tuned(**config.tuned()))
controller = PrecisionController.from_recipe(model, total_steps=8)
bits = []
for _ in range(8):
    bits.append(controller.forward_bits)
    controller.step()
print(bits)
print(main(["train", "--model", "mlp", "--data", "digits", "--tread", "x"]))
"""
    )

    assert lines == [str([2, 2, 2, 3, 3, 3, 4, 4]), "2"]


def test_every_setting_of_a_schedule_or_gate_is_one_of_a_run() -> None:
    """All fields of all kinds and of gates are there, left open, and nothing of the length of the run."""
    names = {name for kind in KINDS for name in kind_settings(kind)} | {f.name for f in dataclasses.fields(Gating)}
    config = TrainConfig(model="mlp", data="digits")

    assert set(tunable()) == names
    assert {getattr(config, name) for name in names} == {None}
    assert not names & {"total_steps", "steps_per_epoch"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("low", [3, "range-test"], ["range", 3.5, None]),
        ("cycles", [4], ["4", [4]]),
        ("bits", [4, [3, 8]], ["8", [3.5]]),
        ("pieces", [[[0, 4], ["0.9", 8]]], [[0, 4], "0"]),
        ("targets", [[1.5, 3]], [3.0]),
        ("choices", [[[3, 6], [8, 8]]], [[3, 6]]),
        ("mixing", ["input", "output"], ["inputs"]),
        ("hidden", [16], ["none", None]),
    ],
)
def test_settings_are_typed_as_yaml_writes_them(name: str, good: list[Any], bad: list[Any]) -> None:
    """Sequences are lists, a word is one of its own, and None is not a value but leaves a setting open."""
    hint = tunable()[name].hint

    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


def test_a_setting_of_two_classes_says_whose_it_is() -> None:
    """The text of `threshold` speaks of progressive schedules and of gates."""
    text = tunable()["threshold"].text

    assert text.startswith("of progressive schedules: how flat the loss is at a plateau")
    assert "Of gates: epsilon of the plateau rule" in text


def test_a_setting_of_the_runs_own_name_is_refused() -> None:
    """A class that has a setting of that name already would hide one of the two."""

    class Run:
        """A run.

        Args:
            low: of something else.

        Raises:
            UsageError: never.
        """

        low: Literal["sun"] = "sun"

    with pytest.raises(TypeError, match="Run has low already"):
        with_tunable(Run)


def test_settings_left_open_do_not_tell_two_runs_apart() -> None:
    """A run that is older than a setting is a run that leaves it open, and not one that sets it."""
    new = TrainConfig(model="mlp", data="digits", cycles=3).to_dict()
    old = {name: value for name, value in new.items() if name != "strength"}

    assert settled(new) == settled(old)
    assert settled({**new, "strength": 0.5}) != settled(old)
    assert settled(new)["checkpoint_every"] is None
