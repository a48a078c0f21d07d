"""A residual network for 32 x 32 pixels, after He, Zhang, Ren and Sun 2015 (arXiv:1512.03385, section 4.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class ResidualBlock(nn.Module):
    """relu(two 3 x 3 convolutions with BatchNorm + shortcut).

    Input (batch, channels, h, w), output (batch, filters, h / stride, w / stride). The shortcut is the input
    itself, or where the shape changes a 1 x 1 convolution with BatchNorm.
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        # BatchNorm subtracts the mean, so a bias before it would do nothing.
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != filters:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3 x 3 convolution to 16 channels, three stages of `blocks` residual blocks, mean over places, linear head.

    The stages have 16, 32 and 64 channels; the second and third halve the picture. 6 * blocks + 2 layers deep.

    Input (batch, 3, 32, 32), output (batch, classes). Torch's initial weights.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels = WIDTHS[0]
        for stage, filters in enumerate(WIDTHS):
            for block in range(blocks):
                stages.append(ResidualBlock(channels, filters, 2 if stage and not block else 1))
                channels = filters
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits
