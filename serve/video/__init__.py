"""Labeling a video: asking about its frames, following what was found, a project of it on disk."""
