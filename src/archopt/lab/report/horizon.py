"""The picture of what a horizon is worth: the final metric against the length of training.

It is drawn where a comparison holds one workload in several lengths (`steps` or `epochs`). A rule with a rate has
one run a length there, at its best rate and under the schedule of that length. A rule without a rate follows no
schedule and need not be told the length: the curve of its longest run is its value at every one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from archopt.lab.report.load import Point, finite
from archopt.lab.report.panels import HEIGHT, Figure, Label, Panel, Rows, vertical
from archopt.lab.report.statistics import Row, Spread, Summary, curve
from archopt.lab.report.style import Axis, Style, choose_axis

LENGTHS = ("steps", "epochs")
"""The options that set the length of training."""


@dataclass(frozen=True)
class Reading:
    """A value after so many steps of training, over the seeds."""

    steps: float
    mean: float
    low: float
    high: float


def horizons(summaries: Sequence[Summary], styles: dict[str, Style]) -> list[Figure]:
    """One picture for each workload that was trained in several lengths."""
    return [_horizon(group, styles) for group in _families(summaries) if len({*map(_length, group)}) > 1]


def _families(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """Workloads that are the same but for their length, each with the shortest first."""
    families: dict[str, list[Summary]] = {}
    for summary in summaries:
        workload = summary.workload
        rest = {name: value for name, value in workload.options.items() if name not in LENGTHS}
        if _length(summary):
            families.setdefault(f"{workload.name} {rest}", []).append(summary)
    return [sorted(group, key=_length) for group in families.values()]


def _length(summary: Summary) -> int:
    """The number of steps of the longest run that finished; 0 where none did."""
    done = [
        run.points[-1].step for run in summary.workload.trained if run.status == "finished" and run.points
    ]
    return max(done, default=0)


def readings(group: Sequence[Summary], label: str) -> list[Reading]:
    """An optimiser's values at the lengths; of a rule without a rate, those on the way through the longest."""
    return list(_read(group, label))


def _read(group: Sequence[Summary], label: str) -> Iterator[Reading]:
    rows = [(summary, row) for summary in group if (row := _row(summary, label)) is not None]
    if rows and not rows[-1][1].optimizer.rate:
        summary, row = rows[-1]
        key = summary.workload.metric.key

        def value(point: Point) -> float | None:
            return finite(point.eval.get(key))

        for point in curve(row.leading.finished, value):
            if point.step >= _length(group[0]):
                yield Reading(point.step, point.mean, point.low, point.high)
        return
    for summary, row in rows:
        final: Spread | None = row.leading.final
        if final is not None:
            yield Reading(_length(summary), final.mean, final.low, final.high)


def _row(summary: Summary, label: str) -> Row | None:
    return next((row for row in summary.rows if row.optimizer.label == label), None)


def _horizon(group: Sequence[Summary], styles: dict[str, Style]) -> Figure:
    metric, longest = group[-1].workload.metric, group[-1].workload
    found = {label: told for label in styles if (told := readings(group, label))}
    axis = choose_axis(
        metric.name,
        [value for told in found.values() for reading in told for value in (reading.low, reading.high)],
        percent=metric.percent,
        higher_is_better=metric.higher_is_better,
    )
    panel = Panel(styles, height=HEIGHT + 120)
    if axis is not None:
        _draw(panel, axis, found, [_length(summary) for summary in group], group)
    return Figure(
        name=f"{longest.slug}-horizon",
        subject=longest.name,
        title=f"{metric.name} by length of training",
        caption="Markers: a training for each length, at the best rate tried for it and under the workload's "
        "schedule for it. Lines without markers: one training, read off on the way, of a rule that has no rate and "
        "is not told the length. Bands: the range over the seeds.",
        panels=(panel,),
    )


def _draw(
    panel: Panel,
    axis: Axis,
    found: dict[str, list[Reading]],
    lengths: Sequence[int],
    group: Sequence[Summary],
) -> None:
    points: Rows = [
        {
            "optimiser": label,
            "x": reading.steps,
            "y": axis.plotted(reading.mean),
            "low": axis.plotted(reading.low),
            "high": axis.plotted(reading.high),
            "marked": (row := _row(group[-1], label)) is not None and row.optimizer.rate,
        }
        for label, told in found.items()
        for reading in told
    ]
    domain = [lengths[0] / 1.1, lengths[-1] * 1.1]
    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=alt.Axis(
            title="steps of training",
            values=list(lengths),
            labelExpr="format(datum.value, ',')",
        ),
    )
    drawn = panel.of(points)
    panel.add(
        drawn.mark_area(fillOpacity=0.14).encode(x=x, y=vertical(axis, "low"), y2="high:Q", fill=panel.fill),
        drawn.mark_line(strokeWidth=2).encode(
            x=x, y=vertical(axis), color=panel.color, strokeDash=panel.dash
        ),
        panel.of(row for row in points if row["marked"])
        .mark_point(size=45, opacity=1)
        .encode(x=x, y=vertical(axis), color=panel.color, fill=panel.fill, shape=panel.shape),
    )
    panel.label([Label(label, label, told[-1].steps, told[-1].mean) for label, told in found.items()], axis)
