"""The native functions are operators of torch: its profiler and its counter of operations see them."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import lowbit
from lowbit.engines import int8

pytestmark = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")), reason="this machine lacks the units"
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
    assert calls == {"lowbit::multiply_codes": 3, "lowbit::quantize": 6, "lowbit::sums": 1}
    assert {row.kernel for row in proof.rows} == {"lowbit::multiply_codes"}
