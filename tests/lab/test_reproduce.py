"""Reproductions of papers: what each trains and in what order, sharing runs, going on, and the page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from archopt.lab.calls import parse_call
from archopt.lab.cli import BAD_INPUT, DONE, main
from archopt.lab.comparisons import COMPARISONS, FirstEpoch, NamedComparison, Reading
from archopt.lab.experiment import make_workload, workload_class
from archopt.lab.fid import INCEPTION_FILE
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.report.reproduction import load_reproduction, remarks
from archopt.lab.report.text import mean_and_sd
from archopt.lab.reproduction import REPRODUCTIONS, Part, Reproduction, Request, deviations, part_plan
from lab.running import TOY
from real_data import real_data

NERO, AGD = REPRODUCTIONS["nero"], REPRODUCTIONS["agd"]


@pytest.fixture
def toy_paper(monkeypatch: pytest.MonkeyPatch) -> Reproduction:
    """A paper of three comparisons on a toy: one at published rates, one over rates, one whose data are missing."""
    toy = str(TOY)
    rows = NamedComparison(
        "rows",
        "two rules",
        "somewhere, table 1",
        (toy,),
        ("sgd", "adam"),
        (0.02, 0.05, 0.5),
        published=(
            Reading(toy, "sgd", 0.05, 0.9, 0.01),
            Reading(toy, "adam", 0.02, 0.5, 0.02),
        ),
        first_epoch=(FirstEpoch(toy, "agd", "eta", 0.5), FirstEpoch(toy, "lamb", "update", 0.25)),
        seen=("sgd learns in a minute",),
    )
    grid = NamedComparison(
        "grid",
        "rates",
        "somewhere, figure 2",
        (toy,),
        ("sgd",),
        (0.05, 0.5),
        published=(Reading(toy, "sgd", 0.05, 0.7, metric="test_loss"),),
    )
    absent = NamedComparison("absent", "no data", "nowhere", ("mnist-cwn",), ("adam",), (0.1,))
    made = Reproduction(
        "toy-paper",
        "A paper",
        (Part(grid, beside=(), over_rates=True), Part(rows, beside=("agd",)), Part(absent, beside=())),
    )
    monkeypatch.setitem(REPRODUCTIONS, "toy-paper", made)
    return made


def arguments(out: Path, *more: str) -> list[str]:
    usual = ["--preset", "smoke", "--jobs", "1", "--threads", "1", "--data", str(out / "no-data")]
    return ["reproduce", "toy-paper", *usual, "--out", str(out), *more]


def ended(out: Path) -> dict[str, int]:
    """The runs that have ended, with the time at which."""
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("result.json")}


def test_a_paper_is_trained_to_its_page(toy_paper: Reproduction, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(arguments(out, "--seeds", "0,1")) == DONE, capsys.readouterr().err
    said = capsys.readouterr().out
    order = [said.index(words) for words in ("rows, seed 0", "rows, seeds 0, 1", "grid, seed 0")]
    assert order == sorted(order)
    assert "absent is left out: " in said
    found = load_reproduction(out)
    grid, rows, absent = found.parts
    (workload,) = rows.workloads
    labels = {row.optimizer.label: [cell.lr for cell in row.cells] for row in workload.summary.rows}
    assert labels == {"sgd": [0.05], "adam": [0.02], "agd": [None]}
    assert {len(row.leading.finished) for row in workload.summary.rows} == {2}
    assert workload.deviations == {"total": [400, 5]}
    told = " ".join(remarks(workload))
    assert "total 5 instead of 400" in told
    assert "From best to worst in the paper: sgd, adam; here: " in told
    (over_rates,) = grid.workloads
    assert [cell.lr for cell in over_rates.summary.rows[0].cells] == [0.05, 0.5]
    assert "Best rates here: sgd " in " ".join(remarks(over_rates))
    assert absent.comparison is None
    assert "mnist" in absent.refused.lower()
    text = (out / "report.md").read_text()
    assert "90.00 ± 1.00" in text
    assert "Not trained here" in text
    assert "The paper's figures (read off to 10 or 20 %): sgd learns in a minute." in text
    assert "Seeds 0, 1." in text
    first = text.split("the first epoch, beside the paper's")[1].splitlines()
    agd, lamb = (
        [entry.strip() for entry in next(line for line in first if line.startswith(f"| {name}")).split("|")]
        for name in ("agd", "lamb")
    )
    assert agd[2:5:2] == ["step size eta", "0.5"]
    assert 0 < float(agd[3]) < 5
    assert lamb[2:5] == ["relative update", "–", "0.25"]
    loss = over_rates.comparable(over_rates.summary.rows[0].leading)
    assert loss is not None
    assert "| here, test loss | published lr | published |" in text
    row = next(line for line in text.split("here, test loss")[1].splitlines() if "sgd" in line)
    ours, _, paper = (entry.strip(" *") for entry in row.split("|")[5:8])
    assert (ours, paper) == (mean_and_sd(over_rates.stated, loss), "0.7")  # losses, not shares in per cent
    assert "in another metric, test\\_loss, of which ours stand beside them" in text
    page = (out / "report.html").read_text()
    assert "90.00 ± 1.00" in page
    assert (out / "rows" / "report.html").is_file()
    before = ended(out)
    assert main(["report", str(out)]) == DONE
    assert main(arguments(out, "--seeds", "0,1")) == DONE
    assert ended(out) == before


def test_while_a_comparison_goes_on_its_finished_seeds_are_shown(
    toy_paper: Reproduction, tmp_path: Path
) -> None:
    assert main(arguments(tmp_path, "--parts", "grid", "--seeds", "0,1")) == DONE
    record = tmp_path / "grid" / "comparison.json"
    told = json.loads(record.read_text())
    chosen = told["tuning"]["rates"]
    told["tuning"]["rates"] = {}  # as it is until all that tunes has ended again
    record.write_text(json.dumps(told))
    (row,) = load_reproduction(tmp_path).parts[0].workloads[0].summary.rows
    ((rate,),) = [rates["sgd"] for rates in chosen.values()]
    assert {cell.lr: len(cell.finished) for cell in row.cells} == {
        lr: 2 if lr == rate else 1 for lr in (0.05, 0.5)
    }


def test_readings_of_the_best_value_stand_beside_ours(
    toy_paper: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(str(TOY), "agd", None, 0.9, best=True)
    best = NamedComparison("best", "the best", "somewhere", (str(TOY),), ("agd",), (), published=(reading,))
    made = Reproduction("toy-paper", "A paper", (Part(best, beside=()),))
    monkeypatch.setitem(REPRODUCTIONS, "toy-paper", made)
    assert main(arguments(tmp_path, "--seeds", "0")) == DONE
    (told,) = tmp_path.rglob("metrics.jsonl")
    accuracies = [json.loads(line)["eval"]["accuracy"] for line in told.read_text().splitlines()]
    row = next(
        line for line in (tmp_path / "report.md").read_text().splitlines() if "the best on the way" in line
    )
    assert f"**{100 * max(accuracies):.2f} (90.00)**" in row


@pytest.mark.parametrize(("sgd", "said"), [(0.9, "the same order"), (0.95, "another order")])
def test_orders_mind_what_the_paper_has_alike(
    toy_paper: Reproduction, tmp_path: Path, sgd: float, said: str
) -> None:
    assert main(arguments(tmp_path, "--parts", "rows", "--seeds", "0")) == DONE
    record = tmp_path / "reproduction.json"
    told = json.loads(record.read_text())
    for reading in told["parts"][1]["workloads"][0]["published"]:
        reading["mean"] = sgd if reading["optimizer"] == "sgd" else 0.9
    record.write_text(json.dumps(told))
    workload = load_reproduction(tmp_path).parts[1].workloads[0]
    finals = {row.optimizer.label: row.leading.final.mean for row in workload.summary.rows}
    assert finals["adam"] > finals["sgd"]
    assert said in " ".join(remarks(workload))


def test_comparisons_share_their_runs(toy_paper: Reproduction, tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path, "--seeds", "0")) == DONE
    said = capsys.readouterr().out
    # sgd at 0.05 belongs to both comparisons.
    assert sum("sgd lr=0.05 seed 0: finished" in line for line in said.splitlines()) == 1
    one, other = (list((tmp_path / part).rglob("lr=0.05/seed=0/result.json")) for part in ("rows", "grid"))
    assert one[0].read_text() == other[0].read_text()


def test_one_folder_holds_one_preset(toy_paper: Reproduction, tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path, "--parts", "rows", "--seeds", "0")) == DONE
    before = (tmp_path / "reproduction.json").read_text()
    capsys.readouterr()
    assert main([word.replace("smoke", "small") for word in arguments(tmp_path, "--seeds", "0")]) == BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert "holds a reproduction with preset 'smoke', not 'small'; choose another folder with --out" in said
    assert (tmp_path / "reproduction.json").read_text() == before


def test_one_part_alone(toy_paper: Reproduction, tmp_path: Path) -> None:
    assert main(arguments(tmp_path, "--parts", "rows", "--seeds", "3")) == DONE
    assert {path.split("/")[0] for path in ended(tmp_path)} == {"rows"}
    text = (tmp_path / "report.md").read_text()
    assert "Not trained yet" in text
    row = next(line for line in text.splitlines() if "(0.7)" in line)
    assert row.startswith("| toy")
    assert "| – (0.7) |" in row  # of `grid`, which nobody has trained: what the paper says


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "needs a paper, got no name (there are nero, agd)"),
        (["nreo"], "got 'nreo'; did you mean 'nero'?"),
        (["nero", "--parts", "figure9"], "nero has no part 'figure9' (there are reparameterisation, depth"),
        (["nero", "--preset", "tiny", "--parts", "depth"], "has no preset 'tiny'"),
        (["nero", "--seeds", "a"], "--seeds 'a'"),
    ],
)
def test_what_cannot_be_reproduced_is_one_line(args: list[str], said: str, capsys, tmp_path: Path) -> None:
    assert main(["reproduce", *args, "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x" / "report.html").exists()


def test_a_target_is_for_one_comparison(toy_paper: Reproduction, tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path, "--parts", "rows", "--seeds", "0")) == DONE
    assert main(["report", str(tmp_path), "--target", "0.5"]) == BAD_INPUT
    assert "--target is for one comparison" in capsys.readouterr().err


# -- Nero's paper ------------------------------------------------------------------------------------------


def asked(preset: str, paper: Reproduction = NERO) -> Request:
    return Request(paper, preset, Path("out"))


def test_nero_has_all_nine_figures() -> None:
    sources = " ".join(part.comparison.source for part in NERO.parts)
    assert all(f"figure {number}" in sources for number in range(1, 10))
    rows = {reading.workload for part in NERO.parts for reading in part.comparison.published if reading.mean}
    assert len(rows - {"mnist-mlp100", "mnist-cwn", "mnist-cwn(sigma=100.0)"}) == 6  # the rows of the table


@pytest.mark.parametrize("part", NERO.parts, ids=lambda part: part.name)
def test_published_rates_are_those_of_the_workloads(part: Part) -> None:
    """What presets other than `paper` train at the published rates must be the rates of the table."""
    for reading in part.comparison.published if not part.over_rates else ():
        settings = workload_class(parse_call(reading.workload).name).settings
        assert parse_optimizer(reading.optimizer).published_lr(settings) == reading.lr


@pytest.mark.parametrize("preset", ["paper", "small", "smoke"])
@pytest.mark.parametrize("part", NERO.parts, ids=lambda part: part.name)
def test_every_part_has_a_plan(part: Part, preset: str) -> None:
    plan = part_plan(asked(preset), part)
    assert plan.optimizers
    assert set(plan.tuning_seeds) <= set(plan.seeds)
    for text, workload in zip(part.comparison.workloads, plan.workloads, strict=True):
        make_workload(workload_class(workload.name), preset, workload.options)
        assert deviations(text, "paper") == {}
        assert preset == "paper" or deviations(text, preset)
    grids = [choice for choice in map(parse_optimizer, plan.optimizers) if len(choice.own_lrs) > 1]
    own = any("[" in text for text in (preset != "paper" and part.reduced) or part.comparison.optimizers)
    assert bool(grids) == (own or bool(plan.tuning_seeds))


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_the_gan_is_measured_as_published_where_the_weights_are(preset: str, tmp_path: Path) -> None:
    (part,) = [part for part in NERO.parts if part.name == "gan"]
    request = replace(asked(preset), data=tmp_path)
    assert [choice.options for choice in part_plan(request, part).workloads] == [{}]
    (weights := tmp_path / INCEPTION_FILE).parent.mkdir()
    weights.touch()
    options = {"features": "inception"} if preset == "paper" else {}
    assert [choice.options for choice in part_plan(request, part).workloads] == [options]


def test_the_record_tells_what_differs(toy_paper: Reproduction, tmp_path: Path) -> None:
    main(arguments(tmp_path, "--parts", "rows", "--seeds", "0"))
    record = json.loads((tmp_path / "reproduction.json").read_text())
    assert [part["name"] for part in record["parts"]] == ["grid", "rows", "absent"]
    assert record["parts"][1]["workloads"][0]["published"][0] == {
        "optimizer": "sgd",
        "lr": 0.05,
        "mean": 0.9,
        "deviation": 0.01,
        "metric": "",
        "best": False,
    }
    assert record["parts"][1]["workloads"][0]["first_epoch"][0] == {
        "optimizer": "agd",
        "number": "eta",
        "value": 0.5,
    }
    assert set(COMPARISONS) >= {"depth", "gan", "wikitext2", "translation", "pong"}


# -- AGD's paper -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "small", "smoke"])
@pytest.mark.parametrize("part", AGD.parts, ids=lambda part: part.name)
def test_every_part_of_agd_has_a_plan(part: Part, preset: str) -> None:
    named = part.comparison
    plan = part_plan(asked(preset, AGD), part)
    assert len(plan.workloads) == len(named.trained(preset))
    for text, choice in zip(named.trained(preset), plan.workloads, strict=True):
        made = make_workload(workload_class(choice.name), preset, choice.options)
        told = deviations(text, preset, named.paper_options)
        assert bool(told) == (preset != "paper")
        assert not set(told) & made.unheeded
        published = made.settings
        for choice in map(parse_optimizer, plan.optimizers):
            assert choice.own_lrs or not choice.entry.rate or choice.published_lr(published)


def test_agd_has_the_published_experiments() -> None:
    """Section 7 of the spec, with the readings of section 6."""
    assert len({part.name for part in AGD.parts}) == len(AGD.parts) == 10
    readings = {
        (reading.workload, reading.optimizer): reading.mean
        for part in AGD.parts
        for reading in part.comparison.published
    }
    fcn, resnet = "classify(depth=16,width=512)", "classify(arch='resnet18')"
    assert (readings[fcn, "agd-paper"], readings[fcn, "adam"]) == (0.527, 0.535)
    assert (readings[resnet, "agd-paper"], readings[resnet, "adam"]) == (0.912, 0.929)
    assert readings["classify(depth=4,width=2048)", "agd-paper"] == 0.637
    paper = {part.name: part_plan(asked("paper", AGD), part) for part in AGD.parts}
    epochs = {name: plan.workloads[0].options.get("epochs") for name, plan in paper.items()}
    assert epochs == {
        "agd-default": None,  # 200, the program's own
        "agd-showcase": 1000,
        "agd-fcn": 2000,
        "agd-resnet18": 2000,
        "agd-vgg16": 2000,
        "agd-imagenet": 350,
        "agd-optimizers": 2000,
        "agd-sweep": 2000,
        "agd-batches": None,  # 500,000 steps
        "agd-rates": None,
    }
    assert paper["agd-imagenet"].workloads[0].options["train_bs"] == 1024
    assert paper["agd-batches"].workloads[-1].options == {
        "depth": 4,
        "train_bs": 4096,
        "iterations": 500_000,
    }
    grid = next(choice for choice in map(parse_optimizer, paper["agd-rates"].optimizers) if choice.own_lrs)
    assert (min(grid.own_lrs), max(grid.own_lrs), len(grid.own_lrs)) == (1e-7, 10.0, 9)


@pytest.mark.data
def test_agd_is_reproduced_to_a_page(tmp_path: Path) -> None:
    path = real_data("cifar10-half").path
    usual = [
        "--preset",
        "smoke",
        "--jobs",
        "1",
        "--threads",
        "1",
        "--data",
        str(path),
        "--out",
        str(tmp_path),
    ]
    arguments = ["reproduce", "agd", "--parts", "agd-batches,agd-vgg16", *usual]
    assert main(arguments) == DONE
    text = (tmp_path / "report.md").read_text()
    assert "58.00" in text  # the paper's accuracy at 128, beside ours
    assert text.count("| train\\_bs | optimiser | here, at the end | here, best on the way |") == 1
    assert "The paper's figures (read off to 10 or 20 %): eta dips early" in text
    assert (
        "Means of the step size eta over the steps of an epoch, classify (smoke, train\\_bs=4096, depth=4)"
        in text
    )
    pictures = {path.name for path in (tmp_path / "agd-batches" / "figures").glob("*.png")}
    assert {"sweep-train_bs.png", "sweep-train_bs-agd-paper-eta.png"} <= pictures
    page = (tmp_path / "report.html").read_text()
    assert all(f"agd-batches/figures/{name}" in page for name in ("sweep-train_bs.png",))
    assert "iterations unset instead of 500000" in text
    assert "Not trained here: cifar100: train is not in" in text
    assert "channels" not in text
    before = ended(tmp_path)
    assert len(before) == 4
    assert main(arguments) == DONE
    assert ended(tmp_path) == before
