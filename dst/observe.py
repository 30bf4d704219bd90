"""What the layers of any Linen model see: |h| and |delta| sums, and gradients on a subset S.

`nn.intercept_methods` wraps every sparse layer of an unmodified model. Each hands its
output through a `custom_vjp` identity that takes zero-valued probes, and what is wanted comes back
as the probes' cotangents: sums of |h| and |delta| for the marginals of Eq. 7, dL/dw for the
connections in S. Parameters are not differentiated, so no dense weight gradient ever exists.

Probes travel as a variable collection, not by closure: so `nn.remat` sees them as arguments, and a
layer that is called several times sums its calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from dst.connections.backends import cpp as kernels
from dst.connections.backends import maps
from dst.connections.backends.dispatch import covered
from dst.connections.fusion import plainly, region
from dst.errors import ConfigError
from dst.layers.base import Layer
from dst.network import is_foreign, layer_call, skipping

Array = jax.Array
Tree = Mapping[str, Any]

MARK = "called"  # the probe that tells a layer of the model from others of the same path


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_sums(total: Callable, h: Array, y: Array, f: Array, g: Array) -> Array:
    """y, unchanged; f's and g's cotangents are the units' sums of |h| and |delta| (Eq. 7).

    Shapes: f (channels,), g (n_out,).
    """
    return y


def total_of_maps(x: Array, dtype: Any) -> Array:
    """`Layer.sums` of maps in memory as the kernels have them: XLA would transpose them."""
    return maps.magnitudes(kernels.Read(x.reshape(-1, *x.shape[-3:]))).astype(dtype)


def delta_after(delta: Array, found: Array) -> Array:
    """delta on its way back, once `found` of it is there: else XLA may hold that of every layer."""
    return kernels.after(delta.reshape(-1, *delta.shape[-3:]), found).reshape(delta.shape)


def _sums_forward(total, h, y, f, g):
    return y, (total(h, f.dtype), jnp.zeros_like(g))


def _sums_backward(total, residual, delta):
    f, g = residual
    summed = total(delta, g.dtype)
    return None, delta_after(delta, summed) if total is total_of_maps else delta, f, summed


tap_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_subset(layer: Layer, h: Array, y: Array, c: Array, subset: Array) -> Array:
    """y, unchanged; the cotangent of c (|S_l|,) is dL/dw at the flat kernel positions `subset`."""
    return y


def _subset_forward(layer, h, y, c, subset):
    return y, (h, subset)


def _subset_backward(layer, residual, delta):
    h, subset = residual
    column, output = jnp.divmod(subset, layer.n_out)
    if covered(layer, delta, h):
        x = kernels.Read(layer.slices(layer.maps(h)))
        d = kernels.Read(delta.reshape(-1, *delta.shape[-3:]))
        G = kernels.convolve_gradient_on(column, output, x, d, layer)
        return None, delta_after(delta, G), G, None
    gradient = layer.gradient_at(*layer.by_unit(h, delta), column, output)
    return None, delta, gradient.astype(jnp.float32), None


tap_subset.defvjp(_subset_forward, _subset_backward)


def intercepted(layers: Mapping[str, Layer], tap: Callable[..., Array]):
    """A context in which the output y of each sparse layer is tap(layer, module, h, y).

    h and y have their units along the last axis.

    A layer of the same path that is applied to variables of its own has no probes: tap returns y.
    """

    def interceptor(next_fun, args, kwargs, context):
        call = layer_call(layers, args, kwargs, context)
        if call is None:
            return next_fun(*args, **kwargs)
        layer, h = call
        y = layer.units(next_fun(*args, **kwargs))
        return layer.outputs(tap(layer, context.module, layer.inputs(jnp.asarray(h)), y))

    return nn.intercept_methods(interceptor)


def nested(by_path: Mapping[str, Any]) -> Tree:
    """{'a/b': leaf} -> {'a': {'b': leaf}}, the form of a Linen variable collection."""
    return traverse_util.unflatten_dict(dict(by_path), sep="/")


def marginals(layers: Mapping[str, Layer], loss: Callable[[Tree], Array], dtype: Any = jnp.float32):
    """Sums of |h| (channels,) and |delta| (n_out,) of every layer: {path: (f, g)}, not normalised.

    `loss(collections)` runs the model with these extra variable collections.
    """
    return observe_and_sum({}, layers, loss, dtype=dtype)[1]


def gradient_on(layers: Mapping[str, Layer], loss: Callable[[Tree], Array], S: Mapping[str, Array]):
    """dL/dw on the subset: {path: flat kernel positions (|S_l|,)} -> {path: float32 (|S_l|,)}."""

    def tap(layer, module, h, y):
        if not module.has_variable("probes", "c"):
            return y
        c, subset = module.get_variable("probes", "c"), module.get_variable("subset", "S")
        mark = region if covered(layer, h, h) else plainly
        return mark(("tap", "subset"), functools.partial(tap_subset, layer), h, y, c, subset)

    subset = nested({path: {"S": positions} for path, positions in S.items()})

    def probed(probes):
        collection = nested({path: {"c": c} for path, c in probes.items()})
        with intercepted(layers, tap):
            return loss({"probes": collection, "subset": subset})

    return jax.grad(probed)({path: jnp.zeros(s.size, jnp.float32) for path, s in S.items()})


@jax.custom_vjp
def tap_both(h: Array, y: Array, h_probe: Array, y_probe: Array) -> Array:
    """y, unchanged; the cotangents of the probes, shaped as h and y, are h and delta."""
    return y


def _both_forward(h, y, h_probe, y_probe):
    return y, h


def _both_backward(h, delta):
    return None, delta, h, delta


tap_both.defvjp(_both_forward, _both_backward)


def observe(layers: Mapping[str, Layer], loss: Callable[[Tree], Array]):
    """h and delta of every layer, units first, its calls along the batch: {path: (h, delta)}.

    What `Layer.gradient_at` reads. Raises: a layer called on inputs of several sizes.
    """
    return observe_and_sum(layers, {}, loss)[0]


def observe_and_sum(
    held: Mapping[str, Layer],
    summed: Mapping[str, Layer],
    loss: Callable[[Tree], Array],
    reads_maps: bool = False,
    dtype: Any = jnp.float32,
):
    """In one pass h and delta of the layers `held`, as `observe`, and the `marginals` of others.

    What is summed is not kept: h and delta of all layers of ResNet-56 are 606 MB. `reads_maps` says
    that maps lie in memory as the kernels read them. `dtype` is that of the sums.
    """
    calls = layer_calls(held, loss) if held else {}
    seen = {path: 0 for path in held}

    def tap(layer, module, h, y):
        if not module.has_variable("probes", MARK):
            return y
        probe = module.get_variable("probes", MARK)
        if layer.path in summed:
            maps = reads_maps and covered(layer, h, h)
            run = functools.partial(tap_sums, total_of_maps if maps else layer.sums)
            mark = region if maps else plainly
            return mark(("tap", "sums"), run, h, y, probe["f"], probe["g"])
        refuse_mapped(layer.path, h)
        call, seen[layer.path] = seen[layer.path], seen[layer.path] + 1
        return tap_both(h, y, probe[str(call)]["h"], probe[str(call)]["y"])

    zeros = {
        path: {str(n): jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), s) for n, s in each}
        for path, each in ((path, list(enumerate(shapes))) for path, shapes in calls.items())
    }
    sums = {
        path: {"f": jnp.zeros(layer.channels, dtype), "g": jnp.zeros(layer.n_out, dtype)}
        for path, layer in summed.items()
    }

    def probed(probes):
        with intercepted({**held, **summed}, tap):
            return loss({"probes": nested({path: {MARK: p} for path, p in probes.items()})})

    cotangents = jax.grad(probed)({**zeros, **sums})
    units = {path: join_calls(layer, [*cotangents[path].values()]) for path, layer in held.items()}
    return units, {path: (cotangents[path]["f"], cotangents[path]["g"]) for path in summed}


def refuse_mapped(path: str, h: Array) -> None:
    """Raises, now or when it happens: a call under jax.vmap, which would add up h over examples."""

    @jax.custom_batching.custom_vmap
    def once(h: Array) -> Array:
        return h

    @once.def_vmap
    def mapped(axis_size, in_batched, h):
        raise ConfigError(
            f"layer {path!r} is called under jax.vmap, where a rewire does not see h and delta of "
            "each example, which this method needs; call apply on the whole batch."
        )

    once(lax.stop_gradient(h))


def join_calls(layer: Layer, calls: list[Tree]) -> tuple[Array, Array]:
    """h and delta of all calls, units first, joined along the batch; of no calls, zeros.

    Raises: inputs of two sizes, which nothing could join.
    """
    if not calls:
        return layer.never_called()
    h, delta = zip(*(layer.by_unit(call["h"], call["y"]) for call in calls), strict=True)
    if len({each.shape[2:] for each in h}) > 1:
        raise ConfigError(
            f"layer {layer.path!r} is called on inputs of several sizes; call it on one size, or "
            f"leave it dense with dense={layer.path!r}."
        )
    return (
        (h[0], delta[0]) if len(calls) == 1 else (jnp.concatenate(h, 1), jnp.concatenate(delta, 1))
    )


def layer_calls(layers: Mapping[str, Layer], loss: Callable[[Tree], Array]) -> dict[str, list]:
    """The shapes of h and y in every call of every layer, in call order; nothing is computed."""
    calls: dict[str, list] = {path: [] for path in layers}

    def another(module):  # in `init`, which takes no probes, the model's own have no kernel yet
        return is_foreign(module) and not module.has_variable("probes", MARK)

    def record(layer, module, h, y, call):
        h = jnp.asarray(h)
        shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
        calls[layer.path].append({"h": shape(layer.inputs(h)), "y": shape(layer.units(y))})

    with skipping(layers, record, another):
        jax.eval_shape(lambda: loss({"probes": nested({p: {MARK: jnp.zeros(0)} for p in layers})}))
    return calls
