"""Training steps on the units of the processor: fp32, bf16 autocast, and recipes on the int8 engine inside it.

Paired rounds in one process: each round runs one step of every variant, in an order that rotates, so that a slow moment
of the machine meets all of them. Medians over rounds. Example:

    python benchmarks/speed.py --works mlp gpt-512 --variants fp32 bf16 sbm8 int8
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.tables import text_table
from lowbit.train.models import GPT, ResNet

Work = tuple[nn.Module, Tensor, Tensor]


def mlp() -> Work:
    """1024-2048-2048-2048-16, batch 1024."""
    sizes = [1024, 2048, 2048, 2048]
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(2048, 16)), torch.randn(1024, 1024), torch.randint(16, (1024,))


def gpt(d: int, batch: int) -> Work:
    """4 layers, 8 heads, 256 positions, 1024 tokens."""
    model = GPT(vocabulary=1024, d=d, layers=4, heads=8, context=256)
    return model, torch.randint(1024, (batch, 256)), torch.randint(1024, (batch * 256,))


def resnet(depths: tuple[int, ...], width: int, batch: int) -> Work:
    """On 3×32×32 images, memory channels last."""
    model = ResNet(depths=depths, width=width, classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    return model, x, torch.randint(10, (batch,))


WORKS: dict[str, Callable[[], Work]] = {
    "mlp": mlp,
    "gpt-512": partial(gpt, 512, 8),
    "gpt-1024": partial(gpt, 1024, 4),
    "resnet18": partial(resnet, (2, 2, 2, 2), 64, 32),
    "resnet20": partial(resnet, (3, 3, 3), 16, 128),
}


def stepper(work: str, variant: str) -> Callable[[], None]:
    """One training step: ``fp32`` and ``bf16`` plain, anything else a recipe inside bf16 autocast."""
    torch.manual_seed(0)
    model, x, y = WORKS[work]()
    if variant not in ("fp32", "bf16"):
        lowbit.convert_(model, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=variant != "fp32"):
            logits = model(x)
        F.cross_entropy(logits.flatten(0, -2).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    """Time the variants and print a table for each piece of work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--variants", nargs="+", default=["fp32", "bf16", "sbm8", "int8"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for work in args.works:
        steps = {variant: stepper(work, variant) for variant in args.variants}
        seconds: dict[str, list[float]] = {variant: [] for variant in args.variants}
        for i in range(-2, args.rounds):  # two rounds to warm up
            turn = i % len(args.variants)
            for variant in args.variants[turn:] + args.variants[:turn]:
                began = time.perf_counter()
                steps[variant]()
                if i >= 0:
                    seconds[variant].append(time.perf_counter() - began)
        medians = {variant: statistics.median(taken) for variant, taken in seconds.items()}
        for variant, taken in seconds.items():
            ratios = [
                f"{medians[base] / medians[variant]:.2f}" if base in medians else "-" for base in ("fp32", "bf16")
            ]
            rows.append(
                [work, variant, *(f"{s * 1e3:.1f}" for s in (medians[variant], min(taken), max(taken))), *ratios]
            )
    print(f"{args.rounds} rounds, {args.threads} threads\n{machine.describe()}\n")
    print(text_table(["work", "variant", "median ms", "min", "max", "speed to fp32", "to bf16"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
