"""The workloads: what they read, their sizes, batches and schedules, and that they learn."""

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archopt.lab.data import DataFolder
from archopt.lab.experiment import Experiment
from archopt.lab.models.dense import MLP, CentredMLP
from archopt.lab.models.small_cnn import SmallCNN
from archopt.lab.workload import Workload
from archopt.lab.workloads import registry
from archopt.lab.workloads.digits import Digits
from archopt.lab.workloads.mnist_cwn import MnistCWN
from archopt.lab.workloads.mnist_mlp100 import MnistMLP100
from archopt.lab.workloads.supervised import Supervised, epoch_order
from real_data import real_data

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """The least that `train_step` needs of a run."""

    clip_norm = None

    def __init__(
        self, workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        self.workload, self.seed = workload, seed
        self.models, self.optimizers = {"model": model}, {"model": optimizer}

    def batch(self, step: int) -> object:
        return self.workload.batch(step, self.seed)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def update(self, name: str, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


def evaluate(workload: Workload, model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return workload.evaluate({"model": model})


def train(workload: Workload, seed: int = 0, steps: int | None = None, lr: float = 1e-3) -> dict[str, float]:
    """Trains with AdamW; returns the evaluation and, with `train_` before them, the last step's numbers."""
    torch.manual_seed(seed)
    model = workload.build()
    assert isinstance(model, nn.Module)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    run = Run(workload, model, optimizer, seed)
    numbers: dict[str, torch.Tensor] = {}
    for step in range(workload.steps if steps is None else steps):
        optimizer.param_groups[0]["lr"] = lr * workload.schedule(step)
        numbers = workload.train_step(run, step)
    model.eval()
    metrics = evaluate(workload, model)
    return {**metrics, **{f"train_{key}": value.item() for key, value in numbers.items()}}


def loaded(workload: Workload, data: DataFolder | None = None) -> Workload:
    workload.load(data or DataFolder(None))
    return workload


@dataclass
class Rows(Supervised):
    """Ten rows in batches of four; row i has the target i."""

    name = "rows"
    epochs: int = 3
    batch_size: int = 4

    def load(self, data: DataFolder) -> None:
        inputs = torch.arange(10.0).unsqueeze(1)
        self.hold((inputs, torch.arange(10)), (inputs[:3], torch.arange(3)))


def sizes(model: object) -> tuple[int, int]:
    """Parameters and tensors."""
    assert isinstance(model, nn.Module)
    return sum(p.numel() for p in model.parameters()), len(list(model.parameters()))


# -- batches ---------------------------------------------------------------------------------------


def test_every_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    rows = loaded(Rows())
    assert (rows.steps_per_epoch, rows.steps, rows.eval_every) == (3, 9, 3)
    epochs = []
    for epoch in range(3):
        batches = [rows.batch(3 * epoch + index, seed=0) for index in range(3)]
        assert [len(targets) for _, targets in batches] == [4, 4, 2]
        for inputs, targets in batches:
            torch.testing.assert_close(inputs.squeeze(1), targets.float())
        epochs.append(torch.cat([targets for _, targets in batches]).tolist())
        assert sorted(epochs[-1]) == list(range(10))
    assert len({tuple(order) for order in epochs}) == 3


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    rows, again = loaded(Rows()), loaded(Rows())
    forwards = [rows.batch(step, seed=1)[1].tolist() for step in range(9)]
    torch.manual_seed(99)
    backwards = [again.batch(step, seed=1)[1].tolist() for step in reversed(range(9))]
    assert forwards == backwards[::-1]
    assert forwards != [rows.batch(step, seed=2)[1].tolist() for step in range(9)]


def test_batches_leave_the_global_generator_alone() -> None:
    rows = loaded(Rows())
    before = torch.get_rng_state()
    rows.batch(0, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_epoch_order_is_a_permutation_that_never_repeats() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in range(5) for epoch in range(5)]
    assert all(order.sort().values.equal(torch.arange(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 25


def test_rows_and_targets_that_do_not_match_are_refused() -> None:
    rows = Rows()
    good = (torch.ones(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="Rows: 2 training inputs and 3 targets; expected equally many"):
        rows.hold((torch.ones(2, 1), torch.zeros(3)), good)
    with pytest.raises(ValueError, match="0 test inputs"):
        rows.hold(good, (torch.ones(0, 1), torch.zeros(0)))


@pytest.mark.parametrize(
    ("workload", "options", "message"),
    [
        (Digits, {"epochs": 0}, "epochs=0, expected a value above 0"),
        (Digits, {"batch_size": -1}, "batch_size=-1"),
        (MnistMLP100, {"width": 0}, "width=0"),
        (MnistMLP100, {"decay": -0.5}, "decay=-0.5"),
        (MnistMLP100, {"train_images": 60_001}, "train_images=60001, expected 1 to 60000"),
        (MnistCWN, {"sigma": 0.0}, "sigma=0.0"),
    ],
)
def test_options_out_of_range_are_refused(workload: type[Workload], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(**options)


def test_evaluation_scores_the_whole_test_set_at_once_or_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = loaded(Rows())
    model = nn.Linear(1, 10).requires_grad_(False)
    whole = rows.evaluate({"model": model})
    logits = model(rows.test_inputs)
    assert whole["test_loss"] == pytest.approx(F.cross_entropy(logits, rows.test_targets).item())
    assert whole["test_accuracy"] == pytest.approx(
        (logits.argmax(1) == torch.arange(3)).float().mean().item()
    )
    monkeypatch.setattr("archopt.lab.workloads.supervised.EVALUATION_ROWS", 2)
    assert rows.evaluate({"model": model}) == pytest.approx(whole)


def test_the_accuracy_of_logits_that_are_not_finite_is_not_finite() -> None:
    rows = loaded(Rows())
    model = nn.Linear(1, 10).requires_grad_(False)
    nn.init.constant_(model.weight, math.nan)
    assert math.isnan(rows.evaluate({"model": model})["test_accuracy"])


# -- the registry ----------------------------------------------------------------------------------


def test_the_registry_lists_names_without_importing_workloads() -> None:
    code = (
        "import sys; from archopt.lab.workloads import registry; names = list(registry()); "
        "assert names[0] == 'digits' and 'pong-ppo' in names, names; "
        "assert 'archopt.lab.workloads.digits' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )


@pytest.mark.parametrize("name", list(registry()))
def test_every_workload_keeps_the_protocol(name: str) -> None:
    found = registry()[name]
    assert found.name == {"wmt16": "multi30k-transformer"}.get(name, name)
    assert found.summary
    assert set(found.presets) == {"paper", "small", "smoke"}
    for options in found.presets.values():
        found(**options)  # every key is a field
    assert list(found.lrs) == sorted(found.lrs)


def test_an_unknown_workload_is_a_key_error() -> None:
    assert "digit" not in registry()
    with pytest.raises(KeyError):
        registry()["digit"]


# -- digits ----------------------------------------------------------------------------------------


def test_digits_have_the_documented_sizes() -> None:
    digits = loaded(Digits())
    assert (digits.steps_per_epoch, digits.steps) == (22, 660)
    assert digits.train_inputs.shape == (1400, 1, 8, 8)
    assert digits.test_inputs.shape == (397, 1, 8, 8)
    assert digits.train_inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert digits.train_inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert len(digits.lrs) == 9
    assert sizes(digits.build()) == (64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10, 6)
    assert isinstance(Digits(model="cnn").build(), SmallCNN)
    with pytest.raises(ValueError, match="no model 'rnn'"):
        Digits(model="rnn").build()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "layers", "norms"), [("mlp-ln", 3, 2), ("mlp16", 16, 0), ("mlp16-ln", 16, 15)]
)
def test_digits_have_deep_and_normalised_mlps(model: str, layers: int, norms: int) -> None:
    torch.manual_seed(0)
    network = Digits(model=model).build()  # type: ignore[arg-type]
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == layers
    assert [m.out_features for m in linear] == [128] * (layers - 1) + [10]
    assert sum(isinstance(m, nn.LayerNorm) for m in network.modules()) == norms
    x = torch.randn(4, 1, 8, 8)
    h = x.flatten(1)
    for layer in linear[:-1]:
        h = layer(h)
        h = F.relu(F.layer_norm(h, (128,)) if norms else h)
    torch.testing.assert_close(network(x), linear[-1](h))


def test_digits_keep_the_identity_of_runs_stored_before_they_had_a_schedule() -> None:
    usual = Experiment(Digits(), "small", None, {}, torch.device("cpu"))
    assert usual.options == {"epochs": 30, "batch_size": 64, "model": "mlp"}
    assert usual.folder == "digits-small"
    linear = Experiment(Digits(lr_schedule="linear"), "small", None, {}, torch.device("cpu"))
    assert linear.options["lr_schedule"] == "linear"
    assert linear.folder.startswith("digits-small-")


def test_digits_follow_a_schedule_where_one_is_asked_for() -> None:
    linear = loaded(Digits(lr_schedule="linear"))
    assert [linear.schedule(step) for step in (0, 29, 30, 345)] == pytest.approx([1 / 30, 1, 1, 0.5])
    assert loaded(Digits()).schedule(600) == 1
    with pytest.raises(ValueError, match="lr_schedule='cosine', expected 'linear' or 'constant'"):
        Digits(lr_schedule="cosine")  # type: ignore[arg-type]


def test_digits_mlp_reaches_97_percent_with_adamw() -> None:
    result = train(loaded(Digits()), lr=1e-3)
    assert result["test_accuracy"] > 0.97
    assert result["train_accuracy"] > 0.97


def test_digits_cnn_learns() -> None:
    assert train(loaded(Digits(model="cnn", epochs=3)), lr=3e-3)["test_accuracy"] > 0.9


# -- the networks ----------------------------------------------------------------------------------


def test_mlp_is_linear_maps_with_gain_times_relu_between() -> None:
    model = MLP((6, 5, 4, 3), gain=math.sqrt(2))
    x = torch.randn(7, 2, 3)
    first, second, last = model.layers
    h = math.sqrt(2) * F.relu(x.flatten(1) @ first.weight.T + first.bias)
    h = math.sqrt(2) * F.relu(h @ second.weight.T + second.bias)
    torch.testing.assert_close(model(x), h @ last.weight.T + last.bias)
    assert sizes(MLP((6, 5, 4, 3), bias=False)) == (6 * 5 + 5 * 4 + 4 * 3, 3)


def test_centred_rows_have_mean_zero_and_norm_one_whatever_sigma() -> None:
    for sigma in (1.0, 100.0):
        torch.manual_seed(0)
        layer = CentredMLP((20, 10), sigma).layers[0]
        assert layer.weight.std().item() == pytest.approx(sigma, rel=0.15)
        rows = layer(torch.eye(20)).T
        torch.testing.assert_close(rows.mean(1), torch.zeros(10), atol=1e-6, rtol=0)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(10))


def test_centred_gradient_is_taken_through_centring_and_norm() -> None:
    torch.manual_seed(0)
    layer = CentredMLP((4, 3), 2.0).double().layers[0]
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(layer, {"weight": weight}, (torch.eye(4).double(),)),
        layer.weight.detach().requires_grad_(),
    )
    layer(torch.randn(5, 4).double()).square().sum().backward()
    # The function is invariant to a row's length and mean, so the gradient is orthogonal to both.
    torch.testing.assert_close((layer.weight.grad * layer.weight).sum(1), torch.zeros(3).double())
    torch.testing.assert_close(layer.weight.grad.sum(1), torch.zeros(3).double())


def test_centred_mlp_has_root_two_relu_between() -> None:
    model = CentredMLP((6, 5, 3), 1.0)
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), model.layers[1](math.sqrt(2) * F.relu(model.layers[0](x))))


# -- MNIST -----------------------------------------------------------------------------------------


def test_mlp100_paper_has_the_published_sizes_and_settings() -> None:
    with torch.device("meta"):
        model = MnistMLP100().build()
    assert sizes(model) == (60_936_410, 200)
    assert set(MnistMLP100.lrs) >= {1e-4, 1e-3, 1e-2, 1e-1}
    rates = {name: settings["lr"] for name, settings in MnistMLP100.settings.items()}
    assert rates == {"nero": 1e-3, "lamb": 1e-2, "adam": 1e-3, "sgd": 1e-1}


def test_cwn_paper_has_the_published_sizes_and_settings() -> None:
    with torch.device("meta"):
        model = MnistCWN().build()
    assert sizes(model) == (2_466_464, 5)
    assert MnistCWN.settings == {"adam": {"lr": 0.01}}
    assert MnistCWN().schedule(1199) == 1.0


@pytest.mark.data
def test_mnist_paper_presets_have_the_published_steps_and_schedule() -> None:
    data = real_data("mnist")
    mlp100 = loaded(MnistMLP100(), data)
    assert (mlp100.steps_per_epoch, mlp100.steps) == (240, 50 * 240)
    assert [mlp100.schedule(step) for step in (0, 239, 240, 479, 480)] == [1.0, 1.0, 0.9, 0.9, 0.9**2]
    assert mlp100.schedule(mlp100.steps - 1) == pytest.approx(0.9**49)
    inputs, targets = mlp100.batch(0, 0)
    assert inputs.shape == (250, 784)
    assert targets.shape == (250,)
    assert mlp100.train_inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert mlp100.train_inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert mlp100.train_inputs.min().item() == pytest.approx(-0.1307 / 0.3081)
    cwn = loaded(MnistCWN(), data)
    assert (cwn.steps, cwn.eval_every) == (1200, 240)


@pytest.mark.data
def test_mnist_metric_is_the_mean_of_the_batches_since_the_last_evaluation() -> None:
    workload = loaded(MnistCWN(width=16, epochs=1, train_images=1000), real_data("mnist"))
    torch.manual_seed(0)
    model = workload.build()
    before = evaluate(workload, model)
    first = (model(workload.train_inputs[:1000]).argmax(1) == workload.train_targets[:1000]).float().mean()
    assert before["train_accuracy"] == pytest.approx(first.item())
    run = Run(workload, model, torch.optim.Adam(model.parameters(), 1e-2), seed=0)
    told = [workload.train_step(run, step)["accuracy"].item() for step in range(3)]
    assert evaluate(workload, model)["train_accuracy"] == pytest.approx(sum(told) / 3)
    told = [workload.train_step(run, step)["accuracy"].item() for step in range(3, 4)]
    assert evaluate(workload, model)["train_accuracy"] == pytest.approx(told[0])


@pytest.mark.data
def test_mnist_metric_survives_an_interruption_to_the_bit() -> None:
    data = real_data("mnist")
    options = {"width": 16, "epochs": 1, "train_images": 1500}

    def metric(interrupt: bool) -> float:
        workload = loaded(MnistCWN(**options), data)
        torch.manual_seed(0)
        model = workload.build()
        run = Run(workload, model, torch.optim.Adam(model.parameters(), 1e-2), seed=0)
        for step in range(6):
            if interrupt and step == 4:
                state = workload.state_dict()
                run.workload = workload = loaded(MnistCWN(**options), data)
                workload.load_state_dict(state)
            workload.train_step(run, step)
        return evaluate(workload, model)["train_accuracy"]

    assert metric(True) == metric(False)


@pytest.mark.data
def test_cwn_starts_as_the_published_runs() -> None:
    """The authors' runs first score 0.9 at steps 12, 18, 12 with sigma 1, at 386 to 435 with sigma 100."""
    data = real_data("mnist")

    def accuracies(sigma: float) -> list[float]:
        workload = loaded(MnistCWN(sigma=sigma), data)
        torch.manual_seed(0)
        model = workload.build()
        run = Run(workload, model, torch.optim.Adam(model.parameters(), 1e-2), seed=0)
        return [workload.train_step(run, step)["accuracy"].item() for step in range(25)]

    assert max(accuracies(1.0)) >= 0.9
    assert max(accuracies(100.0)) < 0.4


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist-mlp100", "mnist-cwn"])
def test_mnist_smoke_presets_run(name: str) -> None:
    found = registry()[name]
    result = train(loaded(found(**found.presets["smoke"]), real_data("mnist")), steps=3)
    assert math.isfinite(result["test_loss"])
    assert 0 <= result["train_accuracy"] <= 1


# -- the example -----------------------------------------------------------------------------------


def example(name: str) -> Any:
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_example_workload_runs_and_learns() -> None:
    module = example("my_workload")
    workload = loaded(module.DigitCodes(epochs=3))
    untrained = train(workload, steps=0)["test_error"]
    trained = train(workload, lr=3e-3)["test_error"]
    assert trained < untrained / 2
    assert workload.schedule(0) == 1
    assert [sorted(module.DigitCodes.presets)] == [["paper", "small", "smoke"]]
    assert len(Path(module.__file__).read_text().splitlines()) <= 50


@pytest.mark.data
def test_the_example_of_fine_tuning_begins_with_what_was_trained() -> None:
    FineTuning = example("fine_tuning").FineTuning
    data = real_data("wikitext-2")
    workload = loaded(FineTuning(pretraining=60, steps=10, eval_every=5), data)
    start = train(workload, steps=0)
    assert start["moved"] == 0
    assert start["known_loss"] < start["val_loss"] - 0.15  # it knows the one text, not yet the other
    end = train(workload, lr=3e-3)
    assert end["moved"] > 0
    assert end["val_loss"] < start["val_loss"]
    assert int(workload.text.max()) == 64
