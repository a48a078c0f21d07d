"""The convolutional actor and critic of Nero's paper for Atari games (the network of Mnih et al. 2015)."""

import math

import torch
from torch import Tensor, nn

FRAMES = 4


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """Orthogonal weights, biases 0."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(layer.weight, gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """Pictures (n, 4, 84, 84) uint8 to logits (n, actions) and values (n,).

    Convolutions of width 32, 64 and 32 and a layer of 512 at scale 1; both scale with it. Biases everywhere.
    """

    def __init__(self, actions: int, scale: float = 1.0) -> None:
        super().__init__()
        first, second, third, hidden = (max(int(width * scale), 1) for width in (32, 64, 32, 512))
        layers = (
            nn.Conv2d(FRAMES, first, 8, 4),
            nn.ReLU(),
            nn.Conv2d(first, second, 4, 2),
            nn.ReLU(),
            nn.Conv2d(second, third, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(third * 7 * 7, hidden),
            nn.ReLU(),
        )
        self.trunk = nn.Sequential(*(orthogonal(layer, math.sqrt(2)) for layer in layers))
        self.actor = orthogonal(nn.Linear(hidden, actions), 0.01)
        self.critic = orthogonal(nn.Linear(hidden, 1), 1.0)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(pictures.to(torch.get_default_dtype()) / 255)
        return self.actor(features), self.critic(features).squeeze(-1)
