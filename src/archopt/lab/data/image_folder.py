"""Pictures in folders: `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`, as ImageNet is usually unpacked.

Every picture is decoded and squeezed to a square of `side` pixels; how wide it was for its height is kept, so that
crops can be drawn in its own proportions. A small set is decoded once and held as bytes; of a larger one each batch
is decoded by threads when it is needed, the next one ahead.
"""

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archopt.lab.data.folder import DataError, DataFolder, sha256

IMAGENET_FOLDERS = ("imagenet", "imagenette-sample")
"""Where ImageNet's pictures may lie, below the data folder; the second is a sample of ten classes."""
ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
HELD_BYTES = 2 * 2**30  # a set that takes no more than this is held
WORKERS = 24  # threads that decode; Pillow works outside Python's lock
Decoded = tuple[NDArray[np.uint8], float]


class Pictures(Protocol):
    """The pictures of one part of a set."""

    def take(self, rows: Tensor, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those rows: (n, 3, side, side) uint8, and width over height of each, (n,) float32 on the CPU.

        following: the rows that will be asked for next.
        """

    def to(self, device: torch.device) -> None:
        """Moves what is held to the device."""


@dataclass
class Part:
    """A part of a set. Pictures in order of class and file name; targets (n,) int64."""

    pictures: Pictures
    targets: Tensor


@dataclass
class ImageFolder:
    """A set of pictures in folders."""

    train: Part
    val: Part
    classes: tuple[str, ...]


def first_folder(data: DataFolder, names: Iterable[str]) -> Path | None:
    """The first of the folders of these names that is there, below the data folder; None where none is."""
    places = [data.path / name for name in names] if data.path is not None else []
    return next((place for place in places if place.is_dir()), None)


def load_image_folder(
    data: DataFolder, names: Iterable[str], side: int, elsewhere: str = "name another folder with --folder"
) -> ImageFolder:
    """The first of the folders of these names that is there, below the data folder.

    elsewhere: what a message says to do where the pictures lie in another place.
    A checksum of each part is recorded: of its files' names and contents where they are held, else of their names
    and sizes. Raises DataError where there is no such folder, or no classes in it, or a picture cannot be read.
    """
    names = tuple(names)
    if data.path is None:
        raise DataError(f"{names[0]} lies in a data folder, but none is given; name one with --data DIR")
    root = first_folder(data, names)
    if root is None:
        absent = "" if data.path.is_dir() else " (no such folder)"
        raise DataError(
            f"{' or '.join(names)} is not in {data.path}{absent}; put the pictures there as "
            f"{names[0]}/train/CLASS/*.JPEG and {names[0]}/val/CLASS/*.JPEG, or {elsewhere}"
        )
    classes = _classes(root / "train")
    if extra := sorted(set(_classes(root / "val")) ^ set(classes)):
        raise DataError(
            f"{root}: class {extra[0]!r} is in only one of train/ and val/; both need the same folders (ImageNet's "
            "validation archive has none: sort its files into them)"
        )
    train, val = (_part(data, root.name, part, classes, side) for part in ("train", "val"))
    return ImageFolder(train, val, classes)


def _classes(folder: Path) -> tuple[str, ...]:
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()
    if not found:
        raise DataError(f"{folder} has no folder for each class; expected {folder}/CLASS/*.JPEG")
    return found


def _part(data: DataFolder, name: str, part: str, classes: tuple[str, ...], side: int) -> Part:
    assert data.path is not None
    root = data.path / name / part
    files: list[Path] = []
    targets: list[int] = []
    for label, kind in enumerate(classes):
        found = sorted(path for path in (root / kind).iterdir() if path.suffix.lower() in ENDINGS)
        if not found:
            raise DataError(f"{root / kind} has no pictures; expected files like *.JPEG")
        files += found
        targets += [label] * len(found)
    held = len(files) * 3 * side * side <= HELD_BYTES
    data.checksums[f"{name}/{part}"] = _checksum(root, files, contents=held)
    pictures = HeldPictures(files, side) if held else ReadPictures(files, side)
    return Part(pictures, torch.tensor(targets))


def _checksum(root: Path, files: Iterable[Path], contents: bool) -> str:
    digest = hashlib.sha256()
    for file in files:
        told = sha256(_content(file)) if contents else f"{file.stat().st_size} bytes"
        digest.update(f"{file.relative_to(root).as_posix()} {told}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def decode(file: Path, side: int) -> Decoded:
    """A picture squeezed to (3, side, side), and its width over its height; grey ones get three equal channels.

    Raises DataError, which names the file, where it is damaged or no picture, and where Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{file} needs Pillow to be read: pip install 'archopt[lab]'") from error
    try:
        with Image.open(io.BytesIO(_content(file))) as image:
            width, height = image.size
            image.draft(
                "RGB", (side, side)
            )  # a JPEG far larger than needed is decoded at a fraction of its size
            squeezed = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is damaged, or no picture: {error}; get it again, or remove it") from error
    return np.asarray(squeezed).transpose(2, 0, 1), width / height


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(WORKERS, 2 * (os.cpu_count() or 1)), "archopt-pictures")


class HeldPictures:
    """All pictures decoded, in memory."""

    def __init__(self, files: list[Path], side: int) -> None:
        with _pool() as pool:
            decoded = list(pool.map(decode, files, [side] * len(files)))
        self.images, self.aspects = _stacked(decoded)

    def take(self, rows: Tensor, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, rows), self.aspects[rows.cpu()]

    def to(self, device: torch.device) -> None:
        self.images = self.images.to(device)


class ReadPictures:
    """Pictures decoded when they are asked for, those that follow ahead of it."""

    def __init__(self, files: list[Path], side: int) -> None:
        self._files, self._side = files, side
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: tuple[list[int], list[Future[Decoded]]] = [], []
        self._device = torch.device("cpu")

    def _submit(self, rows: list[int]) -> list[Future[Decoded]]:
        if self._threads is None:
            self._threads = _pool()
        return [self._threads.submit(decode, self._files[row], self._side) for row in rows]

    def take(self, rows: Tensor, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wanted = rows.tolist()
        known, futures = self._ahead
        if known != wanted:
            futures = self._submit(wanted)
        if following is not None:
            ahead = following.tolist()
            self._ahead = ahead, self._submit(ahead)
        images, aspects = _stacked([future.result() for future in futures])
        return images.to(self._device), aspects

    def to(self, device: torch.device) -> None:
        self._device = device


def _stacked(decoded: list[Decoded]) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.stack([image for image, _ in decoded]))
    return images, torch.tensor([aspect for _, aspect in decoded])
