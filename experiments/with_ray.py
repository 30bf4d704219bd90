"""The same sweep on Ray: `pip install 'dst-jax[ray]'`, then --engine=ray.

`ray.init` takes the cluster of RAY_ADDRESS, or starts one on this machine. All nodes must see the
project and --out under the same paths. In an allocation of Slurm's, `srun ray symmetric-run
--address=HOST:6379 -- python -m experiments.NAME --engine=ray` makes a cluster of its nodes first,
HOST the first of them; submitted again, the sweep goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dst.errors import ConfigError
from experiments.runs import ROOT, Run
from experiments.sweep import BAD_INPUT, Codes, perform


def on_ray(
    runs: list[Run], out: Path, tick: Callable[[], bool], options: argparse.Namespace
) -> Codes:
    """As many runs at once as the cluster has room for. Raises: ConfigError without Ray."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine=ray needs Ray: pip install 'dst-jax[ray]'.") from error
    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    place = {"num_cpus": options.cpus_per_run, "num_gpus": options.gpus_per_run}
    remote = ray.remote(**place, max_retries=-1)(perform)  # a run whose node was lost resumes
    waiting = {remote.remote(run, out.absolute()): run for run in runs}
    codes: Codes = {}
    stopping = False
    while waiting:
        # After bad input the others would be refused for the same reason.
        if (tick() or BAD_INPUT in codes.values()) and not stopping:
            stopping = True
            for task in waiting:
                ray.cancel(task)
        for task in ray.wait(list(waiting), timeout=0.2)[0]:
            run = waiting.pop(task)
            try:
                codes[run] = ray.get(task)
            except ray.exceptions.RayError:
                if not stopping:
                    raise
    return codes
