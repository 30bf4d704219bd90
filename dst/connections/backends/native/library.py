"""Where the compiled kernels are, what they were built from, how they are built.

Imported by the build backend, where dst's own dependencies may be absent: standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
# The inner loops once for each instruction set; the library chooses when it is loaded.
INNER_LOOPS, ONCE = (
    ("kernels", "convolve", "maps"),
    ("handlers", "convolve_handlers", "maps_handlers", "structure", "best", "lowest", "arrivals"),
)
LEVELS = {"baseline": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4",)}


class NotBuilt(Exception):
    """Why the kernels could not be compiled, in one sentence."""


def library(folder: Path = HERE) -> Path:
    """The library's file, named after the machine: a shared folder may hold several machines'."""
    return folder / f"kernels-{platform.machine()}.so"


def source_hash() -> str:
    """SHA-256 of the C++ sources, which the library carries too."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cc"), *HERE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def headers() -> Path | None:
    """jaxlib's folder of XLA's headers, found without importing jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "include" / "xla" / "ffi" / "api" / "ffi.h").exists():
            return Path(folder) / "include"
    return None


def interface() -> str:
    """Version of XLA's FFI in the jaxlib that is installed, such as "0.3"."""
    include = headers()
    text = (include / "xla/ffi/api/c_api.h").read_text() if include else ""
    return ".".join(re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", text))


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, else the first of `COMPILERS` that exists."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def build(folder: Path = HERE) -> bool:
    """Compiles the kernels into `folder`; False, and one printed sentence, where it cannot be.

    Afterwards the folder holds this build's library for this machine or none.
    """
    try:
        _compile(library(folder))
    except (NotBuilt, OSError) as error:
        library(folder).unlink(missing_ok=True)
        print(f"dst: installing without compiled kernels: {error}.")
        return False
    return True


def _compile(target: Path) -> None:
    command, include = compiler(), headers()
    if command is None:
        raise NotBuilt("no C++ compiler was found (CXX, " + ", ".join(COMPILERS) + ")")
    if include is None:
        raise NotBuilt("jaxlib's headers were not found")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = Path(folder)
        levels = _levels(command)
        common = [*command, *FLAGS, "-isystem", str(include), f'-DDST_SOURCES="{source_hash()}"']
        common += ["-DDST_X86_LEVELS"] if len(levels) > 1 else []
        jobs = [
            [*common, *LEVELS[level], f"-DDST_LEVEL={level}", "-c", str(HERE / f"{name}.cc")]
            for level in levels
            for name in INNER_LOOPS
        ]
        jobs += [[*common, "-c", str(HERE / f"{name}.cc")] for name in ONCE]
        outputs = [str(objects / f"{i}.o") for i in range(len(jobs))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, [[*job, "-o", o] for job, o in zip(jobs, outputs, strict=True)]))
        linked = objects / target.name
        _run([*command, "-shared", "-pthread", *outputs, "-o", str(linked)])
        linked.replace(target)  # not over the file that a running process has mapped


def _levels(command: list[str]) -> list[str]:
    """All levels if this is x86-64 and the compiler knows them, else the baseline."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    try:
        for flags in LEVELS.values():
            _run([*command, *flags, "-x", "c++", "-E", os.devnull])
    except NotBuilt:
        return ["baseline"]
    return list(LEVELS)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise NotBuilt(f"{command[0]} failed ({said[0].strip()})")
