"""The formats of an optimiser's step, as part of a recipe."""

import zlib

import pytest

from lowbit.conversion.state import _fingerprint
from lowbit.errors import UsageError
from lowbit.methods.recipe import Autocast, Recipe, Update, from_toml
from lowbit.numerics.elements import FixedPoint
from lowbit.numerics.formats import BF16, FP32, Format, integer

FORMATS = """
[formats.q13]
element = { kind = "fixed-point", integer = 2, fraction = 12 }
[formats.q24]
element = { kind = "fixed-point", integer = 2, fraction = 23 }
"""
Q13, Q24 = (Format(element=FixedPoint(integer=2, fraction=fraction)) for fraction in (12, 23))


def test_a_table_names_the_formats() -> None:
    """`[update]` takes the names of the recipe's formats, for states by the states' names."""
    text = (
        'base = "int8"\n[update]\nweight = "q24"\ngradient = "bf16"\nstates = { momentum_buffer = "q13" }\n' + FORMATS
    )

    update = from_toml("mine", text).update

    assert update == Update(weight=Q24, gradient=BF16, states=(("momentum_buffer", Q13),))
    assert update.lr == FP32


def test_a_recipe_takes_the_update_of_its_base() -> None:
    """A recipe that replaces nothing of the update has that of its base, and stored recipes of no update have none."""
    recipe = Recipe.from_name("int8")

    assert recipe.update is None
    assert recipe.replace(update=Update(weight=BF16)).update == Update(weight=BF16)


def test_vectors_may_have_another_gradient() -> None:
    """The gradient of biases and normalisation has its own format where one is given."""
    assert Update(gradient=BF16).gradient_of(1) == BF16
    assert Update(gradient=BF16, vector_gradient=Q13).gradient_of(1) == Q13
    assert Update(gradient=BF16, vector_gradient=Q13).gradient_of(2) == BF16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('weight = "q9"', "unknown format of recipe mine: update.weight 'q9'"),
        ("weight = 3", "update.weight is 3"),
        ('velocity = "q13"', "velocity"),
        ('states = "q13"', "give a table of fields"),
    ],
)
def test_an_impossible_table_is_refused(text: str, message: str) -> None:
    """The message names what is wrong in the table."""
    with pytest.raises(UsageError, match=message):
        from_toml("mine", f'base = "int8"\n[update]\n{text}\n' + FORMATS.replace("q24", "q25"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": integer(bits=8, zero="integer", running=0.9)}, "keeps no range"),
        ({"gradient": integer(bits=8, zero="symmetric", granularity="row")}, "granularity='row'"),
        ({"lr": integer(bits=8, zero="symmetric")}, "has no scale"),
        ({"states": (("exp_avg", BF16), ("exp_avg", FP32))}, "each state once"),
    ],
)
def test_formats_that_nothing_stored_can_have_are_refused(fields: dict[str, object], message: str) -> None:
    """Running ranges, ranges of rows, scales of a number and repeated names are errors."""
    with pytest.raises(UsageError, match=message):
        Update(**fields)  # type: ignore[arg-type]


def test_states_saved_before_there_were_updates_still_load() -> None:
    """The number that identifies a recipe without update and autocast is that of before, and each changes it."""
    recipe = Recipe.from_name("sbm8")
    before = repr(recipe).replace(", phases=(), skip=None, update=None, autocast=None, attention=None)", ")")
    before = before.replace(", synchronized=False)", ")")
    others = recipe.replace(update=Update(weight=BF16)), recipe.replace(autocast=Autocast(dtype="bf16"))

    assert "update" not in before
    assert _fingerprint(recipe) == zlib.crc32(before.encode())
    assert len({_fingerprint(each) for each in (recipe, *others)}) == 3
