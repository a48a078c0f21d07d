"""The pictures of a comparison: which there are, what each shows and what its caption says."""

import math
from collections.abc import Callable, Sequence

import altair as alt

from archopt.lab.report import text
from archopt.lab.report.heat import over_options, over_rates
from archopt.lab.report.horizon import horizons
from archopt.lab.report.lines import draw_lines, values_of
from archopt.lab.report.load import Point, Run, finite
from archopt.lab.report.panels import (
    HEIGHT,
    Bar,
    Figure,
    Label,
    Panel,
    Rows,
    bars,
    vertical,
)
from archopt.lab.report.statistics import (
    TARGET_SHARE,
    Cell,
    Profile,
    Reached,
    Row,
    Summary,
    Value,
    profiles,
)
from archopt.lab.report.steps import automatic_steps, relative_updates, steps_over_options
from archopt.lab.report.style import CROSS, Axis, Style, choose_axis, log_ticks

EVERYTHING = "all workloads"

Styles = dict[str, Style]


def figures(summaries: Sequence[Summary], styles: Styles) -> list[list[Figure]]:
    """The pictures of each workload, and last those over all of them (none for a single workload)."""
    groups = [
        [
            learning_curves(summary, styles, best=True),
            learning_curves(summary, styles, best=False),
            sensitivity(summary, styles),
            time_to_target(summary, styles),
            automatic_steps(summary, styles),
            relative_updates(summary, styles),
            over_rates(summary, styles),
        ]
        for summary in summaries
    ]
    over_all = [
        *over_options(summaries, styles),
        *steps_over_options(summaries),
        profile(summaries, styles),
        regrets(summaries, styles),
        *horizons(summaries, styles),
    ]
    groups.append(over_all if len(summaries) > 1 else [])
    return [[figure for figure in group if figure is not None] for group in groups]


# ---------------------------------------------------------------------------------------------- learning curves


def learning_curves(summary: Summary, styles: Styles, *, best: bool) -> Figure | None:
    """Metric and training loss over steps and over seconds, each optimiser at its best rate or at its default."""
    if not best and all(row.default is row.leading for row in summary.rows if row.default):
        return None  # it would be the picture at the best rates again
    metric = summary.workload.metric
    cells = {
        row.optimizer.label: cell
        for row in summary.rows
        if (cell := row.leading if best else row.default) is not None
    }
    runs = [run for cell in cells.values() for run in cell.runs]
    measured = values_of(runs, value := _metric_value(metric.key))
    axes = [
        (
            value,
            choose_axis(
                metric.name,
                measured,
                percent=metric.percent,
                higher_is_better=metric.higher_is_better,
                start=summary.initial,
            ),
        ),
        (_loss, choose_axis("training loss", values_of(runs, _loss), start=_first_loss(runs))),
    ]
    panels = tuple(
        draw_lines(Panel(styles), cells, value, axis, seconds=seconds)
        for value, axis in axes
        if axis is not None
        for seconds in (False, True)
    )
    if not panels:
        return None
    logarithmic = any(axis is not None and axis.kind == "error" for _, axis in axes)
    which = "at the best learning rate" if best else "at the default learning rate"
    return Figure(
        name=f"{summary.workload.slug}-curves-{'best' if best else 'default'}",
        subject=summary.workload.title,
        title=f"learning curves {which}",
        caption="Line: mean over the seeds that finished; band: their range. Thin lines: single runs that diverged "
        "or failed (× where they end) or have not finished yet. Seconds are training alone, without evaluation."
        + (SPACED if logarithmic else ""),
        panels=panels,
    )


SPACED = " The accuracy is spaced by the logarithm of its distance to 100 %."


def _metric_value(key: str) -> Value:
    return lambda point: finite(point.eval.get(key))


def _loss(point: Point) -> float | None:
    return finite(point.train.get("loss"))


def _first_loss(runs: Sequence[Run]) -> float | None:
    """The median of the first training loss on record."""
    first = sorted(numbers[0] for run in runs if (numbers := values_of([run], _loss)))
    return first[len(first) // 2] if first else None


# ------------------------------------------------------------------------------------ sensitivity to the rate


def sensitivity(summary: Summary, styles: Styles) -> Figure | None:
    """Final metric against the learning rate; rules without one as a level line."""
    metric = summary.workload.metric
    rates = sorted({cell.lr for row in summary.rows for cell in row.cells if cell.lr is not None})
    spreads = [cell.final for row in summary.rows for cell in row.cells if cell.final is not None]
    plain = choose_axis(
        metric.name,
        [value for s in spreads for value in (s.low, s.high)],
        percent=metric.percent,
        higher_is_better=metric.higher_is_better,
        start=summary.initial,
    )
    if not rates or plain is None:
        return None
    panel = Panel(styles, height=HEIGHT + 120)
    lost = [row for row in summary.rows if row.count("diverged") + row.count("failed")]
    step = 11 / panel.height
    axis = plain.with_strip((len(lost) + 0.8) * step) if lost else plain
    points: Rows = []
    levels: Rows = []
    crosses: Rows = []
    labels: list[Label] = []
    for row in summary.rows:
        label = row.optimizer.label
        for cell in row.cells:
            entry = {
                "optimiser": label,
                "x": cell.lr,
                "default": cell is row.default,
                "complete": cell.complete,
                "setting": text.setting(label, cell.lr),
                "final": text.final(cell),
            }
            if cell.final is None and cell.lr is not None:
                points.append({**entry, "y": None, "low": None, "high": None})  # breaks the line
            if cell.final is not None:
                heights = {"y": cell.final.mean, "low": cell.final.low, "high": cell.final.high}
                plotted = {key: axis.plotted(plain.clamp(value)) for key, value in heights.items()}
                (levels if cell.lr is None else points).append({**entry, **plotted})
            if cell.count("diverged") + cell.count("failed"):
                inward = (lost.index(row) + 0.8) * step
                height = inward if axis.low_is_worse else 1 - inward
                crosses.append({**entry, "y": axis.plotted(axis.at(height))})
        finals = [(cell.lr, cell.final) for cell in row.cells if cell.final is not None]
        if finals:
            lr, final = finals[-1]
            labels.append(Label(label, label, lr or rates[-1] * 1.3, plain.clamp(final.mean)))
        elif row in lost:
            labels.append(Label(label, f"{label} ×", None, axis.worst))
    _draw_sensitivity(panel, axis, points, levels, crosses, (rates[0] / 1.3, rates[-1] * 1.3))
    panel.label(labels, axis)
    if lost:
        _draw_strip(panel, axis, plain.worst)
    return Figure(
        name=f"{summary.workload.slug}-sensitivity",
        subject=summary.workload.title,
        title=f"final {metric.name} against the learning rate",
        caption="Mean and range over the seeds that finished; a ring marks the default rate; level lines are rules "
        "without a rate; × marks rates at which a run diverged or failed; hollow markers are means without the "
        "seeds that did not finish." + (SPACED if axis.kind == "error" else ""),
        panels=(panel,),
    )


def _draw_sensitivity(
    panel: Panel, axis: Axis, points: Rows, levels: Rows, crosses: Rows, domain: tuple[float, float]
) -> None:
    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", domain=list(domain), nice=False),
        axis=alt.Axis(
            title="learning rate",
            values=list(log_ticks(*domain)),
            labelExpr="format(datum.value, '~g')",
            grid=True,
        ),
    )
    y, low = vertical(axis), vertical(axis, "low")
    tips = [alt.Tooltip("setting:N"), alt.Tooltip("final:N")]
    level, line = panel.of(levels), panel.of(points)
    drawn = [row for row in points if row["y"] is not None]
    seen = {(row["optimiser"], row["x"]) for row in drawn}
    alone = [row for row in crosses if (row["optimiser"], row["x"]) not in seen]
    marked = {"x": x, "y": y, "color": panel.color, "tooltip": tips}
    panel.add(
        level.mark_rect(fillOpacity=0.12).encode(y=low, y2="high:Q", fill=panel.fill),
        line.mark_area(fillOpacity=0.12).encode(x=x, y=low, y2="high:Q", fill=panel.fill),
        level.mark_rule(strokeWidth=2).encode(y=y, color=panel.color, strokeDash=panel.dash, tooltip=tips),
        line.mark_line(strokeWidth=2).encode(x=x, y=y, color=panel.color, strokeDash=panel.dash),
        panel.of(row for row in [*drawn, *alone] if row["default"])
        .mark_point(shape="circle", size=190, strokeWidth=1.5, opacity=1)
        .encode(x=x, y=y, color=panel.color),
        panel.of(row for row in drawn if row["complete"])
        .mark_point(size=45, opacity=1)
        .encode(**marked, fill=panel.fill, shape=panel.shape),
        panel.of(row for row in drawn if not row["complete"])
        .mark_point(size=45, opacity=1)
        .encode(**marked, shape=panel.shape),
        panel.of(crosses).mark_point(shape=CROSS, size=32, strokeWidth=2, opacity=1).encode(**marked),
    )


def _draw_strip(panel: Panel, axis: Axis, border: float) -> None:
    """The line and the words that set apart the strip of settings that did not finish."""
    edge = panel.of([{"y": axis.plotted(border)}])
    below = axis.low_is_worse
    words = {"align": "left", "baseline": "top" if below else "bottom", "dx": 4, "dy": 4 if below else -4}
    panel.add(
        edge.mark_rule(strokeWidth=0.75).encode(y=vertical(axis)),
        edge.mark_text(**words).encode(x=alt.value(0), y=vertical(axis), text=alt.value("did not finish")),
    )


# ------------------------------------------------------------------------------------------------ time to target


def time_to_target(summary: Summary, styles: Styles) -> Figure | None:
    """Bars of the median steps and seconds until the metric is at the target; a dot a seed."""
    if summary.target is None:
        return None
    panels = []
    for seconds in (False, True):
        made = [
            _target_bar(row, cell, when, note, seconds=seconds)
            for row in summary.rows
            for note, cell, when in _settings(row)
        ]
        panels.append(bars(Panel(styles), made, "training seconds" if seconds else "steps"))
    metric = summary.workload.metric
    share = f"{100 * TARGET_SHARE:.0f} % of the way from the value before training to the best final mean"
    return Figure(
        name=f"{summary.workload.slug}-target",
        subject=summary.workload.title,
        title=f"time until {metric.name} is {text.value(metric, summary.target)}",
        caption=f"Target: {'as asked for' if summary.target_given else share}. Bar: median over all seeds, where "
        "one that never got there counts as later than any; marker: one seed. Read off at the evaluations, so no "
        "finer than the time between two of them.",
        panels=tuple(panels),
    )


def _settings(row: Row) -> list[tuple[str, Cell, Reached]]:
    """The settings of an optimiser worth a bar: its best rate and its default, once where they are the same."""
    both: list[tuple[str, Cell | None, Reached | None]]
    if row.leading is row.default:
        both = [("" if row.leading.lr is None else " (best, default)", row.leading, row.reached_best)]
    else:
        both = [(" (best)", row.leading, row.reached_best), (" (default)", row.default, row.reached_default)]
    return [(note, cell, when) for note, cell, when in both if cell is not None and when is not None]


def _target_bar(row: Row, cell: Cell, when: Reached, note: str, *, seconds: bool) -> Bar:
    label = row.optimizer.label
    numbers = when.seconds if seconds else when.steps
    middle = when.median(numbers)
    return Bar(
        optimizer=label,
        name=f"{text.setting(label, cell.lr)}{note}",
        length=middle if math.isfinite(middle) else 0.0,
        dots=numbers,
        text=text.reached(when, seconds=seconds),
        strong=cell is row.leading,
    )


# --------------------------------------------------------------------------------------------- several workloads


def profile(summaries: Sequence[Summary], styles: Styles) -> Figure | None:
    """Performance profiles over the workloads, in steps and in seconds, at the best rates and at the defaults."""
    readers: list[tuple[str, Callable[[Row], Reached | None]]] = [
        ("best rate", lambda row: row.reached_best),
        ("default rate", lambda row: row.reached_default),
    ]
    panels = [
        _profile_panel(
            Panel(styles, title=f"{which}, {'seconds' if seconds else 'steps'}"),
            profiles(summaries, reached, seconds=seconds),
        )
        for which, reached in readers
        for seconds in (False, True)
    ]
    return Figure(
        name="profile",
        subject=EVERYTHING,
        title="performance profile, the share of the workloads solved within a multiple of the fastest time",
        caption="Solved: the median over the seeds reaches the workload's target. A line's height at 1× is the "
        "share of the workloads on which the optimiser was the fastest; its height at the right is the share that "
        "it solved at all.",
        panels=tuple(panels),
    )


def _profile_panel(panel: Panel, made: Sequence[Profile]) -> Panel:
    right = max(1.1 * max((ratio for p in made for ratio in p.ratios), default=1.0), 2.0)
    axis = Axis("share of the workloads", "linear", -0.03, 1.03, True, True, (0.0, 0.25, 0.5, 0.75, 1.0))
    steps: Rows = [
        {"optimiser": p.optimizer, "x": x, "y": y}
        for p in made
        for x, y in [*zip(p.ratios, p.shares), (right, p.shares[-1])]
    ]
    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", domain=[1, right], nice=False),
        axis=alt.Axis(
            title="time over the fastest optimiser's",
            values=list(log_ticks(1.0, right)),
            labelExpr="format(datum.value, '~g') + '×'",
        ),
    )
    panel.add(
        panel.of(steps)
        .mark_line(strokeWidth=2, interpolate="step-after")
        .encode(x=x, y=vertical(axis), color=panel.color, strokeDash=panel.dash)
    )
    panel.label([Label(p.optimizer, p.optimizer, right, p.shares[-1]) for p in made], axis)
    return panel


def regrets(summaries: Sequence[Summary], styles: Styles) -> Figure | None:
    """What not tuning costs: bars of the regret of the default, a panel a workload."""
    panels = []
    for summary in summaries:
        metric = summary.workload.metric
        made = [
            _regret_bar(row.optimizer.label, row.default, row.regret)
            for row in sorted(summary.rows, key=lambda row: row.regret or 0.0)
            if row.default is not None and row.regret is not None
        ]
        if made:
            title = f"{metric.name} given away{', % points' if metric.percent else ''}"
            panels.append(bars(Panel(styles, title=summary.workload.title), made, title))
    if not panels:
        return None
    return Figure(
        name="regret",
        subject=EVERYTHING,
        title="regret of the default, or what not tuning costs",
        caption="The best final mean of any optimiser at any rate tried, minus the optimiser's own at its default "
        "(turned so that more is worse).",
        panels=tuple(panels),
    )


def _regret_bar(label: str, cell: Cell, regret: float) -> Bar:
    length = max(regret, 0.0) * (100 if cell.metric.percent else 1) if math.isfinite(regret) else 0.0
    words = text.regret(cell.metric, regret) if cell.complete else text.trouble(cell)
    return Bar(label, text.setting(label, cell.lr), length, (), words, True)
