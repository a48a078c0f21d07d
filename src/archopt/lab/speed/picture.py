"""The picture of a record: how long each step takes, in units of `a.add_(b)`, and what memory allows."""

from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from archopt.lab.report.panels import Bar, Figure, Panel, bars
from archopt.lab.report.render import vega_lite_version
from archopt.lab.report.style import KNOWN, Style, styles
from archopt.lab.report.write import PNG_SCALE
from archopt.lab.speed import table as tables
from archopt.lab.speed.contenders import ADD, COPY

LONGEST = 10.0
"""Bars end here, so that one slow step does not flatten all others; the number beside them does not."""
LIMIT = Style("#6E7781", "#A9B0BA", (), "circle")


def files(record: dict[str, Any], path: Path) -> list[tuple[Path, bytes]]:
    """Names, beside the record, and contents of the picture as SVG and PNG."""
    svg = vl_convert.vegalite_to_svg(figure(record).file_spec(_note(record)), vl_version=vega_lite_version())
    return [
        (path.with_suffix(".svg"), svg.encode()),
        (path.with_suffix(".png"), vl_convert.svg_to_png(svg, scale=PNG_SCALE)),
    ]


def figure(record: dict[str, Any]) -> Figure:
    """One panel a set and type."""
    return Figure(
        name="speed",
        subject="archopt speed",
        title="the time of a step, in units of a.add_(b) over as many entries",
        caption="Bar: median over rounds; marker: one round; black mark: the least that memory allows. Bars beyond "
        f"{LONGEST:g} are cut there; their number is not.",
        panels=tuple(_panel(table) for table in record["tables"] if _measured(table)),
    )


def _measured(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in table["rows"] if row["status"] == "measured" and row["to_add"] is not None]


def _panel(table: dict[str, Any]) -> Panel:
    rows = _measured(table)
    made = [
        Bar(
            optimizer=row["name"],
            name=row["name"],
            length=min(row["to_add"], LONGEST),
            dots=[found for found in row["to_add_by_round"] if found <= LONGEST],
            text=f"{row['to_add']:.2f}" + (" (cut)" if row["to_add"] > LONGEST else ""),
            strong=row["streams"] is not None,
        )
        for row in rows
    ]
    looks = {row["name"]: _style(row) for row in rows}
    panel = bars(Panel(looks, title=f"{table['set']}, {table['dtype']}"), made, "times a.add_(b)")
    bounds = [
        {"bar": str(index), "bound": row["bound_to_add"]}
        for index, row in enumerate(rows)
        if row["bound_to_add"] is not None
    ]
    panel.add(
        panel.of(bounds)
        .mark_tick(color="black", thickness=2.5, height=15)
        .encode(x="bound:Q", y=alt.Y("bar:N", sort=[str(index) for index in range(len(rows))]))
    )
    return panel


def _style(row: dict[str, Any]) -> Style:
    if row["name"] in (ADD, COPY):
        return LIMIT
    return KNOWN[row["style"]] if row["style"] else styles([row["name"]])[row["name"]]


def _note(record: dict[str, Any]) -> str:
    return f"{record['command']} · {tables.machine(record)}"
