"""Averaged weights in place of a schedule, for any optimiser.

    x_bar  <-  x_bar + (9 / (t + 8)) (x - x_bar)         t = 1, 2, ... after each step; the first one copies

The polynomial average of Shamir and Zhang (2013, arXiv:1212.1824): step k counts as k^8, so about the last tenth of
the way counts, whatever its length, and no horizon need be known. Built on `torch.optim.swa_utils.AveragedModel`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from archopt.neurons import statistics_dtype

POWER = 8  # weight (POWER + 1) / (t + POWER)


class Averaged(AveragedModel):
    """A copy of a model that holds the polynomial average of its weights; see `averaged`."""

    def __init__(self, model: nn.Module, device: torch.device | int | None = None) -> None:
        super().__init__(model, device=device)
        for index, param in enumerate(self.module.parameters()):
            self.n_averaged = self.n_averaged.to(param.device)  # where a step need not wait for it
            if statistics_dtype(param.dtype) != param.dtype:
                # Late weights 9/(t+8) are below the rounding of half precision: the sum must not be kept in it.
                self.register_buffer(f"exact_{index}", param.detach().to(statistics_dtype(param.dtype)))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the weights of `model` into the average, and its buffers as they are."""
        means = list(self.module.parameters())
        exact: list[Tensor] = [getattr(self, f"exact_{index}", mean) for index, mean in enumerate(means)]
        latest = [param.detach().to(kept) for param, kept in zip(model.parameters(), exact, strict=True)]
        kinds = {(kept.device, kept.dtype) for kept in exact}
        weight = {kind: (POWER + 1) / (self.n_averaged.to(*kind) + POWER + 1) for kind in kinds}
        torch._foreach_lerp_(exact, latest, [weight[kept.device, kept.dtype] for kept in exact])
        for mean, kept in zip(means, exact, strict=True):
            if kept is not mean:
                mean.copy_(kept)
        for own, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(theirs)
        self.n_averaged += 1


def averaged(model: nn.Module, device: torch.device | int | None = None) -> Averaged:
    """A copy of `model` that averages its weights over the steps of training, in place of a schedule.

    Call `update_parameters(model)` after each step, evaluate the copy like the model, save and load it by its
    state dict. Buffers are those of the model; a model whose normalisation keeps running statistics needs
    `renew_statistics` before the average is evaluated. Half-precision weights are averaged in float32.

    Example:
        >>> import torch, archopt
        >>> model = torch.nn.Linear(4, 2)
        >>> average = archopt.averaged(model)
        >>> average.update_parameters(model)  # after every optimizer.step()
        >>> torch.equal(average(torch.ones(1, 4)), model(torch.ones(1, 4)))
        True
    """
    return Averaged(model, device)


@torch.no_grad()
def renew_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replaces the running statistics of normalisation layers by those of `batches`, each batch counting alike.

    `batches` gives inputs, or tuples and lists whose first entry is the input. All other layers run in evaluation
    mode, so that nothing is random; modes and momenta are as before afterwards. Does nothing, and reads no batch,
    where no layer keeps statistics.

    Raises ValueError where `batches` is empty: the statistics would be lost.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    model.eval()
    seen = 0
    try:
        for batch in batches:
            for layer in layers:
                if seen == 0:
                    layer.reset_running_stats()
                    layer.train()
                layer.momentum = 1 / (seen + 1)  # the plain mean over all batches so far
            model(batch[0] if isinstance(batch, tuple | list) else batch)
            seen += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    if seen == 0:
        raise ValueError("renew_statistics was given no batch; pass at least one batch of training inputs")
