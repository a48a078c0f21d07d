"""`--average`: the average beside the weights, right to the bit, and nothing of the training touched by it."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from archopt.lab import seeds
from archopt.lab import train as module
from archopt.lab.errors import Interrupted, LabError, RecordError
from archopt.lab.plan import plan_runs
from archopt.lab.report import write_report
from archopt.lab.report.load import load
from archopt.lab.report.style import DOTTED, styles
from archopt.lab.sweep import sweep
from archopt.lab.train import Settings
from archopt.lab.workload import Metric
from lab.running import ONE_THREAD, StopAt, bits, lines, run, toy
from lab.test_sweep import Follower, plan

AVERAGED = Settings(threads=1, average=True)


class Spy(StopAt):
    """Keeps the run and its weights after every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(-1)
        self.weights: list[list[Tensor]] = []
        original = module.Run.to_end

        def to_end(run, folder, state):
            self.run = run
            return original(run, folder, state)

        monkeypatch.setattr(module.Run, "to_end", to_end)

    def step(self, step: int, now: float) -> bool:
        parameters = self.run.models["model"].parameters()
        self.weights.append([p.detach().double().clone() for p in parameters])
        return False


def refashioned(experiment, **changes):
    """The experiment with methods or attributes of its workload replaced."""
    experiment.workload.__class__ = type("Refashioned", (type(experiment.workload),), changes)
    return experiment


def without_average(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in ("average", "seconds", "time")}


def test_averaging_does_not_touch_the_training(tmp_path: Path):
    plain, averaged = run(tmp_path / "a"), run(tmp_path / "b", settings=AVERAGED)
    assert averaged["weights_sha256"] == plain["weights_sha256"]
    assert (averaged["final"], averaged["best"]) == (plain["final"], plain["best"])
    assert list(map(without_average, lines(tmp_path / "b"))) == list(
        map(without_average, lines(tmp_path / "a"))
    )
    assert "average" not in plain
    assert not any("average" in line for line in lines(tmp_path / "a"))


def test_the_record_has_the_average_beside_the_weights(tmp_path: Path):
    result = run(tmp_path, settings=AVERAGED)
    told = lines(tmp_path)
    assert told[0]["average"] == told[0]["eval"]
    assert all(set(line["average"]) == set(line["eval"]) for line in told)
    assert all(line["average"] != line["eval"] for line in told[1:])
    average = result["average"]
    assert average["final"] == told[-1]["average"]
    values = [line["average"]["accuracy"] for line in told[1:]]
    assert average["best"] == {"value": max(values), "step": 10 * (values.index(max(values)) + 1)}
    assert average["state_bytes"] >= 4 * result["parameters"]
    assert average["weights_sha256"] != result["weights_sha256"]
    assert json.loads((tmp_path / "config.json").read_text())["average"] is True


def test_the_average_is_that_of_the_weights_after_each_step(tmp_path: Path, monkeypatch):
    spy = Spy(monkeypatch)
    run(tmp_path, settings=AVERAGED, watcher=spy)
    expected = [torch.zeros_like(w) for w in spy.weights[0]]
    for t, weights in enumerate(spy.weights, start=1):
        expected = [mean + 9 / (t + 8) * (latest - mean) for mean, latest in zip(expected, weights)]
    found = spy.run._averages.models["model"].parameters()
    assert all(torch.allclose(a, b.double(), atol=1e-6) for a, b in zip(expected, found))


def test_statistics_are_those_of_the_last_batches_under_the_average(tmp_path: Path, monkeypatch):
    spy = Spy(monkeypatch)
    experiment = toy()
    run(tmp_path, experiment, settings=AVERAGED, watcher=spy)
    model, workload = spy.run._averages.models["model"], copy.copy(spy.run.workload)
    means = []
    for step in range(50, 60):  # the last epoch
        seeds.seed_all(seeds.mix(0, step, seeds.STEP), torch.device("cpu"))
        points, _ = workload.batch(step, 0)
        points = points + workload.drift
        workload.drift = 0.9 * workload.drift + 0.01 * (points - workload.drift).mean()
        means.append(model[0](points).mean(0))
    assert torch.allclose(model[1].running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert not torch.allclose(model[1].running_mean, spy.run.models["model"][1].running_mean, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "autonero"])
def test_an_interrupted_averaged_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path, optimizer):
    lr = 0.02 if optimizer == "adam" else None
    run(tmp_path / "whole", optimizer=optimizer, lr=lr, settings=AVERAGED)
    for step in (1, 17, 40):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", optimizer=optimizer, lr=lr, settings=AVERAGED, watcher=StopAt(step))
    run(tmp_path / "parts", optimizer=optimizer, lr=lr, settings=AVERAGED)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


def test_measuring_often_does_not_change_the_average(tmp_path: Path):
    often = run(tmp_path / "a", toy(every=1), settings=AVERAGED)
    seldom = run(tmp_path / "b", toy(every=60), settings=AVERAGED)
    assert often["weights_sha256"] == seldom["weights_sha256"]
    assert often["average"]["best"]["step"] < 60  # evaluated at every step indeed


def test_a_folder_of_a_plain_run_is_refused_to_an_averaged_one(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(RecordError, match="average: false there, true asked for"):
        run(tmp_path, settings=AVERAGED)


def test_a_metric_that_training_tells_is_taken_on_the_same_batches(tmp_path: Path):
    def evaluate(self, models):
        return {}

    metric = Metric("train_accuracy", "running accuracy", higher_is_better=True, unit="%")
    experiment = refashioned(toy(), metric=metric, evaluate=evaluate)
    result = run(tmp_path / "a", experiment, settings=AVERAGED)
    told = lines(tmp_path / "a")
    assert told[0]["average"] == {}
    assert [set(line["average"]) for line in told[1:]] == [{"train_accuracy"}] * 6
    assert result["average"]["final"]["train_accuracy"] > 0.9
    plain = run(tmp_path / "b", refashioned(toy(), metric=metric, evaluate=evaluate))
    assert plain["weights_sha256"] == result["weights_sha256"]


def own_step(self, training, step):
    loss, _ = self.loss(training.models["model"], training.batch(step))
    training.update("model", loss)
    return {"loss": loss.detach()}


def test_statistics_that_cannot_be_renewed_are_bad_input_that_leaves_no_trace(tmp_path: Path):
    with pytest.raises(LabError, match=r"toy: --average cannot renew the running statistics of model.*leave"):
        run(tmp_path / "run", refashioned(toy(), train_step=own_step), settings=AVERAGED)
    assert not (tmp_path / "run").exists()


def test_models_that_train_by_steps_of_their_own_are_averaged_where_nothing_must_be_renewed(tmp_path: Path):
    def build(self):
        self.drift = torch.zeros(())
        return nn.Linear(8, 3)

    result = run(tmp_path, refashioned(toy(), build=build, train_step=own_step), settings=AVERAGED)
    assert result["average"]["final"]["accuracy"] > 0.9


def test_a_run_that_diverges_is_recorded_with_its_average(tmp_path: Path):
    result = run(tmp_path, toy(grow=1e5), optimizer="sgd", lr=1.0, settings=AVERAGED)
    assert result["status"] == "diverged"
    assert lines(tmp_path)[-1]["average"] == {"accuracy": None}


def test_the_report_shows_each_optimiser_and_its_average(tmp_path: Path):
    asked = plan(tmp_path, seeds=[0], settings=replace(ONE_THREAD, average=True))
    assert sweep(asked, Follower()).finished == 4
    comparison = load(tmp_path)
    labels = ["sgd", "sgd (average)", "adam(amsgrad=True)", "adam(amsgrad=True) (average)"]
    assert [optimizer.label for optimizer in comparison.optimizers] == labels
    (workload,) = comparison.workloads
    assert len(workload.runs) == 8
    assert not workload.extra
    for spec in plan_runs(asked):
        stored = json.loads((spec.path / "result.json").read_text())
        plain, average = [
            run for run in workload.runs if run.lr == spec.lr and spec.optimizer in run.optimizer
        ]
        assert plain.final("accuracy") == stored["final"]["accuracy"]
        assert average.final("accuracy") == stored["average"]["final"]["accuracy"]
        assert [p.eval for p in average.points] == [line["average"] for line in lines(spec.path)]
        state = average.number("optimizer_state_bytes")
        assert state == stored["optimizer_state_bytes"] + stored["average"]["state_bytes"]
    page = write_report(tmp_path).read_text()
    assert "4: 4 finished" in page  # runs are counted once
    assert "All 4 runs" in page
    assert all("4 runs, seeds 0" in picture.read_text() for picture in tmp_path.glob("figures/*.svg"))
    assert "sgd and adam(amsgrad=True), each also averaged, on toy (small)" in page
    table = json.loads((tmp_path / "table.json").read_text())["workloads"][0]["optimizers"]
    assert {row["label"]: row["averaged"] for row in table} == dict(zip(labels, [False, True] * 2))


def test_an_average_that_is_not_finite_has_diverged_though_the_run_finished(tmp_path: Path):
    path = tmp_path / "toy-small/adam/lr=0.02/seed=0"
    run(path, settings=AVERAGED)
    result = json.loads((path / "result.json").read_text())
    result["average"]["final"]["accuracy"] = None
    (path / "result.json").write_text(json.dumps(result))
    statuses = {run.optimizer: run.status for run in load(tmp_path).workloads[0].runs}
    assert statuses == {"adam": "finished", "adam (average)": "diverged"}


def test_an_average_is_dotted_in_its_optimisers_colour():
    looks = styles(["nero", "nero (average)", "mine:Rule (average)", "mine:Rule"])
    assert list(looks) == ["nero", "nero (average)", "mine:Rule (average)", "mine:Rule"]
    for label in ("nero", "mine:Rule"):
        plain, average = looks[label], looks[f"{label} (average)"]
        assert (average.light, average.dark, average.marker) == (plain.light, plain.dark, plain.marker)
        assert average.dash == DOTTED != plain.dash
