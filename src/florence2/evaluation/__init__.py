"""Metrics for labelled data: overlaps, average precision, calibration, read text, intervals."""
