"""The demo checkpoint: the scenes it learns from, their ground truth, and its training."""
