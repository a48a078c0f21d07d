"""Reads a command's options into a dataclass (tyro), and says in one line what cannot be read."""

import contextlib
import dataclasses
import io
import re
from typing import Any, TypeVar

import tyro

from archopt.lab.calls import split_list
from archopt.lab.errors import LabError
from archopt.optim.base import nearest

Options = TypeVar("Options")


def parse(
    kind: type[Options], args: list[str], *, prog: str, description: str, default: Options | None = None
) -> Options:
    """`args` as a `kind`; prints the help and exits where it is asked for.

    Raises LabError for an unknown option, with the nearest one, and for a missing or wrong value.
    """
    options, unknown = parse_known(kind, args, prog=prog, description=description, default=default)
    if unknown:
        raise LabError(_unknown(unknown, flags(kind), prog))
    return options


def parse_known(
    kind: type[Options], args: list[str], *, prog: str, description: str = "", default: Options | None = None
) -> tuple[Options, list[str]]:
    """The same, but arguments that `kind` does not know are returned."""
    said = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            options, unknown = tyro.cli(
                kind,
                args=args,
                prog=prog,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
                **given,
            )
    except SystemExit as exit:
        if exit.code:
            raise LabError(f"{prog}: {_in_one_line(said.getvalue())}") from None
        raise
    return options, unknown


def flags(kind: type[Any]) -> list[str]:
    """The options of a dataclass and of those within it, as they are typed."""
    names: list[str] = []
    for found in dataclasses.fields(kind):
        inner = found.type if dataclasses.is_dataclass(found.type) else None
        names += flags(inner) if isinstance(inner, type) else [f"--{found.name.replace('_', '-')}"]
    return names


def _unknown(tokens: list[str], known: list[str], prog: str) -> str:
    token = next((t for t in tokens if t.startswith("-")), tokens[0])
    if not token.startswith("-"):
        return f"{prog} does not know what to do with {token!r}; see {prog} --help"
    name = token.partition("=")[0].replace("_", "-")
    return f"{prog} has no option {name}{nearest(name, known) or f'; see {prog} --help'}"


def _in_one_line(box: str) -> str:
    """What tyro says in a box of several lines, without the box and its advice."""
    text = " ".join(re.sub(r"[─-╿]+|-{8,}", " ", box).split())  # hyphens where the terminal has no lines
    text = re.split(r"Argument helptext:|For full helptext", text)[0].strip(" .")
    if found := re.search(r"Error parsing (--\S+): .*'([^']*)'\W*$", text):
        return f"{found[1]} cannot be {found[2]!r}; see --help for what it can be"
    text = re.sub(r"^(Value error|Parsing error|Invalid choice|Missing argument)\s*", "", text)
    return re.sub(r"^Error parsing \w+: ", "", text)  # what a workload says of its options together


def integers(text: str, what: str) -> list[int]:
    """`0,1,2` as numbers. Raises LabError for anything else, and for repeated ones."""
    try:
        values = [int(entry) for entry in split_list(text)]
    except ValueError as error:
        raise LabError(f"{what} {text!r}, expected whole numbers with commas between them") from error
    if len(set(values)) < len(values) or min(values) < 0:
        raise LabError(f"{what} {text!r}, expected different numbers, none below 0")
    return values


def rates(text: str) -> str | list[float]:
    """`grid`, `published`, `default`, or `0.01,0.1` as numbers. Raises LabError for anything else."""
    if text in ("grid", "published", "default"):
        return text
    try:
        return [float(entry) for entry in split_list(text)]
    except ValueError as error:
        raise LabError(
            f"--lrs {text!r}, expected grid, published, default or numbers like 0.01,0.1"
        ) from error
