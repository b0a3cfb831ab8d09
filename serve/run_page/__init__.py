"""One page about a run: how it went, what failed and why, and what to look at first."""
