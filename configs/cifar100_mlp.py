"""CIFAR-100, flattened, on a wide MLP in sparse execution: dimensions that cost no weights."""

from dst.config import default


def get_config():
    """The network has 429,670 connections; wider ones with as many: experiments/results."""
    config = default()
    config.dataset = "cifar100"
    config.model = "mlp"
    config.hidden = (1024, 1024)
    config.execution = "sparse"
    config.sparsity = 0.900000093
    config.distribution = "er"

    config.epochs = 12  # the paper's schedule, 17 times shorter
    config.learning_rate = 0.05
    config.lr_drop_epochs = (5, 7)
    config.rewire_every = 60
    config.rewire_end_epoch = 7
    return config
