"""The tables of a record, for the terminal and in Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table as RichTable
from rich.text import Text

from archopt.lab.markdown import escaped

HEADS = (
    "step",
    "form",
    "ms",
    "quartiles",
    "× add_",
    "bound",
    "× AdamW",
    "GB/s",
    "of copy",
    "state B/w",
    "transient",
)
SHARE = "of training"
WIDE = 110
"""A terminal of so many columns has room for all of the table's."""
LEGEND = (
    "× add_, × AdamW: time over that of a.add_(b) and of AdamW(fused=True), within rounds. bound: the least × add_ "
    "that memory allows. GB/s: of the streams that the rule needs. state B/w: bytes of state a weight. transient: "
    "memory that a step allocates, over that of the weights."
)


def title(table: dict[str, Any]) -> str:
    """`resnet18, float32: 62 tensors, 11,689,512 parameters`."""
    return (
        f"{table['set']}, {table['dtype']}: {table['tensors']:,} tensors, {table['parameters']:,} parameters "
        f"({table['what']})"
    )


def heads(table: dict[str, Any]) -> list[str]:
    """The columns."""
    return [*HEADS, SHARE] if table.get("training_step") else list(HEADS)


def cells(table: dict[str, Any]) -> list[list[str]]:
    """The rows that were measured, as text."""
    made = []
    for row in table["rows"]:
        if row["status"] != "measured":
            continue
        low, high = row["quartiles"]
        limit = row["streams"] in ("copy", "add")
        found = [
            row["name"],
            _short_form(row["form"]),
            _milliseconds(row["median"]),
            f"{_milliseconds(low)}–{_milliseconds(high)}",
            _number(row["to_add"], ".2f"),
            _number(row["bound_to_add"], ".2f"),
            _number(row["to_adamw"], ".2f"),
            _gigabytes(row["bandwidth"]),
            _number(row["of_copy"], ".0f", 100, " %"),
            "" if limit else _number(row["state_per_parameter"], ".3g"),
            "" if limit else _number(row["transient"], ".1f", 100, " %"),
        ]
        if table.get("training_step"):
            found.append(_number(row["training_share"], ".1f", 100, " %"))
        made.append(found)
    return made


def notes(table: dict[str, Any]) -> list[str]:
    """What the rows are, which were not measured and why, and the training step."""
    said = []
    for row in table["rows"]:
        if row["status"] != "measured":
            said.append(f"{row['name']}: {row['status']}: {row['reason']}")
        elif row["form"] and _short_form(row["form"]) != row["form"]:
            said.append(f"{row['name']}: {row['form']}")
    if step := table.get("training_step"):
        said.append(
            step["reason"]
            if step.get("reason")
            else f"training step: forward and backward of {step['batch']} inputs take "
            f"{_milliseconds(step['median'])} ms; an optimiser's share is that of both, each measured alone"
        )
    return said


def _short_form(form: str) -> str:
    """Its first word; the notes have the rest."""
    return (
        form if form == "its own" else form.partition(" ")[0].rstrip(",") + ("*" if "in part" in form else "")
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _gigabytes(bandwidth: float | None) -> str:
    if bandwidth is None:
        return "–"
    return f"{bandwidth / 1e9:.1f}" if bandwidth < 1e11 else f"{bandwidth / 1e9:,.0f}"


def _number(value: float | None, spec: str, factor: float = 1, unit: str = "") -> str:
    return "–" if value is None else f"{value * factor:{spec}}{unit}"


def machine(record: dict[str, Any]) -> str:
    """One line on where it was made."""
    hardware, software = record["hardware"], record["software"]
    caches = ", ".join(f"{name} {size}" for name, size in hardware["caches"].items())
    threads = software["threads"]
    details = [
        f"{hardware['cores']} cores",
        f"{threads} thread{'s' if threads > 1 else ''}",
        *([caches] if caches else []),
    ]
    cpu = f"{hardware['cpu']} ({', '.join(details)})"
    gpu = hardware["gpu"]
    where = f"{gpu['name']} (compute capability {gpu['capability']}); {cpu}" if gpu else cpu
    triton = f", triton {software['triton']}" if software["triton"] else ""
    load = hardware.get("load_average")
    busy = f"; load average {load:.1f} when it began" if load is not None else ""
    commit = f", commit {software['commit']}" if software["commit"] else ""
    return f"{where}; torch {software['torch']}{triton}, Python {software['python']}{commit}{busy}"


def render(table: dict[str, Any], *, wide: bool) -> RichTable:
    """A table for the terminal; a narrow one has no room for forms and quartiles."""
    made = RichTable(
        title=Text(title(table), style="bold"), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    shown = [index for index, head in enumerate(heads(table)) if wide or head not in ("form", "quartiles")]
    for index in shown:
        head = heads(table)[index]
        made.add_column(Text(head), justify="left" if head in HEADS[:2] else "right", overflow="fold")
    for row in cells(table):
        made.add_row(*[Text(row[index]) for index in shown])
    return made


def markdown(record: dict[str, Any]) -> str:
    """All tables with their notes, under the command and the machine."""
    parts = [f"`{record['command']}`, {record['created'][:10]}", escaped(machine(record))]
    if not record["complete"]:
        parts.append("**Not complete**: the measurement ended early.")
    for table in record["tables"]:
        lines = [_line(heads(table)), "| --- | --- |" + " ---: |" * (len(heads(table)) - 2)]
        lines += [_line(row) for row in cells(table)]
        parts += [f"### {escaped(title(table))}", "\n".join(lines)]
        if said := notes(table):
            parts.append("\n".join(f"- {escaped(note)}" for note in said))
    parts += [f"- {escaped(line)}" for line in record["refused"]]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, words))} |"
