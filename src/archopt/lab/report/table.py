"""The tables of a comparison, built once and written for the terminal, the page, Markdown and JSON."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from archopt.lab.markdown import escaped
from archopt.lab.report import text
from archopt.lab.report.load import AVERAGE, Comparison, Run
from archopt.lab.report.statistics import TARGET_SHARE, Cell, Reached, Row, Summary

OVERHEAD = 0.05
"""More than this share of a step outside forward, backward and optimiser is worth a note."""


@dataclass(frozen=True)
class Entry:
    """A field of a table: what is written, what it sorts by (smaller is better), and whether it stands out."""

    text: str
    order: float | None = None
    """None: it sorts by its text."""
    best: bool = False
    bad: bool = False


@dataclass(frozen=True)
class Column:
    """A column's name and the one line that explains it."""

    name: str
    help: str


@dataclass(frozen=True)
class Table:
    """Rows of entries, one an optimiser (or a workload); the first entry of a row is its label."""

    subject: str
    """What it is about: a workload, or all of them."""
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]


def tables(summary: Summary) -> list[Table]:
    """What the optimisers reached, when, and what it cost."""
    timed = [target_times(summary)] if summary.target is not None else []
    return [results(summary), *timed, costs(summary)]


def results(summary: Summary) -> Table:
    """Final metric at the default and at the best rate, and what not tuning costs."""
    metric = summary.workload.metric
    columns = (
        Column(
            "optimiser",
            "Sorted by the final metric at the best rate; settings that did not finish come last.",
        ),
        Column("default lr", "The optimiser's own learning rate, which somebody uses who does not tune."),
        Column(
            "at the default", f"Final {metric.name}: mean ± population standard deviation over the seeds."
        ),
        Column("best lr", "The rate with the best mean, among those tried at which the most seeds finished."),
        Column("at the best", "Chosen on the very numbers that are shown, so slightly optimistic."),
        Column("regret", "Best mean of any optimiser at any rate minus own mean at the default."),
        Column("runs", "How many were asked for, and how many of them did not finish."),
    )
    rows = [
        (
            Entry(row.optimizer.label),
            Entry(text.rate(row.optimizer.default_lr)),
            _final(row.default, text.NONE if row.optimizer.default_lr is None else "not run"),
            Entry(_best_rate(row)),
            _final(row.best, _trouble(row.runs)),
            Entry(text.regret(metric, row.regret), _or_last(row.regret), bad=row.regret == math.inf),
            Entry(_runs(row), bad=bool(_trouble(row.runs))),
        )
        for row in summary.rows
    ]
    title = f"final {metric.name}{metric.in_unit}"
    return Table(summary.workload.title, title, columns, with_best(rows))


def target_times(summary: Summary) -> Table:
    """Steps and seconds to the target."""
    columns = (
        Column("optimiser", "In the order of the results."),
        Column("steps, default lr", "Steps to the target at the default rate: median over the seeds."),
        Column("steps, best lr", "Steps to the target at the best rate: median over the seeds."),
        Column("time, default lr", "Training time to the target at the default rate, without evaluation."),
        Column("time, best lr", "Training time to the target at the best rate, without evaluation."),
    )
    rows = [
        (
            Entry(row.optimizer.label),
            _reached(row.reached_default, seconds=False),
            _reached(row.reached_best, seconds=False),
            _reached(row.reached_default, seconds=True),
            _reached(row.reached_best, seconds=True),
        )
        for row in summary.rows
    ]
    metric = summary.workload.metric
    title = f"steps and time to {metric.name} {text.value(metric, summary.target)}"
    return Table(summary.workload.title, title, columns, with_best(rows))


def costs(summary: Summary) -> Table:
    """Time of a step and memory."""
    columns = (
        Column("optimiser", "In the order of the results."),
        Column("time", "Of a step: median over the steps of a run, then over the runs that finished."),
        Column("× fastest", "Time of a step over that of the fastest optimiser here."),
        Column("in optimiser", "The optimiser's share of the time of a step."),
        Column(
            "state, B/parameter",
            "Bytes that the optimiser keeps between steps, over the number of parameters.",
        ),
        Column("peak memory", "Of the whole process on a CPU; of what torch allocated on a GPU."),
    )
    rows = [
        (
            Entry(row.optimizer.label),
            Entry(text.duration(row.seconds_per_step), _or_last(row.seconds_per_step)),
            Entry(_times(row.relative_time), _or_last(row.relative_time)),
            Entry(text.share(row.optimizer_share), _or_last(row.optimizer_share)),
            Entry(_figures(row.state_per_parameter), _or_last(row.state_per_parameter)),
            Entry(text.size(row.peak_memory), _or_last(row.peak_memory)),
        )
        for row in summary.rows
    ]
    return Table(summary.workload.title, "cost of a step", columns, with_best(rows))


def overall(summaries: Sequence[Summary]) -> Table:
    """The regret of the default on every workload, and how many targets were reached without tuning."""
    labels = list(dict.fromkeys(row.optimizer.label for summary in summaries for row in summary.rows))
    columns = (
        Column("optimiser", "Sorted by the number of targets reached at the default rate."),
        *(
            Column(
                summary.workload.title,
                f"Best mean {summary.workload.metric.name} of any optimiser at any rate minus own at the default.",
            )
            for summary in summaries
        ),
        Column(
            "targets reached", "Workloads whose target the median over the seeds reaches at the default rate."
        ),
    )
    rows = []
    for label in labels:
        found = [next((row for row in s.rows if row.optimizer.label == label), None) for s in summaries]
        reached = sum(row is not None and _gets_there(row.reached_default) for row in found)
        regrets = [
            Entry(
                text.regret(summary.workload.metric, row.regret),
                _or_last(row.regret),
                bad=row.regret == math.inf,
            )
            if row is not None
            else Entry(text.NONE)
            for summary, row in zip(summaries, found)
        ]
        rows.append((Entry(label), *regrets, Entry(f"{reached} of {len(summaries)}", -reached)))
    rows.sort(key=lambda row: row[-1].order or 0.0)
    return Table("all workloads", "regret of the default", columns, with_best(rows))


def at_their_best(summaries: Sequence[Summary]) -> Table:
    """The best that each rule came to on every workload: of its settings, its rates, last weights and average."""
    names = list(dict.fromkeys(row.optimizer.name for summary in summaries for row in summary.rows))
    columns = (
        Column("workload", "And what is measured at the end of training."),
        *(
            Column(
                name,
                "The best of its settings, rates, last weights and average: mean ± population sd over seeds.",
            )
            for name in names
        ),
    )
    rows = []
    for summary in summaries:
        metric = summary.workload.metric
        label = f"{summary.workload.title}: {metric.name}{f', {metric.unit}' if metric.unit else ''}"
        # Rows come best first, so the first one of a rule is its best.
        best = {row.optimizer.name: row for row in reversed(summary.rows)}
        cells = [
            _final(best[name].best, _trouble(best[name].runs)) if name in best else Entry(text.NONE)
            for name in names
        ]
        rows.append((Entry(label), *cells))
    by_workload = with_best(tuple(zip(*rows)))
    return Table("all workloads", "each rule at its best", columns, tuple(zip(*by_workload)))


def across(summaries: Sequence[Summary]) -> list[Table]:
    """The tables over several workloads; none of one alone."""
    return [at_their_best(summaries), overall(summaries)] if len(summaries) > 1 else []


def _best_rate(row: Row) -> str:
    if row.best is None or row.best.lr is None:
        return text.NONE
    return text.rate(row.best.lr) + (" *" if row.best_at_edge else "")


def _final(cell: Cell | None, otherwise: str) -> Entry:
    if cell is None:
        return Entry(otherwise, math.inf, bad=otherwise != text.NONE)
    order = math.inf
    if cell.final is not None and cell.complete:
        order = -cell.final.mean if cell.metric.higher_is_better else cell.final.mean
    return Entry(text.final(cell), order, bad=not cell.complete)


def _reached(when: Reached | None, *, seconds: bool) -> Entry:
    if when is None:
        return Entry(text.NONE)
    middle = when.median(when.seconds if seconds else when.steps)
    return Entry(text.reached(when, seconds=seconds), middle, bad=math.isinf(middle))


def _gets_there(when: Reached | None) -> bool:
    return when is not None and math.isfinite(when.median(when.steps))


def _trouble(runs: Sequence[Run]) -> str:
    counts = {
        s: sum(run.status == s for run in runs) for s in ("diverged", "failed", "unfinished", "missing")
    }
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _runs(row: Row) -> str:
    trouble = _trouble(row.runs)
    return f"{len(row.runs)}; {trouble}" if trouble else str(len(row.runs))


def _times(ratio: float | None) -> str:
    return text.NONE if ratio is None else f"{ratio:.2f}×"


def _figures(number: float | None) -> str:
    return text.NONE if number is None else f"{number:.3g}"


def _or_last(number: float | None) -> float:
    return math.inf if number is None else number


def with_best(rows: Sequence[tuple[Entry, ...]]) -> tuple[tuple[Entry, ...], ...]:
    """Marks the best entries of each column, and those that read the same; none where all read the same."""
    columns = []
    for column in zip(*rows):
        best = min(column, key=lambda entry: math.inf if entry.order is None else entry.order)
        stands_out = (
            best.order is not None and math.isfinite(best.order) and len({e.text for e in column}) > 1
        )
        columns.append([replace(e, best=stands_out and e.text == best.text) for e in column])
    return tuple(zip(*columns))


# ----------------------------------------------------------------------------------------------------------- notes


def notes(comparison: Comparison, summary: Summary) -> list[str]:
    """How the numbers of a workload came about, and what to beware of."""
    metric = summary.workload.metric
    seeds = [str(seed) for seed in comparison.seeds]
    lines = [
        f"Mean ± population standard deviation over the seeds {text.listing(seeds)}, of those that finished."
        if len(seeds) > 1
        else f"One seed ({text.listing(seeds)}), so no spread is known.",
        f"The best rate has the best mean final {metric.name} of the rates tried (of those at which the most seeds "
        "finished). It is chosen on the numbers that are shown, so these are slightly optimistic.",
    ]
    if comparison.tuning_seeds:
        tuning = text.listing([str(seed) for seed in comparison.tuning_seeds])
        lines.append(
            f"All rates were tried on seed {tuning} alone; the other seeds ran the best of these, with the last "
            "weights and with their average, and the default."
        )
    if summary.target is not None:
        why = (
            "as asked for"
            if summary.target_given
            else f"{100 * TARGET_SHARE:.0f} % of the way from before training "
            f"({text.value(metric, summary.initial)}) to the best mean ({text.value(metric, summary.best)})"
        )
        lines.append(f"Target: {metric.name} {text.value(metric, summary.target)}, {why}.")
    if any(row.optimizer.averaged for row in summary.rows):
        lines.append(
            f"“{AVERAGE.strip()}”: the same runs, evaluated with the average of their weights. Time of a step "
            "includes averaging for both."
        )
    return [*lines, *warnings(summary)]


def warnings(summary: Summary) -> list[str]:
    """What a reader should beware of: missing runs, rates at the end of the grid, errors, overhead."""
    lines = []
    runs = summary.workload.trained
    trained = [row for row in summary.rows if not row.optimizer.averaged]
    if lost := [run for run in runs if run.status in ("missing", "unfinished")]:
        lines.append(
            f"{len(lost)} of {len(runs)} runs are missing or unfinished; the same command makes them up."
        )
    if edge := [row.optimizer.label for row in summary.rows if row.best_at_edge]:
        lines.append(
            f"* The best rate of {text.listing(edge)} is the smallest or largest tried; a better one may lie "
            "beyond."
        )
    for row in trained:
        if errors := list(dict.fromkeys(run.error for run in row.runs if run.status == "failed")):
            lines.append(f"{row.optimizer.label} failed: {errors[0]}")
    shares = {row.optimizer.label: row.overhead_share or 0.0 for row in trained}
    if slow := [label for label, share in shares.items() if share > OVERHEAD]:
        lines.append(
            f"With {text.listing(slow)}, up to {text.share(max(shares.values()))} of a step went into neither "
            "forward, backward nor optimiser (a busy machine, slow data), so the times say less."
        )
    if extra := [run for run in summary.workload.extra if not run.averaged]:
        lines.append(
            f"{len(extra)} runs in {summary.workload.folder} belong to no optimiser, rate or "
            "seed of the comparison: listed with the runs, and counted nowhere."
        )
    return lines


# ----------------------------------------------------------------------------------------------- terminal, Markdown


WIDE = 100
"""A terminal of so many columns has room for a second space between those of a table."""


def render(table: Table, *, wide: bool) -> RichTable:
    """The table for a terminal."""
    title = Text(f"{table.subject}: {table.title}", style="bold")
    made = RichTable(title=title, title_justify="left", box=SIMPLE, padding=(0, int(wide), 0, 0))
    for index, column in enumerate(table.columns):
        made.add_column(Text(column.name), justify="left" if index == 0 else "right", overflow="fold")
    for label, *rest in table.rows:
        cells = [Text(_lines(e), style="bold" if e.best else "red" if e.bad else "") for e in rest]
        made.add_row(Text(label.text), *cells)
    return made


def _fitting(table: Table, console: Console) -> Iterator[RichTable]:
    """The table for this terminal, in as many tables of some of its columns as keep words whole, labels apart."""
    columns = table.columns
    texts = [column.name for column in columns[1:]] + [e.text for row in table.rows for e in row[1:]]
    longest = max(cell_len(word) for text in texts for word in text.split())
    # Columns that are too wide together are cut to one width, which is at least this share of the terminal.
    if (longest + 1) * len(columns) <= console.width or len(columns) <= 2:
        yield render(table, wide=console.width >= WIDE)
        return
    middle = (len(columns) + 1) // 2
    for part in (slice(1, middle), slice(middle, None)):
        rows = tuple((row[0], *row[part]) for row in table.rows)
        yield from _fitting(replace(table, columns=(columns[0], *columns[part]), rows=rows), console)


def _lines(entry: Entry) -> str:
    """What became of the runs below the numbers: terminals are narrow."""
    return entry.text.replace("; ", "\n").replace(", ", "\n") if entry.bad else entry.text


def show(comparison: Comparison, summaries: Sequence[Summary], console: Console) -> None:
    """Prints all tables with their notes."""
    for summary in summaries:
        for table in tables(summary):
            console.print(*_fitting(table, console))
        for note in notes(comparison, summary):
            console.print(Text(f"  {note}", style="dim"))
        console.print()
    for table in across(summaries):
        console.print(*_fitting(table, console))


def markdown(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """All tables with their notes as Markdown."""
    parts = [f"`{comparison.command}`"] if comparison.command else []
    parts += [markdown_table(table) for table in across(summaries)]
    for summary in summaries:
        parts += [markdown_table(table) for table in tables(summary)]
        parts.append("\n".join(f"- {escaped(note)}" for note in notes(comparison, summary)))
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """One table under its title."""
    lines = [
        f"### {escaped(f'{table.subject}: {table.title}')}",
        "",
        _markdown_row(column.name for column in table.columns),
    ]
    lines.append("|" + " --- |" + " ---: |" * (len(table.columns) - 1))
    for row in table.rows:
        marked = (f"**{escaped(e.text)}**" if e.best else escaped(e.text) for e in row)
        lines.append(f"| {' | '.join(marked)} |")
    return "\n".join(lines)


def _markdown_row(names: Iterable[str]) -> str:
    return f"| {' | '.join(map(escaped, names))} |"


# ------------------------------------------------------------------------------------------------------------ JSON


def as_json(comparison: Comparison, summaries: Sequence[Summary]) -> dict[str, Any]:
    """All numbers of the tables, unrounded; what is infinite or unknown is null, with counts beside it."""
    return {
        "format": 1,
        "command": comparison.command,
        "seeds": list(comparison.seeds),
        "standard_deviation": "population",
        "workloads": [_summary_json(summary) for summary in summaries],
    }


def _summary_json(summary: Summary) -> dict[str, Any]:
    workload = summary.workload
    return {
        "name": workload.name,
        "preset": workload.preset,
        "changed": dict(workload.changed),
        "metric": workload.metric.key,
        "higher_is_better": workload.metric.higher_is_better,
        "initial": summary.initial,
        "target": summary.target,
        "optimizers": [
            {
                "label": row.optimizer.label,
                "name": row.optimizer.name,
                "averaged": row.optimizer.averaged,
                "default": _cell_json(row.default, row.reached_default),
                "best": _cell_json(row.best, row.reached_best),
                "best_at_edge": row.best_at_edge,
                "rates": [_cell_json(cell, None) for cell in row.cells],
                "regret": _finite(row.regret),
                "seconds_per_step": row.seconds_per_step,
                "relative_time": row.relative_time,
                "optimizer_share": row.optimizer_share,
                "overhead_share": row.overhead_share,
                "state_bytes_per_parameter": row.state_per_parameter,
                "peak_memory_bytes": row.peak_memory,
            }
            for row in summary.rows
        ],
    }


def _cell_json(cell: Cell | None, when: Reached | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {
        "lr": cell.lr,
        "final": None if cell.final is None else asdict(cell.final),
        "runs": {s: cell.count(s) for s in ("finished", "diverged", "failed", "unfinished", "missing")},
        "target": None
        if when is None
        else {
            "reached": len(when.steps),
            "median_steps": _finite(when.median(when.steps)),
            "median_seconds": _finite(when.median(when.seconds)),
        },
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
