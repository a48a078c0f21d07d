"""What AutoNero promises beyond any optimiser: one feedback for all tensors, and steps that are void or none."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from archopt import AutoNero, Nero
from archopt.optim.autonero import module_groups

FORMS = pytest.mark.parametrize("foreach", [False, True])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3))
    return nn.Sequential(*layers).to(dtype)


def give_gradients(model: nn.Module, t: int, skip: tuple[str, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(t)
    for name, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if name in skip or not param.requires_grad else grad


def steps(model: nn.Module, optimizer: AutoNero, times: range, skip: tuple[str, ...] = ()) -> None:
    for t in times:
        give_gradients(model, t, skip)
        optimizer.step()


def bits(model: nn.Module, optimizer: AutoNero) -> dict[str, Tensor]:
    """Weights and state, by name."""
    values = {}
    for name, param in model.named_parameters():
        values[name] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            values[f"{name}/{key}"] = value.clone()
    return values


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], ignore: Callable[[str], bool]
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        if not ignore(name):
            assert actual[name].dtype == expected[name].dtype, name
            assert torch.equal(actual[name], expected[name]), name


def nothing(name: str) -> bool:
    return False


# -- one feedback ------------------------------------------------------------------------------------------


def through_file(content: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_load(model: nn.Module, optimizer: AutoNero) -> tuple[nn.Module, AutoNero]:
    twin = build(seed=1, dtype=next(model.parameters()).dtype)
    other = AutoNero(twin)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(through_file(optimizer.state_dict()))
    return twin, other


def by_names(model: nn.Module, optimizer: AutoNero) -> tuple[nn.Module, AutoNero]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    twin = build(seed=1, dtype=next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    other = AutoNero(twin)
    content = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(twin, other, content, options=options)
    return twin, other


WAYS: dict[str, Callable[[nn.Module, AutoNero], tuple[nn.Module, AutoNero]]] = {
    "load_state_dict": by_load,
    "distributed state dict": by_names,
    "deepcopy": lambda model, optimizer: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer: pickle.loads(pickle.dumps((model, optimizer))),
}


@DTYPES
@pytest.mark.parametrize("way", WAYS)
def test_feedback_resumes_bit_equal(way: str, dtype: torch.dtype) -> None:
    """theta, rho, c, e, q and the counts go on as they were, and a change of theta reaches every tensor."""
    model = build(dtype=dtype)
    optimizer = AutoNero(model)
    steps(model, optimizer, range(4))
    model[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    twin, other = WAYS[way](model, optimizer)
    assert torch.equal(torch.stack(other.feedback), torch.stack(optimizer.feedback))
    assert int(other.skipped) == 1
    steps(model, optimizer, range(5, 8))
    steps(twin, other, range(5, 8))
    assert_same(bits(twin, other), bits(model, optimizer), nothing)
    assert len({id(state["feedback"]) for state in other.state.values()}) == 1


@pytest.mark.parametrize("way", ["load_state_dict", "distributed"])
@pytest.mark.parametrize("weights_first", [True, False])
def test_half_grown_rows_resume_bit_equal(way: str, weights_first: bool) -> None:
    """Rows of a table that started at zero are on their way to RMS 1: construction must not put them there."""

    def make() -> nn.Module:
        model = build()
        nn.init.zeros_(model[0].weight)
        return model

    model, twin = make(), make()
    optimizer = AutoNero(model)
    steps(model, optimizer, range(3))
    assert (model[0].weight.norm(dim=1) < 1).all()
    if weights_first:
        twin.load_state_dict(model.state_dict())
    other = AutoNero(twin)
    if not weights_first:
        twin.load_state_dict(model.state_dict())
    if way == "load_state_dict":
        other.load_state_dict(through_file(optimizer.state_dict()))
    else:
        get_optimizer_state_dict(twin, other)  # the probe
        set_optimizer_state_dict(twin, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert_same(bits(twin, other), bits(model, optimizer), nothing)
    steps(model, optimizer, range(3, 6))
    steps(twin, other, range(3, 6))
    assert_same(bits(twin, other), bits(model, optimizer), nothing)


def test_distributed_checkpoint_on_disk_resumes_bit_equal(tmp_path: Path) -> None:
    model = build()
    optimizer = AutoNero(model)
    steps(model, optimizer, range(4))
    content = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(content, checkpoint_id=tmp_path, no_dist=True)
    twin = build(seed=1)
    other = AutoNero(twin)
    first = float(other.theta)
    # The probe with zero gradients runs here, and must leave no trace in the feedback.
    read = {"model": twin.state_dict(), "optimizer": get_optimizer_state_dict(twin, other)}
    assert float(other.theta) == first
    assert int(other.feedback.steps) == 0
    dcp.load(read, checkpoint_id=tmp_path, no_dist=True)
    twin.load_state_dict(read["model"])
    set_optimizer_state_dict(twin, other, read["optimizer"])
    steps(model, optimizer, range(4, 7))
    steps(twin, other, range(4, 7))
    assert_same(bits(twin, other), bits(model, optimizer), nothing)


def test_feedback_survives_when_its_first_holders_freeze() -> None:
    model = build()
    model[0].weight.requires_grad_(False)
    optimizer = AutoNero(model, initial_theta=0.01)
    steps(model, optimizer, range(3))
    theta = float(optimizer.theta)
    assert model[0].weight not in optimizer.state
    model[0].weight.requires_grad_(True)  # first in the groups, and new
    model[1].weight.requires_grad_(False)
    steps(model, optimizer, range(3, 4))
    assert int(optimizer.feedback.steps) == 4
    assert float(optimizer.theta) == pytest.approx(theta, rel=0.2)
    assert optimizer.state[model[0].weight]["feedback"] is optimizer.state[model[4].weight]["feedback"]


def test_separated_feedbacks_are_joined_again() -> None:
    """Tools that move state between devices entry by entry give every parameter a copy of its own."""
    model, twin = build(), build()
    optimizer, other = AutoNero(model), AutoNero(twin)
    for net, opt in ((model, optimizer), (twin, other)):
        steps(net, opt, range(3))
    for state in other.state.values():
        state["feedback"] = state["feedback"].clone()
    for net, opt in ((model, optimizer), (twin, other)):
        steps(net, opt, range(3, 6))
    assert_same(bits(twin, other), bits(model, optimizer), nothing)


def test_added_group_joins_the_feedback() -> None:
    model, extra = build(), nn.Linear(4, 4, bias=False)
    optimizer = AutoNero(model)
    steps(model, optimizer, range(3))
    for group in module_groups(extra, roles={"weight": "matrix"}):
        optimizer.add_param_group(group)
    before = extra.weight.detach().clone()
    give_gradients(extra, 3)
    steps(model, optimizer, range(3, 4))
    assert int(optimizer.feedback.steps) == 4
    assert int(optimizer.state[extra.weight]["step"]) == 1
    assert not torch.equal(extra.weight, before)
    assert optimizer.state[extra.weight]["feedback"] is optimizer.state[model[1].weight]["feedback"]


def test_logged_numbers_are_copies() -> None:
    model = build()
    optimizer = AutoNero(model)
    steps(model, optimizer, range(2))
    theta = optimizer.theta
    kept = float(theta)
    steps(model, optimizer, range(2, 5))
    assert float(theta) == kept != float(optimizer.theta)
    assert theta.shape == ()


def test_feedback_is_float32_unless_weights_are_wider() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = build(dtype=dtype)
        optimizer = AutoNero(model)
        steps(model, optimizer, range(2))
        assert optimizer.theta.dtype == expected


# -- steps that are void, or none --------------------------------------------------------------------------


@FORMS
@DTYPES
def test_zero_gradients_are_no_step(foreach: bool, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    optimizer = AutoNero(model, foreach=foreach)
    steps(model, optimizer, range(3))
    before = bits(model, optimizer)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same(bits(model, optimizer), before, nothing)


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["newton-schulz", "svd"])
def test_one_bad_entry_voids_the_whole_step(foreach: bool, value: float, method: str) -> None:
    """Also for the tensors that are finite, for theta and its averages, and for a tensor without a gradient."""
    model = build()
    optimizer = AutoNero(model, foreach=foreach, orthogonalise=method)
    steps(model, optimizer, range(3))
    before = bits(model, optimizer)
    give_gradients(model, 3, skip=("4.weight",))
    model[3].bias.grad[1] = value
    optimizer.step()
    assert_same(bits(model, optimizer), before, lambda name: name.endswith("feedback"))
    past, now = before["0.weight/feedback"], torch.stack(optimizer.feedback)
    assert torch.equal(now[:-1], past[:-1])
    assert int(optimizer.skipped) == 1


@FORMS
def test_a_bad_first_step_leaves_a_fresh_optimizer(foreach: bool) -> None:
    model, twin = build(), build()
    optimizer, other = AutoNero(model, foreach=foreach), AutoNero(twin, foreach=foreach)
    give_gradients(model, 9)
    model[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    steps(model, optimizer, range(4))
    steps(twin, other, range(4))
    assert_same(bits(model, optimizer), bits(twin, other), lambda name: name.endswith("feedback"))
    assert torch.equal(optimizer.theta, other.theta)


@FORMS
def test_no_gradient_drops_the_movement_and_keeps_the_rest(foreach: bool) -> None:
    model = build()
    optimizer = AutoNero(model, foreach=foreach)
    steps(model, optimizer, range(3))
    before = bits(model, optimizer)
    assert before["3.weight/movement"].any()
    steps(model, optimizer, range(3, 4), skip=("3.weight",))
    after = bits(model, optimizer)
    own = [name for name in before if name.startswith("3.weight") and not name.endswith("feedback")]
    assert not after["3.weight/movement"].any()
    for name in own:
        assert name.endswith("movement") or torch.equal(after[name], before[name]), name


def test_a_tensor_that_wakes_late_starts_its_own_count() -> None:
    """Its first step is as long as any first step: a row turns by theta, a bias entry moves by theta."""
    model = build()
    optimizer = AutoNero(model)
    steps(model, optimizer, range(20), skip=("3.weight", "3.bias"))
    weight, bias = model[3].weight.detach().clone(), model[3].bias.detach().clone()
    steps(model, optimizer, range(20, 21))
    theta = float(optimizer.theta)
    assert int(optimizer.state[model[3].weight]["step"]) == 1
    assert torch.allclose((model[3].bias - bias).abs(), torch.tensor(theta), rtol=1e-3)
    cosine = nn.functional.cosine_similarity(model[3].weight, weight)
    assert (cosine.clamp(max=1).acos() <= 1.1 * theta).all()
    assert (cosine < 1 - 0.01 * theta**2).any()


@FORMS
def test_zero_lr_freezes_weights_and_theta(foreach: bool) -> None:
    model = build()
    optimizer = AutoNero(model, foreach=foreach)
    steps(model, optimizer, range(3))
    before, feedback = bits(model, optimizer), optimizer.feedback
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, range(3, 6))
    names = [name for name, _ in model.named_parameters()]
    assert_same(bits(model, optimizer), before, lambda name: name not in names)
    assert torch.equal(optimizer.theta, feedback.theta)
    assert torch.equal(optimizer.feedback.slope, feedback.slope)
    assert int(optimizer.feedback.steps) == 6
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    steps(model, optimizer, range(6, 8))
    assert not torch.equal(optimizer.theta, feedback.theta)


def test_lr_of_one_group_scales_its_movement_alone() -> None:
    model, twin = build(dtype=torch.float64), build(dtype=torch.float64)
    optimizer, other = AutoNero(model), AutoNero(twin)
    for group in optimizer.param_groups:
        group["lr"] = 0.5 if group["role"] == "bias" else 1.0
    before = bits(model, optimizer)
    steps(model, optimizer, range(1))
    steps(twin, other, range(1))
    for name, param in model.named_parameters():
        moved, full = param - before[name], twin.get_parameter(name) - before[name]
        factor = 0.5 if name.endswith("bias") and not name.startswith("2") else 1.0
        assert torch.allclose(moved, factor * full, rtol=1e-9, atol=1e-15), name


# -- rows and precision ------------------------------------------------------------------------------------


def test_padding_rows_stay_zero_and_absent_tokens_keep_their_bits() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 3))
    optimizer = AutoNero(model)
    absent = model[0].weight[4:].detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        optimizer.step()
    assert not model[0].weight[2].any()
    assert torch.equal(model[0].weight[4:], absent)


def test_construction_changes_nothing_but_embeddings_that_are_to_have_rms_one() -> None:
    model = build()
    before = copy.deepcopy(model)
    AutoNero(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    AutoNero(model, embedding_radius="rms")
    for name, param in model.named_parameters():
        if name == "0.weight":
            assert torch.allclose(param.square().mean(1), torch.ones(5))
            assert torch.allclose(nn.functional.cosine_similarity(param, before[0].weight), torch.ones(5))
        else:
            assert torch.equal(param, before.get_parameter(name)), name
    again = copy.deepcopy(model)
    AutoNero(again, embedding_radius="rms")
    assert torch.equal(again[0].weight, model[0].weight)
    AutoNero(before, embedding_radius="own")
    assert not torch.allclose(before[0].weight.square().mean(1), torch.ones(5))


def test_unit_radius_starts_rows_at_one() -> None:
    model = build()
    optimizer = AutoNero(model, radius="unit")
    assert torch.allclose(model[3].weight.norm(dim=1), torch.ones(6))
    steps(model, optimizer, range(1))
    assert torch.allclose(optimizer.state[model[3].weight]["radius"], torch.ones(6, 1), atol=0.02)


def test_bfloat16_movement_is_the_one_before_rounding() -> None:
    """At a small angle rounding swallows the move of most entries; d and R must not see that."""
    model = build(dtype=torch.bfloat16)
    exact = build().to(torch.bfloat16).float()
    optimizer, other = AutoNero(model, initial_theta=1e-4), AutoNero(exact, initial_theta=1e-4)
    with torch.no_grad():
        exact[0].weight.copy_(model[0].weight)  # rescaled and rounded
    for net, opt in ((model, optimizer), (exact, other)):
        give_gradients(model, 0)
        for param, source in zip(net.parameters(), model.parameters(), strict=True):
            param.grad = source.grad.to(param.dtype)  # type: ignore[union-attr]
        opt.step()
    for param, wide in zip(model.parameters(), exact.parameters(), strict=True):
        for key in ("movement", "radius"):
            assert optimizer.state[param][key].dtype == torch.float32
            assert torch.equal(optimizer.state[param][key], other.state[wide][key])
    assert float(optimizer.G) == pytest.approx(float(other.G))


def test_embeddings_may_grow_to_rms_one_with_nothing_scaled() -> None:
    model = build()
    with torch.no_grad():
        model[0].weight.mul_(0.3)
        model[0].weight[2].mul_(100.0)
    before = model[0].weight.detach().clone()
    optimizer = AutoNero(model, embedding_radius="grow", initial_theta=0.01)
    assert torch.equal(model[0].weight, before)
    length = before.size(1) ** 0.5
    short = before.norm(dim=1) < length
    assert bool(short.any())
    assert not bool(short[2])
    steps(model, optimizer, range(1))
    state = optimizer.state[model[0].weight]
    assert torch.equal((state["grows_to"] > 0).flatten(), short)
    moved = (model[0].weight.detach() - before).norm(dim=1)
    used = moved > 0
    # A plain step of a short row is theta sqrt(d) long; the long row turns, by about theta times its own radius.
    assert moved[used & short].tolist() == pytest.approx(
        [0.01 * length] * int((used & short).sum()), rel=1e-4
    )
    assert float(state["radius"][2]) == pytest.approx(float(before[2].norm()))
    for _ in range(400):
        steps(model, optimizer, range(1))
    assert bool((state["grows_to"] == 0)[used].all())


def test_a_movement_in_bfloat16_takes_two_bytes_and_hardly_changes_the_feedback() -> None:
    model, twin = build(), build()
    exact, narrow = AutoNero(model), AutoNero(twin, movement_dtype="bfloat16")
    steps(model, exact, range(20))
    steps(twin, narrow, range(20))
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        wide, kept = exact.state[param]["movement"], narrow.state[other]["movement"]
        assert (wide.element_size(), kept.element_size()) == (4, 2)
    assert float(narrow.rho) == pytest.approx(float(exact.rho), abs=2e-3)
    assert float(narrow.theta) == pytest.approx(float(exact.theta), rel=1e-3)
    assert float(narrow.theta) != float(exact.theta)  # it did read the narrow one


# -- refusals ----------------------------------------------------------------------------------------------


def refused(make: Callable[[], Any], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as info:
        make()
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_bare_parameters_are_refused_with_the_remedy() -> None:
    model = build()
    for params in (model.parameters(), model.named_parameters(), [{"params": list(model.parameters())}]):
        refused(lambda params=params: AutoNero(params), TypeError, "AutoNero(model)", "module_groups")
    refused(lambda: AutoNero(model[1].weight), TypeError, "AutoNero(model)")


def test_a_module_without_matrices_is_refused() -> None:
    refused(lambda: AutoNero(nn.LayerNorm(4)), ValueError, "LayerNorm has none")
    refused(lambda: AutoNero(nn.ReLU()), ValueError, "nothing to train")


def test_wrong_options_are_refused() -> None:
    model = build()
    refused(lambda: AutoNero(model, feedback_gian=0.1), TypeError, "'feedback_gian'", "'feedback_gain'")
    refused(lambda: AutoNero(model, orthogonalise="svdd"), ValueError, "'svdd'", "'svd'")
    refused(lambda: AutoNero(model, radius="rsm"), ValueError, "'rsm'", "'rms'")
    refused(lambda: AutoNero(model, beta=1.0), ValueError, "beta=1.0")
    refused(lambda: AutoNero(model, target=-0.1), ValueError, "target=-0.1")
    refused(lambda: AutoNero(model, initial_theta=2.0), ValueError, "initial_theta=2.0")
    refused(lambda: AutoNero(model, fused=True, foreach=True), ValueError, "at most one")
    refused(
        lambda: AutoNero(module_groups(model), roles={"0": "matrix"}), ValueError, "AutoNero(model, roles"
    )


def test_options_of_the_one_feedback_cannot_differ_between_groups() -> None:
    groups = module_groups(build())
    groups[1]["feedback_gain"] = 0.1
    refused(lambda: AutoNero(groups), ValueError, "feedback_gain=0.1", "0.05 in the first")
    groups = module_groups(build())
    groups[1]["beta"] = 0.95
    assert AutoNero(groups).param_groups[1]["beta"] == 0.95


def test_blocks_that_do_not_divide_the_rows_are_refused() -> None:
    group = {"params": [nn.Parameter(torch.ones(4, 3))], "family": "hidden", "blocks": 3}
    refused(lambda: AutoNero([group]), ValueError, "blocks=3", "4 rows")


def test_a_checkpoint_of_nero_or_of_another_model_is_refused() -> None:
    model = build()
    optimizer = AutoNero(model)
    steps(model, optimizer, range(1))
    twin = build()
    nero = Nero(twin)
    refused(lambda: AutoNero(build()).load_state_dict(nero.state_dict()), ValueError, "AutoNero", "zero_mean")
    give_gradients(twin, 0)
    nero.step()
    refused(lambda: optimizer.load_state_dict(nero.state_dict()), ValueError, "AutoNero")
    wider = nn.Sequential(
        nn.Embedding(5, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)
    )
    other = AutoNero(wider)
    give_gradients(wider, 0)
    other.step()
    refused(lambda: optimizer.load_state_dict(other.state_dict()), ValueError, "another model")
