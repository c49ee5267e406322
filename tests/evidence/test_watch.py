"""The watcher: which operators it sees, in which module, and that it is the only one."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.evidence.watch import Operation, watched_by


class _Product(nn.Module):
    """A product of two activations in a module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.T


def _watched(model: nn.Module, *, backward: bool = False) -> list[Operation]:
    """What a step of a model runs outside converted layers."""
    seen: list[Operation] = []
    with watched_by(seen.append, model):
        y = model(torch.randn(3, 4))
        if backward:
            y.sum().backward()
    return seen


def _products(seen: list[Operation]) -> list[tuple[str, str | None, int | None]]:
    return [(operation.name, operation.module, operation.macs()) for operation in seen if operation.multiplies]


def test_products_have_the_module_they_ran_in() -> None:
    """Forward and backward are named after the module whose forward multiplied."""
    model = nn.Sequential(nn.Linear(4, 5), _Product())

    seen = _products(_watched(model, backward=True))

    assert seen[:2] == [("aten.addmm", "0", 3 * 4 * 5), ("aten.mm", "1", 3 * 5 * 3)]
    assert sorted(seen[2:], key=str) == [
        ("aten.mm", "0", 3 * 4 * 5),
        ("aten.mm", "1", 3 * 3 * 5),
        ("aten.mm", "1", 3 * 3 * 5),
    ]


def test_products_of_converted_layers_are_not_seen() -> None:
    """What a converted layer multiplies reports itself, and what its neighbour multiplies is seen."""
    model = nn.Sequential(nn.Linear(4, 5), _Product())
    lowbit.convert_(model, "int8", engine="reference")

    seen = _products(_watched(model, backward=True))

    assert {module for _, module, _ in seen} == {"1"}
    assert len(seen) == 3


def test_another_models_modules_have_no_name() -> None:
    """An operator inside a module of another model has None for a module, one between calls the empty name."""
    model, other = nn.Linear(4, 5), _Product()
    seen: list[Operation] = []

    with watched_by(seen.append, model):
        other(torch.randn(3, 4))
        torch.randn(3, 4) @ torch.randn(4, 5)

    assert [module for _, module, _ in _products(seen)] == [None, ""]


@pytest.mark.parametrize("inference", [False, True])
def test_composite_operators_are_seen_as_their_parts(inference: bool) -> None:
    """`einsum` is a batched product, also in inference mode, where torch shows the whole of it."""
    seen: list[Operation] = []

    with watched_by(seen.append, nn.Identity()), torch.inference_mode(inference):
        torch.einsum("bik,bkj->bij", torch.randn(2, 3, 4), torch.randn(2, 4, 5))

    assert [(name, macs) for name, _, macs in _products(seen)] == [("aten.bmm", 2 * 3 * 4 * 5)]
    assert "aten.einsum" not in {operation.name for operation in seen}


def test_views_are_told_apart() -> None:
    """A transposition is a view and a sum is none."""
    seen: list[Operation] = []

    with watched_by(seen.append, nn.Identity()):
        torch.ones(3, 4).t().sum()

    views = {operation.name: operation.is_view for operation in seen}
    assert (views["aten.t"], views["aten.sum"]) == (True, False)


def test_there_is_one_dispatch_mode() -> None:
    """No other file that looks for products has a mode of its own, whose rules could differ from the watcher's.

    The memory of a step is measured by a mode that sees every operator and looks for none.
    """
    files = Path(lowbit.__file__).parent.rglob("*.py")

    modes = [path.name for path in files if re.search(r"\bTorchDispatchMode\b", path.read_text(encoding="utf-8"))]

    assert sorted(modes) == ["memory.py", "watch.py"]
