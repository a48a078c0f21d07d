"""The sets that AGD's program (2304.05187) classifies, each as the pictures of a step.

Training pictures of cifar10 and cifar100 are padded by 4 black pixels, cut at a random place and mirrored every
second time; of imagenet a random part is taken, mirrored likewise; those of mnist and fashion-mnist stay as they
are. So do all test pictures, imagenet's the middle 224 of a shorter side of 256. All are normalised by channel with
the published numbers. The program does not know fashion-mnist: its numbers are the usual mean and deviation of its
training pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from archopt.lab.data.cifar10 import load_cifar10, load_cifar100
from archopt.lab.data.folder import DataError, DataFolder
from archopt.lab.data.image_folder import IMAGENET_FOLDERS, ImageFolder, load_image_folder
from archopt.lab.data.mnist import Images, load_fashion_mnist, load_mnist
from archopt.lab.pictures import (
    CIFAR10_MEAN,
    Part,
    central_boxes,
    cropped_and_mirrored_rows,
    normalized,
    padded,
    random_boxes,
    resized_crops,
)

SQUARE = 512 / 224  # ImageNet's pictures are kept as squares of so many times the side of a crop
CENTRE = 224 / 256  # of the shorter side


@dataclass(frozen=True)
class Known:
    """What is known of a set before anything is read."""

    shape: tuple[int, int, int]
    """Channels, height and width of a picture as the network gets it, at the published size."""
    classes: int
    train: int
    """Pictures to train on in the published set."""
    test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    changed: bool = True
    """Whether training pictures are shifted and mirrored."""


KNOWN = {
    "cifar10": Known((3, 32, 32), 10, 50_000, 10_000, CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),
    "cifar100": Known((3, 32, 32), 100, 50_000, 10_000, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mnist": Known((1, 28, 28), 10, 60_000, 10_000, (0.1307,), (0.3081,), changed=False),
    "fashion-mnist": Known((1, 28, 28), 10, 60_000, 10_000, (0.2860,), (0.3530,), changed=False),
    "imagenet": Known((3, 224, 224), 1_000, 1_281_167, 50_000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Classified(Protocol):
    """Pictures with their classes, the parts numbered from 0."""

    classes: int
    train_targets: Tensor
    test_targets: Tensor
    reads_ahead: bool
    """Whether it helps to say which pictures will be asked for next."""

    def training(
        self,
        rows: Tensor,
        generator: torch.Generator,
        following: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Those pictures to train on, changed as the generator draws: (n, channels, h, w) float32.

        part: of which batch they are a part, where they are not all of it.
        """

    def testing(self, rows: Tensor, following: Tensor | None = None) -> Tensor:
        """Those pictures to test on."""

    def to(self, device: torch.device) -> None:
        """Moves the pictures to the device."""


class SmallPictures:
    """Small pictures, held as bytes; with their padding where training pictures are shifted."""

    reads_ahead = False

    def __init__(self, known: Known, images: Images, train: int | None, test: int | None) -> None:
        self._known = known
        self.classes = known.classes
        # Copied: what the readers give may be read-only.
        self._train, self._test = (
            torch.tensor(part[:count]).view(-1, *known.shape).contiguous()
            for part, count in ((images.train_images, train), (images.test_images, test))
        )
        if known.changed:
            self._train = padded(self._train)
        self.train_targets, self.test_targets = (
            torch.tensor(part[:count], dtype=torch.int64)
            for part, count in ((images.train_labels, train), (images.test_labels, test))
        )
        if (largest := int(torch.cat([self.train_targets, self.test_targets]).max())) >= self.classes:
            raise DataError(
                f"a label of {largest} in a set of {self.classes} classes, expected 0 to {self.classes - 1}; "
                "this is another set, get the right one with archopt data fetch"
            )

    def training(
        self,
        rows: Tensor,
        generator: torch.Generator,
        following: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        if self._known.changed:
            pictures = cropped_and_mirrored_rows(self._train, rows, generator, part)
        else:
            pictures = self._train.index_select(0, rows)
        return normalized(pictures, self._known.mean, self._known.std)

    def testing(self, rows: Tensor, following: Tensor | None = None) -> Tensor:
        return normalized(self._test.index_select(0, rows), self._known.mean, self._known.std)

    def to(self, device: torch.device) -> None:
        self._train, self._test = self._train.to(device), self._test.to(device)


class Photographs:
    """Photographs in folders, of which parts are cut."""

    reads_ahead = True

    def __init__(
        self, known: Known, found: ImageFolder, train: int | None, test: int | None, size: int
    ) -> None:
        self._known, self._found, self._size = known, found, size
        self.classes = len(found.classes)
        self._train, self._test = (
            _evenly(len(part.targets), count) for part, count in ((found.train, train), (found.val, test))
        )
        self.train_targets = found.train.targets[self._train]
        self.test_targets = found.val.targets[self._test]

    def training(
        self,
        rows: Tensor,
        generator: torch.Generator,
        following: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        ahead = None if following is None else self._train[following]
        images, aspects = self._found.train.pictures.take(self._train[rows], ahead)
        wanted, whole = part or Part(slice(None), len(rows))
        boxes = random_boxes(aspects, generator, part)
        mirror = (torch.rand(whole, generator=generator) < 0.5)[wanted]
        return normalized(resized_crops(images, boxes, self._size, mirror), self._known.mean, self._known.std)

    def testing(self, rows: Tensor, following: Tensor | None = None) -> Tensor:
        ahead = None if following is None else self._test[following]
        images, aspects = self._found.val.pictures.take(self._test[rows], ahead)
        crops = resized_crops(images, central_boxes(aspects, CENTRE), self._size)
        return normalized(crops, self._known.mean, self._known.std)

    def to(self, device: torch.device) -> None:
        self._train, self._test = self._train.to(device), self._test.to(device)
        for part in (self._found.train, self._found.val):
            part.pictures.to(device)


def _evenly(there: int, count: int | None) -> Tensor:
    """The numbers of `count` of the pictures, evenly from all of them, since they lie class by class."""
    if count is None or count >= there:
        return torch.arange(there)
    return torch.arange(count) * there // count


_READERS: dict[str, Callable[[DataFolder], Images]] = {
    "cifar100": load_cifar100,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
}


def load_classified(
    name: str, data: DataFolder, train: int | None = None, test: int | None = None, size: int = 224
) -> Classified:
    """The set of this name; of its pictures `train` and `test` where that is not all. size: of ImageNet's crops.

    Raises DataError with what is needed where the data are missing or damaged.
    """
    known = KNOWN[name]
    if name == "imagenet":
        elsewhere = "name the data folder that has them with --data DIR"
        found = load_image_folder(data, IMAGENET_FOLDERS, round(SQUARE * size), elsewhere)
        if len(found.classes) < 2:
            raise DataError(
                f"imagenet: {found.classes[0]!r} is the only class in train/ and val/; expected at least two, each "
                "in a folder of its own"
            )
        return Photographs(known, found, train, test, size)
    images = load_cifar10(data, train, test) if name == "cifar10" else _READERS[name](data)
    return SmallPictures(known, images, train, test)
