"""How the pictures look: a colour, dash and marker for each optimiser; what an axis shows; where labels stand.

The colours follow the idea of Okabe and Ito's set: the first nine were searched for so that every pair stays
apart under normal, deutan and protan vision, once for a light and once for a dark ground (tests hold them to it).
Dash and marker repeat the distinction for grey print. An optimiser that the laboratory knows has a fixed style; any
other gets one by its label, the same on every page unless another label on the page has taken it.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from archopt.lab.report.load import AVERAGE


@dataclass(frozen=True)
class Style:
    """One optimiser's looks. The page swaps `light` for `dark` in the dark scheme."""

    light: str
    dark: str
    dash: tuple[int, ...]
    marker: str


KNOWN = {
    "nero": Style("#A72100", "#F0553A", (), "circle"),
    "agd": Style("#0265C6", "#5F8FE0", (8, 3), "square"),
    "autonero": Style("#0FA786", "#11C57F", (), "diamond"),
    "adamw": Style("#852266", "#D070A6", (4, 2), "triangle-up"),
    "adam": Style("#CA8700", "#FFA710", (2, 2), "triangle-down"),
    "sgd": Style("#403220", "#F0E9E4", (10, 3, 2, 3), "triangle-right"),
    "lamb": Style("#149CC8", "#4CE0FF", (6, 2, 1, 2), "triangle-left"),
    "madam": Style("#99984E", "#DFE67E", (1, 2), "circle"),
    "muon": Style("#0B0381", "#8A70FF", (12, 2), "square"),
    "nero-roles": Style("#A44852", "#E18668", (3, 1), "diamond"),
    "agd-paper": Style("#0F16C0", "#80B0CC", (2, 1), "triangle-up"),
    "lamb-cs": Style("#8E1098", "#DB1CBD", (12, 3, 1, 3), "triangle-right"),
    "madam-cs": Style("#327527", "#85C8B1", (8, 2, 2, 2), "square"),
}
OTHERS = (
    Style("#7A4B1E", "#C98F55", (6, 3), "circle"),
    Style("#9B6BC9", "#D9BDF5", (5, 1), "triangle-down"),
    Style("#C2185B", "#FF6F91", (9, 4), "square"),
    Style("#00695C", "#4DB6AC", (3, 3), "diamond"),
    Style("#5C6B00", "#B9CC4A", (1, 1), "triangle-left"),
    Style("#8D6E63", "#BCAAA4", (7, 2, 2, 2), "triangle-up"),
)
DOTTED = (1, 4)
"""The dash of an optimiser's average, in the optimiser's own colour."""
TINY = 1e-200
"""Nothing smaller is told from zero."""
DECADES = 6
"""A logarithmic axis shows no more than these: a loss that ends at 1e-12 has long been zero for every purpose."""
CROSS = "M-1,-1L1,1M-1,1L1,-1"
"""Marks the end of a run that diverged or failed."""


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for every label. Where there are more strange labels than styles, some share one.

    An average has its optimiser's colour and marker, and is dotted.
    """
    every = list(labels)
    labels = list(dict.fromkeys(label.removesuffix(AVERAGE) for label in every))
    strange: dict[str, Style] = {}
    taken: set[int] = set()
    for label in sorted(set(labels) - set(KNOWN)):
        slot = zlib.crc32(label.encode()) % len(OTHERS)
        while slot in taken and len(taken) < len(OTHERS):
            slot = (slot + 1) % len(OTHERS)
        taken.add(slot)
        strange[label] = OTHERS[slot]
    own = {label: KNOWN.get(label) or strange[label] for label in labels}
    averages = {label + AVERAGE: replace(style, dash=DOTTED) for label, style in own.items()}
    return {label: {**averages, **own}[label] for label in every}


@dataclass(frozen=True)
class Axis:
    """What a vertical axis shows: from `low` to `high` in the quantity's own values, and how they are spaced.

    "error" is a fraction spaced by the logarithm of what is missing to 1, so that 98 % and 99 % stand apart.
    """

    title: str
    kind: Literal["linear", "log", "error"]
    low: float
    high: float
    percent: bool
    low_is_worse: bool
    ticks: tuple[float, ...] = ()
    """The values that are named, all inside."""

    def clamp(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    @property
    def worst(self) -> float:
        return self.low if self.low_is_worse else self.high

    def plotted(self, value: float) -> float:
        """The number that the scale is given for a value."""
        return 1.0 - value if self.kind == "error" else value

    def height(self, value: float) -> float:
        """Where a value stands between the bottom (0) and the top (1) of the axis; values outside, at its ends."""
        low, high, here = (self._spaced(v) for v in (self.low, self.high, self.clamp(value)))
        return (here - low) / (high - low)

    def at(self, height: float) -> float:
        """The value that stands at a height; the inverse of `height`."""
        low, high = self._spaced(self.low), self._spaced(self.high)
        here = low + height * (high - low)
        if self.kind == "log":
            return math.exp(here)
        return 1.0 - math.exp(-here) if self.kind == "error" else here

    def _spaced(self, value: float) -> float:
        if self.kind == "log":
            return math.log(value)
        return -math.log(1.0 - value) if self.kind == "error" else value

    def cut(self, values: Sequence[float]) -> list[float | None]:
        """What a line through the values plots: it leaves the axis at the edge and is not drawn further out."""
        inside = [self.low <= value <= self.high for value in values]
        near = [any(inside[max(i - 1, 0) : i + 2]) for i in range(len(values))]
        return [self.plotted(self.clamp(v)) if drawn else None for v, drawn in zip(values, near)]

    def scale(self) -> dict[str, Any]:
        """The Vega-Lite scale."""
        domain = sorted((self.plotted(self.low), self.plotted(self.high)))
        kind = "linear" if self.kind == "linear" else "log"
        return {"type": kind, "domain": domain, "nice": False, "zero": False, "reverse": self.kind == "error"}

    def axis(self) -> dict[str, Any]:
        """The Vega-Lite axis: round values, percentages where the quantity is a fraction."""
        shown = "1 - datum.value" if self.kind == "error" else "datum.value"
        return {
            "title": self.title,
            "values": [self.plotted(tick) for tick in self.ticks],
            "labelExpr": f"format({shown}, '{'~%' if self.percent else '~g'}')",
        }

    def with_strip(self, share: float) -> "Axis":
        """The same axis with room beyond its worse end, `share` of the whole height, for what has no value."""
        height = -share / (1 - share) if self.low_is_worse else 1 / (1 - share)
        end = self.at(height)
        return replace(self, low=end) if self.low_is_worse else replace(self, high=end)


def choose_axis(
    title: str,
    values: Iterable[float],
    *,
    percent: bool = False,
    higher_is_better: bool = False,
    start: float | None = None,
) -> Axis | None:
    """An axis that shows the interesting part of the values; None where there is no finite one.

    What is worse than `start` (the value before training) by more than the way from there to the best is left
    outside: a loss that runs away would flatten everything else.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    low, high = min(known), max(known)
    if start is not None and math.isfinite(start) and not percent:
        if higher_is_better:
            low = max(low, min(start - (high - start), high))
        else:
            high = min(high, max(start + (start - low), low))
    if percent and higher_is_better and high > 0.9 and low < high <= 1.0:
        nearest = max(min(1.0 - value for value in known if value < 1.0), 1e-6)
        bottom, top = max(low - 0.02, 0.0), 1.0 - nearest / (2 if high > 1.0 - 1e-6 else 1.15)
        ticks = [1.0 - error for error in _one_two_five(1.0 - top, 1.0 - bottom) if error < 1.0]
        return Axis(title, "error", bottom, top, percent, True, tuple(ticks))
    if not higher_is_better and low > TINY and high / low > 20:
        bottom, top = max(low / 1.15, high * 10.0**-DECADES), high * 1.15
        return Axis(title, "log", bottom, top, percent, higher_is_better, log_ticks(bottom, top))
    margin = 0.05 * (high - low)
    if margin <= 1e-9 * abs(high) or margin < TINY:  # one value, for all that a picture can show
        margin = 0.05 * abs(high) if abs(high) > TINY else 1.0
    bottom = max(low - margin, 0.0) if low >= 0 else low - margin
    top = min(high + margin, 1.0) if percent and high <= 1.0 else high + margin
    return Axis(title, "linear", bottom, top, percent, higher_is_better, linear_ticks(bottom, top))


def linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to nine round values between two numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{k * step:.12g}") for k in range(first, last + 1))


def _one_two_five(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [float(f"{m}e{e}") for e in range(first, last + 1) for m in (1, 2, 5)]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round values for a logarithmic axis: decades where there are three or more, else 1-2-5."""
    ticks = _one_two_five(low, high)
    decades = [tick for tick in ticks if math.isclose(math.log10(tick) % 1.0, 0.0, abs_tol=1e-6)]
    return tuple(ticks if len(decades) < 3 else decades[:: math.ceil(len(decades) / 7)])


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights (0 to 1) apart so that neighbours stand at least `gap` apart, as little as need be.

    Neighbours that are too close form a block around their mean; blocks that touch merge. Labels that cannot all
    fit between 0 and 1 run out at the bottom.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []  # sum of (height - its offset in the block), count
    for i in order:
        blocks.append([heights[i], 1.0])
        while len(blocks) > 1 and _bottom(blocks[-1], gap) < _bottom(blocks[-2], gap) + blocks[-2][1] * gap:
            total, count = blocks.pop()
            blocks[-1][0] += total - count * blocks[-1][1] * gap
            blocks[-1][1] += count
    placed = [_bottom(block, gap) + k * gap for block in blocks for k in range(int(block[1]))]
    top = 1.0
    for k in range(len(placed) - 1, -1, -1):  # keep the topmost inside, push the rest down if needed
        placed[k] = min(placed[k], top)
        top = placed[k] - gap
    result = [0.0] * len(heights)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result


def _bottom(block: Sequence[float], gap: float) -> float:
    """Height of the lowest label of a block, kept inside where it fits."""
    return max(block[0] / block[1], 0.0)


def config(*, dark: bool) -> dict[str, Any]:
    """The Vega-Lite configuration of all pictures on a light or a dark ground."""
    ink, soft, line = ("#E6E8EB", "#A9B0BA", "#343A44") if dark else ("#1B1F24", "#57606A", "#E4E7EB")
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    return {
        "font": font,
        "background": None if dark else "white",
        "view": {"stroke": None},
        "axis": {
            "labelColor": soft,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "labelFontSize": 11,
            "gridColor": line,
            "domainColor": soft,
            "tickColor": soft,
            "tickSize": 4,
            "labelPadding": 4,
            "titlePadding": 8,
        },
        "axisY": {"domain": False, "ticks": False},
        "axisX": {"grid": False},
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start", "subtitleColor": soft},
        "rule": {"color": soft},
        "text": {"color": soft, "fontSize": 11},
        "concat": {"spacing": 28},
    }
