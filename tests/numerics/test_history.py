"""Delayed scaling: what a layer remembers, when it moves on, and what is saved of it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import Recipe, UsageError
from lowbit.methods.normalization import RangeNorm
from lowbit.methods.update import Update
from lowbit.nn.layers import sites_of
from lowbit.nn.site import Site
from lowbit.numerics.elements import Minifloat
from lowbit.numerics.formats import Format
from lowbit.numerics.history import Histories, advance, new_history
from lowbit.numerics.scales import Delayed, Scale
from lowbit.numerics.transforms import Hadamard

E4M3 = Minifloat(exponent=4, mantissa=3, top="nan")


def delayed(**fields: Any) -> Format:
    """E4M3 with a delayed scale."""
    return Format(element=E4M3, scale=Scale(range=Delayed(**fields)))


def converted(seed: int = 0) -> nn.Sequential:
    """Two layers in `fp8-delayed`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, "fp8-delayed")
    return model


def site(model: nn.Module, name: str = "0") -> Site:
    """The site of a layer."""
    return next(s for s in sites_of(model) if s.name == name)


def train(model: nn.Module, scales: list[float]) -> list[Tensor]:
    """Steps of plain gradient descent, the inputs of each so many times larger; the outputs."""
    found = []
    for i, scale in enumerate(scales):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) * scale
        y = model(x)
        y.square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.sub_(1e-3 * p.grad)
                p.grad = None
        found.append(y.detach())
    return found


def test_a_step_has_the_scale_of_the_steps_before_it() -> None:
    """The first step has S = 1, the second that of the first, whatever its own values are."""
    model, large = converted(), torch.full((1, 8), 1000.0)
    kept = site(model)

    as_it_is = model[0](torch.full((1, 8), 3.0))
    clipped = model[0](large)
    model.eval()
    like_three = model[0](torch.full((1, 8), 3.0))

    assert kept.histories[0, :3].tolist() == [3.0, 1000.0, 3.0]
    assert kept.histories[1, 0] == model[0].weight.abs().max()  # type: ignore[union-attr]  # a tensor
    torch.testing.assert_close(clipped, like_three, rtol=1e-5, atol=1e-5)
    assert not torch.equal(as_it_is, like_three)
    assert float(model[0](large).detach().abs().max()) < 20


def test_most_recent_looks_back_one_step_and_max_all_of_them() -> None:
    """After 8, 2 and 1 the largest of three is 8 and the last one 1; a fourth step forgets the 8."""
    for choice, wanted in (("max", [8.0, 8.0, 8.0, 2.0]), ("most-recent", [8.0, 2.0, 1.0, 1.0])):
        fmt, history = delayed(history=3, choice=choice), new_history(3)
        assert fmt.delay is not None
        found = []
        for a in (8.0, 2.0, 1.0, 1.0):
            Histories(kept={"input": history}, records=True).observe("input", torch.tensor([a, -a / 2]), fmt)
            advance(history, fmt.delay)
            found.append(float(history[0]))

        assert found == wanted


@pytest.mark.parametrize("margin", [0, 3])
def test_a_margin_leaves_binades_free(margin: int) -> None:
    """The range is 2**margin times as wide, and that of S = 1 before anything was seen."""
    fmt, history = delayed(history=2, margin=margin), new_history(2)
    x = torch.tensor([[2.0, -5.0]])
    seen = Histories(kept={"input": history}, records=True)
    assert fmt.delay is not None

    first = seen.observe("input", x, fmt)
    advance(history, fmt.delay)
    second = seen.observe("input", x, fmt)

    assert [float(v) for v in first] == [-448.0, 448.0]
    assert [float(v) for v in second] == [-5.0 * 2**margin, 5.0 * 2**margin]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_and_leaves_the_scale(bad: float) -> None:
    """The tensor becomes nan; with the largest of two steps the scale stays until the step is forgotten."""
    fmt, history = delayed(history=2), new_history(2)
    assert fmt.delay is not None
    scales = []
    for a in (4.0, bad, 1.0, 1.0):
        lo, _ = Histories(kept={"input": history}, records=True).observe("input", torch.tensor([a, 1.0]), fmt)
        assert bool(lo.isnan()) == (not math.isfinite(a))
        advance(history, fmt.delay)
        scales.append(float(history[0]))

    assert scales == [4.0, 4.0, 4.0, 1.0]


def test_evaluation_takes_the_scale_and_records_nothing() -> None:
    """After training, any number of evaluations leave the histories and give the same."""
    model = converted()
    train(model, [1.0, 2.0])
    before = site(model).histories.clone()
    x = torch.randn(3, 8) * 100
    model.eval()

    first, second = model(x), model(x)

    assert torch.equal(first, second)
    assert torch.equal(site(model).histories, before)


def test_a_stopped_run_goes_on_bit_for_bit() -> None:
    """Two steps, save, load into another model and two more steps are four steps; without the state they are not."""
    whole = converted()
    wanted = train(whole, [1.0, 50.0, 3.0, 2.0])
    first = converted()
    train(first, [1.0, 50.0])
    weights, state = first.state_dict(), lowbit.state_dict(first)

    def go_on(load: bool) -> Tensor:
        later = converted(seed=1)
        later.load_state_dict(weights)
        if load:
            lowbit.load_state_dict(later, state)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) * 3.0
        found: Tensor = later(x).detach()
        return found

    assert torch.equal(go_on(load=True), wanted[2])
    with pytest.warns(UserWarning, match="ranges are empty"):
        assert not torch.equal(go_on(load=False), wanted[2])


@pytest.mark.parametrize("damage", ["length", "negative", "missing", "step"])
def test_a_damaged_state_is_refused(damage: str) -> None:
    """A history of another length or below 0, without its step, or none at all: nothing is loaded."""
    model = converted()
    train(model, [1.0])
    state = lowbit.state_dict(model)
    entry = state["groups"][0]["sites"]["0"]
    if damage == "length":
        entry["histories"] = entry["histories"][:, :-1]
    if damage == "negative":
        entry["histories"][0, 1] = -1.0
    if damage == "missing":
        del entry["histories"], entry["remembered_step"]
    if damage == "step":
        entry["remembered_step"] = -1

    with pytest.raises(UsageError, match=r"histories|remembered_step"):
        lowbit.load_state_dict(model, state)


def test_gradient_checkpointing_changes_nothing() -> None:
    """A forward that runs again has the scales of the first one, and records nothing new."""
    found = []
    for again in (False, True):
        model = converted()
        for i in range(3):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(i)).requires_grad_()
            y = model[0](x) if not again else checkpoint(model[0], x, use_reentrant=False)
            assert isinstance(y, Tensor)
            y.square().sum().backward()
        found.append((site(model).histories.clone(), model[0].weight.grad))  # type: ignore[union-attr]  # a layer

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]  # both have gradients


def test_places_without_a_history_refuse_the_rule() -> None:
    """A bias, Range BN, an optimiser's state, a transform and a second rule of one operand: each says why."""
    fmt, recipe = delayed(), Recipe.from_name("fp8-delayed")

    with pytest.raises(UsageError, match="the bias"):
        recipe.replace(bias=fmt)
    with pytest.raises(UsageError, match="Range BN remembers"):
        RangeNorm(input=fmt, grad_output=fmt)
    with pytest.raises(UsageError, match="it keeps no range"):
        Update(weight=fmt)
    with pytest.raises(UsageError, match="before a transform"):
        fmt.replace(transform=Hadamard(size=16))
    with pytest.raises(UsageError, match="one history"):
        recipe.replace(output=type(recipe.output)(input=delayed(history=3), weight=fmt))
    with pytest.raises(UsageError, match="1 to 2"):
        Delayed(history=0)
    with pytest.raises(UsageError, match="0 to 16"):
        Delayed(margin=-1)
