"""archopt: optimisers that read the network instead of asking for hyperparameters.

from archopt import Nero
optimizer = Nero(model)
"""

from archopt._version import __version__
from archopt.optim.autonero import AutoNero
from archopt.optim.average import averaged, renew_statistics
from archopt.optim.base import ArchoptWarning
from archopt.optim.nero import Nero
from archopt.roles import parameter_roles

__all__ = [
    "ArchoptWarning",
    "AutoNero",
    "Nero",
    "__version__",
    "averaged",
    "parameter_roles",
    "renew_statistics",
]
