"""The record of a run: one folder with its config, its metrics as they come, its checkpoint and its result.

Everything but the metrics is written whole or not at all (a temporary file, fsync, then a rename). Metrics are
lines that are flushed as they come; a checkpoint knows how many bytes of them belong to it, so that a resumed run
cuts off what the killed one wrote after it. Everything in `config.json` but the environment is the run's identity.
"""

import errno
import json
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

import torch

from archopt.lab.calls import folder_name
from archopt.lab.errors import RecordError

FORMAT = 1
CONFIG, METRICS, RESULT, CHECKPOINT = "config.json", "metrics.jsonl", "result.json", "checkpoint.pt"
COMPARISON = "comparison.json"
FRAME_MS = 50  # that a film shows a frame
PICTURES = "pictures"  # the folder of a run's pictures, where its workload draws any

log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system says about a path into one line with the remedy (RecordError)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = (
                f"the disk is full: cannot write {path}; make room and give the same command again, finished runs "
                "are kept and the others go on from their checkpoints"
            )
        elif error.errno in _FORBIDDEN:
            reason = f"no permission to write {path}; choose another folder with --out"
        else:
            reason = f"cannot write {path}: {error.strerror or error}; choose another folder with --out"
        raise RecordError(reason) from error


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a file that takes the place of `path` in one step. Raises RecordError if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(path):
        try:
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power failure, where folders can be synchronised at all."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all; numbers that are not finite become null."""
    text = json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda stream: _write(stream, text))


def _write(stream: BinaryIO, text: str) -> None:
    stream.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file. Raises RecordError where it is damaged or cannot be read."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(
            f"{path} is damaged ({error}); delete its folder to start that run again"
        ) from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} is damaged (not an object); delete its folder to start that run again")
    return content


def plain(value: Any) -> Any:
    """`value` as JSON has it: tuples as lists, numbers that are not finite as null, other objects as their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return repr(value)


def run_path(out: Path, folder: str, label: str, lr: float | None, seed: int) -> Path:
    """Where a run lies below the root of a comparison."""
    rate = "auto" if lr is None else repr(lr)
    return out / folder / folder_name(label) / f"lr={rate}" / f"seed={seed}"


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run this run: its config without the environment, flat, as JSON has it."""
    return dict(_flat("", plain({key: value for key, value in config.items() if key != "environment"})))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value


def stored_result(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of the run that `path` holds, if it is this run and has ended; None if it is still to be done.

    Raises RecordError where the folder holds a different run.
    """
    if not (path / CONFIG).exists():
        if occupied := [name for name in (METRICS, RESULT, CHECKPOINT) if (path / name).exists()]:
            raise RecordError(
                f"{path} has {occupied[0]} but no {CONFIG}, so it is unknown what run that is; delete it or "
                "choose another folder with --out"
            )
        return None
    _refuse_other(path, read_json(path / CONFIG), config)
    if not (path / RESULT).exists():
        return None
    result = read_json(path / RESULT)
    return None if result.get("status") == "failed" else result


def _refuse_other(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    old, new = identity(there), identity(asked)
    missing = object()
    differing = [key for key in {**old, **new} if old.get(key, missing) != new.get(key, missing)]
    if differing:
        shown = [f"{key}: {_show(old, key)} there, {_show(new, key)} asked for" for key in differing[:4]]
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise RecordError(
            f"{path} holds a different run ({'; '.join(shown)}{more}); choose another folder with --out, or delete "
            "that one"
        )


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "nothing"


class RunFolder:
    """The folder of one run while it runs. Opening it creates it or checks that it holds the same run.

    Raises RecordError for a folder that holds a different run, that another process writes to, or that cannot be
    written to.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.result = stored_result(path, config)
        self._metrics: IO[bytes] | None = None
        if self.result is not None:
            return
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / CONFIG).exists():
            write_json(path / CONFIG, config)
        with explained(path / METRICS):
            self._metrics = (path / METRICS).open("ab", buffering=0)
        try:
            self._lock(self._metrics)
            _refuse_other(path, read_json(path / CONFIG), config)  # another process may have been quicker
            with explained(path / RESULT):
                (path / RESULT).unlink(missing_ok=True)  # of an attempt that failed
        except BaseException:
            self._metrics.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def _lock(self, stream: IO[bytes]) -> None:
        """Keeps a second process away; the system frees the lock of a process that dies."""
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(
                f"{self.path} is being written by another archopt process; wait for it or choose another --out"
            ) from None
        except OSError as error:  # file systems without locks
            log.debug("no lock on %s: %s", stream.name, error)

    @property
    def metrics_bytes(self) -> int:
        """Length of the metrics written so far."""
        return self._open.tell()

    @property
    def _open(self) -> IO[bytes]:
        if self._metrics is None:
            raise RuntimeError(f"{self.path} holds a run that has ended")
        return self._metrics

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the metrics, whole or not at all."""
        stream = self._open
        before = stream.tell()
        data = (json.dumps(plain(line), allow_nan=False) + "\n").encode()
        with explained(self.path / METRICS):
            try:
                while data:  # an unbuffered write may take less than it was given
                    data = data[stream.write(data) :]
            except OSError:
                stream.truncate(before)
                stream.seek(before)
                raise

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint, with the length of the metrics that belong to it."""
        with explained(self.path / METRICS):
            os.fsync(self._open.fileno())
        content = {"format": FORMAT, **state, "metrics_bytes": self.metrics_bytes}
        path = self.path / CHECKPOINT
        try:
            write_atomic(path, lambda stream: torch.save(content, stream))
        except RuntimeError as error:
            # torch's writer hides what the stream raised when it ends in a hurry.
            cause = error.__context__
            if isinstance(cause, OSError):
                with explained(path):
                    raise cause from None
            raise

    def save_picture(self, name: str, picture: torch.Tensor) -> None:
        """Writes a picture (3, h, w), uint8, as pictures/NAME.png, a film (frames, 3, h, w) as an animated GIF.

        The same name replaces it.
        """
        from PIL import Image

        film = picture.dim() == 4
        path = self.path / PICTURES / f"{name}.{'gif' if film else 'png'}"
        with explained(path):
            path.parent.mkdir(exist_ok=True)
        frames = (picture if film else picture[None]).permute(0, 2, 3, 1).cpu().numpy()
        first, *more = map(Image.fromarray, frames)
        how: dict[str, Any] = {"format": "PNG"}
        if film:
            how = {"format": "GIF", "save_all": True, "append_images": more, "duration": FRAME_MS, "loop": 0}
        write_atomic(path, lambda stream: first.save(stream, **how))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, the metrics cut back to it; None, and no metrics, where the run has to start again.

        A checkpoint that cannot be used costs time, not truth: starting again gives the same bits.
        """
        path = self.path / CHECKPOINT
        state: dict[str, Any] | None = None
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
                log.warning("%s cannot be read (%s): the run starts again", path, type(error).__name__)
        stream = self._open
        length = stream.seek(0, os.SEEK_END)
        if state is not None and (state.get("format") != FORMAT or state["metrics_bytes"] > length):
            log.warning("%s does not fit its metrics: the run starts again", path)
            state = None
        with explained(self.path / METRICS):
            stream.truncate(0 if state is None else state["metrics_bytes"])
            stream.seek(0, os.SEEK_END)
        return state

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result. A run that ended for good needs its checkpoint no more."""
        with explained(self.path / METRICS):
            os.fsync(self._open.fileno())
        write_json(self.path / RESULT, result)
        if result["status"] != "failed":
            with explained(self.path):
                for leftover in (CHECKPOINT, f"{CHECKPOINT}.tmp"):
                    (self.path / leftover).unlink(missing_ok=True)
