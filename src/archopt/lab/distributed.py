"""One run by several processes (`--distribute`), which torchrun or Open MPI's mpirun has started.

The engine is torch.distributed: DistributedDataParallel averages gradients, over NCCL where the models are on
GPUs, else over gloo. Whatever else the processes tell one another goes over gloo, whose calls fail at once where a
process has died. One that gives up says why in a store before it ends, so that all others can repeat it.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from archopt.lab.errors import LabError, RankError
from archopt.lab.record import RunFolder, identity
from archopt.lab.share import ALONE, Share

START_SECONDS = 120.0
"""In which all processes must have come."""
ANSWER_SECONDS = 600.0
"""For which one process may keep the others waiting: loading, evaluating or writing longer than they do."""
LAST_WORDS_SECONDS = 2.0
"""In which processes that go on after another has died report, so that the dead one can be named."""
PORT = 29500  # torchrun's own
TIMEOUTS = ("timed out", "timeout", "failed to pass monitoredbarrier")
"""What gloo says where a process does not answer."""

T = TypeVar("T")


class Store(Protocol):
    """What torch.distributed's stores can do, so far as it is used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process."""

    rank: int
    size: int
    local_rank: int
    """Among the processes of its machine."""
    local_size: int


LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
"""The variables in which launchers say what a `Place` holds; the last two may be missing."""


def place() -> Place | None:
    """Where a launcher has put this process; None where none has. Raises LabError where that makes no sense."""
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank not in os.environ or size not in os.environ:
            continue
        numbers = [os.environ[rank], os.environ[size]]
        numbers += [os.environ.get(name, numbers[0]) for name in (local_rank,)]
        numbers += [os.environ.get(name, numbers[1]) for name in (local_size,)]
        if not all(number.isdecimal() for number in numbers) or not int(numbers[0]) < int(numbers[1]):
            raise LabError(
                f"{launcher}'s {rank}={numbers[0]!r} and {size}={numbers[1]!r} do not say which of how many "
                "processes this is; start it with torchrun or mpirun"
            )
        return Place(*map(int, numbers))
    return None


@contextmanager
def joined(asked: bool) -> Iterator[Share]:
    """The share of this process, all others having come; the whole where no distribution was asked for.

    Raises LabError where there is no launcher, where one has started several processes that were not asked to train
    together, and where some do not come.
    """
    here = place()
    if not asked:
        if here is not None and here.size > 1:
            raise LabError(
                f"this is process {here.rank} of {here.size}, which would all train the same run; let them train "
                "it together with --distribute, or start one"
            )
        yield ALONE
        return
    if here is None:
        raise LabError(
            "--distribute needs a launcher that says which process this is: torchrun --nproc-per-node N -m "
            "archopt.lab train ... --distribute, or mpirun -np N archopt train ... --distribute"
        )
    if not dist.is_available():
        raise LabError(
            "--distribute needs torch.distributed, which this build of torch lacks; train on one process"
        )
    ranks = Ranks(here, _meet(here))
    try:
        yield ranks
    except BaseException as error:
        ranks.tell(error)
        raise
    finally:
        dist.destroy_process_group()


def _meet(here: Place) -> Store:
    """The store of a group of gloo in which all processes are."""
    address = os.environ.get("MASTER_ADDR")
    if address is None and here.local_size == here.size:
        address = "127.0.0.1"
    if address is None:
        raise LabError(
            "the processes lie on several machines and cannot find one another: set MASTER_ADDR to the first one's "
            "address (mpirun -x MASTER_ADDR=...)"
        )
    port = os.environ.get("MASTER_PORT", str(PORT))
    # torchrun's agent has the store itself, which outlives the processes that it starts again.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        served = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            int(port),
            here.size,
            is_master=here.rank == 0 and not hosted,
            timeout=timedelta(seconds=START_SECONDS),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise LabError(
            f"cannot meet the other processes at {address}:{port} (MASTER_ADDR:MASTER_PORT): {_short(error)}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"archopt/{attempt}", served)  # type: ignore[attr-defined]
    with _told_to_stop():
        _wait_for_all(store, here)
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=here.rank,
                world_size=here.size,
                timeout=timedelta(seconds=ANSWER_SECONDS),
            )
        except RuntimeError as error:
            raise LabError(f"the processes cannot talk to one another: {_short(error)}") from error
    found: Store = store
    return found


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """A launcher ends all processes with SIGTERM where one has ended, which then says why, and this one that."""

    def stop(number: int, frame: Any) -> None:
        raise LabError(
            "told to stop while waiting for the other processes; one of them has ended and says why"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for_all(store: Store, here: Place) -> None:
    store.set(f"here/{here.rank}", "")
    end = monotonic() + START_SECONDS
    while absent := [rank for rank in range(here.size) if not store.check([f"here/{rank}"])]:
        if monotonic() > end:
            raise LabError(
                f"process {absent[0]} of {here.size} has not come within {START_SECONDS:.0f} s; all must be "
                "started with the same command, --distribute in it"
            )
        sleep(0.05)


def _short(error: BaseException) -> str:
    """The first line of what torch says, which goes on with a trace."""
    return str(error).strip().partition("\n")[0]


class Elsewhere(RunFolder):
    """Stands for the folder of a run in a process that does not keep the record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result = None
        self._metrics = None

    def append(self, line: Mapping[str, Any]) -> None:
        pass

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        pass

    def save_picture(self, name: str, picture: torch.Tensor) -> None:
        pass

    def finish(self, result: Mapping[str, Any]) -> None:
        pass


class Ranks(Share):
    """The share of one of several processes."""

    def __init__(self, here: Place, store: Store) -> None:
        self.rank, self.size = here.rank, here.size
        self._here, self._store = here, store
        self._gradients: dist.ProcessGroup | None = None  # None: the group of gloo
        self._device = torch.device("cpu")
        self._alone = False  # whether the store does not answer any more

    # -- what the processes tell one another ---------------------------------------------------------------

    def sum(self, numbers: Sequence[float]) -> list[float]:
        told = torch.tensor(numbers, dtype=torch.float64)
        with self._answered():
            dist.all_reduce(told)
        found: list[float] = told.tolist()
        return found

    def any(self, *flags: bool) -> tuple[bool, ...]:
        told = torch.tensor(flags, dtype=torch.uint8)
        with self._answered():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return tuple(map(bool, told.tolist()))

    def all(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, value)
        return found

    def first(self, make: Callable[[], T]) -> T:
        told: list[Any] = [make() if self.rank == 0 else None]
        with self._answered():
            dist.broadcast_object_list(told, src=0)
        found: T = told[0]
        return found

    def agree(self, config: Mapping[str, Any], device: torch.device) -> None:
        with self._answered():  # names a process that does not come
            dist.monitored_barrier(timeout=timedelta(seconds=ANSWER_SECONDS))
        mine = {**identity(config), "device": device.type, "torch": torch.__version__}
        told = self.all(mine)
        for rank, other in enumerate(told):
            differing = sorted(key for key in {**told[0], **other} if told[0].get(key) != other.get(key))
            if differing:
                key = differing[0]
                more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
                raise LabError(
                    f"the processes do not agree: {key} is {other.get(key)!r} in process {rank} and "
                    f"{told[0].get(key)!r} in process 0{more}; start all with the same command and the same data"
                )

    def folder(self, path: Path, config: Mapping[str, Any]) -> RunFolder:
        return RunFolder(path, config) if self.rank == 0 else Elsewhere(path)

    # -- models --------------------------------------------------------------------------------------------

    def place(self, device: torch.device) -> torch.device:
        """On a machine with GPUs each process has one of its own. Raises LabError where there are too few."""
        if device.type == "cpu":
            return device
        count = torch.cuda.device_count()
        if str(device) != device.type:
            raise LabError(
                f"--device {device}: with --distribute each process takes its own; give --device cuda"
            )
        if self._here.local_size > count:
            raise LabError(
                f"--distribute: {self._here.local_size} processes on a machine with {count} GPUs; start one a GPU"
            )
        self._device = torch.device("cuda", self._here.local_rank % count)
        torch.cuda.set_device(self._device)
        with self._answered():
            self._gradients = dist.new_group(backend="nccl", timeout=timedelta(seconds=ANSWER_SECONDS))
        return self._device

    def wrap(self, model: nn.Module) -> nn.Module:
        ids = [self._device] if self._device.type == "cuda" else None
        with self._answered():
            return DistributedDataParallel(model, device_ids=ids, process_group=self._gradients)

    def same_buffers(self, models: Mapping[str, nn.Module]) -> None:
        with self._answered():
            for model in models.values():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0, group=self._gradients)

    # -- the end of a process ------------------------------------------------------------------------------

    def tell(self, error: BaseException) -> None:
        """Leaves word of why this process gives up, for the others."""
        words = " ".join(str(error).split()) or type(error).__name__
        self._say("failed", words if isinstance(error, LabError) else f"{type(error).__name__}: {words}")

    def blame(self, error: Exception) -> Exception:
        """An error of torch.distributed, which is the end of another process, as a RankError; others are told."""
        if isinstance(error, RankError):
            return error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            return self._lost(error)
        self.tell(error)
        return error

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Raises RankError where another process does not take part."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> RankError:
        """Why the other processes do not answer, as far as can be known."""
        self._say("survived", "")
        end = monotonic() + LAST_WORDS_SECONDS
        others = [rank for rank in range(self.size) if rank != self.rank]
        while silent := [rank for rank in others if not self._said("survived", rank)]:
            if any(self._said("failed", rank) for rank in silent) or monotonic() > end or self._alone:
                break
            sleep(0.05)
        # Of those that have failed, the ones that saw no other fail are the cause.
        for rank in silent or others:
            if self._said("failed", rank):
                return RankError(f"process {rank} of {self.size} gave up: {self._heard('failed', rank)}")
        who = f"process {' or '.join(map(str, silent))}" if silent else "a process"
        said = str(error).lower()
        if any(words in said for words in TIMEOUTS):
            return RankError(
                f"{who} of {self.size} has not answered for {ANSWER_SECONDS:.0f} s; the same command goes on from "
                "the last checkpoint"
            )
        return RankError(
            f"{who} of {self.size} has died (killed, or out of memory); the same command goes on from the last "
            "checkpoint"
        )

    def _say(self, what: str, words: str) -> None:
        self._asked(lambda: self._store.set(f"{what}/{self.rank}", words), None)

    def _said(self, what: str, rank: int) -> bool:
        return self._asked(lambda: self._store.check([f"{what}/{rank}"]), False)

    def _heard(self, what: str, rank: int) -> str:
        return self._asked(lambda: self._store.get(f"{what}/{rank}").decode(), "it does not say why")

    def _asked(self, ask: Callable[[], T], otherwise: T) -> T:
        """What the store says, which may have died with the process that had it: then it is asked no more."""
        if not self._alone:
            try:
                return ask()
            except RuntimeError:
                self._alone = True
        return otherwise
