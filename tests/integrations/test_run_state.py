import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit import PrecisionController, UsageError
from lowbit.integrations import RunState, save_with_optimizer
from lowbit.schedules import Cyclic, Progressive

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def model(recipe: str = "sbm8-cpt", *, controlled: bool = True) -> nn.Module:
    """A converted network; with bits that cycle over ten steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    lowbit.convert_(net, recipe, engine="reference")
    if controlled:
        PrecisionController(net, forward=Cyclic(low=3, high=8, cycles=2, total_steps=10), backward=8)
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, run: RunState, steps: int) -> None:
    """Some steps of a plain loop."""
    for _ in range(steps):
        loss = net(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss)


def through_a_file(state: Any) -> Any:
    """A state as a process that starts anew reads it, without executing anything."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def wrapped(net: nn.Module) -> torch.optim.Optimizer:
    """Adam whose states are 8-bit codes."""
    return lowbit.optim.LowBitOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), smallest=8)


@pytest.mark.parametrize("make", [sgd, wrapped], ids=["SGD", "LowBitOptimizer"])
@pytest.mark.parametrize("inside", [True, False], ids=["in the optimizer", "beside it"])
def test_a_resumed_loop_is_the_loop_that_was_never_stopped(inside: bool, make: Any) -> None:
    """Four steps, a file, and six in a new process give the weights and ranges of ten steps, bit for bit."""
    whole = model()
    train(whole, make(whole), RunState(whole), 10)

    first = model()
    optimizer = make(first)
    run = save_with_optimizer(first, optimizer) if inside else RunState(first)
    train(first, optimizer, run, 4)
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    saved = through_a_file(saved if inside else {**saved, "lowbit": run.state_dict()})
    again = model()
    optimizer = make(again)
    run = save_with_optimizer(again, optimizer) if inside else RunState(again)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if not inside:
        run.load_state_dict(saved["lowbit"])
    train(again, optimizer, run, 6)

    one, two = RunState(whole).state_dict(), RunState(again).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert str(one) == str(two)
    assert one["controllers"][0]["step"] == 10
    assert not torch.equal(first[0].weight, again[0].weight)


def test_weights_without_the_state_warn_once() -> None:
    """The first training forward after `load_state_dict` says what is missing and what to do, evaluation does not."""
    net, saved = model(controlled=False), model(controlled=False).state_dict()
    net.load_state_dict(saved)
    net.eval()(X)
    with pytest.warns(UserWarning, match=r"begins at step 0.*lowbit\.load_state_dict.*lowbit\.integrations"):
        net.train()(X)
    net.load_state_dict(saved)  # in the middle of a run the noise goes on

    assert net(X).isfinite().all()


@pytest.mark.parametrize("state_first", [True, False])
def test_weights_with_the_state_do_not_warn(state_first: bool) -> None:
    """In either order."""
    saved, net = model(controlled=False), model(controlled=False)
    loads: list[Any] = [
        lambda: lowbit.load_state_dict(net, lowbit.state_dict(saved)),
        lambda: net.load_state_dict(saved.state_dict()),
    ]
    for load in loads if state_first else loads[::-1]:
        load()

    assert net(X).isfinite().all()


def test_a_restored_model_does_not_warn() -> None:
    """It has no state of lowbit any more."""
    net = model(controlled=False)
    saved = net.state_dict()
    lowbit.restore_(net)
    net.load_state_dict(saved)

    assert net(X).isfinite().all()
    assert not net._load_state_dict_post_hooks


def test_a_state_with_a_controller_needs_one() -> None:
    """A model without its controller refuses, and stays at step 0."""
    net = model(controlled=False)

    with pytest.raises(UsageError, match=r"1 controllers saved, the model has 0: make the PrecisionController"):
        RunState(net).load_state_dict(RunState(model()).state_dict())
    assert lowbit.state_dict(net)["groups"][0]["step"] == 0


def test_a_refused_state_changes_nothing() -> None:
    """Where the second part does not fit, the first is taken back."""
    trained, net = model(), model()
    run = RunState(net)
    train(trained, sgd(trained), RunState(trained), 3)
    before = copy.deepcopy(run.state_dict())
    state = RunState(trained).state_dict()
    state["controllers"][0]["step"] = 11

    with pytest.raises(UsageError, match="at step 11"):
        run.load_state_dict(state)
    assert str(run.state_dict()) == str(before)


def test_a_rule_gets_its_losses() -> None:
    """`step(loss)` feeds a plateau rule of the model."""
    net = model(controlled=False)
    rule = Progressive(bits=[3, 8], grad_bits=[6, 8], threshold=0.5, decay=0.5)
    controller = PrecisionController(net, forward=rule, steps_per_epoch=1)
    run = save_with_optimizer(net, sgd(net))
    net(X)
    run.step(torch.tensor(1.0))

    assert controller.last_step == 1
    with pytest.raises(UsageError, match="loss"):
        run.step()


def test_a_plain_model_is_refused() -> None:
    """There would be nothing to save."""
    net = nn.Linear(2, 2)

    with pytest.raises(UsageError, match="nothing in this model is converted"):
        save_with_optimizer(net, sgd(net))
