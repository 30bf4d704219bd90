"""Finds in an unmodified model what `fused.py` computes at once: the jaxpr, evaluated lazily.

The interceptor of `execution.py` runs a sparse convolution, and batch normalisation in train mode,
as a `region`, jitted and known by name. The model is traced once, and its equations evaluated
one after the other; what is not recognised simply runs, a region too: its body is the plain
operation. What is recognised may stay lazy:

    equation                           reads               gives
    convolution that only a norm       map or Pair(relu)   the norm's Pair: one kernel for both
    reads, with a bias or without
    nn.relu                            Pair                Pair(relu): nothing is computed
    addition of a map                  Pair                Sum, if only nn.relu reads it
    nn.relu                            Sum                 map: one kernel, `joined`
    2x2 max-pooling                    Pair(relu), or map  map: one kernel, `pooled`
                                       that nn.relu gave
    anything else                      Pair                computes u first: `materialised`

Under nn.remat, in evaluation and wherever no trace is being made, nothing is recognised.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dst.connections.arena import Arena
from dst.connections.backends.cpp import Read
from dst.connections.fused import How, convolution_norm, joined, materialised, pooled

Array = jax.Array


KNOWN: dict[str, tuple] = {}  # what each name of a region stands for
PLAIN = (bool, int, float, complex, str, bytes, np.generic)


class Opaque(Exception):
    """A model returns an object that is no pytree, which may hold arrays that nobody sees."""


def plainly(what: tuple, body: Callable, *args: Any) -> Any:
    """body(*args), where nothing is to be recognised."""
    return body(*args)


def region(what: tuple, body: Callable, *args: Any) -> Any:
    """body(*args) as an equation of its own that is recognised as `what`.

    ("convolution", part, frozen) reads values, column, pointer, x; ("bias",) y, bias; ("norm",
    epsilon) x, scale, bias; ("tap", kind) h, y and probes, and gives y.
    """

    def named(*args):
        return body(*args)

    # The same in every process, for JAX's compilation cache.
    named.__name__ = f"dst_{what[0]}_{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
    KNOWN[named.__name__] = what
    return jax.jit(named)(*args)


@dataclasses.dataclass
class Pair:
    """u = k[0] y + k[1], or relu(u), that nobody has computed: see `dst.connections.fused`."""

    y: Array
    k: Array
    relu: bool = False
    map: Array | None = None

    def array(self) -> Array:
        if self.map is None:
            self.map = materialised(self.relu, self.y, self.k)
        return self.map


@dataclasses.dataclass
class Sum:
    """u + r, which nn.relu reads next."""

    pair: Pair
    r: Array


@dataclasses.dataclass
class Copies:
    """A map, once for each of its readers."""

    left: list[Array]

    def array(self) -> Array:
        return self.left.pop() if len(self.left) > 1 else self.left[0]


def fused(call: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """call(*args), a pytree, and how many convolutions were fused. `call` is traced once.

    Raises: Opaque.
    """
    leaves, tree = jax.tree.flatten(args)
    varying = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    rest: list[Any] = []  # what call gives beside arrays

    def traced(*arrays):
        given = iter(arrays)
        all_args = [next(given) if v else leaf for v, leaf in zip(varying, leaves, strict=True)]
        found, out_tree = jax.tree.flatten(call(*jax.tree.unflatten(tree, all_args)))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in found]
        if not all(a or isinstance(leaf, PLAIN) for a, leaf in zip(is_array, found, strict=True)):
            raise Opaque
        rest[:] = [out_tree, is_array, found]
        return [leaf for leaf, array in zip(found, is_array, strict=True) if array]

    arrays = [leaf for leaf, v in zip(leaves, varying, strict=True) if v]
    closed = jax.make_jaxpr(traced)(*arrays)
    evaluation = Evaluation(closed.jaxpr)
    results = iter(evaluation.run([*closed.consts, *arrays]))
    out_tree, is_array, found = rest
    out = [next(results) if array else leaf for leaf, array in zip(found, is_array, strict=True)]
    return jax.tree.unflatten(out_tree, out), evaluation.count


class Evaluation:
    """The equations of a jaxpr with values that may be lazy."""

    def __init__(self, jaxpr: core.Jaxpr):
        self.jaxpr, self.count = jaxpr, 0
        self.values: dict[Any, Any] = {}
        self.makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.readers: dict[Any, list] = {}
        for eqn in jaxpr.eqns:
            for v in eqn.invars:
                if not isinstance(v, core.Literal):
                    self.readers.setdefault(v, []).append(eqn)
        self.results = Counter(v for v in jaxpr.outvars if not isinstance(v, core.Literal))
        self.pending: dict[int, list] = {}  # what a convolution gave for the equations behind it

    def run(self, args: Sequence[Array]) -> list[Array]:
        """The results."""
        self.values |= zip([*self.jaxpr.constvars, *self.jaxpr.invars], args, strict=True)
        for eqn in self.jaxpr.eqns:
            found = self.lazily(eqn)
            if found is None:
                found = self.plainly(eqn)
            self.values |= zip(eqn.outvars, found, strict=True)
        return [self.array(v) for v in self.jaxpr.outvars]

    def read(self, v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else self.values[v]

    def array(self, v: Any) -> Array:
        value = self.read(v)
        return value.array() if isinstance(value, Pair | Copies) else value

    def only_reader(self, v: Any) -> Any:
        """The one equation that reads this, if there is no more than one."""
        readers = self.readers.get(v, [])
        return readers[0] if len(readers) == 1 and not self.results[v] else None

    def known(self, v: Any) -> bool:
        """Whether there is a value yet."""
        return isinstance(v, core.Literal) or v in self.values

    def plainly(self, eqn: Any) -> list[Array]:
        """Its results, as if nothing were lazy."""
        inputs, run = alone(self.jaxpr, eqn)
        return run(*map(self.array, inputs))

    def lazily(self, eqn: Any) -> list[Any] | None:
        """Its results, of which some may be lazy; None if it is not one of the table above."""
        if what(eqn)[0] == "convolution":
            return self.convolution(eqn)
        if id(eqn) in self.pending:
            return self.pending.pop(id(eqn))
        values = [self.read(v) for v in eqn.invars]
        first = values[0] if values else None
        if isinstance(first, Sum):
            return self.joined(eqn, first)
        if isinstance(first, Pair) and not first.relu and is_relu(self.jaxpr, eqn):
            return [Pair(first.y, first.k, relu=True)]
        if is_pooling(eqn):
            return self.pooled(eqn, first)
        if eqn.primitive.name in ("add", "add_any"):
            return self.addition(eqn, values)
        return None

    def joined(self, eqn: Any, sum: Sum) -> list[Any]:
        """relu(u + r); of two readers each has its own."""
        v = eqn.outvars[0]
        readers = [reader for reader in self.readers.get(v, ()) if what(reader)[0] != "tap"]
        two = len(readers) + self.results[v] == 2
        z = joined(2 if two else 1, sum.pair.y, sum.pair.k, sum.r)
        return [Copies([*z])] if two else [z[0]]

    def pooled(self, eqn: Any, first: Any) -> list[Any] | None:
        """2x2 max-pooling of a ReLU's output, lazy or not."""
        if isinstance(first, Pair) and first.relu:
            return [pooled(first.y, first.k)]
        maker = self.makers.get(eqn.invars[0])
        if maker is None or not is_relu(self.jaxpr, maker):
            return None
        channels = eqn.outvars[0].aval.shape[3]
        same = jnp.stack([jnp.ones(channels), jnp.zeros(channels)])
        return [pooled(self.array(eqn.invars[0]), same)]

    def chain(self, eqn: Any) -> dict[str, Any]:
        """The regions that follow a convolution, each its only reader: bias, tap, norm."""
        found: dict[str, Any] = {}
        for name, place in (("bias", 0), ("tap", 1), ("norm", 0)):
            reader = self.only_reader(eqn.outvars[0])
            if reader and what(reader)[0] == name and reader.invars[place] is eqn.outvars[0]:
                found[name] = eqn = reader
        return found

    def convolution(self, eqn: Any) -> list[Any] | None:
        """A convolution, and the batch normalisation that reads it, if nothing else does.

        A bias between them changes nothing but the mean.
        """
        chain, first = self.chain(eqn), {"bias": 1, "tap": 2, "norm": 1}
        others = {name: one.invars[first[name] :] for name, one in chain.items()}
        if "norm" not in chain or not all(self.known(v) for vs in others.values() for v in vs):
            return None
        read = {name: [*map(self.array, vs)] for name, vs in others.items()}
        _, part, frozen = what(eqn)
        values, column, pointer, x = eqn.invars
        source = self.read(x)
        lazy = isinstance(source, Pair) and source.relu and source.map is None
        tap = what(chain["tap"])[1] if "tap" in chain else ""
        found = convolution_norm(
            How(part, what(chain["norm"])[1], frozen, tap),
            self.array(values),
            Arena(self.array(column), self.array(pointer), ()),
            Read(source.y, source.k) if lazy else Read(self.array(x)),
            *read["norm"],
            tuple(read.get("tap", ())),
        )
        mean = found.mean + read["bias"][0] if "bias" in read else found.mean
        self.count += 1
        self.pending |= {id(one): [None] for one in chain.values()}
        self.pending[id(chain["norm"])] = [Pair(found.y, found.k), mean, found.variance]
        return [None] if frozen else [None, found.values]

    def addition(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        """The sum of a pair and a map, if nn.relu reads it and nothing else."""
        relu = self.only_reader(eqn.outvars[0])
        same = len({v.aval.shape for v in eqn.invars}) == 1
        if relu is None or not same or not is_relu(self.jaxpr, relu):
            return None
        for mine, other in ((0, 1), (1, 0)):
            pair = values[mine]
            if isinstance(pair, Pair) and not pair.relu and pair.map is None:
                return [Sum(pair, self.array(eqn.invars[other]))]
        return None


def alone(jaxpr: core.Jaxpr, eqn: Any) -> tuple[list[Any], Callable[..., list[Array]]]:
    """What an equation reads, and a function of that which gives its results."""
    inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
    one = jaxpr.replace(
        constvars=[],
        invars=inputs,
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return inputs, core.jaxpr_as_fun(core.ClosedJaxpr(one, []))


# ------------------------------------------------------------------------------ what is recognised
def what(eqn: Any) -> tuple:
    """What a region is, and its settings; ("",) if this is another equation."""
    return KNOWN.get(eqn.params.get("name", ""), ("",))


def is_relu(jaxpr: core.Jaxpr, eqn: Any) -> bool:
    """Whether this is nn.relu, with its own derivative: jnp.maximum(x, 0) has another one at 0."""
    if eqn.primitive.name != "custom_jvp_call" or len(eqn.invars) != 1:
        return False
    aval = eqn.invars[0].aval
    if eqn.outvars[0].aval.shape != aval.shape or aval.dtype != np.float32:
        return False
    _, run = alone(jaxpr, eqn)
    return _derivative(lambda x: run(x)[0], aval) == _derivative_of_relu(aval.shape)


@functools.cache
def _derivative_of_relu(shape: tuple[int, ...]) -> str:
    return _derivative(nn.relu, jax.ShapeDtypeStruct(shape, np.float32))


def _derivative(f: Callable, aval: Any) -> str:
    """Value and derivative of f as a program's text."""
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return str(jax.make_jaxpr(lambda x, t: jax.jvp(f, (x,), (t,)))(shape, shape))


def is_pooling(eqn: Any) -> bool:
    """Whether this is max-pooling of 2x2 windows side by side that cover the map."""
    if eqn.primitive.name != "reduce_window_max":
        return False
    p = eqn.params
    aval = eqn.invars[0].aval
    sides = aval.shape[1:3]
    return (
        aval.ndim == 4
        and aval.dtype == np.float32
        and tuple(p["window_dimensions"]) == tuple(p["window_strides"]) == (1, 2, 2, 1)
        and not np.any(p["padding"])
        and {*p["base_dilation"], *p["window_dilation"]} == {1}
        and not any(side % 2 for side in sides)
    )
