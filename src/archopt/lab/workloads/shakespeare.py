"""Tiny Shakespeare as both of its workloads take it: windows of characters, judged by the validation loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab import seeds
from archopt.lab.data import DataFolder, load_tinyshakespeare
from archopt.lab.workload import Metric, Workload
from archopt.lab.workloads.schedules import WARMUP, Schedule, check_schedule, multiplier
from archopt.lab.workloads.supervised import accuracy, check_positive

VOCABULARY = 65
EVALUATION_CHARACTERS = 81_920  # of the 111,540 to validate on; 1,280 windows of 64
EVALUATION_ROWS = 8_192  # characters scored at once; bounds memory, does not change the result


@dataclass
class Shakespeare(Workload):
    """Predict each next character of tiny Shakespeare from those before it in a window of `context`.

    A batch is `batch_size` windows at places drawn with replacement from the training text. The validation loss
    is the mean over the first 81,920 characters of the validation text (as many as make whole windows), cut
    into windows that do not overlap: always the same ones.
    """

    metric = Metric("val_loss", "validation loss", higher_is_better=False, unit="nats")
    lrs = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

    steps: int = 1000
    batch_size: int = 16
    context: int = 64
    width: int = 64
    depth: int = 2
    dropout: float = 0.0
    lr_schedule: Schedule = "linear"
    warmup: int = WARMUP
    eval_every: int = 100

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "context", "width", "depth", "eval_every")
        check_schedule(self.lr_schedule, self.warmup)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}, expected 0 to below 1")
        if self.context > EVALUATION_CHARACTERS:
            raise ValueError(f"context={self.context}, expected at most {EVALUATION_CHARACTERS}")

    def load(self, data: DataFolder) -> None:
        text = load_tinyshakespeare(data)
        self.text = torch.from_numpy(text.train).long()
        windows = EVALUATION_CHARACTERS // self.context
        held_out = torch.from_numpy(text.validation).long()[: windows * self.context + 1]
        self.validation = held_out[:-1].view(windows, -1), held_out[1:].view(windows, -1)

    def to(self, device: torch.device) -> None:
        inputs, targets = self.validation
        self.text, self.validation = self.text.to(device), (inputs.to(device), targets.to(device))

    @property
    def steps_per_epoch(self) -> float:
        return len(self.text) / (self.batch_size * self.context)

    def schedule(self, step: int) -> float:
        return multiplier(self.lr_schedule, step, self.steps, self.warmup)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Characters and those that follow them, both (batch_size, context) int64."""
        generator = torch.Generator().manual_seed(seeds.mix(seed, step, seeds.BATCH))
        starts = torch.randint(len(self.text) - self.context, (self.batch_size, 1), generator=generator)
        windows = self.text[(starts + torch.arange(self.context + 1)).to(self.text.device)]
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()), {}

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """`val_loss` in nats a character, `val_bits` (the same in bits) and `val_accuracy`."""
        loss, correct = torch.zeros(()), torch.zeros(())
        inputs, targets = self.validation
        rows = max(EVALUATION_ROWS // self.context, 1)
        for window, following in zip(torch.split(inputs, rows), torch.split(targets, rows)):
            logits = models["model"](window).flatten(0, 1).float()
            loss = loss + F.cross_entropy(logits, following.flatten(), reduction="sum").cpu()
            correct = correct + accuracy(logits, following.flatten()).cpu() * following.numel()
        mean = float(loss) / targets.numel()
        share = float(correct) / targets.numel()
        return {
            "val_loss": mean,
            "val_bits": mean / math.log(2),
            "val_accuracy": share if math.isfinite(mean) else math.nan,
        }
