"""The program of AGD's paper: its networks, data, losses, refusals, and what its records hold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from archopt import init
from archopt.lab.cli import BAD_INPUT, DONE, main
from archopt.lab.data import DataError, DataFolder
from archopt.lab.data.classified import KNOWN, SmallPictures, load_classified
from archopt.lab.data.mnist import Images
from archopt.lab.errors import Interrupted, LabError
from archopt.lab.experiment import Experiment, WorkloadChoice, make_workload, open_experiment
from archopt.lab.models.bare import bare
from archopt.lab.models.preact_resnet import PreActBlock, PreActResNet, basic_shape, bottleneck_shape
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.trainers import trainer_of
from archopt.lab.workloads.classify import Classify, summed_squares
from lab.archives import make_cifar100, make_fashion_mnist, pixels
from lab.running import StopAt, bits, lines, run
from real_data import real_data, real_data_path


class Pictures:
    """What a workload needs of its pictures to build a network and to batch."""

    reads_ahead = False

    def __init__(self, classes: int) -> None:
        self.classes = classes


def built(**options: object) -> nn.Module:
    """The network of these options at full size, without weights."""
    workload = Classify(**options)
    workload.set = Pictures(KNOWN[workload.dataset].classes)
    with torch.device("meta"):
        return workload.build()


def held(options: dict[str, object], train: int = 20, test: int = 10) -> Classify:
    """A workload on random pictures of its set, as many as asked for."""
    workload = Classify(**options)
    known = KNOWN[workload.dataset]
    images = Images(
        pixels(train, *known.shape),
        (np.arange(train) % 10).astype(np.uint8),
        pixels(test, *known.shape, seed=1),
        (np.arange(test) % 10).astype(np.uint8),
    )
    workload.set = SmallPictures(known, images, None, None)
    workload.hold(
        *((torch.arange(len(t)), t) for t in (workload.set.train_targets, workload.set.test_targets))
    )
    return workload


def smoke(**options: object) -> Experiment:
    real_data("cifar10-half")
    return open_experiment(
        WorkloadChoice("classify", "smoke", options), real_data_path(), torch.device("cpu")
    )


# -- networks --------------------------------------------------------------------------------------

# Spec 4: parameters, L (tensors), BatchNorm layers where they are told.
COUNTS = [
    ({}, (1_313_280, 10, 0)),
    ({"dataset": "mnist"}, (727_552, 10, 0)),
    ({"dataset": "cifar100"}, (1_336_320, 10, 0)),
    ({"depth": 8}, (1_182_208, 8, 0)),
    ({"depth": 4}, (920_064, 4, 0)),
    ({"depth": 32}, (2_755_072, 32, 0)),
    ({"depth": 16, "width": 512}, (5_248_000, 16, 0)),
    ({"depth": 2, "width": 64}, (197_248, 2, 0)),
    ({"depth": 1, "width": 64}, (197_248, 2, 0)),
    ({"depth": 4, "width": 2048}, (14_700_544, 4, 0)),
    ({"depth": 32, "width": 2048}, (132_141_056, 32, 0)),
    ({"arch": "vgg11"}, (9_222_848, 9, None)),
    ({"arch": "vgg13"}, (9_407_168, 11, None)),
    ({"arch": "vgg"}, (14_715_584, 14, 13)),
    ({"arch": "vgg19"}, (20_024_000, 17, None)),
    ({"arch": "vgg16", "dataset": "cifar100"}, (14_761_664, 14, 13)),
    ({"arch": "resnet18"}, (11_164_352, 21, 16)),
    ({"arch": "resnet18", "dataset": "cifar100"}, (11_210_432, 21, 16)),
    ({"arch": "resnet34"}, (21_265_088, 37, None)),
    ({"arch": "resnet50"}, (23_467_712, 54, 48)),
    ({"arch": "resnet50", "dataset": "cifar100"}, (23_652_032, 54, 48)),
    ({"arch": "resnet50", "dataset": "imagenet"}, (25_502_912, 54, 53)),
]


@pytest.mark.parametrize(("options", "expected"), COUNTS, ids=[str(options) for options, _ in COUNTS])
def test_networks_have_the_published_counts(options: dict, expected: tuple) -> None:
    model = built(**options)
    tensors = list(model.parameters())
    parameters, matrices, norms = expected
    assert (sum(p.numel() for p in tensors), len(tensors)) == (parameters, matrices)
    assert all(p.ndim in (2, 4) for p in tensors)
    if norms is not None:
        assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms


@pytest.mark.parametrize(
    "options",
    [{}, {"arch": "vgg11"}, {"arch": "vgg"}, {"arch": "resnet18"}, {"arch": "resnet50"}],
    ids=str,
)
def test_networks_give_a_number_for_each_class(options: dict) -> None:
    model = held({**options, "channels": 4}).build()
    assert isinstance(model, nn.Module)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 10)


def test_the_fully_connected_network_is_matrices_with_root_two_relu_between() -> None:
    model = held({"depth": 3, "width": 5}).build()
    first, second, last = model.parameters()
    x = torch.randn(4, 3, 32, 32)
    h = math.sqrt(2) * F.relu(math.sqrt(2) * F.relu(x.flatten(1) @ first.T) @ second.T)
    torch.testing.assert_close(model(x), h @ last.T)


def normal(x: Tensor) -> Tensor:
    """relu(BatchNorm(x)) without gains and shifts, in training mode."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return F.relu((x - mean) / (var + 1e-5).sqrt())


def test_a_block_convolves_what_was_normalised_and_so_does_its_shortcut() -> None:
    x = torch.randn(4, 6, 8, 8)
    same = PreActBlock(basic_shape(6, 6, 1))
    one, two = (conv.weight for conv in same.convs)
    inner = F.conv2d(normal(x), one, padding=1)
    torch.testing.assert_close(same(x), F.conv2d(normal(inner), two, padding=1) + x)
    halved = PreActBlock(bottleneck_shape(6, 5, 2))
    one, two, three = (conv.weight for conv in halved.convs)
    shortcut = F.conv2d(normal(x), halved.shortcut.weight, stride=2)
    inner = F.conv2d(normal(F.conv2d(normal(x), one)), two, stride=2, padding=1)
    out = halved(x)
    assert out.shape == (4, 20, 4, 4)
    torch.testing.assert_close(out, F.conv2d(normal(inner), three) + shortcut)


def test_the_residual_network_has_nothing_between_its_last_block_and_the_mean() -> None:
    model = PreActResNet(18, width=4)
    x = torch.randn(2, 3, 32, 32)
    last = model.blocks(model.stem(x))
    assert last.shape == (2, 32, 4, 4)
    assert last.min() < 0  # no ReLU
    torch.testing.assert_close(model(x), last.mean((2, 3)) @ model.head.weight.T)


def test_a_bare_network_has_matrices_alone_in_torch_s_own_sizes() -> None:
    model = bare(nn.Sequential(nn.Conv2d(3, 200, 5), nn.BatchNorm2d(200), nn.Flatten(), nn.Linear(200, 9)))
    conv, linear = model[0].weight, model[3].weight
    assert [p.shape for p in model.parameters()] == [conv.shape, linear.shape]
    for weight, fan_in in ((conv, 75), (linear, 200)):
        assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 9)


def test_published_initial_weights_have_the_prescribed_singular_values() -> None:
    """Of every network's every tap; and outputs of size one at most, as the analysis has it."""
    for options in ({"depth": 4, "width": 32}, {"arch": "resnet18", "channels": 4}):
        model = init.orthogonal_(held(options).build())
        for p in model.parameters():
            taps = p.flatten(2).unbind(2) if p.ndim == 4 else [p]
            size = math.sqrt(p.shape[0] / p.shape[1] / len(taps))
            for tap in taps:
                values = torch.linalg.svdvals(tap.detach())
                torch.testing.assert_close(values, torch.full_like(values, size), rtol=1e-4, atol=0)


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_small_pictures_are_normalised_with_the_published_numbers(name: str) -> None:
    workload = held({"dataset": name})
    known, rows = KNOWN[name], torch.tensor([3, 0])
    shown = workload.set.testing(rows)
    raw = torch.from_numpy(pixels(10, *known.shape, seed=1))[rows] / 255
    for channel, (mean, std) in enumerate(zip(known.mean, known.std)):
        torch.testing.assert_close(shown[:, channel], (raw[:, channel] - mean) / std)


def test_training_pictures_of_cifar_are_changed_and_those_of_mnist_are_not() -> None:
    def trained(name: str) -> tuple[Tensor, Tensor]:
        workload = held({"dataset": name}, train=64)
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(64)
        plain = SmallPictures.testing
        workload.set._test = workload.set._train
        return workload.set.training(rows, generator), plain(workload.set, rows)

    changed, plain = trained("mnist")
    assert torch.equal(changed, plain)
    changed, plain = trained("cifar10")
    known = KNOWN["cifar10"]
    black = [-mean / std for mean, std in zip(known.mean, known.std)]
    corners = changed[:, :, 0, 0]
    assert (
        20 < (corners == torch.tensor(black)).all(1).sum() < 60
    )  # 1 - (5/9)^2 of them: the padding is black
    same = sum(torch.equal(a, b) for a, b in zip(changed, plain))
    assert same < 8  # one in 162


@pytest.mark.parametrize(
    ("name", "make", "classes"), [("cifar100", make_cifar100, 100), ("fashion-mnist", make_fashion_mnist, 10)]
)
def test_sets_that_are_not_at_hand_train_on_archives_in_their_format(
    name: str, make, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, monkeypatch, train=120, test=30)
    options = {"dataset": name, "train_images": 100, "test_images": None, "width": 16}
    opened = open_experiment(WorkloadChoice("classify", "smoke", options), tmp_path, torch.device("cpu"))
    workload = opened.workload
    assert workload.set.classes == classes
    assert workload.steps_per_epoch == 1
    assert workload.data_note == f"100 + 30 of {KNOWN[name].train:,} + 10,000 images"
    assert all(key.startswith(f"{name}/") for key in opened.data)
    images, targets = workload.batch(0, seed=0)
    assert images.shape == (100, *KNOWN[name].shape)
    assert sorted(targets.tolist()) == sorted(i % classes for i in range(100))
    result = run(tmp_path / "run", opened, "agd-paper", lr=None)
    assert result["status"] == "finished", result["error"]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """ImageNet's layout with three classes: grey pictures of 40 x 30, one shade a class."""
    for part, count in (("train", 4), ("val", 2)):
        for label, kind in enumerate(("n01", "n02", "n03")):
            folder = tmp_path / "imagenet" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 30), (80 * label,) * 3).save(folder / f"{number}.JPEG")
    return tmp_path


def test_imagenet_is_read_from_folders_with_as_many_outputs_as_classes(photographs: Path) -> None:
    options = {
        "dataset": "imagenet",
        "arch": "resnet50",
        "train_images": 9,
        "test_images": None,
        "train_bs": 4,
    }
    opened = open_experiment(WorkloadChoice("classify", "smoke", options), photographs, torch.device("cpu"))
    workload = opened.workload
    images, targets = workload.batch(0, seed=0)
    mean, std = (torch.tensor(values) for values in (KNOWN["imagenet"].mean, KNOWN["imagenet"].std))
    assert images.shape == (4, 3, 32, 32)
    expected = (80 * targets.unsqueeze(1) / 255 - mean) / std
    torch.testing.assert_close(images.mean((2, 3)), expected, atol=0.05, rtol=0)
    assert workload.train_targets.bincount().tolist() == [3, 3, 3]  # evenly from all
    assert workload.data_note == "9 + 6 of 1,281,167 + 50,000 images, 3 classes"
    model = workload.build()
    assert isinstance(model, nn.Module)
    assert model(images).shape == (4, 3)
    flat = make_workload(Classify, "smoke", {"dataset": "imagenet"})
    flat.load(DataFolder(photographs))
    assert next(flat.build().parameters()).shape == (256, 3 * 32 * 32)
    for part in ("train", "val"):
        for kind in ("n02", "n03"):
            for file in (photographs / "imagenet" / part / kind).iterdir():
                file.unlink()
            (photographs / "imagenet" / part / kind).rmdir()
    with pytest.raises(DataError, match="'n01' is the only class in train/ and val/; expected at least two"):
        load_classified("imagenet", DataFolder(photographs), size=32)


@pytest.mark.data
def test_mnist_at_hand_is_the_published_set() -> None:
    workload = Classify(dataset="mnist")
    workload.load(real_data("mnist"))
    assert workload.data_note == ""
    assert (workload.pass_steps, workload.steps_per_epoch, workload.steps) == (469, 469, 93_800)
    assert workload.build()(workload.batch(0, 0)[0]).shape == (128, 10)


def test_an_epoch_has_the_published_steps_whatever_the_data_at_hand() -> None:
    half = held({}, train=250, test=10)
    assert half.steps_per_epoch == half.eval_every == 391  # the last batch of 80
    assert half.steps == 78_200
    assert half.pass_steps == 2
    assert half.steps / half.steps_per_epoch == half.epochs  # in the record too
    assert held({"train_images": 250}, train=250).steps_per_epoch == 2
    assert held({"iterations": 7}).steps == 7
    assert held({"dataset": "imagenet"}).steps_per_epoch == 10_010


# -- losses and accuracies -------------------------------------------------------------------------


def test_the_square_loss_is_a_mean_over_batch_and_classes_without_a_half() -> None:
    workload = held({"depth": 2, "width": 4})
    model = workload.build()
    images, targets = workload.batch(0, 0)
    loss, told = workload.loss(model, (images, targets))
    outputs = model(images)
    wanted = math.sqrt(10) * torch.eye(10)[targets]
    torch.testing.assert_close(loss, (outputs - wanted).square().mean())
    assert told["accuracy"].item() == pytest.approx((outputs.argmax(1) == targets).float().mean().item())
    assert summed_squares(torch.zeros(4, 10), torch.arange(4)).item() == pytest.approx(4)  # 1 a row at 0


def test_cross_entropy_is_the_mean_of_logsumexp_minus_the_target_s_logit() -> None:
    workload = held({"depth": 2, "width": 4, "objective": "xent"})
    model = workload.build()
    images, targets = workload.batch(0, 0)
    outputs = model(images)
    expected = (outputs.logsumexp(1) - outputs.gather(1, targets.unsqueeze(1)).squeeze(1)).mean()
    torch.testing.assert_close(workload.loss(model, (images, targets))[0], expected)


@pytest.mark.parametrize("objective", ["mse", "xent"])
def test_the_test_set_is_scored_exactly_whatever_the_batches(objective: str) -> None:
    found = []
    for size in (3, 4, 1000):  # 10 rows: a last batch of one, of two, all at once
        workload = held({"depth": 2, "width": 4, "objective": objective, "test_bs": size})
        torch.manual_seed(0)
        model = workload.build().requires_grad_(False)
        found.append(workload.evaluate({"model": model}))
    outputs, targets = model(workload.set.testing(torch.arange(10))), workload.test_targets
    loss, told = workload.loss(model, (workload.set.testing(torch.arange(10)), targets))
    assert found[0] == pytest.approx(found[2])
    assert found[1] == pytest.approx({"test_loss": loss.item(), "test_accuracy": told["accuracy"].item()})
    assert (outputs.argmax(1) == targets).float().mean().item() == pytest.approx(found[1]["test_accuracy"])


def experiment(workload: Classify) -> Experiment:
    return Experiment(workload, "paper", None, {}, torch.device("cpu"))


def test_training_means_are_exact_over_an_epoch_with_a_short_last_batch(tmp_path: Path) -> None:
    """Frozen by a rate of 0: the means of 8 + 8 + 4 rows are those of all twenty at once."""
    options = {"dataset": "mnist", "depth": 2, "width": 8, "train_bs": 8, "epochs": 1, "train_images": 20}
    workload = held(options)
    run(tmp_path, experiment(workload), "sgd", lr=0.0)
    torch.manual_seed(0)
    told = lines(tmp_path)[-1]["train"]
    all_rows = held({**options, "train_bs": 20})
    run(tmp_path / "whole", experiment(all_rows), "sgd", lr=0.0)
    whole = lines(tmp_path / "whole")[-1]["train"]
    assert told == pytest.approx(whole)
    assert 0 < told["accuracy"] * 20 == pytest.approx(round(told["accuracy"] * 20))


# -- what a record holds ---------------------------------------------------------------------------


@pytest.mark.data
def test_the_step_size_and_the_relative_update_are_recorded_over_the_epoch(tmp_path: Path) -> None:
    opened = smoke(depth=3, width=16, train_bs=50, updates_every=1)
    run(tmp_path, opened, "agd-paper", lr=None)
    first, line, last = lines(tmp_path)
    assert "per_step" not in first
    eta, update = line["per_step"]["eta"], line["per_step"]["update"]
    assert (eta["steps"], update["steps"]) == (6, 6)
    assert eta["least"] < eta["mean"] < eta["greatest"]
    assert last["per_step"]["eta"]["least"] <= last["optimizer"]["eta"] <= last["per_step"]["eta"]["greatest"]
    assert list(update["layers"]) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    assert update["mean"] == pytest.approx(sum(update["layers"].values()) / 3)
    # Each layer moves by s eta / L where its norm is s sqrt(min(shape)), but for the drift of six steps.
    for name, rank in zip(update["layers"], (16, 16, 10)):
        assert update["layers"][name] == pytest.approx(eta["mean"] / 3 / math.sqrt(rank), rel=0.03)


@pytest.mark.data
def test_rules_without_a_step_size_have_their_relative_update_recorded_too(tmp_path: Path) -> None:
    opened = smoke(depth=2, width=8, train_bs=50, updates_every=4)
    run(tmp_path, opened, "adam", lr=0.001)
    told = lines(tmp_path)[1]["per_step"]
    assert set(told) == {"update"}
    assert told["update"]["steps"] == 2  # steps 0 and 4 of six
    assert lines(tmp_path)[2]["per_step"]["update"]["steps"] == 2  # of every epoch
    assert 0 < told["update"]["least"] <= told["update"]["mean"] <= told["update"]["greatest"]
    run(tmp_path / "none", smoke(depth=2, width=8, updates_every=0), "adam", lr=0.001)
    assert "per_step" not in lines(tmp_path / "none")[1]


@pytest.mark.data
@pytest.mark.parametrize("stop", [3, 8])
def test_a_run_resumes_to_the_bit_with_the_numbers_of_its_steps(tmp_path: Path, stop: int) -> None:
    opened = smoke(depth=3, width=16, train_bs=60, updates_every=2)
    run(tmp_path / "whole", opened, "agd-paper", lr=None)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", opened, "agd-paper", lr=None, watcher=StopAt(stop))
    run(tmp_path / "parts", opened, "agd-paper", lr=None)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.data
def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    often = run(tmp_path / "often", smoke(depth=3, width=16, updates_every=1), "agd-paper", lr=None)
    never = run(tmp_path / "never", smoke(depth=3, width=16, updates_every=0), "agd-paper", lr=None)
    assert often["weights_sha256"] == never["weights_sha256"]


@pytest.mark.parametrize(
    ("depth", "width", "loss", "eta", "after"),
    [(2, 256, 1.007, 0.123, 0.989), (10, 256, 0.998, 0.101, 0.986), (16, 512, 0.998, 0.127, 0.981)],
)
def test_the_first_step_is_the_published_one(
    depth: int, width: int, loss: float, eta: float, after: float
) -> None:
    """Spec 11, test 12: Gaussian inputs, random labels, 128 of them."""
    workload = held({"depth": depth, "width": width})
    model = workload.build()
    optimizer = trainer_of(workload, "model", parse_optimizer("agd-paper"), None).build(model)
    batch = torch.randn(128, 3072), torch.randint(10, (128,))
    assert model(batch[0]).square().mean().sqrt().item() == pytest.approx(math.sqrt(10 / 3072), rel=0.35)
    before, _ = workload.loss(model, batch)
    before.backward()
    optimizer.step()
    assert before.item() == pytest.approx(loss, abs=0.02)
    assert optimizer.eta.item() == pytest.approx(eta, rel=0.25)
    assert workload.loss(model, batch)[0].item() == pytest.approx(after, abs=0.02)
    assert workload.loss(model, batch)[0] < before


@pytest.mark.data
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "agd", "nero", "autonero"])
def test_every_network_trains_with_the_baselines(optimizer: str, tmp_path: Path) -> None:
    for arch in ("fcn", "vgg11", "resnet18"):
        opened = smoke(arch=arch, train_images=16, test_images=8, epochs=1)
        choice = parse_optimizer(optimizer)
        lr = choice.published_lr(opened.workload.published) or choice.default_lr
        assert run(tmp_path / arch, opened, optimizer, lr)["status"] == "finished"


# -- the command -----------------------------------------------------------------------------------


def test_the_default_is_the_published_program() -> None:
    usual = make_workload(Classify, Classify.default_preset, {})
    assert (usual.arch, usual.dataset, usual.objective) == ("fcn", "cifar10", "mse")
    assert (usual.depth, usual.width, usual.train_bs, usual.test_bs, usual.epochs) == (10, 256, 128, 128, 200)
    assert (usual.gain, Classify.default_optimizer) == (1.0, "agd-paper")
    adam, sgd = (parse_optimizer(name).published_lr(usual.published) for name in ("adam", "sgd"))
    assert (adam, sgd) == (1e-3, 0.1)


def test_gain_multiplies_the_update_of_agd_and_is_refused_by_others() -> None:
    workload = held({"gain": 10.0, "width": 8, "depth": 2})
    model = workload.build()
    assert (
        trainer_of(workload, "model", parse_optimizer("agd-paper"), None).build(model).defaults["gain"] == 10
    )
    own = trainer_of(workload, "model", parse_optimizer("agd-paper(gain=2.0)"), None).build(model)
    assert own.defaults["gain"] == 2
    with pytest.raises(LabError, match="adam has no option 'gain'"):
        trainer_of(workload, "model", parse_optimizer("adam"), 0.001).build(model)
    assert parse_optimizer("adam").published_lr(workload.published) == 1e-3


@pytest.mark.data
def test_the_program_runs_as_it_was_published_with_the_published_spelling(tmp_path: Path, capsys) -> None:
    path = str(real_data("cifar10-half").path)
    flags = ["--train-images", "256", "--test-images", "50", "--iterations", "2", "--loss", "xent"]
    command = ["train", "classify", "--data", path, "--out", str(tmp_path), "--threads", "1", "--depth", "3"]
    assert main([*command, *flags]) == DONE, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert "agd-paper seed 0" in said
    for word in ("train loss", "test loss", "train accuracy", "test accuracy", "eta 0.", "update 0."):
        assert word in said
    (config,) = (json.loads(path.read_text()) for path in tmp_path.rglob("config.json"))
    assert (config["preset"], config["optimizer"]["name"]) == ("paper", "agd-paper")
    assert (config["options"]["objective"], config["options"]["epochs"]) == ("xent", 200)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--arch", "vgg", "--dataset", "mnist"],
            "arch='vgg16' is for CIFAR; for dataset='mnist' take arch='fcn'",
        ),
        (["--arch", "resnet50", "--dataset", "fashion-mnist"], "arch='resnet50' is for CIFAR"),
        (["--arch", "resnet18", "--dataset", "imagenet"], "for dataset='imagenet' take resnet50 or fcn"),
        (["--arch", "resnet18", "--depth", "5"], "depth=5 is for arch='fcn' alone; resnet18 has its own"),
        (["--arch", "vgg11", "--width", "64"], "width=64 is for arch='fcn' alone"),
        (["--arch", "alexnet"], "--arch"),
        (["--dataset", "svhn"], "--dataset"),
        (["--loss", "mae"], "--loss"),
        (["--train-bs", "0"], "train_bs=0, expected a value above 0"),
        (["--epochs", "0"], "epochs=0, expected a value above 0"),
        (["--gain", "-1"], "gain=-1.0, expected a value above 0"),
        (["--gain", "10", "--optimizer", "adam"], "adam has no option 'gain'"),
        (["--gain", "10", "--optimizer", "muon"], "muon has no option 'gain'"),
        (["--optimizer", "agd-paper", "--lr", "0.1"], "agd-paper has no learning rate"),
        (["--optimizer", "adam", "--lr", "-1"], "adam: lr=-1.0, expected a number, 0 <= lr"),
        (["--optimizer", "adamm"], "no optimiser 'adamm'; did you mean 'adam'?"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--channels", "0", "--arch", "vgg"], "channels=0, expected a value above 0"),
        (["--test-bs", "-3"], "test_bs=-3, expected a value above 0"),
        (["--depth", "0"], "depth=0, expected a value above 0"),
        (["--updates-every", "-1"], "updates_every=-1, expected at least 0"),
        (["--iterations", "0"], "iterations=0, expected a value above 0"),
        (["--train-images", "70000"], "train_images=70000, but cifar10 has 50,000"),
        (["--batch-size", "64"], "archopt train classify has no option --batch-size"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_data_are_read(
    args: list[str], said: str, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Classify, "load", lambda *_: pytest.fail("data were read"))
    assert main(["train", "classify", *args, "--out", str(tmp_path / "x")]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert "Error parsing" not in error
    assert not (tmp_path / "x").exists()


def test_a_comparison_refuses_a_gain_before_data_are_read(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Classify, "load", lambda *_: pytest.fail("data were read"))
    command = [
        "compare",
        "classify(gain=10.0)",
        "--optimizers",
        "agd-paper,adam",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(command) == BAD_INPUT
    assert "adam has no option 'gain'" in capsys.readouterr().err


def test_labels_beyond_the_classes_of_a_set_are_refused() -> None:
    pictures = Images(
        pixels(4, 3, 32, 32), np.array([0, 1, 10, 2], np.uint8), pixels(1, 3, 32, 32), np.zeros(1)
    )
    with pytest.raises(DataError, match="a label of 10 in a set of 10 classes, expected 0 to 9"):
        SmallPictures(KNOWN["cifar10"], pictures, None, None)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashion-mnist", "imagenet"])
def test_missing_data_are_one_line_that_says_what_to_do(dataset: str, capsys, tmp_path: Path) -> None:
    command = [
        "train",
        "classify",
        "--dataset",
        dataset,
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(command) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    photographs = "put the pictures there as imagenet/train/CLASS/*.JPEG and"
    assert (photographs if dataset == "imagenet" else f"archopt data fetch {dataset} --data") in error
    assert "--folder" not in error  # which another workload has
    assert not (tmp_path / "x").exists()
