"""LSTM and GRU: the plain layers' values and gradients, quantised ones near them, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

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


VARIANTS = [
    (nn.LSTM, {"bidirectional": True}),
    (nn.GRU, {"bidirectional": True}),
    (nn.LSTM, {"proj_size": 3}),
    (nn.LSTM, {"bidirectional": True, "proj_size": 3, "bias": False}),
]


def _state_of(layer: Any, samples: int) -> Any:
    """A random initial state of a layer, float64."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, samples, layer.proj_size or layer.hidden_size, dtype=torch.float64)
    return (h, torch.randn(count, samples, layer.hidden_size, dtype=torch.float64)) if layer.mode == "LSTM" else h


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_two_directions_and_projections_equal_the_plain_layer(
    kind: type[nn.Module], options: dict[str, Any], layers: int, batch_first: bool
) -> None:
    """With the fp32 recipe, values, final states and all gradients are the plain layer's."""
    layer = kind(5, 4, layers, batch_first=batch_first, **options).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    state = _state_of(layer, 3 if batch_first else 2)
    expected = _everything(layer, x, state)

    lowbit.convert_(layer, "fp32")
    actual = _everything(layer, x, state)

    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), [(nn.LSTM, {}), (nn.GRU, {}), *VARIANTS], ids=str)
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_packed_sequence_equals_the_plain_layer(
    kind: type[nn.Module], options: dict[str, Any], states: bool, is_sorted: bool
) -> None:
    """Samples of 5, 3, 3 and 1 steps in either order: the outputs, the states of each sample's own end, gradients."""
    layer = kind(5, 4, 2, **options).double()
    lengths = [5, 3, 3, 1] if is_sorted else [3, 1, 5, 3]
    xs = [torch.randn(length, 5, dtype=torch.float64, requires_grad=True) for length in lengths]
    state = _state_of(layer, 4) if states else None

    def run() -> list[Tensor]:
        y, last = layer(pack_sequence(xs, enforce_sorted=is_sorted), state)
        padded, counts = pad_packed_sequence(y)
        assert counts.tolist() == lengths
        results = [padded, *(last if isinstance(last, tuple) else [last])]
        loss = sum((i + 1) * r.square().sum() for i, r in enumerate(results))
        return [*(r.detach() for r in results), *torch.autograd.grad(loss, [*xs, *layer.parameters()])]

    expected = run()
    lowbit.convert_(layer, "fp32")

    for a, e in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)
def test_every_product_of_a_variant_is_quantised(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Each weight has a site that ran in 8 bits, packed or not, and the output is near the plain one."""
    layer, xs = kind(16, 8, 2, **options), [torch.randn(n, 16) for n in (6, 4, 4)]
    plain = layer(pack_sequence(xs))[0].data.detach()
    lowbit.convert_(layer, "int8")

    with lowbit.verify(layer) as proof:
        y = layer(pack_sequence(xs))[0].data
        y.sum().backward()

    rows = {row.layer: row for row in proof.rows if row.product == "output"}
    assert set(rows) == {name for name, p in layer.named_parameters() if p.dim() == 2}
    assert all(operand.bits == 8 for row in rows.values() for operand in row.operands.values())
    assert 0 < (y.detach() - plain).norm() < 0.05 * plain.norm()


class _Loop(nn.Module):
    """A cell over all steps of a sequence; the last h."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, xs: Tensor) -> Tensor:
        """(T, B, I) or (T, I) to (B, H) or (H,)."""
        state = None
        for x in xs:
            state = self.cell(x, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_equal_the_plain_cells(kind: type[nn.Module], batched: bool, bias: bool) -> None:
    """Three steps from no state, with gradients, in the fp32 recipe; in `int8` near them, each with its own noise."""
    cell = kind(5, 4, bias=bias)
    loop = _Loop(cell)
    xs = torch.randn(3, 2, 5) if batched else torch.randn(3, 5)

    def run() -> list[Tensor]:
        h = loop(xs)
        return [h.detach(), *torch.autograd.grad(h.square().sum(), list(cell.parameters()))]

    expected = run()
    lowbit.convert_(loop, "fp32")
    for a, e in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, e)
    lowbit.restore_(loop)
    lowbit.convert_(loop, "int8")
    for a, e in zip(run(), expected, strict=True):
        assert not torch.equal(a, e)
        assert (a - e).norm() < 0.1 * e.norm()
    assert [site.uses for site in cell.sites()] == [3, 3]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_give_the_plain_cells_dtype_under_autocast(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """In bf16 autocast the new state has the dtype of the plain cell's, for float32 and bfloat16 inputs."""
    cell, x = kind(5, 4), torch.randn(2, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = cell(x)
        lowbit.convert_(cell, "int8")
        actual = cell(x)

    dtypes = [[t.dtype for t in (r if isinstance(r, tuple) else (r,))] for r in (actual, expected)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_cell_refuses_a_state_of_wrong_shape(kind: type[nn.Module]) -> None:
    """A state of another batch, or an input of three axes, raises a ValueError with the shapes."""
    cell = kind(5, 4)
    lowbit.convert_(cell, "int8")
    h = torch.zeros(3, 4)

    with pytest.raises(ValueError, match=r"state of shape \(3, 4\); expected \(2, 4\)"):
        cell(torch.randn(2, 5), (h, h) if kind is nn.LSTMCell else h)
    with pytest.raises(ValueError, match=r"expected \(B, I\) or \(I,\)"):
        cell(torch.randn(2, 2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_wrong_shape_is_refused(kind: type[nn.Module]) -> None:
    """An initial state of another batch raises a ValueError with both shapes."""
    layer = kind(5, 4)
    lowbit.convert_(layer, "sbm8")
    h = torch.zeros(1, 3, 4)

    with pytest.raises(ValueError, match=r"\(1, 3, 4\); \(layers, B, H\) is \(1, 2, 4\)"):
        layer(torch.randn(6, 2, 5), (h, h) if kind is nn.LSTM else h)


class _LastState(nn.Module):
    """A cell that a forward runs for each time step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The head of the last state."""
        h = None
        for each in x.unbind(1):
            h = self.cell(each, h)
        return self.head(h)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loop_over_a_cell_is_one_step() -> None:
    """A cell breaks the graph of a compiled model at each time step: its gradients are those of the eager model."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = _LastState()
        lowbit.convert_(model, "int8", engine="reference")
        run = torch.compile(model, backend="eager") if compiled else model
        run(torch.randn(3, 4, 4)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
