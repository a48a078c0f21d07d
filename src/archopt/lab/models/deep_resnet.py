"""Residual networks of 18 layers and more, after He, Zhang, Ren and Sun 2015 (arXiv:1512.03385, table 1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab.models.resnet import ResidualBlock
from archopt.lab.models.vgg import kaiming_fan_out

BLOCKS: dict[int, tuple[int, ...]] = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
}
"""By depth: blocks in each of the four stages."""
BOTTLENECK_FROM = 50
EXPANSION = 4


class Bottleneck(nn.Module):
    """relu(1 x 1, 3 x 3 and 1 x 1 convolutions with BatchNorm + shortcut); the 3 x 3 one has the stride.

    Input (batch, channels, h, w), output (batch, 4 * filters, h / stride, w / stride). The shortcut is the input
    itself, or where the shape changes a 1 x 1 convolution with BatchNorm.
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * filters
        self.conv1 = nn.Conv2d(channels, filters, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.conv3 = nn.Conv2d(filters, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class DeepResNet(nn.Module):
    """A stem, four stages of residual blocks that double the channels, mean over places, linear head.

    width: channels of the stem and the first stage's filters. large_pictures: the stem of ImageNet, a 7 x 7
    convolution of stride 2, BatchNorm, ReLU and 3 x 3 max-pooling of stride 2; without it that of Nero's paper for
    32 x 32 pixels, a 3 x 3 convolution and BatchNorm, no ReLU. The stages after the first halve the picture.

    Input (batch, 3, h, w), output (batch, classes). Kaiming normal convolutions (fan out, gain of ReLU), gains 1,
    shifts 0, torch's own linear layer.
    """

    def __init__(
        self, depth: int = 18, width: int = 64, classes: int = 10, *, large_pictures: bool = False
    ) -> None:
        super().__init__()
        bottleneck = depth >= BOTTLENECK_FROM
        stem: list[nn.Module]
        if large_pictures:
            stem = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            stem.append(nn.MaxPool2d(3, 2, padding=1))
        else:
            stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.stem = nn.Sequential(*stem)
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(BLOCKS[depth]):
            filters = width * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append((Bottleneck if bottleneck else ResidualBlock)(channels, filters, stride))
                channels = EXPANSION * filters if bottleneck else filters
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)
        kaiming_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits
