"""The `switchback` and `jetfire` recipes against float64 vectors made from the formulas of their papers."""

import dataclasses

import pytest
import torch

from helpers import Vectors
from lowbit import functional
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import FP32
from lowbit.numerics.quantizer import quantize
from lowbit.products.setting import Setting

VECTORS = "static/formula_only.npz"


@pytest.mark.parametrize("grad_weight", ["fp32", "bf16"])
def test_switchback_equals_the_vectors(vectors: Vectors, grad_weight: str) -> None:
    """Output and both gradients agree; grad_weight to float32 in full precision, to bf16 as the recipe has it."""
    recipe = Recipe.from_name("switchback")
    if grad_weight == "fp32":
        recipe = recipe.replace(grad_weight=dataclasses.replace(recipe.grad_weight, grad_output=FP32, input=FP32))
    x, w = vectors["sb_x"].requires_grad_(), vectors["sb_w"].requires_grad_()

    y = functional.linear(x, w, setting=Setting(recipe=recipe))
    y.backward(vectors["sb_gy"])

    assert x.grad is not None
    assert w.grad is not None
    for found, wanted in ((y, vectors["sb_y"]), (x.grad, vectors["sb_dx"])):
        torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-6, atol=2e-6)
    largest = float(vectors["sb_dw"].abs().max())
    away = float((w.grad.double() - vectors["sb_dw"]).abs().max()) / largest
    assert (away < 1e-6) == (grad_weight == "fp32")
    assert away < 2**-8


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_squares_of_jetfire_equal_the_vectors(vectors: Vectors, rounding: str) -> None:
    """Each 32 x 32 numbers have the recorded scale and codes; a square of zeros stays zeros.

    A recorded draw n is added to magnitudes before they are rounded: the compared draw is 0.5 - n, of negative values
    0.5 + n.
    """
    recipe = Recipe.from_name("jetfire")
    x, scales = vectors["jf_x"], vectors["jf_scale"].float()
    noisy = rounding == "stochastic"
    fmt = recipe.grad_input.grad_output if noisy else recipe.output.input
    codes = vectors["jf_sr_codes" if noisy else "jf_codes"]
    drawn = (0.5 - vectors["jf_u"] * torch.where(x < 0, -1, 1)).float()

    hat = quantize(x, fmt, noise=drawn if noisy else None)

    assert fmt.rounding == rounding
    assert hat.grid is not None
    found = hat.grid.steps.scale.reshape(2, 3)
    torch.testing.assert_close(found.where(scales > 0, 0), scales, rtol=1e-6, atol=0)
    each = found.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal((hat.values / each).round().to(torch.int8), codes)
