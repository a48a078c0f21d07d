"""A convolutional network for 8 x 8 pixels."""

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions with BatchNorm and ReLU, each of the first two followed by 2 x 2 max-pooling.

    Input (batch, 1, 8, 8), output (batch, classes).
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 32), classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.features = nn.Sequential(
            *_block(1, first),
            nn.MaxPool2d(2),
            *_block(first, second),
            nn.MaxPool2d(2),
            *_block(second, third),
        )
        self.head = nn.Linear(third * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


def _block(channels: int, filters: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    # BatchNorm subtracts the mean, so a bias before it would do nothing.
    return nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()
