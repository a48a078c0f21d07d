"""VGG for 32 x 32 pixels as AGD's paper (2304.05187) trains it: BatchNorm, one linear layer, no vectors."""

from functools import partial

from torch import Tensor, nn

from archopt.lab.models.vgg import convolutions


class BareVGG(nn.Module):
    """3 x 3 convolutions with BatchNorm and ReLU, five times halved, and a linear layer.

    depth: 11, 13, 16 or 19; width: channels of the first convolution. Input (batch, 3, 32, 32), output (batch,
    classes). No biases, BatchNorm without gains and shifts. Torch's own initial weights.
    """

    def __init__(self, depth: int = 16, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.features, channels = convolutions(depth, width, partial(nn.BatchNorm2d, affine=False))
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits
