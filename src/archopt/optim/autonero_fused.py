"""AutoNero's fused form: which tensors a kernel serves, and their step. The equations stand in `autonero_rule.py`.

Three passes (`archopt.kernels.autonero`), and between the last two the polar factors of hidden matrices, a few
matrices of equal shape at a time, from the momentum itself: a polar factor does not change with scale, so no
corrected copy of it is needed.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archopt.kernels import cpu, gpu
from archopt.kernels.autonero import ENTRIES, HIDDEN, PLAIN, TURNING, AutoNeroTensor, GroupOptions, Passes
from archopt.kernels.cpu_autonero import CpuPasses
from archopt.kernels.gpu_autonero import GpuPasses
from archopt.neurons import NeuronDim, statistics_dtype
from archopt.optim.autonero_rule import LEAST_FEATURES
from archopt.optim.autonero_tensors import dims_of, movement_dtype, steps_plainly
from archopt.optim.base import bias_correction, rate
from archopt.optim.fused import Made, made_of, memory_key, ordinary, refuse, wants_kernel
from archopt.optim.matrices import joined_entries, nonzero
from archopt.optim.nero_fused import axis_of, layout_of
from archopt.optim.orthogonalise import orthogonalise

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Tensor]]


class FusedStep:
    """One step of all tensors of one device that a kernel serves, as often as it repeats. It keeps no gradients."""

    def __init__(self, tensors: list[AutoNeroTensor], groups: list[Group], plans: gpu.Plans) -> None:
        # Matrices that are joined follow one another.
        keyed = sorted([(_alike(tensor, groups), i) for i, tensor in enumerate(tensors)])
        self.tensors = [tensors[i] for _, i in keyed]
        self._keys = [key for key, _ in keyed]
        self.groups = groups
        self.device = tensors[0].weight.device
        options = [_options(group) for group in groups]
        self._passes: Passes
        if _on_gpu(tensors[0].weight):
            spare = any(group["capturable"] for group in groups)
            self._passes = GpuPasses(self.tensors, options, plans, spare=spare)
        else:
            self._passes = CpuPasses(self.tensors, options)
        self._joined = list(self._batches())
        self._sums: Tensor | None = None

    def measure(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """||g|| and <g, d> over all tensors, each first summed in float64."""
        grads: list[Any] = [tensor.weight.grad for tensor in self.tensors]
        self._sums = self._passes.measure(grads)
        square, product = self._sums.sum(0).to(dtype).unbind()
        return square.sqrt(), product

    def heads(self) -> Iterator[tuple[Tensor, Group]]:
        """Weights that take plain steps, with their groups."""
        for tensor in self.tensors:
            if tensor.kind == PLAIN:
                yield tensor.weight, self.groups[tensor.group]

    def reaches(self, f: Tensor, bias_squares: Mapping[Tensor, Tensor]) -> Tensor:
        """How long the plain steps of heads are, over theta, in their order: K / h; float64.

        h needs ||s|| over all rows, with this step in it, which follows from ||g|| of the tensor.

        bias_squares: of each head ||s of the bias||^2, 0 without a bias.
        """
        assert self._sums is not None
        f = f.to(self.device, torch.float64)
        found = []
        for position, tensor in enumerate(self.tensors):
            if tensor.kind != PLAIN:
                continue
            group = self.groups[tensor.group]
            beta2 = group["beta2"]
            now = f.square() * self._sums[position, 0]
            square = tensor.exp_avg_sq.sum(dtype=torch.float64).lerp(now, 1 - beta2)
            square = square / bias_correction(beta2, tensor.step + 1)
            bias_sq = bias_squares[tensor.weight].to(self.device, torch.float64).reshape(())
            told = (square / nonzero(bias_sq)).sqrt()
            h = torch.where(bias_sq > 0, told, tensor.fan_in**0.5)
            found.append(group["head_gain"] / h.clamp(min=LEAST_FEATURES))
        return torch.stack(found) if found else torch.empty(0, dtype=torch.float64, device=self.device)

    def advance(self, f: Tensor, theta: Tensor, live: Tensor, reaches: Tensor) -> Tensor:
        """The rest of the step; returns sum <gh, d>. All tensors keep their bits unless `live`."""
        f, theta, live = (scalar.to(self.device, torch.float64) for scalar in (f, theta, live))
        angles = [theta * rate(group) for group in self.groups]
        scalars = torch.stack([torch.stack([f, theta, angle, live]) for angle in angles])
        self._passes.average(scalars, reaches)
        for first, moments in self._joined:
            directions = self._directions(moments, self.groups[self.tensors[first].group])
            self._passes.turn(first, len(moments), directions, scalars)
        return self._passes.expected()

    def _batches(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Hidden tensors that are joined: the position of the first, and the m of all, which follow one another."""
        for key, positions in itertools.groupby(range(len(self._keys)), key=self._keys.__getitem__):
            first, *others = positions
            if key[0] == HIDDEN:
                most = max(1, joined_entries(self.device) // self.tensors[first].weight.numel())
                end = first + 1 + len(others)
                blocks = self.groups[self.tensors[first].group]["blocks"]
                for start in range(first, end, most):
                    joined = self.tensors[start : min(start + most, end)]
                    yield start, [_in_memory(tensor, blocks) for tensor in joined]

    def _directions(self, moments: list[Tensor], group: Group) -> Tensor:
        """The polar factors of some tensors of one shape, (tensors, blocks, rows, fan_in).

        Entries in the order of memory, which for channels-last filters is another order of columns than that of
        their dimensions: the polar factor of a matrix with its columns in another order is the same in that order.
        """
        joined = moments[0].unsqueeze(0) if len(moments) == 1 else torch.stack(moments)
        return orthogonalise(joined, group["orthogonalise"]).contiguous()


def _alike(tensor: AutoNeroTensor, groups: list[Group]) -> tuple[Any, ...]:
    """What tensors have in common whose polar factors are found together."""
    group = groups[tensor.group]
    types = str(tensor.weight.dtype), str(tensor.movement.dtype)
    return tensor.kind, tensor.rows, tensor.fan_in, *types, group["blocks"], group["orthogonalise"]


def _in_memory(tensor: AutoNeroTensor, blocks: int) -> Tensor:
    """m as it lies in memory: (blocks, rows, fan_in), a view."""
    rows = tensor.rows // blocks
    strides = (rows * tensor.fan_in, tensor.fan_in, 1)
    return tensor.exp_avg.as_strided((blocks, rows, tensor.fan_in), strides)


def _options(group: Group) -> GroupOptions:
    turns = group["family"] != "embedding" and not steps_plainly(group)
    return GroupOptions(
        beta=group["beta"],
        beta2=group["beta2"],
        sign=-1.0 if group["maximize"] else 1.0,
        exponent=group["radius_exponent"] if turns else 0.0,
        young=0.0 if group["family"] == "embedding" else 1.0,
    )


# -- what is served ----------------------------------------------------------------------------------------


class Fused(NamedTuple):
    """The steps of all tensors that a kernel serves."""

    steps: list[FusedStep]
    """One a device."""
    served: frozenset[int]
    """By the id of the weight."""
    keeps: Any = None
    """What is told by identity where this is found again, and so has to live."""


class Prepared:
    """What earlier steps of an optimizer found out and made, to be used again while it holds."""

    def __init__(self) -> None:
        self.plans = gpu.Plans()
        self.found = gpu.Plans()


Wanted = list[tuple[Group, list[Tensor]]]
_grad = operator.attrgetter("grad")
_chosen = operator.itemgetter(
    *("family", "channel_groups", "blocks", "head", "orthogonalise", "movement_dtype", "radius_exponent"),
    *("beta", "beta2", "maximize", "fused", "foreach", "capturable"),
)


def fused_steps(groups: Iterable[tuple[Group, list[Tensor]]], states: States, prepared: Prepared) -> Fused:
    """The steps of all weights that a kernel serves, made now or found again.

    groups: each with its parameters that have a gradient.

    Raises ValueError, with the reason, where a group has fused=True and a weight of it cannot be served.
    """
    wanted = [(group, params) for group, params in groups if wants_kernel("AutoNero", group)]
    if not wanted:
        return Fused([], frozenset())
    key, keeps = _key(wanted, states)
    if key is None:
        return _find(wanted, states, prepared.plans, keeps)
    return prepared.found.get(key, lambda: _find(wanted, states, prepared.plans, keeps))


def _key(wanted: Wanted, states: States) -> tuple[tuple[Any, ...] | None, Any]:
    """All that decides how tensors are served and where they lie, but for the places of gradients; and what has to
    live for that. None where there are tensors whose memory cannot be asked for.
    """
    params = list(itertools.chain.from_iterable([some for _, some in wanted]))
    grads: list[Any] = list(map(_grad, params))
    if not (ordinary(params) and ordinary(grads)):
        return None, None
    values = list(itertools.chain.from_iterable([states[param].values() for param in params]))
    key = (
        *[(id(group), len(some), axis_of(group), *_chosen(group)) for group, some in wanted],
        *memory_key(params, grads, values),
    )
    return key, ([group for group, _ in wanted], params, values)


def _find(wanted: Wanted, states: States, plans: gpu.Plans, keeps: Any) -> Fused:
    found: dict[torch.device, tuple[list[AutoNeroTensor], list[Group]]] = {}
    served: set[int] = set()
    for group, params in wanted:
        indices: dict[torch.device, int] = {}
        for param in params:
            tensors, served_groups = found.setdefault(param.device, ([], []))
            index = indices.get(param.device, len(served_groups))
            rows = _rows_of(param, states[param], group)
            if isinstance(rows, str):
                if group["fused"]:
                    refuse("AutoNero", param, rows)
                continue
            if param.device not in indices:
                indices[param.device] = index
                served_groups.append(group)
            tensors.append(_for_kernel(param, states[param], group, rows, index))
            served.add(id(param))
    steps = [FusedStep(tensors, of_device, plans) for tensors, of_device in found.values() if tensors]
    return Fused(steps, frozenset(served), keeps)


def unserved(param: Tensor, group: Group) -> None:
    """Raises ValueError, with the reason, where no kernel can serve a weight whatever its gradient."""
    memory = cpu.Memory(*made_of(param))
    reason = _missing(param) or _obstacle(memory, _on_gpu(param))
    rows = reason or _rows(memory.shape, memory.strides, *_seen_as(param, group))
    if isinstance(rows, str):
        refuse("AutoNero", param, rows)


def _on_gpu(param: Tensor) -> bool:
    """Whether the GPU kernels are for the weight's device."""
    return param.device.type in gpu.DEVICE_TYPES


def _missing(param: Tensor) -> str:
    """Why the kernels for the weight's device cannot be used at all; an empty string if they can."""
    return gpu.missing() if _on_gpu(param) else cpu.missing()


def _obstacle(weight: cpu.Memory, on_gpu: bool) -> str:
    """Why those kernels cannot serve a weight, whatever its layout; an empty string if they can."""
    return gpu.obstacle(weight) if on_gpu else cpu.obstacle(weight)


STATE = ("exp_avg", "exp_avg_sq", "movement", "radius", "grows_to", "step")


def _rows_of(param: Tensor, state: dict[str, Tensor], group: Group) -> "_Rows | str":
    """The rows of a weight, or why no kernel can serve it with this gradient and state."""
    grad = param.grad
    assert grad is not None
    if reason := _missing(param) or cpu.obstacle_of_view(param, grad):
        return reason
    own = [state[name] for name in STATE]
    return _verdict(
        made_of(param),
        made_of(grad),
        tuple([(tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in own]),
        movement_dtype(statistics_dtype(param.dtype), group),
        *_seen_as(param, group),
        _on_gpu(param),
    )


def _for_kernel(
    param: Tensor, state: dict[str, Tensor], group: Group, rows: "_Rows", index: int
) -> AutoNeroTensor:
    """What the kernel takes."""
    if rows.fan_in == 1:
        kind = ENTRIES
    elif steps_plainly(group):
        kind = PLAIN
    else:
        kind = HIDDEN if group["family"] == "hidden" else TURNING
    m, v, d, radius, grows_to, step = [state[name] for name in STATE]
    return AutoNeroTensor(param, m, v, d, radius, grows_to, step, kind, rows.number, rows.fan_in, index)


State = tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device]


class _Rows(NamedTuple):
    """How many rows, of so many neighbouring entries."""

    number: int
    fan_in: int


def _seen_as(param: Tensor, group: Group) -> tuple[bool, NeuronDim, int]:
    """Whether it is a vector; else the axis of its rows and its channel groups."""
    return not dims_of(param, group), axis_of(group), group["channel_groups"]


def _rows(
    shape: torch.Size, strides: tuple[int, ...], is_vector: bool, axis: NeuronDim, channel_groups: int
) -> _Rows | str:
    """The rows of a weight as they lie in memory, or why the kernel cannot follow them."""
    if is_vector:
        layout = cpu.layout_of(shape, strides, ())
    else:
        layout = layout_of(shape, strides, axis, channel_groups)
    if isinstance(layout, str):
        return layout
    if layout.spread != 1:
        return "the entries of a row are not neighbours in memory"
    if layout.batches * layout.rows > gpu.LARGEST or layout.run > gpu.LARGEST:
        return f"it has more than {gpu.LARGEST} rows, or entries of one"
    return _Rows(layout.batches * layout.rows, layout.run)


@functools.lru_cache(maxsize=4096)
def _verdict(
    param: Made,
    grad: Made,
    state: tuple[State, ...],
    movement: torch.dtype,
    is_vector: bool,
    axis: NeuronDim,
    channel_groups: int,
    on_gpu: bool,
) -> _Rows | str:
    """The rows of a weight with this gradient and state, or why the kernel cannot serve it: decided once."""
    weight = cpu.Memory(*param)
    if reason := _obstacle(weight, on_gpu) or cpu.obstacle_of_gradient(weight, cpu.Memory(*grad)):
        return reason
    exact = statistics_dtype(weight.dtype)
    wanted = (exact, exact, movement, exact, exact, torch.float32)
    for name, dtype, (found, shape, strides, device) in zip(STATE, wanted, state, strict=True):
        if found != dtype:
            return f"its {name} is {found}, expected {dtype}"
        if device != weight.device:
            return f"its {name} is on {device}, the weight on {weight.device}"
        of_entries = name in ("exp_avg", "movement") or (is_vector and name == "exp_avg_sq")
        own = cpu.Memory(Tensor, found, device, shape, strides)
        if not (_laid_out_alike(own, weight) if of_entries else cpu.is_contiguous(own)):
            return f"its {name} has strides {strides}, the weight {weight.strides}"
    return _rows(weight.shape, weight.strides, is_vector, axis, channel_groups)


def _laid_out_alike(one: cpu.Memory, other: cpu.Memory) -> bool:
    """Whether entries lie in one order; strides of dimensions with one entry do not matter."""
    strides = zip(one.shape, one.strides, other.strides, strict=False)
    return one.shape == other.shape and all(size == 1 or a == b for size, a, b in strides)
