"""Generator and discriminator of Nero's class-conditional GAN (arXiv:2102.07227, figure 5), for square pictures.

Every weight of a convolution, linear map or embedding is divided by an estimate of its largest singular value
(spectral normalisation, Miyato, Kataoka, Koyama and Yoshida 2018): torch's parametrisation, one power iteration at
each forward pass in training mode, none in eval mode. Optimisers act on the weights before that division. The
label goes into the generator's normalisation (de Vries et al. 2017) and into the discriminator's output (Miyato and
Koyama 2018); both attend over places once (Zhang, Goodfellow, Metaxas and Odena 2019).
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

BIAS_STD = 0.01  # of all initial biases and shifts
OUTPUT_SCALE = 10.0  # of the discriminator
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear, nn.Embedding)


def spectral(layer: Layer) -> Layer:
    """The layer with an orthogonal weight, biases N(0, 0.01²), and spectral normalisation.

    In this order: once a weight is parametrised, filling `layer.weight` fills a copy and not what is trained.
    """
    nn.init.orthogonal_(layer.weight)
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
        nn.init.normal_(layer.bias, std=BIAS_STD)
    parametrizations.spectral_norm(layer)
    return layer


def renew_iterates(model: nn.Module) -> None:
    """Puts copies in the place of the vectors that power iterations change in place.

    Between two forward passes and their common backward pass: a compiled one may have kept the vectors themselves.
    """
    for module in model.modules():
        for name in ("_u", "_v"):
            if isinstance(vector := getattr(module, name, None), Tensor):
                setattr(module, name, vector.clone())


def conv(channels: int, filters: int, size: int) -> nn.Conv2d:
    """A convolution that keeps height and width, with spectral normalisation."""
    return spectral(nn.Conv2d(channels, filters, size, padding=size // 2))


def doubled(x: Tensor) -> Tensor:
    """Twice as high and wide, each place repeated."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halved(x: Tensor) -> Tensor:
    """Half as high and wide: means of 2 x 2 places."""
    return F.avg_pool2d(x, 2)


class SelfAttention(nn.Module):
    """x + out(attention over places): queries of C / 8 channels, keys and values from places pooled by 2.

    Softmax over the keys, scores not scaled; what is added has no learned factor. Input and output are (batch, C,
    h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = conv(channels, channels // 8, 1)
        self.key = conv(channels, channels // 8, 1)
        self.value = conv(channels, channels // 2, 1)
        self.out = conv(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key = F.max_pool2d(self.key(x), 2).flatten(2)
        value = F.max_pool2d(self.value(x), 2).flatten(2)
        shares = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        seen = value @ shares.transpose(1, 2)
        added: Tensor = self.out(seen.view(len(x), -1, *x.shape[2:]))
        return x + added


class ConditionalNorm(nn.Module):
    """BatchNorm without gain and shift of its own, times 1 + gain(condition), plus shift(condition).

    Input (batch, channels, h, w) and (batch, condition), output as the first.
    """

    def __init__(self, channels: int, condition: int, momentum: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, momentum=momentum, affine=False)
        self.gain = spectral(nn.Linear(condition, channels))
        self.shift = spectral(nn.Linear(condition, channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, shift = (layer(condition)[:, :, None, None] for layer in (self.gain, self.shift))
        normed: Tensor = self.norm(x) * (1 + gain) + shift
        return normed


class UpBlock(nn.Module):
    """Twice conditional norm, ReLU and a 3 x 3 convolution, doubled before the first; plus the shortcut.

    Input (batch, channels, h, w) and (batch, condition), output (batch, filters, 2 h, 2 w).
    """

    def __init__(self, channels: int, filters: int, condition: int, momentum: float) -> None:
        super().__init__()
        self.norm1 = ConditionalNorm(channels, condition, momentum)
        self.conv1 = conv(channels, filters, 3)
        self.norm2 = ConditionalNorm(filters, condition, momentum)
        self.conv2 = conv(filters, filters, 3)
        self.shortcut: nn.Module = nn.Identity() if channels == filters else conv(channels, filters, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(doubled(F.relu(self.norm1(x, condition))))
        h = self.conv2(F.relu(self.norm2(h, condition)))
        # A 1 x 1 convolution of repeated places is the repeated convolution, at a quarter of the cost.
        added: Tensor = h + doubled(self.shortcut(x))
        return added


class Generator(nn.Module):
    """Pictures in [-1, 1], (batch, 3, side, side), from latents (batch, 4 * chunk) and labels (batch,).

    The first quarter of a latent becomes 4 * width channels of side / 8 places each way; each of three up-blocks
    (4, 2 and 1 * width channels) doubles them, conditioned on the label's code and the next quarter.

    Args:
        width: 64 in the paper.
        chunk: numbers in a quarter of a latent; 20 in the paper.
        label_rows: width of the one-hot label; 1,000 in the paper, whatever the number of classes.
        norm_momentum: of the running statistics under the conditions; 0.001 in the paper.
    """

    def __init__(self, width: int, side: int, chunk: int, label_rows: int, norm_momentum: float) -> None:
        super().__init__()
        self.latent = 4 * chunk
        self._label_rows, self._base = label_rows, side // 8
        condition = self.latent + chunk
        self.start = spectral(nn.Linear(chunk, 4 * width * self._base**2))
        self.up1 = UpBlock(4 * width, 4 * width, condition, norm_momentum)
        self.up2 = UpBlock(4 * width, 2 * width, condition, norm_momentum)
        self.attention = SelfAttention(2 * width)
        self.up3 = UpBlock(2 * width, width, condition, norm_momentum)
        self.norm = nn.BatchNorm2d(width)
        nn.init.normal_(self.norm.bias, std=BIAS_STD)
        self.to_colour = conv(width, 3, 3)
        # Last, so that roles.py takes this table of labels, and no hidden layer, for the "last Linear": rules that
        # treat a head in a way of their own (AutoNero, Muon) treat embeddings so too.
        self.label_code = spectral(nn.Linear(label_rows, self.latent))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        first, second, third, fourth = latents.chunk(4, dim=1)
        code = self.label_code(F.one_hot(labels, self._label_rows).to(latents.dtype))
        h = self.start(first).view(len(latents), -1, self._base, self._base)
        h = self.up1(h, torch.cat((code, second), 1))
        h = self.attention(self.up2(h, torch.cat((code, third), 1)))
        h = self.up3(h, torch.cat((code, fourth), 1))
        return torch.tanh(self.to_colour(F.relu(self.norm(h))))


class DownBlock(nn.Module):
    """Twice ReLU and a 3 x 3 convolution, then halved if `down`; plus the shortcut, which no ReLU touches.

    The `first` block of a network has no ReLU before its first convolution. Input (batch, channels, h, w), output
    (batch, filters, h, w) or half of both.
    """

    def __init__(self, channels: int, filters: int, *, down: bool, first: bool = False) -> None:
        super().__init__()
        self.conv1 = conv(channels, filters, 3)
        self.conv2 = conv(filters, filters, 3)
        needed = down or channels != filters
        self.shortcut: nn.Module = conv(channels, filters, 1) if needed else nn.Identity()
        self._down, self._first = down, first

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self._first else F.relu(x))))
        if self._down:  # a 1 x 1 convolution and a mean over places can be exchanged
            h, x = halved(h), halved(x)
        added: Tensor = h + self.shortcut(x)
        return added


class Discriminator(nn.Module):
    """A score (batch,) for pictures (batch, 3, side, side) and labels (batch,): above 0 for real ones.

    Four down-blocks of 1, 2, 4 and 4 * width channels, of which the last does not halve, attention after the
    second, ReLU and the mean over places; then 10 times the sum of a linear map and the product with a row of the
    label's.
    """

    def __init__(self, width: int, label_rows: int) -> None:
        super().__init__()
        self.stem = DownBlock(3, width, down=True, first=True)
        self.down1 = DownBlock(width, 2 * width, down=True)
        self.attention = SelfAttention(2 * width)
        self.down2 = DownBlock(2 * width, 4 * width, down=True)
        self.last = DownBlock(4 * width, 4 * width, down=False)
        self.score = spectral(nn.Linear(4 * width, 1))
        self.label_rows = spectral(nn.Embedding(label_rows, 4 * width))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = self.last(self.down2(self.attention(self.down1(self.stem(images)))))
        h = F.relu(h).mean(dim=(2, 3))
        score = self.score(h).squeeze(1) + (h * self.label_rows(labels)).sum(1)
        scaled: Tensor = OUTPUT_SCALE * score
        return scaled
