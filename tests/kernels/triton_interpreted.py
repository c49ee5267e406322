"""The Triton kernels, interpreted on CPU tensors, against the definition; `test_triton.py` runs this file.

The interpreter does not see accesses beyond a tensor, so every tensor lies between canaries.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from helpers import recipe_of
from lowbit import Recipe, functional
from lowbit.engines import choice
from lowbit.engines import triton as engine
from lowbit.engines.int_mm import multiply_codes
from lowbit.kernels.triton import calls, norm, variants
from lowbit.kernels.triton.calls import Codes, Rule
from lowbit.nn.norm.statistics import chunk_lengths
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.quantizer import encode, encode_transformed, sharing_of
from lowbit.numerics.rounding import CounterNoise, step_key, uniform_noise
from lowbit.numerics.scales import PowerOfTwoScale, Scale
from lowbit.products import watch
from lowbit.products.setting import Setting
from lowbit.products.watch import ProductRun

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 is not set"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on inf and nan
]

KEY = (3_000_000_000, 17)
CANARY, MARGIN = 0x7F, 1 << 16  # a float of these bytes is 3.4e38, a code 127


class Fence:
    """Tensors between canaries."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor, not filled, with canaries before and after it."""
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8)
        self.buffers.append((buffer, size))
        return buffer[MARGIN : MARGIN + size].view(dtype).view(shape)

    def around(self, x: Tensor) -> Tensor:
        """A copy of a tensor between canaries."""
        return self.new(tuple(x.shape), x.dtype).copy_(x)

    def broken(self) -> int:
        """How many canaries were overwritten."""
        return sum(int((part != CANARY).sum()) for b, n in self.buffers for part in (b[:MARGIN], b[MARGIN + n :]))


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fence]:
    """Whatever the calls allocate lies between canaries, which are looked at in the end."""
    made = Fence()

    def empty(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        assert torch.device(device).type == "cpu"
        return made.new(tuple(sizes), dtype)

    monkeypatch.setattr(torch, "empty", empty)
    yield made
    assert made.broken() == 0


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(rows: int, columns: int, seed: int) -> Tensor:
    """Scattered codes with the extremes among them."""
    q = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    q.flatten()[:2] = torch.tensor([-128, 127], dtype=torch.int8)[: q.numel()]
    return q


def noise(key: tuple[int, int] | None, shape: torch.Size) -> Tensor | None:
    """The draws of a noise field."""
    return None if key is None else uniform_noise(torch.tensor(key), shape)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether every bit is the same, apart from those of nans."""
    return found.dtype == wanted.dtype and torch.equal(found.isnan(), wanted.isnan()) and torch.equal(
        found.nan_to_num(0.0, 3.0, -3.0), wanted.nan_to_num(0.0, 3.0, -3.0)
    )  # fmt: skip


def check(found: Codes | None, x: Tensor, fmt: Format, dims: tuple[int, ...], rule: Rule) -> None:
    """Codes and scales are those of the definition."""
    wanted = encode(x.float(), fmt, dims=dims, levels=rule.levels, noise=noise(rule.key, x.shape))
    assert found is not None
    assert wanted.steps is not None
    assert torch.equal(found.q.float(), wanted.q.nan_to_num(0.0))
    assert same(found.scale, wanted.steps.scale.flatten())


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, KEY), (torch.bfloat16, None)])
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (40, 256)])
def test_rows_and_columns_have_the_codes_of_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, key: tuple[int, int] | None, fence: Fence
) -> None:
    """Both from one read, of other widths, and each alone."""
    fmt = integer(bits=8, zero="symmetric", rounding="nearest" if key is None else "stochastic")
    x = fence.around(randn(*shape).to(dtype))
    row, column = Rule(levels=127.0, key=key), Rule(levels=7.0, key=key)

    both = calls.range_codes(x, "both", row=row, column=column)
    alone = calls.range_codes(x, "row", row=row)[0], calls.range_codes(x, "column", column=column)[1]

    for rows, columns in (both, alone):
        check(rows, x, fmt, (1,), row)
        check(columns, x, fmt, (0,), column)


@pytest.mark.parametrize("key", [None, KEY])
def test_odd_numbers_have_the_codes_of_the_definition(key: tuple[int, int] | None, fence: Fence) -> None:
    """inf, nan, zeros, denormals, constants, the largest float and halves, by row and column."""
    fmt = integer(bits=8, zero="symmetric", rounding="nearest" if key is None else "stochastic")
    x = torch.zeros(16, 144)
    x[1], x[2], x[3], x[4] = 1e-42, 3.5, torch.arange(144.0) - 63.5, 3.4e38
    x[5, 7], x[6, 9], x[7, 140] = torch.nan, torch.inf, -torch.inf
    x[3, 143] = 127.0
    rule = Rule(levels=127.0, key=key)

    rows, columns = calls.range_codes(fence.around(x), "both", row=rule, column=rule)

    check(rows, x, fmt, (1,), rule)
    check(columns, x, fmt, (0,), rule)
    assert rows is not None
    assert rows.q[5].count_nonzero() == rows.q[0].count_nonzero() == 0


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 130)])
def test_one_scale_has_the_codes_of_the_definition(
    shape: tuple[int, int], zero: Any, key: tuple[int, int] | None, fence: Fence
) -> None:
    """With a zero point and without, of the tensor's range or a given one; a code with a zero point is 128 less."""
    fmt = integer(bits=8, zero=zero, rounding="nearest" if key is None else "stochastic")
    x = fence.around(randn(*shape) + 0.4)
    levels = 127.0 if zero == "symmetric" else 255.0
    rule = Rule(levels=levels, floor=0.0, key=key)

    for observed in (None, (torch.tensor(-0.25), torch.tensor(1.5))):
        found = calls.range_codes(x, "all" if zero == "symmetric" else "affine", row=rule, observed=observed)[0]
        seen = None if observed is None else tuple(v.reshape(1, 1) for v in observed)
        wanted = encode(x, fmt, levels=levels, noise=noise(key, x.shape), observed=seen)

        assert found is not None
        assert wanted.steps is not None
        shift = 0 if zero == "symmetric" else 128
        assert torch.equal(found.q.float() + shift, wanted.q)
        assert torch.equal(found.scale, wanted.steps.scale.flatten())
        if shift:
            assert found.zero is not None
            assert int(found.zero) + shift == int(wanted.steps.zero)


@pytest.mark.parametrize("floor", [0.0, 0.03])
def test_a_floor_is_the_smallest_scale(floor: float, fence: Fence) -> None:
    """Of rows and of columns, as in the definition; without one only zeros have the scale 1."""
    x = randn(17, 144)
    x[3] = 0.0
    rule = Rule(levels=127.0, floor=floor)
    fmt = integer(bits=8, zero="symmetric", floor=floor)

    rows, columns = calls.range_codes(fence.around(x), "both", row=rule, column=rule)

    check(rows, x, fmt, (1,), rule)
    check(columns, x, fmt, (0,), rule)
    assert rows is not None
    assert rows.scale[3] == torch.tensor(floor or 1.0)


@pytest.mark.parametrize(("power", "key"), [(False, KEY), (True, None)])
@pytest.mark.parametrize("granularity", ["block", "column", "square"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (64, 256)])
def test_blocks_have_the_codes_of_the_definition(
    shape: tuple[int, int], granularity: str, power: bool, key: tuple[int, int] | None, fence: Fence
) -> None:
    """Blocks of 32 along either axis and squares, with float scales and powers of two."""
    lies = "square" if granularity == "square" else "block"
    scale = Scale(granularity=lies, block=32, format=PowerOfTwoScale(direction="floor")) if power else Scale(
        granularity=lies, block=32
    )  # fmt: skip
    fmt = Format(
        element=integer(bits=8, zero="symmetric").element,
        scale=scale,
        rounding="nearest" if key is None else "stochastic",
    )
    block = {"block": (1, 32), "column": (32, 1), "square": (32, 32)}[granularity]
    x = randn(*shape) * torch.logspace(-30, 3, shape[1])
    x[:, ::7] = 0.0
    sharing = sharing_of(fmt, x.shape, axis=None if lies == "square" else int(granularity == "block"))

    found = calls.block_codes(fence.around(x), block, Rule(levels=127.0, key=key), power=power)

    placed, wanted = encode_transformed(x, fmt, sharing, levels=127.0, noise=noise(key, x.shape))
    assert wanted.steps is not None
    assert torch.equal(found.q.float(), placed.joined(wanted.q))
    assert torch.equal(found.scale, wanted.steps.scale.reshape(found.scale.shape))


def laid(a: Tensor, b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(m, k) and (k, n) in the memory of a product's operands."""
    return (a.t() if layout == "grad_weight" else a).contiguous(), (b.t() if layout == "output" else b).contiguous()


PRODUCTS = [(1, 1, 1), (33, 130, 41), (130, 48, 144)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", variants.LAYOUTS)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_products_have_every_bit_of_the_definition(
    shape: tuple[int, int, int], layout: str, dtype: torch.dtype, fence: Fence
) -> None:
    """Scales of rows and columns or of the whole, zero points on either side, with and without a bias."""
    m, k, n = shape
    a, b = codes(m, k, 1), codes(k, n, 2)
    left, right = (fence.around(q) for q in laid(a, b, layout))
    one, each = torch.tensor([0.37]), randn(max(m, n), seed=3)
    three = torch.tensor([3], dtype=torch.int32)
    for zeros, rows, columns, bias in (
        ((0, 0), each[:m], each[:n], randn(n)), ((3, 0), one, each[:n], None), ((3, 3), one, one, randn(n)),
    ):  # fmt: skip
        given = [three if zero else None for zero in zeros]

        found = calls.int8_mm(
            layout,
            Codes(q=left, scale=rows.clone(), zero=given[0]),
            Codes(q=right, scale=columns.clone(), zero=given[1]),
            bias,
            dtype,
        )

        assert torch.equal(found, multiply_codes(a, b, zeros, (rows, columns), bias, dtype))


@pytest.mark.parametrize("layout", variants.LAYOUTS)
def test_sums_beyond_32_bits_are_cut(layout: str, monkeypatch: pytest.MonkeyPatch, fence: Fence) -> None:
    """A launch sums as many products as 32 bits hold, or here 64; the parts are added."""
    assert calls.MOST_SUMMED * 255**2 < 2**31
    monkeypatch.setattr(calls, "MOST_SUMMED", 64)
    a, b, bias = codes(3, 200, 1), codes(200, 5, 2), randn(5)
    zero, one = torch.tensor([-128], dtype=torch.int32), torch.ones(1)
    left, right = (fence.around(q) for q in laid(a, b, layout))

    found = calls.int8_mm(
        layout, Codes(q=left, scale=one, zero=zero), Codes(q=right, scale=one, zero=zero), bias, torch.float32
    )

    assert torch.equal(found, ((a.long() + 128) @ (b.long() + 128)).float() + bias)


@pytest.mark.parametrize("layout", variants.LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 130, 41), (64, 96, 80)])
def test_products_in_blocks_have_every_bit_of_their_formula(
    shape: tuple[int, int, int], layout: str, fence: Fence
) -> None:
    """``sum_b S_a S_b sum_k q q`` in float32, block after block, plus bias."""
    m, k, n = shape
    a, b = codes(m, k, 1), codes(k, n, 2)
    blocks = -(-k // calls.BLOCK)
    rows, columns, bias = randn(blocks, m, seed=3), randn(blocks, n, seed=4), randn(n)
    wanted = torch.zeros(m, n)
    for i in range(blocks):
        part = slice(i * calls.BLOCK, (i + 1) * calls.BLOCK)
        wanted += (a[:, part].int() @ b[part].int()).float() * rows[i][:, None] * columns[i]
    left, right = (fence.around(q) for q in laid(a, b, layout))

    for dtype in (torch.float32, torch.bfloat16):
        found = calls.int8_mm_blocks(layout, Codes(q=left, scale=rows), Codes(q=right, scale=columns), bias, dtype)

        assert torch.equal(found, (wanted + bias).to(dtype))


@pytest.mark.parametrize("chunks", [1, 5, 37])
@pytest.mark.parametrize("channels", [1, 130, 144])
def test_chunks_have_the_extremes_and_sums_of_their_codes(chunks: int, channels: int, fence: Fence) -> None:
    """Each with the first row that has it; chunks of one row, and ones that differ by a row."""
    q = codes(37, channels, 1) // 32  # so that extremes come several times

    found = norm.chunk_statistics(fence.around(q), chunks)

    lengths, starts = chunk_lengths(37, chunks, 1)
    for k, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        part = q[start : start + length].int()
        high, low = part.max(0), part.min(0)
        assert torch.equal(found.largest[k], high.values)
        assert torch.equal(found.smallest[k], low.values)
        first_high, first_low = ((part == v.values).int().argmax(0) + start for v in (high, low))
        assert torch.equal(found.at_largest[k], first_high.int())
        assert torch.equal(found.at_smallest[k], first_low.int())
        assert torch.equal(found.total[k], part.sum(0).int())


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (37, 130), (40, 144)])
def test_normalised_codes_have_every_bit_of_their_formula(shape: tuple[int, int], rectify: bool, fence: Fence) -> None:
    """``a q + b``, with a ReLU and without: as values, and as the codes that the definition gives of these values."""
    q, a, b = fence.around(codes(*shape, 1)), fence.around(randn(shape[1], seed=1)), fence.around(randn(shape[1]))
    wanted = q.float() * a + b
    wanted = wanted.relu() if rectify else wanted

    for dtype in (torch.bfloat16, torch.float32):
        y, ends = norm.normalize(q, a, b, dtype, rectify=rectify)
        assert torch.equal(y, wanted.to(dtype))

    for zero, levels, key in (("symmetric", 127.0, KEY), ("integer", 255.0, None)):
        fmt = integer(bits=8, zero=zero, rounding="nearest" if key is None else "stochastic")
        of = encode(wanted, fmt, levels=levels, noise=noise(key, wanted.shape))
        assert of.steps is not None
        found = norm.normalized_codes(
            q, a, b, ends, Rule(levels=levels, key=key), rectify=rectify, symmetric=zero == "symmetric"
        )
        shift = 0 if found.zero is None else 128
        assert torch.equal(found.q.float() + shift, of.q)
        assert torch.equal(found.scale, of.steps.scale.flatten())
        assert found.zero is None or int(found.zero) + shift == int(of.steps.zero)


@pytest.mark.parametrize("channels", [1, 130, 144])
def test_sums_of_codes_are_exact(channels: int, fence: Fence) -> None:
    """Of one tensor, and of the products with another."""
    g, q = codes(70, channels, 1), codes(70, channels, 2)

    found = norm.code_sums(fence.around(g), fence.around(q))

    assert torch.equal(found[0], g.long().sum(0))
    assert torch.equal(found[1], (g.long() * q.long()).sum(0))


def test_canaries_see_what_is_written_beyond_a_tensor() -> None:
    """A launch for one row too many overwrites them: without this, the fence would prove nothing."""
    fence = Fence()
    x = fence.around(randn(16, 128))
    codes_of, scale = fence.new((16, 128), torch.int8), fence.new((16,), torch.float32)
    bits, empty = fence.around(torch.zeros(16, dtype=torch.int32)), torch.zeros(2, dtype=torch.int32)
    bytes_, floats = torch.zeros(1, dtype=torch.int8), torch.zeros(1)
    target = variants.Target(by="row", noisy=False)
    variant = variants.range_codes(target, torch.float32, aligned=True)

    for rows, broken in ((16, False), (17, True)):
        variant.launch(
            1, x, bits, empty, empty, codes_of, bytes_, bytes_, scale, floats, floats, empty, rows, 128,
            127.0, 1.0, 127.0, 0.0, 0.0, 0, 0, 0, 0, 1,
        )  # fmt: skip
        assert bool(fence.broken()) == broken


def test_canaries_show_what_is_read_beyond_a_tensor() -> None:
    """A sum of one number too many has another result."""
    fence = Fence()
    a, b = fence.around(codes(4, 32, 1)), fence.around(codes(32, 5, 2).t().contiguous())
    one, none = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    found = []
    for k in (32, 33):
        out = torch.empty(4, 5)
        variant = variants.int8_mm("output", torch.float32, aligned=False)
        variant.launch(1, a, b, out, one, one, none, none, none, none, one, 4, 5, 32, 0, k, 0, 0, 0, 0, 0)
        found.append(out)

    assert torch.equal(found[0], (a.long() @ b.long().t()).float())
    assert not torch.equal(found[0], found[1])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors go the way of CUDA tensors."""
    monkeypatch.setattr(choice.Triton, "devices", ("cpu",))
    caches = (choice._whys, choice._warn_once, choice.route)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


AFFINE = integer(bits=8, zero="integer")
RECIPES = {name: Recipe.from_name(name) for name in ("int8", "cpt-int8", "jetfire", "mxint8")} | {
    "affine": recipe_of(
        AFFINE, grad_input__grad_output=AFFINE.replace(rounding="stochastic"), output__weight=AFFINE.replace(bits=5)
    ),
    "blocks beside rows": recipe_of(
        integer(bits=8, zero="symmetric", granularity="block", block=32),
        output__input=integer(bits=6, zero="symmetric", granularity="row", rounding="nearest"),
        grad_weight__grad_output=integer(bits=8, zero="symmetric"),
    ),
}


def step(x: Tensor, w: Tensor, b: Tensor, setting: Setting) -> tuple[list[Tensor], list[ProductRun]]:
    """Output and gradients of a linear layer, and its products."""
    runs: list[ProductRun] = []
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    with watch.observed_by(runs.append):
        y = functional.linear(*leaves, setting=setting)
        grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=9).to(y))
    return [y.detach(), *grads], runs


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("rows", "dtype"), [((2, 3), torch.float32), ((33,), torch.bfloat16)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_layer_gives_what_the_reference_gives(name: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Contract 5: the same operands bit for bit, and results within 1e-5 of the product of their absolute values."""
    setting = Setting(recipe=RECIPES[name], noise=CounterNoise(key=step_key(1, torch.tensor(2)), layer="layer"))
    tensors = [t.to(dtype) for t in (randn(*rows, 70, seed=1) + 0.3, randn(40, 70, seed=2), randn(40, seed=3))]

    ours, fast = step(*tensors, dataclasses.replace(setting, engine="triton"))
    theirs, slow = step(*tensors, dataclasses.replace(setting, engine="reference"))

    assert {run.kernel.split("_blocks")[0] for run in fast} == {"triton::int8_mm"}
    assert len(fast) == 3
    for one, two in zip(fast, slow, strict=True):
        for operand, run in one.operands.items():
            assert torch.equal(run.quantized, two.operands[operand].quantized), f"{operand} in {one.product}"
            assert run.clipped == two.operands[operand].clipped
    bounds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "output": lambda p, q: p @ q.t(), "grad_input": lambda p, q: p @ q, "grad_weight": lambda p, q: p.t() @ q,
    }  # fmt: skip
    for one, two, run in zip(ours, theirs, slow, strict=False):  # the bias's gradient has no run
        p, q = (operand.quantized.double().abs().flatten(0, -2) for operand in run.operands.values())
        limit = 1e-5 * bounds[run.product](p, q).reshape(one.shape) + 1e-5
        if dtype == torch.bfloat16:
            limit = 1.01 * limit + 2.0**-7 * two.double().abs()
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert ((one.double() - two.double()).abs() <= limit).all(), run.product


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("rows", "k", "n"), [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
@pytest.mark.parametrize("name", ["int8", "jetfire"])
def test_empty_operands_give_what_the_reference_gives(name: str, rows: int, k: int, n: int) -> None:
    """No rows, nothing to sum, no outputs."""
    setting = Setting(recipe=RECIPES[name], noise=CounterNoise(key=step_key(1, torch.tensor(2)), layer="layer"))
    tensors = randn(rows, k), randn(n, k), randn(n)

    ours, _ = step(*tensors, dataclasses.replace(setting, engine="triton"))
    theirs, _ = step(*tensors, dataclasses.replace(setting, engine="reference"))

    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_self_test_passes_here_and_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is silent about right kernels, names the product of a wrong one, and says what a launch raised."""
    assert engine.self_test("cpu") == ""

    plain = calls.int8_mm
    monkeypatch.setattr(calls, "int8_mm", lambda layout, *rest: plain(layout, *rest) + (layout == "grad_weight"))
    assert engine.self_test("cpu") == "products of 8-bit codes are wrong on this GPU (grad_weight, 1x1x1)"

    def raises(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(calls, "range_codes", raises)
    assert engine.self_test("cpu") == "the kernels do not run on this GPU: RuntimeError: out of resources"
