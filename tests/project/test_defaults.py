"""Torch's default dtype and device belong to the user: nothing here may depend on them."""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.kernels import native_instruction_sets

SOURCE = Path(__file__).resolve().parents[2] / "src" / "lowbit"
# What makes a tensor out of nothing, in torch's default dtype or on its default device unless it is told.
FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}
RUNS = [("int8", "reference"), ("sbm8", "reference"), ("sbm8-cpt", "reference"), ("cpt-int8", "reference")]
if native_instruction_sets() is not None:
    RUNS += [("int8", "int8"), ("sbm8", "int8"), ("cpt-int8", "int8")]
CHANGED = [(torch.bfloat16, None), (torch.float16, "cpu"), (torch.float64, None), (None, "meta")]


@contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    """Run with other defaults of torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


class Attention(nn.Module):
    """Self-attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the input itself."""
        y: Tensor = self.attention(x, x, x)[0]
        return y


class First(nn.Module):
    """A recurrent layer's first result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The outputs without the last state."""
        y: Tensor = self.layer(x)[0]
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)), (6, 16)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, groups=2)
        ),
        (3, 3, 8, 8),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding="same"), nn.BatchNorm1d(6)), (3, 4, 9)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "lstm": (lambda: First(nn.LSTM(8, 6, batch_first=True)), (3, 4, 8)),
    "gru": (lambda: First(nn.GRU(8, 6, batch_first=True)), (3, 4, 8)),
    "attention": (Attention, (2, 5, 16)),
}


def results(model: nn.Module, x: Tensor, recipe: str, engine: str) -> list[Tensor]:
    """Convert and train a copy for two steps: outputs, gradients, parameters, and an evaluation after it."""
    model, found = copy.deepcopy(model), []
    method = lowbit.Recipe.from_name(recipe).replace(first="convert", last="convert")
    lowbit.convert_(model, method, engine=engine)
    if method.is_dynamic:
        lowbit.PrecisionController.from_recipe(model, total_steps=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for scale in (1.0, 1.5):
        leaf = (x * scale).requires_grad_()
        y = model(leaf)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        found += [y, leaf.grad, *(p.grad for p in model.parameters())]
    return [v.detach() for v in (*found, *model.parameters(), model.eval()(x), *model.buffers())]


@pytest.mark.parametrize(("recipe", "engine"), RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_results_do_not_depend_on_them(name: str, recipe: str, engine: str) -> None:
    """Conversion, two steps of training and an evaluation give the same bits under any defaults."""
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    expected = results(model, x, recipe, engine)

    for dtype, device in CHANGED:
        with defaults(dtype, device):
            found = results(model, x, recipe, engine)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
            assert torch.equal(ours, theirs)


def calls(path: Path) -> Iterator[tuple[int, set[str]]]:
    """Line and keywords of every call of a factory of torch."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                yield node.lineno, {keyword.arg or "" for keyword in node.keywords}


def test_every_tensor_is_made_in_a_dtype_and_on_a_device_that_is_named() -> None:
    """No call of torch.empty and its like leaves either to torch's defaults; there are dozens of them."""
    found = {
        f"{path.relative_to(SOURCE)}:{line}": names
        for path in sorted(SOURCE.rglob("*.py"))
        for line, names in calls(path)
    }

    assert len(found) > 40
    assert {place: names for place, names in found.items() if not {"dtype", "device"} <= names} == {}
