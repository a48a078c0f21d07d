"""Changes to pictures, a whole batch at a time: shifts, mirrors, rotations, crops of any size, and their scale."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

WHITE = 255.0
PADDING = 4
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)


class Part(NamedTuple):
    """Pictures that are a part of a batch. What happens to them is drawn for all of it, so that it does not depend
    on how the batch is divided among processes."""

    rows: slice
    batch: int
    """Pictures of the whole batch."""


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures (n, channels, h, w), 0 to 255, as float32, by channel (x / 255 - mean) / std."""
    centre, scale = (images.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return images.to(torch.float32, copy=True).div_(WHITE).sub_(centre).div_(scale)


def cropped_and_mirrored(
    images: Tensor, generator: torch.Generator, degrees: float = 0.0, part: Part | None = None
) -> Tensor:
    """Each picture shifted by -4 to 4 pixels both ways, black where nothing was, every second one mirrored.

    Then, with `degrees`, turned about its middle by an angle between -degrees and degrees; each pixel takes the
    nearest one, black where there is none. Same shape (n, channels, h, w) and type. What happens to a picture
    depends on the generator, a CPU's, alone, and on its place in the batch of which these are a `part`.
    """
    count, channels, height, width = images.shape
    if not degrees:
        return cropped_and_mirrored_rows(padded(images), torch.arange(count), generator, part)
    wanted, whole = part or Part(slice(None), count)
    down, right, mirror = _drawn(whole, wanted, generator)
    rows = torch.arange(height).repeat_interleave(width).expand(count, -1)
    columns = torch.arange(width).repeat(height).expand(count, -1)
    angle = torch.rand(whole, 1, generator=generator)[wanted].mul_(2).sub_(1) * math.radians(degrees)
    rows, columns, outside = _turned(rows, columns, angle, height, width)
    columns = torch.where(mirror, width - 1 - columns, columns)
    places = (rows + down) * (width + 2 * PADDING) + columns + right
    places = places.masked_fill(outside, 0)  # the padding's first pixel, which is black
    index = places.to(images.device).unsqueeze(1).expand(-1, channels, -1)
    return padded(images).flatten(2).gather(2, index).view_as(images)


def padded(images: Tensor) -> Tensor:
    """Pictures with four black pixels all around."""
    return nn.functional.pad(images, (PADDING,) * 4)


def cropped_and_mirrored_rows(
    held: Tensor, rows: Tensor, generator: torch.Generator, part: Part | None = None
) -> Tensor:
    """As `cropped_and_mirrored` without turning, of some of many pictures that are held with their padding.

    held: `padded`, whose memory is read once for each picture that is asked for; rows: the numbers of those, (n,).
    """
    wanted, whole = part or Part(slice(None), len(rows))
    down, right, mirror = _drawn(whole, wanted, generator)
    count, device = len(rows), held.device
    _, channels, high, wide = held.shape
    height, width = high - 2 * PADDING, wide - 2 * PADDING
    # Copied line by line, in a quarter of the time that choosing pixel by pixel takes.
    planes = (rows.view(-1, 1, 1) * channels + torch.arange(channels, device=rows.device).view(-1, 1)) * (
        high * wide
    )
    starts = planes + ((down + torch.arange(height)) * wide + right).unsqueeze(1).to(rows.device)
    lines = held.flatten().unfold(0, width, 1)  # one from every place
    cut = lines.index_select(0, starts.flatten().to(device)).view(count, channels, height, width)
    either = torch.arange(count) + count * mirror.squeeze(1)
    return torch.cat([cut, cut.flip(3)]).index_select(0, either.to(device))


def _drawn(whole: int, wanted: slice, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """How far down and right each picture of a batch is cut, and whether it is mirrored; (n, 1), of the wanted."""
    down, right = torch.randint(2 * PADDING + 1, (2, whole, 1), generator=generator)[:, wanted]
    mirror = (torch.rand(whole, 1, generator=generator) < 0.5)[wanted]
    return down, right, mirror


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


# -- crops of any size -------------------------------------------------------------------------------------

CROP_AREA = (0.08, 1.0)  # of the picture; torchvision's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
CROP_TRIES = 10


def random_boxes(aspects: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
    """A random box for each picture, (n, 4): left, top, width and height as shares of the picture's own.

    As torchvision's RandomResizedCrop draws them, but for the rounding to whole pixels: an area of 0.08 to 1 of the
    picture's and a ratio of 3/4 to 4/3 (even in its logarithm), at a random place; where none of 10 tries fits, the
    largest box in the middle that keeps to the ratios. aspects: width over height, (n,), of a `part` of a batch.
    """
    count = len(aspects)
    rows, whole = part or Part(slice(None), count)
    low, high = CROP_AREA
    area = low + (high - low) * torch.rand(CROP_TRIES, whole, generator=generator)[:, rows]
    narrow, wide = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.exp(narrow + (wide - narrow) * torch.rand(CROP_TRIES, whole, generator=generator)[:, rows])
    place = torch.rand(whole, 2, generator=generator)[rows]
    sizes = torch.stack([(area * ratio / aspects).sqrt(), (area * aspects / ratio).sqrt()], dim=2)
    fits = (sizes <= 1).all(2)
    first = sizes[fits.int().argmax(0), torch.arange(count)]
    allowed = aspects.clamp(*CROP_RATIO)
    largest = torch.stack([(allowed / aspects).clamp(max=1), (aspects / allowed).clamp(max=1)], dim=1)
    found = fits.any(0).unsqueeze(1)
    size = torch.where(found, first, largest)
    corner = torch.where(found, place, 0.5) * (1 - size)
    return torch.cat([corner, size], dim=1)


def central_boxes(aspects: Tensor, share: float) -> Tensor:
    """The square in the middle of each picture whose side is `share` of the shorter side, as `random_boxes`."""
    size = share * torch.stack([(1 / aspects).clamp(max=1), aspects.clamp(max=1)], dim=1)
    return torch.cat([(1 - size) / 2, size], dim=1)


def resized_crops(images: Tensor, boxes: Tensor, size: int, mirror: Tensor | None = None) -> Tensor:
    """The part in each picture's box at size x size, float32 (n, channels, size, size), mirrored where asked.

    images: (n, channels, side, side), squeezed to squares. Bilinear; where a picture has twice the pixels of a crop
    or more, so many times as many places are sampled each way and averaged, so that nothing is skipped.
    """
    left, top, width, height = boxes.unbind(1)
    across = width if mirror is None else torch.where(mirror, -width, width)
    nothing = torch.zeros_like(width)
    maps = torch.stack(
        [
            torch.stack([across, nothing, 2 * left + width - 1], dim=1),
            torch.stack([nothing, height, 2 * top + height - 1], dim=1),
        ],
        dim=1,
    ).to(images.device)
    times = max(1, images.shape[-1] // size)
    shape = [len(images), images.shape[1], size * times, size * times]
    grid = nn.functional.affine_grid(maps, shape, align_corners=False)
    sampled = nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return nn.functional.avg_pool2d(sampled, times) if times > 1 else sampled
