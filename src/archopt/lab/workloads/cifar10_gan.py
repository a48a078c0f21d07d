"""cifar10-gan: the class-conditional GAN of Nero's paper (arXiv:2102.07227, figure 5) on CIFAR-10.

Data: CIFAR-10, pixels in [-1, 1], every second picture mirrored: the original files or, where the folder does not
have them, the half of it called cifar10-half (its distances are not comparable with published ones). An epoch is
the paper's, 196 steps, whatever the number of pictures, so that half of them are trained on for as many steps.
Model: `Generator` and `Discriminator` (models/gan.py), both with spectral normalisation, each with an optimiser of
its own. `--discriminator-optimizer "adam(lr=0.0001)"` trains the discriminator by another than the run's.
Loss: of the discriminator mean(max(D(fake), -1)) - mean(min(D(real), 1)), which is the hinge loss - 2; then, with
new latents, of the generator -mean(D(fake)). One step of each, labels those of the real batch. The gradients of the
other network, which the reference computes and discards, are not computed: the steps are the same to the bit.
Schedule: a tenth of the rate from epoch 100 of 121. Evaluated every 10 epochs; the paper's last evaluation is that
after 120 epochs, the end of the run comes an epoch later. Adam's betas differ between the networks: (0, 0.999)
for the generator, (0.9, 0.999) for the discriminator, as published.
Metric: the Fréchet distance (fid.py) between real pictures and as many of the generator's with the same labels: to
the test pictures (the headline) and to the first training pictures. With `--features inception` and the file of
weights in the data folder that is the FID; else `frechet_classifier`, between features of a small classifier that
is trained on the training pictures when the data are read. As published, real pictures are mirrored at random
(`mirror_real`), and each picture, real or not, is stretched so that its smallest value is black and its largest
white (`stretch`), then rounded to 8 bits.
Pictures: a grid, one class a row, the same latents at every evaluation, in the run's folder.

Presets: `paper` is that to the letter: width 64, batches of 256, 23,716 steps, 10,000 pictures a distance; for a
GPU. `small` has 16 x 16 pixels (means of 2 x 2), width 16, batches of 32, 10 rows for labels instead of 1,000,
statistics of normalisation with momentum 0.01, 16 steps an epoch (1,936 steps), the first 10,000 pictures, and
distances of 2,000. `smoke` takes 4 steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archopt.lab import seeds
from archopt.lab.data import DataFolder, half_note, load_cifar10
from archopt.lab.fid import (
    ROWS,
    described,
    eight_bits,
    frechet_distance,
    load_inception,
    mirrored,
    trained_classifier,
)
from archopt.lab.models.gan import Discriminator, Generator, renew_iterates
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.workload import Metric, Training
from archopt.lab.workloads.supervised import Supervised, check_positive, labels

CLASSES = 10
SIDE = 32
COLUMNS = 10  # of the grid of pictures
GRID_SEED, MIRROR_SEED = 0, 1  # of the grid's latents, and of which real pictures are mirrored for distances
FID = Metric("fid_test", "FID to the test pictures", higher_is_better=False)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """From the scores of real and generated pictures: the hinge loss - 2, at least -2."""
    return fake.clamp(min=-1).mean() - real.clamp(max=1).mean()


def scaled(pictures: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def shrunk(pictures: Tensor, side: int) -> Tensor:
    """uint8 pictures (n, 3, 32, 32) with `side` pixels both ways: means, rounded."""
    if side == SIDE:
        return pictures
    return F.avg_pool2d(pictures.float(), SIDE // side).round().to(torch.uint8)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters; those of the input are computed."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


@dataclass
class CIFAR10GAN(Supervised):
    """A class-conditional GAN on CIFAR-10 (see the module's text)."""

    name = "cifar10-gan"
    summary = "class-conditional GAN with spectral normalisation on CIFAR-10 (Nero paper)"
    metric = Metric(
        "frechet_classifier_test", "classifier distance to the test pictures", higher_is_better=False
    )
    presets = {
        "paper": {},
        "small": {
            "epoch_steps": 16,
            "batch_size": 32,
            "width": 16,
            "side": 16,
            "label_rows": CLASSES,
            "norm_momentum": 0.01,
            "train_images": 10_000,
            "test_images": 2_000,
            "distance_images": 2_000,
        },
        "smoke": {
            "epochs": 2,
            "drop_epoch": 1,
            "epoch_steps": 2,
            "eval_epochs": 1,
            "batch_size": 8,
            "width": 8,
            "side": 16,
            "label_rows": CLASSES,
            "norm_momentum": 0.1,
            "train_images": 100,
            "test_images": 100,
            "distance_images": 100,
            "classifier_steps": 5,
        },
    }
    settings = {
        "nero": {"lr": 0.01},
        "sgd": {"lr": 0.01},
        "adam": {"lr": 1e-4, "betas": (0.0, 0.999)},
        "lamb": {"lr": 0.01, "betas": (0.0, 0.999)},
    }
    model_settings = {"discriminator": {"adam": {"betas": (0.9, 0.999)}}}

    epochs: int = 121
    batch_size: int = 256
    epoch_steps: int = 196
    """What 50,000 pictures take in batches of 256."""
    drop_epoch: int = 100
    """From this one on, counted from 0, the rate is a tenth."""
    eval_epochs: int = 10
    width: int = 64
    side: Literal[16, 32] = 32
    chunk: int = 20
    """A quarter of the numbers in a latent."""
    label_rows: int = 1000
    """Of the tables of labels; no more than the first ten are ever looked up."""
    norm_momentum: float = 0.001
    train_images: int | None = None
    """None: all there are."""
    test_images: int | None = None
    distance_images: int = 10_000
    """Real pictures of a distance, if there are so many, and as many generated ones."""
    mirror_real: bool = True
    stretch: bool = True
    features: Literal["classifier", "inception"] = "classifier"
    classifier_steps: int = 500
    discriminator_optimizer: str = ""
    """Empty: the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epoch_steps", "eval_epochs", "chunk", "distance_images", "classifier_steps")
        if self.width % 4 or self.width < 4:
            raise ValueError(f"width={self.width}, expected a multiple of 4")
        if self.label_rows < CLASSES:
            raise ValueError(f"label_rows={self.label_rows}, expected at least {CLASSES}")
        if not 0 < self.norm_momentum <= 1:
            raise ValueError(f"norm_momentum={self.norm_momentum}, expected a value above 0 and at most 1")
        if self.discriminator_optimizer:
            parse_optimizer(self.discriminator_optimizer)
        if self.features == "inception":
            self.metric = FID  # type: ignore[misc] # an option that changes what is measured

    # -- data ----------------------------------------------------------------------------------------------

    def load(self, data: DataFolder) -> None:
        cifar = load_cifar10(data, self.train_images, self.test_images)
        parts = (cifar.train_images, cifar.train_labels), (cifar.test_images, cifar.test_labels)
        train, test = (
            (shrunk(torch.from_numpy(images), self.side), labels(targets)) for images, targets in parts
        )
        self.hold(train, test)
        self._network: nn.Module
        if self.features == "inception":
            self._network = load_inception(data)
        else:
            pictures = eight_bits(scaled(self.train_inputs), self.stretch)
            self._network = trained_classifier(pictures, self.train_targets, self.classifier_steps)

    @property
    def data_note(self) -> str:
        there = len(self.train_inputs), len(self.test_inputs)
        return half_note(there, self.train_images, self.test_images)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._network.to(device)
        parts = {
            "test": (self.test_inputs, self.test_targets),
            "train": (self.train_inputs, self.train_targets),
        }
        self._real = {part: self._described_real(*held) for part, held in parts.items()}

    def _described_real(self, pictures: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features and labels of the first pictures of a part."""
        pictures, targets = pictures[: self.distance_images], targets[: self.distance_images]
        if self.mirror_real:
            generator = torch.Generator().manual_seed(MIRROR_SEED)
            pictures = mirrored(pictures, torch.rand(len(pictures), generator=generator) < 0.5)
        return described(self._network, eight_bits(scaled(pictures), self.stretch)), targets

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        pictures, targets = super().batch(step, seed)
        generator = torch.Generator().manual_seed(seeds.mix(seed, step, seeds.BATCH))
        return scaled(mirrored(pictures, torch.rand(len(pictures), generator=generator) < 0.5)), targets

    # -- training ------------------------------------------------------------------------------------------

    def build(self) -> dict[str, nn.Module]:
        return {
            "generator": Generator(self.width, self.side, self.chunk, self.label_rows, self.norm_momentum),
            "discriminator": Discriminator(self.width, self.label_rows),
        }

    def own_optimizers(self) -> Mapping[str, str]:
        return {"discriminator": self.discriminator_optimizer} if self.discriminator_optimizer else {}

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_steps

    @property
    def steps(self) -> int:
        return self.epochs * self.epoch_steps

    @property
    def eval_every(self) -> int:
        return self.eval_epochs * self.epoch_steps

    def schedule(self, step: int) -> float:
        return 1.0 if step < self.drop_epoch * self.epoch_steps else 0.1

    def latents(self, targets: Tensor) -> Tensor:
        """N(0, 1), (n, 4 * chunk), as many as there are labels."""
        return torch.randn(len(targets), 4 * self.chunk, device=targets.device)

    def train_step(self, training: Training, step: int) -> dict[str, Tensor]:
        pictures, targets = training.batch(step)
        generator, discriminator = training.models["generator"], training.models["discriminator"]
        with torch.no_grad():
            fake = generator(self.latents(targets), targets)
        # Two calls, and so two power iterations, as published.
        of_fake = discriminator(fake, targets).float()
        renew_iterates(discriminator)
        of_real = discriminator(pictures, targets).float()
        loss = discriminator_loss(of_real, of_fake)
        training.update("discriminator", loss)
        with frozen(discriminator):
            score = discriminator(generator(self.latents(targets), targets), targets).float().mean()
        training.update("generator", -score)
        told = {"loss": loss, "generator_loss": -score, "real": of_real.mean(), "fake": of_fake.mean()}
        return {name: value.detach() for name, value in told.items()}

    # -- measuring -----------------------------------------------------------------------------------------

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """Distances to the test and the training pictures; not finite where a generated picture is not."""
        name = self.metric.key.removesuffix("_test")
        return {
            f"{name}_{part}": self._distance(models["generator"], features, targets)
            for part, (features, targets) in self._real.items()
        }

    def _distance(self, generator: nn.Module, real: Tensor, targets: Tensor) -> float:
        parts = []
        for some in torch.split(targets, ROWS):
            fake = generator(self.latents(some), some).float()
            if not fake.isfinite().all():
                return float("nan")
            parts.append(eight_bits(fake, self.stretch))
        return frechet_distance(real, described(self._network, torch.cat(parts)))

    def pictures(self, models: dict[str, nn.Module]) -> dict[str, Tensor]:
        """`samples`: a row a class, the same latents always; pixels as the generator has them, not stretched."""
        device = self.train_targets.device
        targets = torch.arange(CLASSES, device=device).repeat_interleave(COLUMNS)
        draws = torch.Generator().manual_seed(GRID_SEED)
        latents = torch.randn(len(targets), 4 * self.chunk, generator=draws).to(device)
        drawn = eight_bits(models["generator"](latents, targets).float(), stretch=False)
        grid = drawn.view(CLASSES, COLUMNS, 3, self.side, self.side).permute(2, 0, 3, 1, 4)
        return {"samples": grid.reshape(3, CLASSES * self.side, COLUMNS * self.side)}
