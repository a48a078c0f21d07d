"""A workload of your own that begins with a trained network: a GPT that knows Shakespeare learns WikiText-2.

    archopt compare ./examples/fine_tuning.py --optimizers "autonero(embedding_radius='own'),adamw" --average

The records also say what it still knows of Shakespeare, and by how much its outputs have moved.
"""

from dataclasses import dataclass

import numpy as np
import torch

from archopt.lab.data import load_tinyshakespeare
from archopt.lab.data.sets import WIKITEXT2
from archopt.lab.workload import Metric
from archopt.lab.workloads.shakespeare_gpt import ShakespeareGPT


@dataclass
class FineTuning(ShakespeareGPT):
    """300 steps on WikiText-2, written in the 65 characters of tiny Shakespeare; all others are left out."""

    name = "fine-tuning"
    summary = "a small GPT that knows Shakespeare learns WikiText-2"
    metric = Metric("val_loss", "validation loss on WikiText-2", higher_is_better=False, unit="nats")
    presets = {"paper": {}, "small": {}, "smoke": {"pretraining": 20, "steps": 10, "eval_every": 5}}
    lrs = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

    steps: int = 300
    eval_every: int = 25
    lr_schedule: str = "constant"
    pretraining: int = 1000

    def load(self, data):
        super().load(data)
        model, self.known = self.pretrained(), self.validation
        self.trained, self.outputs = model.state_dict(), self.outputs_of(model)
        code = np.full(256, 255, np.uint8)
        code[np.frombuffer(load_tinyshakespeare(data).vocabulary.encode(), np.uint8)] = range(65)
        train, validation, _ = (code[WIKITEXT2.read(data, file)] for file in WIKITEXT2.files)
        train, validation = (torch.from_numpy(text[text < 255]).long() for text in (train, validation))
        rows, context = self.validation[0].shape
        validation = validation[: rows * context + 1]
        self.text, self.validation = train, (validation[:-1].view(rows, -1), validation[1:].view(rows, -1))

    def pretrained(self):
        """Trained on Shakespeare by AdamW with a rate that falls to 0; always the same bits on one machine."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = super().build()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95))
            falls = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.pretraining)
            for step in range(self.pretraining):
                optimizer.zero_grad()
                self.loss(model, self.batch(step, seed=0))[0].backward()
                optimizer.step()
                falls.step()
        return model.eval()

    def build(self):
        model = super().build()
        model.load_state_dict(self.trained)
        return model

    def to(self, device):
        super().to(device)
        self.known, self.outputs = tuple(part.to(device) for part in self.known), self.outputs.to(device)

    @torch.no_grad()
    def outputs_of(self, model):
        return model(self.known[0][:128])

    def evaluate(self, models):
        told = super().evaluate(models)
        here, self.validation = self.validation, self.known
        told["known_loss"] = super().evaluate(models)["val_loss"]
        self.validation = here
        change = self.outputs_of(models["model"]) - self.outputs
        told["moved"] = float(change.norm() / self.outputs.norm())
        return told
