"""LSTM and GRU: the plain layers' values and gradients, quantised ones near them, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import lowbit

KINDS = [nn.LSTM, nn.GRU]
SBM8 = lowbit.Recipe.from_name("sbm8")


def _tensors(result: Any) -> list[Tensor]:
    """Output and final states as a flat list."""
    y, state = result
    return [y, *(state if isinstance(state, tuple) else [state])]


def _everything(layer: nn.Module, x: Tensor, state: Any) -> list[Tensor]:
    """Output, final states, and the gradients of input, initial states and parameters."""
    leaf = x.clone().requires_grad_()
    states = [s.clone().requires_grad_() for s in (state if isinstance(state, tuple) else (state,)) if s is not None]
    given = None if not states else (tuple(states) if isinstance(state, tuple) else states[0])
    results = _tensors(layer(leaf, given))
    loss = sum((i + 1) * r.square().sum() for i, r in enumerate(results))
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, [leaf, *states, *layer.parameters()])]


def _state(kind: type[nn.Module], *shape: int) -> Any:
    h, c = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)
    return (h, c) if kind is nn.LSTM else h


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_fp32_equals_the_plain_layer(
    kind: type[nn.Module], layers: int, batch_first: bool, bias: bool, states: bool
) -> None:
    """With the fp32 recipe, values, final states and all gradients are the plain layer's."""
    layer = kind(5, 4, layers, batch_first=batch_first, bias=bias).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    state = _state(kind, layers, 3 if batch_first else 2, 4) if states else None
    expected = _everything(layer, x, state)

    lowbit.convert_(layer, "fp32")
    actual = _everything(layer, x, state)

    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_fp32_equals_the_plain_layer_without_a_batch(kind: type[nn.Module], batch_first: bool, states: bool) -> None:
    """An unbatched sequence (T, I) gives the plain layer's values, shapes and gradients."""
    layer = kind(5, 4, 2, batch_first=batch_first).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    state = _state(kind, 2, 4) if states else None
    expected = _everything(layer, x, state)

    lowbit.convert_(layer, "fp32")
    actual = _everything(layer, x, state)

    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sbm8_is_near_the_plain_layer_and_not_equal(kind: type[nn.Module]) -> None:
    """8-bit output and gradients without clipping are within 5 % of full precision in norm, and differ from it."""
    layer, x = kind(16, 8, 2), torch.randn(6, 16, 16)
    plain = _everything(layer, x, None)
    fmt = SBM8.output.input.replace(range="minmax")
    output = dataclasses.replace(SBM8.output, input=fmt)
    grad_weight = dataclasses.replace(SBM8.grad_weight, input=fmt)

    lowbit.convert_(layer, SBM8.replace(name="unclipped", output=output, grad_weight=grad_weight))
    quantized = _everything(layer, x, None)

    for q, p in zip(quantized, plain, strict=True):
        assert not torch.equal(q, p)
        assert (q - p).norm() < 0.05 * p.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_is_reproducible(kind: type[nn.Module]) -> None:
    """The same torch seed gives the same output, another one a different output, and evaluation has no dropout."""
    layer, x = kind(5, 4, 2, dropout=0.5), torch.randn(3, 2, 5)
    lowbit.convert_(layer, "fp32")

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    layer.eval()
    assert torch.equal(run(0), run(1))


def test_dropout_leaves_the_last_layer() -> None:
    """With dropout 1 between two layers, the output is that of a second layer fed with zeros."""
    layer, x = nn.GRU(5, 4, 2, dropout=1.0), torch.randn(3, 2, 5)
    lowbit.convert_(layer, "fp32")
    second = nn.GRU(4, 4)
    second.load_state_dict(
        {f"{n}_l0": getattr(layer, f"{n}_l1") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    )

    torch.testing.assert_close(layer(x)[0], second(torch.zeros(3, 2, 4))[0])


def test_each_time_step_draws_its_own_noise() -> None:
    """The recurrent product counts a use for each step and the input product one."""
    layer = nn.LSTM(5, 4)
    lowbit.convert_(layer, "sbm8")

    layer(torch.randn(7, 2, 5))

    assert [site.uses for site in layer.sites()] == [1, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sequence_is_refused(kind: type[nn.Module]) -> None:
    """A PackedSequence raises a TypeError that says what to pass."""
    layer = kind(5, 4)
    lowbit.convert_(layer, "sbm8")

    with pytest.raises(TypeError, match="padded tensors, not a PackedSequence"):
        layer(pack_sequence([torch.randn(3, 5), torch.randn(2, 5)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_wrong_shape_is_refused(kind: type[nn.Module]) -> None:
    """An initial state of another batch raises a ValueError with both shapes."""
    layer = kind(5, 4)
    lowbit.convert_(layer, "sbm8")
    h = torch.zeros(1, 3, 4)

    with pytest.raises(ValueError, match=r"\(1, 3, 4\); \(layers, B, H\) is \(1, 2, 4\)"):
        layer(torch.randn(6, 2, 5), (h, h) if kind is nn.LSTM else h)


@pytest.mark.parametrize(
    ("options", "reason"), [({"bidirectional": True}, "one direction"), ({"proj_size": 2}, "proj_size")]
)
def test_what_has_no_quantised_form_is_refused_at_conversion(options: dict[str, Any], reason: str) -> None:
    """Two directions and projections raise a UsageError with the layer's name, and the layer stays plain."""
    model = nn.ModuleDict({"rnn": nn.LSTM(5, 4, **options)})

    with pytest.raises(lowbit.UsageError, match=rf"rnn \(LSTM\): .*{reason}"):
        lowbit.convert_(model, "sbm8")

    assert type(model["rnn"]) is nn.LSTM
