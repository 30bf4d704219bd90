"""The kinds of layers that can be sparse, a kind a file, each with its own mathematics.

A layer is static data and pure functions; nothing here knows of masks, arenas or methods.
"""
