"""Multi30k: its reader and vocabulary, the translator, its loss and schedule, and interrupted runs."""

import copy
import functools
import gzip
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from archopt.lab.data import DataError, DataFolder, load_multi30k, multi30k, sets
from archopt.lab.data.folder import sha256
from archopt.lab.errors import Interrupted, LabError
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.positions import sinusoids
from archopt.lab.models.translator import Translator
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.workloads import registry
from archopt.lab.workloads.multi30k_transformer import (
    Multi30kTransformer,
    padded,
    summed_loss,
    trimmed,
)
from archopt.roles import parameter_roles
from lab.running import StopAt, bits, lines, run
from real_data import real_data, real_data_path

EVERY_OPTIMIZER = ("nero", "nero-roles", "autonero", "agd", "sgd", "adam", "adamw", "lamb", "madam", "muon")


@functools.cache
def smoke(name: str = "multi30k-transformer") -> Experiment:
    """The smoke preset with its data."""
    pytest.importorskip("spacy", reason="needs spaCy: pip install 'archopt[translation]'")
    real_data("multi30k")
    return open_experiment(WorkloadChoice(name, "smoke"), real_data_path(), torch.device("cpu"))


def tiny(**options: object) -> Multi30kTransformer:
    """The workload on five pairs of ten words."""
    sizes = {"width": 8, "inner": 12, "heads": 2, "depth": 1, "batch_size": 2}
    workload = Multi30kTransformer(**{**sizes, **options})
    workload.words = tuple("0123456789")
    german = padded([[2, 4, 3], [2, 5, 6, 3], [2, 7, 3], [2, 8, 3], [2, 9, 9, 9, 3]])
    english = padded([[2, 5, 3], [2, 6, 7, 3], [2, 8, 3], [2, 9, 3], [2, 4, 3]])
    workload.hold((german, english), (german[:3], english[:3]))
    return workload


# -- the sentences ---------------------------------------------------------------------------------


@pytest.mark.data
def test_the_whole_set_gives_the_published_vocabulary() -> None:
    pytest.importorskip("spacy", reason="needs spaCy: pip install 'archopt[translation]'")
    folder = real_data("multi30k")
    pairs = load_multi30k(folder)
    assert len(pairs.train_german) == len(pairs.train_english) == 29_000
    assert len(pairs.validation_german) == len(pairs.validation_english) == 1_014
    assert len(pairs.vocabulary) == len(set(pairs.vocabulary)) == 9_521
    assert pairs.vocabulary[:7] == ("<unk>", "<blank>", "<s>", "</s>", "a", ".", "in")
    first = [pairs.vocabulary[word] for word in pairs.train_english[0]]
    assert " ".join(first) == "<s> two young , white males are outside near many bushes . </s>"
    assert [pairs.vocabulary[word] for word in pairs.train_german[0]][:4] == ["<s>", "zwei", "junge", "weiße"]
    assert "multi30k/words" in folder.checksums
    assert -(-len(pairs.train_german) // 128) == 227  # steps of an epoch


def test_the_vocabulary_is_made_by_the_rules_of_the_paper() -> None:
    english = [["b", "b", "a", "a", "c", "c"], ["b", "a", "c", "c", "x", "x"]]
    german = [["d", "d", "d", "a", "a", "a"], ["d", "e", "e", "e", "y"]]
    words = multi30k.shared_vocabulary(german, english)
    # c four times, then a before b by alphabet; x twice is too rare; of the German words a is there already
    assert words == ("<unk>", "<blank>", "<s>", "</s>", "c", "a", "b", "d", "e")
    place = {word: number for number, word in enumerate(words)}
    assert multi30k.numbered([["d", "x", "a"], []], place) == [[2, 7, 0, 5, 3], [2, 3]]


def test_pairs_with_a_side_over_a_hundred_words_are_left_out() -> None:
    german, english = [["g"] * 100, ["g"] * 101, ["g"]], [["e"], ["e"], ["e"] * 101]
    assert multi30k.short(german, english) == ([["g"] * 100], [["e"]])


TEXTS = {
    "train.de": b"Ein Hund.\nEin Hund bellt.\n Ein   Hund!\n",
    "train.en": b"A dog.\nA dog barks.\nA dog!\n",
    "val.de": b"Ein Hund\n",
    "val.en": b"A cat\n",
    "test_2016_flickr.de": b"x\n",
    "test_2016_flickr.en": b"y\n",
}


@pytest.fixture
def small_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DataFolder:
    """Multi30k with three sentences to train on, in a folder."""
    files = tuple(
        replace(file, checksum=sha256(TEXTS[file.name]), shape=(len(TEXTS[file.name]),))
        for file in sets.MULTI30K.files
    )
    known = replace(sets.MULTI30K, files=files)
    monkeypatch.setitem(sets.SETS, "multi30k", known)
    monkeypatch.setattr(multi30k, "MULTI30K", known)
    (tmp_path / "multi30k").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "multi30k" / f"{name}.gz").write_bytes(gzip.compress(text))
    return DataFolder(tmp_path)


def test_sentences_are_cut_and_numbered(small_set: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi30k, "tokenizer", lambda language: lambda line: line.lower().split())
    pairs = load_multi30k(small_set)
    assert pairs.vocabulary == ("<unk>", "<blank>", "<s>", "</s>", "a", "ein")
    assert pairs.train_german == [[2, 5, 0, 3], [2, 5, 0, 0, 3], [2, 5, 0, 3]]
    assert pairs.validation_english == [[2, 4, 0, 3]]
    fewer = DataFolder(small_set.path)
    assert len(load_multi30k(fewer, train_pairs=2).train_english) == 2
    assert fewer.checksums["multi30k/words"] != small_set.checksums["multi30k/words"]


def test_another_cut_of_the_same_text_is_another_run(
    small_set: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for between in (" ", "."):
        monkeypatch.setattr(multi30k, "tokenizer", lambda language, b=between: lambda line: line.split(b))
        load_multi30k(small_set)
        found.append(small_set.checksums["multi30k/words"])
    assert found[0] != found[1]


def test_words_are_those_of_spacy_in_lower_case() -> None:
    pytest.importorskip("spacy", reason="needs spaCy: pip install 'archopt[translation]'")
    english, german = multi30k.tokenizer("en"), multi30k.tokenizer("de")
    assert " ".join(english("A man doesn't climb, he runs.")) == "a man does n't climb , he runs ."
    assert german("Zwei Männer (z.B. alte) fahren.") == [
        "zwei",
        "männer",
        "(",
        "z.b.",
        "alte",
        ")",
        "fahren",
        ".",
    ]


def test_without_spacy_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match=r"multi30k needs spaCy.*: pip install 'archopt\[translation\]'"):
        load_multi30k(DataFolder(None))


def test_truncated_and_wrong_files_are_one_line_with_the_command(
    small_set: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi30k, "tokenizer", lambda language: str.split)
    assert small_set.path is not None
    place = small_set.path / "multi30k" / "train.en.gz"
    whole = place.read_bytes()
    remedy = "`archopt data fetch multi30k --data"
    for content, reason in (
        (whole[:-9], "is truncated: its gzip stream ends"),
        (gzip.compress(TEXTS["val.en"]), "is the wrong file"),
        (gzip.compress(TEXTS["train.en"].replace(b"A", b"B")), "is damaged, or from another set"),
    ):
        place.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.en\.gz {reason}.*{remedy}") as caught:
            load_multi30k(small_set)
        assert "\n" not in str(caught.value)


# -- the network -----------------------------------------------------------------------------------


def test_the_published_network_has_the_published_size() -> None:
    with torch.device("meta"):
        model = Translator(9_521, 200, 512, 8, 2048, 6, 0.1, 1)
    shapes = [p.shape for p in model.parameters()]
    assert sum(shape.numel() for shape in shapes) == 44_070_912 + 512 * 9_521 == 48_945_664
    assert len(shapes) == 121
    assert (
        sum(shape[0] for shape in shapes) == 107_825
    )  # Nero's numbers: a row of a matrix, an entry of a vector


def test_initial_matrices_are_xavier_uniform_and_words_are_tied() -> None:
    torch.manual_seed(0)
    model = Translator(60, 20, 16, 2, 32, 2, 0.1, 1)
    assert model.head.weight is model.words.weight
    for parameter in model.parameters():
        if parameter.dim() > 1:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max().item() <= bound
    assert model.words.weight[1].any()  # padding's row too
    kinds = {role.name: role.kind for role in parameter_roles(model)}
    assert kinds["words.weight"] == "tied"


def attended(at: torch.nn.Module, x: torch.Tensor, memory: torch.Tensor, see: torch.Tensor) -> torch.Tensor:
    """Attention of two heads by its equation, -1e9 where `see` forbids."""
    q, k, v = (
        F.linear(y, part.weight).unflatten(-1, (2, -1))
        for y, part in ((x, at.query), (memory, at.key), (memory, at.value))
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~see, -1e9).softmax(-1)
    return F.linear(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2), at.out.weight)


def test_the_forward_pass_is_that_of_its_equations() -> None:
    torch.manual_seed(0)
    model = Translator(20, 9, 8, 2, 12, 2, 0.5, 1).eval()
    source = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 1, 1]])
    target = torch.tensor([[2, 9, 3, 1], [2, 9, 10, 3]])

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def mlp(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return norm(x + layer.down(F.relu(layer.up(x))))

    table = model.words.weight
    see_source = (source != 1)[:, None, None]
    see_target = (target != 1)[:, None, None] & torch.ones(4, 4).tril().bool()
    memory = norm(table[source] + sinusoids(5, 8))
    for layer in model.encoder:
        memory = mlp(layer, norm(memory + attended(layer.attention, memory, memory, see_source)))
    x = norm(table[target] + sinusoids(4, 8))
    for layer in model.decoder:
        x = norm(x + attended(layer.attention, x, x, see_target))
        x = mlp(layer, norm(x + attended(layer.cross, x, memory, see_source)))
    torch.testing.assert_close(model(source, target), x @ table.T)
    model.train()
    assert not torch.equal(model(source, target), model(source, target))


def test_padding_and_words_to_come_change_nothing() -> None:
    torch.manual_seed(0)
    model = Translator(20, 12, 8, 2, 12, 2, 0.0, 1).eval()
    source, target = torch.tensor([[2, 5, 6, 3]]), torch.tensor([[2, 9, 7]])
    logits = model(source, target)
    longer = model(F.pad(source, (0, 3), value=1), F.pad(target, (0, 2), value=1))
    torch.testing.assert_close(longer[:, :3], logits)
    other = model(source, torch.tensor([[2, 9, 8]]))
    torch.testing.assert_close(other[:, :2], logits[:, :2])
    assert (other[:, 2] - logits[:, 2]).abs().max() > 1e-3
    assert (model(torch.tensor([[2, 5, 4, 3]]), target)[:, 0] - logits[:, 0]).abs().max() > 1e-3


# -- loss, batches, schedule -----------------------------------------------------------------------


def test_the_smoothed_loss_is_the_sum_worked_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.1, 0.2, 0.2], [0.1, 0.1, 0.1, 0.7], [0.25] * 4]]))
    targets = torch.tensor([[0, 3, 1]])  # the last is padding
    first = -(0.9 * math.log(0.5) + 0.1 / 3 * (math.log(0.1) + 2 * math.log(0.2)))
    second = -(0.9 * math.log(0.7) + 0.1 / 3 * 3 * math.log(0.1))
    assert summed_loss(logits, targets, 0.1).item() == pytest.approx(first + second, rel=1e-6)
    plain = -math.log(0.5) - math.log(0.7)
    assert summed_loss(logits, targets, 0.0).item() == pytest.approx(plain, rel=1e-6)
    assert summed_loss(logits.repeat(2, 1, 1), targets.repeat(2, 1), 0.1).item() == pytest.approx(
        2 * (first + second), rel=1e-6
    )


def test_sentences_are_padded_and_trimmed() -> None:
    rows = padded([[2, 3], [2, 5, 6, 3]])
    assert rows.tolist() == [[2, 3, 1, 1], [2, 5, 6, 3]]
    assert trimmed(rows[:1]).tolist() == [[2, 3]]
    assert torch.equal(trimmed(rows), rows)


def test_an_epoch_visits_each_pair_once_trimmed_to_its_batch() -> None:
    workload = tiny()
    assert (workload.steps_per_epoch, workload.eval_every) == (3, 3)
    batches = [workload.batch(step, seed=0) for step in range(3)]
    assert [len(german) for german, _ in batches] == [2, 2, 1]
    assert sorted(int(german[i, 1]) for german, _ in batches for i in range(len(german))) == [4, 5, 7, 8, 9]
    assert all((german[:, -1] != 1).any() and (english[:, -1] != 1).any() for german, english in batches)


def test_the_rate_climbs_to_half_time_and_ends_at_nothing() -> None:
    workload = tiny()
    rates = [workload.schedule(3 * epoch) for epoch in range(100)]
    assert rates[:3] == pytest.approx([0.02, 0.04, 0.06])
    assert rates[48:51] == pytest.approx([0.98, 1.0, 0.98])
    assert rates[97:] == pytest.approx([0.04, 0.02, 0.0])
    assert [workload.schedule(step) for step in (0, 2, 3)] == [0.02, 0.02, 0.04]
    assert max(rates) == 1


def test_perplexities_weigh_every_word_alike() -> None:
    torch.manual_seed(0)
    workload = tiny(dropout=0.0, epochs=4)
    model = workload.build()
    with torch.no_grad():
        untrained = workload.evaluate({"model": model})
        losses = [workload.loss(model, workload.batch(step, 0))[0].item() for step in range(3)]
        found = workload.evaluate({"model": model})
        german, english = workload.test_inputs, workload.test_targets
        logits = model(german, english[:, :-1])
    assert untrained.keys() == {"val_loss", "val_perplexity"}
    assert found["train_perplexity"] == pytest.approx(
        math.exp(sum(losses) / 11)
    )  # 11 words and ends of sentence
    mean = F.cross_entropy(logits.flatten(0, 1), english[:, 1:].flatten(), ignore_index=1).item()
    assert found["val_loss"] == pytest.approx(mean, rel=1e-6)
    assert found["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)


def test_published_settings() -> None:
    published = Multi30kTransformer.settings
    rates = {name: parse_optimizer(name).published_lr(published) for name in published}
    assert rates == {"nero": 1e-3, "sgd": 1e-4, "adam": 1e-4, "lamb": 1e-2}
    assert Multi30kTransformer.lrs == (1e-4, 1e-3, 1e-2, 0.1, 1)
    assert {name: s.get("betas") for name, s in published.items()} == {
        "nero": None,
        "sgd": None,
        "adam": (0.0, 0.999),
        "lamb": (0.0, 0.999),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "width=30, heads=8: the width must be even and a multiple"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 to below 1"),
        ({"train_pairs": 0}, "train_pairs=0, expected at least 1"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Multi30kTransformer(**options)


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
def test_smoke_presets_learn_within_seconds(optimizer: str, tmp_path: Path) -> None:
    rated = optimizer not in ("autonero", "agd")
    rate = 1e-4 if optimizer == "sgd" else 0.01  # the loss is a sum over some 400 words
    result = run(tmp_path, smoke(), optimizer, lr=rate if rated else None)
    told = lines(tmp_path)
    assert result["status"] == "finished", result["error"]
    assert [line["step"] for line in told] == [0, 4, 8, 12]
    assert told[-1]["eval"]["val_loss"] < told[0]["eval"]["val_loss"]
    assert "train_perplexity" in result["final"]
    if rated:
        assert told[-1]["lr"] == 0  # the last epoch's


@pytest.mark.data
def test_both_names_are_one_workload_and_one_record(tmp_path: Path) -> None:
    assert registry()["wmt16"] is registry()["multi30k-transformer"]
    whole = run(tmp_path, smoke("multi30k-transformer"))
    assert run(tmp_path, smoke("wmt16")) == whole  # read, not run again


@pytest.mark.data
def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", smoke(), "nero")
    for stop in (3, 4, 6):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", smoke(), "nero", watcher=StopAt(stop))
    run(tmp_path / "parts", smoke(), "nero")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.data
def test_a_checkpoint_of_another_vocabulary_is_refused_in_one_line(tmp_path: Path) -> None:
    experiment = smoke()
    with pytest.raises(Interrupted):
        run(tmp_path, experiment, watcher=StopAt(3))
    other = copy.copy(experiment.workload)
    assert isinstance(other, Multi30kTransformer)
    other.words = (*other.words[:-1], "another")
    with pytest.raises(LabError, match="the checkpoint belongs to a vocabulary of") as caught:
        run(tmp_path, replace(experiment, workload=other))
    assert "\n" not in str(caught.value)
