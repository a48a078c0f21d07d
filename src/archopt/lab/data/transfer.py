"""Getting data sets into a data folder: from their public mirrors, or from a folder that has them.

Every file is checked before it is put in its place, and put there in one step: a transfer that fails leaves
what was there before, and nothing half-written.
"""

import http.client
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from archopt._version import __version__
from archopt.lab.data.folder import DataError, DataFolder
from archopt.lab.data.sets import SETS, DataFile, DataSet, data_set, missing_folder, opened_tar

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes done so far, and its size where that is known."""

CHUNK = 1 << 16
TIMEOUT = 30.0  # seconds without an answer after which the next mirror is tried
Accepted = TypeVar("Accepted")


def fetch(
    name: str, folder: DataFolder, progress: Progress | None = None, *, mirrors: Sequence[str] | None = None
) -> list[Path]:
    """Downloads a set into `folder` and returns its files; those that are there and pass their check stay.

    mirrors: addresses (`http`, `https` or `file`) to try instead of the set's own, each with the files.
    Raises DataError, which says what each mirror answered, where a file could not be had; files that were
    finished before that stay.
    """
    known = data_set(name)
    if folder.path is None:
        raise DataError(f"nowhere to put {name}: no data folder is given; name one with --data DIR")
    if known.files and mirrors is None and not known.mirrors:
        raise DataError(
            f"{name} has no public address; `{known.fetch_command(folder)}` copies it from a folder that has it"
        )
    mirrors = known.mirrors if mirrors is None else mirrors
    there = {file: _good_copy(known, file, folder.path) for file in known.files}
    if known.archive is not None and None in there.values():
        return _fetch_archive(known, known.archive, folder.path, progress, mirrors)
    files = [copy or _fetch_file(known, file, folder.path, progress, mirrors) for file, copy in there.items()]
    return list(dict.fromkeys(files))  # an archive holds several


def _fetch_file(
    known: DataSet, file: DataFile, root: Path, progress: Progress | None, mirrors: Sequence[str]
) -> Path:
    def accept(content: bytes) -> bytes:
        file.check(content, "what it sent")
        return content

    content = _from_mirrors(file.served, mirrors, progress, accept)
    return write_atomic(_home(known, root) / file.served, content)


def _fetch_archive(
    known: DataSet, archive: str, root: Path, progress: Progress | None, mirrors: Sequence[str]
) -> list[Path]:
    contents = _from_mirrors(archive, mirrors, progress, lambda sent: _unpacked(known, sent, "what it sent"))
    return [write_atomic(_home(known, root) / file.name, c) for file, c in zip(known.files, contents)]


def _unpacked(known: DataSet, archive: bytes, where: str) -> list[bytes]:
    """A set's files, each checked, from the archive that mirrors serve."""
    found = []
    with opened_tar(archive, where) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
        for file in known.files:
            stream = tar.extractfile(members[file.name]) if file.name in members else None
            if stream is None:
                raise DataError(f"{where} has no {file.name}")
            found.append(stream.read())
            file.check(found[-1], f"{file.name} in {where}")
    return found


def _from_mirrors(
    name: str, mirrors: Sequence[str], progress: Progress | None, accept: Callable[[bytes], Accepted]
) -> Accepted:
    """What `accept` makes of the first file called `name` that a mirror sends whole and it does not refuse."""
    answers = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        try:
            return accept(_download(url, name, progress))
        except DataError as error:
            answers.append(f"{url}: {error}")
        except (OSError, EOFError, http.client.HTTPException, tarfile.TarError, ValueError) as error:
            answers.append(f"{url}: {_reason(error)}")
    raise DataError(
        f"could not download {name} ({'; '.join(answers) or 'no mirror given'}); try again, or "
        f"fetch it where there is a network and run `archopt data import FOLDER`"
    )


def _reason(error: Exception) -> str:
    """What went wrong with a download, without the wrapping of urllib."""
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return getattr(error.reason, "strerror", None) or str(error.reason)
    return str(error) or type(error).__name__


def _good_copy(known: DataSet, file: DataFile, root: Path) -> Path | None:
    place = known.find(root, file)
    if place is None:
        return None
    try:
        file.check(known.content(place, file), str(place))
    except (DataError, OSError):
        return None
    return place


def _home(known: DataSet, root: Path) -> Path:
    """Where a set's files are put: the place that is looked at first."""
    return root / known.folders[0]


def _download(url: str, name: str, progress: Progress | None) -> bytes:
    """The body of `url`. Raises what urllib raises, and DataError where the body is cut short."""
    request = urllib.request.Request(url, headers={"User-Agent": f"archopt/{__version__}"})
    chunks: list[bytes] = []
    done = 0
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        while chunk := response.read(CHUNK):
            chunks.append(chunk)
            done += len(chunk)
            if progress is not None:
                progress(name, done, total)
    if total is not None and done != total:
        raise DataError(f"the connection ended after {done} of {total} bytes")
    return b"".join(chunks)


def import_folder(
    source: str | Path,
    folder: DataFolder,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Copies sets from a folder on disk into `folder`, each file checked first, and returns the copies.

    names: which sets (default: every known set of which `source` has a file). Raises DataError where a set is
    not complete there or a file fails its check; nothing of that set is copied then.
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        raise DataError(
            f"cannot import from {source}{missing_folder(source)}: name the folder that holds the files"
        )
    if folder.path is None:
        raise DataError("nowhere to import to: no data folder is given; name one with --data DIR")
    wanted = [data_set(name) for name in names] if names else list(_sets_in(source))
    if not wanted:
        known = ", ".join(
            f"{known.name} ({known.files[0].served}, ...)" for known in SETS.values() if known.files
        )
        raise DataError(
            f"{source} holds no known data set; looked for {known} there and in the usual subfolders"
        )
    return [copy for known in wanted for copy in _import_set(known, source, folder.path, progress)]


def _sets_in(source: Path) -> list[DataSet]:
    return [
        known
        for known in SETS.values()
        if _archive_in(known, source) or any(known.find(source, file) for file in known.files)
    ]


def _archive_in(known: DataSet, source: Path) -> Path | None:
    """The archive that mirrors serve, as somebody downloaded it."""
    places = [source / place / known.archive for place in ("", *known.folders) if known.archive]
    return next((place for place in places if place.is_file()), None)


def _import_set(known: DataSet, source: Path, root: Path, progress: Progress | None) -> list[Path]:
    contents: dict[Path, bytes] = {}
    archive = _archive_in(known, source)
    if archive is not None and not known.complete(source):
        try:
            packed = archive.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {archive}: {error.strerror}") from error
        unpacked = _unpacked(known, packed, str(archive))
        if progress is not None:
            progress(archive.name, len(packed), len(packed))
        return [write_atomic(_home(known, root) / file.name, c) for file, c in zip(known.files, unpacked)]
    for file in known.files:
        found = known.find(source, file)
        if found is None:
            raise DataError(f"{source} has no {file.served}: {known.name} is not complete there")
        target = _home(known, root) / found.name
        try:
            file.check(known.content(found, file), str(found))
            if target in contents:  # an archive that holds several files
                continue
            contents[target] = content = found.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {found}: {error.strerror}") from error
        if progress is not None:
            progress(found.name, len(content), len(content))
    return [write_atomic(target, content) for target, content in contents.items()]


def write_atomic(target: Path, content: bytes) -> Path:
    """Writes a file whole or not at all, with the folders above it. Raises DataError where that fails."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror}; make room or name another folder with --data DIR"
        ) from error
    return target
