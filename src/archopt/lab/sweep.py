"""Many runs: workloads x optimisers x learning rates x seeds, in worker processes, each run one record.

Workers are spawned once and take run after run, so that torch is imported and data is read once in each. A worker
that dies costs its run, which is marked as failed, and a new one takes its place. Runs that have ended are skipped,
so the same command goes on where it stopped.
"""

import math
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch

from archopt.lab.data import DataError
from archopt.lab.errors import Interrupted, LabError, RecordError
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.measure import cores
from archopt.lab.optimizers import Choice, check_lr, parse_optimizer
from archopt.lab.record import (
    COMPARISON,
    FORMAT,
    RunFolder,
    explained,
    run_path,
    stored_result,
    write_json,
)
from archopt.lab.train import Settings, Watcher, run_config, train
from archopt.lab.user_files import describe

Rates = str | Sequence[float]
"""`grid`, `published`, `default`, or numbers."""

REPORT_EVERY = 0.1  # seconds between a worker's words on its progress
GRACE = 30.0  # seconds that workers have to write a checkpoint when asked to stop


@dataclass(frozen=True)
class Plan:
    """A comparison as asked for."""

    workloads: Sequence[WorkloadChoice]
    optimizers: Sequence[str]
    lrs: Rates
    seeds: Sequence[int]
    out: Path
    data: Path | None = None
    settings: Settings = field(default_factory=Settings)
    jobs: int | None = None
    command: str = ""


@dataclass(frozen=True)
class RunSpec:
    """One run, as a worker receives it."""

    workload: WorkloadChoice
    optimizer: str
    lr: float | None
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


class Follower(Protocol):
    """Shows a sweep while it runs."""

    def begin(self, runs: Sequence[RunSpec], skipped: int) -> None:
        """These runs are to be done; so many have ended before."""

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


# -- what there is to run ----------------------------------------------------------------------------------


def rates(asked: Rates, choice: Choice, experiment: Experiment) -> Sequence[float | None]:
    """The learning rates at which an optimiser is run on a workload.

    A rule without a rate is run once, one with its rate in the brackets at that rate. The default is tried in every
    grid, so that it can be compared with the best. Raises LabError where no rate is known.
    """
    if not choice.entry.rate:
        return [None]
    if choice.fixed_lr is not None:
        return [choice.fixed_lr]
    default = choice.default_lr
    if asked == "published" and (lr := choice.published_lr(experiment.workload.settings)) is not None:
        return [lr]
    if asked in ("published", "default"):
        if default is None:
            name = choice.entry.name
            raise LabError(
                f"{name} has no default learning rate; give one: '{name}(lr=...)' or --lrs 0.01,0.1"
            )
        return [default]
    grid = experiment.workload.lrs if asked == "grid" else [check_lr(choice.entry, lr) for lr in asked]
    tried = {float(lr) for lr in grid if isinstance(lr, int | float)}
    return sorted(tried if default is None else tried | {default})


def check_choice(experiment: Experiment, choice: Choice, lrs: Sequence[float | None]) -> str | None:
    """Why an optimiser cannot train a workload at these rates, or None. It is built, on a model of its own."""
    built = experiment.workload.build()
    try:
        for model in built.values() if isinstance(built, dict) else [built]:
            for lr in {lrs[0], lrs[-1]}:
                choice.build(model, lr, experiment.workload.settings)
    except LabError as error:
        return str(error)
    return None


def plan_runs(plan: Plan) -> list[RunSpec]:
    """All runs of a comparison, seed by seed, and its `comparison.json`.

    Raises LabError for bad input, for an optimiser that can train none of the workloads, and for a folder that
    holds a different run; DataError where data is missing.
    """
    choices = _distinct("optimiser", [parse_optimizer(text) for text in plan.optimizers])
    device = parse_device(plan.settings.device)
    specs: list[RunSpec] = []
    workloads: list[dict[str, Any]] = []
    optimizers = {choice.label: _describe_optimizer(choice) for choice in choices}
    refused: dict[str, list[str]] = {choice.label: [] for choice in choices}
    for workload in plan.workloads:
        experiment = open_experiment(workload, plan.data, torch.device("cpu"))
        if any(known["folder"] == experiment.folder for known in workloads):
            raise LabError(f"workload {workload.name!r} is given twice; name each once")
        workloads.append(_describe(experiment))
        name, settings = experiment.workload.name, experiment.workload.settings
        for choice in choices:
            lrs = rates(plan.lrs, choice, experiment)
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
                optimizer=choice.label,
                lr=lr,
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

    def __init__(self, jobs: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.stop = self._context.Event()
        self._threads = max(1, cores() // jobs)
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
    if plan.jobs is not None and plan.jobs < 1:
        raise LabError(f"--jobs {plan.jobs}, expected at least 1")
    specs = plan_runs(plan)
    waiting = deque(spec for spec in specs if stored_result(spec.path, spec.config) is None)
    outcome = Outcome(skipped=len(specs) - len(waiting))
    follower.begin(list(waiting), outcome.skipped)
    if not waiting:
        return outcome
    usual = 1 if parse_device(plan.settings.device).type == "cuda" else cores()
    crew = _Crew(min(plan.jobs or usual, len(waiting)))
    try:
        with _interruptible(crew):
            while waiting or any(member.spec for member in crew.workers):
                for member in crew.workers:
                    if member.spec is None and waiting:
                        _hand_out(member, waiting)
                _listen(crew, follower, outcome)
    finally:
        crew.dismiss()
    return outcome


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


def show_metric(metric: Mapping[str, Any], value: float | None) -> str:
    """A metric in words: `test accuracy 97.2 %`."""
    if value is None or not math.isfinite(value):
        return f"{metric['name']} not finite"
    if metric["unit"] == "%":
        return f"{metric['name']} {100 * value:.2f} %"
    return f"{metric['name']} {value:.4g}{' ' + metric['unit'] if metric['unit'] else ''}"
