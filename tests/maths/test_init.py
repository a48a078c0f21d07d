"""init.orthogonal_: singular values by role, strides, half precision, and what it leaves alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from archopt import init


def singular_values_are(matrix: Tensor, value: float, tolerance: float = 1e-5) -> bool:
    values = torch.linalg.svdvals(matrix.detach().to(torch.float64))
    return bool(((values - value).abs() < tolerance * value).all())


@pytest.mark.parametrize(("fan_out", "fan_in"), [(6, 6), (3, 7), (7, 3), (1, 5), (5, 1)])
def test_matrices_have_the_prescribed_singular_values(fan_out: int, fan_in: int) -> None:
    layer = init.orthogonal_(nn.Linear(fan_in, fan_out, bias=False))
    assert singular_values_are(layer.weight, math.sqrt(fan_out / fan_in))


def test_each_tap_of_a_convolution_has_the_prescribed_singular_values() -> None:
    for layer, taps in ((nn.Conv1d(3, 5, 4), 4), (nn.Conv2d(6, 4, (3, 2)), 6), (nn.Conv3d(2, 5, 2), 8)):
        init.orthogonal_(layer)
        fan_out, fan_in = layer.weight.shape[:2]
        taps_first = layer.weight.flatten(2).movedim(-1, 0)
        assert len(taps_first) == taps
        for tap in taps_first:
            assert singular_values_are(tap, math.sqrt(fan_out / fan_in / taps))
        assert not singular_values_are(taps_first[0] + taps_first[1], 2 * math.sqrt(fan_out / fan_in / taps))


def test_grouped_and_transposed_convolutions_are_filled_group_by_group() -> None:
    grouped = init.orthogonal_(nn.Conv2d(4, 6, 3, groups=2))
    for group in grouped.weight.chunk(2):
        assert singular_values_are(group[:, :, 1, 2], math.sqrt(3 / 2 / 9))
    up = init.orthogonal_(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))
    for group in up.weight.chunk(2):  # (in/groups, out/groups, kernel)
        assert singular_values_are(group[:, :, 1, 2], math.sqrt(3 / 2) * 2 / 3)


@pytest.mark.parametrize(
    ("layer", "name", "slices"),
    [(nn.MultiheadAttention(6, 2), "in_proj_weight", 3), (nn.LSTM(6, 6), "weight_ih_l0", 4)],
    ids=["attention", "lstm"],
)
def test_packed_projections_are_filled_slice_by_slice(layer: nn.Module, name: str, slices: int) -> None:
    init.orthogonal_(layer)
    for part in getattr(layer, name).chunk(slices):
        assert singular_values_are(part, 1.0)


def test_depthwise_filters_and_embedding_rows_have_the_prescribed_rms() -> None:
    depthwise = init.orthogonal_(nn.Conv2d(5, 5, 3, groups=5))
    torch.testing.assert_close(depthwise.weight.detach().flatten(1).norm(dim=1), torch.ones(5))
    embedding = init.orthogonal_(nn.Embedding(7, 4, padding_idx=3))
    rms = embedding.weight.detach().square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.tensor([1.0, 1, 1, 0, 1, 1, 1]))


def test_vectors_start_at_zero_and_gains_at_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with torch.no_grad():
        model[1].weight.fill_(5.0)
        model[1].bias.fill_(5.0)
    init.orthogonal_(model)
    assert (model[0].bias == 0).all()
    assert (model[1].weight == 1).all()
    assert (model[1].bias == 0).all()


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.words = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.words.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_scalars_positions_tied_and_frozen_weights_stay() -> None:
    model = Kept()
    before = [param.detach().clone() for param in model.parameters()]
    assert init.orthogonal_(model) is model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_strided_weights_are_written_in_place() -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)
    base = torch.zeros(12, 8, 3, 3)
    layer.weight = nn.Parameter(base[::2, ::2])
    assert not layer.weight.is_contiguous()
    init.orthogonal_(layer)
    assert layer.weight.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert singular_values_are(base[::2, ::2][:, :, 0, 1], math.sqrt(6 / 4 / 9))
    assert (base[1::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_drawn_in_float32_and_rounded(dtype: torch.dtype) -> None:
    layer, wide = nn.Linear(12, 8, bias=False).to(dtype), nn.Linear(12, 8, bias=False)
    init.orthogonal_(layer, generator=torch.Generator().manual_seed(1))
    init.orthogonal_(wide, generator=torch.Generator().manual_seed(1))
    assert layer.weight.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(layer.weight, wide.weight.to(dtype))
    assert singular_values_are(layer.weight, math.sqrt(8 / 12), 0.02 if dtype != torch.float64 else 1e-12)


def test_the_global_generator_and_a_given_one_decide_the_numbers() -> None:
    def weight(seed: int | None = None, own: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        generator = None if own is None else torch.Generator().manual_seed(own)
        return init.orthogonal_(nn.Linear(3, 4, bias=False), generator=generator).weight.detach()

    assert torch.equal(weight(seed=1), weight(seed=1))
    assert not torch.equal(weight(seed=1), weight(seed=2))
    assert torch.equal(weight(seed=1, own=7), weight(seed=2, own=7))


def test_the_distribution_is_uniform_over_signs() -> None:
    draws = init.semi_orthogonal(2000, 3, 3, like=torch.zeros(1))
    # Every entry of a uniform orthogonal 3x3 matrix has mean 0 and mean square 1/3.
    assert float(draws.mean(dim=0).abs().max()) < 5 * math.sqrt(1 / 3 / 2000)
    assert float((draws.square().mean(dim=0) - 1 / 3).abs().max()) < 0.04


def test_meta_modules_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"weight is a meta tensor; call module.to_empty"):
        init.orthogonal_(nn.Linear(3, 4, device="meta"))
