"""Fréchet distances: 8 bits, the formula, the classifier that describes pictures, the network of the FID."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from archopt.lab import fid
from archopt.lab.data import DataError, DataFolder
from archopt.lab.fid import described, eight_bits, frechet_distance, load_inception, trained_classifier
from archopt.lab.models.inception import Inception, InceptionE, mean_pool


def colours(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy pictures of ten classes, each with a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randint(-20, 21, (count, 3, 16, 16), generator=generator)
    tints = torch.linspace(30, 225, 10)[labels].view(-1, 1, 1, 1)
    return (tints + noise).clamp(0, 255).to(torch.uint8), labels


# -- 8 bits ----------------------------------------------------------------------------------------


def test_eight_bits_keep_every_pixel_that_had_them() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(eight_bits(pixels.float() / 127.5 - 1, stretch=False), pixels)
    beyond = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.2]).view(1, 1, 1, 5)
    assert eight_bits(beyond, stretch=False).flatten().tolist() == [0, 0, 128, 255, 255]


def test_stretching_makes_each_pictures_own_extremes_black_and_white() -> None:
    dark, bright = torch.tensor([-0.5, -0.25, 0.0]), torch.tensor([0.8, 0.9, 0.85])
    pictures = torch.stack((dark, bright)).view(2, 3, 1, 1)
    # Over all channels at once: a picture of one colour keeps it.
    assert eight_bits(pictures, stretch=True).view(2, 3).tolist() == [[0, 128, 255], [0, 255, 128]]
    assert eight_bits(torch.full((1, 3, 2, 2), 0.3), stretch=True).unique().tolist() == [0]


# -- the distance ----------------------------------------------------------------------------------


def test_the_distance_has_the_worked_values() -> None:
    real, fake = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[1.0], [5.0]]).double()
    # Means 0 and 3, variances (n - 1) 2 and 8: 9 + 2 + 8 - 2 sqrt(16).
    assert frechet_distance(real, fake) == pytest.approx(11)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-12)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double()
    wide = corners * torch.tensor([3.0, 2.0]) + torch.tensor([0.0, 1.0])
    # Diagonal covariances 4/3 (1, 1) and 4/3 (9, 4): 1 + 4/3 ((3 - 1)^2 + (2 - 1)^2).
    assert frechet_distance(corners, wide) == pytest.approx(1 + 4 / 3 * 5)


def test_the_distance_is_the_formula_with_a_symmetric_root() -> None:
    torch.manual_seed(0)
    mixed = torch.randn(8, 8, dtype=torch.float64)
    real, fake = torch.randn(300, 8).double() @ mixed, torch.randn(200, 8).double() @ mixed.T + 0.3

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    c1, c2 = real.T.cov(), fake.T.cov()
    half = root(c1)
    trace = (c1 + c2 - 2 * root(half @ c2 @ half)).trace()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + trace
    assert frechet_distance(real, fake) == pytest.approx(expected.item(), rel=1e-9)


def test_a_generator_that_always_draws_the_same_has_a_finite_distance() -> None:
    real = torch.randn(50, 4).double()
    same = torch.ones(50, 4).double()
    expected = (real.mean(0) - 1).square().sum() + real.T.cov().trace()
    assert frechet_distance(real, same) == pytest.approx(expected.item())


# -- the classifier --------------------------------------------------------------------------------


def test_the_classifier_learns_and_tells_pictures_apart() -> None:
    pictures, labels = colours(200)
    network = trained_classifier(pictures, labels, steps=50)
    others, theirs = colours(200, seed=1)
    assert not network.training
    assert (network.classify(others).argmax(1) == theirs).float().mean() > 0.6
    real = described(network, pictures)
    assert (real.shape, real.dtype) == ((200, 64), torch.float64)
    noise = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    dark = others[theirs < 3]
    near, far, narrow = (frechet_distance(real, described(network, some)) for some in (others, noise, dark))
    assert near < 0.1 * min(far, narrow)


def test_the_classifier_is_a_function_of_the_pictures_alone() -> None:
    pictures, labels = colours(100)
    threads = torch.get_num_threads()
    weights = []
    for number in (1, 2):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        torch.set_num_threads(number)
        try:
            network = trained_classifier(pictures, labels, steps=5)
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(before, torch.get_rng_state())
        weights.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert torch.equal(*weights)


def test_pictures_are_described_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, labels = colours(20)
    network = trained_classifier(pictures, labels, steps=2)
    whole = described(network, pictures)
    monkeypatch.setattr(fid, "ROWS", 7)
    torch.testing.assert_close(described(network, pictures), whole)


# -- Inception -------------------------------------------------------------------------------------


def test_inception_has_the_ports_tensors_and_its_three_differences() -> None:
    with torch.device("meta"):
        network = Inception()
    # 94 convolutions, each with gain, shift and three statistics, and the linear map to 1,008 classes.
    assert len([m for m in network.modules() if isinstance(m, nn.Conv2d)]) == 94
    assert len(network.state_dict()) == 94 * 6 + 2
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert network.fc.weight.shape == (1008, 2048)
    # What pads a picture is not counted.
    torch.testing.assert_close(mean_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    # The pool's branch, the last 192 channels, sees means in the last but one block and maxima in the last.
    torch.manual_seed(0)
    x = torch.randn(1, 16, 8, 8)
    for last, pooled in ((False, mean_pool(x)), (True, torch.max_pool2d(x, 3, 1, 1))):
        block = InceptionE(16, last=last).eval()
        torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(pooled))


def test_the_weights_of_inception_are_read_from_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Inception().eval()
    file = tmp_path / fid.INCEPTION_FILE
    file.parent.mkdir()
    torch.save(network.state_dict(), file)
    with pytest.raises(DataError, match=r"does not begin with 6726825d; FID is.*features='classifier'"):
        load_inception(DataFolder(tmp_path))
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    folder = DataFolder(tmp_path)
    read = load_inception(folder)
    assert list(folder.checksums) == [fid.INCEPTION_FILE]
    assert not any(p.requires_grad for p in read.parameters())
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = described(read, pictures)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, described(network, pictures))


def test_missing_weights_are_one_line_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"6726825d\.pth: No such file.*put it there.*classifier' needs none"
    ) as caught:
        load_inception(DataFolder(tmp_path))
    assert "\n" not in str(caught.value)
