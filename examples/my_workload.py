"""A workload of your own. Copy this file, change it, and run

    archopt compare ./my_workload.py --optimizers nero,agd,adamw --lrs grid --seeds 0,1,2

This one trains an autoencoder: the 64 pixels of a handwritten digit through 8 numbers and back.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from archopt.lab.data import load_digits
from archopt.lab.workload import Metric
from archopt.lab.workloads.supervised import Supervised, pixels


@dataclass
class DigitCodes(Supervised):
    """The fields are the options: `--code 4` on the command line. `epochs` and `batch_size` are inherited."""

    name = "digit-codes"
    summary = "autoencoder: 8 x 8 digits through 8 numbers"
    metric = Metric("test_error", "test mean squared error", higher_is_better=False)
    presets = {"paper": {}, "small": {}, "smoke": {"epochs": 1}}  # `--preset smoke` for a quick look
    lrs = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # what `--lrs grid` tries

    code: int = 8

    def load(self, data):
        # A file of yours: data.read("mine.csv") gives its bytes; `--data DIR` says where it lies.
        digits = load_digits(data)
        train, test = (pixels(x, 16, 0, 1).flatten(1) for x in (digits.train_images, digits.test_images))
        self.hold(train=(train, train), test=(test, test))  # (inputs, targets): any tensors, rows first

    def build(self):  # the seed is set before this is called; several models: return a dict of them
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, self.code))
        decoder = nn.Sequential(nn.Linear(self.code, 64), nn.ReLU(), nn.Linear(64, 64))
        return nn.Sequential(encoder, decoder)

    def schedule(self, step):  # multiplies the learning rate; leave it out for a constant one
        return 1 - step / self.steps

    def loss(self, model, batch):  # without this and `evaluate`: classification by cross-entropy
        inputs, targets = batch
        return F.mse_loss(model(inputs), targets), {}  # the dict: more numbers to record, averaged

    def evaluate(self, models):
        return {"test_error": F.mse_loss(models["model"](self.test_inputs), self.test_targets).item()}
