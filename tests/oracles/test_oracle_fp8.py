"""The elements of `fp8` against torch's float8 casts, and delayed scales against those of TransformerEngine."""

from dataclasses import replace

import pytest
import torch

from helpers import Vectors, rounded
from lowbit.methods.recipe import Recipe
from lowbit.numerics.elements import Minifloat
from lowbit.numerics.formats import Format
from lowbit.numerics.history import Histories, advance, new_history
from lowbit.numerics.scales import Delayed, Scale

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


@pytest.mark.parametrize("name", list(OPERANDS))
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("choice", ["max", "most-recent"])
def test_delayed_scales_equal_the_vectors(vectors: Vectors, name: str, length: int, choice: str) -> None:
    """Before and after each step the scale is 1 / S, zeros, infs and tiny magnitudes included.

    Where the recorded scale is the largest float32 in place of an overflow, S is smaller.
    """
    rule = Delayed(history=length, choice=choice)  # type: ignore[arg-type]  # one of the two
    fmt = Format(element=element(name), scale=Scale(range=rule))
    history, most = new_history(length), element(name).largest
    largest_float = torch.finfo(torch.float32).max

    def inverse() -> float:
        _, hi = Histories(kept={"input": history}, records=False).observe("input", torch.zeros(1), fmt)
        return most / float(hi)

    for a, (used, after) in zip(
        vectors["delayed_amax_seq"], vectors[f"delayed_{choice.replace('-', '_')}_L{length}_{name}"], strict=True
    ):
        if used < largest_float * 0.99:
            assert inverse() == pytest.approx(float(used), rel=1e-6)
        Histories(kept={"input": history}, records=True).observe("input", a.reshape(1), fmt)
        advance(history, rule)
        if after < largest_float * 0.99:
            assert inverse() == pytest.approx(float(after), rel=1e-6)
        else:
            assert inverse() > float(after)
