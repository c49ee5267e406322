"""``lowbit recipes``."""

import pytest

from lowbit.cli import main as cli
from lowbit.methods.recipe import recipes


def test_recipes_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """``recipes`` has a row for each name of the library."""
    code = cli.main(["recipes"])

    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}

    assert code == 0
    assert set(recipes()) <= first_words


def test_recipe_shows_the_format_of_each_operand(capsys: pytest.CaptureFixture[str]) -> None:
    """``recipes NAME`` prints a row for each product, with the bifurcated gradient in two formats."""
    code = cli.main(["recipes", "sbm8"])

    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}

    assert code == 0
    assert {"output", "grad_input", "grad_weight"} <= rows.keys()
    assert "8-bit" in rows["grad_input"]
    assert "bf16" in rows["grad_weight"]


@pytest.mark.parametrize("name", ["cpt", "fractrain"])
def test_recipes_show_what_changes_over_the_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``recipes NAME`` shows schedule or gates, and the bits of depthwise convolutions."""
    cli.main(["recipes", name])

    printed = " ".join(capsys.readouterr().out.split())
    assert {"cpt": "low=3, high=8, cycles=32", "fractrain": "3/6, 4/6, 4/8, 6/8, 6/12"}[name] in printed
    assert "depthwise convolutions: forward 8 bits, backward 16 bits" in printed
