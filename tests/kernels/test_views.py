"""Tensors that are not what their memory says, and parameters of another length than the layer's."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import functional
from lowbit.kernels import native_instruction_sets
from lowbit.methods.recipe import Recipe
from lowbit.products.setting import Setting

ENGINES = ["reference"] + ["int8"] * (native_instruction_sets() is not None)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 5)),
    "conv_transpose": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
    "norm": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
}


def negative(x: Tensor) -> Tensor:
    """The same numbers as the imaginary part of a conjugate: a view that turns the sign of its memory, with gaps."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag.detach()
    assert view.is_neg()
    return view


def dense(x: Tensor) -> Tensor:
    """The same without gaps."""
    return torch._neg_view(-x).detach()


def gradients(layer: nn.Module, recipe: str, engine: str, x: Tensor, g: Tensor) -> list[Tensor]:
    """Output and all gradients of a layer that is converted."""
    model = nn.Sequential(layer)
    lowbit.convert_(model, recipe, engine=engine)
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    y.backward(g)
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS)
def test_zeros_without_memory_are_zeros(name: str, engine: str) -> None:
    """A zero tensor, which torch keeps no numbers for, gives the bits that stored zeros give."""
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    g = torch.zeros_like(layer(x).detach())
    x_zero, g_zero = torch._efficientzerotensor(shape), torch._efficientzerotensor(g.shape)

    expected = gradients(copy.deepcopy(layer), "sbm8", engine, torch.zeros(shape), g)
    found = gradients(layer, "sbm8", engine, x_zero, g_zero)

    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_input_without_axes_is_refused_in_words(engine: str) -> None:
    """One number alone is no row of features, as in torch."""
    layer = nn.Linear(1, 3)
    lowbit.convert_(layer, "int8", engine=engine)

    with pytest.raises(RuntimeError, match=r"cannot multiply shapes \(\)"):
        layer(torch.tensor(1.0))


@pytest.mark.parametrize("view", [negative, dense])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "sbm8") for name in LAYERS), ("linear", "int8"), ("conv", "int8")]
)
def test_views_with_the_sign_turned_give_the_same(
    name: str, recipe: str, engine: str, view: Callable[[Tensor], Tensor]
) -> None:
    """Input, parameters and grad_output as such views give the bits that plain tensors of those numbers give."""
    build, shape = LAYERS[name]
    plain, x = build(), torch.randn(shape)
    g = torch.randn_like(plain(x).detach())
    turned = copy.deepcopy(plain)
    for key, parameter in list(turned.named_parameters()):
        setattr(turned, key, nn.Parameter(view(parameter.detach())))
        assert getattr(turned, key).is_neg()

    expected = gradients(plain, recipe, engine, x, g)
    found = gradients(turned, recipe, engine, view(x), view(g))

    assert expected[0].abs().max() > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(1,), ()])
def test_a_linear_bias_of_one_number_is_repeated(shape: tuple[int, ...], engine: str) -> None:
    """As torch repeats it: the same output as with that number in every place, and its gradient is the sum."""
    layer, x, g = nn.Linear(64, 32), torch.randn(7, 64), torch.randn(7, 32)
    whole = copy.deepcopy(layer)
    layer.bias, whole.bias = nn.Parameter(torch.full(shape, 1.5)), nn.Parameter(torch.full((32,), 1.5))

    found, expected = (gradients(m, "int8", engine, x, g) for m in (layer, whole))

    assert torch.equal(found[0], expected[0])
    assert found[3].shape == shape
    torch.testing.assert_close(found[3].sum(), g.sum())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrong", [0, 1, 3, 7])
@pytest.mark.parametrize(
    ("name", "key"),
    [("linear", "bias"), ("conv", "bias"), ("conv_transpose", "bias"), ("norm", "weight"), ("norm", "bias")],
)
def test_parameters_of_another_length_are_refused_where_torch_refuses(
    name: str, key: str, wrong: int, engine: str
) -> None:
    """Longer and shorter ones: nothing is read past an end, and nothing is repeated that torch does not repeat."""
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    setattr(layer, key, nn.Parameter(torch.ones(wrong)))
    model = nn.Sequential(layer)
    lowbit.convert_(model, "sbm8", engine=engine)
    if (name, wrong) == ("linear", 1):
        assert model(x).shape == (5, 6)
        return

    with pytest.raises(RuntimeError, match=r"0: .*give"):
        model(x)
    lowbit.restore_(model)
    with pytest.raises(RuntimeError):
        model(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_of_another_length_are_refused(engine: str) -> None:
    """Evaluation reads no number past their end."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    lowbit.convert_(model, "sbm8", engine=engine)
    model.eval()
    model[0].running_mean = torch.zeros(3)

    with pytest.raises(RuntimeError, match="running mean of shape"):
        model(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("w", "groups"),
    [((6, 3, 3, 3), 2), ((7, 2, 3, 3), 2), ((6, 2, 3), 2), ((6, 2, 0, 3), 2), ((6, 2, 9, 9), 2), ((6, 2, 3, 3, 1), 2)],
)
def test_weights_of_another_shape_are_refused_where_torch_refuses(w: tuple[int, ...], groups: int, engine: str) -> None:
    """Channels that the groups do not divide, missing axes, empty kernels and kernels larger than the picture."""
    x, weight = torch.randn(3, 4, 5, 5), torch.randn(w)
    setting = Setting(recipe=Recipe.from_name("int8"), engine=engine)

    with pytest.raises(RuntimeError, match=r"conv2d.* cannot multiply shapes"):
        functional.conv(x, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=groups, setting=setting)
    with pytest.raises(RuntimeError):
        F.conv2d(x, weight, groups=groups)
