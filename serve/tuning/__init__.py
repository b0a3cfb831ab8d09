"""Prompts, thresholds, NMS and tiling chosen by labeled images; what a score is worth there."""
