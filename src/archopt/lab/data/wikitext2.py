"""WikiText-2 as numbers (S. Merity et al. 2016, arXiv:1609.07843; word level, rare words already `<unk>`)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.folder import DataFolder
from archopt.lab.data.sets import WIKITEXT2

END_OF_LINE = "<eos>"


@dataclass(frozen=True)
class Words:
    """A split text: each word as its place in the vocabulary, in the text's order."""

    train: NDArray[np.int32]
    validation: NDArray[np.int32]
    test: NDArray[np.int32]
    vocabulary: tuple[str, ...]


def words_of(text: str) -> list[str]:
    """The words between white space, `<eos>` behind each line."""
    return [word for line in text.splitlines() for word in (*line.split(), END_OF_LINE)]


def load_wikitext2(data: DataFolder) -> Words:
    """WikiText-2: 2,088,628, 217,646 and 245,569 words of 33,278, numbered as they appear over all three parts.

    Raises DataError with the one command needed where a file is missing, damaged or another.
    """
    vocabulary: dict[str, int] = {}
    parts = []
    for file in WIKITEXT2.files:
        words = words_of(WIKITEXT2.read(data, file).tobytes().decode())
        parts.append(np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], np.int32))
    train, validation, test = parts
    return Words(train, validation, test, tuple(vocabulary))
