"""``lowbit train``: train a model in a new run folder."""

from typing import Any

from lowbit.cli.output import show
from lowbit.train.config import TrainConfig

DESCRIPTION = "Train a model in a new run folder."
HELP = "train a model in a new run folder"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("--config", action="config", help="YAML file of the settings below; later flags win")
    parser.add_class_arguments(TrainConfig)


def run(**settings: Any) -> None:
    """Train, and print the result."""
    from lowbit.train import trainer

    del settings["config"]  # its settings are among the others
    show(trainer.train(TrainConfig(**settings)))
