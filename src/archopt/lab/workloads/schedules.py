"""The learning-rate schedules between which one may choose on workloads that have no published one."""

from typing import Literal

Schedule = Literal["linear", "constant"]
WARMUP = 30
"""Steps that the rate takes to rise, unless a workload says otherwise."""


def multiplier(schedule: Schedule, step: int, steps: int, warmup: int = WARMUP) -> float:
    """The rate's multiplier at `step` (from 0) of `steps`.

    `constant`: 1. `linear`: up in equal parts to 1 at the last of `warmup` steps, then straight down towards the 0
    that the step after the last would have.
    """
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def check_schedule(schedule: str, warmup: int = WARMUP) -> None:
    """Raises ValueError for a name that is no schedule, and for a warm-up below 0."""
    if schedule not in ("linear", "constant"):
        raise ValueError(f"lr_schedule={schedule!r}, expected 'linear' or 'constant'")
    if warmup < 0:
        raise ValueError(f"warmup={warmup}, expected at least 0")
