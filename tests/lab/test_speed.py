"""`archopt speed`: what is measured, the arithmetic of the record, its tables and picture, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import archopt
from archopt.lab.cli import BAD_INPUT, DONE, main
from archopt.lab.errors import LabError
from archopt.lab.speed import bench as benches
from archopt.lab.speed import record as records
from archopt.lab.speed import rounds, sets, table
from archopt.lab.speed.bench import Bench
from archopt.lab.speed.contenders import ADD, CONTENDERS, COPY, IDENTITY, choose, form_of
from archopt.lab.speed.streams import STREAMS, Streams
from archopt.optim import orthogonalise


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, messages that do not wrap, and a set that is measured in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
        )

    small = sets.ParameterSet("a tiny network", build, lambda batch: torch.randn(batch, 3, 8, 8), batch=2)
    monkeypatch.setitem(sets.SETS, "tiny", small)


CPU = torch.device("cpu")
FAST = ["speed", "--sets", "tiny", "--device", "cpu", "--seconds", "0.001"]


def run(*more: str) -> dict[str, Any]:
    assert main([*FAST, *more, "--name", "mine"]) == DONE
    return json.loads(Path("runs/speed/mine.json").read_text())


# -- sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet18", 62, 11_689_512),  # torchvision's counts
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),  # the released checkpoints' counts
        ("gpt2-medium", 292, 354_823_168),
        ("gpt2-xl", 580, 1_557_611_200),
    ],
)
def test_sets_are_the_published_networks(name: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = sets.SETS[name].build()
    assert len(list(model.parameters())) == tensors
    assert sets.count(name) == parameters


def test_the_gpt_ties_its_table_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "VOCABULARY", 11)
    monkeypatch.setattr(sets, "CONTEXT", 6)
    small = sets._gpt2("tiny", width=8, depth=1, heads=2, batch=2)
    model = small.build()
    assert {role.kind for role, p in archopt.parameter_roles(model).items() if p.shape == (11, 8)} == {"tied"}
    small.loss(model, small.inputs(2), torch.float32).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# -- streams -----------------------------------------------------------------------------------------------


def test_streams_of_the_bounds() -> None:
    own = {name: STREAMS[name].bytes(torch.float32) / 4 for name in STREAMS}
    assert own == {
        "copy": 2, "add": 3, "sgd": 3, "nero": 3, "agd": 4, "adamw": 7, "lamb": 11, "madam": 6, "autonero-turn": 9,
    }  # fmt: skip
    assert Streams(4, 2).bytes(torch.bfloat16) == 4 * 2 + 2 * 4


def test_every_contender_names_streams_that_there_are() -> None:
    assert {c.streams for c in CONTENDERS.values()} - {None} <= set(STREAMS)


# -- measuring ---------------------------------------------------------------------------------------------


def test_all_are_measured_on_the_same_weights_and_leave_their_gradients() -> None:
    bench = Bench("tiny", CPU, torch.float32)
    before = [(p.detach().clone(), p.grad.clone()) for p in bench.params if p.grad is not None]
    rows = rounds.measure(bench, choose(None, []), 0.001, lambda text: None)
    by_name = {row.name: row for row in rows}
    assert list(by_name) == [COPY, ADD, *CONTENDERS]
    assert {row.name: row.reason for row in rows if row.status != "measured"} == (
        {} if hasattr(torch.optim, "Muon") else {"muon": by_name["muon"].reason}
    )
    for row in rows:
        assert row.status != "measured" or row.samples >= rounds.FEWEST
        assert all(s > 0 for found in row.rounds.values() for s in found)
    bench.restore()
    for param, (weight, grad) in zip(bench.params, before, strict=True):
        assert torch.equal(param, weight)
        assert torch.equal(param.grad, grad)
    total = sum(p.numel() for p in bench.params)
    matrices = sum(p.numel() for p in bench.params if p.ndim >= 2)
    assert by_name["nero"].entries == by_name["autonero"].entries == total
    assert by_name["agd-published"].entries == matrices
    assert by_name["agd-published"].state_bytes == by_name["sgd-fused"].state_bytes == 0
    assert by_name["adamw-fused"].state_bytes == 8 * total + 4 * len(bench.params)
    assert IDENTITY not in orthogonalise.METHODS


def test_half_precision_is_built_in_its_type() -> None:
    bench = Bench("tiny", CPU, torch.bfloat16)
    assert {p.dtype for p in bench.params} == {torch.bfloat16}
    rows = rounds.measure(bench, choose(["nero", "adamw-fused"], []), 0.001, lambda text: None)
    assert [row.status for row in rows] == ["measured"] * 4


def test_transient_memory_is_what_a_step_holds_at_once() -> None:
    bench = Bench("tiny", CPU, torch.float32)

    def step() -> None:
        first = torch.empty(1000)  # 4000 bytes
        del first
        second, third = torch.empty(2000), torch.empty(500)
        del second, third

    assert bench.transient_bytes(step) == 10_000


def test_the_identity_takes_the_place_of_the_orthogonalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setitem(orthogonalise.METHODS, "newton-schulz", lambda m: calls.append(m.shape) or m)
    bench = Bench("tiny", CPU, torch.float32)
    for name, expected in (("autonero", True), ("autonero-turn", False)):
        calls.clear()
        with CONTENDERS[name].circumstances():
            CONTENDERS[name].build(bench.model).step()
        assert bool(calls) == expected


def test_muon_is_measured_with_the_fused_adamw() -> None:
    pytest.importorskip("torch", minversion="2.9")
    bench = Bench("tiny", CPU, torch.float32)
    optimizer = CONTENDERS["muon"].build(bench.model)
    optimizer.step()
    assert optimizer.inner["adamw"].param_groups[0]["fused"] is True


def test_the_form_is_found_by_insisting_on_the_fused_one() -> None:
    def build(fused: bool) -> None:
        if answer:
            raise ValueError(answer)

    nero = CONTENDERS["nero"]
    answer = ""
    assert form_of(nero, build, CPU).startswith("fused")
    answer = "not built"
    assert form_of(nero, build, CPU) == "foreach, at least in part (not built)"
    assert form_of(CONTENDERS["nero-plain"], build, CPU) == "plain"


class Broken(torch.optim.SGD):
    """Fails in its second step."""

    def step(self, closure: Any = None) -> None:
        if getattr(self, "stepped", False):
            raise ArithmeticError("nothing works")
        self.stepped = True


class Peer(torch.optim.SGD):
    """Whatever anybody has installed."""


def test_peers_are_measured_in_the_same_run_and_their_faults_are_told() -> None:
    record = run("--peer", f"{__name__}:Peer,{__name__}:Broken", "--optimizers", "nero")
    rows = {row["name"]: row for row in record["tables"][0]["rows"]}
    assert rows[f"{__name__}:Peer"]["status"] == "measured"
    broken = rows[f"{__name__}:Broken"]
    assert (broken["status"], broken["reason"]) == ("failed", "ArithmeticError: nothing works")
    assert broken["rounds"] == {}


def test_training_step_gives_shares() -> None:
    record = run("--training-step", "--batch", "3", "--optimizers", "nero,adamw-fused")
    found = record["tables"][0]
    assert found["training_step"]["batch"] == 3
    for row in found["rows"][2:]:
        assert row["training_share"] == row["median"] / (row["median"] + found["training_step"]["median"])
    assert found["rows"][0]["training_share"] is None


# -- memory ------------------------------------------------------------------------------------------------


def test_a_set_that_does_not_fit_is_refused_in_one_line(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "free_memory", lambda device: 1000)
    assert main(FAST) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "tiny in float32 needs 2.02e-05 GB for weights, gradients and a copy" in said
    assert not list(Path("runs/speed").glob("*.json"))


def test_xl_needs_three_times_its_size_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "free_memory", lambda device: 10**10)
    with pytest.raises(LabError, match=r"gpt2-xl in float32 needs 18\.7 GB"):
        Bench("gpt2-xl", CPU, torch.float32)


def test_a_row_that_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("tiny", CPU, torch.float32)
    enough = 2 * bench.entries * 4  # for the limits and for fused AdamW's state
    monkeypatch.setattr(benches, "free_memory", lambda device: enough)
    rows = rounds.measure(bench, choose(["adamw-foreach", "adamw-fused"], []), 0.001, lambda text: None)
    assert [row.status for row in rows] == ["measured", "measured", "left out", "measured"]
    assert rows[2].reason.startswith("needs ")


# -- the record --------------------------------------------------------------------------------------------


def row(name: str, streams: str | None, seconds: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "what": name,
        "style": "nero" if streams not in ("copy", "add") else "",
        "form": "",
        "streams": streams,
        "status": "measured",
        "reason": "",
        "entries": 1000,
        "state_bytes": 0,
        "transient_bytes": 0,
        "rounds": seconds,
        **more,
    }


def made(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    found = {
        "set": "tiny",
        "what": "a net",
        "dtype": "float32",
        "tensors": 1,
        "parameters": 1000,
        "rows": rows,
    }
    return records.derive({**found, "training_step": None, **more})


def test_ratios_are_medians_over_rounds_and_bandwidth_counts_the_streams() -> None:
    limits = [
        row("copy", "copy", {"0": [2e-6], "1": [2e-6], "2": [4e-6]}),
        row("add_", "add", {"0": [3e-6], "1": [2e-6, 4e-6], "2": [6e-6]}),
    ]
    adamw = row("adamw-fused", "adamw", {"0": [9e-6], "1": [9e-6], "2": [9e-6]}, state_bytes=8000)
    nero = row(
        "nero",
        "nero",
        {"0": [3e-6, 3e-6, 6e-6], "1": [6e-6], "2": [9e-6]},
        state_bytes=100,
        transient_bytes=400,
    )
    peer = row("peer", None, {"1": [30e-6]})
    found = {
        r["name"]: r for r in made([*limits, adamw, nero, peer], training_step={"median": 12e-6})["rows"]
    }
    nero = found["nero"]
    assert nero["median"] == 6e-6
    assert nero["quartiles"] == [3e-6, 6e-6]
    assert nero["to_add_by_round"] == pytest.approx([1.0, 2.0, 1.5])
    assert nero["to_add"] == pytest.approx(1.5)
    assert nero["to_adamw"] == pytest.approx(2 / 3)
    assert nero["bound_to_add"] == 1
    assert found["adamw-fused"]["bound_to_add"] == pytest.approx(7 / 3)
    assert nero["bandwidth"] == pytest.approx(3 * 4 * 1000 / 6e-6)
    assert nero["of_copy"] == pytest.approx(
        1.5 / 2.25
    )  # three streams to a copy's two, in 2.25 times its time
    assert nero["state_per_parameter"] == 0.1
    assert nero["transient"] == 0.1
    assert nero["training_share"] == pytest.approx(1 / 3)
    assert found["copy"]["of_copy"] == 1
    assert found["peer"]["to_add"] == pytest.approx(10)
    assert found["peer"]["bandwidth"] is found["peer"]["of_copy"] is found["peer"]["bound_to_add"] is None


def test_bounds_count_half_precision_and_the_weights_that_a_rule_moves() -> None:
    rows = [
        row("add_", "add", {"0": [1e-6]}),
        row("agd-published", "agd", {"0": [1e-6]}, entries=750),
        row("lamb", "lamb", {"0": [1e-6]}),
    ]
    found = {r["name"]: r for r in made(rows, dtype="bfloat16")["rows"]}
    assert found["agd-published"]["bound_to_add"] == pytest.approx(4 * 750 / 3000)
    assert found["lamb"]["bound_to_add"] == pytest.approx((5 * 2 + 6 * 4) / (3 * 2))
    assert found["lamb"]["to_adamw"] is None


def test_the_record_tells_machine_and_command_and_reads_back() -> None:
    record = run("--optimizers", "nero,adamw-fused", "--dtype", "float32,bfloat16")
    assert record["complete"] is True
    assert record["command"].startswith("archopt speed --sets tiny")
    assert record["hardware"]["cpu"]
    assert record["software"]["torch"] == torch.__version__
    assert record["software"]["threads"] == torch.get_num_threads()
    assert [t["dtype"] for t in record["tables"]] == ["float32", "bfloat16"]
    assert records.read(Path("runs/speed/mine.json")) == record


def test_nothing_is_overwritten(capsys) -> None:
    run("--optimizers", "nero")
    before = Path("runs/speed/mine.json").read_text()
    capsys.readouterr()
    assert main([*FAST, "--name", "mine"]) == BAD_INPUT
    assert "is there already" in capsys.readouterr().err
    assert Path("runs/speed/mine.json").read_text() == before


def test_from_prints_markdown_and_draws_again(capsys) -> None:
    record = run("--optimizers", "nero,adamw-fused,agd-published")
    pictures = [Path("runs/speed/mine.svg"), Path("runs/speed/mine.png")]
    assert pictures[0].read_text().startswith("<svg")
    assert pictures[1].read_bytes().startswith(b"\x89PNG")
    for picture in pictures:
        picture.unlink()
    capsys.readouterr()
    assert main(["speed", "--from", "runs/speed/mine.json"]) == DONE
    said = capsys.readouterr()
    assert said.out == table.markdown(record)
    rows = [line.split("|")[1].strip() for line in said.out.splitlines() if line.startswith("| ")]
    assert rows[0] == "step"
    assert set(rows) >= {"nero", "adamw-fused", "agd-published", "copy", r"add\_"}
    assert all(picture.exists() for picture in pictures)


def test_tables_print_wide_and_narrow(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--optimizers", "nero")
    assert "quartiles" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*FAST, "--optimizers", "nero", "--name", "narrow"]) == DONE
    said = capsys.readouterr().out
    assert "quartiles" not in said
    assert "transient" in said


WITHOUT = """
import sys
for name in ("altair", "vl_convert", "PIL", "torchmetrics"):
    sys.modules[name] = None
import torch
from torch import nn
from archopt.lab.cli import main
from archopt.lab.speed import sets
sets.SETS["tiny"] = sets.ParameterSet("tiny", lambda: nn.Linear(8, 4), lambda batch: torch.randn(batch, 8), 2)
sys.exit(main(["speed", "--sets", "tiny", "--device", "cpu", "--seconds", "0.001", "--optimizers", "nero"]))
"""


def test_without_the_drawing_packages_the_record_is_made_all_the_same() -> None:
    here = {**os.environ, "PYTHONPATH": str(Path(archopt.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False, env=here
    )
    assert done.returncode == DONE, done.stderr
    assert "no picture: altair is not installed" in done.stdout
    assert len(list(Path("runs/speed").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--sets", "resnet81"], "--sets 'resnet81'; did you mean 'resnet18'"),
        (["--sets", "tiny", "--dtype", "float23"], "did you mean 'float32'"),
        (
            ["--sets", "tiny", "--optimizers", "neor"],
            "nothing is measured by the name 'neor'; did you mean 'nero'",
        ),
        (["--sets", "tiny", "--peer", "no_such_package:Nero"], "cannot import no_such_package"),
        (["--sets", "tiny", "--peer", "json:JSONDecoder"], "expected a subclass of torch.optim.Optimizer"),
        (["--sets", "tiny", "--seconds", "0"], "--seconds 0.0, expected more than 0"),
        (["--sets", "tiny", "--device", "tpu"], "expected cpu, cuda"),
        (["--sets", "tiny", "--name", "a/b"], "expected letters"),
        (["--from", "nothing.json"], "no record nothing.json"),
        (["--second", "3"], "no option --second; did you mean '--seconds'"),
    ],
)
def test_bad_input_is_answered_in_one_line(capsys, args: list[str], reason: str) -> None:
    assert main(["speed", *args]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 1, "tables": [{}]}', "[]", "no json"])
def test_a_damaged_record_is_refused(capsys, content: str) -> None:
    Path("bad.json").write_text(content)
    assert main(["speed", "--from", "bad.json"]) == BAD_INPUT
    assert "bad.json" in capsys.readouterr().err
