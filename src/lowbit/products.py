"""The three products of a layer as autograd, each operand of each product in its own format.

Notation: x input, w weight, g grad_output; a hat marks a value on its format's grid.
``output = x^ w^``, ``grad_input = g^ w^``, ``grad_weight = g^ x^``. g may have one format in `grad_input` and
another in `grad_weight`: gradient bifurcation (Banner et al. 2018). grad_bias is the plain sum of g.

The backward of rounding is the straight-through estimator: clipped values receive their gradient too.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import integer, strides
from lowbit.errors import UsageError
from lowbit.formats import FP32, Format, Integer
from lowbit.kernels import cpu, cuda
from lowbit.quantizer import Grid, Quantized, levels_of, quantize
from lowbit.recipe import SLOTS, Recipe
from lowbit.rounding import Noise, field_of

ENGINES = ("reference", "int8")


class Op(Protocol):
    """What is multiplied: the three products of one kind of layer on plain tensors, and where its channels lie."""

    def __hash__(self) -> int:
        """Equal operators have equal hashes."""

    @property
    def kind(self) -> str:
        """The operator's name, e.g. ``"conv2d"``."""

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """The product of input and weight."""

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """The shape of the output."""

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:
        """The strides of an output of this shape, those that the plain layer gives it."""

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """The product of grad_output and weight, in the shape of the input."""

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The product of grad_output and input, in the shape of the weight."""

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum of grad_output over all but its channels."""

    def kernel(self, product: str) -> str:
        """The operator that executes a product on the reference engine."""

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:
        """Multiply-accumulates of each of the three products, one fused multiply-add counted as one."""

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:
        """The shape, same elements in the same order, in which the axes below are meant."""

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:
        """The axes of the view, of `dim` axes, that the product sums over."""

    def output_channels(self, dim: int) -> tuple[int, ...]:
        """The axes of the weight's view that count output channels."""

    def bias_length(self, w: torch.Size) -> int:
        """How many numbers a bias beside a weight of this shape has: one for each output channel."""

    @property
    def has_rows(self) -> bool:
        """Whether operands are matrices whose last axis is one row."""

    @property
    def geometry(self) -> integer.Geometry | None:
        """The convolution as integer kernels take it; None for a matrix product."""


@dataclass(frozen=True)
class Linear:
    """``y (..., N) = x (..., K) w (N, K)^T``."""

    kind: str = field(default="linear", init=False)
    has_rows: bool = field(default=True, init=False)
    geometry: None = field(default=None, init=False)

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """``(..., N)``."""
        if len(w) != 2 or not x or x[-1] != w[1]:
            raise RuntimeError(f"linear cannot multiply shapes {tuple(x)} of the input and {tuple(w)} of the weight")
        return torch.Size((*x[:-1], w[0]))

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:  # noqa: ARG002 - always so
        """Contiguous."""
        return strides.contiguous(shape)

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """``x w^T``."""
        return F.linear(x, w)

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """``g w``."""
        return (g @ w).reshape(shape)

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """``g^T x`` over all rows."""
        return (g.flatten(0, -2).t() @ x.flatten(0, -2)).reshape(shape)

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum over all rows."""
        return g.flatten(0, -2).sum(0)

    def kernel(self, product: str) -> str:
        """`aten::linear` forward, `aten::mm` backward."""
        return "aten::linear" if product == "output" else "aten::mm"

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:  # noqa: ARG002 - the shape of y follows
        """Rows times K times N."""
        return x.numel() * w[0]

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:
        """Rows (all leading axes) by features; the weight as it is."""
        return tuple(shape) if operand == "weight" else (math.prod(shape[:-1]), shape[-1])

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:  # noqa: ARG002 - always two axes
        """One axis of the two."""
        return {
            ("output", "input"): (1,),
            ("output", "weight"): (1,),
            ("grad_input", "grad_output"): (1,),
            ("grad_input", "weight"): (0,),
            ("grad_weight", "grad_output"): (0,),
            ("grad_weight", "input"): (0,),
        }[product, operand]

    def output_channels(self, dim: int) -> tuple[int, ...]:  # noqa: ARG002 - always two axes
        """Axis 0 of (N, K)."""
        return (0,)

    def bias_length(self, w: torch.Size) -> int:
        """N."""
        return w[0]


@dataclass(frozen=True)
class Matmul:
    """``y (..., M, N) = x (..., M, K) w (..., K, N)``; leading axes broadcast."""

    kind: str = field(default="matmul", init=False)
    has_rows: bool = field(default=True, init=False)
    geometry: None = field(default=None, init=False)

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """``(..., M, N)``."""
        return torch.Size((*torch.broadcast_shapes(x[:-2], w[:-2]), x[-2], w[-1]))

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:  # noqa: ARG002 - always so
        """Contiguous."""
        return strides.contiguous(shape)

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """``x w``."""
        return x @ w

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """``g w^T``, summed over broadcast axes."""
        return (g @ w.transpose(-1, -2)).sum_to_size(shape)

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """``x^T g``, summed over broadcast axes."""
        return (x.transpose(-1, -2) @ g).sum_to_size(shape)

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum over all rows; `matmul` takes no bias, so it is never asked for."""
        return g.flatten(0, -2).sum(0)

    def kernel(self, product: str) -> str:  # noqa: ARG002 - all three alike
        """`aten::matmul`."""
        return "aten::matmul"

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:  # noqa: ARG002 - w's K is x's
        """Elements of the result times K."""
        return y.numel() * x[-1]

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:  # noqa: ARG002 - all operands alike
        """As it is."""
        return tuple(shape)

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:
        """The last axis or the one before it."""
        last = {("output", "input"), ("grad_input", "grad_output"), ("grad_input", "weight")}
        return (dim - 1,) if (product, operand) in last else (dim - 2,)

    def output_channels(self, dim: int) -> tuple[int, ...]:
        """The last axis of (..., K, N), apart for each matrix."""
        return (*range(dim - 2), dim - 1)

    def bias_length(self, w: torch.Size) -> int:
        """N; `matmul` takes no bias."""
        return w[-1]


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A 1-, 2- or 3-dimensional convolution or transposed convolution of zero-padded input ``(B, C, *size)``.

    Args:
        stride, padding, dilation: one number per spatial axis.
        groups: number of groups.
        transposed: the weight is ``(I, O/groups, *kernel)`` and the output is the larger side.
        output_padding: extra size on one side of a transposed convolution's output.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    has_rows: bool = field(default=False, init=False)

    @property
    def kind(self) -> str:
        """``conv2d``, ``conv_transpose1d``, ..."""
        return f"{'conv_transpose' if self.transposed else 'conv'}{len(self.stride)}d"

    @property
    def geometry(self) -> integer.Geometry:
        """Without the output padding, which the shape of the result says."""
        return integer.Geometry(
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            transposed=self.transposed,
        )

    def _arguments(self) -> tuple[Any, ...]:
        output_padding = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """``(B, channels, *size)``.

        Raises:
            RuntimeError: axes or channels that do not fit, or a kernel that is empty or larger than the padded input.
        """
        if not (len(x) == len(w) == len(self.stride) + 2 and w[0] % self.groups == 0 and min(w[2:]) > 0):
            raise RuntimeError(
                f"{self.kind} in {self.groups} groups cannot multiply shapes {tuple(x)} of the input and {tuple(w)} of "
                "the weight"
            )
        wanted = w[0] if self.transposed else w[1] * self.groups
        sizes = []
        padding = self.output_padding or (0,) * len(self.stride)
        for i, (size, kernel) in enumerate(zip(x[2:], w[2:], strict=True)):
            reach = self.dilation[i] * (kernel - 1)
            if self.transposed:
                sizes.append((size - 1) * self.stride[i] - 2 * self.padding[i] + reach + padding[i] + 1)
            else:
                sizes.append((size + 2 * self.padding[i] - reach - 1) // self.stride[i] + 1)
        # As torch does: a batch may be empty, an axis of samples that are there may not; a transposed result may be.
        hollow = 0 in x[2:] and 0 not in x[:2]
        if x[1] != wanted or hollow or min(sizes) < (0 if self.transposed else 1):
            raise RuntimeError(
                f"{self.kind} cannot multiply shapes {tuple(x)} of the input and {tuple(w)} of the weight: it takes "
                f"{wanted} channels and sizes that its kernel fits into"
            )
        return torch.Size((x[0], self.bias_length(w), *sizes))

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:
        """Channels last where the input or the weight is."""
        return strides.of_convolution(shape, x, w)

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """The convolution."""
        y: Tensor = torch.ops.aten.convolution(x, w, None, *self._arguments())
        return y

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, w, None, *self._arguments(), mask
        )
        return grads

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input; only its shape is needed, so an untouched tensor stands for it."""
        return self._backward(g, g.new_empty(shape), w, [True, False, False])[0]

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the weight; only its shape is needed, so an untouched tensor stands for it."""
        return self._backward(g, x, g.new_empty(shape), [False, True, False])[1]

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum over batch and positions."""
        return g.sum((0, *range(2, g.dim())))

    def kernel(self, product: str) -> str:
        """`aten::convolution` forward, `aten::convolution_backward` backward."""
        return "aten::convolution" if product == "output" else "aten::convolution_backward"

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:
        """Positions of the smaller side times one kernel; taps that fall on the padding count too."""
        return (x if self.transposed else y).numel() * math.prod(w[1:])

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:
        """Channels split into (group, channel in group); the weight is (group, its first axis, its second, *kernel)."""
        split = 0 if operand == "weight" else 1
        return (*shape[:split], self.groups, shape[split] // self.groups, *shape[split + 1 :])

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:
        """Channels of one side within a group with the window, or batch and positions."""
        positions = range(3, dim)
        if operand != "weight":
            return (0, *positions) if product == "grad_weight" else (2, *positions)
        input_channels = 1 if self.transposed else 2
        return (input_channels if product == "output" else 3 - input_channels, *positions)

    def output_channels(self, dim: int) -> tuple[int, ...]:  # noqa: ARG002 - the same for every dimension
        """Group and output channel in the group."""
        return (0, 2) if self.transposed else (0, 1)

    def bias_length(self, w: torch.Size) -> int:
        """O."""
        return w[1] * self.groups if self.transposed else w[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """A choice of bits for each sample, the first axis of the input.

    Args:
        choice: int64 ``(B,)``, the index of each sample's choice.
        bits: for each choice the widths of all operands, int64 ``(6,)`` as in `Setting.bits`; None for a choice that
            no sample here has.
        mask: float ``(B, K)``, one-hot, whose gradient tells what each choice would have changed; None where nobody
            asks.
    """

    choice: Tensor
    bits: tuple[Tensor | None, ...]
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the products of one call are to be computed.

    Args:
        recipe: the formats.
        noise: where noise comes from; needed where a format rounds stochastically.
        bits: the width of each operand in the order of `recipe.SLOTS`, int64 ``(6,)``, a tensor so that a change
            never recompiles; None: the recipe's own. Float formats have the width they have.
        input_range: lo and hi for `input` where its format keeps a running range; None: of the batch.
        layer: name for reports and errors.
        engine: how products are executed, one of `ENGINES`.
        source: what calls, for observers.
        samples: bits that differ between samples, in place of `bits`.
    """

    recipe: Recipe
    noise: Noise | None = None
    bits: Tensor | None = None
    input_range: tuple[Tensor, Tensor] | None = None
    layer: str = ""
    engine: str = "reference"
    source: object = None
    samples: Samples | None = None

    def format(self, product: str, operand: str) -> Format:
        """The format of one operand of one product."""
        fmt: Format = getattr(getattr(self.recipe, product), operand)
        return fmt

    def width(self, product: str, operand: str) -> Tensor | None:
        """The bits of one operand as a scalar tensor, where they are set apart from the recipe.

        An operand with the same format in several products has the same width in them: that of the first.
        """
        return None if self.bits is None else self.bits[slot_of(self.recipe, product, operand)]

    @property
    def widths(self) -> tuple[int, ...] | None:
        """`bits` as numbers, read anew: they may change in place."""
        return None if self.bits is None else tuple(self.bits.tolist())


@lru_cache(maxsize=4096)
def slot_of(recipe: Recipe, product: str, operand: str) -> int:
    """Where the width of an operand stands: in the first slot that has the same operand in the same format."""
    formats = {(p, o): fmt for p, o, fmt in recipe.operands()}
    return next(i for i, slot in enumerate(SLOTS) if slot[1] == operand and formats[slot] == formats[product, operand])


@dataclass(frozen=True, kw_only=True)
class OperandRun:
    """One operand of one product as it ran: its values before and after quantisation.

    Args:
        format: its format.
        bits: its width.
        exact: the values before.
        quantized: the values after: those of the codes that were multiplied.
        view: a shape with the same elements in the same order, in which `dims` are meant.
        dims: the dims of the view that share a scale; None for blocks.
        grid: where its codes lie; None for a float format.
    """

    format: Format
    bits: int
    exact: Tensor
    quantized: Tensor
    view: tuple[int, ...]
    dims: tuple[int, ...] | None
    grid: Grid | None = None

    @property
    def applied(self) -> Format:
        """The format as this shape made it: where samples have too few values for their own extremes, without them."""
        return self.format.of_samples(math.prod(self.view[1:])) if isinstance(self.format, Integer) else self.format

    @property
    def clipped(self) -> float:
        """The share of values more than half a step outside the grid; measured when it is asked for."""
        return 0.0 if self.grid is None else self.grid.clipped(self.exact)

    @property
    def floored(self) -> float:
        """The share of values whose scale is the floor of the format; measured when it is asked for."""
        return 0.0 if self.grid is None else self.grid.floored(self.exact)


@dataclass(frozen=True, kw_only=True)
class ProductRun:
    """One product as it ran, for an observer.

    Args:
        source: what ran it, the layer's site; None for a call of a function of this module.
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kind: what was computed, e.g. ``"conv2d"``.
        engine: how it was executed.
        kernel: the operator that executed it.
        macs: multiply-accumulates.
        operands: by name.
        result: the product.
        full_precision: computes the product of the operands before quantisation.
        expected: the products of the backward that are due after this one.
    """

    source: object
    layer: str
    product: str
    kind: str
    engine: str
    kernel: str
    macs: int
    operands: dict[str, OperandRun]
    result: Tensor
    full_precision: Callable[[], Tensor]
    expected: tuple[str, ...]


class Observer(Protocol):
    """What wants to see every product, e.g. `lowbit.verify`."""

    def __call__(self, run: ProductRun) -> None:
        """Take note of one product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductCall:
    """One product that ran, by its shapes: what a meter counts.

    It costs a few microseconds, where an observer's `ProductRun` costs a measurement of every operand.

    Args:
        source: what ran it, the layer's site; None for a call of a function of this module.
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kind: what was computed, e.g. ``"conv2d"``.
        engine: how it was executed.
        bits: the widths of its two operands, in the order of `lowbit.recipe.SLOTS`.
        op: the operator, for its `macs`.
        input: shape of the layer's input.
        weight: shape of its weight.
        output: shape of its output.
    """

    source: object
    layer: str
    product: str
    kind: str
    engine: str
    bits: tuple[int, int]
    op: Op
    input: torch.Size
    weight: torch.Size
    output: torch.Size

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.op.macs(self.input, self.weight, self.output)


Counter = Callable[[ProductCall], None]

_observers: list[Observer] = []
_counters: list[Counter] = []
_thread = threading.local()


@contextmanager
def counted_by(counter: Counter) -> Iterator[None]:
    """Call `counter` with every product that runs in this context, forward and backward."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.remove(counter)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Call `observer` with every product that runs in this context, forward and backward."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def is_observed() -> bool:
    """Whether anybody watches, so that what costs time to show is worth showing. No product runs otherwise for it."""
    return bool(_observers)


def notify(run: ProductRun) -> None:
    """Show a run to every observer; those of other models ignore it."""
    for observer in tuple(_observers):  # another thread may come or go meanwhile
        observer(run)


@contextmanager
def inside() -> Iterator[None]:
    """Mark operators that this thread dispatches in this context as part of a converted layer's products."""
    depth = getattr(_thread, "depth", 0)
    _thread.depth = depth + 1
    try:
        yield
    finally:
        _thread.depth = depth


def is_inside() -> bool:
    """Whether this thread computes a converted layer's product now."""
    return getattr(_thread, "depth", 0) > 0


@lru_cache(maxsize=4096)
def scale_sharing(
    op: Op, product: str, operand: str, fmt: Format, shape: torch.Size
) -> tuple[tuple[int, ...], Any, Any]:
    """What shares a scale in one operand: its shape as a view, the dims that share, and the axis blocks lie along.

    Returns:
        (view shape, dims, block axis or None); the view has the elements of `shape` in the same order.
    """
    if not isinstance(fmt, Integer) or fmt.granularity == "tensor":
        return tuple(shape), tuple(range(len(shape))), None
    if fmt.granularity == "sample":
        return tuple(shape), tuple(range(1, len(shape))), None
    view = op.view(operand, shape)
    dim = len(view)
    summed = op.summed(product, operand, dim)
    if fmt.granularity == "block":
        return view, (), summed[0]
    if fmt.granularity == "row":
        return view, (dim - 1,) if op.has_rows else tuple(range(dim)), None
    if fmt.granularity == "kept-channel":
        return view, summed, None
    return view, tuple(d for d in range(dim) if d not in op.output_channels(dim)), None


def quantize_operand(x: Tensor, op: Op, setting: Setting, product: str, operand: str) -> Quantized:
    """Quantise one operand of one product as the recipe says.

    Args:
        x: float32 or float64 in the operand's own shape.
        op: the operator.
        setting: formats, noise and range.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        operand: ``"input"``, ``"weight"`` or ``"grad_output"``.
    """
    fmt = setting.format(product, operand)
    if x.is_meta:  # shapes without values, as when a run is planned
        return Quantized(x if fmt == FP32 else torch.empty_like(x))
    if not isinstance(fmt, Integer):
        return quantize(x, fmt)
    noise = None
    if fmt.stochastic:
        noise = field_of(_noise(op, setting, product, operand), product, operand, x)
    bits = setting.width(product, operand)
    view, dims, block_axis = scale_sharing(op, product, operand, fmt, x.shape)
    return quantize(
        x,
        fmt,
        view=view,
        dims=dims,
        block_axis=block_axis,
        levels=None if bits is None else levels_of(fmt, bits),
        noise=noise,
        observed=setting.input_range if operand == "input" and fmt.running is not None else None,
    )


def _noise(op: Op, setting: Setting, product: str, operand: str) -> Noise:
    """Where the noise of an operand that rounds stochastically comes from."""
    if setting.noise is None:
        raise ValueError(f"{setting.layer or op.kind}: {operand} in {product} rounds stochastically and got no noise")
    return setting.noise


@lru_cache(maxsize=4096)
def _shares(op: Op, recipe: Recipe, operand: str, shape: torch.Size, first: str, second: str) -> bool:
    """Whether an operand has the same codes in two products, so that it is quantised once for both."""
    formats: list[Format] = [getattr(getattr(recipe, product), operand) for product in (first, second)]
    return formats[0] == formats[1] and (
        scale_sharing(op, first, operand, formats[0], shape) == scale_sharing(op, second, operand, formats[1], shape)
    )


def refusal(op: Op, recipe: Recipe, bits: Sequence[int] | None = None, dim: int = 2, *, on_cuda: bool = False) -> str:
    """Why the int8 engine cannot run the three products of an operator; empty where it can.

    Args:
        op: the operator.
        recipe: the formats.
        bits: widths in the order of `SLOTS`; None: the recipe's own.
        dim: axes of its tensors.
        on_cuda: whether they lie on a GPU.
    """
    if isinstance(op, Matmul):
        return "a product of two activations has no integer kernel here"
    if on_cuda and op.geometry is not None:
        return "a convolution has no int8 engine on cuda, only linear layers have"
    widths = dict(zip(SLOTS, bits, strict=True)) if bits is not None else {}
    for product in ("output", "grad_input", "grad_weight"):
        formats, kept = [], []
        for slot in (slot for slot in SLOTS if slot[0] == product):
            fmt: Format = getattr(getattr(recipe, product), slot[1])
            if isinstance(fmt, Integer) and slot in widths:
                fmt = replace(fmt, bits=widths[slot])
            formats.append(fmt)
            kept.append(_is_kept(op, product, slot[1], fmt, dim))
        why = integer.refusal((formats[0], formats[1]), (kept[0], kept[1]), on_cuda=on_cuda)
        if why:
            return f"{product}: {why}"
    return ""


def _is_kept(op: Op, product: str, operand: str, fmt: Format, dim: int) -> bool:
    """Whether every axis with scales of its own is one that the product keeps."""
    if not isinstance(fmt, Integer) or fmt.granularity == "tensor":
        return True
    if fmt.granularity == "block" or (fmt.granularity == "sample" and product == "grad_weight"):
        return False
    if fmt.granularity == "sample":
        return dim > 2
    view, dims, _ = scale_sharing(op, product, operand, fmt, torch.Size((op_groups(op) * 2,) * dim))
    return set(op.summed(product, operand, len(view))) <= set(dims)


def op_groups(op: Op) -> int:
    """Groups of a convolution, 1 for a matrix product."""
    return 1 if op.geometry is None else op.geometry.groups


@lru_cache(maxsize=4096)
def _refusal(op: Op, recipe: Recipe, bits: tuple[int, ...] | None, dim: int, on_cuda: bool) -> str:
    """`refusal`, found once."""
    return refusal(op, recipe, bits, dim, on_cuda=on_cuda)


@cache
def _warn_once_on_cuda(recipe: str, why: str) -> None:
    """Say once that layers converted for the int8 engine and moved to a GPU run on the reference engine there."""
    warnings.warn(
        f"recipe {recipe!r} runs on the reference engine on cuda: {why}. The reference engine simulates low precision "
        "and is slower than fp32. Convert with engine='reference' where that is meant",
        RuntimeWarning,
        stacklevel=3,
    )


def runs_integer(x: Tensor, w: Tensor, dtype: torch.dtype, op: Op, setting: Setting) -> bool:
    """Whether this call runs on the int8 engine: it was chosen, and the bits and dtypes of the moment fit its units.

    Raises:
        UsageError: it was chosen and cannot run this recipe at any bits.
    """
    if setting.engine != "int8":
        return False
    on_cuda = cuda.runs(x)
    why = _refusal(op, setting.recipe, None if setting.bits is None else (8,) * len(SLOTS), w.dim(), on_cuda)
    if why and on_cuda:  # the engine was chosen where the layer was before it moved
        _warn_once_on_cuda(setting.recipe.name, why)
        return False
    if why:
        raise UsageError(
            f"{setting.layer or op.kind}: the int8 engine cannot run recipe {setting.recipe.name!r}: {why}. Choose "
            "engine='reference'"
        )
    if not (on_cuda or x.device.type == "cpu") or not all(
        t in (torch.float32, torch.bfloat16) for t in (x.dtype, w.dtype, dtype)
    ):
        return False
    widths = setting.widths
    return widths is None or _fits(setting.recipe, widths)


@lru_cache(maxsize=4096)
def _fits(recipe: Recipe, widths: tuple[int, ...]) -> bool:
    """Whether all codes of these widths fit in a byte."""
    return all(
        bits <= 8 or not isinstance(fmt, Integer) for (*_, fmt), bits in zip(recipe.operands(), widths, strict=True)
    )


def _encoded(x: Tensor, op: Op, setting: Setting, product: str, operand: str) -> integer.Operand:
    """One operand of one product for the int8 engine."""
    fmt = setting.format(product, operand)
    layout: integer.Layout = "activation" if operand != "weight" else "weight"
    layout = "matrix" if op.geometry is None else layout
    if not isinstance(fmt, Integer):
        return integer.encode_operand(x, fmt, layout=layout, sharing=((), ()), levels=0.0, key=None, observed=None)
    view, dims, _ = scale_sharing(op, product, operand, fmt, x.shape)
    levels = float(2 ** (bits_of(setting, product, operand) - (fmt.zero == "symmetric")) - 1)
    observed = setting.input_range if operand == "input" and fmt.running is not None else None
    if cuda.runs(x):
        return integer.encode_by_torch(
            x,
            fmt,
            layout=layout,
            sharing=(view, dims),
            levels=levels,
            noise=_noise(op, setting, product, operand).draw(product, operand, x) if fmt.stochastic else None,
            observed=observed,
        )
    key = None
    if fmt.stochastic:
        key = None if setting.noise is None else setting.noise.words(product, operand)
        if key is None:
            raise ValueError(
                f"{setting.layer or op.kind}: {operand} in {product} rounds stochastically and got no counter-based "
                "noise, which the int8 engine needs: use the reference engine with recorded noise"
            )
    return integer.encode_operand(
        x, fmt, layout=layout, sharing=(view, dims), levels=levels, key=key, observed=observed
    )


@dataclass(frozen=True, kw_only=True)
class _KeptCodes:
    """What the forward of the int8 engine keeps for the backward beside tensors."""

    op: Op
    setting: Setting
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]
    x: integer.Operand | None
    w: integer.Operand | None
    x_shape: torch.Size
    w_shape: torch.Size
    w_channels_last: bool
    exact: tuple[Tensor, Tensor] | None


def _integer_outputs(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    op: Op,
    setting: Setting,
    dtype: torch.dtype,
    expected: tuple[str, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], _KeptCodes]:
    """`outputs` on the int8 engine: what it keeps are codes, whose numbers stand apart."""
    shape = op.output_shape(x.shape, w.shape)
    if not shape.numel():  # torch refuses some results without places, by the number of samples and of threads
        op.output(x.detach().to(dtype), w.detach().to(dtype))
    x_codes = _encoded(x, op, setting, "output", "input")
    w_codes = _encoded(w, op, setting, "output", "weight")
    b_hat = None if bias is None else quantize(bias.detach().float(), setting.recipe.bias).values.contiguous()
    y = _run_integer(
        op,
        setting,
        "output",
        {"input": (x, x_codes), "weight": (w, w_codes)},
        lambda: integer.output(x_codes, w_codes, op.geometry, shape, b_hat, dtype),
        op.output,
        (x.shape, w.shape, shape),
        expected,
        b_hat,
    )
    kept_x: integer.Operand | None = None
    if needs[1]:
        shared = _shares(op, setting.recipe, "input", x.shape, "output", "grad_weight")
        kept_x = x_codes if shared else _encoded(x, op, setting, "grad_weight", "input")
    shares_w = _shares(op, setting.recipe, "weight", w.shape, "output", "grad_input")
    kept_w = w_codes if needs[0] and shares_w else None
    kept = _KeptCodes(
        op=op,
        setting=setting,
        dtypes=(x.dtype, w.dtype, None if bias is None else bias.dtype),
        x=kept_x and kept_x.holding(_NOTHING),
        w=kept_w and kept_w.holding(_NOTHING),
        x_shape=x.shape,
        w_shape=w.shape,
        w_channels_last=cpu.is_channels_last(w),
        exact=_as_now(x, w),
    )
    return y, (None if kept_x is None else kept_x.q, None if kept_w is None else kept_w.q), kept


def _as_now(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor] | None:
    """Operands as the backward shows them to observers, whatever is done to them in place until then."""
    return (x.detach().clone(), w.detach().clone()) if _observers else None


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def _integer_gradients(
    g: Tensor,
    w: Tensor | None,
    numbers: tuple[Tensor | None, Tensor | None],
    kept: _KeptCodes,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`gradients` on the int8 engine; `numbers` are those of the kept codes."""
    op, setting = kept.op, kept.setting
    shapes = (kept.x_shape, kept.w_shape, g.shape)
    grad_input = grad_weight = None
    g_codes: integer.Operand | None = None
    if needs[0] and w is not None:
        g_in = g_codes = _encoded(g, op, setting, "grad_input", "grad_output")
        if kept.w is not None and numbers[1] is not None:
            w_codes = kept.w.holding(numbers[1])
        else:
            w_codes = _encoded(w, op, setting, "grad_input", "weight")
        grad_input = _run_integer(
            op,
            setting,
            "grad_input",
            {"grad_output": (g, g_in), "weight": (w, w_codes)},
            lambda: integer.grad_input(g_in, w_codes, op.geometry, kept.x_shape, kept.dtypes[0]),
            lambda a, b: op.grad_input(a, b, kept.x_shape),
            shapes,
        )
    if needs[1] and kept.x is not None and numbers[0] is not None:
        if g_codes is None or not _shares(op, setting.recipe, "grad_output", g.shape, "grad_input", "grad_weight"):
            g_codes = _encoded(g, op, setting, "grad_weight", "grad_output")
        x_codes, g_out = kept.x.holding(numbers[0]), g_codes
        grad_weight = _run_integer(
            op,
            setting,
            "grad_weight",
            {"grad_output": (g, g_out), "input": (None if kept.exact is None else kept.exact[0], x_codes)},
            lambda: integer.grad_weight(
                g_out, x_codes, op.geometry, kept.w_shape, kept.dtypes[1], ordered=kept.w_channels_last
            ),
            lambda a, b: op.grad_weight(a, b, kept.w_shape),
            shapes,
        )
    grad_bias = integer.grad_bias(g, op.geometry).to(kept.dtypes[2]) if needs[2] else None
    return grad_input, grad_weight, grad_bias


def _run_integer(
    op: Op,
    setting: Setting,
    product: str,
    operands: dict[str, tuple[Tensor | None, integer.Operand]],
    multiply: Callable[[], Tensor],
    in_full: Callable[[Tensor, Tensor], Tensor],
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    expected: tuple[str, ...] = (),
    bias: Tensor | None = None,
) -> Tensor:
    """Execute one product on the int8 engine and show it, without the bias, to counters and observers.

    An operand that was not kept as it was before its codes is shown as its codes' values.
    """
    first, second = operands
    with inside():
        result = multiply()
        codes = all(isinstance(o, integer.Codes) for _, o in operands.values())
        engine = "int8" if codes else "bf16"
        if _counters:
            _count(op, setting, product, engine, (first, second), shapes)
        if _observers:
            shown = {}
            for name, (x, codes_of) in operands.items():
                hat = _shown(codes_of, op, setting, product, name)
                shown[name] = (hat.values if x is None else x.float(), hat)
            exact = [x for x, _ in shown.values()]
            plain = result.float()
            if bias is not None:
                plain = plain - (bias if op.has_rows else bias.reshape(-1, *[1] * (plain.dim() - 2)))
            notify(
                ProductRun(
                    source=setting.source,
                    layer=setting.layer,
                    product=product,
                    kind=op.kind,
                    engine=engine,
                    kernel=integer.kernel(*(o for _, o in operands.values())),
                    macs=op.macs(*shapes),
                    operands={n: _operand_run(op, setting, product, n, x, hat) for n, (x, hat) in shown.items()},
                    result=plain,
                    full_precision=lambda: in_full(exact[0], exact[1]),
                    expected=expected,
                )
            )
    return result


def _shown(hat: integer.Operand, op: Op, setting: Setting, product: str, operand: str) -> Quantized:
    """The values that the product saw and their grid, for an observer."""
    fmt = setting.format(product, operand)
    view, dims, _ = scale_sharing(op, product, operand, fmt, hat.shape)
    values = hat.values((view, dims))
    if not isinstance(fmt, Integer) or isinstance(hat, integer.Values):
        return Quantized(values)
    symmetric = fmt.zero == "symmetric"
    levels = float(2 ** (bits_of(setting, product, operand) - symmetric) - 1)
    one = hat.scale.numel() == 1
    scale = hat.scale.view([1 if one or d in dims else n for d, n in enumerate(view)])
    low = -levels if symmetric else 0.0
    grid = Grid(view=view, scale=scale, zero=hat.zero, offset=None, low=low, high=levels, floor=fmt.floor)
    return Quantized(values, grid)


def _count(
    op: Op,
    setting: Setting,
    product: str,
    engine: str,
    names: tuple[str, str],
    shapes: tuple[torch.Size, torch.Size, torch.Size],
) -> None:
    """Show the shapes of a product to every counter."""
    call = ProductCall(
        source=setting.source,
        layer=setting.layer,
        product=product,
        kind=op.kind,
        engine=engine,
        bits=(bits_of(setting, product, names[0]), bits_of(setting, product, names[1])),
        op=op,
        input=shapes[0],
        weight=shapes[1],
        output=shapes[2],
    )
    for counter in tuple(_counters):
        counter(call)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the forward keeps for the backward beside tensors."""

    op: Op
    setting: Setting
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]
    input_shape: torch.Size
    weight_shape: torch.Size
    weight_is_quantized: bool
    exact: tuple[Tensor, Tensor] | None
    quantized: dict[str, Quantized]


def _compute(x: Tensor) -> Tensor:
    """The dtype that products are computed in: float32 for the 16-bit types, else the tensor's own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def outputs(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    op: Op,
    setting: Setting,
    expected: tuple[str, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], _Kept]:
    """The output with its bias, and what the backward needs: (input, weight) and plain values.

    Codes that a product of the backward shares with the forward are made once, here; a weight that is not shared is
    kept as it is and quantised in the backward.
    """
    op.output_shape(x.shape, w.shape)  # refuses before anything runs
    exact_x, exact_w = _compute(x), _compute(w)
    x_hat = quantize_operand(exact_x, op, setting, "output", "input")
    w_hat = quantize_operand(exact_w, op, setting, "output", "weight")
    operands = {"input": (exact_x, x_hat), "weight": (exact_w, w_hat)}
    y = _run(op, setting, "output", operands, op.output, (x.shape, w.shape, None), expected)
    if bias is not None:
        b_hat = quantize(_compute(bias.detach()), setting.recipe.bias).values
        y = y + (b_hat if op.has_rows else b_hat.reshape(-1, *[1] * (y.dim() - 2)))
    if needs[1] and not _shares(op, setting.recipe, "input", x.shape, "output", "grad_weight"):
        x_hat = quantize_operand(exact_x, op, setting, "grad_weight", "input")
    weight_is_shared = _shares(op, setting.recipe, "weight", w.shape, "output", "grad_input")
    saved_weight = w_hat.values if weight_is_shared else w
    kept = _Kept(
        op=op,
        setting=setting,
        dtypes=(x.dtype, w.dtype, None if bias is None else bias.dtype),
        input_shape=x.shape,
        weight_shape=w.shape,
        weight_is_quantized=weight_is_shared,
        exact=_as_now(exact_x, exact_w),
        quantized={"input": x_hat, "weight": w_hat} if _observers else {},
    )
    return y, (x_hat.values if needs[1] else None, saved_weight if needs[0] else None), kept


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        op: Op,
        setting: Setting,
        dtype: torch.dtype,
        expected: tuple[str, ...],
    ) -> Tensor:
        needs = ctx.needs_input_grad[:2]
        if runs_integer(x, w, dtype, op, setting):
            y, numbers, ctx.kept = _integer_outputs(x, w, bias, op, setting, dtype, expected, needs)
            # Codes are saved as tensors, so that they go as soon as the backward has used them.
            ctx.save_for_backward(w if needs[0] else None, *numbers)
            return strides.laid_out(y, op.output_strides(y.shape, x, w))
        y, saved, ctx.kept = outputs(x, w, bias, op, setting, expected, needs)
        ctx.save_for_backward(*saved)
        return strides.laid_out(y.to(dtype), op.output_strides(y.shape, x, w))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept: _Kept | _KeptCodes = ctx.kept
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{kept.setting.layer or kept.op.kind}: create_graph=True asks for a second derivative, and quantised "
                "products have none: rounding is differentiated once, straight through. Call backward without "
                "create_graph, or restore_ this layer"
            )
        grad_output = cpu.in_memory(grad_output)
        if isinstance(kept, _KeptCodes):
            w, *numbers = ctx.saved_tensors
            with torch.autocast(autocast_device(grad_output), enabled=False):
                grads = _integer_gradients(grad_output, w, (numbers[0], numbers[1]), kept, ctx.needs_input_grad[:3])
            return (*grads, None, None, None, None)
        x_hat, w = ctx.saved_tensors
        with torch.autocast(autocast_device(grad_output), enabled=False):
            grads = gradients(_compute(grad_output), x_hat, w, kept, ctx.needs_input_grad[:3])
        return (*grads, None, None, None, None)


def gradients(
    g: Tensor, x_hat: Tensor | None, w: Tensor | None, kept: _Kept, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_input, grad_weight and grad_bias, each None where it is not needed."""
    op, setting = kept.op, kept.setting
    grad_input = grad_weight = None
    g_hat: Quantized | None = None
    if needs[0] and w is not None:
        g_hat = quantize_operand(g, op, setting, "grad_input", "grad_output")
        exact_w = w if kept.exact is None else kept.exact[1]
        if kept.weight_is_quantized:
            w_hat = kept.quantized.get("weight", Quantized(w))
        else:
            w_hat = quantize_operand(_compute(w), op, setting, "grad_input", "weight")
        grad_input = _run(
            op,
            setting,
            "grad_input",
            {"grad_output": (g, g_hat), "weight": (exact_w, w_hat)},
            lambda a, b: op.grad_input(a, b, kept.input_shape),
            (kept.input_shape, kept.weight_shape, g.shape),
        ).to(kept.dtypes[0])
    if needs[1] and x_hat is not None:
        if g_hat is None or not _shares(op, setting.recipe, "grad_output", g.shape, "grad_input", "grad_weight"):
            g_hat = quantize_operand(g, op, setting, "grad_weight", "grad_output")
        exact_x = x_hat if kept.exact is None else kept.exact[0]
        grad_weight = _run(
            op,
            setting,
            "grad_weight",
            {"grad_output": (g, g_hat), "input": (exact_x, kept.quantized.get("input", Quantized(x_hat)))},
            lambda a, b: op.grad_weight(a, b, kept.weight_shape),
            (kept.input_shape, kept.weight_shape, g.shape),
        ).to(kept.dtypes[1])
    grad_bias = op.grad_bias(g).to(kept.dtypes[2]) if needs[2] else None
    return grad_input, grad_weight, grad_bias


def _run(
    op: Op,
    setting: Setting,
    product: str,
    operands: dict[str, tuple[Tensor, Quantized]],
    multiply: Callable[[Tensor, Tensor], Tensor],
    shapes: tuple[torch.Size, torch.Size, torch.Size | None],
    expected: tuple[str, ...] = (),
) -> Tensor:
    """Execute one product on its two operands and show it to counters and observers.

    `shapes` are those of input, weight and output; None for the output that this product makes.
    """
    (exact_a, a), (exact_b, b) = operands.values()
    with inside():
        result = multiply(a.values, b.values)
        x_shape, w_shape, y_shape = shapes[0], shapes[1], shapes[2] or result.shape
        if _counters:
            first, second = operands
            _count(op, setting, product, "reference", (first, second), (x_shape, w_shape, y_shape))
        if _observers:
            run = ProductRun(
                source=setting.source,
                layer=setting.layer,
                product=product,
                kind=op.kind,
                engine="reference",
                kernel=op.kernel(product),
                macs=op.macs(x_shape, w_shape, y_shape),
                operands={
                    name: _operand_run(op, setting, product, name, exact, hat)
                    for name, (exact, hat) in operands.items()
                },
                result=result,
                full_precision=lambda: multiply(exact_a, exact_b),
                expected=expected,
            )
            notify(run)
    return result


def _operand_run(op: Op, setting: Setting, product: str, operand: str, exact: Tensor, hat: Quantized) -> OperandRun:
    fmt = setting.format(product, operand)
    view, dims, block_axis = scale_sharing(op, product, operand, fmt, exact.shape)
    return OperandRun(
        format=fmt,
        bits=bits_of(setting, product, operand),
        exact=exact,
        quantized=hat.values,
        view=view,
        dims=dims if block_axis is None else None,
        grid=hat.grid,
    )


def bits_of(setting: Setting, product: str, operand: str) -> int:
    """The width of an operand's codes in this call."""
    fmt = setting.format(product, operand)
    widths = setting.widths
    if widths is None or not isinstance(fmt, Integer):
        return fmt.bits
    return widths[slot_of(setting.recipe, product, operand)]


def autocast_device(x: Tensor) -> str:
    """The device whose autocast counts for `x`; the meta device, where runs are planned, has none of its own."""
    return "cpu" if x.is_meta else x.device.type


def _apply(x: Tensor, w: Tensor, bias: Tensor | None, op: Op, setting: Setting) -> Tensor:
    """Check dtypes and compute outside autocast; the result has autocast's dtype where that is on, else that of `x`."""
    device = autocast_device(x)
    autocast = torch.is_autocast_enabled(device)
    for name, tensor in (("input", x), ("weight", w), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{setting.layer or op.kind}: {name} is {tensor.dtype}: give a floating-point tensor")
        if tensor is not None and tensor.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{setting.layer or op.kind}: input is {x.dtype} and {name} is {tensor.dtype}: give one dtype, or use "
                "autocast"
            )
    x, w, bias = cpu.in_memory(x), cpu.in_memory(w), _fitting(bias, w, op, setting)
    if setting.samples is not None:
        return _by_choice(x, w, bias, op, setting, setting.samples)
    dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    recorded = torch.is_grad_enabled()
    expected = ("grad_input",) * (recorded and x.requires_grad) + ("grad_weight",) * (recorded and w.requires_grad)
    with torch.autocast(device, enabled=False):
        result: Tensor = _Products.apply(x, w, bias, op, setting, dtype, expected)
    return result


def _fitting(bias: Tensor | None, w: Tensor, op: Op, setting: Setting) -> Tensor | None:
    """A bias of one number for each output channel: torch's linear layer repeats one alone, its convolution does not.

    Raises:
        RuntimeError: it has another shape.
    """
    if bias is None:
        return None
    wanted = op.bias_length(w.shape)
    if op.has_rows and bias.dim() <= 1 and bias.numel() == 1:
        bias = bias.expand(wanted)
    if bias.shape != (wanted,):
        raise RuntimeError(
            f"{setting.layer or op.kind}: a bias of shape {tuple(bias.shape)} beside a weight of shape "
            f"{tuple(w.shape)}: give ({wanted},)"
        )
    return cpu.in_memory(bias)


def _by_choice(x: Tensor, w: Tensor, bias: Tensor | None, op: Op, setting: Setting, samples: Samples) -> Tensor:
    """Run the samples of each choice together at its bits; what no sample chose is not executed.

    Since a product works on each sample alone, this equals one product of the mixed input
    ``sum_k mask_k Q_k(x)``, whose gradient for ``mask_k`` is ``<grad_input, Q_k(x)>``.

    Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, section 3.2, mixed as in the authors' ImageNet code.
    """
    if len(samples.choice) != len(x):
        raise ValueError(
            f"{setting.layer or op.kind}: input of shape {tuple(x.shape)} where bits were chosen for "
            f"{len(samples.choice)} samples: inside a gated block the first axis counts samples"
        )
    if samples.mask is not None and samples.mask.requires_grad:
        x = _TellMask.apply(x, samples.mask, op, setting, samples)
    chosen: list[int] = samples.choice.unique().tolist()
    indices = [(samples.choice == k).nonzero().squeeze(1) for k in chosen]
    outputs = []
    for k, index in zip(chosen, indices, strict=True):
        noise = None if setting.noise is None else setting.noise.branch(str(k))
        own = replace(setting, samples=None, bits=samples.bits[k], noise=noise)
        outputs.append(_apply(x if len(chosen) == 1 else x[index], w, bias, op, own))
    if len(outputs) == 1:
        return outputs[0]
    y = torch.cat(outputs)[torch.cat(indices).argsort()]
    return strides.laid_out(y, op.output_strides(y.shape, x, w))


class _TellMask(torch.autograd.Function):
    """The input as it is; the mask receives the gradient that it would have as a factor of each choice's codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, op: Op, setting: Setting, samples: Samples) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.arguments = op, setting, samples.bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mask = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            grad_mask = mask_gradient(_compute(g), _compute(x), *ctx.arguments)
        return g, grad_mask.to(mask.dtype), None, None, None


def mask_gradient(g: Tensor, x: Tensor, op: Op, setting: Setting, bits: Sequence[Tensor | None]) -> Tensor:
    """``<g, Q_k(x)>`` of each sample and choice, ``(B, K)``; choices with equal bits of `input` are quantised once."""
    columns: dict[int | None, Tensor] = {None: g.new_zeros(len(g))}
    widths = [None if b is None else bits_of(replace(setting, bits=b), "output", "input") for b in bits]
    for width, b in zip(widths, bits, strict=True):
        if width not in columns:
            x_hat = quantize_operand(x, op, replace(setting, bits=b, samples=None), "output", "input").values
            columns[width] = (g.flatten(1) * x_hat.flatten(1)).sum(1)
    return torch.stack([columns[width] for width in widths], 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, setting: Setting) -> Tensor:
    """``output (..., N) = input (..., K) weight (N, K)^T + bias (N,)``, forward and backward in the recipe's formats.

    Args:
        x: float ``(..., K)``; leading axes are rows, the first one counts samples.
        weight: ``(N, K)``.
        bias: ``(N,)``.
        setting: recipe, noise, range.

    Returns:
        ``(..., N)``, in the dtype of `x`, or autocast's.

    Raises:
        TypeError: dtypes are not floating point or differ outside autocast.
        RuntimeError: in backward, with ``create_graph=True``.
    """
    if x.dim() == 1:
        return linear(x.unsqueeze(0), weight, bias, setting=setting).squeeze(0)
    return _apply(x, weight, bias, Linear(), setting)


def matmul(x: Tensor, weight: Tensor, *, setting: Setting) -> Tensor:
    """``output (..., M, N) = input (..., M, K) weight (..., K, N)`` with broadcasting, in the recipe's formats.

    Scales per row or channel are apart for each matrix of a batch, in an operand that is broadcast too. Either
    operand may need a gradient. Dtypes and errors as for `linear`; operands need two axes or more.
    """
    if x.dim() < 2 or weight.dim() < 2:
        raise UsageError(f"matmul of shapes {tuple(x.shape)} and {tuple(weight.shape)}: both need two axes or more")
    return _apply(x, weight, None, Matmul(), setting)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    setting: Setting,
) -> Tensor:
    """A convolution of ``x (B, C, *size)`` with ``weight (O, C/groups, *kernel)``, 1 to 3 spatial axes.

    Args:
        x: float ``(B, C, *size)`` or unbatched ``(C, *size)``.
        weight: ``(O, C/groups, *kernel)``.
        bias: ``(O,)``.
        stride: one number per spatial axis.
        dilation: one number per spatial axis.
        padding: one number per spatial axis, or ``"same"`` or ``"valid"``.
        groups: number of groups.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``. Real zeros are added
            after quantisation, also where zero is not on the grid, as in the authors' codes.
        setting: recipe, noise, range.

    Returns:
        ``(B, O, *out)`` or unbatched; dtype and errors as for `linear`.
    """
    axes = weight.dim() - 2
    if x.dim() == axes + 1:
        one = conv(
            x.unsqueeze(0),
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            setting=setting,
        )
        return one.squeeze(0)
    before, after = _padding(padding, weight.shape[2:], dilation)
    if padding_mode != "zeros":
        pairs = [side for b, a in zip(reversed(before), reversed(after), strict=True) for side in (b, a)]
        x, before, after = F.pad(x, pairs, mode=padding_mode), (0,) * axes, (0,) * axes
    op = Convolution(stride=tuple(stride), padding=after, dilation=tuple(dilation), groups=groups)
    y = _apply(x, weight, bias, op, setting)
    for axis, (b, a) in enumerate(zip(before, after, strict=True), start=2):
        if b != a:  # an odd "same" padding, stride 1: one zero too many before, so one output too many
            y = y.narrow(axis, 1, y.shape[axis] - 1)
    return y if before == after else strides.laid_out(y, op.output_strides(y.shape, x, weight))


def _padding(
    padding: Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after, for each spatial axis; "same" puts an odd one after, as torch does."""
    if padding == "valid":
        padding = (0,) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return tuple(int(p) for p in padding), tuple(int(p) for p in padding)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    setting: Setting,
) -> Tensor:
    """A transposed convolution of ``x (B, I, *size)`` with ``weight (I, O/groups, *kernel)``, 1 to 3 spatial axes.

    Arguments, result and errors as for `conv`; `output_padding` is the extra size of one side.
    """
    op = Convolution(
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        transposed=True,
        output_padding=tuple(output_padding),
    )
    if x.dim() == weight.dim() - 1:
        return _apply(x.unsqueeze(0), weight, bias, op, setting).squeeze(0)
    return _apply(x, weight, bias, op, setting)
