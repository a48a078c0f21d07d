"""AutoNero on real data: where its first derivation failed, and how it takes over from another optimiser."""

import pytest
import torch

from archopt import AutoNero
from archopt.lab.experiment import WorkloadChoice, open_experiment
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.train import Settings, train
from real_data import real_data, real_data_path


@pytest.mark.slow
def test_an_lstm_with_batches_of_two_learns(tmp_path):
    """Without the bound its angle grows until nothing is left of the network: 3.7 nats after 1,000 steps."""
    real_data("tinyshakespeare")
    choice = WorkloadChoice("shakespeare-lstm", "small", {"batch_size": 2, "eval_every": 500})
    experiment = open_experiment(choice, str(real_data_path()), torch.device("cpu"))
    result = train(experiment, parse_optimizer("autonero"), None, 0, Settings(threads=1), tmp_path / "run")
    assert result["status"] == "finished"
    assert result["final"]["val_loss"] < 2.3


@pytest.mark.parametrize("model", ["mlp", "mlp-ln", "mlp16", "mlp16-ln", "cnn"])
def test_the_first_step_on_trained_digits_changes_outputs_by_a_hundredth_at_most(model):
    """theta_0 = 0.01, shared by the matrices."""
    workload = open_experiment(
        WorkloadChoice("digits", "small", {"model": model}), None, torch.device("cpu")
    ).workload
    torch.manual_seed(0)
    network = workload.build().train()
    adamw = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(200):
        adamw.zero_grad()
        workload.loss(network, workload.batch(step, seed=0))[0].backward()
        adamw.step()
    adamw.zero_grad()
    batch = workload.batch(1000, seed=1)
    optimizer = AutoNero(network)
    workload.loss(network, batch)[0].backward()
    network.eval()
    with torch.no_grad():
        before = network(batch[0])
        optimizer.step()
        change = (network(batch[0]) - before).norm() / before.norm()
    assert 0.0005 < change < 0.01
