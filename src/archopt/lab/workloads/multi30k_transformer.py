"""multi30k-transformer, or wmt16: translation from German to English (Nero, arXiv:2102.07227, figure 8).

The figure is called "WMT16 En-De", but the authors' commands train on Multi30k, German to English; hence two names
for one workload.
Data: Multi30k, 29,000 pairs of sentences to train on, 1,014 to validate on. Words are spaCy's (`pip install
'archopt[translation]'`), in lower case; `<unk>` for those seen less than three times in the training sentences of
their language; one vocabulary of 9,521 words for both. Batches of 128 pairs, shuffled, padded to their longest:
227 steps an epoch.
Model: 6 + 6 layers, width 512, MLP 2,048, 8 heads, ReLU, dropout 0.1, normalisation without weights behind each
branch and behind the embedding with its sinusoids; one tensor for the words of both languages and the head.
44,070,912 + 512 x 9,521 = 48,945,664 parameters in 121 tensors.
Loss: cross-entropy with the true word at 0.9 and each other at 0.1 / (words - 1), summed over the words of a batch,
not averaged (so a good rate of SGD is tiny). 100 epochs; in the e-th of E the rate is multiplied by
2 min(e, E - e) / E: up to 1 at half time, down to 0, at which the last epoch runs. Rules without a rate follow no
schedule.
Metric: validation perplexity without smoothing, after the last epoch; also `train_perplexity`, that of the smoothed
loss over the batches of the epoch, each scored before its update. The paper's (seeds 0, 1, 2, mean and population
deviation): Nero 0.001: 11.35 +- 1.20; Adam 0.0001: 12.63 +- 0.34; LAMB 0.01: 16.36 +- 0.29; SGD 0.0001: 92 +- 89.

Presets: `paper` is the above, for a GPU. `small` has 2 + 2 layers, width 64, MLP 256, 4 heads and trains 16 epochs
on the first 3,000 pairs in batches of 32; the vocabulary is made of those pairs, and 500 pairs validate: 1,504
steps. It wants larger rates than the published ones: 0.01 for Nero, 0.001 for Adam. `smoke` has 1 + 1
layers of width 16 and takes 3 epochs of 128 pairs in batches of 32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from archopt.lab.data import DataFolder, load_multi30k
from archopt.lab.data.multi30k import PADDING
from archopt.lab.models.translator import Translator
from archopt.lab.workload import Metric
from archopt.lab.workloads.language import Running, check_vocabulary, perplexity, vocabulary_state
from archopt.lab.workloads.supervised import Supervised, check_positive

CONTEXT = 200  # rows of the table of positions
SMOOTHING = 0.1
EVALUATION_PAIRS = 128  # scored at once; bounds memory, does not change the result


def padded(sentences: list[list[int]]) -> Tensor:
    """Sentences as rows, padding behind the shorter ones: (sentences, length of the longest) int64."""
    return pad_sequence([torch.tensor(words) for words in sentences], batch_first=True, padding_value=PADDING)


def trimmed(sentences: Tensor) -> Tensor:
    """The same without the columns that hold padding alone."""
    return sentences[:, : int((sentences != PADDING).sum(1).max())]


def summed_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy, summed over all targets that are no padding.

    The true word counts 1 - smoothing, each other smoothing / (words - 1). logits (..., words), targets (...).
    """
    words = logits.shape[-1]
    # torch's smoothing gives the true word a share too; this much of it leaves the shares above.
    spread = smoothing * words / (words - 1)
    return F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=PADDING,
        reduction="sum",
        label_smoothing=spread,
    )


@dataclass
class Multi30kTransformer(Supervised):
    """A transformer that translates Multi30k (see the module's text)."""

    name = "multi30k-transformer"
    summary = "transformer, German to English on Multi30k (Nero paper, figure 8); also called wmt16"
    metric = Metric("val_perplexity", "validation perplexity", higher_is_better=False)
    presets = {
        "paper": {},
        "small": {
            "train_pairs": 3_000,
            "validation_pairs": 500,
            "width": 64,
            "inner": 256,
            "heads": 4,
            "depth": 2,
            "batch_size": 32,
            "epochs": 16,
        },
        "smoke": {
            "train_pairs": 128,
            "validation_pairs": 32,
            "width": 16,
            "inner": 32,
            "heads": 2,
            "depth": 1,
            "batch_size": 32,
            "epochs": 3,
        },
    }
    settings = {
        "nero": {"lr": 1e-3},
        "sgd": {"lr": 1e-4},
        "adam": {"lr": 1e-4, "betas": (0.0, 0.999)},
        "lamb": {"lr": 1e-2, "betas": (0.0, 0.999)},
    }

    epochs: int = 100
    batch_size: int = 128
    width: int = 512
    inner: int = 2048
    heads: int = 8
    depth: int = 6
    dropout: float = 0.1
    train_pairs: int | None = None
    """None: all there are."""
    validation_pairs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "width", "inner", "heads", "depth")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}, expected 0 to below 1")
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width={self.width}, heads={self.heads}: the width must be even and a multiple of the heads"
            )
        for option in ("train_pairs", "validation_pairs"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{option}={value}, expected at least 1")

    def load(self, data: DataFolder) -> None:
        pairs = load_multi30k(data, self.train_pairs, self.validation_pairs)
        self.words = pairs.vocabulary
        self.hold(
            (padded(pairs.train_german), padded(pairs.train_english)),
            (padded(pairs.validation_german), padded(pairs.validation_english)),
        )

    def build(self) -> nn.Module:
        self._running = Running()
        return Translator(
            len(self.words),
            CONTEXT,
            self.width,
            self.heads,
            self.inner,
            self.depth,
            self.dropout,
            PADDING,
        )

    def schedule(self, step: int) -> float:
        epoch = 1 + step // self.steps_per_epoch
        return 2 * min(epoch, self.epochs - epoch) / self.epochs

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        german, english = super().batch(step, seed)
        return trimmed(german), trimmed(english)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        german, english = batch
        following = english[:, 1:]
        loss = summed_loss(model(german, english[:, :-1]), following, SMOOTHING)
        self._running.add(loss, (following != PADDING).sum())
        return loss, {}

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """`val_loss` (nats a word) and `val_perplexity`; after training also `train_perplexity`."""
        found = {"train_perplexity": self._running.take()} if self._running.tokens else {}
        total, words = 0.0, 0
        for german, english in zip(
            torch.split(self.test_inputs, EVALUATION_PAIRS), torch.split(self.test_targets, EVALUATION_PAIRS)
        ):
            german, english = trimmed(german), trimmed(english)
            following = english[:, 1:]
            total += float(summed_loss(models["model"](german, english[:, :-1]).float(), following, 0.0))
            words += int((following != PADDING).sum())
        loss = total / words
        return {"val_loss": loss, "val_perplexity": perplexity(loss), **found}

    def state_dict(self) -> dict[str, Any]:
        return {"vocabulary": vocabulary_state(self.words), "running": self._running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_vocabulary(self.name, self.words, state["vocabulary"])
        self._running = Running(**state["running"])
