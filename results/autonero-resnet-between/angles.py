"""By which angle the steps of Muon + AdamW turn the filters' rows, and how long these are; written to angles.md.

archopt train cifar10-resnet-small --lr-schedule constant --optimizer ./angles.py:Angles --out /tmp/angles
"""

from pathlib import Path

import torch
from between import Between

STEPS = (1, 10, 30, 100, 200, 300, 400, 500, 600)


class Angles(Between):
    def step(self, closure=None):
        self.angles, self.norms = [], []
        super().step(closure)
        t = next(iter(self.state.values()))["t"]
        if t == STEPS[0]:
            Path("angles.md").write_text(
                "| step | mean angle, radians | mean norm |\n| ---: | ---: | ---: |\n"
            )
        if t in STEPS:
            angle, norm = (float(torch.cat(told).mean()) for told in (self.angles, self.norms))
            with Path("angles.md").open("a") as table:
                table.write(f"| {t} | {angle:.4f} | {norm:.2f} |\n")

    def _hidden(self, param, grad, state, lr):
        before = param.detach().flatten(1).clone()
        super()._hidden(param, grad, state, lr)
        after = param.detach().flatten(1)
        cosine = torch.nn.functional.cosine_similarity(before, after)
        self.angles.append(cosine.clamp(max=1).arccos())
        self.norms.append(after.norm(dim=1))
