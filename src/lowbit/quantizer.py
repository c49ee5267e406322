"""Quantizers: real tensors to integer codes with a scale, and back.

Notation: x real value, q code, S scale, z zero point, o offset. Always ``x ~ (q - z) S + o``.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.formats import NUMBERS, NUMBERS_OR_NONE, Float, Format, Integer, Listed, check_defined, unlisted
from lowbit.kernels import cpu, reference
from lowbit.ranges import extremes
from lowbit.rounding import uniform_noise


@dataclass(frozen=True)
class Codes:
    """A quantised tensor: ``x ~ (q - zero) * scale + offset``.

    Args:
        q: whole numbers held in the float dtype of the tensor they came from, any shape.
        scale: broadcasts against `q`; not 0.
        zero: integer zero points held in float, or None for 0.
        offset: float offsets, or None for 0.
        low: the smallest code of the format, a number or a scalar tensor.
        high: the largest code.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    low: Tensor | float
    high: Tensor | float

    def dequantize(self) -> Tensor:
        """The real values of the codes, in the dtype of `q`; nan throughout where the scale is not finite."""
        return self.dequantize_into(self.q.clone())

    def dequantize_into(self, q: Tensor) -> Tensor:
        """As `dequantize`, in the memory of `q`, which holds the codes and is lost."""
        if self.zero is not None:
            q.sub_(self.zero)
        q.mul_(self.scale)
        return q if self.offset is None else q.add_(self.offset)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the codes of a tensor lie, kept for whoever asks afterwards what became of its values.

    Args:
        view: the shape, same elements in the same order, in which scales are meant, before it is cut into blocks.
        scale: broadcasts against the view, or against its blocks.
        zero: integer zero points, or None for 0.
        offset: float offsets, or None for 0.
        low: the smallest code.
        high: the largest code.
        floor: the smallest scale that the format allows; 0 where it has none.
        block: the axis of the view that is cut into blocks, and their size; None without blocks.
    """

    view: tuple[int, ...]
    scale: Tensor
    zero: Tensor | float | None
    offset: Tensor | None
    low: Tensor | float
    high: Tensor | float
    floor: float = 0.0
    block: tuple[int, int] | None = None

    def cut(self, x: Tensor) -> Tensor:
        """`x` in the shape that the scale broadcasts against."""
        x = x.reshape(self.view)
        return x if self.block is None else _split(x, *self.block)

    def clipped(self, x: Tensor) -> float:
        """The share of `x`, the tensor the codes were made of, that lies more than half a step outside the grid."""
        if x.numel() == 0:
            return 0.0
        t = self.cut(x)
        t = (t if self.offset is None else t - self.offset) / self.scale
        t = t if self.zero is None else t + self.zero
        return float(((t < self.low - 0.5) | (t > self.high + 0.5)).float().mean())

    def floored(self, x: Tensor) -> float:
        """The share of the values of `x` whose scale is the floor, although they are not all alike.

        The range of such values asks for a smaller scale: the floor leaves them fewer codes than the format has.
        """
        if not self.floor or x.numel() == 0:
            return 0.0
        t = self.cut(x)
        shared = [d for d in range(t.dim()) if self.scale.shape[d] == 1]
        if not shared:
            return 0.0
        low = (self.scale <= self.floor) & (t.amin(shared, True) < t.amax(shared, True))
        return float(low.expand_as(t).float().mean())


def levels_of(fmt: Integer, bits: Tensor) -> Tensor:
    """The largest code of the format at another width: ``2**bits - 1``, symmetric ``2**(bits-1) - 1``.

    Args:
        fmt: the format, whose own `bits` do not count here.
        bits: int64 scalar tensor.

    Returns:
        float32 scalar tensor.
    """
    width = bits - 1 if fmt.zero == "symmetric" else bits
    return ((1 << width) - 1).float()


def encode(
    x: Tensor,
    fmt: Integer,
    *,
    dims: tuple[int, ...] | None = None,
    levels: Tensor | float | None = None,
    noise: Tensor | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
) -> Codes:
    """Put `x` on the grid of an integer format (see `lowbit.formats.Integer` for the grids).

    Args:
        x: float32 or float64, any shape, also empty.
        fmt: the format; its granularity is what `dims` says here, blocks excepted (see `quantize`).
        dims: the dims that share one scale; None: all.
        levels: the largest code, where bits are not the format's own, e.g. after a schedule changed them;
            a number or a float scalar tensor (so that a change does not recompile).
        noise: uniform draws in [0, 1) of the shape of `x`; needed iff the format rounds stochastically.
        observed: lo and hi to use in place of those of `x`, broadcasting against it.

    Returns:
        Codes with ``|x - x_hat| <= S/2`` (nearest) or ``< S`` (noise) inside [lo, hi], up to float32 rounding.
        Zeros give zeros and a constant gives itself; a slice with an inf or nan dequantizes to nan throughout.

    Raises:
        TypeError: `x` is not float32 or float64, or the noise is not floating point.
        ValueError: noise is missing, given to a format that rounds to nearest, or of another shape; a block format
            without `dims`; `x` would need a gradient.
    """
    check_defined(fmt)
    _check_tensor(x)
    if fmt.stochastic != (noise is not None):
        raise ValueError(f"rounding is {fmt.rounding!r} and noise is {'given' if noise is not None else 'missing'}")
    if noise is not None and (noise.shape != x.shape or not noise.is_floating_point()):
        raise ValueError(f"noise is {noise.dtype} of shape {tuple(noise.shape)}: give floats of shape {tuple(x.shape)}")
    if fmt.block is not None and dims is None:
        raise ValueError("a format in blocks needs the dims that share a scale: use `quantize`, which cuts the blocks")
    dims = tuple(range(x.dim())) if dims is None else dims
    levels = float(fmt.code_range[1]) if levels is None else levels
    lo, hi = observed or extremes(x, rule=fmt.range, dims=dims, fewest=fmt.fewest)
    scale, zero, low, high = grid_of(lo, hi, fmt, levels)
    if fmt.zero == "symmetric":
        return Codes(reference.codes_symmetric(x, scale, levels, noise), scale, None, None, low, high)
    assert zero is not None
    if fmt.zero == "integer":
        return Codes(reference.codes_affine(x, scale, zero, levels, noise), scale, zero, None, low, high)
    return Codes(reference.codes_offset(x, scale, zero, levels, noise), scale, None, zero, low, high)


def grid_of(
    lo: Tensor, hi: Tensor, fmt: Integer, levels: Tensor | float
) -> tuple[Tensor, Tensor | None, Tensor | float, Tensor | float]:
    """The grid of a format over a range: scale, zero point or float offset (None for 0), smallest and largest code.

    Args:
        lo: smallest values, any shape.
        hi: largest values, the same shape.
        fmt: the format.
        levels: the largest code.
    """
    if fmt.zero == "symmetric":
        return reference.scale_of(torch.maximum(-lo, hi), levels, fmt.floor), None, -levels, levels
    if fmt.zero == "integer":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        scale = reference.scale_of(hi - lo, levels, fmt.floor)
        return scale, reference.zero_point(lo, scale, levels), 0.0, levels
    return reference.scale_of(hi - lo, levels, fmt.floor), lo, 0.0, levels


def _check_tensor(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cannot quantize {x.dtype}: give float32 or float64")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("quantisation alone has no gradient: give x.detach(), or use lowbit.products")


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`: the values, and the grid they lie on; None for a float format."""

    values: Tensor
    grid: Grid | None = None


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    view: tuple[int, ...] | None = None,
    dims: tuple[int, ...] | None = None,
    block_axis: int | None = None,
    levels: Tensor | float | None = None,
    noise: Tensor | tuple[int, int] | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
) -> Quantized:
    """Round `x` to a format: the values a product sees.

    Args:
        x: float32 or float64, any shape.
        fmt: any format.
        view: the shape, same elements in the same order, in which dims and axes are meant; None: that of `x`.
        dims: the dims that share one scale; None: all. Ignored for blocks, which have their own.
        block_axis: the axis that blocks lie along; needed iff the granularity is ``"block"``.
        levels: as for `encode`.
        noise: as for `encode`, or the two words of a noise field of `lowbit.rounding`, made as it is needed.
        observed: as for `encode`, broadcasting against the view.

    Returns:
        Values of the shape and dtype of `x`, and their grid.

    Raises:
        TypeError: `x` is not float32 or float64.
        ValueError: noise or block axis is missing or given without need, or as `encode`.
    """
    check_defined(fmt)
    if isinstance(fmt, Float):
        _check_tensor(x)
        if not (noise is None and levels is None and observed is None and block_axis is None):
            raise ValueError(f"{fmt} takes no noise, levels, observed range or block axis")
        return Quantized(x if fmt.name == "fp32" else _round_bf16(x))
    shape = x.shape if view is None else torch.Size(view)
    if (fmt.block is None) != (block_axis is None):
        raise ValueError(f"block_axis={block_axis} with granularity {fmt.granularity!r}")
    if block_axis is not None and not (-len(shape) <= block_axis < len(shape) and observed is None):
        raise ValueError(f"block_axis={block_axis} of {tuple(shape)}, observed={observed}: give an axis and no range")
    if not isinstance(noise, Tensor) and fmt.stochastic == (noise is not None):
        _check_tensor(x)
        axes = tuple(range(len(shape))) if dims is None else tuple(d % len(shape) for d in dims)
        found = _natively(x, fmt, shape, axes, levels, noise, observed)
        if found is not None:
            return found
    if isinstance(noise, tuple):
        noise = uniform_noise(torch.tensor(noise, dtype=torch.int64, device="cpu"), shape, x.device)
    original, x = x.shape, x.reshape(shape)
    noise = noise.reshape(shape) if noise is not None and noise.shape == original else noise
    if observed is not None and observed[0].numel() == 1:
        observed = (observed[0].reshape((1,) * len(shape)), observed[1].reshape((1,) * len(shape)))
    if fmt.block is not None and block_axis is not None:
        x = _split(x, block_axis, fmt.block)
        noise = None if noise is None else _split(noise, block_axis, fmt.block)
        dims = (block_axis % len(shape) + 1,)
    codes = encode(x, fmt, dims=dims, levels=levels, noise=noise, observed=observed)
    values = codes.dequantize_into(codes.q)
    values = values if block_axis is None else _merge(values, block_axis, shape)
    grid = Grid(
        view=tuple(shape),
        scale=codes.scale,
        zero=codes.zero,
        offset=codes.offset,
        low=codes.low,
        high=codes.high,
        floor=fmt.floor,
        block=None if fmt.block is None or block_axis is None else (block_axis, fmt.block),
    )
    return Quantized(values.reshape(original), grid)


def _round_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16 of each number, in the dtype of `x`."""
    if cpu.runs(x) and x.dtype == torch.float32 and (x.is_contiguous() or cpu.is_channels_last(x)):
        return cpu.round_bf16(x)
    return x.to(torch.bfloat16).to(x.dtype)


# The formats that the native passes compute in full; all others are computed by the definition.
_NATIVE: Listed = {
    Integer: {
        "bits": range(1, 33),
        "zero": ("symmetric", "integer", "offset"),
        "granularity": ("tensor", "sample", "row", "kept-channel", "output-channel"),
        "range": ("minmax", "sample-mean"),
        "fewest": NUMBERS_OR_NONE,
        "running": NUMBERS_OR_NONE,
        "running_start": ("first", "zero"),
        "rounding": ("nearest", "stochastic"),
        "floor": NUMBERS,
    }
}


@lru_cache(maxsize=4096)
def _is_native(fmt: Integer) -> bool:
    """Whether the native passes compute all of a format."""
    return not unlisted(fmt, _NATIVE)


def _natively(
    x: Tensor,
    fmt: Integer,
    view: tuple[int, ...],
    dims: tuple[int, ...],
    levels: Tensor | float | None,
    key: tuple[int, int] | None,
    observed: tuple[Tensor, Tensor] | None,
) -> Quantized | None:
    """Values on the grid in two passes over memory; None where the native kernels do not take this tensor."""
    if not cpu.runs(x) or x.dtype != torch.float32 or x.numel() == 0 or not _is_native(fmt):
        return None
    memory = cpu.memory_view(x, view, dims)
    if memory is None or (observed is not None and observed[0].numel() > 1):
        return None
    if observed is not None:
        lo, hi = observed
    elif len(dims) == len(view):
        lo, hi = extremes(x, rule=fmt.range, dims=tuple(range(x.dim())), fewest=fmt.fewest)
    else:
        lo, hi = cpu.extremes(x, memory)
    levels = float(fmt.code_range[1]) if levels is None else float(levels)
    scale, zero, low, high = grid_of(lo.reshape(-1), hi.reshape(-1), fmt, levels)
    offset = fmt.zero == "offset"
    native = cpu.Grid(scale=scale, zero=zero, low=float(low), high=float(high), offset=offset, key=key)
    shared = scale.numel() == 1
    shape = [1 if shared or d in dims else n for d, n in enumerate(view)]
    zero = None if zero is None else zero.view(shape)
    grid = Grid(
        view=tuple(view),
        scale=scale.view(shape),
        zero=None if offset else zero,
        offset=zero if offset else None,
        low=low,
        high=high,
        floor=fmt.floor,
    )
    return Quantized(cpu.fake_quantize(x, memory, native), grid)


def _split(x: Tensor, axis: int, size: int) -> Tensor:
    """Cut `axis` into blocks of `size` on a new axis after it; a short last block repeats its last value."""
    axis %= x.dim()
    length = x.shape[axis]
    index = torch.arange(-(-length // size) * size, dtype=torch.int64, device=x.device).clamp(max=max(length - 1, 0))
    return x.index_select(axis, index).unflatten(axis, (-1, size)) if length else x.unsqueeze(axis + 1)


def _merge(x: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Undo `_split` of a tensor of `shape`."""
    axis %= len(shape)
    return x.flatten(axis, axis + 1).narrow(axis, 0, shape[axis])
