"""Small archives in the formats of sets that are not at hand, and the sets themselves made to accept them.

What cannot be had here, CIFAR-100 and Fashion-MNIST, is tested on these: files written byte by byte as the original
ones are, which the readers take once their sizes and checksums are exchanged for those of the originals. That the
originals have the checksums that the package lists can only be seen where they are.
"""

import gzip
import io
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from archopt.lab.data import cifar10, mnist
from archopt.lab.data.folder import md5
from archopt.lab.data.sets import CIFAR100, FASHION_MNIST, DataSet


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes texts and bytes as Python 2 wrote its strings: so do the original files have them."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: bytes | str) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[bytes] = save_string
    dispatch[str] = save_string


def python2_pickle(content: object) -> bytes:
    """`content` as Python 2 wrote it."""
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(content)
    return stream.getvalue()


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    """`array` as an idx file, written by hand."""
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def accepting(known: DataSet, contents: list[bytes], shapes: list[tuple[int, ...]]) -> DataSet:
    """A set that takes these files for its own."""
    files = [
        replace(file, checksum=md5(content), shape=shape)
        for file, content, shape in zip(known.files, contents, shapes, strict=True)
    ]
    return replace(known, files=tuple(files))


def make_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch, train: int = 20, test: int = 10) -> None:
    """`cifar-100-python/train` and `test` below `root`; picture i has the class i % 100 of kind i % 20."""
    contents = []
    for count in (train, test):
        labels = [i % 100 for i in range(count)]
        batch = {
            "filenames": [f"{i}.png" for i in range(count)],
            "batch_label": "a test's",
            "fine_labels": labels,
            "coarse_labels": [label % 20 for label in labels],
            "data": pixels(count, 3072, seed=count),
        }
        contents.append(python2_pickle(batch))
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in zip(("train", "test"), contents):
        (folder / name).write_bytes(content)
    known = accepting(CIFAR100, contents, [(train, 3073), (test, 3073)])
    monkeypatch.setattr(cifar10, "CIFAR100", known)


def make_fashion_mnist(root: Path, monkeypatch: pytest.MonkeyPatch, train: int = 20, test: int = 10) -> None:
    """The four files below `root`, packed; picture i has the class i % 10."""
    arrays = []
    for count in (train, test):
        arrays += [pixels(count, 28, 28, seed=count), (np.arange(count) % 10).astype(np.uint8)]
    contents = [idx(array) for array in arrays]
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for file, content in zip(FASHION_MNIST.files, contents):
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(content))
    known = accepting(FASHION_MNIST, contents, [array.shape for array in arrays])
    monkeypatch.setattr(mnist, "FASHION_MNIST", known)
