"""The native kernel of attention equals the definition, for every call that it takes."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.test_definition import INT8, results
from tests.helpers import threads
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lowbit.attention import native
from lowbit.attention.function import refusal
from lowbit.functional import attention
from lowbit.kernels import operators
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import FP32
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.products import watch
from lowbit.products.setting import Setting

pytestmark = pytest.mark.skipif(bool(refusal(INT8)), reason=f"no native attention: {refusal(INT8)}")

NOISE = CounterNoise(key=step_key(0, torch.tensor(3)), layer="attention")


def setting(engine: str, recipe: Recipe = INT8) -> Setting:
    """The recipe on an engine."""
    return Setting(recipe=recipe, engine=engine, noise=NOISE)


def both(inputs: tuple[Tensor, ...], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients on the kernel, which must be what runs, and by the definition."""
    seen: list[str] = []
    with watch.counted_by(lambda call: seen.append(call.engine)):
        kernel = results(attention(*inputs, **options, setting=setting("int8")), inputs)
    assert seen == ["int8"] * 7
    return kernel, results(attention(*inputs, **options, setting=setting("reference")), inputs)


def assert_near(inputs: tuple[Tensor, ...], kernel: list[Tensor], definition: list[Tensor]) -> None:
    """They have nan and inf at the same places, and all others agree but for single codes.

    A code may lie on the other side of a half, since exp differs in the last bit. A code is at most 1/127 of the
    largest number that shares its scale, which bounds what one can change. Gradients of scores are differences, so they
    are exact only to a rounding of what they are the difference of.
    """
    q, k, v = (x.detach().float().nan_to_num(posinf=0, neginf=0).abs().amax() if x.numel() else 0 for x in inputs)
    slope = 8 * inputs[2].shape[-1] * v
    rounding = 2**-7 if kernel[0].dtype == torch.bfloat16 else 1e-5
    for x, y, terms in zip(kernel, definition, (0, slope * k, slope * q, 0), strict=True):
        assert x.shape == y.shape
        assert torch.equal(x.isnan(), y.isnan())
        a, b = x.detach().float().nan_to_num(), y.detach().float().nan_to_num()
        if not a.numel():
            continue
        size, off = float(b.abs().max()), (a - b).abs()
        assert float(off.max()) <= size * (0.02 + rounding) + rounding * terms
        assert float((off > size * rounding + rounding * terms).float().mean()) < 0.15


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Shapes, strides, types, masks and options of a call, with values around many sizes."""
    batch, groups, sharing = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 130])), draw(st.sampled_from([0, 1, 5, 64, 67, 129]))
    size, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = draw(st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)]))

    def tensor(heads: int, length: int, n: int) -> Tensor:
        shape = (batch, heads, length, n)
        lying = torch.randn([shape[i] for i in order], generator=generator) * draw(st.sampled_from([1e-3, 1.0, 3.0]))
        return lying.permute([order.index(i) for i in range(4)]).to(dtype).requires_grad_()

    heads = groups * sharing
    inputs = tensor(heads, queries, size), tensor(groups, keys, size), tensor(groups, keys, width)
    options: dict[str, Any] = {"causal": draw(st.booleans()), "dropout": draw(st.sampled_from([0.0, 0.3]))}
    shape = draw(
        st.sampled_from([None, (1, 1, 1, keys), (queries, keys), (batch, heads, queries, keys), (heads, 1, 1)])
    )
    if shape is not None:
        kind = draw(st.sampled_from([torch.bool, torch.float32, torch.bfloat16, torch.float64]))
        mask = torch.randn(shape, generator=generator)
        options["mask"] = mask > -0.5 if kind == torch.bool else mask.masked_fill(mask < -1, -math.inf).to(kind)
    return inputs, options


@given(calls())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_it_equals_the_definition(case: tuple[tuple[Tensor, ...], dict[str, Any]]) -> None:
    """Outputs and gradients agree over shapes, strides, types, masks, dropout and groups of heads."""
    inputs, options = case

    assert_near(inputs, *both(inputs, **options))


def tensors(*shape: int, count: int = 3) -> tuple[Tensor, ...]:
    """Float32 tensors of one shape that need gradients."""
    torch.manual_seed(0)
    return tuple(torch.randn(shape).requires_grad_() for _ in range(count))


def test_almost_all_numbers_agree_to_rounding() -> None:
    """Of outputs and gradients of 2 x 4 heads of 200 positions, 97 % differ by less than 1e-5 of the largest."""
    kernel, definition = both(tensors(2, 4, 200, 64), causal=True)

    for a, b in zip(kernel, definition, strict=True):
        off = ((a - b).abs() / b.abs().max()).detach()
        assert float((off < 1e-5).float().mean()) > 0.97
        assert float(off.max()) < 0.02


def test_it_is_near_float64_and_not_equal() -> None:
    """Outputs and gradients lie 0.1 to 3 % from those of float64, as the definition's do."""
    inputs = tensors(2, 4, 200, 64)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)

    kernel, _ = both(inputs, causal=True)

    wanted = results(F.scaled_dot_product_attention(*wide, is_causal=True), wide)
    for a, b in zip(kernel, wanted, strict=True):
        assert 0.001 < (a - b).norm() / b.norm() < 0.03


@pytest.mark.parametrize("options", [{"causal": True}, {"dropout": 0.2}], ids=str)
def test_one_and_two_threads_give_the_same_bits(options: dict[str, Any]) -> None:
    """Outputs and gradients are equal bit for bit, and so is a second run."""
    inputs = tensors(3, 4, 150, 48)
    found = []
    for count in (1, 2, 2):
        with threads(count):
            found.append(results(attention(*inputs, **options, setting=setting("int8")), inputs))

    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_memory_may_be_a_slice_of_one_projection() -> None:
    """q, k and v that are parts of one tensor give the bits of their dense copies."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 70, 3, 4, 32)
    parts = tuple(x.transpose(1, 2) for x in qkv.unbind(2))

    found, dense = (attention(*each, setting=setting("int8")) for each in (parts, [x.contiguous() for x in parts]))

    assert torch.equal(found, dense)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_surface_where_the_definition_has_them(bad: float, which: int) -> None:
    """Outputs and gradients are nan in the same places."""
    inputs = tensors(2, 2, 100, 16)
    with torch.no_grad():
        inputs[which][0, 1, 70, 2] = bad

    kernel, definition = both(inputs, causal=True)

    assert bool(kernel[0].isnan().any())
    assert_near(inputs, kernel, definition)


def test_a_gradient_that_is_not_finite_surfaces() -> None:
    """A nan in grad_output makes nan of dq, dk and dv of its head alone."""
    inputs = tensors(1, 2, 70, 16)
    y = attention(*inputs, setting=setting("int8"))
    g = torch.ones_like(y)
    g[0, 1, 3, 4] = math.nan

    grads = torch.autograd.grad(y, inputs, g)

    for grad in grads:
        assert bool(grad[0, 1].isnan().any())
        assert bool(grad[0, 0].isfinite().all())


def test_a_fully_masked_row_is_zero() -> None:
    """Its output and gradients are 0 and all others finite, with two kinds of masks."""
    inputs = tensors(1, 2, 70, 16)
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[[3, 69]] = False

    for each in (mask, torch.zeros(70, 70).masked_fill(~mask, -math.inf)):
        y, dq, *rest = both(inputs, mask=each)[0]

        assert not y[:, :, [3, 69]].any()
        assert not dq[:, :, [3, 69]].any()
        assert all(bool(x.isfinite().all()) for x in (y, dq, *rest))


class TestEngine:
    """When the kernel runs, and what says so."""

    def test_what_it_does_not_take_runs_on_the_reference(self) -> None:
        """float64, and a mask that needs a gradient: the count says reference."""
        q, k, v = tensors(1, 2, 9, 8)
        mask = torch.zeros(9, 9).requires_grad_()
        seen: list[str] = []

        with watch.counted_by(lambda call: seen.append(call.engine)):
            attention(q.double(), k.double(), v.double(), setting=setting("int8"))
            attention(q, k, v, mask, setting=setting("int8"))

        assert seen == ["reference"] * 4

    @pytest.mark.parametrize(
        ("changes", "why"),
        [({"tile": 32}, "tiles of 32"), ({"dp": FP32}, "dp: fp32"), ({"v": FP32}, "v: fp32")],
        ids=str,
    )
    def test_refusal_says_why(self, changes: dict[str, Any], why: str) -> None:
        """A format that the kernel does not compute is named."""
        assert INT8.attention is not None

        assert why in refusal(INT8.replace(attention=dataclasses.replace(INT8.attention, **changes)))

    def test_fewer_bits_run_too(self) -> None:
        """4-bit codes and signed shares on the kernel equal the definition."""
        table = INT8.attention
        assert table is not None
        few = table.q.replace(bits=4)
        names = ("q", "k", "v", "grad_output", "ds")
        recipe = INT8.replace(attention=dataclasses.replace(table, **dict.fromkeys(names, few), p=table.q))
        inputs = tensors(1, 2, 100, 16)

        kernel, definition = (
            results(attention(*inputs, setting=setting(engine, recipe)), inputs) for engine in ("int8", "reference")
        )

        for a, b in zip(kernel, definition, strict=True):
            assert (a - b).norm() < 0.01 * b.norm()

    def test_the_profiler_and_the_counter_of_torch_see_it(self) -> None:
        """One operator forward, one backward, and as many operations as torch's own attention."""
        inputs = tensors(1, 2, 128, 64)

        def run() -> None:
            attention(*inputs, causal=True, setting=setting("int8")).sum().backward()

        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            run()
        with FlopCounterMode(display=False) as counter:
            run()

        calls = {row.key: row.count for row in profiled.key_averages() if row.key.startswith("lowbit::")}
        assert calls == {"lowbit::attention_forward": 1, "lowbit::attention_backward": 1}
        assert counter.get_total_flops() == 7 * 2 * 2 * 128 * 128 * 64

    def test_the_operators_pass_opcheck(self) -> None:
        """Schema, fake kernel and mutation of both."""
        q, k, v = (x.detach() for x in tensors(1, 2, 70, 16))
        out, lse = torch.empty(1, 2, 70, 16), torch.empty(1, 2, 70)
        at = [2 * 70 * 16, 70 * 16, 16]
        flat = [x.flatten() for x in (q, k, v)]
        common = (
            *(part for x in flat for part in (x, at)),
            *(None, [0, 0, 0, 0], [1, 2, 2, 70, 70, 16, 16], [127.0, 127.0, 255.0, 127.0, 127.0, 127.0]),
            *(0.25, True, True, 0.0, None),
        )
        tests = ("test_schema", "test_faketensor")

        torch.library.opcheck(operators.attention_forward.operator, (*common, out.flatten(), at, lse), test_utils=tests)
        grads = (part for _ in range(3) for part in (torch.empty(2 * 70 * 16), at))
        torch.library.opcheck(
            operators.attention_backward.operator, (flat[0], at, *common, flat[1], at, lse, *grads), test_utils=tests
        )

    def test_what_lies_outside_of_memory_is_refused(self) -> None:
        """Steps beyond a tensor's memory, and results that overlap an input, raise before anything is written."""
        x = torch.zeros(2 * 70 * 16)
        at = [2 * 70 * 16, 70 * 16, 16]
        rest = (None, [0] * 4, [1, 2, 2, 70, 70, 16, 16], [127.0] * 6, 0.25, True, True, 0.0, None)

        with pytest.raises(ValueError, match="q has"):
            operators.attention_forward(
                x, [0, 70 * 16, 17], x, at, x, at, *rest, torch.zeros_like(x), at, torch.zeros(140)
            )
        with pytest.raises(ValueError, match="overlaps"):
            operators.attention_forward(x, at, x, at, x, at, *rest, x, at, torch.zeros(140))


def test_it_keeps_no_matrix_of_scores() -> None:
    """What the forward of 1,024 positions keeps for the backward is less than one byte of each score."""
    inputs = tensors(1, 1, 1024, 16)
    held: list[int] = []

    def pack(x: Tensor) -> Tensor:
        held.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*inputs, setting=setting("int8"))

    assert 0 < sum(held) < 1024 * 1024 / 2


def test_the_kernels_tile_is_the_recipes() -> None:
    """The stored recipes have the tile that the kernel has."""
    for name in ("int8-attention", "sbm8-attention"):
        recipe = Recipe.from_name(name)
        assert recipe.attention is not None
        assert recipe.attention.tile == native.TILE
