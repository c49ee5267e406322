"""``lowbit recipes``: the recipes there are, or the number formats of one."""

from typing import Any

from lowbit.cli.fold import folded
from lowbit.cli.output import fitted, write

DESCRIPTION = "List the recipes, or show the number formats of one."
HELP = "list the recipes, or show one"
EXAMPLE = "lowbit recipes sbm8"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("name", type=str, nargs="?", help="the recipe to show")


def say(text: str) -> None:
    """Write text folded."""
    write(folded(text))


def run(name: str | None) -> None:
    """Print a table of all recipes, or what one says."""
    from lowbit.methods.recipe import Recipe, recipes

    if name is None:
        rows: list[list[str]] = []
        for known in recipes():
            # The last entry stands for a family of recipes: show one of them.
            recipe = Recipe.from_name("w4a4g6" if known == "wXaYgZ" else known)
            rows.append([known, recipe.summary, recipe.source])
        write(fitted(("recipe", "what it does", "source"), rows))
        return
    recipe = Recipe.find(name)
    say(f"{recipe.name}: {recipe.summary}\nsource: {recipe.source}\n")
    operands = ("input", "weight", "grad_output")
    rows = []
    for product in ("output", "grad_input", "grad_weight"):
        formats = [getattr(getattr(recipe, product), operand, None) for operand in operands]
        rows.append([product, *("" if format_ is None else str(format_) for format_ in formats)])
    say(fitted(("product", *operands), rows) + "\n")
    if recipe.schedule is not None:
        backward = "as forward says" if recipe.schedule.backward is None else recipe.schedule.backward
        say(f"over the run: forward bits {recipe.schedule.forward}; backward bits {backward}")
    if recipe.gates is not None:
        choices = ", ".join(f"{a}/{g}" for a, g in recipe.gates.choices)
        targets = ", then ".join(f"{target:g} %" for target in recipe.gates.targets)
        say(f"gates choose input/gradient bits by block and sample: {choices}; cost {targets} of full precision")
    if recipe.depthwise is not None:
        say("depthwise convolutions: forward {} bits, backward {} bits".format(*recipe.depthwise))
    if recipe.autocast is not None:
        say(f"training loop: {recipe.autocast}")
    norm = recipe.normalization
    say(f"bias: {recipe.bias}; first layer: {recipe.first}; last layer: {recipe.last}")
    if norm is None:
        say("batch normalisation: kept, in full precision")
    else:
        say(f"batch normalisation: {norm}")
