"""What `python -m dst.main` sets in its process: freed memory and compiled programs are kept."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Page faults of writing 64 MiB a second time, once the first were freed.
AGAIN = """
import pathlib, resource
import numpy as np
from dst.training import runtime
runtime.prepare(pathlib.Path("."))
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code, tmp_path, **environment):
    """What a fresh process prints."""
    own = {name: v for name, v in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment = {**own, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_unless_switched_off(tmp_path):
    pages = 2**26 // os.sysconf("SC_PAGESIZE")
    assert int(run(AGAIN, tmp_path)) < pages / 100
    off = {"DST_KEEP_MEMORY": "0", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    assert int(run(AGAIN, tmp_path, **off)) >= pages / 512  # huge pages, where all are


PROGRAMS = """
import pathlib
import jax
from dst.training import runtime
runtime.prepare(pathlib.Path("here"))
print(jax.config.jax_compilation_cache_dir)
"""


def test_programs_are_kept_in_the_workdir_unless_the_user_has_another_place(tmp_path):
    assert run(PROGRAMS, tmp_path) == str(Path("here/compiled"))
    assert run(PROGRAMS, tmp_path, JAX_COMPILATION_CACHE_DIR="elsewhere") == "elsewhere"
