"""The composite of Muon and AdamW: each parameter with the right one, as torch's own do it."""

import copy

import pytest
import torch
from torch import nn

if not hasattr(torch.optim, "Muon"):
    pytest.skip("torch.optim.Muon came with torch 2.9", allow_module_level=True)

from archopt.lab.muon import MuonWithAdamW, as_matrices


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.conv = nn.Conv1d(6, 8, 3, groups=2)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.conv(self.embed(tokens).mT)).mT
        x = self.norm(x)
        x = self.attention(x, x, x)[0]
        return self.head(self.hidden(x).relu().mean(1))


def loss(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return model(torch.randint(0, 5, (4, 9))).square().mean()


def names(model: nn.Module, group: dict) -> set[str]:
    return {name for name, p in model.named_parameters() for q in group["params"] if p is q}


def test_hidden_matrices_and_convolutions_are_muons_and_the_rest_adamws():
    model = Net()
    muon, adamw = MuonWithAdamW(model).param_groups
    assert names(model, muon) == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "hidden.weight",
    }
    assert names(model, muon) | names(model, adamw) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}])
def test_products_in_float32_move_as_torchs_in_bfloat16_up_to_their_rounding(options):
    torch.manual_seed(0)
    model = Net()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(3)]
    models = copy.deepcopy(model), copy.deepcopy(model)
    for twin, products in zip(models, ("bfloat16", "float32"), strict=True):
        optimizer = MuonWithAdamW(twin, weight_decay=0.1, products=products, **options)
        for step in grads:
            for name, p in twin.named_parameters():
                p.grad = step[name].clone()
            optimizer.step()
    ours = dict(models[1].named_parameters())
    for name, theirs in models[0].named_parameters():
        assert (ours[name] - theirs).norm() < 0.05 * (theirs - start[name]).norm(), name


def test_products_in_float32_resume_to_the_bit():
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = MuonWithAdamW(model, products="float32"), MuonWithAdamW(twin, products="float32")
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (twin, other)):
        loss(m).backward()
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", [{"products": "float16"}, {"products": "float32", "ns_steps": 4}])
def test_products_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        MuonWithAdamW(Net(), **options)


def test_each_part_moves_as_torchs_own_optimisers_move_it():
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    optimizer = MuonWithAdamW(model, lr=0.02, aux_lr=0.003)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    packed = twin.attention.in_proj_weight
    parts = {
        "conv": [nn.Parameter(group.detach().reshape(4, 9)) for group in twin.conv.weight.chunk(2)],
        "packed": [nn.Parameter(part.detach().clone()) for part in packed.chunk(3)],
        "plain": [
            nn.Parameter(p.detach().clone()) for p in (twin.attention.out_proj.weight, twin.hidden.weight)
        ],
    }
    muon = torch.optim.Muon([p for group in parts.values() for p in group], lr=0.02, weight_decay=0.0)
    matrices = {id(twin.conv.weight), id(packed), id(twin.attention.out_proj.weight), id(twin.hidden.weight)}
    rest = [p for p in twin.parameters() if id(p) not in matrices]
    adamw = torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for _ in range(3):
        with torch.no_grad():
            twin.conv.weight.copy_(torch.cat([p.view(4, 3, 3) for p in parts["conv"]]))
            packed.copy_(torch.cat(parts["packed"]))
            twin.attention.out_proj.weight.copy_(parts["plain"][0])
            twin.hidden.weight.copy_(parts["plain"][1])
        loss(twin).backward()
        for part, grad in zip(parts["conv"], twin.conv.weight.grad.chunk(2)):
            part.grad = grad.reshape(4, 9)
        for part, grad in zip(parts["packed"], packed.grad.chunk(3)):
            part.grad = grad
        for part, p in zip(parts["plain"], (twin.attention.out_proj.weight, twin.hidden.weight)):
            part.grad = p.grad
        muon.step()
        adamw.step()
        twin.zero_grad()
    assert torch.allclose(model.conv.weight, torch.cat([p.view(4, 3, 3) for p in parts["conv"]]), atol=1e-6)
    assert torch.allclose(model.attention.in_proj_weight, torch.cat(parts["packed"]), atol=1e-6)
    assert torch.allclose(model.hidden.weight, parts["plain"][1], atol=1e-6)
    assert torch.allclose(model.head.weight, twin.head.weight, atol=1e-6)
    assert torch.allclose(model.embed.weight, twin.embed.weight, atol=1e-6)


def test_channels_last_weights_keep_their_memory_and_move_alike():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2))
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    address = last[0].weight.data_ptr()
    for model in (plain, last):
        optimizer = MuonWithAdamW(model)
        torch.manual_seed(1)
        model(torch.randn(2, 3, 3, 3)).square().mean().backward()
        optimizer.step()
    assert last[0].weight.data_ptr() == address
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    # Muon orthogonalises in bfloat16, so another order of columns is another rounding.
    assert torch.allclose(plain[0].weight, last[0].weight, atol=1e-3)
    assert not torch.allclose(plain[0].weight, nn.Conv2d(3, 4, 2).weight, atol=1e-2)


def test_views_share_the_memory_of_their_parameter():
    for weight in (torch.randn(4, 2, 3), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)):
        first, second = as_matrices(weight, weight, 2)
        first.zero_()
        second.fill_(1.0)
        assert torch.equal(weight[:2], torch.zeros_like(weight[:2]))
        assert torch.equal(weight[2:], torch.ones_like(weight[2:]))


def test_rates_are_two_and_schedulers_move_both():
    optimizer = MuonWithAdamW(Net(), lr=0.2, aux_lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_state_dict_resumes_bit_equal():
    torch.manual_seed(0)
    model = Net()
    optimizer = MuonWithAdamW(model)
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = copy.deepcopy(model)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = MuonWithAdamW(other, lr=9.0)
    resumed.load_state_dict(saved)
    for m, o in ((model, optimizer), (other, resumed)):
        loss(m).backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="expected adamw"):
        MuonWithAdamW(nn.LayerNorm(3)).load_state_dict(saved)


def test_a_parameter_without_gradient_does_not_move():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonWithAdamW(model, weight_decay=0.5, aux_weight_decay=0.5)
    model.hidden.weight.grad = torch.ones(8, 8)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"hidden.weight"}
