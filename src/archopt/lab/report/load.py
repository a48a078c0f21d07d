"""The records of a comparison, read from their files into plain tables.

Files are the only door between the runner and the report: `comparison.json` says what was asked for, each run's
`config.json`, `metrics.jsonl` and `result.json` say what happened. A run that was asked for and is not there is
kept as a run with the status "missing", so that nothing drops out of a table or a picture unseen.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from archopt.lab.errors import LabError

Status = Literal["finished", "diverged", "failed", "unfinished", "missing"]
"""The first three are the runner's own words; "unfinished" has begun and holds no result yet."""

FORMAT = 1
"""The format of the records that this code reads."""

AVERAGE = " (average)"
"""Where weights were averaged (`--average`), each optimiser stands twice: plain, and averaged with this label."""


SPREAD = ("mean", "least", "greatest")
"""What a record tells of numbers of single steps."""


class ReportError(LabError):
    """A folder or a record that cannot be reported on; the message is one line and names the file."""


@dataclass(frozen=True)
class Metric:
    """What a workload is judged by. A unit of "%" says that the values are fractions, shown as percentages."""

    key: str
    name: str
    higher_is_better: bool
    unit: str = ""

    @property
    def percent(self) -> bool:
        return self.unit == "%"

    @property
    def in_unit(self) -> str:
        """The unit as titles have it, such as ` in %`; empty where there is none."""
        return f" in {self.unit}" if self.unit else ""

    def better(self, a: float, b: float) -> bool:
        return a > b if self.higher_is_better else a < b


@dataclass(frozen=True)
class Point:
    """One line of `metrics.jsonl`: the evaluation after `step` steps. Non-finite numbers are kept as they are."""

    step: int
    seconds: float
    train: Mapping[str, float]
    eval: Mapping[str, float]
    optimizer: Mapping[str, float]
    average: Mapping[str, float] = field(default_factory=dict)
    """The evaluation of the averaged weights, where they were averaged."""
    per_step: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of numbers of single steps their mean, least and greatest since the evaluation before."""


@dataclass(frozen=True)
class Optimizer:
    """An optimiser as it was compared. `rate` says whether it has a learning rate to set at all."""

    label: str
    name: str
    default_lr: float | None
    rate: bool
    published_lr: Mapping[str, float] = field(default_factory=dict)
    lrs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The learning rates that were asked for, by workload, where the comparison says so for each optimiser."""
    averaged: bool = False
    """Whether this is the average of what the optimiser of the same name trained."""


@dataclass(frozen=True)
class Run:
    """One training run: its identity, how it ended, and what it wrote on the way."""

    optimizer: str
    lr: float | None
    seed: int
    status: Status
    folder: str = ""
    """Relative to the comparison's folder, with forward slashes; empty where nothing was written."""
    points: tuple[Point, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False
    """Whether this is a run as its averaged weights have it. Then it stands beside the run itself."""

    @property
    def error(self) -> str:
        return str(self.result.get("error") or "")

    def number(self, key: str) -> float | None:
        """A finite number of `result.json`, or None."""
        return finite(self.result.get(key))

    def final(self, key: str) -> float | None:
        """A finite metric at the end of training, or None."""
        values = self.result.get("final")
        return finite(values.get(key)) if isinstance(values, dict) else None


@dataclass(frozen=True)
class Workload:
    """One experiment of a comparison with all of its runs, the missing ones among them."""

    name: str
    preset: str
    folder: str
    summary: str
    metric: Metric
    options: Mapping[str, Any]
    changed: Mapping[str, Any]
    """The options that differ from the preset's."""
    runs: tuple[Run, ...]
    extra: tuple[Run, ...]
    """Runs found in the folder that the comparison does not ask for: listed, and counted nowhere."""
    data_note: str = ""
    """Where the data were less than the published set: what there was."""

    @property
    def trained(self) -> list[Run]:
        """The runs, each once: without those that show a run's average."""
        return [run for run in self.runs if not run.averaged]

    @property
    def title(self) -> str:
        told = [self.preset] if self.preset else []
        told += [f"{name}={value!r}" for name, value in self.changed.items()]
        told += [self.data_note] if self.data_note else []
        return f"{self.name} ({', '.join(told)})" if told else self.name

    @property
    def slug(self) -> str:
        """What files about it are called: the folder's name, without what file names should not have."""
        return re.sub(r"[^\w.+=-]+", "-", self.folder).lstrip(".")


@dataclass(frozen=True)
class Comparison:
    """All that a folder of records holds."""

    folder: Path
    command: str
    workloads: tuple[Workload, ...]
    optimizers: tuple[Optimizer, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    """The seeds on which all rates were tried, where the others ran only the best of these and the default."""
    lrs: Any
    """What was asked for: "grid", "published", "default" or a list; None where nobody did."""
    written: float = 0.0
    """When the newest of its records was written, in seconds since 1970."""


def finite(value: Any) -> float | None:
    """The value as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def load(folder: Path) -> Comparison:
    """Reads the records of a comparison, or of runs trained one by one, which have no `comparison.json` over them.

    Raises ReportError, which names the file, where there are no runs or a record is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; expected the --out of an archopt compare or train")
    path = folder / "comparison.json"
    comparison = _asked_for(folder, path) if path.is_file() else _found(folder)
    written = [run.folder for w in comparison.workloads for run in (*w.runs, *w.extra) if run.folder]
    if not written:
        raise ReportError(
            f"{folder}: no runs in it; expected the --out of an archopt compare or train that has begun"
        )
    files = [file for run in written for file in (folder / run).glob("*.json*")]
    return replace(comparison, written=max(file.stat().st_mtime for file in files))


def _asked_for(folder: Path, path: Path) -> Comparison:
    """What `comparison.json` asks for, and what there is of it."""
    record = read_record(path)
    _check_format(record, path)
    optimizers = tuple(
        optimizer
        for entry in _need(record, "optimizers", list, path)
        for optimizer in _optimizers(entry, bool(record.get("average")), path)
    )
    seeds = tuple(_need(record, "seeds", list, path))
    lrs = record.get("lrs")
    tuning = record.get("tuning")
    return Comparison(
        folder=folder,
        command=str(record.get("command", "")),
        workloads=tuple(
            _workload(folder, entry, optimizers, seeds, lrs, tuning, path)
            for entry in _need(record, "workloads", list, path)
        ),
        optimizers=optimizers,
        seeds=seeds,
        tuning_seeds=tuple(tuning["seeds"]) if tuning else (),
        lrs=lrs,
    )


def _found(folder: Path) -> Comparison:
    """Runs that nobody asked for together: what there is, and of the optimisers no more than their runs say."""
    workloads = []
    optimizers: dict[str, Optimizer] = {}
    for place in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        runs = tuple(_read_runs(folder, folder / place).values())
        judged = next((run for run in runs if "metric" in run.result), None)
        if judged is None:
            continue  # no runs, or none that has told yet what it is judged by
        config, path = judged.config, folder / judged.folder / "config.json"
        workloads.append(
            Workload(
                name=_need(config, "workload", str, path),
                preset=str(config.get("preset", "")),
                folder=place,
                summary="",
                metric=_metric(judged.result["metric"], path.with_name("result.json")),
                options=config.get("options") or {},
                changed={},
                runs=runs,
                extra=(),
                data_note=str(config.get("data_note") or ""),
            )
        )
        for run in runs:
            name = str(run.config["optimizer"].get("name", run.optimizer))
            rate = run.lr is not None
            optimizers[run.optimizer] = Optimizer(run.optimizer, name, None, rate, averaged=run.averaged)
    seeds = sorted({run.seed for workload in workloads for run in workload.runs})
    told = [replace(workload, changed=_differing(workload, workloads)) for workload in workloads]
    return Comparison(folder, "", tuple(told), tuple(optimizers.values()), tuple(seeds), (), None)


def _differing(workload: Workload, workloads: Iterable[Workload]) -> dict[str, Any]:
    """The options in which workloads of the same name and preset differ."""
    alike = [other.options for other in workloads if other.title == workload.title]
    unset = object()
    return {
        name: value
        for name, value in workload.options.items()
        if any(options.get(name, unset) != value for options in alike)
    }


def _optimizers(entry: Any, average: bool, path: Path) -> list[Optimizer]:
    """An optimiser of the comparison and, where weights were averaged, its average."""
    label = _need(entry, "label", str, path)
    trained = Optimizer(
        label=label,
        name=str(entry.get("name", label)),
        default_lr=finite(entry.get("default_lr")),
        rate=bool(entry.get("rate", True)),
        published_lr=entry.get("published_lr") or {},
        lrs=entry.get("lrs") or {},
    )
    return [trained, replace(trained, label=label + AVERAGE, averaged=True)] if average else [trained]


def _workload(
    folder: Path,
    entry: Any,
    optimizers: Sequence[Optimizer],
    seeds: Sequence[int],
    lrs: Any,
    tuning: Mapping[str, Any] | None,
    path: Path,
) -> Workload:
    name, place = _need(entry, "name", str, path), _need(entry, "folder", str, path)
    found = _read_runs(folder, folder / place)
    asked: list[Run] = []
    for optimizer in optimizers:
        for lr in _rates(optimizer, name, lrs, found):
            for seed in _seeds(seeds, tuning, place, optimizer, lr, found):
                absent = Run(optimizer.label, lr, seed, "missing", averaged=optimizer.averaged)
                asked.append(found.pop((optimizer.label, lr, seed), absent))
    return Workload(
        name=name,
        preset=str(entry.get("preset", "")),
        folder=place,
        summary=str(entry.get("summary", "")),
        metric=_metric(_need(entry, "metric", dict, path), path),
        options=entry.get("options") or {},
        changed=entry.get("changed") or {},
        runs=tuple(asked),
        extra=tuple(found.values()),
        data_note=str(entry.get("data_note") or ""),
    )


Key = tuple[str, float | None, int]


def _seeds(
    seeds: Sequence[int],
    tuning: Mapping[str, Any] | None,
    place: str,
    optimizer: Optimizer,
    lr: float | None,
    found: Iterable[Key],
) -> Sequence[int]:
    """The seeds of which runs are expected at a rate: those that tune, and all of them if it was chosen.

    A record may not say yet what was chosen, while a comparison goes on: then the runs of other seeds tell.
    """
    label = optimizer.label.removesuffix(AVERAGE) if optimizer.averaged else optimizer.label
    if tuning is None or lr in tuning["rates"].get(place, {}).get(label, ()):
        return seeds
    if any((optimizer.label, lr, seed) in found for seed in seeds if seed not in tuning["seeds"]):
        return seeds
    return [seed for seed in seeds if seed in tuning["seeds"]]


def _rates(optimizer: Optimizer, workload: str, lrs: Any, found: Iterable[Key]) -> list[float | None]:
    """The learning rates at which runs are expected. A comparison that does not tell is asked by its runs."""
    if not optimizer.rate:
        return [None]
    asked = optimizer.lrs.get(workload)
    if asked is not None:
        return [float(lr) for lr in sorted(asked)]
    asked = [lr for lr in lrs if finite(lr) is not None] if isinstance(lrs, list) else []
    there = {lr for label, lr, _ in found if label == optimizer.label}
    return sorted({*map(float, asked), *there}, key=lambda lr: lr or 0.0)


def _read_runs(root: Path, folder: Path) -> dict[Key, Run]:
    """Every run of a workload's folder by optimiser, learning rate and seed."""
    runs: dict[Key, Run] = {}
    for path in sorted(folder.glob("*/lr=*/seed=*/config.json")):
        run = _read_run(root, path.parent)
        key = (run.optimizer, run.lr, run.seed)
        if key in runs:
            raise ReportError(
                f"{path}: holds the same run as {runs[key].folder} (optimiser {run.optimizer}, lr {run.lr}, "
                f"seed {run.seed}); expected one folder a run, remove one of the two"
            )
        runs[key] = run
        if run.config.get("average"):
            average = _average(run, path.with_name("result.json"))
            runs[average.optimizer, run.lr, run.seed] = average
    return runs


def _read_run(root: Path, folder: Path) -> Run:
    path = folder / "config.json"
    config = read_record(path)
    _check_format(config, path)
    optimizer = _need(config, "optimizer", dict, path)
    label, seed = _need(optimizer, "label", str, path), _need(config, "seed", int, path)
    lr = finite(optimizer.get("lr"))
    result: dict[str, Any] = {}
    status: Status = "unfinished"
    path = folder / "result.json"
    if path.is_file():
        result = read_record(path)
        status = _status(result, path)
    place = folder.relative_to(root).as_posix()
    return Run(label, lr, seed, status, place, _read_points(folder / "metrics.jsonl"), config, result)


def _status(result: Mapping[str, Any], path: Path) -> Status:
    """How a run ended. One that finished without a finite metric counts as what it is: diverged."""
    status: Status = _need(result, "status", str, path)
    if status not in ("finished", "diverged", "failed"):
        raise ReportError(f'{path}: status "{status}"; expected "finished", "diverged" or "failed"')
    if status == "finished":
        key = _need(_need(result, "metric", dict, path), "key", str, path)
        if finite(_need(result, "final", dict, path).get(key)) is None:
            return "diverged"
    return status


def _average(run: Run, path: Path) -> Run:
    """A run as its averaged weights have it. Losses of training and automatic steps belong to the run itself."""
    points = tuple(replace(p, eval=p.average, train={}, optimizer={}, per_step={}) for p in run.points)
    own = run.result.get("average") or {}
    state = [finite(run.result.get("optimizer_state_bytes")), finite(own.get("state_bytes"))]
    result = {
        **run.result,
        "final": own.get("final") or {},
        "best": own.get("best"),
        "optimizer_state_bytes": None if None in state else sum(filter(None, state)),
    }
    status = _status(result, path) if run.status in ("finished", "diverged") else run.status
    return replace(
        run,
        optimizer=run.optimizer + AVERAGE,
        averaged=True,
        points=points,
        result=result,
        status=status,
    )


def _read_points(path: Path) -> tuple[Point, ...]:
    """The evaluations of a run. The last line may be torn (the run is being written, or was killed): left out."""
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")
    points = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            points.append(
                Point(
                    step=int(entry["step"]),
                    seconds=float(entry.get("seconds", math.nan)),
                    train=_numbers(entry.get("train")),
                    eval=_numbers(entry.get("eval")),
                    optimizer=_numbers(entry.get("optimizer")),
                    average=_numbers(entry.get("average")),
                    per_step={
                        name: _numbers({key: spread[key] for key in SPREAD})
                        for name, spread in (entry.get("per_step") or {}).items()
                    },
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise ReportError(
                f"{path}: line {number} is not an evaluation ({error}); remove the run's folder and train it again"
            ) from error
    return tuple(points)


def _numbers(values: Any) -> dict[str, float]:
    """The numbers of a record's object; null stands for a number that JSON cannot write, so it reads as NaN."""
    if values is None:
        return {}
    return {key: math.nan if value is None else float(value) for key, value in values.items()}


def _metric(record: dict[str, Any], path: Path) -> Metric:
    key = _need(record, "key", str, path)
    return Metric(
        key=key,
        name=str(record.get("name", key)),
        higher_is_better=_need(record, "higher_is_better", bool, path),
        unit=str(record.get("unit") or ""),
    )


def read_record(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ReportError, which names it, for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReportError(
            f"{path}: cannot be read ({error}); restore it, or remove its folder and run the command again"
        ) from error
    if not isinstance(record, dict):
        raise ReportError(f"{path}: holds {type(record).__name__}; expected a JSON object")
    return record


def _check_format(record: dict[str, Any], path: Path) -> None:
    if record.get("format") != FORMAT:
        raise ReportError(
            f"{path}: format {record.get('format')!r}; this version of archopt reads format {FORMAT}"
        )


def _need(record: Any, key: str, kind: type, path: Path) -> Any:
    """The value of a key that a record must have. Raises ReportError, naming the file and the key."""
    if not isinstance(record, dict):
        raise ReportError(f"{path}: holds {record!r} where an object with the key {key!r} was expected")
    if not isinstance(record.get(key), kind):
        raise ReportError(f"{path}: {key!r} is {record.get(key)!r}; expected {kind.__name__}")
    return record[key]
