"""The page: one HTML file that holds its tables, its pictures and what draws them, and asks for nothing else."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from archopt.lab.report import text
from archopt.lab.report.load import Comparison, Metric, Run
from archopt.lab.report.panels import Figure
from archopt.lab.report.statistics import Summary
from archopt.lab.report.style import Style, config
from archopt.lab.report.table import Entry, Table, notes, overall, tables

FIGURES = "figures"
"""The folder beside the page that holds the pictures as files."""

MARKERS = {
    "circle": "M4 0A4 4 0 1 1 -4 0A4 4 0 1 1 4 0Z",
    "square": "M-3.5 -3.5H3.5V3.5H-3.5Z",
    "diamond": "M0 -4.5L4 0L0 4.5L-4 0Z",
    "triangle-up": "M0 -4L4.5 4H-4.5Z",
    "triangle-down": "M0 4L4.5 -4H-4.5Z",
    "triangle-right": "M4 0L-4 -4.5V4.5Z",
    "triangle-left": "M-4 0L4 -4.5V4.5Z",
}


def page(
    comparison: Comparison,
    summaries: Sequence[Summary],
    figures: Sequence[Sequence[Figure]],
    styles: dict[str, Style],
    program: str,
) -> str:
    """The whole page. `figures` has each workload's pictures and, last, those over all; `program` draws them."""
    specs: list[dict[str, Any]] = []
    parts = [_header(comparison, summaries, styles)]
    if len(summaries) > 1:
        body = [_table(overall(summaries)), *(_figure(figure, specs) for figure in figures[-1])]
        parts.append(_section("all", "All workloads", body))
    for index, (summary, group) in enumerate(zip(summaries, figures)):
        parts.append(
            _section(
                f"workload-{index}", summary.workload.title, _workload(comparison, summary, group, specs)
            )
        )
    data = {
        "specs": specs,
        "config": {"light": config(dark=False), "dark": config(dark=True)},
        "dark": {style.light: style.dark for style in styles.values()},
    }
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; \
style-src 'unsafe-inline'; img-src data:">
<title>{escape(_title(comparison))}</title>
<style>{_asset("page.css")}</style>
</head>
<body>
{"".join(parts)}
<footer>Made by <code>archopt report</code> from the records in this folder; the tables are also in
<a href="table.md">table.md</a> and <a href="table.json">table.json</a>.</footer>
<script type="application/json" id="page-data">{_json(data)}</script>
<script>{_script(program)}</script>
<script>{_script(_asset("page.js"))}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _script(source: str) -> str:
    return source.replace("</script", "<\\/script")


# ---------------------------------------------------------------------------------------------------------- header


VERSIONS = {"archopt": "archopt {}", "torch": "PyTorch {}", "python": "Python {}"}
MACHINE = {
    "machine": "{}",
    "system": "{}",
    "cores": "{} cores",
    "device": "trained on {}",
    "threads": "CPU threads a run: {}",
}
"""What is told of the environment of the runs, by its keys there."""


def _title(comparison: Comparison) -> str:
    labels = [optimizer.label for optimizer in comparison.optimizers if not optimizer.averaged]
    shown = text.listing(labels if len(labels) <= 8 else [*labels[:7], f"{len(labels) - 7} more"])
    averaged = ", each also averaged," if any(o.averaged for o in comparison.optimizers) else ""
    return f"{shown}{averaged} on {text.listing([workload.title for workload in comparison.workloads])}"


def _header(comparison: Comparison, summaries: Sequence[Summary], styles: dict[str, Style]) -> str:
    runs = [run for workload in comparison.workloads for run in workload.trained]
    counts = Counter(run.status for run in runs)
    done = ", ".join(
        f"{counts[s]} {s}" for s in ("finished", "diverged", "failed", "unfinished", "missing") if counts[s]
    )
    facts = {
        "Date": datetime.fromtimestamp(comparison.written, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        "Runs": f"{len(runs)}: {done}",
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Learning rates": _rates(comparison),
        "Versions": _environment(runs, VERSIONS),
        "Machine": _environment(runs, MACHINE),
        "Measured": "; ".join(dict.fromkeys(_measured(s.workload.metric) for s in summaries))
        + ". Seconds count training alone: no evaluation, no loading, no checkpoints.",
    }
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items() if fact
    )
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else ""
    chips = "".join(f"<li>{_chip(style)}{escape(label)}</li>" for label, style in styles.items())
    links = "".join(
        f'<a href="#{anchor}">{escape(name)}</a>'
        for anchor, name in [("all", "All workloads"), *_anchors(comparison)]
    )
    nav = f"<nav>{links}</nav>" if len(summaries) > 1 else ""
    return (
        f"<header><h1>{escape(_title(comparison))}</h1>"
        '<p class="soft">Trained side by side by archopt, with the same initial weights and batches for all.</p>'
        f'{nav}{command}<dl>{listed}</dl><ul class="legend">{chips}</ul></header>'
    )


def _anchors(comparison: Comparison) -> Iterable[tuple[str, str]]:
    return ((f"workload-{index}", workload.title) for index, workload in enumerate(comparison.workloads))


def _measured(metric: Metric) -> str:
    return (
        f"{metric.name} at the end of training ({'higher' if metric.higher_is_better else 'lower'} is better)"
    )


def _rates(comparison: Comparison) -> str:
    if isinstance(comparison.lrs, list):
        return f"{', '.join(text.rate(lr) for lr in comparison.lrs)}, and each optimiser's default"
    words = {
        "grid": "each workload's grid, and each optimiser's default",
        "published": "the published ones",
        "default": "each optimiser's default",
    }
    return words.get(str(comparison.lrs), "")


def _environment(runs: Sequence[Run], names: dict[str, str]) -> str:
    """What the runs ran on; where they differ, each variety with its number of runs."""
    kinds: Counter[str] = Counter()
    for run in runs:
        known = run.config.get("environment")
        if isinstance(known, dict):
            parts = [words.format(known[key]) for key, words in names.items() if known.get(key) is not None]
            kinds[", ".join(parts)] += 1
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{kind} ({count} runs)" for kind, count in kinds.most_common())


def _chip(style: Style) -> str:
    """A line with the optimiser's marker, dash and colour, for either scheme."""
    dash = f' stroke-dasharray="{" ".join(map(str, style.dash))}"' if style.dash else ""
    return "".join(
        f'<svg class="{scheme}" width="34" height="12" viewBox="-17 -6 34 12" aria-hidden="true">'
        f'<path d="M-17 0H17" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        f'<path d="{MARKERS[style.marker]}" fill="{color}"/></svg>'
        for scheme, color in (("light", style.light), ("dark", style.dark))
    )


# -------------------------------------------------------------------------------------------------------- sections


def _section(anchor: str, title: str, body: Iterable[str]) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(body)}</section>'


def _workload(
    comparison: Comparison, summary: Summary, group: Sequence[Figure], specs: list[dict[str, Any]]
) -> Iterable[str]:
    workload = summary.workload
    options = ", ".join(f"{key} = {value!r}" for key, value in workload.options.items())
    yield f'<p class="soft">{escape(workload.summary)}{escape(f". Options: {options}") if options else ""}</p>'
    for table in tables(summary):
        yield _table(table)
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes(comparison, summary))
    yield f'<ul class="notes">{lines}</ul>'
    for figure in group:
        yield _figure(figure, specs)
    yield _runs(summary)


def _table(table: Table) -> str:
    head = "".join(
        f'<th title="{escape(column.help)}">{escape(column.name)}</th>' for column in table.columns
    )
    rows = "".join(f"<tr>{''.join(map(_entry, row))}</tr>" for row in table.rows)
    return (
        f'<h3>{escape(_capital(table.title))}</h3><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _entry(entry: Entry) -> str:
    names = " ".join(name for name, on in (("best", entry.best), ("bad", entry.bad)) if on)
    kind = f' class="{names}"' if names else ""
    order = "" if entry.order is None else f' data-order="{_order(entry.order)}"'
    return f"<td{kind}{order}>{escape(entry.text)}</td>"


def _order(number: float) -> str:
    """As JavaScript reads it."""
    return {"inf": "Infinity", "-inf": "-Infinity"}.get(repr(number), repr(number))


def _figure(figure: Figure, specs: list[dict[str, Any]]) -> str:
    alone = " alone" if len(figure.panels) == 1 else ""
    panels = []
    for spec in figure.page_specs():
        label = escape(figure.title)
        panels.append(
            f'<div class="panel{alone}" role="img" aria-label="{label}" data-spec="{len(specs)}"></div>'
        )
        specs.append(spec)
    links = " · ".join(
        f'<a href="{FIGURES}/{quote(figure.name)}.{kind}">{kind.upper()}</a>' for kind in ("png", "svg")
    )
    return (
        f"<figure><h3>{escape(_capital(figure.title))}</h3>"
        f'<figcaption>{escape(figure.caption)} <span class="files">{links}</span></figcaption>'
        f'<div class="panels">{"".join(panels)}</div></figure>'
    )


def _runs(summary: Summary) -> str:
    """Every run with what became of it, folded away."""
    workload = summary.workload
    head = "".join(
        f"<th{' class=left' if name in LEFT else ''}>{name}</th>"
        for name in (
            "optimiser",
            "lr",
            "seed",
            "status",
            "final",
            "best",
            "at step",
            "steps",
            "time",
            "folder",
        )
    )
    rows = "".join(_run(run, workload.metric) for run in (*workload.runs, *workload.extra))
    count = sum(not run.averaged for run in (*workload.runs, *workload.extra))
    return (
        f"<details><summary>All {count} runs</summary>"
        f'<div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


LEFT = ("status", "folder")


def _run(run: Run, metric: Metric) -> str:
    best = run.result.get("best")
    found = best if isinstance(best, dict) else {}
    step = run.result.get("step")
    status = f"{run.status}: {run.error}" if run.error else run.status
    folder = f'<a href="{quote(run.folder)}/">{escape(run.folder)}</a>' if run.folder else text.NONE
    return (
        f"<tr><td>{escape(run.optimizer)}</td><td>{text.rate(run.lr)}</td><td>{run.seed}</td>"
        f'<td class="left{"" if run.status == "finished" else " bad"}">{escape(status)}</td>'
        f"<td>{text.value(metric, run.final(metric.key))}</td><td>{text.value(metric, found.get('value'))}</td>"
        f"<td>{found.get('step', text.NONE)}</td><td>{text.NONE if step is None else step}</td>"
        f'<td>{text.duration(run.number("seconds"))}</td><td class="left">{folder}</td></tr>'
    )
