"""Ours against the reference implementation and the usual way to serve it, in the same run."""
