"""Accuracy of recipes against full precision: every recipe with every seed, equal steps, one table.

Runs that are complete are read, runs that were stopped are resumed, so the command can be given again. Example:

    python benchmarks/accuracy.py --recipes fp32 sbm8 --seeds 0 1 2 --subset 20000 --epochs 5
"""

import argparse
import statistics
import sys
from pathlib import Path

from lowbit import machine
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig
from lowbit.train.trainer import resume, train


def run(config: TrainConfig) -> Result:
    """The result of a run: read, resumed or trained."""
    assert config.out is not None
    return resume(config.out) if (config.out / "config.yaml").exists() else train(config)


def summary(results: list[Result], baseline: float) -> list[str]:
    """One recipe's line: mean and standard deviation over seeds, in percent."""
    accuracies = [100 * r.test_accuracy for r in results if r.test_accuracy is not None]
    mean = statistics.mean(accuracies)
    spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-"
    each = " ".join(f"{a:.2f}" for a in accuracies)
    return [results[0].recipe, f"{mean:.2f}", spread, f"{mean - baseline:+.2f}", each]


def main() -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["fp32", "sbm8"], help="the first is the baseline")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--subset", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle schedule")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    args = parser.parse_args()

    results: dict[str, list[Result]] = {recipe: [] for recipe in args.recipes}
    for seed in args.seeds:
        for recipe in args.recipes:
            result = run(
                TrainConfig(
                    model=args.model,
                    data=args.data,
                    recipe=recipe,
                    subset=args.subset,
                    epochs=args.epochs,
                    seed=seed,
                    lr=args.lr,
                    threads=args.threads,
                    out=args.out / f"{args.model}-{args.data}-{args.subset}x{args.epochs}-lr{args.lr}-{recipe}-{seed}",
                )
            )
            results[recipe].append(result)
            print(f"{recipe} seed {seed}: {result.test_accuracy:.4f} after {result.steps} steps", flush=True)

    baseline = statistics.mean(100 * (r.test_accuracy or 0) for r in results[args.recipes[0]])
    print(f"\n{args.model}, {args.data}, {args.subset:,} images, {args.epochs} epochs, batch 128")
    print(f"SGD, one-cycle to zero with peak {args.lr}")
    print(f"{machine.here()}\n")
    header = ["recipe", "accuracy %", "std", f"minus {args.recipes[0]}", "each seed"]
    print(text_table(header, [summary(r, baseline) for r in results.values()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
