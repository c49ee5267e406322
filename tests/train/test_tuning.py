"""The settings of schedules and gates as settings of a run, which nobody types."""

import dataclasses
import json
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from runs import last, same, same_end, signal_at
from torch import nn

import lowbit
from lowbit.cli import main as cli
from lowbit.inputs.checks import fits
from lowbit.methods.recipe import Gating, Recipe, Skipping
from lowbit.schedules import KINDS, kind_settings
from lowbit.train import checkpoint, trainer
from lowbit.train.config import TrainConfig, settled
from lowbit.train.tuning import tunable, with_tunable

# Runs that have, together, every setting of schedules, gates, phases and skipped products: a stored recipe or a
# schedule of one, and the flags.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ('{ kind = "constant", bits = 4 }', {"bits": 6}),
    "piecewise": ('{ kind = "piecewise", pieces = [[0, 4]] }', {"pieces": [[0, 4], ["0.5", 8]]}),
    "cyclic": (
        "cpt",
        {"low": 2, "high": 6, "cycles": 4, "profile": "rex", "shape": "triangular-vertical", "final": "high"},
    ),
    "range-test": (
        "cpt",
        {"low": "range-test", "high": 3, "cycles": 2, "range_test_steps": 8, "range_test_threshold": 0.02},
    ),
    "progressive": ("pfq", {"bits": [3, 4, 5, 8], "grad_bits": [6, 7, 8, 8], "threshold": 9.0, "decay": 1.0}),
    "deficit": (
        '{ kind = "deficit", bits = 8, low = 4, start = 0, length = 2 }',
        {"low": 3, "start": "0.25", "length": 6},
    ),
    "gradient-noise": ("sqrt3", {"measure_every": 2, "ratio": 12.0, "patience": 2}),
    "budget": ("budget", {"bits": [3, 5, 8], "budget": 0.6, "measure_every": 3}),
    "phases": ("heal", {"starts": ["0.3"]}),
    "skip": ("sparse", {"update_every": 3, "stagger": False, "skip_layers": "hidden.*|0"}),
    "gates": (
        "fractrain",
        {
            **{"choices": [[3, 6], [8, 8]], "targets": [2.0, 3.0], "threshold": 9.0, "decay": 1.0},
            **{"strength": 0.5, "band": 0.2, "inside": 0.3, "mixing": "output", "weighting": "equal"},
            **{"hidden": 8, "features": 4, "state": 4},
        },
    ),
}
OF_THE_RANGE_TEST = {"range_test_steps", "range_test_threshold"}

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
    words = " ".join(run("from lowbit.cli.main import main; main(['train', '--help-all'])"))

    assert "--tread N of stairs schedules: steps at each width, 1 or more." in " ".join(words.split())
    assert "--landing N" in words
    assert "--total-steps" not in words


def test_the_flag_of_a_new_schedule_reaches_its_bits() -> None:
    """A flag is checked by its type, goes into the recipe, and the controller trains at its bits."""
    lines = run(
        """
from lowbit import PrecisionController, Recipe, convert_
from lowbit.cli.main import main
from lowbit.cli.parser import parser_of
from lowbit.methods.recipe import Scheduling
from lowbit.train.config import TrainConfig
from torch import nn
given = ["--model", "mlp", "--data", "digits", "--tread", "3"]
settings = parser_of("train").read(given)
config = TrainConfig(**{k: v for k, v in settings.items() if k in TrainConfig.__dataclass_fields__})
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
    names = {name for kind in KINDS for name in kind_settings(kind)} | {"starts"}
    names |= {f.name for part in (Gating, Skipping) for f in dataclasses.fields(part)}
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


def recipe_of(kind: str, folder: Path) -> str:
    """The name of the recipe of a run, or the path of its file, which is written."""
    recipe = RUNS[kind][0]
    if not recipe.startswith("{"):
        return recipe
    path = folder / f"{kind}.toml"
    path.write_text(f'base = "cpt"\n[schedule]\nforward = {recipe}\nbackward = 8\n')
    return str(path)


def flags(kind: str, out: Path) -> list[str]:
    """The arguments of a run of 20 steps with the settings of that kind."""
    settings = {"model": "mlp", "data": "digits", "subset": 320, "batch_size": 64, "epochs": 4, "lr": 0.05}
    settings |= {"threads": 1, "recipe": recipe_of(kind, out.parent), "out": out, **RUNS[kind][1]}
    if "threshold" in settings:
        settings["plateau_every"] = 1
    texts = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in settings.items()}
    return [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]


def formats(recipe: Recipe) -> int:
    """What the saved state of a model of this recipe is recognised by."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lowbit.convert_(model, recipe)
    (number,) = {site["formats"] for group in lowbit.state_dict(model)["groups"] for site in group["sites"].values()}
    assert isinstance(number, int)
    return number


def as_before(out: Path, recipe: Recipe) -> None:
    """Make a run one from before its schedule's settings were read off classes.

    Settings that are left open, of which there were fewer, go; and the range test's were not the recipe's.
    """
    settings = settled(yaml.safe_load((out / "config.yaml").read_text()))
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    content = last(out)
    content["lowbit"]["config"] = settled(content["lowbit"]["config"])
    for group in content["lowbit"]["state"]["groups"]:
        for site in group["sites"].values():
            if site["recipe"] == recipe.name:
                text = repr(recipe).replace(", update=None, autocast=None, attention=None)", ")")
                text = text.replace(", phases=(), skip=None", "")
                site["formats"] = zlib.crc32(text.encode())
    checkpoint.save(out / "last.ckpt", content, keep=1)


@pytest.fixture(scope="module", params=RUNS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run, named by its kind."""
    out: Path = tmp_path_factory.mktemp("runs") / request.param
    assert cli.main(["train", *flags(request.param, out)]) == 0
    return out


def test_the_runs_here_have_every_setting() -> None:
    """A new setting of a schedule or gate gets its place in the table of runs."""
    assert {name for _, settings in RUNS.values() for name in settings} == set(tunable())


@pytest.mark.parametrize("before", [False, True], ids=["today's", "from before"])
def test_a_run_with_every_flag_goes_on(before: bool, whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped at step 7 and resumed, a run ends as the one that was never stopped; also one from before."""
    kind, stopped = whole.name, tmp_path / "stopped"
    with monkeypatch.context() as patch:
        signal_at(7, signal.SIGTERM, patch)
        assert cli.main(["train", *flags(kind, stopped)]) == 143
    if before:
        known = {name: value for name, value in RUNS[kind][1].items() if name not in OF_THE_RANGE_TEST}
        as_before(stopped, Recipe.find(recipe_of(kind, tmp_path)).tuned(**known))
    step = last(stopped)["global_step"]
    trainer.resume(stopped)

    assert step == 7
    assert same_end(stopped, whole)
    assert same(last(stopped)["lowbit"]["controller"], last(whole)["lowbit"]["controller"])


# The others of the range test need its `low`, and that of plain cycles is tried.
TRIED = {(kind, name) for kind, (_, settings) in RUNS.items() for name in settings} - {("range-test", "low")}


@pytest.mark.parametrize(("kind", "name"), sorted(TRIED))
def test_a_state_knows_the_settings_of_its_recipe(kind: str, name: str, tmp_path: Path) -> None:
    """A state is of its recipe's settings, but for how a range test goes, which the controller's own state has."""
    plain, settings = Recipe.find(recipe_of(kind, tmp_path)), RUNS[kind][1]
    others = {key: value for key, value in settings.items() if key != name}

    assert (formats(plain.tuned(**settings)) == formats(plain.tuned(**others))) == (name in OF_THE_RANGE_TEST)
