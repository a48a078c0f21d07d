"""TensorBoard and Weights & Biases, on request: a run's lines go there too, as they are written.

The records stay what they are; a tracker only hears of them. A run that goes on drops what was logged after its
checkpoint where the tracker can (TensorBoard), or goes on with the same run there (Weights & Biases).
"""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from archopt.lab.errors import LabError
from archopt.lab.record import identity
from archopt.lab.watcher import Watcher
from archopt.optim.base import nearest

PROJECT = "archopt"


class Tracker(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Notes numbers after `step` steps."""

    def close(self) -> None:
        """Writes out what is left."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the run: `tensorboard --logdir RUNS`."""

    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=step or None)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `archopt`; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        wandb = importlib.import_module("wandb")
        who = json.dumps([str(path.resolve()), identity(config)], sort_keys=True)
        self._run = wandb.init(
            project=PROJECT,
            name=f"{config['workload']} {config['optimizer']['label']} seed {config['seed']}",
            config=dict(config),
            dir=str(path),
            id=hashlib.sha256(who.encode()).hexdigest()[:16],
            resume="allow",
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""The trackers by name, which is also that of the package that each needs."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises LabError for a tracker that is not known or whose package is missing."""
    for name in names:
        if name not in KINDS:
            hint = nearest(name, KINDS)
            raise LabError(f"--log {name!r}: no such tracker{hint} (there are {', '.join(KINDS)})")
        if importlib.util.find_spec(name) is None:
            raise LabError(f"--log {name} needs the package {name}: pip install 'archopt[logging]'")


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl` by path: `train/loss`, `eval/test_accuracy`, `optimizer/theta`."""
    return dict(_numbers("", {key: value for key, value in line.items() if key != "step"}))


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{prefix}/{key}" if prefix else key, inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, float(value)


class Tracked(Watcher):
    """A watcher whose lines trackers hear too. They are opened when the run begins."""

    def __init__(self, inner: Watcher, names: Sequence[str], path: Path, config: Mapping[str, Any]) -> None:
        self._inner, self._names, self._path, self._config = inner, names, path, config
        self._trackers: list[Tracker] = []

    def begin(self, step: int, steps: int) -> None:
        self._trackers = [KINDS[name](self._path, self._config, step) for name in self._names]
        self._inner.begin(step, steps)

    def step(self, step: int, now: float) -> bool:
        return self._inner.step(step, now)

    def line(self, line: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(line["step"], numbers_of(line))
        self._inner.line(line)

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self._trackers:
            tracker.close()
