"""A small convolutional classifier whose last hidden layer describes pictures, for distances between sets."""

from torch import Tensor, nn

FILTERS, FEATURES = 32, 64


class FeatureCNN(nn.Module):
    """Three 3 x 3 convolutions with BatchNorm and ReLU, each on half the places of the one before, and their mean.

    Input (batch, 3, side, side), uint8, side a multiple of 16; output (batch, 64) features, and `classify` the
    logits of a linear head. The first convolution strides to 16 x 16 places, so that 32 pixels cost as much as 16.
    """

    def __init__(self, side: int, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for filters, stride in ((FILTERS, side // 16), (FEATURES, 2), (FEATURES, 2)):
            # BatchNorm subtracts the mean, so a bias before it would do nothing.
            layers += [nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.layers(pictures.float() / 127.5 - 1).mean(dim=(2, 3))
        return features

    def classify(self, pictures: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        logits: Tensor = self.head(self(pictures))
        return logits
