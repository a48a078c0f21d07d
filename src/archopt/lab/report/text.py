"""How numbers are written, in one place for the terminal, the page and the pictures."""

import math
import re

from archopt.lab.report.load import Metric
from archopt.lab.report.statistics import Cell, Reached, Spread

NONE = "–"
"""Stands where there is nothing to say."""


def rate(lr: float | None) -> str:
    return NONE if lr is None else f"{lr:.3g}"


def file_name(words: str) -> str:
    """Words as files may be called."""
    return re.sub(r"[^\w.+=-]+", "-", words).strip("-.")


def setting(label: str, lr: float | None) -> str:
    """An optimiser at a learning rate, as the pictures name it."""
    return label if lr is None else f"{label} {rate(lr)}"


def value(metric: Metric, number: float | None, unit: bool = True) -> str:
    """A value of the metric: fractions as percentages with two digits, everything else with four figures."""
    if number is None or not math.isfinite(number):
        return NONE
    if metric.percent:
        return f"{100 * number:.2f}{' %' if unit else ''}"
    return f"{number:.4g}{f' {metric.unit}' if unit and metric.unit else ''}"


def mean_and_sd(metric: Metric, spread: Spread | None) -> str:
    """Mean ± population sd over the seeds; the mean alone where there is one seed."""
    if spread is None:
        return NONE
    if spread.count < 2:
        return value(metric, spread.mean, unit=False)
    if metric.percent:
        return f"{100 * spread.mean:.2f} ± {100 * spread.sd:.2f}"
    if spread.sd == 0:
        return f"{spread.mean:.4g} ± 0"
    decimals = 1 - math.floor(math.log10(spread.sd))
    if not 0 <= decimals <= 6:
        return f"{spread.mean:.4g} ± {spread.sd:.2g}"
    return f"{spread.mean:.{decimals}f} ± {spread.sd:.{decimals}f}"


def trouble(cell: Cell) -> str:
    """What became of the seeds that did not finish: "1/3 diverged, 1/3 missing"; empty where all did."""
    runs = len(cell.runs)
    counts = {status: cell.count(status) for status in ("diverged", "failed", "unfinished", "missing")}
    return ", ".join(f"{count}/{runs} {status}" for status, count in counts.items() if count)


def final(cell: Cell | None) -> str:
    """The final metric of a cell with what became of the other seeds."""
    if cell is None:
        return "not run"
    parts = [mean_and_sd(cell.metric, cell.final) if cell.final else "", trouble(cell)]
    return "; ".join(part for part in parts if part)


def reached(when: Reached | None, *, seconds: bool) -> str:
    """Median time to the target, and how many seeds got there where it is not all of them."""
    if when is None:
        return NONE
    numbers = when.seconds if seconds else when.steps
    middle = when.median(numbers)
    text = "never" if math.isinf(middle) else duration(middle) if seconds else f"{middle:,.0f}"
    return text if len(numbers) == when.runs else f"{text} ({len(numbers)}/{when.runs})"


def regret(metric: Metric, number: float | None) -> str:
    if number is None:
        return NONE
    return "unbounded" if math.isinf(number) else value(metric, max(0.0, number), unit=False)


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def share(fraction: float | None) -> str:
    return NONE if fraction is None else f"{100 * fraction:.3g} %"


def listing(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"
