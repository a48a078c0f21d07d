"""Shows runs while they go: bars in a terminal, one line a finished run elsewhere."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from archopt.lab.plan import RunSpec, show_metric
from archopt.lab.watcher import Watcher

_COLORS = {"finished": "green", "diverged": "yellow", "failed": "red"}


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metric]}"),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )


class SweepProgress:
    """Follows a sweep: a bar for all of it and one for each worker."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _bars(console)
        self._workers: dict[int, TaskID] = {}
        self._running: dict[int, RunSpec] = {}
        self._runs = self._done = 0
        self._all: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._workers.values():
            self._progress.remove_task(task)
        self._progress.stop()

    def begin(self, runs: Sequence[RunSpec], skipped: int) -> None:
        """Says how much there is to do."""
        self._runs += len(runs)
        if skipped:
            self._console.print(f"{skipped} runs have ended before and are kept.")
        if self._all is None:
            self._all = self._progress.add_task("all runs", total=self._runs, metric="")
        self._progress.update(self._all, total=self._runs)

    def say(self, words: str) -> None:
        """A line between the runs."""
        self._console.print(words, soft_wrap=True, highlight=False, markup=False)

    def progress(self, worker: int, spec: RunSpec, step: int, metric: float | None) -> None:
        """Moves a worker's bar."""
        shown = "" if metric is None else show_metric(spec.metric, metric)
        if worker not in self._workers:
            self._workers[worker] = self._progress.add_task("", total=None, metric="")
        task = self._workers[worker]
        if self._running.get(worker) is not spec:
            self._running[worker] = spec
            self._progress.reset(task, description=f"  {escape(spec.title)}", total=spec.steps)
        self._progress.update(task, completed=step, metric=shown, visible=True)

    def ended(self, worker: int, spec: RunSpec, status: str, message: str) -> None:
        """Moves the bar of all runs; a line tells of runs that did not finish, and of all without a terminal."""
        self._done += 1
        if self._all is not None:
            self._progress.advance(self._all)
        if worker in self._workers:
            self._progress.update(self._workers[worker], visible=False)  # until it has the next run
        if status != "finished" or not self._console.is_terminal:
            self._console.print(
                f"[{self._done}/{self._runs}] {escape(spec.title)}: [{_COLORS[status]}]{status}[/], "
                f"{escape(message)}",
                soft_wrap=True,
                highlight=False,
            )


class RunProgress(Watcher):
    """Follows one run: a bar, and a line for each evaluation."""

    def __init__(self, console: Console, title: str, metric: Mapping[str, Any]) -> None:
        self._console, self._title, self._metric = console, title, metric
        self._progress = _bars(console)
        self._next = 0.0
        self._steps = 0
        self.begun = False
        self.stop_requested = False

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, step: int, steps: int) -> None:
        """Says where the run starts."""
        self.begun = True
        if step:
            self._console.print(f"goes on from step {step:,}")
        self._steps = steps
        self._task = self._progress.add_task(escape(self._title), total=steps, completed=step, metric="")

    def step(self, step: int, now: float) -> bool:
        """Moves the bar ten times a second."""
        if now >= self._next:
            self._next = now + 0.1
            self._progress.update(self._task, completed=step)
        return self.stop_requested

    def line(self, line: Mapping[str, Any]) -> None:
        """Prints what was measured."""
        value = show_metric(self._metric, line["eval"].get(self._metric["key"]))
        if "average" in line:
            value += f"; average: {show_metric(self._metric, line['average'].get(self._metric['key']))}"
        self._progress.update(self._task, completed=line["step"], metric=value)
        told = []
        if "train" in line:
            told.append(f"train loss {line['train']['loss']:.4g}")
        if "test_loss" in line["eval"]:
            told.append(f"test loss {line['eval']['test_loss']:.4g}")
        if "accuracy" in line.get("train", {}):
            told.append(f"train accuracy {100 * line['train']['accuracy']:.2f} %")
        told.append(value)
        for name, sizes in line.get("per_step", {}).items():
            told.append(f"{name} {sizes['mean']:.3g} ({sizes['least']:.3g} to {sizes['greatest']:.3g})")
        self._console.print(
            f"epoch {line['epoch']:.4g}, step {line['step']:>{len(str(self._steps))}}/{self._steps}: "
            f"{', '.join(told)}",
            highlight=False,
        )
