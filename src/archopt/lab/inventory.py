"""The commands that tell what there is: `archopt list`, `data` and `roles`. Nothing is trained here."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from torch import nn
from tyro.conf import Positional, arg

from archopt import kernels
from archopt.lab import options
from archopt.lab.comparisons import COMPARISONS
from archopt.lab.data import default_data_folder, fetch, import_folder, list_sets
from archopt.lab.errors import LabError
from archopt.lab.optimizers import ENTRIES
from archopt.lab.user_files import describe, load_object
from archopt.lab.workloads import registry
from archopt.roles import parameter_roles

LISTED = 4  # workloads of a comparison


@dataclass
class List:
    """Options of `archopt list`."""

    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the data sets (default: the environment's ARCHOPT_DATA, else a folder in the user's cache)."""


def list_command(args: list[str]) -> int:
    """`archopt list`: what there is to train, with what, and on what data."""
    text = (
        "Lists the workloads, the published comparisons, the optimisers, the kernels and the data sets, and says "
        "which of them can be used here."
    )
    asked = options.parse(List, args, prog="archopt list", description=text)
    console = Console()
    workloads = _table("workload", "what it is", "options")
    for name, cls in registry().items():
        workloads.add_row(name, cls.summary, ", ".join(f.name for f in dataclasses.fields(cls)))
    console.print(workloads)
    comparisons = _table("comparison", "what it is", "source", "workloads")
    for named in COMPARISONS.values():
        first, more = named.workloads[:LISTED], len(named.workloads[LISTED:])
        workloads_told = ", ".join(first) + (f" and {more} more" if more else "")
        comparisons.add_row(named.name, named.summary, named.source, workloads_told)
    console.print(comparisons)
    optimizers = _table("optimiser", "what it is", "default lr")
    for entry in ENTRIES.values():
        why = entry.unavailable
        rate = "none to set" if not entry.rate else "" if why else f"{entry.lr:g}"
        what = f"{entry.description} ({why})" if why else entry.description
        optimizers.add_row(entry.name, escape(what), rate)
    optimizers.add_row("package.module:Class", "any torch optimiser; also ./file.py:Class", "its own")
    console.print(optimizers)
    console.print(_kernel_table())
    console.print(_data_table(asked.data))
    return 0


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _kernel_table() -> Table:
    table = _table("kernel", "here", "with what, or why not")
    for name, (available, detail) in kernels.status().items():
        table.add_row(name, "yes" if available else "no", escape(detail))
    return table


def _data_table(folder: Path | None) -> Table:
    table = _table("data set", "what it is", "licence", "where")
    for found in list_sets(default_data_folder(folder)):
        table.add_row(found.name, found.what, found.licence, found.where or f"not here: {found.command}")
    return table


@dataclass
class Data:
    """Options of `archopt data`."""

    action: Annotated[Positional[str], arg(metavar="list|fetch|import")] = ""
    """list: what there is. fetch NAME...: download. import FOLDER [NAME...]: copy from a folder that has them."""
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME...")] = ()
    """For fetch, the sets; for import, the folder to copy from and the sets (default: all that it has)."""
    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder that the sets go into (default: the environment's ARCHOPT_DATA, else one in the user's cache)."""


def data_command(args: list[str]) -> int:
    """`archopt data`: where the sets lie, and how to get them there."""
    text = "Lists, downloads or copies data sets. Every file is checked before it is put in its place."
    asked = options.parse(Data, args, prog="archopt data", description=text)
    folder = default_data_folder(asked.data)
    console = Console()
    if asked.action == "list":
        if asked.names:
            raise LabError(f"archopt data list takes no names (got {asked.names[0]!r})")
        console.print(_data_table(asked.data))
        return 0
    if asked.action not in ("fetch", "import"):
        raise LabError(f"archopt data {asked.action or '...'}: expected list, fetch or import")
    if not asked.names:
        wanted = "the name of a set" if asked.action == "fetch" else "the folder to copy from"
        raise LabError(f"archopt data {asked.action} needs {wanted}; see archopt data --help")
    with _transfers(console) as progress:
        if asked.action == "fetch":
            files = [file for name in asked.names for file in fetch(name, folder, progress)]
        else:
            files = import_folder(asked.names[0], folder, asked.names[1:] or None, progress)
    for file in files:
        console.print(str(file), highlight=False, soft_wrap=True, markup=False)
    if not files:
        console.print("nothing to do: it ships with the package")
    return 0


@contextlib.contextmanager
def _transfers(console: Console) -> Iterator[Any]:
    """A bar for every file that is transferred."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield show


@dataclass
class Roles:
    """Options of `archopt roles`."""

    model: Annotated[Positional[str], arg(metavar="FILE.py:NAME")] = ""
    """A function without arguments that returns the model, or the model: ./net.py:build or package.module:name."""


def roles_command(args: list[str]) -> int:
    """`archopt roles`: the table of a model's parameters."""
    text = "Shows what each parameter of a model is, and how Nero and AGD, given the model, treat it."
    asked = options.parse(Roles, args, prog="archopt roles", description=text)
    if not asked.model:
        raise LabError("archopt roles needs a model: ./net.py:build, or package.module:name")

    found = load_object(asked.model, expected="a function that returns a model")
    try:
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # the user's own function
        raise LabError(f"{asked.model} cannot be built: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{asked.model} gives a {type(model).__name__}, expected a torch.nn.Module")
    try:
        table = parameter_roles(model)
    except (TypeError, ValueError) as error:
        raise LabError(f"{asked.model}: {error}") from error
    print(table)
    return 0
