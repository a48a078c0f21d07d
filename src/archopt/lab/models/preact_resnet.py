"""Residual networks for 32 x 32 pixels that normalise before they convolve (He et al. 2016, arXiv:1603.05027).

As AGD's paper (2304.05187) trains them: no biases, BatchNorm without gains and shifts, and after the last block
neither BatchNorm nor ReLU.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab.models.deep_resnet import BLOCKS, BOTTLENECK_FROM, EXPANSION


class PreActBlock(nn.Module):
    """Convolutions, each of relu(BatchNorm(...)), + shortcut.

    shape: (kernel, channels, filters, stride) of each convolution. Where the stride or the number of channels
    changes, the shortcut is a 1 x 1 convolution of the first relu(BatchNorm(input)), else the input itself.
    """

    def __init__(self, shape: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        channels, filters = shape[0][1], shape[-1][2]
        stride = max(step for *_, step in shape)
        self.norms = nn.ModuleList(nn.BatchNorm2d(inner, affine=False) for _, inner, _, _ in shape)
        self.convs = nn.ModuleList(
            nn.Conv2d(inner, outer, kernel, step, padding=kernel // 2, bias=False)
            for kernel, inner, outer, step in shape
        )
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels != filters:
            self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = out = F.relu(self.norms[0](x))
        for place, conv in enumerate(self.convs):
            out = conv(out if place == 0 else F.relu(self.norms[place](out)))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(first)
        return out + shortcut


def basic_shape(channels: int, filters: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Two 3 x 3 convolutions, the first with the stride."""
    return [(3, channels, filters, stride), (3, filters, filters, 1)]


def bottleneck_shape(channels: int, filters: int, stride: int) -> list[tuple[int, int, int, int]]:
    """1 x 1, 3 x 3 with the stride, and 1 x 1 to four times the filters."""
    return [(1, channels, filters, 1), (3, filters, filters, stride), (1, filters, EXPANSION * filters, 1)]


class PreActResNet(nn.Module):
    """A 3 x 3 convolution, four stages of blocks that double the channels, mean over places, a linear layer.

    depth: 18, 34 (basic blocks) or 50 (bottlenecks); width: channels of the stem and the first stage's filters.
    Input (batch, 3, 32, 32), output (batch, classes). Torch's own initial weights.
    """

    def __init__(self, depth: int = 18, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        shape = bottleneck_shape if depth >= BOTTLENECK_FROM else basic_shape
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(BLOCKS[depth]):
            for block in range(count):
                made = shape(channels, width * 2**stage, 2 if stage and not block else 1)
                blocks.append(PreActBlock(made))
                channels = made[-1][2]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits
