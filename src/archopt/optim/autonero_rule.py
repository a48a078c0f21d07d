"""AutoNero: every neuron turns by one angle, and the gradients decide how far. This project's own rule.

For all tensors together, at step t = 1, 2, ... with gradients g:

    N      =  sqrt(sum ||g||^2)
    g     <-  g * min(1, 2 sqrt(q / (1 - beta2^(t-1))) / N)          (limit; from the second step)
    q     <-  beta2 q + (1 - beta2) ||g||^2                          (of the limited gradients)
    C      =  sum <g, d>,   D <- lambda D + (1 - lambda) |C - c|
    c      <- lambda c + (1 - lambda) C,   e <- lambda e + (1 - lambda) G
    rho    =  clip(c / e, -2, 2)                                     (0 where e <= 0)
    theta <-  theta exp(kappa (rho + tau / sqrt(1 + t/T)))           (from the second step)
    theta  =  min(2 theta, 0.01, 1/(8L))                             (instead, while it begins)
    eh     =  sqrt(t) e / (1 - lambda^(t-1)),   B <- max(B, theta eh) where c > 2 sigma (and while it begins)
    theta <-  clip(min(theta, B/eh), 1e-6, 1)                        (bound)
    sigma  =  sqrt(pi/2 (1 - lambda)/(1 + lambda)) D / (1 - lambda^(t-1))   (the standard error of c)

and then for every tensor, with rows w of radius R, averages m of g and v of ||g||^2 (of g^2 in a vector):

    gh     =  m / (1 - beta^t),   s = sqrt(v / (1 - beta2^t))
    u      =  R U / ||U||,  U the polar factor of gh                 (rows of a hidden matrix)
    u      =  R gh / s                                               (rows of an embedding)
    u      =  a gh / s,  a = K / max(h, 2)                           (rows of a head)
    u      =  gh / s                                                 (entries of a vector)
    R'     =  R exp(-theta <gh, w> / (R s))                          (hidden)
    w'     =  R' (w - theta u) / ||w - theta u||                     (rows of hidden, embedding)
    w'     =  w - theta u                                            (rows of a head, entries of a vector)
    d      =  (w - w') / theta,   G = sum <gh, d>

h is how long the features are that a head reads, as gradients tell: the gradient of a row is that of its entry of
the bias times the features, so h = ||s|| / ||s of the bias||, norms over the rows; sqrt(fan_in), features of RMS 1,
where there is no bias. So a step changes an output by up to about K theta.

theta_1, the first theta, is 0.01/(8L) with L matrices, so that the network turns by 0.01 at most (or initial_theta,
at most 1/(8L)). It begins as long as theta_1 2^(t-2) < 0.01: then theta doubles at each step, up to 0.01 or 1/(8L).

C is the fresh gradient along the movement made before it was computed, so c/e near 1 says that the slope has not
changed (the step was far too short), 0 that the step was the best single one. theta e is the gain that recent steps
promised, in units of the loss; by the bound it falls as 1/sqrt(t) unless slopes ask for longer steps, beyond doubt:
where gradients are nearly all noise, c is above 0 half of the time whatever theta is.
`docs/autonero.md` has the reasons.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archopt.neurons import row_norm
from archopt.optim.base import Rate, bias_correction
from archopt.optim.matrices import nonzero
from archopt.optim.orthogonalise import orthogonalise

THETA_RANGE = (1e-6, 1.0)
THETA_0 = 0.01  # by how much the first step may turn the network; below this angle theta doubles first
RHO_RANGE = (-2.0, 2.0)
LEAST_FEATURES = 2.0  # norm below which a head's features are taken to be asleep, not small
FAN_IN = (-1,)  # the dimension of `Rows` that a row sums over
GROWN_NORM = 3**-0.5  # norm of a row as torch.nn.Linear initialises it, to which young rows grow up
YOUNG_NORM = 1e-3 * GROWN_NORM  # a row that starts shorter, as at zero, has no size that anybody meant


class Feedback(NamedTuple):
    """What the optimiser as a whole remembers, 0-d each, in the order of the state tensor `feedback`."""

    steps: Tensor
    """t: steps taken. A step that was void, or had zero gradients everywhere, is none."""
    theta: Tensor
    rho: Tensor
    C: Tensor
    G: Tensor
    slope: Tensor
    """c, average of C."""
    expected: Tensor
    """e, average of G."""
    size: Tensor
    """q, average of the squared norm of the limited gradients."""
    bound: Tensor
    """B, the largest sqrt(t) theta e that slopes have asked for."""
    spread: Tensor
    """D, average of the distance of C from c."""
    skipped: Tensor
    """Steps that were void because something was not finite."""


def feedback_update(
    past: Feedback,
    norm: Tensor,
    product: Tensor,
    moving: Tensor,
    *,
    beta2: float,
    begins: tuple[float, float],
    options: Mapping[str, Any],
) -> tuple[Feedback, Tensor]:
    """The feedback of one step: returns what is remembered (G is last step's still) and the limiting factor f.

    norm: N. product: <g, d> of the gradients as they are. moving: whether any group has a learning rate other
    than 0; theta and its averages stand still while none has. All 0-d. begins: the first theta, and what it may be
    while it begins, 1/(8L). The first step has no past: f = 1 and theta as it is.
    """
    expected_norm = (past.size / bias_correction(beta2, past.steps)).sqrt()
    f = torch.where(past.size > 0, (options["limit"] * expected_norm / norm).clamp(max=1.0), 1.0)
    t = past.steps + 1
    C, decay = f * product, options["feedback_decay"]
    spread = past.spread.lerp((C.to(past.slope) - past.slope).abs(), 1 - decay)
    slope = past.slope.lerp(C.to(past.slope), 1 - decay)
    expected = past.expected.lerp(past.G, 1 - decay)
    rho = torch.where(expected > 0, slope / expected, 0.0).clamp(*RHO_RANGE)
    target = options["target"] / (1 + t / options["target_steps"]).sqrt()
    theta = past.theta * torch.exp(options["feedback_gain"] * (rho + target))
    first, most = begins
    doubles = first * 2.0 ** (past.steps - 1) < THETA_0
    theta = torch.where(doubles, (2 * past.theta).clamp(max=min(most, THETA_0)), theta)
    heat = t.sqrt() * expected / bias_correction(decay, past.steps)
    # Of numbers with a mean distance D, if they are normal: sqrt(pi/2) D. Unlike squares it has the range of C.
    error = math.sqrt(math.pi / 2 * (1 - decay) / (1 + decay)) * spread / bias_correction(decay, past.steps)
    asked = ((rho > 0) & (slope > options["bound_errors"] * error)) | doubles | (past.bound == 0)
    bound = torch.where(asked, torch.maximum(past.bound, theta * heat), past.bound)
    allowed = torch.where(heat > 0, options["bound"] * bound / heat, theta)
    theta = torch.minimum(theta, allowed).clamp(*THETA_RANGE)
    learns = moving & (past.steps > 0)
    return Feedback(
        steps=t,
        theta=torch.where(learns, theta, past.theta),
        rho=torch.where(learns, rho, past.rho),
        C=C,
        G=past.G,
        slope=torch.where(learns, slope, past.slope),
        expected=torch.where(learns, expected, past.expected),
        size=beta2 * past.size + (1 - beta2) * (f * norm).square(),
        bound=torch.where(learns, bound, past.bound),
        spread=torch.where(learns, spread, past.spread),
        skipped=past.skipped,
    ), f


class Rows(NamedTuple):
    """Tensors as rows, `(..., blocks, rows, fan_in)`, and what is kept of each row.

    Vectors are flat, one after another, and have empty `radius` and `grows_to`.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    movement: Tensor
    radius: Tensor
    grows_to: Tensor
    """The norm at which a row that started young is grown up; 0 for every other row."""


def rows_update(
    past: Rows,
    grad: Tensor,
    step: Tensor,
    theta: Tensor,
    lr: Rate,
    *,
    beta: float,
    beta2: float,
    family: str,
    method: str,
    exponent: float,
    bias_sq: Tensor | None,
    gain: float,
) -> tuple[Rows, Tensor]:
    """One step of the rows of a matrix: returns the new rows and sum <gh, d>.

    A row keeps its bits where lr, its direction or s is zero. A *young* row, which had next to no norm at the
    start, takes plain steps -theta u, with R = 1 in u (sqrt(fan_in) in an embedding), and R follows its norm until
    that reaches `grows_to`. exponent: of the radius, 1 in the equation above. bias_sq: where rows are those of a
    head that takes plain steps, ||s of the bias||^2, one a tensor, 0 without a bias; gain: its K.
    """
    w, m, v, _, R, grows_to = past
    m = m.lerp(grad, 1 - beta)
    v = v.lerp(row_norm(grad, FAN_IN).square(), 1 - beta2)
    gh = m / bias_correction(beta, step).to(m.dtype)
    square = v / bias_correction(beta2, step).to(v.dtype)
    s = square.sqrt()

    young = grows_to > 0
    direction = orthogonalise(gh, method) if family == "hidden" else gh
    length = row_norm(direction, FAN_IN) if family == "hidden" else s
    angle = theta * lr
    moves = (length > 0) & (s > 0) & (angle != 0)
    reach = torch.where(young, w.size(-1) ** 0.5 if family == "embedding" else 1.0, R)
    plain = young
    if bias_sq is not None:
        h = feature_norm(square, bias_sq, w.size(-1))
        reach, plain = gain / h.clamp(min=LEAST_FEATURES), torch.ones_like(young)
    stepped = w - angle * reach / nonzero(length) * direction
    norm = row_norm(stepped, FAN_IN)
    moves = moves & (norm > 0)

    grown = R
    if family != "embedding":
        grown = R * torch.exp(-exponent * angle * (gh * w).sum(-1, keepdim=True) / nonzero(R * s))
    new_radius = torch.where(moves, torch.where(plain, norm, grown), R)
    turned = torch.where(plain, stepped, grown / nonzero(norm) * stepped)
    new_weight = torch.where(moves, turned, w)
    d = (w - new_weight) / theta
    still_growing = torch.where(young & (new_radius >= grows_to), 0.0, grows_to)
    return Rows(new_weight, m, v, d, new_radius, still_growing), (gh * d).sum()


def feature_norm(weight_sq: Tensor, bias_sq: Tensor, fan_in: int) -> Tensor:
    """h, the norm of the features that a head reads: (tensors, 1, 1, 1).

    weight_sq: s^2 of the rows, (tensors, blocks, rows, 1). bias_sq: ||s of the bias||^2, (tensors, 1, 1, 1); where
    it is 0, as without a bias, h is sqrt(fan_in).
    """
    told = (weight_sq.sum((1, 2, 3), keepdim=True) / nonzero(bias_sq)).sqrt()
    return torch.where(bias_sq > 0, told, fan_in**0.5)


def vector_update(
    past: Rows, grad: Tensor, step: Tensor, theta: Tensor, lr: Rate, *, beta: float, beta2: float
) -> tuple[Rows, Tensor]:
    """One step of a vector, entry by entry: returns its new values and sum <gh, d>."""
    p, m, v = past.weight, past.exp_avg, past.exp_avg_sq
    m = m.lerp(grad, 1 - beta)
    v = v.lerp(grad.square(), 1 - beta2)
    gh = m / bias_correction(beta, step).to(m.dtype)
    s = (v / bias_correction(beta2, step).to(v.dtype)).sqrt()
    angle = theta * lr
    moves = (s > 0) & (angle != 0)
    new = torch.where(moves, p - angle * gh / nonzero(s), p)
    d = (p - new) / theta
    return Rows(new, m, v, d, past.radius, past.grows_to), (gh * d).sum()
