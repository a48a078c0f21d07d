"""The commands that train or draw: each reads its options, does its work and returns an exit status."""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from archopt.lab import options
from archopt.lab.calls import folder_name, parse_call, split_list
from archopt.lab.comparisons import COMPARISONS, NamedComparison, at_rates, spelled
from archopt.lab.distributed import joined
from archopt.lab.errors import LabError
from archopt.lab.experiment import WorkloadChoice, make_workload, open_experiment, workload_class
from archopt.lab.measure import threads
from archopt.lab.optimizers import check_lr, parse_optimizer
from archopt.lab.plan import Plan, parse_device, rates, show_metric
from archopt.lab.progress import RunProgress, SweepProgress
from archopt.lab.record import run_path
from archopt.lab.reproduction import REPRODUCTIONS, Request, reproduce
from archopt.lab.share import Share
from archopt.lab.sweep import Outcome, sweep
from archopt.lab.trackers import check_trackers
from archopt.lab.train import Settings, train
from archopt.lab.user_files import is_file
from archopt.lab.workload import Workload
from archopt.lab.workloads import registry
from archopt.optim.base import nearest

OUT = Path("runs")


@dataclass
class Running:
    """What every command that trains takes."""

    preset: str = "small"
    """paper (as published), small (reduced, minutes on two cores) or smoke (seconds)."""
    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the data sets (default: the environment's ARCHOPT_DATA, else a folder in the user's cache)."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    amp: bool = False
    """Forward passes in bfloat16 where torch's autocast does so."""
    compile: bool = False
    """Compile the models with torch.compile."""
    clip_norm: Annotated[float | None, arg(metavar="X")] = None
    """Clip gradients to this norm (default: as the workload's publication does, usually not)."""
    average: bool = False
    """Average the weights over the steps, in place of a schedule, and evaluate the average beside the weights."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads of a run (default: the cores, divided among the jobs)."""
    checkpoint_seconds: Annotated[float, arg(metavar="X")] = 20.0
    """Time between checkpoints."""
    log: Annotated[str | None, arg(metavar="A,B")] = None
    """Also log to tensorboard or wandb (archopt[logging])."""

    def settings(self) -> Settings:
        """How to run. Raises LabError for values out of range."""
        from archopt.lab.train import Settings

        for name in ("clip_norm", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise LabError(f"--{name.replace('_', '-')} {value}, expected more than 0")
        log = tuple(split_list(self.log)) if self.log else ()
        check_trackers(log)
        return Settings(
            log=log,
            device=self.device,
            amp=self.amp,
            compile=self.compile,
            clip_norm=self.clip_norm,
            average=self.average,
            threads=self.threads,
            checkpoint_seconds=self.checkpoint_seconds,
        )


# -- train -------------------------------------------------------------------------------------------------


@dataclass
class Train(Running):
    """Options of `archopt train`."""

    workload: Annotated[Positional[str], arg(metavar="WORKLOAD")] = ""
    """A name from `archopt list`, or a file of your own: ./mine.py."""
    optimizer: Annotated[str, arg(metavar="NAME", aliases=["-o"])] = Workload.default_optimizer
    """A name from `archopt list`, package.module:Class, or either with options: 'adamw(weight_decay=0.1)'."""
    lr: Annotated[float | None, arg(metavar="X")] = None
    """Learning rate (default: the workload's published one, else the optimiser's default)."""
    seed: int = 0
    """Seed of initial weights, batches and everything else."""
    distribute: bool = False
    """Train with all processes that torchrun or mpirun has started, each on its part of every batch."""
    out: Annotated[Path, arg(metavar="DIR")] = OUT
    """Folder for records; the run becomes OUT/WORKLOAD-PRESET/OPTIMIZER/lr=X/seed=N."""


TRAIN_HELP = (
    "Trains one workload with one optimiser. A run that was stopped goes on; one that has ended is shown."
)


def train_command(args: list[str]) -> int:
    """`archopt train`: one run, one record."""
    help_wanted = "-h" in args or "--help" in args
    known, _ = options.parse_known(Train, _without_help(args), prog="archopt train")
    if not known.workload:
        if help_wanted:
            options.parse(Train, args, prog="archopt train", description=TRAIN_HELP)
        raise LabError("archopt train needs a workload: a name from `archopt list` or a file, ./mine.py")
    # Before the options are read, so that a process that refuses them can tell the others.
    with joined(not help_wanted and "--distribute" in args) as share:
        return _train(*_with_workload_options(known, args), share)


def _without_help(args: list[str]) -> list[str]:
    return [a for a in args if a not in ("-h", "--help")]


def _with_workload_options(known: Train, args: list[str]) -> tuple[Train, WorkloadChoice]:
    """Reads the arguments again, now that it is known which workload's options are among them."""
    call = parse_call(known.workload)
    cls = workload_class(call.name)
    own = Train(preset=cls.default_preset, optimizer=cls.default_optimizer)
    known, _ = options.parse_known(Train, _without_help(args), prog="archopt train", default=own)
    usual = make_workload(cls, known.preset, call.options)
    taken = {f.name for f in dataclasses.fields(Train)}
    if clash := [f.name for f in dataclasses.fields(cls) if f.name in taken]:
        raise LabError(f"{cls.name}: `archopt train` has an option {clash[0]!r} of its own; rename the field")
    both = dataclasses.make_dataclass("Both", [("train", Train), (_title(cls), cls)])
    given: Any = options.parse(
        both,
        args,
        prog=f"archopt train {known.workload}",
        description=f"{TRAIN_HELP}\n\n{cls.name}: {cls.summary}.",
        default=both(own, usual),
    )
    workload: Workload = getattr(given, _title(cls))
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    return given.train, WorkloadChoice(
        call.name, known.preset, {name: getattr(workload, name) for name in fields}
    )


def _title(cls: type[Workload]) -> str:
    """How the help heads a workload's own options."""
    name = "".join(character if character.isalnum() else "_" for character in cls.name)
    return name if name != "train" and name.isidentifier() else "workload"


def _train(asked: Train, choice: WorkloadChoice, share: Share) -> int:
    settings = asked.settings()
    optimizer = parse_optimizer(asked.optimizer)
    if asked.seed < 0:
        raise LabError(f"--seed {asked.seed}, expected 0 or more")
    if len(optimizer.own_lrs) > 1:
        raise LabError(f"{asked.optimizer} has several learning rates; archopt train takes one, compare many")
    workload = make_workload(workload_class(choice.name), choice.preset, choice.options)
    if asked.distribute:
        _check_divisible(workload, settings)
    optimizer.check(workload.published)
    if asked.lr is None:
        lr = rates("published", optimizer, workload)[0]
    elif optimizer.own_lrs:
        raise LabError(f"the learning rate is given twice: --lr {asked.lr} and {asked.optimizer}")
    else:
        lr = check_lr(optimizer.entry, asked.lr)
    with threads(settings.threads):
        experiment = open_experiment(choice, asked.data, share.place(parse_device(asked.device)))
    path = run_path(asked.out, experiment.folder, optimizer.label, lr, asked.seed)
    rate = "" if lr is None else f" lr={lr:g}"
    title = f"{experiment.folder} {optimizer.label}{rate} seed {asked.seed}"
    console = Console(quiet=share.rank > 0)
    together = f", {share.size} processes" if share.size > 1 else ""
    console.print(f"[bold]{escape(title)}[/]{together}", highlight=False)
    metric = dataclasses.asdict(experiment.workload.metric)
    with RunProgress(console, title, metric) as progress, _stoppable(progress, at_once=share.size == 1):
        result = train(experiment, optimizer, lr, asked.seed, settings, path, progress, share)
    if not progress.begun and result["status"] != "failed":
        console.print("the run has ended before; this is its record")
    if result["status"] == "failed":
        # The first process alone keeps a record.
        where = "ARCHOPT_DEBUG=1 shows" if share.rank else f"{path}/result.json has"
        print(f"archopt: the run failed: {result['error']}; {where} the traceback", file=sys.stderr)
        if share.rank and os.environ.get("ARCHOPT_DEBUG"):
            print(result["traceback"], file=sys.stderr)
        return 1
    best = result["best"]
    shown = show_metric(metric, result["final"].get(metric["key"]))
    console.print(
        f"{result['status']} after {result['step']:,} steps: [bold]{shown}[/]"
        + (f" (best {show_metric(metric, best['value'])} at step {best['step']:,})" if best else ""),
        highlight=False,
    )
    if "average" in result:
        shown = show_metric(metric, result["average"]["final"].get(metric["key"]))
        console.print(f"average of the weights: [bold]{shown}[/]", highlight=False)
    console.print(
        f"{result['seconds']:.1f} s, {1000 * result['seconds_per_step']:.3g} ms a step; optimiser "
        f"{100 * result['optimizer_share']:.1f} %, laboratory {100 * result['overhead_share']:.1f} %",
        highlight=False,
    )
    console.print(f"record: {path}", highlight=False, soft_wrap=True, markup=False)
    return 0 if result["status"] == "finished" else 1


def _check_divisible(workload: Workload, settings: Settings) -> None:
    """Raises LabError where several processes cannot train this together."""
    if not workload.divisible:
        able = ", ".join(name for name, known in registry().items() if known.divisible)
        raise LabError(f"--distribute: {workload.name} cannot be divided among processes ({able} can)")
    for name in ("average", "compile"):
        if getattr(settings, name):
            raise LabError(f"--distribute does not go with --{name} yet; leave one of them out")


@contextlib.contextmanager
def _stoppable(progress: Any, at_once: bool = True) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint and the end, the second ends at once where that is
    wanted: not under a launcher, which passes on what a terminal has sent already.

    What is ignored stays so: a shell's background job must not end when Ctrl-C is meant for another.
    """

    def stop(number: int, frame: Any) -> None:
        if progress.stop_requested and at_once:
            raise KeyboardInterrupt
        progress.stop_requested = True

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- compare -----------------------------------------------------------------------------------------------


@dataclass
class Compare(Running):
    """Options of `archopt compare`."""

    workloads: Annotated[Positional[tuple[str, ...]], arg(metavar="WORKLOAD...")] = ()
    """Names from `archopt list` or files of your own, with options where wanted: "digits(model='cnn')". Or the
    name of one published comparison from there, which brings all but the preset; options given here win over it."""
    optimizers: Annotated[str, arg(metavar="A,B,...")] = "nero,agd,sgd,adamw"
    """Names from `archopt list` or package.module:Class, with options where wanted: 'sgd(momentum=0.9),nero'."""
    lrs: Annotated[str, arg(metavar="WHICH")] = "grid"
    """Learning rates: grid (the workload's), published, default, or numbers with commas. The optimiser's default
    is always tried too; rates in brackets, 'adamw(lr=[0.003,0.01])', are the only ones for that entry."""
    seeds: Annotated[str, arg(metavar="N,N,...")] = "0,1,2"
    """Seeds, all of which every optimiser gets."""
    tuning_seeds: Annotated[str | None, arg(metavar="N,...")] = None
    """The seeds on which all learning rates are tried; the others then run the best of these and the default alone
    (default: all seeds run all rates)."""
    jobs: Annotated[int | None, arg(metavar="N")] = None
    """Runs at a time, each in a process of its own (default: the number of cores; on CUDA 1)."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the comparison (default: runs/compare-WORKLOADS-PRESET)."""


COMPARE_HELP = (
    "Trains every optimiser over learning rates and seeds, with the same initial weights and batches for each, and "
    "writes a table and a page. Given again, the command goes on where it stopped; runs that have ended are kept."
)


def compare_command(args: list[str]) -> int:
    """`archopt compare`: many runs, one page."""
    asked = options.parse(Compare, args, prog="archopt compare", description=COMPARE_HELP)
    if not asked.workloads:
        raise LabError("archopt compare needs a workload: names from `archopt list` or files, ./mine.py")
    if (named := _named(asked.workloads)) is not None:
        usual = Compare(**spelled(named))
        given = options.parse(Compare, args, prog="archopt compare", description=COMPARE_HELP, default=usual)
        asked = of_comparison(named, given)
    return _compare(plan(asked, " ".join(["archopt", "compare", *map(_quoted, args)])))


def _named(names: Sequence[str]) -> NamedComparison | None:
    """The published comparison that is asked for, or None. Raises LabError where it is not the only name."""
    calls = [parse_call(text) for text in names]
    for call in calls:
        if call.name in COMPARISONS and (len(calls) > 1 or call.options):
            raise LabError(
                f"{call.name} is a comparison: give its name alone and change it by options (--optimizers, --lrs, "
                "--seeds, --preset), or name the workloads"
            )
        known = [*registry(), *COMPARISONS]
        if not is_file(call.name) and call.name not in known:
            hint = nearest(call.name, known)
            raise LabError(
                f"no workload and no comparison {call.name!r}{hint} (there are {', '.join(known)}, or a file: "
                "./mine.py)"
            )
    return COMPARISONS.get(calls[0].name)


def of_comparison(named: NamedComparison, given: Compare) -> Compare:
    """What a published comparison and the options given with its name ask for.

    Without `--lrs` the rates are the published ones alone: an optimiser's default is not added to them.
    """
    usual = spelled(named)
    optimizers = given.optimizers
    if given.lrs == usual["lrs"]:
        optimizers = ",".join(at_rates(text, named.lrs) for text in split_list(optimizers))
    tuning, seeds = given.tuning_seeds, options.integers(given.seeds, "--seeds")
    if tuning is not None and tuning == usual.get("tuning_seeds"):
        kept = [seed for seed in named.tuning_seeds or () if seed in seeds]
        tuning = ",".join(map(str, kept or seeds[:1]))  # of other seeds, the first tunes
    out = given.out or OUT / f"compare-{named.name}-{given.preset}"
    return dataclasses.replace(
        given,
        workloads=tuple(named.trained(given.preset).values()),
        optimizers=optimizers,
        tuning_seeds=tuning,
        out=out,
    )


def _quoted(arg: str) -> str:
    """An argument as a shell takes it; in double quotes where it has single ones, which shlex would spell '"'"'."""
    return f'"{arg}"' if "'" in arg and not set(arg) & set('"$`\\!') else shlex.quote(arg)


def plan(asked: Compare, command: str) -> Plan:
    """What the options ask for. Raises LabError for what cannot be read."""
    calls = [parse_call(text) for text in asked.workloads]
    names = "+".join(Path(call.name).stem for call in calls)
    return Plan(
        workloads=[WorkloadChoice(call.name, asked.preset, call.options) for call in calls],
        optimizers=split_list(asked.optimizers),
        lrs=options.rates(asked.lrs),
        seeds=options.integers(asked.seeds, "--seeds"),
        tuning_seeds=()
        if asked.tuning_seeds is None
        else options.integers(asked.tuning_seeds, "--tuning-seeds"),
        out=asked.out or OUT / folder_name(f"compare-{names}-{asked.preset}"),
        data=asked.data,
        settings=asked.settings(),
        jobs=asked.jobs,
        command=command,
    )


def _compare(plan: Plan) -> int:
    console = Console()
    with SweepProgress(console) as progress:
        outcome = sweep(plan, progress)
    _show_report(plan.out, console)
    return _status(outcome)


def _status(outcome: Outcome) -> int:
    """The exit status, after what failed has been said."""
    for error in outcome.errors[:10]:
        print(f"archopt: a run failed: {error}", file=sys.stderr)
    if outcome.failed > 10:
        print(f"archopt: {outcome.failed - 10} more runs failed", file=sys.stderr)
    return 1 if outcome.failed else 0


def _show_report(folder: Path, console: Console, asked: str | None = None) -> None:
    from archopt.lab.report import parse_target, print_table, write_report

    target = None if asked is None else parse_target(asked)
    print_table(folder, console, target=target)
    page = write_report(folder, target=target)
    console.print(f"page: {page}", highlight=False, soft_wrap=True, markup=False)


# -- reproduce ---------------------------------------------------------------------------------------------


@dataclass
class Reproduce(Running):
    """Options of `archopt reproduce`."""

    paper: Annotated[Positional[str], arg(metavar="PAPER")] = ""
    """Whose experiments: see the list above."""
    parts: Annotated[str | None, arg(metavar="A,B,...")] = None
    """Only these of its comparisons (default: all)."""
    seeds: Annotated[str | None, arg(metavar="N,N,...")] = None
    """Seeds (default: the paper's)."""
    jobs: Annotated[int | None, arg(metavar="N")] = None
    """Runs at a time, each in a process of its own (default: the number of cores; on CUDA 1)."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the reproduction (default: runs/reproduce-PAPER-PRESET)."""


def reproduce_command(args: list[str]) -> int:
    """`archopt reproduce`: all comparisons of a paper, one page."""
    listed = "; ".join(
        f"{name}: {', '.join(part.name for part in known.parts)}" for name, known in REPRODUCTIONS.items()
    )
    text = (
        "Trains all experiments of a paper and writes a page with our numbers beside the published ones. Given "
        f"again, the command goes on where it stopped; runs that have ended are kept. There are: {listed}."
    )
    asked = options.parse(Reproduce, args, prog="archopt reproduce", description=text)
    if asked.paper not in REPRODUCTIONS:
        given = f"{asked.paper!r}{nearest(asked.paper, REPRODUCTIONS)}" if asked.paper else "no name"
        raise LabError(f"archopt reproduce needs a paper, got {given} (there are {', '.join(REPRODUCTIONS)})")
    out = asked.out or OUT / f"reproduce-{asked.paper}-{asked.preset}"
    request = Request(
        reproduction=REPRODUCTIONS[asked.paper],
        preset=asked.preset,
        out=out,
        parts=tuple(split_list(asked.parts)) if asked.parts else (),
        seeds=None if asked.seeds is None else tuple(options.integers(asked.seeds, "--seeds")),
        data=asked.data,
        settings=asked.settings(),
        jobs=asked.jobs,
        command=" ".join(["archopt", "reproduce", *map(_quoted, args)]),
    )
    console = Console()
    with SweepProgress(console) as progress:
        outcome = reproduce(request, progress, progress.say)
    _show_reproduction(out, console)
    return _status(outcome)


def _show_reproduction(folder: Path, console: Console) -> None:
    from archopt.lab.report import write_reproduction

    page = write_reproduction(folder)
    console.print(f"page: {page}", highlight=False, soft_wrap=True, markup=False)


# -- report ------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Options of `archopt report`."""

    folder: Annotated[Positional[Path | None], arg(metavar="DIR")] = None
    """The folder of a comparison, a reproduction, or of runs: what the command that made it had as --out."""
    target: Annotated[str | None, arg(metavar="VALUE")] = None
    """The metric's value whose time is told, 0.95 or digits=0.95,mnist-cwn=0.9 (default: 95 % of the way from
    before training to the best mean)."""


def report_command(args: list[str]) -> int:
    """`archopt report`: table and page again, from the records alone."""
    text = (
        "Prints the table of a comparison and writes its page again, from the records that there are by now."
    )
    asked = options.parse(Report, args, prog="archopt report", description=text)
    if asked.folder is None:
        raise LabError(
            "archopt report needs a folder: what `archopt compare` or `archopt train` had as --out"
        )
    from archopt.lab.report import is_reproduction

    if is_reproduction(asked.folder):
        if asked.target is not None:
            raise LabError(
                f"{asked.folder} is a reproduction: --target is for one comparison, a folder in it"
            )
        _show_reproduction(asked.folder, Console())
    else:
        _show_report(asked.folder, Console(), asked.target)
    return 0


# -- demo --------------------------------------------------------------------------------------------------


@dataclass
class Demo:
    """Options of `archopt demo`."""

    out: Annotated[Path, arg(metavar="DIR")] = OUT / "demo"
    """Folder of the comparison."""
    jobs: Annotated[int | None, arg(metavar="N")] = None
    """Runs at a time (default: the number of cores)."""


DEMO_OPTIMIZERS = "nero,agd,autonero,sgd,adamw,lamb,madam"
DEMO_LRS = "0.0001,0.001,0.01,0.1,1"


def demo_command(args: list[str]) -> int:
    """`archopt demo`: `archopt compare digits`, in a size that ends within three minutes on two cores."""
    text = (
        "Compares Nero, AGD and AutoNero with four others on 1,797 real handwritten digits that ship with "
        "archopt: five learning rates, three seeds. Prints the table and the path of the page."
    )
    asked = options.parse(Demo, args, prog="archopt demo", description=text)
    compare = Compare(
        workloads=("digits",), optimizers=DEMO_OPTIMIZERS, lrs=DEMO_LRS, jobs=asked.jobs, out=asked.out
    )
    command = f"archopt compare digits --optimizers {DEMO_OPTIMIZERS} --lrs {DEMO_LRS} --out {asked.out}"
    return _compare(plan(compare, command))
