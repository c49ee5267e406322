"""`make demo`: one real network trained in fp32, in bf16 and in 8 bits, side by side, with proof of what ran.

ResNet-20 on Fashion-MNIST, the same seed, the same batches, a one-cycle learning rate that ends at zero. bf16 and sbm8
train inside torch's bfloat16 autocast, sbm8 on the engine that `engine="auto"` chooses. Seconds per step are measured
apart, in rounds of one step of each: plain torch in fp32, plain torch in bf16 autocast, and the converted network.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F

import lowbit
from lowbit import Recipe, machine
from lowbit.report.page import write_report
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig, models
from lowbit.train.data import Task
from lowbit.train.trainer import PROOF, train

RECIPES = ("fp32", "bf16", "sbm8")
BATCH = 64


def stepper(recipe: str) -> Callable[[], None]:
    """A function that runs one training step on fixed random images, ``fp32`` and ``bf16`` without lowbit."""
    torch.manual_seed(0)
    task = Task(kind="image", shape=(1, 28, 28), classes=10)
    model = models.build("resnet20", task)
    if recipe == "sbm8":
        lowbit.convert_(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(BATCH, *task.shape), torch.randint(task.classes, (BATCH,))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe != "fp32"):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fastest_threads() -> int:
    """1, or torch's own number where a step with it is faster: threads that share busy cores are far slower."""
    most, step = torch.get_num_threads(), stepper("fp32")
    taken = {}
    for threads in (1, most):
        torch.set_num_threads(threads)
        taken[threads] = min(machine.paired({"fp32": step}, 3, warm_up=1)["fp32"])
    torch.set_num_threads(most)
    return min(taken, key=lambda threads: taken[threads])


def bits(recipe: str) -> str:
    """The widths of a recipe by product, as first operand x second."""
    widths: dict[str, list[str]] = {}
    for product, _, fmt in Recipe.from_name(recipe).operands():
        widths.setdefault(product, []).append(str(fmt.bits))
    pairs = {product: "x".join(pair) for product, pair in widths.items()}
    if len(set(pairs.values())) == 1:
        return f"{pairs['output']} in all products"
    return ", ".join(f"{product} {pair}" for product, pair in pairs.items())


def row(result: Result, seconds: dict[str, list[float]]) -> list[str]:
    """One line of the table."""
    assert result.test_accuracy is not None
    taken = seconds[result.recipe]
    return [
        result.recipe,
        f"{100 * result.test_accuracy:.2f} %",
        f"{result.test_loss:.4f}",
        bits(result.recipe),
        f"{statistics.median(taken):.3f}",
        f"{machine.ratio(seconds['fp32'], taken):.2f}",
        str(result.out),
    ]


def verdict(seconds: dict[str, list[float]]) -> str:
    """What the seconds say about sbm8, in plain words."""
    against = {base: machine.ratio(seconds[base], seconds["sbm8"]) for base in ("fp32", "bf16")}
    said = [
        f"{speed:.1f} times as fast as {base}" if speed >= 1 else f"{1 / speed:.1f} times SLOWER than {base}"
        for base, speed in against.items()
    ]
    lines = [f"On this machine and this network sbm8 trains {' and '.join(said)}."]
    if min(against.values()) < 1:
        lines.append(
            "ResNet-20 is narrow: 16 to 64 channels leave the 8-bit units partly idle, and what surrounds the products "
            "costs more than they do.\nWide networks gain: see the table of speeds in benchmarks/RESULTS.md."
        )
    return "\n".join(lines)


def main() -> int:
    """Train once per recipe, time them in turn, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="20 steps for each recipe, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="left open: 1 with --short, else what is faster now")
    args = parser.parse_args()
    subset, epochs, rounds = (1_280, 1, 5) if args.short else (25_600, 2, 15)

    torch.set_num_threads(args.threads or (1 if args.short else fastest_threads()))
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    print(machine.here())
    print(f"ResNet-20, Fashion-MNIST, {subset:,} of 60,000 training images, epochs: {epochs}, batch {BATCH}")
    results = []
    for recipe in RECIPES:
        print(f"\ntraining in {recipe} ...", flush=True)
        began = time.perf_counter()
        results.append(
            train(
                TrainConfig(
                    model="resnet20",
                    data="fashion-mnist",
                    recipe=recipe,
                    subset=subset,
                    epochs=epochs,
                    batch_size=BATCH,
                    seed=args.seed,
                    threads=torch.get_num_threads(),
                    amp="none" if recipe == "fp32" else "bf16",
                    out=folder / recipe,
                )
            )
        )
        print(f"{results[-1].steps} steps in {time.perf_counter() - began:.0f} s, evaluations included")

    print("\nWhat one training step in sbm8 ran, bits as first operand x second:\n")
    print((folder / "sbm8" / PROOF).read_text().split("\n\n")[0])
    print(f"\nTest accuracy over all 10,000 test images; seconds per step, medians of {rounds} rounds in turn:\n")
    seconds = machine.paired({recipe: stepper(recipe) for recipe in RECIPES}, rounds)
    header = ["recipe", "accuracy", "loss", "bits", "s/step", "speed to fp32", "logs and checkpoint"]
    print(text_table(header, [row(result, seconds) for result in results]))
    print(f"\n{verdict(seconds)}")
    if args.short:
        print("20 steps say nothing about accuracy: `make demo` trains for 800.")
    else:
        print("So short a run favours fp32: Range BN learns slowly at first. benchmarks/RESULTS.md has a longer one.")
    print(f"Full proof with operators, SQNR and angles: {folder / 'sbm8' / PROOF}")
    page = folder / "report.html"
    write_report([result.out for result in results], page)
    print(f"All of it as one page of charts, to open in a browser: {page}")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
