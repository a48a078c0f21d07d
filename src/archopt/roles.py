"""What each parameter of a model is: a matrix, a filter, an embedding, a gain. Decided here and nowhere else.

`parameter_roles(model)` walks the modules. A parameter of a layer that torch.nn defines, or of a subclass
of one, is known for certain. A parameter that hangs directly on a module of the user's own is judged by its
shape and name, and its role carries a note where that is a guess. Overrides, by regular expression on the
name, have the last word. `docs/roles.md` has the whole table.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from archopt.neurons import fan_in_dims
from archopt.role_overrides import Fields, Overrides, Rules
from archopt.role_table import (
    KINDS,
    Explanation,
    Kind,
    Role,
    RoleTable,
    elementwise_dims,
    group_by_treatment,
    what_agd_does,
    what_nero_does,
)

__all__ = [
    "KINDS",
    "Explanation",
    "Kind",
    "Overrides",
    "Role",
    "RoleTable",
    "group_by_treatment",
    "parameter_roles",
    "what_agd_does",
    "what_nero_does",
]

PACKED_NAME = re.compile(r"qkv|c_attn|in_proj", re.IGNORECASE)
NORM_NAME = re.compile(r"norm(?!al)|normali[sz]ation", re.IGNORECASE)
BIAS_NAME = re.compile(r"bias$|(^|_)bias(es)?(_|\d|$)", re.IGNORECASE)
SHIFT_NAME = re.compile(r"bias|beta|shift|offset", re.IGNORECASE)
POSITION_WORD = re.compile(r"pos(ition(s|al)?|emb\w*|enc\w*)?|pe|cls|class|tokens?|emb(ed(ding)?s?)?")


def parameter_roles(model: nn.Module, overrides: Overrides | None = None) -> RoleTable:
    """The role of every parameter of `model`, tied tensors once, frozen ones included.

    `overrides` maps a regular expression, searched for in the full name (or an alias) of each parameter, to
    a kind (a key of `KINDS`) or to a dict with any of `kind`, `neuron_dim`, `channel_groups`, `groups`,
    `slices`, `stride` and `uses`. The first pattern that matches a parameter wins.

    Raises ValueError for a module without trainable parameters, for lazy parameters that are not
    initialised, and for overrides that match nothing, name an unknown kind or do not fit; TypeError for
    trainable parameters that are complex or would have sparse gradients. Meta tensors have roles too.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> [role.kind for role in parameter_roles(model)]
        ['matrix', 'bias', 'head', 'bias']
        >>> parameter_roles(model, {r"2\\.weight": "matrix"})["2.weight"].kind
        'matrix'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_roles needs a torch.nn.Module, got a {type(model).__name__}")
    sightings = list(_walk(model))
    _refuse(model, sightings)
    by_tensor: dict[int, list[_Sighting]] = {}
    for sighting in sightings:
        by_tensor.setdefault(id(sighting.parameter), []).append(sighting)
    roles = [_role(group) for group in by_tensor.values()]
    rules = Rules(overrides or {})
    if not rules.name_a_head:
        _mark_head(roles, sightings)
    roles = rules.apply(roles)
    return RoleTable(roles, [group[0].parameter for group in by_tensor.values()])


# -- the walk ----------------------------------------------------------------------------------------------


class _Sighting(NamedTuple):
    """A parameter as met under one name. `assumed`: judged by shape and name, not by a known layer."""

    name: str
    parameter: Parameter
    layer: nn.Module
    fields: Fields
    assumed: bool


def _walk(model: nn.Module) -> Iterator[_Sighting]:
    """Every parameter under every name, in registration order."""
    parametrized: dict[
        int, tuple[nn.Module, str, str]
    ] = {}  # chain -> its layer, the layer's name, attribute
    for prefix, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module) and isinstance(module.parametrizations, nn.ModuleDict):
            for attribute, chain in module.parametrizations.items():
                parametrized[id(chain)] = (module, prefix, attribute)
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            if is_lazy(parameter):
                raise ValueError(
                    f"{name} of {type(module).__name__} is not initialised yet: run one forward pass, "
                    "model(example), before the roles are read"
                )
            if id(module) in parametrized:
                layer, layer_name, base = parametrized[id(module)]
                part = _parametrized_part(module, attribute)
            else:
                layer, layer_name = module, prefix
                base, part = _hooked_part(module, attribute)
            shape = tuple(parameter.shape)
            if part == "magnitude":
                yield _Sighting(name, parameter, layer, _magnitude(shape), False)
            elif part == "weight" and (fields := _recognise(layer, layer_name, base, shape)):
                yield _Sighting(name, parameter, layer, fields, False)
            else:
                fields = _judge(layer, _spoken(prefix, module, base), shape)
                yield _Sighting(name, parameter, layer, fields, True)


def _hooked_part(module: nn.Module, attribute: str) -> tuple[str, str]:
    """Undoes the names that torch's older hooks give: `_orig` (spectral_norm, pruning), `_g` and `_v`."""
    base, _, suffix = attribute.rpartition("_")
    if base and base not in module._parameters:
        if suffix == "orig":
            return base, "weight"
        if suffix in ("g", "v") and {f"{base}_g", f"{base}_v"} <= module._parameters.keys():
            return base, "weight" if suffix == "v" else "magnitude"
    return attribute, "weight"


def _parametrized_part(chain: nn.Module, attribute: str) -> str:
    """Which part of a parametrised weight `original`, `original0`, ... is."""
    if type(next(chain.children(), None)).__name__ == "_WeightNorm":
        return {"original0": "magnitude", "original1": "weight"}.get(attribute, "other")
    return "weight" if attribute == "original" else "other"


def _spoken(prefix: str, module: nn.Module, attribute: str) -> str:
    """The name that tells what a parameter is: entries of lists and dicts are named after their container."""
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return f"{prefix.rpartition('.')[2]}_{attribute}"
    return attribute


def _refuse(model: nn.Module, sightings: list[_Sighting]) -> None:
    trainable = [s for s in sightings if s.parameter.requires_grad]
    if not trainable:
        reason = "it has no parameters; pass the module that has them"
        if sightings:
            reason = (
                f"its {len(sightings)} parameters are frozen; call requires_grad_(True) on what shall learn"
            )
        raise ValueError(f"{type(model).__name__} has nothing to train: {reason}")
    for name, parameter, layer, _, _ in trainable:
        if parameter.is_complex():
            raise TypeError(
                f"{name} is complex ({parameter.dtype}), which no rule here takes; hold it as a real "
                "parameter, torch.view_as_real(parameter)"
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise TypeError(
                f"{name} would have sparse gradients, which no rule here takes; build the "
                f"{type(layer).__name__} with sparse=False"
            )


def _role(sightings: list[_Sighting]) -> Role:
    """One role for a tensor that goes by one name or several. Known layers outweigh assumptions."""
    first = sightings[0]
    known = [s.fields for s in sightings if not s.assumed] or [s.fields for s in sightings]
    fields = known[0]
    by_kind = {s.fields["kind"]: s.fields for s in sightings}
    if {"embedding", "matrix"} <= by_kind.keys():
        fields = {**by_kind["embedding"], "kind": "tied"}
    elif any(other.get("neuron_dim", 0) != fields.get("neuron_dim", 0) for other in known):
        fields = {
            **fields,
            "note": "shared by layers that differ in their neuron axis; the first one's is taken",
        }
    return Role(
        name=first.name,
        shape=tuple(first.parameter.shape),
        uses=len(sightings),
        trainable=first.parameter.requires_grad,
        aliases=tuple(s.name for s in sightings[1:]),
        **fields,
    )


def _mark_head(roles: list[Role], sightings: list[_Sighting]) -> None:
    """Names the output head: the last Linear that is no packed projection, unless its weight is shared."""
    inner = {id(s.layer.out_proj) for s in sightings if isinstance(s.layer, nn.MultiheadAttention)}
    last = None
    for sighting in sightings:
        fields = sighting.fields
        is_matrix = fields["kind"] == "matrix" and fields.get("slices", 1) == 1 and not sighting.assumed
        if is_matrix and isinstance(sighting.layer, nn.Linear) and id(sighting.layer) not in inner:
            last = sighting.name
    for index, role in enumerate(roles):
        if role.name == last and role.kind == "matrix" and role.uses == 1:
            roles[index] = replace(role, kind="head", note="the last Linear in registration order")


# -- parameters of known layers ----------------------------------------------------------------------------


def _recognise(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    """The role of a known layer's parameter; None where layer, attribute or shape is not known."""
    for is_known, read in _LAYERS:
        if is_known(layer):
            fields = read(layer, name, base, shape)
            return None if fields is None else _entry_by_entry_if_fan_in_1(fields, shape)
    return None


def _entry_by_entry_if_fan_in_1(fields: Fields, shape: tuple[int, ...]) -> Fields:
    geometry = fields.get("neuron_dim", 0), fields.get("channel_groups", 1)
    if KINDS[fields["kind"]].family == "vector" or fan_in_dims(torch.Size(shape), *geometry):
        return fields
    note = f"a {fields['kind']} weight of fan-in 1, so treated entry by entry"
    return {**_entries("gain", shape), "note": note}


def _entries(kind: str, shape: tuple[int, ...]) -> Fields:
    """Fields of a kind whose entries are neurons by themselves, whatever the number of dimensions."""
    return {"kind": kind, "neuron_dim": elementwise_dims(shape)}


def _magnitude(shape: tuple[int, ...]) -> Fields:
    return {**_entries("gain" if shape else "scalar", shape), "note": "the magnitude of weight_norm"}


def _bias(base: str, shape: tuple[int, ...]) -> Fields | None:
    return {"kind": "bias"} if base == "bias" and len(shape) == 1 else None


def _linear(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    if base != "weight" or len(shape) != 2:
        return _bias(base, shape)
    return {"kind": "matrix", **_packed(name, *shape)}


def _packed(name: str, out_features: int, in_features: int) -> Fields:
    """Query, key and value in one weight, by the layer's name and its shape."""
    if out_features == 3 * in_features and PACKED_NAME.search(name.rpartition(".")[2]):
        return {"slices": 3, "note": "packed query, key and value, by its name and shape"}
    return {}


def _hf_conv1d(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    """The Linear of Hugging Face's GPT-2, whose weight is stored (in, out)."""
    if base != "weight" or len(shape) != 2:
        return _bias(base, shape)
    packed = _packed(name, shape[1], shape[0])
    note = "Conv1D of transformers: stored (in, out), so neurons lie along dimension 1"
    if packed:
        note = f"{note}; {packed['note']}"
    return {"kind": "matrix", "neuron_dim": 1, **packed, "note": note}


def _is_hf_conv1d(layer: nn.Module) -> bool:
    named = any(ancestor.__name__ == "Conv1D" for ancestor in type(layer).__mro__)
    return named and isinstance(getattr(layer, "nf", None), int)


def _bilinear(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    if base != "weight" or len(shape) != 3:
        return _bias(base, shape)
    return {"kind": "matrix", "note": "bilinear: the fan-in of a unit is in1 times in2"}


def _conv(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    assert isinstance(layer, _ConvNd)
    if base != "weight" or len(shape) != 2 + len(layer.kernel_size):
        return _bias(base, shape)
    if layer.transposed:
        stride = math.prod(layer.stride) ** (1 / len(layer.stride))
        return {
            "kind": "conv_transpose",
            "neuron_dim": 1,
            "channel_groups": layer.groups,
            "groups": layer.groups,
            "stride": layer.stride[0] if len(set(layer.stride)) == 1 else stride,
        }
    depthwise = layer.groups > 1 and shape[1] == 1
    return {"kind": "depthwise" if depthwise else "conv", "groups": layer.groups}


def _embedding(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    assert isinstance(layer, nn.Embedding | nn.EmbeddingBag)
    if base != "weight" or len(shape) != 2:
        return None
    padding = layer.padding_idx
    return {"kind": "embedding", "note": "" if padding is None else f"row {padding} is padding: no gradient"}


def _attention(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    if base == "in_proj_weight" and len(shape) == 2:
        return {"kind": "matrix", "slices": 3}
    if base in ("q_proj_weight", "k_proj_weight", "v_proj_weight") and len(shape) == 2:
        return {"kind": "matrix"}
    if base in ("bias_k", "bias_v") and len(shape) == 3:
        note = "one key or value that is added to every sequence"
        return {"kind": "position", "neuron_dim": (0, 1), "note": note}
    return _bias(base.removeprefix("in_proj_"), shape)


def _recurrent(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    assert isinstance(layer, nn.RNNBase | nn.RNNCellBase)
    if base.startswith("bias_") and len(shape) == 1:
        return {"kind": "bias"}
    if base.startswith("weight_hr") and len(shape) == 2:
        return {"kind": "matrix"}
    if base.startswith(("weight_ih", "weight_hh")) and len(shape) == 2:
        gates, rest = divmod(shape[0], layer.hidden_size)
        return {"kind": "matrix", "slices": gates} if rest == 0 else None
    return None


def _norm(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    kinds = {"weight": "gain", "bias": "shift"}
    return _entries(kinds[base], shape) if base in kinds else None


def _prelu(layer: nn.Module, name: str, base: str, shape: tuple[int, ...]) -> Fields | None:
    if base != "weight":
        return None
    return {"kind": "scalar" if math.prod(shape) == 1 else "gain", "note": "slope of PReLU"}


def _instance_of(*types: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda layer: isinstance(layer, types)


_Reader = Callable[[nn.Module, str, str, tuple[int, ...]], Fields | None]

_LAYERS: tuple[tuple[Callable[[nn.Module], bool], _Reader], ...] = (
    (_instance_of(nn.Linear), _linear),
    (_instance_of(_ConvNd), _conv),
    (_instance_of(nn.Embedding, nn.EmbeddingBag), _embedding),
    (_instance_of(_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm), _norm),
    (_instance_of(nn.MultiheadAttention), _attention),
    (_instance_of(nn.RNNBase, nn.RNNCellBase), _recurrent),
    (_instance_of(nn.Bilinear), _bilinear),
    (_instance_of(nn.PReLU), _prelu),
    (_is_hf_conv1d, _hf_conv1d),
)


# -- parameters that hang on a module of the user's own ------------------------------------------------------


def _judge(module: nn.Module, name: str, shape: tuple[int, ...]) -> Fields:
    """The role of a parameter of an unknown module, by its shape and name."""
    owner = type(module).__name__
    guess = f"a parameter of {owner}, by its name and shape taken for"
    if math.prod(shape) == 1:
        return _entries("scalar", shape)
    is_vector = math.prod(shape) == max(shape)  # one dimension, or one besides ones
    if is_vector and NORM_NAME.search(owner):
        kind = "shift" if SHIFT_NAME.search(name) else "gain"
        return {**_entries(kind, shape), "note": f"{owner} is taken for a normalisation layer, by its name"}
    if BIAS_NAME.search(name):
        return {**_entries("bias", shape), "note": f"{guess} a bias" if len(shape) > 1 else ""}
    if len(shape) == 1:
        return {"kind": "vector"}
    if len(shape) in (2, 3) and shape[-1] > 1 and _names_positions(name):
        return {"kind": "position", "neuron_dim": tuple(range(len(shape) - 1)), "note": f"{guess} positions"}
    if len(shape) == 2:
        assumed = {
            "kind": "matrix",
            "note": f"a parameter of {owner}, by its shape taken for a matrix (out, in)",
        }
        return _entry_by_entry_if_fan_in_1(assumed, shape)
    if is_vector:
        return {
            **_entries("vector", shape),
            "note": f"a parameter of {owner}, by its shape taken for a vector",
        }
    return {
        "kind": "unknown",
        "note": f"a parameter of {owner} with {len(shape)} dimensions: say with an override what it is; "
        "until then, its rows lie along dimension 0",
    }


def _names_positions(name: str) -> bool:
    words = re.split(r"[^a-zA-Z]+|(?<=[a-z])(?=[A-Z])", name)
    return any(POSITION_WORD.fullmatch(word.lower()) for word in words)
