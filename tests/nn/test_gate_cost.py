"""What a choice costs, and the penalty that trains the cost."""

import pytest
import torch
import torch.nn.functional as F

from gated_network import CHOICES, X, force, gated
from lowbit import UsageError
from lowbit.nn.gate import direction, products_cost


@pytest.mark.parametrize(
    ("cost", "band", "expected"),
    [
        (2.9, 0, -1),
        (3.0, 0, 1),
        (3.1, 0, 1),
        (2.4, 0.5, -1),
        (2.5, 0.5, -0.1),
        (3.0, 0.5, 0.1),
        (3.4, 0.5, 0.1),
        (3.5, 0.5, 1),
    ],
)
def test_direction_follows_the_authors_rule(cost: float, band: float, expected: float) -> None:
    """Below the target -1, at or above it +1, a tenth of that inside the band, whose upper end is outside."""
    assert direction(cost, target=3.0, band=band, inside=0.1) == expected


@pytest.mark.parametrize(
    ("weight", "costs"),
    [(4, [1.758, 2.083, 2.604, 3.385, 4.688]), (3, [1.465, 1.758, 2.214, 2.930, 4.102])],
)
def test_cost_of_a_choice(weight: int, costs: list[float]) -> None:
    """Percent of full precision of the authors' five choices with 4-bit and 3-bit weights."""
    pairs = [(3, 6), (4, 6), (4, 8), (6, 8), (6, 12)]

    ours = [100 / 3 * products_cost(torch.tensor([a, weight, g, weight, g, a])) for a, g in pairs]

    assert ours == pytest.approx(costs, abs=5e-4)


def test_penalty_is_the_weighted_sum_over_the_batch() -> None:
    """R beta sum of mask times cost times m/mean(m), and the cost in percent is its mean."""
    model, _, gates = gated(targets=[1.0], strength=0.5)
    choices = [[0, 0, 1, 1, 1, 2], [1] * 6, [2] * 6]
    force(gates, choices)
    model(X)
    penalty = gates.penalty()

    cost = [products_cost(torch.tensor([a, 4, g, 4, g, a])) for a, g in CHOICES]
    macs = [4 * 4 * 9 * 2, 4 * 6 * 9 + 6 * 6 * 9 + 4 * 6, 6 * 6 * 9 * 2]
    mean = sum(macs) / 3
    expected = sum(m / mean * cost[k] for m, row in zip(macs, choices, strict=True) for k in row)
    assert penalty.item() == pytest.approx(0.5 * expected)
    assert gates.cost == pytest.approx(100 * expected / (3 * 6 * 3))


def test_equal_weighting_counts_every_block_the_same() -> None:
    """With weighting="equal" C has the cost per MAC of each block, whatever its size, as in the authors' code."""
    model, _, gates = gated(targets=[1.0], strength=0.5, weighting="equal")
    choices = [[0, 0, 1, 1, 1, 2], [1] * 6, [2] * 6]
    force(gates, choices)
    model(X)
    penalty = gates.penalty()

    cost = [products_cost(torch.tensor([a, 4, g, 4, g, a])) for a, g in CHOICES]
    expected = sum(cost[k] for row in choices for k in row)
    assert penalty.item() == pytest.approx(0.5 * expected)
    assert gates.cost == pytest.approx(100 * expected / (3 * 6 * 3))


def test_penalty_pushes_the_cost_to_its_target() -> None:
    """Trained by the cost term alone, gates that start far above or below the target end around it."""
    for start in (0, 2):
        model, _, gates = gated(targets=[3.0], strength=0.05)
        with torch.no_grad():
            gates.gate.projection.bias.copy_(F.one_hot(torch.tensor(start), 3) * 2.0)
        optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
        costs = []
        for _ in range(60):
            model(X)
            gates.penalty().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert gates.cost is not None
            costs.append(gates.cost)

        assert abs(costs[0] - 3.0) > 1.1
        assert abs(sum(costs[-30:]) / 30 - 3.0) < 0.5


def test_penalty_needs_a_training_forward() -> None:
    """Without a forward since the last call there is no cost to ask for; an evaluation is none."""
    model, _, gates = gated()
    model.eval()(X)
    with pytest.raises(UsageError, match=r"penalty\(\) without a training forward"):
        gates.penalty()
    model.train()(X)
    gates.penalty()

    with pytest.raises(UsageError, match=r"penalty\(\) without"):
        gates.penalty()
