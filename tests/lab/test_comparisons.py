"""Published comparisons by name: what each asks for, and that options on the command line win over it."""

import dataclasses
from pathlib import Path

import pytest

from archopt.lab import options
from archopt.lab.calls import parse_call
from archopt.lab.cli import BAD_INPUT, DONE, main
from archopt.lab.commands import Compare, _named, of_comparison, plan
from archopt.lab.comparisons import COMPARISONS, at_rates, spelled
from archopt.lab.experiment import make_workload, workload_class
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.plan import Plan, plan_runs
from archopt.lab.report.load import load
from archopt.lab.workloads import registry
from lab.running import TOY

FINE = [0.01, 0.02, 0.04, 0.06, 0.08, 0.1]


def asked(*args: str) -> Compare:
    """What `archopt compare` makes of these arguments."""
    first = options.parse(Compare, list(args), prog="archopt compare", description="")
    named = _named(first.workloads)
    assert named is not None
    usual = Compare(**spelled(named))
    return of_comparison(
        named, options.parse(Compare, list(args), prog="archopt compare", description="", default=usual)
    )


def rates(plan: Plan) -> dict[str, list[float]]:
    """The rates of each optimiser, which all are in its brackets, by its label."""
    choices = [parse_optimizer(text) for text in plan.optimizers]
    return {choice.label: list(choice.own_lrs) for choice in choices}


def test_the_ablation_is_the_paper_s_figure_1() -> None:
    made = plan(asked("ablation"), "")
    assert [choice.name for choice in made.workloads] == ["cifar10-vgg11"]
    assert rates(made) == {
        "nero": FINE,
        "nero(zero_mean=False)": FINE,
        "nero(unit_norm=False)": FINE,
        "nero(unit_norm=False,zero_mean=False)": FINE,
    }
    assert list(made.seeds) == [0, 1, 2]
    assert list(made.tuning_seeds) == [0]
    assert made.out == Path("runs/compare-ablation-small")


def test_the_granularity_study_is_figure_2() -> None:
    found = rates(plan(asked("granularity"), ""))
    assert list(found) == [
        "madam",
        "nero(unit_norm=False,zero_mean=False)",
        "lamb",
        "madam-cs",
        "nero",
        "lamb-cs",
    ]
    assert all(tried == FINE for tried in found.values())
    cls = workload_class("cifar10-vgg11")
    assert parse_optimizer("lamb").resolved(cls.settings)["betas"] == (0.0, 0.999)
    assert parse_optimizer("lamb-cs").resolved(cls.settings)["betas"] == (0.0, 0.999)


def test_the_benchmark_is_figure_6() -> None:
    made = plan(asked("cifar10"), "")
    assert [choice.name for choice in made.workloads] == ["cifar10-vgg11", "cifar10-resnet18"]
    assert rates(made) == {name: [1e-4, 1e-3, 1e-2, 0.1, 1.0] for name in ("nero", "sgd", "adam", "lamb")}


def test_options_on_the_command_line_win() -> None:
    other = asked("ablation", "--preset", "smoke", "--seeds", "3,4", "--optimizers", "agd,adam(lr=0.5),sgd")
    assert (other.preset, other.seeds, other.tuning_seeds) == ("smoke", "3,4", "3")
    assert rates(plan(other, "")) == {"agd": [], "adam(lr=0.5)": [0.5], "sgd": FINE}
    assert other.out == Path("runs/compare-ablation-smoke")
    other = asked("ablation", "--lrs", "0.5", "--tuning-seeds", "1", "--out", "here")
    assert (other.lrs, other.tuning_seeds, other.out) == ("0.5", "1", Path("here"))
    assert other.optimizers == ",".join(COMPARISONS["ablation"].optimizers)


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_can_be_asked_for(name: str) -> None:
    named = COMPARISONS[name]
    made = plan(asked(name), "")
    assert name not in registry()
    assert all(tried for label, tried in rates(made).items() if parse_optimizer(label).entry.rate)
    for preset in ("paper", "small", "smoke"):
        for call in map(parse_call, named.trained(preset).values()):
            make_workload(workload_class(call.name), preset, call.options)
    for reading in named.published:
        assert reading.workload in named.workloads
        tried = parse_optimizer(at_rates(reading.optimizer, named.lrs))
        assert reading.optimizer in named.optimizers
        assert reading.lr in (None, *tried.own_lrs)
        assert reading.lr is not None or named.source.startswith("AGD")  # Nero's paper tells every rate


def test_a_comparison_may_be_longer_and_larger_in_the_paper_than_in_its_reductions() -> None:
    paper, small = (
        plan(asked("agd-sweep", "--preset", preset), "").workloads for preset in ("paper", "small")
    )
    assert (len(paper), len(small)) == (30, 20)
    assert paper[5].options == {"depth": 2, "width": 2048, "epochs": 2000}
    assert small[-1].options == {"depth": 32, "width": 512}
    assert {choice.preset for choice in small} == {"small"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ablation", "digits"], "ablation is a comparison: give its name alone"),
        (["ablation(width=4)"], "ablation is a comparison: give its name alone"),
        (["ablatoin"], "no workload and no comparison 'ablatoin'; did you mean 'ablation'?"),
        (["ablation", "--seeds", "0", "--tuning-seeds", "1"], "--tuning-seeds has 1"),
        (["ablation", "--lrs", "a"], "--lrs 'a', expected grid"),
    ],
)
def test_what_cannot_be_compared_is_one_line(args: list[str], said: str, capsys, tmp_path: Path) -> None:
    assert main(["compare", *args, "--out", str(tmp_path / "x")]) == BAD_INPUT
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_the_list_shows_them(capsys) -> None:
    assert main(["list"]) == DONE
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMPARISONS)
    assert "26 more" in shown  # of a sweep's 30 workloads


def test_a_named_comparison_runs_to_its_page(monkeypatch, capsys, tmp_path: Path) -> None:
    """On a toy workload; the seeds that do not tune run the best rate and the default where it was tried."""
    toy = dataclasses.replace(
        COMPARISONS["ablation"],
        name="toy",
        workloads=(str(TOY),),
        optimizers=("nero", "sgd(momentum=0.5)"),
        lrs=(0.01, 0.05),
    )
    monkeypatch.setitem(COMPARISONS, "toy", toy)
    out = tmp_path / "out"
    arguments = ["--preset", "smoke", "--seeds", "0,1", "--jobs", "1", "--threads", "1", "--out", str(out)]
    assert main(["compare", "toy", *arguments]) == DONE, capsys.readouterr().err
    (workload,) = load(out).workloads
    assert {run.status for run in workload.runs} == {"finished"}
    by_seed = [sum(run.seed == seed for run in workload.runs) for seed in (0, 1)]
    assert by_seed[0] == 4
    assert 2 <= by_seed[1] <= 3
    assert (out / "report.html").is_file()
    assert "archopt compare toy --preset smoke" in load(out).command


def test_plans_of_different_variants_are_different_runs(tmp_path: Path) -> None:
    made = plan(asked("ablation", "--out", str(tmp_path)), "")
    made = dataclasses.replace(made, workloads=[dataclasses.replace(made.workloads[0], name=str(TOY))])
    specs = plan_runs(made)
    assert len(specs) == len({spec.path for spec in specs}) == 4 * 6 * 3
    options = [spec.config["optimizer"]["options"] for spec in specs if spec.seed == 0 and spec.lr == 0.02]
    assert sorted((o["zero_mean"], o["unit_norm"]) for o in options) == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
