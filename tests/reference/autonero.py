"""AutoNero, slowly and in float64: one row at a time, every case spelt out, the polar factor by an SVD.

A tensor is a flat list of numbers with the indices of each row; rows are gathered in blocks, and each block is one
matrix for the polar factor. Nothing is shared with the library.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Blocks = list[list[list[int]]]
"""For each block, for each row of it, the flat indices of the row's entries."""

BETA, BETA2 = 0.9, 0.99
LAMBDA, KAPPA = 0.95, 0.05
TAU, T = 0.15, 100.0
THETA0 = 1e-2
EXPONENT, K = 1.0, 8.0


@dataclass
class Variable:
    """One tensor: its values, what it is, and all that is remembered of it."""

    values: Tensor
    family: str  # hidden, head, embedding, vector
    blocks: Blocks = field(default_factory=list)
    scaled: bool = False  # rows of an embedding to RMS 1 at the start
    bias: str = ""  # of a head: the name of the variable that is its bias
    t: int = 0
    m: Tensor = field(init=False)
    v: list[float] = field(init=False)
    d: Tensor = field(init=False)
    R: list[float] = field(init=False)
    grows_to: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.values = self.values.detach().double().flatten().clone()
        self.m = torch.zeros_like(self.values)
        self.d = torch.zeros_like(self.values)
        if self.family == "vector":
            self.v = [0.0] * len(self.values)
            return
        self.v = [0.0] * len(self.rows())
        if self.family == "embedding" and self.scaled:
            for row in self.rows():
                if self.norm(row) > 0:
                    self.values[row] *= math.sqrt(len(row)) / self.norm(row)
        self.R = [self.norm(row) for row in self.rows()]
        least = 1e-3 / math.sqrt(3)
        old = sorted(norm for norm in self.R if norm >= least)
        n = len(old)
        if old:
            grown = (old[(n - 1) // 2] + old[n // 2]) / 2
        elif self.family == "embedding":
            grown = math.sqrt(len(self.rows()[0]))
        else:
            grown = 1 / math.sqrt(3)
        self.grows_to = [grown if norm < least else 0.0 for norm in self.R]
        if self.family == "embedding" and not self.scaled:
            full = math.sqrt(len(self.rows()[0]))
            self.grows_to = [full if norm < full else 0.0 for norm in self.R]

    def rows(self) -> list[list[int]]:
        return [row for block in self.blocks for row in block]

    def norm(self, row: list[int]) -> float:
        return float(self.values[row].norm())


def matrix_rows(shape: tuple[int, int]) -> Blocks:
    """The rows of a plain matrix, one block."""
    rows, columns = shape
    return [[list(range(i * columns, (i + 1) * columns)) for i in range(rows)]]


def polar(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = s > s[0] * 1e-13
    return u[:, keep] @ vh[keep]


class Reference:
    """The rule over named variables. `step` takes flat gradients, None where a tensor has none.

    `derivation`: heads turn as other rows do, radii follow with half of the exponent, and slopes above 0 ask for
    longer steps, however little above.
    """

    def __init__(
        self, variables: dict[str, Variable], first: float | None = None, derivation: bool = False
    ) -> None:
        self.variables, self.derivation = variables, derivation
        self.exponent = 0.5 if derivation else EXPONENT
        self.t = 0
        matrices = sum(variable.family in ("hidden", "head") for variable in variables.values())
        self.most = 1 / (8 * max(matrices, 1))
        self.first = THETA0 * self.most if first is None else first
        self.theta = min(self.first, self.most)
        self.rho, self.C, self.G, self.f = 0.0, 0.0, 0.0, 1.0
        self.c, self.e, self.q, self.B, self.D = 0.0, 0.0, 0.0, 0.0, 0.0
        self.skipped = 0

    def step(self, gradients: dict[str, Tensor | None], lr: float = 1.0) -> None:
        present = {name: g.detach().double().flatten() for name, g in gradients.items() if g is not None}
        if not all(bool(torch.isfinite(g).all()) for g in present.values()):
            self.skipped += 1
            return
        N = math.sqrt(sum(float((g * g).sum()) for g in present.values()))
        if N == 0:
            return

        self.f = 1.0
        if self.t > 0:
            self.f = min(1.0, 2 * math.sqrt(self.q / (1 - BETA2**self.t)) / N)
        present = {name: self.f * g for name, g in present.items()}
        self.q = BETA2 * self.q + (1 - BETA2) * (self.f * N) ** 2
        self.C = sum(float(g @ self.variables[name].d) for name, g in present.items())
        self.t += 1
        if self.t > 1 and lr != 0:
            self.D = LAMBDA * self.D + (1 - LAMBDA) * abs(self.C - self.c)
            self.c = LAMBDA * self.c + (1 - LAMBDA) * self.C
            self.e = LAMBDA * self.e + (1 - LAMBDA) * self.G
            self.rho = min(2.0, max(-2.0, self.c / self.e)) if self.e > 0 else 0.0
            exponent = KAPPA * (self.rho + TAU / math.sqrt(1 + self.t / T))
            begins = self.first * 2 ** (self.t - 2) < THETA0
            self.theta = min(2 * self.theta, THETA0, self.most) if begins else self.theta * math.exp(exponent)
            heat = self.e / (1 - LAMBDA ** (self.t - 1)) * math.sqrt(self.t)
            error = math.sqrt(math.pi / 2) * self.D / (1 - LAMBDA ** (self.t - 1))
            error *= math.sqrt((1 - LAMBDA) / (1 + LAMBDA))
            asks = self.rho > 0 and (self.derivation or self.c > 2 * error)
            if asks or begins or self.B == 0:
                self.B = max(self.B, self.theta * heat)
            if heat > 0:
                self.theta = min(self.theta, self.B / heat)
            self.theta = min(1.0, max(1e-6, self.theta))

        self.G = 0.0
        reach = {
            name: self._reach(variable, present)
            for name, variable in self.variables.items()
            if variable.family == "head" and name in present
        }
        for name, variable in self.variables.items():
            if name not in present:
                variable.d = torch.zeros_like(variable.d)
            elif variable.family == "vector":
                self.G += self._vector(variable, present[name], lr)
            else:
                self.G += self._matrix(variable, present[name], lr, reach.get(name, 0.0))

    def _reach(self, head: Variable, present: dict[str, Tensor]) -> float:
        """a = K / max(h, 2) of a head that takes plain steps, before anything has moved."""

        def squares(x: Variable, gradients: list[float]) -> float:
            now = [BETA2 * v + (1 - BETA2) * g for v, g in zip(x.v, gradients, strict=True)]
            return sum(now) / (1 - BETA2 ** (x.t + 1))

        g = present[self._name(head)]
        rows = squares(head, [float(g[row] @ g[row]) for row in head.rows()])
        features = math.sqrt(len(head.rows()[0]))
        if head.bias in present:
            told = squares(self.variables[head.bias], [float(b) ** 2 for b in present[head.bias]])
            features = math.sqrt(rows / told) if told > 0 else features
        return K / max(features, 2.0)

    def _name(self, variable: Variable) -> str:
        return next(name for name, known in self.variables.items() if known is variable)

    def _vector(self, x: Variable, g: Tensor, lr: float) -> float:
        x.t += 1
        G = 0.0
        for i in range(len(x.values)):
            x.m[i] = BETA * x.m[i] + (1 - BETA) * g[i]
            x.v[i] = BETA2 * x.v[i] + (1 - BETA2) * float(g[i]) ** 2
            gh = float(x.m[i]) / (1 - BETA**x.t)
            s = math.sqrt(x.v[i] / (1 - BETA2**x.t))
            u = gh / s if s > 0 else 0.0
            before = float(x.values[i])
            x.values[i] = before - lr * self.theta * u
            x.d[i] = (before - float(x.values[i])) / self.theta
            G += gh * float(x.d[i])
        return G

    def _matrix(self, x: Variable, g: Tensor, lr: float, reach: float) -> float:
        x.t += 1
        x.m = BETA * x.m + (1 - BETA) * g
        gh = x.m / (1 - BETA**x.t)
        x.d = torch.zeros_like(x.d)
        index = 0
        for block in x.blocks:
            matrix = torch.stack([gh[row] for row in block])
            U = polar(matrix) if x.family == "hidden" and bool(matrix.any()) else matrix
            for row, direction in zip(block, U, strict=True):
                i, index = index, index + 1
                x.v[i] = BETA2 * x.v[i] + (1 - BETA2) * float(g[row] @ g[row])
                s = math.sqrt(x.v[i] / (1 - BETA2**x.t))
                if s == 0 or not bool(gh[row].any()) or lr == 0:
                    continue
                self._row(x, row, i, gh[row], direction, s, lr, reach)
        return float(gh @ x.d)

    def _row(
        self,
        x: Variable,
        row: list[int],
        i: int,
        gh: Tensor,
        direction: Tensor,
        s: float,
        lr: float,
        a: float,
    ) -> None:
        angle = lr * self.theta
        w = x.values[row].clone()
        unit = direction / direction.norm() if x.family == "hidden" else gh / s
        if x.family == "head" and not self.derivation:
            x.values[row] = w - angle * a * unit
            x.R[i] = x.norm(row)
        elif x.grows_to[i] > 0:  # young
            reach = math.sqrt(len(row)) if x.family == "embedding" else 1.0
            x.values[row] = w - angle * reach * unit
            x.R[i] = x.norm(row)
            if x.R[i] >= x.grows_to[i]:
                x.grows_to[i] = 0.0
        else:
            u = x.R[i] * unit
            if x.family != "embedding":
                x.R[i] *= math.exp(-self.exponent * angle * float(gh @ w) / (x.R[i] * s))
            x.values[row] = x.R[i] * (w - angle * u) / (w - angle * u).norm()
        x.d[row] = (w - x.values[row]) / self.theta
