"""What torch itself offers around a model: averages, clipping, parametrisations, functional calls, copies, files."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import lowbit
from lowbit import UsageError
from lowbit.schedules import Cyclic

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def network(recipe: str = "sbm8", *, norm: bool = False) -> nn.Sequential:
    """A converted network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 2))
    lowbit.convert_(model, recipe, engine="reference")
    return model


def train(model: nn.Module, after: Callable[[nn.Module], object], steps: int = 4) -> None:
    """Some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        after(model)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_an_averaged_model_carries_ranges_and_bits(average: Any) -> None:
    """Torch's `AveragedModel` keeps buffers in step: it evaluates with the ranges and evaluation bits of now."""
    model = network()
    lowbit.PrecisionController(model, forward=Cyclic(low=3, high=7, cycles=2, total_steps=8))
    averaged = AveragedModel(model, multi_avg_fn=average)
    train(model, averaged.update_parameters)
    site, own = averaged.module[0].site, model[0].site

    assert torch.equal(site.running_range, own.running_range)
    assert site.running_range[2] == 4
    assert torch.equal(site.evaluation_bits, own.evaluation_bits)
    assert averaged.eval()(X).isfinite().all()


def test_update_bn_of_an_average_trains_nothing_of_the_model() -> None:
    """`update_bn` runs the average in training mode: Range BN's statistics change, the model's clock does not."""
    model = network(norm=True)
    averaged = AveragedModel(model)
    train(model, averaged.update_parameters)
    before = averaged.module[1].running_mean.clone()
    update_bn([3 * X], averaged)

    assert not torch.equal(before, averaged.module[1].running_mean)
    assert lowbit.state_dict(model)["groups"][0]["step"] == 4


def test_gradients_are_clipped() -> None:
    """`clip_grad_norm_` sees plain gradients."""
    model = network()
    model(X).sum().backward()
    clip_grad_norm_(model.parameters(), 0.5)

    assert 0.49 < torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()])) < 0.501


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_converted_layer_takes_a_parametrisation(parametrize: Callable[[nn.Module], object]) -> None:
    """What the parametrisation computes is quantised, and its parameters get gradients."""
    model = network()
    parametrize(model[2])
    with lowbit.verify(model) as proof:
        model(X).sum().backward()

    assert {row.layer for row in proof.rows} == {"0", "2"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(UsageError, match="undo that first"):
        lowbit.restore_(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    lowbit.restore_(model)
    assert type(model[2]) is nn.Linear


def test_a_parametrised_layer_is_converted_by_what_it_calls() -> None:
    """Its class is another one, whose weight is made of parameters; without calls it is refused by name."""
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))

    with pytest.raises(UsageError, match=r"cannot convert 1 \(ParametrizedLinear\)"):
        lowbit.convert_(model, "sbm8", calls=False)
    lowbit.convert_(model, "sbm8")
    with lowbit.verify(model) as proof:
        model(torch.randn(3, 4)).sum().backward()

    assert {row.layer for row in proof.rows} == {"0", "1.linear.0"}


def test_functional_call_takes_other_parameters() -> None:
    """The products are those of the given weights, and a call is a step."""
    model = network("int8")
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    assert not functional_call(model, zeros, (X,)).any()
    assert lowbit.state_dict(model)["groups"][0]["step"] == 1


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_of_functions_are_refused(transform: str) -> None:
    """One sentence says why, and to use the plain model."""
    model = network("int8")
    weights = dict(model.named_parameters())
    call: dict[str, Callable[[], object]] = {
        "vmap": lambda: vmap(model)(X[None]),
        "grad": lambda: grad(lambda w: functional_call(model, w, (X,)).sum())(weights),
    }

    with pytest.raises(RuntimeError, match=r"^0: a transform of torch\.func .* before convert_ or after lowbit"):
        call[transform]()


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pickled_model_goes_on_as_its_original(way: str) -> None:
    """It has the noise, ranges and weights of the moment it was written: the next step is the same bit for bit."""
    model = network(norm=True)
    train(model, lambda _: None, steps=2)
    file = io.BytesIO()
    if way == "pickle":
        pickle.dump(model, file)
        file.seek(0)
        again = pickle.load(file)
    else:
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    for each in (model, again):
        train(each, lambda _: None, steps=2)

    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert str(lowbit.state_dict(model)) == str(lowbit.state_dict(again))


def test_accumulated_batches_have_noise_of_their_own() -> None:
    """Two equal batches before one update round their gradients differently; each forward is a step."""
    model = network("int8")
    gradients: list[Tensor] = []
    for _ in range(2):
        model.zero_grad()
        model(X).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())

    assert not torch.equal(*gradients)
    assert lowbit.state_dict(model)["groups"][0]["step"] == 2
