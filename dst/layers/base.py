"""What a layer is to `dst`: static data about a kernel, and the mathematics of its product.

A layer gives y = apply(h, kernel) + b, linear in the kernel, the units of h and y along their last
axes. A kind of layers is a subclass: it says which module it stands for, describes a call of it,
and has the product. All else has general defaults, right for any such kind, though by way of the
kernel's whole gradient; `dense.py` and `conv.py` do better.

Where a module has its units elsewhere (`nn.DenseGeneral`) or lacks an axis (a convolution over
sequences), `inputs`, `units` and `outputs` lead to that form and back. Everything else in `dst`
sees the form, in which the kernel has the shape `dims`.

h and delta = dL/dy by unit are (n_in, ...) and (n_out, ...), the batch next: what gradients are
computed from where all calls of a layer are held.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dst.errors import ConfigError

Array = jax.Array

# Products of one chunk of candidates: 2^20 float32 (4 MiB) keeps them in cache, whatever |S| is.
CHUNK_ELEMENTS = 2**20


@dataclasses.dataclass(frozen=True)
class Layer:
    """A sparse kernel of a model: the protocol, and its defaults."""

    path: str  # 'a/b' for params['a']['b']['kernel']
    shape: tuple[int, ...]  # of the parameter
    precision: Any = None  # the module's, see `jax.lax.Precision`

    module_type: ClassVar[type[nn.Module]]  # whose calls are such layers, subclasses' too
    matrix: ClassVar[bool] = False  # y = h @ kernel: multiplied without its dense kernel, in blocks
    convolves: ClassVar[bool] = False  # compiled kernels compute it from `slices` and `taps`
    large: ClassVar[bool] = True  # h and delta of all calls are too large to hold, if it can be
    plural: ClassVar[str] = ""  # how the log calls them

    # ---------------------------------------------------------------------- what a kind must have
    @classmethod
    def describe(cls, path: str, module: Any, h: Any) -> Layer:
        """The layer that this call of a module is, of an input h as array or shape."""
        raise NotImplementedError(f"{cls.__name__} needs describe(path, module, h)")

    def apply(self, h: Array, kernel: Array) -> Array:
        """y without the bias: (..., n_in), `dims` -> (..., n_out)."""
        raise NotImplementedError(f"{type(self).__name__} needs apply(h, kernel)")

    # ------------------------------------------------------------------------------- of a module
    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Why the product of this module is another; None if it is `apply`, plus the bias."""
        return None

    def init(self, module: Any, call: Callable[[], Any]) -> None:
        """Makes the parameters of a module without those of its kernel; `call` would make all.

        A kernel that is made is left out of the program, as nothing reads it.
        """
        call()

    def inputs(self, h: Array) -> Array:
        """h as a module gets it, with its units along the last axis."""
        return h

    def units(self, y: Array) -> Array:
        """y as a module gives it, with its units along the last axis."""
        return y

    def outputs(self, y: Array) -> Array:
        """The inverse of `units`."""
        return y

    # --------------------------------------------------------------------------------- its numbers
    @property
    def dims(self) -> tuple[int, ...]:
        """The kernel's shape as (..., n_in, n_out)."""
        return self.shape

    @property
    def n_in(self) -> int:
        """Inputs of an output, of a convolution at each place of its window."""
        return self.dims[-2]

    @property
    def n_out(self) -> int:
        return self.dims[-1]

    @property
    def channels(self) -> int:
        """Units of h: more than n_in where outputs read groups of them."""
        return self.n_in

    @property
    def columns(self) -> int:
        """Weights of one output: inputs, of a convolution (kx, ky, n_in) flattened."""
        return self.size // self.n_out

    @property
    def size(self) -> int:
        """Possible connections."""
        return math.prod(self.shape)

    @property
    def places(self) -> tuple[int, int]:
        """(kx, ky): the kernel is this many matrices (n_in, n_out)."""
        return 1, math.prod(self.dims[:-2])

    # ------------------------------------------------------------------------------------- forward
    def output(self, h: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        """Shape and type of y, computed in `dtype`, of an input h as array or shape."""
        like = lambda shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        return like(jax.eval_shape(self.apply, like(h.shape), like(self.dims)).shape)

    def apply_fast(self, h: Array, kernel: Array) -> Array:
        """`apply` in the way that suits this backend best."""
        return self.apply(h, kernel)

    def maps(self, h: Array) -> Array:
        """Maps, or rows, of a batch: (..., sides, n) -> (B, sides, n)."""
        return h.reshape(-1, *h.shape[1 - len(self.dims) :])

    def slices(self, x: Array) -> Array:
        """Maps (N, H, W, C) that a kernel of rows and columns reads, of (B, sides, n)."""
        return x

    def output_sides(self, sides: tuple[int, ...]) -> list[int]:
        """H', W' of a convolution on maps of H, W."""
        raise NotImplementedError

    def taps(self, sides: tuple[int, ...]) -> list[int]:
        """What compiled kernels ask for, of maps of H, W, two numbers each but for the first.

        Slices and groups of channels, kernel, strides, rows and columns of zeros before a map,
        dilations.
        """
        raise NotImplementedError

    # --------------------------------------------------------------------------- of h and delta
    def sums(self, x: Array, dtype: Any) -> Array:
        """The sum of |x| of each unit, x being h or delta: (..., n) -> (n,)."""
        return jnp.sum(jnp.abs(x), axis=tuple(range(x.ndim - 1)), dtype=dtype)

    def by_unit(self, h: Array, delta: Array) -> tuple[Array, Array]:
        """h and delta of a call, units first, the batch next."""
        return jnp.moveaxis(h, -1, 0), jnp.moveaxis(delta, -1, 0)

    def never_called(self) -> tuple[Array, Array]:
        """h and delta by unit of a layer that is never called."""
        return jnp.zeros((self.channels, 0)), jnp.zeros((self.n_out, 0))

    def paired(self, f: Array, g: Array) -> tuple[Array, Array]:
        """f over the units of h, g over those of y, as marginals of the pairs that the kernel has.

        Shapes: (channels,), or (places channels,) if f tells places apart, (n_out,) -> (n_in,) or
        (columns,), (n_out,).
        """
        return f, g

    # ------------------------------------------------------------------- from h and delta by unit
    def kernel_gradient(self, h: Array, delta: Array) -> Array:
        """dL/dw of the whole kernel, at least float32: `dims`."""
        dtype = jnp.promote_types(h.dtype, jnp.float32)
        if not h.size:
            return jnp.zeros(self.dims, dtype)
        h, delta = (jnp.moveaxis(a, 0, -1).astype(dtype) for a in (h, delta))
        y, pull = jax.vjp(lambda kernel: self.apply(h, kernel), jnp.zeros(self.dims, dtype))
        return pull(delta.astype(y.dtype))[0]

    def gradient_at(self, h: Array, delta: Array, column: Array, output: Array) -> Array:
        """dL/dw of the connections (column, output); column is (places, n_in) flattened.

        Shapes: int32 (n,), (n,) -> float (n,), at least float32.
        """
        return self.kernel_gradient(h, delta).reshape(-1, self.n_out)[column, output]

    def gradient_block(
        self, h: Array, delta: Array, corner: Sequence[Array], size: tuple[int, int]
    ) -> Array:
        """dL/dw of a block, corner (kx, ky, i, o) int32: (inputs, outputs), at least float32."""
        dense = self.kernel_gradient(h, delta).reshape(*self.places, self.n_in, self.n_out)
        return lax.dynamic_slice(dense, corner, (1, 1, *size)).reshape(size)

    def signed_sums(self, h: Array, delta: Array, sign: Array) -> tuple[Array, Array]:
        """f, g of GraEst for signs r: sum_r r h over what each column reads, sum_r r delta.

        Shapes: sign as delta without its first axis -> (places channels,), (n_out,), at least
        float32.
        """
        # What the columns of output 0 read, those of all outputs read.
        f = self.kernel_gradient(h, jnp.zeros_like(delta).at[0].set(sign.astype(delta.dtype)))
        return f.reshape(-1, self.n_out)[:, 0], signed_total(delta, sign)


def init_bias(module: Any, shape: tuple[int, ...]) -> None:
    """The bias of a module of Flax, drawn as if there had been a kernel."""
    scope = module.scope

    def flat(rng: Array, shape: tuple[int, ...], dtype: Any) -> Any:  # as `nn.DenseGeneral` draws
        drawn = module.bias_init(rng, (math.prod(shape),), dtype)
        if isinstance(drawn, nn.meta.AxisMetadata):
            return nn.meta.replace_boxed(drawn, drawn.unbox().reshape(shape))
        return drawn.reshape(shape)

    if module.use_bias and not scope.has_variable("params", "bias"):
        scope.make_rng("params")  # the kernel's
        scope.param("bias", flat, shape, module.param_dtype)


def signed_total(a: Array, sign: Array) -> Array:
    """sum_r r a of each unit, at least float32: (n, ...), (...) -> (n,)."""
    rows, dtype = a.reshape(a.shape[0], -1), jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(rows, sign.ravel().astype(a.dtype), preferred_element_type=dtype)


def block_product(h: Array, delta: Array) -> Array:
    """sum_r h[i, r] delta[o, r], r all other axes; one product, at least float32."""
    h, delta = (a.reshape(a.shape[0], -1) for a in (h, delta))
    dtype = jnp.result_type(h, delta, jnp.float32)
    return jnp.matmul(h, delta.T, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def chunk_size(elements: int, candidates: int) -> int:
    """How many candidates of so many products each are computed at once."""
    return max(1, min(candidates, CHUNK_ELEMENTS // elements))


# ------------------------------------------------------------------------------------ the registry
KINDS: list[type[Layer]] = []  # what `dst.network` finds; `register` adds one

Kind = TypeVar("Kind", bound=type[Layer])


def register(kind: Kind) -> Kind:
    """Makes `dst.network` find layers of this kind; a decorator, too.

    Raises: ConfigError for a kind that lacks what the protocol asks for, or whose module has one.
    """
    if not (isinstance(kind, type) and issubclass(kind, Layer)):
        raise ConfigError(f"{kind!r} is no kind of layers; allowed are subclasses of Layer.")
    cls, name = getattr(kind, "module_type", None), kind.__name__
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"{name}.module_type is {cls!r}; allowed are subclasses of nn.Module.")
    own = lambda cls, function: inspect.getattr_static(cls, function)  # noqa: E731
    if missing := [f for f in ("describe", "apply") if own(kind, f) is own(Layer, f)]:
        raise ConfigError(f"{name} has no {' and no '.join(missing)} of its own.")
    if cls in (taken := {other.module_type: other.__name__ for other in KINDS}):
        raise ConfigError(
            f"{name} is for {name_of(cls)}, which {taken[cls]} is registered for; a subclass of "
            "the module may have a kind of its own."
        )
    KINDS.append(kind)
    return kind


def kind_of(module: Any) -> type[Layer] | None:
    """The kind whose module is the class of this one, or the closest of its base classes."""
    kinds = {kind.module_type: kind for kind in KINDS}
    return next((kinds[cls] for cls in type(module).__mro__ if cls in kinds), None)


def name_of(cls: type[nn.Module]) -> str:
    """As it is usually written: 'nn.Dense'."""
    return f"nn.{cls.__name__}" if cls.__module__.startswith("flax.linen") else cls.__name__


def modules() -> str:
    """Which modules can be sparse, in words."""
    *names, last = [name_of(kind.module_type) for kind in KINDS]
    return f"{', '.join(names)} or {last}"
