"""shakespeare-gpt: a small GPT on the characters of tiny Shakespeare.

Data: tiny Shakespeare, 65 different characters; the first 90 % to train on, the rest to validate on. Batches of 16
windows of 64 characters, drawn with replacement.
Model: tokens and learned positions, 2 blocks (LayerNorm first, causal attention with 4 heads, query, key and value
in one projection; GELU MLP four times as wide), LayerNorm, a head of its own; width 64, biases everywhere. Torch's
initial weights, but token embeddings with a standard deviation of 0.5.
Loss: mean cross-entropy, 1,000 steps. The rate rises over 30 steps and falls linearly towards 0; with
`--lr-schedule constant` it does not. Rules without a rate follow no schedule.
Metric: validation loss over 81,920 characters, nats a character; also in bits, and the accuracy.

Presets: `small` is the above, 112,577 parameters. `paper` is no paper's but the larger standard size, that of
nanoGPT's example on characters: 6 blocks, width 384, 6 heads, windows of 256, batches of 64, dropout 0.2, 5,000
steps with a warm-up of 100 (then a linear fall where nanoGPT has a cosine); for a GPU. `smoke` takes 20 steps
of 4 windows of 16 characters in one block of width 16.
"""

from dataclasses import dataclass

from torch import nn

from archopt.lab.models.gpt import GPT
from archopt.lab.workloads.shakespeare import VOCABULARY, Shakespeare
from archopt.lab.workloads.supervised import check_positive


@dataclass
class ShakespeareGPT(Shakespeare):
    """A small GPT on tiny Shakespeare (see the module's text)."""

    name = "shakespeare-gpt"
    summary = "small GPT on the characters of tiny Shakespeare; --lr-schedule linear or constant"
    presets = {
        "paper": {
            "width": 384,
            "depth": 6,
            "heads": 6,
            "context": 256,
            "batch_size": 64,
            "dropout": 0.2,
            "steps": 5000,
            "warmup": 100,
            "eval_every": 250,
        },
        "small": {},
        "smoke": {"width": 16, "depth": 1, "context": 16, "batch_size": 4, "steps": 20, "eval_every": 10},
    }

    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "heads")
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width}, heads={self.heads}: the width must be a multiple of the heads"
            )

    def build(self) -> nn.Module:
        return GPT(VOCABULARY, self.context, self.width, self.depth, self.heads, self.dropout)
