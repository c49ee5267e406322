"""What Range BN and the 8-bit operands each cost in accuracy, on short training runs of ResNet-20.

Every variant with every seed, on Fashion-MNIST with SGD and a one-cycle learning rate that ends at zero. Runs that the
file of results has are not repeated, so the command can be given again. Example:

    python benchmarks/range_norm.py fp32 sbm8 --pool 2 --seeds 0 1 2 3 4 --results runs/range_norm.jsonl
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import machine
from lowbit.numerics.formats import FP32
from lowbit.tables import text_table
from lowbit.train import data, models
from lowbit.train.config import lr_factor

SBM8 = lowbit.Recipe.from_name("sbm8")
NORM = SBM8.normalization
assert NORM is not None
VARIANTS = {
    "fp32": lowbit.Recipe.from_name("fp32"),
    "sbm8": SBM8,
    "batch-norm": SBM8.replace(name="sbm8 with batch normalisation", normalization=None),
    "paper": SBM8.replace(name="sbm8-paper", normalization=dataclasses.replace(NORM, constant="paper")),
    "range-only": lowbit.Recipe.from_name("fp32").replace(
        name="fp32 with Range BN", normalization=dataclasses.replace(NORM, input=FP32, grad_output=FP32)
    ),
}


def accuracy(model: nn.Module, test: data.Batches, pool: int) -> float:
    """The share of right predictions, in percent."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in test:
            right += int((model(F.avg_pool2d(x, pool)).argmax(1) == y).sum())
            total += len(y)
    return 100 * right / total


def train(recipe: lowbit.Recipe, *, seed: int, subset: int, epochs: int, lr: float, pool: int) -> float:
    """Test accuracy after the last step, of pictures averaged over `pool` by `pool` pixels."""
    loaded = data.load("fashion-mnist", batch_size=128, seed=seed, subset=subset)
    torch.manual_seed(seed)
    model = models.build("resnet20", loaded.task)
    lowbit.convert_(model, recipe, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    step, total = 0, epochs * len(loaded.train)
    for _ in range(epochs):
        for x, y in loaded.train:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor("one-cycle", step, total)
            optimizer.zero_grad()
            F.cross_entropy(model(F.avg_pool2d(x, pool)), y).backward()
            optimizer.step()
            step += 1
    return accuracy(model, loaded.test, pool)


def main() -> int:
    """Train the variants, seed by seed, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--subset", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--pool", type=int, default=1, help="2: pictures of 14 by 14")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("runs/range_norm.jsonl"), help="a line for each run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    settings = {"subset": args.subset, "epochs": args.epochs, "lr": args.lr, "pool": args.pool}
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = {(r["variant"], r["seed"]): r["accuracy"] for r in map(json.loads, lines) if r["settings"] == settings}
    for seed in args.seeds:
        for name in args.variants:
            if (name, seed) not in done:
                done[name, seed] = train(VARIANTS[name], seed=seed, **settings)
                run = {"variant": name, "seed": seed, "accuracy": done[name, seed], "settings": settings}
                with args.results.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    rows = []
    for name in args.variants:
        reached = [done[name, seed] for seed in args.seeds]
        spread = f"{statistics.stdev(reached):.2f}" if len(reached) > 1 else "-"
        rows.append([name, f"{statistics.mean(reached):.2f}", spread, " ".join(f"{a:.2f}" for a in reached)])
    print(f"{settings}, {args.threads} thread(s), {machine.here()}\n")
    print(text_table(["variant", "accuracy %", "std", "each seed"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
