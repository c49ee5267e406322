"""Every compilation of every kernel that can be launched, as data: what runs is what `proofs` compiles."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from lowbit.kernels.triton import device_codes, device_norm, device_products

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on CPU tensors, slowly."""

LAYOUTS = ("output", "grad_input", "grad_weight")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Whether the rows of each side lie along what is summed.
_ALONG: Mapping[str, tuple[bool, bool]] = {
    "output": (True, True), "grad_input": (True, False), "grad_weight": (False, False),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation of a kernel.

    Args:
        kernel: the function in Triton.
        name: of the kernel, and what sets this variant apart.
        types: of the arguments that are not int32, in Triton's words, e.g. ``"*i8"``.
        constants: its compile-time arguments.
        warps: groups of 32 threads in a program.
        stages: tiles that are on their way from memory at once.
        multiplies: whether it multiplies on the integer matrix units.
    """

    kernel: Any
    name: str
    types: Mapping[str, str] = field(hash=False)
    constants: Mapping[str, Any] = field(hash=False)
    warps: int
    stages: int = 1
    multiplies: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; without contraction of products and sums, as in all of lowbit's kernels."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def tiles(self, rows: int, columns: int) -> int:
        """How many programs cover a matrix."""
        sides = ("block_m", "block_n") if self.multiplies else ("height", "width")
        height, width = (int(self.constants[side]) for side in sides)
        return -(-rows // height) * -(-columns // width)

    def launch(self, programs: int, *arguments: Any) -> None:
        """Run it; arguments count as the kernel takes them, tensors on one device, each at a multiple of 16 bytes."""
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(programs,)](*arguments, **self.constants, **self.options)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What codes share a scale, and how they are rounded.

    Args:
        by: ``"row"``, ``"column"``, ``"both"`` (two tensors of codes) or ``"all"``.
        noisy: whether noise rounds them.
    """

    by: Literal["row", "column", "both", "all"]
    noisy: bool


_TARGETS = tuple(Target(by=by, noisy=noisy) for by in ("row", "column", "both", "all") for noisy in (False, True))


def _parts(by: str) -> dict[str, bool]:
    return {"by_row": by in ("row", "both"), "by_column": by in ("column", "both"), "by_all": by == "all"}


def _named(kernel: Any, *parts: object) -> str:
    return " ".join([kernel.__name__, *(str(part) for part in parts if part)])


def _tile(aligned: bool, height: int = 32) -> dict[str, Any]:
    return {"aligned": aligned, "height": height if aligned else height // 2, "width": 128}


_CODES_WARPS = 4


@cache
def ranges(by: str, dtype: torch.dtype, *, aligned: bool) -> Variant:
    """`device_codes.ranges` for a `Target.by`."""
    return Variant(
        kernel=device_codes.ranges,
        name=_named(device_codes.ranges, by, TYPES[dtype], "" if aligned else "ragged"),
        types={"x": f"*{TYPES[dtype]}", "of_rows": "*i32", "of_columns": "*i32", "of_all": "*i32"},
        constants={**_parts(by), **_tile(aligned)},
        warps=_CODES_WARPS,
    )


@cache
def range_codes(target: Target, dtype: torch.dtype, *, aligned: bool) -> Variant:
    """`device_codes.range_codes`."""
    by, noisy = target.by, target.noisy
    types = {"x": f"*{TYPES[dtype]}", "zero": "*i32"}
    types |= dict.fromkeys(("of_rows", "of_columns", "of_all"), "*i32")
    types |= dict.fromkeys(("row_codes", "column_codes", "codes"), "*i8")
    types |= dict.fromkeys(("row_scale", "column_scale", "scale"), "*fp32")
    types |= dict.fromkeys(("row_levels", "column_levels", "levels", "floor", "column_floor"), "fp32")
    return Variant(
        kernel=device_codes.range_codes,
        name=_named(device_codes.range_codes, by, "noisy" if noisy else "", TYPES[dtype], "" if aligned else "ragged"),
        types=types,
        constants={
            **_parts(by),
            "row_noisy": noisy,
            "column_noisy": noisy,
            **_tile(aligned),
        },
        warps=_CODES_WARPS,
    )


_BLOCKS = ((1, 32), (32, 1), (32, 32))  # rows and columns


@cache
def block_codes(block: tuple[int, int], dtype: torch.dtype, *, noisy: bool, aligned: bool) -> Variant:
    """`device_codes.block_codes`."""
    kind = f"{block[0]}x{block[1]}"
    return Variant(
        kernel=device_codes.block_codes,
        name=_named(
            device_codes.block_codes, kind, "noisy" if noisy else "", TYPES[dtype],
            "" if aligned else "ragged",
        ),
        types={"x": f"*{TYPES[dtype]}", "codes": "*i8", "scales": "*fp32", "levels": "fp32", "floor": "fp32"},
        constants={
            "block_rows": block[0], "block_columns": block[1], "noisy": noisy,
            **_tile(aligned, 32 if aligned else 64),
        },
        warps=_CODES_WARPS,
    )  # fmt: skip


_NORM = {"q": "*i8", "g": "*i8", "codes": "*i8", "a": "*fp32", "b": "*fp32", "scale": "*fp32"}
_NORM |= {"of_all": "*i32", "zero": "*i32", "levels": "fp32", "floor": "fp32", "of_g": "*i64", "of_products": "*i64"}
_NORM |= dict.fromkeys(("largest", "smallest", "at_largest", "at_smallest", "total"), "*i32")


def _norm(
    kernel: Any, *parts: str, aligned: bool, types: Mapping[str, str] = {}, height: int = 32, **constants: Any
) -> Variant:
    """A pass of Range BN."""
    return Variant(
        kernel=kernel,
        name=_named(kernel, *parts, "" if aligned else "ragged"),
        types={**_NORM, **types},
        constants={**constants, **_tile(aligned, height)},
        warps=_CODES_WARPS,
    )


@cache
def chunk_statistics(*, aligned: bool) -> Variant:
    """`device_norm.chunk_statistics`."""
    return _norm(device_norm.chunk_statistics, aligned=aligned)


@cache
def normalize(dtype: torch.dtype, *, aligned: bool) -> Variant:
    """`device_norm.normalize`."""
    # A tile of 32 rows spills for compute capability 9.0.
    return _norm(device_norm.normalize, TYPES[dtype], aligned=aligned, types={"y": f"*{TYPES[dtype]}"}, height=16)


@cache
def normalized_codes(*, noisy: bool, aligned: bool) -> Variant:
    """`device_norm.normalized_codes`."""
    return _norm(device_norm.normalized_codes, "noisy" if noisy else "", aligned=aligned, noisy=noisy)


@cache
def code_sums(*, aligned: bool) -> Variant:
    """`device_norm.code_sums`."""
    return _norm(device_norm.code_sums, aligned=aligned)


# Where rows are not whole 16s, memory is read byte by byte, and a smaller tile leaves registers for the addresses.
_TILES = {True: (128, 128, 64, 8, 3), False: (64, 64, 32, 4, 1)}
_BLOCK_TILES = {True: (64, 64, 32, 4, 3), False: (64, 32, 32, 4, 1)}
_SIDES = {"a": "*i8", "b": "*i8", "scale_a": "*fp32", "scale_b": "*fp32", "bias": "*fp32"}


@cache
def int8_mm(layout: str, dtype: torch.dtype, *, aligned: bool) -> Variant:
    """`device_products.int8_mm` for a product, with a result of this dtype."""
    kernel = device_products.int8_mm
    more = dict.fromkeys(("zero_a", "zero_b", "sums_a", "sums_b"), "*i32")
    return _product(kernel, layout, dtype, aligned, more, _TILES[aligned])


@cache
def int8_mm_blocks(layout: str, dtype: torch.dtype, *, aligned: bool) -> Variant:
    """`device_products.int8_mm_blocks`, likewise."""
    return _product(device_products.int8_mm_blocks, layout, dtype, aligned, {}, _BLOCK_TILES[aligned])


def _product(
    kernel: Any,
    layout: str,
    dtype: torch.dtype,
    aligned: bool,
    types: Mapping[str, str],
    tile: tuple[int, int, int, int, int],
) -> Variant:
    block_m, block_n, block_k, warps, stages = tile
    a_along, b_along = _ALONG[layout]
    return Variant(
        kernel=kernel,
        name=_named(kernel, layout, TYPES[dtype], "" if aligned else "ragged"),
        types={**_SIDES, "out": f"*{TYPES[dtype]}", **types},
        constants={
            "a_along": a_along, "b_along": b_along, "aligned": aligned,
            "block_m": block_m, "block_n": block_n, "block_k": block_k,
        },
        warps=warps,
        stages=stages,
        multiplies=True,
    )  # fmt: skip


def all_variants() -> Sequence[Variant]:
    """Everything that can be launched."""
    found = []
    for dtype, aligned in itertools.product(TYPES, (True, False)):
        for layout in LAYOUTS:
            found += [int8_mm(layout, dtype, aligned=aligned), int8_mm_blocks(layout, dtype, aligned=aligned)]
        found += [ranges(by, dtype, aligned=aligned) for by in ("row", "column", "both", "all")]
        found += [range_codes(target, dtype, aligned=aligned) for target in _TARGETS]
        for block, noisy in itertools.product(_BLOCKS, (False, True)):
            found.append(block_codes(block, dtype, noisy=noisy, aligned=aligned))
        found.append(normalize(dtype, aligned=aligned))
    for aligned in (True, False):
        found += [chunk_statistics(aligned=aligned), code_sums(aligned=aligned)]
        found += [normalized_codes(noisy=noisy, aligned=aligned) for noisy in (False, True)]
    return found
