"""Reader of idx, the format of MNIST's files (Y. LeCun): a magic number, the sizes, then the values.

Bytes 0 and 1 are zero, byte 2 is the type, byte 3 the number of dimensions; one big-endian uint32 a dimension
follows, then the values in C order, big-endian.
"""

import gzip
import math
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archopt.lab.data.folder import DataError

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def unpack(content: bytes, name: str) -> bytes:
    """`content` without its gzip wrapping, if it has one; DataError where that is cut short or damaged."""
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise DataError(f"{name} is truncated: its gzip stream ends after {len(content)} bytes") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is damaged: {error}") from error


def read_idx(content: bytes, name: str = "the file") -> NDArray[Any]:
    """The array in an idx file, packed with gzip or not; read-only, on the memory of `content` if it can be.

    Raises DataError, which begins with `name`, for another format, a truncated file and bytes left over.
    """
    content = unpack(content, name)
    if len(content) < 4:
        raise DataError(f"{name} is truncated: {len(content)} bytes, too short for an idx header")
    if content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise DataError(
            f"{name} is no idx file: it begins with {content[:4].hex()}, not with 0000 and a type"
        )
    kind, ndim = np.dtype(_TYPES[content[2]]), content[3]
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{name} is truncated: {len(content)} bytes, but its idx header alone takes {header}")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    size = header + kind.itemsize * math.prod(shape)
    if len(content) != size:
        state = "is truncated" if len(content) < size else "is damaged"
        raise DataError(f"{name} {state}: {len(content)} bytes unpacked, but shape {shape} takes {size}")
    return np.frombuffer(content, kind, offset=header).reshape(shape)
