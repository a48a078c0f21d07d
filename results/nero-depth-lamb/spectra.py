"""How LAMB comes to diverge on the 100 layers of `small`: written to spectra.md while it trains.

archopt train mnist-mlp100 --preset small --optimizer ./spectra.py:Lamb --lr 0.01 --seed 0 --out .
"""

from pathlib import Path

import torch

import archopt

STEPS = (1, 10, 30, 60, 100, 150, 200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1500)


class Lamb(archopt.Lamb):
    """Our Lamb, which tells of the square matrices how large and how much one direction they are."""

    def step(self, closure=None):
        t = self.steps = getattr(self, "steps", 0) + 1
        matrices = [p for group in self.param_groups for p in group["params"] if p.dim() == 2][1:-1]
        if t in STEPS:
            self._tell(t, torch.stack([p.detach() for p in matrices]), [p.grad for p in matrices])
        super().step(closure)

    def _tell(self, t, weights, grads):
        if t == STEPS[0]:
            Path("spectra.md").write_text(
                "| step | norm of a matrix | its spectral norm | log10 of the product of spectral norms "
                "| log10 of the smallest and largest norm of a gradient |\n| ---: | ---: | ---: | ---: | --- |\n"
            )
        norms = torch.linalg.vector_norm(weights, dim=(1, 2))
        spectral = torch.linalg.matrix_norm(weights, 2)
        sizes = torch.stack([g.double().norm() for g in grads]).log10()
        with Path("spectra.md").open("a") as table:
            table.write(
                f"| {t} | {norms.mean():.2f} | {spectral.mean():.2f} | {spectral.log10().sum():.1f} "
                f"| {sizes.min():.1f}, {sizes.max():.1f} |\n"
            )
