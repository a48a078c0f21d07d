"""What the report leaves behind: the page, the files beside it, the tables in the terminal."""

import ast
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import archopt.lab.report
from archopt.lab.report import ReportError, print_table, write_report
from report_records import ACCURACY, LOSS, Invented, write_comparison, write_run

EVIL = '<img src=x onerror="alert(1)">|`*_</script>'
NERO = Invented("nero", 0.01, 0.01, 1.0, 1.0)
FREE = Invented("agd", None, None, 1.2, 1.0)
WILD = Invented("sgd", 0.1, 0.01, 1.1, 1.0, diverges_above=0.03)
CLEVER = Invented(EVIL, 0.01, 0.02, 1.1, 1.0)
PACKAGE = Path(archopt.lab.report.__file__).parent


class Reader(HTMLParser):
    """The page as a browser takes it apart: its tags with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workloads, four optimisers; one has an evil name, one diverges, a run failed and a run is missing."""
    root = tmp_path_factory.mktemp("out")
    write_comparison(
        root,
        optimizers=(NERO, FREE, WILD, CLEVER),
        lrs=(0.01, 0.1),
        seeds=(0, 1),
        workloads=(("digits", ACCURACY, 1.0), ("words", LOSS, 1.0)),
    )
    write_run(root / "digits-small", NERO, 0.1, 0, status="failed")
    for file in (root / "digits-small/nero/lr=0.1/seed=1").iterdir():
        file.unlink()
    assert write_report(root) == root / "report.html"
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> Reader:
    return Reader((folder / "report.html").read_text())


def test_the_page_asks_for_nothing_from_outside(page: Reader):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "base")
        assert "src" not in attributes
        if href := attributes.get("href"):
            assert not re.match(r"[a-z]+:|//", href)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_the_page_holds_its_program_and_a_valid_picture_for_every_place(page: Reader):
    data = json.loads(page.scripts[0])
    places = [int(a["data-spec"] or -1) for tag, a in page.tags if tag == "div" and "data-spec" in a]
    assert places == list(range(len(data["specs"])))
    assert all(
        spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/") for spec in data["specs"]
    )
    assert len(data["specs"]) > 20
    assert "vegaEmbed" in page.scripts[1]


def test_names_of_users_cannot_break_out_of_the_page(folder: Path, page: Reader):
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.scripts) == 3
    assert EVIL in page.words  # it is shown as it is
    assert "<img" not in (folder / "table.md").read_text()
    lines = (folder / "table.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| optimiser"))
    evil = next(line for line in lines if line.startswith("| &lt;img"))
    assert len(re.findall(r"(?<!\\)\|", evil)) == len(re.findall(r"(?<!\\)\|", header))


def test_every_optimiser_has_a_line_in_every_table(folder: Path):
    document = (folder / "report.html").read_text()
    tables = re.findall(r"<table><thead>.*?</table>", document, flags=re.S)
    assert len(tables) == 8  # two over all, three a workload
    by_workload, *by_optimiser = tables
    assert by_workload.count("<tr>") == 1 + 2
    assert by_workload.count("<th ") == 1 + 4
    for table in by_optimiser:
        assert table.count("<tr>") == 1 + 4


def test_the_page_tells_of_diverged_failed_and_missing_runs(page: Reader):
    words = " ".join(page.words)
    assert re.search(r"Runs 28: \d+ finished, \d+ diverged, 1 failed, 1 missing", words)
    assert "2/2 diverged" in words
    assert "nero failed: ValueError: refuses a network with vectors" in words
    assert "1 of 14 runs are missing or unfinished" in words
    assert words.count("digits-small/nero/") == 3  # the folders of those of its four runs that are there


def test_the_page_tells_where_its_numbers_come_from(page: Reader):
    words = " ".join(page.words)
    for part in (
        "archopt compare digits --optimizers nero,agd,adamw",
        "PyTorch 2.13.0",
        "Invented CPU, 2 cores",
        "population standard deviation over the seeds 0 and 1",
        "slightly optimistic",
        "Options: width = 64",
    ):
        assert part in words


def test_the_header_names_every_environment_that_differs(tmp_path: Path):
    write_comparison(tmp_path, optimizers=(FREE,), seeds=(0, 1))
    path = tmp_path / "digits-small/agd/lr=auto/seed=1/config.json"
    config = json.loads(path.read_text())
    config["environment"]["torch"] = "2.7.0"
    path.write_text(json.dumps(config))
    words = " ".join(Reader(write_report(tmp_path).read_text()).words)
    assert re.search(r"PyTorch 2\.13\.0.*\(1 runs\); .*PyTorch 2\.7\.0.*\(1 runs\)", words)


def test_pictures_and_tables_lie_beside_the_page(folder: Path, page: Reader):
    linked = {a["href"] for tag, a in page.tags if tag == "a"}
    for kind in ("png", "svg"):
        files = sorted((folder / "figures").glob(f"*.{kind}"))
        assert len(files) == 12
        assert {f"figures/{file.name}" for file in files} <= linked
    assert (folder / "figures/regret.png").read_bytes().startswith(b"\x89PNG")
    for file in (folder / "figures").glob("*.svg"):
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
    record = json.loads((folder / "table.json").read_text())
    nero = next(row for row in record["workloads"][0]["optimizers"] if row["label"] == "nero")
    assert nero["default"]["runs"]["finished"] == 2
    assert [rate["lr"] for rate in nero["rates"]] == [0.01, 0.1]
    assert not list(folder.rglob("*.tmp"))


def test_the_report_of_the_same_records_is_the_same(tmp_path: Path):
    write_comparison(tmp_path, optimizers=(FREE,), seeds=(0,))
    before = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == before


def test_a_target_can_be_given(folder: Path, tmp_path: Path):
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    print_table(folder, console, target={"digits": 0.5})
    words = console.export_text()
    assert "steps and time to test accuracy 50.00 %" in words
    assert "50.00 %, as asked for" in words


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal_and_lose_no_optimiser_and_no_mishap(
    folder: Path, tmp_path: Path, width: int
):
    console = Console(width=width, record=True, file=(tmp_path / "out").open("w"))
    print_table(folder, console)
    words = console.export_text()
    assert max(map(len, words.splitlines())) <= width
    assert "…" not in words
    for part in (
        "nero",
        "agd",
        "sgd",
        "2/2 diverged",
        "1 failed",
        "1 missing",
        "digits (small)",
        "words (small)",
    ):
        assert part in words


def test_a_table_over_many_workloads_is_printed_in_parts_whose_words_are_whole(tmp_path: Path):
    """Sixteen columns in one table of 80 would be letters below one another."""
    names = [f"{kind}-recognition" for kind in ("digits", "letters", "faces", "voices", "birds", "leaves")]
    workloads = [(name, ACCURACY, 1.0) for name in names]
    write_comparison(tmp_path, optimizers=(FREE,), seeds=(0,), workloads=workloads)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    print_table(tmp_path, console)
    words = console.export_text()
    assert max(map(len, words.splitlines())) <= 80
    after = words[words.index("all workloads: regret of the default") :]
    assert after.count("all workloads: regret of the default") > 1
    for column in (*names, "targets"):
        assert after.count(column) == 1


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path):
    write_comparison(tmp_path, optimizers=(FREE,), seeds=(0,))
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(
        ReportError, match=r"cannot write .*figures/digits-small-.*; the records are unharmed"
    ):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_single_seed_and_a_single_setting_make_a_page(tmp_path: Path):
    write_comparison(tmp_path, optimizers=(FREE,), seeds=(0,))
    words = " ".join(Reader(write_report(tmp_path).read_text()).words)
    assert "One seed (0), so no spread is known" in words


def test_a_comparison_in_which_nothing_finished_makes_a_page(tmp_path: Path):
    wild = Invented("sgd", 0.1, 0.1, 1.0, 1.0, diverges_above=1e-9)
    write_comparison(tmp_path, optimizers=(wild,), lrs=(0.1,), seeds=(0, 1))
    words = " ".join(Reader(write_report(tmp_path).read_text()).words)
    assert "2 diverged" in words


def test_the_report_imports_neither_torch_nor_code_that_trains():
    """Its modules name no others of archopt but errors and markdown; with the front set aside no torch comes in."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name != "torch"
                assert not name.startswith("archopt") or name.startswith(
                    ("archopt.lab.report", "archopt.lab.errors", "archopt.lab.markdown")
                )
    program = """
import importlib, pathlib, sys, types
source = pathlib.Path(sys.argv[1])
front = types.ModuleType("archopt")
front.__path__ = [str(source)]
sys.modules["archopt"] = front
for path in (source / "lab" / "report").glob("*.py"):
    importlib.import_module("archopt.lab.report" if path.stem == "__init__" else f"archopt.lab.report.{path.stem}")
assert "archopt.lab.report.render" in sys.modules
assert "torch" not in sys.modules, "torch was imported"
"""
    source = PACKAGE.parents[1]
    subprocess.run([sys.executable, "-c", program, str(source)], check=True, timeout=120)
