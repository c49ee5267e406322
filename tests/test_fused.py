"""A Range BN that does the ReLU after it in its own pass: the same numbers, and only where nobody looks between."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import integer
from lowbit.nn.norm import FusedSequential

needs_units = pytest.mark.skipif(
    bool(integer.missing("int8") or integer.missing("bf16")),
    reason=f"int8 engine: {integer.missing('int8') or integer.missing('bf16')}",
)


class Apart(nn.Module):
    """Modules called one after the other, where no container says that they follow each other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """All of them."""
        for part in self.parts:
            x = part(x)
        return x


def layers() -> list[nn.Module]:
    """A convolution, its normalisation with scales and shifts of both signs, a ReLU, a convolution."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return [nn.Conv2d(3, 24, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(24, 5, 3)]


def converted(engine: str = "int8") -> nn.Sequential:
    """The layers in a container, in sbm8."""
    model = nn.Sequential(*layers())
    lowbit.convert_(model, "sbm8", engine=engine)
    return model


def apart() -> Apart:
    """The same converted layers outside of their container."""
    model = converted()
    whole = Apart(*model)
    whole.register_forward_pre_hook(model[0].site.clock.advance)
    return whole


def train(model: nn.Module, *, autocast: bool) -> list[Tensor]:
    """Outputs and gradients of two steps, and an evaluation."""
    found = []
    for step in range(2):
        x = torch.randn(4, 3, 9, 11, generator=torch.Generator().manual_seed(step)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(x)
        model.zero_grad()
        y.float().square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
    with torch.no_grad():
        return [*found, model.eval()(x)]


@needs_units
@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_numbers(autocast: bool) -> None:
    """Outputs, gradients and evaluation are bit for bit those of the modules apart."""
    model = converted()
    assert type(model) is FusedSequential

    for ours, theirs in zip(train(model, autocast=autocast), train(apart(), autocast=autocast), strict=True):
        assert torch.equal(ours, theirs)


@needs_units
def test_nothing_is_kept_for_the_relu() -> None:
    """The ReLU's own node is not in the graph, so it keeps nothing for the backward."""
    names = []
    for model in (converted(), apart()):
        node, found = model(torch.randn(2, 3, 9, 9)).grad_fn, []
        while node is not None:
            found.append(type(node).__name__)
            node = node.next_functions[0][0] if node.next_functions else None
        names.append(found)

    assert "ReluBackward0" in names[1]
    assert "ReluBackward0" not in names[0]


@needs_units
def test_nan_stays_nan() -> None:
    """A nan in the input is no number after the ReLU."""
    x = torch.randn(2, 3, 9, 9)
    x[0, 0, 0, 0] = float("nan")

    assert converted()(x).isnan().any()


@needs_units
def test_a_hook_between_sees_what_it_saw() -> None:
    """With a hook on the normalisation it is not rectified, and the result stays the same."""
    model, x, seen = converted(), torch.randn(2, 3, 9, 9), []
    plain = copy.deepcopy(model)(x)
    model[1].register_forward_hook(lambda *args: seen.append(args[2].detach()))

    hooked = model(x)

    assert (seen[0] < 0).any()
    assert torch.equal(hooked, plain)


@needs_units
def test_a_slice_without_the_relu_is_not_rectified() -> None:
    """`model[:2]` and the normalisation on its own give values below 0."""
    model, x = converted(), torch.randn(2, 3, 9, 9)

    assert (model[:2](x) < 0).any()
    assert (model[1](model[0](x)) < 0).any()
    assert not (model[:3](x) < 0).any()


@needs_units
def test_observed_the_relu_still_counts() -> None:
    """Under `verify` the normalisation runs by its definition, then the ReLU, so the next layer sees no less than 0."""
    model, seen = converted(), []
    model[3].register_forward_pre_hook(lambda *args: seen.append(args[1][0].detach()))
    with lowbit.verify(model) as proof:
        model(torch.randn(2, 3, 9, 9)).sum().backward()

    assert not (seen[0] < 0).any()
    assert (seen[0] > 0).any()
    assert {row.layer for row in proof.rows} == {"0", "1", "3"}


@needs_units
def test_restored() -> None:
    """`restore_` gives the plain container back; the reference engine never takes it away."""
    model = converted()
    lowbit.restore_(model)

    assert [type(m) for m in model.modules()][:4] == [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert type(converted("reference")) is nn.Sequential
