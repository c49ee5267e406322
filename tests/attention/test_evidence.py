"""Attention of a model's site in its proof and in its bill."""

import torch
from torch import Tensor, nn

import lowbit
from lowbit.functional import attention
from lowbit.nn.layers import sites_of


class Heads(nn.Module):
    """A projection whose output attends to itself, at the projection's site once it is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 16) to (B, 2, T, 8)."""
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        site = next(iter(sites_of(self)))
        return attention(q, k, v, causal=True, setting=site.setting_now(x))


def model() -> Heads:
    """It is in `int8-attention` on whatever engine this machine has."""
    torch.manual_seed(0)
    made = Heads()
    lowbit.convert_(made, "int8-attention")
    return made


def test_the_proof_has_a_row_for_each_product() -> None:
    """Three products of scores and three of values stand beside those of the layer, near and not exact."""
    net = model()

    with lowbit.verify(net) as proof:
        net(torch.randn(2, 70, 16, requires_grad=True)).square().sum().backward()

    rows = {(row.layer, row.product): row for row in proof.rows}
    for part in ("scores", "values"):
        for product in ("output", "grad_input", "grad_weight"):
            row = rows[f"projection.{part}", product]
            assert row.bits == ("16x16" if (part, product) == ("values", "grad_input") else "8x8")
            assert 20 < row.sqnr_db < 70
    assert rows["projection.scores", "output"].calls == 2, "the backward computes the scores again"
    assert not proof.outside


def test_the_bill_counts_seven_products() -> None:
    """A step of the meter has the scores twice and five more, all pairs of positions each."""
    net = model()

    with lowbit.Meter(net) as meter:
        net(torch.randn(2, 70, 16, requires_grad=True)).square().sum().backward()
        meter.step()

    (program,) = meter.ledger.programs
    counted = {
        (meter.ledger.products[i].layer, meter.ledger.products[i].product): (times, meter.ledger.products[i].macs)
        for i, times in program.calls
        if meter.ledger.products[i].layer != "projection"
    }
    assert len(counted) == 6
    assert sum(times for times, _ in counted.values()) == 7
    assert {macs for _, macs in counted.values()} == {2 * 2 * 70 * 70 * 8}
