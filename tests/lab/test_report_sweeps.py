"""Heat maps of rates and of options, and step sizes with their least and greatest."""

import json
import math
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import vl_convert

from archopt.lab.report.heat import Spot, best_on_the_way, heat_map, over_options, over_rates, varied
from archopt.lab.report.load import load
from archopt.lab.report.panels import Figure
from archopt.lab.report.render import vega_lite_version
from archopt.lab.report.statistics import Summary, summarise
from archopt.lab.report.steps import automatic_steps, relative_updates, steps_over_options
from archopt.lab.report.style import styles
from report_records import ACCURACY, Invented, write_comparison, write_json, write_run

FREE = Invented("agd", None, None, 1.2, 1.0)
ADAM = Invented("adam", 0.001, 0.01, 1.0, 1.0)
WILD = Invented("sgd", 0.001, 0.01, 1.1, 1.0, diverges_above=1e-9)


def with_steps(folder: Path) -> None:
    """Adds to each line what `per_step` would hold: step sizes from 1/step to 3/step, their mean at 2/step."""
    for file in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines[1:]:
            size = {"mean": 2.0, "least": 1.0, "greatest": 3.0}
            spread = {key: value / line["step"] for key, value in size.items()} | {"steps": 30}
            line["per_step"] = {"eta": spread, "update": {**spread, "layers": {"w": 0.1}}}
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")


def sweep(
    root: Path, options: list[dict[str, Any]], optimizers: tuple[Invented, ...] = (FREE,)
) -> list[Summary]:
    """A comparison of workloads that differ in their options."""
    entries = []
    for place, chosen in enumerate(options):
        folder = f"net-small-{place}"
        entry = {"name": "net", "preset": "small", "folder": folder, "summary": "", "metric": ACCURACY}
        entries.append({**entry, "options": {"classes": 10, **chosen}, "changed": chosen})
        for invented in optimizers:
            for seed in (0, 1):
                lr = None if invented.best_lr is None else invented.default_lr
                write_run(root / folder, invented, lr, seed, workload="net", difficulty=1 + place)
    told = [
        {"label": o.label, "name": o.label, "default_lr": o.default_lr, "rate": o.best_lr is not None}
        for o in optimizers
    ]
    record = {"format": 1, "command": "", "workloads": entries, "optimizers": told, "seeds": [0, 1]}
    write_json(root / "comparison.json", {**record, "lrs": [0.001]})
    with_steps(root)
    return list(summarise(load(root)))


def looks(summaries: list[Summary]) -> dict:
    return styles(row.optimizer.label for summary in summaries for row in summary.rows)


def cells(figure: Figure | None, panel: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    assert figure is not None
    rows = [row for rows in figure.panels[panel].tables.values() for row in rows]
    return {(row["y"], row["x"]): row for row in rows if "words" in row}


GRID = [{"depth": depth, "width": width} for depth in (2, 4) for width in (64, 128, 256)]


def test_two_options_are_a_grid_of_numbers_with_the_best_on_the_way_and_the_loss(tmp_path: Path) -> None:
    summaries = sweep(tmp_path, GRID)
    assert varied(summaries) == ["depth", "width"]
    (figure,) = over_options(summaries, looks(summaries))
    titles = [panel.title for panel in figure.panels]
    assert titles == ["final test accuracy in %", "best test accuracy on the way in %", "final training loss"]
    final, best, loss = (cells(figure, panel) for panel in range(3))
    assert set(final) == {(depth, width) for depth in "24" for width in ("64", "128", "256")}
    for place, chosen in enumerate(GRID):
        row = summaries[place].rows[0]
        where = str(chosen["depth"]), str(chosen["width"])
        assert row.leading.final is not None
        assert final[where]["words"] == f"{100 * row.leading.final.mean:.2f}"
        runs = row.leading.finished
        assert best[where]["value"] == pytest.approx(sum(map(best_on_the_way, runs)) / 2, rel=1e-4)
        assert loss[where]["value"] == pytest.approx(sum(r.final("train_loss") for r in runs) / 2, rel=1e-4)


def test_one_option_stands_against_the_optimisers_and_a_lost_setting_is_a_cross(tmp_path: Path) -> None:
    summaries = sweep(tmp_path, [{"batch": n} for n in (32, 128, 1024)], (FREE, ADAM))
    for seed in (0, 1):
        write_run(tmp_path / "net-small-1", ADAM, 0.001, seed, workload="net", status="diverged")
    summaries = list(summarise(load(tmp_path)))
    (figure,) = over_options(summaries, looks(summaries))
    found = cells(figure)
    assert set(found) == {(label, n) for label in ("agd", "adam") for n in ("32", "128", "1024")}
    assert found["adam", "128"]["words"] == "2/2 diverged"
    assert [key for key, row in found.items() if "value" not in row] == [("adam", "128")]


@pytest.mark.parametrize(
    "options",
    [
        [{"model": "mlp"}, {"model": "cnn"}],
        [{"epochs": 1}, {"epochs": 2}],
        [{"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}],
        [{"depth": 2}],
    ],
    ids=["no numbers", "lengths", "three options", "one workload"],
)
def test_what_is_no_sweep_over_one_or_two_numbers_has_no_such_picture(tmp_path: Path, options: list) -> None:
    summaries = sweep(tmp_path, options)
    assert varied(summaries) == []
    assert over_options(summaries, looks(summaries)) == [] == steps_over_options(summaries)


def test_rates_are_columns_and_a_rule_without_one_stands_at_the_right(tmp_path: Path) -> None:
    write_comparison(tmp_path, optimizers=(ADAM, FREE, WILD), lrs=(0.001, 0.01, 0.1), seeds=(0, 1))
    (summary,) = summarise(load(tmp_path))
    figure = over_rates(summary, looks([summary]))
    found = cells(figure)
    assert {x for y, x in found if y == "adam"} == {"0.001", "0.01", "0.1"}
    assert [x for y, x in found if y == "agd"] == ["none"]
    assert all(
        "diverged" in row["words"] and "value" not in row for (y, _), row in found.items() if y == "sgd"
    )
    (spec,) = figure.page_specs()
    assert spec["layer"][0]["encoding"]["x"]["scale"]["domain"] == ["0.001", "0.01", "0.1", "none"]
    write_comparison(tmp_path / "two", optimizers=(ADAM,), lrs=(0.001, 0.01), seeds=(0,))
    (plain,) = summarise(load(tmp_path / "two"))
    assert over_rates(plain, looks([plain])) is None


@pytest.mark.parametrize("up", [True, False])
def test_brighter_is_better_and_letters_stand_out(up: bool) -> None:
    values = {"worst": 0.1, "best": 0.9} if up else {"worst": 9.0, "best": 0.1}
    spots = [Spot(name, "row", name, value, name) for name, value in values.items()]
    panel = heat_map(spots, list(values), ["row"], {}, x_title="x", up=up)
    inks = {row["x"]: row["ink"] for rows in panel.tables.values() for row in rows}
    assert inks == {"worst": "white", "best": "black"}
    scale = panel.layers[0]["encoding"]["fill"]["scale"]
    assert (scale["scheme"], scale["reverse"]) == ("cividis", not up)
    assert scale["type"] == ("linear" if up else "log")


def test_a_single_value_has_a_scale_too() -> None:
    panel = heat_map([Spot("a", "b", "s", 0.0, "0")], ["a"], ["b"], {}, x_title="x", up=True)
    low, high = panel.layers[0]["encoding"]["fill"]["scale"]["domain"]
    assert low < 0 < high


def test_step_sizes_have_a_band_from_the_least_to_the_greatest_step(tmp_path: Path) -> None:
    summaries = sweep(tmp_path, [{"depth": 2}])
    for figure in (
        automatic_steps(summaries[0], looks(summaries)),
        relative_updates(summaries[0], looks(summaries)),
    ):
        assert figure is not None
        (panel,) = figure.panels
        rows = [row for rows in panel.tables.values() for row in rows if "mean" in row and row["x"]]
        assert len(rows) == 20
        for row in rows:
            assert row["y"] == pytest.approx(2 / row["x"], rel=1e-3)
            assert row["low"] == pytest.approx(1 / row["x"], rel=1e-3)
            assert row["high"] == pytest.approx(3 / row["x"], rel=1e-3)


def test_records_without_steps_have_the_last_step_of_each_line(tmp_path: Path) -> None:
    write_comparison(tmp_path, optimizers=(FREE,), seeds=(0,))
    (summary,) = summarise(load(tmp_path))
    assert automatic_steps(summary, looks([summary])) is not None
    assert relative_updates(summary, looks([summary])) is None


def test_a_sweep_has_the_step_sizes_of_all_its_workloads(tmp_path: Path) -> None:
    summaries = sweep(tmp_path, GRID)
    (figure,) = steps_over_options(summaries)
    assert [panel.title for panel in figure.panels] == ["depth 2", "depth 4"]
    assert [list(panel.styles) for panel in figure.panels] == [["width 64", "width 128", "width 256"]] * 2


def test_every_picture_of_a_sweep_is_valid_and_can_be_drawn(tmp_path: Path) -> None:
    summaries = sweep(tmp_path, GRID)
    made = [*over_options(summaries, looks(summaries)), *steps_over_options(summaries)]
    made.append(relative_updates(summaries[0], looks(summaries)))
    assert len(made) == 3
    for figure in made:
        for spec in figure.page_specs():
            assert alt.LayerChart.from_dict({key: value for key, value in spec.items() if key != "datasets"})
        assert vl_convert.vegalite_to_vega(figure.file_spec("note"), vl_version=vega_lite_version())["marks"]
        rows = [row for panel in figure.panels for rows in panel.tables.values() for row in rows]
        assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
