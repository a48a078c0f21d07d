"""Many runs: which there are, in what order, in how many processes, and what a dead worker costs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from archopt.lab.errors import LabError, RecordError
from archopt.lab.experiment import WorkloadChoice
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.plan import Plan, parse_device, plan_runs, rates, show_metric
from archopt.lab.report.load import load
from archopt.lab.report.statistics import summarise
from archopt.lab.report.table import notes
from archopt.lab.sweep import sweep
from archopt.lab.train import Settings
from archopt.lab.tuning import remaining_runs
from lab.running import ONE_THREAD, TOY, bits, run, toy


class Follower:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.planned: list = []
        self.skipped = 0
        self.statuses: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.steps: list[int] = []

    def begin(self, runs, skipped):
        self.planned, self.skipped = list(runs), skipped

    def progress(self, worker, spec, step, metric):
        self.steps.append(step)

    def ended(self, worker, spec, status, message):
        self.statuses[spec.title] = status
        self.messages[spec.title] = message


def plan(out: Path, **changes) -> Plan:
    usual = Plan(
        workloads=[WorkloadChoice(str(TOY))],
        optimizers=["sgd", "adam(amsgrad=True)"],
        lrs=[0.1],
        seeds=[0, 1],
        out=out,
        settings=ONE_THREAD,
        jobs=1,
        command="archopt compare ...",
    )
    return replace(usual, **changes)


def records(out: Path) -> dict[str, tuple]:
    return {str(p.parent.relative_to(out)): bits(p.parent) for p in out.rglob("result.json")}


# -- which runs there are ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "optimizer", "expected"),
    [
        ("grid", "adam", [0.001, 0.01, 0.1]),
        ("grid", "madam", [0.01, 0.1]),
        ("published", "sgd", [0.05]),
        ("published", "adamw", [0.001]),
        ("default", "sgd", [0.001]),
        ([0.5, 0.001, 0.5], "sgd", [0.001, 0.5]),
        ([0.5], "nero", [0.01, 0.5]),
        ("grid", "adam(lr=0.3)", [0.3]),
        ("default", "adam(lr=[0.3,0.1,0.3])", [0.1, 0.3]),
        ("published", "adam(lr=0.3)", [0.3]),
        ("grid", "agd", [None]),
        ([0.5], "agd", [None]),
    ],
)
def test_rates_include_the_default_and_leave_out_rules_without_one(asked, optimizer, expected):
    assert rates(asked, parse_optimizer(optimizer), toy().workload) == expected


def test_a_class_without_a_default_rate_needs_one(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from torch.optim import SGD\nclass Mine(SGD):\n"
        "    def __init__(self, params, lr): super().__init__(params, lr)"
    )
    mine = parse_optimizer(f"{tmp_path}/mine.py:Mine")
    assert rates([0.1], mine, toy().workload) == [0.1]
    assert rates("grid", mine, toy().workload) == [0.01, 0.1]
    with pytest.raises(LabError, match="no default learning rate; give one"):
        rates("default", mine, toy().workload)


def test_planning_keeps_to_the_threads_that_were_asked_for(tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr("archopt.lab.plan.check_choice", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    plan_runs(plan(tmp_path, settings=Settings(threads=3)))
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


def test_all_runs_of_the_first_seed_come_first(tmp_path: Path):
    specs = plan_runs(plan(tmp_path, lrs="grid", seeds=[3, 1]))
    assert [spec.seed for spec in specs] == [3] * 6 + [1] * 6
    assert [(spec.optimizer, spec.lr) for spec in specs[:3]] == [("sgd", 0.001), ("sgd", 0.01), ("sgd", 0.1)]
    assert specs[3].path == tmp_path / "toy-small/adam(amsgrad=True)/lr=0.001/seed=3"


def test_the_comparison_is_described_before_anything_runs(tmp_path: Path):
    plan_runs(plan(tmp_path))
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["workloads"][0]["name"] == "toy"
    assert told["workloads"][0]["folder"] == "toy-small"
    assert told["workloads"][0]["metric"] == {
        "key": "accuracy",
        "name": "accuracy",
        "higher_is_better": True,
        "unit": "%",
    }
    assert told["optimizers"][0] == {
        "label": "sgd",
        "name": "sgd",
        "default_lr": 0.001,
        "rate": True,
        "published_lr": {"toy": 0.05},
        "lrs": {"toy": [0.001, 0.1]},
    }
    assert (told["lrs"], told["seeds"], told["command"]) == ([0.1], [0, 1], "archopt compare ...")
    assert told["tuning"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizers": ["sgd", "sgd()"]}, "optimiser 'sgd' is given twice"),
        ({"workloads": [WorkloadChoice(str(TOY))] * 2}, "is given twice"),
        ({"optimizers": ["agd-paper", "sgd"]}, "agd-paper: "),
        ({"optimizers": ["nero(beta=2)"]}, "beta=2"),
        ({"lrs": [-1.0]}, "lr=-1.0, expected a number"),
        ({"settings": Settings(device="gpu")}, "no device 'gpu'"),
        ({"settings": Settings(device="mps")}, "not supported"),
        ({"jobs": 0}, "--jobs 0"),
        ({"tuning_seeds": [0, 2]}, "--tuning-seeds has 2, which is none of the seeds 0, 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, changes, said):
    with pytest.raises(LabError, match=said) as refused:
        sweep(plan(tmp_path / "out", **changes), Follower())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_different_run_stops_the_sweep_before_it_starts(tmp_path: Path):
    spec = plan_runs(plan(tmp_path))[-1]
    run(spec.path, optimizer="adam(amsgrad=True)", lr=0.1, seed=7)
    with pytest.raises(RecordError, match=r"holds a different run .*seed: 7 there, 1 asked for"):
        sweep(plan(tmp_path), Follower())
    assert [p.parent for p in tmp_path.rglob("config.json")] == [spec.path]


def test_an_optimiser_that_cannot_train_one_of_two_workloads_fails_there_alone(tmp_path: Path):
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import torch\nfrom lab.toy import Toy\nclass Bare(Toy):\n    name = 'bare'\n    def build(self):\n"
        "        self.drift = torch.zeros(())\n        return torch.nn.Linear(8, 3, bias=False)\nWORKLOAD = Bare\n"
    )
    specs = plan_runs(
        plan(
            tmp_path / "out",
            workloads=[WorkloadChoice(str(TOY)), WorkloadChoice(str(bare))],
            optimizers=["agd-paper"],
        )
    )
    assert len(specs) == 4


def test_devices_are_checked():
    assert parse_device("cpu").type == "cpu"
    with pytest.raises(LabError, match=r"cuda:99.*try --device cpu"):
        parse_device("cuda:99")


def test_metrics_are_shown_with_their_units():
    accuracy = {"name": "accuracy", "unit": "%"}
    assert show_metric(accuracy, 0.9725) == "accuracy 97.25 %"
    assert show_metric({"name": "perplexity", "unit": ""}, 123.456) == "perplexity 123.5"
    assert show_metric(accuracy, None) == show_metric(accuracy, math.nan) == "accuracy not finite"


# -- worker processes --------------------------------------------------------------------------------------


def test_any_number_of_jobs_gives_the_same_records_and_ended_runs_are_skipped(tmp_path: Path):
    one, two, again = Follower(), Follower(), Follower()
    outcome = sweep(plan(tmp_path / "one"), one)
    assert (outcome.finished, outcome.failed, outcome.skipped) == (8, 0, 0)
    assert sweep(plan(tmp_path / "two", jobs=2), two).finished == 8
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert list(one.statuses) == [spec.title for spec in one.planned]
    assert one.statuses == two.statuses
    outcome = sweep(plan(tmp_path / "two", seeds=[0, 1, 2]), again)
    assert (outcome.finished, outcome.skipped, again.skipped) == (4, 8, 8)
    assert {spec.seed for spec in again.planned} == {2}


def test_a_dead_worker_costs_its_run_and_no_other_and_the_run_is_tried_again(tmp_path: Path, monkeypatch):
    workloads = [
        WorkloadChoice(str(TOY), options={"die_at": 25}),
        WorkloadChoice(str(TOY), options={"fail_at": 3}),
        WorkloadChoice(str(TOY), options={"grow": 1e6}),
        WorkloadChoice(str(TOY)),
    ]
    asked = plan(
        tmp_path,
        workloads=workloads,
        optimizers=["agd", "adam(lr=0.02)"],
        seeds=[0],
        settings=Settings(threads=1, checkpoint_steps=10),
    )
    follower = Follower()
    outcome = sweep(asked, follower)
    assert (outcome.finished, outcome.diverged, outcome.failed) == (2, 2, 4)
    dead = [spec for spec in follower.planned if spec.workload.options.get("die_at")]
    for spec in dead:
        result = json.loads((spec.path / "result.json").read_text())
        assert result["status"] == "failed"
        assert "the worker process died (Killed; the system does that" in result["error"]
        assert (spec.path / "checkpoint.pt").exists()
    assert sum("asked to fail" in error for error in outcome.errors) == 2
    monkeypatch.setenv("TOY_LIVES", "1")
    outcome = sweep(asked, Follower())
    assert (outcome.finished, outcome.failed, outcome.skipped) == (2, 2, 4)
    assert all(json.loads((spec.path / "result.json").read_text())["status"] == "finished" for spec in dead)


def test_workers_that_cannot_write_stop_the_sweep_and_keep_what_is_finished(tmp_path: Path):
    asked = plan(tmp_path, optimizers=["sgd"])

    class Breaking(Follower):
        """Takes away the second run's folder once the first has ended."""

        def ended(self, worker, spec, status, message):
            super().ended(worker, spec, status, message)
            later = self.planned[1].path
            later.parent.mkdir(parents=True, exist_ok=True)
            later.write_text("not a folder")

    with pytest.raises(RecordError, match="cannot write"):
        sweep(asked, Breaking())
    assert len(list(tmp_path.rglob("result.json"))) >= 1


# -- tuning on some of the seeds ---------------------------------------------------------------------------


def test_only_the_best_rate_and_the_default_are_run_on_seeds_that_do_not_tune(tmp_path: Path):
    asked = plan(
        tmp_path,
        optimizers=["sgd", "adam(lr=[0.0001,0.02])", "agd"],
        lrs=[0.0003, 0.3],
        seeds=[0, 1, 2],
        tuning_seeds=[1],
    )
    assert sweep(asked, Follower()).finished == 6 + 4 + 2 + 2
    there = {
        path.parent.relative_to(tmp_path / "toy-small").as_posix() for path in tmp_path.rglob("result.json")
    }
    # sgd's default is 0.001 and adam's 0.001 is not in its brackets.
    others = {"sgd/lr=0.001", "sgd/lr=0.3", "adam/lr=0.02", "agd/lr=auto"}
    tuned = others | {"sgd/lr=0.0003", "adam/lr=0.0001"}
    assert there == {f"{place}/seed=1" for place in tuned} | {
        f"{place}/seed={seed}" for place in others for seed in (0, 2)
    }
    comparison = load(tmp_path)
    (workload,) = comparison.workloads
    assert {run.status for run in workload.runs} == {"finished"}
    assert not workload.extra
    rows = {row.optimizer.label: row for row in summarise(comparison)[0].rows}
    assert rows["sgd"].best.lr == 0.3
    assert rows["adam"].default is None
    assert [len(cell.runs) for cell in rows["adam"].cells] == [1, 3]
    assert "All rates were tried on seed 1 alone" in " ".join(notes(comparison, summarise(comparison)[0]))
    again = Follower()
    assert sweep(asked, again).skipped == 14
    assert not again.statuses


def test_the_best_rate_of_the_average_is_run_too(tmp_path: Path):
    asked = plan(
        tmp_path,
        optimizers=["sgd(lr=[0.01,0.1,1.0])"],
        seeds=[0, 1],
        tuning_seeds=[0],
        settings=replace(ONE_THREAD, average=True),
    )
    specs = plan_runs(asked)
    for spec in specs:
        run(spec.path, optimizer=spec.optimizer, lr=spec.lr, seed=spec.seed, settings=asked.settings)
        best, best_average = spec.lr == 0.1, spec.lr == 1.0
        result = json.loads((spec.path / "result.json").read_text())
        result["final"]["accuracy"] = 0.5 + 0.1 * best
        result["average"]["final"]["accuracy"] = 0.5 + 0.1 * best_average
        (spec.path / "result.json").write_text(json.dumps(result))
    assert {spec.lr for spec in remaining_runs(asked, specs)} == {0.1, 1.0}
    assert json.loads((tmp_path / "comparison.json").read_text())["tuning"] == {
        "seeds": [0],
        "rates": {"toy-small": {"sgd": [0.1, 1.0]}},
    }


def test_a_grid_of_options_is_tuned_as_one_optimiser(tmp_path: Path):
    asked = plan(
        tmp_path,
        optimizers=["sgd(lr=[0.01,0.1],momentum=[0.0,0.9])", "adam"],
        seeds=[0, 1],
        lrs="default",
        tuning_seeds=[0],
    )
    assert (sweep(asked, Follower()).diverged, len(list(tmp_path.rglob("result.json")))) == (0, 7)
    told = json.loads((tmp_path / "comparison.json").read_text())["tuning"]["rates"]["toy-small"]
    points = {label: rates for label, rates in told.items() if label.startswith("sgd")}
    assert set(points) == {"sgd(momentum=0.0)", "sgd(momentum=0.9)"}
    assert sorted(map(len, points.values())) == [0, 1]
    (row,) = [row for row in summarise(load(tmp_path))[0].rows if points.get(row.optimizer.label)]
    assert [len(cell.runs) for cell in row.cells if cell.lr in points[row.optimizer.label]] == [2]
    assert {row.count("missing") for row in summarise(load(tmp_path))[0].rows} == {0}


def test_a_rate_at_which_nothing_ended_well_is_not_chosen(tmp_path: Path):
    asked = plan(
        tmp_path,
        workloads=[WorkloadChoice(str(TOY), options={"grow": 1e6})],
        optimizers=["sgd", "sgd(lr=[0.1,0.2],momentum=0.9)"],
        tuning_seeds=[0],
    )
    outcome = sweep(asked, Follower())
    # sgd runs its default once more; the other has none to run and no good rate.
    assert (outcome.diverged, outcome.finished) == (5, 0)
    assert {row.count("missing") for row in summarise(load(tmp_path))[0].rows} == {0}


def test_variants_of_a_workload_are_told_apart_by_their_options(tmp_path: Path):
    variants = [WorkloadChoice(str(TOY)), WorkloadChoice(str(TOY), options={"width": 8, "total": 20})]
    asked = plan(tmp_path, workloads=variants, optimizers=["agd"], seeds=[0])
    sweep(asked, Follower())
    titles = ["toy (small)", "toy (small, total=20, width=8)"]
    assert [workload.title for workload in load(tmp_path).workloads] == titles
    (tmp_path / "comparison.json").unlink()  # runs trained one by one
    found = [workload.title for workload in load(tmp_path).workloads]
    assert found == ["toy (small, total=60, width=16)", "toy (small, total=20, width=8)"]
