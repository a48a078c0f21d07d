"""Heat maps of a number over two things: optimisers and learning rates, or options of a workload.

Brighter is better in every heat map. Its colours (cividis) are told apart under every colour vision and in grey,
and the number stands in each cell; a setting of which no run finished is a cross.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import altair as alt

from archopt.lab.report import text
from archopt.lab.report.horizon import LENGTHS
from archopt.lab.report.load import Metric, Run, finite
from archopt.lab.report.panels import Figure, Panel, Rows
from archopt.lab.report.statistics import Cell, Row, Summary
from archopt.lab.report.style import Style

SCHEME: Literal["cividis"] = "cividis"
TURN = 0.55
"""Cells above this share of the scale are bright and have dark letters."""
LINE_HEIGHT = 34
"""Of a line of cells, in pixels."""
WITHOUT_RATE = "none"

Styles = dict[str, Style]


@dataclass(frozen=True)
class Spot:
    """A cell: its column and line, what setting it is, its value (None: no run finished) and that in words."""

    x: str
    y: str
    setting: str
    value: float | None
    words: str


def heat_map(
    spots: Sequence[Spot],
    columns: Sequence[str],
    lines: Sequence[str],
    styles: Styles,
    *,
    x_title: str,
    y_title: str = "",
    up: bool,
    title: str = "",
) -> Panel:
    """A panel of cells. up: more is better."""
    panel = Panel(styles, height=LINE_HEIGHT * len(lines), title=title)
    known = [spot.value for spot in spots if spot.value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    logarithmic = not up and low > 0 and high / low > 20
    if low == high:  # one value, in the middle of the scale
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)

    def ink(value: float) -> str:
        first, here, last = (math.log(v) if logarithmic else v for v in (low, value, high))
        share = (here - first) / (last - first)
        return "black" if (share if up else 1 - share) > TURN else "white"

    told: Rows = [
        {"x": spot.x, "y": spot.y, "setting": spot.setting, "words": spot.words}
        | ({} if spot.value is None else {"value": spot.value, "ink": ink(spot.value)})
        for spot in spots
    ]
    cells, lost = (
        panel.of(row for row in told if "ink" in row),
        panel.of(row for row in told if "ink" not in row),
    )
    x = alt.X(
        "x:N",
        sort=list(columns),
        scale=alt.Scale(domain=list(columns), paddingInner=0.03, paddingOuter=0),
        axis=alt.Axis(title=x_title, labelAngle=0, domain=False, ticks=False),
    )
    y = alt.Y(
        "y:N",
        sort=list(lines),
        scale=alt.Scale(domain=list(lines), paddingInner=0.06, paddingOuter=0),
        axis=alt.Axis(title=y_title or None, labelLimit=240, grid=False),
    )
    tips = [alt.Tooltip("setting:N"), alt.Tooltip("words:N")]
    scale = alt.Scale(
        type="log" if logarithmic else "linear", scheme=SCHEME, domain=[low, high], reverse=not up, nice=False
    )
    panel.add(
        cells.mark_rect().encode(x=x, y=y, fill=alt.Fill("value:Q", scale=scale, legend=None), tooltip=tips),
        cells.mark_text().encode(
            x=x, y=y, text="words:N", color=alt.Color("ink:N", scale=None, legend=None), tooltip=tips
        ),
        lost.mark_text(fontSize=15).encode(x=x, y=y, text=alt.value("×"), tooltip=tips),
    )
    return panel


# -- learning rates ----------------------------------------------------------------------------------------


def over_rates(summary: Summary, styles: Styles) -> Figure | None:
    """The final metric, optimisers by learning rates; None where no optimiser was run at three or more."""
    metric = summary.workload.metric
    if not any(len(row.cells) > 2 for row in summary.rows):
        return None
    cells = [(row, cell) for row in summary.rows for cell in row.cells]
    rates = sorted({cell.lr for _, cell in cells if cell.lr is not None})
    spots = [
        Spot(
            _rate(cell.lr),
            row.optimizer.label,
            text.setting(row.optimizer.label, cell.lr),
            None if cell.final is None else cell.final.mean,
            text.trouble(cell) if cell.final is None else text.value(metric, cell.final.mean, unit=False),
        )
        for row, cell in cells
    ]
    without = [WITHOUT_RATE] if any(cell.lr is None for _, cell in cells) else []
    panel = heat_map(
        spots,
        [*map(_rate, rates), *without],
        [row.optimizer.label for row in summary.rows],
        styles,
        x_title="learning rate",
        up=metric.higher_is_better,
    )
    return Figure(
        name=f"{summary.workload.slug}-rates",
        subject=summary.workload.title,
        title=f"final {metric.name}{metric.in_unit}, optimisers by learning rates",
        caption="Means over the seeds that finished; brighter is better; × where none did.",
        panels=(panel,),
    )


def _rate(lr: float | None) -> str:
    return WITHOUT_RATE if lr is None else text.rate(lr)


# -- options of a workload ---------------------------------------------------------------------------------


def varied(summaries: Sequence[Summary]) -> list[str]:
    """The one or two options, numbers and not lengths, that are all in which a comparison's workloads differ."""
    workloads = [summary.workload for summary in summaries]
    if len(workloads) < 2 or len({workload.name for workload in workloads}) > 1:
        return []
    names = dict.fromkeys(name for workload in workloads for name in workload.options)
    differing = [name for name in names if len({repr(w.options.get(name)) for w in workloads}) > 1]
    numbers = all(finite(w.options.get(name)) is not None for w in workloads for name in differing)
    return differing if numbers and len(differing) <= 2 and not {*differing} & {*LENGTHS} else []


def over_options(summaries: Sequence[Summary], styles: Styles) -> list[Figure]:
    """Final metric, best metric on the way and final training loss over the options that the workloads vary: one
    against the optimisers, two against each other, in a picture for each optimiser."""
    names = varied(summaries)
    if not names:
        return []
    labels = list(dict.fromkeys(row.optimizer.label for summary in summaries for row in summary.rows))
    groups = [labels] if len(names) == 1 else [[label] for label in labels]
    return [_sweep(summaries, names, group, styles) for group in groups]


Reader = Callable[[Run], float | None]


def best_on_the_way(run: Run) -> float | None:
    """The best value of the metric at any evaluation of a run."""
    best = run.result.get("best")
    return finite(best.get("value")) if isinstance(best, dict) else None


def _sweep(summaries: Sequence[Summary], names: list[str], labels: list[str], styles: Styles) -> Figure:
    workload = summaries[0].workload
    metric = workload.metric
    loss = Metric("train_loss", "training loss", higher_is_better=False)
    shown: list[tuple[Metric, str, Reader]] = [
        (metric, f"final {metric.name}{metric.in_unit}", lambda run: run.final(metric.key)),
        (metric, f"best {metric.name} on the way{metric.in_unit}", best_on_the_way),
        (loss, "final training loss", lambda run: run.final(loss.key)),
    ]
    across = names[-1]
    columns = [str(value) for value in _values(summaries, across)]
    lines = labels if len(names) == 1 else [str(value) for value in _values(summaries, names[0])]
    panels = []
    for kind, title, read in shown:
        spots = [
            _spot(kind, summary, row, row.leading, names, read)
            for summary in summaries
            for row in summary.rows
            if row.optimizer.label in labels
        ]
        if any(spot.value is not None for spot in spots):
            up, y_title = kind.higher_is_better, "" if len(names) == 1 else names[0]
            panels.append(
                heat_map(spots, columns, lines, styles, x_title=across, y_title=y_title, up=up, title=title)
            )
    whose = "" if len(names) == 1 else f"-{text.file_name(labels[0])}"
    over = " and ".join(names)
    return Figure(
        name=f"sweep-{'-'.join(names)}{whose}",
        subject=workload.name if len(names) == 1 else f"{labels[0]} on {workload.name}",
        title=f"sweep over {over}",
        caption="Means over the seeds that finished, each optimiser at its best rate; brighter is better; × where "
        "none finished. The best value on the way is chosen on the test data.",
        panels=tuple(panels),
    )


def _values(summaries: Sequence[Summary], name: str) -> list[float]:
    return sorted({summary.workload.options[name] for summary in summaries})


def _spot(kind: Metric, summary: Summary, row: Row, cell: Cell, names: list[str], read: Reader) -> Spot:
    label, options = row.optimizer.label, summary.workload.options
    found = [value for run in cell.finished if (value := read(run)) is not None]
    value = fmean(found) if found else None
    return Spot(
        str(options[names[-1]]),
        label if len(names) == 1 else str(options[names[0]]),
        f"{text.setting(label, cell.lr)}, {', '.join(f'{name} {options[name]}' for name in names)}",
        value,
        text.trouble(cell) if value is None else text.value(kind, value, unit=False),
    )
