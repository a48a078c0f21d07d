"""Who follows a run while it goes."""

from collections.abc import Mapping
from typing import Any


class Watcher:
    """Follows a run. The methods do nothing here."""

    def begin(self, step: int, steps: int) -> None:
        """The run starts at `step` (more than 0 where it resumes) of `steps`."""

    def step(self, step: int, now: float) -> bool:
        """Called after every step, so it must be quick. True asks the run to stop and keep a checkpoint."""
        return False

    def line(self, line: Mapping[str, Any]) -> None:
        """A line was added to the metrics."""
