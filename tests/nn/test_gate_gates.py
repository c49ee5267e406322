"""Gates of a model: samples, state, errors, and what a run resumes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from gated_network import BLOCKS, CHOICES, Network, Residual, X, batches, calls_of, force, gated, train
from lowbit import PrecisionController, UsageError
from lowbit.methods.recipe import Gating, Recipe
from lowbit.nn.gate import products_cost
from lowbit.nn.layers import QuantLayer


def test_gates_learn_from_the_task() -> None:
    """The loss alone gives every parameter of the gates a gradient, in both mixings."""
    for mixing in ("input", "output"):
        model, _, gates = gated(mixing=mixing)
        model(X).square().sum().backward()

        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.heads[2].parameters()), mixing


def test_one_sample() -> None:
    """A batch of one trains and is evaluated."""
    model, controller, gates = gated()
    loss = F.cross_entropy(model(X[:1]), torch.tensor([1])) + gates.penalty()
    loss.backward()
    controller.step(loss)

    assert model.eval()(X[:1]).shape == (1, 5)
    assert gates.histogram().sum(1).tolist() == [1, 1, 1]


def test_samples_are_independent_of_their_batch_in_evaluation() -> None:
    """In evaluation a sample's output is the same alone and in a batch of others with other choices."""
    model, _, _ = gated(choices=((2, 6), (8, 8)))
    for x, _ in batches(3):
        model(x)
    model.eval()

    torch.testing.assert_close(model(X)[2:3], model(X[2:3]), rtol=1e-5, atol=1e-6)


def test_pinned_depthwise_layers_keep_their_bits_and_count() -> None:
    """A depthwise convolution inside a gated block runs at 8/16 for every choice and is part of the cost."""

    class Depthwise(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.spatial = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
            self.mix = nn.Conv2d(inputs, outputs, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.mix(self.spatial(x))
            return y

    model = Network(Depthwise)
    lowbit.convert_(model, Recipe.from_name("dfq").tuned(choices=CHOICES, targets=[1.0], strength=1.0))
    controller = PrecisionController.from_recipe(model, total_steps=9, blocks=BLOCKS)
    gates = controller.gates
    assert gates is not None
    force(gates, [[0, 0, 0, 1, 1, 1]] * 3)

    calls = calls_of(lambda: model(X))

    assert {c.bits for c in calls if c.layer == "blocks.1.spatial"} == {(8, 8)}
    assert [c.bits for c in calls if c.layer == "blocks.1.mix"] == [(3, 4), (4, 4)]
    pinned = products_cost(torch.tensor([8, 8, 16, 8, 16, 8]))
    low = products_cost(torch.tensor([3, 4, 6, 4, 6, 3]))
    expected = (4 * 9 * 16 * pinned + 4 * 6 * 16 * low) / (4 * 9 * 16 + 4 * 6 * 16)
    assert (gates.costs[1, 0] / gates.sizes[1]).item() == pytest.approx(expected)


def test_plateau_rule_raises_the_target() -> None:
    """FracTrain: five epochs of a flat loss move the cost target from stage to stage."""
    _, controller, gates = gated(targets=[1.5, 2.0, 2.5], threshold=0.05, decay=0.3)
    seen = []
    for _ in range(24):
        seen.append(gates.target)
        controller.step(1.0)

    assert seen == [1.5] * 10 + [2.0] * 10 + [2.5] * 4


def test_layers_of_the_block_are_refused_outside_of_it() -> None:
    """A gated layer called by itself, or a block outside the model's forward, says so."""
    model, _, _ = gated()

    with pytest.raises(RuntimeError, match=r"blocks\.0\.conv1.*gated block"):
        model.blocks[0].conv1(torch.randn(2, 4, 4, 4))
    with pytest.raises(RuntimeError, match="only within the forward"):
        model.blocks[0](torch.randn(2, 4, 4, 4))


def test_a_block_that_runs_twice_is_refused() -> None:
    """One gate decides once in a forward: a block that is used twice is an error and not half of the cost."""
    model, _, _ = gated()
    model.blocks.append(model.blocks[2])

    with pytest.raises(RuntimeError, match=r"blocks\.2.*runs twice"):
        model(X)


@pytest.mark.parametrize("mixing", ["input", "output"])
def test_gates_work_under_autocast(mixing: str) -> None:
    """Under bf16 autocast gates decide in float32, and everything learns."""
    model, _, gates = gated(mixing=mixing, choices=((0, 0), (3, 6), (8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).float().square().sum()
    (loss + gates.penalty()).backward()

    assert all(p.grad is not None and p.grad.isfinite().all() for p in gates.parameters())
    assert gates.gate.projection.weight.grad is not None
    assert gates.gate.projection.weight.grad.dtype == torch.float32


def test_gradient_checkpointing_of_gated_blocks_is_refused() -> None:
    """A block that is run again in the backward would choose again: the error names it."""
    model, _, _ = gated()
    blocks = model.blocks
    model.blocks = nn.Identity()
    model.forward = lambda x: checkpoint(blocks, model.stem(x), use_reentrant=False)

    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        model(X).sum().backward()


def test_an_input_that_does_not_fit_is_refused_by_name() -> None:
    """A block whose input has other channels than its first layer names both."""
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
    lowbit.convert_(model, "w4a8g8", rules=[("0.1", "w4a8g8")])
    PrecisionController(model, gates=Gating(choices=CHOICES, targets=(3.0,)), blocks=["0"])

    with pytest.raises(UsageError, match=r"shape \(2, 4, 4\).*16 channels"):
        model(torch.randn(2, 4, 4))


def test_nested_blocks_are_refused() -> None:
    """A block inside another cannot have a gate of its own."""
    model = Network()
    lowbit.convert_(model, "dfq")

    with pytest.raises(UsageError, match=r"'blocks\.0' lies in block 'blocks'"):
        PrecisionController.from_recipe(model, total_steps=3, blocks=["blocks", "blocks.0"])


def test_removal_gives_the_plain_block_back() -> None:
    """After remove() the blocks have their own class and run at the recipe's bits."""
    model, controller, _ = gated()
    classes = [type(block) for block in model.blocks]
    controller.remove()
    calls = calls_of(lambda: model.eval()(X))

    assert not any(type(block) in classes for block in model.blocks)
    assert {type(block).__name__ for block in model.blocks} == {"Residual"}
    assert all(isinstance(block, Residual) for block in model.blocks)
    assert {c.bits for c in calls} == {(8, 4)}
    lowbit.restore_(model)
    assert not any(isinstance(m, QuantLayer) for m in model.modules())


def test_restore_of_a_gated_layer() -> None:
    """A block that is itself a layer, as an LSTM, is restored through its gate."""
    model = nn.Sequential(nn.LSTM(4, 4, batch_first=True))
    lowbit.convert_(model, "w4a8g8", rules=[("0", "w4a8g8")])
    PrecisionController(model, gates=Gating(choices=CHOICES, targets=(3.0,)), blocks=["0"])
    model(torch.randn(3, 5, 4))[0].sum().backward()
    lowbit.restore_(model)

    assert type(model[0]) is nn.LSTM


def test_a_copy_has_gates_of_its_own() -> None:
    """A deep copy of a gated model evaluates with copied gates, and trains with those of a controller of its own."""
    model, _, gates = gated()
    model(X).sum().backward()
    twin = copy.deepcopy(model)
    before = gates.histogram()
    with torch.no_grad():
        evaluated = twin.eval()(X)
        expected = model.eval()(X)
    for parameter in gates.parameters():
        parameter.grad = None

    with pytest.raises(UsageError, match="a copy of one whose bits a PrecisionController sets"):
        twin.train()(X)
    own = PrecisionController(twin, gates=gates.gating, blocks=gates.blocks).gates
    assert own is not None
    twin(X).sum().backward()

    assert torch.equal(evaluated, expected)
    assert all(p.grad is None for p in gates.parameters())
    assert torch.equal(gates.histogram(), before)
    assert own.histogram().sum() == before.sum()
    assert [type(block).__mro__[1:] for block in twin.blocks] == [type(block).__mro__[1:] for block in model.blocks]


def test_state_dict_of_the_model_is_the_plain_one() -> None:
    """Gates add nothing to the keys of the model."""
    model, _, _ = gated()

    assert model.state_dict().keys() == Network().state_dict().keys()


STEPS = 14
FRACTRAIN: dict[str, Any] = {
    "targets": [1.9, 3.0],
    "threshold": 9.0,
    "decay": 0.3,
    "strength": 0.05,
    "total_steps": STEPS,
}


@settings(max_examples=8, deadline=None)
@given(
    stop=st.integers(0, STEPS),
    mixing=st.sampled_from(["input", "output"]),
    choices=st.sampled_from([CHOICES, ((0, 0), (3, 6), (8, 8))]),
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(stop: int, mixing: str, choices: Any) -> None:
    """Saved at any step of a gate sequence and loaded into new objects, a run ends with the same weights and gates."""
    ends = []
    for stops in (False, True):
        model, controller, gates = gated(mixing=mixing, choices=choices, **FRACTRAIN)
        optimizer = torch.optim.SGD([*model.parameters(), *gates.parameters()], lr=0.1, momentum=0.9)
        train(model, controller, stop if stops else STEPS, skip=0, optimizer=optimizer)
        if stops:
            saved = copy.deepcopy(
                (model.state_dict(), lowbit.state_dict(model), controller.state_dict(), optimizer.state_dict())
            )
            model, controller, gates = gated(mixing=mixing, choices=choices, seed=0, **FRACTRAIN)
            optimizer = torch.optim.SGD([*model.parameters(), *gates.parameters()], lr=0.1, momentum=0.9)
            for target, state in zip((model, None, controller, optimizer), saved, strict=True):
                if target is None:
                    lowbit.load_state_dict(model, state)
                else:
                    target.load_state_dict(state)
            train(model, controller, STEPS, skip=stop, optimizer=optimizer)
        ends.append([p.detach().tolist() for p in (*model.parameters(), *gates.parameters())] + [gates.target])

    assert ends[0] == ends[1]
    assert ends[0][-1] == 3.0
