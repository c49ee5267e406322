"""The clock of a converted model: which forwards are steps, whichever of its modules is called."""

import copy
import threading
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lowbit
from helpers import recipe_of
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Clock
from lowbit.numerics.formats import integer

# Rounds input, weight and gradient stochastically.
NOISY = recipe_of(integer(bits=4, zero="offset", rounding="stochastic"))


class Whole(nn.Module):
    """A module that is converted and whose forward nobody calls, as a LightningModule with a `training_step`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, x: Tensor) -> Tensor:
        """Call a part."""
        y: Tensor = self.net(x)
        return y.square().sum()


def mlp() -> nn.Sequential:
    """Three linear layers, the first of them used twice."""
    first = nn.Linear(4, 4)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 4), first, nn.Linear(4, 4))


def converted(model: nn.Module, recipe: lowbit.Recipe | str = "sbm8-cpt") -> Clock:
    """The clock of a model that was converted just now."""
    given = lowbit.Recipe.from_name(recipe) if isinstance(recipe, str) else recipe
    lowbit.convert_(model, given.replace(last="convert"))
    layer = next(layer for layer in model.modules() if isinstance(layer, QuantLayer))
    return layer.sites()[0].clock


def keys_after(clock: Clock, calls: Iterable[Callable[[], object]]) -> list[int]:
    """The step after each of these calls."""
    steps = []
    for call in calls:
        call()
        steps.append(int(clock.step))
    return steps


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_a_part_that_is_called_counts_steps() -> None:
    """Where only a part is called, each of its forwards is a step with noise of its own, from the first one on."""
    torch.manual_seed(0)
    whole = Whole(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    clock = converted(whole, NOISY)

    losses = [whole.training_step(X).item() for _ in range(4)]

    assert int(clock.step) == 4
    assert len(set(losses)) == 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_part_is_one_step(kind: type[nn.Module]) -> None:
    """The products of all time steps belong to one forward of the layer."""
    whole = Whole(kind(4, 4, num_layers=2))
    clock = converted(whole)

    steps = keys_after(clock, [lambda: whole.net(torch.ones(5, 3, 4))] * 3)

    assert steps == [1, 2, 3]


def test_parts_that_follow_each_other_are_one_step() -> None:
    """A step begins with the layer that already ran in the last one, so two parts in turn share a step."""
    whole = Whole(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    clock = converted(whole)
    first, second = whole.net

    assert keys_after(clock, [lambda: first(X), lambda: second(X)] * 3) == [1, 1, 2, 2, 3, 3]


def test_the_model_itself_counts_its_forwards() -> None:
    """A forward of the root is a step, also twice in one update, and a layer used twice in it stays in it."""
    model = mlp()
    clock = converted(model)

    assert keys_after(clock, [lambda: model(X)] * 3) == [1, 2, 3]
    assert [layer.site.uses for layer in (model[0], model[2], model[4])] == [2, 1, 1]


def test_a_part_after_the_model_is_another_step() -> None:
    """A part that is called beside the model, for a loss of its own, draws other noise and stops nothing."""
    model = mlp()
    clock = converted(model)

    assert keys_after(clock, [lambda: model(X), lambda: model[2](X), lambda: model(X), lambda: model(X)]) == [
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("way", ["functional_call", "compile", "wrapped", "copy", "no_grad"])
def test_ways_to_call_the_model(way: str) -> None:
    """However the model's forward is reached, each is one step."""
    model = mlp()
    clock = converted(model)
    calls: dict[str, Callable[[], object]] = {
        "functional_call": lambda: functional_call(model, dict(model.named_parameters()), (X,)),
        "compile": lambda: compiled(X),
        "wrapped": lambda: nn.Sequential(nn.Identity(), model)(X),
        "copy": lambda: copy.copy(model)(X),
        "no_grad": torch.no_grad()(lambda: model(X)),
    }
    compiled = torch.compile(model, backend="eager") if way == "compile" else model

    assert keys_after(clock, [calls[way]] * 3) == [1, 2, 3]
    assert not clock.here.inside


def test_a_converted_encoder_in_a_larger_model() -> None:
    """An encoder that was converted first steps with the larger model that calls it, and goes on in parts and alone."""
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    clock = converted(encoder)
    model = nn.Sequential(encoder, nn.Linear(4, 4))
    lowbit.convert_(model, NOISY, strict=False, seed=1)
    outer = model[1].site.clock
    calls = [lambda: model(X), lambda: model(X), lambda: encoder[1](X), lambda: encoder(X)]

    assert keys_after(clock, calls) == [1, 2, 3, 4]
    assert outer is not clock
    assert int(outer.step) == 2


def test_a_forward_that_raises_has_ended() -> None:
    """After an exception inside the model its parts count as parts again."""
    model = mlp()
    clock = converted(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(3, 5))

    assert not clock.here.inside
    assert keys_after(clock, [lambda: model[2](X)] * 2) == [1, 2]


def test_a_trained_part_of_a_model_in_evaluation_has_new_noise() -> None:
    """A head that trains on a frozen model rounds differently in every step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    clock = converted(model, NOISY)
    model.eval()[1].train()

    outputs = [model(X) for _ in range(3)]

    assert int(clock.step) == 3
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_frozen_part_of_a_training_model_draws_two_fields() -> None:
    """A layer in evaluation mode that runs twice in a training forward rounds differently each time."""
    model = mlp()
    converted(model, NOISY)
    model[0].eval()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _m, _a, y: seen.append(y.detach()))
    model[0].register_forward_pre_hook(lambda _m, _a: (X,))
    model(X)

    assert not torch.equal(*seen)


def test_evaluation_writes_nothing() -> None:
    """Evaluation of the model and of parts changes neither step nor use numbers, and repeats itself."""
    model = mlp()
    clock = converted(model, NOISY)
    model(X)
    before = lowbit.state_dict(model)["groups"][0]
    model.eval()

    outputs = [model(X) for _ in range(2)]
    for part in model:
        part(X)

    after = lowbit.state_dict(model)["groups"][0]
    assert torch.equal(*outputs)
    assert after["step"] == before["step"] == int(clock.step) == 1
    assert [s["uses"] for s in after["sites"].values()] == [s["uses"] for s in before["sites"].values()] == [2, 1, 1]


def test_threads_evaluate_a_noisy_model() -> None:
    """Two threads that are in one layer at once get what each gets alone, also where its forward is stochastic."""
    model = mlp()
    converted(model, NOISY)
    model(X)
    model.eval()
    inputs = [X, X.flip(0)]
    alone = [model(x) for x in inputs]
    together = list(inputs)
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        meeting.wait()

    handle = model[2].register_forward_pre_hook(meet)

    def evaluate(i: int) -> None:
        together[i] = model(inputs[i])

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()

    assert not torch.equal(*alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_has_the_noise_of_its_forward(reentrant: bool) -> None:
    """Recomputed in the backward, a part that was called alone rounds its gradients as it does without it."""
    torch.manual_seed(0)
    whole = Whole(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    twin = copy.deepcopy(whole)
    gradients = []
    for model, run in ((whole, None), (twin, checkpoint)):
        clock = converted(model)
        x = X.clone().requires_grad_()
        for _ in range(2):
            model.zero_grad()
            y = model.net(x) if run is None else run(model.net, x, use_reentrant=reentrant)
            y.square().sum().backward()
        assert int(clock.step) == 2
        gradients.append(model.net[0].weight.grad)

    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_with_a_stochastic_forward_is_refused(reentrant: bool) -> None:
    """Which of a part's runs is run again cannot be known: it says to convert the module that is called."""
    whole = Whole(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    converted(whole, NOISY)
    y = checkpoint(whole.net, X.clone().requires_grad_(), use_reentrant=reentrant)

    with pytest.raises(RuntimeError, match=r"outside the converted model's forward.*whose forward you call"):
        y.sum().backward()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_of_parts_resumes_bit_for_bit(stop: int) -> None:
    """Saved between two steps of a model whose parts are called, a run goes on as if it had not stopped."""

    def run(model: Whole, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            model.zero_grad()
            loss = model.net[:2](X).sum() + model.training_step(X)
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    model = Whole(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    plain = copy.deepcopy(model)
    converted(model, NOISY)
    converted(plain, NOISY)

    expected = run(model, 4)
    first = run(plain, stop)
    again = Whole(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    converted(again, NOISY)
    again.load_state_dict(plain.state_dict())
    lowbit.load_state_dict(again, lowbit.state_dict(plain))

    assert first + run(again, 4 - stop) == expected


def test_a_copy_has_steps_of_its_own() -> None:
    """A deep copy of a model, and of a part of it, repeats the noise of the original and does not move its step."""
    model = mlp()
    clock = converted(model, NOISY)
    model(X)
    twin, part = copy.deepcopy(model), copy.deepcopy(model[2:4])

    outputs = [twin(X) for _ in range(2)]
    part(X)

    assert int(clock.step) == 1
    assert twin[0].site.clock is not clock
    assert int(twin[0].site.clock.step) == 3
    assert torch.equal(model(X), outputs[0])
    assert int(part[0].site.clock.step) == 2


def test_restored_models_have_no_hooks_left() -> None:
    """restore_, of the whole and of each layer, takes both hooks of the clock away."""
    for restore in (lowbit.restore_, lambda m: [lowbit.restore_(layer) for layer in (m[0], m[2], m[4])]):
        model = mlp()
        converted(model)
        model(X)
        restore(model)
        model(X)

        assert not model._forward_pre_hooks
        assert not model._forward_hooks
        assert not model._forward_hooks_always_called


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch.jit.trace": torch.jit.trace,
    "torch.func": lambda model, x: torch.func.vmap(model)(x[None]),
    "torch.func.grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")  # its category changes from one version of torch to the next
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_looks_into_layers_is_refused_by_name(transform: str) -> None:
    """The error names the layer and says what to do, no step is counted, and the restored model is looked into."""
    model = mlp()
    clock = converted(model, NOISY)
    model.eval()

    with pytest.raises(RuntimeError, match=r"0: .*torch\.(jit\.trace|func) cannot look .* lowbit\.restore_"):
        TRANSFORMS[transform](model, X)

    assert int(clock.step) == 0
    lowbit.restore_(model)
    TRANSFORMS[transform](model, X)
