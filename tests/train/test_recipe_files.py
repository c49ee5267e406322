"""Recipes by file and by family: everywhere a name goes, and kept with the run that began with them."""

from pathlib import Path

import pytest
import torch
from runs import config, last, same
from torch import nn

import lowbit
from lowbit import Recipe, RunError, UsageError
from lowbit.cli import main as cli
from lowbit.train import trainer

MINE = """
base = "int8"
summary = "int8 with 4-bit weights in the output"
source = "a test"
output = { input = "rows", weight = "four" }

[formats.rows]
bits = 8
zero = "symmetric"
granularity = "row"

[formats.four]
bits = 4
zero = "symmetric"
granularity = "kept-channel"
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A recipe in a file."""
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_a_file_is_read_as_the_recipe_of_its_name(mine: Path) -> None:
    """The name is the file's, and what the file does not say comes from its base."""
    recipe = Recipe.load(mine)

    assert recipe.name == "mine"
    assert recipe.output.weight.bits == 4
    assert recipe.grad_input == Recipe.from_name("int8").grad_input


def test_a_model_is_converted_by_a_file(mine: Path) -> None:
    """`convert_` takes the path where it takes a name, and the weights have the file's 15 levels."""
    layer = nn.Linear(64, 8, bias=False)
    by_file, by_name = (nn.Sequential(nn.Linear(64, 8, bias=False)) for _ in range(2))
    for model, recipe in ((by_file, str(mine)), (by_name, "int8")):
        model[0].load_state_dict(layer.state_dict())
        lowbit.convert_(model, recipe, engine="reference")

    first, second = (model(torch.eye(64)).detach() for model in (by_file, by_name))
    assert max(len(column.unique()) for column in first.t()) <= 15
    assert max(len(column.unique()) for column in second.t()) > 15


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.toml", None, "No such file"),
        ("int8.toml", MINE, "'int8' is a recipe of lowbit; rename the file"),
        ("w4a4g4.toml", MINE, "is a recipe of lowbit"),
        ("mine.txt", MINE, "ends in .toml"),
        ("broken.toml", "base = ", "broken"),
        ("binary.toml", b"\xff\xfe", "not UTF-8"),
        ("unknown.toml", 'base = "int9"', "int9"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(
    tmp_path: Path, name: str, text: str | bytes | None, message: str
) -> None:
    """The message names the file or what is wrong in it."""
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    with pytest.raises(UsageError, match=message):
        Recipe.load(path)


def test_a_family_sets_the_widths_of_any_recipe() -> None:
    """``int8:w4a5g6`` is int8 with these widths in every product."""
    recipe = Recipe.from_name("int8:w4a5g6")

    widths = {(product, operand): fmt.bits for product, operand, fmt in recipe.operands()}
    assert widths == {
        ("output", "input"): 5,
        ("output", "weight"): 4,
        ("grad_input", "grad_output"): 6,
        ("grad_input", "weight"): 4,
        ("grad_weight", "grad_output"): 6,
        ("grad_weight", "input"): 5,
    }
    assert recipe.output.input.granularity == "row"  # type: ignore[union-attr]  # int8 has integers alone


def test_widths_alone_are_of_sbm8_cpt() -> None:
    """``w4a4g6`` and ``sbm8-cpt:w4a4g6`` have the same table."""
    assert Recipe.from_name("w4a4g6").operands() == Recipe.from_name("sbm8-cpt:w4a4g6").operands()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8:w99a4g4", "99"),
        ("int9:w4a4g4", "int9"),
        ("sbm8:w4a4g4", "float format"),
        ("cpt:w4a4g4", "change during training"),
        ("int8:w4a4", "int8:w4a4"),
    ],
)
def test_a_family_that_does_not_exist_is_refused(name: str, message: str) -> None:
    """Widths out of range, an unknown recipe, and recipes whose bits cannot be set are named."""
    with pytest.raises(UsageError, match=message):
        Recipe.from_name(name)


def test_a_run_keeps_the_recipe_it_began_with(mine: Path, tmp_path: Path) -> None:
    """A run resumes bit for bit although the file of its recipe is another one by then."""
    whole = trainer.train(config(tmp_path / "whole", recipe=str(mine), max_steps=4))
    half = config(tmp_path / "half", recipe=str(mine), max_steps=4, checkpoint_every=2)
    trainer.train(half)
    (tmp_path / "half" / "result.json").unlink()
    (tmp_path / "half" / "last.ckpt").unlink()
    mine.write_text(MINE.replace("bits = 4", "bits = 2"))

    resumed = trainer.resume(tmp_path / "half")

    assert (tmp_path / "half" / "recipe.toml").read_text() == MINE
    assert whole.recipe == str(mine)
    assert resumed.steps == whole.steps
    assert same(last(tmp_path / "half")["state_dict"], last(tmp_path / "whole")["state_dict"])


def test_a_run_that_lost_its_recipe_does_not_take_another(mine: Path, tmp_path: Path) -> None:
    """Without the text that it began with, a run does not go on with what the file says by then."""
    out = tmp_path / "run"
    trainer.train(config(out, recipe=str(mine), max_steps=1))
    (out / "result.json").unlink()
    (out / "recipe.toml").unlink()

    with pytest.raises(RunError, match=r"recipe\.toml cannot be read"):
        trainer.resume(out)


def test_the_command_line_shows_a_file(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lowbit recipes mine.toml` prints the formats of the file."""
    assert cli.main(["recipes", str(mine)]) == 0

    assert "4-bit symmetric" in capsys.readouterr().out
