"""Data sets as uint8 arrays, a set a file, and the batch of a step as a pure function.

`table.py` says what is known of each, `dataset.py` reads and checks one, `pipeline.py` makes the
batches. A data set knows nothing of models, methods or sparsity.

A data set of your own
======================
Register it in your config file, or in a module that the file imports: the number of training
images, the shape of one, the number of classes, and what reads them all once a run begins. It is
called with `config.data_dir` and returns uint8 pixels. Say this is `greys.py`:

    import numpy as np

    from dst.config import default
    from dst.data import DATASETS, Source, Splits


    def read(data_dir):
        rng = np.random.default_rng(0)
        labels = np.arange(480) % 4
        noise = rng.integers(0, 60, (480, 8, 8, 1))
        images = (60 * labels[:, None, None, None] + noise).astype(np.uint8)
        return Splits(images[:400], labels[:400], images[400:], labels[400:])


    DATASETS.register("greys", Source(400, image=(8, 8, 1), num_classes=4, read=read))


    def get_config():
        config = default()
        config.dataset = "greys"
        config.model, config.hidden = "mlp", (32,)
        config.batch_size, config.epochs, config.rewire_every = 40, 5, 10
        return config

Then `python -m dst.main --config=greys.py` trains, and resumes, and its log says "greys". `Splits`
may also say the mean and the standard deviation of each channel, which are otherwise those of the
training images, and the names of augmentations, which `pipeline.OPERATIONS` has. What is not as the
row says is refused in a sentence before the first step.
"""

from dst.data.dataset import Dataset, load
from dst.data.table import DATASETS, Source, Splits

__all__ = ["DATASETS", "Dataset", "Source", "Splits", "load"]
