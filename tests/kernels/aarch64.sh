#!/usr/bin/env bash
# The CPU kernels on aarch64, where there is none: compiled for it, and their tests run by an emulator (some 6 minutes).
#
#   tests/kernels/aarch64.sh [DIR]       DIR: a folder to keep what it fetches (default: one that is removed)
#
# For x86-64 Debian or Ubuntu, as root, with: apt-get install qemu-user-static gcc-aarch64-linux-gnu debootstrap
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
if [ $# -gt 0 ]; then mkdir -p "$1"; root=$(realpath "$1"); else root=$(mktemp -d); trap 'rm -rf "$root"' EXIT; fi
for tool in qemu-aarch64-static aarch64-linux-gnu-gcc debootstrap; do
  command -v "$tool" > /dev/null || { echo "aarch64.sh needs $tool; see its first lines"; exit 1; }
done

if [ ! -e "$root/ready" ]; then
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1,libstdc++6 bookworm "$root/system" > "$root/debootstrap.log"
  for package in "$root"/system/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root/system"; done
  # torch's wheel for aarch64 is for CPUs. Of hypothesis the last version in pure Python that will do.
  "$python" -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.11 --target "$root/site" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    torch==2.7.1 numpy==2.4.6 markupsafe sympy mpmath networkx jinja2 filelock fsspec typing_extensions \
    pytest==9.0.2 pluggy iniconfig packaging pygments hypothesis==6.112.0 sortedcontainers attrs
  touch "$root/ready"
fi

rm -rf "$root/source" && mkdir "$root/source" && cp -r src tests pyproject.toml "$root/source"
flags=$("$python" -c 'import re; print(re.search(r"FLAGS = \"(.*)\"", open("setup.py").read())[1])')
rm -f "$root"/source/src/archopt/kernels/_native*
# shellcheck disable=SC2086
aarch64-linux-gnu-gcc $flags -fPIC -shared src/archopt/kernels/native/*.c -lm \
  -o "$root/source/src/archopt/kernels/_native.abi3.so"
cd "$root/source"
emulated() {
  qemu-aarch64-static -L "$root/system" -E "PYTHONPATH=src:tests:$root/site" -E OMP_NUM_THREADS=1 \
    -E "LD_LIBRARY_PATH=$root/system/usr/lib/aarch64-linux-gnu:$root/system/lib/aarch64-linux-gnu" \
    "$root/system/usr/bin/python3.11" "$@"
}
emulated -c 'import platform, archopt.kernels as k; print(platform.machine(), k.status()["cpu"])'
emulated -m pytest -q -p no:cacheprovider tests/kernels/test_*.py
