"""Attention that a model's functions ask for, in the formats that a recipe has for it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.engines import int8
from lowbit.evidence.proof import Proof

NAME = "scaled_dot_product_attention.0"
needs_units = pytest.mark.skipif(bool(int8.missing("int8") or int8.missing("bf16")), reason="no 8-bit units here")


class SelfAttention(nn.Module):
    """Heads of queries, fewer of keys if asked, and torch's function with its own arguments."""

    def __init__(self, groups: int = 4, **arguments: Any) -> None:
        super().__init__()
        self.groups, self.arguments = groups, arguments
        self.qkv, self.out = nn.Linear(32, 32 + 2 * groups * 8), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 32) to (B, T, 32)."""
        q, k, v = self.qkv(x).split([32, self.groups * 8, self.groups * 8], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, **self.arguments).transpose(1, 2).flatten(-2))


def model(seed: int = 0, **arguments: Any) -> nn.Module:
    """Attention between two layers of its own."""
    torch.manual_seed(seed)
    return nn.Sequential(SelfAttention(**arguments), nn.ReLU(), nn.Linear(32, 8))


def batch(step: int = 0) -> Tensor:
    """A batch of sequences."""
    return torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(step))


def prove(net: nn.Module) -> Proof:
    """The proof of one step."""
    with lowbit.verify(net) as proof:
        net(batch()).square().mean().backward()
    return proof


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(70, 70, dtype=torch.bool).tril(3)},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 70).repeat(70, 1)},
    "scale": {"scale": 0.1},
    "grouped queries": {"groups": 2, "enable_gqa": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["reference", pytest.param("int8", marks=needs_units)])
def test_attention_runs_in_the_recipes_formats(name: str, engine: str) -> None:
    """All of a model's products are in low precision, and results are near those of torch and not equal to them."""
    plain = model(**CASES[name])
    net = copy.deepcopy(plain)
    lowbit.convert_(net, "int8-attention", engine=engine)

    proof = prove(net)
    y, wanted = net(batch()), plain(batch())
    plain(batch()).square().mean().backward()

    rows = {(row.layer, row.product): row for row in proof.rows}
    for part in ("scores", "values"):
        for product in ("output", "grad_input", "grad_weight"):
            assert set(rows[f"0.{NAME}.{part}", product].engines) == {engine}
    assert proof.outside == []
    assert not torch.equal(y, wanted)
    torch.testing.assert_close(y, wanted, rtol=0.1, atol=0.05)
    for (key, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98, key


@pytest.mark.parametrize("recipe", ["int8", "sbm8"])
def test_other_recipes_leave_attention_as_it_is(recipe: str) -> None:
    """Its products are named as outside."""
    net = model()
    lowbit.convert_(net, recipe)

    proof = prove(net)

    assert not any(NAME in row.layer for row in proof.rows)
    assert any("attention" in row.op for row in proof.outside)


def test_a_rule_leaves_a_call() -> None:
    """By the name of the call, which is that of the module, the function and its number."""
    net = model()
    lowbit.convert_(net, "int8-attention", rules=[(f"0.{NAME}", None)])

    assert not any(NAME in row.layer for row in prove(net).rows)


def test_calls_without_layers_stay_as_they_are_too() -> None:
    """With calls=False only layers are converted."""
    net = model()
    lowbit.convert_(net, "int8-attention", calls=False)

    assert not any(NAME in row.layer for row in prove(net).rows)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    """Dropout in attention has lowbit's noise, so a resumed model drops what the other one drops."""
    net, other = (model(dropout_p=0.3) for _ in range(2))
    for each in (net, other):
        lowbit.convert_(each, "int8-attention", seed=3)
    net(batch())
    other.load_state_dict(net.state_dict())
    lowbit.load_state_dict(other, lowbit.state_dict(net))

    assert torch.equal(net(batch(1)), other(batch(1)))
    assert not torch.equal(net(batch(1)), net(batch(1)))


def test_going_back_gives_torchs_attention() -> None:
    """After restore_ the model is the plain one, bit for bit."""
    plain = model()
    net = copy.deepcopy(plain)
    lowbit.convert_(net, "int8-attention")
    net(batch())

    lowbit.restore_(net)

    assert torch.equal(net(batch()), plain(batch()))


def test_the_meter_counts_it() -> None:
    """Scores and values each have three products, and the scores are computed twice."""
    net = model()
    lowbit.convert_(net, "int8-attention")
    with lowbit.Meter(net) as meter:
        net(batch()).square().mean().backward()

    totals = meter.ledger.totals()
    macs = {part: sum(t.macs for t in totals if t.product.layer.endswith(part)) for part in ("scores", "values")}
    one = 2 * 4 * 70 * 70 * 8
    assert macs == {"scores": 4 * one, "values": 3 * one}
