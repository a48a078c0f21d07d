"""The public data sets that the laboratory knows: their files, how to recognise them, where to get them."""

import contextlib
import io
import lzma
import shlex
import tarfile
import zlib
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
    read_fine_batch,
    read_labels,
    read_sheet,
)
from archopt.lab.data.folder import DataError, DataFolder, md5, sha256
from archopt.lab.data.idx import read_idx, unpack
from archopt.lab.data.image_folder import IMAGENET_FOLDERS, first_folder
from archopt.optim.base import nearest


def read_text(content: bytes, name: str = "the file") -> NDArray[np.uint8]:
    """The bytes of a text, (length,); any content is one."""
    return np.frombuffer(content, np.uint8)


@contextlib.contextmanager
def opened_tar(archive: bytes, where: str) -> Iterator[tarfile.TarFile]:
    """The tar archive in these bytes; DataError, beginning with `where`, if it is none or damaged."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{where} is truncated, damaged or no tar archive: {' '.join(str(error).split())}"
        ) from error


def member(archive: bytes, names: tuple[str, ...], where: str) -> bytes:
    """The file of one of these names, in any folder, of a tar archive; DataError, beginning with `where`."""
    with opened_tar(archive, where) as tar:
        for entry in tar:
            if Path(entry.name).name in names and (stream := tar.extractfile(entry)) is not None:
                return stream.read()
    raise DataError(f"{where} is the wrong archive: it has no {' and no '.join(names)}")


class WrongFile(DataError):
    """A file that is whole, but of other data than its name says."""


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
    also: tuple[str, ...] = ()
    """Other names under which the file is in circulation."""

    @property
    def served(self) -> str:
        """The name under which mirrors serve the file, and under which it is put into a data folder."""
        return f"{self.name}{self.suffix}"

    def check(self, content: bytes, where: str) -> NDArray[Any]:
        """The array in `content`, packed or not. DataError, beginning with `where`, if it is another."""
        content = unpack(content, where)
        array = self.reader(content, where)
        if array.shape != self.shape:
            raise WrongFile(
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
    packed: str | None = None
    """The tar archive in which a data folder may hold all files together."""
    otherwise: str = ""
    """What else to do where a file is whole and of other data."""

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
            for name in (file.name, *file.also):
                yield root / place / f"{name}.gz"
                yield root / place / name
        if self.packed is not None:
            yield from (root / place / self.packed for place in self.folders)

    def find(self, root: Path, file: DataFile) -> Path | None:
        """The first place that holds the file, or None."""
        return next((place for place in self.places(root, file) if place.is_file()), None)

    def content(self, place: Path, file: DataFile) -> bytes:
        """A file's bytes from where `find` found it; DataError where that is an archive without it."""
        content = place.read_bytes()
        return content if place.name != self.packed else member(content, (file.name, *file.also), str(place))

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
            array = file.check(self.content(found, file), str(found))
        except OSError as error:
            raise DataError(f"cannot read {found}: {error.strerror}; {remedy} again") from error
        except DataError as error:
            other = self.otherwise if isinstance(error, WrongFile) else ""
            raise DataError(f"{error}; {remedy} again{other}") from error
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

FASHION_MNIST = DataSet(
    name="fashion-mnist",
    what="Fashion-MNIST: 60,000 + 10,000 pictures of ten kinds of clothes, 28 x 28 grey (Zalando Research)",
    licence="MIT",
    # Not in the folder itself: its files have MNIST's names.
    folders=("fashion-mnist", "FashionMNIST/raw"),
    files=(
        DataFile("train-images-idx3-ubyte", "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a", (60000, 28, 28)),
        DataFile("train-labels-idx1-ubyte", "md5:9018921c3c673c538a1fc5bad174d6f9", (60000,)),
        DataFile("t10k-images-idx3-ubyte", "md5:8181f5470baa50b63fa0f6fddb340f0a", (10000, 28, 28)),
        DataFile("t10k-labels-idx1-ubyte", "md5:15d484375f8d13e6eb1aabb0c3f46965", (10000,)),
    ),
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
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
    otherwise=", or, if read_cifar10.py wrote it, name the folder of the sheets that it read (train_00.webp ...)",
)


CIFAR100 = DataSet(
    name="cifar100",
    what="CIFAR-100: 50,000 + 10,000 photographs of a hundred classes, 32 x 32 in colour (A. Krizhevsky)",
    licence=CIFAR10.licence,
    folders=("cifar-100-python", "cifar100/cifar-100-python", "cifar100"),
    files=tuple(
        DataFile(name, f"md5:{digest}", (count, 1 + PIXELS), read_fine_batch, suffix="")
        for name, digest, count in (
            ("train", "16019d7e3df5f24257cddd939b257f8d", 5 * BATCH),
            ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", BATCH),
        )
    ),
    mirrors=CIFAR10.mirrors,
    archive="cifar-100-python.tar.gz",
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

WIKITEXT2 = DataSet(
    name="wikitext-2",
    what="WikiText-2: 2,551,843 words of Wikipedia, 33,278 of them different, rare ones <unk> (S. Merity et al.)",
    licence="CC BY-SA 3.0",
    folders=("wikitext-2",),
    files=(
        DataFile(
            "train.txt",
            "sha256:9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            (10_797_148,),
            read_text,
            suffix="",
            also=("wiki.train.tokens",),
        ),
        DataFile(
            "valid.txt",
            "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            (1_121_681,),
            read_text,
            suffix="",
            also=("wiki.valid.tokens",),
        ),
        DataFile(
            "test.txt",
            "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            (1_256_449,),
            read_text,
            suffix="",
            also=("wiki.test.tokens",),
        ),
    ),
    mirrors=("https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",),
    packed="wikitext-2.tar.xz",
)

MULTI30K = DataSet(
    name="multi30k",
    what="Multi30k, task 1, German and English: 29,000 + 1,014 + 1,000 pairs of sentences (D. Elliott et al.)",
    licence="none stated; from Flickr30k's captions, for research",
    folders=("multi30k",),
    files=tuple(
        DataFile(name, f"sha256:{digest}", (length,), read_text)
        for name, length, digest in (
            ("train.de", 2_110_398, "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
            ("train.en", 1_801_238, "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
            ("val.de", 75_981, "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
            ("val.en", 63_297, "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
            (
                "test_2016_flickr.de",
                70_649,
                "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
            ),
            (
                "test_2016_flickr.en",
                62_076,
                "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
            ),
        )
    ),
    mirrors=("https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",),
)

SETS = {
    known.name: known
    for known in (
        DIGITS,
        MNIST,
        TINY_SHAKESPEARE,
        CIFAR10,
        CIFAR10_HALF,
        CIFAR100,
        FASHION_MNIST,
        WIKITEXT2,
        MULTI30K,
    )
}


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
    return [*(_info(known, folder) for known in SETS.values()), _imagenet(folder)]


def _imagenet(folder: DataFolder) -> SetInfo:
    """Photographs in folders, which nobody may pass on and `archopt data` cannot get."""
    where = first_folder(folder, IMAGENET_FOLDERS)
    name = IMAGENET_FOLDERS[0]
    wanted = f"{name}/train/CLASS/*.JPEG and {name}/val/CLASS/*.JPEG"
    return SetInfo(
        name,
        "photographs in a folder for each class (imagenette-sample: a few of ten classes)",
        "its own terms, see image-net.org",
        None if where is None else str(where),
        () if where else (wanted,),
        None if where else f"put {wanted} into the data folder",
    )


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
