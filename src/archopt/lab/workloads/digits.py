"""digits: the 1,797 real handwritten digits that ship with the package; a run takes about a second.

Data: 1,400 digits of 8 x 8 pixels to train on, 397 to test on, a fixed split; pixels 0 ... 16 are divided
by 16, then (x - 0.3053) / 0.3758, the mean and deviation of the training part. No augmentation.
Model: `mlp`, 64-128-128-10 with biases and ReLU; `mlp-ln`, the same with LayerNorm before each ReLU; `mlp16` and
`mlp16-ln`, likewise with 16 linear layers, the first 15 of width 128; or `cnn`, three 3 x 3 convolutions with
BatchNorm.
Loss: mean cross-entropy. 30 epochs of 22 batches of 64 (the last of 56); constant learning rate, or with
`--lr-schedule linear` one that rises over 30 steps and falls towards 0.
Metric: accuracy on the test part after the last step. One digit is 0.25 %.

Presets: `paper` and `small` are the same (no paper used this set); `smoke` trains two epochs.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from archopt.lab.data import DataFolder, load_digits
from archopt.lab.models.dense import MLP
from archopt.lab.models.small_cnn import SmallCNN
from archopt.lab.workload import JOINED_LATER, Metric
from archopt.lab.workloads.schedules import Schedule, check_schedule, multiplier
from archopt.lab.workloads.supervised import Supervised, labels, pixels

WHITE, MEAN, STD = 16.0, 0.3053, 0.3758
HIDDEN_LAYERS = {"mlp": 2, "mlp-ln": 2, "mlp16": 15, "mlp16-ln": 15}


@dataclass
class Digits(Supervised):
    """Classify 8 x 8 digits (see the module's text)."""

    name = "digits"
    summary = "1,797 handwritten digits of 8 x 8 pixels, MLPs of 3 and 16 layers, CNN; ships with the package"
    metric = Metric("test_accuracy", "test accuracy", higher_is_better=True, unit="%")
    presets = {"paper": {}, "small": {}, "smoke": {"epochs": 2}}
    divisible = True
    lrs = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

    epochs: int = 30
    model: Literal["mlp", "cnn", "mlp-ln", "mlp16", "mlp16-ln"] = "mlp"
    lr_schedule: Schedule = field(default="constant", metadata=JOINED_LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.lr_schedule)

    def load(self, data: DataFolder) -> None:
        digits = load_digits(data)
        self.hold(
            (pixels(digits.train_images, WHITE, MEAN, STD).unsqueeze(1), labels(digits.train_labels)),
            (pixels(digits.test_images, WHITE, MEAN, STD).unsqueeze(1), labels(digits.test_labels)),
        )

    def build(self) -> nn.Module:
        if self.model == "cnn":
            return SmallCNN()
        if self.model not in HIDDEN_LAYERS:
            known = ", ".join(["cnn", *HIDDEN_LAYERS])
            raise ValueError(f"digits has no model {self.model!r} (expected one of {known})")
        hidden = [128] * HIDDEN_LAYERS[self.model]
        return MLP((64, *hidden, 10), layer_norm=self.model.endswith("-ln"))

    def schedule(self, step: int) -> float:
        return multiplier(self.lr_schedule, step, self.steps)
