"""AutoNero is its equations: the worked numbers, the slow float64 form, and what must not change a trajectory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt import AutoNero, kernels
from reference.autonero import Reference, Variable, matrix_rows

WORKED = {
    "E": ((1.0, 0.5), (-0.2, 0.8), (0.3, -0.6)),
    "W": ((1.0, 2.0, -4.0), (0.5, -1.0, 3.0)),
    "H": ((0.2, -0.1), (0.3, 0.4)),
    "B": (0.3, -0.2),
}
FAMILIES = {"E": "embedding", "W": "hidden", "H": "head", "B": "vector"}
ROLES = {"^E$": "embedding", "^W$": "matrix", "^H$": "head", "^B$": "vector"}
GRADIENTS: tuple[dict[str, Any], ...] = (
    {
        "E": ((0.1, -0.2), (0.3, 0.1), (0.0, 0.2)),
        "W": ((0.1, -0.2, 0.3), (0.4, 0.5, -0.6)),
        "H": ((0.2, 0.1), (-0.1, 0.3)),
        "B": (0.1, -0.3),
    },
    {
        "E": ((-0.1, 0.2), (0.2, 0.2), (0.1, -0.1)),
        "W": ((-0.3, 0.1, 0.2), (0.2, -0.1, 0.1)),
        "H": ((0.1, -0.2), (0.2, 0.1)),
        "B": (0.2, 0.1),
    },
    {
        "E": ((0.2, 0.1), (-0.3, 0.1), (0.05, 0.2)),
        "W": ((2.5, 2.5, -0.5), (-1.0, 1.5, 0.5)),
        "H": ((-0.1, 0.1), (0.1, -0.3)),
        "B": (-0.4, 0.2),
    },
    {
        "E": ((0.05, -0.1), (0.1, 0.1), (0.2, -0.2)),
        "W": ((0.1, -0.2, 0.2), (0.3, 0.1, -0.2)),
        "H": ((0.3, 0.1), (0.1, 0.1)),
        "B": (0.1, -0.1),
    },
)
START = "1.26491106407 0.632455532034 -0.342997170285 1.37198868114 0.632455532034 -1.26491106407"
EXPECTED = (
    {
        "": "1 0.01 0 0 5.02845311297",
        "E": "1.25852358414 0.645072389861 -0.356669389352 1.36849806237 0.62684266794 -1.26770196405",
        "W": "0.965230496589 2.01284162252 -4.02508588003 0.478186192445 -1.01427927012 3.0115579851",
        "H": "0.198592049203 -0.101302004896 0.302435255104 0.396376000598",
        "B": "0.29 -0.19",
    },
    {
        "": "1 0.0100384348931 -0.361041383979 -0.0717996918472 2.38237483988",
        "E": "1.25886420991 0.644407402972 -0.369417352995 1.36511201713 0.622000582469 -1.27008475127",
        "W": "0.957818437163 1.99470120456 -4.05405558618 0.452146592331 -1.03197052974 3.01577121186",
        "H": "0.197820535956 -0.101081997247 0.302434442146 0.39419326942",
        "B": "0.280324204766 -0.185975137596",
    },
    {
        "": "0.469277279958 0.0102199414275 1.8507126795 0.210593380613 3.28065628084",
        "E": "1.25910672337 0.643933427593 -0.376448978369 1.36318970312 0.616488288859 -1.2727694959",
        "W": "0.918849522332 1.97331351141 -4.06851263231 0.463267323277 -1.05484902821 3.01036321547",
        "H": "0.197311121725 -0.101059452902 0.301866594226 0.393437306815",
        "B": "0.278686915507 -0.184799552049",
    },
    {
        "": "1 0.0103805845677 0.229591556075 0.164839684638 2.49851858464",
        "E": "1.25805430825 0.645987118674 -0.384208682564 1.36102303002 0.611512891335 -1.27516743361",
        "W": "0.878892524126 1.95367211327 -4.08494057808 0.460882973191 -1.07564103879 3.0081836834",
        "H": "0.196412607804 -0.101492478309 0.301027061968 0.392539084436",
        "B": "0.275439892918 -0.182102071834",
    },
)
DERIVATION = {
    "head": "turn",
    "radius_exponent": 0.5,
    "initial_theta": 0.01,
    "embedding_radius": "rms",
    "bound_errors": 0.0,
}
"""The options with which the rule is its first derivation, whose worked numbers these are."""
RADII = {"W": "4.61259431574 3.22778342402", "H": "0.22108513215 0.494675878578"}


KERNEL = kernels.status()["cpu"]
FORMS = [
    pytest.param({"foreach": False}, id="plain"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param(
        {"fused": True},
        id="fused",
        marks=pytest.mark.skipif(not KERNEL.available, reason=f"no CPU kernel: {KERNEL.detail}"),
    ),
]


def assert_numbers(tensor: Tensor, text: str) -> None:
    """Equal to 1e-10 to numbers printed with 12 significant digits."""
    actual, expected = tensor.detach().flatten().tolist(), [float(word) for word in text.split()]
    assert actual == pytest.approx(expected, rel=0, abs=1e-10)


def worked_model() -> nn.Module:
    model = nn.Module()
    for name, values in WORKED.items():
        model.register_parameter(name, nn.Parameter(torch.tensor(values, dtype=torch.float64)))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_worked_numbers(form: dict[str, bool]) -> None:
    model = worked_model()
    optimizer = AutoNero(model, roles=ROLES, orthogonalise="svd", **form, **DERIVATION)
    assert_numbers(model.E, START)
    size = 0.0
    for t, (gradients, expected) in enumerate(zip(GRADIENTS, EXPECTED, strict=True), start=1):
        norm_squared = 0.0
        for name, values in gradients.items():
            model.get_parameter(name).grad = torch.tensor(values, dtype=torch.float64)
            norm_squared += float(model.get_parameter(name).grad.square().sum())
        optimizer.step()
        f, theta, C, rho, G = (float(word) for word in expected[""].split())
        # f is not kept, but q is: q <- beta2 q + (1 - beta2) (f N)^2.
        size = 0.99 * size + 0.01 * f**2 * norm_squared
        assert float(optimizer.feedback.size) == pytest.approx(size, rel=1e-10)
        measured = torch.stack([optimizer.theta, optimizer.C, optimizer.rho, optimizer.G])
        assert_numbers(measured, f"{theta} {C} {rho} {G}")
        for name in WORKED:
            assert_numbers(model.get_parameter(name), expected[name])
        assert int(optimizer.feedback.steps) == t
    for name, radii in RADII.items():
        assert_numbers(optimizer.state[model.get_parameter(name)]["radius"], radii)


def test_reference_gives_the_worked_numbers() -> None:
    variables = {
        name: Variable(
            torch.tensor(values, dtype=torch.float64),
            FAMILIES[name],
            matrix_rows((len(values), len(values[0]))) if name != "B" else [],
            scaled=True,
        )
        for name, values in WORKED.items()
    }
    reference = Reference(variables, first=0.01, derivation=True)
    assert_numbers(variables["E"].values, START)
    for gradients, expected in zip(GRADIENTS, EXPECTED, strict=True):
        reference.step(
            {name: torch.tensor(values, dtype=torch.float64) for name, values in gradients.items()}
        )
        scalars = (reference.f, reference.theta, reference.C, reference.rho, reference.G)
        assert_numbers(torch.tensor(scalars, dtype=torch.float64), expected[""])
        for name, variable in variables.items():
            assert_numbers(variable.values, expected[name])


# -- sixty random steps ------------------------------------------------------------------------------------

STEPS = 60


class Zoo(nn.Module):
    """A layer of every kind whose rows differ in shape, axis or block; zero rows, zero matrices, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4, padding_idx=1)
        self.positions = nn.Embedding(3, 4)
        self.first = nn.Linear(4, 6)
        self.twin = nn.Linear(4, 6)
        self.zero_rows = nn.Linear(4, 5, bias=False)
        self.zeros = nn.Linear(3, 4, bias=False)
        self.one_row = nn.Linear(5, 1, bias=False)
        self.one_column = nn.Linear(1, 5)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(3, 3, 2, groups=3, bias=False)
        self.transposed = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
        self.lstm = nn.LSTM(3, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.zero_rows.weight[1::2] = 0
            self.zeros.weight.zero_()
            self.positions.weight.zero_()


def index_rows(name: str, param: Tensor) -> Any:
    """The blocks of a parameter of `Zoo`, written down by hand from what the layer computes."""
    index = torch.arange(param.numel()).reshape(param.shape)
    if name == "transposed.weight":  # (in, out/groups, k, k): outputs o of group g read inputs 2g, 2g+1
        return [[index[2 * g : 2 * g + 2, o].flatten().tolist() for o in range(3)] for g in range(2)]
    rows = [row.flatten().tolist() for row in index]
    blocks = {"grouped.weight": 2, "depthwise.weight": 3, "attention.in_proj_weight": 3}.get(name, 1)
    blocks = 4 if name.startswith("lstm.weight") else blocks
    size = len(rows) // blocks
    return [rows[size * b : size * (b + 1)] for b in range(blocks)]


def family(name: str, param: Tensor) -> str:
    if param.dim() < 2 or name == "one_column.weight":
        return "vector"
    return {"tokens.weight": "embedding", "positions.weight": "embedding", "head.weight": "head"}.get(
        name, "hidden"
    )


def random_gradients(model: nn.Module, t: int, scale: float = 1.0) -> None:
    """Slowly turning gradients; some tensors have none at times, some rows are zero, one wakes late, one spikes."""
    for number, (name, param) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * number + 7)
        base = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        generator.manual_seed(1000 * number + t)
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        grad = (math.cos(0.05 * t) * base + 0.5 * noise) * (0.1 + 0.05 * number)
        if name == "tokens.weight":
            grad[1] = 0  # padding
            grad[2 + t % 3] = 0
        if name == "zero_rows.weight" and t < 10:
            grad[:2] = 0
        if name == "grouped.weight" and t % 7 == 3:
            grad *= 30
        absent = (name == "first.weight" and t % 5 == 2) or (name == "lstm.weight_hh_l0" and t < 20)
        param.grad = None if absent else torch.zeros_like(param).copy_(scale * grad)
        if t == 31:
            param.grad = torch.zeros_like(param)
        if t == 17 and name == "norm.bias":
            assert param.grad is not None
            param.grad[0] = math.nan


def rate(t: int) -> float:
    return 0.0 if t in (12, 13) else 6 / (1 + 0.05 * t)


@pytest.mark.parametrize("form", [*FORMS[:2], pytest.param({}, id="default")])
@pytest.mark.parametrize(
    ("theta", "derivation", "biased"),
    [(0.05, False, True), (0.01, False, False), (1e-5, False, True), (None, False, True), (0.05, True, True)],
)
def test_sixty_steps_follow_the_reference(
    form: dict[str, bool], theta: float | None, derivation: bool, biased: bool
) -> None:
    model = Zoo().double()
    if not biased:
        model.head = nn.Linear(4, 3, bias=False).double()
    reference = Reference(
        {
            name: Variable(
                param,
                family(name, param),
                index_rows(name, param) if param.dim() > 1 else [],
                scaled=derivation,
                bias="head.bias" if name == "head.weight" else "",
            )
            for name, param in model.named_parameters()
        },
        first=theta,
        derivation=derivation,
    )
    options = {**(DERIVATION if derivation else {}), "initial_theta": theta}
    optimizer = AutoNero(model, orthogonalise="svd", **form, **options)
    young: dict[str, list[int]] = {"zeros.weight": [], "positions.weight": [], "tokens.weight": []}
    for t in range(STEPS):
        random_gradients(model, t)
        for group in optimizer.param_groups:
            group["lr"] = rate(t)
        reference.step({name: param.grad for name, param in model.named_parameters()}, rate(t))
        optimizer.step()
        scalars = torch.stack([optimizer.theta, optimizer.rho, optimizer.C, optimizer.G])
        expected = [reference.theta, reference.rho, reference.C, reference.G]
        assert scalars.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12), f"step {t}"
        for name, param in model.named_parameters():
            values = reference.variables[name].values
            gap = (param.detach().flatten() - values).norm()
            assert gap <= 1e-10 * (1 + values.norm()), f"{name} at step {t}: {gap}"
        for name in young:
            growing = optimizer.state[model.get_parameter(name)].get("grows_to", torch.zeros(()))
            young[name].append(int((growing > 0).sum()))
    assert int(optimizer.skipped) == reference.skipped == 1
    assert int(optimizer.feedback.steps) == reference.t == STEPS - 2
    if theta == 0.05:
        # Embeddings of zeros are scaled by the others' norm, or else have RMS 1 before them, which takes longer.
        for name in ("zeros.weight", "positions.weight" if derivation else "tokens.weight"):
            assert max(young[name]) > young[name][-1], f"rows of {name} must grow up"
    assert not model.tokens.weight[1].any()
