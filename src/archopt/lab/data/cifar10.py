"""CIFAR-10 and CIFAR-100 as arrays."""

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.cifar10_files import BATCH, HALF_TEST, HALF_TRAIN, SHEET, SIDE
from archopt.lab.data.folder import DataError, DataFolder
from archopt.lab.data.mnist import Images
from archopt.lab.data.sets import CIFAR10, CIFAR10_HALF, CIFAR100, DataFile, DataSet


def load_cifar10(data: DataFolder, train: int | None = None, test: int | None = None) -> Images:
    """The first `train` and `test` images (None: all) in the original order: (n, 3, 32, 32), pixels 0 to 255.

    From the original batches (50,000 and 10,000) where the folder has them all, else from the half set (25,000 and
    5,000). Only the files that are needed are read. Raises DataError with what is needed where neither is
    complete or a file is damaged, and where more images are asked for than there are.
    """
    if data.path is not None and not CIFAR10.complete(data.path) and CIFAR10_HALF.complete(data.path):
        there, read = (HALF_TRAIN, HALF_TEST), _half
    else:
        there, read = (5 * BATCH, BATCH), _original
    counts = [have if asked is None else asked for asked, have in zip((train, test), there)]
    for part, count, have in zip(("train", "test"), counts, there):
        if not 1 <= count <= have:
            raise DataError(f"cifar10: {count} images to {part} on, expected 1 to the {have} that are there")
    return read(data, *counts)


def half_note(there: tuple[int, int], train: int | None, test: int | None) -> str:
    """What to say where there are fewer images than asked for, all of CIFAR-10 where None; else nothing."""
    asked = train or 5 * BATCH, test or BATCH
    if all(have >= want for have, want in zip(there, asked)):
        return ""
    return f"half of CIFAR-10: {there[0]:,} + {there[1]:,} images"


def load_cifar100(data: DataFolder) -> Images:
    """All of CIFAR-100 in the original order, as `load_cifar10`; labels are the classes, 0 to 99.

    Raises DataError with what is needed where a file is missing or damaged.
    """
    return _split(*(CIFAR100.read(data, file) for file in CIFAR100.files))


def _split(train: NDArray[np.uint8], test: NDArray[np.uint8]) -> Images:
    """Rows of a label and its pixels, as images."""
    (x, y), (xt, yt) = ((rows[:, 1:].reshape(-1, 3, SIDE, SIDE), rows[:, 0]) for rows in (train, test))
    return Images(x, y, xt, yt)


def _original(data: DataFolder, train: int, test: int) -> Images:
    batches, (last,) = CIFAR10.files[:-1], CIFAR10.files[-1:]
    return _split(_concatenated(CIFAR10, data, batches, train, BATCH), CIFAR10.read(data, last)[:test])


def _half(data: DataFolder, train: int, test: int) -> Images:
    index, *sheets = CIFAR10_HALF.files
    labels = CIFAR10_HALF.read(data, index)
    of_train = HALF_TRAIN // SHEET
    return Images(
        _concatenated(CIFAR10_HALF, data, sheets[:of_train], train, SHEET),
        labels[:train],
        _concatenated(CIFAR10_HALF, data, sheets[of_train:], test, SHEET),
        labels[HALF_TRAIN : HALF_TRAIN + test],
    )


def _concatenated(
    known: DataSet, data: DataFolder, files: list[DataFile] | tuple[DataFile, ...], count: int, each: int
) -> NDArray[np.uint8]:
    """The first `count` rows of the files, which hold `each` apiece."""
    needed = files[: -(-count // each)]
    return np.concatenate([known.read(data, file) for file in needed])[:count]
