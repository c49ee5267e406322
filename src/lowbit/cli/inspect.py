"""``lowbit inspect``: what a recipe converts, and what its formats do to real batches."""

from pathlib import Path
from typing import Any

from lowbit.cli.fold import folded
from lowbit.cli.shapes import task_of, whole
from lowbit.errors import UsageError

DESCRIPTION = "Show which layers a recipe converts, which it skips and why, without training."
HELP = "show what a recipe converts, without training"
EXAMPLE = "lowbit inspect --model resnet20 --recipe sbm8"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    group = parser.add_argument_group("what to convert")
    group.add_argument("--model", metavar="NAME", help="name of the model, or a class of your own: FILE.py:CLASS")
    group.add_argument("--recipe", metavar="NAME", default="sbm8", help="name of the recipe (sbm8)")
    group.add_argument("--data", metavar="NAME", help="data set whose input and labels the model gets")
    group.add_argument("--input", metavar="SIZES", help="without --data: C,H,W of an image or T of a text (3,32,32)")
    group.add_argument(
        "--classes", type=int, metavar="N", help="without --data: outputs of the model (10; 256 for text)"
    )
    group = parser.add_argument_group("measure on real batches")
    group.add_argument("--probe", action="store_true", help="measure errors and sensitivity on batches of --data")
    group.add_argument(
        "--run", type=Path, metavar="RUN", help="the model, weights, recipe and data of this run's checkpoint"
    )
    group.add_argument("--batches", type=int, metavar="N", default=2, help="batches to take (2)")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples in each (64; with --run its own)")
    group.add_argument("--widths", metavar="BITS", default="2,3,4,6", help="widths to try in each layer (2,3,4,6)")
    group.add_argument(
        "--budget", type=float, metavar="X", help="suggest bits that take this share of the bit operations"
    )
    parser.rename("--shape", "--input", "in lowbit train, --shape is that of a schedule")
    parser.rename("--bits", "--widths", "in lowbit train, --bits are those of a schedule")


_MOST_PARAMETERS = 2**29  # of a model that is built to be shown, 2 GiB


def run(
    *,
    model: str | None,
    recipe: str,
    data: str | None,
    input: str | None,  # noqa: A002 - the flag
    classes: int | None,
    probe: bool,
    **probing: Any,
) -> None:
    """Convert a fresh model and print the report, or probe one."""
    import torch

    import lowbit
    from lowbit.train import models
    from lowbit.train.data import Task, load

    if probe:
        if input is not None or classes is not None:
            raise UsageError("--probe runs real batches: give --data in place of --input and --classes.")
        _probe(model=model, recipe=recipe, data=data, **probing)
        return
    if model is None:
        raise UsageError("missing: --model")
    if data is None:
        task = task_of(input or "3,32,32", classes, flag="--input")
    elif input is None and classes is None:
        task = load(data, batch_size=1, seed=0).task
    else:
        raise UsageError("--input and --classes come from the data set: give either them or --data.")
    assert isinstance(task, Task)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.build(model, task).parameters())
    if parameters > _MOST_PARAMETERS:
        raise UsageError(
            f"{model} would have {parameters:,} parameters for these sizes, and at most {_MOST_PARAMETERS:,} are "
            "built to be shown: give a smaller --input or fewer --classes."
        )
    print(folded(str(lowbit.convert_(models.build(model, task), recipe))))


def _probe(
    *,
    model: str | None,
    recipe: str,
    data: str | None,
    run: Path | None,
    batches: int,
    batch_size: int | None,
    widths: str,
    budget: float | None,
) -> None:
    """Probe the model of a run's checkpoint, or a fresh one."""
    from itertools import islice

    import torch
    import torch.nn.functional as F

    import lowbit
    from lowbit.train import models
    from lowbit.train.data import load

    if (run is None) == (model is None or data is None) or (run is not None and (model or data)):
        raise UsageError("--probe needs either --run, or --model and --data.")
    if run is not None and batch_size is not None:
        raise UsageError("--batch-size is the run's own: leave it out with --run.")
    for flag, count in (("--batches", batches), ("--batch-size", batch_size)):
        if count is not None and count < 1:
            raise UsageError(f"{flag} must be at least 1, got {count}.")
    tried = [whole(width) for width in widths.split(",")]
    if 0 in tried:
        raise UsageError(f"--widths must be whole numbers with commas between, e.g. 2,3,4, got {widths!r}.")
    if run is not None:
        from lowbit.train.trainer import trained

        network, loaded = trained(run)
        print(f"checkpoint of {run}")
    else:
        assert model is not None
        assert data is not None
        loaded = load(data, batch_size=batch_size or 64, seed=0)
        torch.manual_seed(0)
        network = models.build(model, loaded.task)
        lowbit.convert_(network, recipe)
        print(f"{model} with fresh weights: give --run to probe a trained one")

    def loss(net: Any, batch: Any) -> Any:
        return F.cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())

    found = lowbit.probe(network, islice(loaded.train, batches), loss, bits=tried)
    print(folded(str(found)))
    if budget is not None:
        print(folded(f"\n{found.suggest(budget)}"))
