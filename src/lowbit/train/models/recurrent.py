"""An LSTM over text.

Notation: B batch, T positions of a text, V bytes in the vocabulary.
"""

from typing import cast

from torch import Tensor, nn


class LSTM(nn.Module):
    """Embedding, `layers` of LSTM, linear head.

    Args:
        vocabulary: V, tokens and outputs.
        embedding: width of a token.
        width: hidden units of each layer.
        layers: LSTM layers.
    """

    def __init__(self, *, vocabulary: int = 256, embedding: int = 128, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T) int64 to the logits of the next token (B, T, V); each row starts at state 0."""
        return cast(Tensor, self.head(self.lstm(self.tokens(x))[0]))
