"""The runs of an experiment, from command line to table and figure.

    python -m experiments.NAME [--scale=paper|short|smoke] [--dry-run] [--config.FIELD=VALUE ...]

  --scale      paper: the paper's schedule; short: 100 times shorter; smoke: minutes, on digits
  --out        a folder for each run, the table and the figure     (default: runs/experiments)
  --dry-run    print the commands of what is not finished, run nothing
  --collect    the table and the figure of what is finished, run nothing
  --engine     local: one run after the other; ray: as many as fit on a Ray cluster
  --config.*   one more thing that all runs have, as in dst.main

The same command goes on where it was stopped: finished runs are skipped, broken ones resume.
Exit code: 0 all is finished; 1 a run failed or was stopped; 2 bad input.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from dst.errors import ConfigError
from dst.training import figures, log
from dst.training.signals import stop_signals
from experiments.runs import ROOT, Finished, Run, finished, override, share_done, work
from experiments.scales import BASES, SCALES, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Codes = dict[Run, int]  # exit codes of dst.main; BUSY: another process has it
BUSY, BAD_INPUT = -100, 2


class Experiment(NamedTuple):
    """A table or a figure of the paper."""

    name: str
    doc: str
    arguments: Callable[[argparse.ArgumentParser], Any]
    runs: Callable[[argparse.Namespace], Iterable[Run]]  # whatever the seed
    table: Callable[[argparse.Namespace, list[Finished]], str]
    figure: Callable[[argparse.Namespace, list[Finished]], Figure]


# ------------------------------------------------------------------------------- the command line
def setting(text: str) -> tuple[str, str]:
    """`cifar100/vgg` as (data set, model)."""
    pair = tuple(text.split("/"))
    if pair not in BASES:
        names = ", ".join("/".join(known) for known in BASES)
        raise argparse.ArgumentTypeError(f"must be one of {names}, not {text!r}")
    return pair  # type: ignore[return-value]


def parse(experiment: Experiment, arguments: list[str]) -> argparse.Namespace:
    """The options, with the scale's own where the user says nothing. Raises: ConfigError."""
    doc = f"{experiment.doc}\n\n{__doc__.partition(chr(10))[2]}".replace("NAME", experiment.name)
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--scale", choices=SCALES, default="short")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true")
    what.add_argument("--collect", action="store_true")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--cpus-per-run", type=float, default=1, help="with ray")
    parser.add_argument("--gpus-per-run", type=float, default=0, help="with ray")
    parser.add_argument("--seeds", type=int, nargs="+")
    experiment.arguments(parser)
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from error
    scale = SCALES[options.scale]
    options.extra = dict(map(override, rest))
    for name, value in vars(options).items():
        if value is None and name in Scale._fields:
            setattr(options, name, list(getattr(scale, name)))
    return options


def settings(parser: argparse.ArgumentParser) -> None:
    """The option of experiments that the paper shows for several networks."""
    parser.add_argument("--settings", type=setting, nargs="+", metavar="DATA/MODEL")


def sparsities(parser: argparse.ArgumentParser) -> None:
    """The option of experiments that the paper shows at several sparsities."""
    parser.add_argument("--sparsities", type=float, nargs="+")


def expand(experiment: Experiment, options: argparse.Namespace) -> list[Run]:
    """Every run once, seed by seed, so that the first table is complete early."""
    once = [
        run._replace(overrides=tuple({**dict(run.overrides), **options.extra}.items()))
        for run in experiment.runs(options)
    ]
    runs = (run._replace(seed=seed) for seed in options.seeds for run in once)
    return list({run.folder: run for run in runs}.values())


# ------------------------------------------------------------------------------------ running it
def perform(run: Run, out: Path, tick: Callable[[], bool] = lambda: False) -> int:
    """Runs or resumes one run in a process of its own: its exit code, or BUSY.

    `tick` is called several times a second; once it is true the run is asked to save and stop.
    """
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, open(folder / "output.txt", "ab") as output:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return BUSY
        if finished(run, out):
            return 0
        # Runs of one network compile the same programs: what one has compiled the others load.
        programs = {"JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "compiled")}
        # The child inherits the lock, and keeps it should this process be killed.
        child = subprocess.Popen(
            run.command(out.absolute()),
            cwd=ROOT,
            env={**programs, **os.environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C is for this process, which passes it on once
        )
        try:
            while child.poll() is None and not tick():
                time.sleep(0.05)
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()
        return child.returncode


def locally(runs: list[Run], out: Path, tick: Callable[[], bool], _: Any) -> Codes:
    """One after the other."""
    codes: Codes = {}
    for run in runs:
        if tick():
            break
        codes[run] = perform(run, out, tick)
        if codes[run] == BAD_INPUT:  # the others would be refused for the same reason
            break
    return codes


def go(experiment: Experiment, options: argparse.Namespace, runs: list[Run]) -> int:
    """Runs what is not finished, with progress and ETA over all of it; the exit code."""
    out, weights = options.out, {run: work(run) for run in runs}
    todo = [run for run in runs if not finished(run, out)]
    left = list(todo)
    log.say(f"{experiment.name}: {len(runs)} runs, {len(runs) - len(todo)} of them finished.")

    def done() -> int:
        left[:] = [run for run in left if not finished(run, out)]
        missing = sum(weights[run] * (1 - share_done(run, out)) for run in left)
        return round(sum(weights.values()) - missing)

    engine = locally
    if options.engine == "ray":
        from experiments.with_ray import on_ray as engine  # an optional extra
    with (
        stop_signals() as stop,
        log.progress(round(sum(weights.values())), done(), "unit of work") as bar,
    ):
        shown = [time.monotonic()]

        def tick() -> bool:
            if time.monotonic() - shown[0] > 1:
                bar.show(done(), finished=len(runs) - len(left), of=len(runs))
                shown[0] = time.monotonic()
            return bool(stop)

        codes = engine(todo, out, tick, options)
    return told(codes, todo, options.out)


def told(codes: Codes, todo: list[Run], out: Path) -> int:
    """Says what went wrong and where; the exit code."""
    for run, code in codes.items():
        if code == BUSY:
            log.say(f"{run.folder} is being run by another process.")
        elif code:
            lines = (out / run.folder / "output.txt").read_text(errors="replace").splitlines()
            log.say(f"{run.folder} ended with code {code}: {lines[-1] if lines else ''}")
    missing = sum(finished(run, out) is None for run in todo)
    if missing:
        log.say(f"{missing} of the runs are not finished; the same command goes on.")
    return 1 if missing else 0


# --------------------------------------------------------------------------- printing, collecting
def dry(runs: list[Run], out: Path) -> None:
    """The commands of what is not finished."""
    todo = [run for run in runs if not finished(run, out)]
    broken = sum((out / run.folder / "metrics.jsonl").exists() for run in todo)
    print(f"# {len(runs)} runs: {len(runs) - len(todo)} finished, {broken} broken off")
    for run in todo:
        print(run.shown(out))


def results(experiment: Experiment, arguments: list[str]) -> tuple[Any, list[Finished]]:
    """The options of a command line and what is finished of its runs, for notebooks."""
    options = parse(experiment, arguments)
    return options, over(expand(experiment, options), options.out)


def over(runs: list[Run], out: Path) -> list[Finished]:
    """Those of the runs that are finished."""
    return [result for run in runs if (result := finished(run, out))]


def collect(experiment: Experiment, options: argparse.Namespace, runs: list[Run]) -> None:
    """Prints the table of what is finished, if anything; writes it and the figure into --out."""
    found = over(runs, options.out)
    if not found:
        return
    table = experiment.table(options, found)
    print(table)
    path = options.out / f"{experiment.name}-{options.scale}"
    path.with_suffix(".md").write_text(table + "\n")
    log.replace(path.with_suffix(".png"), figures.png(experiment.figure(options, found)))


def main(experiment: Experiment, arguments: list[str] | None = None) -> int:
    """A command line; returns the exit code."""
    if arguments is None:
        arguments = sys.argv[1:]
        jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
    try:
        options = parse(experiment, arguments)
        runs = expand(experiment, options)
        if options.dry_run:
            dry(runs, options.out)
            return 0
        code = 0 if options.collect else go(experiment, options, runs)
        collect(experiment, options, runs)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConfigError as error:
        print(f"experiments.{experiment.name}: {error}", file=sys.stderr)
        return 2
    return code
