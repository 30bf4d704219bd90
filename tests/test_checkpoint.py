"""Checkpoints: bit-exact round trips, damage noticed, other runs refused, kills survived."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from dst.config import OPERATIONAL
from dst.errors import ConfigError
from dst.training import checkpoint

CONFIG = {"seed": 0, "learning_rate": 0.1, "hidden": (8, 8)}


@struct.dataclass
class State:
    step: Any
    params: Any
    masks: Any
    opt_state: Any
    key: Any
    method: Any


def make_state(step: int, seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        # Large enough for a data file of its own, random so that it does not compress away.
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 64, 32))},
        "norm": {"scale": jnp.ones(5, jnp.bfloat16), "empty": jnp.zeros((0, 3))},
    }
    sgd = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))
    states = (sgd.init(params), optax.adamw(optax.constant_schedule(1e-3)).init(params))
    masks = {"block/conv": jax.random.bernoulli(keys[1], 0.1, (3, 3, 64, 32))}
    return State(jnp.int32(step), params, masks, states, keys[2], ())


def bits(leaf: Any) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, bits(x)) == (y.dtype, y.shape, bits(y))


def save_steps(workdir: Path, *steps: int, keep: int = 3) -> None:
    with checkpoint.open_manager(workdir, keep) as manager:
        for step in steps:
            checkpoint.save(manager, make_state(step, seed=step), {"config": CONFIG})


def restore(workdir: Path, like: Any = None, config: Any = None) -> tuple[Any, Any, list[str]]:
    said: list[str] = []
    with checkpoint.open_manager(workdir, 3) as manager:
        like = make_state(0) if like is None else like
        state, record = checkpoint.restore(manager, like, config or CONFIG, said.append)
    return state, record, said


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save_steps(workdir, 10, 20, 30)
    return workdir


@pytest.fixture
def run(three_steps, tmp_path):
    """A copy of a run with checkpoints of steps 10, 20 and 30."""
    return shutil.copytree(three_steps, tmp_path / "run")


def data_file(workdir: Path, step: int) -> Path:
    files = (f for f in (workdir / "checkpoints" / str(step)).rglob("*") if f.is_file())
    return max(files, key=lambda f: f.stat().st_size)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def clear(file: Path) -> None:
    os.truncate(file, 0)


def empty_folder(file: Path) -> None:
    shutil.rmtree(file)
    file.mkdir()


DAMAGE = {
    "bit": (flip_a_bit, None),
    "truncated": (truncate, None),
    "deleted": (os.remove, None),
    "emptied": (clear, None),
    "manifest": (clear, "state/manifest.ocdbt"),
    "metadata": (truncate, "state/_METADATA"),
    "json": (truncate, "note/metadata"),
    "json bit": (flip_a_bit, "note/metadata"),
    "json gone": (os.remove, "note/metadata"),
    "no step metadata": (empty_folder, "state"),
    "empty step": (empty_folder, ""),
}


def damage(workdir: Path, step: int, kind: str) -> None:
    hurt, name = DAMAGE[kind]
    folder = workdir / "checkpoints" / str(step)
    hurt(data_file(workdir, step) if name is None else folder / name)


def test_round_trip_is_bit_exact(run):
    state, record, said = restore(run)
    assert_identical(state, make_state(30, seed=30))
    assert record == {"config": {**CONFIG, "hidden": [8, 8]}} and not said


def test_a_state_replicated_over_devices_returns_to_them(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(make_state(5), everywhere)
    with checkpoint.open_manager(tmp_path, 2) as manager:
        checkpoint.save(manager, state, {"config": CONFIG})
    restored, _, _ = restore(tmp_path, like=state)
    assert_identical(restored, state)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(restored))
    alone, _, _ = restore(tmp_path)
    assert_identical(alone, state)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(alone))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_and_the_step_before_taken(run, caplog, capfd, kind):
    damage(run, 30, kind)
    state, _, said = restore(run)
    assert_identical(state, make_state(20, seed=20))
    assert said == ["The checkpoint of step 30 is damaged; taking that of step 20."]
    assert capfd.readouterr() == ("", "") and not caplog.messages  # no pages of Orbax's
    # The damaged step does not stand in the way, neither of itself nor of a step below it.
    save_steps(run, 25, 30)
    assert_identical(restore(run)[0], make_state(30, seed=30))
    damage(run, 30, "bit")
    assert_identical(restore(run)[0], make_state(25, seed=25))


def test_what_orbax_notes_for_itself_may_be_lost(run, caplog, capfd):
    clear(run / "checkpoints/30/_CHECKPOINT_METADATA")
    os.remove(run / "checkpoints/30/commit_success.txt")
    state, _, said = restore(run)
    assert_identical(state, make_state(30, seed=30))
    assert said == caplog.messages == [] and capfd.readouterr() == ("", "")


def test_nothing_saved_is_no_state(tmp_path):
    assert restore(tmp_path) == (None, None, [])


def test_two_damaged_steps_are_skipped(run):
    damage(run, 30, "bit")
    damage(run, 20, "empty step")
    state, _, said = restore(run)
    assert_identical(state, make_state(10, seed=10))
    assert len(said) == 2


def test_nothing_intact_is_an_error(run):
    for step in (10, 20, 30):
        damage(run, step, "bit")
    with pytest.raises(checkpoint.Unreadable, match=r"Every checkpoint .* 10, 20, 30"):
        restore(run)


def test_any_step_is_read_and_nothing_in_the_folder_touched(run, caplog, recwarn):
    """Not even what a save that is still under way has written, or a damaged step."""
    damage(run, 20, "bit")
    under_way = run / "checkpoints" / "40.orbax-checkpoint-tmp-0"
    shutil.copytree(run / "checkpoints" / "10", under_way)
    before = {file: bits(np.fromfile(file, np.uint8)) for file in run.rglob("*") if file.is_file()}
    with checkpoint.open_manager(run, None) as manager:
        found = {s: checkpoint.restore_step(manager, s, make_state(0), CONFIG) for s in (10, 20)}
        with pytest.raises(ConfigError, match="seed"):
            checkpoint.restore_step(manager, 10, make_state(0), {**CONFIG, "seed": 1})
    assert_identical(found[10][0], make_state(10, seed=10))
    assert found[20] is None and not caplog.records and not recwarn.list
    after = {file: bits(np.fromfile(file, np.uint8)) for file in run.rglob("*") if file.is_file()}
    assert after == before and under_way.is_dir()


def test_reading_makes_no_folder(tmp_path):
    with checkpoint.open_manager(tmp_path / "none", None) as manager:
        assert not manager.all_steps()
    assert not list(tmp_path.iterdir())


def test_saving_a_step_again_is_idempotent_or_overwrites(run):
    save_steps(run, 30)
    assert_identical(restore(run)[0], make_state(30, seed=30))
    with checkpoint.open_manager(run, 3) as manager:
        checkpoint.save(manager, make_state(30, seed=7), {"config": CONFIG})
        state, _ = checkpoint.restore(manager, make_state(0), CONFIG)
        assert_identical(state, make_state(30, seed=7))
        with pytest.raises(ValueError, match="older than the newest"):
            checkpoint.save(manager, make_state(29), {"config": CONFIG})


def test_what_changes_nothing_that_is_computed_may_be_another(run):
    """Where and how often, whether it was known before or not."""
    config = {**CONFIG, **dict.fromkeys(OPERATIONAL, 3)}
    assert_identical(restore(run, config=config)[0], make_state(30, seed=30))


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**CONFIG, "learning_rate": 0.2}, "learning_rate = 0.1, but learning_rate is 0.2 now"),
        ({**CONFIG, "hidden": (8, 9)}, r"hidden = \[8, 8\], but hidden is \[8, 9\] now"),
        ({"seed": 0, "hidden": (8, 8)}, "learning_rate = 0.1, but learning_rate is 'missing' now"),
        ({**CONFIG, "depth": 8}, "depth = 'missing', but depth is 8 now"),
    ],
)
def test_another_config_is_refused(run, config, sentence, damaged):
    if damaged:  # whether skipped or not, the steps are another run's
        damage(run, 30, "json")
    with pytest.raises(ConfigError, match=sentence):
        restore(run, config=config)


def test_another_tree_shape_or_dtype_is_refused(run):
    state = make_state(0)
    kernel = state.masks["block/conv"]
    others = {
        r"masks/block/conv is bool \[3, 3, 64, 32\] .* but bool \[3, 3, 64, 31\]": {
            "masks": {"block/conv": kernel[..., 1:]}
        },
        r"is bool .* but int8": {"masks": {"block/conv": kernel.astype(jnp.int8)}},
        r"params/norm/scale is bfloat16 \[5\] .* but float32 \[5\]": {
            "params": state.params | {"norm": state.params["norm"] | {"scale": jnp.ones(5)}}
        },
        r"masks/block/conv is .* but missing": {"masks": {}},
        r"method is missing .* but float32 \[\]": {"method": jnp.float32(0)},
        r"key is key<fry> .* but key<rbg>": {"key": jax.random.key(0, impl="rbg")},
        r"key is key<fry> .* but uint32": {"key": jax.random.key_data(state.key)},
        r"opt_state/.* but missing": {"opt_state": optax.sgd(0.1).init(state.params)},
    }
    for sentence, change in others.items():
        with pytest.raises(ConfigError, match=sentence):
            restore(run, like=state.replace(**change))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_refused(run, value):
    good = make_state(40)
    kernel = good.params["conv"]["kernel"].at[1, 1, 1, 1].set(value)
    scale = good.params["norm"]["scale"].at[1].set(value)
    before = sorted(run.rglob("*"))
    with checkpoint.open_manager(run, 3) as manager:
        for name, leaf in (("conv/kernel", kernel), ("norm/scale", scale)):
            module, field = name.split("/")
            params = good.params | {module: good.params[module] | {field: leaf}}
            with pytest.raises(checkpoint.NotFinite, match=f"params/{name} .* step 40"):
                checkpoint.save(manager, good.replace(params=params), {"config": CONFIG})
    assert sorted(run.rglob("*")) == before
    assert_identical(restore(run)[0], make_state(30, seed=30))


def make_host_state(step: int) -> State:
    weights = np.random.default_rng(0).normal(size=(400, 400))
    return State(np.int32(step), {"w": weights}, {"w": weights > 1}, (), np.uint32(1), ())


SAVE_FOREVER = """
import sys
import numpy as np
from tests.test_checkpoint import CONFIG, checkpoint, make_host_state
with checkpoint.open_manager(sys.argv[1], 1) as manager:
    state, _ = checkpoint.restore(manager, make_host_state(0), CONFIG)
    step = 0 if state is None else int(state.step)
    while True:
        step += 1
        checkpoint.save(manager, make_host_state(step), {"config": CONFIG})
        print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_the_newest_commit(tmp_path):
    rng, step = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first == step + 1  # it went on from what the last kill left
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        committed = [first, *map(int, process.communicate()[0].split())][-1]
        state, _, said = restore(tmp_path, like=make_host_state(0))
        step = int(state.step)
        assert step in (committed, committed + 1) and not said  # it may be killed before it prints
        assert_identical(state, make_host_state(step))
