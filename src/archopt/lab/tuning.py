"""Learning rates are tried on some of the seeds; the others run the best of them and the default."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from archopt.lab.plan import Plan, RunSpec
from archopt.lab.record import COMPARISON, read_json, stored_result, write_json

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
    and, where weights were averaged, with the average."""
    grids: dict[tuple[str, str], dict[float | None, list[RunSpec]]] = {}
    for spec in tried:
        grids.setdefault((spec.folder, spec.optimizer), {}).setdefault(spec.lr, []).append(spec)
    chosen: Chosen = {}
    for (folder, optimizer), grid in grids.items():
        kept: set[float | None] = {
            lr for lr, specs in grid.items() if lr is None or lr == specs[0].default_lr
        }
        for averaged in (False, True):
            ranks = {lr: _rank(specs, averaged) for lr, specs in grid.items()}
            best = min(ranks, key=lambda lr: ranks[lr])
            if ranks[best][0] < 0:  # at least one seed ended well
                kept.add(best)
        chosen.setdefault(folder, {})[optimizer] = [lr for lr in grid if lr in kept]
    return chosen


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
