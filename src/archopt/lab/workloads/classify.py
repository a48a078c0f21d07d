"""classify: the training program of automatic gradient descent (AGD, arXiv:2304.05187), with baselines and records.

Networks, all without biases, BatchNorm without gains and shifts:
  fcn                     `depth` linear layers of `width` units, sqrt(2) * relu between them; any set
  vgg11, 13, 16, 19       3 x 3 convolutions, one linear layer (`vgg` is vgg16); cifar10, cifar100
  resnet18, 34, 50        pre-activation, without BatchNorm after the last block; cifar10, cifar100
  resnet50                on imagenet: post-activation, the stride in the 3 x 3 convolution
Data: `archopt.lab.data.classified`. Training pictures of CIFAR are shifted and mirrored for every network.
Loss (`objective`, on the command line also `--loss`): `mse`, the mean over batch and classes of
(output - sqrt(classes) * one-hot)^2, without a half; or `xent`, the mean cross-entropy. Batches of `train_bs`, the
last of an epoch smaller; no schedule.
Optimiser: published AGD, `agd-paper`, which draws its own initial weights; the others keep torch's. `gain`
multiplies AGD's update. Adam 0.001 and SGD 0.1 (momentum 0; the paper does not say) are its untuned defaults.
Metric: test accuracy of the last epoch. Records hold both losses and both accuracies, means over rows (those of the
published program are over batches, the short one counting as a whole one); the training ones are over the epoch's
batches, each scored before its update. Under `per_step` stand mean, least and greatest of the automatic step size
and of the relative update, the mean over layers of ||dW||_F / ||W||_F, at every `updates_every`-th step of it.

Where there are fewer pictures than published, an epoch of `paper` keeps its number of steps (on CIFAR-10 391 of
128), about two passes over half the set. With `train_images` an epoch is one pass over those.

Presets: `paper` is the published default: FCN of 10 layers of 256 units (1,313,280 parameters), CIFAR-10, square
loss, batches of 128, 200 epochs. `small` trains 20 epochs on the first 10,000 pictures (1,580 steps), tests on the
first 2,000, has an eighth of the channels in convolutional networks and 64 x 64 pixels on imagenet; fully connected
networks keep their size. `smoke` takes 2 epochs of 256 pictures, 4 channels, 32 x 32 pixels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.conf import arg

from archopt.lab import seeds
from archopt.lab.data import DataFolder
from archopt.lab.data.classified import KNOWN, load_classified
from archopt.lab.models.bare import bare
from archopt.lab.models.bare_vgg import BareVGG
from archopt.lab.models.deep_resnet import DeepResNet
from archopt.lab.models.dense import MLP, RELU_GAIN
from archopt.lab.models.preact_resnet import PreActResNet
from archopt.lab.optimizers import ENTRIES
from archopt.lab.pictures import Part
from archopt.lab.workload import Metric
from archopt.lab.workloads.supervised import (
    HeldRows,
    accuracy,
    check_positive,
    score,
    summed_cross_entropy,
)

Arch = Literal["fcn", "vgg", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50"]
Dataset = Literal["cifar10", "cifar100", "mnist", "fashion-mnist", "imagenet"]
DEPTH, WIDTH, SIZE = 10, 256, 224  # of the published program
LARGE_ARCH = "resnet50"
"""The one convolutional network for pictures larger than CIFAR's."""


@dataclass
class Classify(HeldRows):
    """AGD's training program: networks without biases, no schedule (docs/workloads.md, classify)."""

    name = "classify"
    summary = "the program of AGD's paper: fully connected, VGG, ResNet on CIFAR, MNIST, ImageNet"
    metric = Metric("test_accuracy", "test accuracy", higher_is_better=True, unit="%")
    default_optimizer = "agd-paper"
    default_preset = "paper"
    divisible = True
    presets = {
        "paper": {},
        "small": {"epochs": 20, "train_images": 10_000, "test_images": 2_000, "channels": 8, "size": 64},
        "smoke": {"epochs": 2, "train_images": 256, "test_images": 100, "channels": 4, "size": 32},
    }
    settings = {"adam": {"lr": 1e-3}, "sgd": {"lr": 0.1}}
    lrs = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

    epochs: int = 200
    """Of the published number of steps, however many pictures there are."""
    arch: Arch = "fcn"
    """The network; vgg is vgg16."""
    dataset: Dataset = "cifar10"
    """What is classified; fcn takes all, the others CIFAR, resnet50 imagenet too."""
    # Not `loss`, which is a method; the alias is the published program's spelling.
    objective: Annotated[Literal["mse", "xent"], arg(aliases=["--loss"])] = "mse"
    """mse: square loss of sqrt(classes) times one-hot targets; xent: cross-entropy."""
    train_bs: int = 128
    """Pictures in a training batch."""
    test_bs: int = 128
    """Pictures scored at once; changes no result."""
    depth: int = DEPTH
    """Layers of the fcn."""
    width: int = WIDTH
    """Hidden units of the fcn's layers."""
    channels: int = 64
    """Of a convolutional network's first stage, all others in proportion; an fcn has none."""
    gain: float = 1.0
    """Multiplies AGD's update."""
    train_images: int | None = None
    """Pictures to train on, which then are an epoch; None: all there are."""
    test_images: int | None = None
    """Pictures to test on; None: all there are."""
    size: int = SIZE
    """Pixels of a side of imagenet's pictures."""
    iterations: int | None = None
    """Steps in all, in place of epochs."""
    updates_every: int = 10
    """Steps between measurements of the relative update; 0: none."""

    def __post_init__(self) -> None:
        if self.arch == "vgg":
            self.arch = "vgg16"
        check_positive(self, "epochs", "train_bs", "test_bs", "depth", "width", "channels", "gain", "size")
        for name in ("train_images", "test_images", "iterations"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if not math.isfinite(self.gain):
            raise ValueError(f"gain={self.gain}, expected a finite value above 0")
        if self.updates_every < 0:
            raise ValueError(f"updates_every={self.updates_every}, expected at least 0")
        known = KNOWN[self.dataset]
        for name, there in (("train_images", known.train), ("test_images", known.test)):
            if (getattr(self, name) or 0) > there:
                raise ValueError(f"{name}={getattr(self, name)}, but {self.dataset} has {there:,}")
        self._check_network()

    def _check_network(self) -> None:
        """Refuses a network that cannot take the pictures, and a depth or width for one that has its own."""
        if self.arch == "fcn":
            return
        for name, usual in (("depth", DEPTH), ("width", WIDTH)):
            if getattr(self, name) != usual:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for arch='fcn' alone; {self.arch} has its own (channels=... "
                    "makes it narrower)"
                )
        if self.dataset == "imagenet" and self.arch != LARGE_ARCH:
            raise ValueError(
                f"arch={self.arch!r} is for pictures of 32 x 32; for dataset='imagenet' take {LARGE_ARCH} or fcn"
            )
        if not self.dataset.startswith("cifar") and self.dataset != "imagenet":
            raise ValueError(f"arch={self.arch!r} is for CIFAR; for dataset={self.dataset!r} take arch='fcn'")

    @property
    def published(self) -> Mapping[str, Mapping[str, Any]]:
        """The paper's rates; and `gain` for whatever trains, so that an optimiser without one refuses it."""
        if self.gain == 1.0:
            return self.settings
        return {name: {**self.settings.get(name, {}), "gain": self.gain} for name in ENTRIES}

    @property
    def unheeded(self) -> frozenset[str]:
        told = {"depth", "width"} if self.arch != "fcn" else {"channels"}
        told |= set() if self.dataset == "imagenet" else {"size"}
        return frozenset(told | ({"epochs"} if self.iterations else set()))

    # -- data and network ----------------------------------------------------------------------------------

    def load(self, data: DataFolder) -> None:
        self.set = load_classified(self.dataset, data, self.train_images, self.test_images, self.size)
        held = self.set
        self.hold(*((torch.arange(len(t)), t) for t in (held.train_targets, held.test_targets)))

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.set.to(device)

    @property
    def data_note(self) -> str:
        known, held = KNOWN[self.dataset], self.set
        there = len(self.train_inputs), len(self.test_inputs)
        asked = self.train_images or known.train, self.test_images or known.test
        if all(have >= want for have, want in zip(there, asked)) and held.classes == known.classes:
            return ""
        classes = "" if held.classes == known.classes else f", {held.classes} classes"
        return f"{there[0]:,} + {there[1]:,} of {known.train:,} + {known.test:,} images{classes}"

    def build(self) -> nn.Module:
        classes = self.set.classes
        if self.arch == "fcn":
            channels, side, _ = KNOWN[self.dataset].shape
            side = self.size if self.dataset == "imagenet" else side
            hidden = [self.width] * max(self.depth - 1, 1)
            return MLP((channels * side * side, *hidden, classes), bias=False, gain=RELU_GAIN)
        if self.dataset == "imagenet":
            return bare(DeepResNet(50, self.channels, classes, large_pictures=True))
        family, depth = self.arch[:-2], int(self.arch[-2:])
        return (BareVGG if family == "vgg" else PreActResNet)(depth, self.channels, classes)

    # -- steps ---------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch: of those pictures that were asked for, else of the published set."""
        return -(-(self.train_images or KNOWN[self.dataset].train) // self.train_bs)

    @property
    def batch_rows(self) -> int:
        return self.train_bs

    @property
    def steps(self) -> int:
        return self.iterations or self.epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self.steps_per_epoch

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        rows, targets = super().batch(step, seed)
        following = None
        if self.set.reads_ahead and step + 1 < self.steps:
            following, _ = super().batch(step + 1, seed)
        generator = torch.Generator().manual_seed(seeds.mix(seed, step, seeds.BATCH))
        part = Part(self.share.part(whole := self.rows_of_step(step)), whole)
        return self.set.training(rows, generator, following, part), targets

    def weight(self, step: int) -> float:
        """The rows of a batch, so that means are exact over an epoch whose last batch is smaller."""
        return float(self.rows_of_step(step))

    # -- losses --------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        outputs = model(images)
        return self._summed(outputs, targets) / len(targets), {"accuracy": accuracy(outputs, targets)}

    def _summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of all rows together."""
        return (summed_squares if self.objective == "mse" else summed_cross_entropy)(outputs, targets)

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """`test_loss` and `test_accuracy` over the whole test set."""
        loss, (right,) = score(models["model"], self._testing(), summed=self._summed, share=self.share)
        return {"test_loss": loss, "test_accuracy": right}

    def _testing(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches."""
        parts, targets = (
            self.share.deal(torch.split(held, self.test_bs)) for held in (self.test_inputs, self.test_targets)
        )
        for rows, wanted, following in zip(parts, targets, (*parts[1:], None)):
            yield self.set.testing(rows, following), wanted


def summed_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared distance from sqrt(classes) * one-hot, a mean over classes, a sum over rows; 0-d.

    The targets have RMS 1, as the outputs of AGD's analysis have; there is no half (spec 2.4).
    """
    classes = outputs.shape[1]
    wanted = F.one_hot(targets, classes).to(outputs.dtype) * math.sqrt(classes)
    return F.mse_loss(outputs, wanted, reduction="sum") / classes
