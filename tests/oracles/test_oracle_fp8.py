"""The `fp8` recipe's elements against torch's float8 casts, as the vectors have them."""

from dataclasses import replace

import pytest

from helpers import Vectors, rounded
from lowbit.methods.recipe import Recipe
from lowbit.numerics.elements import Minifloat

VECTORS = "static/fp8_cast_delayed.npz"
OPERANDS = {"e4m3": ("output", "input"), "e5m2": ("grad_input", "grad_output")}


def element(name: str) -> Minifloat:
    """The element that the recipe has for an operand."""
    product, operand = OPERANDS[name]
    found = getattr(getattr(Recipe.from_name("fp8"), product), operand).element
    assert isinstance(found, Minifloat)
    return found


@pytest.mark.parametrize("name", list(OPERANDS))
def test_clamped_casts_equal_the_vectors(vectors: Vectors, name: str) -> None:
    """Finite values are clamped, then rounded with halves to even; what is not finite becomes nan, never a number."""
    x, wanted = vectors["x"], vectors[f"{name}_satcast"]
    finite = x.isfinite()

    found = rounded(x, element(name))

    assert found[finite].equal(wanted[finite])
    assert found[~finite].isnan().all()


def test_casts_that_overflow_become_what_torch_gives(vectors: Vectors) -> None:
    """With overflow to inf, E5M2 is torch's plain cast: inf from 61440 on."""
    x, wanted = vectors["x"], vectors["e5m2_cast"]
    finite = x.isfinite()

    found = rounded(x, replace(element("e5m2"), overflow="infinite"))

    assert found[finite].equal(wanted[finite])
    assert found[finite].isinf().any()
