"""The products of a layer as one operator each, which `torch.compile` and export see whole.

A layer's products count steps, keep ranges and choose engines, none of which a compiler can follow. In a compiled model
a layer is therefore a call of `lowbit::products`, which names its site by a number and does at run time what the layer
does eagerly. A change of bits or of the step does not compile anything again. `lowbit::advance` begins a step: it
changes the tensor that every product of the step reads, so that no compiler moves a product before it.

What the backward needs lies in memory that a tensor owns, the memo, and is freed with that tensor.
"""

import itertools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lowbit.products.operators import Convolution, Linear, Op

Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Products(Protocol):
    """A site of products, as the operators call it."""

    def forward_products(
        self, x: Tensor, w: Tensor, bias: Tensor | None, op: Op, dtype: torch.dtype, needs: Needs
    ) -> tuple[Tensor, Callable[[Tensor], Grads]]:
        """The output, and a function from its gradient to those of input, weight and bias."""


class Normalization(Protocol):
    """A site of a Range BN, as the operators call it."""

    def forward_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        fixed: tuple[Tensor, Tensor] | None,
        eps: float,
        rectify: bool,
        needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Grads]]:
        """The normalised values, mean and deviation, and what gives the gradients of input, gamma and beta."""


class Ticker(Protocol):
    """A clock, as the operators call it."""

    def advance_compiled(self, training: bool) -> None:
        """Begin a forward of a compiled model."""


_numbers = itertools.count()
_callers: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(caller: object) -> int:
    """The number by which operators know a site or a clock, one of the protocols above, while it lives."""
    number = next(_numbers)
    _callers[number] = caller
    return number


class _Memory(bytearray):
    """The memory of a tensor, with what the tensor keeps."""

    kept: Any


_memories: WeakValueDictionary[int, _Memory] = WeakValueDictionary()


def memo(kept: Any) -> Tensor:
    """A tensor that keeps something for as long as its memory is used."""
    memory = _Memory(8)
    memory.kept = kept
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    _memories[tensor.data_ptr()] = memory
    return tensor


def kept_by(tensor: Tensor) -> Any:
    """What a memo keeps."""
    return _memories[tensor.data_ptr()].kept


def _op(transposed: bool, numbers: list[list[int]], groups: int) -> Op:
    """The operator that these arguments describe; without a stride it is a matrix product."""
    stride, padding, dilation, output_padding = numbers
    if not stride:
        return Linear()
    return Convolution(
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        transposed=transposed,
        output_padding=tuple(output_padding),
    )


def _products(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pulse: Tensor,  # noqa: ARG001 - read, so that it comes after the step began
    site: int,
    transposed: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    groups: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    op = _op(transposed, [stride, padding, dilation, output_padding], groups)
    y, backward = _callers[site].forward_products(x, w, bias, op, dtype, (needs[0], needs[1], needs[2]))
    return y, memo(backward)


def _fake_products(x: Tensor, w: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Only shapes and strides; a convolution has those of torch's own."""
    *_, transposed, stride, padding, dilation, output_padding, groups, dtype, _ = arguments
    op = _op(transposed, [stride, padding, dilation, output_padding], groups)
    if op.geometry is None:
        y = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype)
    else:
        y = op.output(x.to(dtype), w.to(dtype))
    return y, torch.empty(8, dtype=torch.uint8, device="cpu")


def _range_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pulse: Tensor,  # noqa: ARG001 - read, so that it comes after the step began
    mean: Tensor | None,
    deviation: Tensor | None,
    site: int,
    eps: float,
    rectify: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fixed = None if mean is None or deviation is None else (mean, deviation)
    caller = _callers[site]
    y, mu, sigma, backward = caller.forward_norm(x, weight, bias, fixed, eps, rectify, (needs[0], needs[1], needs[2]))
    return y, mu, sigma, memo(backward)


def _fake_range_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), channels, torch.empty_like(channels), torch.empty(8, dtype=torch.uint8, device="cpu")


def _backward(
    g: Tensor, kept: Tensor, shapes: list[int], strides: list[int], axes: list[int], dtypes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, in the strides that were promised."""
    made = list(_fake_backward(g, kept, shapes, strides, axes, dtypes))
    for i, grad in enumerate(kept_by(kept)(g)):
        if grad is not None:
            made[i] = grad if grad.stride() == made[i].stride() else made[i].copy_(grad)
    return made[0], made[1], made[2]


def _fake_backward(
    g: Tensor, _: Tensor, shapes: list[int], strides: list[int], axes: list[int], dtypes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    made, first = [], 0
    for count, dtype in zip(axes, dtypes, strict=True):
        last = first + count
        made.append(g.new_empty_strided(shapes[first:last], strides[first:last], dtype=_DTYPES[dtype]))
        first = last
    return made[0], made[1], made[2]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the memo, and the shape and strides of each gradient in turn; a gradient that is not needed has none."""
    ctx.needs, ctx.count = inputs[-1], len(inputs)
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    wanted = [torch.empty_like(t) if needed else None for t, needed in zip(inputs[:3], ctx.needs, strict=True)]
    shapes = [[0] if t is None else list(t.shape) for t in wanted]
    strides = [[1] if t is None else list(t.stride()) for t in wanted]
    ctx.promised = (
        list(itertools.chain(*shapes)),
        list(itertools.chain(*strides)),
        [len(shape) for shape in shapes],
        [0 if t is None else _DTYPES.index(t.dtype) for t in wanted],
    )


def _gradients(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias; None for all other arguments."""
    grads = torch.ops.lowbit.backward(g, *ctx.saved_tensors, *ctx.promised)
    needed = [grad if wanted else None for grad, wanted in zip(grads, ctx.needs, strict=True)]
    return (*needed, *[None] * (ctx.count - 3))


def _advance(pulse: Tensor, clock: int, training: bool) -> None:
    _callers[clock].advance_compiled(training)
    pulse.add_(1)


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define(
    "products(Tensor x, Tensor w, Tensor? bias, Tensor pulse, int site, bool transposed, int[] stride, int[] padding, "
    "int[] dilation, int[] output_padding, int groups, ScalarType dtype, bool[] needs) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "range_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor pulse, Tensor? mean, Tensor? deviation, int site, "
    "float eps, bool rectify, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor g, Tensor kept, SymInt[] shapes, SymInt[] strides, int[] axes, int[] dtypes) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("advance(Tensor(a!) pulse, int clock, bool training) -> ()")
for _name, _kernel, _fake in (
    ("products", _products, _fake_products),
    ("range_norm", _range_norm, _fake_range_norm),
    ("backward", _backward, _fake_backward),
    ("advance", _advance, lambda *_: None),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_LIBRARY)
for _name in ("products", "range_norm"):
    torch.library.register_autograd(f"lowbit::{_name}", _gradients, setup_context=_setup, lib=_LIBRARY)
