"""The protocol that Nero's paper (arXiv:2102.07227, figures 1, 2 and 6) has for all of its networks on CIFAR-10.

Data: CIFAR-10, 50,000 + 10,000 photographs of 32 x 32. Training images are padded by 4 black pixels and cut at a
random place, mirrored every second time, turned by an angle between -15 and 15 degrees (nearest pixels, black
outside), then normalised by channel; test images are only normalised. Batches of 128, the last of an epoch smaller.
Loss: mean cross-entropy. 199 epochs of 391 steps, 77,809 in all. The rate rises over the steps of 5 epochs, is 0.2
times as large from epoch 100 on, 0.04 times from 150, 0.008 times from 180 (counted from 1).
Optimisers: nothing has momentum or weight decay, Adam and LAMB have betas (0, 0.999).
Metric: test error, 1 - accuracy; the paper does not say whether its values are those of the last epoch or of the
best, so records have both (spec 4.1). With `scored_images`, loss and accuracy are also measured in evaluation mode
on augmented training images, as the paper logs them: `scored_train_loss`, `scored_train_accuracy`. The means of the
training steps themselves, which cost nothing, are in every record.

Where the data folder has only half of CIFAR-10, `paper` keeps the number of steps and with it the schedule: an
epoch of the schedule is still 391 steps, about two passes over the 25,000 images. The record and the page's title
say so; such a result is not comparable with the published one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archopt.lab import seeds
from archopt.lab.data import DataFolder, half_note, load_cifar10
from archopt.lab.pictures import CIFAR10_MEAN, cropped_and_mirrored, normalized
from archopt.lab.workload import Metric
from archopt.lab.workloads.supervised import Supervised, by_rows, check_positive, labels, score

STD = (0.2023, 0.1994, 0.2010)  # the paper's; means over images, not those of all pixels
DEGREES = 15.0
TRAIN_IMAGES = 50_000
MILESTONES = (0.5, 0.75, 0.9)  # of `epochs` + 1: epochs 100, 150 and 180 of the 199
FALL = 0.2

NO_MOMENTUM = {"betas": (0.0, 0.999)}


@dataclass
class CIFAR10Paper(Supervised):
    """CIFAR-10 as Nero's paper trains on it (see the module's text). A subclass defines `build`."""

    metric = Metric("test_error", "test error", higher_is_better=False, unit="%")

    epochs: int = 199
    batch_size: int = 128
    width: int = 64
    """Channels of the first convolution; all others follow it."""
    train_images: int | None = None
    """The first so many; None: all there are."""
    test_images: int | None = None
    epoch_images: int | None = TRAIN_IMAGES
    """Images that make an epoch of the schedule, whatever the data at hand; None: as many as there are."""
    warmup: int = 5
    """Epochs in which the rate rises."""
    scored_images: int | None = None
    """Training images that are scored, augmented, at each evaluation; None: all there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "width")
        if self.epoch_images is not None:
            check_positive(self, "epoch_images")
        for name in ("warmup", "scored_images"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected at least 0")

    def load(self, data: DataFolder) -> None:
        cifar = load_cifar10(data, self.train_images, self.test_images)
        self.hold(
            (torch.from_numpy(cifar.train_images), labels(cifar.train_labels)),
            (normalized(torch.from_numpy(cifar.test_images), CIFAR10_MEAN, STD), labels(cifar.test_labels)),
        )

    @property
    def data_note(self) -> str:
        there = len(self.train_inputs), len(self.test_inputs)
        return half_note(there, self.train_images, self.test_images)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch of the schedule."""
        return -(-(self.epoch_images or len(self.train_inputs)) // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self.steps_per_epoch

    def schedule(self, step: int) -> float:
        rising = self.warmup * self.steps_per_epoch
        if step < rising:
            return (step + 1) / rising
        epoch = step // self.steps_per_epoch + 1
        falls = sum(epoch >= share * (self.epochs + 1) for share in MILESTONES)
        return float(FALL**falls)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        images, targets = super().batch(step, seed)
        generator = torch.Generator().manual_seed(seeds.mix(seed, step, seeds.BATCH))
        return self._augmented(images, generator), targets

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return normalized(cropped_and_mirrored(images, generator, DEGREES), CIFAR10_MEAN, STD)

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """`test_error`, `test_loss` and `test_accuracy`; with `scored_images` also those of augmented ones."""
        found = super().evaluate(models)
        found = {"test_error": 1 - found["test_accuracy"], **found}
        if self.scored_images != 0:
            loss, (share,) = score(models["model"], self._scored())
            found |= {"scored_train_loss": loss, "scored_train_accuracy": share}
        return found

    def _scored(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images, augmented by what the evaluation's seed draws."""
        count = self.scored_images
        for images, targets in by_rows(self.train_inputs[:count], self.train_targets[:count]):
            yield self._augmented(images, torch.default_generator), targets
