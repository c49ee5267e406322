"""Products of codes through `torch._int_mm`: the code for CUDA on CPU tensors, and on a GPU where there is one."""

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit
from lowbit import functional
from lowbit.engines import choice, int_mm
from lowbit.methods.recipe import Recipe
from lowbit.numerics.rounding import CounterNoise, RecordedNoise, step_key
from lowbit.products import watch
from lowbit.products.operators import Convolution, Linear, Op
from lowbit.products.setting import Setting
from lowbit.products.watch import ProductCall, ProductRun

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
NAMES = ["int8", "cpt-int8"]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors go the way of CUDA tensors."""
    monkeypatch.setattr(choice.Int8, "devices", ())
    monkeypatch.setattr(choice.IntMM, "devices", ("cpu", "cuda"))
    caches = (choice._whys, choice._warn_once, choice.route)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Scattered codes of a type, its extremes among them."""
    low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
    q = torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
    q.flatten()[:2] = torch.tensor([low, high - 1], dtype=dtype)[: q.numel()]
    return q


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("types", [(a, b) for a in (torch.uint8, torch.int8) for b in (torch.uint8, torch.int8)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 8, 8), (16, 7, 9), (33, 130, 41), (64, 64, 64)])
def test_sums_are_exact(shape: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """Codes with zero points, of shapes that the operator takes and of others, sum as in int64."""
    m, k, n = shape
    a, b = codes(m, k, types[0], 1), codes(n, k, types[1], 2).t()
    zeros = tuple(3 if dtype == torch.uint8 else 0 for dtype in types)
    one = torch.ones(1, device=device)

    found = int_mm.multiply_codes(a.to(device), b.to(device), (zeros[0], zeros[1]), (one, one), None, torch.float32)

    assert torch.equal(found.cpu(), ((a.long() - zeros[0]) @ (b.long() - zeros[1])).float())


@pytest.mark.parametrize("device", DEVICES)
def test_sums_beyond_32_bits_are_cut(device: str) -> None:
    """70,000 products of 255 by 255 are 4.55e9, more than an int32 holds, and arrive whole."""
    k = 70_000
    a, b = torch.full((2, k), 255, dtype=torch.uint8, device=device), torch.full((k, 3), 255, dtype=torch.uint8)
    one = torch.ones(1, device=device)

    found = int_mm.multiply_codes(a, b.to(device), (0, 0), (one, one), None, torch.float32)

    assert k * 255**2 > 2**31
    torch.testing.assert_close(found.cpu(), torch.full((2, 3), k * 255.0**2), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "k", "n"), [(17, 8, 8), (1, 1, 1), (30, 65, 9)])
def test_the_operator_gets_only_shapes_that_cuda_takes(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 rows, k and n in whole eights, and nothing added to a shape that fits."""
    seen = []
    plain = torch._int_mm

    def note(a: Tensor, b: Tensor) -> Tensor:
        seen.append((*a.shape, b.shape[1], a.is_contiguous(), b.t().is_contiguous()))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", note)
    one = torch.ones(1)
    int_mm.multiply_codes(
        codes(m, k, torch.int8, 1), codes(k, n, torch.int8, 2), (0, 0), (one, one), None, torch.float32
    )

    assert seen == [(max(m, 17), -(-k // 8) * 8, -(-n // 8) * 8, True, True)]


def test_what_is_no_code_is_refused() -> None:
    """Types and shapes are checked, with what is allowed."""
    one, q = torch.ones(1), codes(4, 5, torch.int8, 1)

    with pytest.raises(TypeError, match="float32: give int8 or uint8"):
        int_mm.multiply_codes(q.float(), q.t(), (0, 0), (one, one), None, torch.float32)
    with pytest.raises(ValueError, match=re.escape("(4, 5) and (4, 5): give (m, k) and (k, n)")):
        int_mm.multiply_codes(q, q, (0, 0), (one, one), None, torch.float32)


def steps(
    x: Tensor, w: Tensor, b: Tensor | None, setting: Setting, *, autocast: bool
) -> tuple[list[Tensor], list[ProductRun], list[ProductCall]]:
    """One forward and backward of a linear layer: output and gradients, runs and calls."""
    runs: list[ProductRun] = []
    calls: list[ProductCall] = []
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    with watch.observed_by(runs.append), watch.counted_by(calls.append):
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            y = functional.linear(*leaves, setting=setting)
        grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=9).to(y))
    return [y.detach(), *grads], runs, calls


def check(x: Tensor, w: Tensor, b: Tensor | None, setting: Setting, *, autocast: bool = False) -> None:
    """Contract 5: codes of the reference, results within 1e-5 of the product of the absolute operands."""
    ours, fast, calls = steps(x, w, b, dataclasses.replace(setting, engine="int8"), autocast=autocast)
    theirs, slow, _ = steps(x, w, b, dataclasses.replace(setting, engine="reference"), autocast=autocast)

    assert [(c.product, c.engine) for c in calls] == [
        (product, "int8") for product in ("output", "grad_input", "grad_weight")
    ]
    assert {run.kernel for run in fast} == {"aten::_int_mm"}
    for one, two in zip(fast, slow, strict=True):
        for name, operand in one.operands.items():
            assert torch.equal(operand.quantized, two.operands[name].quantized), f"{name} in {one.product}"
    for one, two, run in zip(ours, theirs, slow, strict=False):  # the bias's gradient has no run
        p, q = (operand.quantized.double().abs().flatten(0, -2) for operand in run.operands.values())
        bound = {"output": lambda p, q: p @ q.t(), "grad_input": lambda p, q: p @ q}.get(
            run.product, lambda p, q: p.t() @ q
        )
        limit = 1e-5 * bound(p, q).reshape(one.shape) + 2.0**-118
        if b is not None and run.product == "output":
            limit = limit + 1e-6 * b.double().abs().max()
        if one.dtype == torch.bfloat16:
            limit = 1.01 * limit + 2.0**-7 * two.double().abs()
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert ((one.double() - two.double()).abs() <= limit).all(), run.product
    if b is not None:
        torch.testing.assert_close(
            ours[3], theirs[3], rtol=1e-5 if ours[3].dtype == torch.float32 else 2**-7, atol=1e-4
        )


@pytest.mark.usefixtures("on_cpu")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_linear_layer_gives_what_the_reference_gives(data: st.DataObject) -> None:
    """Of any rows, sizes, bits, dtype, with and without bias and autocast: the code for CUDA on CPU tensors."""
    rows = data.draw(st.sampled_from([(1,), (5,), (2, 3), (33,), (3, 2, 8)]), "rows")
    k, n = data.draw(st.integers(1, 70), "K"), data.draw(st.integers(1, 70), "N")
    bits = data.draw(st.none() | st.lists(st.integers(2, 8), min_size=6, max_size=6), "bits")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    setting = Setting(
        recipe=Recipe.from_name(data.draw(st.sampled_from(NAMES), "recipe")),
        noise=CounterNoise(key=step_key(1, torch.tensor(2)), layer="layer"),
        bits=None if bits is None else tuple(bits),
    )
    bias = randn(n, seed=3).to(dtype) if data.draw(st.booleans(), "bias") else None

    check(
        (randn(*rows, k, seed=1) + 0.3).to(dtype),
        randn(n, k, seed=2).to(dtype),
        bias,
        setting,
        autocast=data.draw(st.booleans(), "autocast"),
    )


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 64, 64), (5, 7, 9), (130, 700, 75)])
def test_a_linear_layer_on_a_gpu_gives_what_the_reference_gives(
    shape: tuple[int, int, int], name: str, autocast: bool
) -> None:
    """The same on the device itself."""
    rows, k, n = shape
    noise = CounterNoise(key=step_key(1, torch.tensor(2)), layer="layer")
    tensors = [(randn(rows, k, seed=1) + 0.3).cuda(), randn(n, k, seed=2).cuda(), randn(n, seed=3).cuda()]

    check(*tensors, Setting(recipe=Recipe.from_name(name), noise=noise), autocast=autocast)


@pytest.mark.usefixtures("on_cpu")
def test_recorded_noise_replays() -> None:
    """Draws that were recorded round as on the reference engine: passes of torch take any noise."""
    recipe = Recipe.from_name("cpt-int8")
    draws = {(p, "grad_output"): torch.rand(20, 12) for p in ("grad_input", "grad_weight")}

    check(randn(20, 16), randn(12, 16), None, Setting(recipe=recipe, noise=RecordedNoise(draws=draws)))


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        (Linear(), "int8", ""),
        (Linear(), "cpt-int8", ""),
        (Linear(), "sbm8", "grad_weight: the int8 engine on cuda does not take a bf16 operand"),
        (Linear(), "sbm8-cpt", "output, grad_input, grad_weight: a float offset is not an integer code"),
        (
            Convolution(stride=(1,), padding=(0,), dilation=(1,)),
            "int8",
            "output, grad_input, grad_weight: the int8 engine on cuda takes linear layers only, not a convolution",
        ),
    ],
)
def test_what_cuda_cannot_run_is_said(op: Op, name: str, message: str) -> None:
    """Integers in linear layers run, whatever the host's processor; all else has its reason."""
    assert choice.in_words(choice.refusals(op, Recipe.from_name(name), device="cuda")) == message


def test_other_layers_that_moved_there_run_on_the_reference_and_say_so_once() -> None:
    """A convolution on a GPU warns at its first forward and not again, and gets the reference engine."""
    op = Convolution(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    arguments = ("int8", op, Recipe.from_name("int8"), None, 4, (torch.float32,) * 3, "cuda")
    choice._warn_once.cache_clear()

    with pytest.warns(
        RuntimeWarning,
        match="reference engine on cuda for these products: .*: the int8 engine on cuda takes linear layers",
    ):
        first = choice.choose(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = choice.choose(*arguments)

    assert set(first.values()) == set(again.values()) == {choice.REFERENCE}


@needs_gpu
def test_a_converted_model_trains_on_a_gpu() -> None:
    """Linear layers converted for the int8 engine and moved run through `_int_mm`, and the loss falls as in fp32."""
    x, y = randn(64, 32, seed=1).cuda(), randn(64, 8, seed=2).argmax(1).cuda()
    losses: dict[str, list[float]] = {"int8": [], "fp32": []}
    for name, taken in losses.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
        lowbit.convert_(model, name, engine="int8" if name == "int8" else "reference")
        model.cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with lowbit.verify(model) as proof:
            for _ in range(20):
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                taken.append(loss.item())
        if name == "int8":
            assert {row.kernel for row in proof.rows} == {"aten::_int_mm"}

    assert losses["int8"][-1] < 0.9 * losses["int8"][0]
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.usefixtures("on_cpu")
def test_bits_of_more_than_a_byte_run_on_the_reference() -> None:
    """As on the CPU: a step at 9 bits is simulated, one at 8 is not."""
    setting = Setting(recipe=Recipe.from_name("int8"), engine="int8")
    x = randn(3, 8)

    engines = [
        choice.choose("int8", Linear(), setting.recipe, (bits,) * 6, 2, (x.dtype,) * 3, "cpu") for bits in (8, 9)
    ]

    assert [{engine.name for engine in chosen.values()} for chosen in engines] == [{"int8"}, {"reference"}]
    assert setting.recipe.output.input.has_width
