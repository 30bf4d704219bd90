"""What the fields of a `Method` are called in a config, where all of a run is named."""

# Config fields that a method may have its own value of: the field of `Method`.
OWN = {
    "initial_sparsity": "initial",
    "distribution": "distribution",
    "grasp_temperature": "temperature",
    "synflow_rounds": "iterations",
    "heuristic": "heuristic",
    "drop_fraction": "drop_fraction",
    "rewire_every": "every",
    "subset_ratio": "subset_ratio",
    "sampling_rounds": "rounds",
}
# All config fields that a method reads, beside the schedule, which is the run's.
FIELDS = {
    **{field: name for field, name in OWN.items() if name != "every"},
    "init_gain": "gain",
    "sparsity_of": "sparsity_of",
    "keep_counts": "keep_counts",
    "growth_memory": "growth_memory",
    "layer_floor": "floor",
    "track_explored": "explored",
}
# For whoever takes one name for the other; the end is an epoch in a config, a step in a method.
CALLED = {**OWN, **FIELDS, "rewire_end_epoch": "end"}
IN_CONFIG = {name: field for field, name in CALLED.items()}
