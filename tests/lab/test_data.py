"""The laboratory's data: reading, checking, recording checksums, and clear errors."""

import gzip
import hashlib
import importlib.resources
from pathlib import Path

import numpy as np
import pytest

from archopt.lab.data import (
    DataError,
    DataFolder,
    default_data_folder,
    list_sets,
    load_digits,
    load_fashion_mnist,
    load_mnist,
    read_idx,
)
from archopt.lab.data import digits as digits_module
from archopt.lab.data.sets import SETS, DataFile, DataSet, data_set
from lab.archives import idx, make_fashion_mnist, pixels
from real_data import real_data

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def tiny_set() -> DataSet:
    """A set of one file of 24 bytes, with MNIST's rules."""
    checksum = f"md5:{hashlib.md5(idx(ARRAY)).hexdigest()}"
    return DataSet(
        "tiny",
        "a test's own",
        "none",
        ("tiny", "TINY/raw", "."),
        (DataFile("some-idx3", checksum, (2, 3, 4)),),
        ("https://example.org/",),
    )


@pytest.mark.parametrize(
    ("dtype", "kind"), [("u1", 0x08), ("i1", 0x09), ("i2", 0x0B), ("i4", 0x0C), ("f4", 0x0D), ("f8", 0x0E)]
)
def test_idx_reads_every_type_of_the_format(dtype: str, kind: int) -> None:
    array = np.arange(6, dtype=dtype).reshape(3, 2)
    np.testing.assert_array_equal(read_idx(idx(array, kind)), array)


def test_idx_reads_packed_and_unpacked_alike() -> None:
    np.testing.assert_array_equal(read_idx(gzip.compress(idx(ARRAY))), read_idx(idx(ARRAY)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "f is truncated: 0 bytes"),
        (b"\0\0\x08\x03\0\0", "header alone takes 16"),
        (b"<html>not found</html>", "no idx file: it begins with 3c68746d"),
        (b"\0\0\x07\x01\0\0\0\0", "no idx file"),
        (idx(ARRAY)[:-1], r"is truncated: 39 bytes unpacked, but shape \(2, 3, 4\) takes 40"),
        (idx(ARRAY) + b"x", "is damaged: 41 bytes unpacked"),
        (gzip.compress(idx(ARRAY), mtime=0)[:-9], "is truncated: its gzip stream ends"),
        (b"\x1f\x8b\x08" + bytes(40), "is damaged"),
    ],
)
def test_idx_that_is_no_whole_file_is_refused_with_the_reason(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(content, "f")


def test_idx_with_a_flipped_bit_under_gzip_is_refused() -> None:
    packed = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 255, 1000).astype(np.uint8))))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(DataError, match=r"damaged|truncated"):
        read_idx(bytes(packed))


@pytest.mark.parametrize("place", ["tiny", "TINY/raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_a_set_is_found_in_every_usual_layout(tmp_path: Path, place: str, packed: bool) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    name, content = ("some-idx3.gz", gzip.compress(idx(ARRAY))) if packed else ("some-idx3", idx(ARRAY))
    (tmp_path / place / name).write_bytes(content)
    known, folder = tiny_set(), DataFolder(tmp_path)
    np.testing.assert_array_equal(known.read(folder, known.files[0]), ARRAY)
    assert folder.checksums == {"tiny/some-idx3": known.files[0].checksum}


def test_what_is_wrong_with_a_file_is_said_with_the_command_that_mends_it(tmp_path: Path) -> None:
    known, folder = tiny_set(), DataFolder(tmp_path / "with space")
    file, place = known.files[0], tmp_path / "with space" / "tiny" / "some-idx3"

    def message() -> str:
        with pytest.raises(DataError) as caught:
            known.read(folder, file)
        assert folder.checksums == {}
        text = str(caught.value)
        assert f"`archopt data fetch tiny --data '{folder.path}'`" in text
        assert "\n" not in text
        return text

    assert "(no such folder)" in message()
    place.parent.mkdir(parents=True)
    assert "some-idx3.gz is not in" in message()
    place.write_bytes(idx(ARRAY)[:20])
    assert f"{place} is truncated" in message()
    place.write_bytes(idx(ARRAY.reshape(4, 6)))
    assert "is the wrong file: its array has shape (4, 6), some-idx3 has (2, 3, 4)" in message()
    place.write_bytes(idx(ARRAY[::-1]))
    assert "is damaged, or from another set with the same file names" in message()
    place.unlink()
    place.mkdir()
    assert "is not in" in message()


def test_no_folder_at_all_is_said_too() -> None:
    known = tiny_set()
    with pytest.raises(DataError, match=r"no.*is given; `archopt data fetch tiny`"):
        known.read(DataFolder(None), known.files[0])


def test_explicit_folder_then_environment_then_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCHOPT_DATA", "/from/environment")
    monkeypatch.setenv("XDG_CACHE_HOME", "/from/cache")
    assert default_data_folder(tmp_path).path == tmp_path
    assert default_data_folder().path == Path("/from/environment")
    monkeypatch.setenv("ARCHOPT_DATA", "")  # as `make` exports it where there is no folder
    assert default_data_folder().path == Path("/from/cache/archopt/data")
    monkeypatch.delenv("ARCHOPT_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_data_folder().path == Path("~/.cache/archopt/data").expanduser()


def test_own_files_are_read_and_their_checksum_recorded(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(b"1,2\n")
    expected = f"sha256:{hashlib.sha256(b'1,2' + bytes([10])).hexdigest()}"
    folder = DataFolder(tmp_path)
    assert folder.read("mine.csv") == b"1,2\n"
    assert folder.checksums == {"mine.csv": expected}
    elsewhere = DataFolder(None)
    assert elsewhere.read(tmp_path / "mine.csv") == b"1,2\n"
    assert elsewhere.checksums == {"mine.csv": expected}
    with pytest.raises(DataError, match=r"cannot read .*other\.csv: No such file.*--data"):
        folder.read("other.csv")
    with pytest.raises(DataError, match="none is given; name one with --data"):
        elsewhere.read("mine.csv")


def test_list_says_where_a_set_is_and_what_is_missing(tmp_path: Path) -> None:
    digits, mnist, *_ = list_sets(DataFolder(tmp_path))
    assert (digits.name, digits.where, digits.command) == ("digits", "in the package", None)
    assert mnist.where is None
    assert len(mnist.missing) == 4
    assert mnist.command == f"archopt data fetch mnist --data {tmp_path}"
    for file in SETS["mnist"].files:
        (tmp_path / file.name).touch()
    assert list_sets(DataFolder(tmp_path))[1].where == str(tmp_path)
    assert list_sets(DataFolder(None))[1].command == "archopt data fetch mnist"


def test_list_says_where_photographs_in_folders_are(tmp_path: Path) -> None:
    absent = list_sets(DataFolder(tmp_path))[-1]
    assert (absent.name, absent.where) == ("imagenet", None)
    assert absent.command is not None
    assert "imagenet/train/CLASS/*.JPEG" in absent.command
    (tmp_path / "imagenette-sample").mkdir()
    assert list_sets(DataFolder(tmp_path))[-1].where == str(tmp_path / "imagenette-sample")
    (tmp_path / "imagenet").mkdir()
    assert list_sets(DataFolder(tmp_path))[-1].where == str(tmp_path / "imagenet")


def test_an_unknown_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        DataError,
        match=r"no data set 'minst'; did you mean 'mnist'\? \(known: digits, mnist, tinyshakespeare",
    ):
        data_set("minst")


def test_digits_are_the_published_ones_and_split_as_documented() -> None:
    folder = DataFolder(None)
    digits = load_digits(folder)
    assert digits.train_images.shape == (1400, 8, 8)
    assert digits.test_images.shape == (397, 8, 8)
    assert folder.checksums == {"digits": digits_module.CHECKSUM}
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first digit of scikit-learn's copy, a zero.
    order = np.random.RandomState(0).permutation(1797)
    assert labels[np.flatnonzero(order == 0)].tolist() == [0]
    assert images[np.flatnonzero(order == 0)[0], 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert np.bincount(digits.test_labels).tolist() == [34, 39, 44, 37, 46, 33, 41, 47, 31, 45]


def test_digits_with_a_changed_byte_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = importlib.resources.files("archopt.lab.data").joinpath("digits.csv.gz").read_bytes()
    content = bytearray(gzip.decompress(packed))
    content[0] = ord("1")
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress(bytes(content)))
    monkeypatch.setattr(digits_module.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"packaged digits\.csv\.gz is damaged"):
        load_digits(DataFolder(None))


def test_the_attribution_of_the_digits_ships_beside_them() -> None:
    text = importlib.resources.files("archopt.lab.data").joinpath("digits.txt").read_text()
    assert "E. Alpaydin and C. Kaynak" in text
    assert "CC BY 4.0" in text
    assert digits_module.CHECKSUM.removeprefix("sha256:") in text


@pytest.mark.data
def test_mnist_is_complete_and_its_checksums_are_recorded() -> None:
    folder = real_data("mnist")
    mnist = load_mnist(folder)
    assert mnist.train_images.shape == (60000, 28, 28)
    assert mnist.test_images.shape == (10000, 28, 28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train_labels).tolist() == counts
    assert folder.checksums["mnist/train-images-idx3-ubyte"] == "md5:6bbc9ace898e44ae57da46a324031adb"
    assert len(folder.checksums) == 4


@pytest.mark.data
def test_mnist_files_under_each_others_names_are_refused(tmp_path: Path) -> None:
    known = SETS["mnist"]
    source = real_data("mnist")
    assert source.path is not None
    for file, other in zip(known.files, known.files[1:] + known.files[:1]):
        found = known.find(source.path, other)
        assert found is not None
        (tmp_path / f"{file.name}.gz").symlink_to(found)
    for file in known.files:
        with pytest.raises(DataError, match="is the wrong file"):
            known.read(DataFolder(tmp_path), file)


def test_fashion_mnist_is_read_as_mnist_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fashion_mnist(tmp_path, monkeypatch)
    folder = DataFolder(tmp_path)
    fashion = load_fashion_mnist(folder)
    np.testing.assert_array_equal(fashion.train_images, pixels(20, 28, 28, seed=20))
    assert fashion.test_labels.tolist() == list(range(10))
    assert len(folder.checksums) == 4
    assert SETS["mnist"].find(tmp_path, SETS["mnist"].files[0]) is None  # one is not taken for the other
    file = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"is truncated.*archopt data fetch fashion-mnist"):
        load_fashion_mnist(folder)
