"""Runs tests again with the kernels of a lower instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LEVEL = (
    "import ctypes; from dst.connections.backends.native.library import library; "
    "f = ctypes.CDLL(library()).dst_level"
)


def again(level: str, file: str, chosen: str) -> None:
    """Runs the tests of `file` that are `chosen`; skips where this machine has no such level."""
    environment = os.environ | {"DST_KERNELS": level}
    script = f"{LEVEL}; f.restype = ctypes.c_char_p; print(f())"
    if level not in _run([sys.executable, "-c", script], environment):
        pytest.skip(f"this machine has no {level}")
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", file, "-k", chosen]
    _run([sys.executable, "-m", "pytest", *options], environment)


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
