"""What tests of the laboratory share: opening the toy workload, running it, reading records without their times."""

import json
import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.train import Settings, train
from archopt.lab.watcher import Watcher

TOY = Path(__file__).parent / "toy.py"
ONE_THREAD = Settings(threads=1)


def forkserver() -> ForkServerContext:
    """Where tests get processes of their own from that need not import torch first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["archopt.lab.commands"])
    return context


def toy(**options: Any) -> Experiment:
    """The toy workload with its data."""
    return open_experiment(WorkloadChoice(str(TOY), "small", options), None, torch.device("cpu"))


def run(
    path: Path,
    experiment: Experiment | None = None,
    optimizer: str = "adam",
    lr: float | None = 0.02,
    seed: int = 0,
    settings: Settings = ONE_THREAD,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Trains one run and returns its result."""
    return train(experiment or toy(), parse_optimizer(optimizer), lr, seed, settings, path, watcher)


def lines(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines(path)
    ]


def bits(path: Path) -> tuple[Any, ...]:
    """What must not depend on how often a run was interrupted."""
    result = json.loads((path / "result.json").read_text())
    kept = ("weights_sha256", "status", "final", "best", "average")
    return *(result.get(key) for key in kept), timeless(path)


class StopAt(Watcher):
    """Asks a run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.began: list[int] = []

    def begin(self, step: int, steps: int) -> None:
        self.began.append(step)

    def step(self, step: int, now: float) -> bool:
        return step == self.at
