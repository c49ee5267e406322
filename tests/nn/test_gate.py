"""Gates: what runs for each choice, what the masks' gradients are, the cost term, and that a run resumes."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import PrecisionController, UsageError, functional
from lowbit.methods.recipe import Gating, Recipe
from lowbit.nn.gate import Gates, direction, pooled, products_cost
from lowbit.nn.layers import QuantLayer
from lowbit.numerics.formats import largest_code
from lowbit.numerics.quantizer import quantize
from lowbit.products import watch
from lowbit.products.setting import Samples, Setting

CHOICES = ((3, 6), (4, 8), (8, 8))
BLOCKS = [re.compile(r"blocks\.\d")]


class Residual(nn.Module):
    """Two convolutions with a shortcut, which may change the shape."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        y: Tensor = self.conv2(F.relu(self.norm(self.conv1(x)))) + self.shortcut(x)
        return y


class Network(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(block(4, 4), block(4, 6), block(6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) to (B, 5)."""
        y: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


def gated(
    *, choices: Any = CHOICES, seed: int = 0, total_steps: int = 100, **changes: Any
) -> tuple[nn.Module, PrecisionController, Gates]:
    """The network in dfq with gates."""
    torch.manual_seed(seed)
    model = Network()
    recipe = Recipe.from_name("dfq").tuned(choices=choices, **changes)
    lowbit.convert_(model, recipe, seed=seed)
    controller = PrecisionController.from_recipe(model, total_steps=total_steps, blocks=BLOCKS, steps_per_epoch=2)
    assert controller.gates is not None
    return model, controller, controller.gates


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a run, the same each time."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randn(6, 1, 4, 4, generator=generator), torch.randint(5, (6,), generator=generator)


X = next(batches(1))[0]


def calls_of(run: Any) -> list[watch.ProductCall]:
    """Every product of a converted layer that runs."""
    seen: list[watch.ProductCall] = []
    with watch.counted_by(seen.append):
        run()
    return seen


def force(gates: Gates, choices: list[list[int]]) -> None:
    """Make the gates choose, by block and sample."""
    decided = iter(choices)

    def decide(index: int, _: Tensor) -> Tensor:
        mask = F.one_hot(torch.tensor(next(decided)), len(gates.choices)).float().requires_grad_()
        gates._now.masks[index] = mask
        return mask

    gates._decide = decide


@pytest.mark.parametrize("training", [True, False])
def test_each_sample_runs_at_its_choice_and_no_other(training: bool) -> None:
    """In both modes a layer runs each sample once: what no sample chose is not executed."""
    model, _, gates = gated()
    force(gates, [[0, 0, 1, 1, 1, 2], [1] * 6, [2, 0, 0, 0, 0, 0]])

    calls = calls_of(lambda: model.train(training)(X))

    ran = [(c.layer, c.bits, c.input[0]) for c in calls if c.layer.endswith("conv2")]
    assert ran == [
        ("blocks.0.conv2", (3, 4), 2),
        ("blocks.0.conv2", (4, 4), 3),
        ("blocks.0.conv2", (8, 4), 1),
        ("blocks.1.conv2", (4, 4), 6),
        ("blocks.2.conv2", (3, 4), 5),
        ("blocks.2.conv2", (8, 4), 1),
    ]
    assert gates.histogram().tolist() == [[2, 3, 1], [0, 6, 0], [5, 0, 1]]


def test_gradients_run_at_the_bits_of_the_choice() -> None:
    """The products of the backward have the gradient bits of each sample's choice, weights their own."""
    model, _, gates = gated()
    force(gates, [[0] * 3 + [1] * 3, [2] * 6, [0] * 6])

    calls = calls_of(lambda: model(X).sum().backward())

    back = {(c.product, c.bits) for c in calls if c.layer == "blocks.0.conv2" and c.product != "output"}
    assert back == {
        ("grad_input", (6, 4)),
        ("grad_weight", (6, 3)),
        ("grad_input", (8, 4)),
        ("grad_weight", (8, 4)),
    }


def mixed(mask: Tensor, x: Tensor, w: Tensor, recipe: Recipe, widths: list[int]) -> Tensor:
    """The authors' ImageNet mixing written out: one product of the masked sum of all quantised inputs."""
    fmt = recipe.output.input
    z = torch.zeros_like(x)
    for k, width in enumerate(widths):
        x_hat = quantize(x.detach(), fmt, levels=largest_code(fmt, width)).values
        straight = x + (x_hat - x).detach()
        z = z + mask[:, k, None] * straight
    w_hat = w + (quantize(w.detach(), recipe.output.weight, dims=(1,)).values - w).detach()
    return F.linear(z, w_hat)


def test_running_by_choice_equals_one_product_of_the_mixed_input() -> None:
    """Output, gradient of the input and gradient of the mask are those of one product of the masked sum."""
    recipe = Recipe.from_name("w4a8g32")
    x, w = torch.randn(5, 7), torch.randn(3, 7)
    choice = torch.tensor([0, 2, 1, 0, 2])
    widths = [3, 4, 6]
    bits = tuple((b, 4, 32, 4, 32, b) for b in widths)
    results = []
    for by_choice in (True, False):
        a, mask = x.clone().requires_grad_(), F.one_hot(choice, 3).float().requires_grad_()
        if by_choice:
            # All choices share the range of the whole tensor, as in the authors' code.
            setting = Setting(
                recipe=recipe,
                samples=Samples(choice=choice, bits=bits, mask=mask),
                input_range=(x.amin().reshape(1), x.amax().reshape(1)),
                noise=lowbit.numerics.rounding.CounterNoise(key=torch.tensor(1), layer="x"),
            )
            y = functional.linear(a, w, setting=setting)
        else:
            y = mixed(mask, a, w, recipe, widths)
        y.square().sum().backward()
        results.append((y.detach(), a.grad, mask.grad))

    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert results[0][2].abs().min() > 0


def test_output_mixing_runs_every_choice_in_training_and_one_in_evaluation() -> None:
    """mixing="output" executes the block at each choice for all samples in training, at the chosen one otherwise."""
    model, _, gates = gated(mixing="output")
    force(gates, [[0, 0, 1, 1, 1, 2]] * 6)

    trained = [(c.bits[0], c.input[0]) for c in calls_of(lambda: model(X)) if c.layer == "blocks.0.conv2"]
    evaluated = [(c.bits[0], c.input[0]) for c in calls_of(lambda: model.eval()(X)) if c.layer == "blocks.0.conv2"]

    assert trained == [(3, 6), (4, 6), (8, 6)]
    assert evaluated == [(3, 2), (4, 3), (8, 1)]


def test_output_mixing_selects_the_outputs_of_the_choices() -> None:
    """With mixing="output" a sample has its block's output at the one width; the mask's gradient is <g, o_k>."""
    outputs = []
    for choices in ([0] * 6, [2] * 6, [0, 2] * 3):
        model, _, gates = gated(mixing="output")
        force(gates, [choices] * 3)
        block: Any = model.blocks[0]
        gates._begin(model, ())
        outputs.append(block(torch.linspace(-1, 1, 384).reshape(6, 4, 4, 4)))
    mask = gates._now.masks[0]
    outputs[2].sum().backward()

    assert torch.equal(outputs[2][::2], outputs[0][::2])
    assert torch.equal(outputs[2][1::2], outputs[1][1::2])
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad[:, 0], outputs[0].flatten(1).sum(1))
    torch.testing.assert_close(mask.grad[:, 2], outputs[1].flatten(1).sum(1))


def test_zero_bits_skip_the_block() -> None:
    """Samples at (0, 0) pass a block unchanged, or through its shortcut, and no other layer of it runs for them."""
    model, _, gates = gated(choices=((0, 0), (3, 6), (8, 8)))
    force(gates, [[0] * 6, [0, 0, 1, 1, 1, 2], [0] * 6])
    inner: list[Tensor] = []
    model.blocks[2].register_forward_hook(lambda _, x, y: inner.extend([x[0], y]))
    model(X)  # the first one measures the size of each block
    force(gates, [[0] * 6, [0, 0, 1, 1, 1, 2], [0] * 6])

    calls = calls_of(lambda: model(X))

    layers = [(c.layer, c.bits[0], c.input[0]) for c in calls]
    assert layers == [
        ("blocks.1.conv1", 3, 3),
        ("blocks.1.conv1", 8, 1),
        ("blocks.1.conv2", 3, 3),
        ("blocks.1.conv2", 8, 1),
        ("blocks.1.shortcut", 3, 3),
        ("blocks.1.shortcut", 8, 1),
        ("blocks.1.shortcut", 8, 2),
    ]
    assert torch.equal(inner[2], inner[3])


def test_skipping_teaches_the_gate() -> None:
    """The mask of a skip has a gradient, from samples that skip and from those that do not."""
    model, _, gates = gated(choices=((0, 0), (3, 6), (8, 8)))
    force(gates, [[0, 0, 1, 1, 1, 2]] * 3)
    model(X).square().sum().backward()
    masks = [gates._now.masks[i].grad for i in range(3)]

    assert masks[0] is not None
    assert (masks[0][:, 0] != 0).all()
    assert (masks[0][2:, 1:] != 0).all()
    assert (masks[0][:2, 1:] == 0).all()


def test_skipping_a_block_that_changes_shape_without_a_shortcut_is_refused() -> None:
    """The error says what such a block needs."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    lowbit.convert_(model, "w4a8g8", rules=[("0", "w4a8g8")])
    controller = PrecisionController(model, gates=Gating(choices=((0, 0), (3, 6)), targets=(3.0,)), blocks=["0"])
    assert controller.gates is not None
    force(controller.gates, [[0, 1]] * 2)

    with pytest.raises(UsageError, match="child `shortcut` or `downsample`"):
        model(torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("cost", "band", "expected"),
    [
        (2.9, 0, -1),
        (3.0, 0, 1),
        (3.1, 0, 1),
        (2.4, 0.5, -1),
        (2.5, 0.5, -0.1),
        (3.0, 0.5, 0.1),
        (3.4, 0.5, 0.1),
        (3.5, 0.5, 1),
    ],
)
def test_direction_follows_the_authors_rule(cost: float, band: float, expected: float) -> None:
    """Below the target -1, at or above it +1, a tenth of that inside the band, whose upper end is outside."""
    assert direction(cost, target=3.0, band=band, inside=0.1) == expected


@pytest.mark.parametrize(
    ("weight", "costs"),
    [(4, [1.758, 2.083, 2.604, 3.385, 4.688]), (3, [1.465, 1.758, 2.214, 2.930, 4.102])],
)
def test_cost_of_a_choice(weight: int, costs: list[float]) -> None:
    """Percent of full precision of the authors' five choices with 4-bit and 3-bit weights."""
    pairs = [(3, 6), (4, 6), (4, 8), (6, 8), (6, 12)]

    ours = [100 / 3 * products_cost(torch.tensor([a, weight, g, weight, g, a])) for a, g in pairs]

    assert ours == pytest.approx(costs, abs=5e-4)


def test_penalty_is_the_weighted_sum_over_the_batch() -> None:
    """R beta sum of mask times cost times m/mean(m), and the cost in percent is its mean."""
    model, _, gates = gated(targets=[1.0], strength=0.5)
    choices = [[0, 0, 1, 1, 1, 2], [1] * 6, [2] * 6]
    force(gates, choices)
    model(X)
    penalty = gates.penalty()

    cost = [products_cost(torch.tensor([a, 4, g, 4, g, a])) for a, g in CHOICES]
    macs = [4 * 4 * 9 * 2, 4 * 6 * 9 + 6 * 6 * 9 + 4 * 6, 6 * 6 * 9 * 2]
    mean = sum(macs) / 3
    expected = sum(m / mean * cost[k] for m, row in zip(macs, choices, strict=True) for k in row)
    assert penalty.item() == pytest.approx(0.5 * expected)
    assert gates.cost == pytest.approx(100 * expected / (3 * 6 * 3))


def test_equal_weighting_counts_every_block_the_same() -> None:
    """With weighting="equal" C has the cost per MAC of each block, whatever its size, as in the authors' code."""
    model, _, gates = gated(targets=[1.0], strength=0.5, weighting="equal")
    choices = [[0, 0, 1, 1, 1, 2], [1] * 6, [2] * 6]
    force(gates, choices)
    model(X)
    penalty = gates.penalty()

    cost = [products_cost(torch.tensor([a, 4, g, 4, g, a])) for a, g in CHOICES]
    expected = sum(cost[k] for row in choices for k in row)
    assert penalty.item() == pytest.approx(0.5 * expected)
    assert gates.cost == pytest.approx(100 * expected / (3 * 6 * 3))


def test_penalty_pushes_the_cost_to_its_target() -> None:
    """Trained by the cost term alone, gates that start far above or below the target end around it."""
    for start in (0, 2):
        model, _, gates = gated(targets=[3.0], strength=0.05)
        with torch.no_grad():
            gates.gate.projection.bias.copy_(F.one_hot(torch.tensor(start), 3) * 2.0)
        optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
        costs = []
        for _ in range(60):
            model(X)
            gates.penalty().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert gates.cost is not None
            costs.append(gates.cost)

        assert abs(costs[0] - 3.0) > 1.1
        assert abs(sum(costs[-30:]) / 30 - 3.0) < 0.5


def test_penalty_needs_a_training_forward() -> None:
    """Without a forward since the last call there is no cost to ask for; an evaluation is none."""
    model, _, gates = gated()
    model.eval()(X)
    with pytest.raises(UsageError, match=r"penalty\(\) without a training forward"):
        gates.penalty()
    model.train()(X)
    gates.penalty()

    with pytest.raises(UsageError, match=r"penalty\(\) without"):
        gates.penalty()


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
    """A gated layer called on its own, or a block outside of the model's forward, says so."""
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

    assert [type(block) for block in model.blocks] == [Residual] * 3
    assert classes != [Residual] * 3
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


@pytest.mark.parametrize(
    ("channels_last", "shape", "dims"), [(False, (2, 3, 4, 5), (2, 3)), (True, (2, 4, 3), (1,)), (True, (2, 3), ())]
)
def test_pooling(channels_last: bool, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """The mean over all axes but samples and channels."""
    x = torch.randn(shape)

    expected = x.mean(dims) if dims else x
    torch.testing.assert_close(pooled(x, channels_last=channels_last), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": [[3, 6]]}, "two or more pairs|give a tuple"),
        ({"choices": [[3, 6], [3, 6]]}, "each pair once"),
        ({"choices": [[0, 6], [3, 6]]}, r"\[0, 0\]"),
        ({"choices": [3, 6]}, "two or more pairs|give a tuple"),
        ({"choices": 3}, "choices=3: give a tuple"),
        ({"targets": []}, "above 0"),
        ({"targets": [0]}, "above 0"),
        ({"targets": [1, 2]}, "threshold and decay"),
        ({"threshold": 0.1, "decay": 0.3}, "threshold and decay"),
        ({"mixing": "inputs"}, "Did you mean 'input'"),
        ({"strength": -1}, "strength=-1"),
        ({"hidden": 0}, "hidden=0"),
        ({"low": 3}, "no setting 'low'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each setting of gates that no run could have is a UsageError."""
    with pytest.raises(UsageError, match=message):
        Recipe.from_name("dfq").tuned(**changes)


def train(model: nn.Module, controller: PrecisionController, steps: int, *, skip: int, optimizer: Any) -> None:
    """Train from batch `skip` to batch `steps`."""
    assert controller.gates is not None
    for x, y in list(batches(steps))[skip:]:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + controller.gates.penalty()).backward()
        optimizer.step()
        controller.step(loss)


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
