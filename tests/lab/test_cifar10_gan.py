"""cifar10-gan: the networks and their sizes, the loss and the step, distances, pictures, every optimiser."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from archopt.lab.data.mnist import Images
from archopt.lab.errors import Interrupted, LabError
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.gan import (
    ConditionalNorm,
    Discriminator,
    DownBlock,
    Generator,
    SelfAttention,
    UpBlock,
    renew_iterates,
    spectral,
)
from archopt.lab.muon import MuonWithAdamW
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.train import Run, Settings, run_config
from archopt.lab.watcher import Watcher
from archopt.lab.workloads import cifar10_gan
from archopt.lab.workloads.cifar10_gan import CIFAR10GAN, discriminator_loss, scaled, shrunk
from archopt.optim.autonero import AutoNero
from archopt.optim.nero import Nero
from archopt.roles import parameter_roles
from lab.running import StopAt, bits, lines, run
from real_data import real_data, real_data_path


def paper() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return CIFAR10GAN().build()


@pytest.mark.slow
def test_the_discriminator_compiles() -> None:
    """Two passes and one backward pass, between which torch's power iteration changes its vectors in place."""
    torch.manual_seed(0)
    gradients = []
    plain = Discriminator(8, 10)
    for model in (copy.deepcopy(plain), plain):
        if model is plain:
            model.compile()
        x, y = torch.ones(4, 3, 16, 16), torch.arange(4)
        first = model(x, y)
        renew_iterates(model)
        (first - model(-x, y)).mean().backward()
        gradients.append([param.grad for param in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_half_of_cifar10_is_told() -> None:
    workload = CIFAR10GAN()
    workload.train_inputs, workload.test_inputs = torch.empty(25_000, 0), torch.empty(5_000, 0)
    assert workload.data_note == "half of CIFAR-10: 25,000 + 5,000 images"
    workload.train_images, workload.test_images = 10_000, 2_000
    assert workload.data_note == ""


def weights(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with spectral normalisation, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "parametrizations")}


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The smoke preset on invented pictures, so that it needs no data."""
    return invented_smoke(monkeypatch)


def invented_smoke(monkeypatch: pytest.MonkeyPatch, **options: object) -> Experiment:
    def load(data: object, train: int, test: int) -> Images:
        draws = np.random.default_rng(0)
        parts = [
            (draws.integers(0, 256, (n, 3, 32, 32)).astype(np.uint8), np.arange(n, dtype=np.uint8) % 10)
            for n in (train, test)
        ]
        return Images(*parts[0], *parts[1])

    monkeypatch.setattr(cifar10_gan, "load_cifar10", load)
    return open_experiment(WorkloadChoice("cifar10-gan", "smoke", options), None, torch.device("cpu"))


# -- the networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entries", "tensors", "neurons"),
    [("generator", 2_183_091, 56, 15_462), ("discriminator", 2_644_129, 33, 5_162)],
)
def test_the_networks_have_the_published_sizes(name: str, entries: int, tensors: int, neurons: int) -> None:
    model = paper()[name]
    assert sum(p.numel() for p in model.parameters()) == entries
    assert len(list(model.parameters())) == tensors
    for parameters in (model.named_parameters(), model):
        optimizer = Nero(parameters)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert sum(state["exp_avg_sq"].numel() for state in optimizer.state.values()) == neurons


@pytest.mark.parametrize("side", [16, 32])
def test_pictures_and_scores_have_the_documented_shapes(side: int) -> None:
    generator, discriminator = Generator(8, side, 5, 12, 0.1), Discriminator(8, 12)
    labels = torch.tensor([0, 9, 3])
    pictures = generator(torch.randn(3, 20), labels)
    assert pictures.shape == (3, 3, side, side)
    assert pictures.abs().max() < 1
    assert discriminator(pictures, labels).shape == (3,)


def test_initial_weights_are_orthogonal_where_they_are_trained() -> None:
    for model in paper().values():
        trained = dict(model.named_parameters())
        for name in weights(model):
            original = trained[f"{name}.parametrizations.weight.original"].flatten(1)
            small = original if original.shape[0] <= original.shape[1] else original.T
            torch.testing.assert_close(small @ small.T, torch.eye(len(small)), atol=1e-4, rtol=0)
        shifts = torch.cat([p.detach() for n, p in trained.items() if n.endswith("bias")])
        assert shifts.std().item() == pytest.approx(0.01, rel=0.1)
        assert abs(shifts.mean().item()) < 1e-3
    assert paper()["generator"].norm.weight.eq(1).all()


def test_a_weight_is_divided_by_one_power_iteration_a_training_pass_and_none_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(3, 5, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    norm = layer.parametrizations.weight[0]
    matrix = layer.parametrizations.weight.original.detach().flatten(1)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        v = F.normalize(matrix.T @ F.normalize(matrix @ norm._v, dim=0), dim=0)
        u = F.normalize(matrix @ norm._v, dim=0)
        out = layer(x)
        torch.testing.assert_close((norm._u, norm._v), (u, v))
        expected = F.conv2d(x, (matrix / (u @ matrix @ v)).view(5, 3, 3, 3), layer.bias)
        torch.testing.assert_close(out, expected)
    layer.eval()
    for _ in range(2):
        torch.testing.assert_close(layer(x), out)
        assert torch.equal(norm._u, u)


def test_attention_is_softmax_over_pooled_places_added_once() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16).eval()
    x = torch.randn(2, 16, 4, 4)
    query, key, value = (layer(x) for layer in (attention.query, attention.key, attention.value))
    assert (query.shape[1], key.shape[1], value.shape[1]) == (2, 2, 8)
    seen = torch.zeros(2, 8, 4, 4)
    for b in range(2):
        keys = [key[b, :, i : i + 2, j : j + 2].amax((1, 2)) for i in (0, 2) for j in (0, 2)]
        values = [value[b, :, i : i + 2, j : j + 2].amax((1, 2)) for i in (0, 2) for j in (0, 2)]
        for i in range(4):
            for j in range(4):
                shares = torch.softmax(torch.stack([query[b, :, i, j] @ k for k in keys]), 0)
                seen[b, :, i, j] = sum(share * v for share, v in zip(shares, values))
    torch.testing.assert_close(attention(x), x + attention.out(seen))


def test_the_condition_scales_and_shifts_what_was_normalised() -> None:
    torch.manual_seed(0)
    norm = ConditionalNorm(4, 6, momentum=0.001)
    x, condition = 3 * torch.randn(5, 4, 2, 2) + 1, torch.randn(5, 6)
    out = norm(x, condition)
    standard = F.batch_norm(x, None, None, training=True)
    norm.eval()
    gain, shift = norm.gain(condition), norm.shift(condition)
    torch.testing.assert_close(out, standard * (1 + gain)[:, :, None, None] + shift[:, :, None, None])
    torch.testing.assert_close(norm.norm.running_mean, 0.001 * x.mean((0, 2, 3)))
    assert list(norm.norm.parameters()) == []


def test_blocks_are_as_published() -> None:
    """Shortcuts before or after doubling and halving are the same maps; here they are in the published order."""
    torch.manual_seed(0)
    x, condition = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    up = UpBlock(8, 4, 6, 0.1).eval()
    twice = nn.Upsample(scale_factor=2)
    h = up.conv1(twice(F.relu(up.norm1(x, condition))))
    h = up.conv2(F.relu(up.norm2(h, condition)))
    torch.testing.assert_close(up(x, condition), h + up.shortcut(twice(x)))
    assert isinstance(UpBlock(8, 8, 6, 0.1).shortcut, nn.Identity)
    down = DownBlock(8, 8, down=True).eval()
    h = down.conv2(F.relu(down.conv1(F.relu(x))))
    torch.testing.assert_close(down(x), F.avg_pool2d(h + down.shortcut(x), 2))
    same = DownBlock(8, 8, down=False).eval()
    torch.testing.assert_close(same(x), same.conv2(F.relu(same.conv1(F.relu(x)))) + x)
    stem = DownBlock(8, 4, down=True, first=True).eval()
    h = F.avg_pool2d(stem.conv2(F.relu(stem.conv1(x))), 2)
    torch.testing.assert_close(stem(x), h + stem.shortcut(F.avg_pool2d(x, 2)))


def test_a_latents_quarters_and_the_label_go_where_they_belong() -> None:
    torch.manual_seed(0)
    model = Generator(8, 16, 5, 12, 0.1).eval()
    latents, labels = torch.randn(3, 20), torch.tensor([0, 9, 3])
    code = model.label_code.weight[:, labels].T + model.label_code.bias
    h = model.start(latents[:, :5]).view(3, 32, 2, 2)
    h = model.up1(h, torch.cat((code, latents[:, 5:10]), 1))
    h = model.attention(model.up2(h, torch.cat((code, latents[:, 10:15]), 1)))
    h = model.up3(h, torch.cat((code, latents[:, 15:]), 1))
    torch.testing.assert_close(model(latents, labels), model.to_colour(model.norm(h).relu()).tanh())


def test_a_score_is_ten_times_the_sum_of_a_linear_map_and_the_labels_row() -> None:
    torch.manual_seed(0)
    model = Discriminator(8, 12).eval()
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([11, 4])
    h = model.last(model.down2(model.attention(model.down1(model.stem(x)))))
    assert h.shape == (2, 32, 2, 2)
    h = h.relu().mean((2, 3))
    rows = model.label_rows.weight[labels]
    torch.testing.assert_close(model(x, labels), 10 * (model.score(h)[:, 0] + (h * rows).sum(1)))


# -- roles -----------------------------------------------------------------------------------------


def test_parametrised_weights_have_the_roles_of_their_layers() -> None:
    for name, model in paper().items():
        table = parameter_roles(model)
        kinds = {role.name: role.kind for role in table}
        assert not {"unknown", "vector"} & set(kinds.values())
        for layer_name, layer in weights(model).items():
            usual = {nn.Conv2d: "conv", nn.Linear: "matrix", nn.Embedding: "embedding"}
            kind = next(kind for cls, kind in usual.items() if isinstance(layer, cls))
            last = {"generator": "label_code", "discriminator": "score"}[name]
            expected = "head" if layer_name == last else kind
            assert kinds[f"{layer_name}.parametrizations.weight.original"] == expected
        neurons = {role.name: role.neuron_dim for role in table if role.name.endswith("original")}
        assert set(neurons.values()) == {0}


def test_optimisers_of_the_model_turn_originals_and_keep_tables_of_labels_apart() -> None:
    models = CIFAR10GAN(**CIFAR10GAN.presets["small"]).build()
    tables = {"generator": "label_code", "discriminator": "label_rows"}
    for name, model in models.items():
        names = {id(p): n for n, p in model.named_parameters()}
        muon = MuonWithAdamW(model)
        matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
        own = {n for n in names.values() if n.endswith("original")}
        apart = {f"{table}.parametrizations.weight.original" for table in (tables[name], "score")}
        assert matrices == own - apart
        families = {
            names[id(p)]: group["family"] for group in AutoNero(model).param_groups for p in group["params"]
        }
        assert {n for n, family in families.items() if family == "hidden"} == matrices
        Nero(model)
        for layer in weights(model).values():
            rows = layer.parametrizations.weight.original.flatten(1)
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


# -- loss and step ---------------------------------------------------------------------------------


def test_the_loss_is_the_hinge_loss_less_two() -> None:
    real, fake = torch.tensor([2.0, 0.5, -3.0]), torch.tensor([-2.0, 0.0, 1.0])
    # Real: (1 + 0.5 - 3) / 3 = -0.5; fake: (-1 + 0 + 1) / 3 = 0.
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5)
    hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    assert discriminator_loss(real, fake).item() == pytest.approx(hinge.item() - 2)
    assert discriminator_loss(torch.tensor([1.0, 9.0]), torch.tensor([-1.0, -9.0])).item() == -2


def begun(experiment: Experiment, optimizer: str, lr: float | None = 0.01) -> Run:
    return Run(experiment, parse_optimizer(optimizer), lr, 0, Settings(threads=1), Watcher())


def test_a_step_has_the_bits_of_the_published_loop(invented: Experiment) -> None:
    """That one computes the other network's gradients too, and discards them."""
    ours, theirs = begun(invented, "adam"), begun(invented, "adam")
    workload = ours.workload
    generator, discriminator = theirs.models["generator"], theirs.models["discriminator"]
    for step in range(3):
        torch.manual_seed(step)
        told = workload.train_step(ours, step)
        torch.manual_seed(step)
        pictures, labels = workload.batch(step, 0)
        fake = discriminator(generator(torch.randn(8, 80), labels), labels)
        real = discriminator(pictures, labels)
        loss = torch.maximum(fake, -torch.ones(8)).mean() - torch.minimum(real, torch.ones(8)).mean()
        theirs.update("discriminator", loss)
        assert torch.equal(told["loss"], loss.detach())
        generated = -discriminator(generator(torch.randn(8, 80), labels), labels).mean()
        theirs.update("generator", generated)
        assert torch.equal(told["generator_loss"], generated.detach())
    for name in ours.models:
        for mine, other in zip(
            ours.models[name].state_dict().values(), theirs.models[name].state_dict().values()
        ):
            assert torch.equal(mine, other)
        assert all(p.grad is None and p.requires_grad for p in ours.models[name].parameters())


def test_batches_are_mirrored_by_seed_and_step_alone(invented: Experiment) -> None:
    workload = invented.workload
    before = torch.get_rng_state()
    pictures, labels = workload.batch(1, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(pictures, workload.batch(1, seed=3)[0])
    assert pictures.shape == (8, 3, 16, 16)
    known = scaled(workload.train_inputs)
    plain = [bool((known == picture).flatten(1).all(1).any()) for picture in pictures]
    turned = [bool((known == picture.flip(2)).flatten(1).all(1).any()) for picture in pictures]
    assert [a != b for a, b in zip(plain, turned)] == [True] * 8
    assert any(plain)
    assert any(turned)
    assert workload.train_targets.unique().tolist() == list(range(10))
    assert labels.dtype == torch.int64


def test_smaller_pictures_are_means_of_2_by_2() -> None:
    pictures = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pictures[0, 0, :2, :2] = torch.tensor([[10, 20], [30, 43]])
    assert shrunk(pictures, 32) is pictures
    small = shrunk(pictures, 16)
    assert (small.shape, small.dtype) == ((1, 3, 16, 16), torch.uint8)
    assert small[0, 0, 0, :2].tolist() == [26, 0]


# -- schedule and settings -------------------------------------------------------------------------


def test_the_paper_preset_has_the_published_steps_and_settings() -> None:
    workload = CIFAR10GAN()
    assert (workload.steps, workload.eval_every) == (121 * 196, 10 * 196)
    assert (workload.batch_size, workload.distance_images) == (256, 10_000)
    assert [workload.schedule(step) for step in (0, 19_599, 19_600, 23_715)] == [1, 1, 0.1, 0.1]
    assert -(-50_000 // workload.batch_size) == workload.epoch_steps
    assert {name: known["lr"] for name, known in CIFAR10GAN.settings.items()} == {
        "nero": 0.01,
        "sgd": 0.01,
        "adam": 1e-4,
        "lamb": 0.01,
    }
    assert CIFAR10GAN.lrs == (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert not CIFAR10GAN(**CIFAR10GAN.presets["small"]).steps % 16


def test_adam_has_other_betas_in_each_network(invented: Experiment) -> None:
    adam = begun(invented, "adam").optimizers
    assert [adam[name].defaults["betas"] for name in ("generator", "discriminator")] == [
        (0, 0.999),
        (0.9, 0.999),
    ]
    told = run_config(invented, parse_optimizer("adam"), 1e-4, 0, Settings())["optimizer"]
    assert told["options"]["betas"] == (0, 0.999)
    assert told["models"]["discriminator"]["options"]["betas"] == (0.9, 0.999)
    asked = begun(invented, "adam(betas=(0.5,0.9))").optimizers.values()
    assert {optimizer.defaults["betas"] for optimizer in asked} == {(0.5, 0.9)}
    lamb = run_config(invented, parse_optimizer("lamb"), 0.01, 0, Settings())["optimizer"]
    assert "models" not in lamb


def test_the_discriminator_may_have_an_optimiser_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invented: Experiment
) -> None:
    mixed = invented_smoke(monkeypatch, discriminator_optimizer="adam(lr=0.003)")
    assert mixed.folder != invented.folder
    result = run(tmp_path, mixed, "autonero", lr=None)
    assert result["status"] == "finished", result["error"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["discriminator_optimizer"] == "adam(lr=0.003)"
    other = config["optimizer"]["models"]["discriminator"]
    assert (config["optimizer"]["name"], other["label"], other["lr"]) == ("autonero", "adam(lr=0.003)", 0.003)
    assert other["options"]["betas"] == [0.9, 0.999]
    told = lines(tmp_path)[-1]["optimizer"]
    assert {key.partition("/")[0] for key in told} == {"generator"}  # Adam tells nothing
    # The rate of the one that has one follows the schedule; a published rate is taken where none is given.
    current = begun(mixed, "autonero", None)
    current._schedule(current.workload.steps - 1)
    assert current.optimizers["discriminator"].param_groups[0]["lr"] == pytest.approx(3e-4)
    published = invented_smoke(monkeypatch, discriminator_optimizer="adam")
    assert begun(published, "nero").optimizers["discriminator"].param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adan", "no optimiser 'adan'"),
        ("adam(beta=1)", "adam has no option 'beta'"),
        ("adam(lr=[0.1,0.2])", r"adam\(lr=\[0.1,0.2\]\) for the discriminator: one learning rate is needed"),
    ],
)
def test_an_optimiser_that_cannot_be_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    with pytest.raises(LabError, match=said):
        begun(invented_smoke(monkeypatch, discriminator_optimizer=text), "nero")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6}, "width=6, expected a multiple of 4"),
        ({"label_rows": 9}, "label_rows=9, expected at least 10"),
        ({"norm_momentum": 0.0}, "norm_momentum=0.0, expected a value above 0"),
        ({"epoch_steps": 0}, "epoch_steps=0, expected a value above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR10GAN(**options)


# -- distances and pictures ------------------------------------------------------------------------


def test_distances_go_by_the_name_of_their_features() -> None:
    assert CIFAR10GAN().metric.key == "frechet_classifier_test"
    assert CIFAR10GAN(features="inception").metric.key == "fid_test"
    assert CIFAR10GAN.metric.key == "frechet_classifier_test"


class Replay(nn.Module):
    """Draws real pictures instead of making any."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self._pictures, self._next = scaled(pictures), 0

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        self._next += len(labels)
        return self._pictures[self._next - len(labels) : self._next]


def test_a_generator_that_draws_the_real_pictures_has_distance_0(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = invented_smoke(monkeypatch, mirror_real=False).workload
    replay = Replay(torch.cat((workload.test_inputs, workload.train_inputs)))
    found = workload.evaluate({"generator": replay})
    assert found == pytest.approx({"frechet_classifier_test": 0, "frechet_classifier_train": 0}, abs=1e-6)
    swapped = Replay(torch.cat((workload.train_inputs, workload.test_inputs)))
    assert min(workload.evaluate({"generator": swapped}).values()) > 1e-5
    mirrored = invented_smoke(monkeypatch).workload
    replay = Replay(torch.cat((mirrored.test_inputs, mirrored.train_inputs)))
    assert min(mirrored.evaluate({"generator": replay}).values()) > 1e-5


def test_pictures_that_are_not_finite_have_no_distance(invented: Experiment) -> None:
    models = invented.workload.build()
    nn.init.constant_(models["generator"].to_colour.bias, math.nan)
    assert all(map(math.isnan, invented.workload.evaluate(models).values()))


def test_a_grid_has_a_row_a_class_and_the_same_latents_always(invented: Experiment, tmp_path: Path) -> None:
    run(tmp_path, invented, "sgd", lr=0.0)
    files = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert files == ["step=0-samples.png", "step=2-samples.png", "step=4-samples.png"]
    grid = np.asarray(Image.open(tmp_path / "pictures" / files[0]))
    assert grid.shape == (160, 160, 3)

    class Shades(nn.Module):
        def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
            shade = labels / 127.5 - 1
            rest = latents[:, 0].tanh()
            return torch.stack((shade, rest, rest), 1)[:, :, None, None].expand(-1, 3, 16, 16)

    grids = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        grids.append(invented.workload.pictures({"generator": Shades()})["samples"])
    assert torch.equal(*grids)
    assert (grids[0].shape, grids[0].dtype) == ((3, 160, 160), torch.uint8)
    assert torch.equal(
        grids[0][0, ::16, ::16], torch.arange(10, dtype=torch.uint8).view(10, 1).expand(10, 10)
    )
    assert len(grids[0][1, ::16, ::16].unique()) > 50


# -- whole runs ------------------------------------------------------------------------------------

OPTIMIZERS = ("nero", "nero-roles", "autonero", "agd", "sgd", "adam", "adamw", "lamb", "madam", "muon")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_trains_both_networks_and_resumes_to_the_bit(
    optimizer: str, invented: Experiment, tmp_path: Path
) -> None:
    lr = None if optimizer in ("autonero", "agd") else 0.003
    result = run(tmp_path / "whole", invented, optimizer, lr)
    assert result["status"] == "finished", result["error"]
    told = lines(tmp_path / "whole")
    assert [line["step"] for line in told] == [0, 2, 4]
    assert {"frechet_classifier_test", "frechet_classifier_train"} == set(told[-1]["eval"])
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", invented, optimizer, lr, watcher=StopAt(3))
    run(tmp_path / "parts", invented, optimizer, lr)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    last = [(tmp_path / part / "pictures" / "step=4-samples.png").read_bytes() for part in ("whole", "parts")]
    assert last[0] == last[1]


def test_averaging_is_refused_in_one_line(invented: Experiment, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="cannot renew the running statistics of generator"):
        run(tmp_path, invented, "nero", settings=Settings(threads=1, average=True))


@pytest.mark.data
def test_the_smoke_preset_runs_on_real_pictures(tmp_path: Path) -> None:
    real_data("cifar10-half")
    experiment = open_experiment(
        WorkloadChoice("cifar10-gan", "smoke", {}), real_data_path(), torch.device("cpu")
    )
    assert (experiment.workload.pass_steps, experiment.workload.steps_per_epoch) == (13, 2)
    result = run(tmp_path, experiment, "nero", lr=0.01)
    assert result["status"] == "finished", result["error"]
    assert result["metric"]["key"] == "frechet_classifier_test"
