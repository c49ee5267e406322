"""Quantised LSTM and GRU: the input and the recurrent product of each layer in the formats of a recipe.

Notation: T time steps, B samples, I inputs, H hidden units, x ``(B, T, I)``, h ``(B, H)``. The input product of all
time steps is one product ``(B, T, I) x (I, gates H)``; the recurrent product runs once per step. Gates and
element-wise operations stay in the dtype of the input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowbit.methods.recipe import Recipe
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


class _QuantRecurrent(SeveralProducts, nn.RNNBase):
    """What LSTM and GRU share: one direction and any number of layers, without projections or packed sequences."""

    is_seen_in_calls = False  # one function runs the whole sequence

    @classmethod
    def refusal(cls, layer: Any, recipe: Recipe) -> str:
        """Two directions and projections are refused."""
        if why := super().refusal(layer, recipe):
            return why
        if layer.bidirectional:
            return "only one direction has a quantised form"
        return "projections (proj_size) have no quantised form" if layer.proj_size else ""

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """I."""
        return int(layer.input_size)

    @property
    def sample_axis(self) -> int:
        """The first axis, or the second, after time steps."""
        return 0 if self.batch_first else 1

    def site_names(self) -> list[str]:
        """The weights of each layer: input, recurrent."""
        return [f"weight_{kind}_l{layer}" for layer in range(self.num_layers) for kind in ("ih", "hh")]

    def _product(self, kind: str, layer: int, x: Tensor) -> Tensor:
        weight = f"weight_{kind}_l{layer}"
        bias = getattr(self, f"bias_{kind}_l{layer}") if self.bias else None
        return self.product(weight, x, getattr(self, weight), bias)

    def _batch_first(self, x: Tensor) -> Tensor:
        """The input as (B, T, I); a packed sequence is refused by name."""
        if isinstance(x, PackedSequence):
            raise TypeError(
                f"{self.sites()[0].name}: a quantised {type(self).__name__[5:]} takes padded tensors, not a "
                "PackedSequence: pass the padded batch, or leave this layer out with a rule"
            )
        if x.dim() not in (2, 3) or x.shape[0 if x.dim() == 2 or not self.batch_first else 1] == 0:
            raise ValueError(
                f"{self.sites()[0].name}: input of shape {tuple(x.shape)}; expected one or more time steps of "
                "(T, I), (T, B, I), or (B, T, I) with batch_first"
            )
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _restore_layout(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, T, H) in the layout of the caller's input, contiguous as in the plain layer."""
        if x.dim() == 2:
            return y.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1).contiguous()

    def _initial(self, state: Tensor | None, x: Tensor, unbatched: bool) -> Tensor:
        """A given state as (layers, B, H), or zeros."""
        if state is None:
            return x.new_zeros(self.num_layers, x.shape[0], self.hidden_size)
        state = state.unsqueeze(1) if unbatched else state
        expected = (self.num_layers, x.shape[0], self.hidden_size)
        if tuple(state.shape) != expected:
            raise ValueError(
                f"{self.sites()[0].name}: initial state of shape {tuple(state.shape)}; (layers, B, H) is {expected}"
            )
        return state

    def _between_layers(self, x: Tensor, layer: int) -> Tensor:
        """Dropout after every layer but the last."""
        return F.dropout(x, self.dropout, self.training) if self.dropout and layer < self.num_layers - 1 else x


class QuantLSTM(_QuantRecurrent, nn.LSTM):
    """`torch.nn.LSTM`, one direction, with its input and recurrent products in the formats of a recipe."""

    plain = nn.LSTM

    @runs_eagerly
    def forward(  # type: ignore[override]  # torch's is an overload that also takes packed sequences
        self,
        input: Tensor,  # noqa: A002 - the plain layer's argument
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `torch.nn.LSTM.forward` for padded tensors: output, (last h, last c)."""
        x = self._batch_first(input)
        unbatched = input.dim() == 2
        h_0 = self._initial(None if hx is None else hx[0], x, unbatched)
        c_0 = self._initial(None if hx is None else hx[1], x, unbatched)
        last: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            x_gates = self._product("ih", layer, x)
            h, c, outputs = h_0[layer].to(x_gates.dtype), c_0[layer].to(x_gates.dtype), []
            for t in range(x.shape[1]):
                h, c = lstm_cell(x_gates[:, t], self._product("hh", layer, h), c)
                outputs.append(h)
            last.append((h, c))
            x = self._between_layers(torch.stack(outputs, 1), layer)
        h_n, c_n = (torch.stack(states) for states in zip(*last, strict=True))
        if unbatched:
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return self._restore_layout(x, input), (h_n, c_n)


class QuantGRU(_QuantRecurrent, nn.GRU):
    """`torch.nn.GRU`, one direction, with its input and recurrent products in the formats of a recipe."""

    plain = nn.GRU

    @runs_eagerly
    def forward(  # type: ignore[override]  # torch's is an overload that also takes packed sequences
        self,
        input: Tensor,  # noqa: A002 - the plain layer's argument
        hx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `torch.nn.GRU.forward` for padded tensors: output, last h."""
        x = self._batch_first(input)
        unbatched = input.dim() == 2
        h_0 = self._initial(hx, x, unbatched)
        last: list[Tensor] = []
        for layer in range(self.num_layers):
            x_gates = self._product("ih", layer, x)
            # Under autocast h stays in float32, as in the plain layer.
            h, outputs = h_0[layer], []
            for t in range(x.shape[1]):
                h = gru_cell(x_gates[:, t], self._product("hh", layer, h), h)
                outputs.append(h)
            last.append(h)
            x = self._between_layers(torch.stack(outputs, 1), layer)
        h_n = torch.stack(last)
        return self._restore_layout(x, input), h_n.squeeze(1) if unbatched else h_n
