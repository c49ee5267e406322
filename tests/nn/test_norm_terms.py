"""Batch normalisation whose terms have formats."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.recipe import Recipe, TermNorm, from_toml
from lowbit.nn import TermBatchNorm1d, TermBatchNorm2d, TermBatchNorm3d
from lowbit.numerics.elements import FixedPoint
from lowbit.numerics.formats import FP32, Format

FINE = Format(element=FixedPoint(integer=4, fraction=20, ends="open"))
WAGEUBN = Recipe.from_name("wageubn")
SHAPES = {nn.BatchNorm1d: (8, 4), nn.BatchNorm2d: (6, 4, 3, 5), nn.BatchNorm3d: (2, 4, 3, 2, 3)}
TWINS = {nn.BatchNorm1d: TermBatchNorm1d, nn.BatchNorm2d: TermBatchNorm2d, nn.BatchNorm3d: TermBatchNorm3d}


def recipe(**formats: Any) -> Recipe:
    """fp32 products, and a normalisation of these formats."""
    return Recipe.from_name("fp32").replace(name="test", normalization=TermNorm(**{"normalized": FINE, **formats}))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: type[nn.Module], **settings: Any) -> Any:
    """A layer whose gamma and beta are not 1 and 0."""
    made: Any = kind(4, **settings)
    if made.affine:
        with torch.no_grad():
            made.weight.copy_(randn(4, seed=1))
            made.bias.copy_(randn(4, seed=2))
    return made


@pytest.mark.parametrize("kind", SHAPES)
def test_with_fine_grids_it_is_batch_normalisation(kind: type[nn.Module]) -> None:
    """Output, gradients and running statistics are those of the plain layer to 1e-4, and not equal to them."""
    plain, x, g = layer(kind), randn(*SHAPES[kind]).requires_grad_(), randn(*SHAPES[kind], seed=3)
    ours, z = copy.deepcopy(plain), x.detach().clone().requires_grad_()
    lowbit.convert_(ours, recipe(), strict=False)

    y, wanted = ours(z), plain(x)
    y.backward(g)
    wanted.backward(g)

    assert type(ours) is TWINS[kind]
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(y, wanted)
    torch.testing.assert_close(z.grad, x.grad, rtol=1e-4, atol=1e-4)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-4)
    for name, b in plain.named_buffers():
        torch.testing.assert_close(ours.state_dict()[name], b, rtol=1e-5, atol=1e-6)


def test_evaluation_takes_the_running_statistics() -> None:
    """It normalises as the plain layer does, and changes nothing."""
    plain = layer(nn.BatchNorm2d)
    plain(randn(6, 4, 3, 5))
    ours = copy.deepcopy(plain)
    lowbit.convert_(ours, recipe(), strict=False)
    before = copy.deepcopy(ours.state_dict())
    x = randn(2, 4, 3, 5, seed=5)

    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_the_gradient_that_arrives_is_put_into_its_format() -> None:
    """A coarse format of grad_output changes beta's gradient, which is its sum."""
    coarse = Format(element=FixedPoint(integer=2, fraction=1))
    x, g = randn(6, 4, 3, 5).requires_grad_(), randn(6, 4, 3, 5, seed=3)
    ours = layer(nn.BatchNorm2d)
    lowbit.convert_(ours, recipe(grad_output=coarse), strict=False)

    ours(x).backward(g)

    rounded = (g * 2).round().clamp(-4, 3) / 2
    torch.testing.assert_close(ours.bias.grad, rounded.sum((0, 2, 3)))
    assert not torch.allclose(ours.bias.grad, g.sum((0, 2, 3)))


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_the_layers_settings_hold(settings: dict[str, Any]) -> None:
    """Without gamma and beta, without running statistics, and with cumulative ones."""
    plain, x = layer(nn.BatchNorm2d, **settings), randn(6, 4, 3, 5)
    ours = copy.deepcopy(plain)
    lowbit.convert_(ours, recipe(), strict=False)

    for _ in range(2):
        y, wanted = ours(x), plain(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    for name, b in plain.named_buffers():
        torch.testing.assert_close(ours.state_dict()[name], b, rtol=1e-5, atol=1e-6)


def test_half_precision_comes_out_as_it_went_in() -> None:
    """bf16 in, bf16 out; terms are computed in float32."""
    ours = layer(nn.BatchNorm2d).bfloat16()
    lowbit.convert_(ours, recipe(), strict=False)

    assert ours(randn(6, 4, 3, 5).bfloat16()).dtype == torch.bfloat16


def test_one_value_per_channel_is_refused_as_in_torch() -> None:
    """Its variance would be 0."""
    ours = layer(nn.BatchNorm1d)
    lowbit.convert_(ours, recipe(), strict=False)

    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(randn(1, 4))


def test_the_proof_shows_every_term() -> None:
    """Terms with formats have their widths, and the gradient its own row."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    lowbit.convert_(model, "wageubn")

    with lowbit.verify(model) as proof:
        model(randn(2, 3, 9, 9)).square().mean().backward()

    rows = {row.product: row for row in proof.rows if row.layer == "1"}
    widths = {name: operand.bits for name, operand in rows["output"].operands.items()}
    assert widths == {"normalized": 8, "mean": 16, "deviation": 16, "weight": 8, "bias": 8}
    assert rows["grad_input"].operands["grad_output"].bits == 8


def test_going_back_gives_the_plain_layer() -> None:
    """Parameters are the same objects, and the class is torch's."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    weight = model[1].weight
    lowbit.convert_(model, "wageubn")
    model(randn(5, 4))

    lowbit.restore_(model)

    assert type(model[1]) is nn.BatchNorm1d
    assert model[1].weight is weight


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalized": FP32}, "leave the normalisation out"),
        ({"epsilon": 0.0}, "give a positive number"),
        ({"mean": lowbit.formats.integer(bits=8, zero="symmetric", granularity="row")}, "share one scale"),
    ],
)
def test_terms_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    """Each message says what is wrong."""
    assert isinstance(WAGEUBN.normalization, TermNorm)
    with pytest.raises(lowbit.UsageError, match=words):
        dataclasses.replace(WAGEUBN.normalization, **changes)


def test_a_kind_that_does_not_exist_is_named() -> None:
    """The known kinds are said."""
    with pytest.raises(lowbit.UsageError, match=r"normalization of kind 'terns'.*Did you mean 'terms'"):
        from_toml("mine", 'base = "fp32"\nsummary = "x"\n[normalization]\nkind = "terns"\n')
