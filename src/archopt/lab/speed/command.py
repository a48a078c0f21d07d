"""`archopt speed`: measures, prints the table, and leaves a record and a picture."""

import contextlib
import datetime
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tyro.conf import arg

from archopt.lab import options
from archopt.lab.calls import split_list
from archopt.lab.errors import LabError
from archopt.lab.plan import parse_device
from archopt.lab.record import write_atomic
from archopt.lab.speed import record as records
from archopt.lab.speed import table as tables
from archopt.lab.speed.bench import Bench, dtype_name
from archopt.lab.speed.contenders import Contender, choose
from archopt.lab.speed.hardware import hardware, software
from archopt.lab.speed.rounds import ROUNDS, measure, training_step
from archopt.lab.speed.sets import SETS
from archopt.optim.base import nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Speed:
    """Options of `archopt speed`."""

    sets: Annotated[str, arg(metavar="A,B,...")] = "resnet18"
    """Parameter sets: resnet18, resnet50, gpt2, gpt2-medium, gpt2-xl."""
    dtype: Annotated[str, arg(metavar="A,B")] = "float32"
    """Type of weights and gradients: float32, bfloat16 or both."""
    device: Annotated[str | None, arg(metavar="D")] = None
    """cpu, cuda or cuda:N (default: cuda where there is one)."""
    optimizers: Annotated[str | None, arg(metavar="A,B,...")] = None
    """Which of the table's rows to measure (default: all)."""
    peer: Annotated[str | None, arg(metavar="A,B,...")] = None
    """Others' optimisers to measure in the same run: package.module:Class, with options where wanted."""
    seconds: Annotated[float, arg(metavar="X")] = 4.0
    """Time for each row, in all. Steps that take longer than this are measured three times all the same."""
    training_step: bool = False
    """Also time forward and backward passes, and tell each optimiser's share of the whole."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Inputs of such a pass (default: the set's: 32 pictures of 224 x 224; 8 texts of 1024 tokens, 4 for XL)."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads (default: torch's)."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs") / "speed"
    """Folder for the record and the picture."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """Of the record (default: the device and the time)."""
    record: Annotated[Path | None, arg(name="from", metavar="FILE")] = None
    """Measure nothing: print the tables of this record as Markdown, and draw its picture."""


TEXT = (
    "Measures what a step takes, beside torch's optimisers, any peer, and what memory allows: a copy, and "
    "a.add_(b), of as many numbers. Rows take turns in rounds, so that all meet the same machine."
)


def speed_command(args: list[str]) -> int:
    """`archopt speed`: one run, one record."""
    asked = options.parse(Speed, args, prog="archopt speed", description=TEXT)
    if asked.record is not None:
        return _show_again(asked.record)
    return _measure(asked, shlex.join(["archopt", "speed", *args]))


def _show_again(path: Path) -> int:
    record = records.read(path)
    print(tables.markdown(record), end="")
    print(_draw(record, path), file=sys.stderr)
    return 0


def _measure(asked: Speed, command: str) -> int:
    sets = _each_of(asked.sets, SETS, "--sets")
    dtypes = _each_of(asked.dtype, DTYPES, "--dtype")
    for name in ("seconds", "batch", "threads"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < float("inf"):
            raise LabError(f"--{name} {value}, expected more than 0")
    device = parse_device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    contenders = choose(
        split_list(asked.optimizers) if asked.optimizers else None,
        split_list(asked.peer) if asked.peer else [],
    )
    if asked.threads:
        torch.set_num_threads(asked.threads)
    machine = hardware(device)
    path = records.new_path(asked.out, asked.name, machine["gpu"]["name"] if machine["gpu"] else "cpu")
    record: dict[str, Any] = {
        "format": records.FORMAT,
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": False,
        "device": device.type,
        "hardware": machine,
        "software": software(),
        "seconds": asked.seconds,
        "rounds": ROUNDS,
        "tables": [],
        "refused": [],
    }
    console = Console()
    for name in sets:
        for dtype in dtypes:
            try:
                with _telling(console) as follow:
                    table = _table(asked, name, dtype, device, contenders, follow)
            except LabError as error:  # it does not fit
                record["refused"].append(str(error))
                console.print(Text(str(error)), soft_wrap=True)
                continue
            record["tables"].append(table)
            records.write(path, record)  # what is measured is kept, whatever comes
            _show(table, console)
    if not record["tables"]:
        raise LabError("; ".join(record["refused"]))
    record["complete"] = True
    records.write(path, record)
    console.print(Text(f"{tables.LEGEND}\n{tables.machine(record)}", style="dim"))
    console.print(_draw(record, path), highlight=False, soft_wrap=True, markup=False)
    console.print(f"record: {path}", highlight=False, soft_wrap=True, markup=False)
    return 0


@contextlib.contextmanager
def _telling(console: Console) -> Iterator[Callable[[str], None]]:
    """What is being measured, in a line that changes between turns alone: it takes no time from a step."""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda words: live.update(Text(words), refresh=True)


def _each_of(text: str, valid: dict[str, Any], option: str) -> list[str]:
    names = split_list(text)
    for name in names:
        if name not in valid:
            raise LabError(f"{option} {name!r}{nearest(name, valid)}; expected some of {', '.join(valid)}")
    return list(dict.fromkeys(names))


def _table(
    asked: Speed,
    name: str,
    dtype: str,
    device: torch.device,
    contenders: list[Contender],
    follow: Callable[[str], None],
) -> dict[str, Any]:
    bench = Bench(name, device, DTYPES[dtype])
    rows = measure(bench, contenders, asked.seconds, follow)
    step = None
    if asked.training_step:
        follow(f"{name}: forward and backward passes")
        step = _training_step(bench, asked.batch or bench.set.batch, asked.seconds)
    table = {
        "set": name,
        "what": bench.set.what,
        "dtype": dtype_name(bench.dtype),
        "tensors": len(bench.params),
        "parameters": bench.entries,
        "training_step": step,
        "rows": [row.as_json() for row in rows],
    }
    return records.derive(table)


def _training_step(bench: Bench, batch: int, seconds: float) -> dict[str, Any]:
    try:
        found = training_step(bench, batch, seconds)
    except torch.OutOfMemoryError:
        return {
            "batch": batch,
            "reason": f"training step: a batch of {batch} does not fit; try a smaller --batch",
        }
    return {"batch": batch, "seconds": found, "median": statistics.median(found)}


def _show(table: dict[str, Any], console: Console) -> None:
    console.print(tables.render(table, wide=console.width >= tables.WIDE))
    for note in tables.notes(table):
        console.print(Text(f"  {note}", style="dim"))
    console.print()


def _draw(record: dict[str, Any], path: Path) -> str:
    """Draws the picture beside the record, and says where it is or why there is none."""
    try:
        from archopt.lab.speed import picture
    except ModuleNotFoundError as error:
        return f"no picture: {error.name} is not installed; draw it later by archopt speed --from {path}"
    made = picture.files(record, path)
    for target, content in made:
        write_atomic(target, lambda stream, content=content: stream.write(content) and None)  # type: ignore[misc]
    return "picture: " + ", ".join(str(target) for target, _ in made)
