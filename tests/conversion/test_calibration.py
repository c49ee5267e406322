"""The table of engine timings: what it holds, where it is kept, and what goes by it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.conversion import calibration
from lowbit.conversion.calibration import STANDINS, Shape, Table, Timing
from lowbit.engines.int8 import missing
from lowbit.errors import UsageError
from lowbit.machine import here
from lowbit.products import watch
from lowbit.train import TrainConfig, trainer

needs_units = pytest.mark.skipif(
    bool(missing("int8") or missing("bf16")), reason="this machine has no choice of engines"
)

SMALL, LARGE = Shape(kind="linear", inputs=4, outputs=4), Shape(kind="linear", inputs=64, outputs=64)
CONV = Shape(kind="conv", inputs=8, outputs=8, taps=9)


def timing(shape: Shape, recipe: str, reference: float, int8: float) -> Timing:
    """A time of 1 ms in full precision."""
    return Timing(shape=shape, recipe=recipe, fp32=1.0, reference=reference, int8=int8)


def table_of(*, small: tuple[float, float], large: tuple[float, float]) -> Table:
    """Times (reference, int8) of small and of large linear layers in every recipe; fp32 takes 1 ms."""
    shapes = ((SMALL, small), (LARGE, large), (CONV, (3.0, 0.5)))
    return Table(tuple(timing(shape, recipe, *ms) for shape, ms in shapes for recipe in STANDINS.values()))


MIXED = table_of(small=(2.0, 4.0), large=(3.0, 0.5))


def two_layers() -> nn.Sequential:
    """Layers that the table of `MIXED` takes for the small one and the large one."""
    return nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 90))


def engines(model: nn.Module) -> list[str]:
    """The engine of each site."""
    return [entry["engine"] for entry in lowbit.state_dict(model)["groups"][0]["sites"].values()]


def converted(model: nn.Module) -> nn.Module:
    """The model in `int8`, on the engines that `auto` chooses."""
    lowbit.convert_(model, "int8")
    return model


class TestTimings:
    """Single times, shapes and tables check themselves."""

    @pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_time_is_positive(self, ms: float) -> None:
        """A time that no clock gives is refused."""
        with pytest.raises(ValueError, match="must be positive"):
            timing(SMALL, "sbm8", 1.0, ms)

    def test_a_time_is_of_a_standin(self) -> None:
        """A recipe that stands for none is refused by name."""
        with pytest.raises(ValueError, match="'fp32': only"):
            timing(SMALL, "fp32", 1.0, 1.0)

    @pytest.mark.parametrize("change", [{"kind": "matrix"}, {"inputs": 0}, {"taps": 0}])
    def test_a_shape_is_of_a_layer(self, change: dict[str, Any]) -> None:
        """An unknown kind or a number below 1 is refused."""
        with pytest.raises(ValueError, match=r"matrix|at least 1"):
            dataclasses.replace(SMALL, **change)

    def test_a_table_covers_every_kind_and_recipe(self) -> None:
        """A table without a convolution could answer for none, and is refused."""
        with pytest.raises(ValueError, match="no time of a conv layer"):
            Table(MIXED.timings[:-3])

    def test_int8_is_preferred_where_times_are_alike(self) -> None:
        """A difference within a tenth is no reason for the reference engine; a larger one is."""
        assert timing(SMALL, "sbm8", 1.0, 1.09).fastest == "int8"
        assert timing(SMALL, "sbm8", 1.0, 1.11).fastest == "reference"

    def test_speed_is_against_full_precision(self) -> None:
        """Half the time of fp32 is a speed of 2."""
        assert timing(SMALL, "sbm8", 4.0, 0.5).speed("int8") == 2
        assert timing(SMALL, "sbm8", 4.0, 0.5).speed("reference") == 0.25


class TestNearest:
    """The timing that a layer is looked up by."""

    @pytest.mark.parametrize(("channels", "found"), [(1, SMALL), (15, SMALL), (17, LARGE), (4096, LARGE)])
    def test_nearest_in_doublings(self, channels: int, found: Shape) -> None:
        """Between 4 and 64 channels the middle is 16: distances are ratios."""
        shape = Shape(kind="linear", inputs=channels, outputs=channels)

        nearest = MIXED.nearest(shape, lowbit.Recipe.from_name("sbm8"))

        assert nearest is not None
        assert nearest.shape == found

    def test_kinds_do_not_answer_for_each_other(self) -> None:
        """A convolution is looked up among convolutions, however far its shape is."""
        nearest = MIXED.nearest(dataclasses.replace(SMALL, kind="conv"), lowbit.Recipe.from_name("sbm8"))

        assert nearest is not None
        assert nearest.shape == CONV

    @pytest.mark.parametrize(
        ("recipe", "name"), [("int8", "int8"), ("sbm8", "sbm8"), ("bf16", "bf16"), ("w4a4g6", "int8"), ("fp32", None)]
    )
    def test_recipes_are_looked_up_by_their_units(self, recipe: str, name: str | None) -> None:
        """Three integer products are as `int8`, a bf16 `grad_weight` as `sbm8`; nothing stands for full precision."""
        assert calibration.standin(lowbit.Recipe.from_name(recipe)) == name


class TestFile:
    """The table in the user's cache folder."""

    def test_a_saved_table_is_found_again(self) -> None:
        """Times come back as they were, with the file in words."""
        file = calibration.save(MIXED)

        assert calibration.load() == (MIXED, f"times of this machine in {file}")

    def test_the_cache_folder_is_that_of_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """XDG_CACHE_HOME counts where it is absolute; else ~/.cache does."""
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        assert calibration.path().parent == tmp_path / "elsewhere" / "lowbit"
        for value in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert calibration.path().parent == tmp_path / "home" / ".cache" / "lowbit"

    def test_without_a_file_the_command_is_named(self) -> None:
        """A machine that was not measured has no table, and the way to one is said."""
        table, said = calibration.load()

        assert table is None
        assert "lowbit bench --calibrate" in said

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: text.replace('"int8": 4.0', '"int8": NaN'),
            lambda text: text.replace('"fp32"', '"fp31"'),
            lambda text: text.replace('"conv"', '"linear"'),
            lambda text: text.replace('"inputs": 4', '"inputs": "4"'),
            lambda _: "[]",
            lambda _: "\x00\xff",
        ],
        ids=["half", "nan", "key", "kind", "text", "list", "bytes"],
    )
    def test_a_damaged_file_is_said_and_not_used(self, damage: Any) -> None:
        """Whatever is wrong with the file, there is no table and its path is named."""
        file = calibration.save(MIXED)
        file.write_bytes(damage(file.read_text()).encode("latin-1"))

        table, said = calibration.load()

        assert table is None
        assert f"{file} is damaged" in said

    @pytest.mark.parametrize("damage", ["too long", "FIFO", "nested"])
    def test_a_file_is_read_up_to_a_limit(self, damage: str) -> None:
        """Neither a sparse file of 300 GiB, nor a FIFO, nor 100,000 brackets stop a conversion."""
        file = calibration.save(MIXED)
        file.unlink()
        if damage == "FIFO":
            os.mkfifo(file)
        else:
            file.write_bytes(100_000 * b"[")
            os.truncate(file, 300 << 30 if damage == "too long" else 100_000)

        table, said = calibration.load()

        assert table is None
        assert f"{file} is damaged" in said
        assert damage in said or damage == "nested"

    def test_a_file_of_another_machine_is_said_and_not_used(self) -> None:
        """A table that was copied here from elsewhere is not this machine's."""
        file = calibration.save(MIXED)
        content = json.loads(file.read_text())
        content["machine"]["processor"] = "another"
        file.write_text(json.dumps(content))

        table, said = calibration.load()

        assert table is None
        assert f"{file} was measured elsewhere" in said
        assert "another" in said

    @pytest.mark.parametrize("name", ["processor", "instruction_sets", "threads", "torch", "lowbit"])
    def test_everything_that_times_depend_on_names_the_file(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another processor, number of threads or version has a table of its own beside this one."""
        mine = calibration.save(MIXED)
        other = dataclasses.replace(here(), **{name: 99 if name == "threads" else "other"})

        monkeypatch.setattr(calibration, "here", lambda: other)

        assert calibration.path() != mine
        assert calibration.load()[0] is None

    def test_saving_leaves_one_file(self) -> None:
        """A newer table replaces the older one whole, and no temporary file stays."""
        calibration.save(MIXED)
        newer = table_of(small=(1.0, 1.0), large=(1.0, 1.0))

        file = calibration.save(newer)

        assert calibration.load()[0] == newer
        assert list(file.parent.iterdir()) == [file]


@needs_units
class TestMeasuring:
    """Times of real layers; how long they take is never asserted."""

    def test_every_shape_is_timed_in_every_recipe(self) -> None:
        """A grid of a linear layer and a grouped convolution gives a time for each recipe that stands for others."""
        grid = ((Shape(kind="linear", inputs=8, outputs=4), 1), (Shape(kind="conv", inputs=4, outputs=2, groups=2), 4))

        table = calibration.measure(grid, rounds=1)

        assert [(t.shape, t.recipe) for t in table.timings] == [(s, r) for s, _ in grid for r in STANDINS.values()]
        assert "conv 4 to 2, 1 tap, 2 groups" in str(table)

    def test_what_is_timed_are_the_layers_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each shape runs forward and backward in full precision and on both engines, in the same rounds."""
        seen: list[dict[str, Any]] = []

        def record(steps: dict[str, Any], rounds: int, **_: Any) -> dict[str, list[float]]:
            seen.append(steps)
            return {name: [0.001] * rounds for name in steps}

        monkeypatch.setattr(calibration, "paired", record)
        calibration.measure(((SMALL, 1), (CONV, 4)), rounds=1)
        engines = {}
        for name, step in seen[0].items():
            called: list[watch.ProductCall] = []
            with watch.counted_by(called.append):
                step()
            engines[name] = [call.engine for call in called]

        assert list(seen[1]) == list(seen[0])
        assert engines["fp32"] == []
        assert engines["sbm8 reference"] == ["reference"] * 3
        assert sorted(engines["sbm8 int8"]) == ["bf16", "int8", "int8"]
        assert engines["int8 int8"] == ["int8"] * 3

    def test_the_grid_has_every_kind_and_groups(self) -> None:
        """Stored shapes cover both kinds, grouped and depthwise convolutions; each side is a whole square root."""
        shapes = [shape for shape, _ in calibration.GRID]

        assert {shape.kind for shape in shapes} == {"linear", "conv"}
        assert {(1, 16), (32, 4)} <= {(shape.inputs, shape.groups) for shape in shapes}
        assert all(round(shape.taps**0.5) ** 2 == shape.taps for shape in shapes)
        assert len(set(shapes)) == len(shapes)


@needs_units
class TestAuto:
    """`engine="auto"` goes by the table, and says so."""

    def test_the_faster_engine_is_chosen_for_each_layer(self) -> None:
        """Of two layers the small one runs on the reference engine and the large one on int8, as measured."""
        calibration.save(MIXED)
        model = two_layers()

        report = lowbit.convert_(model, "int8")

        assert engines(model) == ["reference", "int8"]
        assert "reference engine for 0: measured 2 ms against 4 on int8 units, as linear 4 to 4" in str(report)
        assert f"engines chosen by times of this machine in {calibration.path()}" in str(report)

    def test_without_a_table_the_rule_decides(self) -> None:
        """A machine that was not measured runs both on int8, and the report says by what."""
        model = two_layers()

        report = lowbit.convert_(model, "int8")

        assert engines(model) == ["int8", "int8"]
        assert "engines chosen by what the units take and by channels" in str(report)
        assert "was not measured" in str(report)
        assert [row.speed for row in report.rows] == [None, None]

    def test_the_table_beats_the_rule_of_few_channels(self) -> None:
        """A grouped convolution of few channels is left to the reference engine only where nothing was measured."""
        layers = [nn.Conv2d(8, 8, 3, groups=4) for _ in range(2)]

        lowbit.convert_(layers[0], "int8")
        calibration.save(MIXED)
        lowbit.convert_(layers[1], "int8")

        assert [engines(layer) for layer in layers] == [["reference"], ["int8"]]

    def test_a_damaged_table_is_said_and_the_rule_decides(self) -> None:
        """A file that cannot be read changes no engine and stands in the report."""
        calibration.save(MIXED).write_text("{")
        model = two_layers()

        report = lowbit.convert_(model, "int8")

        assert engines(model) == ["int8", "int8"]
        assert f"{calibration.path()} is damaged" in str(report)

    def test_layers_without_gain_are_named(self) -> None:
        """The layer that no engine makes faster than fp32 is in the report with its speed; the other is not."""
        calibration.save(MIXED)

        report = lowbit.convert_(two_layers(), "int8")

        assert report.without_gain == ("0",)
        assert [row.speed for row in report.rows] == [0.5, 2.0]
        assert "no gain: 0.50 times the speed of fp32 as linear 4 to 4" in report.rows[0].reason
        assert "no engine is faster than fp32 for 0; whether the whole step is faster" in str(report)

    def test_where_all_gain_nobody_is_named(self) -> None:
        """A table in which int8 is faster throughout gives no such line."""
        calibration.save(table_of(small=(2.0, 0.5), large=(2.0, 0.5)))

        report = lowbit.convert_(two_layers(), "int8")

        assert report.without_gain == ()
        assert "no gain" not in str(report)

    def test_a_layer_that_int8_cannot_run_is_compared_on_the_reference(self) -> None:
        """Codes of 9 bits run on the reference engine only, so its time decides about a gain."""
        calibration.save(MIXED)
        recipe = lowbit.Recipe.from_name("w9a9g9").replace(name="all", first="convert", last="convert")

        report = lowbit.convert_(two_layers(), recipe)

        assert [row.speed for row in report.rows] == [0.5, 1 / 3]
        assert "codes of 9 bits do not fit 8-bit units" in str(report)

    @pytest.mark.parametrize("engine", ["int8", "reference"])
    def test_an_engine_that_was_asked_for_is_taken(self, engine: str) -> None:
        """With an explicit engine the table decides nothing and the report does not speak of it."""
        calibration.save(MIXED)
        model = two_layers()

        report = lowbit.convert_(model, "int8", engine=engine)

        assert engines(model) == [engine] * 2
        assert report.without_gain == ()
        assert "times of this machine" not in str(report)

    @pytest.mark.parametrize(
        "layer",
        [nn.MultiheadAttention(8, 2), nn.LSTM(6, 8), nn.ConvTranspose2d(8, 4, 3), nn.Conv1d(8, 8, 3, groups=8)],
        ids=lambda layer: type(layer).__name__,
    )
    def test_every_layer_with_products_is_looked_up(self, layer: nn.Module) -> None:
        """Attention, recurrent layers and convolutions of all kinds have a speed."""
        calibration.save(MIXED)

        assert lowbit.convert_(layer, "int8").rows[0].speed is not None

    def test_normalisation_is_not_looked_up(self) -> None:
        """Range BN has no product: it runs where its codes fit, and no speed stands in its row."""
        calibration.save(MIXED)

        report = lowbit.convert_(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "sbm8")

        assert [row.speed is None for row in report.rows] == [False, True]
        assert set(report.rows[1].engines.values()) == {"int8"}


@needs_units
class TestLoadedEngines:
    """The engines of a run go on, whatever was measured since."""

    def test_a_loaded_state_brings_its_engines(self) -> None:
        """A model that `auto` converted before this machine was measured goes on as it was, bit for bit."""
        x = torch.randn(3, 5)
        models = []
        for measured in (False, True):
            if measured:
                calibration.save(MIXED)
            torch.manual_seed(0)
            models.append(two_layers())
            lowbit.convert_(models[-1], "int8")
        before = engines(models[1])
        state = lowbit.state_dict(models[0])

        lowbit.load_state_dict(models[1], state)

        assert before == ["reference", "int8"]
        assert engines(models[1]) == engines(models[0]) == ["int8", "int8"]
        assert torch.equal(models[0](x), models[1](x))

    def test_a_checkpoint_of_a_run_brings_them(self, tmp_path: Path) -> None:
        """A run of the command line goes on with the engines it began with."""
        settings: dict[str, Any] = {"model": "mlp", "data": "digits", "subset": 64, "batch_size": 32, "epochs": 1}
        config = TrainConfig(**settings, recipe="int8", threads=torch.get_num_threads(), out=tmp_path / "run")
        trainer.train(config)
        calibration.save(table_of(small=(0.1, 1.0), large=(0.1, 1.0)))

        network, _ = trainer.trained(config.out)

        assert set(engines(network)) == {"int8"}
        assert set(engines(converted(two_layers()))) == {"reference"}

    def test_the_reference_engine_is_brought_too(self) -> None:
        """A state of the reference engine is not moved to int8 by a later choice, also not layer by layer."""
        calibration.save(MIXED)
        saved, model = two_layers(), two_layers()
        lowbit.convert_(saved, "int8")
        calibration.path().unlink()
        lowbit.convert_(model, "int8")

        lowbit.load_state_dict(model, lowbit.state_dict(saved))

        assert engines(model) == ["reference", "int8"]

    @pytest.mark.parametrize("asked", ["int8", "reference"])
    def test_an_engine_that_was_asked_for_refuses_another(self, asked: str) -> None:
        """Whoever asked for an engine gets no other one from a state: both are named, and nothing changes."""
        calibration.save(MIXED)
        saved, model = two_layers(), two_layers()
        lowbit.convert_(saved, "int8")
        lowbit.convert_(model, "int8", engine=asked)

        with pytest.raises(UsageError, match=r"saved .*engine (int8|reference).*here .*engine " + asked):
            lowbit.load_state_dict(model, lowbit.state_dict(saved))
        assert engines(model) == [asked] * 2

    def test_a_saved_engine_that_cannot_run_here_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A state of the int8 engine does not load on a machine without its units, and the reason is said."""
        saved, model = two_layers(), two_layers()
        lowbit.convert_(saved, "int8")
        monkeypatch.setattr("lowbit.engines.int8.missing", lambda unit: f"no {unit} units")
        lowbit.convert_(model, "int8")

        with pytest.raises(UsageError, match=r"'0' was saved on the int8 engine, .*no int8 units"):
            lowbit.load_state_dict(model, lowbit.state_dict(saved))
        assert engines(model) == ["reference"] * 2

    def test_an_unknown_saved_engine_is_refused(self) -> None:
        """An engine that nobody knows names the layer and the known ones."""
        model = two_layers()
        lowbit.convert_(model, "int8")
        state = lowbit.state_dict(model)
        state["groups"][0]["sites"]["2"]["engine"] = "int9"

        with pytest.raises(UsageError, match=r"engine of '2'.*int9.*Known: int8, reference"):
            lowbit.load_state_dict(model, state)
