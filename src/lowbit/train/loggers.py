"""Where the figures of a run go: its own table always, and TensorBoard or a tracker that is installed.

A tracker's run has the name of the run folder. It is the same run after a resume: `IDENTITY` keeps what the tracker
calls it. Addresses and modes are the tracker's own, from its environment variables (``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI``).
"""

import importlib
import json
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lowbit.errors import RunError
from lowbit.inputs import files
from lowbit.tables import json_text
from lowbit.train.config import LoggerName, TrainConfig
from lowbit.train.rows import Rows

IDENTITY = "logger.json"
"""File in a run folder that has the name of a tracker, and of the run in it."""

_PROJECT = "lowbit"
_LONGEST = 300  # characters of a tracker's error
_SCORES = ("test_accuracy", "test_bits_per_byte", "test_loss")
_PACKAGES: dict[LoggerName, str] = {
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "wandb": "wandb",
}


def check_installed(config: TrainConfig) -> None:
    """Raise where the package of the run's logger is missing.

    Raises:
        RunError: it is; the message says how to install it.
    """
    name = config.logger or "tensorboard"
    package = _PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise RunError(f"--logger {name} needs a package that is not installed: pip install {package}")


def make_loggers(config: TrainConfig, began: int) -> list[Logger]:
    """The loggers of a run, which carry on where the checkpoint of step `began` was written."""
    assert config.out is not None
    made: list[Logger] = [Rows(config.out / "csv" / "metrics.csv", step=began)]
    name = config.logger or "tensorboard"
    if name in _MAKERS:
        try:
            made.append(_MAKERS[name](config, began))
        except (RunError, OSError):
            raise
        except Exception as error:  # of a package that this one knows nothing about
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
            raise RunError(f"--logger {name} cannot begin: {reason}") from error
    return made


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not left open, as a tracker's table shows them."""
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    return {name: value if isinstance(value, int | float) else str(value) for name, value in values.items()}


class Board(TensorBoardLogger):
    """TensorBoard, whose table of hyperparameters shows the run's scores beside its settings."""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Write the settings once; Lightning calls it too, with none."""
        if not params:
            return
        from torch.utils.tensorboard.summary import hparams

        assert isinstance(params, dict)
        self.hparams.update(params)
        writer = self.experiment._get_file_writer()
        for summary in hparams(params, dict.fromkeys(_SCORES, 0.0)):  # it takes the names of the scores alone
            writer.add_summary(summary)


class Trackio(Logger):
    """The local tracker trackio, for which Lightning has no logger.

    Args:
        run: name of the run, which goes on if it is there.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self._module: Any = importlib.import_module("trackio")
        self._run = run
        self._open: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return _PROJECT

    @property
    def version(self) -> str:
        """The run."""
        return self._run

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Begin the run with its settings; Lightning calls it too, with none."""
        if self._open is None:
            self._open = self._module.init(project=_PROJECT, name=self._run, config=dict(params), resume="allow")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add figures after `step` steps."""
        self._open.log(dict(metrics), step=step)

    def finalize(self, status: str) -> None:  # noqa: ARG002 - Lightning's name
        """Send what is left at the end of the run."""
        self._open.finish()


def _board(config: TrainConfig, began: int) -> Logger:
    assert config.out is not None
    # With this step TensorBoard drops what a killed process wrote after its checkpoint.
    logger = Board(config.out, name="", version="tensorboard", default_hp_metric=False, purge_step=began + 1)
    logger.log_hyperparams(_settings(config))
    return logger


def _mlflow(config: TrainConfig, began: int) -> Logger:
    assert config.out is not None
    known = _identity(config, "mlflow") if began else None
    logger = MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT),
        run_name=config.out.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),
        run_id=known,
    )
    assert logger.run_id is not None
    if known is None:
        logger.log_hyperparams(_settings(config))  # MLflow refuses settings that changed on the way
    _keep_identity(config, "mlflow", logger.run_id)
    return logger


def _wandb(config: TrainConfig, began: int) -> Logger:
    assert config.out is not None
    number = (_identity(config, "wandb") if began else None) or secrets.token_hex(4)
    _keep_identity(config, "wandb", number)
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    logger = WandbLogger(name=config.out.name, save_dir=config.out, id=number, project=project)
    logger.log_hyperparams(_settings(config))
    return logger


def _trackio(config: TrainConfig, began: int) -> Logger:
    assert config.out is not None
    run = (_identity(config, "trackio") if began else None) or f"{config.out.name}-{secrets.token_hex(4)}"
    _keep_identity(config, "trackio", run)
    logger = Trackio(run)
    logger.log_hyperparams(_settings(config))
    return logger


_MAKERS: dict[LoggerName, Callable[[TrainConfig, int], Logger]] = {
    "tensorboard": _board,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "wandb": _wandb,
}


def _identity(config: TrainConfig, tracker: str) -> str | None:
    """What the tracker calls this run; None if it is not known."""
    assert config.out is not None
    path: Path = config.out / IDENTITY
    if not path.exists():
        return None
    try:
        values = json.loads(files.read(path, limit=1 << 16, hint="It is not of `lowbit train`."))
        return str(values["run"]) if values["tracker"] == tracker else None
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged: remove it, and the tracker gets a new run") from error


def _keep_identity(config: TrainConfig, tracker: str, run: str) -> None:
    assert config.out is not None
    files.write_text(config.out / IDENTITY, json_text({"tracker": tracker, "run": run}) + "\n")
