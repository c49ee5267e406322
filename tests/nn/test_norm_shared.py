"""Range BN whose batch is shared by two gloo processes: exactly that of one process with the whole batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lowbit
from helpers import in_processes
from lowbit import UsageError
from lowbit.methods.recipe import Recipe

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

# The same samples in unequal parts; 45 values a channel in the second case, in chunks that end within a part.
SHAPES = {"images": (10, 6, 4, 4), "few": (9, 3, 5), "rows": (12, 5)}
SPLIT = 4  # samples of rank 0
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def recipe(*, synchronized: bool) -> Recipe:
    """sbm8 with gradients that are rounded to nearest: noise is that of each process."""
    own = Recipe.from_name("sbm8")
    assert own.normalization is not None
    nearest = own.normalization.grad_output.replace(rounding="nearest")
    norm = own.normalization
    return own.replace(
        normalization=norm.__class__(
            input=norm.input, grad_output=nearest, fewest_per_chunk=4, synchronized=synchronized
        )
    )


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Input, some of whose largest values are equal, and gradient of the output."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator).mul(3).round().div(2)
    return x, torch.randn(shape, generator=generator)


def call(part: slice, *, synchronized: bool) -> dict[str, list[Tensor]]:
    """Output, gradients and running statistics of a part of each batch, from two steps and an evaluation."""
    found: dict[str, list[Tensor]] = {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        layer = NORMS[len(shape)](shape[1])
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        model = nn.Sequential(layer)
        lowbit.convert_(model, recipe(synchronized=synchronized), engine="reference")
        whole, g = batch(shape)
        x = whole[part].requires_grad_()
        for _ in range(2):
            y = model(x)
        y.backward(g[part])
        site: Any = model[0].site
        state = [layer.running_mean, layer.running_var, site.running_range]
        found[name] = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *state, model.eval()(x).detach()]
    return found


def of_a_rank(*, synchronized: bool) -> dict[str, list[Tensor]]:
    """What one of two processes finds."""
    dist.init_process_group("gloo")
    part = slice(SPLIT) if dist.get_rank() == 0 else slice(SPLIT, None)
    found = call(part, synchronized=synchronized)
    dist.destroy_process_group()
    return found


def rank_alone() -> dict[str, list[Tensor]]:
    """Without the option."""
    return of_a_rank(synchronized=False)


def rank_shared() -> dict[str, list[Tensor]]:
    """With the option."""
    return of_a_rank(synchronized=True)


@pytest.fixture(scope="module")
def shared() -> list[dict[str, list[Tensor]]]:
    """What two processes find with the option."""
    return in_processes(rank_shared, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_are_one(shared: list[dict[str, list[Tensor]]], name: str) -> None:
    """Output, gradients, running statistics and evaluation are those of the whole batch, to 1e-6."""
    whole = call(slice(None), synchronized=True)[name]
    one, two = (found[name] for found in shared)

    for i in (0, 1, 7):  # by sample
        torch.testing.assert_close(torch.cat([one[i], two[i]]), whole[i], rtol=1e-5, atol=1e-6)
    for i in (2, 3):  # gradients of gamma and beta, which data parallel training adds up
        torch.testing.assert_close(one[i] + two[i], whole[i], rtol=1e-5, atol=1e-5)
    for i in (4, 5, 6):
        torch.testing.assert_close(one[i], whole[i], rtol=1e-6, atol=1e-7)
        assert torch.equal(one[i], two[i])


def test_without_the_option_each_process_has_its_own_statistics() -> None:
    """Their outputs differ from that of the whole batch by far more."""
    whole = call(slice(None), synchronized=False)["images"]
    one, two = (found["images"] for found in in_processes(rank_alone, 2))

    assert (torch.cat([one[0], two[0]]) - whole[0]).abs().max() > 0.05
    assert not torch.equal(one[4], two[4])


def test_one_process_alone_is_the_same_with_the_option() -> None:
    """There is nothing to share."""
    one, two = (call(slice(None), synchronized=option)["images"] for option in (True, False))

    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_native_passes_say_that_they_do_not_share() -> None:
    """The report names the reason, and an engine that was asked for is refused."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    report = lowbit.convert_(model, recipe(synchronized=True))

    assert "several processes" in str(report)
    assert model[1].site.engine == "reference"
    lowbit.restore_(model)
    with pytest.raises(UsageError, match="over several processes runs on the reference engine"):
        lowbit.convert_(model, recipe(synchronized=True), engine="int8")
