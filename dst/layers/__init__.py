'''The kinds of layers that can be sparse, a kind a file, each with its own mathematics.

A layer is static data and pure functions; nothing here knows of masks, arenas or methods, and
nothing elsewhere asks for a layer's kind. `base.py` has the protocol; a kind is one file more.

A kind of your own
------------------

`dst.network` finds the layers of every kind that is registered; the kernels of other modules stay
dense. A kind says which module it stands for, describes a call of it, and has the product:

    import flax.linen as nn
    import jax
    from dst.layers import Layer, register

    def convolved(h, kernel):  # (B, n, n_in), (k, n_in, n_out) -> (B, n, n_out)
        sizes = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=sizes)

    class Conv1d(nn.Module):
        """A convolution over sequences, halved."""

        features: int
        width: int = 3

        @nn.compact
        def __call__(self, h):
            shape = (self.width, h.shape[-1], self.features)
            return 0.5 * convolved(h, self.param("kernel", nn.initializers.normal(1), shape))

    @register
    class Conv1dLayer(Layer):
        module_type = Conv1d

        @classmethod
        def describe(cls, path, module, h):
            return cls(path, (module.width, h.shape[-1], module.features))

        def apply(self, h, kernel):
            return 0.5 * convolved(h, kernel)

Such a layer trains in both executions, with every method and heuristic. What is asked of it:

- The module is called with h alone. Its parameters are `kernel`, float32 (..., n_in, n_out), and
  perhaps `bias`; `apply` gives y without that bias, and is linear in the kernel. n_in and n_out are
  the last axes of h and y. `dst.network` tries all this on random numbers, and refuses a kind that
  does not fit in a sentence.
- Settings beside path and shape (strides, say) are fields: decorate the kind with
  `@dataclasses.dataclass(frozen=True)`, too. They must be hashable.

The rest of `base.Layer` are general defaults: exact, but the gradient on S is picked from the whole
kernel's, and in sparse execution the kernel is made for the moment of the call. Whoever knows
better overrides `gradient_at`, `gradient_block`, `signed_sums`, or, for h @ kernel, says `matrix`,
as `dense.py` and `conv.py` do.
'''

from dst.layers.base import KINDS, Layer, kind_of, register
from dst.layers.conv import Conv
from dst.layers.dense import Dense, DenseGeneral

# Their `obstacle` looks at every field of the module: nothing has to be tried.
BUILT_IN = (register(Dense), register(DenseGeneral), register(Conv))

__all__ = ["BUILT_IN", "KINDS", "Conv", "Dense", "DenseGeneral", "Layer", "kind_of", "register"]
