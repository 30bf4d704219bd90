"""How the kernels are built, and what dst says where there are none or the wrong ones."""

import os
from pathlib import Path

import numpy as np
import pytest

from dst.connections.backends import cpp as kernels
from dst.connections.backends.native import library

built = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())


@pytest.fixture
def fresh():
    """Asks anew why there are no kernels, and forgets the answer."""
    kernels.why_not.cache_clear()
    yield kernels.why_not
    kernels.why_not.cache_clear()


def test_kernels_are_there_where_a_compiler_is():
    if library.compiler() is None or os.environ.get("DST_KERNELS") == "0":
        pytest.skip("no compiler, or turned off")
    assert kernels.why_not() == ""


def test_turned_off(fresh, monkeypatch):
    monkeypatch.setenv("DST_KERNELS", "0")
    assert fresh() == "the compiled kernels are turned off by DST_KERNELS=0"
    assert not kernels.available()
    with pytest.raises(RuntimeError, match="dst_gradient_on cannot run: the compiled kernels are"):
        kernels.gradient_on(np.int32([0]), np.int32([0]), np.ones((1, 1)), np.ones((1, 1)))


def test_not_built(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("DST_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "library", lambda: tmp_path / "none.so")
    assert fresh() == (
        "dst was installed without compiled kernels, for want of a working C++ compiler"
    )


@built
@pytest.mark.parametrize(
    "what, sentence",
    [
        ("source_hash", "are older than their sources; reinstall dst"),
        ("interface", "were built for another jaxlib; reinstall dst"),
    ],
)
def test_built_from_other_sources_or_headers(fresh, monkeypatch, what, sentence):
    monkeypatch.setattr(kernels, what, lambda: "another")
    assert fresh() == f"the compiled kernels {sentence}"


def test_neither_a_damaged_library_nor_a_foreign_one_is_used(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("DST_KERNELS", raising=False)
    damaged = tmp_path / "kernels.so"
    damaged.write_bytes(b"no library")
    foreign = Path(np._core._multiarray_umath.__file__)
    for path in (damaged, foreign):
        monkeypatch.setattr(kernels, "library", lambda path=path: path)
        kernels.why_not.cache_clear()
        assert fresh().startswith("the compiled kernels do not load (")


@built
def test_registered_again_they_still_work(fresh):
    assert fresh() == ""
    y = kernels.multiply(
        np.float32([2]), np.int32([1]), np.int32([0, 1]), np.float32([[5], [3]]), 1
    )
    assert y.item() == 6


# ------------------------------------------------------------------------------------- the building
@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_without_a_working_compiler_nothing_is_built(compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", compiler)
    library.library(tmp_path).write_bytes(b"an older one")
    assert library.build(tmp_path) is False
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert said.startswith("dst: installing without compiled kernels: ") and said.count("\n") == 1


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(library.HERE))
    import backend

    return backend


def test_the_build_needs_headers_where_it_compiles(backend, monkeypatch):
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda _: ["wheel"])
    monkeypatch.setattr(backend, "compiler", lambda: ["c++"])
    assert backend.get_requires_for_build_wheel() == ["wheel", "jaxlib>=0.10,<0.13"]
    monkeypatch.setattr(backend, "compiler", lambda: None)
    assert backend.get_requires_for_build_wheel() == ["wheel"]


def test_a_wheel_with_the_library_is_for_one_platform(backend, monkeypatch):
    asked = []
    monkeypatch.setattr(
        backend.build_meta, "build_wheel", lambda folder, settings, metadata: asked.append(settings)
    )
    for built in (True, False):
        monkeypatch.setattr(backend, "build", lambda built=built: built)
        backend.build_wheel("folder", {"--build-option": "-v"})
    assert asked[0]["--build-option"][0].startswith("--plat-name=")
    assert asked[0]["--build-option"][1:] == ["-v"]
    assert asked[1] == {"--build-option": "-v"}


def test_a_source_distribution_has_no_compiled_kernels(backend, monkeypatch, tmp_path):
    """Those of a checkout stand aside for that moment, whatever happens."""
    (tmp_path / "kernels-x86_64.so").touch()
    monkeypatch.setattr(backend, "HERE", tmp_path)

    def fail(folder, settings):
        assert not list(tmp_path.glob("*.so"))
        raise OSError("no space left")

    monkeypatch.setattr(backend.build_meta, "build_sdist", fail)
    with pytest.raises(OSError, match="no space"):
        backend.build_sdist("folder")
    assert [path.name for path in tmp_path.iterdir()] == ["kernels-x86_64.so"]
