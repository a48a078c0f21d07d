"""Settings of every test: one thread, fixed seeds, hypothesis without chance or deadline."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("archopt", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("archopt")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
