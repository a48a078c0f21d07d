"""AutoNero on real text, where its first derivation failed."""

import pytest
import torch

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
