"""Getting data sets: from a server on this machine, from files, from a folder; failing without a trace."""

import errno
import functools
import gzip
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from archopt.lab.data import DataError, DataFolder, fetch, import_folder, load_mnist, sets
from archopt.lab.data.folder import md5
from archopt.lab.data.sets import DataFile, DataSet
from real_data import real_data

CONTENT = {
    "a-idx1": b"\0\0\x08\x01" + (1000).to_bytes(4, "big") + bytes(range(250)) * 4,
    "b-idx1": b"\0\0\x08\x01" + (3).to_bytes(4, "big") + b"abc",
}
FILES = tuple(DataFile(name, md5(content), (len(content) - 8,)) for name, content in CONTENT.items())


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A small set, `tiny`, among the known ones; it has no mirrors."""
    tiny = DataSet("tiny", "a test's own", "none", ("tiny", "TINY/raw", "."), FILES)
    monkeypatch.setitem(sets.SETS, "tiny", tiny)
    return tiny


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A folder with the files of `tiny`, packed."""
    folder = tmp_path / "origin"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class Broken(BaseHTTPRequestHandler):
    """Promises 1,000 bytes and sends 10."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"\x1f\x8b" + bytes(8))

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(handler: object) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(origin: Path) -> Iterator[str]:
    yield from serve(functools.partial(Quiet, directory=str(origin)))


@pytest.fixture
def broken() -> Iterator[str]:
    yield from serve(Broken)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read(known: DataSet, folder: DataFolder) -> None:
    for file in known.files:
        np.testing.assert_array_equal(known.read(folder, file), list(CONTENT[file.name][8:]))


def test_fetch_gets_checks_and_reports_progress(known: DataSet, server: str, tmp_path: Path) -> None:
    folder, reports = DataFolder(tmp_path / "new" / "data"), []
    files = fetch("tiny", folder, lambda *report: reports.append(report), mirrors=[server])
    assert [file.name for file in files] == ["a-idx1.gz", "b-idx1.gz"]
    assert tree(tmp_path / "new") == ["data/tiny/a-idx1.gz", "data/tiny/b-idx1.gz"]
    read(known, folder)
    sizes = [file.stat().st_size for file in files]
    assert reports == [("a-idx1.gz", sizes[0], sizes[0]), ("b-idx1.gz", sizes[1], sizes[1])]


def test_fetch_takes_file_addresses_and_goes_on_to_the_next_mirror(
    known: DataSet, origin: Path, broken: str, tmp_path: Path
) -> None:
    folder = DataFolder(tmp_path / "data")
    fetch("tiny", folder, mirrors=[broken, (tmp_path / "nowhere").as_uri(), origin.as_uri() + "/"])
    read(known, folder)


def test_fetch_keeps_good_files_and_replaces_damaged_ones(
    known: DataSet, server: str, tmp_path: Path
) -> None:
    folder = DataFolder(tmp_path / "data")
    raw = tmp_path / "data" / "TINY" / "raw"
    raw.mkdir(parents=True)
    (raw / "a-idx1").write_bytes(CONTENT["a-idx1"])
    (raw / "b-idx1").write_bytes(b"damaged")
    reports: list[tuple[str, int, int | None]] = []
    fetch("tiny", folder, lambda *report: reports.append(report), mirrors=[server])
    assert {name for name, _, _ in reports} == {"b-idx1.gz"}
    read(known, folder)
    fetch("tiny", folder, mirrors=[])  # all there: no mirror is asked


def test_fetch_that_fails_says_what_each_mirror_answered_and_leaves_nothing(
    known: DataSet, server: str, broken: str, origin: Path, tmp_path: Path
) -> None:
    (origin / "b-idx1.gz").write_bytes(gzip.compress(CONTENT["a-idx1"]))
    folder = DataFolder(tmp_path / "data")
    with pytest.raises(DataError) as caught:
        fetch("tiny", folder, mirrors=[broken, f"{server}/gone", server, "http://127.0.0.1:1"])
    message = str(caught.value)
    assert "the connection ended after 10 of 1000 bytes" in message
    assert "404" in message
    assert "what it sent is the wrong file: its array has shape (1000,)" in message
    assert "Connection refused" in message
    assert "archopt data import" in message
    assert "\n" not in message
    assert tree(folder.path or tmp_path) == ["tiny/a-idx1.gz"]


def test_fetch_onto_a_full_disk_leaves_what_was_there(
    known: DataSet, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "data" / "tiny" / "a-idx1.gz"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"old and damaged")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*a-idx1\.gz: No space left on device"):
        fetch("tiny", DataFolder(tmp_path / "data"), mirrors=[server])
    assert tree(tmp_path / "data") == ["tiny/a-idx1.gz"]
    assert place.read_bytes() == b"old and damaged"


def test_fetch_where_no_folder_can_be_made_says_so(known: DataSet, server: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write .*(Not a directory|File exists).*--data DIR"):
        fetch("tiny", DataFolder(tmp_path / "data"), mirrors=[server])
    with pytest.raises(DataError, match="nowhere to put tiny"):
        fetch("tiny", DataFolder(None), mirrors=[server])
    with pytest.raises(DataError, match="no data set 'tiney'; did you mean 'tiny'"):
        fetch("tiney", DataFolder(tmp_path))


def test_fetch_of_what_ships_with_the_package_has_nothing_to_do(tmp_path: Path) -> None:
    assert fetch("digits", DataFolder(tmp_path)) == []
    assert tree(tmp_path) == []


@pytest.mark.parametrize("layout", [".", "tiny", "TINY/raw"])
def test_import_takes_every_layout(known: DataSet, origin: Path, tmp_path: Path, layout: str) -> None:
    source = tmp_path / "source"
    (source / layout).mkdir(parents=True)
    for name in ("a-idx1", "b-idx1"):
        os.replace(origin / f"{name}.gz", source / layout / f"{name}.gz")
    (source / layout / "a-idx1.gz").unlink()
    (source / layout / "a-idx1").write_bytes(CONTENT["a-idx1"])
    folder, reports = DataFolder(tmp_path / "data"), []
    copies = import_folder(source, folder, ["tiny"], lambda *report: reports.append(report))
    assert tree(tmp_path / "data") == ["tiny/a-idx1", "tiny/b-idx1.gz"]
    assert [copy.name for copy in copies] == [name for name, _, _ in reports]
    read(known, folder)


def test_import_without_names_takes_what_it_finds(known: DataSet, origin: Path, tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    assert len(import_folder(str(origin), folder)) == 2
    read(known, folder)


def test_import_of_an_incomplete_or_damaged_set_copies_nothing(
    known: DataSet, origin: Path, tmp_path: Path
) -> None:
    folder = DataFolder(tmp_path / "data")
    (origin / "b-idx1.gz").write_bytes(gzip.compress(CONTENT["b-idx1"])[:-4])
    with pytest.raises(DataError, match=r"b-idx1\.gz is truncated"):
        import_folder(origin, folder)
    (origin / "b-idx1.gz").unlink()
    with pytest.raises(DataError, match=r"has no b-idx1\.gz: tiny is not complete there"):
        import_folder(origin, folder)
    assert not (tmp_path / "data").exists()


def test_import_from_a_folder_without_sets_says_what_was_looked_for(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    with pytest.raises(DataError, match=r"holds no known data set; looked for mnist \(train-images"):
        import_folder(tmp_path, folder)
    with pytest.raises(DataError, match=r"cannot import from .*gone \(no such folder\)"):
        import_folder(tmp_path / "gone", folder)
    with pytest.raises(DataError, match="nowhere to import to"):
        import_folder(tmp_path, DataFolder(None))


def test_import_onto_itself_keeps_the_files(known: DataSet, origin: Path, tmp_path: Path) -> None:
    import_folder(origin, DataFolder(tmp_path))
    import_folder(tmp_path, DataFolder(tmp_path))
    read(known, DataFolder(tmp_path))


@pytest.mark.data
def test_mnist_is_imported_from_the_folder_of_real_data(tmp_path: Path) -> None:
    source = real_data("mnist")
    assert source.path is not None
    folder = DataFolder(tmp_path)
    assert len(import_folder(source.path, folder, ["mnist"])) == 4
    assert load_mnist(folder).train_labels[:5].tolist() == [5, 0, 4, 1, 9]
