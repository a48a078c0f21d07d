"""The public data sets that the laboratory knows: their files, how to recognise them, where to get them."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.cifar10_files import (
    BATCH,
    HALF_TEST,
    HALF_TRAIN,
    PIXELS,
    SHEET,
    SIDE,
    half_checksums,
    read_batch,
    read_labels,
    read_sheet,
)
from archopt.lab.data.folder import DataError, DataFolder, md5, sha256
from archopt.lab.data.idx import read_idx, unpack
from archopt.optim.base import nearest


def read_text(content: bytes, name: str = "the file") -> NDArray[np.uint8]:
    """The bytes of a text, (length,); any content is one."""
    return np.frombuffer(content, np.uint8)


@dataclass(frozen=True)
class DataFile:
    """One file of a set, named without `.gz`. The checksum is of the unpacked content: who packed it is
    all one."""

    name: str
    checksum: str
    shape: tuple[int, ...]
    reader: Callable[[bytes, str], NDArray[Any]] = read_idx
    """The array in the unpacked content; DataError, beginning with the name it is given, where there is none."""
    suffix: str = ".gz"
    """What stands behind the name where mirrors serve the file."""

    @property
    def served(self) -> str:
        """The name under which mirrors serve the file, and under which it is put into a data folder."""
        return f"{self.name}{self.suffix}"

    def check(self, content: bytes, where: str) -> NDArray[Any]:
        """The array in `content`, packed or not. DataError, beginning with `where`, if it is another."""
        content = unpack(content, where)
        array = self.reader(content, where)
        if array.shape != self.shape:
            raise DataError(
                f"{where} is the wrong file: its array has shape {array.shape}, {self.name} has {self.shape}"
            )
        found = (sha256 if self.checksum.startswith("sha256:") else md5)(content)
        if found != self.checksum:
            raise DataError(
                f"{where} is damaged, or from another set with the same file names: "
                f"unpacked it has {found}, expected {self.checksum}"
            )
        return array


@dataclass(frozen=True)
class DataSet:
    """A public set. `folders` are the places below a data folder where its files may lie, tried in order."""

    name: str
    what: str
    licence: str
    folders: tuple[str, ...] = ()
    files: tuple[DataFile, ...] = ()
    mirrors: tuple[str, ...] = ()
    """Addresses of folders that serve the files; tried in order."""
    archive: str | None = None
    """The tar archive in which mirrors serve all files together."""

    def fetch_command(self, folder: DataFolder) -> str:
        """The one command that gets this set into `folder`; without mirrors, from a folder that has it."""
        where = f" --data {shlex.quote(str(folder.path))}" if folder.path else ""
        if not self.mirrors:
            return f"archopt data import FOLDER {self.name}{where}"
        return f"archopt data fetch {self.name}{where}"

    def complete(self, root: Path) -> bool:
        """Whether all files are there; reading checks them."""
        return all(self.find(root, file) for file in self.files)

    def places(self, root: Path, file: DataFile) -> Iterator[Path]:
        """Where a file may lie below `root`, in the order in which places are tried."""
        for place in self.folders:
            yield root / place / f"{file.name}.gz"
            yield root / place / file.name

    def find(self, root: Path, file: DataFile) -> Path | None:
        """The first place that holds the file, or None."""
        return next((place for place in self.places(root, file) if place.is_file()), None)

    def read(self, folder: DataFolder, file: DataFile) -> NDArray[Any]:
        """A file's array, checked and its checksum recorded; DataError with the command that is needed."""
        remedy = f"`{self.fetch_command(folder)}` gets it"
        if folder.path is None:
            raise DataError(f"{self.name} lies in a data folder, but none is given; {remedy}")
        found = self.find(folder.path, file)
        if found is None:
            raise DataError(
                f"{self.name}: {file.served} is not in {folder.path}{missing_folder(folder.path)}; "
                f"{remedy}, or name the folder that has it with --data DIR"
            )
        try:
            array = file.check(found.read_bytes(), str(found))
        except OSError as error:
            raise DataError(f"cannot read {found}: {error.strerror}; {remedy} again") from error
        except DataError as error:
            raise DataError(f"{error}; {remedy} again") from error
        folder.checksums[f"{self.name}/{file.name}"] = file.checksum
        return array


def missing_folder(path: Path) -> str:
    return "" if path.is_dir() else " (no such folder)"


DIGITS = DataSet(
    name="digits",
    what="1,797 handwritten digits, 8 x 8 grey (UCI, E. Alpaydin and C. Kaynak)",
    licence="CC BY 4.0",
)

MNIST = DataSet(
    name="mnist",
    what="MNIST: 60,000 + 10,000 handwritten digits, 28 x 28 grey (Y. LeCun and C. Cortes)",
    licence="CC BY-SA 3.0",
    folders=("mnist", "MNIST/raw", "."),
    files=(
        DataFile("train-images-idx3-ubyte", "md5:6bbc9ace898e44ae57da46a324031adb", (60000, 28, 28)),
        DataFile("train-labels-idx1-ubyte", "md5:a25bea736e30d166cdddb491f175f624", (60000,)),
        DataFile("t10k-images-idx3-ubyte", "md5:2646ac647ad5339dbf082846283269ea", (10000, 28, 28)),
        DataFile("t10k-labels-idx1-ubyte", "md5:27ae3e4e09519cfbb04c329615203637", (10000,)),
    ),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

TINY_SHAKESPEARE = DataSet(
    name="tinyshakespeare",
    what="tiny Shakespeare: 1,115,394 characters of his plays, 65 of them different (A. Karpathy)",
    licence="public domain",
    folders=("tinyshakespeare",),
    files=(
        DataFile("input.txt", "md5:6fb458f1232090904fb40fe944165e91", (1_115_394,), read_text, suffix=""),
    ),
    mirrors=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",),
)

CIFAR10 = DataSet(
    name="cifar10",
    what="CIFAR-10: 50,000 + 10,000 photographs of ten classes, 32 x 32 in colour (A. Krizhevsky)",
    licence="none stated; for research, cite the report of 2009",
    folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10"),
    files=tuple(
        DataFile(name, f"md5:{digest}", (BATCH, 1 + PIXELS), read_batch, suffix="")
        for name, digest in (
            ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
            ("test_batch", "40351d587109b95175f43aff81a1287e"),
        )
    ),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    archive="cifar-10-python.tar.gz",
)


def _half_file(name: str, checksum: str) -> DataFile:
    if name == "index.npz":
        return DataFile(name, checksum, (HALF_TRAIN + HALF_TEST,), read_labels, suffix="")
    return DataFile(name, checksum, (SHEET, 3, SIDE, SIDE), read_sheet, suffix="")


CIFAR10_HALF = DataSet(
    name="cifar10-half",
    what="half of CIFAR-10, the first images of each class: 25,000 + 5,000, lossless WebP sheets",
    licence=CIFAR10.licence,
    folders=("cifar10",),
    # The labels, the sheets to train on, the sheets to test on: in the list's order.
    files=tuple(_half_file(name, checksum) for name, checksum in half_checksums().items()),
)

SETS = {known.name: known for known in (DIGITS, MNIST, TINY_SHAKESPEARE, CIFAR10, CIFAR10_HALF)}


def data_set(name: str) -> DataSet:
    """The set of this name. Raises DataError, with the nearest name, where there is none."""
    if name not in SETS:
        raise DataError(f"no data set {name!r}{nearest(name, SETS)} (known: {', '.join(SETS)})")
    return SETS[name]


@dataclass(frozen=True)
class SetInfo:
    """A line of `archopt data list`."""

    name: str
    what: str
    licence: str
    where: str | None
    """The folder that holds it, or that it ships with the package; None while files are missing."""
    missing: tuple[str, ...]
    """Files that are not there."""
    command: str | None
    """What to type to get it; None where it is there."""


def list_sets(folder: DataFolder) -> list[SetInfo]:
    """Every known set, and where `folder` has it. Only looks whether files are there; reading checks them."""
    return [_info(known, folder) for known in SETS.values()]


def _info(known: DataSet, folder: DataFolder) -> SetInfo:
    if not known.files:
        return SetInfo(known.name, known.what, known.licence, "in the package", (), None)
    found = {file.name: folder.path and known.find(folder.path, file) for file in known.files}
    missing = tuple(name for name, place in found.items() if place is None)
    parents = sorted({str(place.parent) for place in found.values() if place is not None})
    return SetInfo(
        known.name,
        known.what,
        known.licence,
        None if missing else ", ".join(parents),
        missing,
        known.fetch_command(folder) if missing else None,
    )
