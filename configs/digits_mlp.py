"""The quickstart: an MLP at 98 % sparsity on the 1,797 digits that come with scikit-learn.

    python -m dst.main --config=configs/digits_mlp.py        (or: make run)

Expected test accuracy (360 images, so one of them is 0.28 %) for seeds 0, 1 and 2:
    97.5, 97.2 and 97.2 %, masked or truly sparse (--config.execution=sparse, a third of the time);
    96.7, 96.4 and 96.1 % with static masks (--config.method=random);
    98.1, 98.1 and 98.1 % dense (--config.method=dense).
Expected time: about a minute on 2 CPU cores.
"""

from ml_collections import ConfigDict

from dst.config import default


def get_config() -> ConfigDict:
    """64-1024-1024-10, of whose 1.1 million connections 22 thousand are active."""
    config = default()
    config.dataset = "digits"
    config.model = "mlp"
    config.hidden = (1024, 1024)
    config.batch_size = 32
    config.epochs = 60  # of 44 steps
    config.learning_rate = 0.05
    config.init_gain = 2.0  # He's, as when the rest was chosen
    config.weight_decay = 2e-3  # this and the batch size were chosen on held-out training images
    config.rewire_every = 100
    config.rewire_end_epoch = 45
    config.lr_drop_epochs = (30, 45)
    config.patience = 0
    config.checkpoint_every = 500
    return config
