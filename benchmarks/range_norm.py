"""What Range BN and the 8-bit operands each cost in accuracy, on a short training run of ResNet-20.

One variant a call, on Fashion-MNIST with SGD and a one-cycle learning rate that ends at zero. Example:

    python benchmarks/range_norm.py sbm8 batch-norm range-only paper
"""

import argparse
import dataclasses
import sys

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import machine
from lowbit.formats import FP32
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


def accuracy(model: nn.Module, test: data.Batches) -> float:
    """The share of right predictions, in percent."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in test:
            right += int((model(x).argmax(1) == y).sum())
            total += len(y)
    return 100 * right / total


def train(recipe: lowbit.Recipe, *, seed: int, subset: int, epochs: int, lr: float) -> float:
    """Test accuracy after the last step."""
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
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
    return accuracy(model, loaded.test)


def main() -> int:
    """Train the variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subset", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()
    print(machine.here())
    for name in args.variants:
        reached = train(VARIANTS[name], seed=args.seed, subset=args.subset, epochs=args.epochs, lr=args.lr)
        print(f"{name}: {reached:.2f} % (seed {args.seed}, {args.subset} images, {args.epochs} epochs, lr {args.lr})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
