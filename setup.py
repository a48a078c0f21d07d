"""Builds the CPU kernels beside the package; everything else stands in pyproject.toml.

The library is optional: where no C compiler is found, or it cannot compile it, the package installs without and
says so (`archopt.kernels.status()`). It is reached by ctypes and needs neither Python's headers nor torch's.
"""

import sys
from glob import glob

from setuptools import Extension, setup

NATIVE = "src/archopt/kernels/native"

# No -ffast-math: it would lose NaN and infinity. Contraction into fused multiply-adds would make the bits depend on
# the processor. All that is given up is errno and the order of floating-point traps.
FLAGS = "-std=c11 -O3 -g0 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -pthread"

kernel = Extension(
    "archopt.kernels._native",
    sources=sorted(glob(f"{NATIVE}/*.c")),
    depends=["setup.py", *sorted(glob(f"{NATIVE}/*.h"))],
    extra_compile_args=FLAGS.split(),
    extra_link_args=["-pthread"],
    libraries=["m"],
    py_limited_api=True,
    optional=True,
)

# Microsoft's compiler has not the vector types that the kernels are written in.
setup(
    ext_modules=[] if sys.platform == "win32" else [kernel],
    # The library knows nothing of Python: one wheel serves every version from 3.11 on.
    options={} if sys.platform == "win32" else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
