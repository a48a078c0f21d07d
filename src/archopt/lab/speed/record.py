"""The record of a measurement: what is derived from the times, and the file that it lies in."""

import datetime
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from archopt.lab.errors import LabError
from archopt.lab.record import explained, read_json, write_json
from archopt.lab.speed.contenders import ADD, COPY, REFERENCE
from archopt.lab.speed.streams import STREAMS

FORMAT = 1

Row = dict[str, Any]
Table = dict[str, Any]


def derive(table: Table) -> Table:
    """The table with what follows from its times, in each measured row:

    median, quartiles: seconds of a step, over all samples.
    to_add, to_adamw: the time over that of `a.add_(b)` and of AdamW(fused=True); None where that is not there.
    bound_to_add: the least that `to_add` can be where memory decides.
    bandwidth: bytes a second, counted by the streams that the rule needs; of_copy: over what a copy reaches.
    state_per_parameter: bytes. transient: what a step allocates, over the size of the weights that it moves.
    training_share: of a whole training step, where that was measured.

    Ratios are medians over the rounds that both were measured in, of the ratio of their medians in that round.
    """
    rows = {row["name"]: row for row in table["rows"] if row["status"] == "measured"}
    dtype = getattr(torch, table["dtype"])
    training = table.get("training_step") or {}
    return {**table, "rows": [_derived(row, rows, dtype, training.get("median")) for row in table["rows"]]}


def _derived(row: Row, rows: Mapping[str, Row], dtype: torch.dtype, training: float | None) -> Row:
    if row["status"] != "measured":
        return row
    samples = [s for found in row["rounds"].values() for s in found]
    median = statistics.median(samples)
    bytes_moved = _bytes(row, dtype)
    bandwidth = bytes_moved / median if bytes_moved else None
    copy, add = rows.get(COPY), rows.get(ADD)
    of_copy = None
    if bytes_moved and copy and (slower := ratio(row, copy)):
        of_copy = bytes_moved / _bytes(copy, dtype) / slower
    return {
        **row,
        "median": median,
        "quartiles": _quartiles(samples),
        "steps": len(samples),
        "to_add": ratio(row, add),
        "to_add_by_round": [found for _, found in _by_round(row, add)],
        "bound_to_add": bytes_moved / _bytes(add, dtype) if bytes_moved and add else None,
        "to_adamw": ratio(row, rows.get(REFERENCE)),
        "bytes_moved": bytes_moved or None,
        "bandwidth": bandwidth,
        "of_copy": of_copy,
        "state_per_parameter": row["state_bytes"] / row["entries"],
        "transient": row["transient_bytes"] / (row["entries"] * dtype.itemsize),
        "training_share": median / (median + training)
        if training and row["name"] not in (ADD, COPY)
        else None,
    }


def _bytes(row: Row, dtype: torch.dtype) -> float:
    """What the rule must move; 0 where that sets no bound."""
    return STREAMS[row["streams"]].bytes(dtype) * row["entries"] if row["streams"] else 0


def _quartiles(samples: list[float]) -> list[float]:
    if len(samples) < 2:
        return [samples[0], samples[0]]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return [first, third]


def ratio(row: Row, reference: Row | None) -> float | None:
    """How many times as long a step takes; None without a reference or a round that both have."""
    found = [value for _, value in _by_round(row, reference)]
    return statistics.median(found) if found else None


def _by_round(row: Row, reference: Row | None) -> Iterable[tuple[str, float]]:
    for index in row["rounds"] if reference else ():
        if reference and index in reference["rounds"]:
            below = statistics.median(reference["rounds"][index])
            yield index, statistics.median(row["rounds"][index]) / below


# -- the file ----------------------------------------------------------------------------------------------


def new_path(folder: Path, name: str | None, device: str) -> Path:
    """Where a new record goes. Raises LabError where there is one already: nothing is overwritten."""
    if name is None:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        name = f"{slug}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[\w.+-]+", name):
        raise LabError(f"--name {name!r}, expected letters, digits, dots and hyphens")
    path = folder / f"{name.removesuffix('.json')}.json"
    if path.exists():
        raise LabError(
            f"{path} is there already and stays as it is; give another --name, or look at it by --from"
        )
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the record whole or not at all. Raises RecordError where that fails."""
    write_json(path, record)


def read(path: Path) -> dict[str, Any]:
    """A record, derived again by today's rules. Raises LabError where the file is none."""
    if not path.is_file():
        raise LabError(f"no record {path}; expected the JSON file that `archopt speed` wrote")
    record = read_json(path)
    if record.get("format") != FORMAT or "tables" not in record:
        raise LabError(f"{path} is no record of `archopt speed` (format {FORMAT})")
    try:
        return {**record, "tables": [derive(table) for table in record["tables"]]}
    except (KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{path} is damaged: {type(error).__name__} {error}") from error
