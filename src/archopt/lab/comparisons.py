"""The comparisons that papers publish, by name: `archopt compare ablation` trains what the figure shows.

A comparison is data: workloads, optimisers, learning rates, seeds, and the readings that the paper gives. Options
on the command line win over it. All rates are tried on the tuning seeds; the others run the best one, and the
optimiser's default where that is among the rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archopt.lab.calls import Call
from archopt.lab.optimizers import parse_optimizer


@dataclass(frozen=True)
class Reading:
    """What a paper says of one optimiser on one workload: the best rate and, where it is told, the metric there."""

    workload: str
    optimizer: str
    lr: float
    mean: float | None = None
    """Of the workload's metric over the seeds; shares as fractions."""
    deviation: float | None = None
    """Standard deviation of the population of seeds."""


@dataclass(frozen=True)
class NamedComparison:
    """Everything that `archopt compare` needs to know but the preset."""

    name: str
    summary: str
    """One line for `archopt list`."""
    source: str
    """Paper and figure or table."""
    workloads: tuple[str, ...]
    optimizers: tuple[str, ...]
    """With their options, as on the command line; an entry with rates in its brackets keeps those."""
    lrs: tuple[float, ...]
    """What every other entry that has a rate is run at."""
    published: tuple[Reading, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] | None = (0,)
    """None: all seeds run all rates."""


def at_rates(optimizer: str, lrs: tuple[float, ...]) -> str:
    """An optimiser as the command line spells it, run at these rates alone; its own ones win, and having none.

    Raises LabError for what is no optimiser.
    """
    choice = parse_optimizer(optimizer)
    if choice.own_lrs or not choice.entry.rate:
        return optimizer
    return str(Call(choice.entry.name, {**choice.options, "lr": list(lrs)}))


NERO = "Nero, arXiv:2102.07227"
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FINE = (0.01, 0.02, 0.04, 0.06, 0.08, 0.10)
FREE, CENTRED, NORMED = (
    "nero(unit_norm=False,zero_mean=False)",
    "nero(unit_norm=False)",
    "nero(zero_mean=False)",
)
VGG11, RESNET18, RESNET50 = "cifar10-vgg11", "cifar10-resnet18", "imagenet-resnet50"


def _best(workload: str, rates: Mapping[str, float]) -> tuple[Reading, ...]:
    """Readings of which the paper gives the best rate alone."""
    return tuple(Reading(workload, optimizer, lr) for optimizer, lr in rates.items())


COMPARISONS = {
    known.name: known
    for known in (
        NamedComparison(
            name="ablation",
            summary="Nero with both of its constraints, with either, and with none, on VGG-11",
            source=f"{NERO}, figure 1",
            workloads=(VGG11,),
            optimizers=("nero", NORMED, CENTRED, FREE),
            lrs=FINE,
            published=_best(VGG11, {"nero": 0.02, NORMED: 0.02, CENTRED: 0.01, FREE: 0.02}),
        ),
        NamedComparison(
            name="granularity",
            summary="one step size a synapse, a neuron or a layer, with Nero's constraints and without, on VGG-11",
            source=f"{NERO}, figure 2",
            workloads=(VGG11,),
            # LAMB without momentum is the workload's own setting.
            optimizers=("madam", FREE, "lamb", "madam-cs", "nero", "lamb-cs"),
            lrs=FINE,
            published=_best(
                VGG11,
                {"madam": 0.02, FREE: 0.02, "lamb": 0.02, "madam-cs": 0.06, "nero": 0.02, "lamb-cs": 0.06},
            ),
        ),
        NamedComparison(
            name="cifar10",
            summary="Nero, SGD, Adam and LAMB on VGG-11 and ResNet-18",
            source=f"{NERO}, figure 6",
            workloads=(VGG11, RESNET18),
            optimizers=("nero", "sgd", "adam", "lamb"),
            lrs=DECADES,
            published=(
                Reading(VGG11, "nero", 0.01, 0.1116, 0.0017),
                Reading(VGG11, "sgd", 0.1, 0.1261, 0.0021),
                Reading(VGG11, "adam", 0.001, 0.1286, 0.0034),
                Reading(VGG11, "lamb", 0.01, 0.1366, 0.0005),
                Reading(RESNET18, "nero", 0.01, 0.0575, 0.0007),
                Reading(RESNET18, "sgd", 0.1, 0.0775, 0.0017),
                Reading(RESNET18, "adam", 0.01, 0.0593, 0.0019),
                Reading(RESNET18, "lamb", 0.1, 0.0646, 0.0012),
            ),
        ),
        NamedComparison(
            name="imagenet",
            summary="Nero at both published rates, SGD with and without weight decay, on ResNet-50",
            source=f"{NERO}, figure 4",
            workloads=(RESNET50,),
            # The figure's script says 0.1, its README and the default 0.01 (spec 5): both.
            optimizers=("nero(lr=[0.01,0.1])", "sgd", "sgd(weight_decay=0)"),
            lrs=(0.1,),
            tuning_seeds=None,
        ),
    )
}
"""By name, in the order in which they are listed."""


def spelled(comparison: NamedComparison) -> dict[str, Any]:
    """A comparison's options as `archopt compare` takes them, by the names that they have there."""
    lists = {name: ",".join(map(str, getattr(comparison, name))) for name in ("optimizers", "lrs", "seeds")}
    tuning = comparison.tuning_seeds
    given = {"tuning_seeds": ",".join(map(str, tuning))} if tuning is not None else {}
    return {"workloads": comparison.workloads, **lists, **given}
