"""Data sets as uint8 arrays, a set a file, and the batch of a step as a pure function.

A data set knows nothing of models, methods or sparsity.
"""
