"""archopt: optimisers that read the network instead of asking for hyperparameters.

from archopt import Nero
optimizer = Nero(model)
"""

from archopt._version import __version__
from archopt.optim.base import ArchoptWarning
from archopt.optim.nero import Nero
from archopt.roles import parameter_roles

__all__ = ["ArchoptWarning", "Nero", "__version__", "parameter_roles"]
