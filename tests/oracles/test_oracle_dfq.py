"""The gate of DFQ against vectors from the FracTrain authors' code."""

import pytest
import torch
from torch import Tensor

from helpers import Vectors
from lowbit.nn.gate import RecurrentGate

VECTORS = "dynamic/dfq_gate.npz"
NAMES = {
    "rnn_one.weight_ih_l0": "cell.weight_ih",
    "rnn_one.weight_hh_l0": "cell.weight_hh",
    "rnn_one.bias_ih_l0": "cell.bias_ih",
    "rnn_one.bias_hh_l0": "cell.bias_hh",
    "proj.weight": "projection.weight",
    "proj.bias": "projection.bias",
}


def _gate(vectors: Vectors) -> RecurrentGate:
    gate = RecurrentGate(features=16, state=16, choices=5)
    gate.load_state_dict({ours: vectors[f"p_{theirs}"] for theirs, ours in NAMES.items()})
    return gate


def _masks(gate: RecurrentGate, x: Tensor) -> Tensor:
    state, masks = None, []
    for features in x:
        mask, state = gate(features, state)
        masks.append(mask)
    return torch.stack(masks)


def test_choices_equal_the_authors(vectors: Vectors) -> None:
    """The one-hot choices of 6 blocks and 4 samples are the authors', and more than one choice is made."""
    masks = _masks(_gate(vectors), vectors["x"])

    assert torch.equal(masks.detach(), vectors["masks"])
    assert len(masks.argmax(-1).unique()) > 1


def test_gradients_equal_the_authors(vectors: Vectors) -> None:
    """The straight-through gradient of all parameters and of the input is the authors' to 1e-6."""
    gate, x = _gate(vectors), vectors["x"].requires_grad_()
    (_masks(gate, x) * vectors["coef"]).sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, vectors["grad_x"], rtol=1e-6, atol=1e-6)
    parameters = dict(gate.named_parameters())
    for theirs, ours in NAMES.items():
        grad = parameters[ours].grad
        assert grad is not None
        torch.testing.assert_close(grad, vectors[f"g_{theirs}"], rtol=1e-6, atol=1e-6)
        assert grad.abs().max() > 0


def test_a_tie_gives_one_choice(vectors: Vectors) -> None:
    """Where the authors' code selects every one of equal choices, this one selects the first."""
    gate = _gate(vectors)
    torch.nn.init.zeros_(gate.projection.weight)
    torch.nn.init.zeros_(gate.projection.bias)
    mask, _ = gate(torch.randn(2, 16), None)

    assert vectors["tie_mask"].sum(1).tolist() == [5, 5]
    assert mask.tolist() == [[1, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_works(vectors: Vectors, batch: int) -> None:
    """A batch of one, which stops the authors' code, gives the choice it has in a larger batch."""
    masks = _masks(_gate(vectors), vectors["x"][:, :batch])

    assert torch.equal(masks.detach(), vectors["masks"][:, :batch])
