"""The word-level transformer of Nero's paper on WikiText-2 (arXiv:2102.07227, figure 7)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab.models.positions import sinusoids

INITIAL_RANGE = 0.1  # of the words' weights, at both ends


class Layer(nn.Module):
    """x + attention(x), then x + mlp(x), each followed by LayerNorm where `norm` asks for it.

    Input and output (batch, length, width). Biases everywhere, ReLU; dropout on attention weights, inside the MLP
    and on both branches. `mask` is True where a place may not look.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_attention = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm_mlp = nn.LayerNorm(width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)
        x = self.norm_attention(x + self.drop(mixed))
        out: Tensor = self.norm_mlp(x + self.drop(self.down(self.drop(F.relu(self.up(x))))))
        return out


class WordTransformer(nn.Module):
    """Word embeddings times sqrt(width) plus sinusoids, dropout, `depth` causal layers, a head of its own.

    Input (batch, length) int64, length up to `context`; output (batch, length, words): logits of the next word.
    Both weights of words start uniform within +-0.1, the head's bias at 0, the layers as torch has them.
    """

    positions: Tensor
    mask: Tensor

    def __init__(
        self,
        words: int,
        context: int,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        dropout: float,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, dropout, norm) for _ in range(depth))
        self.head = nn.Linear(width, words)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(context, width), persistent=False)
        self.register_buffer("mask", torch.ones(context, context).triu(1).bool(), persistent=False)
        for weight in (self.words.weight, self.head.weight):
            nn.init.uniform_(weight, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.zeros_(self.head.bias)

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        x = self.drop(self.words(words) * math.sqrt(self.width) + self.positions[:length])
        for layer in self.layers:
            x = layer(x, self.mask[:length, :length])
        logits: Tensor = self.head(x)
        return logits
