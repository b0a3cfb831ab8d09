"""Ours against the reference implementation, on the same weights, in the same run."""
