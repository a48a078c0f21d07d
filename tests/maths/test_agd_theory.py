"""What the analysis of AGD promises, checked in numbers: majorisation, biased networks, transfer over width."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from archopt import init
from archopt.optim.agd import AGD


def rms(x: Tensor) -> Tensor:
    """Root mean square of each row."""
    return x.square().mean(dim=-1).sqrt()


@pytest.mark.parametrize(
    ("half", "curvature"), [(0.5, 1.0), (1.0, 2.0)], ids=["half the square", "the program's"]
)
def test_the_loss_of_a_linear_layer_stays_below_its_majoriser(half: float, curvature: float) -> None:
    """L(w + d) <= L - eta G + (kappa/2)(exp(eta) - 1)^2: exact for one linear layer on inputs of RMS 1."""
    closest = math.inf
    for seed in range(200):
        torch.manual_seed(seed)
        fan_out, fan_in, samples = (int(n) for n in torch.randint(1, 12, (3,)))
        x = torch.randn(samples, fan_in, dtype=torch.float64)
        x /= rms(x)[:, None]
        weight = nn.Parameter(torch.randn(fan_out, fan_in, dtype=torch.float64))
        y = (x @ weight.T).detach() + 10 ** (seed % 3 - 1) * torch.randn(
            samples, fan_out, dtype=torch.float64
        )

        def loss(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return half * (x @ w.T - y).square().mean()

        before = loss(weight)
        before.backward()
        optimizer = AGD([weight])
        optimizer.step()
        eta, summary = float(optimizer.eta), float(optimizer.gradient_summary)
        allowed = curvature / 2 * (math.exp(eta) - 1) ** 2
        slack = float(before.detach()) - eta * summary + allowed - float(loss(weight.detach()))
        assert slack >= -1e-12
        closest = min(closest, slack / allowed)
    assert closest < 0.2  # close somewhere: steps that are an eighth longer would break the bound


class Net(nn.Module):
    def __init__(self, dims: list[int], *, bias: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(dims))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[-1]

    def activations(self, x: Tensor) -> list[Tensor]:
        hidden = [x]
        for layer in self.layers[:-1]:
            hidden.append(self.scale * torch.relu(layer(hidden[-1])))
        return [*hidden, self.layers[-1](hidden[-1])]


def test_networks_with_biases_move_their_outputs_no_further_than_the_lemma_says() -> None:
    """RMS(change of f) <= X (exp(eta) - 1), the operator norms being the radii and activations of RMS at most X."""
    largest = 0.0
    for seed in range(60):
        torch.manual_seed(seed)
        dims = [int(n) for n in torch.randint(1, 20, (int(torch.randint(2, 7, ())),))]
        net = init.orthogonal_(Net(dims, bias=True).double())
        x = torch.randn(9, dims[0], dtype=torch.float64)
        x /= rms(x)[:, None]
        with torch.no_grad():
            for layer in net.layers:
                layer.bias.normal_()
            before = net.activations(x)
        (net(x) - 2 * torch.randn(dims[-1]).double()).square().mean().backward()
        optimizer = AGD(net)
        optimizer.step()
        bound = max(1.0, *(float(rms(h).max()) for h in before)) * (math.exp(float(optimizer.eta)) - 1)
        with torch.no_grad():
            moved = float(rms(net(x) - before[-1]).max())
        assert moved <= bound * (1 + 1e-12)
        largest = max(largest, moved / bound)
    assert largest > 0.2  # and not by a wide margin


def test_cross_entropy_rises_above_its_tangent_by_no_more_than_its_bounds() -> None:
    """l(f + d) - l(f) - <l'(f), d> <= max|d|^2 / 2 and <= ||d||^2 / 4, on 10^4 random cases.

    The first follows from Hoeffding's lemma, the second from the largest curvature of log-sum-exp, 1/2.
    """
    torch.manual_seed(0)
    tightest = {"largest": 0.0, "norm": 0.0}
    for classes in (2, 3, 10, 100):
        outputs = 3 * torch.randn(2500, classes, dtype=torch.float64)
        outputs[::5] = 0  # even probabilities
        change = torch.randn_like(outputs) * 10 ** (4 * torch.rand(2500, 1, dtype=torch.float64) - 3)
        change[::7] = change[::7].sign() * change[::7].abs().amax(1, keepdim=True)  # the corners of a cube
        rise = (outputs + change).logsumexp(1) - outputs.logsumexp(1)
        rise -= (outputs.softmax(1) * change).sum(1)
        assert (rise > -1e-12).all()  # convex
        bounds = {"largest": change.abs().amax(1).square() / 2, "norm": change.square().sum(1) / 4}
        for name, bound in bounds.items():
            assert (rise <= bound * (1 + 1e-9) + 1e-12).all()
            tightest[name] = max(tightest[name], float((rise / bound)[bound > 1e-4].max()))
    assert tightest["largest"] > 0.9  # and no smaller ones would do
    assert tightest["norm"] > 0.9


def test_a_convolution_is_bounded_by_the_norms_of_its_taps() -> None:
    """RMS(conv(x)) <= sum over taps of ||W_tap|| RMS(x) with circular padding, operator norms RMS to RMS: why each
    tap has its own norm, and why the prescribed one is sqrt(out/in) / (kx ky)."""
    closest = 0.0
    for seed in range(100):
        torch.manual_seed(seed)
        out, into, size = (int(n) for n in torch.randint(1, 9, (3,)))
        kernel = 1 + 2 * int(torch.randint(0, 2, ()))
        conv = nn.Conv2d(
            into, out, kernel, padding=kernel // 2, padding_mode="circular", bias=False, dtype=torch.float64
        )
        with torch.no_grad():
            if seed % 2:  # taps that agree, on constant pictures: nothing is lost
                conv.weight.copy_(conv.weight[:, :, :1, :1].expand_as(conv.weight))
            size = max(size, kernel)
            taps = conv.weight.permute(2, 3, 0, 1).reshape(-1, out, into)
            allowed = float(torch.linalg.matrix_norm(taps, 2).sum()) * math.sqrt(into / out)
            x = torch.randn(4, into, 1, 1, dtype=torch.float64).expand(-1, -1, size, size)
            if seed % 2:
                x = torch.linalg.svd(taps[0])[2][:1].reshape(1, into, 1, 1).expand(4, -1, size, size)
            moved, given = (part.square().mean().sqrt() for part in (conv(x), x))
        assert float(moved / given) <= allowed * (1 + 1e-12)
        closest = max(closest, float(moved / given) / allowed)
    assert closest > 0.999


def clusters(samples: int, inputs: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Noisy copies of ten random patterns, each input of RMS 1; one-hot targets of RMS 1."""
    labels = torch.randint(0, classes, (samples,))
    x = torch.randn(classes, inputs)[labels] + torch.randn(samples, inputs)
    return x / rms(x)[:, None], nn.functional.one_hot(labels, classes) * math.sqrt(classes)


def test_the_first_step_moves_the_outputs_equally_far_at_every_width() -> None:
    moved, etas = [], []
    for width in (32, 128, 512):
        torch.manual_seed(0)
        x, y = clusters(256, 64)
        net = init.orthogonal_(Net([64, width, width, width, 10], bias=False, scale=math.sqrt(2)))
        with torch.no_grad():
            before = net(x)
        (net(x) - y).square().mean().backward()
        optimizer = AGD(net)
        optimizer.step()
        with torch.no_grad():
            moved.append(float(rms(net(x) - before).mean()))
        etas.append(float(optimizer.eta))
    assert max(moved) / min(moved) < 1.5
    assert max(etas) / min(etas) < 1.5
    assert min(moved) > 0.1


@pytest.mark.parametrize(
    ("depth", "loss", "eta", "after"), [(2, 1.007, 0.123, 0.989), (4, 1.009, 0.111, 0.995)]
)
def test_the_first_step_of_the_published_network_is_in_the_measured_range(
    depth: int, loss: float, eta: float, after: float
) -> None:
    """Random labels, Gaussian inputs, 3072 -> 10 of width 256, batch 128: values of the authors' program."""
    x = torch.randn(128, 3072)
    y = nn.functional.one_hot(torch.randint(0, 10, (128,)), 10) * math.sqrt(10)
    net = init.orthogonal_(Net([3072, *[256] * (depth - 1), 10], bias=False, scale=math.sqrt(2)))
    optimizer = AGD(net.parameters())
    before = net(x)
    (before - y).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert float(rms(before).mean()) == pytest.approx(math.sqrt(10 / 3072), rel=0.3)
        assert float((before - y).square().mean()) == pytest.approx(loss, abs=0.02)
        assert float(optimizer.eta) == pytest.approx(eta, rel=0.25)
        assert float((net(x) - y).square().mean()) == pytest.approx(after, abs=0.02)
