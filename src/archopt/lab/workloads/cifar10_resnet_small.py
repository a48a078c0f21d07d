"""cifar10-resnet-small: a residual network with BatchNorm on CIFAR-10.

Data: CIFAR-10, 32 x 32 photographs of ten classes: the original files or, where the folder does not have them,
the half of it called cifar10-half (25,000 + 5,000 images; its accuracies are not comparable with published ones).
The record says which. Training images are padded by 4 black pixels, cut to 32 x 32 at a random place, mirrored
every second time, then normalised by channel with the means and deviations of the whole training set.
Model: 3 x 3 convolution, three stages of residual blocks with 16, 32 and 64 channels, mean, linear head; torch's
initial weights.
Loss: mean cross-entropy; every epoch visits all images once. The rate rises over 30 steps and falls linearly
towards 0; with `--lr-schedule constant` it does not. Rules without a rate follow no schedule.
Metric: accuracy on the test images.

Presets: `small` has one block a stage (8 layers, 78,042 parameters) and trains 4 epochs on the first 10,000 images
in batches of 64, 628 steps; the first 5,000 test images. `paper` is no paper's comparison but the standard size:
three blocks a stage (20 layers, as in arXiv:1512.03385), all images there are, batches of 128, 160 epochs; for
a GPU. `smoke` trains 2 epochs on 128 images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archopt.lab import seeds
from archopt.lab.data import DataFolder, load_cifar10
from archopt.lab.models.resnet import ResNet
from archopt.lab.pictures import CIFAR10_MEAN, cropped_and_mirrored, normalized
from archopt.lab.workload import Metric
from archopt.lab.workloads.schedules import WARMUP, Schedule, check_schedule, multiplier
from archopt.lab.workloads.supervised import Supervised, check_positive, labels

STD = (0.2470, 0.2435, 0.2616)


@dataclass
class CIFAR10ResNetSmall(Supervised):
    """A small ResNet on CIFAR-10 (see the module's text)."""

    name = "cifar10-resnet-small"
    summary = "small ResNet with BatchNorm on CIFAR-10; --lr-schedule linear or constant"
    metric = Metric("test_accuracy", "test accuracy", higher_is_better=True, unit="%")
    presets = {
        "paper": {"blocks": 3, "train_images": None, "test_images": None, "batch_size": 128, "epochs": 160},
        "small": {},
        "smoke": {"train_images": 128, "test_images": 100, "batch_size": 32, "epochs": 2},
    }
    lrs = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

    epochs: int = 4
    blocks: int = 1
    train_images: int | None = 10_000
    """None: all there are."""
    test_images: int | None = 5_000
    augment: bool = True
    lr_schedule: Schedule = "linear"
    warmup: int = WARMUP

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "blocks")
        check_schedule(self.lr_schedule, self.warmup)

    def load(self, data: DataFolder) -> None:
        cifar = load_cifar10(data, self.train_images, self.test_images)
        self.hold(
            (torch.from_numpy(cifar.train_images), labels(cifar.train_labels)),
            (normalized(torch.from_numpy(cifar.test_images), CIFAR10_MEAN, STD), labels(cifar.test_labels)),
        )

    def build(self) -> nn.Module:
        return ResNet(self.blocks)

    def schedule(self, step: int) -> float:
        return multiplier(self.lr_schedule, step, self.steps, self.warmup)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        images, targets = super().batch(step, seed)
        if self.augment:
            generator = torch.Generator().manual_seed(seeds.mix(seed, step, seeds.BATCH))
            images = cropped_and_mirrored(images, generator)
        return normalized(images, CIFAR10_MEAN, STD), targets
