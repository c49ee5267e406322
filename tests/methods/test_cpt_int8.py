"""Cyclic precision whose products are integers: the recipe `cpt-int8` on the int8 engine."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import PrecisionController
from lowbit.engines import int8
from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import QuantLayer
from lowbit.products import watch
from lowbit.products.watch import ProductCall, ProductRun

WIDTHS = range(3, 9)

needs_units = pytest.mark.skipif(bool(int8.missing("int8")), reason=f"int8 engine: {int8.missing('int8')}")


def network() -> nn.Sequential:
    """Two convolutions with batch normalisation, and two linear layers of which the last is left."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(72, 20),
        nn.Linear(20, 5),
    )


def controlled(total_steps: int, cycles: int = 1) -> tuple[nn.Sequential, PrecisionController]:
    """The converted network and the controller of its recipe."""
    model = network()
    lowbit.convert_(model, Recipe.from_name("cpt-int8").tuned(cycles=cycles))
    return model, PrecisionController.from_recipe(model, total_steps=total_steps)


def train(model: nn.Module, controller: PrecisionController, steps: range) -> None:
    """Train on the batches of these steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)


def test_schedule_and_policies_are_those_of_cpt() -> None:
    """Only the grids differ: true zeros in place of float offsets, weights per channel that the product keeps."""
    recipe, cpt = Recipe.from_name("cpt-int8"), Recipe.from_name("cpt")
    formats = {
        (product, operand): (fmt.bits, fmt.zero, fmt.granularity, fmt.rounding)
        for product, operand, fmt in recipe.operands()
        if fmt.has_width
    }
    others = ("schedule", "normalization", "first", "last", "depthwise", "bias")

    assert [getattr(recipe, name) for name in others] == [getattr(cpt, name) for name in others]
    assert set(formats.values()) == {
        (8, "integer", "tensor", "nearest"),
        (8, "symmetric", "kept-channel", "nearest"),
        (8, "integer", "tensor", "stochastic"),
    }
    assert recipe.output != cpt.output


@needs_units
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_runs_as_integers(bits: int) -> None:
    """At each width of the cycle `verify` sees the three products of three layers on codes, and no other engine."""
    model = network()
    lowbit.convert_(model, "cpt-int8")
    PrecisionController(model, forward=bits, backward=8)

    with lowbit.verify(model) as proof:
        model(torch.randn(4, 3, 8, 8, requires_grad=True)).sum().backward()
    rows = [(row.product, row.engine, row.kernel, row.bits, row.calls) for row in proof.rows]

    assert Counter(rows) == {
        ("output", "int8", "lowbit::multiply_codes", f"{bits}x{bits}", 1): 3,
        ("grad_input", "int8", "lowbit::multiply_codes", f"8x{bits}", 1): 3,
        ("grad_weight", "int8", "lowbit::multiply_codes", f"8x{bits}", 1): 3,
    }


@needs_units
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_width_uses_its_codes_and_no_more(bits: int) -> None:
    """4,096 even steps from 0 to 1 as input take every code of the width: 2**bits levels, not one more."""
    layer = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2))
    lowbit.convert_(layer, "cpt-int8")
    PrecisionController(layer, forward=bits, backward=8)
    levels: list[int] = []

    def note(run: ProductRun) -> None:
        if run.product == "output":
            levels.append(len(run.operands["input"].quantized.unique()))

    x = torch.linspace(0, 1, 4096).view(64, 64)
    with watch.observed_by(note):
        layer(x)

    assert levels == [2**bits]


@needs_units
def test_bits_change_in_a_run_without_new_memory_for_them() -> None:
    """Over a cycle every width from 3 to 8 runs as integers, in the same tensors and at the same addresses."""
    model, controller = controlled(total_steps=24)
    sites = [site for m in model.modules() if isinstance(m, QuantLayer) for site in m.sites()]
    before = [(id(site.bits), site.bits.data_ptr()) for site in sites]
    seen: Counter[tuple[str, int]] = Counter()

    def note(call: ProductCall) -> None:
        if call.product == "output":
            seen[call.engine, call.bits[0]] += 1

    with watch.counted_by(note):
        train(model, controller, range(24))

    assert set(seen) == {("int8", bits) for bits in WIDTHS}
    assert seen.total() == 24 * len(sites)
    assert [(id(site.bits), site.bits.data_ptr()) for site in sites] == before


@needs_units
def test_a_run_resumed_in_the_middle_of_a_cycle_is_bit_for_bit_the_same() -> None:
    """Saved at step 7 of a cycle of 12 and loaded into new objects, a run ends with the same weights."""
    whole, control = controlled(total_steps=24, cycles=2)
    train(whole, control, range(24))

    first, control = controlled(total_steps=24, cycles=2)
    train(first, control, range(7))
    saved = copy.deepcopy((first.state_dict(), lowbit.state_dict(first), control.state_dict()))
    second, control = controlled(total_steps=24, cycles=2)
    second.load_state_dict(saved[0])
    lowbit.load_state_dict(second, saved[1])
    control.load_state_dict(saved[2])
    middle = control.forward_bits
    train(second, control, range(7, 24))

    assert middle is not None
    assert 3 < middle < 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    # The bias before the normalisation has no gradient but rounding, which may leave it where it is.
    moved = [not torch.equal(a, b) for a, b in zip(whole.parameters(), network().parameters(), strict=True)]
    assert all(moved[:1] + moved[2:])


@needs_units
def test_engines_agree_in_the_middle_of_a_cycle() -> None:
    """At 5 bits gradients of the two engines differ by float32 sums alone, and from 8 bits by much more."""
    grads = []
    for engine, bits in (("int8", 5), ("reference", 5), ("reference", 8)):
        model = network()
        lowbit.convert_(model, "cpt-int8", engine=engine)
        PrecisionController(model, forward=bits, backward=8)
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        grads.append(model[5].weight.grad)
    own, reference, wide = grads

    assert (own - reference).norm() < 1e-2 * reference.norm()
    assert (wide - reference).norm() > 3e-2 * reference.norm()
