"""Trains a sparse network:

  python -m dst.main --config=configs/digits_mlp.py [--workdir=DIR] [--config.FIELD=VALUE ...]

  --config        a file of configs/ or your own; its first lines say what to expect
  --config.FIELD  overrides a field, as in --config.sparsity=0.95; dst/config.py lists them all
  --workdir       logs, checkpoints, at the end network.npz (a file of dst.export); by default
                  runs/<name of the config file>; the same command again resumes the run in it;
                  DIR/compiled holds what JAX compiled (or JAX_COMPILATION_CACHE_DIR)

Memory that a step frees is kept for the next one, on Linux: steps of convolutional networks take
up to half the time, and the process grows larger. DST_KEEP_MEMORY=0 gives it back to the system.

One run on several hosts, started in each of them, with a --workdir that all of them see:
  --coordinator=HOST:PORT --processes=N --process=I   the address of process 0; I from 0 to N - 1
  --distributed                                       instead, where JAX recognises the cluster

Exit code: 0 finished, or saved and stopped (SIGTERM, Ctrl-C); 1 failed; 2 bad input; 130 cut off.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from dst.config import check_field, check_name, load, validate
from dst.errors import ConfigError
from dst.methods.settings import resolve
from dst.training import launch, runtime


def parse(argv: list[str]) -> tuple[ConfigDict, Path, launch.Place | None]:
    """Command line (program name first) to (valid config, folder of the run, place of this process
    among several), or `ConfigError`."""
    values = flags.FlagValues()  # not absl's global ones, which hold twenty flags of its own
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    launch.define(values)
    try:
        rest = values(argv, known_only=True)
        path, config = values.config, load(values.config)
        for name in re.findall(r"^--?(?:no)?config\.([^=\n]*)", "\n".join(rest), re.MULTILINE):
            check_name(name)  # config_flags would raise from deep inside
        del values.config
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        stray = values(rest)[1:]
    except flags.IllegalFlagValueError as error:  # text where a number must be
        for found in re.findall(r"^flag --config\.(\w+)=(.*?): ", str(error), re.DOTALL):
            check_field(*found)
        raise ConfigError(f"{error}.") from error
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if stray:
        raise ConfigError(f"There must be nothing but flags (--name=value), not {stray[0]!r}.")
    validate(config)
    place = launch.place(values)
    return resolve(config), Path(values.workdir or f"runs/{Path(path).stem}"), place


@contextlib.contextmanager
def writable(workdir: Path) -> Iterator[None]:
    """A block in which the folder exists; what it made goes, if empty, where the input is refused.

    Raises: ConfigError if nothing can be written there.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(f"Cannot write into --workdir={workdir}: {error.strerror}.") from error
    try:
        yield
    except ConfigError:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def main(argv: list[str], prepare: Callable[[Path], None] = lambda workdir: None) -> int:
    """Runs a command line (program name first); returns the exit code.

    `prepare(workdir)` is called before the training, once the flags are right.
    """
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, workdir, place = parse(argv)
        with writable(workdir):
            prepare(workdir)
            from dst.training.loop import Stopped  # takes seconds: not before the flags are right
            from dst.training.train import train  # takes seconds: not before the flags are right

            with launch.joined(place):
                try:
                    train(config, workdir)
                except Stopped as error:
                    return complain(error, 1)
    except ConfigError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on from its last checkpoint.", 130)
    return 0


def complain(error: Exception | str, code: int) -> int:
    """Prints the sentence; returns the exit code."""
    print(f"dst: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv, runtime.prepare))
