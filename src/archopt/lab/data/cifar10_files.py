"""Readers of CIFAR (A. Krizhevsky 2009): the original batches of both sets, lossless WebP sheets of CIFAR-10."""

import importlib.resources
import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.folder import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
BATCH = 10_000  # images in a file of the original
SHEET = 500  # images in a sheet
HALF_TRAIN, HALF_TEST = 25_000, 5_000

# What an array in a pickle needs, and nothing else; the first is numpy's own maker of arrays, wherever it keeps it.
_ALLOWED = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
_HOMES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays, numbers, texts, lists and dicts; a pickle that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in _HOMES or name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")
        return _ALLOWED[name]


def read_batch(content: bytes, name: str = "the file") -> NDArray[np.uint8]:
    """A file of the original: (images, 3073) uint8, the label and then 3 x 32 x 32 pixels.

    Raises DataError, beginning with `name`, for anything else; never runs what a pickle asks for.
    """
    return _read_batch(content, name, "CIFAR-10", b"labels")


def read_fine_batch(content: bytes, name: str = "the file") -> NDArray[np.uint8]:
    """The same of CIFAR-100, whose pictures have two labels: that of the class, one of a hundred, is taken."""
    return _read_batch(content, name, "CIFAR-100", b"fine_labels")


def _read_batch(content: bytes, name: str, known: str, key: bytes) -> NDArray[np.uint8]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        labels, images = np.asarray(batch[key], np.uint8), batch[b"data"]
        if images.dtype != np.uint8 or images.shape != (len(labels), PIXELS):
            raise ValueError(f"its pixels are {images.dtype} {images.shape}, its labels {len(labels)}")
    except Exception as error:  # bytes that are no pickle of a batch may raise anything
        raise DataError(f"{name} is no batch of {known}: {error}") from error
    return np.column_stack([labels, images])


def read_sheet(content: bytes, name: str = "the file") -> NDArray[np.uint8]:
    """The images of a sheet, (images, 3, 32, 32) uint8.

    Raises DataError, beginning with `name`, where the sheet is damaged, and where Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{name} needs Pillow to be read: pip install 'archopt[lab]'") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is damaged, or no picture: {error}") from error
    height, width, _ = pixels.shape
    if width != SIDE or height % SIDE:
        raise DataError(f"{name} is {width} x {height} pixels, expected images of 32 x 32 below each other")
    return pixels.reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)


def read_labels(content: bytes, name: str = "the file") -> NDArray[np.uint8]:
    """The labels in `index.npz`: those to train on, then those to test on. DataError where there are none."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as index:
            return np.concatenate([index["train_label"], index["test_label"]])
    except Exception as error:  # bytes that are no such archive may raise anything
        raise DataError(f"{name} is damaged, or no index of CIFAR-10: {error}") from error


def half_checksums() -> dict[str, str]:
    """The checksum of each file of the half set, by name, from the list that ships with the package."""
    listed = importlib.resources.files(__package__).joinpath("cifar10_half.txt").read_text()
    pairs = (line.split() for line in listed.splitlines() if not line.startswith("#"))
    return {name: f"sha256:{digest}" for digest, name in pairs}
