"""Finds a workload by name or in a user's file, gives it its preset and options, and loads its data."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from archopt.lab.calls import file_sha256, folder_name, short_hash
from archopt.lab.data import DataError, default_data_folder
from archopt.lab.errors import LabError
from archopt.lab.user_files import describe, is_file, load_file
from archopt.lab.workload import Metric, Workload
from archopt.optim.base import nearest


@dataclass(frozen=True)
class WorkloadChoice:
    """A workload as asked for: a name or a file, a preset, and options that differ from the preset's."""

    name: str
    preset: str = "small"
    options: Mapping[str, Any] = field(default_factory=dict)


def workload_class(name: str) -> type[Workload]:
    """The workload called `name`, or the one in the file that `name` is the path of.

    Raises LabError, with the nearest name, where there is none.
    """
    if is_file(name):
        return _workload_in(Path(name))
    from archopt.lab.workloads import registry

    known = registry()
    if name not in known:
        hint = nearest(name, known)
        raise LabError(f"no workload {name!r}{hint} (there are {', '.join(known)}, or a file: ./mine.py)")
    return known[name]


def _workload_in(path: Path) -> type[Workload]:
    module = load_file(path)
    found = getattr(module, "WORKLOAD", None)
    if found is None:
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Workload) and value.__module__ == module.__name__
        ]
        if len(own) != 1:
            classes = ", ".join(value.__name__ for value in own) or "none"
            raise LabError(
                f"{path} must define one subclass of archopt.lab.workload.Workload, or say which with WORKLOAD = "
                f"...; it defines {classes}"
            )
        found = own[0]
    if not isinstance(found, type) or not issubclass(found, Workload):
        raise LabError(f"{path}: WORKLOAD is {found!r}, expected a subclass of Workload")
    if not isinstance(getattr(found, "metric", None), Metric):
        raise LabError(f"{path}: {found.__name__} needs metric = Metric(key, name, higher_is_better)")
    if not hasattr(found, "name"):
        found.name = path.stem
    if not hasattr(found, "summary"):
        found.summary = f"from {path.name}"
    # An undecorated subclass would keep its annotated options to itself.
    return found if "__dataclass_fields__" in vars(found) else dataclass(found)


def make_workload(cls: type[Workload], preset: str, options: Mapping[str, Any]) -> Workload:
    """A workload with its preset's values and, over them, `options`.

    Raises LabError for an unknown preset or option and for a value of the wrong type.
    """
    if preset not in cls.presets:
        hint = nearest(preset, cls.presets)
        raise LabError(f"{cls.name} has no preset {preset!r}{hint} (there are {', '.join(cls.presets)})")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for name, value in options.items():
        if name not in names:
            valid = f"options: {', '.join(names)}" if names else "it has none"
            raise LabError(f"{cls.name} has no option {name!r}{nearest(name, names)} ({valid})")
        if not _fits(value, hints[name]):
            raise LabError(f"{cls.name}: {name}={value!r}, expected {_spell(hints[name])}")
    try:
        return cls(**{**cls.presets[preset], **options})
    except (TypeError, ValueError) as error:
        raise LabError(f"{cls.name}: {' '.join(str(error).split())}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal may stand for a type. Types that are not plain are left to the workload."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint in (bool, Any)
    if hint is float:
        return isinstance(value, int | float)
    if hint in (int, str, type(None)):
        return isinstance(value, hint)
    return True


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))


@dataclass
class Experiment:
    """A workload with its data in memory, ready for any number of runs in one process."""

    workload: Workload
    preset: str
    source: str | None
    """Checksum of the file of a user's workload."""
    data: dict[str, str]
    """Checksums of all data that was read."""
    device: torch.device

    @property
    def options(self) -> dict[str, Any]:
        """All fields of the workload; those that joined it later only where they differ from their default."""
        given = dataclasses.asdict(self.workload)
        for late in dataclasses.fields(self.workload):
            if late.metadata.get("joined_later") and given[late.name] == late.default:
                del given[late.name]
        return given

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from the preset's."""
        cls = type(self.workload)
        usual = dataclasses.asdict(cls(**cls.presets[self.preset]))
        return {key: value for key, value in self.options.items() if value != usual[key]}

    @property
    def folder(self) -> str:
        """The first component of the folders of its runs."""
        changed = self.changed
        suffix = f"-{short_hash(json.dumps(changed, sort_keys=True, default=repr))}" if changed else ""
        return folder_name(f"{self.workload.name}-{self.preset}{suffix}")


def open_experiment(choice: WorkloadChoice, data: Path | None, device: torch.device) -> Experiment:
    """Makes the workload and reads its data.

    Raises LabError for bad input, and DataError where data is missing or damaged.
    """
    workload = make_workload(workload_class(choice.name), choice.preset, choice.options)
    folder = default_data_folder(data)
    file = Path(choice.name).expanduser().resolve() if is_file(choice.name) else None
    try:
        workload.load(folder)
        workload.to(device)
        for name in ("steps", "eval_every"):
            value = getattr(workload, name)
            if not isinstance(value, int) or value < 1:
                raise LabError(f"{workload.name}: {name} is {value!r}, expected a whole number, at least 1")
    except (LabError, DataError):
        raise
    except Exception as error:  # a user's file may raise anything
        if file is None:
            raise
        raise LabError(f"{choice.name} cannot load its data: {describe(error, file)}") from error
    source = None if file is None else file_sha256(file)
    return Experiment(workload, choice.preset, source, dict(folder.checksums), device)
