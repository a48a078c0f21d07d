"""A run that is killed with SIGKILL, again and again, ends with the bits of an undisturbed one."""

import json
import random
import signal
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from archopt.lab.experiment import WorkloadChoice
from archopt.lab.record import CHECKPOINT, RESULT
from archopt.lab.train import Settings
from lab.running import ONE_THREAD, TOY, bits, forkserver
from real_data import real_data

KILLS = 10


def child(
    settings: Settings, path: Path, choice: WorkloadChoice, data: Path | None, name: str, lr: Any
) -> None:
    """What is killed: a whole run, from loading the data to its result."""
    from archopt.lab.experiment import open_experiment
    from archopt.lab.optimizers import parse_optimizer
    from archopt.lab.train import train

    experiment = open_experiment(choice, data, torch.device("cpu"))
    train(experiment, parse_optimizer(name), lr, 0, settings, path)


def start(*args: Any) -> ForkServerProcess:
    """The run, in a process of its own."""
    process = forkserver().Process(target=child, args=args)
    process.start()
    return process


def kill(process: ForkServerProcess, path: Path, wait: float) -> int:
    """Kills a run `wait` seconds after its next checkpoint; returns the step of its last one."""
    checkpoint = path / CHECKPOINT
    seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    while process.is_alive() and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
    step: int = torch.load(checkpoint, weights_only=True)["step"]
    return step


@pytest.mark.parametrize(
    ("name", "options", "optimizer", "lr", "average"),
    [
        (str(TOY), {"total": 300, "every": 7, "pause": 0.005}, "adam", 0.02, False),
        (str(TOY), {"total": 300, "every": 7, "pause": 0.005}, "autonero", None, True),
        ("digits", {"model": "mlp", "epochs": 10}, "nero", 0.01, False),
        pytest.param("digits", {"model": "cnn", "epochs": 5}, "agd", None, True, marks=pytest.mark.slow),
        pytest.param("mnist-mlp100", {"epochs": 10}, "nero", 0.001, False, marks=pytest.mark.data),
    ],
)
def test_ten_kills_at_random_moments_do_not_change_a_bit(
    tmp_path: Path, name, options, optimizer, lr, average
):
    data = real_data("mnist").path if name.startswith("mnist") else None
    args = WorkloadChoice(name, "smoke", options), data, optimizer, lr
    settings = replace(ONE_THREAD, average=average)
    start(settings, tmp_path / "whole", *args).join()
    span = json.loads((tmp_path / "whole" / RESULT).read_text())["seconds"] / KILLS
    draw = random.Random(0)
    killed = tmp_path / "killed"
    steps = []
    for _ in range(KILLS):
        process = start(replace(settings, checkpoint_steps=2), killed, *args)
        steps.append(kill(process, killed, draw.uniform(0, span)))
    assert steps == sorted(steps)
    assert len(set(steps)) == KILLS  # every attempt went on from where the last one came to
    start(settings, killed, *args).join()
    assert bits(killed) == bits(tmp_path / "whole")
    assert {p.name for p in killed.iterdir()} == {"config.json", "metrics.jsonl", "result.json"}
