"""The `dorefa` recipe against vectors from its authors' code."""

import dataclasses

import pytest
import torch
from torch import Tensor

from helpers import Vectors
from lowbit import functional
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import FP32
from lowbit.numerics.quantizer import quantize
from lowbit.products.setting import Setting

VECTORS = "static/dorefa.npz"
BITS = [1, 2, 3, 4, 6, 8]


def recipe(bits: int) -> Recipe:
    """The recipe with weights and inputs of so many bits, and gradients as they are."""
    return Recipe.from_name(f"dorefa:w{bits}a{bits}g32")


def through(x: Tensor, w: Tensor, g: Tensor, bits: int, which: str) -> tuple[Tensor, Tensor]:
    """The value of one operand beside the number 1 and its gradient for `g`, by a product of 1 by 1 matrices."""
    found = recipe(bits)
    if which == "weight":  # y = 1 w, so that the value is the output
        found = found.replace(output=dataclasses.replace(found.output, input=FP32))
        found = found.replace(grad_weight=dataclasses.replace(found.grad_weight, input=FP32))
    else:
        found = found.replace(output=dataclasses.replace(found.output, weight=FP32))
        found = found.replace(grad_input=dataclasses.replace(found.grad_input, weight=FP32))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = functional.linear(x, w, setting=Setting(recipe=found))
    y.backward(g)
    grad = w.grad if which == "weight" else x.grad
    assert grad is not None
    return y.detach(), grad


@pytest.mark.parametrize("bits", BITS)
def test_weights_and_their_gradients_equal_the_authors(vectors: Vectors, bits: int) -> None:
    """1 bit is the sign times the mean magnitude of the layer, more the tanh over its largest; both ways.

    A weight of 0 lies in the middle of two codes of 2 bits or more; which of them it takes is a matter of rounding.
    """
    w, g = vectors["w"].reshape(-1, 1), vectors["gw"].reshape(1, -1)

    values, grad = through(torch.ones(1, 1), w, g, bits, "weight")

    theirs = vectors[f"fw_b{bits}"].flatten()
    tied = (w.detach().flatten() == 0) & (bits > 1)
    assert int(tied.sum()) <= 1
    torch.testing.assert_close(values.flatten()[~tied], theirs[~tied], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values.flatten().abs(), theirs.abs(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.flatten(), vectors[f"fw_b{bits}_grad"].flatten(), rtol=1e-4, atol=1e-5)
    assert torch.equal(grad.flatten(), g.flatten()) == (bits == 1)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_and_their_gradients_equal_the_authors(vectors: Vectors, bits: int) -> None:
    """Clipped to 0..1, which stops the gradient outside, and rounded to k levels."""
    a, g = vectors["a"].reshape(-1, 1), vectors["ga"].reshape(-1, 1)

    values, grad = through(a, torch.ones(1, 1), g, bits, "input")

    torch.testing.assert_close(values.flatten(), vectors[f"act_b{bits}"].flatten(), rtol=1e-6, atol=1e-7)
    assert torch.equal(grad.flatten(), vectors[f"act_b{bits}_grad"].flatten())
    assert 0 < int((grad == 0).sum()) < grad.numel()


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("noise", ["noise", "nonoise"])
def test_gradients_equal_the_authors(vectors: Vectors, bits: int, noise: str) -> None:
    """Each sample on 2**k levels from minus its largest magnitude to it, with their noise replayed and without."""
    fmt = Recipe.from_name(f"dorefa:w8a8g{bits}").grad_input.grad_output
    draws = 0.5 - vectors[f"fg_b{bits}_u"] if noise == "noise" else None

    fmt = fmt if noise == "noise" else fmt.replace(rounding="nearest")
    values = quantize(vectors["g"], fmt, dims=(1, 2, 3), noise=draws).values

    step = 2 * vectors["g"].abs().amax((1, 2, 3), keepdim=True) / (2**bits - 1)
    torch.testing.assert_close(values / step, vectors[f"fg_b{bits}_{noise}"] / step, rtol=0, atol=1e-4)
    assert not torch.equal(values, vectors["g"])


def test_zeros_stay_finite_where_the_authors_code_gives_nan(vectors: Vectors) -> None:
    """A sample of zeros and 1-bit weights of zeros return themselves; wider weights take a code beside 0."""
    fmt = Recipe.from_name("dorefa").grad_input.grad_output.replace(rounding="nearest")
    g, theirs = vectors["fg_b8_zero_sample_in"], vectors["fg_b8_zero_sample_out"]

    values = quantize(g, fmt, dims=(1, 2, 3)).values

    assert theirs[2].isnan().all()
    assert torch.equal(values[2], torch.zeros_like(values[2]))
    torch.testing.assert_close(values[theirs.isfinite()], theirs[theirs.isfinite()], rtol=1e-5, atol=1e-7)
    assert torch.equal(
        quantize(vectors["fw_b1_zeros"], recipe(1).output.weight).values, torch.zeros_like(vectors["fw_b1_zeros"])
    )
    assert vectors["fw_b8_zeros"].isnan().all()
    middle = quantize(torch.zeros(2, 3), recipe(8).output.weight).values
    torch.testing.assert_close(middle.abs(), torch.full((2, 3), 1 / 255), rtol=1e-4, atol=0)
