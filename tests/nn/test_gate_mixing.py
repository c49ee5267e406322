"""Blocks whose samples take several choices: by choice, mixed, and skipped."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from gated_network import X, calls_of, force, gated
from lowbit import PrecisionController, UsageError, functional
from lowbit.methods.recipe import Gating, Recipe
from lowbit.numerics.formats import largest_code
from lowbit.numerics.quantizer import quantize
from lowbit.products.setting import Samples, Setting


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
