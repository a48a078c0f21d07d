"""The fixed positions of the first transformer (A. Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

import torch
from torch import Tensor

WAVELENGTH = 10_000.0


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width): at place p, columns 2i and 2i+1 are sine and cosine of p / 10000^(2i/width). Width even."""
    places = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    angles = places / WAVELENGTH ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()
