"""``lowbit train``: train a model in a new run folder."""

from typing import Any

from lowbit.cli.output import add_progress, progress_of, show, write
from lowbit.cli.sweep import plan_of, run_seeds
from lowbit.errors import UsageError
from lowbit.launch import is_first, launched

DESCRIPTION = "Train a model in a new run folder."
HELP = "train a model in a new run folder"
EXAMPLE = "lowbit train --model resnet20 --data fashion-mnist --recipe sbm8 --epochs 3"
_PROCESSES = "several processes, see docs/processes.md"
_GROUPS = {
    "what to train": ("model", "data", "recipe", "epochs", "batch_size", "max_steps", "subset", "seed", "out"),
    "learning rate": ("optimizer", "lr", "weight_decay", "schedule"),
    "bits over time (recipes such as cpt)": ("low", "high", "cycles"),
    "speed": ("threads", "engine", "amp"),
    _PROCESSES: ("strategy", "exchange", "synchronized"),
    "tests and logs": ("evaluate", "proof", "logger"),
}


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    from lowbit.train.config import TrainConfig

    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of settings; later flags win")
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML, and do not train")
    group = parser.add_argument_group("several runs")
    group.add_argument("--seeds", metavar="N,N", help="e.g. 0,1,2: a run for each, OUT/seed0 and so on, and a table")
    group.add_argument("--jobs", type=int, metavar="N", help="with --seeds: runs at the same time (1)")
    add_progress(parser)
    parser.add_class_arguments(TrainConfig, _GROUPS, rest="further settings, of some recipes or of rare use")
    parser.rare.add(_PROCESSES)


def run(*, print_config: bool, seeds: str | None, jobs: int | None, progress: str, **settings: Any) -> None:
    """Train, and print the result."""
    from lowbit.train.config import TrainConfig

    del settings["config"]  # its settings are among the others
    config = TrainConfig(**settings)
    if jobs is not None and seeds is None:
        raise UsageError("--jobs goes with --seeds: one run is one process")
    if print_config:
        import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

        configs = [config] if seeds is None else plan_of(config, seeds).values()
        texts = [yaml.safe_dump(each.to_dict(), sort_keys=False) for each in configs]
        write("---\n".join(texts).rstrip("\n"))
        return
    if seeds is not None:
        if launched() > 1:
            raise UsageError("--seeds starts processes by itself: give it to one, not to torchrun's")
        run_seeds(config, seeds, 1 if jobs is None else jobs)
        return
    from lowbit.train import trainer

    result = trainer.train(config, progress=progress_of(progress))
    if is_first():
        show(result)
