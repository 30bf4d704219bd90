"""Networks of one's own with `dst`, each a page: `python -m experiments.examples.NAME --help`."""
