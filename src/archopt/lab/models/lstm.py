"""A language model on torch's LSTM."""

from torch import Tensor, nn


class LSTM(nn.Module):
    """Token embedding, `depth` stacked LSTMs of the same width, a head. Torch's initial weights.

    Input (batch, length) int64; output (batch, length, vocabulary): logits of the next token at each place. Every
    row starts from the zero state.
    """

    def __init__(self, vocabulary: int, width: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        # Between the layers; torch warns where there is one alone.
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.tokens(tokens))[0])
        return logits
