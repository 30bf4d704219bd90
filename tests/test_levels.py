"""The kernels of a lower instruction set compute the same: their tests are run again with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dst.connections.backends import cpp as kernels

FILES = [f"{Path(__file__).parent}/test_{name}kernels.py" for name in ("", "convolve_", "maps_")]
MISSING = 77
PROGRAM = """
import ctypes, sys
import pytest
from dst.connections.backends.native.library import library
level, *files = sys.argv[1:]
of = ctypes.CDLL(library()).dst_level
of.restype = ctypes.c_char_p
if level not in of().decode():
    sys.exit(77)
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "every_level", *files]))
"""


@pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_every_instruction_set_computes_the_same(level):
    """Products, convolutions and maps, in one process for each level."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level, *FILES],
        env=os.environ | {"DST_KERNELS": level},
        capture_output=True,
        text=True,
    )
    if done.returncode == MISSING:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout
