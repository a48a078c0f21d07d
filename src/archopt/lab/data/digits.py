"""The digits that ship with the package (digits.txt says whose they are), and their split."""

import importlib.resources

import numpy as np

from archopt.lab.data.folder import DataError, DataFolder, sha256
from archopt.lab.data.idx import unpack
from archopt.lab.data.mnist import Images

FILE = "digits.csv.gz"
CHECKSUM = "sha256:6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"  # of the unpacked file
TRAIN = 1400  # of 1,797; 397 are left to test on
SPLIT_SEED = 0  # of NumPy's RandomState, whose stream is frozen for ever


def load_digits(data: DataFolder) -> Images:
    """The digits: images (1400, 8, 8) and (397, 8, 8), pixels 0 to 16, labels 0 to 9.

    The split is the first 1,400 and the last 397 of `RandomState(0).permutation(1797)`; the thirteen writers
    are in both. Raises DataError where the packaged file is damaged.
    """
    packed = importlib.resources.files(__package__).joinpath(FILE).read_bytes()
    content = unpack(packed, FILE)
    if sha256(content) != CHECKSUM:
        raise DataError(
            f"the packaged {FILE} is damaged ({sha256(content)}, expected {CHECKSUM}); install again"
        )
    data.checksums["digits"] = CHECKSUM
    table = np.array([line.split(b",") for line in content.splitlines()]).astype(np.uint8)
    table = table[np.random.RandomState(SPLIT_SEED).permutation(len(table))]
    images, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
    return Images(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])
