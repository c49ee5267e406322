"""Quantised LSTM and GRU, and their cells: the input and the recurrent product in the formats of a recipe.

Notation: T time steps, B samples, I inputs, H hidden units, P the size of h, which is H but where an LSTM projects it,
x ``(B, T, I)``, h ``(B, P)``, c ``(B, H)``. The input product of all time steps is one product
``(B, T, I) x (I, gates H)``; the recurrent product, and the projection, run once per step. Gates and element-wise
operations stay in the dtype of the input. A packed sequence is the rows ``(N, I)`` of all steps one after the other;
step t has the first ``sizes[t]`` samples.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowbit import functional
from lowbit.nn.layers import SeveralProducts
from lowbit.nn.site import runs_eagerly


def lstm_cell(x_gates: Tensor, h_gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step from its pre-activations ``(B, 4 H)`` in the order i, f, g, o: the new h and c, ``(B, H)`` each."""
    i, f, g, o = (x_gates + h_gates).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(x_gates: Tensor, h_gates: Tensor, h: Tensor) -> Tensor:
    """One GRU step from its pre-activations ``(B, 3 H)`` in the order r, z, n: the new h, ``(B, H)``."""
    x_r, x_z, x_n = x_gates.chunk(3, -1)
    h_r, h_z, h_n = h_gates.chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n)


# The tensors of a state: h, and with LSTM c.
_State = tuple[Tensor, ...]


class _Steps(SeveralProducts):
    """What layers and cells share."""

    is_seen_in_calls = False  # one function runs the whole sequence

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """I."""
        return int(layer.input_size)

    def _step(self, x_gates: Tensor, h_gates: Tensor, state: _State) -> _State:
        """One step from its pre-activations."""
        raise NotImplementedError

    def _begin(self, state: _State, x_gates: Tensor) -> _State:  # noqa: ARG002 - as it is
        """The initial state in the dtype in which it is kept."""
        return state

    def _multiply(self, kind: str, end: str, x: Tensor) -> Tensor:
        bias = getattr(self, f"bias_{kind}{end}") if self.bias and kind != "hr" else None
        weight = f"weight_{kind}{end}"
        # In a compiled model, too, this runs eagerly, and its operators alone would not say that a forward runs.
        setting = self._site(weight).setting_now(x, compiled=self.training)
        return functional.linear(x, getattr(self, weight), bias, setting=setting)


class _LSTMSteps(_Steps):
    def _step(self, x_gates: Tensor, h_gates: Tensor, state: _State) -> _State:
        return lstm_cell(x_gates, h_gates, state[1])

    def _begin(self, state: _State, x_gates: Tensor) -> _State:
        return tuple(each.to(x_gates.dtype) for each in state)


class _GRUSteps(_Steps):
    def _step(self, x_gates: Tensor, h_gates: Tensor, state: _State) -> _State:
        # Under autocast h stays in float32, as in the plain layer.
        return (gru_cell(x_gates, h_gates, state[0]),)


class _QuantRecurrent(_Steps, nn.RNNBase):
    """What the layers share: any number of layers, one direction or two, padded tensors or packed sequences."""

    @property
    def sample_axis(self) -> int:
        """The first axis, or the second, after time steps."""
        return 0 if self.batch_first else 1

    def _ends(self) -> list[list[str]]:
        """How the names of the parameters end: for each layer a name for each direction."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [[f"_l{layer}{direction}" for direction in directions] for layer in range(self.num_layers)]

    def site_names(self) -> list[str]:
        """The weights of each layer and direction: input, recurrent, and of the projection if there is one."""
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        return [f"weight_{kind}{end}" for ends in self._ends() for end in ends for kind in kinds]

    def _batch_first(self, x: Tensor) -> Tensor:
        """The input as (B, T, I)."""
        if x.dim() not in (2, 3) or x.shape[0 if x.dim() == 2 or not self.batch_first else 1] == 0:
            raise ValueError(
                f"{self.sites()[0].name}: input of shape {tuple(x.shape)}; expected one or more time steps of "
                "(T, I), (T, B, I), or (B, T, I) with batch_first"
            )
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _restore_layout(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, T, P) in the layout of the caller's input, contiguous as in the plain layer."""
        if x.dim() == 2:
            return y.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1).contiguous()

    def _initial(self, given: _State | None, x: Tensor, samples: int, unbatched: bool) -> _State:
        """A given state, or zeros: (layers and directions, B, P), and with LSTM (.., B, H)."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        if given is None:
            return tuple(x.new_zeros(layers, samples, width) for width in widths)
        given = tuple(each.unsqueeze(1) if unbatched else each for each in given)
        for each, width in zip(given, widths, strict=True):
            expected = (layers, samples, width)
            if tuple(each.shape) != expected:
                raise ValueError(
                    f"{self.sites()[0].name}: initial state of shape {tuple(each.shape)}; (layers, B, H) is {expected}"
                )
        return given

    def _direction(self, x: Tensor, end: str, state: _State, sizes: Sequence[int] | None) -> tuple[Tensor, _State]:
        """The outputs of one direction of one layer, in the order of its input, and the last state."""
        x_gates = self._multiply("ih", end, x)
        state = self._begin(state, x_gates)
        samples, outputs = len(state[0]), []
        steps = x_gates.unbind(1) if sizes is None else x_gates.split(list(sizes))
        backwards = end.endswith("_reverse")
        for gates in reversed(steps) if backwards else steps:
            # Samples that are over keep their state, and those that have not begun backwards the initial one.
            rows = len(gates)
            now = state if rows == samples else tuple(each[:rows] for each in state)
            new = self._step(gates, self._multiply("hh", end, now[0]), now)
            if self.proj_size:
                new = (self._multiply("hr", end, new[0]), *new[1:])
            outputs.append(new[0])
            pairs = zip(new, state, strict=True)
            state = new if rows == samples else tuple(torch.cat([a, b[rows:]]) for a, b in pairs)
        outputs = outputs[::-1] if backwards else outputs
        return torch.stack(outputs, 1) if sizes is None else torch.cat(outputs), state

    def _run(self, input: Tensor | PackedSequence, given: _State | None) -> tuple[Any, _State]:  # noqa: A002
        """The output in the form of the input, and the last state."""
        packed = input if isinstance(input, PackedSequence) else None
        if packed is None:
            x, sizes = self._batch_first(cast(Tensor, input)), None
            unbatched = cast(Tensor, input).dim() == 2
            state = self._initial(given, x, len(x), unbatched)
        else:
            x, sizes, unbatched = packed.data, packed.batch_sizes.tolist(), False
            state = _picked(self._initial(given, x, sizes[0], unbatched), packed.sorted_indices)
        last: list[_State] = []
        for layer, ends in enumerate(self._ends()):
            runs = []
            for end in ends:
                runs.append(self._direction(x, end, tuple(each[len(last)] for each in state), sizes))
                last.append(runs[-1][1])
            x = torch.cat([y for y, _ in runs], -1) if len(runs) > 1 else runs[0][0]
            if self.dropout and layer < self.num_layers - 1:  # after every layer but the last
                x = F.dropout(x, self.dropout, self.training)
        state = tuple(torch.stack(states) for states in zip(*last, strict=True))
        if packed is not None:
            rest = (packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return PackedSequence(x, *rest), _picked(state, packed.unsorted_indices)
        state = tuple(each.squeeze(1) for each in state) if unbatched else state
        return self._restore_layout(x, cast(Tensor, input)), state


def _picked(state: _State, samples: Tensor | None) -> _State:
    """The states of samples in another order."""
    return state if samples is None else tuple(each.index_select(1, samples) for each in state)


class QuantLSTM(_QuantRecurrent, _LSTMSteps, nn.LSTM):
    """`torch.nn.LSTM` with its input and recurrent products, and its projections, in the formats of a recipe."""

    plain = nn.LSTM

    @runs_eagerly
    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002 - the plain layer's argument
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """As `torch.nn.LSTM.forward`: output, (last h, last c)."""
        output, (h, c) = self._run(input, hx)
        return output, (h, c)


class QuantGRU(_QuantRecurrent, _GRUSteps, nn.GRU):
    """`torch.nn.GRU` with its input and recurrent products in the formats of a recipe."""

    plain = nn.GRU

    @runs_eagerly
    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002 - the plain layer's argument
        hx: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """As `torch.nn.GRU.forward`: output, last h."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h


class _QuantCell(_Steps, nn.RNNCellBase):
    """What the cells share: one time step, whose loop is the caller's."""

    def site_names(self) -> list[str]:
        """The two weights."""
        return ["weight_ih", "weight_hh"]

    def _run(self, x: Tensor, given: _State | None, states: int) -> _State:
        """The state after a step of x ``(B, I)`` or ``(I,)``."""
        if x.dim() not in (1, 2):
            raise ValueError(f"{self.sites()[0].name}: input of shape {tuple(x.shape)}; expected (B, I) or (I,)")
        shape = (*x.shape[:-1], self.hidden_size)
        state = tuple(x.new_zeros(shape) for _ in range(states)) if given is None else given
        for each in state:
            if tuple(each.shape) != shape:
                raise ValueError(f"{self.sites()[0].name}: state of shape {tuple(each.shape)}; expected {shape}")
        rows = tuple(each.view(-1, self.hidden_size) for each in state)
        x_gates = self._multiply("ih", "", x.view(-1, x.shape[-1]))
        new = self._step(x_gates, self._multiply("hh", "", rows[0]), rows)
        return tuple(each.view(shape) for each in new)


class QuantLSTMCell(_QuantCell, _LSTMSteps, nn.LSTMCell):
    """`torch.nn.LSTMCell` with its two products in the formats of a recipe."""

    plain = nn.LSTMCell

    @runs_eagerly
    def forward(
        self,
        input: Tensor,  # noqa: A002 - the plain layer's argument
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `torch.nn.LSTMCell.forward`: the new h and c."""
        h, c = self._run(input, hx, 2)
        return h, c


class QuantGRUCell(_QuantCell, _GRUSteps, nn.GRUCell):
    """`torch.nn.GRUCell` with its two products in the formats of a recipe."""

    plain = nn.GRUCell

    @runs_eagerly
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002 - the plain layer's argument
        """As `torch.nn.GRUCell.forward`: the new h."""
        return self._run(input, None if hx is None else (hx,), 1)[0]
