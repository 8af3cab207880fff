"""Measurements behind the tables and figures in docs/."""
