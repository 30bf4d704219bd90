"""Which connections exist, and what is computed on them: masks over dense arrays, or an arena.

Everything that differs between masked and truly sparse execution is in this room; whatever is
outside asks a connections object, never which execution it is.
"""
