"""Changes to pictures for training, a whole batch at a time: shifts, mirrors, rotations, and their scale."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WHITE = 255.0
PADDING = 4
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures (n, channels, h, w), 0 to 255, as float32, by channel (x / 255 - mean) / std."""
    centre, scale = (images.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return (images.float() / WHITE - centre) / scale


def cropped_and_mirrored(images: Tensor, generator: torch.Generator, degrees: float = 0.0) -> Tensor:
    """Each picture shifted by -4 to 4 pixels both ways, black where nothing was, every second one mirrored.

    Then, with `degrees`, turned about its middle by an angle between -degrees and degrees; each pixel takes the
    nearest one, black where there is none. All three are one selection of pixels. Same shape (n, channels, h, w)
    and type. What happens to a picture depends on the generator, a CPU's, alone.
    """
    count, channels, height, width = images.shape
    down, right = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    rows = torch.arange(height).repeat_interleave(width).expand(count, -1)
    columns = torch.arange(width).repeat(height).expand(count, -1)
    outside = None
    if degrees:
        angle = torch.rand(count, 1, generator=generator).mul_(2).sub_(1) * math.radians(degrees)
        rows, columns, outside = _turned(rows, columns, angle, height, width)
    columns = torch.where(mirror, width - 1 - columns, columns)
    places = (rows + down) * (width + 2 * PADDING) + columns + right
    if outside is not None:
        places = places.masked_fill(outside, 0)  # the padding's first pixel, which is black
    padded = nn.functional.pad(images, (PADDING,) * 4).flatten(2)
    index = places.to(images.device).unsqueeze(1).expand(-1, channels, -1)
    return padded.gather(2, index).view_as(images)


def _turned(
    rows: Tensor, columns: Tensor, angle: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which row and column each pixel comes from when a picture is turned, and where there is none.

    rows, columns: (n, pixels) of the pixels; angle: (n, 1), radians, counterclockwise as one looks at it.
    """
    y, x = rows + (0.5 - height / 2), columns + (0.5 - width / 2)
    cos, sin = angle.cos(), angle.sin()
    row = (sin * x + cos * y + height / 2).floor().long()
    column = (cos * x - sin * y + width / 2).floor().long()
    outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
    return row, column, outside
