"""AutoNero, every neuron turns by one angle that the gradients decide: the optimiser.

The equations, and the pure functions that are them, stand in `archopt.optim.autonero_rule`; the reasons in
`docs/autonero.md`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archopt.neurons import as_rows, row_norm
from archopt.optim.autonero_fused import Prepared, fused_steps, unserved
from archopt.optim.autonero_rule import (
    GROWN_NORM,
    THETA_0,
    THETA_RANGE,
    YOUNG_NORM,
    Feedback,
    Rows,
    feedback_update,
    rows_update,
    vector_update,
)
from archopt.optim.autonero_tensors import (
    MOVEMENT_DTYPES,
    bias_name,
    check_blocks,
    dims_of,
    first_radius,
    movement_dtype,
    rows_of,
    scale_,
    steps_plainly,
)
from archopt.optim.base import (
    ArchOptimizer,
    Rate,
    bias_correction,
    check_choice,
    check_forms,
    check_range,
    rate,
    statistics_like,
    takes_foreach,
)
from archopt.optim.matrices import join, joined_entries, median_of_positive, part
from archopt.optim.orthogonalise import METHODS
from archopt.roles import Overrides, Role, group_by_treatment, parameter_roles

FAMILIES = ("hidden", "head", "embedding", "vector")
RADII = ("own", "unit", "rms")
EMBEDDING_RADII = (*RADII, "grow")
HEADS = ("plain", "turn")
SHARED = (
    "feedback_decay",
    "feedback_gain",
    "target",
    "target_steps",
    "bound",
    "bound_errors",
    "initial_theta",
    "limit",
)
"""Options of the one feedback that all groups share: they must agree between groups."""


class AutoNero(ArchOptimizer):
    """AutoNero: every neuron turns by one angle, set by feedback from the next gradient. Nothing to tune.

    Args:
        params: the module whose parameters are trained, each by its role (`archopt.parameter_roles`); or groups as
            `module_groups(model)` gives them, to set options for each. Bare parameters are refused.
        lr: a plain multiplier of the angle, for schedulers; not a knob. 0 freezes the group, and where it is 0 in
            all groups the angle too.
        beta, beta2: averaging constants of the gradients and of their squares, in [0, 1).
        feedback_decay, feedback_gain: lambda, the memory of the feedback, and kappa, how fast the angle follows it.
        target, target_steps: tau and T. The angle settles where rho = -tau / sqrt(1 + t/T).
        bound, bound_errors: how far sqrt(t) theta e may stand above the most that slopes have asked for; a huge
            number is no bound. Slopes ask while c is above 0 by more than so many of its standard errors.
        initial_theta: the angle of the first step, in radians; at most 1/(8L) is taken, with L matrices (embeddings
            not counted), since their turns multiply. None: 0.01/(8L), so that the first step changes what a trained
            network computes by about 1 % at most. One below 0.01 doubles at every step until it is 0.01 or 1/(8L).
        limit: gradients longer than this many times their running size are shortened to it.
        radius: "own": rows of hidden matrices and heads keep their initial norms as first radii. "unit": they are
            scaled to norm 1 at construction, which very deep plain networks need.
        embedding_radius: "grow": rows of embeddings that are shorter than RMS 1 take plain steps until these have
            brought them there; nothing is scaled. "own": they keep the norm that they have, which a trained network
            needs. "rms": they are scaled to RMS 1 at construction, and keep it. "unit": likewise, to norm 1.
        radius_exponent: how fast the radius of a hidden row (and of a head that turns) follows its gradient.
        head: "plain": rows of the head take plain steps, measured by the features that they read. "turn": they turn
            as other rows do, with radii, as in the first derivation.
        head_gain: K, by how many times theta a plain step of the head may change an output.
        orthogonalise: "newton-schulz"; "newton-schulz-bfloat16", many times faster on GPUs and as rough as Muon's;
            or "svd", exact and slow.
        movement_dtype: in what the last movement is kept: "float32" (wider where the weights are), or "bfloat16",
            which takes 2 bytes a weight less. Only the feedback reads it.
        roles: overrides, pattern of a parameter's name -> role (see `parameter_roles`).
        maximize: ascend instead.
        foreach: join tensors of equal shape, and vectors; None chooses (True) where no kernel serves.
        fused: passes of a kernel over all tensors (`archopt.kernels.status`). None, with foreach=None, takes them
            for every tensor that they serve. True refuses the others, with the reason.
        capturable: for torch's own check under CUDA graphs; the step never waits for the device anyway.

    Construction changes nothing, unless a radius is "unit" or "rms"; rows of norm 0, such as padding, are never
    scaled. A group added later without a `family` takes its matrices as hidden ones, all else as vectors.

    The angle `theta`, the quotient `rho`, the slope `C` and its expectation `G` are 0-d tensors to log. A step with
    a gradient that is not finite changes nothing and is counted in `skipped`; a step whose gradients are all zero
    is no step.

    Raises TypeError for bare parameters, complex parameters, sparse gradients and unknown options; ValueError for
    a module without matrices or without trainable parameters, for meta tensors and for values out of range.

    State, per tensor: `step` (t of this tensor), `exp_avg` (m), `exp_avg_sq` (v, one entry a row), `movement` (d),
    `radius` and `grows_to` (one entry a row), and `feedback` (see `Feedback`), one tensor shared by all.

    Example:
        >>> import torch, archopt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optimizer = archopt.AutoNero(model)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> round(float(optimizer.theta), 6)  # doubles at the next four steps, and follows the gradients then
        0.000625
    """

    state_names = ("step", "exp_avg", "exp_avg_sq", "movement", "radius", "grows_to", "feedback")
    needs_all_gradients = "its angle follows from the gradients of all tensors together"
    _prepared: Prepared

    _unscaled: Sequence[tuple[Tensor, Tensor]] = ()
    """Weights that construction scaled, with what they were, until the second step is taken.

    Whoever resumes may load the weights before the optimiser is made. Rows that have left their first radius by
    then are scaled once more, which is undone when the state arrives: both orders must give the same bits. One
    step may lie between, the probe of torch.distributed.checkpoint.
    """
    _stepped = False

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        *,
        lr: Rate = 1.0,
        beta: float = 0.9,
        beta2: float = 0.99,
        feedback_decay: float = 0.95,
        feedback_gain: float = 0.05,
        target: float = 0.15,
        target_steps: float = 100.0,
        bound: float = 1.0,
        bound_errors: float = 2.0,
        initial_theta: float | None = None,
        limit: float = 2.0,
        radius: str = "own",
        embedding_radius: str = "grow",
        radius_exponent: float = 1.0,
        head: str = "plain",
        head_gain: float = 8.0,
        orthogonalise: str = "newton-schulz",
        movement_dtype: str = "float32",
        roles: Overrides | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        if isinstance(params, nn.Module):
            groups = module_groups(params, roles)
            if all(group["family"] == "vector" for group in groups):
                raise ValueError(
                    f"AutoNero turns the rows of matrices, and {type(params).__name__} has none (biases, gains and "
                    "weights of fan-in 1 are vectors); train it with another optimiser, such as torch.optim.AdamW"
                )
        else:
            groups = _only_groups(params)
            if roles is not None:
                raise ValueError("roles=... needs a module: AutoNero(model, roles=...), not AutoNero(groups)")
        defaults = {
            "lr": lr,
            "beta": beta,
            "beta2": beta2,
            "feedback_decay": feedback_decay,
            "feedback_gain": feedback_gain,
            "target": target,
            "target_steps": target_steps,
            "bound": bound,
            "bound_errors": bound_errors,
            "initial_theta": initial_theta,
            "limit": limit,
            "radius": radius,
            "embedding_radius": embedding_radius,
            "radius_exponent": radius_exponent,
            "head": head,
            "head_gain": head_gain,
            "orthogonalise": orthogonalise,
            "movement_dtype": movement_dtype,
            "family": "hidden",
            "neuron_dim": 0,
            "channel_groups": 1,
            "blocks": 1,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(groups, defaults)

    def _nothing_kept(self) -> dict[str, Any]:
        return {"_prepared": Prepared()}

    @property
    def theta(self) -> Tensor:
        """The angle of the last step, in radians, without `lr`; before the first step the initial one."""
        return self.feedback.theta

    @property
    def rho(self) -> Tensor:
        """c/e of the last step: near 1 the steps are too short, 0 is the best single step, below 0 too long."""
        return self.feedback.rho

    @property
    def C(self) -> Tensor:
        """The slope along the previous movement, as the last gradient saw it."""
        return self.feedback.C

    @property
    def G(self) -> Tensor:
        """The slope along the last movement, as its own averaged gradient saw it."""
        return self.feedback.G

    @property
    def skipped(self) -> Tensor:
        """How many steps were void because a gradient was not finite."""
        return self.feedback.skipped

    @property
    def feedback(self) -> Feedback:
        """A copy of what the optimiser as a whole remembers, as 0-d tensors."""
        held = self._held_feedback()
        return Feedback(*(self._new_feedback() if held is None else held).clone().unbind())

    # -- groups and state ----------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "feedback_gain", "target", "bound_errors", "radius_exponent", "head_gain"):
            check_range("AutoNero", name, group[name], low=0.0)
        for name in ("beta", "beta2", "feedback_decay"):
            check_range("AutoNero", name, group[name], low=0.0, high=1.0)
        for name in ("target_steps", "bound", "limit", "channel_groups", "blocks"):
            check_range("AutoNero", name, group[name], low=1)
        if (theta := group["initial_theta"]) is not None:
            check_range("AutoNero", "initial_theta", theta, low=THETA_RANGE[0], high=THETA_RANGE[1])
        check_choice("AutoNero", "radius", group["radius"], RADII)
        check_choice("AutoNero", "embedding_radius", group["embedding_radius"], EMBEDDING_RADII)
        check_choice("AutoNero", "head", group["head"], HEADS)
        check_choice("AutoNero", "orthogonalise", group["orthogonalise"], METHODS)
        check_choice("AutoNero", "movement_dtype", group["movement_dtype"], MOVEMENT_DTYPES)
        check_choice("AutoNero", "family", group["family"], FAMILIES)
        check_forms("AutoNero", group, has_fused=True)
        for name in SHARED if self.param_groups else ():
            if group[name] != (first := self.param_groups[0][name]):
                raise ValueError(
                    f"AutoNero: {name}={group[name]!r} in this group, but {first!r} in the first: one feedback "
                    f"serves all groups, so give {name} to AutoNero(...) rather than to a group"
                )
        for item in group["params"]:
            param = item[1] if isinstance(item, tuple) else item
            if isinstance(param, Tensor):
                check_blocks(param, group)
                if group["fused"] and param.requires_grad and param.numel() > 0:
                    unserved(param, group)

    def _constrain_group(self, group: dict[str, Any]) -> None:
        for param in self._trainable(group):
            if first_radius(group) in ("unit", "rms") and dims_of(param, group):
                self._unscaled = [*self._unscaled, (param, param.detach().clone())]
                scale_(param, group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict exactly, as `ArchOptimizer.load_state_dict`, whether weights were loaded before
        this optimiser was made or after."""
        super().load_state_dict(state_dict)
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for param, before in self._unscaled:
            if param in groups and self.state.get(param):
                scaled = before.clone()
                scale_(scaled, groups[param])
                if torch.equal(param, scaled):  # nothing has moved or loaded it since
                    param.copy_(before)
        self._unscaled = []

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        exact = statistics_like(param)
        zeros = torch.zeros_like(param, dtype=exact, requires_grad=False)
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": zeros,
            "movement": torch.zeros_like(zeros, dtype=movement_dtype(exact, group)),
            "feedback": self._new_feedback(),
        }
        if dims := dims_of(param, group):
            norm = row_norm(as_rows(param.detach(), group["channel_groups"]), dims)
            rms_1 = (param.numel() / norm.numel()) ** 0.5
            grown = torch.full_like(norm, rms_1 if group["family"] == "embedding" else GROWN_NORM)
            if steps_plainly(group):
                grows_to = torch.zeros_like(norm)
            elif first_radius(group) == "grow":
                grows_to = torch.where(norm < grown, grown, 0.0)
            else:
                old = torch.where(norm < YOUNG_NORM, 0.0, norm)
                grown = torch.where((old > 0).any(), median_of_positive(old), grown)
                grows_to = torch.where(old > 0, 0.0, grown)
            return {**state, "exp_avg_sq": torch.zeros_like(norm), "radius": norm, "grows_to": grows_to}
        none = zeros.new_empty(0)
        return {**state, "exp_avg_sq": zeros.clone(), "radius": none, "grows_to": none.clone()}

    def _new_feedback(self) -> Tensor:
        """On the device of the first parameter, in float64 only where a weight is: scalars must not lose digits."""
        params = [param for group in self.param_groups for param in group["params"]]
        trainable = [param for param in params if param.requires_grad] or params
        double = any(param.dtype == torch.float64 for param in trainable)
        dtype = torch.float64 if double else torch.float32
        feedback = torch.zeros(len(Feedback._fields), dtype=dtype, device=trainable[0].device)
        first, most = self._first_angles()
        Feedback(*feedback.unbind()).theta.fill_(min(first, most))
        return feedback

    def _first_angles(self) -> tuple[float, float]:
        """The first angle as it is asked for, and the most it may be before the feedback can tell, 1/(8L).

        The turns of L matrices multiply, and those of heads count eightfold; embeddings are not counted.
        """
        matrices = [group for group in self.param_groups if group["family"] in ("hidden", "head")]
        depth: int = sum([p.requires_grad for group in matrices for p in group["params"]])
        most = 1 / (8 * max(depth, 1))
        asked = self.param_groups[0]["initial_theta"]
        return (max(THETA_0 * most, THETA_RANGE[0]) if asked is None else float(asked)), most

    def _held_feedback(self) -> Tensor | None:
        """The feedback that any parameter holds; all hold the same."""
        for group in self.param_groups:
            for param in group["params"]:
                if "feedback" in (state := self.state.get(param, {})):
                    held: Tensor = state["feedback"]
                    return held
        return None

    def _create_state(self) -> None:
        """Gives new parameters their state, and makes all hold one and the same feedback tensor.

        Every parameter carries it because torch's state dicts know parameters and groups alone, and group values
        are not moved between devices, and are compared and copied by parameter, by checkpoint tools. So any part
        of the parameters carries the whole, whatever was frozen, added, dropped or sharded between.
        """
        held = self._held_feedback()
        super()._create_state()
        held = self._held_feedback() if held is None else held
        for state in self.state.values():
            if "feedback" in state and state["feedback"] is not held and held is not None:
                state["feedback"] = held

    # -- the step ------------------------------------------------------------------------------------------

    def _update(self) -> None:
        held = self._held_feedback()
        given = [(g, [p for p in self._trainable(g) if p.grad is not None]) for g in self.param_groups]
        given = [(group, params) for group, params in given if params]
        if not given or held is None:
            return
        # Before all else: a refusal must come before anything moves.
        fused = fused_steps(given, self.state, self._prepared)
        batches = [
            (group, batch)
            for group, params in given
            for batch in _batches([p for p in params if id(p) not in fused.served], group)
        ]
        batches.sort(key=lambda batch: not steps_plainly(batch[0]))  # heads read the state of their biases
        if self._unscaled:
            if self._stepped:
                self._unscaled = []
            self._stepped = True
        home, shared = held.device, self.param_groups[0]
        measures = [step.measure(held.dtype) for step in fused.steps]
        measures += [self._measure(batch, group) for group, batch in batches]
        norm = torch.linalg.vector_norm(torch.stack([norm.to(home) for norm, _ in measures]))
        product = torch.stack([product.to(home) for _, product in measures]).sum()
        moving = torch.stack([_is_not_zero(group["lr"], home) for group, _ in given]).any()
        past = Feedback(*held.unbind())
        new, f = feedback_update(
            past, norm, product, moving, beta2=shared["beta2"], begins=self._first_angles(), options=shared
        )
        finite = torch.isfinite(norm) & torch.isfinite(product)
        live = finite & (norm > 0)

        reaches = [
            step.reaches(
                f,
                {head: self._bias_squares([head], group, f.to(step.device)) for head, group in step.heads()},
            )
            for step in fused.steps
        ]
        expected = [self._advance(batch, group, f, new.theta, live) for group, batch in batches]
        expected += [
            step.advance(f, new.theta, live, reach) for step, reach in zip(fused.steps, reaches, strict=True)
        ]
        G = torch.stack([part.to(home) for part in expected]).sum()
        skipped = past.skipped + finite.logical_not()
        self._drop_movements(live)
        held.copy_(torch.where(live, _pack(new, held.dtype, G=G), _pack(past, held.dtype, skipped=skipped)))

    def _measure(self, batch: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """||g|| and <g, d> over tensors of a group."""
        exact = statistics_like(batch[0])
        grads = [p.grad.to(exact) for p in batch if p.grad is not None]
        norms = torch._foreach_norm(grads)
        products = torch._foreach_mul(grads, [self.state[p]["movement"] for p in batch])
        product = torch.stack([entries.sum() for entries in products]).sum()
        return torch.linalg.vector_norm(torch.stack(list(norms))), -product if group["maximize"] else product

    def _advance(
        self, batch: list[Tensor], group: dict[str, Any], f: Tensor, theta: Tensor, live: Tensor
    ) -> Tensor:
        """One step of some tensors, joined; returns sum <gh, d>. All keep their bits unless `live`."""
        device, exact, dims = batch[0].device, statistics_like(batch[0]), dims_of(batch[0], group)
        f, theta, live = f.to(device), theta.to(device), live.to(device)
        channel_groups = group["channel_groups"] if dims else 1
        sign = -1 if group["maximize"] else 1
        lr = rate(group)
        held = [rows_of(param, self.state[param], channel_groups) for param in batch]
        grads = [as_rows(param.grad, channel_groups) for param in batch if param.grad is not None]
        counts = [self.state[param]["step"] for param in batch]
        steps = torch.stack(counts)

        past = Rows(*[join(tensors, dims, group["blocks"], exact) for tensors in zip(*held, strict=True)])
        grad = join(grads, dims, group["blocks"], exact) * (sign * f)
        beta, beta2 = group["beta"], group["beta2"]
        if dims:
            t = (steps + 1).reshape(-1, 1, 1, 1)
            new, expected = rows_update(
                past,
                grad,
                t,
                theta,
                lr,
                beta=beta,
                beta2=beta2,
                family=group["family"],
                method=group["orthogonalise"],
                exponent=group["radius_exponent"],
                bias_sq=self._bias_squares(batch, group, f) if steps_plainly(group) else None,
                gain=group["head_gain"],
            )
        else:
            t = torch.cat([count.expand(p.numel()) for count, p in zip(counts, batch, strict=True)]) + 1
            new, expected = vector_update(past, grad, t, theta, lr, beta=beta, beta2=beta2)
        targets, values = list(counts), list((steps + live).unbind())
        for after, before, tensors in zip(new, past, zip(*held, strict=True), strict=True):
            targets += tensors
            values += part(torch.where(live, after, before), tensors, dims)
        # Not _foreach_copy_: inductor (torch 2.13) then forms the movement from weights it has written already.
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
        return expected

    def _bias_squares(self, heads: list[Tensor], group: dict[str, Any], f: Tensor) -> Tensor:
        """||s of the bias||^2 of some heads, with this step in it: `(heads, 1, 1, 1)`, 0 without a bias."""
        exact, beta2, named = statistics_like(heads[0]), group["beta2"], dict(self._named_params())
        names = {param: name for name, param in named.items()}
        told = []
        for head in heads:
            bias = named.get(bias_name(names.get(head, "")))
            if bias is None or bias.grad is None or bias.numel() != self.state[head]["radius"].numel():
                told.append(torch.zeros((), dtype=exact, device=head.device))
                continue
            state = self.state[bias]
            now = (bias.grad.to(state["exp_avg_sq"]) * f).square()
            square = state["exp_avg_sq"].lerp(now, 1 - beta2) / bias_correction(beta2, state["step"] + 1)
            told.append(square.sum().to(exact))
        return torch.stack(told).reshape(-1, 1, 1, 1)

    def _named_params(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from zip(group.get("param_names", ()), group["params"])

    def _drop_movements(self, live: Tensor) -> None:
        """A tensor without a gradient took no part in this step: its movement is of another point, so forget it."""
        for group in self.param_groups:
            for param in group["params"]:
                idle = param.grad is None or not param.requires_grad
                if idle and "movement" in (state := self.state.get(param, {})):
                    state["movement"].mul_(live.logical_not().to(param.device))


def _batches(params: list[Tensor], group: dict[str, Any]) -> list[list[Tensor]]:
    """Parameters of a group one by one; foreach: those that can be joined, together."""
    if not takes_foreach(group):
        return [[p] for p in params]
    alike: dict[Any, list[list[Tensor]]] = {}
    for param in params:
        shape = param.shape if dims_of(param, group) else None
        batches = alike.setdefault((shape, param.dtype, param.device), [[]])
        if sum([p.numel() for p in batches[-1]]) >= joined_entries(param.device):
            batches.append([])
        batches[-1].append(param)
    return [batch for batches in alike.values() for batch in batches]


def _pack(feedback: Feedback, dtype: torch.dtype, **changed: Tensor) -> Tensor:
    """The state tensor of a feedback, with some of its numbers `changed`."""
    named = zip(Feedback._fields, feedback, strict=True)
    return torch.stack([changed.get(name, value).to(dtype) for name, value in named])


def _is_not_zero(lr: Rate, device: torch.device) -> Tensor:
    if isinstance(lr, Tensor):
        return (lr != 0).reshape(()).to(device)
    return torch.full((), lr != 0, device=device)


# -- groups ------------------------------------------------------------------------------------------------


def module_groups(model: nn.Module, roles: Overrides | None = None) -> list[dict[str, Any]]:
    """Parameter groups of a module for AutoNero, one for each treatment, with names."""
    return group_by_treatment(parameter_roles(model, roles), autonero_treatment)


def autonero_treatment(role: Role) -> dict[str, Any]:
    """What AutoNero does with a role, as group options.

    A table that is embedding and head at once is a head: at RMS 1 its logits would be sqrt(d) times too large.
    """
    return {
        "role": role.kind,
        "family": "head" if role.kind == "tied" else role.family,
        "neuron_dim": role.neuron_dim,
        "channel_groups": role.channel_groups,
        "blocks": role.groups * role.slices,
    }


def _only_groups(params: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups given, which must say what their tensors are."""
    groups = list(params)
    for group in groups:
        if not isinstance(group, dict) or "family" not in group:
            given = f"a {type(group).__name__}" if not isinstance(group, dict) else "a group without a family"
            raise TypeError(
                f"AutoNero treats a tensor by what it is in the network, and was given {given}; write "
                "AutoNero(model) instead of AutoNero(model.parameters()), or pass "
                "archopt.optim.autonero.module_groups(model) with your options in the groups"
            )
    return groups
