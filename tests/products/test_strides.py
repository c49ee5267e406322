"""Outputs of converted layers have the memory that those of plain layers have, and may be changed in place as those.

The plain layer is asked each time: nothing here knows its rules.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit
from helpers import threads
from lowbit.engines import int8
from lowbit.products.strides import laid_out, of_normalization

Layer = Callable[[], nn.Module]

AVAILABLE = ["reference", "int8"] if not int8.missing("int8") else ["reference"]
MODES = [(True, False), (True, True), (False, False)]  # training, autocast

ENGINES = [
    pytest.param(e, marks=pytest.mark.skipif(e not in AVAILABLE, reason="this processor lacks 8-bit units"))
    for e in ("reference", "int8")
]

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 9, 8)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 8)),
    "conv2d of one sample": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "conv2d padded to the same size": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 8)),
    "conv2d padded by reflection": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 8)),
    "conv2d to one place": (lambda: nn.Conv2d(4, 6, (9, 8)), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 4, 6)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 3, 4, 3)),
    "linear": (lambda: nn.Linear(9, 6), (2, 4, 9)),
    "linear of one sample": (lambda: nn.Linear(9, 6, bias=False), (9,)),
    "batch norm of matrices": (lambda: nn.BatchNorm1d(4), (8, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (2, 4, 9)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (2, 4, 9, 8)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 4, 5)),
    "batch norm and ReLU": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), (2, 4, 9, 8)),
    "lstm": (lambda: nn.LSTM(9, 6), (5, 3, 9)),
    "lstm, batch first": (lambda: nn.LSTM(9, 6, batch_first=True), (5, 3, 9)),
    "gru": (lambda: nn.GRU(9, 6), (5, 3, 9)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (5, 3, 8)),
    "attention, batch first": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (5, 3, 8)),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(make: Layer, engine: str, *, train: bool) -> tuple[nn.Module, nn.Module]:
    """The plain layer and its converted twin, with the same parameters."""
    torch.manual_seed(0)
    plain = make().train(train)
    converted = copy.deepcopy(plain)
    lowbit.convert_(converted, "sbm8", engine=engine, rules=[("", "sbm8")] if not list(plain.children()) else ())
    return plain, converted


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's first output."""
    y = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
    assert isinstance(y, (Tensor, tuple))
    return y if isinstance(y, Tensor) else y[0]


def in_memory(x: Tensor) -> dict[str, Tensor]:
    """The same values in every kind of memory."""
    gaps = torch.zeros([2 * n for n in x.shape])[tuple(slice(0, 2 * n, 2) for n in x.shape)]
    kinds = {"contiguous": x, "gaps": gaps.copy_(x)}
    if x.dim() > 1:
        kinds["transposed"] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        kinds["axes swapped"] = x.transpose(0, 1).contiguous().transpose(0, 1)
        kinds["expanded"] = x[:1].expand(x.shape)
    if x.dim() > 3:
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        kinds["channels last"] = last
        kinds["channels last with gaps"] = torch.cat([last, last], 1)[:, : x.shape[1]]
    return kinds


def significant(y: Tensor) -> tuple[int, ...]:
    """The strides that decide where numbers lie: not those of axes of size 1."""
    return tuple(s for s, n in zip(y.stride(), y.shape, strict=True) if n != 1)


@pytest.mark.parametrize(("train", "autocast"), MODES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_can_be_changed_in_place(kind: str, engine: str, train: bool, autocast: bool) -> None:
    """Each way to change an output in place gives the values and gradients of the way out of place."""
    if kind == "batch norm and ReLU":
        pytest.skip("a plain ReLU keeps its result for the backward, so torch refuses")
    make, shape = LAYERS[kind]
    layer = both(make, engine, train=train)[1]
    changes: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "relu": (F.relu_, F.relu),
        "silu": (lambda y: F.silu(y, inplace=True), F.silu),
        "add": (lambda y: y.add_(y.detach()), lambda y: y + y.detach()),
        "fill": (_fill_first, lambda y: torch.cat([torch.zeros_like(y[:1]), y[1:]])),
        "part": (lambda y: y.view(-1).mul_(3).view(y.shape), lambda y: y * 3),
    }
    for name, (in_place, out_of_place) in changes.items():
        found = []
        for change in (in_place, out_of_place):
            x = randn(*shape).requires_grad_()
            layer.zero_grad()
            again = copy.deepcopy(layer)  # the same step, so the same noise
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = call(again, x)
                if name == "part" and not y.is_contiguous():
                    break
                y = change(y)
            y.float().square().sum().backward()
            assert x.grad is not None
            found.append([y.detach(), x.grad, *(p.grad for p in again.parameters() if p.grad is not None)])
        if found:
            assert len(found[0]) == len(found[1])
            torch.testing.assert_close(*found)


def _fill_first(y: Tensor) -> Tensor:
    y[:1] = 0
    return y


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", ["fp32", "sbm8", "bf16"])
@pytest.mark.parametrize("changed", ["input", "weight"])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_what_changes_after_the_forward_does_not_change_the_gradients(
    kind: str, changed: str, recipe: str, engine: str
) -> None:
    """Gradients are those of the values that the forward saw, or torch's usual error says that these are gone."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    plain = make()
    layer = copy.deepcopy(plain)
    lowbit.convert_(layer, recipe, engine="auto" if recipe == "fp32" else engine)
    unchanged = _gradients(copy.deepcopy(layer), shape, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradients(plain, shape, changed)

    try:
        found = _gradients(layer, shape, changed)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            raise error
    else:
        torch.testing.assert_close(found, unchanged, rtol=0, atol=0)


def _gradients(layer: nn.Module, shape: tuple[int, ...], changed: str | None) -> list[Tensor | None]:
    """Of the input and the parameters, one of which is doubled between the forward and the backward."""
    leaf = randn(*shape).requires_grad_()
    x = leaf * 1
    loss = call(layer, x).square().sum()
    with torch.no_grad():
        if changed is not None:
            (x if changed == "input" else layer.get_parameter("weight")).mul_(2)
    loss.backward()
    return [leaf.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(("train", "autocast"), MODES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_memory_of_an_output_is_that_of_the_plain_layer(
    kind: str, engine: str, train: bool, autocast: bool
) -> None:
    """Strides and dtype are those that the plain layer gives, for inputs in every kind of memory."""
    make, shape = LAYERS[kind]
    plain, converted = both(make, engine, train=train)
    for memory, x in in_memory(randn(*shape)).items():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, y = call(plain, x), call(converted, x)

        # Without gaps, where the plain layer has them: every view that it allows is allowed.
        free = isinstance(plain, (nn.RNNBase, nn.MultiheadAttention)) and not expected.is_contiguous()
        assert significant(y) == significant(expected) or (free and y.is_contiguous()), memory
        assert y.shape == expected.shape
        assert y.dtype == expected.dtype or "norm" in kind  # one that looks at codes alone
        assert y.requires_grad == expected.requires_grad
        assert y.is_leaf == expected.is_leaf


@st.composite
def strided(draw: st.DrawFn, dims: int) -> Tensor:
    """A tensor of zeros of small sizes, its axes in any order in memory, with gaps, steps and expanded axes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
    order = draw(st.permutations(range(dims)))
    last = (1, *range(dims - 1, 1, -1), 0)
    order = draw(st.sampled_from([order, last, tuple(reversed(range(dims)))]))
    strides, step = [0] * dims, 1
    for axis in order:
        strides[axis] = step * draw(st.sampled_from([1, 1, 1, 2]))
        step = strides[axis] * shape[axis]
    if draw(st.integers(0, 4)) == 0:
        strides[draw(st.integers(0, dims - 1))] = 0
    return torch.zeros(step * 2).as_strided(shape, strides)


@given(data=st.data(), dims=st.integers(2, 5))
@settings(max_examples=300, deadline=None)
def test_what_torch_takes_for_channels_last(data: st.DataObject, dims: int) -> None:
    """The strides that torch's own batch normalisation gives its result say what it took its input for."""
    x = data.draw(strided(dims))
    channels = torch.ones(x.shape[1])

    expected = F.batch_norm(x, channels, channels)

    ours = torch.empty_strided(x.shape, of_normalization(x))
    assert significant(ours) == significant(expected)


@given(data=st.data(), axes=st.integers(1, 3), engine=st.sampled_from(AVAILABLE))
@settings(max_examples=120, deadline=None)
def test_any_convolution_answers_like_the_plain_one(data: st.DataObject, axes: int, engine: str) -> None:
    """Shape, dtype, strides and autograd flags are those of torch for any sizes, strides of memory and arguments."""
    draw = data.draw
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 2]))
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")
    plain = kind(
        draw(st.sampled_from([2, 16])),
        draw(st.sampled_from([2, 16])),
        draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    x = torch.randn(draw(st.integers(1, 3)), plain.in_channels, *[draw(st.integers(4, 6)) for _ in range(axes)])
    if draw(st.booleans()):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if axes > 1 and draw(st.booleans()):
        plain.weight.data = plain.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
    x = x[0] if draw(st.integers(0, 3)) == 0 else x
    x.requires_grad_(draw(st.booleans()))
    plain.requires_grad_(draw(st.booleans()))
    converted = copy.deepcopy(plain)
    lowbit.convert_(converted, "int8", engine=engine)

    expected, y = plain(x), converted(x)

    assert (y.shape, y.dtype, y.requires_grad, y.is_leaf) == (
        expected.shape,
        expected.dtype,
        expected.requires_grad,
        expected.is_leaf,
    )
    # torch's own choice for 3 axes depends on the number of threads and on sizes; of two axes it is a rule.
    if axes < 3:
        assert significant(y) == significant(expected)
    assert y._base is None or y.dim() < axes + 2
    y.mul_(2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("last", ["input", "weight", "none"])
def test_three_axes_in_channels_last(last: str, engine: str) -> None:
    """A 3-d convolution is channels last where its input or weight is, as torch's is with more than one thread."""
    plain = nn.Conv3d(16, 16, 3)
    if last == "weight":
        plain.to(memory_format=torch.channels_last_3d)
    x = randn(2, 16, 5, 4, 6)
    x = x.to(memory_format=torch.channels_last_3d) if last == "input" else x
    converted = copy.deepcopy(plain)
    lowbit.convert_(converted, "int8", engine=engine)

    with threads(2):
        expected = plain(x)

    assert converted(x).stride() == expected.stride()
    assert expected.is_contiguous() == (last == "none")


def test_laid_out() -> None:
    """A tensor that is already as wanted is returned itself; a view or another memory gives the same values."""
    x = randn(2, 3, 4, 5).requires_grad_()
    last = (60, 1, 15, 3)

    same, moved, apart = laid_out(x, x.stride()), laid_out(x, last), laid_out(x.view(2, 3, 4, 5), x.stride())

    assert same is x
    assert moved.stride() == last
    assert apart._base is None
    assert torch.equal(moved, x)
    assert torch.equal(apart, x)
    (moved * moved + apart).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x + 1)
