"""ResNet-56 on CIFAR-100 at 98 % sparsity, with the paper's settings (section 4.1).

    python -m dst.data.cifar cifar100        (once; needs internet)
    python -m dst.main --config=configs/cifar100_resnet56.py

Expected, the paper's Table 1 (top-1 test accuracy in %, mean of 3 seeds):
    49.14 at 98 % sparsity; 60.05 at 95 % (--config.sparsity=0.95); 64.72 at 90 %;
    68.80 dense (--config.method=dense).
Expected time: 200 epochs of 390 steps; on 2 CPU cores about 1.5 s a step, and 0.15 s truly sparse
(--config.execution=sparse).
"""

from ml_collections import ConfigDict

from dst.config import default


def get_config() -> ConfigDict:
    """The defaults are the paper's, so that only data set and model are left to say."""
    config = default()
    config.dataset = "cifar100"
    config.model = "resnet"
    config.depth = 56
    return config
