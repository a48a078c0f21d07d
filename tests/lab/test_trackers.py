"""`--log`: what TensorBoard and Weights & Biases hear of a run, and that the record does not change."""

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest

from archopt.lab.cli import BAD_INPUT, DONE, main
from archopt.lab.errors import Interrupted
from archopt.lab.trackers import check_trackers, numbers_of
from lab.running import ONE_THREAD, TOY, StopAt, bits, lines, run, toy

TENSORBOARD = dataclasses.replace(ONE_THREAD, log=("tensorboard",), checkpoint_steps=10)


def scalars(path: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: the last value of each number at each step."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(path / "tensorboard"))
    found.Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_has_every_number_of_the_record(tmp_path: Path) -> None:
    run(tmp_path / "plain", toy())
    run(tmp_path / "logged", toy(), settings=TENSORBOARD)
    assert bits(tmp_path / "logged") == bits(tmp_path / "plain")
    shown = scalars(tmp_path / "logged")
    for line in lines(tmp_path / "logged"):
        for name, value in numbers_of(line).items():
            assert math.isclose(shown[name][line["step"]], value, rel_tol=1e-6, abs_tol=1e-12)
    assert {"train/loss", "eval/accuracy", "lr"} <= set(shown)


def test_a_run_that_goes_on_shows_each_step_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, toy(), settings=TENSORBOARD, watcher=StopAt(25))
    run(tmp_path, toy(), settings=TENSORBOARD)
    steps = [line["step"] for line in lines(tmp_path)]
    assert sorted(scalars(tmp_path)["eval/accuracy"]) == steps == list(range(0, 61, 10))


def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, toy(), settings=dataclasses.replace(ONE_THREAD, log=("wandb",)))
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # another process writes it, and may still do so
    while kept.stat().st_size <= 500 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kept.stat().st_size > 500


def test_numbers_have_paths() -> None:
    line = {
        "step": 3,
        "lr": None,
        "eval": {"a": 1},
        "time": {"forward": 0.5},
        "optimizer": {"turn/head": 2.0},
    }
    assert numbers_of(line) == {"eval/a": 1.0, "time/forward": 0.5, "optimizer/turn/head": 2.0}


def test_the_command_line_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    usual = ["--jobs", "1", "--threads", "1", "--seeds", "0", "--lrs", "0.1", "--optimizers", "agd"]
    assert main(["compare", str(TOY), *usual, "--log", "tensorboard", "--out", str(tmp_path)]) == DONE
    (config,) = tmp_path.rglob("config.json")
    assert "eval/accuracy" in scalars(config.parent)
    assert "log" not in json.loads(config.read_text())


def test_what_cannot_be_logged_to_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    out = str(tmp_path / "x")
    assert main(["train", "digits", "--log", "tensorbord", "--out", out]) == BAD_INPUT
    assert "did you mean 'tensorboard'?" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "digits", "--log", "wandb", "--out", out]) == BAD_INPUT
    assert "pip install 'archopt[logging]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    check_trackers(())
