"""Tiny Shakespeare: its reader, the two networks on it, their batches, schedules and interrupted runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archopt.lab.data import DataError, DataFolder, fetch, import_folder, load_tinyshakespeare
from archopt.lab.errors import Interrupted
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.gpt import GPT
from archopt.lab.models.lstm import LSTM
from archopt.lab.workloads import registry
from archopt.lab.workloads.schedules import multiplier
from archopt.lab.workloads.shakespeare_gpt import ShakespeareGPT
from archopt.lab.workloads.shakespeare_lstm import ShakespeareLSTM
from archopt.roles import parameter_roles
from lab.running import StopAt, bits, lines, run
from real_data import real_data, real_data_path

NAMES = ("shakespeare-gpt", "shakespeare-lstm")
MODELS = {"gpt": lambda: GPT(65, 12, 16, 2, 4), "lstm": lambda: LSTM(65, 16, 2)}


def smoke(name: str, **options: object) -> Experiment:
    """The smoke preset with its data."""
    real_data("tinyshakespeare")
    return open_experiment(WorkloadChoice(name, "smoke", options), real_data_path(), torch.device("cpu"))


def loaded(name: str, **options: object) -> ShakespeareGPT | ShakespeareLSTM:
    workload = registry()[name](**options)
    workload.load(real_data("tinyshakespeare"))
    assert isinstance(workload, ShakespeareGPT | ShakespeareLSTM)
    return workload


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- the text --------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_text_is_complete_and_split_as_usual() -> None:
    folder = real_data("tinyshakespeare")
    text = load_tinyshakespeare(folder)
    assert (len(text.train), len(text.validation), len(text.vocabulary)) == (1_003_854, 111_540, 65)
    assert "".join(text.vocabulary[i] for i in text.train[:14]) == "First Citizen:"
    assert list(text.vocabulary) == sorted(text.vocabulary)
    assert np.unique(text.train).tolist() == list(range(65))
    assert folder.checksums == {"tinyshakespeare/input.txt": "md5:6fb458f1232090904fb40fe944165e91"}


@pytest.mark.data
def test_a_text_with_one_changed_character_is_refused(tmp_path: Path) -> None:
    source = real_data("tinyshakespeare").path
    assert source is not None
    content = bytearray((source / "tinyshakespeare" / "input.txt").read_bytes())
    place = tmp_path / "tinyshakespeare" / "input.txt"
    place.parent.mkdir()
    content[1000] ^= 1
    place.write_bytes(content)
    with pytest.raises(DataError, match=r"input\.txt is damaged.*`archopt data fetch tinyshakespeare"):
        load_tinyshakespeare(DataFolder(tmp_path))
    place.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"is the wrong file: its array has shape \(1115393,\)"):
        load_tinyshakespeare(DataFolder(tmp_path))


def test_a_missing_text_is_one_line_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"tinyshakespeare: input\.txt is not in .*`archopt data fetch"
    ) as caught:
        load_tinyshakespeare(DataFolder(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.data
def test_the_text_is_fetched_and_imported_under_its_own_name(tmp_path: Path) -> None:
    source = real_data("tinyshakespeare").path
    assert source is not None
    mirror = (source / "tinyshakespeare").as_uri()
    (fetched,) = fetch("tinyshakespeare", DataFolder(tmp_path / "a"), mirrors=[mirror])
    (copied,) = import_folder(source, DataFolder(tmp_path / "b"), ["tinyshakespeare"])
    assert fetched == tmp_path / "a" / "tinyshakespeare" / "input.txt"
    assert copied == tmp_path / "b" / "tinyshakespeare" / "input.txt"
    assert fetched.read_bytes() == copied.read_bytes()


# -- the networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_characters_to_come_do_not_change_earlier_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    tokens = torch.randint(65, (3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 12, 65)
    for place in (1, 6, 11):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 65
        other = model(changed)
        torch.testing.assert_close(other[:, :place], logits[:, :place])
        assert (other[:, place] - logits[:, place]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_every_earlier_character_reaches_the_last_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    tokens = torch.arange(12).unsqueeze(0)  # all different, so that each has an embedding of its own
    model(tokens)[0, -1].square().sum().backward()
    assert (model.tokens.weight.grad[:12].norm(dim=1) > 0).all()
    assert not model.tokens.weight.grad[12:].any()


def test_attention_is_that_of_its_equation() -> None:
    torch.manual_seed(0)
    attention = GPT(65, 5, 8, 1, 2).blocks[0].attention
    x = torch.randn(2, 5, 8)
    query, key, value = (
        part.view(2, 5, 2, 4) for part in F.linear(x, *attention.qkv.parameters()).split(8, -1)
    )
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(4)
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2)
    torch.testing.assert_close(attention(x), F.linear(mixed, *attention.out.parameters()))


def test_sizes_and_initial_weights_are_as_documented() -> None:
    torch.manual_seed(0)
    gpt, lstm = ShakespeareGPT().build(), ShakespeareLSTM().build()
    assert (parameters(gpt), parameters(lstm)) == (112_577, 161_537)
    assert gpt.tokens.weight.std().item() == pytest.approx(0.5, rel=0.05)
    kinds = {role.name: role.kind for role in parameter_roles(gpt)}
    assert kinds["head.weight"] == "head"
    assert {kinds["tokens.weight"], kinds["positions.weight"]} == {"embedding"}
    assert parameter_roles(gpt)["blocks.1.attention.qkv.weight"].slices == 3
    with torch.device("meta"):
        paper = ShakespeareGPT(**ShakespeareGPT.presets["paper"]).build()
    assert parameters(paper) == pytest.approx(10.8e6, rel=0.01)


def test_dropout_falls_in_training_alone() -> None:
    torch.manual_seed(0)
    for model in (GPT(65, 8, 16, 1, 2, dropout=0.5), LSTM(65, 16, 2, dropout=0.5)):
        tokens = torch.randint(65, (2, 8))
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


# -- the workloads ---------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_network_knows_little_more_than_the_number_of_characters(name: str) -> None:
    workload = loaded(name)
    torch.manual_seed(0)
    model = workload.build().eval()
    with torch.no_grad():
        scores = workload.evaluate({"model": model})
    assert scores["val_loss"] == pytest.approx(math.log(65), abs=0.4)
    assert scores["val_bits"] == pytest.approx(scores["val_loss"] / math.log(2))
    assert scores["val_accuracy"] < 0.1
    inputs, targets = workload.validation
    assert inputs.shape == targets.shape == (1280, 64)
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    whole = F.cross_entropy(model(inputs[:40]).flatten(0, 1), targets[:40].flatten())
    workload.validation = inputs[:40], targets[:40]
    with torch.no_grad():
        assert workload.evaluate({"model": model})["val_loss"] == pytest.approx(whole.item())


@pytest.mark.data
def test_windows_come_from_the_training_text_and_depend_on_seed_and_step_alone() -> None:
    workload = loaded("shakespeare-gpt")
    before = torch.get_rng_state()
    inputs, targets = workload.batch(7, seed=1)
    assert inputs.shape == targets.shape == (16, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, workload.batch(7, seed=1)[0])
    assert not torch.equal(inputs, workload.batch(8, seed=1)[0])
    assert not torch.equal(inputs, workload.batch(7, seed=2)[0])
    assert torch.equal(before, torch.get_rng_state())
    text = workload.text.numpy().astype(np.uint8).tobytes()
    assert all(text.find(bytes(row.tolist())) >= 0 for row in inputs)
    assert workload.steps_per_epoch == pytest.approx(1_003_854 / 1024)


def test_the_linear_schedule_warms_up_and_falls_to_nothing() -> None:
    rates = [ShakespeareGPT().schedule(step) for step in range(1000)]
    assert rates[:30] == pytest.approx([k / 30 for k in range(1, 31)])
    assert rates[30:] == pytest.approx([1 - k / 970 for k in range(970)])
    assert [multiplier("linear", step, 20, 30) for step in (0, 19)] == pytest.approx([1 / 30, 20 / 30])
    assert multiplier("linear", 0, 5, 0) == 1
    assert {ShakespeareGPT(lr_schedule="constant").schedule(step) for step in range(1000)} == {1.0}


@pytest.mark.parametrize(
    ("workload", "options", "message"),
    [
        (ShakespeareGPT, {"width": 30}, "width=30, heads=4: the width must be a multiple"),
        (ShakespeareGPT, {"heads": 0}, "heads=0, expected a value above 0"),
        (ShakespeareGPT, {"dropout": 1.0}, "dropout=1.0, expected 0 to below 1"),
        (ShakespeareLSTM, {"lr_schedule": "cosine"}, "lr_schedule='cosine', expected 'linear' or 'constant'"),
        (ShakespeareLSTM, {"warmup": -1}, "warmup=-1, expected at least 0"),
        (ShakespeareLSTM, {"steps": 0}, "steps=0"),
        (ShakespeareLSTM, {"context": 100_000}, "context=100000, expected at most 81920"),
    ],
)
def test_options_out_of_range_are_refused(workload: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(**options)


@pytest.mark.data
@pytest.mark.parametrize("optimizer", ["adamw", "nero"])
@pytest.mark.parametrize("name", NAMES)
def test_smoke_presets_learn_within_seconds(name: str, optimizer: str, tmp_path: Path) -> None:
    result = run(tmp_path, smoke(name), optimizer, lr=0.01)
    told = lines(tmp_path)
    assert result["status"] == "finished", result["error"]
    assert [line["step"] for line in told] == [0, 10, 20]
    assert told[-1]["eval"]["val_loss"] < told[0]["eval"]["val_loss"]


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_dropout_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    experiment = smoke(name, dropout=0.2, depth=2, eval_every=10)
    run(tmp_path / "whole", experiment, "adamw")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", experiment, "adamw", watcher=StopAt(9))
    run(tmp_path / "parts", experiment, "adamw")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@pytest.mark.data
def test_evaluating_more_often_changes_no_weight(tmp_path: Path) -> None:
    often = run(tmp_path / "a", smoke("shakespeare-gpt", dropout=0.2, eval_every=5), "adamw")
    seldom = run(tmp_path / "b", smoke("shakespeare-gpt", dropout=0.2, eval_every=20), "adamw")
    assert often["weights_sha256"] == seldom["weights_sha256"]
