"""What a run tells: `metrics.jsonl`, TensorBoard events and a progress bar.

`metrics.jsonl` holds the header in its first line and one event in each further line. An event is
written before the checkpoint of its step, so cutting the file back to the restored step gives the
log of a run that was never interrupted. What a resume changes (how often to evaluate, the machine,
the revision) is told in an event "resume"; the header stays that of the first start.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dst import hosts
from dst.errors import ConfigError
from dst.training.checkpoint import another_run

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "dst-jax")


class Log:
    """The open log of a run; made by `open_log`."""

    def __init__(self, file: TextIO, tensorboard: SummaryWriter):
        self._file, self._tensorboard = file, tensorboard

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line of JSON, flushed; scalars go to TensorBoard as `event/name`.

        Values: numbers, strings, small NumPy or JAX arrays, dicts and lists of these. NaN and
        infinity, which JSON has not, become null.
        """
        line = _plain({"event": event, "step": step, **values})
        print(_dumps(line), file=self._file, flush=True)
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(f"{event}/{name}", value, line["step"])
        self._tensorboard.flush()


@contextmanager
def no_log() -> Iterator[Log]:
    """A log that goes nowhere, for the processes that do not write."""
    with open(os.devnull, "w") as file, SummaryWriter(write_to_disk=False) as tensorboard:
        yield Log(file, tensorboard)


@contextmanager
def open_log(workdir: str | os.PathLike, header: Mapping[str, Any], step: int) -> Iterator[Log]:
    """The log in `workdir`, continued after `step`: later events are cut off, the header stays.

    Where this `header` is another, "resume" tells it. Before step 0 nothing stays, nor the header.
    Raises: `ConfigError` if the log there is of another config.
    """
    path = Path(workdir) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = refuse_another_run(workdir, header["config"])
    lines = _lines(path) if path.exists() else []
    # "end" is written after the last checkpoint, thus again by a run that restored it.
    kept = [
        line
        for line in lines[1:]
        if (e := _parse(line, "step", "event")) and e["step"] <= step and e["event"] != "end"
    ]
    known = None if old is None or step < 0 else headers(old, map(json.loads, kept))[-1]
    first = _dumps(_plain(header)) if known is None else lines[0]
    replace(path, "".join(f"{line}\n" for line in [first, *kept]).encode())
    purge = step + 1 if lines else None  # TensorBoard hides what an earlier run wrote from there on
    # The suffix, for tensorboardX names files by the second and overwrites those of the same.
    writer = SummaryWriter(
        str(path.parent / "tensorboard"), purge_step=purge, filename_suffix=f".{step}"
    )
    with open(path, "a", encoding="utf-8") as file, writer as tensorboard:
        out = Log(file, tensorboard)
        if known is not None and (changed := _changed(known, _plain(header))):
            out.write("resume", step, changed=changed)
            say(_sentence(workdir, known, changed))
        yield out


def headers(header: dict, events: Iterable[dict]) -> list[dict]:
    """The header of a log, and what it became with each resume that changed something."""
    found = [header]
    for event in events:
        if event["event"] == "resume":
            changed = event["changed"]
            config = {**found[-1]["config"], **changed.get("config", {})}
            found.append({**found[-1], **changed, "config": config})
    return found


def _changed(known: dict, now: dict) -> dict[str, Any]:
    """The part of a header that is another now; of the config the fields."""
    changed = {k: v for k, v in now.items() if k != "config" and v != known.get(k)}
    was = known["config"]
    config = {k: v for k, v in now["config"].items() if k not in was or v != was[k]}
    return {**changed, **({"config": config} if config else {})}


def _sentence(workdir: Any, known: dict, changed: dict) -> str:
    was = known["config"]
    fields = [f"{k} = {v!r} (was {was.get(k)!r})" for k, v in changed.get("config", {}).items()]
    others = [f"other {k}" for k in changed if k != "config"]
    return f"{workdir} goes on with {', '.join([*fields, *others])}."


def refuse_another_run(workdir: str | os.PathLike, config: Mapping[str, Any]) -> dict | None:
    """The header of the log in `workdir`, if there is one. Raises: one of another config."""
    path = Path(workdir) / "metrics.jsonl"
    lines = _lines(path) if path.exists() else []
    old = _parse(lines[0], "config") if lines else None
    difference = another_run(old["config"], config) if old else None
    if difference:
        field, was, now = difference
        raise ConfigError(
            f"{path} is the log of a run with {field} = {was!r}, but {field} is {now!r} now; "
            "choose another --workdir or the same settings."
        )
    return old


def read(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """The header and the events of a `metrics.jsonl`; a torn last line is left out."""
    header, *events = _lines(Path(path))
    return json.loads(header), [e for line in events if (e := _parse(line, "step", "event"))]


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The first line: config, versions, devices, git revision (null outside a checkout)."""
    device = jax.local_devices()[0]
    return {
        "config": dict(config),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpu_cores": os.cpu_count(),
        },
        "git_revision": _git_revision(),
    }


# Progress.


class Bar(tqdm):
    """tqdm on stderr; without a terminal a plain line every ten seconds. Made by `progress`."""

    monitor_interval = 0  # no thread

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar, or prints its line."""
        if self.fp.isatty():
            super().display(msg, pos)
        elif msg != "":  # which tqdm sends to erase the bar
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        """Leaves the bar, or a last line."""
        if not (self.disable or self.fp.isatty()):
            self.display()
        super().close()

    def show(self, step: int, **values: float) -> None:
        """Moves to `step`; `values` (loss, accuracy, sparsity, ...) stand behind the bar."""
        self.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in values.items()), refresh=False)
        self.update(step - self.n)


def progress(total: int | None, step: int, unit: str = "step") -> Bar:
    """A bar of `total` steps, or of another unit, that starts at `step`, with ETA."""
    tty = sys.stderr.isatty()
    form = unit + " {n_fmt}/{total_fmt} {elapsed}<{remaining} {rate_fmt}{postfix}"
    return Bar(
        total=total,
        initial=step,
        unit=f" {unit}s",
        file=sys.stderr,
        miniters=1,
        mininterval=0.2 if tty else 10,
        dynamic_ncols=tty,
        leave=tty,
        disable=not hosts.is_first(),
        bar_format="{percentage:3.0f}% |{bar}| " + form if tty else "{percentage:3.0f}% " + form,
    )


@contextmanager
def scoring() -> Iterator[Callable[[int, int | None], None]]:
    """`show(done, total)` moves a bar over the passes of pruning before training."""
    bars: list[Bar] = []

    def show(done: int, total: int | None) -> None:
        if not bars:
            bars.append(progress(total, 0, "scoring step"))
        bars[0].show(done)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


def say(sentence: str) -> None:
    """One line on stderr, above the bar if there is one; of several processes the first says it."""
    if hosts.is_first():
        (Bar.write if sys.stderr.isatty() else print)(sentence, file=sys.stderr)


# JSON, files, versions.


def _plain(value: Any) -> Any:
    """`value` of plain JSON types: arrays become lists, NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _parse(line: str, *fields: str) -> dict | None:
    """The JSON object of a line, None if it is torn or lacks one of `fields`."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and all(f in value for f in fields) else None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def replace(path: Path, content: bytes) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Commit of the checkout this file lies in, "+dirty" if the package was changed since."""

    def git(*args: str) -> str:
        # Without optional locks git only reads.
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        # In a virtual environment inside some other checkout the file is not tracked.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
