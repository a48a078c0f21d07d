"""wikitext2-transformer: a small transformer on the words of WikiText-2 (Nero, arXiv:2102.07227, figure 7).

Data: WikiText-2, 2,088,628 words to train on, 217,646 to validate on, 245,569 to test on, 33,278 different ones
in order of appearance over all three, `<eos>` behind each line. The text is cut into 20 columns (10 for evaluation)
and these into windows of 35 words, visited in the text's order, the same in every epoch: 2,984 steps, the last with
25 words a column. Each word is predicted from those before it in its window.
Model: embedding of width 200, times sqrt(200); sinusoidal positions; dropout 0.2; 2 encoder layers (2 heads, MLP
of width 200, ReLU, dropout 0.2, causal); a head of its own. 13,826,878 parameters in 19 tensors. `--norm` puts
LayerNorm behind each branch: 13,828,478. Without is the default, since the authors' commands leave off a switch of
this name, which no released PyTorch has; which of the two was published is not known.
Loss: mean cross-entropy; gradients are clipped to norm 0.25 for SGD alone. 20 epochs; the rate is divided by 10
after the tenth. With `--lr-drop unless-best` it is divided only where the tenth epoch's validation was no new best,
as the authors' code did before its last commit; the published numbers may be of that form. Rules without a rate
follow neither.
Metric: validation perplexity, exp of the mean loss over all words of the validation text, after the last epoch; the
record has the best one too. Also `train_perplexity`, the same over the batches of the epoch, each scored before its
update with dropout on; and `test_perplexity`, of the test text with the weights whose validation was best so far
(for the average, with the best average). The paper's, mean of three seeds (which of these is not said): Nero 0.01:
172.99; Adam 0.0001: 178.05; SGD 1.0: 181.76; LAMB 0.01: 200.54.

Presets: `paper` is the above, for a GPU. `small` trains 6 epochs on the first 250,000 words, all but the 2,000
commonest of them `<unk>`, at width 64 (MLP too); the drop comes after 3; 20,000 words to validate and to test on:
2,148 steps, 307,920 parameters. Its perplexities are those of the smaller vocabulary. `smoke` takes 2 epochs of
3,500 words, 100 different ones, at width 16.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from archopt.lab.data import DataFolder, load_wikitext2
from archopt.lab.models.word_transformer import WordTransformer
from archopt.lab.workload import Metric, Workload
from archopt.lab.workloads.language import Running, check_vocabulary, perplexity, vocabulary_state
from archopt.lab.workloads.supervised import check_positive

EVALUATION_COLUMNS = 10
DROP = 0.1
UNKNOWN = "<unk>"


def columns(words: Tensor, count: int) -> Tensor:
    """A text (length,) cut into `count` pieces that follow each other, one a row: (count, length // count)."""
    length = len(words) // count
    return words[: count * length].view(count, length)


def commonest(train: NDArray[np.int32], words: int, keep: int, unknown: int) -> NDArray[np.bool_]:
    """Which of `words` words stay: `unknown`, and of the others those most frequent in `train`, `keep` together."""
    counts = np.bincount(train, minlength=words)
    counts[unknown] = len(train) + 1
    stay = np.zeros(words, bool)
    stay[np.argsort(-counts, kind="stable")[:keep]] = True
    return stay


@dataclass
class WikiText2Transformer(Workload):
    """A transformer on WikiText-2 (see the module's text)."""

    name = "wikitext2-transformer"
    summary = "transformer on the words of WikiText-2 (Nero paper, figure 7); --norm for LayerNorm"
    metric = Metric("val_perplexity", "validation perplexity", higher_is_better=False)
    presets = {
        "paper": {},
        "small": {
            "train_words": 250_000,
            "evaluation_words": 20_000,
            "vocabulary": 2_000,
            "width": 64,
            "hidden": 64,
            "epochs": 6,
            "drop_after": 3,
        },
        "smoke": {
            "train_words": 3_500,
            "evaluation_words": 1_000,
            "vocabulary": 100,
            "width": 16,
            "hidden": 16,
            "epochs": 2,
            "drop_after": 1,
        },
    }
    settings = {
        "nero": {"lr": 1e-2},
        "sgd": {"lr": 1.0, "clip_norm": 0.25},
        "adam": {"lr": 1e-4, "betas": (0.0, 0.999)},
        "lamb": {"lr": 1e-2, "betas": (0.0, 0.999)},
    }

    epochs: int = 20
    batch_size: int = 20
    """Columns of the training text."""
    context: int = 35
    width: int = 200
    heads: int = 2
    hidden: int = 200
    depth: int = 2
    dropout: float = 0.2
    norm: bool = False
    drop_after: int = 10
    """Epochs after which the rate is divided by ten."""
    lr_drop: Literal["always", "unless-best"] = "always"
    train_words: int | None = None
    """None: all there are."""
    evaluation_words: int | None = None
    vocabulary: int | None = None
    """Words that are told apart, the commonest; None: all."""

    def __post_init__(self) -> None:
        check_positive(
            self, "epochs", "batch_size", "context", "width", "heads", "hidden", "depth", "drop_after"
        )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}, expected 0 to below 1")
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width={self.width}, heads={self.heads}: the width must be even and a multiple of the heads"
            )
        if self.lr_drop not in ("always", "unless-best"):
            raise ValueError(f"lr_drop={self.lr_drop!r}, expected 'always' or 'unless-best'")
        for option, least in (
            ("train_words", 2 * self.batch_size),
            ("evaluation_words", 2 * EVALUATION_COLUMNS),
            ("vocabulary", 2),
        ):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"{option}={value}, expected at least {least}")

    def load(self, data: DataFolder) -> None:
        text = load_wikitext2(data)
        train = text.train[: self.train_words]
        held_out = text.validation[: self.evaluation_words], text.test[: self.evaluation_words]
        self.words = text.vocabulary
        if self.vocabulary is not None and self.vocabulary < len(self.words):
            unknown = self.words.index(UNKNOWN)
            stay = commonest(train, len(self.words), self.vocabulary, unknown)
            number = np.cumsum(stay, dtype=np.int32) - 1
            number[~stay] = number[unknown]
            self.words = tuple(word for word, kept in zip(self.words, stay) if kept)
            train, held_out = number[train], (number[held_out[0]], number[held_out[1]])
        self.train = columns(torch.from_numpy(train).long(), self.batch_size)
        self.validation, self.test = (
            columns(torch.from_numpy(part).long(), EVALUATION_COLUMNS) for part in held_out
        )

    def to(self, device: torch.device) -> None:
        self.train, self.validation, self.test = (
            part.to(device) for part in (self.train, self.validation, self.test)
        )

    def build(self) -> nn.Module:
        self._running = Running()
        self._best: dict[str, tuple[float, float]] = {}  # validation and test loss of the best validation
        self._dropped = False
        return WordTransformer(
            len(self.words),
            self.context,
            self.width,
            self.heads,
            self.hidden,
            self.depth,
            self.dropout,
            self.norm,
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-(self.train.shape[1] - 1) // self.context)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self.steps_per_epoch

    def schedule(self, step: int) -> float:
        if step < self.drop_after * self.steps_per_epoch:
            return 1.0
        return DROP if self.lr_drop == "always" or self._dropped else 1.0

    def window(self, text: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The words of a window and those that follow them, both (columns, up to `context`)."""
        start = index * self.context
        end = min(start + self.context, text.shape[1] - 1)
        return text[:, start:end], text[:, start + 1 : end + 1]

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """The next window of the text, whatever the seed."""
        return self.window(self.train, step % self.steps_per_epoch)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        words, following = batch
        loss = F.cross_entropy(model(words).flatten(0, 1), following.flatten())
        self._running.add(loss.detach() * following.numel(), following.numel())
        return loss, {}

    def mean_loss(self, model: nn.Module, text: Tensor) -> float:
        """Nats a word over a text in columns, window by window."""
        total = torch.zeros((), dtype=torch.float64)
        for index in range(-(-(text.shape[1] - 1) // self.context)):
            words, following = self.window(text, index)
            logits = model(words).flatten(0, 1).float()
            total += F.cross_entropy(logits, following.flatten(), reduction="sum").cpu()
        return float(total) / text[:, 1:].numel()

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """`val_loss` (nats a word), `val_perplexity`, `test_perplexity`; after training also `train_perplexity`."""
        model = models["model"]
        trained = self._running.take() if self._running.tokens else None
        loss = self.mean_loss(model, self.validation)
        found = {"val_loss": loss, "val_perplexity": perplexity(loss)}
        if self._running.batches == 0:
            return found
        # Right after training come the weights themselves; asked a second time, it is for their average.
        which = "average" if trained is None else "weights"
        best = which not in self._best or loss < self._best[which][0]
        if best:
            self._best = {**self._best, which: (loss, self.mean_loss(model, self.test))}
        found["test_perplexity"] = perplexity(self._best[which][1])
        if trained is not None:
            found["train_perplexity"] = trained
            if self._running.batches == self.drop_after * self.steps_per_epoch:
                self._dropped = not best
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "vocabulary": vocabulary_state(self.words),
            "running": self._running.state_dict(),
            "best": {which: list(losses) for which, losses in self._best.items()},
            "dropped": self._dropped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_vocabulary(self.name, self.words, state["vocabulary"])
        self._running = Running(**state["running"])
        self._best = {which: (loss, test) for which, (loss, test) in state["best"].items()}
        self._dropped = state["dropped"]
