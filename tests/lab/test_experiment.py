"""Workloads by name and from a user's file, with presets and options."""

from pathlib import Path

import pytest
import torch

from archopt.lab.data import DataError
from archopt.lab.errors import LabError
from archopt.lab.experiment import WorkloadChoice, make_workload, open_experiment, workload_class
from lab.running import TOY, toy

MINIMAL = """
import torch
from torch import nn
from archopt.lab.workload import Metric, Workload

class Mine(Workload):
    metric = Metric("loss", "loss", higher_is_better=False)
    steps, eval_every = 4, 2
    width: int = 3
    def build(self): return nn.Linear(self.width, 1)
    def batch(self, step, seed): return torch.randn(5, self.width)
    def loss(self, model, batch): return model(batch).square().mean(), {}
    def evaluate(self, models): return {"loss": float(models["model"].weight.square().sum())}
"""


def write(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return str(file)


def opened(name: str, **options):
    return open_experiment(WorkloadChoice(name, "small", options), None, torch.device("cpu"))


def test_a_users_file_needs_neither_a_name_nor_a_decorator(tmp_path: Path):
    experiment = opened(write(tmp_path, MINIMAL), width=5)
    assert (experiment.workload.name, experiment.options) == ("mine", {"width": 5})
    assert experiment.workload.build().weight.shape == (1, 5)
    assert experiment.folder.startswith("mine-small-")
    assert opened(write(tmp_path, MINIMAL)).folder == "mine-small"


def test_the_files_content_is_part_of_a_runs_identity(tmp_path: Path):
    first = opened(write(tmp_path, MINIMAL)).source
    assert opened(write(tmp_path, MINIMAL)).source == first
    assert opened(write(tmp_path, MINIMAL + "# changed\n")).source != first


def test_a_file_imports_its_neighbours(tmp_path: Path):
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 11")
    text = MINIMAL.replace("import torch\n", "import torch\nfrom neighbour_of_mine import WIDTH\n", 1)
    assert opened(write(tmp_path, text.replace("width: int = 3", "width: int = WIDTH"))).options == {
        "width": 11
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "must define one subclass .* it defines none"),
        (MINIMAL + "class Other(Mine): pass", r"must define one subclass .* it defines Mine, Other"),
        (MINIMAL + "WORKLOAD = 3", "WORKLOAD is 3"),
        (MINIMAL.replace("metric = ", "other = "), r"needs metric = Metric\("),
        (MINIMAL + "1 / 0", "ZeroDivisionError"),
        (MINIMAL.replace("steps, eval_every = 4, 2", ""), "must define steps"),
        (MINIMAL.replace("= 4, 2", "= 0, 2"), "steps is 0, expected a whole number"),
        (
            MINIMAL + "    def load(self, data): raise KeyError('pixels')",
            "cannot load its data: KeyError: 'pixels'",
        ),
    ],
)
def test_what_a_users_file_lacks_is_said_in_one_line(tmp_path: Path, text, said):
    with pytest.raises(LabError, match=said) as refused:
        opened(write(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_workload_names_one_of_several(tmp_path: Path):
    assert opened(write(tmp_path, MINIMAL + "class Other(Mine): pass\nWORKLOAD = Mine")).workload.steps == 4


@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        ("smal", {}, "no preset 'smal'; did you mean 'small'"),
        ("small", {"widht": 3}, "no option 'widht'; did you mean 'width'"),
        ("small", {"width": 1.5}, "width=1.5, expected int"),
        ("small", {"width": True}, "width=True, expected int"),
        ("small", {"pause": "long"}, "pause='long', expected float"),
    ],
)
def test_presets_and_options_are_checked(preset, options, said):
    with pytest.raises(LabError, match=said):
        make_workload(workload_class(str(TOY)), preset, options)


def test_choices_are_checked_and_numbers_widened():
    digits = workload_class("digits")
    with pytest.raises(LabError, match="model='cn', expected 'mlp' or 'cnn'"):
        make_workload(digits, "small", {"model": "cn"})
    assert make_workload(workload_class(str(TOY)), "small", {"pause": 1}).pause == 1


def test_unknown_workloads_are_refused_with_the_nearest():
    with pytest.raises(LabError, match="no workload 'digit'; did you mean 'digits'"):
        workload_class("digit")
    with pytest.raises(LabError, match="no file"):
        workload_class("./nowhere.py")


def test_missing_data_is_said_with_the_command(tmp_path: Path):
    with pytest.raises(DataError, match="archopt data fetch mnist"):
        open_experiment(WorkloadChoice("mnist-mlp100", "smoke"), tmp_path, torch.device("cpu"))


def test_folders_tell_options_apart_from_the_presets():
    assert toy().folder == "toy-small"
    assert toy(width=16).folder == "toy-small"  # as it is anyway
    assert len({toy(width=width).folder for width in (16, 17, 18)}) == 3
