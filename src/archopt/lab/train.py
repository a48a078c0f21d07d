"""One run, one record: builds a workload's model and an optimiser, trains, measures, and keeps it all resumable."""

import copy
import hashlib
import math
import platform
import statistics
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from archopt._version import __version__
from archopt.lab import measure, seeds
from archopt.lab.averaging import Averages
from archopt.lab.errors import Interrupted, LabError, RankError
from archopt.lab.experiment import Experiment
from archopt.lab.optimizers import Choice, has_modes, numbers, state_bytes
from archopt.lab.record import FORMAT, RunFolder, stored_result
from archopt.lab.share import ALONE, Share
from archopt.lab.steps import StepNumbers
from archopt.lab.trackers import Tracked
from archopt.lab.trainers import packages, trainer_of, trainers_record
from archopt.lab.user_files import describe
from archopt.lab.watcher import Watcher
from archopt.lab.workload import Metric

CHECK_EVERY = 50  # steps between looks at a loss that lives on a device, since a look waits for the device
CHECKPOINT_SHARE = 0.05  # of the time, at most, goes into checkpoints


@dataclass(frozen=True)
class Settings:
    """How to run, beside what to run."""

    device: str = "cpu"
    amp: bool = False
    """bfloat16 autocast in forward passes."""
    compile: bool = False
    clip_norm: float | None = None
    """Instead of the workload's own."""
    average: bool = False
    """Also average the weights over the steps and evaluate the average."""
    threads: int | None = None
    """None: what the process has; a resumed run keeps the number that it began with, and so its bits."""
    checkpoint_seconds: float = 20.0
    checkpoint_steps: int | None = None
    """Also after so many steps."""
    log: tuple[str, ...] = ()
    """Trackers that hear of the run: see `archopt.lab.trackers`."""


def clip_norm(experiment: Experiment, choice: Choice, settings: Settings) -> float | None:
    """The norm that gradients are clipped to in this run: as asked for, else as published for the optimiser."""
    if settings.clip_norm is not None:
        return settings.clip_norm
    workload = experiment.workload
    published = workload.published.get(choice.entry.name, {}).get("clip_norm", workload.clip_norm)
    return None if published is None else float(published)


def run_config(
    experiment: Experiment,
    choice: Choice,
    lr: float | None,
    seed: int,
    settings: Settings,
    share: Share = ALONE,
) -> dict[str, Any]:
    """The content of `config.json`: everything but "environment" is what makes the run this run."""
    workload = experiment.workload
    config: dict[str, Any] = {
        "format": FORMAT,
        "workload": workload.name,
        "preset": experiment.preset,
        "options": experiment.options,
        "optimizer": trainers_record(workload, choice, lr),
        "seed": seed,
        "steps": workload.steps,
        "data": experiment.data,
        "average": settings.average,
        "amp": settings.amp,
        "compile": settings.compile,
        "clip_norm": clip_norm(experiment, choice, settings),
    }
    if share.size > 1:
        config["processes"] = share.size
    if workload.data_note:
        config["data_note"] = workload.data_note
    if experiment.source is not None:
        config["source"] = experiment.source
    told = environment(experiment.device, settings.threads, packages(workload, choice))
    return {**config, "environment": told}


def environment(device: torch.device, threads: int | None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a run's bits and times may depend on, with the versions of the optimisers' `packages`."""
    return {
        **{package: version(package) for package in packages},
        "archopt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads or torch.get_num_threads(),
        "cores": measure.cores(),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def train(
    experiment: Experiment,
    choice: Choice,
    lr: float | None,
    seed: int,
    settings: Settings,
    path: Path,
    watcher: Watcher | None = None,
    share: Share = ALONE,
) -> dict[str, Any]:
    """Trains one run to its end in the folder `path` and returns its result; one that has ended is only read.

    share: what this process has of it, where several train it together, each of which calls this.

    An exception in the workload or the optimiser ends the run with status "failed" and is recorded, not raised.
    Raises LabError where the run cannot be as asked for, RecordError where the record cannot be written, and
    Interrupted, after a checkpoint, where the watcher asks to stop.
    """
    config = run_config(experiment, choice, lr, seed, settings, share)
    share.agree(config, experiment.device)
    if (ended := share.first(lambda: stored_result(path, config))) is not None:
        return ended
    follower = Tracked(watcher or Watcher(), () if share.rank else settings.log, path, config)
    with measure.threads(settings.threads), closing(follower):
        run = Run(experiment, choice, lr, seed, settings, follower, share)  # what it refuses leaves no trace
        with share.folder(path, config) as folder:
            ended = share.first(lambda: folder.result)
            if ended is not None:  # another command has been quicker
                return ended
            state = share.first(folder.load_checkpoint)
            if state is not None and settings.threads is None:
                torch.set_num_threads(state["threads"])
            result = run.to_end(folder, state)
            folder.finish(result)
            return result


@dataclass
class Found:
    """What has been measured of the weights, or of their average: the last evaluation, the metric's best value."""

    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None

    def take(self, step: int, metric: Metric, evaluated: Mapping[str, float], **others: float) -> None:
        """Notes an evaluation. What is measured before the first step is nobody's best."""
        self.final = {**evaluated, **others}
        if step == 0:
            return
        value = evaluated[metric.key]
        sign = 1 if metric.higher_is_better else -1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {"value": value, "step": step}


class Run:
    """A run in progress; what a workload's `train_step` sees of it is `archopt.lab.workload.Training`."""

    models: dict[str, nn.Module]
    """As `train_step` calls them."""
    optimizers: dict[str, torch.optim.Optimizer]

    def __init__(
        self,
        experiment: Experiment,
        choice: Choice,
        lr: float | None,
        seed: int,
        settings: Settings,
        watcher: Watcher,
        share: Share = ALONE,
    ) -> None:
        # A copy, so that what `build` and the steps hang on a workload does not reach the process's next run.
        self.workload = copy.copy(experiment.workload)
        self._share = share
        if share.size > 1:
            self.workload.share = share
        self.seed = seed
        self.clip_norm = clip_norm(experiment, choice, settings)
        self._lr, self._settings = lr, settings
        self._watcher = watcher
        self._device = experiment.device
        self._peak = measure.PeakMemory(self._device)
        self._clock = measure.clock_for(self._device)
        self._means = measure.Means(self._device)
        self._step = 0
        self._weight, self._pull = 1.0, 1.0
        self._multiplier: float | None = None
        self._written: dict[str, float] = dict.fromkeys(measure.PHASES, 0.0)
        self._found, self._found_of_average = Found(), Found()
        self._build(choice)

    # -- what train_step may use ---------------------------------------------------------------------------

    def batch(self, step: int) -> Any:
        """The workload's batch of a step."""
        self._clock.enter(measure.OTHER)
        batch = self.workload.batch(step, self.seed)
        self._weight = self.workload.weight(step)
        if self._share.size > 1:
            rows = self.workload.rows_of_step(step)
            part = self._share.count(rows) / rows
            self._weight *= part
            self._pull = part * self._share.size  # gradients are means over processes, whose parts differ
        self._clock.enter(measure.FORWARD_BACKWARD)
        return batch

    @contextmanager
    def apart(self) -> Iterator[None]:
        """For what is neither forward, backward nor optimiser in a `train_step`: games, say."""
        self._clock.enter(measure.OTHER)
        try:
            yield
        finally:
            self._clock.enter(measure.FORWARD_BACKWARD)

    def update(self, name: str, loss: Tensor) -> None:
        """Backward, clipping, the named model's step; then all gradients are freed."""
        with self._without_autocast:
            if self._pull != 1.0:
                loss = loss * self._pull
            loss.backward()  # type: ignore[no-untyped-call]
            self._clock.enter(measure.OPTIMIZER)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self._bare[name].parameters(), self.clip_norm)
            self.optimizers[name].step()
            if self._averages is not None:
                self._averages.update(name, self._bare[name])
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            if self._settings.amp:
                torch.clear_autocast_cache()  # of the weights as they were before this step
            self._clock.enter(measure.FORWARD_BACKWARD)

    # -- the run -------------------------------------------------------------------------------------------

    def _build(self, choice: Choice) -> None:
        seeds.seed_all(seeds.mix(self.seed, 0, seeds.BUILD), self._device)
        built = self.workload.build()
        self._bare = built if isinstance(built, dict) else {"model": built}
        for name, model in self._bare.items():
            if not isinstance(model, nn.Module):
                raise LabError(f"{self.workload.name}: build() gave {name} = {model!r}, expected a module")
            model.to(self._device)
        seeds.seed_all(seeds.mix(self.seed, 0, seeds.OPTIMIZER), self._device)
        trainers = {name: trainer_of(self.workload, name, choice, self._lr) for name in self._bare}
        self.optimizers = {name: trainers[name].build(model) for name, model in self._bare.items()}
        self._followers = {
            name: StepNumbers(model, self.optimizers[name], self.workload.updates_every)
            for name, model in self._bare.items()
        }
        # Made after the optimisers, whose construction may change weights.
        self._averages: Averages | None = None
        if self._settings.average:
            self._averages = Averages(self._bare, self.workload, self.seed, self._device)
        if self._settings.compile:
            for model in [*self._bare.values(), *(self._averages.models.values() if self._averages else ())]:
                model.compile()
        self.models = {name: self._share.wrap(model) for name, model in self._bare.items()}
        self._rates = {
            name: [group["lr"] for group in optimizer.param_groups]
            for name, optimizer in self.optimizers.items()
            if trainers[name].choice.entry.rate
        }
        """Of the groups, by model; rules without a rate are left out and follow no schedule."""
        amp = self._settings.amp
        kind = self._device.type
        self._autocast: AbstractContextManager[Any] = (
            torch.autocast(kind, torch.bfloat16) if amp else nullcontext()
        )
        self._without_autocast: AbstractContextManager[Any] = (
            torch.autocast(kind, enabled=False) if amp else nullcontext()
        )

    def to_end(self, folder: RunFolder, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """Trains to the end, from a checkpoint where there is one, and returns the result."""
        self._folder = folder
        try:
            if state is not None:
                self._load_state(state)
            self._watcher.begin(self._step, self.workload.steps)
            if state is None:
                self._write_line()
            status = self._loop()
        except RankError as error:
            return self._failed(error)
        except (LabError, Interrupted):
            raise
        except Exception as error:  # whatever the workload's or the optimiser's code may raise
            return self._failed(self._share.blame(error))
        return self._result(status)

    def _failed(self, error: Exception) -> dict[str, Any]:
        words = str(error) if isinstance(error, RankError) else describe(error)
        return {**self._result("failed"), "error": words, "traceback": traceback.format_exc()}

    def _loop(self) -> str:
        workload, clock, means, watcher = self.workload, self._clock, self._means, self._watcher
        steps, every = workload.steps, workload.eval_every
        self._save_at = perf_counter() + self._settings.checkpoint_seconds
        on_device = self._device.type != "cpu"
        clock.start()
        while self._step < steps:
            step = self._step
            seeds.seed_all(seeds.mix(self.seed, step, seeds.STEP), self._device)
            self._schedule(step)
            for follower in self._followers.values():
                follower.before(step % every)
            with self._autocast:
                clock.enter(measure.FORWARD_BACKWARD)
                told = workload.train_step(self, step)
                clock.enter(measure.OTHER)
            finite = means.add(told, self._weight)
            for follower in self._followers.values():
                follower.after()
            self._step = step = step + 1
            if on_device and step % CHECK_EVERY == 0:
                clock.settle()
                finite = means.finite()
            stop = watcher.step(step, perf_counter())
            now = clock.end_step()
            infinite, stop, due = self._share.any(not finite, stop, self._checkpoint_due(step, now))
            finite = not infinite
            if step % every == 0 or step == steps or not finite:
                finite = self._write_line() and finite
                clock.start()
            if not finite:
                return "diverged"
            if step < steps and (stop or due):
                self._save_checkpoint()
                clock.start()
            if stop and step < steps:
                raise Interrupted(str(self._folder.path))
        return "finished"

    def _schedule(self, step: int) -> None:
        if not self._rates:
            return
        multiplier = self.workload.schedule(step)
        if multiplier == self._multiplier:
            return
        self._multiplier = multiplier
        for name, rates in self._rates.items():
            for group, rate in zip(self.optimizers[name].param_groups, rates):
                group["lr"] = rate * multiplier

    # -- measuring -----------------------------------------------------------------------------------------

    def _write_line(self) -> bool:
        """Evaluates and adds a line to the metrics. False where that shows that the run has diverged."""
        steps = self._means.count
        means = self._means.take(self._share)
        self._clock.settle()
        finite = math.isfinite(means.get("loss", 0.0))
        metric = self.workload.metric
        self._share.same_buffers(self._bare)
        evaluated = self._evaluate(finite, means)
        judged = [number for key, number in evaluated.items() if key == metric.key or key.endswith("loss")]
        finite = finite and all(map(math.isfinite, judged))
        totals = dict(self._clock.totals)
        line: dict[str, Any] = {"step": self._step, "epoch": self._step / self.workload.steps_per_epoch}
        if self._step > 0:
            line["train"] = means
        line["eval"] = evaluated
        trained = {f"train_{key}": value for key, value in means.items()}
        self._found.take(self._step, metric, evaluated, **trained)
        if self._averages is not None:
            line["average"] = self._evaluate_average(self._averages, finite, evaluated, steps)
            self._found_of_average.take(self._step, metric, line["average"])
        if self._step > 0:
            line["optimizer"] = self._optimizer_numbers()
            if per_step := self._per_step():
                line["per_step"] = per_step
        rate = None
        if self._lr is not None:
            rate = self._lr * self.workload.schedule(max(self._step - 1, 0))
        line |= {
            "lr": rate,
            "seconds": self._clock.seconds,
            "time": {phase: totals[phase] - self._written[phase] for phase in measure.PHASES},
        }
        self._written = totals
        if finite:
            self._draw()
        self._folder.append(line)
        self._watcher.line(line)
        return finite or self._step == 0  # initial weights may be bad without anything having diverged

    def _measure(
        self, models: dict[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], finite: bool
    ) -> dict[str, float]:
        """The workload's evaluation of some models."""
        seeds.seed_all(seeds.mix(self.seed, self._step, seeds.EVALUATION), self._device)
        with evaluation_mode(models, optimizers), torch.no_grad(), self._autocast:
            try:
                return {name: float(value) for name, value in self.workload.evaluate(models).items()}
            except (ValueError, ArithmeticError, RuntimeError):
                if finite:
                    raise
                # Weights that are not finite can be too much for an evaluation.
                return {self.workload.metric.key: math.nan}

    def _draw(self) -> None:
        """Keeps the workload's pictures of this step."""
        seeds.seed_all(seeds.mix(self.seed, self._step, seeds.EVALUATION), self._device)
        with evaluation_mode(self._bare, self.optimizers), torch.no_grad(), self._autocast:
            pictures = self.workload.pictures(self._bare)
        for name, picture in pictures.items():
            self._folder.save_picture(f"step={self._step}-{name}", picture)

    def _evaluate_average(
        self, averages: Averages, finite: bool, evaluated: Mapping[str, float], steps: int
    ) -> dict[str, float]:
        """What `_evaluate` gives, of the averages. `steps`: how many were taken since the last evaluation."""
        key = self.workload.metric.key
        if self._step == 0:
            return dict(evaluated)  # nothing has been averaged yet
        if not finite:
            return {key: math.nan}  # the run ends here
        with evaluation_mode(averages.models, {}), torch.no_grad(), self._autocast:
            averages.renew(self._step)
        found = self._measure(averages.models, {}, finite)
        if key not in found:  # judged by what training tells: the average on the same batches
            with evaluation_mode(averages.models, {}), torch.no_grad(), self._autocast:
                found[key] = averages.training_mean(key.removeprefix("train_"), self._step, steps)
        return found

    def _evaluate(self, finite: bool, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the models as training has left them."""
        key = self.workload.metric.key
        found = self._measure(self._bare, self.optimizers, finite)
        if key not in found and (told := key.removeprefix("train_")) in means:
            found[key] = means[told]  # judged by what `train_step` tells
        elif key not in found and not (key.startswith("train_") and self._step == 0):
            names = ", ".join(found) or "nothing"
            raise LabError(f"{self.workload.name}: evaluate() gives {names}, but the metric is {key!r}")
        return found

    def _optimizer_numbers(self) -> dict[str, float]:
        several = len(self.optimizers) > 1
        return {
            f"{name}/{key}" if several else key: value
            for name, optimizer in self.optimizers.items()
            for key, value in numbers(optimizer).items()
        }

    def _per_step(self) -> dict[str, Any]:
        several = len(self.optimizers) > 1
        return {
            f"{name}/{key}" if several else key: value
            for name, follower in self._followers.items()
            for key, value in follower.take().items()
        }

    def _result(self, status: str) -> dict[str, Any]:
        self._clock.settle()
        totals, seconds = self._clock.totals, self._clock.seconds
        parameters = [p for model in self._bare.values() for p in model.parameters()]
        result = {
            "status": status,
            "error": None,
            "step": self._step,
            "metric": asdict(self.workload.metric),
            **asdict(self._found),
            "seconds": seconds,
            "seconds_per_step": statistics.median(self._clock.durations) if self._clock.durations else None,
            "optimizer_share": totals[measure.OPTIMIZER] / seconds if seconds else None,
            "overhead_share": totals[measure.OTHER] / seconds if seconds else None,
            "peak_memory_bytes": self._peak.read(),
            "optimizer_state_bytes": sum(map(state_bytes, self.optimizers.values())),
            "parameters": sum(p.numel() for p in parameters),
            "weights_sha256": weights_sha256(self._bare),
        }
        if self._averages is not None:
            result["average"] = {
                **asdict(self._found_of_average),
                "state_bytes": self._averages.state_bytes(),
                "weights_sha256": weights_sha256(self._averages.models),
            }
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _checkpoint_due(self, step: int, now: float) -> bool:
        every = self._settings.checkpoint_steps
        return now >= self._save_at or (every is not None and step % every == 0)

    def _save_checkpoint(self) -> None:
        began = perf_counter()
        state = {
            "step": self._step,
            "threads": torch.get_num_threads(),
            "models": {name: model.state_dict() for name, model in self._bare.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "workload": self.workload.state_dict(),
            "clock": self._clock.state_dict(),
            "written": self._written,
            "means": self._share.all(self._means.state_dict()),
            "per_step": {name: follower.state_dict() for name, follower in self._followers.items()},
            **asdict(self._found),
            "peak_memory": self._peak.read(),
        }
        if self._averages is not None:
            state["average"] = {"models": self._averages.state_dict(), **asdict(self._found_of_average)}
        self._folder.save_checkpoint(state)
        took = perf_counter() - began
        self._save_at = perf_counter() + max(self._settings.checkpoint_seconds, took / CHECKPOINT_SHARE)

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.workload.load_state_dict(state["workload"])  # first: it may say why weights cannot fit
        for name, model in self._bare.items():
            model.load_state_dict(state["models"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._clock.load_state_dict(state["clock"])
        means = state["means"]  # of each process; older checkpoints are of one
        self._means.load_state_dict(
            means[self._share.rank] if isinstance(means, list) else means, self._device
        )
        for name, kept in state.get("per_step", {}).items():  # which older checkpoints do not have
            self._followers[name].load_state_dict(kept, self._device)
        self._step = state["step"]
        self._written = dict(state["written"])
        self._found = Found(state["final"], state["best"])
        if self._averages is not None:
            kept = state["average"]
            self._averages.load_state_dict(kept["models"])
            self._found_of_average = Found(kept["final"], kept["best"])
        self._peak.before = state["peak_memory"]


@contextmanager
def evaluation_mode(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> Iterator[None]:
    """Modules in eval mode, then each as it was; likewise optimisers that keep other weights for evaluation.

    Such an optimiser computes the weights of training back from those of evaluation, which rounds: they are kept.
    """
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    switched: list[Any] = [optimizer for optimizer in optimizers.values() if has_modes(optimizer)]
    groups = [group for optimizer in switched for group in optimizer.param_groups]
    kept = [(param, param.detach().clone()) for group in groups for param in group["params"]]
    for model in models.values():
        model.eval()
    for optimizer in switched:
        optimizer.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for optimizer in switched:
            optimizer.train()
        with torch.no_grad():
            for param, weights in kept:
                param.copy_(weights)


def weights_sha256(models: Mapping[str, nn.Module]) -> str:
    """A checksum of all parameters and buffers, to the bit."""
    digest = hashlib.sha256()
    for name, model in models.items():
        for key, tensor in model.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()
