"""Reproductions of papers: all of a paper's comparisons in one folder, in an order in which little is lost.

A reproduction is data: the paper's named comparisons, and which of our own rules stand beside. Preset `paper`
trains what was published, every rate on the first seed and the best on all. Other presets train each optimiser at
its published rate, since their runs are too short to say which rate is best at full length, but for the comparisons
that are about rates. First comes every comparison on the first seed, then the other seeds, then the comparisons
over rates. Comparisons share runs: one that is there already is copied.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from archopt.lab.calls import parse_call
from archopt.lab.comparisons import COMPARISONS, PAPER, NamedComparison, at_rates
from archopt.lab.data import DataError, default_data_folder
from archopt.lab.errors import LabError, RecordError
from archopt.lab.experiment import WorkloadChoice, make_workload, workload_class
from archopt.lab.fid import INCEPTION_FILE
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.plan import Plan, RunSpec, plan_runs
from archopt.lab.record import FORMAT, explained, identity, read_json, stored_result, write_json
from archopt.lab.sweep import Follower, Outcome, check_jobs, run_planned
from archopt.lab.train import Settings

REPRODUCTION = "reproduction.json"
"""What a reproduction's folder says of itself: the parts, where they lie, and what the paper says."""


@dataclass(frozen=True)
class Part:
    """A comparison of a paper as a reproduction trains it."""

    comparison: NamedComparison
    beside: tuple[str, ...] = ("autonero", "agd")
    """Rules of our own that are trained beside the paper's."""
    over_rates: bool = False
    """It is about rates: all are tried in every preset."""
    reduced: tuple[str, ...] | None = None
    """The optimisers in presets other than `paper`, where they are fewer or have other rates."""
    reduced_seeds: tuple[int, ...] | None = None
    with_file: tuple[str, Mapping[str, Any]] | None = None
    """A file below the data folder, and options that preset `paper` gives its workloads where that file is."""

    @property
    def name(self) -> str:
        return self.comparison.name


@dataclass(frozen=True)
class Reproduction:
    """A paper's experiments."""

    name: str
    title: str
    parts: tuple[Part, ...]


MIXED_GAN = NamedComparison(
    name="gan-adam-discriminator",
    summary="AutoNero for the generator alone, Adam for the discriminator",
    source="not in the paper",
    workloads=("cifar10-gan(discriminator_optimizer='adam')",),
    optimizers=(),
    lrs=(),
    tuning_seeds=None,
)

FID = INCEPTION_FILE, {"features": "inception"}
"""What the paper measures; without the weights a classifier's distance stands in, under its own name."""

REPRODUCTIONS = {
    known.name: known
    for known in (
        Reproduction(
            "nero",
            "Learning by turning: neural architecture aware optimisation (arXiv:2102.07227)",
            (
                Part(COMPARISONS["reparameterisation"], beside=()),
                Part(
                    COMPARISONS["depth"],
                    beside=("autonero(radius='unit')", "agd"),
                    reduced=("nero(lr=[0.001,0.003])", "sgd", "adam", "lamb"),
                ),
                Part(COMPARISONS["cifar10"]),
                # Runs as short as `small` want larger rates than the paper's (results/language-small): both.
                Part(COMPARISONS["wikitext2"], reduced=("nero", "sgd", "adam(lr=[0.0001,0.001])", "lamb")),
                Part(
                    COMPARISONS["wikitext2-variants"],
                    beside=(),
                    reduced=("nero", "adam(lr=[0.0001,0.001])"),
                    reduced_seeds=(0,),
                ),
                Part(
                    COMPARISONS["translation"],
                    reduced=("nero(lr=[0.001,0.01])", "sgd", "adam(lr=[0.0001,0.001])", "lamb"),
                ),
                Part(COMPARISONS["imagenet"]),
                Part(COMPARISONS["gan"], with_file=FID),
                Part(MIXED_GAN, beside=("autonero",), with_file=FID),
                Part(COMPARISONS["pong"], beside=("autonero",), reduced=("nero", "adam"), reduced_seeds=(0,)),
                Part(COMPARISONS["ablation"], beside=(), over_rates=True),
                Part(COMPARISONS["granularity"], beside=(), over_rates=True),
            ),
        ),
        Reproduction(
            "agd",
            "Automatic gradient descent: deep learning without hyperparameters (arXiv:2304.05187)",
            (
                Part(COMPARISONS["agd-default"], beside=("agd",)),
                # 64 layers take four minutes a run in `small`; what trains at all is seen on one seed.
                Part(COMPARISONS["agd-showcase"], beside=("agd",), reduced_seeds=(0,)),
                # Against baselines that are tuned: their rates are tried in every preset.
                Part(COMPARISONS["agd-fcn"], beside=("agd",), over_rates=True),
                Part(COMPARISONS["agd-resnet18"], beside=("agd",), over_rates=True),
                Part(COMPARISONS["agd-vgg16"], beside=("agd",), over_rates=True),
                # A quarter of an hour a run in `small`, on pictures that are not the paper's.
                Part(COMPARISONS["agd-imagenet"], beside=("agd",), reduced_seeds=(0,)),
                Part(COMPARISONS["agd-optimizers"], beside=("agd",), over_rates=True),
                Part(COMPARISONS["agd-sweep"], beside=()),
                Part(COMPARISONS["agd-batches"], beside=()),
                Part(COMPARISONS["agd-rates"], beside=(), over_rates=True),
            ),
        ),
    )
}
"""By name. A new paper is a new entry."""


@dataclass(frozen=True)
class Request:
    """What is asked of a reproduction."""

    reproduction: Reproduction
    preset: str
    out: Path
    parts: tuple[str, ...] = ()
    """Names of the parts to train; all where empty. The page shows all that there are."""
    seeds: tuple[int, ...] | None = None
    """None: the paper's."""
    data: Path | None = None
    settings: Settings = field(default_factory=Settings)
    jobs: int | None = None
    command: str = ""


@dataclass
class _Planned:
    """A part that can be trained here."""

    part: Part
    plan: Plan
    specs: Sequence[RunSpec]


def part_plan(request: Request, part: Part) -> Plan:
    """The comparison that a part is, in its folder."""
    named, reduced = part.comparison, request.preset != PAPER
    optimizers = [*((reduced and part.reduced) or named.optimizers), *part.beside]
    seeds = request.seeds or (reduced and part.reduced_seeds) or named.seeds
    every_rate = part.over_rates or not reduced
    tuning = [seed for seed in named.tuning_seeds or () if seed in seeds] or seeds[:1]
    calls = [parse_call(text) for text in named.trained(request.preset).values()]
    more = {} if reduced or _lacks_file(request, part) or part.with_file is None else part.with_file[1]
    return Plan(
        workloads=[WorkloadChoice(call.name, request.preset, {**call.options, **more}) for call in calls],
        optimizers=[at_rates(text, named.lrs) if every_rate else text for text in optimizers],
        lrs="published",
        seeds=seeds,
        tuning_seeds=tuning if every_rate and named.tuning_seeds is not None and len(seeds) > 1 else (),
        out=request.out / part.name,
        data=request.data,
        settings=request.settings,
        jobs=request.jobs,
        command=f"{request.command} --parts {part.name}" if not request.parts else request.command,
    )


def _lacks_file(request: Request, part: Part) -> bool:
    folder = default_data_folder(request.data).path
    return part.with_file is not None and (folder is None or not (folder / part.with_file[0]).is_file())


def reproduce(request: Request, follower: Follower, said: Callable[[str], None]) -> Outcome:
    """Trains what has not been trained yet; `said` is told what begins and what cannot be trained here.

    A part whose data or packages are missing is left out, and the record says why. Raises LabError for an unknown
    part, RecordError where records cannot be written or are of other runs, KeyboardInterrupt as `sweep` does.
    """
    check_jobs(request.jobs)
    _check_folder(request)
    wanted = _wanted(request)
    planned, refused = [], {}
    for part in wanted:
        plan = part_plan(request, part)
        if part.with_file is not None and request.preset == PAPER and _lacks_file(request, part):
            said(f"{part.name} is not measured as published: {part.with_file[0]} is not in the data folder")
        try:
            planned.append(_Planned(part, plan, plan_runs(plan)))
        except RecordError:
            raise
        except (DataError, LabError) as error:
            refused[part.name] = " ".join(str(error).split())
            said(f"{part.name} is left out: {refused[part.name]}")
    _write_record(request, planned, refused)
    total = Outcome()
    for stage, seeds in _stages(planned):
        said(f"{stage.part.name}, {_seeds_in_words(seeds)}")
        _share(stage, planned)
        run_planned(stage.plan, stage.specs, follower, total, seeds)
    return total


def _check_folder(request: Request) -> None:
    """Refuses a folder that holds another paper's runs or another preset's, which one page cannot show."""
    path = request.out / REPRODUCTION
    if not path.exists():
        return
    there = read_json(path)
    asked = {"name": request.reproduction.name, "preset": request.preset}
    for key, value in asked.items():
        if there.get(key) != value:
            raise RecordError(
                f"{request.out} holds a reproduction with {key} {there.get(key)!r}, not {value!r}; choose another "
                "folder with --out"
            )


def _wanted(request: Request) -> list[Part]:
    known = {part.name: part for part in request.reproduction.parts}
    for name in request.parts:
        if name not in known:
            raise LabError(f"{request.reproduction.name} has no part {name!r} (there are {', '.join(known)})")
    return [part for name, part in known.items() if not request.parts or name in request.parts]


def _stages(planned: Sequence[_Planned]) -> Iterator[tuple[_Planned, Sequence[int]]]:
    """What to train, and which of its seeds, in order."""
    for over_rates in (False, True):
        parts = [known for known in planned if known.part.over_rates == over_rates]
        for known in parts:
            yield known, known.plan.tuning_seeds or known.plan.seeds[:1]
        for known in parts:
            if len(known.plan.seeds) > 1:
                yield known, known.plan.seeds


def _seeds_in_words(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def _share(stage: _Planned, planned: Sequence[_Planned]) -> None:
    """Copies runs that another part has trained already."""
    for spec in stage.specs:
        if (spec.path / "config.json").exists():
            continue
        asked = identity(spec.config)
        for other in (other for known in planned if known is not stage for other in known.specs):
            if identity(other.config) == asked and stored_result(other.path, other.config) is not None:
                temporary = spec.path.with_name(spec.path.name + ".tmp")
                with explained(spec.path):
                    shutil.rmtree(temporary, ignore_errors=True)
                    shutil.copytree(other.path, temporary)
                    temporary.rename(spec.path)
                break


# -- the record --------------------------------------------------------------------------------------------


def _write_record(request: Request, planned: Sequence[_Planned], refused: dict[str, str]) -> None:
    with explained(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "name": request.reproduction.name,
        "title": request.reproduction.title,
        "preset": request.preset,
        "command": request.command,
        "parts": [
            _describe(request, part, refused.get(part.name, "")) for part in request.reproduction.parts
        ],
    }
    write_json(request.out / REPRODUCTION, content)


def _describe(request: Request, part: Part, refused: str) -> dict[str, Any]:
    named = part.comparison
    return {
        "name": part.name,
        "summary": named.summary,
        "source": named.source,
        "seen": list(named.seen),
        "refused": refused,
        "workloads": [
            {
                "name": workload_class((call := parse_call(text)).name).name,
                "changed": call.options,
                "metric": asdict(
                    make_workload(workload_class(call.name), request.preset, call.options).metric
                ),
                "deviations": deviations(text, request.preset, named.paper_options),
                "published": [
                    {
                        "optimizer": parse_optimizer(reading.optimizer).label,
                        "lr": reading.lr,
                        "mean": reading.mean,
                        "deviation": reading.deviation,
                        "metric": reading.metric,
                        "best": reading.best,
                    }
                    for reading in named.published
                    if reading.workload == text
                ],
                "first_epoch": [
                    {
                        "optimizer": parse_optimizer(seen.optimizer).label,
                        "number": seen.number,
                        "value": seen.value,
                    }
                    for seen in named.first_epoch
                    if seen.workload == text
                ],
            }
            for text in named.trained(request.preset)
        ],
    }


def deviations(
    workload: str, preset: str, paper_options: Mapping[str, Any] | None = None
) -> dict[str, list[Any]]:
    """The options in which a preset differs from `paper`, which has `paper_options` over the workload's own: the
    paper's value and the preset's, None where the others make an option mean nothing."""
    call = parse_call(workload)
    cls = workload_class(call.name)
    paper = make_workload(cls, PAPER, {**call.options, **(paper_options or {})})
    here = paper if preset == PAPER else make_workload(cls, preset, call.options)
    pairs = {
        option.name: [
            None if option.name in where.unheeded else getattr(where, option.name) for where in (paper, here)
        ]
        for option in dataclasses.fields(cls)
        if option.init
    }
    return {name: values for name, values in pairs.items() if values[0] != values[1]}
