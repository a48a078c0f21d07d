"""CIFAR-10: readers of both forms, and the small ResNet on it."""

import io
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from archopt.lab.data import DataError, DataFolder, fetch, import_folder, load_cifar10, load_cifar100, sets
from archopt.lab.data import cifar10 as loader
from archopt.lab.data.cifar10_files import read_batch, read_fine_batch, read_labels, read_sheet
from archopt.lab.data.folder import md5, sha256
from archopt.lab.errors import Interrupted
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.resnet import ResNet
from archopt.lab.pictures import CIFAR10_MEAN, cropped_and_mirrored, normalized
from archopt.lab.workloads.cifar10_resnet_small import STD, CIFAR10ResNetSmall
from lab.archives import make_cifar100, pixels, python2_pickle
from lab.running import StopAt, bits, lines, run
from real_data import real_data, real_data_path

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3072)).astype(np.uint8)
LABELS = [3, 1, 4, 1, 5, 9]


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    return python2_pickle({"data": pixels, "labels": labels, "batch_label": "a test's"})


def webp(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", lossless=True, exact=True)
    return stream.getvalue()


# -- the files -------------------------------------------------------------------------------------


def test_a_batch_is_read_as_python_2_and_as_python_3_wrote_it() -> None:
    for content in (
        python2_batch(PIXELS, LABELS),
        pickle.dumps({b"data": PIXELS, b"labels": LABELS}, protocol=4),
    ):
        batch = read_batch(content)
        assert batch.dtype == np.uint8
        assert batch[:, 0].tolist() == LABELS
        np.testing.assert_array_equal(batch[:, 1:], PIXELS)


def test_batches_that_were_made_from_the_half_set_are_told_from_the_originals(tmp_path: Path) -> None:
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (place / name).write_bytes(pickle.dumps({b"data": PIXELS, b"labels": LABELS}, protocol=4))
    with pytest.raises(DataError, match=r"(?s)data_batch_1 is the wrong file.*read_cifar10.py.*sheets"):
        load_cifar10(DataFolder(tmp_path))
    first = place / "data_batch_1"
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"data_batch_1 is no batch.* gets it again$"):
        load_cifar10(DataFolder(tmp_path))


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import sys; sys.trapped = True",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": PIXELS, b"labels": LABELS, b"x": Trap()}), "asks for builtins.exec"),
        (pickle.dumps({b"data": PIXELS, b"labels": LABELS[:5]}), r"\(6, 3072\), its labels 5"),
        (pickle.dumps({b"data": PIXELS.astype(float), b"labels": LABELS}), "pixels are float64"),
        (pickle.dumps({b"data": PIXELS, b"labels": LABELS})[:-9], "f is no batch of CIFAR-10"),
        (pickle.dumps([1, 2]), "f is no batch of CIFAR-10"),
        (b"<html>", "f is no batch of CIFAR-10"),
        (b"", "f is no batch of CIFAR-10"),
    ],
)
def test_what_is_no_batch_is_refused_and_never_run(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_batch(content, "f")
    assert not hasattr(sys, "trapped")


def test_cifar_100_gives_the_class_of_a_picture_and_not_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar100(tmp_path, monkeypatch, train=120, test=30)
    folder = DataFolder(tmp_path)
    images = load_cifar100(folder)
    assert images.train_images.shape == (120, 3, 32, 32)
    np.testing.assert_array_equal(images.test_images.reshape(30, -1), pixels(30, 3072, seed=30))
    assert images.train_labels.tolist() == [i % 100 for i in range(120)]
    assert set(folder.checksums) == {"cifar100/train", "cifar100/test"}
    with pytest.raises(DataError, match="f is no batch of CIFAR-100: b'fine_labels'"):
        read_fine_batch(python2_batch(PIXELS, LABELS), "f")
    file = tmp_path / "cifar-100-python" / "test"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"test is no batch of CIFAR-100.*archopt data fetch cifar100"):
        load_cifar100(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"cifar100: test is not in .*archopt data fetch cifar100"):
        load_cifar100(folder)


def test_a_sheet_is_images_one_below_the_other() -> None:
    images = PIXELS.reshape(6, 3, 32, 32)
    sheet = images.transpose(0, 2, 3, 1).reshape(6 * 32, 32, 3)
    np.testing.assert_array_equal(read_sheet(webp(sheet)), images)
    with pytest.raises(DataError, match="f is 32 x 33 pixels"):
        read_sheet(webp(sheet[:33]), "f")
    with pytest.raises(DataError, match="f is damaged, or no picture"):
        read_sheet(webp(sheet)[:3000], "f")
    with pytest.raises(DataError, match="f is damaged, or no picture"):
        read_sheet(b"no picture", "f")


def test_a_sheet_without_pillow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"f needs Pillow to be read: pip install 'archopt\[lab\]'"):
        read_sheet(b"", "f")


def test_an_index_without_labels_is_refused() -> None:
    stream = io.BytesIO()
    np.savez(stream, train_label=np.array([1, 2], np.uint8), test_label=np.array([3], np.uint8))
    assert read_labels(stream.getvalue()).tolist() == [1, 2, 3]
    for content in (b"no zip", stream.getvalue()[:-30]):
        with pytest.raises(DataError, match="f is damaged, or no index"):
            read_labels(content, "f")


@pytest.fixture
def small_original(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """CIFAR-10's original files with six images each instead of 10,000; the files' contents by name."""
    contents = {
        file.name: python2_batch(PIXELS + np.uint8(k), LABELS) for k, file in enumerate(sets.CIFAR10.files)
    }
    files = tuple(
        replace(file, checksum=md5(contents[file.name]), shape=(6, 3073)) for file in sets.CIFAR10.files
    )
    tiny = replace(sets.CIFAR10, files=files)
    monkeypatch.setitem(sets.SETS, "cifar10", tiny)
    monkeypatch.setattr(loader, "CIFAR10", tiny)
    monkeypatch.setattr(loader, "BATCH", 6)
    return contents


def test_the_original_is_fetched_from_its_archive_and_read_in_order(
    small_original: dict[str, bytes], tmp_path: Path
) -> None:
    def archive(members: dict[str, bytes]) -> str:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            for name, content in members.items():
                entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return tmp_path.as_uri()

    folder = DataFolder(tmp_path / "data")
    without = {name: content for name, content in small_original.items() if name != "test_batch"}
    with pytest.raises(DataError, match="what it sent has no test_batch"):
        fetch("cifar10", folder, mirrors=[archive(without)])
    other = {**small_original, "data_batch_3": small_original["data_batch_2"]}
    with pytest.raises(DataError, match="data_batch_3 in what it sent is damaged"):
        fetch("cifar10", folder, mirrors=[archive(other)])
    assert not (tmp_path / "data").exists()
    files = fetch("cifar10", folder, mirrors=[archive(small_original)])
    assert [file.name for file in files] == list(small_original)
    assert fetch("cifar10", folder, mirrors=[]) == files  # all there: no mirror is asked
    cifar = load_cifar10(folder, train=15, test=2)
    assert (cifar.train_images.shape, cifar.test_images.shape) == ((15, 3, 32, 32), (2, 3, 32, 32))
    np.testing.assert_array_equal(cifar.train_images[13].ravel(), PIXELS[1] + np.uint8(2))
    np.testing.assert_array_equal(cifar.test_images[1].ravel(), PIXELS[1] + np.uint8(5))
    assert cifar.train_labels.tolist() == (LABELS * 3)[:15]
    names = [f"cifar10/{name}" for name in ("data_batch_1", "data_batch_2", "data_batch_3", "test_batch")]
    assert sorted(folder.checksums) == names
    with pytest.raises(DataError, match="31 images to train on, expected 1 to the 30 that are there"):
        load_cifar10(folder, train=31)


def test_the_downloaded_archive_is_imported(small_original: dict[str, bytes], tmp_path: Path) -> None:
    (source := tmp_path / "downloads").mkdir()
    archive = source / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in small_original.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    folder = DataFolder(tmp_path / "data")
    copies = import_folder(source, folder)  # finds out what it is
    assert [copy.name for copy in copies] == list(small_original)
    assert load_cifar10(folder, train=15, test=2).train_labels.tolist() == (LABELS * 3)[:15]

    other = DataFolder(tmp_path / "other")
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz is truncated, damaged or no tar archive"):
        import_folder(source, other, ["cifar10"])
    assert not (tmp_path / "other").exists()


def test_a_folder_without_cifar10_is_one_line_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"cifar10: data_batch_1 is not in .*`archopt data fetch cifar10"
    ) as caught:
        load_cifar10(DataFolder(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no public address; `archopt data import FOLDER cifar10-half"):
        fetch("cifar10-half", DataFolder(tmp_path))


@pytest.mark.data
def test_the_half_set_has_the_published_pixels() -> None:
    folder = real_data("cifar10-half")
    cifar = loader._half(folder, 25_000, 5_000)
    # Of the (n, 3, 32, 32) pixels, as the set's own description states them.
    train = "sha256:6b755bc43d53d3897063e06c1eda710d66b4f486da76ce9789277c509c11a455"
    test = "sha256:53c1837785eaf466db40372abd8d96eebd4e0650bb7871558fe9284556438d73"
    assert sha256(np.ascontiguousarray(cifar.train_images).tobytes()) == train
    assert sha256(np.ascontiguousarray(cifar.test_images).tobytes()) == test
    assert cifar.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert np.bincount(cifar.train_labels).tolist() == [2500] * 10
    assert np.bincount(cifar.test_labels).tolist() == [500] * 10
    assert len(folder.checksums) == 61


@pytest.mark.data
def test_only_the_sheets_that_are_needed_are_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    source = real_data("cifar10-half").path
    assert source is not None
    copies = import_folder(source, DataFolder(tmp_path), ["cifar10-half"])
    assert len(copies) == 61
    damaged = tmp_path / "cifar10" / "train_01.webp"
    damaged.write_bytes((tmp_path / "cifar10" / "train_02.webp").read_bytes())
    folder = DataFolder(tmp_path)
    assert len(load_cifar10(folder, 500, 20).train_images) == 500
    assert sorted(folder.checksums) == [
        f"cifar10-half/{n}" for n in ("index.npz", "test_00.webp", "train_00.webp")
    ]
    with pytest.raises(
        DataError, match=r"train_01\.webp is damaged.*`archopt data import FOLDER cifar10-half"
    ):
        load_cifar10(DataFolder(tmp_path), 501, 20)


# -- the network and its pictures ------------------------------------------------------------------


def test_the_network_has_the_documented_depth_and_shapes() -> None:
    torch.manual_seed(0)
    small, deep = ResNet(1), ResNet(3)
    assert sum(p.numel() for p in small.parameters()) == 78_042
    for model, depth in ((small, 8), (deep, 20)):
        weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert sum(not (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)) for m in weights) == depth
    x = torch.randn(2, 3, 32, 32)
    assert small.blocks(small.stem(x)).shape == (2, 64, 8, 8)
    assert small(x).shape == (2, 10)
    block = small.blocks[1]
    h = F.relu(block.norm1(F.conv2d(y := torch.randn(2, 16, 8, 8), block.conv1.weight, stride=2, padding=1)))
    h = block.norm2(F.conv2d(h, block.conv2.weight, padding=1)) + block.shortcut(y)
    torch.testing.assert_close(block(y), F.relu(h))


def test_every_crop_is_a_shifted_part_of_its_picture_mirrored_or_not() -> None:
    images = torch.randint(1, 256, (200, 3, 32, 32), dtype=torch.uint8)
    changed = cropped_and_mirrored(images, torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8
    padded = F.pad(images, (4, 4, 4, 4))
    seen = set()
    for picture, result in zip(padded, changed):
        found = [
            (down, right, mirror)
            for down in range(9)
            for right in range(9)
            for mirror in (False, True)
            if torch.equal(
                result.flip(2) if mirror else result, picture[:, down : down + 32, right : right + 32]
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
    assert {mirror for _, _, mirror in seen} == {False, True}


def smoke(**options: object) -> Experiment:
    """The smoke preset with its data."""
    real_data("cifar10-half")
    choice = WorkloadChoice("cifar10-resnet-small", "smoke", options)
    return open_experiment(choice, real_data_path(), torch.device("cpu"))


@pytest.mark.data
def test_pictures_are_normalised_and_augmented_by_seed_and_step_alone() -> None:
    workload = CIFAR10ResNetSmall(train_images=500, test_images=500)
    workload.load(real_data("cifar10-half"))
    assert workload.test_inputs.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert workload.test_inputs.std(dim=(0, 2, 3)).sub(1).abs().max() < 0.1
    before = torch.get_rng_state()
    images, targets = workload.batch(3, seed=1)
    again, same = workload.batch(3, seed=1)
    assert images.shape == (64, 3, 32, 32)
    assert torch.equal(images, again)
    assert torch.equal(targets, same)
    assert not torch.equal(images, workload.batch(11, seed=1)[0])
    assert torch.equal(before, torch.get_rng_state())
    workload.augment = False
    plain, targets = workload.batch(3, seed=1)
    assert torch.equal(targets, same)
    assert not torch.equal(plain, images)
    known = normalized(workload.train_inputs, CIFAR10_MEAN, STD)
    assert all((known == picture).flatten(1).all(1).any() for picture in plain)


@pytest.mark.data
@pytest.mark.parametrize("optimizer", ["adamw", "nero"])
def test_the_smoke_preset_runs_within_seconds(optimizer: str, tmp_path: Path) -> None:
    result = run(tmp_path, smoke(), optimizer, lr=0.003)
    told = lines(tmp_path)
    assert result["status"] == "finished", result["error"]
    assert [line["step"] for line in told] == [0, 4, 8]
    assert told[-1]["train"]["loss"] < 2.4


@pytest.mark.data
def test_a_run_with_augmentation_resumes_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", smoke(), "adamw")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", smoke(), "adamw", watcher=StopAt(5))
    run(tmp_path / "parts", smoke(), "adamw")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks=0, expected a value above 0"),
        ({"lr_schedule": "steps"}, "lr_schedule='steps', expected 'linear' or 'constant'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR10ResNetSmall(**options)
