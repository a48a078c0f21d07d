"""A network with one scalar far from 1: digits, logits that are cosines times a temperature that is trained."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from archopt.lab.data import load_digits
from archopt.lab.workload import Metric
from archopt.lab.workloads.supervised import Supervised, labels, pixels


@dataclass
class Temperature(Supervised):
    """`temperature`: the scalar's initial value. `layer_scale`: initial gains of a residual branch, 0 for none."""

    name = "temperature"
    summary = "digits, cosines times a scalar that is trained"
    metric = Metric("test_loss", "test loss", higher_is_better=False)
    presets = {"paper": {}, "small": {}, "smoke": {"epochs": 1}}

    temperature: float = 100.0
    layer_scale: float = 0.0
    epochs: int = 20

    def load(self, data):
        digits = load_digits(data)
        train, test = (pixels(x, 16, 0, 1).flatten(1) for x in (digits.train_images, digits.test_images))
        self.hold(train=(train, labels(digits.train_labels)), test=(test, labels(digits.test_labels)))

    def build(self):
        return Cosines(self.temperature, self.layer_scale)

    def evaluate(self, models):
        logits = models["model"](self.test_inputs)
        return {"test_loss": F.cross_entropy(logits, self.test_targets).item()}


class Cosines(nn.Module):
    def __init__(self, temperature, layer_scale):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 128)
        self.out = nn.Linear(128, 10, bias=False)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.scale = nn.Parameter(torch.full((128,), layer_scale)) if layer_scale else None

    def forward(self, x):
        x = self.first(x).relu()
        branch = self.second(x).relu()
        features = branch if self.scale is None else x + self.scale * branch
        cosines = F.linear(F.normalize(features, dim=1), F.normalize(self.out.weight, dim=1))
        return self.temperature * cosines
