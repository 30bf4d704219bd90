"""Four virtual CPU devices and strict broadcasting, set before JAX starts its backend."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
