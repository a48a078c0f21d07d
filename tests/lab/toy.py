"""A workload for the laboratory's tests: noisy classification with dropout, batch norm and a hidden state."""

import os
import random
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archopt.lab.workload import Metric, Workload


@dataclass
class Toy(Workload):
    """Classify points of three clusters."""

    name = "toy"
    summary = "three clusters; learns in seconds"
    metric = Metric("accuracy", "accuracy", higher_is_better=True, unit="%")
    presets = {"paper": {"total": 400}, "small": {}, "smoke": {"total": 5}}
    settings = {"sgd": {"lr": 0.05, "momentum": 0.5}, "adam": {"lr": 0.02}}
    lrs = (0.01, 0.1)

    total: int = 60
    """Steps of a run."""
    every: int = 10
    """Steps between evaluations."""
    width: int = 16
    """Hidden units."""
    pause: float = 0.0
    """Seconds that a step sleeps."""
    fail_at: int = -1
    """Step that raises."""
    die_at: int = -1
    """Step that kills its process, once."""
    grow: float = 1.0
    """What the loss is multiplied by at every step."""

    def build(self) -> nn.Module:
        self.drift = torch.zeros(())  # a state of the workload's own, which a resumed run needs
        return nn.Sequential(
            nn.Linear(8, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(self.width, 3),
        )

    @property
    def steps(self) -> int:
        return self.total

    @property
    def eval_every(self) -> int:
        return self.every

    def schedule(self, step: int) -> float:
        return 1 - step / self.total

    def points(self, count: int) -> tuple[Tensor, Tensor]:
        classes = torch.from_numpy(
            np.random.randint(0, 3, count)
        )  # numpy's and Python's generators are seeded too
        centres = torch.eye(3, 8) * (1 + random.random())
        return centres[classes] + 0.3 * torch.randn(count, 8), classes

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        if step == self.fail_at:
            raise ArithmeticError("asked to fail")
        if step == self.die_at and not os.environ.get("TOY_LIVES"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        return self.points(32)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        points, classes = batch
        logits = model(points + self.drift)
        self.drift = 0.9 * self.drift + 0.01 * points.mean()
        self.factor = getattr(self, "factor", 1.0) * self.grow
        loss = nn.functional.cross_entropy(logits, classes) * self.factor
        return loss, {"accuracy": (logits.argmax(1) == classes).float().mean()}

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        points, classes = self.points(200)
        logits = models["model"](points)
        loss = nn.functional.cross_entropy(logits, classes)
        return {"accuracy": float((logits.argmax(1) == classes).float().mean()), "test_loss": float(loss)}

    def state_dict(self) -> dict[str, Any]:
        return {"drift": self.drift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drift = state["drift"]
