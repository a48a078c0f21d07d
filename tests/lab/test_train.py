"""One run: the record it leaves, the same bits however often it is interrupted, honest ends."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from archopt.lab import seeds
from archopt.lab.errors import Interrupted, LabError
from archopt.lab.optimizers import ENTRIES
from archopt.lab.train import Settings, evaluation_mode, weights_sha256
from lab.running import ONE_THREAD, StopAt, bits, lines, run, timeless, toy

OPTIMIZERS = [name for name, entry in ENTRIES.items() if not entry.unavailable and name != "agd-paper"]


def test_the_record_has_what_the_report_reads(tmp_path: Path):
    result = run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["optimizer"]["label"] == "adam"
    assert config["optimizer"]["options"]["betas"] == [0.9, 0.999]
    assert config["source"].startswith("sha256:")
    assert (config["steps"], config["average"], config["environment"]["threads"]) == (60, False, 1)
    told = lines(tmp_path)
    assert [line["step"] for line in told] == [0, 10, 20, 30, 40, 50, 60]
    assert "train" not in told[0]
    for before, line in itertools.pairwise(told):
        assert set(line["train"]) == {"loss", "accuracy"}
        assert set(line["eval"]) == {"accuracy", "test_loss"}
        assert line["lr"] == pytest.approx(0.02 * (1 - (line["step"] - 1) / 60))
        assert line["seconds"] - before["seconds"] == pytest.approx(sum(line["time"].values()))
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["final"]["accuracy"] == told[-1]["eval"]["accuracy"]
    assert result["final"]["train_loss"] == told[-1]["train"]["loss"]
    values = [line["eval"]["accuracy"] for line in told[1:]]
    assert result["best"] == {"value": max(values), "step": 10 * (values.index(max(values)) + 1)}
    assert result["final"]["accuracy"] > 0.9
    assert 0 < result["optimizer_share"] + result["overhead_share"] < 1
    assert result["optimizer_state_bytes"] >= 2 * 4 * result["parameters"]
    assert result["peak_memory_bytes"] > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path, optimizer):
    lr = 0.02 if ENTRIES[optimizer].rate else None
    whole = run(tmp_path / "whole", optimizer=optimizer, lr=lr)
    assert whole["status"] == "finished", whole["error"]
    for step in (1, 17, 40):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", optimizer=optimizer, lr=lr, watcher=StopAt(step))
    watcher = StopAt(-1)
    run(tmp_path / "parts", optimizer=optimizer, lr=lr, watcher=watcher)
    assert watcher.began == [40]
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


def test_checkpoints_do_not_change_a_run(tmp_path: Path):
    run(tmp_path / "a")
    run(tmp_path / "b", settings=Settings(threads=1, checkpoint_steps=1))
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_measuring_does_not_change_a_run(tmp_path: Path):
    often = run(tmp_path / "a", toy(every=1))
    seldom = run(tmp_path / "b", toy(every=60))
    assert often["weights_sha256"] == seldom["weights_sha256"]
    assert timeless(tmp_path / "a")[-1]["eval"] == timeless(tmp_path / "b")[-1]["eval"]


def test_optimisers_see_the_same_initial_weights_batches_and_dropout(tmp_path: Path):
    run(tmp_path / "a", optimizer="adam", lr=0.0)
    run(tmp_path / "b", optimizer="sgd(weight_decay=0.1)", lr=0.0)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    run(tmp_path / "c", optimizer="adam", lr=0.0, seed=1)
    assert timeless(tmp_path / "c") != timeless(tmp_path / "a")


def test_one_run_leaves_nothing_behind_for_the_next(tmp_path: Path):
    experiment = toy()
    run(tmp_path / "a", experiment)
    run(tmp_path / "other", experiment, optimizer="sgd", seed=3)
    run(tmp_path / "b", experiment)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_a_finished_run_is_only_read(tmp_path: Path):
    result = run(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    watcher = StopAt(1)
    assert run(tmp_path, watcher=watcher) == result
    assert not watcher.began
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("rule", ["sgd", "nero"])
def test_the_schedule_multiplies_the_rate_of_every_step(tmp_path: Path, rule):
    class Rates(StopAt):
        seen: list[float] = []

        def step(self, step, now):
            (optimizer,) = self.run.optimizers.values()
            self.seen.append(optimizer.param_groups[0]["lr"])
            return False

    from archopt.lab import train as module

    watcher = Rates(-1)
    original = module.Run.to_end

    def spy(self, folder, state):
        watcher.run = self
        return original(self, folder, state)

    module.Run.to_end = spy
    try:
        run(tmp_path, optimizer=rule, lr=0.5, watcher=watcher)
    finally:
        module.Run.to_end = original
    assert watcher.seen == pytest.approx([0.5 * (1 - step / 60) for step in range(60)])


def test_a_rule_without_a_rate_follows_no_schedule(tmp_path: Path):
    run(tmp_path, optimizer="agd", lr=None)
    told = lines(tmp_path)
    assert all(line["lr"] is None for line in told)
    assert all(line["optimizer"]["eta"] > 0 for line in told[1:])


def test_a_diverged_run_ends_there_and_is_recorded(tmp_path: Path):
    result = run(tmp_path, toy(grow=1e5), optimizer="sgd", lr=1.0)
    assert result["status"] == "diverged"
    assert 0 < result["step"] < 60
    told = lines(tmp_path)
    assert told[-1]["step"] == result["step"]
    assert told[-1]["train"]["loss"] is None
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "diverged"
    assert run(tmp_path, toy(grow=1e5), optimizer="sgd", lr=1.0)["step"] == result["step"]  # not tried again


def test_a_metric_that_is_not_finite_is_divergence(tmp_path: Path):
    experiment = toy()

    class Worse(type(experiment.workload)):  # type: ignore[misc]
        def evaluate(self, models):
            return {"accuracy": math.nan if self.calls() > 1 else 0.5}

        def calls(self):
            self.count = getattr(self, "count", 0) + 1
            return self.count

    experiment.workload.__class__ = Worse
    result = run(tmp_path, experiment)
    assert (result["status"], result["step"]) == ("diverged", 10)


def test_a_failing_run_is_recorded_with_its_reason_and_goes_on_when_repaired(tmp_path: Path):
    experiment = toy(fail_at=33)
    settings = Settings(threads=1, checkpoint_steps=5)
    result = run(tmp_path / "a", experiment, settings=settings)
    assert (result["status"], result["step"]) == ("failed", 33)
    assert "ArithmeticError: asked to fail" in result["error"]
    assert "in batch" in result["traceback"]
    type(experiment.workload).fail_at = -1  # the cause is gone; the run, as its config names it, is the same
    original = type(experiment.workload).batch

    def repaired(self, step, seed):
        return self.points(32)

    type(experiment.workload).batch = repaired
    try:
        watcher = StopAt(-1)
        assert run(tmp_path / "a", experiment, settings=settings, watcher=watcher)["status"] == "finished"
        assert watcher.began == [30]
    finally:
        type(experiment.workload).batch = original
    whole = run(tmp_path / "b")
    assert whole["weights_sha256"] == json.loads((tmp_path / "a/result.json").read_text())["weights_sha256"]


def test_gradients_are_clipped_where_asked(tmp_path: Path):
    free = run(tmp_path / "a", optimizer="sgd", lr=0.1)
    clipped = run(tmp_path / "b", optimizer="sgd", lr=0.1, settings=Settings(threads=1, clip_norm=1e-9))
    assert clipped["final"]["train_loss"] > free["final"]["train_loss"] + 0.3
    assert json.loads((tmp_path / "b/config.json").read_text())["clip_norm"] == 1e-9


def test_autocast_runs_forward_passes_in_bfloat16(tmp_path: Path):
    seen = set()
    experiment = toy(total=3)

    class Spied(type(experiment.workload)):  # type: ignore[misc]
        def build(self):
            model = super().build()
            model[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
            return model

    experiment.workload.__class__ = Spied
    result = run(tmp_path, experiment, settings=Settings(threads=1, amp=True))
    assert (result["status"], seen) == ("finished", {torch.bfloat16})


def test_a_resumed_run_keeps_its_number_of_threads(tmp_path: Path):
    before = torch.get_num_threads()
    seen = []

    class Threads(StopAt):
        def step(self, step, now):
            seen.append(torch.get_num_threads())
            return super().step(step, now)

    with pytest.raises(Interrupted):
        run(tmp_path, settings=Settings(threads=2), watcher=Threads(5))
    torch.set_num_threads(1)
    try:
        run(tmp_path, settings=Settings(), watcher=Threads(-1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


def test_an_option_that_the_rule_refuses_is_bad_input(tmp_path: Path):
    with pytest.raises(LabError, match=r"adam\(betas=\(0.9, 1.5\)\) at lr=0.1: Invalid beta"):
        run(tmp_path, optimizer="adam(betas=(0.9,1.5))", lr=0.1)


def test_evaluation_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[0].eval()  # frozen by its owner
    with evaluation_mode({"model": model}, {}):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


class Elsewhere(torch.optim.SGD):
    """Evaluates at other weights than it trains, and rounds on the way back."""

    training = False

    def step(self, closure=None):
        assert self.training
        return super().step(closure)

    def _move(self, by: float) -> None:
        self.training = not self.training
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.mul_(by)

    def train(self) -> None:
        if not self.training:
            self._move(3.0)

    def eval(self) -> None:
        if self.training:
            self._move(1 / 3)


def test_an_optimiser_with_modes_is_evaluated_in_one_and_goes_on_from_the_very_bits_of_the_other():
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    optimizer = Elsewhere(model.parameters(), lr=0.1)
    optimizer.train()
    before = weights_sha256({"model": model})
    optimizer.eval()
    elsewhere = weights_sha256({"model": model})
    optimizer.train()
    assert weights_sha256({"model": model}) != before  # so it matters
    before = weights_sha256({"model": model})
    with evaluation_mode({"model": model}, {"model": optimizer}):
        assert not optimizer.training
        assert weights_sha256({"model": model}) != before
    assert optimizer.training
    assert weights_sha256({"model": model}) == before != elsewhere


def test_an_optimiser_with_modes_trains_in_the_laboratory(tmp_path: Path):
    optimizer = f"{__file__}:Elsewhere"
    whole = run(tmp_path / "whole", optimizer=optimizer, lr=0.1)
    assert whole["status"] == "finished", whole["error"]
    often = run(tmp_path / "often", toy(every=1), optimizer=optimizer, lr=0.1)
    assert often["weights_sha256"] == whole["weights_sha256"]


def test_the_checksum_of_weights_sees_one_bit_and_the_type():
    model = nn.Linear(3, 2)
    before = weights_sha256({"model": model})
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0))
    assert weights_sha256({"model": model}) != before
    assert len({weights_sha256({"model": model.to(kind)}) for kind in (torch.float32, torch.bfloat16)}) == 2


def test_seeds_of_steps_runs_and_purposes_do_not_meet():
    mixed = [
        seeds.mix(seed, step, purpose) for seed in range(5) for step in range(200) for purpose in range(4)
    ]
    assert len(set(mixed)) == len(mixed)
    device = torch.device("cpu")
    seeds.seed_all(mixed[7], device)
    first = torch.rand(3)
    seeds.seed_all(mixed[7], device)
    assert torch.equal(first, torch.rand(3))


def test_two_models_have_an_optimiser_each_and_no_gradient_of_the_other(tmp_path: Path):
    experiment = toy()

    class Pair(type(experiment.workload)):  # type: ignore[misc]
        def build(self):
            self.drift = torch.zeros(())
            return {"maker": nn.Linear(4, 8), "judge": nn.Linear(8, 1)}

        def train_step(self, training, step):
            maker, judge = training.models["maker"], training.models["judge"]
            made = judge(maker(torch.randn(16, 4))).square().mean()
            training.update("maker", made)
            assert judge.weight.grad is None
            judged = judge(torch.randn(16, 8)).mean().exp()
            training.update("judge", judged)
            return {"loss": made.detach() + judged.detach()}

        def evaluate(self, models):
            return {"accuracy": float(models["judge"].weight.norm())}

    experiment.workload.__class__ = Pair
    result = run(tmp_path / "whole", experiment, optimizer="nero", settings=ONE_THREAD)
    assert result["status"] == "finished"
    assert {key.partition("/")[0] for key in lines(tmp_path / "whole")[-1]["optimizer"]} == {"maker", "judge"}
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", experiment, optimizer="nero", watcher=StopAt(23))
    run(tmp_path / "parts", experiment, optimizer="nero")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
