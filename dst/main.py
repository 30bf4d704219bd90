"""Trains a sparse network:

  python -m dst.main --config=configs/digits_mlp.py [--workdir=DIR] [--config.FIELD=VALUE ...]

  --config        a file of configs/ or your own; its first lines say what to expect
  --config.FIELD  overrides a field, as in --config.sparsity=0.95; dst/config.py lists them all
  --workdir       logs and checkpoints, by default runs/<name of the config file>; the same
                  command again resumes the run in it

Exit code: 0 finished, or saved and stopped by SIGTERM or Ctrl-C; 1 had to stop; 2 bad input.
"""

import re
import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from dst.config import ConfigError, check_field, check_name, load, validate
from dst.methods import resolve


def parse(argv: list[str]) -> tuple[ConfigDict, Path]:
    """Command line (program name first) to (valid config, writable folder), or `ConfigError`."""
    values = flags.FlagValues()  # not absl's global ones, which hold twenty flags of its own
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        rest = values(argv, known_only=True)
        path, config = values.config, load(values.config)
        for name in re.findall(r"^--?(?:no)?config\.([^=\n]*)", "\n".join(rest), re.MULTILINE):
            check_name(name)  # config_flags would raise from deep inside
        del values.config
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        stray = values(rest)[1:]
    except flags.IllegalFlagValueError as error:  # text where a number must be
        check_field(*re.findall(r"^flag --config\.(\w+)=(.*?): ", str(error), re.DOTALL)[0])
        raise
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if stray:
        raise ConfigError(f"There must be nothing but flags (--name=value), not {stray[0]!r}.")
    validate(config)
    workdir = Path(values.workdir or f"runs/{Path(path).stem}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(f"Cannot write into --workdir={workdir}: {error.strerror}.") from error
    return resolve(config), workdir


def main(argv: list[str]) -> int:
    """Runs a command line (program name first); returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, workdir = parse(argv)
        from dst.loop import Stopped  # takes seconds: not before the flags are right
        from dst.train import train  # takes seconds: not before the flags are right

        try:
            train(config, workdir)
        except Stopped as error:
            return complain(error, 1)
    except ConfigError as error:
        return complain(error, 2)
    return 0


def complain(error: Exception, code: int) -> int:
    """Prints the sentence; returns the exit code."""
    print(f"dst: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
