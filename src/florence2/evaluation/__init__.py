"""How good a checkpoint is: its answers about held-out drawn scenes against the exact truth."""
