"""The average: its weights, its precision, its state, and running statistics that fit it."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from archopt import averaged, renew_statistics


def drift(model: nn.Module, t: int) -> None:
    """A step of training: every weight moves by what the step number says."""
    generator = torch.Generator().manual_seed(t)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator).to(param.dtype), alpha=0.1)


def test_average_is_its_equation() -> None:
    model = nn.Linear(3, 2).double()
    average = averaged(model)
    expected = torch.zeros_like(model.weight)
    for t in range(1, 30):
        drift(model, t)
        average.update_parameters(model)
        expected = expected + 9 / (t + 8) * (model.weight.detach() - expected)
        assert torch.allclose(average.module.weight, expected, rtol=0, atol=1e-14)
    assert isinstance(average, AveragedModel)
    assert not torch.allclose(average.module.weight, model.weight, atol=1e-3)


def test_step_k_counts_as_the_eighth_power_of_k() -> None:
    """The mean age of the average is a tenth of the way gone, whatever its length."""
    for steps in (100, 1000):
        model = nn.Linear(1, 1).double()
        average = averaged(model)
        for t in range(1, steps + 1):
            with torch.no_grad():
                model.weight.fill_(float(t))
            average.update_parameters(model)
        assert average.module.weight.item() / steps == pytest.approx(0.9, abs=0.01)


def test_first_update_copies_and_the_model_is_left_alone() -> None:
    model = nn.Linear(3, 2)
    average = averaged(model)
    drift(model, 1)
    before = copy.deepcopy(model.state_dict())
    average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = torch.randn(4, 3)
    assert torch.equal(average(inputs), model(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_resumes_bit_equal(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    average = averaged(model)
    for t in range(5):
        drift(model, t)
        average.update_parameters(model)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    other = averaged(twin)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["average"])
    copied = copy.deepcopy(average)
    for t in range(5, 10):
        drift(model, t)
        drift(twin, t)
        average.update_parameters(model)
        other.update_parameters(twin)
        copied.update_parameters(model)
    for name, value in average.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
        assert torch.equal(copied.state_dict()[name], value), name


def test_half_precision_is_averaged_in_float32() -> None:
    """The late weights 9/(t+8) are below bfloat16's rounding, where the average would stand still."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = averaged(model)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(1, 6001):
        with torch.no_grad():
            model.weight.fill_(1.0 if t <= 3000 else 1.0078125)
        average.update_parameters(model)
        expected += 9 / (t + 8) * (model.weight.double().squeeze() - expected)
    assert average.module.weight.dtype == torch.bfloat16
    assert average.module.weight.item() == expected.to(torch.bfloat16).item() == 1.0078125
    assert average.exact_0.item() == pytest.approx(expected.item(), abs=5e-5)


def test_buffers_are_those_of_the_model() -> None:
    model = nn.BatchNorm1d(3)
    average = averaged(model)
    model(torch.randn(8, 3) + 2)
    average.update_parameters(model)
    assert torch.equal(average.module.running_mean, model.running_mean)
    assert int(average.module.num_batches_tracked) == 1


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.instance = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.instance(self.drop(self.norm(self.linear(x))).view(-1, 2, 2))


def test_renewed_statistics_are_those_of_the_batches() -> None:
    model = Normed()
    average = averaged(model)
    for t in range(3):
        drift(model, t)
        model(torch.randn(16, 3) + 5)
        average.update_parameters(model)
    average.eval()
    batches = [(torch.randn(16, 3), torch.zeros(16)) for _ in range(4)]
    state = torch.random.get_rng_state()
    renew_statistics(average, batches)
    assert torch.equal(torch.random.get_rng_state(), state), "dropout drew random numbers"

    hidden = [average.module.linear(inputs) for inputs, _ in batches]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    variance = torch.stack([h.var(0) for h in hidden]).mean(0)
    assert torch.allclose(average.module.norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(average.module.norm.running_var, variance, atol=1e-5)
    assert average.module.norm.momentum == 0.3
    assert not any(module.training for module in average.modules())
    instance = average.module.instance
    assert not torch.equal(instance.running_mean, torch.zeros(2))
    assert not torch.equal(model.norm.running_mean, average.module.norm.running_mean)


def test_statistics_are_renewed_from_plain_inputs_in_training_mode_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    renew_statistics(model, iter([torch.randn(8, 3)]))
    assert model.training
    assert model[1].training
    assert not model[2].training


def test_models_without_statistics_read_no_batch() -> None:
    def batches() -> object:
        raise AssertionError("a batch was read")
        yield

    renew_statistics(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), batches())  # type: ignore[arg-type]


def test_no_batch_is_refused_and_keeps_the_statistics() -> None:
    model = nn.BatchNorm1d(3)
    model(torch.randn(8, 3))
    before = model.running_mean.clone()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="at least one batch"):
        renew_statistics(model, [])
    assert torch.equal(model.running_mean, before)
    assert model.training
