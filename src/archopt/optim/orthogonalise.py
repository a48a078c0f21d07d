"""The polar factor of a matrix: its nearest matrix with all non-zero singular values equal to 1.

With G = U S V^T the polar factor is U V^T. `newton_schulz` approaches it by five steps of an odd polynomial that
needs matrix products alone, `svd` computes it. All functions take batches of matrices, `(..., rows, columns)`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from archopt.optim.matrices import nonzero

# Five steps of a x + b x^3 + c x^5 with Muon's coefficients (Jordan et al. 2024): steep at 0 rather than exact at
# 1, so that singular values above 1e-2 of the norm end between 0.68 and 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def newton_schulz(matrices: Tensor) -> Tensor:
    """Roughly the polar factor: its singular vectors, singular values around 1. Zero matrices stay zero.

    matrices: `(..., rows, columns)`, float32 or wider; the products are formed in that type, also under autocast.
    Whether a GPU forms those of float32 in TF32 is torch's setting (`torch.set_float32_matmul_precision`).
    """
    return _iterate(unit_frobenius(matrices))


def newton_schulz_bfloat16(matrices: Tensor) -> Tensor:
    """The same with products in bfloat16, as Muon's: many times faster on GPUs, singular values good to about 1 %.

    The result has the type of `matrices`.
    """
    return _iterate(unit_frobenius(matrices).to(torch.bfloat16)).to(matrices.dtype)


def _iterate(unit: Tensor) -> Tensor:
    """The five steps, from matrices of Frobenius norm 1. The square products have the smaller side."""
    a, b, c = COEFFICIENTS
    tall = unit.size(-2) > unit.size(-1)
    x = unit.reshape(-1, *unit.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(STEPS):
            gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x.reshape(unit.shape)


def svd(matrices: Tensor) -> Tensor:
    """The polar factor up to rounding; directions with no singular value to speak of are left out.

    Entries that are not finite count as zero here: LAPACK would raise where a step is about to be discarded.
    """
    with torch.autocast(matrices.device.type, enabled=False):
        finite = torch.nan_to_num(matrices, posinf=0.0, neginf=0.0)
        u, s, vh = torch.linalg.svd(finite, full_matrices=False)
        floor = s.narrow(-1, 0, 1) * (max(matrices.shape[-2:]) * torch.finfo(s.dtype).eps)
        polar: Tensor = (u * (s > floor).unsqueeze(-2)) @ vh
    return polar


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "newton-schulz": newton_schulz,
    "newton-schulz-bfloat16": newton_schulz_bfloat16,
    "svd": svd,
}


def orthogonalise(matrices: Tensor, method: str = "newton-schulz") -> Tensor:
    """The polar factor of each matrix by `method`, a key of `METHODS`; a single row or column is exact anyway."""
    if 1 in matrices.shape[-2:]:
        return unit_frobenius(matrices)
    return METHODS[method](matrices)


def unit_frobenius(matrices: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm, which is taken after scaling so that small entries count.

    Entries whose squares would be no normal numbers (below 1e-19 in float32) become 0. The averaged gradient of a
    neuron that has died shrinks geometrically until it is there, and CPUs multiply such numbers fifty times slower.
    """
    peak = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    scaled = matrices / nonzero(peak)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return F.hardshrink(scaled / nonzero(norm), math.sqrt(torch.finfo(matrices.dtype).tiny))
