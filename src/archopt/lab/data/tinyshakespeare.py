"""Tiny Shakespeare as numbers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.folder import DataFolder
from archopt.lab.data.sets import TINY_SHAKESPEARE

TRAIN_SHARE = 0.9  # the usual split: the first 90 % of the characters are for training


@dataclass(frozen=True)
class Text:
    """A split text: each character as its place in the vocabulary, in the text's order."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    vocabulary: str


def load_tinyshakespeare(data: DataFolder) -> Text:
    """Tiny Shakespeare: 1,003,854 and 111,540 characters, 0 to 64; the vocabulary is sorted.

    Raises DataError with the one command needed where the file is missing, damaged or another.
    """
    content = TINY_SHAKESPEARE.read(data, TINY_SHAKESPEARE.files[0])
    characters, places = np.unique(content, return_inverse=True)
    ids = places.astype(np.uint8)
    split = int(len(ids) * TRAIN_SHARE)
    return Text(ids[:split], ids[split:], characters.tobytes().decode("ascii"))
