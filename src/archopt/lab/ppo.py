"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347): advantages and the clipped loss.

Plain functions of tensors; the games and the loop belong to the workload.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def advantages(
    rewards: Tensor, values: Tensor, ends: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns of a rollout (arXiv:1506.02438, equation 16).

    rewards, ends (steps, games): of the action taken at each step; `ends` says that the episode ended with it.
    values (steps + 1, games): the critic's, with those after the last step. Both results are (steps, games):

        delta_t = r_t + gamma m_t V_(t+1) - V_t,   A_t = delta_t + gamma lam m_t A_(t+1),   m_t = 0 where it ended
        returns = A + V
    """
    going_on = 1.0 - ends.to(values)
    found = torch.zeros_like(rewards)
    later = torch.zeros_like(values[0])
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * going_on[t] * values[t + 1] - values[t]
        later = delta + gamma * lam * going_on[t] * later
        found[t] = later
    return found, found + values[:-1]


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Logarithms of the probabilities of actions (samples,) under logits (samples, actions)."""
    return logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Losses:
    """The parts of PPO's loss, 0-d each, and what is worth watching."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    clipped: Tensor
    """The share of samples whose ratio lay outside the clip range."""


def losses(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    old_values: Tensor,
    advantage: Tensor,
    returns: Tensor,
    clip: float,
) -> Losses:
    """PPO's clipped losses of a minibatch, means over samples (equation 7 and the clipped value loss).

    logits (samples, actions) and values (samples,) are the network's now; everything else, (samples,), is of the
    rollout.
    """
    every = logits.log_softmax(-1)
    ratio = (log_prob(logits, actions) - old_log_probs).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    near = old_values + (values - old_values).clamp(-clip, clip)
    value = torch.maximum((values - returns).square(), (near - returns).square())
    return Losses(
        policy=-surrogate.mean(),
        value=0.5 * value.mean(),
        entropy=-(every.exp() * every).sum(-1).mean(),
        clipped=((ratio - 1).abs() > clip).float().mean().detach(),
    )
