"""``lowbit inspect``: what a recipe converts, and what its formats do to real batches."""

from pathlib import Path
from typing import Any

from lowbit.cli.shapes import task_of, whole
from lowbit.errors import UsageError

DESCRIPTION = "Show which layers a recipe converts, which it skips and why, without training."
HELP = "show what a recipe converts, without training"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("--model", type=str, help="name of the model, or a class of your own file: FILE.py:CLASS")
    parser.add_argument("--recipe", type=str, default="sbm8", help="name of the recipe")
    parser.add_argument("--data", type=str, help="data set whose input and labels the model gets")
    parser.add_argument("--shape", type=str, help="without --data: C,H,W of an image or T of a text (3,32,32)")
    parser.add_argument("--classes", type=int, help="without --data: outputs of the model (10; 256 for text)")
    parser.add_argument("--probe", action="store_true", help="measure errors and sensitivity on batches of --data")
    parser.add_argument("--run", type=Path, help="probe: the model, weights, recipe and data of this run's checkpoint")
    parser.add_argument("--batches", type=int, default=2, help="probe: batches to take (2)")
    parser.add_argument("--batch_size", type=int, help="probe: samples in each (64; with --run its own)")
    parser.add_argument("--bits", type=str, default="2,3,4,6", help="probe: widths to try in each layer (2,3,4,6)")
    parser.add_argument("--budget", type=float, help="probe: suggest bits that take this share of the bit operations")


_MOST_PARAMETERS = 2**29  # of a model that is built to be shown, 2 GiB


def run(
    *,
    model: str | None,
    recipe: str,
    data: str | None,
    shape: str | None,
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
        if shape is not None or classes is not None:
            raise UsageError("--probe runs real batches: give --data in place of --shape and --classes.")
        _probe(model=model, recipe=recipe, data=data, **probing)
        return
    if model is None:
        raise UsageError("missing: --model")
    if data is None:
        task = task_of(shape or "3,32,32", classes)
    elif shape is None and classes is None:
        task = load(data, batch_size=1, seed=0).task
    else:
        raise UsageError("--shape and --classes come from the data set: give either them or --data.")
    assert isinstance(task, Task)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.build(model, task).parameters())
    if parameters > _MOST_PARAMETERS:
        raise UsageError(
            f"{model} would have {parameters:,} parameters for these sizes, and at most {_MOST_PARAMETERS:,} are "
            "built to be shown: give a smaller --shape or fewer --classes."
        )
    print(lowbit.convert_(models.build(model, task), recipe))


def _probe(
    *,
    model: str | None,
    recipe: str,
    data: str | None,
    run: Path | None,
    batches: int,
    batch_size: int | None,
    bits: str,
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
    widths = [whole(width) for width in bits.split(",")]
    if 0 in widths:
        raise UsageError(f"--bits must be whole numbers with commas between, e.g. 2,3,4, got {bits!r}.")
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

    found = lowbit.probe(network, islice(loaded.train, batches), loss, bits=widths)
    print(found)
    if budget is not None:
        print(f"\n{found.suggest(budget)}")
