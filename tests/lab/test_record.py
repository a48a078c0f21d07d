"""The record of a run: atomic, refused where it is another run's, cut back to its checkpoint."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from archopt.lab import record
from archopt.lab.errors import RecordError
from archopt.lab.record import RunFolder, stored_result, write_json

CONFIG = {
    "format": 1,
    "seed": 0,
    "optimizer": {"name": "sgd", "options": {"betas": (0.9, 0.99)}},
    "environment": {"torch": "1"},
}
RESULT = {"status": "finished", "step": 3}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"the disk is full.*finished runs are kept"):
        write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5], "y": (1, None)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "y": [1, None]}


def test_the_same_run_is_taken_up_again_and_a_finished_one_only_read(tmp_path: Path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        assert folder.result is None
        folder.append({"step": 0})
    with RunFolder(tmp_path / "run", {**CONFIG, "environment": {"torch": "2"}}) as folder:
        folder.finish(RESULT)
    assert RunFolder(tmp_path / "run", CONFIG).result == RESULT
    assert json.loads((tmp_path / "run/config.json").read_text())["environment"] == {"torch": "1"}


def test_a_folder_with_a_different_run_is_refused_with_the_keys_that_differ(tmp_path: Path):
    RunFolder(tmp_path, CONFIG).__exit__(None, None, None)
    other = {
        "format": 1,
        "seed": 1,
        "optimizer": {"name": "sgd", "options": {"betas": (0.9, 0.999), "eps": 1}},
    }
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RecordError) as refused:
        RunFolder(tmp_path, other)
    text = str(refused.value)
    assert "seed: 0 there, 1 asked for" in text
    assert "optimizer.options.betas: [0.9, 0.99] there, [0.9, 0.999] asked for" in text
    assert "optimizer.options.eps: nothing there, 1 asked for" in text
    assert "--out" in text
    assert "\n" not in text
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_with_results_but_no_config_is_refused(tmp_path: Path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(RecordError, match=r"no config.json"):
        stored_result(tmp_path, CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_record_is_refused_with_the_remedy(tmp_path: Path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecordError, match=r"damaged.*delete its folder"):
        RunFolder(tmp_path, CONFIG)


def test_a_second_process_cannot_write_the_same_run(tmp_path: Path):
    with RunFolder(tmp_path, CONFIG), pytest.raises(RecordError, match="another archopt process"):
        RunFolder(tmp_path, CONFIG)
    RunFolder(tmp_path, CONFIG).__exit__(None, None, None)  # free again


def test_metrics_are_on_disk_line_by_line_and_cut_back_to_the_checkpoint(tmp_path: Path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append({"step": 0})
        folder.append({"step": 1})
        folder.save_checkpoint({"step": 1, "x": torch.arange(3)})
        folder.append({"step": 2})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "ev')  # a line that a kill cut short
    with RunFolder(tmp_path, CONFIG) as folder:
        state = folder.load_checkpoint()
        assert state is not None
        assert state["step"] == 1
        assert torch.equal(state["x"], torch.arange(3))
        folder.append({"step": 2})
        folder.finish(RESULT)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [0, 1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "metrics.jsonl", "result.json"}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "older metrics", "missing"])
def test_a_checkpoint_that_cannot_be_used_starts_the_run_again(tmp_path: Path, damage):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append({"step": 0})
        folder.save_checkpoint({"step": 1, "x": torch.arange(300)})
    file = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "garbage":
        file.write_bytes(b"garbage" * 10)
    elif damage == "older metrics":
        (tmp_path / "metrics.jsonl").write_text("")
    else:
        file.unlink()
    with RunFolder(tmp_path, CONFIG) as folder:
        assert folder.load_checkpoint() is None
        assert folder.metrics_bytes == 0


def test_a_failed_run_is_tried_again_from_its_checkpoint(tmp_path: Path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.save_checkpoint({"step": 7})
        folder.finish({"status": "failed"})
    assert stored_result(tmp_path, CONFIG) is None
    with RunFolder(tmp_path, CONFIG) as folder:
        state = folder.load_checkpoint()
        assert state is not None
        assert state["step"] == 7
        assert not (tmp_path / "result.json").exists()


def test_a_full_disk_never_leaves_half_a_line(tmp_path: Path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append({"step": 0})
        stream = folder._metrics
        assert stream is not None

        class Full:
            """Takes five bytes, then the disk is full."""

            taken = False

            def write(self, data: bytes) -> int:
                if self.taken:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.taken = True
                return stream.write(data[:5])

            def __getattr__(self, name: str):
                return getattr(stream, name)

        folder._metrics = Full()  # type: ignore[assignment]
        with pytest.raises(RecordError, match="the disk is full"):
            folder.append({"step": 1})
        folder._metrics = stream
        folder.append({"step": 1})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0},
        {"step": 1},
    ]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_no_permission_is_said_in_one_line(tmp_path: Path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(RecordError, match=r"no permission to write .*--out"):
            RunFolder(tmp_path / "run", CONFIG)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EDQUOT, "disk is full"),
        (errno.EIO, "cannot write"),
    ],
)
def test_every_refusal_of_the_system_names_the_path_and_the_remedy(tmp_path: Path, number, said):
    with (
        pytest.raises(RecordError, match=f"{said}.*x.json.*(--out|same command)"),
        record.explained(tmp_path / "x.json"),
    ):
        raise OSError(number, os.strerror(number))
