"""What `lowbit.Meter` adds to a training step, in paired rounds inside one process.

Each round runs one step with the meter and one without, of the same model on the same images, in turns. At batch 128
the difference drowns in the machine's noise, so it is also taken at batch 1, where it is the same: the meter's work
depends on the number of products, not on their size. Example:

    python benchmarks/meter.py --recipes none fp32 sbm8 --threads 1
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import lowbit
from lowbit import machine
from lowbit.tables import text_table
from lowbit.train import models
from lowbit.train.data import Task

PLAIN = "none"


def differences(recipe: str, model_name: str, batch: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a step without the meter, and the median of each round's difference."""
    torch.manual_seed(0)
    task = Task(kind="image", shape=(1, 28, 28), classes=10)
    model = models.build(model_name, task)
    if recipe != PLAIN:
        lowbit.convert_(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, *task.shape), torch.randint(task.classes, (batch,))
    meter = lowbit.Meter(model)

    def step(metered: bool) -> float:
        if metered:
            meter.attach()
        began = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if metered:
            meter.step()
        taken = time.perf_counter() - began
        if metered:
            meter.close()
        return taken

    for _ in range(3):
        step(True)
        step(False)
    pairs = []
    for i in range(rounds):
        first = step(i % 2 == 0)
        second = step(i % 2 == 1)
        pairs.append((first, second) if i % 2 == 0 else (second, first))
    return statistics.median(off for _, off in pairs), statistics.median(on - off for on, off in pairs)


def main() -> int:
    """Time the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=[PLAIN, "fp32", "sbm8"])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--large-rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(f"{args.model}, 1x28x28, {args.rounds} rounds at batch 1, {args.large_rounds} at batch 128")
    print(f"{machine.here()}\n")
    rows = []
    for recipe in args.recipes:
        small, added = differences(recipe, args.model, 1, args.rounds)
        large, noisy = differences(recipe, args.model, 128, args.large_rounds)
        rows.append(
            [
                recipe,
                f"{1000 * added:.2f}",
                f"{1000 * small:.1f}",
                f"{1000 * large:.0f}",
                f"{100 * added / large:.2f}",
                f"{100 * noisy / large:.2f}",
            ]
        )
    header = ["recipe", "meter ms", "step ms, batch 1", "step ms, batch 128", "share %", "share % measured at 128"]
    print(text_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
