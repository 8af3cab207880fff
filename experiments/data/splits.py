"""Until the scripts import these from `images`."""

from experiments.data.images import epoch_order, fixed_split

__all__ = ["epoch_order", "fixed_split"]
