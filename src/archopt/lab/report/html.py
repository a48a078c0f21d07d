"""The pieces of pages: one HTML file that asks for nothing else, with its tables and pictures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from archopt.lab.report.panels import Figure
from archopt.lab.report.style import OTHERS, Style, config
from archopt.lab.report.table import Entry, Table

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


def document(
    title: str,
    parts: Iterable[str],
    specs: Sequence[Mapping[str, Any]],
    styles: Mapping[str, Style],
    program: str,
    footer: str,
) -> str:
    """The whole file. `specs` are the pictures in the order in which `figure` met them; `program` draws them."""
    data = {
        "specs": specs,
        "config": {"light": config(dark=False), "dark": config(dark=True)},
        "dark": {style.light: style.dark for style in (*OTHERS, *styles.values())},
    }
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; \
style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{_asset("page.css")}</style>
</head>
<body>
{"".join(parts)}
<footer>{footer}</footer>
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


def legend(styles: Mapping[str, Style]) -> str:
    """Every optimiser with its line."""
    chips = "".join(f"<li>{_chip(style)}{escape(label)}</li>" for label, style in styles.items())
    return f'<ul class="legend">{chips}</ul>'


def _chip(style: Style) -> str:
    """A line with the optimiser's marker, dash and colour, for either scheme."""
    dash = f' stroke-dasharray="{" ".join(map(str, style.dash))}"' if style.dash else ""
    return "".join(
        f'<svg class="{scheme}" width="34" height="12" viewBox="-17 -6 34 12" aria-hidden="true">'
        f'<path d="M-17 0H17" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        f'<path d="{MARKERS[style.marker]}" fill="{color}"/></svg>'
        for scheme, color in (("light", style.light), ("dark", style.dark))
    )


def section(anchor: str, title: str, body: Iterable[str]) -> str:
    """A part of the page under a heading, which links reach by the anchor."""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(body)}</section>'


def table(shown: Table, *, subject: bool = False) -> str:
    """A table under its title, and before that what it is about where no heading says so."""
    title = f"{shown.subject}: {shown.title}" if subject else capital(shown.title)
    head = "".join(
        f'<th title="{escape(column.help)}">{escape(column.name)}</th>' for column in shown.columns
    )
    rows = "".join(f"<tr>{''.join(map(_entry, row))}</tr>" for row in shown.rows)
    return (
        f'<h3>{escape(title)}</h3><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def capital(words: str) -> str:
    """With its first letter capital."""
    return words[:1].upper() + words[1:]


def _entry(entry: Entry) -> str:
    names = " ".join(name for name, on in (("best", entry.best), ("bad", entry.bad)) if on)
    kind = f' class="{names}"' if names else ""
    order = "" if entry.order is None else f' data-order="{_order(entry.order)}"'
    return f"<td{kind}{order}>{escape(entry.text)}</td>"


def _order(number: float) -> str:
    """As JavaScript reads it."""
    return {"inf": "Infinity", "-inf": "-Infinity"}.get(repr(number), repr(number))


def figure(shown: Figure, specs: list[dict[str, Any]], folder: str = FIGURES) -> str:
    """A picture, drawn from the next of `specs`; its files lie in `folder`."""
    alone = " alone" if len(shown.panels) == 1 else ""
    panels = []
    for spec in shown.page_specs():
        label = escape(shown.title)
        panels.append(
            f'<div class="panel{alone}" role="img" aria-label="{label}" data-spec="{len(specs)}"></div>'
        )
        specs.append(spec)
    links = " · ".join(
        f'<a href="{quote(folder)}/{quote(shown.name)}.{kind}">{kind.upper()}</a>' for kind in ("png", "svg")
    )
    return (
        f"<figure><h3>{escape(capital(shown.title))}</h3>"
        f'<figcaption>{escape(shown.caption)} <span class="files">{links}</span></figcaption>'
        f'<div class="panels">{"".join(panels)}</div></figure>'
    )
