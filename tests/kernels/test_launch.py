"""Launches that are repeated hand on what Triton's own would. No GPU: a driver that only takes note of launches."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import archopt
from archopt.kernels import gpu, gpu_autonero, launch

triton = pytest.importorskip("triton")


class Driver:
    """What Triton asks of a GPU's driver, as if there were an H100."""

    def __init__(self):
        self.launches = []
        tells_threads = "n_max_threads" in inspect.getsource(triton.compiler.CompiledKernel)
        # Registers, spills, and from some version on threads.
        loaded = (32, 0, 1024) if tells_threads else (32, 0)
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, *loaded),
            unload_module=lambda _: None,
            get_device_properties=lambda _: properties,
        )

    def launcher_cls(self, src, metadata):
        return lambda *args: self.launches.append(tuple(map(described, args)))

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def described(argument):
    """A launcher's argument; of a tensor what can be the same in two steps."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.data_ptr() % 16
    return argument if isinstance(argument, int | float | str | tuple) else type(argument).__name__


@pytest.fixture
def driver(monkeypatch, tmp_path):
    if gpu.interpreted():
        pytest.skip("Triton runs its kernels in Python here, and launches nothing")
    if torch.cuda.is_available():
        pytest.skip("Triton would keep what is launched here for the GPU, whose own tests repeat launches")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu, "DEVICE_TYPES", ("cuda", "cpu"))
    monkeypatch.setattr(gpu, "missing", lambda: "")
    drivers = triton.runtime.driver
    before = vars(drivers).copy()
    drivers.set_active(driver := Driver())
    yield driver
    vars(drivers).update(before)
    launch._kept.cache_clear()
    gpu_autonero._kernel.cache_clear()


def model():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5, bias=False), nn.Linear(5, 3)
    built = nn.Sequential(*layers)
    for param in built.parameters():
        param.grad = torch.randn_like(param)
    return built


@pytest.mark.parametrize("rule", [archopt.Nero, archopt.AGD, archopt.AutoNero])
def test_a_repeated_launch_hands_on_the_same_arguments(rule, driver, monkeypatch):
    torch.manual_seed(0)
    optimizer = rule(model(), fused=True)
    optimizer.step()  # makes what is kept
    once = driver.launches.copy()
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "run", lambda *_, **__: pytest.fail("looked up again")
    )
    driver.launches.clear()
    optimizer.step()
    assert len(once) >= 3
    assert driver.launches == once


def test_what_triton_compiles_for_is_told_apart(driver):
    aligned, shifted = torch.zeros(8), torch.zeros(9)[1:]
    kinds = [aligned, shifted, aligned.double(), 1, 2, 16, 2**31, 0.5, True]
    assert len(set(map(launch._decides, kinds))) == len(kinds)
    assert launch._decides(3) == launch._decides(5)
    assert launch._decides(0.1) == launch._decides(1.0)
