"""`make demo`: one real network trained in full precision and in 8 bits, side by side, with proof of what ran.

ResNet-20 on Fashion-MNIST, the same seed, the same batches, a one-cycle learning rate that ends at zero. The 8-bit
arithmetic runs on the reference engine, which simulates it exactly and slowly: a subset of the images keeps the demo
short, and the seconds per step say what the simulation costs.
"""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path

from lowbit import Recipe, __version__
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig
from lowbit.train.trainer import PROOF, train

RECIPES = ("fp32", "sbm8")


def bits(recipe: str) -> str:
    """The widths of a recipe by product, as first operand x second."""
    widths: dict[str, list[str]] = {}
    for product, _, fmt in Recipe.from_name(recipe).operands():
        widths.setdefault(product, []).append(str(fmt.bits))
    return ", ".join(f"{product} {'x'.join(pair)}" for product, pair in widths.items())


def row(result: Result) -> list[str]:
    """One line of the table."""
    seconds = result.seconds_per_step
    assert result.test_accuracy is not None
    return [
        result.recipe,
        f"{100 * result.test_accuracy:.2f} %",
        f"{result.test_loss:.4f}",
        bits(result.recipe),
        "-" if seconds is None else f"{seconds:.3f}",
        str(result.out),
    ]


def main() -> int:
    """Train once per recipe, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="30 steps for each recipe, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    subset, epochs = (1_920, 1) if args.short else (25_600, 2)

    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    print(f"lowbit {__version__}: ResNet-20, Fashion-MNIST, {subset:,} of 60,000 training images, {epochs} epochs")
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
                    batch_size=64,
                    seed=args.seed,
                    out=folder / recipe,
                )
            )
        )
        print(f"{results[-1].steps} steps in {time.perf_counter() - began:.0f} s, evaluations included")

    print("\nWhat one training step in sbm8 ran, bits as first operand x second:\n")
    print((folder / "sbm8" / PROOF).read_text().split("\n\n")[0])
    print("\nTest accuracy over all 10,000 test images:\n")
    print(text_table(["recipe", "accuracy", "loss", "bits", "s/step", "logs and checkpoint"], list(map(row, results))))
    print(
        "\nSo short a run favours fp32: Range BN learns more slowly at first. benchmarks/RESULTS.md has a longer one."
    )
    print(f"Full proof with operators, SQNR and angles: {folder / 'sbm8' / PROOF}")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
