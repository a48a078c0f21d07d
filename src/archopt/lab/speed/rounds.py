"""The measurement: contenders take turns with one set of weights, round after round.

A turn builds the optimiser on the initial weights, takes steps to warm up, and times steps. In each round all have
their turn, in an order that moves on by one, and only one optimiser's state exists at a time. What the machine does
meanwhile hits all alike: ratios are formed within rounds.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch.optim import Optimizer

from archopt.lab.errors import LabError
from archopt.lab.optimizers import state_bytes
from archopt.lab.speed.bench import Bench
from archopt.lab.speed.contenders import ADD, COPY, LIMITS, Contender, form_of, parameters
from archopt.lab.user_files import describe

ROUNDS = 5
SAMPLES = 20  # of a turn, at most
PATIENCE = 5
QUICKEST = 1e-6  # seconds; no clock tells less
FEWEST = 3  # samples of a row, however long a step takes

Follow = Callable[[str], None]


@dataclass
class Row:
    """What is known of one contender, or of a limit."""

    name: str
    what: str
    contender: Contender | None = None
    rounds: dict[int, list[float]] = field(default_factory=dict)
    """Seconds of a step, by round."""
    timed: float = 0.0
    spent: float = 0.0
    """Seconds in steps, and with building and all else."""
    status: str = "measured"
    """measured; left out, where it does not fit; failed, where it raised."""
    reason: str = ""
    form: str = ""
    entries: int = 0
    """How many weights it moved."""
    state_bytes: int = 0
    transient_bytes: int = 0

    @property
    def samples(self) -> int:
        return sum(map(len, self.rounds.values()))

    def has_enough(self, seconds: float) -> bool:
        """Whether its time is up; on a busy machine what is around the steps takes long, and counts too."""
        return self.samples >= FEWEST and (self.timed >= seconds or self.spent >= PATIENCE * seconds)

    def stop(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def as_json(self) -> dict[str, Any]:
        """Its part of the record, before anything is derived."""
        contender = self.contender
        return {
            "name": self.name,
            "what": self.what,
            "style": contender.style if contender else "",
            "form": self.form,
            "streams": contender.streams if contender else {COPY: "copy", ADD: "add"}[self.name],
            "status": self.status,
            "reason": self.reason,
            "entries": self.entries,
            "state_bytes": self.state_bytes,
            "transient_bytes": self.transient_bytes,
            "rounds": {
                str(index): [float(f"{s:.5g}") for s in found] for index, found in self.rounds.items()
            },
        }


def measure(bench: Bench, contenders: Iterable[Contender], seconds: float, follow: Follow) -> list[Row]:
    """Rows of the limits and the contenders, about `seconds` of timed steps each. `follow` is told who is next."""
    rows = [Row(name, what, entries=bench.entries) for name, what in LIMITS.items()]
    rows += [Row(c.name, c.what, c) for c in contenders]
    with _collecting_between_turns() as collect:
        for index in range(ROUNDS):
            turn = index % len(rows)
            for row in rows[turn:] + rows[:turn]:
                if row.status != "measured" or row.has_enough(seconds):
                    continue
                follow(f"{bench.name}, round {index + 1} of {ROUNDS}: {row.name}")
                begun = perf_counter()
                _take_turn(row, bench, seconds / ROUNDS, index)
                collect()
                row.spent += perf_counter() - begun
    return rows


@contextlib.contextmanager
def _collecting_between_turns() -> Iterator[Callable[[], object]]:
    """Python's collector must not fall into a step, and what outlives a turn need not be looked at again."""

    def collect() -> None:
        gc.collect()
        gc.freeze()

    enabled = gc.isenabled()
    collect()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _take_turn(row: Row, bench: Bench, seconds: float, index: int) -> None:
    try:
        if row.contender is None:
            _limit(row, bench, seconds, index)
        else:
            _contender(row, row.contender, bench, seconds, index)
    except torch.OutOfMemoryError:
        row.stop("left out", "out of memory")
    except LabError as error:
        row.stop("left out", str(error))
    except Exception as error:  # a peer's own code, or a rule that refuses this set
        row.stop("failed", describe(error))
    if row.status != "measured":
        row.rounds.clear()


def _limit(row: Row, bench: Bench, seconds: float, index: int) -> None:
    if reason := bench.fits(2 * bench.entries * bench.dtype.itemsize):
        row.stop("left out", reason)
        return
    a, b = bench.flat(), bench.flat()
    _time(row, bench, (lambda: a.copy_(b)) if row.name == COPY else (lambda: a.add_(b)), seconds, index)


def _contender(row: Row, contender: Contender, bench: Bench, seconds: float, index: int) -> None:
    each = contender.state.bytes(bench.dtype) + contender.transient.bytes(bench.dtype)
    if reason := bench.fits(each * bench.entries):
        row.stop("left out", reason)
        return
    with contender.circumstances():
        if not row.form:
            row.form = form_of(
                contender, lambda **options: _one_step(contender, bench, options), bench.device
            )
        bench.restore()
        optimizer = contender.build(bench.model)
        _time(row, bench, optimizer.step, seconds, index)
        if not row.entries:
            row.entries = sum(param.numel() for param in parameters(optimizer))
            row.state_bytes = state_bytes(optimizer)
            row.transient_bytes = bench.transient_bytes(optimizer.step)


def _one_step(contender: Contender, bench: Bench, options: dict[str, Any]) -> Optimizer:
    bench.restore()
    optimizer = contender.build(bench.model, **options)
    optimizer.step()
    bench.wait()
    return optimizer


def _time(row: Row, bench: Bench, step: Callable[[], object], seconds: float, index: int) -> None:
    """Warms up, and adds the samples of one turn to the row.

    The first step makes state and compiles what there is to compile; the second tells how long one takes. Where it
    took the whole turn, it is the turn's sample.
    """
    begun = perf_counter()
    step()
    guess = max(bench.seconds(step, 1, 1)[0], QUICKEST)
    if guess >= seconds:
        row.rounds[index] = [guess]
    else:
        samples = min(SAMPLES, int(seconds / guess))
        repeats = max(1, int(seconds / guess / samples))
        row.rounds[index] = bench.seconds(step, samples, repeats)
    row.timed += perf_counter() - begun


def training_step(bench: Bench, batch: int, seconds: float) -> list[float]:
    """Seconds of forward and backward passes of a batch, without a step; takes the gradients away.

    Raises torch.OutOfMemoryError.
    """
    bench.restore()
    for param in bench.params:
        param.grad = None
    with bench.device:
        inputs = bench.set.inputs(batch)

    def forward_and_backward() -> None:
        torch.autograd.backward(bench.set.loss(bench.model, inputs, bench.dtype))
        for param in bench.params:
            param.grad = None

    forward_and_backward()
    guess = bench.seconds(forward_and_backward, 1, 1)[0]
    return bench.seconds(forward_and_backward, max(FEWEST, min(SAMPLES, int(seconds / guess))), 1)
