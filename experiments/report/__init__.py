"""A report on the solves of a trained network: its numbers, figures and page."""
