"""A Range BN that does the ReLU after it in its own pass: the same numbers, and only where nobody looks between."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.engines import int8
from lowbit.nn.norm import FusedSequential

needs_units = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")),
    reason=f"int8 engine: {int8.missing('int8') or int8.missing('bf16')}",
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
    """The same converted layers outside their container."""
    model = converted()
    whole = Apart(*model)
    whole.register_forward_pre_hook(model[0].site.clock.advance)
    return whole


def names_of(y: Tensor) -> list[str]:
    """The nodes of the graph from a result back along the first inputs."""
    node, found = y.grad_fn, []
    while node is not None:
        found.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return found


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
    names = [names_of(model(torch.randn(2, 3, 9, 9))) for model in (converted(), apart())]

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


def _patch(module: nn.Module, calls: list[str]) -> Callable[[], None]:
    """Replace the forward of one object."""
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        calls.append("forward")
        y: Tensor = plain(x)
        return y

    module.forward = forward  # type: ignore[method-assign]
    return lambda: module.__dict__.pop("forward")


class Loud(nn.ReLU):
    """A ReLU of a user's own."""

    calls: list[str]

    def forward(self, x: Tensor) -> Tensor:
        """Say so."""
        self.calls.append("subclass")
        return super().forward(x)


def _subclass(module: nn.Module, calls: list[str]) -> Callable[[], None]:
    """Make a ReLU one of a user's own."""
    plain: Any = module
    plain.__class__ = Loud
    plain.calls = calls

    def undo() -> None:
        plain.__class__ = nn.ReLU

    return undo


def _hook(kind: str) -> Callable[[nn.Module, list[str]], Callable[[], None]]:
    """Register a hook of this kind on one module."""
    return lambda module, calls: getattr(module, f"register_{kind}")(lambda *_: calls.append(kind)).remove


def _global_hook(kind: str) -> Callable[[nn.Module, list[str]], Callable[[], None]]:
    """Register a hook of this kind on every module, which notes the calls of one."""

    def watch(module: nn.Module, calls: list[str]) -> Callable[[], None]:
        register = getattr(nn.modules.module, f"register_module_{kind}")
        remove: Callable[[], None] = register(lambda m, *_: calls.append(kind) if m is module else None).remove
        return remove

    return watch


KINDS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")
WATCHED = {
    **{f"{kind} of the {name}": (_hook(kind), place) for kind in KINDS for name, place in (("norm", 1), ("ReLU", 2))},
    **{
        f"global {kind} at the {name}": (_global_hook(kind), place)
        for kind in KINDS
        for name, place in (("norm", 1), ("ReLU", 2))
    },
    "forward of the norm": (_patch, 1),
    "forward of the ReLU": (_patch, 2),
    "subclass of ReLU": (_subclass, 2),
}


@needs_units
@pytest.mark.parametrize("case", WATCHED)
def test_whoever_looks_at_either_of_them_is_called(case: str) -> None:
    """A hook of any kind, a replaced forward and another class run once, and once they are gone the pair is fused."""
    watch, place = WATCHED[case]
    model, calls = converted(), []
    x = torch.randn(2, 3, 9, 9, requires_grad=True)  # torch warns of backward hooks where it has no gradient

    undo = watch(model[place], calls)
    try:
        watched = model(x)
        watched.sum().backward()
    finally:
        undo()
    again = copy.deepcopy(model).eval()(x)

    assert len(calls) == 1
    assert "ReluBackward0" in names_of(watched)
    assert "ReluBackward0" not in names_of(again)


@needs_units
def test_a_norm_in_two_containers_is_rectified_in_one() -> None:
    """A normalisation that one container has before a ReLU and another has alone gives values below 0 in the other."""
    model, x = converted(), torch.randn(2, 3, 9, 9)
    alone = FusedSequential(model[0], model[1])

    assert not (model[:3](x) < 0).any()
    assert (alone(x) < 0).any()


@needs_units
def test_threads_evaluate_one_model() -> None:
    """Two threads that are in one normalisation at once get what each gets alone, with and without the ReLU."""
    model = converted()
    model(torch.randn(4, 3, 9, 9)).sum().backward()
    model.eval()
    wholes = (model, model[:2])
    inputs = [torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        alone = [whole(x) for whole, x in zip(wholes, inputs, strict=True)]
    together: list[Tensor] = [torch.empty(0), torch.empty(0)]
    meeting = threading.Barrier(2, timeout=60)
    model[1]._check_input_dim = lambda _: meeting.wait()  # the first thing that the normalisation does

    def evaluate(i: int) -> None:
        with torch.no_grad():
            together[i] = wholes[i](inputs[i])

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (alone[1] < 0).any()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


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
