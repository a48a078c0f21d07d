"""The numbers of a comparison: spreads over seeds, the best rate, the cost of not tuning, the time to a target.

Everything here is a pure function of the loaded records. Two rules hold throughout. The spread over seeds is the
population standard deviation, as in the papers. A run that diverged, failed or is missing is never averaged away:
means are over the seeds that finished, their number is said beside them, and in every ranking a setting with more
seeds that did not finish comes after one with fewer.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from archopt.lab.report.load import Comparison, Metric, Optimizer, Point, ReportError, Run, Workload, finite

TARGET_SHARE = 0.95
"""The target, unless one is given: this share of the way from the initial value to the best final mean."""

Value = Callable[[Point], float | None]
"""Reads one number off an evaluation."""


@dataclass(frozen=True)
class Spread:
    """Mean, population standard deviation and range over `count` seeds."""

    mean: float
    sd: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of the values, or None where there are none."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.pstdev(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Reached:
    """When the runs of a cell first stood at the target: one number a seed that got there."""

    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    runs: int
    """The runs of which it is known: those that ended, and those that got there and go on. Of them, the ones that
    never got there count as later than every number."""

    def median(self, numbers: Sequence[float]) -> float:
        """Median over all runs, infinite where half of them or more never got there."""
        padded = sorted([*numbers, *[math.inf] * (self.runs - len(numbers))])
        middle = len(padded) // 2
        return padded[middle] if len(padded) % 2 else (padded[middle - 1] + padded[middle]) / 2


@dataclass(frozen=True)
class Cell:
    """The runs of one optimiser on one workload at one learning rate, one run a seed."""

    lr: float | None
    runs: tuple[Run, ...]
    metric: Metric

    def count(self, status: str) -> int:
        return sum(run.status == status for run in self.runs)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "finished"]

    @property
    def complete(self) -> bool:
        return len(self.finished) == len(self.runs)

    @cached_property
    def final(self) -> Spread | None:
        """The final metric over the seeds that finished."""
        values = [run.final(self.metric.key) for run in self.finished]
        return spread([value for value in values if value is not None])

    def rank(self) -> tuple[int, float]:
        """Sorts cells from best to worst: more seeds that finished come first, then the better mean.

        So where rates were tried on some of the seeds, those that all seeds ran come before the others.
        """
        if self.final is None:
            return 1, 0.0
        return -len(self.finished), -self.final.mean if self.metric.higher_is_better else self.final.mean

    def reached(self, target: float) -> Reached:
        """The first evaluation at which each run's metric is at the target or better.

        A run that diverged or failed later on does not count as having got there.
        """
        steps, seconds = [], []
        ended = 0
        for run in self.runs:
            ended += run.status in ("finished", "diverged", "failed")
            if run.status in ("diverged", "failed"):
                continue
            for point in run.points:
                value = finite(point.eval.get(self.metric.key))
                if value is not None and not self.metric.better(target, value):
                    steps.append(float(point.step))
                    seconds.append(point.seconds)
                    ended += run.status == "unfinished"
                    break
        return Reached(tuple(steps), tuple(seconds), ended)


@dataclass(frozen=True)
class Row:
    """What one optimiser did on one workload."""

    optimizer: Optimizer
    cells: tuple[Cell, ...]
    """In order of the learning rate; one cell with the rate None for a rule without one."""
    default: Cell | None
    leading: Cell
    """The cell that ranks first: the best one, or, where no run finished, what stands for the optimiser."""
    regret: float | None
    """Best mean of any optimiser at any rate minus own mean at the default, turned so that larger is worse.
    Infinite where a seed did not finish at the default; None where the default was not run."""
    reached_default: Reached | None
    reached_best: Reached | None
    seconds_per_step: float | None
    relative_time: float | None
    """Median time of a step over that of the workload's fastest optimiser."""
    optimizer_share: float | None
    overhead_share: float | None
    state_per_parameter: float | None
    peak_memory: float | None

    @property
    def best(self) -> Cell | None:
        """The cell with the best mean, of those with the most seeds that finished; None where no run finished."""
        return self.leading if self.leading.final is not None else None

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    def count(self, status: str) -> int:
        return sum(cell.count(status) for cell in self.cells)

    @property
    def best_at_edge(self) -> bool:
        """The best rate is the smallest or the largest of the rates tried, so a better one may lie beyond."""
        return len(self.cells) > 1 and self.best in (self.cells[0], self.cells[-1])


@dataclass(frozen=True)
class Summary:
    """What all optimisers did on one workload, best first."""

    workload: Workload
    rows: tuple[Row, ...]
    initial: float | None
    """The metric before training: the median over all runs."""
    best: float | None
    """The best mean of any optimiser at any rate."""
    target: float | None
    target_given: bool


def parse_target(words: str) -> float | dict[str, float]:
    """A target as the command line has it: `0.95` for all workloads, or `digits=0.95,words=1.2`.

    Raises ReportError for anything else.
    """
    try:
        if "=" not in words:
            return float(words)
        pairs = (entry.split("=") for entry in words.split(","))
        return {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        raise ReportError(
            f"target {words!r}; expected a value of the metric, 0.95, or one for each workload, "
            "digits=0.95,words=1.2"
        ) from None


def summarise(
    comparison: Comparison, target: float | Mapping[str, float] | None = None
) -> tuple[Summary, ...]:
    """The summary of each workload. `target` is one value of the metric for all workloads, or one by their names.

    Raises ReportError where a target names a workload that the comparison does not hold.
    """
    targets: Mapping[str, float] = target if isinstance(target, Mapping) else {}
    names = [workload.name for workload in comparison.workloads]
    for name in targets:
        if name not in names:
            raise ReportError(f"a target is given for workload {name!r}; expected one of {', '.join(names)}")
    fixed = None if isinstance(target, Mapping) else target
    return tuple(
        _summarise(workload, comparison.optimizers, targets.get(workload.name, fixed))
        for workload in comparison.workloads
    )


def _summarise(workload: Workload, optimizers: Sequence[Optimizer], given: float | None) -> Summary:
    metric = workload.metric
    cells = {optimizer.label: _cells(workload, optimizer) for optimizer in optimizers}
    every = sorted((cell for group in cells.values() for cell in group), key=Cell.rank)
    best = every[0].final.mean if every and every[0].final else None
    starts = [run.points[0].eval.get(metric.key) for run in workload.runs if run.points]
    known = [value for start in starts if (value := finite(start)) is not None]
    initial = statistics.median(known) if known else None
    target = given
    if target is None and best is not None and initial is not None and metric.better(best, initial):
        target = initial + TARGET_SHARE * (best - initial)
    times = {label: _median(_finished(group), "seconds_per_step") for label, group in cells.items()}
    fastest = min((time for time in times.values() if time), default=None)
    rows = [
        _row(optimizer, cells[optimizer.label], metric, best, target, times[optimizer.label], fastest)
        for optimizer in optimizers
        if cells[optimizer.label]
    ]
    rows.sort(key=lambda row: row.leading.rank())
    return Summary(workload, tuple(rows), initial, best, target, given is not None)


def _cells(workload: Workload, optimizer: Optimizer) -> tuple[Cell, ...]:
    runs = [run for run in workload.runs if run.optimizer == optimizer.label]
    rates = sorted({run.lr for run in runs}, key=lambda lr: -1.0 if lr is None else lr)
    return tuple(Cell(lr, tuple(run for run in runs if run.lr == lr), workload.metric) for lr in rates)


def _row(
    optimizer: Optimizer,
    cells: tuple[Cell, ...],
    metric: Metric,
    best_of_any: float | None,
    target: float | None,
    time: float | None,
    fastest: float | None,
) -> Row:
    default = next((cell for cell in cells if cell.lr == optimizer.default_lr), None)
    leading = min(cells, key=lambda cell: (*cell.rank(), cell is not default))
    runs = _finished(cells)
    return Row(
        optimizer=optimizer,
        cells=cells,
        default=default,
        leading=leading,
        regret=_regret(default, best_of_any, metric),
        reached_default=_reached(default, target),
        reached_best=_reached(leading, target),
        seconds_per_step=time,
        relative_time=time / fastest if time and fastest else None,
        optimizer_share=_median(runs, "optimizer_share"),
        overhead_share=_median(runs, "overhead_share"),
        state_per_parameter=_state_per_parameter(runs),
        peak_memory=_median(runs, "peak_memory_bytes") or None,  # 0 where the system does not tell
    )


def _reached(cell: Cell | None, target: float | None) -> Reached | None:
    when = cell.reached(target) if cell is not None and target is not None else None
    return when if when is not None and when.runs else None


def _finished(cells: Sequence[Cell]) -> list[Run]:
    return [run for cell in cells for run in cell.finished]


def _median(runs: Sequence[Run], key: str) -> float | None:
    values = [value for run in runs if (value := run.number(key)) is not None]
    return statistics.median(values) if values else None


def _state_per_parameter(runs: Sequence[Run]) -> float | None:
    for run in runs:
        state, parameters = run.number("optimizer_state_bytes"), run.number("parameters")
        if state is not None and parameters:
            return state / parameters
    return None


def _regret(default: Cell | None, best_of_any: float | None, metric: Metric) -> float | None:
    if default is None or best_of_any is None or default.count("missing") + default.count("unfinished"):
        return None
    if not default.complete or default.final is None:
        return math.inf
    sign = 1.0 if metric.higher_is_better else -1.0
    return sign * (best_of_any - default.final.mean)


@dataclass(frozen=True)
class CurvePoint:
    """A number over the finished seeds of a cell after `step` steps."""

    step: int
    seconds: float
    mean: float
    low: float
    high: float
    count: int


def curve(runs: Sequence[Run], value: Value) -> list[CurvePoint]:
    """Mean and range over the runs at each step that all of them were evaluated at; seconds are the mean too."""
    tables = [{point.step: point for point in run.points} for run in runs]
    if not tables:
        return []
    points = []
    for step in sorted(set.intersection(*(set(table) for table in tables))):
        here = [table[step] for table in tables]
        values = [number for point in here if (number := value(point)) is not None]
        if len(values) == len(here):
            seconds = statistics.fmean(point.seconds for point in here)
            points.append(
                CurvePoint(step, seconds, statistics.fmean(values), min(values), max(values), len(values))
            )
    return points


@dataclass(frozen=True)
class Profile:
    """One optimiser's performance profile: at `ratios[i]` it has solved `shares[i]` of the workloads."""

    optimizer: str
    ratios: tuple[float, ...]
    shares: tuple[float, ...]


def profiles(
    summaries: Sequence[Summary], reached: Callable[[Row], Reached | None], *, seconds: bool
) -> list[Profile]:
    """Performance profiles (Dolan and More, 2002) of the median time to target over the workloads.

    A workload counts as solved within a ratio r by an optimiser whose median time is at most r times that of the
    fastest optimiser there. One that never reaches the target solves it at no ratio.
    """
    ratios: dict[str, list[float]] = {}
    for summary in summaries:
        times: dict[str, float] = {}
        for row in summary.rows:
            here = reached(row)
            if here is not None:
                time = here.median(here.seconds if seconds else here.steps)
                times[row.optimizer.label] = max(time, 1e-9)
        fastest = min(times.values(), default=math.inf)
        for row in summary.rows:
            time = times.get(row.optimizer.label, math.inf)
            ratio = time / fastest if math.isfinite(fastest) else math.inf
            ratios.setdefault(row.optimizer.label, []).append(ratio)
    return [
        Profile(
            label,
            tuple(steps := sorted({1.0, *(ratio for ratio in values if math.isfinite(ratio))})),
            tuple(sum(ratio <= step for ratio in values) / len(summaries) for step in steps),
        )
        for label, values in ratios.items()
    ]
