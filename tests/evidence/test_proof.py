"""What a proof says, as text, as plain values and as JSON."""

import json

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import Proof


def _mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    lowbit.convert_(model, "sbm8", engine="reference")
    return model


def _prove(model: nn.Module, x: Tensor) -> Proof:
    """The proof of one training step."""
    with lowbit.verify(model) as proof:
        model(x).square().sum().backward()
    return proof


def test_it_prints_its_rows() -> None:
    """The text has a line for each product and says that nothing ran outside."""
    text = str(_prove(_mlp(), torch.randn(5, 6)))

    assert text.count("reference") == 5
    assert "No product ran outside them." in text


def test_its_json_has_every_cell_of_the_text() -> None:
    """Each number of both tables, of the summary and of the lines between is there, unrounded."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    lowbit.convert_(model, "sbm8", rules=[("1", None)], engine="reference")
    proof = _prove(model, torch.randn(5, 6, requires_grad=True))

    data = json.loads(proof.to_json())

    layer, output = data["layers"][0], data["rows"][0]
    share, outside = data["outside_share"], data["outside"][0]
    assert proof.summary().splitlines()[2].split() == [
        layer["layer"],
        *layer["bits"].values(),
        *layer["engines"],
        f"{layer['lowest_sqnr_db']:.1f}",
    ]
    assert str(proof).splitlines()[2].split() == [
        output["layer"],
        output["product"],
        *output["engines"],
        *output["kernels"],
        str(output["calls"]),
        output["bits"],
        f"{output['sqnr_db']:.1f}",
        f"{output['cosine']:.5f}",
        f"{100 * output['clipped']:.2f}",
        f"{output['angle_bound']:.4f}",
        f"{output['bits_needed']:.1f}",
    ]
    assert f"{data['macs']:,} MACs inside converted layers.\n{100 * share:.2f} % of all MACs" in str(proof)
    assert str(proof).splitlines()[-2].split() == [
        outside["module"],
        outside["op"],
        str(outside["calls"]),
        f"{outside['macs']:,}",
        f"{100 * outside['share']:.2f}",
    ]
    assert len(data["rows"]) == len(proof.rows)
    assert len(data["outside"]) == len(proof.outside)
    assert f"bits for cos {data['wanted_cosine']}" in str(proof)
    assert (data["version"], data["notes"]) == (1, [])


def test_a_share_that_is_not_whole_is_said_to_be_more() -> None:
    """Beside an operator that is not counted the share is a lower bound; where all are counted it is the share."""
    model = _mlp()
    hidden = torch.eye(6).to_sparse()

    with lowbit.verify(model) as partly:
        model(torch.sparse.mm(hidden, torch.randn(6, 6))).sum().backward()
        torch.mm(torch.randn(3, 4), torch.randn(4, 5))
    with lowbit.verify(model) as wholly:
        model(torch.randn(6, 6)).sum().backward()
        torch.mm(torch.randn(3, 4), torch.randn(4, 5))

    assert f"\nAt least {100 * partly.outside_share:.2f} % of all MACs ran outside" in str(partly)
    assert f"\n{100 * wholly.outside_share:.2f} % of all MACs ran outside" in str(wholly)


def test_operands_have_their_own_figures() -> None:
    """Format, widths and error of both operands of a product."""
    proof = _prove(_mlp(), torch.randn(5, 6))

    weight = json.loads(proof.to_json())["rows"][0]["operands"]["weight"]

    own = proof.rows[0].operands["weight"]
    assert (weight["format"], weight["bits"], weight["most_bits"], weight["elements"]) == (own.format, 8, 8, 48)
    assert (weight["sqnr_db"], weight["cosine"], weight["exact"]) == (own.sqnr_db, own.cosine, False)


def test_an_exact_product_has_no_number_for_an_infinite_one() -> None:
    """The SQNR of the fp32 recipe is null, which every reader of JSON takes, and `exact` says why."""
    model = nn.Linear(6, 8)
    lowbit.convert_(model, "fp32")

    text = _prove(model, torch.randn(5, 6)).to_json()

    rows = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert {(row["sqnr_db"], row["exact"], row["bits_needed"]) for row in rows} == {(None, True, None)}
