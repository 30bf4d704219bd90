"""The networks of the paper as plain Linen modules, a model a file; they know nothing of sparsity.

`table.py` says what builds each, which config fields it reads and which images it takes. Any Linen
module whose layers are `nn.Dense` and `nn.Conv` is a model.

A model of your own
===================
Register it in your config file, or in a module that the file imports: a function that makes the
module from the config and the number of classes, and which of `depth`, `width` and `hidden` it
reads. It sees these and `precision`. What else it depends on is its own: give every variant a name.
Say this is `convnet.py`:

    import flax.linen as nn
    import jax.numpy as jnp

    from dst.config import default
    from dst.models import MODELS, Architecture


    class ConvNet(nn.Module):
        channels: int
        num_classes: int
        dtype: str

        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(self.channels, (3, 3), strides=2, dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
            logits = nn.Dense(self.num_classes, dtype=self.dtype)(x.reshape(x.shape[0], -1))
            return logits.astype(jnp.float32)


    def build(config, num_classes):
        return ConvNet(round(8 * config.width), num_classes, config.precision)


    MODELS.register("convnet", Architecture(build, reads=("width",), smallest=3))


    def get_config():
        config = default()
        config.dataset, config.model = "digits", "convnet"
        config.sparsity, config.epochs, config.rewire_every = 0.8, 3, 10
        return config

Then `python -m dst.main --config=convnet.py --config.width=2` trains it, in both executions.
"""

from dst.models.mlp import MLP
from dst.models.resnet import ResNet
from dst.models.table import MODELS, Architecture, build, check_logits
from dst.models.vgg import VGG16

__all__ = ["MLP", "MODELS", "VGG16", "Architecture", "ResNet", "build", "check_logits"]
