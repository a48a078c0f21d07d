"""The folder that holds the data sets, and the checksums of everything that was read from it."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path


class DataError(Exception):
    """Data that is missing, damaged or not what it says: one line, with the command or file that helps."""


@dataclass
class DataFolder:
    """A folder of data sets (None: only what ships with the package), as a workload's `load` receives it."""

    path: Path | None
    checksums: dict[str, str] = field(default_factory=dict)
    """Name -> checksum of the unpacked content of everything read so far; it enters a run's `config.json`."""

    def read(self, name: str | Path) -> bytes:
        """The content of a file, for workloads with data of their own; its sha256 is recorded.

        name: relative to the folder, or an absolute path (recorded under its last component, so that a run
        keeps its identity on another machine). Raises DataError where there is no such file.
        """
        file = Path(name).expanduser()
        if not file.is_absolute():
            if self.path is None:
                raise DataError(f"{name} lies in a data folder, but none is given; name one with --data DIR")
            file = self.path / file
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read {file}: {error.strerror}; put it there, or name its folder with --data DIR"
            ) from error
        self.checksums[file.name if Path(name).is_absolute() else str(name)] = sha256(content)
        return content


def sha256(content: bytes) -> str:
    """The checksum as records spell it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def md5(content: bytes) -> str:
    """The checksum by which MNIST's files are known, as records spell it."""
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def default_data_folder(path: str | Path | None = None) -> DataFolder:
    """`path` where given (`--data`), else the environment's ARCHOPT_DATA, else `archopt/data` in the cache.

    Nothing is created or read here; a folder that does not exist shows when a set is read from it.
    """
    if path is not None:
        return DataFolder(Path(path).expanduser())
    if named := os.environ.get("ARCHOPT_DATA"):
        return DataFolder(Path(named).expanduser())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return DataFolder(cache / "archopt" / "data")
