"""shakespeare-lstm: a two-layer LSTM on the characters of tiny Shakespeare.

Data, batches, schedule and metric as in shakespeare-gpt: windows of 64 characters, each from the zero state.
Model: token embedding, two stacked LSTMs, a linear head; width 96; torch's initial weights. 161,537 parameters.
Loss: mean cross-entropy, 1,000 steps of batches of 16.

Presets: `paper` and `small` are the same (no paper used this); `smoke` takes 20 steps of 4 windows of 16 characters
at width 16.
"""

from dataclasses import dataclass

from torch import nn

from archopt.lab.models.lstm import LSTM
from archopt.lab.workloads.shakespeare import VOCABULARY, Shakespeare


@dataclass
class ShakespeareLSTM(Shakespeare):
    """A two-layer LSTM on tiny Shakespeare (see the module's text)."""

    name = "shakespeare-lstm"
    summary = "two-layer LSTM on the characters of tiny Shakespeare; --lr-schedule linear or constant"
    presets = {
        "paper": {},
        "small": {},
        "smoke": {"width": 16, "context": 16, "batch_size": 4, "steps": 20, "eval_every": 10},
    }

    width: int = 96

    def build(self) -> nn.Module:
        return LSTM(VOCABULARY, self.width, self.depth, self.dropout)
