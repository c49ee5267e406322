"""Loss and accuracy of precision over time: static bits against the sqrt(3) rule and a late switch, equal steps.

Runs of `lowbit train` on Fashion-MNIST with an MLP. Each variant is evaluated at the bits that it ends with. Runs that
are complete are read, runs that were stopped are resumed, so the command can be given again. Example:

    python benchmarks/overtime.py --steps 1000 --seeds 0 1 2 --threads 1
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from lowbit import machine
from lowbit.tables import text_table
from lowbit.train import Result, TrainConfig
from lowbit.train.trainer import resume, train


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table.

    Args:
        name: in the table.
        recipe: a recipe's name, or the text of one.
        measure_every: of the sqrt(3) rule and the budget.
    """

    name: str
    recipe: str
    measure_every: int | None = None


def healed(base: str, then: str, start: str = "0.9") -> str:
    """A recipe with two phases, as text."""
    return f'base = "{base}"\n[[phases]]\nstart = "{start}"\nrecipe = "{then}"\n'


FOUR = "mxint8:w4a4g4"
VARIANTS = (
    Variant(name="fp32", recipe="fp32"),
    Variant(name="8 bits, mxint8", recipe="mxint8"),
    Variant(name="4 bits, mxint8:w4a4g4", recipe=FOUR),
    Variant(name="4 bits, 8 in the last tenth", recipe=healed(FOUR, "mxint8")),
    Variant(name="4 to 8 bits, sqrt3", recipe="sqrt3", measure_every=50),
    Variant(name="4, 6 or 8 bits, budget 0.5", recipe="budget", measure_every=50),
    Variant(name="mxfp8", recipe="mxfp8"),
    Variant(name="mxfp4", recipe="mxfp4"),
    Variant(name="mxfp4, mxfp8 in the last tenth, heal", recipe="heal"),
)


def run(variant: Variant, index: int, args: argparse.Namespace, seed: int) -> Result:
    """The result of a run: read, resumed or trained."""
    out: Path = args.out / f"{index}-{seed}"
    if (out / "config.yaml").exists():
        return resume(out)
    recipe = variant.recipe
    if "\n" in recipe:
        file: Path = args.out / f"variant-{index}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe)
        recipe = str(file)
    follows = variant.measure_every is not None
    config = TrainConfig(
        model="mlp",
        data="fashion-mnist",
        recipe=recipe,
        epochs=1000,
        max_steps=args.steps,
        batch_size=args.batch,
        optimizer="adamw",
        seed=seed,
        out=out,
        threads=args.threads,
        eval_bits="current" if follows else None,
        measure_every=variant.measure_every,  # type: ignore[call-arg]  # a field that the class reads off schedules
    )
    return train(config)


def row(name: str, results: list[Result], most: int) -> list[str]:
    """Means and standard deviations over seeds, and the bit operations as a share of those at 8 bits."""
    losses = [result.test_loss for result in results]
    accuracies = [100 * result.test_accuracy for result in results if result.test_accuracy is not None]
    cells = []
    for values, digits in ((losses, 4), (accuracies, 2)):
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    shares = [100 * result.bit_operations / most for result in results]
    return [name, *cells, f"{statistics.mean(shares):.1f}"]


def main() -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/overtime"))
    args = parser.parse_args()

    found = {
        variant.name: [run(variant, index, args, seed) for seed in args.seeds] for index, variant in enumerate(VARIANTS)
    }
    most = found["8 bits, mxint8"][0].bit_operations
    header = ["variant", "test loss", "test accuracy %", "bit operations, % of 8 bits"]
    print(f"{args.steps} steps of {args.batch}, seeds {args.seeds}\n{machine.here()}\n")
    print(text_table(header, [row(name, results, most) for name, results in found.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
