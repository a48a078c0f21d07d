"""The comparisons that papers publish, by name: `archopt compare ablation` trains what the figure shows.

A comparison is data: workloads, optimisers, learning rates, seeds, and the readings that the paper gives. Options
on the command line win over it. All rates are tried on the tuning seeds; the others run the best one, and the
optimiser's default where that is among the rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from archopt.lab.calls import Call, parse_call
from archopt.lab.optimizers import parse_optimizer

PAPER = "paper"
"""The preset of the published experiment."""


@dataclass(frozen=True)
class Reading:
    """What a paper says of one optimiser on one workload: the best rate and, where it is told, the metric there."""

    workload: str
    optimizer: str
    lr: float | None
    """None: not told, or the rule has none."""
    mean: float | None = None
    """Of the workload's metric over the seeds; shares as fractions."""
    deviation: float | None = None
    """Standard deviation of the population of seeds."""
    metric: str = ""
    """Key of the metric in which the paper gives it, where that is not the workload's usual one."""
    best: bool = False
    """Whether it is the best value on the way rather than the last one."""


@dataclass(frozen=True)
class FirstEpoch:
    """What a paper's figure shows of the steps of the first epoch, read off to 10 or 20 %."""

    workload: str
    optimizer: str
    number: str
    """`eta`, the automatic step size, or `update`, the relative update; its mean over the epoch."""
    value: float


@dataclass(frozen=True)
class NamedComparison:
    """Everything that `archopt compare` needs to know but the preset."""

    name: str
    summary: str
    """One line for `archopt list`."""
    source: str
    """Paper and figure or table."""
    workloads: tuple[str, ...]
    """With their options, as on the command line."""
    optimizers: tuple[str, ...]
    """With their options, as on the command line; an entry with rates in its brackets keeps those."""
    lrs: tuple[float, ...]
    """What every other entry that has a rate is run at."""
    published: tuple[Reading, ...] = ()
    first_epoch: tuple[FirstEpoch, ...] = ()
    seen: tuple[str, ...] = ()
    """What its figures show beside these numbers, read off to 10 or 20 %."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] | None = (0,)
    """None: all seeds run all rates."""
    paper_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of all workloads in preset `paper` alone, where the figure is of longer runs than the workload's."""
    paper_alone: tuple[str, ...] = ()
    """Those of the workloads that are trained in preset `paper` alone, since no reduction makes them small."""

    def trained(self, preset: str) -> dict[str, str]:
        """The workloads of a preset as they are trained, by how `workloads` and the readings spell them."""
        if preset != PAPER:
            return {text: text for text in self.workloads if text not in self.paper_alone}
        calls = {text: parse_call(text) for text in self.workloads}
        return {
            text: str(Call(call.name, {**call.options, **self.paper_options})) if self.paper_options else text
            for text, call in calls.items()
        }


def at_rates(optimizer: str, lrs: tuple[float, ...]) -> str:
    """An optimiser as the command line spells it, run at these rates alone; its own ones win, and having none.

    Raises LabError for what is no optimiser.
    """
    choice = parse_optimizer(optimizer)
    if choice.own_lrs or not choice.entry.rate:
        return optimizer
    return str(Call(choice.entry.name, {**choice.options, "lr": list(lrs)}))


NERO, AGD = "Nero, arXiv:2102.07227", "AGD, arXiv:2304.05187"
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FINE = (0.01, 0.02, 0.04, 0.06, 0.08, 0.10)
FREE, CENTRED, NORMED = (
    "nero(unit_norm=False,zero_mean=False)",
    "nero(unit_norm=False)",
    "nero(zero_mean=False)",
)
VGG11, RESNET18, RESNET50 = "cifar10-vgg11", "cifar10-resnet18", "imagenet-resnet50"
CWN, CWN_100 = "mnist-cwn", "mnist-cwn(sigma=100.0)"
BENCHMARK = ("nero", "sgd", "adam", "lamb")

TUNED = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # the rates on which AGD's paper tunes its baselines
WIDE = (1e-7, 1e-6, *TUNED, 1.0, 10.0)
UNTUNED = ("agd-paper", "adam(lr=0.001)", "sgd(lr=0.1)")
FCN, CONV18 = "classify(depth=16,width=512)", "classify(arch='resnet18')"
CONV16 = "classify(arch='vgg16',dataset='cifar100')"
PHOTOGRAPHS = "classify(arch='resnet50',dataset='imagenet',objective='xent')"
SHOWCASE, DEEPER = "classify(depth=32)", "classify(depth=64)"
FCN8 = "classify(depth=8,updates_every=1)"
BATCHES = {32: 0.550, 128: 0.580, 1024: 0.600, 4096: 0.598}  # with AGD's accuracies
DEPTHS, WIDTHS, LARGE_WIDTHS = (2, 4, 8, 16, 32), (64, 128, 256, 512), (1024, 2048)


def _best(workload: str, rates: Mapping[str, float]) -> tuple[Reading, ...]:
    """Readings of which the paper gives the best rate alone."""
    return tuple(Reading(workload, optimizer, lr) for optimizer, lr in rates.items())


def _means(workload: str, metric: str = "", **readings: tuple[float, float, float]) -> tuple[Reading, ...]:
    """Readings (best rate, mean, deviation) by optimiser."""
    return tuple(
        Reading(workload, optimizer, lr, mean, deviation, metric)
        for optimizer, (lr, mean, deviation) in readings.items()
    )


def _square(depth: int, width: int) -> str:
    return f"classify(depth={depth},width={width})"


def _batches(size: int) -> str:
    return f"classify(depth=4,train_bs={size})"


def _agd(workload: str, agd: float, *, best: bool = False, **others: float) -> tuple[Reading, ...]:
    """Readings of AGD and of others whose best rate the paper does not tell."""
    means = {"agd-paper": agd, **others}
    return tuple(Reading(workload, optimizer, None, mean, best=best) for optimizer, mean in means.items())


def _first_etas(values: Mapping[str, float]) -> tuple[FirstEpoch, ...]:
    """AGD's step size in the first epoch, by workload."""
    return tuple(FirstEpoch(workload, "agd-paper", "eta", value) for workload, value in values.items())


def _benchmark(
    name: str,
    on: str,
    figure: str,
    workload: str,
    lrs: tuple[float, ...] = DECADES,
    metric: str = "",
    seen: tuple[str, ...] = (),
    **readings: tuple[float, float, float],
) -> NamedComparison:
    """The comparison that Nero's paper makes on every task, with its readings as `_means` has them."""
    return NamedComparison(
        name=name,
        summary=f"Nero, SGD, Adam and LAMB {on}",
        source=f"{NERO}, {figure}",
        workloads=(workload,),
        optimizers=BENCHMARK,
        lrs=lrs,
        published=_means(workload, metric, **readings),
        seen=seen,
    )


def _agd_against_tuned(
    name: str,
    network: str,
    data: str,
    workload: str,
    *,
    agd: float,
    adam: float,
    eta: float,
    seen: tuple[str, ...],
) -> NamedComparison:
    """One network of the main comparison of AGD's paper."""
    return NamedComparison(
        name=name,
        summary=f"AGD and tuned Adam on {network}",
        source=f"{AGD}, the main comparison on {data}",
        workloads=(workload,),
        optimizers=("agd-paper", "adam", "sgd"),
        lrs=TUNED,
        published=_agd(workload, agd, adam=adam),
        first_epoch=_first_etas({workload: eta}),
        seen=seen,
        paper_options={"epochs": 2000},
    )


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
            name="reparameterisation",
            summary="a network of centred, normalised weights from initial weights of size 1 and of size 100",
            source=f"{NERO}, figure 3, left",
            workloads=(CWN, CWN_100),
            optimizers=("adam",),
            lrs=(0.01,),
            published=(Reading(CWN, "adam", 0.01, 0.99240), Reading(CWN_100, "adam", 0.01, 0.92214)),
            tuning_seeds=None,
        ),
        _benchmark(
            "depth",
            "on 100 layers without normalisation or skips",
            "figure 3, right",
            "mnist-mlp100",
            lrs=DECADES[:-1],
            # LAMB's and Adam's first moment is at its usual 0.9 here alone (spec 10).
            nero=(0.001, 0.93247, 0.04284),
            sgd=(0.1, 0.112367, 0.0),
            adam=(0.001, 0.112367, 0.0),
            lamb=(0.01, 0.69912, 0.0222),
        ),
        _benchmark(
            "gan",
            "for both networks of a class-conditional GAN",
            "figure 5",
            "cifar10-gan",
            metric="fid_test",
            seen=("distances after 120 epochs of 121, an epoch before the end that ours are of",),
            nero=(0.01, 15.43, 0.37),
            sgd=(0.01, 33.06, 0.42),
            adam=(1e-4, 23.42, 0.85),
            lamb=(0.01, 16.32, 0.23),
        ),
        NamedComparison(
            name="cifar10",
            summary="Nero, SGD, Adam and LAMB on VGG-11 and ResNet-18",
            source=f"{NERO}, figure 6",
            workloads=(VGG11, RESNET18),
            optimizers=BENCHMARK,
            lrs=DECADES,
            published=(
                *_means(
                    VGG11,
                    nero=(0.01, 0.1116, 0.0017),
                    sgd=(0.1, 0.1261, 0.0021),
                    adam=(0.001, 0.1286, 0.0034),
                    lamb=(0.01, 0.1366, 0.0005),
                ),
                *_means(
                    RESNET18,
                    nero=(0.01, 0.0575, 0.0007),
                    sgd=(0.1, 0.0775, 0.0017),
                    adam=(0.01, 0.0593, 0.0019),
                    lamb=(0.1, 0.0646, 0.0012),
                ),
            ),
        ),
        _benchmark(
            "wikitext2",
            "on a word-level transformer",
            "figure 7",
            "wikitext2-transformer",
            nero=(0.01, 172.99, 0.51),
            sgd=(1.0, 181.76, 0.49),
            adam=(1e-4, 178.05, 0.96),
            lamb=(0.01, 200.54, 0.53),
        ),
        NamedComparison(
            name="wikitext2-variants",
            summary="what the paper leaves open of the word-level transformer: layer norms, the older drop",
            source=f"{NERO}, figure 7; no readings",
            workloads=(
                "wikitext2-transformer(norm=True)",
                "wikitext2-transformer(lr_drop='unless-best')",
            ),
            optimizers=("nero", "adam"),
            lrs=DECADES[:-1],
        ),
        _benchmark(
            "translation",
            "on a translating transformer",
            "figure 8",
            "multi30k-transformer",
            nero=(1e-3, 11.351, 1.204),
            sgd=(1e-4, 92.404, 89.485),
            adam=(1e-4, 12.632, 0.335),
            lamb=(0.01, 16.355, 0.289),
        ),
        _benchmark(
            "pong",
            "for PPO on Atari Pong",
            "figure 9",
            "pong-ppo",
            nero=(0.01, 20.62, 0.05),
            sgd=(0.1, 11.99, 8.65),
            adam=(1e-4, 15.92, 3.40),
            lamb=(1e-3, -19.46, 0.10),
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
        NamedComparison(
            name="agd-default",
            summary="AGD's program with no option set, and on MNIST",
            source=f"{AGD}, its program's defaults; no readings",
            workloads=("classify", "classify(dataset='mnist')"),
            optimizers=UNTUNED,
            lrs=TUNED,
            tuning_seeds=None,
        ),
        _agd_against_tuned(
            "agd-fcn",
            "a fully connected network of 16 layers",
            "CIFAR-10",
            FCN,
            agd=0.527,
            adam=0.535,
            eta=0.12,
            seen=(
                "eta 0.12 at epoch 1, 0.5 near epoch 200, 0.03 at the end (its band there 0.003 to 0.2)",
                "training loss from 1 to 0.003; training accuracy 100 % by epoch 700",
            ),
        ),
        _agd_against_tuned(
            "agd-resnet18",
            "ResNet-18",
            "CIFAR-10",
            CONV18,
            agd=0.912,
            adam=0.929,
            eta=0.15,
            seen=(
                "eta 0.15 at epoch 1, falling to 0.1, rising to 0.3, 0.03 at the end",
                "training loss 3e-4 to 1e-3 at the end; training accuracy nearly 100 % by epoch 150 to 200",
            ),
        ),
        _agd_against_tuned(
            "agd-vgg16",
            "VGG-16",
            "CIFAR-100",
            CONV16,
            agd=0.674,
            adam=0.697,
            eta=0.4,
            seen=(
                "eta 0.4 at epoch 1, falling to 0.15, rising to 0.35, 0.03 at the end",
                "training accuracy 100 % at epoch 100 to 150",
            ),
        ),
        NamedComparison(
            name="agd-imagenet",
            summary="AGD and SGD at a fixed rate on ResNet-50",
            source=f"{AGD}, ImageNet",
            workloads=(PHOTOGRAPHS,),
            optimizers=("agd-paper", "sgd(lr=0.1)"),
            lrs=TUNED,
            published=_agd(PHOTOGRAPHS, 0.655),
            first_epoch=_first_etas({PHOTOGRAPHS: 0.35}),
            seen=(
                "eta 0.3 to 0.4 throughout; training accuracy 69 %, test accuracy 65 % at epoch 350",
                "SGD at a fixed rate of 0.1: training accuracy 82 %, test accuracy 50 to 55 % and noisy",
            ),
            tuning_seeds=None,
            paper_options={"train_bs": 1024, "test_bs": 1024, "epochs": 350},
        ),
        NamedComparison(
            name="agd-showcase",
            summary="nothing tuned on a fully connected network of 32 layers, and of 64",
            source=f"{AGD}, the first figure, read off to a fifth; the paper has no 64 layers",
            workloads=(SHOWCASE, DEEPER),
            optimizers=UNTUNED,
            lrs=TUNED,
            published=(
                Reading(SHOWCASE, "agd-paper", None, 0.50),
                Reading(SHOWCASE, "adam(lr=0.001)", 0.001, 0.10),
                Reading(SHOWCASE, "sgd(lr=0.1)", 0.1, 0.10),
            ),
            seen=("training accuracy of AGD 98 % after 1,000 epochs, of both others 10 %",),
            tuning_seeds=None,
            paper_options={"epochs": 1000},
        ),
        NamedComparison(
            name="agd-rates",
            summary="Adam and SGD over eight decades of learning rates on ResNet-18, AGD beside them",
            source=f"{AGD}, the grid of learning rates",
            workloads=(CONV18,),
            optimizers=("agd-paper", "adam", "sgd"),
            lrs=WIDE,
            seen=(
                "Adam is good from 5e-6 to 1e-3 and collapses from 1e-2 on; SGD is good from 1e-3 to 5e-2 and "
                "collapses at 0.1",
            ),
            seeds=(0,),
            tuning_seeds=None,
        ),
        NamedComparison(
            name="agd-optimizers",
            summary="AGD, Adam and SGD on a fully connected network of 8 layers, with their relative updates",
            source=f"{AGD}, the comparison of optimisers; training losses read off to a fifth",
            workloads=(FCN8,),
            optimizers=("agd-paper", "adam", "sgd"),
            lrs=TUNED,
            published=(
                Reading(FCN8, "agd-paper", None, 0.04, metric="train_loss"),
                Reading(FCN8, "adam", 1e-4, 0.03, metric="train_loss"),
                Reading(FCN8, "sgd", 0.1, 0.14, metric="train_loss"),
            ),
            first_epoch=tuple(
                FirstEpoch(FCN8, optimizer, "update", value)
                for optimizer, value in {"agd-paper": 2e-3, "adam": 2e-3, "sgd": 4e-3}.items()
            ),
            seen=(
                "relative update: AGD 2e-3, then 3e-3, at the end 2e-3; Adam from 2e-3 to 3e-4; SGD from 4e-3 to "
                "1e-2",
            ),
            paper_options={"epochs": 2000},
        ),
        NamedComparison(
            name="agd-sweep",
            summary="AGD over the depth and the width of fully connected networks",
            source=f"{AGD}, the sweep of architectures; best accuracies over the epochs, the two that are told",
            workloads=tuple(_square(depth, width) for depth in DEPTHS for width in (*WIDTHS, *LARGE_WIDTHS)),
            optimizers=("agd-paper",),
            lrs=TUNED,
            published=(
                *_agd(_square(2, 64), 0.4255, best=True),
                *_agd(_square(4, 2048), 0.637, best=True),
            ),
            seen=("the wider the better in training; 8 and 16 layers train better than 32",),
            seeds=(0,),
            tuning_seeds=None,
            paper_options={"epochs": 2000},
            paper_alone=tuple(_square(depth, width) for depth in DEPTHS for width in LARGE_WIDTHS),
        ),
        NamedComparison(
            name="agd-batches",
            summary="AGD over the batch size on a fully connected network of 4 layers",
            source=f"{AGD}, the sweep of batch sizes, each about 500,000 steps",
            workloads=tuple(_batches(size) for size in BATCHES),
            optimizers=("agd-paper",),
            lrs=TUNED,
            published=tuple(
                reading for size, mean in BATCHES.items() for reading in _agd(_batches(size), mean)
            ),
            seen=(
                "eta dips early, to 0.2 at batches of 32, 0.06 at 1,024 and 0.05 at 4,096, and recovers to 0.3",
            ),
            seeds=(0,),
            tuning_seeds=None,
            paper_options={"iterations": 500_000},
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
