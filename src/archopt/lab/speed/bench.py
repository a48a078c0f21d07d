"""One parameter set on one device: weights, gradients, and the clock and the scales that steps are put under."""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from archopt.lab.errors import LabError
from archopt.lab.speed.sets import SETS, count

GRADIENT = 1e-3  # standard deviation of the random gradients
SEED = 0


class Bench:
    """The weights of a set with random gradients. Contenders take turns with them.

    Raises LabError where they do not fit.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.set = SETS[name]
        self.entries = count(name)
        need, free = 3 * self.entries * dtype.itemsize, free_memory(device)
        if need > free:
            raise LabError(
                f"{name} in {dtype_name(dtype)} needs {gigabytes(need)} for weights, gradients and a copy of the "
                f"weights; {gigabytes(free)} are free on {device}"
            )
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # whose stream the clock listens to
        torch.manual_seed(SEED)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # built in it: a conversion would hold both
        try:
            with device:
                self.model = self.set.build()
        finally:
            torch.set_default_dtype(before)
        self.params: list[Tensor] = list(self.model.parameters())
        for param in self.params:
            param.grad = torch.randn_like(param).mul_(GRADIENT)
        self._initial = [param.detach().clone() for param in self.params]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the weights their initial values."""
        torch._foreach_copy_(self.params, self._initial)

    def fits(self, bytes_needed: float) -> str:
        """Why so much more does not fit, or an empty string."""
        free = free_memory(self.device)
        return "" if bytes_needed <= free else f"needs {gigabytes(bytes_needed)}, {gigabytes(free)} are free"

    def flat(self) -> Tensor:
        """A tensor of as many entries as the set has."""
        return torch.ones(self.entries, device=self.device, dtype=self.dtype)

    # -- measuring -----------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Callable[[], object], samples: int, repeats: int) -> list[float]:
        """Seconds of a step: `samples` numbers, each the mean over `repeats` consecutive steps.

        On CUDA by events in the stream, so that launching counts where it takes longer than what is launched.
        """
        self.wait()
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]  # type: ignore[no-untyped-call]
            events[0].record()
            for event in events[1:]:
                for _ in range(repeats):
                    step()
                event.record()
            self.wait()
            spans = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
        else:
            times = [time.perf_counter()]
            for _ in range(samples):
                for _ in range(repeats):
                    step()
                times.append(time.perf_counter())
            spans = [b - a for a, b in itertools.pairwise(times)]
        return [span / repeats for span in spans]

    def transient_bytes(self, step: Callable[[], object]) -> int:
        """By how much memory rises during a step above what it was before: torch's allocations, at their highest.

        On CUDA torch's own counter, on the CPU its profiler. What a kernel keeps on its stack is not seen.
        """
        self.wait()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            self.wait()
            return torch.cuda.max_memory_allocated(self.device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its start and its end
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            step()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
        held = highest = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            held += change
            highest = max(highest, held)
        return highest


def free_memory(device: torch.device) -> int:
    """Bytes that can be had: on CUDA with what torch's allocator keeps in reserve, on the CPU without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
        return int(told["MemAvailable"][0]) * 1024
    except (OSError, KeyError):  # no Linux: all that the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gigabytes(number: float) -> str:
    """`25.0 GB`; a GB is 10^9 bytes."""
    return f"{number / 1e9:.3g} GB"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")
