"""Lines of a number over training: what panels of curves are filled with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from archopt.lab.report import text
from archopt.lab.report.load import Run
from archopt.lab.report.panels import Line, Panel, Sample, Stray, curves
from archopt.lab.report.statistics import Cell, CurvePoint, Value, curve
from archopt.lab.report.style import Axis

MOST_POINTS = 200
"""A line is drawn through no more evaluations than these, evenly chosen, the last among them."""

T = TypeVar("T")


def values_of(runs: Iterable[Run], value: Value) -> list[float]:
    return [number for run in runs for point in run.points if (number := value(point)) is not None]


def draw_lines(
    panel: Panel,
    cells: dict[str, Cell],
    value: Value,
    axis: Axis,
    *,
    seconds: bool,
    band: tuple[Value, Value] | None = None,
) -> Panel:
    """Fills a panel with lines of a number over training; bands go from the least to the greatest of the seeds, or
    of what `band` reads."""
    lines = []
    for label, cell in cells.items():
        name = text.setting(label, cell.lr)
        samples = [
            Sample(
                x=point.seconds if seconds else point.step,
                y=point.mean,
                low=point.low,
                high=point.high,
                note={
                    "setting": name,
                    "step": f"{point.step:,}",
                    "time": text.duration(point.seconds),
                    "mean": _number(axis, point.mean),
                    "range": f"{_number(axis, point.low)} to {_number(axis, point.high)}",
                },
            )
            for point in _thin(_banded(cell.finished, value, band))
        ]
        strays = [
            Stray(
                run.folder,
                _thin(_track(run, value, seconds=seconds)),
                f"{name}, seed {run.seed}: {run.status}" if run.status in ("diverged", "failed") else "",
            )
            for run in cell.runs
            if run.points and run.status != "finished"
        ]
        lines.append(Line(label, name, samples, strays))
    return curves(panel, lines, axis, "training seconds" if seconds else "steps")


def _banded(runs: Sequence[Run], value: Value, band: tuple[Value, Value] | None) -> Sequence[CurvePoint]:
    points = curve(runs, value)
    if band is None:
        return points
    lows, highs = ({point.step: point for point in curve(runs, edge)} for edge in band)
    return [replace(point, low=lows[point.step].low, high=highs[point.step].high) for point in points]


def _track(run: Run, value: Value, *, seconds: bool) -> list[tuple[float, float]]:
    """A single run's finite values."""
    return [
        (point.seconds if seconds else float(point.step), number)
        for point in run.points
        if (number := value(point)) is not None
    ]


def _thin(points: Sequence[T]) -> Sequence[T]:
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::-1][::stride][::-1]


def _number(axis: Axis, number: float) -> str:
    return f"{100 * number:.2f} %" if axis.percent else f"{number:.4g}"
