"""Measures a run while it trains: means of its numbers, where its time goes, the memory it needs."""

import math
import os
import sys
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from archopt.lab.errors import LabError
from archopt.lab.share import ALONE, Share

FORWARD_BACKWARD, OPTIMIZER, OTHER = "forward_backward", "optimizer", "other"
PHASES = (FORWARD_BACKWARD, OPTIMIZER, OTHER)


class Clock:
    """Divides the time of steps into phases. Between `start` and the next pause not a moment is left out."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(PHASES, 0.0)
        """Seconds of the whole run by phase."""
        self.durations = array("f")
        """Seconds of each step."""
        self._phase = OTHER
        self._mark = self._step_began = perf_counter()

    def start(self) -> None:
        """Begins to count, after whatever is not to be counted: loading, evaluation, checkpoints."""
        self._phase = OTHER
        self._mark = self._step_began = perf_counter()

    def enter(self, phase: str) -> None:
        """Ends the present phase and begins `phase`."""
        now = perf_counter()
        self.totals[self._phase] += now - self._mark
        self._mark = now
        self._phase = phase

    def end_step(self) -> float:
        """Ends a step and begins the next, with the phase `other`; returns the present moment."""
        self.enter(OTHER)
        self.durations.append(self._mark - self._step_began)
        self._step_began = self._mark
        return self._mark

    def settle(self) -> None:
        """Brings `totals` and `durations` up to date."""

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(self.totals.values())

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {"totals": dict(self.totals), "durations": torch.tensor(self.durations, dtype=torch.float32)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals = dict(state["totals"])
        self.durations = array("f", state["durations"].tolist())


class CudaClock(Clock):
    """The same for a device that works on after the program has moved on: events in its stream, read when asked."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._events: list[tuple[str | None, torch.cuda.Event]] = []

    def _record(self, phase: str | None) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append((phase, event))

    def start(self) -> None:
        self.settle()
        self._events.clear()
        self._record(OTHER)

    def enter(self, phase: str) -> None:
        self._record(phase)

    def end_step(self) -> float:
        self._record(None)  # the end of a step; what follows is `other`
        return perf_counter()

    def settle(self) -> None:
        if len(self._events) < 2:
            return
        torch.cuda.synchronize(self._device)
        step = 0.0
        for (phase, begin), (following, end) in zip(self._events, self._events[1:]):
            seconds = begin.elapsed_time(end) / 1000
            self.totals[phase or OTHER] += seconds
            step += seconds
            if following is None:
                self.durations.append(step)
                step = 0.0
        self._events = self._events[-1:]


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else Clock()


class Means:
    """Weighted means of the numbers of steps. On a device they are added up there, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type != "cpu"
        self._sums: dict[str, Any] = {}
        self._weight = 0.0
        self.count = 0
        """Steps since the last `take`."""

    def add(self, told: Mapping[str, Tensor], weight: float = 1.0) -> bool:
        """Adds the numbers of one step. False where the loss is known not to be finite."""
        sums = self._sums
        self.count += 1
        self._weight += weight
        if self._on_device:
            for key, value in told.items():
                weighted = value.double() * weight
                sums[key] = sums[key] + weighted if key in sums else weighted
            return True
        for key, value in told.items():
            sums[key] = sums.get(key, 0.0) + float(value) * weight
        try:
            return math.isfinite(sums["loss"])
        except KeyError:
            raise LabError(
                f"train_step() gives {', '.join(told) or 'nothing'}, but 'loss' is needed"
            ) from None

    def finite(self) -> bool:
        """Whether the losses since the last `take` are finite; waits for the device."""
        return math.isfinite(self._sums.get("loss", 0.0))

    def take(self, share: Share = ALONE) -> dict[str, float]:
        """The means since the last `take`, over all processes."""
        weight, *sums = share.sum([self._weight, *map(float, self._sums.values())])
        means = {key: value / weight for key, value in zip(self._sums, sums, strict=True)}
        self._sums, self._weight, self.count = {}, 0.0, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        sums = {key: float(value) for key, value in self._sums.items()}
        return {"sums": sums, "weight": self._weight, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.count = state["count"]
        self._weight = state.get("weight", self.count)  # older checkpoints counted all steps alike
        self._sums = dict(state["sums"])
        if self._on_device:
            self._sums = {
                key: torch.tensor(value, dtype=torch.float64, device=device)
                for key, value in self._sums.items()
            }


class PeakMemory:
    """The most memory that was in use since `start`: on CUDA what torch allocated, else what the process held."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.before = 0
        """The peak of the part of the run that a resumed one does not see."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux can forget the peak of what ran earlier in this process; where it refuses, the peak includes it.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self._device)
        else:
            now = _process_peak()
        return max(self.before, now)


def _process_peak() -> int:
    with suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:  # Windows does not tell without a further package
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with so many CPU threads, then with as many as before; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
