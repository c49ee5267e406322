"""Where the numbers of tensors lie, as native code and the passes over memory take them.

Views are (outer, channels, inner, channels last): a tensor whose memory is outer x channels x inner, or with channels
last outer x inner x channels.
"""

import math

import torch
from torch import Tensor

# Types of numbers as native code counts them.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 4, torch.int64: 5}

View = tuple[int, int, int, bool]
Memory = tuple[int, int, int]
# Of None.
NOWHERE: Memory = (0, -1, 0)


def memory_of(x: Tensor | None, name: str) -> Memory:
    """Where a tensor lies as native code takes it: address, type, how many numbers; of None a type that is none.

    Raises:
        TypeError: it is of a type that native code does not know, is not on the CPU, has gaps or has the negative bit.
        ValueError: its storage was resized below what its shape needs.
    """
    if x is None:
        return NOWHERE
    kind = TYPES.get(x.dtype)
    if kind is None or not x.is_cpu or x.is_neg() or not (x.is_contiguous() or is_channels_last(x)):
        bit = " with the negative bit" if x.is_neg() else ""
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise TypeError(
            f"{name} is {x.dtype}{bit} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}: give a dense "
            f"tensor on the CPU of {known}"
        )
    check_storage(x, name)
    return x.data_ptr(), kind, x.numel()


def check_storage(x: Tensor, name: str) -> None:
    """Raise a ValueError where the memory of a tensor on the CPU ends before its last number: sharding frees it."""
    if not x.is_cpu or x.layout is not torch.strided or not x.numel() or x._is_zerotensor():
        return
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    needed, there = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
    if there < needed:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} needs {needed} bytes, and its storage was resized to {there}: give it "
            "its memory back first"
        )


def in_memory(x: Tensor) -> Tensor:
    """`x` with its numbers in memory as they count: not a negative view, nor a zero tensor, which has no memory."""
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


def is_channels_last(x: Tensor) -> bool:
    """Whether memory is (B, *size, C) without gaps."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() > 1 and x.movedim(1, -1).is_contiguous()


def memory_view(x: Tensor, view: tuple[int, ...], dims: tuple[int, ...]) -> View | None:
    """(outer, channels, inner, channels last) of x's memory, channels being what has a scale each; None if neither."""
    kept = [d for d in range(len(view)) if d not in dims]
    if kept and kept != list(range(kept[0], kept[-1] + 1)):
        return None
    first, last = (kept[0], kept[-1] + 1) if kept else (0, 0)
    sizes = math.prod(view[:first]), math.prod(view[first:last]), math.prod(view[last:])
    if x.is_contiguous():
        return *sizes, False
    if not kept:
        return (x.shape[0], x.shape[1], math.prod(x.shape[2:]), True) if is_channels_last(x) else None
    return (*sizes, True) if is_channels_last(x) and sizes[:2] == tuple(x.shape[:2]) else None
