"""Numbers of single steps over training: the step sizes that rules chose themselves, and relative updates."""

from collections.abc import Iterable, Iterator, Sequence

from archopt.lab.report import text
from archopt.lab.report.heat import varied
from archopt.lab.report.lines import draw_lines, values_of
from archopt.lab.report.load import SPREAD, Point, finite
from archopt.lab.report.panels import Figure, Panel
from archopt.lab.report.statistics import Cell, Row, Summary, Value
from archopt.lab.report.style import OTHERS, Axis, Style, choose_axis

AUTOMATIC = {"eta": "automatic step size η", "theta": "automatic angle θ (radians)"}
"""Step sizes that a rule chooses itself, by the last part of their key in the records."""
UPDATE = "update"
TITLES = {**AUTOMATIC, UPDATE: "relative update"}

Styles = dict[str, Style]

CAPTION = (
    "Line: mean over the seeds that finished and, where the records have them, over all steps since the evaluation "
    "before; band: from the least to the greatest of them."
)


def automatic_steps(summary: Summary, styles: Styles) -> Figure | None:
    """The step sizes that rules without a rate chose, over training."""
    panels = []
    for key in automatic_keys(summary.rows):
        cells = {row.optimizer.label: row.leading for row in summary.rows}
        if (panel := step_panel(Panel(styles), cells, key)) is not None:
            panels.append(panel)
    if not panels:
        return None
    return Figure(
        name=f"{summary.workload.slug}-automatic-step",
        subject=summary.workload.title,
        title="the step size that the rule chose itself",
        caption=CAPTION,
        panels=tuple(panels),
    )


def automatic_keys(rows: Iterable[Row]) -> list[str]:
    """The step sizes that these records tell of, by their keys ("generator/eta" where there are several models)."""
    found = {key for row in rows for run in row.runs for point in run.points for key in point.optimizer}
    return sorted(key for key in found if key.split("/")[-1] in AUTOMATIC)


def step_panel(panel: Panel, cells: dict[str, Cell], key: str, axis: Axis | None = None) -> Panel | None:
    """Fills a panel with a number of the steps over training, on its own axis or a given one; None where no run has
    the number."""
    mean, *band = (step_value(key, part) for part in SPREAD)
    told = {label: cell for label, cell in cells.items() if values_of(cell.runs, mean)}
    axis = axis or step_axis(told.values(), key)
    if axis is None:
        return None
    return draw_lines(panel, told, mean, axis, seconds=False, band=(band[0], band[1]))


def step_axis(cells: Iterable[Cell], key: str) -> Axis | None:
    """An axis for a number of the steps, from the least to the greatest in all cells; None where there is none."""
    *model, quantity = key.split("/")
    runs = [run for cell in cells for run in cell.runs]
    values = [number for part in SPREAD[1:] for number in values_of(runs, step_value(key, part))]
    return choose_axis(" ".join([*model, TITLES[quantity]]), values)


def relative_updates(summary: Summary, styles: Styles) -> Figure | None:
    """The relative size of updates over training, where the records have it."""
    cells = {row.optimizer.label: row.leading for row in summary.rows}
    keys = {key for row in summary.rows for run in row.runs for point in run.points for key in point.per_step}
    told = [step_panel(Panel(styles), cells, key) for key in sorted(keys) if key.split("/")[-1] == UPDATE]
    panels = tuple(panel for panel in told if panel is not None)
    if not panels:
        return None
    return Figure(
        name=f"{summary.workload.slug}-updates",
        subject=summary.workload.title,
        title="relative updates at the best learning rate",
        caption="The size of a step over that of the weights (Frobenius norms), a mean over layers. "
        + CAPTION,
        panels=panels,
    )


def step_value(key: str, part: str) -> Value:
    """Mean, least or greatest since the evaluation before; of older records, the last step's."""

    def read(point: Point) -> float | None:
        told = point.per_step.get(key)
        return finite(point.optimizer.get(key) if told is None else told[part])

    return read


def steps_over_options(summaries: Sequence[Summary]) -> list[Figure]:
    """The step sizes that rules chose over training, a line for each workload of a sweep; with two options a panel
    for each value of the first."""
    names = varied(summaries)
    labels = dict.fromkeys(row.optimizer.label for summary in summaries for row in summary.rows)
    found = [_of_sweep(summaries, names, label) for label in labels] if names else []
    return [figure for figures in found for figure in figures]


def _of_sweep(summaries: Sequence[Summary], names: Sequence[str], label: str) -> Iterator[Figure]:
    told = [(s.workload.options, row) for s in summaries for row in s.rows if row.optimizer.label == label]
    for key in automatic_keys(row for _, row in told):
        groups: dict[str, dict[str, Cell]] = {}
        for options, row in told:
            title = " ".join(f"{name} {options[name]}" for name in names[:-1])
            groups.setdefault(title, {})[f"{names[-1]} {options[names[-1]]}"] = row.leading
        axis = step_axis((row.leading for _, row in told), key)
        panels = [
            step_panel(Panel(_ordinal(cells), title=title), cells, key, axis)
            for title, cells in groups.items()
        ]
        yield Figure(
            name=f"sweep-{'-'.join(names)}-{text.file_name(label)}-{text.file_name(key)}",
            subject=f"{label} on {summaries[0].workload.name}",
            title=f"the step size over training, by {' and '.join(names)}",
            caption=CAPTION,
            panels=tuple(panel for panel in panels if panel is not None),
        )


def _ordinal(lines: dict[str, Cell]) -> Styles:
    """Styles for lines that are no optimisers. Where there are more than styles, some share one."""
    return {line: OTHERS[place % len(OTHERS)] for place, line in enumerate(lines)}
