"""The int8 engine against the reference engine, which is the definition."""

import dataclasses
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from helpers import recipe_of, threads
from lowbit import UsageError, functional
from lowbit.engines import codes as codes_of
from lowbit.engines import int8, int8_convolutions
from lowbit.engines.base import Product
from lowbit.engines.choice import refusals
from lowbit.kernels import cpu, operators
from lowbit.methods.recipe import SLOTS, Recipe
from lowbit.numerics.elements import Sign
from lowbit.numerics.formats import BF16, FP32, Format, integer
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.numerics.scales import Constant, MeanMagnitude, Scale
from lowbit.numerics.transforms import Clip, TanhMax
from lowbit.products import watch
from lowbit.products.operators import Convolution, Linear
from lowbit.products.setting import Setting
from lowbit.products.watch import ProductCall, ProductRun

needs_units = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")),
    reason=f"int8 engine: {int8.missing('int8') or int8.missing('bf16')}",
)

SYMMETRIC = integer(bits=8, zero="symmetric")
OFFSET = integer(bits=8, zero="offset")
NOISY = integer(bits=8, zero="symmetric", rounding="stochastic")
AFFINE = integer(bits=8, zero="integer")
NOISY_AFFINE = integer(bits=8, zero="integer", rounding="stochastic")
KEPT = integer(bits=8, zero="symmetric", granularity="kept-channel")
PER_OUTPUT = integer(bits=8, zero="symmetric", granularity="output-channel")
DOREFA = Recipe.from_name("dorefa")
SIGN = Format(element=Sign(), scale=Scale(granularity="output-channel", range=MeanMagnitude()))
PER_SAMPLE = integer(bits=8, zero="symmetric", granularity="sample")


RECIPES = {
    "sbm8": Recipe.from_name("sbm8"),
    "int8": Recipe.from_name("int8"),
    "bf16": Recipe.from_name("bf16"),
    "per tensor": recipe_of(SYMMETRIC),
    "all affine": recipe_of(AFFINE, grad_input__grad_output=NOISY_AFFINE, grad_weight__grad_output=NOISY_AFFINE),
    "noisy": recipe_of(NOISY, output__input=AFFINE, grad_weight__input=AFFINE),
    "output channel": recipe_of(AFFINE, output__weight=PER_OUTPUT, grad_input__weight=SYMMETRIC),
    "offsets": recipe_of(
        OFFSET,
        output__weight=OFFSET.replace(granularity="output-channel"),
        grad_input__weight=OFFSET.replace(granularity="kept-channel"),
        grad_input__grad_output=OFFSET.replace(rounding="stochastic"),
        grad_weight__grad_output=OFFSET.replace(rounding="stochastic"),
    ),
    "offsets of few bits": recipe_of(OFFSET.replace(bits=2), output__weight=OFFSET.replace(bits=1)),
    "an offset beside none": recipe_of(
        SYMMETRIC,
        output__input=SYMMETRIC.replace(granularity="row"),
        output__weight=OFFSET,
        grad_input__grad_output=AFFINE,
        grad_input__weight=OFFSET.replace(granularity="kept-channel"),
        grad_weight__input=OFFSET,
    ),
    "none beside an offset": recipe_of(
        SYMMETRIC, output__input=OFFSET, grad_input__grad_output=OFFSET, grad_weight__grad_output=OFFSET
    ),
    # Its gradient in grad_weight is of samples, which that product sums over.
    "dorefa": recipe_of(
        DOREFA.output.input,
        output__weight=DOREFA.output.weight,
        grad_input__weight=DOREFA.output.weight,
        grad_input__grad_output=DOREFA.grad_input.grad_output,
        grad_weight__grad_output=DOREFA.grad_input.grad_output.replace(granularity="tensor"),
    ),
    "signs beside offsets": recipe_of(
        DOREFA.output.input,
        output__weight=DOREFA.output.weight.at(1),
        grad_input__weight=DOREFA.output.weight.at(1),
        grad_input__grad_output=DOREFA.grad_input.grad_output,
        grad_weight__grad_output=SYMMETRIC,
    ),
    "signs and other ranges": recipe_of(
        SYMMETRIC,
        output__weight=SIGN,
        output__input=AFFINE.replace(range=Constant(low=-1.0, high=0.5), transform=Clip(low=-0.5, high=0.75)),
        grad_input__weight=SYMMETRIC.replace(range="mean-magnitude", transform="tanh-max"),
        grad_input__grad_output=OFFSET.replace(range="mean-magnitude", granularity="sample"),
        grad_weight__grad_output=OFFSET.replace(range="mean-magnitude"),
    ),
    "mixed": recipe_of(BF16, output__input=AFFINE, grad_input__weight=KEPT),
}


def noise(seed: int = 0, step: int = 3) -> CounterNoise:
    """The noise of a layer in one step."""
    return CounterNoise(key=step_key(seed, torch.tensor(step)), layer="layer")


@dataclass(kw_only=True)
class Ran:
    """What one forward and backward gave, and each product of it."""

    results: dict[str, Tensor] = field(default_factory=dict)
    calls: list[ProductCall] = field(default_factory=list)
    runs: list[ProductRun] = field(default_factory=list)

    @property
    def engines(self) -> dict[str, str]:
        """How each product was executed."""
        return {call.product: call.engine for call in self.calls}

    def bound(self, product: str) -> Tensor:
        """The product of the absolute operands in float64.

        A value with a float offset is rounded where it is ``q S + o``, so it counts as a hundredth of the largest.
        """
        call = next(call for call in self.calls if call.product == product)
        run = next(run for run in self.runs if run.product == product)
        a, b = (
            x.clamp(min=0.01 * float(x.max())) if operand.format.zero == "offset" and x.numel() else x
            for operand in run.operands.values()
            for x in [operand.quantized.double().abs()]
        )
        if product == "output":
            return call.op.output(a, b)
        shape = call.input if product == "grad_input" else call.weight
        return getattr(call.op, product)(a, b, shape)


# A product of two scales may be denormal and have few digits: what a sum of up to 2**31 loses by that.
SMALLEST = 2.0**-118


def step(
    call: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    setting: Setting,
    *,
    needs: str = "xwb",
    autocast: bool = False,
    grad: Callable[[Tensor], Tensor] = torch.ones_like,
    observed: bool = True,
) -> Ran:
    """One forward and backward of `call` on detached copies that keep their memory layout."""
    ran = Ran()
    leaves = {k: t.detach().requires_grad_(k in needs) for k, t in tensors.items()}
    seen = watch.observed_by(ran.runs.append) if observed else nullcontext()
    with watch.counted_by(ran.calls.append), seen:
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            y = call(*leaves.values(), setting=setting)
        wanted = [t for t in leaves.values() if t.requires_grad]
        grads = torch.autograd.grad(y, wanted, grad(y.detach())) if wanted else ()
    ran.results["output"] = y.detach()
    names = {"x": "grad_input", "w": "grad_weight", "b": "grad_bias"}
    for name, g in zip([k for k, t in leaves.items() if t.requires_grad], grads, strict=True):
        ran.results[names[name]] = g
    return ran


def both(call: Callable[..., Tensor], tensors: dict[str, Tensor], setting: Setting, **options: Any) -> tuple[Ran, Ran]:
    """The same step on the int8 engine and on the reference."""
    one, two = (step(call, tensors, dataclasses.replace(setting, engine=e), **options) for e in ("int8", "reference"))
    return one, two


def assert_equal(fast: Ran, slow: Ran, bias: Tensor | None = None) -> None:
    """Codes identical; results within 1e-5 of the product of the absolute operands, and the rounding of their type."""
    assert fast.results.keys() == slow.results.keys()
    assert [c.product for c in fast.calls] == [c.product for c in slow.calls]
    assert [dataclasses.replace(c, engine="") for c in fast.calls] == [
        dataclasses.replace(c, engine="") for c in slow.calls
    ]
    for ours, theirs in zip(fast.runs, slow.runs, strict=True):
        for name, operand in ours.operands.items():
            expected = theirs.operands[name]
            where = f"{name} in {ours.product}"
            assert torch.equal(operand.exact, expected.exact.to(operand.exact)), where
            assert torch.equal(operand.quantized, expected.quantized.to(operand.quantized)), where
            assert (operand.format, operand.bits, operand.clipped) == (expected.format, expected.bits, expected.clipped)
    for product, ours in fast.results.items():
        theirs = slow.results[product]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), product
        difference = (ours.double() - theirs.double()).abs()
        if product == "grad_bias":
            torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours.dtype == torch.float32 else 2**-7, atol=1e-4)
            continue
        limit = 1e-5 * slow.bound(product).reshape(ours.shape) + SMALLEST
        if product == "output" and bias is not None:
            limit = limit + 1e-6 * bias.double().abs().view(-1, *[1] * (ours.dim() - 2 if ours.dim() > 2 else 0)).max()
        if ours.dtype == torch.bfloat16:
            limit = limit * 1.01 + 2.0**-7 * theirs.double().abs()
        assert (difference <= limit).all(), f"{product}: {(difference - limit).max()} beyond the bound"


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = ["contiguous", "channels last", "transposed", "sliced", "shifted"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "shifted":  # not at the beginning of its memory
        return torch.cat([torch.zeros(7, dtype=x.dtype), x.flatten()])[7:].view(x.shape)
    return x.contiguous()


@dataclass
class Case:
    """One drawn layer: its call, its tensors and its options."""

    call: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    setting: Setting
    options: dict[str, Any]


def draw_options(data: st.DataObject, y_layout: str) -> tuple[Setting, dict[str, Any], torch.dtype]:
    """Recipe, bits, noise; which gradients; autocast and dtypes."""
    recipe = RECIPES[data.draw(st.sampled_from(sorted(RECIPES)), "recipe")]
    bits = data.draw(st.none() | st.lists(st.integers(2, 8), min_size=6, max_size=6), "bits")
    setting = Setting(
        recipe=recipe,
        noise=noise(data.draw(st.integers(0, 99)), data.draw(st.integers(0, 99))),
        bits=None if bits is None else tuple(bits),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), "dtype")
    seed = data.draw(st.integers(0, 99))
    options = {
        "needs": data.draw(st.sampled_from(["xwb", "xwb", "wb", "xb", "x", "w", ""]), "needs"),
        "autocast": data.draw(st.booleans(), "autocast"),
        "grad": lambda y: laid_out(randn(*y.shape, seed=seed).to(y.dtype), y_layout),
    }
    return setting, options, dtype


def draw_linear(data: st.DataObject) -> Case:
    """A linear layer with odd sizes, up to five axes, empty batches."""
    lead = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 33]), min_size=1, max_size=3), "leading")
    assume(math.prod(lead) <= 200)
    k, n = data.draw(st.integers(1, 70), "K"), data.draw(st.integers(1, 70), "N")
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    setting, options, dtype = draw_options(data, layouts[2])
    tensors = {
        "x": laid_out((randn(*lead, k, seed=1) + 0.5).to(dtype), layouts[0]),
        "w": laid_out(randn(n, k, seed=2).to(dtype), layouts[1]),
    }
    if data.draw(st.booleans(), "bias"):
        tensors["b"] = randn(n, seed=3).to(dtype)
    return Case(functional.linear, tensors, setting, options)


def draw_convolution(data: st.DataObject, width: int = 7, taps: int = 3, height: int = 7) -> Case:
    """A convolution or transposed convolution of one to three axes, the last two of at most that size."""
    axes = data.draw(st.integers(1, 3), "axes")
    transposed = data.draw(st.booleans(), "transposed")
    groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
    inputs, outputs = (groups * data.draw(st.sampled_from([1, 2, 3, 5, 17]), "channels") for _ in range(2))
    each = [data.draw(st.lists(st.integers(*r), min_size=axes, max_size=axes).map(tuple)) for r in ((1, 3), (1, 2))]
    (stride, dilation), kernel = each, tuple(data.draw(st.integers(1, taps)) for _ in range(axes))
    padding = tuple(data.draw(st.integers(0, 2)) for _ in range(axes))
    limits = (7, height, width)[-axes:]
    size = tuple(data.draw(st.integers(1, limit)) for limit in limits)
    batch = data.draw(st.sampled_from([0, 1, 1, 2, 3]), "batch")
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    setting, options, dtype = draw_options(data, layouts[2])
    w_shape = (inputs, outputs // groups, *kernel) if transposed else (outputs, inputs // groups, *kernel)
    tensors = {
        "x": laid_out((randn(batch, inputs, *size, seed=1) + 0.5).to(dtype), layouts[0]),
        "w": laid_out(randn(*w_shape, seed=2).to(dtype), layouts[1]),
    }
    if data.draw(st.booleans(), "bias"):
        tensors["b"] = randn(outputs, seed=3).to(dtype)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        geometry["output_padding"] = tuple(
            data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    function = functional.conv_transpose if transposed else functional.conv

    def call(x: Tensor, w: Tensor, b: Tensor | None = None, *, setting: Setting) -> Tensor:
        return function(x, w, b, **geometry, setting=setting)

    try:
        plain = Setting(recipe=Recipe.from_name("fp32"))
        y = call(tensors["x"].float(), tensors["w"].float(), setting=plain)
    except RuntimeError:
        assume(False)
    assume(0 not in y.shape[2:])  # an empty picture is refused, except in some empty batches
    return Case(call, tensors, setting, options)


@needs_units
class TestEquality:
    """Contract 5: the int8 engine gives the reference result."""

    def check(self, case: Case) -> None:
        """Every product runs on its units and gives what the reference gives."""
        fast, slow = both(case.call, case.tensors, case.setting, **case.options)

        assert set(fast.engines.values()) <= {"int8", "bf16"}
        assert set(slow.engines.values()) == {"reference"}
        assert_equal(fast, slow, case.tensors.get("b"))

    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_linear(self, data: st.DataObject) -> None:
        """Linear layers of any shape, memory, recipe, bits and dtype."""
        self.check(draw_linear(data))

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_convolution(self, data: st.DataObject) -> None:
        """Convolutions and transposed convolutions of any geometry, memory, recipe, bits and dtype."""
        self.check(draw_convolution(data))

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_convolution_of_pictures(self, data: st.DataObject) -> None:
        """Convolutions wide enough for rows to be read where they lie in the picture."""
        self.check(draw_convolution(data, width=40, taps=5))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_convolution_of_large_pictures(self, data: st.DataObject) -> None:
        """Convolutions with so many positions that gradients of weights are summed on shifted pictures."""
        self.check(draw_convolution(data, width=40, taps=4, height=24))

    @pytest.mark.parametrize("name", sorted(RECIPES))
    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("shape", [(130, 700, 75), (33, 2100, 40), (1500, 40, 33), (32, 64, 32), (31, 63, 95)])
    def test_linear_of_many_panels(self, shape: tuple[int, int, int], autocast: bool, name: str) -> None:
        """Sizes beyond one panel of rows, columns and one chunk of the sum."""
        rows, k, n = shape
        tensors = {"x": randn(rows, k) + 0.3, "w": randn(n, k, seed=1), "b": randn(n, seed=2)}
        setting = Setting(recipe=RECIPES[name], noise=noise())

        fast, slow = both(functional.linear, tensors, setting, autocast=autocast, grad=lambda y: randn(*y.shape).to(y))

        assert_equal(fast, slow, tensors["b"])

    @pytest.mark.parametrize("name", sorted(RECIPES))
    @pytest.mark.parametrize(
        ("shape", "weight", "geometry"),
        [
            ((2, 40, 19, 23), (70, 40, 3, 3), {"stride": (1, 1), "padding": (1, 1)}),
            ((2, 40, 19, 23), (70, 40, 3, 3), {"stride": (2, 2), "padding": (1, 1)}),
            ((3, 64, 12, 12), (64, 64, 1, 1), {"stride": (2, 2), "padding": (0, 0)}),
            ((2, 96, 9, 9), (96, 1, 3, 3), {"stride": (1, 1), "padding": (1, 1), "groups": 96}),
            ((2, 3, 30, 30), (33, 3, 7, 7), {"stride": (2, 2), "padding": (3, 3)}),
            ((1, 8, 5, 6, 40), (12, 4, 1, 3, 3), {"stride": (1, 2, 1), "padding": (0, 1, 1), "groups": 2}),
        ],
    )
    def test_convolution_of_many_panels(
        self, shape: tuple[int, ...], weight: tuple[int, ...], geometry: dict[str, Any], name: str
    ) -> None:
        """Convolutions as networks have them, also depthwise and the first one of an ImageNet ResNet."""
        dilation = (1,) * (len(shape) - 2)
        tensors = {"x": randn(*shape) + 0.3, "w": randn(*weight, seed=1), "b": randn(weight[0], seed=2)}

        fast, slow = both(
            lambda *t, setting: functional.conv(*t, **geometry, dilation=dilation, setting=setting),
            tensors,
            Setting(recipe=RECIPES[name], noise=noise()),
            grad=lambda y: randn(*y.shape),
        )

        assert_equal(fast, slow, tensors["b"])

    @pytest.mark.parametrize("transposed", [False, True])
    def test_scales_per_sample(self, transposed: bool) -> None:
        """A convolution whose input and gradient have a scale for each sample, which sum over in grad_weight no one."""
        recipe = recipe_of(SYMMETRIC, output__input=PER_SAMPLE, grad_input__grad_output=PER_SAMPLE)
        x = randn(3, 4, 5, 6) * torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1, 1)
        call = functional.conv_transpose if transposed else functional.conv
        geometry: dict[str, Any] = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)}
        geometry |= {"output_padding": (0, 0)} if transposed else {}

        fast, slow = both(
            lambda *t, setting: call(*t, **geometry, setting=setting),
            {"x": x, "w": randn(4, 4, 3, 3, seed=1)},
            Setting(recipe=recipe),
        )

        assert set(fast.engines.values()) == {"int8"}
        assert_equal(fast, slow)

    def test_the_bound_is_two_sided(self) -> None:
        """Integer sums are not those of float32: the engines differ in some last digit, so both really ran."""
        tensors = {"x": randn(64, 300), "w": randn(50, 300, seed=1)}

        fast, slow = both(functional.linear, tensors, Setting(recipe=RECIPES["int8"], noise=noise()))

        assert not torch.equal(fast.results["output"], slow.results["output"])

    @pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-14, 1e15, 1e18])
    def test_tiny_and_huge_operands(self, scale: float) -> None:
        """Scales down to denormal ones and up to products near the largest float."""
        tensors = {"x": randn(7, 33) * scale, "w": randn(5, 33, seed=1)}

        fast, slow = both(
            functional.linear,
            tensors,
            Setting(recipe=RECIPES["int8"], noise=noise()),
            grad=lambda y: randn(*y.shape) * scale,
            needs="x" if scale > 1e17 else "xw",
        )

        for product, ours in fast.results.items():
            limit = 1e-5 * slow.bound(product) + SMALLEST
            assert ((ours.double() - slow.results[product].double()).abs() <= limit).all()

    def test_memory_of_results(self) -> None:
        """A convolution's results are channels last, its weight's gradient as the weight is; none has gaps."""
        last = randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        for w in (randn(5, 3, 3, 3), randn(5, 3, 3, 3).to(memory_format=torch.channels_last)):
            ran = step(
                lambda *t, setting: functional.conv(
                    *t, stride=(1, 1), padding=(1, 1), dilation=(1, 1), setting=setting
                ),
                {"x": last, "w": w},
                Setting(recipe=RECIPES["sbm8"], noise=noise(), engine="int8"),
            )
            assert ran.results["output"].is_contiguous(memory_format=torch.channels_last)
            assert ran.results["grad_input"].is_contiguous(memory_format=torch.channels_last)
            assert ran.results["grad_weight"].stride() == w.stride()


@needs_units
class TestThreads:
    """Nothing depends on the number of threads."""

    @pytest.mark.parametrize("name", ["int8", "sbm8", "bf16", "noisy"])
    @pytest.mark.parametrize("kind", ["linear", "conv"])
    def test_one_and_two_give_the_same_bits(self, kind: str, name: str) -> None:
        """Outputs and gradients are equal bit for bit, noise included; another step's are not."""
        if kind == "linear":
            call: Callable[..., Tensor] = functional.linear
            tensors = {"x": randn(700, 130), "w": randn(90, 130, seed=1)}
        else:

            def call(*t: Tensor, setting: Setting) -> Tensor:
                return functional.conv(*t, stride=(1, 1), padding=(1, 1), dilation=(1, 1), setting=setting)

            tensors = {"x": randn(4, 40, 17, 17), "w": randn(50, 40, 3, 3, seed=1)}
        setting = Setting(recipe=RECIPES[name], noise=noise(), engine="int8")
        ran = []
        for count in (1, 2):
            with threads(count):
                ran.append(step(call, tensors, setting, grad=lambda y: randn(*y.shape), observed=False))

        for product in ("output", "grad_input", "grad_weight"):
            assert torch.equal(ran[0].results[product], ran[1].results[product])
        if name != "bf16":
            later = dataclasses.replace(setting, noise=noise(step=4))
            other = step(call, tensors, later, grad=lambda y: randn(*y.shape), observed=False)
            assert not torch.equal(other.results["grad_input"], ran[0].results["grad_input"])


@needs_units
class TestLongSums:
    """Sums of more products of codes than 32 bits hold."""

    def ones(self, *shape: int) -> Tensor:
        """Codes of the largest magnitude."""
        return torch.ones(*shape)

    @pytest.mark.parametrize(("name", "most"), [("int8", 133_144), ("all affine", 33_025), ("per tensor", 133_144)])
    @pytest.mark.parametrize("more", [0, 1, 7_000])
    def test_gradient_of_a_weight_over_many_rows(self, name: str, most: int, more: int) -> None:
        """One row less, and more, than fit: sums of equal largest codes are exact, where they would wrap."""
        rows = most + more
        setting = Setting(recipe=RECIPES[name], noise=noise(), engine="int8")
        tensors = {"x": self.ones(rows, 3), "w": self.ones(2, 3)}

        ran = step(functional.linear, tensors, setting, needs="w", observed=False)

        torch.testing.assert_close(ran.results["grad_weight"], torch.full((2, 3), float(rows)), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("name", ["int8", "sbm8", "all affine"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_output_and_gradient_of_an_input_over_many_features(self, name: str, autocast: bool) -> None:
        """140,000 inputs or outputs, e.g. a vocabulary, with a bias that is added once."""
        setting, k = Setting(recipe=RECIPES[name], noise=noise(), engine="int8"), 140_000
        wide = {"x": self.ones(2, k), "w": self.ones(3, k), "b": self.ones(3)}
        tall = {"x": self.ones(2, 3), "w": self.ones(k, 3)}

        y = step(functional.linear, wide, setting, needs="", observed=False, autocast=autocast).results["output"]
        g = step(functional.linear, tall, setting, needs="x", observed=False, autocast=autocast).results["grad_input"]

        expected = torch.full((2, 3), k + 1.0).to(y.dtype)
        torch.testing.assert_close(y, expected, rtol=0 if autocast else 1e-6, atol=0)
        torch.testing.assert_close(g, torch.full((2, 3), float(k)), rtol=1e-6, atol=0)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_cut_sums_are_those_in_one(self, data: st.DataObject) -> None:
        """With sums cut after very few products, every convolution's grad_weight still equals the reference."""
        most = data.draw(st.integers(1, 60), "most")
        case = draw_convolution(data)
        with pytest.MonkeyPatch.context() as patch:
            pieces = int8_convolutions._pieces
            patch.setattr(int8_convolutions, "_pieces", lambda window, _: pieces(window, most))
            fast, slow = both(case.call, case.tensors, case.setting, **case.options | {"needs": "xw"})

        assert_equal(fast, slow, case.tensors.get("b"))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_cut_sums_of_large_pictures(self, data: st.DataObject) -> None:
        """The same where a run of positions begins inside a picture whose shifts are multiplied, with any stride."""
        most = data.draw(st.integers(100, 800), "most")
        case = draw_convolution(data, width=40, taps=4, height=30)
        with pytest.MonkeyPatch.context() as patch:
            pieces = int8_convolutions._pieces
            patch.setattr(int8_convolutions, "_pieces", lambda window, _: pieces(window, most))
            fast, slow = both(case.call, case.tensors, case.setting, **case.options | {"needs": "w"})

        assert_equal(fast, slow, case.tensors.get("b"))

    @pytest.mark.parametrize("stride", [2, 3])
    def test_gradient_of_a_strided_convolution_over_large_pictures(self, stride: int) -> None:
        """An RGB picture with more positions than fit, cut inside it."""
        size = 270 * stride
        tensors = {"x": randn(1, 3, size, size), "w": randn(4, 3, 3, 3, seed=1)}

        fast, slow = both(
            lambda *t, setting: functional.conv(
                *t, stride=(stride,) * 2, padding=(1, 1), dilation=(1, 1), setting=setting
            ),
            tensors,
            Setting(recipe=RECIPES["all affine"], noise=noise()),
            needs="w",
            grad=lambda y: randn(*y.shape, seed=5),
        )

        assert_equal(fast, slow)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_cut_sums_of_matrices(self, data: st.DataObject) -> None:
        """The same of linear layers, in all three products."""
        most = data.draw(st.integers(1, 60), "most")
        case = draw_linear(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int8, "MOST_SUMMED", defaultdict(lambda: most))
            fast, slow = both(case.call, case.tensors, case.setting, **case.options)

        assert_equal(fast, slow, case.tensors.get("b"))

    @pytest.mark.parametrize(("size", "batch"), [((380, 380), 1), ((230, 290), 3)])
    def test_gradient_of_a_convolution_over_large_pictures(self, size: tuple[int, int], batch: int) -> None:
        """One picture with more positions than fit, and several that fit one by one."""
        x, w = self.ones(batch, 2, *size), self.ones(3, 2, 3, 3)

        ran = step(
            lambda *t, setting: functional.conv(*t, stride=(1, 1), padding=(1, 1), dilation=(1, 1), setting=setting),
            {"x": x, "w": w},
            Setting(recipe=RECIPES["int8"], noise=noise(), engine="int8"),
            needs="w",
            observed=False,
        )

        inside = torch.tensor([[size[0] - abs(i - 1), size[1] - abs(j - 1)] for i in range(3) for j in range(3)])
        expected = batch * inside.prod(1).view(1, 1, 3, 3).expand(3, 2, 3, 3).float()
        torch.testing.assert_close(ran.results["grad_weight"], expected, rtol=1e-6, atol=0)

    def test_a_convolution_over_too_many_channels_is_refused(self) -> None:
        """66,311 products of an unsigned and a signed code fit, one more is refused by number; signed codes go on."""

        def output(name: str, channels: int) -> Tensor:
            return functional.conv(
                torch.ones(1, channels, 2),
                torch.ones(1, channels, 1),
                stride=(1,),
                padding=(0,),
                dilation=(1,),
                setting=Setting(recipe=RECIPES[name], engine="int8"),
            )

        assert output("sbm8", 66_311).tolist() == [[[66_311, 66_311]]]
        torch.testing.assert_close(output("int8", 133_144), torch.full((1, 1, 2), 133_144.0))
        with pytest.raises(UsageError, match=r"1 taps of 66312 channels.* 66311 products"):
            output("sbm8", 66_312)
        with pytest.raises(UsageError, match="reference"):
            output("int8", 133_145)


@needs_units
class TestNotFinite:
    """NaN and inf surface in everything that depends on them."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("padding", [0, 1])
    def test_taps_that_never_see_it(self, padding: int, bad: float) -> None:
        """In the gradient of a weight on bf16 units a bad input stays with the taps that reach it."""
        x, g = randn(2, 4, 6, 12), randn(2, 3, 4 + 2 * padding, 10 + 2 * padding, seed=1)
        x[0, 0, 2, 11] = bad

        def values(t: Tensor) -> codes_of.Values:
            return codes_of.Values(numbers=t.movedim(1, -1).contiguous().flatten(), shape=t.shape, layout="activation")

        op = Convolution(stride=(1, 1), padding=(padding,) * 2, dilation=(1, 1))
        product = Product(op=op, name="grad_weight", shape=torch.Size((3, 4, 3, 3)), dtype=torch.float32)
        found = int8.Int8().multiply(product, values(g), values(x), None)

        wanted = torch.nn.grad.conv2d_weight(x, [3, 4, 3, 3], g, padding=padding)
        assert torch.equal(found.isfinite(), wanted.isfinite())
        assert not found.isfinite().all()
        assert found.isfinite().any()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["x", "w", "b", "g"])
    @pytest.mark.parametrize("name", sorted(RECIPES))
    @pytest.mark.parametrize("kind", ["linear", "conv"])
    def test_at_one_place(self, kind: str, name: str, where: str, bad: float) -> None:
        """What is not finite in the reference result is not in the int8 result, and nothing else; integers give nan."""
        if kind == "linear":
            call: Callable[..., Tensor] = functional.linear
            tensors = {"x": randn(5, 40), "w": randn(6, 40, seed=1), "b": randn(6, seed=2)}
        else:

            def call(*t: Tensor, setting: Setting) -> Tensor:
                return functional.conv(*t, stride=(1, 1), padding=(0, 0), dilation=(1, 1), setting=setting)

            tensors = {"x": randn(2, 4, 5, 5), "w": randn(6, 4, 3, 3, seed=1), "b": randn(6, seed=2)}

        def spoilt(t: Tensor) -> Tensor:
            t = t.clone()
            t.view(-1)[t.numel() // 2] = bad
            return t

        if where in tensors:
            tensors[where] = spoilt(tensors[where])

        def grad(y: Tensor) -> Tensor:
            return spoilt(randn(*y.shape)) if where == "g" else randn(*y.shape)

        fast, slow = both(call, tensors, Setting(recipe=RECIPES[name], noise=noise()), grad=grad, observed=False)

        wrong = {product: ~t.isfinite() for product, t in fast.results.items()}
        for product, t in slow.results.items():
            if kind == "conv" and fast.engines.get(product) == "bf16":
                # Zeros outside the picture are multiplied here and skipped by torch, and 0 times inf is nan.
                assert (wrong[product] | t.isfinite()).all(), product
            else:
                assert torch.equal(wrong[product], ~t.isfinite()), product
        touched = {
            "x": {"output", "grad_weight"},
            "w": {"output", "grad_input"},
            "b": {"output"},
            "g": {"grad_input", "grad_weight", "grad_bias"},
        }[where]
        if where == "w" and math.isnan(bad) and isinstance(RECIPES[name].output.weight.transform, TanhMax):
            touched |= {"grad_weight"}  # which has the transform's gradient
        assert {product for product, mask in wrong.items() if mask.any()} == touched
        for product in touched - {"grad_bias"}:
            if fast.engines[product] == "int8" and where != "b":
                assert fast.results[product][wrong[product]].isnan().all()

    def test_a_range_beyond_the_largest_float(self) -> None:
        """Finite numbers whose range overflows give nan, not numbers."""
        x = randn(4, 30)
        x[0, 0], x[1, 1] = 3e38, -3e38

        y = functional.linear(x, randn(5, 30), setting=Setting(recipe=RECIPES["all affine"], engine="int8"))

        assert y.isnan().all()

    def test_in_evaluation_with_a_running_range(self) -> None:
        """A running range does not clip an inf to a number."""
        model = nn.Linear(8, 4)
        lowbit.convert_(model, "sbm8", engine="int8")
        model(randn(16, 8))
        model.eval()
        x = randn(16, 8)
        assert model(x).isfinite().all()
        x[3, 3] = math.inf

        assert model(x).isnan().all()


@needs_units
class TestChoice:
    """What runs where, as counters say."""

    @pytest.mark.parametrize("slot", range(6))
    @pytest.mark.parametrize(("bits", "engine"), [(8, "int8"), (9, "reference"), (16, "reference"), (2, "int8")])
    def test_bits_of_the_moment(self, bits: int, engine: str, slot: int) -> None:
        """One operand of more than 8 bits takes its product to the reference, whose result it has; no other."""
        widths = [8] * 6
        widths[slot] = bits
        # Six formats, so that each operand has a width of its own.
        formats = {f"{p}__{o}": SYMMETRIC.replace(floor=1e-9 * (i + 1)) for i, (p, o) in enumerate(SLOTS)}
        setting = Setting(recipe=recipe_of(SYMMETRIC, **formats), bits=tuple(widths), noise=noise())
        tensors = {"x": randn(6, 20), "w": randn(4, 20, seed=1)}

        fast, slow = both(functional.linear, tensors, setting)

        product = SLOTS[slot][0]
        assert fast.engines == {p: engine if p == product else "int8" for p, _ in SLOTS}
        assert_equal(fast, slow)
        if engine == "reference":
            assert torch.equal(fast.results[product], slow.results[product])

    def test_bits_of_a_converted_layer(self) -> None:
        """A schedule that passes 8 bits is followed, forward and backward, and comes back."""
        model = nn.Linear(6, 4)
        lowbit.convert_(model, "int8", engine="int8")
        engines = []
        for bits in (8, 10, 4):
            model.site.bits.fill_(bits)
            calls: list[ProductCall] = []
            with watch.counted_by(calls.append):
                model(randn(5, 6, seed=bits).requires_grad_()).sum().backward()
            engines.append({(call.engine, call.bits) for call in calls})

        assert engines == [{("int8", (8, 8))}, {("reference", (10, 10))}, {("int8", (4, 4))}]

    def test_each_call_has_its_bits(self) -> None:
        """Calls at other bits are other programs, and none of them is mixed up."""
        x, w, results = randn(6, 20), randn(4, 20, seed=1), []
        for width in (8, 3, 8):
            setting = Setting(recipe=RECIPES["int8"], bits=(width,) * 6, noise=noise(), engine="int8")
            results.append(functional.linear(x, w, setting=setting))

        assert torch.equal(results[0], results[2])
        assert not torch.equal(results[0], results[1])

    @pytest.mark.parametrize("name", ["bf16", "sbm8", "int8"])
    def test_units_of_each_product(self, name: str) -> None:
        """Integers run as codes, products with a bf16 operand as halves."""
        ran = step(
            functional.linear,
            {"x": randn(4, 8), "w": randn(3, 8, seed=1)},
            Setting(recipe=RECIPES[name], noise=noise(), engine="int8"),
        )

        expected = {"bf16": ("bf16", "bf16", "bf16"), "sbm8": ("int8", "int8", "bf16"), "int8": ("int8",) * 3}[name]
        assert ran.engines == dict(zip(("output", "grad_input", "grad_weight"), expected, strict=True))
        assert [run.engine for run in ran.runs] == [call.engine for call in ran.calls]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_dtypes_run_on_the_reference(self, dtype: torch.dtype) -> None:
        """Float64 and float16 tensors, which the kernels do not take, give the reference result and say so."""
        tensors = {"x": randn(4, 8).to(dtype), "w": randn(3, 8, seed=1).to(dtype)}

        fast, slow = both(functional.linear, tensors, Setting(recipe=RECIPES["int8"], noise=noise()))

        assert set(fast.engines.values()) == {"reference"}
        assert fast.results["output"].dtype == dtype
        assert all(torch.equal(fast.results[k], slow.results[k]) for k in slow.results)

    def test_float16_autocast_runs_on_the_reference(self) -> None:
        """Autocast to float16 gives float16."""
        calls: list[ProductCall] = []
        with watch.counted_by(calls.append), torch.autocast("cpu", dtype=torch.float16):
            y = functional.linear(randn(4, 8), randn(3, 8), setting=Setting(recipe=RECIPES["int8"], engine="int8"))

        assert y.dtype == torch.float16
        assert [call.engine for call in calls] == ["reference"]

    def test_recorded_noise_is_refused(self) -> None:
        """Kernels make their own noise; recorded draws are for the reference, and the error says so."""
        from lowbit.numerics.rounding import RecordedNoise

        recipe = recipe_of(SYMMETRIC, output__input=NOISY)
        setting = Setting(recipe=recipe, noise=RecordedNoise(draws={}), engine="int8")

        with pytest.raises(ValueError, match="counter-based noise"):
            functional.linear(randn(4, 8), randn(3, 8), setting=setting)


BLOCK = integer(bits=8, zero="symmetric", granularity="block", block=6)
REFUSED = {
    "fp32": (Recipe.from_name("fp32"), "fp32"),
    "sbm8-cpt": (Recipe.from_name("sbm8-cpt"), "grad_input: scales per output-channel"),
    "sbm8-hoffer": (Recipe.from_name("sbm8-hoffer"), "grad_weight: fp32"),
    "w4a4g4": (Recipe.from_name("w4a4g4"), "grad_input: scales per output-channel"),
    "an offset beside bf16": (recipe_of(BF16, output__weight=OFFSET), "output: a float offset beside a bf16 operand"),
    "an offset per row": (recipe_of(SYMMETRIC, output__input=OFFSET.replace(granularity="row")), "per row of anything"),
    "9 bits": (recipe_of(SYMMETRIC.replace(bits=9)), "9 bits"),
    "blocks of 6": (recipe_of(BLOCK), "block"),
    "zero points per row": (recipe_of(AFFINE.replace(granularity="row")), "per row"),
    "rows in grad_weight": (
        recipe_of(SYMMETRIC, grad_weight__input=SYMMETRIC.replace(granularity="row")),
        "grad_weight: scales per row",
    ),
    "output channels in grad_input": (recipe_of(SYMMETRIC, grad_input__weight=PER_OUTPUT), "grad_input: scales"),
    "one fp32 operand": (recipe_of(SYMMETRIC, grad_weight__input=FP32), "grad_weight: fp32"),
}


@needs_units
class TestRefusals:
    """No silent fallback: what the engine cannot run is an error that says why."""

    @pytest.mark.parametrize("name", sorted(REFUSED))
    def test_recipes(self, name: str) -> None:
        """Conversion refuses and leaves the model plain; `auto` runs what the engine refuses on the reference."""
        recipe, why = REFUSED[name]
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

        with pytest.raises(UsageError, match=f"int8.*1 .Linear.: .*{why}"):
            lowbit.convert_(model, recipe, engine="int8")
        assert [type(layer) for layer in model] == [nn.Linear] * 3
        refused = refusals(Linear(), recipe)
        report = lowbit.convert_(model, recipe)
        calls: list[ProductCall] = []
        with watch.counted_by(calls.append):
            model(randn(4, 8).requires_grad_()).sum().backward()
        assert {c.product for c in calls if c.engine == "reference" and c.layer == "1"} == set(refused)
        assert {p for p, unit in report.rows[1].engines.items() if unit == "reference"} == set(refused)

    def test_rows_of_a_convolution_are_accepted(self) -> None:
        """A convolution has no rows: such formats share one scale there, so it runs what a linear layer does not."""
        recipe, _ = REFUSED["rows in grad_weight"]
        model = nn.Conv2d(3, 4, 3)

        lowbit.convert_(model, recipe, engine="int8")

        assert model(randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)

    @pytest.mark.parametrize("broadcast", [False, True])
    def test_products_of_two_activations(self, broadcast: bool) -> None:
        """`matmul` has no integer kernel and is refused, also of two matrices."""
        right = randn(2, 8, 5) if broadcast else randn(8, 5)

        with pytest.raises(UsageError, match="matmul has no integer kernel"):
            functional.matmul(randn(4, 8), right, setting=Setting(recipe=RECIPES["per tensor"], engine="int8"))

    def test_parameters_of_other_dtypes(self) -> None:
        """A float64 layer is refused at conversion by name and dtype, and the model stays plain."""
        model = nn.Sequential(nn.Linear(8, 4, dtype=torch.float64), nn.Linear(4, 4))

        with pytest.raises(UsageError, match=r"weight is torch\.float64"):
            lowbit.convert_(model, "int8", engine="int8")
        assert [type(layer) for layer in model] == [nn.Linear] * 2

    @pytest.mark.parametrize(
        ("sets", "recipe", "why"),
        [
            ([], "int8", "no vectors and not avx2 or dotprod"),
            (["avx2"], "sbm8", "avx2 and not avx512bf16"),
            (["avx2", "avx512", "avx512vnni"], "sbm8", "avx512vnni and not avx512bf16"),
            (None, "int8", "without its native kernels"),
        ],
    )
    def test_machines_without_the_units(
        self, sets: list[str] | None, recipe: str, why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error names what the processor offers and what is missing."""
        monkeypatch.setattr(operators, "instruction_sets", lambda: sets)

        with pytest.raises(UsageError, match=why):
            lowbit.convert_(nn.Linear(4, 3), recipe, engine="int8")

    def test_machines_with_half_of_the_units(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Recipe `int8` needs no bf16 units."""
        monkeypatch.setattr(operators, "instruction_sets", lambda: ["avx2"])

        assert lowbit.convert_(nn.Linear(4, 3), "int8", engine="int8").rows[0].converted


def test_a_processor_without_units() -> None:
    """With ONEDNN_MAX_CPU_ISA=SSE41 the engine is refused by name in a fresh process, and the reference trains."""
    code = (
        "import torch, lowbit\n"
        "model = torch.nn.Linear(4, 3)\n"
        "try: lowbit.convert_(model, 'int8', engine='int8')\n"
        "except lowbit.UsageError as error: print(error)\n"
        "lowbit.convert_(model, 'int8', engine='reference')\n"
        "model(torch.ones(2, 4)).sum().backward(); print(model.weight.grad.shape)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    refused, shape = done.stdout.splitlines()
    assert "int8" in refused
    assert "avx2 or dotprod" in refused or "without its native kernels" in refused
    assert shape == "torch.Size([3, 4])"


def network() -> nn.Sequential:
    """A small network with convolutions, a stride, groups, and linear layers, biases included."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 16),
        nn.Tanh(),
        nn.Linear(16, 5),
    )


def images(count: int = 4, seed: int = 0) -> Tensor:
    """Inputs of `network`."""
    return randn(count, 3, 8, 8, seed=seed)


# Calls by engine in one step of `network`.
EXPECTED = {"int8": {"int8": 11, "bf16": 0}, "sbm8": {"int8": 7, "bf16": 4}, "bf16": {"int8": 0, "bf16": 11}}


@needs_units
class TestVerify:
    """`lowbit.verify` says which products ran on integer units, neither more nor less."""

    def proven(self, model: nn.Module, patch: pytest.MonkeyPatch, steps: int = 1) -> tuple[dict[str, int], list[bool]]:
        """Calls by engine as the proof has them, and of the kernel as it was really called."""
        kernel, called = cpu.multiply, []

        def multiply(*args: Any, codes: bool, **kwargs: Any) -> None:
            called.append(codes)
            kernel(*args, codes=codes, **kwargs)

        patch.setattr(cpu, "multiply", multiply)
        with lowbit.verify(model) as proof:
            for _ in range(steps):
                model(images()).square().sum().backward()
        calls: dict[str, int] = {"int8": 0, "bf16": 0, "reference": 0}
        for row in proof.rows:
            calls[row.engine] += row.calls
            assert row.kernel.startswith("lowbit::") == (row.engine != "reference")
        return calls, called

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("recipe", sorted(EXPECTED))
    def test_calls_are_those_of_the_kernel(self, recipe: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Four layers, three products each, but for grad_input of the first: 11, each by one call of its kernel."""
        model = network()
        lowbit.convert_(model, recipe, engine="int8")

        calls, called = self.proven(model, monkeypatch, steps)

        expected = {engine: steps * n for engine, n in EXPECTED[recipe].items()}
        assert calls == {**expected, "reference": 0}
        assert (called.count(True), called.count(False)) == (expected["int8"], expected["bf16"])

    @pytest.mark.parametrize("how", ["engine", "bits"])
    def test_a_layer_that_fell_back_is_missing(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One layer that does not run on integer units lowers the count by its three products."""
        model = network()
        lowbit.convert_(model, "int8", engine="int8")
        if how == "engine":
            model[5].site.engines = ["reference"]
        else:
            model[5].site.bits.fill_(9)

        calls, called = self.proven(model, monkeypatch)

        assert calls == {"int8": 8, "bf16": 0, "reference": 3}
        assert called == [True] * 8

    def test_the_reference_engine_calls_no_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And its proof says reference."""
        model = network()
        lowbit.convert_(model, "int8", engine="reference")

        calls, called = self.proven(model, monkeypatch)

        assert calls == {"int8": 0, "bf16": 0, "reference": 11}
        assert called == []

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    def test_figures_are_those_of_the_reference(self, recipe: str, autocast: bool) -> None:
        """SQNR, cosine, clipped share and bits of a layer with a bias agree between engines."""
        proofs = []
        for engine in ("int8", "reference"):
            model = nn.Sequential(nn.Linear(40, 30))
            with torch.no_grad():
                model[0].weight.copy_(randn(30, 40, seed=1))
                model[0].bias.copy_(10 * randn(30, seed=2))
            lowbit.convert_(model, recipe, engine=engine)
            x = randn(16, 40).requires_grad_()
            with lowbit.verify(model) as proof, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(x).float().square().sum().backward()
            proofs.append(proof)

        for ours, theirs in zip(proofs[0].rows, proofs[1].rows, strict=True):
            assert (ours.layer, ours.product, ours.bits, ours.macs) == (
                theirs.layer, theirs.product, theirs.bits, theirs.macs,
            )  # fmt: skip
            assert ours.clipped == theirs.clipped
            # In bfloat16 the result's own rounding is noise too, up to that of a bias ten times as large.
            assert abs(ours.sqnr_db - theirs.sqnr_db) < (12 if autocast and ours.product == "output" else 0.5)
            assert abs(ours.cosine - theirs.cosine) < 1e-3

    def test_around_the_backward_alone(self) -> None:
        """An observer that comes after the forward sees the backward's two products of a layer."""
        for recipe in ("int8", "sbm8"):
            runs: list[ProductRun] = []
            model = network()
            lowbit.convert_(model, recipe, engine="int8")
            loss = model(images()).square().sum()
            with watch.observed_by(runs.append):
                loss.backward()

            assert len(runs) == 7
            assert {run.product for run in runs} == {"grad_input", "grad_weight"}
            assert all(run.full_precision().shape == run.result.shape for run in runs)

    @pytest.mark.parametrize("make", [lambda: nn.LSTM(6, 7, 2), lambda: nn.MultiheadAttention(8, 2)])
    def test_layers_of_several_products(self, make: Callable[[], nn.Module]) -> None:
        """Recurrent layers and attention run every product on integer units, near the reference's result."""
        results = []
        for engine in ("int8", "reference"):
            torch.manual_seed(0)
            model = make()
            lowbit.convert_(model, "int8", engine=engine)
            x = randn(5, 3, 6 if isinstance(model, nn.LSTM) else 8).requires_grad_()
            calls: list[ProductCall] = []
            with watch.counted_by(calls.append):
                y = model(x)[0] if isinstance(model, nn.LSTM) else model(x, x, x)[0]
                y.square().sum().backward()
            assert {call.engine for call in calls} == {engine}
            results.append((len(calls), y.detach(), x.grad))

        assert results[0][0] == results[1][0]
        for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
            assert (ours - theirs).norm() < 0.05 * theirs.norm()  # a code may differ where inputs differ by an ulp


@needs_units
class TestRangeNorm:
    """Range BN on codes against its definition."""

    def trained(self, engine: str, x: Tensor, training: bool = True, count: int = 1) -> tuple[Tensor, ...]:
        """Output, gradients and running statistics after one step."""
        model = nn.BatchNorm2d(x.shape[1])
        with torch.no_grad():
            model.weight.copy_(randn(x.shape[1], seed=5))
            model.bias.copy_(randn(x.shape[1], seed=6))
        lowbit.convert_(model, "sbm8", engine=engine)
        with threads(count):
            model(laid_out(randn(*x.shape, seed=7), "channels last"))  # a running range
            leaf = x.detach().requires_grad_()
            y = model.train(training)(leaf)
            y.backward(laid_out(randn(*y.shape, seed=8), "channels last").to(y.dtype))
        assert leaf.grad is not None
        grads = (leaf.grad, model.weight.grad, model.bias.grad)
        return (y.detach(), *grads, model.running_mean, model.running_var)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", [(8, 5, 6, 7), (2, 3, 1, 1), (33, 64, 3, 3), (4, 1, 9, 9)])
    def test_equals_the_definition(self, shape: tuple[int, ...], training: bool) -> None:
        """Output and gradients agree to 1e-5 of the largest; the fast way ran, as some last digit differs."""
        x = laid_out(randn(*shape) + 0.5, "channels last")

        ours, theirs = self.trained("int8", x, training), self.trained("reference", x, training)

        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(b.abs().max()) + 1e-6)
        if shape == (33, 64, 3, 3):
            assert not torch.equal(ours[0], theirs[0])
            assert not torch.equal(ours[1], theirs[1])

    def test_one_thread_and_two(self) -> None:
        """The same bits."""
        x = laid_out(randn(40, 30, 9, 9), "channels last")

        assert all(torch.equal(a, b) for a, b in zip(*(self.trained("int8", x, count=n) for n in (1, 2)), strict=True))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nan_and_inf_surface(self, bad: float) -> None:
        """The format is per tensor: nothing of output or grad_input is a number."""
        x = laid_out(randn(4, 3, 5, 5), "channels last")
        x[1, 1, 2, 2] = bad

        ours, theirs = self.trained("int8", x), self.trained("reference", x)

        assert ours[0].isnan().all()
        assert [t.isnan().all() for t in ours] == [t.isnan().all() for t in theirs]


def kept_bytes(model: nn.Module, x: Tensor, layers: tuple[type[nn.Module], ...]) -> int:
    """Bytes that layers of these types keep for the backward: saved tensors and what their nodes hold, each once.

    Parameters are not counted, nor is what other layers keep, e.g. an activation function's own output.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def add(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    graphs, hooks = [], []

    def enter(_module: nn.Module, _args: object) -> None:
        graphs.append(torch.autograd.graph.saved_tensors_hooks(add, lambda t: t))
        graphs[-1].__enter__()

    def leave(_module: nn.Module, _args: object, y: Tensor) -> None:
        graphs.pop().__exit__(None, None, None)
        for operand in ("x", "w"):
            held = getattr(getattr(y.grad_fn, "kept", None), operand, None)
            if held is not None:
                add(held.scale)
                add(held.numbers)

    for layer in model.modules():
        if isinstance(layer, layers):
            hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    y = model(x)
    for hook in hooks:
        hook.remove()
    assert y.requires_grad
    return sum(sizes.values())


@needs_units
class TestMemory:
    """What converted layers keep for the backward."""

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    def test_of_an_mlp(self, recipe: str, autocast: bool) -> None:
        """Its linear layers keep a byte a number and their scales: a quarter of fp32 to 0.35 of it."""

        def make() -> nn.Sequential:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))

        x, plain, converted = randn(256, 64), make(), make()
        lowbit.convert_(converted, recipe, engine="int8")

        full = kept_bytes(plain, x, (nn.Linear,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = kept_bytes(converted, x, (nn.Linear,))

        assert full == 4 * 256 * (64 + 128 + 128)
        assert 0.25 * full <= ours <= 0.35 * full

    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    def test_of_convolutions(self, recipe: str) -> None:
        """The same of the convolutions of a small ResNet-like chain, at any memory format."""
        for memory in (torch.contiguous_format, torch.channels_last):
            sizes = []
            for convert in (False, True):
                torch.manual_seed(0)
                model = nn.Sequential(
                    *(
                        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
                        for _ in range(3)
                    ),
                    nn.Conv2d(16, 32, 1, stride=2),
                ).to(memory_format=memory)
                if convert:
                    lowbit.convert_(model, recipe, engine="int8")
                sizes.append(kept_bytes(model, randn(8, 16, 16, 16).contiguous(memory_format=memory), (nn.Conv2d,)))

            assert 0.25 * sizes[0] <= sizes[1] <= 0.35 * sizes[0]

    def test_of_a_block_with_range_norm(self) -> None:
        """Convolutions and Range BN of `sbm8` together keep at most 0.35 of what fp32 with batch normalisation does."""
        sizes = []
        for convert in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(
                *(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)) for _ in range(3))
            )
            if convert:
                lowbit.convert_(model, "sbm8", engine="int8")
            sizes.append(kept_bytes(model, randn(8, 16, 16, 16), (nn.Conv2d, nn.BatchNorm2d)))

        assert 0.25 * sizes[0] <= sizes[1] <= 0.35 * sizes[0]

    def test_a_frozen_weight_keeps_no_input(self) -> None:
        """Without grad_weight no input is kept, and without grad_input no codes of the weight."""
        model = nn.Linear(64, 64)
        lowbit.convert_(model, recipe_of(SYMMETRIC), engine="int8")

        model.weight.requires_grad_(False)
        assert kept_bytes(model, randn(100, 64), (nn.Linear,)) <= 8
        assert 4096 <= kept_bytes(model, randn(100, 64).requires_grad_(), (nn.Linear,)) < 4200
        model.weight.requires_grad_(True)
        assert 6400 <= kept_bytes(model, randn(100, 64), (nn.Linear,)) < 6500

    def test_codes_go_as_soon_as_the_backward_used_them(self) -> None:
        """The backward frees what the forward kept; a second one is torch's usual error."""
        model = network()
        lowbit.convert_(model, "int8", engine="int8")
        loss = model(images()).sum()
        loss.backward()

        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@needs_units
class TestTraining:
    """A converted model in loops of its user."""

    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    def test_gradient_checkpointing(self, recipe: str) -> None:
        """Gradients are those without checkpointing bit for bit, noise included."""
        grads = []
        for checkpointed in (False, True):
            model = network()
            lowbit.convert_(model, recipe, engine="int8")
            if checkpointed:
                inner, rest = model[:4], model[4:]
                model.forward = lambda x, a=inner, b=rest: b(checkpoint(a, x, use_reentrant=False))
            model(images().requires_grad_()).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])

        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert all(g.any() for g in grads[0])

    def test_second_derivatives_are_refused(self) -> None:
        """create_graph=True says that there is no second derivative, naming the layer."""
        model = network()
        lowbit.convert_(model, "int8", engine="int8")

        with pytest.raises(RuntimeError, match=r"^7: create_graph=True.*none"):
            torch.autograd.grad(model(images()).sum(), list(model.parameters()), create_graph=True)

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    def test_a_resumed_run_is_the_run(self, recipe: str, count: int) -> None:
        """Six steps equal three, a save, a load into a new model, and three more, bit for bit; other noise does not."""

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
            for t in steps:
                optimizer.zero_grad()
                model(images(seed=t)).square().sum().backward()
                optimizer.step()

        def fresh(seed: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
            model = network()
            lowbit.convert_(model, recipe, engine="int8", seed=seed)
            return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        with threads(count):
            whole, half, rest, other = fresh(), fresh(), fresh(seed=8), fresh(seed=8)
            train(*whole, range(6))
            train(*other, range(6))
            train(*half, range(3))
            rest[0].load_state_dict(half[0].state_dict())
            rest[1].load_state_dict(half[1].state_dict())
            lowbit.load_state_dict(rest[0], lowbit.state_dict(half[0]))
            train(*rest, range(3, 6))

        assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), rest[0].parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), other[0].parameters(), strict=True))
        x = images(seed=9)
        assert torch.equal(whole[0].eval()(x), rest[0].eval()(x))

    def test_a_state_of_another_engine_is_refused(self) -> None:
        """The engine is part of the saved state: loading it into another names both."""
        models = []
        for engine in ("int8", "reference"):
            models.append(network())
            lowbit.convert_(models[-1], "int8", engine=engine)

        with pytest.raises(UsageError, match=r"engine reference.*engine int8"):
            lowbit.load_state_dict(models[0], lowbit.state_dict(models[1]))

    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    def test_training_learns(self, recipe: str) -> None:
        """In twenty steps on one batch the loss falls to less than half, near where fp32 takes it."""
        losses = {}
        for converted in (False, True):
            model = network()
            if converted:
                lowbit.convert_(model, recipe, engine="int8")
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            x, labels = images(16), torch.arange(16) % 5
            for _ in range(20):
                loss = nn.functional.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses[converted] = loss.item()

        assert losses[False] < 0.8
        assert 0 < losses[True] < 0.8 + losses[False]
