"""`RoundedSGD`, and the optimiser that a recipe's `[update]` asks for."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import UsageError
from lowbit.methods.recipe import from_toml
from lowbit.methods.update import Update
from lowbit.numerics.elements import FixedPoint
from lowbit.numerics.formats import Format
from lowbit.optim import LowBitOptimizer, RoundedSGD, from_recipe

TEXT = """
base = "int8"
last = "leave"
[update]
weight = "q24"
gradient = "q15"
lr = "q10"
states = { momentum_buffer = "q13" }
[formats.q24]
element = { kind = "fixed-point", integer = 2, fraction = 23 }
[formats.q15]
element = { kind = "fixed-point", integer = 1, fraction = 14 }
[formats.q13]
element = { kind = "fixed-point", integer = 2, fraction = 12 }
[formats.q10]
element = { kind = "fixed-point", integer = 1, fraction = 9 }
"""


def fixed(integer: int, fraction: int, rounding: Any = "nearest") -> Format:
    """Fixed point."""
    return Format(element=FixedPoint(integer=integer, fraction=fraction), rounding=rounding)


def network(recipe: str = TEXT) -> nn.Sequential:
    """A converted network whose last layer is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, from_toml("mine", recipe), engine="reference")
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One training step on data that its number fixes."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def on(x: torch.Tensor, fraction: int) -> bool:
    """Whether all values are multiples of 2**-fraction."""
    scaled = x.detach().double() * 2.0**fraction
    return torch.equal(scaled, scaled.round())


def test_the_weights_see_the_rounded_momentum() -> None:
    """Two steps by hand in float64: the learning rate, gradient, momentum and weight are rounded in this order."""
    update = Update(
        weight=fixed(2, 23), gradient=fixed(1, 14), lr=fixed(1, 9), states=(("momentum_buffer", fixed(2, 12)),)
    )
    p = nn.Parameter(torch.tensor([0.5, -0.25]))
    optimizer = RoundedSGD([p], lr=0.006, momentum=0.25, update=update)
    grads = [torch.tensor([0.1, -0.3]), torch.tensor([0.01, 0.2])]

    def q(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x * 2**bits).round() / 2**bits

    w, a, lr = p.detach().double(), torch.zeros(2, dtype=torch.float64), 3 / 512
    for g in grads:
        a = q(0.25 * a + q(g.double(), 14), 12)
        w = q(w - lr * a, 23)
        p.grad = g
        optimizer.step()

    torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=0)
    assert torch.equal(optimizer.state[p]["momentum_buffer"].double(), a)


def test_without_formats_it_is_sgd() -> None:
    """Nothing rounded, its weights are those of `torch.optim.SGD` to float32 rounding."""
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    optimizers = (
        RoundedSGD([mine], lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01),
    )
    for number in range(5):
        for p, optimizer in zip((mine, theirs), optimizers, strict=True):
            p.grad = torch.randn(50, generator=torch.Generator().manual_seed(number))
            optimizer.step()

    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_recipe_makes_the_optimizer(kind: str) -> None:
    """SGD becomes a `RoundedSGD`, AdamW a wrapper; layers with products that were left are not rounded."""
    model = network(TEXT if kind == "sgd" else TEXT.replace("momentum_buffer", "exp_avg"))
    ps = model.parameters()
    inner = torch.optim.SGD(ps, lr=0.05, momentum=0.5) if kind == "sgd" else torch.optim.AdamW(ps, lr=0.05)
    optimizer = from_recipe(model, inner)
    for number in range(3):
        step(model, optimizer, number)

    name = "momentum_buffer" if kind == "sgd" else "exp_avg"
    assert type(optimizer) is (RoundedSGD if kind == "sgd" else LowBitOptimizer)
    for part in (model[0].weight, model[1].weight):
        assert on(part, 23)
        assert on(optimizer.state[part][name], 12)
    assert not on(model[3].weight, 23)
    assert not on(optimizer.state[model[3].weight][name], 12)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_saved_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    """4 steps are 2, a saved state in a fresh model and optimiser, and 2 more, with stochastic formats."""
    text = TEXT.replace("fraction = 12 }", 'fraction = 12 }\nrounding = "stochastic"')
    text = text if kind == "sgd" else text.replace("momentum_buffer", "exp_avg")

    def made(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = network(text)
        ps = model.parameters()
        inner = torch.optim.SGD(ps, lr=0.05, momentum=0.5) if kind == "sgd" else torch.optim.AdamW(ps, lr=0.05)
        return model, from_recipe(model, inner, seed=seed)

    whole, optimizer = made(1)
    for number in range(2):
        step(whole, optimizer, number)
    kept = copy.deepcopy((whole.state_dict(), lowbit.state_dict(whole), optimizer.state_dict()))
    for number in range(2, 4):
        step(whole, optimizer, number)
    second, optimizer = made(2)
    second.load_state_dict(kept[0])
    lowbit.load_state_dict(second, kept[1])
    optimizer.load_state_dict(kept[2])
    for number in range(2, 4):
        step(second, optimizer, number)

    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_without_the_update_warns_once() -> None:
    """If weights change by an optimiser that does not round, the second step says what to do, and the third nothing."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step(model, optimizer, 0)

    with pytest.warns(UserWarning, match=r"recipe mine rounds updates too.*lowbit.optim.from_recipe"):
        step(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, 2)


def test_forwards_without_updates_do_not_warn() -> None:
    """Training forwards that change no weight, as of a proof, are silent."""
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.ones(4, 8)).sum().backward()

    assert model[0].weight.grad is not None


def test_settings_that_have_no_rounded_form_are_refused() -> None:
    """Nesterov momentum, an optimiser that made steps, and a state that SGD lacks."""
    model = network()
    nesterov = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    with pytest.raises(UsageError, match="nesterov=True has no rounded form"):
        from_recipe(model, nesterov)
    with pytest.raises(UsageError, match="only state of RoundedSGD"):
        RoundedSGD([nn.Parameter(torch.ones(2))], update=Update(states=(("exp_avg", fixed(2, 12)),)))
    with pytest.raises(UsageError, match="nothing in this model is converted"):
        from_recipe(nn.Linear(2, 2), nesterov)


def test_a_recipe_without_an_update_leaves_the_optimizer() -> None:
    """`from_recipe` gives back what it got, and a wrapper where settings ask for one."""
    model = nn.Sequential(nn.Linear(8, 4))
    lowbit.convert_(model, "int8", engine="reference")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert from_recipe(model, optimizer) is optimizer
    assert isinstance(from_recipe(model, optimizer, states="int8"), LowBitOptimizer)


class _Function(nn.Module):
    """A product in a function, by a weight of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 4) to (B, 4)."""
        return x @ self.weight


def test_weights_of_functions_are_rounded_once_the_model_has_run() -> None:
    """Before a forward they are left, with a warning that names the module; after it they are on the grid."""
    net = nn.Sequential(nn.Linear(4, 4), _Function())
    lowbit.convert_(net, "fixed16")
    with pytest.warns(UserWarning, match=r"'1'.* may multiply in functions and did not run yet"):
        lowbit.optim.from_recipe(net, torch.optim.SGD(net.parameters(), lr=0.1))

    net(torch.randn(2, 4)).sum().backward()
    lowbit.optim.from_recipe(net, torch.optim.SGD(net.parameters(), lr=0.1)).step()

    grid = net[1].weight.detach().double() * 2**14
    assert torch.equal(grid, grid.round())
