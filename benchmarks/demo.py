"""`make demo`: one real network trained in fp32 and in 8 bits, side by side, with proof of what ran.

ResNet-18 (of `demo_net.py`) on Fashion-MNIST with two seeds, the same batches in both recipes, and a one-cycle learning
rate that ends at zero. int8 trains inside torch's bfloat16 autocast, on the engine that `engine="auto"` chooses.
Seconds per step are measured apart, in rounds of one step of each: plain torch in fp32, plain torch in bf16 autocast,
and the network converted to int8 and to sbm8.
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
from demo_net import ResNet18

import lowbit
from lowbit import Recipe, machine
from lowbit.cli.fold import folded
from lowbit.report.page import write_report
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig
from lowbit.train.progress import progress_of
from lowbit.train.trainer import PROOF, train

NETWORK = Path(__file__).with_name("demo_net.py")
TRAINED = ("fp32", "int8")
TIMED = ("fp32", "bf16", "int8", "sbm8")
SEEDS = (0, 1)
BATCH = 64
LR = 0.02


def stepper(recipe: str) -> Callable[[], None]:
    """A function that runs one training step on fixed random images, ``fp32`` and ``bf16`` without lowbit."""
    torch.manual_seed(0)
    model = ResNet18(classes=10, shape=(1, 28, 28)).to(memory_format=torch.channels_last)
    if recipe not in ("fp32", "bf16"):
        lowbit.convert_(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

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


def scores(results: list[Result]) -> list[float]:
    """Test accuracies in per cent."""
    return [100 * result.test_accuracy for result in results if result.test_accuracy is not None]


def row(recipe: str, results: list[Result], seconds: dict[str, list[float]]) -> list[str]:
    """One line of the table."""
    reached, taken = scores(results), seconds[recipe]
    return [
        recipe,
        f"{statistics.mean(reached):.2f} %" if reached else "timed only",
        ", ".join(f"{score:.2f}" for score in reached),
        bits(recipe),
        f"{statistics.median(taken):.3f}",
        f"{machine.ratio(seconds['fp32'], taken):.2f}",
        f"{machine.ratio(seconds['bf16'], taken):.2f}",
    ]


def verdict(seconds: dict[str, list[float]]) -> str:
    """What the seconds say about int8, in plain words."""
    against = {base: machine.ratio(seconds[base], seconds["int8"]) for base in ("fp32", "bf16")}
    said = [
        f"{speed:.1f} times as fast as {base}" if speed >= 1 else f"{1 / speed:.1f} times SLOWER than {base}"
        for base, speed in against.items()
    ]
    return f"On this machine and this network int8 trains {' and '.join(said)}."


def closeness(results: dict[str, list[Result]]) -> str:
    """How far int8 ends from fp32, seed by seed, and what that can show."""
    differences = [b - a for a, b in zip(scores(results["fp32"]), scores(results["int8"]), strict=True)]
    seeds = ", ".join(f"{difference:+.2f}" for difference in differences)
    return (
        f"int8 minus fp32, seed by seed: {seeds} points. Two seeds of so short a run\n"
        "show no difference below about a point; benchmarks/RESULTS.md has longer runs."
    )


def say(text: object) -> None:
    """Print, folded to the terminal."""
    print(folded(str(text)), flush=True)


def main() -> int:
    """Train both recipes with each seed, time all in turn, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="20 steps for each recipe, to see that it works")
    parser.add_argument("--threads", type=int, help="default: 1 with --short, else what is faster now")
    args = parser.parse_args()
    subset, rounds, seeds = (1_280, 5, SEEDS[:1]) if args.short else (32_000, 15, SEEDS)

    torch.set_num_threads(args.threads or (1 if args.short else fastest_threads()))
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    say(machine.here())
    say(f"ResNet-18, Fashion-MNIST, {subset:,} of 60,000 training images, one epoch, batch {BATCH}")
    results: dict[str, list[Result]] = {recipe: [] for recipe in TIMED}
    for seed in seeds:
        for recipe in TRAINED:
            say(f"\ntraining in {recipe}, seed {seed} ...")
            began = time.perf_counter()
            result = train(
                TrainConfig(
                    model=f"{NETWORK}:ResNet18",
                    data="fashion-mnist",
                    recipe=recipe,
                    subset=subset,
                    batch_size=BATCH,
                    lr=LR,
                    seed=seed,
                    threads=torch.get_num_threads(),
                    out=folder / f"{recipe}-{seed}",
                ),
                progress=progress_of("auto"),
            )
            say(f"{result.steps} steps in {time.perf_counter() - began:.0f} s, proof and evaluation included")
            results[recipe].append(result)

    proof = folder / f"int8-{seeds[0]}" / PROOF
    say("\nWhat one training step in int8 ran, bits as first operand x second:\n")
    say(proof.read_text().split("\n\n")[0])
    say(f"\nTest accuracy over all 10,000 test images; seconds per step, medians of {rounds} rounds in turn:\n")
    seconds = machine.paired({recipe: stepper(recipe) for recipe in TIMED}, rounds)
    header = ["recipe", "accuracy", "by seed", "bits", "s/step", "speed to fp32", "to bf16"]
    say(text_table(header, [row(recipe, results[recipe], seconds) for recipe in TIMED]))
    say(f"\n{verdict(seconds)}")
    say("20 steps say nothing about accuracy: `make demo` trains for 500." if args.short else closeness(results))
    page = folder / "report.html"
    write_report([result.out for found in results.values() for result in found], page)
    say(f"Full proof with operators, SQNR and angles: {proof}")
    say(f"All of it as one page of charts, to open in a browser: {page}")
    say(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {folder}")
    say('\nYour own model, one line before your loop: lowbit.convert_(model, "int8")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
