"""Accuracy and bit operations of dynamic precision against static 8 bits: every recipe, every seed, equal steps.

Runs that are complete are read, runs that were stopped are resumed, so the command can be given again. Example:

    python benchmarks/dynamic.py --epochs 8 --subset 25600 --threads 1

Recipes are names with settings: `cpt:cycles=8,low=4`. Bit operations are counted from the bits and shapes of every
product of the run, multiplications of m by n bits as m n. "with fp32" adds the products of layers that a recipe leaves
in full precision (forward and backward, gates included) at 32 by 32 bits, as measured in the first step.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from lowbit import machine
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig
from lowbit.train.trainer import PROOF, resume, train

# The authors have 32 cycles and 160 looks at the loss in 64,000 steps; 1,600 steps have 8 and 40.
# Threshold and decay are those of the authors' CIFAR script.
PLATEAU = "plateau_every=40,threshold=0.15,decay=0.4"
RECIPES = ["sbm8-cpt", "cpt:cycles=8", f"pfq:{PLATEAU}", f"fractrain:{PLATEAU}"]


def run(config: TrainConfig) -> Result:
    """The result of a run: read, resumed or trained."""
    assert config.out is not None
    return resume(config.out) if (config.out / "config.yaml").exists() else train(config)


def parsed(recipe: str) -> tuple[str, dict[str, Any]]:
    """``"cpt:cycles=8,low=4"`` as a name and its settings."""
    name, _, rest = recipe.partition(":")
    pairs = re.findall(r"(\w+)=(\[.*?\]|[^,]+)", rest)
    return name, {key: yaml.safe_load(value) for key, value in pairs}


def outside(result: Result) -> int:
    """Multiply-accumulates of one step in full precision: the last table of the proof of the first step."""
    proof = (result.out / PROOF).read_text()
    rows = re.findall(r"^\S+ +aten\.\S+ +\d+ +([\d,]+) +[\d.]+$", proof, re.MULTILINE)
    return sum(int(macs.replace(",", "")) for macs in rows)


def row(name: str, results: list[Result], baseline: list[Result]) -> list[str]:
    """One recipe's line: accuracy over seeds, bit operations relative to the baseline, seconds per step."""
    accuracies = [100 * (r.test_accuracy or 0) for r in results]
    base = statistics.mean(100 * (r.test_accuracy or 0) for r in baseline)
    mean = statistics.mean(accuracies)

    def relative(full: bool) -> str:
        costs = [
            statistics.mean(r.bit_operations + full * r.steps * outside(r) * 32 * 32 for r in group)
            for group in (results, baseline)
        ]
        return f"{100 * costs[0] / costs[1]:.1f}"

    seconds = [r.seconds_per_step for r in results if r.seconds_per_step is not None]
    return [
        name,
        f"{mean:.2f}",
        f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-",
        f"{mean - base:+.2f}",
        relative(False),
        relative(True),
        f"{statistics.median(seconds):.3f}" if seconds else "-",
        " ".join(f"{a:.2f}" for a in accuracies),
    ]


def main() -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="the first is the baseline")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--subset", type=int, default=25_600)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle schedule")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/dynamic"))
    args = parser.parse_args()

    size = f"{args.model}-{args.data}-{args.subset}x{args.epochs}-b{args.batch_size}-lr{args.lr}"
    results: dict[str, list[Result]] = {recipe: [] for recipe in args.recipes}
    for seed in args.seeds:
        for recipe in args.recipes:
            name, settings = parsed(recipe)
            folder = re.sub(r"[^\w.=-]+", "-", f"{size}-{recipe}-{seed}")
            config = TrainConfig(
                model=args.model,
                data=args.data,
                recipe=name,
                subset=args.subset,
                epochs=args.epochs,
                batch_size=args.batch_size,
                seed=seed,
                lr=args.lr,
                threads=args.threads,
                out=args.out / folder,
                **settings,
            )
            result = run(config)
            results[recipe].append(result)
            print(f"{recipe} seed {seed}: {result.test_accuracy:.4f} after {result.steps} steps", flush=True)

    print(f"\n{args.model}, {args.data}, {args.subset:,} images, {args.epochs} epochs, batch {args.batch_size}")
    print(f"SGD, one-cycle to zero with peak {args.lr}")
    print(f"{machine.here()}\n")
    header = ["recipe", "accuracy %", "std", "minus first", "bit ops %", "with fp32 %", "s/step", "each seed"]
    print(text_table(header, [row(name, group, results[args.recipes[0]]) for name, group in results.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
