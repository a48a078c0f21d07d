"""Forms: foreach, capturable, maximised and compiled steps equal the plain one, and none waits for the device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer, lr_scheduler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contract.behaviours import EAGER, FORMS, behaviour
from contract.behaviours.problems import (
    assert_close,
    assert_same_bits,
    copy_of,
    give_gradients,
    model_for,
    state_tensors,
    train,
)

# float64: both forms round differently, a few hundred roundings in all. float32: the project's own bound.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# A movement over a first angle of 1e-5, which AutoNero keeps, is mostly the rounding of float32 weights.
STATE_TOLERANCES = TOLERANCES | {torch.float32: 1e-4}


@behaviour(forms=tuple(form for form in FORMS if form != "plain"), dtype=tuple(TOLERANCES))
def form_equals_plain(make: Any, *, dtype: torch.dtype) -> None:
    """Every form follows the plain one over 12 steps of varying rate, missing gradients and zero rows."""
    model, twin = model_for(make, dtype), model_for(make, dtype)
    optimizer, other = make.plain()(model), make(twin)
    for t in range(12):
        for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            rate = ours.setdefault("initial_lr", ours["lr"]) * (1 + t % 3) / 2
            ours["lr"] = theirs["lr"] = rate
        train(model, optimizer, range(t, t + 1))
        train(twin, other, range(t, t + 1))
    assert_close(copy_of(twin), copy_of(model), TOLERANCES[dtype], f"weights in {dtype}")
    ours, theirs = state_tensors(optimizer), state_tensors(other)
    assert ours.keys() == theirs.keys()
    finite = {n: v for n, v in ours.items() if v.is_floating_point() and v.norm() > 0}
    assert_close(theirs, finite, STATE_TOLERANCES[dtype], f"state in {dtype}")


@behaviour(forms=("default", "foreach", "fused"), applies=lambda make: make.takes == "parameters")
def mixed_types_share_a_group(make: Any) -> None:
    """A group of float32, bfloat16 and float64 weights steps as three groups do."""
    nets = [nn.ModuleList(model_for(make, dtype) for dtype in TOLERANCES) for _ in range(2)]
    optimizer = make([{"params": list(net.parameters())} for net in nets[0]])
    other = make([{"params": list(nets[1].parameters())}])
    for t in range(4):
        train_all(nets[0], optimizer, t)
        train_all(nets[1], other, t)
    for net, twin, tolerance in zip(*nets, [TOLERANCES[dtype] for dtype in TOLERANCES], strict=True):
        assert_close(copy_of(twin), copy_of(net), tolerance, "weights of mixed types")


def train_all(model: nn.Module, optimizer: Optimizer, t: int) -> None:
    give_gradients(model, t)
    optimizer.step()


@behaviour(applies=lambda make: make.maximizes)
def maximize_equals_negated_gradients(make: Any) -> None:
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin, maximize=True)
    for t in range(4):
        give_gradients(model, t)
        give_gradients(twin, t, scale=-1.0)
        optimizer.step()
        other.step()
    assert_same_bits(copy_of(twin), copy_of(model), "weights of the ascent")


# -- torch.compile -----------------------------------------------------------------------------------------


@contextmanager
def fresh_compiler(*, refuse_recompilation: bool) -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=refuse_recompilation):
        yield


@behaviour(forms=EAGER, costly=True, backend=("eager", "inductor"))
def compiled_step_equals_eager(make: Any, *, backend: str) -> None:
    """`torch.compile(optimizer.step, fullgraph=True)` compiles whole and is not compiled again over ten steps of a
    scheduler that writes into a tensor rate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 4, bias=1 in make.dims)  # compiling takes time with every tensor
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    torch._dynamo.reset()
    # Before the scheduler, which wraps the step into what torch.compile refuses for every optimiser.
    step = torch.compile(other.step, backend=backend, fullgraph=True)
    other._opt_called = True  # type: ignore[attr-defined]  # what the scheduler's wrapper would note
    schedules = []
    for opt in (optimizer, other):
        for group in opt.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))
        schedules.append(lr_scheduler.ExponentialLR(opt, gamma=0.9))
    for t in range(13):
        give_gradients(model, t)
        give_gradients(twin, t)
        optimizer.step()
        # State appears in the first step and the second is compiled with it; from the third on nothing is new.
        with fresh_compiler(refuse_recompilation=t >= 3):
            step()
        for schedule in schedules:
            schedule.step()
    torch._dynamo.reset()
    assert_close(copy_of(twin), copy_of(model), 1e-5, "weights of the compiled step")


# -- waiting for the device --------------------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Refuses every operation that copies a value which depends on the weights to the host.

    On a CPU such a read costs nothing and would go unnoticed; on an accelerator it waits for all queued work. Step
    counts and rates that live on the host do not depend on weights and may be read.
    """

    READS = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal")
    SHAPED_BY_DATA = (
        "aten.nonzero",
        "aten.masked_select",
        "aten._unique",
        "aten.unique",
        "aten.index.Tensor",
    )

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.watched = {id(tensor) for tensor in watched}
        self.alive: list[Tensor] = list(watched)  # ids stay theirs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        depends = any(id(tensor) in self.watched for tensor in inputs)
        name = str(func)
        if depends and name.startswith(self.READS):
            raise AssertionError(f"{name} reads a value that depends on the weights")
        if depends and name.startswith(self.SHAPED_BY_DATA):
            masks = [t for t in inputs if t.dtype == torch.bool]
            if "index" not in name or masks:
                raise AssertionError(f"{name} makes a shape that depends on the weights")
        out = func(*args, **kwargs)
        if depends:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.watched.add(id(leaf))
                    self.alive.append(leaf)
        return out


@behaviour()
def step_reads_nothing_back(make: Any) -> None:
    """No step, the first or a later one, reads a value of weights, gradients or device state on the host."""
    model = model_for(make)
    optimizer = make(model)
    for t in range(3):
        give_gradients(model, t)
        watched = [tensor for p in model.parameters() for tensor in (p, p.grad)]
        watched += [
            value
            for param in model.parameters()
            for name, value in optimizer.state.get(param, {}).items()
            if isinstance(value, Tensor) and name != "step"
        ]
        with NoReading([tensor for tensor in watched if tensor is not None]):
            optimizer.step()


class PretendedAccelerator(TorchFunctionMode):
    """Stands above fake CUDA tensors, which hold no values, and notes what would make the host wait.

    A copy between host and device waits for the queue unless it goes to the device, non_blocking. A CPU scalar
    beside device tensors is a kernel's argument and costs nothing. The few methods that torch binds by hand want a
    real device even for fake tensors; they are imitated here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.building = True  # a constructor may read what it likes, once

    def note(self, name: str, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if source.device.type != target.type and not (non_blocking and target.type != "cpu"):
            self.waits.append(f"{name} copies {tuple(source.shape)} from {source.device} to {target}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.copy_:
            target, source = args[:2]
            self.note("copy_", source, target.device, kwargs.get("non_blocking", len(args) > 2 and args[2]))
            return target
        if func is Tensor.to:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type != args[0].device.type:
                self.note("to", args[0], device, non_blocking)
                return torch.empty(args[0].shape, dtype=dtype or args[0].dtype, device=device)
        if func is Tensor.__getitem__ and isinstance(args[1], int):
            return torch.select(args[0], 0, args[1])
        if func in (Tensor.__float__, Tensor.item) and self.building:
            return 1.0
        if func is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if func in (Tensor.nonzero, torch.nonzero, torch.masked_select, Tensor.masked_select):
            self.waits.append(f"{func.__name__} waits to know a shape")
        return func(*args, **kwargs)


@behaviour(forms=tuple(FORMS), costly=True)
def step_runs_on_a_pretended_accelerator(make: Any) -> None:
    """With weights on a (pretended) CUDA device no step mixes devices, reads back, or waits for the queue."""
    with FakeTensorMode(), PretendedAccelerator() as device:
        model = model_for(make)
        for module in list(model.modules()):
            for name, param in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(param.shape, device="cuda")))
        optimizer = make(model)
        device.building = False
        for t in range(3):
            for param in model.parameters():
                param.grad = torch.empty_like(param)
            device.waits.clear()
            optimizer.step()
            # At the first step state is made, and constants may go to the device once.
            assert t == 0 or not device.waits, f"step {t}: {device.waits}"
        assert all(param.device.type == "cuda" for param in model.parameters())
