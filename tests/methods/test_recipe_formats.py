"""The formats of every recipe on tensors that break public codes: zeros, constants, huge, tiny, nan and inf."""

import math

import pytest
import torch

import lowbit
from lowbit import Recipe
from lowbit.numerics.formats import FP32
from lowbit.numerics.quantizer import quantize
from lowbit.products.operators import Convolution, Linear, Op
from lowbit.products.setting import slot

FP16 = Recipe.from_name("amp-fp16").output.input
NAMES = [name.replace("wXaYgZ", "w3a2g4") for name in lowbit.recipes()] + ["dorefa:w1a2g6"]
SHAPES: dict[str, tuple[Op, dict[str, torch.Size]]] = {
    "linear": (
        Linear(),
        {"input": torch.Size((5, 40)), "weight": torch.Size((33, 40)), "grad_output": torch.Size((5, 33))},
    ),
    "convolution": (
        Convolution(stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
        {
            "input": torch.Size((2, 5, 4, 4)),
            "weight": torch.Size((6, 5, 3, 3)),
            "grad_output": torch.Size((2, 6, 4, 4)),
        },
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operand_of_a_recipe_takes_every_tensor(name: str, kind: str) -> None:
    """What is finite stays finite and keeps its sign, zeros stay zeros where zero is a code, and a nan surfaces."""
    (op, shapes), recipe = SHAPES[kind], Recipe.find(name)
    for product, operand, fmt in recipe.operands():
        shape, noise = shapes[operand], (3, 5) if fmt.stochastic else None
        place = slot(op, recipe, product, operand, shape)
        for value in (0.0, 1.0, -3.0, 1e30, -1e30, 1e-30, 1e-42):
            # float16 without a scale ends in inf, and the fine steps of 16-bit flags of denormal numbers are 0.
            if (abs(value) > 65504 and fmt == FP16) or (value == 1e-42 and name == "wageubn-e16"):
                continue
            found = quantize(torch.full(shape, value), fmt, sharing=place.sharing, noise=noise).values
            assert bool(found.isfinite().all()), (product, operand, value)
            assert bool((found * value >= 0).all()) or fmt.zero == "offset" or fmt.transform.along_axis
            if value == 0 and fmt.zero != "offset":
                assert not found.any(), (product, operand)
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.ones(shape)
            x.view(-1)[7] = bad
            got = quantize(x, fmt, sharing=place.sharing, noise=noise).values.reshape(-1)[7]
            assert not bool(got.isfinite()), (product, operand, bad)
            assert fmt == FP32 or bool(got.isnan()) or fmt.scale is None
