"""LAMB (You et al. 2019, arXiv:1904.00962) as the authors of Nero ran it as a baseline (arXiv:2102.07227).

For a tensor with weights w and gradient g, a whole tensor being one layer:

    m  <-  beta1 m + (1 - beta1) g
    v  <-  beta2 v + (1 - beta2) g^2
    u  <-  m / (sqrt(v) + eps) + weight_decay * w
    r  <-  min(||w||, 10) / ||u||                        (1 where either norm is 0)
    w  <-  w - lr * r * u

There is no bias correction unless asked for. A tensor that starts at zero therefore moves by
lr (1 - beta1) / sqrt(1 - beta2) an entry at its first step: 3.16 lr with beta1 = 0.9, 31.6 lr with beta1 = 0.
"""

from typing import Any

import torch
from torch import Tensor

from archopt.optim.base import (
    ArchOptimizer,
    Params,
    Rate,
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
from archopt.optim.base import bias_correction as correction_of

MAX_WEIGHT_NORM = 10.0  # phi(z) = min(z, 10) is the baseline's choice; 1904.00962 leaves phi open


def lamb_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam_norm: Tensor,
    step: Tensor,
    *,
    lr: Rate,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    max_weight_norm: float | None,
    trust_ratio: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """One step of one tensor: returns w, m, v, (||w||, ||u||, r), whether it counts, and whether it was finite.

    weight, grad, exp_avg (m), exp_avg_sq (v): one shape, float32 or wider. adam_norm: ||u|| of the last step that
    counted, 0-d, 0 before the first. step: t, 0-d, already advanced.

    Everything stays as it is where the gradient is not finite. The weights keep every bit where lr is zero, and
    until the first gradient that is not zero (weight decay too waits for it).
    """
    beta1, beta2 = betas
    peak = grad.abs().amax()
    finite = torch.isfinite(peak.square())
    counts = finite & ((peak > 0) | (adam_norm > 0))

    m = torch.where(finite, beta1 * exp_avg + (1 - beta1) * grad, exp_avg)
    v = torch.where(finite, beta2 * exp_avg_sq + (1 - beta2) * grad.square(), exp_avg_sq)
    first, second = m, v
    if bias_correction:
        first, second = m / correction_of(beta1, step), v / correction_of(beta2, step)
    u = first / _nonzero(second.sqrt() + eps)
    if weight_decay:
        u = u + weight_decay * weight

    norms = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(u)
    weight_norm, u_norm, ratio = _trust(*norms, max_weight_norm)
    stride = lr * ratio if trust_ratio else lr
    updated = torch.where(counts & (lr != 0), weight - stride * u, weight)
    return updated, m, v, (weight_norm, u_norm, ratio), counts, finite


def _trust(
    weight_norm: Tensor, u_norm: Tensor, max_weight_norm: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The clamped norm of the weights, that of the direction, and their ratio (1 where either is 0)."""
    if max_weight_norm is not None:
        weight_norm = weight_norm.clamp_max(max_weight_norm)
    ratio = weight_norm / u_norm
    ratio = torch.where(
        (ratio > 0) & torch.isfinite(ratio), ratio, 1.0
    )  # 1 where either norm is 0, or as good as
    return weight_norm, u_norm, ratio


def _nonzero(denominator: Tensor) -> Tensor:
    """Infinity in place of 0, so that 0/0 is no move. With eps > 0 nothing is 0."""
    return torch.where(denominator > 0, denominator, torch.inf)


class Lamb(ArchOptimizer):
    """LAMB, layerwise Adam, with the numbers of the published baseline (1904.00962, 2102.07227).

    Args:
        params: parameters, `(name, parameter)` pairs, groups, or a module (its parameters with their names).
        lr: step size, relative to the norm of each tensor. A float or a one-element tensor.
        betas: averaging constants of the gradient and of its square, each in [0, 1). The published experiments
            take (0, 0.999) everywhere but on MNIST.
        eps: added to the root of v.
        weight_decay: adds `weight_decay * w` to the direction, before its norm is taken.
        bias_correction: divide m by 1 - beta1^t and v by 1 - beta2^t. The baseline does not.
        max_weight_norm: bound of ||w|| in the trust ratio; None takes ||w|| as it is.
        trust_ratio: scale the step by r. With False the ratio is recorded but not used (Adam without bias
            correction).
        maximize: ascend instead.
        foreach: batch operations over tensors; None chooses it (it holds two temporaries the size of the
            weights; False does not).
        fused: no fused form yet; True is refused.
        capturable: keep the step counts on the device, for CUDA graphs.

    Raises ValueError for values out of range, meta tensors and a module without trainable parameters; TypeError
    for complex parameters, sparse gradients and unknown options.

    State, per tensor: `step`, `exp_avg` (m) and `exp_avg_sq` (v) (float32 for half-precision weights), the 0-d
    tensors `weight_norm` (||w||, clamped), `adam_norm` (||u||) and `trust_ratio` of the last step (0 before the
    first), and `skipped` (steps left out so far because the gradient was not finite).

    Example:
        >>> import torch
        >>> from archopt.optim.lamb import Lamb
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Lamb(model, lr=0.01)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["trust_ratio"].shape
        torch.Size([])
    """

    state_names = ("step", "exp_avg", "exp_avg_sq", "weight_norm", "adam_norm", "trust_ratio", "skipped")
    needs_all_gradients = ""

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = False,
        max_weight_norm: float | None = MAX_WEIGHT_NORM,
        trust_ratio: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_weight_norm": max_weight_norm,
            "trust_ratio": trust_ratio,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(with_names("Lamb", params), defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("Lamb", "lr", group["lr"], low=0.0)
        if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
            raise TypeError(f"Lamb: betas={group['betas']!r}, expected two numbers such as (0.9, 0.999)")
        for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
            check_range("Lamb", name, beta, low=0.0, high=1.0)
        check_range("Lamb", "eps", group["eps"], low=0.0)
        check_range("Lamb", "weight_decay", group["weight_decay"], low=0.0)
        if group["max_weight_norm"] is not None:
            check_range("Lamb", "max_weight_norm", group["max_weight_norm"], low=0.0)
        check_flags("Lamb", group, "bias_correction", "trust_ratio")
        check_forms("Lamb", group)

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        exact = statistics_like(param)
        zero = torch.zeros((), dtype=exact, device=param.device)
        return {
            "step": new_step(param, group),
            "exp_avg": torch.zeros_like(param, dtype=exact),
            "exp_avg_sq": torch.zeros_like(param, dtype=exact),
            "weight_norm": zero,
            "adam_norm": zero.clone(),
            "trust_ratio": zero.clone(),
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
            form = _foreach_lamb if takes_foreach(group) else _single_tensor_lamb
            form(params, states, group)


def _single_tensor_lamb(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    for param, state in zip(params, states, strict=True):
        assert param.grad is not None
        exact = statistics_like(param)
        grad = (-param.grad if group["maximize"] else param.grad).to(exact)
        updated, m, v, record, counts, finite = lamb_update(
            param.to(exact),
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["adam_norm"],
            state["step"],
            lr=rate(group),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=group["bias_correction"],
            max_weight_norm=group["max_weight_norm"],
            trust_ratio=group["trust_ratio"],
        )
        param.copy_(updated)
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        for name, value in zip(("weight_norm", "adam_norm", "trust_ratio"), record, strict=True):
            state[name].copy_(torch.where(counts, value, state[name]))
        state["skipped"] += ~finite


def _foreach_lamb(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    """The same step with one launch a list of tensors, and the numbers of all tensors in one vector each."""
    for indices in by_device_and_dtype(params):
        _foreach_bucket([params[i] for i in indices], [states[i] for i in indices], group)


def _foreach_bucket(params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    lr, (beta1, beta2), exact = rate(group), group["betas"], statistics_like(params[0])
    weights = [p.to(exact) for p in params]
    grads = [p.grad.to(exact) for p in params if p.grad is not None]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    ms = [state["exp_avg"] for state in states]
    vs = [state["exp_avg_sq"] for state in states]
    peak = torch.stack(torch._foreach_norm(grads, torch.inf))
    finite = torch.isfinite(peak.square())
    counts = finite & ((peak > 0) | (torch.stack([state["adam_norm"] for state in states]) > 0))

    # Tensors whose gradient is not finite stand aside: their statistics decay by 1, and -0 added to a number
    # leaves its bits.
    grads = choose(finite, grads, [torch.full_like(peak[0], -0.0)] * len(grads))
    torch._foreach_mul_(ms, torch.ones_like(peak).masked_fill(finite, beta1).unbind())
    torch._foreach_add_(ms, grads, alpha=1 - beta1)
    torch._foreach_mul_(vs, torch.ones_like(peak).masked_fill(finite, beta2).unbind())
    torch._foreach_addcmul_(vs, grads, grads, value=1 - beta2)
    del grads

    firsts, seconds = ms, vs
    if group["bias_correction"]:
        steps = torch.stack([state["step"] for state in states])
        corrections = [
            correction_of(beta, steps).to(peak.device, exact, non_blocking=True).unbind()
            for beta in (beta1, beta2)
        ]
        firsts = list(torch._foreach_div(ms, corrections[0]))
        seconds = list(torch._foreach_div(vs, corrections[1]))
    denominators = list(torch._foreach_sqrt(seconds))
    torch._foreach_add_(denominators, group["eps"])
    if group["eps"] == 0:
        denominators = [_nonzero(denominator) for denominator in denominators]
    us = torch._foreach_div(firsts, denominators)
    del denominators
    if group["weight_decay"]:
        torch._foreach_add_(us, weights, alpha=group["weight_decay"])

    norms = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(us))
    record = _trust(*norms, group["max_weight_norm"])
    stride = lr * record[2] if group["trust_ratio"] else torch.ones_like(record[2]) * lr
    moves = counts & (lr != 0)
    torch._foreach_mul_(us, stride.unbind())
    for u, stays in zip(us, (~moves).unbind(), strict=True):
        u.masked_fill_(stays, 0.0)
    torch._foreach_sub_(weights, us)
    if exact != params[0].dtype:
        torch._foreach_copy_(params, weights)

    for name, value in zip(("weight_norm", "adam_norm", "trust_ratio"), record, strict=True):
        old = [state[name] for state in states]
        torch._foreach_copy_(old, torch.where(counts, value, torch.stack(old)).unbind())
    torch._foreach_add_([state["skipped"] for state in states], (~finite).to(torch.int32).unbind())
