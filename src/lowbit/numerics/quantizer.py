"""Quantizers: real tensors to codes with a scale, and back.

Notation: x real value, q code, S scale, z zero point, o offset. Always ``x ~ (q - z) S + o``.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.kernels import cpu
from lowbit.kernels.memory import is_channels_last, memory_view
from lowbit.numerics.element import Steps
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import BF16, FP32, Format, check_defined
from lowbit.numerics.parts import NUMBERS, NUMBERS_OR_NONE, Listed, unlisted
from lowbit.numerics.ranges import extremes
from lowbit.numerics.rounding import uniform_noise
from lowbit.numerics.scales import Float32, MinMax, SampleMean, Scale
from lowbit.numerics.transforms import NoTransform, Place


@dataclass(frozen=True)
class Codes:
    """A quantised tensor: ``x ~ (q - zero) * scale + offset``.

    Args:
        q: codes held in the float dtype of the tensor they came from, any shape.
        steps: where they lie; None if they are the values themselves.
    """

    q: Tensor
    steps: Steps | None

    def dequantize(self) -> Tensor:
        """The real values of the codes, in the dtype of `q`; nan throughout where the scale is not finite."""
        return self.dequantize_into(self.q.clone())

    def dequantize_into(self, q: Tensor) -> Tensor:
        """As `dequantize`, but the result takes the memory of `q`, which holds the codes."""
        if self.steps is None:
            return q
        if self.steps.zero is not None:
            q.sub_(self.steps.zero)
        q.mul_(self.steps.scale)
        return q if self.steps.offset is None else q.add_(self.steps.offset)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What shares a scale in a tensor.

    Args:
        view: the shape that the rest refers to: it has the same elements in the same order.
        dims: the dims that share one scale: of the view, or with blocks of what `cut` gives.
        axis: the axis of the view that the product sums over.
        blocks: axes of the view that are cut into blocks, each with the length of a block, from the last axis back.
    """

    view: tuple[int, ...]
    dims: tuple[int, ...]
    axis: int = -1
    blocks: tuple[tuple[int, int], ...] = ()

    def cut(self, x: Tensor) -> Tensor:
        """A tensor of the view in the shape that scales broadcast against."""
        for axis, size in self.blocks:
            x = _split(x, axis, size)
        return x

    def joined(self, x: Tensor) -> Tensor:
        """A tensor that was cut, in its shape before."""
        for axis, _ in reversed(self.blocks):
            x = _merge(x, axis, self.view[axis])
        return x

    @property
    def place(self) -> Place:
        """Where a transform works."""
        return Place(dims=tuple(axis for axis, _ in self.blocks) or self.dims, axis=self.axis)


def sharing_of(fmt: Format, shape: torch.Size, dims: tuple[int, ...] | None = None, axis: int | None = None) -> Sharing:
    """What shares a scale in a tensor that does not belong to a product.

    Args:
        fmt: the format; `dims` takes the place of its granularity, except for blocks.
        shape: of the tensor.
        dims: the dims that share one scale; None: all. Ignored for blocks, which have their own.
        axis: the axis that blocks or a transform lie along; None: the last one, but an error for blocks.

    Raises:
        ValueError: the axis is missing, given without need, or not one of the tensor's.
    """
    view, dim = tuple(shape), len(shape)
    lies = fmt.granularity == "block" or fmt.transform.along_axis
    if (axis is None and fmt.granularity == "block") or (axis is not None and not lies):
        raise ValueError(f"axis={axis} with {fmt}: an axis goes with blocks or a transform, which lie along it")
    if axis is not None and not -dim <= axis < dim:
        raise ValueError(f"axis={axis} of {view}: give one of its axes")
    at = dim - 1 if axis is None else axis % dim
    dims = tuple(range(dim)) if dims is None else tuple(d % dim for d in dims)
    return blocked(fmt, Sharing(view=view, dims=dims, axis=at))


def blocked(fmt: Format, sharing: Sharing, square: tuple[int, int] | None = None) -> Sharing:
    """The same with the blocks of a format.

    Args:
        fmt: the format.
        sharing: the view and its axis.
        square: the two axes of the view, in order, that square blocks lie along; None: the last two.

    Raises:
        UsageError: square blocks of a tensor that is not a matrix.
    """
    if fmt.scale is None or fmt.scale.block is None:
        return sharing
    size, axis, dim = fmt.scale.block, sharing.axis, len(sharing.view)
    if fmt.granularity == "block":
        return replace(sharing, dims=(axis + 1,), blocks=((axis, size),))
    if dim < 2:
        raise UsageError(f"{fmt}: a tensor of shape {sharing.view} is not a matrix and has no square blocks")
    first, second = square or (dim - 2, dim - 1)
    # Once both are cut, a block lies on the axis after each of them.
    return replace(sharing, dims=(first + 1, second + 2), blocks=((second, size), (first, size)))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the codes of a tensor lie, kept for those who ask afterwards what became of its values.

    Args:
        format: the format.
        sharing: what shares a scale.
        steps: scales and limits.
    """

    format: Format
    sharing: Sharing
    steps: Steps

    def cut(self, x: Tensor) -> Tensor:
        """What was put on the grid for a tensor `x`, in the shape that scales broadcast to."""
        y = self.format.transform.forward(x.reshape(self.sharing.view), self.sharing.place)
        return replace(self.sharing, view=tuple(y.shape)).cut(y)

    def clipped(self, x: Tensor) -> float:
        """The share of `x`, from which the codes were made, that lies more than half a step outside the grid.

        What a rounded scale leaves outside by its definition, as those of the Microscaling formats, does not count.
        """
        if x.numel() == 0:
            return 0.0
        t, steps = self.cut(x), self.steps
        margin: Tensor | float = self.format.element.margin
        if (scale := self.format.scale) is not None:
            beyond = scale.format.reach(steps.high) - steps.high
            margin = torch.clamp(beyond, min=margin) if isinstance(beyond, Tensor) else max(beyond, margin)
        t = (t if steps.offset is None else t - steps.offset) / steps.scale
        t = t if steps.zero is None else t + steps.zero
        return float(((t < steps.low - margin) | (t > steps.high + margin)).float().mean())

    @property
    def two_codes(self) -> float:
        """The share of its blocks that have two codes for each number."""
        high = self.steps.high
        if not self.format.has_two_codes or not isinstance(high, Tensor) or high.numel() == 0:
            return 0.0
        return float((high > high.min()).float().mean())

    def floored(self, x: Tensor) -> float:
        """The share of the values of `x` whose scale is the floor, although they are not all alike.

        Such values need a smaller scale: the floor leaves them fewer codes than the format has.
        """
        scale, floor = self.steps.scale, 0.0 if self.format.scale is None else self.format.scale.floor
        if not floor or x.numel() == 0:
            return 0.0
        t = self.cut(x)
        shared = [d for d in range(t.dim()) if scale.shape[d] == 1]
        if not shared:
            return 0.0
        low = (scale <= floor) & (t.amin(shared, True) < t.amax(shared, True))
        return float(low.expand_as(t).float().mean())


def encode(
    x: Tensor,
    fmt: Format,
    *,
    dims: tuple[int, ...] | None = None,
    levels: Tensor | float | None = None,
    noise: Tensor | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
) -> Codes:
    """Put `x`, as it is after the format's transform, on its grid (see `lowbit.numerics.elements` for the grids).

    Args:
        x: float32 or float64, any shape, even empty.
        fmt: the format; `dims` takes the place of its granularity, except for blocks (see `quantize`).
        dims: the dims that share one scale; None: all.
        levels: the largest code, if bits are not the format's own, e.g. after a schedule changed them; a number or a
            float scalar tensor (so that a change does not recompile).
        noise: uniform draws in [0, 1) of the shape of `x`; needed iff the format rounds stochastically.
        observed: lo and hi to use in place of those of `x`, broadcasting against it.

    Returns:
        Codes. Those of integers have ``|x - x_hat| <= S/2`` (nearest) or ``< S`` (noise) inside [lo, hi], up to float32
        rounding. Zeros give zeros and a constant gives itself. A slice with an inf or nan dequantizes to nan
        throughout.

    Raises:
        TypeError: `x` is not float32 or float64, or the noise is not floating point.
        ValueError: noise is missing, given to a format that rounds to nearest, or of another shape; a block format
            lacks `dims`; levels or a range are given for a format without a scale; `x` requires a gradient.
    """
    check_defined(fmt)
    _check_tensor(x)
    if fmt.stochastic != (noise is not None):
        raise ValueError(f"{fmt}: noise is {'given, but nothing rounds by it' if noise is not None else 'missing'}")
    if noise is not None and (noise.shape != x.shape or not noise.is_floating_point()):
        raise ValueError(f"noise is {noise.dtype} of shape {tuple(noise.shape)}: give floats of shape {tuple(x.shape)}")
    if fmt.scale is None:
        if levels is not None or observed is not None:
            raise ValueError(f"{fmt} takes no levels and no observed range")
        steps = fmt.element.fixed_steps(x)
    else:
        if fmt.scale.block is not None and dims is None:
            raise ValueError("blocks need the dims that share a scale: use `quantize`, which cuts them")
        dims = tuple(range(x.dim())) if dims is None else dims
        lo, hi = observed or extremes(x, rule=fmt.scale.range, dims=dims)
        most = float(fmt.element.code_range[1]) if levels is None else levels
        steps = fmt.element.steps(lo, hi, most, fmt.scale.step)
    q = fmt.element.codes(x, steps, noise if fmt.rounds_codes_by_noise else None)
    return Codes(q, steps if steps is None else fmt.settled(x, q, steps, noise, dims or ()))


def _check_tensor(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cannot quantize {x.dtype}: give float32 or float64")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("quantisation alone has no gradient: give x.detach(), or use lowbit.functional")


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`: the values, and the grid that they lie on; None if they have no limits."""

    values: Tensor
    grid: Grid | None = None


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    sharing: Sharing | None = None,
    dims: tuple[int, ...] | None = None,
    axis: int | None = None,
    levels: Tensor | float | None = None,
    noise: Tensor | tuple[int, int] | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
) -> Quantized:
    """Round `x` to a format: the values that a product sees.

    Args:
        x: float32 or float64, any shape.
        fmt: any format.
        sharing: what shares a scale; None: what `dims` and `axis` say, see `sharing_of`.
        dims: see there.
        axis: see there.
        levels: as for `encode`.
        noise: as for `encode`, or the two words of a noise field of `lowbit.numerics.rounding`, made when needed.
        observed: as for `encode`, broadcasting against the view.

    Returns:
        Values of the shape and dtype of `x`, and their grid.

    Raises:
        TypeError: `x` is not float32 or float64.
        ValueError: noise or axis is missing or given without need; and as for `encode`.
    """
    check_defined(fmt)
    sharing = sharing_of(fmt, x.shape, dims, axis) if sharing is None else sharing
    if observed is not None and sharing.blocks:
        raise ValueError(f"an observed range for {fmt}: every block has its own range, so leave it out")
    if not isinstance(noise, Tensor) and fmt.stochastic == (noise is not None):
        _check_tensor(x)
        found = _natively(x, fmt, sharing, levels, noise, observed)
        if found is not None:
            return found
    if isinstance(noise, tuple):
        noise = uniform_noise(torch.tensor(noise, dtype=torch.int64, device="cpu"), sharing.view, x.device)
    drawn = fmt.drawn(noise)
    if drawn is not fmt and not drawn.stochastic:
        noise = None  # it was for the signs of the transform alone
    fmt = drawn
    original, x = x.shape, x.reshape(sharing.view)
    noise = noise.reshape(sharing.view) if noise is not None and noise.shape == original else noise
    if observed is not None and observed[0].numel() == 1:
        one = (1,) * x.dim()
        observed = (observed[0].reshape(one), observed[1].reshape(one))
    placed, codes = encode_transformed(x, fmt, sharing, levels=levels, noise=noise, observed=observed)
    values = fmt.transform.back(placed.joined(codes.dequantize_into(codes.q)), x, sharing.place).reshape(original)
    return Quantized(values, None if codes.steps is None else Grid(format=fmt, sharing=sharing, steps=codes.steps))


def encode_transformed(
    x: Tensor,
    fmt: Format,
    sharing: Sharing,
    *,
    levels: Tensor | float | None = None,
    noise: Tensor | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Sharing, Codes]:
    """Transform a tensor of the view of `sharing` and put it on its grid.

    Returns:
        What shares a scale in the transform, whose axis may be longer, and the codes, in its cut shape.
    """
    y = fmt.transform.forward(x, sharing.place)
    placed = sharing
    if y.shape != x.shape:
        placed = replace(sharing, view=tuple(y.shape))
        noise = _filled(noise, y.shape) if noise is not None and noise.shape == x.shape else noise
    noise = placed.cut(noise) if noise is not None and noise.shape == y.shape else noise
    return placed, encode(placed.cut(y), fmt, dims=placed.dims, levels=levels, noise=noise, observed=observed)


def _filled(noise: Tensor, shape: torch.Size) -> Tensor:
    """Noise of a longer shape, since a transform also mixes values into the places that it fills.

    These places take the draws from the start of the axis, with the upper and the lower 12 of their 24 bits exchanged.
    They are as uniform, so rounding stays unbiased, and independent of the draws themselves.
    """
    for axis, length in enumerate(shape):
        own = noise.shape[axis]
        if own < length:
            index = torch.arange(length - own, dtype=torch.int64, device=noise.device) % own
            more = 4096 * noise.index_select(axis, index)
            high = more.floor()
            noise = torch.cat([noise, (more - high + high / 2**24) % 1], axis)
    return noise


# The formats that the native passes compute in full; all others are computed by the definition.
_NATIVE: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(1, 33), "zero": ("symmetric", "integer", "offset")},
    Scale: {
        "granularity": ("tensor", "sample", "row", "kept-channel", "output-channel"),
        "running": NUMBERS_OR_NONE,
        "running_start": ("first", "zero"),
        "floor": NUMBERS,
    },
    MinMax: {},
    SampleMean: {"fewest": NUMBERS_OR_NONE},
    Float32: {},
    NoTransform: {},
}


@lru_cache(maxsize=4096)
def _is_native(fmt: Format) -> bool:
    """Whether the native passes compute all of a format."""
    return not unlisted(fmt, _NATIVE)


def _natively(
    x: Tensor,
    fmt: Format,
    sharing: Sharing,
    levels: Tensor | float | None,
    key: tuple[int, int] | None,
    observed: tuple[Tensor, Tensor] | None,
) -> Quantized | None:
    """Values on the grid in one or two passes over memory; None if no such pass takes this tensor."""
    if levels is None and observed is None and fmt in (FP32, BF16):
        return Quantized(x if fmt == FP32 else _round_bf16(x))
    if not cpu.runs(x) or x.dtype != torch.float32 or x.numel() == 0 or not _is_native(fmt):
        return None
    view, dims = sharing.view, sharing.dims
    memory = memory_view(x, view, dims)
    if memory is None or fmt.scale is None or (observed is not None and observed[0].numel() > 1):
        return None
    if observed is not None:
        lo, hi = observed
    elif len(dims) == len(view):
        lo, hi = extremes(x, rule=fmt.scale.range, dims=tuple(range(x.dim())))
    else:
        lo, hi = cpu.extremes(x, memory)
    levels = float(fmt.element.code_range[1]) if levels is None else float(levels)
    flat = fmt.element.steps(lo.reshape(-1), hi.reshape(-1), levels, fmt.scale.step)
    values = cpu.fake_quantize(x, memory, native_grid(flat, key))
    shape = [1 if flat.scale.numel() == 1 or d in dims else n for d, n in enumerate(view)]
    steps = replace(
        flat,
        scale=flat.scale.view(shape),
        zero=flat.zero.view(shape) if isinstance(flat.zero, Tensor) else flat.zero,
        offset=None if flat.offset is None else flat.offset.view(shape),
    )
    return Quantized(values, Grid(format=fmt, sharing=sharing, steps=steps))


def native_grid(steps: Steps, key: tuple[int, int] | None) -> cpu.Grid:
    """Steps as the native passes take them, where `zero` is a tensor or None."""
    zero, offset = steps.zero if isinstance(steps.zero, Tensor) else None, steps.offset
    low, high = float(steps.low), float(steps.high)
    at = zero if offset is None else offset
    return cpu.Grid(scale=steps.scale, zero=at, low=low, high=high, offset=offset is not None, key=key)


def _round_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16 of each number, in the dtype of `x`."""
    if cpu.runs(x) and x.dtype == torch.float32 and (x.is_contiguous() or is_channels_last(x)):
        return cpu.round_bf16(x)
    return x.to(torch.bfloat16).to(x.dtype)


def _split(x: Tensor, axis: int, size: int) -> Tensor:
    """Cut `axis` into blocks of `size` on a new axis after it; a short last block repeats its last value."""
    length = x.shape[axis]
    index = torch.arange(-(-length // size) * size, dtype=torch.int64, device=x.device).clamp(max=max(length - 1, 0))
    return x.index_select(axis, index).unflatten(axis, (-1, size)) if length else x.unsqueeze(axis + 1)


def _merge(x: Tensor, axis: int, length: int) -> Tensor:
    """Undo `_split` of an axis of this length."""
    return x.flatten(axis, axis + 1).narrow(axis, 0, length)
