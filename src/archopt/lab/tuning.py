"""Learning rates are tried on some of the seeds; the others run the best of them and the default."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from archopt.lab.plan import Plan, RunSpec
from archopt.lab.record import COMPARISON, read_json, stored_result, write_json

Point = tuple[str, float | None]
"""An optimiser's label and its rate."""

Chosen = dict[str, dict[str, list[float | None]]]
"""The rates that seeds without tuning run, by the workload's folder and the optimiser's label."""


def tuning_runs(plan: Plan, specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The runs that come first: all of those whose seeds tune."""
    return [spec for spec in specs if not plan.tuning_seeds or spec.seed in plan.tuning_seeds]


def remaining_runs(plan: Plan, specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The runs of the other seeds, when those that tune have ended. The comparison's record says at which rates."""
    chosen = _choose(tuning_runs(plan, specs))
    told = read_json(plan.out / COMPARISON)
    told["tuning"]["rates"] = chosen
    write_json(plan.out / COMPARISON, told)
    others = [spec for spec in specs if spec.seed not in plan.tuning_seeds]
    return [spec for spec in others if spec.lr in chosen[spec.folder][spec.optimizer]]


def _choose(tried: Sequence[RunSpec]) -> Chosen:
    """For each workload and optimiser the default rate, where it was tried, and the best: with the last weights
    and, where weights were averaged, with the average. A grid of options is one optimiser, whose best points are
    kept and no others."""
    grids: dict[tuple[str, str], dict[Point, list[RunSpec]]] = {}
    for spec in tried:
        point = (spec.optimizer, spec.lr)
        grids.setdefault((spec.folder, spec.grid or spec.optimizer), {}).setdefault(point, []).append(spec)
    chosen: Chosen = {}
    for (folder, _), grid in grids.items():
        kept = {point for point, specs in grid.items() if _is_default(specs[0])}
        for averaged in (False, True):
            ranks = {point: _rank(specs, averaged) for point, specs in grid.items()}
            best = min(ranks, key=lambda point: ranks[point])
            if ranks[best][0] < 0:  # at least one seed ended well
                kept.add(best)
        for optimizer, lr in grid:
            rates = chosen.setdefault(folder, {}).setdefault(optimizer, [])
            rates += [lr] if (optimizer, lr) in kept else []
    return chosen


def _is_default(spec: RunSpec) -> bool:
    return not spec.grid and (spec.lr is None or spec.lr == spec.default_lr)


def _rank(specs: Sequence[RunSpec], averaged: bool) -> tuple[int, float]:
    """Smaller is better: more seeds that ended well, then the better mean of the final metric."""
    values = list(_finals(specs, averaged))
    if not values:
        return 0, 0.0
    return -len(values), -fmean(values) if specs[0].metric["higher_is_better"] else fmean(values)


def _finals(specs: Sequence[RunSpec], averaged: bool) -> Iterator[float]:
    for spec in specs:
        result = stored_result(spec.path, spec.config)
        if result is None or result["status"] != "finished":
            continue
        final = (result.get("average") or {}).get("final", {}) if averaged else result["final"]
        value = final.get(spec.metric["key"])
        if value is not None and math.isfinite(value):
            yield value
