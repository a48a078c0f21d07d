"""mnist-cwn: centred weight norm, Nero's constraints as a reparameterisation (arXiv:2102.07227).

Data, batches and loss as in mnist-mlp100.
Model: five layers, 784 -> 784 four times, then 784 -> 10, without biases; in every forward pass each row of
weights is centred and divided by its norm, and the gradient is taken through that; sqrt(2) * relu between.
2,466,464 parameters. Raw weights are drawn from N(0, sigma^2), with sigma 1 or 100.
5 epochs, constant learning rate; the paper ran Adam at 0.01.
Metric: the mean of the batches' training accuracy over the last epoch, each scored before its update. The
paper's runs (mean of seeds 0, 1, 2): sigma 1: .992, sigma 100: .922. The function does not
depend on sigma; how far a step turns it does, and that is the freedom which Nero's constraints take away.

Presets: `paper` is the above. `small` narrows the hidden layers to 256; `smoke` has width 32 and trains
2 epochs on the first 2,500 images.
"""

from dataclasses import dataclass

from torch import nn

from archopt.lab.models.dense import CentredMLP
from archopt.lab.workloads.mnist import CLASSES, PIXELS, MnistRows
from archopt.lab.workloads.supervised import check_positive


@dataclass
class MnistCWN(MnistRows):
    """Centred weight norm on MNIST (see the module's text)."""

    name = "mnist-cwn"
    summary = "5 layers with centred weight norm on MNIST; --sigma 1 or 100 (Nero paper)"
    presets = {
        "paper": {},
        "small": {"width": 256},
        "smoke": {"width": 32, "epochs": 2, "train_images": 2500},
    }
    settings = {"adam": {"lr": 1e-2}}

    epochs: int = 5
    width: int = 784
    sigma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "width", "sigma")

    def build(self) -> nn.Module:
        return CentredMLP((PIXELS, *[self.width] * 4, CLASSES), self.sigma)
