"""The products of sparse layers and the merges of a rewire, a backend a file.

`cpp.py` calls the C++ kernels in `native/`; what it does must agree with pure JAX bit for bit or to
rounding, as its tests say.
"""
