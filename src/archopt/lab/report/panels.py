"""What the pictures are made of: panels, figures, encodings, direct labels, and the panel of curves."""

import json
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from archopt.lab.report.style import CROSS, Axis, Style, config, spread_labels

HEIGHT = 240
"""Of a panel, in pixels, unless it needs more."""
FILE_WIDTH = 400
"""Of a panel in the PNG and SVG files, in pixels."""
TIE = 10
"""Between the plot's right edge and the labels, in pixels."""
EDGE = {"value": {"expr": f"width + {TIE}"}}
SCHEMA = {"$schema": alt.SCHEMA_URL}
PLAIN = "format(datum.value, datum.value < 1000 ? '~g' : '~s')"
"""How ticks are written. (A plain format would be given the ticks' own precision: 1e+2.)"""
LABEL_PIXELS = 12.5
"""The least distance of direct labels."""

Spec = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Label:
    """A name to stand at the right of a plot; tied to the end of its line where `x` says where that is."""

    optimizer: str
    text: str
    x: float | None
    y: float


@dataclass
class Panel:
    """One plot, still without a width: the page fits it to its column, the files give it a fixed one.

    Layers and tables are kept as plain dictionaries, put together only in the end: altair copies whatever it is
    given at every step, which for all the pictures of a page takes longer than to draw them.
    """

    styles: dict[str, Style]
    height: int = HEIGHT
    title: str = ""
    layers: list[Spec] = field(default_factory=list)
    hover: list[Spec] = field(default_factory=list)
    """Invisible marks that carry the numbers to read under the pointer: for the page alone."""
    tables: dict[str, Rows] = field(default_factory=dict)

    def of(self, rows: Iterable[dict[str, Any]]) -> Any:
        """A chart of a table of this panel, still without a mark."""
        table = [{key: _short(value) for key, value in row.items()} for row in rows]
        name = f"table-{zlib.crc32(json.dumps(table).encode()):08x}"
        self.tables[name] = table
        return alt.Chart(alt.NamedData(name=name))

    def add(self, *charts: Any) -> None:
        """Puts charts, with their marks and encodings, on top of the layers that there are."""
        self.layers += map(_plain, charts)

    def add_hover(self, chart: Any) -> None:
        """Adds a chart of invisible marks to read numbers off."""
        self.hover.append(_plain(chart))

    def spec(self, layers: Sequence[Spec], width: int | str) -> Spec:
        """The Vega-Lite specification of some layers, without tables."""
        title = {"title": self.title} if self.title else {}
        return {**title, "width": width, "height": self.height, "layer": list(layers)}

    @property
    def color(self) -> Any:
        return alt.Color(
            "optimiser:N", scale=self._scale([s.light for s in self.styles.values()]), legend=None
        )

    @property
    def fill(self) -> Any:
        return alt.Fill(
            "optimiser:N", scale=self._scale([s.light for s in self.styles.values()]), legend=None
        )

    @property
    def dash(self) -> Any:
        dashes = [list(style.dash) or [1, 0] for style in self.styles.values()]
        return alt.StrokeDash("optimiser:N", scale=self._scale(dashes), legend=None)

    @property
    def shape(self) -> Any:
        return alt.Shape(
            "optimiser:N", scale=self._scale([s.marker for s in self.styles.values()]), legend=None
        )

    def _scale(self, values: list[Any]) -> Any:
        return alt.Scale(domain=list(self.styles), range=values)

    def label(self, labels: Sequence[Label], axis: Axis) -> None:
        """Adds the names at the right, moved apart just enough to be read."""
        heights = [axis.height(label.y) for label in labels]
        names: Rows = []
        ties: Rows = []
        for label, height in zip(labels, spread_labels(heights, LABEL_PIXELS / self.height)):
            y = axis.plotted(axis.at(height))
            names.append({"optimiser": label.optimizer, "y": y, "label": label.text})
            if label.x is not None:
                end = axis.plotted(axis.clamp(label.y))
                ties.append({"optimiser": label.optimizer, "x": label.x, "y": end, "y2": y})
        self.add(
            self.of(ties)
            .mark_rule(strokeWidth=1, strokeOpacity=0.45)
            .encode(x="x:Q", x2=EDGE, y=vertical(axis), y2="y2:Q", color=self.color),
            self.of(names)
            .mark_text(align="left", baseline="middle", dx=3)
            .encode(x=EDGE, y=vertical(axis), text="label:N", color=self.color),
        )


def _short(value: Any) -> Any:
    """Numbers with as many figures as a picture can show, which halves the page."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _plain(chart: Any) -> Spec:
    """A chart's mark, encoding and table, as a layer has them. To validate it each time takes long: tests do it."""
    spec: Spec = chart.to_dict(validate=False)
    return {key: spec[key] for key in ("data", "mark", "encoding")}


def vertical(axis: Axis, name: str = "y") -> Any:
    """The encoding of a field as height on an axis."""
    return alt.Y(f"{name}:Q", scale=alt.Scale(**axis.scale()), axis=alt.Axis(**axis.axis()))


@dataclass(frozen=True)
class Figure:
    """A picture with its explanation."""

    name: str
    subject: str
    """What it is about: a workload, or all of them."""
    title: str
    caption: str
    panels: tuple[Panel, ...]

    def page_specs(self) -> list[Spec]:
        """One Vega-Lite specification a panel, as wide as the element that it is put into."""
        fit = {"autosize": {"type": "fit-x", "contains": "padding"}}
        return [
            {
                **SCHEMA,
                **fit,
                **panel.spec([*panel.layers, *panel.hover], "container"),
                "datasets": panel.tables,
            }
            for panel in self.panels
        ]

    def file_spec(self, note: str) -> Spec:
        """All panels in one specification of fixed size, two a row; the caption and the note under the title."""
        columns = min(len(self.panels), 2)
        width = FILE_WIDTH * 3 // 2 if columns == 1 else FILE_WIDTH
        wide = 110 if columns == 1 else 170
        lines = [line for part in (self.caption, note) for line in textwrap.wrap(part, wide)]
        made = json.dumps([panel.spec(panel.layers, width) for panel in self.panels])
        # In a concatenation the expression `width` is not the panel's own, so the number takes its place.
        made = made.replace(json.dumps(EDGE), json.dumps({"value": width + TIE}))
        return {
            **SCHEMA,
            "config": config(dark=False),
            "padding": 16,
            "title": {"text": f"{self.subject}: {self.title}", "subtitle": lines, "offset": 14},
            "columns": columns,
            "concat": json.loads(made),
            "resolve": {"scale": {"fill": "independent"}},  # each heat map has its own numbers
            "datasets": {name: rows for panel in self.panels for name, rows in panel.tables.items()},
        }


# ------------------------------------------------------------------------------------------- the panel of curves


@dataclass(frozen=True)
class Sample:
    """One point of a line: where it is, its value, the range over the seeds, and what to say under the pointer."""

    x: float
    y: float
    low: float
    high: float
    note: dict[str, str]


@dataclass(frozen=True)
class Stray:
    """A single run that did not finish. `end` says why it ended, where it did."""

    name: str
    samples: Sequence[tuple[float, float]]
    end: str


@dataclass(frozen=True)
class Line:
    """One optimiser on a panel of curves: its mean line, if a seed finished, and its runs that did not."""

    optimizer: str
    text: str
    samples: Sequence[Sample]
    strays: Sequence[Stray]


def curves(panel: Panel, lines: Sequence[Line], axis: Axis, x_title: str) -> Panel:
    """Fills a panel with mean lines, bands, single runs with their ends, and labels."""
    means: Rows = []
    strays: Rows = []
    ends: Rows = []
    labels: list[Label] = []
    for line in lines:
        who = {"optimiser": line.optimizer}
        for sample, y in zip(line.samples, axis.cut([sample.y for sample in line.samples])):
            low, high = axis.plotted(axis.clamp(sample.low)), axis.plotted(axis.clamp(sample.high))
            means.append({**who, "x": sample.x, "y": y, "low": low, "high": high, **sample.note})
        for stray in line.strays:
            ys = axis.cut([y for _, y in stray.samples])
            strays += [{**who, "run": stray.name, "x": x, "y": y} for (x, _), y in zip(stray.samples, ys)]
            if stray.end:
                at, height = stray.samples[-1] if stray.samples else (0.0, axis.worst)
                ends.append({**who, "x": at, "y": axis.plotted(axis.clamp(height)), "run": stray.end})
        if line.samples:
            last = line.samples[-1]
            labels.append(Label(line.optimizer, line.text, last.x, last.y))
        elif line.strays:
            mark = " ×" if all(stray.end for stray in line.strays) else ""
            labels.append(Label(line.optimizer, line.text + mark, None, axis.worst))
    count = Counter(row["optimiser"] for row in means)
    right = max((row["x"] for row in [*means, *strays, *ends]), default=1.0) or 1.0
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[0, right], nice=False),
        axis=alt.Axis(title=x_title, labelExpr=PLAIN, tickCount=5),
    )
    y = vertical(axis)
    notes = [key for line in lines for sample in line.samples[:1] for key in sample.note]
    tips = [alt.Tooltip(f"{key}:N") for key in dict.fromkeys(notes)]
    panel.add(
        panel.of(means)
        .mark_area(fillOpacity=0.14)
        .encode(x=x, y=vertical(axis, "low"), y2="high:Q", fill=panel.fill),
        panel.of(strays)
        .mark_line(strokeWidth=1, strokeOpacity=0.6)
        .encode(x=x, y=y, color=panel.color, strokeDash=panel.dash, detail="run:N"),
        panel.of(means).mark_line(strokeWidth=2).encode(x=x, y=y, color=panel.color, strokeDash=panel.dash),
        panel.of(row for row in means if count[row["optimiser"]] == 1)  # a line of one point is none
        .mark_point(size=40, opacity=1, filled=True)
        .encode(x=x, y=y, color=panel.color, shape=panel.shape),
        panel.of(ends)
        .mark_point(shape=CROSS, size=45, strokeWidth=2, opacity=1)
        .encode(x=x, y=y, color=panel.color, tooltip="run:N"),
    )
    panel.add_hover(panel.of(means).mark_circle(size=90, fillOpacity=0).encode(x=x, y=y, tooltip=tips))
    panel.label(labels, axis)
    return panel


# -------------------------------------------------------------------------------------------- the panel of bars


@dataclass(frozen=True)
class Bar:
    """A named bar from 0 to `length`, with a dot for each single number, and a text behind it."""

    optimizer: str
    name: str
    length: float
    dots: Sequence[float]
    text: str
    strong: bool


def bars(panel: Panel, made: Sequence[Bar], x_title: str) -> Panel:
    """Fills a panel with horizontal bars, the first on top; the panel's height follows from their number."""
    rows: Rows = []
    dots: Rows = []
    for index, bar in enumerate(made):
        who = {"optimiser": bar.optimizer, "bar": str(index)}
        end = max([bar.length, *bar.dots])
        strength = 0.45 if bar.strong else 0.18
        rows.append({**who, "x": bar.length, "end": end, "label": bar.text, "strength": strength})
        dots += [{**who, "x": dot} for dot in bar.dots]
    right = max((row["end"] for row in rows), default=1.0) or 1.0
    names = json.dumps({str(index): bar.name for index, bar in enumerate(made)})
    order = [str(index) for index in range(len(made))]
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[0, right], nice=False),
        axis=alt.Axis(title=x_title, labelExpr=PLAIN, tickCount=4),
    )
    y = alt.Y(
        "bar:N",
        sort=order,
        scale=alt.Scale(domain=order, paddingInner=0.3),
        axis=alt.Axis(title=None, labelExpr=f"({names})[datum.value]", labelLimit=260, grid=False),
    )
    chart = panel.of(rows)
    panel.height = max(18 * len(made), 40)
    panel.add(
        chart.mark_bar(cornerRadiusEnd=2).encode(
            x=x, y=y, fill=panel.fill, fillOpacity=alt.FillOpacity("strength:Q", scale=None, legend=None)
        ),
        panel.of(dots)
        .mark_point(size=30, opacity=1, filled=True)
        .encode(x=x, y=y, color=panel.color, shape=panel.shape),
        chart.mark_text(align="left", baseline="middle", dx=9).encode(x="end:Q", y=y, text="label:N"),
    )
    return panel
