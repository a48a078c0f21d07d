"""Code that the user names on the command line: `./mine.py`, `./mine.py:Class`, `package.module:Class`."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from archopt.lab.calls import file_sha256, short_hash
from archopt.lab.errors import LabError
from archopt.optim.base import nearest


def is_file(text: str) -> bool:
    """Whether a name on the command line means a Python file."""
    return text.endswith(".py")


def load_file(path: Path) -> ModuleType:
    """Runs a Python file as a module of its own; its folder is importable, as with `python file.py`.

    Raises LabError, with the line at fault, where the file is missing or fails.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise LabError(f"no file {path}; give the path of a Python file")
    name = f"archopt_user_{path.stem}_{short_hash(f'{path} {file_sha256(path)}')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LabError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look here
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anything at all may be written in a user's file
        del sys.modules[name]
        raise LabError(f"cannot load {path}: {describe(error, path)}") from error
    return module


def load_object(text: str, *, expected: str) -> Any:
    """The object that `package.module:name` or `./file.py:name` names.

    Raises LabError where there is no such module, file or name. `expected` says in the message what was wanted.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise LabError(f"{text!r} does not name {expected}; expected ./file.py:name or package.module:name")
    if is_file(place):
        module = load_file(Path(place))
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise LabError(f"cannot import {place} ({error}); install the package that has it") from error
        except Exception as error:  # an import runs the package's own code
            raise LabError(f"cannot import {place}: {describe(error)}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        names = [known for known in vars(module) if not known.startswith("_")]
        raise LabError(f"{place} has no {name!r}{nearest(name, names)}") from None


def describe(error: BaseException, path: Path | None = None) -> str:
    """An exception in one line; with `path`, also the line of that file where it happened."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if path and f.filename == str(path)]
    if isinstance(error, SyntaxError) or not lines:
        return text
    return f"{text} (line {lines[-1]})"
