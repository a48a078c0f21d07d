"""MNIST as both MNIST workloads take it (2102.07227): rows of 784 pixels, judged by the running accuracy."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from archopt.lab.data import DataFolder, load_mnist
from archopt.lab.workload import Metric
from archopt.lab.workloads.supervised import EVALUATION_ROWS, Supervised, accuracy, labels, pixels

WHITE, MEAN, STD = 255.0, 0.1307, 0.3081
PIXELS, CLASSES = 28 * 28, 10


@dataclass
class MnistRows(Supervised):
    """MNIST with its pixels scaled and flattened; of the 60,000 images to train on, the first
    `train_images` are used.

    The metric is the paper's: the mean accuracy of the training batches since the last evaluation, each
    scored before its update; before the first step, where there are none, that on the first 1,000 images.
    """

    metric = Metric("train_accuracy", "running training accuracy", higher_is_better=True, unit="%")

    batch_size: int = 250
    train_images: int = 60_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.train_images <= 60_000:
            raise ValueError(f"train_images={self.train_images}, expected 1 to 60000")

    def load(self, data: DataFolder) -> None:
        mnist = load_mnist(data)
        self.hold(
            (
                pixels(mnist.train_images[: self.train_images], WHITE, MEAN, STD).flatten(1),
                labels(mnist.train_labels[: self.train_images]),
            ),
            (pixels(mnist.test_images, WHITE, MEAN, STD).flatten(1), labels(mnist.test_labels)),
        )
        self.load_state_dict({"correct": 0.0, "batches": 0})

    def state_dict(self) -> dict[str, Any]:
        return {"correct": float(self._correct), "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Summed on the model's device, without waiting for it; in float64, so that a resumed sum is the same.
        self._correct: Tensor | float = state["correct"]
        self._batches: int = state["batches"]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra = super().loss(model, batch)
        self._correct = self._correct + extra["accuracy"].double()
        self._batches += 1
        return loss, extra

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """`train_accuracy`, and `test_loss` and `test_accuracy` over the whole test set."""
        if self._batches:
            running = float(self._correct) / self._batches
        else:
            first = slice(EVALUATION_ROWS)
            running = float(accuracy(models["model"](self.train_inputs[first]), self.train_targets[first]))
        self.load_state_dict({"correct": 0.0, "batches": 0})
        return {"train_accuracy": running, **super().evaluate(models)}
