"""Trains a network: settings, the loop, the step, checkpoints, the folder of a run."""
