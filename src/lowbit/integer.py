"""The three products of linear layers and convolutions on integer codes, and on bf16 values where a recipe has them.

Notation: x input, w weight, g grad_output; q code, S scale, z zero point; P positions, T taps of a kernel,
C, O input and output channels of one group.

Codes lie in memory as the products read them: activations (rows, channels) or (B, *size, channels), weights
(first axis, T, second axis). A product is one call of `lowbit.kernels.cpu.multiply` for each group.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

from lowbit import strides
from lowbit.errors import UsageError
from lowbit.formats import NUMBERS, NUMBERS_OR_NONE, Float, Format, Integer, Listed, check_defined, unlisted
from lowbit.kernels import cpu, cuda
from lowbit.kernels.cpu import Rows, Window
from lowbit.quantizer import encode
from lowbit.ranges import samples_of

Unit = Literal["int8", "bf16"]
Layout = Literal["matrix", "activation", "weight"]
Sharing = tuple[tuple[int, ...], tuple[int, ...]]  # a view's shape and the dims of it that share a scale

# The formats that this engine computes in full, with the bits of the moment; any other is refused.
_TAKEN: Listed = {
    Float: {"name": ("bf16",)},
    Integer: {
        "bits": range(2, 9),
        "zero": ("symmetric", "integer"),
        "granularity": ("tensor", "sample", "row", "kept-channel", "output-channel"),
        "range": ("minmax", "sample-mean"),
        "fewest": NUMBERS_OR_NONE,
        "running": NUMBERS_OR_NONE,
        "running_start": ("first", "zero"),
        "rounding": ("nearest", "stochastic"),
        "floor": NUMBERS,
    },
}

# The largest distance of a code from the code of zero.
_REACH = {torch.uint8: 255, torch.int8: 127}


@dataclass(frozen=True, kw_only=True)
class Codes:
    """One operand as 8-bit codes: ``x ~ (q - zero) * scale``.

    Args:
        q: uint8 or int8, in the memory order that products read.
        scale: float32, one or one for each row or channel that the product keeps.
        zero: the code of a real zero.
        shape: of the tensor the codes were made of.
        layout: of the memory: as it is (``"matrix"``), (B, *size, C) or (first axis, taps, second axis).
    """

    q: Tensor
    scale: Tensor
    zero: int
    shape: torch.Size
    layout: Layout

    def holding(self, q: Tensor) -> "Codes":
        """The same grid with other numbers."""
        return Codes(q=q, scale=self.scale, zero=self.zero, shape=self.shape, layout=self.layout)

    def values(self, sharing: Sharing) -> Tensor:
        """The real values, float32 in the shape of the tensor; `sharing` as for `encode_operand`."""
        view, dims = sharing
        q = _in_shape(self.q, self.shape, self.layout)
        one = self.scale.numel() == 1
        scale = self.scale.view([1 if one or d in dims else n for d, n in enumerate(view)])
        return (q.reshape(view).float() - self.zero).mul_(scale).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Values:
    """One operand as it is, to be rounded to bf16 while it is multiplied: float32 or bfloat16, memory as of `Codes`."""

    q: Tensor
    shape: torch.Size
    layout: Layout
    zero: int = 0

    @property
    def scale(self) -> Tensor:
        """One."""
        return torch.ones(1, dtype=torch.float32, device="cpu")

    def holding(self, q: Tensor) -> "Values":
        """Other numbers of the same shape."""
        return Values(q=q, shape=self.shape, layout=self.layout)

    def values(self, sharing: Sharing) -> Tensor:  # noqa: ARG002 - there is no scale
        """The real values rounded to bfloat16, float32 in the shape of the tensor."""
        return _in_shape(self.q, self.shape, self.layout).to(torch.bfloat16).float()


def _in_shape(q: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Numbers in the memory order of a layout as a tensor of that shape."""
    if layout == "matrix":
        return q.view(shape)
    if layout == "weight":
        return q.view(shape[0], math.prod(shape[2:]), shape[1]).transpose(1, 2).reshape(shape)
    return q.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


Operand = Codes | Values


@cache
def self_test() -> str:
    """Multiply scattered and extreme codes, compare with exact arithmetic, once in a process: what is wrong, or empty.

    Processors without 8-bit units that sum in 32 bits saturate in between: then results of extreme codes differ.
    """
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for rows, k, columns in ((1, 1, 1), (33, 130, 40), (5, 4096, 17)):
        a = (_count(rows * k) * 40503 // 64 % 256).view(rows, k).to(torch.uint8)
        b = (_count(columns * k) * 48271 // 32 % 256 - 128).view(columns, k).to(torch.int8)
        for low in (-128, 127, None):
            if low is not None:
                a, b = torch.full_like(a, 255), torch.full_like(b, low)
            wanted = (a.long() - 3) @ b.long().t()
            left = Codes(q=a, scale=one, zero=3, shape=a.shape, layout="matrix")
            right = Codes(q=b, scale=one, zero=0, shape=b.shape, layout="matrix")
            found = output(left, right, None, wanted.shape, None, torch.float32)
            kernel = torch.Size((columns, k, 1, 1))
            place = Geometry(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, transposed=False)
            left = replace(left, shape=torch.Size((rows, k, 1, 1)), layout="activation")
            right = replace(right, shape=kernel, layout="weight")
            windows = output(left, right, place, torch.Size((rows, columns, 1, 1)), None, torch.float32)
            if not (torch.equal(found, wanted.float()) and torch.equal(windows.flatten(1), wanted.float())):
                return f"products of 8-bit codes are wrong on this processor (shape {rows}x{k}x{columns})"
    return ""


def _count(number: int) -> Tensor:
    """0 to number - 1."""
    return torch.arange(number, dtype=torch.int64, device="cpu")


def missing(unit: Unit) -> str:
    """Why this machine has not the units; empty where it has."""
    sets = cpu.instruction_sets()
    if sets is None:
        return "lowbit was installed without its native kernels (no compiler): reinstall with a C++17 compiler"
    wanted = "avx512vnni" if unit == "int8" else "avx512bf16"
    if wanted not in sets:
        return f"this processor, or ONEDNN_MAX_CPU_ISA, offers {', '.join(sets) or 'no vectors'} and not {wanted}"
    return self_test()


def refusal(formats: tuple[Format, Format], kept: tuple[bool, bool], *, on_cuda: bool = False) -> str:
    """Why two operands cannot be multiplied on integer or bf16 units; empty where they can.

    Args:
        formats: of the two operands, with the bits of the moment.
        kept: whether each operand's scales lie along axes that the product keeps.
        on_cuda: whether they lie on a GPU, which multiplies integers alone here.
    """
    for fmt, keeps in zip(formats, kept, strict=True):
        check_defined(fmt)
        if isinstance(fmt, Float) and fmt.name != "bf16":
            return f"{fmt} has no units of 16 bits or fewer"
        if isinstance(fmt, Integer):
            if fmt.bits > 8:
                return f"codes of {fmt.bits} bits do not fit 8-bit units"
            if fmt.zero == "offset":
                return "a float offset is no integer code"
            if fmt.zero == "integer" and fmt.granularity != "tensor":
                return f"a zero point per {fmt.granularity} is not one zero point"
            if not keeps:
                return f"scales per {fmt.granularity} lie along what the product sums over"
        if why := unlisted(fmt, _TAKEN):
            return why
    if on_cuda:
        return "" if unit_of(formats) == "int8" else "a bf16 operand has no int8 engine on cuda"
    return missing(unit_of(formats))


@lru_cache(maxsize=4096)
def takes(fmt: Format) -> bool:
    """Whether this engine computes all of a format once its codes have 8 bits or fewer."""
    return not unlisted(replace(fmt, bits=8) if isinstance(fmt, Integer) else fmt, _TAKEN)


def unit_of(formats: tuple[Format, Format]) -> Unit:
    """The units that multiply two formats: int8 for two integers, bf16 where one of them is bf16."""
    return "int8" if all(isinstance(fmt, Integer) for fmt in formats) else "bf16"


def _ordered_view(x: Tensor, whole: bool, view: tuple[int, ...], dims: tuple[int, ...]) -> cpu.View | None:
    """The view of a weight whose memory is (first axis, taps, second axis)."""
    first, second = x.shape[:2]
    taps = math.prod(x.shape[2:])
    kept = [n for d, n in enumerate(view) if d not in dims and n > 1]
    if whole:
        return 1, 1, x.numel(), False
    if kept == [first] and first != second:
        return 1, first, taps * second, False
    if kept == [second] and first != second:
        return first * taps, second, 1, False
    if first == second and view[0] == 1 and len(kept) == 1:  # (groups 1, first, second, *kernel)
        return (1, first, taps * second, False) if 1 not in dims else (first * taps, second, 1, False)
    return None


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """How the native passes take an operand: its memory, one scale or one for each channel, taps to transpose."""

    memory: cpu.View
    whole: bool
    taps: int


@lru_cache(maxsize=4096)
def _passes(
    shape: torch.Size, stride: tuple[int, ...], layout: Layout, sharing: Sharing, stochastic: bool
) -> _Passes | None:
    """The passes over an operand of such memory; None where they do not take it."""
    x = torch.empty_strided(shape, stride, dtype=torch.float32, device="meta")
    view, dims = sharing
    weight = layout == "weight"
    taps = 1 if layout == "matrix" else math.prod(shape[2:])
    memory = cpu.memory_view(x, view, dims)
    whole = len(dims) == len(view) or (memory is not None and memory[1] == 1)  # one scale
    last = memory is not None and memory[3]
    ordered = weight and cpu.is_channels_last(x) and not x.is_contiguous()
    if ordered:  # its memory is in the wanted order already; noise numbers would not be
        memory = None if stochastic else _ordered_view(x, len(dims) == len(view), view, dims)
    transposed = not last and not ordered and taps > 1
    if transposed and memory is not None:
        outer, channels, inner, _ = memory
        if channels == 1:
            memory = (shape[0], shape[1], taps, False)
        elif not weight or (inner == taps and not (outer > 1 and inner < 64)) or (inner != taps and outer != 1):
            memory = None
    if memory is None or x.numel() == 0:
        return None
    return _Passes(memory=memory, whole=whole, taps=taps if transposed else 1)


def encode_operand(
    x: Tensor,
    fmt: Format,
    *,
    layout: Layout,
    sharing: Sharing,
    levels: float,
    key: tuple[int, int] | None,
    observed: tuple[Tensor, Tensor] | None,
) -> Operand:
    """Codes of one operand of one product, or its values where the format is bf16.

    Args:
        x: float32 or bfloat16 on the CPU, in its own shape.
        fmt: a format that `refusal` lets pass.
        layout: the memory order that products read.
        sharing: view shape and the dims of it that share a scale.
        levels: the largest code.
        key: words of the noise field; needed iff the format rounds stochastically.
        observed: lo and hi in place of those of `x`.
    """
    if isinstance(fmt, Float):
        # The numbers may lie in x itself; saved as those of a detached x, a change of them raises torch's usual error.
        return Values(q=_in_order(x.detach(), layout), shape=x.shape, layout=layout)
    x = x.contiguous() if layout == "matrix" else x
    passes = _passes(x.shape, x.stride(), layout, sharing, key is not None)
    if passes is None:
        return _encode_slowly(x.contiguous(), fmt, layout, sharing, levels, key, observed)
    q, scale, zero = cpu.quantize(
        x,
        passes.memory,
        fmt,
        levels=levels,
        samples=samples_of(x.shape, fmt.range, fmt.fewest) if passes.whole else None,
        observed=observed,
        key=key,
        taps=passes.taps,
    )
    return Codes(q=q, scale=scale, zero=zero, shape=x.shape, layout=layout)


def _whole(zero: Tensor | None) -> int:
    """A zero point as a number; 0 where it is nan, and the scale with it."""
    value = 0.0 if zero is None else float(zero)
    return 0 if math.isnan(value) else int(value)


def _in_order(x: Tensor, layout: Layout) -> Tensor:
    """The memory order that products read, flat."""
    if layout == "matrix":
        return x.contiguous().flatten()
    if layout == "weight":
        return x.flatten(2).transpose(1, 2).contiguous().flatten()
    return x.movedim(1, -1).contiguous().flatten()


def _encode_slowly(
    x: Tensor,
    fmt: Integer,
    layout: Layout,
    sharing: Sharing,
    levels: float,
    key: tuple[int, int] | None,
    observed: tuple[Tensor, Tensor] | None,
) -> Codes:
    """The same through the torch twin, for tensors whose memory the native passes do not take."""
    noise = None if key is None else cpu.noise(x.numel(), key)
    return encode_by_torch(x, fmt, layout=layout, sharing=sharing, levels=levels, noise=noise, observed=observed)


def encode_by_torch(
    x: Tensor,
    fmt: Integer,
    *,
    layout: Layout,
    sharing: Sharing,
    levels: float,
    noise: Tensor | None,
    observed: tuple[Tensor, Tensor] | None,
) -> Codes:
    """As `encode_operand` with torch's own operators, on any device; `noise` has a draw in [0, 1) for each number."""
    view, dims = sharing
    x = x.float()
    noise = None if noise is None else noise.reshape(view)
    seen = None if observed is None else (observed[0].view((1,) * len(view)), observed[1].view((1,) * len(view)))
    codes = encode(x.reshape(view), fmt, dims=dims, levels=levels, noise=noise, observed=seen)
    scale, zeros = codes.scale.flatten().contiguous(), codes.zero
    q = codes.q.nan_to_num(0.0).to(torch.int8 if fmt.zero == "symmetric" else torch.uint8).reshape(x.shape)
    return Codes(q=_in_order(q, layout), scale=scale, zero=_whole(zeros), shape=x.shape, layout=layout)


# ---- products ----


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The convolution that a layer's products are, with one to three axes; a linear layer has none."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool


def output(
    x: Operand, w: Operand, geometry: Geometry | None, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x w`` in `shape` plus bias, in `dtype`."""
    if geometry is None:
        return _matrix(_flat(x, True), _flat(w, True), x, w, shape, bias, dtype)
    reach = _transposed if geometry.transposed else _plain
    return reach(x, w, geometry, shape, bias, dtype)


def grad_input(g: Operand, w: Operand, geometry: Geometry | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``g w`` in `shape`, in `dtype`."""
    if geometry is None:
        return _matrix(_flat(g, True), _flat(w, False), g, w, shape, None, dtype)
    reach = _plain if geometry.transposed else _transposed
    return reach(g, w, geometry, shape, None, dtype)


def grad_weight(
    g: Operand, x: Operand, geometry: Geometry | None, shape: torch.Size, dtype: torch.dtype, *, ordered: bool = False
) -> Tensor:
    """``g x`` summed over positions in `shape`, in `dtype`; `ordered` gives a convolution's memory channels last."""
    if geometry is None:
        return _matrix(_flat(g, False), _flat(x, False), g, x, shape, None, dtype)
    if geometry.transposed:  # the weight's first axis counts input channels
        return _weight(x, g, geometry, shape, dtype, ordered)
    return _weight(g, x, geometry, shape, dtype, ordered)


def grad_bias(g: Tensor, geometry: Geometry | None) -> Tensor:
    """The sum of g over all but its channels, float32."""
    if geometry is None and cuda.runs(g):
        return g.flatten(0, -2).sum(0, dtype=torch.float32)
    if geometry is None:
        return cpu.sums(g.contiguous(), g.shape[-1])
    return cpu.sums(g.movedim(1, -1).contiguous(), g.shape[1])


def _flat(t: Operand, along: bool) -> Rows:
    """A tensor ``(..., width)`` as rows."""
    width = t.shape[-1]
    return Rows(
        data=t.q, rows=t.shape.numel() // max(width, 1), width=width, stride=width, along=along, zero=t.zero
    )  # fmt: skip


def kernel(a: Operand, b: Operand) -> str:
    """The operator that multiplies two operands."""
    if cuda.runs(a.q):
        return cuda.KERNEL
    return "lowbit::multiply_codes" if _unit(a, b) else "lowbit::multiply_halves"


def _unit(a: Operand, b: Operand) -> bool:
    return isinstance(a, Codes) and isinstance(b, Codes)


def _matrix(
    a: Rows, b: Rows, left: Operand, right: Operand, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if cuda.runs(a.data):
        codes = a.data.view(a.rows, a.width), b.data.view(b.rows, b.width)
        first, second = codes[0] if a.along else codes[0].t(), codes[1].t() if b.along else codes[1]
        scales = left.scale, right.scale
        return cuda.multiply(first, second, (a.zero, b.zero), scales, bias, dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device="cpu")
    k = a.width if a.along else a.rows
    if k == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.zero_().add_(bias.to(dtype))
    most = most_summed(left, right)
    if k > most:
        total = torch.zeros(shape, dtype=torch.float32, device="cpu") if bias is None else bias.expand(shape).clone()
        for start in range(0, k, most):
            parts = _part(a, start, most), _part(b, start, most)
            total += _matrix(*parts, left, right, shape, None, torch.float32)
        return total.to(dtype)
    cpu.multiply(
        a, b, out, first=0, stride=shape[-1], taps=1, scales=(left.scale, right.scale), bias=bias,
        codes=_unit(left, right),
    )  # fmt: skip
    return out


def most_summed(a: Operand, b: Operand) -> int:
    """The largest number of products of two operands' numbers whose sum the units hold: 32 bits, signed, for codes."""
    if isinstance(a, Values) or isinstance(b, Values):
        return 2**62
    return (2**31 - 1) // (_REACH[a.q.dtype] * _REACH[b.q.dtype])


def _part(t: Rows, start: int, count: int) -> Rows:
    """Of what is summed over, at most `count` numbers from `start` on; without a window."""
    if t.along:
        return replace(t, first=t.first + start, width=min(count, t.width - start))
    return replace(t, first=t.first + start * t.stride, rows=min(count, t.rows - start))


def _three(values: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    padded = (*(fill,) * (3 - len(values)), *values)
    return padded[0], padded[1], padded[2]


def _window(geometry: Geometry, kernel: torch.Size, rows: torch.Size, reached: torch.Size, transposed: bool) -> Window:
    """Rows count the positions of shape `rows`, taps reach for the side of shape `reached`, both (B, C, *size)."""
    return Window(
        position=(rows[0], *_three(tuple(rows[2:]), 1)),
        size=_three(tuple(reached[2:]), 1),
        kernel=_three(tuple(kernel), 1),
        stride=_three(geometry.stride, 1),
        padding=_three(geometry.padding, 0),
        dilation=_three(geometry.dilation, 1),
        transposed=transposed,
        channels=reached[1] // geometry.groups,
    )


def _new(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty (B, C, *size) whose memory is (B, *size, C)."""
    return torch.empty_strided(shape, strides.channels_last(shape), dtype=dtype, device="cpu")


def _of_group(scale: Tensor, group: int, groups: int) -> Tensor:
    """The scales of one group's channels."""
    if scale.numel() == 1:
        return scale
    count = scale.numel() // groups
    return scale[group * count : (group + 1) * count]


def _row_scales(t: Operand, positions: int) -> Tensor:
    """One scale, or one for each row where each sample has its own."""
    return t.scale if t.scale.numel() == 1 else t.scale.repeat_interleave(positions)


def _plain(
    a: Operand, w: Operand, geometry: Geometry, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Taps reach from each position of the smaller side; w is (N, T, C): N of the result, C of `a`."""
    return _convolve(a, w, geometry, shape, bias, dtype, transposed=False)


def _transposed(
    a: Operand, w: Operand, geometry: Geometry, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Taps reach from each position of the larger side; w is (C, T, N): C of `a`, N of the result."""
    return _convolve(a, w, geometry, shape, bias, dtype, transposed=True)


def _convolve(
    a: Operand,
    w: Operand,
    geometry: Geometry,
    shape: torch.Size,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    out = _new(shape, dtype)
    groups, taps = geometry.groups, math.prod(w.shape[2:])
    channels, wanted = a.shape[1] // groups, shape[1] // groups
    k = taps * channels
    if out.numel() == 0 or k == 0:
        return out.zero_()
    if k > most_summed(a, w):
        raise UsageError(
            f"a convolution that sums {taps} taps of {channels} channels: more than {most_summed(a, w)} products of "
            "codes overflow 32 bits. Use the reference engine for this layer"
        )
    window = _window(geometry, w.shape[2:], shape, a.shape, transposed)
    rows = shape.numel() // shape[1]
    for group in range(groups):
        left = Rows(
            data=a.q, first=group * channels, rows=rows, width=k, stride=a.shape[1], along=True, zero=a.zero,
            window=window,
        )  # fmt: skip
        first = group * (w.shape[0] // groups) * taps * w.shape[1]
        if transposed:
            right = Rows(
                data=w.q, first=first, rows=k, width=wanted, stride=wanted, along=False, fold=channels, zero=w.zero
            )  # fmt: skip
        else:
            right = Rows(data=w.q, first=first, rows=wanted, width=k, stride=k, along=True, zero=w.zero)
        cpu.multiply(
            left, right, out, first=group * wanted, stride=shape[1], taps=1,
            scales=(_row_scales(a, rows // shape[0]), _of_group(w.scale, group, groups)),
            bias=None if bias is None else bias[group * wanted : (group + 1) * wanted], codes=_unit(a, w),
        )  # fmt: skip
    return out


def _weight(
    small: Operand, large: Operand, geometry: Geometry, shape: torch.Size, dtype: torch.dtype, ordered: bool
) -> Tensor:
    """The gradient of a weight (first axis of `small`, second of `large`, *kernel)."""
    out = _new(shape, dtype) if ordered else torch.empty(shape, dtype=dtype, device="cpu")
    if out.numel() == 0 or small.shape.numel() == 0:
        return out.zero_()
    window = _window(geometry, shape[2:], small.shape, large.shape, False)
    pieces = list(_pieces(window, most_summed(small, large)))
    if len(pieces) > 1:
        total = torch.zeros_like(out, dtype=torch.float32)
        for piece in pieces:
            total += _weight_of(piece, small, large, geometry, torch.empty_like(total), ordered)
        return out.copy_(total)
    return _weight_of(pieces[0], small, large, geometry, out, ordered)


def _pieces(window: Window, most: int) -> Iterator[tuple[int, int, Window]]:
    """Cut the positions that rows count into runs of at most `most`: (first row, first sample, the run as a window).

    Each run is a range of one axis, whole in the axes after it, at one index of those before it.
    """
    position = window.position
    axis = next(a for a in range(4) if a == 3 or math.prod(position[a + 1 :]) <= most)
    inner = math.prod(position[axis + 1 :])
    length = most // inner
    for before in range(math.prod(position[:axis])):
        index = [before // math.prod(position[a + 1 : axis]) % position[a] for a in range(axis)]
        for start in range(0, position[axis], length):
            count = min(length, position[axis] - start)
            at = [*index, start, *[0] * (3 - axis)]
            size = [*[1] * axis, count, *position[axis + 1 :]]
            # Positions count from 0 again, so the taps reach further by where the run begins.
            padding = [p - a * s for p, a, s in zip(window.padding, at[1:], window.stride, strict=True)]
            run = replace(
                window,
                position=(size[0], size[1], size[2], size[3]),
                padding=(padding[0], padding[1], padding[2]),
            )
            yield (before * position[axis] + start) * inner, at[0], run


def _weight_of(
    piece: tuple[int, int, Window], small: Operand, large: Operand, geometry: Geometry, out: Tensor, ordered: bool
) -> Tensor:
    """The gradient of a weight from one run of positions, in `out`."""
    row, sample, window = piece
    groups, taps = geometry.groups, math.prod(out.shape[2:])
    count, channels = out.shape[0] // groups, out.shape[1]
    rows, before = math.prod(window.position), sample * math.prod(window.size) * large.shape[1]
    for group in range(groups):
        left = Rows(
            data=small.q, first=row * small.shape[1] + group * count, rows=rows, width=count, stride=small.shape[1],
            along=False, zero=small.zero,
        )  # fmt: skip
        right = Rows(
            data=large.q, first=before + group * channels, rows=rows, width=taps * channels, stride=large.shape[1],
            along=False, zero=large.zero, window=window,
        )  # fmt: skip
        scales = _of_group(small.scale, group, groups), _of_group(large.scale, group, groups)
        cpu.multiply(
            left, right, out, first=group * count * taps * channels, stride=taps * channels, scales=scales,
            taps=1 if ordered else taps, bias=None, codes=_unit(small, large),
        )  # fmt: skip
    return out
