"""Madam, the multiplicative Adam (Bernstein et al. 2020, arXiv:2006.14560), a baseline of Nero (2102.07227).

For a weight w with gradient g, at step t = 1, 2, ...:

    v  <-  beta v + (1 - beta) g^2
    d  <-  clamp(g / sqrt(v / (1 - beta^t)), -g_bound, g_bound)
    w  <-  clamp(w exp(-lr d sign(w)), -max, max)

max is p_scale times the root mean square of the tensor, taken at the first step. Signs never change, and a weight
that is exactly zero never moves: biases and shifts that start at zero stay there for the whole training.

With `constant_sum`, each row of a 2-D or 4-D tensor is then scaled so that its positive entries add up to
sum_scale N^sum_power and its negative ones to minus that, N = rows (times kernel height and width in 4-D).
"""

import math
from typing import Any

import torch
from torch import Tensor

from archopt.neurons import fan_in_dims
from archopt.optim.base import (
    ArchOptimizer,
    Params,
    Rate,
    bias_correction,
    by_device_and_dtype,
    check_flags,
    check_forms,
    check_range,
    choose,
    new_step,
    rate,
    statistics_like,
    takes_foreach,
    with_names,
)

DEFAULT_LR = 0.01  # 2006.14560: the value that the paper uses across tasks
VECTOR_BOUND = 100.0  # what constant_sum does to vectors: clamps them (the authors' program)


def madam_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg_sq: Tensor,
    maximum: Tensor,
    step: Tensor,
    *,
    lr: Rate,
    beta: float,
    g_bound: float,
    sums: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of one tensor: returns the new w, v, and whether the gradient was finite (0-d).

    weight, grad, exp_avg_sq (v): one shape, float32 or wider. maximum: max, 0-d. step: t, 0-d, already advanced.
    sums: (sum_scale, sum_power) of the constant-sum map, or None.

    The tensor keeps every bit, and v too, where its gradient is not finite; the tensor keeps every bit where lr is
    zero, a row (an entry of a vector) where its gradient is zero or v underflows to zero, and a weight where it is
    zero.
    """
    finite = torch.isfinite(grad.abs().amax().square())
    v = torch.where(finite, beta * exp_avg_sq + (1 - beta) * grad.square(), exp_avg_sq)
    rms = (v / bias_correction(beta, step)).sqrt()
    direction = torch.where(finite & (rms > 0), grad / rms, 0.0).clamp(-g_bound, g_bound)
    updated = (weight * torch.exp(-lr * direction * weight.sign())).clamp(-maximum, maximum)
    if sums is not None:
        updated = constant_sum(updated, *sums)
    return torch.where(_moves(direction) & (lr != 0), updated, weight), v, finite


def _moves(direction: Tensor) -> Tensor:
    """For each row (each entry of a vector), whether it has anywhere to go."""
    dims = fan_in_dims(direction.shape)
    if not dims:
        return direction != 0
    largest: Tensor = torch.linalg.vector_norm(direction, torch.inf, dim=dims, keepdim=True)
    return largest > 0


def constant_sum(weight: Tensor, scale: float, power: float) -> Tensor:
    """The constant-sum map of 2-D and 4-D tensors; vectors are clamped to [-100, 100], others left alone.

    A row without positive (negative) entries has nothing to scale on that side: there is no 0/0.
    """
    if weight.ndim == 1:
        return weight.clamp(-VECTOR_BOUND, VECTOR_BOUND)
    if weight.ndim not in (2, 4):
        return weight
    total = scale * (weight.shape[0] * math.prod(weight.shape[2:])) ** power
    dims = tuple(range(1, weight.ndim))
    positive = weight.clamp_min(0).sum(dim=dims, keepdim=True)
    negative = -weight.clamp_max(0).sum(dim=dims, keepdim=True)
    side = torch.where(weight > 0, positive, negative)
    return torch.where(weight != 0, total * weight / side, weight)


class Madam(ArchOptimizer):
    """Madam: each weight changes by a factor of about exp(lr), its sign never (2006.14560).

    Args:
        params: parameters, `(name, parameter)` pairs, groups, or a module (its parameters with their names).
        lr: relative change of a weight at a step, about (default 0.01). A float or a one-element tensor.
        beta: averaging constant of the squared gradients, in [0, 1).
        p_scale: bound of each tensor's weights, as a multiple of its root mean square at the first step.
        g_bound: bound of the normalised gradient.
        constant_sum: keep the sums of each row's positive and negative entries constant.
        sum_scale: a of these sums, a N^p.
        sum_power: p of these sums.
        maximize: ascend instead.
        foreach: batch operations over tensors; None chooses it (it holds two temporaries the size of the
            weights; False does not).
        fused: no fused form yet; True is refused.
        capturable: keep the step counts on the device, for CUDA graphs.

    A tensor that is all zero at its first step (most biases) stays zero: initialise it otherwise, or give it to
    another optimiser.

    Raises ValueError for values out of range, meta tensors and a module without trainable parameters; TypeError
    for complex parameters, sparse gradients and unknown options.

    State, per tensor: `step`, `exp_avg_sq` (v; float32 for half-precision weights), `max` (0-d, the bound, taken
    from the weights at the first step) and `skipped` (steps left out so far because the gradient was not finite).

    Example:
        >>> import torch
        >>> from archopt.optim.madam import Madam
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Madam(model)
        >>> signs = model.weight.sign()
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> bool((model.weight.sign() == signs).all())
        True
    """

    state_names = ("step", "exp_avg_sq", "max", "skipped")
    needs_all_gradients = ""

    def __init__(
        self,
        params: Params,
        lr: Rate = DEFAULT_LR,
        beta: float = 0.999,
        *,
        p_scale: float = 3.0,
        g_bound: float = 10.0,
        constant_sum: bool = False,
        sum_scale: float = 0.5,
        sum_power: float = 0.5,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "p_scale": p_scale,
            "g_bound": g_bound,
            "constant_sum": constant_sum,
            "sum_scale": sum_scale,
            "sum_power": sum_power,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(with_names("Madam", params), defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("Madam", "lr", group["lr"], low=0.0)
        check_range("Madam", "beta", group["beta"], low=0.0, high=1.0)
        for name in ("p_scale", "g_bound", "sum_scale", "sum_power"):
            check_range("Madam", name, group[name], low=0.0)
        check_flags("Madam", group, "constant_sum")
        check_forms("Madam", group)

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        exact = statistics_like(param)
        return {
            "step": new_step(param, group),
            "exp_avg_sq": torch.zeros_like(param, dtype=exact),
            "max": group["p_scale"] * param.detach().to(exact).square().mean().sqrt(),
            "skipped": torch.zeros((), dtype=torch.int32, device=param.device),
        }

    def _update(self) -> None:
        for group in self.param_groups:
            params = [p for p in self._trainable(group) if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for state in states:
                state["step"] += 1
            form = _foreach_madam if takes_foreach(group) else _single_tensor_madam
            form(params, states, group)


def _single_tensor_madam(
    params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> None:
    for param, state in zip(params, states, strict=True):
        assert param.grad is not None
        exact = statistics_like(param)
        updated, v, finite = madam_update(
            param.to(exact),
            (-param.grad if group["maximize"] else param.grad).to(exact),
            state["exp_avg_sq"],
            state["max"],
            state["step"],
            lr=rate(group),
            beta=group["beta"],
            g_bound=group["g_bound"],
            sums=_sums(group),
        )
        param.copy_(updated)
        state["exp_avg_sq"].copy_(v)
        state["skipped"] += ~finite


def _sums(group: dict[str, Any]) -> tuple[float, float] | None:
    return (group["sum_scale"], group["sum_power"]) if group["constant_sum"] else None


def _foreach_madam(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    """The same step with one launch a list of tensors for whatever is not a row's or a tensor's own."""
    for indices in by_device_and_dtype(params):
        _foreach_bucket([params[i] for i in indices], [states[i] for i in indices], group)


def _foreach_bucket(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    lr, beta, exact = rate(group), group["beta"], statistics_like(params[0])
    weights = [p.to(exact) for p in params]
    grads = [p.grad.to(exact) for p in params if p.grad is not None]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    vs = [state["exp_avg_sq"] for state in states]
    peak = torch.stack(torch._foreach_norm(grads, torch.inf))
    finite = torch.isfinite(peak.square())

    # Tensors whose gradient is not finite stand aside: their gradient counts as 0, their v decays by 1.
    directions = choose(finite, grads, [torch.zeros_like(peak[0])] * len(grads))
    torch._foreach_mul_(vs, torch.ones_like(peak).masked_fill(finite, beta).unbind())
    torch._foreach_addcmul_(vs, directions, directions, value=1 - beta)
    del grads

    # 0/0, and g/0 where v underflowed, are no move.
    torch._foreach_div_(directions, torch._foreach_sqrt(vs))
    for direction in directions:
        direction.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    corrections = bias_correction(beta, torch.stack([state["step"] for state in states])).sqrt()
    torch._foreach_mul_(directions, corrections.to(finite.device, exact, non_blocking=True).unbind())
    torch._foreach_clamp_min_(directions, -group["g_bound"])
    torch._foreach_clamp_max_(directions, group["g_bound"])
    moving = [_moves(direction) & (lr != 0) for direction in directions]

    torch._foreach_mul_(directions, torch._foreach_sign(weights))
    torch._foreach_mul_(directions, -lr.to(finite.device, exact) if isinstance(lr, Tensor) else -lr)
    torch._foreach_exp_(directions)
    torch._foreach_mul_(directions, weights)
    sums = _sums(group)
    for param, weight, update, moves, state in zip(params, weights, directions, moving, states, strict=True):
        update = update.clamp_(-state["max"], state["max"])
        if sums is not None:
            update = constant_sum(update, *sums)
        param.copy_(torch.where(moves, update, weight))
    torch._foreach_add_([state["skipped"] for state in states], (~finite).to(torch.int32).unbind())
