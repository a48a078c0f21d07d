"""The command line: which command is meant, and what is said when it cannot be done.

Exit status: 0 done, 1 a run failed (or the one that was trained diverged), 2 bad input, 130 stopped by the user.
Bad input is answered with one line; ARCHOPT_DEBUG=1 shows where it was found.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from archopt._version import __version__
from archopt.lab.errors import Interrupted, LabError
from archopt.optim.base import nearest

DONE, RUN_FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130

COMMANDS = {
    "list": "the workloads, the optimisers, the kernels and the data sets that there are",
    "train": "train one workload with one optimiser",
    "compare": "train optimisers side by side over learning rates and seeds, and draw the page",
    "reproduce": "train all experiments of a paper and draw its page",
    "report": "draw the page of a comparison again",
    "speed": "measure what a step takes, beside other optimisers and what memory allows",
    "data": "list, fetch or import data sets",
    "roles": "show what each parameter of a model is and how Nero and AGD treat it",
    "demo": "compare optimisers on real digits, in three minutes",
}

HOMES = {"speed": "speed.command"} | dict.fromkeys(("list", "data", "roles"), "inventory")
"""Where the commands that train nothing stand, in the laboratory; the others stand in `commands`."""

USAGE = """\
usage: archopt COMMAND [options]

Architecture-aware optimisers, compared with any others on real data.

commands:
{commands}

Start with `archopt demo`. `archopt COMMAND --help` tells the rest, `archopt train WORKLOAD --help` also the options
of that workload. A workload of your own is a file: `archopt compare ./mine.py`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments ask for and returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(args)
    except (KeyboardInterrupt, Interrupted):
        print("archopt: stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if os.environ.get("ARCHOPT_DEBUG") or not _is_bad_input(error):
            raise
        print(f"archopt: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, LabError):
        return True
    from archopt.lab.data import DataError

    return isinstance(error, DataError)


def dispatch(args: list[str]) -> int:
    """Finds the command and runs it. Raises LabError where there is no such command."""
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(
            USAGE.format(commands="\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()))
        )
        return DONE if args else BAD_INPUT
    if args[0] == "--version":
        print(f"archopt {__version__}")
        return DONE
    name, *rest = args
    if name not in COMMANDS:
        raise LabError(f"no command {name!r}{nearest(name, COMMANDS)} (there are {', '.join(COMMANDS)})")
    try:
        home = importlib.import_module(f"archopt.lab.{HOMES.get(name, 'commands')}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("archopt"):
            raise
        raise LabError(
            f"the laboratory needs {error.name}, which is not installed: pip install 'archopt[lab]'"
        ) from error
    command: Callable[[list[str]], int] = getattr(home, f"{name}_command")
    return command(rest)


if __name__ == "__main__":
    sys.exit(main())
