"""The functions of torch that may multiply by a weight, and what reads their arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.nn.calls import attention, products
from lowbit.nn.calls.convolutions import convolution, transposed_convolution
from lowbit.nn.calls.products import Asked

Reader = Callable[..., Asked | None]

_BY_NAME: dict[str, Reader] = {
    "linear": products.linear,
    "matmul": products.matmul,
    "mm": products.mm,
    "bmm": products.bmm,
    "mv": products.mv,
    "addmm": products.addmm,
    "baddbmm": products.baddbmm,
    "einsum": products.einsum,
    "bilinear": products.bilinear,
    **{f"conv{axes}d": convolution(axes) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": transposed_convolution(axes) for axes in (1, 2, 3)},
}
_ALIASES: dict[str, Reader] = {
    "__matmul__": products.matmul,
    "__rmatmul__": products.reversed_matmul,
    "_grouped_mm": products.grouped_mm,
}

OPERATORS = (*_BY_NAME, "grouped_mm", attention.OPERATOR)
"""The operators in the names of calls."""


def _readers() -> dict[Any, Reader]:
    """The reader of each function and method that this torch has."""
    found: dict[Any, Reader] = {}
    for name, reader in (_BY_NAME | _ALIASES).items():
        for owner in (torch, Tensor, F):
            if (func := getattr(owner, name, None)) is not None:
                found[func] = reader
    if (func := getattr(F, "grouped_mm", None)) is not None:
        found[func] = products.named_grouped_mm
    return found


READERS: Mapping[Any, Reader] = _readers()
"""What reads the arguments of each function; see `lowbit.nn.calls.products`."""
