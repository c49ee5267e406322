"""Every recipe on Fashion-MNIST, equal steps and seeds: accuracy, bit operations, seconds per step and memory.

Runs of `lowbit train` with a small network of convolutions and linear layers (`small_net.py`). Runs that are complete
are read, runs that were stopped are resumed, so the command can be given again. Example:

    python benchmarks/every_recipe.py --steps 600 --seeds 0 1 2 --threads 1
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from small_net import SmallNet

import lowbit
from lowbit import machine
from lowbit.errors import UsageError
from lowbit.evidence.memory import step_memory
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig
from lowbit.train.trainer import resume, train

NET = f"{Path(__file__).with_name('small_net.py')}:SmallNet"
BATCH = 128
RATE = 0.05
# Families stand for themselves with one choice of bits.
FAMILIES = {"wXaYgZ": ("w4a4g6",)}

GATED = r"features\.[12]"
# What some recipes need to know of the run.
SETTINGS: dict[str, dict[str, Any]] = {
    "sqrt3": {"measure_every": 50},
    "budget": {"measure_every": 50},
    "dfq": {"blocks": GATED},
    "fractrain": {"blocks": GATED},
}


def names() -> list[str]:
    """All recipes, fp32 first; a family by its members in `FAMILIES`."""
    known = [name for name in lowbit.recipes() if name != "fp32"]
    return ["fp32", *(member for name in known for member in FAMILIES.get(name, (name,)))]


def run(recipe: str, seed: int, args: argparse.Namespace) -> Result:
    """The result of a run: read, resumed or trained."""
    out: Path = args.out / f"{args.steps}-{recipe.replace(':', '_')}-{seed}"
    if (out / "config.yaml").exists():
        return resume(out)
    return train(
        TrainConfig(
            model=NET,
            data="fashion-mnist",
            recipe=recipe,
            epochs=1000,
            max_steps=args.steps,
            batch_size=BATCH,
            lr=RATE,
            seed=seed,
            out=out,
            threads=args.threads,
            **SETTINGS.get(recipe, {}),
        )
    )


def activations(recipe: str) -> str:
    """MiB that the forward of a step keeps for its backward; not measured where bits follow the run."""
    if lowbit.Recipe.from_name(recipe).is_dynamic:
        return "-"
    torch.manual_seed(0)
    model = SmallNet(10, (1, 28, 28)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lowbit.convert_(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    scaler = lowbit.amp.GradScaler.from_recipe(model)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

    def step() -> None:
        with lowbit.amp.autocast(model):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return f"{step_memory(model, optimizer, step).activations / 2**20:.2f}"


def row(recipe: str, results: list[Result], most: int) -> list[str]:
    """One recipe's line: means over seeds, with the spread of the accuracy."""
    accuracies = [100 * result.test_accuracy for result in results if result.test_accuracy is not None]
    spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-"
    operations = 100 * statistics.mean(result.bit_operations for result in results) / most
    seconds = [result.seconds_per_step for result in results if result.seconds_per_step is not None]
    ms = f"{1e3 * statistics.median(seconds):.1f}" if seconds else "-"
    return [recipe, f"{statistics.mean(accuracies):.2f}", spread, f"{operations:.1f}", ms, activations(recipe)]


def main() -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=names())
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/every_recipe"))
    args = parser.parse_args()

    results: dict[str, list[Result]] = {}
    refused: dict[str, str] = {}
    for recipe in dict.fromkeys(["fp32", *args.recipes]):
        try:
            results[recipe] = [run(recipe, seed, args) for seed in args.seeds]
        except UsageError as error:
            refused[recipe] = str(error).partition(";")[0]
            continue
        each = " ".join(f"{100 * (r.test_accuracy or 0):.2f}" for r in results[recipe])
        print(f"{recipe}: {each} %", file=sys.stderr, flush=True)
    most = results["fp32"][0].bit_operations
    header = ["recipe", "test accuracy %", "std", "bit operations, % of fp32", "ms a step", "saved activations, MiB"]
    print(f"{args.steps} steps of {BATCH} images, seeds {args.seeds}, SGD with peak rate {RATE}\n{machine.here()}\n")
    print(text_table(header, [row(name, each, most) for name, each in results.items()]))
    for recipe, why in refused.items():
        print(f"note: {recipe} is left out: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
