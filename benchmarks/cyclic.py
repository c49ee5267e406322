"""What cyclic precision costs on 8-bit units: a step of `cpt-int8` while its bits swing, held at 8 bits, and fp32.

ResNet-18 (width 64) on 3×32×32 images, memory channels last; recipes inside bfloat16 autocast, SGD with momentum.
Paired rounds in one process: medians of seconds, and of each round's ratio. The swinging network runs the middle half
of a rising cycle, one step a round, so that its bits really change while it is measured. Example:

    python benchmarks/cyclic.py --rounds 40 --threads 1
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import PrecisionController, Recipe, machine
from lowbit.products.watch import ProductCall, counted_by
from lowbit.tables import text_table
from lowbit.train.models import ResNet

RECIPE = "cpt-int8"
WARM_UP = 2


def stepper(
    batch: int, *, autocast: bool, control: Callable[[nn.Module], PrecisionController] | None = None
) -> tuple[Callable[[], None], list[int | None]]:
    """One training step, of a converted network where it has a controller, and the forward bits of its steps so far."""
    torch.manual_seed(0)
    model = ResNet(depths=(2, 2, 2, 2), width=64, classes=10).to(memory_format=torch.channels_last)
    x, y = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (batch,))
    controller = None
    if control is not None:
        lowbit.convert_(model, Recipe.from_name(RECIPE).tuned(cycles=1))
        controller = control(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    bits: list[int | None] = []

    def step() -> None:
        if controller is not None:
            bits.append(controller.forward_bits)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step()

    return step, bits


def swinging(model: nn.Module, rounds: int) -> PrecisionController:
    """The recipe's own controller, from the first quarter of a cycle of ``2 rounds`` steps on."""
    controller = PrecisionController.from_recipe(model, total_steps=2 * rounds)
    for _ in range(rounds // 2 - WARM_UP):
        controller.step()
    return controller


def main() -> int:
    """Time the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    swing = "3 to 8 bits, middle of a cycle"
    held = partial(PrecisionController, forward=8, backward=8)
    made = {
        "fp32": stepper(args.batch, autocast=False),
        "bf16 autocast": stepper(args.batch, autocast=True),
        "static 8 bits": stepper(args.batch, autocast=True, control=held),
        swing: stepper(args.batch, autocast=True, control=partial(swinging, rounds=args.rounds)),
    }
    seconds = machine.paired({name: step for name, (step, _) in made.items()}, args.rounds, warm_up=WARM_UP)
    counted = Counter(made[swing][1][WARM_UP:])
    engines: Counter[str] = Counter()

    def note(call: ProductCall) -> None:
        engines[call.engine] += 1

    with counted_by(note):
        made[swing][0]()

    print(f"{RECIPE}, ResNet-18, batch {args.batch}, {args.rounds} rounds\n{machine.here()}")
    print(f"products of a step by engine: {dict(engines)}; rounds by forward bits: {dict(sorted(counted.items()))}\n")
    rows = [
        [
            name,
            *(f"{1e3 * s:.1f}" for s in (statistics.median(taken), min(taken), max(taken))),
            f"{machine.ratio(taken, seconds['static 8 bits']):.3f}",
            f"{machine.ratio(seconds['fp32'], taken):.2f}",
        ]
        for name, taken in seconds.items()
    ]
    print(text_table(["variant", "median ms", "min", "max", "times static", "speed to fp32"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
