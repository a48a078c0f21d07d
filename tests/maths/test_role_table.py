"""Overrides of roles, the printed table, and parameter groups."""

import doctest
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from archopt.optim.nero import nero_treatment
from archopt.roles import KINDS, group_by_treatment, parameter_roles
from maths.models import GPT, HfConv1D, Holder, ResNet, UNet, ViT, kinds

# -- overrides -------------------------------------------------------------------------------------------


def test_the_first_matching_override_wins():
    overrides = {r"fc\.weight": "matrix", r"weight": {"kind": "vector"}}
    table = parameter_roles(ResNet(), overrides)
    assert table["fc.weight"].kind == "matrix"
    assert table["stem.weight"].kind == "vector"
    assert table["stem.weight"].note == "by override 'weight'"
    assert (table["stem.weight"].fan_in, table["stem.weight"].neurons) == (1, 216)
    assert table["fc.bias"].kind == "bias"


def test_overrides_match_aliases():
    assert kinds(GPT(), overrides={r"^lm_head": "embedding"})["wte.weight"] == "embedding"


def test_overriding_the_head_leaves_no_other_head():
    table = parameter_roles(ViT(), {r"^head\.weight": "matrix"})
    assert not any(role.kind == "head" for role in table)
    table = parameter_roles(ViT(), {r"out_proj\.weight": "head"})
    assert [role.name for role in table if role.kind == "head"] == ["attn.out_proj.weight"]


def test_overrides_state_axes_groups_and_slices():
    model = Holder(experts=(3, 8, 4), pos=(1, 4, 7, 7), kv=(8, 4), up=(4, 3, 2))
    table = parameter_roles(
        model,
        {
            "experts": {"kind": "matrix", "neuron_dim": [0, 1]},
            "pos": {"kind": "position", "neuron_dim": (0, 2, 3)},
            "kv": {"slices": 2},
            "up": {"kind": "conv_transpose", "channel_groups": 2, "groups": 2, "stride": 2},
        },
    )
    assert (table["experts"].neurons, table["experts"].fan_in) == (24, 4)
    assert (table["pos"].neurons, table["pos"].fan_in) == (49, 4)
    assert (table["kv"].kind, table["kv"].slices) == ("matrix", 2)
    assert (table["up"].neurons, table["up"].fan_in, table["up"].stride) == (6, 4, 2)


def test_a_kind_by_itself_brings_its_own_axis():
    model = nn.ModuleDict({"deconv": nn.ConvTranspose1d(4, 6, 3, groups=2), "qkv": nn.Linear(4, 12)})
    table = parameter_roles(model, {r"deconv\.weight": "conv", r"qkv\.weight": "matrix"})
    assert (table["deconv.weight"].neuron_dim, table["deconv.weight"].channel_groups) == (0, 1)
    assert table["qkv.weight"].slices == 1
    table = parameter_roles(nn.Conv1d(4, 6, 3, groups=2), {"weight": "head"})
    assert (table["weight"].kind, table["weight"].groups) == ("head", 2)
    table = parameter_roles(nn.ModuleList([HfConv1D(6, 4)]), {"weight": "head"})
    assert (table["0.weight"].kind, table["0.weight"].neuron_dim) == ("head", 1)
    table = parameter_roles(Holder(a=(3, 4, 5), b=(3, 4)), {"a": "position", "b": "conv_transpose"})
    assert (table["a"].neuron_dim, table["b"].neuron_dim) == ((0, 1), 1)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({r"fc\.wieght": "head"}, ValueError, ["'fc\\\\.wieght' matches no parameter", "fc.weight"]),
        ({"zzz": "head"}, ValueError, ["'zzz' matches no parameter", "stem.weight"]),
        ({"fc.weight": "haed"}, ValueError, ["'haed' is no kind; did you mean 'head'?", "conv_transpose"]),
        (
            {"fc.weight": {"knd": "head"}},
            ValueError,
            ["'knd' is no field; did you mean 'kind'?", "neuron_dim"],
        ),
        ({"fc": "head"}, ValueError, ["fc.bias of shape (10,) a 'head'", "two or more dimensions", "narrow"]),
        ({"fc.weight": {"neuron_dim": 2}}, ValueError, ["fc.weight of shape (10, 16)", "neuron_dim=2"]),
        ({"fc.weight": {"neuron_dim": 0.5}}, TypeError, ["neuron_dim=0.5", "an integer or a tuple"]),
        ({"fc.weight": {"slices": 3}}, ValueError, ["3 slices", "do not divide dimension 0 evenly"]),
        ({"fc.weight": {"slices": 0}}, ValueError, ["slices=0", "expected a number from 1"]),
        ({"fc.weight": {"slices": "3"}}, TypeError, ["slices='3'", "expected a number from 1"]),
        ({"fc.weight": {"channel_groups": 3}}, ValueError, ["channel_groups=3", "fc.weight"]),
        ({"fc.weight": {"kind": "vector", "neuron_dim": 1}}, ValueError, ["entry by entry", "neuron_dim"]),
        ({"(": "head"}, ValueError, ["'(' is not a regular expression"]),
        ({"fc.weight": 3}, TypeError, ["3 is neither a kind nor a dict of kind, neuron_dim"]),
        ({"fc.weight": {"kind": ["head"]}}, ValueError, ["['head'] is no kind"]),
        ({3: "head"}, TypeError, ["a pattern is a string, got a int"]),
        ([("fc.weight", "head")], TypeError, ["overrides is a list, expected a mapping"]),
    ],
)
def test_mistaken_overrides_are_refused_with_the_remedy(overrides, error, words):
    with pytest.raises(error) as caught:
        parameter_roles(ResNet(), overrides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the table -------------------------------------------------------------------------------------------


def test_the_printed_table_says_what_happens_to_every_parameter():
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos = nn.Parameter(torch.randn(1, 9, 8))
            self.experts = nn.Parameter(torch.randn(2, 8, 8))
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.wte = nn.Embedding(1000, 8)
            self.conv = nn.Conv2d(4, 8, 3, groups=2)
            self.dw = nn.Conv2d(8, 8, 3, groups=8, bias=False)
            self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
            self.blur = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6, bias=False)
            self.norm = nn.LayerNorm(8)
            self.qkv = nn.Linear(8, 24, bias=False)
            self.old = nn.Linear(8, 8, bias=False).requires_grad_(False)
            self.value = nn.Linear(8, 1, bias=False)
            self.decode = nn.Linear(8, 1000, bias=False)
            self.decode.weight = self.wte.weight
            self.out = nn.Linear(8, 2, bias=False)

    expected = """
name          shape          role             neurons  fan-in  Nero                          AGD
------------  -------------  ---------------  -------  ------  ----------------------------  -----------------------------------------------
pos           1 x 9 x 8      position               9       8  rows turn, mean 0, norm 1     per row, RMS radius measured
experts       2 x 8 x 8      unknown                2      64  rows turn, mean 0, norm 1     RMS radius measured
scale         ()             scalar                 1       1  entries move one by one       sign, radius measured
wte.weight    1000 x 8       tied (2 uses)      1,000       8  rows turn, mean 0, norm 1     per row, RMS radius measured
conv.weight   8 x 2 x 3 x 3  conv (2 groups)        8      18  filters turn, mean 0, norm 1  per group and tap, radius sqrt(out/in)/sqrt(taps)
conv.bias     8              bias                   8       1  entries move one by one       RMS radius 1
dw.weight     8 x 1 x 3 x 3  depthwise              8       9  filters turn, mean 0, norm 1  per channel, radius 1/sqrt(taps)
up.weight     8 x 6 x 2 x 2  conv_transpose         6      32  filters turn, mean 0, norm 1  per tap, radius sqrt(out/in)*stride/sqrt(taps)
blur.weight   6 x 1 x 2 x 2  conv_transpose (6 groups)  6       4  filters turn, mean 0, norm 1  per channel, radius stride/sqrt(taps)
norm.weight   8              gain                   8       1  entries move one by one       signs, radius 1
norm.bias     8              shift                  8       1  entries move one by one       RMS radius 1
qkv.weight    24 x 8         matrix (3 slices)     24       8  rows turn, mean 0, norm 1     per slice, radius sqrt(out/in)
old.weight    8 x 8          matrix                 8       8  frozen                        frozen
value.weight  1 x 8          matrix                 1       8  rows turn, mean 0, norm 1     radius sqrt(out/in)
out.weight    2 x 8          head                   2       8  rows turn, mean 0, norm 1     radius sqrt(out/in)

15 tensors, 8,937 entries (64 frozen), 1,091 trainable neurons
pos: a parameter of Tiny, by its name and shape taken for positions
experts: a parameter of Tiny with 3 dimensions: say with an override what it is; until then, its rows lie along dimension 0
wte.weight: the same tensor as decode.weight
qkv.weight: packed query, key and value, by its name and shape
out.weight: the last Linear in registration order
"""  # noqa: E501
    table = parameter_roles(Tiny())
    words = [line.split() for line in expected.strip().splitlines() if not line.startswith("---")]
    printed = str(table).splitlines()
    assert [line.split() for line in printed if not line.startswith("---")] == words


def test_the_columns_of_the_printed_table_line_up():
    lines = str(parameter_roles(ViT())).splitlines()
    rule = lines[1]
    starts = [i for i in range(len(rule)) if rule[i] == "-" and (i == 0 or rule[i - 1] == " ")]
    assert len(starts) == 7
    for line in lines[2 : lines.index("")]:
        for start in starts[1:]:
            assert line[start - 2 : start] == "  "


def test_a_rule_may_explain_itself_in_the_table():
    text = parameter_roles(nn.Linear(3, 2)).render(lambda role: f"clipped to {role.fan_in}")
    header, _, weight, *_ = text.splitlines()
    assert header.split() == ["name", "shape", "role", "neurons", "fan-in", "treatment"]
    assert weight.split() == ["weight", "2", "x", "3", "head", "2", "3", "clipped", "to", "3"]


def test_a_table_is_iterable_sized_indexed_and_outlives_the_module():
    table = parameter_roles(GPT())
    assert len(table) == len(list(table)) == len(list(table.items()))
    with pytest.raises(KeyError, match=r"did you mean 'wte\.weight'"):
        table["wte.wieght"]
    assert pickle.loads(pickle.dumps(list(table))) == list(table)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_family_and_words(kind):
    family, *words = KINDS[kind]
    assert family in ("hidden", "head", "embedding", "vector")
    assert all(words)


# -- groups ----------------------------------------------------------------------------------------------


def test_equal_treatments_share_a_group_in_order_of_first_appearance():
    table = parameter_roles(ResNet())
    groups = group_by_treatment(table, lambda role: {"decay": role.family == "hidden"})
    assert [group["decay"] for group in groups] == [True, False]
    assert [name for name, _ in groups[1]["params"]] == [r.name for r in table if r.family != "hidden"]
    parameters = dict(ResNet().named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(parameters)


def test_frozen_parameters_stay_in_the_groups_and_none_leaves_one_out():
    model = ResNet()
    model.stem.requires_grad_(False)
    table = parameter_roles(model)
    groups = group_by_treatment(table, lambda role: None if role.kind == "gain" else {"lr": 1.0})
    assert len(groups) == 1
    names = [name for name, _ in groups[0]["params"]]
    assert "stem.weight" in names
    assert names == [role.name for role in table if role.kind != "gain"]


def test_torch_optimizers_take_the_groups_with_their_names():
    model = UNet()
    groups = group_by_treatment(parameter_roles(model), nero_treatment)
    for group in groups:
        group.pop("role"), group.pop("neuron_dim"), group.pop("channel_groups")
    optimizer = torch.optim.SGD(groups, lr=0.1)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_the_examples_of_the_page_hold():
    page = Path(__file__).parents[2] / "docs" / "roles.md"
    results = doctest.testfile(str(page), module_relative=False)
    assert results.attempted >= 5
    assert results.failed == 0
