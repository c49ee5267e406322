"""Where the figures of a run go: TensorBoard with the settings, and the trackers that stand in for real ones here.

No tracker is installed for the tests. Real ones were tried by hand, see docs/design.md.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from runs import config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lowbit.cli import main as cli
from lowbit.errors import RunError, UsageError
from lowbit.train import loggers, trainer
from lowbit.train.config import LoggerName


def hparams(folder: Path) -> dict[str, Any]:
    """The contents of TensorBoard's table of hyperparameters by tag."""
    events = EventAccumulator(str(folder)).Reload()
    found = {}
    for tag in events.summary_metadata:
        if events.summary_metadata[tag].plugin_data.plugin_name == "hparams":
            found[tag] = HParamsPluginData.FromString(events.summary_metadata[tag].plugin_data.content)
    return found


def test_tensorboard_has_the_settings_and_the_names_of_the_scores(complete: Path) -> None:
    """The table of hyperparameters has what config.yaml says, and its scores are tags that the run logged."""
    found = hparams(complete / "tensorboard")
    logged = EventAccumulator(str(complete / "tensorboard")).Reload().Tags()["scalars"]

    values = found["_hparams_/session_start_info"].session_start_info.hparams
    experiment = found["_hparams_/experiment"].experiment
    assert values["recipe"].string_value == "sbm8"
    assert values["lr"].number_value == pytest.approx(0.05)
    assert values["epochs"].number_value == 3
    assert {"test_accuracy", "test_loss"} <= {info.name.tag for info in experiment.metric_infos} & set(logged)
    assert "hp_metric" not in logged


def test_csv_alone_writes_the_table_and_nothing_else(tmp_path: Path) -> None:
    """``--logger csv`` leaves out TensorBoard."""
    trainer.train(config(tmp_path / "run", logger="csv"))

    assert (tmp_path / "run" / "csv" / "metrics.csv").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_missing_package_is_said_before_anything_is_written(
    name: LoggerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line with the command that installs it, and there is no run folder."""
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)

    with pytest.raises(RunError, match=f"--logger {name} needs .*pip install {name}"):
        trainer.train(config(tmp_path / "run", logger=name))

    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    """The message has all names, and the nearest."""
    with pytest.raises(UsageError, match=r"'wanda'.*'wandb'.*csv, mlflow, tensorboard"):
        config(tmp_path, logger="wanda")


class Recorder(Logger):
    """Stands in for a tracker: it keeps what it was made with, and what it was told."""

    made: list["Recorder"] = []  # noqa: RUF012 - of the class, on purpose

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings, self.params, self.rows = settings, {}, []
        self.run_id = settings.get("run_id") or "given by MLflow"
        self.made.append(self)

    @property
    def name(self) -> str:
        """Of no importance."""
        return ""

    @property
    def version(self) -> str:
        """Of no importance."""
        return ""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Keep them."""
        self.params |= dict(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Keep them."""
        self.rows.append((step, dict(metrics)))


def trio() -> Any:
    """A stand-in for the package trackio."""

    def init(**settings: Any) -> Any:
        made = Recorder(**settings)
        made.params = settings["config"]
        return SimpleNamespace(log=made.log_metrics, finish=lambda: None)

    return SimpleNamespace(init=init)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The stand-ins that the runs of a test make."""
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(loggers, "MLFlowLogger", Recorder)
    monkeypatch.setattr(loggers, "WandbLogger", Recorder)
    monkeypatch.setitem(sys.modules, "trackio", trio())
    monkeypatch.setattr(loggers, "find_spec", lambda _: object())
    return Recorder.made


@pytest.mark.parametrize(("name", "key"), [("mlflow", "run_id"), ("trackio", "name"), ("wandb", "id")])
def test_a_tracker_gets_settings_and_figures_of_one_run(
    name: LoggerName, key: str, tmp_path: Path, recorded: list[Recorder]
) -> None:
    """The settings are told once, every row arrives, and a run that goes on is the tracker's same run."""
    out = tmp_path / "run"
    trainer.train(config(out, logger=name, epochs=1))
    trainer.resume(out, {"epochs": 2})

    first, second = recorded
    assert first.params["recipe"] == "sbm8"
    assert [step for step, row in [*first.rows, *second.rows] if "test_accuracy" in row] == [5, 10]
    known = json.loads((out / "logger.json").read_text())
    assert known["tracker"] == name
    assert second.settings[key] == known["run"]
    assert not (out / "tensorboard").exists()


def test_what_a_tracker_raises_is_one_line(
    tmp_path: Path, recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tracker that cannot be reached ends the run with a message that names it."""

    def fail(**_: Any) -> None:
        raise ValueError("no answer\nfrom there")

    monkeypatch.setattr(loggers, "WandbLogger", fail)
    out = tmp_path / "run"

    code = cli.main(["train", "--model", "mlp", "--data", "digits", "--logger", "wandb", "--out", str(out)])

    assert code == 1
    assert "no answer" in capsys.readouterr().err
    assert recorded == []
