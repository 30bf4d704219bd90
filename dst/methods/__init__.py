"""The rows of Table 1 and what they are made of: what drops, what grows, where S comes from.

`table.py` is the way in. Nothing here may ask which execution runs.
"""
