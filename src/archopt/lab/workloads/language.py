"""What the language workloads share: perplexities, and what a run remembers beside its weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from archopt.lab.data.folder import sha256
from archopt.lab.errors import LabError


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass
class Running:
    """The loss of the training since the last evaluation, each batch scored before its update.

    Summed on the model's device, without waiting for it; in float64, so that a resumed sum is the same.
    """

    loss: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    batches: int = 0
    """Of the whole run."""

    def add(self, loss: Tensor, tokens: Tensor | int) -> None:
        """Takes in a batch: the loss summed over its tokens, and how many they are."""
        self.loss = self.loss + loss.detach().double()
        self.tokens = self.tokens + tokens
        self.batches += 1

    def take(self) -> float:
        """The perplexity since the last call; NaN where nothing was trained."""
        mean = float(self.loss) / float(self.tokens) if self.tokens else math.nan
        self.loss, self.tokens = 0.0, 0.0
        return perplexity(mean)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": float(self.loss), "tokens": float(self.tokens), "batches": self.batches}


def vocabulary_state(words: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint keeps of the vocabulary that its weights belong to."""
    return {"words": len(words), "checksum": sha256("\n".join(words).encode())}


def check_vocabulary(name: str, words: Sequence[str], kept: Mapping[str, Any]) -> None:
    """Raises LabError where a checkpoint's weights belong to another vocabulary than `words`."""
    here = vocabulary_state(words)
    if here != kept:
        raise LabError(
            f"{name}: the checkpoint belongs to a vocabulary of {kept['words']} words "
            f"({kept['checksum'][:13]}...), the data here give one of {here['words']} "
            f"({here['checksum'][:13]}...); use the data (and tokeniser) that it was made with, or delete the "
            "run's folder to start again"
        )
