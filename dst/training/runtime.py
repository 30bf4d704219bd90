"""What `python -m dst.main` sets in its process before JAX computes anything: `prepare`."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import jax

# Options of glibc's mallopt (malloc.h), and of madvise.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX, MADV_HUGEPAGE = -1, -4, -8, 14
HEAP = 2**32  # bytes of addresses with huge pages; a page takes memory once it is written
HUGE_PAGE = 2**21


def prepare(workdir: Path) -> None:
    """Keeps freed memory in the process, unless DST_KEEP_MEMORY=0, and programs in `workdir`."""
    if os.environ.get("DST_KEEP_MEMORY") != "0":
        keep_memory()
    keep_programs(workdir / "compiled")


def keep_memory() -> bool:
    """Lets glibc's malloc keep what is freed, in one heap of huge pages; False without glibc.

    XLA gives all temporaries of a step back to malloc, which would give the larger ones back to the
    system: 31,000 page faults a step of VGG-16. Threads that run already keep their own arenas.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
        libc.mallopt(option, value)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(HEAP)
    if block:  # where addresses are limited the heap grows in small pages
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(start, (block + HEAP - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(block)
    return True


def keep_programs(folder: Path) -> None:
    """JAX's persistent compilation cache in `folder`, where the user has not set another one.

    A resumed run then loads its programs instead of compiling them.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
