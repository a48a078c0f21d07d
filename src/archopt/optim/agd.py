"""AGD, automatic gradient descent (Bernstein, Mingard, Huang, Azizan, Yue 2023, arXiv:2304.05187).

For weights w_j, j = 1 ... L, with gradients g_j, radii r_j, shares m_j and norms ||.||_j:

    G    =  sum_j  m_j r_j ||g_j||*                gradient summary; ||.||* is the dual norm
    eta  =  ln((1 + sqrt(1 + 4 G)) / 2)            the automatic step size
    w_j <-  w_j - eta m_j r_j a_j                  a_j = argmax <g_j, a> over ||a||_j <= 1

Published (Algorithm 1 of the paper): m_j = 1/L; r_j = sqrt(d_out/d_in), for convolutions over sqrt(taps); and
the Frobenius norm of each tap, where ||g||* is the sum over taps of ||g||_F and a = g/||g||_F. The others
stand in `archopt.optim.oracles`.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archopt.kernels import gpu
from archopt.kernels.cpu_agd import AGDTensor
from archopt.optim import oracles
from archopt.optim.agd_fused import Group, Move, Ready, fused_agd, key_of, served, unserved
from archopt.optim.base import (
    ArchOptimizer,
    Params,
    check_forms,
    check_range,
    statistics_like,
    takes_foreach,
)
from archopt.roles import Overrides


def agd_step_size(summary: Tensor) -> Tensor:
    """eta = ln((1 + sqrt(1 + 4G)) / 2), the solution of exp(2 eta) - exp(eta) = G; exact for small G too."""
    return torch.log1p(2 * summary / (1 + torch.sqrt(1 + 4 * summary)))


def agd_update(weight: Tensor, grad: Tensor, peak: Tensor, size: Tensor, distance: Tensor) -> Tensor:
    """w - distance * g/||g|| for each part of one tensor, where ||g|| = peak * size.

    weight, grad: one shape, float32 or wider. peak, size: one entry a part, broadcast over it (see
    `oracles.measure`). distance: eta m r times the 2-norm of a unit step, 0-d.

    An entry whose update is zero keeps its bits; so does a part that is zero or not finite.
    """
    update = torch.where(size > 0, distance / size * (grad / peak), 0.0)
    return torch.where(update == 0, weight, weight - update)


class Block(NamedTuple):
    """One parameter that has a gradient, and what the rule needs to know of it."""

    weight: Tensor  # the parameter, as parts
    grad: Tensor  # its gradient, as parts
    dims: tuple[int, ...]  # what a part sums over
    reach: float  # m r f: how far a step of eta = 1 moves each part
    pace: float  # gain * lr; negative to ascend
    lr: Tensor | None  # the learning rate where it is a tensor, and then not in `pace`

    def exact_grad(self) -> Tensor:
        """The gradient in float32 or wider."""
        return self.grad.to(statistics_like(self.weight))

    def paced(self, eta: Tensor) -> Tensor:
        """eta, times the learning rate if that is a tensor."""
        return eta if self.lr is None else eta * self.lr


class AGD(ArchOptimizer):
    """Automatic gradient descent: no learning rate, no momentum, no state (2304.05187).

    Args:
        params: parameters, `(name, parameter)` pairs or groups: the published rule, which refuses tensors
            with fewer than two dimensions. A module: each parameter by its role (`archopt.parameter_roles`),
            biases, gains, embeddings and packed projections included; initial weights stay. On bias-free
            linear and plain 2-D convolutional layers both are one rule.
        gain: multiplies the update (the paper uses 1).
        roles: overrides for a module, pattern of a parameter's name -> role (see `parameter_roles`).
        error_if_nonfinite: raise RuntimeError at a gradient that is not finite, before anything moves; costs
            one synchronisation a step. By default such a step is void and counted in `skipped_steps`.
        maximize: ascend instead.
        foreach: batch operations over tensors, for a copy of the gradients during the step; None means True where
            no kernel serves.
        fused: two calls of a kernel for all tensors of a type (`archopt.kernels.status`). None, with
            foreach=None, takes it for every tensor that it serves. True refuses the others, with the reason.
        capturable: accepted as in torch's optimisers; a step never reads the device in any case.

    Options of a group, with the values of AGD(params): lr=1.0 (a multiplier for schedulers, not a knob),
    norm="published" (see `archopt.optim.oracles`), radius=None (from the shape), share=1.0 (of the step,
    relative to other tensors), uses=1 (how often the network applies the tensor), slices=1 and groups=1 (of
    dimension 0), stride=1, neuron_dim=0. A step is gain * lr * eta.

    Shares are normalised over all tensors that require a gradient at that step, whether or not they got one:
    sum(share * uses * slices) = 1. Freezing or unfreezing some thus changes the steps of the others.

    `eta` and `gradient_summary` (G) of the last step, and `skipped_steps`, are 0-d tensors on the parameters'
    device. eta is without gain and lr. Both are NaN before the first step; eta is 0 in a void step. They are
    not part of the state dict, whose `state` is always empty; pickling, copying and loading reset them.

    Raises ValueError for values out of range, tensors that their norm does not fit and meta tensors, and
    TypeError for complex parameters, sparse gradients and unknown options.

    Example:
        >>> import torch, archopt
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = archopt.AGD(model)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(0 < optimizer.eta < optimizer.gradient_summary)
        True
    """

    needs_all_gradients = "its step size is formed from the gradients of all tensors"
    _plans: gpu.Plans
    _ready: gpu.Plans  # steps that kernels on GPUs serve wholly

    def __init__(
        self,
        params: Params,
        *,
        gain: float = 1.0,
        roles: Overrides | None = None,
        error_if_nonfinite: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        if isinstance(params, nn.Module):
            params = oracles.module_groups(params, roles)
        elif roles is not None:
            raise ValueError("roles=... needs a module: AGD(model, roles=...), not AGD(parameters)")
        defaults = {
            "lr": 1.0,
            "gain": gain,
            **oracles.PUBLISHED,
            "error_if_nonfinite": error_if_nonfinite,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)
        self._reset_report()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_report()

    def _nothing_kept(self) -> dict[str, Any]:
        return {"_plans": gpu.Plans(), "_ready": gpu.Plans()}

    def _reset_report(self) -> None:
        device = self._home()
        self._eta = torch.full((), float("nan"), dtype=oracles.scalar_dtype(device), device=device)
        self._gradient_summary = self._eta.clone()
        self._skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    def _home(self) -> torch.device:
        params = [param for group in self.param_groups for param in group["params"]]
        return params[0].device if params else torch.device("cpu")

    @property
    def eta(self) -> Tensor:
        """The automatic step size of the last step, without gain and lr; 0-d."""
        return self._eta.clone()

    @property
    def gradient_summary(self) -> Tensor:
        """G of the last step; 0-d."""
        return self._gradient_summary.clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were void since construction or loading, their gradients not finite; 0-d."""
        return self._skipped_steps.clone()

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "gain"):
            check_range("AGD", name, group[name], low=0.0)
        check_forms("AGD", group, has_fused=True)
        oracles.check_group(group)
        for item in group["params"] if group["fused"] else []:
            param = item[1] if isinstance(item, tuple) else item
            if isinstance(param, Tensor) and param.requires_grad and param.numel() > 0:
                unserved(param, group)

    def _groups(self) -> list[Group]:
        """The groups with their parameters that have a gradient, and how many require one."""
        found = []
        for group in self.param_groups:
            params = self._trainable(group)
            found.append((group, [param for param in params if param.grad is not None], len(params)))
        return found

    def _blocks(self, groups: list[Group]) -> tuple[list[Block], list[Block], list[AGDTensor]]:
        """The parameters that have a gradient, for the plain, the foreach and the fused form.

        Those without one keep their share reserved: ranks and steps must not differ by which gradients exist.
        """
        total = sum(count * g["share"] * g["uses"] * g["slices"] for g, _, count in groups)
        plain: list[Block] = []
        batched: list[Block] = []
        fused: list[AGDTensor] = []
        for group, params, _ in groups:
            lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else None
            pace = (1.0 if lr is not None else group["lr"]) * group["gain"]
            pace = -pace if group["maximize"] else pace
            blocks = batched if takes_foreach(group) else plain
            for param in params:
                assert param.grad is not None
                parts = oracles.parts_of(param.shape, group)
                reach = group["share"] / total * oracles.radius_of(param.shape, group) * parts.length
                weight, grad = parts.view(param), parts.view(param.grad)
                layout = served(param, weight, grad, parts.dims, group)
                if layout is None:
                    blocks.append(Block(weight, grad, parts.dims, reach, pace, lr))
                else:
                    fused.append(AGDTensor(weight, grad, layout, reach, pace, lr))
        return plain, batched, fused

    def _begin(self) -> tuple[list[Tensor], list[Move]]:
        """The terms m r ||g||* of G, and what moves the weights once eta is known."""
        groups = self._groups()
        capturable = any(group["capturable"] for group in self.param_groups)

        def find() -> Ready | None:
            plain, batched, fused = self._blocks(groups)
            keeps = [(group["lr"], params) for group, params, _ in groups]
            if plain or batched:
                return None
            return Ready(fused, self._plans, capturable=capturable, keeps=keeps)

        key = key_of(groups)
        if key is not None and (ready := self._ready.get(key, find)):
            return ready.begin(groups)
        plain, batched, fused = self._blocks(groups)
        begun = [_single_tensor_agd(plain), _foreach_agd(batched)]
        begun.append(fused_agd(fused, self._plans, capturable=capturable))
        return [term for terms, _ in begun for term in terms], [move for _, moves in begun for move in moves]

    def _update(self) -> None:
        terms, moves = self._begin()
        home = self._home()
        if self._eta.device != home:  # the model was moved
            self._reset_report()
        summary = torch.stack([term.to(home) for term in terms] or [torch.zeros_like(self._eta)]).sum()
        finite = torch.isfinite(summary)
        if any(group["error_if_nonfinite"] for group in self.param_groups) and not bool(finite):
            raise RuntimeError(self._nonfinite_message())
        eta = torch.where(finite, agd_step_size(summary), 0.0)
        for move in moves:
            move(eta)
        self._eta.copy_(eta)
        self._gradient_summary.copy_(summary)
        self._skipped_steps.add_(~finite)  # not +=, which torch 2.7 does not compile

    def _nonfinite_message(self) -> str:
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"a parameter of group {index}"] * len(group["params"])
            for name, param in zip(names, group["params"], strict=True):
                if param.requires_grad and param.grad is not None and not bool(param.grad.isfinite().all()):
                    return (
                        f"AGD: the gradient of {name}, shape {tuple(param.shape)}, is not finite; nothing "
                        "moved. Look at the loss, or skip such steps with error_if_nonfinite=False"
                    )
        return "AGD: the gradients are finite but too large to sum; nothing moved. Scale the loss down"


def _single_tensor_agd(blocks: list[Block]) -> tuple[list[Tensor], list[Move]]:
    """The terms m r ||g||* of G, and what moves each block once eta is known."""

    def move(block: Block, peak: Tensor, size: Tensor, eta: Tensor) -> None:
        grad = block.exact_grad()
        weight = block.weight.to(grad.dtype)
        distance = (block.paced(eta) * (block.reach * block.pace)).to(grad.device, grad.dtype)
        block.weight.copy_(agd_update(weight, grad, peak, size, distance))

    terms: list[Tensor] = []
    moves: list[Move] = []
    for block in blocks:
        peak, size = oracles.measure(block.exact_grad(), block.dims)
        terms.append(block.reach * oracles.dual(peak, size))
        moves.append(partial(move, block, peak, size))
    return terms, moves


def _foreach_agd(blocks: list[Block]) -> tuple[list[Tensor], list[Move]]:
    """As `_single_tensor_agd`, with one call for the tensors of one kind."""
    alike: dict[Any, list[Block]] = {}
    for block in blocks:
        whole = len(block.dims) == block.grad.ndim > 0  # the norm runs over the whole tensor
        alike.setdefault((block.weight.device, block.weight.dtype, whole), []).append(block)
    terms: list[Tensor] = []
    moves: list[Move] = []
    for (_, _, whole), bucket in alike.items():
        bucket_terms, move = _foreach_bucket(bucket, whole)
        terms += bucket_terms
        moves.append(move)
    return terms, moves


def _foreach_bucket(blocks: list[Block], whole: bool) -> tuple[list[Tensor], Move]:
    grads, dims = [block.exact_grad() for block in blocks], [block.dims for block in blocks]
    peaks = [grad.abs().amax() for grad in grads] if whole else list(map(oracles.largest, grads, dims))
    torch._foreach_clamp_min_(peaks, torch.finfo(grads[0].dtype).tiny)
    units = list(torch._foreach_div(grads, peaks))
    sizes = list(torch._foreach_norm(units, 2.0) if whole else map(oracles.norm, units, dims))
    if whole:
        duals = list(oracles.products(torch.stack(peaks), torch.stack(sizes)).unbind())
    else:
        duals = list(map(oracles.dual, peaks, sizes))
    terms = torch._foreach_mul(duals, [block.reach for block in blocks])

    def move(eta: Tensor) -> None:
        paces = [block.reach * block.pace for block in blocks]
        distances = torch.stack(torch._foreach_mul([block.paced(eta) for block in blocks], paces))
        factors = torch._foreach_div(distances.to(peaks[0].device, peaks[0].dtype).unbind(), sizes)
        torch._foreach_mul_(units, factors)
        for unit, size in zip(units, sizes, strict=True):
            unit.masked_fill_(~(size > 0), 0.0)  # parts that are zero or not finite
        torch._foreach_add_(units, 0.0)  # -0.0 becomes 0.0, which leaves a weight of -0.0 its sign
        weights = [block.weight for block in blocks]
        exact = [weight.to(unit.dtype) for weight, unit in zip(weights, units, strict=True)]
        torch._foreach_sub_(exact, units)
        if exact[0] is not weights[0]:
            torch._foreach_copy_(weights, exact)

    return list(terms), move
