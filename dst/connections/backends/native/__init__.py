"""The C++ kernels: their sources, how they are compiled, and the compiled library."""
