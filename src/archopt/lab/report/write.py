"""What the report leaves behind: the page, the pictures and the tables as files; and the tables in the terminal."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from archopt.lab.report import reproduction
from archopt.lab.report.load import ReportError, load
from archopt.lab.report.reproduction import PAGE, load_reproduction
from archopt.lab.report.statistics import summarise
from archopt.lab.report.style import styles
from archopt.lab.report.table import as_json, markdown, show

PNG_SCALE = 2.0
"""Pixels of a PNG for each of the picture's own, so that it is sharp on a fine screen."""


def print_table(
    folder: Path, console: Console | None = None, *, target: float | Mapping[str, float] | None = None
) -> None:
    """Prints the tables of a comparison. Arguments and errors as `write_report` has them."""
    comparison = load(Path(folder))
    show(comparison, summarise(comparison, target), console or Console())


def write_report(folder: Path, *, target: float | Mapping[str, float] | None = None) -> Path:
    """Writes the page of a comparison, its pictures and tables into its folder, and returns the page's path.

    The folder is one that `archopt compare` wrote: `report.html`, `table.md`, `table.json` and `figures/*.png` and
    `*.svg` are put beside its records, each written whole or not at all. `target` is the value of the metric whose
    time is told (a fraction where the metric is shown in per cent), one for all workloads or one by their names;
    without it, it lies 95 % of the way from before training to the best mean.

    Raises ReportError, with one line that names the file, where there are no runs, a record is broken, or the page
    cannot be written.
    """
    from archopt.lab.report import (
        render,
    )  # altair and vl-convert take a second that the table alone need not wait

    comparison = load(Path(folder))
    summaries = summarise(comparison, target)
    looks = styles(optimizer.label for optimizer in comparison.optimizers)
    drawn = render.draw(comparison, summaries, looks)
    for name, content in drawn.files(PNG_SCALE):
        _write(comparison.folder / name, content)
    _write(comparison.folder / "table.md", markdown(comparison, summaries).encode())
    table = json.dumps(as_json(comparison, summaries), indent=1, allow_nan=False) + "\n"
    _write(comparison.folder / "table.json", table.encode())
    _write(comparison.folder / PAGE, drawn.page.encode())
    return comparison.folder / PAGE


def write_reproduction(folder: Path) -> Path:
    """Writes the page of a reproduction, `report.html` and `report.md`, and that of each of its comparisons.

    Returns the page's path. Raises ReportError as `write_report` does.
    """
    from archopt.lab.report import render

    found = load_reproduction(Path(folder))
    for part in found.parts:
        if part.workloads:
            write_report(found.folder / part.name)
    _write(found.folder / "report.md", reproduction.markdown(found).encode())
    _write(found.folder / PAGE, reproduction.page(found, render.program()).encode())
    return found.folder / PAGE


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ReportError(
            f"cannot write {path}: {error.strerror or error}; the records are unharmed, make room or give "
            "permission and run `archopt report` again"
        ) from error
