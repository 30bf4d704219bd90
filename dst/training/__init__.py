"""A run: config, data on the devices, the loop, checkpoints, log, export.

Nothing outside of this room needs it; a run of your own needs only `import dst`.
"""
