"""Nero, the neuronal rotator (Liu, Bernstein, Meister, Yue 2021, arXiv:2102.07227, Algorithm 1).

For a neuron with weights w and gradient g, at step t = 1, 2, ...:

    v  <-  beta v + (1 - beta) ||g||^2
    w  <-  w - lr * s * g / sqrt(v / (1 - beta^t))
    w  <-  w - mean(w)                                   (zero_mean)
    w  <-  w / ||w||                                     (unit_norm)

s is the scale of the tensor, frozen at its first step: 1 on the sphere, else the mean row norm. A bias, gain or
other entry of fan-in 1 is a neuron of its own with ||g|| = |g| and s the mean |b| (0.01 where that is 0); it is
never projected. The bias correction 1 - beta^t and the frozen s follow the authors' program (spec 1.1).
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from archopt.kernels import gpu
from archopt.neurons import NeuronDim, as_rows, balance, balance_, divisor, fan_in_dims, row_mean, row_norm
from archopt.optim import nero_gpu
from archopt.optim.base import (
    ArchOptimizer,
    Params,
    Rate,
    bias_correction,
    by_device_and_dtype,
    check_flags,
    check_forms,
    check_range,
    new_step,
    rate,
    statistics_like,
    takes_foreach,
)
from archopt.optim.nero_fused import Kept, check_rounding, fused_nero, served, unserved
from archopt.optim.nero_steady import Steady
from archopt.roles import Role, group_by_treatment, parameter_roles

DEFAULT_LR = 0.01  # 2102.07227, section 5: the one value that the paper uses out of the box
ZERO_SCALE = 0.01  # scale of a vector that starts at zero (the authors' program)


def nero_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    step: Tensor,
    *,
    lr: Rate,
    beta: float,
    dims: tuple[int, ...],
    zero_mean: bool,
    unit_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of one tensor: returns the new weight and v, the turn of each row and which rows were finite.

    weight, grad: rows of neurons, any shape, float32 or wider. exp_avg_sq: v, one entry a neuron (`dims`, the
    dimensions that a neuron sums over, kept as 1). scale: s, 0-d. step: t, 0-d, already advanced.

    A row keeps every bit, and its v, where its gradient is not finite; it keeps every bit where its gradient is
    zero, where v underflows to zero and where lr is zero.
    """
    norm = row_norm(grad, dims)
    finite = torch.isfinite(norm.square())
    v = torch.where(finite, beta * exp_avg_sq + (1 - beta) * norm.square(), exp_avg_sq)
    rms = (v / bias_correction(beta, step)).sqrt()
    moves = finite & (norm > 0) & (rms > 0) & (lr != 0)
    stride = torch.where(moves, lr * scale / rms, 0.0)
    updated = weight - torch.where(moves, stride * grad, 0.0)
    updated = balance(updated, dims, zero_mean=zero_mean, unit_norm=unit_norm)
    return torch.where(moves, updated, weight), v, stride * torch.where(moves, norm, 0.0), finite


class Nero(ArchOptimizer):
    """Nero: balanced neurons that turn by about `lr` at every step (2102.07227).

    Args:
        params: parameters, `(name, parameter)` pairs or groups: the published rule, rows along `neuron_dim`.
            A module: each parameter by its role (`archopt.parameter_roles`), which sets the neuron axis of
            transposed convolutions, positions and fan-in 1; everything else is the published rule too.
        lr: angle in radians by which a neuron turns, about (default 0.01). A float or a one-element tensor.
        beta: averaging constant of the squared gradient norms, in [0, 1).
        zero_mean: keep the mean of each neuron's weights at 0 (default True).
        unit_norm: keep the norm of each neuron's weights at 1.
        neuron_dim: dimension, or dimensions, that index neurons; the others are summed over.
        channel_groups: groups of a grouped transposed convolution, whose dimension 0 is split first.
        roles: overrides for a module, pattern of a parameter's name -> role (see `parameter_roles`).
        maximize: ascend instead.
        foreach: batch operations over tensors; None chooses them where no kernel serves (faster on CPU and GPU,
            but they hold a temporary the size of the gradients; False does not).
        fused: one call of a kernel for all tensors (`archopt.kernels.status`). None, with foreach=None, takes it
            for every tensor that it serves. True refuses the others, with the reason.
        capturable: keep the step counts on the device, for CUDA graphs (the GPU kernel always does).
        stochastic_rounding: round bfloat16 weights up or down at random, right on average, so that steps smaller
            than half a digit are not lost. By a kernel alone; refused, at the step, where none serves.

    Constructing Nero projects the weights that it constrains (rows that are balanced already keep their bits).

    Raises ValueError for values out of range, meta tensors, a neuron_dim that does not fit, and a module without
    trainable parameters; TypeError for complex parameters, sparse gradients and unknown options.

    State, per tensor: `exp_avg_sq` (v, one entry a neuron), `step`, `scale` (s), `turn` (mean turn of the rows at
    the last step, radians) and `skipped` (rows left alone so far because their gradient was not finite).

    Example:
        >>> import torch, archopt
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = archopt.Nero(model)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(model.weight.norm(dim=1), torch.ones(4)))
        True
    """

    state_names = ("step", "exp_avg_sq", "scale", "turn", "skipped")
    needs_all_gradients = ""
    # What steps keep; `_last` is what the kernel on a GPU did.
    _plans: gpu.Plans
    _kept: Kept
    _steady: Steady
    _last: tuple[list[nero_gpu.Members], nero_gpu.Served] | None

    def __init__(
        self,
        params: Params,
        lr: Rate | None = None,
        beta: float = 0.999,
        *,
        zero_mean: bool | None = None,
        unit_norm: bool = True,
        neuron_dim: NeuronDim = 0,
        channel_groups: int = 1,
        roles: Mapping[str, str] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        if isinstance(params, nn.Module):
            params = module_groups(params, roles)
        elif roles is not None:
            raise ValueError("roles=... needs a module: Nero(model, roles=...), not Nero(parameters)")
        defaults = {
            "lr": DEFAULT_LR if lr is None else lr,
            "beta": beta,
            "zero_mean": True if zero_mean is None else zero_mean,
            "unit_norm": unit_norm,
            "neuron_dim": neuron_dim,
            "channel_groups": channel_groups,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _nothing_kept(self) -> dict[str, Any]:
        return {"_plans": gpu.Plans(), "_kept": Kept(), "_steady": Steady(), "_last": None}

    def mean_turn(self) -> dict[str, Tensor]:
        """Mean turn of the last step in radians, by role (by group where no roles are known), as 0-d tensors."""
        turns: dict[str, list[Tensor]] = {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if "turn" in self.state.get(param, {}):
                    turns.setdefault(group.get("role", f"group {index}"), []).append(
                        self.state[param]["turn"]
                    )
        return {role: torch.stack(values).mean() for role, values in turns.items()}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("Nero", "lr", group["lr"], low=0.0)
        check_range("Nero", "beta", group["beta"], low=0.0, high=1.0)
        check_range("Nero", "channel_groups", group["channel_groups"], low=1)
        check_flags("Nero", group, "zero_mean", "unit_norm", "stochastic_rounding")
        check_forms("Nero", group, has_fused=True)
        for item in group["params"]:
            param = item[1] if isinstance(item, tuple) else item
            if isinstance(param, Tensor):
                _dims(param, group)
                if group["fused"] and param.requires_grad and param.numel() > 0:
                    (nero_gpu.unserved if param.device.type in gpu.DEVICE_TYPES else unserved)(param, group)

    def _constrain_group(self, group: dict[str, Any]) -> None:
        for param in self._trainable(group):
            _project(param, group)

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dims = _dims(param, group)
        norm = row_norm(as_rows(param.detach(), group["channel_groups"] if dims else 1), dims)
        if dims and group["unit_norm"]:
            scale = torch.ones((), dtype=norm.dtype, device=norm.device)
        else:
            mean = norm.mean()
            scale = torch.where(mean == 0, ZERO_SCALE, mean)
        return {
            "step": new_step(param, {"capturable": group["capturable"] or nero_gpu.wants_gpu(param, group)}),
            "exp_avg_sq": torch.zeros_like(norm, dtype=statistics_like(param)),
            "scale": scale,
            "turn": torch.zeros((), dtype=torch.float32, device=param.device),
            "skipped": torch.zeros((), dtype=torch.int32, device=param.device),
        }

    def _create_state(self) -> None:
        for group in self.param_groups:
            for param in self._trainable(group):
                if not (state := self.state[param]):
                    if param.grad is not None:
                        # Weights that were frozen at construction, or loaded after it, are not balanced yet.
                        _project(param, group, only=param.grad)
                    state.update(self._init_state(param, group))

    def _step_all(self) -> None:
        if not self._steady.repeats(self.param_groups, self.state):
            super()._step_all()
            if self._last is not None:
                self._steady.learn(*self._last, self.state)

    def _update(self) -> None:
        groups: list[nero_gpu.Members] = []
        number = self._first_number
        for group in self.param_groups:
            params = [p for p in self._trainable(group) if p.grad is not None]
            groups.append(nero_gpu.Members(group, params, [self.state[p] for p in params], number))
            number += len(group["params"])
        # What serves which weights, of all groups first: a refusal must come before anything moves.
        on_gpu = nero_gpu.served(groups, self._plans)
        work: list[Any] = []
        for (group, params, states, number), left in zip(groups, on_gpu.rest, strict=True):
            others, their_states = [params[i] for i in left], [states[i] for i in left]
            found = served(others, their_states, group, number, self._kept)
            rest = [others[i] for i in found.rest]
            check_rounding(params, rest, group)
            work.append((group, others, found, rest, [their_states[i] for i in found.rest]))
        if not torch.compiler.is_compiling():  # which cannot follow it, and needs no launches
            self._last = (groups, on_gpu) if on_gpu.launches else None
        nero_gpu.gpu_nero(on_gpu, groups)
        for group, others, found, rest, states in work:
            fused_nero(found, others, group)
            if rest:
                torch._foreach_add_([state["step"] for state in states], 1)
                form = _foreach_nero if takes_foreach(group) else _single_tensor_nero
                form(rest, states, group)


def _dims(param: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
    return fan_in_dims(param.shape, group["neuron_dim"], group["channel_groups"])


def _project(param: Tensor, group: dict[str, Any], only: Tensor | None = None) -> None:
    """Balances a parameter; with a gradient `only`, just the rows that it will move."""
    dims = _dims(param, group)
    if not dims:
        return
    before = None if only is None else param.clone()
    balance_(param, dims, group["channel_groups"], zero_mean=group["zero_mean"], unit_norm=group["unit_norm"])
    if before is not None and only is not None:
        norm = row_norm(as_rows(only, group["channel_groups"]), dims)
        rows = as_rows(param, group["channel_groups"])
        moves = torch.isfinite(norm) & (norm > 0)
        rows.copy_(torch.where(moves, rows, as_rows(before, group["channel_groups"])))


def _single_tensor_nero(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    for param, state in zip(params, states, strict=True):
        assert param.grad is not None
        dims = _dims(param, group)
        channel_groups = group["channel_groups"] if dims else 1
        exact = statistics_like(param)
        weight = as_rows(param, channel_groups)
        grad = as_rows(-param.grad if group["maximize"] else param.grad, channel_groups)
        updated, v, turn, finite = nero_update(
            weight.to(exact),
            grad.to(exact),
            state["exp_avg_sq"],
            state["scale"],
            state["step"],
            lr=rate(group),
            beta=group["beta"],
            dims=dims,
            zero_mean=group["zero_mean"],
            unit_norm=group["unit_norm"],
        )
        weight.copy_(updated)
        state["exp_avg_sq"].copy_(v)
        state["turn"].copy_(turn.mean())
        state["skipped"] += (~finite).sum()


def _foreach_nero(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    """The same step with the statistics of all rows in one vector and one launch a list of tensors."""
    for indices in by_device_and_dtype(params):
        _foreach_bucket([params[i] for i in indices], [states[i] for i in indices], group)


def _foreach_bucket(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    lr, beta, exact = rate(group), group["beta"], statistics_like(params[0])
    all_dims = [_dims(p, group) for p in params]
    weights, grads = [], []
    for param, dims in zip(params, all_dims, strict=True):
        assert param.grad is not None
        channel_groups = group["channel_groups"] if dims else 1
        weights.append(as_rows(param, channel_groups))
        grads.append(as_rows(param.grad, channel_groups).to(exact))
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))

    # Statistics of all rows, one vector each.
    norms = [row_norm(g, dims) for g, dims in zip(grads, all_dims, strict=True)]
    sizes = [norm.numel() for norm in norms]
    ordinary = (
        type(norms[0]) is Tensor and not torch.compiler.is_compiling()
    )  # a fake tensor must not be kept
    count = _counts if ordinary else _counts.__wrapped__
    counts = count(tuple(sizes), norms[0].device)
    norm = torch.cat([norm.flatten() for norm in norms])
    old = torch.cat([state["exp_avg_sq"].flatten() for state in states])
    finite = torch.isfinite(norm.square())
    v = torch.where(finite, beta * old + (1 - beta) * norm.square(), old)
    corrections = bias_correction(beta, torch.stack([state["step"] for state in states])).sqrt()
    rates = (
        lr
        * torch.stack([state["scale"] for state in states])
        * corrections.to(norm.device, exact, non_blocking=True)
    )
    rates = rates.repeat_interleave(counts, output_size=norm.numel())
    moves = finite & (norm > 0) & (v > 0) & (lr != 0)
    stride = torch.where(moves, rates / v.sqrt(), 0.0)
    turn = stride * torch.where(moves, norm, 0.0)

    def by_tensor(rows: Tensor) -> list[Tensor]:
        return [part.view_as(n) for part, n in zip(torch.split(rows, sizes), norms, strict=True)]

    torch._foreach_copy_([state["exp_avg_sq"] for state in states], by_tensor(v))
    mean_turn = torch.segment_reduce(turn, "mean", lengths=counts)
    skipped = torch.segment_reduce((~finite).to(exact), "sum", lengths=counts).to(torch.int32)
    torch._foreach_copy_([state["turn"] for state in states], list(mean_turn.unbind()))
    torch._foreach_add_([state["skipped"] for state in states], list(skipped.unbind()))

    # Move; then centre and normalise the rows that moved. For the others every operation is an exact identity.
    moving = by_tensor(moves)
    targets = weights if exact == params[0].dtype else [w.to(exact) for w in weights]
    updates = torch._foreach_mul(grads, by_tensor(stride))
    for update, mask in zip(updates, moving, strict=True):
        update.masked_fill_(~mask, 0.0)
    torch._foreach_sub_(targets, updates)
    on_sphere = [i for i, dims in enumerate(all_dims) if dims]
    rows = [targets[i] for i in on_sphere]
    means: list[Tensor] = []
    if group["zero_mean"] and rows:
        means = [torch.where(moving[i], row_mean(targets[i], all_dims[i]), 0.0) for i in on_sphere]
        torch._foreach_sub_(rows, means)
    if group["unit_norm"] and rows:
        divisors = []
        for position, i in enumerate(on_sphere):
            mean = means[position] if means else None
            length = divisor(row_norm(targets[i], all_dims[i]), mean, targets[i].numel())
            divisors.append(torch.where(moving[i], length, 1.0))
        torch._foreach_div_(rows, divisors)
    if targets is not weights:
        torch._foreach_copy_(weights, targets)


@functools.lru_cache(maxsize=64)
def _counts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows a tensor; kept, since making it again at each step would copy from the host."""
    return torch.tensor(sizes, device=device)


def module_groups(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Parameter groups of a module for Nero, one for each treatment, with names."""
    return group_by_treatment(parameter_roles(model, roles), nero_treatment)


def nero_treatment(role: Role) -> dict[str, Any]:
    """What Nero does with a role, as group options."""
    return {
        "role": role.kind,
        "neuron_dim": role.neuron_dim,
        "channel_groups": role.channel_groups,
    }
