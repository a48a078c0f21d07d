"""State: what is saved, loaded, copied, grown and hooked continues as if nothing had happened, to the bit."""

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from contract.behaviours import DEFAULT, EAGER, behaviour
from contract.behaviours.problems import (
    assert_moved,
    assert_same_bits,
    copy_of,
    give_gradients,
    group_of,
    model_for,
    named_tensors,
    random,
    state_tensors,
    train,
)

DTYPES = (torch.float32, torch.bfloat16)


def saved(value: Any) -> Any:
    """`value` through a file, read back as an untrusted checkpoint is."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_continues(model: nn.Module, optimizer: Optimizer, twin: nn.Module, other: Optimizer) -> None:
    """Both take four more steps and agree on every bit of weights and state."""
    train(model, optimizer, range(3, 7))
    train(twin, other, range(3, 7))
    assert_same_bits(copy_of(twin), copy_of(model), "weights after resuming")
    assert_same_bits(state_tensors(other), state_tensors(optimizer), "state after resuming")


@behaviour(dtype=DTYPES, weights_first=(True, False))
def resumes_bit_equal(make: Any, *, dtype: torch.dtype, weights_first: bool) -> None:
    """A checkpoint (weights_only=True) resumes, whether weights load before or after the optimiser is made."""
    model = model_for(make, dtype)
    optimizer = make(model)
    train(model, optimizer, range(3))
    checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    twin = model_for(make, dtype, seed=1)
    if weights_first:
        twin.load_state_dict(checkpoint["model"])
        other = make(twin)
    else:
        other = make(twin)
        twin.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    assert_same_bits(copy_of(twin), copy_of(model), "weights after loading")
    assert_continues(model, optimizer, twin, other)


@behaviour(dtype=DTYPES)
def resumes_before_the_first_step(make: Any, *, dtype: torch.dtype) -> None:
    """A checkpoint that was written before any step resumes too."""
    model, twin = model_for(make, dtype), model_for(make, dtype, seed=1)
    optimizer, other = make(model), make(twin)
    checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    twin.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    assert_continues(model, optimizer, twin, other)


@behaviour(dtype=DTYPES)
def resumes_from_distributed_checkpoint(make: Any, *, dtype: torch.dtype) -> None:
    """torch.distributed.checkpoint's state dicts, keyed by parameter names, resume on a single process."""
    model = model_for(make, dtype)
    optimizer = make(model)
    train(model, optimizer, range(3))
    twin = model_for(make, dtype, seed=1)
    twin.load_state_dict(model.state_dict())
    other = make(twin)
    set_optimizer_state_dict(twin, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert_continues(model, optimizer, twin, other)


@behaviour(dtype=DTYPES)
def deepcopy_continues_bit_equal(make: Any, *, dtype: torch.dtype) -> None:
    model = model_for(make, dtype)
    optimizer = make(model)
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    assert_continues(model, optimizer, twin, other)


@behaviour(dtype=DTYPES)
def pickle_continues_bit_equal(make: Any, *, dtype: torch.dtype) -> None:
    model = model_for(make, dtype)
    optimizer = make(model)
    train(model, optimizer, range(3))
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert_continues(model, optimizer, twin, other)


@behaviour(forms=DEFAULT)
def copying_leaves_the_original_alone(make: Any) -> None:
    """Steps of a deep copy, or of an optimiser that loaded the state, write into nothing of the original."""
    model = model_for(make)
    optimizer = make(model)
    train(model, optimizer, range(3))
    weights, state = copy_of(model), state_tensors(optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, range(3, 5))
    third = model_for(make)
    loaded = make(third)
    loaded.load_state_dict(optimizer.state_dict())
    train(third, loaded, range(3, 5))
    assert_same_bits(copy_of(model), weights, "the original's weights")
    assert_same_bits(state_tensors(optimizer), state, "the original's state")


@behaviour()
def state_dict_holds_plain_values(make: Any) -> None:
    """State is tensors and numbers, options are plain values: what distributed checkpoints and JSON logs accept."""
    model = model_for(make)
    optimizer = make(model)
    train(model, optimizer, range(2))
    content = optimizer.state_dict()
    assert set(content) == {"state", "param_groups"}
    for state in content["state"].values():
        for name, value in state.items():
            assert isinstance(value, Tensor | int | float), f"state {name} is a {type(value).__name__}"
            assert not (isinstance(value, Tensor) and value.requires_grad), (
                f"state {name} requires a gradient"
            )

    def plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, bool | int | float | str | Tensor)

    for group in content["param_groups"]:
        for name, value in group.items():
            assert plain(value), f"option {name} is a {type(value).__name__}"


@behaviour(forms=EAGER)
def older_state_dict_lacking_an_option_loads(make: Any) -> None:
    """A checkpoint from before an option existed loads; the option takes the optimiser's own value."""
    model = model_for(make)
    optimizer = make(model)
    train(model, optimizer, range(3))
    for option in optimizer.param_groups[0].keys() - {"params", "param_names"}:
        twin = model_for(make)
        twin.load_state_dict(model.state_dict())
        other = make(twin)
        own = [group[option] for group in other.param_groups]
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            group.pop(option, None)
        other.load_state_dict(old)
        assert [group.get(option) for group in other.param_groups] == own, f"{option} lost its value"
        give_gradients(twin, 3)
        other.step()


@behaviour(forms=EAGER)
def foreign_keys_in_groups_survive(make: Any) -> None:
    """What schedulers and loops write into groups is kept, saved and loaded."""
    model = model_for(make)
    optimizer = make(model)
    for group in optimizer.param_groups:
        group |= {"initial_lr": 0.5, "swa_lr": 0.25, "my_label": "encoder"}
    train(model, optimizer, range(2))
    twin = model_for(make)
    other = make(twin)
    other.load_state_dict(saved(optimizer.state_dict()))
    for group in other.param_groups:
        assert (group["initial_lr"], group["swa_lr"], group["my_label"]) == (0.5, 0.25, "encoder")
    other.add_param_group(group_of(other, named_tensors(weight=random(4, 3))))
    train(twin, other, range(2, 3))


@behaviour()
def added_group_trains(make: Any) -> None:
    """A group added between steps takes the defaults, moves, and resumes to the bit."""
    model, extra = model_for(make), named_tensors(weight=random(4, 3, seed=5))
    optimizer = make(model)
    train(model, optimizer, range(3))
    optimizer.add_param_group(group_of(optimizer, extra))
    assert optimizer.defaults.keys() <= optimizer.param_groups[-1].keys(), "the new group lacks options"
    before = copy_of(extra)
    give_gradients(extra, 1)
    train(model, optimizer, range(3, 4))
    assert_moved(extra, before)

    twin, other_extra = model_for(make, seed=1), named_tensors(weight=random(4, 3, seed=6))
    other = make(twin)
    other.add_param_group(group_of(other, other_extra))
    twin.load_state_dict(model.state_dict())
    other_extra.load_state_dict(extra.state_dict())
    other.load_state_dict(saved(optimizer.state_dict()))
    for module, opt in ((extra, optimizer), (other_extra, other)):
        give_gradients(module, 2)
        train(model if opt is optimizer else twin, opt, range(4, 5))
    assert_same_bits(copy_of(other_extra), copy_of(extra), "the added group after resuming")
    assert_same_bits(copy_of(twin), copy_of(model), "the first groups after resuming")


@behaviour(applies=lambda make: make.takes == "parameters")
def named_parameters_equal_parameters(make: Any) -> None:
    """`(name, parameter)` pairs give the same steps, and their names stand in the state dict."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin.named_parameters())
    names = [name for name, _ in twin.named_parameters()]
    assert other.state_dict()["param_groups"][0]["param_names"] == names
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    assert_same_bits(copy_of(twin), copy_of(model), "named parameters")


@behaviour(applies=lambda make: make.takes == "parameters")
def groups_equal_one_group(make: Any) -> None:
    """Splitting the parameters into groups with the same options changes no step."""
    model, twin = model_for(make), model_for(make)
    optimizer = make(model)
    other = make([{"params": [param]} for param in twin.parameters()])
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    assert_same_bits(copy_of(twin), copy_of(model), "one group a parameter")


@behaviour(applies=lambda make: make.takes == "parameters")
def group_options_are_honoured(make: Any) -> None:
    """A rate given with a group holds for that group alone, also after a round trip."""
    model = model_for(make)
    first, *others = model.parameters()
    optimizer = make([{"params": [first], "lr": 0.0}, {"params": others}])
    frozen = first.detach().clone()
    train(model, optimizer, range(2))
    twin = model_for(make)
    twin.load_state_dict(model.state_dict())
    head, *tail = twin.parameters()
    other = make([{"params": [head]}, {"params": tail}])
    other.load_state_dict(saved(optimizer.state_dict()))
    train(twin, other, range(2, 4))
    assert torch.equal(head, frozen), "the group with lr=0 moved"
    assert all(not torch.equal(a, b) for a, b in zip(tail[:1], others[:1], strict=True)), "the other did not"


@behaviour(forms=EAGER)
def hooks_run_in_torch_order(make: Any) -> None:
    """Global before local at the start of a step, local before global at its end; hooks see finished weights."""
    model = model_for(make)
    optimizer = make(model)
    calls: list[str] = []
    seen: list[dict[str, Tensor]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("local before")),
        optimizer.register_step_post_hook(
            lambda *_: seen.append(copy_of(model)) or calls.append("local after")
        ),
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
    ]
    try:
        train(model, optimizer, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global before", "local before", "local after", "global after"], calls
    assert_same_bits(seen[0], copy_of(model), "weights that a hook after the step sees")


@behaviour(forms=DEFAULT)
def state_dict_hooks_run(make: Any) -> None:
    """Hooks around state_dict and load_state_dict run, and what they return is what is saved and loaded."""
    model = model_for(make)
    optimizer = make(model)
    train(model, optimizer, range(2))
    calls: list[str] = []

    def change_saved(_: Optimizer, content: dict[str, Any]) -> dict[str, Any]:
        calls.append("saved")
        return {**content, "note": 1}

    def change_loaded(_: Optimizer, content: dict[str, Any]) -> dict[str, Any]:
        calls.append("loading")
        halved = copy.deepcopy({key: content[key] for key in ("state", "param_groups")})
        for group in halved["param_groups"]:
            group["lr"] = group["lr"] / 2
        return halved

    optimizer.register_state_dict_post_hook(change_saved)
    content = optimizer.state_dict()
    assert content["note"] == 1
    rates = [group["lr"] for group in optimizer.param_groups]
    other = make(model_for(make))
    other.register_load_state_dict_pre_hook(change_loaded)
    other.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    other.load_state_dict(content)
    assert calls == ["saved", "loading", "loaded"], calls
    assert [group["lr"] for group in other.param_groups] == [rate / 2 for rate in rates]


@behaviour(forms=EAGER)
def state_appears_for_all_parameters_at_once(make: Any) -> None:
    """State is made for every trainable parameter at the first step, so that the ranks of a job agree on it."""
    model = model_for(make)
    optimizer = make(model)
    names = [name for name, _ in model.named_parameters()]
    give_gradients(model, 0, skip=names[1:])
    optimizer.step()
    with_state = [name for name, param in model.named_parameters() if optimizer.state.get(param)]
    assert with_state in ([], names), f"only {with_state} have state"


def _refuses(optimizer: Optimizer, content: dict[str, Any], model: nn.Module, gives: str) -> None:
    weights, state = copy_of(model), state_tensors(optimizer)
    try:
        optimizer.load_state_dict(content)
    except (ValueError, TypeError, KeyError) as error:
        message = str(error)
    else:
        raise AssertionError("the state dict was loaded")
    assert gives in message, f"the message does not say {gives!r}: {message}"
    assert_same_bits(copy_of(model), weights, "weights after the refusal")
    assert_same_bits(state_tensors(optimizer), state, "state after the refusal")


@behaviour(forms=DEFAULT)
def state_of_another_optimizer_is_refused(make: Any) -> None:
    """Refused with the optimiser's own name; weights and state stay as they were."""
    model, twin = model_for(make), model_for(make)
    optimizer = make(model)
    train(model, optimizer, range(2))
    groups = [{"params": group["params"]} for group in make(twin).param_groups]
    stranger = torch.optim.Rprop(groups)
    train(twin, stranger, range(1))
    _refuses(optimizer, stranger.state_dict(), model, type(optimizer).__name__)


@behaviour(forms=DEFAULT)
def state_of_another_model_is_refused(make: Any) -> None:
    """As many tensors of other shapes: refused, with the shape of the weight; everything stays as it was."""
    model, larger = named_tensors(weight=random(4, 3)), named_tensors(weight=random(6, 5))
    optimizer, other = make(model), make(larger)
    for module, opt in ((model, optimizer), (larger, other)):
        give_gradients(module, 0)
        opt.step()
    _refuses(optimizer, other.state_dict(), model, "(4, 3)")


@behaviour(forms=DEFAULT)
def state_of_another_number_of_parameters_is_refused(make: Any) -> None:
    model, larger = named_tensors(weight=random(4, 3)), named_tensors(weight=random(4, 3), other=random(4, 3))
    optimizer, other = make(model), make(larger)
    for module, opt in ((model, optimizer), (larger, other)):
        give_gradients(module, 0)
        opt.step()
    _refuses(optimizer, other.state_dict(), model, "")


@behaviour(forms=DEFAULT)
def second_construction_keeps_bits(make: Any) -> None:
    """A second optimiser for the same weights, made mid-training, changes none of them."""
    for dtype in DTYPES:
        model = model_for(make, dtype)
        train(model, make(model), range(5))
        before = copy_of(model)
        make(model)
        assert_same_bits(copy_of(model), before, f"{dtype} weights after a second construction")
