"""Where tests of the GPU kernels run: on a GPU, or in Triton's interpreter (`make test-triton`), else nowhere."""

import os
from collections.abc import Iterator

import pytest
import torch

from archopt.kernels import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("no GPU here; `make test-triton` runs the kernels in Triton's interpreter")
    if reason := gpu.missing():
        pytest.skip(reason)


@pytest.fixture
def real_gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU: the interpreter has no queue to wait for, and no graphs")


@pytest.fixture(autouse=True)
def device(_kernels: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device that the kernels run on; in the interpreter they serve weights on the CPU."""
    if not INTERPRETED:
        yield "cuda"
        return
    from triton.runtime import interpreter

    patch_tensors, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch(tensor, *scope):  # a scope, which undoes it, from Triton 3.6 on
        # Up to Triton 3.6 it makes an int of an array of one entry, which numpy 2.4 refuses.
        patch_tensors(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def round_to_nearest(values, source, target, mode):
        # It cuts float32 off to bfloat16; a GPU rounds.
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        return torch.tensor(values).to(torch.bfloat16).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter, "_convert_float", round_to_nearest)
    monkeypatch.setattr(gpu, "DEVICE_TYPES", ("cuda", "cpu"))
    yield "cpu"
