"""Fréchet distances between two sets of pictures (Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter 2017).

A network describes each picture by a vector of features; of each set, m is their mean and C their covariance:

    distance  =  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

Where the network is the Inception-v3 of 2015-12-05 (`Inception`), and only there, that is the FID. Its weights are
a file that the user gives. Without it there is a classifier that the laboratory trains on the real pictures, the
same for every run on the same data, and its distance goes by a name of its own: `frechet_classifier`. The two have
no relation, and the second compares only runs with the same pictures and options.
"""

import hashlib
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab.data import DataError, DataFolder
from archopt.lab.models.feature_cnn import FeatureCNN
from archopt.lab.models.inception import Inception

INCEPTION_FILE = "inception/pt_inception-2015-12-05-6726825d.pth"
"""Where in the data folder the weights of `Inception` are, under the name by which their port is known."""
INCEPTION_SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
"""Who publishes them; of the weights of Heusel et al., Apache-2.0."""
INCEPTION_SHA256 = "6726825d"
"""How the checksum of the file begins."""
CLASSIFIER_BATCH, CLASSIFIER_LR, CLASSIFIER_SEED = 64, 3e-3, 0
ROWS = 250  # pictures made or described at once; bounds memory


def eight_bits(images: Tensor, stretch: bool) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] as uint8: -1 becomes 0 and 1 becomes 255.

    With `stretch` each picture's own smallest value becomes 0 and its largest 255.
    """
    if stretch:
        low, high = (extreme(images, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
        shares = (images - low) / (high - low).clamp(min=1e-5)
    else:
        shares = (images + 1) / 2
    return (shares * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def described(network: nn.Module, pictures: Tensor) -> Tensor:
    """Features of uint8 pictures: (n, features), float64, on the CPU."""
    # Of real and of generated pictures alike, whatever the run has.
    with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
        return torch.cat([network(part).double().cpu() for part in torch.split(pictures, ROWS)])


class _Given(nn.Module):
    """Features that are there already, as torchmetrics wants a network."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The distance between two sets of features (n, features), float64, covariances divided by n - 1.

    torchmetrics takes the root's trace from the eigenvalues of C1 C2, which are finite where the features are: the
    constant that other programs add to the diagonals of a root that is not finite is never needed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def load_inception(data: DataFolder) -> Inception:
    """The network of the FID with its weights, ready to describe pictures.

    Raises DataError where the data folder does not have the file of the weights, or it is another.
    """
    try:
        content = data.read(INCEPTION_FILE)
    except DataError as error:
        raise DataError(
            f"{error}; FID is defined by those weights, which {INCEPTION_SOURCE} has; features='classifier' "
            "needs none"
        ) from error
    if not hashlib.sha256(content).hexdigest().startswith(INCEPTION_SHA256):
        raise DataError(
            f"{INCEPTION_FILE} is damaged or another file, its sha256 does not begin with {INCEPTION_SHA256}; FID "
            "is defined by those weights, features='classifier' needs none"
        )
    network = Inception()
    network.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def trained_classifier(pictures: Tensor, labels: Tensor, steps: int) -> FeatureCNN:
    """A classifier trained for `steps` batches of 64 on pictures (n, 3, side, side), uint8, and labels (n,).

    A function of its arguments alone: it draws from a generator of its own and runs on one thread of the CPU,
    whatever the run has. AdamW, the rate falling in a straight line; every second picture is mirrored.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(CLASSIFIER_SEED)
            network = FeatureCNN(pictures.shape[-1])
            optimizer = torch.optim.AdamW(network.parameters(), CLASSIFIER_LR)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = CLASSIFIER_LR * (1 - step / steps)
                rows = torch.randint(len(pictures), (CLASSIFIER_BATCH,))
                batch = mirrored(pictures[rows], torch.rand(CLASSIFIER_BATCH) < 0.5)
                F.cross_entropy(network.classify(batch), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
    return network.eval().requires_grad_(False)


def mirrored(images: Tensor, which: Tensor) -> Tensor:
    """Images (n, 3, h, w), those mirrored for which `which` (n,) is true."""
    return torch.where(which.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)
