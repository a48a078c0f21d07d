"""A disk that fills up while a run writes: one clear line, and nothing finished is lost."""

import os
import resource
from pathlib import Path

import pytest
import torch

from archopt.lab.errors import RecordError
from archopt.lab.record import CHECKPOINT, RESULT, RunFolder
from archopt.lab.train import Settings
from lab.running import bits, forkserver, lines, run, toy

CONFIG = {"format": 1, "seed": 0}

full_device = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, where every write fails"
)


@full_device
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path: Path, size):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.save_checkpoint({"step": 1})
        before = (tmp_path / CHECKPOINT).read_bytes()
        (tmp_path / f"{CHECKPOINT}.tmp").symlink_to("/dev/full")
        with pytest.raises(RecordError, match=r"the disk is full: cannot write .*checkpoint\.pt; make room"):
            folder.save_checkpoint({"step": 2, "x": torch.zeros(size)})
        assert (tmp_path / CHECKPOINT).read_bytes() == before
        assert not (tmp_path / f"{CHECKPOINT}.tmp").is_symlink()


@full_device
def test_a_result_that_does_not_fit_leaves_the_run_to_be_finished_later(tmp_path: Path):
    with RunFolder(tmp_path, CONFIG) as folder:
        (tmp_path / f"{RESULT}.tmp").symlink_to("/dev/full")
        with pytest.raises(RecordError, match="the disk is full"):
            folder.finish({"status": "finished"})
    assert not (tmp_path / RESULT).exists()
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.finish({"status": "finished"})
    assert RunFolder(tmp_path, CONFIG).result == {"status": "finished"}


def limited(limit: int, path: Path, answer) -> None:
    """Trains where no file may grow beyond `limit` bytes, which the system reports much as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(path, toy(every=1), settings=Settings(threads=1, checkpoint_steps=20))
        answer.send("finished")
    except RecordError as error:
        answer.send(str(error))


@pytest.mark.parametrize("limit", [3_000, 9_000])
def test_a_run_that_hits_the_end_of_the_disk_says_so_and_goes_on_when_there_is_room(tmp_path: Path, limit):
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=limited, args=(limit, tmp_path / "a", theirs))
    process.start()
    said = ours.recv()
    process.join()
    assert "the disk is full" in said
    assert "\n" not in said
    told = lines(tmp_path / "a")  # every line is whole
    assert [line["step"] for line in told] == list(range(len(told)))
    run(tmp_path / "a", toy(every=1))
    run(tmp_path / "b", toy(every=1))
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
