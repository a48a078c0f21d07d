"""What is measured: ours in their forms, torch's, any peer, and the two limits."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from archopt import AGD, AutoNero, Lamb, Madam, Nero, kernels
from archopt.lab.errors import LabError
from archopt.lab.muon import MuonWithAdamW
from archopt.lab.optimizers import ENTRIES, parse_optimizer
from archopt.lab.speed.streams import Streams
from archopt.optim import orthogonalise
from archopt.optim.base import nearest

Build = Callable[..., Optimizer]

NOTHING = Streams(0)

IDENTITY = "none"
"""The name under which AutoNero finds the identity in place of its orthogonalisation, while it is measured so."""


@dataclass(frozen=True)
class Contender:
    """A rule in one form. `build` takes the module, and options where the form is to be found out."""

    name: str
    what: str
    build: Build
    form: str | None = None
    """foreach, plain or fused; None: the rule chooses (`fused=None`), and `form_of` tells what it chose."""
    streams: str | None = None
    """Key of `STREAMS`; None where memory sets no bound that we know."""
    state: Streams = NOTHING
    transient: Streams = NOTHING
    """State and, generously, what a step allocates beside it: to know before whether it fits."""
    style: str = ""
    """Whose colour it has in pictures, as the laboratory's optimisers are called."""
    identity: bool = False
    """Whether orthogonalisation is to be replaced by the identity while it is built and measured."""

    @contextlib.contextmanager
    def circumstances(self) -> Iterator[None]:
        """What must be so while it is built and steps."""
        if not self.identity:
            yield
            return
        orthogonalise.METHODS[IDENTITY] = lambda matrices: matrices
        try:
            yield
        finally:
            del orthogonalise.METHODS[IDENTITY]


def _adamw(model: nn.Module, **form: Any) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), **form)


def _sgd(model: nn.Module, **form: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, **form)


def _agd_published(model: nn.Module, **options: Any) -> Optimizer:
    return AGD([param for param in model.parameters() if param.ndim >= 2], **options)


def _muon(model: nn.Module) -> Optimizer:
    if why := ENTRIES["muon"].unavailable:
        raise LabError(why)
    on_cpu = next(model.parameters()).device.type == "cpu"  # where bfloat16 products take ten times longer
    optimizer = MuonWithAdamW(model, products="float32" if on_cpu else "bfloat16")
    for name, inner in optimizer.inner.items():
        if name == "adamw":
            inner.param_groups[0]["fused"] = True  # before its first step, which creates state accordingly
    return optimizer


EXACT = Streams(0, 1)
CONTENDERS = {
    c.name: c
    for c in (
        Contender("nero", "Nero(model)", Nero, None, "nero", transient=Streams(0, 3), style="nero"),
        Contender(
            "nero-foreach",
            "Nero(model, foreach=True)",
            lambda model: Nero(model, foreach=True),
            "foreach",
            "nero",
            transient=Streams(0, 3),
            style="nero",
        ),
        Contender(
            "nero-plain",
            "Nero(model, foreach=False, fused=False)",
            lambda model: Nero(model, foreach=False, fused=False),
            "plain",
            "nero",
            transient=EXACT,
            style="nero",
        ),
        Contender(
            "agd-published",
            "AGD(the tensors of two and more dimensions): the published rule, which refuses vectors",
            _agd_published,
            None,
            "agd",
            transient=Streams(0, 3),
            style="agd",
        ),
        Contender(
            "autonero",
            "AutoNero(model), its orthogonalisation included",
            AutoNero,
            state=Streams(0, 2),
            transient=Streams(0, 2),
            style="autonero",
        ),
        Contender(
            "autonero-bfloat16",
            "AutoNero(model, orthogonalise='newton-schulz-bfloat16'): matrix products as Muon forms them",
            lambda model, **options: AutoNero(model, orthogonalise="newton-schulz-bfloat16", **options),
            state=Streams(0, 2),
            transient=Streams(0, 2),
            style="autonero",
        ),
        Contender(
            "autonero-turn",
            "AutoNero(model) with the identity in place of its orthogonalisation",
            lambda model, **options: AutoNero(model, orthogonalise=IDENTITY, **options),
            streams="autonero-turn",
            state=Streams(0, 2),
            transient=Streams(0, 2),
            style="autonero",
            identity=True,
        ),
        Contender("lamb", "Lamb(model)", Lamb, None, "lamb", Streams(0, 2), Streams(0, 4), style="lamb"),
        Contender("madam", "Madam(model)", Madam, None, "madam", Streams(0, 1), Streams(0, 4), style="madam"),
        Contender(
            "sgd-foreach",
            "torch.optim.SGD(foreach=True)",
            lambda model: _sgd(model, foreach=True),
            "foreach",
            "sgd",
            transient=Streams(1),
            style="sgd",
        ),
        Contender(
            "sgd-fused",
            "torch.optim.SGD(fused=True)",
            lambda model: _sgd(model, fused=True),
            "fused",
            "sgd",
            style="sgd",
        ),
        Contender(
            "adamw-foreach",
            "torch.optim.AdamW(foreach=True)",
            lambda model: _adamw(model, foreach=True),
            "foreach",
            "adamw",
            Streams(2),
            Streams(2),
            style="adamw",
        ),
        Contender(
            "adamw-fused",
            "torch.optim.AdamW(fused=True)",
            lambda model: _adamw(model, fused=True),
            "fused",
            "adamw",
            Streams(2),
            style="adamw",
        ),
        Contender(
            "muon",
            "torch.optim.Muon on hidden matrices and convolutions (on a CPU our form of it with float32 products), "
            "AdamW(fused=True) on the rest",
            _muon,
            "its own",
            state=Streams(2),
            transient=Streams(2),
            style="muon",
        ),
    )
}

ADD, COPY = "add_", "copy"
LIMITS = {
    COPY: "a.copy_(b), as many entries as the set has",
    ADD: "a.add_(b), as many entries as the set has",
}
REFERENCE = "adamw-fused"


def choose(names: list[str] | None, peers: list[str]) -> list[Contender]:
    """The contenders of these names (None: all) and the peers. Raises LabError for a name that is none."""
    for name in names or ():
        if name not in CONTENDERS:
            raise LabError(
                f"nothing is measured by the name {name!r}{nearest(name, CONTENDERS)} (there are "
                f"{', '.join(CONTENDERS)}; others by --peer package.module:Class)"
            )
    chosen = [c for name, c in CONTENDERS.items() if names is None or name in names]
    return [*chosen, *map(peer, peers)]


def peer(text: str) -> Contender:
    """Another project's optimiser, `package.module:Class` with options where wanted; it gets the parameters, or the
    module if its first argument is called `model`. Raises LabError where it cannot be had."""
    choice = parse_optimizer(text)
    choice.entry.cls  # noqa: B018  (imported now: before anything is measured)
    return Contender(
        choice.label,
        f"another project's {choice.label}",
        lambda model: choice.build(model, choice.default_lr, {}),
        "its own",
        state=Streams(0, 2),
        transient=Streams(0, 3),
    )


def form_of(contender: Contender, build: Callable[..., Any], device: torch.device) -> str:
    """In words, which form serves where the rule chooses: found by insisting on the fused one.

    build: takes options, builds the optimiser and takes a step.
    """
    if contender.form is not None:
        return contender.form
    if "fused" not in inspect.signature(contender.build).parameters and not _takes_any(contender.build):
        return "its own"
    try:
        build(fused=True)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        return f"foreach, at least in part ({reason})"
    details = {name: status.detail for name, status in kernels.status().items()}
    mine = [text for name, text in details.items() if (name == "cpu") == (device.type == "cpu")]
    return f"fused ({'; '.join(mine)})" if mine else "fused"


def _takes_any(build: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(build).parameters.values())


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """What an optimiser trains."""
    return [param for group in optimizer.param_groups for param in group["params"]]
