"""Scoring: bits per byte, every byte exactly once. `windows` plans which, `evaluate` scores them."""
