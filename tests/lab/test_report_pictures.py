"""The report's looks: axes, labels and colours; and that its pictures are valid and tell what they should."""

import itertools
import json
import math
from pathlib import Path

import altair as alt
import jsonschema
import pytest
import vl_convert
from hypothesis import assume, given
from hypothesis import strategies as st

from archopt.lab.report.charts import figures, learning_curves, sensitivity, time_to_target
from archopt.lab.report.horizon import horizons
from archopt.lab.report.load import load
from archopt.lab.report.panels import Figure
from archopt.lab.report.render import vega_lite_version
from archopt.lab.report.statistics import Summary, summarise
from archopt.lab.report.style import KNOWN, choose_axis, linear_ticks, log_ticks, spread_labels, styles
from report_records import ACCURACY, LOSS, Invented, write_comparison, write_run

NERO = Invented("nero", 0.01, 0.01, 1.0, 1.0)
FREE = Invented("agd", None, None, 1.2, 1.0)
WILD = Invented("sgd", 0.001, 0.01, 1.1, 1.0, diverges_above=0.03)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    root = tmp_path_factory.mktemp("records")
    write_comparison(root, optimizers=(NERO, FREE, WILD), lrs=(0.001, 0.01, 0.1, 1.0), seeds=(0, 1))
    return summarise(load(root))[0]


@pytest.fixture(scope="module")
def made(summary: Summary) -> list[list[Figure]]:
    """The pictures of two workloads, which happen to be the same, and those over both."""
    return figures([summary, summary], looks(summary))


def looks(summary: Summary):
    return styles(row.optimizer.label for row in summary.rows)


def rows_of(figure: Figure | None) -> list[dict]:
    assert figure is not None
    return [row for panel in figure.panels for rows in panel.tables.values() for row in rows]


# -- axes and labels -------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=20),
    st.booleans(),
    st.booleans(),
    st.floats(0, 1),
)
def test_heights_on_an_axis_and_values_are_inverse(values, percent, higher, height):
    axis = choose_axis("x", values, percent=percent, higher_is_better=higher)
    assert axis is not None
    for shown in (axis, axis.with_strip(0.2)):
        assert shown.height(shown.at(height)) == pytest.approx(height, abs=1e-6)
    assert axis.with_strip(0.2).height(axis.worst) == pytest.approx(
        0.2 if axis.low_is_worse else 0.8, abs=1e-6
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_all_values_and_names_some_inside(values, higher):
    axis = choose_axis("x", values, higher_is_better=higher)
    assert axis is not None
    assert axis.kind == "log" or axis.low <= min(values)
    assert axis.high >= max(values)
    assert axis.ticks
    assert all(axis.low - 1e-9 <= tick <= axis.high + 1e-9 * abs(axis.high) for tick in axis.ticks)


def test_a_loss_that_runs_away_does_not_set_the_axis():
    axis = choose_axis("loss", [2.3, 1.0, 0.5, 1e12], start=2.3)
    assert axis is not None
    assert axis.high < 6
    assert axis.cut([1.0, 0.5, 1e3, 1e9, 1e12]) == [1.0, 0.5, axis.high, None, None]


def test_values_that_are_not_finite_set_no_axis():
    axis = choose_axis("loss", [math.nan, math.inf, 1.0, 2.0])
    assert axis is not None
    assert axis.high < 3
    assert choose_axis("loss", [math.nan]) is None


def test_high_accuracies_are_spaced_by_their_distance_to_one():
    axis = choose_axis("accuracy", [0.1, 0.9, 0.99], percent=True, higher_is_better=True)
    assert axis is not None
    assert axis.kind == "error"
    assert axis.height(0.99) - axis.height(0.9) == pytest.approx(
        axis.height(0.9) - axis.height(0.0), rel=0.05
    )
    perfect = choose_axis("accuracy", [0.5, 0.98, 1.0], percent=True, higher_is_better=True)
    assert perfect is not None
    assert perfect.plotted(perfect.clamp(1.0)) > 0


def test_ticks_are_round_and_few():
    assert linear_ticks(0.03, 1.02) == (0.2, 0.4, 0.6, 0.8, 1.0)
    assert log_ticks(1e-4, 1.0) == (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert log_ticks(0.3, 6.0) == (0.5, 1.0, 2.0, 5.0)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_stand_apart_in_the_order_of_their_lines(heights):
    gap = 1 / 14
    placed = spread_labels(heights, gap)
    for (a, x), (b, y) in itertools.combinations(zip(heights, placed), 2):
        assert abs(x - y) >= gap - 1e-9
        assert a == b or (a < b) == (x < y)
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)


@given(st.lists(st.integers(0, 10), unique=True, max_size=10))
def test_labels_that_stand_apart_already_stay_where_they_are(places):
    heights = [place / 10 for place in places]
    assume(heights)
    assert spread_labels(heights, 0.1 - 1e-6) == pytest.approx(heights)


# -- colours -----------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEUTAN = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
PROTAN = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
NORMAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def linear(color: str) -> list[float]:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def lab(rgb: list[float]) -> tuple[float, float, float]:
    """CIE L*a*b* of linear sRGB, white D65."""
    r, g, b = (min(max(c, 0.0), 1.0) for c in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def luminance(color: str) -> float:
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(color)))


@pytest.mark.parametrize("ground", ["light", "dark"])
@pytest.mark.parametrize("vision", [NORMAL, DEUTAN, PROTAN], ids=["normal", "deutan", "protan"])
def test_the_nine_main_colours_stay_apart_for_every_eye(ground, vision):
    colors = [getattr(style, ground) for style in list(KNOWN.values())[:9]]
    seen = [lab([sum(a * b for a, b in zip(row, linear(color))) for row in vision]) for color in colors]
    assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 20  # a just visible one is 2.3


@pytest.mark.parametrize(("ground", "page"), [("light", "#FFFFFF"), ("dark", "#14161A")])
def test_every_colour_stands_out_from_the_page(ground, page):
    for style in styles([*KNOWN, *map(str, range(6))]).values():
        low, high = sorted((luminance(getattr(style, ground)), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 2.9  # WCAG asks 3 for graphics


def test_every_label_gets_one_style_that_does_not_depend_on_its_neighbours():
    alone = {label: styles([label])[label] for label in ("nero", "sgd", "mine:Clever", "other:Rule")}
    together = styles(label for label in alone)  # a generator is read once
    assert list(together) == list(alone)
    assert together == alone
    many = styles(map(str, range(6)))
    assert len(set(many.values())) == 6


# -- pictures --------------------------------------------------------------------------------------------


def test_every_panel_holds_to_the_schema_of_vega_lite(made: list[list[Figure]]):
    for figure in made[0] + made[-1]:
        for spec in figure.page_specs():
            assert alt.LayerChart.from_dict({key: value for key, value in spec.items() if key != "datasets"})
    broken = {**spec, "layer": [{**spec["layer"][0], "mark": "blot"}]}
    with pytest.raises(jsonschema.ValidationError):
        alt.LayerChart.from_dict(broken)


def test_every_picture_can_be_drawn(made: list[list[Figure]]):
    for figure in made[0] + made[-1]:
        for spec in [*figure.page_specs(), figure.file_spec("a note")]:
            assert vl_convert.vegalite_to_vega(spec, vl_version=vega_lite_version())["marks"]


def test_a_workload_has_its_pictures_and_several_have_those_over_all(
    summary: Summary, made: list[list[Figure]]
):
    assert [figure.name for figure in made[0]] == [
        "digits-small-curves-best",
        "digits-small-curves-default",
        "digits-small-sensitivity",
        "digits-small-target",
        "digits-small-automatic-step",
        "digits-small-rates",
    ]
    assert [figure.name for figure in made[-1]] == ["profile", "regret"]
    assert figures([summary], looks(summary))[-1] == []


def test_diverged_runs_are_drawn_with_their_end(tmp_path: Path):
    wild = Invented("sgd", 0.1, 0.1, 1.0, 1.0, diverges_above=1e-9)
    write_comparison(tmp_path, optimizers=(NERO, wild), lrs=(0.1,), seeds=(0, 1))
    (found,) = summarise(load(tmp_path))
    rows = rows_of(learning_curves(found, looks(found), best=True))
    assert {row["run"] for row in rows if "run" in row and "status" not in row} >= {
        "sgd 0.1, seed 0: diverged",
        "sgd 0.1, seed 1: diverged",
    }
    assert "sgd 0.1 ×" in {row.get("label") for row in rows}
    rows = rows_of(sensitivity(found, looks(found)))
    crosses = [row for row in rows if "2/2 diverged" in str(row.get("final")) and row["y"]]
    assert {row["optimiser"] for row in crosses} == {"sgd"}


def test_the_sensitivity_marks_the_default_and_draws_rules_without_a_rate_level(summary: Summary):
    rows = rows_of(sensitivity(summary, looks(summary)))
    assert {(row["optimiser"], row["x"]) for row in rows if row.get("default") and row.get("x")} == {
        ("nero", 0.01),
        ("sgd", 0.001),
    }
    (level,) = [row for row in rows if row.get("optimiser") == "agd" and "final" in row]
    assert level["x"] is None
    assert level["low"] != level["high"]


def test_the_sensitivity_draws_no_line_across_a_rate_at_which_no_run_finished(tmp_path: Path):
    write_comparison(tmp_path, optimizers=(NERO,), lrs=(0.001, 0.01, 0.1), seeds=(0, 1))
    for seed in (0, 1):
        write_run(tmp_path / "digits-small", NERO, 0.01, seed, status="diverged")
    (found,) = summarise(load(tmp_path))
    rows = rows_of(sensitivity(found, looks(found)))
    line = {row["x"]: row["y"] for row in rows if "low" in row}
    assert [lr for lr, y in line.items() if y is None] == [0.01]


def test_bars_to_the_target_show_every_setting_even_if_it_never_got_there(summary: Summary):
    figure = time_to_target(summary, looks(summary))
    rows = rows_of(figure)
    assert "never (0/2)" in {row.get("label") for row in rows if row.get("optimiser") == "sgd"}


def test_a_lower_is_better_metric_is_drawn_with_its_worse_end_on_top(tmp_path: Path):
    write_comparison(
        tmp_path,
        optimizers=(NERO, WILD),
        lrs=(0.001, 0.01, 1.0),
        seeds=(0,),
        workloads=(("words", LOSS, 1.0),),
    )
    (found,) = summarise(load(tmp_path))
    figure = sensitivity(found, looks(found))
    assert figure is not None
    (spec,) = figure.page_specs()
    cross = next(row for row in rows_of(figure) if "diverged" in str(row.get("final")) and row["y"])
    scales = [layer["encoding"]["y"].get("scale", {}) for layer in spec["layer"] if "y" in layer["encoding"]]
    low, high = next(scale["domain"] for scale in scales if "domain" in scale)
    assert cross["y"] > math.sqrt(low * high)


def test_tables_of_a_picture_hold_nothing_that_json_has_not(made: list[list[Figure]]):
    for figure in itertools.chain.from_iterable(made):
        for row in rows_of(figure):
            assert all(not isinstance(v, float) or math.isfinite(v) for v in row.values())


def test_a_metric_that_is_no_fraction_is_not_spaced_as_one(tmp_path: Path):
    metric = {**ACCURACY, "unit": "", "name": "return"}
    write_comparison(
        tmp_path, optimizers=(NERO,), lrs=(0.01, 0.1), seeds=(0,), workloads=(("game", metric, 1.0),)
    )
    (found,) = summarise(load(tmp_path))
    figure = sensitivity(found, looks(found))
    assert figure is not None
    assert "logarithm" not in figure.caption


# -- several lengths of one workload ---------------------------------------------------------------------------


def test_a_workload_in_several_lengths_shows_what_a_horizon_is_worth(tmp_path: Path):
    write_comparison(tmp_path, optimizers=(NERO, FREE), lrs=(0.001, 0.01), seeds=(0, 1), steps=300)
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    (short,) = comparison["workloads"]
    long = {**short, "folder": "digits-small-long", "options": {"width": 64, "steps": 900}}
    wide = {**short, "folder": "digits-small-wide", "options": {"width": 128, "steps": 900}}
    short["options"] = {"width": 64, "steps": 300}
    comparison["workloads"] = [long, short, wide]
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    for folder in ("digits-small-long", "digits-small-wide"):
        for invented, lr in ((NERO, 0.01), (FREE, None)):
            for seed in (0, 1):
                write_run(tmp_path / folder, invented, lr, seed, steps=900)
    summaries = summarise(load(tmp_path))
    (figure,) = horizons(summaries, looks(summaries[0]))  # the wide one has one length
    assert figure.subject == "digits"
    drawn = rows_of(figure)
    tuned = [row for row in drawn if row["optimiser"] == "nero" and row.get("marked")]
    assert {row["x"] for row in tuned} == {300, 900}
    best = {row.optimizer.label: row.leading.final for row in summaries[0].rows}
    last = max(tuned, key=lambda row: row["x"])
    assert 1 - last["y"] == pytest.approx(best["nero"].mean, rel=1e-3)
    free = {row["x"] for row in drawn if row["optimiser"] == "agd" and "marked" in row}
    assert free == set(range(315, 901, 45))  # its evaluations after the shortest length
    everything = [figure.name for figure in figures(summaries, looks(summaries[0]))[-1]]
    assert everything == ["profile", "regret", figure.name]


def test_a_single_length_has_no_horizon(summary: Summary):
    assert horizons([summary, summary], looks(summary)) == []
