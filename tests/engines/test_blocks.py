"""Blocks of the summed axis on the int8 engine: each product equals that of the reference engine, or is refused."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit
from lowbit import Recipe, UsageError, functional
from lowbit.engines import int8
from lowbit.engines.choice import refusals
from lowbit.numerics.elements import Integer
from lowbit.numerics.fallback import Fallback
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.numerics.scales import E4M3, FLOAT32, PowerOfTwoScale, Scale, ScaleFormat
from lowbit.numerics.transforms import NO_TRANSFORM, Hadamard
from lowbit.products import watch
from lowbit.products.operators import Convolution, Linear
from lowbit.products.setting import Setting
from lowbit.products.watch import ProductRun

pytestmark = pytest.mark.skipif(bool(int8.missing("int8")), reason="this machine lacks the units")

RECIPES = ["mxint8", "jetfire", "ufp4", "fallback8"]
ROW = integer(bits=8, zero="symmetric", granularity="row")
KEPT = integer(bits=8, zero="symmetric", granularity="kept-channel")
FORMATS: tuple[ScaleFormat, ...] = (FLOAT32, PowerOfTwoScale(direction="floor"), PowerOfTwoScale(), E4M3())


def recipe_of(fmt: Format, **changes: Format) -> Recipe:
    """A recipe with one format everywhere, but for some operands such as ``output__weight``."""
    recipe = Recipe.from_name("mxint8")
    names = {(p, o): changes.get(f"{p}__{o}", fmt) for p, o, _ in recipe.operands()}
    kinds = {p: type(getattr(recipe, p)) for p, _ in names}
    products = {p: kind(**{o: f for (of, o), f in names.items() if of == p}) for p, kind in kinds.items()}
    return recipe.replace(name=f"blocks {fmt} {changes}", **products)


def step(
    recipe: Recipe, engine: str, x: Tensor, w: Tensor, g: Tensor, bias: Tensor | None = None
) -> tuple[list[Tensor], list[ProductRun]]:
    """Output and gradients of a linear layer, and its products."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    noise = CounterNoise(key=step_key(3, torch.tensor(5)), layer="layer")
    runs: list[ProductRun] = []
    with watch.observed_by(runs.append):
        y = functional.linear(x, w, bias, setting=Setting(recipe=recipe, noise=noise, engine=engine))
        y.backward(g.to(y.dtype))
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad], runs


def product(name: str, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """One product of a linear layer on plain tensors."""
    return Linear().output(a, b) if name == "output" else getattr(Linear(), name)(a, b, shape)  # type: ignore[no-any-return]


def assert_equal(recipe: Recipe, x: Tensor, w: Tensor, g: Tensor, bias: Tensor | None = None) -> None:
    """Each number differs by 1e-5 of the product of the absolute operands at most, and operands are equal."""
    fast, runs = step(recipe, "int8", x, w, g, bias)
    slow, plain = step(recipe, "reference", x, w, g, bias)
    shapes = (x.shape, x.shape, w.shape)
    for a, b, run, of, shape in zip(fast, slow, runs, plain, shapes, strict=True):
        left, right = (o.quantized.double().abs() for o in of.operands.values())
        largest = max(float(left.max()), float(right.max())) if left.numel() and right.numel() else 0.0
        if any(o.format.transform != NO_TRANSFORM for o in of.operands.values()):
            # Sums are of transforms, which share only the norms of the operands.
            ones = torch.ones_like(left), torch.ones_like(right)
            norms = (
                product(run.product, left.square(), ones[1], shape),
                product(run.product, ones[0], right.square(), shape),
            )
            bound = (norms[0] * norms[1]).sqrt()
        else:
            bound = product(run.product, left, right, shape)
        rounding = 2.0**-7 * b.double().abs() if a.dtype == torch.bfloat16 else 0.0
        off = (a.double() - b.double()).abs()
        assert run.engine == "int8"
        assert bool(((off <= 1e-5 * bound + rounding + 2.0**-118) | (a == b)).all()), run.product
        for one, two in zip(run.operands.values(), of.operands.values(), strict=True):
            torch.testing.assert_close(one.quantized, two.quantized, rtol=1e-5, atol=1e-6 * (largest + 1e-30))


def randn(*shape: int, seed: int) -> Tensor:
    """Normal values of several magnitudes, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products_in_blocks_equal_the_reference(data: st.DataObject) -> None:
    """Any shape, stride, dtype, bits, block, scale and rounding, with both operands in blocks or one."""
    m, k, n = (data.draw(st.integers(1, 90)) for _ in range(3))
    block = data.draw(st.sampled_from([4, 16, 32, 64, 128]))
    square, turned = data.draw(st.booleans()), data.draw(st.sampled_from([None, 4, 32]))
    fmt = Format(
        element=Integer(bits=data.draw(st.integers(2, 8)), zero="symmetric"),
        scale=Scale(
            granularity="square" if square else "block", block=block, format=data.draw(st.sampled_from(FORMATS))
        ),
        transform=NO_TRANSFORM
        if turned is None
        else Hadamard(size=turned, signs=data.draw(st.sampled_from([None, 3]))),
    )
    changes: dict[str, Format] = {}
    if turned is None and data.draw(st.booleans()):
        changes = {"output__input": ROW, "grad_input__weight": KEPT, "grad_weight__grad_output": KEPT}
    elif data.draw(st.booleans()):
        noisy = fmt.replace(rounding="stochastic")
        changes = {"grad_input__grad_output": noisy, "grad_weight__grad_output": noisy}
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x, w, g = randn(m, k, seed=1), randn(n, k, seed=2), randn(m, n, seed=3)
    if data.draw(st.booleans()):
        x = x.t().contiguous().t()
    if data.draw(st.booleans()):
        x, g = x.view(1, m, k), g.view(1, m, n)
    bias = randn(n, seed=4).to(dtype) if data.draw(st.booleans()) else None
    assume(turned is None or max(m, k, n) > 1)

    assert_equal(recipe_of(fmt, **changes), x.to(dtype), w.to(dtype), g.to(dtype), bias)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_products_whose_largest_blocks_have_two_codes_equal_the_reference(data: st.DataObject) -> None:
    """Any shape, stride, dtype, bits, block and share, in every place that one operand of a product can have."""
    m, k, n = (data.draw(st.integers(1, 90)) for _ in range(3))
    block, square = data.draw(st.sampled_from([4, 16, 32])), data.draw(st.booleans())
    bits, scale = data.draw(st.integers(2, 8)), Scale(granularity="square" if square else "block", block=block)
    plain = Format(element=Integer(bits=bits, zero="symmetric"), scale=scale)
    twice = Format(element=Fallback(bits=bits, share=data.draw(st.sampled_from([0.05, 0.3, 0.9]))), scale=scale)
    places = data.draw(
        st.sampled_from(
            [
                ("output__input", "grad_weight__input"),
                ("output__weight", "grad_input__weight"),
                ("grad_input__grad_output", "grad_weight__grad_output"),
            ]
        )
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x, w, g = randn(m, k, seed=1), randn(n, k, seed=2), randn(m, n, seed=3)
    bias = randn(n, seed=4).to(dtype) if data.draw(st.booleans()) else None

    assert_equal(recipe_of(plain, **dict.fromkeys(places, twice)), x.to(dtype), w.to(dtype), g.to(dtype), bias)


def test_two_operands_with_two_codes_are_refused() -> None:
    """The reference engine multiplies them."""
    twice = Format(element=Fallback(bits=8, share=0.1), scale=Scale(granularity="block", block=32))

    assert set(refusals(Linear(), recipe_of(twice)).values()) == {"both operands have blocks of two codes"}


def test_outliers_have_two_codes_and_the_proof_counts_them() -> None:
    """Of 16 blocks the 3 with outliers are 254 times as precise, on both engines, and the proof says 18.8 %."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    for i, j in ((0, 0), (200, 300), (511, 511)):
        x[i, j] = 1000.0
    for engine in ("reference", "int8"):
        model = nn.Linear(512, 8)
        lowbit.convert_(model, "fallback8", engine=engine)
        with lowbit.verify(model) as proof:
            model(x).sum().backward()
        rows = {row.product: row for row in proof.rows}

        assert rows["output"].operands["input"].two_codes == 3 / 16
        assert rows["output"].operands["weight"].two_codes == 0
        assert rows["output"].operands["input"].sqnr_db > 50 > rows["output"].operands["weight"].sqnr_db
        assert any("input of output had two codes" in remark and "18.8 %" in remark for remark in proof.remarks)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(0, 8, 4), (8, 40, 0), (1, 1, 1), (130, 97, 33), (33, 4100, 5)])
def test_empty_and_ragged_shapes(name: str, shape: tuple[int, int, int]) -> None:
    """No rows, no outputs, one number, and lengths that no block divides."""
    m, k, n = shape

    assert_equal(Recipe.from_name(name), randn(m, k, seed=1), randn(n, k, seed=2), randn(m, n, seed=3))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("value", [0.0, 3.0, 1e18, 1e-18, 1e-40])
def test_zeros_constants_and_extreme_values(name: str, value: float) -> None:
    """Scales of denormal and of huge blocks are those of the reference."""
    x = torch.full((40, 48), value)

    assert_equal(Recipe.from_name(name), x, randn(33, 48, seed=5), torch.full((40, 33), min(value, 1.0)))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_where_the_reference_has_them(name: str, bad: float) -> None:
    """A block with one is nan in both engines, and other rows are finite where the reference's are."""
    x, w, g = randn(40, 48, seed=4), randn(33, 48, seed=5), randn(40, 33, seed=6)
    x[7, 5] = bad

    fast, _ = step(Recipe.from_name(name), "int8", x, w, g)
    slow, _ = step(Recipe.from_name(name), "reference", x, w, g)

    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert not fast[0][7].isfinite().any()


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (Scale(granularity="block", block=16), Scale(granularity="block", block=32), "blocks of 16 and of 32"),
        (Scale(granularity="block", block=6), Scale(granularity="block", block=6), "block=6 is not listed"),
        (Scale(granularity="kept-channel"), Scale(granularity="block", block=32), ""),
        (Scale(granularity="row"), Scale(granularity="block", block=32), ""),
    ],
)
def test_what_does_not_fit_is_refused_by_name(a: Scale, b: Scale, why: str) -> None:
    """Blocks that do not lie on each other, and blocks that are not whole groups of four."""
    left, right = (Format(element=Integer(bits=8, zero="symmetric"), scale=scale) for scale in (a, b))

    refused = refusals(Linear(), recipe_of(right, output__input=left))

    assert why in refused.get("output", "")
    assert bool(why) == bool(refused)


def test_transforms_must_be_the_same() -> None:
    """One operand with a Hadamard transform and one without are left to the reference engine."""
    fmt = Format(element=Integer(bits=4, zero="symmetric"), scale=Scale(granularity="block", block=32))

    refused = refusals(Linear(), recipe_of(fmt, output__input=fmt.replace(transform=Hadamard(size=32))))

    assert refused == {"output": "its operands have different transforms, Hadamard 32 and none"}


@pytest.mark.parametrize("name", ["mxint8", "ufp4"])
def test_blocks_of_a_convolution_run_on_the_reference_engine(name: str) -> None:
    """The report and a refusal say why."""
    place = Convolution(stride=(1, 1), padding=(0, 0), dilation=(1, 1))

    assert "no integer kernel for conv2d" in refusals(place, Recipe.from_name(name), dim=4)["output"]
    with pytest.raises(UsageError, match="no integer kernel for conv2d"):
        lowbit.convert_(nn.Sequential(nn.Conv2d(32, 32, 3)), name, engine="int8")


@pytest.mark.parametrize("name", RECIPES)
def test_the_proof_names_the_kernel(name: str) -> None:
    """All three products run on 8-bit units."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Linear(32, 4))
    lowbit.convert_(model, name, engine="int8")

    with lowbit.verify(model) as proof:
        model(randn(40, 64, seed=7).requires_grad_()).square().mean().backward()

    assert {row.kernel for row in proof.rows} == {"lowbit::multiply_blocks"}
    assert {row.product for row in proof.rows} == {"output", "grad_input", "grad_weight"}
