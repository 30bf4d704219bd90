"""Four virtual CPU devices and strict broadcasting, set before JAX starts its backend.

The tests compile thousands of programs and run each for milliseconds: XLA and LLVM take the short
way, Python looks for garbage rarely while it traces, and what one test, worker or process that a
test starts has compiled, the others find.
"""

import atexit
import gc
import hashlib
import os
import shutil
import sys
import tempfile
import types
from importlib.metadata import version

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dst-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # newer ones do not know it, and would end the process
    # Half of the time of a compilation: an MLIR context for each fusion.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest

from dst import layers as kinds
from dst.layers import KINDS
from tests.pages import code

gc.set_threshold(50_000, 20, 100)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


# The longest files, from 100 to 30 seconds of a CPU; `make test` gives files out in this order.
FIRST = (
    *("notebooks", "same_choices", "train", "rewire", "hosts", "explore", "every_method"),
    *("layer_kinds", "keep_counts", "sweep", "sparse", "arrivals", "layers", "examples"),
    *("blockwise", "fusion", "parallel", "reference_models", "chain"),
)


def pytest_collection_modifyitems(items):
    """Long files first: what the last worker still has to do when the others are done is short."""
    order = {f"test_{name}.py": n for n, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A process that keeps the programs of all modules runs out of memory maps, and XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_once():
    """Whole runs in a module share the compiled steps of what is the same to the last byte.

    Each would trace and lower them again, which takes longer than the steps themselves. The key is
    all that they are made of: the config without what they do not read, from which optimizer and
    method follow, the network, the data, the devices, the way of looping and the kernels.
    """
    from dst.config import OPERATIONAL
    from dst.connections.backends import cpp
    from dst.training import steps, train

    def digest(part):
        if isinstance(part, np.ndarray):
            return part.shape, part.dtype.str, hashlib.sha256(part.tobytes()).hexdigest()
        return repr(part)

    def once(make, free):
        made = {}

        def remembered(config, dataset, net, *rest):
            fields = sorted((f, v) for f, v in config.items() if f not in free)
            own = [part for part in rest if isinstance(part, list | np.ndarray)]
            where = steps.looped(jax.devices()), cpp.available()
            key = (where, *map(digest, [fields, net, *dataset, *own]))
            if key not in made:
                made[key] = make(config, dataset, net, *rest)
            return made[key]

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_steps", once(train.make_steps, OPERATIONAL))
        patch.setattr(train, "make_evaluate", once(train.make_evaluate, ("checkpoint_every",)))
        yield


@pytest.fixture
def no_figures(monkeypatch):
    """Runs of a test draw nothing, half of the time of a short one; those of fixtures do."""
    from dst.training import figures

    monkeypatch.setattr(figures, "plot", lambda workdir: None)


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


@pytest.fixture
def registry():
    """KINDS, as it was before when the test is over."""
    before = list(KINDS)
    yield KINDS
    KINDS[:] = before


@pytest.fixture
def page(registry, monkeypatch):
    """What the code on the page of `dst.layers` defines."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(code(kinds), kinds.__file__, "exec", dont_inherit=True), vars(module))
    return vars(module)
