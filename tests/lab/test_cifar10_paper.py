"""VGG-11 and ResNet-18 on CIFAR-10 as Nero's paper trains them: networks, pictures, schedule, metrics."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import archopt
from archopt.lab import pictures
from archopt.lab.errors import Interrupted
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.deep_resnet import DeepResNet
from archopt.lab.models.vgg import VGG
from archopt.lab.pictures import CIFAR10_MEAN, cropped_and_mirrored, normalized
from archopt.lab.plan import Plan, plan_runs
from archopt.lab.report.load import load
from archopt.lab.workloads.cifar10_paper import STD, CIFAR10Paper
from archopt.lab.workloads.cifar10_resnet18 import CIFAR10ResNet18
from archopt.lab.workloads.cifar10_vgg11 import CIFAR10VGG11
from archopt.lab.workloads.supervised import score
from lab.running import TOY, StopAt, bits, lines, run, toy
from real_data import real_data, real_data_path

BOTH = (CIFAR10VGG11, CIFAR10ResNet18)

# Spec 4.2: parameters, tensors, entries in 1-D tensors, entries of Nero's v.
COUNTS = {
    "VGG-11": (lambda: VGG(11), (28_141_258, 14, 8_202, 19_156)),
    "VGG-13": (lambda: VGG(13), (28_325_578, 16, 8_202, 19_348)),
    "VGG-16": (lambda: VGG(16), (33_633_994, 19, 8_202, 20_628)),
    "VGG-19": (lambda: VGG(19), (38_942_410, 22, 8_202, 21_908)),
    "VGG-11-BN": (lambda: VGG(11, batch_norm=True), (28_146_762, 30, 13_706, 24_660)),
    "ResNet-18": (lambda: DeepResNet(18), (11_173_962, 62, 9_610, 14_420)),
    "ResNet-34": (lambda: DeepResNet(34), (21_282_122, 110, 17_034, 25_556)),
    "ResNet-50": (lambda: DeepResNet(50), (23_520_842, 161, 53_130, 79_700)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_the_published_counts(name: str) -> None:
    build, expected = COUNTS[name]
    with torch.device("meta"):
        shapes = [p.shape for p in build().parameters()]
    sizes = [math.prod(shape) for shape in shapes]
    vectors = sum(size for size, shape in zip(sizes, shapes) if len(shape) < 2)
    assert (sum(sizes), len(sizes), vectors, sum(shape[0] for shape in shapes)) == expected


def test_nero_keeps_one_number_a_row_and_one_a_vector_entry() -> None:
    model = DeepResNet(18, width=4)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer = archopt.Nero(model.parameters())
    optimizer.step()
    assert sum(state["exp_avg_sq"].numel() for state in optimizer.state.values()) == sum(
        param.shape[0] for param in model.parameters()
    )


def test_networks_are_built_as_the_paper_says() -> None:
    torch.manual_seed(0)
    vgg, resnet = VGG(11, width=8), DeepResNet(18, width=8)
    pictures = torch.randn(2, 3, 32, 32)
    assert vgg(pictures).shape == resnet(pictures).shape == (2, 10)
    kinds = [type(layer).__name__ for layer in vgg.features]
    assert kinds[:6] == ["Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d"]
    assert [layer.p for layer in vgg.classifier if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in vgg.modules())
    assert [type(layer) for layer in resnet.stem] == [nn.Conv2d, nn.BatchNorm2d]  # no ReLU
    assert resnet.blocks(resnet.stem(pictures)).shape == (2, 64, 4, 4)
    for model in (vgg, resnet):
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            if conv.weight.numel() > 1000:
                assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
            assert conv.bias is None
    assert all(m.weight.eq(1).all() for m in resnet.modules() if isinstance(m, nn.BatchNorm2d))


# -- the schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("there", [50_000, 25_000])  # of the set and of its half, which keeps the steps
def test_the_schedule_is_the_published_one(cls: type[CIFAR10Paper], there: int) -> None:
    workload = with_pictures(cls(), there)
    assert workload.steps == 77_809
    assert workload.eval_every == 391
    assert workload.steps_per_epoch == 391
    assert workload.pass_steps == -(-there // 128)
    of = workload.schedule
    assert of(0) == pytest.approx(1 / 1955)
    assert of(999) == pytest.approx(1000 / 1955)
    assert of(1954) == of(1955) == 1

    def first(epoch: int) -> int:
        return (epoch - 1) * 391

    assert [of(first(e)) for e in (6, 99)] == [1, 1]
    for begin, end, value in ((100, 149, 0.2), (150, 179, 0.04), (180, 199, 0.008)):
        assert of(first(begin)) == pytest.approx(value)
        assert of(first(end + 1) - 1) == pytest.approx(value)
    assert of(first(100) - 1) == 1
    assert first(200) == workload.steps


def with_pictures(workload: CIFAR10Paper, train: int, test: int = 10) -> CIFAR10Paper:
    """A workload that holds black pictures."""
    workload.hold(
        (torch.zeros(train, 1, 1, 1, dtype=torch.uint8), torch.zeros(train, dtype=torch.long)),
        (torch.zeros(test, 1, 1, 1), torch.zeros(test, dtype=torch.long)),
    )
    return workload


def test_the_note_says_what_is_missing_of_the_published_data_and_only_that() -> None:
    assert with_pictures(CIFAR10VGG11(), 25_000, 5_000).data_note == "half of CIFAR-10: 25,000 + 5,000 images"
    assert with_pictures(CIFAR10VGG11(), 50_000, 10_000).data_note == ""
    asked_for_less = CIFAR10VGG11(train_images=100, test_images=50)
    assert with_pictures(asked_for_less, 100, 50).data_note == ""


def test_published_optimisers_have_neither_momentum_nor_decay() -> None:
    for cls, adam, lamb in ((CIFAR10VGG11, 0.001, 0.01), (CIFAR10ResNet18, 0.01, 0.1)):
        assert cls.settings["nero"] == {"lr": 0.01}
        assert cls.settings["sgd"] == {"lr": 0.1}
        assert cls.settings["adam"] == {"lr": adam, "betas": (0.0, 0.999)}
        assert cls.settings["lamb"] == {"lr": lamb, "betas": (0.0, 0.999)}


def test_titles_say_what_there_was_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = toy()
    monkeypatch.setattr(type(small.workload), "data_note", "half of it")
    path = tmp_path / "toy-small" / "adam" / "lr=0.02" / "seed=0"
    run(path, small)
    assert load(tmp_path).workloads[0].title == "toy (small, half of it)"  # a run by itself
    plan_runs(Plan([WorkloadChoice(str(TOY))], ["adam(lr=0.02)"], "default", [0], tmp_path))
    assert load(tmp_path).workloads[0].title == "toy (small, half of it)"


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [-14.3, 3.1, 15.0])
def test_a_picture_is_turned_as_pillow_turns_it(degrees: float) -> None:
    """Pillow's `rotate` with the nearest pixel, which is what torchvision's RandomRotation calls."""
    picture = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    turned = Image.fromarray(picture).rotate(degrees, Image.Resampling.NEAREST)
    expected = torch.from_numpy(np.array(turned)).permute(2, 0, 1)
    grid = torch.arange(32)
    rows, columns = grid.repeat_interleave(32).view(1, -1), grid.repeat(32).view(1, -1)
    angle = torch.tensor([[math.radians(degrees)]])
    row, column, outside = pictures._turned(rows, columns, angle, 32, 32)
    source = torch.from_numpy(picture).permute(2, 0, 1)
    found = source[:, row[0].clamp(0, 31), column[0].clamp(0, 31)].masked_fill(outside, 0).view(3, 32, 32)
    differing = (found != expected).any(0).float().mean().item()
    assert differing < 0.01  # pixels whose source lies on the border of two
    assert (expected == 0).all(0).sum() > 0


def test_the_training_pictures_are_cropped_mirrored_and_then_turned() -> None:
    images = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    upright = cropped_and_mirrored(images, generator())
    turned = cropped_and_mirrored(images, generator(), 15.0)
    assert turned.dtype == torch.uint8
    middle = (slice(None), slice(None), slice(14, 18), slice(14, 18))  # turns by less than a pixel there
    assert (upright[middle] == turned[middle]).float().mean() > 0.8
    assert not torch.equal(upright, turned)
    ones = cropped_and_mirrored(torch.full((500, 1, 32, 32), 7, dtype=torch.uint8), generator(), 15.0)
    assert set(ones.unique().tolist()) == {0, 7}
    assert (ones[:, 0, 16, 16] == 7).all()


def test_pictures_are_normalised_with_the_papers_numbers() -> None:
    white = normalized(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), CIFAR10_MEAN, STD)
    expected = [(1 - m) / s for m, s in zip((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    assert white[0, :, 0, 0].tolist() == pytest.approx(expected)


# -- metrics ---------------------------------------------------------------------------------------


def test_a_score_is_the_mean_loss_and_the_share_among_the_largest() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    targets = torch.tensor([0, 2, 2])
    model = nn.Identity()
    loss, shares = score(model, [(logits[:2], targets[:2]), (logits[2:], targets[2:])], ranks=(1, 2, 5))
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    by_hand = [math.log(sum(math.exp(x) for x in row)) - row[t] for row, t in zip(logits.tolist(), (0, 2, 2))]
    assert loss == pytest.approx(sum(by_hand) / 3)
    loss, shares = score(model, [(logits * math.nan, targets)])
    assert math.isnan(loss)
    assert math.isnan(shares[0])


def experiment(name: str, **options: object) -> Experiment:
    real_data("cifar10-half")
    return open_experiment(WorkloadChoice(name, "smoke", options), real_data_path(), torch.device("cpu"))


@pytest.mark.data
@pytest.mark.parametrize(("name", "optimizer"), [("cifar10-vgg11", "nero"), ("cifar10-resnet18", "adam")])
def test_the_smoke_preset_trains_and_tells_error_and_scores(
    name: str, optimizer: str, tmp_path: Path
) -> None:
    result = run(tmp_path, experiment(name), optimizer, lr=0.01)
    assert result["status"] == "finished", result["error"]
    final = result["final"]
    assert final["test_error"] == pytest.approx(1 - final["test_accuracy"])
    assert 0 <= final["scored_train_accuracy"] <= 1
    assert {"loss", "accuracy"} <= set(lines(tmp_path)[-1]["train"])
    assert result["best"]["value"] <= final["test_error"]


@pytest.mark.data
def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    small = experiment("cifar10-vgg11")
    run(tmp_path / "whole", small, "nero", lr=0.01)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", small, "nero", lr=0.01, watcher=StopAt(5))
    run(tmp_path / "parts", small, "nero", lr=0.01)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.data
def test_batches_depend_on_seed_and_step_alone_and_the_last_one_is_kept() -> None:
    workload = experiment("cifar10-resnet18", train_images=70).workload
    before = torch.get_rng_state()
    images, targets = workload.batch(1, seed=1)
    again, same = workload.batch(1, seed=1)
    assert torch.equal(images, again)
    assert torch.equal(targets, same)
    assert torch.equal(before, torch.get_rng_state())
    sizes = [len(workload.batch(step, seed=0)[0]) for step in range(4)]
    assert sizes == [32, 32, 6, 32]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (CIFAR10VGG11, {"depth": 12}, "depth=12, expected one of 11, 13, 16, 19"),
        (CIFAR10ResNet18, {"depth": 19}, "depth=19, expected one of 10, 18, 34, 50"),
        (CIFAR10VGG11, {"width": 0}, "width=0, expected a value above 0"),
        (CIFAR10VGG11, {"warmup": -1}, "warmup=-1, expected at least 0"),
        (CIFAR10VGG11, {"scored_images": -1}, "scored_images=-1, expected at least 0"),
    ],
)
def test_options_out_of_range_are_refused(cls: type[CIFAR10Paper], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)
