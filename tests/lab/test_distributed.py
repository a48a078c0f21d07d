"""One run by several processes: the numbers of one process, one record, and no hang whatever happens to one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from archopt.lab import distributed
from archopt.lab.cli import BAD_INPUT, DONE, RUN_FAILED, STOPPED, main
from archopt.lab.errors import LabError
from archopt.lab.pictures import Part, cropped_and_mirrored, random_boxes
from archopt.lab.share import ALONE, Share
from lab.running import bits, forkserver
from real_data import real_data

FAULTY = str(Path(__file__).parent / "faulty.py")
TOLERANCE, ADAMS = 1e-6, 1e-5
"""Relative: sums of float32 are taken in another order, and Adam divides by what may be nearly zero."""
PATIENCE = 300.0  # seconds after which a process counts as hanging


def child(place: dict[str, str], limits: dict[str, float], args: list[str], said: str) -> None:
    """One process of a run, with what it says in a file."""
    os.environ.update(place)
    for name, seconds in limits.items():
        setattr(distributed, name, seconds)
    torch.set_num_threads(1)
    with Path(said).open("w", buffering=1) as stream:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            status = main(args)
        stream.write(f"\nexit {status}")
    os._exit(status)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
    return port


def torchrun_place(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    told = {name: str(number) for name, number in numbers.items()}
    return {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def openmpi_place(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    told = {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in numbers.items()}
    return {**told, "MASTER_PORT": str(port)}


def together(
    tmp_path: Path,
    commands: Sequence[list[str]],
    size: int | None = None,
    place: Any = torchrun_place,
    limits: dict[str, float] | None = None,
    environment: dict[str, str] | None = None,
) -> list[tuple[int | None, str]]:
    """Runs a command in each process; the exit status and the words of each."""
    port, size = free_port(), size or len(commands)
    files = [tmp_path / f"said-{rank}" for rank in range(len(commands))]
    processes = [
        forkserver().Process(
            target=child,
            args=(
                {**place(rank, size, port), **(environment or {})},
                limits or {},
                command,
                str(files[rank]),
            ),
        )
        for rank, command in enumerate(commands)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    words = [file.read_text() if file.exists() else "" for file in files]
    assert not hanging, f"processes {hanging} hang; {words}"
    return [(process.exitcode, " ".join(text.split())) for process, text in zip(processes, words)]


def command(out: Path, *args: str, workload: str = "digits", optimizer: str = "sgd(lr=0.1)") -> list[str]:
    usual = ["--preset", "smoke", "--threads", "1", "--optimizer", optimizer, "--out", str(out)]
    return ["train", workload, *usual, *args]


def record(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The lines, the config and the result of the one run that there is."""
    (config,) = out.rglob("config.json")
    told = [json.loads(line) for line in config.with_name("metrics.jsonl").read_text().splitlines()]
    return told, *(json.loads(config.with_name(name).read_text()) for name in ("config.json", "result.json"))


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line that training decides, flat."""

    def flat(prefix: str, value: Any) -> dict[str, float]:
        if not isinstance(value, dict):
            return {} if value is None else {prefix: value}
        return {k: v for key, inner in value.items() for k, v in flat(f"{prefix}/{key}", inner).items()}

    return flat("", {key: line[key] for key in line if key not in ("seconds", "time")})


def same_as_alone(
    tmp_path: Path, size: int, args: list[str], tolerance: float = TOLERANCE, **how: Any
) -> dict[str, Any]:
    """Trains with several processes and with one, compares, and returns the result of the former."""
    apart, alone = tmp_path / "apart", tmp_path / "alone"
    extra = {key: how.pop(key) for key in ("workload", "optimizer") if key in how}
    done = together(tmp_path, [[*command(apart, *args, **extra), "--distribute"]] * size, **how)
    assert [status for status, _ in done] == [DONE] * size, done
    assert all(words == f"exit {DONE}" for _, words in done[1:])  # the first one speaks
    assert main(command(alone, *args, **extra)) == DONE
    (ours, config, result), (theirs, plain, _) = record(apart), record(alone)
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs):
        assert numbers(mine) == pytest.approx(numbers(other), rel=tolerance)
    assert (config["processes"], "processes" in plain) == (size, False)
    return result


# -- what a process has --------------------------------------------------------------------------------


def share_of(rank: int, size: int) -> Share:
    found = Share()
    found.rank, found.size = rank, size
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 6, 64, 80])
def test_the_parts_of_a_batch_are_the_batch(size: int, rows: int) -> None:
    shares = [share_of(rank, size) for rank in range(size)]
    counts = [share.count(rows) for share in shares]
    taken = [list(range(rows))[share.part(rows)] for share in shares]
    assert [row for part, count in zip(taken, counts) if count for row in part] == list(range(rows))
    assert max(counts) - min(counts) <= 1
    assert all(len(part) == count or (part == [0] and count == 0) for part, count in zip(taken, counts))
    dealt = [batch for share in shares for batch in share.deal(range(rows))]
    assert sorted(dealt) == list(range(rows))


def test_what_happens_to_a_picture_does_not_depend_on_how_its_batch_is_divided() -> None:
    images = torch.arange(9 * 3 * 8 * 8, dtype=torch.float32).view(9, 3, 8, 8)
    aspects = torch.linspace(0.5, 2.0, 9)

    def drawn(part: Part | None) -> tuple[torch.Tensor, ...]:
        rows = slice(None) if part is None else part.rows
        generator = torch.Generator().manual_seed(0)
        turned = cropped_and_mirrored(images[rows], generator, 15.0, part)
        return turned, random_boxes(aspects[rows], generator, part)

    whole = drawn(None)
    for size in (2, 4):
        parts = [drawn(Part(share_of(rank, size).part(9), 9)) for rank in range(size)]
        for one, *pieces in zip(whole, *parts):
            assert torch.equal(torch.cat(pieces), one)


# -- the same numbers ----------------------------------------------------------------------------------


def test_three_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Batches of 64 in parts of 22, 21 and 21, the last of an epoch of 56; a test set that one process scores."""
    result = same_as_alone(tmp_path, 3, [], optimizer="nero(lr=0.01)")
    assert result["status"] == "finished"


@pytest.mark.data
@pytest.mark.parametrize("optimizer", ["agd-paper", "adam(lr=0.001)"])
def test_classify_gives_the_numbers_of_one_process_under_open_mpi(tmp_path: Path, optimizer: str) -> None:
    """Changed pictures, a last batch of a single row, test batches of 30, 30, 30 and 10, step sizes and updates."""
    path = real_data("cifar10-half").path
    args = ["--data", str(path), "--depth", "4", "--width", "32", "--train-images", "201", "--train-bs", "40"]
    args += ["--test-bs", "30", "--updates-every", "1"]
    how = {"workload": "classify", "optimizer": optimizer, "place": openmpi_place}
    same_as_alone(tmp_path, 2, args, ADAMS if optimizer.startswith("adam") else TOLERANCE, **how)
    told = record(tmp_path / "apart")[0][-1]["per_step"]
    assert ("eta" in told) == (optimizer == "agd-paper")


@pytest.mark.data
def test_networks_with_batchnorm_train_and_are_evaluated_with_the_statistics_of_the_first(
    tmp_path: Path,
) -> None:
    path = real_data("cifar10-half").path
    args = ["--data", str(path), "--arch", "resnet18", "--train-images", "64", "--test-images", "20"]
    how = {"workload": "classify", "optimizer": "agd-paper"}
    done = together(tmp_path, [[*command(tmp_path / "out", *args, **how), "--distribute"]] * 2)
    assert [status for status, _ in done] == [DONE, DONE], done
    lines, _, result = record(tmp_path / "out")
    assert result["status"] == "finished"
    assert lines[-1]["eval"]["test_loss"] < 5


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [*command(tmp_path), "--distribute"]
    done = subprocess.run([*launcher, "-m", "archopt.lab", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 44 steps") == 1
    assert record(tmp_path)[1]["processes"] == 2


# -- going on ------------------------------------------------------------------------------------------


def faulty(out: Path, fault: str = "", *more: str) -> list[str]:
    args = ["--fault", fault, "--pause", "0.02", "--checkpoint-seconds", "0.05", "--distribute", *more]
    return command(out, *args, workload=FAULTY, optimizer="adam(lr=0.01)")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_the_command_goes_on_to_the_same_bits(
    tmp_path: Path, rank: int
) -> None:
    args = ["--fault-rank", str(rank), "--fault-at", "40"]
    done = together(tmp_path, [faulty(tmp_path / "killed", "die", *args)] * 2)
    assert done[rank][0] == -signal.SIGKILL
    status, words = done[1 - rank]
    assert status == RUN_FAILED
    assert f"process {rank} of 2 has died (killed, or out of memory); the same command goes on from" in words
    assert "Traceback" not in words
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] <= 40
    lives = {"FAULTLESS": "1"}
    done = together(tmp_path, [faulty(tmp_path / "killed", "die", *args)] * 2, environment=lives)
    assert [status for status, _ in done] == [DONE, DONE], done
    done = together(tmp_path, [faulty(tmp_path / "whole", "die", *args)] * 2, environment=lives)
    assert [status for status, _ in done] == [DONE, DONE], done
    one, other = (next((tmp_path / name).rglob("result.json")).parent for name in ("killed", "whole"))
    assert bits(one) == bits(other)
    done = together(tmp_path, [faulty(tmp_path / "whole", "die", *args)] * 2, environment=lives)
    assert "has ended before" in done[0][1]


def test_a_process_that_raises_is_named_by_all_of_three(tmp_path: Path) -> None:
    done = together(tmp_path, [faulty(tmp_path / "out", "raise")] * 3)
    assert [status for status, _ in done] == [RUN_FAILED] * 3, done
    for rank in (0, 2):
        assert "process 1 of 3 gave up: OSError: picture 17 is damaged" in done[rank][1]
    assert "the run failed: OSError: picture 17 is damaged" in done[1][1]
    assert "picture 17" in record(tmp_path / "out")[2]["error"]


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    done = together(tmp_path, [faulty(tmp_path / "out", "sleep")] * 2, limits={"ANSWER_SECONDS": 10.0})
    assert "process 1 of 2 has not answered for 10 s" in done[0][1]
    assert [status for status, _ in done] == [RUN_FAILED] * 2, done


def test_a_loss_that_is_not_finite_ends_all_together(tmp_path: Path) -> None:
    done = together(tmp_path, [[*command(tmp_path / "out", optimizer="sgd(lr=1e30)"), "--distribute"]] * 2)
    assert [status for status, _ in done] == [RUN_FAILED] * 2
    assert record(tmp_path / "out")[2]["status"] == "diverged"


def stopped(place: dict[str, str], limits: dict[str, float], args: list[str], said: str) -> None:
    """As `child`, with Ctrl-C in the middle, twice, as a terminal and a launcher send it."""
    from archopt.lab import train as module

    save = module.Run._checkpoint_due

    def due(run: Any, step: int, now: float) -> bool:
        if step == 30:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return save(run, step, now)

    module.Run._checkpoint_due = due  # type: ignore[method-assign]
    child(place, limits, args, said)


def test_ctrl_c_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "child", stopped)
    done = together(tmp_path, [[*faulty(tmp_path / "out")]] * 2)
    assert [status for status, _ in done] == [STOPPED] * 2, done
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert 30 <= torch.load(checkpoint, weights_only=True)["step"] <= 32


# -- refusals ------------------------------------------------------------------------------------------


def test_processes_that_disagree_say_in_what(tmp_path: Path) -> None:
    commands = [[*command(tmp_path / "out", "--epochs", n), "--distribute"] for n in ("2", "3")]
    done = together(tmp_path, commands)
    for status, words in done:
        assert status == BAD_INPUT
        assert "do not agree: options.epochs is 3 in process 1 and 2 in process 0 (and 1 more)" in words
    assert not list(tmp_path.rglob("config.json"))


def test_what_one_process_refuses_all_repeat(tmp_path: Path) -> None:
    commands = [[*command(tmp_path / "out", "--epochs", n), "--distribute"] for n in ("2", "0")]
    done = together(tmp_path, commands)
    assert [status for status, _ in done] == [BAD_INPUT] * 2
    assert "process 1 of 2 gave up: " in done[0][1]
    assert all("epochs=0, expected a value above 0" in words for _, words in done)


def test_a_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    ((status, words),) = together(
        tmp_path, [[*command(tmp_path / "out"), "--distribute"]], size=2, limits={"START_SECONDS": 1.0}
    )
    assert status == BAD_INPUT
    assert "process 1 of 2 has not come within 1 s" in words


def test_a_folder_with_another_run_is_refused_by_all(tmp_path: Path) -> None:
    assert main(command(tmp_path / "out")) == DONE
    done = together(tmp_path, [[*command(tmp_path / "out"), "--distribute"]] * 2)
    assert [status for status, _ in done] == [BAD_INPUT] * 2
    assert all("holds a different run (processes: nothing there, 2 asked for)" in words for _, words in done)


def test_without_a_launcher_it_is_refused(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in distributed.LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert main([*command(tmp_path / "out"), "--distribute"]) == BAD_INPUT
    assert (
        "--distribute needs a launcher that says which process this is: torchrun" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "args", "said"),
    [
        ({}, [], "process 1 of 2, which would all train the same run; let them train it together with"),
        ({"RANK": "two"}, ["--distribute"], "RANK='two' and WORLD_SIZE='2' do not say which"),
        ({"RANK": "2"}, ["--distribute"], "RANK='2' and WORLD_SIZE='2' do not say which"),
        ({"MASTER_PORT": "none"}, ["--distribute"], "cannot meet the other processes at 127.0.0.1:none"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(
    changes: dict, args: list, said: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**torchrun_place(1, 2, 1), **changes}.items():
        monkeypatch.setenv(name, value)
    assert main([*command(tmp_path / "out"), *args]) == BAD_INPUT
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("workload", "args", "said"),
    [
        ("mnist-cwn", [], "mnist-cwn cannot be divided among processes (digits, classify can)"),
        ("digits", ["--average"], "--distribute does not go with --average"),
        ("digits", ["--compile"], "--distribute does not go with --compile"),
        ("digits", ["--device", "cuda:1"], "cuda:1"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_data_are_read(
    workload: str, args: list, said: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archopt.lab.commands.open_experiment", lambda *_: pytest.fail("data were read"))
    for name, value in torchrun_place(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    assert main([*command(tmp_path / "out", *args, workload=workload), "--distribute"]) == BAD_INPUT
    assert said in " ".join(capsys.readouterr().err.split())


def test_processes_on_several_machines_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    here = distributed.Place(rank=1, size=4, local_rank=1, local_size=2)
    with pytest.raises(LabError, match="set MASTER_ADDR to the first one's address"):
        distributed._meet(here)


def test_a_process_alone_has_everything() -> None:
    assert (ALONE.count(5), list(range(5))[ALONE.part(5)]) == (5, [0, 1, 2, 3, 4])
    assert (ALONE.sum([1.5, 2.0]), ALONE.any(True, False), ALONE.all("x")) == (
        [1.5, 2.0],
        (True, False),
        ["x"],
    )
