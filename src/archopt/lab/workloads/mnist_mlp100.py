"""mnist-mlp100: a fully connected network of 100 layers on MNIST (Nero, arXiv:2102.07227, figure 3).

Data: MNIST, pixels in [0, 1], then (x - 0.1307) / 0.3081, flattened to 784; shuffled, in batches of 250,
240 an epoch.
Model: Linear 784 -> 784, 98 times Linear 784 -> 784, Linear 784 -> 10, all with biases; sqrt(2) * relu after
every layer but the last; no normalisation, no skip connections. 60,936,410 parameters in 200 tensors.
Loss: mean cross-entropy. 50 epochs; the learning rate is multiplied by 0.9 after each.
Metric: the running training accuracy of the last epoch, each batch scored before its update. The paper's runs
(seeds 0, 1, 2): Nero 0.001: .957 .968 .872; LAMB 0.01: .671 .726 .701; Adam 0.001 and SGD 0.1: .1124, the
frequency of the commonest class, which is where a network stands that has learnt nothing.

Presets: `paper` is the above, about 1.2 s a step on two cores. `small` narrows the hidden layers to 128 and
takes batches of 125 for 20 epochs, 9,600 steps, with the rate times 0.87 after each.
Nero learns at 0.003 on every seed there, and at the published 0.001, which wakes later, on the one that was tried.
`smoke` has width 16 and trains 2 epochs on the first 2,500 images.
"""

from dataclasses import dataclass

from torch import nn

from archopt.lab.models.dense import MLP, RELU_GAIN
from archopt.lab.workloads.mnist import CLASSES, PIXELS, MnistRows
from archopt.lab.workloads.supervised import check_positive


@dataclass
class MnistMLP100(MnistRows):
    """100 layers on MNIST (see the module's text)."""

    name = "mnist-mlp100"
    summary = "100-layer fully connected network on MNIST (Nero paper, figure 3)"
    presets = {
        "paper": {},
        "small": {"width": 128, "batch_size": 125, "epochs": 20, "decay": 0.87},
        "smoke": {"width": 16, "epochs": 2, "train_images": 2500},
    }
    settings = {"nero": {"lr": 1e-3}, "lamb": {"lr": 1e-2}, "adam": {"lr": 1e-3}, "sgd": {"lr": 1e-1}}
    lrs = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)  # the paper's four, and 0.003, which suits `small`

    epochs: int = 50
    depth: int = 100
    width: int = 784
    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "depth", "width", "decay")

    def build(self) -> nn.Module:
        return MLP((PIXELS, *[self.width] * (self.depth - 1), CLASSES), gain=RELU_GAIN)

    def schedule(self, step: int) -> float:
        return float(self.decay ** (step // self.steps_per_epoch))
