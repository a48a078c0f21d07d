"""Muon for a whole network: torch's Muon on hidden matrices and convolutions, AdamW on everything else.

torch.optim.Muon takes matrices only. Here the roles of the parameters decide: hidden matrices, and convolutions as
(out, rest) views, packed projections and grouped filters part by part, are Muon's; embeddings, heads, vectors and
kinds for which Muon has no rule (depthwise and transposed convolutions) are AdamW's. The defaults are those that
Muon's author gives for this pair (K. Jordan, "Muon: an optimizer for hidden layers", 2024, and its program).
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from archopt.lab.muon_float32 import MuonInFloat32, loss_of
from archopt.roles import parameter_roles

MUON_KINDS = frozenset({"matrix", "conv"})


def as_matrices(tensor: Tensor, like: Tensor, parts: int) -> list[Tensor]:
    """`tensor` as (out, rest) matrices, one a part of dimension 0, its columns in the order of `like`'s memory.

    For `like` itself these are views, channels-last weights included: the polar factor does not mind the order of
    columns. Raises RuntimeError where `like` has gaps or overlaps, so that no view exists.
    """
    order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
    rows = tensor.permute(0, *order)
    shape = (parts, tensor.shape[0] // parts, -1)
    return list((rows.view(shape) if tensor is like else rows.reshape(shape)).unbind())


class MuonWithAdamW(Optimizer):
    """Muon on a model's hidden matrices and convolutions, AdamW on the rest, each with its own rate.

    Args:
        model: the module; frozen parameters are left out.
        lr: of the matrices.
        aux_lr: of everything else.
        weight_decay, momentum, nesterov, ns_steps, adjust_lr_fn: as torch.optim.Muon has them.
        aux_betas, aux_eps, aux_weight_decay: AdamW's.
        products: "bfloat16", as torch.optim.Muon forms them, or "float32", many times faster on CPUs without
            bfloat16 instructions.

    `param_groups` holds one group for each of the two; schedulers and loops may set their `lr`, other options are
    fixed at construction. Raises ValueError as the two inner optimisers do.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        *,
        aux_lr: float = 3e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        aux_betas: tuple[float, float] = (0.9, 0.95),
        aux_eps: float = 1e-10,
        aux_weight_decay: float = 0.0,
        products: str = "bfloat16",
    ) -> None:
        if products not in ("bfloat16", "float32"):
            raise ValueError(f"products={products!r}, expected 'bfloat16' or 'float32'")
        self._matrices: list[tuple[Tensor, list[nn.Parameter], int]] = []
        rest: list[Tensor] = []
        for role, param in parameter_roles(model).items():
            if not role.trainable:
                continue
            if role.kind in MUON_KINDS and role.neuron_dim == 0:
                parts = role.slices * role.groups
                weight = param.detach()
                views = [nn.Parameter(view) for view in as_matrices(weight, weight, parts)]
                self._matrices.append((param, views, parts))
            else:
                rest.append(param)
        self.inner: dict[str, Optimizer] = {}
        groups = []
        if self._matrices:
            muon = torch.optim.Muon if products == "bfloat16" else MuonInFloat32
            self.inner["muon"] = muon(
                [view for _, views, _ in self._matrices for view in views],
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
            groups.append({"params": [param for param, _, _ in self._matrices], "lr": lr, "inner": "muon"})
        if rest:
            self.inner["adamw"] = torch.optim.AdamW(
                rest, lr=aux_lr, betas=aux_betas, eps=aux_eps, weight_decay=aux_weight_decay
            )
            groups.append({"params": rest, "lr": aux_lr, "inner": "adamw"})
        super().__init__(groups, {})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        loss = loss_of(closure)
        for param, views, parts in self._matrices:
            grads = [None] * parts if param.grad is None else as_matrices(param.grad, param, parts)
            for view, grad in zip(views, grads):
                view.grad = grad
        for group in self.param_groups:
            inner = self.inner[group["inner"]]
            inner.param_groups[0]["lr"] = group["lr"]
            inner.step()
        for _, views, _ in self._matrices:
            for view in views:
                view.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of the two, by name."""
        inner = {name: optimizer.state_dict() for name, optimizer in self.inner.items()}
        return {
            "state": {name: saved["state"] for name, saved in inner.items()},
            "param_groups": {name: saved["param_groups"] for name, saved in inner.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave. Raises ValueError where it belongs to another model."""
        if state_dict["state"].keys() != self.inner.keys():
            raise ValueError(
                f"the state dict has {', '.join(state_dict['state'])}, expected {', '.join(self.inner)}"
            )
        for name, optimizer in self.inner.items():
            optimizer.load_state_dict(
                {"state": state_dict["state"][name], "param_groups": state_dict["param_groups"][name]}
            )
        for group in self.param_groups:
            group["lr"] = self.inner[group["inner"]].param_groups[0]["lr"]
