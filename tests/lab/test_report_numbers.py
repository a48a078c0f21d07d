"""The report's numbers: what the records hold, and what is made of them."""

import json
import math
from pathlib import Path

import pytest

from archopt.lab.report import ReportError
from archopt.lab.report.load import load
from archopt.lab.report.statistics import (
    Reached,
    Row,
    Summary,
    curve,
    parse_target,
    profiles,
    spread,
    summarise,
)
from archopt.lab.report.table import across, at_their_best
from report_records import ACCURACY, LOSS, Invented, write_comparison, write_json, write_run

STEADY = Invented("steady", 0.1, 0.1, 1.0, 1.0)
WILD = Invented("wild", 0.1, 0.1, 1.0, 1.0)
FREE = Invented("free", None, None, 1.0, 1.0)


def compared(root: Path, *optimizers: Invented, metric=ACCURACY, lrs=(0.01, 0.1), seeds=(0, 1, 2)) -> Path:
    return write_comparison(
        root, optimizers=optimizers, lrs=lrs, seeds=seeds, workloads=(("digits", metric, 1.0),)
    )


def end_with(root: Path, label: str, lr: float | None, values: list[float | None], key="accuracy") -> None:
    """Sets the final metric of the seeds 0, 1, ... of a setting; None makes the run diverge."""
    rate = "auto" if lr is None else lr
    for seed, value in enumerate(values):
        path = root / "digits-small" / label / f"lr={rate}" / f"seed={seed}" / "result.json"
        result = json.loads(path.read_text())
        result |= {"status": "diverged", "final": {}} if value is None else {"status": "finished"}
        if value is not None:
            result["final"] = {key: value}
        path.write_text(json.dumps(result))


def row_of(summary: Summary, label: str) -> Row:
    return next(row for row in summary.rows if row.optimizer.label == label)


def row(root: Path, label: str, **options) -> Row:
    (summary,) = summarise(load(root), **options)
    return row_of(summary, label)


# -- the records -------------------------------------------------------------------------------------------------


def test_a_run_that_was_asked_for_and_is_not_there_is_missing(tmp_path: Path):
    compared(tmp_path, STEADY)
    gone = tmp_path / "digits-small/steady/lr=0.1/seed=1"
    for file in gone.iterdir():
        file.unlink()
    (workload,) = load(tmp_path).workloads
    assert len(workload.runs) == 6
    (missing,) = [run for run in workload.runs if run.status == "missing"]
    assert (missing.lr, missing.seed) == (0.1, 1)


def test_a_rate_without_any_run_is_missing_where_the_comparison_names_it(tmp_path: Path):
    compared(tmp_path, STEADY)
    path = tmp_path / "comparison.json"
    record = json.loads(path.read_text())
    record["lrs"] = "grid"
    record["optimizers"][0]["lrs"] = {"digits": [0.01, 0.1, 1.0]}
    path.write_text(json.dumps(record))
    assert [cell.lr for cell in row(tmp_path, "steady").cells] == [0.01, 0.1, 1.0]
    assert row(tmp_path, "steady").count("missing") == 3


def test_a_run_without_a_result_is_unfinished(tmp_path: Path):
    compared(tmp_path, STEADY)
    (tmp_path / "digits-small/steady/lr=0.1/seed=1/result.json").unlink()
    assert row(tmp_path, "steady").count("unfinished") == 1


def test_a_finished_run_without_a_finite_metric_counts_as_diverged(tmp_path: Path):
    compared(tmp_path, STEADY)
    end_with(tmp_path, "steady", 0.1, [0.9, math.nan, 0.9])
    assert row(tmp_path, "steady").count("diverged") == 1


def test_runs_of_other_seeds_and_optimisers_are_set_apart(tmp_path: Path):
    compared(tmp_path, STEADY)
    write_run(tmp_path / "digits-small", STEADY, 0.1, 7)
    write_run(tmp_path / "digits-small", WILD, 0.1, 0)
    (workload,) = load(tmp_path).workloads
    assert len(workload.runs) == 6
    assert sorted((run.optimizer, run.seed) for run in workload.extra) == [("steady", 7), ("wild", 0)]


def test_runs_of_an_earlier_comparison_at_other_rates_are_set_apart(tmp_path: Path):
    compared(tmp_path, STEADY, lrs=(0.01, 0.1, 1.0))
    path = tmp_path / "comparison.json"
    record = json.loads(path.read_text())
    record["optimizers"][0]["lrs"] = {"digits": [0.01, 0.1]}
    path.write_text(json.dumps(record))
    assert [cell.lr for cell in row(tmp_path, "steady").cells] == [0.01, 0.1]
    assert {run.lr for run in load(tmp_path).workloads[0].extra} == {1.0}


def test_runs_trained_one_by_one_are_reported_without_defaults_or_missing_ones(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path / "digits-small", STEADY, 0.1, seed)
    write_run(tmp_path / "digits-small", FREE, None, 0)
    write_run(tmp_path / "words-small", STEADY, 0.1, 0, workload="words", metric=LOSS)
    (tmp_path / "figures").mkdir()
    digits, words = summarise(load(tmp_path))
    assert (digits.workload.title, words.workload.title) == ("digits (small)", "words (small)")
    assert {(row.optimizer.label, len(row.runs), row.count("missing")) for row in digits.rows} == {
        ("steady", 2, 0),
        ("free", 1, 0),
    }
    steady = row_of(digits, "steady")
    assert (steady.default, steady.regret) == (None, None)
    assert [row.optimizer.label for row in words.rows] == ["steady"]


def test_the_last_line_of_the_metrics_may_be_torn(tmp_path: Path):
    compared(tmp_path, STEADY)
    path = tmp_path / "digits-small/steady/lr=0.1/seed=0/metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:25])
    (workload,) = load(tmp_path).workloads
    points = next(run.points for run in workload.runs if run.lr == 0.1 and run.seed == 0)
    assert len(points) == len(lines) - 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("result.json", '{"status": "fini', "cannot be read"),
        ("result.json", '{"status": "done"}', '"finished", "diverged" or "failed"'),
        ("result.json", '{"status": "finished", "final": {}}', "'metric' is None; expected dict"),
        ("result.json", "[]", "expected a JSON object"),
        ("config.json", '{"format": 9}', "format 9"),
        ("config.json", '{"format": 1, "optimizer": {"label": "steady"}}', "'seed' is None; expected int"),
        ("metrics.jsonl", '{"step": 0}\n{"eval": {}}\n{"step": 2}\n', "line 2"),
    ],
)
def test_a_broken_record_is_refused_in_one_line_that_names_the_file(tmp_path: Path, name, content, words):
    compared(tmp_path, STEADY)
    path = tmp_path / "digits-small/steady/lr=0.1/seed=0" / name
    path.write_text(content)
    with pytest.raises(ReportError) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_run_in_two_folders_is_refused(tmp_path: Path):
    compared(tmp_path, STEADY)
    run = tmp_path / "digits-small/steady/lr=0.1/seed=0"
    copy = tmp_path / "digits-small/steady/lr=0.10/seed=0"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ReportError, match=r"holds the same run as digits-small/steady/lr=0\.1/seed=0"):
        load(tmp_path)


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(ReportError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="no runs in it; expected the --out of"):
        load(tmp_path)
    compared(tmp_path, seeds=())
    with pytest.raises(ReportError, match="no runs in it; expected the --out of"):
        load(tmp_path)


# -- spread and choice ---------------------------------------------------------------------------------------------


def test_the_spread_is_the_population_standard_deviation():
    found = spread([1.0, 2.0, 3.0, 6.0])
    assert found is not None
    assert (found.mean, found.low, found.high, found.count) == (3.0, 1.0, 6.0, 4)
    assert found.sd == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 4))
    assert spread([]) is None


def test_a_diverged_seed_is_counted_and_not_averaged(tmp_path: Path):
    compared(tmp_path, STEADY)
    end_with(tmp_path, "steady", 0.1, [0.9, None, 0.8])
    (cell,) = [cell for cell in row(tmp_path, "steady").cells if cell.lr == 0.1]
    assert cell.final is not None
    assert cell.final.mean == pytest.approx(0.85)
    assert (cell.final.count, cell.count("diverged"), cell.complete) == (2, 1, False)


def test_a_rate_at_which_a_seed_diverged_is_never_the_best_beside_one_at_which_none_did(tmp_path: Path):
    compared(tmp_path, STEADY)
    end_with(tmp_path, "steady", 0.1, [0.99, None, 0.99])
    end_with(tmp_path, "steady", 0.01, [0.5, 0.5, 0.5])
    best = row(tmp_path, "steady").best
    assert best is not None
    assert best.lr == 0.01


def test_an_optimiser_that_diverged_ranks_last(tmp_path: Path):
    compared(tmp_path, WILD, STEADY, FREE)
    end_with(tmp_path, "wild", 0.1, [None, None, None])
    end_with(tmp_path, "wild", 0.01, [0.99, 0.99, None])
    end_with(tmp_path, "steady", 0.1, [0.3, 0.3, 0.3])
    end_with(tmp_path, "steady", 0.01, [0.2, 0.2, 0.2])
    end_with(tmp_path, "free", None, [0.6, 0.7, 0.8])
    (summary,) = summarise(load(tmp_path))
    assert [row.optimizer.label for row in summary.rows] == ["free", "steady", "wild"]
    assert summary.best == pytest.approx(0.7)


@pytest.mark.parametrize("metric", [ACCURACY, LOSS])
def test_the_best_rate_has_the_best_mean_in_the_metrics_own_direction(tmp_path: Path, metric):
    compared(tmp_path, STEADY, metric=metric)
    end_with(tmp_path, "steady", 0.1, [0.3, 0.3, 0.3], metric["key"])
    end_with(tmp_path, "steady", 0.01, [0.2, 0.2, 0.2], metric["key"])
    best = row(tmp_path, "steady").best
    assert best is not None
    assert best.lr == (0.1 if metric["higher_is_better"] else 0.01)


def test_a_best_rate_at_the_end_of_the_grid_is_noticed(tmp_path: Path):
    compared(tmp_path, STEADY, lrs=(0.01, 0.1, 1.0))
    for lr, value in ((0.01, 0.5), (0.1, 0.6), (1.0, 0.7)):
        end_with(tmp_path, "steady", lr, [value] * 3)
    assert row(tmp_path, "steady").best_at_edge
    end_with(tmp_path, "steady", 0.1, [0.8] * 3)
    assert not row(tmp_path, "steady").best_at_edge


# -- regret --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "own"), [(ACCURACY, 0.7), (LOSS, 1.1)])
def test_the_regret_is_the_distance_from_the_default_to_the_best_of_any(tmp_path: Path, metric, own):
    compared(tmp_path, STEADY, WILD, metric=metric)
    for label, lr, value in (
        ("steady", 0.1, own),
        ("steady", 0.01, 0.9),
        ("wild", 0.1, 0.9),
        ("wild", 0.01, 0.9),
    ):
        end_with(tmp_path, label, lr, [value] * 3, metric["key"])
    assert row(tmp_path, "steady").regret == pytest.approx(0.2)
    assert row(tmp_path, "wild").regret == pytest.approx(0.0)


def test_the_regret_of_a_default_that_diverges_is_unbounded_and_of_one_not_run_unknown(tmp_path: Path):
    compared(tmp_path, STEADY, Invented("elsewhere", 0.5, 0.1, 1.0, 1.0))
    end_with(tmp_path, "steady", 0.1, [0.9, None, 0.9])
    for file in (tmp_path / "digits-small/elsewhere/lr=0.5").rglob("*.json*"):
        file.unlink()
    assert row(tmp_path, "steady").regret == math.inf
    assert row(tmp_path, "elsewhere").default is None
    assert row(tmp_path, "elsewhere").regret is None


def test_a_rule_without_a_rate_has_its_only_setting_as_default_and_best(tmp_path: Path):
    compared(tmp_path, FREE)
    found = row(tmp_path, "free")
    assert found.default is found.best is not None
    assert found.best.lr is None


# -- the target --------------------------------------------------------------------------------------------------


def write_points(root: Path, label: str, lr: float, seed: int, values: list[float]) -> None:
    lines = [
        {"step": 10 * k, "seconds": float(k), "eval": {"accuracy": value}} for k, value in enumerate(values)
    ]
    path = root / "digits-small" / label / f"lr={lr}" / f"seed={seed}" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_target_lies_95_per_cent_of_the_way_from_the_beginning_to_the_best(tmp_path: Path):
    compared(tmp_path, STEADY, lrs=(0.1,))
    end_with(tmp_path, "steady", 0.1, [0.9, 0.9, 0.9])
    for seed in range(3):
        write_points(tmp_path, "steady", 0.1, seed, [0.1, 0.9])
    (summary,) = summarise(load(tmp_path))
    assert summary.target == pytest.approx(0.1 + 0.95 * 0.8)


def test_time_to_target_is_the_first_evaluation_at_it_and_the_median_counts_the_others_as_never(
    tmp_path: Path,
):
    compared(tmp_path, STEADY, lrs=(0.1,))
    write_points(tmp_path, "steady", 0.1, 0, [0.1, 0.6, 0.4, 0.9])
    write_points(tmp_path, "steady", 0.1, 1, [0.1, 0.2, 0.5, 0.9])
    write_points(tmp_path, "steady", 0.1, 2, [0.1, 0.2, 0.3, 0.4])
    when = row(tmp_path, "steady", target=0.5).reached_best
    assert when == Reached((10.0, 20.0), (1.0, 2.0), 3)
    assert when.median(when.steps) == 20.0
    write_points(tmp_path, "steady", 0.1, 1, [0.1, 0.2, 0.3, 0.4])
    when = row(tmp_path, "steady", target=0.5).reached_best
    assert when is not None
    assert when.median(when.steps) == math.inf


def test_a_run_that_diverged_after_the_target_did_not_reach_it_and_a_missing_one_is_no_evidence(
    tmp_path: Path,
):
    compared(tmp_path, STEADY, lrs=(0.1,))
    for seed in range(3):
        write_points(tmp_path, "steady", 0.1, seed, [0.1, 0.9])
    end_with(tmp_path, "steady", 0.1, [0.9, None])
    for file in (tmp_path / "digits-small/steady/lr=0.1/seed=2").iterdir():
        file.unlink()
    when = row(tmp_path, "steady", target=0.5).reached_best
    assert when == Reached((10.0,), (1.0,), 2)


def test_a_target_is_one_number_or_one_for_each_workload():
    assert parse_target("0.95") == 0.95
    assert parse_target("digits=0.95, words=1.2") == {"digits": 0.95, "words": 1.2}
    for words in ("soon", "digits=soon", "digits=1=2"):
        with pytest.raises(ReportError, match="expected a value of the metric"):
            parse_target(words)


def test_a_target_for_a_workload_that_is_not_there_is_refused(tmp_path: Path):
    compared(tmp_path, STEADY)
    with pytest.raises(ReportError, match=r"'mnist'; expected one of digits"):
        summarise(load(tmp_path), {"mnist": 0.5})
    (summary,) = summarise(load(tmp_path), {"digits": 0.5})
    assert (summary.target, summary.target_given) == (0.5, True)


# -- curves, times, profiles ---------------------------------------------------------------------------------------


def test_a_curve_is_mean_and_range_at_the_steps_that_all_runs_have(tmp_path: Path):
    compared(tmp_path, STEADY, lrs=(0.1,), seeds=(0, 1))
    write_points(tmp_path, "steady", 0.1, 0, [0.1, 0.4, 0.8])
    write_points(tmp_path, "steady", 0.1, 1, [0.3, 0.6])
    (workload,) = load(tmp_path).workloads
    points = curve(workload.runs, lambda point: point.eval.get("accuracy"))
    assert [(p.step, p.seconds, p.count) for p in points] == [(0, 0.0, 2), (10, 1.0, 2)]
    assert [p.mean for p in points] == pytest.approx([0.2, 0.5])
    assert [(p.low, p.high) for p in points] == [(0.1, 0.3), (0.4, 0.6)]


def test_times_are_medians_relative_to_the_fastest_optimiser(tmp_path: Path):
    compared(tmp_path, STEADY, WILD, lrs=(0.1,))
    for label, seconds in (("steady", (1.0, 2.0, 9.0)), ("wild", (3.0, 4.0, 5.0))):
        for seed, value in enumerate(seconds):
            path = tmp_path / "digits-small" / label / "lr=0.1" / f"seed={seed}" / "result.json"
            write_json(path, json.loads(path.read_text()) | {"seconds_per_step": value})
    assert (row(tmp_path, "steady").seconds_per_step, row(tmp_path, "steady").relative_time) == (2.0, 1.0)
    assert row(tmp_path, "wild").relative_time == 2.0
    assert row(tmp_path, "wild").state_per_parameter == 4.0


def test_the_profile_tells_which_share_of_the_workloads_is_solved_within_a_ratio(tmp_path: Path):
    workloads = [(name, ACCURACY, 1.0) for name in ("one", "two")]
    write_comparison(tmp_path, optimizers=(STEADY, WILD), lrs=(0.1,), seeds=(0,), workloads=workloads)
    summaries = summarise(load(tmp_path), 0.5)
    steps = {("one", "steady"): 10.0, ("one", "wild"): 30.0, ("two", "wild"): 20.0}
    workload_of = {id(row): s.workload.name for s in summaries for row in s.rows}

    def reached(row: Row) -> Reached:
        found = steps.get((workload_of[id(row)], row.optimizer.label))
        return Reached((found,) if found else (), (found,) if found else (), 1)

    made = {profile.optimizer: profile for profile in profiles(summaries, reached, seconds=False)}
    assert (made["steady"].ratios, made["steady"].shares) == ((1.0,), (0.5,))
    assert (made["wild"].ratios, made["wild"].shares) == ((1.0, 3.0), (0.5, 1.0))


# -- over several workloads --------------------------------------------------------------------------------------


def test_over_workloads_each_rule_stands_at_the_best_of_its_settings(tmp_path: Path):
    tuned = Invented("steady(beta=0.9)", 0.1, 0.1, 1.0, 1.0)
    workloads = [("digits", ACCURACY, 1.0), ("words", LOSS, 1.0)]
    root = write_comparison(
        tmp_path, optimizers=(STEADY, tuned, WILD), lrs=(0.01, 0.1), seeds=(0, 1), workloads=workloads
    )
    record = json.loads((root / "comparison.json").read_text())
    for entry in record["optimizers"]:
        entry["name"] = entry["label"].split("(")[0]
    write_json(root / "comparison.json", record)
    end_with(root, "steady", 0.01, [0.5, 0.5])
    end_with(root, "steady", 0.1, [0.7, 0.7])
    end_with(root, "steady-beta-0.9-", 0.01, [0.8, 0.9])
    end_with(root, "steady-beta-0.9-", 0.1, [0.99, None])
    end_with(root, "wild", 0.01, [0.6, 0.8])
    end_with(root, "wild", 0.1, [0.95, None])

    summaries = summarise(load(root))
    made = at_their_best(summaries)
    assert [column.name for column in made.columns[1:]] == ["steady", "wild"]
    label, steady, wild = made.rows[0]
    assert label.text == "digits (small): test accuracy, %"
    assert (steady.text, steady.best) == ("85.00 ± 5.00", True)
    assert (wild.text, wild.best) == ("70.00 ± 10.00", False)
    assert [table.title for table in across(summaries)] == [
        "each rule at its best",
        "regret of the default",
    ]
    assert across(summaries[:1]) == []
