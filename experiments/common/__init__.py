"""What the scripts in `experiments` share: data, training, checkpoints, logging and figures."""
