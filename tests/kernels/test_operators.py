"""The integer products are operators of torch: its checks pass, its profiler and its counter of operations see them."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import lowbit
from lowbit.engines import int8
from lowbit.kernels.cpu import Rows, _numbers

pytestmark = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")), reason="this machine lacks the units"
)


@pytest.mark.parametrize("name", ["multiply_codes", "multiply_halves"])
def test_the_operator_passes_the_checks_of_torch(name: str) -> None:
    """Schema, fake kernel, autograd registration and ahead-of-time dispatch."""
    generator = torch.Generator().manual_seed(0)
    lhs = torch.randint(-127, 128, (5, 12), dtype=torch.int8, generator=generator)
    rhs = torch.randint(-127, 128, (7, 12), dtype=torch.int8, generator=generator)
    rows = _numbers(*(Rows(data=x, rows=len(x), width=12, stride=12, along=True) for x in (lhs, rhs)))
    one = torch.ones(1)

    torch.library.opcheck(
        getattr(torch.ops.lowbit, name).default,
        (lhs, [int(n) for n in rows[0]], rhs, [int(n) for n in rows[1]], torch.zeros(5, 7), [0, 7, 1], one, one, None),
    )


def convolutions() -> nn.Sequential:
    """Convolutions with a stride and without, transposed, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(144, 5),
    )


@pytest.mark.parametrize("recipe", ["int8", "sbm8"])
def test_the_counter_of_torch_counts_what_the_plain_model_counts(recipe: str) -> None:
    """FlopCounterMode gives the same operations, forward and backward, converted and not."""
    found = {}
    for name in ("plain", recipe):
        torch.manual_seed(0)
        model = convolutions()
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        if name == recipe:
            lowbit.convert_(model, recipe, engine="int8")
        with FlopCounterMode(display=False) as counter:
            model(x).square().sum().backward()
        found[name] = counter.get_total_flops()

    assert found[recipe] == found["plain"] > 0


def test_the_profiler_shows_every_product() -> None:
    """Three products of one layer are three calls of the operator that the proof names."""
    model = nn.Sequential(nn.Linear(16, 16))
    lowbit.convert_(model, "int8", engine="int8")
    x = torch.randn(4, 16, requires_grad=True)

    with lowbit.verify(model) as proof:
        model(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        model(x).sum().backward()

    calls = {row.key: row.count for row in seen.key_averages() if row.key.startswith("lowbit::")}
    assert calls == {"lowbit::multiply_codes": 3}
    assert {row.kernel for row in proof.rows} == {"lowbit::multiply_codes"}
