"""The kinds of layers that can be sparse, a kind a file, each with its own mathematics.

A layer is static data and pure functions; nothing here knows of masks, arenas or methods.
"""

from dst.layers.base import KINDS, Layer, kind_of, register
from dst.layers.conv import Conv
from dst.layers.dense import Dense

__all__ = ["KINDS", "Conv", "Dense", "Layer", "kind_of", "register"]
