"""Mixed precision: autocast and the scaled loss of recipes, in the user's own loop."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import RunError, UsageError
from lowbit.methods.recipe import Autocast, LossScaling, Recipe, from_toml
from lowbit.nn import loop
from lowbit.numerics.quantizer import quantize


def network(recipe: Any = "amp-fp16", seed: int = 0) -> nn.Sequential:
    """A converted network."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, recipe, engine="reference")
    return model


def batch(number: int) -> Tensor:
    """Data that its number fixes."""
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(number))


def scaling(**fields: Any) -> Recipe:
    """`amp-fp16` with other settings of the scaler."""
    return Recipe.from_name("amp-fp16").replace(
        name="mine", autocast=Autocast(dtype="fp16", scaling=LossScaling(**fields))
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: range
) -> list[float]:
    """The scales of some steps."""
    scales = []
    for number in steps:
        with lowbit.amp.autocast(model):
            loss = model(batch(number)).float().square().mean()
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return scales


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize(("recipe", "dtype"), [("amp-bf16", torch.bfloat16), ("amp-fp16", torch.float16)])
def test_products_and_what_follows_have_16_bits(recipe: str, dtype: torch.dtype) -> None:
    """In the recipe's autocast the output has its type, and parameters and their gradients stay in float32."""
    model = network(recipe)
    with lowbit.amp.autocast(model):
        y = model(batch(0))
    y.float().square().mean().backward()

    assert y.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_operands_lie_on_the_grid_of_fp16() -> None:
    """What a product of amp-fp16 sees is torch's float16: subnormals are kept, and what is too large becomes inf."""
    fmt = Recipe.from_name("amp-fp16").output.weight
    x = torch.tensor([1.0 + 2**-11, 1.0 + 3 * 2**-11, 2.0**-24, 2.0**-25, 65504.0, 65519.0, 65520.0, -1e30])

    found = quantize(x, fmt).values

    assert torch.equal(found, x.half().float())
    assert found[-1] == -torch.inf


def test_scaling_saves_gradients_that_fp16_loses() -> None:
    """A loss of 1e-8 times the output has no gradient in fp16; scaled, it has that of float32 to a few digits."""
    found = {}
    for name, recipe in (("fp32", "fp32"), ("plain", "amp-fp16"), ("scaled", "amp-fp16")):
        model = network(recipe)
        scaler = lowbit.amp.GradScaler(LossScaling(start=2.0**20) if name == "scaled" else None)
        with lowbit.amp.autocast(model):
            loss = model(batch(0)).float().sum() * 1e-8
        scaler.scale(loss).backward()
        scaler.unscale_(sgd(model))
        found[name] = model[0].weight.grad

    torch.testing.assert_close(found["scaled"], found["fp32"], rtol=0.05, atol=1e-9)
    assert not torch.equal(found["scaled"], found["fp32"])
    assert not found["plain"].any()


def test_the_scale_is_that_of_torch_until_the_minimum() -> None:
    """The trace of scales over steps with overflows is that of torch's own scaler."""
    recipe = scaling(start=2.0**40, interval=3)
    traces = []
    for kind in ("torch", "lowbit"):
        model = network(recipe)
        scaler = lowbit.amp.GradScaler.from_recipe(model)
        if kind == "torch":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
        traces.append(train(model, sgd(model), scaler, range(40)))

    assert traces[0] == traces[1]
    assert min(traces[1]) < 2.0**40
    assert any(a < b for a, b in zip(traces[1], traces[1][1:], strict=False))


def test_a_scale_below_its_minimum_ends_the_training() -> None:
    """A gradient that is nan at every scale halves it down to the minimum, and the error names the parameter."""
    model = network(scaling(start=8.0, minimum=1.0))
    scaler = lowbit.amp.GradScaler.from_recipe(model)
    before = copy.deepcopy(model.state_dict())
    model[3].bias.register_hook(lambda g: g * torch.nan)
    optimizer = sgd(model)

    with pytest.raises(RunError, match=r"loss scale fell to 0.5.*minimum of 1.0: gradients of 1 of 6.*first that of 3"):
        train(model, optimizer, scaler, range(10))

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    """Eight steps are four, a saved state in a fresh model and scaler, and four more, through changes of the scale."""
    recipe = scaling(start=2.0**40, interval=3)
    whole = network(recipe)
    scaler, optimizer = lowbit.amp.GradScaler.from_recipe(whole), sgd(whole)
    train(whole, optimizer, scaler, range(30))
    saved = copy.deepcopy((whole.state_dict(), lowbit.state_dict(whole), optimizer.state_dict(), scaler.state_dict()))
    tail = train(whole, optimizer, scaler, range(30, 60))
    second = network(recipe, seed=1)
    scaler, optimizer = lowbit.amp.GradScaler.from_recipe(second), sgd(second)
    second.load_state_dict(saved[0])
    lowbit.load_state_dict(second, saved[1])
    optimizer.load_state_dict(saved[2])
    scaler.load_state_dict(saved[3])

    assert train(second, optimizer, scaler, range(30, 60)) == tail
    assert len(set(tail)) > 1
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_recipe_without_autocast_has_neither() -> None:
    """In the same loop a recipe of float32 keeps its type and its loss, and an autocast around it stays."""
    model = network("int8")
    scaler = lowbit.amp.GradScaler.from_recipe(model)
    with lowbit.amp.autocast(model):
        plain = model(batch(0))
    with torch.autocast("cpu", torch.bfloat16), lowbit.amp.autocast(model):
        narrow = model(batch(0))

    assert (plain.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert scaler.scale(plain) is plain
    assert scaler.state_dict() == {}


def test_a_loop_without_what_the_recipe_asks_for_warns_once() -> None:
    """Outside autocast the first step says so; without a scaler the first step after a change of weights does."""
    model = network()
    optimizer = sgd(model)

    def step() -> None:
        model(batch(0)).square().mean().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"trains in fp16 autocast.*lowbit.amp.autocast"):
        step()
    with pytest.warns(UserWarning, match=r"recipe amp-fp16 scales the loss.*GradScaler.from_recipe"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_another_autocast_is_not_the_one_asked_for() -> None:
    """A model of amp-bf16 in fp16 autocast warns."""
    model = network("amp-bf16")

    with pytest.warns(UserWarning, match="trains in bf16 autocast"), torch.autocast("cpu", torch.float16):
        model(batch(0))


@pytest.mark.parametrize("units", [False, True])
def test_fp16_on_a_cpu_without_units_is_said_to_be_a_simulation(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step says it once where the processor lacks the units, and not where it has them."""
    monkeypatch.setattr(loop, "has_fp16_units", lambda: units)
    loop._warn_of_simulation.cache_clear()
    said = []
    for _ in range(2):
        model = network()
        with warnings.catch_warnings(record=True) as caught, lowbit.amp.autocast(model):
            warnings.simplefilter("always")
            model(batch(0))
        said += [str(w.message) for w in caught]

    assert ["simulation" in text for text in said] == ([] if units else [True])


def test_layers_that_train_in_different_autocasts_are_refused() -> None:
    """convert_ changes nothing then; a layer whose recipe asks for none may stand beside."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    with pytest.raises(UsageError, match=r"fp16 autocast with a scaled loss and for bf16 autocast|bf16.*and for fp16"):
        lowbit.convert_(model, "amp-fp16", rules=[("1", "amp-bf16")])
    assert type(model[0]) is nn.Linear
    lowbit.convert_(model, "amp-fp16", rules=[("1", "fp32")])
    with lowbit.amp.autocast(model):
        assert model(torch.ones(2, 4)).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowbit.amp.autocast(nn.Linear(2, 2)), "nothing in this model is converted"),
        (lambda: lowbit.amp.GradScaler.from_recipe(nn.Linear(2, 2)), "nothing in this model is converted"),
        (lambda: lowbit.amp.GradScaler(LossScaling()).load_state_dict({}), "lacks"),
        (lambda: lowbit.amp.GradScaler(None).load_state_dict({"scale": 1.0}), "unknown entry"),
        (lambda: LossScaling(start=0.5), "minimum <= start"),
        (lambda: LossScaling(growth=1.0), "growth above 1"),
        (lambda: LossScaling(backoff=1.5), "backoff between 0 and 1"),
        (lambda: LossScaling(start=float("inf")), "finite"),
        (lambda: from_toml("mine", 'base = "int8"\nautocast = { dtype = "fp8" }'), "fp8"),
        (lambda: from_toml("mine", 'base = "int8"\nautocast = { dtype = "bf16", scaling = 2 }'), "table of fields"),
        (lambda: Recipe.from_name("mxfp4").then("amp-bf16", start="0.5"), "needs autocast|asks for autocast"),
        (lambda: lowbit.advise(nn.Linear(2, 2), torch.ones(1, 2), recipes=["amp-fp16"]), "asks for another"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    """Models without a recipe, states of other scalers and impossible settings are errors that say so."""
    with pytest.raises(UsageError, match=message):
        call()
