"""The definition of attention in plain torch: full precision is torch's own, quantised is near it."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit.errors import UsageError
from lowbit.functional import attention
from lowbit.methods.attention import OPERANDS, Attention
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import BF16, FP32, Format
from lowbit.numerics.rounding import CounterNoise, RecordedNoise, step_key
from lowbit.products import watch
from lowbit.products.setting import Setting

NAMES = ("q", "k", "p", "v", "grad_output", "ds", "dp")
INT8 = Recipe.from_name("int8-attention")


def full_precision(tile: int = 5, *, smooth_k: bool = True) -> Recipe:
    """A recipe whose attention rounds nothing."""
    table = Attention(**dict.fromkeys(NAMES, FP32), smooth_k=smooth_k, tile=tile)
    return INT8.replace(attention=table)


def tensors(
    queries: int, keys: int, *, heads: int = 4, groups: int = 4, size: int = 6, width: int = 6, dtype: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of 2 samples that need gradients."""
    shapes = (heads, queries, size), (groups, keys, size), (groups, keys, width)
    q, k, v = (torch.randn(2, *shape, dtype=dtype or torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def results(y: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """An output, and the gradients of inputs for one that does not depend on the output."""
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, g)]


MASKS = {
    "none": {},
    "causal": {"causal": True},
    "boolean": {"mask": torch.rand(13, 17, generator=torch.Generator().manual_seed(0)) > 0.3},
    "padding": {"mask": torch.arange(17).expand(2, 1, 1, 17) < torch.tensor([17, 4]).view(2, 1, 1, 1)},
    "float": {"mask": torch.randn(4, 13, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_without_rounding_it_is_the_attention_of_torch(options: dict[str, Any], tile: int) -> None:
    """In float64 outputs and gradients equal those of scaled_dot_product_attention to 1e-12, for any tiles."""
    inputs = tensors(13, 17)
    theirs = {"attn_mask": options.get("mask"), "is_causal": options.get("causal", False)}

    found = results(attention(*inputs, **options, setting=Setting(recipe=full_precision(tile))), inputs)

    for a, b in zip(found, results(F.scaled_dot_product_attention(*inputs, **theirs), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_heads_of_keys_may_be_fewer_and_sizes_may_differ() -> None:
    """Six heads of queries on two of keys, values of another width, a scale of one's own: as torch with enable_gqa."""
    inputs = tensors(7, 9, heads=6, groups=2, size=5, width=3)

    found = results(attention(*inputs, scale=0.3, setting=Setting(recipe=full_precision())), inputs)

    wanted = results(F.scaled_dot_product_attention(*inputs, scale=0.3, enable_gqa=True), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_float_mask_gets_its_gradient() -> None:
    """A mask that is broadcast over samples and queries has the gradient of torch's own attention."""
    q, k, v = tensors(7, 9)
    mask = torch.randn(4, 1, 9, dtype=torch.float64).requires_grad_()

    found = results(attention(q, k, v, mask, setting=Setting(recipe=full_precision())), (mask,))

    wanted = results(F.scaled_dot_product_attention(q, k, v, mask), (mask,))
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_leading_axes_may_be_any(dim: int) -> None:
    """Without samples, without heads and with two axes of samples it gives the shape and values of torch's."""
    shape = (2, 3, 4, 7, 6)[5 - dim :]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.rand((*shape[:-2], 7, 7)) > 0.3

    found = attention(q, k, v, mask, setting=Setting(recipe=full_precision()))

    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-12, atol=1e-12)


def test_quantised_attention_is_near_and_not_equal() -> None:
    """Outputs and gradients of `int8-attention` lie 0.1 to 3 % from those in float64."""
    torch.manual_seed(0)
    inputs = tensors(150, 150, size=32, width=32)

    found = results(attention(*inputs, causal=True, setting=Setting(recipe=INT8)), inputs)

    for a, b in zip(found, results(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs), strict=True):
        assert 0.001 < (a - b).norm() / b.norm() < 0.03


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    """Its output and gradients are 0, with a boolean mask and with -inf, and the others are as without it."""
    q, k, v = tensors(6, 9)
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[2] = False

    for given in (mask, torch.zeros(6, 9, dtype=torch.float64).masked_fill(~mask, -math.inf)):
        y, dq, *rest = results(attention(q, k, v, given, setting=Setting(recipe=INT8)), (q, k, v))

        assert not y[:, :, 2].any()
        assert not dq[:, :, 2].any()
        assert all(bool(x.isfinite().all()) and bool(x.any()) for x in (y, dq, *rest))


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 9)])
def test_sequences_may_be_empty_or_short(queries: int, keys: int) -> None:
    """Shapes are torch's, and without keys the output is 0."""
    inputs = tensors(queries, keys, dtype=torch.float32)

    y, *grads = results(attention(*inputs, causal=True, setting=Setting(recipe=INT8)), inputs)

    assert y.shape == (2, 4, queries, 6)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert keys > 0 or not y.any()


def test_smoothing_keeps_what_all_keys_share_out_of_the_codes() -> None:
    """Keys around 50 lose the scores without smoothing, and keep them with it."""
    q, k, v = tensors(40, 40, dtype=torch.float32)
    k = (k + 50).detach().requires_grad_()
    wanted = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for smooth_k in (True, False):
        assert INT8.attention is not None
        recipe = INT8.replace(attention=dataclasses.replace(INT8.attention, smooth_k=smooth_k))
        y = attention(q, k, v, setting=Setting(recipe=recipe))
        errors.append(float((y - wanted).detach().norm() / wanted.detach().norm()))

    assert errors[0] < 0.02
    assert errors[1] > 4 * errors[0]


class TestDropout:
    """Dropped shares, from counter-based noise."""

    noise = CounterNoise(key=step_key(0, torch.tensor(3)), layer="attention")

    def test_it_drops_the_same_shares_in_both_directions(self) -> None:
        """Output and gradients are those of a softmax times the same mask over 1 - p."""
        inputs = q, k, v = tensors(13, 17)
        kept = self.noise.draw("attention", "dropout", torch.empty(2, 4, 13, 17)) >= 0.4

        found = results(
            attention(q, k, v, dropout=0.4, setting=Setting(recipe=full_precision(), noise=self.noise)), inputs
        )

        wanted = results(torch.softmax(q @ k.mT / 6**0.5, -1) * kept / 0.6 @ v, inputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_recorded_noise_replays_it(self) -> None:
        """The draws of the counter-based noise, recorded, give the same output."""
        inputs = tensors(13, 17)
        draws = self.noise.draw("attention", "dropout", torch.empty(2, 4, 13, 17))
        recorded = RecordedNoise(draws={("attention", "dropout"): draws})

        a, b = (
            attention(*inputs, dropout=0.4, setting=Setting(recipe=INT8, noise=noise))
            for noise in (self.noise, recorded)
        )

        assert torch.equal(a, b)

    def test_it_needs_noise(self) -> None:
        """Without noise, dropout raises."""
        with pytest.raises(ValueError, match="dropout needs noise"):
            attention(*tensors(3, 3), dropout=0.4, setting=Setting(recipe=INT8))


def test_stochastic_codes_keep_the_mean() -> None:
    """With ds and grad_output rounded by noise, the mean of 200 gradients lies nearer to full precision than one."""
    torch.manual_seed(0)
    inputs = tensors(20, 20, heads=1, groups=1, dtype=torch.float32)
    table = INT8.attention
    assert table is not None
    noisy = table.ds.replace(bits=4, rounding="stochastic")
    recipe = INT8.replace(attention=dataclasses.replace(table, ds=noisy, grad_output=noisy))
    wanted = results(F.scaled_dot_product_attention(*inputs), inputs)[1:]

    found = [
        results(
            attention(
                *inputs,
                setting=Setting(recipe=recipe, noise=CounterNoise(key=step_key(0, torch.tensor(i)), layer="a")),
            ),
            inputs,
        )[1:]
        for i in range(200)
    ]

    for i, exact in enumerate(wanted):
        mean = torch.stack([grads[i] for grads in found]).mean(0)
        assert (mean - exact).norm() < 0.3 * (found[0][i] - exact).norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_surfaces_as_nan(bad: float, which: int) -> None:
    """A nan or inf in q, k or v gives nan, never a large number."""
    inputs = [x.detach().clone() for x in tensors(70, 70, dtype=torch.float32)]
    inputs[which][0, 1, 65, 2] = bad

    y = attention(*inputs, setting=Setting(recipe=INT8))

    assert bool(y[0, 1].isnan().any())
    assert not bool(y.isinf().any())
    assert bool(y[1].isfinite().all())
    assert bool(y[0, 0].isfinite().all())


class TestRefused:
    """What does not fit, and what the message says."""

    def test_a_recipe_without_attention(self) -> None:
        """`int8` says nothing of attention."""
        with pytest.raises(UsageError, match="'int8-attention'"):
            attention(*tensors(3, 3), setting=Setting(recipe=Recipe.from_name("int8")))

    @pytest.mark.parametrize("dropout", [1.0, -0.1])
    def test_a_dropout_that_is_no_probability(self, dropout: float) -> None:
        """From 0 to below 1."""
        with pytest.raises(UsageError, match="dropout"):
            attention(*tensors(3, 3), dropout=dropout, setting=Setting(recipe=INT8))

    def test_heads_that_do_not_divide(self) -> None:
        """Four heads of queries on three of keys."""
        with pytest.raises(RuntimeError, match="multiple of G"):
            attention(*tensors(3, 3, groups=3), setting=Setting(recipe=INT8))

    def test_a_mask_of_another_shape(self) -> None:
        """A mask that does not broadcast."""
        with pytest.raises(RuntimeError, match="does not broadcast"):
            attention(*tensors(3, 4), torch.ones(3, 5, dtype=torch.bool), setting=Setting(recipe=INT8))

    def test_a_mask_of_whole_numbers(self) -> None:
        """0 and 1 as int64 are no mask."""
        with pytest.raises(TypeError, match="boolean or a floating-point"):
            attention(*tensors(3, 4), torch.ones(3, 4, dtype=torch.int64), setting=Setting(recipe=INT8))

    def test_a_second_derivative(self) -> None:
        """create_graph=True raises."""
        inputs = tensors(3, 4)
        y = attention(*inputs, setting=Setting(recipe=INT8))

        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(y.sum(), inputs, create_graph=True)

    @pytest.mark.parametrize(
        "fmt",
        [
            lowbit.formats.integer(bits=8, zero="symmetric", granularity="row"),
            lowbit.formats.integer(bits=8, zero="symmetric", running=0.9),
            lowbit.formats.integer(bits=8, zero="symmetric", transform="centred"),
        ],
        ids=str,
    )
    def test_a_format_that_no_tile_has(self, fmt: Format) -> None:
        """Rows, running ranges and transforms are refused when the recipe is made."""
        with pytest.raises(UsageError, match=r"attention\.k"):
            Attention(**{**dict.fromkeys(NAMES, BF16), "k": fmt})


def test_autocast_decides_the_dtype() -> None:
    """Under bf16 autocast the output is bf16, and float32 inputs get float32 gradients."""
    inputs = tensors(9, 9, dtype=torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(*inputs, setting=Setting(recipe=INT8))

    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), inputs)} == {torch.float32}


def test_heads_of_the_output_are_joined_without_a_copy() -> None:
    """Its memory is that of (B, L, H, F)."""
    y = attention(*tensors(9, 9, dtype=torch.float32), setting=Setting(recipe=INT8))

    assert y.transpose(1, 2).is_contiguous()


def test_counters_and_observers_see_seven_products() -> None:
    """The scores twice and five more, each with its bits, and the observer has each product and its full self."""
    calls: list[watch.ProductCall] = []
    runs: list[watch.ProductRun] = []
    inputs = tensors(70, 80, heads=4, groups=2, dtype=torch.float32)

    with watch.counted_by(calls.append), watch.observed_by(runs.append):
        attention(*inputs, causal=True, setting=Setting(recipe=INT8)).sum().backward()

    seen = [(call.part, call.product) for call in calls]
    assert sorted(seen) == sorted([*OPERANDS, ("scores", "output")])
    assert [(run.part, run.product) for run in runs] == seen
    assert {call.bits for call in calls if (call.part, call.product) != ("values", "grad_input")} == {(8, 8)}
    assert {call.bits for call in calls if (call.part, call.product) == ("values", "grad_input")} == {(16, 16)}
    assert {call.macs for call in calls} == {2 * 4 * 70 * 80 * 6}
    for run in runs:
        exact = run.full_precision()
        assert exact.shape == run.result.shape
        assert 1e-4 < (exact - run.result).norm() / exact.norm() < 0.05
