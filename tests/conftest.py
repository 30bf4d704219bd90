"""Four virtual CPU devices and strict broadcasting, set before JAX starts its backend.

The tests compile hundreds of programs and run each for milliseconds: LLVM does not optimize them,
and what one test, worker or process that a test starts has compiled, the others find.
"""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dst-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A process that keeps the programs of all modules runs out of memory maps, and XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["pure", "compiled"])
def tier(request, monkeypatch):
    """Both tiers of sparse execution; on a machine without a compiler there is one."""
    from dst.connections.backends import cpp as kernels

    monkeypatch.setattr(
        kernels,
        "available",
        (lambda: True) if request.param == "compiled" and kernels.available() else lambda: False,
    )


@pytest.fixture(params=["categorical", "inverse CDF"])
def branch(request, monkeypatch):
    """Both ways of drawing units, whatever the width."""
    from dst.methods import units

    most = 2**40 if request.param == "categorical" else 0
    monkeypatch.setattr(units, "CATEGORICAL_ELEMENTS", most)
