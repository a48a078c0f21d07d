"""cifar10-resnet18: ResNet-18 on CIFAR-10 (Nero, arXiv:2102.07227, figure 6).

Data, loss, schedule and metric: the paper's protocol, as `cifar10_paper.py` tells it.
Model: 3 x 3 convolution and BatchNorm (no ReLU), four stages of two basic blocks with 64, 128, 256 and 512
channels, mean, linear head. 11,173,962 parameters in 62 tensors. `--depth 34` or `50` make its relatives, which
the paper has no readings of.
Published test errors (seeds 0, 1, 2): Nero 0.01: 5.75 %; SGD 0.1: 7.75 %; Adam 0.01: 5.93 %; LAMB 0.1: 6.46 %.

Presets: `paper` is the above; for a GPU. `small` has an eighth of the channels (176,402 parameters) and trains 9
epochs on the first 8,000 images in batches of 64, 1,125 steps, with one epoch of warm-up and the falls after half,
three quarters and nine tenths, as published; the first 2,000 test images, no scores on training images. `smoke`
takes 8 steps at width 4.
"""

from dataclasses import dataclass

from torch import nn

from archopt.lab.models.deep_resnet import BLOCKS, DeepResNet
from archopt.lab.workloads.cifar10_paper import NO_MOMENTUM, CIFAR10Paper


@dataclass
class CIFAR10ResNet18(CIFAR10Paper):
    """ResNet-18 on CIFAR-10 (see the module's text)."""

    name = "cifar10-resnet18"
    summary = "ResNet-18 on CIFAR-10 (Nero paper, figure 6)"
    presets = {
        "paper": {},
        "small": {
            "width": 8,
            "train_images": 8_000,
            "test_images": 2_000,
            "batch_size": 64,
            "epochs": 9,
            "warmup": 1,
            "epoch_images": None,
            "scored_images": 0,
        },
        "smoke": {
            "width": 4,
            "train_images": 128,
            "test_images": 100,
            "batch_size": 32,
            "epochs": 2,
            "warmup": 1,
            "epoch_images": None,
            "scored_images": 64,
        },
    }
    settings = {
        "nero": {"lr": 0.01},
        "sgd": {"lr": 0.1},
        "adam": {"lr": 0.01, **NO_MOMENTUM},
        "lamb": {"lr": 0.1, **NO_MOMENTUM},
    }

    depth: int = 18

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth not in BLOCKS:
            raise ValueError(f"depth={self.depth}, expected one of {', '.join(map(str, BLOCKS))}")

    def build(self) -> nn.Module:
        return DeepResNet(self.depth, self.width)
