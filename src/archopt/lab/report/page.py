"""The page of a comparison: what it asked for, its tables and pictures by workload, and its runs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any
from urllib.parse import quote

from archopt.lab.report import html, text
from archopt.lab.report.load import Comparison, Metric, Run
from archopt.lab.report.panels import Figure
from archopt.lab.report.statistics import Summary
from archopt.lab.report.style import Style
from archopt.lab.report.table import across, notes, tables


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
    if over_all := across(summaries):
        body = [
            *(html.table(table) for table in over_all),
            *(html.figure(figure, specs) for figure in figures[-1]),
        ]
        parts.append(html.section("all", "All workloads", body))
    for index, (summary, group) in enumerate(zip(summaries, figures)):
        parts.append(
            html.section(
                f"workload-{index}", summary.workload.title, _workload(comparison, summary, group, specs)
            )
        )
    footer = (
        "Made by <code>archopt report</code> from the records in this folder; the tables are also in "
        '<a href="table.md">table.md</a> and <a href="table.json">table.json</a>.'
    )
    return html.document(_title(comparison), parts, specs, styles, program, footer)


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
    links = "".join(
        f'<a href="#{anchor}">{escape(name)}</a>'
        for anchor, name in [("all", "All workloads"), *_anchors(comparison)]
    )
    nav = f"<nav>{links}</nav>" if len(summaries) > 1 else ""
    return (
        f"<header><h1>{escape(_title(comparison))}</h1>"
        '<p class="soft">Trained side by side by archopt, with the same initial weights and batches for all.</p>'
        f"{nav}{command}<dl>{listed}</dl>{html.legend(styles)}</header>"
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


# -------------------------------------------------------------------------------------------------------- sections


def _workload(
    comparison: Comparison, summary: Summary, group: Sequence[Figure], specs: list[dict[str, Any]]
) -> Iterable[str]:
    workload = summary.workload
    options = ", ".join(f"{key} = {value!r}" for key, value in workload.options.items())
    yield f'<p class="soft">{escape(workload.summary)}{escape(f". Options: {options}") if options else ""}</p>'
    for table in tables(summary):
        yield html.table(table)
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes(comparison, summary))
    yield f'<ul class="notes">{lines}</ul>'
    for figure in group:
        yield html.figure(figure, specs)
    yield _runs(summary)


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
