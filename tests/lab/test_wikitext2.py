"""WikiText-2: its reader, the transformer on it, windows, schedules, perplexities and interrupted runs."""

import copy
import functools
import io
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archopt.lab.data import DataError, DataFolder, fetch, import_folder, load_wikitext2, sets, wikitext2
from archopt.lab.data.folder import sha256
from archopt.lab.errors import Interrupted, LabError
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.positions import sinusoids
from archopt.lab.models.word_transformer import WordTransformer
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.train import Settings, clip_norm, run_config
from archopt.lab.workloads.language import perplexity
from archopt.lab.workloads.wikitext2_transformer import WikiText2Transformer, columns, commonest
from archopt.roles import parameter_roles
from lab.running import StopAt, bits, lines, run
from real_data import real_data, real_data_path

EVERY_OPTIMIZER = ("nero", "nero-roles", "autonero", "agd", "sgd", "adam", "adamw", "lamb", "madam", "muon")


@functools.cache
def smoke(**options: object) -> Experiment:
    """The smoke preset with its data."""
    real_data("wikitext-2")
    choice = WorkloadChoice("wikitext2-transformer", "smoke", options)
    return open_experiment(choice, real_data_path(), torch.device("cpu"))


def counting(words: int = 1000, **options: object) -> WikiText2Transformer:
    """The workload on a text that counts: each word's number is its place, modulo 50."""
    workload = WikiText2Transformer(**{"width": 8, "hidden": 8, "batch_size": 4, "context": 10, **options})
    text = torch.arange(words) % 50
    workload.words = tuple(map(str, range(50)))
    workload.train, workload.validation, workload.test = (
        columns(text, 4),
        columns(text, 10),
        columns(text, 10),
    )
    return workload


# -- the text --------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_text_has_the_known_numbers_of_words() -> None:
    folder = real_data("wikitext-2")
    text = load_wikitext2(folder)
    parts = text.train, text.validation, text.test
    assert [len(part) for part in parts] == [2_088_628, 217_646, 245_569]
    assert len(text.vocabulary) == len(set(text.vocabulary)) == 33_278
    first = [text.vocabulary[i] for i in text.train[:7]]
    assert first == ["<eos>", "=", "Valkyria", "Chronicles", "III", "=", "<eos>"]
    assert np.unique(text.train).tolist() == list(range(33_278))  # no word is in the other parts alone
    appeared = np.unique(text.train, return_index=True)[1]
    assert (np.diff(appeared) > 0).all()
    assert sorted(folder.checksums) == ["wikitext-2/test.txt", "wikitext-2/train.txt", "wikitext-2/valid.txt"]


TEXTS = {"train": b" a b \n\n c <unk> \n", "valid": b" c a \n", "test": b" d \n"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> sets.DataSet:
    """WikiText-2 with texts of a few words."""
    files = tuple(
        replace(file, checksum=sha256(text), shape=(len(text),))
        for file, text in zip(sets.WIKITEXT2.files, TEXTS.values())
    )
    known = replace(sets.WIKITEXT2, files=files)
    monkeypatch.setitem(sets.SETS, "wikitext-2", known)
    monkeypatch.setattr(wikitext2, "WIKITEXT2", known)
    return known


def packed(folder: Path, contents: dict[str, bytes], name: str = "wikitext-2.tar.xz") -> Path:
    """An archive of these files below `folder`."""
    place = folder / "wikitext-2" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w:xz") as tar:
        for member, content in contents.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return place


@pytest.mark.parametrize("names", ["wiki.{}.tokens", "{}.txt", "wikitext-2/wiki.{}.tokens"])
def test_the_text_is_read_from_files_of_both_names_and_from_the_archive(
    tiny: sets.DataSet, tmp_path: Path, names: str
) -> None:
    contents = {names.format(part): text for part, text in TEXTS.items()}
    if "/" in names:
        packed(tmp_path, contents)
    else:
        (tmp_path / "wikitext-2").mkdir()
        for name, text in contents.items():
            (tmp_path / "wikitext-2" / name).write_bytes(text)
    folder = DataFolder(tmp_path)
    text = load_wikitext2(folder)
    assert text.vocabulary == ("a", "b", "<eos>", "c", "<unk>", "d")
    assert text.train.tolist() == [0, 1, 2, 2, 3, 4, 2]
    assert text.validation.tolist() == [3, 0, 2]
    assert text.test.tolist() == [5, 2]
    assert set(folder.checksums.values()) == {file.checksum for file in tiny.files}


def test_wrong_and_truncated_archives_are_one_line_with_the_command(
    tiny: sets.DataSet, tmp_path: Path
) -> None:
    remedy = "`archopt data fetch wikitext-2 --data"
    place = packed(tmp_path, {"wiki.valid.tokens": TEXTS["valid"]})
    with pytest.raises(DataError, match=rf"is the wrong archive: it has no train\.txt and no wiki.*{remedy}"):
        load_wikitext2(DataFolder(tmp_path))
    whole = packed(tmp_path, {f"wiki.{part}.tokens": text for part, text in TEXTS.items()}).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", b""):
        place.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"xz is truncated, damaged or no tar archive.*{remedy}"
        ) as caught:
            load_wikitext2(DataFolder(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_truncated_text_and_another_text_are_refused(tiny: sets.DataSet, tmp_path: Path) -> None:
    (tmp_path / "wikitext-2").mkdir()
    place = tmp_path / "wikitext-2" / "train.txt"
    place.write_bytes(TEXTS["train"][:-1])
    with pytest.raises(DataError, match=r"train\.txt is the wrong file: its array has shape \(16,\)"):
        load_wikitext2(DataFolder(tmp_path))
    place.write_bytes(TEXTS["train"].replace(b"a", b"x"))
    with pytest.raises(DataError, match=r"train\.txt is damaged, or from another set"):
        load_wikitext2(DataFolder(tmp_path))
    with pytest.raises(DataError, match=r"wikitext-2: train\.txt is not in .*`archopt data fetch wikitext-2"):
        load_wikitext2(DataFolder(tmp_path / "nowhere"))


def test_the_archive_is_imported_and_kept_by_fetch(tiny: sets.DataSet, tmp_path: Path) -> None:
    packed(tmp_path / "from", {f"wiki.{part}.tokens": text for part, text in TEXTS.items()})
    folder = DataFolder(tmp_path / "to")
    copies = import_folder(tmp_path / "from", folder)
    assert copies == [tmp_path / "to" / "wikitext-2" / "wikitext-2.tar.xz"]
    assert fetch("wikitext-2", folder, mirrors=["file:///nowhere"]) == copies
    assert len(load_wikitext2(folder).vocabulary) == 6
    packed(tmp_path / "from", {"wiki.train.tokens": TEXTS["train"]})
    with pytest.raises(DataError, match="is the wrong archive: it has no valid"):
        import_folder(tmp_path / "from", DataFolder(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# -- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "count", "tensors"), [(False, 13_826_878, 19), (True, 13_828_478, 27)])
def test_the_published_network_has_the_published_size(norm: bool, count: int, tensors: int) -> None:
    with torch.device("meta"):
        model = WordTransformer(33_278, 35, 200, 2, 200, 2, 0.2, norm)
    sizes = [p.numel() for p in model.parameters()]
    assert (sum(sizes), len(sizes)) == (count, tensors)


def test_initial_weights_are_as_published() -> None:
    torch.manual_seed(0)
    model = WordTransformer(500, 35, 16, 2, 16, 2, 0.2)
    for weight in (model.words.weight, model.head.weight):
        assert weight.abs().max().item() == pytest.approx(0.1, rel=0.01)
        assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
    assert not model.head.bias.any()
    roles = parameter_roles(model)
    assert {roles["words.weight"].kind, roles["head.weight"].kind} == {"embedding", "head"}
    assert roles["layers.1.attention.in_proj_weight"].slices == 3


def test_positions_are_those_of_the_formula() -> None:
    table = sinusoids(36, 6)
    assert table.shape == (36, 6)
    for place in (0, 1, 35):
        expected = [f(place / 10_000 ** (i / 6)) for i in (0, 2, 4) for f in (math.sin, math.cos)]
        assert table[place].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_the_forward_pass_is_that_of_its_equations(norm: bool) -> None:
    torch.manual_seed(0)
    model = WordTransformer(20, 7, 8, 2, 12, 2, 0.5, norm).eval()
    tokens = torch.randint(20, (3, 5))
    x = model.words.weight[tokens] * math.sqrt(8) + sinusoids(5, 8)
    for layer in model.layers:
        at = layer.attention
        q, k, v = F.linear(x, at.in_proj_weight, at.in_proj_bias).view(3, 5, 3, 2, 4).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(4)
        weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
        mixed = at.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        x = layer.norm_attention(x + mixed)
        x = layer.norm_mlp(x + layer.down(F.relu(layer.up(x))))
    assert isinstance(model.layers[0].norm_mlp, nn.LayerNorm) == norm
    expected = F.linear(x, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(tokens), expected)
    with torch.no_grad():  # torch has another path for this
        torch.testing.assert_close(model(tokens), expected)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


# -- windows, schedule, settings -------------------------------------------------------------------


@pytest.mark.data
def test_an_epoch_has_the_published_number_of_steps() -> None:
    workload = WikiText2Transformer()
    workload.load(real_data("wikitext-2"))
    assert (workload.steps_per_epoch, workload.steps, workload.eval_every) == (2984, 59_680, 2984)
    inputs, targets = workload.batch(2983, seed=0)
    assert inputs.shape == targets.shape == (20, 25)
    assert workload.validation.shape == (10, 21_764)
    assert workload.test.shape == (10, 24_556)


def test_windows_follow_each_other_and_no_seed_changes_them() -> None:
    workload = counting()  # 4 columns of 250: windows of 10, the last of 9
    assert workload.steps_per_epoch == 25
    inputs, targets = workload.batch(0, seed=3)
    assert inputs[:, 0].tolist() == [0, 0, 0, 0]
    assert inputs[1].tolist() == list(range(10))
    assert targets[1].tolist() == list(range(1, 11))
    seen = torch.cat([workload.batch(step, seed=0)[0] for step in range(25)], 1)
    assert torch.equal(seen, workload.train[:, :-1])
    following = torch.cat([workload.batch(step, seed=0)[1] for step in range(25)], 1)
    assert torch.equal(following, workload.train[:, 1:])
    assert torch.equal(workload.batch(25, seed=7)[0], inputs)
    assert columns(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_rate_falls_to_a_tenth_after_the_tenth_epoch() -> None:
    workload = counting()
    rates = [workload.schedule(step) for step in range(workload.steps)]
    assert rates == [1.0] * 250 + [0.1] * 250


def scored(workload: WikiText2Transformer, losses: list[float]) -> list[float]:
    """The multipliers of each epoch where training makes the validation losses these."""
    model = workload.build()
    rates = []
    tests: list[object] = []

    def mean_loss(model: nn.Module, text: torch.Tensor) -> float:
        if text is workload.test:
            tests.append(text)
            return 10.0 * len(tests)
        return losses[epoch]

    workload.mean_loss = mean_loss  # type: ignore[method-assign]
    for epoch in range(len(losses)):
        rates.append(workload.schedule(epoch * workload.steps_per_epoch))
        for step in range(workload.steps_per_epoch):
            workload.loss(model, workload.batch(step, 0))
        workload.evaluate({"model": model})
    return rates


def test_the_older_drop_waits_for_an_epoch_without_a_new_best() -> None:
    options = {"lr_drop": "unless-best", "drop_after": 2, "epochs": 4}
    assert scored(counting(**options), [3.0, 2.0, 1.0, 1.0]) == [1, 1, 1, 1]
    assert scored(counting(**options), [3.0, 3.0, 1.0, 1.0]) == [1, 1, 0.1, 0.1]
    assert scored(counting(**options), [3.0, 2.0, 2.5, 1.0]) == [1, 1, 1, 1]  # looked at once, as published
    assert scored(counting(**{**options, "lr_drop": "always"}), [3.0, 2.0, 1.0, 1.0]) == [1, 1, 0.1, 0.1]


def test_published_settings_reach_the_runs() -> None:
    experiment = Experiment(counting(), "paper", None, {}, torch.device("cpu"))

    def told(text: str, **settings: float) -> dict:
        return run_config(experiment, parse_optimizer(text), 0.1, 0, Settings(**settings))

    published = experiment.workload.settings
    rates = {name: parse_optimizer(name).published_lr(published) for name in published}
    assert rates == {"nero": 0.01, "sgd": 1.0, "adam": 1e-4, "lamb": 0.01}
    assert told("adam")["optimizer"]["options"]["betas"] == (0.0, 0.999)
    assert told("lamb")["optimizer"]["options"]["betas"] == (0.0, 0.999)
    assert told("sgd")["clip_norm"] == 0.25
    assert "clip_norm" not in told("sgd")["optimizer"]["options"]
    assert [told(name)["clip_norm"] for name in ("nero", "adam", "lamb", "adamw")] == [None] * 4
    assert told("sgd", clip_norm=2.0)["clip_norm"] == 2.0
    assert clip_norm(experiment, parse_optimizer("nero"), Settings(clip_norm=2.0)) == 2.0
    assert parse_optimizer("sgd").build(nn.Linear(2, 2), 0.1, published).defaults["momentum"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, "width=30, heads=4: the width must be even and a multiple"),
        ({"width": 3, "heads": 1}, "width=3, heads=1: the width must be even"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 to below 1"),
        ({"lr_drop": "sometimes"}, "lr_drop='sometimes', expected 'always' or 'unless-best'"),
        ({"train_words": 39}, "train_words=39, expected at least 40"),
        ({"evaluation_words": 19}, "evaluation_words=19, expected at least 20"),
        ({"vocabulary": 1}, "vocabulary=1, expected at least 2"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WikiText2Transformer(**options)


# -- perplexities ----------------------------------------------------------------------------------


def test_perplexity_is_exp_of_the_mean_loss() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(33_278)) == pytest.approx(33_278)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_a_network_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    workload = counting()
    model = workload.build().eval()
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        found = workload.evaluate({"model": model})
    assert found == {"val_loss": pytest.approx(math.log(50)), "val_perplexity": pytest.approx(50)}


def test_running_and_held_out_perplexities_weigh_every_word_alike() -> None:
    torch.manual_seed(0)
    workload = counting(dropout=0.0)
    model = workload.build()
    whole = [workload.window(workload.train, step) for step in range(25)]
    with torch.no_grad():
        losses = [F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum") for a, b in whole]
        for step in range(25):
            workload.loss(model, workload.batch(step, 0))
        found = workload.evaluate({"model": model})
    assert found["train_perplexity"] == pytest.approx(math.exp(sum(losses).item() / (4 * 249)))
    inputs, targets = workload.validation[:, :90], workload.validation[:, 1:91]
    logits = torch.cat([model(inputs[:, k : k + 10]) for k in range(0, 90, 10)], 1)
    last = model(workload.validation[:, 90:99])
    logits, targets = torch.cat([logits, last], 1), torch.cat([targets, workload.validation[:, 91:]], 1)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert found["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert found["test_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_the_test_perplexity_is_that_of_the_best_validation_so_far() -> None:
    workload = counting(epochs=4)
    model = workload.build()
    held_out = {id(workload.validation): [3.0, 1.0, 2.0, 0.5], id(workload.test): [30.0, 10.0, 5.0]}
    workload.mean_loss = lambda model, text: held_out[id(text)].pop(0)  # type: ignore[method-assign]
    workload.loss(model, workload.batch(0, 0))
    found = [workload.evaluate({"model": model})]
    workload.loss(model, workload.batch(1, 0))
    found.append(workload.evaluate({"model": model}))
    workload.loss(model, workload.batch(2, 0))
    found.append(workload.evaluate({"model": model}))
    tests = [math.log(entry["test_perplexity"]) for entry in found]
    assert tests == pytest.approx([30, 10, 10])
    average = workload.evaluate({"model": model})  # nothing was trained since: this is the average
    assert math.log(average["test_perplexity"]) == pytest.approx(5)
    assert "train_perplexity" not in average


def test_the_commonest_words_stay_and_the_unknown_one_always() -> None:
    train = np.array([4, 4, 4, 2, 2, 0, 3, 3], np.int32)
    assert np.flatnonzero(commonest(train, 6, 3, 0)).tolist() == [0, 2, 4]  # 2 before 3: it is listed earlier
    assert np.flatnonzero(commonest(train, 6, 2, 5)).tolist() == [4, 5]


@pytest.mark.data
def test_a_smaller_vocabulary_keeps_the_text_and_names_the_rest_unknown() -> None:
    folder = real_data("wikitext-2")
    whole, fewer = (
        WikiText2Transformer(train_words=20_000),
        WikiText2Transformer(train_words=20_000, vocabulary=300),
    )
    whole.load(folder)
    fewer.load(folder)
    assert len(fewer.words) == 300
    assert fewer.train.max() < 300
    same = 0
    for long, short in zip(whole.train.flatten()[:2000].tolist(), fewer.train.flatten()[:2000].tolist()):
        assert fewer.words[short] in (whole.words[long], "<unk>")
        assert (fewer.words[short] == whole.words[long]) or whole.words[long] not in fewer.words
        same += fewer.words[short] == whole.words[long]
    assert same > 1000


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
def test_smoke_presets_learn_within_seconds(optimizer: str, tmp_path: Path) -> None:
    rated = optimizer not in ("autonero", "agd")
    result = run(tmp_path, smoke(), optimizer, lr=0.01 if rated else None)
    told = lines(tmp_path)
    assert result["status"] == "finished", result["error"]
    assert [line["step"] for line in told] == [0, 5, 10]
    assert told[-1]["eval"]["val_loss"] < told[0]["eval"]["val_loss"]
    assert {"val_perplexity", "test_perplexity", "train_perplexity", "val_loss"} <= result["final"].keys()


@pytest.mark.data
def test_a_run_under_the_older_drop_resumes_to_the_bit(tmp_path: Path) -> None:
    experiment = smoke(lr_drop="unless-best", epochs=4, drop_after=3)
    settings = Settings(threads=1, average=True)
    for name, stops in (("whole", ()), ("parts", (12, 15, 16))):
        for stop in stops:
            with pytest.raises(Interrupted):
                run(tmp_path / name, experiment, "sgd", lr=1.0, settings=settings, watcher=StopAt(stop))
        run(tmp_path / name, experiment, "sgd", lr=1.0, settings=settings)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    losses = [line["eval"]["val_loss"] for line in lines(tmp_path / "whole")][1:]
    assert losses[2] > losses[1]  # no new best
    assert lines(tmp_path / "whole")[-1]["lr"] == 0.1


@pytest.mark.data
def test_a_checkpoint_of_another_vocabulary_is_refused_in_one_line(tmp_path: Path) -> None:
    experiment = smoke()
    with pytest.raises(Interrupted):
        run(tmp_path, experiment, watcher=StopAt(3))
    other = copy.copy(experiment.workload)
    assert isinstance(other, WikiText2Transformer)
    other.words = other.words[:-1]
    message = r"the checkpoint belongs to a vocabulary of 100 words .*the data here give one of 99"
    with pytest.raises(LabError, match=message) as caught:
        run(tmp_path, replace(experiment, workload=other))
    assert "\n" not in str(caught.value)
