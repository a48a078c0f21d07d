"""The parameter sets by name: real models, so that parameters have their roles; many small tensors to few large."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab.models.deep_resnet import DeepResNet
from archopt.lab.models.gpt import GPT

CLASSES = 1000  # of ImageNet
PIXELS = 224
VOCABULARY = 50257  # of GPT-2
CONTEXT = 1024


@dataclass(frozen=True)
class ParameterSet:
    """A model, and what a training step on it is measured with."""

    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    """A random batch of so many, on the default device."""
    batch: int
    """Of a training step, unless another is asked for."""

    def loss(self, model: nn.Module, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """The loss of random labels, 0-d: pictures are classified, of tokens each predicts the next."""
        if batch.is_floating_point():
            logits = model(batch.to(dtype))
            labels = torch.zeros(len(batch), dtype=torch.long, device=batch.device)
        else:
            logits = model(batch)[:, :-1].flatten(0, 1)
            labels = batch[:, 1:].flatten()
        return F.cross_entropy(logits.float(), labels)


def _resnet(depth: int) -> ParameterSet:
    return ParameterSet(
        f"ResNet-{depth} for ImageNet",
        lambda: DeepResNet(depth, classes=CLASSES, large_pictures=True),
        lambda batch: torch.randn(batch, 3, PIXELS, PIXELS),
        batch=32,
    )


def _gpt2(name: str, width: int, depth: int, heads: int, batch: int) -> ParameterSet:
    def build() -> nn.Module:
        model = GPT(VOCABULARY, CONTEXT, width, depth, heads)
        model.head = nn.Linear(width, VOCABULARY, bias=False, device="meta")  # nothing to fill
        model.head.weight = model.tokens.weight
        return model

    what = f"{name}: {depth} layers of {width}, embedding and head tied"
    return ParameterSet(what, build, lambda batch: torch.randint(VOCABULARY, (batch, CONTEXT)), batch)


SETS = {
    "resnet18": _resnet(18),
    "resnet50": _resnet(50),
    "gpt2": _gpt2("GPT-2", 768, 12, 12, batch=8),
    "gpt2-medium": _gpt2("GPT-2 medium", 1024, 24, 16, batch=8),
    "gpt2-xl": _gpt2("GPT-2 XL", 1600, 48, 25, batch=4),
}


def count(name: str) -> int:
    """How many parameters a set has; nothing is allocated."""
    with torch.device("meta"):
        model = SETS[name].build()
    return sum(param.numel() for param in model.parameters())
