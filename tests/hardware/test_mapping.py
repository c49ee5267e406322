"""Products of ledgers on BitFusion."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import UsageError
from lowbit.evidence.plan import plan
from lowbit.evidence.records import Product
from lowbit.hardware import BitFusion, as_matrix

ARRAY = BitFusion()


def products_of(layer: nn.Module, *shape: int, recipe: str = "w4a4g8") -> dict[str, Product]:
    """The three products of a layer."""
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Identity(), layer), torch.zeros(shape, requires_grad=True)
    lowbit.convert_(model, lowbit.Recipe.from_name(recipe).replace(first="convert", last="convert"))
    return {total.product.product: total.product for total in plan(model, x, steps=1).totals()}


def test_a_convolution_is_the_mapping_of_training() -> None:
    """All three products of a strided square convolution cost what `BitFusion.training` says."""
    found = products_of(nn.Conv2d(16, 32, 3, stride=2, padding=1), 8, 16, 32, 32)

    expected = ARRAY.training(
        kernel=3,
        output_size=16,
        stride=2,
        in_channels=16,
        out_channels=32,
        batch=8,
        input_bits=4,
        weight_bits=4,
        grad_bits=8,
        input_size=32,
    )
    assert {name: ARRAY.product(product) for name, product in found.items()} == {
        "output": expected.output,
        "grad_input": expected.grad_input,
        "grad_weight": expected.grad_weight,
    }


def test_a_linear_layer_is_the_mapping_of_training() -> None:
    """A linear layer has kernel, output and stride 1, and its rows as batch."""
    found = products_of(nn.Linear(64, 32), 5, 8, 64)

    expected = ARRAY.training(
        kernel=1,
        output_size=1,
        stride=1,
        in_channels=64,
        out_channels=32,
        batch=40,
        input_bits=4,
        weight_bits=4,
        grad_bits=8,
        input_size=1,
    )
    assert ARRAY.product(found["output"]) == expected.output
    assert ARRAY.product(found["grad_input"]) == expected.grad_input
    assert ARRAY.product(found["grad_weight"]) == expected.grad_weight


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 12, 12)),
        (nn.Conv2d(8, 16, 3, groups=2), (2, 8, 12, 12)),
        (nn.Conv2d(8, 16, (3, 1)), (2, 8, 12, 12)),
        (nn.Conv2d(8, 16, 3), (2, 8, 12, 9)),
        (nn.Conv1d(8, 16, 3), (2, 8, 12)),
        (nn.Conv3d(4, 8, 2), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(8, 16, 3, stride=2, groups=2), (2, 8, 6, 6)),
        (nn.Linear(16, 8), (3, 5, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_no_product_gains_or_loses_work(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Whatever the layer, the output and the weight's gradient have exactly the MACs of the ledger."""
    found = products_of(layer, *shape)

    for name in ("output", "grad_weight"):
        assert ARRAY.product(found[name]).macs == found[name].macs
    assert [as_matrix(product).macs for product in found.values()] == [product.macs for product in found.values()]


@pytest.mark.parametrize(
    ("input_", "weight", "output"),
    [((2, 3, 5, 8), (2, 3, 8, 7), (2, 3, 5, 7)), ((2, 5, 8), (8, 7), (2, 5, 7)), ((5, 8), (8, 7), (5, 7))],
)
@pytest.mark.parametrize("name", ["output", "grad_input", "grad_weight"])
def test_matrix_products_of_activations(
    name: str, input_: tuple[int, ...], weight: tuple[int, ...], output: tuple[int, ...]
) -> None:
    """Attention's products run once for each matrix of the batch, with all their MACs."""
    macs = math.prod(output) * 8
    product = product_of(name, input=input_, weight=weight, output=output, macs=macs)

    assert ARRAY.product(product).macs == macs


def product_of(name: str = "output", **changes: Any) -> Product:
    """A matrix product of 8 bits."""
    values: dict[str, Any] = {"layer": "a", "product": name, "kind": "matmul", "engine": "e", "bits": (8, 8)}
    shapes: dict[str, Any] = {"input": (5, 8), "weight": (8, 7), "output": (5, 7), "macs": 280}
    return Product(**(values | shapes | changes))


def test_a_first_layer_is_unfolded() -> None:
    """Reading the network's input changes the cost of a convolution's output and of nothing else."""
    found = products_of(nn.Conv2d(3, 16, 3, padding=1), 8, 3, 32, 32)

    changed = {
        name: ARRAY.product(product, first_layer=True) != ARRAY.product(product) for name, product in found.items()
    }
    assert changed == {"output": True, "grad_input": False, "grad_weight": False}


def test_tiles_are_shown_for_grouped_layers_too() -> None:
    """The tiling chosen is that of one group."""
    found = products_of(nn.Conv2d(8, 8, 3, groups=8), 2, 8, 12, 12)

    assert len(ARRAY.product(found["output"]).loops) == 5


@pytest.mark.parametrize("bits", [(128, 128), (8, 65)])
def test_bits_that_the_array_lacks(bits: tuple[int, int]) -> None:
    """Operands above 64 bits have no estimate, and the message says what the array has."""
    with pytest.raises(UsageError, match=f"_bits={max(bits)}: the array has widths from 1 to 64"):
        ARRAY.product(product_of(bits=bits))


def test_a_wide_gradient_costs_more() -> None:
    """A 16-bit gradient costs more cycles than one of 8."""
    shapes: dict[str, Any] = {"input": (512, 64), "weight": (64, 64), "output": (512, 64), "macs": 512 * 64 * 64}
    wide, narrow = (ARRAY.product(product_of("grad_weight", bits=(b, 8), **shapes)) for b in (16, 8))

    assert wide.compute_cycles > narrow.compute_cycles


def test_an_empty_product_has_no_estimate() -> None:
    """A product of no element is refused by name."""
    with pytest.raises(UsageError, match="nothing is multiplied"):
        ARRAY.product(product_of(macs=0, input=(0, 8), output=(0, 7)))
