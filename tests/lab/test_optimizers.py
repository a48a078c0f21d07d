"""Optimisers by name: what a name means, what is refused, what a record says of it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import archopt.lab.optimizers as registry
from archopt.lab.errors import LabError
from archopt.lab.optimizers import ENTRIES, Choice, Entry, numbers, parse_optimizer, register, state_bytes

AVAILABLE = [name for name, entry in ENTRIES.items() if not entry.unavailable]


def network(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3, bias=bias)
    return nn.Sequential(*layers)


def step(model: nn.Module, optimizer: Optimizer) -> None:
    torch.manual_seed(1)
    model(torch.randn(8, 1, 5, 5)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def built(text: str, model: nn.Module, lr: float | None = None) -> Optimizer:
    choice = parse_optimizer(text)
    return choice.build(model, choice.default_lr if lr is None else lr, {})


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_name_trains_and_tells_what_it_did(name):
    model = network(bias=name != "agd-paper")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = built(name, model)
    for _ in range(2):
        step(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()) if a.ndim > 1)
    assert all(torch.isfinite(torch.tensor(value)) for value in numbers(optimizer).values())
    assert state_bytes(optimizer) >= 0


def test_names_keep_their_meaning():
    plain, roles = built("nero", network()), built("nero-roles", network())
    assert [len(plain.param_groups), "role" in plain.param_groups[0]] == [1, False]
    assert {group["role"] for group in roles.param_groups} == {"conv", "head", "bias"}
    kept, fresh = network(bias=False), network(bias=False)
    built("agd", kept)
    built("agd-paper", fresh)
    assert torch.equal(kept[3].weight, network(bias=False)[3].weight)
    gram = fresh[3].weight @ fresh[3].weight.T
    assert torch.allclose(gram, torch.eye(3) * 3 / 36, atol=1e-6)
    assert built("sgd", network()).defaults["momentum"] == 0
    assert built("lamb-cs", network()).defaults["betas"] == (0.0, 0.999)
    assert built("adam", network()).defaults["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="is called 'nero' already"):
        register(Entry("nero", "another", "torch.optim:SGD"))


def test_constrained_names_keep_rows_balanced():
    model = network()
    optimizer = built("madam-cs", model)
    step(model, optimizer)
    rows = model[3].weight
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(rows.mean(dim=1), torch.zeros(3), atol=1e-6)


def test_published_agd_refuses_vectors_in_one_line():
    with pytest.raises(LabError, match=r"agd-paper: .*AGD\(model\)"):
        built("agd-paper", network())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adamm", "did you mean 'adam'"),
        ("Nero", "did you mean 'nero'"),
        ("adamw(weight_decey=0.1)", "did you mean 'weight_decay'"),
        ("nero(foo=1)", "no option 'foo'.*lr, beta, zero_mean"),
        ("agd(lr=0.1)", "agd has no learning rate"),
        ("autonero(lr=0.1)", "autonero has no learning rate"),
        ("adam(lr=-1)", "lr=-1, expected a number, 0 <= lr"),
        ("adam(lr=[])", r"lr=\[\], expected a number or several"),
        ("adam(lr=[0.1,-1])", "lr=-1, expected a number, 0 <= lr"),
        ("adam(lr='x')", "expected a number"),
        ("adam(lr=True)", "expected a number"),
        ("torch.optim:Adamm", "did you mean 'Adam'"),
        ("no_such_package.x:Y", "install the package"),
        ("torch.nn:Linear", "expected a subclass of torch.optim.Optimizer"),
        ("./nowhere.py:Mine", "no file"),
        ("torch.optim:", "expected"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line_with_the_nearest(text, said):
    with pytest.raises(LabError, match=said) as refused:
        parse_optimizer(text)
    assert "\n" not in str(refused.value)


def test_options_out_of_range_are_refused_in_the_words_of_the_rule():
    with pytest.raises(LabError, match=r"nero\(beta=1.0\) at lr=0.01: .*beta=1.0.*< 1"):
        built("nero(beta=1.0)", network())


def test_labels_are_canonical():
    labels = [
        parse_optimizer(text).label
        for text in ("adam(eps=1e-6,amsgrad=True)", "adam( amsgrad=True, eps=0.000001)")
    ]
    assert labels == ["adam(amsgrad=True,eps=1e-06)"] * 2
    assert parse_optimizer("adam(lr=1)").label == "adam(lr=1.0)"


def test_options_are_recorded_in_full_as_they_were_resolved():
    settings = {"adam": {"lr": 0.1, "betas": (0.0, 0.999)}, "nero": {"lr": 0.5}}
    adam = parse_optimizer("adam(eps=1e-3)")
    assert adam.resolved(settings)["betas"] == (0.0, 0.999)
    assert adam.resolved(settings)["eps"] == 1e-3
    assert adam.resolved(settings)["amsgrad"] is False
    assert "lr" not in adam.resolved(settings)
    assert adam.build(network(), 0.1, settings).defaults["betas"] == (0.0, 0.999)
    assert parse_optimizer("adam(betas=(0.5,0.5))").resolved(settings)["betas"] == (0.5, 0.5)
    assert parse_optimizer("nero").resolved(settings)["zero_mean"] is True  # None in the signature
    assert adam.published_lr(settings) == 0.1
    assert parse_optimizer("adam(lr=0.2)").published_lr(settings) is None
    assert parse_optimizer("sgd").published_lr(settings) is None


MINE = """
import torch
class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=0.25, power=1):
        super().__init__(params, {"lr": lr, "power": power})
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad.sign()
class Whole(Signs):
    def __init__(self, model, lr):
        self.seen = model
        super().__init__(model.parameters(), lr)
class Free(torch.optim.SGD):
    def __init__(self, params, **others):
        super().__init__(params, lr=0.1, **others)
"""


def test_any_class_can_be_named_and_receives_what_its_signature_asks_for(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    signs = parse_optimizer(f"{file}:Signs(power=2)")
    assert (signs.default_lr, signs.entry.rate) == (0.25, True)
    assert signs.resolved({}) == {"power": 2}
    assert signs.entry.source is not None
    assert signs.entry.source.startswith("sha256:")
    model = network()
    step(model, signs.build(model, 0.5, {}))
    whole = parse_optimizer(f"{file}:Whole")
    assert whole.default_lr is None
    optimizer = whole.build(model, 0.5, {})
    assert optimizer.seen is model
    free = parse_optimizer(f"{file}:Free(momentum=0.9)")
    assert (free.entry.rate, free.default_lr) == (False, None)
    assert free.build(model, None, {}).defaults["momentum"] == 0.9
    rms = parse_optimizer("torch.optim:RMSprop")
    assert isinstance(rms.build(model, 0.1, {}), torch.optim.RMSprop)
    assert rms.entry.source is None


def test_an_old_torch_is_told_which_is_needed(monkeypatch):
    monkeypatch.setattr(registry, "_torch_version", lambda: (2, 8))
    entry = Entry("muon", "", "archopt.lab.muon:MuonWithAdamW", needs_torch=(2, 9))
    assert entry.unavailable is not None
    assert "muon needs torch 2.9 or newer" in entry.unavailable
    with pytest.raises(LabError, match=r"needs torch 2\.9"):
        Choice(entry, {}).build(network(), 0.1, {})


def test_a_peer_that_is_not_installed_is_refused_with_how_to_get_it(monkeypatch):
    find = registry.importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda name: None if name == "absent" else find(name)
    )
    entry = Entry("free", "", "absent:Free", peer=True)
    assert entry.package == "absent"
    with pytest.raises(LabError, match=r"^free needs the package absent: pip install 'archopt\[peers\]'$"):
        Choice(entry, {}).build(network(), 0.1, {})


@pytest.mark.parametrize(
    ("name", "option", "before", "other"),
    [
        ("nero", "stochastic_rounding", False, True),
        ("nero-roles", "stochastic_rounding", False, True),
        ("muon", "products", "bfloat16", "float32"),
    ],
)
def test_an_option_that_joined_later_is_recorded_only_where_it_is_not_as_before(name, option, before, other):
    """So that runs which were stored before it joined can be gone on with."""
    assert option not in parse_optimizer(name).resolved({})
    assert option not in parse_optimizer(f"{name}({option}={before!r})").resolved({})
    assert parse_optimizer(f"{name}({option}={other!r})").resolved({})[option] == other


def test_muon_has_two_rates_and_both_can_be_set():
    assert parse_optimizer("muon(lr=[0.02,0.05],aux_lr=0.02)").label == "muon(aux_lr=0.02)"
    pair = parse_optimizer("muon(lr=0.05,aux_lr=0.02)")
    assert (pair.label, pair.fixed_lr) == ("muon(aux_lr=0.02,lr=0.05)", 0.05)
    assert pair.resolved({})["aux_lr"] == 0.02
    optimizer = pair.build(network(), pair.default_lr, {})
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.02]
    ranged = parse_optimizer("muon(aux_lr=0.02)").build(network(), 0.1, {})
    assert [group["lr"] for group in ranged.param_groups] == [0.1, 0.02]


def test_autonero_tells_its_angle_and_what_set_it():
    model = network()
    optimizer = built("autonero(target=0.0)", model)
    for _ in range(3):
        step(model, optimizer)
    told = numbers(optimizer)
    assert set(told) == {"theta", "rho", "C", "G", "skipped"}
    assert told["theta"] == float(optimizer.theta)
    assert told["skipped"] == 0
    assert {group["target"] for group in optimizer.param_groups} == {0.0}


def test_state_bytes_count_every_tensor():
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert state_bytes(optimizer) == 0
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 4 * 8
