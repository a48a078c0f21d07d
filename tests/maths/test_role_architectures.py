"""Roles over real architectures, built from torch.nn alone, and over shared and frozen weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from archopt.roles import parameter_roles
from maths.models import GPT, Holder, ResNet, UNet, ViT, kinds


def test_resnet():
    expected = {"stem.weight": "conv", "fc.weight": "head", "fc.bias": "bias"}
    for i in (0, 1):
        expected |= {f"layers.{i}.conv1.weight": "conv", f"layers.{i}.shortcut.weight": "conv"}
        expected |= {f"layers.{i}.bn1.weight": "gain", f"layers.{i}.bn1.bias": "shift"}
    assert kinds(ResNet()) == expected
    assert parameter_roles(ResNet())["layers.1.conv1.weight"].fan_in == 72


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.filter = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.scale = nn.Conv2d(16, 16, 1, groups=16, bias=False)
        self.project = nn.Conv2d(16, 8, 1, bias=False)
        self.classifier = nn.Conv2d(8, 10, 1)


def test_mobilenet_whose_classifier_is_a_convolution():
    expected = {
        "expand": "conv",
        "filter": "depthwise",
        "scale": "gain",
        "project": "conv",
        "classifier": "conv",
    }
    expected = {f"{name}.weight": kind for name, kind in expected.items()} | {"classifier.bias": "bias"}
    assert kinds(MobileNet()) == expected
    head = kinds(MobileNet(), overrides={r"classifier\.weight": "head"})
    assert head == expected | {"classifier.weight": "head"}


def test_transformer_encoder_layer():
    table = parameter_roles(nn.TransformerEncoderLayer(8, 2, 16))
    assert {role.name: role.kind for role in table} == {
        "self_attn.in_proj_weight": "matrix",
        "self_attn.in_proj_bias": "bias",
        "self_attn.out_proj.weight": "matrix",
        "self_attn.out_proj.bias": "bias",
        "linear1.weight": "matrix",
        "linear1.bias": "bias",
        "linear2.weight": "head",
        "linear2.bias": "bias",
        "norm1.weight": "gain",
        "norm1.bias": "shift",
        "norm2.weight": "gain",
        "norm2.bias": "shift",
    }
    assert table["self_attn.in_proj_weight"].slices == 3
    assert table["linear2.weight"].note == "the last Linear in registration order"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(10, 5)
        self.out = nn.Linear(5, 20)


def test_stacked_lstm_and_gru():
    table = parameter_roles(Recurrent())
    assert table["embed.weight"].note == "row 0 is padding: no gradient"
    lstm = [role for role in table if role.name.startswith("lstm.weight")]
    assert len(lstm) == 8
    assert {(role.kind, role.slices, role.neurons) for role in lstm} == {("matrix", 4, 20)}
    assert {role.fan_in for role in lstm} == {6, 5, 10}
    assert table["gru.weight_hh_l0"].slices == 3
    assert table["out.weight"].kind == "head"


def test_unet_with_grouped_transposed_convolution():
    table = parameter_roles(UNet())
    up = table["up.weight"]
    assert (up.kind, up.shape, up.neuron_dim, up.channel_groups) == ("conv_transpose", (8, 6, 2, 2), 1, 2)
    assert (up.groups, up.stride, up.neurons, up.fan_in) == (2, 2, 12, 16)
    assert table["out.weight"].kind == "conv"
    assert not any(role.kind == "head" for role in table)


def test_vit_with_class_token_positions_and_scalars():
    table = parameter_roles(ViT())
    for name, rows in (("cls_token", 1), ("pos_embed", 5)):
        role = table[name]
        assert (role.kind, role.family, role.neuron_dim) == ("position", "embedding", (0, 1))
        assert (role.neurons, role.fan_in) == (rows, 8)
    assert table["layer_scale"].kind == "vector"
    assert table["temperature"].kind == "scalar"
    assert table["head.weight"].kind == "head"


def test_tied_gpt_has_one_role_for_the_tied_tensor_and_no_other_head():
    table = parameter_roles(GPT())
    tied = table["wte.weight"]
    assert (tied.kind, tied.family, tied.uses, tied.aliases) == ("tied", "embedding", 2, ("lm_head.weight",))
    assert table["lm_head.weight"] is tied
    assert "lm_head.weight" not in [role.name for role in table]
    assert not any(role.kind == "head" for role in table)
    assert table["c_attn.weight"].slices == 3


def test_a_value_head_beside_a_tied_one_is_the_head():
    model = GPT()
    model.value = nn.Linear(8, 1)
    assert kinds(model)["value.weight"] == "head"
    assert kinds(model)["wte.weight"] == "tied"


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))


def test_lora_pairs_on_a_frozen_base():
    model = nn.Sequential(
        LoRA(nn.Linear(6, 8), 2), LoRA(nn.Linear(8, 8), 1), nn.Linear(8, 4).requires_grad_(False)
    )
    table = parameter_roles(model)
    assert len(table) == 10
    assert {role.name for role in table if role.trainable} == {f"{i}.lora_{p}" for i in (0, 1) for p in "AB"}
    assert (table["0.lora_A"].kind, table["0.lora_A"].neurons) == ("matrix", 2)
    assert (table["0.lora_B"].kind, table["0.lora_B"].neurons) == ("matrix", 8)
    assert (table["1.lora_B"].kind, table["1.lora_B"].fan_in) == ("gain", 1)
    assert table["2.weight"].kind == "head"
    assert not table["2.weight"].trainable


def test_gan_with_spectral_norm():
    discriminator = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 4)),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(8, 1)),
    )
    generator = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (8, 1, 1)), nn.ConvTranspose2d(8, 3, 4))
    table = parameter_roles(nn.ModuleDict({"d": discriminator, "g": generator}))
    assert table["d.0.parametrizations.weight.original"].kind == "conv"
    assert table["d.2.parametrizations.weight.original"].kind == "matrix"
    assert table["g.0.weight"].kind == "head"  # documented: the last Linear of all; an override moves it
    assert table["g.2.weight"].neuron_dim == 1
    moved = parameter_roles(
        nn.ModuleDict({"d": discriminator, "g": generator}), {r"d\.2\.parametrizations\.weight": "head"}
    )
    assert [role.name for role in moved if role.kind == "head"] == ["d.2.parametrizations.weight.original"]


ARCHITECTURES = [
    ResNet,
    MobileNet,
    Recurrent,
    UNet,
    ViT,
    GPT,
    lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
]


@pytest.mark.parametrize("build", ARCHITECTURES)
def test_every_parameter_is_listed_once_under_its_first_name(build):
    model = build()
    listed = [(role.name, parameter) for role, parameter in parameter_roles(model).items()]
    expected = list(model.named_parameters())
    assert [name for name, _ in listed] == [name for name, _ in expected]
    assert all(a is b for (_, a), (_, b) in zip(listed, expected, strict=True))


def test_compiled_models_keep_their_prefix():
    assert kinds(torch.compile(ResNet()))["_orig_mod.fc.weight"] == "head"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_data_parallel_models_keep_their_prefix():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(GPT())
        assert kinds(model) == {f"module.{name}": kind for name, kind in kinds(GPT()).items()}
    finally:
        torch.distributed.destroy_process_group()


# -- sharing and freezing --------------------------------------------------------------------------------


def test_a_shared_layer_counts_its_uses_and_is_no_head():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer)
    weight = parameter_roles(model)["0.weight"]
    assert (weight.kind, weight.uses, weight.aliases) == ("matrix", 3, ("2.weight", "4.weight"))


def test_a_last_linear_whose_weight_is_used_elsewhere_too_is_no_head():
    model = nn.Sequential(nn.Linear(4, 4), Holder())
    model[1].register_parameter("kernel", model[0].weight)
    role = parameter_roles(model)["0.weight"]
    assert (role.kind, role.aliases) == ("matrix", ("1.kernel",))


def test_layers_that_share_a_weight_but_not_its_axis_say_so():
    model = nn.ModuleDict({"encode": nn.Conv2d(3, 8, 3), "decode": nn.ConvTranspose2d(8, 3, 3)})
    model["decode"].weight = model["encode"].weight
    role = parameter_roles(model)["encode.weight"]
    assert (role.kind, role.neuron_dim) == ("conv", 0)
    assert "differ in their neuron axis" in role.note


def test_a_known_layer_outweighs_a_guess_about_the_same_tensor():
    model = Holder()
    model.kernel = nn.Parameter(torch.randn(6, 4, 3))
    model.conv = nn.Conv1d(4, 6, 3)
    model.conv.weight = model.kernel
    role = parameter_roles(model)["kernel"]
    assert (role.kind, role.uses, role.note) == ("conv", 2, "")


def test_freezing_changes_nothing_but_the_flag():
    model = ResNet()
    model.fc.requires_grad_(False)
    frozen, free = parameter_roles(model), parameter_roles(ResNet())
    assert [role.kind for role in frozen] == [role.kind for role in free]
    assert [role.name for role in frozen if not role.trainable] == ["fc.weight", "fc.bias"]
