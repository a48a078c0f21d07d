"""Many runs in worker processes, each run one record.

Workers are spawned once and take run after run, so that torch is imported and data is read once in each. A worker
that dies costs its run, which is marked as failed, and a new one takes its place. Runs that have ended are skipped,
so the same command goes on where it stopped.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, Protocol

import torch

from archopt.lab.data import DataError
from archopt.lab.errors import Interrupted, LabError, RecordError
from archopt.lab.experiment import Experiment, open_experiment
from archopt.lab.measure import cores
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.plan import Plan, RunSpec, parse_device, plan_runs, show_metric
from archopt.lab.record import RunFolder, stored_result
from archopt.lab.train import train
from archopt.lab.tuning import remaining_runs, tuning_runs
from archopt.lab.user_files import describe
from archopt.lab.watcher import Watcher

REPORT_EVERY = 0.1  # seconds between a worker's words on its progress
GRACE = 30.0  # seconds that workers have to write a checkpoint when asked to stop


class Follower(Protocol):
    """Shows a sweep while it runs."""

    def begin(self, runs: Sequence[RunSpec], skipped: int) -> None:
        """These runs are to be done, now and, where some seeds tune, once more; so many have ended before."""

    def progress(self, worker: int, spec: RunSpec, step: int, metric: float | None) -> None:
        """Where a worker is in its run."""

    def ended(self, worker: int, spec: RunSpec, status: str, message: str) -> None:
        """A run has ended: finished, diverged or failed, with the metric or the error in words."""


@dataclass
class Outcome:
    """How the runs of a sweep ended."""

    finished: int = 0
    diverged: int = 0
    failed: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)


# -- a worker ----------------------------------------------------------------------------------------------


class _Reporter(Watcher):
    """Tells the sweep how a run goes, not too often, and hears from it when to stop."""

    def __init__(self, connection: Connection, stop: Any) -> None:
        self._connection, self._stop = connection, stop
        self._next = 0.0
        self._key: str = ""
        self._metric: float | None = None
        self.busy = False
        self.told_to_stop = False

    def follow(self, spec: RunSpec) -> None:
        self._next, self._key, self._metric = 0.0, spec.metric["key"], None

    def terminate(self, number: int, frame: Any) -> None:
        """What a worker does on SIGTERM: a busy one writes a checkpoint first."""
        self.told_to_stop = True
        if not self.busy:
            raise SystemExit(0)

    def _tell(self, step: int) -> bool:
        try:
            self._connection.send(("step", step, self._metric))
        except OSError:  # the sweep is dead; what it began is kept for the next one
            return True
        return self.told_to_stop or bool(self._stop.is_set())

    def begin(self, step: int, steps: int) -> None:
        self._tell(step)

    def step(self, step: int, now: float) -> bool:
        if now < self._next and not self.told_to_stop:
            return False
        self._next = now + REPORT_EVERY
        return self._tell(step)

    def line(self, line: Mapping[str, Any]) -> None:
        self._metric = line["eval"].get(self._key)


def worker(connection: Connection, stop: Any, threads: int) -> None:
    """Takes runs from the connection and does them until it is told None, or until the sweep is gone."""
    reporter = _Reporter(connection, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep hears of it and says so through `stop`
    signal.signal(signal.SIGTERM, reporter.terminate)
    torch.set_num_threads(threads)
    experiments: dict[str, Experiment] = {}
    with suppress(EOFError, OSError):
        while (spec := connection.recv()) is not None:
            reporter.busy = True
            connection.send(_attempt(spec, reporter, experiments))
            reporter.busy = False


def _attempt(spec: RunSpec, reporter: _Reporter, experiments: dict[str, Experiment]) -> tuple[str, Any, str]:
    """Does a run and says how it ended: the status, the metric, the error."""
    try:
        return _one(spec, reporter, experiments)
    except Interrupted:
        return "refused", None, "the worker process was told to stop"
    except RecordError as error:
        return "stuck", None, str(error)
    except Exception as error:  # bad input and data errors among them: the sweep records it
        message = str(error) if isinstance(error, LabError | DataError) else describe(error)
        return "refused", None, message


def _one(spec: RunSpec, reporter: _Reporter, experiments: dict[str, Experiment]) -> tuple[str, Any, str]:
    key = repr(spec.workload)
    if key not in experiments:
        experiments.clear()  # runs come workload by workload: one set of data in memory is enough
        experiments[key] = open_experiment(spec.workload, spec.data, parse_device(spec.settings.device))
    reporter.follow(spec)
    choice = parse_optimizer(spec.optimizer)
    result = train(experiments[key], choice, spec.lr, spec.seed, spec.settings, spec.path, reporter)
    return result["status"], result["final"].get(spec.metric["key"]), result["error"] or ""


# -- the sweep ---------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    spec: RunSpec | None = None


class _Crew:
    """Worker processes, and the runs that they are busy with."""

    def __init__(self, jobs: int, threads: int | None) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.stop = self._context.Event()
        self._threads = threads or max(1, cores() // jobs)
        self.workers = [self._hire(number) for number in range(jobs)]

    def _hire(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker,
            args=(theirs, self.stop, self._threads),
            name=f"archopt-worker-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(number, process, ours)

    def replace(self, dead: _Worker) -> None:
        """Hires a new worker in the place of a dead one."""
        dead.connection.close()
        self.workers[self.workers.index(dead)] = self._hire(dead.number)

    def dismiss(self) -> None:
        """Ends all workers: idle ones at once, busy ones when they have written a checkpoint."""
        self.stop.set()
        for member in self.workers:
            try:
                member.connection.send(None)
            except OSError:
                continue  # dead already
        deadline = monotonic() + GRACE
        for member in self.workers:
            while member.process.is_alive() and monotonic() < deadline:
                # A worker may be waiting for someone to listen to it.
                while member.connection.poll(0.05):
                    try:
                        member.connection.recv()
                    except (EOFError, OSError):
                        member.process.join(max(0.0, deadline - monotonic()))
                        break
            if member.process.is_alive():
                member.process.kill()
            member.process.join()
            member.connection.close()


def sweep(plan: Plan, follower: Follower) -> Outcome:
    """Does all runs of a comparison that have not ended yet.

    Raises LabError and DataError as `plan_runs` does, RecordError where records cannot be written (finished runs
    are kept), and KeyboardInterrupt after the workers have written their checkpoints.
    """
    check_jobs(plan.jobs)
    outcome = Outcome()
    run_planned(plan, plan_runs(plan), follower, outcome)
    return outcome


def check_jobs(jobs: int | None) -> None:
    """Raises LabError for a number of workers that is none."""
    if jobs is not None and jobs < 1:
        raise LabError(f"--jobs {jobs}, expected at least 1")


def run_planned(
    plan: Plan,
    specs: Sequence[RunSpec],
    follower: Follower,
    outcome: Outcome,
    seeds: Sequence[int] | None = None,
) -> None:
    """Does those of the runs that `plan_runs` gave that have not ended yet, and adds how they ended to `outcome`.

    Only those of `seeds` where these are given; where some seeds tune, they must have run when others are asked
    for. Raises RecordError and KeyboardInterrupt as `sweep`.
    """
    wanted = frozenset(plan.seeds if seeds is None else seeds)
    _do(plan, [spec for spec in tuning_runs(plan, specs) if spec.seed in wanted], follower, outcome)
    if plan.tuning_seeds:
        _do(plan, [spec for spec in remaining_runs(plan, specs) if spec.seed in wanted], follower, outcome)


def _do(plan: Plan, specs: Sequence[RunSpec], follower: Follower, outcome: Outcome) -> None:
    """Does those runs that have not ended yet."""
    waiting = deque(spec for spec in specs if stored_result(spec.path, spec.config) is None)
    outcome.skipped += len(specs) - len(waiting)
    follower.begin(list(waiting), len(specs) - len(waiting))
    if not waiting:
        return
    usual = 1 if parse_device(plan.settings.device).type == "cuda" else cores()
    crew = _Crew(min(plan.jobs or usual, len(waiting)), plan.settings.threads)
    try:
        with _interruptible(crew):
            while waiting or any(member.spec for member in crew.workers):
                for member in crew.workers:
                    if member.spec is None and waiting:
                        _hand_out(member, waiting)
                _listen(crew, follower, outcome)
    finally:
        crew.dismiss()


@contextmanager
def _interruptible(crew: _Crew) -> Iterator[None]:
    """SIGTERM, which batch systems send before they kill, stops a sweep as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hand_out(member: _Worker, waiting: deque[RunSpec]) -> None:
    member.spec = waiting.popleft()
    try:
        member.connection.send(member.spec)
    except OSError:
        return  # it is dead; listening to it finds that out


def _listen(crew: _Crew, follower: Follower, outcome: Outcome) -> None:
    """Waits for words from workers and deals with them."""
    by_connection: dict[Any, _Worker] = {member.connection: member for member in crew.workers if member.spec}
    for connection in wait(list(by_connection)):
        member = by_connection[connection]
        spec = member.spec
        assert spec is not None
        try:
            kind, *content = member.connection.recv()
        except (EOFError, ConnectionError):
            member.process.join()
            message = _death(member.process.exitcode)
            crew.replace(member)
            _record_failure(spec, message)
            _count(outcome, follower, member, "failed", None, message)
            continue
        if kind == "step":
            follower.progress(member.number, spec, content[0], content[1])
        elif kind == "stuck":
            raise RecordError(content[1])
        elif kind == "refused":
            _record_failure(spec, content[1])
            _count(outcome, follower, member, "failed", None, content[1])
        else:
            _count(outcome, follower, member, kind, content[0], content[1])


def _count(
    outcome: Outcome, follower: Follower, member: _Worker, status: str, value: float | None, error: str
) -> None:
    spec, member.spec = member.spec, None
    assert spec is not None
    if status == "failed":
        outcome.failed += 1
        outcome.errors.append(f"{spec.title}: {error}")
    elif status == "diverged":
        outcome.diverged += 1
    else:
        outcome.finished += 1
    follower.ended(member.number, spec, status, error or show_metric(spec.metric, value))


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        hint = "; the system does that when memory runs out" if exit_code == -signal.SIGKILL else ""
        return f"the worker process died ({signal.strsignal(-exit_code) or f'signal {-exit_code}'}{hint})"
    return f"the worker process died (exit status {exit_code})"


def _record_failure(spec: RunSpec, message: str) -> None:
    """Marks a run as failed that could not do so itself. Its checkpoint stays: the same command tries again."""
    with RunFolder(spec.path, spec.config) as folder:
        if folder.result is None:
            nothing = ("seconds", "seconds_per_step", "optimizer_share", "overhead_share", "best")
            folder.finish(
                {"status": "failed", "error": message, "step": None, "metric": spec.metric, "final": {}}
                | dict.fromkeys(nothing)
            )
