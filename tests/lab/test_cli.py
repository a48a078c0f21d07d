"""The command line: exit statuses, help, and one line for everything that cannot be done."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from archopt import kernels
from archopt.lab import cli
from archopt.lab.cli import BAD_INPUT, COMMANDS, DONE, RUN_FAILED, STOPPED, main
from archopt.lab.errors import RecordError
from archopt.lab.record import RunFolder
from lab.running import TOY, bits, lines

TOY_ARGS = [str(TOY), "--threads", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Every test runs in a folder of its own, with messages that do not wrap."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("ARCHOPT_DEBUG", raising=False)
    monkeypatch.delenv("ARCHOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def refused(capsys, *args: str) -> str:
    """The one line that bad input is answered with."""
    assert main(args) == BAD_INPUT
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("archopt: ")
    assert "Traceback" not in said.err + said.out
    return said.err


BAD = [
    (["trian", "digits"], "no command 'trian'; did you mean 'train'"),
    (["train"], "needs a workload"),
    (["train", "digit"], "no workload 'digit'; did you mean 'digits'"),
    (["train", "./mine.py"], "no file"),
    (["train", "digits", "-o", "adamm"], "no optimiser 'adamm'; did you mean 'adam'"),
    (["train", "digits", "--optimizer", "adam(bettas=1)"], "no option 'bettas'; did you mean 'betas'"),
    (["train", "digits", "--preset", "smal"], "no preset 'smal'; did you mean 'small'"),
    (["train", "digits", "--modell", "cnn"], "no option --modell; did you mean '--model'?"),
    (["train", "digits", "--optimiser=adam"], "no option --optimiser; did you mean '--optimizer'?"),
    (["train", "digits", "--model", "cn"], "invalid choice 'cn' for argument '--model'"),
    (["train", "digits", "--epochs", "many"], "--epochs cannot be 'many'"),
    (["train", "digits", "--lr", "fast"], "--lr cannot be 'fast'"),
    (["train", "digits", "--lr", "-1"], "lr=-1.0, expected a number, 0 <= lr"),
    (["train", "digits", "-o", "agd", "--lr", "1"], "agd has no learning rate"),
    (["train", "digits", "-o", "sgd(lr=1)", "--lr", "1"], "given twice"),
    (["train", "digits", "-o", "sgd(lr=[1,2])"], "several learning rates; archopt train takes one"),
    (
        ["compare", "digits", "--tuning-seeds", "7"],
        "--tuning-seeds has 7, which is none of the seeds 0, 1, 2",
    ),
    (["train", "digits", "-o", "adam(betas=(0.9,1.5))"], "Invalid beta"),
    (["train", "digits", "-o", "nero(beta=1)"], "beta=1"),
    (["train", "digits", "-o", "agd-paper"], "agd-paper: "),
    (["train", "digits", "--seed", "-1"], "--seed -1"),
    (["train", "digits", "--threads", "0"], "--threads 0, expected more than 0"),
    (["train", "digits", "--device", "gpu"], "no device 'gpu'"),
    (["train", "digits(model='cn')"], "model='cn', expected 'mlp' or 'cnn'"),
    (["train", "mnist-mlp100", "--data", "nowhere"], "archopt data fetch mnist"),
    (["compare"], "needs a workload"),
    (
        ["compare", "digits", "--lrs", "grid,1"],
        "--lrs 'grid,1', expected grid, published, default or numbers",
    ),
    (["compare", "digits", "--seeds", "a"], "--seeds 'a', expected whole numbers"),
    (["compare", "digits", "--seeds", "1,1"], "expected different numbers"),
    (["compare", "digits", "--optimizers", "adam,,sgd"], "empty entry"),
    (["compare", "digits", "--optimizers", "adam,sgb"], "no optimiser 'sgb'; did you mean 'sgd'"),
    (["compare", "digits", "--jobs", "0"], "--jobs 0"),
    (["compare", "digits", "mnist-cwn", "--data", "nowhere"], "archopt data fetch mnist"),
    (["report"], "needs a folder"),
    (["report", "nowhere"], "nowhere: no such folder"),
    (["data"], "expected list, fetch or import"),
    (["data", "fetch"], "needs the name of a set"),
    (["data", "fetch", "mnits"], "no data set 'mnits'; did you mean 'mnist'"),
    (["data", "import", "nowhere"], "cannot import from nowhere"),
    (["roles"], "needs a model"),
    (["roles", "./net.py:build"], "no file"),
    (["roles", "torch.nn:Linnear"], "did you mean 'Linear'"),
    (["roles", "torch.nn:Linear"], "cannot be built: TypeError"),
    (["roles", "builtins:dict"], "gives a dict, expected a torch.nn.Module"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_answered_with_one_line(capsys, args, said, folder):
    assert said in refused(capsys, *args)
    assert not (folder / "runs").exists()


def test_the_traceback_of_bad_input_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("ARCHOPT_DEBUG", "1")
    with pytest.raises(Exception, match="no command"):
        main(["trian"])


def test_a_bug_is_not_passed_off_as_bad_input(monkeypatch):
    def broken(args):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["list"])


def test_a_run_in_the_way_is_refused_and_kept(capsys, folder):
    args = ["train", *TOY_ARGS, "--preset", "smoke", "-o", "sgd"]
    assert main(args) == DONE
    (path,) = folder.rglob("result.json")
    assert path.parent == folder / "runs/toy-smoke/sgd/lr=0.05/seed=0"  # the published rate
    before = path.read_bytes()
    capsys.readouterr()
    said = refused(capsys, *args, "--clip-norm", "2")
    assert "clip_norm: null there, 2.0 asked for" in said
    assert "--out" in said
    assert path.read_bytes() == before


@pytest.mark.skipif(
    not Path("/sys/kernel").is_dir(), reason="needs /sys, where not even root may make folders"
)
def test_no_permission_is_one_line(capsys):
    said = "no permission to write /sys/archopt"
    assert said in refused(capsys, "train", *TOY_ARGS, "--out", "/sys/archopt")
    assert said in refused(capsys, "compare", *TOY_ARGS, "--out", "/sys/archopt")


def test_a_file_where_a_folder_should_be_is_one_line(capsys, folder):
    (folder / "runs").write_text("")
    assert "cannot write runs/toy-small/nero" in refused(capsys, "train", *TOY_ARGS)
    assert "cannot write" in refused(capsys, "compare", *TOY_ARGS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write fails")
def test_a_full_disk_is_one_line(capsys, folder):
    path = folder / "runs/toy-small/sgd/lr=0.05/seed=0"
    path.mkdir(parents=True)
    (path / "checkpoint.pt.tmp").symlink_to("/dev/full")
    args = ["train", *TOY_ARGS, "-o", "sgd", "--checkpoint-seconds", "0"]
    assert "the disk is full" in refused(capsys, *args)
    assert main(args) == DONE


def test_exit_statuses_tell_failed_and_diverged_runs(capsys):
    assert main(["train", *TOY_ARGS, "--fail-at", "3"]) == RUN_FAILED
    said = capsys.readouterr().err
    assert "the run failed: ArithmeticError: asked to fail" in said
    assert said.count("\n") == 1
    assert main(["train", *TOY_ARGS, "--grow", "1e6", "-o", "sgd", "--lr", "1"]) == RUN_FAILED
    assert "diverged after" in capsys.readouterr().out


def test_options_of_a_workload_are_options_of_train(capsys, folder):
    assert (
        main(
            [
                "train",
                f"{TOY}(width=8,every=5)",
                "--preset",
                "smoke",
                "--total",
                "7",
                "-o",
                "adamw(weight_decay=0.1)",
            ]
        )
        == DONE
    )
    (file,) = folder.rglob("config.json")
    config = json.loads(file.read_text())
    assert {key: config["options"][key] for key in ("total", "width", "every")} == {
        "total": 7,
        "width": 8,
        "every": 5,
    }
    assert config["optimizer"]["options"]["weight_decay"] == 0.1
    out = capsys.readouterr().out
    assert "finished after 7 steps: accuracy" in out
    assert str(file.parent.relative_to(folder)) in out
    assert (
        main(
            [
                "train",
                f"{TOY}(width=8,every=5)",
                "--preset",
                "smoke",
                "--total",
                "7",
                "-o",
                "adamw(weight_decay=0.1)",
            ]
        )
        == DONE
    )


def test_a_workload_cannot_take_an_option_of_trains_own(capsys, folder):
    (folder / "mine.py").write_text(TOY.read_text().replace("grow: float", "seed: int = 0\n    grow: float"))
    assert "`archopt train` has an option 'seed' of its own" in refused(capsys, "train", "./mine.py")


@pytest.mark.parametrize(
    "args", [["--help"], *([command, "--help"] for command in COMMANDS), ["train", "digits", "-h"]]
)
def test_every_command_has_a_help(capsys, args):
    status = DONE
    try:
        status = main(args)
    except SystemExit as exit:  # tyro's way to end after a help
        status = exit.code or DONE
    assert status == DONE
    said = capsys.readouterr().out
    assert "usage: archopt" in said
    if "digits" in args:
        assert "--model {mlp,cnn,mlp-ln,mlp16,mlp16-ln}" in said
        assert "--optimizer" in said


def test_the_list_names_everything(capsys):
    assert main(["list"]) == DONE
    said = capsys.readouterr().out
    for name in ("digits", "mnist-mlp100", "nero-roles", "madam-cs", "muon", "archopt data fetch mnist"):
        assert name in said
    assert (
        "torch's OpenMP threads" in said
        or "threads of its own" in said
        or not kernels.status()["cpu"].available
    )
    assert main(["data", "list"]) == DONE
    assert "CC BY 4.0" in capsys.readouterr().out


def test_roles_prints_the_table_of_a_users_model(capsys, folder):
    (folder / "net.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))"
    )
    assert main(["roles", "./net.py:build"]) == DONE
    said = capsys.readouterr().out
    assert "1.weight" in said
    assert "head" in said


def test_version_and_empty_command_line(capsys):
    assert main(["--version"]) == DONE
    assert capsys.readouterr().out.startswith("archopt ")
    assert main([]) == BAD_INPUT


def heed_ctrl_c() -> None:
    """A shell without job control starts its background jobs, and so these tests, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def archopt(*args: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "archopt.lab", *args]
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_leaves_a_run_that_goes_on(folder):
    args = ["train", *TOY_ARGS, "--pause", "0.01", "--total", "200", "-o", "adam"]
    process = archopt(*args, folder=folder)
    path = folder
    until(
        lambda: (
            any(folder.rglob("metrics.jsonl")) and len(lines(next(folder.rglob("metrics.jsonl")).parent)) > 3
        ),
        process,
    )
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == STOPPED
    assert said == "archopt: stopped; the same command goes on from here\n"
    (path,) = {p.parent for p in folder.rglob("checkpoint.pt")}
    assert main(args) == DONE
    assert main([*args, "--out", "undisturbed"]) == DONE
    assert bits(path) == bits(folder / "undisturbed" / path.relative_to(folder / "runs"))


SLOW = [
    "compare",
    "./slow.py",
    "--threads",
    "1",
    "--optimizers",
    "sgd,adam",
    "--lrs",
    "default",
    "--seeds",
    "0",
    "--jobs",
    "2",
]


def slow_comparison(folder: Path) -> subprocess.Popen:
    """A comparison of two runs, both of which have begun."""
    (folder / "slow.py").write_text(TOY.read_text().replace("pause: float = 0.0", "pause: float = 0.03"))
    process = archopt(*SLOW, folder=folder)
    begun = lambda: [path for path in folder.rglob("metrics.jsonl") if len(lines(path.parent)) > 1]  # noqa: E731
    until(lambda: len(begun()) == 2, process)
    return process


def test_ctrl_c_stops_a_comparison_that_goes_on(folder):
    process = slow_comparison(folder)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == STOPPED
    assert said == "archopt: stopped; the same command goes on from here\n"
    assert len(list(folder.rglob("checkpoint.pt"))) == 2
    assert not list(folder.rglob("result.json"))


def test_workers_outlive_a_killed_comparison_only_to_write_their_checkpoints(folder):
    process = slow_comparison(folder)
    process.kill()
    process.communicate()
    paths = [path.parent for path in folder.rglob("metrics.jsonl")]
    configs = {path: json.loads((path / "config.json").read_text()) for path in paths}
    deadline = time.monotonic() + 300
    free = set()
    while len(free) < 2:
        assert time.monotonic() < deadline, "a worker goes on without a sweep"
        for path in paths:
            with (
                contextlib.suppress(RecordError),
                RunFolder(path, configs[path]) as run,
            ):  # locked while it is written
                assert run.result is None
                free.add(path)
    assert all((path / "checkpoint.pt").exists() for path in paths)
    assert not list(folder.rglob("result.json"))
