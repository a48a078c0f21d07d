"""Where the real data sets lie, for tests that need them."""

import os
from pathlib import Path

import pytest

from archopt.lab.data import DataFolder, list_sets


def real_data_path() -> Path:
    """The folder named by ARCHOPT_DATA, else `shared/data` beside the repository."""
    named = os.environ.get("ARCHOPT_DATA")
    return Path(named).resolve() if named else Path(__file__).resolve().parents[2] / "shared" / "data"


def real_data(name: str) -> DataFolder:
    """The data folder, if it has the set; else the test is skipped with the command that would get it."""
    folder = DataFolder(real_data_path())
    info = next(info for info in list_sets(folder) if info.name == name)
    if info.where is None:
        pytest.skip(f"{name} is not in {folder.path} (set ARCHOPT_DATA, or run `{info.command}`)")
    return folder
