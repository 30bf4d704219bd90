"""The build backend (PEP 517): setuptools, after an attempt to compile the kernels.

Without a C++ compiler, or where compilation fails, dst is installed without them.
"""

from __future__ import annotations

import shlex
import sysconfig
import tomllib
from typing import Any

from library import HERE, build, compiler
from setuptools import build_meta

ROOT = HERE.parents[3]


def __getattr__(name: str) -> Any:
    """All hooks that are not defined here are setuptools'."""
    return getattr(build_meta, name)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _headers()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _headers()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    # setuptools packs whatever an earlier build left there.
    for old in ROOT.glob("build/lib*/dst/connections/backends/native/*.so"):
        old.unlink()
    settings = dict(config_settings or {})
    if build():
        given = settings.get("--build-option", [])
        given = shlex.split(given) if isinstance(given, str) else list(given)
        # The library needs this platform, but no particular Python.
        settings["--build-option"] = [f"--plat-name={_platform()}", *given]
    return build_meta.build_wheel(wheel_directory, settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None) -> str:
    # Every machine compiles its own; setuptools takes what is there, as for a wheel.
    aside = []
    try:
        for path in HERE.glob("*.so"):
            aside.append((path.rename(path.with_suffix(".aside")), path))
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        for other, path in aside:
            other.rename(path)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    build()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _headers() -> list[str]:
    """jaxlib has XLA's headers: as a requirement with jax's own bounds."""
    if compiler() is None:
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [f"jaxlib{name[3:]}" for name in project["dependencies"] if name.startswith("jax>")]


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
