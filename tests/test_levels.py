"""The kernels of lower instruction sets: the tests of their files, run again in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dst.connections.backends import cpp as kernels

ROOT = Path(__file__).parents[1]
CHOSEN = {
    "test_kernels.py": "products_",
    "test_convolve_kernels.py": "match_float64",
    "test_maps_kernels.py": "xla or float64 or first or nan or channel",
}
LEVEL = (
    "import ctypes; from dst.connections.backends.native.library import library; "
    "f = ctypes.CDLL(library()).dst_level; f.restype = ctypes.c_char_p; print(f())"
)


@pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_every_instruction_set_computes_the_same(level):
    """Products, convolutions and maps; skips where this machine has no such level."""
    environment = os.environ | {"DST_KERNELS": level}
    if level not in _run(["-c", LEVEL], environment):
        pytest.skip(f"this machine has no {level}")
    chosen = " or ".join(f"({file} and ({tests}))" for file, tests in CHOSEN.items())
    files = [f"tests/{file}" for file in CHOSEN]
    said = _run(
        ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *files, "-k", chosen], environment
    )
    assert all(f"{file} ." in said for file in files), said


def _run(arguments: list[str], environment: dict[str, str]) -> str:
    """The output of a Python that must end well."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
