"""The optimisers that can be compared, by name. A name never changes its meaning.

An entry says how the laboratory builds one for a model, what its learning rate is by default, and whether it has
one at all. Anything else that is a `torch.optim.Optimizer` is named by `package.module:Class` or
`./file.py:Class`; it receives `model.parameters()`, or the module if its first parameter is called `model`.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from archopt.lab.calls import Call, file_sha256, parse_call
from archopt.lab.errors import LabError
from archopt.lab.user_files import is_file, load_object
from archopt.optim.base import nearest

Build = Callable[[type[Optimizer], nn.Module, dict[str, Any]], Optimizer]


def from_parameters(cls: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> Optimizer:
    """As torch.optim builds its own: the parameters, all alike."""
    return cls(model.parameters(), **options)


def from_named_parameters(cls: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> Optimizer:
    """The parameters, all alike, with their names for messages."""
    return cls(model.named_parameters(), **options)


def from_module(cls: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> Optimizer:
    """The module, so that the rule reads the roles of its parameters."""
    return cls(model, **options)  # type: ignore[arg-type]


def after_orthogonal_init(cls: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> Optimizer:
    """The published AGD: the initial weights are AGD's own."""
    importlib.import_module("archopt.init").orthogonal_(model)
    return cls(model.named_parameters(), **options)


def constrained(cls: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> Optimizer:
    """The rule with Nero's two constraints after every step."""
    constrain = importlib.import_module("archopt.optim.constrain").constrain
    optimizer: Optimizer = constrain(cls(model.parameters(), **options))
    return optimizer


@dataclass(frozen=True)
class Entry:
    """An optimiser that the laboratory knows. `home` is `module:Class`, imported when it is needed."""

    name: str
    description: str
    home: str
    build: Build = from_parameters
    default_lr: float | None = None
    """None: the one in the constructor's signature."""
    rate: bool = True
    """Whether it has a learning rate. Without one it takes no `lr` and follows no schedule."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options in which the entry differs from the constructor's defaults."""
    joined_later: Mapping[str, Any] = field(default_factory=dict)
    """Options that the optimiser got after runs of it had been stored, each with the value that those runs had. At
    that value they stay out of the record, so that those runs keep their identity."""
    needs_torch: tuple[int, int] = (2, 7)
    peer: bool = False
    """Whether it is another project's, which the extra `archopt[peers]` installs."""
    source: str | None = None
    """Checksum of the user's file that it comes from."""

    @property
    def package(self) -> str | None:
        """The other project's package that it comes from, where it does."""
        return self.home.partition(":")[0] if self.peer else None

    @property
    def unavailable(self) -> str | None:
        """Why it cannot be used here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.name} needs the package {self.package}: pip install 'archopt[peers]'"
        if _torch_version() >= self.needs_torch:
            return None
        major, minor = self.needs_torch
        return f"{self.name} needs torch {major}.{minor} or newer; this is {torch.__version__}"

    @functools.cached_property
    def cls(self) -> type[Optimizer]:
        """The class. Raises LabError where it cannot be had."""
        if self.unavailable:
            raise LabError(self.unavailable)
        found = load_object(self.home, expected="an optimiser")
        if not isinstance(found, type) or not issubclass(found, Optimizer):
            raise LabError(f"{self.home} is {found!r}, expected a subclass of torch.optim.Optimizer")
        return found

    @functools.cached_property
    def signature(self) -> dict[str, Any]:
        """The options with their defaults (the entry's own where it has them), `lr` not among them."""
        parameters = list(inspect.signature(self.cls).parameters.values())[1:]
        named = {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        named.pop("lr", None)
        required = {name for name, default in named.items() if default is inspect.Parameter.empty}
        return {key: value for key, value in named.items() if key not in required} | dict(self.defaults)

    @functools.cached_property
    def lr(self) -> float | None:
        """The learning rate that it has by default; None without a rate, or where the signature has no default."""
        if not self.rate or self.default_lr is not None:
            return self.default_lr
        parameter = inspect.signature(self.cls).parameters["lr"]
        return float(parameter.default) if isinstance(parameter.default, int | float) else None


def _torch_version() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


ENTRIES: dict[str, Entry] = {}
"""All entries by name. A new rule joins with `register`."""


def register(entry: Entry) -> None:
    """Adds an entry. Raises ValueError where the name is taken: names keep their meaning."""
    if entry.name in ENTRIES:
        raise ValueError(f"an optimiser is called {entry.name!r} already")
    ENTRIES[entry.name] = entry


NERO_JOINED_LATER = {"stochastic_rounding": False}

for _entry in (
    Entry(
        "nero",
        "Nero as published, rows along dimension 0",
        "archopt.optim.nero:Nero",
        from_named_parameters,
        default_lr=0.01,
        joined_later=NERO_JOINED_LATER,
    ),
    Entry(
        "nero-roles",
        "Nero(model): the neuron axis by each parameter's role",
        "archopt.optim.nero:Nero",
        from_module,
        default_lr=0.01,
        joined_later=NERO_JOINED_LATER,
    ),
    Entry(
        "agd",
        "AGD(model): automatic step, any network, its own initial weights",
        "archopt.optim.agd:AGD",
        from_module,
        rate=False,
    ),
    Entry(
        "agd-paper",
        "AGD as published: orthogonal initial weights, no vectors",
        "archopt.optim.agd:AGD",
        after_orthogonal_init,
        rate=False,
    ),
    Entry(
        "autonero",
        "AutoNero(model): every neuron turns by one angle that the gradients set",
        "archopt.optim.autonero:AutoNero",
        from_module,
        rate=False,
    ),
    Entry("sgd", "SGD without momentum", "torch.optim:SGD"),
    Entry("adam", "Adam", "torch.optim:Adam"),
    Entry("adamw", "AdamW", "torch.optim:AdamW"),
    Entry("lamb", "LAMB as in Nero's paper, no bias correction", "archopt.optim.lamb:Lamb"),
    Entry("madam", "Madam, multiplicative Adam", "archopt.optim.madam:Madam"),
    Entry(
        "lamb-cs",
        "LAMB without momentum, with Nero's constraints",
        "archopt.optim.lamb:Lamb",
        constrained,
        defaults={"betas": (0.0, 0.999)},
    ),
    Entry("madam-cs", "Madam with Nero's constraints", "archopt.optim.madam:Madam", constrained),
    Entry(
        "muon",
        "Muon on hidden matrices and convolutions, AdamW (aux_lr) on the rest",
        "archopt.lab.muon:MuonWithAdamW",
        from_module,
        needs_torch=(2, 9),
        joined_later={"products": "bfloat16"},
    ),
    Entry(
        "schedule-free-adamw",
        "schedule-free AdamW (Defazio et al. 2024), its authors' package",
        "schedulefree:AdamWScheduleFree",
        peer=True,
    ),
    Entry(
        "prodigy",
        "Prodigy (Mishchenko and Defazio 2023), its authors' package; lr multiplies the step it finds",
        "prodigyopt:Prodigy",
        peer=True,
    ),
):
    register(_entry)


def _user_entry(name: str) -> Entry:
    """The entry of a class that is named by where it lies."""
    place = name.rpartition(":")[0]
    source = file_sha256(Path(place).expanduser()) if is_file(place) and Path(place).is_file() else None
    entry = Entry(name, f"the class {name}", name, source=source)
    parameters = list(inspect.signature(entry.cls).parameters)
    return Entry(
        name,
        entry.description,
        name,
        from_module if parameters and parameters[0] == "model" else from_parameters,
        rate="lr" in parameters,
        source=source,
    )


NOT_OPTIONS = ("lr", "clip_norm")
"""What a workload's settings may hold beside options of the optimiser."""


@dataclass(frozen=True)
class Choice:
    """An optimiser as asked for: an entry, and options that differ from its defaults."""

    entry: Entry
    options: Mapping[str, Any]
    own_lrs: tuple[float, ...] = ()
    """The rates given in the brackets, `lr=0.1` or `lr=[0.1, 0.3]`; the optimiser is run at these alone."""
    grid: str = ""
    """The grid of options that it is a point of, where lists were given: its points are tuned as one optimiser."""

    @property
    def fixed_lr(self) -> float | None:
        """The one rate of the brackets, where there is one."""
        return self.own_lrs[0] if len(self.own_lrs) == 1 else None

    @property
    def label(self) -> str:
        """The canonical text, by which records and pictures call it. Several rates are a grid, not a name."""
        lr = {} if self.fixed_lr is None else {"lr": self.fixed_lr}
        return str(Call(self.entry.name, {**self.options, **lr}))

    @property
    def default_lr(self) -> float | None:
        """The rate without tuning."""
        return self.entry.lr if self.fixed_lr is None else self.fixed_lr

    def published_lr(self, settings: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The rate that a workload's settings name; None where they name none or the choice has its own."""
        lr = settings.get(self.entry.name, {}).get("lr")
        return None if lr is None or self.own_lrs or not self.entry.rate else float(lr)

    def _published(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The options that a workload's settings name."""
        return {k: v for k, v in settings.get(self.entry.name, {}).items() if k not in NOT_OPTIONS}

    def check(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises LabError for an option of a workload's settings that the optimiser does not have."""
        check_options(self.entry, self._published(settings))

    def resolved(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """All options but `lr`, as a record has them: the entry's defaults, the workload's published settings, what
        was asked for; those that joined later only where they differ from what they were before."""
        options = {**self.entry.signature, **self._published(settings), **self.options}
        if self.entry.home.startswith("archopt."):
            # Our rules resolve what is left to them (None) at construction; the record says to what.
            layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
            defaults = self.build(layers, None, settings).defaults
            options = {name: defaults.get(name, value) for name, value in options.items()}
        before, missing = self.entry.joined_later, object()
        return {name: value for name, value in options.items() if value != before.get(name, missing)}

    def build(
        self, model: nn.Module, lr: float | None, settings: Mapping[str, Mapping[str, Any]]
    ) -> Optimizer:
        """The optimiser for a model, ready to step. Raises LabError, with the rule's words, where it refuses."""
        options = {**self.entry.defaults, **self._published(settings), **self.options}
        check_options(self.entry, options)
        if self.entry.rate and lr is not None:
            options["lr"] = lr
        try:
            optimizer: Any = self.entry.build(self.entry.cls, model, options)
        except (TypeError, ValueError) as error:
            rate = "" if lr is None else f" at lr={lr}"
            raise LabError(f"{self.label}{rate}: {' '.join(str(error).split())}") from error
        if has_modes(optimizer):
            optimizer.train()
        built: Optimizer = optimizer
        return built


def parse_grid(text: str) -> list[Choice]:
    """Reads an optimiser whose options may be lists, `muon(lr=[0.02, 0.05], aux_lr=[0.005, 0.02])`: every
    combination of their values, each with all rates.

    Raises LabError as `parse_optimizer`, and for an empty list.
    """
    call = parse_call(text)
    lists = {name: value for name, value in call.options.items() if isinstance(value, list) and name != "lr"}
    if empty := [name for name, value in lists.items() if not value]:
        raise LabError(f"{call.name}: {empty[0]}=[], expected at least one value")
    points = [
        {**call.options, **dict(zip(lists, values, strict=True))}
        for values in itertools.product(*lists.values())
    ]
    grid = str(call) if lists else ""
    return [replace(parse_optimizer(str(Call(call.name, point))), grid=grid) for point in points]


def parse_optimizer(text: str) -> Choice:
    """Reads `name` or `name(option=value, ...)`; only `lr` may be a list.

    Raises LabError for an unknown name or option, with the nearest one.
    """
    call = parse_call(text)
    if ":" in call.name:
        entry = _user_entry(call.name)
    elif call.name in ENTRIES:
        entry = ENTRIES[call.name]
    else:
        hint = nearest(call.name, ENTRIES)
        raise LabError(
            f"no optimiser {call.name!r}{hint} (there are {', '.join(ENTRIES)}, or package.module:Class)"
        )
    options = dict(call.options)
    given = options.pop("lr", ())
    lrs = tuple(check_lr(entry, lr) for lr in (given if isinstance(given, list | tuple) else [given]))
    if "lr" in call.options and not lrs:
        raise LabError(f"{entry.name}: lr={given!r}, expected a number or several: lr=[0.01, 0.1]")
    check_options(entry, options)
    return Choice(entry, options, lrs)


def check_options(entry: Entry, options: Iterable[str]) -> None:
    """Raises LabError, with the nearest name, for an option that the optimiser does not have."""
    for name in options:
        if name not in entry.signature and not _takes_any(entry.cls):
            valid = ", ".join(["lr", *entry.signature] if entry.rate else entry.signature)
            raise LabError(
                f"{entry.name} has no option {name!r}{nearest(name, entry.signature)} (options: {valid})"
            )


def _takes_any(cls: type[Optimizer]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())


def check_lr(entry: Entry, lr: Any) -> float:
    """`lr` as a number. Raises LabError where it is none, and for a rule that has no rate."""
    if not entry.rate:
        raise LabError(f"{entry.name} has no learning rate, so lr={lr} cannot be set; leave it out")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < float("inf"):
        raise LabError(f"{entry.name}: lr={lr!r}, expected a number, 0 <= lr")
    return float(lr)


def has_modes(optimizer: Any) -> bool:
    """Whether an optimiser has a mode for training and one for evaluation, as modules have."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


TOLD = ("eta", "gradient_summary", "theta", "rho", "C", "G", "skipped")
"""What rules tell about their last step: AGD's step size and summary; AutoNero's angle, what set it, void steps."""


def numbers(optimizer: Optimizer) -> dict[str, float]:
    """What a rule tells about its last step: Nero's mean turn by role, and of `TOLD` what it has."""
    told: dict[str, Any] = {}
    if callable(turns := getattr(optimizer, "mean_turn", None)):
        told.update({f"turn/{role}": value for role, value in turns().items()})
    for name in TOLD:
        if isinstance(value := getattr(optimizer, name, None), float | torch.Tensor):
            told[name] = value
    return {name: float(value) for name, value in told.items()}


def state_bytes(optimizer: Optimizer) -> int:
    """Memory that the optimiser keeps between steps."""
    stack: list[Any] = [optimizer.state_dict()["state"]]
    total = 0
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return total
