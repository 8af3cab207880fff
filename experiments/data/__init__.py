"""Reads images and texts: where they come from, splits, batches."""
