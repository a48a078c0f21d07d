"""MNIST and Fashion-MNIST as arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.folder import DataFolder
from archopt.lab.data.sets import FASHION_MNIST, MNIST


@dataclass(frozen=True)
class Images:
    """A split set of images: pixels and labels, for training and for testing. Arrays may be read-only."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def load_mnist(data: DataFolder) -> Images:
    """MNIST: images (60000, 28, 28) and (10000, 28, 28), pixels 0 to 255, labels 0 to 9.

    The files are checked by the md5 of their unpacked content. Raises DataError with the one command needed
    where a file is missing, truncated, damaged or another.
    """
    return Images(*(MNIST.read(data, file) for file in MNIST.files))


def load_fashion_mnist(data: DataFolder) -> Images:
    """Fashion-MNIST, in the same shapes and checked in the same way."""
    return Images(*(FASHION_MNIST.read(data, file) for file in FASHION_MNIST.files))
