"""Whole networks, with the explicit and weight-tied controls they are compared with."""
