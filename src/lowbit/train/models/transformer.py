"""A decoder of text, as GPT-2 is.

Notation: B batch, T positions of a text, V bytes in the vocabulary.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import UsageError


class Attention(nn.Module):
    """Causal self-attention with one fused projection of query, key and value."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.projection = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d); position t sees the positions up to t."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.projection(y.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-LayerNorm block: ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))`` with GELU and 4d units."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        x = x + self.attention(self.norm1(x))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A decoder with learned positions and a head of its own weights.

    Weights are drawn from N(0, 0.02²), those of the two projections that write to the residual stream
    from N(0, 0.02²/(2·layers)); biases start at 0.

    Args:
        vocabulary: V, tokens and outputs.
        d: width of the residual stream, a multiple of `heads`.
        layers: blocks.
        heads: attention heads.
        context: the most positions in one input.

    Raises:
        UsageError: `d` is not a multiple of `heads`; an input is longer than `context`.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3,
    except for the untied head.
    """

    def __init__(
        self, *, vocabulary: int = 256, d: int = 128, layers: int = 4, heads: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        if d % heads:
            raise UsageError(f"GPT needs d a multiple of heads, given d={d} and heads={heads}.")
        self.context = context
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(TransformerBlock(d, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("attention.projection", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T) int64 to the logits of the next token (B, T, V)."""
        length = x.shape[1]
        if length > self.context:
            raise UsageError(
                f"this GPT takes {self.context} positions, given {length}: build it with context={length}."
            )
        y = self.tokens(x) + self.positions(torch.arange(length, dtype=torch.int64, device=x.device))
        return cast(Tensor, self.head(self.norm(self.blocks(y))))
