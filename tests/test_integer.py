"""The int8 engine against the reference engine, which is the definition."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit import integer, products
from lowbit.formats import BF16, Format, Integer
from lowbit.products import ProductCall, ProductRun, Setting
from lowbit.recipe import SLOTS, GradInput, GradWeight, Output, Recipe
from lowbit.rounding import CounterNoise, step_key

needs_units = pytest.mark.skipif(
    bool(integer.missing("int8") or integer.missing("bf16")),
    reason=f"int8 engine: {integer.missing('int8') or integer.missing('bf16')}",
)

SYMMETRIC = Integer(bits=8, zero="symmetric")
NOISY = Integer(bits=8, zero="symmetric", rounding="stochastic")
AFFINE = Integer(bits=8, zero="integer")
NOISY_AFFINE = Integer(bits=8, zero="integer", rounding="stochastic")
KEPT = Integer(bits=8, zero="symmetric", granularity="kept-channel")


def recipe_of(default: Format, **slots: Format) -> Recipe:
    """A recipe of one format, but for the slots named ``product__operand``."""
    tables: dict[str, dict[str, Format]] = {"output": {}, "grad_input": {}, "grad_weight": {}}
    for product, operand in SLOTS:
        tables[product][operand] = slots.pop(f"{product}__{operand}", default)
    assert not slots
    return Recipe(
        name="test",
        summary="",
        source="",
        output=Output(**tables["output"]),
        grad_input=GradInput(**tables["grad_input"]),
        grad_weight=GradWeight(**tables["grad_weight"]),
    )


RECIPES = {
    "sbm8": Recipe.from_name("sbm8"),
    "int8": Recipe.from_name("int8"),
    "bf16": Recipe.from_name("bf16"),
    "per tensor": recipe_of(SYMMETRIC),
    "all affine": recipe_of(AFFINE, grad_input__grad_output=NOISY_AFFINE, grad_weight__grad_output=NOISY_AFFINE),
    "noisy": recipe_of(NOISY, output__input=AFFINE, grad_weight__input=AFFINE),
    "mixed": recipe_of(BF16, output__input=AFFINE, grad_input__weight=KEPT),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        """The product of the absolute operands in float64."""
        call = next(call for call in self.calls if call.product == product)
        run = next(run for run in self.runs if run.product == product)
        a, b = (operand.quantized.double().abs() for operand in run.operands.values())
        if product == "output":
            return call.op.output(a, b)
        shape = call.input if product == "grad_input" else call.weight
        return getattr(call.op, product)(a, b, shape)


NEEDS = {"output": None, "grad_input": "x", "grad_weight": "w", "grad_bias": "b"}


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
    seen = products.observed_by(ran.runs.append) if observed else nullcontext()
    with products.counted_by(ran.calls.append), seen:
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
        limit = 1e-5 * slow.bound(product).reshape(ours.shape) + 1e-37
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
        bits=None if bits is None else torch.tensor(bits),
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
    return Case(products.linear, tensors, setting, options)


def draw_convolution(data: st.DataObject) -> Case:
    """A convolution or transposed convolution of one to three axes."""
    axes = data.draw(st.integers(1, 3), "axes")
    transposed = data.draw(st.booleans(), "transposed")
    groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
    inputs, outputs = (groups * data.draw(st.sampled_from([1, 2, 3, 5, 17]), "channels") for _ in range(2))
    each = [data.draw(st.lists(st.integers(*r), min_size=axes, max_size=axes).map(tuple)) for r in ((1, 3), (1, 2))]
    (stride, dilation), kernel = each, tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
    padding = tuple(data.draw(st.integers(0, 2)) for _ in range(axes))
    size = tuple(data.draw(st.integers(1, 7)) for _ in range(axes))
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
    function = products.conv_transpose if transposed else products.conv

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
        """Both engines on one case, compared within the contract's bound."""
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
