"""Rules that give each layer its own bits: the sqrt(3) rule and the budget, on measures that are written down."""

import itertools
import math
import random
from functools import partial
from typing import Any

import pytest

from lowbit.errors import RunError, UsageError
from lowbit.schedules import Budget, Deficit, GradientNoise, Measure, Option, Piecewise, Template, allocate


def measure(*, bits: int = 4, gradient: float = 1.0, error: float = 0.0, loss: float = 0.0, macs: int = 10) -> Measure:
    """A layer all of whose operands but one have the layer's bits."""
    return Measure(
        bits=bits,
        gradient=gradient,
        gradient_error=error,
        loss_error=loss,
        macs={(None, None): 2 * macs, (None, 16): macs},
    )


def test_the_width_changes_at_the_root_of_three() -> None:
    """|G| = 1 keeps 4 bits with noise just below 1 / sqrt(3), and goes to 8 just above it."""
    rule = GradientNoise(bits=[4, 8])
    rule.begin(["a", "b"])

    assert rule.take({"a": measure(error=1 / 3 - 1e-9), "b": measure(error=1 / 3 + 1e-9)})
    assert rule.now == {"a": 4, "b": 8}


def test_patience_counts_measurements_in_a_row() -> None:
    """With patience 2, a measurement above the threshold in between starts the count again."""
    rule = GradientNoise(bits=[4, 6, 8], patience=2)
    rule.begin(["a"])
    seen = []
    for error in (1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        rule.take({"a": measure(error=error)})
        seen.append(rule.now["a"])

    assert seen == [4, 4, 4, 6, 6, 8, 8]


def test_bits_never_fall_and_idle_layers_keep_theirs() -> None:
    """A large gradient later does not take bits back, and a layer that was not measured stays."""
    rule = GradientNoise(bits=[4, 8])
    rule.begin(["a", "b"])
    rule.take({"a": measure(error=9.0)})

    assert not rule.take({"a": measure(bits=8)})
    assert rule.now == {"a": 8, "b": 4}


@pytest.mark.parametrize(
    "make",
    [partial(GradientNoise, bits=[2, 4, 8], patience=2), partial(Budget, bits=[2, 4, 8], budget=0.6)],
    ids=["noise", "budget"],
)
def test_a_rule_continues_from_its_state(make: Any) -> None:
    """6 updates = 3 updates + save + load + 3 updates."""
    measured = [{n: measure(error=0.2 * i, loss=i, bits=4) for n in ("a", "b")} for i in range(6)]
    rule, other = make(), make()
    for each in (rule, other):
        each.begin(["a", "b"])
    for found in measured[:3]:
        rule.take(found)
    other.load_state_dict(rule.state_dict())
    for found in measured[3:]:
        rule.take(found)
        other.take(found)

    assert rule.state_dict() == other.state_dict()
    assert set(rule.now.values()) != {2}


@pytest.mark.parametrize("state", [{}, {"bits": {"a": 5}}, {"bits": {"b": 4}}, {"bits": {"a": True}}])
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    """A state with other layers or widths changes nothing."""
    rule = Budget(bits=[4, 8], budget=0.5)
    rule.begin(["a"])

    with pytest.raises(UsageError):
        rule.load_state_dict(state)
    assert rule.now == {"a": 4}


def test_a_gradient_that_is_not_finite_names_its_layer() -> None:
    """An inf would decide for or against bits in silence."""
    rule = GradientNoise(bits=[4, 8])
    rule.begin(["a"])

    with pytest.raises(RunError, match="a: the gradient"):
        rule.take({"a": measure(gradient=math.inf)})


def test_the_budget_goes_where_the_damage_is() -> None:
    """Of two equal layers, the one with more noise gets the bits, and the budget is met."""
    rule = Budget(bits=[4, 8], budget=0.7)
    rule.begin(["a", "b"])
    measured = {"a": measure(error=0.01, loss=1.0), "b": measure(error=0.04, loss=2.0)}
    rule.take(measured)

    assert rule.now == {"a": 4, "b": 8}
    spent = sum(found.operations(rule.now[name]) for name, found in measured.items())
    assert spent <= 0.7 * sum(found.operations(8) for found in measured.values())


def test_the_whole_budget_gives_all_bits() -> None:
    """At budget 1 every layer gets the highest width."""
    rule = Budget(bits=[4, 8], budget=1.0)
    rule.begin(["a", "b"])
    rule.take({"a": measure(error=0.01), "b": measure(error=0.02)})

    assert rule.now == {"a": 8, "b": 8}


def test_a_budget_that_fixed_operands_exceed_is_an_error() -> None:
    """4 of 8 bits take more than a quarter of the operations where an operand keeps 16 bits."""
    rule = Budget(bits=[4, 8], budget=0.25)
    rule.begin(["a"])

    with pytest.raises(RunError, match="operands that keep their own width"):
        rule.take({"a": measure(error=0.1)})


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (GradientNoise, {"bits": [8]}, "two widths"),
        (GradientNoise, {"bits": [8, 4]}, "smallest first"),
        (GradientNoise, {"bits": [4, 8], "ratio": 0.0}, "ratio"),
        (GradientNoise, {"bits": [4, 8], "measure_every": 0}, "measure_every"),
        (Budget, {"bits": [4, 8], "budget": 0.2}, "already take 0.25"),
        (Budget, {"bits": [4, 8], "budget": 1.5}, "share"),
    ],
)
def test_impossible_settings_are_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    """The message names the setting."""
    with pytest.raises(UsageError, match=message):
        make(**settings)


def test_allocation_is_close_to_the_best() -> None:
    """On 200 small problems the greedy choice fits, and does at most the damage of the best choice one option below.

    The greedy solution of a knapsack on convex hulls loses less than one step of one layer against the optimum.
    """
    draw = random.Random(0)
    for _ in range(200):
        options = {
            name: [Option(bits=b, cost=b * b * w, damage=d * 4.0**-b) for b in (2, 4, 8)]
            for name, w, d in ((n, draw.randint(1, 9), draw.random()) for n in "abc")
        }
        budget = draw.uniform(0.2, 1.0) * sum(of_layer[-1].cost for of_layer in options.values())
        chosen = allocate(options, budget)
        possible = [c for c in itertools.product(*options.values()) if sum(o.cost for o in c) <= budget]
        best = min(sum(o.damage for o in c) for c in possible)
        steps = [a.damage - b.damage for of_layer in options.values() for a, b in itertools.pairwise(of_layer)]

        assert sum(o.cost for o in chosen.values()) <= budget
        assert best <= sum(o.damage for o in chosen.values()) <= best + max(steps)


def test_a_deficit_has_a_name() -> None:
    """Recipes and the command line know the kind, which is `Deficit` in constant bits."""
    made = Template(kind="deficit", settings=(("bits", 8), ("low", 3), ("start", "0.5"), ("length", 2))).build(
        total_steps=10
    )

    assert made == Deficit(schedule=Piecewise(pieces=((0, 8),), total_steps=10), bits=3, start="0.5", length=2)
    assert [made.at(t) for t in range(4, 8)] == [8, 3, 3, 8]
