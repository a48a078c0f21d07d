"""archopt: optimisers that read the network instead of asking for hyperparameters.

from archopt import Nero
optimizer = Nero(model)
"""

from archopt import init
from archopt._version import __version__
from archopt.optim.agd import AGD
from archopt.optim.autonero import AutoNero
from archopt.optim.average import averaged, renew_statistics
from archopt.optim.base import ArchoptWarning
from archopt.optim.constrain import constrain
from archopt.optim.lamb import Lamb
from archopt.optim.madam import Madam
from archopt.optim.nero import Nero
from archopt.project import project_
from archopt.roles import parameter_roles
from archopt.step_in_backward import step_in_backward

__all__ = [
    "AGD",
    "ArchoptWarning",
    "AutoNero",
    "Lamb",
    "Madam",
    "Nero",
    "__version__",
    "averaged",
    "constrain",
    "init",
    "parameter_roles",
    "project_",
    "renew_statistics",
    "step_in_backward",
]
