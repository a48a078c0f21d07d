"""What a comparison asks for, and the runs that follow from it: workloads x optimisers x learning rates x seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from archopt.lab.errors import LabError
from archopt.lab.experiment import (
    Experiment,
    WorkloadChoice,
    make_workload,
    open_experiment,
    workload_class,
)
from archopt.lab.measure import threads
from archopt.lab.optimizers import Choice, check_lr, parse_grid
from archopt.lab.record import COMPARISON, FORMAT, explained, run_path, stored_result, write_json
from archopt.lab.train import Settings, run_config
from archopt.lab.trainers import trainer_of
from archopt.lab.workload import Workload

Rates = str | Sequence[float]
"""`grid`, `published`, `default`, or numbers."""


@dataclass(frozen=True)
class Plan:
    """A comparison as asked for."""

    workloads: Sequence[WorkloadChoice]
    optimizers: Sequence[str]
    lrs: Rates
    seeds: Sequence[int]
    out: Path
    tuning_seeds: Sequence[int] = ()
    """Those of the seeds on which all rates are tried; empty: all of them."""
    data: Path | None = None
    settings: Settings = field(default_factory=Settings)
    jobs: int | None = None
    command: str = ""


@dataclass(frozen=True)
class RunSpec:
    """One run, as a worker receives it."""

    workload: WorkloadChoice
    folder: str
    """Of the workload, below the comparison's."""
    optimizer: str
    grid: str
    """The grid of options that the optimiser is a point of, or \"\"."""
    lr: float | None
    default_lr: float | None
    seed: int
    path: Path
    data: Path | None
    settings: Settings
    steps: int
    config: Mapping[str, Any]
    metric: Mapping[str, Any]

    @property
    def title(self) -> str:
        """How messages call it."""
        rate = "" if self.lr is None else f" lr={self.lr:g}"
        return f"{self.config['workload']} {self.config['optimizer']['label']}{rate} seed {self.seed}"


def rates(asked: Rates, choice: Choice, workload: Workload) -> Sequence[float | None]:
    """The learning rates at which an optimiser is run on a workload.

    A rule without a rate is run once, one with rates in its brackets at those. Else the default is tried in every
    grid, so that it can be compared with the best. Raises LabError where no rate is known.
    """
    if not choice.entry.rate:
        return [None]
    if choice.own_lrs:
        return sorted(set(choice.own_lrs))
    default = choice.default_lr
    if asked == "published" and (lr := choice.published_lr(workload.published)) is not None:
        return [lr]
    if asked in ("published", "default"):
        if default is None:
            name = choice.entry.name
            raise LabError(
                f"{name} has no default learning rate; give one: '{name}(lr=...)' or --lrs 0.01,0.1"
            )
        return [default]
    grid = workload.lrs if asked == "grid" else [check_lr(choice.entry, lr) for lr in asked]
    tried = {float(lr) for lr in grid if isinstance(lr, int | float)}
    return sorted(tried if default is None else tried | {default})


def check_choice(experiment: Experiment, choice: Choice, lrs: Sequence[float | None]) -> str | None:
    """Why an optimiser cannot train a workload at these rates, or None. It is built, on a model of its own."""
    built = experiment.workload.build()
    try:
        for name, model in (built if isinstance(built, dict) else {"model": built}).items():
            for lr in {lrs[0], lrs[-1]}:
                trainer_of(experiment.workload, name, choice, lr).build(model)
    except LabError as error:
        return str(error)
    return None


def plan_runs(plan: Plan) -> list[RunSpec]:
    """All runs of a comparison, seed by seed, and its `comparison.json`.

    Raises LabError for bad input, for an optimiser that can train none of the workloads, and for a folder that
    holds a different run; DataError where data is missing.
    """
    # Every optimiser is built once on every model, and orthogonal weights take all threads that they may.
    with threads(plan.settings.threads):
        return _plan_runs(plan)


def _plan_runs(plan: Plan) -> list[RunSpec]:
    if unknown := [seed for seed in plan.tuning_seeds if seed not in plan.seeds]:
        raise LabError(f"--tuning-seeds has {unknown[0]}, which is none of the seeds {_listed(plan.seeds)}")
    choices = _distinct("optimiser", [choice for text in plan.optimizers for choice in parse_grid(text)])
    device = parse_device(plan.settings.device)
    _check_settings(plan, choices)
    specs: list[RunSpec] = []
    workloads: list[dict[str, Any]] = []
    optimizers = {choice.label: _describe_optimizer(choice) for choice in choices}
    refused: dict[str, list[str]] = {choice.label: [] for choice in choices}
    for workload in plan.workloads:
        experiment = open_experiment(workload, plan.data, torch.device("cpu"))
        if any(known["folder"] == experiment.folder for known in workloads):
            raise LabError(f"workload {workload.name!r} is given twice; name each once")
        workloads.append(_describe(experiment))
        name, settings = experiment.workload.name, experiment.workload.published
        for choice in choices:
            lrs = rates(plan.lrs, choice, experiment.workload)
            if reason := check_choice(experiment, choice, lrs):
                refused[choice.label].append(reason)
            told = optimizers[choice.label]
            told["lrs"][name] = [lr for lr in lrs if lr is not None]
            if (lr := choice.published_lr(settings)) is not None:
                told["published_lr"][name] = lr
            specs += _specs(plan, workload, experiment, choice, lrs, device)
    for reasons in refused.values():
        if len(reasons) == len(plan.workloads):
            raise LabError(reasons[0])
    for spec in specs:
        stored_result(spec.path, spec.config)  # refuses a folder that holds a different run
    _write_comparison(plan, workloads, optimizers)
    return sorted(specs, key=lambda spec: plan.seeds.index(spec.seed))


def _check_settings(plan: Plan, choices: Sequence[Choice]) -> None:
    """Raises LabError, before any data are read, for an optimiser that lacks an option which each workload sets."""
    settings = [make_workload(workload_class(w.name), w.preset, w.options).published for w in plan.workloads]
    for choice in choices:
        reasons = []
        for published in settings:
            try:
                choice.check(published)
            except LabError as error:
                reasons.append(error)
        if len(reasons) == len(settings):
            raise reasons[0]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _distinct(what: str, choices: list[Choice]) -> list[Choice]:
    labels = [choice.label for choice in choices]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise LabError(f"{what} {repeated[0]!r} is given twice; name each once")
    return choices


def _specs(
    plan: Plan,
    workload: WorkloadChoice,
    experiment: Experiment,
    choice: Choice,
    lrs: Sequence[float | None],
    device: torch.device,
) -> Iterator[RunSpec]:
    placed = replace(experiment, device=device)
    for seed in plan.seeds:
        for lr in lrs:
            yield RunSpec(
                workload=workload,
                folder=experiment.folder,
                optimizer=choice.label,
                grid=choice.grid,
                lr=lr,
                default_lr=choice.default_lr,
                seed=seed,
                path=run_path(plan.out, experiment.folder, choice.label, lr, seed),
                data=plan.data,
                settings=plan.settings,
                steps=experiment.workload.steps,
                config=run_config(placed, choice, lr, seed, plan.settings),
                metric=asdict(experiment.workload.metric),
            )


def _describe_optimizer(choice: Choice) -> dict[str, Any]:
    return {
        "label": choice.label,
        "name": choice.entry.name,
        "default_lr": choice.default_lr,
        "rate": choice.entry.rate,
        "published_lr": {},
        "lrs": {},
    }


def _describe(experiment: Experiment) -> dict[str, Any]:
    workload = experiment.workload
    return {
        "name": workload.name,
        "preset": experiment.preset,
        "folder": experiment.folder,
        "summary": workload.summary,
        "metric": asdict(workload.metric),
        "options": experiment.options,
        "changed": experiment.changed,
        "data_note": workload.data_note,
    }


def _write_comparison(
    plan: Plan, workloads: list[dict[str, Any]], optimizers: Mapping[str, dict[str, Any]]
) -> None:
    """Writes `comparison.json`: what this command asks for, whatever else the folder holds."""
    with explained(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "command": plan.command,
        "workloads": workloads,
        "optimizers": list(optimizers.values()),
        "lrs": plan.lrs,
        "seeds": list(plan.seeds),
        "tuning": {"seeds": list(plan.tuning_seeds), "rates": {}} if plan.tuning_seeds else None,
        "average": plan.settings.average,
    }
    write_json(plan.out / COMPARISON, content)


def parse_device(text: str) -> torch.device:
    """The device of this name. Raises LabError where it cannot be used."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise LabError(f"no device {text!r}; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise LabError(f"device {text!r} is not supported; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LabError(
            f"device {text!r}: torch sees {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    return device


def show_metric(metric: Mapping[str, Any], value: float | None) -> str:
    """A metric in words: `test accuracy 97.2 %`."""
    if value is None or not math.isfinite(value):
        return f"{metric['name']} not finite"
    if metric["unit"] == "%":
        return f"{metric['name']} {100 * value:.2f} %"
    return f"{metric['name']} {value:.4g}{' ' + metric['unit'] if metric['unit'] else ''}"
