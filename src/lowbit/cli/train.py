"""``lowbit train``: train a model in a new run folder."""

from typing import Any

from lowbit.cli.output import show
from lowbit.cli.sweep import run_seeds
from lowbit.errors import UsageError
from lowbit.train.config import TrainConfig

DESCRIPTION = "Train a model in a new run folder."
HELP = "train a model in a new run folder"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("--config", action="config", help="YAML file of the settings below; later flags win")
    parser.add_argument("--seeds", type=str, help="e.g. 0,1,2: a run for each, OUT/seed0 and so on, and a table")
    parser.add_argument("--jobs", type=int, help="with --seeds: runs at the same time (1)")
    parser.add_class_arguments(TrainConfig)


def run(*, seeds: str | None, jobs: int | None, **settings: Any) -> None:
    """Train, and print the result."""
    from lowbit.train import trainer

    del settings["config"]  # its settings are among the others
    config = TrainConfig(**settings)
    if seeds is not None:
        run_seeds(config, seeds, 1 if jobs is None else jobs)
    elif jobs is not None:
        raise UsageError("--jobs goes with --seeds: one run is one process")
    else:
        show(trainer.train(config))
