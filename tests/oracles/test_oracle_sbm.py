"""The quantizers against vectors from the SBM authors' two codes."""

from typing import Any

import pytest
import torch

from helpers import Vectors
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import encode, quantize
from lowbit.numerics.ranges import extremes

VECTORS = "static/sbm_quantizer_v2.npz"
HOFFER = Recipe.from_name("sbm8-hoffer")
BITS = (2, 3, 4, 6, 8, 16)


def _with_bits(fmt: object, bits: int, **changes: Any) -> Format:
    assert fmt.has_width
    return fmt.replace(bits=bits, **changes)


@pytest.mark.parametrize("rule", ["mean", "extreme"])
@pytest.mark.parametrize("bits", BITS)
def test_activations_equal_the_authors(vectors: Vectors, rule: str, bits: int) -> None:
    """Dequantised activations equal the authors' under both range rules, at every width."""
    fmt = _with_bits(HOFFER.output.input, bits, range="sample-mean" if rule == "mean" else "minmax")

    values = quantize(vectors["act_x"], fmt).values

    torch.testing.assert_close(values, vectors[f"act_{rule}_b{bits}"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(values, vectors["act_x"])


@pytest.mark.parametrize("rule", ["mean", "extreme"])
def test_activation_codes_and_ranges_equal_the_authors(vectors: Vectors, rule: str) -> None:
    """8-bit codes are identical, and lo and hi are the authors' zero point and range."""
    fmt = _with_bits(HOFFER.output.input, 8, range="sample-mean" if rule == "mean" else "minmax")
    x = vectors["act_x"]

    codes = encode(x, fmt)
    lo, hi = extremes(x, rule=fmt.scale.range, dims=(0, 1, 2, 3))

    assert torch.equal(codes.q, vectors[f"act_{rule}_codes"])
    torch.testing.assert_close(lo.flatten(), vectors[f"act_{rule}_zp"].flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close((hi - lo).flatten(), vectors[f"act_{rule}_range"].flatten(), rtol=1e-6, atol=0)


def test_signed_codes_stand_for_the_same_values(vectors: Vectors) -> None:
    """The authors' signed variant is the same grid: our unsigned codes reproduce its values."""
    values = quantize(vectors["act_x"], _with_bits(HOFFER.output.input, 8)).values

    torch.testing.assert_close(values, vectors["act_mean_b8_signed"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_weights_per_output_channel_equal_the_authors(vectors: Vectors, bits: int) -> None:
    """Weights with one range per output channel equal the authors' at every width."""
    values = quantize(vectors["w_x"], _with_bits(HOFFER.output.weight, bits), dims=(1, 2, 3)).values

    torch.testing.assert_close(values, vectors[f"w_perchan_b{bits}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 16])
def test_biases_equal_the_authors(vectors: Vectors, bits: int) -> None:
    """A bias with one range for all equals the authors'."""
    values = quantize(vectors["bias_x"], _with_bits(HOFFER.bias, bits)).values

    torch.testing.assert_close(values, vectors[f"bias_b{bits}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rounding", ["sr", "det"])
def test_gradients_equal_the_authors(vectors: Vectors, bits: int, rounding: str) -> None:
    """Gradients equal the authors' with their own noise replayed, and with nearest rounding."""
    stochastic = rounding == "sr"
    fmt = _with_bits(HOFFER.grad_input.grad_output, bits, rounding="stochastic" if stochastic else "nearest")

    values = quantize(vectors["grad_x"], fmt, noise=0.5 - vectors["grad_noise_sr"] if stochastic else None).values

    torch.testing.assert_close(values, vectors[f"grad_q_b{bits}_{rounding}"], rtol=1e-6, atol=1e-9)


def test_linear_gradients_equal_the_authors(vectors: Vectors) -> None:
    """The gradient of a linear layer's output equals the authors'."""
    values = quantize(vectors["gradlin_x"], HOFFER.grad_input.grad_output, noise=0.5 - vectors["gradlin_noise"]).values

    torch.testing.assert_close(values, vectors["gradlin_sr_b8"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["const", "zero"])
def test_degenerate_tensors_stay_themselves_where_the_authors_give_nan(vectors: Vectors, name: str) -> None:
    """A constant and an all-zero tensor return themselves; the authors' code returns nan."""
    x = vectors[f"{name}_x"]

    values = quantize(x, _with_bits(HOFFER.output.weight, 8)).values

    assert torch.equal(values, x)
    assert vectors[f"{name}_out"].isnan().all()
