"""Turns figures into files: PNG and SVG by vl-convert, and the page with the program that draws them itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import altair as alt
import vl_convert

from archopt.lab.report.charts import figures
from archopt.lab.report.html import FIGURES
from archopt.lab.report.load import Comparison
from archopt.lab.report.page import page
from archopt.lab.report.panels import Figure
from archopt.lab.report.statistics import Summary
from archopt.lab.report.style import Style


@dataclass(frozen=True)
class Drawn:
    """A comparison's pictures and page."""

    page: str
    figures: Sequence[Figure]
    note: str
    """What every picture says below its caption, so that it can stand alone."""

    def files(self, scale: float) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the pictures' files."""
        for figure in self.figures:
            svg = vl_convert.vegalite_to_svg(figure.file_spec(self.note), vl_version=vega_lite_version())
            yield f"{FIGURES}/{figure.name}.svg", svg.encode()
            yield f"{FIGURES}/{figure.name}.png", vl_convert.svg_to_png(svg, scale=scale)


def draw(comparison: Comparison, summaries: Sequence[Summary], styles: dict[str, Style]) -> Drawn:
    """All pictures of a comparison, and its page."""
    groups = figures(summaries, styles)
    runs = sum(len(workload.trained) for workload in comparison.workloads)
    seeds = ", ".join(map(str, comparison.seeds))
    note = f"{comparison.command or 'archopt report'} · {runs} runs, seeds {seeds}"
    made = page(comparison, summaries, groups, styles, program())
    return Drawn(made, [figure for group in groups for figure in group], note)


@cache
def program() -> str:
    """What draws the pictures in a browser: Vega, Vega-Lite and vega-embed in one script. Takes seconds to make."""
    return vl_convert.javascript_bundle(vl_version=vega_lite_version())  # type: ignore[call-arg]


def vega_lite_version() -> str:
    """The version of Vega-Lite that altair writes, as far as vl-convert has it: the same minor, else the newest of
    the same major."""
    major, minor, *_ = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    known = [version for version in vl_convert.get_vegalite_versions() if version.split(".")[0] == major]
    return f"{major}.{minor}" if f"{major}.{minor}" in known else known[-1]
