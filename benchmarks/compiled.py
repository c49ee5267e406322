"""Training steps of a GPT, eager and compiled as one graph: times in paired rounds.

    python benchmarks/compiled.py [--width 256] [--layers 2] [--recipes fp32 int8] [--modes default] [--rounds 9]

Each way has a model of its own with the same weights. A step is forward, loss, backward and update (SGD). Every round
times each way once, in turn, in one process. A row gives the median step, the seconds that compiling took, and the
speed beside the eager step of the same recipe, the median of ratios over rounds; above 1 the compiled step is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit import machine
from lowbit.tables import text_table
from lowbit.train.models.transformer import GPT


def step_of(recipe: str, mode: str | None, width: int, layers: int, batch: int, context: int) -> Callable[[], Tensor]:
    """A step of training that gives its loss."""
    torch.manual_seed(0)
    model = GPT(d=width, layers=layers, context=context)
    lowbit.convert_(model, recipe)
    call = model if mode is None else torch.compile(model, mode=mode, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randint(256, (2, batch, context))

    def step() -> Tensor:
        loss = F.cross_entropy(call(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--recipes", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--modes", nargs="+", default=["default", "max-autotune"])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    print(machine.here())
    sizes = (asked.width, asked.layers, asked.batch, asked.context)
    works: dict[str, Callable[[], Tensor]] = {}
    compiling: dict[str, str] = {}
    for recipe in asked.recipes:
        for mode in (None, *asked.modes):
            name = f"{recipe} {mode or 'eager'}"
            works[name] = step_of(recipe, mode, *sizes)
            began = time.perf_counter()
            for _ in range(3):
                works[name]()
            compiling[name] = "" if mode is None else f"{time.perf_counter() - began:.0f}"
    taken = machine.paired(works, asked.rounds)
    rows = []
    for name, seconds in taken.items():
        beside = machine.ratio(taken[f"{name.split()[0]} eager"], seconds)
        rows.append([name, f"{1e3 * statistics.median(seconds):.1f}", f"{beside:.2f}", compiling[name]])
    print(
        f"\nGPT d={asked.width}, {asked.layers} layers, {asked.batch} x {asked.context} tokens, {asked.rounds} rounds"
    )
    print(text_table(["step", "median ms", "x eager", "seconds to compile"], rows))


if __name__ == "__main__":
    main()
