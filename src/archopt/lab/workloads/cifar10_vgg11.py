"""cifar10-vgg11: VGG-11 without normalisation on CIFAR-10 (Nero, arXiv:2102.07227, figures 1, 2 and 6).

Data, loss, schedule and metric: the paper's protocol, as `cifar10_paper.py` tells it.
Model: 3 x 3 convolutions without biases and ReLU, 64 M 128 M 256 256 M 512 512 M 512 512 M channels (M: 2 x 2
max-pooling), then 512 -> 4096 -> 4096 -> 10 with biases, ReLU and dropout 0.5. 28,141,258 parameters in 14 tensors.
`--depth 13`, `16` or `19` and `--batch-norm` make its relatives, which the paper has no readings of.
Published test errors (seeds 0, 1, 2): Nero 0.01: 11.16 %; SGD 0.1: 12.61 %; Adam 0.001: 12.86 %; LAMB 0.01:
13.66 %.

Presets: `paper` is the above; for a GPU. `small` has an eighth of the channels and hidden units (445,282
parameters) and trains 19 epochs on the first 10,000 images in batches of 64, 2,983 steps, with one epoch of warm-up
and the falls after half, three quarters and nine tenths, as published; the first 2,000 test images, no scores on
training images. `smoke` takes 12 steps.
"""

from dataclasses import dataclass

from torch import nn

from archopt.lab.models.vgg import LAYERS, VGG
from archopt.lab.workloads.cifar10_paper import NO_MOMENTUM, CIFAR10Paper


@dataclass
class CIFAR10VGG11(CIFAR10Paper):
    """VGG-11 on CIFAR-10 (see the module's text)."""

    name = "cifar10-vgg11"
    summary = "VGG-11 without normalisation on CIFAR-10 (Nero paper, figures 1, 2 and 6)"
    presets = {
        "paper": {},
        "small": {
            "width": 8,
            "train_images": 10_000,
            "test_images": 2_000,
            "batch_size": 64,
            "epochs": 19,
            "warmup": 1,
            "epoch_images": None,
            "scored_images": 0,
        },
        "smoke": {
            "width": 8,
            "train_images": 256,
            "test_images": 100,
            "batch_size": 64,
            "epochs": 3,
            "warmup": 1,
            "epoch_images": None,
            "scored_images": 128,
        },
    }
    settings = {
        "nero": {"lr": 0.01},
        "sgd": {"lr": 0.1},
        "adam": {"lr": 0.001, **NO_MOMENTUM},
        "lamb": {"lr": 0.01, **NO_MOMENTUM},
        "madam": {"lr": 0.02},
        "madam-cs": {"lr": 0.06},
        "lamb-cs": {"lr": 0.06},
    }

    depth: int = 11
    batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth not in LAYERS:
            raise ValueError(f"depth={self.depth}, expected one of {', '.join(map(str, LAYERS))}")

    def build(self) -> nn.Module:
        return VGG(self.depth, self.width, batch_norm=self.batch_norm)
