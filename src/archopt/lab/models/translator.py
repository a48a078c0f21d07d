"""The translating transformer of Nero's paper (arXiv:2102.07227, figure 8), after A. Vaswani et al. 2017."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab.models.positions import sinusoids

EPSILON = 1e-6  # of the normalisations, which have no weights


class Attention(nn.Module):
    """Attention of several heads, four projections without biases; dropout on attention weights.

    Input `x` (batch, m, width) asks, `memory` (batch, n, width) answers; output as `x`. `see`, broadcast to
    (batch, heads, m, n), is True where a place may look.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, see: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(memory), self.value(memory))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, see, dropout)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Self-attention, in a decoder (`cross`) attention to the source, then a ReLU MLP.

    Each is followed by dropout, the sum with what went in, and a normalisation without weights.
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout) if cross else None
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, EPSILON, elementwise_affine=False)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, see: Tensor, memory: Tensor | None = None, see_memory: Tensor | None = None
    ) -> Tensor:
        x = self.norm(x + self.drop(self.attention(x, x, see)))
        if self.cross is not None:
            x = self.norm(x + self.drop(self.cross(x, memory, see_memory)))
        out: Tensor = self.norm(x + self.drop(self.down(F.relu(self.up(x)))))
        return out


class Translator(nn.Module):
    """Encoder and decoder of `depth` layers; one tensor is the words of both languages and the head.

    Inputs `source` (batch, m) and `target` (batch, n) int64, lengths up to `context`, `padding` behind the
    shorter sentences; output (batch, n, words): logits of the word after each of the target. No place sees padding,
    and none of the target what comes after it. All matrices start Xavier-uniform, the words' with padding's row.
    """

    positions: Tensor
    causal: Tensor

    def __init__(
        self,
        words: int,
        context: int,
        width: int,
        heads: int,
        inner: int,
        depth: int,
        dropout: float,
        padding: int,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.words = nn.Embedding(words, width, padding_idx=padding)
        self.encoder = nn.ModuleList(Layer(width, heads, inner, dropout, False) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(width, heads, inner, dropout, True) for _ in range(depth))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        self.norm = nn.LayerNorm(width, EPSILON, elementwise_affine=False)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(context, width), persistent=False)
        self.register_buffer("causal", torch.ones(context, context).tril().bool(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def placed(self, words: Tensor) -> Tensor:
        """Embeddings with their positions, dropped out, then normalised: (batch, length, width)."""
        placed: Tensor = self.norm(self.drop(self.words(words) + self.positions[: words.shape[1]]))
        return placed

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        see_source, see_target = ((words != self.padding)[:, None, None, :] for words in (source, target))
        see_target = see_target & self.causal[: target.shape[1], : target.shape[1]]
        memory = self.placed(source)
        for layer in self.encoder:
            memory = layer(memory, see_source)
        x = self.placed(target)
        for layer in self.decoder:
            x = layer(x, see_target, memory, see_source)
        logits: Tensor = self.head(x)
        return logits
