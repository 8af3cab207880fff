"""Scripts that train and measure deep equilibrium networks: `python -m experiments.NAME --help`."""
