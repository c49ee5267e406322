"""Passes over memory by kernel, timed in paired rounds."""

import importlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lowbit.kernels import cpu, native_instruction_sets
from lowbit.machine import here, paired, ratio
from lowbit.numerics import codebooks
from lowbit.numerics.ranges import new_running_range
from lowbit.tables import text_table

Step = Callable[[], object]

SIDE = 2048
"""Passes run over SIDE rows of SIDE numbers, 4.2 million."""


def passes(x: Tensor) -> dict[str, Step]:
    """Passes over a matrix by name, `torch.clone` first: torch's, lowbit's, and QPyTorch's where it is installed.

    Args:
        x: float32 ``(rows, columns)``, contiguous.
    """
    found: dict[str, Step] = {
        "torch.clone": x.clone,
        "torch.fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127),
    }
    if native_instruction_sets() is not None:
        found |= _native_passes(x)
    return found | _qtorch_passes(x)


def _native_passes(x: Tensor) -> dict[str, Step]:
    rows_of, width = x.shape
    views = {"tensor": (1, 1, x.numel(), False), "row": (1, rows_of, width, False)}
    counts = {"tensor": 1, "row": rows_of}
    rounding = {"nearest": None, "stochastic": (12345, 67890)}
    signs = {"u8": (False, 0.0, 255.0), "s8": (True, -127.0, 127.0)}
    found: dict[str, Step] = {f"extremes {per}": partial(cpu.extremes, x, views[per]) for per in views}
    for per, view in views.items():
        scale, zero = x.new_full((counts[per],), 0.02), x.new_full((counts[per],), 128.0)
        for sign, (signed, low, high) in signs.items():
            for how, key in rounding.items():
                grid = cpu.Grid(scale=scale, zero=None if signed else zero, low=low, high=high, key=key)
                found[f"encode {sign} {per} {how}"] = partial(cpu.encode, x, view, grid, signed=signed)
    for how, key in rounding.items():
        grid = cpu.Grid(scale=x.new_full((1,), 0.02), zero=None, low=-127.0, high=127.0, key=key)
        found[f"fake_quantize {how}"] = partial(cpu.fake_quantize, x, views["tensor"], grid)
    found["fake_quantize bf16"] = partial(cpu.round_bf16, x)
    found["noise"] = partial(cpu.noise, x.numel(), (12345, 67890))
    found["sums of columns (grad_bias)"] = partial(cpu.sums, x, width)
    running = new_running_range()
    found["observe (extremes, running range)"] = partial(
        cpu.observe, x, rows_of, running, momentum=0.9, first=True, training=True
    )
    for per, samples in (("tensor", 1), ("row", None)):
        for how, key in rounding.items():
            found[f"quantize s8 {per} {how} (extremes, encode)"] = partial(
                cpu.quantize, x, views[per], symmetric=True, floor=0.0, levels=127.0, samples=samples, key=key
            )
    return found | _block_passes(x) | _norm_passes(x)


def _block_passes(x: Tensor) -> dict[str, Step]:
    """The passes over blocks of a summed axis, and over optimiser states."""
    found: dict[str, Step] = {"hadamard 32": partial(cpu.hadamard, x, along=True, size=32, signs=None)}
    book = codebooks.dynamic()
    codes, scales = codebooks.encode(x, book)
    for how, key in (("nearest", None), ("stochastic", (12345, 67890))):
        found[f"blocks of 32: encode_blocks {how} (extremes, encode)"] = partial(
            cpu.encode_blocks, x, (1, 32), levels=127.0, floor=0.0, floor_power=True, key=key
        )
        found[f"optimiser states: encode_book {how}"] = partial(codebooks.encode, x, book, noise=key)
    found["optimiser states: decode_book"] = partial(codebooks.decode, codes, scales, book)
    return found


def _norm_passes(x: Tensor) -> dict[str, Step]:
    """The passes of Range BN, over codes as rows of 64 channels."""
    channels, y = 64, torch.empty_like(x)
    q = torch.randint(0, 256, x.shape, dtype=torch.uint8, device="cpu")
    count, ones = q.numel() // channels, x.new_ones(channels)
    codes, starts = cpu.Codes(q=q, scale=x.new_ones(1), zero=0), [i * count // 16 for i in range(17)]
    stats = cpu.code_statistics(codes, channels, starts, x.new_ones(16))
    return {
        "affine (dequantise, Range BN)": partial(cpu.affine, q, ones, ones, y),
        "statistics of codes (Range BN)": partial(cpu.code_statistics, codes, channels, starts, x.new_ones(16)),
        "sums of rows of codes (float offsets)": partial(cpu.row_sums, q, channels),
        "add u o + t (float offsets)": partial(cpu.add_offsets, y, y.new_ones(count, 1), ones, y.new_ones(1, channels)),
        "sums of codes (Range BN)": partial(cpu.code_sums, q, None, channels),
        "sums of products of codes (Range BN)": partial(cpu.code_sums, q, q, channels),
        "normalise, ReLU (Range BN)": partial(
            cpu.normalize, codes, stats, eps=1e-5, narrowest=True, inside=True, gamma=ones, beta=ones, rectify=True, y=y
        ),
        "gradient of the ReLU (Range BN)": partial(
            cpu.rectify_backward, x, codes, stats, gamma=ones, beta=ones, d=ones, dtype=x.dtype
        ),
        "gradients (Range BN)": partial(
            cpu.normalize_backward, codes, codes, stats, inside=True, gamma=ones, d=ones, dx=y
        ),
    }


def _qtorch_passes(x: Tensor) -> dict[str, Step]:
    try:
        quant = importlib.import_module("qtorch.quant")
    except Exception:  # it builds C++ when it is imported, and raises whatever goes wrong
        return {}
    return {
        f"qtorch.fixed_point_quantize {how}": partial(quant.fixed_point_quantize, x, wl=8, fl=6, rounding=how)
        for how in ("nearest", "stochastic")
    }


def kernels(rounds: int, side: int = SIDE) -> Iterator[str]:
    """Time every pass over a float32 matrix, or codes of it; gives lines of text, the table last.

    Args:
        rounds: rounds that count.
        side: rows of the matrix, and numbers in a row; a multiple of 64.

    Raises:
        UsageError: no round.
    """
    x = torch.randn(side, side, dtype=torch.float32, device="cpu")
    ready = passes(x)
    yield f"{here()}\n\n{x.numel():,} elements, {rounds} rounds\n"
    seconds = paired(ready, rounds, ready=True)
    table = []
    for name, taken in seconds.items():
        ns = [f"{1e9 * s / x.numel():.3f}" for s in (statistics.median(taken), min(taken), max(taken))]
        table.append([name, *ns, f"{ratio(taken, seconds['torch.clone']):.2f}"])
    yield text_table(("pass", "median ns/element", "min", "max", "times clone"), table)
    if native_instruction_sets() is None:
        yield "note: lowbit was installed without its native kernels, so none of its passes is here"
    if not any(name.startswith("qtorch") for name in ready):
        yield "note: qtorch cannot be imported (pip install qtorch, and a C++ compiler), so it is left out"
