"""The products between queries, keys and values of multi-head attention, under recipes that have formats for them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.engines import int8

needs_units = pytest.mark.skipif(bool(int8.missing("int8") or int8.missing("bf16")), reason="no 8-bit units here")
PARTS = ("scores", "values")


def encoder(**options: Any) -> nn.Module:
    """One encoder layer of 4 heads of 8."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **options)


def batch() -> torch.Tensor:
    """Two sequences of 70 positions."""
    return torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("engine", ["reference", pytest.param("int8", marks=needs_units)])
@pytest.mark.parametrize(
    "masks",
    [{}, {"src_mask": nn.Transformer.generate_square_subsequent_mask(70)}, {"src_key_padding_mask": "last"}],
    ids=["all", "causal", "padding"],
)
def test_no_product_of_an_encoder_is_left(engine: str, masks: dict[str, Any]) -> None:
    """All six of attention's products run on the engine, nothing is outside, and results are near, not equal."""
    plain = encoder()
    if masks.get("src_key_padding_mask") == "last":
        masks = {"src_key_padding_mask": torch.arange(70)[None] >= torch.tensor([[70], [50]])}
    net = copy.deepcopy(plain)
    lowbit.convert_(net, "int8-attention", engine=engine)

    with lowbit.verify(net) as proof:
        y = net(batch(), **masks)
        y.square().mean().backward()

    rows = {(row.layer, row.product): row for row in proof.rows}
    for part in PARTS:
        for product in ("output", "grad_input", "grad_weight"):
            assert set(rows[f"self_attn.attention.{part}", product].engines) == {engine}
    assert proof.outside == []
    wanted = plain(batch(), **masks)
    assert not torch.equal(y, wanted)
    torch.testing.assert_close(y, wanted, rtol=0.1, atol=0.1)


def test_other_recipes_leave_it() -> None:
    """Under `int8` the core is outside, as torch computes it."""
    net = encoder()
    lowbit.convert_(net, "int8")

    with lowbit.verify(net) as proof:
        net(batch()).square().mean().backward()

    assert not any("attention" in row.layer for row in proof.rows)
    assert any("attention" in row.op for row in proof.outside)


def test_asking_for_the_weights_is_not_silent() -> None:
    """The weights are those of full precision, and the proof says that the quantisers of the core did not run."""
    plain = nn.MultiheadAttention(32, 4, batch_first=True)
    net = copy.deepcopy(plain)
    lowbit.convert_(net, "int8-attention")
    x = batch()

    with pytest.raises(lowbit.VerificationError, match=r"attention: the quantisers .* did not run"), lowbit.verify(net):
        _, weights = net(x, x, x)

    torch.testing.assert_close(weights, plain(x, x, x)[1], rtol=0.1, atol=1e-3)


def test_dropout_goes_by_step_and_a_saved_state() -> None:
    """Each step drops others, evaluation none, and a state that is loaded repeats the step that followed it."""
    net = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    lowbit.convert_(net, "int8-attention")
    x = batch()

    def out() -> torch.Tensor:
        return net(x, x, x, need_weights=False)[0].detach()

    first, state = out(), lowbit.state_dict(net)
    second = out()
    lowbit.load_state_dict(net, state)

    assert not torch.equal(first, second)
    assert torch.equal(out(), second)
    net.eval()
    assert torch.equal(out(), out())


def test_it_is_gone_after_restoring() -> None:
    """The plain layer's output is bit-identical to what it was."""
    plain = encoder()
    net = copy.deepcopy(plain)
    lowbit.convert_(net, "int8-attention")
    lowbit.restore_(net)

    assert type(net.self_attn) is nn.MultiheadAttention
    assert torch.equal(net(batch()), plain(batch()))
