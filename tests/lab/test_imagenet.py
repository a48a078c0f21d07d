"""ResNet-50 on pictures in folders: reading them, crops, the published schedule, the network, the regulariser."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from archopt.lab.data import DataError, DataFolder, image_folder, load_image_folder
from archopt.lab.data.image_folder import decode
from archopt.lab.errors import Interrupted
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.deep_resnet import DeepResNet
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.pictures import central_boxes, random_boxes, resized_crops
from archopt.lab.workloads.imagenet_resnet50 import ImageNetResNet50, gain_penalty
from lab.running import StopAt, bits, lines, run
from real_data import real_data_path

SAMPLE = "imagenette-sample"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of small pictures: red ones and blue ones, 40 x 20; each brighter than the last."""
    for part, count in (("train", 3), ("val", 2)):
        for channel, kind in ((2, "blue"), (0, "red")):
            folder = tmp_path / "set" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                picture = np.zeros((20, 40, 3), np.uint8)
                picture[:, :, channel] = 100 + 50 * number
                Image.fromarray(picture).save(folder / f"{number}.png")
    return tmp_path


# -- files -----------------------------------------------------------------------------------------


def test_pictures_come_by_class_and_name_with_their_proportions(root: Path) -> None:
    data = DataFolder(root)
    found = load_image_folder(data, ["nothing", "set"], 8)
    assert found.classes == ("blue", "red")
    assert found.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    images, aspects = found.train.pictures.take(torch.tensor([4, 0]))
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images[:, :, 4, 4].tolist() == [[150, 0, 0], [0, 0, 100]]
    assert aspects.tolist() == [2.0, 2.0]
    assert set(data.checksums) == {"set/train", "set/val"}


def test_pictures_that_are_not_held_are_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_data, read_data = DataFolder(root), DataFolder(root)
    held = load_image_folder(held_data, ["set"], 8).train.pictures
    monkeypatch.setattr(image_folder, "HELD_BYTES", 0)
    read = load_image_folder(read_data, ["set"], 8).train.pictures
    assert isinstance(read, image_folder.ReadPictures)
    first, second, third = torch.tensor([5, 1]), torch.tensor([2, 2]), torch.tensor([0])
    for rows, following in ((first, second), (second, None), (third, first), (second, None)):
        for a, b in zip(read.take(rows, following), held.take(rows)):
            assert torch.equal(a, b)
    assert held_data.checksums != read_data.checksums  # of contents, of sizes


def test_a_changed_picture_changes_the_checksum(root: Path) -> None:
    before, after = DataFolder(root), DataFolder(root)
    load_image_folder(before, ["set"], 8)
    Image.new("RGB", (40, 20), "green").save(root / "set" / "val" / "red" / "0.png")
    load_image_folder(after, ["set"], 8)
    assert before.checksums["set/train"] == after.checksums["set/train"]
    assert before.checksums["set/val"] != after.checksums["set/val"]


def test_grey_and_large_pictures_are_read_as_colours(tmp_path: Path) -> None:
    Image.new("L", (1200, 600), 90).save(tmp_path / "a.jpg")
    pixels, aspect = decode(tmp_path / "a.jpg", 16)
    assert pixels.shape == (3, 16, 16)
    assert abs(pixels.astype(int) - 90).max() <= 2
    assert aspect == 2.0


def test_what_is_wrong_with_a_folder_is_one_line(root: Path, tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(DataError) as caught:
            load_image_folder(DataFolder(root), ["set"], 8)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = root / "set" / "train" / "red" / "1.png"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>", b""):
        file.write_bytes(content)
        assert f"{file} is damaged, or no picture" in refused()
    file.write_bytes(whole)
    (root / "set" / "val" / "green").mkdir()
    assert "class 'green' is in only one of train/ and val/" in refused()
    (root / "set" / "train" / "green").mkdir()
    assert "green has no pictures" in refused()
    with pytest.raises(DataError, match=r"imagenet or b is not in .*imagenet/train/CLASS.*--folder"):
        load_image_folder(DataFolder(root), ["imagenet", "b"], 8)
    with pytest.raises(DataError, match="no such folder"):
        load_image_folder(DataFolder(root / "nowhere"), ["imagenet"], 8)
    (root / "flat" / "train").mkdir(parents=True)
    (root / "flat" / "train" / "a.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="has no folder for each class"):
        load_image_folder(DataFolder(root), ["flat"], 8)
    with pytest.raises(DataError, match="--data DIR"):
        load_image_folder(DataFolder(None), ["imagenet"], 8)


# -- crops -----------------------------------------------------------------------------------------


def test_random_boxes_have_the_areas_ratios_and_places_of_the_published_crop() -> None:
    aspects = torch.tensor([1.5]).repeat(20_000)
    boxes = random_boxes(aspects, torch.Generator().manual_seed(0))
    left, top, width, height = boxes.unbind(1)
    assert boxes.min() >= 0
    assert (left + width).max() <= 1 + 1e-6
    assert (top + height).max() <= 1 + 1e-6
    area, ratio = width * height, width * 1.5 / height
    assert 0.08 - 1e-4 <= area.min() < 0.085
    assert area.max() > 0.85
    assert (ratio.min().item(), ratio.max().item()) == pytest.approx((0.75, 4 / 3), abs=1e-3)
    assert ratio.log().mean().abs() < 0.05
    assert (left / (1 - width)).mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_picture_too_long_for_any_try_gives_its_largest_allowed_middle() -> None:
    wide, high = random_boxes(torch.tensor([40.0, 1 / 40]), torch.Generator().manual_seed(0))
    part = (4 / 3) / 40
    assert wide.tolist() == pytest.approx([(1 - part) / 2, 0, part, 1])
    assert high.tolist() == pytest.approx([0, (1 - part) / 2, 1, part])


def test_the_central_box_is_the_middle_of_the_shorter_side() -> None:
    boxes = central_boxes(torch.tensor([1.0, 2.0, 0.5]), 224 / 256)
    assert boxes.tolist() == [
        pytest.approx([0.0625, 0.0625, 0.875, 0.875]),
        pytest.approx([0.28125, 0.0625, 0.4375, 0.875]),
        pytest.approx([0.0625, 0.28125, 0.875, 0.4375]),
    ]


def test_crops_show_what_is_in_their_boxes() -> None:
    images = torch.randint(256, (3, 3, 15, 15), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 15, 15], [0, 0, 15, 15], [7, 4, 8, 8]]) / 15
    found = resized_crops(images[:2], boxes[:2], 15, torch.tensor([False, True]))
    torch.testing.assert_close(found[0], images[0].float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[1], images[1].flip(2).float(), atol=1e-2, rtol=0)
    part = resized_crops(images[2:], boxes[2:], 8)
    torch.testing.assert_close(part[0], images[2, :, 4:12, 7:].float(), atol=1e-2, rtol=0)
    small = resized_crops(images[:1], boxes[:1], 5)  # a third of the pixels each way: means over 3 x 3
    expected = nn.functional.avg_pool2d(images[:1].float(), 3)
    torch.testing.assert_close(small, expected, atol=1e-2, rtol=0)


# -- the schedule ----------------------------------------------------------------------------------


def numbered(workload: ImageNetResNet50, count: int) -> ImageNetResNet50:
    """A workload that holds so many pictures, none of which is there."""
    workload.hold(*2 * ((torch.arange(count), torch.zeros(count, dtype=torch.long)),))
    return workload


def test_the_schedule_is_the_published_one_whatever_data_there_are() -> None:
    workload = numbered(ImageNetResNet50(), 1000)
    assert workload.steps_per_epoch == workload.eval_every == 3203
    assert workload.steps == 288_270
    # Spec 5, at the rate 0.1.
    expected = {
        0: 0.0,
        1: 3.122073e-5,
        3202: 0.09996877927,
        3203: 0.09996876026,
        288_270 // 2: 0.04999960933,
        216_202: 0.01464473917,
        288_269: 2.969185e-12,
    }
    for step, rate in expected.items():
        assert 0.1 * workload.schedule(step) == pytest.approx(rate, rel=1e-6)


def test_published_settings_and_batches() -> None:
    workload = numbered(ImageNetResNet50(), 1000)
    assert (workload.batch_size, workload.epochs, workload.replicas, workload.gain_decay) == (400, 90, 4, 0)
    with_decay = parse_optimizer("sgd").resolved(workload.settings)
    assert (with_decay["momentum"], with_decay["weight_decay"]) == (0.9, 1e-4)
    without = parse_optimizer("sgd(weight_decay=0)").resolved(workload.settings)
    assert (without["momentum"], without["weight_decay"]) == (0.9, 0)
    assert parse_optimizer("nero").published_lr(workload.settings) == 0.01


# -- the network and its loss ----------------------------------------------------------------------


def test_resnet_50_has_the_published_size_and_shapes() -> None:
    with torch.device("meta"):
        model = DeepResNet(50, classes=1000, large_pictures=True)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert len(list(model.parameters())) == 161
    narrow = DeepResNet(50, width=4, classes=7, large_pictures=True)
    pictures = torch.randn(2, 3, 64, 64)
    assert [type(layer) for layer in narrow.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert narrow.stem(pictures).shape == (2, 4, 16, 16)
    assert narrow.blocks(narrow.stem(pictures)).shape == (2, 128, 2, 2)
    assert narrow(pictures).shape == (2, 7)


def test_batchnorm_sees_the_parts_of_a_batch_one_by_one() -> None:
    workload = numbered(ImageNetResNet50(width=4, depth=10, replicas=2), 10)
    torch.manual_seed(0)
    model = DeepResNet(10, 4, 10, large_pictures=True)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss, told = workload.loss(model, (images, targets))
    parts = [
        nn.functional.cross_entropy(model(images[part]), targets[part]) for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(loss, torch.stack(parts).mean())
    workload.replicas = 1
    assert not torch.allclose(workload.loss(model, (images, targets))[0], loss)
    assert 0 <= told["top1"] <= told["top5"] <= 1


def test_the_decay_of_gains_is_half_lambda_times_the_squares() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    assert gain_penalty(model, 0.1) == 0
    with torch.no_grad():
        model[0].weight.copy_(Tensor([1.5, 1]))
        model[2].bias.copy_(Tensor([0, 2, -1]))
        model[1].weight.fill_(7)  # no BatchNorm's
    penalty = gain_penalty(model, 0.1)
    assert penalty.item() == pytest.approx(0.05 * (0.25 + 4 + 1))
    penalty.backward()
    assert model[0].weight.grad.tolist() == pytest.approx([0.05, 0])
    assert model[2].bias.grad.tolist() == pytest.approx([0, 0.2, -0.1])
    assert model[1].weight.grad is None


# -- runs ------------------------------------------------------------------------------------------


def sample(**options: object) -> Experiment:
    """The smoke preset on the sample of real pictures."""
    if not (real_data_path() / SAMPLE).is_dir():
        pytest.skip(f"{SAMPLE} is not in {real_data_path()} (set ARCHOPT_DATA)")
    choice = WorkloadChoice("imagenet-resnet50", "smoke", {"epochs": 1, **options})
    return open_experiment(choice, real_data_path(), torch.device("cpu"))


@pytest.mark.data
def test_the_sample_is_read_and_named_and_trains(tmp_path: Path) -> None:
    experiment = sample(gain_decay=0.001)
    workload = experiment.workload
    assert isinstance(workload, ImageNetResNet50)
    assert len(workload.set.train.targets) == 1000
    assert torch.bincount(workload.set.val.targets).tolist() == [50] * 10
    assert torch.bincount(workload.train_targets).tolist() == [10] * 10
    assert workload.data_note == "100 + 100 images of 10 classes"
    before = torch.get_rng_state()
    images, targets = workload.batch(2, seed=1)
    again, same = workload.batch(2, seed=1)
    assert torch.equal(images, again)
    assert torch.equal(targets, same)
    assert torch.equal(before, torch.get_rng_state())
    assert images.shape == (20, 3, 32, 32)
    assert images.std().item() == pytest.approx(1, abs=0.3)
    result = run(tmp_path, experiment, "nero", lr=0.01)
    assert result["status"] == "finished", result["error"]
    assert {"val_loss", "val_top1", "val_top5", "train_top1", "train_top5"} <= set(result["final"])
    assert lines(tmp_path)[-1]["train"]["loss"] < 4


@pytest.mark.data
def test_a_run_resumes_to_the_bit_also_where_pictures_are_read_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", sample(), "sgd", lr=0.1)
    monkeypatch.setattr(image_folder, "HELD_BYTES", 0)
    read = sample()
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", read, "sgd", lr=0.1, watcher=StopAt(3))
    run(tmp_path / "parts", read, "sgd", lr=0.1)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 51}, "depth=51, expected one of 10, 18, 34, 50"),
        ({"gain_decay": -1.0}, "gain_decay=-1.0, expected at least 0"),
        ({"images": 0}, "images=0, expected a value above 0"),
        ({"replicas": 0}, "replicas=0, expected a value above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageNetResNet50(**options)
