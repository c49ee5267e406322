"""Seconds per training step of several recipes on the reference engine, in paired rounds inside one process.

Each round runs one step of every recipe, in an order that rotates, so that a slow moment of the machine meets all of
them. Medians over rounds, and the median of each round's ratio to the first recipe. Example:

    python benchmarks/step_time.py --recipes fp32 bf16 sbm8 sbm8-cpt
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowbit
from lowbit import machine
from lowbit.tables import text_table
from lowbit.train import models
from lowbit.train.data import Task


def stepper(recipe: str, model_name: str, batch: int) -> Callable[[], None]:
    """A function that runs one training step of a freshly converted model on fixed random images."""
    torch.manual_seed(0)
    task = Task(kind="image", shape=(1, 28, 28), classes=10)
    model = models.build(model_name, task)
    lowbit.convert_(model, recipe, engine="reference")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, *task.shape), torch.randint(task.classes, (batch,))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    """Time the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["fp32", "bf16", "sbm8", "sbm8-cpt"])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    steps = {recipe: stepper(recipe, args.model, args.batch) for recipe in args.recipes}
    seconds = machine.paired(steps, args.rounds)
    print(f"{args.model}, batch {args.batch}, 1x28x28, {args.rounds} rounds\n{machine.here()}\n")
    first = seconds[args.recipes[0]]
    rows = []
    for recipe, taken in seconds.items():
        ratio = machine.ratio(taken, first)
        rows.append(
            [recipe, f"{statistics.median(taken):.3f}", f"{min(taken):.3f}", f"{max(taken):.3f}", f"{ratio:.2f}"]
        )
    print(text_table(["recipe", "median s", "min", "max", f"times {args.recipes[0]}"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
