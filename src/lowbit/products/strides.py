"""The strides that torch gives a layer's output, and laying an output out like that.

Notation: tensors are ``(B, C, *size)``. Contiguous memory is in the order of the axes, channels last is in the order
``(B, *size, C)``.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

Strides = tuple[int, ...]

# The forms of channels last that torch has a name for, by the number of axes.
_NAMED = {4: torch.channels_last, 5: torch.channels_last_3d}


@lru_cache(maxsize=4096)
def contiguous(shape: torch.Size) -> Strides:
    """The strides of contiguous memory."""
    return _dense(shape, range(len(shape) - 1, -1, -1))


@lru_cache(maxsize=4096)
def channels_last(shape: torch.Size) -> Strides:
    """The strides of channels last, even if torch lacks a name for it."""
    return _dense(shape, (1, *range(len(shape) - 1, 1, -1), 0))


def _dense(shape: torch.Size, order: Iterable[int]) -> Strides:
    """Strides without gaps, the axis that varies fastest first in `order`."""
    strides, step = [1] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


@lru_cache(maxsize=4096)
def suggests_channels_last(shape: torch.Size, strides: Strides) -> bool:
    """Whether torch takes such a tensor for channels last: its strides decide, even with gaps or axes of size 1.

    Source: ATen's ``is_channels_last_strides_2d`` and ``_3d``, which ``suggest_memory_format`` goes by.
    """
    if len(shape) not in _NAMED or strides[1] == 0:
        return False
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(shape[axis], 1)
    return True


def of_convolution(shape: torch.Size, x: Tensor, w: Tensor) -> Strides:
    """The strides of a convolution's output of this shape: channels last where its input or its weight is."""
    last = torch.float64 not in (x.dtype, w.dtype) and any(suggests_channels_last(t.shape, t.stride()) for t in (x, w))
    return channels_last(shape) if last else contiguous(shape)


def of_normalization(x: Tensor) -> Strides:
    """The strides of a batch normalisation's output: channels last where its input is, by its strides or its memory."""
    last = suggests_channels_last(x.shape, x.stride()) or (
        x.dim() in _NAMED and not x.is_contiguous() and x.is_contiguous(memory_format=_NAMED[x.dim()])
    )
    return channels_last(x.shape) if last else contiguous(x.shape)


def laid_out(y: Tensor, wanted: Strides) -> Tensor:
    """`y` with these strides, and not a view of another tensor: itself if it is so already; differentiable."""
    if y.stride() != wanted:
        return torch.empty_strided(y.shape, wanted, dtype=y.dtype, device=y.device).copy_(y)
    # User code may change an output in place, which torch forbids for a view made in a custom autograd function.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
