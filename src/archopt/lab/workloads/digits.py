"""digits: the 1,797 real handwritten digits that ship with the package; a run takes about a second.

Data: 1,400 digits of 8 x 8 pixels to train on, 397 to test on, a fixed split; pixels 0 ... 16 are divided
by 16, then (x - 0.3053) / 0.3758, the mean and deviation of the training part. No augmentation.
Model: `mlp`, 64-128-128-10 with biases and ReLU; or `cnn`, three 3 x 3 convolutions with BatchNorm.
Loss: mean cross-entropy. 30 epochs of 22 batches of 64 (the last of 56); constant learning rate.
Metric: accuracy on the test part after the last step. One digit is 0.25 %.

Presets: `paper` and `small` are the same (no paper used this set); `smoke` trains two epochs.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from archopt.lab.data import DataFolder, load_digits
from archopt.lab.models.dense import MLP
from archopt.lab.models.small_cnn import SmallCNN
from archopt.lab.workload import Metric
from archopt.lab.workloads.supervised import Supervised, labels, pixels

WHITE, MEAN, STD = 16.0, 0.3053, 0.3758


@dataclass
class Digits(Supervised):
    """Classify 8 x 8 digits (see the module's text)."""

    name = "digits"
    summary = "1,797 handwritten digits of 8 x 8 pixels, MLP or small CNN; ships with the package"
    metric = Metric("test_accuracy", "test accuracy", higher_is_better=True, unit="%")
    presets = {"paper": {}, "small": {}, "smoke": {"epochs": 2}}
    lrs = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

    epochs: int = 30
    model: Literal["mlp", "cnn"] = "mlp"

    def load(self, data: DataFolder) -> None:
        digits = load_digits(data)
        self.hold(
            (pixels(digits.train_images, WHITE, MEAN, STD).unsqueeze(1), labels(digits.train_labels)),
            (pixels(digits.test_images, WHITE, MEAN, STD).unsqueeze(1), labels(digits.test_labels)),
        )

    def build(self) -> nn.Module:
        if self.model == "mlp":
            return MLP((64, 128, 128, 10))
        if self.model == "cnn":
            return SmallCNN()
        raise ValueError(f"digits has no model {self.model!r} (expected 'mlp' or 'cnn')")
