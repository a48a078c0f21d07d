"""Names with options, as the command line spells them: `adamw(weight_decay=0.1)`, `digits(model='cnn')`."""

import ast
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archopt.lab.errors import LabError

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""
_LONGEST_FOLDER = 100  # characters; file systems take 255 bytes for a name


@dataclass(frozen=True)
class Call:
    """A name and the options behind it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The canonical text: options in alphabetical order, values as Python writes them."""
        if not self.options:
            return self.name
        options = ",".join(f"{key}={value!r}" for key, value in sorted(self.options.items()))
        return f"{self.name}({options})"


def parse_call(text: str) -> Call:
    """Reads `name` or `name(option=value, ...)`; values are Python literals.

    Raises LabError for anything else.
    """
    name, bracket, rest = text.strip().partition("(")
    name = name.strip()
    if not name:
        raise LabError(f"{text!r} has no name; expected name or name(option=value, ...)")
    if not bracket:
        return Call(name)
    try:
        call = ast.parse(f"call({rest}", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise LabError(f"cannot read {text!r}; expected {name}(option=value, ...)") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise LabError(f"cannot read {text!r}; expected {name}(option=value, ...)")
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise LabError(f"cannot read {text!r}; expected {name}(option=value, ...)")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            given = ast.unparse(keyword.value)
            raise LabError(
                f"{name}: {keyword.arg}={given} is not a Python literal; expected a number, True, False, None, a "
                f"tuple or a 'string'"
            ) from error
    return Call(name, options)


def split_list(text: str) -> list[str]:
    """The entries of a list with commas; a comma inside brackets or quotes does not divide.

    Raises LabError where brackets or quotes do not close, and for empty entries.
    """
    entries, current, depth, quote = [], "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth == 0 and not quote:
            entries.append(current.strip())
            current = ""
        else:
            current += character
    entries.append(current.strip())
    if depth or quote:
        raise LabError(f"{text!r} has {'a quote' if quote else 'a bracket'} without its partner")
    if not all(entries):
        raise LabError(f"{text!r} has an empty entry; expected names with commas between them")
    return entries


def folder_name(text: str) -> str:
    """`text` as a name that every file system takes; where that changes it, a hash keeps names apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,()+-]+", "_", text)
    if safe == text and len(text) <= _LONGEST_FOLDER:
        return text
    return f"{safe[:_LONGEST_FOLDER]}-{short_hash(text)}"


def short_hash(text: str) -> str:
    """8 hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def file_sha256(path: Path) -> str:
    """The checksum of a user's file, as records spell it. Raises LabError where it cannot be read."""
    try:
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}") from error
