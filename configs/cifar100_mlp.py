"""CIFAR-100, flattened, on a wide MLP in sparse execution: dimensions that cost no weights.

    python -m dst.main --config=configs/cifar100_mlp.py

3072-1024-1024-100 with 429,670 connections. Wider networks with as many:
    --config.hidden="(4096, 4096)" --config.sparsity=0.985566882
    --config.hidden="(16384, 16384)" --config.sparsity=0.998658981
Expected test accuracy: 18.9 % (seed 0), 17.2 and 15.9 % for the wider ones.
Expected time: about 3 minutes on 2 CPU cores; 15 for the widest.
"""

from ml_collections import ConfigDict

from dst.config import default


def get_config() -> ConfigDict:
    """An MLP, of which the paper has none; its schedule, 17 times shorter."""
    config = default()
    config.dataset = "cifar100"
    config.model = "mlp"
    config.hidden = (1024, 1024)
    config.execution = "sparse"
    config.sparsity = 0.900000093
    config.distribution = "er"

    config.epochs = 12
    config.learning_rate = 0.05
    config.lr_drop_epochs = (5, 7)
    config.rewire_every = 60
    config.rewire_end_epoch = 7
    return config
