"""The page of a reproduction: our numbers beside the published ones, comparison by comparison.

Reads files alone: `reproduction.json` and the comparisons' folders. What has not been trained is shown as missing,
what could not be trained here says why, and every way in which a preset differs from the paper is listed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from archopt.lab.markdown import escaped
from archopt.lab.report import html, text
from archopt.lab.report.charts import learning_curves, sensitivity
from archopt.lab.report.heat import best_on_the_way, over_options, over_rates, varied
from archopt.lab.report.load import Comparison, Metric, ReportError, Workload, load, read_record
from archopt.lab.report.panels import Figure
from archopt.lab.report.statistics import Cell, Row, Spread, Summary, curve, spread, summarise
from archopt.lab.report.steps import UPDATE, automatic_steps, relative_updates, step_value, steps_over_options
from archopt.lab.report.style import Style, styles
from archopt.lab.report.table import Column, Entry, Table, markdown_table, with_best

RECORD = "reproduction.json"
PAGE = "report.html"
NUMBERS = {"eta": "step size eta", UPDATE: "relative update"}
FEW = 6
"""Of no more workloads of a sweep than these are step sizes told in words."""


@dataclass(frozen=True)
class Published:
    """What the paper says of one optimiser on one workload."""

    optimizer: str
    lr: float | None
    """None: not told, or the rule has none."""
    mean: float | None
    deviation: float | None
    metric: str
    """Key of the metric that it is given in; empty: the workload's."""
    best: bool = False
    """Whether it is the best value on the way."""

    def text(self, metric: Metric) -> str:
        """The value as the metric is written."""
        if self.mean is None:
            return text.NONE
        deviation = self.deviation or 0.0
        spread = Spread(self.mean, deviation, self.mean, self.mean, 3 if self.deviation is not None else 1)
        return text.mean_and_sd(metric, spread)


@dataclass(frozen=True)
class Reproduced:
    """One workload of a part: what was trained, what the paper says, and how the two settings differ."""

    summary: Summary
    published: Mapping[str, Published]
    """By the optimiser's label."""
    deviations: Mapping[str, Sequence[Any]]
    first_epoch: Sequence[Mapping[str, Any]] = ()
    """What the paper shows of the first epoch: `optimizer`, `number` and `value`."""

    @property
    def workload(self) -> Workload:
        return self.summary.workload

    @property
    def other_metric(self) -> str:
        """The paper's metric where it is another one than ours."""
        keys = {known.metric for known in self.published.values() if known.metric}
        return ", ".join(sorted(keys - {self.workload.metric.key}))

    @property
    def stated(self) -> Metric:
        """The metric in which the paper's numbers are: ours, or a loss or a distance."""
        other = self.other_metric
        return (
            Metric(other, other.replace("_", " "), higher_is_better=False) if other else self.workload.metric
        )

    def comparable(self, cell: Cell) -> Spread | None:
        """Our numbers in the paper's metric, where our records have it."""
        values = [run.final(self.stated.key) for run in cell.finished]
        return spread([value for value in values if value is not None])


@dataclass(frozen=True)
class Part:
    """One comparison of the paper."""

    name: str
    summary: str
    source: str
    refused: str
    """Why it cannot be trained here, or empty."""
    seen: tuple[str, ...]
    """What the paper's figures show beside its numbers."""
    comparison: Comparison | None
    """None where nothing has been trained."""
    workloads: tuple[Reproduced, ...]
    absent: tuple[Reproduced, ...] = ()
    """The workloads of a part that nobody has trained yet, without rows."""

    @property
    def summaries(self) -> list[Summary]:
        return [workload.summary for workload in self.workloads]

    @property
    def swept(self) -> list[str]:
        """The options that its workloads differ in, where it is a sweep over one or two numbers; else none."""
        return varied(self.summaries) if len(self.workloads) > 2 else []


@dataclass(frozen=True)
class Reproduction:
    """All that a reproduction's folder holds."""

    folder: Path
    title: str
    preset: str
    command: str
    parts: tuple[Part, ...]


def is_reproduction(folder: Path) -> bool:
    """Whether this is the folder of a reproduction rather than of one comparison."""
    return (Path(folder) / RECORD).is_file()


def load_reproduction(folder: Path) -> Reproduction:
    """Reads a reproduction. Raises ReportError, which names the file, where a record is broken."""
    record = read_record(folder / RECORD)
    try:
        parts = tuple(_part(folder, entry, record["preset"]) for entry in record["parts"])
        return Reproduction(folder, record["title"], record["preset"], record["command"], parts)
    except (KeyError, TypeError) as error:
        raise ReportError(f"{folder / RECORD} is not a reproduction's record ({error!r})") from None


def _part(folder: Path, entry: Mapping[str, Any], preset: str) -> Part:
    place = folder / entry["name"]
    comparison, workloads, absent = None, [], []
    if (place / "comparison.json").is_file() and any(place.rglob("config.json")):
        comparison = load(place)
        for summary, told in zip(summarise(comparison), entry["workloads"], strict=True):
            first = told.get("first_epoch", ())  # which older records do not have
            workloads.append(Reproduced(summary, _published(told), told["deviations"], first))
    else:
        absent = [
            _absent(told, preset) for told in entry["workloads"] if "metric" in told
        ]  # older records lack it
    return Part(
        entry["name"],
        entry["summary"],
        entry["source"],
        entry["refused"],
        tuple(entry.get("seen", ())),  # which older records do not have
        comparison,
        tuple(workloads),
        tuple(absent),
    )


def _absent(told: Mapping[str, Any], preset: str) -> Reproduced:
    """A workload of which there are the paper's numbers alone."""
    workload = Workload(told["name"], preset, "", "", Metric(**told["metric"]), {}, told["changed"], (), ())
    return Reproduced(Summary(workload, (), None, None, None, False), _published(told), {})


def _published(told: Mapping[str, Any]) -> dict[str, Published]:
    return {known["optimizer"]: Published(**known) for known in told["published"]}


# -- tables ------------------------------------------------------------------------------------------------


def beside(workload: Reproduced) -> Table:
    """Every optimiser's best numbers beside the paper's."""
    metric = workload.workload.metric
    columns: tuple[Column, ...] = (
        Column("optimiser", "Sorted by our final metric; what has not been trained comes last."),
        Column(
            "lr",
            "The rate at which our number stands: the best of those that were run; of two, both are told.",
        ),
        Column("here", f"Final {metric.name}: mean ± population standard deviation over the seeds."),
        Column("seeds", "That finished, of those asked for at this rate."),
        Column("published lr", "The paper's best rate."),
        Column("published", "The paper's number, with its deviation over seeds where it gives one."),
    )
    rows = [
        _beside_row(row.optimizer.label, cell, workload)
        for row in sorted(workload.summary.rows, key=lambda row: row.leading.rank())
        for cell in _apart(row)
    ]
    trained = {row.optimizer.label for row in workload.summary.rows}
    rows += [_beside_row(label, None, workload) for label in workload.published if label not in trained]
    if workload.other_metric:
        name = workload.stated.name
        ours = Column(f"here, {name}", f"Our final {name}, at the rate that is best by {metric.name}.")
        columns = (*columns[:4], ours, *columns[4:])
    title = f"final {metric.name}{metric.in_unit}, beside the paper's"
    return Table(workload.workload.title, title, columns, with_best(rows))


def _apart(row: Row) -> list[Cell]:
    """The cells of a row that are told: the best, and where just two rates were run the other one too."""
    others = [cell for cell in row.cells if cell is not row.leading and cell.finished]
    return [row.leading, *(others if len(row.cells) == 2 else ())]


def _beside_row(label: str, cell: Cell | None, workload: Reproduced) -> tuple[Entry, ...]:
    metric, known = workload.workload.metric, workload.published.get(label)
    final = None if cell is None else cell.final
    sign = -1 if metric.higher_is_better else 1
    seeds = text.NONE if cell is None else f"{len(cell.finished)}/{len(cell.runs)}"
    stated = text.NONE if known is None else known.text(workload.stated)
    sign_there = -1 if workload.stated.higher_is_better else 1
    comparable = None if cell is None else workload.comparable(cell)
    ours = (Entry(text.mean_and_sd(workload.stated, comparable)),) if workload.other_metric else ()
    order = None if known is None or known.mean is None else sign_there * known.mean
    return (
        Entry(label),
        Entry(text.rate(None if cell is None else cell.lr)),
        Entry(text.final(cell), math.inf if final is None else sign * final.mean),
        Entry(seeds, bad=cell is not None and not cell.complete),
        *ours,
        Entry(text.rate(None if known is None else known.lr)),
        Entry(stated, order),
    )


def first_epoch(workload: Reproduced) -> Table | None:
    """The numbers of the steps of the first epoch beside the paper's; None where it tells none."""
    if not workload.first_epoch:
        return None
    rows = []
    for seen in workload.first_epoch:
        row = next((r for r in workload.summary.rows if r.optimizer.label == seen["optimizer"]), None)
        points = [] if row is None else curve(row.leading.finished, step_value(seen["number"], "mean"))
        setting = seen["optimizer"] if row is None else text.setting(row.optimizer.label, row.leading.lr)
        here = f"{points[0].mean:.2g}" if points else text.NONE
        rows.append(
            (Entry(setting), Entry(NUMBERS[seen["number"]]), Entry(here), Entry(f"{seen['value']:.2g}"))
        )
    columns = (
        Column("optimiser", "At its best rate here."),
        Column("number", "Its mean over the steps of the epoch."),
        Column("here", "In our first epoch, which has as many steps as the preset makes it."),
        Column("published", "Read off the paper's figure to 10 or 20 %."),
    )
    return Table(workload.workload.title, "the first epoch, beside the paper's", columns, tuple(rows))


def over_sweep(part: Part) -> Table:
    """All workloads of a sweep in one table: at the end, at the best evaluation on the way, and in the paper."""
    names, metric = part.swept, part.workloads[0].workload.metric
    columns = (
        *(Column(name, "What the workloads of the sweep differ in.") for name in names),
        Column("optimiser", "At its best rate."),
        Column(
            "here, at the end", f"Final {metric.name}: mean ± population standard deviation over the seeds."
        ),
        Column("here, best on the way", "The best of all evaluations of a run, so chosen on the test data."),
        Column("seeds", "That finished, of those asked for."),
        Column("published", "The paper's number."),
    )
    rows = [_sweep_row(workload, row, names) for workload in part.workloads for row in workload.summary.rows]
    title = f"{metric.name}{metric.in_unit}, beside the paper's"
    return Table(part.name, title, columns, tuple(rows))


def _sweep_row(workload: Reproduced, row: Row, names: Sequence[str]) -> tuple[Entry, ...]:
    metric, cell = workload.workload.metric, row.leading
    known = workload.published.get(row.optimizer.label)
    best = _on_the_way(cell)
    options = [workload.workload.options[name] for name in names]
    return (
        *(Entry(str(value), float(value)) for value in options),
        Entry(row.optimizer.label),
        Entry(text.final(cell)),
        Entry(text.mean_and_sd(metric, best)),
        Entry(f"{len(cell.finished)}/{len(cell.runs)}", bad=not cell.complete),
        Entry(text.NONE if known is None else known.text(metric)),
    )


def _on_the_way(cell: Cell) -> Spread | None:
    return spread([value for run in cell.finished if (value := best_on_the_way(run)) is not None])


def overview(reproduction: Reproduction) -> Table:
    """The paper's table: a row a workload, each optimiser's number with the published one in brackets."""
    told = [
        workload
        for part in reproduction.parts
        for workload in (*part.workloads, *part.absent)
        if any(known.mean is not None for known in workload.published.values())
    ]
    fullest = sorted(told, key=lambda workload: -len(workload.published))  # its order is the paper's
    labels = list(dict.fromkeys(label for workload in fullest for label in workload.published))
    own = list(
        dict.fromkeys(
            row.optimizer.label
            for workload in told
            for row in workload.summary.rows
            if row.optimizer.label not in labels and not row.optimizer.averaged
        )
    )
    columns = (
        Column("workload", "With the preset that was trained."),
        Column("metric", "Ours; where the paper's is another, that one in brackets."),
        *(Column(label, "Ours, and in brackets the published number.") for label in (*labels, *own)),
    )
    rows = tuple(_overview_row(workload, (*labels, *own)) for workload in told)
    return Table(reproduction.title, "ours (published)", columns, rows)


def _overview_row(workload: Reproduced, labels: Sequence[str]) -> tuple[Entry, ...]:
    metric = workload.workload.metric
    arrow = "↑" if metric.higher_is_better else "↓"
    if any(known.best for known in workload.published.values()):
        arrow += ", the best on the way"
    other = f" ({workload.other_metric})" if workload.other_metric else ""
    rows = {row.optimizer.label: row for row in workload.summary.rows}
    return (
        Entry(workload.workload.title),
        Entry(f"{metric.name} {arrow}{other}"),
        *(_overview_entry(rows.get(label), workload, label) for label in labels),
    )


def _overview_entry(row: Row | None, workload: Reproduced, label: str) -> Entry:
    known = workload.published.get(label)
    stated = f" ({known.text(workload.stated)})" if known and known.mean is not None else ""
    if known and row and known.mean is not None and known.lr not in (None, row.leading.lr):
        final, there = text.final(row.leading), known.text(workload.stated)
        own = f"{final} at {text.rate(row.leading.lr)}"
        return Entry(f"{own} ({there} at {text.rate(known.lr)})", best=row is _best(workload.summary))
    if row is None:
        return Entry(f"{text.NONE}{stated}")
    if known is not None and known.best:
        return Entry(
            f"{text.mean_and_sd(workload.workload.metric, _on_the_way(row.leading))}{stated}", best=True
        )
    return Entry(f"{text.final(row.leading)}{stated}", best=row is _best(workload.summary))


def _best(summary: Summary) -> Row | None:
    ranked = [row for row in summary.rows if row.best is not None]
    return min(ranked, key=lambda row: row.leading.rank(), default=None)


# -- words -------------------------------------------------------------------------------------------------


def remarks(workload: Reproduced) -> list[str]:
    """In what the training differs from the paper's, and whether the order of the optimisers is the paper's."""
    lines = []
    if workload.deviations:
        changes = [
            f"{name} {_told(here)} instead of {_told(paper)}"
            for name, (paper, here) in workload.deviations.items()
        ]
        lines.append(f"Not the paper's setting: {'; '.join(changes)}.")
    if workload.workload.data_note:
        lines.append(f"Not the paper's data: {workload.workload.data_note}.")
    if workload.other_metric:
        there = any(workload.comparable(row.leading) for row in workload.summary.rows)
        beside = "of which ours stand beside them" if there else "and cannot be compared with ours"
        lines.append(f"The paper's numbers are in another metric, {workload.other_metric}, {beside}.")
    lines += _orders(workload)
    lines += _rates(workload)
    return lines


def _told(value: object) -> str:
    """An option's value."""
    return "unset" if value is None else repr(value)


def _steps(workload: Reproduced) -> Iterator[str]:
    """Step sizes and relative updates over training, to stand beside what the paper's figures show."""
    for key, name in NUMBERS.items():
        told = []
        for row in workload.summary.rows:
            points = curve(row.leading.finished, step_value(key, "mean"))
            if points:
                means = [point.mean for point in points]
                first, last = (f"{mean:.2g}" for mean in (means[0], means[-1]))
                told.append(
                    f"{text.setting(row.optimizer.label, row.leading.lr)} {first} in the first, {min(means):.2g} "
                    f"to {max(means):.2g} on the way, {last} in the last"
                )
        if told:
            title = workload.workload.title
            yield f"Means of the {name} over the steps of an epoch, {title}: {'; '.join(told)}."


def _seen(part: Part) -> list[str]:
    """What the paper's figures show."""
    return [f"The paper's figures (read off to 10 or 20 %): {'; '.join(part.seen)}."] if part.seen else []


def sweep_remarks(part: Part) -> list[str]:
    """What `remarks` says of the workloads of a sweep, each line once."""
    lines = [line for workload in part.workloads for line in remarks(workload)]
    if len(part.workloads) <= FEW:  # of more, the pictures tell
        lines += [line for workload in part.workloads for line in _steps(workload)]
    return list(dict.fromkeys(lines))


def _orders(workload: Reproduced) -> Iterator[str]:
    """The order of the optimisers that both have."""
    ours = {
        row.optimizer.label: told.mean
        for row in workload.summary.rows
        if row.best is not None and (told := workload.comparable(row.leading)) is not None
    }
    means = {
        label: known.mean
        for label, known in workload.published.items()
        if known.mean is not None and label in ours
    }
    if len(means) < 2:
        return
    sign = -1 if workload.stated.higher_is_better else 1
    here = sorted(means, key=lambda label: sign * ours[label])
    paper = sorted(here, key=lambda label: sign * means[label])  # where the paper has two alike, in our order
    same = "the same order" if paper == here else "another order"
    rated = [row for row in workload.summary.rows if row.optimizer.rate and not row.optimizer.averaged]
    tried = [row.optimizer.label for row in rated if len(row.cells) > 1]
    uneven = f" Rates were tried for {', '.join(tried)} alone." if 0 < len(tried) < len(rated) else ""
    yield f"From best to worst in the paper: {', '.join(paper)}; here: {', '.join(here)} ({same}).{uneven}"


def _rates(workload: Reproduced) -> Iterator[str]:
    """The best rates, where several were tried."""
    pairs = []
    for row in workload.summary.rows:
        known = workload.published.get(row.optimizer.label)
        tried = [cell for cell in row.cells if cell.finished]
        if known is not None and row.best is not None and len(tried) > 1:
            edge = ", at the edge of the rates tried" if row.best_at_edge else ""
            pairs.append(
                f"{row.optimizer.label} {text.rate(row.best.lr)} (paper: {text.rate(known.lr)}{edge})"
            )
    if pairs:
        yield f"Best rates here: {'; '.join(pairs)}."


# -- the files ---------------------------------------------------------------------------------------------


def markdown(reproduction: Reproduction) -> str:
    """All tables with their remarks as Markdown."""
    pieces = [f"# {escaped(reproduction.title)}", f"`{reproduction.command}`"]
    pieces.append(f"Preset {escaped(reproduction.preset)}.")
    pieces.append(markdown_table(overview(reproduction)))
    for part in reproduction.parts:
        pieces.append(f"## {escaped(part.name)}: {escaped(part.summary)}")
        told = [f"{part.source}.", _absence(part), _seeds(part)]
        pieces.append(" ".join(escaped(words) for words in told if words))
        if part.workloads and part.seen:
            pieces.append(escaped(_seen(part)[0]))
        if part.swept:
            pieces.append(markdown_table(over_sweep(part)))
            pieces.append("\n".join(f"- {escaped(line)}" for line in sweep_remarks(part)))
            continue
        for workload in part.workloads:
            pieces.append(markdown_table(beside(workload)))
            if (first := first_epoch(workload)) is not None:
                pieces.append(markdown_table(first))
            lines = [*remarks(workload), *_steps(workload)]
            pieces.append("\n".join(f"- {escaped(line)}" for line in lines))
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _absence(part: Part) -> str:
    if part.refused:
        return f"Not trained here: {part.refused}"
    return "" if part.workloads else "Not trained yet."


def _seeds(part: Part) -> str:
    """Which seeds were asked for, and which of them try all rates."""
    if part.comparison is None:
        return ""
    seeds, tuning = part.comparison.seeds, part.comparison.tuning_seeds
    told = f"Seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    return f"{told}, all rates on {', '.join(map(str, tuning))}." if tuning else f"{told}."


def page(reproduction: Reproduction, program: str) -> str:
    """The page, which draws its own pictures with `program`."""
    looks = _looks(reproduction)
    specs: list[dict[str, Any]] = []
    links = "".join(f'<a href="#{escape(part.name)}">{escape(part.name)}</a>' for part in reproduction.parts)
    pieces = [
        f"<header><h1>{escape(reproduction.title)}</h1>"
        f'<p class="soft">Trained again by archopt, preset {escape(reproduction.preset)}: our numbers beside the '
        "paper's. Means ± population standard deviations over seeds.</p>"
        f"<nav>{links}</nav><pre>{escape(reproduction.command)}</pre>{html.legend(looks)}</header>",
        html.section("table", "The published table", [html.table(overview(reproduction))]),
    ]
    for part in reproduction.parts:
        title = f"{html.capital(part.summary)}"
        pieces.append(html.section(part.name, title, _body(part, looks, specs)))
    footer = (
        "Made by <code>archopt report</code> from the records in this folder; the tables are also in "
        '<a href="report.md">report.md</a>.'
    )
    return html.document(reproduction.title, pieces, specs, looks, program, footer)


def _looks(reproduction: Reproduction) -> dict[str, Style]:
    labels = [
        optimizer.label
        for part in reproduction.parts
        if part.comparison is not None
        for optimizer in part.comparison.optimizers
    ]
    return styles(dict.fromkeys(labels))


def _body(part: Part, looks: dict[str, Style], specs: list[dict[str, Any]]) -> Iterable[str]:
    whole = f' <a href="{quote(part.name)}/{PAGE}">All of it.</a>' if part.workloads else ""
    told = f"{part.name}: {part.source}. {_absence(part)} {_seeds(part)}"
    yield f'<p class="soft">{escape(told)}{whole}</p>'
    if part.workloads:
        yield "".join(f"<p>{escape(line)}</p>" for line in _seen(part))
    if part.swept:
        yield html.table(over_sweep(part))
        lines = "".join(f"<li>{escape(line)}</li>" for line in sweep_remarks(part))
        yield f'<ul class="notes">{lines}</ul>'
        for figure in (*over_options(part.summaries, looks), *steps_over_options(part.summaries)):
            yield html.figure(figure, specs, f"{part.name}/{html.FIGURES}")
        return
    for workload in part.workloads:
        yield html.table(beside(workload), subject=True)
        if (first := first_epoch(workload)) is not None:
            yield html.table(first)
        lines = "".join(f"<li>{escape(line)}</li>" for line in (*remarks(workload), *_steps(workload)))
        yield f'<ul class="notes">{lines}</ul>'
        for figure in _figures(workload.summary, looks):
            yield html.figure(figure, specs, f"{part.name}/{html.FIGURES}")


def _figures(summary: Summary, looks: dict[str, Style]) -> Iterator[Figure]:
    """Curves, step sizes, relative updates and, where several rates were tried, the metric over the rate."""
    several = any(len(row.cells) > 1 for row in summary.rows)
    drawn = [
        learning_curves(summary, looks, best=True),
        automatic_steps(summary, looks),
        relative_updates(summary, looks),
        sensitivity(summary, looks) if several else None,
        over_rates(summary, looks),
    ]
    yield from (figure for figure in drawn if figure is not None)
