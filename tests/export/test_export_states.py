"""Converted models as states that plain torch reads."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.errors import UsageError
from lowbit.export import int8_state, plain_state, write_state
from lowbit.products.watch import ProductRun, observed_by


def network(recipe: str = "sbm8") -> nn.Module:
    """A converted convolution, normalisation and linear layer that trained for a step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    )
    lowbit.convert_(model, recipe)
    model(torch.randn(8, 3, 12, 12)).square().mean().backward()
    return model


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_the_plain_state_is_that_of_the_restored_model(tmp_path: Path) -> None:
    """A plain model loads the file, and is the restored one bit for bit."""
    model = network()
    write_state(plain_state(model), tmp_path / "m.pt")
    lowbit.restore_(model)
    other = nn.Sequential(*(type(m)(*a) for m, a in zip(model, [(3, 8, 3), (8,), (), (2,), (), (32, 5)], strict=True)))

    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))

    assert torch.equal(other.eval()(X), model.eval()(X))


@pytest.mark.parametrize("recipe", ["sbm8", "int8"])
def test_codes_give_the_weights_that_products_see(recipe: str) -> None:
    """``(q - zero) * scale`` is the weight that each product of an evaluation multiplied, and not the parameter."""
    model = network(recipe)
    runs: list[ProductRun] = []
    state = int8_state(model, X)
    with torch.no_grad(), observed_by(runs.append):
        model.eval()(X)

    for run in runs:
        if "weight" not in run.operands:
            continue
        q, scale = state[f"{run.layer}.weight"], state[f"{run.layer}.weight_scale"]
        w = (q.float() - state[f"{run.layer}.weight_zero"]) * scale.reshape(-1, *[1] * (q.dim() - 1))
        assert q.dtype == torch.int8
        assert torch.equal(w, run.operands["weight"].quantized)
        assert not torch.equal(w, run.operands["weight"].exact)
    assert ("0.input_scale" in state) == (recipe == "sbm8")


def test_an_input_range_that_is_kept_is_in_the_state() -> None:
    """With `sbm8`, the scale and the zero point of the state give the input that the first product sees."""
    model = network()
    state = int8_state(model, X)
    runs: list[ProductRun] = []
    with torch.no_grad(), observed_by(runs.append):
        model.eval()(X)

    scale, zero = state["0.input_scale"], state["0.input_zero"]
    x_hat = ((X / scale).round() + zero).clamp(0, 255).sub(zero) * scale

    assert torch.equal(x_hat, runs[0].operands["input"].quantized)
    assert not torch.equal(x_hat, X)


def test_safetensors_and_pt_hold_the_same(tmp_path: Path) -> None:
    """Both files give the state back; another suffix is refused."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = int8_state(network(), X)
    write_state(state, tmp_path / "m.pt")
    write_state(state, tmp_path / "m.safetensors")

    for read in (torch.load(tmp_path / "m.pt", weights_only=True), safetensors.load_file(tmp_path / "m.safetensors")):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], value) for name, value in state.items())
    with pytest.raises(UsageError, match=r"\.pt or \.safetensors"):
        write_state(state, tmp_path / "m.bin")


def test_formats_that_are_no_such_codes_are_refused() -> None:
    """Float offsets and blocks are named with the layer and what to do."""
    for recipe in ("w4a4g8", "mxfp8"):
        with pytest.raises(UsageError, match=r"--to plain"):
            int8_state(network(recipe), X)


def test_the_model_is_not_changed() -> None:
    """An export leaves mode, step and results as they were."""
    model, other = network(), network()
    int8_state(model.train(), X)

    assert model.training
    for net in (model, other):
        net.zero_grad()
        F.mse_loss(net(X), torch.zeros(4, 5)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))
