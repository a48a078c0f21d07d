"""Where randomness comes from: every generator is set from (seed, step, purpose) before it is drawn from.

So nothing depends on what was drawn before: every optimiser sees the same batches, a resumed run draws what the
undisturbed one would have drawn, and measuring does not move the training's draws.
"""

import hashlib
import random

import numpy as np
import torch

BUILD, STEP, EVALUATION, OPTIMIZER, BATCH = range(5)
"""Purposes. `BATCH` is for workloads that draw their batches from a generator of their own."""


def mix(seed: int, step: int, purpose: int) -> int:
    """63 bits that stand for the three."""
    digest = hashlib.blake2b(b"%d/%d/%d" % (seed, step, purpose), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(value: int, device: torch.device) -> None:
    """Seeds the global generators of torch (the CPU's and the device's), numpy and Python.

    Not `torch.manual_seed`: without a GPU that one queues calls for one, a third of a millisecond each.
    """
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)  # numpy takes 32 bits
    random.seed(value)
