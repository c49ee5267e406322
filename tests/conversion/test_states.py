"""Saved states that were damaged: whatever one entry of one becomes, loading it refuses, and nothing has changed."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController, UsageError
from lowbit.methods.recipe import Recipe
from lowbit.schedules import Constant, Cyclic, Piecewise, PlateauRule, Progressive, RangeTest, RangeTested, Rule

NAN, INF = math.nan, math.inf
HUGE = 10**5000  # Python refuses to print it

# What replaces an entry, by what it was. A number may be another number of its kind, so those lists leave that out.
INSTEAD: dict[type, list[Any]] = {
    int: [None, "x", [], {}, True, -5, 1.5, NAN, INF, 2**70, HUGE, torch.tensor(3), torch.zeros(2)],
    float: [None, "x", [], {}, True, NAN, INF, -INF, HUGE, 1j, torch.tensor(0.5), torch.zeros(2)],
    str: [None, "x", [], {}, True, 3, NAN, b"x", torch.zeros(2)],
    type(None): ["x", [], {}, True, -5, 3, NAN, torch.zeros(2)],
    list: [None, "x", {}, True, 3, NAN, torch.zeros(2)],
    dict: [None, "x", [], {}, True, 3, NAN, torch.zeros(2)],
}


def of_tensor(t: Tensor) -> Iterator[Any]:
    """What replaces a tensor."""
    yield from (None, "x", 3, [], t.tolist(), t[:-1], t[None], torch.stack([t, t]), t.to(torch.float16), t.bool())
    yield from (t.to("meta"), t.to_sparse())
    for wrong in (-3, 1000, 2**40) if t.dtype == torch.int64 else (NAN, INF, -INF):
        for place in range(min(t.numel(), 6)):
            changed = t.clone()
            changed.view(-1)[place] = wrong
            yield changed


def mutants(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in a nested state with each value that must not stand there."""
    kind = dict if isinstance(state, dict) else type(state)
    yield from ((path, bad) for bad in (of_tensor(state) if isinstance(state, Tensor) else INSTEAD[kind]))
    if isinstance(state, dict):
        for key in state:
            yield path, {k: v for k, v in state.items() if k != key}
        yield path, {**state, "extra": 1}
        yield path, {**state, 3: 1}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ():
        yield from mutants(value, (*path, key))


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a nested state with another value at one place."""
    if not path:
        return value
    result = copy.copy(state)
    result[path[0]] = changed(state[path[0]], path[1:], value)
    return result


def plain(state: Any) -> Any:
    """A nested state in which tensors can be compared."""
    if isinstance(state, Tensor):
        return str(state.dtype), tuple(state.shape), None if state.is_meta or state.is_sparse else state.tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


def refusal(load: Callable[[Any], object], state: Any) -> str:
    """What the UsageError says; empty where the state was taken."""
    try:
        load(state)
    except UsageError as error:
        return str(error)
    return ""


def check_all(load: Callable[[Any], object], save: Callable[[], Any], *, least: int) -> None:
    """Load every mutant of what is saved: each is a UsageError in one line, and what is saved stays.

    Args:
        load: takes a state.
        save: everything that loading could change; its first element is the state.
        least: how many mutants there must be.
    """
    state = copy.deepcopy(save()[0])
    before = plain(save())
    number = 0
    for path, value in mutants(state):
        if plain(changed(state, path, value)) == plain(state) and type(value) is not bool:
            continue
        number += 1
        said = refusal(load, changed(state, path, value))

        assert said, (path, type(value))
        assert plain(save()) == before, (path, type(value))
        assert "\n" not in said, said
        assert len(said) < 1000, said
    assert number >= least
    load(state)
    assert plain(save()) == before


def network(recipe: str, engine: str = "auto") -> nn.Sequential:
    """A convolution, a normalisation and a linear layer."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    lowbit.convert_(model, Recipe.from_name(recipe).replace(last="convert"), engine=engine, seed=3)
    return model


def train(model: nn.Module, controller: PrecisionController | None = None, steps: int = 3) -> None:
    """A few steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(4, 1, 4, 4, generator=generator), torch.randint(5, (4,), generator=generator)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if controller is not None:
            controller.step(loss)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_damaged_state_of_a_model_is_refused_whole(engine: str) -> None:
    """Every leaf and key of lowbit.state_dict, with every wrong value: refused, seed, step, bits and ranges stay."""
    model = network("sbm8", engine)
    train(model)

    check_all(lambda s: lowbit.load_state_dict(model, s), lambda: [lowbit.state_dict(model)], least=300)


def test_a_range_must_be_in_order_and_its_count_whole() -> None:
    """A running range whose low end is above its high one, or of half a batch or -1, is refused by layer."""
    model = network("sbm8")
    train(model)
    state = lowbit.state_dict(model)

    for wrong in ([2.0, 1.0, 1.0], [0.0, 1.0, 0.5], [0.0, 1.0, -1.0]):
        damaged = copy.deepcopy(state)
        damaged["groups"][0]["sites"]["4"]["running_range"] = torch.tensor(wrong)
        with pytest.raises(UsageError, match=r"4: running_range=\["):
            lowbit.load_state_dict(model, damaged)

    assert plain(lowbit.state_dict(model)) == plain(state)


@pytest.mark.parametrize(("bits", "taken"), [(1, False), (2, True), (16, True), (17, False)])
def test_bits_are_those_that_the_format_allows(bits: int, taken: bool) -> None:
    """An integer operand loads from 2 to 16 bits, the ends included."""
    model = network("sbm8")
    state = lowbit.state_dict(model)
    state["groups"][0]["sites"]["4"]["bits"][0] = bits

    if not taken:
        with pytest.raises(UsageError, match=f"4: input of output: bits={bits}"):
            lowbit.load_state_dict(model, state)

    assert taken or lowbit.state_dict(model)["groups"][0]["sites"]["4"]["bits"][0] == 8
    if taken:
        lowbit.load_state_dict(model, state)
        assert lowbit.state_dict(model)["groups"][0]["sites"]["4"]["bits"][0] == bits


def test_the_width_of_a_float_is_its_own() -> None:
    """The 16 bits of a bf16 operand do not load as 8."""
    model = network("sbm8")
    state = lowbit.state_dict(model)
    state["groups"][0]["sites"]["4"]["bits"][4] = 8

    with pytest.raises(UsageError, match="grad_output of grad_weight: bits=8 of bf16"):
        lowbit.load_state_dict(model, state)


CONTROLLERS: dict[str, dict[str, Any]] = {
    "cyclic": {"forward": Cyclic(low=3, high=8, cycles=2, total_steps=9), "backward": 8},
    "piecewise": {"forward": Piecewise(pieces=[(0, 4), (2, 8)], total_steps=9)},
    "constant": {"forward": Constant(bits=6)},
    "range test in flight": {
        "forward": RangeTested(
            schedule=Cyclic(low=2, high=4, cycles=1, total_steps=40),
            test=RangeTest(low=2, high=4, steps_per_bit=4, threshold=10.0),
        ),
    },
}


@pytest.mark.parametrize("kind", [*CONTROLLERS, "progressive"])
def test_a_damaged_state_of_a_controller_is_refused_whole(kind: str) -> None:
    """Every leaf and key of a controller's state, for each kind of schedule: refused, its bits and rules stay."""
    model = network("w8a8g8")
    progressive = {
        "forward": Progressive(bits=[3, 4], grad_bits=[6, 8], threshold=0.1, decay=0.5),
        "steps_per_epoch": 2,
    }
    controller = PrecisionController(model, **CONTROLLERS.get(kind, progressive))
    train(model, controller)

    def everything() -> list[Any]:
        return [controller.state_dict(), lowbit.state_dict(model), controller.forward_bits, controller.last_step]

    check_all(controller.load_state_dict, everything, least=80)


def test_a_damaged_state_of_gates_is_refused_whole() -> None:
    """A state with gates: no tensor of theirs has changed where the last one, or the rule between targets, is bad."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    recipe = Recipe.from_name("fractrain").replace(first="convert", last="convert")
    lowbit.convert_(model, recipe)
    controller = PrecisionController.from_recipe(model, total_steps=9, steps_per_epoch=2, blocks=["0"])
    gates = controller.gates
    assert gates is not None
    for _ in range(3):
        loss = model(torch.ones(4, 6)).square().mean()
        (loss + gates.penalty()).backward()
        controller.step(loss)

    def everything() -> list[Any]:
        return [controller.state_dict(), lowbit.state_dict(model), gates.state_dict(), gates.target]

    check_all(controller.load_state_dict, everything, least=300)
    check_all(gates.load_state_dict, lambda: [dict(gates.state_dict()), gates.target], least=200)


@pytest.mark.parametrize("make", ["plateau", "progressive", "range test"])
def test_a_damaged_state_of_a_rule_is_refused_whole(make: str) -> None:
    """Every leaf and key of the state of a rule on its own."""
    rules: dict[str, Any] = {
        "plateau": PlateauRule(stages=3, threshold=0.1, decay=0.5),
        "progressive": Progressive(bits=[3, 4], grad_bits=[6, 8], threshold=1e-9, decay=0.5),
        "range test": RangeTest(low=2, high=6, steps_per_bit=4),
    }
    rule = rules[make]
    for loss in (2.0, 2.0, 1.9, 1.9, 1.9, 1.9, 1.9):
        if not getattr(rule, "done", False):
            rule.update(loss)

    check_all(rule.load_state_dict, lambda: [rule.state_dict()], least=40)


def test_a_later_rule_that_refuses_leaves_the_earlier_ones() -> None:
    """A controller with a rule of a user's own, which raises what it likes, is a UsageError and changes nothing."""

    class Own(Rule):
        """A rule that loads nothing."""

        current_bits, max_bits, follows = 4, 8, None

        def widths(self) -> list[int]:
            return [4, 8]

        def update(self, value: float, /) -> bool:  # noqa: ARG002 - the protocol's
            return False

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            if state:
                raise ZeroDivisionError("own")

    model = network("w8a8g8")
    controller = PrecisionController(model, forward=Own())
    controller.step()
    state = controller.state_dict()

    with pytest.raises(UsageError, match="own"):
        controller.load_state_dict({**state, "step": 0, "rules": [{"x": 1}]})

    assert controller.state_dict() == state
