"""Layers with bits of their own from what their products measured: the measures, which disturb nothing, and resume."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit import PrecisionController, Recipe
from lowbit.errors import UsageError
from lowbit.products import watch
from lowbit.schedules import Budget, GradientNoise, Layerwise, Measure

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


def network(recipe: str = "mxint8", rule: Layerwise | None = None) -> tuple[nn.Sequential, PrecisionController]:
    """Three linear layers with their controller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    lowbit.convert_(model, recipe, engine="reference")
    if rule is None:
        return model, PrecisionController.from_recipe(model, total_steps=100)
    return model, PrecisionController(model, forward=rule)


def train(model: nn.Module, bits: PrecisionController, steps: int, *, scale: float = 1.0) -> None:
    """So many steps of plain descent."""
    for _ in range(steps):
        (scale * model(X).square().mean()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        model.zero_grad()
        bits.step()


class Seen(GradientNoise):
    """A rule that keeps what it was shown, and changes nothing."""

    def update(self, measured: Any) -> None:
        """Keep it."""
        shown.append(dict(measured))


shown: list[dict[str, Measure]] = []


def test_what_is_measured_is_the_gradient_and_its_noise() -> None:
    """The squared norms equal those of the weight gradient as it ran and of its operands' product in full precision."""
    shown.clear()
    model, bits = network("mxint8:w4a4g4", Seen(bits=[4, 8]))
    found: dict[str, tuple[float, float]] = {}

    def observe(run: Any) -> None:
        if run.product == "grad_weight":
            exact = run.full_precision().double()
            found[run.layer] = float(exact.square().sum()), float((run.result.double() - exact).square().sum())

    with watch.observed_by(observe):
        model(X).square().mean().backward()
    bits.step()

    (measured,) = shown
    assert set(measured) == {"0", "2", "4"}
    for layer, (gradient, error) in found.items():
        assert measured[layer].gradient == pytest.approx(gradient, rel=1e-6)
        assert measured[layer].gradient_error == pytest.approx(error, rel=1e-6)
        assert 0 < measured[layer].noise < 1
        assert measured[layer].loss_error > 0
    assert measured["0"].operations(4) == 2 * 16 * 64 * 64 * 16  # no grad_input in the first layer
    assert measured["2"].operations(8) == 3 * 64 * 16 * 64 * 32


def test_measuring_changes_no_bit_of_the_run() -> None:
    """A run that is measured at every step has the weights of one that is measured once."""
    often, never = (
        network("mxint8:w4a4g4", Seen(bits=[4, 8], measure_every=1)),
        network("mxint8:w4a4g4", Seen(bits=[4, 8], measure_every=50)),
    )
    train(*often, 4)
    train(*never, 4)

    assert all(map(torch.equal, often[0].state_dict().values(), never[0].state_dict().values()))


def test_observers_are_there_in_measured_steps_only() -> None:
    """Between step 0 and step 3 nobody looks on, and nobody is left when the model goes in the middle of a step."""
    before = len(watch.observers)
    model, bits = network("mxint8", GradientNoise(bits=[4, 8], measure_every=3))
    counts = []
    for _ in range(4):
        model(X).sum().backward()
        counts.append(len(watch.observers) - before)
        bits.step()
    model(X)
    gone = weakref.ref(bits)
    for _ in range(2):
        model(X).sum().backward()
        bits.step()
    model(X)
    del model, bits
    gc.collect()
    lowbit.convert_(other := nn.Linear(64, 4), "int8")
    other(X)

    assert counts == [1, 0, 0, 1]
    assert gone() is None
    assert len(watch.observers) == before


def test_an_evaluation_in_a_measured_step_is_not_measured() -> None:
    """What runs in evaluation mode before the step ends counts for nothing."""
    figures = []
    for evaluate in (False, True):
        shown.clear()
        model, bits = network("mxint8:w4a4g4", Seen(bits=[4, 8]))
        model(X).square().mean().backward()
        if evaluate:
            model.eval()(10 * X)
            model.train()
        bits.step()
        figures.append(shown[0])

    assert figures[0] == figures[1]


def test_a_layer_in_the_noise_goes_to_more_bits() -> None:
    """A ratio that only fine gradients reach raises a layer, and all operands of the layer have the new width."""
    model, bits = network("mxint8", GradientNoise(bits=[3, 8], measure_every=1, ratio=20.0))
    first = set(bits.bits().values())
    train(model, bits, 1)
    raised = [layer for layer, widths in bits.bits().items() if widths == (8, 8)]
    with lowbit.verify(model) as proof:
        model(X).square().mean().backward()

    assert first == {(3, 3)}
    assert raised
    assert {row.bits for row in proof.rows if row.layer in raised} == {"8x8"}


@pytest.mark.parametrize("recipe", ["sqrt3", "budget"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_resume_is_exact(recipe: str, k: int) -> None:
    """7 steps = k steps + save + load + 7 - k steps, before, at and after a measurement, and some layer changes."""
    mine = Recipe.from_name(recipe).tuned(measure_every=3).replace(name="mine")
    if recipe == "sqrt3":
        mine = mine.tuned(ratio=12.0)  # so that a few steps show a change

    def made() -> tuple[nn.Sequential, PrecisionController]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        lowbit.convert_(model, mine, engine="reference")
        return model, PrecisionController.from_recipe(model, total_steps=7)

    model, bits = made()
    train(model, bits, k)
    saved = copy.deepcopy((model.state_dict(), lowbit.state_dict(model), bits.state_dict()))
    train(model, bits, 7 - k)
    again, own = made()
    again.load_state_dict(saved[0])
    lowbit.load_state_dict(again, saved[1])
    own.load_state_dict(saved[2])
    train(again, own, 7 - k)

    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert bits.bits() == own.bits()
    assert set(bits.bits().values()) != {(4, 4)}


def test_the_ledger_meets_the_budget() -> None:
    """The bit operations of a run are at most the budget's share of those at 8 bits throughout, and use most of it."""
    budget = 0.5
    model, bits = network("mxint8", Budget(bits=[2, 3, 4, 5, 6, 7, 8], budget=budget, measure_every=4))
    with lowbit.Meter(model) as meter:
        for _ in range(12):
            model(X).square().mean().backward()
            model.zero_grad()
            bits.step()
            meter.step()
    whole, _ = network("mxint8", GradientNoise(bits=[4, 8]))
    most = sum(t.bit_operations for t in lowbit.plan(whole, X, steps=12, forward=8, backward=8).totals())
    spent = sum(t.bit_operations for t in meter.ledger.totals())

    assert 0.3 * most < spent <= budget * most
    assert len(set(bits.bits().values())) > 1


def test_layers_with_a_rule_keep_their_bits() -> None:
    """`rules` come first, and a layer that a rule decides is neither measured nor changed."""
    model, _ = network("mxint8", Seen(bits=[4, 8]))
    lowbit.restore_(model)
    lowbit.convert_(model, "mxint8", engine="reference")
    shown.clear()
    bits = PrecisionController(model, forward=Seen(bits=[4, 8]), rules=[("2", (6, 6))])
    train(model, bits, 1)

    assert bits.bits() == {"0": (4, 4), "2": (6, 6), "4": (4, 4)}
    assert set(shown[0]) == {"0", "4"}


@pytest.mark.parametrize("arguments", [{"backward": 8}, {"forward": 8, "backward": GradientNoise(bits=[4, 8])}])
def test_gradients_follow_the_same_rule(arguments: dict[str, Any]) -> None:
    """A rule for each layer sets all operands, so `backward` beside it, or the rule as `backward`, is refused."""
    model = nn.Sequential(nn.Linear(64, 8))
    lowbit.convert_(model, "mxint8", engine="reference")

    with pytest.raises(UsageError, match="backward"):
        PrecisionController(model, **{"forward": GradientNoise(bits=[4, 8]), **arguments})


def test_a_state_of_another_rule_is_refused() -> None:
    """The settings of the rule are part of what identifies a state."""
    _, bits = network("mxint8", GradientNoise(bits=[4, 8]))
    _, other = network("mxint8", GradientNoise(bits=[4, 8], patience=2))

    with pytest.raises(UsageError, match="other layerwise"):
        other.load_state_dict(bits.state_dict())
