"""Digits with a fault in one of several processes: for the tests of --distribute."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from archopt.lab.workloads.digits import Digits


@dataclass
class Faulty(Digits):
    """Digits, but that one process raises, dies or sleeps at a step."""

    name = "faulty"
    summary = "digits with a fault"

    fault: str = ""
    """raise, die or sleep; "" for none."""
    fault_rank: int = 1
    fault_at: int = 20
    pause: float = 0.0
    """Seconds that a step sleeps."""

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        if self.share.rank == self.fault_rank and step == self.fault_at and not os.environ.get("FAULTLESS"):
            self._fail()
        return super().batch(step, seed)

    def _fail(self) -> Any:
        if self.fault == "raise":
            raise OSError("picture 17 is damaged")
        if self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "sleep":
            time.sleep(25.0)
