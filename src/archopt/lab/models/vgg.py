"""VGG for 32 x 32 pixels, after Simonyan and Zisserman 2014 (arXiv:1409.1556), as Nero's paper trains it."""

from collections.abc import Callable

from torch import Tensor, nn

POOL = 0
LAYERS: dict[int, tuple[int, ...]] = {
    11: (1, POOL, 2, POOL, 4, 4, POOL, 8, 8, POOL, 8, 8, POOL),
    13: (1, 1, POOL, 2, 2, POOL, 4, 4, POOL, 8, 8, POOL, 8, 8, POOL),
    16: (1, 1, POOL, 2, 2, POOL, 4, 4, 4, POOL, 8, 8, 8, POOL, 8, 8, 8, POOL),
    19: (1, 1, POOL, 2, 2, POOL, 4, 4, 4, 4, POOL, 8, 8, 8, 8, POOL, 8, 8, 8, 8, POOL),
}
"""By depth: the channels of each convolution, in multiples of the width; a 2 x 2 max-pooling."""
HIDDEN = 64
"""The two hidden linear layers, in multiples of the width: 4,096 at width 64."""


def convolutions(
    depth: int, width: int, norm: Callable[[int], nn.Module] | None
) -> tuple[nn.Sequential, int]:
    """3 x 3 convolutions without biases and ReLU, five times halved, and the channels of the last.

    norm: what stands before each ReLU, by its channels.
    """
    layers: list[nn.Module] = []
    channels = 3
    for multiple in LAYERS[depth]:
        if multiple == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        filters = multiple * width
        layers.append(nn.Conv2d(channels, filters, 3, padding=1, bias=False))
        if norm is not None:
            layers.append(norm(filters))
        layers.append(nn.ReLU())
        channels = filters
    return nn.Sequential(*layers), channels


class VGG(nn.Module):
    """3 x 3 convolutions without biases and ReLU, five times halved; three linear layers with dropout between them.

    Input (batch, 3, 32, 32), output (batch, classes). Convolutions start with Kaiming normal weights (fan out, gain
    of ReLU), linear layers with torch's own. `batch_norm` puts BatchNorm before each ReLU of a convolution.
    """

    def __init__(
        self,
        depth: int = 11,
        width: int = 64,
        classes: int = 10,
        *,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.features, channels = convolutions(depth, width, nn.BatchNorm2d if batch_norm else None)
        hidden = HIDDEN * width
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        kaiming_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def kaiming_fan_out(model: nn.Module) -> None:
    """Draws the weights of all convolutions from N(0, 2 / fan_out)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
